"""The 17 physical phenomena of WISA-80K, in WISA's order, and the parser of its annotation text.

WISA (arXiv 2503.08153) asks three questions per clip: q0 dynamics, q1 thermodynamics, q2 optics.
Index e in 0..16 of every category vector, mask and alignment map means `PHENOMENA[e]`.
"""

import re

import numpy as np

PHENOMENA = (
    "collision",
    "rigid body motion",
    "elastic motion",
    "liquid motion",
    "gas motion",
    "deformation",
    "melting",
    "solidification",
    "vaporization",
    "liquefaction",
    "explosion",
    "combustion",
    "reflection",
    "refraction",
    "scattering",
    "interference and diffraction",
    "unnatural light source",
)
NUM_PHENOMENA = len(PHENOMENA)
INDEX = {name: index for index, name in enumerate(PHENOMENA)}
GROUPS = {"dynamics": range(0, 6), "thermodynamics": range(6, 12), "optics": range(12, 17)}
QUESTIONS = ("q0", "q1", "q2")  # one per group


def multi_hot(names: list[str]) -> np.ndarray:
    """(17,) float32 with ones at the named phenomena. Raises KeyError on a name outside the 17."""
    vector = np.zeros(NUM_PHENOMENA, np.float32)
    for name in names:
        vector[INDEX[name]] = 1.0
    return vector


def _normal_form(label: str) -> str:
    """Lower case, single spaces, no list number or full stop, every word in the singular."""
    label = re.sub(r"^\s*\d+[.)]\s*", "", label.lower()).strip().rstrip(".").replace("&", " and ")
    return " ".join(re.sub(r"(?<=[^s])s$", "", word) for word in label.split())


_BY_NORMAL_FORM = {_normal_form(name): name for name in PHENOMENA}


def parse_labels(text: str) -> tuple[list[str], list[str]]:
    """Splits one answer ("deformation, collision") into (known phenomena, what was not understood).

    Case, spaces, list numbers, full stops, "&" and singular or plural do not matter. "none", "no"
    and "no obvious ... phenomenon" are valid empty answers. Whatever is left over is returned,
    never dropped.
    """
    known: list[str] = []
    unknown: list[str] = []
    for part in re.split(r"[,;\n]", text):
        label = _normal_form(part)
        if label in ("", "no", "none") or label.startswith("no "):
            continue
        if label in _BY_NORMAL_FORM:
            if _BY_NORMAL_FORM[label] not in known:
                known.append(_BY_NORMAL_FORM[label])
        else:
            unknown.append(part.strip())
    return known, unknown
