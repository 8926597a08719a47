"""Tries meshes, clips a device and remat policies, and names the fastest that fits."""

import math
from typing import Any

from prophy_jax import models
from prophy_jax.plan import hardware, table
from prophy_jax.plan.planner import REMATS, Job, Plan, make_plan
from prophy_jax.plan.traced import trace
from prophy_jax.run.errors import UserError


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
    """Plans many jobs from traced programs alone, then compiles the best.

    Returns:
        All that were tried, the fastest for a clip first; and the best that fits, compiled.

    Raises:
        UserError: when nothing fits.
    """
    chip, shape = hardware.parse(topology)
    devices = len(hardware.get_devices(chip, topology, shape))
    heads = models.build(config.backbone).config.num_heads
    tried: list[tuple[Plan, Job]] = []
    model_flops = 0
    for remat in REMATS if mode == "train" else (config.backbone.remat,):
        for clips in (1, 2, 4):
            clips *= config.accumulation if mode == "train" else 1
            traced = trace(config, mode, chip.platform, clips, remat, model_flops)
            model_flops = traced.model_flops
            for mesh in meshes(devices, heads):
                job = Job(config, mode, mesh, clips * mesh["data"] * mesh["fsdp"], remat)
                tried.append((make_plan(job, topology, compiled=False, traced=traced), job))
    tried.sort(key=lambda pair: (not pair[0].fits, pair[0].seconds["unhidden"] / pair[0].clips))
    for counted, job in tried[:5]:
        if counted.fits and (plan := make_plan(job, topology)).fits:
            return [counted for counted, _ in tried], plan
    least = min((counted for counted, _ in tried), key=lambda counted: counted.bytes)
    raise UserError(
        f"nothing fits {topology}: the least is {table.gigabytes(least.bytes)} of "
        f"{table.gigabytes(least.capacity)} with {table.describe(least)}; take a larger chip, or shorter or "
        "smaller clips"
    )
