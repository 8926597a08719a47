"""Sources of clips: every defect is reported or refused, none is dropped silently."""

import csv
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import unicodedata
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from prophy_jax.data import taxonomy
from prophy_jax.data.sandbox.clip import make_clip
from prophy_jax.data.sources import source as sources
from prophy_jax.data.sources import video, video_files
from prophy_jax.data.sources.video import Bucket
from prophy_jax.prepare import list_buckets
from prophy_jax.run.errors import UserError


def record(name, **changes):
    answers = {"q0": "collision", "q1": "no obvious thermodynamic phenomenon.", "q2": "reflection"}
    written = {
        "video_name": name,
        "captions": f"Caption of {name}.",
        "label": "Collision ",
        "physical_annotation": answers,
    }
    return written | changes


def write_files(folder, contents):
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def wisa(root, records, videos):
    """A folder in WISA-80K's layout; `videos` by name below "videos"."""
    write_files(root / "videos", videos)
    (root / "wisa-80k.json").write_text(json.dumps(records))
    return root


def plain(root, rows, videos, name="clips.csv"):
    """A folder with a CSV of these rows, the first of them the header."""
    write_files(root, videos)
    with (root / name).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return root


def zipped(path, members, method=zipfile.ZIP_STORED):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def ids(source):
    return [clip.id for clip in source.clips]


def mp4(path, frames=9, height=48, width=64, level=100):
    pytest.importorskip("av", reason="video needs PyAV: pip install av")
    video.write_mp4(path, np.full((frames, height, width, 3), level, np.uint8), 8)
    return path.read_bytes()


# ---- WISA-80K's layout ---------------------------------------------------------------------------


def test_reads_clips_in_order(tmp_path):
    videos = {"0/b.mp4": b"1", "1/a.mp4": b"2"}  # numbered subfolders, as in the public archive
    wisa(tmp_path, [record("b.mp4"), record("a.mp4")], videos)
    for named in (tmp_path, tmp_path / "wisa-80k.json", [str(tmp_path)]):
        source = sources.read_sources(named)
        assert ids(source) == ["b", "a"]
        clip = source.clips[0]
        assert (clip.video, clip.source, clip.split) == ("videos/0/b.mp4", 0, "")
        assert clip.caption == "Caption of b.mp4."
        np.testing.assert_array_equal(clip.category, taxonomy.multi_hot(["collision", "reflection"]))
        assert clip.category.dtype == np.float32
        assert source.report == sources.Report(records=2)


ODD = [
    record("good.mp4"),
    record("good.mp4", captions="again"),
    record("missing.mp4"),
    record("mute.mp4", captions="  "),
    record("odd.mp4", physical_annotation={"q0": "collision, rainbow", "q1": None, "q2": 7}, label="Solid"),
    record("odd2.mp4", physical_annotation={"q0": "rainbow"}),
    record("bare.mp4", physical_annotation=None, label=None),
    record("../../etc/passwd"),
    record("twins.mp4"),
    record("clones.mp4"),
    {"captions": "nameless"},
]


def odd(root):
    names = ("good", "mute", "odd", "odd2", "bare")
    videos = {f"{name}.mp4": name.encode() for name in names}
    videos |= {"0/twins.mp4": b"1", "1/twins.mp4": b"2", "0/clones.mp4": b"3", "1/clones.mp4": b"3"}
    return wisa(root, ODD, videos)


def test_everything_not_understood_is_reported(tmp_path):
    source = sources.read_sources(odd(tmp_path))
    report = source.report
    assert ids(source) == ["good", "odd", "odd2", "bare", "clones"]
    assert (
        source.clips[0].caption == "Caption of good.mp4." and source.clips[4].video == "videos/0/clones.mp4"
    )
    assert report.records == len(ODD)
    assert report.skipped == [
        ("good", "second record of this video; the first is used"),
        ("missing", "missing: no video missing.mp4"),
        ("mute", "no caption: record 3"),
        ("passwd", "missing: no video passwd"),
        ("twins", "ambiguous: 2 different videos are called twins.mp4"),
        ("record 10", "no video name"),
    ]
    assert report.unknown_labels == {'q0: "rainbow"': 2, 'q2: "7"': 1, 'label: "Solid"': 1}
    assert report.examples['q0: "rainbow"'] == "odd"
    assert report.unannotated == ["bare"] and not source.clips[3].category.any()
    assert report.label_differs == ["odd2"]  # label says collision, no answer does
    np.testing.assert_array_equal(source.clips[1].category, taxonomy.multi_hot(["collision"]))


def test_the_single_label_instead_of_the_answers(tmp_path):
    source = sources.read_sources(odd(tmp_path), categories="label")
    expected = [["collision"], [], ["collision"], [], ["collision"]]
    for clip, names in zip(source.clips, expected, strict=True):
        np.testing.assert_array_equal(clip.category, taxonomy.multi_hot(names), clip.id)
    answers = sources.read_sources(tmp_path).report  # what is not understood is the same
    assert source.report.unknown_labels == answers.unknown_labels
    assert source.report.label_differs == answers.label_differs
    assert source.report.unannotated == ["bare"]  # "Solid" is not understood, which is another thing
    with pytest.raises(UserError, match="categories must be .*, not 'q0'"):
        sources.read_sources(tmp_path, categories="q0")


def test_a_clip_without_phenomena_is_used(tmp_path):
    none = {"q0": "no obvious dynamic phenomenon", "q1": "none", "q2": "no"}
    source = sources.read_sources(
        wisa(tmp_path, [record("a.mp4", physical_annotation=none)], {"a.mp4": b"1"})
    )
    assert not source.clips[0].category.any() and source.report.unannotated == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json {", "is not a JSON file"),
        ("", "is not a JSON file"),
        ('[{"video_name": "a.mp4"} {}]', r"is not a JSON file \(Expecting ',' delimiter.* column 26"),
        ('[{"video_name": "a.mp4"},]', "is not a JSON file"),
        ('[{"video_name": "a.mp4"}', "is not a JSON file"),
        ('[{"video_name": "a.mp4"}] {}', r"is not a JSON file \(Extra data"),
        ('{"a": 1}', "is not a JSON list of records"),
        ("[1, 2]", "is not a JSON list of records"),
        (" [ ] ", "lists no records"),
        ("[" * 100_000, "is not a JSON"),
        (b"\xff\xfe\x00", "is not a JSON file"),
    ],
)
def test_bad_label_file(tmp_path, content, message):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "labels.json").write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        sources.read_sources(tmp_path)
    assert "labels.json" in str(error.value) and len(str(error.value)) < 300


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="no file or folder .*nowhere"):
        sources.read_sources(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is empty"):
        sources.read_sources(tmp_path)
    (tmp_path / "videos").mkdir()
    with pytest.raises(UserError, match="has no .json, .csv, .tsv or .jsonl file"):
        sources.read_sources(tmp_path)
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "b.csv").write_text("")
    with pytest.raises(UserError, match=r"several files of captions \(a.json, b.csv\); name one"):
        sources.read_sources(tmp_path)
    with pytest.raises(UserError, match="clip.mp4 is not a .json, .csv, .tsv or .jsonl"):
        sources.read_sources(write_files(tmp_path, {"clip.mp4": b"1"}) / "clip.mp4")


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(UserError, match="cannot be read .File name too long"):
        sources.read_sources(tmp_path / ("x" * 300))


def test_no_video_at_all(tmp_path):
    wisa(tmp_path, [record("a.mp4"), record("b.mp4")], {"c.mp4": b"1"})
    with pytest.raises(
        UserError, match="none of the 2 records .*first, a.mp4: missing.* zip files, under .*videos"
    ):
        sources.read_sources(tmp_path)


# ---- zip files -----------------------------------------------------------------------------------

