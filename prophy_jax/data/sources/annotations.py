"""Reads the file that lists a folder's clips: WISA-80K's JSON list, or captions in CSV or JSONL.

    FOLDER/wisa-80k.json   [{"video_name": "a.mp4", "captions": "...", "label": "Melting",
                             "physical_annotation": {"q0": "...", "q1": "...", "q2": "..."}}, ...]
    FOLDER/clips.csv       video,caption,category,id      the last two are optional
    FOLDER/clips.jsonl     {"video": "a.mp4", "caption": "...", "category": ["melting"]}

The ending of the name says how the file is written; what its records mean is found by looking at them. A list
of another kind needs a row of `FORMATS`.
"""

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from prophy_jax.data import taxonomy
from prophy_jax.run.errors import UserError

# Names that tables use for a column; the first one present counts.
VIDEO = ("video", "videopath", "video_name", "file_name")
CAPTION = ("caption", "captions", "text")
CATEGORY = ("category", "label")

Record = dict[str, Any]


class Entry(NamedTuple):
    """What one record says of its clip; "" where it does not say.

    `labels` holds phenomena as written, by field: "q0", "q1", "q2" and "label" of WISA, "category" of
    a table.
    """

    id: str
    video: str
    caption: str
    labels: dict[str, str]


def find_annotations(source: str | Path) -> Path:
    """The annotation file that `source` names, or the only one in the folder that it names.

    Raises:
        UserError: there is no such file or folder, or the folder has none or several.
    """
    source = Path(source)
    if source.is_file():
        if source.suffix.lower() not in READERS:
            raise UserError(f"{source} is not a .json, .csv or .jsonl file that lists clips")
        return source
    if not source.is_dir():
        raise UserError(f"no file or folder {source}; --source must name a folder of videos and captions")
    found = sorted(path for path in source.iterdir() if path.suffix.lower() in READERS and path.is_file())
    if not found:
        what = "has no .json, .csv or .jsonl file" if any(source.iterdir()) else "is empty"
        raise UserError(f"{source} {what}; expected captions (wisa-80k.json, clips.csv) and videos")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{source} has several files of captions ({names}); name one: {found[0]}")
    return found[0]


def read_annotations(path: Path) -> tuple["Format", list[Record]]:
    """What the records of an annotation file mean, and all of them, unchanged; for CSV, rows by column.

    Raises:
        UserError: the file is not of its format, holds no records, or lacks a needed column.
    """
    kind, read = READERS[path.suffix.lower()]
    try:
        records = list(read(path))
    except (ValueError, RecursionError, csv.Error) as error:  # ValueError: not UTF-8, or not JSON
        raise UserError(f"{path} is not a {kind} file ({error}); correct it or download it again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    if not records:
        raise UserError(f"{path} lists no records; nothing to prepare")
    found = next(found for found in FORMATS if found.recognises(records))
    if not found.own_names:
        _check_columns(path, records[0])
    return found, records


# --- Files -----------------------------------------------------------------------------------------


def _read_json(path: Path) -> list[Record]:
    records = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path} is not a JSON list of records; expected [{{...}}, {{...}}]")
    return records


def _read_csv(path: Path) -> Iterable[Record]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        # Strict: an unclosed quote is an error, and does not swallow the rest of the file.
        for row in csv.DictReader(file, strict=True):
            row.pop(None, None)  # cells beyond the header
            yield row


def _read_jsonl(path: Path) -> Iterable[Record]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"line {number} is not an object {{...}}")
            yield record


READERS: dict[str, tuple[str, Callable[[Path], Iterable[Record]]]] = {
    ".json": ("JSON", _read_json),
    ".csv": ("CSV", _read_csv),
    ".jsonl": ("JSONL", _read_jsonl),
}


# --- Records ---------------------------------------------------------------------------------------


def _parse_wisa(record: Record) -> Entry:
    annotation = record.get("physical_annotation")
    annotation = annotation if isinstance(annotation, dict) else {}
    labels = {question: _labels(annotation.get(question)) for question in taxonomy.QUESTIONS}
    labels["label"] = _labels(record.get("label"))
    return Entry("", _text(record.get("video_name")), _text(record.get("captions")), labels)


def _parse_row(record: Record) -> Entry:
    columns = {name.strip().lower(): value for name, value in record.items()}

    def column(names: tuple[str, ...]) -> Any:
        return next((columns[name] for name in names if name in columns), None)

    clip_id = columns.get("id")
    clip_id = str(clip_id) if isinstance(clip_id, int) else clip_id
    labels = {"category": _labels(column(CATEGORY))}
    return Entry(_text(clip_id), _text(column(VIDEO)), _text(column(CAPTION)), labels)


class Format(NamedTuple):
    """What the records of a file mean.

    Attributes:
        recognises: whether these records are of this format; the first in `FORMATS` that does is used.
        parse: the entry of one record.
        videos: the folder of the videos, below that of the file.
        own_names: False: the columns must be some of `VIDEO` and `CAPTION`.
    """

    recognises: Callable[[list[Record]], bool]
    parse: Callable[[Record], Entry]
    videos: str = ""
    own_names: bool = True


FORMATS = (
    Format(lambda records: any("physical_annotation" in record for record in records), _parse_wisa, "videos"),
    Format(lambda records: True, _parse_row, own_names=False),
)


def _check_columns(path: Path, record: Record) -> None:
    found = [name.strip().lower() for name in record]
    for what, names in (("video", VIDEO), ("caption", CAPTION)):
        if not set(names) & set(found):
            raise UserError(
                f"{path} has no column for the {what}: expected one of {', '.join(names)}; "
                f"found {', '.join(record) or 'none'}"
            )


def _text(value: Any) -> str:
    """A stripped string that UTF-8 can store; "" for anything but a string."""
    return value.strip().encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def _labels(value: Any) -> str:
    """Labels as one text for `Taxonomy.parse_labels`; whatever is not text is left for its report."""
    values = value if isinstance(value, list) else [value]
    return ", ".join(_text(str(item)) for item in values if item is not None)
