"""Orbax behind one small file: training checkpoints that resume, and parameter trees on disk.

A training checkpoint holds the train state (trainable parameters, EMA, optimizer, step), the position of
the data iterator and the configuration. The frozen backbone is not copied into it: the configuration
names it, and its hash is checked.

A parameter tree is a folder with an Orbax tree and `manifest.json` (hash, shapes, where it came from). The
parameters in a training checkpoint can be read as if they were one, WORKDIR/checkpoints/N/ema/PART or
.../params/PART.

Both have checksums of their files, which are compared while they are loaded.
"""

import contextlib
import functools
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from prophy_jax.run import checksums, distributed, parallel, storage
from prophy_jax.run.errors import UserError
from prophy_jax.run.workdir import read_json, read_run

SLICE_BYTES = 2**24
CHECKSUMS = "checksums.json"  # of a training checkpoint
# What the values of a manifest are that are read again; see `workdir.parse_json`.
_MANIFEST = {
    **{key: str for key in ("sha256", "part", "backbone_sha256")},
    "shapes": {str: ([int], str)},
    "files": dict,
    "model": dict,
    "categories": [str],
}
_DAMAGE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
)  # Orbax raises them on damaged files


@functools.cache
def _cut_large_arrays_only() -> None:
    """Lets the replicas of an array write a slice of it each only where slices have SLICE_BYTES or more.

    Cutting smaller ones costs more than it saves, since every cut is a program to compile.
    """
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SLICE_BYTES)
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        return False  # the train loop asks JAX itself, with another count of its steps


class TrainCheckpoints:
    """Asynchronous, atomic checkpoints under WORKDIR/checkpoints, one folder per step.

    All processes of a job call the same methods. A checkpoint does not tell how many there were.
    """

    def __init__(self, workdir: str, keep: int):
        _cut_large_arrays_only()
        self.folder = os.path.join(storage.absolute(workdir), "checkpoints")
        if distributed.is_first():  # a process that was killed may have removed half of an old one
            saved = (path for path in storage.path(self.folder).glob("*") if path.name.isdigit())
            for path in sorted(saved, key=lambda path: int(path.name))[:-keep]:
                storage.remove(path)
        self._saving = 0
        self._wait = ocp.multihost.get_barrier_sync_fn()
        self._manager = _Manager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(
                    barrier_sync_fn=self._hash_and_wait, post_finalization_callback=self._write_checksums
                ),
            ),
            item_names=("state", "data", "config"),
        )

    def _written(self) -> str:
        """The folder of the checkpoint that is being written, before it gets its final name or mark."""
        folder = os.path.join(self.folder, str(self._saving))
        if storage.in_bucket(folder):
            return folder
        return max(
            [*glob.glob(glob.escape(folder)), *glob.glob(f"{glob.escape(folder)}.*")], key=os.path.getmtime
        )

    def _hash_and_wait(self, *, key: str, timeout_ms: int) -> None:
        """A barrier of Orbax's. Before the one after writing, each process hashes the arrays that it wrote.

        They are in its memory still; the first process would read all of them from the storage.
        """
        on_disk = not storage.in_bucket(self.folder)  # buckets know the hashes of what they hold
        if "async_write_complete" in key and jax.process_count() > 1 and on_disk:
            with contextlib.suppress(OSError, ValueError):  # the first process hashes what is not known
                folder, process = self._written(), jax.process_index()
                own = f"ocdbt.process_{process}/d"  # files that nobody writes again
                (place,) = glob.glob(os.path.join(glob.escape(folder), "state*", own))  # it has no name yet
                listed = {f"state/{own}/{name}": entry for name, entry in checksums.hash_files(place).items()}
                storage.write_atomically(os.path.join(folder, f"{process}.{CHECKSUMS}"), json.dumps(listed))
        self._wait(key=key, timeout_ms=timeout_ms)

    def _write_checksums(self) -> None:
        """Of all files of the checkpoint that is being written."""
        if not distributed.is_first():
            return
        folder, known = storage.path(self._written()), {}
        for path in [] if storage.in_bucket(folder) else folder.glob(f"*.{CHECKSUMS}"):
            known |= read_json(path, "")
            path.unlink()
        listed = checksums.hash_files(folder, known=known)
        storage.write_atomically(folder / CHECKSUMS, json.dumps(checksums.sealed(listed)))

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: Any, config: Mapping[str, Any]) -> None:
        """Starts a save; it appears under its final name when it is whole."""
        if step == self.latest():
            return
        self._manager.wait_until_finished()
        self._saving = step
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave(data.get_state()),  # equal on all processes, and for any number
                config=ocp.args.JsonSave(dict(config)),
            ),
        )

    def restore(self, step: int, state: Any, data: Any) -> Any:
        """The state of `step`, laid out like the abstract `state` (shapes, dtypes, shardings).

        `data`, a Grain iterator, is set to where it was. Raises UserError on another shape or dtype, and
        where files are damaged.
        """
        folder = os.path.join(self.folder, str(step))
        others = [other for other in self._manager.all_steps() if other != step]
        remedy = f"delete {folder} to resume from " + (f"step {max(others)}" if others else "the beginning")
        with _verifying(folder, _read_checksums(folder, remedy), remedy):
            check_shapes(_saved_shapes(os.path.join(folder, "state")), state, folder)
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(state),
                    data=ocp.args.JsonRestore(),
                ),
            )
        data.set_state(restored["data"])
        return restored["state"]

    def wait(self) -> None:
        """Waits for saves under way."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for saves under way; nothing can be saved after it."""
        self._manager.close()


