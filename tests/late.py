"""Packages that take seconds to import: the first test to use one imports it, and collecting imports none."""

import importlib
import importlib.util
from typing import Any

import pytest


class Late:
    """Stands for a module, and imports it when an attribute is first read or set."""

    __slots__ = ("_name",)  # without a __dict__, monkeypatch keeps and restores what the module had

    def __init__(self, name: str):
        object.__setattr__(self, "_name", name)

    def __getattr__(self, attribute: str) -> Any:
        # pytest looks for marks of its own on all that a test file holds.
        if attribute.startswith("_") and attribute != "__version__":
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)

    def __setattr__(self, attribute: str, value: Any) -> None:
        setattr(importlib.import_module(self._name), attribute, value)


def late(name: str, needs: str = "", reason: str = "parity tests need the test extra on Python 3.11") -> Late:
    """The module `name`, for the top of a test file.

    The file is skipped for `reason` where the package, or the package `needs`, is not installed.
    """
    if importlib.util.find_spec(needs or name.partition(".")[0]) is None:
        pytest.skip(reason, allow_module_level=True)
    return Late(name)
