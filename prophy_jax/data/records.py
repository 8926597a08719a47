"""Data sets on disk: written by `prophy_jax.prepare` and `.label`, read by `prophy_jax.data.loader`.

    DATA_DIR/manifest.json           what the records are and how they were made; there when all is there
    DATA_DIR/empty_text.npz          the encoded empty prompt (text, mask), for caption dropout
    DATA_DIR/statistics.md, .png     what the source holds
    DATA_DIR/records/81x480x832/     one TFDS data set "records" per bucket, with splits train, val, test
    DATA_DIR/alignment/81x480x832/   TFDS data set "alignment", same order; with exact labels (the sandbox)
    LABELS_DIR/manifest.json, LABELS_DIR/alignment/81x480x832/    the same, from `prophy_jax.label`
    DIR/work/                        shards and locks, until DIR is complete

All data sets are TFDS in array_record format with one record per group (random access), written and read
without TensorFlow. What each of their examples holds is in `prophy_jax.data.batch`.
"""

import contextlib
import functools
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module

import prophy_jax
from prophy_jax.data import batch
from prophy_jax.run import checksums, storage, workdir
from prophy_jax.run.errors import UserError

SCHEMA_VERSION = 2
SPLITS = ("train", "val", "test")
_THREADS = 64  # of array_record's pool, however many cores there are
# Of our columns, as TFDS writes them.
_CLASSES = {
    f"tensorflow_datasets.core.features.{name}"
    for name in ("features_dict.FeaturesDict", "scalar.Scalar", "tensor_feature.Tensor", "text_feature.Text")
}


def _is_side(value: Any) -> bool:
    return type(value) is int and value > 0


# What the manifest's values are that are read again, where it has them; see `workdir.parse_json`.
_MANIFEST = {
    **{key: str for key in ("fingerprint", "data_fingerprint")},
    **{key: [str] for key in ("sources", "categories", "stand_in", "unannotated", "label_not_among_answers")},
    **{key: dict for key in ("codec", "text_encoder", "plan")},
    "checksums": {str: str},
    **{key: _is_side for key in ("schema_version", "text_length", "text_dim")},
    **{key: [(str, str)] for key in ("skipped", "unreadable")},
    **{key: {str: int} for key in ("counts", "captions_cut")},
    "buckets": {str: {"counts": {str: int}, "latent_shape": (_is_side,) * 4, "token_grid": (_is_side,) * 3}},
    "video": {"fps": int | float, "frames": _is_side, "height": _is_side, "width": _is_side},
    "max_upscale": int | float,
    "cropped": [(str, (_is_side, _is_side), str)],
    "labels_not_understood": {str: {"clips": int, "first": str}},
}
_LISTED = ("clips.jsonl", "empty_text.npz", "*/*/features.json", "*/*/dataset_info.json")
_SHOWN = 20  # entries of a list that are printed; the manifest has all of them
_OPEN_FILES = 64  # of one data set and split at a time; many systems allow a process 1,024


def features(dataset: str, sizes: batch.Sizes, without: Sequence[str] = ()) -> tfds.features.FeaturesDict:
    """The TFDS features of a data set: the columns of its fields (`prophy_jax.data.batch`), and an id.

    The column "video" of the records says where the clip is in source number "source" of the manifest.

    Args:
        dataset: "records", or a side data set.
        sizes: of the bucket.
        without: optional columns that it does not have.
    """
    described = {"id": tfds.features.Text()}
    if dataset == batch.RECORDS:
        described |= {"caption": tfds.features.Text(), "source": tfds.features.Scalar(dtype=np.int64)}
        described |= {"video": tfds.features.Text()}
    for name, column in batch.columns(dataset).items():
        if name not in without:
            encoding = "bytes" if column.as_bytes else "none"
            described[name] = tfds.features.Tensor(
                shape=column.shape(sizes), dtype=column.dtype, encoding=encoding
            )
    return tfds.features.FeaturesDict(described)


def write_manifest(folder: storage.AnyPath, manifest: Mapping[str, Any]) -> None:
    """Writes DIR/manifest.json, with the schema version first; it makes the folder complete.

    It lists the checksums of the files beside it that have none of their own.
    """
    found = [path for pattern in _LISTED for path in sorted(folder.glob(pattern))]
    files = {path.relative_to(folder).as_posix(): storage.hash_file(path) for path in found}
    manifest = {"schema_version": SCHEMA_VERSION, **manifest, "checksums": files}
    text = json.dumps(checksums.sealed(manifest), indent=2)
    storage.write_atomically(folder / "manifest.json", text + "\n")


