"""Reads prepared records as batches: deterministic, shared between processes, resumable to the batch.

Each batch is of one bucket (size and length of video). The records of a bucket are an endless stream,
shuffled anew each epoch and cut into global batches; buckets take turns in proportion to their clips. Global
batch k follows from k and the seed alone, and each process reads those of its rows that its devices hold. So
row r is the same record for any number of processes, and a run may resume on another number of them.

B global batch, b rows of one process, T h w latent grid, N tokens, L text length, D text width, M phenomena
with a map.
"""

import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from prophy_jax.data import records, taxonomy
from prophy_jax.run.errors import UserError

# Threads suffice: reading a record is checking and copying it, in code that runs beside Python. Each reads a
# whole batch, so the buffer counts batches.
_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
_PLACED_AHEAD = 2  # batches on the devices before they are asked for


class _Bucket:
    """The records of one bucket and split, joined with their labels by position."""

    def __init__(
        self,
        data_dir: str | Path,
        split: str,
        bucket: str,
        manifest: Mapping[str, Any],
        labels: str | Path | None,
    ) -> None:
        description = manifest["buckets"][bucket]
        self._latent_shape = tuple(description["latent_shape"])
        self._num_tokens = math.prod(description["token_grid"])
        self._text_shape = manifest["text_length"], manifest["text_dim"]
        self._records = records.open_dataset(data_dir, "records", bucket, split)
        self._data_dir, self._labels_dir, self._labels = data_dir, labels, None
        if labels is not None:
            self._labels = records.open_dataset(labels, "alignment", bucket, split)
            if len(self._labels) != len(self._records):
                raise UserError(
                    f"{data_dir} has {len(self._records)} records of {bucket}, split {split!r}, but {labels} "
                    f"has {len(self._labels)} labels; make the labels again"
                )

    def __len__(self) -> int:
        return len(self._records)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The batch of records `indices` (b,); each array is copied once, from the bytes of its record."""
        rows = len(indices)
        batch = {
            "latents": np.empty((rows, *self._latent_shape), np.float16),
            "text": np.zeros((rows, *self._text_shape), np.float16),
            "text_mask": np.zeros((rows, self._text_shape[0]), bool),
            "category": np.empty((rows, taxonomy.NUM_PHENOMENA), np.float32),
            "alignment": np.empty((rows, self._num_tokens, taxonomy.NUM_PHENOMENA), np.float16),
            "alignment_present": np.zeros((rows, taxonomy.NUM_PHENOMENA), np.float32),
            "index": indices,
        }
        names = []
        for row, index in enumerate(indices):
            record = self._records.read(index)
            name = bytes(record["id"]).decode()
            names.append(name)
            batch["latents"][row] = np.frombuffer(record["latents"], np.float16).reshape(self._latent_shape)
            text = np.frombuffer(record["text"], np.float16).reshape(-1, self._text_shape[1])  # (n, D)
            batch["text"][row, : len(text)] = text
            # Without a mask, every stored row is a word or the end.
            mask = np.frombuffer(record["text_mask"], np.uint8) if "text_mask" in record else True
            batch["text_mask"][row, : len(text)] = mask
            batch["category"][row] = np.frombuffer(record["category"], np.float32)
            batch["alignment"][row] = 0  # here, as memory that comes zeroed is slower to write to
            if self._labels is not None:
                label = self._labels.read(index)
                labelled = bytes(label["id"]).decode()
                if labelled != name:
                    raise UserError(
                        f"record {index} of {self._data_dir} is {name!r} but its label in {self._labels_dir} "
                        f"is of {labelled!r}; make the labels again"
                    )
                present = np.frombuffer(label["present"], np.float32)
                maps = np.frombuffer(label["maps"], np.float16).reshape(-1, self._num_tokens)  # (M, N)
                batch["alignment"][row][:, present > 0] = maps.T
                batch["alignment_present"][row] = present
        return batch | {"id": np.array(names, np.str_)}


def make_loader(
    data_dir: str | Path,
    split: str,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    repeat: bool = True,
    rows: Sequence[int] | None = None,
    side: Mapping[str, str] | None = None,
    place: Callable[[dict[str, np.ndarray]], Any] | None = None,
) -> grain.DatasetIterator:
    """An iterator over one split, with this process's rows of each batch.

    Each batch is a dict of numpy arrays with a leading b: latents (T, h, w, 16), text (L, D) padded as its
    encoder pads it, alignment (N, 17), all float16; category (17,) and alignment_present (17,) float32;
    text_mask (L,) bool, True on the words and their end; id () str; index () int64, the position within the
    bucket and split. Without alignment labels the two alignment arrays are zero.

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
        labels: a folder written by `prophy_jax.label`; "" takes the labels of `data_dir` itself, if any.
        place: turns a batch into what the iterator gives, such as arrays on devices. It runs in one thread,
            two batches ahead.

    Raises:
        UserError: no data there, no such split, labels of another data set (also while reading), damaged
            files (while reading), or B is larger than a split that repeats.
    """
    buckets = _open_buckets(data_dir, split, (side or {}).get("alignment", ""))
    count = sum(len(bucket) for bucket in buckets)
    if repeat and count < batch_size:
        raise UserError(
            f"split {split!r} of {data_dir} has {count} records, fewer than the batch size {batch_size}; "
            "lower the batch size or prepare more clips"
        )
    parts = []
    for bucket in buckets:
        indices = grain.MapDataset.range(len(bucket)).seed(seed)
        if shuffle:
            indices = indices.shuffle()
        if repeat:
            indices = indices.repeat(None, reseed_each_epoch=True)
        # Global batches of indices.
        batches = indices.batch(batch_size)
        if rows is not None:  # only they are read
            batches = batches.map(lambda batch: batch[np.asarray(rows)])
        parts.append(batches.map(bucket.read))
    if repeat:
        dataset = grain.MapDataset.mix(parts, weights=[len(bucket) for bucket in buckets])
    else:
        dataset = grain.MapDataset.concatenate(parts)
    batches = dataset.to_iter_dataset(_READ)
    if place is not None:
        batches = grain.experimental.ThreadPrefetchIterDataset(
            batches.map(place), prefetch_buffer_size=_PLACED_AHEAD
        )
    return iter(batches)


def _open_buckets(data_dir: str | Path, split: str, labels: str | Path) -> list[_Bucket]:
    manifest = records.read_manifest(data_dir)
    if labels:
        if not Path(labels).is_dir():
            raise UserError(
                f"no labels at {labels}; make them with: "
                f"python -m prophy_jax.label --data={data_dir} --out={labels}"
            )
        if records.read_manifest(labels).get("data_fingerprint") != manifest["fingerprint"]:
            raise UserError(f"the labels {labels} belong to another data set than {data_dir}; label that one")
    names = [name for name, found in manifest["buckets"].items() if found["counts"].get(split)]
    if not names:
        found = ", ".join(split for split in records.SPLITS if manifest["counts"].get(split))
        raise UserError(f"{data_dir} has no split {split!r}; it has {found}")
    folder = records.find_labels(data_dir, labels)
    return [_Bucket(data_dir, split, name, manifest, folder) for name in names]


def load_empty_text(data_dir: str | Path) -> dict[str, np.ndarray]:
    """The encoded empty prompt of the data: text (L, D) float32 and text_mask (L,) bool.

    Raises UserError when `data_dir` holds no prepared data, or it is damaged.
    """
    records.read_manifest(data_dir)
    path = Path(data_dir) / "empty_text.npz"
    if not path.is_file():
        raise UserError(f"{path} is missing; prepare the data again")
    try:
        with np.load(path) as stored:
            return {"text": stored["text"], "text_mask": stored["mask"]}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged; prepare the data again") from error
