"""The command that labels records: on a small prepared folder, on the sandbox, and on bad input."""

import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import fsspec
import numpy as np
import pytest
from ml_collections import ConfigDict

from prophy_jax import label, prepare
from prophy_jax.data import records, taxonomy
from prophy_jax.data.batch import Sizes
from prophy_jax.data.job import Job
from prophy_jax.data.sandbox.clip import make_clip
from prophy_jax.data.sources import source as sources
from prophy_jax.data.sources import video
from prophy_jax.labels import opening
from prophy_jax.labels import own as own_labels
from prophy_jax.labels.prepared import PreparedClips
from prophy_jax.models.codecs import linear_codec
from prophy_jax.run.errors import UserError
from tests.bucket import download
from tests.commands import run_here
from tests.conftest import ROOT
from tests.conftest import get_config as get_tiny
from tests.late import late
from tests.tiny_vlm import save_tiny_vlm
from tests.videos import read_clip, read_video

WHY = "labels need the extra label"
torch, transformers = late("torch", reason=WHY), late("transformers", reason=WHY)
check, labelling, propose, vlm = (
    late(f"prophy_jax.labels.{name}", "torch", WHY) for name in ("check", "labelling", "propose", "vlm")
)

BUCKETS = {"9x32x48": (3, 4, 6), "5x48x32": (2, 6, 4)}  # with their token grids
SIZES = {
    bucket: Sizes((times, 2 * height, 2 * width, 16), (times, height, width), 1, 4)
    for bucket, (times, height, width) in BUCKETS.items()
}
FPS = 8
# Of 7 clips the phenomena and the bucket; clip 3 shows nothing.
CLIPS = (
    (("melting",), 0),
    (("melting", "gas motion"), 0),
    (("collision",), 1),
    ((), 0),
    (("combustion", "reflection", "gas motion"), 1),
    (("explosion",), 0),
    (("refraction",), 1),
)
SPLITS = {"train": [[0, 1, 2], [3, 4], [5]], "val": [[6]]}  # split -> clips of each shard of the records


