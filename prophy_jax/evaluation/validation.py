"""What a training run measures on validation clips as it goes: the diffusion loss, and clips to look at.

B batch, T h w latent grid.
"""

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
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
from prophy_jax.run.goodput import Goodput
from prophy_jax.run.loop import StopSignal, is_due
from prophy_jax.run.metrics import MetricsWriter


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


class Looks:
    """What a run looks at now and then: the loss on validation clips, and clips sampled from their prompts.

    Args:
        config: the whole configuration.
        model, objective, mesh: of the run.
        workdir: its folder.
        writer: of its metrics; None on all processes but the first.
        clock: where the time goes.
        stop: ends a look when a signal comes.
    """

    def __init__(
        self,
        config: Any,
        model: Model,
        objective: Any,
        mesh: jax.sharding.Mesh,
        workdir: str,
        writer: MetricsWriter | None,
        clock: Goodput,
        stop: StopSignal,
    ) -> None:
        self._config, self._workdir = config, workdir
        self._writer, self._clock, self._stop = writer, clock, stop
        self._validate = make_validation(config, model, objective, mesh)
        if config.samples.every:
            self._write_clips = make_validation_clips(config, model, objective, mesh)

    def __call__(self, step: int, params: Any, due: Mapping[str, bool]) -> None:
        """Looks at what is due after `step`: "validation", "samples"."""
        if due["validation"]:
            values = self._stop.unless_noted(lambda: self._validate(params))
            if self._writer and values:
                self._writer.write(step, values)
            self._clock.spend("validation")
        if due["samples"]:
            clips = self._stop.unless_noted(lambda: self._write_clips(params, self._place_clips(step)))
            if self._writer and clips:
                self._writer.write_clips(step, clips[0], self._config.data.fps, clips[1])
            self._clock.spend("samples")

    def make_up(self, step: int, params: Any, lines: Sequence[Mapping[str, float]]) -> None:
        """Looks at what a former process did not come to after `step`, as the lines of its metrics say.

        Validation is due at step 0 too.
        """
        last = step == self._config.steps
        due = {
            name: is_due(step, self._config[name].every, last, False) for name in ("validation", "samples")
        }
        validated = any("validation/loss" in line for line in lines if line["step"] == step > 0)
        sampled = step == 0 or storage.path(self._place_clips(step)).exists()
        self(
            step,
            params,
            {
                "validation": due["validation"] and distributed.agreed(not validated),
                "samples": due["samples"] and distributed.agreed(not sampled),
            },
        )

    def _place_clips(self, step: int) -> str:
        return os.path.join(self._workdir, "samples", f"step_{step:07d}.mp4")
