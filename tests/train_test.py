"""The training command end to end: resume to the bit, signals, bad input, what it leaves behind."""

import importlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from prophy_jax import build, train
from prophy_jax.prepare import prepare
from prophy_jax.run import checkpoints, metrics
from prophy_jax.run import workdir as folders
from prophy_jax.run.errors import UserError
from tests.commands import run_here
from tests.conftest import ROOT, build_run, get_config, xla_flags

STEPS = 40


def command(workdir, tiny_data, *more, devices=1):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "prophy_jax.train",
            "--config=configs/wan.py:tiny",
            "--config.backbone.num_layers=1",  # half the time to compile
            "--config.parts.branch.layers=(0,)",
            f"--workdir={workdir}",
            f"--config.data.dir={tiny_data}",
            f"--config.steps={STEPS}",
            "--config.checkpoint.every=5",
            "--config.log.every=5",
            "--config.samples.every=1000",
            "--config.validation.every=1000",
            *more,
        ],  # fmt: skip
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": xla_flags(devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def saved_steps(workdir):
    folder = os.path.join(workdir, "checkpoints")
    return (
        sorted(int(name) for name in os.listdir(folder) if name.isdigit()) if os.path.exists(folder) else []
    )


def wait_for_step(workdir, process, step):
    while not [saved for saved in saved_steps(workdir) if saved >= step]:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def hashes(workdir):
    return {
        part: checkpoints.read_manifest(os.path.join(workdir, part), "")["sha256"]
        for part in ("backbone", "branch")
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_data):
    workdir = str(tmp_path_factory.mktemp("uninterrupted") / "run")
    process = command(workdir, tiny_data)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return workdir


