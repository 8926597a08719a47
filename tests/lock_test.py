"""The lock of a folder: one holder, who is named, and who may die in any way."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from prophy_jax.run import lock
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


def test_of_many_that_find_a_dead_holder_one_takes_over(tmp_path, fast):
    dead = {"host": "elsewhere", "pid": 7, "what": "a run", "since": "noon"}
    for _ in range(5):
        (tmp_path / lock.LOCK).write_text(json.dumps(dead))
        inside, most, refused = [], [], []

        def take(number, inside=inside, most=most, refused=refused):
            try:
                with lock.held(tmp_path, f"number {number}"):
                    inside.append(number)
                    time.sleep(0.2)
                    most.append(len(inside))
                    inside.remove(number)
            except UserError:
                refused.append(number)

        threads = [threading.Thread(target=take, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(most) == {1} and len(most) + len(refused) == 6
        with contextlib.suppress(FileNotFoundError):
            (tmp_path / lock.LOCK).unlink()
        assert os.listdir(tmp_path) == []
