"""What comparing checksums costs when weights are loaded.

    python -m benchmarks.load [--gb=2] [--rounds=3] [--dir=DIR]

Writes random weights in bfloat16, layers of 64 MB, into a temporary folder (of DIR, on the disk that is to be
measured), and loads them with the checksums compared and not, in turns, with the page cache warm. Prints the
median and the best of each, and their ratio.
"""

import argparse
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import ARGUMENTS
from prophy_jax.run import checkpoints, checksums

LAYER = (8, 2048, 2048)  # 64 MB in bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, **ARGUMENTS)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    layer = rng.standard_normal(LAYER, np.float32)
    count = max(1, round(options.gb * 1e9 / (2 * layer.size)))
    tree = {f"layer{i}": {"kernel": jnp.asarray(layer + i, jnp.bfloat16)} for i in range(count)}
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        checkpoints.save_params(f"{folder}/tree", tree, {})
        del tree
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(options.rounds + 1):  # the first is not counted
            for compared in times:
                checksums.enabled = compared
                start = time.perf_counter()
                jax.block_until_ready(checkpoints.load_params(f"{folder}/tree", wanted, ""))
                times[compared].append(time.perf_counter() - start)
    checksums.enabled = True
    for compared, name in ((True, "compared"), (False, "not compared")):
        own = times[compared][1:]
        print(f"{name:12}  median {statistics.median(own):.2f} s, best {min(own):.2f} s")
    ratio = statistics.median(times[True][1:]) / statistics.median(times[False][1:])
    size = 2 * count * layer.size / 1e9
    print(f"{size:.1f} GB: with checksums compared, loading takes {ratio:.2f} times as long")


if __name__ == "__main__":
    main()
