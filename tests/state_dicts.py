"""Parameter trees of small models to PyTorch tensors in memory, and back, by the tables of `convert`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from convert import leaves as lv
from prophy_jax.testing.state_dicts import read

__all__ = ["read", "write"]


def write(params: Mapping[str, Any], table: Mapping[str, lv.Leaf]) -> dict[str, np.ndarray]:
    """The PyTorch tensors of a parameter tree, contiguous, in its dtype.

    Raises:
        UserError: names every unknown, missing and mis-shaped leaf.
        ValueError: the table has rows of larger tensors.
    """
    if any(entry.rows for entry in table.values()):
        raise ValueError("a table with rows of larger tensors is for reading only")
    tree = traverse_util.flatten_dict(params, sep="/")
    shapes = {path: entry.shape for path, entry in table.items()}
    lv.compare([(path, tuple(leaf.shape)) for path, leaf in tree.items()], shapes, "these leaves do not fit")
    tensors = {}
    for path, entry in table.items():
        host = np.asarray(tree[path])
        pieces = host if entry.stacked else host[None]
        for name, piece in zip(entry.names, pieces, strict=True):
            tensors[name] = np.ascontiguousarray(entry.to_torch(piece))
    return tensors
