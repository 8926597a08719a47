"""What the benchmarks share: shapes, random models, clocks, memory, and how results are printed and kept.

Needs no more than jax, flax, optax and numpy, and jax itself only where it is used.

B batch, T h w latent grid, N video tokens, L text length.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

ARGUMENTS = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a backbone, its branch and one clip."""

    dim: int
    heads: int
    layers: int
    ffn: int
    text: int  # rows of text
    text_dim: int
    latents: tuple[int, int, int]  # (T, h, w)
    branch: tuple[int, ...]  # blocks copied
    steps: int = 8  # of the sampling loop
    half: bool = False  # bf16 instead of fp32

    def sizes(self) -> dict[str, int]:
        return dict(
            dim=self.dim,
            num_heads=self.heads,
            num_layers=self.layers,
            ffn_dim=self.ffn,
            text_len=self.text,
            text_dim=self.text_dim,
        )

    @property
    def tokens(self) -> int:
        return math.prod(self.latents) // 4

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.half else "float32"


def wan(frames: int) -> Shape:
    """Wan2.1-1.3B at 480x832 with the ten blocks of configs/wan.py."""
    latents = ((frames - 1) // 4 + 1, 60, 104)
    return Shape(1536, 12, 30, 8960, 512, 4096, latents, tuple(range(0, 30, 3)), steps=50, half=True)


SHAPES = {
    "tiny": Shape(128, 4, 4, 512, 64, 64, (4, 16, 16), (0, 2)),  # 256 tokens
    "base": Shape(384, 6, 6, 2240, 512, 4096, (8, 32, 32), (0, 2, 4)),  # 2,048 tokens
    **{f"wan{frames}": wan(frames) for frames in (17, 49, 81)},  # 7,800, 20,280 and 32,760 tokens
}


# --- Command line and results ------------------------------------------------------------------------


def shapes_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes",
        help=f"of {', '.join(SHAPES)}, with commas between; default: tiny,base on a CPU, else wan*",
    )
    parser.add_argument("--json", type=pathlib.Path, help="write the results there too")


def chosen_shapes(names: str | None) -> list[str]:
    """Ends the program with one line when a name is not in SHAPES."""
    import jax

    cpu = ["tiny", "base"]
    default = cpu if jax.default_backend() == "cpu" else [name for name in SHAPES if name not in cpu]
    chosen = names.split(",") if names else default
    if unknown := set(chosen) - set(SHAPES):
        raise SystemExit(f"error: no shape {', '.join(sorted(unknown))}: choose of {', '.join(SHAPES)}")
    return chosen


def describe() -> dict[str, Any]:
    """The device, the versions and the load that results depend on."""
    import flax
    import jax

    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
    }


def peak_flops() -> float | None:
    """Published peak of all devices together in bfloat16, or None where it is not known."""
    import jax

    from prophy_jax.plan import hardware

    kind = jax.devices()[0].device_kind.lower()
    chip = next((chip for name, chip in hardware.CHIPS.items() if name in kind), None)
    return chip.peak * jax.device_count() if chip else None


def head(title: str) -> dict[str, Any]:
    """Prints what was measured on what; returns it for `write`."""
    from prophy_jax.plan import flops

    about = describe()
    print(
        f"{title}\n{', '.join(f'{key} {value}' for key, value in about.items())}\nFLOPs: {flops.RULE}",
        flush=True,
    )
    peak = peak_flops()
    print(
        f"peak: {peak / 1e12:.0f} TFLOP/s in bfloat16, published" if peak else "peak: none published",
        flush=True,
    )
    return {"title": title, "about": about, "peak_flops": peak}


def write(path: pathlib.Path | None, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**about, "rows": rows}, indent=1))


# --- Clocks -------------------------------------------------------------------------------------------


