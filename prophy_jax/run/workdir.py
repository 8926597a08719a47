"""Folders that a command fills: which configuration they are of.

`run_identity` is the one place that says which keys of a configuration decide what is made.
"""

import json
import os
import re
import socket
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prophy_jax.run import checksums, storage
from prophy_jax.run.errors import UserError

SHARED_S = 60  # a new file must appear on all hosts in this time: network file systems are that slow
_VIDEO = ("data.height", "data.width", "data.frames", "data.fps")
_ENCODERS = ("codec", "text_encoder")
# Scope -> the keys that decide what is made, each with all that is below it ("": all keys), and those of them
# that do not.
IDENTITY: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # A run of prophy_jax.train, which resumes only what is equal in all of these.
    "train": (
        ("",),
        (
            *("mesh", "accumulation", "attention", "log", "checkpoint", "samples", "label", "label_check"),
            *("evaluators", "study"),
            *("steps", "losses", "caption_dropout", "validation"),
            *(
                f"optimizer.{key}"
                for key in ("warmup", "decay", "clip", "b1", "b2", "eps", "weight_decay", "ema")
            ),
        ),
    ),
    # What a finished run learned: any number of steps, on any data.
    "model": (("backbone", "parts", "objective", "losses", "reduction", *_ENCODERS), ()),
    # What the arms of prophy_jax.study have in common; data and backbone are noted next to it.
    "study": (
        ("",),
        (
            *("seed", "mesh", "accumulation", "attention", "log", "checkpoint", "validation"),
            *("label", "label_check", "evaluators", "study", "samples", "data.side"),
            *("backbone_params", "codec_params", "text_encoder_params", "data.dir", "backbone_remedy"),
        ),
    ),
    # Records of prophy_jax.prepare.
    "data": ((*_VIDEO, "data.buckets", "data.max_upscale", *_ENCODERS), ()),
    # Labels of prophy_jax.label; a larger batch changes their rounding alone.
    "labels": (("label",), ("label.batch",)),
    # Clips of prophy_jax.sample.
    "clips": (("backbone", "parts", *_ENCODERS, "samples", *_VIDEO), ()),
}

# What a run reads -> the key that names its folder.
FOLDERS = {
    "backbone": "backbone_params",
    "codec": "codec_params",
    "text_encoder": "text_encoder_params",
    "data": "data.dir",
}
# Keys of earlier versions -> those of this one.
RENAMED = {"branch": "parts.branch", "data.labels": "data.side.alignment"}


# --- Identity --------------------------------------------------------------------------------------


def config_as_json(config: Any) -> dict[str, Any]:
    """A copy of a ConfigDict, or of a mapping that was saved as JSON, in JSON types."""
    text = config.to_json_best_effort() if hasattr(config, "to_json_best_effort") else json.dumps(config)
    return json.loads(text)


def run_identity(config: Any, scope: str) -> dict[str, Any]:
    """The part of a configuration that decides what is made, in JSON types; equal for equal results.

    Args:
        config: a ConfigDict, or one that was saved as JSON by this or an earlier version.
        scope: a key of `IDENTITY`.
    """
    config = json.loads(json.dumps(_modernised(config_as_json(config)), sort_keys=True))
    if parts := config.get("parts"):
        config["parts"] = {name: part and identify_part(part) for name, part in parts.items()}
    optimizer = config.get("optimizer", {})
    if rates := optimizer.pop("learning_rates", {}):  # earlier versions had them in place of the names
        optimizer["groups"] = [
            [pattern, (rates.get(rate) or None) if isinstance(rate, str) else rate]
            for pattern, rate in optimizer["groups"]
        ]
    # What is the default of a key is not in configurations of earlier versions.
    for table, key in (("data", "taxonomy"), ("data", "weights"), ("codec", "encode_whole")):
        if not config.get(table, {}).get(key, True):
            del config[table][key]
    if scope == "train" and "groups" in optimizer:  # which parameters train, at whatever rate
        optimizer["groups"] = [[pattern, bool(rate)] for pattern, rate in optimizer["groups"]]
    keys, without = IDENTITY[scope]
    chosen: dict[str, Any] = config if keys == ("",) else {}
    for key in keys:
        *path, last = key.split(".")
        inside, source = chosen, config
        for name in path:
            inside, source = inside.setdefault(name, {}), source.get(name, {})
        if last in source:
            inside[last] = source[last]
    for key in without:
        *path, last = key.split(".")
        inside = chosen
        for name in path:
            inside = inside.get(name, {})
        inside.pop(last, None)
    return chosen


