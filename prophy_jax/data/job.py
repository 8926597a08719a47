"""A folder of data sets that any number of processes write, shard by shard, through any interruption.

DIR/work/plan.json               all that decides what is written
DIR/work/train-00000.json        one report for each shard that is made, next to its files
DIR/clips.jsonl                  a row for each clip that was tried: what it was made of, and where it is
DIR/manifest.json and the rest   when all is there, see `prophy_jax.data.records`; "work" is gone then
"""

import contextlib
import hashlib
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from prophy_jax.data import records
from prophy_jax.run import checksums, lock, storage, workdir
from prophy_jax.run.errors import UserError, counted

CLIPS = "clips.jsonl"
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
# Of what types the values of a row of CLIPS and of a shard's report are; see `workdir.parse_json`.
_ROW = {
    **{key: str for key in ("id", "split", "video", "caption", "frames")},
    **{key: str | None for key in ("bucket", "sha256")},
    **{"source": int, "index": int | None, "category": [int], "stamp": list | None, "shown": list | None},
}
_REPORT = {"datasets": {str: {"count": int, "bytes": int}}, "ids": {str: [str]}, "rows": [_ROW]}
_OPTIONS = "group_size:1,uncompressed"  # float16 noise hardly shrinks, and would take thrice as long to read


class Job:
    """A folder of data sets that any number of processes write, shard by shard, through any interruption.

    A shard is a fixed piece of the work. What it holds depends on the plan alone, not on who writes it or
    when, so the finished folder is the same for 1 and for 100 processes, interrupted or not. A shard appears
    under its name when it is whole, with a JSON file that says so and reports on it; one that was interrupted
    is made again. Process i of P makes the shards i, i + P, ..., or has them made (`prophy_jax.run.engine`);
    the last to be done puts them together.

    Args:
        out: the folder.
        plan: JSON types; all that decides what is written. A folder begun by another plan is refused.
        shards: number of shards of each split.
        process: (i, P).
        rows: (split, shard) -> a row for each of its clips in order: "id" and what it is made of; None stands
            for what is known only once the clip is made. The maker of a shard notes its rows as "rows". A
            finished folder of other rows is brought up to date: it stays as it is until all shards are made.
        inputs: keys of the plan that say which clips there are; with `rows` they may differ.

    Raises:
        UserError: `out` is of another plan, is something else, or cannot be written.
    """

    def __init__(
        self,
        out: str | Path,
        plan: Mapping[str, Any],
        shards: Mapping[str, int],
        process: tuple[int, int] = (0, 1),
        rows: Mapping[tuple[str, int], list[dict[str, Any]]] | None = None,
        inputs: tuple[str, ...] = (),
    ) -> None:
        self.out = storage.path(out)
        self._plan, self._rows = plan, rows
        self._work = self.out / "work"
        self._shards = [(split, index) for split in shards for index in range(shards[split])]
        self._process = process

        def compare(stored: dict[str, Any], own: dict[str, Any], free: bool = rows is not None) -> str:
            without = [key for key in inputs if free or key == "clips_sha256"]
            other = not free and any(stored.get(key) != own.get(key) for key in without)
            rest = workdir.differences(
                *({key: value for key, value in one.items() if key not in without} for one in (stored, own))
            )
            return "; ".join(filter(None, ("different clips" if other else "", rest)))

        def compare_finished(_, own: dict[str, Any]) -> str:
            stored = records.read_manifest(self.out).get("plan", {})
            known = (self.out / CLIPS).exists()  # not in folders of earlier versions
            return compare(stored, own, known and rows is not None)

        with _writing(self.out):
            if (self.out / "manifest.json").exists():
                workdir.claim(self.out, "manifest.json", plan, "--out", compare_finished)
                if not self.complete():
                    self._work.mkdir(exist_ok=True)
                    storage.write_atomically(self._work / "plan.json", json.dumps(checksums.sealed(plan)))
            else:
                workdir.claim(self.out, "work/plan.json", plan, "--out", compare, lambda _, own: own)

    def complete(self) -> bool:
        """Whether the folder is finished, and of these clips."""
        if not (self.out / "manifest.json").exists():
            return False
        plan = json.loads(json.dumps(self._plan))
        if self._rows is not None and records.read_manifest(self.out).get("plan") != plan:
            return False
        if self._rows is None or not (self.out / CLIPS).exists():
            records.check_files(self.out, CLIPS)
            return True
        own = [{"split": split, **row} for (split, _), rows in self._rows.items() for row in rows]
        return _agree(own, read_clips(self.out))

    def _name(self, split: str, index: int) -> storage.AnyPath:
        return self._work / f"{split}-{index:05d}"

    def missing(self) -> list[tuple[str, int]]:
        """(split, shard) of what is still to be made, by all processes."""
        if self.complete():
            return []
        return [shard for shard in self._shards if not self._made(*shard)]

    @contextlib.contextmanager
    def share(self) -> Iterator[list[tuple[str, int]]]:
        """Gives (split, shard) of what this process is to make, and keeps others from making the same.

        Raises UserError when another process is at it.
        """
        first, step = self._process
        mine = set(self.missing()).intersection(self._shards[first::step])
        with contextlib.ExitStack() as stack:
            if mine:
                remedy = (
                    "wait for it, stop it, or give each its share of the work with --process=0/2, "
                    "--process=1/2 and so on"
                )
                file = f"process-{first}-of-{step}.lock"
                with _writing(self.out):
                    stack.enter_context(lock.held(self._work, "prophy_jax", file, remedy=remedy))
            yield [shard for shard in self._shards if shard in mine and not self._made(*shard)]

    def _made(self, split: str, index: int) -> bool:
        """Whether a shard is there and whole, and of these rows. One that is damaged is made again."""
        try:
            report = _read_report(self._report(split, index))
            for dataset, size in report["datasets"].items():
                path = _part(self._name(split, index), dataset)
                if storage.size(path) != size.get("file", [storage.size(path)])[0]:
                    return False
        except (FileNotFoundError, NotADirectoryError, UserError):
            return False
        return self._rows is None or _agree(self._rows[split, index], report.get("rows", []))

    def _report(self, split: str, index: int) -> storage.AnyPath:
        return _report(self._name(split, index))

    def shard(self, split: str, index: int) -> contextlib.AbstractContextManager["Shard"]:
        """Makes one shard, see `make_shard`."""
        return make_shard(self.out, split, index)

    def finish(self, describe: Callable[[list[dict[str, Any]]], tuple[dict, dict]]) -> dict[str, Any] | None:
        """Puts the folder together if every shard is made; does nothing otherwise.

        Args:
            describe: takes the reports of all shards in order, each {"split", "shard", "datasets", "ids", and
                what was noted}; returns the features of each data set ("records/81x480x832") and the rest of
                the manifest.

        Returns:
            The manifest; None when shards are missing, which it prints.
        """
        with _writing(self.out):
            if missing := self.missing():
                index, count = self._process
                print(
                    f"process {index} of {count} is done; {counted(len(missing), 'shard')} left to the others"
                )
                return None
            try:
                with lock.held(self._work, "prophy_jax", "finish.lock", wait=True):
                    if not self.complete():
                        self._put_together(describe)
                    storage.remove(self._work)
            except FileNotFoundError:
                if not self.complete():  # otherwise another process did it meanwhile
                    raise
        records.check_whole(self.out)
        return records.read_manifest(self.out)

    def _put_together(self, describe: Callable[[list[dict[str, Any]]], tuple[dict, dict]]) -> None:
        reports = [_read_report(self._report(*shard)) for shard in self._shards]
        listed = {}
        for report, (split, index) in zip(reports, self._shards, strict=True):
            report |= {"split": split, "shard": index}
            for dataset, size in report["datasets"].items():
                if "file" in size:  # earlier versions noted none
                    listed[_part(self._name(split, index), dataset).name] = size.pop("file")
        with checksums.verified(self._work, listed, "delete it and run the same command again"):
            pass
        _fill_empty_split(reports)
        features, manifest = describe(reports)
        if self._rows is not None:  # the folder may have been finished for other clips
            (self.out / "manifest.json").unlink(missing_ok=True)
            for name in {dataset.split("/")[0] for dataset in features}:
                storage.remove(self.out / name)
            lines = [json.dumps(checksums.sealed(row)) for row in _place(reports)]
            storage.write_atomically(self.out / CLIPS, "\n".join(lines) + "\n")
        for dataset in features:
            self._assemble(dataset, features[dataset], reports)
        plan = json.loads(json.dumps(self._plan))
        records.write_manifest(
            self.out, {**manifest, "fingerprint": _fingerprint(plan, reports), "plan": plan}
        )

    def _assemble(self, dataset: str, features: tfds.features.FeaturesDict, reports: list[dict]) -> None:
        """Gives the shards of one data set their final names, and writes the metadata of TFDS.

        May be interrupted and done again.
        """
        folder, name = self.out / dataset, dataset.split("/")[0]
        folder.mkdir(parents=True, exist_ok=True)
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=name, filetype_suffix="array_record", template=_TEMPLATE
        )
        filled = defaultdict(list)  # split -> (file, examples, bytes)
        for report in reports:
            size = report["datasets"].get(dataset)
            if size:
                file = _part(
                    self._name(*report.get("stands_in", (report["split"], report["shard"]))), dataset
                )
                filled[report["split"]].append((file, size["count"], size["bytes"]))
        infos = []
        for split, files in filled.items():
            names = template.replace(split=split)
            for index, (path, _, _) in enumerate(files):
                final = names.sharded_filepath(shard_index=index, num_shards=len(files))
                if not final.exists():
                    storage.copy(path, storage.path(final))
            infos.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[count for _, count, _ in files],
                    num_bytes=sum(size for _, _, size in files),
                    filename_template=names,
                )
            )
        tfds.folder_dataset.write_metadata(
            data_dir=folder,
            features=features,
            split_infos=infos,
            filename_template=template,
            check_data=False,  # the check needs TensorFlow
        )


