"""T5 text encoders: UMT5-XXL for Wan2.1, T5 v1.1 XXL for CogVideoX.

A parameter tree is a plain dict {"embedding", "blocks", "norm"}, with "position_bias" when all layers
share one; the leaves of "blocks" carry a leading layer axis.

Legend: B batch, L text length, D model width, H heads, K head width, F feed-forward width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from prophy_jax import models
from prophy_jax.models import layers
from prophy_jax.run.errors import UserError

Params = Mapping[str, Any]

PADDINGS = ("zeros", "encoded")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 encoder with gated GELU (T5 v1.1 and UMT5 model cards).

    Attributes:
        vocab_size: Rows of the embedding, at least the tokenizer's tokens.
        d_model: Width of the model.
        d_kv: Width of a head.
        d_ff: Width of the gated MLP.
        num_layers: How many blocks.
        num_heads: Heads of self-attention.
        shared_bias: One table of relative position biases for all layers (T5) or one in each (UMT5).
        num_buckets: Distances are sorted into this many buckets, half for keys before the query.
        max_distance: All distances from here on fall into the last bucket of their half.
        eps: Added to the mean square in norms.
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    shared_bias: bool
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


UMT5_XXL = T5Config(
    vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, shared_bias=False
)
T5_V1_1_XXL = dataclasses.replace(UMT5_XXL, vocab_size=32128, shared_bias=True)


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of every (query, key) pair: (L, L) int32.

    A key at or before its query falls into one of the first half of the buckets, a later key into the
    second half. Of the n buckets of a half the first e = n/2 hold one distance each; bucket e + j
    begins at the distance e (max_distance / e)^(j / (n - e)). T5 rounds a logarithm down to find it;
    this compares integer powers, which are exact.
    """
    half = num_buckets // 2
    exact = half // 2
    steps = half - exact
    starts, distance = list(range(exact)), exact
    for j in range(steps):
        while distance**steps < exact ** (steps - j) * max_distance**j:
            distance += 1
        starts.append(distance)
    relative = np.arange(length) - np.arange(length)[:, None]  # key - query
    bucket = np.searchsorted(starts, np.abs(relative), side="right") - 1
    return (bucket + half * (relative > 0)).astype(np.int32)


def _dense(features: int, dtype: Any, name: str, scale: float = 1.0) -> nn.Dense:
    """Without bias; the kernel is drawn from N(0, scale / inputs)."""
    init = nn.initializers.variance_scaling(scale, "fan_in", "normal")
    return nn.Dense(features, use_bias=False, dtype=dtype, kernel_init=init, name=name)


class PositionBias(nn.Module):
    """What attention adds to its scores, by head and by the distance from query to key."""

    config: T5Config

    @nn.compact
    def __call__(self, length: int) -> jax.Array:
        """Returns (1, H, L, L) in the dtype of the table."""
        config = self.config
        init = nn.initializers.normal((2 * config.num_buckets * config.num_heads) ** -0.5)
        table = self.param("embedding", init, (config.num_buckets, config.num_heads))
        buckets = relative_buckets(length, config.num_buckets, config.max_distance)
        return table[buckets].transpose(2, 0, 1)[None]  # (L, L, H) -> (1, H, L, L)


class T5Attention(nn.Module):
    """Self-attention with position bias; the scores are not scaled; the initialization allows for that."""

    config: T5Config
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array | None, mask: jax.Array | None) -> jax.Array:
        """x (B, L, D), bias (1, H, L, L), mask (B, L) bool of the keys or None -> (B, L, D)."""
        config = self.config
        width = config.num_heads * config.d_kv

        def project(name: str, scale: float = 1.0) -> jax.Array:
            y = _dense(width, self.dtype, name, scale)(x)
            return y.reshape(*x.shape[:2], config.num_heads, config.d_kv)  # (B, L, H K) -> (B, L, H, K)

        out = jax.nn.dot_product_attention(
            project("q", 1 / config.d_kv),
            project("k"),
            project("v"),
            bias=bias,
            mask=None if mask is None else mask[:, None, None, :],
            scale=1.0,
            implementation="xla",  # scores, their sum with the bias and softmax in fp32
        )
        # (B, L, H, K) -> (B, L, H K) -> (B, L, D)
        return _dense(config.d_model, self.dtype, "o")(out.reshape(*x.shape[:2], width))


