"""Plans one job: traces and compiles its program, counts its memory, and bounds its time; see `plan`.

B global batch, N video tokens, L text length, D text width.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from prophy_jax import experiment, models, train
from prophy_jax.models import attention
from prophy_jax.plan import collectives, flops, hardware, memory
from prophy_jax.run import optim, parallel
from prophy_jax.run.errors import UserError

# What the allocator and the runtime keep for themselves.
USABLE = 0.95


@dataclasses.dataclass(frozen=True)
class Plan:
    """One job on one topology. Bytes and floating-point operations are those of one device and step."""

    topology: str
    devices: int
    mesh: dict[str, int]
    mode: str
    clips: int  # of the whole job in a step
    tokens: int
    attention: str
    remat: str
    trained: int  # parameters
    memory: dict[str, float]  # by kind
    compiled: float | None  # bytes that the compiler reports, all kinds together
    capacity: int
    model_flops: float
    executed_flops: float  # with what is recomputed
    peak: float  # floating-point operations/s
    collectives: list[dict[str, Any]]  # axes, kind, calls, bytes, sent, seconds
    floors: dict[str, float]  # seconds: compute, memory, links

    @property
    def bytes(self) -> float:
        return self.compiled or sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.bytes <= USABLE * self.capacity

    @property
    def limit(self) -> str:
        return max(self.floors, key=self.floors.get)

    @property
    def seconds(self) -> dict[str, float]:
        """Of a step: all communication hidden behind computation, and none."""
        work = max(self.floors["compute"], self.floors["memory"])
        return {"hidden": max(work, self.floors["links"]), "unhidden": work + self.floors["links"]}

    def share_of_peak(self, how: str) -> float:
        return self.model_flops / self.peak / self.seconds[how]

    @property
    def efficiency(self) -> float:
        """Of scaling, when no communication hides behind computation."""
        return 1 - self.floors["links"] / self.seconds["unhidden"]


# --- The program -----------------------------------------------------------------------------------


def get_devices(chip: hardware.Chip, topology: str, shape: Sequence[int]) -> list[Any]:
    """Compile-only TPU devices, or as many simulated CPU devices as there are GPUs. Raises UserError."""
    if chip.per_server:
        count = math.prod(shape)
        if len(jax.devices("cpu")) < count:
            raise UserError(
                f"{count} devices must be simulated: jax.config.update('jax_num_cpu_devices', {count})"
            )
        return jax.devices("cpu")[:count]
    from jax.experimental import topologies

    # Nothing on this machine is asked or locked: the compiler alone is used.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f'the TPU compiler is not installed: pip install "jax[tpu]=={jax.__version__}", without any TPU'
        )
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].partition(": ")[2]
        raise UserError(f"--topology={topology}: the TPU compiler refuses it: {reason}") from error


def batch_shapes(
    config: Any, run: experiment.Experiment, clips: int
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of a training batch, as `prophy_jax.data.loader` makes it."""
    latents = models.build(config.codec).latent_shape(
        config.data.frames, config.data.height, config.data.width
    )
    tokens = math.prod(experiment.token_grid(run, latents))
    length, width = config.text_encoder.length, run.model.backbone.config.text_dim
    categories = 17
    return {
        "latents": ((clips, *latents), jnp.float16),
        "text": ((clips, length, width), jnp.float16),
        "text_mask": ((clips, length), jnp.bool_),
        "category": ((clips, categories), jnp.float32),
        "alignment": ((clips, tokens, categories), jnp.float16),
        "alignment_present": ((clips, categories), jnp.float32),
    }


