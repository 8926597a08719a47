"""The prepare command: sources, what is skipped, what is refused, any number of processes, kills."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from prophy_jax.data import loader, records, taxonomy
from prophy_jax.data.sandbox.clip import make_clip
from prophy_jax.data.sources import video
from prophy_jax.models.text import hash_text
from prophy_jax.prepare import Recorder, list_buckets, list_clips, prepare
from prophy_jax.run import encoders
from prophy_jax.run.errors import NotFinite, UserError
from tests.commands import run_here
from tests.conftest import ROOT, get_config

BUCKET = "5x32x32"


class _Codec:
    """Every fourth pixel and frame, as 16 channels: exact enough to recognise a clip by."""

    calls = 0  # of `encode`, in all
    fails_at = -1

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        return (frames - 1) // 4 + 1, height // 4, width // 4, 16

    def encode(self, frames: np.ndarray) -> np.ndarray:
        type(self).calls += 1
        if _Codec.calls == _Codec.fails_at:
            raise KeyboardInterrupt
        strided = frames[:, ::4, ::4, ::4].astype(np.float32) / 127.5 - 1
        return np.concatenate([strided] * 5 + [strided[..., :1]], axis=-1)


def _stored(frames: np.ndarray) -> np.ndarray:
    return _Codec().encode(frames[None])[0].astype(np.float16)


@pytest.fixture(autouse=True, scope="module")
def _codec_module():
    module = types.ModuleType("prophy_jax.models.every_fourth_pixel")
    module.build = _Codec
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        yield


def _config(folder: Path, **data) -> ConfigDict:
    config = get_config("tiny")
    config.data.update(dir=str(folder), height=32, width=32, frames=5, max_upscale=1.0, val_share=0.1)
    config.data.sandbox = {"train": 6, "val": 2, "test": 2, "seed": 0}
    config.data.update(data)
    config.codec = {"module": "every_fourth_pixel"}
    config.text_encoder = {"module": "hash_text", "dim": 16, "length": 8}
    return config


def _wisa(root: Path, count: int, frames: int = 8, sizes=((48, 64),), first: int = 0) -> Path:
    """A folder of `count` videos of one grey each, from number `first`, at 8 frames per second."""
    (root / "videos").mkdir(parents=True)
    annotation = {"q0": "collision", "q1": "none", "q2": "rainbow"}
    listed = []
    for index in range(first, first + count):
        name = f"clip{index}.mp4"
        grey = np.full((frames, *sizes[index % len(sizes)], 3), 20 * index % 256, np.uint8)
        video.write_mp4(root / "videos" / name, grey, fps=8)
        record = {"video_name": name, "captions": f"Number {index}.", "label": "Melting"}
        listed.append(record | {"physical_annotation": annotation})
    (root / "wisa-80k.json").write_text(json.dumps(listed))
    return root


def _read(data_dir: Path, split: str, bucket: str = BUCKET, name: str = "records") -> list[dict]:
    return list(records.open_dataset(data_dir, name, bucket, split))


def _ids(data_dir: Path, split: str, bucket: str = BUCKET) -> list[str]:
    return [record["id"].decode() for record in _read(data_dir, split, bucket)]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _bytes(folder: Path) -> dict[str, str]:
    """Hash of every file of a data folder but the manifest, which tells versions and paths."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json" and path.suffix != ".png"
    }


# --- Sources ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sandbox_dir(tmp_path_factory, _codec_module):
    out = tmp_path_factory.mktemp("sandbox") / "data"
    prepare(_config(out))
    return out


def test_sandbox_records_and_alignment(sandbox_dir):
    assert sorted(os.listdir(sandbox_dir)) == ["alignment", "empty_text.npz", "manifest.json", "records"]
    for split, count in {"train": 6, "val": 2, "test": 2}.items():
        stored, labels = (_read(sandbox_dir, split, name=name) for name in ("records", "alignment"))
        assert len(stored) == len(labels) == count
        for index, (record, label) in enumerate(zip(stored, labels, strict=True)):
            clip = make_clip(0, split, index, size=32, frames=5, fps=8)
            assert clip.id == record["id"].decode() == label["id"].decode()
            assert clip.caption == record["caption"].decode()
            np.testing.assert_array_equal(record["latents"], _stored(clip.frames))
            np.testing.assert_array_equal(record["category"], clip.category)
            np.testing.assert_array_equal(label["present"], clip.category)
            # Frame-major tokens: (T, G, G, 17) -> (N, 17), then the rows of the categories present.
            np.testing.assert_array_equal(label["maps"], clip.masks.reshape(-1, 17).T[clip.category > 0])
            assert label["maps"].any()
    assert "tensorflow" not in sys.modules


