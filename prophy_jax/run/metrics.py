"""Training metrics as JSON lines, always, as TensorBoard events, and in Weights & Biases where asked for."""

import contextlib
import io
import json
import math
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from prophy_jax.run import storage
from prophy_jax.run.errors import UserError
from prophy_jax.run.workdir import config_as_json

EVENTS_S = 60.0  # between copies of TensorBoard's events into a bucket


class MetricsWriter:
    """Appends to WORKDIR/metrics.jsonl and, `summarised`, to WORKDIR/tensorboard and a run of wandb, if any.

    A run that resumes at `first_step` (0: from the start) drops the lines that a killed run wrote past its
    checkpoint, so that every step stands once. What is known of a step later has a line of its own until the
    run ends or resumes.
    """

    def __init__(self, workdir: str, first_step: int, wandb_run: Any = None):
        self._wandb, self._workdir = wandb_run, workdir
        kept = [line for line in read_metrics(workdir) if first_step and line["step"] <= first_step]
        self._folder, self._sent = workdir, 0.0
        if storage.in_bucket(workdir):  # nothing can be appended there
            self._folder = storage.scratch_folder()
        self._path = os.path.join(self._folder, "metrics.jsonl")
        storage.write_atomically(self._path, _as_lines(kept))
        self._file = open(self._path, "a")
        self._board = _find_summary_writer()(
            os.path.join(self._folder, "tensorboard"), purge_step=first_step + 1
        )
        self._send()

    def _send(self, all_files: bool = False) -> None:
        """Copies what was written into a bucket; the events, which are larger, only now and then."""
        if self._folder == self._workdir:
            return
        names = ["metrics.jsonl"]
        if all_files or time.monotonic() > self._sent + EVENTS_S:
            self._board.flush()
            names, self._sent = list(storage.list_files(self._folder)), time.monotonic()
        for name in names:
            storage.send(os.path.join(self._folder, name), os.path.join(self._workdir, name))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        self._send()
        shown = summarised(values)
        for name, value in shown.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(shown, step=step)

    def write_clips(self, step: int, frames: np.ndarray, fps: float, text: str) -> None:
        """Shows clips, frames uint8 (F, H, W, 3), and a Markdown text on them."""
        from tensorboardX.proto.summary_pb2 import Summary

        file, (first, *others) = io.BytesIO(), [Image.fromarray(frame) for frame in frames]
        every = round(1000 / fps)  # milliseconds
        first.save(file, "GIF", save_all=True, append_images=others, duration=every, loop=0)
        image = Summary.Image(
            height=first.height, width=first.width, colorspace=3, encoded_image_string=file.getvalue()
        )
        self._board.file_writer.add_summary(Summary(value=[Summary.Value(tag="samples", image=image)]), step)
        self._board.add_text("samples", text, step)
        if self._wandb:
            import wandb

            file.seek(0)
            clips = wandb.Video(file, caption=text, format="gif")
            self._wandb.log({"samples": clips}, step=step)

    def close(self) -> None:
        self._file.close()
        storage.write_atomically(self._path, _as_lines(read_metrics(self._folder)))
        self._board.close()
        self._send(all_files=True)
        if self._wandb:
            self._wandb.finish()


def _as_lines(lines: Iterable[Mapping[str, float]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _find_summary_writer() -> type:
    """That of tensorboardX, which would import torch where there is one: two seconds, for nothing."""
    hidden = sys.modules.setdefault("torch", None) is None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter


def check_wandb(project: str) -> None:
    """Raises UserError when metrics should go to a wandb project ("": none) and cannot."""
    if not project:
        return
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f'config.log.wandb={project!r} needs a package: pip install "/path/to/prophy_jax[wandb]", or '
            "leave config.log.wandb empty"
        ) from error
    if os.environ.get("WANDB_MODE", "online") not in ("online", "run"):
        return
    try:
        known = wandb.login(prompt=False)
    except (wandb.errors.Error, OSError) as error:
        raise _refusal(error) from error
    if not known:
        raise UserError(
            f"config.log.wandb={project!r}, but nobody is logged in: run wandb login, or set "
            "WANDB_MODE=offline and send the run later with wandb sync"
        )


def _refusal(error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(
        f"wandb does not start ({reason}): set WANDB_MODE=offline, which needs no network and no login, or "
        "leave config.log.wandb empty"
    )


def start_wandb(project: str, workdir: str, config: Any) -> Any:
    """The run of WORKDIR in a wandb project, begun or, by the identifier in WORKDIR/wandb_id, continued.

    Returns None without a project. Raises UserError when wandb refuses.
    """
    if not project:
        return None
    import wandb

    path = storage.path(workdir) / "wandb_id"
    if not path.exists():
        storage.write_atomically(path, secrets.token_hex(4))
    identifier = path.read_text().strip()
    folder = tempfile.mkdtemp(prefix="prophy_jax-") if storage.in_bucket(workdir) else workdir
    own = config_as_json(config)
    try:
        return wandb.init(project=project, id=identifier, resume="allow", dir=folder, config=own)
    except (wandb.errors.Error, OSError) as error:
        raise _refusal(error) from error


def summarised(values: Mapping[str, float]) -> dict[str, float]:
    """Values of a numbered series (load_0, load_1, ...) in few numbers; others as they are.

    A series has its least, its largest and, where none is below 0, its entropy as shares of their sum: 1
    where all are equal, 0 where one has all.
    """
    found: dict[str, float] = {}
    series: dict[str, list[float]] = {}
    for name, value in values.items():
        if numbered := re.fullmatch(r"(.+)_\d+", name):
            series.setdefault(numbered[1], []).append(value)
        else:
            found[name] = value
    for name, own in series.items():
        found |= {f"{name}_min": min(own), f"{name}_max": max(own)}
        if len(own) > 1 and min(own) >= 0 and sum(own) > 0:
            shares = [value / sum(own) for value in own if value > 0]
            found[f"{name}_entropy"] = sum(s * math.log(1 / s) for s in shares) / math.log(len(own))
    return found


def read_metrics(workdir: str) -> list[dict[str, float]]:
    """All steps of WORKDIR/metrics.jsonl; a line that is cut short or names no step is left out.

    Lines of one step, one after the other, are given as one.
    """
    path = storage.path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = []
    with path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):  # not JSON, or not UTF-8
                if not isinstance(found := json.loads(line), dict) or type(found.get("step")) is not int:
                    continue
                if lines and lines[-1]["step"] == found["step"]:
                    found = lines.pop() | found
                lines.append(found)
    return lines
