"""Every figure of one GPU in ten minutes: kernels, the training step, sampling, and the same in PyTorch.

    python -m benchmarks.gpu [--out=DIR] [--budget=585] [--smoke]     (or: make bench-gpu OUT=DIR)

Runs the other benchmarks one after the other, the most important first, each part in a process of its own
with a time limit, and writes DIR/gpu.json after every part: one that fails or runs out of time loses only its
own figures. DIR is $OUT unless --out names it. At the end, a table
of the goals. Needs jax with CUDA, flax, optax and numpy; PyTorch, safetensors and orbax for the comparison.

--smoke runs every part on a CPU at tiny sizes.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
ALLOCATOR = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
TWO_FRAMEWORKS = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

# Name -> (seconds it may take, command, environment).
PARTS: dict[str, tuple[int, str, Mapping[str, str]]] = {
    "ceilings": (70, "kernels --part=ceilings --shapes=wan49", ALLOCATOR),
    "attention": (60, "kernels --part=attention --shapes=wan49,wan81", ALLOCATOR),
    "attention torch": (45, "kernels --framework=torch --shapes=wan49,wan81", TWO_FRAMEWORKS),
    "block": (60, "kernels --part=block,experts --shapes=wan49", ALLOCATOR),
    "train 49": (100, "train_step --shapes=wan49 --remat=products", ALLOCATOR),
    "train 81": (110, "train_step --shapes=wan81 --remat=self_attention", ALLOCATOR),
    "sample 81": (100, "sample --shapes=wan81 --steps=5", ALLOCATOR),
    "peer 49": (
        150,
        "peer --device=cuda --shapes=wan49 --work=train,forward --remat=attention --rounds=3",
        TWO_FRAMEWORKS,
    ),
    "train 81 qkv": (110, "train_step --shapes=wan81 --remat=qkv", ALLOCATOR),
    "train 49 full": (80, "train_step --shapes=wan49 --remat=full", ALLOCATOR),
    "sample 49 whole": (150, "sample --shapes=wan49 --whole", ALLOCATOR),
}
SMOKE: dict[str, tuple[int, str, Mapping[str, str]]] = {
    "kernels": (200, "kernels --shapes=tiny", {}),
    "attention torch": (200, "kernels --framework=torch --shapes=tiny", {}),
    "train": (200, "train_step --shapes=tiny --remat=self_attention --rounds=1", {}),
    "sample": (200, "sample --shapes=tiny --whole --rounds=1", {}),
    "peer": (200, "peer --shapes=tiny --work=forward --rounds=1", {}),
}


def row_of(results: Mapping[str, Any], part: str, **wanted: Any) -> dict[str, Any]:
    """The row of a part's result with these values; raises KeyError when it was not measured."""
    for row in results[part]["result"]["rows"]:
        if all(row.get(key) == value for key, value in wanted.items()):
            return row
    raise KeyError(part)


def torch_ratio(results: Mapping[str, Any], contenders: Callable[[str], bool]) -> float:
    """Time of the fastest of these PyTorch contenders over that of JAX, training; smallest times."""
    rows = [row for row in results["peer 49"]["result"]["rows"] if row["work"] == "train"]
    jax_time = next(row["min_s"] for row in rows if row["contender"] == "jax")
    return min(row["min_s"] for row in rows if contenders(row["contender"])) / jax_time


