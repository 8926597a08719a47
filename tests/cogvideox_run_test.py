"""configs/cogvideox.py:tiny end to end, in one process: prepare, train, resume, sample, measure.

Its text encoder is a small T5 whose padding is encoded, as CogVideoX's is, and its tokens are 5 to a side.
"""

import json
import shutil

import jax
import numpy as np
import pytest

from configs import cogvideox
from prophy_jax import build, evaluate, models, train
from prophy_jax.data import loader, records
from prophy_jax.evaluation import report, validation
from prophy_jax.prepare import list_buckets, list_grids, prepare
from prophy_jax.run import checkpoints, metrics
from prophy_jax.run.errors import UserError
from tests.conftest import build_run
from tests.tiny_tokenizer import save_tiny_tokenizer
from tests.videos import read_video

LENGTH, WIDTH = 120, 32  # rows of text: room for some captions, letter by letter
STEPS, STOP = 4, 2
LOSSES = ("diffusion", "relative", "alignment", "balance")


def get_config(folder):
    """A run beside a frozen backbone of one block, with everything that it reads in `folder`."""
    config = cogvideox.get_config("tiny")
    sizes = dict(vocab_size=256, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=1, num_heads=4, shared_bias=True)
    config.text_encoder = dict(module="t5", length=LENGTH, padding="encoded", **sizes)
    config.text_encoder_params = str(folder / "text_encoder")
    config.backbone_params = str(folder / "backbone")
    config.backbone.update(text_dim=WIDTH, text_len=LENGTH, num_layers=1)
    config.parts.branch.layers = (0,)
    config.data.update(dir=str(folder / "data"), height=40, width=40)
    config.data.sandbox = dict(train=8, val=2, test=4, seed=0)
    config.optimizer.update(groups=(("branch/", 1e-2), ("backbone/", None)), warmup=1)
    config.steps = STEPS
    config.log.every = 1
    config.checkpoint.every = STOP
    config.validation.every = config.samples.every = 1000  # also at the last step
    config.samples.update(solver="cogvideox-dpm", guidance_schedule="dynamic", guidance=6.0, steps=3, clips=2)
    return config


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Of the simulated ones: it is compiled in half the time."""
    build_mesh = build.build_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            build,
            "build_mesh",
            lambda shape, rows=0, devices=None: build_mesh(shape, rows, jax.devices()[:1]),
        )
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_device):
    """(config, workdir) of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("cogvideox")
    config = get_config(folder)
    encoder = models.build(config.text_encoder)
    backbone = models.build(config.backbone)
    for model, path in (encoder, config.text_encoder_params), (backbone, config.backbone_params):
        checkpoints.save_params(path, jax.jit(model.init)(jax.random.key(0)), {})
    save_tiny_tokenizer(folder / "text_encoder" / "tokenizer")
    prepare(config)
    train.train(config, str(folder / "whole"))
    return config, folder / "whole"


@pytest.fixture(scope="module")
def measured(finished):
    """(metrics.json, the clips of the report) of that run."""
    config, workdir = finished
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        write = report.write

        def keep(path, own, results, clips, *more):
            shown.extend(clips)
            write(path, own, results, clips, *more)

        patch.setattr(report, "write", keep)
        evaluate.evaluate(config, str(workdir), str(workdir))
    return json.loads((workdir / "metrics.json").read_text(), parse_constant=pytest.fail), shown


@pytest.mark.parametrize("variant", ["", "2b"])
def test_records_and_labels_have_the_tokens_of_the_backbone(variant):
    config = cogvideox.get_config(variant)
    grids = list_grids(config, models.build(config.codec), list_buckets(config.data))
    shapes, tokens = zip(*grids.values(), strict=True)
    assert tokens == ((13, 30, 45), (11, 30, 45))
    assert tokens == tuple(models.build(config.backbone).grid(shape) for shape in shapes)
    assert shapes[0][:3] == config.parts.branch.semantic.basis_grid and config.data.fps == 8


