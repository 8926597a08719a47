"""Key table of ProPhy's branch; docs/pytorch.md lists it for Wan2.1.

Legend: E experts, I O input and output features, T h w latent grid, c latent channels, N tokens, C width.
"""

import dataclasses
import re
from typing import Any

import numpy as np

from convert import leaves as lv
from prophy_jax.models.beside.prophy import ProPhy

_SUFFIX = {"kernel": "weight", "bias": "bias"}


def branch_leaves(backbone: Any, part: ProPhy, form: Any, naming: str) -> dict[str, lv.Leaf]:
    """Every leaf of the branch by its path.

    Args:
        backbone: The transformer that the branch was trained next to.
        part: The branch.
        form: The `export.Form` of the transformer.
        naming: A format of it.
    """
    shapes = lv.part_shapes(part, backbone)
    copies = dataclasses.replace(backbone.config, num_layers=len(part.layers))
    table = {}
    for path, leaf in form.leaves(copies, naming).items():
        if path in shapes:  # A block of the branch, whatever the transformer calls its own.
            names = tuple(re.sub(r"^\w+\.(\d+)\.", r"blocks.\1.", name) for name in leaf.names)
            table[path] = dataclasses.replace(leaf, names=names)
    for path in shapes.keys() - table.keys():
        shape = shapes[path]
        module, _, last = path.rpartition("/")
        if module == "exits":
            names = [f"exits.{i}.{_SUFFIX[last]}" for i in range(len(part.layers))]
            table[path] = lv.leaf(path, names, shape, stacked=True)
        elif path == "semantic/basis":  # (E, T, h, w, c) from (E, c, T, h, w); (E, N, C) as it is
            axes = (0, 2, 3, 4, 1) if len(shape) == 5 else (0, 1, 2)
            torch_shape = tuple(shape[axis] for axis in np.argsort(axes))
            table[path] = lv.Leaf(("semantic.basis",), torch_shape, shape, False, axes)
        elif module == "refinement":  # the experts: kernel (E, I, O) from (E, O, I)
            axes = (0, 2, 1) if last == "kernel" else (0, 1)
            torch_shape = tuple(shape[axis] for axis in axes)
            names = (f"refinement.experts.{_SUFFIX[last]}",)
            table[path] = lv.Leaf(names, torch_shape, shape, False, axes)
        else:
            name = f"{module.replace('/', '.')}.{_SUFFIX[last]}"
            table[path] = lv.leaf(path, [name], shape, stacked=False)
    return table
