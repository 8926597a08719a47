"""What is computed: backbones, the physical branch, codecs and text encoders.

A configuration names a model file of this package and the arguments of its `build` function:
`dict(module="wan", variant="1.3b")` is `prophy_jax.models.wan.build(variant="1.3b")`.
"""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from prophy_jax.errors import UserError


def build(spec: Mapping[str, Any], package: str = __name__) -> Any:
    """Builds what `spec` names in `package`. Raises UserError on an unknown module or argument."""
    arguments = {key: value for key, value in spec.items() if key != "module"}
    name = f"{package}.{spec['module']}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UserError(f"no file {name.replace('.', '/')}.py, named by the configuration") from error
    try:
        inspect.signature(module.build).bind(**arguments)
    except TypeError as error:
        raise UserError(f"{name}.build: {error}; mend the configuration") from error
    return module.build(**arguments)
