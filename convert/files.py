"""The tensors in PyTorch's weight files: .safetensors and .pth, read without torch.

Opening a file loads no tensor and runs no code of the file. It gives names, types and shapes; the rows of a
tensor are read when the caller asks for them.
"""

import collections
import dataclasses
import functools
import io
import itertools
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from prophy_jax.run import storage, workdir
from prophy_jax.run.errors import UserError

_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_STORAGES = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"}
# Far more than the largest public checkpoints need, and little enough to read at once.
_PICKLE_LIMIT = 100_000_000
_WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
_PLAIN = (type(None), bool, int, float, str)


class SourceError(UserError):
    """A fault of a source that shows only when its values are read: what was written of it is worthless."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor in a file."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    load: Callable[[int, int], np.ndarray]  # Rows `start` to `stop`; fewer, or an error, if they are gone.

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of the first axis. Raises SourceError if the file no longer has them."""
        shape = (stop - start, *self.shape[1:])
        try:
            rows = self.load(start, stop)
        except (SafetensorError, FileNotFoundError):
            rows = np.empty(0)
        if rows.size != math.prod(shape):
            raise SourceError(
                f"{self.file} became shorter or disappeared while it was read: download it again"
            )
        return rows.reshape(shape)


def find(folder: Path, stem: str) -> list[Path]:
    """The files of a model that was saved as `stem`: one file, or shards, with their index if there is one.

    Returns:
        The index, the .safetensors files or the .pth file. The list is empty when the folder has none.
    """
    for name in (f"{stem}.safetensors.index.json", f"{stem}.safetensors", f"{stem}.pth"):
        if (folder / name).is_file():
            return [folder / name]
    return sorted(folder.glob(f"{stem}*.safetensors"))


def tensors(paths: list[Path], unused: re.Pattern | None = None) -> list[Tensor]:
    """The tensors of .safetensors and .pth files and of the shards that an index names.

    Args:
        paths: What `find` returns, or any files; a suffix that is not .safetensors or .json means .pth.
        unused: Finds the names of tensors that nobody will read. They may also be integers; those are left
            out.

    Raises:
        UserError: a file is missing, cut short or something else, or does not hold what its index says.
    """
    found = []
    for path in paths:
        found += _sharded(path) if path.suffix == ".json" else _tensors(path, unused)
    names: dict[Path, set[str]] = collections.defaultdict(set)
    for tensor in found:
        names[tensor.file].add(tensor.name)
    for file, other in itertools.pairwise(names):
        if names[file] == names[other]:
            raise UserError(f"{file} and {other} have the same tensors: leave one of them there")
    return found


def check(path: Path) -> str:
    """sha256 of a file. Raises SourceError where what it says of its own bytes does not hold.

    A .pth has the CRC-32 of its entries. The cache of the hub names large files by their sha256. A
    .safetensors file elsewhere says nothing.
    """
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                wrong = archive.testzip()
        except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
            raise SourceError(f"{path} is damaged ({error}): download it again") from error
        if wrong:
            raise SourceError(
                f"{path} is damaged, the CRC-32 of its entry {wrong} is another: download it again (or save "
                "it again, if torch wrote it with set_crc32_options(False))"
            )
    digest, blob = storage.hash_file(path), path.resolve()
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name) and blob.name != digest:
        raise SourceError(
            f"{path} is damaged, its sha256 is not that of the hub: delete {blob}, and run it again"
        )
    return digest


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError when the file is not one."""
    return dict(workdir.read_json(path, "download it again"))


# What a file that is no weights begins with, and what to say of it.
_NOT_WEIGHTS = {
    b"GGUF": "a gguf file, of quantised weights: give .safetensors that are not",
    b"version https://git-lfs": "a pointer of Git LFS, not the file: run git lfs pull in its folder",
    b"<": "a web page and no weights: download it again, signed in where the page asks for it",
}


def _tensors(path: Path, unused: re.Pattern | None = None) -> list[Tensor]:
    """What a file begins with says what it is; its name, only of what is in neither format."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
        what = next((what for magic, what in _NOT_WEIGHTS.items() if start.startswith(magic)), None)
        if what or path.suffix.lower() == ".gguf":
            raise UserError(f"{path} is {what or _NOT_WEIGHTS[b'GGUF']}")
        if not any(start):
            raise _broken(path, "it begins with zeros" if start else "it is empty")
        zipped, header = start.startswith(b"PK"), start[8:9] == b"{"
        named = path.suffix.lower() == ".safetensors"
        return _safetensors(path, unused) if header or (named and not zipped) else _pth(path, unused)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def read_index(index: Path) -> dict[str, str]:
    """The names of the shards by the names of their tensors. Raises UserError when the file has none."""
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
        raise UserError(f"{index} has no weight_map of tensor and file names: download it again")
    return shard_of