def train_program(run: experiment.Experiment) -> tuple[Any, tuple]:
    """The train step of `prophy_jax.train`, jitted as there, and its abstract arguments."""
    config, mesh = run.config, run.mesh
    trainable, frozen = optim.split(experiment.abstract_params(run), config.optimizer.groups)
    adam = {name: value for name, value in config.optimizer.items() if name != "ema"}
    optimizer = optim.make_optimizer(trainable, steps=config.steps, **adam)
    state = jax.eval_shape(functools.partial(train.new_state, optimizer=optimizer), trainable)
    layout = parallel.shard_largest(state, mesh)
    state = jax.tree.map(_placed, state, layout)
    rows, whole = NamedSharding(mesh, parallel.BATCH), parallel.replicated(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
        for name, (shape, dtype) in batch_shapes(config, run, config.batch_size).items()
    }
    empty = {
        name: jax.ShapeDtypeStruct(batch[name].shape[1:], dtype, sharding=whole)
        for name, dtype in (("text", jnp.float32), ("text_mask", jnp.bool_))
    }
    step = train.make_train_step(run.model, run.objective, optimizer, config)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(layout, whole))
    return jitted, (state, frozen, empty, batch)


def sample_program(run: experiment.Experiment) -> tuple[Any, tuple]:
    """The sampler of `prophy_jax.sample` for `config.batch_size` clips, all its steps, and its arguments."""
    from prophy_jax import sample

    config, mesh = run.config, run.mesh
    begin, loop = sample.make_sampler(run.model, config)

    def clip(params, noise, text, text_mask, negative):
        prompt, state = begin(params, noise, text, text_mask, negative, rows=None)
        return loop(params, state, prompt, jnp.float32(1.0), 0, config.samples.steps).x

    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        experiment.abstract_params(run),
    )
    shapes = batch_shapes(config, run, config.batch_size)
    rows, whole = parallel.batch_sharding(mesh, config.batch_size), parallel.replicated(mesh)
    latents, text, mask = (shapes[name][0] for name in ("latents", "text", "text_mask"))
    arguments = (
        params,
        jax.ShapeDtypeStruct(latents, jnp.float32, sharding=rows),
        jax.ShapeDtypeStruct(text, jnp.float32, sharding=rows),
        jax.ShapeDtypeStruct(mask, jnp.bool_, sharding=rows),
        {
            "text": jax.ShapeDtypeStruct(text[1:], jnp.float32, sharding=whole),
            "text_mask": jax.ShapeDtypeStruct(mask[1:], jnp.bool_, sharding=whole),
        },
    )
    return jax.jit(clip), arguments


def _placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


PROGRAMS = {"train": train_program, "sample": sample_program}