def test_encoded_padding_reaches_the_batch(tmp_path, monkeypatch):
    """All rows of text and the mask of its words, of captions with padding and of those without."""
    hashed = hash_text.build(dim=16, length=30)

    def encode(texts):
        text, mask = hashed(texts)
        return np.where(mask[..., None], text, 0.5 + 0.01 * np.arange(30)[:, None]), mask

    encode.words_lost = hashed.words_lost
    monkeypatch.setattr(encoders, "load_text_encoder", lambda config: encode)
    prepare(_config(tmp_path))
    stored = {record["id"].decode(): record for record in _read(tmp_path, "train")}
    assert all(record["text"].shape == (30, 16) for record in stored.values())
    batch = next(loader.make_loader(tmp_path, "train", 6, seed=0))
    text, mask = encode([stored[name]["caption"].decode() for name in batch["id"]])
    words = mask.sum(1)
    assert words.min() < 30 == words.max()  # the longest are cut
    np.testing.assert_array_equal(batch["text_mask"], mask)
    np.testing.assert_array_equal(batch["text"], text.astype(np.float16))
    [text], [mask] = encode([""])
    empty = loader.load_empty_text(tmp_path)
    assert empty.keys() == {"text", "text_mask"}
    np.testing.assert_array_equal(empty["text"], text)
    np.testing.assert_array_equal(empty["text_mask"], mask)
    assert mask.sum() == 1 and text[1:].all()


def test_zero_padding_is_not_stored(sandbox_dir):
    for record in _read(sandbox_dir, "train"):
        assert record["text"].any(axis=1).all() and "text_mask" not in record


def test_sandbox_batch_and_empty_text(sandbox_dir):
    batch = next(loader.make_loader(sandbox_dir, "train", 2, seed=0))
    assert batch["latents"].shape == (2, 2, 8, 8, 16)
    assert batch["text"].shape == (2, 8, 16)
    assert batch["alignment"].shape == (2, 2 * 4 * 4, 17)
    text, mask = (loader.load_empty_text(sandbox_dir)[name] for name in ("text", "text_mask"))
    assert text.shape == (8, 16) and mask.sum() == 1 and text[0].any() and not text[1:].any()


def test_manifest_of_the_sandbox(sandbox_dir):
    manifest = records.read_manifest(sandbox_dir)
    assert manifest["sandbox"] == {"train": 6, "val": 2, "test": 2, "seed": 0} and manifest["sources"] == []
    video = {"height": 32, "width": 32, "frames": 5, "fps": 8, "buckets": []}
    assert manifest["video"] == video and manifest["counts"] == {"train": 6, "val": 2, "test": 2}
    found = manifest["buckets"][BUCKET]
    assert found["latent_shape"] == [2, 8, 8, 16] and found["token_grid"] == [2, 4, 4]
    assert found["counts"] == manifest["counts"] and list(manifest["buckets"]) == [BUCKET]
    assert (manifest["text_length"], manifest["text_dim"]) == (8, 16)
    assert manifest["codec"] == {"module": "every_fourth_pixel"}
    assert len(manifest["empty_text_sha256"]) == len(manifest["fingerprint"]) == 64
    assert manifest["versions"]["prophy_jax"] and manifest["versions"]["numpy"] == np.__version__
    latents = [record["latents"] for split in manifest["counts"] for record in _read(sandbox_dir, split)]
    stacked = np.stack(latents).reshape(-1, 16).astype(np.float64)
    # The manifest rounds to 4 decimals, the records to 3 digits.
    np.testing.assert_allclose(manifest["latent_mean"], stacked.mean(0), atol=2e-4)
    np.testing.assert_allclose(manifest["latent_std"], stacked.std(0), atol=2e-4)


