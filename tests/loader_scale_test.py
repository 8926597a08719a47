"""The loader at the size of WISA-80K: start-up, memory, open files and shuffle; and on records of real size.

The figures that a test prints are seen with: pytest -s tests/loader_scale_test.py
"""

import os
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from prophy_jax.data import loader, records
from prophy_jax.data.batch import Sizes
from prophy_jax.data.job import Job

pytestmark = pytest.mark.slow  # writes and reads the number of records of the real data

SHARDS, SHARD = 1250, 64  # 80,000 records
BUCKETS = {"5x16x16": 5, "5x16x24": 3, "9x16x16": 2}  # of ten clips, so many are of this size
TINY = Sizes((1, 2, 2, 16), (1, 1, 1), 8, 4)
WAN = Sizes((21, 60, 104, 16), (21, 30, 52), 512, 4096)  # of 81x480x832


def _resident() -> float:
    """Memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _features(buckets, sizes: Sizes) -> dict:
    own = {"records": records.features("records", sizes, without=["text_mask"])}
    own["alignment"] = records.features("alignment", sizes)
    return {f"{dataset}/{bucket}": own[dataset] for dataset in own for bucket in buckets}


def _describe(reports, features, sizes: Sizes):
    counts = {dataset: 0 for dataset in features}
    for report in reports:
        for dataset, size in report["datasets"].items():
            counts[dataset] += size["count"]
    sides = {"latent_shape": sizes.latent_shape, "token_grid": sizes.token_grid}
    buckets = {
        dataset.split("/")[1]: {**sides, "counts": {"train": count}}
        for dataset, count in counts.items()
        if dataset.startswith("records")
    }
    total = sum(bucket["counts"]["train"] for bucket in buckets.values())
    text = {"text_length": sizes.text_length, "text_dim": sizes.text_dim}
    return features, {**text, "buckets": buckets, "counts": {"train": total}}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    features = _features(BUCKETS, TINY)
    sizes = [bucket for bucket, share in BUCKETS.items() for _ in range(share)]
    common = {
        "caption": "",
        "source": 0,
        "video": "",
        "latents": np.zeros(TINY.latent_shape, np.float16),
        "text": np.zeros((1, 4), np.float16),
        "category": np.eye(17, dtype=np.float32)[0],
    }
    label = {"present": common["category"], "maps": np.ones((1, 1), np.float16)}
    job = Job(folder / "data", {}, {"train": SHARDS})
    for split, index in job.missing():
        with job.shard(split, index) as shard:
            for clip in range(SHARD):
                bucket, name = sizes[clip % 10], {"id": f"{index}.{clip}"}
                shard.write(f"records/{bucket}", features[f"records/{bucket}"], common | name)
                shard.write(f"alignment/{bucket}", features[f"alignment/{bucket}"], label | name)
    job.finish(lambda reports: _describe(reports, features, TINY))
    yield folder / "data"
    shutil.rmtree(folder)


@pytest.fixture
def few_files():
    """A limit of 1,024 open files, as many systems have; 7,500 would be needed if all stayed open."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_80000_records(large, few_files):
    before, files, start = _resident(), _open_files(), time.perf_counter()
    iterator = loader.make_loader(large, "train", 16, seed=0)
    opened = time.perf_counter() - start
    seen = next(iterator)["id"].tolist()
    first = time.perf_counter() - start
    resident = [_resident()]
    for batches in 400, 600:
        for _ in range(batches):
            seen += next(iterator)["id"].tolist()
        resident.append(_resident())
    started, warm, after = resident
    print(
        f"\n80,000 records in {len(list(large.rglob('*array_record*')))} files: opened in {opened:.2f} s, "
        f"first batch after {first:.2f} s, memory +{started - before:.1f} MB; 6,400 more reads "
        f"+{warm - started:.1f} MB, 9,600 more +{after - warm:.1f} MB; {_open_files() - files} files open"
    )
    assert first < 10
    # Each of six data sets keeps at most 64 files open. What starting takes are names of files and counts.
    assert _open_files() - files <= 6 * 64
    assert started - before < 50
    # 9,600 ids as the test keeps them are about 1 MB; 500 bytes lost with each read would be 5 MB.
    assert after - warm < 4

    ids = np.array([name.split(".") for name in seen], int)  # (reads, 2): shard, clip within it
    assert len(np.unique(ids, axis=0)) == len(ids) == 16 * 1001  # none twice in the first epoch
    # 1,000 balls into 1,250 boxes fill 1,250 (1 - (1 - 1/1250)^1000) = 688 of them, with a deviation of 11.
    assert 630 < len(np.unique(ids[:1000, 0])) < 750
    shards = ids[ids[:, 1] % 10 < 5, 0]  # of the first bucket
    # Correlation of n = 8,000 independent places with their order: 0, deviation 1 / sqrt(n) = 0.011.
    assert 7500 < len(shards) < 9000
    assert abs(np.corrcoef(shards, np.arange(len(shards)))[0, 1]) < 0.05


