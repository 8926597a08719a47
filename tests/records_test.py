"""Records on disk: round trip, folders made shard by shard by several processes, damage and refusals.

T h w latent grid, N tokens, P phenomena with a map, n rows of text, D text width.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from prophy_jax.data import records
from prophy_jax.data.batch import Sizes
from prophy_jax.data.job import Job, Shard, make_shard, parse_process, read_clips
from prophy_jax.run import workdir
from prophy_jax.run.errors import UserError

ROOT = Path(__file__).parent.parent
SHAPE, WIDTH, TOKENS = (2, 4, 4, 16), 8, 8  # (T, h, w, 16), D, N
SIZES = Sizes(SHAPE, (2, 2, 2), 3, WIDTH)
FEATURES = {
    "records/5x16x16": records.features("records", SIZES, without=["text_mask"]),
    "records/9x16x16": records.features("records", SIZES),
    "alignment/5x16x16": records.features("alignment", SIZES),
}
HUGE = '{"version": ' + "7" * 5000 + "}"  # a number that Python does not read
SHARDS = {"train": 5, "val": 1}
PLAN = {"data": {"fps": 8, "frames": 5}, "seed": 0}


def _record(name: str, padding: bool = False) -> dict:
    rng = np.random.default_rng(list(name.encode()))
    record = {
        "id": name,
        "caption": f'Ein "Ball" fällt,\n{name}',
        "source": 3,
        "video": "videos/0.zip:a/b.mp4",
        "latents": rng.standard_normal(SHAPE).astype(np.float16),
        "text": rng.standard_normal((rng.integers(4), WIDTH)).astype(np.float16),  # n from 0 to 3
        "category": (np.arange(17) % 5 == rng.integers(5)).astype(np.float32),
    }
    mask = (np.arange(len(record["text"])) < 2).astype(np.uint8)
    return record | ({"text_mask": mask} if padding else {})


def _label(name: str) -> dict:
    present = _record(name)["category"]
    rng = np.random.default_rng(len(name))
    maps = rng.standard_normal((int(present.sum()), TOKENS)).astype(np.float16)  # (P, N)
    return {"id": name, "present": present, "maps": maps}


def _write(shard: Shard, dataset: str, name: str) -> None:
    kind, bucket = dataset.split("/")
    example = _record(name, bucket == "9x16x16") if kind == "records" else _label(name)
    shard.write(dataset, FEATURES[dataset], example)


def _fill(shard: Shard, split: str, index: int) -> None:
    """Four clips; those of train 1 are in one bucket only, and train 3 has none."""
    for clip in range(4 if (split, index) != ("train", 3) else 0):
        bucket = "5x16x16" if clip % 2 == 0 or (split, index) == ("train", 1) else "9x16x16"
        for dataset in FEATURES:
            if dataset.endswith(bucket):
                _write(shard, dataset, f"{split}{index}.{clip}")
    shard.note(made=[split, index])


def _describe(reports: list[dict]) -> tuple[dict, dict]:
    return FEATURES, {"made": [report["made"] for report in reports]}


def make(folder: Path, process: tuple[int, int] = (0, 1), hang_at: int = -1) -> dict | None:
    """This process's share of the folder; it never ends when it comes to the middle of shard `hang_at`."""
    job = Job(folder, PLAN, SHARDS, process)
    with job.share() as mine:
        for split, index in mine:
            with job.shard(split, index) as shard:
                if split == "train" and index == hang_at:
                    _write(shard, "records/5x16x16", "half")
                    print("half", flush=True)
                    time.sleep(1000)
                _fill(shard, split, index)
    return job.finish(_describe)


def _start(call: str) -> subprocess.Popen:
    code = f"from tests import records_test; from pathlib import Path; records_test.{call}"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "whole"
    make(folder)
    return folder


# --- Round trip --------------------------------------------------------------------------------------


