"""Reads a folder in the public layout of WISA-80K: one JSON list of records and a folder `videos`.

    FOLDER/wisa-80k.json    [{"video_name": "a.mp4", "captions": "...", "label": "Melting",
                              "physical_annotation": {"q0": "...", "q1": "...", "q2": "..."}}, ...]
    FOLDER/videos/...       the clips, at any depth (the public archive has numbered subfolders)

Answers q0, q1 and q2 (dynamics, thermodynamics, optics) give the category vector. The single
`label` is the collection the clip came from; it is not always one of the 17, and is checked but
not used.
Nothing is dropped silently: whatever was skipped or not understood is in the `Report`.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prophy_jax.data import taxonomy
from prophy_jax.errors import UserError


@dataclass(frozen=True)
class Clip:
    """One usable record.

    Attributes:
        id: the stem of the video's file name.
        path: the video.
        caption: its caption, stripped.
        category: (17,) float32 multi-hot in the order of `taxonomy.PHENOMENA`.
    """

    id: str
    path: Path
    caption: str
    category: np.ndarray


@dataclass
class Report:
    """What was found and what was not.

    Attributes:
        records: entries of the JSON list.
        skipped: (clip id, reason) of each record that gives no clip.
        unknown_labels: 'field: "text"' -> number of clips, for labels outside the 17 phenomena.
        examples: the same keys -> id of the first such clip.
        unannotated: ids of clips used without any of q0, q1, q2; their category vector is zero.
        label_differs: ids of clips whose `label` is one of the 17 but not among their answers.
    """

    records: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    unknown_labels: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    unannotated: list[str] = field(default_factory=list)
    label_differs: list[str] = field(default_factory=list)

    def add_unknown(self, clip_id: str, where: str, text: str) -> None:
        key = f'{where}: "{text}"'
        self.unknown_labels[key] += 1
        self.examples.setdefault(key, clip_id)


def _load_records(folder: Path) -> list[Mapping[str, Any]]:
    """The JSON list of `folder`; raises UserError unless there is exactly one valid list."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; --source must name a folder with a .json and videos/")
    found = sorted(folder.glob("*.json"))
    if not found:
        what = "has no .json file" if any(folder.iterdir()) else "is empty"
        raise UserError(f"{folder} {what}; expected a label file (wisa-80k.json) and videos/")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{folder} has several .json files ({names}); keep only the labels there")
    try:
        records = json.loads(found[0].read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, or not JSON
        raise UserError(f"{found[0]} is not a JSON file ({error}); download it again") from error
    if not isinstance(records, list) or not all(isinstance(entry, dict) for entry in records):
        raise UserError(f"{found[0]} is not a JSON list of records; expected [{{...}}, {{...}}]")
    if not records:
        raise UserError(f"{found[0]} lists no records; nothing to prepare")
    return records


def _category(record: Mapping[str, Any], clip_id: str, report: Report) -> np.ndarray:
    """(17,) float32 multi-hot of q0..q2; notes in `report` what was not understood."""
    annotation = record.get("physical_annotation")
    annotation = annotation if isinstance(annotation, dict) else {}
    names: list[str] = []
    for question in taxonomy.QUESTIONS:
        known, unknown = taxonomy.parse_labels(str(annotation.get(question) or ""))
        names += known
        for text in unknown:
            report.add_unknown(clip_id, question, text)
    if not any(annotation.get(question) for question in taxonomy.QUESTIONS):
        report.unannotated.append(clip_id)
    known, unknown = taxonomy.parse_labels(str(record.get("label") or ""))
    for text in unknown:
        report.add_unknown(clip_id, "label", text)
    if not set(known) <= set(names):
        report.label_differs.append(clip_id)
    return taxonomy.multi_hot(names)


def _same_content(paths: list[Path]) -> bool:
    if len({path.stat().st_size for path in paths}) > 1:
        return False
    digests = set()
    for path in paths:
        with path.open("rb") as file:
            digests.add(hashlib.file_digest(file, "sha256").digest())
    return len(digests) == 1


def read_wisa(folder: str | Path) -> tuple[list[Clip], Report]:
    """Reads the label file, finds the videos, and reports what was not understood.

    Args:
        folder: a folder in the layout above.

    Returns:
        The clips in the order of the label file, and the report. Videos are not opened.

    Raises:
        UserError: the folder is missing or empty, has no or several JSON files, the label file is
            not a JSON list of records, or no record gives a clip.
    """
    folder = Path(folder)
    records = _load_records(folder)
    videos: dict[str, list[Path]] = defaultdict(list)
    for path in sorted((folder / "videos").rglob("*")):
        if path.is_file():
            videos[path.name].append(path)

    report = Report(records=len(records))
    clips: list[Clip] = []
    seen: set[str] = set()
    for index, record in enumerate(records):
        name = record.get("video_name")
        if not isinstance(name, str) or not name.strip():
            report.skipped.append((f"record {index}", "no video_name"))
            continue
        name = Path(name.strip()).name  # a record cannot point outside `videos`
        clip_id = Path(name).stem
        caption = record.get("captions")
        if clip_id in seen:
            reason = "a second record of this video name; the first is used"
        elif not isinstance(caption, str) or not caption.strip():
            reason = "no caption"
        elif not videos[name]:
            reason = f"video {name} is missing"
        elif len(videos[name]) > 1 and not _same_content(videos[name]):
            reason = f"{len(videos[name])} different videos are called {name}"
        else:
            seen.add(clip_id)
            category = _category(record, clip_id, report)
            clips.append(Clip(clip_id, videos[name][0], caption.strip(), category))
            continue
        report.skipped.append((clip_id, reason))
    if not clips:
        clip_id, reason = report.skipped[0]
        raise UserError(
            f"none of the {len(records)} records of {folder} can be used "
            f"(first, {clip_id}: {reason}); put the videos, unzipped, under {folder / 'videos'}"
        )
    return clips, report
