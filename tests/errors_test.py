"""What commands print in place of a traceback, and what keeps its traceback."""

import errno
import os
import subprocess
import sys
import threading

import pytest
from tqdm import tqdm

from prophy_jax.data import records
from prophy_jax.data.recording import decode_ahead
from prophy_jax.run import errors
from prophy_jax.run.errors import UserError, one_line, one_line_errors

# As libraries say it: TensorStore, array_record, XLA.
TENSORSTORE = (
    'NOT_FOUND: Error opening "zarr" driver: Error writing local file "/data/x/.zarray": Failed to write: '
    "No space left on device [OS error 28: ENOSPC No space left on device]"
)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("a file\nis wrong"), "error: a file is wrong"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "error: /x/y: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", b"/x/y"), "error: /x/y: Permission denied: "),
        (OSError(errno.EMFILE, "Too many open files"), "error: a file or the output: Too many"),
        (ValueError(TENSORSTORE), "error: /data/x/.zarray: No space left on device: free"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), "error: there is not enough"),
        (MemoryError(), "error: there is not enough memory"),
        (SystemError("error return without exception set"), "error: there is not enough memory"),
        (SystemError("a bug"), ""),
        (KeyboardInterrupt(), "interrupted"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), ""),  # may be an error of ours
        (KeyError("No space left on device"), ""),
        (ValueError("shapes do not match"), ""),
        (SystemExit(3), ""),
    ],
)  # fmt: skip
def test_what_the_system_refuses_is_one_line_and_an_error_of_ours_is_none(error, line):
    assert one_line(error).startswith(line) and bool(one_line(error)) == bool(line)


def damaged_by(cause: BaseException) -> UserError:
    """As code raises it that takes any failure to read a file for a damaged file."""
    try:
        raise UserError("clip.mp4 is damaged: download it again") from cause
    except UserError as error:
        return error


@pytest.mark.parametrize(
    ("cause", "line"),
    [
        (OSError(errno.EMFILE, "Too many open files", "clip.mp4"), "clip.mp4: Too many open files: raise"),
        (OSError(errno.EAGAIN, "Resource temporarily unavailable"), "the system starts no more threads"),
        (RuntimeError("can't start new thread"), "the system starts no more threads"),
        (
            PermissionError(errno.EACCES, "Permission denied", "clip.mp4"),
            "clip.mp4: Permission denied: change",
        ),
        (OSError(errno.ESTALE, "Stale file handle", "clip.mp4"), "clip.mp4: Stale file handle: see whether"),
        (SystemError("error return without exception set"), "there is not enough memory"),
        (OSError(errno.ENOENT, "No such file", "clip.mp4"), "clip.mp4 is damaged"),
        (MemoryError(), "clip.mp4 is damaged"),  # it asks for an absurd size: there is memory
    ],
)
def test_a_file_is_not_called_damaged_where_the_system_was_short_of_something(cause, line):
    assert one_line(damaged_by(cause)).startswith(f"error: {line}")


def test_a_file_is_not_called_damaged_where_there_is_no_memory(monkeypatch):
    monkeypatch.setattr(errors, "_SOME_MEMORY", 1 << 60)
    assert one_line(damaged_by(MemoryError())).startswith("error: there is not enough memory")


def test_no_clip_is_skipped_where_the_system_was_short_of_something():
    class Source:
        def read(self, clip, *_):
            raise clip

    def read(cause):
        data = type("Data", (), {"fps": 8, "max_upscale": 1})
        return next(decode_ahead(Source(), [damaged_by(cause)], (), data, 1))

    assert read(ValueError("no video"))[1] == "clip.mp4 is damaged: download it again"
    for number in (errno.EAGAIN, errno.EACCES):
        with pytest.raises(UserError):
            read(OSError(number, os.strerror(number)))


def test_threads_that_array_record_would_wait_for_are_asked_for_first(monkeypatch):
    start, before = threading.Thread.start, threading.active_count()

    def refused(thread):
        if threading.active_count() > before + 20:
            raise RuntimeError("can't start new thread")
        start(thread)

    records.require_threads.cache_clear()
    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(RuntimeError, match="can't start"):
        records.require_threads()
    assert threading.active_count() == before
    monkeypatch.setattr(threading.Thread, "start", start)
    records.require_threads()
    assert threading.active_count() == before


def test_an_error_begins_a_line_below_a_progress_bar(capfd):
    bar = tqdm(total=3, file=sys.stderr)
    bar.update()
    with pytest.raises(SystemExit, match="1"), one_line_errors():
        raise UserError("wrong")
    assert capfd.readouterr().err.endswith("\nerror: wrong\n")


ECHO = """
from prophy_jax.run.errors import UserError, one_line_errors

class Half:
    def __del__(self):
        raise AttributeError("made by half")

async def asked():
    pass

with one_line_errors():
    half, waited = Half(), asked()
    raise UserError("wrong")
"""


def test_what_fails_after_an_error_is_not_shown():
    done = subprocess.run([sys.executable, "-c", ECHO], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "error: wrong\n")


PROGRAM = """
from prophy_jax.run.errors import one_line_errors
with one_line_errors():
    import os
    print("x" * 10)
    assert os.open("/dev/null", os.O_RDONLY) > 2
"""


def test_output_that_cannot_be_written_is_said_once():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", PROGRAM], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No space left" in done.stderr


def test_files_do_not_take_the_place_of_closed_output():
    shell = f'{sys.executable} -c "$0" >&- 2>&-'
    assert subprocess.run(["/bin/sh", "-c", shell, PROGRAM], env=dict(os.environ)).returncode == 0
