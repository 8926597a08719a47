"""Takes parameters back to PyTorch: safetensors files that diffusers or the Wan2.1 reference code reads.

    python -m convert.export --checkpoint=DIR --format=diffusers --dst=DIR
    python -m convert.export --checkpoint=DIR --format=official --dst=DIR

--checkpoint is a folder that `convert.wan` wrote, the workdir of a finished training run, or one part of
either (DIR/transformer, WORKDIR/branch). Every part it holds is exported, dtypes as they are. `--dst` must
not exist; it appears when it is whole. docs/pytorch.md tells what to do with it.

The arrays are read in whole layers and written in place, so memory holds little more than the largest
tensor of a converted model, twice the largest leaf of a trained one, whose layers are one chunk.

Legend: E experts, I O input and output features, T h w latent grid, c latent channels, N tokens, C width.
"""

import collections
import dataclasses
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from tqdm import tqdm

from convert import leaves as lv
from convert import t5, wan
from prophy_jax import checkpoints, cli, models
from prophy_jax.errors import UserError, one_line_errors
from prophy_jax.models.physics import BranchConfig, ProPhy
from prophy_jax.models.wan import WAN_1_3B

FORMATS = ("diffusers", "official")
# Of a folder, as `convert.wan` and `prophy_jax.train` name them: the model file that it must be of.
MODULES = {"transformer": "wan", "backbone": "wan", "vae": "wan_vae", "text_encoder": "t5", "branch": "wan"}
# Without ".safetensors". The public names of the format.
STEMS = {
    "diffusers": {
        "transformer": "transformer/diffusion_pytorch_model",
        "vae": "vae/diffusion_pytorch_model",
        "text_encoder": "text_encoder/model",
        "branch": "prophy_branch",
    },
    "official": {
        "transformer": "diffusion_pytorch_model",
        "vae": "Wan2.1_VAE",
        "text_encoder": "models_t5_umt5-xxl-enc-bf16",
        "branch": "prophy_branch",
    },
}
TOKENIZER = {"diffusers": "tokenizer", "official": "google/umt5-xxl"}
SHARD_BYTES = 2 * 10**9
DIFFUSERS_VERSION = "0.33.0"  # the first with Wan2.1, whose fields our files have

_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclasses.dataclass(frozen=True)
class Part:
    """One parameter tree on disk and how it is called in PyTorch."""

    name: str  # "transformer", "vae", "text_encoder" or "branch"
    folder: Path
    manifest: Mapping[str, Any]
    config: Any  # of the model file; of a branch its `BranchConfig`
    table: Mapping[str, lv.Leaf]
    arrays: Mapping[str, tensorstore.TensorStore]

    @property
    def nbytes(self) -> int:
        return sum(array.size * array.dtype.numpy_dtype.itemsize for array in self.arrays.values())


