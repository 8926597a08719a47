"""What commands say to the user: the one exception that they show as a single line, and counts."""

import contextlib
import errno
import mmap
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from prophy_jax.run import signals


class UserError(Exception):
    """Bad input: the message names the file or setting and the remedy, on one line."""


class NotFinite(UserError):
    """Numbers that became NaN or infinite on their way, in these rows of a batch."""

    def __init__(self, message: str, rows: Iterable[int]) -> None:
        super().__init__(message)
        self.rows = list(rows)


def counted(number: int, noun: str, plural: str = "") -> str:
    """How messages count: "1 clip", "20,000 clips"; `plural` is needed where it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def check_pattern(pattern: str, where: str) -> None:
    """Raises UserError where a pattern of the user's is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is not a regular expression: {error}") from error


# What the system refuses -> what can be done.
_DISK = "free some space, or name a folder on another disk, and run the same command again"
_RIGHTS = "change its permissions, or name another"
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _DISK),
    errno.EFBIG: "raise the limit of the size of files (ulimit -f), and run the same command again",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files, such as by ulimit -n 4096"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _RIGHTS),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP), "name another"),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "see whether its disk or its server works"),
    errno.ENOMEM: "see that more memory is free",
    errno.EPIPE: "its reader is gone; send it to a file",
}
# Where these are met, the file itself may be whole.
_ELSEWHERE = (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ESTALE)
# Of CPython, where memory ends while an exception is made.
_NO_EXCEPTION = ("error return without exception set", "returned NULL without setting an exception")
_NO_THREAD = ("can't start new thread", "can't allocate lock", "can't allocate read lock")  # Python's words
_SOME_MEMORY = 1 << 28  # bytes: a decoded clip
# The same in the texts of libraries that raise no OSError.
_TEXTS = {
    os.strerror(number): number
    for number in _REMEDIES
    if number not in (errno.ENOMEM, errno.EPERM)  # these words may mean something else
}


def _lacks_exception(error: BaseException) -> bool:
    return isinstance(error, SystemError) and str(error).endswith(_NO_EXCEPTION)


def explain_system(error: BaseException) -> str:
    """What the system refused, where, and what to do; "" for any other exception."""
    if isinstance(error, MemoryError) or _lacks_exception(error):
        return "there is not enough memory: free some, or ask for less at a time"
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        named = isinstance(error.filename, str | bytes | os.PathLike)
        place = os.fsdecode(error.filename) if named else "a file or the output"
        return f"{place}: {error.strerror}: {_REMEDIES[error.errno]}"
    if isinstance(error, OSError | ValueError | RuntimeError):  # of TensorStore, Orbax, array_record, XLA
        text = str(error)
        if text in _NO_THREAD or getattr(error, "errno", None) == errno.EAGAIN:
            return "the system starts no more threads: free memory, or raise their limit (ulimit -u)"
        if "RESOURCE_EXHAUSTED" in text and "ut of memory" in text:
            line = next(line for line in text.splitlines() if "ut of memory" in line)
            return f"there is not enough memory on the device ({line.strip()}): ask for less at a time"
        for words, number in _TEXTS.items():
            if words in text:
                found = re.search(r"""["'](/[^"']+)["']""", text)
                return f"{found[1] if found else 'a file'}: {words}: {_REMEDIES[number]}"
    return ""


def shortage(error: BaseException | None) -> BaseException | None:
    """What an error comes from, where that is the system: memory, threads, open files, rights, a lost server.

    The file that could not be read may then be whole. A damaged file may ask for any amount of memory, so
    the system is asked whether it has any.
    """
    while error is not None:
        number = getattr(error, "errno", None)
        if isinstance(error, MemoryError) or number == errno.ENOMEM:
            try:
                mmap.mmap(-1, _SOME_MEMORY).close()
            except OSError:
                return error
        elif number in _ELSEWHERE or str(error) in _NO_THREAD or _lacks_exception(error):
            return error
        error = error.__cause__ or error.__context__
    return None


def one_line(error: BaseException) -> str:
    """What a command prints in place of a traceback; "" for what may be an error of its own."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, signals.Stopped):
        return str(error)
    text = explain_system(shortage(error) or error)
    if not text and isinstance(error, UserError):
        text = str(error)
    return f"error: {' '.join(text.split())}" if text else ""


def close_bars() -> None:
    """Ends the progress bars that are open, so that what is printed next begins a line."""
    if tqdm := sys.modules.get("tqdm"):
        for bar in list(getattr(tqdm.tqdm, "_instances", ())):
            bar.close()


def _drop_echoes() -> None:
    """Where one read fails, Orbax waits for no other, and TensorStore would print a traceback for each."""
    shown = sys.unraisablehook

    def show(what: Any) -> None:
        if not (what.exc_type is RuntimeError and "Event loop is closed" in str(what.exc_value)):
            shown(what)

    sys.unraisablehook = show


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Wraps a command's body: what `one_line` knows becomes one line on stderr and status 1, Ctrl-C 130.

    A signal to stop becomes a line and status 75, see `prophy_jax.run.signals`.
    """
    for number in range(3):  # or a file that is opened takes the place of stdout, and what is printed
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):  # None where it was closed, and progress bars write to it
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    _drop_echoes()
    try:
        with signals.ending():
            yield
        sys.stdout.flush()  # where it cannot be written, this says so
    except BaseException as error:
        text = one_line(error)
        if not text:
            raise
        with contextlib.suppress(OSError, ValueError):  # stderr may be full or closed too
            close_bars()
            print(text, file=sys.stderr, flush=True)
        # What else fails while the process ends, such as an event loop that was half made, follows from it.
        sys.unraisablehook = lambda what: None
        warnings.simplefilter("ignore")
        _give_up_output()
        sys.exit(status_of(error))


def status_of(error: BaseException) -> int:
    """The exit status of a command that ends with it."""
    return {KeyboardInterrupt: 130, signals.Stopped: signals.STOPPED}.get(type(error), 1)


def _give_up_output() -> None:
    """Where stdout or stderr cannot be written, Python would try again at its end, and say so in its way."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
