"""Tables between PyTorch tensors and the leaves of our parameter trees.

A table is a dict from the path of a leaf, "a/b/c", to a `Leaf`. It serves both directions, bit by bit. Every
layout is a permutation of axes and a reshape: a PyTorch weight (O, I, ...) of a linear layer or a convolution
is our kernel (..., I, O), anything else keeps its order. Where PyTorch has several layers in one tensor, each
of ours is made of some of its rows; such a table is for reading only.

Legend: O I output and input features.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from prophy_jax.run.errors import UserError

Shape = tuple[int, ...]

_ROWS = 32  # Transposed at a time: a few kilobytes of every column, which fit into the processor's cache.


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of our tree and the PyTorch tensors that it is made of."""

    names: tuple[str, ...]  # One tensor, or one per layer.
    torch_shape: Shape  # Of each of them, or of its `rows`.
    shape: Shape  # Ours, with the layer axis if there is one.
    stacked: bool  # Whether the first axis of `shape` is the layer.
    axes: Shape  # PyTorch axes in our order, before the reshape to `piece_shape`.
    rows: tuple[tuple[int, int], ...] = ()  # Ranges of a larger tensor, one after another; (): all of it.
    factor: float = 1.0  # What PyTorch's values are of ours, in a table for writing only.

    @property
    def piece_shape(self) -> Shape:
        """Shape of what one PyTorch tensor becomes."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def transposed(self) -> bool:
        """Whether the order in memory changes. PyTorch's first axis is then our last."""
        return self.axes != tuple(range(len(self.axes)))

    def from_torch(self, tensor: np.ndarray) -> np.ndarray:
        """One PyTorch tensor in our layout, or some rows of it: ours along the last axis if transposed."""
        if self.transposed:
            return tensor.transpose(self.axes).reshape(*self.piece_shape[:-1], -1)
        return tensor.reshape(-1, *self.piece_shape[1:])

    def put(self, piece: np.ndarray, start: int, rows: np.ndarray) -> None:
        """Writes some rows of a PyTorch tensor, from row `start` on, to their place in a piece."""
        if not self.transposed:
            values = self.from_torch(rows)
            piece[start : start + len(values)] = values
            return
        for i in range(0, len(rows), _ROWS):
            block = rows[i : i + _ROWS]
            piece[..., start + i : start + i + len(block)] = self.from_torch(block)

    def to_torch(self, piece: np.ndarray) -> np.ndarray:
        """The way back: one layer of a stacked leaf, or the whole of another."""
        permuted = [self.torch_shape[axis] for axis in self.axes]
        return piece.reshape(permuted).transpose(np.argsort(self.axes))


def leaf(path: str, names: Iterable[str], shape: Shape, stacked: bool, torch_shape: Shape = ()) -> Leaf:
    """A leaf by the general rule: kernels are transposed, anything else is not.

    Args:
        path: Its last part tells a "kernel".
        names: The PyTorch names, one per layer of a stacked leaf.
        shape: Ours.
        stacked: Whether the leading axis of `shape` is the layer.
        torch_shape: Of one tensor, where the rule does not give it: it has axes that ours merges or drops.
    """
    piece = tuple(shape[1:]) if stacked else tuple(shape)
    kernel = path.rpartition("/")[2] == "kernel"
    if not torch_shape:
        torch_shape = (piece[-1], piece[-2], *piece[:-2]) if kernel else piece
    ndim = len(torch_shape)
    axes = (*range(2, ndim), 1, 0) if kernel else tuple(range(ndim))
    return Leaf(tuple(names), tuple(torch_shape), tuple(shape), stacked, axes)


def shapes_of(init: Callable[..., Any], *arguments: Any) -> dict[str, Shape]:
    """The shapes of what `init(key, *arguments)` would draw, by path; nothing is computed."""
    tree = traverse_util.flatten_dict(jax.eval_shape(init, jax.random.key(0), *arguments), sep="/")
    return {path: leaf.shape for path, leaf in tree.items()}


