"""Parameter trees on disk: round trip, cast, placement, and what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prophy_jax.run import checkpoints, parallel
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
    with pytest.raises(UserError, match="tree is damaged .*: convert it"):
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


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"tree_metadata": {"a": 3}}', "[" * 100_000, "7" * 5000]
)
def test_a_damaged_checkpoint_of_a_run_is_one_line(tmp_path, content):
    class Data:
        def get_state(self):
            return {}

    saved = checkpoints.TrainCheckpoints(str(tmp_path), keep=1)
    saved.save(1, {"a": jnp.ones(3)}, Data(), {})
    saved.close()
    (tmp_path / "checkpoints" / "1" / "state" / "_METADATA").write_text(content)
    saved = checkpoints.TrainCheckpoints(str(tmp_path), keep=1)
    with pytest.raises(UserError, match="checkpoints/1/state is not a whole checkpoint; delete it"):
        saved.restore(1, like({"a": jnp.ones(3)}), Data())
    saved.close()
