"""Reads what lists a folder's clips: WISA-80K's list, a table, two files of lines, or texts beside videos.

    FOLDER/wisa-80k.json   [{"video_name": "a.mp4", "captions": "...", "label": "Melting",
                             "physical_annotation": {"q0": "...", "q1": "...", "q2": "..."}}, ...]
    FOLDER/clips.csv       video,caption,category,id,split      the last three are optional; .tsv too
    FOLDER/clips.jsonl     {"video": "a.mp4", "caption": "...", "category": ["melting"]}
    FOLDER/clips.json      [{"video": "a.mp4", "caption": "..."}, ...], or {"a.mp4": "...", ...}
    FOLDER/videos.txt      one name a line, and FOLDER/prompts.txt with the captions in the same order
    FOLDER/a.mp4           with its caption in FOLDER/a.txt

The ending of the name says how the file is written; what its records mean is found by looking at them. A list
of another kind needs a row of `FORMATS`. A record that cannot be read is given with the reason, and the
others are used. docs/data.md shows an example of each form.
"""

import codecs
import contextlib
import csv
import difflib
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prophy_jax.data import taxonomy
from prophy_jax.data.sources.video_files import IMAGES, VIDEOS, VideoFolder
from prophy_jax.run import storage
from prophy_jax.run.errors import UserError, counted

# Names that tables use for a column, in any case; the first one present counts.
VIDEO = (
    *("video", "videopath", "video_path", "video_name", "video_file", "file_name", "file_path", "filename"),
    *("filepath", "path", "file", "media_path", "image_path", "image"),
)
CAPTION = ("caption", "captions", "prompt", "text")
CATEGORY = ("category", "label")
SPLIT = ("split",)
_STATED = ("duration", "fps", "width", "height")  # what statistics read
_KNOWN = (*VIDEO, *CAPTION, *CATEGORY, *SPLIT, "id", *_STATED)
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
    "": "",
}
# Files of lines: names of videos, and their captions in the same order.
NAME_LINES = ("videos.txt", "video.txt")
CAPTION_LINES = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_NUMBER = re.compile(r"[-+.]?\d[\d.,:/e+-]*\s*(s|ms|secs?|seconds?|fps|hz|px?|pixels?)?", re.I)
_LONE = re.compile("[\ud800-\udfff]")  # half of a character, which UTF-8 cannot store
_SHOWN = 20  # columns or files that a message names
_LONGEST = 2**31 - 1  # characters of a CSV cell; Python's own limit is 131,072

Record = dict[str, Any]


class Cut(NamedTuple):
    """A cell that may be the rest of a caption: `A cat jumps, then lands` is two cells.

    Attributes:
        column: the name of its column, in lower case.
        text: what it holds.
        sure: whether it cannot be meant otherwise, but for the name of a category.
    """

    column: str
    text: str
    sure: bool


class Row(NamedTuple):
    """One record as it was written, or why it cannot be read.

    Attributes:
        where: "line 3 of clips.csv", "record 3".
        record: by column; empty if it cannot be read.
        problem: a predicate, such as "is not JSON"; "" if there is none.
        cut: what may be the rest of its caption.
    """

    where: str
    record: Record
    problem: str = ""
    cut: Cut | None = None


class Entry(NamedTuple):
    """What one record says of its clip; "" where it does not say.

    `labels` holds phenomena as written, by field: "q0", "q1", "q2" and "label" of WISA, "category" of
    a table. `split` is as written too.
    """

    id: str
    video: str
    caption: str
    labels: dict[str, str]
    split: str = ""


def find_annotations(source: str | Path) -> Path:
    """The annotation file that `source` names, or the only one in the folder that it names.

    A folder without one is itself the answer if its videos have captions beside them.

    Raises:
        UserError: there is no such file or folder, or the folder has none or several.
    """
    source = storage.path(source)
    try:
        return _find_annotations(source)
    except OSError as error:  # no permission, or a name that is too long
        raise UserError(f"{source} cannot be read ({error.strerror})") from error


