"""Plans one job: counts its memory and operations, compiles its program, and bounds its time from below."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from prophy_jax import build
from prophy_jax.models import attention
from prophy_jax.plan import collectives, compiler, hardware, programs
from prophy_jax.plan.traced import Traced, guess_sent, trace
from prophy_jax.run import optim

# What the allocator and the runtime keep for themselves.
USABLE = 0.95
# Remat policies, from the one that keeps most.
REMATS = ("products", "qkv", "attention", "self_attention", "full")


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be planned.

    Attributes:
        config: Of the run.
        mode: "train" or "sample".
        mesh: Sizes of data, fsdp and context; one may be -1.
        clips: Of all devices in a step.
        remat: The policy of the backbone.
    """

    config: Any
    mode: str
    mesh: Mapping[str, int]
    clips: int
    remat: str

    @classmethod
    def of(cls, config: Any, mode: str = "train", mesh: Mapping[str, int] | None = None) -> "Job":
        """The job that a configuration describes, on another mesh if one is given.

        Raises UserError on a batch that does not divide into microbatches.
        """
        if mode == "train":
            build.microbatch(config)
        return cls(config, mode, mesh or config.mesh, config.batch_size, config.backbone.remat)

    @property
    def rows(self) -> int:
        """Clips that go through the model at a time."""
        return self.clips // (self.config.accumulation if self.mode == "train" else 1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One job on one topology. Bytes and floating-point operations are those of one device and step."""

    topology: str
    devices: int
    mesh: dict[str, int]
    mode: str
    clips: int  # of the whole job in a step
    at_a_time: int  # of them, those that go through the model together
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


def make_plan(job: Job, topology: str, compiled: bool = True, traced: Traced | None = None) -> Plan:
    """Plans one job.

    Args:
        job: What is planned.
        topology: Chips and how they are linked, see `hardware.parse`.
        compiled: Otherwise memory is counted from the traced program alone, and what is sent is a guess.
        traced: The traced program of one device's clips, where it is known.

    Raises:
        UserError: on bad input.
    """
    config, mode = job.config, job.mode
    chip, shape = hardware.parse(topology)
    devices = hardware.get_devices(chip, topology, shape)
    mesh = build.build_mesh(job.mesh, job.rows, devices)
    sides = dict(mesh.shape)
    model = build.build_model(config, mesh).with_backbone(remat=job.remat)
    program, arguments = programs.PROGRAMS[mode](config, model, mesh, job.clips)
    clips = job.clips // (sides["data"] * sides["fsdp"])  # of a device
    traced = traced or trace(config, mode, chip.platform, clips, job.remat)
    kinds, held = programs.argument_bytes(mode, arguments), traced.held(sides)
    kinds |= {"gradients": held.gradients} if mode == "train" else {}
    kinds |= {"activations": held.activations, "temporaries": held.temporaries}
    trained = sum(leaf.size for leaf in jax.tree.leaves(arguments[0].params)) if mode == "train" else 0

    total = None
    if compiled:
        total, sent = compiler.compile_program(program, arguments, mesh, simulated=chip.per_server > 0)
    else:
        params = optim.merge(arguments[0].params, arguments[1]) if mode == "train" else arguments[0]
        sent = guess_sent(params, model.backbone.config.dim, sides, trained, clips, traced.tokens)

    def rate(one: collectives.Collective) -> float:
        return hardware.link_rate(chip, devices, [mesh.devices.flat[index] for index in one.devices])

    rows = collectives.by_axis(sent, rate)
    executed = traced.flops / sides["context"]
    # Everything is read once and, but for the parameters, written; the sampler reads all again in each step.
    traffic = 2 * sum(kinds.values()) - kinds["parameters"]
    traffic *= config.samples.steps if mode == "sample" else 1
    return Plan(
        topology=topology,
        devices=len(devices),
        mesh=sides,
        mode=mode,
        clips=job.clips,
        at_a_time=job.rows,
        tokens=traced.tokens,
        attention=attention.choose(config.attention, chip.platform, model.backbone.dtype),
        remat=job.remat,
        trained=trained,
        memory=kinds,
        compiled=total,
        capacity=chip.memory,
        model_flops=job.clips * traced.model_flops / len(devices),
        executed_flops=executed,
        peak=chip.peak,
        collectives=rows,
        floors={
            "compute": executed / chip.peak,
            "memory": traffic / chip.bandwidth,
            "links": sum(row["seconds"] for row in rows),
        },
    )
