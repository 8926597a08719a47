"""Samplers as tables of one linear update.

Each family of `prophy_jax.diffusion` has its own solvers, `SOLVERS` of its file. Every one is linear in the
current state and the last predictions of the clean sample, with coefficients that depend on the noise levels
alone. They are computed once, on the host, in float64; what runs on the device is one step, the same for
every solver:

    m      = d0 x + d1 v(x, t)                         the clean sample predicted at x
    x_c    = c0 x + c1 x_c' + c2 m + c3 m' + c4 m''    corrector
    x_next = p0 x_c + p1 m + p2 m' + n z               predictor

where ' marks the step before and '' the one before that; z is standard normal, drawn anew in each step, in
stochastic solvers alone. A step that is skipped does not call the network: its m is on the line, in sigma,
through those of the last two steps that did.

Legend: N solver steps, B batch; states are (B, ...), usually latents (B,T,h,w,16).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prophy_jax.run.errors import UserError

Velocity = Callable[[jax.Array, jax.Array], jax.Array]  # (x (B,...), t scalar) -> v (B,...)


class Step(NamedTuple):
    """What one step reads. All float32; with a leading N axis it is the whole table of a solver."""

    timestep: Any  # () handed to the network, 0..1000
    data: Any  # (2,) of x, v
    corrector: Any  # (5,) of x, x_c', m, m', m''
    predictor: Any  # (3,) of x_c, m, m'
    run: Any = None  # () bool, whether the network is called; None: in every step
    line: Any = None  # (2,) of the last m that the network made and the one before it, where it is not called
    noise: Any = None  # () of z; None: no noise is added


class State(NamedTuple):
    """What one step passes on. All arrays but the keys are (B, ...) float32."""

    x: jax.Array  # predicted state
    corrected: jax.Array  # x_c' of the update
    data1: jax.Array  # m'
    data2: jax.Array  # m''
    ran: Any = None  # the last m that the network made and the one before it, if steps are skipped
    keys: Any = None  # (B,) random keys of the samples, the same in all steps, if noise is added


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Solver:
    """A noise schedule and its coefficients: a pytree, so equal N share one compiled program."""

    sigmas: np.ndarray  # (N+1,) float32 shares of noise (see flow.py), falling; the last is the result's
    steps: Step  # leading axis N

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def timesteps(self) -> np.ndarray:
        """(N,) float32, as handed to the network."""
        return self.steps.timestep

    @property
    def skips(self) -> bool:
        """Whether some steps do not call the network."""
        return self.steps.run is not None

    @property
    def stochastic(self) -> bool:
        """Whether noise is added on the way."""
        return self.steps.noise is not None


Make = Callable[[int, float], Solver]  # (steps, shift) -> a solver


# ---- running a solver ----------------------------------------------------------------------------


def start(solver: Solver, noise: jax.Array) -> State:
    """The state before the first step, from standard normal noise (B, ...)."""
    x = jnp.array(noise, jnp.float32)  # a copy: the state may be donated
    zeros = [jnp.zeros_like(x) for _ in range(5)]  # each its own buffer, for the same reason
    ran = tuple(zeros[3:]) if solver.skips else None
    keys = sample_keys(x) if solver.stochastic else None
    return State(x, zeros[0], zeros[1], zeros[2], ran, keys)


def sample_keys(noise: jax.Array) -> jax.Array:
    """Random keys (B,) of samples that start from noise (B, ...): each a function of its own row alone.

    So a sample depends on what it starts from, and not on the batch or the devices that it shares. A key is
    made of the signs of the row's first 64 numbers, which no platform rounds differently.
    """
    signs = noise.reshape(noise.shape[0], -1)[:, :64] > 0  # (B, 64), fewer in smaller samples
    words = jnp.packbits(signs, axis=1)  # (B, 8) uint8
    return jax.vmap(lambda row: functools.reduce(jax.random.fold_in, row, jax.random.key(0)))(words)


def step_noise(state: State, i: Any) -> jax.Array | None:
    """Standard normal noise (B, ...) float32 of step i, from each sample's key and i; None without keys."""
    if state.keys is None:
        return None

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, i), state.x.shape[1:])

    return jax.vmap(draw)(state.keys)