@pytest.mark.jobs
def test_killed_run_resumes_to_the_same_bits(uninterrupted, tmp_path, tiny_data):
    workdir = str(tmp_path / "run")
    process = command(workdir, tiny_data)
    wait_for_step(workdir, process, random.randrange(5, 16, 5))
    time.sleep(random.random() * 0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped_at = saved_steps(workdir)[-1]
    assert stopped_at < STEPS and not os.path.exists(os.path.join(workdir, "branch"))

    resumed = command(workdir, tiny_data)
    output, _ = resumed.communicate()
    assert resumed.returncode == 0, output
    assert hashes(workdir) == hashes(uninterrupted)
    # Every step stands once in the metrics, with the same losses.
    ours, theirs = metrics.read_metrics(workdir), metrics.read_metrics(uninterrupted)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert {k: v for k, v in a.items() if k.startswith("loss")} == {
            k: v for k, v in b.items() if k.startswith("loss")
        }


def test_a_batch_of_one_with_all_intervals_off_says_what_it_does_and_what_comes_next(tmp_path, tiny_data):
    workdir = tmp_path / "run"
    off = [f"--config.{name}.every=0" for name in ("checkpoint", "samples", "validation")]
    process = command(
        workdir, tiny_data, *off, "--config.log.every=2", "--config.steps=5", "--config.batch_size=1",
        "--config.log.profile=(1, 2)",
    )  # fmt: skip
    output, _ = process.communicate()
    assert process.returncode == 0, output
    lines = metrics.read_metrics(workdir)
    assert [line["step"] for line in lines] == [2, 4, 5] and saved_steps(workdir) == [5]
    assert len(list((workdir / "profile").rglob("*.xplane.pb"))) == 1
    assert f"traced up to 2 steps: xprof --logdir={workdir}/profile" in output
    assert not (workdir / "samples").exists() and not any("validation/loss" in line for line in lines)
    # What can only be 0 is said before the first step, once and with what it means.
    assert output.count("warning: ") == output.count("the loss 'relative' can only be 0: ") == 1
    assert {line["loss/relative"] for line in lines} == {0.0}
    assert output.index("nothing teaches") < output.index("compiling the first step")
    # No terminal: a plain line each time, with the mean of the steps since the line before.
    shown = [float(loss) for loss in re.findall(r"^step \d/5  loss ([\d.]+)  ", output, re.MULTILINE)]
    assert len(shown) == 3 and shown[2] == pytest.approx(lines[2]["loss/total"], abs=1e-4)
    assert shown[0] != pytest.approx(lines[0]["loss/total"], abs=1e-4) and "\r" not in output
    # The commands to type next are of this run.
    assert "python -m prophy_jax.evaluate --config=configs/wan.py:tiny" in output
    assert f"--branch={workdir}/branch" in output and f"--logdir={workdir}/tensorboard" in output
    assert "samples " not in output.split("holds")[1].split("next:")[0]


def test_data_without_validation_clips_are_refused_unless_they_are_not_needed(tiny_config):
    manifest = {"counts": {"train": 4}}
    with pytest.raises(UserError, match="no validation clips: .*--config.validation.every=0"):
        build.check_validation(tiny_config, manifest)
    tiny_config.validation.every = tiny_config.samples.every = 0
    build.check_validation(tiny_config, manifest)


@pytest.mark.slow  # compiles for two meshes; the test above resumes on one
def test_sigterm_saves_and_the_run_goes_on_on_another_mesh(uninterrupted, tmp_path, tiny_data):
    workdir = str(tmp_path / "run")
    process = command(workdir, tiny_data)
    wait_for_step(workdir, process, 5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "saved at step" in output, output
    stopped_at = saved_steps(workdir)[-1]
    assert f"saved at step {stopped_at}" in output and stopped_at < STEPS

    resumed = command(
        workdir, tiny_data, "--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.context=2",
        devices=8,
    )  # fmt: skip
    output, _ = resumed.communicate()
    assert resumed.returncode == 0, output
    ours, theirs = metrics.read_metrics(workdir)[-1], metrics.read_metrics(uninterrupted)[-1]
    assert ours["step"] == theirs["step"] == STEPS
    # Rounding differs between meshes and dozens of Adam steps amplify it.
    assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=1e-2)


@pytest.mark.jobs
def test_a_finished_run_is_extended(uninterrupted, tmp_path, tiny_data):
    """More steps than it was begun with: those of one run with as many, since the rate is constant."""
    workdir = tmp_path / "run"
    short = command(workdir, tiny_data, "--config.steps=5")
    assert short.communicate() and short.returncode == 0
    longer = command(workdir, tiny_data)
    output, _ = longer.communicate()
    assert (
        longer.returncode == 0
        and f"goes on with other settings, noted in its config.json: steps was 5, is {STEPS}" in output
    )
    assert hashes(workdir) == hashes(uninterrupted)


def test_parameters_are_read_from_a_checkpoint_of_a_run(uninterrupted, tmp_path):
    def load(folder):
        shapes = checkpoints.read_manifest(folder, "")["shapes"]
        wanted = {path: jax.ShapeDtypeStruct(shape, kind) for path, (shape, kind) in shapes.items()}
        return checkpoints.load_params(folder, unflatten_dict(wanted, sep="/"), "")

    ended = checkpoints.find_parts(uninterrupted)
    assert ended == {part: f"{uninterrupted}/{part}" for part in ("backbone", "branch")}
    run = str(tmp_path / "run")
    shutil.copytree(uninterrupted, run, ignore=shutil.ignore_patterns("backbone", "branch"))
    found = checkpoints.find_parts(run)
    assert found == {part: f"{run}/checkpoints/{STEPS}/ema/{part}" for part in ended}
    assert found == checkpoints.find_parts(f"{run}/checkpoints/{STEPS}/")
    for part, folder in found.items():
        assert checkpoints.tree_hash(load(folder)) == checkpoints.read_manifest(ended[part], "")["sha256"]
        # What the manifest of the finished run says is said of these too, but for the hashes.
        said, own = checkpoints.read_manifest(ended[part], ""), checkpoints.read_manifest(folder, "")
        for key in said.keys() - {"sha256", "backbone_sha256", "files", "checksum"}:
            assert own[key] == said[key], key
    raw = load(f"{run}/checkpoints/{STEPS}/params/branch")
    assert checkpoints.tree_hash(raw) != checkpoints.tree_hash(load(found["branch"]))
    with pytest.raises(UserError, match="has no ema of 'lora'"):
        checkpoints.read_manifest(f"{run}/checkpoints/{STEPS}/ema/lora", "")
    data = max((tmp_path / "run/checkpoints" / str(STEPS) / "state").rglob("d/*"), key=os.path.getsize)
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=f"{data.name} is damaged"):
        load(found["branch"])


