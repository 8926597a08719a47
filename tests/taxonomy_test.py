"""The 17 phenomena and the parser of annotation text."""

import numpy as np
import pytest

from prophy_jax.data import taxonomy


def test_order_and_groups():
    assert len(taxonomy.PHENOMENA) == len(set(taxonomy.PHENOMENA)) == taxonomy.NUM_PHENOMENA == 17
    assert taxonomy.PHENOMENA[0] == "collision"
    assert taxonomy.PHENOMENA[16] == "unnatural light source"
    assert [i for group in taxonomy.GROUPS.values() for i in group] == list(range(17))
    optics = [taxonomy.PHENOMENA[i] for i in taxonomy.GROUPS["optics"]]
    assert optics[:3] == ["reflection", "refraction", "scattering"]


def test_multi_hot():
    vector = taxonomy.multi_hot(["melting", "collision"])
    assert vector.dtype == np.float32 and np.flatnonzero(vector).tolist() == [0, 6]
    with pytest.raises(KeyError):
        taxonomy.multi_hot(["rainbow"])


@pytest.mark.parametrize("name", taxonomy.PHENOMENA)
def test_every_phenomenon_is_recognised_in_its_variants(name):
    for text in (name, f" {name.title()} ", f"2. {name}.", f"{name}s", name.replace("and", "&")):
        assert taxonomy.parse_labels(text) == ([name], []), text


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
    assert taxonomy.parse_labels(text) == (known, unknown)
