"""Reads prepared records as batches: deterministic, shared between processes, resumable to the batch.

Each batch is of one bucket (size and length of video). The records of a bucket are an endless stream,
shuffled anew each epoch and cut into global batches; buckets take turns in proportion to their clips. Where
the sources of the data have weights, so do the streams that each bucket is mixed from, one a source. Global
batch k follows from k and the seed alone, and each process reads those of its rows that its devices hold. So
row r is the same record for any number of processes, and a run may resume on another number of them.

B global batch, b rows of one process, L text length, D text width.
"""

import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from prophy_jax.data import batch, job, records, taxonomy
from prophy_jax.run import storage, workdir
from prophy_jax.run.errors import UserError, counted

# Threads suffice: reading a record is checking and copying it, in code that releases Python's lock. Each
# reads a whole batch, so the buffer counts batches.
_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
_PLACED_AHEAD = 2  # batches on the devices before they are asked for
_EPOCHS = 10**9  # of a stream that never ends: Grain cannot mix streams of endless batches of one


class _Bucket:
    """The records of one bucket and split, joined with side data sets by position.

    Attributes:
        name: of the bucket.

    Args:
        folders: data set -> its folder; the records come first.
        fields: names of the arrays to read; zeros stand for those whose data set is not among `folders`.
    """

    def __init__(
        self,
        folders: Mapping[str, str | Path],
        fields: Sequence[str],
        split: str,
        bucket: str,
        sizes: batch.Sizes,
    ) -> None:
        self.name = bucket
        self._folders = folders
        self._fields = {name: batch.FIELDS[name] for name in fields}
        self._shapes = {name: field.shape(sizes) for name, field in self._fields.items()}
        self._datasets: dict[str, records.Dataset] = {}
        self._columns: dict[str, dict[str, tuple[Any, list[int]]]] = {}
        for stored, folder in folders.items():
            dataset = self._datasets[stored] = records.open_dataset(folder, stored, bucket, split)
            if len(dataset) != len(self):
                own = counted(len(self), "record")
                raise UserError(
                    f"{folders[batch.RECORDS]} has {own} of {bucket}, split {split!r}, but "
                    f"{stored!r} of {folder} has {len(dataset)} examples; make {stored!r} again"
                )
            self._columns[stored] = {
                name: (column.dtype, [-1 if side is None else side for side in column.shape(sizes)])
                for name, column in batch.columns(stored).items()
                if name in dataset.columns
            }

    def __len__(self) -> int:
        return len(self._datasets[batch.RECORDS])

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The batch of records `indices` (b,); each array is copied once, from the bytes of its record."""
        arrays = {}
        for name, field in self._fields.items():
            # Memory that comes zeroed is slower to write to.
            create = np.empty if field.stored in self._folders else np.zeros
            arrays[name] = create((len(indices), *self._shapes[name]), field.dtype)
        ids = [self._read_row(arrays, row, index) for row, index in enumerate(indices)]
        return arrays | {"index": indices, "id": np.array(ids, np.str_)}

    def _read_row(self, arrays: dict[str, np.ndarray], row: int, index: int) -> str:
        """Writes record `index` into row `row` of each array, and returns its id."""
        record_id = ""
        for stored, dataset in self._datasets.items():
            values = dataset.read(index)
            own_id = str(values["id"], "utf-8")
            record_id = record_id or own_id
            if own_id != record_id:
                raise UserError(
                    f"record {index} of {self._folders[batch.RECORDS]} is {record_id!r}, but in {stored!r} "
                    f"of {self._folders[stored]} it is {own_id!r}; make {stored!r} again"
                )
            where, remedy = f"record {index} of {self._folders[stored]}", f"make {stored!r} again"
            try:
                columns = {
                    name: np.frombuffer(values[name], dtype).reshape(shape)
                    for name, (dtype, shape) in self._columns[stored].items()
                }
            except ValueError as error:
                raise UserError(f"{where} does not fit its manifest.json ({error}); {remedy}") from error
            columns = workdir.Stored(columns, where, remedy)
            for name, field in self._fields.items():
                if field.stored == stored:
                    if field.fill is None:
                        arrays[name][row] = columns[name]
                    else:
                        field.fill(arrays[name][row], columns)
        return record_id


def make_loader(
    data_dir: str | Path,
    split: str,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    repeat: bool = True,
    rows: Sequence[int] | None = None,
    side: Mapping[str, str | Path] | None = None,
    fields: Sequence[str] | None = None,
    place: Callable[[dict[str, np.ndarray]], Any] | None = None,
    weights: Sequence[float] = (),
) -> grain.DatasetIterator:
    """An iterator over one split, with this process's rows of each batch.

    Each batch is a dict of numpy arrays with a leading b: the fields, see `prophy_jax.data.batch`; id () str;
    index () int64, the position within the bucket and split.

    `get_state` (JSON types) and `set_state` of the iterator resume it exactly, with and without
    `place` and on any number of processes. Batches are read, and placed, ahead of their use in threads;
    `close` ends them.

    Args:
        data_dir: a folder written by `prophy_jax.prepare`.
        split: "train", "val" or "test".
        batch_size: B, over all processes.
        seed: of the shuffle; each epoch is shuffled anew.
        shuffle: False keeps the order on disk.
        repeat: True never ends: every batch holds B records, and one batch may span two epochs of its bucket.
            False gives every record once, bucket after bucket; the last batch of a bucket may be smaller.
        rows: which rows of each global batch to read, see `prophy_jax.run.parallel.local_rows`; None: all.
            Only with `repeat`.
        side: side data set -> its folder, such as {"alignment": a folder of `prophy_jax.label`}. Where it is
            "" or absent, the data set is that of `data_dir` itself, if it has one.
        fields: names of the arrays to read; None reads all that are there.
        place: turns a batch into what the iterator gives, such as arrays on devices. It runs in one thread,
            two batches ahead.
        weights: how many of the clips read come from each source of the data, in their order and relative to
            one another; a source of weight 0 is left out. (): in proportion to their clips. Only with
            `repeat`.

    Raises:
        UserError: no data there, no such split, a side data set of other data (also while reading), a field
            that is not there, damaged files (while reading), B is larger than a split that repeats, or
            weights that do not fit the sources.
    """
    buckets = _open_buckets(data_dir, split, side or {}, fields)
    streams = [[(1.0 * len(bucket), np.arange(len(bucket)))] for bucket in buckets]
    if len(weights):
        streams = _weigh(data_dir, split, [bucket.name for bucket in buckets], weights)
    count = sum(len(indices) for stream in streams for _, indices in stream)
    if repeat and count < batch_size:
        raise UserError(_too_few(data_dir, split, count, batch_size, bool(len(weights))))
    parts, shares = [], []
    for bucket, stream in zip(buckets, streams, strict=True):
        if not stream:
            continue
        sources = []
        for _, own in stream:
            indices = grain.MapDataset.source(own).seed(seed)
            if shuffle:
                indices = indices.shuffle()
            if repeat:
                indices = indices.repeat(_EPOCHS, reseed_each_epoch=True)
            sources.append(indices)
        shares.append(sum(share for share, _ in stream))
        if len(sources) > 1:
            sources = [grain.MapDataset.mix(sources, weights=[share / shares[-1] for share, _ in stream])]
        batches = sources[0].batch(batch_size)  # global batches of indices
        if rows is not None:  # only they are read
            batches = batches.map(lambda whole: whole[np.asarray(rows)])
        parts.append(batches.map(bucket.read))
    mixed = grain.MapDataset.mix(parts, weights=shares) if repeat else grain.MapDataset.concatenate(parts)
    batches = mixed.to_iter_dataset(_READ)
    if place is not None:
        batches = grain.experimental.ThreadPrefetchIterDataset(
            batches.map(place), prefetch_buffer_size=_PLACED_AHEAD
        )
    return iter(batches)


def _too_few(data_dir: str | Path, split: str, count: int, batch_size: int, weighed: bool) -> str:
    """Says that `count` clips are fewer than a batch, where the others are, and what to do."""
    manifest = records.read_manifest(data_dir)
    counts, held = manifest["counts"], ""
    if split == "train" and counts.get("val") and not (weighed or manifest.get("stand_in")):
        held = f" ({counts['val']} of {sum(counts.values())} went to validation)"
    kind = {"train": "training", "val": "validation"}.get(split, split)
    return (
        f"{data_dir} has {counted(count, f'{kind} clip')}{held}, fewer than config.batch_size={batch_size}"
        f": pass --config.batch_size={count}{' or less' * (count > 1)}, or prepare more clips"
    )


def _weigh(
    data_dir: str | Path, split: str, buckets: Sequence[str], weights: Sequence[float]
) -> list[list[tuple[float, np.ndarray]]]:
    """For each bucket the streams that it is mixed from: a share of all clips read, and indices of records.

    What comes from one source is spread over its buckets in proportion to its clips there.
    """
    what = f"config.data.weights={tuple(weights)}"
    rows = [row for row in job.read_clips(data_dir) if row["split"] == split and row["bucket"] is not None]
    if not rows:
        raise UserError(
            f"{data_dir} does not say which source its clips are of, so that {what} cannot be applied: it is "
            "of the sandbox, or of an earlier version; prepare it again from sources, or leave weights empty"
        )
    counts = Counter(row["source"] for row in rows)
    paths = records.read_manifest(data_dir)["sources"]
    found = ", ".join(
        f"{number} {path}: {counted(counts[number], 'clip')}" for number, path in enumerate(paths)
    )
    found = f"the sources of {data_dir} are, in split {split!r}, {found}"
    if not max(counts) < len(weights) <= len(paths):
        raise UserError(f"{what}: give one number for each source; {found}")
    unused = [number for number, weight in enumerate(weights) if weight and not counts[number]]
    if unused or not any(weights):
        which = f"source {unused[0]} has no clip" if unused else "no source is left"
        raise UserError(f"{what}: {which}; {found}")
    streams: list[list[tuple[float, np.ndarray]]] = []
    for bucket in buckets:
        own: dict[int, list[int]] = {}
        for row in rows:
            if row["bucket"] == bucket and weights[row["source"]]:
                own.setdefault(row["source"], []).append(row["index"])
        streams.append(
            [
                (weights[source] * len(own[source]) / counts[source], np.array(own[source]))
                for source in sorted(own)
            ]
        )
    return streams


def read_once(data: Any, split: str, batch_size: int, fields: Sequence[str]) -> grain.DatasetIterator:
    """`make_loader` of `config.data`, with every record of a split once, in the order on disk."""
    in_order = {"shuffle": False, "repeat": False, "side": data.side, "fields": fields}
    return make_loader(data.dir, split, batch_size, 0, **in_order)


def find_zero_fields(
    data: Any, split: str, fields: Sequence[str], clips: int = 64
) -> tuple[frozenset[str], int]:
    """Which of `fields` are zero in all clips of a split of `config.data`, by a look at some, spread over it.

    Returns:
        Their names, and at how many clips it looked. It stops when none is left.
    """
    zero, looked = set(fields), 0
    buckets = _open_buckets(data.dir, split, data.side, fields) if fields else []
    total = sum(map(len, buckets))
    for bucket in buckets:
        count = -(-min(clips, total) * len(bucket) // total)  # its share, rounded up
        for index in np.unique(np.linspace(0, len(bucket) - 1, count).astype(int)):
            if not zero:
                return frozenset(), looked
            found, looked = bucket.read(np.array([index])), looked + 1
            zero -= {name for name in zero if found[name].any()}
    return frozenset(zero), looked


def _open_buckets(
    data_dir: str | Path, split: str, side: Mapping[str, str | Path], fields: Sequence[str] | None
) -> list[_Bucket]:
    manifest = records.read_manifest(data_dir)
    wanted = list(batch.FIELDS) if fields is None else fields
    folders = {batch.RECORDS: data_dir}
    for stored in dict.fromkeys(batch.FIELDS[name].stored for name in wanted):
        if side.get(stored):
            _check_side(data_dir, manifest, stored, side[stored])
        folder = records.side_folder(data_dir, stored, side.get(stored))
        if folder is not None:
            folders[stored] = folder
    buckets = [name for name, found in manifest["buckets"].items() if found["counts"].get(split)]
    if not buckets:
        found = ", ".join(split for split in records.SPLITS if manifest["counts"].get(split))
        raise UserError(f"{data_dir} has no split {split!r}; it has {found}")
    columns = {
        stored: records.open_info(folder, stored, buckets[0]).features.keys()
        for stored, folder in folders.items()
    }
    absent = [name for name in wanted if not _is_there(name, columns)]
    if absent and fields is not None:
        stored = batch.FIELDS[absent[0]].stored
        raise UserError(
            f"{folders.get(stored, data_dir)} has no {absent[0]!r} for its clips; make it with "
            f"{batch.MADE_BY.get(stored, 'its command')}, or name the folder that has it with "
            f"--config.data.side.{stored}=DIR"
        )
    wanted = [name for name in wanted if name not in absent]
    return [_Bucket(folders, wanted, split, bucket, batch.Sizes.of(manifest, bucket)) for bucket in buckets]


def _is_there(name: str, columns: Mapping[str, Any]) -> bool:
    """Whether a field can be read, or zeros may stand for it; columns: data set -> its columns."""
    field = batch.FIELDS[name]
    if field.stored not in columns:
        return field.zero_if_absent
    needed = batch.own_columns(name).items()
    return all(column.optional or own in columns[field.stored] for own, column in needed)


def _check_side(data_dir: str | Path, manifest: Mapping[str, Any], stored: str, folder: str | Path) -> None:
    """Raises UserError unless `folder` was made for the records of `data_dir`, whose manifest is given."""
    if not storage.path(folder).is_dir():
        make = batch.how_to_make(stored, data_dir, folder)
        raise UserError(f"no {stored!r} at {folder}; make it with: {make}")
    own = records.read_manifest(folder)
    was, now = (taxonomy.names_of(one) for one in (own, manifest))
    if "categories" in own and was != now:
        raise UserError(
            f"{stored!r} of {folder} has {taxonomy.describe(was)}, {data_dir} has {taxonomy.describe(now)}; "
            "make it for that one"
        )
    if own.get("data_fingerprint") != manifest["fingerprint"]:
        raise UserError(
            f"{stored!r} of {folder} belongs to another data set than {data_dir}; make it for that one"
        )


def load_empty_text(data_dir: str | Path) -> dict[str, np.ndarray]:
    """The encoded empty prompt of the data: text (L, D) float32 and text_mask (L,) bool.

    Raises UserError when `data_dir` holds no prepared data, or it is damaged.
    """
    records.read_manifest(data_dir)
    records.check_files(data_dir, "empty_text.npz")
    path = storage.path(data_dir) / "empty_text.npz"
    if not path.is_file():
        raise UserError(f"{path} is missing; prepare the data again")
    try:
        with path.open("rb") as file, np.load(file) as stored:
            return {"text": stored["text"], "text_mask": stored["mask"]}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged; prepare the data again") from error
