"""Meshes, sharding rules, and attention over a sharded sequence against whole attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prophy_jax import parallel
from prophy_jax.errors import UserError
from prophy_jax.models import layers


def mesh_of(*sizes, batch=8):
    shape = dict(zip(parallel.AXES, sizes, strict=True))
    return parallel.make_mesh(shape, batch, jax.devices())


def test_mesh_fills_the_free_axis_and_refuses_what_does_not_fit():
    assert dict(mesh_of(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "context": 2}
    for sizes in [(3, 1, 1), (-1, 3, 1), (16, 1, 1), (-1, -1, 8), (0, 1, 1), (4, 1, 1)]:
        with pytest.raises(UserError, match="does not fit 8 devices"):
            mesh_of(*sizes)
    with pytest.raises(UserError, match="does not divide over data x fsdp = 8"):
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


@pytest.mark.parametrize("sizes", [(1, 1, 8), (2, 2, 2), (2, 1, 4)])
@pytest.mark.parametrize("queries", [16, 13])  # 13: padded
def test_attention_over_context_equals_whole_attention(sizes, queries):
    mesh = mesh_of(*sizes)
    sharded = parallel.over_context(layers.attention, mesh)
    keys = jax.random.split(jax.random.key(0), 4)
    q, weight = (jax.random.normal(k, (4, queries, 3, 8)) for k in keys[:2])
    k, v = (jax.random.normal(k, (4, 11, 3, 8)) for k in keys[2:])

    def value_and_gradients(attention):
        return jax.jit(
            jax.value_and_grad(lambda *args: (attention(*args) * weight).sum(), argnums=(0, 1, 2))
        )(q, k, v)

    with jax.set_mesh(mesh):
        got = value_and_gradients(sharded)
    expected = value_and_gradients(layers.attention)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # fp32 sums in another order


def test_batches_are_split_over_data_and_fsdp():
    batch = parallel.put_batch({"x": np.arange(16.0).reshape(8, 2)}, mesh_of(2, 2, 2))
    assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(batch["x"], np.arange(16.0).reshape(8, 2))
    odd = parallel.put_batch({"x": np.arange(3.0)}, mesh_of(2, 2, 2))["x"]
    assert odd.sharding.is_fully_replicated
    np.testing.assert_array_equal(odd, np.arange(3.0))
