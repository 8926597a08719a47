"""What a training run measures on validation clips as it goes: the diffusion loss, and clips to look at.

B batch, T h w latent grid.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prophy_jax.data import batch as batching
from prophy_jax.data import loader, records
from prophy_jax.data.sources import video
from prophy_jax.diffusion import generate
from prophy_jax.models.beside.part import Model
from prophy_jax.run import distributed, encoders, parallel, storage
from prophy_jax.run.errors import NotFinite


def make_validation(
    config: Any, model: Model, objective: Any, mesh: jax.sharding.Mesh
) -> Callable[[Any], dict[str, float]]:
    """validate(params) -> mean diffusion loss on validation clips, at fixed times and fixed noise."""
    times, fields = tuple(config.validation.times), ("latents", *model.fields)

    @functools.partial(jax.jit, out_shardings=parallel.replicated(mesh))
    def losses_at(params, batch):
        batch = parallel.full_precision(batch)
        noise = generate.make_noise(config.seed, batch["index"], batch["latents"].shape[1:])

        def at(sigma):
            return generate.diffusion_error(model, objective, params, batch, noise, sigma)[0].mean()

        return jax.lax.map(at, jnp.float32(times))  # (len(times),)

    def validate(params) -> dict[str, float]:
        batches = loader.read_once(config.data, "val", config.validation.batch_size, fields)
        results = []
        for _, batch in zip(range(config.validation.batches), batches, strict=False):
            inputs = {name: batch[name] for name in (*fields, "index")}
            results.append(jax.device_get(losses_at(params, parallel.put_batch(inputs, mesh))))
        mean = np.mean(results, axis=0)
        values = {f"validation/sigma_{t:g}": float(v) for t, v in zip(times, mean, strict=True)}
        return values | {"validation/loss": float(mean.mean())}

    return validate


def make_validation_clips(
    config: Any, model: Model, objective: Any, mesh: jax.sharding.Mesh
) -> Callable[[dict, str], tuple[np.ndarray, str] | None]:
    """write(params, path): one mp4, the first validation prompts sampled above the real clips.

    All processes of a job call it and sample together; the first one decodes and writes. It returns the
    frames (F, H, W, 3) uint8 and a Markdown text with the prompts, which stands in prompts.md next to the
    mp4; others return None, and so does the first where nothing was written.
    """
    batches = loader.read_once(config.data, "val", config.samples.clips, ("latents", *model.fields))
    batch = parallel.full_precision(next(batches))
    prompt = {name: batch[name] for name in model.fields}
    noise = generate.make_noise(config.seed, batch["index"], batch["latents"].shape[1:])
    negative = loader.load_empty_text(config.data.dir)
    sample = generate.make_generator(model, objective, config.samples)
    first = distributed.is_first()
    codec = encoders.load_codec(config, mesh.local_mesh) if first else None
    buckets = records.read_manifest(config.data.dir)["buckets"]
    bucket = next(name for name in buckets if buckets[name]["counts"].get("val"))  # that of the first batch
    stored = records.open_dataset(config.data.dir, batching.RECORDS, bucket, "val")
    captions = [str(stored.read(index)["caption"], "utf-8") for index in np.asarray(batch["index"])]
    text = "Above: sampled from the prompts. Below: the real clips. From the left:\n\n"
    text += "".join(f"{number}. {caption}\n" for number, caption in enumerate(captions, 1))

    def side_by_side(clips) -> np.ndarray:
        return np.concatenate(list(codec.decode(clips)), axis=2)

    def write(params, path: str) -> tuple[np.ndarray, str] | None:
        latents = distributed.fetch(sample(params, noise, prompt, negative))
        if not first:
            return None
        try:
            rows = [side_by_side(latents), side_by_side(batch["latents"])]
        except NotFinite as error:  # The loss says whether training goes on.
            print(f"warning: {path} is not written: {error}", file=sys.stderr)
            return None
        folder = storage.path(path).parent
        folder.mkdir(parents=True, exist_ok=True)
        frames = np.concatenate(rows, axis=1)
        video.write_mp4(path, frames, config.data.fps)
        storage.write_atomically(folder / "prompts.md", text)
        return frames, text

    return write
