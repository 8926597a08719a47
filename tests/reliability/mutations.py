"""Files that a command reads, damaged one at a time: it must refuse them, or its result must be right."""

import dataclasses
import functools
import json
import os
import pathlib
import random
import shutil
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.conftest import ROOT
from tests.reliability import commands
from tests.reliability.commands import Command, Place, Process
from tests.reliability.table import Trial

LIMIT_S = 60.0
RERUN = 0.3  # of the trials that refuse a file: the file is put back, and what was there must be there still


@dataclasses.dataclass(frozen=True)
class Target:
    """Files of one kind, and the command that reads them.

    Attributes:
        inputs: name below the folder of a trial, IN in `arguments` -> a folder or file of the place that is
            copied there; "out" is what the command finds in its own folder, OUT.
        files: patterns below IN; one of the files that they find is damaged.
        given: whether they are the user's own, without checksums: another result may be what was meant.
        share: how many trials there are for one of others.
    """

    name: str
    module: str
    arguments: Sequence[str]
    inputs: dict[str, str]
    files: Sequence[str]
    given: bool = False
    share: float = 1.0

    def command(self, folder: pathlib.Path) -> Command:
        words = tuple(word.replace("IN/", f"{folder}/") for word in self.arguments)
        return Command(self.name, self.module, words)