def check_files(data_dir: str | Path, *names: str) -> None:
    """Raises UserError where files of a finished folder are not as they were when that was finished."""
    root = storage.path(data_dir)
    if not (root / "manifest.json").is_file():
        return
    listed = read_manifest(data_dir).get("checksums", {})
    for name in filter(listed.get, names):
        if not (root / name).is_file():
            raise UserError(f"{root / name} is missing; make the data again")
        if listed[name] != storage.hash_file(root / name):
            raise UserError(f"{root / name} is damaged (not as it was written); make the data again")


def check_whole(data_dir: str | Path) -> None:
    """Raises UserError where files of a finished folder are missing."""
    listed = read_manifest(data_dir).get("checksums", {})
    for name in listed:
        if not (storage.path(data_dir) / name).is_file():
            raise UserError(f"{data_dir}/{name} is missing; make the data again")
        if name.endswith("/dataset_info.json"):
            dataset, bucket, _ = name.split("/")
            info = open_info(data_dir, dataset, bucket)
            for split in info.splits:
                _open_split(storage.path(data_dir) / dataset / bucket, info, split)


def read_manifest(data_dir: str | Path) -> dict[str, Any]:
    """The manifest of `data_dir`; UserError when it is absent, damaged or of another schema."""
    path = storage.path(data_dir) / "manifest.json"
    if not path.is_file():
        if (storage.path(data_dir) / "work").is_dir():
            raise UserError(f"{data_dir} is not finished: run the command that makes it again")
        raise UserError(
            f"no training data at {data_dir}; make it with: "
            f"python -m prophy_jax.prepare --config=... --out={data_dir}"
        )
    remedy = "make the data again"
    manifest = checksums.unsealed(workdir.read_json(path, remedy, _MANIFEST), str(path), remedy)
    version = manifest["schema_version"]
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {version}, this program reads version {SCHEMA_VERSION}; "
            "prepare the data again"
        )
    return manifest


class Dataset(Sequence[Mapping[str, Any]]):
    """Random access to the examples of one split, from any thread; see `open_dataset`.

    Of any number of shards, only the few that were read last are open.
    """

    def __init__(self, features: tfds.features.FeaturesDict, split: tfds.core.SplitInfo) -> None:
        self.columns = tuple(features.keys())
        self._features = features
        self._files = [str(path) for path in split.filepaths]
        self._where = os.path.dirname(self._files[0])
        self._ends = np.cumsum(split.shard_lengths)
        self._reader = functools.lru_cache(_OPEN_FILES)(_open_reader)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        serialized = self._serialized(index)
        try:
            return self._stored(self._features.deserialize_example_np(serialized))
        except Exception as error:  # TFDS lets many kinds pass from metadata of something else
            raise UserError(f"{self._where} does not fit its features.json; make the data again") from error

    def read(self, index: int) -> dict[str, memoryview]:
        """The values of one example as they are stored, none copied: the fast way for large arrays.

        Of arrays, their bytes; of texts, UTF-8; integers as encoded. UserError when the file is damaged.
        """
        # Each level of the format is a sequence of length-delimited fields.
        values = {}
        serialized = self._serialized(index)
        try:
            (features,) = _fields(memoryview(serialized))  # Example.features
            for entry in _fields(features):  # Features.feature, a map
                name, feature = _fields(entry)
                for kind in _fields(feature):  # bytes_list, float_list (packed) or int64_list
                    for value in _fields(kind):
                        values[str(name, "utf-8")] = value
        except (ValueError, IndexError) as error:
            raise UserError(f"a record of {self._where} is damaged; make the data again") from error
        return self._stored(values)

    def _stored(self, example: Mapping[str, Any]) -> workdir.Stored:
        return workdir.Stored(example, self._where, "make the data again")

    def _serialized(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[shard - 1]) if shard else 0
        path = self._files[shard]
        try:
            return self._reader(path).read([index - first])[0]
        except (RuntimeError, IndexError) as error:  # array_record raises RuntimeError
            raise UserError(f"{path} is damaged; make the data again") from error


