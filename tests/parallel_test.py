"""Meshes, sharding rules, and attention over a sharded sequence against whole attention."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prophy_jax.models import attention
from prophy_jax.run import parallel
from prophy_jax.run.errors import UserError
from tests.counting import attention_calls, equations


def mesh_of(*sizes, batch=8):
    shape = dict(zip(parallel.AXES, sizes, strict=True))
    return parallel.make_mesh(shape, batch, jax.devices())


def test_mesh_fills_the_free_axis_and_refuses_what_does_not_fit():
    assert dict(mesh_of(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "context": 2}
    for sizes in [(3, 1, 1), (-1, 3, 1), (16, 1, 1), (-1, -1, 8), (0, 1, 1), (4, 1, 1)]:
        with pytest.raises(UserError, match="does not fit 8 devices"):
            mesh_of(*sizes)
    with pytest.raises(UserError, match="12 clips at a time .*does not divide over data x fsdp = 8"):
        mesh_of(4, 2, 1, batch=12)


def test_large_leaves_are_split_on_their_largest_divisible_axis(caplog):
    shapes = {
        "kernel": (3, 128, 512),  # -> axis 2
        "odd": (256, 1027),  # -> axis 0
        "never": (331, 331),  # no axis divides: logged
        "small": (64,),
    }
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    shardings = parallel.shard_largest(tree, mesh_of(1, 8, 1))
    specs = {name: sharding.spec for name, sharding in shardings.items()}
    assert specs == {
        "kernel": jax.P(None, None, "fsdp"),
        "odd": jax.P("fsdp", None),
        "never": jax.P(),
        "small": jax.P(),
    }
    assert "never" in caplog.text and "small" not in caplog.text


def value_and_gradients(attend, *args):
    """Of self-attention, then attention to other keys, with and without a bias: q, k, v, text k, v, bias."""

    def loss(q, k, v, text_k, text_v, bias):
        outs = attend(q, k, v), attend(q, text_k, text_v), attend(q, text_k, text_v, bias)
        return sum((out.astype(jnp.float32) * jnp.cos(out + i)).sum() for i, out in enumerate(outs)), outs

    return jax.jit(jax.value_and_grad(loss, argnums=range(6), has_aux=True))(*args)


def draw(batch, length, heads, dtype=jnp.float32):
    shapes = 3 * [(batch, length, heads, 8)] + 2 * [(batch, 11, heads, 8)] + [(batch, 1, 1, 11)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize(
    ("sizes", "heads", "length"),
    [
        ((1, 1, 8), 8, 30),  # heads divide, tokens do not
        ((1, 1, 8), 12, 13),  # neither
        ((2, 2, 2), 12, 13),
        ((2, 2, 2), 3, 16),  # tokens divide, heads do not
        ((2, 1, 4), 5, 30),
        ((1, 4, 2), 12, 16),  # both
        ((8, 1, 1), 5, 13),
    ],
)
def test_attention_over_a_mesh_equals_whole_attention(sizes, heads, length):
    mesh = mesh_of(*sizes)
    args = draw(8 if sizes[0] == 8 else 4, length, heads)
    with jax.set_mesh(mesh):
        got = value_and_gradients(parallel.over_mesh(attention.attention, mesh), *args)
    expected = value_and_gradients(attention.attention, *args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        # fp32 sums in another order; the first is of some thousand terms of either sign.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_attention_over_a_mesh_in_half_precision_and_of_a_batch_that_does_not_divide():
    mesh = mesh_of(2, 1, 4)
    args = draw(3, 13, 4, jnp.bfloat16)
    with jax.set_mesh(mesh):
        got = value_and_gradients(parallel.over_mesh(attention.attention, mesh), *args)
    expected = value_and_gradients(attention.attention, *args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        # Of keys of the text, each of 4 devices rounds its share of the gradient to 8 bits.
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=0.02, atol=0.02)


def gradient_of_blocks(heads, policy="none"):
    """By the input of three scanned blocks, their weights frozen, on 2 x 1 x 4 devices; and the inputs."""
    mesh = mesh_of(2, 1, 4)
    attend = parallel.over_mesh(functools.partial(attention.attention, backend="blockwise"), mesh)

    def split(x):
        return x.reshape(*x.shape[:2], heads, -1)

    def block(x, weights):
        for context in (x, text):
            q, k, v = (split(y @ weights[name]) for name, y in (("q", x), ("k", context), ("v", context)))
            x = x + attend(q, k, v).reshape(x.shape) @ weights["o"]
        return x + jax.nn.gelu(x @ weights["up"]) @ weights["down"], None

    def loss(x, weights):
        return jax.lax.scan(attention.remat(block, policy), x, weights)[0].sum()

    x = jax.device_put(jnp.ones((2, 144, 24)), jax.NamedSharding(mesh, parallel.BATCH))
    text = jnp.ones((2, 11, 24))
    widths = {"q": (24, 24), "k": (24, 24), "v": (24, 24), "o": (24, 24), "up": (24, 56), "down": (56, 24)}
    weights = {name: jnp.ones((3, *shape)) for name, shape in widths.items()}
    return jax.grad(loss), (x, weights), mesh


@pytest.mark.parametrize(
    ("heads", "collectives"), [(4, {"all-to-all"}), (3, {"all-gather", "reduce-scatter"})]
)
def test_tokens_stay_split_over_context_between_the_attentions(heads, collectives):
    gradient, inputs, mesh = gradient_of_blocks(heads)
    with jax.set_mesh(mesh):
        text = jax.jit(gradient).lower(*inputs).compile().as_text()
    kinds = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
    assert set(re.findall(rf" ({kinds})(?:-start)?\(", text)) == collectives
    # Of 2 x 144 tokens, the MLP of one device sees a quarter of one sample's.
    assert set(re.findall(r"f32\[([\d,]*),56\]\S* dot\(", text)) == {"36"}


@pytest.mark.parametrize(("policy", "exchanges"), [("none", 8), ("qkv", 8), ("attention", 12), ("full", 12)])
def test_remat_repeats_exchanges_unless_it_keeps_what_they_bring(policy, exchanges):
    gradient, inputs, mesh = gradient_of_blocks(4, policy)
    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(gradient)(*inputs)
    # Of q, k, v and the output, forward and backward, in each of three blocks.
    assert sum(n for eqn, n in equations(jaxpr) if eqn.primitive.name == "all_to_all") == 3 * exchanges
    assert attention_calls(jaxpr)["forward", 144] == (6 if policy == "full" else 3)


def test_an_axis_of_one_device_costs_no_reduction():
    mesh = mesh_of(8, 1, 1)
    run = functools.partial(value_and_gradients, parallel.over_mesh(attention.attention, mesh))
    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(run)(*draw(8, 13, 4))
    assert not [eqn for eqn, _ in equations(jaxpr) if eqn.primitive.name.startswith("psum")]


def test_batches_are_split_over_data_and_fsdp():
    batch = parallel.put_batch({"x": np.arange(16.0).reshape(8, 2)}, mesh_of(2, 2, 2))
    assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(batch["x"], np.arange(16.0).reshape(8, 2))
    odd = parallel.put_batch({"x": np.arange(3.0)}, mesh_of(2, 2, 2))["x"]
    assert odd.sharding.is_fully_replicated
    np.testing.assert_array_equal(odd, np.arange(3.0))
