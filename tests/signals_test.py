"""Signals to stop, sent to real commands: alone, under make, in a job script of Slurm, under a controller."""

import contextlib
import json
import os
import pathlib
import pty
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from prophy_jax.run import metrics, signals
from tests.conftest import ROOT, xla_flags
from tests.distributed_test import free_port

pytestmark = pytest.mark.jobs
SMALL = (
    "--config.backbone.num_layers=1",
    "--config.parts.branch.layers=(0,)",
    "--config.checkpoint.every=5",
    "--config.log.every=5",
    "--config.validation.every=1000",
    "--config.samples.every=1000",
    "--config.steps=40",
)
# Each step takes a while, and so does what a word of the command line names: validation, clips, last save.
SLOW = """
import runpy, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs the tests aside
from prophy_jax.evaluation import validation
from prophy_jax.run import checkpoints, parallel
def slowly(owner, name, seconds):
    function = getattr(owner, name)
    setattr(owner, name, lambda *given, **named: (time.sleep(seconds), function(*given, **named))[1])
slowly(parallel, "put_batch", 0.1)
for word in [word for word in sys.argv if word.startswith("slow-")]:
    sys.argv.remove(word)
    if word == "slow-save":
        slowly(checkpoints.TrainCheckpoints, "close", 3)
    else:
        make = getattr(validation, word[5:])
        def make_slow(*given, make=make):
            work = make(*given)
            def once(*own):
                if once.calls:
                    print("looking", flush=True)
                    time.sleep(120)
                once.calls += 1
                return work(*own)
            once.calls = int(word == "slow-make_validation_clips")
            return once
        setattr(validation, word[5:], make_slow)
runpy.run_module("prophy_jax.train", run_name="__main__", alter_sys=True)
"""


def environment(**more) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "XLA_FLAGS": xla_flags(), "PYTHONPATH": path, **more}


def start(tmp_path, tiny_data, *words, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, "--config=configs/wan.py:tiny", *SMALL, f"--config.data.dir={tiny_data}",
         f"--workdir={tmp_path}/run", *words],
        cwd=ROOT, env=environment(), text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options},
    )  # fmt: skip


def saved(workdir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit())


def wait_until(true, process) -> None:
    until = time.monotonic() + 120
    while not true():
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.02)


def wait_for_steps(run: pathlib.Path, process) -> None:
    """Until the run has saved once more than it had."""
    before = max(saved(run), default=0)
    wait_until(lambda: max(saved(run), default=0) > before, process)


def wait_for_line(process, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was not printed, and the process ended with {process.wait()}")


# --- Commands that have nothing to save --------------------------------------------------------------

COMMAND = """
import sys, time
from prophy_jax.run import errors, signals
signals.GRACE_S = 0.3
with errors.one_line_errors():
    print("ready", flush=True)
    time.sleep(0.1)
    exec(sys.argv[1])
"""
# Where the tests run under nohup, or in the background of a shell, their processes ignore some signals.
DEFAULTS = """
import signal
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
"""
# 2,000 million rounds in C, between which Python calls no handler.
BUSY = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2_000_000_000)"


@pytest.mark.parametrize("number", signals.NUMBERS)
@pytest.mark.parametrize("body", ["time.sleep(60)", BUSY], ids=["waiting", "in C"])
def test_a_command_ends_soon_and_says_why(number, body):
    process = subprocess.Popen(
        [sys.executable, "-c", DEFAULTS + COMMAND, body],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_line(process, "ready")
    time.sleep(0.5)  # it is in the body by then
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 75
    assert err.strip() == f"stopped by {number.name}: run the same command to go on"


@pytest.mark.parametrize(
    "number, status, says", [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 75, "stopped by SIGTERM")]
)
def test_a_command_ends_where_python_drops_what_a_signal_raises(number, status, says):
    """As it does in callbacks of JAX."""
    body = "try:\n    time.sleep(60)\nexcept BaseException:\n    time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", DEFAULTS + COMMAND, body],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_line(process, "ready")
    time.sleep(0.5)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status and says in err and "Traceback" not in err


