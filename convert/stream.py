"""Streams PyTorch tensors into an Orbax tree on disk: one pass, little memory, resumable.

Every source file is read once from front to back with plain reads (mapped pages would count as memory),
hashed, and its tensors are written where they belong. A finished tensor is noted in a journal; a run that
was cut off reads the files again, to hash them, and writes only what the journal lacks.

The tree is an Orbax PyTree checkpoint of uncompressed zarr arrays. Orbax writes the skeleton, TensorStore
the arrays' metadata; the chunks, which are then plain bytes in C order, are written here: through
TensorStore they took as much processor time as all else together.
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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax.traverse_util import unflatten_dict
from tqdm import tqdm

from convert.files import Tensor
from convert.leaves import Leaf
from prophy_jax.run import checkpoints
from prophy_jax.run.errors import UserError

_READ = 4 << 20  # Bytes of one read, hashed while they are in the cache.
_DROP = 8 << 20  # Bytes read after which the system may reuse the memory in which it cached them.
_WRITE = 1 << 20  # Bytes of one write: a whole array at once took Linux several times as long.
_ROWS = 32  # Transposed at a time: a few kilobytes of every column, which fits the cache.
_GATHERED = 1 << 20  # Layers below this size wait in memory for each other and become one chunk.
_CHUNK = 64 << 20  # Larger arrays are cut, so that a host reads no more than its shard.
_SPARE = 16 << 20  # Bytes left free on the disk, for manifests and folders.

JOURNAL = "journal.jsonl"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SourceError(UserError):
    """A fault of a source that shows only when its bytes are read: what was written of it is worthless."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What to stream.

    Attributes:
        table: The leaves of the tree, by path.
        tensors: Those of the table, and copies of them under other names, which are compared, not written.
        copies: Names of the copies, each with the name that it must equal.
        dtype: Of all leaves; None keeps that of the files.
    """

    table: Mapping[str, Leaf]
    tensors: list[Tensor]
    copies: Mapping[str, str]
    dtype: np.dtype | None

    @property
    def sources(self) -> list[Path]:
        """The files, in the order in which they are read."""
        return list(dict.fromkeys(tensor.file for tensor in self.tensors))

    def dtypes(self) -> dict[str, np.dtype]:
        """Of each leaf. Layers of several types become float32, which holds them all."""
        of_tensor = {tensor.name: tensor.dtype for tensor in self.tensors}
        kinds = {path: {of_tensor[name] for name in leaf.names} for path, leaf in self.table.items()}
        return {
            path: self.dtype or (kinds[path].pop() if len(kinds[path]) == 1 else np.dtype(np.float32))
            for path in self.table
        }

    def source_bytes(self) -> int:
        return sum(os.path.getsize(file) for file in self.sources)

    def target_bytes(self) -> int:
        dtypes = self.dtypes()
        return sum(math.prod(leaf.shape) * dtypes[path].itemsize for path, leaf in self.table.items())


def check_space(dst: Path, jobs: Mapping[Path, Job]) -> None:
    """Raises UserError when the disk of `dst` lacks room for what jobs, by folder, have still to write."""
    need = _SPARE
    for partial, job in jobs.items():
        need += job.target_bytes() - sum(f.stat().st_size for f in partial.rglob("*") if f.is_file())
    disk = next(folder for folder in (dst, *dst.absolute().parents) if folder.exists())
    free = shutil.disk_usage(disk).free
    if need > free:
        raise UserError(
            f"the disk of {disk} has {free / 1e6:,.0f} MB free, {need / 1e6:,.0f} MB are needed: "
            "free some or choose another --dst"
        )


def write_tree(job: Job, partial: Path, identity: Mapping[str, Any], progress: tqdm) -> dict[str, Any]:
    """Writes the tree PARTIAL/tree, or what of it an earlier run did not get to.

    Args:
        job: What to write.
        partial: The folder; it may hold what an earlier run wrote.
        identity: What makes two runs the same, JSON: another one's work is discarded.
        progress: Counts bytes of the sources.

    Returns:
        {"sha256" of the tree, "shapes" by path, "files" with sizes and hashes}, for a manifest.

    Raises:
        SourceError: a file changed while it was read, or a copy differs.
        UserError: another process is at it.
        OSError: as of any writing; `DISK_FULL` has the error numbers of a full disk.
    """
    with _Journal(partial, dict(identity), progress) as journal:
        if journal.fresh:
            with _full_disk_as_oserror():
                _lay_out(partial / "tree", job.table, job.dtypes())
            journal.begin()
        writer = _Writer(partial / "tree", job, journal)
        files = []
        for source in job.sources:
            reader = _Reader(source, progress)
            for tensor in (tensor for tensor in job.tensors if tensor.file == source):
                writer.take(tensor, reader)
            files.append({"name": source.name, "bytes": reader.size, "sha256": reader.finish()})
        leaves = writer.leaves()
    return {
        "sha256": checkpoints.hash_of(leaves),
        "shapes": {path: [list(shape), dtype] for path, (dtype, shape, _) in leaves.items()},
        "files": files,
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
    """Also of two axes whatever their size: these are hashed whole."""
    small = math.prod(leaf.piece_shape) * dtype.itemsize < _GATHERED
    return leaf.stacked and (small or len(leaf.shape) < 3)


def _lay_out(tree: Path, table: Mapping[str, Leaf], dtypes: Mapping[str, np.dtype]) -> None:
    """An Orbax checkpoint of scalars, then arrays without chunks in their place."""
    skeleton = unflatten_dict({tuple(path.split("/")): np.zeros((), dtypes[path]) for path in table})
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tree.absolute(), skeleton)
    for path, leaf in table.items():
        dtype = dtypes[path]
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": str(_folder(tree, path).absolute())},
            "metadata": {
                "shape": leaf.shape,
                "chunks": _chunks(leaf, dtype),
                "dtype": "bfloat16" if dtype.name == "bfloat16" else dtype.str,
                "compressor": None,
            },
        }
        tensorstore.open(spec, create=True, delete_existing=True).result()


@contextlib.contextmanager
def _full_disk_as_oserror() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # TensorStore's word for it
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def _folder(tree: Path, path: str) -> Path:
    return tree / path.replace("/", ".")  # Orbax's name of a leaf


class _Journal:
    """What is written for good: the identity of the run, then a line per tensor or gathered leaf."""

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
        data = data[: data.rfind(b"\n") + 1]  # The last line may have been cut off.
        lines = [json.loads(line) for line in data.splitlines()]
        self.fresh = lines[:1] != [identity]
        if self.fresh:
            if lines:
                progress.write(f"discarding {partial}: it was begun from other files or another --dtype")
            _clear(partial)
        self._file.truncate(0 if self.fresh else len(data))
        self._identity = identity
        self.done = {} if self.fresh else {line["name"]: line["digests"] for line in lines[1:]}

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


class _Reader:
    """Reads a file once from front to back and hashes every byte of it."""

    def __init__(self, path: Path, progress: tqdm):
        self._path, self._progress = path, progress
        self._file = open(path, "rb", buffering=0)
        self.size = os.fstat(self._file.fileno()).st_size
        self._position = self._dropped = 0
        self._hash = hashlib.sha256()
        self._buffer = bytearray(_READ)

    def skip_to(self, offset: int) -> None:
        while self._position < offset:
            self._read(memoryview(self._buffer)[: min(_READ, offset - self._position)])

    def rows(self, tensor: Tensor, count: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows) of a tensor, `count` rows at a time, each valid until the next."""
        total = tensor.shape[0]
        row_bytes = tensor.nbytes // total
        if len(self._buffer) < min(count, total) * row_bytes:
            self._buffer = bytearray(min(count, total) * row_bytes)
        for start in range(0, total, count):
            number = min(count, total - start)
            view = memoryview(self._buffer)[: number * row_bytes]
            for begin in range(0, len(view), _READ):
                self._read(view[begin : begin + _READ])
            yield start, np.frombuffer(view, tensor.dtype).reshape(number, *tensor.shape[1:])

    def finish(self) -> str:
        """Reads the rest. Returns the sha256 of the file."""
        self.skip_to(self.size)
        self._file.close()
        return self._hash.hexdigest()

    def _read(self, view: memoryview) -> None:
        got = 0
        while got < len(view):
            count = os.preadv(self._file.fileno(), [view[got:]], self._position + got)
            if not count:
                raise SourceError(f"{self._path} became shorter while it was read: download it again")
            got += count
        self._hash.update(view)
        self._position += got
        self._progress.update(got)
        if self._position - self._dropped >= _DROP and hasattr(os, "posix_fadvise"):  # Linux
            span = (self._dropped, self._position - self._dropped)
            os.posix_fadvise(self._file.fileno(), *span, os.POSIX_FADV_DONTNEED)
            self._dropped = self._position


