"""V-prediction, the training objective of CogVideoX: 1000 noise levels, the last of them noise alone.

    x_t = alpha_t x0 + sigma_t noise,    target v = alpha_t noise - sigma_t x0,    model time t

with alpha_t^2 + sigma_t^2 = 1, so that x0 = alpha_t x_t - sigma_t v. The methods are those of
`prophy_jax.diffusion.flow`, and so is their time: the share of noise sigma_t / (alpha_t + sigma_t), here
of the nearest of the 1000 levels.

Legend: N solver steps, B batch. Data, noise and predictions are (B,...), usually latents (B,T,h,w,16);
times (B,).
Sources: the schedule is that of CogVideoX (arXiv 2408.06072) as diffusers builds it, scaled to no signal at
the last timestep (arXiv 2305.08891) over all 1000 timesteps. DDIM (arXiv 2010.02502) and DPM-Solver++
(arXiv 2211.01095) on the grids of diffusers and of SAT, the CogVideoX reference code.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prophy_jax.diffusion import solvers
from prophy_jax.diffusion.flow import NUM_TRAIN_TIMESTEPS
from prophy_jax.diffusion.solvers import Solver, Step
from prophy_jax.run.errors import UserError

_BETAS = 0.00085, 0.012  # of the first and the last timestep, evenly spaced in their square roots


@functools.cache
def signal(snr_shift: float) -> np.ndarray:
    """alpha_t^2 (1000,) float64 of timesteps 0..999, falling to exactly 0; read-only.

    Args:
        snr_shift: divides the signal-to-noise ratio alpha^2 / sigma^2 of every timestep, before the whole is
            scaled to end at 0. CogVideoX-2B has 3; 5B and 1.5-5B have 1, which shifts nothing.

    Raises:
        UserError: a shift that is not a positive number.
    """
    if not 0 < snr_shift < math.inf:
        raise UserError(f"the shift must be a positive number, got {snr_shift}")
    squared = np.square(_end_at_zero(_unscaled(snr_shift)))
    squared.flags.writeable = False
    return squared


def _unscaled(snr_shift: float) -> np.ndarray:
    """alpha_t (1000,) before it is scaled to end at 0."""
    first, last = np.sqrt(_BETAS)
    product = np.cumprod(1.0 - np.linspace(first, last, NUM_TRAIN_TIMESTEPS) ** 2)
    return np.sqrt(product / (snr_shift + (1.0 - snr_shift) * product))


def _end_at_zero(alpha: np.ndarray) -> np.ndarray:
    """Falling alpha (n,), n > 1, scaled to end at 0 and start where it does."""
    return (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))


def noise_share(squared: np.ndarray) -> np.ndarray:
    """The share of noise sigma / (alpha + sigma), float64 in [0,1], where alpha^2 is `squared`."""
    alpha, sigma = np.sqrt(squared), np.sqrt(1.0 - squared)
    return sigma / (alpha + sigma)


@dataclasses.dataclass(frozen=True)
class VPrediction:
    """V-prediction with timesteps drawn uniformly from 0..999. The methods are those of `FlowMatching`.

    A time that is not one of the 1000 levels stands for the nearest.

    Attributes:
        snr_shift: what the signal-to-noise ratio of every time is divided by; 3 for 2B, 1 for the others.

    Raises:
        UserError: a shift that is not a positive number.
    """

    snr_shift: float = 1.0

    def __post_init__(self) -> None:
        signal(self.snr_shift)

    @property
    def shift(self) -> float:
        """The shift of its solvers."""
        return self.snr_shift

    def sample_time(self, key: jax.Array, batch: int) -> jax.Array:
        """Draws the shares of noise (B,) float32 of `batch` timesteps, uniform over 0..999."""
        timestep = jax.random.randint(key, (batch,), 0, NUM_TRAIN_TIMESTEPS)
        return jnp.float32(noise_share(signal(self.snr_shift)))[timestep]

    def add_noise(self, x0: jax.Array, noise: jax.Array, time: jax.Array) -> jax.Array:
        """x_t (B, ...) float32 from data, standard normal noise and time (B,)."""
        alpha, sigma = self._scales(time, x0.ndim)
        return alpha * x0.astype(jnp.float32) + sigma * noise.astype(jnp.float32)

    def target(self, x0: jax.Array, noise: jax.Array, time: jax.Array) -> jax.Array:
        """What the network predicts: v = alpha noise - sigma x0, float32."""
        alpha, sigma = self._scales(time, x0.ndim)
        return alpha * noise.astype(jnp.float32) - sigma * x0.astype(jnp.float32)

    def model_time(self, time: jax.Array) -> jax.Array:
        """The timestep (B,) float32, a whole number in 0..999, that the network reads."""
        return self._timestep(time).astype(jnp.float32)

    def predicted_data(self, x: jax.Array, prediction: jax.Array, time: jax.Array) -> jax.Array:
        """The clean sample alpha x - sigma v (B, ...) float32 that a prediction at x implies."""
        alpha, sigma = self._scales(time, x.ndim)
        return alpha * x.astype(jnp.float32) - sigma * prediction.astype(jnp.float32)

    def per_sample_loss(
        self, prediction: jax.Array, x0: jax.Array, noise: jax.Array, time: jax.Array
    ) -> jax.Array:
        """Mean squared error of v (B,) float32 over all axes but the batch.

        It equals the loss that CogVideoX states, the error of the predicted data times 1 / sigma^2, without
        its cancellation where sigma is small.
        """
        error = prediction.astype(jnp.float32) - self.target(x0, noise, time)
        return jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))

    def solver(self, name: str, steps: int, shift: float | None = None) -> Solver:
        """A solver of this family: a row of SOLVERS.

        Args:
            name: Of SOLVERS.
            steps: N, one network call each.
            shift: None, or `snr_shift` again: samplers have no shift of their own.

        Raises:
            UserError: another shift, or see `solvers.choose`.
        """
        if shift is not None and shift != self.snr_shift:
            raise UserError(
                f"samples.shift={shift} is not objective.snr_shift={self.snr_shift}: these samplers visit "
                "the noise levels of training; leave samples.shift out, or make both equal"
            )
        return solvers.choose(SOLVERS, name, steps, self.snr_shift)

    def _timestep(self, time: jax.Array) -> jax.Array:
        """(B,) int32 in 0..999, of the level nearest to each time."""
        level = noise_share(signal(self.snr_shift))
        between = jnp.float32((level[1:] + level[:-1]) / 2)  # (999,)
        return jnp.searchsorted(between, time.astype(jnp.float32))

    def _scales(self, time: jax.Array, ndim: int) -> tuple[jax.Array, jax.Array]:
        """alpha and sigma, both (B,1,...,1) float32, whatever the dtype of the latents.

        The smallest sigma, 0.03, would vanish if alpha^2 were rounded to bfloat16 first.
        """
        squared, timestep = signal(self.snr_shift), self._timestep(time)
        scales = (np.sqrt(squared), np.sqrt(1.0 - squared))
        alpha, sigma = (jnp.float32(scale)[timestep] for scale in scales)
        shape = time.shape + (1,) * (ndim - 1)
        return alpha.reshape(shape), sigma.reshape(shape)


# --- Solvers ---------------------------------------------------------------------------------------


class Levels(NamedTuple):
    """What a sampler visits. All (N,); the last three are alpha^2 in float64."""

    timesteps: np.ndarray  # int64, falling from 999
    here: np.ndarray  # where each step begins
    following: np.ndarray  # where it ends
    seen: np.ndarray  # of which the clean sample is computed from the network's prediction


def ddim(num_steps: int, snr_shift: float, grid: str = "diffusers") -> Solver:
    """DDIM without noise, for v-prediction: what CogVideoX-2B recommends, with snr_shift 3.

    Args:
        num_steps: N, one network call each.
        snr_shift: see `signal`.
        grid: see `_levels`.

    Raises:
        UserError: see `solvers.choose`.
    """
    levels = _levels(num_steps, snr_shift, grid)
    here, following = levels.here, levels.following
    keep = np.sqrt((1.0 - following) / (1.0 - here))
    predictor = np.stack([keep, np.sqrt(following) - keep * np.sqrt(here), 0.0 * keep], axis=1)  # (N,3)
    return _v_prediction_solver(levels, predictor)


def cogvideox_dpm(num_steps: int, snr_shift: float, grid: str = "diffusers") -> Solver:
    """Stochastic DPM-Solver++ (2M) as CogVideoX runs it: what its 5B models recommend, with snr_shift 1.

    Args:
        num_steps: N, one network call each.
        snr_shift: see `signal`.
        grid: see `_levels`.

    Raises:
        UserError: see `solvers.choose`.
    """
    levels = _levels(num_steps, snr_shift, grid)
    here, following = levels.here, levels.following
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
    return _v_prediction_solver(levels, predictor, noise)


def _levels(num_steps: int, snr_shift: float, grid: str) -> Levels:
    """What a sampler visits.

    Args:
        num_steps: N.
        snr_shift: see `signal`.
        grid: "diffusers" (levels of training), or "sat" (the timesteps that are visited, scaled to end at 0
            by themselves: alpha differs by up to 1e-3 at 50 steps). The two end up to 2e-2 apart.
    """
    if num_steps > NUM_TRAIN_TIMESTEPS:
        raise UserError(
            f"{num_steps} solver steps are more than the {NUM_TRAIN_TIMESTEPS} timesteps: lower the steps"
        )
    squared = signal(snr_shift)
    if grid == "sat":
        timesteps = np.linspace(NUM_TRAIN_TIMESTEPS - 1, 0, num_steps, endpoint=False).astype(np.int64)
        visited = _unscaled(snr_shift)[timesteps[::-1]]
        # A single step starts from noise alone; the reference code divides by 0 there.
        alpha = _end_at_zero(visited)[::-1] if num_steps > 1 else np.zeros(1)
        # Its denoiser takes the level of training with the nearest alpha.
        nearest = np.abs(np.sqrt(squared) - alpha[:, None]).argmin(axis=1)
        return Levels(timesteps, alpha**2, np.append(alpha[1:] ** 2, 1.0), squared[nearest])
    if grid != "diffusers":
        raise ValueError(f"unknown grid {grid!r}")
    # Halves are rounded to even as NumPy's range adds up, which for some N has one value too many.
    spaced = np.arange(NUM_TRAIN_TIMESTEPS, 0, -NUM_TRAIN_TIMESTEPS / num_steps)[:num_steps]
    timesteps = np.round(spaced).astype(np.int64) - 1
    # Where N does not divide 1000 this is not the next timestep, and the last step may stop short of 0 noise:
    # so the networks' public samplers have it.
    ends = timesteps - NUM_TRAIN_TIMESTEPS // num_steps
    here = squared[timesteps]
    return Levels(timesteps, here, np.where(ends < 0, 1.0, squared[ends]), here)


def _v_prediction_solver(levels: Levels, predictor: np.ndarray, noise: np.ndarray | None = None) -> Solver:
    """Tables without a corrector, for weights of (x, m, m') and of noise."""
    seen = levels.seen
    data = np.stack([np.sqrt(seen), -np.sqrt(1.0 - seen)], axis=1)  # (N,2) m = alpha x - sigma v
    corrector = np.tile([1.0, 0.0, 0.0, 0.0, 0.0], (len(seen), 1))  # (N,5) none
    tables = [np.asarray(table, np.float32) for table in (levels.timesteps, data, corrector, predictor)]
    sigmas = noise_share(np.append(levels.here, levels.following[-1])).astype(np.float32)
    return Solver(sigmas, Step(*tables)._replace(noise=None if noise is None else noise.astype(np.float32)))


SOLVERS: dict[str, solvers.Make] = {
    "ddim": ddim,
    "cogvideox-dpm": cogvideox_dpm,
    "ddim-sat": functools.partial(ddim, grid="sat"),
    "cogvideox-dpm-sat": functools.partial(cogvideox_dpm, grid="sat"),
}


def build(**settings: Any) -> VPrediction:
    """The objective that a configuration names: `dict(module="v_prediction", **settings)`."""
    return VPrediction(**settings)
