"""Claimed folders, what a configuration decides, and files that are whole or not there."""

import json
import threading

import pytest

from configs import cogvideox
from prophy_jax.run import checksums, workdir
from prophy_jax.run.errors import UserError
from tests.conftest import get_config

OWN = {"size": 1, "clips": ["a"]}


def _names(folder):
    return sorted(path.name for path in folder.rglob("*"))


# --- Identity ----------------------------------------------------------------------------------------


def test_differences():
    assert workdir.differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 1}, "c": 2}) == ""
    found = workdir.differences({"a": {"b": 1, "d": 3}, "c": 2}, {"a": {"b": 2, "d": 3}, "e": {}})
    assert found == "a.b was 1, is 2; c was 2, is None; e was None, is {}"


@pytest.mark.parametrize(
    "scope, key, value",
    [
        ("train", "seed", 7),
        ("train", "data.fps", 4),
        ("model", "losses.relative", 0.5),
        ("data", "data.max_upscale", 1.0),
        ("data", "codec.module", "other"),
        ("clips", "samples.steps", 9),
        ("clips", "data.frames", 5),
        ("labels", "label.cell", 3),
    ],
)
def test_keys_that_decide(scope, key, value):
    config = get_config("tiny")
    before = workdir.run_identity(config, scope)
    config.update_from_flattened_dict({key: value})
    different = workdir.differences(before, workdir.run_identity(config, scope))
    assert different.startswith(f"{key} was ") and different.endswith(f"is {value}")


@pytest.mark.parametrize(
    "scope, key, value",
    [
        ("train", "log.every", 7),
        ("train", "samples.steps", 7),
        ("train", "label.cell", 7),
        ("model", "steps", 7),
        ("model", "data.fps", 7),
        ("data", "data.shard", 7),
        ("data", "losses.relative", 0.5),
        ("clips", "objective.shift", 1.0),
        ("clips", "data.dir", "elsewhere"),
        ("labels", "label.batch", 7),
    ],
)
def test_keys_that_do_not_decide(scope, key, value):
    config = get_config("tiny")
    before = workdir.run_identity(config, scope)
    config.update_from_flattened_dict({key: value})
    assert workdir.run_identity(config, scope) == before


def test_configurations_saved_before_parts_and_side_data_sets():
    old = {"branch": {"layers": [0, 1]}, "data": {"dir": "d", "labels": "l"}, "seed": 0}
    new = {
        "parts": {"branch": {"module": "prophy", "layers": [0, 1]}},
        "data": {"dir": "d", "side": {"alignment": "l"}},
        "seed": 0,
    }
    assert workdir.run_identity(old, "train") == workdir.run_identity(new, "train") == new
    alone = {"branch": None, "data": {"labels": ""}}
    assert workdir.run_identity(alone, "train") == {"parts": {}, "data": {"side": {"alignment": ""}}}
    assert "branch" in old  # it is not changed itself


def test_learning_rates_were_once_in_the_groups():
    config = get_config("demo")
    old = workdir.config_as_json(config)
    del old["optimizer"]["learning_rates"]
    old["optimizer"]["groups"] = [
        ["branch/blocks/", 1e-4],
        ["branch/exits/", 1e-4],
        ["branch/", 1e-3],
        ["backbone/", None],
    ]
    assert workdir.run_identity(old, "train") == workdir.run_identity(config, "train")
    config.optimizer.learning_rates.branch = 1e-2  # another rate is the same run, and no rate is another
    assert workdir.run_identity(old, "train") == workdir.run_identity(config, "train")
    config.optimizer.learning_rates.branch = 0.0
    assert "optimizer.groups was" in workdir.differences(
        *(workdir.run_identity(one, "train") for one in (old, config))
    )


def test_the_number_of_categories_was_once_said_of_the_branch():
    """It follows from data.taxonomy, which is empty by default."""
    old = get_config("tiny")
    old.parts.branch.refinement.categories = 17
    del old.data.taxonomy
    assert workdir.run_identity(old, "train") == workdir.run_identity(get_config("tiny"), "train")
    own = get_config("tiny")
    own.data.taxonomy = "own.toml"
    before, after = (workdir.run_identity(config, "train") for config in (old, own))
    assert workdir.differences(before, after) == "data.taxonomy was None, is own.toml"


def test_data_from_before_clips_could_be_encoded_whole_were_encoded_in_pieces():
    own = cogvideox.get_config("")
    old = own.copy_and_resolve_references()
    del old.codec.encode_whole
    before = workdir.run_identity(old, "data")
    assert workdir.run_identity(own, "data") == before  # a plan of prepare is compared exactly
    own.codec.encode_whole = True
    after = workdir.run_identity(own, "data")
    assert workdir.differences(before, after) == "codec.encode_whole was None, is True"


