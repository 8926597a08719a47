"""The categories of clips: their names and questions, from a file, and the parser of annotation text.

taxonomy.toml has the 17 physical phenomena of WISA-80K; `config.data.taxonomy` names another such file.
Index e of every category vector, mask and alignment map means `names[e]` of the taxonomy.

WISA (arXiv 2503.08153) asks three questions per clip: q0 dynamics, q1 thermodynamics, q2 optics.
E categories.
"""

import functools
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prophy_jax.run.errors import UserError

QUESTIONS = ("q0", "q1", "q2")  # fields of WISA-80K's annotation


@dataclass(frozen=True)
class Taxonomy:
    """Categories in their order; see `read`.

    Attributes:
        questions: name -> what a vision-language model is asked about it.
        background: what it is asked about every clip.
        groups: name -> indices of its categories; {}: there are none.
        where: the file, for messages.
    """

    questions: Mapping[str, str]
    background: str
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    where: str = ""

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Of the categories, in their order."""
        return tuple(self.questions)

    @functools.cached_property
    def index(self) -> dict[str, int]:
        """Name -> its place in every category vector."""
        return {name: index for index, name in enumerate(self.questions)}

    @functools.cached_property
    def _by_normal_form(self) -> dict[str, str]:
        return {_normal_form(name): name for name in self.questions}

    def multi_hot(self, names: Iterable[str]) -> np.ndarray:
        """(E,) float32 with ones at the named categories. Raises KeyError on a name that is none of them."""
        vector = np.zeros(len(self.index), np.float32)
        for name in names:
            vector[self.index[name]] = 1.0
        return vector

    def parse_labels(self, text: str) -> tuple[list[str], list[str]]:
        """Splits one answer ("deformation, collision") into (known categories, what was not understood).

        Case, spaces, list numbers, full stops, "&" and singular or plural do not matter. "none", "no"
        and "no obvious ... phenomenon" are valid empty answers. Whatever is left over is returned,
        never dropped.
        """
        names = self._by_normal_form
        known: list[str] = []
        unknown: list[str] = []
        for part in re.split(_SEPARATORS, text):
            label = _normal_form(part)
            if _says_none(label):
                continue
            if label not in names:
                unknown.append(part.strip())
            elif names[label] not in known:
                known.append(names[label])
        return known, unknown

    def check(self, manifest: Mapping[str, Any], folder: str | Path) -> None:
        """Raises UserError unless prepared data, labels or a trained part are of these categories."""
        if (was := names_of(manifest)) != self.names:
            raise UserError(
                f"{folder} has {describe(was)}, but {self.where} of the configuration has "
                f"{describe(self.names)}: name the file of those with --config.data.taxonomy=FILE, or make "
                "the folder again"
            )


_SEPARATORS = r"[,;\n]"


def _normal_form(label: str) -> str:
    """Lower case, single spaces, no list number or full stop, every word in the singular."""
    label = re.sub(r"^\s*\d+[.)]\s*", "", label.lower()).strip().rstrip(".").replace("&", " and ")
    return " ".join(re.sub(r"(?<=[^s])s$", "", word) for word in label.split())


def _says_none(label: str) -> bool:
    return label in ("", "no", "none") or label.startswith("no ")


def describe(names: Iterable[str]) -> str:
    """Categories as messages list them."""
    names = tuple(names)
    return f"{len(names)} categories ({', '.join(names)})"


def names_of(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """The categories that a manifest states; earlier versions, which state none, knew WISA's alone."""
    return tuple(manifest.get("categories") or WISA.names)


def of(config: Mapping[str, Any]) -> Taxonomy:
    """The one that a configuration names, WISA's by default. Raises UserError as `read`."""
    path = config.get("data", {}).get("taxonomy", "")
    return read(path) if path else WISA


def read(path: str | Path) -> Taxonomy:
    """Reads a file of the form of taxonomy.toml. Raises UserError with what is wrong in it."""
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read the categories of {path}: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or not TOML: with its line
        raise UserError(f"{path} is not a TOML file of categories: {error}") from error
    questions, groups = table.get("categories"), table.get("groups", {})
    background = table.get("background", "" if path == _WISA else WISA.background)
    problems = [f"it has {key!r}" for key in table if key not in ("categories", "groups", "background")]
    if not isinstance(questions, dict) or not questions:
        raise UserError(f'{path} has no table [categories] of lines such as "pouring" = "What is poured?"')
    problems += [
        f"the question of {name!r} is no text" for name in questions if type(questions[name]) is not str
    ]
    if not isinstance(background, str):
        problems.append("background is no text")
    if not isinstance(groups, dict):
        problems.append("groups is no table")
        groups = {}
    seen: dict[str, str] = {}
    for name in questions:
        form = _normal_form(name)
        if _says_none(form) or re.search(_SEPARATORS, name) or name != " ".join(name.split()):
            problems.append(
                f'{name!r} cannot be a name: lists separate names by commas, and "no" and "none" mean none'
            )
        elif form in seen:
            problems.append(f"{name!r} and {seen[form]!r} are read as one name")
        seen[form] = name
    for group, members in groups.items():
        members = members if isinstance(members, list) else [members]
        strange = [name for name in members if not isinstance(name, str) or name not in questions]
        problems += [f"{name!r} of group {group!r} is no category" for name in strange]
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    asked = {name: text or f"This video shows: {name}. Describe where it is and how it shows."
             for name, text in questions.items()}  # fmt: skip
    indices = {group: tuple(list(questions).index(name) for name in own) for group, own in groups.items()}
    return Taxonomy(asked, background, indices, str(path))


_WISA = Path(__file__).with_name("taxonomy.toml")
WISA = read(_WISA)
PHENOMENA, multi_hot = WISA.names, WISA.multi_hot  # what the physics sandbox shows
