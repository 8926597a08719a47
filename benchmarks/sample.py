"""Sampling: one guided step, and a whole clip from the text to the frames, with the branch and without.

    python -m benchmarks.sample [--shapes=tiny,base] [--steps=N] [--skip=2,5] [--whole] [--json=FILE]

Random weights without a zero. One program runs the steps, the pair of rows that guidance needs in one call:

    step    a guided step, from --steps of them in one call of the loop; the two models take turns
    clip    the same times the steps of a clip (50 on Wan's shapes), and with --skip what a clip takes that
            skips these steps of it
    whole   --whole: text encoder, loop and video decoder one after the other. UMT5-XXL and the VAE at their
            sizes on Wan's shapes, small ones of the same classes on the others

On several devices the pair is split over them (XLA_FLAGS=--xla_force_host_platform_device_count=2 simulates
two on a CPU).

B prompts, T h w latent grid, L text rows.
"""

import argparse
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from benchmarks import measure
from prophy_jax.plan import flops
from prophy_jax.run.errors import one_line_errors
from prophy_jax.testing.counting import count_compiles

GUIDANCE, SHIFT = 6.0, 8.0
# Seconds of a clip on one H100, computed from published or assumed rates, and the goals; by shape and branch.
EXPECTED = {
    ("wan81", False): "50 s at the kernels' roof; goal 56 s",
    ("wan81", True): "67 s at the kernels' roof; goal 74 s",
    ("wan49", False): "23 s at the kernels' roof",
    ("wan49", True): "31 s at the kernels' roof",
}


class Sampler:
    """The compiled loop of one model with what it reads, ready to run steps."""

    def __init__(
        self, model: Any, objective: Any, shape: measure.Shape, skip: tuple[int, ...], text: Any, mask: Any
    ):
        import jax

        from prophy_jax.diffusion import generate

        self.model, self._objective = model, objective
        self._settings = SimpleNamespace(
            solver="unipc",
            steps=shape.steps,
            shift=SHIFT,
            guidance=GUIDANCE,
            guidance_schedule="constant",
            skip=skip,
        )
        self._begin, self._loop = generate.make_sampler(model, objective, self._settings)
        self._params = measure.random_params(model, shape)
        self._noise = jax.random.normal(jax.random.key(3), (1, *shape.latents, 16))
        self.read(text, mask)

    def read(self, text: Any, mask: Any) -> None:
        """The prompt (1, L, D) and its mask; the negative prompt is its first eighth."""
        import jax.numpy as jnp
        import numpy as np

        from prophy_jax.diffusion import generate

        short = jnp.arange(mask.shape[1]) < mask.shape[1] // 8
        negative = {"text": text[0] * short[:, None], "text_mask": short}
        prompt, rows = {"text": text, "text_mask": mask}, generate.text_rows(np.asarray(mask))
        self._prompt, self._start = self._begin(self._params, self._noise, prompt, negative, rows=rows)

    def step_flops(self) -> int:
        """Of a guided step."""
        from prophy_jax.diffusion import generate

        _, loop = generate.make_sampler(flops.plain(self.model), self._objective, self._settings)
        arguments = self._params, self._start, self._prompt, 1.0, 0, 1
        return flops.model_flops(loop, *arguments, unknown_length=1)

    def __call__(self, steps: int | None = None) -> Any:
        """Latents after `steps` steps, or all of them."""
        import jax
        import jax.numpy as jnp

        state = jax.tree.map(jnp.copy, self._start)  # the loop takes its state for itself
        last = self._settings.steps if steps is None else steps
        return self._loop(self._params, state, self._prompt, jnp.float32(1), 0, last).x