def test_a_run_that_was_claimed_before_is_claimed_and_read(tmp_path):
    config = workdir.config_as_json(get_config("tiny"))
    parts = config.pop("parts", None) or {"branch": config.pop("branch", None)}
    parts["branch"].pop("module", None)
    labels = config["data"].pop("side", {}).get("alignment", config["data"].pop("labels", ""))
    old = {**config, "branch": parts["branch"], "data": {**config["data"], "labels": labels}}
    (tmp_path / "config.json").write_text(json.dumps({"config": old, "references": {"x_sha256": "1"}}))
    before = (tmp_path / "config.json").read_bytes()
    workdir.claim_run(tmp_path, get_config("tiny"), {"x_sha256": "1"})
    assert (tmp_path / "config.json").read_bytes() == before
    run = workdir.read_run(tmp_path)
    assert run["references"] == {"x_sha256": "1"} and "branch" not in run["config"]
    assert run["config"]["parts"]["branch"] == {"module": "prophy", **parts["branch"]}
    with pytest.raises(UserError, match="config.data.side.x was .*x_sha256 1, now 2.*name another --workdir"):
        workdir.claim_run(tmp_path, get_config("tiny"), {"x_sha256": "2"})
    other = get_config("tiny")
    other.seed = 7
    with pytest.raises(UserError, match="config.seed was 0, is 7"):
        workdir.claim_run(tmp_path, other, {"x_sha256": "1"})
    with pytest.raises(UserError, match="config.json is missing: name the --workdir of a run"):
        workdir.read_run(tmp_path / "other")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"config": {}, "references": 3}',
        '{"config": {"losses": 5}, "references": {}}',
        '{"config": {"parts": [1]}, "references": {}}',
        '{"config": {"parts": {"branch": {"refinement": 3}}}, "references": {}}',
        '{"config": {"optimizer": {"learning_rates": {"a": 1}, "groups": [3]}}, "references": {}}',
        '{"config": {"data": {"side": []}, "optimizer": []}, "references": {}}',
        '{"config": {"seed": ' + "7" * 5000 + '}, "references": {}}',
    ],
)
def test_a_damaged_configuration_of_a_run_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    for use in (workdir.read_run, lambda folder: workdir.claim_run(folder, get_config("tiny"), {})):
        with pytest.raises(UserError, match="config.json .*: name another --workdir"):
            use(tmp_path)


# --- Claiming a folder -------------------------------------------------------------------------------


def test_a_folder_is_claimed_once_and_again(tmp_path):
    for _ in range(2):
        assert workdir.claim(tmp_path / "new", "a/plan.json", OWN, "--out") == OWN
    assert _names(tmp_path) == ["a", "new", "plan.json"]
    with pytest.raises(UserError, match="a/plan.json says.*size was 1, is 2.*name another --out"):
        workdir.claim(tmp_path / "new", "a/plan.json", {**OWN, "size": 2}, "--out")
    assert _read(tmp_path / "new" / "a" / "plan.json") == OWN


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "deep" / "down").mkdir(parents=True)
    (tmp_path / "deep" / "down" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not empty and holds no plan.json: name another --workdir"):
        workdir.claim(tmp_path, "plan.json", OWN, "--workdir")
    assert _names(tmp_path) == ["deep", "down", "thesis.tex"]
    with pytest.raises(UserError, match="thesis.tex is not a folder: name another --out"):
        workdir.claim(tmp_path / "deep" / "down" / "thesis.tex", "plan.json", OWN, "--out")


def test_what_a_killed_process_left_of_its_claim_does_not_matter(tmp_path):
    (tmp_path / ".plan.json.1a2b").write_text("{")
    assert workdir.claim(tmp_path, "plan.json", OWN, "--out") == OWN


def _read(path):
    return checksums.unsealed(json.loads(path.read_text()), str(path), "")


def test_a_damaged_claim_is_named(tmp_path):
    workdir.claim(tmp_path / "new", "plan.json", OWN, "--out")
    path = tmp_path / "new" / "plan.json"
    path.write_text(path.read_text().replace('"size": 1', '"size": 2'))
    with pytest.raises(UserError, match="plan.json is damaged .*name another --out"):
        workdir.claim(tmp_path / "new", "plan.json", OWN, "--out")
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(UserError, match="plan.json is not a readable .*name another --out"):
        workdir.claim(tmp_path, "plan.json", OWN, "--out")


def test_of_processes_at_once_one_decides(tmp_path):
    start, claimed, refused = threading.Barrier(8), [], []

    def claim(size):
        start.wait()
        try:
            claimed.append(workdir.claim(tmp_path / "out", "plan.json", {"size": size}, "--out"))
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=claim, args=[size % 2]) for size in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == len(refused) == 4 and all(one == claimed[0] for one in claimed)
    assert all("made differently" in message for message in refused)
    assert _names(tmp_path) == ["out", "plan.json"]


