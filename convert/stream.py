"""Streams PyTorch tensors into an Orbax tree on disk, in little memory; a run that was cut off resumes.

The tree is an Orbax PyTree checkpoint of uncompressed zarr arrays. Orbax writes the skeleton and TensorStore
the arrays, one unit at a time: a layer of a stacked leaf, all layers where they are small, or a whole leaf.
A journal notes every unit that is on the disk; the next run reads these back and writes the others.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax.traverse_util import unflatten_dict
from tqdm import tqdm

from convert.files import SourceError, Tensor, check
from convert.leaves import Leaf
from prophy_jax.run import checkpoints
from prophy_jax.run.errors import UserError

_READ = 8 << 20  # Bytes of a source that are in memory at once, or one row of a tensor.
_GATHERED = 1 << 20  # Layers below this size become one chunk.
_CHUNK = 64 << 20  # Larger arrays are cut into chunks, so that a host reads no more than its shard.
_SPARE = 16 << 20  # Bytes left free on the disk, for manifests and folders.

JOURNAL = "journal.jsonl"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAMED = (*DISK_FULL, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EROFS)  # what TensorStore may say


@dataclasses.dataclass(frozen=True)
class Job:
    """What to stream.

    Attributes:
        table: The leaves of the tree, by path.
        tensors: Those of the table, and copies of them under other names, which are compared, not written.
        copies: The names of the copies, each with the name of the tensor that it must equal.
        dtype: Of all leaves; None keeps the dtype of the files.
    """

    table: Mapping[str, Leaf]
    tensors: list[Tensor]
    copies: Mapping[str, str]
    dtype: np.dtype | None

    @property
    def sources(self) -> list[Path]:
        return list(dict.fromkeys(tensor.file for tensor in self.tensors))

    def dtypes(self) -> dict[str, np.dtype]:
        """Of each leaf. Layers of several types become float32, which holds them all."""
        of_tensor = {tensor.name: tensor.dtype for tensor in self.tensors}
        kinds = {path: {of_tensor[name] for name in leaf.names} for path, leaf in self.table.items()}
        return {
            path: self.dtype or (kinds[path].pop() if len(kinds[path]) == 1 else np.dtype(np.float32))
            for path in self.table
        }

    def tensor_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def source_bytes(self) -> int:
        return sum(os.path.getsize(file) for file in self.sources)

    def target_bytes(self) -> int:
        dtypes = self.dtypes()
        return sum(math.prod(leaf.shape) * dtypes[path].itemsize for path, leaf in self.table.items())


def check_space(jobs: Mapping[Path, Job]) -> None:
    """Raises UserError when their disk lacks room for what jobs, by folder, still have to write."""
    if not jobs:
        return
    dst = next(iter(jobs)).parent
    need = _SPARE
    for partial, job in jobs.items():
        need += job.target_bytes() - sum(f.stat().st_size for f in partial.rglob("*") if f.is_file())
    disk = next(folder for folder in (dst, *dst.absolute().parents) if folder.exists())
    free = shutil.disk_usage(disk).free
    if need > free:
        raise UserError(
            f"the disk of {disk} has {free / 1e6:,.0f} MB free, the conversion needs {need / 1e6:,.0f} MB: "
            "free some space or choose another --dst"
        )


def write_tree(job: Job, partial: Path, identity: Mapping[str, Any], progress: tqdm) -> dict[str, Any]:
    """Writes the tree PARTIAL/tree, or the part of it that an earlier run did not write.

    Args:
        job: What to write.
        partial: The folder; it may hold what an earlier run wrote.
        identity: JSON that two runs share if they write the same: the work of any other run is discarded.
        progress: Counts the bytes of the tensors.

    Returns:
        {"sha256" of the tree, "shapes" by path, "files" with sizes and hashes}, for a manifest.

    Raises:
        SourceError: a file changed while it was read or is damaged, or a copy differs.
        UserError: another process is writing this folder.
        OSError: as of any writing; `DISK_FULL` has the error numbers of a full disk.
    """
    with _Journal(partial, dict(identity), progress) as journal:
        with _tensorstore_errors(str(partial)):
            writer = _Writer(partial / "tree", job, journal, progress)
        if journal.fresh:
            journal.begin()
        leaves = {
            path: (str(writer.dtypes[path]), leaf.shape, writer.write(path))
            for path, leaf in job.table.items()
        }
        for copy, original in job.copies.items():
            writer.compare(copy, original)
    progress.set_postfix_str("hashing the files")
    return {
        "sha256": checkpoints.hash_of(leaves),
        "shapes": {path: [list(shape), dtype] for path, (dtype, shape, _) in leaves.items()},
        "files": [{"name": f.name, "bytes": f.stat().st_size, "sha256": check(f)} for f in job.sources],
    }


def _chunks(leaf: Leaf, dtype: np.dtype) -> tuple[int, ...]:
    """Shape of the parts of an array that are files of their own."""
    if _is_gathered(leaf, dtype):
        return leaf.shape
    piece = leaf.piece_shape
    parts = 1
    while math.prod(piece) * dtype.itemsize > parts * _CHUNK:
        parts *= 2
    layer = (1,) if leaf.stacked else ()
    return (*layer, -(-piece[0] // parts), *piece[1:])


def _is_gathered(leaf: Leaf, dtype: np.dtype) -> bool:
    """Also leaves of two axes, whatever their size, since these are hashed whole."""
    small = math.prod(leaf.piece_shape) * dtype.itemsize < _GATHERED
    return leaf.stacked and (small or len(leaf.shape) < 3)


@contextlib.contextmanager
def _tensorstore_errors(place: str) -> Iterator[None]:
    """TensorStore's errors are ValueErrors with a status in their text."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        number = next((number for number in _NAMED if os.strerror(number) in text), None)
        what = os.strerror(number) if number else text.partition("\n")[0]
        raise OSError(number or errno.EIO, what, place) from error