def export(checkpoint: str, naming: str, dst: str, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Writes every part of `checkpoint` as PyTorch files under `dst`. Returns their paths in `dst`.

    Args:
        checkpoint: See the module.
        naming: "diffusers" or "official".
        dst: A folder that does not exist yet.
        shard_bytes: A file of the transformer, or of the text encoder for transformers, is at most this
            large, unless one tensor is. The other files have no form in several pieces.

    Raises:
        UserError: on bad input, a damaged tree or a full disk. Nothing is at `dst` then.
    """
    target = Path(dst).absolute()
    if os.path.lexists(target):
        raise UserError(f"{dst} exists: name another --dst, or remove it")
    parts = [_open_part(folder, naming) for folder in find_parts(checkpoint)]
    nbytes = sum(part.nbytes for part in parts)

    temporary = target.with_name(target.name + ".writing")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
        temporary.mkdir(parents=True)
        free = shutil.disk_usage(temporary).free
        if free < nbytes:
            raise UserError(f"{dst} needs {nbytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left")
        with tqdm(total=nbytes, unit="B", unit_scale=True, dynamic_ncols=True) as bar:
            for part in parts:
                bar.set_description(part.name)
                _write_part(part, naming, temporary, shard_bytes, bar.update)
        if naming == "diffusers":
            _write_pipeline(parts, temporary)
        os.rename(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or dst}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for part in parts:
        count = sum(len(entry.names) for entry in part.table.values())
        print(f"{part.name}: {count} tensors, {part.nbytes / 1e6:.1f} MB, from {part.folder}")
    return sorted(path for path in target.rglob("*") if path.is_file())


# --- What there is to export -----------------------------------------------------------------------


def find_parts(checkpoint: str) -> list[Path]:
    """The folders of parameters that `checkpoint` is or holds. Raises UserError when there are none."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise UserError(f"no folder {checkpoint}: name one with --checkpoint=DIR")
    if (folder / "manifest.json").exists() or (folder / "tree").exists():
        return [folder]
    for name in MODULES:
        for half in (folder / f"{name}.partial", folder / f"{name}.writing"):
            if half.exists():
                raise UserError(f"{half} was not finished: run the command that writes {checkpoint} again")
    found = [folder / name for name in MODULES if (folder / name).is_dir()]
    if not found:
        raise UserError(
            f"nothing to export in {checkpoint}: name a folder that convert.wan wrote, or the workdir of a "
            "finished run of prophy_jax.train"
        )
    if {"transformer", "backbone"} <= {path.name for path in found}:
        raise UserError(f"{checkpoint} holds a transformer and a backbone: export one of them at a time")
    return found


def _open_part(folder: Path, naming: str) -> Part:
    """Everything but the values, checked against each other."""
    manifest = _read_json(folder / "manifest.json", f"{folder} is not whole: convert or train again")
    name = manifest.get("part")
    if name not in MODULES:
        raise UserError(f"{folder} holds {name!r}, which has no PyTorch form: choose from {list(MODULES)}")
    spec = manifest.get("model")
    if not spec:
        raise UserError(
            f'{folder}/manifest.json has no "model", an older version wrote it: convert again, or run the '
            "training command of its workdir again, which ends at once and writes it anew"
        )
    module = spec.get("backbone", {}).get("module") if name == "branch" else spec.get("module")
    if module != MODULES[name]:
        raise UserError(f"{folder} is of the model {module!r}: only Wan2.1's {MODULES[name]!r} is exported")
    if name == "branch":
        config = BranchConfig.from_dict(spec["branch"])
        table = branch_leaves(models.build(spec["backbone"]), config, naming)
    else:
        config = models.build(spec).config
        table = {"wan": wan.dit_leaves, "wan_vae": wan.vae_leaves, "t5": t5.leaves}[module](config, naming)
    if naming == "official" and name in ("transformer", "backbone"):
        _check_official(folder, config)
    if module == "t5" and config.shared_bias and naming == "official":
        raise UserError(f"{folder} is a T5 v1.1, the official Wan2.1 format has none: use --format=diffusers")

    arrays = _open_tree(folder)
    stored = {path: (tuple(array.shape), array.dtype.name) for path, array in arrays.items()}
    listed = {path: (tuple(shape), dtype) for path, (shape, dtype) in manifest["shapes"].items()}
    for path in sorted(stored.keys() | listed.keys()):
        if stored.get(path) != listed.get(path):
            raise UserError(
                f"{folder}/tree does not fit its manifest: {path} is {stored.get(path, 'missing')}, "
                f"listed as {listed.get(path, 'missing')}; convert or train again"
            )
    strange = {dtype for _, dtype in stored.values()} - _SAFETENSORS_DTYPES.keys()
    if strange:
        raise UserError(f"{folder} holds values of {sorted(strange)}: parameters are floating-point numbers")
    wanted = {path: jax.ShapeDtypeStruct(leaf.shape, "float32") for path, leaf in table.items()}
    checkpoints.check_shapes(stored, unflatten_dict(wanted, sep="/"), str(folder), dtypes=False)
    return Part("transformer" if name == "backbone" else name, folder, manifest, config, table, arrays)


def _check_official(folder: Path, config: Any) -> None:
    """The official config.json has no field for two sizes: the reference code takes Wan2.1's."""
    for name in ("patch_size", "text_dim"):
        if getattr(config, name) != getattr(WAN_1_3B, name):
            raise UserError(
                f"{folder} has {name} {getattr(config, name)}, the official format knows only Wan2.1's "
                f"{getattr(WAN_1_3B, name)}: use --format=diffusers"
            )


def _read_json(path: Path, remedy: str) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"no {path}: {remedy}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable ({error}): {remedy}") from error