TRAIN_49, TRAIN_81 = "train 49", "train 81"
GOALS: dict[str, tuple[str, Callable[[Mapping[str, Any]], float], Callable[[float], bool]]] = {
    "MFU, training, 49 frames": (">= 0.44", lambda r: row_of(r, TRAIN_49)["mfu"], lambda x: x >= 0.44),
    "MFU, training, 81 frames": (">= 0.42", lambda r: row_of(r, TRAIN_81)["mfu"], lambda x: x >= 0.42),
    "kernel-roofline efficiency, 49 frames": (
        ">= 0.93",
        lambda r: row_of(r, TRAIN_49)["roofline_efficiency"],
        lambda x: x >= 0.93,
    ),
    "kernel-roofline efficiency, 81 frames": (
        ">= 0.93",
        lambda r: row_of(r, TRAIN_81)["roofline_efficiency"],
        lambda x: x >= 0.93,
    ),
    "training, times as fast as the best PyTorch": (
        ">= 1.25",
        lambda r: torch_ratio(r, lambda name: name != "jax"),
        lambda x: x >= 1.25,
    ),
    "training, times as fast as PyTorch by default": (
        ">= 1.8",
        lambda r: torch_ratio(r, lambda name: name == "torch"),
        lambda x: x >= 1.8,
    ),
    "sampling, 81 frames x 50 steps, s": (
        "<= 56",
        lambda r: row_of(r, "sample 81", branch=False)["clip_s"],
        lambda x: x <= 56,
    ),
    "the same with the branch, s": (
        "<= 74",
        lambda r: row_of(r, "sample 81", branch=True)["clip_s"],
        lambda x: x <= 74,
    ),
    "peak memory, training, 81 frames, GB": (
        "<= 28",
        lambda r: row_of(r, TRAIN_81)["peak_bytes"] / 1e9,
        lambda x: x <= 28,
    ),
    "compile, cold, s": ("<= 45", lambda r: row_of(r, TRAIN_81)["cold_s"], lambda x: x <= 45),
    "compile, warm, s": ("<= 5", lambda r: row_of(r, TRAIN_81)["warm_s"], lambda x: x <= 5),
    "programs compiled after step 2": (
        "0",
        lambda r: row_of(r, TRAIN_81)["compiled_after_step_2"],
        lambda x: x == 0,
    ),
    "device idle, training, 49 frames": (
        "< 0.005",
        lambda r: row_of(r, TRAIN_49)["idle"],
        lambda x: x < 0.005,
    ),
}


def goals(results: Mapping[str, Any]) -> str:
    """A line for each goal, with what was measured."""
    lines = []
    for name, (bar, value, met) in GOALS.items():
        try:
            measured = value(results)
            verdict = f"{measured:9.3f}   {'met' if met(measured) else 'MISSED'}"
        except (KeyError, TypeError):  # the part did not run, or knows no peak
            verdict = "        -   not measured"
        lines.append(f"{name:48} {bar:>8} {verdict}")
    return "\n".join(lines)


def run_part(command: str, limit: float, environment: Mapping[str, str]) -> dict[str, Any]:
    """Runs `python -m benchmarks.COMMAND` for at most `limit` seconds; all that it started ends with it."""
    with tempfile.TemporaryDirectory() as folder:
        path, log = pathlib.Path(folder, "result.json"), pathlib.Path(folder, "log")
        name, *arguments = command.split()
        start = time.perf_counter()
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", f"benchmarks.{name}", *arguments, f"--json={path}"],
                cwd=ROOT,
                env={**os.environ, **environment, "PYTHONPATH": _python_path(), "PYTHONUNBUFFERED": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        result = json.loads(path.read_text()) if path.exists() else {"rows": []}
        return {
            "command": f"python -m benchmarks.{command}",
            "exit": process.returncode,  # negative: killed, its time was over
            "seconds": time.perf_counter() - start,
            "output": log.read_text(errors="replace")[-6000:],
            "result": {"rows": result} if isinstance(result, list) else result,
        }


def _python_path() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--out", default=os.environ.get("OUT", "runs/gpu"), help="folder for gpu.json")
    parser.add_argument("--budget", type=float, default=585, help="seconds for all parts")
    parser.add_argument("--smoke", action="store_true", help="on a CPU, at tiny sizes")
    options = parser.parse_args()
    out, results = pathlib.Path(options.out), {}
    out.mkdir(parents=True, exist_ok=True)
    ends = time.perf_counter() + options.budget
    for name, (limit, command, environment) in (SMOKE if options.smoke else PARTS).items():
        if ("torch" in command or command.startswith("peer")) and not find_spec("torch"):
            print(f"== {name}: not run, there is no PyTorch here", flush=True)
            continue
        left = ends - time.perf_counter()
        if left < min(20, limit):
            print(f"== {name}: not run, no time left", flush=True)
            continue
        results[name] = run_part(command, min(limit, left), environment)
        (out / "gpu.json").write_text(json.dumps(results, indent=1))
        ended = results[name]["exit"]
        state = "" if ended == 0 else f", FAILED ({'out of time' if ended == -signal.SIGKILL else ended})"
        print(f"== {name}: {results[name]['seconds']:.0f} s{state}\n{results[name]['output']}", flush=True)
    print(goals(results))
    print(f"written to {out / 'gpu.json'}")
    if any(result["exit"] for result in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