def test_round_trip_is_bit_equal(whole):
    for dataset in FEATURES:
        name, bucket = dataset.split("/")
        source = records.open_dataset(whole, name, bucket, "train")
        assert len(source) == (10 if bucket == "5x16x16" else 6)
        for index in (len(source) - 1, 0, 2):  # random access
            stored = source[index]
            own = stored["id"].decode()
            expected = _record(own, bucket == "9x16x16") if name == "records" else _label(own)
            assert stored.keys() == expected.keys()
            for key, value in expected.items():
                if isinstance(value, str):
                    assert stored[key].decode() == value
                else:
                    np.testing.assert_array_equal(stored[key], value)
                    assert np.asarray(stored[key]).dtype == np.asarray(value).dtype
    with pytest.raises(IndexError):
        source[len(source)]


def test_fast_reading_gives_what_tfds_gives(whole):
    arrays = "latents", "text", "text_mask", "maps"
    for dataset in FEATURES:
        source = records.open_dataset(whole, *dataset.split("/"), "train")
        for index in range(len(source)):
            values, decoded = source.read(index), source[index]
            assert values.keys() == decoded.keys()
            for key, value in values.items():
                if key in arrays:
                    assert bytes(value) == decoded[key].tobytes()
                elif key in ("category", "present"):
                    np.testing.assert_array_equal(np.frombuffer(value, np.float32), decoded[key])
                elif key != "source":
                    assert bytes(value) == decoded[key]


@pytest.mark.parametrize("width", [1, 63, 64, 8191, 8192, 2**20])  # lengths of one byte to four
def test_fast_reading_of_any_length(tmp_path, width):
    features = records.features("alignment", SIZES._replace(token_grid=(1, 1, width)))
    maps = np.arange(width).astype(np.uint16).view(np.float16)[None]  # any bits
    job = Job(tmp_path / "out", PLAN, {"train": 1})
    with job.shard("train", 0) as shard:
        shard.write(
            "alignment/1x1x1", features, {"id": "a", "present": np.eye(17, dtype=np.float32)[0], "maps": maps}
        )
    job.finish(lambda reports: ({"alignment/1x1x1": features}, {}))
    values = records.open_dataset(tmp_path / "out", "alignment", "1x1x1", "train").read(0)
    assert bytes(values["maps"]) == maps.tobytes() and bytes(values["id"]) == b"a"


def test_plain_tfds_reads_the_shards_in_order(whole):
    folder = whole / "records" / "9x16x16"
    assert sorted(path.name for path in folder.glob("*.array_record-*")) == [
        "records-train.array_record-00000-of-00003",  # of train 0, 2 and 4; train 1 and 3 have none
        "records-train.array_record-00001-of-00003",
        "records-train.array_record-00002-of-00003",
        "records-val.array_record-00000-of-00001",
    ]
    source = tfds.builder_from_directory(folder).as_data_source("train")
    names = [f"train{shard}.{clip}" for shard in (0, 2, 4) for clip in (1, 3)]
    assert [example["id"].decode() for example in source] == names


def test_example_that_does_not_match_is_not_written(tmp_path):
    job = Job(tmp_path / "out", PLAN, {"train": 1})
    wrong = _record("a") | {"latents": np.zeros((1, 4, 4, 16), np.float16)}
    with pytest.raises(ValueError, match="latents.*\n.*does not match"), job.shard("train", 0) as shard:
        shard.write("records/5x16x16", FEATURES["records/5x16x16"], wrong)


# --- Several processes, interruptions ------------------------------------------------------------------


