"""Scores of held-out prompts, and the statistics of differences between arms."""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from prophy_jax import evaluate, study
from prophy_jax.evaluation import evaluator, held_out_loss, motion, scores, statistics
from prophy_jax.run import checksums
from prophy_jax.run.errors import UserError
from tests.commands import run_here
from tests.conftest import ROOT, get_config, xla_flags
from tests.evaluate_test import prepared


def test_by_hand():
    own, other = np.array([[3.0, 5.0], [4.0, 8.0]]), np.array([[1.0, 2.0], [3.0, 4.0]])
    difference = own - other  # [[2, 3], [1, 4]]
    found = statistics.paired_bootstrap(own, other)
    assert found.mean == 2.5
    assert statistics.standard_error(own) == 1.0  # of the means 4 and 6: their deviation, sqrt 2, by sqrt 2
    assert statistics.standard_error(difference) == 0.0  # both seeds differ by 2.5
    # All 16 draws of 2 seeds and 2 prompts, each as likely: 4 are of the second prompt and 4 of the first.
    pairs = list(itertools.product((0, 1), repeat=2))
    every = [difference[np.ix_(s, p)].mean() for s in map(list, pairs) for p in map(list, pairs)]
    assert (found.low, found.high) == (min(every), max(every)) == (1.0, 4.0)
    assert found.p == 2 / (statistics.DRAWS + 1)


def test_equal_arms_do_not_differ():
    scores = np.random.default_rng(0).normal(size=(3, 20))
    assert statistics.paired_bootstrap(scores, scores) == (0.0, 0.0, 0.0, 1.0)


def test_a_constant_shift_is_found_however_much_seeds_and_prompts_vary():
    scores = np.random.default_rng(0).integers(-50, 50, (3, 20)).astype(float)
    least = 2 / (statistics.DRAWS + 1)
    assert statistics.paired_bootstrap(scores + 0.5, scores) == (0.5, 0.5, 0.5, least)
    assert statistics.paired_bootstrap(scores - 0.5, scores) == (-0.5, -0.5, -0.5, least)


def test_what_has_no_seeds_is_paired_with_every_seed():
    rng = np.random.default_rng(1)
    own, alone = rng.normal(size=(3, 10)), rng.normal(size=(1, 10))
    repeated = np.repeat(alone, 3, axis=0)
    assert statistics.paired_bootstrap(own, alone) == statistics.paired_bootstrap(own, repeated)
    there, back = statistics.paired_bootstrap(own, alone), statistics.paired_bootstrap(alone, own)
    assert back.mean == -there.mean and back.p == there.p
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))


def test_one_seed_has_no_standard_error():
    assert statistics.standard_error(np.ones((1, 5))) is None


def test_p_over_seeds_by_hand():
    """Seeds differ by 1, 2 and 3: t = 2 / (1 / sqrt 3), and its two sides with 2 degrees of freedom."""
    own = np.array([[0.0, 2.0], [1.0, 3.0], [3.0, 3.0]])
    t = 2 * 3**0.5
    assert statistics.p_over_seeds(own, np.zeros((1, 2))) == pytest.approx(1 - t / (2 + t * t) ** 0.5)
    assert statistics.p_over_seeds(own[:1], np.zeros((1, 2))) is None
    assert statistics.p_over_seeds(own + 0.1, own) is None


def coverage(seeds: int, of_seed: float, of_pair: float, studies: int = 200) -> float:
    """Share of simulated studies, without a true difference, whose interval holds zero."""
    rng, held = np.random.default_rng(seeds), 0
    for number in range(studies):
        differences = of_seed * rng.normal(size=(seeds, 1)) + rng.normal(size=(1, 24))
        differences = differences + of_pair * rng.normal(size=(seeds, 24))
        found = statistics.paired_bootstrap(differences, np.zeros((1, 24)), number, 1000)
        held += found.low <= 0 <= found.high
    return held / studies


def test_coverage_of_the_interval():
    """Right where prompts decide; far from 95 % where seeds do, the more so the fewer there are."""
    for seeds in (3, 5):
        assert coverage(seeds, of_seed=0.0, of_pair=1.0) > 0.9
    few, more = (coverage(seeds, of_seed=3.0, of_pair=0.0) for seeds in (3, 5))
    print(f"3 seeds {few:.2f}, 5 seeds {more:.2f}")
    assert 0.6 < few < more < 0.92


# --- Scores ------------------------------------------------------------------------------------------


def clips(generated: np.ndarray) -> evaluator.Clips:
    count = len(generated)
    loss = np.arange(3.0 * count).reshape(count, 3)
    return evaluator.Clips([""] * count, np.zeros((count, 2)), [{}] * count, generated, generated, loss, 8)


