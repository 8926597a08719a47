"""Parameter trees on disk: round trip, cast, placement, and what does not fit."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prophy_jax.run import checkpoints, checksums, parallel
from prophy_jax.run.errors import UserError
from prophy_jax.testing.counting import count_compiles

TREE = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}, "b": jnp.zeros((), jnp.int32)}


def like(tree, dtype=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), tree)


def test_round_trip_is_bit_equal_and_replaces_the_old_tree(tmp_path):
    folder = str(tmp_path / "tree")
    first = checkpoints.save_params(folder, TREE, {"step": 1})
    changed = {**TREE, "b": TREE["b"] + 1}
    second = checkpoints.save_params(folder, changed, {"step": 2})
    assert first != second
    loaded = checkpoints.load_params(folder, like(TREE), "")
    assert checkpoints.tree_hash(loaded) == second == checkpoints.read_manifest(folder, "")["sha256"]
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(changed), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert not (tmp_path / "tree.writing").exists()


def test_saving_arrays_of_many_devices_compiles_nothing(tmp_path):
    mesh = parallel.make_mesh({"data": 8, "fsdp": 1, "context": 1}, 8, jax.devices())
    tree = jax.device_put({"a": np.ones((16, 48)), "b": np.ones((24, 8))}, parallel.replicated(mesh))
    with count_compiles() as compiled:
        checkpoints.save_params(str(tmp_path / "tree"), tree, {})
    assert not compiled


def test_values_are_cast_to_the_wanted_dtype(tmp_path):
    folder = str(tmp_path / "tree")
    checkpoints.save_params(folder, {"a": TREE["a"]}, {})
    loaded = checkpoints.load_params(folder, like({"a": TREE["a"]}, jnp.bfloat16), "")
    assert loaded["a"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(loaded["a"]["kernel"].astype(jnp.float32), TREE["a"]["kernel"])


def test_everything_that_does_not_fit_is_named_at_once(tmp_path):
    folder = str(tmp_path / "tree")
    checkpoints.save_params(folder, TREE, {})
    wanted = like({"a": {"kernel": jnp.zeros((3, 2)), "scale": jnp.zeros(3)}, "b": TREE["b"]})
    with pytest.raises(UserError) as error:
        checkpoints.load_params(folder, wanted, "")
    message = str(error.value)
    assert "missing a/scale" in message and "unknown a/bias" in message
    assert "a/kernel is ((2, 3), 'float32'), the configuration wants ((3, 2), 'float32')" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_that_are_not_finite_are_named(tmp_path, value, dtype):
    folder, mesh = (
        str(tmp_path / "tree"),
        parallel.make_mesh({"data": 1, "fsdp": 8, "context": 1}, 8, jax.devices()),
    )
    tree = {"a": {"kernel": jnp.ones((16, 3)), "bias": jnp.ones(3)}, "b": jnp.zeros((), jnp.int32)}
    tree["a"]["kernel"] = tree["a"]["kernel"].at[15, 2].set(value)
    checkpoints.save_params(folder, tree, {})
    wanted = like(tree, dtype)
    for layout in (wanted, parallel.placed(wanted, parallel.shard_largest(wanted, mesh))):
        with pytest.raises(UserError, match=f"{folder} holds NaN or infinity in a/kernel: .*; convert it$"):
            checkpoints.load_params(folder, layout, "convert it")


def test_every_kind_of_float_is_looked_at():
    for dtype in (np.float16, jnp.bfloat16, np.float32, np.float64):
        largest = jnp.finfo(dtype).max
        array = np.array([[0.0, -largest], [largest, -0.0]], dtype)
        assert checkpoints.is_finite(array) and checkpoints.is_finite(array[:0])
        for value in (np.nan, -np.nan, np.inf, -np.inf):
            array[1, 1] = value
            assert not checkpoints.is_finite(array)


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        "3",
        "null",
        '{"sha256": "0", "shapes": []}',
        '{"sha256": 1, "shapes": {}}',
        '{"sha256": "0", "shapes": {"a": 3}}',
        '{"sha256": "0", "shapes": {}, "model": []}',
        '{"sha256": "0", "shapes": {}, "categories": [{}]}',
        '{"sha256": "0", "shapes": {}, "backbone_sha256": 3}',
        "[" * 100_000,
    ],
)
def test_a_damaged_manifest_is_one_line(tmp_path, content):
    checkpoints.save_params(str(tmp_path), {"a": jnp.ones(3)}, {})
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="manifest.json is .*: convert it"):
        checkpoints.check_params(str(tmp_path), like({"a": jnp.ones(3)}), "convert it")


@pytest.mark.parametrize("content", ["{}", "[]", "3", '{"tree_metadata": []}', "[" * 100_000, "7" * 5000])
def test_a_damaged_tree_is_one_line(tmp_path, content):
    folder = str(tmp_path / "tree")
    checkpoints.save_params(folder, TREE, {})
    (tmp_path / "tree" / "tree" / "_METADATA").write_text(content)
    with pytest.raises(UserError, match="is damaged.*: convert it"):
        checkpoints.load_params(folder, like(TREE), "convert it")


def test_missing_tree_names_the_remedy(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at .*nowhere: convert it"):
        checkpoints.load_params(str(tmp_path / "nowhere"), like(TREE), "convert it")


def test_hash_sees_values_shapes_dtypes_and_names():
    base = checkpoints.tree_hash({"a": np.zeros(4, np.float32)})
    for other in (
        {"a": np.array([0, 0, 0, -0.0], np.float32)},
        {"a": np.zeros((2, 2), np.float32)},
        {"a": np.zeros(4, np.int32)},
        {"b": np.zeros(4, np.float32)},
    ):
        assert checkpoints.tree_hash(other) != base


class Position:
    """A data iterator with a position of JSON types."""

    def __init__(self, step: int = 0):
        self.state = {"step": step}

    def get_state(self) -> dict:
        return self.state

    def set_state(self, state: dict) -> None:
        self.state = state


def flip_a_bit_of_each_file(folder):
    """Flips one bit in the middle of each file below `folder` in turn, and gives its path."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size):
        whole = path.read_bytes()
        place = len(whole) // 2
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        yield path
        path.write_bytes(whole)


