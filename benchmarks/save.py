"""How long a checkpoint takes, which is what a run has to do between a notice to stop and its end.

    python -m benchmarks.save [--gb=2] [--processes=2] [--rounds=3] [--dir=DIR]

Each process holds its share of that many GB in fp32, layers of 64 MB, and saves them as `train` does, into
a temporary folder (of DIR, on the disk or in the gs:// bucket that is to be measured). Prints the seconds
until training could go on, and until the checkpoint is whole: written, hashed and stored.
"""

import argparse
import contextlib
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from prophy_jax.run import checkpoints, cli, distributed, storage
from prophy_jax.run.errors import UserError, one_line_errors

LAYER = (8, 2048, 1024)  # 64 MB in fp32


class Position:
    """Stands in for the data iterator."""

    def get_state(self) -> dict[str, int]:
        return {"step": 0}


def save(gb: float, rounds: int, folder: str) -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))
    split = jax.NamedSharding(mesh, jax.P(None, "fsdp"))
    layers = max(1, round(gb * 1e9 / (4 * LAYER[0] * LAYER[1] * LAYER[2])))
    make = jax.jit(lambda key: jax.random.normal(key, LAYER), out_shardings=split)
    state = {f"layer{i}": make(jax.random.key(i)) for i in range(layers)}
    jax.block_until_ready(state)
    saved = checkpoints.TrainCheckpoints(folder, keep=1)
    blocked, whole = [], []
    for step in range(rounds):
        start = time.perf_counter()
        saved.save(step, state, Position(), {})
        blocked.append(time.perf_counter() - start)
        saved.wait()
        whole.append(time.perf_counter() - start)
        state = jax.tree.map(lambda leaf: jnp.negative(leaf), state)
    saved.close()
    if distributed.is_first():
        size = sum(leaf.nbytes for leaf in state.values()) / 1e9
        count = jax.process_count()
        print(
            f"{size:.1f} GB, {count} processes: the state is taken in {statistics.median(blocked):.2f} s, "
            f"the checkpoint is whole in {statistics.median(whole):.2f} s (best {min(whole):.2f}), "
            f"{size / count / statistics.median(whole):.2f} GB/s a process"
        )


@contextlib.contextmanager
def scratch(folder: str | None) -> Iterator[str]:
    """A folder below another one, which is deleted at the end."""
    if folder is None or not storage.in_bucket(folder):
        if folder and not os.path.isdir(folder):
            raise UserError(f"no folder {folder}: name another --dir")
        with tempfile.TemporaryDirectory(dir=folder) as own:
            yield own
        return
    own = f"{folder}/save-{secrets.token_hex(4)}"
    try:
        yield own
    finally:
        storage.remove(own)


def main() -> None:
    parser = cli.ArgumentParser("python -m benchmarks.save", __doc__, buckets=("dir",))
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir")
    parser.add_argument("--process", help=argparse.SUPPRESS)  # ADDRESS,I/P FOLDER: what main starts
    options = parser.parse_args()
    if options.process:
        where, folder = options.process.split(maxsplit=1)
        with distributed.job(where):
            save(options.gb, options.rounds, folder)
        return
    if options.processes == 1:
        with scratch(options.dir) as folder:
            save(options.gb, options.rounds, folder)
        return
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    with scratch(options.dir) as folder:
        job = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.save", f"--gb={options.gb}", f"--rounds={options.rounds}",
                 f"--process=localhost:{port},{i}/{options.processes} {folder}"]
            )
            for i in range(options.processes)
        ]  # fmt: skip
        if any([process.wait() for process in job]):
            sys.exit("a process failed")


if __name__ == "__main__":
    with one_line_errors(), storage.one_line_errors():
        main()
