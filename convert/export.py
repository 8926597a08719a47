"""Writes parameters as PyTorch files: safetensors that diffusers or the Wan2.1 reference code reads.

    python -m convert.export --checkpoint=DIR --format=diffusers --dst=DIR
    python -m convert.export --checkpoint=DIR --format=official --dst=DIR

--checkpoint is a folder that `convert.wan` or `convert.cogvideox` wrote, the workdir of a finished training
run, or one part of either (DIR/transformer, WORKDIR/branch). Every part that the folder holds is exported;
dtypes stay as they are. Only Wan2.1 has the official format. `--dst` must not exist, unless it has these
parameters already; it appears when it is whole. docs/pytorch.md says how to use it.

Memory holds little more than the largest tensor of a converted model, or twice the largest leaf of a trained
one, whose layers are one chunk.
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
from flax.traverse_util import unflatten_dict
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from convert import cogvideox, command, t5, wan
from convert import leaves as lv
from convert.lora import adapter_leaves
from convert.lora import read as read_adapters
from convert.prophy import branch_leaves
from prophy_jax import models
from prophy_jax.run import checkpoints, cli, storage
from prophy_jax.run.errors import UserError
from prophy_jax.run.workdir import name_module, read_json

FORMATS = ("diffusers", "official")
# The public names of the files in each format, without ".safetensors".
STEMS = {
    "diffusers": {part: f"{part}/{stem}" for part, stem in command.STEMS.items()},
    "official": wan.OFFICIAL,
}
TOKENIZER = {"diffusers": "tokenizer", "official": "google/umt5-xxl"}
SHARD_BYTES = 2 * 10**9

_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclasses.dataclass(frozen=True)
class Form:
    """What the parameters of a model file are in PyTorch."""

    parts: tuple[str, ...]  # the folders that can hold them
    leaves: Callable[[Any, str], Mapping[str, lv.Leaf]]  # of a configuration and a format
    # Makes config.json of a configuration, by format: None where the format has none. Where the format has no
    # such model it raises UserError, whose text continues the folder's name.
    configs: Mapping[str, Callable[[Any], dict[str, Any] | None]]
    # Of a transformer: the class of the pipeline, and the configuration of its scheduler.
    pipeline: Callable[[Any], tuple[str, dict[str, Any]]] | None = None


# Of a file in prophy_jax.models.
FORMS = {
    "wan": Form(
        parts=("transformer", "backbone"),
        leaves=wan.dit_leaves,
        configs={"diffusers": wan.diffusers_config, "official": wan.official_config},
        pipeline=wan.diffusers_pipeline,
    ),
    "wan_vae": Form(
        parts=("vae",),
        leaves=wan.vae_leaves,
        configs={"diffusers": wan.diffusers_vae_config, "official": lambda config: None},
    ),
    "cogvideox": Form(
        parts=("transformer", "backbone"),
        leaves=cogvideox.dit_leaves,
        configs={"diffusers": cogvideox.diffusers_config},
        pipeline=cogvideox.diffusers_pipeline,
    ),
    "cogvideox_vae": Form(("vae",), cogvideox.vae_leaves, {"diffusers": cogvideox.diffusers_vae_config}),
    "t5": Form(
        parts=("text_encoder",),
        leaves=t5.leaves,
        configs={"diffusers": t5.transformers_config, "official": t5.official_config},
    ),
}

# The key tables of what is trained next to a backbone, by its file in prophy_jax.models.beside. Each is a
# function of the backbone, the part, the form of the backbone, and a format.
BESIDE = {"prophy": branch_leaves, "lora": adapter_leaves}
# Of these, what reads their files: a function of a path and the backbone, to the part and its values.
READERS = {"lora": read_adapters}


@dataclasses.dataclass(frozen=True)
class Part:
    """One parameter tree on disk and its form in PyTorch."""

    name: str  # "transformer", "vae", "text_encoder", or as the run calls it, such as "branch"
    added: bool  # Whether it was trained next to a backbone; `form` is then that of the backbone.
    form: Form
    folder: storage.AnyPath
    manifest: Mapping[str, Any]
    config: Any  # of the model file, or the part itself
    table: Mapping[str, lv.Leaf]
    arrays: Mapping[str, tensorstore.TensorStore]

    @property
    def nbytes(self) -> int:
        return sum(array.size * array.dtype.numpy_dtype.itemsize for array in self.arrays.values())


def export(
    checkpoint: str, naming: str, dst: str, shard_bytes: int = SHARD_BYTES, quiet: bool = False
) -> list[Path]:
    """Writes every part of `checkpoint` as PyTorch files under `dst`. Returns their paths in `dst`.

    Args:
        checkpoint: The folder that --checkpoint names.
        naming: "diffusers" or "official".
        dst: A folder that does not exist yet.
        shard_bytes: The most bytes of a file of the transformer, or of the text encoder for transformers,
            unless one tensor has more. The other files have no form in several pieces.
        quiet: prints nothing.

    Raises:
        UserError: on bad input, a damaged tree or a full disk. Nothing is at `dst` then.
    """
    target = Path(dst).absolute()
    if os.path.lexists(target) and not target.is_dir():
        raise UserError(f"{dst} exists: name another --dst, or remove it")
    parts = [_open_part(folder, naming) for folder in find_parts(checkpoint)]
    if os.path.lexists(target):
        if not all(_is_made(part, naming, target) for part in parts):
            raise UserError(f"{dst} exists: name another --dst, or remove it")
        print(f"{dst}: made of these parameters already, nothing left to do")
        return sorted(path for path in target.rglob("*") if path.is_file())
    nbytes = sum(part.nbytes for part in parts)

    temporary = target.with_name(target.name + ".writing")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
        temporary.mkdir(parents=True)
        free = shutil.disk_usage(temporary).free
        if free < nbytes:
            raise UserError(f"{dst} needs {nbytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left")
        with tqdm(total=nbytes, unit="B", unit_scale=True, dynamic_ncols=True, disable=quiet) as bar:
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
    for part in parts if not quiet else ():
        count = sum(len(entry.names) for entry in part.table.values())
        print(f"{part.name}: {count} tensors, {part.nbytes / 1e6:.1f} MB, from {part.folder}")
    return sorted(path for path in target.rglob("*") if path.is_file())


# --- What can be exported -----------------------------------------------------------------------


def find_parts(checkpoint: str) -> list[storage.AnyPath]:
    """The folders of parameters that `checkpoint` is or holds. Raises UserError when there are none.

    Those of a run that has not ended, or of one of its checkpoints, are in that checkpoint.
    """
    folder = storage.path(checkpoint)
    if not folder.is_dir() and not checkpoints.holds_params(checkpoint):
        raise UserError(f"no folder {checkpoint}: name one with --checkpoint=DIR")
    if checkpoints.holds_params(checkpoint) or (folder / "tree").exists():
        return [folder]
    if (folder / "state").exists() or ((folder / "checkpoints").exists() and not any(folder.glob("*/tree"))):
        return [storage.path(place) for place in checkpoints.find_parts(checkpoint).values()]
    unfinished = sorted([*folder.glob("*.partial"), *folder.glob("*.writing")])
    if unfinished:
        raise UserError(f"{unfinished[0]} is not finished: run the command that writes {checkpoint} again")
    known = list(dict.fromkeys(part for form in FORMS.values() for part in form.parts))
    found = [path for path in folder.iterdir() if path.name in known or (path / "tree").is_dir()]
    # The transformer first: it tells best which model this is.
    found.sort(key=lambda path: (known.index(path.name) if path.name in known else len(known), path.name))
    if not found:
        raise UserError(
            f"nothing to export in {checkpoint}: name a folder that convert.wan or convert.cogvideox wrote, "
            "or the workdir of a finished run of prophy_jax.train"
        )
    if {"transformer", "backbone"} <= {path.name for path in found}:
        raise UserError(f"{checkpoint} holds a transformer and a backbone: export one of them at a time")
    return found


def _open_part(folder: storage.AnyPath, naming: str) -> Part:
    """Reads and checks everything but the values."""
    manifest = checkpoints.read_manifest(str(folder), f"{folder} is not complete: convert or train again")
    name, spec = manifest.get("part"), manifest.get("model")
    if not spec:
        raise UserError(
            f'{folder}/manifest.json has no "model", because an older version wrote it: convert again, or '
            "run the training command of its workdir again, which ends at once and rewrites it"
        )
    added = name in spec and "backbone" in spec
    kind, module = ("backbone", spec["backbone"].get("module")) if added else (name, spec.get("module"))
    known = [key for key, form in FORMS.items() if kind in form.parts]
    if not known:
        raise UserError(f"{folder} holds {name!r}, which has no PyTorch form: name a folder of parameters")
    if module not in known:
        raise UserError(
            f"{folder} is of the model {module!r}: a {name} can be exported of {', '.join(known)}"
        )
    form = FORMS[module]
    if naming not in form.configs:
        raise UserError(f"{folder} is of the model {module!r}: use --format={next(iter(form.configs))}")
    if added:
        own = name_module(spec[name])
        if own["module"] not in BESIDE:
            raise UserError(f"{folder} holds {own['module']!r}: only {', '.join(BESIDE)} has a PyTorch form")
        config = models.build(own, known={"categories": manifest.get("categories", ())})
        table = BESIDE[own["module"]](models.build(spec["backbone"]), config, form, naming)
    else:
        config = models.build(spec).config
        table = form.leaves(config, naming)
        try:
            form.configs[naming](config)
        except UserError as error:
            raise UserError(f"{folder} {error}") from error

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
        raise UserError(
            f"{folder} holds values of {sorted(strange)}: name a folder of floating-point numbers"
        )
    wanted = {path: jax.ShapeDtypeStruct(leaf.shape, "float32") for path, leaf in table.items()}
    checkpoints.check_shapes(stored, unflatten_dict(wanted, sep="/"), str(folder), dtypes=False)
    name = "transformer" if name == "backbone" else name
    return Part(name, added, form, folder, manifest, config, table, arrays)


def _open_tree(folder: storage.AnyPath) -> dict[str, tensorstore.TensorStore]:
    """The arrays of an Orbax PyTree checkpoint, by path. No value is read yet."""
    remedy, root, prefix = "the tree is not complete, convert or train again", storage.absolute(folder), []
    tree = f"{root}/tree"
    if within := checkpoints.in_checkpoint(str(folder)):
        checkpoints.verify_checkpoint(within[1], "name another checkpoint")
        tree, prefix = f"{storage.absolute(within[1])}/state", list(within.groups()[1:])
    metadata = read_json(f"{tree}/_METADATA", remedy)
    context = tensorstore.Context()
    opening = {}
    if not isinstance(metadata.get("tree_metadata"), dict) or "use_ocdbt" not in metadata:
        raise UserError(f"{tree}/_METADATA is damaged: {remedy}")
    for entry in metadata["tree_metadata"].values():
        keys = [str(key["key"]) for key in entry["key_metadata"]]
        if keys[: len(prefix)] != prefix:
            continue
        name = ".".join(keys) + "/"
        kvstore = storage.tensorstore_spec(f"{tree}/{name}")
        if metadata["use_ocdbt"]:
            base = storage.tensorstore_spec(f"{tree}/")
            kvstore = {"driver": "ocdbt", "base": base, "path": name}
        spec = {"driver": "zarr3" if metadata.get("use_zarr3") else "zarr", "kvstore": kvstore}
        opening["/".join(keys[len(prefix) :])] = tensorstore.open(spec, open=True, read=True, context=context)
    try:
        return {path: array.result() for path, array in opening.items()}
    except ValueError as error:
        raise UserError(f"{tree} is not readable ({_first_line(error)}): {remedy}") from error


# --- Writing ---------------------------------------------------------------------------------------


def _stem(part: Part, naming: str) -> str:
    """The name of its file, without number and ending."""
    return f"prophy_{part.name}" if part.added else STEMS[naming][part.name]


def _is_made(part: Part, naming: str, root: Path) -> bool:
    """Whether a folder, which appears when it is whole, has the files of these parameters."""
    found = list(root.glob(f"{_stem(part, naming)}*.safetensors"))
    try:
        for path in found:
            with safe_open(path, "numpy") as file:
                if (file.metadata() or {}).get("tree_sha256") != part.manifest["sha256"]:
                    return False
    except (OSError, SafetensorError):
        return False
    return bool(found)


def _write_part(
    part: Part, naming: str, root: Path, shard_bytes: int, progress: Callable[[int], Any]
) -> None:
    stem = _stem(part, naming)
    in_shards = part.name == "transformer" or (part.name == "text_encoder" and naming == "diffusers")
    shapes = {}
    for path in sorted(part.table):
        leaf, dtype = part.table[path], part.arrays[path].dtype.numpy_dtype
        shapes |= {name: (leaf.torch_shape, dtype) for name in leaf.names}
    shards = _split(shapes, shard_bytes if in_shards else sum(map(_nbytes, shapes.values())))
    metadata = {"format": "pt", "tree_sha256": part.manifest["sha256"]}
    if part.added:
        metadata |= _about_training(part, naming)
    (root / stem).parent.mkdir(exist_ok=True)
    tensors = _read(part, progress)
    files = {}
    for i, shard in enumerate(shards, start=1):
        number = f"-{i:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        path = root / f"{stem}{number}.safetensors"
        _write_safetensors(path, shard, tensors, metadata)
        files |= dict.fromkeys(shard, path.name)
    next(tensors, None)  # The reader makes its last check.
    if len(shards) > 1:
        total = {"total_size": part.nbytes}
        _write_json(root / f"{stem}.safetensors.index.json", {"metadata": total, "weight_map": files})
    config = _config(part, naming)
    if config:
        _write_json((root / stem).parent / "config.json", config)
    tokenizer = part.folder / "tokenizer"
    if part.name == "text_encoder" and tokenizer.is_dir():
        shutil.copytree(storage.fetched(tokenizer), root / TOKENIZER[naming])


def _nbytes(tensor: tuple[lv.Shape, np.dtype]) -> int:
    shape, dtype = tensor
    return int(np.prod(shape)) * dtype.itemsize


def _split(shapes: Mapping[str, Any], limit: int) -> list[dict[str, Any]]:
    """Consecutive tensors in groups of at most `limit` bytes, or of one tensor."""
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
        UserError: the hash of the values is not that of the manifest.
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
            if not checkpoints.is_finite(values):
                raise UserError(f"{part.folder}/tree: {path} holds NaN or infinity: convert or train again")
            digests[path][2].extend(checkpoints.leaf_digests(values))
            if leaf.factor != 1:
                values = (leaf.factor * values.astype(np.float32)).astype(values.dtype)
            bits = values.view(f"u{values.itemsize}")  # NumPy moves integers faster than bfloat16.
            for name, piece in zip(leaf.names[start:], bits if leaf.stacked else bits[None], strict=False):
                yield name, np.ascontiguousarray(leaf.to_torch(piece))
                progress(piece.nbytes)
    whole = checkpoints.in_checkpoint(str(part.folder))  # its files were verified
    if not whole and checkpoints.hash_of(digests) != part.manifest["sha256"]:
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

    The safetensors library needs a whole file in memory, and orders the metadata at random, so that the same
    export has other bytes. The format: the length of a JSON header in 8 bytes, the header, the values without
    gaps. Wide numbers come first, so that all are aligned. The header is padded, so that tensors of the usual
    sizes start on a cache line of the processor when they are mapped.
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


def _about_training(part: Part, naming: str) -> dict[str, str]:
    """What a reader of a part needs that was trained next to a backbone. A header's values are strings."""
    # A backbone that was trained too has a folder of its own; the manifest has the hash of a frozen one.
    trained = storage.path(storage.absolute(part.folder)).parent / "backbone" / "manifest.json"
    backbone = part.manifest.get("backbone_sha256", "")
    if trained.exists():
        backbone = checkpoints.read_manifest(str(trained.parent), "train again")["sha256"]
    return {
        "names": naming,
        part.name: json.dumps(dataclasses.asdict(part.config)),
        "backbone_sha256": backbone,
    }


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(" [tensorstore_spec=")[0]