def test_every_flipped_bit_of_parameters_is_found(tmp_path):
    folder = tmp_path / "tree"
    checkpoints.save_params(str(folder), TREE, {"model": {"dim": 48}, "step": 3})
    found = 0
    for path in flip_a_bit_of_each_file(folder):
        try:
            loaded = checkpoints.load_params(str(folder), like(TREE), "train again")
        except UserError as error:
            found += 1
            assert path.name in str(error) and "train again" in str(error)
        else:  # nothing is read from it
            assert path.name in checksums.MARKS and checkpoints.tree_hash(loaded) == checkpoints.tree_hash(
                TREE
            )
    assert found >= 4
    checkpoints.load_params(str(folder), like(TREE), "")
    assert set(checkpoints.read_manifest(str(folder), "")["files"]) >= {
        "tree/_METADATA",
        "tree/manifest.ocdbt",
    }


def test_a_checksum_that_was_taken_out_is_noticed(tmp_path):
    saved = checkpoints.TrainCheckpoints(str(tmp_path), keep=2)
    saved.save(1, TREE, Position(1), {"steps": 1})
    saved.close()
    file = tmp_path / "checkpoints" / "1" / checkpoints.CHECKSUMS
    listed = json.loads(file.read_text())
    for name in listed:
        rest = {key: value for key, value in listed.items() if key != name}
        file.write_text(json.dumps(rest))
        if name == "checksum":  # of the rest; without it the file is as earlier versions wrote it
            checkpoints.verify_checkpoint(str(file.parent), "")
            assert checkpoints._sum_of(str(file.parent)) == checksums.hash_json(rest)
        else:
            with pytest.raises(UserError, match="checksums.json is damaged.*: delete it"):
                checkpoints.verify_checkpoint(str(file.parent), "delete it")


