"""The benchmarks' own arithmetic, and a whole GPU run at tiny sizes on this CPU."""

import collections
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from benchmarks import gpu, kernels, measure, skipping, train_step
from prophy_jax.plan import flops
from prophy_jax.run import storage
from tests.conftest import ROOT, xla_flags


def test_the_shapes_of_wan_have_its_tokens():
    tokens = {name: shape.tokens for name, shape in measure.SHAPES.items()}
    assert tokens == {"tiny": 256, "base": 2048, "wan17": 7800, "wan49": 20_280, "wan81": 32_760}


POLICIES = ("none", "products", "qkv", "attention", "self_attention", "full")


@pytest.fixture(scope="module")
def steps():
    """(FLOPs, operations) of a traced step of wan49 under every policy."""
    shape, found = measure.SHAPES["wan49"], []
    for remat in POLICIES:
        jaxpr = train_step.trace(shape, remat, "blockwise")
        found.append((flops.count(jaxpr), train_step.step_operations(jaxpr, shape)))
    return found


def listed(operations) -> int:
    return sum(count * kernels.op_flops(op, 1536) for op, count in operations.items())


@pytest.mark.slow
def test_the_operations_of_a_step_add_up_to_its_flops(steps):
    model_flops = flops.count(train_step.trace(measure.SHAPES["wan49"], "none", "xla"))
    # Left out: the embeddings, the head and the routers.
    assert listed(steps[0][1]) == pytest.approx(model_flops, rel=0.005)


def test_what_a_policy_recomputes(steps):
    n, d, f = 20_280, 1536, 8960

    def runs(*op) -> list[int]:
        return [operations[op] for _, operations in steps]

    def products(kind, *size) -> list[int]:
        return runs(*kernels.product(kind, *size, "bfloat16"))

    # 30 + 10 blocks run forward, 29 + 10 of them backward too.
    assert runs("attention", "forward", n, n) == [40, 40, 40, 40, 40, 40 + 39]
    assert runs("attention", "forward", n, 512) == [40, 40, 40, 40, 40 + 39, 40 + 39]
    assert products("forward", n, d, f) == [40, 40, 79, 79, 79, 79]
    assert products("forward", n, f, d) == [40, 40, *[40 + 10] * 4]  # for the trained gates
    # Six of each block, ten exits and eight experts.
    assert products("forward", n, d, d) == [258, 258, 258 + 2 * 39, *[258 + 6 * 39] * 3]
    # Backward, of 39 blocks, ten exits; 10 trained blocks have gradients of their weights too.
    assert products("input", n, d, d) == [6 * 39 + 10] * 6
    assert products("weight", n, d, d) == [6 * 10 + 10] * 6
    assert products("weight", n, d, f) == products("weight", n, f, d) == [10] * 6
    # Those of the eight experts are summed in fp32.
    for kind in ("input", "weight"):
        assert runs(*kernels.product(kind, n, d, d, "float32")) == [8] * 6
    assert runs("attention", "backward", n, n) == runs("attention", "backward", n, 512) == [39] * 6
    assert runs("pointwise") == [40 * 22 + 39 * 44, *[40 * 22 + 39 * 66] * 5]
    assert runs("optimizer") == [1] * 6


def test_what_a_policy_recomputes_is_what_its_program_computes_again(steps):
    counts = dict(zip(POLICIES, [(program, listed(ops)) for program, ops in steps], strict=True))
    assert counts["none"] == pytest.approx(counts["products"])
    for remat in ("qkv", "attention", "self_attention", "full"):
        program, ops = (now - before for now, before in zip(counts[remat], counts["products"], strict=True))
        assert program == pytest.approx(ops, rel=0.005)


def test_rates_are_summed_by_kind():
    rates = kernels.Rates.__new__(kernels.Rates)
    products = [kernels.product(kind, 1, 2, 3, "float32") for kind in ("forward", "weight")]
    rates._known = {products[0]: 0.5, products[1]: 2.0, ("pointwise",): 0.25}
    ops = collections.Counter({op: count for count, op in enumerate(rates._known, start=1)})
    assert rates.roof(ops) == {"product": 0.5 + 2 * 2.0, "pointwise": 3 * 0.25}


def test_idle_is_what_no_kernel_covers():
    # 0-10 and 5-20 overlap, 20-30 is idle, 30-40 holds 32-35.
    spans = [(30, 40), (0, 10), (5, 20), (32, 35)]
    assert train_step.idle_share(spans) == pytest.approx(10 / 40)


def test_kernels_are_those_of_the_first_gpu():
    def event(name, start, duration):
        return SimpleNamespace(name=name, start_ns=start, duration_ns=duration)

    streams = [
        SimpleNamespace(name="Stream #7(Compute)", events=[event("gemm", 1, 2)]),
        SimpleNamespace(name="XLA Ops", events=[event("the same again", 1, 2)]),
    ]
    planes = [SimpleNamespace(name=name, lines=streams) for name in ("/host:CPU", "/device:GPU:0")]
    assert train_step.device_events(SimpleNamespace(planes=planes)) == [("gemm", 1, 3)]
    assert train_step.device_events(SimpleNamespace(planes=planes[:1])) == []