def _fields(message: memoryview) -> Iterator[memoryview]:
    """The values of a Protocol Buffers message whose fields are length-delimited and numbered below 16.

    Decoded here because the classes that Protocol Buffers generates copy every value twice.
    """
    position = 0
    while position < len(message):
        position += 1  # the field's number
        size = shift = 0
        more = True
        while more:  # seven bits of the length a byte, the lowest first
            byte = message[position]
            size |= (byte & 127) << shift
            more = byte > 127
            shift, position = shift + 7, position + 1
        yield message[position : position + size]
        position += size


@functools.cache
def require_threads() -> None:
    """RuntimeError where the system refuses the threads that array_record starts with its first file.

    It waits forever itself then: they are started here first.
    """
    done = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(_THREADS):
            thread = threading.Thread(target=done.wait)
            thread.start()
            started.append(thread)
    finally:
        done.set()
        for thread in started:
            thread.join()


def _open_reader(path: str) -> array_record_module.ArrayRecordReader:
    require_threads()
    # Reading ahead would be in vain where the next record is of another file.
    return array_record_module.ArrayRecordReader(
        path, options="readahead_buffer_size:0", file_reader_buffer_size=32768
    )


def open_info(data_dir: str | Path, name: str, bucket: str) -> tfds.core.DatasetInfo:
    """What TFDS keeps about one bucket of a data set; UserError when it is missing or damaged."""
    folder = storage.path(data_dir) / name / bucket
    check_files(data_dir, f"{name}/{bucket}/features.json", f"{name}/{bucket}/dataset_info.json")
    if (folder / "features.json").exists():
        _check_classes(folder / "features.json")
    try:
        return tfds.builder_from_directory(folder).info
    except Exception as error:  # TFDS and Protocol Buffers let many kinds pass from damaged files
        raise UserError(f"{folder} is missing or damaged; make the data again") from error


def _check_classes(path: storage.AnyPath) -> None:
    """Raises UserError where a description of columns names a class that none of ours is of.

    TFDS would import the module of any that it does not know, and so run it.
    """
    described = workdir.read_json(path, "make the data again")
    for text in _texts(described):
        if "." in text and text not in _CLASSES:
            raise UserError(
                f"{path} names {text[:80]!r}, which no column of training data is: it is not read, since "
                "code of that name would run; make the data again"
            )


def _texts(value: Any) -> Iterator[str]:
    """All texts in JSON, but for the names of keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def open_dataset(data_dir: str | Path, name: str, bucket: str, split: str) -> Dataset:
    """The random-access examples of one split and bucket of data set "records" or "alignment".

    Raises UserError when the split does not exist or one of its files is missing; later, one that is damaged.
    """
    return _open_split(storage.path(data_dir) / name / bucket, open_info(data_dir, name, bucket), split)


def _open_split(folder: storage.AnyPath, info: tfds.core.DatasetInfo, split: str) -> Dataset:
    if split not in info.splits:
        raise UserError(f"{folder} has no split {split!r}; it has {sorted(info.splits)}")
    try:
        files, lengths = info.splits[split].filepaths, info.splits[split].shard_lengths
    except Exception:  # as in `open_info`
        files, lengths = [], []
    if min(lengths, default=0) < 1:
        raise UserError(f"{folder} is missing or damaged; make the data again")
    present = {path.name for path in storage.files_in(folder)}
    for path in files:
        if path.name not in present:
            raise UserError(f"{path} is missing; make the data again")
    return Dataset(info.features, info.splits[split])


def side_folder(data_dir: str | Path, dataset: str, named: str | Path | None) -> str | Path | None:
    """The folder that has a data set: `named`, or else the data's own if it has one."""
    if named:
        return named
    return data_dir if (storage.path(data_dir) / dataset).exists() else None


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of this program and of the packages that shape the data, where installed."""
    found = {"prophy_jax": prophy_jax.__version__}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def print_list(title: str, entries: Sequence[str], where: str = " in manifest.json") -> None:
    """Prints the first entries of a list, if it has any; `where` says where all are."""
    if entries:
        print(f"{title}: {len(entries)}")
        for entry in entries[:_SHOWN]:
            print(f"  {entry}")
        if len(entries) > _SHOWN:
            print(f"  ... and {len(entries) - _SHOWN} more{where}")