def test_every_flipped_bit_of_a_training_checkpoint_is_found(tmp_path):
    saved = checkpoints.TrainCheckpoints(str(tmp_path), keep=2)
    for step in (1, 2):
        saved.save(step, TREE, Position(step), {"steps": step})
    saved.close()
    found = 0
    for path in flip_a_bit_of_each_file(tmp_path / "checkpoints" / "2"):
        again, position = checkpoints.TrainCheckpoints(str(tmp_path), keep=2), Position()
        try:
            state = again.restore(2, like(TREE), position)
        except UserError as error:
            found += 1
            assert str(path) in str(error) or path.name == checkpoints.CHECKSUMS, error
            assert f"delete {tmp_path}/checkpoints/2 to resume from step 1" in str(error)
        else:
            assert path.name in checksums.MARKS
            assert position.state == {"step": 2}
            assert checkpoints.tree_hash(state) == checkpoints.tree_hash(TREE)
        again.close()
    assert found >= 6


def test_what_a_killed_process_left_of_an_old_checkpoint_goes(tmp_path):
    saved = checkpoints.TrainCheckpoints(str(tmp_path), keep=2)
    for step in (9, 10):
        saved.save(step, {"a": jnp.ones(4)}, Position(), {})
    saved.close()
    (tmp_path / "checkpoints" / "8" / "state").mkdir(parents=True)  # it was being removed
    saved = checkpoints.TrainCheckpoints(str(tmp_path), keep=2)
    assert saved.latest() == 10 and sorted(os.listdir(saved.folder)) == ["10", "9"]
    saved.close()


def test_a_file_that_is_gone_and_one_that_is_cut_are_named(tmp_path):
    checkpoints.save_params(str(tmp_path / "tree"), TREE, {})
    (tmp_path / "tree" / "tree" / "_METADATA").unlink()
    with pytest.raises(UserError, match="_METADATA cannot be read .No such file.*: train again"):
        checkpoints.load_params(str(tmp_path / "tree"), like(TREE), "train again")
    checkpoints.save_params(str(tmp_path / "tree"), TREE, {})
    (data,) = (tmp_path / "tree" / "tree" / "d").iterdir()
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{data.name} is damaged, it has .* bytes and not the"):
        checkpoints.load_params(str(tmp_path / "tree"), like(TREE), "train again")


def test_verification_can_be_switched_off_and_folders_of_earlier_versions_load(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "tree"
    checkpoints.save_params(str(folder), TREE, {})
    (folder / "tree" / "added").write_bytes(b"")  # nobody reads it
    with monkeypatch.context() as patch:
        patch.setattr(checksums, "enabled", False)
        (folder / "tree" / "_sharding").write_bytes(b"")
        checkpoints.load_params(str(folder), like(TREE), "")
    assert "no checksums" not in capsys.readouterr().out
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"], manifest["checksum"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    checkpoints.load_params(str(folder), like(TREE), "")
    assert "has no checksums, it is of an earlier version" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"tree_metadata": {"a": 3}}', "[" * 100_000, "7" * 5000]
)
def test_a_damaged_checkpoint_of_a_run_is_one_line(tmp_path, content):
    saved = checkpoints.TrainCheckpoints(str(tmp_path), keep=1)
    saved.save(1, {"a": jnp.ones(3)}, Position(), {})
    saved.close()
    (tmp_path / "checkpoints" / "1" / "state" / "_METADATA").write_text(content)
    saved = checkpoints.TrainCheckpoints(str(tmp_path), keep=1)
    with pytest.raises(UserError, match="state/_METADATA is damaged.*: delete .*/1 to resume from the beg"):
        saved.restore(1, like({"a": jnp.ones(3)}), Position())
    saved.close()
