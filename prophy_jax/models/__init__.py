"""What is computed: backbones, the physical branch, codecs and text encoders.

A configuration names a model file of this package and the arguments of its `build` function:
`dict(module="wan", variant="1.3b")` is `prophy_jax.models.wan.build(variant="1.3b")`.
"""

import dataclasses
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Any

import jax.numpy as jnp

from prophy_jax.run.errors import UserError

ROOMS = ("", ".codecs", ".text", ".beside")  # of this package, in which model files lie


def find(name: str, package: str = __name__) -> ModuleType:
    """The file NAME.py of `package` or of its rooms. Raises UserError when there is none."""
    places = [f"{package}{room}.{name}" for room in (ROOMS if package == __name__ else ("",))]
    place = next((place for place in places if place in sys.modules or importlib.util.find_spec(place)), None)
    if place is None:
        raise UserError(f"no file {name}.py in {package}, named by the configuration")
    return importlib.import_module(place)


def file_of(model: type) -> str:
    """The file of this package that a class is from, as configurations name it."""
    return model.__module__.rpartition(".")[2]


def build(
    spec: Mapping[str, Any], package: str = __name__, known: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    """Builds what `spec` names in `package`. Raises UserError on an unknown module or argument.

    Of `known`, which no configuration repeats, `build` of the file is given the arguments that it takes.
    """
    arguments = {key: value for key, value in spec.items() if key != "module"}
    module = find(spec["module"], package)
    if not hasattr(module, "build"):
        raise UserError(f"{module.__name__} builds nothing: name another module in the configuration")
    signature = inspect.signature(module.build)
    arguments |= {name: value for name, value in known.items() if name in signature.parameters}
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise UserError(f"{module.__name__}.build: {error}; fix the configuration") from error
    return module.build(**arguments)


def configure(
    model: str,
    fields: type,
    overrides: Mapping[str, Any],
    variant: str | None = None,
    variants: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """A model's sizes: of a public variant with some changed, or all of them from `overrides`.

    Args:
        model: As messages call it.
        fields: The dataclass of its sizes.
        overrides: Fields of it. Lists, of a configuration file, become tuples, so that a model can be hashed.
        variant: A name of `variants`, or None.
        variants: Name -> the sizes of public models.

    Raises:
        UserError: on an unknown variant or field, or a missing one.
    """
    if variant is not None and variant not in variants:
        raise UserError(f"unknown {model} variant {variant!r}: choose one of {', '.join(variants)}")
    overrides = {key: tuple(value) if isinstance(value, list) else value for key, value in overrides.items()}
    try:
        if variant is None:
            return fields(**overrides)
        return dataclasses.replace(variants[variant], **overrides)
    except TypeError as error:
        raise UserError(f"{model} sizes {sorted(overrides)} do not fit {fields.__name__}: {error}") from error


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype of a model's products. Raises UserError on another name than float32 and bfloat16."""
    if name not in ("float32", "bfloat16"):
        raise UserError(f"unknown compute dtype {name!r}: choose float32 or bfloat16")
    return jnp.dtype(name)