def test_resuming_far_inside_is_immediate(large):
    iterator = loader.make_loader(large, "train", 16, seed=0)
    start = time.perf_counter()
    iterator.set_state({"next_index": 10**6})  # 200 epochs
    batch = next(iterator)
    assert time.perf_counter() - start < 5
    again = loader.make_loader(large, "train", 32, seed=0, rows=range(16))
    again.set_state({"next_index": 10**6})
    assert len(batch["id"]) == len(next(again)["id"]) == 16


@pytest.mark.slow
def test_2000_records_of_real_size(tmp_path):
    if shutil.disk_usage(tmp_path).free < 15e9:
        pytest.skip("needs 12 GB of disk")
    features = _features(["81x480x832"], WAN)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(np.prod(WAN.latent_shape) + 2000, np.float32).astype(np.float16)
    job = Job(tmp_path / "data", {}, {"train": 32})
    for split, index in job.missing():
        with job.shard(split, index) as shard:
            for clip in range(index, 2000, 32):
                present = np.isin(np.arange(17), rng.choice(17, 1 + clip % 3)).astype(np.float32)
                record = {
                    "id": str(clip),
                    "caption": "",
                    "source": 0,
                    "video": "",
                    "latents": noise[clip:][: np.prod(WAN.latent_shape)].reshape(WAN.latent_shape),
                    "text": noise[: (64 + clip % 64) * 4096].reshape(-1, 4096),
                    "category": present,
                }
                maps = np.full((int(present.sum()), WAN.tokens), clip % 7, np.float16)
                label = {"id": str(clip), "present": present, "maps": maps}
                shard.write("records/81x480x832", features["records/81x480x832"], record)
                shard.write("alignment/81x480x832", features["alignment/81x480x832"], label)
    job.finish(lambda reports: _describe(reports, features, WAN))
    try:
        start, resident, seen = time.perf_counter(), [], []
        for batch in loader.make_loader(tmp_path / "data", "train", 8, seed=0, repeat=False):
            for name, latents, alignment in zip(
                batch["id"].tolist(), batch["latents"], batch["alignment"], strict=True
            ):
                clip = int(name)
                assert (
                    latents[0, 0, 0, 0] == noise[clip]
                    and latents[-1, -1, -1, -1] == noise[clip + np.prod(WAN.latent_shape) - 1]
                )
                assert alignment.max() == clip % 7
                seen.append(clip)
            resident.append(_resident())
        seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in (tmp_path / "data").rglob("*array_record*"))
    finally:
        shutil.rmtree(tmp_path / "data")
    warm, most = max(resident[:50]), max(resident)
    print(
        f"\n2,000 records, {size / 1e9:.1f} GB, read in {seconds:.1f} s ({size / seconds / 1e6:.0f} MB/s); "
        f"memory {warm:.0f} MB at most over the first 50 batches, {most:.0f} MB over all {len(resident)}"
    )
    assert sorted(seen) == list(range(2000))
    assert most - warm < 100  # of ten thousand that were read: less than three batches
