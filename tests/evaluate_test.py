"""The measures by hand and by brute force, and the command end to end on runs of the tiny configuration."""

import html
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from prophy_jax import build, evaluate, evaluation, train
from prophy_jax.data import records
from prophy_jax.data.taxonomy import PHENOMENA
from prophy_jax.evaluation import auc, diffusion, pictures, report, routing
from prophy_jax.run import checkpoints, metrics, optim
from prophy_jax.run import workdir as folders
from prophy_jax.run.errors import UserError
from tests.commands import run_here
from tests.conftest import ROOT, get_config


def auc_by_pairs(scores, positive):
    pairs = itertools.product(scores[positive], scores[~positive])
    return np.mean([1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs])


def case(label, scores, category=0, others=None):
    label, scores = np.array(label, float), np.array(scores, float)
    others = np.zeros(len(label)) if others is None else np.array(others, float)
    return routing.Case(category, label, others, np.tile(-scores, (3, 1)), np.tile(scores, (3, 1)))


# --- Measures --------------------------------------------------------------------------------------


def test_auc_by_hand():
    positive = np.array([True, True, False, False])
    assert auc.roc_auc(np.array([4.0, 3, 2, 1]), positive) == 1
    assert auc.roc_auc(np.array([1.0, 2, 3, 4]), positive) == 0
    assert auc.roc_auc(np.array([3.0, 1, 2, 0]), positive) == 0.75
    assert auc.roc_auc(np.array([2.0, 1, 1, 0]), positive) == (1 + 1 + 0.5 + 1) / 4
    assert auc.roc_auc(np.ones(4), positive) == 0.5
    assert np.isnan(auc.roc_auc(np.ones(4), np.ones(4, bool)))
    assert np.isnan(auc.roc_auc(np.ones(0), np.ones(0, bool)))


@pytest.mark.parametrize("levels", [3, 10, 10**9])  # many ties, some, none
def test_auc_is_the_share_of_ordered_pairs(levels):
    rng = np.random.default_rng(levels)
    scores = rng.integers(0, levels, 80).astype(np.float32)
    positive = rng.random(80) < 0.3
    # Both are exact in float64 up to the final division.
    assert auc.roc_auc(scores, positive) == pytest.approx(auc_by_pairs(scores, positive), abs=1e-12)


def test_tokens_in_between_are_left_out():
    cases = [case([1, 0.24, 0.01, 0], [2, 9, -9, 1]), case([0.25, 0, 0, 0], [0, 3, 3, 3])]
    scores = [c.after[0] for c in cases]
    # Positives 2 and 0 against negatives 1, 3, 3, 3.
    assert routing.localisation_auc(cases, scores) == 1 / 8
    assert routing.localisation_auc(cases[:1], scores[:1]) == 1


def test_specificity_tells_the_category_from_anything_that_moves():
    label, others = [1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0]
    anything, right = [1, 1, 1, 1, 0, 0], [1, 1, 0.5, 0.5, 0.6, 0.7]
    alone = case([1, 0, 0, 0, 0, 0], [-5, 9, 9, 9, 9, 9])  # no other category: no part of it

    def measure(scores):
        cases = [case(label, scores, others=others), alone]
        return routing.specificity_auc(cases, [c.after[0] for c in cases])

    assert routing.localisation_auc([case(label, anything)], [np.array(anything)]) == 0.75
    assert measure(anything) == 0.5
    assert measure(right) == 1
    assert np.isnan(routing.specificity_auc([alone], [alone.after[0]]))


def test_localisation_means_leave_unmeasured_categories_out():
    cases = [
        case([1, 0], [1, 0], category=2),
        case([1, 0], [0, 0], category=4),
        case([0.2, 0], [1, 0], category=9),  # nothing covered
    ]
    result = routing.localisation(cases, PHENOMENA)
    assert [row["category"] for row in result["categories"]] == [PHENOMENA[e] for e in (2, 4, 9)]
    assert result["mean"]["auc_after"] == [0.75] * 3
    assert result["mean"]["auc_before"] == [0.25] * 3
    assert np.isnan(result["mean"]["specificity_after"]).all()
    assert [row["covered_tokens"] for row in result["categories"]] == [1, 1, 0]


