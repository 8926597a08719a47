"""What the evaluators of a configuration say of a model: a score for each held-out prompt.

b clips of a batch, M prompts, T h w latent grid.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from prophy_jax import build, models
from prophy_jax.data import loader, records
from prophy_jax.diffusion import generate
from prophy_jax.evaluation import diffusion
from prophy_jax.evaluation.evaluator import Clips, Evaluator
from prophy_jax.models.beside.part import Model
from prophy_jax.run import encoders, workdir
from prophy_jax.run.errors import UserError


def build_evaluators(config: Any) -> list[Evaluator]:
    """Those of `config.evaluators`. Raises UserError on unknown ones, and on a metric of two."""
    package, found, owners = "prophy_jax.evaluation", [], {}
    for name, spec in config.evaluators.items():
        one = models.build(spec, package=package)
        if not isinstance(one, Evaluator):
            raise UserError(f"config.evaluators.{name}.module={spec['module']!r} is no evaluator")
        for metric in one.metrics:
            if metric in owners:
                raise UserError(f"config.evaluators: {owners[metric]!r} and {name!r} both give {metric!r}")
            owners[metric] = name
        found.append(one)
    if not found:
        raise UserError(
            "config.evaluators is empty: name one, such as dict(loss=dict(module='held_out_loss'))"
        )
    return found


def settings(config: Any) -> dict[str, Any]:
    """What scores depend on, besides the data and the backbone; JSON types."""
    whole = workdir.config_as_json(config)
    samples = {key: value for key, value in whole["samples"].items() if key not in ("every", "clips")}
    own = {"evaluators": whole["evaluators"], "study": whole["study"], "samples": samples}
    return own | {"run": workdir.run_identity(config, "study")}


def score(
    config: Any,
    model: Model,
    objective: Any,
    params: Mapping[str, Any],
    mesh: jax.sharding.Mesh,
    bucket: str,
    split: str,
) -> dict[str, Any]:
    """Scores of the first `config.study.prompts` prompts of a split, sampled from the same noises always.

    Noise depends on `config.study.seed` and on the number of the prompt, and not on `config.seed`. Call it
    with the mesh set.

    Returns:
        JSON types: metrics, {name: {"text", "higher_is_better"}}; prompts, M of {"id", "caption"}; scores,
        {name: M numbers, None where there is none}.
    """
    evaluators, size = build_evaluators(config), build.microbatch(config)
    fields = tuple(dict.fromkeys(("latents", "category", *model.fields)))
    shape = tuple(records.read_manifest(config.data.dir)["buckets"][bucket]["latent_shape"])
    measure = diffusion.make_measure(model, objective, mesh, config.study.seed, {})
    sample = generate.make_generator(model, objective, config.samples)
    negative, decode = loader.load_empty_text(config.data.dir), encoders.load_codec(config, mesh).decode
    stored = records.open_dataset(config.data.dir, "records", bucket, split)
    prompts: list[dict[str, str]] = []
    scores: dict[str, list[float | None]] = {name: [] for one in evaluators for name in one.metrics}
    for batch in loader.read_once(config.data, split, size, fields):
        left = config.study.prompts - len(prompts)
        if batch["latents"].shape[1:] != shape or left <= 0:
            continue
        measured = measure(None, params, batch, size)
        rows = np.minimum(np.arange(size), len(batch["id"]) - 1)  # the last clip fills up a smaller batch
        prompt = {name: measured[name][rows] for name in model.fields}
        latents = sample(params, measured["noise"][rows], prompt, negative)
        kept = slice(min(left, len(batch["id"])))
        own = [stored[int(index)] for index in batch["index"][kept]]
        captions = [row["caption"].decode() for row in own]
        clips = Clips(
            captions,
            measured["category"][kept],
            own,
            _decoded(decode, np.asarray(latents)[kept]),
            _decoded(decode, measured["latents"][kept]),
            measured["loss"][kept],
            config.data.fps,
        )
        prompts += [
            {"id": str(name), "caption": caption}
            for name, caption in zip(batch["id"][kept], captions, strict=True)
        ]
        for one in evaluators:
            for name, values in one.score(clips).items():
                scores[name] += [float(f"{value:.7g}") if np.isfinite(value) else None for value in values]
    metrics = {name: metric._asdict() for one in evaluators for name, metric in one.metrics.items()}
    return {"metrics": metrics, "prompts": prompts, "scores": scores}


def _decoded(decode: Any, latents: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack([decode(one) for one in latents])
