"""Wan2.1 transformer weights: official and diffusers safetensors files <-> our parameter tree.

Both PyTorch formats name the same tensors differently and store them alike, so one table of names
and one rule of layout per kind of leaf cover reading and writing.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from prophy_jax.errors import UserError
from prophy_jax.models.wan import Params, Wan, WanConfig

_NAMINGS = ("official", "diffusers")

# ours: (official, diffusers)
_TOP = {
    "embed/patch": ("patch_embedding", "patch_embedding"),
    "embed/time_in": ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    "embed/time_out": ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    "embed/time_modulation": ("time_projection.1", "condition_embedder.time_proj"),
    "embed/text_in": ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    "embed/text_out": ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    "head/modulation": ("head.modulation", "scale_shift_table"),
    "head/out": ("head.head", "proj_out"),
}

# Below "blocks.<i>." in both formats; ours are stacked along a leading layer axis.
_BLOCK = {
    "blocks/modulation": ("modulation", "scale_shift_table"),
    "blocks/self_attn/q": ("self_attn.q", "attn1.to_q"),
    "blocks/self_attn/k": ("self_attn.k", "attn1.to_k"),
    "blocks/self_attn/v": ("self_attn.v", "attn1.to_v"),
    "blocks/self_attn/o": ("self_attn.o", "attn1.to_out.0"),
    "blocks/self_attn/norm_q": ("self_attn.norm_q", "attn1.norm_q"),
    "blocks/self_attn/norm_k": ("self_attn.norm_k", "attn1.norm_k"),
    # The official code numbers its norms by kind, diffusers by order of execution.
    "blocks/cross_norm": ("norm3", "norm2"),
    "blocks/cross_attn/q": ("cross_attn.q", "attn2.to_q"),
    "blocks/cross_attn/k": ("cross_attn.k", "attn2.to_k"),
    "blocks/cross_attn/v": ("cross_attn.v", "attn2.to_v"),
    "blocks/cross_attn/o": ("cross_attn.o", "attn2.to_out.0"),
    "blocks/cross_attn/norm_q": ("cross_attn.norm_q", "attn2.norm_q"),
    "blocks/cross_attn/norm_k": ("cross_attn.norm_k", "attn2.norm_k"),
    "blocks/ffn/up": ("ffn.0", "ffn.net.0.proj"),
    "blocks/ffn/down": ("ffn.2", "ffn.net.2"),
}

_SUFFIX = {"kernel": ".weight", "scale": ".weight", "bias": ".bias"}


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One leaf of our tree and the PyTorch tensors it is made of."""

    names: tuple[str, ...]  # One tensor, or one per layer.
    torch_shape: tuple[int, ...]  # Of each of them.
    shape: tuple[int, ...]  # Ours, with the layer axis if there is one.
    from_torch: Callable[[np.ndarray], np.ndarray]  # Layout of one tensor.
    to_torch: Callable[[np.ndarray], np.ndarray]


def _layout(path: str, shape: tuple[int, ...], config: WanConfig) -> tuple[Any, Callable, Callable]:
    """PyTorch shape, and the way there and back, of a leaf or of one layer of it."""
    if path == "embed/patch/kernel":
        pt, ph, pw = config.patch_size
        width, c = config.dim, config.in_channels
        return (
            (width, c, pt, ph, pw),
            lambda w: w.transpose(2, 3, 4, 1, 0).reshape(shape),  # -> (pt ph pw c, C)
            lambda w: w.reshape(pt, ph, pw, c, width).transpose(4, 3, 0, 1, 2),
        )
    if path.endswith("/kernel"):
        return shape[::-1], np.transpose, np.transpose  # (out, in) <-> (in, out)
    if path.endswith("/modulation"):
        return (1, *shape), lambda w: w[0], lambda w: w[None]
    return shape, lambda w: w, lambda w: w


def _leaves(config: WanConfig, naming: str) -> dict[str, _Leaf]:
    """Every leaf of our tree, by its path."""
    column = _NAMINGS.index(naming)
    tree = jax.eval_shape(Wan(config).init, jax.random.key(0))
    leaves = {}
    for path, leaf in traverse_util.flatten_dict(tree, sep="/").items():
        module, _, last = path.rpartition("/")
        suffix = _SUFFIX.get(last, "")
        row = module if suffix else path  # A table is a row of its own.
        if row in _BLOCK:
            name = _BLOCK[row][column] + suffix
            names = tuple(f"blocks.{i}.{name}" for i in range(config.num_layers))
            layout = _layout(path, leaf.shape[1:], config)
        else:
            names = (_TOP[row][column] + suffix,)
            layout = _layout(path, leaf.shape, config)
        torch_shape, from_torch, to_torch = layout
        leaves[path] = _Leaf(names, torch_shape, leaf.shape, from_torch, to_torch)
    return leaves