PREFIX = "/mnt/disk/nobody/128_split"  # of absolute paths, as in the public archive


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_members_read_as_files(tmp_path, method):
    content = [mp4(tmp_path / f"{i}.mp4", level=40 * i) for i in range(3)]
    members = {f"{PREFIX}/0/a.mp4": content[0], "../../b.mp4": content[1], "c.mp4": content[2]}
    root = tmp_path / "wisa"
    zipped(root / "videos" / "0.zip", members, method)
    wisa(root, [record(f"{name}.mp4") for name in "abc"], {})
    before = sorted(tmp_path.rglob("*"))
    source = sources.read_sources(root)
    assert [clip.video for clip in source.clips] == [f"videos/0.zip:{name}" for name in members]
    assert not source.report.skipped
    bucket = Bucket(5, 24, 32)
    with ThreadPoolExecutor(4) as threads:  # several at once, from one zip file
        samples = list(threads.map(lambda clip: source.read(clip, [bucket], 8, math.inf), source.clips * 4))
    for i, sample in enumerate(samples):
        assert sample.bucket == bucket and sample.masks is sample.caption is sample.category is None
        expected = video.read_clip(tmp_path / f"{i % 3}.mp4", [bucket], 8).frames
        np.testing.assert_array_equal(sample.frames, expected)
    assert sorted(tmp_path.rglob("*")) == before  # nothing was unpacked


def test_damaged_member_is_one_line(tmp_path):
    content = random.Random(0).randbytes(1000)
    root = tmp_path / "wisa"
    path = root / "videos" / "0.zip"
    zipped(path, {"a.mp4": content, "b.mp4": content[:999]}, zipfile.ZIP_DEFLATED)
    wisa(root, [record("a.mp4"), record("b.mp4")], {})
    damaged = bytearray(path.read_bytes())
    damaged[500] ^= 1
    path.write_bytes(damaged)
    source = sources.read_sources(root)  # the directory of the zip file is whole
    with pytest.raises(UserError, match="0.zip:a.mp4: .*zip file"):
        source.read(source.clips[0], [Bucket(5, 24, 32)], 8, math.inf)
    with pytest.raises(UserError, match="0.zip:b.mp4: cannot be decoded.*not a video"):
        source.read(source.clips[1], [Bucket(5, 24, 32)], 8, math.inf)


def test_zip_of_another_compression(tmp_path):
    path = tmp_path / "videos" / "0.zip"
    zipped(path, {"a.mp4": b"1" * 1000}, zipfile.ZIP_BZIP2)
    source = sources.read_sources(wisa(tmp_path, [record("a.mp4")], {}))
    with pytest.raises(UserError, match="0.zip:a.mp4: cannot be decoded.*not a video"):  # it can be read
        source.read(source.clips[0], [Bucket(5, 24, 32)], 8, math.inf)
    content = path.read_bytes().replace(b"\x0c\x00", b"\x63\x00")  # method 12 becomes 99
    wisa(tmp_path / "other", [record("a.mp4")], {"0.zip": content})
    source = sources.read_sources(tmp_path / "other")
    with pytest.raises(UserError, match="0.zip:a.mp4: cannot be read .*compression"):
        source.read(source.clips[0], [Bucket(5, 24, 32)], 8, math.inf)


def test_what_the_records_mean_is_found_by_their_content(tmp_path):
    """A JSON list without WISA's answers is a table like any other."""
    rows = [{"file_name": "a.mp4", "text": "A caption.", "category": "melting", "id": "first"}]
    write_files(tmp_path, {"a.mp4": b"1"})
    (tmp_path / "list.json").write_text(json.dumps(rows))
    source = sources.read_sources(tmp_path)
    assert ids(source) == ["first"] and source.clips[0].video == "a.mp4"
    np.testing.assert_array_equal(source.clips[0].category, taxonomy.multi_hot(["melting"]))
    (tmp_path / "list.json").unlink()
    (tmp_path / "list.jsonl").write_text(json.dumps(record("a.mp4")))  # WISA's videos are below "videos"
    with pytest.raises(UserError, match="missing: no video a.mp4.*under .*videos"):
        sources.read_sources(tmp_path)


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_broken_zip_is_refused_by_name(tmp_path, share):
    zipped(tmp_path / "videos" / "7.zip", {"a.mp4": b"1" * 1000})
    content = (tmp_path / "videos" / "7.zip").read_bytes()
    wisa(tmp_path, [record("a.mp4")], {"7.zip": content[: int(share * len(content))]})
    with pytest.raises(UserError, match="7.zip is not a readable zip file .*download it again"):
        sources.read_sources(tmp_path)


# ---- CSV and JSONL -------------------------------------------------------------------------------


def test_csv_with_newlines_quotes_and_a_byte_order_mark(tmp_path):
    captions = ['He said "stop", then left.', "Two\nlines, and a comma ", "Ümläut 雪"]
    rows = [["video", "caption", "category", "id"]]
    rows += [["clips/a.mp4", captions[0], "Melting, collision", "first"]]
    rows += [["b.mp4", captions[1], "friction", ""], ["c.mp4", captions[2], "", "3"]]
    plain(tmp_path, rows, {"clips/a.mp4": b"1", "deep/er/b.mp4": b"2", "c.mp4": b"3"})
    path = tmp_path / "clips.csv"
    path.write_bytes("\ufeff".encode() + path.read_bytes())
    source = sources.read_sources(tmp_path)
    assert ids(source) == ["first", "b", "3"]
    assert [clip.caption for clip in source.clips] == [caption.strip() for caption in captions]
    assert [clip.video for clip in source.clips] == ["clips/a.mp4", "deep/er/b.mp4", "c.mp4"]
    np.testing.assert_array_equal(source.clips[0].category, taxonomy.multi_hot(["collision", "melting"]))
    assert source.report.unknown_labels == {'category: "friction"': 1}
    assert source.report.unannotated == ["3"]


@pytest.mark.parametrize("video_column", ["video", "videopath", "video_name", "file_name", " File_Name "])
@pytest.mark.parametrize("caption_column", ["caption", "captions", "text"])
def test_column_names(tmp_path, video_column, caption_column):
    rows = [["other", caption_column, video_column], ["x", "A caption.", "a.mp4"]]
    source = sources.read_sources(plain(tmp_path, rows, {"a.mp4": b"1"}))
    assert ids(source) == ["a"] and source.clips[0].caption == "A caption."


