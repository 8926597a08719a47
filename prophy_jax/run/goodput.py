"""Goodput: the share of a run's wall time that its training steps took, over all its parts.

Steps that a killed part did after its last checkpoint are done again: they count as lost. So does all that is
between its last line of metrics and its end, which nobody knows: it is missing from the sum.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prophy_jax.run import lock

if TYPE_CHECKING:
    from prophy_jax.run.loop import Window

KINDS = {
    "train": "training",
    "start": "start-up",
    "restore": "restoring",
    "compile": "compiling",
    "validation": "validation",
    "samples": "sample clips",
    "save": "saving",
    "repeated": "steps done again",
}


class Goodput:
    """Seconds of wall time by kind, a key of `KINDS`; they go on from the lines of a run's metrics.

    Args:
        lines: as `metrics.read_metrics` gives them, also those past the checkpoint that the run resumes from.
        first_step: that of the checkpoint; 0: from the start.
    """

    def __init__(self, lines: Sequence[Mapping[str, float]], first_step: int) -> None:
        before = next((line for line in reversed(lines) if "goodput/train_s" in line), {})
        self._spent = {kind: before.get(f"goodput/{kind}_s", 0.0) for kind in KINDS}
        done = [
            line["goodput/train_s"]
            for line in lines
            if "goodput/train_s" in line and line["step"] <= first_step
        ]
        trained = done[-1] if first_step and done else 0.0
        self._spent["repeated"] += self._spent["train"] - trained
        self._spent["train"] = trained
        self._then = time.perf_counter() - _age()

    def spend(self, kind: str) -> None:
        """The time since the last call was of this kind."""
        now = time.perf_counter()
        self._spent[kind] += now - self._then
        self._then = now

    @contextlib.contextmanager
    def compiling(self, window: "Window") -> Iterator[None]:
        """The body compiles a step: its time is none of a step, here and in `window`."""
        self.spend("train")
        yield
        window.exclude(time.perf_counter() - self._then)
        self.spend("compile")

    def values(self) -> dict[str, float]:
        """What stands in the metrics."""
        share = self._spent["train"] / (sum(self._spent.values()) or 1.0)
        return {"goodput/share": share, **{f"goodput/{kind}_s": value for kind, value in self._spent.items()}}

    def describe(self) -> str:
        """A line for the user."""
        whole = sum(self._spent.values()) or 1.0
        shares = {kind: f"{100 * seconds / whole:.1f}%" for kind, seconds in self._spent.items()}
        lost = [
            f"{KINDS[kind]} {share}" for kind, share in shares.items() if kind != "train" and share != "0.0%"
        ]
        minutes, seconds = divmod(round(whole), 60)
        wall = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds:02} s"
        return f"goodput: {shares['train']} of {wall} trained" + (f"; {', '.join(lost)}" if lost else "")


def _age() -> float:
    """Seconds since this process began; 0 where the system does not say."""
    try:
        started = lock.start_ticks(os.getpid()) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0
