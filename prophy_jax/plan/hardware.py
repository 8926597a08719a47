"""The chips that the planner knows, in one table of published rates; and the devices of a topology.

Rates are those of one JAX device: a TPU7x chip is two of them. Peaks are dense bfloat16. `link` is what one
device sends per second over all its links inside a slice or a server, one way: half of the bidirectional rate
that vendors print. `network` is the same between servers, 0 where a slice is all there is.

Sources: "System architecture" of docs.cloud.google.com/tpu/docs/ v5e, v5p, v6e and tpu7x; NVIDIA's datasheets
of the A100 80GB SXM, the H100 SXM and the H200 SXM, and of the DGX systems that hold eight of them, with one
adapter of 200 or 400 Gb/s a GPU.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

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

    @property
    def platform(self) -> str:
        return "gpu" if self.per_server else "tpu"


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


def get_devices(chip: Chip, topology: str, shape: Sequence[int]) -> list[Any]:
    """Compile-only TPU devices, or as many simulated CPU devices as there are GPUs. Raises UserError."""
    if chip.per_server:
        count = math.prod(shape)
        if len(jax.devices("cpu")) < count:
            raise UserError(
                f"{count} devices must be simulated: jax.config.update('jax_num_cpu_devices', {count})"
            )
        return jax.devices("cpu")[:count]
    from jax.experimental import topologies

    # Only the compiler is used: it must not look for a TPU on this machine, or lock one.
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


def link_rate(chip: Chip, devices: Sequence[Any], members: Sequence[Any]) -> float:
    """Bytes/s that a device sends to the other `members` of a group.

    On a torus, over the links that lead to them. GPUs of one server use all of their links; groups over
    several servers are as fast as the network.

    Args:
        chip: Of all devices.
        devices: All of the job.
        members: Those of the group.
    """
    if chip.per_server:
        servers = {device.id // chip.per_server for device in members}
        return chip.link if len(servers) == 1 else chip.network
    sides = [len({device.coords[axis] for device in devices}) for axis in range(len(devices[0].coords))]
    used = [len({device.coords[axis] for device in members}) > 1 for axis in range(len(sides))]
    links = sum(side > 1 for side in sides)
    return chip.link * max(sum(used), 1) / max(links, 1)
