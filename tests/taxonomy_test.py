"""The 17 phenomena and the parser of annotation text."""

import numpy as np
import pytest

from prophy_jax import build, train
from prophy_jax.data import loader, records, taxonomy
from prophy_jax.data.sources import video
from prophy_jax.prepare import prepare
from prophy_jax.run import checkpoints
from prophy_jax.run.errors import UserError
from tests.conftest import get_config


def test_order_and_groups():
    assert len(taxonomy.PHENOMENA) == len(set(taxonomy.PHENOMENA)) == len(taxonomy.WISA.names) == 17
    assert taxonomy.PHENOMENA[0] == "collision"
    assert taxonomy.PHENOMENA[16] == "unnatural light source"
    assert [i for group in taxonomy.WISA.groups.values() for i in group] == list(range(17))
    optics = [taxonomy.PHENOMENA[i] for i in taxonomy.WISA.groups["optics"]]
    assert optics[:3] == ["reflection", "refraction", "scattering"]


def test_multi_hot():
    vector = taxonomy.multi_hot(["melting", "collision"])
    assert vector.dtype == np.float32 and np.flatnonzero(vector).tolist() == [0, 6]
    with pytest.raises(KeyError):
        taxonomy.multi_hot(["rainbow"])


@pytest.mark.parametrize("name", taxonomy.PHENOMENA)
def test_every_phenomenon_is_recognised_in_its_variants(name):
    for text in (name, f" {name.title()} ", f"2. {name}.", f"{name}s", name.replace("and", "&")):
        assert taxonomy.WISA.parse_labels(text) == ([name], []), text


@pytest.mark.parametrize(
    ("text", "known", "unknown"),
    [
        ("deformation, collision", ["deformation", "collision"], []),
        ("1. reflection\n2. Refraction", ["reflection", "refraction"], []),
        ("melting; melting", ["melting"], []),
        ("no obvious thermodynamic phenomenon.", [], []),
        ("No optical phenomenon", [], []),
        ("none", [], []),
        ("", [], []),
        ("collision, Rainbow ", ["collision"], ["Rainbow"]),
        ("Solid Objects Appearance", [], ["Solid Objects Appearance"]),
        # Whole labels only: a substring match would read "explosion" here.
        ("explosion-proof glass", [], ["explosion-proof glass"]),
    ],
)
def test_parse_labels(text, known, unknown):
    assert taxonomy.WISA.parse_labels(text) == (known, unknown)


# --- Categories of one's own -----------------------------------------------------------------------

OWN = """
background = "Describe the kitchen."
[categories]
pouring = "Where is something poured?"
"cutting up" = ""
boiling = "Where does it boil?"
"""


def write(folder, text):
    (folder / "own.toml").write_text(text)
    return folder / "own.toml"


