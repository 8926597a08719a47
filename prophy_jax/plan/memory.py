"""Counts the bytes that a traced program holds at once, without compiling it.

A walk over the jaxpr in its own order, which keeps forward and backward passes as JAX laid them out. What is
stored, and what a compiler fuses away, follows four rules:

- Kernels (matrix products, attention, loops, everything not listed here) store what they make and read
  stored operands. Reductions store what they make and read through fused operands.
- Elementwise and layout operations are fused into their consumers: they store nothing, but what they read
  stays until the last consumer has run. They are stored after all when a kernel reads them, when they leave
  a program or loop body, or when several operations read what was made of several stored arrays.
- A loop stores its carry and its stacked outputs in full, and what its body holds at once.
- Donated arguments are overwritten: outputs of the same program take no more room.

The counts are checked against compiled programs in tests/plan_test.py.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

_ELEMENTWISE = """
    abs add add_any and atan2 bitcast_convert_type broadcast_in_dim cbrt ceil clamp concatenate
    convert_element_type copy cos cosh div dynamic_slice dynamic_update_slice eq erf erf_inv exp exp2
    expand_dims expm1 floor gather ge gt imag integer_pow iota is_finite le log log1p logistic lt max
    min mul name ne neg nextafter not optimization_barrier or pad pow pvary random_unwrap random_wrap
    real reduce_precision rem reshape reshard rev round rsqrt select_n sharding_constraint shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh slice split sqrt square squeeze
    stop_gradient sub tan tanh transpose xor
"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())
REDUCTIONS = frozenset(("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_prod"))
LOOPS = ("scan", "while", "cond", "pallas_call")
SMALL = 2**16  # bytes; smaller arrays are not followed


@dataclasses.dataclass
class LiveBytes:
    """What is live at the fullest moment, in bytes."""

    activations: float = 0  # made in the forward pass, read in the backward pass
    gradients: float = 0  # made in the backward pass, read after it
    temporaries: float = 0  # everything else

    @property
    def total(self) -> float:
        return self.activations + self.gradients + self.temporaries


def peak(jaxpr: Any, size_of: Callable[[Any], float]) -> LiveBytes:
    """The fullest moment of a closed jaxpr, its arguments and outputs not counted.

    Args:
        jaxpr: Of `jax.make_jaxpr`.
        size_of: Abstract array -> bytes of it on one device.
    """
    ops, outputs = _flatten(jaxpr.jaxpr)
    return _simulate(ops, set(), outputs, size_of, count_outputs=False)


def flops(
    jaxpr: Any, kernel_weights: Mapping[str, float] = MappingProxyType({}), unknown_length: int = 0
) -> float:
    """Operations that a closed jaxpr executes: 2 per multiply-add of matrix products, loops multiplied.

    Args:
        jaxpr: Of `jax.make_jaxpr`.
        kernel_weights: Part of a Pallas kernel's name -> what its operations are multiplied by.
        unknown_length: How often loops run whose bounds are not in the jaxpr.
    """

    def count(jaxpr: Any) -> float:
        return sum(of(op) for op in _flatten(jaxpr)[0])

    def of(op: _Op) -> float:
        name, params = op.name, op.eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            depth = math.prod(op.eqn.invars[0].aval.shape[axis] for axis in contracted)
            return 2 * depth * math.prod(op.eqn.outvars[0].aval.shape)
        if name == "pallas_call":
            times = math.prod(params["grid_mapping"].grid)
            for part, weight in kernel_weights.items():
                times *= weight if part in str(params["name"]) else 1
            return times * count(params["jaxpr"])
        times = unknown_length if name == "while" else params.get("length", 1)
        return times * max((count(body) for body in _bodies(op)), default=0.0)

    return count(jaxpr.jaxpr)


def array_bytes(aval: Any) -> float:
    extended = jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended)  # random keys
    return math.prod(aval.shape) * (8 if extended else np.dtype(aval.dtype).itemsize)


# --- The walk --------------------------------------------------------------------------------------


class _Value:
    """One array of the flattened program."""

    def __init__(self, aval: Any):
        self.aval = aval


@dataclasses.dataclass
class _Op:
    eqn: Any
    inputs: list[Any]  # values; None for literals
    outputs: list[Any]
    backward: bool

    @property
    def name(self) -> str:
        return self.eqn.primitive.name

    def overwrites(self, value: Any) -> bool:
        """Whether an output may lie where this input lay."""
        if self.name in ELEMENTWISE:
            return True
        if self.name != "scan":
            return False
        return value in self.inputs[slice(*_carry(self.eqn))]