def test_a_run_begins_with_trained_parameters(uninterrupted, tmp_path, tiny_data):
    workdir = tmp_path / "run"
    still = (
        "--config.steps=1",
        *(f"--config.optimizer.learning_rates.{name}=1e-30" for name in ("branch", "backbone", "blocks")),
    )
    process = command(workdir, tiny_data, *still, f"--init={uninterrupted}")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    for part, sha256 in hashes(uninterrupted).items():
        folder = f"{workdir}/checkpoints/1/params/{part}"
        shapes = checkpoints.read_manifest(folder, "")["shapes"]
        wanted = {path: jax.ShapeDtypeStruct(shape, kind) for path, (shape, kind) in shapes.items()}
        loaded = checkpoints.load_params(folder, unflatten_dict(wanted, sep="/"), "")
        assert checkpoints.tree_hash(loaded) == sha256
        assert folders.read_run(workdir)["references"][f"init_{part}_sha256"] == sha256


def test_what_a_run_cannot_begin_with_is_named(uninterrupted, tmp_path, capsys):
    config = get_config("tiny")
    config.backbone.num_layers, config.parts.branch.layers, config.batch_size = 1, (0,), 0
    layout = build_run(config).layout
    assert build.find_starts(config, layout, [uninterrupted]) == checkpoints.find_parts(uninterrupted)
    branch = f"{uninterrupted}/branch"
    assert build.find_starts(config, layout, [branch]) == {"branch": branch}
    for given, message in (
        ([branch, uninterrupted], "--init names 'branch' twice"),
        ([str(tmp_path)], f"no checkpoint at {tmp_path}: name a run"),
    ):
        with pytest.raises(UserError, match=message):
            build.find_starts(config, layout, given)
    config.optimizer.learning_rates.backbone = 0.0
    assert build.find_starts(config, layout, [uninterrupted]) == {"branch": branch}
    with pytest.raises(UserError, match="is of 'backbone', which this run does not train"):
        build.find_starts(config, layout, [f"{uninterrupted}/backbone"])
    assert "warning" not in capsys.readouterr().err
    config.parts.branch.refinement.top_k = 1  # of the same shapes
    assert build.find_starts(config, build_run(config).layout, [branch]) == {"branch": branch}
    assert "another configuration (refinement.top_k was 2, is 1)" in capsys.readouterr().err
    config.parts.branch.layers = (0, 1)
    config.backbone.num_layers = 2
    with pytest.raises(UserError, match="does not fit the configuration"):
        build.find_starts(config, build_run(config).layout, [branch])


