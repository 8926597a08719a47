"""Wan2.1 weights: official and diffusers files -> Orbax checkpoints that this package reads.

    python -m convert.wan --src=DIR --dst=DIR [--component=all] [--dtype=bfloat16] [--dry-run]

DIR is a download of Wan2.1-T2V in the official layout (diffusion_pytorch_model*.safetensors, Wan2.1_VAE.pth,
models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl/) or in that of diffusers (transformer/, vae/, text_encoder/,
tokenizer/). The result is DST/transformer, DST/vae and DST/text_encoder, each with tree/ and manifest.json.
A run that was cut off goes on when the same command is run again.

Both formats name the same tensors differently and store them alike, so one table of names per model covers
reading and writing (here and in `convert.t5`). `convert.export` takes the way back.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from absl import logging
from flax import traverse_util
from tqdm import tqdm

import prophy_jax
from convert import files, stream, t5
from convert import leaves as lv
from prophy_jax import cli, models
from prophy_jax.data.text import load_tokenizer
from prophy_jax.errors import UserError, one_line_errors
from prophy_jax.models.t5 import UMT5_XXL
from prophy_jax.models.wan import WAN_1_3B, Params, Wan, WanConfig
from prophy_jax.models.wan_vae import WanVAE, WanVAEConfig

NAMINGS = ("official", "diffusers")

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


# diffusers: official. Fragments of module names, in the order in which they are replaced.
_VAE = {
    # Of a residual block.
    ".norm1.": ".residual.0.",
    ".conv1.": ".residual.2.",
    ".norm2.": ".residual.3.",
    ".conv2.": ".residual.6.",
    ".conv_shortcut.": ".shortcut.",
    # Of the encoder and of the decoder.
    ".conv_in.": ".conv1.",
    ".mid_block.resnets.0.": ".middle.0.",
    ".mid_block.attentions.0.": ".middle.1.",
    ".mid_block.resnets.1.": ".middle.2.",
    ".down_blocks.": ".downsamples.",
    ".norm_out.": ".head.0.",
    ".conv_out.": ".head.2.",
    # Between the two. The second contains the first.
    "post_quant_conv.": "conv2.",
    "quant_conv.": "conv1.",
}
_VAE_LAST = {"kernel": "weight", "scale": "gamma", "bias": "bias"}


@functools.cache
def dit_leaves(config: WanConfig, naming: str) -> dict[str, lv.Leaf]:
    """Every leaf of `Wan(config)` by its path; naming is "official" or "diffusers"."""
    column = NAMINGS.index(naming)
    tree = jax.eval_shape(lambda: Wan(config).init(jax.random.key(0)))
    table = {}
    for path, array in traverse_util.flatten_dict(tree, sep="/").items():
        module, _, last = path.rpartition("/")
        suffix = _SUFFIX.get(last, "")
        row = module if suffix else path  # A modulation table is a row of its own.
        stacked = row in _BLOCK
        name = (_BLOCK if stacked else _TOP)[row][column] + suffix
        names = [f"blocks.{i}.{name}" for i in range(config.num_layers)] if stacked else [name]
        torch_shape = ()
        if path == "embed/patch/kernel":  # (pt ph pw c, C), of a convolution (C, c, pt, ph, pw)
            torch_shape = (config.dim, config.in_channels, *config.patch_size)
        elif last == "modulation":
            torch_shape = (1, *array.shape[-2:])
        table[path] = lv.leaf(path, names, array.shape, stacked, torch_shape)
    return table


@functools.cache
def vae_leaves(config: WanVAEConfig, naming: str) -> dict[str, lv.Leaf]:
    """Every leaf of `WanVAE(config)` by its path; naming is "official" or "diffusers"."""
    tree = jax.eval_shape(lambda: WanVAE(config).init(jax.random.key(0)))
    table = {}
    for path, array in traverse_util.flatten_dict(tree, sep="/").items():
        module, _, last = path.rpartition("/")
        name = f"{module.replace('/', '.')}.{_VAE_LAST[last]}"
        torch_shape = ()
        if last == "scale":  # (C,), of a tensor that spans the axes of a video, in attention of an image
            torch_shape = (*array.shape, *(1, 1, 1)[: 2 if ".attentions." in name else 3])
        if naming == "official":
            name = _vae_official(name, config.num_res_blocks)
        table[path] = lv.leaf(path, [name], array.shape, stacked=False, torch_shape=torch_shape)
    return table


def _vae_official(name: str, num_res_blocks: int) -> str:
    """The official name of a diffusers tensor."""
    # The official decoder numbers through: the residual blocks of a stage, one more than the encoder has,
    # then its upsampler.
    per_stage = num_res_blocks + 2

    def number(match: re.Match) -> str:
        stage, kind, index = int(match[1]), match[2], int(match[3])
        inner = per_stage - 1 if kind == "upsamplers" else index
        return f".upsamples.{stage * per_stage + inner}."

    name = re.sub(r"\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", number, name)
    for theirs, official in _VAE.items():
        name = name.replace(theirs, official)
    return name


def tensor_shapes(config: WanConfig, naming: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the transformer's tensors; naming is "official" or "diffusers"."""
    return lv.tensor_shapes(dit_leaves(config, naming))


