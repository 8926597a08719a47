"""Attention by platform, and what the backward pass recomputes of it.

Legend: B batch, N query tokens, M key tokens, H heads, D head width.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from prophy_jax.run.errors import UserError

BACKENDS = ("xla", "blockwise", "cudnn", "splash")

# Rows of queries at a time: on a CPU 256 is within 5 % of the best of 64, 128, 256 and 512 from 256 to 16,384
# tokens, and their scores against 32,760 keys are 34 MB.
BLOCK = 256
# Heads of at most this many scores are faster as one softmax: XLA's takes 0.7 of the time at 48 x 48,
# as much at 64 x 64, and 1.1 at 144 x 52.
FEW_SCORES = 64 * 64


def choose(backend: str, platform: str, dtype: Any) -> str:
    """The backend that `config.attention` names; "auto" is the one for the platform and dtype.

    Args:
        backend: "auto" or one of BACKENDS.
        platform: Of the devices: "cpu", "gpu" or "tpu".
        dtype: Of queries, keys and values.

    Raises:
        UserError: on an unknown backend, or one that this platform and dtype do not have.
    """
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    own = {"gpu": "cudnn", "tpu": "splash"}.get(platform, "blockwise") if half else "blockwise"
    possible = ("auto", "xla", "blockwise") + (() if own == "blockwise" else (own,))
    if backend not in possible:
        why = (
            "there is no such backend"
            if backend not in BACKENDS
            else "cudnn is for GPUs, splash for TPUs, both in half precision"
        )
        raise UserError(
            f"config.attention={backend!r} on a {platform} in {jnp.dtype(dtype).name}: {why}; "
            f"choose one of {', '.join(possible)}"
        )
    return own if backend == "auto" else backend


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None, *, backend: str = "xla"
) -> jax.Array:
    """softmax(q k^T / sqrt(D) + bias) v, softmax in fp32.

    Args:
        q: (B, N, H, D).
        k: (B, M, H, D).
        v: (B, M, H, D).
        bias: (B, 1, 1, M) or None. cudnn and splash know none: with one, blockwise takes their place.
        backend: One of BACKENDS; all but "xla" need memory in O(N + M). "xla" holds all N x M scores, and
            "blockwise" does where they are few.

    Returns:
        (B, N, H, D) in the dtype of q.
    """
    if backend in ("cudnn", "splash") and bias is None:
        if backend == "splash":
            return splash(q, k, v)
        # Never with a mask: cuDNN makes rows without a key NaN.
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    if backend != "xla" and q.shape[1] * k.shape[1] > FEW_SCORES:
        return blockwise(q, k, v, bias)
    out = jax.nn.dot_product_attention(q, k, v, bias=bias, implementation="xla")
    return checkpoint_name(out, _kind(q, k))


def _kind(q: Any, k: Any) -> str:
    """The name under which remat policies keep what attention of q (B, N, H, D) over k (B, M, H, D) made."""
    return "self_attention" if q.shape[1] <= k.shape[1] else "cross_attention"  # few rows of text


# --- Blockwise: exact, in memory of O(N + M) ---------------------------------------------------------
#
# One head at a time, and of it one block of queries at a time against all keys, in plain products of two
# matrices: what XLA compiles best for a CPU. The backward pass works on transposed scores, k q^T, so that
# no product has a transposed left side, which runs at a third of the speed there.

_dot = functools.partial(jnp.dot, precision="highest")  # a GPU would round fp32 to TF32


@jax.custom_vjp
def blockwise(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    """`attention` in fp32 whatever the dtype of q (B, N, H, D), with gradients of all arguments."""
    return attention_forward(q, k, v, bias)[0]


def _blockwise_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, tuple[Any, ...]]:
    out, lse = attention_forward(q, k, v, bias)
    # Both need the name: with one of them missing, jax.checkpoint would run the forward pass again for it.
    out, lse = checkpoint_name(out, _kind(q, k)), checkpoint_name(lse, _kind(q, k))
    return out, (q, k, v, bias, out, lse)


def _blockwise_backward(residuals: tuple[Any, ...], d_out: jax.Array) -> tuple[Any, ...]:
    return attention_backward(*residuals, d_out)


blockwise.defvjp(_blockwise_forward, _blockwise_backward)


# Compiled functions, because their names then stand in the jaxpr, where tests count them.
@jax.jit
def attention_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns attention (B, N, H, D) and the log of the sums of exponentials (B H, N) fp32."""

    def head(args: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        q, k, v, bias = _to_float32(args)
        k_t = k.T

        def block(q: jax.Array) -> tuple[jax.Array, jax.Array]:
            s = _dot(q, k_t) if bias is None else _dot(q, k_t) + bias
            top = s.max(axis=1, keepdims=True)
            p = jnp.exp(s - top)
            total = p.sum(axis=1, keepdims=True)
            return _dot(p, v) / total, (top + jnp.log(total))[:, 0]

        out, lse = lax.map(block, _blocks(q * q.shape[1] ** -0.5))
        return _rows(out, len(q)).astype(dtype), _rows(lse, len(q))

    dtype = q.dtype
    out, lse = lax.map(head, (_heads(q), _heads(k), _heads(v), _bias_rows(bias, q.shape[2])))
    return _tokens(out, q), lse


@jax.jit
def attention_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Gradients of q, k, v and bias."""

    def head(args: tuple[Any, ...]) -> tuple[Any, ...]:
        q, k, v, bias, out, lse, d_out = _to_float32(args)
        k_t = k.T
        delta = (out * d_out).sum(axis=1)  # (N,)
        scaled = q * q.shape[1] ** -0.5

        def block(sums: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[tuple[Any, ...], jax.Array]:
            d_k, d_v, d_bias = sums
            q, d_out, lse, delta = args
            s_t = _dot(k, q.T) if bias is None else _dot(k, q.T) + bias[:, None]
            p_t = jnp.exp(s_t - lse)
            d_s_t = p_t * (_dot(v, d_out.T) - delta)
            d_bias = None if bias is None else d_bias + d_s_t.sum(axis=1)
            return (d_k + _dot(d_s_t, q), d_v + _dot(p_t, d_out), d_bias), _dot(k_t, d_s_t).T

        zero: Any = tuple(None if x is None else jnp.zeros_like(x) for x in (k, v, bias))
        # Rows of padding have an infinite sum, so that they give no weight to any key.
        blocks = (_blocks(scaled), _blocks(d_out), _blocks(lse, math.inf), _blocks(delta))
        (d_k, d_v, d_bias), d_q = lax.scan(block, zero, blocks)
        d_q = _rows(d_q, len(q)) * q.shape[1] ** -0.5
        return d_q.astype(dtype), d_k.astype(dtype), d_v.astype(dtype), d_bias

    dtype = q.dtype
    heads = (_heads(q), _heads(k), _heads(v), _bias_rows(bias, q.shape[2]), _heads(out), lse, _heads(d_out))
    d_q, d_k, d_v, d_bias = lax.map(head, heads)
    if bias is not None:
        # (B H, M) -> (B, 1, 1, M)
        d_bias = d_bias.reshape(len(bias), 1, -1, bias.shape[-1]).sum(axis=2, keepdims=True)
        d_bias = d_bias.astype(bias.dtype)
    return _tokens(d_q, q), _tokens(d_k, k), _tokens(d_v, v), d_bias


def _to_float32(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(None if x is None else x.astype(jnp.float32) for x in arrays)


def _heads(x: jax.Array) -> jax.Array:
    # (B, N, H, D) -> (B H, N, D)
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _tokens(x: jax.Array, like: jax.Array) -> jax.Array:
    # (B H, N, D) -> (B, N, H, D)
    batch, length, heads, width = like.shape
    return x.reshape(batch, heads, length, width).swapaxes(1, 2)


def _bias_rows(bias: jax.Array | None, heads: int) -> jax.Array | None:
    # (B, 1, 1, M) -> (B H, M)
    return None if bias is None else jnp.repeat(bias[:, 0, 0], heads, axis=0)


def _blocks(rows: jax.Array, fill: float = 0.0) -> jax.Array:
    # (N, ...) -> (blocks, rows, ...): equal blocks of at most BLOCK rows, filled up at the end
    count = -(-len(rows) // BLOCK)
    size = -(-len(rows) // count)
    padding = [(0, count * size - len(rows))] + [(0, 0)] * (rows.ndim - 1)
    return jnp.pad(rows, padding, constant_values=fill).reshape(count, size, *rows.shape[1:])


def _rows(blocks: jax.Array, length: int) -> jax.Array:
    return blocks.reshape(-1, *blocks.shape[2:])[:length]


# --- Splash: the Pallas kernel for TPUs ---------------------------------------------------------------


def splash(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool = False) -> jax.Array:
    """`attention` without a bias, on a TPU; with `interpret` anywhere, slowly."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels  # for TPUs alone

    rows, keys = q.shape[1], k.shape[1]
    block_q, block_kv = _splash_block(rows), _splash_block(keys)
    compute = block_kv // 2 if block_kv > 512 else block_kv
    sizes = kernels.BlockSizes(
        **dict[str, Any](block_q=block_q, block_kv=block_kv, block_kv_compute=compute),
        **dict[str, Any](block_q_dkv=block_q, block_kv_dkv=block_kv, block_kv_dkv_compute=compute),
        **dict[str, Any](block_q_dq=block_q, block_kv_dq=block_kv),
    )

    def whole_blocks(x: jax.Array, block: int) -> jax.Array:
        # (B, N, H, D) -> (B H, N in whole blocks, D): samples and heads are alike to the kernel
        return jnp.pad(_heads(x), [(0, 0), (0, -x.shape[1] % block), (0, 0)])

    # The kernel does not scale the scores.
    arrays = [whole_blocks(q * q.shape[3] ** -0.5, block_q), *(whole_blocks(x, block_kv) for x in (k, v))]
    heads, padded_rows, _ = arrays[0].shape
    padded_keys = arrays[1].shape[1]
    kernel = kernels.make_splash_mha_single_device(
        kernels.MultiHeadMask([kernels.FullMask((padded_rows, padded_keys))] * heads),
        block_sizes=sizes,
        residual_checkpoint_name=_kind(q, k),  # of the output and of the log of the sums
        interpret=interpret,
    )
    segments = None
    if padded_keys > keys:
        # Queries see the keys of their own segment; the padding is another.
        of_keys = (jnp.arange(padded_keys) >= keys).astype(jnp.int32)
        segments = kernels.SegmentIds(jnp.zeros(padded_rows, jnp.int32), of_keys)
    return _tokens(kernel(*arrays, segments)[:, :rows], q)


def _splash_block(length: int) -> int:
    # Equal blocks of at most 1024 rows, in whole lanes of 128: two of them where a block is halved.
    count = -(-length // 1024)
    lanes = 256 if length > 512 else 128
    return -(-length // (count * lanes)) * lanes


# --- Remat -------------------------------------------------------------------------------------------


def _save(*names: str) -> Callable:
    # The cuDNN backward pass needs the softmax statistics too. No name reaches them, so the policy asks for
    # every output of the primitive; otherwise the kernel would run a second time.
    def is_fused(primitive: Any, *avals: Any, **_: Any) -> bool:
        return primitive.name.startswith("dot_product_attention_fwd") and _kind(*avals[:2]) in names

    named = jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint_policies.save_from_both_policies(named, is_fused)


_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "self_attention": _save("self_attention"),
    "attention": _save("self_attention", "cross_attention"),
    "qkv": _save("self_attention", "cross_attention", "qkv"),
    "products": _save("self_attention", "cross_attention", "qkv", "products"),
}


def remat(function: Callable, name: str, repeated: bool = True) -> Callable:
    """Wraps the body of a scan over blocks so that the backward pass recomputes it.

    Args:
        function: The body.
        name: What is kept. "full": only the input of each block; "self_attention": also the output of
            self-attention and its softmax statistics, so that it does not run twice; "attention": those of
            cross-attention too; "qkv": also queries, keys and values; "products": what every matrix product
            makes, so that only elementwise work runs again; "none": every activation, much of it in fp32.
        repeated: Whether the scan is of more than one step. Compilers unroll the others, where they would
            merge the recomputation with the original, and keep it all, but for a barrier.

    Raises:
        UserError: on another name.
    """
    if name == "none":
        return function
    if name not in _POLICIES:
        choices = ", ".join(["none", *_POLICIES])
        raise UserError(f"unknown remat policy {name!r}: choose one of {choices}")
    return jax.checkpoint(function, policy=_POLICIES[name], prevent_cse=not repeated)