def test_jsonl(tmp_path):
    lines = [
        {"file_name": "a.mp4", "text": "One.", "label": ["reflection", "Refractions"], "id": 7},
        {"file_name": "b.mp4", "text": None},
        {"text": "No video."},
    ]
    write_files(tmp_path, {"a.mp4": b"1", "b.mp4": b"2"})
    (tmp_path / "clips.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    source = sources.read_sources(tmp_path, categories="label")
    assert ids(source) == ["7"]
    np.testing.assert_array_equal(source.clips[0].category, taxonomy.multi_hot(["reflection", "refraction"]))
    assert source.report.skipped == [
        ("b", "no caption: line 3 of clips.jsonl"),
        ("line 5 of clips.jsonl", "no video name"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"caption,clip\nA,b.mp4\n", "no column for the video: .*videopath.*found caption, clip"),
        (
            "a.csv",
            b"x,y\nA,b.mp4\n",
            "no column for the video: .*, and no column for the caption: .*found x, y",
        ),
        ("a.csv", b"video,caption, Caption\na.mp4,A,B\n", "two columns 'caption'"),
        ("a.csv", b'video,"cap"tion\na.mp4,A\n', "is not a CSV file .line 1 of a.csv has a wrong quote"),
        ("a.csv", b"video,caption\na.mp4,A, B\n", "line 2 of a.csv has more cells than columns, 3 of 2"),
        ("a.csv", b"video\nb.mp4\n", "no column for the caption: .*text; found video"),
        (
            "a.csv",
            b"vidoe,prompt\nb.mp4,A\n",
            r"no column for the video: .*found vidoe .did you mean video\?., p",
        ),
        ("a.csv", b"video;captoin\nb.mp4;A\n", r"found video, captoin .did you mean caption\?.$"),
        ("a.tsv", b"video\tcaption\na.mp4\tA\tB\n", "line 2 .* cells than columns, 3 of 2.*texts with tabs"),
        ("a.csv", b"a.mp4,A\nb.mp4,B\n", "found a.mp4, A; the first line of a table must name its columns$"),
        (
            "a.csv",
            b"# mine\nvideo,caption\na.mp4,A\n",
            "found # mine; the first line of a table must name its",
        ),
        (
            "a.csv",
            b"video|caption\na.mp4|A\n",
            r"found video\|caption; cells are separated by .*, not by \|$",
        ),
        ("a.json", b"[{}]", "no column for the video"),
        (
            "a.json",
            b'{"train": [{"video": "a.mp4"}], "val": [{"video": "b.mp4"}]}',
            "is not a JSON list of rec",
        ),
        ("a.json", b'{"video": ["a.mp4"], "caption": ["A"]}', "is not a JSON list of records"),
        ("a.json", b'{"a.mp4": "A", "a.mp4": "B"}', "is not a JSON file .it has the key 'a.mp4' twice"),
        ("a.json", b'{"a.mp4": 1}', "is not a JSON list of records; .* or an object of captions"),
        ("a.csv", b'video,caption\na.mp4,"never closed\n', "is not a CSV file"),
        ("a.csv", b"video,caption\na.mp4,\xff\xfe\n", "is not a CSV file .*utf-8"),
        ("a.csv", b"", "lists no records"),
        ("a.csv", b"video,caption\n", "lists no records"),
        ("a.jsonl", b"\n{oops\n", "is not a JSONL file .*line 2"),
        ("a.json", b'[{"video": "a.mp4", "caption": ""}]', "none of the 1 record .*no caption: record 0.$"),
        ("a.jsonl", b"[1, 2]\n", "is not a JSONL file .*line 1 of a.jsonl is not an object"),
        ("a.jsonl", b'{"video": "a.mp4"}\n', "no column for the caption"),
        ("a.jsonl", b"\n", "lists no records"),
    ],
)
def test_bad_tables(tmp_path, name, content, message):
    write_files(tmp_path, {name: content, "a.mp4": b"1", "b.mp4": b"2"})
    with pytest.raises(UserError, match=message) as error:
        sources.read_sources(tmp_path)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_text_that_utf8_cannot_store_is_replaced(tmp_path):
    wisa(tmp_path, [], {"a.mp4": b"1"})
    half = '[{"video_name": "a.mp4", "captions": "half \\ud83d of a pair"}]'  # valid JSON all the same
    (tmp_path / "wisa-80k.json").write_text(half)
    source = sources.read_sources(tmp_path)
    assert source.clips[0].caption == "half ? of a pair"
    assert source.report.unused == [
        f"halves of characters in {tmp_path / 'wisa-80k.json'} are kept as '?': record 0"
    ]


@pytest.mark.parametrize(
    ("name", "separator", "before"),
    [
        ("a.csv", ";", ""),
        ("a.csv", "\t", ""),
        ("a.tsv", "\t", "\n"),
        ("a.csv", ";", "sep=;\r\n"),
        ("a.csv", ",", "sep=,\n"),
    ],
)
def test_the_header_says_what_separates_cells(tmp_path, name, separator, before):
    rows = [["video", "caption", "category"], ["a.mp4", '"A cat, then a dog; \t"', "melting"], ["b.mp4", "B"]]
    rows += [["", " ", ""], ["b.mp4", "B", "", "lost"]]  # an empty row is none
    text = before + "\n".join(separator.join(row) for row in rows)
    source = sources.read_sources(write_files(tmp_path, {name: text.encode(), "a.mp4": b"1", "b.mp4": b"2"}))
    assert [clip.caption for clip in source.clips] == ["A cat, then a dog;", "B"]
    assert source.clips[0].category.sum() == 1 and not source.report.unused
    [(where, problem)] = source.report.skipped
    assert where == f"line {5 + before.count(chr(10))} of {name}" and "4 of 3: put quotes" in problem


def test_columns_that_are_not_read_are_named(tmp_path):
    rows = [
        ["video", "caption", "Idd", "catgory", "fps", "type", ""],
        ["a.mp4", "A", "x", "melting", "8", "t", ""],
    ]
    source = sources.read_sources(plain(tmp_path, rows, {"a.mp4": b"1"}))
    assert source.report.unused == [
        f"columns of {tmp_path / 'clips.csv'} that are not read: Idd (did you mean id?), catgory (did you "
        "mean category?), type"
    ]
    assert ids(source) == ["a"]


def test_which_captions_are_used_is_said(tmp_path):
    rows = [["video", "caption"], ["a.mp4", "A"]]
    source = sources.read_sources(
        plain(tmp_path, rows, {"a.mp4": b"1", "a.txt": b"Another.", "videos.txt": b"a.mp4"})
    )
    assert source.clips[0].caption == "A"
    assert source.report.unused == [
        f"the captions are those of {tmp_path / 'clips.csv'}, not of videos.txt and .txt files beside videos "
        "(1): move it elsewhere to use the others"
    ]


@pytest.mark.parametrize(
    "content",
    [
        {"a.mp4": "A", "b.mp4": "B"},
        {"a.mp4": {"caption": "A", "tags": ""}, "b.mp4": {"caption": "B"}},
        [{"video": "a.mp4", "caption": "A"}, {"video": "b.mp4", "caption": "B"}],
        '{"video": "a.mp4", "caption": "A"}\n{"video": "b.mp4", "caption": "B"}',  # JSONL all the same
    ],
)
def test_captions_in_one_json_file(tmp_path, content):
    text = content if isinstance(content, str) else json.dumps(content)
    write_files(tmp_path, {"a.mp4": b"1", "b.mp4": b"2", "captions.json": text.encode()})
    assert [(clip.id, clip.caption) for clip in sources.read_sources(tmp_path).clips] == [
        ("a", "A"),
        ("b", "B"),
    ]


@pytest.mark.parametrize("names", ["a", "ab"])
def test_json_files_about_single_videos_are_no_table(tmp_path, names):
    files = {f"{name}.{kind}": f"{name} {kind}".encode() for name in names for kind in ("mp4", "txt", "json")}
    assert [clip.caption for clip in sources.read_sources(write_files(tmp_path, files)).clips] == [
        f"{name} txt" for name in names
    ]


# ---- rows that are wrong ------------------------------------------------------------------------

WRONG_ROWS = [
    b"a.mp4,A",
    b"b.mp4,a red ball, bouncing on the floor, slowly",  # line 3
    b'c.mp4,"Hello" he said',
    b'd.mp4,"never closed',
    b'e.mp4,"two\nlines, and a comma"',  # lines 6 and 7
    b"f.mp4,\xe9t\xe9",
    b"g.mp4",
    b'h.mp4,"' + b"word " * 60_000 + b'"',  # 300,000 characters
    b"i.mp4,I,,",  # nothing is lost
]


def test_a_wrong_row_of_a_csv_is_listed_and_the_others_are_used(tmp_path):
    videos = {f"{name}.mp4": name.encode() for name in "abcdefghi"}
    write_files(tmp_path, videos | {"clips.csv": b"\n".join([b"video,caption", *WRONG_ROWS])})
    source = sources.read_sources(tmp_path)
    assert [clip.caption for clip in source.clips] == [
        "A",
        "two\nlines, and a comma",
        source.clips[2].caption,
        "I",
    ]
    assert ids(source) == ["a", "e", "h", "i"] and len(source.clips[2].caption) == 299_999
    assert source.report.records == 9
    problems = {name: reason for name, reason in source.report.skipped}
    assert list(problems) == [*(f"line {number} of clips.csv" for number in (3, 4, 5, 8)), "g"]
    for number, problem in {3: "more cells than columns, 4 of 2", 4: "wrong quote", 5: "wrong quote"}.items():
        assert problem in problems[f"line {number} of clips.csv"]
    assert problems["line 4 of clips.csv"].endswith(": write a quote inside quotes twice")
    assert "0xe9) that is not utf-8" in problems["line 8 of clips.csv"]
    assert problems["g"] == "no caption: line 9 of clips.csv"
    assert [clip for clip, _ in source.annotations()] == source.clips