def stand_ins(shape: measure.Shape) -> tuple[dict, dict]:
    """What `t5.build` and `wan_vae.build` take: of Wan2.1 for its shapes, else small ones that fit."""
    if shape.half:
        return dict(variant="umt5-xxl", dtype="bfloat16", length=shape.text), dict(dtype="bfloat16")
    sizes = dict(vocab_size=256, d_model=shape.text_dim, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    return dict(**sizes, shared_bias=False, length=shape.text), dict(base_dim=8, num_res_blocks=1)


def make_text_encoder(shape: measure.Shape):
    """encode() -> (text (1, L, D), mask (1, L)); the weights are freed with it."""
    import jax
    import jax.numpy as jnp

    from prophy_jax.models.text import t5

    model = t5.build(**stand_ins(shape)[0])
    params = jax.jit(lambda key: jax.tree.map(lambda leaf: leaf.astype(model.dtype), model.init(key)))(
        jax.random.key(4)
    )
    ids = jax.random.randint(jax.random.key(5), (1, shape.text), 0, model.config.vocab_size)
    mask = jnp.arange(shape.text)[None] < shape.text * 6 // 10
    run = jax.jit(model)
    return lambda: (run(params, ids, mask), mask)


def make_decoder(shape: measure.Shape):
    """decode(latents (1, T, h, w, 16)) -> frames (1, F, H, W, 3)."""
    import jax

    from prophy_jax.models.codecs import wan_vae

    model = wan_vae.build(**stand_ins(shape)[1])
    params = jax.jit(model.init)(jax.random.key(6))
    run = jax.jit(model.decode)
    return lambda latents: run(params, latents)


def measure_shape(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    shape = measure.SHAPES[name]
    mask = jnp.arange(shape.text)[None] < shape.text * 6 // 10
    text = jax.random.normal(jax.random.key(2), (1, shape.text, shape.text_dim)) * mask[..., None]
    steps = options.steps or (shape.steps if jax.default_backend() == "cpu" else 5)
    samplers = {}
    for branch in (False, True):
        model, objective = measure.build(shape, parts=branch)
        samplers[branch] = Sampler(model, objective, shape, options.skip, text, mask)
        assert bool(jnp.isfinite(samplers[branch](steps)).all()), "the clip is not finite"
    with count_compiles() as compiled:
        works = {branch: lambda run=run: run(steps) for branch, run in samplers.items()}
        seconds = measure.alternate(works, options.rounds)
    called = sum(step not in options.skip for step in range(steps))
    in_clip = shape.steps - len(options.skip)
    for branch, run in samplers.items():
        times = measure.best_and_median([s / called for s in seconds[branch]])
        step_flops = run.step_flops()
        row = {
            "shape": name,
            "branch": branch,
            "skip": options.skip,
            **{f"step_{key}": value for key, value in times.items()},
            "steps_timed": steps,
            "clip_steps": shape.steps,
            "clip_s": times["min_s"] * in_clip,
            "step_tflop": step_flops / 1e12,
            "tflops_per_s": step_flops / times["min_s"] / 1e12,
            "compiled_later": len(compiled),
            "peak_bytes": measure.peak_memory(),
            "expected": EXPECTED.get((name, branch)) if jax.default_backend() == "gpu" else None,
        }
        print(
            f"{name:6} {'with branch' if branch else 'backbone':12} guided step {times['min_s']:.4g} s "
            f"(median {times['median_s']:.4g}), {row['tflops_per_s']:.4g} TFLOP/s   {shape.steps} steps"
            + (f", {len(options.skip)} skipped" if options.skip else "")
            + f": {row['clip_s']:.4g} s   peak {row['peak_bytes'] / 1e9:.2f} GB"
            + (f"   expected: {row['expected']}" if row["expected"] else ""),
            flush=True,
        )
        yield row
    if options.whole:
        del samplers[False], works, run
        yield whole_clip(name, samplers[True], options)


def whole_clip(name: str, run: Sampler, options: argparse.Namespace) -> dict[str, Any]:
    """Text, loop of all steps, frames. The encoder's weights are freed before the loop needs memory."""
    import jax

    shape = measure.SHAPES[name]
    seconds, first = {}, {}

    def clock(part: str, function: Any, calls: Any = (first, seconds)) -> Any:
        for kept in calls:
            start = time.perf_counter()
            result = jax.block_until_ready(function())
            kept[part] = time.perf_counter() - start
        return result

    encode = make_text_encoder(shape)
    text, mask = clock("text", encode)
    del encode
    run.read(text, mask)
    latents = clock("loop", run, [seconds])  # compiled before
    decode = make_decoder(shape)
    frames = clock("frames", lambda: decode(latents))
    row = {
        "shape": name,
        "branch": True,
        "skip": options.skip,
        "whole_clip_s": sum(seconds.values()),
        "parts_s": seconds,
        "first_calls_s": first,
        "frames": list(frames.shape[1:4]),
        "peak_bytes": measure.peak_memory(),
    }
    parts = ", ".join(f"{part} {value:.4g} s" for part, value in seconds.items())
    parts += f"; first calls: text {first['text']:.4g} s, frames {first['frames']:.4g} s"
    frames, height, width = row["frames"]
    print(f"{name:6} whole clip of {frames} frames {height}x{width}: {row['whole_clip_s']:.4g} s = {parts}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, **measure.ARGUMENTS)
    measure.shapes_argument(parser)
    parser.add_argument("--steps", type=int, help="timed in one call; default: all on a CPU, else 5")
    parser.add_argument("--skip", default="", help="steps of the loop, from 1, that do not call the network")
    parser.add_argument("--whole", action="store_true", help="also text encoder and decoder")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.skip = tuple(int(step) for step in options.skip.split(",") if step)

    import jax

    about, rows = measure.head("sampling"), []
    with jax.set_mesh(measure.all_devices()):
        for name in measure.chosen_shapes(options.shapes):
            for row in measure_shape(name, options):
                rows.append(row)
                measure.write(options.json, about, rows)


if __name__ == "__main__":
    with one_line_errors():
        main()
