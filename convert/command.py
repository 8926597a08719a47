"""The command that converts a published model: PyTorch files -> Orbax checkpoints that this package reads.

    python -m convert.wan --src=DIR --dst=DIR [--component=all] [--dtype=bfloat16] [--dry_run]

This file has what the models have in common. A `Model` has what differs: key tables, and where a download has
its files (`convert.wan`, `convert.cogvideox`).
"""

import argparse
import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import ml_dtypes
import numpy as np
from tqdm import tqdm

import prophy_jax
from convert import files, stream, t5
from convert import leaves as lv
from prophy_jax import models
from prophy_jax.models.text.tokenizer import load_tokenizer
from prophy_jax.run import checksums, cli, hub, storage
from prophy_jax.run.errors import UserError, explain_system

# Stems of the weight files in the folder that diffusers has for a part.
STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
# What finds the names of a LoRA's tensors, and what messages say of it.
_LORA = {
    r"(^|[._])(lycoris|hada|lokr|glora|boft|ia3|oft_(blocks|diag)|dora_scale)([._]|$)": (
        "a LyCORIS and not a whole model: merge it into its base model first"
    ),
    r"\.diff(_b)?$|\.matrix_[AB]\.": "a LoRA and not a whole model: merge it into its base model first",
    r"(^|[._])lora([._]|$)": (
        "a LoRA and not a whole model: convert its base model, and give this to prophy_jax.sample or "
        "convert.merge as --lora=FILE"
    ),
}
_WEIGHTS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")  # suffixes of files that may hold weights
SRC = (
    "Folder of the download, or a file of it, or ORG/NAME[@REVISION] of the Hugging Face hub, of which the "
    "files needed are fetched."
)
_TOKENIZER = (".json", ".model", ".txt")  # suffixes of a tokenizer's files
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Part:
    """What identifies a part of a model."""

    module: str  # in prophy_jax.models
    public: Any  # A configuration, whose names identify the naming of a file.
    namings: tuple[str, ...]
    leaves: Callable[[Any, str], dict[str, lv.Leaf]]  # of a configuration and a naming
    of_json: Callable[[Mapping[str, Any]], dict[str, Any]]  # Fields of a configuration, from config.json.
    # The same from the tensors and --src, for the namings whose files come without a config.json.
    of_shapes: Mapping[str, Callable[[Mapping[str, lv.Shape], Path], dict[str, Any]]]
    unused: re.Pattern | None = None  # Finds the names of tensors that are not parameters.
    beside: str = ""  # The part whose files of_shapes reads too.


@dataclasses.dataclass(frozen=True)
class Source:
    """The files of a part in a download."""

    weights: list[Path]
    config: Path  # of config.json, which may be absent
    tokenizer: Path  # of the text encoder


@dataclasses.dataclass(frozen=True)
class Model:
    """A published model."""

    name: str  # for messages
    hub: str  # the name on the Hugging Face hub of one
    give: str  # what to give in place of another model
    command: str  # python -m of its module
    about: str  # the help
    parts: Mapping[str, Part]
    find: Callable[[Path, str], Source | None]  # of --src and a part; None where the part is absent
    wanted: Callable[[str], str]  # The names of a part's files, for messages: "neither A nor B".
    # Takes the place, the shapes of its tensors and its config.json. Raises UserError if they are of another
    # kind of model, and says which.
    refuse: Callable[[str, Mapping[str, lv.Shape], Mapping[str, Any]], None]
    pipelines: tuple[str, ...]  # of diffusers, that have these parts and no other
    # Patterns of the names of downloads, of what lies in them and of keys in model_index.json that other
    # models have, and what to say of these.
    others: Mapping[str, str]
    patterns: Mapping[str, tuple[str, ...]]  # of the files of each part in a repository of the hub


