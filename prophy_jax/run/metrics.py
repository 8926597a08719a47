"""Training metrics as JSON lines, always, and as TensorBoard events."""

import contextlib
import json
import os
import re
from collections.abc import Mapping

from prophy_jax.run.workdir import write_atomically


class MetricsWriter:
    """Appends to WORKDIR/metrics.jsonl and, `summarised`, to WORKDIR/tensorboard.

    A run that resumes at `first_step` (0: from the start) drops the lines that a killed run wrote past its
    checkpoint, so that every step stands once.
    """

    def __init__(self, workdir: str, first_step: int):
        from tensorboardX import SummaryWriter  # imports torch where there is one: two seconds

        self._path = os.path.join(workdir, "metrics.jsonl")
        kept = [line for line in read_metrics(workdir) if first_step and line["step"] <= first_step]
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(self._path, "a")
        self._board = SummaryWriter(os.path.join(workdir, "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in summarised(values).items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def summarised(values: Mapping[str, float]) -> dict[str, float]:
    """Values of a numbered series (load_0, load_1, ...) as its least and its largest; others as they are."""
    found: dict[str, float] = {}
    for name, value in values.items():
        series = re.fullmatch(r"(.+)_\d+", name)
        if series:
            least, largest = f"{series[1]}_min", f"{series[1]}_max"
            found |= {
                least: min(value, found.get(least, value)),
                largest: max(value, found.get(largest, value)),
            }
        else:
            found[name] = value
    return found


def read_metrics(workdir: str) -> list[dict[str, float]]:
    """All whole lines of WORKDIR/metrics.jsonl; a line that a kill cut short is left out."""
    path = os.path.join(workdir, "metrics.jsonl")
    if not os.path.exists(path):
        return []
    lines = []
    with open(path) as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return lines