class _Writer:
    """Takes tensors in any order and writes the chunks of a tree's arrays."""

    def __init__(self, tree: Path, job: Job, journal: _Journal):
        self._tree, self._job, self._journal = tree, job, journal
        self._dtypes = job.dtypes()
        self._places: dict[str, list[_Place]] = {}
        for path, leaf in job.table.items():
            for layer, name in enumerate(leaf.names):
                self._places.setdefault(name, []).extend(_places(path, layer, leaf))
        self._gathered: dict[str, tuple[np.ndarray, set[int]]] = {}
        self._collected: dict[tuple[str, int], np.ndarray] = {}
        self._copies: dict[str, list[str]] = {}
        self._buffer = np.empty(0, np.uint8)

    def take(self, tensor: Tensor, reader: _Reader) -> None:
        """Reads a tensor that lies ahead of the reader, and writes it unless an earlier run did."""
        original = self._job.copies.get(tensor.name)
        for place in sorted(self._places[original or tensor.name], key=lambda place: place.start):
            part = tensor.part(place.start, place.stop)
            reader.skip_to(part.offset)
            path, layer = place.path, place.layer
            if original:
                self._copies[tensor.name] = self._digests(self._parts(part, path, reader), path)
            elif not self._is_done(path, layer):
                if self._job.table[path].rows:
                    self._collect(part, place, reader)
                elif _is_gathered(self._job.table[path], self._dtypes[path]):
                    self._gather(part, path, layer, reader)
                else:
                    self._write_layer(path, layer, self._parts(part, path, reader))

    def leaves(self) -> dict[str, tuple[str, tuple[int, ...], list[str]]]:
        """dtype, shape and digests of every leaf, by path, when all tensors have been taken."""
        done = self._journal.done
        for copy, digests in self._copies.items():
            original = self._job.copies[copy]
            if digests != done[original]:
                raise SourceError(f"{copy} differs from {original}, of which it must be a copy")
        leaves = {}
        for path, leaf in self._job.table.items():
            keys = dict.fromkeys(self._key(path, layer) for layer in range(len(leaf.names)))
            digests = [digest for key in keys for digest in done[key]]
            leaves[path] = (str(self._dtypes[path]), leaf.shape, digests)
        return leaves

    def _gather(self, tensor: Tensor, path: str, layer: int, reader: _Reader) -> None:
        leaf = self._job.table[path]
        for _, rows in reader.rows(tensor, tensor.shape[0]):
            self._add_layer(path, layer, leaf.from_torch(rows))

    def _add_layer(self, path: str, layer: int, piece: np.ndarray) -> None:
        """Adds a layer of a gathered leaf, which is written when it has them all."""
        leaf = self._job.table[path]
        if path not in self._gathered:
            array = np.empty(leaf.shape, self._dtypes[path])
            self._gathered[path] = (array, set(range(len(leaf.names))))
        array, missing = self._gathered[path]
        array[layer] = piece
        missing.remove(layer)
        if not missing:
            _write(self._files(path, 0)[0], array, array.nbytes)
            self._journal.add(path, checkpoints.leaf_digests(array))
            del self._gathered[path]

    def _collect(self, part: Tensor, place: "_Place", reader: _Reader) -> None:
        """Adds rows to a layer that is made of some rows of a tensor; it is written when it has them all."""
        path, layer = place.path, place.layer
        leaf, dtype = self._job.table[path], self._dtypes[path]
        bits = np.dtype(f"u{dtype.itemsize}")  # NumPy moves integers faster than bfloat16.
        if (path, layer) not in self._collected:
            self._collected[path, layer] = np.empty(leaf.piece_shape, bits)
        piece = self._collected[path, layer]
        for start, rows in reader.rows(part, _ROWS):
            leaf.put(piece, place.at + start, rows.astype(dtype, copy=False).view(bits))
        if place.is_last:
            del self._collected[path, layer]
            piece = piece.view(dtype)
            if _is_gathered(leaf, dtype):
                self._add_layer(path, layer, piece)
            else:
                length = self._chunk(path)[1 if leaf.stacked else 0]
                self._write_layer(path, layer, _cut(piece, length))

    def _write_layer(self, path: str, layer: int, parts: Iterator[np.ndarray]) -> None:
        """Writes the chunks of a layer of a stacked leaf, or of the whole of another, as they come."""
        files, size = self._files(path, layer), self._chunk_bytes(path)

        def written() -> Iterator[np.ndarray]:
            for file, part in zip(files, parts, strict=True):
                _write(file, part, size)
                yield part

        self._journal.add(self._key(path, layer), self._digests(written(), path))

    def _digests(self, parts: Iterator[np.ndarray], path: str) -> list[str]:
        """`checkpoints.leaf_digests` of a leaf in parts, or the one digest of a layer of a stacked leaf."""
        leaf = self._job.table[path]
        if len(leaf.shape) >= 3 and not leaf.stacked:
            return [digest for part in parts for digest in checkpoints.leaf_digests(part)]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part.view(np.uint8).data)
        return [digest.hexdigest()]

    def _parts(self, tensor: Tensor, path: str, reader: _Reader) -> Iterator[np.ndarray]:
        """A tensor in our layout and dtype, cut along its first axis into chunks; valid until the next."""
        leaf, dtype = self._job.table[path], self._dtypes[path]
        length = self._chunk(path)[1 if leaf.stacked else 0]
        if not leaf.transposed:
            # Where PyTorch has further axes of size one, the tensor is small and read whole.
            count = length if tensor.shape == leaf.piece_shape else tensor.shape[0]
            for _, rows in reader.rows(tensor, count):
                yield from _cut(leaf.from_torch(rows.astype(dtype, copy=False)), length)
            return
        bits = np.dtype(f"u{dtype.itemsize}")  # NumPy moves integers faster than bfloat16.
        piece = self._piece(leaf.piece_shape, bits)
        for start, rows in reader.rows(tensor, _ROWS):
            columns = leaf.from_torch(rows.astype(dtype, copy=False).view(bits))
            piece[..., start : start + len(rows)] = columns
        yield from _cut(piece, length)

    def _piece(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        nbytes = math.prod(shape) * dtype.itemsize
        if len(self._buffer) < nbytes:
            self._buffer = np.empty(nbytes, np.uint8)
        return self._buffer[:nbytes].view(dtype).reshape(shape)

    def _chunk(self, path: str) -> tuple[int, ...]:
        return _chunks(self._job.table[path], self._dtypes[path])

    def _chunk_bytes(self, path: str) -> int:
        return math.prod(self._chunk(path)) * self._dtypes[path].itemsize

    def _files(self, path: str, layer: int) -> list[Path]:
        """The chunks of a layer of a stacked leaf, or of the whole of another: zarr's "0.1.0" and so on."""
        leaf, chunk = self._job.table[path], self._chunk(path)
        grid = [range(-(-side // part)) for side, part in zip(leaf.shape, chunk, strict=True)]
        if leaf.stacked and len(grid[0]) > 1:
            grid[0] = [layer]
        folder = _folder(self._tree, path)
        return [folder / ".".join(map(str, index)) for index in itertools.product(*grid)]

    def _key(self, path: str, layer: int) -> str:
        """What the journal calls a layer of a leaf, or the whole of a gathered one."""
        leaf = self._job.table[path]
        if _is_gathered(leaf, self._dtypes[path]):
            return path
        return f"{path} {layer}" if leaf.rows else leaf.names[layer]

    def _is_done(self, path: str, layer: int) -> bool:
        # After a power cut the journal may know of bytes that never reached the disk.
        size = self._chunk_bytes(path)
        files = self._files(path, layer) if self._key(path, layer) in self._journal.done else []
        return bool(files) and all(file.exists() and file.stat().st_size == size for file in files)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where rows of a tensor go."""

    path: str
    layer: int
    start: int
    stop: int | None  # None: all rows.
    at: int = 0  # The place of the first of them among the rows of the leaf.
    is_last: bool = True  # Whether the leaf's layer has all its rows then, as tensors are read in order.


def _places(path: str, layer: int, leaf: Leaf) -> list[_Place]:
    if not leaf.rows:
        return [_Place(path, layer, 0, None)]
    places, at = [], 0
    for start, stop in leaf.rows:
        places.append(_Place(path, layer, start, stop, at, stop == leaf.rows[-1][1]))
        at += stop - start
    return places


def _cut(array: np.ndarray, length: int) -> Iterator[np.ndarray]:
    return (array[start : start + length] for start in range(0, len(array), length))


def _write(file: Path, part: np.ndarray, size: int) -> None:
    """Writes a chunk; the last one of an axis is filled up with zeros."""
    data = memoryview(part.reshape(-1).view(np.uint8))
    with open(file, "wb") as out:
        for start in range(0, part.nbytes, _WRITE):
            out.write(data[start : start + _WRITE])
        out.write(bytes(size - part.nbytes))
