"""A folder of data sets that any number of processes write, shard by shard, through any interruption.

DIR/work/plan.json               all that decides what is written
DIR/work/train-00000.json        one report for each shard that is made, next to its files
DIR/manifest.json and the rest   when all is there, see `prophy_jax.data.records`; "work" is gone then
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from prophy_jax.data import records
from prophy_jax.run import workdir
from prophy_jax.run.errors import UserError

_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
_OPTIONS = "group_size:1,uncompressed"  # float16 noise hardly shrinks, and would take thrice as long to read


class Job:
    """A folder of data sets that any number of processes write, shard by shard, through any interruption.

    A shard is a fixed piece of the work. What it holds depends on the plan alone, not on who writes it or
    when, so the finished folder is the same for 1 and for 100 processes, interrupted or not. A shard appears
    under its name when it is whole, with a JSON file that says so and reports on it; one that was interrupted
    is made again. Process i of P makes the shards i, i + P, ...; the last to be done puts them together.

    Args:
        out: the folder.
        plan: JSON types; all that decides what is written. A folder begun by another plan is refused.
        shards: number of shards of each split.
        process: (i, P).

    Raises:
        UserError: `out` is of another plan, is something else, or cannot be written.
    """

    def __init__(
        self,
        out: str | Path,
        plan: Mapping[str, Any],
        shards: Mapping[str, int],
        process: tuple[int, int] = (0, 1),
    ) -> None:
        self.out = Path(out)
        self._work = self.out / "work"
        self._shards = [(split, index) for split in shards for index in range(shards[split])]
        self._process = process
        with _writing(self.out):
            if self.complete():

                def compare(_, own: dict[str, Any]) -> str:
                    return workdir.differences(records.read_manifest(self.out).get("plan", {}), own)

                workdir.claim(self.out, "manifest.json", plan, "--out", compare)
            else:
                workdir.claim(self.out, "work/plan.json", plan, "--out")

    def complete(self) -> bool:
        """Whether the folder is finished."""
        return (self.out / "manifest.json").exists()

    def _name(self, split: str, index: int) -> Path:
        return self._work / f"{split}-{index:05d}"

    def missing(self, mine: bool = False) -> list[tuple[str, int]]:
        """(split, shard) of what is still to be made: by all processes, or by this one."""
        if self.complete():
            return []
        first, step = self._process if mine else (0, 1)
        return [shard for shard in self._shards[first::step] if not self._report(*shard).exists()]

    def _report(self, split: str, index: int) -> Path:
        return self._name(split, index).with_suffix(".json")

    @contextlib.contextmanager
    def shard(self, split: str, index: int) -> Iterator["Shard"]:
        """Makes one shard: it is there when the body ends, and nothing of it is when the body raises.

        Raises UserError when another process is at it, or when the disk is full.
        """
        with contextlib.ExitStack() as stack:
            with _writing(self.out):
                stack.enter_context(_lock(self._name(split, index).with_suffix(".lock")))
            shard = Shard(self._name(split, index), self.out)
            try:
                yield shard
                with _writing(self.out):
                    workdir.write_atomically(self._report(split, index), json.dumps(shard.close()))
            except BaseException:  # also on Ctrl-C
                shard.discard()
                raise

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
                print(f"process {index} of {count} is done; {len(missing)} shards are left to the others")
                return None
            try:
                with _lock(self._work / "finish.lock", wait=True):
                    if not self.complete():
                        self._put_together(describe)
                    shutil.rmtree(self._work)
            except FileNotFoundError:
                if not self.complete():  # otherwise another process did it meanwhile
                    raise
        return records.read_manifest(self.out)

    def _put_together(self, describe: Callable[[list[dict[str, Any]]], tuple[dict, dict]]) -> None:
        reports = [
            {"split": split, "shard": index}
            | json.loads(self._report(split, index).read_text(encoding="utf-8"))
            for split, index in self._shards
        ]
        _fill_empty_split(reports)
        features, manifest = describe(reports)
        for dataset in features:
            self._assemble(dataset, features[dataset], reports)
        plan = json.loads((self._work / "plan.json").read_text(encoding="utf-8"))
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
                    _link(path, final)
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


class Shard:
    """The files of one shard, one per data set, while it is made; see `Job.shard`."""

    def __init__(self, name: Path, out: Path) -> None:
        self._name, self._out = name, out
        self._files: dict[str, array_record_module.ArrayRecordWriter] = {}
        self._report: dict[str, Any] = {"datasets": {}, "ids": {}}

    def write(self, dataset: str, features: tfds.features.FeaturesDict, example: Mapping[str, Any]) -> None:
        """Appends an example to a data set such as "records/81x480x832". ValueError if it does not match."""
        data = features.serialize_example(example)
        # TFDS writes the features in an order that differs from process to process.
        data = tf_example_pb2.Example.FromString(data).SerializeToString(deterministic=True)
        with _writing(self._out):
            if dataset not in self._files:
                path = str(_partial(_part(self._name, dataset)))
                self._files[dataset] = array_record_module.ArrayRecordWriter(path, _OPTIONS)
                self._report["datasets"][dataset] = {"count": 0, "bytes": 0}
                self._report["ids"][dataset] = []
            self._files[dataset].write(data)
        self._report["datasets"][dataset]["count"] += 1
        self._report["datasets"][dataset]["bytes"] += len(data)
        self._report["ids"][dataset].append(example["id"])

    def note(self, **values: Any) -> None:
        """Adds to the shard's report; JSON types."""
        self._report |= values

    def close(self) -> dict[str, Any]:
        for dataset, file in self._files.items():
            file.close()  # here, not earlier, a full disk shows
            path = _part(self._name, dataset)
            reader = array_record_module.ArrayRecordReader(str(_partial(path)))
            if reader.num_records() != self._report["datasets"][dataset]["count"]:
                raise OSError(f"{path} was not written whole")
            reader.close()
            # A shard that is made a second time, by mistake, never changes the file that others may read.
            workdir.sync(_partial(path))  # the folder is synced with the report, which comes last
            os.replace(_partial(path), path)
        return self._report

    def discard(self) -> None:
        for dataset, file in self._files.items():
            with contextlib.suppress(Exception):  # it failed, and says so elsewhere
                file.close()
            _partial(_part(self._name, dataset)).unlink(missing_ok=True)


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


