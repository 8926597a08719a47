"""LoRA files: the key tables of adapters, and adapters of other trainers, read.

Written are diffusers' names (`transformer.blocks.0.attn1.to_q.lora_A.weight`), which `load_lora_weights` of
its pipelines takes, and those of the original code (`diffusion_model.blocks.0.self_attn.q.lora_A.weight`),
which ComfyUI takes as well. The scale is multiplied into lora_B: readers disagree on where alpha stands, and
one that finds none takes the rank.

Read are these, with `lora_down` and `lora_up` too, alpha in tensors of its own, in the header or in PEFT's
adapter_config.json, and the names of kohya's trainers (`lora_unet_blocks_0_self_attn_q.lora_down.weight`).

L blocks, r rank, O I output and input features.
"""

import collections
import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors import SafetensorError, safe_open

from convert import leaves as lv
from prophy_jax import models
from prophy_jax.models.beside.lora import Lora
from prophy_jax.run import checkpoints, storage
from prophy_jax.run.errors import UserError

BEFORE = {"diffusers": "transformer.", "official": "diffusion_model."}
_SIDES = {
    **dict.fromkeys(("lora_A", "lora_down", "lora.down"), "down"),
    **dict.fromkeys(("lora_B", "lora_up", "lora.up"), "up"),
}
_KEY = re.compile(rf"(?P<layer>.+)\.(?P<side>{'|'.join(map(re.escape, _SIDES))})(\.[^.]+)?\.weight")
_PEFT = "base_model.model."
_PREFIXES = (
    *("transformer.", "diffusion_model.", "model.diffusion_model.", _PEFT),
    *("lora_unet_", "lora_transformer_"),
)
_OTHERS = {  # in the names of tensors of other methods
    **dict.fromkeys(("dora_scale", "lora_magnitude_vector"), "DoRA"),
    **{
        ".lokr_": "LoKr (LyCORIS)",
        ".hada_": "LoHa (LyCORIS)",
        ".lora_mid": "LoCon (LyCORIS)",
        **dict.fromkeys((".oft_", ".boft_"), "OFT"),
    },
    **{".diff": "differences of whole weights", ".bias": "biases"},
    **dict.fromkeys(("lora_te", "text_encoder"), "adapters of a text encoder"),
}


def adapter_leaves(backbone: Any, part: Lora, form: Any, naming: str) -> dict[str, lv.Leaf]:
    """Every leaf of the adapters by its path; see `convert.prophy.branch_leaves`.

    Raises UserError on adapters of another part's blocks, of which no other program knows.
    """
    try:
        shapes = lv.part_shapes(part, backbone)
    except UserError as error:
        raise UserError(
            f"adapters of {list(part.targets)} are not of the backbone alone, and those of other parts have "
            "no PyTorch form: export the other folders of the run, one at a time"
        ) from error
    table, layers = {}, _layers(form.leaves(backbone.config, naming))
    for path, shape in shapes.items():
        layer, _, side = path.removeprefix("backbone/").rpartition("/")
        letter = {"down": "A", "up": "B"}[side]
        names = tuple(f"{BEFORE[naming]}{name}.lora_{letter}.weight" for name in layers[layer])
        factor = part.scale if side == "up" else 1.0
        table[path] = lv.Leaf(names, (shape[2], shape[1]), shape, True, (1, 0), factor=factor)
    return table


def _layers(table: Mapping[str, lv.Leaf]) -> dict[str, tuple[str, ...]]:
    """Path of a dense layer in a block -> its PyTorch names, one a block."""
    return {
        path.removeprefix("blocks/").removesuffix("/kernel"): tuple(
            name.removesuffix(".weight") for name in leaf.names
        )
        for path, leaf in table.items()
        if path.startswith("blocks/") and path.endswith("/kernel") and not leaf.rows
    }


