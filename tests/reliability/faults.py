"""A system that fails: full disks, folders that cannot be written, few files or little memory, signals.

A command must then end by itself, in one line where it fails; and where nothing fails any more, the same
command must give the right result, also on what the failure left.
"""

import ctypes
import errno
import os
import pathlib
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable

from tests.reliability import commands
from tests.reliability.commands import Command, Place
from tests.reliability.table import Trial

CLONE_NEWNS, CLONE_NEWUSER, MS_REC, MS_PRIVATE, MS_RDONLY, MS_REMOUNT, MS_BIND = (
    0x20000, 0x10000000, 0x4000, 1 << 18, 1, 32, 4096,
)  # fmt: skip
_libc = ctypes.CDLL(None, use_errno=True)


def kinds() -> dict[str, Callable]:
    """Name -> what makes the fault at a `Spot`."""
    return {
        "full disk": _full_disk,
        "largest file": _largest_file,
        "few open files": _few_files,
        "little memory": _little_memory,
        "read-only folder": _read_only,
        "folder is a file": _is_file,
        "inputs not readable": _unreadable,
        "caches not writable": _no_caches,
        "full output": _full_output,
        "closed output": _closed_output,
        "nothing can be removed": _no_removal,
        "SIGTERM": _terminated,
    }


def plan(place: Place, trials: int) -> list[tuple[str, int]]:
    """(kind, number of the trial); the number says which command is tried, in turn."""
    return [(kind, number) for kind in kinds() for number in range(max(1, round(trials / len(kinds()))))]


def run(place: Place, measured: dict[str, dict], seed: int, name: str, number: int) -> Trial:
    """One trial: a command under a fault, and then without it."""
    dice = random.Random(f"{seed} {name} {number}")
    every = [one for one in place.commands().values() if len(one.processes) == 1]
    command = every[number % len(every)]
    trial = Trial("faults", name, number, count=1)
    folder = commands.empty(place.root / "trials" / f"fault-{name.replace(' ', '-')}-{number}")
    spot = Spot(place, command, folder, dice, measured[command.name])
    kinds()[name](spot)
    if spot.impossible:
        raise RuntimeError(f"{name}: this system does not allow it: {spot.impossible}")
    [process] = command.start(spot.out, commands.empty(folder / "logs"), {0: spot.enter})
    if spot.signalled_after is not None:
        until = time.monotonic() + spot.signalled_after
        while time.monotonic() < until and process.poll() is None:
            time.sleep(0.005)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)
    status = process.wait()
    text = process.text()
    where = f"{command.name}, {name}{spot.about}"
    ended_by_signal = status == -signal.SIGTERM and spot.signalled_after is not None
    if name == "little memory":  # libraries in C++ abort, and Python has no say; 127 is of the C library
        ended_by_signal = (status or 0) < 0 or status == 127
    if not ended_by_signal and (fault := commands.fault_of(status, text + "\nerror: not seen" * spot.silent)):
        return trial.failed(fault, f"{where}: status {status}\n{text}")
    if status == 0 and not spot.elsewhere:
        made = commands.contents(command.module, spot.out)
        if different := commands.differing(measured[command.name]["files"], made):
            return trial.failed("silent", f"{where}: other {', '.join(different[:5])}\n{text}")
    trial.outcome = "same" if status == 0 else "refused"
    spot.leave()
    [process] = command.start(spot.out, commands.empty(folder / "logs-again"))
    again = process.wait()
    if fault := commands.fault_of(again, process.text()):
        return trial.failed(fault, f"{where}, then without it: status {again}\n{process.text()}")
    made = commands.contents(command.module, spot.out)
    if again or (different := commands.differing(measured[command.name]["files"], made)):
        which = "" if again else f"other {', '.join(different[:5])}"
        return trial.failed("lost", f"{where}\n{text}\nthen without it: {which}\n{process.text()}")
    shutil.rmtree(folder)
    return trial


