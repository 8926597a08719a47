"""Reads prepared records as batches: deterministic, sliced per process, resumable to the record.

Every process walks the same endless, reshuffled stream of records and takes every P-th of it.
Global batch k is therefore the same set of records for any number of processes, each epoch holds
every record once, and a run may resume on another number of processes.

B global batch, P processes, T h w latent grid, N tokens, L text length, D text width.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from prophy_jax.data import records, taxonomy
from prophy_jax.errors import UserError


class _Examples:
    """Random access to records joined with their alignment, as unbatched numpy examples."""

    def __init__(self, data_dir: Path, split: str) -> None:
        manifest = records.read_manifest(data_dir)
        self._text_length = manifest["text_length"]
        self._num_tokens = manifest["num_tokens"]
        self._data_dir = data_dir
        self._records = records.open_source(data_dir, "records", split)
        self._alignment = None
        if (data_dir / "alignment").exists():
            self._alignment = records.open_source(data_dir, "alignment", split)
            if len(self._alignment) != len(self._records):
                raise UserError(
                    f"{data_dir}, split {split!r}: {len(self._records)} records but "
                    f"{len(self._alignment)} alignment labels; prepare the data again"
                )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        record = self._records[index]
        text = np.zeros((self._text_length, record["text"].shape[1]), np.float32)
        valid = len(record["text"])
        text[:valid] = record["text"]
        if self._alignment is None:
            alignment = np.zeros((self._num_tokens, taxonomy.NUM_PHENOMENA), np.float32)
            present = np.zeros(taxonomy.NUM_PHENOMENA, np.float32)
        else:
            label = self._alignment[index]
            if label["id"] != record["id"]:
                raise UserError(
                    f"{self._data_dir}: record {index} is {record['id'].decode()!r} but its "
                    f"alignment label is of {label['id'].decode()!r}; prepare the data again"
                )
            alignment, present = label["alignment"], label["present"]
        return {
            "latents": record["latents"],
            "text": text,
            "text_mask": np.arange(self._text_length) < valid,
            "category": record["category"],
            "alignment": alignment,
            "alignment_present": present,
            "id": np.str_(record["id"].decode()),
            "index": np.int64(index),
        }


def _stack(examples: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def make_loader(
    data_dir: str | Path,
    split: str,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    repeat: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """An iterator over one split, with this process's share of each batch.

    Each batch is a dict of numpy arrays with a leading B / P: latents (T, h, w, 16), text (L, D)
    with zero rows after the last valid one, category (17,), alignment (N, 17) and
    alignment_present (17,), all float32; text_mask (L,) bool; id () str; index () int64, the
    position within the split. Without alignment labels the two alignment arrays are zero.

    `get_state` and `set_state` of the iterator, or `grain.checkpoint`, resume it exactly.

    Args:
        data_dir: a folder written by `prophy_jax.prepare`.
        split: "train", "val" or "test".
        batch_size: B, over all processes.
        seed: of the shuffle; each epoch is shuffled anew.
        shuffle: False keeps the order on disk.
        repeat: True never ends: every batch holds B records, and one batch may span two epochs.
            False gives every record once, and the last batch may be smaller.
        process_index: which of the P processes this is.
        process_count: P.

    Raises:
        UserError: no data there, no such split, labels of another data set (also while reading), B
            does not divide by P, or B is larger than a split that repeats.
    """
    examples = _Examples(Path(data_dir), split)
    if batch_size % process_count:
        raise UserError(f"batch size {batch_size} does not divide over {process_count} processes")
    if repeat and len(examples) < batch_size:
        raise UserError(
            f"split {split!r} of {data_dir} has {len(examples)} records, fewer than the batch size "
            f"{batch_size}; lower the batch size or prepare more clips"
        )
    dataset = grain.MapDataset.source(examples).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    if repeat:
        dataset = dataset.repeat(None, reseed_each_epoch=True)
    dataset = dataset[process_index::process_count].batch(batch_size // process_count, batch_fn=_stack)
    # Threads suffice, as reading a record is little more than a copy. The buffer counts batches.
    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
    return iter(dataset.to_iter_dataset(options))


def load_empty_text(data_dir: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """The encoded empty prompt of the data: text (L, D) float32 and mask (L,) bool.

    Raises UserError when `data_dir` holds no prepared data.
    """
    records.read_manifest(data_dir)
    path = Path(data_dir) / "empty_text.npz"
    if not path.is_file():
        raise UserError(f"{path} is missing; prepare the data again")
    with np.load(path) as stored:
        return stored["text"], stored["mask"]
