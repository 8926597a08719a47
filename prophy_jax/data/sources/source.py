"""Sources of clips: folders of captioned videos, in WISA-80K's layout or a plain one, and the sandbox.

    FOLDER/wisa-80k.json, clips.csv, clips.jsonl, ...     see `prophy_jax.data.sources.annotations`
    FOLDER/videos/...                                     at any depth, also inside .zip files

Listing a source reads captions and the directories of zip files, and decodes nothing. Whatever is
skipped or not understood is in the `Report`.

WISA's answers q0, q1 and q2 (dynamics, thermodynamics, optics) give the category vector. Its single
`label` is the collection the clip came from; it is not always one of the categories.

Legend: F frames, H W pixels, T = (F-1)/4 + 1 latent times, G = H/8 tokens a side, E categories.
"""

import hashlib
import itertools
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from ml_collections import ConfigDict

from prophy_jax.data import taxonomy
from prophy_jax.data.sources import annotations, video
from prophy_jax.data.sources.annotations import Entry
from prophy_jax.data.sources.video import Bucket
from prophy_jax.data.sources.video_files import VideoFile, VideoFolder, content_keys
from prophy_jax.data.taxonomy import Taxonomy
from prophy_jax.run import storage
from prophy_jax.run.errors import UserError, counted, shortage

T = TypeVar("T")
_LONGEST = 200  # characters of a text that is reported


@dataclass(frozen=True, eq=False)  # arrays do not compare
class Clip:
    """One usable clip.

    Attributes:
        id: unique among all clips; by default the stem of the video's file name, or where an earlier clip
            has that, `video`. Never a file name: it may hold any characters.
        caption: stripped, not empty; of a sandbox clip "", its sample has it.
        category: (E,) float32 multi-hot in the order of the taxonomy.
        source: index of its source in the list given.
        video: where, relative to the source: "videos/a.mp4", "videos/0.zip:any/prefix/a.mp4"; of a
            sandbox clip "train/12".
        split: "train", "val" or "test" if the source fixes it, else "".
        record: position of its row in the annotation file.
    """

    id: str
    caption: str
    category: np.ndarray
    source: int
    video: str
    split: str = ""
    record: int = 0


class Sample(NamedTuple):
    """A clip that was read: frames (F,H,W,3) uint8 in their bucket; `shown` is the video's height and width.

    The sandbox also gives masks (T,G,G,E) float16, and the caption and category that its listing lacks. A
    clip that was encoded earlier has latents (T,h,w,16) float16 instead of frames, and for the same caption
    its text (n,D) float16 with the mask (n,) that is stored with it, or None.
    """

    frames: np.ndarray | None
    bucket: Bucket
    masks: np.ndarray | None = None
    caption: str | None = None
    category: np.ndarray | None = None
    latents: np.ndarray | None = None
    text: tuple[np.ndarray, np.ndarray | None] | None = None
    shown: tuple[int, int] | None = None


@dataclass
class Report:
    """What was found and what was not.

    Attributes:
        records: records of all annotation files.
        skipped: (clip id, reason) of each record that gives no clip. The part of the reason before a
            colon is one of few.
        unknown_labels: 'field: "text"' -> number of clips, for labels outside the categories.
        examples: the same keys -> id of the first such clip.
        unannotated: ids of clips used that nothing was said about; their category vector is zero.
        label_differs: ids of WISA clips whose `label` is a category but not among their answers.
        unused: what the sources say that is not read, a line for each kind.
    """

    records: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    unknown_labels: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    unannotated: list[str] = field(default_factory=list)
    label_differs: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


