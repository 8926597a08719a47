"""Low-rank adapters of a backbone's dense layers (LoRA, Hu et al. 2021).

    y = x W + b + scale * (x A) B,   scale = alpha / r, or alpha / sqrt(r) with rank stabilisation

A (in, r) is drawn, B (r, out) starts at zero: at step 0 the model is the backbone, bit for bit. Any backbone
can be adapted, and so can the blocks of another part, such as ProPhy's physical blocks: layers are found by
their paths and their calls are intercepted; no model file knows of it.

L blocks of a stack, r rank.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from prophy_jax.models.backbone import Backbone, Params, Stream
from prophy_jax.models.beside.part import Part
from prophy_jax.run.errors import UserError, check_pattern

ATTENTION = "backbone/blocks/.*attn/[qkvo]"


@dataclasses.dataclass(frozen=True)
class Lora(Part):
    """Adapters. Parameters: {"backbone": {layer: {"down": (L, in, r), "up": (L, r, out)}}}, by part.

    Attributes:
        rank: r.
        alpha: The numerator of the scale.
        targets: Patterns of paths of dense layers, such as "backbone/blocks/self_attn/q" or
            "branch/blocks/ffn/up"; each matches from the start of a path.
        rank_stabilized: alpha / sqrt(r) (Kalajdzievski 2023) instead of alpha / r.
        strength: Multiplies the scale, for sampling with less or more of it.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = (ATTENTION,)
    rank_stabilized: bool = False
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"rank={self.rank} of the adapters: choose 1 or more")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UserError(f"alpha={self.alpha} of the adapters: choose a number above 0, such as the rank")
        if not self.targets:
            raise UserError(f"targets={self.targets!r} of the adapters: give a list, such as [{ATTENTION!r}]")
        for pattern in self.targets:
            check_pattern(pattern, "targets of the adapters")

    @property
    def scale(self) -> float:
        return self.strength * self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def init(self, key: jax.Array, backbone: Backbone, params: Params) -> dict[str, Any]:
        """A uniform within 1 / sqrt(in), as PEFT draws it, and B zero; in fp32.

        Raises UserError on a pattern that no dense layer's path matches; it names the nearest one.
        """
        found: dict[str, Any] = {}
        for index, (path, (blocks, width, out)) in enumerate(self._targeted(params)):
            shape = (blocks, width, self.rank)
            drawn = jax.random.uniform(jax.random.fold_in(key, index), shape, minval=-1.0, maxval=1.0)
            found[f"{path}/down"] = drawn * width**-0.5
            found[f"{path}/up"] = jnp.zeros((blocks, self.rank, out))
        return unflatten_dict({_without_blocks(path): leaf for path, leaf in found.items()}, sep="/")

    def _targeted(self, params: Params) -> Iterator[tuple[str, tuple[int, int, int]]]:
        """(path, shape (L, in, out) of its kernel) of every dense layer that is adapted."""
        layers = {
            f"{tree}/blocks/{path.removesuffix('/kernel')}": leaf.shape
            for tree, own in params.items()
            if "blocks" in own
            for path, leaf in flatten_dict(own["blocks"], sep="/").items()
            if path.endswith("/kernel") and len(leaf.shape) == 3
        }
        for pattern in self.targets:
            if not any(re.match(pattern, path) for path in layers):
                near = difflib.get_close_matches(pattern, layers, 1, 0.0)
                raise UserError(
                    f"targets of the adapters: no dense layer matches {pattern!r}; the nearest is {near[0]!r}"
                )
        for path, shape in layers.items():
            if any(re.match(pattern, path) for pattern in self.targets):
                yield path, shape

    def adapt(self, own: Params, backbone: Backbone, params: Params) -> tuple[Backbone, Params]:
        """Gives each adapted layer its matrices, under a name that only this part's layers know."""
        name = f"lora_{getattr(backbone, 'adapters', 0)}"
        given = dict(params)
        for tree, adapters in own.items():
            blocks = flatten_dict(given[tree]["blocks"])
            blocks |= {(*path[:-1], name, path[-1]): leaf for path, leaf in flatten_dict(adapters).items()}
            given[tree] = {**given[tree], "blocks": unflatten_dict(blocks)}
        return Adapted(backbone, name, self.scale), given  # type: ignore[return-value]

    def merge(self, own: Params, params: Params) -> Params:
        """All parameters with the adapters added into the kernels, W + scale * A B, computed in fp32."""
        merged = dict(params)
        for tree, adapters in own.items():
            blocks, adapters = flatten_dict(merged[tree]["blocks"]), flatten_dict(adapters)
            for path in {path[:-1] for path in adapters}:
                kernel = blocks[*path, "kernel"]
                down, up = (adapters[*path, name].astype(jnp.float32) for name in ("down", "up"))
                added = self.scale * jnp.matmul(down, up, precision="highest")  # (L, in, out)
                blocks[*path, "kernel"] = (kernel.astype(jnp.float32) + added).astype(kernel.dtype)
            merged[tree] = {**merged[tree], "blocks": unflatten_dict(blocks)}
        return merged


def _without_blocks(path: str) -> str:
    """Of backbone/blocks/ffn/up: backbone/ffn/up."""
    tree, _, rest = path.partition("/blocks/")
    return f"{tree}/{rest}"


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A backbone whose dense layers add what the adapters of that `name` among their parameters make.

    Attributes:
        backbone: May be adapted itself.
        name: Of the adapters.
        scale: Of what they add.
    """

    backbone: Backbone
    name: str
    scale: float

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backbone, name)

    @property
    def adapters(self) -> int:
        """How many parts have adapted it."""
        return getattr(self.backbone, "adapters", 0) + 1

    def blocks(self, *args: Any, **options: Any) -> Stream:
        with nn.intercept_methods(self._add):
            return self.backbone.blocks(*args, **options)

    def text_ahead(self, *args: Any, **options: Any) -> Any:
        with nn.intercept_methods(self._add):
            return self.backbone.text_ahead(*args, **options)

    def _add(self, call: Callable, args: Sequence[Any], options: Mapping[str, Any], context: Any) -> Any:
        y, layer = call(*args, **options), context.module
        adapted = isinstance(layer, nn.Dense) and context.method_name == "__call__"
        if not (adapted and layer.has_variable("params", self.name)):
            return y
        own = layer.get_variable("params", self.name)
        # In the dtype and the precision of the layer's own product.
        x, down, up = (array.astype(y.dtype) for array in (args[0], own["down"], own["up"]))
        low = jnp.matmul(x, down, precision=layer.precision)  # (..., r)
        return y + self.scale * jnp.matmul(low, up, precision=layer.precision)


def build(
    rank: int,
    alpha: float,
    targets: Sequence[str] = (ATTENTION,),
    rank_stabilized: bool = False,
    strength: float = 1.0,
) -> Lora:
    """Builds adapters, see `Lora`. Raises UserError on a rank, alpha or targets that cannot be."""
    if isinstance(targets, str):  # which would be taken for its letters
        raise UserError(f"targets={targets!r} of the adapters: give a list, such as [{targets!r}]")
    return Lora(rank, alpha, tuple(targets), rank_stabilized, strength)
