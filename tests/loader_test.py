"""The loader: batch contract, buckets, determinism, rows of each process, exact resume, refusals.

B global batch, T h w latent grid, N tokens, L text length, D text width.
"""

import functools
import json
import shutil
import threading
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from prophy_jax.data import batch as contract
from prophy_jax.data import loader, records
from prophy_jax.data.batch import Sizes
from prophy_jax.data.job import Job
from prophy_jax.run.errors import UserError, counted

LENGTH, WIDTH = 6, 5
WIDE, TALL = "5x16x32", "9x32x16"
SHAPES = {WIDE: (2, 4, 8, 16), TALL: (3, 8, 4, 16)}  # (T, h, w, 16)
GRIDS = {WIDE: (2, 2, 4), TALL: (3, 4, 2)}  # N = 16 and 24
SIZES = {bucket: Sizes(SHAPES[bucket], GRIDS[bucket], LENGTH, WIDTH) for bucket in SHAPES}
COUNTS = {WIDE: {"train": 10, "val": 3}, TALL: {"train": 5, "val": 0}}
SHARD = 4  # examples of a shard
PAIR = np.isin(np.arange(17), (2, 9))  # the phenomena of every clip with an even index


def _name(bucket: str, split: str, index: int) -> str:
    return f"{split} {index} of {bucket}"


def _present(index: int) -> np.ndarray:
    return (PAIR if index % 2 == 0 else np.zeros(17)).astype(np.float32)


def _maps(index: int, tokens: int) -> np.ndarray:
    """(P, N): 0.5 + index at each token for the first phenomenon, rising along the tokens for the second."""
    maps = np.stack([np.full(tokens, 0.5 + index), np.arange(tokens)]).astype(np.float16)
    return maps if index % 2 == 0 else maps[:0]


def make_folder(
    folder: Path, datasets=("records", "alignment"), buckets=COUNTS, wrong="", **manifest
) -> Path:
    """A finished folder of `datasets`. In the labels, the example called `wrong` has another id."""
    shards = {"train": 3, "val": 1}
    job = Job(folder, {"datasets": list(datasets)}, shards)
    features = {}
    for bucket, sizes in SIZES.items():
        features[f"records/{bucket}"] = records.features("records", sizes, without=["text_mask"])
        features[f"alignment/{bucket}"] = records.features("alignment", sizes)
    for split, shard in job.missing():
        with job.shard(split, shard) as file:
            for bucket, counts in buckets.items():
                for index in range(counts[split])[shard * SHARD : (shard + 1) * SHARD]:
                    name = _name(bucket, split, index)
                    record = {
                        "id": name,
                        "caption": "",
                        "source": 0,
                        "video": "",
                        "latents": np.full(SHAPES[bucket], index, np.float16),
                        "text": np.full((index % LENGTH, WIDTH), 1 + index, np.float16),
                        "category": _present(index),
                    }
                    maps = _maps(index, SIZES[bucket].tokens)
                    label = {
                        "id": "other" if name == wrong else name,
                        "present": _present(index),
                        "maps": maps,
                    }
                    for dataset in datasets:
                        example = record if dataset == "records" else label
                        file.write(f"{dataset}/{bucket}", features[f"{dataset}/{bucket}"], example)
    chosen = {key: value for key, value in features.items() if key.split("/")[0] in datasets}
    described = {
        bucket: {
            "latent_shape": SHAPES[bucket],
            "token_grid": GRIDS[bucket],
            "counts": counts,
        }
        for bucket, counts in buckets.items()
    }
    chosen = {key: value for key, value in chosen.items() if key.split("/")[1] in buckets}
    totals = {split: sum(counts[split] for counts in buckets.values()) for split in shards}
    common = {"text_length": LENGTH, "text_dim": WIDTH, "counts": totals, "buckets": described}
    job.finish(lambda reports: (chosen, common | manifest))
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("data") / "data")
    text, mask = np.ones((LENGTH, WIDTH), np.float32), np.arange(LENGTH) < 1
    np.savez(folder / "empty_text.npz", text=text, mask=mask)
    return folder


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "data", datasets=["records"])