def read_dit(tensors: Mapping[str, np.ndarray], config: WanConfig) -> dict[str, Any]:
    """Reads the tensors of a Wan2.1 transformer in either naming, which it recognises.

    Args:
        tensors: By name.
        config: The sizes that the tensors must have.

    Returns:
        The parameter tree of `Wan(config)` as NumPy arrays, in the dtype of the tensors.

    Raises:
        UserError: naming every unknown, missing and mis-shaped tensor.
    """
    tables = {naming: dit_leaves(config, naming) for naming in NAMINGS}
    naming = lv.recognise(tensors, tables)
    if naming is None:
        raise UserError("none of these tensors is of a Wan transformer: is it the right file?")
    found = [(name, tensor.shape) for name, tensor in tensors.items()]
    lv.check(found, tables[naming], f"these tensors are not a Wan transformer ({naming} naming)")
    return lv.read(tensors, tables[naming])


def to_official(params: Params, config: WanConfig) -> dict[str, np.ndarray]:
    """The transformer's tensors under the official names. Raises UserError as `leaves.write` does."""
    return _write(params, config, "official")


def to_diffusers(params: Params, config: WanConfig) -> dict[str, np.ndarray]:
    """The transformer's tensors under the diffusers names. Raises UserError as `leaves.write` does."""
    return _write(params, config, "diffusers")


def _write(params: Params, config: WanConfig, naming: str) -> dict[str, np.ndarray]:
    summary = "the parameters are not a Wan transformer of the expected size"
    return lv.write(params, dit_leaves(config, naming), summary)


# The command.

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def _dit_of_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `WanConfig` from a config.json of either format."""
    names = {"in_dim": "in_channels", "out_dim": "out_channels", "num_attention_heads": "num_heads"}
    ours = {names.get(name, name): value for name, value in fields.items()}
    if "attention_head_dim" in ours:
        ours["dim"] = ours["num_heads"] * ours["attention_head_dim"]
    return {field.name: ours[field.name] for field in dataclasses.fields(WanConfig) if field.name in ours}


def _dit_of_shapes(shapes: Mapping[str, lv.Shape]) -> dict[str, Any]:
    """Fields of `WanConfig` from official tensors. Every Wan2.1 has heads of width 128."""
    dim, in_channels, *patch_size = shapes["patch_embedding.weight"]
    return {
        "dim": dim,
        "num_heads": max(1, dim // 128),
        "num_layers": len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "text_dim": shapes["text_embedding.0.weight"][1],
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "in_channels": in_channels,
        "out_channels": shapes["head.head.weight"][0] // math.prod(patch_size),
        "patch_size": patch_size,
    }


def _vae_of_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `WanVAEConfig` from a config.json of diffusers."""
    if fields.get("is_residual") or fields.get("patch_size") is not None:
        raise UserError("it describes the VAE of Wan2.2, not of Wan2.1")
    names = {"temperal_downsample": "temporal_downsample"}  # diffusers' spelling
    ours = {names.get(name, name): value for name, value in fields.items()}
    return {field.name: ours[field.name] for field in dataclasses.fields(WanVAEConfig) if field.name in ours}