@pytest.mark.parametrize("cell", ["['melting', 'collision']", '["melting","collision"]', "melting|collision"])
def test_lists_of_categories_as_programs_write_them(tmp_path, cell):
    rows = [["video", "caption", "category"], ["a.mp4", "A", cell], ["b.mp4", "B", "['reflection']"]]
    source = sources.read_sources(plain(tmp_path, rows, {"a.mp4": b"1", "b.mp4": b"2"}))
    for clip, names in zip(source.clips, (["melting", "collision"], ["reflection"]), strict=True):
        np.testing.assert_array_equal(clip.category, taxonomy.multi_hot(names))
    assert not source.report.unknown_labels and not source.report.unused


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_byte_order_mark(tmp_path, encoding):
    table = "video,caption\na.mp4,Ümläut 雪\n".encode(encoding)
    [clip] = sources.read_sources(write_files(tmp_path, {"a.mp4": b"1", "clips.csv": table})).clips
    assert clip.caption == "Ümläut 雪"


def test_the_same_clips_to_train_on_and_to_validate(tmp_path):
    plain(tmp_path, [["video", "caption"], ["a.mp4", "A"]], {"a.mp4": b"1"})
    with pytest.raises(UserError, match="is named by --source and by --val"):
        sources.read_sources(tmp_path, validation=[tmp_path / "clips.csv"])


def test_a_category_that_is_the_rest_of_a_caption(tmp_path):
    """The count of cells fits, but the cell begins as a text goes on after a comma, and is no category."""
    lines = [
        "video,caption,category",
        "a.mp4,a red ball, bouncing on the floor",
        "b.mp4,a ball, collision",
        "c.mp4,a ball, ",
    ]
    lines += ["d.mp4, a ball, rainbow", "e.mp4,a ball,rainbow", "f.mp4,a ball, none"]
    videos = {f"{name}.mp4": name.encode() for name in "abcdef"}
    source = sources.read_sources(write_files(tmp_path, videos | {"clips.csv": "\n".join(lines).encode()}))
    assert ids(source) == list("bcdef")
    assert source.report.skipped == [
        (
            "a",
            "cut caption: line 2 of clips.csv has 'bouncing on the floor' where its category should be: put "
            "quotes around the caption",
        )
    ]
    assert source.report.unknown_labels == {'category: "rainbow"': 2}


@pytest.mark.parametrize(
    ("header", "row", "problem"),
    [
        ("video,caption,", "a ball,bouncing", "more cells than columns, 3 of 2"),  # as spreadsheets write
        ("video,caption,,fps", "a ball,bouncing,8", "'bouncing' where its next column"),
        ("video,caption,duration", "a ball, bouncing", "'bouncing' where its duration"),
        ("video,caption,source,Fps", "a ball,now,bouncing", "'bouncing' where its fps"),
        ("video,caption,source", "a ball, bouncing", "'bouncing' where its source"),
        ("video,caption,source,fps", "a ball,tv,as it falls", "'as it falls' where its fps"),
        ("video,caption,source,fps", "a ball,bouncing", "'bouncing' where its source"),  # a cell too few
        ("video,caption,id", "a ball,bouncing high", "'bouncing high' where its id"),
        ("video,caption,category", 'a "ball, it jumps"', "'it jumps\"' where its category"),
        ("video,caption,category", ' "never closed', "wrong quote"),
    ],
)
def test_the_rest_of_a_caption_in_any_column(tmp_path, header, row, problem):
    """And the same text in quotes is a caption, whatever follows."""
    whole = 'b.mp4, "' + row.strip().replace('"', '""') + '"'
    table = f"{header}\na.mp4,{row}\n{whole}\n"
    write_files(tmp_path, {"a.mp4": b"1", "b.mp4": b"2", "clips.csv": table.encode()})
    source = sources.read_sources(tmp_path)
    assert [clip.caption for clip in source.clips] == [row.strip()]
    [(name, reason)] = source.report.skipped
    assert problem in reason and "line 2 of clips.csv" in name + reason


def test_cells_behind_a_caption_that_are_meant(tmp_path):
    header = "video,caption,source,duration,fps,width,id"
    rows = [
        "A,my own,5 s,30000/1001,480 px,clip 1",
        "A, 7,0:05,29.97,,",
        "A,tv,N/A,nan,-,x_y z",
        "A",
        'A 5",tv',
    ]
    lines = [f"{k}.mp4,{row}" + "," * (6 - row.count(",") - 1) for k, row in enumerate(rows)]
    files = {f"{k}.mp4": b"%d" % k for k in range(len(rows))}
    write_files(tmp_path, files | {"clips.csv": "\n".join([header, *lines, "0.mp4,A"]).encode()})
    source = sources.read_sources(tmp_path)
    assert [name for name, _ in source.report.skipped] == ["0"] and len(source.clips) == len(rows)
    (tmp_path / "clips.csv").write_text("video,caption,id\nmy cat/0.mp4,A,my cat")
    assert ids(sources.read_sources(tmp_path)) == ["my cat"]


def test_a_caption_that_may_be_cut_is_listed(tmp_path):
    table = 'video,caption,category\na.mp4,a ball,bouncing\nb.mp4,a ball,collision\nc.mp4,"c, d",rainbow\n'
    write_files(tmp_path, {f"{name}.mp4": name.encode() for name in "abc"} | {"clips.csv": table.encode()})
    source = sources.read_sources(tmp_path)
    assert ids(source) == list("abc")
    assert source.report.unused == [
        f"captions of {tmp_path / 'clips.csv'} that look cut at a comma: line 2 of clips.csv ('bouncing' is "
        "no category); put quotes around texts that hold commas"
    ]


@pytest.mark.parametrize(
    ("cells", "caption", "category"),
    [
        ('"a cat jumps", melting', "a cat jumps", "melting"),
        ('"a cat, it jumps\nover", "melting, collision"', "a cat, it jumps\nover", "melting, collision"),
        ('"Hello" he said', '"Hello" he said', ""),
    ],
)
def test_a_quote_after_a_space(tmp_path, cells, caption, category):
    write_files(
        tmp_path, {"a.mp4": b"1", "clips.csv": f"video, caption, category\na.mp4, {cells}\n".encode()}
    )
    [clip] = sources.read_sources(tmp_path).clips
    assert clip.caption == caption
    np.testing.assert_array_equal(clip.category, taxonomy.multi_hot(category.split(", ") if category else []))


@pytest.mark.parametrize(
    "caption", ["nan", "None", "NULL", "N/A", "<NA>", "\u200b", "\ufeff \u2060", "\u00a0"]
)
def test_what_programs_write_for_no_caption_is_none(tmp_path, caption):
    rows = [
        ["video", "caption"],
        ["a.mp4", caption],
        ["b.mp4", "None of the balls fall."],
        ["c.mp4", "\U0001f525"],
    ]
    source = sources.read_sources(plain(tmp_path, rows, {f"{k}.mp4": k.encode() for k in "abc"}))
    assert ids(source) == ["b", "c"]
    [(name, reason)] = source.report.skipped
    assert name == "a" and reason.startswith("no caption: line 2 of clips.csv")


def test_keys_that_are_there_twice(tmp_path):
    lines = ['{"video": "a.mp4", "caption": "A", "caption": "B"}', '{"video": "b.mp4", "caption": "B"}']
    for name, text in {"c.jsonl": "\n".join(lines), "c.json": f"[{', '.join(lines)}]"}.items():
        root = write_files(tmp_path / name, {"a.mp4": b"1", "b.mp4": b"2", name: text.encode()})
        source = sources.read_sources(root)
        assert ids(source) == ["b"] and source.report.skipped[0][1] == "has the key 'caption' twice"