class T5FeedForward(nn.Module):
    """down(gelu(gate(x)) * up(x)), with the tanh form of GELU."""

    config: T5Config
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (B, L, D) -> (B, L, D)."""
        config = self.config
        gate = nn.gelu(_dense(config.d_ff, self.dtype, "gate")(x), approximate=True)
        up = _dense(config.d_ff, self.dtype, "up")(x)
        return _dense(config.d_model, self.dtype, "down")(gate * up)


class T5Block(nn.Module):
    """Attention, then feed-forward, each after an RMS norm and added to the stream."""

    config: T5Config
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array | None, mask: jax.Array | None) -> jax.Array:
        """x (B, L, D), bias (1, H, L, L) or None where the block has its own, mask (B, L) or None."""
        config = self.config
        if not config.shared_bias:
            bias = PositionBias(config, name="position_bias")(x.shape[1])
        y = layers.RMSNorm(epsilon=config.eps, name="attn_norm")(x).astype(self.dtype)
        x = x + T5Attention(config, self.dtype, name="attn")(y, bias, mask)
        y = layers.RMSNorm(epsilon=config.eps, name="ffn_norm")(x).astype(self.dtype)
        return x + T5FeedForward(config, self.dtype, name="ffn")(y)


@dataclasses.dataclass(frozen=True)
class T5:
    """Pure functions of a parameter tree.

    Attributes:
        config: Sizes.
        dtype: Of the residual stream, the activations and the matrix products; bfloat16 is what the
            Wan2.1 reference code runs. Norms, attention scores, softmax and the output are fp32
            whatever it is, where the reference rounds all but the variance and the softmax to bfloat16.
            Parameters of another dtype are cast where they are used, one layer at a time.
        length: Rows that every prompt is padded or cut to before it is encoded, by the caller.
        padding: What the rows after a prompt become. "zeros": nothing attends to them, and they come out as
            zeros (Wan2.1). "encoded": they are tokens like the others, encoded and attended to (CogVideoX).
    """

    config: T5Config
    dtype: Any = jnp.float32
    length: int = 512
    padding: str = "zeros"

    def init(self, key: jax.Array, param_dtype: Any = jnp.float32) -> dict[str, Any]:
        """Draws parameters as the Wan2.1 reference code does."""
        config = self.config
        embedding_key, blocks_key, bias_key, norm_key = jax.random.split(key, 4)
        x = jnp.zeros((1, 1, config.d_model))
        bias = jnp.zeros((1, config.num_heads, 1, 1))

        def init_block(block_key: jax.Array) -> Params:
            return self._block.init(block_key, x, bias, None)["params"]

        params = {
            "embedding": {"embedding": jax.random.normal(embedding_key, (config.vocab_size, config.d_model))},
            "blocks": jax.vmap(init_block)(jax.random.split(blocks_key, config.num_layers)),
            "norm": self._norm.init(norm_key, x)["params"],
        }
        if config.shared_bias:
            params["position_bias"] = self._position_bias.init(bias_key, 1)["params"]
        return jax.tree.map(lambda leaf: leaf.astype(param_dtype), params)

    def __call__(self, params: Params, ids: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Encodes tokens.

        Args:
            params: The whole tree.
            ids: (B, L) integers in [0, vocab_size); a larger one turns its sample into NaN.
            mask: (B, L) bool, True on tokens, False on padding, see `padding`. None: every row is a
                token.

        Returns:
            (B, L, D) fp32, the normalised stream after the last block.

        Raises:
            ValueError: on shapes that do not fit together.
        """
        if ids.ndim != 2:
            raise ValueError(f"ids must be (B, L), got {ids.shape}")
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(f"mask must be {ids.shape} as the ids are, got {mask.shape}")
        bias = None
        if self.config.shared_bias:
            bias = self._position_bias.apply({"params": params["position_bias"]}, ids.shape[1])
        keys = None if mask is None or self.padding == "encoded" else mask.astype(bool)

        def body(x: jax.Array, block: Params) -> tuple[Any, None]:
            return self._block.apply({"params": block}, x, bias, keys), None

        x = jnp.take(params["embedding"]["embedding"], ids, axis=0).astype(self.dtype)
        x, _ = jax.lax.scan(body, x, params["blocks"])
        out: Any = self._norm.apply({"params": params["norm"]}, x)
        return out if keys is None else jnp.where(keys[..., None], out, 0)

    @property
    def _block(self) -> T5Block:
        return T5Block(self.config, self.dtype)

    @property
    def _position_bias(self) -> PositionBias:
        return PositionBias(self.config)

    @property
    def _norm(self) -> nn.Module:
        return layers.RMSNorm(epsilon=self.config.eps)


def build(
    variant: str | None = None,
    dtype: str = "float32",
    length: int = 512,
    padding: str = "zeros",
    **overrides: Any,
) -> T5:
    """Builds an encoder from a public variant, from sizes, or from a variant with some sizes changed.

    Args:
        variant: "umt5-xxl" (5.7 B parameters, 11.4 GB in bfloat16), "t5-v1.1-xxl" (4.8 B, 9.5 GB) or
            None.
        dtype: Compute dtype, "float32" or "bfloat16".
        length: See `T5`; 512 for Wan2.1, 226 for CogVideoX.
        padding: What the rows after a prompt become: "zeros" for Wan2.1, "encoded" for CogVideoX, see `T5`.
        **overrides: Fields of `T5Config`.

    Raises:
        UserError: on an unknown variant, dtype, padding or field, and on bucket counts that T5 does not
            define.
    """
    variants = {"umt5-xxl": UMT5_XXL, "t5-v1.1-xxl": T5_V1_1_XXL}
    if padding not in PADDINGS:
        raise UserError(f"unknown padding {padding!r} of texts: choose one of {', '.join(PADDINGS)}")
    config = models.configure("T5", T5Config, overrides, variant, variants)
    if config.num_buckets < 4 or config.num_buckets % 4 or config.max_distance <= config.num_buckets // 4:
        raise UserError(
            f"{config.num_buckets} position buckets up to distance {config.max_distance}: the number must be "
            f"a multiple of 4, and the distance greater than a quarter of it"
        )
    return T5(config, models.compute_dtype(dtype), length, padding)
