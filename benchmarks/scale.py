"""What a training step sends, and how that grows from 8 to 64 and 256 chips.

    python -m benchmarks.scale [--variant=] [--topologies=v5p:2x2x2,v5p:4x4x4,v5p:8x8x4] [--json=FILE]

Compiles the train step of configs/wan.py for TPUs that need not exist (see prophy_jax.plan), data parallel,
one clip a chip. Prints for each topology what a device sends in a step, its floors of time, and the
efficiency when no communication hides behind computation. What is reduced should be the same for any number
of chips: the goals are 1 % between the least and the most, and an efficiency of 97 %. A topology takes
minutes.
"""

import argparse
import json

import jax

from configs import wan
from prophy_jax.plan import hardware, table
from prophy_jax.plan.planner import Job, make_plan
from prophy_jax.run.errors import one_line_errors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", default="", help="of configs/wan.py")
    parser.add_argument("--topologies", default="v5p:2x2x2,v5p:4x4x4,v5p:8x8x4")
    parser.add_argument("--json", help="a file for the figures")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    plans, reduced = [], []
    for topology in options.topologies.split(","):
        config = wan.get_config(options.variant)
        chip, shape = hardware.parse(topology)
        chips = len(hardware.get_devices(chip, topology, shape))
        mesh = dict(data=-1, fsdp=1, context=1)
        one = make_plan(Job(config, "train", mesh, chips, config.backbone.remat), topology)
        plans.append(one)
        reduced.append(sum(row["bytes"] for row in one.collectives if row["kind"] == "all-reduce"))
        sent = sum(row["sent"] for row in one.collectives)
        compute, links = (1e3 * one.floors[name] for name in ("compute", "links"))
        print(
            f"{topology}: {one.devices} devices, {one.clips} clips, {one.bytes / 1e9:.2f} GB a device\n"
            f"    all-reduce of {reduced[-1] / 1e9:.4f} GB, {reduced[-1] / one.trained:.2f} bytes a trained "
            f"parameter; {sent / 1e9:.3f} GB sent in all\n"
            f"    floors: compute {compute:.1f} ms, links {links:.2f} ms; efficiency {one.efficiency:.2%} "
            "with nothing hidden",
            flush=True,
        )
    growth, least = max(reduced) / min(reduced) - 1, min(one.efficiency for one in plans)
    print(
        f"all-reduce: {growth:.2%} between the least and the most (goal 1 %); "
        f"efficiency: at least {least:.2%} (goal 97 %)"
    )
    if options.json:
        with open(options.json, "w") as file:
            json.dump([table.as_json(one) for one in plans], file, indent=1)


if __name__ == "__main__":
    with one_line_errors():
        main()