def get_config():
    config = ConfigDict()
    config.label = dict(
        layers=(0.5, 1.0), heads="mean", rows="generated", tokens="content", denoise="difference",
        scale="max", max_new_tokens=5, every=1, cell=2, batch=2, dtype="float32",
    )  # fmt: skip
    config.label_check = dict(clips=8, size=64, frames=5, fps=8, seed=0)
    return config


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-vl"
    save_tiny_vlm(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(source, data): a folder of videos, and what prepare would make of it, with latents of zeros."""
    folder = tmp_path_factory.mktemp("prepared")
    source, data = folder / "source", folder / "data"
    source.mkdir()
    lines = ["video,caption,category"]
    for index, (names, bucket) in enumerate(CLIPS):
        frames, height, width = video.Bucket.parse(list(BUCKETS)[bucket])
        noise = np.random.default_rng(index).integers(
            0, 256, (frames, height // 8, width // 8, 3), dtype=np.uint8
        )
        video.write_mp4(source / f"clip{index}.mp4", noise.repeat(8, 1).repeat(8, 2), FPS)
        lines.append(f'clip{index}.mp4,caption {index},"{", ".join(names)}"')
    (source / "clips.csv").write_text("\n".join(lines))
    make_records(sources.read_sources([source]), source, data)
    return source, data


def make_records(listing, source, data, known=False, shown=True):
    """`known`: the data tell what they were made of."""

    def row(clip):
        own = {
            "id": clip.id,
            "source": 0,
            "video": clip.video,
            "category": np.flatnonzero(clip.category).tolist(),
        }
        return own | listing.content(clip)

    rows = {
        (split, index): [row(listing.clips[member]) for member in members]
        for split, shards in SPLITS.items()
        for index, members in enumerate(shards)
    }
    counts = {split: len(own) for split, own in SPLITS.items()}
    job = Job(data, {"made": "by a test"}, counts, rows=rows if known else None)
    features = {}
    for split, shards in SPLITS.items():
        for index, members in enumerate(shards):
            with job.shard(split, index) as shard:
                for clip in (listing.clips[member] for member in members):
                    bucket = list(BUCKETS)[CLIPS[int(clip.id[4:])][1]]
                    sizes, shape = SIZES[bucket], SIZES[bucket].latent_shape
                    features[f"records/{bucket}"] = records.features("records", sizes, without=["text_mask"])
                    example = {
                        "id": clip.id, "caption": clip.caption, "source": clip.source, "video": clip.video,
                        "latents": np.zeros(shape, np.float16), "text": np.zeros((1, 4), np.float16),
                        "category": clip.category * shown,
                    }  # fmt: skip
                    shard.write(f"records/{bucket}", features[f"records/{bucket}"], example)
                if known:
                    shard.note(rows=rows[split, index])
    manifest = {
        "sources": [str(source)],
        "sandbox": None,
        "video": {"fps": FPS},
        "max_upscale": 1.0,
        "codec": {},
        "text_length": 1,
        "text_dim": 4,
        "buckets": {
            bucket: {"token_grid": list(grid), "latent_shape": list(SIZES[bucket].latent_shape)}
            for bucket, grid in BUCKETS.items()
        },
    }
    job.finish(lambda reports: (features, manifest))


@pytest.fixture(scope="module")
def labels(prepared, model_folder, tmp_path_factory):
    """The labels of `prepared`, made in one go: folder and manifest."""
    out = tmp_path_factory.mktemp("labels") / "labels"
    return out, label.label(get_config(), model_folder, prepared[1], out)


def read_labels(out, data):
    """id -> (present, maps), having checked that ids are those of the records in their order."""
    found = {}
    for bucket in BUCKETS:
        for split in ("train", "val"):
            try:
                own = records.open_dataset(data, "records", bucket, split)
            except UserError:
                continue
            theirs = records.open_dataset(out, "alignment", bucket, split)
            assert [a["id"] for a in own] == [b["id"] for b in theirs]
            found |= {row["id"].decode(): (row["present"], row["maps"]) for row in theirs}
    return found


def digests(out):
    files = [path for path in sorted((out / "alignment").rglob("*")) if path.is_file()]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- Labels of prepared records --------------------------------------------------------------------


def test_labels_are_in_the_order_of_the_records(prepared, labels):
    source, data = prepared
    out, manifest = labels
    found = read_labels(out, data)
    assert len(found) == len(CLIPS)
    for index, (names, bucket) in enumerate(CLIPS):
        present, maps = found[f"clip{index}"]
        np.testing.assert_array_equal(present, taxonomy.multi_hot(list(names)))
        assert maps.dtype == np.float16
        assert maps.shape == (len(names), np.prod(list(BUCKETS.values())[bucket]))
        for row in maps:  # scaled by max |Q|, with both signs
            assert np.abs(row).max() == 1 and row.min() < 0 < row.max()
    assert manifest["clips"] == 7 and manifest["questions"] == 9 + 6 and manifest["unreadable"] == []


def test_maps_are_of_the_phenomena_in_the_order_of_the_taxonomy(prepared, labels, model_folder):
    """Clip 4 again, one question at a time, on the frames of its file: reflection comes after combustion."""
    source, data = prepared
    model = vlm.load(model_folder, "cpu", "float32")
    settings = get_config().label
    frames = read_clip(source / "clip4.mp4", 5, FPS, 48, 32)
    view = labelling.View((2, 6, 4), [0, 0, 2, 3], (3, 2), 0.5)
    _, maps = read_labels(labels[0], data)["clip4"]
    names = sorted(CLIPS[4][0], key=taxonomy.PHENOMENA.index)
    assert names == ["gas motion", "combustion", "reflection"]
    for name, found in zip(names, maps, strict=True):
        [answers] = labelling.ask(
            model, [frames], [taxonomy.multi_hot([name])], view, labelling.make_reading(settings, (2, 3))
        )
        [expected] = labelling.make_targets(answers, view, settings)
        # Float16 of values up to 1, and float32 sums in another order, for the padding.
        np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), atol=2e-3)


def test_manifest_says_how_the_labels_were_made(prepared, labels, model_folder):
    out, manifest = labels
    assert manifest == records.read_manifest(out)
    assert manifest["data_fingerprint"] == records.read_manifest(prepared[1])["fingerprint"]
    assert manifest["layers"] == [2, 3] and manifest["label"]["denoise"] == "difference"
    assert manifest["vlm"] == vlm.describe(model_folder) and manifest["vlm"]["name"] == "tiny-vl"
    assert manifest["buckets"]["9x32x48"]["vlm_grid"] == [3, 2, 3]
    assert manifest["buckets"]["9x32x48"]["frames"] == [0, 0, 2, 3, 6, 7]
    assert manifest["seconds_per_clip"] > 0 and manifest["peak_bytes"] > 1e8
    assert {"torch", "transformers"} <= manifest["versions"].keys()


def test_two_processes_and_interruptions_give_the_same_bytes(
    prepared, labels, model_folder, tmp_path, monkeypatch
):
    out, whole, ask = tmp_path / "labels", labels[0], labelling.ask
    run = lambda process: label.label(get_config(), model_folder, prepared[1], out, process)  # noqa: E731
    calls = []

    def stop_at_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ask(*args)

    monkeypatch.setattr(labelling, "ask", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        run((0, 2))
    monkeypatch.setattr(labelling, "ask", ask)
    with pytest.raises(UserError, match="not finished"):
        records.read_manifest(out)
    assert run((1, 2)) is None
    made = len(list((out / "work").glob("*.json")))
    assert run((0, 2))["clips"] == 7
    assert made > 2  # the plan, and more than one shard that was not made twice
    assert digests(out) == digests(whole)
    monkeypatch.setattr(labelling, "ask", None)  # nothing is left to ask
    assert run((0, 1)) == records.read_manifest(out)


@pytest.mark.jobs
def test_labels_in_a_bucket_are_those_on_a_disk(prepared, labels, model_folder, bucket, tmp_path):
    """Of videos and records there, by two processes."""
    source, data = prepared
    fsspec.filesystem("gs").put(f"{source}/", f"{bucket}/source/", recursive=True)
    fsspec.filesystem("gs").put(f"{data}/", f"{bucket}/data/", recursive=True)
    made = [
        label.label(
            get_config(),
            model_folder,
            f"{bucket}/data",
            f"{bucket}/labels",
            (process, 2),
            [f"{bucket}/source"],
        )
        for process in (1, 0)
    ]
    assert made[0] is None and made[1]["data_fingerprint"] == labels[1]["data_fingerprint"]
    download(f"{bucket}/labels", tmp_path / "got")
    assert digests(tmp_path / "got") == digests(labels[0])


def test_a_clip_that_cannot_be_read_any_more_has_no_labels(prepared, labels, model_folder, tmp_path, capsys):
    source, data = prepared
    moved = tmp_path / "source"
    shutil.copytree(source, moved)
    (moved / "clip1.mp4").write_bytes((moved / "clip1.mp4").read_bytes()[:300])
    out = tmp_path / "labels"
    manifest = label.label(get_config(), model_folder, data, out, sources=[str(moved)])
    [[name, problem]] = manifest["unreadable"]
    assert name == "clip1" and f"{moved / 'clip1.mp4'}: " in problem
    assert "without labels, their videos cannot be read: 1\n  clip1:" in capsys.readouterr().out
    found, whole = read_labels(out, data), read_labels(labels[0], data)
    assert not found["clip1"][0].any() and found["clip1"][1].shape == (0, 72)
    for name in ("clip0", "clip2", "clip4"):
        np.testing.assert_array_equal(found[name][0], whole[name][0])
        np.testing.assert_allclose(found[name][1], whole[name][1], atol=2e-3)  # in other batches


def test_only_clips_that_changed_are_labelled_anew(prepared, model_folder, tmp_path, monkeypatch, capsys):
    source, data, out = (tmp_path / name for name in ("source", "data", "labels"))
    shutil.copytree(prepared[0], source)
    make_records(sources.read_sources([source]), source, data, known=True)
    run = lambda *args: label.label(get_config(), model_folder, data, out, *args)  # noqa: E731
    first = run()
    before = read_labels(out, data)
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)
    assert run((0, 1), [str(moved)]) == first  # a copy is the same

    noise = np.random.default_rng(99).integers(0, 256, (9, 4, 6, 3), dtype=np.uint8)
    video.write_mp4(source / "clip1.mp4", noise.repeat(8, 1).repeat(8, 2), FPS)
    with pytest.raises(UserError, match="1 video changed since .*data was prepared .clip1.: run .*prepare"):
        run()
    shutil.rmtree(data)
    make_records(sources.read_sources([source]), source, data, known=True)
    asked, ask = [], labelling.ask
    monkeypatch.setattr(labelling, "ask", lambda *args: asked.extend(args[1]) or ask(*args))
    capsys.readouterr()
    second = run()
    assert len(asked) == 1 and "clips labelled anew: 1\n  clip1\n" in capsys.readouterr().out
    assert (
        first["data_fingerprint"] != second["data_fingerprint"] == records.read_manifest(data)["fingerprint"]
    )
    after = read_labels(out, data)
    for name in before:
        assert np.array_equal(before[name][1], after[name][1]) == (name != "clip1")
    assert run() == second and len(asked) == 1


def test_the_command_runs_without_jax(prepared, model_folder, tmp_path):
    """All of it, with an override and without --config; JAX would take the memory of the GPU."""
    command = (
        "import runpy, sys; runpy.run_module('prophy_jax.label', run_name='__main__', alter_sys=True);"
        "assert not {'jax', 'flax'} & sys.modules.keys()"
    )
    flags = [f"--vlm={model_folder}", f"--data={prepared[1]}", f"--out={tmp_path / 'labels'}"]
    settings = ["--config.label.max_new_tokens=2", "--config.label.dtype=float32"]
    result = subprocess.run(
        [sys.executable, "-c", command, *flags, *settings],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    manifest = records.read_manifest(tmp_path / "labels")
    assert manifest["clips"] == 7 and manifest["label"]["max_new_tokens"] == 2


def test_preview(prepared, model_folder, tmp_path):
    label.preview(get_config(), model_folder, prepared[1], tmp_path / "p", 3)
    found = sorted(path.name for path in (tmp_path / "p").iterdir())
    # Of the seven in the order bucket, split, record: 0 1 3 5, then 2 4, then 6; of each third, the first.
    assert len(found) == 6 and found[:2] == ["train-clip0.mp4", "train-clip0.txt"]
    frames, fps = read_video(tmp_path / "p" / "train-clip0.mp4")
    assert frames.shape == (9, 6 * 32, 2 * 6 * 48, 3) and fps == FPS
    text = (tmp_path / "p" / "train-clip0.txt").read_text()
    assert taxonomy.WISA.questions["melting"] in text and taxonomy.WISA.background in text


def test_an_id_is_never_a_file_name():
    ids = [
        "clip0",
        "../../etc/x",
        "..",
        "a/b",
        "a_b",
        "dogs/0001.mp4",
        "x" * 300,
        "\u00e9t\u00e9",
        "a\0b",
        "/a",
        "",
    ]
    names = [label.file_name(clip_id) for clip_id in ids]
    assert names[0] == "clip0" and names[4] == "a_b" and len(set(names)) == len(ids)
    assert all(0 < len(name) <= 100 and not set(name) & set("/\\\0") for name in names)


def test_preview_stays_in_its_folder(prepared, model_folder, tmp_path, monkeypatch):
    read = PreparedClips.read
    renamed = lambda self, *place: read(self, *place)._replace(id="../../outside/x")  # noqa: E731
    monkeypatch.setattr(PreparedClips, "read", renamed)
    label.preview(get_config(), model_folder, prepared[1], tmp_path / "deep" / "p", 1)
    assert sorted(path.name for path in tmp_path.rglob("*"))[0:2] == ["deep", "p"]
    assert len(list((tmp_path / "deep" / "p").iterdir())) == 2


def test_drawing_shows_a_map_where_it_is():
    frames = np.full((5, 32, 32, 3), 100, np.uint8)
    maps = np.full((1, 2, 4, 4), -1, np.float16)
    maps[0, 1, 2, 3] = 0.5  # frames 1 to 4, rows 16 to 23, the last 8 columns
    drawn = label.draw(frames, ["melting"], maps.reshape(1, -1), (2, 4, 4))
    assert drawn.shape == (5, 256, 512, 3)  # enlarged, so that a name fits
    assert (drawn[:, :, :256] == 100).all()
    panel = drawn[:, 24:, 256:]  # below the name
    hot = np.abs(panel.astype(int) - 100).max(-1) > 20
    expected = np.zeros((5, 232, 256), bool)
    expected[1:, 104:168, 192:] = True
    np.testing.assert_array_equal(hot, expected)
    assert label.draw(np.zeros((5, 480, 832, 3), np.uint8), [], maps[:0], (2, 4, 4)).shape[1:3] == (240, 416)
    assert label.draw(np.zeros((5, 832, 480, 3), np.uint8), [], maps[:0], (2, 4, 4)).shape[1:3] == (832, 480)


# --- The sandbox -----------------------------------------------------------------------------------


class Oracle:
    """Has the interface of `vlm.Vlm`, and sees the masks."""

    num_layers = 8

    def __init__(self, sandbox):
        clips = (
            make_clip(sandbox.seed, "test", i, sandbox.size, sandbox.frames, sandbox.fps) for i in range(99)
        )
        self._clips = clips

    def answer(self, clips, questions, seconds, reading):
        [frames], [own] = clips, questions
        clip = next(self._clips)
        assert frames.shape == (2 * clip.masks.shape[0], *(28 * side for side in clip.masks.shape[1:3]), 3)
        asked = taxonomy.WISA.questions
        assert own[-1] == taxonomy.WISA.background and len(own) == 1 + clip.category.sum()
        names = [next(name for name in asked if asked[name] == text) for text in own[:-1]]
        maps = [clip.masks[..., taxonomy.WISA.index[name]].astype(np.float32) for name in names]
        maps.append(np.full(clip.masks.shape[:3], 0.3, np.float32))
        return [[vlm.Answer("", np.stack([part] * self.num_layers)) for part in maps]]


def test_an_oracle_scores_one():
    config = get_config()
    results = check.measure(Oracle(config.label_check), config.label, config.label_check, lambda: None)
    for row in results["bands"].values():
        for denoise in ("difference", "ratio", "log_ratio", "none"):
            assert row[denoise] == {kind: {"mean": 1.0, "error": 0.0} for kind in check.MEASURES}
    assert results["bands"]["configured"]["layers"] == [4, 5, 6, 7]
    assert results["configured"] == {"denoise": "difference", "auc": 1.0, "specificity": 1.0}
    assert sum(row["cases"] for row in results["phenomena"].values()) >= 8
    assert "Best AUC: 1.000" in check.table(results)


def test_random_weights_score_about_a_half(tmp_path):
    """One model may respond to a shape by chance; several do so in both directions.

    Measured over 40 models: means of 0.48 and 0.51, and a deviation of 0.06 between models.
    """
    config, found = get_config(), []
    for seed in range(6):
        save_tiny_vlm(tmp_path / str(seed), seed)
        model = vlm.load(tmp_path / str(seed), "cpu", "float32")
        results = check.measure(model, config.label, config.label_check, lambda: None)
        found.append([results["configured"][kind] for kind in check.MEASURES])
    auc, specificity = np.mean(found, 0)
    assert 0.4 < auc < 0.6
    assert 0.45 < specificity < 0.55


def test_score_by_hand():
    """Tokens 0 and 1 are covered, 2 a little, 3 by the other phenomenon only, 4 to 7 by nothing."""
    masks = np.zeros((2, 2, 2, 17), np.float16)
    tokens = masks.reshape(8, 17)
    tokens[:3, 6], tokens[3, 4] = (1, 0.25, 0.1), 1
    category = taxonomy.multi_hot(["melting", "gas motion"])
    melting = np.array([9, 5, 99, 7, 1, 2, 3, 4], np.float32)
    gas = np.array([0, 0, 0, 1, 0, 0, 0, 2], np.float32)
    answers = [vlm.Answer("", maps.reshape(1, 2, 2, 2)) for maps in (gas, melting, np.ones(8, np.float32))]
    found = {
        (name, kind): value for name, kind, value in check.score(answers, masks, category, [0], "difference")
    }
    # Melting: 9 is above 7 1 2 3 4, 5 above all of them but 7; against the gas, one of two.
    assert found["melting", "auc"] == 9 / 10 and found["melting", "specificity"] == 1 / 2
    # Gas: 1 is above the six zeros and below 2; above both tokens of melting.
    assert found["gas motion", "auc"] == 6 / 7 and found["gas motion", "specificity"] == 1


def test_check_writes_its_results(model_folder, tmp_path, capsys):
    config = get_config()
    config.label_check.clips = 2
    results = label.check(config, model_folder, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "check.json").read_text())
    assert written["bands"] == results["bands"] and written["vlm"]["name"] == "tiny-vl"
    assert check.table(results) in capsys.readouterr().out


# --- How a clip is shown ---------------------------------------------------------------------------


def test_frames_that_are_shown():
    """Of latent k, frames 4k-3 to 4k, the two in the middle."""

    def shown(times, latents, frames, every=1, lead=0):
        return labelling.View.of((times, 1, 1), latents, frames, 8, every, 1, lead).frames

    assert shown(4, 4, 13) == [0, 0, 2, 3, 6, 7, 10, 11]
    assert shown(6, 6, 21, every=2) == [0, 0, 6, 7, 14, 15]
    # CogVideoX1.5: the first of two latents in a token is one more of frame 0; then 8 frames a token.
    assert shown(2, 4, 9, lead=1) == [0, 0, 4, 5]
    assert shown(11, 22, 81, lead=1)[-2:] == [76, 77]
    # Two latents in a token of any other codec: frames 0 to 4, then 5 to 12.
    assert shown(2, 4, 13) == [1, 2, 8, 9]
    assert shown(1, 1, 1) == [0, 0]


def test_views():
    view = labelling.View.of((21, 30, 52), 21, 81, 16, every=1, cell=2)  # Wan at 480p
    assert view.shown == (21, 15, 26) and view.seconds == 0.25 and max(view.frames) == 79
    odd = labelling.View.of((13, 30, 45), 13, 49, 8, every=1, cell=2)  # CogVideoX at 480p
    assert odd.shown == (13, 15, 23) and odd.seconds == 0.5 and odd.frames[-2:] == [46, 47]
    assert labelling.View.of((13, 30, 45), 13, 49, 8, every=2, cell=2).shown == (7, 15, 23)
    assert labelling.View.of((2, 1, 1), 2, 5, 8, every=1, cell=4).shown == (2, 1, 1)
    later = labelling.View.of((11, 48, 85), 22, 81, 16, every=1, cell=2, lead=1)  # CogVideoX1.5
    assert later.shown == (11, 24, 43) and later.seconds == 0.5


def test_patches_are_in_the_order_of_cells():
    """Light in one cell of the second pair of frames is in its four patches, and in the right frame."""
    frames = np.zeros((4, 56, 84, 3), np.uint8)
    frames[3, 28:56, 28:56] = 255  # cell (1, 1, 1) of (2, 2, 3)
    patches = vlm.patchify(frames).reshape(12, 4, 3, 2, 14 * 14)  # cells, patches, colours, frames, pixels
    dark = (0 - vlm.MEAN) / vlm.STD
    light = (1 - vlm.MEAN) / vlm.STD
    expected = np.broadcast_to(dark[:, None, None], patches.shape).copy()
    expected[6 + 3 + 1, :, :, 1] = light[:, None]
    np.testing.assert_allclose(patches, expected, rtol=1e-6)


def test_layers():
    assert labelling.choose_layers((0.5, 0.85), 28) == tuple(range(14, 24))
    assert labelling.choose_layers((0.5, 0.85), 64) == tuple(range(32, 55))
    assert labelling.choose_layers((0.0, 1.0), 3) == (0, 1, 2)
    assert labelling.choose_layers((22,), 28) == (22,) and labelling.choose_layers((5, 1), 28) == (1, 5)
    for wrong in ((), (28,), (-1,), (0.5,), (0.8, 0.2), (0.5, 1.5), (1, 0.5)):
        with pytest.raises(UserError, match="config.label.layers"):
            labelling.choose_layers(wrong, 28)


# --- Bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting, value",
    [
        ("rows", "all"), ("heads", "min"), ("tokens", "nouns"), ("denoise", "minus"), ("scale", "1"),
        ("dtype", "int8"), ("every", 0), ("cell", 0), ("batch", 0), ("max_new_tokens", 0),
        ("layers", (0.9, 0.1)),
    ],
)  # fmt: skip
def test_bad_settings(prepared, model_folder, tmp_path, setting, value):
    config = get_config()
    config.label[setting] = value
    with pytest.raises(UserError, match=f"config.label.{setting}="):
        label.label(config, model_folder, prepared[1], tmp_path / "labels")
    assert not (tmp_path / "labels").exists()


def break_weights(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def write_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    "damage, message",
    [
        (shutil.rmtree, "is not a folder"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not .* so it is damaged"),
        (
            lambda folder: (folder / "config.json").write_text("[" * 100_000),
            "config.json is not .* it is damaged",
        ),
        (
            lambda folder: (folder / "chat_template.json").write_text("{"),
            "chat_template.json is not a readable",
        ),
        (
            lambda folder: (folder / "chat_template.json").write_text("{}"),
            "lacks 'chat_template': download it",
        ),
        (lambda folder: write_config(folder, model_type="qwen2_vl"), "of type qwen2_vl; give a Qwen2.5-VL"),
        (lambda folder: write_config(folder, vision_config={"patch_size": 16}), "patch_size is 16"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be opened"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "cannot be opened"),
        (break_weights, "lacks weights, first lm_head.weight"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer|cannot be opened"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "has no chat template"),
        # Before a folder of labels is begun for this model.
        (lambda folder: (folder / "chat_template.jinja").write_text("null"), "gives 0 video tokens"),
        (lambda folder: (folder / "chat_template.jinja").write_text("{% if x %}"), "does not run"),
        (lambda folder: (folder / "chat_template.jinja").write_text("{{ messages + 1 }}"), "does not run"),
    ],
)
def test_bad_models(model_folder, tmp_path, damage, message):
    folder = tmp_path / "vl"
    shutil.copytree(model_folder, folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as found:
        opening.open_model(folder, get_config(), 0)
    assert "\n" not in str(found.value)


def test_models_of_one_shape_are_told_apart(model_folder, tmp_path):
    save_tiny_vlm(tmp_path / "tiny-vl", seed=1)
    one, other = vlm.describe(model_folder), vlm.describe(tmp_path / "tiny-vl")
    assert one["name"] == other["name"] and one["sha256"] != other["sha256"]
    shutil.copytree(model_folder, tmp_path / "copy")
    assert vlm.describe(tmp_path / "copy")["sha256"] == one["sha256"]


def test_chat_template_in_the_file_of_older_versions(model_folder, tmp_path):
    folder = tmp_path / "vl"
    shutil.copytree(model_folder, folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    frames = np.zeros((2, 28, 56, 3), np.uint8)
    reading = vlm.Reading((0,), max_new_tokens=3)
    answers = [
        vlm.load(path, "cpu", "float32").answer([frames], [["Where?"]], 1.0, reading)
        for path in (folder, model_folder)
    ]
    np.testing.assert_array_equal(answers[0][0][0].maps, answers[1][0][0].maps)


def test_a_template_without_a_place_for_the_video(model_folder, tmp_path):
    folder = tmp_path / "vl"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content[1].text }}")
    model = vlm.load(folder, "cpu", "float32")
    with pytest.raises(UserError, match="gives 0 video tokens for one video"):
        model.answer([np.zeros((2, 28, 28, 3), np.uint8)], [["Where?"]], 1.0, vlm.Reading((0,)))


def test_bad_data(prepared, labels, model_folder, tmp_path):
    config, (source, data) = get_config(), prepared
    with pytest.raises(UserError, match="no training data at .*; make it with"):
        label.label(config, model_folder, tmp_path / "none", tmp_path / "labels")
    # The labels of other data, of other settings.
    other = tmp_path / "other"
    shutil.copytree(data, other)
    manifest = records.read_manifest(other)
    records.write_manifest(other, manifest | {"fingerprint": "another"})
    with pytest.raises(UserError, match="made differently .data_fingerprint was"):
        label.label(config, model_folder, other, labels[0])
    config.label.denoise = "ratio"
    with pytest.raises(UserError, match="label.denoise was difference, is ratio"):
        label.label(config, model_folder, data, labels[0])
    config.label.denoise = "difference"
    # The source has moved.
    records.write_manifest(other, manifest | {"sources": [str(tmp_path / "gone")]})
    with pytest.raises(UserError, match="gone.*if the source has moved, say where it is: --source=DIR"):
        label.label(config, model_folder, other, tmp_path / "labels")
    assert PreparedClips(other, [str(source)]).read("9x32x48", "train", 0).frames is not None
    with pytest.raises(UserError, match="has 1 sources and 2 are named"):
        label.label(config, model_folder, other, tmp_path / "labels", sources=[source, source])
    # It is there, and nothing in it can be read.
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    for index, path in enumerate(broken.glob("*.mp4")):
        path.write_bytes(bytes([index] * 200))
    with pytest.raises(UserError, match="videos of .* cannot be read .clip0: .*--source=DIR"):
        label.label(config, model_folder, data, tmp_path / "labels", sources=[str(broken)])
    assert not (tmp_path / "labels").exists()


def test_clips_that_show_no_category(prepared, tmp_path):
    """It is said before the model is opened, with what to do."""
    data = tmp_path / "data"
    make_records(sources.read_sources([prepared[0]]), prepared[0], data, shown=False)
    command = r"--vlm=\S+/no model --data=\S+/data --propose=\S+/source/proposed.csv"
    message = (
        f"no clip of .*data shows any category, .* {command} .* column 'category' with names such as coll"
    )
    with pytest.raises(UserError, match=message):
        label.label(get_config(), tmp_path / "no model", data, tmp_path / "labels")
    assert not (tmp_path / "labels").exists()


def test_too_little_memory(prepared, model_folder, tmp_path, monkeypatch):
    def answer(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB.")

    monkeypatch.setattr(vlm.Vlm, "answer", answer)
    with pytest.raises(UserError, match="out of memory: lower config.label.batch"):
        label.label(get_config(), model_folder, prepared[1], tmp_path / "labels")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "name the folder of a Qwen2.5-VL model: --vlm=DIR"),
        (["--vlm=none", "--process=2/2"], "--process=2/2"),
        (["--propose=p.csv"], "name the folder of a Qwen2.5-VL model: --vlm=DIR"),
        (
            ["--vlm=none", "--propose=p.csv", "--check"],
            "--check and --propose cannot be given together",
        ),
        (["--vlm=none", "--propose=p.csv", "--threshold=2"], "threshold"),
        (["--vlm=none", "--propose=p.csv", "--process=1/2"], "leave out --process"),
        (["--import=x", "--preview=3", "--check"], "--import and --preview cannot be given together"),
        (["--import=nowhere", "--check", "--out="], "no labels in nowhere: --import names a folder"),
        (["--import=nowhere", "--config.data.taxonomy=none.toml"], "cannot read the categories of none.toml"),
    ],
)
def test_the_command_answers_in_one_line(prepared, tmp_path, arguments, message):
    flags = [f"--data={prepared[1]}", f"--out={tmp_path / 'labels'}"]
    result = run_here("prophy_jax.label", *flags, *arguments)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


# --- Categories proposed from captions -------------------------------------------------------------

CAPTIONS = {
    "texts/cats/0001": 'A "cat" jumps,\rthen\nlands on \u00e9t\u00e9.',
    "texts/dogs/0001": "A dog shakes off water.<|im_end|>",  # as models end what they write
    "table/zipped": "Ice melts, slowly.",
    "table/known": "A ball hits a wall.",
}


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """(root, data, configuration): a folder of texts, and a table with a zip file, prepared."""
    root = tmp_path_factory.mktemp("captioned") / "clips"
    for index, (name, caption) in enumerate(CAPTIONS.items()):
        path = (root / name).with_suffix(".mp4")
        path.parent.mkdir(parents=True, exist_ok=True)
        video.write_mp4(path, np.full((9, 32, 32, 3), 40 * index, np.uint8), FPS)
        if "texts" in name:
            path.with_suffix(".txt").write_bytes(caption.encode())
    with zipfile.ZipFile(root / "table" / "more.zip", "w") as archive:
        archive.writestr("any//zipped.mp4", (root / "table" / "zipped.mp4").read_bytes())
    (root / "table" / "zipped.mp4").unlink()
    lines = ["id,video,caption,category", 'my id,zipped.mp4,"Ice melts, slowly.",']
    (root / "table" / "clips.csv").write_text(
        "\n".join([*lines, "known,known.mp4,A ball hits a wall.,collision"])
    )
    config = get_tiny("tiny")
    config.label = get_config().label
    data = root.parent / "data"
    prepare.prepare(config, [root / "texts", root / "table"], data)
    return root, data, config


def list_records(data):
    """id -> (split, caption, categories, latents)."""
    [bucket] = records.read_manifest(data)["buckets"]
    return {
        row["id"].decode(): (split, row["caption"], np.flatnonzero(row["category"]).tolist(), row["latents"])
        for split in ("train", "val")
        for row in records.open_dataset(data, "records", bucket, split)
    }


def test_proposed_categories_are_read_back(captioned, model_folder, tmp_path, monkeypatch, capsys):
    """Nothing is encoded again; only categories differ, of the clips that had none."""
    root, data, config = captioned
    copy, table = tmp_path / "data", root / "proposed.csv"
    shutil.copytree(data, copy)
    propose.propose(config, model_folder, copy, table)
    printed = capsys.readouterr().out
    assert f"python -m prophy_jax.prepare --source={table} --out={copy}" in printed
    assert not list(root.glob("*.unfinished"))

    rows = {
        row["id"]: row
        for row in csv.DictReader(io.StringIO(table.read_bytes().decode("utf-8-sig"), newline=""))
    }
    model = vlm.load(model_folder, "cpu", "float32")
    expected = {}
    for row in rows.values():
        if row["id"] != "known":
            [scores] = propose.ask(model, [row["caption"]], taxonomy.WISA)
            expected[row["id"]] = np.flatnonzero(scores >= 0.5).tolist()
            best = np.argsort(-scores)[:3]
            names = [f"{taxonomy.PHENOMENA[e]} {scores[e]:.2f}" for e in best]
            assert row["scores"] == ", ".join(names)
    assert any(expected.values()) and rows["known"]["category"] == "collision"
    assert rows["my id"]["video"] == "table/more.zip:any//zipped.mp4" and rows["known"]["scores"] == ""

    encode = linear_codec.LinearCodec.encode
    monkeypatch.setattr(linear_codec.LinearCodec, "encode", None)
    prepare.prepare(config, [table], copy)
    monkeypatch.setattr(linear_codec.LinearCodec, "encode", encode)
    printed = capsys.readouterr().out
    assert "videos replaced" not in printed and "captions changed" not in printed
    assert "videos moved, encoded anew only if their content has changed: 4\n" in printed
    before, after = list_records(data), list_records(copy)
    assert before.keys() == after.keys() == rows.keys() and len(after) == len(CAPTIONS)
    for name, (split, caption, categories, latents) in after.items():
        assert (split, caption) == before[name][:2] and np.array_equal(latents, before[name][3])
        assert categories == expected.get(name, before[name][2])


def test_a_table_among_texts_takes_their_place(captioned, model_folder, tmp_path, monkeypatch, capsys):
    """The folder of texts is the source of the same clips, with categories."""
    texts, data, config = tmp_path / "texts", tmp_path / "data", captioned[2]
    shutil.copytree(captioned[0] / "texts", texts)
    prepare.prepare(config, [texts], data)
    before = list_records(data)
    propose.propose(config, model_folder, data, texts / "proposed.csv", threshold=0.0)
    monkeypatch.setattr(linear_codec.LinearCodec, "encode", None)
    capsys.readouterr()
    prepare.prepare(config, [texts], data)
    assert "categories changed: 2\n" in (printed := capsys.readouterr().out) and "moved" not in printed
    for name, (split, caption, categories, latents) in list_records(data).items():
        assert categories == list(range(17)) and before[name][:3] == (split, caption, [])
        np.testing.assert_array_equal(latents, before[name][3])


def test_proposing_goes_on_where_it_was_killed(captioned, model_folder, tmp_path, monkeypatch, capsys):
    root, data, config = captioned
    table, asked, ask = root / "again.csv", [], propose.ask

    def stop_at_second(model, captions, known):
        if asked:
            raise KeyboardInterrupt
        asked.extend(captions)
        return ask(model, captions, known)

    monkeypatch.setattr(propose, "ask", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        propose.propose(config, model_folder, data, table)
    unfinished = root / "again.csv.unfinished"
    with unfinished.open("a") as file:
        file.write('{"cut off": [0.')
    monkeypatch.setattr(propose, "ask", lambda *args: asked.extend(args[1]) or ask(*args))
    propose.propose(config, model_folder, data, table)
    assert sorted(asked) == sorted(set(CAPTIONS.values()) - {"A ball hits a wall."})
    text = table.read_bytes()
    table.unlink()
    unfinished.write_text('{"another": "model"}\n{"my id": [0]}\n')
    propose.propose(config, model_folder, data, table)
    assert "is of another model or data, and is begun anew" in capsys.readouterr().out
    assert len(asked) == 6 and table.read_bytes() == text


def test_threshold_and_answers_of_none(captioned, model_folder):
    root, data, config = captioned
    propose.propose(config, model_folder, data, root / "none.csv", threshold=1.0)
    rows = list(csv.DictReader(io.StringIO((root / "none.csv").read_text(encoding="utf-8-sig"))))
    assert sorted(row["category"] for row in rows) == ["collision", "none", "none", "none"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{root}/table/clips.csv", "clips.csv exists, and may have been edited: name another"),
        ("{root}/texts/p.csv", "in a folder that holds its videos, .*table: name .*clips/proposed.csv"),
        ("{root}/nowhere/p.csv", "in a folder that holds its videos"),
        ("{root}/p.txt", "name a file that ends in .csv, such as .*clips/proposed.csv"),
    ],
)
def test_tables_that_cannot_be_written(captioned, tmp_path, table, message):
    """It is said before the model is opened."""
    root, data, config = captioned
    files = sorted(root.rglob("*"))
    with pytest.raises(UserError, match=message):
        propose.propose(config, tmp_path / "no model", data, table.format(root=root))
    assert sorted(root.rglob("*")) == files


def test_a_table_beside_links_to_the_sources(captioned, model_folder, tmp_path, monkeypatch):
    """Where nothing can be written beside the videos; what `prepare` then finds through the links."""
    root, data, config = captioned
    copy, links, table = tmp_path / "data", tmp_path / "links", tmp_path / "links" / "proposed.csv"
    shutil.copytree(data, copy)
    links.mkdir()
    for name in ("texts", "table"):
        (links / name).symlink_to(root / name)
    sources = [str(links / name) for name in ("texts", "table")]
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(UserError, match="no file can be written beside .*: make a folder with links"):
            propose.propose(config, model_folder, copy, table, sources)
    propose.propose(config, model_folder, copy, table, sources)
    monkeypatch.setattr(linear_codec.LinearCodec, "encode", None)
    prepare.prepare(config, [table], copy)
    assert list_records(copy).keys() == list_records(data).keys()


def test_damaged_scores_of_an_interrupted_run_are_left(tmp_path):
    table = tmp_path / "p.csv"
    begun = propose.Unfinished(table, {"model": 1})
    begun.add({"a": [0.5]})
    with begun.path.open("ab") as file:
        file.write(b"\0\xff\n[1]\n")
    assert propose.Unfinished(table, {"model": 1}).scores == {"a": [0.5]}
    assert propose.Unfinished(table, {"model": 2}).scores == {}
    with pytest.raises(UserError, match="ppp.csv.unfinished cannot be written .File name too long"):
        propose.Unfinished(tmp_path / f"{300 * 'p'}.csv", {})


def test_questions_of_many_categories_are_put_in_parts(monkeypatch, model_folder):
    model = vlm.load(model_folder, "cpu", "float32")
    whole = propose.ask(model, ["A cat."], taxonomy.WISA)
    monkeypatch.setattr(propose, "AT_ONCE", 5)
    np.testing.assert_allclose(propose.ask(model, ["A cat."], taxonomy.WISA), whole, rtol=0, atol=1e-6)


def test_nothing_to_propose(captioned, prepared, tiny_data, model_folder, tmp_path):
    root, data, config = captioned
    with pytest.raises(UserError, match="is of the physics sandbox, which knows its categories"):
        propose.propose(get_config(), "no model", tiny_data, tmp_path / "p.csv")
    with pytest.raises(
        UserError, match="no .*gone, a source of .*: if it has moved, say where .*--source=DIR"
    ):
        propose.propose(config, "no model", data, root / "p.csv", [root / "texts", tmp_path / "gone"])
    with pytest.raises(UserError, match="has 2 sources and 1 are named"):
        propose.propose(config, "no model", data, root / "p.csv", [root])


def test_scores_that_are_no_numbers_are_refused():
    class Broken:
        def prefer(self, questions, one, other):
            return np.full(len(questions), np.nan, np.float32)

    with pytest.raises(UserError, match="scores are not finite"):
        propose.ask(Broken(), ["A cat."], taxonomy.WISA)


# --- Labels of one's own ---------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    """A folder with right labels of three clips, in three forms."""
    folder, rng = tmp_path / "own", np.random.default_rng(0)
    folder.mkdir()
    np.savez(folder / "clip0.npz", shares=rng.random((3, 4, 6, 17)), present=np.arange(17) < 17)
    shares = np.zeros((48, 17), np.float32)
    shares[5, taxonomy.WISA.index["collision"]] = 0.5
    np.save(folder / "clip2.npy", shares)
    two = np.zeros((2, 6, 4, 2))
    two[0, 1, 2] = 1, 0.25
    np.savez(folder / "clip4.npz", shares=two, names=["reflection", "combustion"])
    return folder


def test_own_labels_become_a_data_set(prepared, own, tmp_path, capsys):
    data, out = prepared[1], tmp_path / "labels"
    assert (
        own_labels.import_labels(get_config(), own, data, out, only_check=True) is None and not out.exists()
    )
    manifest = own_labels.import_labels(get_config(), own, data, out)
    assert manifest["data_fingerprint"] == records.read_manifest(data)["fingerprint"]
    assert sorted(manifest["unlabelled"]) == ["clip1", "clip3", "clip5", "clip6"]
    assert "without labels: 4: clip" in capsys.readouterr().out
    found = read_labels(out, data)
    assert found["clip0"][0].all() and found["clip0"][1].shape == (17, 72)
    present, maps = found["clip2"]
    assert np.flatnonzero(present).tolist() == [0] and maps[0, 5] == 0.5 and maps.sum() == 0.5
    present, maps = found["clip4"]  # in the order of the taxonomy: combustion, then reflection
    np.testing.assert_array_equal(present, taxonomy.multi_hot(["combustion", "reflection"]))
    assert maps[:, 6].tolist() == [0.25, 1] and maps.sum() == 1.25
    assert not found["clip1"][0].any() and found["clip1"][1].shape == (0, 72)


def npy_header(shape):
    """A .npy file that claims to have this shape."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "name, arrays, why",
    [
        ("clip9.npz", dict(shares=np.zeros((72, 17))), "has no clip 'clip9'; its ids are such as 'clip"),
        ("clip1.npz", dict(shares=np.zeros((4, 4, 6, 17))), r"expected \(3, 4, 6, 17\) or \(72, 17\)"),
        ("clip1.npz", dict(shares=np.full((72, 17), np.nan)), "reach from nan to nan: expected 0 to 1"),
        ("clip1.npz", dict(shares=np.full((72, 17), 255)), "reach from 255 to 255"),
        ("clip1.npz", dict(shares=np.full((72, 17), "a")), "expected numbers"),
        ("clip1.npz", dict(maps=np.zeros((72, 17))), "has arrays .'maps'."),
        ("clip1.npz", dict(present=np.zeros(17)), "has no array shares"),
        (
            "clip1.npz",
            dict(shares=np.ones((72, 17)), present=np.zeros(17)),
            "which present says are not there",
        ),
        ("clip1.npz", dict(shares=np.ones((72, 17)), present=np.ones(3)), "expected 17 of 0 or 1"),
        ("clip1.npz", dict(shares=np.ones((72, 1)), names=["rain"]), "names .'rain'., which are none of"),
        ("clip0.npy", None, "the clip has another file: clip0.npy, clip0.npz"),
        ("clip1.npz", b"PK no zip", "clip1.npz: no readable .npz file"),
        ("clip1.npz", dict(shares=np.zeros((72, 0)), names=[]), "names no category"),
        ("clip1.NPZ", dict(shares=np.ones((72, 3))), r"expected \(3, 4, 6, 17\)"),
        ("clip1.npz", dict(shares=np.zeros((3, 6, 4, 17))), r"are \(3, 6, 4, 17\): the clip has 3 x 4 x 6"),
        ("clip1.npz", dict(shares=np.array([{}])), "holds Python objects, .*: write arrays of numbers with"),
        ("clip1.npy", npy_header("(10000000000, 1000)"), "clip1.npy: no readable .npy file"),  # of 40 TB
        ("clip1.npy", npy_header("[[["), "clip1.npy: no readable .npy file"),
    ],
)
def test_each_wrong_file_of_own_labels_is_named(prepared, own, tmp_path, capsys, name, arrays, why):
    if isinstance(arrays, dict):
        with (own / name).open("wb") as file:
            np.savez(file, **arrays)
    else:
        (own / name).write_bytes(arrays or b"")
    with pytest.raises(
        UserError, match="1 of . files of .*own cannot be used, as listed; nothing was written"
    ):
        own_labels.import_labels(get_config(), own, prepared[1], tmp_path / "labels")
    [line] = capsys.readouterr().out.splitlines()
    assert re.search(f"own/{name}: .*{why}|{why}", line)
    assert not (tmp_path / "labels").exists()