def _vae_of_shapes(shapes: Mapping[str, lv.Shape]) -> dict[str, Any]:
    """Fields of `WanVAEConfig` from official tensors. The statistics of the latents are Wan2.1's."""
    pattern = re.compile(r"encoder\.downsamples\.(\d+)\.resample\.1\.weight")
    ends = sorted(int(match[1]) for match in map(pattern.fullmatch, shapes) if match)
    base_dim = shapes["encoder.conv1.weight"][0]
    if not ends:
        raise KeyError("encoder.downsamples.2.resample.1.weight")
    stages = range(0, (len(ends) + 1) * (ends[0] + 1), ends[0] + 1)  # first block of each
    widths = [shapes[f"encoder.downsamples.{i}.residual.6.weight"][0] for i in stages]
    return {
        "base_dim": base_dim,
        "z_dim": shapes["conv2.weight"][0],
        "dim_mult": [width // base_dim for width in widths],
        "num_res_blocks": ends[0],
        "temporal_downsample": [f"encoder.downsamples.{i}.time_conv.weight" in shapes for i in ends],
    }


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a part of Wan2.1 is found and recognised."""

    module: str  # in prophy_jax.models
    official: str  # stem of the file
    diffusers: str  # in the folder of the part's name
    public: Any  # A configuration, whose names tell the naming of a file.
    leaves: Callable[[Any, str], dict[str, lv.Leaf]]
    of_json: Callable[[Mapping[str, Any]], dict[str, Any]]
    of_shapes: Callable[[Mapping[str, lv.Shape]], dict[str, Any]]


PARTS = {
    "transformer": Kind(
        module="wan",
        official="diffusion_pytorch_model",
        diffusers="diffusion_pytorch_model",
        public=WAN_1_3B,
        leaves=dit_leaves,
        of_json=_dit_of_json,
        of_shapes=_dit_of_shapes,
    ),
    "vae": Kind(
        module="wan_vae",
        official="Wan2.1_VAE",
        diffusers="diffusion_pytorch_model",
        public=WanVAEConfig(),
        leaves=vae_leaves,
        of_json=_vae_of_json,
        of_shapes=_vae_of_shapes,
    ),
    "text_encoder": Kind(
        module="t5",
        official="models_t5_umt5-xxl-enc-bf16",
        diffusers="model",
        public=UMT5_XXL,
        leaves=t5.leaves,
        of_json=t5.sizes_of_json,
        of_shapes=t5.sizes_of_shapes,
    ),
}


@dataclasses.dataclass(frozen=True)
class Component:
    """A part that was found, recognised and checked, ready to be streamed."""

    part: str
    format: str
    model: dict[str, Any]  # for `models.build`
    job: stream.Job
    tokenizer: Path | None


def find(src: Path, part: str) -> tuple[list[Path], Path]:
    """The weight files of a part in either layout, empty if there are none, and where its config.json is."""
    kind = PARTS[part]
    folder = src / part
    if folder.is_dir():
        return files.find(folder, kind.diffusers), folder / "config.json"
    config = src / "config.json" if part == "transformer" else folder / "config.json"
    return files.find(src, kind.official), config


def open_component(src: Path, part: str, dtype: np.dtype | None) -> Component:
    """Recognises a part, checks names and shapes of all tensors; reads headers and no weights.

    Raises:
        UserError: it is missing, damaged, of another model, or does not fit its configuration.
    """
    kind = PARTS[part]
    paths, config_path = find(src, part)
    if not paths:
        raise UserError(_missing(src, part))
    where = str(paths[0] if len(paths) == 1 else paths[0].parent)
    tensors = files.tensors(paths)
    fields = files.read_json(config_path) if config_path.is_file() else {}
    _refuse_other_models(where, {tensor.name: tensor.shape for tensor in tensors}, fields)

    tables = {naming: kind.leaves(kind.public, naming) for naming in NAMINGS}
    naming = lv.recognise((tensor.name for tensor in tensors), tables)
    if naming is None:
        raise UserError(f"{where} holds no tensor of a Wan2.1 {part}: is it the right file?")
    tensors, copies = _set_copies_apart(tensors)
    found = {tensor.name: tensor.shape for tensor in tensors if tensor.name not in copies}
    if fields:
        model, table = _configure(kind, naming, str(config_path), kind.of_json, fields)
    elif naming == "official":
        model, table = _configure(kind, naming, where, kind.of_shapes, found)
    else:
        raise UserError(f"{config_path} is missing: download it too")
    shapes = [(tensor.name, tensor.shape) for tensor in tensors if tensor.name not in copies]
    lv.check(shapes, table, f"{where} is not the {part} of its configuration ({naming} naming)")
    tokenizer = _tokenizer(src, model["vocab_size"]) if part == "text_encoder" else None
    return Component(part, naming, model, stream.Job(table, tensors, copies, dtype), tokenizer)


def _configure(
    kind: Kind, naming: str, where: str, read: Callable[[Any], dict[str, Any]], source: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, lv.Leaf]]:
    """The model of a config.json or of shapes, for `models.build`, and the table of its leaves."""
    try:
        config = models.build({"module": kind.module, **read(source)}).config
        table = kind.leaves(config, naming)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except KeyError as error:
        raise UserError(f"{where} lacks {error}: is it of Wan2.1?") from error
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{where} does not describe a Wan2.1 model: {error}") from error
    return {"module": kind.module, **dataclasses.asdict(config)}, table


# Names of tensors, and what has them.
_OTHER_MODELS = {
    r"(^|[._])lora([._]|$)": "a LoRA and not a whole model: merge it into its base model first",
    r"(^|[._])(img_emb|image_embedder|k_img|add_k_proj)[._]": "an image-to-video model: give a Wan2.1-T2V",
    r"(^|[._])vace_": "a VACE model: give a Wan2.1-T2V",
}


def _refuse_other_models(where: str, shapes: Mapping[str, lv.Shape], fields: Mapping[str, Any]) -> None:
    """Raises UserError that says by name what a file holds instead of text-to-video weights."""
    for pattern, what in _OTHER_MODELS.items():
        found = next(filter(re.compile(pattern).search, shapes), None)
        if found:
            raise UserError(f"{where} is {what} (it has {found})")
    kind = fields.get("model_type", "t2v")
    if kind not in ("t2v", "umt5", "t5"):
        raise UserError(f"{where} is a model of type {kind}: give a Wan2.1-T2V")
    channels = shapes.get("patch_embedding.weight", (0, 16))[1:2]
    if fields.get("image_dim") is not None or channels == (36,):
        raise UserError(f"{where} is an image-to-video model (36 input channels): give a Wan2.1-T2V")


def _set_copies_apart(tensors: list[files.Tensor]) -> tuple[list[files.Tensor], dict[str, str]]:
    """transformers has two names for the embedding of T5; a file may use either or both."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    if t5.EMBEDDING not in shapes:
        rename = {t5.ALIAS: t5.EMBEDDING}
        return [dataclasses.replace(t, name=rename.get(t.name, t.name)) for t in tensors], {}
    same = shapes.get(t5.ALIAS) == shapes[t5.EMBEDDING]
    return tensors, {t5.ALIAS: t5.EMBEDDING} if same else {}


def _tokenizer(src: Path, vocab_size: int) -> Path:
    folder = src / "tokenizer" if (src / "text_encoder").is_dir() else src / "google" / "umt5-xxl"
    if not folder.is_dir():
        raise UserError(f"the text encoder's tokenizer {folder} is missing: download it too")
    load_tokenizer(folder, vocab_size)
    return folder


def _missing(src: Path, part: str) -> str:
    kind = PARTS[part]
    suffix = "*.safetensors" if part == "transformer" else ".pth"
    return f"{src} has neither {kind.official}{suffix} nor {part}/{kind.diffusers}*.safetensors"


def convert(component: Component, dst: Path) -> str:
    """Writes DST/<part>; returns the hash of its tree. Goes on where an earlier run was cut off.

    Raises:
        UserError: a source is damaged, or the disk is full; then nothing is left behind.
    """
    partial = dst / f"{component.part}.partial"
    missing = [folder for folder in (partial, *partial.parents) if not folder.exists()]
    try:
        sha256 = _write_part(component, partial)
    except stream.SourceError:
        shutil.rmtree((missing or [partial])[-1])
        raise
    except OSError as error:
        if error.errno not in stream.DISK_FULL:
            raise UserError(f"{error.filename or partial}: {error.strerror}") from error
        shutil.rmtree((missing or [partial])[-1])
        raise UserError(f"the disk is full and {partial} removed: free space or change --dst") from error
    (partial / stream.JOURNAL).unlink()
    partial.rename(dst / component.part)
    return sha256


def _write_part(component: Component, partial: Path) -> str:
    job = component.job
    sources = [(file.name, file.stat()) for file in job.sources]
    identity = {
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in sources],
        "dtype": str(job.dtype),
        "model": component.model,
        "prophy_jax": prophy_jax.__version__,
    }
    with tqdm(total=job.source_bytes(), unit="B", unit_scale=True, desc=component.part) as progress:
        written = stream.write_tree(job, partial, identity, progress)
    source = {
        "format": component.format,
        "files": written.pop("files"),
        "dtypes": sorted({str(tensor.dtype) for tensor in job.tensors}),
    }
    if component.tokenizer:
        source["tokenizer"] = _copy_files(component.tokenizer, partial / "tokenizer")
    manifest = {"part": component.part, "model": component.model, **written, "source": source}
    (partial / "manifest.json").write_text(json.dumps({**manifest, "versions": _versions()}, indent=1))
    return written["sha256"]