@contextlib.contextmanager
def make_shard(out: str | Path, split: str, index: int) -> Iterator["Shard"]:
    """Makes one shard of a folder that a `Job` has claimed, in whatever process.

    It is there when the body ends, and nothing of it is when the body raises. Two processes may make the same
    shard, such as one that was given up as lost and its successor: neither sees the other's files until
    they are whole, and these are equal.

    Raises UserError where the folder cannot be seen or written, or when the disk is full.
    """
    out = storage.path(out)
    workdir.wait_for_file(out / "work" / "plan.json")
    shard = Shard(out / "work" / f"{split}-{index:05d}", out)
    try:
        yield shard
        with _writing(shard.out):
            storage.write_atomically(_report(shard.name), json.dumps(checksums.sealed(shard.close())))
    except BaseException:  # also on Ctrl-C
        shard.discard()
        raise


class Shard:
    """The files of one shard, one per data set, while it is made; see `make_shard`."""

    def __init__(self, name: storage.AnyPath, out: storage.AnyPath) -> None:
        self.name, self.out = name, out
        self._files: dict[str, tuple[Path, array_record_module.ArrayRecordWriter]] = {}
        self._report: dict[str, Any] = {"datasets": {}, "ids": {}}

    def write(self, dataset: str, features: tfds.features.FeaturesDict, example: Mapping[str, Any]) -> None:
        """Appends an example to a data set such as "records/81x480x832". ValueError if it does not match."""
        data = features.serialize_example(example)
        # TFDS writes the features in an order that differs from process to process.
        data = tf_example_pb2.Example.FromString(data).SerializeToString(deterministic=True)
        with _writing(self.out):
            if dataset not in self._files:
                records.require_threads()
                partial = storage.name_partial(_part(self.name, dataset))
                if storage.in_bucket(partial):  # array_record writes to disks alone
                    partial = Path(tempfile.gettempdir()) / partial.name
                self._files[dataset] = partial, array_record_module.ArrayRecordWriter(str(partial), _OPTIONS)
                self._report["datasets"][dataset] = {"count": 0, "bytes": 0}
                self._report["ids"][dataset] = []
            self._files[dataset][1].write(data)
        self._report["datasets"][dataset]["count"] += 1
        self._report["datasets"][dataset]["bytes"] += len(data)
        self._report["ids"][dataset].append(example["id"])

    def note(self, **values: Any) -> None:
        """Adds to the shard's report; JSON types."""
        self._report |= values

    def close(self) -> dict[str, Any]:
        for dataset, (partial, file) in self._files.items():
            file.close()  # here, not earlier, a full disk shows
            path = _part(self.name, dataset)
            reader = array_record_module.ArrayRecordReader(str(partial))
            if reader.num_records() != self._report["datasets"][dataset]["count"]:
                raise OSError(f"{path} was not written whole")
            reader.close()
            # A shard that is made a second time, by mistake, never changes the file that others may read.
            digest = storage.hash_file(partial)
            self._report["datasets"][dataset]["file"] = [partial.stat().st_size, digest]
            storage.place(partial, path)  # the folder is synced with the report, which comes last
            partial.unlink(missing_ok=True)
        return self._report

    def discard(self) -> None:
        for partial, file in self._files.values():
            with contextlib.suppress(Exception):  # it failed, and says so elsewhere
                file.close()
            partial.unlink(missing_ok=True)


