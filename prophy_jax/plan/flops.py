"""Counts the floating-point operations of a traced program, so that no model states them by hand.

    count(jaxpr)                      what the program executes, with what it recomputes
    model_flops(function, *arguments) the same of a function; of a step of `plain(model)`, the model's FLOPs

The model's FLOPs are those of the same program with plain attention and nothing recomputed: attention in
blocks, and fused kernels, compute scores again in the backward pass.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax

from prophy_jax.models import attention
from prophy_jax.plan import jaxprs

# As commands print it.
RULE = (
    "2 per multiply-add of every matrix product in the traced program, with plain attention and nothing "
    "recomputed"
)


def count(
    jaxpr: Any, kernel_weights: Mapping[str, float] = MappingProxyType({}), unknown_length: int = 0
) -> int:
    """Operations that a closed jaxpr executes: 2 per multiply-add of matrix products, loops multiplied.

    Operations whose results are not used are left out, as compilers do.

    Args:
        jaxpr: Of `jax.make_jaxpr`.
        kernel_weights: Part of a Pallas kernel's name -> what its operations are multiplied by.
        unknown_length: How often loops run whose bounds are not in the jaxpr.
    """

    def total(jaxpr: Any) -> float:
        return sum(of(op) for op in jaxprs.flatten(jaxpr)[0])

    def of(op: jaxprs.Op) -> float:
        name, params = op.name, op.eqn.params
        if name == "dot_general":
            return product_flops(op.eqn)
        if name == "pallas_call":
            times = math.prod(params["grid_mapping"].grid)
            for part, weight in kernel_weights.items():
                times *= weight if part in str(params["name"]) else 1
            return times * total(params["jaxpr"])
        times = unknown_length if name == "while" else params.get("length", 1)
        return times * max((total(body) for body in jaxprs.bodies(op)), default=0)

    return round(total(jaxpr.jaxpr))


def product_flops(eqn: Any) -> int:
    """Of one matrix product, a `dot_general`."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    return 2 * depth * math.prod(eqn.outvars[0].aval.shape)


def model_flops(function: Callable, *arguments: Any, unknown_length: int = 0) -> int:
    """Traces `function(*arguments)` and counts it. Arguments are arrays or `jax.ShapeDtypeStruct`s."""
    return count(jax.make_jaxpr(function)(*arguments), unknown_length=unknown_length)


def plain(model: Any) -> Any:
    """The same model with plain attention on one device and nothing recomputed, to be traced alone."""
    return model.with_backbone(attention=attention.attention, remat="none")