def _copy_files(src: Path, dst: Path) -> dict[str, str]:
    """Copies the files of a folder; returns their hashes."""
    dst.mkdir(exist_ok=True)
    hashes = {}
    for file in sorted(path for path in src.iterdir() if path.is_file()):
        data = file.read_bytes()
        (dst / file.name).write_bytes(data)
        hashes[file.name] = hashlib.sha256(data).hexdigest()
    return hashes


def _versions() -> dict[str, str]:
    packages = ("jax", "numpy", "orbax-checkpoint", "tensorstore")
    return {"prophy_jax": prophy_jax.__version__, **{name: metadata.version(name) for name in packages}}


def _describe(component: Component) -> str:
    job = component.job
    parameters = sum(math.prod(leaf.shape) for leaf in job.table.values())
    sizes = ", ".join(f"{key} {value}" for key, value in component.model.items())
    dtypes = ", ".join(sorted({str(dtype) for dtype in job.dtypes().values()}))
    return "\n".join(
        [
            f"{component.part}: {component.format} naming, {parameters:,} parameters, everything fits",
            *(f"  reads {file} ({file.stat().st_size / 1e9:.3f} GB)" for file in job.sources),
            f"  writes {job.target_bytes() / 1e9:.3f} GB as {dtypes}",
            f"  {sizes}",
        ]
    )


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.ArgumentParser("python -m convert.wan", __doc__)
    parser.add_argument("--src", type=Path, required=True, help="folder of the download")
    parser.add_argument("--dst", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--component", choices=[*PARTS, "all"], default="all", help="what to convert")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of all weights; as in the files by default")
    parser.add_argument("--dry-run", action="store_true", help="check and describe, write nothing")
    return parser.parse_args(arguments)


