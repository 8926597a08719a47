"""A traced program as a flat list of operations, which the counts of memory and of FLOPs walk over.

JAX counts neither before it compiles, and a compiler counts what it made of the program, with what is
recomputed, and nothing inside the kernels of attention.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

LOOPS = ("scan", "while", "cond", "pallas_call")


class Value:
    """One array of the program."""

    def __init__(self, aval: Any):
        self.aval = aval


@dataclasses.dataclass
class Op:
    """One operation of the program.

    Attributes:
        eqn: The equation of the jaxpr.
        inputs: A `Value` or a variable for each input, None for a literal.
        outputs: A `Value` for each output.
        backward: Whether it belongs to a backward pass.
    """

    eqn: Any
    inputs: list[Any]
    outputs: list[Any]
    backward: bool

    @property
    def name(self) -> str:
        return self.eqn.primitive.name


def flatten(jaxpr: Any, whole: Collection[str] = ()) -> tuple[list[Op], list[Any]]:
    """The operations that the outputs of a jaxpr need, and the outputs.

    Args:
        jaxpr: Not closed. Calls in it are replaced by what they call; loops stay one operation.
        whole: Names of compiled functions of which a call stays one operation too.
    """
    ops: list[Op] = []

    def inline(jaxpr: Any, bound: dict[Any, Any], within_backward: bool) -> list[Any]:
        def read(atom: Any) -> Any:
            return None if hasattr(atom, "val") else bound.get(atom, atom)

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            backward = within_backward or "transpose" in str(eqn.source_info.name_stack)
            inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
            stays = eqn.primitive.name in LOOPS or eqn.params.get("name") in whole
            if inner is not None and not stays:
                inner = getattr(inner, "jaxpr", inner)
                outputs = inline(inner, dict(zip(inner.invars, inputs, strict=True)), backward)
            else:
                outputs = [Value(var.aval) for var in eqn.outvars]
                ops.append(Op(eqn, inputs, outputs, backward))
            bound.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    outputs = inline(jaxpr, {}, False)
    needed, kept = {value for value in outputs if value is not None}, []
    for op in reversed(ops):
        if op.eqn.effects or not needed.isdisjoint(op.outputs):
            needed.update(value for value in op.inputs if value is not None)
            kept.append(op)
    return kept[::-1], outputs


def bodies(op: Op) -> list[Any]:
    """The jaxprs of a loop's body or of a condition's branches."""
    params = op.eqn.params
    found = {
        "scan": [params.get("jaxpr")],
        "while": [params.get("body_jaxpr")],
        "cond": params.get("branches"),
    }
    found = found.get(op.name, [])
    return [getattr(body, "jaxpr", body) for body in found]


def carry(eqn: Any) -> tuple[int, int]:
    """Where the carry of a scan starts and stops among its inputs: after the constants, before the slices.

    Versions of JAX name these differently, but what is sliced or stacked has one axis more outside.
    """
    body = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])

    def whole(outside: Any, inside: Any) -> int:
        return sum(a.aval.shape == b.aval.shape for a, b in zip(outside, inside, strict=True))

    stop = whole(eqn.invars, body.invars)
    return stop - whole(eqn.outvars, body.outvars), stop
