"""`prophy_jax.load`: which weights, of which model, with which defaults. docs/library.md shows it in use.

    pipe = prophy_jax.load("checkpoints/wan2.1-t2v-1.3b", branch="runs/wan/branch", lora="my.safetensors")
    clips = pipe.sample("water pours into a glass")

It reads no flags, keeps no state outside these objects, and prints nothing unless asked for progress. What
cannot be done is a `UserError` of one line.
"""

import dataclasses
import importlib
import numbers
import os
import pkgutil
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from prophy_jax import models
from prophy_jax.library.arguments import number, own_words
from prophy_jax.library.loaded import Loaded, use_checkpoint
from prophy_jax.library.pipeline import Pipeline
from prophy_jax.run import checkpoints, config_check, config_help, storage, workdir
from prophy_jax.run.errors import UserError

Folder = str | os.PathLike
Adapter = Folder | tuple[Folder, float]


@own_words()
def load(
    checkpoint: Folder,
    *,
    branch: Folder | Sequence[Folder] | None = None,
    lora: Adapter | Sequence[Adapter] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Pipeline:
    """A pipeline from folders of weights.

    Sizes are those of the weights. The defaults of `Pipeline.sample` are those of the run that trained the
    branch or the backbone, where its folder has a config.json; else those of the public model that is nearest
    in size.

    Args:
        checkpoint: Weights of `convert.wan` or `convert.cogvideox`, or a run that trained a backbone, one of
            its checkpoints, or its folder `backbone`.
        branch: What a run trained beside the backbone: its folder `branch`, the run, or one of its
            checkpoints; several may be given.
        lora: A safetensors file of diffusers, PEFT, kohya or ComfyUI, (file, strength), or a list of these.
        settings: Configuration keys to change, such as {"codec.tile": (30, 52), "frozen_dtype": "float32"}.

    Raises:
        UserError: weights that are missing, not converted, damaged, or do not belong together; a LoRA that
            fits no layer or is merged already; settings that do not exist.
    """
    checkpoint = _as_text("checkpoint", checkpoint)
    place = _find_backbone(checkpoint)
    folders = _find_parts(branch)
    manifest = checkpoints.read_manifest(place, "name another folder as checkpoint")
    manifests = {name: checkpoints.read_manifest(folder, "name another") for name, folder in folders.items()}
    for name, own in manifests.items():
        if own.get("backbone_sha256", manifest["sha256"]) != manifest["sha256"]:
            raise UserError(
                f"branch={folders[name]} was trained beside another backbone than checkpoint={checkpoint}: "
                "name that one as checkpoint"
            )
    config = _find_config([*folders.values(), checkpoint], manifest, place)
    config.parts = {
        name: own.get("model", {}).get(name) or config.get("parts", {}).get(name)
        for name, own in manifests.items()
    }
    if unknown := [name for name, spec in config.parts.items() if not spec]:
        raise UserError(
            f"{folders[unknown[0]]} does not say what it is: name the run that trained it as branch"
        )
    config.mesh = dict(data=-1, fsdp=1, context=1)
    _change(config, settings or {})
    whole = (storage.path(checkpoint) / "transformer").is_dir()
    use_checkpoint(config, checkpoint if whole else place, say=lambda line: None)
    adapters = _find_adapters(lora)
    loaded = Loaded(config, {**folders, "backbone": place}, adapters)
    scale = {name: getattr(part, "strength", 1.0) for name, part in loaded.model.parts.items()}
    return Pipeline(loaded, FrozenConfigDict(config), scale, {})


def _as_text(name: str, folder: Any) -> str:
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise UserError(f"{name}={folder!r}: name {'a file' if name == 'lora' else 'a folder'}")
    return os.path.expanduser(os.fspath(folder)).rstrip("/") or "/"


def _listed(given: Any) -> Sequence[Any]:
    """None, one of something, or several, as a sequence."""
    if given is None:
        return ()
    return given if isinstance(given, Sequence) and not isinstance(given, str) else [given]


def _find_backbone(checkpoint: str) -> str:
    """The folder of the backbone's parameters. Raises UserError with what to do where there are none."""
    root = storage.path(checkpoint)
    if (root / "transformer" / "manifest.json").exists():
        return os.path.join(checkpoint, "transformer")
    if checkpoints.holds_params(checkpoint):
        if (name := checkpoints.read_manifest(checkpoint, "").get("part")) not in (None, "", "backbone"):
            raise UserError(
                f"checkpoint={checkpoint} is of {name!r}, not of a backbone: name the folder of whole weights"
            )
        return checkpoint
    trained = (root / "config.json").is_file() and any(root.glob("*/manifest.json"))
    if trained or (root / "checkpoints").is_dir() or (root / "state").is_dir():
        found = checkpoints.find_parts(checkpoint)
        if "backbone" not in found:
            raise UserError(
                f"checkpoint={checkpoint} trained no backbone, but {', '.join(sorted(found))}: name the "
                "weights that it was trained beside as checkpoint, and this folder as branch"
            )
        return found["backbone"]
    what = "holds no converted weights" if root.is_dir() else "is no folder"
    remedy = _advise_to_convert(checkpoint)
    raise UserError(f"checkpoint={checkpoint} {what}: {remedy}, and name the folder that it writes")


def _advise_to_convert(checkpoint: str) -> str:
    """The command for what is no converted folder: a name on the hub, a place of our own, or a download."""
    root, public = storage.path(checkpoint), _public()
    names = {
        name: config.backbone_remedy
        for configs in public.values()
        for config in configs
        for name in re.findall(r"--(?:src|dst)=(\S+)", config.backbone_remedy)
    }
    if checkpoint in names:
        return names[checkpoint]
    about = checkpoint
    for file in ("config.json", "model_index.json", "transformer/config.json"):
        if (root / file).is_file():
            about += (root / file).read_text(errors="replace")
    modules = [module for module in public if module in about.lower()] or [*public]
    remedies = [public[module][0].backbone_remedy for module in modules]
    if root.is_dir():
        remedies = [re.sub(r"--src=\S+", f"--src={checkpoint}", remedy) for remedy in remedies]
    return "; or ".join(remedies)


def _find_parts(folders: Folder | Sequence[Folder] | None) -> dict[str, str]:
    """Part -> folder of its parameters. Raises UserError on a folder of none, and on a part given twice."""
    found: dict[str, str] = {}
    for folder in _listed(folders):
        folder = _as_text("branch", folder)
        parts = checkpoints.find_parts(
            folder, "name a run of prophy_jax.train, or the folder of a part, such as WORKDIR/branch"
        )
        parts = {name: place for name, place in parts.items() if name not in ("backbone", "")}
        if not parts:
            raise UserError(f"branch={folder} is of a backbone alone: name it as checkpoint")
        for name, place in parts.items():
            if name in found:
                raise UserError(f"branch names the part {name!r} twice: {found[name]} and {place}")
            found[name] = place
    return found


def _find_adapters(lora: Adapter | Sequence[Adapter] | None) -> list[tuple[str, float]]:
    """(file, strength) of the argument lora."""
    pair = isinstance(lora, tuple) and len(lora) == 2 and isinstance(lora[1], numbers.Real)
    found = []
    for entry in [lora] if pair else _listed(lora):
        file, strength = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, 1.0)
        file = _as_text("lora", file)
        if not storage.path(file).is_file():
            raise UserError(f"lora={file}: there is no such file; name a LoRA in safetensors")
        found.append((file, number(f"the strength of lora={file}", strength)))
    return found


