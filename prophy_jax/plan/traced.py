"""What one device of a job runs and holds, counted from its traced program, without a compiler.

N video tokens, C model width.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from prophy_jax import build, models
from prophy_jax.models import attention
from prophy_jax.plan import collectives, flops, memory, programs
from prophy_jax.run import parallel


@dataclasses.dataclass(frozen=True)
class Traced:
    """The program of one device's clips, on a mesh of one device.

    Attributes:
        jaxpr: The program.
        tokens: N, of a clip.
        split: Shapes of the arrays that fsdp splits.
        flops: Executed, with what is recomputed.
        model_flops: Of one clip, see `prophy_jax.plan.flops`.
    """

    jaxpr: Any
    tokens: int
    split: frozenset
    flops: int
    model_flops: int

    def held(self, mesh: Mapping[str, int]) -> memory.LiveBytes:
        """What one device of `mesh` holds besides its arguments: see `prophy_jax.plan.memory`.

        Arrays of all tokens are split over context; gradients and updates like their parameters.
        """

        def size_of(aval: Any) -> float:
            size = memory.array_bytes(aval)
            if any(0 <= side - self.tokens <= self.tokens // 32 for side in aval.shape):  # kernels pad
                return size / mesh["context"]
            return size / mesh["fsdp"] if aval.shape in self.split and aval.dtype == jnp.float32 else size

        return memory.peak(self.jaxpr, size_of)


def trace(
    config: Any, mode: str, platform: str, clips: int, remat: str | None = None, model_flops: int = 0
) -> Traced:
    """Traces the program of one device of a platform, "gpu" or "tpu", that need not exist.

    Args:
        config: Of the run.
        mode: "train" or "sample".
        platform: Of the devices.
        clips: Of the device.
        remat: In place of `config.backbone.remat`.
        model_flops: Of a clip, which no remat policy changes; 0: they are counted.
    """
    mesh = build.build_mesh(dict.fromkeys(parallel.AXES, 1), devices=jax.devices("cpu")[:1])
    # cuDNN's kernels cannot be traced without a GPU. Those for TPUs read and save the same; but their
    # backward pass computes the scores once more, in the kernel for the queries.
    backend = attention.choose(config.attention, platform, models.build(config.backbone).dtype)
    weights = {"_dq_": 1 / 3} if backend == "cudnn" else {}
    kernel = functools.partial(attention.attention, backend="splash" if backend == "cudnn" else backend)
    model, steps = build.build_model(config), config.samples.steps
    executed = model.with_backbone(remat=remat or config.backbone.remat, attention=kernel)
    program, arguments = programs.PROGRAMS[mode](config, executed, mesh, clips)
    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(program)(*arguments)
    if not model_flops:
        program, _ = programs.PROGRAMS[mode](config, flops.plain(model), mesh, clips)
        with jax.set_mesh(mesh):
            model_flops = flops.model_flops(program, *arguments, unknown_length=steps) // clips
    large = {leaf.shape for leaf in jax.tree.leaves(arguments) if leaf.size >= parallel.MIN_SHARDED_SIZE}
    split = frozenset(large if mode == "train" else ())
    counted = flops.count(jaxpr, weights, unknown_length=steps)
    return Traced(jaxpr, build.sizes(config, model).tokens, split, counted, model_flops)


def guess_sent(
    params: Mapping[str, Any], width: int, mesh: Mapping[str, int], trained: int, clips: int, tokens: int
) -> list[collectives.Collective]:
    """Collectives that a step cannot do without, for a choice of meshes before anything is compiled.

    Gradients are summed over all devices, parameters that are split are gathered once each way, and each
    attention exchanges its four arrays in bfloat16 in both passes.

    Args:
        params: Of the backbone and its parts, abstract.
        width: C.
        mesh: Sizes of its axes.
        trained: Trained parameters; 0: the program samples.
        clips: Of a device.
        tokens: N.
    """
    devices, found = math.prod(mesh.values()), []
    spread = tuple(axis for axis in parallel.AXES if mesh[axis] > 1)
    if trained and devices > 1:
        everyone = tuple(range(devices))
        found.append(collectives.Collective("all-reduce", spread, everyone, 4 * trained, 1))
    if trained and mesh["fsdp"] > 1:
        stride = mesh["context"]
        group = tuple(range(0, stride * mesh["fsdp"], stride))
        found.append(collectives.Collective("all-gather", ("fsdp",), group, 4 * trained, 2))
    if mesh["context"] > 1:
        stacks = [part["blocks"] for part in params.values() if "blocks" in part]
        blocks = sum(jax.tree.leaves(stack)[0].shape[0] for stack in stacks)
        size = 2 * clips * tokens * width // mesh["context"]
        group = tuple(range(mesh["context"]))
        calls = (8 if trained else 4) * blocks
        found.append(collectives.Collective("all-to-all", ("context",), group, size, calls))
    return found