def test_a_signal_that_is_ignored_stays_ignored():
    """As SIGHUP under nohup."""
    process = subprocess.Popen(
        ["/bin/sh", "-c", 'trap "" HUP; exec "$@"', "sh", sys.executable, "-c", COMMAND, "time.sleep(1)"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_line(process, "ready")
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=20) == 0


def test_files_that_are_being_written_are_taken_away(tmp_path):
    body = (
        "from prophy_jax.run import storage\n"
        f"with storage.replacing({str(tmp_path / 'file')!r}) as partial:\n"
        "    partial.write_text('half'); print('half', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, body], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    wait_for_line(process, "half")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75 and not os.listdir(tmp_path)


def test_prepare_goes_on_where_a_signal_stopped_it(tmp_path):
    sizes = [
        f"--config.data.sandbox.{split}={count}" for split, count in (("train", 400), ("val", 8), ("test", 8))
    ]
    words = ("-m", "prophy_jax.prepare", "--config=configs/wan.py:tiny", "--config.data.shard=8", *sizes)

    def begin(name: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *words, f"--out={tmp_path / name}"],
            cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    whole, process = begin("whole"), begin("stopped")
    wait_until(lambda: len(list((tmp_path / "stopped").glob("work/*-*.json"))) > 4, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert output.strip().endswith("stopped by SIGTERM: run the same command to go on")
    assert not (tmp_path / "stopped" / "manifest.json").exists()
    process = begin("stopped")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == whole.wait() == 0, output
    files = [
        path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()
    ]
    assert len(files) > 50
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "stopped" / file).read_bytes(), file


# --- Training ----------------------------------------------------------------------------------------


def test_a_run_is_stopped_at_start_in_a_step_and_while_it_saves(tmp_path, tiny_data):
    run = tmp_path / "run"
    process = start(tmp_path, tiny_data)
    wait_for_line(process, "compiling the first step")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "stopped by SIGTERM: run the same command to go on" in output
    assert time.monotonic() - began < signals.GRACE_S + 5 and saved(run) == []

    process = start(tmp_path, tiny_data, "slow-save")  # Slurm's warning; others while it saves
    wait_for_steps(run, process)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        process.send_signal(number)
        time.sleep(0.3)
    output, _ = process.communicate(timeout=60)
    stopped_at = saved(run)[-1]
    assert process.returncode == 75 and f"saved at step {stopped_at}: run the same command" in output, output
    assert output.count("saving after this step") == 1 and not (run / "lock.json").exists()

    process = start(tmp_path, tiny_data)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and saved(run)[-1] == 40, output
    # The whole run is in the sum: the parts before, and what was lost in them.
    lines = metrics.read_metrics(str(run))
    spent = {name: value for name, value in lines[-1].items() if re.fullmatch(r"goodput/\w+_s", name)}
    assert lines[-1]["goodput/share"] == pytest.approx(spent["goodput/train_s"] / sum(spent.values()))
    steps = [line["time/step_s"] for line in lines if "time/step_s" in line]
    assert len(steps) >= 8 and spent["goodput/train_s"] > 40 * 0.1 and spent["goodput/start_s"] > 0
    share = f"{100 * lines[-1]['goodput/share']:.1f}%"
    assert f"goodput: {share} of " in output and "start-up" in output and "compiling" in output


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_run_at_once(tmp_path, tiny_data):
    run = tmp_path / "run"
    process = start(tmp_path, tiny_data, "slow-save")
    wait_for_steps(run, process)
    process.send_signal(signal.SIGINT)
    wait_for_line(process, "SIGINT: saving after this step; again: ends at once")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and output.strip().splitlines()[-1] == "interrupted", output
    # The checkpoints that there are, are whole.
    output, _ = start(tmp_path, tiny_data).communicate(timeout=120)
    assert "done: " in output, output


@pytest.mark.slow
@pytest.mark.parametrize("looking", ["make_validation", "make_validation_clips"])
def test_what_is_looked_at_is_cut_short_and_made_up_for(tmp_path, tiny_data, looking):
    run, every = tmp_path / "run", ("--config.validation.every=10", "--config.samples.every=10")
    process = start(tmp_path, tiny_data, f"slow-{looking}", *every)
    wait_for_line(process, "looking")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and time.monotonic() - began < 30, output
    assert saved(run)[-1] == 10 and "saved at step 10" in output
    (line,) = [line for line in metrics.read_metrics(str(run)) if line["step"] == 10]
    assert "loss/total" in line and ("validation/loss" in line) == (looking == "make_validation_clips")
    assert not (run / "samples" / "step_0000010.mp4").exists()

    process = start(tmp_path, tiny_data, *every)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    lines = {line["step"]: line for line in metrics.read_metrics(str(run))}
    assert list(lines) == list(range(0, 41, 5))
    assert all("validation/loss" in lines[step] for step in range(0, 41, 10))
    assert [path.name for path in sorted((run / "samples").glob("*.mp4"))] == [
        f"step_00000{step}.mp4" for step in (10, 20, 30, 40)
    ]


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_saves(tmp_path, tiny_data):
    run = tmp_path / "run"
    master, terminal = pty.openpty()
    process = start(
        tmp_path, tiny_data, stdout=terminal, stderr=terminal, stdin=terminal, start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(terminal), os.O_RDWR)),  # it becomes its terminal
    )  # fmt: skip
    os.close(terminal)
    until = time.monotonic() + 120
    while not saved(run):
        assert process.poll() is None and time.monotonic() < until
        with contextlib.suppress(BlockingIOError):
            os.set_blocking(master, False)
            os.read(master, 10_000)
        time.sleep(0.02)
    os.close(master)
    assert process.wait(timeout=60) == 75
    assert saved(run)[-1] < 40 and not (run / "lock.json").exists()