@pytest.mark.parametrize(("steps", "share"), [(20, 1 / 2), (50, 1 / 4), (50, 1 / 3), (8, 1 / 2)])
def test_skipped_steps_are_spread_after_the_first_tenth(steps, share):
    skip = skipping.evenly(steps, share)
    assert len(skip) == len(set(skip)) == round(steps * share)
    assert max(2, steps // 10 + 1) <= min(skip) and max(skip) < steps


def test_goals_are_judged_and_what_is_missing_is_said():
    def part(**row):
        return {"result": {"rows": [row]}}

    results = {
        "train 49": part(mfu=0.45, roofline_efficiency=0.9),
        "sample 81": {
            "result": {"rows": [{"branch": False, "clip_s": 50.0}, {"branch": True, "clip_s": 80.0}]}
        },
        "peer 49": {
            "result": {
                "rows": [
                    {"work": "train", "contender": "jax", "min_s": 1.0},
                    {"work": "train", "contender": "torch", "min_s": 2.0},
                    {"work": "train", "contender": "torch cuDNN", "min_s": 1.2},
                    {"work": "forward", "contender": "torch", "min_s": 0.1},
                ]
            }
        },
    }
    verdicts = {line[:48].strip(): line[57:].split() for line in gpu.goals(results).splitlines()}
    assert verdicts["MFU, training, 49 frames"] == ["0.450", "met"]
    assert verdicts["MFU, training, 81 frames"] == ["-", "not", "measured"]
    assert verdicts["device idle, training, 49 frames"] == ["-", "not", "measured"]
    assert verdicts["kernel-roofline efficiency, 49 frames"] == ["0.900", "MISSED"]
    assert verdicts["sampling, 81 frames x 50 steps, s"] == ["50.000", "met"]
    assert verdicts["the same with the branch, s"] == ["80.000", "MISSED"]
    assert verdicts["training, times as fast as the best PyTorch"] == ["1.200", "MISSED"]
    assert verdicts["training, times as fast as PyTorch by default"] == ["2.000", "met"]
    assert set(verdicts) == set(gpu.GOALS)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("kernels --part=nothing", "no part nothing"),
        ("train_step --shapes=nothing", "no shape nothing"),
        ("train_step --shapes=tiny --remat=nothing", "unknown remat policy 'nothing'"),
        ("sample --shapes=tiny --skip=0", "samples.skip=(0,)"),
    ],
)
def test_bad_input_is_one_line(command, message):
    done = gpu.run_part(command, 60, {})
    *_, last = done["output"].splitlines()
    assert done["exit"] == 1 and last.startswith("error:") and message in last
    assert "Traceback" not in done["output"] and done["result"] == {"rows": []}


def test_the_parts_of_the_gpu_run_fit_into_ten_minutes_in_order():
    limits = [limit for limit, _, _ in gpu.PARTS.values()]
    names = list(gpu.PARTS)
    assert sum(limits[: names.index("train 81 qkv")]) < 700  # few reach their limit
    for _, command, _ in (gpu.PARTS | gpu.SMOKE).values():
        assert (ROOT / "benchmarks" / f"{command.split()[0]}.py").exists()


def test_a_part_that_hangs_is_ended():
    hung = gpu.run_part("kernels --shapes=wan81", 0.2, {})
    assert hung["exit"] < 0 and hung["seconds"] < 10


# What machines with GPUs lack, seen on the ones that this was written for.
ABSENT = "grain array_record ml_collections tensorboardX tensorflow_datasets diffusers ftfy pymunk"


@pytest.mark.slow  # every benchmark once
def test_a_whole_run_at_tiny_sizes_needs_no_more_than_a_gpu_machine_has(tmp_path):
    pathlib.Path(tmp_path, "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({ABSENT.split()}))\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "XLA_FLAGS": xla_flags(),
        "OUT": str(tmp_path / "out"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--smoke"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "gpu.json").read_text())
    without_torch = {"kernels", "train", "sample"}
    assert set(results) == (set(gpu.SMOKE) if find_spec("torch") else without_torch)
    step = gpu.row_of(results, "train", remat="self_attention")
    assert step["compiled_after_step_2"] == 0 and step["warm_s"] < step["cold_s"]
    assert 0 < step["loss"] < 100 and step["host_s"] < step["min_s"]
    assert step["planned_bytes"]["donated"] > 0.9 * 4 * 12 * 128**2  # the state is updated in place
    assert {row["branch"] for row in results["sample"]["result"]["rows"]} == {False, True}
    assert all(row.get("compiled_later", 0) == 0 for row in results["sample"]["result"]["rows"])
    assert "not measured" in done.stdout


def test_loading_is_timed_with_checksums_and_without():
    command = [sys.executable, "-m", "benchmarks.load", "--gb=0.1", "--rounds=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    times = dict(re.findall(r"^(compared|not compared) +median ([\d.]+) s, best \2 s$", done.stdout, re.M))
    (ratio,) = re.findall(
        r"^0.1 GB: with checksums compared, loading takes ([\d.]+) times", done.stdout, re.M
    )
    assert len(times) == 2 and float(ratio) > 0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_a_save_is_timed_from_one_process_and_from_several(place, processes, tmp_path, request):
    folder = tmp_path if place == "disk" else request.getfixturevalue("bucket")
    words = ["--gb=0.2", "--rounds=1", f"--processes={processes}", f"--dir={folder}"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.save", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = rf"^0.2 GB, {processes} processes: the state is taken in ([\d.]+) s, .* is whole in ([\d.]+) s"
    ((taken, whole),) = re.findall(found, done.stdout, re.M)
    assert 0 <= float(taken) <= float(whole) and not storage.list_files(folder)


def test_sizes_of_a_shape_are_those_that_wan_is_built_with():
    model, _ = measure.build(measure.SHAPES["tiny"], parts=False)
    own = dataclasses.asdict(model.backbone.config)
    assert measure.SHAPES["tiny"].sizes().items() <= own.items() and not model.parts