def name_module(part: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says of a part, as it was stored. The first part had no name of its file."""
    return {"module": "prophy", **part}


def identify_part(part: Mapping[str, Any]) -> dict[str, Any]:
    """What `name_module` gives, to be compared: how many categories there are follows from `data.taxonomy`.

    Earlier versions said it of the first part too.
    """
    part = name_module(part)
    if part["module"] == "prophy" and part.get("refinement"):
        part["refinement"] = {key: value for key, value in part["refinement"].items() if key != "categories"}
    if part["module"] == "lora" and not part.get("rank_stabilized"):  # earlier versions did not say it
        part = {key: value for key, value in part.items() if key != "rank_stabilized"}
    return part


def _modernised(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration saved by an earlier version, with the keys of this one."""
    if "branch" in config:
        branch = config.pop("branch")
        config["parts"] = {"branch": name_module(branch)} if branch else {}
    if "labels" in config.get("data", {}):
        config["data"]["side"] = {"alignment": config["data"].pop("labels")}
    if "absolute_alignment" in config.get("losses", {}):  # it was reduced as its sibling
        was = config.get("reduction", {})
        config["reduction"] = {"absolute_alignment": was.get("alignment", "mean"), **was}
    return config


def differences(was: Mapping[str, Any], own: Mapping[str, Any], prefix: str = "") -> str:
    """Where two nested dicts of JSON types differ, e.g. "data.frames was 9, is 13"; "" where they agree."""
    found = []
    for key in sorted(was.keys() | own.keys()):
        old, new = was.get(key), own.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found.append(differences(old, new, f"{prefix}{key}."))
        elif old != new:
            found.append(f"{prefix}{key} was {old}, is {new}")
    return "; ".join(filter(None, found))


# --- Claiming a folder -----------------------------------------------------------------------------


def claim(
    folder: str | os.PathLike,
    file: str,
    own: Mapping[str, Any],
    flag: str,
    compare: Callable[[dict[str, Any], dict[str, Any]], str] = differences,
    add: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Takes a folder without files for what `own` describes, or checks that it was taken for the same.

    Of several processes that claim a folder at once, one decides what it is for.

    Args:
        folder: made if it does not exist.
        file: the JSON file below `folder` that says what the folder is for.
        own: JSON types; what the folder is for.
        flag: the flag of the command that names the folder, such as "--out", for error messages.
        compare: (stored, own) -> how they differ, "" if they do not.
        add: (stored, own) -> the new content of `file`; by default it stays as it was first written.

    Returns:
        The content of `file`.

    Raises:
        UserError: the folder is for something else; nothing in it was changed.
    """
    root, own = storage.path(folder), json.loads(json.dumps(own))
    path = root / file
    if root.exists() and not root.is_dir():
        raise UserError(f"{folder} is not a folder: name another {flag}")
    if not path.exists():
        if _holds_files(folder, path.name) and not path.exists():  # another process may have come first
            raise UserError(f"{folder} is not empty and holds no {file}: name another {flag}")
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.create(path, _as_text(checksums.sealed(own)).encode())
    remedy = f"name another {flag}"
    stored = checksums.unsealed(read_json(path, remedy), str(path), remedy)
    try:
        different = compare(stored, own)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged, it does not say what the folder is for: name another {flag}"
        ) from error
    if different:
        raise UserError(
            f"{path} says that the folder was made differently ({different}): name another {flag}, or give "
            "the configuration and the inputs that it was made with"
        )
    if add is not None and (content := add(stored, own)) != stored:
        storage.write_atomically(path, _as_text(checksums.sealed(content)))
        return content
    return stored


def claim_run(
    workdir: str | os.PathLike, config: Any, references: Mapping[str, str], categories: Sequence[str] = ()
) -> str:
    """Claims the folder of a training run: WORKDIR/config.json, {"config", "references", ...}.

    What may change when a run resumes does change there, and "history" has a line that says so for each time:
    {"step": of the checkpoint that was there, "changed": as `differences` gives it}.

    Args:
        workdir: the folder.
        config: the whole configuration.
        references: hashes of what the run reads, {"NAME_sha256": ...}, where NAME is one of `FOLDERS` or a
            side data set. Their folders may be others when the run resumes; their content may not.
        categories: names of what the parts tell apart.

    Returns:
        What changed this time; "" for nothing.

    Raises:
        UserError: the folder is of another run, or of something else.
    """

    def compare(stored: dict[str, Any], own: dict[str, Any]) -> str:
        runs = [
            {"config": run_identity(run["config"], "train"), "references": dict(run["references"])}
            for run in (stored, own)
        ]
        begun = own["references"].keys() - stored["references"].keys()
        changed = [
            f"it did not begin with --init of {name[5:-7]}"
            for name in sorted(begun)
            if name.startswith("init_")
        ]
        for name in stored["references"].keys() & own["references"].keys():  # earlier versions noted fewer
            old, new = (run["references"].pop(name) for run in runs)
            folders = [_pop_folder(run["config"], name.removesuffix("_sha256")) for run in runs]
            if old != new:
                (key, was), (_, now) = folders
                changed.append(
                    f"{key} was {was}, is {now}, of other content: {name} {old[:12]}, now {new[:12]}"
                )
        rest = differences(*({**run, "references": {}} for run in runs))
        return "; ".join(filter(None, (*changed, rest)))

    def add(stored: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        changed = differences(_modernised(config_as_json(stored["config"])), own["config"])
        if changed:
            now.append(changed)
            history = [*stored.get("history", []), {"step": _latest_step(workdir), "changed": changed}]
            stored = {**stored, "config": own["config"], "history": history}
        return {**stored, "references": stored["references"] | own["references"]}

    now: list[str] = []
    own = {"config": config_as_json(config), "references": dict(references), "categories": list(categories)}
    claim(workdir, "config.json", own, "--workdir", compare, add)
    return "".join(now)


def run_of(folder: str) -> str:
    """The run of a checkpoint, WORKDIR/checkpoints/N, or of parameters in one; else the folder itself."""
    return re.sub(r"/checkpoints/\d+(/\w+/\w+)?/?$", "", folder)


def _latest_step(workdir: str | os.PathLike) -> int:
    """Of the checkpoints in a run's folder; 0 without any."""
    saved = storage.path(workdir) / "checkpoints"
    return max((int(own.name) for own in saved.glob("*") if own.name.isdigit()), default=0)


def _pop_folder(config: dict[str, Any], name: str) -> tuple[str, Any]:
    """(key, folder) of what a reference is about; the key is taken out of the configuration."""
    key = FOLDERS.get(name, f"data.side.{name}")
    *path, last = key.split(".")
    inside = config
    for part in path:
        inside = inside.get(part, {})
    return f"config.{key}", inside.pop(last, None)


def read_run(workdir: str | os.PathLike) -> dict[str, Any]:
    """{"config", "references"} of a run, as `claim_run` wrote them; `config` has the keys of this version.

    Raises:
        UserError: there is no such run.
    """
    path = storage.path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"{path} is missing: name the --workdir of a run of prophy_jax.train")
    remedy = "name another --workdir"
    run = checksums.unsealed(read_json(path, remedy), str(path), remedy)
    if not all(isinstance(run.get(key), dict) for key in ("config", "references")):
        raise UserError(f"{path} is of no run of prophy_jax.train: name another --workdir")
    try:
        config = _modernised(run["config"])
        run_identity(config, "train")  # which looks at all that it should have
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): name another --workdir") from error
    return {**run, "config": config}


