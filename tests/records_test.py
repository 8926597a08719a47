"""Records on disk: round trip, shards, atomic folders, manifest and missing files."""

import json
import os

import numpy as np
import pytest
import tensorflow_datasets as tfds

from prophy_jax.data import records
from prophy_jax.errors import UserError


def _example(index: int) -> dict:
    rng = np.random.default_rng(index)
    return {
        "id": f"clip{index}",
        "caption": f"Ein Ball fällt, {index}",
        "latents": rng.standard_normal((2, 4, 4, 16)).astype(np.float32),
        "text": rng.standard_normal((1 + index % 3, 8)).astype(np.float32),
        "category": (np.arange(17) == index % 17).astype(np.float32),
    }


def _write(folder, counts: dict[str, int]) -> records.Writer:
    writer = records.Writer(folder, "records", records.record_features((2, 4, 4, 16), 8))
    for split, count in counts.items():
        for index in range(count):
            writer.write(split, _example(index))
    writer.close()
    return writer


def test_round_trip_is_bit_equal(tmp_path):
    writer = _write(tmp_path / "records", {"train": 5, "val": 2})
    assert writer.counts == {"train": 5, "val": 2}
    source = records.open_source(tmp_path, "records", "train")
    assert len(source) == 5
    for index in (4, 0, 2):  # random access
        expected, stored = _example(index), source[index]
        assert stored["id"].decode() == expected["id"]
        assert stored["caption"].decode() == expected["caption"]
        for key in ("latents", "text", "category"):
            np.testing.assert_array_equal(stored[key], expected[key])
            assert stored[key].dtype == np.float32


def test_alignment_round_trip(tmp_path):
    alignment = np.zeros((8, 17), np.float32)
    alignment[3, 5] = 0.25
    writer = records.Writer(tmp_path / "alignment", "alignment", records.alignment_features(8))
    writer.write("train", {"id": "a", "alignment": alignment, "present": alignment[3]})
    writer.close()
    stored = records.open_source(tmp_path, "alignment", "train")[0]
    np.testing.assert_array_equal(stored["alignment"], alignment)
    np.testing.assert_array_equal(stored["present"], alignment[3])


def test_plain_tfds_reads_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "SHARD_BYTES", 3_000)  # a record is about 2.3 kB
    _write(tmp_path / "records", {"train": 3, "val": 1})
    names = sorted(path.name for path in (tmp_path / "records").glob("*.array_record-*"))
    assert names == [
        "records-train.array_record-00000-of-00003",
        "records-train.array_record-00001-of-00003",
        "records-train.array_record-00002-of-00003",
        "records-val.array_record-00000-of-00001",
    ]
    source = tfds.builder_from_directory(tmp_path / "records").as_data_source("train")
    assert [example["id"] for example in source] == [b"clip0", b"clip1", b"clip2"]


def test_unknown_split_and_missing_shard(tmp_path):
    _write(tmp_path / "records", {"train": 1})
    with pytest.raises(UserError, match=r"no split 'test'; it has \['train'\]"):
        records.open_source(tmp_path, "records", "test")
    next((tmp_path / "records").glob("*.array_record-*")).unlink()
    with pytest.raises(UserError, match="00000-of-00001 is missing"):
        records.open_source(tmp_path, "records", "train")


def test_new_folder_appears_only_when_complete(tmp_path):
    with records.new_folder(tmp_path / "deep" / "out") as partial:
        (partial / "file").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert os.listdir(tmp_path / "deep") == ["out"]
    assert (tmp_path / "deep" / "out" / "file").read_text() == "x"


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_new_folder_leaves_nothing_behind_on_failure(tmp_path, failure):
    with pytest.raises(failure), records.new_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
        raise failure
    assert os.listdir(tmp_path) == []


def test_new_folder_never_overwrites(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out already exists"), records.new_folder(tmp_path / "out"):
        pass
    with pytest.raises(UserError, match="appeared"), records.new_folder(tmp_path / "late"):
        (tmp_path / "late").mkdir()
    assert sorted(os.listdir(tmp_path)) == ["late", "out"]
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(UserError, match="cannot create"),
        records.new_folder(tmp_path / "file" / "out"),
    ):
        pass


def test_manifest(tmp_path):
    with pytest.raises(UserError, match="no training data at .* prophy_jax.prepare --config"):
        records.read_manifest(tmp_path)
    records.write_manifest(tmp_path, {"num_tokens": 8})
    assert records.read_manifest(tmp_path) == {"schema_version": 1, "num_tokens": 8}
    (tmp_path / "manifest.json").write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(UserError, match="schema version 99"):
        records.read_manifest(tmp_path)
    for damage in ("{", "{}", "[]"):
        (tmp_path / "manifest.json").write_text(damage)
        with pytest.raises(UserError, match="is damaged"):
            records.read_manifest(tmp_path)