def known_fields(
    configuration: type, fields: Mapping[str, Any], names: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """The fields of a configuration that a config.json has; `names` gives ours for its other names."""
    ours = {names.get(name, name): value for name, value in fields.items()}
    return {field.name: ours[field.name] for field in dataclasses.fields(configuration) if field.name in ours}


def refuse_names(where: str, names: Collection[str], others: Mapping[str, str]) -> None:
    """Raises UserError when a tensor has the name of a LoRA, or one that a pattern of `others` finds."""
    for pattern, what in {**_LORA, **others}.items():
        found = next(filter(re.compile(pattern).search, names), None)
        if found:
            raise UserError(f"{where} is {what} (it has {found})")


def refuse_both(part: str, weights: list[Path], others: list[Path]) -> None:
    """Raises UserError when a download has a part in two layouts: they may be of two models."""
    if weights and others:
        raise UserError(f"the {part} is there twice, {weights[0]} and {others[0]}: leave one of them there")


@dataclasses.dataclass(frozen=True)
class Component:
    """A part that was found, recognised and checked, ready to be streamed."""

    part: str
    format: str
    model: dict[str, Any]  # for `models.build`
    job: stream.Job
    tokenizer: list[Path]  # its files
    repository: Mapping[str, str]  # of the hub, for the manifest; empty for a folder


def open_component(
    model: Model,
    src: Path,
    part: str,
    dtype: np.dtype | None,
    repository: Mapping[str, str] = MappingProxyType({}),
) -> Component:
    """Recognises a part and checks the names and shapes of all tensors. Reads headers and no weights.

    Raises:
        UserError: the part is missing, damaged, of another model, or does not fit its configuration.
    """
    kind, source = model.parts[part], _find(model, src, part)
    if source is None:
        raise UserError(_missing(model, src, part))
    paths = source.weights
    where = str(paths[0] if len(paths) == 1 else paths[0].parent)
    tables = {naming: kind.leaves(kind.public, naming) for naming in kind.namings}
    tensors = files.tensors(paths, kind.unused)
    names = lv.unwrapped((tensor.name for tensor in tensors), tables)
    tensors = [dataclasses.replace(tensor, name=names[tensor.name]) for tensor in tensors]
    fields = files.read_json(source.config) if source.config.is_file() else {}
    all_shapes = {tensor.name: tensor.shape for tensor in tensors}
    model.refuse(where, all_shapes, fields)

    naming = lv.recognise(all_shapes, tables)
    if naming is None:
        raise UserError(f"{where} holds no tensor of a {model.name} {part}: is it the right file?")
    tensors, copies = _set_copies_apart(tensors)
    known = _configure(model, str(source.config), lambda: kind.of_json(fields)) if fields else {}
    layers = known.get("num_layers", 0)
    if not isinstance(layers, int):
        raise UserError(f"{source.config}: {json.dumps(layers)} is no number of layers")
    if layers > len(all_shapes):  # or its table of names would fill the memory
        raise UserError(f"{source.config} has {layers} layers, {where} {len(all_shapes)} tensors")
    if known:
        sizes, table = _configure(model, str(source.config), lambda: _build(kind, naming, known))
    elif naming in kind.of_shapes:
        read, root = kind.of_shapes[naming], src if src.is_dir() else src.parent
        sizes, table = _configure(model, where, lambda: _build(kind, naming, read(all_shapes, root)))
    else:
        known_names = all_shapes.keys() & lv.tensor_shapes(tables[naming]).keys()
        if 2 * len(known_names) < len(all_shapes):
            raise UserError(
                f"{where} has {len(all_shapes)} tensors, of which {len(known_names)} have names of a "
                f"{model.name} {part}: is it the right file?"
            )
        raise UserError(f"{source.config} is missing: download it too")
    if kind.unused:
        tensors = [tensor for tensor in tensors if not kind.unused.search(tensor.name)]
    shapes = [(tensor.name, tensor.shape) for tensor in tensors if tensor.name not in copies]
    lv.check(shapes, table, f"{where} is not the {part} of its configuration ({naming} naming)")
    job, tokenizer = stream.Job(table, tensors, copies, dtype), []
    if part == "text_encoder":
        # The tokenizer may be in the folder of the weights.
        others = {*paths, *job.sources, source.config}
        tokenizer = [file for file in _tokenizer(source.tokenizer, sizes["vocab_size"]) if file not in others]
    return Component(part, naming, sizes, job, tokenizer, repository)


def _build(kind: Part, naming: str, fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, lv.Leaf]]:
    """A model for `models.build`, and the table of its leaves."""
    config = models.build({"module": kind.module, **fields}).config
    return {"module": kind.module, **dataclasses.asdict(config)}, kind.leaves(config, naming)