def _holds_files(folder: str | os.PathLike, claimed: str) -> bool:
    """Whether there are files below `folder`, other than unfinished ones of `claimed`."""
    if storage.in_bucket(folder):
        names = (name.rpartition("/")[2] for name in storage.list_files(folder))
    else:  # ends at the first: the folder may be a large one of somebody else
        names = (path.name for path in storage.path(folder).rglob("*") if not path.is_dir())
    return any(not name.startswith(f".{claimed}.") for name in names)


def _as_text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False)


class Stored(dict[str, Any]):
    """A JSON object of a file. A key that it lacks is a UserError, which names the file and what to do."""

    def __init__(self, content: Mapping[str, Any], where: str, remedy: str) -> None:
        super().__init__(content)
        self._where, self._remedy = where, remedy

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self._where} is damaged, it lacks {key!r}: {self._remedy}")


def read_json(path: str | os.PathLike, remedy: str, form: Any = dict) -> Stored:
    """The object in a JSON file. Raises UserError with `remedy` when it is missing, damaged or not of `form`.

    Args:
        path: the file.
        remedy: what to do then.
        form: as `parse_json` takes it.
    """
    try:
        content = storage.path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"no {path}: {remedy}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    return parse_json(content, str(path), remedy, form)


def parse_json(content: bytes, where: str, remedy: str, form: Any = dict) -> Stored:
    """The object in JSON. Raises UserError, with where it is and `remedy`, when it is damaged.

    `form` says what it is: a type, a function that tells, [form] for a list, (form, form) for a list of two
    values, {"key": form} for an object that may have these keys, {str: form} for one of any keys.
    """
    try:
        found = json.loads(content, object_hook=lambda own: Stored(own, where, remedy))
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, or a number too long
        raise UserError(
            f"{where} is not a readable JSON file ({error}), so it is damaged: {remedy}"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{where} is not a JSON object, so it is damaged: {remedy}")
    for key, value in found.items():
        if isinstance(form, dict) and not _fits(value, form.get(key, form.get(str, object))):
            raise UserError(f"{where} is damaged, {key!r} is not what it should be: {remedy}")
    return found


def _fits(value: Any, form: Any) -> bool:
    """Whether JSON types are of a form; see `parse_json`."""
    if isinstance(form, list):
        return isinstance(value, list) and all(_fits(own, form[0]) for own in value)
    if isinstance(form, dict):
        return isinstance(value, dict) and all(
            _fits(own, form.get(key, form.get(str, object))) for key, own in value.items()
        )
    if isinstance(form, tuple):
        return isinstance(value, list) and len(value) == len(form) and all(map(_fits, value, form))
    return isinstance(value, form) if isinstance(form, type | types.UnionType) else form(value)


def wait_for_file(path: str | os.PathLike) -> None:
    """Waits until a file appears that another process wrote. Raises UserError if it does not."""
    until = time.monotonic() + SHARED_S
    while not storage.path(path).exists():
        if time.monotonic() > until:
            raise UserError(
                f"{path}, which another process wrote, cannot be seen on {socket.gethostname()}: "
                "name a folder on storage that all hosts share"
            )
        time.sleep(0.5)
