"""Says what a job needs before anyone pays for it: compiles it for chips that this machine does not have.

    python -m prophy_jax.plan --config=configs/wan.py --config.batch_size=64 --topology=v5p:4x4x4
    ... --topology=v6e:16x16 | tpu7x:4x4x4 | h100:8    chips and how they are linked; GPUs have a number
    ... --mesh=16,1,4         data, fsdp, context; one may be -1 (default: config.mesh)
    ... --mode=sample         the sampler of a whole clip instead of the train step
    ... --search              tries meshes, clips a device and remat, and names the fastest that fits
    ... --json=FILE           writes the same figures for a program to read

The TPU's own compiler, which runs anywhere, compiles TPU programs: memory and collectives are those of the
job. For GPUs the program is compiled for as many simulated devices, which gives the collectives, and memory
is counted from the traced program (see prophy_jax.plan.memory).

Prints bytes of a device by kind, next to the chip's memory; model FLOPs; what is sent over each axis of the
mesh; the least time that published rates allow, the share of peak that goes with it, what limits it, and
whether the job fits. One that does not fit ends with one line that says what would help, and exit status 1.
"""

import json
import logging
import math
from typing import Any

import jax
from absl import flags

from prophy_jax.plan import hardware, table
from prophy_jax.plan.planner import Job, make_plan
from prophy_jax.plan.programs import PROGRAMS
from prophy_jax.plan.search import search
from prophy_jax.run.errors import UserError


def main(config: Any) -> None:
    """Plans the job that the flags describe, and prints what it needs."""
    # 1. What is planned, for which chips.
    options = flags.FLAGS
    if not options.topology:
        raise UserError("name the chips: --topology=v5p:4x4x4, v6e:16x16, tpu7x:4x4x4 or h100:8")
    if options.mode not in PROGRAMS:
        raise UserError(f"--mode={options.mode}: choose one of {', '.join(PROGRAMS)}")
    chip, shape = hardware.parse(options.topology)
    jax.config.update("jax_platforms", "cpu")
    if chip.per_server:
        jax.config.update("jax_num_cpu_devices", math.prod(shape))
    # The table says what a mesh does not split.
    logging.getLogger("prophy_jax.run.parallel").setLevel(logging.ERROR)

    # 2. One plan, or the best of many.
    if options.search:
        tried, plan = search(config, options.topology, options.mode)
        print(table.best_of(tried, plan))
    else:
        mesh = table.read_mesh(options.mesh) if options.mesh else None
        plan = make_plan(Job.of(config, options.mode, mesh), options.topology)

    # 3. Its figures.
    print(table.table(plan))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(table.as_json(plan), file, indent=1)
    if not plan.fits:
        raise UserError(table.does_not_fit(plan))


if __name__ == "__main__":
    from prophy_jax.run import cli

    flags.DEFINE_string("topology", None, "Chips: v5p:4x4x4, v6e:16x16, tpu7x:4x4x4, h100:8.")
    flags.DEFINE_string("mesh", None, "Sizes of data, fsdp and context, such as 16,1,4.")
    flags.DEFINE_string("mode", "train", "What is planned: train or sample.")
    flags.DEFINE_bool("search", False, "Try meshes, clips a device and remat.")
    flags.DEFINE_string("json", None, "A file for the figures.")
    cli.run(main, __doc__)
