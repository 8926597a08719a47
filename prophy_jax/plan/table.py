"""A plan in words: the printed table, one line of it, and the figures for a program to read."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from prophy_jax.plan import flops, hardware
from prophy_jax.plan.planner import REMATS, USABLE, Plan
from prophy_jax.run import parallel
from prophy_jax.run.errors import UserError, counted


def gigabytes(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:.2f} GB"


def describe(plan: Plan) -> str:
    """The settings that a search chooses."""
    mesh = ",".join(str(size) for size in plan.mesh.values())
    return f"mesh {mesh}, {counted(plan.clips, 'clip')} a step, remat {plan.remat}"


def table(plan: Plan) -> str:
    """The figures of one plan as text."""
    chip, _ = hardware.parse(plan.topology)
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    rows = plan.memory | {"all, counted": sum(plan.memory.values())}
    if plan.compiled:
        rows["all, as the compiler reports it"] = plan.compiled
    unit = "step" if plan.mode == "train" else "run"
    lines = [
        f"{plan.mode} on {plan.topology}: {counted(plan.devices, 'device')}, mesh {mesh}",
        f"{counted(plan.clips, 'clip')} of {plan.tokens} tokens a {unit}, attention {plan.attention}, "
        f"remat {plan.remat}",
        "",
        f"{'memory of a device':<36}{'GB':>10}{'of ' + gigabytes(plan.capacity):>16}",
        *(f"  {kind:<34}{size / 1e9:10.3f}{size / plan.capacity:16.1%}" for kind, size in rows.items()),
        "",
        f"FLOPs of a device: {plan.model_flops:.4g} of the model, {plan.executed_flops:.4g} executed",
        f"  rule: {flops.RULE}",
        "",
    ]
    rates = {"compute": f"{plan.peak / 1e12:.0f} TFLOP/s", "memory": f"{chip.bandwidth / 1e9:.0f} GB/s"}
    if plan.collectives:
        head = f"sent by a device in a {unit}"
        lines.append(f"{head:<36}{'calls':>10}{'array GB':>16}{'sent GB':>12}{'ms':>10}")
        for row in plan.collectives:
            name = f"{row['kind']} over {'+'.join(row['axes'])}"
            size, sent, seconds = row["bytes"] / 1e9, row["sent"] / 1e9, 1e3 * row["seconds"]
            lines.append(f"  {name:<34}{row['calls']:10d}{size:16.5f}{sent:12.5f}{seconds:10.3f}")
        rates["links"] = f"up to {chip.link / 1e9:.0f} GB/s"
        totals = {"communication overlapped": "hidden", "communication not overlapped": "unhidden"}
        efficiency = f"; scaling efficiency {plan.efficiency:.2%} without overlap"
    else:
        lines.append("nothing is sent between devices")
        totals, efficiency = {"": "hidden"}, ""
    lines += ["", f"least time of a {unit}, at published rates; real kernels take longer"]
    lines += [f"  {name:<34}{1e3 * plan.floors[name]:10.3f} ms at {rate}" for name, rate in rates.items()]
    for title, how in totals.items():
        name = f"all, {title}" if title else "all"
        lines.append(
            f"  {name:<34}{1e3 * plan.seconds[how]:10.3f} ms, at most {plan.share_of_peak(how):.1%} of peak"
        )
    limit = "memory bandwidth" if plan.limit == "memory" else plan.limit
    lines.append(f"limited by {limit}{efficiency}")
    if plan.fits:
        lines.append(f"fits: needs {_share(plan)}")
    return "\n".join(lines)


def _share(plan: Plan) -> str:
    """What is needed, of how much."""
    own = f"{gigabytes(plan.bytes)} of the {gigabytes(USABLE * plan.capacity)}"
    return f"{own} that {plan.topology.partition(':')[0]} has for it"


def does_not_fit(plan: Plan) -> str:
    """One line: what is too much, and what would help first."""
    kind = max(plan.memory, key=plan.memory.get)
    stronger = dict(itertools.pairwise(("none", *REMATS))).get(plan.remat)
    remat = [f"--config.backbone.remat={stronger}"] if stronger and plan.mode == "train" else []
    rows = plan.mesh["data"] * plan.mesh["fsdp"]
    if kind in ("activations", "temporaries"):
        if plan.at_a_time == rows:
            remedy = [*remat, "a larger context in --mesh"]
        elif plan.mode == "train":  # the least that keeps the batch
            remedy = [f"--config.accumulation={plan.clips // rows}, which keeps the batch,", *remat]
        else:
            remedy = [f"--config.batch_size={rows}"]
    else:
        remedy = ["a larger fsdp in --mesh", *remat] if plan.mode == "train" else ["a chip with more memory"]
    return (
        f"{describe(plan)} needs {_share(plan)}, most of it {kind} ({gigabytes(plan.memory[kind])} "
        f"counted): try {' or '.join(remedy)}"
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """All figures of one plan in JSON types."""
    own = dataclasses.asdict(plan)
    own |= {"bytes": plan.bytes, "fits": plan.fits, "limit": plan.limit, "seconds": plan.seconds}
    share = {how: plan.share_of_peak(how) for how in plan.seconds}
    return own | {"share_of_peak": share, "efficiency": plan.efficiency, "flop_rule": flops.RULE}


def best_of(tried: Sequence[Plan], best: Plan) -> str:
    """What a search found: the first of all that were tried, and the best."""
    lines = [f"{len(tried)} tried by count, {sum(one.fits for one in tried)} fit; the fastest for a clip:"]
    for one in tried[:8]:
        seconds = one.seconds["unhidden"] * one.devices / one.clips
        lines.append(f"  {seconds:8.3f} device seconds a clip  {gigabytes(one.bytes):>9}  {describe(one)}")
    return "\n".join([*lines, "", f"the best that fits, compiled: {describe(best)}", ""])


def read_mesh(text: str) -> dict[str, int]:
    """Sizes of data, fsdp and context from text such as 16,1,4. Raises UserError."""
    try:
        return dict(zip(parallel.AXES, (int(size) for size in text.split(",")), strict=True))
    except ValueError as error:
        axes = ",".join(parallel.AXES)
        raise UserError(f"--mesh={text}: three numbers, {axes}, such as 16,1,4; one may be -1") from error
