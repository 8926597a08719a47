"""Work on a Ray cluster of several nodes, all on this machine: the same results, also when nodes go."""

import functools
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prophy_jax.run import checkpoints, checksums, engine
from prophy_jax.run.errors import UserError
from prophy_jax.run.signals import STOPPED
from tests.commands import run_here
from tests.conftest import ROOT, build_run, xla_flags

pytestmark = pytest.mark.jobs

MEMORY = 80 << 20  # of each node, for objects


@pytest.fixture(scope="module")
def cluster():
    """A head node that does not work, and two of one CPU that do."""
    pytest.importorskip("ray", reason="--engine=ray needs the extra ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", xla_flags())
        made = Cluster(head_node_args={"num_cpus": 0, "object_store_memory": MEMORY}, initialize_head=True)
        for _ in range(2):
            made.add_node(num_cpus=1, object_store_memory=MEMORY)
        yield made
        made.shutdown()


@pytest.fixture
def address(cluster, monkeypatch):
    """That of the cluster with two nodes that work, as Ray finds it itself."""
    while len(cluster.worker_nodes) < 2:
        cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    monkeypatch.setattr(engine, "LOOK_S", 0.2)
    return cluster.address


def lose_node(cluster) -> None:
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)


# --- Workers ---------------------------------------------------------------------------------------


class Worker:
    def __init__(self, base: int = 0):
        self.base = base
        self.pid = os.getpid()


def square(worker, items, tick):
    for item in items:
        tick(1)
        time.sleep(0.05)
        yield worker.base + item * item, worker.pid


def share_until(workers, processes: int) -> list[tuple[int, int]]:
    """The squares of 30 numbers, with the process of each, once as many processes do them.

    How long a worker takes to build, while others have done all, depends on the machine.
    """
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = workers.share(square, range(30), total=30)
        if len({pid for _, pid in found}) == processes:
            return found
    raise AssertionError(f"not {processes} processes: {found}")


def test_results_are_in_the_order_of_the_items_and_every_node_works(address):
    make = functools.partial(Worker, base=1)
    with engine.workers("ray", make) as workers:
        found = share_until(workers, 2)
        assert workers.share(square, []) == []
        assert workers.ask(add, 1, 2) == 4
    assert [value for value, _ in found] == [1 + item * item for item in range(30)]
    assert os.getpid() not in {pid for _, pid in found}
    with engine.workers(None, make) as workers:
        assert workers.share(square, range(3)) == [(1, os.getpid()), (2, os.getpid()), (5, os.getpid())]
        assert workers.ask(add, 1, 2) == 4


def add(worker, *values):
    return worker.base + sum(values)


def test_an_item_whose_worker_ends_is_done_by_another_and_nodes_may_come_and_go(
    cluster, address, tmp_path, capfd
):
    with engine.workers("ray", Worker) as workers:
        do = functools.partial(end_once, flag=tmp_path / "ended")
        assert workers.share(do, range(10), total=10) == [2 * item for item in range(10)]
        assert "a worker on " in (said := capfd.readouterr().err) and "10/10" in said
        lose_node(cluster)
        cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
        cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
        found = share_until(workers, 3)
        assert [value for value, _ in found] == [item * item for item in range(30)]
    lose_node(cluster)


def end_once(worker, items, tick, flag):
    for item in items:
        if item == 5 and not flag.exists():
            flag.touch()
            os._exit(1)
        tick(1)
        yield 2 * item


def test_an_item_that_ends_every_worker_is_given_up(address, monkeypatch):
    monkeypatch.setattr(engine, "LOST", 2)
    said = (
        "2 workers ended while doing the same piece of work, the last on .*memory.*what is finished is kept"
    )
    with pytest.raises(UserError, match=said), engine.workers("ray", Worker) as workers:
        workers.share(end, [0])


def end(worker, items, tick):
    os._exit(1)
    yield


@pytest.mark.parametrize("where", ["building", "working"])
def test_what_a_worker_refuses_is_one_line_here(address, where):
    make = refuse if where == "building" else Worker
    with pytest.raises(UserError, match="^no such thing as 3$"), engine.workers("ray", make) as workers:
        workers.share(refuse, [3])


def refuse(*arguments):
    raise UserError("no such\nthing as 3")