def test_several_processes_one_of_them_killed_make_the_same_bytes(whole, tmp_path):
    # Real processes: the order in which Protocol Buffers write the features differs between processes.
    folder = tmp_path / "out"
    hanging = _start(f"make(Path({str(folder)!r}), (0, 4), hang_at=4)")  # shards train 0 and 4
    other = _start(f"make(Path({str(folder)!r}), (1, 4))")  # train 1 and val 0
    try:
        assert hanging.stdout.readline() == "half\n"
        # A second writer is refused, and does not disturb the first.
        with pytest.raises(UserError, match="is written by prophy_jax, process .*--process=0/2"):
            make(folder, (0, 4))
        hanging.send_signal(signal.SIGKILL)
    finally:
        hanging.kill()
        assert other.wait(60) == 0
        hanging.wait(60)
    assert not (folder / "manifest.json").exists() and not (folder / "records").exists()
    with pytest.raises(UserError, match="is not finished: run the command that makes it again"):
        records.read_manifest(folder)
    assert make(folder, (3, 4)) is None  # train 3: others are at work
    left = Job(folder, PLAN, SHARDS).missing()
    assert left == [("train", 2), ("train", 4)]
    assert make(folder, (1, 2)) is None  # resumed by 2 processes instead of 4: all of this one's are made
    manifest = make(folder, (0, 2))
    assert manifest["made"] == [["train", index] for index in range(5)] + [["val", 0]]
    assert _content(folder) == _content(whole)  # and no folder "work"


@pytest.mark.parametrize("failure", [RuntimeError("device out of memory"), OSError("x"), KeyboardInterrupt()])
def test_failing_shard_leaves_nothing_and_says_its_own_reason(tmp_path, failure):
    job = Job(tmp_path / "out", PLAN, SHARDS)
    with pytest.raises(type(failure)) as raised, job.shard("train", 0) as shard:
        _fill(shard, "train", 0)
        raise failure
    assert raised.value is failure  # not "cannot write"
    assert job.missing()[0] == ("train", 0)
    left = sorted(path.name for path in (tmp_path / "out" / "work").iterdir())
    assert left == ["plan.json"]


