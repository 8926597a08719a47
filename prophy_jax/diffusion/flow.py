"""Flow matching, the training objective of Wan2.1: a straight path from data to noise.

    x_sigma = (1 - sigma) x0 + sigma noise,    target v = noise - x0,    model time t = 1000 sigma

A diffusion family is a frozen dataclass with the six methods of `FlowMatching`; nothing else of it is
called, so another family is another file with the same six methods (v_prediction.py, for CogVideoX).
The time that these methods share is in every family the share of noise in the mixture, in [0,1]: where
x = a x0 + b noise it is b / (a + b), here sigma. So one number means as noisy an input in each of them.

Legend: B batch. Data, noise and predictions are (B,...), usually latents (B,T,h,w,16); times (B,).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from prophy_jax.run.errors import UserError

NUM_TRAIN_TIMESTEPS = 1000  # the network reads time in 0..1000

_HALF_ULP = 2.0**-24  # the distance from 1 to the largest float32 below it


def shift_sigma(sigma, shift: float):
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

    def __post_init__(self):
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


def _per_sample(time: jax.Array, ndim: int) -> jax.Array:
    return time.astype(jnp.float32).reshape(time.shape + (1,) * (ndim - 1))  # (B,1,...,1)


def build(**settings: Any) -> FlowMatching:
    """The objective that a configuration names: `dict(module="flow", **settings)`."""
    return FlowMatching(**settings)