def test_an_id_that_is_the_rest_of_a_caption(tmp_path):
    text = "video,caption,id\na.mp4,a ball, it bounces\nb.mp4,a ball, 7\n"
    source = sources.read_sources(
        write_files(tmp_path, {"a.mp4": b"1", "b.mp4": b"2", "c.csv": text.encode()})
    )
    assert ids(source) == ["7"]
    assert source.report.skipped[0][1].startswith(
        "cut caption: line 2 of c.csv has 'it bounces' where its id"
    )


def test_captions_where_names_should_be_make_no_endless_line(tmp_path):
    rows = [["caption", "video", "label"], ["a.mp4", "word " * 9999, ""], ["A", "b.mp4", "x" * 9999]]
    source = sources.read_sources(plain(tmp_path, rows, {"a.mp4": b"1", "b.mp4": b"2"}))
    assert ids(source) == ["b"] and len(str(source.report)) < 2000


def test_a_wrong_record_of_json_is_listed_and_the_others_are_used(tmp_path):
    lines = [b'{"video": "b.mp4"}', b'{"video": "a.mp4", "caption": "A"}', b"{oops", b"[1]", b"\xff"]
    write_files(tmp_path, {"a.mp4": b"1", "b.mp4": b"2", "clips.jsonl": b"\n".join(lines)})
    source = sources.read_sources(tmp_path)
    assert ids(source) == ["a"]
    assert [name for name, _ in source.report.skipped] == [
        *("b", "line 3 of clips.jsonl", "line 4 of clips.jsonl", "line 5 of clips.jsonl"),
    ]
    (tmp_path / "clips.json").write_text('[7, {"file_path": "b.mp4"}, {"file_path": "a.mp4", "text": "A"}]')
    source = sources.read_sources(tmp_path / "clips.json")
    assert ids(source) == ["a"]
    assert source.report.skipped == [("record 0", "is not an object {...}"), ("b", "no caption: record 1")]


# ---- captions as people have them ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "video,prompt\n1/a.mp4,A\n2/a.mp4,B\n"),  # DiffSynth-Studio
        ("metadata.csv", "file_name,text\n1/a.mp4,A\n2/a.mp4,B\n"),  # its older form
        ("metadata.json", '[{"video": "1/a.mp4", "prompt": "A"}, {"video": "2/a.mp4", "prompt": "B"}]'),
        ("data.csv", "path,text\n1/a.mp4,A\n2/a.mp4,B\n"),  # Open-Sora
        ("data.csv", "file_path,text,type\n1/a.mp4,A,video\n2/a.mp4,B,video\n"),  # VideoX-Fun
        ("data.json", '[{"file_path": "1/a.mp4", "text": "A"}, {"file_path": "2/a.mp4", "text": "B"}]'),
        # musubi-tuner: absolute paths, of the machine that the file was written on.
        ("data.jsonl", '{"video_path": "/home/x/1/a.mp4", "caption": "A"}\n'
                       '{"video_path": "/home/x/2/a.mp4", "caption": "B"}\n'),
    ],
)  # fmt: skip
def test_tables_of_other_trainers(tmp_path, name, content):
    write_files(tmp_path, {name: content.encode(), "1/a.mp4": b"1", "2/a.mp4": b"2", "a.mp4": b"3"})
    source = sources.read_sources(tmp_path)
    found = [(clip.id, clip.video, clip.caption) for clip in source.clips]
    assert found == [("a", "1/a.mp4", "A"), ("2/a.mp4", "2/a.mp4", "B")] and not source.report.skipped


def test_two_files_of_lines(tmp_path):
    """finetrainers' form."""
    videos = {"videos/a.mp4": b"1", "videos/b.mp4": b"2", "videos/c.mp4": b"3"}
    texts = {
        "videos.txt": b"videos/a.mp4\r\nvideos/b.mp4\nvideos/c.mp4\n",
        "prompts.txt": b"A, yes.\n\nC\n\n",
    }
    write_files(tmp_path, videos | texts)
    for named in (tmp_path, tmp_path / "videos.txt"):
        source = sources.read_sources(named)
        assert [(clip.id, clip.caption) for clip in source.clips] == [("a", "A, yes."), ("c", "C")]
        assert source.report.skipped == [("b", "no caption: line 2 of videos.txt")]
    (tmp_path / "prompts.txt").write_bytes(b"A\nB\n")
    with pytest.raises(
        UserError, match="videos.txt has 3 lines, but prompts.txt has 2; each video needs one"
    ):
        sources.read_sources(tmp_path)
    (tmp_path / "prompts.txt").unlink()
    with pytest.raises(UserError, match="videos.txt has no prompts.txt beside it"):
        sources.read_sources(tmp_path)


@pytest.mark.parametrize(
    ("prompts", "captions", "skipped"),
    [
        (b"A\n\xe9t\xe9\n", {"a": "A"}, ("line 2 of prompts.txt", "has a byte (0xe9) that is not utf-8")),
        (b"A\n\n", {"a": "A"}, ("b", "no caption: line 2 of videos.txt")),
        (b"A\r\n\r\n", {"a": "A"}, ("b", "no caption: line 2 of videos.txt")),
        (b"A\nB\n\n\n", {"a": "A", "b": "B"}, None),
        ("A\nB".encode("utf-16-le"), {"a": "A", "b": "B"}, None),  # without a byte order mark
    ],
)
def test_a_wrong_line_of_two_files(tmp_path, prompts, captions, skipped):
    write_files(
        tmp_path, {"a.mp4": b"1", "b.mp4": b"2", "videos.txt": b"a.mp4\nb.mp4\n", "prompts.txt": prompts}
    )
    source = sources.read_sources(tmp_path)
    assert {clip.id: clip.caption for clip in source.clips} == captions
    assert [name for name, _ in source.report.skipped] == ([skipped[0]] if skipped else [])
    assert not skipped or source.report.skipped[0][1].startswith(skipped[1])
    (tmp_path / "captions.txt").write_text("X\nY\n")
    with pytest.raises(UserError, match=r"several files of captions beside it \(prompts.txt, captions.txt\)"):
        sources.read_sources(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "captions", "skipped"),
    [
        # A list, whatever the ending says.
        (
            "a.jsonl",
            '[\n{"video": "a.mp4", "caption": "A"},\n{"video": "b.mp4", "caption": "B"}\n]',
            "AB",
            (),
        ),
        ("a.json", '{"v": 1, "data": [{"video": "a.mp4", "caption": "A"}]}', "A", ()),
        ("a.json", '{"a.mp4": "x", "b.mp4": "B", "a.mp4": "z"}', "B", ("has the key 'a.mp4' twice",)),
        (
            "a.json",
            '{"a.mp4": {"caption": "x", "caption": "y"}, "b.mp4": {"caption": "B"}}',
            "B",
            ("has the key 'caption' twice",),
        ),
        (
            "a.jsonl",
            '{"video": "a.mp4", "Caption": "x", "caption": "y"}\n{"video": "b.mp4", "caption": "B"}',
            "B",
            ("has two keys 'caption', in capitals and not",),
        ),
        ("a.json", '{"a.mp4": ["x", "y"], "b.mp4": "B"}', "B", ("has a list as its caption: give one text",)),
        ("a.json", '{"a.mp4": ["x", "y"]}', None, "record 0 has a list as its caption: give one text"),
    ],
)
def test_json_of_odd_forms(tmp_path, name, content, captions, skipped):
    write_files(tmp_path, {"a.mp4": b"1", "b.mp4": b"2", name: content.encode()})
    if captions is None:
        with pytest.raises(UserError, match=skipped):
            sources.read_sources(tmp_path)
        return
    source = sources.read_sources(tmp_path)
    assert "".join(clip.caption for clip in source.clips) == captions
    assert tuple(reason for _, reason in source.report.skipped) == skipped