def test_a_bug_in_a_worker_is_shown_as_one(address):
    with pytest.raises(ZeroDivisionError), engine.workers("ray", Worker) as workers:
        workers.share(divide, [0])


def divide(worker, items, tick):
    for item in items:
        yield 1 / item


def test_workers_have_the_settings_of_the_command(address, monkeypatch):
    monkeypatch.setenv("JAX_OF_THE_COMMAND", "yes")
    monkeypatch.setattr(checksums, "enabled", False)
    with engine.workers("ray", Worker) as workers:
        assert workers.ask(settings) == ("yes", False, os.getcwd(), None)


def settings(worker):
    return (
        os.environ.get("JAX_OF_THE_COMMAND"),
        checksums.enabled,
        os.getcwd(),
        os.environ.get("OMP_NUM_THREADS"),
    )


def test_a_node_that_does_not_see_the_folder_is_named(address, monkeypatch):
    monkeypatch.setattr(os, "getcwd", lambda: "/nowhere/shared")
    with (
        pytest.raises(UserError, match="the folder /nowhere/shared cannot be seen on .*that all nodes share"),
        engine.workers("ray", Worker) as workers,
    ):
        workers.ask(add)


def test_workers_of_several_devices(cluster, address):
    node = cluster.add_node(num_cpus=4, num_gpus=5, object_store_memory=MEMORY)
    try:
        with engine.workers("ray", Worker, devices=2) as workers:
            found = set(workers.share(gpus, range(20)))
        assert len(found) == 2 and all(len(own.split(",")) == 2 for own in found)
        assert len({gpu for own in found for gpu in own.split(",")}) == 4
        with pytest.raises(UserError, match="8 GPUs or TPU chips, as --devices=8 asks"):
            engine.workers("ray", Worker, devices=8).__enter__()
    finally:
        cluster.remove_node(node)


def gpus(worker, items, tick):
    for _ in items:
        time.sleep(0.2)
        yield os.environ["CUDA_VISIBLE_DEVICES"]


# --- No cluster ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dask", "ray:7", "ray://host:10001", "ray:host"])
def test_other_engines_are_refused(name):
    with pytest.raises(UserError, match=f"--engine={name}: give ray, or ray:HOST:PORT"):
        engine.workers(name, Worker).__enter__()


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--engine=ray needs more packages .*prophy_jax\[ray\]"):
        engine.workers("ray", Worker).__enter__()


@pytest.mark.parametrize("by", ["flag", "variable"])
def test_no_cluster_at_the_address(by, monkeypatch):
    pytest.importorskip("ray", reason="--engine=ray needs the extra ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1" if by == "variable" else "")
    name = "ray" if by == "variable" else "ray:127.0.0.1:1"
    with pytest.raises(UserError, match="no Ray cluster at 127.0.0.1:1 .*ray start --head"):
        engine.workers(name, Worker).__enter__()


# --- Commands --------------------------------------------------------------------------------------


def start(module: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", f"prophy_jax.{module}", *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": xla_flags()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[str, str]:
    out, error = process.communicate()
    assert process.returncode == 0, error
    return out, error


def digests(folder: Path, without: str = "") -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != without
    }


def lose_node_after(cluster, process: subprocess.Popen, done) -> None:
    """Ends a node once `done()`."""
    while not done():
        time.sleep(0.02)
        assert process.poll() is None, process.stderr.read()
    lose_node(cluster)


def test_prepare_on_a_cluster_that_loses_a_node(cluster, address, tmp_path):
    arguments = ["--config=configs/wan.py:tiny", "--config.data.shard=2", "--config.data.sandbox.train=200"]
    finish(start("prepare", *arguments, f"--out={tmp_path}/one"))
    process = start("prepare", *arguments, f"--out={tmp_path}/ray", "--engine=ray")
    lose_node_after(cluster, process, lambda: len(list(tmp_path.glob("ray/work/*-*.json"))) > 9)
    out, error = finish(process)
    assert "216 clips" in out and "is given to another" in error and "216/216" in error
    assert digests(tmp_path / "ray") == digests(tmp_path / "one")