def _open_tree(folder: Path) -> dict[str, tensorstore.TensorStore]:
    """The arrays of an Orbax PyTree checkpoint, by path; no value is read yet."""
    remedy, tree = "the tree is not whole, convert or train again", folder.absolute() / "tree"
    metadata = _read_json(tree / "_METADATA", remedy)
    context = tensorstore.Context()
    opening = {}
    for entry in metadata["tree_metadata"].values():
        keys = [str(key["key"]) for key in entry["key_metadata"]]
        name = ".".join(keys) + "/"
        kvstore = {"driver": "file", "path": f"{tree}/{name}"}
        if metadata["use_ocdbt"]:
            base = {"driver": "file", "path": f"{tree}/"}
            kvstore = {"driver": "ocdbt", "base": base, "path": name}
        spec = {"driver": "zarr3" if metadata.get("use_zarr3") else "zarr", "kvstore": kvstore}
        opening["/".join(keys)] = tensorstore.open(spec, open=True, read=True, context=context)
    try:
        return {path: array.result() for path, array in opening.items()}
    except ValueError as error:
        raise UserError(f"{tree} is not readable ({_first_line(error)}): {remedy}") from error


def branch_leaves(backbone: Any, config: BranchConfig, naming: str) -> dict[str, lv.Leaf]:
    """The key table of a physical branch beside a Wan2.1 transformer; docs/pytorch.md lists it."""
    key = jax.random.key(0)
    weights = jax.eval_shape(backbone.init, key)
    tree = flatten_dict(jax.eval_shape(ProPhy(backbone, config).init_branch, key, weights), sep="/")
    copies = dataclasses.replace(backbone.config, num_layers=len(config.layers))
    table = {path: leaf for path, leaf in wan.dit_leaves(copies, naming).items() if path in tree}
    suffix = {"kernel": "weight", "bias": "bias"}
    for path in tree.keys() - table.keys():
        shape = tree[path].shape
        module, _, last = path.rpartition("/")
        if module == "exits":
            names = [f"exits.{i}.{suffix[last]}" for i in range(len(config.layers))]
            table[path] = lv.leaf(path, names, shape, stacked=True)
        elif path == "semantic/basis":  # (E, T, h, w, c) from (E, c, T, h, w); (E, N, C) as it is
            axes = (0, 2, 3, 4, 1) if len(shape) == 5 else (0, 1, 2)
            torch_shape = tuple(shape[axis] for axis in np.argsort(axes))
            table[path] = lv.Leaf(("semantic.basis",), torch_shape, shape, False, axes)
        elif module == "refinement":  # the experts: kernel (E, I, O) from (E, O, I)
            axes = (0, 2, 1) if last == "kernel" else (0, 1)
            torch_shape = tuple(shape[axis] for axis in axes)
            names = (f"refinement.experts.{suffix[last]}",)
            table[path] = lv.Leaf(names, torch_shape, shape, False, axes)
        else:
            name = f"{module.replace('/', '.')}.{suffix[last]}"
            table[path] = lv.leaf(path, [name], shape, stacked=False)
    return table


# --- Writing ---------------------------------------------------------------------------------------


def _write_part(
    part: Part, naming: str, root: Path, shard_bytes: int, progress: Callable[[int], Any]
) -> None:
    stem = STEMS[naming][part.name]
    in_shards = part.name == "transformer" or (part.name == "text_encoder" and naming == "diffusers")
    shapes = {}
    for path in sorted(part.table):
        leaf, dtype = part.table[path], part.arrays[path].dtype.numpy_dtype
        shapes |= {name: (leaf.torch_shape, dtype) for name in leaf.names}
    shards = _split(shapes, shard_bytes if in_shards else sum(map(_nbytes, shapes.values())))
    metadata = {"format": "pt", "tree_sha256": part.manifest["sha256"]}
    if part.name == "branch":
        metadata |= _about_branch(part, naming)
    (root / stem).parent.mkdir(exist_ok=True)
    tensors = _read(part, progress)
    files = {}
    for i, shard in enumerate(shards, start=1):
        number = f"-{i:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        path = root / f"{stem}{number}.safetensors"
        _write_safetensors(path, shard, tensors, metadata)
        files |= dict.fromkeys(shard, path.name)
    next(tensors, None)  # lets the reader come to its last check
    if len(shards) > 1:
        total = {"total_size": part.nbytes}
        _write_json(root / f"{stem}.safetensors.index.json", {"metadata": total, "weight_map": files})
    config = _config(part, naming)
    if config:
        _write_json((root / stem).parent / "config.json", config)
    tokenizer = part.folder / "tokenizer"
    if part.name == "text_encoder" and tokenizer.is_dir():
        shutil.copytree(tokenizer, root / TOKENIZER[naming])