def test_a_file_of_categories(tmp_path):
    own = taxonomy.read(write(tmp_path, OWN + '[groups]\nheat = ["boiling"]'))
    assert own.names == ("pouring", "cutting up", "boiling") and own.groups == {"heat": (2,)}
    assert own.background == "Describe the kitchen." and own.questions["pouring"].startswith("Where is")
    assert "cutting up" in own.questions["cutting up"] and "where" in own.questions["cutting up"]
    assert own.multi_hot(["boiling"]).tolist() == [0, 0, 1]
    assert own.parse_labels("Cutting up, melting") == (["cutting up"], ["melting"])
    assert taxonomy.read(write(tmp_path, '[categories]\na = ""')).background == taxonomy.WISA.background


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[categories", "own.toml is not a TOML file of categories: Expected ']' at the end"),
        ("", r"has no table \[categories\]"),
        ("[categories]", r"has no table \[categories\]"),
        ("[categories]\na = 1", "question of 'a' is no text"),
        ('[categories]\n"a, b" = ""', "'a, b' cannot be a name"),
        ('[categories]\nNone = ""', "'None' cannot be a name"),
        ('[categories]\nspill = ""\nSpills = ""', "'Spills' and 'spill' are read as one name"),
        ('[categories]\na = ""\n[groups]\ng = ["b", 1]', "'b' of group 'g' is no category; 1 of"),
        ('[names]\n[categories]\na = ""', "it has 'names'"),
    ],
)
def test_wrong_files_of_categories(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        taxonomy.read(write(tmp_path, text))
    with pytest.raises(UserError, match="cannot read the categories of .*none.toml"):
        taxonomy.read(tmp_path / "none.toml")


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    """The smallest configuration with three categories, and data prepared by it."""
    folder = tmp_path_factory.mktemp("own")
    lines = ["video,caption,category"]
    for index, shown in enumerate(("pouring", "cutting up, boiling", "rainbow", "boiling") * 3):
        frames = np.random.default_rng(index).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
        video.write_mp4(folder / f"{index}.mp4", frames, 8)
        lines.append(f'{index}.mp4,a caption,"{shown}"')
    (folder / "clips.csv").write_text("\n".join(lines))
    config = get_config("tiny")
    config.data.update(dir=str(folder / "data"), taxonomy=str(write(folder, OWN)), val_share=0.25)
    prepare(config, [folder / "clips.csv"])
    return config


def test_data_of_own_categories(own_data):
    manifest = records.read_manifest(own_data.data.dir)
    assert manifest["categories"] == ["pouring", "cutting up", "boiling"]
    [(label, found)] = manifest["labels_not_understood"].items()
    assert label == 'category: "rainbow"' and found["clips"] == 3
    rows = []
    for split in ("train", "val"):
        for batch in loader.read_once(own_data.data, split, 1, ["category", "alignment"]):
            rows.append(batch["category"][0].tolist())
            assert batch["alignment"].shape == (1, 48, 3)
    assert sorted(rows)[::3] == [[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 0, 0]]
    with pytest.raises(UserError, match="the physics sandbox shows phenomena of WISA-80K, not.*own.toml"):
        prepare(own_data, out=f"{own_data.data.dir}-other")


def test_labels_of_other_categories_are_refused(own_data, tmp_path):
    manifest = records.read_manifest(own_data.data.dir)
    labels = {"data_fingerprint": manifest["fingerprint"], "categories": ["a", "b", "c"]}
    records.write_manifest(tmp_path, labels)
    both = r"has 3 categories \(a, b, c\), .* has 3 categories \(pouring, cutting up, boiling\)"
    with pytest.raises(UserError, match=both):
        loader.make_loader(own_data.data.dir, "train", 1, 0, side={"alignment": str(tmp_path)})


def test_a_model_of_other_categories_than_the_data(own_data, tmp_path):
    model = build.build_model(own_data)
    branch = model.parts["branch"]
    assert branch.refinement.categories == branch.semantic.experts == 3
    other = own_data.copy_and_resolve_references()
    other.data.taxonomy = ""
    both = r"has 3 categories \(pouring, cutting up, boiling\), but .*taxonomy.toml .* 17 .*\(collision"
    with pytest.raises(UserError, match=both):
        build.check_data(other, model, build.build_losses(other, model))


@pytest.mark.slow
def test_a_branch_of_own_categories_trains_and_knows_them(own_data, tmp_path):
    config = own_data.copy_and_resolve_references()
    config.update(batch_size=8, steps=1)
    train.train(config, str(tmp_path / "run"))
    manifest = checkpoints.read_manifest(str(tmp_path / "run" / "branch"), "")
    assert manifest["categories"] == ["pouring", "cutting up", "boiling"]
    assert manifest["shapes"]["refinement/align/kernel"][0] == [64, 3]


def test_numbers_that_are_not_those_of_the_categories():
    config = get_config("tiny")
    config.parts.branch.refinement.categories = 20
    with pytest.raises(UserError, match=r"refinement.categories=20 .* the data have 17 \(collision"):
        build.build_model(config)
    config.parts.branch.refinement.categories = 17
    assert build.build_model(config).parts["branch"].refinement.categories == 17
    config = get_config("tiny,bce")
    config.parts.branch.semantic.experts = 5
    model = build.build_model(config)
    with pytest.raises(UserError, match="loss .bce.: semantic.experts=5, the clips have 17 categories"):
        build.check_shapes(model, build.build_losses(config, model), build.sizes(config, model))
