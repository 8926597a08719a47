"""Real jobs of several processes over loopback, each with one simulated CPU device."""

import ast
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import fsspec
import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from prophy_jax.prepare import prepare
from prophy_jax.run import checkpoints, checksums, lock, metrics, storage
from prophy_jax.run.errors import UserError
from tests.conftest import ROOT, get_config, xla_flags

pytestmark = pytest.mark.jobs

# Short deadlines, and parameters that are small are split too. "slow" makes each step take a while.
BOOT = """
import runpy, sys, time
from prophy_jax.run import distributed, parallel, workdir
distributed.START_S, distributed.LOST_S, workdir.SHARED_S = {start}, 10, 2
parallel.MIN_SHARDED_SIZE = 256
if "slow" in sys.argv:
    sys.argv.remove("slow")
    put = parallel.put_batch
    parallel.put_batch = lambda *arguments: (time.sleep(0.1), put(*arguments))[1]
if "tell" in sys.argv:
    sys.argv.remove("tell")
    from prophy_jax.run import checksums
    hash_files = checksums.hash_files
    def tell(folder, *arguments, known=None):
        found = hash_files(folder, *arguments, known=known)
        print("hashed", sorted(found.keys() - dict(known or ()).keys()), "in", folder, flush=True)
        return found
    checksums.hash_files = tell
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
MODEL = (
    "--config=configs/wan.py:tiny",
    "--config.backbone.num_layers=1",
    "--config.parts.branch.layers=(0,)",
)
STEPS = 40


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


class Job:
    """`count` processes of one command; process i gets `own[i]` too."""

    def __init__(
        self, logs: pathlib.Path, command: str, count: int, *arguments, own=(), ranks=None, start=120
    ):
        self.logs = [logs / f"log{rank}" for rank in range(count)]
        logs.mkdir(parents=True)
        port = free_port()
        self.processes = []
        for rank in range(count) if ranks is None else ranks:
            job = [f"--distributed=localhost:{port},{rank}/{count}"] if count > 1 else []
            with open(self.logs[rank], "w") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", BOOT.format(start=start), f"prophy_jax.{command}", *job,
                         *arguments, *own[rank : rank + 1]],
                        cwd=ROOT,
                        env={**os.environ, "XLA_FLAGS": xla_flags()},
                        stdout=log,
                        stderr=log,
                    )
                )  # fmt: skip

    def wait(self) -> list[int]:
        return [process.wait(timeout=120) for process in self.processes]

    def log(self, rank: int) -> str:
        return self.logs[rank].read_text()

    def last_line(self, rank: int) -> str:
        return self.log(rank).strip().splitlines()[-1]

    def wait_for(self, path: storage.AnyPath) -> None:
        while not path.exists():
            assert all(process.poll() is None for process in self.processes), self.log(0)
            time.sleep(0.02)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()


def train(tmp_path, tiny_data, name, count, *arguments, **options) -> Job:
    return Job(
        tmp_path / f"logs-{name}", "train", count, *MODEL, f"--config.steps={STEPS}",
        f"--config.data.dir={tiny_data}", f"--workdir={tmp_path}/run", "--config.checkpoint.every=5",
        "--config.log.every=5", "--config.validation.every=1000", "--config.samples.every=1000", *arguments,
        **options,
    )  # fmt: skip


def params(folder: pathlib.Path) -> dict:
    """A parameter tree, read as its manifest describes it."""
    shapes = checkpoints.read_manifest(str(folder), "")["shapes"]
    wanted = {path: jax.ShapeDtypeStruct(shape, dtype) for path, (shape, dtype) in shapes.items()}
    return checkpoints.load_params(str(folder), unflatten_dict(wanted, sep="/"), "")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_data):
    """A run of one process that nothing interrupts."""
    folder = tmp_path_factory.mktemp("alone")
    with train(folder, tiny_data, "alone", 1) as job:
        assert job.wait() == [0], job.log(0)
    return folder / "run"


@pytest.mark.slow  # five jobs of up to four processes: minutes
def test_job_is_killed_and_terminated_and_goes_on_with_other_processes(alone, tmp_path, tiny_data):
    run, saves = tmp_path / "run", tmp_path / "run" / "checkpoints"
    with train(tmp_path, tiny_data, "two", 2) as job:
        job.wait_for(saves / "5")
        job.processes[1].send_signal(signal.SIGKILL)
        assert job.wait()[0] not in (0, None)
        assert job.last_line(0).startswith("error: process 0 of 2")
        assert "run the same command again" in job.last_line(0)
        assert job.last_line(1).startswith("error: process 1 of 2")  # from its child

    killed_at = max(int(name) for name in os.listdir(saves) if name.isdigit())
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.context=2")
    with train(tmp_path, tiny_data, "four", 4, *mesh, "slow") as job:
        job.wait_for(saves / str(killed_at + 5))
        job.processes[3].send_signal(signal.SIGTERM)
        assert job.wait() == [75] * 4, job.log(0)
        saved_at = max(int(name) for name in os.listdir(saves))
        assert f"saved at step {saved_at}: run the same command" in job.last_line(0)
        assert saved_at < STEPS and not any("saved at" in job.log(rank) for rank in (1, 2, 3))

    with train(tmp_path, tiny_data, "one", 1) as job:
        assert job.wait() == [0], job.log(0)
    # Every step stands once, with the losses of the run of one process; SIGTERM adds its own line.
    ours, theirs = ({line["step"]: line for line in metrics.read_metrics(str(run))} for run in (run, alone))
    assert ours.keys() == theirs.keys() | {saved_at}
    for step in theirs.keys() - {0}:
        losses = {name: value for name, value in theirs[step].items() if name.startswith("loss/")}
        assert {name: ours[step][name] for name in losses} == pytest.approx(losses, rel=1e-5)
    # Sums over devices round in another order, and Adam divides by small gradients: norms, not entries.
    for part in ("backbone", "branch"):
        trees = params(run / part), params(alone / part)
        for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
            assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def test_a_job_in_a_bucket_is_killed_and_goes_on(alone, tiny_data, bucket, tmp_path, monkeypatch):
    fsspec.filesystem("gs").put(f"{tiny_data}/", f"{bucket}/data/", recursive=True)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", f"{bucket}/xla")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    settings = (f"--config.data.dir={bucket}/data", f"--workdir={bucket}/run")
    saved = storage.path(bucket) / "run" / "checkpoints" / "5" / "commit_success.txt"
    with train(tmp_path, tiny_data, "killed", 2, *settings, "slow") as job:
        job.wait_for(saved)
        with pytest.raises(UserError, match=f"{bucket}/run is written by a run of prophy_jax.train"):
            lock.held(f"{bucket}/run", "another").__enter__()
        job.processes[1].send_signal(signal.SIGKILL)
        assert job.wait()[0] not in (0, None)
    with train(tmp_path, tiny_data, "again", 2, *settings) as job:
        assert job.wait() == [0, 0], job.log(0)
    ours, theirs = (
        {line["step"]: line for line in metrics.read_metrics(str(run))} for run in (f"{bucket}/run", alone)
    )
    assert ours.keys() == theirs.keys()
    for step in theirs.keys() - {0}:
        assert ours[step]["loss/total"] == pytest.approx(theirs[step]["loss/total"], rel=1e-5)
    assert storage.list_files(f"{bucket}/xla")
    assert lock.LOCK not in storage.list_files(f"{bucket}/run")


def test_two_processes_write_the_parameters_that_are_split_over_them(alone, tmp_path, tiny_data):
    steps = "--config.steps=5"
    with train(tmp_path, tiny_data, "two", 2, "--config.mesh.fsdp=2", steps, "tell") as job:
        assert job.wait() == [0, 0], job.log(0)
    run = tmp_path / "run"
    # Each has hashed the arrays that it wrote to the checkpoint, and the first the little that remains.
    for rank in range(2):
        (own,) = re.findall(rf"^hashed (.*) in .*state.*/ocdbt.process_{rank}/d$", job.log(rank), re.M)
        assert len(ast.literal_eval(own)) > 0
    (rest,) = re.findall(r"^hashed (.*) in .*checkpoints/5[^/\n]*$", job.log(0), re.M)
    assert "state/manifest.ocdbt" in rest and not re.search("process_./d/", rest)
    sealed = json.loads((run / "checkpoints" / "5" / "checksums.json").read_text())
    listed = checksums.unsealed(sealed, "", "")
    assert {name.split("/")[1] for name in listed if "/d/" in name} >= {"ocdbt.process_0", "ocdbt.process_1"}
    checkpoints.verify_checkpoint(str(run / "checkpoints" / "5"), "")
    assert not list((run / "checkpoints" / "5").glob("*.checksums.json"))
    for part in ("backbone", "branch"):
        sha256 = checkpoints.read_manifest(str(run / part), "")["sha256"]
        assert checkpoints.tree_hash(params(run / part)) == sha256
    assert (run / "samples" / "step_0000005.mp4").exists()
    ours, theirs = ({line["step"]: line for line in metrics.read_metrics(str(run))} for run in (run, alone))
    for step, name in ((0, "validation/loss"), (5, "loss/total"), (5, "gradient/all")):
        assert ours[step][name] == pytest.approx(theirs[step][name], rel=1e-5)


def test_nothing_to_join_gets_one_line_in_bounded_time(tmp_path, tiny_data):
    cannot = "cannot join the job --distributed=localhost"
    with (
        train(tmp_path, tiny_data, "coordinator", 2, ranks=[0], start=5) as first,
        train(tmp_path, tiny_data, "other", 2, ranks=[1], start=5) as second,
        train(tmp_path, tiny_data, "auto", 1, "--distributed=auto") as auto,
        train(tmp_path, tiny_data, "wrong", 1, "--distributed=localhost,1/2") as wrong,
    ):
        for job, rank, text in (
            (first, 0, cannot),
            (second, 1, cannot),
            (auto, 0, "--distributed=auto finds no Slurm"),
            (wrong, 0, "give auto, or HOST:PORT,I/P"),
        ):
            assert job.wait() == [1], job.log(rank)
            (line,) = job.log(rank).strip().splitlines()
            assert line.startswith("error: ") and text in line
    assert not (tmp_path / "run").exists()


def test_one_process_that_cannot_start_ends_them_all(tmp_path, tiny_data):
    nowhere = ["--config.seed=0", "--config.data.dir=/nowhere"]
    unshared = ["--config.seed=0", f"--workdir={tmp_path}/own"]
    with (
        train(tmp_path, tiny_data, "nowhere", 2, own=nowhere) as no_data,
        train(tmp_path / "b", tiny_data, "unshared", 2, own=unshared) as no_sharing,
    ):
        for job, text in (
            (no_data, "no training data at /nowhere"),
            (no_sharing, "storage that all hosts share"),
        ):
            assert job.wait() == [1, 1], job.log(0)
            assert job.last_line(1).startswith("error: ") and text in job.last_line(1)
            assert job.last_line(0) == "error: another process failed: its log says why"
    assert not (tmp_path / "run").exists()


def test_two_processes_prepare_the_bytes_of_one(tmp_path):
    config = get_config("tiny")
    config.data.shard = 8
    prepare(config, out=tmp_path / "one")
    arguments = ("--config=configs/wan.py:tiny", f"--out={tmp_path}/two", "--config.data.shard=8")
    with Job(tmp_path / "logs", "prepare", 2, *arguments) as job:
        assert job.wait() == [0, 0], job.log(0)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) > 12
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_two_processes_share_the_prompts(alone, tmp_path):
    prompts = [f"--prompt={prompt}" for prompt in ("a red ball falls", "orange flames", "water")]
    arguments = (
        *MODEL, f"--config.backbone_params={alone}/backbone",
        f"--out={tmp_path}/clips", *prompts,
    )  # fmt: skip
    with Job(tmp_path / "logs", "sample", 2, *arguments) as job:
        assert job.wait() == [0, 0], job.log(0)
        assert "2 clips in" in job.log(0) and "1 clip in" in job.log(1)
    assert sorted(os.listdir(tmp_path / "clips")) == ["0000.mp4", "0001.mp4", "0002.mp4", "manifest.json"]
