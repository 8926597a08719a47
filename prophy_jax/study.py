"""Compares arms: trains each with several seeds, scores the same held-out prompts, writes one table.

    python -m prophy_jax.study --config=configs/wan.py:demo --arms=base,lora,full --seeds=3 --out=DIR

An arm is what follows the comma of a configuration (configs/wan.py:demo,lora); "base" is the backbone alone,
which is not trained, is scored once, and is paired with every seed of the others. Each arm and seed is a unit
in DIR/ARM/seed_S: the commands prophy_jax.train and prophy_jax.evaluate --scores, whose output is in its
train.log and scores.log, its run in run/ and its scores in scores.json. The noise that clips are sampled from
is the same for all. Run the same command again to go on; more arms or seeds may be added. Processes share the
units with --process=0/2 and --process=1/2; who finds all units finished writes

    DIR/scores.csv    arm, seed, prompt, metric, value
    DIR/study.html    the table, a figure, and what it was made from
    DIR/study.json    the same numbers
    DIR/study.csv     for each metric and arm: mean, standard error over seeds, and the paired difference to
                      the arm --versus, the first by default, with a 95 % interval and p-values

S seeds, P prompts.
"""

import contextlib
import csv
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from prophy_jax.data.job import parse_process
from prophy_jax.evaluation import statistics
from prophy_jax.run import checksums, cli, config_check, lock, signals, storage, workdir
from prophy_jax.run.errors import UserError, counted

BASE = "base"  # the backbone alone
COLUMNS = ("metric", "arm", "versus", "seeds", "prompts", "mean", "standard_error", "difference", "low",
           "high", "p", "p_over_seeds", "higher_is_better")  # fmt: skip


_SCORES = {"split": str, "settings": dict, "metrics": dict, "prompts": [dict], "scores": dict}


