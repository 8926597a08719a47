"""The mesh, the sharding rules, and attention over a sharded sequence.

Axes: `data` splits the batch; `fsdp` splits the batch and the trained parameters; `context` splits the
tokens of one clip. The mesh is automatic: the compiler places the collectives, except around attention.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from prophy_jax.errors import UserError

AXES = ("data", "fsdp", "context")
BATCH = PartitionSpec(("data", "fsdp"))
MIN_SHARDED_SIZE = 2**16  # smaller parameters are copied to every device: a gather would cost more

log = logging.getLogger(__name__)


def make_mesh(shape: Mapping[str, int], batch_size: int, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh over `devices`, all of them. One axis may be -1: what is left.

    Raises UserError when the shape does not cover the devices or does not divide the batch.
    """
    sizes, count = [shape[axis] for axis in AXES], len(devices)
    if sizes.count(-1) == 1 and count % -math.prod(sizes) == 0:
        sizes[sizes.index(-1)] = count // -math.prod(sizes)
    if min(sizes) < 1 or math.prod(sizes) != count:
        raise UserError(f"mesh={dict(shape)} does not fit {count} devices: mend config.mesh")
    if batch_size % (sizes[0] * sizes[1]):
        raise UserError(
            f"batch of {batch_size} does not divide over data x fsdp = {sizes[0] * sizes[1]}: "
            "mend config.batch_size, config.accumulation or config.mesh"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def shard_largest(tree: Any, mesh: Mesh) -> Any:
    """NamedShardings of a tree: each large leaf split over `fsdp` on its largest divisible axis.

    Leaves below MIN_SHARDED_SIZE are replicated. Large leaves with no divisible axis are replicated too,
    and logged.
    """
    size = mesh.shape["fsdp"]

    def rule(path, leaf) -> NamedSharding:
        if size == 1 or leaf.size < MIN_SHARDED_SIZE:
            return replicated(mesh)
        for axis in np.argsort(leaf.shape)[::-1]:
            if leaf.shape[axis] % size == 0:
                spec = [None] * leaf.ndim
                spec[axis] = "fsdp"
                return NamedSharding(mesh, PartitionSpec(*spec))
        log.warning("not sharded: %s %s", jax.tree_util.keystr(path), leaf.shape)
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(rule, tree)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows -> global arrays split over data and fsdp on their leading axis.

    Rows that do not divide, the end of a validation split, are placed whole on every device.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]

    def put(rows: np.ndarray) -> jax.Array:
        divides = len(rows) * jax.process_count() % ways == 0
        sharding = NamedSharding(mesh, BATCH if divides else PartitionSpec())
        return jax.make_array_from_process_local_data(sharding, rows)

    return {name: put(np.asarray(rows)) for name, rows in batch.items()}


def full_precision(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch as it is computed with: latents, texts and labels are stored as float16, and become float32."""
    return {
        name: value.astype(np.float32) if np.issubdtype(value.dtype, np.floating) else value
        for name, value in batch.items()
    }


def over_context(attention: Callable, mesh: Mesh) -> Callable:
    """Wraps `attention(q, k, v, bias)` so that each device along `context` computes its share of the queries.

    Keys and values are gathered whole, so values and gradients are those of unsharded attention. Queries
    are padded to a multiple of the axis and the padding is cut off again.
    """
    ways = mesh.shape["context"]
    if ways == 1:
        return attention
    sharded = jax.shard_map(
        attention,
        mesh=mesh,
        in_specs=(PartitionSpec(None, "context"), PartitionSpec(), PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(None, "context"),
        axis_names={"context"},
    )

    def wrapped(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        length = q.shape[1]
        padded = jnp.pad(q, ((0, 0), (0, -length % ways), (0, 0), (0, 0)))
        return sharded(padded, k, v, bias)[:, :length]

    return wrapped
