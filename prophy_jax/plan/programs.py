"""The programs that a plan is made of: the train step and the sampler, with abstract arguments on a mesh.

B global batch, N video tokens, L text length, D text width.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from prophy_jax import build, train
from prophy_jax.data import batch
from prophy_jax.diffusion import generate
from prophy_jax.models.beside.part import Model
from prophy_jax.run import optim, parallel

Program = tuple[Any, tuple]  # a jitted function, and its arguments


def train_program(config: Any, model: Model, mesh: jax.sharding.Mesh, clips: int) -> Program:
    """The train step of `prophy_jax.train`, jitted as there, for a batch of so many clips."""
    chosen = build.build_losses(config, model)
    params = build.place(model, mesh, config.frozen_dtype, optim.groups_of(config.optimizer))
    trainable, frozen = optim.split(params, optim.groups_of(config.optimizer))
    optimizer = optim.make_optimizer(trainable, config.steps, config.optimizer)
    state = jax.eval_shape(functools.partial(train.new_state, optimizer=optimizer), trainable)
    layout, whole = parallel.shard_largest(state, mesh), parallel.replicated(mesh)
    sizes = build.sizes(config, model)
    build.check_shapes(model, chosen, sizes)
    inputs = batch.shapes(build.list_fields(model, chosen), sizes, clips)
    step = train.make_train_step(model, build.build_objective(config), chosen, optimizer, config)
    return jax.jit(step, donate_argnums=0, out_shardings=(layout, whole)), (
        parallel.placed(state, layout),
        frozen,
        _prompts(inputs, ("text", "text_mask"), whole, one=True),
        parallel.placed(inputs, jax.tree.map(lambda _: NamedSharding(mesh, parallel.BATCH), inputs)),
    )


def sample_program(config: Any, model: Model, mesh: jax.sharding.Mesh, clips: int) -> Program:
    """The sampler of `prophy_jax.sample` for so many clips, all its steps in one program."""
    objective, settings = build.build_objective(config), config.samples
    begin, loop = generate.make_sampler(model, objective, settings)

    def sample(params, noise, prompt, negative):
        prompt, state = begin(params, noise, prompt, negative, rows=None)
        return loop(params, state, prompt, jnp.float32(1.0), 0, settings.steps).x

    rows = parallel.batch_sharding(mesh, clips)
    inputs = batch.shapes(("latents", *model.fields), build.sizes(config, model), clips)
    return jax.jit(sample), (
        build.place(model, mesh, config.frozen_dtype),
        jax.ShapeDtypeStruct(inputs["latents"].shape, jnp.float32, sharding=rows),
        _prompts(inputs, model.fields, rows),
        _prompts(inputs, model.fields, parallel.replicated(mesh), one=True),
    )


PROGRAMS = {"train": train_program, "sample": sample_program}


def _prompts(inputs: Mapping[str, Any], names: Iterable[str], sharding: Any, one: bool = False) -> dict:
    """Fields of a batch in the precision in which a model reads them; with `one`, of a single prompt."""

    def described(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = jnp.float32 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape[one:], dtype, sharding=sharding)

    return {name: described(inputs[name]) for name in names}


def held_bytes(tree: Any) -> int:
    """Bytes of placed abstract arrays on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def argument_bytes(mode: str, arguments: tuple) -> dict[str, float]:
    """What the arguments take on one device, by kind; exact."""
    if mode == "sample":
        params, *rest = arguments
        return {"parameters": held_bytes(params), "inputs": held_bytes(rest)}
    state, frozen, *rest = arguments
    return {
        "parameters": held_bytes(state.params) + held_bytes(frozen),
        "optimizer and EMA": held_bytes((state.ema, state.optimizer)),
        "inputs": held_bytes(rest),
    }
