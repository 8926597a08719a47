"""Metrics on disk: what a killed run left is cut back to its checkpoint."""

import os

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
        "validation/sigma_0.5": 2.0,
    }


def test_a_run_without_a_checkpoint_starts_afresh(tmp_path):
    write(str(tmp_path), 0, [0, 5])
    write(str(tmp_path), 0, [0, 5, 10])
    assert [line["step"] for line in read_metrics(str(tmp_path))] == [0, 5, 10]


def test_a_line_cut_short_is_left_out(tmp_path):
    write(str(tmp_path), 0, [0, 5])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "lo')
    assert [line["step"] for line in read_metrics(str(tmp_path))] == [0, 5]
    write(str(tmp_path), 5, [10])
    assert [line["step"] for line in read_metrics(str(tmp_path))] == [0, 5, 10]
