"""Reading WISA-80K folders: every defect is reported or refused, none is dropped silently."""

import json
from pathlib import Path

import numpy as np
import pytest

from prophy_jax.data import taxonomy, wisa
from prophy_jax.errors import UserError
from tests.conftest import SAMPLE


def _record(name: str, **changes) -> dict:
    answers = {"q0": "collision", "q1": "no obvious thermodynamic phenomenon.", "q2": "reflection"}
    record = {
        "video_name": name,
        "captions": f"Caption of {name}.",
        "label": "Collision ",
        "physical_annotation": answers,
    }
    return record | changes


def _folder(root: Path, records: object, videos: dict[str, bytes]) -> Path:
    (root / "videos").mkdir(parents=True)
    (root / "wisa-80k.json").write_text(json.dumps(records))
    for name, content in videos.items():
        path = root / "videos" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return root


def test_reads_clips_in_order(tmp_path):
    videos = {"0/b.mp4": b"1", "1/a.mp4": b"2"}  # numbered subfolders, as in the public archive
    clips, report = wisa.read_wisa(_folder(tmp_path, [_record("b.mp4"), _record("a.mp4")], videos))
    assert [clip.id for clip in clips] == ["b", "a"]
    assert clips[0].path == tmp_path / "videos" / "0" / "b.mp4"
    assert clips[0].caption == "Caption of b.mp4."
    expected = taxonomy.multi_hot(["collision", "reflection"])
    np.testing.assert_array_equal(clips[0].category, expected)
    assert report == wisa.Report(records=2)


def test_everything_not_understood_is_reported(tmp_path):
    odd = {"q0": "collision, rainbow", "q1": None, "q2": 7}
    records = [
        _record("good.mp4"),
        _record("good.mp4", captions="again"),
        _record("missing.mp4"),
        _record("mute.mp4", captions="  "),
        _record("odd.mp4", physical_annotation=odd, label="Solid Objects Appearance"),
        _record("odd2.mp4", physical_annotation={"q0": "rainbow"}),
        _record("bare.mp4", physical_annotation=None, label=None),
        _record("../../etc/passwd"),
        _record("twins.mp4"),
        _record("clones.mp4"),
        {"captions": "nameless"},
    ]
    videos = {f"{name}.mp4": b"1" for name in ("good", "mute", "odd", "odd2", "bare")}
    videos |= {"0/twins.mp4": b"1", "1/twins.mp4": b"2", "0/clones.mp4": b"1", "1/clones.mp4": b"1"}
    clips, report = wisa.read_wisa(_folder(tmp_path, records, videos))
    assert [clip.id for clip in clips] == ["good", "odd", "odd2", "bare", "clones"]
    assert report.records == len(records)
    assert report.skipped == [
        ("good", "a second record of this video name; the first is used"),
        ("missing", "video missing.mp4 is missing"),
        ("mute", "no caption"),
        ("passwd", "video passwd is missing"),
        ("twins", "2 different videos are called twins.mp4"),
        ("record 10", "no video_name"),
    ]
    assert report.unknown_labels == {
        'q0: "rainbow"': 2,
        'q2: "7"': 1,
        'label: "Solid Objects Appearance"': 1,
    }
    assert report.examples['q0: "rainbow"'] == "odd"
    assert report.unannotated == ["bare"] and not clips[3].category.any()
    assert report.label_differs == ["odd2"]  # label says collision, no answer does
    np.testing.assert_array_equal(clips[1].category, taxonomy.multi_hot(["collision"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json {", "is not a JSON file"),
        ('{"a": 1}', "is not a JSON list of records"),
        ("[1, 2]", "is not a JSON list of records"),
        ("[]", "lists no records"),
        (b"\xff\xfe\x00", "is not a JSON file"),
    ],
)
def test_bad_label_file(tmp_path, content, message):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "labels.json").write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        wisa.read_wisa(tmp_path)
    assert "labels.json" in str(error.value)


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="no folder .*nowhere"):
        wisa.read_wisa(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is empty"):
        wisa.read_wisa(tmp_path)
    (tmp_path / "videos").mkdir()
    with pytest.raises(UserError, match="has no .json file"):
        wisa.read_wisa(tmp_path)
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(UserError, match=r"several .json files \(a.json, b.json\)"):
        wisa.read_wisa(tmp_path)


def test_no_video_at_all(tmp_path):
    folder = _folder(tmp_path, [_record("a.mp4"), _record("b.mp4")], {"0.zip": b"1"})
    with pytest.raises(UserError, match="none of the 2 records .*unzipped"):
        wisa.read_wisa(folder)


@pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"no WISA sample at {SAMPLE}")
def test_real_sample():
    clips, report = wisa.read_wisa(SAMPLE)
    assert [clip.id for clip in clips[:3]] == ["wisa_wan_1", "wisa_wan_2", "wisa_wan_3"]
    assert len(clips) == report.records == 6 and not report.skipped
    assert report.unknown_labels == {'label: "Solid Objects Appearance"': 2}
    freezing = "liquid motion, deformation, solidification, melting, reflection, refraction"
    expected = taxonomy.multi_hot(freezing.split(", "))
    np.testing.assert_array_equal(clips[2].category, expected)
