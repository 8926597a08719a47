"""--print_config: every key of every configuration has a meaning, and no meaning is of a key that is gone."""

import dataclasses
import fnmatch
import importlib
import pkgutil
import re

import pytest

from prophy_jax import diffusion, models
from prophy_jax.models import beside, codecs, text
from prophy_jax.run import config_help
from prophy_jax.run.errors import UserError
from tests.commands import run_here
from tests.conftest import ROOT

ARMS = ("lora", "lora+seb", "lora+reb", "pb", "pb+seb", "pb+reb", "full", "full+lora", "bce", "absolute")


def shipped():
    """(name, configuration) of every file of configs/, in all its variants and, of the demo, arms."""
    for path in sorted((ROOT / "configs").glob("*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        with pytest.raises(UserError) as refused:
            module.get_config("no such variant")
        variants = re.findall(r"'([^']+)'", str(refused.value).split("it has")[1])
        assert {"tiny", "demo"} <= set(variants)
        for arg in ("", *variants, *(f"demo,{arm}" for arm in ARMS)):
            yield f"{path.name}:{arg}", module.get_config(arg)


def test_every_key_has_a_meaning_and_every_meaning_a_key():
    used, unexplained = set(), set()
    for name, config in shipped():
        for key, _ in config_help.list_keys(config):
            pattern = next((p for p in config_help.MEANINGS if fnmatch.fnmatchcase(key, p)), None)
            used.add(pattern)
            if not config_help.find_meaning(config, key):
                unexplained.add((key, name))
    assert not unexplained
    assert not set(config_help.MEANINGS) - used, "no configuration has these keys"


def test_docstrings_explain_fields_that_exist():
    found = 0
    for package in (models, beside, codecs, text, diffusion):
        for file in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            for value in vars(importlib.import_module(file.name)).values():
                if isinstance(value, type) and dataclasses.is_dataclass(value):
                    explained = set(config_help.arguments(value.__doc__))
                    assert explained <= {field.name for field in dataclasses.fields(value)}, value
                    found += len(explained)
    assert found > 10


def test_arguments_of_a_docstring():
    doc = """Does a thing.

    Args:
        first: What it is. More of it.
        second: A long story, told
            on two lines; 1.5 is a number.
        **rest: Others.

    Returns:
        third: Not an argument.
    """
    assert config_help.arguments(doc) == {
        "first": "What it is",
        "second": "A long story, told on two lines; 1.5 is a number",
        "rest": "Others",
    }
    assert config_help.arguments("No sections.") == {}


@pytest.mark.parametrize("command", ["train", "sample", "prepare", "label", "evaluate", "study", "plan"])
def test_every_command_prints_its_configuration_after_overrides(command):
    overrides = ("--config.steps=7", "--config.data.dir=mine")
    config = f"--config={ROOT}/configs/wan.py:tiny"
    shown = run_here(f"prophy_jax.{command}", "--print_config", config, *overrides)
    assert shown.returncode == 0
    lines = dict(line.split(" = ", 1) for line in shown.stdout.splitlines())
    assert lines["steps"].split() == ["7", "#", "Training", "steps"] and not shown.stderr
    assert lines["data.dir"].startswith("'mine'") and lines["samples.skip"].startswith("()")
    assert all("  # " in value for value in lines.values())