class Source(Protocol):
    """Clips listed, in order, and how to read one.

    Attributes:
        clips: the usable clips.
        report: what was skipped or not understood.
    """

    clips: list[Clip]
    report: Report

    def read(self, clip: Clip, buckets: Sequence[Bucket], fps: float, max_upscale: float) -> Sample:
        """Reads one clip of `clips`, as `video.read_clip` does. Several threads may read at once.

        Raises:
            UserError: the clip cannot be read or fits no bucket, whatever is wrong with its video.
        """

    def shown(self, clip: Clip) -> tuple[int, int] | None:
        """(height, width) that a clip is shown as, from its first frame; None if it has the size wanted.

        Raises:
            UserError: as `read` does.
        """

    def content(self, clip: Clip, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What tells the content of a clip's video: "sha256", and "stamp", which is known without reading it.

        Args:
            clip: one of `clips`, or of an earlier listing.
            known: an earlier result for this clip. If its stamp holds, the video is not read.

        Returns:
            {} for a clip that is not there, or whose content follows from its name.
        """

    def size(self, clip: Clip) -> int | None:
        """Bytes of a clip's video; None for a clip that is not there, or has no file."""

    def first_files(self) -> list[str]:
        """A video, or a zip file, of each source: whoever reads the clips must see it."""

    def annotations(self) -> Iterator[tuple[Clip, Mapping[str, Any]]]:
        """Each clip with its raw record, read again from the annotation file; {} without one."""


class CaptionedVideos(Source):
    """Made by `read_sources`."""

    def __init__(
        self, paths: list[Path], clips: list[Clip], videos: dict[tuple[int, str], VideoFile], report: Report
    ):
        self.clips = clips
        self.report = report
        self._paths = paths  # of the annotation files
        self._videos = videos  # by source and name

    def read(self, clip: Clip, buckets: Sequence[Bucket], fps: float, max_upscale: float) -> Sample:
        read = self._decode(clip, lambda found: video.read_clip(found, buckets, fps, max_upscale))
        return Sample(read.frames, read.bucket, shown=read.shown)

    def shown(self, clip: Clip) -> tuple[int, int] | None:
        return self._decode(clip, video.displayed_size)

    def _decode(self, clip: Clip, decode: Callable[[video.Video], T]) -> T:
        found = self._videos.get((clip.source, clip.video))
        if found is None:
            folders = ", ".join(str(annotations.folder(path)) for path in self._paths)
            raise UserError(f"there is no clip {clip.id} ({clip.video}) in {folders}")
        try:
            return decode(found.open())
        except UserError:
            raise
        except Exception as error:  # a damaged video must not end a run over many
            kind = type(error).__name__
            raise UserError(f"{found.path}: {clip.video} cannot be decoded ({kind}: {error})") from error

    def content(self, clip: Clip, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
        found = self._videos.get((clip.source, clip.video))
        if found is None:
            return {}
        if known and known.get("stamp") == found.stamp:
            return {"stamp": known["stamp"], "sha256": known["sha256"]}
        try:
            return {"stamp": found.stamp, "sha256": found.sha256().hex()}
        except (UserError, OSError) as error:  # it cannot be decoded either, which says why
            if shortage(error):
                raise
            return {"stamp": found.stamp, "sha256": ""}

    def size(self, clip: Clip) -> int | None:
        found = self._videos.get((clip.source, clip.video))
        return None if found is None else found.size

    def first_files(self) -> list[str]:
        return list({source: found.path for (source, _), found in reversed(self._videos.items())}.values())

    def annotations(self) -> Iterator[tuple[Clip, Mapping[str, Any]]]:
        clips = iter(self.clips)  # in the order of sources, and of records within each
        clip = next(clips)
        for source, path in enumerate(self._paths):
            for number, row in enumerate(annotations.read_annotations(path)[1]):
                if (source, number) == (clip.source, clip.record):
                    yield clip, row.record
                    clip = next(clips, None)
                    if clip is None:
                        return


class Sandbox(Source):
    """Made by `draw_sandbox`."""

    def __init__(self, seed: int, bucket: Bucket, fps: float, counts: Mapping[str, int]):
        zero = taxonomy.multi_hot([])
        self.clips = [
            Clip(f"{split}-{index:06d}", "", zero, 0, f"{split}/{index}", split)
            for split, count in counts.items()
            for index in range(count)
        ]
        self.report = Report(records=len(self.clips))
        self._seed, self._bucket, self._fps = seed, bucket, fps

    def read(self, clip: Clip, buckets: Sequence[Bucket], fps: float, max_upscale: float) -> Sample:
        """Draws the clip, in its one shape and at its one rate."""
        from prophy_jax.data.sandbox.clip import make_clip

        split, index = clip.video.split("/")
        drawn = make_clip(self._seed, split, int(index), self._bucket.height, self._bucket.frames, self._fps)
        return Sample(drawn.frames, self._bucket, drawn.masks, drawn.caption, drawn.category)

    def shown(self, clip: Clip) -> tuple[int, int] | None:
        return None

    def content(self, clip: Clip, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return {}

    def size(self, clip: Clip) -> int | None:
        return None

    def first_files(self) -> list[str]:
        return []

    def annotations(self) -> Iterator[tuple[Clip, Mapping[str, Any]]]:
        return ((clip, {}) for clip in self.clips)


def read_sources(
    paths: str | Path | Sequence[str | Path],
    categories: str = "answers",
    validation: Sequence[str | Path] = (),
    known: Taxonomy = taxonomy.WISA,
) -> CaptionedVideos:
    """Lists the clips of one or several sources; videos are found but not decoded.

    Of videos with the same content the first in order is used; one of `validation` comes before all others.
    They are compared by size, then CRC-32, then SHA-256, so that few are read.

    Args:
        paths: for each source its folder, or its annotation file.
        categories: where WISA's category vectors come from: "answers" (q0, q1 and q2) or "label".
        validation: further sources, whose clips are of split "val"; they follow `paths` in order.
        known: the categories that there are.

    Returns:
        The clips in the order of sources and of their records, and the report.

    Raises:
        UserError: a source or its annotation file is missing or not usable, a zip file is broken, or
            no record of a source gives a clip.
    """
    if categories not in ("answers", "label"):
        raise UserError(f'categories must be "answers" or "label", not {categories!r}')
    training = [paths] if isinstance(paths, str | Path) else list(paths)
    files = [annotations.find_annotations(path) for path in (*training, *validation)]
    for number, path in enumerate(files[: len(training)]):
        if any(storage.is_same(path, own) for own in files[len(training) :]):
            raise UserError(
                f"{training[number]} is named by --source and by --val, which would leave no clip to train "
                "on: name other clips, or say in a column `split` which are for validation"
            )
    report = Report()
    listed = [_locate(path, known, report) for path in files]
    keys = content_keys(found for source in listed for _, _, found in source if isinstance(found, VideoFile))

    report.records = sum(map(len, listed))
    clips: list[Clip] = []
    videos: dict[tuple[int, str], VideoFile] = {}
    used: dict[tuple, tuple[str, VideoFile]] = {}  # content -> id, video
    ids: set[str] = set()
    first = len(training)
    for source in (*range(first, len(files)), *range(first)):
        for number, (where, entry, found) in enumerate(listed[source]):
            clip_id = entry.id or _stem(entry.video, found) or where
            if isinstance(found, VideoFile):
                videos[source, found.name] = found
            if isinstance(found, str):
                reason = found
            elif used.get(keys[found], ("",))[0] == clip_id and used[keys[found]][1] == found:
                reason = "second record of this video; the first is used"
            elif keys[found] in used:
                reason = f"duplicate: same content as {used[keys[found]][0]}"
            else:
                names = (f"{found.name} ({n})" for n in itertools.count(2))
                names = itertools.chain((clip_id, found.name, f"{source}:{found.name}"), names)
                clip_id = next(name for name in names if name not in ids)
                ids.add(clip_id)
                used[keys[found]] = clip_id, found
                category = _category(entry.labels, categories, known, clip_id, report)
                split = "val" if source >= first else annotations.SPLITS[entry.split.lower()]
                clips.append(Clip(clip_id, entry.caption, category, source, found.name, split, number))
                continue
            report.skipped.append((_short(clip_id), reason))
    clips.sort(key=lambda clip: clip.source)
    return CaptionedVideos(files, clips, videos, report)


def draw_sandbox(data: ConfigDict) -> Sandbox:
    """The physics sandbox as a source; each clip is drawn when it is read.

    Args:
        data: `config.data`: square `height` and `width`, `frames`, `fps`, and `sandbox` with `seed` and
            the counts `train`, `val` and `test`.

    Raises:
        UserError: no `data.sandbox`, or a shape that the sandbox cannot draw.
    """
    from prophy_jax.data.sandbox.clip import SPLITS, check_shape

    if "sandbox" not in data:
        raise UserError("this config has no config.data.sandbox to draw; give videos with --source")
    if data.height != data.width:
        raise UserError(
            f"the sandbox draws square clips, but config.data is {data.height}x{data.width} pixels"
        )
    check_shape(data.height, data.frames, data.fps)
    counts = {split: data.sandbox[split] for split in SPLITS}
    return Sandbox(data.sandbox.seed, Bucket(data.frames, data.height, data.width), data.fps, counts)


def choose(clips: Sequence[Clip], subset: int | None, seed: int) -> list[Clip]:
    """A random subset of `subset` clips in their order; all of them if `subset` is None or not fewer.

    Which ones depends on the ids, `subset` and `seed` alone, in every process and version.

    Raises:
        UserError: `subset` is less than 1.
    """
    if subset is None:
        return list(clips)
    if subset < 1:
        raise UserError(f"a subset of {subset} clips is empty; give at least 1, or none for all")
    chosen = {clip.id for clip in _ranked(clips, f"subset {seed}")[:subset]}
    return [clip for clip in clips if clip.id in chosen]


def split_clips(clips: Sequence[Clip], share: float, seed: int) -> dict[str, list[Clip]]:
    """Splits clips into "train" and "val", in order; clips of a fixed split keep it.

    Of n others, "val" gets max(1, round(share n)) at random by ids and `seed`, but one stays in
    "train"; it gets none where `share` is 0, or where clips are fixed to it. "test" is there if a clip is
    fixed to it.

    Raises:
        UserError: `share` is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise UserError(f"the share of validation clips must be at least 0 and below 1, not {share}")
    others = [clip for clip in clips if not clip.split]
    count = min(max(1, round(share * len(others))), len(others) - 1)
    if not share or any(clip.split == "val" for clip in clips):
        count = 0
    val = {clip.id for clip in _ranked(others, f"split {seed}")[: max(count, 0)]}
    splits: dict[str, list[Clip]] = {"train": [], "val": []}
    for clip in clips:
        split = clip.split or ("val" if clip.id in val else "train")
        splits.setdefault(split, []).append(clip)
    return splits


def _ranked(clips: Sequence[Clip], salt: str) -> list[Clip]:
    """Clips in a random order. Hashes, since NumPy may change what a generator draws."""
    return sorted(clips, key=lambda clip: hashlib.sha256(f"{salt} {clip.id}".encode()).digest())


def _locate(path: Path, known: Taxonomy, report: Report) -> list[tuple[str, Entry, VideoFile | str]]:
    """Each row of an annotation file: where it is, its entry, and its video or why it has none."""
    found_format, rows = annotations.read_annotations(path)
    root = annotations.folder(path)
    folder = VideoFolder(root, root / found_format.videos)
    report.unused += annotations.describe_unused(path, folder, found_format, rows)
    located: list[tuple[str, Entry, VideoFile | str]] = []
    doubtful = []  # captions
    for row in rows:
        entry, cut = found_format.parse(row.record), row.cut
        if cut and cut.column in annotations.CATEGORY and not _is_no_category(cut.text, known):
            cut = None
        if row.problem:
            found: VideoFile | str = row.problem
        elif not entry.video:
            found = "no video name"
        elif not annotations.says_something(entry.caption):
            found = f"no caption: {row.where}" + (f" has {entry.caption!r}" if entry.caption else "")
        elif entry.split.lower() not in annotations.SPLITS:
            found = f"unknown split: {row.where} has {entry.split!r}, expected train, val or test"
        elif cut and cut.sure:
            found = (
                f"cut caption: {row.where} has {_short(cut.text)!r} where its {cut.column or 'next column'} "
                "should be: put quotes around the caption"
            )
        else:
            try:
                found = folder.find(entry.video)
            except UserError as error:
                if shortage(error):
                    raise
                found = _short(str(error))
            if cut:
                doubtful.append(f"{row.where} ({_short(cut.text)!r} is no category)")
        located.append((row.where, entry, found))
    if doubtful:
        report.unused.append(
            f"captions of {path} that look cut at a comma: {annotations.shorten(doubtful)}; put quotes "
            "around texts that hold commas"
        )
    if all(isinstance(found, str) for _, _, found in located):
        where, entry, reason = located[0]
        missing = str(reason).startswith("missing")
        raise UserError(
            f"none of the {counted(len(located), 'record')} of {path} can be used (first, "
            f"{_short(entry.video or where)}: {reason})"
            + (f"; put the videos, in folders or zip files, under {folder.folder}" if missing else "")
        )
    return located


def _stem(name: str, found: VideoFile | str) -> str:
    """The name of a video, as a record gives it, without folder and ending; of `my.clip.v2` all, if bare."""
    whole = Path(name.replace("\\", "/"))
    file = Path(found.name.replace(":", "/")).name if isinstance(found, VideoFile) else ""
    bare = unicodedata.normalize("NFC", file).startswith(unicodedata.normalize("NFC", f"{whole.name}."))
    return whole.name if bare else whole.stem


def _short(text: str) -> str:
    """A text for a message, such as a caption that is where a name should be."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _is_no_category(text: str, known: Taxonomy) -> bool:
    """Whether something is said, and nothing of it is understood."""
    named, unknown = known.parse_labels(text)
    return bool(unknown) and not named


def _category(
    labels: Mapping[str, str], categories: str, known: Taxonomy, clip_id: str, report: Report
) -> np.ndarray:
    """(E,) float32 multi-hot; notes in `report` what was not understood."""
    named: dict[str, list[str]] = {}
    for where, text in labels.items():
        named[where], unknown = known.parse_labels(text)
        for label in unknown:
            key = f'{where}: "{_short(label)}"'
            report.unknown_labels[key] += 1
            report.examples.setdefault(key, clip_id)
    answers = [where for where in labels if where != "label"]
    answered = {name for where in answers for name in named[where]}
    if not answered.issuperset(named.get("label", ())):
        report.label_differs.append(clip_id)
    if categories == "label" and "label" in labels:
        if not labels["label"]:
            report.unannotated.append(clip_id)
        return known.multi_hot(named["label"])
    if not any(labels[where] for where in answers):
        report.unannotated.append(clip_id)
    return known.multi_hot(sorted(answered))