def read_clips(out: str | Path, working: bool = False) -> list[dict[str, Any]]:
    """The rows of a finished folder's clips, in order; if `working`, of the shards that are made in "work".

    Each has the keys that its maker noted; of a finished folder also "split", and "bucket" and "index", where
    its example is in that split (None: it was skipped). [] where nothing is known.
    """
    path = storage.path(out) / CLIPS
    if working:
        rows = []
        for report in (storage.path(out) / "work").glob("*-?????.json"):
            with contextlib.suppress(FileNotFoundError):  # another process has just put the folder together
                rows += _read_report(report).get("rows", [])
        return rows
    records.check_files(out, CLIPS)
    if not path.exists():
        return []
    remedy, found = "make the data again", []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        where = f"line {number} of {path}"
        found.append(checksums.unsealed(workdir.parse_json(line, where, remedy, _ROW), where, remedy))
    return found


def _read_report(path: storage.AnyPath) -> dict[str, Any]:
    """The report of a shard. Raises UserError when it is damaged, FileNotFoundError when it is not there."""
    remedy = "delete it and run the same command again, which makes this shard anew"
    try:
        content = path.read_bytes()
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    report = workdir.parse_json(content, str(path), remedy, _REPORT)
    return checksums.unsealed(report, str(path), remedy)


