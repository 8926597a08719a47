"""Attention: every backend against XLA's, memory, and how often each remat policy runs it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from prophy_jax.models import attention
from prophy_jax.plan import hardware
from prophy_jax.run.errors import UserError
from tests.counting import attention_calls

xla = functools.partial(attention.attention, backend="xla")


def draw(batch, rows, keys, heads, width, dtype=jnp.float32):
    """q, k, v and a cotangent of the output."""
    shapes = [(batch, n, heads, width) for n in (rows, keys, keys, rows)]
    return [
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(jax.random.split(jax.random.key(0), 4), shapes, strict=True)
    ]


def value_and_gradients(function, d_out, *args):
    out, pull = jax.vjp(jax.jit(function), *args)
    return out, *pull(d_out)


# fp32 sums of up to a few hundred terms of order 1, in another order: measured 3e-6.
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("batch", "rows", "keys", "heads", "width"),
    [
        (2, 70, 130, 3, 16),  # one block
        (1, 300, 300, 2, 8),  # two
        (1, 515, 515, 1, 32),  # three of 172, the last row of them padding
        (2, 521, 33, 1, 24),
        (1, 1, 5, 2, 4),
    ],
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_blockwise_equals_xla_in_value_and_gradients(batch, rows, keys, heads, width, with_bias):
    q, k, v, d_out = draw(batch, rows, keys, heads, width)
    if not with_bias:
        got = value_and_gradients(lambda *args: attention.blockwise(*args, None), d_out, q, k, v)
        expected = value_and_gradients(xla, d_out, q, k, v)
    else:
        bias = 3 * jax.random.normal(jax.random.key(1), (batch, 1, 1, keys))
        bias = bias.at[..., -1].set(-jnp.inf)
        got = value_and_gradients(attention.blockwise, d_out, q, k, v, bias)
        expected = value_and_gradients(xla, d_out, q, k, v, bias)
    jax.tree.map(close, got, expected)


def test_blockwise_computes_half_precision_in_fp32():
    q, k, v, d_out = draw(1, 300, 90, 2, 16, jnp.bfloat16)
    got = value_and_gradients(lambda *args: attention.blockwise(*args, None), d_out, q, k, v)
    assert all(x.dtype == jnp.bfloat16 for x in got)
    expected = value_and_gradients(xla, *(x.astype(jnp.float32) for x in (d_out, q, k, v)))
    for a, b in zip(got, expected, strict=True):
        # Rounded to 8 bits: the result, and before that the output that the gradient is computed from.
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize(
    ("batch", "rows", "keys", "heads", "width"),
    [(2, 130, 70, 2, 64), (1, 600, 1100, 1, 128)],  # padded queries and keys; keys in two blocks, halved
)
def test_splash_equals_xla_in_value_and_gradients(batch, rows, keys, heads, width):
    q, k, v, d_out = draw(batch, rows, keys, heads, width)
    got = value_and_gradients(functools.partial(attention.splash, interpret=True), d_out, q, k, v)
    jax.tree.map(close, got, value_and_gradients(xla, d_out, q, k, v))


def test_splash_compiles_for_a_tpu():
    pytest.importorskip("libtpu", reason="no TPU compiler: pip install libtpu, as jax[tpu] does")
    device = hardware.get_devices(hardware.CHIPS["v5p"], "v5p:2x2x1", (2, 2, 1))[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    assert attention.choose("auto", device.platform, jnp.bfloat16) == "splash"
    x = jax.ShapeDtypeStruct((1, 32760, 12, 128), jnp.bfloat16, sharding=sharding)

    def loss(q, k, v):
        return attention.attention(q, k, v, backend="splash").astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3  # forward, dq, dk and dv
    # One head's scores alone are 4.3 GB. The compilers of jax 0.10 and 0.12 say 0.8 and 1.1.
    assert compiled.memory_analysis().temp_size_in_bytes < 1.2e9


def test_memory_of_blockwise_is_linear_in_tokens():
    def temporaries(tokens):
        x = jax.ShapeDtypeStruct((1, tokens, 12, 128), jnp.float32)  # Wan2.1-1.3B at 480 x 832
        loss = jax.value_and_grad(
            lambda *args: attention.attention(*args, backend="blockwise").sum(), argnums=(0, 1, 2)
        )
        return jax.jit(loss).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    frames_41, frames_81 = temporaries(17160), temporaries(32760)
    # Copies of q, k, v, the output, and so on, of 201 MB each; the scores would be 51,514 MB.
    assert frames_81 < 7 * 32760 * 12 * 128 * 4
    np.testing.assert_allclose(frames_81 / frames_41, 32760 / 17160, rtol=0.01)


def test_few_scores_and_biases_take_the_backend_that_has_them():
    def forwards(rows, backend, with_bias=False):
        bias = jnp.zeros((1, 1, 1, 64)) if with_bias else None
        q, k, v, _ = draw(1, rows, 64, 1, 8)
        run = functools.partial(attention.attention, backend=backend)
        return attention_calls(jax.make_jaxpr(run)(q, k, v, bias))

    assert forwards(64, "blockwise") == {}
    assert forwards(65, "blockwise") == {("forward", 64): 1}
    assert forwards(65, "xla") == {}
    for backend in ("cudnn", "splash"):
        assert forwards(65, backend, with_bias=True) == {("forward", 64): 1}


@pytest.mark.parametrize(
    ("platform", "dtype", "backend"),
    [
        ("cpu", "float32", "blockwise"),
        ("cpu", "bfloat16", "blockwise"),
        ("gpu", "bfloat16", "cudnn"),
        ("gpu", "float16", "cudnn"),
        ("gpu", "float32", "blockwise"),
        ("tpu", "bfloat16", "splash"),
        ("tpu", "float32", "blockwise"),
    ],
)
def test_the_platform_and_dtype_choose_the_backend(platform, dtype, backend):
    assert attention.choose("auto", platform, dtype) == backend
    for possible in {backend, "xla", "blockwise"}:
        assert attention.choose(possible, platform, dtype) == possible
    for other in {"cudnn", "splash"} - {backend}:
        with pytest.raises(UserError, match=f"'{other}' on a {platform} in {dtype}.*auto, xla, blockwise"):
            attention.choose(other, platform, dtype)
    with pytest.raises(UserError, match="no such backend; choose one of auto, xla, blockwise"):
        attention.choose("flash", platform, dtype)


def jaxpr_of_gradient(backend, policy, layers=3, tokens=256, text=128, width=128):
    """Of a scan over blocks of self- and cross-attention, by all its inputs."""
    run = functools.partial(attention.attention, backend=backend)

    def heads(x):
        return x.reshape(*x.shape[:2], -1, 64)

    def block(x, weight):
        for context in (x, inputs[2]):
            out = run(heads(x @ weight), heads(context @ weight), heads(context))
            x = x + out.reshape(x.shape) @ weight
        return x, None

    def loss(x, weights, text):
        inputs[2] = text
        return jax.lax.scan(attention.remat(block, policy), x, weights)[0].astype(jnp.float32).sum()

    shapes = [(1, tokens, width), (layers, width, width), (1, text, width)]
    inputs = [jnp.ones(shape, jnp.bfloat16) for shape in shapes]
    return jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*inputs)


@pytest.mark.parametrize("backend", ["blockwise", "splash", "cudnn"])
@pytest.mark.parametrize(
    ("policy", "forwards", "text_forwards"),
    [("none", 3, 3), ("attention", 3, 3), ("qkv", 3, 3), ("self_attention", 3, 6), ("full", 6, 6)],
)
def test_attention_runs_again_in_the_backward_pass_only_where_remat_says_so(
    backend, policy, forwards, text_forwards, monkeypatch
):
    # Tracing asks for a GPU and its cuDNN; the trace itself needs neither.
    for check in ("check_cudnn_version", "check_compute_capability", "check_is_flash_attention"):
        monkeypatch.setattr(cudnn, check, lambda *_, **__: 90000)
    calls = attention_calls(jaxpr_of_gradient(backend, policy))
    assert calls == {
        ("forward", 256): forwards,
        ("backward", 256): 3,
        ("forward", 128): text_forwards,
        ("backward", 128): 3,
    }


def test_an_unknown_remat_policy_is_refused():
    with pytest.raises(UserError, match="none, full, self_attention, attention, qkv, products"):
        attention.remat(len, "half")
