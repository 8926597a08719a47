"""Statistics of a source, against numbers counted by hand."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from prophy_jax.data import taxonomy
from prophy_jax.data.sources import source as sources
from prophy_jax.data.sources import statistics


def wisa(root):
    """Four clips and three records that give none."""

    def record(name, caption="one two three", q0="collision", q1="", q2="", **fields):
        answers = {"q0": q0, "q1": q1, "q2": q2}
        return {"video_name": name, "captions": caption, "physical_annotation": answers} | fields

    records = [
        record("a.mp4", fps=30, width=640, height=480, duration=2),
        record("b.mp4", q0="collision, liquid motion", q2="reflection", fps=29.97, duration=4.0),
        record("c.mp4", "one", "none", q1="melting", fps=30.0, width=640, height=480, duration="6"),
        record("d.mp4", "one two three four five", "none", "steam|fog\nx", fps=10**400, duration=-1),
        record("e.mp4", ""),
        record("gone.mp4"),
        record("lost.mp4"),
    ]
    (root / "videos").mkdir()
    for name in "abcde":
        (root / "videos" / f"{name}.mp4").write_text(name)
    (root / "wisa-80k.json").write_text(json.dumps(records))
    return sources.read_sources(root)


def test_numbers(tmp_path):
    stats = statistics.summarise(wisa(tmp_path))
    assert stats == json.loads(json.dumps(stats))
    assert (stats["records"], stats["used"]) == (7, 4)
    assert list(stats["skipped"].items()) == [("missing", 2), ("no caption", 1)]
    counted = {"collision": 2, "liquid motion": 1, "melting": 1, "reflection": 1}
    assert stats["phenomena"] == {name: counted.get(name, 0) for name in taxonomy.PHENOMENA}
    assert stats["groups"] == {"dynamics": 2, "thermodynamics": 1, "optics": 1}
    assert stats["phenomena_per_clip"] == {"0": 1, "1": 2, "2": 0, "3": 1}
    words = stats["caption_words"]  # 3, 3, 1, 5
    assert (words["min"], words["median"], words["mean"], words["max"]) == (1, 3, 3, 5)
    # The last bin, around 5, is one word wide as the others are.
    assert words["edges"] == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5] and words["counts"] == [1, 0, 2, 0, 1]
    seconds = stats["duration"]  # 2, 4, 6; a negative duration is none
    assert (seconds["min"], seconds["mean"], seconds["max"], sum(seconds["counts"])) == (2, 4, 6, 3)
    assert list(stats["fps"].items()) == [("30", 2), ("29.97", 1)]
    assert stats["resolution"] == {"640x480": 2}
    assert stats["labels_not_understood"] == {'q1: "steam|fog"': 1, 'q1: "x"': 1}


def test_table_is_markdown(tmp_path):
    lines = statistics.table(statistics.summarise(wisa(tmp_path))).splitlines()
    assert lines[0] == "4 of 7 records are used."
    for line in (
        "| missing | 2 |",
        "| collision | 2 | 50.0% |",
        "| 3 | 1 | 25.0% |",
        "| 640x480 | 2 | 50.0% |",
    ):
        assert line in lines
    # What no clip has is no row of 0.
    assert "thermodynamics" in "".join(lines) and not [
        line for line in lines if line.endswith("| 0 | 0.0% |")
    ]
    (rest,) = (line for line in lines if line.startswith("No clip shows "))
    assert "explosion" in rest and "collision" not in rest
    assert "| words in the caption | 1 | 1.3 | 3 | 3 | 4.7 | 5 |" in lines
    assert '| q1: "steam\\|fog" | 1 |' in lines  # the bar does not end the cell
    # Every table is set off, and every row of it has as many cells as its head.
    tables = "\n".join(lines).split("\n\n")[1:]
    for part in filter(str.strip, tables):
        cells = {row.replace("\\|", "").count("|") for row in part.strip().splitlines()}
        assert len(cells) == 1, part


def test_what_is_not_stated_is_left_out(tmp_path):
    with (tmp_path / "clips.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["video", "caption"], ["a.mp4", "A."]])
    (tmp_path / "a.mp4").write_text("a")
    stats = statistics.summarise(sources.read_sources(tmp_path))
    assert stats["duration"] == stats["fps"] == stats["resolution"] == stats["skipped"] == {}
    assert stats["phenomena_per_clip"] == {"0": 1}
    table = statistics.table(stats)
    assert table.startswith("1 of 1 record is used.\n\nNo clip has a category.\n\n| | min |")
    assert "seconds" not in table and "collision" not in table and "dynamics" not in table
    statistics.picture(stats, tmp_path / "picture.png")
    assert Image.open(tmp_path / "picture.png").size == (1100, 374)  # one row, no column of categories


@pytest.mark.parametrize("values", [[5.0], [5.062, 5.067], list(range(100)), [1, 1, 1, 1000]])
def test_histogram_holds_every_value(values):
    for whole in (False, True):
        spread = statistics._spread(values, whole)
        assert sum(spread["counts"]) == len(values)
        assert spread["edges"][0] <= min(values) and np.all(np.diff(spread["edges"]) > 0)
        assert len(spread["counts"]) <= 25


def test_picture(tmp_path):
    stats = statistics.summarise(wisa(tmp_path))
    for name in ("one.png", "two.png"):
        statistics.picture(stats, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    pixels = np.asarray(Image.open(tmp_path / "one.png").convert("RGB")).reshape(-1, 3)
    area = {}
    for group, colour in statistics.GROUP_COLOURS.items():
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        area[group] = int((pixels == rgb).all(1).sum())
    # Bars of 2 + 1, 1 and 1 clips, next to equal squares of the legend.
    assert area["thermodynamics"] == pytest.approx(area["optics"], rel=0.1) and area["optics"] > 1000
    assert area["dynamics"] == pytest.approx(3 * area["optics"], rel=0.1)
