"""Parameter trees of small models from PyTorch tensors in memory, by the tables of `convert`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from convert import leaves as lv


def read(tensors: Mapping[str, np.ndarray], table: Mapping[str, lv.Leaf]) -> dict[str, Any]:
    """The parameter tree of PyTorch tensors, as NumPy arrays in their dtype.

    Raises:
        UserError: names every unknown, missing and mis-shaped tensor.
    """
    lv.check([(name, tensor.shape) for name, tensor in tensors.items()], table, "these tensors do not fit")
    tree = {}
    for path, entry in table.items():
        whole = (np.asarray(tensors[name]) for name in entry.names)
        if entry.rows:
            whole = (np.concatenate([tensor[a:b] for a, b in entry.rows]) for tensor in whole)
        pieces = [entry.from_torch(tensor) for tensor in whole]
        tree[path] = np.stack(pieces) if entry.stacked else np.ascontiguousarray(pieces[0])
    return traverse_util.unflatten_dict(tree, sep="/")
