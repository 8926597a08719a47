"""Samplers as tables of one linear update.

For flow matching UniPC, DPM-Solver++ (2M) and Euler; for v-prediction DDIM and CogVideoX's stochastic
DPM-Solver++ (2M).

Every solver here is linear in the current state and the last predictions of the clean sample, with
coefficients that depend on the noise levels alone. They are computed once, on the host, in float64;
what runs on the device is one step, the same for every solver:

    m      = d0 x + d1 v(x, t)                         the clean sample predicted at x
    x_c    = c0 x + c1 x_c' + c2 m + c3 m' + c4 m''    corrector
    x_next = p0 x_c + p1 m + p2 m' + n z               predictor

where ' marks the step before and '' the one before that; z is standard normal, drawn anew in each step, in
stochastic solvers alone. A step that is skipped does not call the network: its m lies on the line, in sigma,
through those of the last two steps that did.

Sigmas of flow matching are rounded to float32 before the coefficients are computed, as the reference
implementations do: near sigma = 1 the rounding moves log((1-sigma)/sigma) by up to 1%.

Legend: N solver steps, B batch; states are (B, ...), usually latents (B,T,h,w,16).
Sources: UniPC (arXiv 2302.04867, variant B2, data prediction, order 2), DPM-Solver++ (arXiv 2211.01095)
and DDIM (arXiv 2010.02502); grids and timesteps of the Wan2.1 reference code, of diffusers and of
DiffSynth-Studio; the guidance of CogVideoX (arXiv 2408.06072).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prophy_jax.diffusion import v_prediction
from prophy_jax.diffusion.flow import NUM_TRAIN_TIMESTEPS, shift_sigma
from prophy_jax.run.errors import UserError

Velocity = Callable[[jax.Array, jax.Array], jax.Array]  # (x (B,...), t scalar) -> v (B,...)
Guidance = float | np.ndarray  # one number, or (1001,) float32, one for each whole time 0..1000


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


# ---- running a solver ----------------------------------------------------------------------------


def start(solver: Solver, noise: jax.Array) -> State:
    """The state before the first step, from standard normal noise (B, ...)."""
    x = jnp.array(noise, jnp.float32)  # a copy: the state may be donated
    zeros = [jnp.zeros_like(x) for _ in range(5)]  # each its own buffer, for the same reason
    ran = tuple(zeros[3:]) if solver.skips else None
    return State(x, *zeros[:3], ran, sample_keys(x) if solver.stochastic else None)


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

    def body(i, state):
        return step(jax.tree.map(lambda rows: rows[i], table), state, velocity, step_noise(state, i))

    return jax.lax.fori_loop(first, last, body, state)


def sample(solver: Solver, velocity: Velocity, noise: jax.Array) -> jax.Array:
    """Integrates from noise to data in one loop, with at most one network call per step.

    Args:
        solver: schedule and coefficients.
        velocity: (x (B,...) float32, t float32 scalar) -> velocity (B,...).
        noise: (B,...) standard normal.

    Returns:
        The clean sample (B,...) float32.
    """
    return advance(solver, velocity, start(solver, noise), 0, solver.num_steps).x


# ---- guidance ------------------------------------------------------------------------------------


def guided(model: Velocity, guidance: Guidance) -> Velocity:
    """Classifier-free guidance, v_uncond + guidance (v_cond - v_uncond), in one call of 2B samples.

    Args:
        model: (x (2B,...), t (2B,) float32) -> velocity (2B,...). Rows 2i and 2i + 1 are sample i,
            without its prompt and with it: see `pair_prompts`.
        guidance: of `guidance_schedule`. A number of 1 or below: the model is called with the B samples
            alone and the result is what it returns.
    """
    if not _pairs(guidance):
        return lambda x, t: model(x, jnp.broadcast_to(t, x.shape[:1]))

    def velocity(x, t):
        twice = model(jnp.repeat(x, 2, axis=0), jnp.broadcast_to(t, (2 * x.shape[0],)))
        v_uncond, v_cond = twice[0::2].astype(jnp.float32), twice[1::2].astype(jnp.float32)
        factor = jnp.asarray(guidance)[t.astype(jnp.int32)] if np.ndim(guidance) else guidance
        return v_uncond + factor * (v_cond - v_uncond)

    return velocity


def pair_prompts(conditional: jax.Array, unconditional: jax.Array, guidance: Guidance) -> jax.Array:
    """The prompts that the model of `guided` reads, (2B,...) or (B,...).

    Neighbours are one sample's, so that a batch split over devices is split between samples.

    Args:
        conditional: (B,...) one array of the encoded prompts, e.g. text or its mask.
        unconditional: (...) the same of the negative prompt. Wan encodes a negative or an empty
            prompt, never zeros.
        guidance: as for `guided`; where that needs no pairs, the result is `conditional`.
    """
    if not _pairs(guidance):
        return conditional
    both = jnp.stack([jnp.broadcast_to(unconditional, conditional.shape), conditional], axis=1)
    return both.reshape(-1, *conditional.shape[1:])  # (B, 2, ...) -> (2B, ...)


def _pairs(guidance: Guidance) -> bool:
    return np.ndim(guidance) > 0 or guidance > 1


def guidance_schedule(name: str, guidance: float, num_steps: int) -> Guidance:
    """The guidance of every step, as `guided` takes it.

    Args:
        name: "constant", or "dynamic", which CogVideoX advises for its 5B models with "cogvideox-dpm": in
            N steps, at time t

                1 + guidance (1 - cos(pi ((N - t) / N)^5)) / 2

            Here t is the network's time in 0..999, not the step, as in the public samplers. The cosine turns
            over a million times: a wave between 1 and 1 + guidance whose values at neighbouring times have
            little to do with each other, and which float32 cannot tell.
        guidance: a number. At 1 or below there is no guidance, whatever the name.
        num_steps: N.

    Raises:
        UserError: unknown name.
    """
    if name not in ("constant", "dynamic"):
        raise UserError(f"unknown guidance schedule {name!r}; choose 'constant' or 'dynamic'")
    if name == "constant" or guidance <= 1:
        return float(guidance)
    turns = ((num_steps - np.arange(NUM_TRAIN_TIMESTEPS + 1.0)) / num_steps) ** 5
    return np.float32(1.0 + guidance * (1.0 - np.cos(np.pi * turns)) / 2.0)


# ---- building a solver ---------------------------------------------------------------------------


def solver(name: str, num_steps: int, shift: float) -> Solver:
    """The solver that a command's flag names.

    Args:
        name: see below; "ddim" and "cogvideox-dpm" are for v-prediction, the others for flow matching.
        num_steps: N, one network call each.
        shift: factor of the shift map; for v-prediction that of the signal-to-noise ratio, which is the
            objective's `snr_shift`.

    Raises:
        UserError: unknown name, fewer than one step, or a shift that is not positive; more steps than
            timesteps for v-prediction.
    """
    match name:
        case "unipc":
            return unipc(num_steps, shift)
        case "unipc-diffusers":
            return unipc(num_steps, shift, grid="diffusers")
        case "dpm++":
            return dpmpp_2m(num_steps, shift)
        case "euler":
            return euler(num_steps, shift)
        case "euler-diffusers":
            return euler(num_steps, shift, grid="diffusers")
        case "ddim":
            return ddim(num_steps, shift)
        case "cogvideox-dpm":
            return cogvideox_dpm(num_steps, shift)
    raise UserError(
        f"unknown solver {name!r}; choose one of unipc, unipc-diffusers, dpm++, euler, euler-diffusers, "
        "ddim, cogvideox-dpm"
    )


def skipping(solver: Solver, skip: Sequence[int]) -> Solver:
    """The solver with some steps that do not call the network.

    Args:
        solver: of `solver`.
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


