"""A lock on a folder that one process writes: names its holder, and is taken over when that is gone.

The holder touches LOCK every few seconds. Another process that finds it on the same machine looks whether the
holder lives; elsewhere it watches whether the file is still touched, which needs no clocks that agree and no
locks of the file system. So it works on network storage and in buckets. A holder whose lock was taken over,
since it stood still or lost its storage for long, ends at once: two would write.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prophy_jax.run import storage
from prophy_jax.run.errors import UserError, shortage

LOCK = "lock.json"
BEAT_S = 5.0  # between touches
WATCH_S = 20.0  # without a touch, the holder is gone


@contextlib.contextmanager
def held(
    folder: str | os.PathLike,
    what: str,
    file: str = LOCK,
    wait: bool = False,
    remedy: str = "wait for it, stop it, or name another folder",
) -> Iterator[None]:
    """Holds FOLDER/FILE while the body runs.

    Args:
        folder: a folder that exists, or an address in a bucket.
        what: what this process does there, for others' messages: "a run of prophy_jax.train".
        file: the lock's own name.
        wait: whether to wait until another process has let go of it.
        remedy: what the user can do where another process holds it.

    Raises:
        UserError: another process holds it; it names that.
        FileNotFoundError: the folder is gone.
    """
    path = storage.path(folder) / file
    own = {**_this_process(), "what": what, "token": secrets.token_hex(8)}
    content = json.dumps(own).encode()
    while not storage.create(path, content):
        holder = _read(path)
        if holder is None:
            continue
        if not _lives(path, holder):
            _remove(path, holder)
        elif wait:
            time.sleep(BEAT_S / 10)
        else:
            what, pid, host, since = (holder.get(key, "?") for key in ("what", "pid", "host", "since"))
            raise UserError(f"{folder} is written by {what}, process {pid} on {host} since {since}: {remedy}")
    done = threading.Event()

    def touch() -> None:
        while not done.wait(BEAT_S):
            with contextlib.suppress(Exception):  # the storage may come back
                if (found := _read(path)) == own:
                    storage.touch(path, content)
                elif found and found.get("token") and not done.is_set():
                    print(
                        f"\nerror: {folder} was taken over by {found.get('what')}, process "
                        f"{found.get('pid')} on {found.get('host')}, while this process stood still: it ends",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(1)

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if _read(path) == own:
            path.unlink(missing_ok=True)


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {**_here(), "pid": pid, "began": _began(pid), "since": time.strftime("%F %T %Z")}


def _here() -> dict[str, str]:
    """Where the numbers of processes mean the same: containers of one machine may share its name."""
    try:
        return {"host": socket.gethostname(), "space": os.readlink("/proc/self/ns/pid")}
    except OSError:
        return {"host": socket.gethostname()}


def _began(pid: int) -> str:
    """When a process of this machine began, and on which boot; "" where it is gone."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {start_ticks(pid)}"
    except (FileNotFoundError, ProcessLookupError, IndexError, ValueError):
        return ""


def start_ticks(pid: int) -> int:
    """Clock ticks from the boot of this machine to the start of a process. OSError where it is gone."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def _lives(path: storage.AnyPath, holder: dict[str, Any]) -> bool:
    """Whether the holder is still there."""
    began = holder.get("began")
    if began and _here().items() <= holder.items() and os.path.exists("/proc/self/stat"):
        return _began(int(holder["pid"])) == began
    until, first = time.monotonic() + WATCH_S, storage.stamp(path)
    while time.monotonic() < until:
        time.sleep(BEAT_S / 5)
        now = storage.stamp(path)
        if now is None or now != first:
            return now is not None
    return False


def _read(path: storage.AnyPath) -> dict[str, Any] | None:
    """What the file says; {} where it is damaged, or only half written; None where it is gone."""
    try:
        content = json.loads(path.read_bytes())
        return content if isinstance(content, dict) else {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        if shortage(error):
            raise
        return {}


def _remove(path: storage.AnyPath, holder: dict[str, Any]) -> None:
    """Takes away the lock of a holder that is gone; one process at a time, so that it takes no other's."""
    guard = path.with_name(f".{path.name}.removing")
    until = time.monotonic() + WATCH_S
    while not storage.create(guard, b"") and time.monotonic() < until:  # or who made it died there
        time.sleep(BEAT_S / 5)
    try:
        if _read(path) == holder:
            path.unlink(missing_ok=True)
    finally:
        guard.unlink(missing_ok=True)
