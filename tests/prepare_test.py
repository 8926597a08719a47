"""The prepare command: both sources, what is skipped, what is refused, and what is left behind."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from prophy_jax.data import loader, records, taxonomy, video
from prophy_jax.errors import UserError
from prophy_jax.prepare import prepare
from tests.conftest import ROOT, SAMPLE


class _Codec:
    """Every fourth pixel and frame, as 16 channels: exact enough to recognise a clip by."""

    def encode(self, frames: np.ndarray) -> np.ndarray:
        strided = frames[::4, ::4, ::4].astype(np.float32) / 127.5 - 1
        return np.concatenate([strided] * 5 + [strided[..., :1]], axis=-1)


@pytest.fixture(autouse=True)
def _codec_module(monkeypatch):
    module = types.ModuleType("prophy_jax.models.every_fourth_pixel")
    module.build = _Codec
    monkeypatch.setitem(sys.modules, module.__name__, module)


def _config(folder: Path, **data) -> ConfigDict:
    sandbox = {"train": 6, "val": 2, "test": 2, "seed": 0}
    shape = {"height": 32, "width": 32, "frames": 5, "fps": 8}
    return ConfigDict(
        {
            "data": {"dir": str(folder), "sandbox": sandbox} | shape | data,
            "codec": {"module": "every_fourth_pixel"},
            "text_encoder": {"module": "hash_text", "dim": 16, "length": 8},
        }
    )


def _wisa(root: Path, count: int, frames: int = 8) -> Path:
    """A folder of `count` videos of one grey each, 48x64 pixels at 8 frames per second."""
    (root / "videos").mkdir(parents=True)
    annotation = {"q0": "collision", "q1": "none", "q2": "rainbow"}
    listed = []
    for index in range(count):
        name = f"clip{index}.mp4"
        grey = np.full((frames, 48, 64, 3), 20 * index, np.uint8)
        video.write_mp4(root / "videos" / name, grey, fps=8)
        record = {"video_name": name, "captions": f"Number {index}.", "label": "Melting"}
        listed.append(record | {"physical_annotation": annotation})
    (root / "wisa-80k.json").write_text(json.dumps(listed))
    return root


def _ids(data_dir: Path, split: str) -> list[str]:
    return [record["id"].decode() for record in records.open_source(data_dir, "records", split)]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture(scope="module")
def sandbox_dir(tmp_path_factory):
    module = types.ModuleType("prophy_jax.models.every_fourth_pixel")
    module.build = _Codec
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        out = tmp_path_factory.mktemp("sandbox") / "data"
        prepare(_config(out))
    return out


def test_sandbox_records_and_alignment(sandbox_dir):
    assert sorted(os.listdir(sandbox_dir)) == [
        "alignment",
        "empty_text.npz",
        "manifest.json",
        "records",
        "sandbox",
    ]
    for split, count in {"train": 6, "val": 2, "test": 2}.items():
        drawn = records.open_source(sandbox_dir, "sandbox", split)
        stored = records.open_source(sandbox_dir, "records", split)
        labels = records.open_source(sandbox_dir, "alignment", split)
        assert len(drawn) == len(stored) == len(labels) == count
        for clip, record, label in zip(drawn, stored, labels, strict=True):
            assert clip["id"] == record["id"] == label["id"]
            np.testing.assert_array_equal(record["latents"], _Codec().encode(clip["frames"]))
            np.testing.assert_array_equal(record["category"], clip["category"])
            np.testing.assert_array_equal(label["present"], clip["category"])
            # Frame-major tokens: (T, G, G, 17) -> (N, 17).
            np.testing.assert_array_equal(label["alignment"], clip["masks"].reshape(-1, 17))
            assert label["alignment"].any()


def test_sandbox_batch_and_empty_text(sandbox_dir):
    batch = next(loader.make_loader(sandbox_dir, "train", 2, seed=0))
    assert batch["latents"].shape == (2, 2, 8, 8, 16)
    assert batch["text"].shape == (2, 8, 16)
    assert batch["alignment"].shape == (2, 2 * 4 * 4, 17)
    text, mask = loader.load_empty_text(sandbox_dir)
    assert text.shape == (8, 16) and mask.sum() == 1 and text[0].any() and not text[1:].any()


def test_manifest_of_the_sandbox(sandbox_dir):
    manifest = records.read_manifest(sandbox_dir)
    assert manifest["source"] == {"sandbox": {"train": 6, "val": 2, "test": 2, "seed": 0}}
    assert manifest["video"] == {"height": 32, "width": 32, "frames": 5, "fps": 8}
    assert manifest["counts"] == {"train": 6, "val": 2, "test": 2}
    assert manifest["latent_shape"] == [2, 8, 8, 16] and manifest["num_tokens"] == 32
    assert (manifest["text_length"], manifest["text_dim"]) == (8, 16)
    assert manifest["codec"] == {"module": "every_fourth_pixel"}
    assert manifest["text_encoder"] == {"module": "hash_text", "dim": 16, "length": 8}
    assert len(manifest["empty_text_sha256"]) == 64
    assert manifest["versions"]["prophy_jax"] and manifest["versions"]["numpy"] == np.__version__
    latents = [record["latents"] for record in records.open_source(sandbox_dir, "records", "train")]
    stacked = np.stack(latents).reshape(-1, 16)
    # The manifest rounds to 4 decimals.
    np.testing.assert_allclose(manifest["latent_mean"], stacked.mean(0), atol=1e-4)
    np.testing.assert_allclose(manifest["latent_std"], stacked.std(0), atol=1e-4)


def test_wisa_folder(tmp_path, capsys):
    source = _wisa(tmp_path / "wisa", 11)
    config = _config(tmp_path / "unused")
    manifest = prepare(config, source, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out", "wisa"]
    assert sorted(os.listdir(tmp_path / "out")) == ["empty_text.npz", "manifest.json", "records"]
    assert _ids(tmp_path / "out", "val") == ["clip10"]  # the last tenth
    assert _ids(tmp_path / "out", "train") == [f"clip{index}" for index in range(10)]
    for index, record in enumerate(records.open_source(tmp_path / "out", "records", "train")):
        # H.264 stores limited-range 8-bit luma: a grey returns within 2 of 255 levels.
        grey = (record["latents"] + 1) * 127.5
        np.testing.assert_allclose(grey, 20 * index, atol=2)
        assert record["caption"].decode() == f"Number {index}."
        expected = taxonomy.multi_hot(["collision"])
        np.testing.assert_array_equal(record["category"], expected)
    assert manifest == records.read_manifest(tmp_path / "out")
    assert manifest["source"] == {"wisa": str(source)} and manifest["records_listed"] == 11
    assert manifest["labels_not_understood"] == {'q2: "rainbow"': {"clips": 11, "first": "clip0"}}
    assert manifest["label_not_among_answers"] == [f"clip{index}" for index in range(11)]
    printed = capsys.readouterr().out
    assert "train 10" in printed and 'q2: "rainbow" in 11, first clip0' in printed
    batch = next(loader.make_loader(tmp_path / "out", "train", 4, seed=0))
    assert not batch["alignment"].any() and not batch["alignment_present"].any()


def test_bad_videos_are_skipped_and_listed(tmp_path, capsys):
    source = _wisa(tmp_path / "wisa", 4)
    _cut(source / "videos" / "clip1.mp4")
    (source / "videos" / "clip2.mp4").unlink()
    short = np.zeros((3, 48, 64, 3), np.uint8)
    video.write_mp4(source / "videos" / "clip3.mp4", short, fps=8)
    manifest = prepare(_config(tmp_path), source, tmp_path / "out")
    # clip3 would have been the validation split: the last readable clip takes its place ...
    assert _ids(tmp_path / "out", "val") == ["clip0"]
    assert _ids(tmp_path / "out", "train") == ["clip0"]  # ... and is all there is
    reasons = dict(manifest["skipped"])
    assert sorted(reasons) == ["clip1", "clip2", "clip3"]
    assert "is missing" in reasons["clip2"] and "too short" in reasons["clip3"]
    assert "clip1.mp4" in reasons["clip1"]
    printed = capsys.readouterr().out
    assert "skipped: 3" in printed and all(reason in printed for reason in reasons.values())
    assert "only 1 usable: the validation split is the training split" in printed


def test_captions_that_do_not_fit_are_listed(tmp_path):
    source = _wisa(tmp_path / "wisa", 2)
    labels = json.loads((source / "wisa-80k.json").read_text())
    labels[0]["captions"] = "one two three four five six seven eight nine"
    (source / "wisa-80k.json").write_text(json.dumps(labels))
    manifest = prepare(_config(tmp_path), source, tmp_path / "out")
    assert manifest["captions_cut"] == {"clip0": 2}  # 8 rows: 7 words and the end token


def test_all_videos_unreadable(tmp_path):
    source = _wisa(tmp_path / "wisa", 2)
    for path in (source / "videos").iterdir():
        _cut(path)
    with pytest.raises(UserError, match="none of the 2 videos can be used; the first: .*clip0.mp4"):
        prepare(_config(tmp_path), source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["wisa"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"width": 40}, "square clips, but config.data is 32x40"),
        ({"frames": 6}, "6 frames must be 4n"),
        ({"height": 36, "width": 36}, "36 must be a multiple of 8"),
    ],
)
def test_clips_the_sandbox_cannot_draw(tmp_path, data, message):
    with pytest.raises(UserError, match=message):
        prepare(_config(tmp_path / "out", **data))
    assert os.listdir(tmp_path) == []


def test_no_sandbox_in_the_config(tmp_path):
    config = _config(tmp_path / "out")
    del config.data.sandbox
    with pytest.raises(UserError, match="no config.data.sandbox to draw; .* with --source"):
        prepare(config)


def test_existing_destination_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(UserError, match="already exists"):
        prepare(_config(tmp_path / "out"))
    assert os.listdir(tmp_path / "out") == ["mine"]


def _command(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "prophy_jax.prepare", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_command_refuses_in_one_line(tmp_path):
    (tmp_path / "wisa").mkdir()
    (tmp_path / "wisa" / "labels.json").write_text("not json")
    config = "--config=configs/wan.py:tiny"
    for arguments, message in {
        (f"--config={tmp_path}/none.py",): f"error: cannot read the configuration {tmp_path}/none.py: ",
        (config, "stray"): "error: unexpected argument 'stray': flags start with --\n",
        (config, f"--source={tmp_path}/wisa", f"--out={tmp_path}/out"): "is not a JSON file",
    }.items():
        result = _command(*arguments)
        assert result.returncode == 1 and message in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1 and result.stdout == ""
    assert os.listdir(tmp_path) == ["wisa"]


@pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"no WISA sample at {SAMPLE}")
def test_real_wisa_clips(tmp_path):
    config = _config(tmp_path / "out", height=48, width=80)
    manifest = prepare(config, SAMPLE)
    assert manifest["counts"] == {"train": 5, "val": 1} and manifest["skipped"] == []
    assert manifest["latent_shape"] == [2, 12, 20, 16] and manifest["num_tokens"] == 120
    # The same scenes at 16 and at 30 fps: resampled to 8 fps they must look nearly alike.
    labels = json.loads((SAMPLE / "wisa-80k.json").read_text())
    for record, listed in zip(
        records.open_source(tmp_path / "out", "records", "train"), labels, strict=False
    ):
        assert record["id"].decode() == Path(listed["video_name"]).stem
        assert record["caption"].decode() == listed["captions"].strip()
        assert record["latents"].std() > 0.1  # not a black clip