def test_wisa_folder(tmp_path, capsys):
    source = _wisa(tmp_path / "wisa", 11)
    manifest = prepare(_config(tmp_path / "unused"), [source], tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out", "wisa"]
    assert sorted(os.listdir(tmp_path / "out")) == [
        *("clips.jsonl", "empty_text.npz", "manifest.json", "records", "statistics.md", "statistics.png"),
    ]
    (held_out,) = _ids(tmp_path / "out", "val")  # a tenth
    rest = [f"clip{index}" for index in range(11) if f"clip{index}" != held_out]
    assert _ids(tmp_path / "out", "train") == rest
    for record in _read(tmp_path / "out", "train"):
        index = int(record["id"].decode().removeprefix("clip"))
        # H.264 stores limited-range 8-bit luma: a grey returns within 2 of 255 levels.
        grey = (record["latents"].astype(np.float32) + 1) * 127.5
        np.testing.assert_allclose(grey, 20 * index, atol=2)
        assert record["caption"].decode() == f"Number {index}."
        assert record["video"].decode() == f"videos/clip{index}.mp4" and record["source"] == 0
        np.testing.assert_array_equal(record["category"], taxonomy.multi_hot(["collision"]))
    assert manifest == records.read_manifest(tmp_path / "out")
    assert manifest["sources"] == [str(source.resolve())] and manifest["records_listed"] == 11
    assert manifest["labels_not_understood"] == {'q2: "rainbow"': {"clips": 11, "first": "clip0"}}
    assert manifest["label_not_among_answers"] == [f"clip{index}" for index in range(11)]
    printed = capsys.readouterr().out
    assert re.search(
        r"11 clips in \d+ s, .* s each: \d+% of the time went to reading videos, \d+% to enc", printed
    )
    assert "train 10" in printed and 'q2: "rainbow" in 11, first clip0' in printed
    assert "collision" in (tmp_path / "out" / "statistics.md").read_text()
    batch = next(loader.make_loader(tmp_path / "out", "train", 4, seed=0))
    assert not batch["alignment"].any() and not batch["alignment_present"].any()


def test_single_labels_subset_and_seed(tmp_path):
    source = _wisa(tmp_path / "wisa", 12)
    chosen = {}
    for seed in (0, 0, 1):
        out = tmp_path / f"out{len(chosen)}-{seed}"
        prepare(_config(out, categories="label", subset=5, seed=seed), [source])
        assert len(_ids(out, "train")) == 4 and len(_ids(out, "val")) == 1
        np.testing.assert_array_equal(_read(out, "train")[0]["category"], taxonomy.multi_hot(["melting"]))
        ids = _ids(out, "train") + _ids(out, "val")
        assert chosen.setdefault(seed, ids) == ids
    assert chosen[0] != chosen[1]


def test_buckets_of_aspect_and_length(tmp_path):
    source = _wisa(tmp_path / "wisa", 4, frames=9, sizes=((48, 64), (64, 48)))
    config = _config(tmp_path / "out", height=24, width=32, buckets=((9, 24, 32), (5, 32, 24)))
    manifest = prepare(config, [source])
    assert manifest["buckets"]["9x24x32"]["latent_shape"] == [3, 6, 8, 16]
    assert {bucket: sum(found["counts"].values()) for bucket, found in manifest["buckets"].items()} == {
        "9x24x32": 2,
        "5x32x24": 2,
    }
    wide, high = (_ids(tmp_path / "out", "train", bucket) for bucket in ("9x24x32", "5x32x24"))
    assert set(wide) <= {"clip0", "clip2"} and set(high) <= {"clip1", "clip3"}
    shapes = {
        next(iter(batch["latents"])).shape
        for batch in loader.make_loader(tmp_path / "out", "train", 1, 0, repeat=False)
    }
    assert shapes == {(3, 6, 8, 16), (2, 8, 6, 16)}


def test_training_takes_sources_by_their_weights(tmp_path):
    few, many = _wisa(tmp_path / "few", 2), _wisa(tmp_path / "many", 8, first=2)
    config = _config(tmp_path / "out", val_share=0.0)
    prepare(config, [few, many])
    config.data.weights = (1, 1)
    data = loader.make_loader(config.data.dir, "train", 4, 0, weights=config.data.weights)
    ids = np.concatenate([next(data)["id"] for _ in range(4)])
    assert Counter(ids.tolist()) == {clip: 4 if clip in ("clip0", "clip1") else 1 for clip in set(ids)}
    assert len(set(ids)) == 10


def test_bad_videos_are_skipped_and_listed(tmp_path, capsys):
    source = _wisa(tmp_path / "wisa", 8)
    _cut(source / "videos" / "clip1.mp4")
    (source / "videos" / "clip2.mp4").unlink()
    video.write_mp4(source / "videos" / "clip3.mp4", np.zeros((3, 48, 64, 3), np.uint8), fps=8)
    video.write_mp4(source / "videos" / "clip4.mp4", np.zeros((8, 16, 24, 3), np.uint8), fps=8)
    (source / "videos" / "clip5.mp4").write_bytes((source / "videos" / "clip0.mp4").read_bytes())
    (source / "videos" / "clip6.mp4").write_bytes(b"")
    labels = json.loads((source / "wisa-80k.json").read_text())
    labels[7]["captions"] = " "
    for index in (0, 1, 2):
        labels[index]["physical_annotation"] = None
    (source / "wisa-80k.json").write_text(json.dumps(labels))
    manifest = prepare(_config(tmp_path), [source], tmp_path / "out")
    # One clip is left: it is both splits, and that is said.
    assert _ids(tmp_path / "out", "val") == _ids(tmp_path / "out", "train") == ["clip0"]
    assert len(manifest["stand_in"]) == 1 and manifest["counts"] == {"train": 1, "val": 1}
    assert manifest["unannotated"] == ["clip0"]  # of those that are used
    reasons = dict(manifest["skipped"])
    assert sorted(reasons) == [f"clip{index}" for index in range(1, 8)]
    kinds = ("cut short", "missing: no video", "too short", "too small", "same content as clip0", "damaged")
    for index, reason in enumerate((*kinds, "no caption")):
        assert reason in reasons[f"clip{index + 1}"]
    printed = capsys.readouterr().out
    assert "skipped: 7" in printed and all(reason in printed for reason in reasons.values())
    assert "it holds the same clips as" in printed


def test_own_validation_clips(tmp_path):
    """All of them validate, whatever the subset, and none is drawn from the others."""
    source = _wisa(tmp_path / "wisa", 6)
    own = _wisa(tmp_path / "own", 5)
    (own / "videos" / "clip4.mp4").unlink()
    for index in range(3):  # other videos than those of the source
        grey = np.full((8, 48, 64, 3), 20 * index + 150, np.uint8)
        video.write_mp4(own / "videos" / f"clip{index}.mp4", grey, fps=8)
    config = _config(tmp_path / "out", subset=3, val_share=0.5)
    manifest = prepare(config, [source], validation=[own])
    assert manifest["counts"] == {"train": 3, "val": 4} and len(manifest["sources"]) == 2
    stored = {name: _read(tmp_path / "out", name) for name in ("train", "val")}
    assert {record["source"] for record in stored["train"]} == {0}
    assert {record["source"] for record in stored["val"]} == {1}
    assert "clip3" not in _ids(tmp_path / "out", "train")  # it is clip3 of the validation clips too
    with pytest.raises(UserError, match="--val names validation clips, but no --source"):
        prepare(config, validation=[own])


def test_no_validation_share(tmp_path, capsys):
    manifest = prepare(_config(tmp_path / "out", val_share=0.0), [_wisa(tmp_path / "wisa", 4)])
    assert _ids(tmp_path / "out", "train") == [f"clip{index}" for index in range(4)]
    assert manifest["stand_in"] == ["val"] and "it holds the same clips as" in capsys.readouterr().out


def test_captions_that_do_not_fit_are_listed(tmp_path):
    source = _wisa(tmp_path / "wisa", 2)
    labels = json.loads((source / "wisa-80k.json").read_text())
    labels[0]["captions"] = "one two three four five six seven eight nine"
    (source / "wisa-80k.json").write_text(json.dumps(labels))
    manifest = prepare(_config(tmp_path), [source], tmp_path / "out")
    assert manifest["captions_cut"] == {"clip0": 2}  # 8 rows: 7 words and the end token


def test_clips_without_a_category_are_listed_with_what_that_means(tmp_path, capsys):
    source = _wisa(tmp_path / "wisa", 2)
    labels = json.loads((source / "wisa-80k.json").read_text())
    del labels[1]["physical_annotation"]
    (source / "wisa-80k.json").write_text(json.dumps(labels))
    prepare(_config(tmp_path / "out", val_share=0.5), [source])
    printed = capsys.readouterr().out
    assert "out: 2 clips (train 1, val 1)\n" in printed and ": 2 clips of latents" in printed
    assert "clips without a category: 1\n  clip1\n  they train the diffusion loss alone; " in printed
    assert "label --propose" in printed


def test_dry_run_writes_nothing(tmp_path, capsys):
    source = _wisa(tmp_path / "wisa", 3)
    listed = json.loads((source / "wisa-80k.json").read_text())
    (source / "wisa-80k.json").write_text(json.dumps([*listed, {"video_name": "x.mp4"}]))
    assert prepare(_config(tmp_path / "out"), [source], dry_run=True) is None
    assert os.listdir(tmp_path) == ["wisa"]
    printed = capsys.readouterr().out
    assert "collision" in printed and printed.endswith(
        "3 clips (train 2, val 1) would be taken; nothing was written\n"
    )
    assert "skipped: 1\n  x: no caption: record 3\n" in printed


# --- What changed since ----------------------------------------------------------------------------


def test_what_a_source_says_and_nobody_reads_is_warned_of(tmp_path, capsys):
    (tmp_path / "a.mp4").write_bytes(b"1")
    (tmp_path / "clips.csv").write_text("video,caption,catgory\na.mp4,A ball falls.,collision\n")
    list_clips(_config(tmp_path).data, [tmp_path])
    warning = (
        f"warning: columns of {tmp_path}/clips.csv that are not read: catgory (did you mean category?)\n"
    )
    assert capsys.readouterr().err == warning


def test_only_what_changed_is_encoded_anew(tmp_path, capsys, monkeypatch):
    """A video replaced under its name, a caption changed, a clip added and one removed."""
    source = _wisa(tmp_path / "wisa", 8)
    config = _config(tmp_path / "out", shard=3)
    before = prepare(config, [source])
    stored = {record["id"]: record for split in ("train", "val") for record in _read(tmp_path / "out", split)}
    encoded = []
    encode = _Codec.encode
    monkeypatch.setattr(_Codec, "encode", lambda self, frames: encoded.extend(frames) or encode(self, frames))
    for path in (source / "videos").iterdir():
        path.touch()  # as after a copy: nothing changed
    assert prepare(config, [source]) == before and not encoded

    listed = json.loads((source / "wisa-80k.json").read_text())
    listed[2]["captions"] = "Another caption."
    del listed[5]
    added = {**listed[0], "video_name": "more.mp4"}
    for name, grey in (("clip1.mp4", 200), ("more.mp4", 210)):
        video.write_mp4(source / "videos" / name, np.full((8, 48, 64, 3), grey, np.uint8), fps=8)
    (source / "wisa-80k.json").write_text(json.dumps([added, *listed]))
    capsys.readouterr()
    after = prepare(config, [source])
    assert len(encoded) == 2
    printed = capsys.readouterr().out
    changes = {"clips added": "more", "clips removed": "clip5", "videos replaced": "clip1"}
    for title, name in (changes | {"captions changed": "clip2"}).items():
        assert f"{title}: 1\n  {name}\n" in printed
    assert after["fingerprint"] != before["fingerprint"] and not (tmp_path / "out" / "work").exists()
    found = {record["id"]: record for split in ("train", "val") for record in _read(tmp_path / "out", split)}
    assert found.keys() == stored.keys() - {b"clip5"} | {b"more"}
    for name, grey in ((b"clip1", 200), (b"more", 210)):
        levels = (found[name]["latents"].astype(np.float32) + 1) * 127.5
        np.testing.assert_allclose(levels, grey, atol=2)
    assert found[b"clip2"]["caption"] == b"Another caption."
    assert not np.array_equal(found[b"clip2"]["text"], stored[b"clip2"]["text"])
    for name in stored.keys() & found.keys() - {b"clip1"}:
        np.testing.assert_array_equal(found[name]["latents"], stored[name]["latents"])
    # It is what a new folder would hold, and nothing is left to do.
    assert prepare(config, [source]) == after and len(encoded) == 2
    prepare(_config(tmp_path / "anew", shard=3), [source])
    assert _bytes(tmp_path / "anew") == _bytes(tmp_path / "out")


def test_interrupted_update_keeps_the_folder_and_goes_on(tmp_path, monkeypatch):
    source = _wisa(tmp_path / "wisa", 8)
    config = _config(tmp_path / "out", shard=3)
    prepare(config, [source])
    before = _bytes(tmp_path / "out")
    for name in ("clip1.mp4", "clip6.mp4"):
        grey = 200 + int(name[4])
        video.write_mp4(source / "videos" / name, np.full((8, 48, 64, 3), grey, np.uint8), fps=8)
    monkeypatch.setattr(_Codec, "fails_at", _Codec.calls + 2)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, [source])
    whole = {
        name: digest for name, digest in _bytes(tmp_path / "out").items() if not name.startswith("work/")
    }
    assert whole == before
    prepare(config, [source])
    prepare(_config(tmp_path / "anew", shard=3), [source])
    assert _bytes(tmp_path / "anew") == _bytes(tmp_path / "out")