def test_motion_by_hand():
    still = np.full((3, 4, 4, 3), 200, np.uint8)
    moving = np.stack([np.full((4, 4, 3), level, np.uint8) for level in (0, 255, 250)])
    found = motion.build().score(clips(np.stack([still, moving])))
    np.testing.assert_allclose(found["motion"], [0, 130])  # of 255 and 5
    assert np.isnan(motion.build().score(clips(moving[None, :1]))["motion"]).all()


def test_loss_is_the_mean_over_noise_levels():
    found = held_out_loss.build().score(clips(np.zeros((2, 2, 4, 4, 3), np.uint8)))
    np.testing.assert_allclose(found["diffusion_loss"], [1, 4])


def test_scores_of_a_run_do_not_depend_on_its_seed(tiny_data, tmp_path):
    config = prepared("tiny", tiny_data, tmp_path / "run")
    first = evaluate.score(config, str(tmp_path / "run"), str(tmp_path / "out"))
    stored = json.loads((tmp_path / "out" / "scores.json").read_text(), parse_constant=pytest.fail)
    assert checksums.unsealed(stored, "", "") == first and len(stored["prompts"]) == 4
    assert set(stored["scores"]) == set(stored["metrics"]) == {"diffusion_loss", "motion"}
    assert all(len(values) == 4 and min(values) > 0 for values in stored["scores"].values())
    config.seed = 7
    assert evaluate.score(config, str(tmp_path / "run"), str(tmp_path / "again")) == first
    config.study.seed = 7
    assert evaluate.score(config, str(tmp_path / "run"), str(tmp_path / "other"))["scores"] != first["scores"]


def test_wrong_evaluators_are_refused():
    config = get_config("tiny")
    for spec, message in (
        (dict(module="charts"), "builds nothing"),
        (dict(module="no_such"), "no file no_such.py in prophy_jax.evaluation"),
        (dict(module="motion"), "'more' and 'motion' both give 'motion'"),
    ):
        config.evaluators.more = spec
        with pytest.raises(UserError, match=message):
            scores.build_evaluators(config)
    config.evaluators = {}
    with pytest.raises(UserError, match="config.evaluators is empty"):
        scores.build_evaluators(config)


# --- The table ---------------------------------------------------------------------------------------


def given(*values, prompts=("a", "b")) -> dict:
    return {
        "metrics": {"m": {"text": "", "higher_is_better": False}},
        "prompts": [{"id": name, "caption": name} for name in prompts],
        "scores": {"m": list(values)},
    }


def test_table_of_given_scores():
    scored = {"base": [given(1.0, 2.0)], "one": [given(2.0, 3.0)], "two": [given(3.0, 5.0), given(5.0, None)]}
    base, one, two = study.make_table(scored, "base")
    assert (base["mean"], base["standard_error"], base["versus"], base["p"]) == (1.5, None, None, None)
    assert (one["difference"], one["low"], one["high"], one["seeds"], one["prompts"]) == (1, 1, 1, 1, 2)
    # The prompt that one seed has no score of is left out.
    assert (two["mean"], two["standard_error"], two["difference"], two["prompts"]) == (4, 1, 3, 1)
    lines = study.as_csv([base, one], study.COLUMNS).splitlines()
    assert lines[1] == "m,base,,1,2,1.5,,,,,,,False" and lines[2].startswith("m,one,base,1,2,2.5,,1,1,1,")
    with pytest.raises(UserError, match="one, seed 0, scored other prompts or metrics than base"):
        study.make_table({**scored, "one": [given(1.0, 2.0, prompts=("a", "c"))]}, "base")


def test_arms_follow_the_variant():
    name = study.name_configuration
    assert name(["--config=configs/wan.py:demo"], "lora") == "--config=configs/wan.py:demo,lora"
    assert name(["--config", "configs/wan.py"], "pb") == "--config=configs/wan.py:,pb"
    assert name(["--config=configs/wan.py:demo"], "base") == "--config=configs/wan.py:demo"
    with pytest.raises(UserError, match="names an arm: leave it out"):
        name(["--config=configs/wan.py:demo,lora"], "pb")


def test_bad_input_gets_one_line_and_writes_nothing(tmp_path, tiny_data):
    words = ("prophy_jax.study", "--config=configs/wan.py:tiny", f"--config.data.dir={tiny_data}")
    for more, message in (
        (["--arms=lora,lor"], "did you mean tiny,lora?"),
        (["--arms=lora", "--versus=full"], "--versus=full is not among --arms=lora"),
        (["--arms=lora,lora"], "names 'lora' twice"),
        (["--arms=lora", "--process=3/2"], "say which of how many"),
        (["--arms=lora", "--seeds=0"], "not a positive integer"),
        (["--arms=base,lora"], "config.backbone_params is empty"),
        (["--arms=lora", "--config.seed=3"], "--config.seed is what --seeds counts"),
        (["--arms=lora", "--config.data.dir=nowhere"], "no training data at nowhere"),
        ([], "name the arms and a folder"),
    ):
        done = run_here(*words, *more, f"--out={tmp_path}/out")
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert message in done.stderr and not (tmp_path / "out").exists()


