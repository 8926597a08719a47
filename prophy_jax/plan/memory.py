"""Counts the bytes that a traced program holds at once, without compiling it.

An estimate, for chips whose compiler is not installed, and for a search that cannot compile every candidate;
where there is a compiler, its own figures count. It walks over the jaxpr in its order, which keeps
forward and backward passes as JAX wrote them. Four rules say what is stored, and what a compiler fuses away:

- Kernels (matrix products, attention, loops, everything not listed here) store what they make and read
  stored operands. Reductions store what they make and read through fused operands.
- Elementwise and layout operations are fused into their consumers: they store nothing, but what they read
  stays until the last consumer has run. They are stored after all when a kernel reads them, when they leave
  a program or loop body, or when several operations read what was made of several stored arrays.
- A loop stores its carry and its stacked outputs in full, and what its body holds at once.
- Donated arguments are overwritten: outputs of the same program take no more room.

tests/plan_test.py compares the counts with compiled programs.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from prophy_jax.plan import jaxprs

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
    ops, outputs = jaxprs.flatten(jaxpr.jaxpr)
    return _simulate(ops, set(), outputs, size_of, count_outputs=False)


def array_bytes(aval: Any) -> float:
    """Bytes of an array that is whole on one device."""
    extended = jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended)  # random keys
    return math.prod(aval.shape) * (8 if extended else np.dtype(aval.dtype).itemsize)


# --- The walk --------------------------------------------------------------------------------------


def _overwrites(op: jaxprs.Op, value: Any) -> bool:
    """Whether an output may be stored where this input was."""
    if op.name in ELEMENTWISE:
        return True
    if op.name != "scan":
        return False
    return value in op.inputs[slice(*jaxprs.carry(op.eqn))]


def _inside(op: jaxprs.Op, size_of: Callable) -> float:
    """What the body of a loop holds while it runs, besides what came in."""
    most = 0.0
    for body in jaxprs.bodies(op):
        ops, outputs = jaxprs.flatten(body)
        sliced = set(body.invars[jaxprs.carry(op.eqn)[1] :]) if op.name == "scan" else set()
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
            if made[value] != index and _overwrites(op, value):
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
