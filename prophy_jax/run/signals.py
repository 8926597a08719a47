"""What a signal to stop does to a command: it ends soon, in order, with a status of its own.

Training saves first (`prophy_jax.run.loop.StopSignal`); what other commands have finished is on the disk.
"""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

STOPPED = 75  # exit status where a signal stopped it and the same command goes on: EX_TEMPFAIL, "try again"
GRACE_S = 5.0  # in which the body ends by itself; it cannot while a program is compiled
# SIGTERM: schedulers, a preemption; SIGHUP: the terminal was closed; the others: Slurm's --signal, as some
# set it.
NUMBERS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(BaseException):
    """A signal has asked the command to stop; the message says which."""


def catch(handler: Callable[[int, FrameType | None], None], numbers: Iterable[int] = NUMBERS) -> None:
    """Sets the handler of signals, other than those that are ignored, as SIGHUP is under nohup."""
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def say(text: str) -> None:
    """A line on stderr, from a handler too: it may have interrupted somebody's print."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


def describe(number: int) -> str:
    """What a command says that has nothing to save."""
    if number == signal.SIGINT:
        return "interrupted"
    return f"stopped by {signal.Signals(number).name}: run the same command to go on"


class Terminal:
    """Where stdout and stderr go to a terminal that is closed, writing to them would raise OSError."""

    def __init__(self) -> None:
        self._open = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def leave(self, number: int) -> None:
        """Where the signal says that the terminal was closed: nothing is written to it any more."""
        if number == signal.SIGHUP and self._open:
            null = os.open(os.devnull, os.O_WRONLY)
            for descriptor in self._open:
                os.dup2(null, descriptor)
            os.close(null)


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """In the body, a signal to stop raises `Stopped`, and Ctrl-C KeyboardInterrupt.

    Ends the process where the body does not end then: Python calls handlers between its own instructions, and
    drops what they raise inside some callbacks of JAX.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    terminal, former = Terminal(), {number: signal.getsignal(number) for number in NUMBERS}

    def stop(number: int, _: FrameType | None) -> None:
        terminal.leave(number)
        raise Stopped(describe(number))

    def end_late() -> None:
        while number := os.read(told, 1):  # at once
            if number[0] in (*NUMBERS, signal.SIGINT):
                time.sleep(GRACE_S)
                if not ended.is_set():
                    say(describe(number[0]))
                    os._exit(130 if number[0] == signal.SIGINT else STOPPED)
        os.close(told)

    ended = threading.Event()
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    threading.Thread(target=end_late, daemon=True).start()
    catch(stop)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(-1)
        for number, handler in former.items():
            if handler is not None:  # None: not of Python
                signal.signal(number, handler)
        os.close(tell)


def end_elsewhere() -> None:
    """From now on the process that handles its signals itself is not ended by `ending`."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


@contextlib.contextmanager
def last_words(message: str) -> Iterator[None]:
    """Prints `message` if this process dies in the body, whatever kills it.

    A child process reads from a pipe, and prints when the pipe closes before a line has come.
    """
    child = subprocess.Popen(
        ["/bin/sh", "-c", 'read -r word || printf "\\n%s\\n" "$0" >&2', f"error: {message}"],
        stdin=subprocess.PIPE,
        start_new_session=True,  # or Ctrl-C would end it too
    )
    try:
        yield
    finally:
        with contextlib.suppress(BrokenPipeError):
            child.communicate(b"done\n")