def _link(path: Path, final: Path) -> None:
    """A second name for a file; a copy on file systems without hard links, such as mounted buckets."""
    try:
        os.link(path, final)
    except OSError:
        with workdir.replacing(final) as partial:
            shutil.copyfile(path, partial)


def _part(shard: Path, dataset: str) -> Path:
    return shard.with_suffix("." + dataset.replace("/", "."))


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}")


def _fingerprint(plan: Mapping[str, Any], reports: list[dict[str, Any]]) -> str:
    """Hash of plan["data"], which says how frames were taken, and of the ids of all examples in their order.

    It is equal for data sets that belong together.
    """
    digest = hashlib.sha256(json.dumps(plan.get("data"), sort_keys=True).encode())
    for report in reports:
        for dataset in sorted(report["ids"]):
            digest.update(
                json.dumps([report["split"], dataset.split("/")[1], report["ids"][dataset]]).encode()
            )
    return digest.hexdigest()


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError
        reason = getattr(error, "strerror", None) or str(error).split(";")[0]
        raise UserError(
            f"cannot write {out}: {reason}; nothing that was finished is lost: fix this and run the same "
            "command again"
        ) from error


@contextlib.contextmanager
def _lock(path: Path, wait: bool = False) -> Iterator[None]:
    """Holds a lock that the system releases when the process ends, however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UserError(
                f"another process is writing to {path.parent}: wait for it, or give each its share of the "
                "work with --process=0/2, --process=1/2 and so on"
            ) from error
        yield


def parse_process(text: str) -> tuple[int, int]:
    """Reads "1/4" as (1, 4). Raises UserError unless it is I/P with 0 <= I < P."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError(f"--process={text}: say which of how many this is, from 0/4 to 3/4")
    return int(index), int(count)