def test_captions_beside_the_videos(tmp_path):
    files = {
        **{"cats/1.mp4": b"1", "cats/1.txt": b"\xef\xbb\xbfA cat,\nasleep.\n", "cats/1.png": b"its cover"},
        **{"dogs/1.MOV": b"2", "dogs/1.TXT": "A dög.".encode("utf-16"), "._1.mp4": b"x", "._1.txt": b"x"},
        **{
            "bare.mp4": b"3",
            "latin.mp4": b"4",
            "latin.txt": b"\xe9",
            "still.jpg": b"5",
            "still.txt": b"A still.",
        },
        **{"README.txt": b"no clip"},
    }
    write_files(tmp_path, files)
    zipped(tmp_path / "more.zip", {"in/z.mp4": b"6", "in/z.txt": b"Zipped."})
    source = sources.read_sources(tmp_path)
    assert {clip.id: clip.caption for clip in source.clips} == {
        **{"still": "A still.", "1": "A cat,\nasleep.", "dogs/1.MOV": "A dög.", "z": "Zipped."},
    }
    assert [name for name, _ in source.report.skipped] == ["bare", "latin.txt"]
    assert [clip for clip, _ in source.annotations()] == source.clips


def test_what_has_a_text_and_is_not_read_is_listed(tmp_path):
    """Endings of other programs, a pipe (which must not be waited for), and a link to nothing."""
    endings = ("3gp", "MTS", "m2ts", "vob", "h264", "avif", "heic", "jxl")
    files = {f"{name}.{ending}": name.encode() for name, ending in zip("abcdefgh", endings, strict=True)}
    files |= {f"{name}.txt": b"A caption." for name in "abcdefghij"}
    write_files(tmp_path, files | {"README.txt": b"no clip", "README.md": b"nor this"})
    os.mkfifo(tmp_path / "i.mp4")
    (tmp_path / "j.mp4").symlink_to(tmp_path / "nowhere")
    source = sources.read_sources(tmp_path)
    assert sorted(ids(source)) == list("abcdef")
    assert dict(source.report.skipped) == {
        "i.mp4": "is a pipe, a socket or a device, and no file",
        "j.mp4": "is a link to nothing",
        "g.heic": "has an ending (.heic) that is not read",
        "h.jxl": "has an ending (.jxl) that is not read",
    }
    rows = [["video", "caption"], ["a", "A"], ["i.mp4", "A"], ["j", "A"]]
    reasons = dict(sources.read_sources(plain(tmp_path, rows, {})).report.skipped)
    assert reasons["i"].startswith("no file: i.mp4 is a pipe") and reasons["j"].startswith("missing")
    only = write_files(tmp_path / "only", {"a.heic": b"1", "a.txt": b"A."})
    with pytest.raises(UserError, match=r"no video that can be read: a.heic has an ending \(.heic\) that is"):
        sources.read_sources(only)


def test_videos_without_captions(tmp_path):
    write_files(tmp_path, {"a.mp4": b"1", "b.mp4": b"2"})
    with pytest.raises(
        UserError, match="2 videos, but no captions. Put a .txt beside each video, or add a ta"
    ):
        sources.read_sources(tmp_path)


def test_a_name_without_its_ending_must_mean_one_video(tmp_path):
    files = {
        "a.mp4": b"1",
        "a.avi": b"2",
        "b.webm": b"3",
        "b.jpg": b"its cover",
        "c.mp4": b"4",
        "c.mov": b"4",
    }
    files |= {"d/my.clip.v2.mp4": b"5", "e/a.mp4": b"6", "e/a.avi": b"7"}
    rows = [["video", "caption"], *([name, "x"] for name in ("a", "b", "c", "d/my.clip.v2", "e/a", "a.avi"))]
    source = sources.read_sources(plain(tmp_path, rows, files))
    assert [clip.video for clip in source.clips] == ["b.webm", "c.mp4", "d/my.clip.v2.mp4", "a.avi"]
    assert ids(source) == ["b", "c", "my.clip.v2", "a"]
    reason = "ambiguous: 2 different videos are called a; write its ending (.avi, .mp4)"
    assert source.report.skipped == [("a", reason), ("a", reason)]


def test_a_split_column_is_obeyed(tmp_path):
    splits = ["train", "Validation", "test", "", "holdout", "val"]
    rows = [["video", "caption", "split"], *([f"{k}.mp4", "x", split] for k, split in enumerate(splits))]
    source = sources.read_sources(plain(tmp_path, rows, {f"{k}.mp4": b"%d" % k for k in range(6)}))
    assert [clip.split for clip in source.clips] == ["train", "val", "test", "", "val"]
    assert source.report.skipped == [
        ("4", "unknown split: line 6 of clips.csv has 'holdout', expected train, val or test")
    ]
    found = sources.split_clips(source.clips, 0.9, 0)
    assert {split: [clip.id for clip in own] for split, own in found.items()} == {
        **{"train": ["0", "3"], "val": ["1", "5"], "test": ["2"]},
    }


def test_names_in_other_forms(tmp_path):
    """Accents decomposed as macOS does, another case of the ending, none, an old code page in a zip."""
    decomposed, composed = "e\u0301te\u0301", "\u00e9t\u00e9"
    write_files(tmp_path, {f"{decomposed}.mp4": b"1", "b.MP4": b"2", "c.mp4": b"3", "d/e.webm": b"4"})
    zipped(tmp_path / "0.zip", {"123.mp4": b"5", "45.mp4": b"6"})
    content = (tmp_path / "0.zip").read_bytes()
    names = {b"123.mp4": b"\x83\x7b1.mp4", b"45.mp4": "é.mp4".encode()}  # cp932; UTF-8 without its flag
    for plain_name, raw in names.items():
        content = content.replace(plain_name, raw)
    (tmp_path / "0.zip").write_bytes(content)
    rows = [["video", "caption"], *([name, "x"] for name in (f"{composed}.mp4", "b.mp4", "c", "d/e"))]
    rows += [["\u30dc1.mp4", "x"], ["é.mp4", "x"]]
    source = sources.read_sources(plain(tmp_path, rows, {}))
    assert not source.report.skipped
    assert [clip.video for clip in source.clips][:4] == [f"{decomposed}.mp4", "b.MP4", "c.mp4", "d/e.webm"]
    assert all(clip.video.startswith("0.zip:") for clip in source.clips[4:])


def test_links_in_a_circle(tmp_path):
    write_files(tmp_path, {"a/1.mp4": b"1", "a/1.txt": b"One."})
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    source = sources.read_sources(tmp_path)
    assert [clip.video for clip in source.clips] == ["a/1.mp4"] and source.report.records == 1


# ---- names and content ---------------------------------------------------------------------------


def test_the_path_of_a_record_tells_videos_of_one_name_apart(tmp_path):
    videos = {"0/a.mp4": b"1", "1/a.mp4": b"2", "b.mp4": b"3", "0/b.mp4": b"4"}
    zipped(tmp_path / "videos" / "2.zip", {f"{PREFIX}/2/a.mp4": b"5"})
    names = ["1/a.mp4", "split/2/a.mp4", "128_split/2/a.mp4", "b.mp4", "elsewhere/b.mp4"]
    source = sources.read_sources(wisa(tmp_path, [record(name) for name in names], videos))
    # "split/2" is no folder of any: only the base name counts, and it is that of three videos.
    member = f"videos/2.zip:{PREFIX}/2/a.mp4"
    assert [clip.video for clip in source.clips] == ["videos/1/a.mp4", member, "videos/b.mp4"]
    assert ids(source) == ["a", member, "b"]
    assert [reason.partition(":")[0] for _, reason in source.report.skipped] == ["ambiguous"] * 2


def test_a_record_cannot_point_outside_its_folder(tmp_path):
    rows = [["video", "caption"], ["../out.mp4", "A"], [str(tmp_path / "out.mp4"), "B"], ["in.mp4", "C"]]
    plain(tmp_path / "inside", rows, {"in.mp4": b"1"})
    write_files(tmp_path, {"out.mp4": b"2"})
    source = sources.read_sources(tmp_path / "inside")
    assert ids(source) == ["in"]
    assert [reason for _, reason in source.report.skipped] == ["missing: no video out.mp4"] * 2
    # A path from another machine finds the video by its base name; so does one with backslashes.
    rows = [["video", "caption"], ["C:\\clips\\in.mp4", "C"]]
    assert ids(sources.read_sources(plain(tmp_path / "inside", rows, {}))) == ["in"]


