"""What a training loop needs around its steps: wall time, signals to stop, and losses that are not finite."""

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence

import jax
from jax.experimental import multihost_utils

from prophy_jax.run.checkpoints import TrainCheckpoints
from prophy_jax.run.errors import UserError


class Window:
    """Wall time between two readings of the metrics: no step in between waits for the device."""

    def __init__(self, step: int) -> None:
        self.open(step)

    def open(self, step: int) -> None:
        self._step, self._start, self._wait = step, time.perf_counter(), 0.0
        self._tokens = self._flops = 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._wait += time.perf_counter() - before

    def count(self, tokens: int, flops: int) -> None:
        self._tokens, self._flops = self._tokens + tokens, self._flops + flops

    def close(self, step: int) -> dict[str, float]:
        steps, seconds = step - self._step, time.perf_counter() - self._start
        return {
            "time/step_s": seconds / steps,
            "time/data_wait_s": self._wait / steps,
            "speed/tokens_per_s": self._tokens / seconds,
            "speed/model_tflop_per_s": self._flops / seconds / 1e12,
        }


class StopSignal:
    """Notes SIGTERM and SIGINT, so that the loop can save after a step, the same on every process."""

    def __init__(self, first_step: int) -> None:
        self._noted, self._first_step, self._alone = False, first_step, jax.process_count() == 1
        signal.signal(signal.SIGINT, self._note)
        if self._alone:  # otherwise JAX has its own handler, which tells the other processes
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: object) -> None:
        self._noted = True
        if not self._alone:
            signal.raise_signal(signal.SIGTERM)

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`. Ask after every step: processes then agree on a later one."""
        if self._alone:
            return self._noted
        # Counted from the start of this process: a signal that came before it stops at the first.
        return multihost_utils.reached_preemption_sync_point(step - self._first_step)


def stop_if_not_finite(
    bad_step: int, recent_ids: Iterable[tuple[int, Sequence[str]]], saved: TrainCheckpoints
) -> None:
    """Raises UserError, which names the step and its clips, unless `bad_step` is -1: none."""
    if bad_step < 0:
        return
    saved.close()
    ids = next((", ".join(ids) for step, ids in recent_ids if step == bad_step), "unknown")
    latest = saved.latest()
    raise UserError(
        f"the loss was not finite at step {bad_step + 1}, clips {ids}; last good checkpoint: "
        f"{os.path.join(saved.folder, str(latest)) if latest else 'none yet'}. "
        "Lower the learning rates or fix these clips, then run again to resume from it"
    )