# --- Configuration files ---------------------------------------------------------------------------


def _config(part: Part, naming: str) -> dict[str, Any] | None:
    """The config.json of a part; None where the format has none."""
    if part.added:
        return None
    fields = part.form.configs[naming](part.config)
    if fields and part.name == "text_encoder":
        sizes = collections.Counter()  # bytes by dtype
        for array in part.arrays.values():
            sizes[array.dtype.name] += array.size * array.dtype.numpy_dtype.itemsize
        fields["torch_dtype"] = sizes.most_common(1)[0][0]
    return fields and dict(sorted(fields.items()))


def _write_pipeline(parts: list[Part], root: Path) -> None:
    """Writes the files that make the components a pipeline of diffusers, when all of them are present."""
    whole = {part.name: part for part in parts}
    if not {"transformer", "vae", "text_encoder"} <= whole.keys() or not (root / "tokenizer").is_dir():
        return
    pipeline, scheduler = whole["transformer"].form.pipeline(whole["transformer"].config)
    index = {
        "_class_name": pipeline,
        "_diffusers_version": scheduler["_diffusers_version"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", _config(whole["text_encoder"], "diffusers")["architectures"][0]],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", _config(whole["transformer"], "diffusers")["_class_name"]],
        "vae": ["diffusers", _config(whole["vae"], "diffusers")["_class_name"]],
    }
    _write_json(root / "model_index.json", index)
    (root / "scheduler").mkdir()
    _write_json(root / "scheduler" / "scheduler_config.json", scheduler)


def main(arguments: list[str] | None = None) -> None:
    """The command; `arguments` are those of the process by default."""
    jax.config.update("jax_platforms", "cpu")  # Nothing is computed: an accelerator stays free.
    parser = cli.ArgumentParser("python -m convert.export", __doc__, buckets=("checkpoint",))
    parser.add_argument("--checkpoint", required=True, help="Folder of converted or trained parameters.")
    parser.add_argument("--format", choices=FORMATS, required=True, help="Names and files to write.")
    parser.add_argument("--dst", required=True, help="Folder to write, a new one.")
    options = parser.parse_args(arguments)
    export(options.checkpoint, options.format, options.dst)


if __name__ == "__main__":
    cli.run_plain(main, "interrupted: nothing was written")