def test_a_shard_is_not_made_where_the_folder_cannot_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "SHARED_S", 0)
    said = "plan.json, which another process wrote, cannot be seen on .*storage that all hosts share"
    with pytest.raises(UserError, match=said), make_shard(tmp_path / "elsewhere", "train", 0):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_shard_that_was_damaged_since_is_named_and_made_again(whole, tmp_path):
    """One of another size is made again at once; other bytes are seen when the folder is put together."""
    folder = tmp_path / "out"
    assert make(folder, (0, 2)) is None
    paths = sorted((folder / "work").glob("train-*.records.5x16x16"))
    content = paths[0].read_bytes()
    paths[0].write_bytes(content[len(content) // 2 :] + content[: len(content) // 2])
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{paths[0]} is damaged, its bytes .*: delete it and run the same"):
        make(folder)
    paths[0].unlink()
    assert make(folder) is not None and _content(folder) == _content(whole)


def test_making_a_shard_again_never_harms_the_one_that_is_there(tmp_path):
    job = Job(tmp_path / "out", PLAN, {"train": 1})
    with job.shard("train", 0) as shard:
        _fill(shard, "train", 0)
    before = _content(tmp_path)
    with pytest.raises(KeyboardInterrupt), job.shard("train", 0) as shard:
        _write(shard, "records/5x16x16", "other")
        assert all((tmp_path / name).read_bytes() == before[name] for name in before)
        raise KeyboardInterrupt
    assert _content(tmp_path) == before


def test_putting_together_goes_on_where_it_was_interrupted(whole, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    folder = tmp_path / "out"
    monkeypatch.setattr(records, "write_manifest", stop)
    with pytest.raises(KeyboardInterrupt):
        make(folder)
    assert (folder / "records").exists()
    with pytest.raises(UserError, match="is not finished"):
        records.read_manifest(folder)
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "rmtree", stop)  # the manifest is there, the folder "work" too
    with pytest.raises(KeyboardInterrupt):
        make(folder)
    monkeypatch.undo()
    assert (folder / "work").exists()
    assert make(folder) == records.read_manifest(whole)
    assert _content(folder) == _content(whole)


def test_another_process_may_begin_at_the_same_moment(tmp_path, monkeypatch):
    holds_files = workdir._holds_files

    def look_late(*args):
        monkeypatch.undo()
        job = Job(tmp_path / "out", PLAN, SHARDS)  # after ours saw no plan, before it looks around
        with job.shard("train", 0) as shard:
            _fill(shard, "train", 0)
        return holds_files(*args)

    monkeypatch.setattr(workdir, "_holds_files", look_late)
    assert Job(tmp_path / "out", PLAN, SHARDS).missing()[0] == ("train", 1)
    with pytest.raises(UserError, match="was made differently"):
        Job(tmp_path / "out", PLAN | {"seed": 1}, SHARDS)


def test_processes_that_are_done_at_once_put_together_once(whole, tmp_path):
    jobs = [Job(tmp_path / "out", PLAN, SHARDS) for _ in range(4)]
    for split, index in jobs[0].missing():
        with jobs[0].shard(split, index) as shard:
            _fill(shard, split, index)
    described, manifests, start = [], [], threading.Barrier(4)

    def finish(job):
        start.wait()
        manifests.append(job.finish(lambda reports: described.append(1) or _describe(reports)))

    threads = [threading.Thread(target=finish, args=[job]) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(described) == 1 and manifests == 4 * [records.read_manifest(whole)]
    assert _content(tmp_path / "out") == _content(whole)


@pytest.mark.parametrize("name", ["records/9x16x16/*-00001-of-*", "*/5x16x16/features.json"])
def test_a_finished_folder_that_lacks_a_file_is_not_called_finished(whole, tmp_path, name):
    folder = tmp_path / "data"
    shutil.copytree(whole, folder)
    assert make(folder)
    lost = sorted(folder.glob(name))[0]
    lost.unlink()
    with pytest.raises(UserError, match=f"{lost.name} is missing; make the data again"):
        make(folder)
    lost.mkdir()
    with pytest.raises(UserError, match="make the data again"):
        make(folder)


def test_rows_of_clips_that_a_finished_folder_lost_are_missed(tmp_path):
    folder = tmp_path / "data"
    rows = {("train", 0): [{"id": "a", "sha256": "1", "category": []}]}
    job = Job(folder, PLAN, {"train": 1}, rows=rows)
    with job.shard("train", 0) as shard:
        _write(shard, "records/5x16x16", "a")
        shard.note(made=["train", 0], rows=rows["train", 0])
    assert job.finish(lambda reports: ({"records/5x16x16": FEATURES["records/5x16x16"]}, {}))
    assert [row["id"] for row in read_clips(folder)] == ["a"]
    (folder / "clips.jsonl").unlink()
    for look in (lambda: read_clips(folder), job.complete):
        with pytest.raises(UserError, match="clips.jsonl is missing; make the data again"):
            look()


def test_finished_folder_is_left_alone(tmp_path):
    make(tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert make(tmp_path / "out") == records.read_manifest(tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize("empty, full", [("val", "train"), ("train", "val")])
def test_other_split_stands_in_for_one_without_a_usable_clip(tmp_path, empty, full):
    job = Job(tmp_path / "out", PLAN, {"train": 2, "val": 2})
    for split, index in job.missing():
        with job.shard(split, index) as shard:
            if split == full and index == 1:  # the first of the other split is of no use either
                _fill(shard, split, index)
    counts = {}

    def describe(reports):
        for report in reports:
            for dataset, size in report["datasets"].items():
                counts[dataset, report["split"]] = size["count"]
        return {dataset: FEATURES[dataset] for dataset, _ in counts}, {}

    job.finish(describe)
    for dataset in {dataset for dataset, _ in counts}:
        ids = {
            split: [
                bytes(example["id"])
                for example in records.open_dataset(tmp_path / "out", *dataset.split("/"), split)
            ]
            for split in (empty, full)
        }
        assert ids[empty] == ids[full] and len(ids[full]) == counts[dataset, empty] == counts[dataset, full]


def test_fingerprint_is_of_the_examples_and_their_order(tmp_path, whole):
    fingerprints = {records.read_manifest(whole)["fingerprint"]}
    for number, names in enumerate((["a", "b"], ["b", "a"], ["a", "c"], ["a"])):
        job = Job(tmp_path / str(number), PLAN, {"train": 1})
        with job.shard("train", 0) as shard:
            for name in names:
                _write(shard, "records/5x16x16", name)
        datasets = {"records/5x16x16": FEATURES["records/5x16x16"]}
        fingerprints.add(job.finish(lambda reports, datasets=datasets: (datasets, {}))["fingerprint"])
    assert len(fingerprints) == 5


# --- Full disk ---------------------------------------------------------------------------------------


def _write_large(job: Job) -> None:
    """About 4 MB in one shard."""
    features = records.features(
        "records", SIZES._replace(latent_shape=(4, 64, 64, 16)), without=["text_mask"]
    )
    large = _record("a") | {"latents": np.random.default_rng(0).random((4, 64, 64, 16)).astype(np.float16)}
    with job.shard("train", 1) as shard:
        for index in range(8):
            shard.write("records/9x16x16", features, large | {"id": str(index)})


@pytest.fixture
def small_disk(tmp_path):
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True
    )
    if made.returncode:
        pytest.skip("this system does not let root mount a file system: " + made.stderr.decode().strip())
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_full_disk(small_disk):
    job = Job(small_disk / "out", PLAN, {"train": 2})
    with job.shard("train", 0) as shard:
        _fill(shard, "train", 0)
    before = _content(small_disk)
    with pytest.raises(UserError, match="cannot write .*out: .*[Nn]o space left.*run the same command again"):
        _write_large(job)
    assert _content(small_disk) == before
    assert job.missing() == [("train", 1)]
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    _write_large(job)
    assert job.missing() == []


def test_file_size_limit(tmp_path):
    job = Job(tmp_path / "out", PLAN, {"train": 2})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*out: .*[Ff]ile too large"):
            _write_large(job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = sorted(path.name for path in (tmp_path / "out" / "work").iterdir())
    assert left == ["plan.json"]
    _write_large(job)
    assert job.missing() == [("train", 0)]


# --- Refusals, damage ---------------------------------------------------------------------------------


def test_folder_of_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "project" / "work").mkdir(parents=True)  # the name of our own folder for shards
    (tmp_path / "project" / "work" / "result").write_text("x")
    before = _content(tmp_path)
    for name in ("thesis", "project"):
        with pytest.raises(
            UserError, match=f"{name} is not empty and holds no work/plan.json: name another --out"
        ):
            Job(tmp_path / name, PLAN, SHARDS)
    with pytest.raises(UserError, match="file is not a folder: name another --out"):
        Job(tmp_path / "file", PLAN, SHARDS)
    assert _content(tmp_path) == before


@pytest.mark.parametrize("finished", [False, True])
def test_folder_of_another_plan_is_refused(tmp_path, finished):
    if finished:
        make(tmp_path / "out")
    else:
        Job(tmp_path / "out", PLAN, SHARDS)
    other = {"data": {"fps": 16, "frames": 5}, "shape": (1, 2)}
    with pytest.raises(UserError, match="out.*made differently") as raised:
        Job(tmp_path / "out", other, SHARDS)
    assert "(data.fps was 8, is 16; seed was 0, is None; shape was None, is [1, 2])" in str(raised.value)


def test_unknown_split_and_missing_files(whole, tmp_path):
    with pytest.raises(UserError, match=r"no split 'test'; it has \['train', 'val'\]"):
        records.open_dataset(whole, "records", "5x16x16", "test")
    with pytest.raises(UserError, match="records/1x1x1 is missing or damaged"):
        records.open_dataset(whole, "records", "1x1x1", "train")
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "records" / "9x16x16" / "records-train.array_record-00001-of-00003").unlink()
    with pytest.raises(UserError, match="00001-of-00003 is missing"):
        records.open_dataset(tmp_path / "out", "records", "9x16x16", "train")


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "[]",
        "{}",
        '{"a": 1}',
        "null",
        "[" * 100_000,
        '{"splits": [{"name": 7}]}',
        '{"name": []}',
        HUGE,
    ],
)
def test_damaged_metadata(whole, tmp_path, name, text):
    folder = tmp_path / "records" / "9x16x16"
    shutil.copytree(whole / "records" / "9x16x16", folder)
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    with pytest.raises(UserError, match="9x16x16.*make the data again"):
        records.open_dataset(tmp_path, "records", "9x16x16", "train")


@pytest.mark.parametrize("key", ["pythonClassName", "type"])
def test_metadata_runs_no_code_that_it_names(whole, tmp_path, monkeypatch, key):
    folder = tmp_path / "records" / "9x16x16"
    shutil.copytree(whole / "records" / "9x16x16", folder)
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    info = json.loads((folder / "features.json").read_text())
    info["featuresDict"]["features"]["id"][key] = "evil.Text"
    (folder / "features.json").write_text(json.dumps(info))
    with pytest.raises(
        UserError, match="features.json names 'evil.Text', which no column of training data is"
    ):
        records.open_dataset(tmp_path, "records", "9x16x16", "train")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("dataset_info.json", lambda info: info["splits"][0].pop("shardLengths")),
        ("dataset_info.json", lambda info: info["splits"][0].update(shardLengths=["-1", "2", "2"])),
        ("dataset_info.json", lambda info: info["splits"][0].update(filepathTemplate="x")),
        ("features.json", lambda info: info["featuresDict"]["features"].pop("id")),
        (
            "features.json",
            lambda info: info["featuresDict"]["features"]["latents"]["tensor"]["shape"].clear(),
        ),
    ],
)
def test_metadata_of_something_else_is_one_line(whole, tmp_path, name, change):
    folder = tmp_path / "records" / "9x16x16"
    shutil.copytree(whole / "records" / "9x16x16", folder)
    info = json.loads((folder / name).read_text())
    change(info)
    (folder / name).write_text(json.dumps(info))
    with pytest.raises(UserError, match="records/9x16x16.* make the data again"):
        example = records.open_dataset(tmp_path, "records", "9x16x16", "train")[0]
        example["id"], example["latents"]