def _configure(model: Model, where: str, read: Callable[[], Any]) -> Any:
    """What `read` makes of a config.json or of shapes. Raises UserError that says where it cannot."""
    try:
        return read()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except KeyError as error:
        raise UserError(f"{where} lacks {error}: is it whole, and of {model.name}?") from error
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{where} does not describe a {model.name} model: {error}") from error


def _set_copies_apart(tensors: list[files.Tensor]) -> tuple[list[files.Tensor], dict[str, str]]:
    """transformers has two names for the embedding of T5; a file may use either or both."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    if t5.EMBEDDING not in shapes:
        rename = {t5.ALIAS: t5.EMBEDDING}
        return [dataclasses.replace(t, name=rename.get(t.name, t.name)) for t in tensors], {}
    same = shapes.get(t5.ALIAS) == shapes[t5.EMBEDDING]
    return tensors, {t5.ALIAS: t5.EMBEDDING} if same else {}


def _tokenizer(folder: Path, vocab_size: int) -> list[Path]:
    """The files in the folder of a tokenizer that belongs to the text encoder."""
    if not folder.is_dir():
        raise UserError(f"the text encoder's tokenizer {folder} is missing: download it too")
    load_tokenizer(folder, vocab_size)
    return sorted(path for path in folder.iterdir() if path.is_file())


def _missing(model: Model, src: Path, part: str) -> str:
    return f"{src} has {model.wanted(part)}"


def convert(component: Component, dst: storage.AnyPath) -> str:
    """Writes DST/<part> and returns the hash of its tree. Resumes a run that was cut off.

    Raises:
        UserError: a source is damaged, or the disk is full. What was written is removed then.
    """
    partial, target = _name_partial(dst, component.part), dst / component.part
    missing = [folder for folder in (partial, *partial.parents) if not folder.exists()]
    try:
        manifest = _write_part(component, partial)
    except stream.SourceError:
        shutil.rmtree((missing or [partial])[-1], ignore_errors=True)  # the source is what to say
        raise
    except OSError as error:
        if error.errno not in stream.DISK_FULL:
            raise UserError(
                explain_system(error) or f"{error.filename or partial}: {error.strerror}"
            ) from error
        shutil.rmtree((missing or [partial])[-1], ignore_errors=True)
        left = "cannot be removed" if partial.exists() else "is removed"
        raise UserError(f"the disk is full, {partial} {left}: free some space or change --dst") from error
    bucket, unlisted = storage.in_bucket(dst), (stream.JOURNAL, "manifest.json")
    if bucket:
        storage.upload(partial, target, without=unlisted)
    place = target if bucket else partial
    manifest = checksums.sealed({**manifest, "files": checksums.hash_files(place, without=unlisted)})
    storage.write_atomically(place / "manifest.json", json.dumps(manifest, indent=1))
    if bucket:
        shutil.rmtree(partial)
    else:
        (partial / stream.JOURNAL).unlink()
        partial.rename(target)
    return manifest["sha256"]


def _name_partial(dst: storage.AnyPath, part: str) -> Path:
    """Where a part is written: a bucket, which has no renames, gets it when it is whole."""
    if not storage.in_bucket(dst):
        return Path(dst) / f"{part}.partial"
    name = hashlib.sha256(storage.absolute(dst).encode()).hexdigest()[:16]
    return Path(storage.cache_folder("convert")) / name / f"{part}.partial"


def _write_part(component: Component, partial: Path) -> dict[str, Any]:
    """Writes all but the manifest, and returns that without "files"."""
    job = component.job
    sources = [(file.name, file.stat()) for file in job.sources]
    identity = {
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in sources],
        "dtype": str(job.dtype),
        "model": component.model,
        "prophy_jax": prophy_jax.__version__,
    }
    with tqdm(total=job.tensor_bytes(), unit="B", unit_scale=True, desc=component.part) as progress:
        written = stream.write_tree(job, partial, identity, progress)
    source = {
        **component.repository,
        "format": component.format,
        "files": written.pop("files"),
        "dtypes": sorted({str(tensor.dtype) for tensor in job.tensors}),
    }
    if component.tokenizer:
        source["tokenizer"] = _copy_files(component.tokenizer, partial / "tokenizer")
    about = {"part": component.part, "model": component.model, "versions": _versions()}
    return {**about, **written, "source": source}


def _copy_files(sources: list[Path], dst: storage.AnyPath) -> dict[str, str]:
    """Copies files into a folder; returns their hashes."""
    dst.mkdir(exist_ok=True)
    return {file.name: storage.hash_file(shutil.copyfile(file, dst / file.name)) for file in sources}


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


def _arguments(model: Model, arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.ArgumentParser(f"python -m {model.command}", model.about, buckets=("dst",))
    parser.add_argument("--src", required=True, help=SRC)
    parser.add_argument("--dst", type=storage.path, required=True, help="Folder to write the checkpoints to.")
    parser.add_argument("--component", choices=[*model.parts, "all"], default="all", help="What to convert.")
    parser.add_argument("--dtype", choices=list(DTYPES), help="Of all weights; default: that of the files.")
    parser.add_argument("--dry_run", action="store_true", help="Write nothing: only check and describe.")
    return parser.parse_args(arguments)


def _find(model: Model, src: Path, part: str) -> Source | None:
    """The files of a part in --src, which may also be the one file of this part."""
    if src.is_dir():
        return model.find(src, part)
    tokenizers = [src.parent / name for name in ("tokenizer", "google/umt5-xxl", ".")]
    tokenizer = next((folder for folder in tokenizers if any(folder.glob("*token*"))), tokenizers[0])
    return Source([src], src.parent / "config.json", tokenizer)


def _find_parts(model: Model, src: Path, wanted: str) -> tuple[Path, list[str]]:
    """--src, or the one file of weights in it, and the parts to convert; prints which of "all" are absent."""
    if not src.exists():
        raise UserError(
            f"{src} is not a folder: --src names the folder of the download, a file of weights, or a name on "
            f"the Hugging Face hub, such as {model.hub}"
        )
    _refuse_more(model, src)
    if src.is_dir():
        parts = [part for part in model.parts if model.find(src, part)]
        whole, name = src.resolve().parent, src.resolve().name
        if len(parts) < 2 and name in model.parts and model.find(whole, name):  # a part of a download
            if wanted not in ("all", name):
                raise UserError(
                    f"{src} is a {name}: leave out --component={wanted}, or give the folder of that"
                )
            return whole, [name]
        if wanted in parts:
            return src, [wanted]
        alone = [file for file in sorted(src.iterdir()) if file.suffix.lower() in _WEIGHTS]
        quantised = [*src.glob("*.gguf"), *src.glob("*/*.gguf")]
        if parts and wanted == "all":
            for part in model.parts:
                if part not in parts:
                    files.tensors(quantised)  # which says what they are
                    print(f"no {part}: {_missing(model, src, part)}")
            return src, parts
        if parts or len(alone) != 1:
            wants = model.parts if wanted == "all" else [wanted]
            missing = "; ".join(_missing(model, src, part) for part in wants)
            for file in [*alone, *quantised]:  # It may be a known kind of file.
                model.refuse(str(file), {t.name: t.shape for t in files.tensors([file])}, {})
            inside = (folder for folder in sorted(src.iterdir()) if folder.is_dir())
            if found := next((one for one in inside if any(model.find(one, part) for part in wants)), None):
                raise UserError(f"no {model.name} weights in {src}, but in {found}: give --src={found}")
            raise UserError(f"no {model.name} weights: {missing}")
        src = alone[0]
        _refuse_more(model, src)
    part = _part_of(model, src)
    if wanted not in ("all", part):
        raise UserError(f"{src} is a {part}: leave out --component={wanted}, or give the file of that")
    return src, [part]


def _part_of(model: Model, file: Path) -> str:
    """Which part of the model a file holds, by the names in it."""
    unused = [kind.unused.pattern for kind in model.parts.values() if kind.unused]
    found = files.tensors([file], re.compile("|".join(unused)) if unused else None)
    shapes = {tensor.name: tensor.shape for tensor in found}
    model.refuse(str(file), shapes, {})
    shared = {}
    for part, kind in model.parts.items():
        tables = {naming: kind.leaves(kind.public, naming) for naming in kind.namings}
        known = set().union(*map(lv.tensor_shapes, tables.values()))
        shared[part] = len(known.intersection(lv.unwrapped(shapes, tables).values()))
    best = max(shared, key=shared.get)
    if not shared[best]:
        raise UserError(
            f"{file} holds no tensor of a {model.name} {' or '.join(model.parts)}: is it the right file?"
        )
    return best


def _fetch(
    model: Model,
    repository: hub.Repository,
    wanted: list[str],
    dst: storage.AnyPath,
    origin: Mapping[str, str],
    dtype: np.dtype | None,
    dry_run: bool,
) -> tuple[Path, list[str]]:
    """The folder of a repository's files, and the parts to convert: not those that DST has already."""
    made = [part for part in wanted if _is_of(dst / part, origin, dtype)]
    for part in made:
        print(f"{dst / part}: of {repository.name} at this revision already")
    left = [part for part in wanted if part not in made]
    src = repository.fetch(functools.partial(_choose, model, left, dst, bool(made)), dry_run)
    parts = [part for part in left if src and model.find(src, part)]
    for part in left:
        if src and part not in parts:
            print(f"no {part}: {_missing(model, Path(repository.name), part)}")
    if not parts and not (left and dry_run):
        print("nothing left to do")
    return src or Path(), parts