def alternate(works: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call: the works in turns, forwards and backwards, so that all meet the same clock."""
    import jax

    seconds: dict[str, list[float]] = {name: [] for name in works}
    for index in range(rounds):
        for name in list(works) if index % 2 == 0 else reversed(works):
            start = time.perf_counter()
            jax.block_until_ready(works[name]())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def best_and_median(seconds: Sequence[float]) -> dict[str, float]:
    return {"min_s": min(seconds), "median_s": statistics.median(seconds)}


def kernel_seconds(function: Callable, *args: Any, repeats: int = 3, at_least: float = 0.05) -> float:
    """The smallest time of one call among calls that follow each other without waiting."""
    import jax

    jax.block_until_ready(function(*args))
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    calls = max(1, round(at_least / (time.perf_counter() - start)))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            result = function(*args)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls)
    return min(times)


def compile_seconds(lower: Callable[[], Any], cache: str) -> tuple[Any, dict[str, float]]:
    """Traces and compiles with the empty folder `cache` as compile cache, then once more with what it holds.

    Returns the compiled program and {"cold_s", "warm_s"}.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    settings = {
        "jax_compilation_cache_dir": cache,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    seconds = {}
    try:
        compilation_cache.reset_cache()
        for name, value in settings.items():
            jax.config.update(name, value)
        for name in ("cold_s", "warm_s"):
            jax.clear_caches()
            start = time.perf_counter()
            compiled = lower().compile()
            seconds[name] = time.perf_counter() - start
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    return compiled, seconds


# --- Memory -------------------------------------------------------------------------------------------


def memory_of(compiled: Any) -> dict[str, int]:
    """What the compiler planned, in bytes a device."""
    plan = compiled.memory_analysis()
    return {
        "arguments": plan.argument_size_in_bytes,
        "temporaries": plan.temp_size_in_bytes,
        "donated": plan.alias_size_in_bytes,
        "planned": plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        - plan.alias_size_in_bytes
        + plan.temp_size_in_bytes,
    }


def peak_memory() -> int:
    """Largest number of bytes in use so far: of the device, or of this process where a device counts none."""
    import jax

    statistics_ = jax.devices()[0].memory_stats() or {}
    return statistics_.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- Models -------------------------------------------------------------------------------------------


def all_devices() -> Any:
    """The mesh of a benchmark: one clip or pair of rows a device."""
    import jax

    from prophy_jax.run import parallel

    return parallel.make_mesh({"data": -1, "fsdp": 1, "context": 1}, 0, jax.devices())


def build(shape: Shape, remat: str = "none", parts: bool = True, backend: str = "") -> tuple[Any, Any]:
    """(model, objective) of a shape, with the attention that `prophy_jax.build` would choose.

    With a `backend` of `prophy_jax.models.attention`, the model is one to be traced for a single device.
    Without `parts` it is the backbone alone.
    """
    import functools

    import jax

    from prophy_jax.diffusion import flow
    from prophy_jax.models import attention
    from prophy_jax.models import wan as wan_model
    from prophy_jax.models.beside import prophy
    from prophy_jax.models.beside.part import Model
    from prophy_jax.run import parallel

    backbone = wan_model.build(**shape.sizes(), dtype=shape.dtype, remat=remat)
    chosen = backend or attention.choose("auto", jax.default_backend(), backbone.dtype)
    attend = functools.partial(attention.attention, backend=chosen)
    if not backend:
        attend = parallel.over_mesh(attend, all_devices())
    backbone = dataclasses.replace(backbone, attention=attend)
    semantic, refinement = prophy.SemanticConfig(shape.latents), prophy.RefinementConfig()
    branch = prophy.ProPhy(shape.branch, semantic, refinement)
    return Model(backbone, {"branch": branch} if parts else {}), flow.build(distribution="logit_normal")


def random_params(model: Any, shape: Shape) -> dict[str, Any]:
    """Parameters around 0 (gains around 1), none of them 0, so that every layer counts; whole on each device.

    The backbone is in `shape.dtype`, the parts in fp32. All leaves are windows of one long draw, since a
    draw for each would take a minute to compile.
    """
    import jax
    import jax.numpy as jnp

    from prophy_jax.run import parallel

    def init(key):
        params = {"backbone": model.backbone.init(key, jnp.dtype(shape.dtype))}
        for name in model.parts:
            params[name] = model.init_part(name, key, params)
        return params

    layout, tree = jax.tree.flatten_with_path(jax.eval_shape(init, jax.random.key(0)))
    between = 10_007  # windows start so far apart, at no multiple of a width

    def draw(key):
        longest = max(leaf.size for _, leaf in layout) + between * len(layout)
        noise = jax.random.uniform(key, (longest,), minval=-0.035, maxval=0.035)
        leaves = []
        for index, (path, leaf) in enumerate(layout):
            window = noise[between * index :][: leaf.size].reshape(leaf.shape)
            gain = path[-1].key == "scale"
            leaves.append((window + gain).astype(leaf.dtype))
        return jax.tree.unflatten(tree, leaves)

    return jax.jit(draw, out_shardings=parallel.replicated(all_devices()))(jax.random.key(0))


# What the train step reads of a configuration: the values of configs/wan.py, one microbatch.
TRAIN = SimpleNamespace(
    seed=0,
    steps=1000,
    caption_dropout=0.1,
    accumulation=1,
    losses={"relative": 0.1, "alignment": 0.02, "balance": 0.01},
    reduction={"relative": "sum", "alignment": "mean"},
    optimizer=SimpleNamespace(
        groups=(("branch/blocks/", 2e-5), ("branch/", 1e-4), ("backbone/", None)),
        **dict(warmup=10, decay="constant", clip=1.0, b1=0.9, b2=0.99, eps=1e-8, weight_decay=1e-4),
        ema=0.999,
    ),
)


def draw_batch(shape: Shape, size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(batch of `size` clips, empty text) for `train.make_train_step`; 60 % of the text is valid."""
    import jax
    import jax.numpy as jnp

    from prophy_jax.data.taxonomy import PHENOMENA

    keys = jax.random.split(jax.random.key(1), 3)
    mask = jnp.arange(shape.text) < shape.text * 6 // 10  # (L,)
    batch = {
        "latents": jax.random.normal(keys[0], (size, *shape.latents, 16)),
        "text": jax.random.normal(keys[1], (size, shape.text, shape.text_dim)) * mask[:, None],
        "text_mask": jnp.broadcast_to(mask, (size, shape.text)),
        "category": jnp.broadcast_to(jnp.arange(len(PHENOMENA)) % 5 == 0, (size, len(PHENOMENA))) * 1.0,
        "alignment": jax.random.uniform(keys[2], (size, shape.tokens, len(PHENOMENA))),
        "alignment_present": jnp.ones((size, len(PHENOMENA))),
    }
    return batch, {"text": jnp.zeros((shape.text, shape.text_dim)), "text_mask": jnp.arange(shape.text) < 1}


def random_batch(shape: Shape) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `draw_batch`, a clip a device."""
    import jax

    from prophy_jax.run import parallel

    mesh = all_devices()
    batch, empty = draw_batch(shape, mesh.size)
    return parallel.put_batch(batch, mesh), jax.device_put(empty, parallel.replicated(mesh))