@pytest.mark.slow  # Ray prints of nodes that earlier tests lost
def test_what_is_wrong_is_one_line_and_no_folder(address, tmp_path):
    process = start(
        "prepare", "--config=configs/wan.py:tiny", "--config.codec.module=nope", "--engine=ray",
        f"--out={tmp_path}/bad",
    )  # fmt: skip
    said = "error: no file nope.py in prophy_jax.models, named by the configuration\n"
    out, error = process.communicate()
    assert error == said and all("(raylet)" in line for line in out.splitlines())  # of nodes lost before
    assert process.returncode == 1 and not (tmp_path / "bad").exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_command_that_is_stopped_ends_its_workers_and_goes_on_later(address, tmp_path, sent):
    arguments = ["--config=configs/wan.py:tiny", "--config.data.shard=2", "--config.data.sandbox.train=300"]
    # Or it is deaf to Ctrl-C where the tests run in the background of a shell.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start("prepare", *arguments, f"--out={tmp_path}/out", "--engine=ray")
    signal.signal(signal.SIGINT, before)
    while len(list(tmp_path.glob("out/work/*-*.json"))) < 5:
        time.sleep(0.02)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(sent)
    _, error = process.communicate()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: STOPPED}[sent]
    assert error.splitlines()[-1].startswith(("interrupted", "stopped by SIGTERM: "))
    finish(start("prepare", *arguments, f"--out={tmp_path}/out"))


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("prepare", ["--process=0/2"], "leave out --process"),
        ("label", ["--vlm=none", "--process=0/2"], "leave out --process"),
        ("label", ["--vlm=none", "--preview=3"], "--preview is the work of one process"),
    ],
)
def test_other_ways_to_share_and_work_that_is_not_shared_are_refused(module, arguments, message):
    out = "--out=nowhere"
    done = run_here(f"prophy_jax.{module}", "--config=configs/wan.py:tiny", "--engine=ray", out, *arguments)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_videos_become_records_and_labels_on_a_cluster_that_loses_a_node(
    cluster, address, wisa_sample, tmp_path
):
    pytest.importorskip("torch", reason="labels need the extra label")
    from tests.tiny_vlm import save_tiny_vlm

    save_tiny_vlm(tmp_path / "vlm")
    config = ["--config=configs/wan.py:tiny", "--config.data.shard=1"]
    label = [*config, f"--vlm={tmp_path}/vlm", f"--data={tmp_path}/one", "--config.label.max_new_tokens=3"]
    for name, more in (("one", []), ("ray", ["--engine=ray"])):
        finish(start("prepare", *config, f"--source={wisa_sample}", f"--out={tmp_path}/{name}", *more))
    finish(start("label", *label, f"--out={tmp_path}/one-labels"))
    process = start("label", *label, f"--out={tmp_path}/ray-labels", "--engine=ray")
    lose_node_after(cluster, process, lambda: list(tmp_path.glob("ray-labels/work/*-*.json")))
    assert "is given to another" in finish(process)[1]
    assert digests(tmp_path / "ray") == digests(tmp_path / "one")
    labels = [digests(tmp_path / f"{name}-labels", "manifest.json") for name in ("one", "ray")]
    assert labels[0] == labels[1]


@pytest.mark.slow
def test_clips_on_a_cluster_that_loses_a_node(cluster, address, tmp_path):
    from tests.sample_test import random_like, small_config

    config = small_config()
    config.batch_size = 0
    layout = build_run(config).layout
    checkpoints.save_params(str(tmp_path / "backbone"), random_like(layout["backbone"], 0), {})
    (tmp_path / "prompts").write_text("".join(f"ball {i} rolls\n" for i in range(20)))
    arguments = [
        "--config=configs/wan.py:tiny", "--config.samples.steps=3", f"--checkpoint={tmp_path}/backbone",
        f"--prompts={tmp_path}/prompts", "--batch=1",
    ]  # fmt: skip
    finish(start("sample", *arguments, f"--out={tmp_path}/one"))
    process = start("sample", *arguments, f"--out={tmp_path}/ray", "--engine=ray")
    lose_node_after(cluster, process, lambda: len(list(tmp_path.glob("ray/*.mp4"))) > 3)
    out, error = finish(process)
    assert f"20 clips in {tmp_path}/ray\n" in out and "is given to another" in error and "60/60" in error
    assert digests(tmp_path / "ray") == digests(tmp_path / "one")
