"""The loader: batch contract, determinism, slices per process, exact resume, refusals."""

from collections import Counter

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from prophy_jax.data import loader, records
from prophy_jax.errors import UserError

NUM_TOKENS, LENGTH, WIDTH = 8, 6, 5
COUNTS = {"train": 10, "val": 3}


def _present(index: int) -> np.ndarray:
    return (np.arange(17) == index).astype(np.float32)


def _make(folder, alignment: bool = True, wrong_id: bool = False, alignment_count: int = 10):
    features = records.record_features((2, 4, 4, 16), WIDTH)
    writer = records.Writer(folder / "records", "records", features)
    for split, count in COUNTS.items():
        for index in range(count):
            example = {
                "id": f"{split}{index}",
                "caption": "",
                "latents": np.full((2, 4, 4, 16), index, np.float32),
                "text": np.full((1 + index % LENGTH, WIDTH), 1.0 + index, np.float32),
                "category": _present(index),
            }
            writer.write(split, example)
    writer.close()
    if alignment:
        features = records.alignment_features(NUM_TOKENS)
        writer = records.Writer(folder / "alignment", "alignment", features)
        for split, count in (COUNTS | {"train": alignment_count}).items():
            for index in range(count):
                name = f"{split}{index}" if not (wrong_id and index == 7) else "other"
                target = np.full((NUM_TOKENS, 17), 0.5 + index, np.float32)
                writer.write(split, {"id": name, "alignment": target, "present": _present(index)})
        writer.close()
    records.write_manifest(folder, {"text_length": LENGTH, "num_tokens": NUM_TOKENS})
    text, mask = np.ones((LENGTH, WIDTH), np.float32), np.arange(LENGTH) < 1
    np.savez(folder / "empty_text.npz", text=text, mask=mask)
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return _make(tmp_path_factory.mktemp("data"))


def _indices(iterator, batches: int) -> list[list[int]]:
    return [next(iterator)["index"].tolist() for _ in range(batches)]


def test_batch_contract(data_dir):
    batch = next(loader.make_loader(data_dir, "train", 4, seed=0))
    shapes = {key: (value.shape, value.dtype) for key, value in batch.items() if key != "id"}
    assert shapes == {
        "latents": ((4, 2, 4, 4, 16), np.float32),
        "text": ((4, LENGTH, WIDTH), np.float32),
        "text_mask": ((4, LENGTH), bool),
        "category": ((4, 17), np.float32),
        "alignment": ((4, NUM_TOKENS, 17), np.float32),
        "alignment_present": ((4, 17), np.float32),
        "index": ((4,), np.int64),
    }
    assert batch["id"].tolist() == [f"train{index}" for index in batch["index"]]
    for row, index in enumerate(batch["index"]):
        assert (batch["latents"][row] == index).all()
        assert (batch["alignment"][row] == 0.5 + index).all()
        np.testing.assert_array_equal(batch["alignment_present"][row], _present(index))
        np.testing.assert_array_equal(batch["category"][row], _present(index))
        mask = np.arange(LENGTH) < 1 + index % LENGTH
        np.testing.assert_array_equal(batch["text_mask"][row], mask)
        assert (batch["text"][row][mask] == 1 + index).all() and not batch["text"][row][~mask].any()


def test_without_alignment_labels(tmp_path):
    batch = next(loader.make_loader(_make(tmp_path, alignment=False), "val", 3, seed=0))
    assert batch["alignment"].shape == (3, NUM_TOKENS, 17) and not batch["alignment"].any()
    assert batch["alignment_present"].shape == (3, 17) and not batch["alignment_present"].any()


def test_seed_decides_the_order_and_epochs_differ(data_dir):
    first = _indices(loader.make_loader(data_dir, "train", 5, seed=1), 4)
    assert first == _indices(loader.make_loader(data_dir, "train", 5, seed=1), 4)
    assert first != _indices(loader.make_loader(data_dir, "train", 5, seed=2), 4)
    epochs = [first[0] + first[1], first[2] + first[3]]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]


def test_one_pass_in_order(data_dir):
    batches = loader.make_loader(data_dir, "train", 4, seed=0, shuffle=False, repeat=False)
    expected = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [batch["index"].tolist() for batch in batches] == expected


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_each_global_batch(data_dir, processes):
    # 10 records, batches of 4: epochs end inside a batch, where slices drift apart if done wrongly.
    alone = _indices(loader.make_loader(data_dir, "train", 4, seed=3), 10)
    shares = [
        _indices(
            loader.make_loader(data_dir, "train", 4, seed=3, process_index=rank, process_count=processes),
            10,
        )
        for rank in range(processes)
    ]
    together = [sorted(sum(parts, [])) for parts in zip(*shares, strict=True)]
    assert together == [sorted(batch) for batch in alone]
    # 10 batches of 4 are 4 epochs: every record came exactly 4 times over all processes.
    assert Counter(sum(together, [])) == {index: 4 for index in range(10)}


def test_state_resumes_exactly(data_dir):
    iterator = loader.make_loader(data_dir, "train", 4, seed=5)
    _indices(iterator, 3)
    state = iterator.get_state()
    rest = _indices(iterator, 6)
    again = loader.make_loader(data_dir, "train", 4, seed=5)
    _indices(again, 1)
    again.set_state(state)
    assert _indices(again, 6) == rest


def test_checkpoint_resumes_exactly(data_dir, tmp_path):
    iterator = loader.make_loader(data_dir, "train", 4, seed=5)
    _indices(iterator, 3)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        rest = _indices(iterator, 6)
        again = loader.make_loader(data_dir, "train", 4, seed=5)
        restore = grain.checkpoint.CheckpointRestore(again)
        restored = manager.restore(3, args=ocp.args.Composite(data=restore))["data"]
    assert _indices(restored, 6) == rest


def test_empty_text(data_dir, tmp_path):
    text, mask = loader.load_empty_text(data_dir)
    assert text.shape == (LENGTH, WIDTH) and mask.tolist() == [True] + [False] * (LENGTH - 1)
    with pytest.raises(UserError, match="no training data"):
        loader.load_empty_text(tmp_path)


def test_refusals(data_dir, tmp_path):
    with pytest.raises(UserError, match="no training data at .*nowhere; make it with: python -m"):
        loader.make_loader(tmp_path / "nowhere", "train", 4, seed=0)
    with pytest.raises(UserError, match="no split 'test'"):
        loader.make_loader(data_dir, "test", 4, seed=0)
    with pytest.raises(UserError, match="has 3 records, fewer than the batch size 4"):
        loader.make_loader(data_dir, "val", 4, seed=0)
    with pytest.raises(UserError, match="batch size 4 does not divide over 3 processes"):
        loader.make_loader(data_dir, "train", 4, seed=0, process_count=3)


def test_labels_of_another_data_set_are_refused(tmp_path):
    iterator = loader.make_loader(_make(tmp_path / "ids", wrong_id=True), "train", 10, seed=0, repeat=False)
    with pytest.raises(UserError, match="record 7 is 'train7' but its alignment .* of 'other'"):
        next(iterator)
    with pytest.raises(UserError, match="10 records but 9 alignment labels"):
        loader.make_loader(_make(tmp_path / "count", alignment_count=9), "train", 4, seed=0)