@pytest.mark.parametrize(("form", "other"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_composed_and_decomposed_names_are_the_same(tmp_path, form, other):
    name = "caf\u00e9/\u00fcber.mp4"
    rows = [["video", "caption"], [unicodedata.normalize(other, name), "A"]]
    root = plain(tmp_path, rows, {unicodedata.normalize(form, name): b"1", "x/\u00fcber.mp4": b"2"})
    assert sources.read_sources(root).clips[0].video == unicodedata.normalize(form, name)


def test_a_link_to_a_folder_above_is_not_followed(tmp_path):
    plain(tmp_path, [["video", "caption"], ["a.mp4", "A"]], {"sub/a.mp4": b"1"})
    (tmp_path / "sub" / "up").symlink_to(tmp_path, target_is_directory=True)
    found = video_files.VideoFolder(tmp_path, tmp_path)
    assert sum(map(len, found._by_base_name.values())) == 2  # the table and the video


@pytest.mark.parametrize("fps", [0, -8, math.nan, math.inf])
def test_a_rate_that_is_none_is_refused(fps):
    data = ConfigDict(dict(frames=9, height=32, width=32, fps=fps, buckets=()))
    with pytest.raises(UserError, match=f"config.data.fps is {fps}; give frames per second above 0"):
        list_buckets(data)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"height": 0}, "9, 0, 32"),
        ({"frames": -3}, "-3, 32, 32"),
        ({"buckets": ((9, 32),)}, "9, 32"),
        ({"buckets": (9, 32, 32)}, "9,"),
        ({"buckets": ((9, 32, 0),)}, "9, 32, 0"),
        ({"buckets": ((9, "32", 32),)}, "9, '32', 32"),
    ],
)
def test_a_size_that_is_none_is_refused(changes, shown):
    data = ConfigDict(dict(frames=9, height=32, width=32, fps=8, buckets=()) | changes)
    with pytest.raises(UserError, match=rf"^\({shown}\) is no size of clips: config.data.frames"):
        list_buckets(data)


def test_duplicates_in_folders_zips_and_sources(tmp_path):
    one = wisa(
        tmp_path / "one", [record(f"{name}.mp4") for name in "abcd"], {"a.mp4": b"same", "b.mp4": b"b"}
    )
    zipped(one / "videos" / "0.zip", {"c.mp4": b"same", "d.mp4": b"differs"}, zipfile.ZIP_DEFLATED)
    rows = [["video", "caption", "id"], ["e.mp4", "E", ""], ["f.mp4", "F", ""], ["b.mp4", "B", ""]]
    rows += [["g.mp4", "G", "d"], ["h.mp4", "H", ""]]
    other = {"e.mp4": b"same", "f.mp4": b"differs", "b.mp4": b"not b", "g.mp4": b"g", "h.mp4": b"g"}
    two = plain(tmp_path / "two", rows, other)
    source = sources.read_sources([one, two])
    assert [(clip.id, clip.source) for clip in source.clips] == [
        *(("a", 0), ("b", 0), ("d", 0), ("b.mp4", 1), ("g.mp4", 1)),
    ]
    assert source.report.records == 9
    assert source.report.skipped == [
        ("c", "duplicate: same content as a"),
        ("e", "duplicate: same content as a"),
        ("f", "duplicate: same content as d"),
        ("h", "duplicate: same content as g.mp4"),
    ]
    # The other order: the first one is used.
    assert ids(sources.read_sources([two, one])) == ["e", "f", "b", "d", "videos/b.mp4"]
    # Of a clip in both, the validation source has it.
    source = sources.read_sources(one, validation=[two])
    assert [clip.id for clip in source.clips if clip.split == "val"] == ["e", "f", "b", "d"]
    assert [(clip.id, clip.source) for clip in source.clips if not clip.split] == [("videos/b.mp4", 0)]
    assert ("a", "duplicate: same content as e") in source.report.skipped


def test_few_videos_are_read_to_find_duplicates(tmp_path, monkeypatch):
    contents = {"a": b"1", "b": b"22", "c": b"33", "d": b"22", "e": b"4444"}
    wisa(tmp_path, [record(f"{name}.mp4") for name in contents], {})
    zipped(tmp_path / "videos" / "0.zip", {f"{name}.mp4": content for name, content in contents.items()})
    hashed = []

    def sha256(file):
        hashed.append(file.name[-5])
        return hashlib.sha256(file.open().read()).digest()

    monkeypatch.setattr(video_files.VideoFile, "sha256", sha256)
    source = sources.read_sources(tmp_path)
    assert source.report.skipped == [("d", "duplicate: same content as b")]
    assert hashed == ["b", "d"]  # c has their size, but another CRC-32


def test_equal_crc_is_not_equal_content(tmp_path):
    # A known pair of texts of one length with one CRC-32.
    assert len({video_files.zlib.crc32(text) for text in (b"plumless", b"buckeroo")}) == 1
    wisa(tmp_path, [record("a.mp4"), record("b.mp4")], {"a.mp4": b"plumless", "b.mp4": b"buckeroo"})
    assert ids(sources.read_sources(tmp_path)) == ["a", "b"]


# ---- reading -------------------------------------------------------------------------------------


def test_whatever_a_damaged_video_raises_is_one_line(tmp_path, monkeypatch):
    whole = mp4(tmp_path / "whole.mp4")
    videos = {
        "cut.mp4": whole[: len(whole) // 2],
        "text.mp4": b"no video\n" * 50,
        "empty.mp4": b"",
        "ok.mp4": whole,
    }
    root = wisa(tmp_path / "wisa", [record(name) for name in videos], videos)
    source = sources.read_sources(root)
    clips = {clip.id: clip for clip in source.clips}
    for name in ("cut", "text", "empty"):
        with pytest.raises(UserError, match=f"{name}.mp4: .*cut short"):
            source.read(clips[name], [Bucket(5, 24, 32)], 8, math.inf)
    assert source.read(clips["ok"], [Bucket(5, 24, 32), Bucket(9, 24, 32)], 8, math.inf).bucket == (9, 24, 32)
    for content, problem in (
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "is a pointer of Git LFS.*`git lfs pull`",
        ),
        (b"\n<!DOCTYPE html><html>", "is a web page and not a video"),
    ):
        (root / "videos" / "text.mp4").write_bytes(content)
        with pytest.raises(UserError, match=f"text.mp4: {problem}"):
            source.read(clips["text"], [Bucket(5, 24, 32)], 8, math.inf)
    with pytest.raises(UserError, match="too small"):
        source.read(clips["ok"], [Bucket(5, 96, 128)], 8, max_upscale=1)

    def fail(*_):
        raise ZeroDivisionError("of a kind that nobody thought of")

    monkeypatch.setattr(video, "center_crop_resize", fail)
    with pytest.raises(UserError, match="ok.mp4 cannot be decoded .ZeroDivisionError"):
        source.read(clips["ok"], [Bucket(5, 24, 32)], 8, math.inf)
    with pytest.raises(UserError, match="no clip other"):
        source.read(sources.Clip("other", "", np.zeros(17), 0, "other.mp4"), [Bucket(5, 24, 32)], 8, math.inf)


# ---- subset and splits ---------------------------------------------------------------------------


def listing(count, split=""):
    return [sources.Clip(f"clip{i}", "x", np.zeros(17), 0, f"{i}.mp4", split) for i in range(count)]


SUBSET = ["clip5", "clip7", "clip8", "clip10"]


