"""The sandbox as a TFDS dataset, and the contact sheet of docs/sandbox.md.

Legend: F frames, S frame size in pixels, T = (F-1)/4 + 1 latent times, G = S/8 tokens a side.
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import textwrap
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw

from prophy_jax.data.sandbox.clip import (
    SCENES,
    SPLITS,
    TOKEN,
    check_shape,
    make_clip,
    make_example,
    render_scene,
    simulate_scene,
)
from prophy_jax.data.sandbox.render import BACKDROPS, backdrop
from prophy_jax.data.taxonomy import NUM_PHENOMENA

_BATCH = 512  # clips in flight between the workers and the writer


@dataclasses.dataclass
class SandboxConfig(tfds.core.BuilderConfig):
    """Frame side in pixels, frames per clip (4n + 1), frames per second, seed, clips per split."""

    name: str = "default"
    size: int = 64
    frames: int = 13
    fps: float = 8
    seed: int = 0
    train: int = 2000
    val: int = 100
    test: int = 100


class PhysicsSandbox(tfds.core.GeneratorBasedBuilder):
    """The sandbox in index order; see `build`. Read it with `as_data_source`."""

    name = "sandbox"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [SandboxConfig()]

    def _info(self) -> tfds.core.DatasetInfo:
        config = self.builder_config
        size, frames, side = config.size, config.frames, config.size // TOKEN
        times = (frames - 1) // 4 + 1
        tensor = functools.partial(tfds.features.Tensor, encoding=tfds.features.Encoding.ZLIB)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Procedural clips of 12 physical phenomena with exact masks and state.",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "frames": tensor(shape=(frames, size, size, 3), dtype=np.uint8),
                    "caption": tfds.features.Text(),
                    "category": tfds.features.Tensor(shape=(NUM_PHENOMENA,), dtype=np.float32),
                    "masks": tensor(shape=(times, side, side, NUM_PHENOMENA), dtype=np.float16),
                    "state": tfds.features.Text(),  # JSON
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        make = functools.partial(
            make_example, config.seed, split, size=config.size, frames=config.frames, fps=config.fps
        )
        total = getattr(config, split)
        # "spawn", since JAX may already run threads in this process.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context) as pool:
            for start in range(0, total, _BATCH):
                indices = range(start, min(start + _BATCH, total))
                yield from zip(indices, pool.map(make, indices, chunksize=16), strict=True)


def build(data_dir: str, **settings: Any) -> PhysicsSandbox:
    """Writes the sandbox under `data_dir`, or finds it there, and returns its builder.

    `settings` are the fields of `SandboxConfig`. They name the folder, so that different settings
    never meet in one. New processes make the clips: a script that calls this needs the guard
    `if __name__ == "__main__"`.
    Raises UserError on a shape that the sandbox cannot draw.
    """
    config = SandboxConfig(**settings)
    check_shape(config.size, config.frames, config.fps)
    config.name = (
        f"{config.size}px-{config.frames}f-{config.fps:g}fps-seed{config.seed}"
        f"-{config.train}-{config.val}-{config.test}"
    )
    builder = PhysicsSandbox(data_dir=data_dir, config=config, file_format="array_record")
    builder.download_and_prepare()
    return builder


def contact_sheet(path: str) -> None:
    """Writes a PNG: for each scene seven frames of a clip, and below them its mask in magenta.

    The last entry is one whole training clip, and below it the stored token masks.
    """
    size, frames, zoom, label, blocks, gap = 64, 13, 2, 16, 3, 8
    magenta = np.asarray((1.0, 0.0, 1.0), np.float32)
    third = slice(round(size / 3), round(2 * size / 3))
    entries = []  # of (title, clip, mask), both (F, S, width, ...)
    for number, scene in enumerate(SCENES):
        rng = np.random.default_rng([7, number])
        state = simulate_scene(scene, rng, "middle", np.arange(frames) / 8)
        clip = backdrop(frames, size, number % len(BACKDROPS))
        mask = render_scene(clip, "middle", state)
        entries.append((f"{scene.category}: {scene.name}", clip[:, :, third], mask[:, :, third]))
    whole = make_clip(0, "train", 15, size, frames)
    tokens = whole.masks.max(-1)[(np.arange(frames) + 3) // 4]  # (F, G, G)
    entries.append((whole.caption, whole.frames / 255, tokens.repeat(TOKEN, 1).repeat(TOKEN, 2)))

    width, height = 7 * zoom * (third.stop - third.start), label + 2 * zoom * size
    rows = -(-len(SCENES) // blocks)
    sheet = Image.new("RGB", (blocks * (width + gap) + gap, rows * (height + gap)), "white")
    write = ImageDraw.Draw(sheet)
    for number, (title, clip, mask) in enumerate(entries):
        masked = clip + 0.7 * mask[..., None] * (magenta - clip)
        strips = [np.concatenate(list(video[::2]), axis=1) for video in (clip, masked)]
        pixels = np.clip(np.concatenate(strips) * 255 + 0.5, 0, 255).astype(np.uint8)
        x, y = gap + number % blocks * (width + gap), number // blocks * (height + gap)
        scale = zoom if number < len(SCENES) else (sheet.width - gap - x) / pixels.shape[1]
        shape = (int(pixels.shape[1] * scale), int(pixels.shape[0] * scale))
        picture = Image.fromarray(pixels).resize(shape, Image.Resampling.NEAREST)
        title = textwrap.fill(title, 100)
        write.text((x, y + 2), title, fill="black")
        sheet.paste(picture, (x, y + label * (1 + title.count("\n"))))
    sheet.save(path)