def _nbytes(tensor: tuple[lv.Shape, np.dtype]) -> int:
    shape, dtype = tensor
    return int(np.prod(shape)) * dtype.itemsize


def _split(shapes: Mapping[str, Any], limit: int) -> list[dict[str, Any]]:
    """Consecutive tensors in groups of at most `limit` bytes, or one tensor."""
    shards, size = [{}], 0
    for name, tensor in shapes.items():
        if shards[-1] and size + _nbytes(tensor) > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += _nbytes(tensor)
    return shards


def _read(part: Part, progress: Callable[[int], Any]) -> Iterator[tuple[str, np.ndarray]]:
    """PyTorch names and the bits of the tensors as integers, by sorted path of the leaf.

    Raises:
        UserError: when the values are not those that the manifest has the hash of.
    """
    digests = {}
    for path in sorted(part.table):
        leaf, array = part.table[path], part.arrays[path]
        in_layers = leaf.stacked and array.ndim >= 3
        # Whole chunks: a part of one costs as much to read.
        rows = array.chunk_layout.read_chunk.shape[0] if in_layers else array.shape[0]
        digests[path] = (array.dtype.name, tuple(array.shape), [])
        for start in range(0, array.shape[0], rows):
            try:
                values = array[start : start + rows].read().result()
            except ValueError as error:
                raise UserError(f"{part.folder}/tree: {path} is damaged ({_first_line(error)})") from error
            digests[path][2].extend(checkpoints.leaf_digests(values))
            bits = values.view(f"u{values.itemsize}")  # NumPy moves integers faster than bfloat16.
            for name, piece in zip(leaf.names[start:], bits if leaf.stacked else bits[None], strict=False):
                yield name, np.ascontiguousarray(leaf.to_torch(piece))
                progress(piece.nbytes)
    if checkpoints.hash_of(digests) != part.manifest["sha256"]:
        raise UserError(
            f"{part.folder}/tree is damaged, its values are not those of its manifest: convert or train again"
        )


def _write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[lv.Shape, np.dtype]],
    tensors: Iterator[tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
) -> None:
    """Writes the next len(shapes) of `tensors` as they come.

    The safetensors library would want all of a file in memory. The format: the length of a JSON header as
    8 bytes, the header, the values without gaps. Wide numbers come first, so that all are aligned, and the
    header is filled up, so that tensors of the usual sizes lie on a processor's cache lines when mapped.
    """
    header, offset = {"__metadata__": dict(metadata)}, 0
    for name, tensor in sorted(shapes.items(), key=lambda item: -item[1][1].itemsize):
        shape, dtype = tensor
        end = offset + _nbytes(tensor)
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[dtype.name],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        for _ in shapes:
            name, tensor = next(tensors)
            file.seek(start + header[name]["data_offsets"][0])
            file.write(tensor.reshape(-1).view(np.uint8).data)
    with safe_open(path, "numpy") as file:  # The library checks its header and its length.
        assert set(file.keys()) == shapes.keys(), path


def _about_branch(part: Part, naming: str) -> dict[str, str]:
    """What a reader of the branch's file has to know. Values of such a header are strings."""
    # A backbone that was trained with the branch lies beside it; a frozen one is named by the manifest.
    beside = part.folder.absolute().parent / "backbone" / "manifest.json"
    backbone = part.manifest.get("backbone_sha256", "")
    if beside.exists():
        backbone = _read_json(beside, "train again")["sha256"]
    return {
        "names": naming,
        "branch": json.dumps(dataclasses.asdict(part.config)),
        "backbone_sha256": backbone,
    }


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


