"""Layers that the video transformers share: norms, rotary, position and time embeddings.

Legend: B batch, N query tokens, M key tokens, H heads, D head width, C model width, L text length,
T' H' W' token grid (frames, rows, columns).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from prophy_jax.models import attention

# Flax's fast variance, E[x^2] - E[x]^2, loses digits when the mean is large: off everywhere.
LayerNorm = functools.partial(nn.LayerNorm, use_fast_variance=False, dtype=jnp.float32)
RMSNorm = functools.partial(nn.RMSNorm, use_fast_variance=False, dtype=jnp.float32)


class KeyValue(flax.struct.PyTreeNode):
    """Keys and values of one attention, or of a stack of blocks with a leading layer axis."""

    key: jax.Array  # (B, M, H, D)
    value: jax.Array  # (B, M, H, D)
    bias: jax.Array | None = None  # (B, 1, 1, M) fp32, added to the scores


def scan_layers(
    body: Callable[[Any, Any], Any],
    carry: Any,
    stack: Any,
    start: int | jax.Array = 0,
    count: int | None = None,
    remat: str = "none",
) -> Any:
    """Applies carry = body(carry, layer) for `count` layers of a stack from `start`, which may be traced.

    A part of the stack is read in place, layer by layer: slicing it off first would copy its weights.

    Args:
        body: The layer.
        carry: What goes through the layers.
        stack: A tree whose leaves have a leading layer axis.
        start: The first layer.
        count: How many; None for the whole stack.
        remat: What the backward pass recomputes, see `attention.remat`.

    Raises:
        ValueError: when the stack has no such range.
    """
    depth = jax.tree.leaves(stack)[0].shape[0]
    if count is None:
        step = attention.remat(lambda carry, layer: (body(carry, layer), None), remat, repeated=depth > 1)
        return jax.lax.scan(step, carry, stack)[0]
    if isinstance(start, int) and not 0 <= start <= start + count <= depth:
        raise ValueError(f"no blocks {start}..{start + count} in a stack of {depth}")

    def indexed(carry: Any, index: jax.Array) -> tuple[Any, None]:
        layer = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack)
        return body(carry, layer), None

    if remat == "none":  # saves all but the slices, which would be copies of weights
        step = jax.checkpoint(indexed, policy=_is_no_slice, prevent_cse=False)
    else:
        step = attention.remat(indexed, remat, repeated=count > 1)
    return jax.lax.scan(step, carry, start + jnp.arange(count))[0]


def _is_no_slice(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name not in ("dynamic_slice", "squeeze")


def fp32_dense(features: int, init: Callable, name: str) -> nn.Dense:
    """For time paths and heads, which the reference codes keep in fp32 and which cost little."""
    return nn.Dense(features, dtype=jnp.float32, precision="highest", kernel_init=init, name=name)


class MLP(nn.Module):
    """Two layers with the tanh form of GELU, of width `features` between them."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (B, N, C) -> (B, N, C)."""
        xavier = nn.initializers.xavier_uniform()
        up = nn.Dense(self.features, dtype=self.dtype, kernel_init=xavier, name="up")(x)
        down = nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=xavier, name="down")
        return checkpoint_name(down(nn.gelu(checkpoint_name(up, "products"), approximate=True)), "products")


def token_grid(latent_shape: Sequence[int], patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """The token grid (T', H', W') of latents (..., T, h, w, c) cut into patches.

    Raises:
        ValueError: when a side is not a multiple of the patch.
    """
    sides = tuple(latent_shape[-4:-1])
    if len(sides) != 3 or any(side % p for side, p in zip(sides, patch, strict=True)):
        raise ValueError(f"latents of shape {tuple(latent_shape)}: (T, h, w) must be multiples of {patch}")
    frames, rows, columns = (side // p for side, p in zip(sides, patch, strict=True))
    return frames, rows, columns


def check_inputs(latents: jax.Array, t: jax.Array, text: jax.Array, channels: int) -> None:
    """Raises ValueError unless latents are (B, T, h, w, channels), t (B,), and text of B samples."""
    batch = latents.shape[0]
    if latents.ndim != 5 or latents.shape[-1] != channels:
        raise ValueError(f"latents must be (B, T, h, w, {channels}), got {latents.shape}")
    if t.shape != (batch,):
        raise ValueError(f"t must be ({batch},), one time per sample, got {t.shape}")
    if text.shape[0] != batch:
        raise ValueError(f"text must be of {batch} samples, got {text.shape[0]}")


def check_text(text: jax.Array, width: int) -> None:
    """Raises ValueError unless text features are (B, L, width)."""
    if text.ndim != 3 or text.shape[-1] != width:
        raise ValueError(f"text must be (B, L, {width}), got {text.shape}")


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Adaptive layer norm's affine part: x (B, N, C); shift and scale (B, 1, C)."""
    return x * (1 + scale) + shift


def rope_tables(
    grid: tuple[int, int, int], head_dim: int, theta: float = 10000.0
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of a three-axis rotary embedding (Wan2.1 reference code).

    Rows and columns get 2 * (D // 6) channels each, frames the rest; positions are integer grid
    indices from 0.

    Returns:
        cos, sin: (N, D/2) fp32, tokens frame-major, channel pairs ordered frame, row, column.
    """
    side = 2 * (head_dim // 6)
    return rope_tables_at([np.arange(n) for n in grid], (head_dim - 2 * side, side, side), theta)


def rope_tables_at(
    positions: Sequence[np.ndarray], widths: tuple[int, int, int], theta: float = 10000.0
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of a rotary embedding of frames, rows and columns at any positions.

    Args:
        positions: (T',), (H',) and (W',).
        widths: Channels that turn with each axis, D in all. Angles are computed in float64.
        theta: w_k = theta^(-2k/width).

    Returns:
        cos, sin: (N, D/2) fp32, tokens frame-major, channel pairs ordered frame, row, column.
    """
    angles = [
        np.outer(p, theta ** (-np.arange(0, width, 2) / width))
        for p, width in zip(positions, widths, strict=True)
    ]
    grid = tuple(len(p) for p in positions)
    cos, sin = ([(axis, f(a)) for axis, a in enumerate(angles)] for f in (np.cos, np.sin))
    return spread(cos, grid), spread(sin, grid)


def spread(tables: Sequence[tuple[int, np.ndarray]], grid: tuple[int, ...]) -> jax.Array:
    """Tables of single axes, each (axis, (length, width)), side by side for every token of a grid.

    The compiled program spreads them, so that no constant of N rows ends up inside it.

    Returns:
        (N, sum of the widths) fp32, tokens frame-major.
    """
    parts = []
    for axis, table in tables:
        shape = [1, 1, 1, table.shape[-1]]
        shape[axis] = grid[axis]
        parts.append(jnp.broadcast_to(table.astype(np.float32).reshape(shape), (*grid, shape[-1])))
    # (T', H', W', width) -> (N, width)
    return jnp.concatenate(parts, axis=-1).reshape(math.prod(grid), -1)


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