def targets(place: Place) -> dict[str, Target]:
    """All kinds of files; `prepare` makes what they are copied from."""
    root, config = place.root, "--config=tests/tiny_pipeline.py"
    parts = {"backbone": "transformer", "codec": "vae", "text_encoder": "text_encoder"}
    weights = tuple(f"--config.{part}_params=IN/wan/{name}" for part, name in parts.items())
    kept = tuple(word.replace("IN", str(root)) for word in weights)
    data = (f"--config.data.dir={root / 'prepare'}",)
    prompt = ("--prompt=A red ball falls.", "--config.samples.steps=1", "--out=OUT")
    records = (config, "--out=OUT", "--config.data.shard=1")
    quick = (
        "--config=configs/wan.py:tiny", "--out=OUT", "--config.data.fps=16", "--config.data.val_share=0.0",
    )  # fmt: skip
    steps = (
        config, "--config.log.every=1", "--config.checkpoint.every=1", "--config.samples.every=0",
        "--config.validation.every=0", "--workdir=OUT",
    )  # fmt: skip
    resume = (*steps, *kept, *data, "--config.steps=3")
    fresh = (*steps, *kept, "--config.data.dir=IN/data", "--config.steps=1", "--config.caption_dropout=0.9")
    sample = (config, f"--checkpoint={root / 'wan'}", *prompt)
    found = [
        Target("weights, sampled", "prophy_jax.sample", (config, "--checkpoint=IN/wan", *prompt),
               {"wan": "wan"}, ("wan/transformer/**/*", "wan/vae/**/*")),
        Target("text encoder, to prepare", "prophy_jax.prepare",
               (*records, *weights, f"--source={root / 'clips'}"),
               {"wan": "wan"}, ("wan/text_encoder/**/*", "wan/text_encoder/tokenizer/*")),
        Target("weights, exported", "convert.export",
               ("--checkpoint=IN/wan", "--format=diffusers", "--dst=OUT"), {"wan": "wan"}, ("wan/*/**/*",),
               share=2),
        Target("weights, merged", "convert.merge",
               ("--checkpoint=IN/wan", f"--lora={root / 'lora.safetensors'}", "--dst=OUT"), {"wan": "wan"},
               ("wan/transformer/**/*",)),
        Target("LoRA, merged", "convert.merge",
               (f"--checkpoint={root / 'wan'}", "--lora=IN/lora.safetensors", "--dst=OUT"),
               {"lora.safetensors": "lora.safetensors"}, ("lora.safetensors",), given=True),
        Target("LoRA, sampled", "prophy_jax.sample", (*sample, "--lora=IN/lora.safetensors"),
               {"lora.safetensors": "lora.safetensors"}, ("lora.safetensors",), given=True, share=0.3),
        Target("checkpoint, resumed", "prophy_jax.train", resume, {"out": "half-train"},
               ("out/checkpoints/2/**/*",), share=0.7),
        Target("run's own files, resumed", "prophy_jax.train", resume, {"out": "half-train"},
               ("out/config.json", "out/lock.json", "out/*/manifest.json", "out/checkpoints/1/*"), share=0.5),
        Target("run's metrics, resumed", "prophy_jax.train", resume, {"out": "half-train"},
               ("out/metrics.jsonl", "out/tensorboard/*"), given=True, share=0.3),
        Target("checkpoint, exported", "convert.export",
               ("--checkpoint=IN/run/checkpoints/2", "--format=diffusers", "--dst=OUT"),
               {"run": "half-train"}, ("run/checkpoints/2/**/*", "run/config.json"), share=2.5),
        Target("trained parts, exported", "convert.export",
               ("--checkpoint=IN/run", "--format=diffusers", "--dst=OUT"),
               {"run": "train"}, ("run/branch/**/*", "run/branch/manifest.json"), share=1.5),
        Target("run, measured", "prophy_jax.evaluate",
               (config, *kept, *data, "--config.samples.steps=1", "--workdir=IN/run", "--out=OUT"),
               {"run": "half-train"}, ("run/config.json", "run/branch/**/*"), share=0.4),
        Target("records, trained on", "prophy_jax.train", fresh, {"data": "prepare"},
               ("data/records/**/*", "data/manifest.json", "data/empty_text.npz", "data/clips.jsonl"),
               share=1.5),
        Target("finished records, prepared again", "prophy_jax.prepare",
               (*records, *kept, f"--source={root / 'clips'}"), {"out": "prepare"},
               ("out/manifest.json", "out/clips.jsonl", "out/records/**/*"), share=0.6),
        Target("half the records, prepared", "prophy_jax.prepare",
               (*records, *kept, f"--source={root / 'clips'}"), {"out": "half-prepare"},
               ("out/work/*", "out/work/*.json"), share=1.2),
        Target("half the sandbox, prepared", "prophy_jax.prepare",
               ("--config=configs/wan.py:tiny", "--config.data.shard=2", "--config.data.sandbox.train=5",
                "--config.data.sandbox.val=2", "--config.data.sandbox.test=1", "--out=OUT"),
               {"out": "half-sandbox"}, ("out/work/*", "out/work/*.json"), share=2),
        Target("videos and captions", "prophy_jax.prepare", (*quick, "--source=IN/clips"),
               {"clips": "clips"}, ("clips/*.json", "clips/videos/*"), given=True, share=1.5),
        Target("table of clips", "prophy_jax.prepare", (*quick, "--source=IN/table/clips.csv"),
               {"table": "table"}, ("table/clips.csv",), given=True),
        Target("videos with texts", "prophy_jax.prepare", (*quick, "--source=IN/texts"),
               {"texts": "texts"}, ("texts/*",), given=True, share=0.7),
        Target("taxonomy", "prophy_jax.prepare",
               (*quick, f"--source={root / 'clips'}", "--config.data.taxonomy=IN/taxonomy.toml"),
               {"taxonomy.toml": "taxonomy.toml"}, ("taxonomy.toml",), given=True, share=0.5),
        Target("configuration", "prophy_jax.prepare",
               ("--config=IN/configs/wan.py:tiny", f"--source={root / 'clips'}", "--dry_run", "--out=OUT"),
               {"configs": "configs"}, ("configs/wan.py",), given=True, share=0.5),
        Target("public files, converted", "convert.wan", ("--src=IN/public", "--dst=OUT"),
               {"public": "public"}, ("public/*", "public/google/umt5-xxl/*"), given=True, share=1.5),
        Target("public files of diffusers, converted", "convert.wan", ("--src=IN/public", "--dst=OUT"),
               {"public": "diffusers"}, ("public/*/*", "public/*.json", "public/*/*.index.json"), given=True,
               share=1.5),
        Target("half a conversion", "convert.wan", (f"--src={root / 'public'}", "--dst=OUT"),
               {"out": "half-wan"}, ("out/**/*", "out/*/journal.jsonl"), share=1.5),
        Target("half the samples", "prophy_jax.sample", (*sample, "--prompt=Water.", "--batch=1"),
               {"out": "half-sample"}, ("out/manifest.json",), share=0.4),
        Target("prompts", "prophy_jax.sample",
               (config, f"--checkpoint={root / 'wan'}", "--prompts=IN/prompts.txt", *prompt[1:]),
               {"prompts.txt": "prompts.txt"}, ("prompts.txt",), given=True, share=0.2),
        Target("compiled programs and encoded texts", "prophy_jax.sample", sample, {"caches": "caches"},
               ("caches/xla/*", "caches/prophy_jax/text/*/*"), share=0.4),
    ]  # fmt: skip
    if commands.LABELS:
        labelled = (f"--data={root / 'prepare'}", "--out=OUT")
        found += [
            Target("vision-language model", "prophy_jax.label", (config, "--vlm=IN/vlm", *labelled),
                   {"vlm": "vlm"}, ("vlm/*",), given=True),
            Target("half the labels", "prophy_jax.label", (config, f"--vlm={root / 'vlm'}", *labelled),
                   {"out": "half-label"}, ("out/work/*", "out/work/*.json"), share=1.5),
            Target("records, labelled", "prophy_jax.label",
                   (config, f"--vlm={root / 'vlm'}", "--data=IN/data", "--out=OUT"), {"data": "prepare"},
                   ("data/records/**/*", "data/manifest.json", "data/clips.jsonl"), share=1.5),
            Target("labels, trained on", "prophy_jax.train",
                   (*fresh, "--config.data.side.alignment=IN/labels"), {"data": "prepare", "labels": "label"},
                   ("labels/**/*", "labels/manifest.json")),
        ]  # fmt: skip
    own = (config, "--import=IN/own", f"--data={root / 'prepare'}", "--out=OUT")
    found.append(
        Target("labels of one's own", "prophy_jax.label", own, {"own": "own"}, ("own/*",), given=True)
    )
    if place.quick:
        modules = {command.module for command in place.commands().values()}
        found = [one for one in found if one.module in modules and "train" not in str(one.inputs)]
    return {one.name: one for one in found}


