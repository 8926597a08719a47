"""The training step of ProPhy: time, share of peak, share of what the kernels allow, memory, compile time.

    python -m benchmarks.train_step [--shapes=tiny,base] [--remat=products,self_attention,full] [--json=FILE]

The real step (`train.make_train_step`: all losses, AdamW, average of parameters, donated state) on random
weights without a zero; the backbone is frozen. For every shape and rematerialisation policy:

    step      smallest and median time of a step, in rounds of steps that follow each other without waiting;
              the policies take turns
    MFU       model FLOPs over the published peak, where there is one, by the rule that is printed
    roofline  time of the step's operations at the rate that each reaches alone in this run, over the step's
              time; see benchmarks/kernels.py for what is counted
    memory    the device's peak (of the whole process: run one policy at a time to tell them apart), and what
              the compiler planned
    compile   tracing and compiling with an empty cache and with a filled one; programs compiled after step 2
    host      time in which the host hands a step over: below the step's time, the device never waits for it
    idle      share of the time from the first kernel to the last in which none runs, by the profiler (GPUs)

N tokens, L text rows, C model width.
"""

import argparse
import collections
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from benchmarks import kernels, measure
from prophy_jax.plan import flops
from prophy_jax.run.errors import one_line_errors
from prophy_jax.testing.counting import count_compiles

# Of one H100, with ten physical blocks: computed from published or assumed rates, and the goals.
EXPECTED = {
    ("wan49", "products"): "0.99 s at the kernels' roof, MFU 47 %; goal 44 %",
    ("wan49", "full"): "1.28 s at the kernels' roof, MFU 36 %",
    ("wan81", "self_attention"): "2.36 s at the kernels' roof, MFU 45 %; goal 42 %, memory 28 GB",
    ("wan81", "full"): "2.88 s at the kernels' roof, MFU 37 %",
}


def make_step(model: Any, objective: Any, trainable: Any) -> tuple[Callable, Any]:
    """(the step of `prophy_jax.train`, its optimizer)."""
    from prophy_jax import losses, train
    from prophy_jax.run import optim

    settings = measure.TRAIN
    optimizer = optim.make_optimizer(trainable, settings.steps, settings.optimizer)
    chosen = losses.choose(settings.losses, settings.reduction, model)
    return train.make_train_step(model, objective, chosen, optimizer, settings), optimizer


def trace(shape: measure.Shape, remat: str, backend: str) -> Any:
    """The jaxpr of a step of one clip on one device, with this attention."""
    import jax

    from prophy_jax import train
    from prophy_jax.run import optim

    model, objective = measure.build(shape, remat, backend=backend)
    params = jax.eval_shape(lambda: measure.random_params(model, shape))
    trainable, frozen = optim.split(params, measure.TRAIN.optimizer.groups)
    step, optimizer = make_step(model, objective, trainable)
    state = jax.eval_shape(functools.partial(train.new_state, optimizer=optimizer), trainable)
    drawn = jax.eval_shape(functools.partial(measure.draw_batch, shape, 1))
    batch, empty = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), drawn)  # of no weak type
    return jax.make_jaxpr(step)(state, frozen, empty, batch)


def step_operations(jaxpr: Any, shape: measure.Shape) -> collections.Counter:
    """Operation -> how often a traced step with "blockwise" attention runs it: see `kernels.operations`."""
    return kernels.operations(jaxpr, shape.tokens, shape.ffn) + collections.Counter({("optimizer",): 1})


class Run:
    """A compiled step with its state, ready to take further steps."""

    def __init__(self, shape: measure.Shape, remat: str, cache: str):
        import jax

        from prophy_jax import train
        from prophy_jax.run import optim

        self.model, objective = measure.build(shape, remat)
        params = measure.random_params(self.model, shape)
        trainable, self._frozen = optim.split(params, measure.TRAIN.optimizer.groups)
        step, optimizer = make_step(self.model, objective, trainable)
        self.operations = step_operations(trace(shape, remat, "blockwise"), shape)
        self.trained = sum(leaf.size for leaf in jax.tree.leaves(trainable))
        self._state = train.place_state(trainable, optimizer, measure.all_devices())
        del params, trainable
        self._batch, self._empty = measure.random_batch(shape)
        self._step = jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, self._state), None),
        )
        arguments = self._state, self._frozen, self._empty, self._batch
        compiled, self.compile = measure.compile_seconds(lambda: self._step.lower(*arguments), cache)
        self.memory = measure.memory_of(compiled)

    def __call__(self, steps: int) -> float:
        """Takes steps; returns the seconds that the host took to hand them over."""
        import jax

        start = time.perf_counter()
        for _ in range(steps):
            self._state, self._metrics = self._step(self._state, self._frozen, self._empty, self._batch)
        handed_over = time.perf_counter() - start
        jax.block_until_ready(self._state)
        return handed_over

    def loss(self) -> float:
        return float(self._metrics["loss/total"])