def _find_annotations(source: Path) -> Path:
    if source.is_file():
        if source.suffix.lower() not in READERS and source.name.lower() not in NAME_LINES:
            raise UserError(f"{source} is not a {_ENDINGS} file that lists clips, nor {NAME_LINES[0]}")
        return source
    if not source.is_dir():
        raise UserError(f"no file or folder {source}; --source must name a folder of videos and captions")
    files = [path for path in storage.files_in(source) if not path.name.startswith(".")]
    found = [path for path in files if path.suffix.lower() in READERS]
    # Some programs write a.json, with what they know of the video, beside each a.mp4 and a.txt.
    videos, texts = (
        {path.stem for path in files if path.suffix.lower() in kinds}
        for kinds in (VIDEOS + IMAGES, (".txt",))
    )
    about = videos if len(found) > 1 else videos & texts
    found = [path for path in found if path.suffix.lower() != ".json" or path.stem not in about]
    found = found or [path for path in files if path.name.lower() in NAME_LINES]
    if len(found) > 1:
        names = shorten([path.name for path in found])
        raise UserError(f"{source} has several files of captions ({names}); name one: {found[0]}")
    if found:
        return found[0]
    videos_here = VideoFolder(source, source)
    captions = [text for _, text in videos_here.captioned()]
    if any(captions):
        return source
    if wrong := [f"{name} {problem}" for name, problem in videos_here.left_out()]:
        raise UserError(f"{source} has captions, but no video that can be read: {shorten(wrong)}")
    if captions:
        raise UserError(
            f"{source}: {len(captions)} video{'s' * (len(captions) > 1)}, but no captions. Put a .txt beside "
            "each video, or add a table such as clips.csv (docs/data.md)"
        )
    what = f"has no {_ENDINGS} file of all clips" if any(source.iterdir()) else "is empty"
    raise UserError(
        f"{source} {what}; expected captions (wisa-80k.json, clips.csv, or a.txt beside each a.mp4) and "
        "videos"
    )


def describe_unused(path: Path, videos: VideoFolder, kind: "Format", rows: Sequence[Row]) -> list[str]:
    """What an annotation file and the folder of its videos say that is not read: a line for each kind.

    Args:
        path: the file, or a folder of captions beside videos.
        videos: those of the source.
        kind: what its records mean.
        rows: the records.
    """
    if path.is_dir():
        return []
    lines = []
    names = {} if kind.own_names else dict.fromkeys(name for row in rows for name in row.record if name)
    if unknown := [_with_nearest(name) for name in names if name.strip().lower() not in _KNOWN]:
        lines.append(f"columns of {path} that are not read: {shorten(unknown)}")
    half = [row.where for row in rows if any(_LONE.search(str(value)) for value in row.record.values())]
    if half:
        lines.append(f"halves of characters in {path} are kept as '?': {shorten(half)}")
    others = [file.name for file in storage.files_in(path.parent) if file.name.lower() in NAME_LINES]
    others = [name for name in sorted(others) if name != path.name]
    if count := sum(text is not None for _, text in videos.captioned()):
        others.append(f".txt files beside videos ({count})")
    if others:
        lines.append(
            f"the captions are those of {path}, not of {' and '.join(others)}: move it elsewhere to use the "
            "others"
        )
    return lines


def folder(path: Path) -> Path:
    """The folder of an annotation file, which names of videos are relative to."""
    return path if path.is_dir() else path.parent