def _label(folder: Path, data_dir: Path, **changes) -> Path:
    fingerprint = records.read_manifest(data_dir)["fingerprint"]
    return make_folder(folder, datasets=["alignment"], **({"data_fingerprint": fingerprint} | changes))


def _take(iterator, batches: int) -> list[list[str]]:
    return [next(iterator)["id"].tolist() for _ in range(batches)]


@pytest.mark.parametrize("split, bucket", [("val", WIDE), ("train", TALL)])
def test_batch_contract(data_dir, split, bucket):
    tokens = SIZES[bucket].tokens
    batches = loader.make_loader(data_dir, split, 3, seed=0)
    batch = next(batch for batch in batches if batch["latents"].shape[1:] == SHAPES[bucket])
    shapes = {key: (value.shape, value.dtype) for key, value in batch.items() if key != "id"}
    assert shapes == {
        "latents": ((3, *SHAPES[bucket]), np.float16),
        "text": ((3, LENGTH, WIDTH), np.float16),
        "text_mask": ((3, LENGTH), bool),
        "category": ((3, 17), np.float32),
        "alignment": ((3, tokens, 17), np.float16),
        "alignment_present": ((3, 17), np.float32),
        "index": ((3,), np.int64),
    }
    assert batch["id"].tolist() == [_name(bucket, split, index) for index in batch["index"]]
    for row, index in enumerate(batch["index"]):
        assert (batch["latents"][row] == index).all()
        np.testing.assert_array_equal(batch["alignment_present"][row], _present(index))
        np.testing.assert_array_equal(batch["category"][row], _present(index))
        mask = np.arange(LENGTH) < index % LENGTH
        np.testing.assert_array_equal(batch["text_mask"][row], mask)
        assert (batch["text"][row][mask] == 1 + index).all() and not batch["text"][row][~mask].any()
        alignment = np.zeros((tokens, 17))
        if index % 2 == 0:
            alignment[:, 2], alignment[:, 9] = 0.5 + index, np.arange(tokens)
        np.testing.assert_array_equal(batch["alignment"][row], alignment)


def test_without_alignment_labels(unlabelled):
    batch = next(loader.make_loader(unlabelled, "val", 3, seed=0))
    assert batch["alignment"].shape == (3, 16, 17) and not batch["alignment"].any()
    assert batch["alignment_present"].shape == (3, 17) and not batch["alignment_present"].any()


def test_labels_from_their_own_folder(unlabelled, data_dir, tmp_path):
    labels = _label(tmp_path / "labels", unlabelled)
    own = loader.make_loader(data_dir, "train", 5, seed=0)
    other = loader.make_loader(unlabelled, "train", 5, seed=0, side={"alignment": labels})
    for _ in range(3):
        expected, batch = next(own), next(other)
        assert expected["alignment"].any()
        for key in expected:
            np.testing.assert_array_equal(batch[key], expected[key])


def test_seed_decides_the_order_and_epochs_differ(data_dir):
    first = _take(loader.make_loader(data_dir, "train", 5, seed=1), 6)
    assert first == _take(loader.make_loader(data_dir, "train", 5, seed=1), 6)
    assert first != _take(loader.make_loader(data_dir, "train", 5, seed=2), 6)
    wide = [name for batch in first for name in batch if WIDE in name]
    epochs = [wide[:10], wide[10:]]  # 4 of 6 batches are of the bucket with two thirds of the clips
    everything = sorted(_name(WIDE, "train", index) for index in range(10))
    assert sorted(epochs[0]) == sorted(epochs[1]) == everything
    assert epochs[0] != epochs[1]


def test_buckets_take_turns_in_proportion(data_dir):
    batches = _take(loader.make_loader(data_dir, "train", 2, seed=0), 300)
    buckets = [{name.split(" of ")[1] for name in batch} for batch in batches]
    assert all(len(bucket) == 1 for bucket in buckets)
    # 10 and 5 clips. Grain mixes deterministically, so any 30 batches have 20 of the first, within one.
    for start in range(0, 300, 30):
        assert abs(sum(WIDE in bucket for bucket in buckets[start : start + 30]) - 20) <= 1