# --- What starts runs --------------------------------------------------------------------------------


def write_script(path: pathlib.Path, text: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def train_pid(workdir: pathlib.Path) -> int:
    return json.loads((workdir / "lock.json").read_text())["pid"]


def test_make_stops_at_the_step_that_a_signal_stops(tmp_path):
    """The Makefile's own rule, on fewer and smaller clips."""
    sizes = " ".join(
        [f"--config.data.sandbox.{split}=16" for split in ("train", "val", "test")]
        + [f"--config.backbone.{size}" for size in ("dim=16", "ffn_dim=16")]
        + [
            f"--config.{name}.every={every}"
            for name, every in (("checkpoint", 5), ("validation", 0), ("samples", 0))
        ]
    )
    python = write_script(tmp_path / "python", f'#!/bin/sh\nexec {sys.executable} "$@" {sizes}\n')
    process = subprocess.Popen(
        ["make", "-f", ROOT / "Makefile", "-o", ".venv/.installed", f"RUN={python}", "demo"],
        cwd=tmp_path, env=environment(MAKELEVEL="", MAKEFLAGS=""),  # make may run the tests
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    run = tmp_path / "runs" / "demo_backbone"
    wait_for_steps(run, process)
    os.kill(train_pid(run), signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    said, stopped = [line for line in output.strip().splitlines() if re.match("stopped|make", line)][-2:]
    assert said == f"stopped by a signal, saved at step {saved(run)[-1]}: run the same command to resume"
    assert re.fullmatch(r"make\S*: \*\*\* \[.*demo\] Error 75", stopped)
    assert os.listdir(tmp_path / "runs") == ["demo_backbone"]  # the next step of the rule was not begun


def snippet(text: str, kind: str) -> str:
    """The block of docs/launch.md that has a text."""
    blocks = re.findall(rf"^```{kind}\n(.*?)^```$", (ROOT / "docs" / "launch.md").read_text(), re.M | re.S)
    (found,) = [block for block in blocks if text in block]
    return found


# The words of a documented command at the sizes of the smallest run.
PYTHON = """#!/bin/sh
for word; do
  shift
  case "$word" in
    --config=configs/wan.py) set -- "$@" --config=configs/wan.py:tiny ;;
    --config.batch_size=*|--config.accumulation=*) ;;
    *) set -- "$@" "$word" ;;
  esac
done
[ "$1 $2" = "-m prophy_jax.train" ] || exit 99
shift 2
exec {python} -c '{slow}' "$@" {small}
"""
SRUN = """#!{python}
import os, subprocess, sys
command = sys.argv[1 + next(i for i, word in enumerate(sys.argv[1:]) if not word.startswith("--")):]
tasks = [
    subprocess.Popen(command, env={{**os.environ, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}})
    for i in range(2)
]
open("{folder}/tasks", "w").write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(status % 256 for status in [task.wait() for task in tasks]))
"""


def stand_in(folder: pathlib.Path, tiny_data, tasks: int) -> dict[str, str]:
    """The programs that a documented script calls, in front of the PATH; each a few lines."""
    small = " ".join(f"'{word}'" for word in (*SMALL, f"--config.data.dir={tiny_data}"))
    text = PYTHON.format(python=sys.executable, slow=SLOW, small=small)
    bin = folder / "bin"
    for path in (bin / "python", folder / "share/prophy_jax/.venv/bin/python"):
        write_script(path, text)
    write_script(bin / "srun", SRUN.format(python=sys.executable, folder=folder))
    write_script(bin / "scontrol", f'#!/bin/sh\necho "$@" >> {folder}/scontrol\n')
    shutil.copytree(ROOT / "configs", folder / "share" / "prophy_jax" / "configs")
    return environment(PATH=f"{bin}{os.pathsep}{os.environ['PATH']}", SLURM_JOB_ID=str(free_port()))


@pytest.mark.slow
def test_the_job_script_of_slurm_comes_back_until_the_run_is_finished(tmp_path, tiny_data):
    """docs/launch.md, word for word but for the folder; Slurm sends SIGTERM to all tasks before the limit."""
    variables = stand_in(tmp_path, tiny_data, 2)
    text = snippet("scontrol requeue", "").replace("/share", str(tmp_path / "share"))
    script, run = write_script(tmp_path / "job.sh", text), tmp_path / "share" / "runs" / "wan"
    statuses = []
    for attempt in range(3):
        with open(tmp_path / f"log{attempt}", "w") as log:
            job = subprocess.Popen([script], env=variables, stdout=log, stderr=log)
            if attempt < 2:
                wait_for_steps(run, job)
                for pid in (tmp_path / "tasks").read_text().split():
                    os.kill(int(pid), signal.SIGTERM)
            statuses.append(job.wait(timeout=120))
        said = (tmp_path / f"log{attempt}").read_text()
        requeued = (tmp_path / "scontrol").read_text().split("\n")[:-1]
        assert requeued == [f"requeue {variables['SLURM_JOB_ID']}"] * min(attempt + 1, 2), said
        assert (run / "branch").exists() == (attempt == 2), said
    assert statuses == [75, 75, 0]
    # Another failure is none to come back from.
    shutil.rmtree(tmp_path / "share" / "runs")
    (tmp_path / "share" / "runs").write_text("")
    assert subprocess.run([script], env=variables, capture_output=True).returncode not in (0, 75)
    assert len((tmp_path / "scontrol").read_text().split("\n")[:-1]) == 2


@pytest.mark.slow
def test_the_documented_loop_ends_when_the_run_is_finished(tmp_path, tiny_data):
    variables = stand_in(tmp_path, tiny_data, 1)
    text = snippet("until ", "").replace("runs/wan", str(tmp_path / "run"))
    run = tmp_path / "run"
    loop = subprocess.Popen(["bash", "-c", text], cwd=ROOT, env=variables)
    pids = []
    for _ in range(2):
        wait_for_steps(run, loop)
        pids.append(train_pid(run))
        os.kill(pids[-1], signal.SIGTERM)
        wait_until(lambda: not os.path.exists(f"/proc/{pids[-1]}"), loop)
    assert loop.wait(timeout=120) == 0 and saved(run)[-1] == 40 and pids[0] != pids[1]
    (tmp_path / "file").write_text("")  # an error ends it
    text = text.replace(str(run), str(tmp_path / "file"))
    failed = subprocess.run(["bash", "-c", text], cwd=ROOT, env=variables, capture_output=True, timeout=120)
    assert failed.returncode == 1


@pytest.mark.slow
def test_a_controller_that_counts_failures_starts_all_processes_again_until_they_end_with_0(
    tmp_path, tiny_data
):
    """As a JobSet's: complete when all pods end with 0, failed when one does not; then all start again."""
    run, statuses = tmp_path / "run", []
    for attempt in range(4):
        port, logs = free_port(), []
        pods = []
        for i in range(2):
            logs.append(tmp_path / f"log{attempt}.{i}")
            with open(logs[-1], "w") as log:
                pods.append(
                    start(
                        tmp_path, tiny_data, f"--distributed=localhost:{port},{i}/2", stdout=log, stderr=log
                    )
                )
        if attempt < 2:
            wait_for_steps(run, pods[0])
            number = (signal.SIGTERM, signal.SIGUSR1)[attempt]
            pods[attempt].send_signal(number)  # a preempted host; the others are told by it
            time.sleep(1.5)
            pods[attempt].send_signal(signal.SIGTERM)  # again, while it saves
        statuses.append([pod.wait(timeout=120) for pod in pods])
        said = logs[0].read_text()
        if statuses[-1] == [0, 0]:
            break
        assert statuses[-1] == [75, 75], said
        assert f"saved at step {saved(run)[-1]}: run the same command" in said and saved(run)[-1] < 40
    assert statuses == [[75, 75], [75, 75], [0, 0]], logs[0].read_text()
    assert [line["step"] for line in metrics.read_metrics(str(run)) if line["step"] % 5 == 0] == list(
        range(0, 41, 5)
    )