def _find_parts(src: Path, wanted: str) -> list[str]:
    """The parts to convert; says which of "all" are not there."""
    if not src.is_dir():
        raise UserError(f"{src} is not a folder: --src names the folder of the download")
    if wanted != "all":
        return [wanted]
    parts = [part for part in PARTS if find(src, part)[0]]
    if not parts:
        for file in sorted(src.glob("*.safetensors")):  # Perhaps it is something that has a name.
            _refuse_other_models(str(file), {t.name: t.shape for t in files.tensors([file])}, {})
        raise UserError(f"no Wan2.1 weights: {'; '.join(_missing(src, part) for part in PARTS)}")
    for part in PARTS:
        if part not in parts:
            print(f"no {part}: {_missing(src, part)}")
    return parts


def main(arguments: list[str] | None = None) -> None:
    """The command; `arguments` are those of the process by default."""
    logging.set_verbosity(logging.ERROR)  # Orbax warns of what is no fault of the user.
    jax.config.update("jax_platforms", "cpu")  # Nothing is computed: an accelerator stays free.
    options = _arguments(arguments)
    src, dst, dtype = options.src, options.dst, DTYPES.get(options.dtype)
    parts = _find_parts(src, options.component)
    components = [open_component(src, part, dtype) for part in parts]
    if dst.exists() and not dst.is_dir():
        raise UserError(f"{dst} is not a folder: choose another --dst")
    for part in parts:
        if (dst / part).exists():
            raise UserError(f"{dst / part} exists: delete it or choose another --dst")
    stream.check_space(dst, {dst / f"{c.part}.partial": c.job for c in components})
    for component in components:
        if options.dry_run:
            print(_describe(component))
            continue
        start = time.monotonic()
        sha256 = convert(component, dst)
        seconds, source = time.monotonic() - start, component.job.source_bytes()
        print(
            f"{dst / component.part}: {source / 1e9:.2f} GB in {seconds:.1f} s, "
            f"{source / 1e6 / seconds:.0f} MB/s, sha256 {sha256}"
        )


if __name__ == "__main__":
    with one_line_errors():
        try:
            main()
        except KeyboardInterrupt:
            raise UserError("interrupted: the same command goes on from here") from None