def read_annotations(path: Path) -> tuple["Format", list[Row]]:
    """What the records of an annotation file mean, and all of them, unchanged; for CSV, rows by column.

    Args:
        path: the file; a folder, of captions beside videos.

    Raises:
        UserError: the file is not of its format, holds no records that can be read, or lacks a needed column.
    """
    if path.is_dir():
        kind, read = "text", _read_beside
    elif path.name.lower() in NAME_LINES:
        kind, read = "text", _read_lines
    else:
        kind, read = READERS[path.suffix.lower()]
    try:
        rows = list(read(path))
    except (ValueError, RecursionError, csv.Error) as error:  # ValueError: not UTF-8, or not JSON
        raise UserError(f"{path} is not a {kind} file ({error}); correct it or download it again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    if not rows:
        raise UserError(f"{path} lists no records; nothing to prepare")
    records = [row.record for row in rows if not row.problem]
    if not records:
        raise UserError(
            f"{path} is not a {kind} file that can be used ({rows[0].where} {rows[0].problem}); correct it "
            "or download it again"
        )
    found = next(found for found in FORMATS if found.recognises(records))
    if not found.own_names:
        _check_columns(path, dict.fromkeys(name for record in records for name in record))
    return found, rows


# --- Files -----------------------------------------------------------------------------------------


def _decode(data: bytes, errors: str = "strict") -> str:
    """Text in UTF-8, or in UTF-16 as some Windows programs write it."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    if 0 in data[:2]:  # the first character is an ASCII one of two bytes
        return data.decode("utf-16-be" if data[0] == 0 else "utf-16-le")
    return data.decode("utf-8-sig", errors)


def _lines(data: bytes) -> list[str]:
    """The lines of a text; bytes that are not UTF-8 are lone surrogates, which no text has."""
    return _decode(data, "surrogateescape").removesuffix("\n").split("\n")


def _odd_byte(texts: Iterable[str]) -> str:
    """What is wrong with texts that were decoded with "surrogateescape", "" if nothing is."""
    odd = next((c for text in texts for c in text if _LONE.match(c)), "")
    return f"has a byte (0x{ord(odd) & 0xFF:02x}) that is not utf-8; save the file as UTF-8" if odd else ""


class _Twice(str):
    """Stands for an object that has this key twice: which of the values is meant is not known."""

    pairs: Sequence[tuple[str, Any]] = ()  # all that it has


def _parse(text: str) -> Any:
    """JSON, in which objects may be `_Twice`. Raises ValueError or RecursionError."""

    def unique(pairs: list[tuple[str, Any]]) -> Record | _Twice:
        record = dict(pairs)
        count = Counter(name for name, _ in pairs)
        twice = next((name for name in count if count[name] > 1), None)
        twice = twice or next((value for value in record.values() if isinstance(value, _Twice)), None)
        if twice is None:
            return record
        found = _Twice(twice)
        found.pairs = pairs
        return found

    return json.loads(text, object_pairs_hook=unique)


def _row(where: str, record: Any) -> Row:
    if isinstance(record, dict):
        names = Counter(name.strip().lower() for name in record)
        if twice := [name for name in names if names[name] > 1 and name in _KNOWN]:
            return Row(where, {}, f"has two keys {twice[0]!r}, in capitals and not")
        lists = [
            name for name in record if name.strip().lower() in CAPTION and isinstance(record[name], list)
        ]
        return Row(where, {}, f"has a list as its {lists[0]}: give one text") if lists else Row(where, record)
    twice = isinstance(record, _Twice)
    return Row(where, {}, f"has the key {str(record)!r} twice" if twice else "is not an object {...}")


def _read_json(path: Path) -> Iterable[Row]:
    text = _decode(path.read_bytes())
    try:
        records = _parse(text)
    except ValueError:
        # Objects line by line are JSONL, whatever the ending says.
        if not text.lstrip().startswith("{") or len(rows := list(_read_jsonl(path))) < 2:
            raise
        if rows[0].problem:
            raise
        return rows
    if isinstance(records, dict | _Twice):
        records = _of_object(records)
    if not isinstance(records, list) or (
        records and not any(isinstance(one, dict | _Twice) for one in records)
    ):
        raise UserError(
            f"{path} is not a JSON list of records; expected [{{...}}, {{...}}], or an object of captions "
            '{"a.mp4": "...", "b.mp4": "..."}'
        )
    return [_row(f"record {number}", record) for number, record in enumerate(records)]


def _of_object(content: Record | _Twice) -> list[Any] | None:
    """The records of an object, by the names of videos, of captions or of records; None: it is another.

    It may also have a list of them, whatever its name. Raises ValueError where nothing is but once in it.
    """
    if isinstance(content, _Twice):
        count = Counter(name for name, _ in content.pairs)
        bad = {name: value if isinstance(value, _Twice) else _Twice(name) for name, value in content.pairs
               if count[name] > 1 or isinstance(value, _Twice)}  # fmt: skip
        good = {name: value for name, value in content.pairs if name not in bad}
        records = None if {*VIDEO, *CAPTION} & count.keys() else _of_object(good)
        if not records:
            raise ValueError(f"it has the key {str(content)!r} twice")
        return [*records, *bad.values()]
    columns = {name.strip().lower() for name in content}
    if columns.intersection(VIDEO) and columns.intersection(CAPTION):
        return [content] if _parse_row(content).video else None
    lists = [value for value in content.values() if isinstance(value, list)]
    tables = [value for value in lists if any(isinstance(one, dict | _Twice) for one in value)]
    if tables:
        return tables[0] if len(tables) == 1 else None  # which is meant is not known
    named = all(isinstance(value, list | None) for value in content.values()) and not columns & {*_KNOWN}
    if any(isinstance(value, str) for value in content.values()) or named and lists:
        return [{"video": name, "caption": caption} for name, caption in content.items()]
    if all(isinstance(value, dict) for value in content.values()):
        return [{"video": name, **record} for name, record in content.items()]
    return None


def _read_csv(path: Path) -> Iterable[Row]:
    # Bytes that are not UTF-8 become lone surrogates, which no text has.
    lines = list(io.StringIO(_decode(path.read_bytes(), "surrogateescape"), newline=""))
    limit = csv.field_size_limit(_LONGEST)
    try:
        yield from _csv_rows(path, lines)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(path: Path, lines: Sequence[str]) -> Iterator[Row]:
    header: list[str] = []
    begin, separator = _separator(lines)
    while begin < len(lines):
        where = f"line {begin + 1} of {path.name}"
        try:
            cells, count = _read_cells(lines, begin, separator)
            problem = _cells_problem(cells, header, separator)
        except csv.Error as error:
            problem = f"has a wrong quote ({error}): write a quote inside quotes twice"
        if problem:
            if not header:
                raise ValueError(f"{where} {problem}")
            yield Row(where, {}, problem)
            begin += 1  # the lines that a wrong quote swallowed are rows of their own
            continue
        row = "".join(lines[begin : begin + count])
        begin += count
        if not header:
            header = cells
            while header and not header[-1].strip():  # as spreadsheets write
                header = header[:-1]
            names = Counter(name.strip().lower() for name in header)
            if twice := [name for name in names if name and names[name] > 1]:
                raise ValueError(f"it has two columns {twice[0]!r}")
            if header:
                _check_columns(path, header)
        elif any(cell.strip() for cell in cells):
            quoted = re.search(rf'(^|{separator})\s*"', row)  # whoever quotes a cell knows what commas do
            cut = None if quoted else _find_cut(header, cells)
            yield Row(where, dict(itertools.zip_longest(header, cells[: len(header)])), cut=cut)


def _read_cells(lines: Sequence[str], begin: int, separator: str) -> tuple[list[str], int]:
    """The cells of the row that begins there, and its number of lines. A quote may follow a space.

    Strict: an unclosed quote is an error, and does not swallow the rest of the file. Raises csv.Error.
    """

    def read(skip_spaces: bool) -> tuple[list[str], int]:
        rest = (lines[i] for i in range(begin, len(lines)))
        reader = csv.reader(rest, strict=True, delimiter=separator, skipinitialspace=skip_spaces)
        return next(reader, []), reader.line_num

    cells, count = read(False)
    spaced = [cell for cell in cells if cell.startswith(" ") and cell.lstrip(" ").startswith('"')]
    if not spaced:
        return cells, count
    try:
        return read(True)
    except csv.Error:
        if any(cell.count('"') % 2 for cell in spaced):
            raise
        return cells, count  # a text that begins with a word in quotes


def _separator(lines: Sequence[str]) -> tuple[int, str]:
    """The first line of a table, and what separates its cells: it gives the most known names of columns."""
    first = next((number for number, line in enumerate(lines) if line.strip()), 0)
    line = lines[first].strip("\r\n") if lines else ""
    if line.lower().startswith("sep=") and line[4:] in SEPARATORS:  # for Excel
        return first + 1, line[4:]
    headers = {separator: next(csv.reader([line], delimiter=separator), []) for separator in SEPARATORS}

    def known(separator: str) -> tuple[int, int]:
        return sum(name.strip().lower() in _KNOWN for name in headers[separator]), len(headers[separator])

    return 0, max(SEPARATORS, key=known)


def _cells_problem(cells: Sequence[str], header: Sequence[str], separator: str) -> str:
    """What is wrong with a row, "" if nothing is; of the header, `header` is empty."""
    if problem := _odd_byte(cells):
        return problem
    if header and any(cell.strip() for cell in cells[len(header) :]):
        return (
            f"has more cells than columns, {len(cells)} of {len(header)}: put quotes around texts with "
            f"{SEPARATORS[separator]}"
        )
    return ""


def _find_cut(header: Sequence[str], cells: Sequence[str]) -> Cut | None:
    """What may be the rest of the caption, in a row without quotes that has no more cells than columns.

    That is a cell behind the caption that begins with a space, where the caption and the header do not; that
    has words where a number or an id should be, or no name of a column; or the last of too few cells.
    Whether a category is meant can only be told by whoever knows the categories.
    """
    names = [name.strip().lower() for name in header]
    caption = next((names.index(name) for name in CAPTION if name in names), len(names))
    for index in range(caption + 1, min(len(header), len(cells))):
        name, text = names[index], cells[index].strip()
        words = len(re.findall(r"[^\W\d_]+", text))
        behind = index == caption + 1
        spaced = behind and cells[index].startswith(" ")
        spaced = spaced and not cells[caption].startswith(" ") and not header[index].startswith(" ")
        halves = behind and cells[caption].count('"') % 2 and text.count('"') % 2  # of one pair of quotes
        if not words or name in (*VIDEO, *SPLIT):
            found = False
        elif name in CATEGORY:
            found, text = behind, _categories(text)
            spaced = spaced or bool(halves)
        elif name == "id":
            named = any(text in cell for cell in cells[:caption])  # a video's name may be several words
            found = behind and (words > 1 or spaced and " " in text) and not named
        elif name in _STATED:
            found = not _NUMBER.fullmatch(text) and says_something(text)
        else:
            found = bool(not name or spaced or halves or behind and len(cells) < len(header))
        if found:
            return Cut(name, text, spaced or name not in CATEGORY)
    return None


def _read_jsonl(path: Path) -> Iterable[Row]:
    lines, rows = _lines(path.read_bytes()), []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"line {number} of {path.name}"
        try:
            rows.append(_row(where, _parse(line)) if not (odd := _odd_byte(line)) else Row(where, {}, odd))
        except (ValueError, RecursionError) as error:
            rows.append(Row(where, {}, f"is not JSON ({error})"))
    if any("not JSON" in row.problem for row in rows):
        # A list over several lines is JSON, whatever the ending says.
        with contextlib.suppress(ValueError, RecursionError):
            records = _parse("\n".join(lines))
            if isinstance(records, list) and any(isinstance(one, dict) for one in records):
                return [_row(f"record {number}", record) for number, record in enumerate(records)]
    return rows


def _read_lines(path: Path) -> Iterable[Row]:
    """The form of finetrainers: a file of names and one of captions, line by line."""
    beside = {file.name.lower(): file for file in storage.files_in(path.parent)}
    found = [beside[name] for name in CAPTION_LINES if name in beside]
    if not found:
        raise UserError(f"{path} has no {CAPTION_LINES[0]} beside it, with the captions line by line")
    captions, *others = found
    if others:
        both = shorten([file.name for file in found])
        raise UserError(
            f"{path} has several files of captions beside it ({both}); move all but one elsewhere"
        )
    names, texts = (_lines(file.read_bytes()) for file in (path, captions))
    for own, other in ((names, texts), (texts, names)):
        while len(own) > len(other) and not own[-1].strip():
            own.pop()
    if len(names) != len(texts):
        raise UserError(
            f"{path} has {counted(len(names), 'line')}, but {captions.name} has {len(texts)}; each video "
            "needs one line of both"
        )
    for number, (name, text) in enumerate(zip(names, texts, strict=True), 1):
        odd = [file.name for file, line in ((path, name), (captions, text)) if _odd_byte(line)]
        if odd:
            yield Row(f"line {number} of {odd[0]}", {}, _odd_byte(name + text))
        elif name.strip() or text.strip():
            yield Row(f"line {number} of {path.name}", {"video": name, "caption": text})


def _read_beside(folder: Path) -> Iterable[Row]:
    """Each video of a folder with the text of its name; the form of most trainers of small adapters."""
    videos = VideoFolder(folder, folder)
    yield from (Row(name, {}, problem) for name, problem in videos.left_out())
    for video, text in videos.captioned():
        record = {"video": video.name, "caption": ""}
        if text is None:
            yield Row(video.name, record)
            continue
        try:
            yield Row(video.name, record | {"caption": _decode(text.read())})
        except (ValueError, UserError) as error:
            yield Row(text.name, {}, f"cannot be read ({error})")


READERS: dict[str, tuple[str, Callable[[Path], Iterable[Row]]]] = {
    ".json": ("JSON", _read_json),
    ".csv": ("CSV", _read_csv),
    ".tsv": ("TSV", _read_csv),
    ".jsonl": ("JSONL", _read_jsonl),
}
_ENDINGS = ".json, .csv, .tsv or .jsonl"


# --- Records ---------------------------------------------------------------------------------------


def _parse_wisa(record: Record) -> Entry:
    annotation = record.get("physical_annotation")
    annotation = annotation if isinstance(annotation, dict) else {}
    labels = {question: _labels(annotation.get(question)) for question in taxonomy.QUESTIONS}
    labels["label"] = _labels(record.get("label"))
    video, caption = _text(record.get("video_name")), _text(record.get("captions"))
    return Entry("", video, caption, labels, _text(record.get("split")))


def _parse_row(record: Record) -> Entry:
    columns = {name.strip().lower(): value for name, value in record.items() if name is not None}

    def column(names: tuple[str, ...]) -> Any:
        return next((columns[name] for name in names if name in columns), None)

    clip_id = columns.get("id")
    clip_id = str(clip_id) if isinstance(clip_id, int) else clip_id
    labels = {"category": _categories(column(CATEGORY))}
    video, caption, split = (_text(column(names)) for names in (VIDEO, CAPTION, SPLIT))
    return Entry(_text(clip_id), video, caption, labels, split)


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


def _check_columns(path: Path, columns: Iterable[str]) -> None:
    columns = list(columns)
    found = {name.strip().lower() for name in columns}
    missing = [
        f"no column for the {what}: expected one of {', '.join(names)}"
        for what, names in (("video", VIDEO), ("caption", CAPTION))
        if not found.intersection(names)
    ]
    if missing:
        unread = [name if name.strip().lower() in _KNOWN else _with_nearest(name) for name in columns]
        bare = any(Path(name).suffix.lower() in VIDEOS or name.startswith("#") for name in columns[:2])
        bars = any("|" in name for name in columns)
        raise UserError(
            f"{path} has {', and '.join(missing)}; found {shorten(unread) or 'none'}"
            + ("; the first line of a table must name its columns" if bare else "")
            + ("; cells are separated by commas, semicolons or tabs, not by |" if bars else "")
        )


def _with_nearest(column: str) -> str:
    """A column that is not known, with the known name that is spelled most like it, if one is."""
    nearest = difflib.get_close_matches(column.strip().lower(), _KNOWN, 1, 0.75)
    return f"{column} (did you mean {nearest[0]}?)" if nearest else column


def shorten(names: Sequence[str]) -> str:
    """The first of many, with commas, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def says_something(caption: str) -> bool:
    """Whether a caption is there: not only what cannot be seen, and not what programs write for none."""
    seen = "".join(letter for letter in caption if letter.isprintable() and not letter.isspace())
    return seen.lower() not in ("", "nan", "none", "null", "n/a", "#n/a", "<na>")


def _text(value: Any) -> str:
    """A stripped string that UTF-8 can store; "" for anything but a string."""
    return value.strip().encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def _categories(value: Any) -> str:
    """`_labels` of a table, whose cells may be lists as programs write them: "['melting', 'fog']", "a|b"."""
    if not isinstance(value, str):
        return _labels(value)
    text = value.strip()
    if text.startswith("[") and text.endswith("]"):
        text = ", ".join(part.strip(" '\"\n") for part in text[1:-1].split(","))
    return _labels(text.replace("|", ","))


def _labels(value: Any) -> str:
    """Labels as one text for `Taxonomy.parse_labels`; whatever is not text is left for its report."""
    values = value if isinstance(value, list) else [value]
    return ", ".join(_text(str(item)) for item in values if item is not None)