def _sharded(index: Path) -> list[Tensor]:
    shard_of = read_index(index)
    found = []
    for name in sorted(set(shard_of.values())):
        path = index.parent / name
        if path.parent != index.parent or not path.is_file():
            raise UserError(f"{index} names the file {name}, which is not next to it: download it")
        found += _tensors(path)
    present = {(tensor.name, tensor.file.name) for tensor in found}
    problems = [
        f"{name} is in {file} but not in the index" for name, file in sorted(present - shard_of.items())
    ]
    problems += [f"{name} is not in {file}" for name, file in sorted(shard_of.items() - present)]
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        listed = "; ".join(problems[:4]) + more
        raise UserError(f"{index} does not fit its files, download all of them again: {listed}")
    return found


def _broken(path: Path, what: str) -> UserError:
    return UserError(f"{path} is cut short or damaged ({what}): download it again")


def _dtype(path: Path, name: str, dtype: str) -> np.dtype:
    if dtype not in _DTYPES:
        known = ", ".join(_DTYPES)
        raise UserError(f"{path}: {name} is of type {dtype}; use unquantised weights, one of {known}")
    return _DTYPES[dtype]


def _safetensors(path: Path, unused: re.Pattern | None) -> list[Tensor]:
    try:
        with safe_open(path, "np") as file:
            views = {name: file.get_slice(name) for name in list(file.keys())}
            found = {name: (view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()}
    except SafetensorError as error:
        raise _broken(path, str(error)) from error
    return [
        Tensor(name, _dtype(path, name, dtype), shape, path, functools.partial(_load_safetensors, path, name))
        for name, (dtype, shape) in found.items()
        if dtype in _DTYPES or not (unused and unused.search(name))
    ]


def _load_safetensors(path: Path, name: str, start: int, stop: int) -> np.ndarray:
    # Opened anew each time: the pages of an open file stay in memory once they are read.
    with safe_open(path, "np") as file:
        return file.get_slice(name)[start:stop]


# .pth: a zip archive with a pickle of names and shapes, and one uncompressed entry per storage.
# This reader is kept, although torch.load exists, because a conversion then needs no torch.


class _Inert:
    """A value that a pickle can make but not change."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a tensor has a state of its own")


@dataclasses.dataclass(frozen=True)
class _StorageType(_Inert):
    name: str


@dataclasses.dataclass(frozen=True)
class _Storage(_Inert):
    kind: str
    key: str
    numel: int


@dataclasses.dataclass(frozen=True)
class _View(_Inert):
    """The description of a tensor in a pickle."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _View:
    sides = (offset, *shape, *stride)
    whole = all(type(side) is int and side >= 0 for side in sides) and len(shape) == len(stride)
    if not isinstance(storage, _Storage) or not whole:
        raise pickle.UnpicklingError("a tensor is malformed")
    return _View(storage, offset, tuple(shape), tuple(stride))


class _Forbidden(Exception):
    """The pickle asks for something that a state dict does not need."""


class _StateDictUnpickler(pickle.Unpickler):
    """Builds dicts of tensor descriptions and refuses every other class or function of the pickle."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if module == "torch" and name.endswith("Storage"):
            return _StorageType(name)
        raise _Forbidden(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _StorageType(name), str(key), _, int(numel)) if numel >= 0:
                return _Storage(name, key, numel)
        raise pickle.UnpicklingError("a storage is malformed")


def _pth(path: Path, unused: re.Pattern | None) -> list[Tensor]:
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            start = file.read(4)
        if start.startswith(b"PK"):
            raise _broken(path, "a zip archive without its end")
        raise UserError(f"{path} is not a zip archive of torch.save: save it again with torch 1.6 or later")
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as raw:
            return _pth_tensors(path, archive, raw, unused)
    except (zipfile.BadZipFile, struct.error, NotImplementedError, EOFError) as error:
        raise _broken(path, str(error)) from error


def _pth_tensors(
    path: Path, archive: zipfile.ZipFile, raw: io.BufferedReader, unused: re.Pattern | None
) -> list[Tensor]:
    entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1 or any(name.split("/")[1:2] == ["code"] for name in entries):
        raise UserError(f"{path} is a zip archive but not a state dict of torch.save: give the weights file")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries.values()):
        raise UserError(f"{path} is compressed or encrypted, which torch.save never does: unpack it")
    root = pickles[0].partition("/")[0]
    if entries[pickles[0]].file_size > _PICKLE_LIMIT:
        raise UserError(
            f"{path} is not a plain state dict: its pickle has over 100 MB; save model.state_dict() alone"
        )
    order = f"{root}/byteorder"
    if order in entries and archive.read(order) != b"little":
        raise UserError(f"{path} was saved on a big-endian machine: save it again on another machine")
    views = _state_dict(path, archive.read(pickles[0]))

    found, spans = [], []
    for name, view in views.items():
        if unused and unused.search(name) and view.storage.kind not in _STORAGES:
            continue
        entry = entries.get(f"{root}/data/{view.storage.key}")
        dtype = _dtype(path, name, _STORAGES.get(view.storage.kind, view.storage.kind))
        if entry is None or entry.file_size != view.storage.numel * dtype.itemsize:
            raise _broken(path, f"the storage of {name} is missing or of the wrong size")
        if not _contiguous(view):
            raise UserError(f"{path}: {name} is not contiguous: save it again with .contiguous()")
        begin = _data_offset(path, entry, raw) + view.offset * dtype.itemsize
        tensor = Tensor(
            name, dtype, view.shape, path, functools.partial(_load_pth, path, dtype, view.shape, begin)
        )
        if view.offset + math.prod(view.shape) > view.storage.numel:
            raise _broken(path, f"{name} reaches beyond its storage")
        found.append(tensor)
        spans.append((begin, begin + tensor.nbytes, name))
    spans = sorted(span for span in spans if span[0] < span[1])
    for (_, end, first), (begin, _, second) in zip(spans, spans[1:], strict=False):
        if begin < end:
            raise UserError(f"{path}: {first} and {second} share memory: save them again with .clone()")
    return found


def _load_pth(
    path: Path, dtype: np.dtype, shape: tuple[int, ...], begin: int, start: int, stop: int
) -> np.ndarray:
    """Rows of a tensor whose values begin at byte `begin` of the file."""
    row = math.prod(shape[1:])
    return np.fromfile(path, dtype, (stop - start) * row, offset=begin + start * row * dtype.itemsize)


def _state_dict(path: Path, data: bytes) -> dict[str, _View]:
    try:
        content = _StateDictUnpickler(io.BytesIO(data)).load()
    except _Forbidden as error:
        if re.search("_rebuild_(tensor_v3|qtensor|wrapper_subclass)|quant", str(error)):
            raise UserError(
                f"{path} needs {error}, for weights of a type such as float8 or int8: give unquantised ones"
            ) from error
        raise UserError(
            f"{path} is not a plain state dict: it needs {error}, and code of a file is never run; "
            "save model.state_dict() instead"
        ) from error
    except Exception as error:  # Any opcode may fail in any way on a damaged pickle.
        raise _broken(path, f"its pickle does not load: {error}") from error
    if isinstance(content, dict):
        # Next to the weights there may be plain values, such as the number of a step, but no other states.
        states = [key for key, value in content.items() if not isinstance(value, _PLAIN)]
        if len(states) == 1 and states[0] in _WRAPPERS:
            content = content[states[0]]
        elif wrapper := next(
            (key for key in states if key in _WRAPPERS and isinstance(content[key], Mapping)), None
        ):
            raise UserError(
                f"{path} is not a plain state dict: its entry {wrapper} is {_describe(content[wrapper])} and "
                f"next to it are {', '.join(_key(key) for key in states if key != wrapper)}, as in a "
                "training state; save model.state_dict() alone"
            )
    if not isinstance(content, dict) or not content:
        raise UserError(
            f"{path} is not a plain state dict but {_describe(content)}: save model.state_dict() alone"
        )
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, _View):
            raise UserError(
                f"{path} is not a plain state dict: its entry {_key(key)} is {_describe(value)}; "
                "save model.state_dict() alone"
            )
    return content


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict with the keys {', '.join(map(_key, list(value)[:4]))}" if value else "an empty dict"
    return "a tensor" if isinstance(value, _View) else f"of type {type(value).__name__}"


def _key(key: Any) -> str:
    return key[:80] if isinstance(key, str) else f"of type {type(key).__name__}"


def _contiguous(view: _View) -> bool:
    expected = 1
    for side, stride in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if side != 1 and stride != expected:
            return math.prod(view.shape) == 0
        expected *= side
    return True


def _data_offset(path: Path, entry: zipfile.ZipInfo, raw: io.BufferedReader) -> int:
    """Where the bytes of an uncompressed entry begin: after its local header and two variable fields."""
    raw.seek(entry.header_offset)
    header = raw.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise _broken(path, f"the entry {entry.filename} is not where the archive lists it")
    offset = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if offset + entry.file_size > os.path.getsize(path):
        raise _broken(path, f"the entry {entry.filename} reaches beyond the file")
    return offset