# --- Processes and interruptions -------------------------------------------------------------------


def _shared(tmp_path: Path, out: str) -> ConfigDict:
    buckets = ((5, 32, 24), (9, 32, 32))
    return _config(tmp_path / out, buckets=buckets, shard=3, val_share=0.3)


@pytest.fixture(scope="module")
def many(tmp_path_factory, _codec_module):
    """14 clips, one damaged, and the folder that one uninterrupted process makes of them."""
    root = tmp_path_factory.mktemp("many")
    source = _wisa(root / "wisa", 14, frames=9, sizes=((48, 64), (64, 48), (48, 48)))
    _cut(source / "videos" / "clip5.mp4")
    prepare(_shared(root, "whole"), [source])
    return root


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_make_what_one_makes(many, processes):
    config = _shared(many, f"by{processes}")
    for index in reversed(range(processes)):
        manifest = prepare(config, [many / "wisa"], process=(index, processes))
        assert (manifest is None) == (index > 0)
        if index:
            with pytest.raises(UserError, match="is not finished"):
                loader.make_loader(config.data.dir, "train", 1, seed=0)
    assert _bytes(many / f"by{processes}") == _bytes(many / "whole")
    one, several = (records.read_manifest(many / name) for name in ("whole", f"by{processes}"))
    assert one == several