def test_a_folder_without_own_labels(prepared, tmp_path):
    with pytest.raises(UserError, match="no labels in .*none: --import names a folder with a file ID.npz"):
        own_labels.import_labels(get_config(), tmp_path / "none", prepared[1], tmp_path / "labels")


def test_what_own_labels_leave_open_is_listed(prepared, own, tmp_path, capsys):
    """Files of another kind, a link to nowhere, a file of zeros, and what macOS leaves."""
    np.savez(own / "clip1.npz", shares=np.zeros((72, 17)))
    (own / "clip2.npy").rename(own / "clip2.NPY")
    (own / "clip3.pt").write_bytes(b"x")
    (own / "clip5.npz").symlink_to(tmp_path / "nowhere")
    (own / "._clip0.npz").write_bytes(b"Mac OS X")
    own_labels.import_labels(get_config(), own, prepared[1], tmp_path / "labels")
    printed = capsys.readouterr().out
    assert "own: no fault in 4 files\n" in printed and "labels of 4 of 7 clips" in printed
    assert "files left out, which are not labels: 3\n  ._clip0.npz\n  clip3.pt\n  clip5.npz\n" in printed
    assert "files that label no category, with shares of 0 alone: 1\n  clip1\n" in printed
    assert read_labels(tmp_path / "labels", prepared[1])["clip2"][0].any()


def test_own_labels_have_names_in_any_unicode_form(tmp_path):
    np.save(tmp_path / "e\u0301te\u0301.npy", np.zeros((72, 17)))  # as macOS writes it
    assert list(own_labels.find(tmp_path, ["\u00e9t\u00e9"])[0]) == ["\u00e9t\u00e9"]


def test_names_of_own_labels_may_be_bytes(tmp_path):
    np.savez(tmp_path / "a.npz", shares=np.ones((72, 1)), names=[b"melting"])
    present, _ = own_labels.read(tmp_path / "a.npz", (3, 4, 6), taxonomy.WISA)
    np.testing.assert_array_equal(present, taxonomy.multi_hot(["melting"]))


def test_a_folder_of_labels_of_another_kind(prepared, tmp_path):
    (tmp_path / "clip0.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="no labels in .*, which holds clip0.pt: --import names a folder"):
        own_labels.import_labels(get_config(), tmp_path, prepared[1], tmp_path / "labels")
