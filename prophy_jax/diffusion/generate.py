"""Clips from noise: what training, sampling and measuring share.

B prompts, T h w latent grid, L text length, D text width.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from prophy_jax.diffusion import guided, solvers
from prophy_jax.models.beside.part import Batch, Model, Scale
from prophy_jax.run import parallel
from prophy_jax.run.errors import NotFinite

Wrapper = Callable[[solvers.Velocity], solvers.Velocity]
PIECES = 10  # that a loop which shows its progress is called in


def make_tables(objective: Any, settings: Any) -> tuple[solvers.Solver, guided.Guidance]:
    """The solver and the guidance of `config.samples`.

    Raises UserError on settings that do not fit the objective or each other.
    """
    solver = objective.solver(settings.solver, settings.steps, settings.shift)
    guidance = guided.guidance_schedule(settings.guidance_schedule, settings.guidance, settings.steps)
    return solvers.skipping(solver, settings.skip), guidance


def make_sampler(
    model: Model, objective: Any, settings: Any, wrappers: Sequence[Wrapper] = ()
) -> tuple[Callable, Callable]:
    """Two compiled functions, (begin, loop): what a clip needs once, and any number of solver steps.

    begin(params, noise, prompt, negative, rows) -> (prompt, state)
    loop(params, state, prompt, scale, first, last) -> state after steps first..last-1; the one given is
        donated. One program runs them all and holds the network once.

    Steps that `settings.skip` lists do not call the network. Rows, and with guidance the pairs of rows, are
    split over the mesh in force wherever they divide: a single guided clip takes two devices.

    Args:
        model: The backbone and its parts.
        objective: What the backbone was trained with; the solver is one of its own.
        settings: `config.samples`.
        wrappers: What else changes the prediction on its way to the solver, such as steering; the first is
            next to guidance.

    Raises:
        UserError: on settings that do not fit the objective or each other.
    """
    solver, guidance = make_tables(objective, settings)

    @functools.partial(jax.jit, static_argnames="rows")
    def begin(
        params: Any, noise: jax.Array, prompt: Batch, negative: Batch, rows: int | None
    ) -> tuple[Any, Any]:
        paired = {name: guided.pair_prompts(prompt[name], negative.get(name), guidance) for name in prompt}
        read = model.read_ahead(params, jax.tree.map(split_rows, paired), rows)
        return read, jax.tree.map(split_rows, solvers.start(solver, noise))

    @functools.partial(jax.jit, donate_argnames="state")
    def loop(params: Any, state: Any, prompt: Any, scale: Scale, first: Any, last: Any) -> Any:
        def predict(x: jax.Array, t: jax.Array) -> jax.Array:
            return model.predict(params, split_rows(x), t, prompt, scale).prediction

        velocity = guided.guided(predict, guidance)
        for wrap in wrappers:
            velocity = wrap(velocity)
        state = solvers.advance(solver, velocity, state, first, last)
        return jax.tree.map(split_rows, state)

    return begin, loop


def split_rows(x: jax.Array) -> jax.Array:
    """Splits (B, ...) over data and fsdp of the mesh in force; whole on every device if B does not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    divides = x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
    return jax.lax.with_sharding_constraint(x, parallel.BATCH if divides else PartitionSpec())


def make_generator(
    model: Model, objective: Any, settings: Any, wrappers: Sequence[Wrapper] = ()
) -> Callable[..., jax.Array]:
    """generate(params, noise, prompt, negative, scale, after_steps) -> latents (B, T, h, w, 16).

    `prompt` has the fields of `Model.fields`, leading B. What the blocks read of the prompts is computed
    once; then all `settings.steps` solver steps are one call of one program. `negative` is the encoded
    negative prompt that guidance compares with, of one prompt; fields that it lacks are those of the prompt.

    `after_steps(n)` is called after every n steps that are done. The program is then called in a few pieces,
    and does not call back itself: jax 0.10 cannot keep such programs in its compile cache. After each piece
    it raises `NotFinite` if a number of the latents is not finite.
    """
    begin, loop = make_sampler(model, objective, settings, wrappers)
    steps = settings.steps

    def generate(
        params: Any,
        noise: jax.Array,
        prompt: Batch,
        negative: Batch,
        scale: Scale = 1.0,
        after_steps: Callable[[int], None] | None = None,
    ) -> jax.Array:
        masks = np.asarray(prompt["text_mask"]), np.asarray(negative["text_mask"])[None]
        rows = text_rows(np.concatenate(masks))
        read, state = begin(params, noise, prompt, negative, rows=rows)
        scales = jax.tree.map(jnp.float32, scale)
        pieces = min(PIECES, steps) if after_steps else 1
        for piece in np.array_split(np.arange(steps), pieces):
            state = loop(params, state, read, scales, piece[0], piece[-1] + 1)
            if after_steps:
                finite = np.isfinite(np.asarray(state.x)).reshape(len(state.x), -1).all(axis=1)
                if not finite.all():
                    first, last = piece[0] + 1, piece[-1] + 1
                    where = f"step {last}" if first == last else f"one of steps {first} to {last}"
                    raise NotFinite(
                        f"the latents became NaN or infinite in {where} of {steps}: a lower "
                        "config.samples.guidance, config.backbone.dtype=float32 or other weights may help",
                        np.flatnonzero(~finite),
                    )
                after_steps(len(piece))
        return state.x

    return generate


def text_rows(mask: np.ndarray) -> int | None:
    """How many rows of text a sampler keeps, in steps of 32; None for all: see `Backbone.text_ahead`.

    On CPUs, where it was measured to be faster. Fused kernels elsewhere take no cheap bias.
    """
    rows = 32 * (int(mask.sum(-1).max()) // 32 + 1)
    return rows if jax.default_backend() == "cpu" and rows < mask.shape[-1] else None


def make_noise(seed: int, indices: np.ndarray, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise (B, *shape) to start from. Row i depends on the seed and indices[i] alone.

    What a stochastic solver adds later follows from it, see `solvers.sample_keys`.
    """
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.asarray(indices))
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def make_observer(model: Model, objective: Any, sigma: float = 0.2) -> Callable[..., dict[str, Any]]:
    """observe(params, latents, prompt, seed) -> what every part saw of clean latents, see `Output.seen`.

    The parts read noisy latents: noise is added until its share is `sigma`, in every family.
    """

    @jax.jit
    def observe(params: Any, latents: jax.Array, prompt: Batch, seed: int = 0) -> dict[str, Any]:
        noise = jax.random.normal(jax.random.key(seed), latents.shape)
        return diffusion_error(model, objective, params, {**prompt, "latents": latents}, noise, sigma)[1]

    return observe


def diffusion_error(
    model: Model, objective: Any, params: Any, batch: Batch, noise: jax.Array, sigma: Any
) -> tuple[jax.Array, dict[str, Any]]:
    """(loss (B,) of each clip, what the parts saw) at one share of noise, captions as they are."""
    time = jnp.full((noise.shape[0],), sigma)
    noisy = objective.add_noise(batch["latents"], noise, time)
    output = model(params, noisy, objective.model_time(time), batch)
    return objective.per_sample_loss(output.prediction, batch["latents"], noise, time), output.seen