def test_a_worker_that_does_not_see_the_videos_refuses(tmp_path):
    """It would skip them all, one by one."""
    config = _config(tmp_path / "out")
    source, _ = list_clips(config.data, [_wisa(tmp_path / "wisa", 2)])
    (tmp_path / "wisa").rename(tmp_path / "not mounted")
    said = "wisa/videos/clip0.mp4 cannot be seen on .*storage that all hosts share, under the same path"
    with pytest.raises(UserError, match=said):
        Recorder(config, source, list_buckets(config.data), taxonomy.WISA, tmp_path / "out", noted=True)


@pytest.mark.parametrize("call", [1, 4, 7])
def test_interrupted_work_goes_on(many, call, monkeypatch):
    config = _shared(many, f"interrupted{call}")
    monkeypatch.setattr(_Codec, "fails_at", _Codec.calls + call)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, [many / "wisa"])
    parts = [path for path in Path(config.data.dir, "work").iterdir() if ".records." in path.name]
    done = [path for path in Path(config.data.dir, "work").glob("*-*.json")]
    # No half shard.
    assert {path.name.split(".")[0] for path in parts} <= {path.stem for path in done}
    with pytest.raises(UserError, match="is not finished"):
        records.read_manifest(config.data.dir)
    calls = _Codec.calls
    prepare(config, [many / "wisa"])
    assert _bytes(Path(config.data.dir)) == _bytes(many / "whole")
    if call > 4:  # what was done is not done again
        assert _Codec.calls - calls < 13
    calls = _Codec.calls
    assert prepare(config, [many / "wisa"]) == records.read_manifest(many / "whole")  # done: nothing to do
    assert _Codec.calls == calls