def test_damaged_records(whole, tmp_path):
    shutil.copytree(whole / "records", tmp_path / "records")
    path = tmp_path / "records" / "9x16x16" / "records-train.array_record-00001-of-00003"
    content = bytearray(path.read_bytes())
    content[content.index(_record("train2.3")["latents"].tobytes()[:64]) + 10] ^= 255  # one bit is enough
    for damaged, broken in ((content, 3), (content[:1000], 2), (b"", 2)):
        path.write_bytes(damaged)
        source = records.open_dataset(tmp_path, "records", "9x16x16", "train")
        assert source[0]["id"] == b"train0.1" and source[5]["id"] == b"train4.3"  # the other shards
        with pytest.raises(UserError, match="00001-of-00003 is damaged; make the data again"):
            source[broken]
    source = records.open_dataset(tmp_path, "records", "9x16x16", "train")
    path.unlink()  # later
    with pytest.raises(UserError, match="00001-of-00003 is damaged; make the data again"):
        source[2]


def test_manifest(tmp_path):
    with pytest.raises(UserError, match="no training data at .* prophy_jax.prepare --config"):
        records.read_manifest(tmp_path)
    records.write_manifest(tmp_path, {"text_length": 8})
    assert records.read_manifest(tmp_path) == {"schema_version": 2, "text_length": 8, "checksums": {}}
    assert os.listdir(tmp_path) == ["manifest.json"]
    (tmp_path / "manifest.json").write_text(json.dumps({"schema_version": 1}))
    with pytest.raises(UserError, match="schema version 1, this program reads version 2; prepare"):
        records.read_manifest(tmp_path)
    for damage in ("", "{", "{}", "[]", "null", "\0"):
        (tmp_path / "manifest.json").write_text(damage)
        with pytest.raises(UserError, match="is damaged"):
            records.read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is damaged"):
        records.read_manifest(tmp_path)


