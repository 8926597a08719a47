"""The Wan2.1 text-to-video transformer as three pure functions: embed, blocks, head.

Legend: B batch, T h w latent grid, c latent channels, T' H' W' token grid, N = T' H' W' tokens
(frame-major), C width, L text length, D text feature width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from prophy_jax import models
from prophy_jax.models import attention, layers
from prophy_jax.models.backbone import Backbone, BackboneConfig, Params, Stream
from prophy_jax.models.layers import KeyValue
from prophy_jax.run.errors import UserError

Rope = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class WanConfig(BackboneConfig):
    """Sizes of a Wan2.1 transformer (Wan2.1 model cards).

    Attributes:
        freq_dim: Width of the time's sines.
    """

    freq_dim: int = 256


WAN_1_3B = WanConfig(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960)
WAN_14B = WanConfig(dim=5120, num_heads=40, num_layers=40, ffn_dim=13824)


class Conditioning(flax.struct.PyTreeNode):
    """What every block and the head need besides the stream."""

    modulation: jax.Array  # (B, 6, C) fp32: shift, scale, gate of self-attention, then of the MLP
    time: jax.Array  # (B, C) fp32: the time embedding, read by the head
    rope: Rope  # cos, sin: (N, head_dim / 2) fp32
    grid: tuple[int, int, int] = flax.struct.field(pytree_node=False)  # (T', H', W')


_xavier = nn.initializers.xavier_uniform()
# The reference code draws N(0, 0.02^2) here. This is close to it at Wan's widths, and right at small ones.
_lecun = nn.initializers.lecun_normal()


def _table_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * shape[-1] ** -0.5


class WanTextEmbed(nn.Module):
    """Text features (B, L, D) -> text tokens (B, L, C)."""

    config: WanConfig
    dtype: Any

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        width = self.config.dim
        text = nn.Dense(width, dtype=self.dtype, kernel_init=_lecun, name="text_in")(text)
        text = nn.gelu(text, approximate=True)
        return nn.Dense(width, dtype=self.dtype, kernel_init=_lecun, name="text_out")(text)


class WanEmbed(nn.Module):
    """Patch and time embeddings."""

    config: WanConfig
    dtype: Any

    @nn.compact
    def __call__(self, latents: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns video (B, N, C), modulation (B, 6, C) and temb (B, C)."""
        config = self.config
        b, frames, rows, columns, c = latents.shape
        pt, ph, pw = config.patch_size
        # (B, T, h, w, c) -> (B, T', pt, H', ph, W', pw, c) -> (B, N, pt ph pw c)
        patches = latents.reshape(b, frames // pt, pt, rows // ph, ph, columns // pw, pw, c)
        patches = patches.transpose(0, 1, 3, 5, 2, 4, 6, 7)
        patches = patches.reshape(b, -1, config.patch_volume * c)
        video = nn.Dense(config.dim, dtype=self.dtype, kernel_init=_xavier, name="patch")(patches)

        temb = layers.time_sinusoid(t, config.freq_dim)
        temb = nn.silu(layers.fp32_dense(config.dim, _lecun, "time_in")(temb))
        temb = layers.fp32_dense(config.dim, _lecun, "time_out")(temb)
        modulation = layers.fp32_dense(6 * config.dim, _xavier, "time_modulation")(nn.silu(temb))
        return video, modulation.reshape(b, 6, config.dim), temb


class WanAttention(nn.Module):
    """Multi-head attention whose queries and keys are RMS-normed over the full width C."""

    config: WanConfig
    dtype: Any
    attention: Callable

    def setup(self) -> None:
        config = self.config
        dense = functools.partial(nn.Dense, config.dim, dtype=self.dtype, kernel_init=_xavier)
        self.q, self.k, self.v, self.o = dense(), dense(), dense(), dense()
        self.norm_q = layers.RMSNorm(epsilon=config.eps)
        self.norm_k = layers.RMSNorm(epsilon=config.eps)

    def __call__(self, x: jax.Array, context: jax.Array | KeyValue, rope: Rope | None) -> jax.Array:
        """x (B, N, C), context (B, M, C) or what `keys_values` made of it -> (B, N, C)."""
        if not isinstance(context, KeyValue):
            context = self.keys_values(context, rope)
        q = self._heads(self.norm_q(checkpoint_name(self.q(x), "qkv")))
        if rope is not None:
            q = layers.apply_rope(q, *rope)
        out = self.attention(q.astype(self.dtype), context.key, context.value, context.bias)
        # (B, N, heads, head_dim) -> (B, N, C)
        return checkpoint_name(self.o(out.reshape(x.shape)), "products")

    def keys_values(self, context: jax.Array, rope: Rope | None = None) -> KeyValue:
        """context (B, M, C) -> keys and values (B, M, heads, head_dim)."""
        # The norm's gradient needs its input, from which the rest is soon computed again.
        k, v = checkpoint_name(self.k(context), "qkv"), checkpoint_name(self.v(context), "qkv")
        k = self._heads(self.norm_k(k))
        if rope is not None:
            k = layers.apply_rope(k, *rope)
        return KeyValue(k.astype(self.dtype), self._heads(v))

    def _heads(self, y: jax.Array) -> jax.Array:
        # (B, N, C) -> (B, N, heads, head_dim)
        return y.reshape(*y.shape[:2], self.config.num_heads, self.config.head_dim)


class WanBlock(nn.Module):
    """Self-attention, cross-attention to the text, MLP.

    The time modulates the first and the last; cross-attention has an affine norm instead.
    """

    config: WanConfig
    dtype: Any
    attention: Callable

    @nn.compact
    def __call__(
        self, video: jax.Array, text: jax.Array | KeyValue, modulation: jax.Array, rope: Rope
    ) -> jax.Array:
        """video (B, N, C), text (B, L, C) or its keys and values, modulation (B, 6, C) -> video (B, N, C)."""
        config = self.config
        table = self.param("modulation", _table_init, (6, config.dim))
        # Six pieces (B, 1, C), in fp32.
        pieces = jnp.split(table.astype(jnp.float32) + modulation, 6, axis=1)
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = pieces

        def norm(x: jax.Array) -> jax.Array:
            return layers.LayerNorm(epsilon=config.eps, use_bias=False, use_scale=False)(x)

        x = layers.modulate(norm(video), shift_attn, scale_attn).astype(self.dtype)
        x = WanAttention(config, self.dtype, self.attention, name="self_attn")(x, x, rope)
        video = (video + gate_attn * x).astype(self.dtype)

        x = layers.LayerNorm(epsilon=config.eps, name="cross_norm")(video)
        x = WanAttention(config, self.dtype, self.attention, name="cross_attn")(x, text, None)
        video = video + x

        x = layers.modulate(norm(video), shift_ffn, scale_ffn)
        x = layers.MLP(config.ffn_dim, self.dtype, name="ffn")(x)
        return (video + gate_ffn * x).astype(self.dtype)


class WanHead(nn.Module):
    """Modulated norm and the projection of every token to its latent patch."""

    config: WanConfig

    @nn.compact
    def __call__(self, video: jax.Array, temb: jax.Array, grid: tuple[int, int, int]) -> jax.Array:
        """video (B, N, C), temb (B, C) -> (B, T, h, w, c) fp32."""
        config = self.config
        table = self.param("modulation", _table_init, (2, config.dim))
        shift, scale = jnp.split(table.astype(jnp.float32) + temb[:, None], 2, axis=1)  # (B, 1, C)
        x = layers.LayerNorm(epsilon=config.eps, use_bias=False, use_scale=False)(video)
        x = layers.modulate(x, shift, scale)
        c = config.out_channels
        x = layers.fp32_dense(config.patch_volume * c, nn.initializers.zeros, "out")(x)
        pt, ph, pw = config.patch_size
        frames, rows, columns = grid
        # (B, N, pt ph pw c) -> (B, T', H', W', pt, ph, pw, c) -> (B, T, h, w, c)
        x = x.reshape(-1, *grid, pt, ph, pw, c).transpose(0, 1, 4, 2, 5, 3, 6, 7)
        return x.reshape(-1, frames * pt, rows * ph, columns * pw, c)


@dataclasses.dataclass(frozen=True)
class Wan(Backbone):
    """The Wan2.1 transformer. Its time is 1000 sigma, its prediction the velocity noise - x0."""

    config: WanConfig

    modules = (WanEmbed, WanTextEmbed, WanBlock, WanHead)

    def text_ahead(
        self, stacked_params: Params, text: jax.Array, mask: jax.Array, rows: int | None = None
    ) -> KeyValue:
        """Keys and values that a stack of blocks reads of text tokens (B, L, C): they know no time.

        Args:
            stacked_params: The stack, with a leading layer axis.
            text: (B, L, C). All rows after the last valid one are equal.
            mask: (B, L) bool, the valid rows.
            rows: Keep this many rows, more than are valid in any sample. The first padding row then
                stands for all L - n of them: log(L - n) added to its score gives the same softmax.
        """
        attention, bias = WanAttention(self.config, self.dtype, self.attention), None
        if rows is not None:
            length, valid = text.shape[1], mask.sum(axis=1, keepdims=True)  # (B, 1)
            padding = jnp.where(jnp.arange(rows) == valid, jnp.log(length - valid), -jnp.inf)
            bias = jnp.where(mask[:, :rows], 0.0, padding)[:, None, None]  # (B, 1, 1, M)
            text = text[:, :rows]

        def layer(params: Params) -> KeyValue:
            context: Any = attention.apply({"params": params["cross_attn"]}, text, method="keys_values")
            return context.replace(bias=bias)

        return jax.lax.map(layer, stacked_params)

    def blocks(
        self,
        stacked_params: Params,
        stream: Stream,
        cond: Conditioning,
        start: int | jax.Array = 0,
        count: int | None = None,
        ahead: KeyValue | None = None,
    ) -> Stream:
        """See `Backbone`. The text stays as it is."""

        def body(video: jax.Array, layer: tuple[Params, KeyValue | None]) -> jax.Array:
            params, ahead = layer
            text = stream.text if ahead is None else ahead
            return self._block.apply({"params": params}, video, text, cond.modulation, cond.rope)

        video = stream.video.astype(self.dtype)  # The caller may have added fp32 hints.
        video = layers.scan_layers(body, video, (stacked_params, ahead), start, count, self.remat)
        return stream.replace(video=video)

    def _condition(
        self, params: Params, latents: jax.Array, t: jax.Array, text_len: int, grid: tuple[int, int, int]
    ) -> tuple[jax.Array, Conditioning]:
        video, modulation, time = self._embed.apply({"params": params}, latents, t)
        rope = layers.rope_tables(grid, self.config.head_dim)
        return video, Conditioning(modulation, time, rope, grid)

    def _init_block(self, key: jax.Array) -> Params:
        token, modulation = jnp.zeros((1, 1, self.config.dim)), jnp.zeros((1, 6, self.config.dim))
        rope = layers.rope_tables((1, 1, 1), self.config.head_dim)
        return self._block.init(key, token, token, modulation, rope)["params"]

    def _init_head(self, key: jax.Array) -> Params:
        """The projection of the head is zero."""
        token = jnp.zeros((1, 1, self.config.dim))
        return self._head.init(key, token, token[:, 0], (1, 1, 1))["params"]


def build(variant: str | None = None, dtype: str = "float32", remat: str = "none", **overrides: Any) -> Wan:
    """Builds a Wan from a public variant, from sizes, or from a variant with some sizes changed.

    Args:
        variant: "1.3b", "14b" or None.
        dtype: Compute dtype, "float32" or "bfloat16".
        remat: See `attention.remat`.
        **overrides: Fields of `WanConfig`.

    Raises:
        UserError: on an unknown variant, dtype, remat policy or field.
    """
    variants = {"1.3b": WAN_1_3B, "14b": WAN_14B}
    attention.remat(build, remat)  # Rejects an unknown name now rather than at the first step.
    config = models.configure("Wan", WanConfig, overrides, variant, variants)
    if config.dim % config.num_heads or config.head_dim % 2:
        raise UserError(f"Wan width {config.dim} does not split into {config.num_heads} heads of even width")
    return Wan(config, models.compute_dtype(dtype), remat)
