"""Commands that are killed at a random file operation or moment, and run again until they are done."""

import functools
import os
import pathlib
import random
import shutil
import signal
import time

from tests.reliability import commands
from tests.reliability.commands import Command, Place, Process
from tests.reliability.table import Trial

# How many trials of a command there are for one of others: what takes longest is tried least.
SHARES = {"train, 2 processes": 0.5, "evaluate": 0.5, "train": 1.3}
MOST = 3  # kills in a row


def plan(place: Place, trials: int) -> list[tuple[str, int]]:
    """(command, number of the trial) of all trials."""
    names = list(place.commands())
    each = trials / sum(SHARES.get(name, 1) for name in names)
    return [(name, number) for name in names for number in range(max(1, round(each * SHARES.get(name, 1))))]


def run(place: Place, measured: dict[str, dict], seed: int, name: str, number: int) -> Trial:
    """One trial: a command is killed one to three times, then must end by itself with the same result."""
    dice, command = random.Random(f"{seed} {name} {number}"), place.commands()[name]
    folder = commands.empty(place.root / "trials" / f"kill-{name.replace(' ', '-')}-{number}")
    trial = Trial("kills", name, number)
    for attempt in range(dice.randint(1, MOST)):
        logs = commands.empty(folder / f"logs{attempt}")
        if fault := _kill(command, folder / "out", logs, measured[name], dice, trial):
            return trial.failed(*fault)
    logs = commands.empty(folder / "logs")
    started = command.start(folder / "out", logs)
    for process in started:
        if fault := commands.fault_of(process.wait(), process.text()):
            for other in started:
                other.kill()
            return trial.failed(fault, process.text())
    if bad := next((process for process in started if process.status), None):
        return trial.failed("lost", f"run again, it ends with status {bad.status}: {bad.text()}")
    different = commands.differing(measured[name]["files"], commands.contents(command.module, folder / "out"))
    if different:
        return trial.failed("lost", f"run again, it makes other files: {', '.join(different[:5])}")
    shutil.rmtree(folder)
    return trial


def _kill(
    command: Command,
    out: pathlib.Path,
    logs: pathlib.Path,
    measured: dict,
    dice: random.Random,
    trial: Trial,
) -> tuple[str, str] | None:
    """Starts a command and kills one of its processes. Returns what is wrong with another one, if any is."""
    victim = dice.randrange(len(command.processes))
    count = measured["operations"][victim]
    at_operation = count and dice.random() < 0.6
    point = dice.randint(1, count) if count else 0
    moment = dice.uniform(0.8 * measured["first"], measured["seconds"])

    def kill(number: int) -> None:
        if number == point:
            os.kill(os.getpid(), signal.SIGKILL)

    first = {victim: functools.partial(commands.changes, out, kill)} if at_operation else {}
    started = command.start(out, logs, first)
    if not at_operation:
        _wait_until(started, time.monotonic() + moment)
        started[victim].kill()
    ended = [process.wait() for process in started]
    trial.count += started[victim].status == -signal.SIGKILL
    for number, process in enumerate(started):
        # In a job, JAX itself ends a process that loses the others, with a signal.
        alone = not command.distributed
        fault = commands.fault_of(ended[number], process.text())
        if fault and number != victim and (ended[number] is None or alone):
            return fault, process.text()
    if started[victim].status is None or ended[victim] is None:
        return "hang", started[victim].text()
    return None


def _wait_until(started: list[Process], until: float) -> None:
    while time.monotonic() < until and any(process.poll() is None for process in started):
        time.sleep(0.005)