class _Journal:
    """What is on the disk: the identity of the run, then a line per unit."""

    def __init__(self, partial: Path, identity: dict[str, Any], progress: tqdm):
        identity = json.loads(json.dumps(identity))
        partial.mkdir(parents=True, exist_ok=True)
        self._file = open(partial / JOURNAL, "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another conversion is writing {partial}: wait for it or stop it") from error
        self._file.seek(0)
        data = self._file.read()
        data = data[: data.rfind(b"\n") + 1]  # The last line may be cut off.
        try:
            lines = [json.loads(line) for line in data.splitlines()]
            done = {line["name"]: line["digests"] for line in lines[1:]}
        except (ValueError, RecursionError, TypeError, KeyError):
            lines, done = [None], {}
        self.fresh = lines[:1] != [identity]
        if self.fresh:
            if lines:
                progress.write(
                    f"discarding {partial}: an earlier run began it from other files or with another "
                    f"--dtype, or its {JOURNAL} is damaged"
                )
            _clear(partial)
        self._file.truncate(0 if self.fresh else len(data))
        self._identity = identity
        self.done = {} if self.fresh else done

    def begin(self) -> None:
        self._append(self._identity)

    def add(self, name: str, digests: list[str]) -> None:
        self.done[name] = digests
        self._append({"name": name, "digests": digests})

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> "_Journal":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()


def _clear(partial: Path) -> None:
    for entry in partial.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != JOURNAL:
            entry.unlink()


