"""What a training loop needs around its steps: wall time, signals to stop, and losses that are not finite."""

import contextlib
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from prophy_jax.run import cli, signals, storage
from prophy_jax.run.checkpoints import TrainCheckpoints
from prophy_jax.run.errors import UserError

T = TypeVar("T")


class Window:
    """Wall time between two readings of the metrics: no step in between waits for the device."""

    def __init__(self, step: int) -> None:
        self.open(step)

    def open(self, step: int) -> None:
        self._step, self._start, self._wait = step, time.perf_counter(), 0.0
        self._tokens = self._flops = 0
        self._losses: list[jax.Array] = []  # on the devices: reading one would wait for its step

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._wait += time.perf_counter() - before

    def exclude(self, seconds: float) -> None:
        """These have passed, and no step took them."""
        self._start += seconds

    def count(self, tokens: int, flops: int, loss: jax.Array) -> None:
        self._tokens, self._flops = self._tokens + tokens, self._flops + flops
        self._losses = [*self._losses[-999:], loss]

    @property
    def mean_loss(self) -> float:
        """Of the steps of the window, the last thousand at most."""
        return float(np.mean(jax.device_get(self._losses)))

    def close(self, step: int) -> dict[str, float]:
        steps, seconds = step - self._step, time.perf_counter() - self._start
        return {
            "time/step_s": seconds / steps,
            "time/data_wait_s": self._wait / steps,
            "speed/tokens_per_s": self._tokens / seconds,
            "speed/model_tflop_per_s": self._flops / seconds / 1e12,
        }


def is_due(step: int, every: int, last: bool, always: bool) -> bool:
    """Whether something happens after `step`: every so many steps and at the last.

    With `every` of 0 it never does, or only at the last step when the run needs it (`always`).
    """
    return last and bool(every or always) or bool(every) and step % every == 0


class Progress:
    """What the first process says on stderr: a bar, or, where that is no terminal, plain lines."""

    def __init__(self, steps: int, first_step: int, first: bool) -> None:
        self._steps, self._first_step, self._first = steps, first_step, first
        self._plain = not sys.stderr.isatty()
        if first and first_step < steps:
            print("compiling the first step (about a minute)", file=sys.stderr, flush=True)
        hidden = self._plain or not first
        self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True, disable=hidden)

    def advance(self, step: int) -> None:
        self._bar.update()

    def show(self, step: int, loss: float, seconds: float) -> None:
        """Shows the mean loss of the steps since it was shown last, and the seconds that a step took."""
        self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        if self._first and self._plain:
            text = f"step {step}/{self._steps}  loss {loss:.4f}  {seconds:.3g} s a step"
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.close()


# What `sample` reads of a configuration, and what `evaluate` does not.
_SAMPLED = "data|backbone|parts|codec|text_encoder|objective|samples|mesh|attention|frozen_dtype|.*_params"
_TRAINED = "steps|caption_dropout|log|checkpoint"


def describe_folder(workdir: str, trained: Sequence[str]) -> str:
    """What a finished run has written where, and what to do with it."""
    place = {name: shlex.quote(os.path.join(workdir, name)) for name in ("tensorboard", "profile", *trained)}
    meanings = {
        "metrics.jsonl": "losses, gradients, routers and times, a JSON line each time",
        "tensorboard": f"the same as curves: tensorboard --logdir={place['tensorboard']}",
        "samples": "sample clips above the real ones",
        "checkpoints": "to resume from",
        "profile": f"traces of steps: xprof --logdir={place['profile']}",
        **{name: f"trained parameters of the {name} (EMA)" for name in trained},
    }
    there = {name: text for name, text in meanings.items() if (storage.path(workdir) / name).exists()}
    width = max(map(len, there))
    backbone = [f"--checkpoint={place['backbone']}"] if "backbone" in trained else []
    folders = " ".join(backbone + [f"--branch={place[name]}" for name in trained if name != "backbone"])
    file, keys = cli.typed_configuration()
    sampled, measured = (
        shlex.join(file + [word for key in keys if matches(key.partition(".")[0]) for word in keys[key]])
        for matches in (re.compile(_SAMPLED).fullmatch, lambda name: not re.fullmatch(_TRAINED, name))
    )
    return "\n".join(
        [
            f"done: {workdir} holds",
            *(f"  {name:<{width}}  {text}" for name, text in there.items()),
            "next:",
            f'  python -m prophy_jax.sample {sampled} {folders} --prompt="..." --out=samples',
            f"  python -m prophy_jax.evaluate {measured} --workdir={shlex.quote(workdir)}",
        ]
    )