def measure_shape(
    name: str, policies: Iterable[str], rounds: int, peak: float | None
) -> Iterator[dict[str, Any]]:
    import jax

    shape = measure.SHAPES[name]
    with tempfile.TemporaryDirectory() as cache:
        runs = {remat: Run(shape, remat, f"{cache}/{remat}") for remat in policies}
        compiled_later = {}
        for remat, run in runs.items():
            run(2)
            with count_compiles() as compiled:
                run(1)
            compiled_later[remat] = len(compiled)
    start = time.perf_counter()
    next(iter(runs.values()))(1)
    steps = max(1, min(10, round(2 / (time.perf_counter() - start))))  # about two seconds a round
    host: dict[str, list[float]] = {remat: [] for remat in runs}
    works = {remat: lambda remat=remat: host[remat].append(runs[remat](steps)) for remat in runs}
    seconds = measure.alternate(works, rounds)
    first = next(iter(runs.values()))
    step_flops = jax.device_count() * flops.count(trace(shape, "none", "xla"))
    rates = kernels.Rates(first.model, shape, first.trained)
    for remat, run in runs.items():
        times = measure.best_and_median([s / steps for s in seconds[remat]])
        roof = rates.roof(run.operations)
        row = {
            "shape": name,
            "tokens": shape.tokens,
            "remat": remat,
            **times,
            "loss": run.loss(),
            "model_tflop": step_flops / 1e12,
            "tflops_per_s": step_flops / times["min_s"] / 1e12,
            "mfu": step_flops / times["min_s"] / peak if peak else None,
            "roof_s": sum(roof.values()),
            "roofline_efficiency": sum(roof.values()) / times["min_s"],
            "roof": roof,
            "planned_bytes": run.memory,
            "peak_bytes": measure.peak_memory(),
            **run.compile,
            "compiled_after_step_2": compiled_later[remat],
            "host_s": min(host[remat]) / steps,
            "expected": EXPECTED.get((name, remat)) if jax.default_backend() == "gpu" else None,
        }
        if jax.default_backend() == "gpu":
            row |= profile(lambda run=run: run(3))
        print(line(row), flush=True)
        yield row


def line(row: dict[str, Any]) -> str:
    share = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
    idle = f"{row['idle']:.2%}" if "idle" in row else "not measured here"
    roof = ", ".join(f"{kind} {seconds:.3g}" for kind, seconds in row["roof"].items())
    spent = ", ".join(f"{kind} {seconds:.3g}" for kind, seconds in row.get("spent_s", {}).items())
    return (
        f"{row['shape']:6} {row['remat']:10} step {row['min_s']:.4g} s (median {row['median_s']:.4g})   "
        f"{row['tflops_per_s']:.4g} TFLOP/s, MFU {share}   roofline {row['roofline_efficiency']:.2f} of "
        f"{row['roof_s']:.4g} s   peak {row['peak_bytes'] / 1e9:.2f} GB, planned "
        f"{row['planned_bytes']['planned'] / 1e9:.2f} GB\n"
        f"       compile {row['cold_s']:.1f} s, cached {row['warm_s']:.1f} s, after step 2: "
        f"{row['compiled_after_step_2']}   host {row['host_s'] * 1e3:.2f} ms   idle {idle}   roof: {roof}"
        + (f"\n       spent: {spent}" if spent else "")
        + (f"\n       expected: {row['expected']}" if row["expected"] else "")
    )


# --- The profile --------------------------------------------------------------------------------------

KINDS = {
    "attention": ("fmha", "sdpa", "flash", "attention"),
    "products": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "matmul"),
    "copies": ("memcpy", "memset", "copy", "transpose"),
}


def profile(run: Callable[[], Any]) -> dict[str, Any]:
    """{"idle", "spent_s"}: share of time without a kernel, and seconds of the run by kind of kernel."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        path = next(pathlib.Path(folder).rglob("*.xplane.pb"))
        events = device_events(jax.profiler.ProfileData.from_file(str(path)))
    if not events:
        return {}
    spent: dict[str, float] = {}
    for name, start, end in events:
        kind = next((kind for kind, words in KINDS.items() if any(w in name.lower() for w in words)), "other")
        spent[kind] = spent.get(kind, 0) + (end - start) / 1e9
    return {"idle": idle_share([(start, end) for _, start, end in events]), "spent_s": spent}


def device_events(data: Any) -> list[tuple[str, float, float]]:
    """(name, start, end) in nanoseconds of what ran on the first GPU's streams."""
    plane = next((plane for plane in data.planes if plane.name.startswith("/device:GPU:0")), None)
    return [
        (event.name, event.start_ns, event.start_ns + event.duration_ns)
        for line in (plane.lines if plane else ())
        if line.name.startswith("Stream")
        for event in line.events
    ]


def idle_share(spans: list[tuple[float, float]]) -> float:
    """Share of the time from the first start to the last end that no span covers."""
    busy, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - min(start for start, _ in spans))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, **measure.ARGUMENTS)
    measure.shapes_argument(parser)
    parser.add_argument(
        "--remat", default="products,self_attention,full", help="policies, with commas between"
    )
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()

    import jax

    about, rows = measure.head("training step, one clip a device"), []
    with jax.set_mesh(measure.all_devices()):
        for name in measure.chosen_shapes(options.shapes):
            for row in measure_shape(name, options.remat.split(","), options.rounds, about["peak_flops"]):
                rows.append(row)
                measure.write(options.json, about, rows)


if __name__ == "__main__":
    with one_line_errors():
        main()
