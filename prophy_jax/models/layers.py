"""Layers that the video transformers share: attention, norms, rotary and time embeddings, remat.

Legend: B batch, N query tokens, M key tokens, H heads, D head width, C model width, L text length,
T' H' W' token grid (frames, rows, columns).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from prophy_jax.errors import UserError

# Flax's fast variance, E[x^2] - E[x]^2, loses digits when the mean is large: off everywhere.
LayerNorm = functools.partial(nn.LayerNorm, use_fast_variance=False, dtype=jnp.float32)
RMSNorm = functools.partial(nn.RMSNorm, use_fast_variance=False, dtype=jnp.float32)


@flax.struct.dataclass
class Stream:
    """The tokens that blocks transform. Wan leaves text as it is; joint models change both."""

    video: jax.Array  # (B, N, C)
    text: Any  # (B, L, C), or what the backbone's `text_ahead` made of it


@flax.struct.dataclass
class KeyValue:
    """Keys and values of one attention, or of a stack of blocks with a leading layer axis."""

    key: jax.Array  # (B, M, H, D)
    value: jax.Array  # (B, M, H, D)
    bias: jax.Array | None = None  # (B, 1, 1, M) fp32, added to the scores


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Adaptive layer norm's affine part: x (B, N, C); shift and scale (B, 1, C)."""
    return x * (1 + scale) + shift


def attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """softmax(q k^T / sqrt(D) + bias) v, softmax in fp32.

    The fused cuDNN kernel runs on GPUs in half precision; XLA, which holds all N x M scores,
    everywhere else.

    Args:
        q: (B, N, H, D).
        k: (B, M, H, D).
        v: (B, M, H, D).
        bias: (B, 1, 1, M) or None. The fused kernel is not used with one: it would need all N x M of it.

    Returns:
        (B, N, H, D) in the dtype of q.
    """
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if half and bias is None and jax.default_backend() == "gpu":
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    out = jax.nn.dot_product_attention(q, k, v, bias=bias, implementation="xla")
    return checkpoint_name(out, "attention")


def _is_fused_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name.startswith("dot_product_attention_fwd")


_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    # The cuDNN backward pass needs the softmax statistics too. No name reaches them, so the policy
    # asks for every output of the primitive; otherwise the kernel would run a second time.
    "attention": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names("attention"), _is_fused_attention
    ),
}


def remat(function: Callable, name: str) -> Callable:
    """Wraps the body of a scan over blocks so that the backward pass recomputes it.

    Args:
        function: The body.
        name: "none" keeps every activation, "full" keeps only the input of each block, "attention"
            keeps the attention outputs too.

    Raises:
        UserError: on another name.
    """
    if name == "none":
        return function
    if name not in _REMAT_POLICIES:
        choices = ", ".join(["none", *_REMAT_POLICIES])
        raise UserError(f"unknown remat policy {name!r}: choose one of {choices}")
    # Inside a scan nothing can merge the recomputation with the original, so no barrier is needed.
    return jax.checkpoint(function, policy=_REMAT_POLICIES[name], prevent_cse=False)


def rope_tables(
    grid: tuple[int, int, int], head_dim: int, theta: float = 10000.0
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of a three-axis rotary embedding (Wan2.1 reference code).

    Rows and columns get 2 * (D // 6) channels each, frames the rest; positions are integer grid
    indices from 0. Angles are computed in float64. One small table per axis is spread over the grid
    by the compiled program, so that no constant of N * D values ends up inside it.

    Returns:
        cos, sin: (N, D/2) fp32, tokens frame-major, channel pairs ordered frame, row, column.
    """
    side = 2 * (head_dim // 6)
    angles = []
    for axis, width in enumerate((head_dim - 2 * side, side, side)):
        frequencies = theta ** (-np.arange(0, width, 2) / width)
        shape = [1, 1, 1, width // 2]
        shape[axis] = grid[axis]
        angles.append(np.outer(np.arange(grid[axis]), frequencies).reshape(shape))

    def spread(function: Callable) -> jax.Array:
        parts = [jnp.broadcast_to(function(a).astype(np.float32), (*grid, a.shape[-1])) for a in angles]
        # (T', H', W', D/2) -> (N, D/2)
        return jnp.concatenate(parts, axis=-1).reshape(-1, head_dim // 2)

    return spread(np.cos), spread(np.sin)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates adjacent channel pairs of x (B, N, H, D), in fp32; cos and sin are (N, D/2)."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)  # (B, N, H, D/2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, None, :], sin[:, None, :]  # (N, 1, D/2)
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape)


def time_sinusoid(t: jax.Array, width: int) -> jax.Array:
    """[cos(t w) | sin(t w)], w_i = 10000^(-2i/width): t (B,) in 0..1000 -> (B, width) fp32.

    The frequencies are rounded to fp32 in the order that the public implementations use: at
    t = 999 another order of roundings is visible in the network's output at 5e-5.
    """
    half = width // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies  # (B, width/2)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
