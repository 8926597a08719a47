"""Flow matching, the training objective of Wan2.1: a straight path from data to noise.

    x_sigma = (1 - sigma) x0 + sigma noise,    target v = noise - x0,    model time t = 1000 sigma

A diffusion family is a frozen dataclass with the seven methods of `FlowMatching`; nothing else of it is
called, so another family is another file with the same methods (v_prediction.py, for CogVideoX).
The time that these methods share is in every family the share of noise in the mixture, in [0,1]: where
x = a x0 + b noise it is b / (a + b), here sigma. So one number means as noisy an input in each of them.

Sigmas of a solver are rounded to float32 before its coefficients are computed, as the reference
implementations do: near sigma = 1 the rounding moves log((1-sigma)/sigma) by up to 1%.

Legend: N solver steps, B batch. Data, noise and predictions are (B,...), usually latents (B,T,h,w,16);
times (B,).
Sources: UniPC (arXiv 2302.04867, variant B2, data prediction, order 2), DPM-Solver++ (arXiv 2211.01095);
grids and timesteps of the Wan2.1 reference code, of diffusers and of DiffSynth-Studio.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prophy_jax.diffusion import solvers
from prophy_jax.diffusion.solvers import Solver, Step
from prophy_jax.run.errors import UserError

NUM_TRAIN_TIMESTEPS = 1000  # the network reads time in 0..1000

_HALF_ULP = 2.0**-24  # the distance from 1 to the largest float32 below it


def shift_sigma(sigma: Any, shift: Any) -> Any:
    """Moves noise levels in [0,1] towards 1: s sigma / (1 + (s-1) sigma). For NumPy or JAX."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """Flow matching with a choice of the training distribution of sigma. Its time is sigma itself.

    Attributes:
        distribution: "uniform" on (0,1), or "logit_normal", the sigmoid of a normal.
        shift: the shift map's factor, applied after the draw; 1 leaves sigma as drawn.
        mean, std: of that normal; read by "logit_normal" only.

    Raises:
        UserError: unknown distribution, or a shift or std that is not positive.
    """

    distribution: str = "uniform"
    shift: float = 3.0
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.distribution not in ("uniform", "logit_normal"):
            raise UserError(
                f"unknown noise distribution {self.distribution!r}; choose 'uniform' or 'logit_normal'"
            )
        if not self.shift > 0 or not self.std > 0:
            raise UserError(f"shift {self.shift} and std {self.std} must both be positive")

    def sample_time(self, key: jax.Array, batch: int) -> jax.Array:
        """Draws sigma (B,) float32, strictly inside (0,1)."""
        if self.distribution == "uniform":
            sigma = jax.random.uniform(key, (batch,), jnp.float32)
        else:
            sigma = jax.nn.sigmoid(self.mean + self.std * jax.random.normal(key, (batch,), jnp.float32))
        # Both draws and the shift can round to exactly 0 or 1 in float32.
        return jnp.clip(shift_sigma(sigma, self.shift), min=_HALF_ULP, max=1.0 - _HALF_ULP)

    def add_noise(self, x0: jax.Array, noise: jax.Array, time: jax.Array) -> jax.Array:
        """x_sigma (B, ...) float32 from data, standard normal noise and time (B,)."""
        sigma = _per_sample(time, x0.ndim)
        return (1.0 - sigma) * x0.astype(jnp.float32) + sigma * noise.astype(jnp.float32)

    def target(self, x0: jax.Array, noise: jax.Array, time: jax.Array) -> jax.Array:
        """What the network predicts: the velocity noise - x0, float32, the same at every time."""
        del time
        return noise.astype(jnp.float32) - x0.astype(jnp.float32)

    def model_time(self, time: jax.Array) -> jax.Array:
        """The time (B,) float32 in 0..1000 that the network reads."""
        return NUM_TRAIN_TIMESTEPS * time.astype(jnp.float32)

    def predicted_data(self, x: jax.Array, prediction: jax.Array, time: jax.Array) -> jax.Array:
        """The clean sample x - sigma v (B, ...) float32 that a prediction at x implies."""
        sigma = _per_sample(time, x.ndim)
        return x.astype(jnp.float32) - sigma * prediction.astype(jnp.float32)

    def per_sample_loss(
        self, prediction: jax.Array, x0: jax.Array, noise: jax.Array, time: jax.Array
    ) -> jax.Array:
        """Mean squared error (B,) float32 over all axes but the batch, equally weighted in time."""
        error = prediction.astype(jnp.float32) - self.target(x0, noise, time)
        return jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))

    def solver(self, name: str, steps: int, shift: float | None = None) -> Solver:
        """A solver of this family: a row of SOLVERS.

        Args:
            name: Of SOLVERS.
            steps: N, one network call each.
            shift: Factor of the shift map of the sampler's grid, which need not be that of training; None:
                that of training.

        Raises:
            UserError: see `solvers.choose`.
        """
        return solvers.choose(SOLVERS, name, steps, self.shift if shift is None else shift)


def _per_sample(time: jax.Array, ndim: int) -> jax.Array:
    return time.astype(jnp.float32).reshape(time.shape + (1,) * (ndim - 1))  # (B,1,...,1)


# --- Solvers ---------------------------------------------------------------------------------------


def unipc(num_steps: int, shift: float, grid: str = "official") -> Solver:
    """UniPC of order 2, the sampler that Wan2.1 recommends.

    Args:
        num_steps: N, one network call each.
        shift: factor of the shift map; Wan2.1 recommends 8 for 1.3B at 480p, 5 for 14B.
        grid: "official" (Wan2.1 reference code, from 0.999 before the shift) or "diffusers"
            (0.37 and later, starts one millionth below 1). The two end up to a few 1e-3 apart.
    """
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
    if grid == "linear":
        sigmas = shift_sigma(np.linspace(1.0, 0.0, num_steps + 1)[:-1], shift)
    elif grid == "diffusers":
        smallest = shift_sigma(np.float32(1.0 / NUM_TRAIN_TIMESTEPS), np.float32(shift))
        sigmas = shift_sigma(np.linspace(1.0, float(smallest), num_steps), shift)
    else:
        raise ValueError(f"unknown grid {grid!r}")
    timesteps = NUM_TRAIN_TIMESTEPS * sigmas.astype(np.float32)
    return _solver(sigmas, timesteps, multistep=False, corrected=False)


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


SOLVERS: dict[str, solvers.Make] = {
    "unipc": unipc,
    "unipc-diffusers": functools.partial(unipc, grid="diffusers"),
    "dpm++": dpmpp_2m,
    "euler": euler,
    "euler-diffusers": functools.partial(euler, grid="diffusers"),
}


def build(**settings: Any) -> FlowMatching:
    """The objective that a configuration names: `dict(module="flow", **settings)`."""
    return FlowMatching(**settings)
