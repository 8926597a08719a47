"""Compiles a program for a topology that need not exist: bytes of a device, and what the program sends."""

import contextlib
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import jax

from prophy_jax.plan import collectives


def compile_program(
    program: Any, arguments: tuple, mesh: jax.sharding.Mesh, simulated: bool
) -> tuple[float | None, list[collectives.Collective]]:
    """Compiles a jitted function for the devices of a mesh.

    Args:
        program: The jitted function.
        arguments: Abstract arrays, placed on the mesh.
        mesh: Any.
        simulated: Whether CPUs stand for GPUs. They compute and send bfloat16 as float32, in other kernels:
            their bytes say nothing, and collectives are read from the program after it is partitioned,
            before it is made one for CPUs.

    Returns:
        Bytes of a device as the compiler reports them, None where `simulated`; and the collectives, none
        where the program needs more memory than the chip has.
    """
    shape = dict(mesh.shape)
    with jax.set_mesh(mesh):
        lowered = program.lower(*arguments)
    if simulated:
        return None, collectives.count(_partitioned(lowered), shape)
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
    # has are compiled. The peak leaves out unused gaps between arrays, 2 % where it was looked up.
    sizes = executable.memory_analysis()
    return sizes.peak_memory_in_bytes, collectives.count(executable.as_text(), shape)


def _partitioned(lowered: Any) -> str:
    """HLO text of a program as it was split over devices, before any optimization for their kind."""
    with tempfile.TemporaryDirectory() as folder, _no_compile_cache():
        dump = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        executable = lowered.compile(compiler_options=dump)
        found = list(pathlib.Path(folder).glob("*after_spmd-partitioning*"))
        return found[0].read_text() if found else executable.as_text()  # one device: nothing is partitioned


@contextlib.contextmanager
def _no_compile_cache() -> Iterator[None]:
    """A program from the cache dumps no files, and one for absent chips cannot be read back."""
    from jax.experimental.compilation_cache import compilation_cache

    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()