def test_killed_command_goes_on(tmp_path):
    source = _wisa(tmp_path / "wisa", 40, frames=9)
    config = ("--config=configs/wan.py:tiny", "--config.data.shard=2", f"--source={source}")
    whole = _command(*config, f"--out={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "prophy_jax.prepare", *config, f"--out={out}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(out.glob("work/*-*.json")):
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    again = _command(*config, f"--out={out}")
    assert again.returncode == 0, again.stderr
    assert _bytes(out) == _bytes(tmp_path / "whole")


# --- Refusals --------------------------------------------------------------------------------------


def test_all_videos_unreadable(tmp_path):
    source = _wisa(tmp_path / "wisa", 2, sizes=((48, 64), (64, 48)))
    for path in (source / "videos").iterdir():
        _cut(path)
    with pytest.raises(UserError, match="none of the 2 videos can be used; the first: .*clip"):
        prepare(_config(tmp_path), [source], tmp_path / "out")


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


def test_foreign_folder_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(UserError, match="is not empty and holds no work/plan.json"):
        prepare(_config(tmp_path / "out"))
    assert os.listdir(tmp_path / "out") == ["mine"]


def test_folder_of_another_configuration_is_kept(sandbox_dir):
    before = _bytes(sandbox_dir)
    with pytest.raises(UserError, match="made differently .*data.fps was 8, is 4"):
        prepare(_config(sandbox_dir, fps=4))
    other = {"train": 7, "val": 2, "test": 2, "seed": 0}
    with pytest.raises(UserError, match=r"made differently \(different clips; data.fps was 8, is 4\)"):
        prepare(_config(sandbox_dir, sandbox=other, fps=4))
    with pytest.raises(UserError, match=r"made differently \(sandbox_seed was None, is 3\)"):
        prepare(_config(sandbox_dir, sandbox={"train": 6, "val": 2, "test": 2, "seed": 3}))
    assert _bytes(sandbox_dir) == before


class _TextEncoder(hash_text.HashText):
    """Makes NaN of captions that hold a 2."""

    def __call__(self, texts):
        text, mask = super().__call__(texts)
        if wrong := [row for row, own in enumerate(texts) if "2" in own]:
            raise NotFinite("the text encoder makes NaN", wrong)
        return text, mask


def test_clips_that_the_encoders_make_nan_of_are_skipped(tmp_path, monkeypatch, capsys):
    source, encode = _wisa(tmp_path / "wisa", 5), _Codec.encode

    def encode_badly(self, frames):
        latents = encode(self, frames)
        grey = frames[:, 0, 0, 0, 0].astype(int)  # (b,), 20 times the number of the clip, about
        latents[abs(grey - 20) < 5] = np.nan
        latents[abs(grey - 60) < 5] = 1e5  # more than float16 holds
        return latents

    monkeypatch.setattr(_Codec, "encode", encode_badly)
    monkeypatch.setattr(hash_text, "HashText", _TextEncoder)
    manifest = prepare(_config(tmp_path, val_share=0), [source], tmp_path / "out")
    reason = "the encoder gave values that are not finite"
    assert sorted(manifest["skipped"]) == [[f"clip{k}", reason] for k in (1, 2, 3)]
    assert f"clip1: {reason}" in capsys.readouterr().out
    found = {clip["id"].decode(): clip for clip in _read(tmp_path / "out", "train")}
    assert sorted(found) == ["clip0", "clip4"] and np.isfinite(manifest["latent_mean"]).all()
    text, _ = hash_text.HashText(16, 8)(["Number 4."])
    np.testing.assert_array_equal(found["clip4"]["text"], text[0, :3].astype(np.float16))


def test_encoder_that_gives_nan(tmp_path, monkeypatch):
    source = _wisa(tmp_path / "wisa", 2)
    monkeypatch.setattr(_Codec, "encode", lambda self, frames: np.full((len(frames), 2, 8, 8, 16), np.nan))
    with pytest.raises(
        UserError, match="none of the 2 .*encoder gave values that are not finite; --config.codec"
    ):
        prepare(_config(tmp_path), [source], tmp_path / "out")


def _command(*arguments: str) -> subprocess.CompletedProcess:
    return run_here("prophy_jax.prepare", *arguments)


def test_command_refuses_in_one_line(tmp_path):
    (tmp_path / "wisa").mkdir()
    (tmp_path / "wisa" / "labels.json").write_text("not json")
    config = "--config=configs/wan.py:tiny"
    for arguments, message in {
        (f"--config={tmp_path}/none.py",): f"error: cannot read the configuration {tmp_path}/none.py: ",
        (config, "stray"): "error: unexpected argument 'stray': flags start with --\n",
        (config, f"--source={tmp_path}/wisa", f"--out={tmp_path}/out"): "is not a JSON file",
        (config, f"--out={tmp_path}/out", "--process=4/4"): "--process=4/4: say which of how many",
        (config, "--out=/proc/out"): "cannot write /proc/out: ",
    }.items():
        result = _command(*arguments)
        assert result.returncode == 1 and message in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1 and result.stdout == ""
    assert os.listdir(tmp_path) == ["wisa"]


def test_wisa_clips_of_several_rates(tmp_path, wisa_sample):
    config = _config(tmp_path / "out", height=48, width=80)
    manifest = prepare(config, [wisa_sample])
    assert manifest["counts"] == {"train": 5, "val": 1} and manifest["skipped"] == []
    assert manifest["buckets"]["5x48x80"]["token_grid"] == [2, 6, 10]
    listed = {
        Path(record["video_name"]).stem: record["captions"].strip()
        for record in json.loads((wisa_sample / "wisa-80k.json").read_text())
    }
    for record in _read(tmp_path / "out", "train", "5x48x80"):
        assert record["caption"].decode() == listed[record["id"].decode()]
        assert record["latents"].std() > 0.1  # not a black clip


# --- What is cropped away ---------------------------------------------------------------------------


def test_clips_that_lose_most_of_their_picture_are_listed(tmp_path, capsys):
    """Landscape, portrait and square clips in a landscape bucket; then the portrait one has its own."""
    source = _wisa(tmp_path / "wisa", 3, sizes=((48, 64), (128, 72), (64, 64)))
    config = _config(tmp_path / "out", height=32, width=48, val_share=0.0)
    prepare(config, [source], dry_run=True)
    listed = (
        "warning: clips that keep less than 60% of their picture: 1\n"
        "  clip1: 38%, shown as 128 x 72 (H x W), cropped to 5x32x48\n"  # 72 of 128 rows at 3:2 are 48
        "  if the model takes other sizes, give them a bucket of their own: "
        "--config.data.buckets='((5, 48, 32),)'\n"
    )
    printed = capsys.readouterr().out
    assert "opened 3 clips\n" in printed and listed in printed
    spread = next(line for line in printed.splitlines() if "% of the picture kept" in line)
    assert spread.split(" | ")[1:4] == ["37.5", "40.42", "66.67"]  # of 37.5, 66.7 and 88.9

    manifest = prepare(config, [source])
    assert manifest["cropped"] == [["clip1", [128, 72], "5x32x48"]]
    assert listed in capsys.readouterr().out and spread in (tmp_path / "out" / "statistics.md").read_text()
    assert prepare(config, [source]) == manifest and listed in capsys.readouterr().out  # nothing left to do
    (source / "wisa-80k.json").write_text((source / "wisa-80k.json").read_text().replace("Number 0", "Zero"))
    assert prepare(config, [source])["cropped"] == manifest["cropped"]  # clips taken over

    config = _config(tmp_path / "two", height=32, width=48, val_share=0.0, buckets=((1, 32, 32),))
    for dry_run in (True, False):  # the remedy keeps the buckets that there are
        prepare(config, [source], dry_run=dry_run)
        assert "--config.data.buckets='((1, 32, 32), (5, 48, 32))'" in capsys.readouterr().out

    config = _config(tmp_path / "own", height=32, width=48, val_share=0.0, buckets=((5, 48, 32),))
    capsys.readouterr()
    assert prepare(config, [source])["cropped"] == [] and "less than 60%" not in capsys.readouterr().out


def test_a_dry_run_names_clips_that_cannot_be_used(tmp_path, capsys):
    source = _wisa(tmp_path / "wisa", 3, sizes=((48, 64), (16, 16), (48, 64)))
    _cut(source / "videos" / "clip2.mp4")
    prepare(_config(tmp_path / "out"), [source], dry_run=True)
    printed = capsys.readouterr().out
    assert "of these cannot be used: 2\n" in printed
    assert "clip1: too small: 16 x 16 pixels (H x W)\n" in printed and "clip2.mp4" in printed