def unipc(num_steps: int, shift: float, grid: str = "official") -> Solver:
    """UniPC of order 2, the sampler that Wan2.1 recommends.

    Args:
        num_steps: N, one network call each.
        shift: factor of the shift map; Wan2.1 recommends 8 for 1.3B at 480p, 5 for 14B.
        grid: "official" (Wan2.1 reference code, from 0.999 before the shift) or "diffusers"
            (0.37 and later, starts one millionth below 1). The two end up to a few 1e-3 apart.
    """
    _check(num_steps, shift)
    if grid == "official":
        # The reference code holds its largest sigma in float32.
        sigmas = shift_sigma(np.linspace(float(np.float32(0.999)), 0.0, num_steps + 1)[:-1], shift)
    elif grid == "diffusers":
        sigmas = shift_sigma(np.linspace(1.0, 0.001, num_steps + 1)[:-1], shift)
        sigmas[0] -= 1e-6  # sigma = 1 has no finite log((1-sigma)/sigma)
    else:
        raise ValueError(f"unknown grid {grid!r}")
    return _solver(sigmas, np.trunc(NUM_TRAIN_TIMESTEPS * sigmas), multistep=True, corrected=True)


def dpmpp_2m(num_steps: int, shift: float) -> Solver:
    """DPM-Solver++ (2M, midpoint, no noise added) on the grid of the Wan2.1 reference code."""
    _check(num_steps, shift)
    sigmas = shift_sigma(np.linspace(1.0, 0.0, num_steps + 1)[:-1], shift)
    return _solver(sigmas, np.trunc(NUM_TRAIN_TIMESTEPS * sigmas), multistep=True, corrected=False)