@pytest.mark.parametrize("split", ["train", "val"])  # two buckets, and one
def test_batches_of_one_clip(data_dir, split):
    batches = _take(loader.make_loader(data_dir, split, 1, seed=0), 60)
    counts = Counter(clip for clips in batches for clip in clips)
    assert set(map(len, batches)) == {1} and max(counts.values()) - min(counts.values()) <= 1
    assert len(counts) == sum(own[split] for own in COUNTS.values())


# Source 0 has 6 wide and 3 tall clips, source 1 has 4 wide and 2 tall ones, source 2 is of another split.
def _source(index: int) -> int:
    return int(index % 5 in (1, 3))


@pytest.fixture(scope="module")
def of_two_sources(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources") / "data"
    make_folder(folder, sources=["/own/a", "/own/b", "/own/val"])
    rows = [
        {
            "source": _source(index) if split == "train" else 2,
            "split": split,
            "bucket": bucket,
            "index": index,
        }
        for bucket, counts in COUNTS.items()
        for split, count in counts.items()
        for index in range(count)
    ]
    rows.append({"source": 1, "split": "train", "bucket": None, "index": None})  # it was skipped
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("size", [1, 4])
def test_sources_are_mixed_by_their_weights(of_two_sources, size):
    clips = sum(_take(loader.make_loader(of_two_sources, "train", size, 0, weights=(3, 1)), 240 // size), [])
    counts = Counter((_source(int(clip.split()[1])), WIDE in clip) for clip in clips)
    # 3 : 1 by source; within a source by its clips in each bucket, here 2 : 1. To one batch of each stream.
    for own, expected in {(0, True): 120, (0, False): 60, (1, True): 40, (1, False): 20}.items():
        assert abs(counts[own] - expected) <= size
    each = Counter(clips)
    assert len(each) == 15 and max(each.values()) <= 22 and min(each.values()) >= 8
    if size > 1:  # a batch is of one bucket, and of both sources
        batches = [clips[start : start + size] for start in range(0, 240, size)]
        mixed = [len({_source(int(clip.split()[1])) for clip in batch}) == 2 for batch in batches]
        assert sum(mixed) > 50


def test_a_source_of_weight_0_is_left_out(of_two_sources):
    clips = sum(_take(loader.make_loader(of_two_sources, "train", 3, 0, weights=(0, 2)), 20), [])
    assert {_source(int(clip.split()[1])) for clip in clips} == {1} and len(set(clips)) == 6


def test_weighted_batches_resume_and_are_shared(of_two_sources):
    make = functools.partial(loader.make_loader, of_two_sources, "train", 4, 0, weights=(1, 2.5))
    whole = _take(make(), 9)
    halves = [_take(make(rows=rows), 9) for rows in ([0, 1], [2, 3])]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    stopped, again = make(), make()
    _take(stopped, 4)
    again.set_state(json.loads(json.dumps(stopped.get_state())))
    assert _take(again, 5) == whole[4:]


def test_weights_that_do_not_fit_are_refused(of_two_sources, unlabelled):
    listed = "0 /own/a: 9 clips, 1 /own/b: 6 clips, 2 /own/val: 0 clips"
    for weights, match in (
        ((1,), f"weights=.1,.: give one number for each source; .*train', {listed}"),
        ((1, 1, 1, 1), "give one number for each source"),
        ((1, 1, 1), "source 2 has no clip; "),
        ((0, 0), "no source is left"),
    ):
        with pytest.raises(UserError, match=match):
            loader.make_loader(of_two_sources, "train", 2, 0, weights=weights)
    with pytest.raises(UserError, match="does not say which source its clips are of"):
        loader.make_loader(unlabelled, "train", 2, 0, weights=(1, 2))
    with pytest.raises(
        UserError,
        match="has 6 training clips, fewer than config.batch_size=7: pass --config.batch_size=6 or less, ",
    ):
        loader.make_loader(of_two_sources, "train", 7, 0, weights=(0, 1))


def test_fields_that_are_zero_in_all_clips(data_dir, unlabelled):
    data = types.SimpleNamespace(dir=data_dir, side={})
    fields = ("category", "alignment", "alignment_present")
    assert loader.find_zero_fields(data, "train", fields) == (set(), 1)
    data.dir = unlabelled
    zero, looked = loader.find_zero_fields(data, "train", fields[1:])
    assert zero == set(fields[1:]) and looked == 15
    assert loader.find_zero_fields(data, "train", fields[1:], clips=4)[1] < 8
    assert loader.find_zero_fields(data, "train", ()) == (set(), 0)


def test_bucket_smaller_than_the_batch_repeats_within_it(data_dir):
    batches = _take(loader.make_loader(data_dir, "train", 15, seed=0), 3)
    (tall,) = [batch for batch in batches if TALL in batch[0]]
    assert Counter(tall) == {_name(TALL, "train", index): 3 for index in range(5)}


def test_one_pass_in_order(data_dir):
    batches = list(loader.make_loader(data_dir, "train", 4, seed=0, shuffle=False, repeat=False))
    expected = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3], [4]]
    assert [batch["index"].tolist() for batch in batches] == expected
    assert [batch["latents"].shape[1:] for batch in batches] == 3 * [SHAPES[WIDE]] + 2 * [SHAPES[TALL]]


@pytest.mark.parametrize("shares", [[[0, 1], [2, 3]], [[3], [1], [0], [2]], [[0, 1], [0, 1], [2, 3]]])
def test_processes_share_each_global_batch(data_dir, shares):
    # 10 and 5 records, batches of 4: epochs end inside a batch, where processes drift apart if done wrongly.
    def read(rows):
        iterator = loader.make_loader(data_dir, "train", 4, seed=3, rows=rows)
        batches = [next(iterator) for _ in range(15)]
        return [(batch["latents"].shape[1:], batch["id"].tolist()) for batch in batches]

    alone = read(None)
    for rows in shares:
        for (shape, whole), (part_shape, part) in zip(alone, read(rows), strict=True):
            assert part_shape == shape and part == [whole[row] for row in rows]
    everything = Counter(name for _, batch in alone for name in batch)
    assert len(everything) == 15 and set(everything.values()) == {4}  # epochs of both buckets


def test_one_pass_gives_every_record_once(data_dir):
    batches = list(loader.make_loader(data_dir, "train", 4, seed=3, repeat=False))
    assert sorted(len(batch["id"]) for batch in batches) == [1, 2, 4, 4, 4]  # of 10 and 5 records
    everything = Counter(name for batch in batches for name in batch["id"].tolist())
    assert len(everything) == 15 and set(everything.values()) == {1}


def _ids(batch):
    return {"id": batch["id"]}


@pytest.mark.parametrize("place, other", [(None, None), (_ids, _ids), (_ids, None), (None, _ids)])
def test_state_resumes_exactly(data_dir, place, other):
    iterator = loader.make_loader(data_dir, "train", 4, seed=5, place=place)
    _take(iterator, 3)
    state = iterator.get_state()
    rest = _take(iterator, 8)
    again = loader.make_loader(data_dir, "train", 4, seed=5, place=other)
    _take(again, 1)
    again.set_state(state)
    assert _take(again, 8) == rest


@pytest.mark.parametrize("place", [None, _ids])
def test_state_resumes_exactly_on_other_processes(data_dir, place):
    iterator = loader.make_loader(data_dir, "train", 4, seed=5, place=place)
    _take(iterator, 3)
    state = json.loads(json.dumps(iterator.get_state()))  # as a checkpoint keeps it
    rest = _take(iterator, 8)
    shares = []
    for rows in ([0, 1], [2, 3]):
        again = loader.make_loader(data_dir, "train", 4, seed=5, rows=rows, place=place)
        again.set_state(state)
        shares.append(_take(again, 8))
    assert [first + second for first, second in zip(*shares, strict=True)] == rest


def test_batches_are_placed_ahead_in_one_thread(data_dir):
    placed, third = [], threading.Event()

    def place(batch):
        placed.append((threading.get_ident(), batch["id"].tolist()))
        if len(placed) == 3:
            third.set()
        return len(placed)

    iterator = loader.make_loader(data_dir, "train", 4, seed=5, place=place)
    assert next(iterator) == 1
    assert third.wait(20)  # nobody asked for it
    iterator.close()
    assert {thread for thread, _ in placed} != {threading.get_ident()} and len(dict(placed)) == 1
    expected = _take(loader.make_loader(data_dir, "train", 4, seed=5), len(placed))
    assert [ids for _, ids in placed] == expected


def test_what_place_raises_arrives(data_dir):
    def place(batch):
        raise UserError("no room on the device")

    with pytest.raises(UserError, match="no room on the device"):
        next(loader.make_loader(data_dir, "train", 4, seed=5, place=place))


def test_empty_text(data_dir, tmp_path):
    text, mask = (loader.load_empty_text(data_dir)[name] for name in ("text", "text_mask"))
    assert text.shape == (LENGTH, WIDTH) and mask.tolist() == [True] + [False] * (LENGTH - 1)
    with pytest.raises(UserError, match="no training data"):
        loader.load_empty_text(tmp_path)
    shutil.copy(data_dir / "manifest.json", tmp_path)
    with pytest.raises(UserError, match="empty_text.npz is missing"):
        loader.load_empty_text(tmp_path)
    whole = (data_dir / "empty_text.npz").read_bytes()
    for part in (b"", whole[: len(whole) // 2], b"something else"):
        (tmp_path / "empty_text.npz").write_bytes(part)
        with pytest.raises(UserError, match="empty_text.npz is damaged"):
            loader.load_empty_text(tmp_path)


def test_one_of_a_thing_is_singular():
    assert [counted(n, "clip") for n in (0, 1, 2, 20_000)] == ["0 clips", "1 clip", "2 clips", "20,000 clips"]
    assert counted(1, "category", "categories") == "1 category" and counted(2, "y", "ies") == "2 ies"


def test_refusals(data_dir, tmp_path):
    with pytest.raises(UserError, match="no training data at .*nowhere; make it with: python -m"):
        loader.make_loader(tmp_path / "nowhere", "train", 4, seed=0)
    with pytest.raises(UserError, match="no split 'test'; it has train, val"):
        loader.make_loader(data_dir, "test", 4, seed=0)
    with pytest.raises(UserError, match="has 3 validation clips, fewer than config.batch_size=4: pass"):
        loader.make_loader(data_dir, "val", 4, seed=0)
    few = r"has 15 training clips \(3 of 18 went to validation\), fewer than config.batch_size=16: pass "
    with pytest.raises(UserError, match=f"{few}--config.batch_size=15 or less, or prepare more clips"):
        loader.make_loader(data_dir, "train", 16, seed=0)


def test_labels_of_another_data_set_are_refused(unlabelled, tmp_path):
    other = _label(tmp_path / "other", unlabelled, data_fingerprint="0")
    with pytest.raises(UserError, match="'alignment' of .*other belongs to another data set than "):
        loader.make_loader(unlabelled, "train", 4, seed=0, side={"alignment": other})
    with pytest.raises(UserError, match="belongs to another data set"):  # data instead of labels
        loader.make_loader(unlabelled, "train", 4, seed=0, side={"alignment": unlabelled})
    with pytest.raises(
        UserError, match="no 'alignment' at .*nowhere; make it with: python -m prophy_jax.label --vlm="
    ):
        loader.make_loader(unlabelled, "train", 4, seed=0, side={"alignment": tmp_path / "nowhere"})


def test_labels_that_do_not_match_are_refused(unlabelled, tmp_path):
    wrong = _label(tmp_path / "wrong", unlabelled, wrong=_name(WIDE, "train", 7))
    batches = loader.make_loader(
        unlabelled, "train", 5, seed=0, shuffle=False, repeat=False, side={"alignment": wrong}
    )
    next(batches)  # records 0 to 4
    message = f"record 7 of .* is '{_name(WIDE, 'train', 7)}', but in 'alignment' of .*wrong it is 'other'"
    with pytest.raises(UserError, match=message):
        next(batches)
    fewer = COUNTS | {TALL: {"train": 4, "val": 0}}
    fewer = _label(tmp_path / "fewer", unlabelled, buckets=fewer)
    with pytest.raises(UserError, match=f"5 records of {TALL}, split 'train', but .* has 4 examples"):
        loader.make_loader(unlabelled, "train", 4, seed=0, side={"alignment": fewer})
    without = _label(tmp_path / "without", unlabelled, buckets={WIDE: COUNTS[WIDE]})
    with pytest.raises(UserError, match=f"without/alignment/{TALL} is missing"):
        loader.make_loader(unlabelled, "train", 4, seed=0, side={"alignment": without})


def test_damaged_file_is_named(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    path = tmp_path / "data" / "records" / WIDE / "records-val.array_record-00000-of-00001"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"{path.name} is damaged"):
        next(loader.make_loader(tmp_path / "data", "val", 3, seed=0))


# --- Fields ------------------------------------------------------------------------------------------


def test_records_of_other_sizes_than_the_manifest_says_are_named(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    records.write_manifest(tmp_path / "data", records.read_manifest(data_dir) | {"text_dim": 7})
    with pytest.raises(UserError, match="record .* of .*data does not fit its manifest.json .*; make 'rec"):
        next(iter(loader.make_loader(tmp_path / "data", "train", 2, 0)))


def test_fields_are_of_the_shapes_that_are_compiled_for(data_dir):
    batch = next(loader.make_loader(data_dir, "val", 3, seed=0))
    expected = contract.shapes(contract.FIELDS, SIZES[WIDE], 3)
    assert {name: (array.shape, array.dtype) for name, array in batch.items() if name in expected} == {
        name: (struct.shape, struct.dtype) for name, struct in expected.items()
    }


def test_only_the_fields_asked_for_are_read(data_dir, unlabelled):
    batch = next(loader.make_loader(data_dir, "val", 3, seed=0, fields=["text", "category"]))
    assert set(batch) == {"text", "category", "id", "index"}
    whole = next(loader.make_loader(data_dir, "val", 3, seed=0))
    for key in batch:
        np.testing.assert_array_equal(batch[key], whole[key])
    nowhere = {"alignment": "nowhere"}  # is not looked for
    next(loader.make_loader(unlabelled, "val", 3, seed=0, side=nowhere, fields=["latents"]))


def test_a_field_is_a_row(unlabelled, data_dir, tmp_path, monkeypatch):
    """A side data set of its own, stored as it is: nothing but the row knows of it."""
    field = contract.Field(lambda sizes: (*sizes.token_grid, 3), np.float16, stored="teacher")
    monkeypatch.setitem(contract.FIELDS, "teacher", field)
    with pytest.raises(UserError, match="no 'teacher' for its clips.* --config.data.side.teacher=DIR"):
        loader.make_loader(unlabelled, "val", 3, seed=0, fields=["teacher"])
    assert "teacher" not in next(loader.make_loader(unlabelled, "val", 3, seed=0))
    job = Job(tmp_path / "teacher", {}, {"val": 1})
    features = records.features("teacher", SIZES[WIDE])
    values = {
        _name(WIDE, "val", index): np.random.default_rng(index)
        .normal(size=(*GRIDS[WIDE], 3))
        .astype(np.float16)
        for index in range(3)
    }
    with job.shard("val", 0) as file:
        for name, value in values.items():
            file.write(f"teacher/{WIDE}", features, {"id": name, "teacher": value})
    fingerprint = records.read_manifest(unlabelled)["fingerprint"]
    job.finish(lambda reports: ({f"teacher/{WIDE}": features}, {"data_fingerprint": fingerprint}))
    side = {"teacher": tmp_path / "teacher", "alignment": ""}
    batch = next(loader.make_loader(unlabelled, "val", 3, seed=0, side=side))
    for name, value in zip(batch["id"].tolist(), batch["teacher"], strict=True):
        np.testing.assert_array_equal(value, values[name])
    assert batch["teacher"].dtype == np.float16 and not batch["alignment"].any()


def test_a_field_that_the_records_were_made_without_is_named(data_dir, monkeypatch):
    monkeypatch.setitem(contract.FIELDS, "quantities", contract.Field(lambda sizes: (18,), np.float32))
    assert "quantities" not in next(loader.make_loader(data_dir, "val", 3, seed=0))
    with pytest.raises(UserError, match="no 'quantities' for its clips; make it with prophy_jax.prepare"):
        loader.make_loader(data_dir, "val", 3, seed=0, fields=["latents", "quantities"])