def prepare(place: Place) -> list[str]:
    """Makes what the targets are copied from. Returns their names."""
    root = place.root
    shutil.copyfile(ROOT / "prophy_jax" / "data" / "taxonomy.toml", root / "taxonomy.toml")
    shutil.copytree(ROOT / "configs", root / "configs", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "prompts.txt").write_text("A red ball falls.\nA blue box.\n")
    for name in ("table", "texts"):
        shutil.copytree(root / "clips" / "videos", root / name)
    (root / "table" / "clips.csv").write_text(
        "id,video,caption,category\n"
        + "".join(f"clip{i},{i}.mp4,A ball {i} falls,collision\n" for i in range(3))
    )
    for i in range(3):
        (root / "texts" / f"{i}.txt").write_text(f"A ball {i} falls.")
    _make_own_labels(root)
    full = dataclasses.replace(place, quick=False)
    all_commands, found, every = full.commands(), targets(place), targets(full)
    steps = [word for word in every["checkpoint, resumed"].arguments if "config.steps" not in word]
    todo = [
        (Command("half-train", "prophy_jax.train", (*steps, "--config.steps=2")), None),
        (_without(all_commands["prepare, 2 processes"], "half-prepare"), None),
        (Command("half-sandbox", "prophy_jax.prepare",
                 (*every["half the sandbox, prepared"].arguments, "--process=0/2")), None),
        (dataclasses.replace(all_commands["convert"], name="half-wan"), 20),
        (Command("half-sample", "prophy_jax.sample", every["half the samples"].arguments), 6),
        (Command("diffusers", __name__, ()), None),
    ]  # fmt: skip
    if commands.LABELS:
        label = (*all_commands["label"].arguments, "--process=0/2")
        todo.append((Command("half-label", "prophy_jax.label", label), None))
    wanted = {source for target in found.values() for source in target.inputs.values()}
    for command, killed_at in todo:
        if command.name not in wanted:
            continue
        out, logs = root / command.name, commands.empty(root / "logs" / command.name)
        if command.name == "diffusers":
            process = Process(logs / "log0", __name__, [], functools.partial(_export_in_shards, root))
        else:
            first = {0: functools.partial(commands.changes, out, functools.partial(_kill_at, killed_at))}
            [process] = command.start(out, logs, first if killed_at else None)
        if process.wait() != (-signal.SIGKILL if killed_at else 0):
            raise RuntimeError(f"{command.name}: {process.text()}")
    gone = {"host": socket.gethostname(), "pid": 1, "began": "another boot 1", "what": "a run", "token": "0"}
    if (root / "half-train").exists():
        (root / "half-train" / "lock.json").write_text(json.dumps(gone))
    return list(found)