DAMAGE = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\0",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    HUGE.encode(),
    b"{}",
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_manifests_and_reports_are_one_line(tmp_path, whole, damage):
    folder = tmp_path / "out"
    job = Job(folder, PLAN, {"train": 1})
    with job.shard("train", 0) as shard:
        _fill(shard, "train", 0)
    report = folder / "work" / "train-00000.json"
    was = report.read_bytes()
    report.write_bytes(damage)
    assert job.finish(_describe) is None and job.missing() == [("train", 0)]  # it is made again
    assert not (folder / "manifest.json").exists()
    report.write_bytes(was)
    assert job.missing() == []
    report.write_bytes(was.replace(b'"count": ', b'"count": 1'))
    assert job.missing() == [("train", 0)]
    (folder / "manifest.json").write_bytes(damage)
    with pytest.raises(UserError, match="manifest.json.*damaged.*make the data again"):
        records.read_manifest(folder)
    (folder / "manifest.json").unlink()
    (folder / "clips.jsonl").write_bytes(damage + b"\n")
    with pytest.raises(UserError, match="line 1 of .*clips.jsonl.*damaged.*make the data again"):
        [row["id"] for row in read_clips(folder)]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("buckets", []),
        ("buckets", {"5x16x16": 3}),
        ("buckets", {"5x16x16": {"counts": {"train": 1}, "latent_shape": "2x4"}}),
        ("counts", {"train": "many"}),
        ("text_length", None),
        ("video", {"fps": "8"}),
        ("categories", "melting"),
        ("fingerprint", 3),
        ("text_dim", True),
        ("skipped", [["a"]]),
        ("buckets", {"5x16x16": {"counts": {}, "latent_shape": [2, 4, 4], "token_grid": [2, 2, 2]}}),
        ("buckets", {"5x16x16": {"counts": {}, "latent_shape": [-2, 4, 4, 16], "token_grid": [2, 2, 2]}}),
    ],
)
def test_values_of_other_types_in_a_manifest_are_named(tmp_path, key, value):
    records.write_manifest(tmp_path, {"text_length": 8, "text_dim": 8, "fingerprint": "0", key: value})
    with pytest.raises(UserError, match=f"manifest.json is damaged, '{key}' is not what it should be: make"):
        records.read_manifest(tmp_path)