def part_shapes(part: Any, backbone: Any) -> dict[str, Shape]:
    """The shapes of a part's parameters next to a backbone, by path."""
    weights = {"backbone": jax.eval_shape(backbone.init, jax.random.key(0))}
    return shapes_of(lambda key, weights: part.init(key, backbone, weights), weights)


def count_layers(names: Iterable[str], prefix: str) -> int:
    """The number of layers among names that are a prefix, the number of the layer and the rest."""
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})


def tensor_shapes(table: Mapping[str, Leaf]) -> dict[str, Shape]:
    """Names and shapes of the PyTorch tensors of a table."""
    shapes = {}
    for entry in table.values():
        # Of the leaves that share a tensor, the one with its last rows says how many rows there are.
        length = max((stop for _, stop in entry.rows), default=None)
        for name in entry.names:
            if length is None:
                shapes[name] = entry.torch_shape
            elif length > shapes.get(name, (0,))[0]:
                shapes[name] = (length, *entry.torch_shape[1:])
    return shapes


# What other programs put before all names of a model, and what they put into them.
_BEFORE = re.compile(r"(model|diffusion_model|module)\.")
_WITHIN = re.compile(r"_(orig_mod|(fsdp|checkpoint)_wrapped_module)\.")


def recognise(names: Iterable[str], tables: Mapping[str, Mapping[str, Leaf]]) -> str | None:
    """The naming whose table shares the most names with `names`; None when no table shares any."""
    names = set(names)
    shared = {naming: len(names & tensor_shapes(table).keys()) for naming, table in tables.items()}
    best = max(shared, key=shared.get)
    return best if shared[best] else None


def unwrapped(names: Iterable[str], tables: Mapping[str, Mapping[str, Leaf]]) -> dict[str, str]:
    """Every name without what other programs put around those of a model, such as "model.diffusion_model.".

    What goes with this is what leaves the most names that a table has; nothing, where none has any.
    """
    names = list(names)
    known = set().union(*map(tensor_shapes, tables.values()))
    within = {name: _WITHIN.sub("", name) for name in names}
    prefixes = {""}
    for name in within.values():
        end = 0
        while match := _BEFORE.match(name, end):
            end = match.end()
            prefixes.add(name[:end])
    candidates = [dict(zip(names, names, strict=True))]
    for prefix in sorted(prefixes, key=len):
        candidates.append({name: short.removeprefix(prefix) for name, short in within.items()})
    return max(candidates, key=lambda found: len(known.intersection(found.values())))


def check(found: Iterable[tuple[str, Shape]], table: Mapping[str, Leaf], summary: str) -> None:
    """`compare` of PyTorch tensors with those of a table."""
    compare([(name, tuple(shape)) for name, shape in found], tensor_shapes(table), summary)


def compare(found: list[tuple[str, Shape]], expected: Mapping[str, Shape], summary: str) -> None:
    """Compares names and shapes.

    Raises:
        UserError: `summary`, then every unknown, missing, duplicate and mis-shaped entry.
    """
    count = Counter(name for name, _ in found)
    problems = [f"unknown {name}" for name in sorted(count.keys() - expected.keys())]
    problems += [f"missing {name}" for name in sorted(expected.keys() - count.keys())]
    problems += [f"duplicate {name}" for name in sorted(count) if count[name] > 1]
    problems += [
        f"{name} is {shape}, not {expected[name]}"
        for name, shape in found
        if shape != expected.get(name, shape)
    ]
    if problems:
        raise UserError(f"{summary}: {'; '.join(_by_layer(problems))}")


def _by_layer(problems: list[str]) -> list[str]:
    """One entry for the same problem in many layers, so that all of them fit on a line."""
    groups: dict[str, list[str]] = {}
    for problem in problems:
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", problem), []).append(problem)
    shown = []
    for pattern, group in groups.items():
        shown += group if len(group) < 4 else [f"{pattern} ({len(group)} times)"]
    return shown
