"""Jobs of several processes: how they start, what they agree on, and what they print when one dies.

A process that runs alone may call everything here but `job`; nothing then waits or gathers.
"""

import contextlib
import os
import re
import socket
import sys
import threading
import traceback
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from prophy_jax.run import signals
from prophy_jax.run.errors import UserError, close_bars, one_line, status_of

# Seconds.
START_S = 300  # all processes must join in this time: hosts of a pod start minutes apart
LOST_S = 60  # a process that is silent for so long counts as dead
END_S = 7 * 24 * 3600  # a process that is done waits for the others; dead ones are noticed without this


@contextlib.contextmanager
def job(where: str, saves: bool = False) -> Iterator[None]:
    """Joins the job, runs the body, and ends the process when the body raises.

    Enter it before anything touches a device. JAX itself ends a process that loses the others; the line that
    says what to do then comes from a child process that outlives it.

    Args:
        where: "auto", which asks Slurm, Cloud TPU, GKE or Open MPI, or "HOST:PORT,I/P" for process I of P,
            with process 0 at HOST:PORT.
        saves: JAX notes SIGTERM, and the body asks it (`prophy_jax.run.loop.StopSignal`). Otherwise SIGTERM
            stops the body.

    Raises:
        UserError: when `where` cannot be understood.
    """
    arguments = parse(where)
    host = socket.gethostname()
    missing = (
        f"cannot join the job --distributed={where} ({host}): not all processes came within {START_S} s, or "
        "another job uses this address. Check that process 0 runs, that its host and port can be reached, "
        "that no old process is left, and that all give the same address and count"
    )
    jax.config.update("jax_enable_preemption_service", saves)
    with signals.last_words(missing):
        _initialize(arguments)
    lost = (
        f"process {jax.process_index()} of {jax.process_count()} ({host}) lost the others, or was killed: "
        "see the log of the process that ended first, then run the same command again, on any number of "
        "processes: it resumes from what was saved"
    )
    try:
        with signals.last_words(lost):
            yield
    except BaseException as error:
        with contextlib.suppress(OSError, ValueError):  # a full disk may have the logs
            close_bars()
            print(_error_text(error, lost), file=sys.stderr, flush=True)
            sys.stdout.flush()
        # Not by sys.exit: at a proper end, JAX waits for the others, who wait for this one.
        os._exit(status_of(error))


def parse(where: str) -> dict[str, str | int]:
    """Arguments of `jax.distributed.initialize`; none for "auto". Raises UserError."""
    if where == "auto":
        return {}
    match = re.fullmatch(r"(.+:(\d+)),(\d+)/(\d+)", where)
    if not match or int(match[3]) >= int(match[4]) or int(match[2]) > 65535:
        raise UserError(f"--distributed={where}: give auto, or HOST:PORT,I/P from I = 0 to P - 1")
    return {
        "coordinator_address": match[1],
        "process_id": int(match[3]),
        "num_processes": int(match[4]),
        "cluster_detection_method": "deactivate",  # or Slurm would say which device to use
    }


def _initialize(arguments: dict[str, str | int]) -> None:
    # JAX's own deadline ends the process with a stack trace: ours comes first.
    deadline = threading.Timer(START_S, os._exit, [1])
    deadline.start()
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=START_S + 30,
            heartbeat_timeout_seconds=LOST_S,
            shutdown_timeout_seconds=END_S,
        )
    except ValueError as error:
        raise UserError(
            "--distributed=auto finds no Slurm, Cloud TPU, GKE or Open MPI here: give "
            "--distributed=HOST:PORT,I/P, or leave it out to run one process"
        ) from error
    except RuntimeError as error:  # raised by the cluster's own tools
        raise UserError(f"cannot join the job: {error}") from error
    finally:
        deadline.cancel()


def _error_text(error: BaseException, lost: str) -> str:
    if text := one_line(error):
        return text
    # Collectives may notice it before JAX does: Gloo on CPUs, NCCL on GPUs.
    if isinstance(error, jax.errors.JaxRuntimeError) and re.search("(?i)gloo|nccl|connection", str(error)):
        return f"\nerror: {lost} ({str(error).splitlines()[0]})"
    return "".join(traceback.format_exception(error))


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """All processes complete the body, or all raise: for what may fail on one of them alone.

    The body itself must not wait for the others. Raises UserError where another process raised.
    """
    if jax.process_count() == 1:
        yield
        return
    try:
        yield
    except BaseException:
        _all(False)
        raise
    if not _all(True):
        raise UserError("another process failed: its log says why")


def _all(value: bool) -> bool:
    return bool(multihost_utils.process_allgather(np.array(value)).all())


def agreed(value: bool) -> bool:
    """What the first process says, on all."""
    return value if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def fetch(array: jax.Array | np.ndarray) -> np.ndarray:
    """The whole array on every process. All must call it, even if only the first needs the result."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