def tensor_shapes(config: WanConfig, naming: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a PyTorch file; naming is "official" or "diffusers"."""
    leaves = _leaves(config, naming).values()
    return {name: leaf.torch_shape for leaf in leaves for name in leaf.names}


def read_dit(source: str | Path | Mapping[str, np.ndarray], config: WanConfig) -> dict[str, Any]:
    """Reads a Wan2.1 transformer in either naming, which it recognises.

    Args:
        source: A .safetensors file, the .index.json of a sharded one, a directory that holds
            either, or tensors by name.
        config: The sizes that the tensors must have.

    Returns:
        The parameter tree of `Wan(config)` as NumPy arrays, in the dtype of the file.

    Raises:
        UserError: naming every unknown, missing, duplicate and mis-shaped tensor, or the file that
            cannot be read.
    """
    if isinstance(source, Mapping):
        label = "the given tensors"
        found = [(name, tensor.shape, lambda t=tensor: t) for name, tensor in source.items()]
    else:
        label = str(source)
        found = [entry for file in _files(Path(source)) for entry in _open(file)]
    count = Counter(name for name, _, _ in found)
    known = {naming: tensor_shapes(config, naming) for naming in _NAMINGS}
    naming = max(_NAMINGS, key=lambda n: len(count.keys() & known[n].keys()))
    expected = known[naming]
    if not count.keys() & expected.keys():
        raise UserError(f"{label} holds no tensor of a Wan transformer: is it the right file?")

    problems = [f"unknown {name}" for name in sorted(count.keys() - expected.keys())]
    problems += [f"missing {name}" for name in sorted(expected.keys() - count.keys())]
    problems += [f"duplicate {name}" for name in sorted(count) if count[name] > 1]
    problems += [
        f"{name} is {tuple(shape)}, not {expected[name]}"
        for name, shape, _ in found
        if tuple(shape) != expected.get(name, tuple(shape))
    ]
    _raise_if(problems, f"{label} is not a Wan transformer of the expected size ({naming} naming)")

    load = {name: loader for name, _, loader in found}
    tree = {}
    for path, leaf in _leaves(config, naming).items():
        parts = [leaf.from_torch(load[name]()) for name in leaf.names]
        stacked = path.startswith("blocks/")
        tree[path] = np.stack(parts) if stacked else np.ascontiguousarray(parts[0])
    return traverse_util.unflatten_dict(tree, sep="/")


def to_official(params: Params, config: WanConfig) -> dict[str, np.ndarray]:
    """The tensors of our tree under the official names. Raises UserError as `read_dit` does."""
    return _write(params, config, "official")


def to_diffusers(params: Params, config: WanConfig) -> dict[str, np.ndarray]:
    """The tensors of our tree under the diffusers names. Raises UserError as `read_dit` does."""
    return _write(params, config, "diffusers")


def _write(params: Params, config: WanConfig, naming: str) -> dict[str, np.ndarray]:
    tree = traverse_util.flatten_dict(params, sep="/")
    leaves = _leaves(config, naming)
    problems = [f"unknown {path}" for path in sorted(tree.keys() - leaves.keys())]
    problems += [f"missing {path}" for path in sorted(leaves.keys() - tree.keys())]
    problems += [
        f"{path} is {tuple(tree[path].shape)}, not {leaf.shape}"
        for path, leaf in leaves.items()
        if path in tree and tuple(tree[path].shape) != leaf.shape
    ]
    _raise_if(problems, "the parameters are not a Wan transformer of the expected size")

    tensors = {}
    for path, leaf in leaves.items():
        host = np.asarray(tree[path])
        parts = host if path.startswith("blocks/") else host[None]
        for name, part in zip(leaf.names, parts, strict=True):
            tensors[name] = np.ascontiguousarray(leaf.to_torch(part))
    return tensors


def _raise_if(problems: list[str], summary: str) -> None:
    if problems:
        raise UserError(f"{summary}: {'; '.join(problems)}")


def _files(path: Path) -> list[Path]:
    """The .safetensors files that a file, an index or a directory stands for."""
    if path.is_dir():
        found = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
        if not found:
            raise UserError(f"{path} holds no .safetensors file: give the transformer's directory")
        path, files = found[0], found
    else:
        files = [path]
    if path.suffix == ".json":
        try:
            shards = json.loads(path.read_text())["weight_map"].values()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a readable safetensors index: {error!r}") from error
        files = [path.parent / shard for shard in sorted(set(shards))]
    missing = [str(file) for file in files if not file.is_file()]
    _raise_if(missing, "these weight files do not exist, download them again")
    return files


def _open(file: Path) -> list[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """Name, shape and loader of each tensor; nothing is read until a loader is called."""
    try:
        handle = safe_open(file, framework="numpy")
        names = handle.keys()
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is not a readable .safetensors file: {error}") from error
    return [(name, handle.get_slice(name).get_shape(), lambda n=name: handle.get_tensor(n)) for name in names]