def _agree(own: list[dict[str, Any]], stored: list[dict[str, Any]]) -> bool:
    """Whether rows are the same, but for their stamps and for what is not known of ours."""
    return len(own) == len(stored) and all(
        was.get(key) == value
        for row, was in zip(own, stored, strict=True)
        for key, value in row.items()
        if value is not None and key != "stamp"
    )


def _place(reports: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of all shards, each with where its example is."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for report in reports:
        places = {}
        for dataset, ids in report["ids"].items():
            bucket = dataset.split("/")[1]
            for clip_id in ids:
                places[clip_id] = bucket, counts[report["split"], bucket]
                counts[report["split"], bucket] += 1
        for row in report.get("rows", []):
            bucket, index = places.get(row["id"], (None, None))
            yield {**row, "split": report["split"], "bucket": bucket, "index": index}


def _fill_empty_split(reports: list[dict[str, Any]]) -> None:
    """Puts a shard of the training split in an empty validation split, and the other way round.

    A handful of clips is still data to try things on. The report gets "stands_in".
    """
    for split, other in (("val", "train"), ("train", "val")):
        own = [report for report in reports if report["split"] == split]
        others = [report for report in reports if report["split"] == other and report["datasets"]]
        if own and not any(report["datasets"] for report in own) and others:
            own[0] |= {key: others[0][key] for key in ("datasets", "ids")}
            own[0]["stands_in"] = (other, others[0]["shard"])


def _part(shard: storage.AnyPath, dataset: str) -> storage.AnyPath:
    return shard.with_suffix("." + dataset.replace("/", "."))


def _report(shard: storage.AnyPath) -> storage.AnyPath:
    return shard.with_suffix(".json")


def _fingerprint(plan: Mapping[str, Any], reports: list[dict[str, Any]]) -> str:
    """Hash of plan["data"], which says how frames were taken, and of all examples in their order.

    Of an example, its id counts, and of those with a row, the content of the video and the category. It is
    equal for data sets that belong together.
    """
    digest = hashlib.sha256(json.dumps(plan.get("data"), sort_keys=True).encode())
    for report in reports:
        for dataset in sorted(report["ids"]):
            digest.update(
                json.dumps([report["split"], dataset.split("/")[1], report["ids"][dataset]]).encode()
            )
        if rows := report.get("rows"):
            digest.update(json.dumps([[row["id"], row["sha256"], row["category"]] for row in rows]).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _writing(out: storage.AnyPath) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError
        reason = getattr(error, "strerror", None) or str(error).split(";")[0]
        raise UserError(
            f"cannot write {out}: {reason}; nothing that was finished is lost: fix this and run the same "
            "command again"
        ) from error


def parse_process(text: str) -> tuple[int, int]:
    """Reads "1/4" as (1, 4). Raises UserError unless it is I/P with 0 <= I < P."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError(f"--process={text}: say which of how many this is, from 0/4 to 3/4")
    return int(index), int(count)