class _Writer:
    """Writes the arrays of a tree, leaf by leaf."""

    def __init__(self, tree: Path, job: Job, journal: _Journal, progress: tqdm):
        self._job, self._journal, self._progress = job, journal, progress
        self._tensors = {tensor.name: tensor for tensor in job.tensors}
        self.dtypes = job.dtypes()
        if journal.fresh:
            # A checkpoint of scalars, whose places the arrays take.
            scalars = {tuple(path.split("/")): np.zeros((), dtype) for path, dtype in self.dtypes.items()}
            handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False)
            with ocp.Checkpointer(handler) as checkpointer:
                checkpointer.save(tree.absolute(), unflatten_dict(scalars))
        self._arrays = {path: self._open(tree, path) for path in job.table}

    def _open(self, tree: Path, path: str) -> tensorstore.TensorStore:
        leaf, dtype = self._job.table[path], self.dtypes[path]
        spec = {
            "driver": "zarr",
            # Orbax's name of a leaf.
            "kvstore": {"driver": "file", "path": str((tree / path.replace("/", ".")).absolute())},
            "context": {"file_io_sync": False},  # A later run checks what an earlier one wrote.
            "metadata": {
                "shape": leaf.shape,
                "chunks": _chunks(leaf, dtype),
                "dtype": "bfloat16" if dtype.name == "bfloat16" else dtype.str,
                "compressor": None,
            },
        }
        fresh = self._journal.fresh
        return tensorstore.open(spec, create=True, open=not fresh, delete_existing=fresh).result()

    def write(self, path: str) -> list[str]:
        """Writes the units of a leaf that an earlier run did not write. Returns its `leaf_digests`."""
        leaf = self._job.table[path]
        if _is_gathered(leaf, self.dtypes[path]) or not leaf.stacked:
            units = {path: range(len(leaf.names))}
        else:
            units = {f"{path} {layer}": range(layer, layer + 1) for layer in range(len(leaf.names))}
        for key, layers in units.items():
            if self._is_done(key, path, layers):
                sizes = (self._tensors[leaf.names[layer]].dtype.itemsize for layer in layers)
                self._progress.update(math.prod(leaf.torch_shape) * sum(sizes))
            else:
                self._journal.add(key, _digests(self._written(path, layers)))
        return [digest for key in units for digest in self._journal.done[key]]

    def compare(self, copy: str, original: str) -> None:
        """Raises SourceError unless two tensors are equal."""
        first, second, start = self._tensors[original], self._tensors[copy], 0
        for rows in _rows(second, 0, second.shape[0]):
            stop = start + len(rows)
            if rows.astype(first.dtype).tobytes() != first.read(start, stop).tobytes():
                raise SourceError(f"{copy} differs from {original}, of which it must be a copy")
            self._progress.update(rows.nbytes)
            start = stop

    def _is_done(self, key: str, path: str, layers: range) -> bool:
        """Whether the disk has a unit that the journal lists, as it was written."""
        if key not in self._journal.done:
            return False
        array = self._arrays[path]
        try:
            parts = (array[rows].read().result() for rows, _ in self._parts(path, layers))
            return _digests(parts) == self._journal.done[key]
        except ValueError:  # TensorStore's, of a chunk that was cut short
            return False

    def _written(self, path: str, layers: range) -> Iterator[np.ndarray]:
        """Writes a unit part by part, and gives the parts."""
        leaf, dtype = self._job.table[path], self.dtypes[path]
        for rows, ranges in self._parts(path, layers):
            # NumPy moves integers faster than bfloat16.
            bits = np.empty((rows.stop - rows.start, *leaf.shape[1:]), f"u{dtype.itemsize}")
            for piece, layer in zip(bits if leaf.stacked else [bits], layers, strict=True):
                tensor, at = self._tensors[leaf.names[layer]], 0
                for values in itertools.chain(*(_rows(tensor, *cut) for cut in ranges)):
                    leaf.put(piece, at, _cast(tensor, values, dtype).view(bits.dtype))
                    at += len(values)
                    self._progress.update(values.nbytes)
            _write(self._arrays[path], rows, bits.view(dtype))
            yield bits.view(dtype)

    def _parts(self, path: str, layers: range) -> list[tuple[slice, tuple[tuple[int, int], ...]]]:
        """Rows of a leaf that are one unit together, and the rows of a tensor that each part is made of."""
        leaf = self._job.table[path]
        count, ranges = leaf.shape[0], leaf.rows or ((0, leaf.torch_shape[0]),)
        if leaf.stacked:
            return [(slice(layers.start, layers.stop), ranges)]
        if leaf.transposed or leaf.torch_shape[0] != count:
            return [(slice(0, count), ranges)]
        length = _chunks(leaf, self.dtypes[path])[0]
        cuts = [(start, min(start + length, count)) for start in range(0, count, length)]
        return [(slice(*cut), (cut,)) for cut in cuts]


def _rows(tensor: Tensor, start: int, stop: int) -> Iterator[np.ndarray]:
    """Rows of a tensor, as many at a time as fit into memory."""
    length = max(1, _READ * tensor.shape[0] // tensor.nbytes)
    for begin in range(start, stop, length):
        yield tensor.read(begin, min(begin + length, stop))


def _cast(tensor: Tensor, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Rows of a tensor in another dtype. Raises SourceError unless they are finite, before and after."""
    with np.errstate(over="ignore"):
        cast = values.astype(dtype, copy=False)
    if not checkpoints.is_finite(cast):
        if checkpoints.is_finite(values):
            raise SourceError(
                f"{tensor.file}: {tensor.name} has numbers too large for {dtype}: leave out --dtype"
            )
        raise SourceError(
            f"{tensor.file}: {tensor.name} holds NaN or infinity: download it again, or save it again"
        )
    return cast


def _write(array: tensorstore.TensorStore, rows: slice, values: np.ndarray) -> None:
    with _tensorstore_errors(array.kvstore.path):
        array[rows].write(values, can_reference_source_data_indefinitely=True).result()


def _digests(parts: Iterable[np.ndarray]) -> list[str]:
    """`checkpoints.leaf_digests` of an array in parts along its first axis."""
    whole, digests = hashlib.sha256(), []
    for part in parts:
        if part.ndim >= 3:
            digests += checkpoints.leaf_digests(part)
        else:
            whole.update(np.ascontiguousarray(part).view(np.uint8).data)
    return digests or [whole.hexdigest()]
