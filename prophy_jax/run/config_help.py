"""What every key of a configuration means: `--print_config` of every command.

config_keys.toml has the keys that the commands read. The arguments of what a configuration names by `module=`
are explained where they are declared: in the docstring of its `build` function ("Args:") or of the
dataclasses of its file ("Attributes:"). A loss is explained by the docstring of its `share` or `whole`.
"""

import dataclasses
import fnmatch
import functools
import inspect
import re
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

MEANINGS = tomllib.loads(Path(__file__).with_name("config_keys.toml").read_text(encoding="utf-8"))
PACKAGES = {
    "objective": "prophy_jax.diffusion",
    "evaluators": "prophy_jax.evaluation",
}  # of `module=`; others are in prophy_jax.models


def describe(config: ConfigDict) -> str:
    """One line for each key of `config`: its value and what it means."""
    lines = [(f"{key} = {value!r}", find_meaning(config, key)) for key, value in list_keys(config)]
    width = min(48, max(len(setting) for setting, _ in lines))
    return "\n".join(f"{setting:{width}}  # {meaning}".rstrip() for setting, meaning in lines)


def list_keys(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in `config` that is not itself a table of keys."""
    for key, value in config.items():
        if isinstance(value, ConfigDict) and len(value):
            yield from list_keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def find_meaning(config: ConfigDict, key: str) -> str:
    """What a key of `config` means; "" when nothing explains it."""
    from prophy_jax import losses, models

    if pattern := next((pattern for pattern in MEANINGS if fnmatch.fnmatchcase(key, pattern)), None):
        return MEANINGS[pattern]
    names = key.split(".")
    if names[0] == "losses":
        loss = losses.TABLE[names[1]]
        return f"Weight of: {first_sentence((loss.share or loss.whole).__doc__ or '')}"
    for depth in range(len(names) - 1, 0, -1):
        spec = functools.reduce(lambda table, name: table[name], names[:depth], config)
        if "module" in spec:
            return argument(models.find(spec.module, PACKAGES.get(names[0], models.__name__)), names[depth:])
    return ""


def argument(module: ModuleType, path: list[str]) -> str:
    """What the docstrings of `module` say of an argument of its `build`, or of a field of that argument."""
    own = [value for value in vars(module).values() if isinstance(value, type)]
    documented = [kind for value in own if dataclasses.is_dataclass(value) for kind in value.__mro__]
    for name in path[:-1]:  # the classes that the field may hold
        types = [typing.get_type_hints(value).get(name) for value in documented]
        documented = [kind for hint in types for kind in (typing.get_args(hint) or (hint,))]
    if len(path) == 1 and hasattr(module, "build"):
        documented.insert(0, module.build)
    meanings = [arguments(value.__doc__ or "").get(path[-1], "") for value in documented]
    meanings = sorted(filter(None, meanings), key=lambda text: text.startswith("See `"))  # a reference last
    return meanings[0] if meanings else ""


def arguments(doc: str) -> dict[str, str]:
    """{name: first sentence} of the section "Args:" or "Attributes:" of a docstring."""
    section = re.search(r"\n *(?:Args|Attributes):\n(.*?)(?=\n\n|\Z)", inspect.cleandoc(doc), re.DOTALL)
    found = re.findall(r"^ {4}\**(\w+): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: first_sentence(text) for name, text in found}


def first_sentence(text: str) -> str:
    """Up to the first full stop, on one line."""
    return re.split(r"\.(?= |$)", " ".join(text.split()), maxsplit=1)[0]
