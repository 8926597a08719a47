"""Counts what a compiled program sends between devices, from its HLO text.

    bytes   of one call: the reduced, gathered or exchanged array as one device holds it; of a reduce-scatter
            before it is scattered; of a permutation what each device passes on
    sent    what each device sends for it in a ring of n devices: 2 (n-1)/n of the bytes of an all-reduce,
            (n-1)/n of those of a gather, scatter or exchange, all those of a permutation

Loop bodies count as often as they run. Groups of one device are left out: nothing moves. The text is the only
place where XLA says which devices exchange what, hence this reader.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BYTES = {
    **{"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4},
    **{"s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16},
}
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction, run `count` times in a step."""

    kind: str
    axes: tuple[str, ...]  # mesh axes that its groups span
    devices: tuple[int, ...]  # one group, as positions in the mesh
    bytes: int  # of one call
    count: int

    @property
    def group(self) -> int:
        """Devices in a group."""
        return len(self.devices)

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a step."""
        share = {"all-reduce": 2 * (self.group - 1) / self.group, "collective-permute": 1.0}
        return self.count * self.bytes * share.get(self.kind, (self.group - 1) / self.group)


def count(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Every collective of the compiled HLO `text` of a program on a mesh of these axes, in order."""
    computations, entry = _read(text)
    found: list[Collective] = []

    def walk(name: str, times: int) -> None:
        for instruction in computations.get(name, ()):
            if found_here := _collective(instruction, times, mesh_shape):
                found.append(found_here)
            elif instruction.opcode == "while":
                body = re.search(r"body=%?([\w.\-]+)", instruction.rest)[1]
                walk(body, times * trip_count(instruction.rest, computations))
            elif instruction.opcode == "conditional":
                branches = re.search(r"branch_computations=\{(.*?)\}", instruction.rest)[1]
                for branch in re.findall(r"[\w.\-]+", branches):
                    walk(branch, times)
            elif instruction.opcode in ("fusion", "call", "async-start", "custom-call"):
                for called in _CALLED.findall(instruction.rest):
                    walk(called, times)

    walk(entry, 1)
    return [one for one in found if one.group > 1]


def by_axis(collectives: Sequence[Collective], rate: Callable[[Collective], float]) -> list[dict[str, Any]]:
    """Rows of axes, kind, bytes, sent, calls and seconds, sums over a step; those that send most come first.

    Args:
        collectives: Of `count`.
        rate: Bytes/s that a device sends for one of them.
    """
    sums: dict[tuple[tuple[str, ...], str], dict[str, Any]] = {}
    for one in collectives:
        new = {"axes": list(one.axes), "kind": one.kind, "bytes": 0, "sent": 0.0, "calls": 0, "seconds": 0.0}
        row = sums.setdefault((one.axes, one.kind), new)
        row["bytes"] += one.count * one.bytes
        row["sent"] += one.sent
        row["calls"] += one.count
        row["seconds"] += one.sent / rate(one)
    return sorted(sums.values(), key=lambda row: -row["sent"])


# --- HLO text --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes


def _read(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[1], [])
            entry = header[1] if line.startswith("ENTRY") else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(_Instruction(*match.groups()))
    return computations, entry


def _bytes(shape: str) -> list[int]:
    """Bytes of every array in a shape, in order."""
    shape = re.sub(r"\{[^{}]*\}", "", shape)  # layouts
    return [
        math.prod(int(size) for size in sizes.split(",") if size) * ITEM_BYTES.get(kind, 0)
        for kind, sizes in _SHAPE.findall(shape)
    ]