class Spot:
    """Where a fault is made: the command, its folders, and what the kinds change."""

    def __init__(
        self, place: Place, command: Command, folder: pathlib.Path, dice: random.Random, measured: dict
    ) -> None:
        self.place, self.command, self.folder, self.dice, self.measured = (
            place,
            command,
            folder,
            dice,
            measured,
        )
        self.out = folder / "out"
        self.enter: Callable[[], None] = lambda: None
        self.leave: Callable[[], None] = lambda: None
        self.signalled_after: float | None = None
        self.silent = False  # its output is lost
        self.elsewhere = False  # what it wrote is gone with the fault
        self.about = self.impossible = ""


def _full_disk(spot: Spot) -> None:
    """The folder is on a disk of a few megabytes, which only this process sees."""
    need = sum(
        path.stat().st_size for path in spot.place.folder(spot.command.name).rglob("*") if path.is_file()
    )
    size = 4096 * max(3, int(spot.dice.uniform(0.02, 1.1) * need / 4096))
    spot.about, spot.elsewhere = f" of {size} bytes", True
    folder = spot.out if spot.command.module != "convert.export" else spot.folder
    folder.mkdir(exist_ok=True)
    disk = spot.folder / "disk"

    def enter() -> None:
        _own_mounts()
        _mount(b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode())

    if folder == spot.folder:  # or its logs would be there too
        spot.out = disk / "out"
        disk.mkdir()
        folder = disk
    spot.enter = enter


def _own_mounts() -> None:
    """What is mounted from here on is seen by this process alone, and goes with it."""
    user, group = os.getuid(), os.getgid()
    if _libc.unshare(CLONE_NEWNS | (CLONE_NEWUSER if user else 0)):
        raise OSError(ctypes.get_errno(), "unshare")
    if user:
        pathlib.Path("/proc/self/setgroups").write_text("deny")
        pathlib.Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        pathlib.Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)


def _mount(source: bytes, target: bytes, kind: bytes | None, options: int, data: bytes | None) -> None:
    if _libc.mount(source, target, kind, ctypes.c_ulong(options), data):
        raise OSError(ctypes.get_errno(), "mount", os.fsdecode(target))


def _largest_file(spot: Spot) -> None:
    """No file may grow beyond a size: what a quota does, halfway through a file."""
    sizes = sorted(
        path.stat().st_size for path in spot.place.folder(spot.command.name).rglob("*") if path.is_file()
    )
    limit = max(1, int(sizes[-1] * spot.dice.uniform(0.01, 0.99)))
    spot.about = f" of {limit} bytes"

    def enter() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    spot.enter = enter


def _few_files(spot: Spot) -> None:
    used = len(os.listdir("/proc/self/fd"))
    limit = used + spot.dice.randint(3, 40)
    spot.about = f" ({limit})"
    spot.enter = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def _little_memory(spot: Spot) -> None:
    more = spot.dice.randint(40, 2400) << 20
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    spot.about = f" ({more >> 20} MiB more than imports take)"
    spot.enter = lambda: resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))


def _read_only(spot: Spot) -> None:
    """Its folder, or the one that it would be in, is on a disk that is mounted for reading."""
    target = spot.dice.choice((spot.out, spot.folder / "parent"))
    target.mkdir()
    if target != spot.out:
        spot.out = target / "out"

    def enter() -> None:
        _own_mounts()
        _mount(os.fsencode(target), os.fsencode(target), None, MS_BIND, None)
        _mount(b"none", os.fsencode(target), None, MS_BIND | MS_REMOUNT | MS_RDONLY, None)

    spot.enter = enter
    spot.leave = lambda: (
        spot.command.module == "convert.export" and shutil.rmtree(spot.out, ignore_errors=True)
    )