def _kill_at(point: int, number: int) -> None:
    if number == point:
        os.kill(os.getpid(), signal.SIGKILL)


def _without(command: Command, name: str) -> Command:
    """A command of several processes with the first alone."""
    return Command(name, command.module, (*command.arguments, *command.processes[0]))


def _make_own_labels(root: pathlib.Path) -> None:
    manifest = json.loads((root / "prepare" / "manifest.json").read_text())
    [(_, bucket)] = manifest["buckets"].items()
    shares = np.zeros((*bucket["token_grid"], len(manifest["categories"])), np.float32)
    shares[0, ..., 1] = 0.5
    ids = [json.loads(line)["id"] for line in (root / "prepare" / "clips.jsonl").read_text().splitlines()]
    (root / "own").mkdir()
    for name, save in zip(ids, (np.savez, np.save, np.savez_compressed), strict=True):
        ending = "npy" if save is np.save else "npz"
        save(
            root / "own" / f"{name}.{ending}",
            *([shares] * (save is np.save)),
            **{"shares": shares} if save is not np.save else {},
        )


def _export_in_shards(root: pathlib.Path) -> None:
    from convert import export

    export.export(str(root / "wan"), "diffusers", str(root / "diffusers"), shard_bytes=60_000)


def undamaged(place: Place, name: str) -> dict[str, str]:
    """The result of a target's command with nothing damaged."""
    target = targets(place)[name]
    folder = _copied(place, target, "undamaged")
    status, text = _run(target, folder)
    if status:
        raise RuntimeError(f"{target.name}, with nothing damaged: status {status}: {text}")
    return commands.contents(target.module, folder / "out", str(folder))


def _copied(place: Place, target: Target, number: Any) -> pathlib.Path:
    folder = commands.empty(place.root / "trials" / f"mutation-{target.name.replace(' ', '-')}-{number}")
    for name, source in target.inputs.items():
        source = place.root.parent / source if source == "caches" else place.root / source
        if source.is_dir():
            shutil.copytree(source, folder / name)
        else:
            shutil.copyfile(source, folder / name)
    return folder


def _run(target: Target, folder: pathlib.Path, log: str = "logs") -> tuple[int | None, str]:
    def first() -> None:
        if "caches" in target.inputs:
            import jax

            os.environ["XDG_CACHE_HOME"] = str(folder / "caches")
            jax.config.update("jax_compilation_cache_dir", str(folder / "caches" / "xla"))

    logs = commands.empty(folder / log)
    [process] = target.command(folder).start(folder / "out", logs, {0: first})
    return process.wait(LIMIT_S), process.text()


# --- Trials ----------------------------------------------------------------------------------------


def plan(place: Place, trials: int) -> list[tuple[str, int]]:
    """(target, number of the trial) of all trials."""
    found = targets(place)
    each = trials / sum(target.share for target in found.values())
    return [
        (name, number)
        for name, target in found.items()
        for number in range(max(1, round(each * target.share)))
    ]


