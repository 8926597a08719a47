r"""What skipping steps of the sampling loop saves, and how far the clips move.

    python -m benchmarks.skipping --config=configs/wan.py:demo_backbone \
        --checkpoint=runs/demo_backbone/backbone [--branch=DIR] [--prompt=TEXT ...] [--json=FILE]

Samples the same noise with all of `config.samples.steps`, then with a quarter, a third and half of them
skipped (`config.samples.skip`), spread evenly after the first tenth; and, for as many calls of the network,
with fewer steps and none skipped. Prints the smallest time of a loop of alternated rounds, the distance of
the latents from those of all steps (norm of the difference over the norm) and the PSNR of the decoded
frames. Without --checkpoint the weights are random, and the distances only indicative: a random network is
another function of time than a trained one.
"""

import pathlib
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks import measure

PROMPTS = (
    "a red ball falls and bounces on the left",
    "orange flames burn on logs on the right",
    "blue ink spreads in water",
    "smoke rises in the middle",
)


def evenly(steps: int, share: float) -> tuple[int, ...]:
    """`share` of the steps to skip, spread evenly after the first tenth, of which two at least run."""
    first, count = max(2, steps // 10 + 1), round(steps * share)
    where = first + (np.arange(count) + 0.5) * (steps - first) / count
    return tuple(int(step) for step in where)


def psnr(frames: np.ndarray, reference: np.ndarray) -> float:
    """Of uint8 frames, in dB."""
    error = np.mean((frames.astype(np.float64) - reference) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


def main(config) -> None:
    import jax
    from absl import flags

    from prophy_jax import build, models
    from prophy_jax.diffusion import generate
    from prophy_jax.run import encoders

    options = flags.FLAGS
    mesh, objective = build.build_mesh(config.mesh), build.build_objective(config)
    model = build.build_model(config, mesh)
    if not options.branch:
        model = model.without()
    layout = build.place(model, mesh, config.frozen_dtype)
    about = measure.head(f"skipping steps, {'trained' if options.checkpoint else 'RANDOM'} weights")
    if options.checkpoint:
        folders = {"backbone": options.checkpoint, "branch": options.branch}
        params = build.load_params(config, layout, folders)
    else:
        params = jax.tree.map(
            lambda leaf, key: 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype), layout, _keys(layout)
        )
    prompts = list(options.prompt or PROMPTS)
    text, mask = models.build(config.text_encoder)([*prompts, config.samples.negative_prompt])
    codec = encoders.load_codec(config, mesh)
    shape = codec.latent_shape(config.data.frames, config.data.height, config.data.width)
    inputs = {
        "noise": np.asarray(generate.make_noise(config.seed, np.arange(len(prompts)), shape)),
        "prompt": {"text": text[:-1], "text_mask": mask[:-1]},
        "negative": {"text": text[-1], "text_mask": mask[-1]},
    }

    def loop(steps: int, skip: tuple[int, ...]):
        settings = SimpleNamespace(**{**config.samples, "steps": steps, "skip": skip})
        sample = generate.make_generator(model, objective, settings)
        return lambda: sample(params, **inputs)

    steps = config.samples.steps
    plans = {"all steps": (steps, ())}
    for name, share in (("a quarter", 1 / 4), ("a third", 1 / 3), ("half", 1 / 2)):
        skip = evenly(steps, share)
        plans[f"{name} skipped"] = (steps, skip)
        plans[f"{steps - len(skip)} steps"] = (steps - len(skip), ())
    with jax.set_mesh(mesh):
        works = {name: loop(*plan) for name, plan in plans.items()}
        latents = {name: np.asarray(work()) for name, work in works.items()}
        seconds = measure.alternate(works, options.rounds)
    frames = {name: codec.decode(value) for name, value in latents.items()}
    rows: list[dict[str, Any]] = []
    for name, (count, skip) in plans.items():
        apart = np.linalg.norm(latents[name] - latents["all steps"]) / np.linalg.norm(latents["all steps"])
        row = {
            "name": name,
            "steps": count,
            "skip": skip,
            "calls": count - len(skip),
            **measure.best_and_median(seconds[name]),
            "latent_distance": float(apart),
            "psnr": psnr(frames[name], frames["all steps"]),
        }
        rows.append(row)
        distance = "" if name == "all steps" else f"latents {apart:.3f} apart, frames {row['psnr']:.1f} dB"
        print(f"{name:18} {row['calls']:3} calls {row['min_s']:8.3f} s   {distance}", flush=True)
    measure.write(pathlib.Path(options.json) if options.json else None, about, rows)


def _keys(tree: Any) -> Any:
    """A random key for every leaf."""
    import jax

    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, list(jax.random.split(jax.random.key(0), len(leaves))))


if __name__ == "__main__":
    from absl import flags

    from prophy_jax.run import cli

    flags.DEFINE_string("checkpoint", None, "Backbone parameters; random ones without.")
    flags.DEFINE_string("branch", None, "Branch parameters of a run; without it, the backbone alone.")
    flags.DEFINE_multi_string("prompt", [], "A prompt; may be given several times.")
    flags.DEFINE_integer("rounds", 3, "Timed rounds.", lower_bound=1)
    flags.DEFINE_string("json", None, "Write the results there too.")
    cli.run(main, __doc__, default="configs/wan.py:tiny")