def _choose(
    model: Model, parts: list[str], dst: storage.AnyPath, made: bool, src: Path, whole: bool
) -> Iterator[Path]:
    """The files that the conversion of `parts` reads, as `hub.Repository.fetch` asks for them.

    `made`: whether DST has other parts of it. Raises UserError if names and configurations tell of another
    model, if the repository has none of the parts, and if DST has one.
    """
    if not parts:
        return
    index = src / "model_index.json"
    if index.is_file():
        yield index
        if not index.stat().st_size:
            return
    _refuse_more(model, src)
    sources = {part: model.find(src, part) for part in parts}
    if whole and not made and not any(sources.values()):
        raise UserError(f"no {model.name} weights: {'; '.join(_missing(model, src, part) for part in parts)}")
    for part, source in sources.items():
        if source is None:
            if not whole:
                yield src / part
            continue
        _refuse_existing(dst, part)
        yield from _files(source)
        if source.config.is_file() and source.config.stat().st_size:  # It is fetched before the weights.
            model.refuse(str(source.config), {}, files.read_json(source.config))
        beside = model.find(src, model.parts[part].beside) if model.parts[part].beside else None
        if beside and not source.config.is_file():
            yield from [beside.config] if beside.config.is_file() else _files(beside)
        if part == "text_encoder":
            tokenizer = [path for path in source.tokenizer.glob("*") if path.suffix in _TOKENIZER]
            yield from tokenizer or ([] if whole else [source.tokenizer])


