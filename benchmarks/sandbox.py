"""Rebuilds what docs/sandbox.md shows, and what the sandbox's codec knows of its clips.

    python -m benchmarks.sandbox docs/sandbox.png     the picture, one PNG
    python -m benchmarks.sandbox                      the tables of linear_codec.py, from 400 training clips

Legend: F frames, S frame size in pixels, H W pixels, G = S/8 cells of the masks a side.
"""

import sys
import textwrap
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from prophy_jax.data.sandbox.clip import CELL, SCENES, TIME, make_clip, render_scene, simulate_scene
from prophy_jax.data.sandbox.render import BACKDROPS, backdrop
from prophy_jax.models.codecs import linear_codec


def write_picture(path: str) -> None:
    """Writes a PNG: for each scene seven frames of a clip, and below them its mask in magenta.

    The last entry is one whole training clip, and below it the stored masks.
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
    cells = whole.masks.max(-1)[(np.arange(frames) + TIME - 1) // TIME]  # (F, G, G)
    entries.append((whole.caption, whole.frames / 255, cells.repeat(CELL, 1).repeat(CELL, 2)))

    width, height = 7 * zoom * (third.stop - third.start), label + 2 * zoom * size
    rows = -(-len(SCENES) // blocks)
    sheet = Image.new("RGB", (blocks * (width + gap) + gap, rows * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (title, clip, mask) in enumerate(entries):
        masked = clip + 0.7 * mask[..., None] * (magenta - clip)
        strips = [np.concatenate(list(video[::2]), axis=1) for video in (clip, masked)]
        pixels = np.clip(np.concatenate(strips) * 255 + 0.5, 0, 255).astype(np.uint8)
        x, y = gap + number % blocks * (width + gap), number // blocks * (height + gap)
        scale = zoom if number < len(SCENES) else (sheet.width - gap - x) / pixels.shape[1]
        shape = (int(pixels.shape[1] * scale), int(pixels.shape[0] * scale))
        picture = Image.fromarray(pixels).resize(shape, Image.Resampling.NEAREST)
        title = textwrap.fill(title, 100)
        draw.text((x, y + 2), title, fill="black")
        sheet.paste(picture, (x, y + label * (1 + title.count("\n"))))
    sheet.save(path)


def measure_tables(clips: Iterable[np.ndarray]) -> dict[str, list]:
    """Recomputes FIRST, LATER, MEAN and STD from clips (F, H, W, 3) uint8.

    The basis is orthonormal, so the coefficients of greatest energy lose least. A coefficient in
    both lists has the same channel in both, so that a channel means much the same in every latent.
    """
    count = 0
    moments: dict[int, Any] = {1: 0.0, linear_codec.STRIDE: 0.0}
    bases = {n: linear_codec.basis(n).astype(np.float32) for n in moments}
    for clip in clips:
        video = clip.astype(np.float32) / 127.5 - 1
        for n, part in ((1, video[:1]), (linear_codec.STRIDE, video[1:])):
            raw = np.tensordot(linear_codec.patches(part, n), bases[n], (-1, -1))  # (n, h, w, frequencies)
            moments[n] += np.stack([raw.mean((0, 1, 2)), (raw**2).mean((0, 1, 2))])
        count += 1
    ranked = {}
    for n, (_, square) in moments.items():
        best = np.unravel_index(np.argsort(-square, axis=None)[: linear_codec.CHANNELS], square.shape)
        ranked[n] = [tuple(int(i) for i in frequencies) for frequencies in np.transpose(best)]
    new = iter([c for c in ranked[1] if c not in ranked[linear_codec.STRIDE]])
    chosen = {linear_codec.STRIDE: ranked[linear_codec.STRIDE]}
    chosen[1] = [c if c in ranked[1] else next(new) for c in ranked[linear_codec.STRIDE]]
    tables = {"FIRST": chosen[1], "LATER": chosen[linear_codec.STRIDE], "MEAN": [], "STD": []}
    for n in (1, linear_codec.STRIDE):
        mean, square = np.asarray([moments[n][:, *c] for c in chosen[n]], np.float64).T / count
        tables["MEAN"].append(np.round(mean, 4).tolist())
        tables["STD"].append(np.round(np.sqrt(square - mean**2), 4).tolist())
    return tables


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write_picture(sys.argv[1])
    else:
        print(measure_tables(make_clip(0, "train", index).frames for index in range(400)))
