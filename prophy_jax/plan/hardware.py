"""Published rates of the chips that the planner knows: one table.

Rates are those of one JAX device: a TPU7x chip is two of them. Peaks are dense bfloat16. `link` is what one
device sends per second over all its links inside a slice or a server, one way: half of the bidirectional rate
that vendors print. `network` is the same between servers, 0 where a slice is all there is.

Sources: "System architecture" of docs.cloud.google.com/tpu/docs/ v5e, v5p, v6e and tpu7x; NVIDIA's datasheets
of the A100 80GB SXM, the H100 SXM and the H200 SXM, and of the DGX systems that hold eight of them, with one
adapter of 200 or 400 Gb/s a GPU.
"""

import dataclasses
import re

from prophy_jax.run.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device."""

    name: str
    peak: float  # floating-point operations/s, bfloat16
    memory: int  # bytes
    bandwidth: float  # bytes/s of that memory
    link: float  # bytes/s sent, in a slice or server
    network: float = 0.0  # bytes/s sent, between servers
    per_server: int = 0  # GPUs in a server; 0: a TPU slice, all linked


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 16 * GIB, 819e9, 200e9),
        Chip("v5p", 459e12, 95 * GIB, 2765e9, 600e9),
        Chip("v6e", 918e12, 32 * GIB, 1638e9, 400e9),
        Chip("tpu7x", 2307e12 / 2, 96 * GIB, 7380e9 / 2, 300e9),
        Chip("a100", 312e12, 80 * 10**9, 2039e9, 300e9, 25e9, 8),
        Chip("h100", 989e12, 80 * 10**9, 3350e9, 450e9, 50e9, 8),
        Chip("h200", 989e12, 141 * 10**9, 4800e9, 450e9, 50e9, 8),
    )
}


def parse(topology: str) -> tuple[Chip, tuple[int, ...]]:
    """Reads "v5p:4x4x4" as the chip and (4, 4, 4), "h100:8" as the chip and (8,). Raises UserError."""
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", topology)
    known = ", ".join(CHIPS)
    if not match or match[1] not in CHIPS:
        raise UserError(
            f"--topology={topology}: name a chip of {known} and how many, such as v5p:4x4x4 or h100:8"
        )
    chip, shape = CHIPS[match[1]], tuple(int(side) for side in match[2].split("x"))
    if chip.per_server and len(shape) > 1:
        raise UserError(f"--topology={topology}: GPUs have a number, not a shape, such as {chip.name}:8")
    return chip, shape