# --- Counting, without a compiler --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Traced:
    """The program of one device's clips, on a mesh of one device."""

    jaxpr: Any
    tokens: int
    split: frozenset  # shapes of what fsdp splits
    flops: int  # with what is recomputed
    model_flops: int  # of one clip

    def held(self, mesh: Mapping[str, int]) -> memory.LiveBytes:
        """What one device of `mesh` holds beside its arguments: see `prophy_jax.plan.memory`.

        Arrays of all tokens are split over context; gradients and updates lie as their parameters do.
        """

        def size_of(aval: Any) -> float:
            size = memory.array_bytes(aval)
            if any(0 <= side - self.tokens <= self.tokens // 32 for side in aval.shape):  # kernels pad
                return size / mesh["context"]
            return size / mesh["fsdp"] if aval.shape in self.split and aval.dtype == jnp.float32 else size

        return memory.peak(self.jaxpr, size_of)


def trace(config: Any, mode: str, platform: str, clips: int, model_flops: int = 0) -> Traced:
    """Traces the program for `clips` clips on one device of a platform that need not exist.

    `model_flops` of a clip are counted too unless they are given: they are equal for every remat policy.
    """
    local = config.copy_and_resolve_references()
    local.unlock()
    local.mesh, local.batch_size = dict.fromkeys(parallel.AXES, 1), clips
    # cuDNN's kernels cannot be traced without a GPU. Those for TPUs read and save the same; but their
    # backward pass computes the scores once more, in the kernel for the queries.
    backend = attention.choose(config.attention, platform, models.build(config.backbone).dtype)
    weights = {"_dq_": 1 / 3} if backend == "cudnn" else {}
    local.attention = "xla"
    run = experiment.build(local, jax.devices("cpu")[:1])
    kernel = functools.partial(attention.attention, backend="splash" if backend == "cudnn" else backend)
    backbone = dataclasses.replace(run.model.backbone, attention=kernel)
    executed = dataclasses.replace(run, model=dataclasses.replace(run.model, backbone=backbone))
    program, arguments = PROGRAMS[mode](executed)
    steps = config.samples.steps
    with jax.set_mesh(run.mesh):
        jaxpr = jax.make_jaxpr(program)(*arguments)
        if not model_flops:
            program, arguments = PROGRAMS[mode](dataclasses.replace(run, model=flops.plain(run.model)))
            model_flops = flops.model_flops(program, *arguments, unknown_length=steps) // clips
    large = {leaf.shape for leaf in jax.tree.leaves(arguments) if leaf.size >= parallel.MIN_SHARDED_SIZE}
    split = frozenset(large if mode == "train" else ())
    counted = flops.count(jaxpr, weights, unknown_length=steps)
    return Traced(jaxpr, _tokens(config, run), split, counted, model_flops)


def _tokens(config: Any, run: experiment.Experiment) -> int:
    latents = batch_shapes(config, run, 1)["latents"][0][1:]
    return math.prod(experiment.token_grid(run, latents))


def held_bytes(tree: Any) -> int:
    """Bytes of placed abstract arrays on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def argument_bytes(mode: str, arguments: tuple) -> dict[str, float]:
    """By kind, exact."""
    if mode == "sample":
        params, *rest = arguments
        return {"parameters": held_bytes(params), "inputs": held_bytes(rest)}
    state, frozen, *rest = arguments
    return {
        "parameters": held_bytes(state.params) + held_bytes(frozen),
        "optimizer and EMA": held_bytes((state.ema, state.optimizer)),
        "inputs": held_bytes(rest),
    }


# --- One plan --------------------------------------------------------------------------------------


def make_plan(
    config: Any, topology: str, mode: str = "train", compiled: bool = True, traced: Traced | None = None
) -> Plan:
    """Plans one job. Without `compiled`, from the traced program alone, and what is sent is a guess.

    Raises UserError on bad input.
    """
    chip, shape = hardware.parse(topology)
    devices = get_devices(chip, topology, shape)
    run = experiment.build(config, devices)
    mesh, platform = dict(run.mesh.shape), "gpu" if chip.per_server else "tpu"
    program, arguments = PROGRAMS[mode](run)
    clips = config.batch_size // (mesh["data"] * mesh["fsdp"])
    traced = traced or trace(config, mode, platform, clips)
    kinds, held = argument_bytes(mode, arguments), traced.held(mesh)
    kinds |= {"gradients": held.gradients} if mode == "train" else {}
    kinds |= {"activations": held.activations, "temporaries": held.temporaries}
    trained = sum(leaf.size for leaf in jax.tree.leaves(arguments[0].params)) if mode == "train" else 0

    total = None
    if compiled:
        total, sent = compile_for(run, chip, program, arguments)
    else:
        sent = guess_sent(run.model, mesh, trained, clips, traced.tokens)
    rows = []
    for (axes, kind), row in collectives.by_axis(sent).items():
        group = [one for one in sent if (one.axes, one.kind) == (axes, kind)]
        seconds = sum(one.sent / link_rate(chip, devices, run.mesh, one) for one in group)
        rows.append({"axes": list(axes), "kind": kind, **row, "seconds": seconds})
    executed = traced.flops / mesh["context"]
    # Everything is read once and, but for the parameters, written; the sampler reads all again in each step.
    traffic = 2 * sum(kinds.values()) - kinds["parameters"]
    traffic *= config.samples.steps if mode == "sample" else 1
    return Plan(
        topology=topology,
        devices=len(devices),
        mesh=mesh,
        mode=mode,
        clips=config.batch_size,
        tokens=traced.tokens,
        attention=attention.choose(config.attention, platform, run.model.backbone.dtype),
        remat=config.backbone.remat,
        trained=trained,
        memory=kinds,
        compiled=total,
        capacity=chip.memory,
        model_flops=config.batch_size * traced.model_flops / len(devices),
        executed_flops=executed,
        peak=chip.peak,
        collectives=rows,
        floors={
            "compute": executed / chip.peak,
            "memory": traffic / chip.bandwidth,
            "links": sum(row["seconds"] for row in rows),
        },
    )


def compile_for(run, chip: hardware.Chip, program: Any, arguments: tuple) -> tuple[float | None, list]:
    """(bytes of a device as the compiler reports them, or None; collectives).

    A CPU in a GPU's place computes and sends bfloat16 as float32, in other kernels: its bytes say nothing,
    and collectives are read from the program as it was partitioned, before it is made one for CPUs.
    """
    mesh = dict(run.mesh.shape)
    with jax.set_mesh(run.mesh):
        lowered = program.lower(*arguments)
    if chip.per_server:
        return None, collectives.count(_partitioned(lowered), mesh)
    try:
        with _no_compile_cache():
            executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # Arguments are among what it calls temporaries.
        used = re.search(r"Used ([\d.]+)([KMG]) of|HLO temporaries \(([\d.]+)([KMG])\)", str(error))
        if not used:
            raise
        size, unit = used[1] or used[3], used[2] or used[4]
        return float(size) * {"K": 2**10, "M": 2**20, "G": 2**30}[unit], []
    # The sum of arguments and temporaries is more than is ever held: programs with a larger one than the chip
    # has are compiled. The peak leaves out what lies unused between arrays, 2 % where it was looked up.
    sizes = executable.memory_analysis()
    return sizes.peak_memory_in_bytes, collectives.count(executable.as_text(), mesh)


def _partitioned(lowered: Any) -> str:
    """HLO text of a program as it was split over devices, before any optimization for their kind."""
    with tempfile.TemporaryDirectory() as folder, _no_compile_cache():
        dump = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        executable = lowered.compile(compiler_options=dump)
        found = list(pathlib.Path(folder).glob("*after_spmd-partitioning*"))
        return found[0].read_text() if found else executable.as_text()  # one device: there are no parts


@contextlib.contextmanager
def _no_compile_cache():
    """What comes from there writes no files, and what is compiled for absent chips cannot be read back."""
    from jax.experimental.compilation_cache import compilation_cache

    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def guess_sent(model: Any, mesh: Mapping[str, int], trained: int, clips: int, tokens: int) -> list:
    """Collectives that a step cannot do without, to screen meshes with before anything is compiled.

    Gradients are summed over all devices, parameters that are split are gathered once each way, and each
    attention exchanges its four arrays in bfloat16 in both passes.
    """
    devices, found = math.prod(mesh.values()), []
    spread = tuple(axis for axis in parallel.AXES if mesh[axis] > 1)
    if trained and devices > 1:
        everyone = tuple(range(devices))
        found.append(collectives.Collective("all-reduce", spread, devices, 4 * trained, 1, everyone))
    if trained and mesh["fsdp"] > 1:
        stride = mesh["context"]
        group = tuple(range(0, stride * mesh["fsdp"], stride))
        found.append(collectives.Collective("all-gather", ("fsdp",), mesh["fsdp"], 4 * trained, 2, group))
    if mesh["context"] > 1:
        blocks = model.backbone.config.num_layers + (len(model.branch.layers) if model.branch else 0)
        size = 2 * clips * tokens * model.backbone.config.dim // mesh["context"]
        group = tuple(range(mesh["context"]))
        calls = (8 if trained else 4) * blocks
        found.append(collectives.Collective("all-to-all", ("context",), len(group), size, calls, group))
    return found


def link_rate(chip: hardware.Chip, devices: Sequence[Any], mesh: Any, one: collectives.Collective) -> float:
    """Bytes/s that a device sends in this group: the links of a torus that lead to its members.

    GPUs of one server use all of their links; groups over several servers are as fast as the network.
    """
    members = [mesh.devices.flat[index] for index in one.devices]
    if chip.per_server:
        servers = {device.id // chip.per_server for device in members}
        return chip.link if len(servers) == 1 else chip.network
    sides = [len({device.coords[axis] for device in devices}) for axis in range(len(devices[0].coords))]
    used = [len({device.coords[axis] for device in members}) > 1 for axis in range(len(sides))]
    links = sum(side > 1 for side in sides)
    return chip.link * max(sum(used), 1) / max(links, 1)


# --- Search ----------------------------------------------------------------------------------------

REMATS = ("products", "qkv", "attention", "self_attention", "full")


def meshes(devices: int, heads: int) -> list[dict[str, int]]:
    """Meshes worth trying: context up to 8 where the heads divide, fsdp of 1 or 8."""
    found = []
    for context in (1, 2, 4, 8):
        if devices % context or heads % context:
            continue
        rest = devices // context
        for fsdp in sorted({1, math.gcd(8, rest)}):
            found.append({"data": rest // fsdp, "fsdp": fsdp, "context": context})
    return found


def search(config: Any, topology: str, mode: str) -> tuple[list[Plan], Plan]:
    """(all that were tried by count, the fastest first; the best, compiled).

    Raises UserError when nothing fits.
    """
    chip, shape = hardware.parse(topology)
    devices = len(get_devices(chip, topology, shape))
    heads = models.build(config.backbone).config.num_heads
    tried: list[tuple[Plan, Any]] = []
    model_flops = 0
    for remat in REMATS if mode == "train" else (config.backbone.remat,):
        for clips in (1, 2, 4):
            variant = config.copy_and_resolve_references()
            variant.unlock()
            variant.backbone.remat, variant.accumulation = remat, 1
            traced = trace(variant, mode, "gpu" if chip.per_server else "tpu", clips, model_flops)
            model_flops = traced.model_flops
            for mesh in meshes(devices, heads):
                one = variant.copy_and_resolve_references()
                one.mesh, one.batch_size = mesh, clips * mesh["data"] * mesh["fsdp"]
                tried.append((make_plan(one, topology, mode, compiled=False, traced=traced), one))
    tried.sort(key=lambda pair: (not pair[0].fits, pair[0].seconds["unhidden"] / pair[0].clips))
    for counted, one in tried[:5]:
        if counted.fits and (plan := make_plan(one, topology, mode)).fits:
            return [counted for counted, _ in tried], plan
    least = min((counted for counted, _ in tried), key=lambda counted: counted.bytes)
    raise UserError(
        f"nothing fits {topology}: the least is {gigabytes(least.bytes)} of {gigabytes(least.capacity)} with "
        f"{describe(least)}; take a larger chip, or shorter or smaller clips"
    )


# --- The command -----------------------------------------------------------------------------------


def gigabytes(size: float) -> str:
    """A number of bytes, as commands print it."""
    return f"{size / 1e9:.2f} GB"


def describe(plan: Plan) -> str:
    """Mesh, batch and policy of a plan, on one line."""
    mesh = ",".join(str(size) for size in plan.mesh.values())
    return f"mesh {mesh}, {plan.clips} clips a step, remat {plan.remat}"


def table(plan: Plan) -> str:
    """The figures of one plan as text."""
    chip, _ = hardware.parse(plan.topology)
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    rows = plan.memory | {"all, counted": sum(plan.memory.values())}
    if plan.compiled:
        rows["all, as the compiler reports it"] = plan.compiled
    lines = [
        f"{plan.mode} on {plan.topology}: {plan.devices} devices, mesh {mesh}",
        f"{plan.clips} clips of {plan.tokens} tokens a step, attention {plan.attention}, remat {plan.remat}",
        "",
        f"{'memory of a device':<36}{'GB':>10}{'of ' + gigabytes(plan.capacity):>16}",
        *(f"  {kind:<34}{size / 1e9:10.3f}{size / plan.capacity:16.1%}" for kind, size in rows.items()),
        "",
        f"FLOPs of a device: {plan.model_flops:.4g} of the model, {plan.executed_flops:.4g} executed",
        f"  rule: {flops.RULE}",
        "",
        f"{'sent by a device in a step':<36}{'calls':>10}{'array GB':>16}{'sent GB':>12}{'ms':>10}",
    ]
    for row in plan.collectives:
        name = f"{row['kind']} over {'+'.join(row['axes'])}"
        size, sent, seconds = row["bytes"] / 1e9, row["sent"] / 1e9, 1e3 * row["seconds"]
        lines.append(f"  {name:<34}{row['calls']:10d}{size:16.5f}{sent:12.5f}{seconds:10.3f}")
    rates = {
        "compute": f"{plan.peak / 1e12:.0f} TFLOP/s",
        "memory": f"{chip.bandwidth / 1e9:.0f} GB/s",
        "links": f"up to {chip.link / 1e9:.0f} GB/s",
    }
    lines += ["" if plan.collectives else "  nothing\n", "floors of a step"]
    lines += [f"  {name:<34}{1e3 * plan.floors[name]:10.3f} ms at {rate}" for name, rate in rates.items()]
    for how, seconds in plan.seconds.items():
        lines.append(
            f"  {'all, communication ' + how:<34}{1e3 * seconds:10.3f} ms, at most "
            f"{plan.share_of_peak(how):.1%} of peak"
        )
    lines.append(f"limited by {plan.limit}; scaling efficiency {plan.efficiency:.2%} with nothing hidden")
    return "\n".join(lines)


def does_not_fit(plan: Plan) -> str:
    """One line: what is too much, and what would help first."""
    kind = max(plan.memory, key=plan.memory.get)
    stronger = dict(itertools.pairwise(("none", *REMATS))).get(plan.remat)
    remat = [f"--config.backbone.remat={stronger}"] if stronger and plan.mode == "train" else []
    rows = plan.mesh["data"] * plan.mesh["fsdp"]
    if kind in ("activations", "temporaries"):
        smaller = f"--config.batch_size={rows}" if plan.clips > rows else "a larger context in --mesh"
        remedy = [*remat, smaller]
    else:
        remedy = ["a larger fsdp in --mesh", *remat] if plan.mode == "train" else ["a chip with more memory"]
    return (
        f"{describe(plan)} needs {gigabytes(plan.bytes)} of the {gigabytes(USABLE * plan.capacity)} that "
        f"{plan.topology.partition(':')[0]} has for it, most of it {kind} ({gigabytes(plan.memory[kind])} "
        f"counted): try {' or '.join(remedy)}"
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """All that a plan says, as JSON types."""
    own = dataclasses.asdict(plan)
    own |= {"bytes": plan.bytes, "fits": plan.fits, "limit": plan.limit, "seconds": plan.seconds}
    share = {how: plan.share_of_peak(how) for how in plan.seconds}
    return own | {"share_of_peak": share, "efficiency": plan.efficiency, "flop_rule": flops.RULE}


def read_mesh(text: str) -> dict[str, int]:
    """Reads "16,1,4" as sizes of data, fsdp and context. Raises UserError."""
    try:
        return dict(zip(parallel.AXES, (int(size) for size in text.split(",")), strict=True))
    except ValueError as error:
        axes = ",".join(parallel.AXES)
        raise UserError(f"--mesh={text}: three numbers, {axes}, such as 16,1,4; one may be -1") from error
