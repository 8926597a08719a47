"""Metrics on disk: what a killed run left is cut back to its checkpoint."""

import io
import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

from prophy_jax.run import metrics
from prophy_jax.run.errors import UserError
from prophy_jax.run.metrics import MetricsWriter, read_metrics, summarised


def write(workdir, first_step, steps):
    writer = MetricsWriter(workdir, first_step)
    for step in steps:
        writer.write(step, {"loss": 1.0 / (step + 1), "run": float(first_step)})
    writer.close()


def test_every_step_stands_once_after_a_resume(tmp_path):
    workdir = str(tmp_path)
    write(workdir, 0, [0, 5, 10, 15])
    write(workdir, 10, [15, 20])  # killed after 15, resumed from the checkpoint of 10
    assert [line["step"] for line in read_metrics(workdir)] == [0, 5, 10, 15, 20]
    assert [line["run"] for line in read_metrics(workdir)] == [0, 0, 0, 10, 10]
    assert any(name.startswith("events") for name in os.listdir(tmp_path / "tensorboard"))


def test_tensorboard_has_one_pair_of_curves_for_a_numbered_series():
    loads = {f"router/load_{i}": value for i, value in enumerate((0.2, 0.5, 0.3))}
    assert summarised({"loss/total": 1.0, **loads, "validation/sigma_0.5": 2.0}) == {
        "loss/total": 1.0,
        "router/load_min": 0.2,
        "router/load_max": 0.5,
        "router/load_entropy": pytest.approx(0.9372, abs=1e-4),  # 1.0297 nats of ln 3
        "validation/sigma_0.5": 2.0,
    }
    assert summarised({"load_0": 0.5, "load_1": 0.5})["load_entropy"] == 1
    assert summarised({"load_0": 0.0, "load_1": 3.0})["load_entropy"] == 0
    assert "series_entropy" not in summarised({"series_0": -1.0, "series_1": 3.0})


def test_clips_are_shown_in_tensorboard_with_their_prompts(tmp_path):
    frames = np.stack([np.full((8, 12, 3), grey, np.uint8) for grey in (0, 100, 200)])
    writer = MetricsWriter(str(tmp_path), 0)
    writer.write_clips(5, frames, 8, "1. a ball falls")
    writer.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    stored = path.read_bytes()
    assert b"1. a ball falls" in stored
    with Image.open(io.BytesIO(stored[stored.index(b"GIF89a") :])) as clip:
        assert clip.n_frames == 3 and clip.size == (12, 8) and clip.info["duration"] == 120  # of 125 ms
        clip.seek(2)
        np.testing.assert_array_equal(clip.convert("RGB"), frames[2])


@pytest.mark.parametrize(
    "line", ['{"loss": 1}', '{"stepx": 5}', '{"step": null}', '{"step": [5]}', "[]", "{"]
)
def test_a_line_that_names_no_step_is_left_out(tmp_path, line):
    write(str(tmp_path), 0, [0, 5])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    write(str(tmp_path), 5, [10])
    assert [line["step"] for line in read_metrics(str(tmp_path))] == [0, 5, 10]


def test_a_run_without_a_checkpoint_starts_afresh(tmp_path):
    write(str(tmp_path), 0, [0, 5])
    write(str(tmp_path), 0, [0, 5, 10])
    assert [line["step"] for line in read_metrics(str(tmp_path))] == [0, 5, 10]


def test_what_is_known_later_joins_the_line_of_its_step(tmp_path):
    writer = MetricsWriter(str(tmp_path), 0)
    for step, values in ((5, {"loss": 1.0, "share": 0.1}), (5, {"validation": 2.0, "share": 0.2}), (10, {})):
        writer.write(step, values)
    joined = [{"step": 5, "loss": 1.0, "share": 0.2, "validation": 2.0}, {"step": 10}]
    assert read_metrics(str(tmp_path)) == joined  # also of a run that is killed now
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == joined


def test_a_line_cut_short_is_left_out(tmp_path):
    write(str(tmp_path), 0, [0, 5])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "lo')
    assert [line["step"] for line in read_metrics(str(tmp_path))] == [0, 5]
    write(str(tmp_path), 5, [10])
    assert [line["step"] for line in read_metrics(str(tmp_path))] == [0, 5, 10]


@pytest.mark.parametrize("line", [b"{oops", b"\xff", b"[1]", b"[" * 100_000, b"7" * 5000])
def test_a_damaged_line_is_left_out(tmp_path, line):
    write(str(tmp_path), 0, [0, 5])
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(line + b"\n")
    write(str(tmp_path), 5, [10])
    assert [line["step"] for line in read_metrics(str(tmp_path))] == [0, 5, 10]


def test_a_resumed_run_continues_its_run_of_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install prophy_jax[wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    runs = []
    for first_step in (0, 5):
        run = metrics.start_wandb("physics", str(tmp_path), {"seed": 0})
        runs.append((run.id, run.project, run.config["seed"]))
        writer = MetricsWriter(str(tmp_path), first_step, run)
        writer.write(first_step + 5, {"loss/total": 1.0, "router/load_0": 0.2, "router/load_1": 0.4})
        writer.write(first_step + 5, {"validation/loss": 0.5})  # of the same step: sent with it
        writer.write(first_step + 6, {})
        assert run.summary["loss/total"] == 1.0 and run.summary["router/load_max"] == 0.4
        assert run.summary["validation/loss"] == 0.5
        writer.close()
    assert runs[0] == runs[1] == ((tmp_path / "wandb_id").read_text(), "physics", 0)
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{runs[0][0]}"))


def test_wandb_without_a_login_is_one_line(monkeypatch, tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install prophy_jax[wandb]")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match="nobody is logged in: run wandb login, or set WANDB_MODE=offline"):
        metrics.check_wandb("physics")


def test_wandb_that_is_not_installed_is_one_line_and_not_needed_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not there
    metrics.check_wandb("")
    assert metrics.start_wandb("", str(tmp_path), {}) is None
    with pytest.raises(UserError, match=r"log.wandb='physics' needs a package: pip install") as error:
        metrics.check_wandb("physics")
    assert "\n" not in str(error.value) and not os.listdir(tmp_path)