def _find_config(folders: Sequence[str], manifest: Mapping[str, Any], place: str) -> ConfigDict:
    """The configuration of the run that made one of these folders, the first; else the nearest public one."""
    for folder in folders:
        part = workdir.run_of(folder.rstrip("/"))
        whole = (storage.path(part) / "transformer").is_dir()
        for parent in [part] if whole else [part, os.path.dirname(part) or "."]:
            if (storage.path(parent) / "config.json").is_file():
                return ConfigDict(_without_lists(workdir.read_run(parent)["config"]))
    stored = manifest.get("model", {})
    configs = _public().get(stored.get("module"))
    if not configs:
        raise UserError(f"{place} is of no public model, and no run's config.json is beside it: name the run")
    theirs = dataclasses.asdict(models.build(stored).config)

    def distance(config: ConfigDict) -> tuple[int, int]:
        own = dataclasses.asdict(models.build(config.backbone).config)
        other = [key for key in theirs if own[key] != theirs[key] and key != "text_len"]
        return sum(isinstance(theirs[key], str | bool) for key in other), len(other)

    return min(configs, key=distance)


def _public() -> dict[str, list[ConfigDict]]:
    """Module of a backbone -> configurations of the public models of its kind."""
    package = importlib.import_module("configs")
    found = {}
    for entry in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"configs.{entry.name}")
        if variants := getattr(module, "PUBLIC", ()):
            found[entry.name] = [module.get_config(variant) for variant in variants]
    return found


def _without_lists(value: Any) -> Any:
    """JSON as a configuration file has it: sequences are tuples."""
    if isinstance(value, dict):
        return {key: _without_lists(own) for key, own in value.items()}
    return tuple(_without_lists(own) for own in value) if isinstance(value, list) else value


def _change(config: ConfigDict, settings: Mapping[str, Any]) -> None:
    """Sets configuration keys. Raises UserError on one that does not exist or takes no such value."""
    known = [key for key, _ in config_help.list_keys(config)]
    for key, value in settings.items():
        if not any(name == key or name.startswith(f"{key}.") for name in known):
            near = config_check.nearest(key, known)
            hint = f"; did you mean {near!r}?" if near else ""
            raise UserError(f"settings has {key!r}, which is no key of the configuration{hint}")
        try:
            config.update_from_flattened_dict({key: value})
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"settings[{key!r}]={value!r}: {error}") from error
    if settings:
        config_check.check(config)