def _read_checksums(step_folder: str, remedy: str) -> dict[str, Any] | None:
    path = os.path.join(step_folder, CHECKSUMS)
    if not storage.path(path).exists():
        return None
    return checksums.unsealed(read_json(path, remedy), path, remedy)


def verify_checkpoint(step_folder: str, remedy: str) -> None:
    """Compares the checksums of a training checkpoint. Raises UserError that names damaged files."""
    with _verifying(step_folder, _read_checksums(step_folder, remedy), remedy, together=False):
        pass


@contextlib.contextmanager
def _verifying(
    folder: str, listed: Mapping[str, Any] | None, remedy: str, together: bool = True
) -> Iterator[None]:
    """`checksums.verified`; if `together`, all processes of a job do it, each a share of the files."""
    if listed is None and distributed.is_first():
        print(f"{folder} has no checksums, it is of an earlier version: its files are not verified")
    if not listed:
        yield
    elif not together:
        with checksums.verified(folder, listed, remedy):
            yield
    else:
        share = (jax.process_index(), jax.process_count())
        with distributed.all_or_none(), checksums.verified(folder, listed, remedy, share):
            yield


def _paths(tree: Any) -> dict[str, Any]:
    """Leaves by path, with the same spelling for dicts, tuples, named tuples and dataclasses."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _saved_shapes(folder: str) -> dict[str, tuple[tuple[int, ...], str]]:
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            tree = checkpointer.metadata(storage.absolute(folder)).item_metadata.tree
        except (OSError, *_DAMAGE) as error:
            raise UserError(f"{folder} is not a whole checkpoint; delete it or name another") from error
    return {path: (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in _paths(tree).items()}


def check_shapes(
    saved: Mapping[str, tuple[tuple[int, ...], str]], wanted: Any, where: str, dtypes: bool = True
) -> None:
    """Raises one UserError that names every missing, unknown and mis-shaped parameter of `where`."""
    wanted = {path: (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in _paths(wanted).items()}
    faults = [f"missing {path}" for path in sorted(wanted.keys() - saved.keys())]
    faults += [f"unknown {path}" for path in sorted(saved.keys() - wanted.keys())]
    for path in sorted(wanted.keys() & saved.keys()):
        if saved[path][0] != wanted[path][0] or (dtypes and saved[path][1] != wanted[path][1]):
            faults.append(f"{path} is {saved[path]}, the configuration wants {wanted[path]}")
    if faults:
        shown = "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
        raise UserError(
            f"checkpoint {where} does not fit the configuration: {shown}. "
            "Use the configuration it was made with, or another checkpoint"
        )


def tree_hash(params: Mapping[str, Any]) -> str:
    """sha256 over paths, dtypes, shapes and bytes of a tree of arrays."""
    leaves = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        array = distributed.fetch(leaf)
        leaves[path] = (str(array.dtype), array.shape, leaf_digests(array))
    return hash_of(leaves)


def leaf_digests(array: np.ndarray) -> list[str]:
    """sha256 of each slice along the first axis of an array of three axes or more, else of the whole.

    So the layers of a stacked leaf can be hashed one by one, in any order.
    """
    slices = array if array.ndim >= 3 else [array]
    return [hashlib.sha256(np.ascontiguousarray(part).view(np.uint8).data).hexdigest() for part in slices]


def hash_of(leaves: Mapping[str, tuple[str, tuple[int, ...], list[str]]]) -> str:
    """`tree_hash` of a tree whose leaves are given as (dtype, shape, `leaf_digests`), by path."""
    lines = [f"{path} {dtype} {shape} {' '.join(d)}\n" for path, (dtype, shape, d) in sorted(leaves.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def is_finite(array: np.ndarray) -> bool:
    """Whether no number of an array of floats is NaN or infinite.

    It looks at the exponents, as integers: NumPy's own test takes ten times as long on bfloat16.
    """
    bits = array.view(f"u{array.itemsize}")
    exponent = np.asarray(np.inf, array.dtype).view(bits.dtype)
    return bool((bits & exponent).max(initial=0) != exponent)


@jax.jit
def _largest(tree: Any) -> Any:
    """The largest magnitude in every leaf: NaN or infinite where one of its numbers is."""
    return jax.tree.map(lambda leaf: jnp.abs(leaf).max(initial=0), tree)


def _refuse_not_finite(params: Mapping[str, Any], folder: str, remedy: str) -> None:
    """Raises UserError that names the parameters with NaN or infinity. The devices look at their memory."""
    largest = jax.device_get(_largest(params))
    bad = [path for path, value in flatten_dict(largest, sep="/").items() if not np.isfinite(value)]
    if bad:
        more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
        raise UserError(
            f"{folder} holds NaN or infinity in {', '.join(bad[:4])}{more}: it would only make noise; "
            f"{remedy or 'name another folder'}"
        )


def save_params(folder: str, params: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """Writes a parameter tree and its manifest; replaces an earlier one at the end. Returns the hash.

    All processes of a job call it, with storage that all share. In a bucket, which has no renames, the
    manifest goes first and comes last.
    """
    folder = storage.absolute(folder)
    manifest_file = storage.path(folder) / "manifest.json"
    bucket, first = storage.in_bucket(folder), distributed.is_first()
    temporary = folder if bucket else folder + ".writing"
    with distributed.all_or_none():
        if first:
            if bucket:
                manifest_file.unlink(missing_ok=True)
            storage.remove(temporary)
            if not bucket:
                os.makedirs(temporary)  # where that fails, Orbax would wait for minutes
    _cut_large_arrays_only()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(os.path.join(temporary, "tree"), params)
    manifest = {
        **about,
        "sha256": tree_hash(params),
        "shapes": {
            path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in flatten_dict(params, sep="/").items()
        },
    }
    with distributed.all_or_none():
        if first:
            manifest["files"] = checksums.hash_files(temporary)
            text = json.dumps(checksums.sealed(manifest), indent=1)
            storage.write_atomically(os.path.join(temporary, manifest_file.name), text)
            if not bucket:
                storage.remove(folder)
                storage.put_in_place(temporary, folder)
    return manifest["sha256"]


def name_folder(remedy: str, folder: str | None) -> str:
    """`config.backbone_remedy`, a command that makes all weights, with the folder that the user named."""
    root = (folder or "").rstrip("/")
    if os.path.basename(root) in ("transformer", "backbone", "vae", "text_encoder"):
        root = os.path.dirname(root)
    return re.sub(r"(--(?:dst|workdir))=\S+", lambda found: f"{found[1]}={root}", remedy) if root else remedy


def find_parts(folder: str, remedy: str = "name another folder") -> dict[str, str]:
    """Part -> folder of its parameters, for a folder of parameters, a training run or one of its checkpoints.

    Of a run those that it wrote at its end, unless there is a later checkpoint; of a checkpoint the averaged
    ones (EMA). Raises UserError when there are none.
    """
    folder = os.fspath(folder).rstrip("/")
    root = storage.path(folder)
    if holds_params(folder):
        return {read_manifest(folder, remedy).get("part", ""): folder}
    if (root / "state").is_dir():
        names = {
            path.split("/")[1] for path in _saved_shapes(os.path.join(folder, "state")) if path[:4] == "ema/"
        }
        return {name: os.path.join(folder, "ema", name) for name in sorted(names)}
    checkpoints = root / "checkpoints"
    steps = [int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()]
    ended = {}
    for path in sorted(root.glob("*/manifest.json")):
        manifest = read_manifest(str(path.parent), remedy)
        if manifest.get("step", -1) >= max(steps, default=0):
            ended[manifest.get("part", "")] = str(path.parent)
    if not ended and not steps:
        raise UserError(f"no checkpoint at {folder}: {remedy}")
    return ended or find_parts(str(checkpoints / str(max(steps))), remedy)


def holds_params(folder: str) -> bool:
    """Whether this is a folder of parameters, or names some in a training checkpoint."""
    return bool(in_checkpoint(folder)) or (storage.path(folder) / "manifest.json").exists()


def in_checkpoint(folder: str) -> re.Match | None:
    """(folder of the checkpoint, "ema" or "params", part) of a folder that names parameters in one."""
    found = re.fullmatch(r"(.*/checkpoints/\d+)/(ema|params)/(\w+)", os.fspath(folder).rstrip("/"))
    return found if found and (storage.path(found[1]) / "state").is_dir() else None


def _describe_in_checkpoint(folder: str) -> dict[str, Any]:
    """What the manifest of these parameters would say if they had one."""
    step_folder, kind, part = in_checkpoint(folder).groups()
    run = read_run(os.path.dirname(os.path.dirname(step_folder)))
    saved, prefix = _saved_shapes(os.path.join(step_folder, "state")), f"{kind}/{part}/"
    shapes = {path.removeprefix(prefix): entry for path, entry in saved.items() if path.startswith(prefix)}
    if not shapes:
        raise UserError(f"{step_folder} has no {kind} of {part!r}: name another part")
    about = {
        **describe_part(run["config"], part, int(os.path.basename(step_folder)), run["references"]),
        **({"categories": run["categories"]} if "categories" in run and part != "backbone" else {}),
        "sha256": hashlib.sha256(f"{_sum_of(step_folder)} {kind} {part}".encode()).hexdigest(),
        "shapes": {path: [list(shape), dtype] for path, (shape, dtype) in shapes.items()},
    }
    if part != "backbone" and any(path.startswith(f"{kind}/backbone/") for path in saved):
        trained = hashlib.sha256(f"{_sum_of(step_folder)} {kind} backbone".encode()).hexdigest()
        about["backbone_sha256"] = trained
    return about


def _sum_of(step_folder: str) -> str:
    """Tells the content of a checkpoint."""
    listed = _read_checksums(step_folder, "name another checkpoint")
    return storage.absolute(step_folder) if listed is None else checksums.hash_json(listed)


def describe_part(
    config: Mapping[str, Any], part: str, step: int, references: Mapping[str, str]
) -> dict[str, Any]:
    """What the manifest of trained parameters says of where they came from; `config` in JSON types."""
    spec = config["backbone"]
    if part != "backbone":
        spec = {"backbone": spec, part: config["parts"][part]}
    return {"part": part, "model": spec, "step": step, **references}


def read_manifest(folder: str, remedy: str) -> dict[str, Any]:
    """The manifest of a parameter tree. Raises UserError with `remedy` when there is none."""
    if in_checkpoint(folder):
        return _describe_in_checkpoint(folder)
    path = storage.path(folder) / "manifest.json"
    if not path.exists():
        raise UserError(f"no checkpoint at {folder}: {remedy}")
    manifest = read_json(path, remedy or "name another folder", _MANIFEST)
    if not checksums.is_intact(manifest):
        raise UserError(f"{path} is damaged (not as it was written): {remedy or 'name another folder'}")
    if not {"sha256", "shapes"} <= manifest.keys():
        raise UserError(f"{path} is of no parameters: {remedy or 'name another folder'}")
    return manifest


def check_params(folder: str, wanted: Any, remedy: str) -> dict[str, Any]:
    """The manifest of a parameter tree. Raises UserError when the folder is missing or does not fit."""
    manifest = read_manifest(folder, remedy)
    saved = {path: (tuple(shape), dtype) for path, (shape, dtype) in manifest["shapes"].items()}
    check_shapes(saved, wanted, folder, dtypes=False)
    return manifest


def load_params(folder: str, wanted: Any, remedy: str) -> dict[str, Any]:
    """Reads a parameter tree laid out like `wanted` (a tree of ShapeDtypeStructs, with shardings if any).

    Values are cast to the wanted dtypes. All processes of a job call it when the tree is laid out over all
    of them; each by itself when it is not. Raises UserError when the folder is missing, does not fit, has
    other bytes than were written, or holds NaN or infinity.
    """
    listed = check_params(folder, wanted, remedy).get("files")
    root, place, path = folder, "tree", ()
    if within := in_checkpoint(folder):
        root, place, path = within[1], "state", within.groups()[1:]
        listed = _read_checksums(root, remedy)
    # Orbax would read all leaves at once and hold them twice: let it read the largest and little more.
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(wanted))
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=1 + largest // 10**9)
    # Orbax would take the devices that wrote a leaf, which may not be there.
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = parallel.placed(wanted, jax.tree.map(lambda leaf: leaf.sharding or default, wanted))
    options = {}
    alone = all(leaf.sharding.is_fully_addressable for leaf in jax.tree.leaves(wanted))
    if alone:
        this = jax.process_index()
        options["multiprocessing_options"] = ocp.options.MultiprocessingOptions(
            primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process_{this}"
        )
    for name in reversed(path):
        wanted = {name: wanted}
    verifying = _verifying(root, listed, remedy or "name another folder", together=not alone)
    with verifying, ocp.Checkpointer(handler, **options) as checkpointer:
        place = os.path.join(storage.absolute(root), place)
        how = ocp.checkpoint_utils.construct_restore_args(wanted)
        arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=bool(path))
        try:
            tree = checkpointer.restore(place, args=arguments)
        except (OSError, *_DAMAGE) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{place} is damaged ({reason}): {remedy or 'name another folder'}") from error
    for name in path:
        tree = tree[name]
    tree = unflatten_dict(flatten_dict(tree, sep="/"), sep="/")
    _refuse_not_finite(tree, folder, remedy)
    return tree


def abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of an array: what a restore needs to know."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
