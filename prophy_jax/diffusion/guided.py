"""Guidance: predictions with and without a prompt, combined, as samplers see one model.

Legend: N solver steps, B batch; states are (B, ...), usually latents (B,T,h,w,16).
Source: the guidance of CogVideoX (arXiv 2408.06072); Wan2.1's is the usual one.
"""

import jax
import jax.numpy as jnp
import numpy as np

from prophy_jax.diffusion.flow import NUM_TRAIN_TIMESTEPS
from prophy_jax.diffusion.solvers import Velocity
from prophy_jax.run.errors import UserError

Guidance = float | np.ndarray  # one number, or (1001,) float32, one for each whole time 0..1000


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

    def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
        twice = model(jnp.repeat(x, 2, axis=0), jnp.broadcast_to(t, (2 * x.shape[0],)))
        v_uncond, v_cond = twice[0::2].astype(jnp.float32), twice[1::2].astype(jnp.float32)
        factor = jnp.asarray(guidance)[t.astype(jnp.int32)] if np.ndim(guidance) else guidance
        return v_uncond + factor * (v_cond - v_uncond)

    return velocity


def pair_prompts(conditional: jax.Array, unconditional: jax.Array | None, guidance: Guidance) -> jax.Array:
    """The prompts that the model of `guided` reads, (2B,...) or (B,...).

    Neighbours are one sample's, so that a batch split over devices is split between samples.

    Args:
        conditional: (B,...) one array of the encoded prompts, e.g. text or its mask.
        unconditional: (...) the same of the negative prompt. Wan encodes a negative or an empty
            prompt, never zeros. None: both halves of a pair read the same.
        guidance: as for `guided`; where that needs no pairs, the result is `conditional`.
    """
    if not _pairs(guidance):
        return conditional
    other = conditional if unconditional is None else jnp.broadcast_to(unconditional, conditional.shape)
    both = jnp.stack([other, conditional], axis=1)
    return both.reshape(-1, *conditional.shape[1:])  # (B, 2, ...) -> (2B, ...)


def _pairs(guidance: Guidance) -> bool:
    return bool(np.ndim(guidance) > 0 or guidance > 1)


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
    return (1.0 + guidance * (1.0 - np.cos(np.pi * turns)) / 2.0).astype(np.float32)