def parse(entries: Sequence[str]) -> list[tuple[str, float]]:
    """(file, strength) of the flag --lora, FILE or FILE=STRENGTH.

    Raises UserError on a file that is missing, and on a strength that is no finite number.
    """
    found = []
    for entry in entries:
        file, equals, number = entry.rpartition("=")
        if not equals or storage.path(entry).is_file():  # an equals sign in the name of a file
            file, number = entry, "1"
        try:
            strength = float(number)
        except ValueError:
            if storage.path(file).is_file():
                raise UserError(
                    f"--lora={entry}: {number!r} is no number: give a strength, such as --lora={file}=0.8"
                ) from None
            file, strength = entry, 1.0
        if not math.isfinite(strength):
            raise UserError(f"--lora={entry}: give a finite strength, such as --lora={file}=0.8")
        if storage.path(file).is_dir():
            raise UserError(f"--lora={entry}: {file} is a folder; name the safetensors file in it")
        if not storage.path(file).is_file():
            raise UserError(
                f"--lora={entry}: there is no file {file}; name a LoRA in safetensors, as FILE or FILE=0.8"
            )
        found.append((file, strength))
    return found


def read_all(
    adapters: Sequence[tuple[str, float]], backbone: Any, weights: str
) -> Iterator[tuple[Lora, dict[str, Any], str]]:
    """What `read` makes of each (file, strength), and the file's SHA-256.

    Raises UserError as `read` does, and on a file that `weights`, the backbone's folder, has merged already.
    """
    merged = read_merged(weights) if adapters else []
    for file, strength in adapters:
        part, params = read(file, backbone, strength)
        if (digest := storage.hash_file(file)) in merged:
            raise UserError(f"{weights} has {file} merged into it already: leave out --lora={file}")
        yield part, params, digest


def read(path: str, backbone: Any, strength: float = 1.0) -> tuple[Lora, dict[str, Any]]:
    """The adapters in a safetensors file, for a backbone.

    Layers of different ranks, and blocks without an adapter, are filled with zeros.

    Args:
        path: Of the file.
        backbone: Built.
        strength: Multiplies all of it.

    Returns:
        The part, and its parameters in fp32.

    Raises:
        UserError: not a safetensors file, adapters of another model, size or method, or none at all.
    """
    from convert.export import FORMS  # which has a row for adapters

    form = FORMS.get(models.file_of(type(backbone)))
    if form is None:
        raise UserError(
            f"no names of other programs are known for {type(backbone).__name__}: {path} is not read"
        )
    tensors, metadata = _load(path)
    for name in tensors:
        for mark, method in _OTHERS.items():
            if mark in name:
                raise UserError(f"{path} has {method} ({name}): only plain LoRA of the transformer is read")
    known = {}  # name of a layer, as it is and as kohya's trainers write it -> (path, block)
    for naming in form.configs:
        for layer, names in _layers(form.leaves(backbone.config, naming)).items():
            for block, name in enumerate(names):
                known[name] = known[name.replace(".", "_")] = (layer, block)
    found: dict[tuple[str, int], dict[str, np.ndarray]] = collections.defaultdict(dict)
    strange = []
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        layer = match["layer"] if match else name.removesuffix(".alpha")
        side = _SIDES[match["side"]] if match else "alpha"
        place = known.get(_without_prefix(layer))
        if place is None or not (match or name.endswith(".alpha")):
            strange.append(name)
        elif side in found[place]:
            raise UserError(f"{path} has more than one adapter of {layer} ({name}): name a file of one LoRA")
        else:
            found[place][side] = tensor
    if not any(map(_KEY.fullmatch, tensors)):
        such = f", but such as {next(iter(tensors))}" if tensors else ""
        raise UserError(f"{path} holds no tensor of an adapter{such}: name a LoRA file")
    if strange:
        near = difflib.get_close_matches(_without_prefix(strange[0]), known, 1, 0.0)
        raise UserError(
            f"{path} fits no layer of this model with {len(strange)} of its {len(tensors)} tensors, such as "
            f"{strange[0]}; the nearest layer is {near[0]}: it is of another model, of names that are not "
            "known, or adapts more than the layers of the blocks"
        )
    return _stack(path, found, _stated_alpha(path, metadata, tensors), backbone, strength)


def read_merged(folder: str) -> list[str]:
    """SHA-256 of the LoRA files that `convert.merge` added to the weights in a folder."""
    if not checkpoints.holds_params(folder):
        return []
    return checkpoints.read_manifest(folder, "").get("merged", [])