def _flatten(jaxpr: Any) -> tuple[list[_Op], list[Any]]:
    """The operations of a jaxpr that its outputs need, calls inlined; and the outputs."""
    ops: list[_Op] = []

    def inline(jaxpr: Any, bound: dict[Any, Any], within_backward: bool) -> list[Any]:
        def read(atom: Any) -> Any:
            return None if hasattr(atom, "val") else bound.get(atom, atom)

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            backward = within_backward or "transpose" in str(eqn.source_info.name_stack)
            inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
            if inner is not None and eqn.primitive.name not in LOOPS:
                inner = getattr(inner, "jaxpr", inner)
                outputs = inline(inner, dict(zip(inner.invars, inputs, strict=True)), backward)
            else:
                outputs = [_Value(var.aval) for var in eqn.outvars]
                ops.append(_Op(eqn, inputs, outputs, backward))
            bound.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    outputs = inline(jaxpr, {}, False)
    needed, kept = {value for value in outputs if value is not None}, []
    for op in reversed(ops):
        if op.eqn.effects or not needed.isdisjoint(op.outputs):
            needed.update(value for value in op.inputs if value is not None)
            kept.append(op)
    return kept[::-1], outputs


def _bodies(op: _Op) -> list[Any]:
    """Jaxprs of a loop's body or a condition's branches."""
    params = op.eqn.params
    found = {
        "scan": [params.get("jaxpr")],
        "while": [params.get("body_jaxpr")],
        "cond": params.get("branches"),
    }
    found = found.get(op.name, [])
    return [getattr(body, "jaxpr", body) for body in found]


def _carry(eqn: Any) -> tuple[int, int]:
    """Where the carry of a scan lies among its inputs: after the constants, before what is sliced.

    Versions of JAX name these differently, but what is sliced or stacked has one axis more outside.
    """
    body = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])

    def whole(outside: Any, inside: Any) -> int:
        return sum(a.aval.shape == b.aval.shape for a, b in zip(outside, inside, strict=True))

    stop = whole(eqn.invars, body.invars)
    return stop - whole(eqn.outvars, body.outvars), stop


def _inside(op: _Op, size_of: Callable) -> float:
    """What the body of a loop holds while it runs, besides what came in."""
    most = 0.0
    for body in _bodies(op):
        ops, outputs = _flatten(body)
        sliced = set(body.invars[_carry(op.eqn)[1] :]) if op.name == "scan" else set()
        most = max(most, _simulate(ops, sliced, outputs, size_of, count_outputs=True).total)
    return most


def _simulate(ops, sliced, leaving, size_of, count_outputs: bool) -> LiveBytes:
    """Runs the operations in order. `sliced` inputs must be copied before a kernel can read them."""
    outputs = {value for value in leaving if value is not None}
    readers: dict[Any, int] = {}
    by_kernel: set[Any] = set()
    for op in ops:
        fused = op.name in ELEMENTWISE or op.name in REDUCTIONS
        for value in {value for value in op.inputs if value is not None}:
            readers[value] = readers.get(value, 0) + 1
            if not fused:
                by_kernel.add(value)

    roots: dict[Any, frozenset] = {}  # value -> the stored values that it is computed from
    made: dict[Any, int] = {}  # stored value -> index of the operation that makes it
    last: dict[Any, int] = {}  # stored value -> index of the last operation that reads it
    makes: list[list[Any]] = [[] for _ in ops]
    backward_reads: set[Any] = set()
    later_reads: set[Any] = set()

    def store(value: Any, index: int) -> None:
        if size_of(value.aval) >= SMALL:
            made[value], last[value] = index, index
            makes[index].append(value)
            roots[value] = frozenset([value])

    for value in sliced & by_kernel:
        if size_of(value.aval) >= SMALL and ops:
            store(value, 0)
    for index, op in enumerate(ops):
        sources = frozenset().union(
            *(roots.get(value, frozenset()) for value in op.inputs if value is not None)
        )
        fused = op.name in ELEMENTWISE
        for value in op.outputs:
            shared = readers.get(value, 0) > 1 and len(sources) > 1
            if not fused or value in by_kernel or value in outputs or shared:
                store(value, index)
            else:
                roots[value] = sources
        if not fused or any(value in made for value in op.outputs):
            for source in sources:
                last[source] = max(last[source], index)
                (backward_reads if op.backward else later_reads).add(source)
    for value in outputs:
        for source in roots.get(value, ()):
            last[source] = len(ops)

    free: list[list[Any]] = [[] for _ in range(len(ops) + 1)]
    for value, index in last.items():
        free[index].append(value)
    skip = set() if count_outputs else outputs
    live: dict[Any, float] = {}
    total, best, best_live, best_inside = 0.0, -1.0, {}, 0.0
    for index, op in enumerate(ops):
        for value in free[index]:
            if made[value] != index and op.overwrites(value):
                total -= live.pop(value, 0.0)
        for value in makes[index]:
            if value not in skip:
                live[value] = size_of(value.aval)
                total += live[value]
        inside = _inside(op, size_of)
        if total + inside > best:
            best, best_live, best_inside = total + inside, dict(live), inside
        for value in free[index]:
            total -= live.pop(value, 0.0)
    held = LiveBytes(temporaries=best_inside)
    for value, size in best_live.items():
        maker = ops[made[value]]
        if not maker.backward and value in backward_reads:
            held.activations += size
        elif maker.backward and value in later_reads:
            held.gradients += size
        else:
            held.temporaries += size
    return held