def test_every_row_of_text_reaches_the_batch(finished):
    config, _ = finished
    batch = next(loader.make_loader(config.data.dir, "train", 8, seed=0))
    mask, rows = batch["text_mask"], np.abs(batch["text"]).max(-1)
    assert (mask.any(1) & ~mask.all(1)).any() and rows.min() > 0.1
    text, mask = (loader.load_empty_text(config.data.dir)[name] for name in ("text", "text_mask"))
    assert mask.sum() == 1 and np.abs(text).max(-1).min() > 0.1


def test_every_loss_is_there(finished):
    _, workdir = finished
    lines = [line for line in metrics.read_metrics(str(workdir)) if "loss/total" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert all(line[f"loss/{name}"] > 0 for name in LOSSES) and np.isfinite(line["loss/total"])
    # The target has unit variance, and what an untrained head gives has about as much, independent of it.
    assert 1 < lines[0]["loss/diffusion"] < 4


def test_run_resumes_to_the_same_bits(finished, monkeypatch):
    config, workdir = finished
    again = workdir.with_name("again")
    shutil.copytree(workdir, again)
    # As if it had been killed in its last step.
    shutil.rmtree(again / "checkpoints" / str(STEPS))
    shutil.rmtree(again / "branch")
    # Neither has a say in what is trained, and both take long to compile.
    validated = []
    monkeypatch.setattr(validation, "make_validation", lambda *_: lambda params: validated.append(1) or {})
    monkeypatch.setattr(validation, "make_validation_clips", lambda *_: lambda params, path: None)
    train.train(config, str(again))
    first, second = (checkpoints.read_manifest(str(folder / "branch"), "") for folder in (workdir, again))
    assert first["sha256"] == second["sha256"]
    assert len(validated) == 1  # after the last step, and not at step 0 again
    ours, theirs = (
        [line["loss/total"] for line in metrics.read_metrics(str(folder)) if line["step"]]
        for folder in (again, workdir)
    )
    assert ours == theirs and len(ours) == STEPS


def test_clips_of_the_last_step(finished):
    config, workdir = finished
    clips, _ = read_video(workdir / "samples" / f"step_{STEPS:07d}.mp4")
    assert clips.shape == (9, 2 * 40, 2 * 40, 3)  # samples above real clips, side by side
    assert clips[:, :40].std() > 1


def test_localisation(finished, measured):
    config, _ = finished
    found, _ = measured
    manifest = records.read_manifest(config.data.dir)
    assert manifest["buckets"]["9x40x40"]["token_grid"] == [3, 5, 5]
    rows = found["localisation"]["categories"]
    known = [row for row in rows if row["auc_after"][0] is not None]
    assert known and all(0 <= value <= 1 for row in known for value in row["auc_after"])
    assert any(row["auc_after"] != row["auc_before"] for row in known)  # it was trained
    for row in found["diffusion"]["test"]:
        assert 0 < row["loss"] != row["loss_without"] > 0


def test_sampled_with_the_branch_and_without(finished, measured):
    _, workdir = finished
    _, shown = measured
    assert len(shown) == 4
    for _, clips in shown:
        own, alone = (clips[name].astype(int) for name in ("with the branch", "backbone alone"))
        assert own.shape == (9, 40, 40, 3) and own.std() > 1
        assert np.abs(own - alone).max() > 0
    text = " ".join((workdir / "report.html").read_text().split())
    assert "cogvideox-dpm, 3 steps, dynamic guidance 6" in text


def test_data_of_another_token_grid_is_refused(finished):
    config = finished[0].copy_and_resolve_references()
    config.backbone.patch_size = (1, 1, 1)
    with pytest.raises(UserError, match=r"prepared for \[3, 5, 5\] tokens .* the backbone has \[3, 10, 10\]"):
        run = build_run(config)
        build.check_data(config, run.model, run.chosen)