def test_metrics_and_files_of_a_finished_run(uninterrupted):
    start, *lines = metrics.read_metrics(uninterrupted)
    assert start["step"] == 0 and "validation/loss" in start
    assert [line["step"] for line in lines] == list(range(5, STEPS + 1, 5))
    expected = {
        "loss/total", "loss/diffusion", "loss/relative", "loss/alignment", "loss/balance",
        "gradient/all", "gradient/branch/blocks", "router/refinement/entropy",
        "router/refinement/load_7", "router/semantic/entropy", "time/step_s", "time/data_wait_s",
        "speed/tokens_per_s", "speed/model_tflop_per_s",
    }  # fmt: skip
    assert all(expected <= line.keys() for line in lines)
    assert "validation/loss" in lines[-1] and "validation/sigma_0.5" in lines[-1]
    assert np.mean([line["loss/diffusion"] for line in lines[-3:]]) < lines[0]["loss/diffusion"]
    assert any(name.startswith("events") for name in os.listdir(os.path.join(uninterrupted, "tensorboard")))
    assert os.path.exists(os.path.join(uninterrupted, "samples", f"step_{STEPS:07d}.mp4"))
    with open(os.path.join(uninterrupted, "config.json")) as file:
        assert json.load(file)["config"]["steps"] == STEPS


def test_finished_run_started_again_does_nothing(uninterrupted, tiny_data):
    """Also one that was begun before parts and side data sets had their names."""
    before, path = hashes(uninterrupted), pathlib.Path(uninterrupted, "config.json")
    run = json.loads(path.read_text())
    run["config"] = as_before(run["config"])
    run.pop("checksum")
    path.write_text(json.dumps(run))
    process = command(uninterrupted, tiny_data)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert hashes(uninterrupted) == before


def as_before(config):
    """A configuration in JSON types, with the keys that earlier versions saved it under."""
    old = json.loads(json.dumps(config))
    (branch,) = old.pop("parts").values() or (None,)
    if branch:
        assert branch.pop("module") == "prophy"
    labels = old["data"].pop("side")["alignment"]
    old["reduction"].pop("absolute_alignment", None)
    return {**old, "branch": branch, "data": {**old["data"], "labels": labels}}


@pytest.mark.parametrize("file", ["wan", "cogvideox"])
@pytest.mark.parametrize("variant", ["", "tiny", "demo_backbone", "demo,absolute", "demo,pb"])
def test_workdirs_of_earlier_versions_are_of_the_same_run(tmp_path, file, variant):
    config = importlib.import_module(f"configs.{file}").get_config(variant)
    own = folders.config_as_json(config)
    old = as_before(own)
    assert old.keys() - own.keys() == {"branch"} and own.keys() - old.keys() == {"parts"}
    for scope in folders.IDENTITY:
        assert folders.run_identity(old, scope) == folders.run_identity(config, scope)
    (tmp_path / "config.json").write_text(json.dumps({"config": old, "references": {}}))
    folders.claim_run(tmp_path, config, {})
    config.seed += 1
    with pytest.raises(UserError, match="seed was 0, is 1"):
        folders.claim_run(tmp_path, config, {})


@pytest.mark.parametrize(
    ("objective", "samples", "message"),
    [
        (
            dict(module="flow"),
            dict(solver="ddim"),
            "samples.solver='ddim' is not for this objective: .* unipc",
        ),
        (dict(module="flow"), dict(solver="unipc", shift=0.0), "the shift must be a positive number"),
        (
            dict(module="v_prediction"),
            dict(solver="unipc", shift=1.0),
            "'unipc' is not for this objective: .* ddim",
        ),
        (
            dict(module="v_prediction", snr_shift=3.0),
            dict(solver="ddim", shift=1.0),
            "samples.shift=1.0 is not objective.snr_shift=3.0",
        ),
        (dict(module="v_prediction", snr_shift=3.0), dict(solver="ddim", steps=1001), "lower the steps"),
        (dict(module="flow"), dict(skip=(0,)), "samples.skip"),
        (dict(module="flow"), dict(guidance_schedule="wave"), "guidance schedule 'wave'"),
    ],
)
def test_samplers_that_do_not_fit_the_objective_are_refused(
    tmp_path, tiny_config, objective, samples, message
):
    tiny_config.objective, tiny_config.batch_size = objective, 8
    tiny_config.samples.update(samples)
    with pytest.raises(UserError, match=message) as error:
        train.train(tiny_config, str(tmp_path / "run"))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_workdir_of_another_configuration_is_refused(uninterrupted, tiny_data, tiny_config):
    before = hashes(uninterrupted)
    process = command(uninterrupted, tiny_data, "--config.seed=7")
    output, _ = process.communicate()
    assert process.returncode == 1
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "config.json" in line and "seed was 0, is 7" in line and "Traceback" not in output
    assert hashes(uninterrupted) == before