def run(place: Place, measured: dict[str, dict[str, str]], seed: int, name: str, number: int) -> Trial:
    """One trial: a copy of the inputs with one file damaged, and the command that reads it."""
    target, dice = targets(place)[name], random.Random(f"{seed} {name} {number}")
    trial = Trial("mutations", name, number, count=1)
    folder = _copied(place, target, number)
    found = [sorted(path for path in folder.glob(one) if path.is_file()) for one in target.files]
    files = dice.choice([own for own in found if own])
    path = dice.choice(files)
    whole = path.read_bytes()
    what = damage(path, [other for other in files if other != path], dice)
    damaged = f"{path.relative_to(folder)}: {what}"
    status, text = _run(target, folder)
    if fault := commands.fault_of(status, text):
        return trial.failed(fault, f"{damaged}\n{text}")
    if status == 0:
        made = commands.contents(target.module, folder / "out", str(folder))
        if different := commands.differing(measured[name], made):
            if all(made.get(other) == commands.REFUSED for other in different):
                trial.outcome = "refused"
            elif not target.given:
                return trial.failed("silent", f"{damaged}\nother: {', '.join(different[:5])}\n{text}")
            else:
                trial.outcome = "taken"
    else:
        trial.outcome = "refused"
        if dice.random() < RERUN:
            if path.is_dir():
                shutil.rmtree(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(whole)
            status, again = _run(target, folder, "logs-again")
            if fault := commands.fault_of(status, again):
                return trial.failed(fault, f"{damaged}, then put back\n{again}")
            made = commands.contents(target.module, folder / "out", str(folder)) if status == 0 else {}
            if different := commands.differing(measured[name], made):
                other = "" if status else f"other: {', '.join(different[:5])}"
                return trial.failed("lost", f"{damaged}, then put back\n{text}\nthen: {other}\n{again}")
    shutil.rmtree(folder)
    return trial


# --- Damage ----------------------------------------------------------------------------------------


def damage(path: pathlib.Path, others: Sequence[pathlib.Path], dice: random.Random) -> str:
    """Changes a file in one way. Returns which."""
    ways: list[Callable] = [_flip, _flip, _cut, _zeros, _remove, _empty, _halves, _garbage, _folder]
    if others:
        ways.append(functools.partial(_other, others))
    if path.suffix in (".json", ".jsonl") or path.name.startswith((".z", "_METADATA")):
        ways += [_json] * len(ways)
    way = dice.choice(ways)
    if path.stat().st_size == 0 and way in (_flip, _cut, _zeros, _halves):
        way = _garbage
    return way(path, dice) or "as it was"


def _flip(path: pathlib.Path, dice: random.Random) -> str:
    content = bytearray(path.read_bytes())
    bits = [dice.randrange(8 * len(content)) for _ in range(dice.choice((1, 1, 3)))]
    for bit in bits:
        content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return f"bits {bits} flipped"


def _cut(path: pathlib.Path, dice: random.Random) -> str:
    size = dice.randrange(path.stat().st_size)
    path.write_bytes(path.read_bytes()[:size])
    return f"cut to {size} bytes"


def _zeros(path: pathlib.Path, dice: random.Random) -> str:
    content = bytearray(path.read_bytes())
    start = dice.randrange(len(content))
    stop = min(len(content), start + dice.choice((1, 16, 512, 4096)))
    content[start:stop] = bytes(stop - start)
    path.write_bytes(content)
    return f"zeros from byte {start} to {stop}"


def _remove(path: pathlib.Path, dice: random.Random) -> str:
    path.unlink()
    return "removed"


def _empty(path: pathlib.Path, dice: random.Random) -> str:
    path.write_bytes(b"")
    return "emptied"


def _halves(path: pathlib.Path, dice: random.Random) -> str:
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[middle:] + content[:middle])
    return "its halves swapped"


def _garbage(path: pathlib.Path, dice: random.Random) -> str:
    content = dice.choice(
        (
            b"<html>404 Not Found</html>\n",
            b"\xff\xfe\x00garbage",
            dice.randbytes(300),
            b"[" * 5000,
            b"null\n",
            b"{}",
        )
    )
    path.write_bytes(content)
    return f"replaced by {content[:30]!r}"


def _folder(path: pathlib.Path, dice: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return "replaced by a folder"


def _other(others: Sequence[pathlib.Path], path: pathlib.Path, dice: random.Random) -> str:
    other = dice.choice(others)
    shutil.copyfile(other, path)
    return f"replaced by {other.name}"


VALUES = (None, True, -1, 0, 2, 10**30, 1.5, float("nan"), "", "x", [], {}, [None], {"x": 1}, [[1, "x"]])


def _json(path: pathlib.Path, dice: random.Random) -> str:
    """Another value, another key or one less somewhere in an object of JSON, or of one of its lines."""
    try:
        lines = [
            json.loads(line)
            for line in ([path.read_text()] if path.suffix != ".jsonl" else path.read_text().splitlines())
        ]
    except ValueError:
        return _flip(path, dice) if path.stat().st_size else _garbage(path, dice)
    places: list[tuple[Any, Any, str]] = []

    def walk(value: Any, where: str) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key, f"{where}/{key}"))
            walk(value[key], f"{where}/{key}")

    for number, line in enumerate(lines, 1):
        walk(line, f"line {number}: " if path.suffix == ".jsonl" else "")
    if not places:  # an empty file, or a value alone
        return _garbage(path, dice)
    container, key, where = dice.choice(places)
    new = dice.choice(VALUES)
    if dice.random() < 0.25:
        del container[key]
        what = f"{where} removed"
    elif isinstance(container, dict) and dice.random() < 0.15:
        container[f"{key}x"] = container.pop(key)
        what = f"{where} renamed"
    else:
        container[key], what = new, f"{where} set to {new!r}"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return what
