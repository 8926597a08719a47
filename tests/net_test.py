"""Small models compute the numbers that tests/net_values.json holds: those of an earlier version.

A change that means to move the numbers writes them anew, `python -m tests.net_test`, and says why.
"""

import functools
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from configs import cogvideox, wan
from prophy_jax import build, train
from prophy_jax.diffusion import generate
from prophy_jax.run import optim, parallel
from tests.conftest import ROOT, build_run

VALUES = ROOT / "tests" / "net_values.json"
TOLERANCE = 2e-4  # of the size of an array: processors round differently
BATCH, LATENT, TOKENS, WORDS, WIDTH = 4, (3, 8, 8, 16), 3 * 4 * 4, 6, 8

# What is computed of each case. A second part of the same kind would mostly take time to compile.
CASES = {
    "wan": ("start", "forward", "step", "clips", "localiser"),
    "wan,pb+seb": ("step",),
    "cogvideox rotary": ("forward", "step"),
    "cogvideox sincos": ("forward", "clips"),
}


def get_config(case: str):
    if case.startswith("wan"):
        config = wan.get_config(case.replace("wan", "tiny"))
        config.backbone.freq_dim = 16
    else:
        config = cogvideox.get_config("tiny")
        config.backbone.time_dim = 16
        config.samples.update(solver="cogvideox-dpm", guidance_schedule="dynamic")
        if case.endswith("sincos"):
            config.backbone.positions = "sincos"
    config.backbone.update(dim=32, num_heads=2, ffn_dim=32, text_dim=WIDTH, text_len=WORDS)
    if config.parts.branch.semantic:
        config.parts.branch.semantic.hidden = 8
    config.optimizer.groups = (("branch/", 1e-2), ("backbone/", None))
    config.batch_size, config.accumulation = BATCH, 2 if case == "wan" else 1
    config.caption_dropout = 0.5
    config.samples.steps = 3
    return config


def make_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    present = (rng.random((BATCH, 17)) < 0.3).astype(np.float32)
    return {
        "latents": rng.standard_normal((BATCH, *LATENT), np.float32),
        "text": rng.standard_normal((BATCH, WORDS, WIDTH), np.float32),
        "text_mask": np.arange(WORDS) < rng.integers(1, WORDS + 1, (BATCH, 1)),
        "category": present,
        "alignment": rng.uniform(-1, 1, (BATCH, TOKENS, 17)).astype(np.float32) * present[:, None],
        "alignment_present": present,
    }


def draw(path, leaf) -> np.ndarray:
    """A parameter in place of the one that the model starts from: many of those are zero."""
    name = "/".join(entry.key for entry in path)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return (name.endswith("scale") + 0.1 * rng.standard_normal(leaf.shape)).astype(np.float32)


def summary(array) -> list[float]:
    """Mean, root mean square and the first four entries."""
    numbers = np.asarray(array, np.float64)
    kept = [numbers.mean(), np.sqrt(np.square(numbers).mean()), *numbers.ravel()[:4]]
    return [float(f"{value:.7g}") for value in kept]


def compute(case: str) -> dict[str, list[float]]:
    """Summaries of what a case computes, by name."""
    run = build_run(get_config(case), jax.devices()[:1])
    with jax.set_mesh(run.mesh):
        params = jax.tree_util.tree_map_with_path(draw, run.layout)
        arrays = {}
        for part in CASES[case]:
            found = PARTS[part](run, params, make_batch())
            arrays |= {f"{part}/{name}": value for name, value in found.items() if value is not None}
        return {name: summary(value) for name, value in arrays.items()}


def start(run, params, batch):
    """The parameters that a run starts from."""
    return flatten_dict(build.init_params(run.config, run.model, run.layout), sep="/")


def forward(run, params, batch):
    """What the model says of noisy clips."""
    objective = run.objective

    @jax.jit
    def look(params, batch, noise, time):
        noisy = objective.add_noise(batch["latents"], noise, time)
        output = run.model(params, noisy, objective.model_time(time), batch)
        routing = output.seen["branch"]
        return {
            "velocity": output.prediction,
            "loss": objective.per_sample_loss(output.prediction, batch["latents"], noise, time),
            "semantic_logits": routing.semantic_logits,
            "rho_r": routing.refinement,
            "P_r": routing.alignment,
        }

    noise = np.random.default_rng(1).standard_normal(batch["latents"].shape, np.float32)
    return look(params, batch, noise, np.float32([0.1, 0.4, 0.7, 0.95]))


def step(run, params, batch):
    """Metrics and gradient of a step of training. Its optimizer keeps the gradient and moves nothing."""
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    keeper = optax.GradientTransformation(zeros, lambda gradient, state, params: (zeros(gradient), gradient))
    trainable, frozen = optim.split(params, optim.groups_of(run.config.optimizer))
    state = train.place_state(trainable, keeper, run.mesh)
    empty = {"text": np.ones((WORDS, WIDTH), np.float32), "text_mask": np.arange(WORDS) < 1}
    compiled = jax.jit(train.make_train_step(run.model, run.objective, run.chosen, keeper, run.config))
    state, metrics = compiled(state, frozen, empty, parallel.put_batch(batch, run.mesh))
    gradient = flatten_dict(state.optimizer, sep="/")
    return metrics | {f"of/{path}": leaf for path, leaf in gradient.items()}


def clips(run, params, batch):
    """Clips that are sampled with the branch and without it."""
    negative = {"text": np.ones((WORDS, WIDTH), np.float32), "text_mask": np.arange(WORDS) < 1}
    sample = generate.make_generator(run.model, run.objective, run.config.samples)
    noise = generate.make_noise(2, np.arange(BATCH), LATENT)
    prompt = {name: batch[name] for name in ("text", "text_mask")}
    return {
        name: sample(params, noise, prompt, negative, scale)
        for name, scale in (("with the branch", 1.0), ("without it", 0.0))
    }


def localiser(run, params, batch):
    """Which physics the token router sees where."""
    observe = generate.make_observer(run.model, run.objective)
    return {"P_r": observe(params, batch["latents"], batch)["branch"].alignment}


PARTS = {part.__name__: part for part in (start, forward, step, clips, localiser)}


def differences(computed: dict[str, list[float]], stored: dict[str, list[float]]) -> list[str]:
    """Names that one side lacks, and those whose numbers differ by more than rounding explains."""
    faults = sorted(computed.keys() ^ stored.keys())
    for name in computed.keys() & stored.keys():
        size = max(stored[name][1], 1e-5)  # a gradient that is smaller is rounding alone
        apart = np.abs(np.subtract(computed[name], stored[name])).max()
        if not apart <= TOLERANCE * size:
            faults.append(f"{name}: {computed[name]}, stored {stored[name]}")
    return faults


@pytest.fixture(scope="module")
def stored():
    return json.loads(VALUES.read_text())


@pytest.mark.parametrize("case", CASES)
def test_a_model_computes_the_stored_numbers(case, stored):
    assert not differences(compute(case), stored[case])


def test_the_comparison_notices_small_changes(stored):
    for values in stored.values():
        assert not differences(values, values)
        for name, numbers in values.items():
            if numbers[1] > 1e-5:
                assert differences({**values, name: [1.001 * number for number in numbers]}, values)
            assert differences({key: values[key] for key in values if key != name}, values) == [name]


if __name__ == "__main__":
    lines = ",\n".join(
        f" {json.dumps(case)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {numbers}" for name, numbers in compute(case).items())
        + "\n }"
        for case in CASES
    )
    VALUES.write_text(f"{{\n{lines}\n}}\n")
    print(f"wrote {VALUES}")