def _files(source: Source) -> Iterator[Path]:
    """Weights and configuration; of an index that is not empty, what it lists."""
    for path in source.weights:
        yield path
        if path.suffix == ".json" and path.stat().st_size:
            yield from (path.parent / name for name in set(files.read_index(path).values()))
    if source.config.is_file():
        yield source.config


def _is_of(folder: storage.AnyPath, repository: Mapping[str, str], dtype: np.dtype | None) -> bool:
    """Whether a folder has a part that was converted from this repository, with this dtype."""
    if not (folder / "manifest.json").is_file():
        return False
    manifest = files.read_json(folder / "manifest.json")
    source = manifest.get("source", {})
    dtypes = {kind for _, kind in manifest["shapes"].values()}
    return repository.items() <= source.items() and dtypes == (
        {str(dtype)} if dtype else set(source["dtypes"])
    )


def _is_made(component: Component, dst: storage.AnyPath) -> bool:
    """Whether DST has a part that was made of the same files, with the same dtypes; if so it says so."""
    folder, job = dst / component.part, component.job
    if not (folder / "manifest.json").is_file():
        return False
    manifest = files.read_json(folder / "manifest.json")
    listed = {
        file["name"]: (file["bytes"], file["sha256"]) for file in manifest.get("source", {}).get("files", ())
    }
    shapes = {path: [list(leaf.shape), str(job.dtypes()[path])] for path, leaf in job.table.items()}
    same = manifest.get("shapes") == shapes and listed.keys() == {file.name for file in job.sources}
    if not same or any(listed[file.name][0] != file.stat().st_size for file in job.sources):
        return False
    if any(listed[file.name][1] != storage.hash_file(file) for file in job.sources):
        return False
    with checksums.verified(folder, manifest.get("files", {}), "delete it, and run the same command again"):
        print(f"{folder}: made of these files already")
    return True


