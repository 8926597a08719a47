"""A lock on a folder that one process writes: names its holder, and is taken over when that is gone.

The holder touches LOCK every few seconds. Another process that finds it on the same machine looks whether the
holder lives; elsewhere it watches whether the file is still touched, which needs no clocks that agree and no
locks of the file system. So it works on network storage.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prophy_jax.run.errors import UserError
from prophy_jax.run.workdir import name_partial

LOCK = "lock.json"
BEAT_S = 5.0  # between touches
WATCH_S = 20.0  # without a touch, the holder is gone


@contextlib.contextmanager
def held(
    folder: str | os.PathLike, what: str, file: str = LOCK, remedy: str = "", wait: bool = False
) -> Iterator[None]:
    """Holds FOLDER/lock.json while the body runs.

    Args:
        folder: a folder that exists.
        what: what this process does there, for others' messages: "a run of prophy_jax.train".
        file: the lock's name, where the folder has several.
        remedy: what a process may do that is refused.
        wait: for the other process, instead of refusing this one. FileNotFoundError when the folder goes.

    Raises:
        UserError: another process holds it; it names that.
    """
    path = Path(folder) / file
    own = {**_this_process(), "what": what, "token": secrets.token_hex(8)}
    while not _create(path, own):
        holder = _read(path)
        if holder is None:
            continue
        if _lives(path, holder):
            if wait:
                time.sleep(BEAT_S / 5)
                continue
            what, pid, host, since = (holder.get(key, "?") for key in ("what", "pid", "host", "since"))
            raise UserError(
                f"{folder} is written by {what}, process {pid} on {host} since {since}: "
                + (remedy or "wait for it, stop it, or name another folder")
            )
        _remove(path, holder)
    done = threading.Event()

    def touch() -> None:
        while not done.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if (_read(path) or {}).get("token") == own["token"]:
            path.unlink(missing_ok=True)


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "began": _began(pid),
        "since": time.strftime("%F %T %Z"),
    }


def _began(pid: int) -> str:
    """When a process of this machine began, and on which boot; "" where it is gone."""
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {ticks}"
    except (OSError, IndexError):
        return ""


def _lives(path: Path, holder: dict[str, Any]) -> bool:
    """Whether the holder is still there."""
    began = holder.get("began")
    if holder.get("host") == socket.gethostname() and began and os.path.exists("/proc/self/stat"):
        return _began(int(holder["pid"])) == began
    until, first = time.monotonic() + WATCH_S, _stamp(path)
    while time.monotonic() < until:
        time.sleep(BEAT_S / 5)
        now = _stamp(path)
        if now is None or now != first:
            return now is not None
    return False


def _stamp(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _create(path: Path, content: dict[str, Any]) -> bool:
    """Writes the file, whole, unless it is there."""
    partial = name_partial(path)
    partial.write_text(json.dumps(content), encoding="utf-8")
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(json.dumps(content))
        except FileExistsError:
            return False
    finally:
        partial.unlink()
    return True


def _read(path: Path) -> dict[str, Any] | None:
    """What the file says; {} where it is damaged, or only half written; None where it is gone."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return {}


def _remove(path: Path, holder: dict[str, Any]) -> None:
    """Takes away the lock of a holder that is gone; one process at a time, so that it takes no other's."""
    guard = path.with_name(f".{path.name}.removing")
    until = time.monotonic() + WATCH_S
    while True:
        try:
            guard.mkdir()
            break
        except FileExistsError:
            if time.monotonic() > until:  # who made it died there
                break
            time.sleep(BEAT_S / 5)
    try:
        if _read(path) == holder:
            path.unlink(missing_ok=True)
    finally:
        with contextlib.suppress(FileNotFoundError):
            guard.rmdir()
