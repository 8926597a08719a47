"""The lock of a folder: one holder, who is named, and who may die in any way."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from prophy_jax.run import lock, storage
from prophy_jax.run.errors import UserError
from tests.conftest import ROOT

HOLDER = """
import sys, time
from prophy_jax.run import lock
with lock.held(sys.argv[1], "a run"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    monkeypatch.setattr(lock, "WATCH_S", 0.5)


def test_a_holder_is_not_taken_for_dead_where_no_more_files_can_be_opened(monkeypatch):
    def refuse(path):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    assert lock._began(os.getpid())
    monkeypatch.setattr(lock.Path, "read_text", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        lock._began(os.getpid())


def test_a_live_holder_is_named_and_a_dead_one_is_not_waited_for(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(
        UserError, match=f"is written by a run, process {holder.pid} on .* since .*: wait for"
    ):
        lock.held(tmp_path, "another").__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / lock.LOCK).exists()
    start = time.monotonic()
    with lock.held(tmp_path, "another"):
        assert json.loads((tmp_path / lock.LOCK).read_text())["what"] == "another"
    assert time.monotonic() - start < 2 and os.listdir(tmp_path) == []


def test_a_process_with_the_number_of_a_dead_holder_is_another(tmp_path):
    """As in containers, where every first process is number 1."""
    holder = {**lock._this_process(), "began": "another boot 1"}
    (tmp_path / lock.LOCK).write_text(json.dumps(holder))
    with lock.held(tmp_path, "another"):
        pass


@pytest.mark.parametrize("lives", [True, False])
def test_a_holder_on_another_machine_is_watched(tmp_path, fast, lives):
    path = tmp_path / lock.LOCK
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "what": "a run", "since": "noon"}))
    os.utime(path, (1, 1))  # its clock is another
    done = threading.Event()

    def beat():
        for second in range(2, 1000):
            if done.wait(0.05):
                return
            os.utime(path, (second, second))

    thread = threading.Thread(target=beat)
    if lives:
        thread.start()
        with pytest.raises(UserError, match="is written by a run, process 7 on elsewhere since noon"):
            lock.held(tmp_path, "another").__enter__()
        done.set()
        thread.join()
    else:
        with lock.held(tmp_path, "another"):
            assert json.loads(path.read_text())["what"] == "another"


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000])
def test_a_damaged_lock_is_replaced(tmp_path, fast, content):
    (tmp_path / lock.LOCK).write_text(content)
    with lock.held(tmp_path, "a run"):
        pass


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path):
    return tmp_path if request.param == "disk" else storage.path(request.getfixturevalue("bucket"))


def test_of_many_that_find_a_dead_holder_one_takes_over(place, fast):
    dead = {"host": "elsewhere", "pid": 7, "what": "a run", "since": "noon"}
    for _ in range(3):
        (place / lock.LOCK).write_text(json.dumps(dead))
        inside, most, refused = [], [], []

        def take(number, inside=inside, most=most, refused=refused):
            try:
                with lock.held(place, f"number {number}"):
                    inside.append(number)
                    time.sleep(0.2)
                    most.append(len(inside))
                    inside.remove(number)
            except UserError:
                refused.append(number)

        with ThreadPoolExecutor(6) as threads:
            list(threads.map(take, range(6)))
        assert set(most) == {1} and len(most) + len(refused) == 6
        with contextlib.suppress(FileNotFoundError):
            (place / lock.LOCK).unlink()
        assert storage.list_files(place) == {}


def test_a_bucket_holds_the_lock_of_a_live_process_of_another_machine(bucket, fast, monkeypatch):
    """Its touches are seen, and it lets go at its end."""
    monkeypatch.setattr(lock, "_here", lambda: {"host": "elsewhere"})
    with lock.held(bucket, "a run"):
        monkeypatch.undo()
        monkeypatch.setattr(lock, "BEAT_S", 0.05)
        monkeypatch.setattr(lock, "WATCH_S", 1.0)
        with pytest.raises(UserError, match="is written by a run, process .* on elsewhere"):
            lock.held(bucket, "another").__enter__()
    assert storage.list_files(bucket) == {}


def test_those_that_wait_come_one_after_another(place, fast):
    order = []

    def take(number):
        with lock.held(place, f"number {number}", wait=True):
            order.append(number)
            time.sleep(0.1)
            order.append(number)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(take, range(4)))
    assert order[::2] == order[1::2] and sorted(order[::2]) == [0, 1, 2, 3]


def test_a_holder_whose_lock_was_taken_over_ends(tmp_path):
    """It stood still for long, as a suspended machine does: two would write."""
    quick = HOLDER.replace("with lock", "lock.BEAT_S = 0.1\nwith lock")
    holder = subprocess.Popen(
        [sys.executable, "-c", quick, str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    other = {"host": "elsewhere", "pid": 7, "what": "another run", "token": "another"}
    storage.write_atomically(tmp_path / lock.LOCK, json.dumps(other))
    assert holder.wait(10) == 1
    said = holder.stderr.read()
    assert "was taken over by another run, process 7 on elsewhere" in said and "Traceback" not in said
    assert json.loads((tmp_path / lock.LOCK).read_text()) == other