def test_what_a_folder_holds_may_grow(tmp_path):
    def shared(stored, own):
        return workdir.differences({"size": stored["size"]}, {"size": own["size"]})

    def both(stored, own):
        return {
            **own,
            "clips": stored["clips"] + [clip for clip in own["clips"] if clip not in stored["clips"]],
        }

    for clips, expected in ((["a"], ["a"]), (["b"], ["a", "b"]), (["a"], ["a", "b"])):
        own = {"size": 1, "clips": clips}
        found = workdir.claim(tmp_path, "plan.json", own, "--out", compare=shared, add=both)
        assert found == _read(tmp_path / "plan.json") == {"size": 1, "clips": expected}


def test_what_a_run_reads_may_move_but_not_change(tmp_path):
    config = get_config("tiny")
    config.data.side.alignment = "labels"
    first = {"data_sha256": "1", "alignment_sha256": "2", "backbone_sha256": "3"}
    workdir.claim_run(tmp_path, config, first)
    config.data.dir, config.data.side.alignment, config.backbone_params = "moved", "there", "too"
    workdir.claim_run(tmp_path, config, first)
    for name, key in (
        ("data", "data.dir"),
        ("alignment", "data.side.alignment"),
        ("backbone", "backbone_params"),
    ):
        with pytest.raises(UserError, match=f"config.{key} was .*, is .*{name}_sha256 .*, now 9"):
            workdir.claim_run(tmp_path, config, {**first, f"{name}_sha256": "9"})
    # A run that an earlier version began noted the backbone alone.
    (tmp_path / "config.json").unlink()
    workdir.claim_run(tmp_path, config, {"backbone_sha256": "3"})
    other = config.copy_and_resolve_references()
    other.data.dir = "elsewhere"
    with pytest.raises(UserError, match="config.data.dir was moved, is elsewhere"):
        workdir.claim_run(tmp_path, other, first)
    workdir.claim_run(tmp_path, config, first)
    workdir.claim_run(tmp_path, other, first)  # noted by now


def test_what_may_change_in_a_run_is_noted_and_the_rest_is_refused(tmp_path):
    config = get_config("tiny")
    assert workdir.claim_run(tmp_path, config, {}) == ""
    assert workdir.claim_run(tmp_path, config, {}) == ""
    (tmp_path / "checkpoints" / "6").mkdir(parents=True)
    steps, config.steps = config.steps, 12
    config.losses.balance = 0.5
    config.optimizer.learning_rates.branch = 1e-5
    changed = workdir.claim_run(tmp_path, config, {})
    assert f"steps was {steps}, is 12" in changed and "losses.balance was" in changed
    run = workdir.read_run(tmp_path)
    assert run["history"] == [{"step": 6, "changed": changed}] and run["config"]["steps"] == 12
    assert workdir.claim_run(tmp_path, config, {}) == ""
    config.log.every = 3
    assert workdir.claim_run(tmp_path, config, {}).startswith("log.every was")
    assert len(workdir.read_run(tmp_path)["history"]) == 2
    for key, value in (
        ("batch_size", 3),
        ("seed", 5),
        ("backbone.num_layers", 9),
        ("reduction.relative", "mean"),
    ):
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict({key: value})
        with pytest.raises(UserError, match=f"config.{key} was .*, is {value}"):
            workdir.claim_run(tmp_path, other, {})


def test_what_a_run_began_with_stays(tmp_path):
    config = get_config("tiny")
    workdir.claim_run(tmp_path, config, {"init_branch_sha256": "1"})
    workdir.claim_run(tmp_path, config, {})  # it resumes
    with pytest.raises(UserError, match="init_branch_sha256 1, now 2"):
        workdir.claim_run(tmp_path, config, {"init_branch_sha256": "2"})
    with pytest.raises(UserError, match="it did not begin with --init of backbone"):
        workdir.claim_run(tmp_path, config, {"init_backbone_sha256": "2"})


def test_adapters_of_runs_that_did_not_say_how_they_are_scaled():
    part = {"module": "lora", "rank": 4, "alpha": 2.0}
    was, own, other = (workdir.identify_part(part | more) for more in (
        {}, {"rank_stabilized": False}, {"rank_stabilized": True}
    ))  # fmt: skip
    assert was == own != other