def step(row: Step, state: State, velocity: Velocity, noise: jax.Array | None = None) -> State:
    """One solver step. A stochastic solver adds `noise`, standard normal (B, ...), as the row weighs it."""
    x, corrected, data1, data2, ran, keys = state
    d, c, p = row.data, row.corrector, row.predictor

    def predict() -> jax.Array:
        return d[0] * x + d[1] * velocity(x, row.timestep).astype(jnp.float32)

    if row.run is None:
        data = predict()
    else:
        data = jax.lax.cond(row.run, predict, lambda: row.line[0] * ran[0] + row.line[1] * ran[1])
        ran = (jnp.where(row.run, data, ran[0]), jnp.where(row.run, ran[0], ran[1]))
    corrected = c[0] * x + c[1] * corrected + c[2] * data + c[3] * data1 + c[4] * data2
    x = p[0] * corrected + p[1] * data + p[2] * data1
    if row.noise is not None:
        x = x + row.noise * noise
    return State(x, corrected, data, data1, ran, keys)


def advance(solver: Solver, velocity: Velocity, state: State, first: Any, last: Any) -> State:
    """Steps first..last-1, as one loop around one network.

    `first` and `last` may be traced: the compiled program then runs any of the solver's steps.
    """
    table = jax.tree.map(jnp.asarray, solver.steps)

    def body(i: jax.Array, state: State) -> State:
        return step(jax.tree.map(lambda rows: rows[i], table), state, velocity, step_noise(state, i))

    return jax.lax.fori_loop(first, last, body, state)


# ---- building a solver ---------------------------------------------------------------------------


def choose(solvers: Mapping[str, Make], name: str, steps: int, shift: float) -> Solver:
    """The solver that a configuration names, of those of one family.

    Raises:
        UserError: unknown name, fewer than one step, a shift that is not positive, or what the solver raises.
    """
    if name not in solvers:
        raise UserError(
            f"samples.solver={name!r} is not for this objective: choose one of {', '.join(solvers)}"
        )
    if steps < 1:
        raise UserError(f"the number of solver steps must be at least 1, got {steps}")
    if not 0 < shift < math.inf:
        raise UserError(f"the shift must be a positive number, got {shift}")
    return solvers[name](steps, shift)


def skipping(solver: Solver, skip: Sequence[int]) -> Solver:
    """The solver with some steps that do not call the network.

    Args:
        solver: of `choose`.
        skip: steps, from 0; none leaves the solver as it is.

    Raises:
        UserError: a step that does not exist, is named twice, or is the first, which has none before it;
            any step of a stochastic solver, whose clean sample is not on a line: it follows the noise added.
    """
    if not skip:
        return solver
    if solver.stochastic:
        raise UserError(
            f"samples.skip={tuple(skip)}: a solver that adds noise in every step cannot skip any; "
            "name no steps, or another samples.solver, such as ddim"
        )
    if len(set(skip)) < len(skip) or not set(skip) <= set(range(1, solver.num_steps)):
        raise UserError(
            f"samples.skip={tuple(skip)}: name steps from 1 (the first always runs) to "
            f"{solver.num_steps - 1}, each once"
        )
    s = solver.sigmas.astype(np.float64)
    run = ~np.isin(np.arange(solver.num_steps), list(skip))
    line = np.tile([1.0, 0.0], (solver.num_steps, 1))
    for i in skip:
        *_, before, last = [-1, *np.flatnonzero(run[:i])]
        if before >= 0:
            slope = (s[i] - s[last]) / (s[last] - s[before])
            line[i] = 1 + slope, -slope
    steps = solver.steps._replace(run=run, line=line.astype(np.float32))
    return dataclasses.replace(solver, steps=steps)