class _CutShort(BaseException):
    """Ends what a process does between its steps."""


def _end_at_once(*_: Any) -> None:
    """Without the ends of Python's threads: one that saves would fail there, and say so at length."""
    signals.say("interrupted")
    os._exit(130)


class StopSignal:
    """Notes signals to stop, so that the loop can save after a step, the same on every process.

    Those of `signals.NUMBERS`, and SIGINT, where a second one ends the process. Until the first step is done
    there is nothing to save, and they do what they do in other commands.
    """

    def __init__(self, first_step: int) -> None:
        self._noted, self._first_step, self._alone = False, first_step, jax.process_count() == 1
        self._cuts, self._terminal = False, signals.Terminal()

    def _begin(self) -> None:
        signals.end_elsewhere()
        signals.catch(self._note, (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2))
        if self._alone:  # otherwise JAX has its own handler, which tells the other processes
            signals.catch(self._note, (signal.SIGTERM,))

    def _note(self, number: int, _: FrameType | None) -> None:
        self._terminal.leave(number)
        if not self._noted:
            again = "; again: ends at once" if number == signal.SIGINT else ""
            signals.say(f"{signal.Signals(number).name}: saving after this step{again}")
        self._noted = True
        if number == signal.SIGINT:
            signal.signal(number, _end_at_once)
        if not self._alone:
            signal.raise_signal(signal.SIGTERM)
        elif self._cuts:
            raise _CutShort

    @property
    def noted(self) -> bool:
        """Whether a signal has come to the one process of this run."""
        return self._alone and self._noted

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`. Ask after every step: processes then agree on a later one."""
        if step == self._first_step + 1:
            self._begin()
        if self._alone:
            return self._noted
        # Counted from the start of this process: a signal that came before it stops at the first.
        return multihost_utils.reached_preemption_sync_point(step - self._first_step)

    def unless_noted(self, work: Callable[[], T]) -> T | None:
        """What `work` gives. None where a signal has come to the one process of this run; it ends `work`."""
        if self.noted:
            return None
        try:
            self._cuts = self._alone
            try:
                return work()
            finally:
                self._cuts = False
        except _CutShort:
            return None


class Profile:
    """Traces `count` steps with jax.profiler into WORKDIR/profile, after the first `skip` of this process.

    Args:
        workdir: the folder of the run.
        first_step: where this process begins.
        chosen: (skip, count), or () for none.
    """

    def __init__(self, workdir: str, first_step: int, chosen: Sequence[int]) -> None:
        skip, count = chosen or (0, 0)
        self._folder = self._written = os.path.join(workdir, "profile")
        if storage.in_bucket(workdir):  # the profiler writes to disks alone
            self._written = storage.scratch_folder() if chosen else ""
        self._from = first_step + skip if count else -1
        self._to, self._on = self._from + count, False
        self.advance(first_step, None)

    def advance(self, step: int, values: Any) -> None:
        """To be called with the number of steps done and what the last one gave."""
        if step == self._to:
            jax.block_until_ready(values)
            self.close()
        if step == self._from:
            self._on = True
            jax.profiler.start_trace(self._written)

    def close(self) -> None:
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            if self._written != self._folder:
                storage.upload(Path(self._written), self._folder)
                storage.remove(self._written)
            folder = shlex.quote(self._folder)
            print(f"traced up to {self._to - self._from} steps: xprof --logdir={folder}", file=sys.stderr)


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
        f"the loss, its gradient or the parameters were not finite at step {bad_step + 1}, clips {ids}; last "
        "good checkpoint: "
        f"{os.path.join(saved.folder, str(latest)) if latest else 'none yet'}. "
        "Lower the learning rates or fix these clips, then run again to go on from it"
    )