# --- Whole studies -----------------------------------------------------------------------------------


def test_what_is_written_and_what_counts_as_finished(tmp_path):
    """The page, and units whose scores are of other settings or damaged."""
    about = {"split": "test", "settings": {"study": 1}}
    found = {"base": [given(1.0, 2.0) | about], "one": [given(2.0, 3.5) | about, given(4.0, None) | about]}
    study.write(str(tmp_path), found, "base", 2, 30, {"run": {"steps": 30}})
    page = (tmp_path / "study.html").read_text()
    assert "base is the backbone alone" in page and "2 seeds (30 steps)" in page and "lower is better" in page
    assert page.count("<img") == 1 and "None" not in page
    stored = json.loads((tmp_path / "study.json").read_text(), parse_constant=pytest.fail)
    assert [row["arm"] for row in stored["rows"]] == ["base", "one"] and stored["rows"][1]["difference"] == 2
    assert (tmp_path / "scores.csv").read_text().splitlines()[1:] == [
        "base,0,a,m,1", "base,0,b,m,2", "one,0,a,m,2", "one,0,b,m,3.5", "one,1,a,m,4", "one,1,b,m,",
    ]  # fmt: skip
    study.write(str(tmp_path), {"base": found["base"]}, "base", 1, 30, {})
    assert "nothing to compare it with" in (tmp_path / "study.html").read_text()

    unit = study.Unit("one", 0, str(tmp_path / "unit"))
    assert unit.scores({"study": 1}) is None
    (tmp_path / "unit").mkdir()
    (tmp_path / "unit" / "scores.json").write_text(json.dumps(checksums.sealed(found["one"][0])))
    assert unit.scores({"study": 1}) == found["one"][0] and unit.scores({"study": 2}) is None
    (tmp_path / "unit" / "scores.json").write_text(
        json.dumps(checksums.sealed(found["one"][0]) | {"split": "val"})
    )
    with pytest.raises(UserError, match="scores.json is damaged.*: remove it"):
        unit.scores({"study": 1})


def test_a_unit_that_fails_is_named_with_its_log_and_ends_no_other(tmp_path, capsys):
    def run(words, log):
        pathlib.Path(log).write_text("  0%\rsome step\nerror: the disk is full\nbye\n")
        return int(words[0] == "prophy_jax.evaluate")

    run.stopped = 0
    (tmp_path / "unit").mkdir()
    unit = study.Unit("one", 1, str(tmp_path / "unit"))
    assert study.make(unit, "--config=configs/wan.py:tiny,one", [], run) == 1
    assert capsys.readouterr().err == f"error: one, seed 1: the disk is full ({tmp_path}/unit/scores.log)\n"


ALONE = dict(cwd=ROOT, env=dict(os.environ, PYTHONPATH=str(ROOT), XLA_FLAGS=xla_flags(1)))


def command(*words: str) -> str:
    """What a command prints, on one device, that has to end well."""
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, **ALONE)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.jobs
def test_a_study_that_is_killed_twice_gives_the_same_scores(tmp_path, tiny_data):
    """Of a backbone and adapters; then with fewer prompts, for which they are scored anew."""
    tiny = ("--config=configs/wan.py:tiny", f"--config.data.dir={tiny_data}", "--config.steps=6",
            "--config.samples.every=0", "--config.checkpoint.every=2")  # fmt: skip
    command("prophy_jax.train", tiny[0] + ",finetune", *tiny[1:], f"--workdir={tmp_path}/start")
    shared = (*tiny, f"--config.backbone_params={tmp_path}/start/backbone", "--arms=base,lora", "--seeds=2")
    words = ("prophy_jax.study", *shared, "--config.study.prompts=2")
    command(*words, f"--out={tmp_path}/whole")

    for until in ("lora/seed_0/run/checkpoints/2", "lora/seed_0/scores.log"):
        process = subprocess.Popen(
            [sys.executable, "-m", *words, f"--out={tmp_path}/out"], **ALONE, start_new_session=True
        )
        limit = time.monotonic() + 200
        while not (tmp_path / "out" / until).exists() and time.monotonic() < limit and process.poll() is None:
            time.sleep(0.02)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for process in ("0/2", "1/2"):  # the units of one, then those of the other
        text = command(*words, f"--out={tmp_path}/out", f"--process={process}")
    assert "missing" not in text
    for name in ("scores.csv", "study.csv", "study.json", "study.html"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len((tmp_path / "out" / "scores.csv").read_text().splitlines()) == 1 + 3 * 2 * 2

    assert "python -m" not in command(*words, f"--out={tmp_path}/out")
    fewer = command("prophy_jax.study", *shared, "--config.study.prompts=1", f"--out={tmp_path}/out")
    assert fewer.count("--scores") == 3
    with pytest.raises(AssertionError, match="steps was 6, is 7"):
        command(*words, "--config.steps=7", f"--out={tmp_path}/out")
