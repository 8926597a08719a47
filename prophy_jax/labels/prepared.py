"""Prepared records as labels need them: their files, and the videos that they were made of.

N tokens, E categories, P of a clip, F frames of H x W pixels.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from prophy_jax.data import records, taxonomy
from prophy_jax.data.batch import Sizes
from prophy_jax.data.job import read_clips
from prophy_jax.data.sources import source, video
from prophy_jax.labels.earlier import EarlierLabels
from prophy_jax.run import storage
from prophy_jax.run.errors import UserError, counted, shortage

if TYPE_CHECKING:
    from prophy_jax.labels.labelling import View

PROBED = 8  # clips that must not all be unreadable
SEARCHED = 20  # clips of a part of the data, to find one with a phenomenon


class RecordFile(NamedTuple):
    """The examples of one file of the records: those of one shard of the labels."""

    bucket: str
    split: str
    index: int  # among the shards of the split
    first: int  # example of the bucket's split
    count: int


def list_files(data: str | Path, manifest: Mapping[str, Any]) -> dict[str, list[RecordFile]]:
    """Split -> files of the records, bucket by bucket."""
    files: dict[str, list[RecordFile]] = {}
    for bucket in manifest["buckets"]:
        splits = records.open_info(data, "records", bucket).splits
        for split in splits:
            own = files.setdefault(split, [])
            lengths = splits[split].shard_lengths
            for first, count in zip(itertools.accumulate(lengths, initial=0), lengths, strict=False):
                own.append(RecordFile(bucket, split, len(own), first, count))
    return files


def list_ids(data: str | Path, file: RecordFile) -> list[str]:
    """Of the clips of one file of the records, in their order."""
    stored = records.open_dataset(data, "records", file.bucket, file.split)
    return [str(stored.read(index)["id"], "utf-8") for index in range(file.first, file.first + file.count)]


def check_moved(data: str | Path, manifest: Mapping[str, Any], moved: Sequence[str]) -> Sequence[str]:
    """Where the sources of the records are now. Raises UserError unless each is named, or none."""
    paths = manifest["sources"]
    if moved and len(moved) != len(paths):
        raise UserError(
            f"{data} has {len(paths)} sources and {len(moved)} are named: name each with --source, in order"
        )
    return moved or paths


class Clip(NamedTuple):
    """A record as the model needs it: frames (F, H, W, 3) uint8, or None and why, or labels made earlier."""

    id: str
    category: np.ndarray  # (E,)
    frames: np.ndarray | None
    problem: str = ""
    labels: tuple[np.ndarray, np.ndarray] | None = None  # present (E,), maps (P, N)


class PreparedClips:
    """Prepared records, and the videos that they were made of.

    Args:
        data: the folder.
        moved: where its sources are now; none: where they were.
        known: the categories, which must be those of the records.

    Raises:
        UserError: no data, data of other categories, or the videos cannot be found.
    """

    def __init__(
        self, data: str | Path, moved: Sequence[str], known: taxonomy.Taxonomy = taxonomy.WISA
    ) -> None:
        self.data = storage.path(data)
        self.known = known
        self.manifest = records.read_manifest(data)
        known.check(self.manifest, data)
        self.fps = self.manifest["video"]["fps"]
        self.sizes = {bucket: Sizes.of(self.manifest, bucket) for bucket in self.manifest["buckets"]}
        self._source = self._open_source(moved)
        self._moved = bool(moved)
        self._arguments = data, moved, known
        self._rows = {(row["split"], row["bucket"], row["index"]): row for row in read_clips(data)}
        self._open: dict[tuple[str, str], Sequence] = {}
        self.files = list_files(data, self.manifest)
        probed = list(self.sample_evenly(PROBED))
        if probed and all(clip.frames is None for _, clip in probed):
            clip = probed[0][1]
            raise UserError(
                f"the videos of {data} cannot be read ({clip.id}: {clip.problem}); if they have moved, say "
                "where: --source=DIR"
            )

    def __reduce__(self) -> tuple:
        """Opened anew where it is unpickled, which finds out whether the videos can be read there."""
        return type(self), self._arguments

    def _open_source(self, moved: Sequence[str]):
        paths = check_moved(self.data, self.manifest, moved)
        if not paths:
            return source.draw_sandbox(
                ConfigDict({**self.manifest["video"], "sandbox": self.manifest["sandbox"]})
            )
        try:
            return source.read_sources(paths, known=self.known)
        except UserError as error:
            raise UserError(f"{error}; if the source has moved, say where it is: --source=DIR") from error

    def list_rows(self) -> dict[tuple[str, int], list[dict[str, Any]]] | None:
        """(split, shard) -> what the labels of each record follow from; None of data that does not tell."""
        frames = json.dumps(self.manifest.get("plan", {}).get("data"), sort_keys=True)
        frames = hashlib.sha256(frames.encode()).hexdigest()[:16]
        rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for file in itertools.chain(*self.files.values()):
            for index in range(file.first, file.first + file.count):
                row = self._rows.get((file.split, file.bucket, index))
                if row is None:
                    return None
                kept = {key: row[key] for key in ("id", "bucket", "sha256", "category")}
                rows.setdefault((file.split, file.index), []).append(kept | {"frames": frames})
        return rows

    def check_contents(self) -> None:
        """Raises UserError if videos are not those that the records were made of, and names their clips."""
        changed = [row["id"] for row in self._rows.values() if self._changed(row, read=not self._moved)]
        if changed:
            names = ", ".join(changed[:10]) + (f" and {len(changed) - 10} more" if len(changed) > 10 else "")
            raise UserError(
                f"{counted(len(changed), 'video')} changed since {self.data} was prepared ({names}): run "
                "prophy_jax.prepare again, which encodes anew what changed, then this command"
            )

    def _changed(self, row: Mapping[str, Any], read: bool) -> bool:
        """Whether a clip has another video now; without `read`, only whether its size tells."""
        clip = source.Clip(row["id"], "", np.zeros(0), row["source"], row["video"])
        if row["bucket"] is None or not row["sha256"]:
            return False
        if not read:
            return self._source.size(clip) not in (None, row["stamp"][0])
        return self._source.content(clip, row).get("sha256", row["sha256"]) != row["sha256"]

    def views(self, config: ConfigDict) -> dict[str, "View"]:
        """How the clips of each bucket are shown to the model."""
        from prophy_jax.labels import labelling

        every, cell = config.label.every, config.label.cell
        lead = self.manifest["codec"].get("lead", 0)
        return {
            bucket: labelling.View.of(
                sizes.token_grid,
                sizes.latent_shape[0],
                video.Bucket.parse(bucket).frames,
                self.fps,
                every,
                cell,
                lead,
            )
            for bucket, sizes in self.sizes.items()
        }

    def read(self, bucket: str, split: str, index: int, earlier: EarlierLabels | None = None) -> Clip:
        """The clip of one record, cropped as for the record; without frames if it shows no phenomenon."""
        if (bucket, split) not in self._open:
            self._open[bucket, split] = records.open_dataset(self.data, "records", bucket, split)
        stored = self._open[bucket, split][index]
        name, caption, place = (stored[key].decode() for key in ("id", "caption", "video"))
        category = stored["category"]
        if not category.any():
            return Clip(name, category, None)
        if earlier and (made := earlier.find(name)):
            return Clip(name, category, None, labels=(made["present"], made["maps"]))
        clip = source.Clip(name, caption, category, int(stored["source"]), place, split)
        row = self._rows.get((split, bucket, index))
        if row and self._moved and self._changed(row, read=True):
            return Clip(name, category, None, f"{place} is another video than the one that was prepared")
        try:
            sample = self._source.read(
                clip, [video.Bucket.parse(bucket)], self.fps, self.manifest["max_upscale"]
            )
        except UserError as error:
            if shortage(error):
                raise
            return Clip(name, category, None, str(error))
        return Clip(name, category, sample.frames)

    def show_something(self) -> bool:
        """Whether any clip shows a category. Reads records until it finds one."""
        return any(
            np.frombuffer(stored.read(index)["category"], np.float32).any()
            for own in self.files.values()
            for file in own
            for stored in [records.open_dataset(self.data, "records", file.bucket, file.split)]
            for index in range(file.first, file.first + file.count)
        )

    def sample_evenly(self, count: int) -> Iterator[tuple[RecordFile, Clip]]:
        """The first clip with a phenomenon in each of `count` parts of the data; it may be unreadable."""
        examples = [
            (file, file.first + i) for own in self.files.values() for file in own for i in range(file.count)
        ]
        starts = np.unique(np.linspace(0, len(examples), count, endpoint=False).astype(int))
        for begin, end in itertools.pairwise([*starts, len(examples)]):
            for file, index in examples[begin : min(end, begin + SEARCHED)]:
                clip = self.read(file.bucket, file.split, index)
                if clip.category.any():
                    yield file, clip
                    break


def read_ahead(
    reader: ThreadPoolExecutor,
    prepared: PreparedClips,
    file: RecordFile,
    batch: int,
    earlier: EarlierLabels | None = None,
) -> Iterator[list[Clip]]:
    """Yields the clips of a file in order, `batch` at a time, with the next ones being read meanwhile."""

    def read(first: int) -> list[Clip]:
        stop = min(first + batch, file.first + file.count)
        return [prepared.read(file.bucket, file.split, index, earlier) for index in range(first, stop)]

    firsts = range(file.first, file.first + file.count, batch)
    reading = (reader.submit(read, first) for first in firsts)
    for this, _ in itertools.pairwise(itertools.chain(reading, [None])):  # the next one is submitted by now
        yield this.result()