def _stack(path, found, stated, backbone, strength) -> tuple[Lora, dict[str, Any]]:
    with_alpha = any("alpha" in own for own in found.values())
    kernels = lv.shapes_of(backbone.init)
    rank = max(max(own["down"].shape[:1], default=0) for own in found.values() if "down" in own)
    arrays: dict[str, np.ndarray] = {}
    for (layer, block), own in found.items():
        where = f"{layer} in block {block}"
        if not {"down", "up"} <= own.keys():
            raise UserError(f"{path} lacks a matrix of {where}: it is cut short")
        if with_alpha and "alpha" not in own:
            raise UserError(f"{path} states alpha of some layers, and not of {where}: it is cut short")
        depth, width, out = kernels[f"blocks/{layer}/kernel"]
        down, up = own["down"], own["up"]  # (r, I), (O, r); of convolutions with axes of size 1 behind
        r = max(down.shape[:1], default=0)
        if not r or any(
            array.shape != shape + (1,) * (array.ndim - 2)
            for array, shape in ((down, (r, width)), (up, (out, r)))
        ):
            raise UserError(
                f"{path} has {where} of {down.shape} and {up.shape}, this model takes (rank, {width}) and "
                f"({out}, rank): it is of another size"
            )
        alpha = own.get("alpha", np.float32(r if stated is None else stated))
        if alpha.size != 1:
            raise UserError(f"{path} states {alpha.size} numbers as alpha of {where}: download it again")
        scale = alpha.item() / r
        if not (np.isfinite(down).all() and np.isfinite(up).all() and math.isfinite(scale)):
            raise UserError(f"{path} holds NaN or infinity in {where}: download it again")
        downs = arrays.setdefault(f"backbone/{layer}/down", np.zeros((depth, width, rank), np.float32))
        ups = arrays.setdefault(f"backbone/{layer}/up", np.zeros((depth, rank, out), np.float32))
        downs[block, :, :r] = down.reshape(r, width).T  # (I, r)
        ups[block, :r] = scale * up.reshape(out, r).T  # (r, O)
    layers = sorted({layer for layer, _ in found})
    targets = tuple(f"backbone/blocks/{re.escape(layer)}$" for layer in layers)
    return Lora(rank, float(rank), targets, strength=strength), unflatten_dict(arrays, sep="/")


def _without_prefix(name: str) -> str:
    while prefix := next((one for one in _PREFIXES if name.startswith(one)), None):
        name = name.removeprefix(prefix)
    return name


def _load(path: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors in fp32, and the metadata of the header."""
    import ml_dtypes  # noqa: F401  (NumPy then knows bfloat16)

    if not Path(path).is_file():
        raise UserError(f"no file {path}: name a LoRA in safetensors")
    try:
        with safe_open(path, "flax") as file:
            tensors = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file ({error}): download it again, in this format"
        ) from error
    for name, tensor in tensors.items():
        if not (jnp.issubdtype(tensor.dtype, jnp.floating) or name.endswith(".alpha")):
            raise UserError(f"{path} has {name} in {tensor.dtype}: quantised adapters are not read")
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}, metadata


def _stated_alpha(path: str, metadata: Mapping[str, str], names: Iterable[str]) -> float | None:
    """The alpha of all layers, noted in the header or, for PEFT's names, in its file beside it.

    None: it is the rank.

    Raises UserError where PEFT's file is damaged, or says that alpha differs from layer to layer.
    """
    beside = Path(path).with_name("adapter_config.json")
    try:
        noted = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        if not noted and beside.is_file() and any(name.startswith(_PEFT) for name in names):
            noted = json.loads(beside.read_text())
        noted = {key.removeprefix("transformer."): value for key, value in noted.items()}
        if noted.get("alpha_pattern") or noted.get("use_rslora") or noted.get("use_dora"):
            raise UserError(
                f"{path} has a scale of another form than one alpha over the rank: it is not read"
            )
        return float(noted["lora_alpha"]) if "lora_alpha" in noted else None
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise UserError(
            f"the notes of {path} on its alpha are damaged ({error}): download it again"
        ) from error