def test_cases_of_a_clip():
    label = np.zeros((4, 17))
    label[:, 2], label[:, 5], label[:, 9] = [1, 0, 0, 0], [0, 0.5, 0, 0], [1, 1, 1, 1]
    present = np.zeros(17)
    present[[2, 5]] = 1  # 9 is labelled but not present
    before, after = np.random.default_rng(0).random((2, 3, 4, 17))
    first, second = routing.find_cases(label, present, before, after)
    assert (first.category, second.category) == (2, 5)
    np.testing.assert_array_equal(first.others, label[:, 5])
    np.testing.assert_array_equal(second.others, label[:, 2])
    np.testing.assert_array_equal(second.after, after[..., 5])
    np.testing.assert_array_equal(second.before, before[..., 5])


def test_expert_table():
    rho = np.array([[[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5]], [[0.3, 0.7]] * 4])
    label, present = np.zeros((2, 4, 17)), np.zeros((2, 17))
    label[0, :, 1] = [1, 0.25, 0.2, 0]
    label[:, :, 3] = 1  # not present
    present[0, 1] = 1
    table = routing.expert_table(rho, label, present, PHENOMENA)
    assert table.keys() == {PHENOMENA[1], "background"}
    np.testing.assert_allclose(table[PHENOMENA[1]], [0.75, 0.25])
    np.testing.assert_allclose(table["background"], [0.5, 0.5])  # not of the clip without labels


def test_semantic_correlation():
    logits = np.array([[1.0, 2, 3], [3, 2, 1], [3, 4, 5], [0, 9, 0]])
    category = np.zeros((4, 17))
    category[[0, 2], 4] = category[1, 7] = 1
    result = routing.semantic_correlation(logits, category, PHENOMENA)
    assert result["categories"] == [PHENOMENA[4], PHENOMENA[7]]
    np.testing.assert_allclose(result["correlation"], [[1, -1], [-1, 1]])
    only_4 = category * (np.arange(17) == 4)
    assert routing.semantic_correlation(logits, only_4, PHENOMENA)["correlation"] == [[1.0]]


def test_loss_comparison():
    without = np.array([[1.0, 2, 3], [3, 4, 5]])
    loss = without - [[0.1, 0.0, 0.0], [0.3, 0.0, 0.0]]
    rows = diffusion.compare(loss, without)
    assert [row["sigma"] for row in rows] == [0.2, 0.5, 0.8, "all"]
    assert rows[0]["difference"] == pytest.approx(-0.2)
    assert rows[0]["standard_error"] == pytest.approx(0.1)  # std 0.2 / sqrt 2 of two differences
    assert rows[0]["ratio"] == pytest.approx(0.9)
    assert rows[1]["ratio"] == 1 and rows[1]["difference"] == 0
    assert rows[3]["loss"] == pytest.approx(loss.mean())


def test_chosen_clips_show_many_categories():
    category = np.zeros((6, 17))
    for clip, categories in enumerate([(0,), (0, 1), (2, 3), (0, 1, 2), (4,), (5, 6, 7)]):
        category[clip, list(categories)] = 1
    assert pictures.choose_clips(category, (1, 2, 3, 1)) == [0, 2, 5, 4]
    assert pictures.choose_clips(category[:2], (3, 3, 3)) == [1, 0]
    assert pictures.choose_clips(np.zeros((3, 17)), (1, 2)) == [0, 1]


# --- The command -----------------------------------------------------------------------------------


def finished_run(config, workdir):
    """Leaves what a run leaves, with the parameters of step 0."""
    mesh = build.build_mesh(config.mesh)
    model = build.build_model(config, mesh)
    layout = build.place(model, mesh, config.frozen_dtype, optim.groups_of(config.optimizer))
    trainable, _ = optim.split(build.init_params(config, model, layout), optim.groups_of(config.optimizer))
    folders.claim_run(workdir, config, {})
    for part, tree in trainable.items():
        about = checkpoints.describe_part(folders.config_as_json(config), part, 0, {})
        checkpoints.save_params(os.path.join(workdir, part), tree, about)
    with open(os.path.join(workdir, "metrics.jsonl"), "w") as file:
        for step in range(5):
            line = {"step": step, "loss/diffusion": 1 / (step + 1), "loss/total": 2.0}
            file.write(json.dumps(line | ({"validation/loss": 1.0} if step == 4 else {})) + "\n")