def euler(num_steps: int, shift: float, grid: str = "linear") -> Solver:
    """Euler's method. Unlike the other solvers it hands the network fractional timesteps.

    Args:
        num_steps: N, one network call each.
        shift: factor of the shift map.
        grid: "linear" (DiffSynth-Studio: evenly spaced from 1 to 0, then shifted) or "diffusers"
            (its FlowMatchEuler scheduler, which shifts its smallest sigma a second time, so it ends
            with a shorter last step).
    """
    _check(num_steps, shift)
    if grid == "linear":
        sigmas = shift_sigma(np.linspace(1.0, 0.0, num_steps + 1)[:-1], shift)
    elif grid == "diffusers":
        smallest = shift_sigma(np.float32(1.0 / NUM_TRAIN_TIMESTEPS), np.float32(shift))
        sigmas = shift_sigma(np.linspace(1.0, float(smallest), num_steps), shift)
    else:
        raise ValueError(f"unknown grid {grid!r}")
    timesteps = NUM_TRAIN_TIMESTEPS * sigmas.astype(np.float32)
    return _solver(sigmas, timesteps, multistep=False, corrected=False)


def ddim(num_steps: int, snr_shift: float) -> Solver:
    """DDIM without noise, for v-prediction: what CogVideoX-2B recommends, with snr_shift 3.

    Raises:
        UserError: see `solver`.
    """
    timesteps, here, following = _v_prediction_levels(num_steps, snr_shift)
    keep = np.sqrt((1.0 - following) / (1.0 - here))
    predictor = np.stack([keep, np.sqrt(following) - keep * np.sqrt(here), 0.0 * keep], axis=1)  # (N,3)
    return _v_prediction_solver(timesteps, here, following, predictor)


def cogvideox_dpm(num_steps: int, snr_shift: float) -> Solver:
    """Stochastic DPM-Solver++ (2M) as CogVideoX runs it: what its 5B models recommend, with snr_shift 1.

    Raises:
        UserError: see `solver`.
    """
    timesteps, here, following = _v_prediction_levels(num_steps, snr_shift)
    alpha, alpha_next = np.sqrt(here), np.sqrt(following)
    # exp(-2h) for a step of h in lambda, the log of alpha / sigma. In this form no term is infinite where
    # alpha or sigma is 0; nor are the weights.
    decay = (here * (1.0 - following)) / ((1.0 - here) * following)
    keep = alpha * (1.0 - following) / (alpha_next * (1.0 - here))
    new, noise = alpha_next * (1.0 - decay), np.sqrt((1.0 - following) * (1.0 - decay))

    # The weight of the difference m - m': half the step ahead over the step behind. The step behind is from
    # the timestep visited before; it is infinite from the first, where lambda is. The last step ends at m.
    with np.errstate(divide="ignore"):
        lam, lam_next = (np.log(level / (1.0 - level)) / 2.0 for level in (here, following))
    slope = np.zeros(num_steps)
    i = 1 + np.flatnonzero(following[1:] < 1.0)
    slope[i] = (lam_next[i] - lam[i]) / (2.0 * (lam[i] - lam[i - 1]))
    predictor = np.stack([keep, new * (1.0 + slope), -new * slope], axis=1)  # (N,3)
    return _v_prediction_solver(timesteps, here, following, predictor, noise)


def _check(num_steps: int, shift: float) -> None:
    if num_steps < 1:
        raise UserError(f"the number of solver steps must be at least 1, got {num_steps}")
    if not 0 < shift < math.inf:
        raise UserError(f"the shift must be a positive number, got {shift}")