def _refuse_existing(dst: storage.AnyPath, part: str) -> None:
    folder = dst / part
    if (folder / "manifest.json" if storage.in_bucket(dst) else folder).exists():
        raise UserError(f"{dst / part} exists: delete it or choose another --dst")


def _refuse_more(model: Model, src: Path) -> None:
    """Raises UserError if --src is of a model with more than the parts of this one, and says which.

    A single part tells nothing of it: it is the name of the download, what lies next to the part, or the list
    that diffusers has of all parts.
    """
    place = src if src.is_dir() else src.parent
    if place.name in model.parts:  # of a whole download
        place = place.parent
    index = place / "model_index.json"
    fields = files.read_json(index) if index.is_file() else {}
    # Later versions of diffusers list what a pipeline could have and does not: null, false or [null, null].
    has = [key for key, value in fields.items() if any(value if isinstance(value, list) else [value])]
    names = [src.resolve().name, place.resolve().name, *has]
    if src.is_dir() or src.parent != place:  # The file of a folder is not about its neighbours.
        names += [path.name for path in place.iterdir() if path.is_dir() or path.suffix in _WEIGHTS]
    for pattern, what in model.others.items():
        found = next(filter(re.compile(pattern, re.IGNORECASE).fullmatch, names), None)
        if found:
            raise UserError(f"{src}: {what} (found {found}): give a {model.give}")
    kind = fields.get("_class_name")
    if kind and kind not in model.pipelines:
        raise UserError(f"{index} is of a {kind}, which {model.name} is not: give a {model.give}")
    known = ("scheduler", "tokenizer", *model.parts)
    more = next((key for key in has if not key.startswith("_") and key not in known), None)
    if more:
        raise UserError(f"{index} has {more}, which {model.name} does not have: give a {model.give}")


def _return_freed_memory() -> None:
    """glibc would keep for each of TensorStore's threads what that thread freed: a chunk of an array."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(-1, 1 << 20)  # M_TRIM_THRESHOLD


def main(model: Model, arguments: list[str] | None = None) -> None:
    """The command; `arguments` are those of the process by default."""
    jax.config.update("jax_platforms", "cpu")  # Nothing is computed: an accelerator stays free.
    _return_freed_memory()
    options = _arguments(model, arguments)
    src, dst, dtype = Path(options.src), options.dst, DTYPES.get(options.dtype)
    if dst.exists() and not dst.is_dir():
        raise UserError(f"{dst} is not a folder: choose another --dst")
    wanted = [options.component] if options.component != "all" else list(model.parts)
    patterns = ["model_index.json", *(pattern for part in wanted for pattern in model.patterns[part])]
    origin = {}
    if repository := hub.find(options.src, patterns):
        origin = {"repository": repository.name, "revision": repository.commit}
        src, parts = _fetch(model, repository, wanted, dst, origin, dtype, options.dry_run)
    else:
        src, parts = _find_parts(model, src, options.component)
    components = [open_component(model, src, part, dtype, origin) for part in parts]
    components = [component for component in components if not _is_made(component, dst)]
    for component in components:
        _refuse_existing(dst, component.part)
    if parts and not components:
        print("nothing left to do")
    jobs = {_name_partial(dst, component.part): component.job for component in components}
    stream.check_space(jobs)
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


def run(model: Model) -> None:
    """The process: `main`, with one line for every error."""
    cli.run_plain(functools.partial(main, model), "interrupted: the same command resumes from here")