def prepared(variant, tiny_data, workdir, **changes):
    config = get_config(variant)
    config.update_from_flattened_dict(changes)
    config.data.dir = tiny_data
    config.batch_size = 8  # one clip for each of the simulated devices
    config.samples.steps = 2
    finished_run(config, str(workdir))
    return config


@pytest.fixture(scope="module")
def measured(tiny_data, tmp_path_factory):
    """(config, workdir, metrics.json of a run at step 0)."""
    workdir = tmp_path_factory.mktemp("measured") / "run"
    config = prepared("tiny", tiny_data, workdir)
    evaluate.evaluate(config, str(workdir), str(workdir))
    return config, workdir, json.loads((workdir / "metrics.json").read_text(), parse_constant=pytest.fail)


def test_a_branch_at_step_0_changes_nothing(measured):
    _, _, results = measured
    assert results["split"] == "test" and results["clips"] == 8 and results["steps"] == 0
    assert list(results["diffusion"]) == ["val", "test"]
    for row in sum(results["diffusion"].values(), []):
        assert row["ratio"] == 1 and row["difference"] == 0  # to the bit
        assert row["loss"] > 0
    mean = results["localisation"]["mean"]
    assert mean["auc_before"] == mean["auc_after"]
    assert 0.9 < results["routers"]["refinement/mean_entropy"] <= 1
    assert set(results["semantic"]["categories"]) <= set(PHENOMENA)