def _solver(sigmas: np.ndarray, timesteps: np.ndarray, multistep: bool, corrected: bool) -> Solver:
    """Tables for sigmas (N,) without the final 0: of order 2 if `multistep`, else of order 1."""
    sigmas = np.append(sigmas, 0.0).astype(np.float32)
    if not np.all(np.diff(sigmas) < 0):
        raise UserError(
            f"{len(timesteps)} solver steps at this shift repeat a noise level in float32; "
            "lower the steps or the shift"
        )
    s = sigmas.astype(np.float64)
    n = len(timesteps)
    with np.errstate(divide="ignore"):
        lam = np.log1p(-s) - np.log(s)  # (N+1,) log of signal to noise; -inf at 1, +inf at 0

    data = np.stack([np.ones(n), -s[:-1]], axis=1)  # (N,2) m = x - sigma v
    corrector = np.tile([1.0, 0.0, 0.0, 0.0, 0.0], (n, 1))  # (N,5) none
    predictor = np.zeros((n, 3))
    for i in range(n):
        if corrected and i > 0:
            corrector[i] = _corrector(s, lam, i)
        predictor[i] = _predictor(s, lam, i, order=2 if multistep and 0 < i < n - 1 else 1)

    tables = (timesteps, data, corrector, predictor)
    return Solver(sigmas, Step(*(np.asarray(table, np.float32) for table in tables)))


def _predictor(s: np.ndarray, lam: np.ndarray, i: int, order: int) -> tuple[float, float, float]:
    """Weights of (x_c, m, m') in the step from sigma_i to sigma_{i+1}. Order 1 is Euler's step."""
    keep = s[i + 1] / s[i]
    # Weight of the difference m - m'. It is 0 where the previous sigma is 1, infinitely far away in
    # lambda.
    slope = (lam[i + 1] - lam[i]) / (2 * (lam[i] - lam[i - 1])) if order == 2 else 0.0
    return keep, (1 - keep) * (1 + slope), -(1 - keep) * slope


def _corrector(s: np.ndarray, lam: np.ndarray, i: int) -> tuple[float, float, float, float, float]:
    """Weights of (x, x_c', m, m', m'') that redo the step to sigma_i now that m is known there."""
    keep = s[i] / s[i - 1]
    if i == 1:
        new, old = 0.5, 0.0  # order 1: weights of m - m' and of m'' - m'
    else:
        # The two moment conditions of UniPC at the nodes r < 0 (the step before) and 1 (the end of
        # this step).
        h = lam[i] - lam[i - 1]
        r = (lam[i - 2] - lam[i - 1]) / h
        b = np.expm1(-h)  # B(h)
        b1 = (-b / h - 1) / b
        b2 = 2 * ((b / h + 1) / h - 0.5) / b
        at_old = (b1 - b2) / (1 - r)
        new, old = b1 - at_old, at_old / r
    rest = 1 - keep
    return 0.0, keep, rest * new, rest * (1 - new - old), rest * old


def _v_prediction_levels(num_steps: int, snr_shift: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Timesteps (N,) evenly spaced from 999 down, and alpha^2 (N,) float64 there and where each step ends."""
    _check(num_steps, snr_shift)
    if num_steps > NUM_TRAIN_TIMESTEPS:
        raise UserError(
            f"{num_steps} solver steps are more than the {NUM_TRAIN_TIMESTEPS} timesteps: lower the steps"
        )
    # Halves are rounded to even as NumPy's range adds up, which for some N has one value too many.
    spaced = np.arange(NUM_TRAIN_TIMESTEPS, 0, -NUM_TRAIN_TIMESTEPS / num_steps)[:num_steps]
    timesteps = np.round(spaced).astype(np.int64) - 1
    # Where N does not divide 1000 this is not the next timestep, and the last step may stop short of 0 noise:
    # so the networks' public samplers have it.
    ends = timesteps - NUM_TRAIN_TIMESTEPS // num_steps
    squared = v_prediction.signal(snr_shift)
    return timesteps, squared[timesteps], np.where(ends < 0, 1.0, squared[ends])


def _v_prediction_solver(
    timesteps: np.ndarray,
    here: np.ndarray,
    following: np.ndarray,
    predictor: np.ndarray,
    noise: np.ndarray | None = None,
) -> Solver:
    """Tables without a corrector for `_v_prediction_levels` and weights of (x, m, m') and of noise."""
    data = np.stack([np.sqrt(here), -np.sqrt(1.0 - here)], axis=1)  # (N,2) m = alpha x - sigma v
    corrector = np.tile([1.0, 0.0, 0.0, 0.0, 0.0], (len(timesteps), 1))  # (N,5) none
    tables = (np.asarray(table, np.float32) for table in (timesteps, data, corrector, predictor))
    sigmas = v_prediction.noise_share(np.append(here, following[-1])).astype(np.float32)
    return Solver(sigmas, Step(*tables, noise=None if noise is None else noise.astype(np.float32)))