# --- Configuration files ---------------------------------------------------------------------------


def _config(part: Part, naming: str) -> dict[str, Any] | None:
    """The config.json of a part; None where the format has none."""
    if naming == "official":
        return _official_config(part.config) if part.name == "transformer" else None
    makers = {"transformer": _transformer_config, "vae": _vae_config, "text_encoder": _text_encoder_config}
    return makers[part.name](part) if part.name in makers else None


def _official_config(config: Any) -> dict[str, Any]:
    return {
        "_class_name": "WanModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "dim": config.dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "model_type": "t2v",
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_dim": config.out_channels,
        "text_len": config.text_len,
    }


def _transformer_config(part: Part) -> dict[str, Any]:
    config = part.config
    return {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "added_kv_proj_dim": None,
        "attention_head_dim": config.head_dim,
        "cross_attn_norm": True,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "image_dim": None,
        "in_channels": config.in_channels,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_channels": config.out_channels,
        "patch_size": list(config.patch_size),
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
    }


def _vae_config(part: Part) -> dict[str, Any]:
    config = part.config
    return {
        "_class_name": "AutoencoderKLWan",
        "_diffusers_version": DIFFUSERS_VERSION,
        "attn_scales": [],
        "base_dim": config.base_dim,
        "dim_mult": list(config.dim_mult),
        "dropout": 0.0,
        "latents_mean": list(config.latents_mean),
        "latents_std": list(config.latents_std),
        "num_res_blocks": config.num_res_blocks,
        "scale_factor_spatial": config.space,
        "scale_factor_temporal": config.time,
        "temperal_downsample": list(config.temporal_downsample),  # diffusers spells it so
        "z_dim": config.z_dim,
    }


def _text_encoder_config(part: Part) -> dict[str, Any]:
    config = part.config
    sizes = collections.Counter()  # bytes by dtype
    for array in part.arrays.values():
        sizes[array.dtype.name] += array.size * array.dtype.numpy_dtype.itemsize
    return {
        "architectures": ["T5EncoderModel" if config.shared_bias else "UMT5EncoderModel"],
        "d_ff": config.d_ff,
        "d_kv": config.d_kv,
        "d_model": config.d_model,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "layer_norm_epsilon": config.eps,
        "model_type": "t5" if config.shared_bias else "umt5",
        "num_decoder_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": config.max_distance,
        "relative_attention_num_buckets": config.num_buckets,
        "torch_dtype": sizes.most_common(1)[0][0],
        "vocab_size": config.vocab_size,
    }


def _write_pipeline(parts: list[Part], root: Path) -> None:
    """What makes a `diffusers.WanPipeline` of the components, when all of them are there."""
    if not {"transformer", "vae", "text_encoder"} <= {part.name for part in parts}:
        return
    if not (root / "tokenizer").is_dir():
        return
    text_encoder = _read_json(root / "text_encoder" / "config.json", "")["architectures"][0]
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", text_encoder],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    _write_json(root / "model_index.json", index)
    scheduler = {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "flow_shift": 3.0,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "use_flow_sigmas": True,
    }
    (root / "scheduler").mkdir()
    _write_json(root / "scheduler" / "scheduler_config.json", scheduler)


def main(arguments: list[str] | None = None) -> None:
    """The command; `arguments` are those of the process by default."""
    jax.config.update("jax_platforms", "cpu")  # Nothing is computed: an accelerator stays free.
    parser = cli.ArgumentParser("python -m convert.export", __doc__)
    parser.add_argument("--checkpoint", required=True, help="folder of converted or trained parameters")
    parser.add_argument("--format", choices=FORMATS, required=True, help="names and files to write")
    parser.add_argument("--dst", required=True, help="folder to write; must not exist")
    options = parser.parse_args(arguments)
    export(options.checkpoint, options.format, options.dst)


if __name__ == "__main__":
    with one_line_errors():
        try:
            main()
        except KeyboardInterrupt:
            raise UserError("interrupted: nothing was written") from None