def test_subset_is_random_in_order_and_the_same_everywhere():
    clips = listing(1000)
    chosen = [clip.id for clip in sources.choose(clips, 200, seed=0)]
    numbers = [int(name[4:]) for name in chosen]
    assert len(set(chosen)) == 200 and numbers == sorted(numbers)
    # 200 of 0..999 have a mean of 499.5 with a standard deviation of 18.3: within five of them.
    assert abs(np.mean(numbers) - 499.5) < 92
    assert chosen != [clip.id for clip in sources.choose(clips, 200, seed=1)]
    captioned = [sources.Clip(clip.id, "y", np.ones(17), 1, "z") for clip in clips]
    assert chosen == [clip.id for clip in sources.choose(captioned, 200, seed=0)]
    # Pinned: prepared data may be extended by another version or machine.
    assert [clip.id for clip in sources.choose(listing(12), 4, seed=0)] == SUBSET
    assert sources.choose(clips, None, 0) == clips and sources.choose(clips, 5000, 0) == clips
    with pytest.raises(UserError, match="subset of 0"):
        sources.choose(clips, 0, 0)


@pytest.mark.parametrize(
    ("count", "share", "val"),
    [(1, 0.5, 0), (2, 0.01, 1), (2, 0.9, 1), (100, 0.1, 10), (100, 0.001, 1), (100, 0, 0), (11, 0.99, 10)],
)
def test_split_sizes(count, share, val):
    clips = listing(count)
    splits = sources.split_clips(clips, share, seed=0)
    assert list(splits) == ["train", "val"]
    assert (len(splits["train"]), len(splits["val"])) == (count - val, val)
    assert sorted(splits["train"] + splits["val"], key=clips.index) == clips
    assert all(part == sorted(part, key=clips.index) for part in splits.values())
    if count == 100 and val == 10:
        assert splits["val"] != sources.split_clips(clips, share, seed=1)["val"]
        assert splits["val"] != clips[-10:]


def test_fixed_splits_stay(tmp_path):
    clips = [*listing(1, "test"), *listing(1, "val"), *listing(1, "train")]
    splits = sources.split_clips(clips, 0.5, 0)
    assert splits == {"train": [clips[2]], "val": [clips[1]], "test": [clips[0]]}
    splits = sources.split_clips([*clips, *listing(50)], 0.5, 0)
    assert splits["val"] == [clips[1]]  # one's own validation clips: none is drawn
    with pytest.raises(UserError, match="share"):
        sources.split_clips(clips, 1, 0)


# ---- the sandbox ---------------------------------------------------------------------------------


def sandbox_config(**changes):
    counts = {"train": 3, "val": 2, "test": 1, "seed": 5}
    return ConfigDict({"height": 32, "width": 32, "frames": 5, "fps": 8, "sandbox": counts} | changes)


def test_sandbox_draws_clips_when_they_are_read():
    source = sources.draw_sandbox(sandbox_config())
    assert ids(source) == [*(f"train-00000{i}" for i in range(3)), "val-000000", "val-000001", "test-000000"]
    assert [clip.video for clip in source.clips][2:5] == ["train/2", "val/0", "val/1"]
    splits = sources.split_clips(source.clips, 0.5, 0)
    assert {split: len(clips) for split, clips in splits.items()} == {"train": 3, "val": 2, "test": 1}
    sample = source.read(source.clips[4], [Bucket(5, 32, 32)], 8, math.inf)
    drawn = make_clip(5, "val", 1, 32, 5, 8)
    assert sample.bucket == (5, 32, 32) and sample.caption == drawn.caption and drawn.id == "val-000001"
    for name in ("frames", "masks", "category"):
        np.testing.assert_array_equal(getattr(sample, name), getattr(drawn, name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 40}, "square clips, but config.data is 32x40"),
        ({"height": 36, "width": 36}, "multiple of 8"),
        ({"frames": 6}, "4n \\+ 1"),
    ],
)
def test_sandbox_of_a_wrong_shape(changes, message):
    with pytest.raises(UserError, match=message):
        sources.draw_sandbox(sandbox_config(**changes))


def test_config_without_a_sandbox():
    data = sandbox_config()
    del data.sandbox
    with pytest.raises(UserError, match="no config.data.sandbox .*--source"):
        sources.draw_sandbox(data)


# ---- raw records ----------------------------------------------------------------------------------


def test_each_clip_with_its_raw_record(tmp_path):
    rows = [["video", "caption", "extra"], ["c.mp4", "C", "kept"]]
    one = odd(tmp_path / "one")
    two = plain(tmp_path / "two", rows, {"c.mp4": b"cc"})
    source = sources.read_sources([one, two])
    found = list(source.annotations())
    assert [clip for clip, _ in found] == source.clips and len(found) == 6
    assert found[1][1] == ODD[4]
    assert found[5][1] == {"video": "c.mp4", "caption": "C", "extra": "kept"}


# ---- video files, and many ------------------------------------------------------------------------


def test_wisa_sample(wisa_sample):
    source = sources.read_sources(wisa_sample)
    assert ids(source)[:3] == ["sandbox_0", "sandbox_1", "sandbox_2"]
    assert len(source.clips) == source.report.records == 6 and not source.report.skipped
    assert source.report.unknown_labels == {'label: "Solid Objects Appearance"': 2}
    burning = "gas motion, combustion, refraction"
    np.testing.assert_array_equal(source.clips[3].category, taxonomy.multi_hot(burning.split(", ")))


def test_table_in_videophy2_form(tmp_path, wisa_sample):
    """Its columns are caption and videopath; the videos are in another folder than the table says."""
    captions = ["Syrup is poured onto pancakes, slowly.", *(f"Something falls, {k} times." for k in range(9))]
    rows = [("caption", "videopath"), *((text, f"examples/{text}.mp4") for text in captions)]
    videos = {f"videos/{text}.mp4": text.encode() for text in captions[:2]}
    table = plain(tmp_path, rows, videos, "sa_pc.csv") / "sa_pc.csv"
    source = sources.read_sources([table, wisa_sample])
    assert [clip.source for clip in source.clips] == [0, 0] + [1] * 6
    assert len(source.report.skipped) == 8  # of the ten videos listed, two are there
    assert all(reason.startswith("missing: no video ") for _, reason in source.report.skipped)
    assert source.clips[0].caption.startswith("Syrup is poured") and source.clips[0].video.startswith(
        "videos/"
    )


LIST_MANY = """
import sys, time
from prophy_jax.data.sources import source as sources
def memory(kind):  # not getrusage, whose peak counts the process that started this one
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return 1024 * int(lines[kind].split()[0])
before, start = memory("VmRSS"), time.perf_counter()
source = sources.read_sources(sys.argv[1])
chosen = sources.choose(source.clips, 20_000, 0)
splits = sources.split_clips(chosen, 0.01, 0)
seconds = time.perf_counter() - start
print(len(source.clips), len(splits["val"]), seconds, memory("VmRSS") - before, memory("VmHWM") - before)
print([name for name in ("jax", "torch", "tensorflow", "tensorflow_datasets") if name in sys.modules])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory by Linux's /proc")
def test_80_000_clips_are_listed_in_bounded_time_and_memory(tmp_path):
    count, zips = 80_000, 128
    for k in range(zips):
        members = {f"{PREFIX}/{k}/{i:016x}.mp4": i.to_bytes(4, "big") for i in range(k, count, zips)}
        zipped(tmp_path / "videos" / f"{k}.zip", members)
    wisa(tmp_path, [record(f"{i:016x}.mp4", captions="word " * 60) for i in range(count)], {})
    text = (tmp_path / "wisa-80k.json").stat().st_size
    result = subprocess.run(
        [sys.executable, "-c", LIST_MANY, str(tmp_path)], capture_output=True, text=True, check=True
    )
    figures, modules = result.stdout.splitlines()
    clips, val, seconds, kept, peak = map(float, figures.split())
    assert (clips, val) == (count, 200)
    assert seconds < 30  # 4 s on a quiet machine
    # A caption of 300 bytes, a category vector of 200 and the names and places: below 3 kB a clip, beside
    # the text of the file, which is held as bytes and as a string while it is decoded.
    assert kept < 3_000 * count
    assert peak < 3_000 * count + 2 * text
    assert modules == "[]"  # labels are made with PyTorch: listing loads no JAX
