"""Proposes categories of clips from their captions, for a person to look through.

Each caption is put to the model with one question a category, as text alone: a caption has a hundred tokens
and a video thousands, and the videos need not be there. The score is the probability that the answer begins
with "Yes" rather than "No"; nothing is generated. How good it is on real captions was never measured.

The answer is a table that `prophy_jax.prepare --source` reads:

    id,video,split,caption,category,scores
    a,cats/a.mp4,train,A ball hits a wall.,"collision, rigid body motion","collision 0.97, rigid body ..."

E categories.
"""

import contextlib
import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from prophy_jax.data.taxonomy import Taxonomy
from prophy_jax.labels.vlm import Vlm
from prophy_jax.run.errors import UserError
from prophy_jax.run.storage import write_atomically

QUESTION = 'A video has this caption: "{caption}"\nDoes the video show {name}? Answer Yes or No.'
AT_ONCE = 64  # questions of one forward pass, at most
LONGEST = 4000  # characters of a caption that are put to the model
COLUMNS = ("id", "video", "split", "caption", "category", "scores")
BEST = 3  # scores that the table shows


class Captioned(NamedTuple):
    """A clip: where its video is, relative to the table, and the categories that it has already."""

    id: str
    video: str
    split: str
    caption: str
    names: tuple[str, ...]


def ask(model: Vlm, captions: Sequence[str], known: Taxonomy) -> np.ndarray:
    """(len(captions), E) float64 scores from 0 to 1.

    Raises:
        UserError: the memory does not suffice, or the model gives no numbers.
    """
    # "<|" begins special tokens, such as the end of a message; captions that models wrote may hold them.
    shown = [caption[:LONGEST].replace("<|", "< |") for caption in captions]
    questions = [QUESTION.format(caption=caption, name=name) for caption in shown for name in known.names]
    try:
        parts = [questions[first : first + AT_ONCE] for first in range(0, len(questions), AT_ONCE)]
        odds = np.concatenate([model.prefer(part, "Yes", "No") for part in parts])  # (clips E,)
    except torch.OutOfMemoryError as error:
        raise UserError("the model runs out of memory: lower config.label.batch") from error
    if not np.isfinite(odds).all():
        raise UserError("the model's scores are not finite: download it again, or set config.label.dtype")
    return 1 / (1 + np.exp(-odds.astype(np.float64).reshape(len(captions), -1)))  # (clips, E)


class Unfinished:
    """The scores so far, in a file beside the table, so that no question is asked twice.

    Args:
        table: the file that is to be made.
        identity: of what the scores follow from: those of another are left.
    """

    def __init__(self, table: Path, identity: Mapping[str, object]) -> None:
        self.path = table.with_name(f"{table.name}.unfinished")
        self.scores: dict[str, list[float]] = {}
        first = json.dumps(identity, sort_keys=True)
        with _writing(self.path):
            text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
            begin, *lines = text.split("\n")
            with contextlib.suppress(ValueError, TypeError):  # of a damaged line, and those after it
                for line in lines[:-1] if begin == first else ():  # the last one was interrupted, or is empty
                    self.scores |= json.loads(line)
            if text and begin != first:
                print(f"{self.path} is of another model or data, and is begun anew")
            write_atomically(self.path, f"{first}\n{json.dumps(self.scores)}\n")

    def add(self, scores: Mapping[str, Sequence[float]]) -> None:
        """id -> its E scores."""
        self.scores |= {name: list(own) for name, own in scores.items()}
        with _writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({name: list(own) for name, own in scores.items()}) + "\n")


def write(
    table: Path,
    clips: Sequence[Captioned],
    scores: Mapping[str, Sequence[float]],
    known: Taxonomy,
    threshold: float,
) -> int:
    """Writes the table; how many clips got a category that had none.

    Categories are the clip's own, or those with a score of at least `threshold`; "none" where there is none.
    """
    text, named = io.StringIO(newline=""), 0
    rows = csv.writer(text)  # it quotes what holds a character of its own end of lines, "\r\n"
    rows.writerow(COLUMNS)
    for clip in clips:
        names, best = clip.names, ""
        if not names:
            own = dict(zip(known.names, scores[clip.id], strict=True))
            names = tuple(name for name, score in own.items() if score >= threshold)
            named += bool(names)
            ranked = sorted(own, key=own.__getitem__, reverse=True)[:BEST]
            best = ", ".join(f"{name} {own[name]:.2f}" for name in ranked)
        category = ", ".join(names) or "none"
        rows.writerow([clip.id, clip.video, clip.split, clip.caption, category, best])
    with _writing(table):  # with the mark by which spreadsheet programs know UTF-8
        write_atomically(table, text.getvalue().encode("utf-8-sig"))
    return named


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from error