def test_checkpoint_of_another_shape_is_refused(uninterrupted, tiny_config):
    tiny_config.backbone.dim = 24
    tiny_config.backbone_params = os.path.join(uninterrupted, "backbone")
    run = build_run(tiny_config, jax.devices()[:1])
    with pytest.raises(UserError, match=r"backbone does not fit .* is \(\(1, 48\)"):
        build.init_params(run.config, run.model, run.layout)


def test_not_finite_loss_names_step_clips_and_checkpoint(tmp_path, tiny_config):
    tiny_config.optimizer.groups = (("branch/", 1e30), ("backbone/", 1e30))
    tiny_config.optimizer.clip = 1e30
    workdir = str(tmp_path / "run")
    tiny_config.backbone.num_layers = 1
    tiny_config.parts.branch.layers = (0,)
    tiny_config.mesh.data = 4
    tiny_config.mesh.fsdp = 2
    tiny_config.batch_size = 8
    with pytest.raises(UserError, match=r"not finite at step [1-4], clips train-.*last good.*none yet"):
        train.train(tiny_config, workdir)
    assert saved_steps(workdir) == []


def test_bad_input_gets_one_line(tmp_path, tiny_data):
    def run(*arguments):
        result = run_here("prophy_jax.train", *arguments)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        (line,) = result.stderr.strip().splitlines()
        assert line.startswith("error: ")
        return line

    tiny = "--config=configs/wan.py:tiny"
    assert "no variant 'large'" in run("--config=configs/wan.py:large")
    assert "no such key: --config.stepz=1" in run(tiny, "--config.stepz=1")
    assert "configs/none.py" in run("--config=configs/none.py")
    assert "how many steps to skip and how many to trace" in run(tiny, "--config.log.profile=(3,)")
    assert "--workdir" in run(tiny)
    one_each = "--config.batch_size=8"  # for the devices of this process
    missing = run(tiny, one_each, f"--workdir={tmp_path}/a", f"--config.data.dir={tmp_path}/none")
    assert "prophy_jax.prepare" in missing
    assert not os.path.exists(tmp_path / "a")
    paper = run("--config=configs/wan.py", "--config.accumulation=1", f"--workdir={tmp_path}/b")
    assert "checkpoints/wan2.1-t2v-1.3b" in paper and "convert.wan" in paper
    data = f"--config.data.dir={tiny_data}"
    other = run(tiny, one_each, f"--workdir={tmp_path}/c", data, "--config.data.frames=13")
    assert "manifest" not in other and "data.frames was 9, is 13" in other and "prepare it again" in other
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    full = run(tiny, one_each, f"--workdir={tmp_path}/full", data)
    assert "not empty" in full
    assert os.listdir(tmp_path / "full") == ["notes.txt"]


@pytest.mark.slow
def test_video_files_200_steps_killed_and_resumed(tmp_path, wisa_sample):
    """configs/wan.py:tiny on video files: the loss falls, and SIGKILL changes no bit."""
    data = str(tmp_path / "wisa")
    prepare(get_config("tiny"), [wisa_sample], data)
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    steps = "--config.steps=200"
    output, _ = command(whole, data, steps).communicate()
    losses = [line["loss/total"] for line in metrics.read_metrics(whole) if "loss/total" in line]
    assert len(losses) == 40, output
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:8])

    process = command(killed, data, steps)
    wait_for_step(killed, process, random.randrange(5, 180, 5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert saved_steps(killed)[-1] < 200
    output, _ = command(killed, data, steps).communicate()
    assert hashes(killed) == hashes(whole), output
