"""Says what a job needs before anyone pays for it: compiles it for a topology that is not there.

    python -m prophy_jax.plan --config=configs/wan.py --config.batch_size=64 --topology=v5p:4x4x4
    ... --topology=v6e:16x16 | tpu7x:4x4x4 | h100:8    chips and how they are linked; GPUs have a number
    ... --mesh=16,1,4         data, fsdp, context; one may be -1 (default: config.mesh)
    ... --mode=sample         the sampler of a whole clip instead of the train step
    ... --search              tries meshes, clips a device and remat, and names the fastest that fits
    ... --json=FILE           the same figures for a program to read

TPU programs are compiled by the TPU's own compiler, which runs anywhere: memory and collectives are those of
the job. For GPUs the program is compiled for as many simulated devices, which gives the collectives, and
memory is counted from the traced program (see prophy_jax.plan.memory).

Prints bytes a device by kind against the chip's memory; model FLOPs; what is sent over each axis of the mesh;
the floors of time from published rates, the share of peak that they allow, and what limits it. A job that
does not fit is answered in one line with the remedy, and exit status 1.

B global batch, N video tokens, L text length, D text width.
"""

import json
import logging
import math
from typing import Any

import jax
from absl import flags

from prophy_jax.plan import hardware
from prophy_jax.plan.planner import (
    PROGRAMS,
    as_json,
    describe,
    does_not_fit,
    gigabytes,
    make_plan,
    read_mesh,
    search,
    table,
)
from prophy_jax.run.errors import UserError


def main(config: Any) -> None:
    """The command, with its flags parsed."""
    options = flags.FLAGS
    if not options.topology:
        raise UserError("name the chips: --topology=v5p:4x4x4, v6e:16x16, tpu7x:4x4x4 or h100:8")
    if options.mode not in PROGRAMS:
        raise UserError(f"--mode={options.mode}: choose one of {', '.join(PROGRAMS)}")
    if options.mesh:
        config.mesh = read_mesh(options.mesh)
    chip, shape = hardware.parse(options.topology)
    jax.config.update("jax_platforms", "cpu")
    if chip.per_server:
        jax.config.update("jax_num_cpu_devices", math.prod(shape))
    logging.getLogger("prophy_jax.run.parallel").setLevel(
        logging.ERROR
    )  # what a mesh leaves whole is in the table
    if options.search:
        tried, plan = search(config, options.topology, options.mode)
        print(f"{len(tried)} tried by count, {sum(one.fits for one in tried)} fit; the fastest for a clip:")
        for one in tried[:8]:
            print(
                f"  {one.seconds['unhidden'] * one.devices / one.clips:8.3f} device seconds a clip  "
                f"{gigabytes(one.bytes):>9}  {describe(one)}"
            )
        print(f"\nthe best that fits, compiled: {describe(plan)}\n")
    else:
        plan = make_plan(config, options.topology, options.mode)
    print(table(plan))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(as_json(plan), file, indent=1)
    if not plan.fits:
        raise UserError(does_not_fit(plan))


if __name__ == "__main__":
    from prophy_jax.run import cli

    flags.DEFINE_string("topology", None, "Chips: v5p:4x4x4, v6e:16x16, tpu7x:4x4x4, h100:8.")
    flags.DEFINE_string("mesh", None, "Sizes of data, fsdp and context, such as 16,1,4.")
    flags.DEFINE_string("mode", "train", "train or sample.")
    flags.DEFINE_bool("search", False, "Try meshes, clips a device and remat.")
    flags.DEFINE_string("json", None, "A file for the figures.")
    cli.run(main, __doc__)