def test_report_stands_alone(measured):
    _, workdir, results = measured
    text = (workdir / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', text)
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert "<script" not in text and "http" not in text
    assert len(text) < 8e6
    assert text.count("data:image/webp") >= 6 * 3  # sampled prompts, each three times
    for row in results["localisation"]["categories"]:
        assert row["category"] in text


def test_report_is_deterministic_and_escapes_captions(measured, tmp_path):
    config, _, results = measured
    clip = np.zeros((9, 32, 32, 3), np.uint8)
    bad = '<script>"a" & b</script>'
    for name in "ab":
        report.write(
            str(tmp_path / name),
            folders.config_as_json(config),
            results,
            [(bad, {"real clip": clip})],
            {"branch": [(bad, clip, [("collision", clip, clip, float("nan"))])]},
            {"The branch": [{"step": 1, "loss/diffusion": 1.0}, {"step": 2, "loss/diffusion": 0.5}]},
        )
    text = (tmp_path / "a").read_text()
    assert text == (tmp_path / "b").read_text()
    assert "<script" not in text and text.count("&lt;script&gt;&#34;a&#34; &amp; b") == 2


def test_report_says_what_missed_its_aim(measured, tmp_path):
    config, _, results = measured
    results = json.loads(json.dumps(results))
    results["localisation"]["mean"]["auc_after"][0] = 0.6
    results["routers"]["refinement/mean_entropy"] = 0.1
    results["diffusion"]["val"][-1] |= {"difference": 0.1, "standard_error": 0.01, "ratio": 1.1}
    path = str(tmp_path / "report.html")
    report.write(path, folders.config_as_json(config), results, [], {}, {})
    text = open(path).read()
    assert text.count('class="missed"') == 3 and text.count('class="met"') == 0


def words(path) -> str:
    """What a report says, in one line, without its configuration."""
    text = path.read_text().partition("<body>")[2].partition("<details>")[0]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


def test_a_report_of_one_clip_says_not_measured_and_why(measured, tmp_path):
    config, _, results = measured
    one = diffusion.compare(np.full((1, len(diffusion.SIGMAS)), 1.1), np.ones((1, len(diffusion.SIGMAS))))
    assert diffusion.no_worse(one[-1]) == "not measured"
    results = json.loads(json.dumps(results))
    results |= {"clips": 1, "steps": 1, "split": "val"}
    results |= {"diffusion": {"val": json.loads(json.dumps(one).replace("NaN", "null"))}}
    results["localisation"]["mean"]["auc_after"][0] = 0.6
    path = tmp_path / "report.html"
    report.write(str(path), folders.config_as_json(config), results, [("A ball.", {})], {}, {})
    text = words(path)
    assert text.count("not measured, too few validation clips (1).") == text.count("not measured") == 3
    assert 'class="missed"' not in path.read_text() and 'class="met"' not in path.read_text()
    assert "trained for 1 step, on the 1 clip (" in text and "The held-out prompt:" in text
    assert "\N{EN DASH}" not in text and "alike" not in text  # no numbers that there are not
    assert "No standard error: too few validation clips (1)." in text


def test_a_report_leaves_out_what_cannot_be_measured(measured, tmp_path):
    config, _, results = measured
    path, settings = tmp_path / "report.html", folders.config_as_json(config)

    def write(*without: str) -> str:
        """The words of a report whose AUC and specificity are known but for these."""
        changed = json.loads(json.dumps(results))
        rows, mean = changed["localisation"]["categories"], changed["localisation"]["mean"]
        for row in (*rows, mean):
            for key in ("auc", "specificity"):
                gone = key in without or (row is rows[0] and "first" in without)
                row |= {f"{key}_{when}": 3 * [None if gone else 0.7] for when in ("before", "after")}
        report.write(str(path), settings, changed, [], {}, {})
        return words(path)

    first = results["localisation"]["categories"][0]["category"]
    text = write()
    assert "specificity before" in text and "Left out" not in text
    text = write("specificity", "first")
    assert "specificity before" not in text and "(specificity)" not in text and "cannot be measured" in text
    assert f"Left out, with no token that is covered or none that is uncovered: {first}." in text
    assert "\N{EN DASH}" not in text
    text = write("specificity", "auc")
    assert "localisation was not measured" in text and "Finds where" not in text and "AUC" not in text


def test_most_and_least_alike_are_never_the_same_pair(measured, tmp_path):
    config, _, results = measured
    path, settings = tmp_path / "report.html", folders.config_as_json(config)
    for categories, listed in ((1, 0), (2, 0), (3, 1), (5, 3)):
        names, table = [f"c{i}" for i in range(categories)], np.eye(categories).tolist()
        changed = {**results, "semantic": {"categories": names, "correlation": table}}
        report.write(str(path), settings, changed, [], {}, {})
        text = words(path)
        assert ("Semantic router: " in text) == (categories > 1)  # one alone is like no other
        assert ("Most alike: " in text) == (listed > 0)
        assert len(re.findall(r"c\d and c\d", text)) == 2 * listed


def test_adapters_are_exported_read_again_and_sampled(tiny_data, tmp_path, capsys):
    config = prepared("tiny,lora+seb", tiny_data, tmp_path / "run")
    results = evaluate.evaluate(config, str(tmp_path / "run"), str(tmp_path / "out"))
    found = results["exported"]
    assert found["parts"] == ["lora"] and found["latents_differ_by"] < 1e-4
    assert "lora, exported and read again: latents differ by at most" in capsys.readouterr().out
    assert "exported and read again" in (tmp_path / "out" / "report.html").read_text()


def test_adapters_of_the_branch_are_measured_and_not_exported(tiny_data, tmp_path):
    targets = ("branch/blocks/.*attn/[qkvo]",)
    config = prepared("tiny,full+lora", tiny_data, tmp_path / "run", **{"parts.lora.targets": targets})
    assert "exported" not in evaluate.evaluate(config, str(tmp_path / "run"), str(tmp_path / "out"))


@pytest.mark.parametrize("ablation", [pytest.param("pb", marks=pytest.mark.slow), "pb+reb"])
def test_parts_that_do_not_exist_are_left_out(ablation, tiny_data, tmp_path):
    config = prepared(f"tiny,{ablation}", tiny_data, tmp_path / "run")
    results = evaluate.evaluate(config, str(tmp_path / "run"), str(tmp_path / "out"))
    text = (tmp_path / "out" / "report.html").read_text()
    assert "semantic" not in results and "Semantic router" not in text
    assert bool(results["localisation"]) == ("experts" in results) == ("reb" in ablation)
    assert ("no token routing" in text) == ("reb" not in ablation)
    assert ("Router health" in text) == (ablation != "pb")


def test_real_clips_have_no_labels_and_no_test_split(measured, tiny_data, tmp_path):
    config, workdir, _ = measured
    config = config.copy_and_resolve_references()
    config.data.dir = str(tmp_path / "data")
    shutil.copytree(tiny_data, config.data.dir)
    shutil.rmtree(tmp_path / "data" / "alignment")
    manifest = records.read_manifest(tmp_path / "data")
    del manifest["counts"]["test"]
    records.write_manifest(tmp_path / "data", manifest)
    results = evaluate.evaluate(config, str(workdir), str(tmp_path / "out"))
    assert results["split"] == "val" and results["localisation"] is None and "experts" not in results
    assert "no token labels" in (tmp_path / "out" / "report.html").read_text()


@pytest.fixture(scope="module")
def plain(tiny_data, tmp_path_factory):
    """(file of the configuration, workdir) of a finished run of a backbone without parts."""
    folder = tmp_path_factory.mktemp("plain")
    file = folder / "plain.py"
    file.write_text(f"""
from configs import wan

def get_config():
    config = wan.tiny()
    config.parts, config.losses = {{}}, {{}}
    config.optimizer.groups = (("backbone/", 1e-3),)
    config.data.dir = {tiny_data!r}
    config.steps, config.batch_size, config.samples.steps = 3, 8, 2
    config.validation.batch_size = 8  # all clips
    return config
""")
    spec = importlib.util.spec_from_file_location("plain", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    train.train(module.get_config(), str(folder / "run"))
    return file, folder / "run"


def test_a_backbone_without_parts(plain, tmp_path):
    """Through the command. The loss is what the run itself measured at its end; nothing speaks of parts."""
    file, workdir = plain
    command = [sys.executable, "-m", "prophy_jax.evaluate", f"--config={file}", f"--workdir={workdir}"]
    subprocess.run([*command, f"--out={tmp_path}"], cwd=ROOT, check=True)
    results = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert set(results) == {"split", "clips", "steps", "sigmas", "diffusion"}
    assert results["steps"] == 3 and list(results["diffusion"]) == ["val", "test"]
    for row in sum(results["diffusion"].values(), []):
        assert set(row) == {"sigma", "loss"} and row["loss"] > 0
    validated = metrics.read_metrics(str(workdir))[-1]
    for row in results["diffusion"]["val"]:
        name = "loss" if row["sigma"] == "all" else f"sigma_{row['sigma']:g}"
        assert row["loss"] == pytest.approx(validated[f"validation/{name}"], rel=1e-5)
    text = (tmp_path / "report.html").read_text()
    assert text.count("data:image/webp") == 6 * 2  # sampled prompts, and the real clips
    assert "Diffusion loss" in text and "Training" in text and "Configuration" in text
    for word in ("branch", "routing", "Localisation", "Router", "without"):
        assert word not in text.partition("<details>")[0]


def test_parts_without_measures_of_their_own(measured, tmp_path, monkeypatch):
    config, workdir, results = measured
    monkeypatch.setattr(evaluation, "MEASURES", {})
    found = evaluate.evaluate(config, str(workdir), str(tmp_path))
    assert found == {key: results[key] for key in ("split", "clips", "steps", "sigmas", "diffusion")}
    text = (tmp_path / "report.html").read_text()
    assert "better or worse with the branch" in text and "Localisation" not in text
    assert text.count("data:image/webp") == 6 * 3


def test_refusals(measured, tmp_path):
    config, workdir, _ = measured

    def refuses(match, folder=workdir, **changes):
        changed = config.copy_and_resolve_references()
        for path, value in changes.items():
            part, _, key = path.rpartition("__")
            setattr(changed[part] if part else changed, key, value)
        with pytest.raises(UserError, match=match):
            evaluate.evaluate(changed, str(folder), str(tmp_path / "out"))

    refuses("config.json is missing: name the --workdir of a run", tmp_path / "nothing")
    shutil.copytree(workdir, tmp_path / "unfinished", ignore=shutil.ignore_patterns("branch"))
    refuses(
        r"unfinished holds \[.backbone.\], .* trains \[.branch.\] as well: .* train it to the end",
        tmp_path / "unfinished",
    )
    refuses("parts.branch was .*layers.*, is None", parts={})
    refuses("backbone.num_heads was 2, is 3", backbone__num_heads=3)
    refuses("no training data at nowhere", data__dir="nowhere")
    checkpoints.save_params(str(tmp_path / "backbone"), {"a": np.zeros(2)}, {})
    refuses("not the backbone that", backbone_params=str(tmp_path / "backbone"))
    assert not (tmp_path / "out").exists()


def test_command_answers_in_one_line(tmp_path):
    command = ["prophy_jax.evaluate", "--config=configs/wan.py:tiny"]
    for more, message in (([], "--workdir"), ([f"--workdir={tmp_path}"], "config.json is missing")):
        result = run_here(*command, *more)
        assert result.returncode == 1
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        assert message in result.stderr
