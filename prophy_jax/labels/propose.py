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
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tqdm
from ml_collections import ConfigDict

from prophy_jax.data import records, taxonomy
from prophy_jax.data.taxonomy import Taxonomy
from prophy_jax.labels.opening import import_labelling, open_model
from prophy_jax.labels.prepared import check_moved, list_files
from prophy_jax.run import storage
from prophy_jax.run.errors import UserError, counted
from prophy_jax.run.storage import write_atomically

if TYPE_CHECKING:
    from prophy_jax.labels.vlm import Vlm

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


def propose(
    config: ConfigDict,
    model_folder: str | Path,
    data: str | Path,
    table: str | Path,
    sources: Sequence[str] = (),
    threshold: float = 0.5,
) -> None:
    """Writes a table of the clips of `data` with categories that fit their captions, to be looked through.

    `prophy_jax.prepare --source` reads it; the top of this file explains its columns. A clip that has
    categories keeps them, and is not asked about. Goes on where it was interrupted.

    Args:
        config: with `label`.
        model_folder: a Qwen2.5-VL model, or its name on the hub.
        data: prepared records.
        table: the file to make, in a folder that holds the sources of the records, or the one of them.
        sources: where the sources are now; none: where they were.
        threshold: score from which a category is proposed.

    Raises:
        UserError: no data, no such model, a table that is there already, or in another folder.
    """
    # 1. The clips, in the order of the records, and where a table finds their videos.
    import_labelling(config)
    table, known, manifest = Path(table), taxonomy.of(config), records.read_manifest(data)
    known.check(manifest, data)
    roots = list_roots(data, manifest, sources)
    folders = [place_below(root, table.absolute().parent) for root in roots]
    if table.suffix.lower() != ".csv":
        raise UserError(f"--propose={table}: name a file that ends in .csv, such as {suggest_table(roots)}")
    if os.path.lexists(table):
        raise UserError(f"{table} exists, and may have been edited: name another file, or remove it")
    if outside := [root for root, folder in zip(roots, folders, strict=True) if folder is None]:
        raise UserError(
            f"--propose={table}: a table must be in a folder that holds its videos, which are in "
            f"{', '.join(map(str, outside))}: name {suggest_table(roots)}"
        )
    if not os.access(table.absolute().parent, os.W_OK):
        raise UserError(
            f"no file can be written beside {table}: make a folder with links to the sources, name these "
            "with --source=DIR, and the table in that folder"
        )
    clips: dict[str, Captioned] = {}
    files = [file for own in list_files(data, manifest).values() for file in own]
    copies = manifest.get("stand_in", ())  # splits whose clips are those of another
    for file in sorted(files, key=lambda file: file.split in copies):
        stored = records.open_dataset(data, "records", file.bucket, file.split)
        for index in range(file.first, file.first + file.count):
            record = stored[index]
            name, caption, place = (record[key].decode() for key in ("id", "caption", "video"))
            place = f"{folders[int(record['source'])].as_posix()}/{place}".removeprefix("./")
            names = tuple(known.names[e] for e in np.flatnonzero(record["category"]))
            clips.setdefault(name, Captioned(name, place, file.split, caption, names))
    asked = [clip for clip in clips.values() if not clip.names]
    if not asked:
        raise UserError(f"every clip of {data} has a category already: there is nothing to propose")

    # 2. Each question once, also after an interruption.
    model, described = open_model(model_folder, config, 0)
    identity = {"data": manifest["fingerprint"], "vlm": described["sha256"], "categories": known.names}
    unfinished = Unfinished(table, {**identity, "question": QUESTION})
    left = [clip for clip in asked if clip.id not in unfinished.scores]
    with tqdm.tqdm(total=len(left), unit="clip", dynamic_ncols=True, disable=not left) as bar:
        for first in range(0, len(left), config.label.batch):
            batch = left[first : first + config.label.batch]
            scores = ask(model, [clip.caption for clip in batch], known)
            unfinished.add({clip.id: own for clip, own in zip(batch, scores.tolist(), strict=True)})
            bar.update(len(batch))

    # 3. The table, and what to do with it.
    named = write(table, list(clips.values()), unfinished.scores, known, threshold)
    unfinished.path.unlink()
    print(
        f"{table}: {counted(len(clips), 'clip')}, {len(asked)} of them without a category; "
        f"{named} got one or more"
    )
    cut = [clip.id for clip in asked if len(clip.caption) > LONGEST]
    records.print_list(f"asked about the first {LONGEST} characters of the caption", cut, "")
    skipped = [name for name, _ in manifest.get("skipped", ())]
    records.print_list(f"clips that {data} has skipped, and that are not in the table", skipped)
    print(
        "look through the column 'category' and correct it, then run, with the same --config: "
        f"python -m prophy_jax.prepare --source={table} --out={data}"
    )


def list_roots(data: str | Path, manifest: Mapping[str, Any], moved: Sequence[str]) -> list[Path]:
    """The folder that each source names its videos from. UserError if there is no source, or it is gone."""
    paths = [storage.path(storage.absolute(path)) for path in check_moved(data, manifest, moved)]
    if not paths:
        raise UserError(f"{data} is of the physics sandbox, which knows its categories: nothing to propose")
    if far := [path for path in paths if storage.in_bucket(path)]:
        raise UserError(f"a table is beside its videos on a disk, and {far[0]} is in a bucket: copy it")
    if gone := [path for path in paths if not path.exists()]:
        raise UserError(f"no {gone[0]}, a source of {data}: if it has moved, say where it is: --source=DIR")
    return [path if path.is_dir() else path.parent for path in paths]


def place_below(path: Path, folder: Path) -> Path | None:
    """What `path` is relative to a folder that holds it, as named or when links are followed; or None."""
    for own, above in ((path, folder), (path.resolve(), folder.resolve())):
        if own.is_relative_to(above):
            return own.relative_to(above)
    return None


def suggest_table(roots: Sequence[Path]) -> Path:
    """A name for a table of proposed categories, in the folder that holds all sources."""
    return Path(os.path.commonpath(roots)) / "proposed.csv"


def ask(model: "Vlm", captions: Sequence[str], known: Taxonomy) -> np.ndarray:
    """(len(captions), E) float64 scores from 0 to 1.

    Raises:
        UserError: the memory does not suffice, or the model gives no numbers.
    """
    import torch

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
