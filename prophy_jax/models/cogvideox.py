"""The CogVideoX text-to-video transformers (2B, 5B, 1.5-5B) as three pure functions: embed, blocks, head.

Text and video tokens go through the same attention and MLP, text first, and both change in every block.

Legend: B batch, T h w latent grid, c latent channels, T' H' W' token grid, N = T' H' W' tokens
(frame-major), L text length, S = L + N, C width, D text feature width, E time width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from prophy_jax import models
from prophy_jax.models import attention, layers
from prophy_jax.models.backbone import Backbone, BackboneConfig, Params, Stream
from prophy_jax.run.errors import UserError

Rope = tuple[jax.Array, jax.Array]

POSITIONS = ("sincos", "rope_crop", "rope_slice")


@dataclasses.dataclass(frozen=True)
class CogVideoXConfig(BackboneConfig):
    """Sizes of a CogVideoX transformer (CogVideoX model cards, arXiv:2408.06072).

    Attributes:
        time_dim: E, the width of the time embedding.
        positions: How a token learns where it is. "sincos": a fixed table is added to the patches;
            "rope_crop": rotary, rows and columns scaled to those of `base_grid`; "rope_slice": rotary,
            rows and columns counted from 0.
        base_grid: Rows and columns of tokens that "rope_crop" counts 0, 1, 2...
    """

    text_len: int = 226
    time_dim: int = 512
    positions: str = "rope_crop"
    base_grid: tuple[int, int] = (30, 45)
    eps: float = 1e-5


COGVIDEOX_2B = CogVideoXConfig(dim=1920, num_heads=30, num_layers=30, ffn_dim=7680, positions="sincos")
COGVIDEOX_5B = CogVideoXConfig(dim=3072, num_heads=48, num_layers=42, ffn_dim=12288)
COGVIDEOX_1_5_5B = dataclasses.replace(COGVIDEOX_5B, patch_size=(2, 2, 2), positions="rope_slice")


class Conditioning(flax.struct.PyTreeNode):
    """What every block and the head need besides the stream."""

    time: jax.Array  # (B, E) fp32: SiLU of the time embedding; every norm projects it for itself
    rope: Rope | None  # cos, sin: (S, head_dim / 2) fp32; None where a table was added to the patches
    grid: tuple[int, int, int] = flax.struct.field(pytree_node=False)  # (T', H', W')


_xavier = nn.initializers.xavier_uniform()
_lecun = nn.initializers.lecun_normal()
_QK_EPS = 1e-6  # of the norms of queries and keys, whatever `config.eps` is
_SINCOS_STRETCH = 1.875  # rows and columns of tokens to one position of the sine table


class CogVideoXTextEmbed(nn.Module):
    """Text features (B, L, D) -> text tokens (B, L, C)."""

    config: CogVideoXConfig
    dtype: Any

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        return nn.Dense(self.config.dim, dtype=self.dtype, kernel_init=_xavier, name="text")(text)


class CogVideoXEmbed(nn.Module):
    """Patch and time embeddings."""

    config: CogVideoXConfig
    dtype: Any

    @nn.compact
    def __call__(self, latents: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns video (B, N, C) and the activated time embedding (B, E)."""
        config = self.config
        b, frames, rows, columns, c = latents.shape
        pt, ph, pw = config.patch_size
        # (B, T, h, w, c) -> (B, T', pt, H', ph, W', pw, c) -> (B, N, c pt ph pw)
        patches = latents.reshape(b, frames // pt, pt, rows // ph, ph, columns // pw, pw, c)
        patches = patches.transpose(0, 1, 3, 5, 7, 2, 4, 6)
        patches = patches.reshape(b, -1, c * config.patch_volume)
        video = nn.Dense(config.dim, dtype=self.dtype, kernel_init=_xavier, name="patch")(patches)

        time = layers.time_sinusoid(t, config.dim)
        time = nn.silu(layers.fp32_dense(config.time_dim, _lecun, "time_in")(time))
        return video, nn.silu(layers.fp32_dense(config.time_dim, _lecun, "time_out")(time))


class CogVideoXNorm(nn.Module):
    """One norm for both streams, and for each a modulation of its own by the time."""

    config: CogVideoXConfig
    dtype: Any

    @nn.compact
    def __call__(self, stream: Stream, time: jax.Array) -> tuple[jax.Array, Stream]:
        """Stream, time (B, E) -> tokens (B, S, C) of both, text first, and the gates (B, 1, C) of each."""
        width = self.config.dim
        modulation = checkpoint_name(layers.fp32_dense(6 * width, _xavier, "modulation")(time), "products")
        # Six pieces (B, 1, C).
        shift, scale, gate, text_shift, text_scale, text_gate = jnp.split(modulation[:, None], 6, axis=-1)
        norm = layers.LayerNorm(epsilon=self.config.eps, name="norm")
        text = layers.modulate(norm(stream.text), text_shift, text_scale).astype(self.dtype)
        video = layers.modulate(norm(stream.video), shift, scale).astype(self.dtype)
        return jnp.concatenate([text, video], axis=1), Stream(video=gate, text=text_gate)


class CogVideoXAttention(nn.Module):
    """Multi-head attention whose queries and keys are normed over each head."""

    config: CogVideoXConfig
    dtype: Any
    attention: Callable

    @nn.compact
    def __call__(self, x: jax.Array, rope: Rope | None) -> jax.Array:
        """x (B, S, C) -> (B, S, C)."""
        config = self.config
        dense = functools.partial(nn.Dense, config.dim, dtype=self.dtype, kernel_init=_xavier)
        # The norm's gradient needs its input, from which the rest is soon computed again.
        q, k, v = (self._heads(checkpoint_name(dense(name=name)(x), "qkv")) for name in "qkv")
        q = layers.LayerNorm(epsilon=_QK_EPS, name="norm_q")(q)
        k = layers.LayerNorm(epsilon=_QK_EPS, name="norm_k")(k)
        if rope is not None:
            q, k = layers.apply_rope(q, *rope), layers.apply_rope(k, *rope)
        out = self.attention(q.astype(self.dtype), k.astype(self.dtype), v, None)
        # (B, S, heads, head_dim) -> (B, S, C)
        return checkpoint_name(dense(name="o")(out.reshape(x.shape)), "products")

    def _heads(self, y: jax.Array) -> jax.Array:
        # (B, S, C) -> (B, S, heads, head_dim)
        return y.reshape(*y.shape[:2], self.config.num_heads, self.config.head_dim)


class CogVideoXBlock(nn.Module):
    """Joint attention and MLP over the tokens of both streams."""

    config: CogVideoXConfig
    dtype: Any
    attention: Callable

    @nn.compact
    def __call__(self, stream: Stream, time: jax.Array, rope: Rope | None) -> Stream:
        """video (B, N, C), text (B, L, C), time (B, E) -> both streams."""
        config = self.config
        x, gates = CogVideoXNorm(config, self.dtype, name="norm1")(stream, time)
        x = CogVideoXAttention(config, self.dtype, self.attention, name="attn")(x, rope)
        stream = self._add(stream, x, gates)
        x, gates = CogVideoXNorm(config, self.dtype, name="norm2")(stream, time)
        x = layers.MLP(config.ffn_dim, self.dtype, name="ffn")(x)
        return self._add(stream, x, gates)

    def _add(self, stream: Stream, x: jax.Array, gates: Stream) -> Stream:
        """x (B, S, C), gates (B, 1, C)."""
        length = stream.text.shape[1]
        return Stream(
            video=(stream.video + gates.video * x[:, length:]).astype(self.dtype),
            text=(stream.text + gates.text * x[:, :length]).astype(self.dtype),
        )


class CogVideoXHead(nn.Module):
    """Two norms in a row, the second modulated, and the projection of every token to its latent patch."""

    config: CogVideoXConfig

    @nn.compact
    def __call__(self, video: jax.Array, time: jax.Array, grid: tuple[int, int, int]) -> jax.Array:
        """video (B, N, C), time (B, E) -> (B, T, h, w, c) fp32."""
        config = self.config
        modulation = layers.fp32_dense(2 * config.dim, _xavier, "modulation")(time)
        shift, scale = jnp.split(modulation[:, None], 2, axis=-1)  # (B, 1, C)
        x = layers.LayerNorm(epsilon=config.eps, name="norm1")(video)
        x = layers.modulate(layers.LayerNorm(epsilon=config.eps, name="norm2")(x), shift, scale)
        c = config.out_channels
        x = layers.fp32_dense(c * config.patch_volume, _xavier, "out")(x)
        pt, ph, pw = config.patch_size
        frames, rows, columns = grid
        # (B, N, c pt ph pw) -> (B, T', H', W', c, pt, ph, pw) -> (B, T, h, w, c)
        x = x.reshape(-1, *grid, c, pt, ph, pw).transpose(0, 1, 5, 2, 6, 3, 7, 4)
        return x.reshape(-1, frames * pt, rows * ph, columns * pw, c)


@dataclasses.dataclass(frozen=True)
class CogVideoX(Backbone):
    """A CogVideoX transformer. Its time is the timestep, its prediction v.

    To remat policies, joint attention is self-attention. Gates of an untrained block are small, not closed.
    """

    config: CogVideoXConfig

    modules = (CogVideoXEmbed, CogVideoXTextEmbed, CogVideoXBlock, CogVideoXHead)

    # `text_ahead` is None as in the base class: what joint blocks make of the text depends on the video and
    # on the time. Padding is never shortened either: its rows differ from the first block on.

    def blocks(
        self,
        stacked_params: Params,
        stream: Stream,
        cond: Conditioning,
        start: int | jax.Array = 0,
        count: int | None = None,
        ahead: None = None,
    ) -> Stream:
        """See `Backbone`. Video and text change."""

        def body(stream: Stream, params: Params) -> Stream:
            return self._block.apply({"params": params}, stream, cond.time, cond.rope)

        # The caller may have added fp32 hints.
        stream = jax.tree.map(lambda tokens: tokens.astype(self.dtype), stream)
        return layers.scan_layers(body, stream, stacked_params, start, count, self.remat)

    def _condition(
        self, params: Params, latents: jax.Array, t: jax.Array, text_len: int, grid: tuple[int, int, int]
    ) -> tuple[jax.Array, Conditioning]:
        video, time = self._embed.apply({"params": params}, latents, t)
        rope = None
        if self.config.positions == "sincos":
            video = (video + sincos_table(grid, self.config.dim)).astype(self.dtype)
        else:
            rope = rope_tables(self.config, grid, text_len)
        return video, Conditioning(time, rope, grid)

    def _init_block(self, key: jax.Array) -> Params:
        token, time = jnp.zeros((1, 1, self.config.dim)), jnp.zeros((1, self.config.time_dim))
        return self._block.init(key, Stream(token, token), time, None)["params"]

    def _init_head(self, key: jax.Array) -> Params:
        token, time = jnp.zeros((1, 1, self.config.dim)), jnp.zeros((1, self.config.time_dim))
        return self._head.init(key, token, time, (1, 1, 1))["params"]


def rope_tables(config: CogVideoXConfig, grid: tuple[int, int, int], text_len: int) -> Rope:
    """cos, sin (S, head_dim / 2) fp32 of the text, which is not rotated, and of the video.

    A quarter of the channels turns with the frame, three eighths with the row and as many with the column.
    """
    positions = [np.arange(side) for side in grid]
    if config.positions == "rope_crop":
        positions[1:] = crop_positions(grid[1:], config.base_grid)
    eighth = config.head_dim // 8
    cos, sin = layers.rope_tables_at(positions, (2 * eighth, 3 * eighth, 3 * eighth))
    still = (text_len, config.head_dim // 2)
    return jnp.concatenate([jnp.ones(still), cos]), jnp.concatenate([jnp.zeros(still), sin])


def crop_positions(grid: tuple[int, int], base: tuple[int, int]) -> list[np.ndarray]:
    """Positions of the rows and columns of a grid (H', W'), scaled and centred on those of `base`.

    The grid is stretched, its shape kept, until it fills `base` in one direction. On `base` itself positions
    are 0, 1, 2... The last one of a shifted axis follows the rule of diffusers, which checkpoints are used
    with: (n - 1) / n of the end, where even steps would have the end less one step.
    """
    rows, columns = grid
    if rows / columns > base[0] / base[1]:
        size = base[0], round(base[0] / rows * columns)
    else:
        size = round(base[1] / columns * rows), base[1]
    starts = [round((whole - part) / 2) for whole, part in zip(base, size, strict=True)]
    return [
        np.linspace(start, (start + part) * (n - 1) / n, n)
        for start, part, n in zip(starts, size, grid, strict=True)
    ]


def sincos_table(grid: tuple[int, int, int], dim: int) -> jax.Array:
    """What is added to the patches of a grid (T', H', W'): (N, C) fp32.

    A quarter of the channels is of the frame, then three eighths of the column and as many of the row:
    [sin(p w) | cos(p w)], w_k = 10000^(-2k/width). Angles are computed in float64.
    """
    frames, rows, columns = grid
    tables = []
    for axis, side, width, stretch in (
        (0, frames, dim // 4, 1.0),
        (2, columns, 3 * dim // 8, _SINCOS_STRETCH),
        (1, rows, 3 * dim // 8, _SINCOS_STRETCH),
    ):
        frequencies = 10000.0 ** (-np.arange(0, width, 2) / width)
        angles = np.outer(np.arange(side) / stretch, frequencies)
        tables.append((axis, np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)))
    return layers.spread(tables, grid)


def build(
    variant: str | None = None, dtype: str = "float32", remat: str = "none", **overrides: Any
) -> CogVideoX:
    """Builds a CogVideoX from a public variant, from sizes, or from a variant with some sizes changed.

    Args:
        variant: "2b", "5b", "1.5-5b" or None.
        dtype: Compute dtype, "float32" or "bfloat16".
        remat: See `attention.remat`.
        **overrides: Fields of `CogVideoXConfig`.

    Raises:
        UserError: on an unknown variant, dtype, remat policy, field or position encoding, and on a width
            that the encoding does not divide.
    """
    variants = {"2b": COGVIDEOX_2B, "5b": COGVIDEOX_5B, "1.5-5b": COGVIDEOX_1_5_5B}
    attention.remat(build, remat)  # Rejects an unknown name now rather than at the first step.
    config = models.configure("CogVideoX", CogVideoXConfig, overrides, variant, variants)
    if config.positions not in POSITIONS:
        raise UserError(f"positions={config.positions!r}: choose one of {', '.join(POSITIONS)}")
    # Three eighths of these channels are pairs.
    encoded = config.dim if config.positions == "sincos" else config.head_dim
    if config.dim % config.num_heads or encoded % 16:
        raise UserError(
            f"CogVideoX width {config.dim} does not split into {config.num_heads} heads, or the width of a "
            "head (with sincos positions that of the model) is no multiple of 16"
        )
    return CogVideoX(config, models.compute_dtype(dtype), remat)
