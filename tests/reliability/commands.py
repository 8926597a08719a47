"""Every command at the smallest size, run in forks of a process that has imported all and run none.

`Place.make` runs each command once, uninterrupted, for the inputs of the next and results to compare with.
"""

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import pathlib
import pickle
import re
import runpy
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prophy_jax.run import checksums
from tests import tiny_pipeline
from tests.conftest import ROOT

LIMIT_S = 120.0  # no command takes a tenth of this; one that does hangs
MODULES = (
    *(f"prophy_jax.{name}" for name in ("prepare", "label", "train", "sample", "evaluate")),
    *("convert.wan", "convert.export", "convert.merge"),
)
# What the commands import once they run.
LATER = (
    *(
        "jax.experimental.multihost_utils",
        "prophy_jax.build",
        "prophy_jax.data.loader",
        "prophy_jax.plan.flops",
    ),
    *("prophy_jax.run.loop", "prophy_jax.run.encoders", "prophy_jax.run.metrics", "tensorboardX", "tqdm"),
    *("prophy_jax.diffusion.generate", "prophy_jax.diffusion.flow", "prophy_jax.diffusion.solvers"),
    *("prophy_jax.evaluation.report", "prophy_jax.evaluation.routing", "prophy_jax.evaluation.pictures"),
    *(
        "prophy_jax.evaluation.validation",
        "prophy_jax.evaluation.diffusion",
        "prophy_jax.models.beside.prophy",
    ),
    *("prophy_jax.models.codecs.wan_vae", "prophy_jax.models.text.t5", "prophy_jax.models.wan"),
    *("matplotlib.pyplot", "av", "pymunk", "tokenizers", "transformers.models.qwen2_5_vl"),
)
QUICK = ("convert", "prepare", "prepare, sandbox", "label", "export", "merge")
LABELS = importlib.util.find_spec("torch") is not None
# What these event of `sys.addaudithook` do to the file that is their first argument, and where the argument
# is that says which folder that is relative to.
CHANGES = {
    **{"os.rename": 2, "os.link": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 2},
    **{"os.truncate": None, "os.symlink": None, "os.utime": None, "open": None},
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def import_all() -> None:
    """Imports what the commands do, on one simulated device for each."""
    for name in (*MODULES, *LATER):
        if "transformers" not in name or LABELS:
            importlib.import_module(name)
    if LABELS:
        import torch

        from prophy_jax.labels import labelling, propose, vlm  # noqa: F401

        torch.set_num_threads(1)


# --- A process -------------------------------------------------------------------------------------


class Process:
    """`python -m MODULE ARGUMENTS` in a fork of this process; `first` is called in it before the command.

    Args:
        log: the file that gets its stdout and stderr.
        last: called in it after the command, unless it was killed.
    """

    def __init__(
        self,
        log: pathlib.Path,
        module: str,
        arguments: Sequence[str],
        first: Callable[[], None] = lambda: None,
        last: Callable[[], None] = lambda: None,
    ) -> None:
        self.log, self.status = log, None
        self.words = [module, *map(str, arguments)]
        self.pid = os.fork()
        if self.pid == 0:
            self._be_it(first, last)

    def _be_it(self, first: Callable[[], None], last: Callable[[], None]) -> None:
        code = 70
        try:
            os.setsid()
            out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
            os.chdir(ROOT)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = list(self.words)
            first()
            code = _run(self.words[0], self.log)
            last()
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                for stream in filter(None, (sys.stdout, sys.stderr)):
                    with contextlib.suppress(OSError, ValueError):
                        stream.flush()
            finally:
                os._exit(code)  # whatever happens, it never goes on as its parent

    def poll(self) -> int | None:
        """Its exit status, or minus the signal that ended it; None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def wait(self, limit: float = LIMIT_S) -> int | None:
        """Waits for the end, and ends it after `limit` seconds; None then."""
        until = time.monotonic() + limit
        while self.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        ended = self.poll()
        if ended is None:
            self.kill()
        return ended

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def _run(module: str, log: pathlib.Path) -> int:
    """The exit status of a command, which ends as at the end of a program. A traceback goes to `log`."""
    code = 0
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        with open(log, "a") as file:  # stderr may be closed
            traceback.print_exc(file=file)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    return code


def changes(inside: pathlib.Path, then: Callable[[int], None]) -> None:
    """Calls `then` with a count before this process makes, replaces or removes anything in a folder."""
    count, root = 0, str(inside)

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in CHANGES or (event == "open" and not (arguments[2] or 0) & WRITING):
            return
        path, place = arguments[0], CHANGES[event]
        if isinstance(path, int):
            return
        path = os.fsdecode(path)
        if place and len(arguments) > place and arguments[place] >= 0:  # as shutil.rmtree names files
            path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[place]}"), path)
        if os.path.abspath(path).startswith(root):  # OUT, what is below, and OUT.writing
            count += 1
            then(count)

    sys.addaudithook(hook)


def each_in_a_fork(
    function: Callable[..., Any], arguments: Sequence[tuple], processes: int, notes: pathlib.Path
) -> Iterator[tuple[int, Any]]:
    """Gives (number, result) of a function called with each of several arguments, as they are done.

    A pool of processes that live on would have threads, and forks do not go with these. RuntimeError is
    raised where a call has failed.
    """
    notes.mkdir(exist_ok=True)
    running: dict[int, int] = {}
    waiting = list(enumerate(arguments))[::-1]
    while waiting or running:
        while waiting and len(running) < processes:
            number, own = waiting.pop()
            if pid := os.fork():
                running[pid] = number
                continue
            try:
                (notes / str(number)).write_bytes(pickle.dumps(function(*own)))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        pid, status = os.wait()
        number = running.pop(pid)
        if status:
            raise RuntimeError(f"a trial has failed by itself, as printed above: {arguments[number][-2:]}")
        yield number, pickle.loads((notes / str(number)).read_bytes())


# --- What a run of a command says ------------------------------------------------------------------


def fault_of(status: int | None, text: str) -> str:
    """Whether a command that ended so, with this as its output, is at fault: "hang", "traceback" or "".

    What ended by a signal has crashed. An error is one line of its own, and the last.
    """
    if status is None:
        return "hang"
    if status < 0 or "Traceback (most recent call last)" in text:
        return "traceback"
    if status not in (0, 75) and not re.search(r"(^|\n)(error: [^\r\n]*|interrupted)\s*\Z", text):
        return "traceback"
    return ""


# --- The commands ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Command:
    """A command as it is tried: the arguments of each of its processes, with OUT for the folder it makes."""

    name: str
    module: str
    arguments: tuple[str, ...]
    processes: tuple[tuple[str, ...], ...] = ((),)  # further arguments of each
    distributed: bool = False

    def start(
        self, out: pathlib.Path, logs: pathlib.Path, first: dict[int, Callable] | None = None, **options
    ) -> list[Process]:
        """Its processes; `first` by the number of the process."""
        port, started = _free_port() if self.distributed else 0, []
        for number, own in enumerate(self.processes):
            words = [word.replace("OUT", str(out)) for word in (*self.arguments, *own)]
            if self.distributed:
                words.append(f"--distributed=localhost:{port},{number}/{len(self.processes)}")
            before = [_impatient] if self.distributed else []
            before += [first[number]] if first and number in first else []

            def all_first(before: list[Callable] = before) -> None:
                for one in before:
                    one()

            log = logs / f"log{number}"
            started.append(Process(log, self.module, words, all_first, **options))
        return started


def _impatient() -> None:
    """As tests of jobs do: processes that are gone are noticed soon."""
    from prophy_jax.run import distributed

    distributed.START_S, distributed.LOST_S, distributed.SHARED_S = 60, 10, 2


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@dataclasses.dataclass(frozen=True)
class Place:
    """The folder of all inputs and of the results of uninterrupted runs."""

    root: pathlib.Path
    quick: bool = False  # with the commands alone that take about a second

    def commands(self) -> dict[str, Command]:
        """All commands, in the order in which one reads what another made."""
        root, config = self.root, "--config=tests/tiny_pipeline.py"
        parts = {"backbone": "transformer", "codec": "vae", "text_encoder": "text_encoder"}
        weights = [f"--config.{part}_params={root / 'wan' / name}" for part, name in parts.items()]
        records = (config, *weights, f"--source={root / 'clips'}", "--out=OUT", "--config.data.shard=1")
        sandbox = (
            "--config=configs/wan.py:tiny", "--out=OUT", "--config.data.shard=2",
            "--config.data.sandbox.train=5", "--config.data.sandbox.val=2", "--config.data.sandbox.test=1",
        )  # fmt: skip
        train = (
            config, *weights, f"--config.data.dir={root / 'prepare'}", "--workdir=OUT",
            "--config.steps=4", "--config.checkpoint.every=1", "--config.log.every=1",
            "--config.samples.every=4", "--config.validation.every=2", "--config.samples.steps=1",
            "--config.mesh.fsdp=1",
        )  # fmt: skip
        if LABELS:
            train += (f"--config.data.side.alignment={root / 'label'}",)
        job = (*train, "--config.mesh.data=1", "--config.mesh.fsdp=2")
        run = (config, *weights, f"--config.data.dir={root / 'prepare'}", *train[-1:] * LABELS)
        prompts = ("--prompt=A red ball falls.", "--prompt=A blue box.", "--prompt=Water.")
        found = [
            Command("convert", "convert.wan", (f"--src={root / 'public'}", "--dst=OUT")),
            Command("prepare", "prophy_jax.prepare", records),
            Command("prepare, sandbox", "prophy_jax.prepare", sandbox),
            Command(
                "prepare, 2 processes",
                "prophy_jax.prepare",
                records,
                (("--process=0/2",), ("--process=1/2",)),
            ),
            Command(
                "label",
                "prophy_jax.label",
                (config, f"--vlm={root / 'vlm'}", f"--data={root / 'prepare'}", "--out=OUT"),
            ),
            Command("train", "prophy_jax.train", train),
            Command("train, 2 processes", "prophy_jax.train", job, ((), ()), True),
            Command(
                "sample",
                "prophy_jax.sample",
                (
                    config, f"--checkpoint={root / 'wan'}", f"--branch={root / 'train' / 'branch'}", *prompts,
                    "--batch=1", "--config.samples.steps=1", "--overlay", "--out=OUT",
                ),
            ),
            Command(
                "evaluate",
                "prophy_jax.evaluate",
                (*run, "--config.samples.steps=1", f"--workdir={root / 'train'}", "--out=OUT"),
            ),
            Command(
                "export",
                "convert.export",
                (f"--checkpoint={root / 'wan'}", "--format=diffusers", "--dst=OUT"),
            ),
            Command(
                "merge",
                "convert.merge",
                (f"--checkpoint={root / 'wan'}", f"--lora={root / 'lora.safetensors'}=0.5", "--dst=OUT"),
            ),
        ]  # fmt: skip
        if self.quick:
            found = [one for one in found if one.name in QUICK]
        return {one.name: one for one in found if LABELS or one.name != "label"}

    def folder(self, name: str) -> pathlib.Path:
        """Of the result of an uninterrupted run."""
        return self.root / {"convert": "wan"}.get(name, name.replace(", ", "-").replace(" ", "-"))

    def make(self) -> dict[str, dict]:
        """Makes inputs, and runs all commands. Returns of each how it went, and what it made.

        "operations" counts those of each process, and "first" are the seconds until the first of them.
        """
        self.root.mkdir()
        maker = Process(self.root / "log", __name__, [], functools.partial(_make_inputs, self.root))
        if maker.wait() != 0:
            raise RuntimeError(maker.text())
        return {name: self._measure(one) for name, one in self.commands().items()}

    def _measure(self, command: Command) -> dict:
        out, logs = self.folder(command.name), self.root / "logs" / command.name
        logs.mkdir(parents=True)
        begun = time.monotonic()
        notes = [logs / f"count{number}" for number in range(len(command.processes))]

        def count(note: pathlib.Path) -> Callable[[], None]:
            def then(number: int) -> None:
                with open(note, "a") as file:
                    file.write(f"{time.monotonic() - begun}\n")

            return lambda: changes(out, then)

        started = command.start(out, logs, {number: count(note) for number, note in enumerate(notes)})
        ended = [process.wait() for process in started]
        if ended != [0] * len(started):
            raise RuntimeError(f"{command.name} ends with {ended}: {started[0].text()}")
        noted = [note.read_text().split() if note.exists() else [] for note in notes]
        return {
            "operations": [len(own) for own in noted],
            "first": min(float(own[0]) for own in noted if own),
            "seconds": time.monotonic() - begun,
            "files": contents(command.module, out),
        }


def _make_inputs(root: pathlib.Path) -> None:
    """In a process of its own: threads that begin here would not be in later forks."""
    tiny_pipeline.save_public(root / "public")
    tiny_pipeline.save_lora(root / "lora.safetensors")
    tiny_pipeline.save_clips(root / "clips")
    if LABELS:
        from tests.tiny_vlm import save_tiny_vlm

        save_tiny_vlm(root / "vlm")


# --- Results ---------------------------------------------------------------------------------------

_PASSING = re.compile(r"(^|/)\.[^/]+$|^tensorboard/|_CHECKPOINT_METADATA$|commit_success.txt$")
# Of labels, times; times of sources that are put back; and checksums of what has these or names the folder.
_MEASURED = re.compile(
    rb'"(seconds_per_clip|peak_bytes|checksum|stamp|clips.jsonl)": ("[0-9a-f]*"|[0-9.e+-]+|\[[^]]*\])'
)
_TIMES = ("time/", "speed/", "goodput/")  # metrics that differ from run to run
REFUSED = "refused when it is read"


def contents(module: str, out: pathlib.Path, hidden: str = "") -> dict[str, str]:
    """What a command has made: of each file its hash, as if it did not name the folder `hidden`.

    Of parameters that are trained or merged, whose files have names of their own: the hashes, after the files
    were verified. Of a training run also the metrics without times, and the steps of the whole checkpoints.
    """
    found = {}
    if not out.exists():
        return found
    trained = module == "prophy_jax.train"
    hashed = trained or module == "convert.merge"
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = path.relative_to(out).as_posix()
        if _PASSING.search(name) or hashed and re.search(r"^checkpoints/|/tree/|manifest.json$", name):
            continue
        if trained and name == "metrics.jsonl":
            found[name] = _digest(_lasting(path).encode())
        elif hidden and ".array_record-" in name:
            found[name] = _digest_records(path)
        else:
            content = _MEASURED.sub(b"", path.read_bytes())
            found[name] = _digest(content.replace(hidden.encode(), b"") if hidden else content)
    if hashed:
        for path in sorted(out.glob("*/manifest.json")):
            manifest = json.loads(path.read_text())
            about = {key: manifest.get(key) for key in ("sha256", "step", "shapes", "merged")}
            with checksums.verified(path.parent, manifest["files"], ""):
                found[path.parent.name] = json.dumps(about, sort_keys=True)
    if trained:
        for path in sorted(out.glob("checkpoints/*")):
            listed = json.loads((path / "checksums.json").read_text())
            with checksums.verified(path, checksums.unsealed(listed, "", ""), ""):
                found[f"checkpoints/{path.name}"] = ""
    return found


def _lasting(path: pathlib.Path) -> str:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return json.dumps(
        [{key: value for key, value in line.items() if not key.startswith(_TIMES)} for line in lines]
    )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest_records(path: pathlib.Path) -> str:
    """Of the records of a shard, each of which has a checksum of the format, compared by whoever reads it."""
    from array_record.python import array_record_module

    try:
        reader = array_record_module.ArrayRecordReader(str(path))
        read = [reader.read([index])[0] for index in range(reader.num_records())]
        if not read:  # no shard is empty, so that its first record is missed
            return REFUSED
        return _digest(b"".join(len(one).to_bytes(8, "little") + one for one in read))
    except (RuntimeError, IndexError):
        return REFUSED


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Names of what two results do not have in common."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def empty(folder: pathlib.Path) -> pathlib.Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
