"""The mesh, the sharding rules, and attention over a sharded sequence.

Axes: `data` splits the batch; `fsdp` splits the batch and the trained parameters; `context` splits the
tokens of one clip. The mesh is automatic: the compiler places the collectives, except around attention.

Legend: B batch, N tokens, H heads, D head width; b samples of one device.
"""

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from prophy_jax.run.errors import UserError, counted

AXES = ("data", "fsdp", "context")
BATCH = PartitionSpec(("data", "fsdp"))
MIN_SHARDED_SIZE = 2**16  # smaller parameters are copied to every device: a gather would cost more

log = logging.getLogger(__name__)


def make_mesh(shape: Mapping[str, int], batch_size: int, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh over `devices`, all of them. One axis may be -1: what is left.

    Over several TPU slices, `data` alone crosses from one to another: the network between them is slow.
    Raises UserError when the shape does not cover the devices or does not divide the batch.
    """
    sizes, count = [shape[axis] for axis in AXES], len(devices)
    if sizes.count(-1) == 1 and count % -math.prod(sizes) == 0:
        sizes[sizes.index(-1)] = count // -math.prod(sizes)
    if min(sizes) < 1 or math.prod(sizes) != count:
        raise UserError(f"mesh={dict(shape)} does not fit {counted(count, 'device')}: fix config.mesh")
    if batch_size % (sizes[0] * sizes[1]):
        raise UserError(
            f"a batch of {counted(batch_size, 'clip')} at a time (config.batch_size / config.accumulation) "
            f"does not divide over data x fsdp = {sizes[0] * sizes[1]}: lower config.accumulation, raise "
            "config.batch_size or change config.mesh"
        )
    # `jax.make_mesh` refuses an axis of 8 on a torus of 4x4x4 or 16x16.
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) or 1
    if slices == 1:
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        if sizes[0] % slices:
            raise UserError(
                f"mesh.data={sizes[0]} does not divide over {slices} TPU slices, and this axis alone crosses "
                "from one to another: fix config.mesh"
            )
        placed = mesh_utils.create_hybrid_device_mesh(
            (sizes[0] // slices, *sizes[1:]), (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def placed(tree: Any, shardings: Any, dtype: Any = None) -> Any:
    """A tree of arrays, or of their shapes, as abstract arrays with places; in their own dtypes, or one."""

    def describe(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if dtype is None else dtype, sharding=sharding)

    return jax.tree.map(describe, tree, shardings)


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


def gathered(tree: Any) -> Any:
    """Every leaf whole on each device of the current mesh: how trained parameters enter a step.

    Without this, the compiler would split activations over the width as the parameters are, and send them.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec())


def batch_sharding(mesh: Mesh, size: int) -> NamedSharding:
    """Splits rows over data and fsdp; a batch that does not divide is whole on every device."""
    divides = size % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
    return NamedSharding(mesh, BATCH if divides else PartitionSpec())


def local_rows(mesh: Mesh, size: int) -> np.ndarray:
    """The rows of a batch of `size` that the devices of this process hold, in order."""
    held = batch_sharding(mesh, size).addressable_devices_indices_map((size,)).values()
    return np.unique([np.arange(size)[rows] for rows in held])


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, size: int | None = None) -> dict[str, jax.Array]:
    """Host arrays -> global arrays, laid out by `batch_sharding`.

    They are the whole batch, equal on every process; or, when `size` says how large it is, the `local_rows`.
    """

    def put(rows: np.ndarray) -> jax.Array:
        shape = (len(rows) if size is None else size, *rows.shape[1:])
        return jax.make_array_from_process_local_data(batch_sharding(mesh, shape[0]), rows, shape)

    return {name: put(np.asarray(rows)) for name, rows in batch.items()}


def full_precision(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Turns what is stored as float16 (latents, texts and labels) into float32."""
    return {
        name: value.astype(np.float32) if np.issubdtype(value.dtype, np.floating) else value
        for name, value in batch.items()
    }


def over_mesh(attention: Callable, mesh: Mesh) -> Callable:
    """Wraps `attention(q, k, v, bias)` so that every device computes its share; values and gradients stay.

    Each device gets its samples (of data x fsdp, where the batch divides) and its share of the queries
    (of context). Where the keys are as many as the queries and have no bias, they are split like them:
    heads are exchanged for tokens, so that each device attends with some heads over all tokens (Ulysses,
    arXiv:2309.14509); where the heads do not divide over context, keys and values are gathered instead.
    Other keys, those of the text, are whole on each device and cost no communication.

    Args:
        attention: See `prophy_jax.models.attention`. It runs on one device's arrays: the compiler could not
            split its kernels.
        mesh: Any. Lengths that context does not divide are padded; `attention` never sees the padding.
    """
    if mesh.size == 1:
        return attention
    ways, samples = mesh.shape["context"], mesh.shape["data"] * mesh.shape["fsdp"]
    kept = functools.partial(checkpoint_name, name="qkv")  # the remat policy of this name repeats no exchange

    def wrapped(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        batch, length, heads, _ = q.shape
        split_keys = ways > 1 and k.shape[1] == length and bias is None

        def on_device(q, k, v, bias):
            if split_keys and heads % ways == 0:
                # (b, N/ways, H, D) -> (b, N, H/ways, D)
                exchange = functools.partial(jax.lax.all_to_all, axis_name="context", tiled=True)
                q, k, v = (kept(exchange(x, split_axis=2, concat_axis=1)[:, :length]) for x in (q, k, v))
                return kept(exchange(_pad(attention(q, k, v), ways), split_axis=1, concat_axis=2))
            if split_keys:
                gather = functools.partial(jax.lax.all_gather, axis_name="context", axis=1, tiled=True)
                k, v = (kept(gather(x)[:, :length]) for x in (k, v))
            return attention(q, k, v, bias)

        whole = BATCH if batch % samples == 0 else PartitionSpec(None)
        tokens = PartitionSpec(*whole, "context")
        # An axis of one device is named in any case: one that is not would be reduced over in the gradient.
        keys = tokens if split_keys or ways == 1 else whole
        sharded = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(tokens, keys, keys, keys),
            out_specs=tokens,
            check_vma=False,  # which axes a value varies over: Pallas and cuDNN kernels do not say
        )
        if split_keys:
            k, v = _pad(k, ways), _pad(v, ways)
        return sharded(_pad(q, ways), k, v, bias)[:, :length]

    return wrapped


def _pad(tokens: jax.Array, ways: int) -> jax.Array:
    # (B, N, H, D) -> (B, N rounded up to a multiple of ways, H, D)
    padding = -tokens.shape[1] % ways
    return jnp.pad(tokens, ((0, 0), (0, padding), (0, 0), (0, 0))) if padding else tokens