def test_what_a_manifest_lacks_is_named(tmp_path):
    records.write_manifest(tmp_path, {"buckets": {"5x16x16": {"counts": {}}}})
    manifest = records.read_manifest(tmp_path)
    with pytest.raises(
        UserError, match="manifest.json is damaged, it lacks 'latent_shape': make the data again"
    ):
        Sizes.of(manifest, "5x16x16")
    with pytest.raises(UserError, match="lacks 'fingerprint'"):
        manifest["fingerprint"]


def test_process():
    assert parse_process("0/1") == (0, 1) and parse_process("3/4") == (3, 4)
    for wrong in ("", "1", "4/4", "-1/4", "1/", "/4", "a/b", "1/2/3", "1.0/4"):
        with pytest.raises(UserError, match="from 0/4 to 3/4"):
            parse_process(wrong)


def test_file_system_without_hard_links(tmp_path, whole, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    make(tmp_path / "copied")
    assert _content(tmp_path / "copied") == _content(whole)


def test_fingerprint_tells_other_frames_of_the_same_clips(tmp_path, whole):
    plan = {**PLAN, "data": {**PLAN["data"], "fps": 16}}
    job = Job(tmp_path / "faster", plan, SHARDS)
    for split, index in job.missing():
        with job.shard(split, index) as shard:
            _fill(shard, split, index)
    assert job.finish(_describe)["fingerprint"] != records.read_manifest(whole)["fingerprint"]