class Unit(NamedTuple):
    """An arm trained with a seed."""

    arm: str
    seed: int
    folder: str

    def scores(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """What its scores.json holds; None where it is not there, or was scored with other settings.

        Raises UserError where the file is damaged.
        """
        path = os.path.join(self.folder, "scores.json")
        if not os.path.exists(path):
            return None
        remedy = "remove it, and run the same command again"
        found = checksums.unsealed(workdir.read_json(path, remedy, _SCORES), path, remedy)
        return found if found.get("settings") == settings else None


# --- The table -----------------------------------------------------------------------------------------


def make_table(scores: Mapping[str, Sequence[Mapping[str, Any]]], versus: str) -> list[dict[str, Any]]:
    """A row for each metric and arm.

    Args:
        scores: Arm -> for each seed what its scores.json holds.
        versus: The arm that the others are compared with.

    Raises:
        UserError: units scored other prompts or metrics.
    """
    first = scores[versus][0]
    for arm, seeds in scores.items():
        for seed, scored in enumerate(seeds):
            if scored["prompts"] != first["prompts"] or scored["metrics"] != first["metrics"]:
                raise UserError(
                    f"{arm}, seed {seed}, scored other prompts or metrics than {versus}, seed 0: data or "
                    "evaluators have changed; use those of before, or name another --out"
                )
    rows = []
    for metric, about in first["metrics"].items():
        values = {arm: _values(seeds, metric) for arm, seeds in scores.items()}
        for arm in values:
            own, other = values[arm], values[versus]
            measured = statistics.in_both(own, other)  # (P,)
            row = dict.fromkeys(COLUMNS) | {"metric": metric, "arm": arm, "seeds": len(own)}
            row |= {"prompts": int(measured.sum()), "higher_is_better": about["higher_is_better"]}
            if measured.any():
                own, other = own[:, measured], other[:, measured]
                row |= {"mean": float(own.mean()), "standard_error": statistics.standard_error(own)}
                if arm != versus:
                    found = statistics.paired_bootstrap(own, other)
                    row |= {"versus": versus, "difference": found.mean, "low": found.low}
                    row |= {"high": found.high, "p": found.p}
                    row |= {"p_over_seeds": statistics.p_over_seeds(own, other)}
            rows.append(row)
    return rows


def _values(seeds: Sequence[Mapping[str, Any]], metric: str) -> np.ndarray:
    """(S, P) of an arm; NaN: not measured."""
    return np.array([own["scores"][metric] for own in seeds], float)


def as_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Numbers have 7 digits; what there is not is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        cells = [row[name] for name in columns]
        writer.writerow([f"{one:.7g}" if isinstance(one, float) else one for one in cells])
    return text.getvalue()


# --- The units -----------------------------------------------------------------------------------------


def name_configuration(words: Sequence[str], arm: str) -> str:
    """--config=FILE:VARIANT,ARM of the words of --config. Raises UserError where they name one."""
    text = words[-1].partition("=")[2] or words[-1] if len(words) == 1 else words[-1]
    if "," in text.rpartition("/")[2]:
        raise UserError(f"--config={text} names an arm: leave it out, and list it in --arms")
    if arm == BASE:
        return f"--config={text}"
    return f"--config={text}{'' if ':' in text.rpartition('/')[2] else ':'},{arm}"


class Runner:
    """Runs commands one after another, and passes signals to stop on to the one that runs."""

    def __init__(self) -> None:
        self._child: subprocess.Popen | None = None
        self.stopped = 0  # by which signal
        signals.end_elsewhere()
        signals.catch(self._pass_on, (*signals.NUMBERS, signal.SIGINT))

    def _pass_on(self, number: int, _: Any) -> None:
        self.stopped = number
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)  # a terminal has sent its own to both

    def __call__(self, words: Sequence[str], log: str) -> int:
        """Prints the command, runs it, and returns its status; its output is added to the file `log`."""
        if self.stopped:
            return signals.STOPPED
        print(f"python -m {shlex.join(words)}  > {log}", flush=True)
        with open(log, "ab") as output:
            self._child = subprocess.Popen(
                [sys.executable, "-m", *words], stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
            if self.stopped:  # while it was started
                self._child.send_signal(signal.SIGTERM)
            return self._child.wait()


def last_error(log: str) -> str:
    """The last line of a log that says what was wrong, or just its last."""
    lines = open(log, encoding="utf-8", errors="replace").read().replace("\r", "\n").split("\n")
    lines = [line.strip() for line in lines if line.strip()]
    line = next((line for line in reversed(lines) if line.startswith("error: ")), (lines or ["no word"])[-1])
    return line.removeprefix("error: ")


def make(unit: Unit, config: str, overrides: Sequence[str], run: Runner) -> int:
    """Trains and scores a unit; returns the status of the command that ended it, 0 where it is finished."""
    place = os.path.join(unit.folder, "run")
    if os.path.exists(os.path.join(place, lock.LOCK)):  # a trainer may have outlived its study
        with lock.held(place, "prophy_jax.study", wait=True):
            pass
    own, todo = [config, *overrides], []
    if unit.arm != BASE:
        own += [f"--config.seed={unit.seed}", f"--workdir={place}"]
        todo.append(("train", ["prophy_jax.train", *own]))
    todo.append(("scores", ["prophy_jax.evaluate", *own, "--scores", f"--out={unit.folder}"]))
    for name, words in todo:
        log = os.path.join(unit.folder, f"{name}.log")
        status = run(words, log)
        if run.stopped or status in (signals.STOPPED, 130):
            return signals.STOPPED
        if status:
            print(
                f"error: {unit.arm}, seed {unit.seed}: {last_error(log)} ({log})", file=sys.stderr, flush=True
            )
            return status
    return 0


def study(
    config: Any, arms: Sequence[str], seeds: int, out: str, versus: str, process: tuple[int, int]
) -> int:
    """Makes this process's share of the units, and the table if all are there; returns the exit status."""
    from prophy_jax import build

    # 1. Everything that can be wrong, before OUT is touched.
    words, keys = cli.typed_configuration()
    if "seed" in keys:
        raise UserError("--config.seed is what --seeds counts: leave it out")
    overrides = [word for key in keys for word in keys[key]]
    configs = {arm: name_configuration(words, arm) for arm in arms}
    if BASE in arms:
        build.named(config, "backbone", config.backbone_params)
    settings: dict[str, Any] = {}
    references: dict[str, Any] = {}
    for arm in arms:
        settings[arm], references = check_arm([configs[arm], *overrides])
    shared = {"run": workdir.run_identity(config, "study"), **references}
    workdir.claim(out, "config.json", shared, "--out")

    # 2. The units of this process.
    units = [
        Unit(arm, seed, os.path.join(out, arm, f"seed_{seed}"))
        for seed in range(seeds)
        for arm in arms
        if arm != BASE or seed == 0
    ]
    run, failed = Runner(), False
    for unit in units[process[0] :: process[1]]:
        os.makedirs(unit.folder, exist_ok=True)
        if unit.scores(settings[unit.arm]):
            continue
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(lock.held(unit.folder, "prophy_jax.study", "study.lock"))
            except UserError as error:
                print(f"left to another process: {error}", flush=True)
                continue
            status = make(unit, configs[unit.arm], overrides, run)
        if status == signals.STOPPED:
            signals.say("stopped: run the same command to go on")
            return signals.STOPPED
        failed |= bool(status)

    # 3. The table, where nothing is missing.
    found: dict[str, list] = {arm: [] for arm in arms}
    missing = []
    for unit in units:
        if own := unit.scores(settings[unit.arm]):
            found[unit.arm].append(own)
        else:
            missing.append(f"{unit.arm}, seed {unit.seed}")
    if missing:
        print(f"{counted(len(missing), 'unit')} of {len(units)} missing: {'; '.join(missing)}")
        return int(failed)
    write(out, found, versus, seeds, config.steps, shared)
    return 0


def write(
    out: str,
    found: Mapping[str, Sequence[Mapping[str, Any]]],
    versus: str,
    seeds: int,
    steps: int,
    shared: Mapping[str, Any],
) -> None:
    """Writes the table, the scores and the page, and prints the table.

    Args:
        out: The folder.
        found: As `make_table` takes it.
        versus: The arm that the others are compared with.
        seeds: Of the arms that are trained.
        steps: That they are trained for.
        shared: What all arms have in common, for the page.
    """
    from prophy_jax.evaluation import charts, report

    rows, first = make_table(found, versus), found[versus][0]
    every = [
        {"arm": arm, "seed": seed, "prompt": prompt["id"], "metric": metric, "value": value}
        for arm, runs in found.items()
        for seed, one in enumerate(runs)
        for metric, values in one["scores"].items()
        for prompt, value in zip(one["prompts"], values, strict=True)
    ]
    points = {
        (metric, arm): statistics.differences(_values(found[arm], metric), _values(found[versus], metric))
        for metric in first["metrics"]
        for arm in found
    }
    shown = {
        **{"arms": list(found), "versus": versus, "seeds": seeds, "steps": steps, "split": first["split"]},
        **{"metrics": first["metrics"], "prompts": first["prompts"], "rows": rows, "settings": shared},
    }
    page = report.templates()
    page.globals["counted"] = counted
    chart = charts.difference_chart(rows, points, versus) if len(found) > 1 else None
    text = page.get_template("study.html.j2").render(
        **shown, chart=chart, alone=BASE if BASE in found else ""
    )
    for name, content in {
        "scores.csv": as_csv(every, tuple(every[0])),
        "study.csv": as_csv(rows, COLUMNS),
        "study.json": json.dumps(shown, indent=1) + "\n",
        "study.html": text,
    }.items():
        storage.write_atomically(os.path.join(out, name), content)
    print(as_csv(rows, COLUMNS), end="")
    print(f"wrote {os.path.join(out, 'study.html')}, study.csv, study.json and scores.csv")


def check_arm(words: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings of the scores of a configuration, given by the words of a command line; hashes of inputs.

    Raises UserError unless it can be trained and scored.
    """
    from prophy_jax import build
    from prophy_jax.evaluation import scores
    from prophy_jax.run import checkpoints

    config = cli.read_configuration(words)
    config_check.check(config)
    model = build.build_model(config)
    build.build_objective(config)
    manifest = build.check_data(config, model, build.build_losses(config, model))
    scores.build_evaluators(config)
    references = build.find_references(config, manifest)
    if folder := config.backbone_params:
        remedy = build.remedy(config, "backbone", folder)
        references["backbone_sha256"] = checkpoints.read_manifest(folder, remedy)["sha256"]
    return scores.settings(config), references


def main(config: Any) -> int:
    """The command, with its flags parsed; returns the exit status."""
    options = flags.FLAGS
    arms = [arm for arm in (options.arms or "").split(",") if arm]
    if not arms or not options.out:
        raise UserError("name the arms and a folder: --arms=full,lora --out=DIR")
    if twice := [arm for arm in arms if arms.count(arm) > 1]:
        raise UserError(f"--arms names {twice[0]!r} twice: leave one out")
    versus = options.versus or arms[0]
    if versus not in arms:
        raise UserError(
            f"--versus={versus} is not among --arms={options.arms}: add it there, or name one of them"
        )
    if re.match("[a-z0-9]+://", options.out):
        raise UserError("--out must be on a disk: logs are written there")
    process = parse_process(options.process)
    return study(config, arms, options.seeds, options.out, versus, process)


if __name__ == "__main__":
    flags.DEFINE_string("arms", None, "Arms of the configuration, with commas between them.")
    flags.DEFINE_integer("seeds", 3, "How many seeds, from 0.", lower_bound=1)
    flags.DEFINE_string("out", None, "Folder to write the study to, or one to go on with.")
    flags.DEFINE_string("versus", None, "The arm that the others are compared with; default: the first.")
    flags.DEFINE_string("process", "0/1", "I/P: which of how many processes this is, such as 0/4.")
    cli.run(main, __doc__)