def _is_file(spot: Spot) -> None:
    """Its folder, the one that it would be in, or one that it makes, is a file."""
    made = [path.name for path in spot.place.folder(spot.command.name).iterdir() if path.is_dir()]
    choices = [spot.out, spot.folder / "parent"]
    if made and spot.command.module != "convert.export":
        choices.append(spot.out / spot.dice.choice(made))
    target = spot.dice.choice(choices)
    target.parent.mkdir(exist_ok=True)
    target.write_text("something else")
    if target == spot.folder / "parent":
        spot.out = target / "out"
    spot.about = f": {target.relative_to(spot.folder)}"
    spot.leave = target.unlink


def _unreadable(spot: Spot) -> None:
    """One of its inputs cannot be read; root, who may read all, gives that right up."""
    names = [name for name in ("wan", "public", "clips", "vlm", "prepare", "train")
             if any(f"{spot.place.root}/{name}" in word for word in spot.command.arguments)]  # fmt: skip
    if not names:
        return
    folder = spot.place.root / spot.dice.choice(names)
    hidden = spot.dice.choice(sorted(folder.rglob("*"))).relative_to(folder)
    copy = spot.folder / "inputs"
    shutil.copytree(folder, copy)
    (copy / hidden).chmod(0)
    spot.about = f": {folder.name}/{hidden}"

    def enter() -> None:
        _own_mounts()
        _mount(os.fsencode(copy), os.fsencode(folder), None, MS_BIND, None)
        _give_up_rights()

    spot.enter, spot.leave = enter, lambda: (copy / hidden).chmod(0o755)


def _give_up_rights() -> None:
    """Of root: to read and write what its permissions forbid."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, of 64 bits each in two halves
    if _libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    for number in range(2):
        sets[number] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    if _libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def _no_caches(spot: Spot) -> None:
    """The folder of compiled programs and encoded texts cannot be made."""
    file = spot.folder / "file"
    file.write_text("")

    def enter() -> None:
        import jax

        os.environ["XDG_CACHE_HOME"] = str(file / "cache")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(file / "cache" / "xla")
        jax.config.update("jax_compilation_cache_dir", str(file / "cache" / "xla"))

    spot.enter = enter


def _full_output(spot: Spot) -> None:
    which = spot.dice.choice(((1,), (2,), (1, 2)))
    spot.about, spot.silent = f": {which}", True

    def enter() -> None:
        full = os.open("/dev/full", os.O_WRONLY)
        for number in which:
            os.dup2(full, number)

    spot.enter = enter


def _closed_output(spot: Spot) -> None:
    import sys

    which = spot.dice.choice(((1,), (2,), (1, 2)))
    spot.about, spot.silent = f": {which}", True

    def enter() -> None:
        for number in which:
            os.close(number)
        sys.stdout, sys.stderr = (
            None if number in which else stream for number, stream in ((1, sys.stdout), (2, sys.stderr))
        )

    spot.enter = enter


def _no_removal(spot: Spot) -> None:
    """A former run was killed; nothing that it left can be removed, as on a share that lost its rights."""
    if not spot.measured["operations"][0]:
        return
    point = spot.dice.randint(1, spot.measured["operations"][0])

    def kill(number: int) -> None:
        if number == point:
            os.kill(os.getpid(), signal.SIGKILL)

    logs = commands.empty(spot.folder / "logs-killed")
    [process] = spot.command.start(spot.out, logs, {0: lambda: commands.changes(spot.out, kill)})
    process.wait()

    def enter() -> None:
        removing = {"os.remove", "os.rmdir", "os.rename"}
        root = str(spot.out)

        def hook(event: str, arguments: tuple) -> None:
            if event in removing and not isinstance(arguments[0], int):
                path = os.fsdecode(arguments[0])
                if os.path.abspath(path).startswith(root):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

        import sys

        sys.addaudithook(hook)

    spot.about = f", after a kill at operation {point}"
    spot.enter = enter


def _terminated(spot: Spot) -> None:
    spot.signalled_after = spot.dice.uniform(0, spot.measured["seconds"])
    spot.about = f" after {spot.signalled_after:.2f} s"
