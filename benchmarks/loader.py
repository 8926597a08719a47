"""How fast the loader reads, compared with reading the same files raw and with what training needs.

    python benchmarks/loader.py [--records=400] [--batch=8] [--repeat=5] [--dir=DIR]

Writes records of Wan2.1's size at 480p and 81 frames into a temporary folder (of DIR, on the disk that is to
be measured): latents 21x60x104x16 and 128 rows of text of width 4096, float16, and labels with all 17 maps,
about 6.4 MB a clip. Then reads all of them, in turns:

    raw, one buffer    the files one after the other into the same 8 MB, which stay in the processor's cache
    raw, kept          the files one after the other into new memory, which whoever uses the data needs
    loader             shuffled batches, as in training

with the page cache warm, and after the files are dropped from it (a virtual machine may still cache its
disk). Prints the median and the best of each, what the loader spends the processor's time on, and how many
times faster it is than one host of a training job needs.
"""

import argparse
import collections
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from prophy_jax.data import loader, records
from prophy_jax.data.batch import Sizes
from prophy_jax.data.job import Job

LATENTS, TEXT = (21, 60, 104, 16), (128, 4096)
SIZES = Sizes(LATENTS, (21, 30, 52), 512, TEXT[1])
BUCKET = "81x480x832"
SHARD = 64
# Model FLOPs of one training step and clip: Wan2.1-1.3B frozen, 10 physical blocks, 32,760 tokens, one clip a
# chip; two per multiply-add, nothing counted twice for recomputation.
STEP_TFLOP = 1043
HOSTS = {  # chips of one host, peak in bfloat16, share of it that training reaches
    "TPU v5p": (4, 459, 0.40),
    "H100": (8, 989, 0.45),
}


def write(folder: Path, count: int) -> list[Path]:
    """Writes `count` records and labels; returns their files."""
    features = {
        f"records/{BUCKET}": records.features("records", SIZES, without=["text_mask"]),
        f"alignment/{BUCKET}": records.features("alignment", SIZES),
    }
    noise = np.random.default_rng(0).standard_normal(np.prod(LATENTS) + count).astype(np.float16)
    ones = np.ones(17, np.float32)
    job = Job(folder, {}, {"train": -(-count // SHARD)})
    for split, index in job.missing():
        with job.shard(split, index) as shard:
            for clip in range(index * SHARD, min((index + 1) * SHARD, count)):
                record = {
                    "id": str(clip),
                    "caption": "",
                    "source": 0,
                    "video": "",
                    "latents": noise[clip:][: np.prod(LATENTS)].reshape(LATENTS),
                    "text": noise[clip:][: np.prod(TEXT)].reshape(TEXT),
                    "category": ones,
                }
                maps = noise[clip:][: 17 * SIZES.tokens].reshape(17, SIZES.tokens)
                for (dataset, kind), example in zip(
                    features.items(), (record, {"id": str(clip), "present": ones, "maps": maps}), strict=True
                ):
                    shard.write(dataset, kind, example)
    counts = {"train": count}
    bucket = {"latent_shape": LATENTS, "token_grid": SIZES.token_grid, "counts": counts}
    text = {"text_length": SIZES.text_length, "text_dim": SIZES.text_dim}
    manifest = {**text, "counts": counts, "buckets": {BUCKET: bucket}}
    job.finish(lambda reports: (features, manifest))
    return sorted(folder.rglob("*.array_record-*"))


def drop_from_page_cache(files: list[Path]) -> None:
    os.sync()
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_into_one_buffer(files: list[Path]) -> None:
    buffer = bytearray(2**23)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def read_and_keep(files: list[Path], size: int) -> None:
    """`size` bytes are kept at a time, like those of one batch."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(size):
                pass


def load(folder: Path, batch: int) -> None:
    for _ in loader.make_loader(folder, "train", batch, seed=0, repeat=False):
        pass


def processor_time(run: Callable[[int], object], count: int) -> float:
    """Milliseconds of the processor for each call; the best of three rounds."""
    times = []
    for _ in range(3):
        start = time.process_time()
        for index in np.random.default_rng(0).permutation(count)[:64]:
            run(int(index))
        times.append((time.process_time() - start) / min(64, count) * 1e3)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--dir", help="where the temporary folder is made")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        data = Path(folder) / "data"
        files = write(data, options.records)
        size = sum(path.stat().st_size for path in files)
        clip = size / options.records
        cores = os.cpu_count()
        print(f"{options.records} records of {clip / 1e6:.2f} MB, in {len(files)} files; {cores} cores")
        ways = {
            "raw, one buffer": lambda: read_into_one_buffer(files),
            "raw, kept": lambda: read_and_keep(files, int(clip * options.batch)),
            "loader": lambda: load(data, options.batch),
        }
        seconds = collections.defaultdict(list)
        load(data, options.batch)
        for _ in range(options.repeat):
            for cache in "warm", "cold":
                for name, run in ways.items():
                    if cache == "cold":
                        drop_from_page_cache(files)
                    start = time.perf_counter()
                    run()
                    seconds[cache, name].append(time.perf_counter() - start)
        for cache in "warm", "cold":
            own = statistics.median(seconds[cache, "loader"])
            for name in ways:
                middle, best = statistics.median(seconds[cache, name]), min(seconds[cache, name])
                print(
                    f"{cache}  {name:16} {options.records / middle:6.0f} clips/s "
                    f"{size / middle / 1e6:7.0f} MB/s (best {size / best / 1e6:6.0f})"
                    + f"   the loader is {middle / own:.2f} times as fast"
                    * (name != "loader")
                )

        examples = records.open_dataset(data, "records", BUCKET, "train")
        labels = records.open_dataset(data, "alignment", BUCKET, "train")
        latents = np.empty((1, *LATENTS), np.float16)

        def copy(index: int) -> None:
            latents[0] = np.frombuffer(values["latents"], np.float16).reshape(LATENTS)

        values = examples.read(0)
        print("time of the processor, ms a clip:")
        for name, run in {
            "array_record, records and labels": lambda i: (examples.read(i), labels.read(i)),
            "the same decoded by TFDS": lambda i: (examples[i], labels[i]),
            "copying the latents": copy,
        }.items():
            print(f"  {name:34} {processor_time(run, options.records):5.2f}")
        start = time.process_time()
        load(data, options.batch)
        print(f"  {'loader, all of it':34} {(time.process_time() - start) / options.records * 1e3:5.2f}")

    print("one host of a job on 256 chips, one clip a chip and step:")
    for name, (chips, peak, share) in HOSTS.items():
        step = STEP_TFLOP / (peak * share)
        rate = chips / step
        warm, cold = (
            options.records / statistics.median(seconds[cache, "loader"]) / rate for cache in ("warm", "cold")
        )
        print(
            f"  {name}: {256 // chips} hosts of {chips} chips, a step takes {step:.1f} s at {share:.0%} of "
            f"{peak} TFLOP/s;\n    a host needs {rate:.2f} clips/s = {rate * clip / 1e6:.1f} MB/s, covered "
            f"{warm:.0f} times over (cold: {cold:.0f})"
        )


if __name__ == "__main__":
    main()
