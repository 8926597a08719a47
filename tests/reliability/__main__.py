"""Kills commands, damages what they read, and makes their system fail: nothing may be lost.

    python -m tests.reliability [--seed=0] [--minutes=25] [--kinds=kills,mutations,faults]
    python -m tests.reliability --seed=0 --repeat="kills: train: 7"       # one trial again; its folder stays

Prints a table, of each fault what to run to repeat it, and ends with status 1 unless there are none. What the
columns mean is in CONTRIBUTING.md.
"""

import argparse
import collections
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
import warnings

KINDS = ("kills", "mutations", "faults")
# Per kind: trials of a full run, and the share of the time after which none is begun.
TRIALS = {"kills": 110, "mutations": 1000, "faults": 100}


def set_environment(caches: pathlib.Path) -> None:
    """Of this process and its forks; before anything imports jax or NumPy."""
    # Threads that NumPy starts when it is imported would not be in forks.
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(caches)}
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(caches / "xla")
    os.environ["XLA_FLAGS"] = ""
    from tests import conftest

    os.environ["XLA_FLAGS"] = conftest.xla_flags()
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    warnings.filterwarnings("ignore", message="os.fork|.*found in sys.modules", category=RuntimeWarning)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.reliability", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=28, help="When no further trial is begun.")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--scale", type=float, default=1.0, help="Of the numbers of trials.")
    parser.add_argument("--quick", action="store_true", help="Only commands that take about a second.")
    parser.add_argument("--repeat", help='One trial, as "kills: train: 7".')
    parser.add_argument(
        "--folder", type=pathlib.Path, help="To work in; it stays, and what is made is used again."
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    root = options.folder or pathlib.Path(tempfile.mkdtemp(prefix="reliability-"))
    root.mkdir(parents=True, exist_ok=True)
    try:
        return _run(options, root.resolve(), begun)
    finally:
        if not options.folder and not options.repeat:
            shutil.rmtree(root, ignore_errors=True)


def _run(options: argparse.Namespace, root: pathlib.Path, begun: float) -> int:
    set_environment(root / "caches")
    from tests.reliability import commands, faults, kills, mutations, table

    modules = {"kills": kills, "mutations": mutations, "faults": faults}
    commands.import_all()
    place = commands.Place(root / "place", options.quick)
    known = root / "measured.json"
    if known.exists():
        measured = json.loads(known.read_text())
    else:
        if place.root.exists():
            shutil.rmtree(place.root)
        made = place.make()
        names = mutations.prepare(place)
        calls = [(place, name) for name in names]
        results = commands.each_in_a_fork(mutations.undamaged, calls, options.processes, root / "notes")
        undamaged = {names[number]: result for number, result in results}
        measured = {"kills": made, "faults": made, "mutations": undamaged}
        known.write_text(json.dumps(measured))
    if options.repeat:
        kind, name, number = options.repeat.split(": ")
        trial = modules[kind].run(place, measured[kind], options.seed, name, int(number))
        print(f"{trial.outcome}: {trial.detail}\nfiles: {place.root / 'trials'}")
        return int(trial.outcome in table.FAULTS)
    planned = []
    for kind in options.kinds.split(","):
        own = modules[kind].plan(place, round(TRIALS[kind] * options.scale))
        counts = collections.Counter(name for name, _ in own)
        # Spread, so that little time means fewer trials of everything.
        planned += [((number + 0.5) / counts[name], kind, name, number) for name, number in own]
    done, left, until = [], 0, begun + 60 * options.minutes
    calls = [
        (modules[kind].run, until, place, measured[kind], options.seed, name, number)
        for _, kind, name, number in sorted(planned)
    ]
    for _, trial in commands.each_in_a_fork(_one, calls, options.processes, root / "notes"):
        if trial is None:
            left += 1
            continue
        done.append(trial)
        if trial.outcome in table.FAULTS:
            again = f'--seed={options.seed} --repeat="{trial.kind}: {trial.name}: {trial.number}"'
            print(f"{trial.outcome}: python -m tests.reliability {again}", flush=True)
            print("    " + trial.detail.strip()[-1500:].replace("\n", "\n    "), flush=True)
    print(table.show(done))
    print(
        f"{time.monotonic() - begun:.0f} s, seed {options.seed}" + f", {left} trials not begun" * bool(left)
    )
    if not commands.LABELS:
        print("the label command was not tried: torch is not installed")
    return int(any(trial.outcome in table.FAULTS for trial in done))


def _one(run, until: float, *arguments):
    begun = time.monotonic()
    if begun >= until:
        return None
    trial = run(*arguments)
    trial.seconds = time.monotonic() - begun
    return trial


if __name__ == "__main__":
    sys.exit(main())