def _collective(instruction, times, mesh_shape) -> Collective | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    sizes = _bytes(instruction.shape)
    if instruction.opcode == "all-gather-start":
        sizes = sizes[len(sizes) // 2 :]  # (operands, results)
    elif instruction.opcode == "collective-permute-start":
        sizes = sizes[1:2]  # (operand, result, context)
    groups = _groups(instruction.rest, math.prod(mesh_shape.values()))
    if kind == "reduce-scatter":
        sizes = [size * len(groups[0]) for size in sizes]
    devices = groups[0] if groups else ()  # a permutation may move nothing
    return Collective(kind, _axes(groups, mesh_shape), devices, sum(sizes), times)


def _groups(attributes: str, devices: int) -> list[tuple[int, ...]]:
    """The groups of devices, as positions in the mesh, in any of the forms that XLA prints."""
    if match := re.search(r"source_target_pairs=\{(.*?)\}\}?", attributes):
        pairs = re.findall(r"\{(\d+),(\d+)", "{" + match[1])
        return [(int(a), int(b)) for a, b in pairs if a != b]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, source = (tuple(map(int, match[i].split(","))) for i in (1, 2))
        order = np.arange(math.prod(source)).reshape(source)
        if match[3]:
            order = order.transpose(tuple(map(int, match[3].split(","))))
        return [tuple(map(int, group)) for group in order.reshape(shape[0], -1)]
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?) \{([^}]*)\}", attributes):
        return _mesh_groups(*match.groups())
    if match := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", attributes):
        return [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", match[1])]
    return [tuple(range(devices))]  # no list: all of them


def _mesh_groups(mesh: str, order: str, axes: str) -> list[tuple[int, ...]]:
    """Groups along axes of a mesh that XLA names: mesh['a'=4,'b'=2] {'a','b':(1)2}.

    'b':(m)s is a part of axis b: of its index as m x s x rest, the middle.
    """
    sizes, grouped = [], []
    wanted = {
        name: (int(pre or 1), int(size or 0))
        for name, pre, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    }
    for name, size in re.findall(r"'([^']+)'=(\d+)", mesh):
        pre, part = wanted.get(name, (1, 1))
        part = part or int(size)
        sizes += [pre, part, int(size) // (pre * part)]
        grouped += [len(sizes) - 2]
    ids = np.arange(math.prod(sizes))
    # Positions 0, 1, ... in another order: reshaped, then transposed; or listed one by one.
    if match := re.search(r"device_ids=\((?:\[[\d,]+\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?\)", order):
        shape, axes = ([int(size) for size in match[k].split(",")] if match[k] else None for k in (1, 2))
        ids = ids.reshape(shape).transpose(axes)
    elif match := re.search(r"device_ids=[(\[]+([\d,]+)", order):
        ids = np.array([int(index) for index in match[1].split(",")])
    ids = ids.reshape(sizes)
    kept = [axis for axis in range(len(sizes)) if axis not in grouped]
    count = math.prod(sizes[axis] for axis in grouped)
    return [tuple(map(int, group)) for group in ids.transpose(kept + grouped).reshape(-1, count)]


def _axes(groups: Sequence[Sequence[int]], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of the mesh along which the devices of a group differ."""
    names, sizes = list(mesh_shape), tuple(mesh_shape.values())
    differ = set()
    for group in groups:
        places = np.array(np.unravel_index(group, sizes))  # (axes, devices)
        differ |= {name for name, row in zip(names, places, strict=True) if len(set(row.tolist())) > 1}
    return tuple(name for name in names if name in differ)


def trip_count(attributes: str, computations: Mapping[str, Sequence[_Instruction]]) -> int:
    """How often a while loop runs: what XLA knows, or else the constant that its condition compares with.

    Loops of a scan count from 0 in steps of 1. Raises ValueError on a condition of another form.
    """
    if match := re.search(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)', attributes):
        return int(match[1])
    condition = re.search(r"condition=%?([\w.\-]+)", attributes)[1]
    constants, compares = [], []

    def look(name: str) -> None:
        for instruction in computations[name]:
            if instruction.opcode == "constant" and (value := re.match(r"(\d+)\)", instruction.rest)):
                constants.append(int(value[1]))
            elif instruction.opcode == "compare":
                compares.append(re.search(r"direction=(\w+)", instruction.rest)[1])
            elif instruction.opcode == "fusion":
                for called in _CALLED.findall(instruction.rest):
                    look(called)

    look(condition)
    if len(constants) != 1 or compares not in (["LT"], ["GT"]):
        raise ValueError(f"cannot tell how often the loop with condition {condition} runs")
    return constants[0]
