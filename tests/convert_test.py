"""Conversion of Wan2.1 weights: names, exact round trips, files, errors that name everything."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import wan as convert_wan
from prophy_jax.errors import UserError
from prophy_jax.models import wan

CONFIG = wan.build(dim=24, num_heads=2, num_layers=3, ffn_dim=32, text_dim=8).config
WRITE = {"official": convert_wan.to_official, "diffusers": convert_wan.to_diffusers}


def random_tensors(naming: str, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = convert_wan.tensor_shapes(CONFIG, naming)
    return {n: rng.standard_normal(s, np.float32).astype(dtype) for n, s in shapes.items()}


def assert_same(got, want):
    """Equal structure, dtype and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("naming", WRITE)
@pytest.mark.parametrize(("config", "count"), [(wan.WAN_1_3B, 825), (wan.WAN_14B, 1095)])
def test_public_sizes_have_the_public_tensor_count(naming, config, count):
    shapes = convert_wan.tensor_shapes(config, naming)
    assert len(shapes) == count
    assert shapes["patch_embedding.weight"] == (config.dim, 16, 1, 2, 2)


def test_names_and_shapes_of_the_published_1_3b_files():
    official = {
        "time_embedding.0.weight": (1536, 256),
        "time_projection.1.bias": (9216,),
        "text_embedding.0.weight": (1536, 4096),
        "blocks.29.modulation": (1, 6, 1536),
        "blocks.0.self_attn.norm_q.weight": (1536,),
        "blocks.0.norm3.bias": (1536,),
        "blocks.0.cross_attn.o.weight": (1536, 1536),
        "blocks.0.ffn.0.weight": (8960, 1536),
        "blocks.0.ffn.2.weight": (1536, 8960),
        "head.modulation": (1, 2, 1536),
        "head.head.weight": (64, 1536),
    }
    diffusers = {
        "condition_embedder.time_embedder.linear_1.weight": (1536, 256),
        "condition_embedder.time_proj.bias": (9216,),
        "condition_embedder.text_embedder.linear_1.weight": (1536, 4096),
        "blocks.29.scale_shift_table": (1, 6, 1536),
        "blocks.0.attn1.norm_q.weight": (1536,),
        "blocks.0.norm2.bias": (1536,),
        "blocks.0.attn2.to_out.0.weight": (1536, 1536),
        "blocks.0.ffn.net.0.proj.weight": (8960, 1536),
        "blocks.0.ffn.net.2.weight": (1536, 8960),
        "scale_shift_table": (1, 2, 1536),
        "proj_out.weight": (64, 1536),
    }
    assert official.items() <= convert_wan.tensor_shapes(wan.WAN_1_3B, "official").items()
    assert diffusers.items() <= convert_wan.tensor_shapes(wan.WAN_1_3B, "diffusers").items()


@pytest.mark.parametrize("naming", WRITE)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_round_trips_are_exact(naming, dtype):
    tensors = random_tensors(naming, dtype)
    params = convert_wan.read_dit(tensors, CONFIG)
    shapes = jax.eval_shape(wan.Wan(CONFIG).init, jax.random.key(0))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    assert_same(WRITE[naming](params, CONFIG), tensors)
    for write in WRITE.values():
        assert_same(convert_wan.read_dit(write(params, CONFIG), CONFIG), params)


def test_layouts():
    tensors = random_tensors("official")
    params = convert_wan.read_dit(tensors, CONFIG)
    np.testing.assert_array_equal(
        params["blocks"]["ffn"]["up"]["kernel"][2], tensors["blocks.2.ffn.0.weight"].T
    )
    # Our patches are flattened (pt, ph, pw, c): row 1, column 0, channel 5 of a patch.
    np.testing.assert_array_equal(
        params["embed"]["patch"]["kernel"][2 * 16 + 5],
        tensors["patch_embedding.weight"][:, 5, 0, 1, 0],
    )


@pytest.mark.parametrize("naming", WRITE)
def test_files_single_sharded_and_by_directory(tmp_path, naming):
    tensors = random_tensors(naming, ml_dtypes.bfloat16)
    params = convert_wan.read_dit(tensors, CONFIG)

    single = tmp_path / "single" / "diffusion_pytorch_model.safetensors"
    single.parent.mkdir()
    save_file(tensors, single)
    assert_same(convert_wan.read_dit(single, CONFIG), params)
    assert_same(convert_wan.read_dit(str(single.parent), CONFIG), params)

    index = tmp_path / "sharded" / "diffusion_pytorch_model.safetensors.index.json"
    index.parent.mkdir()
    shard_of = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shard_of.values()):
        save_file({n: t for n, t in tensors.items() if shard_of[n] == shard}, index.parent / shard)
    index.write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    assert_same(convert_wan.read_dit(index, CONFIG), params)
    assert_same(convert_wan.read_dit(index.parent, CONFIG), params)

    (index.parent / "part-1.safetensors").unlink()
    with pytest.raises(UserError, match="part-1.safetensors"):
        convert_wan.read_dit(index, CONFIG)


def test_one_error_names_every_problem(tmp_path):
    tensors = random_tensors("diffusers")
    del tensors["proj_out.bias"], tensors["blocks.1.attn1.to_q.weight"]
    tensors["blocks.0.attn2.add_k_proj.weight"] = np.zeros((24, 24), np.float32)
    tensors["blocks.3.norm2.weight"] = np.zeros(24, np.float32)
    tensors["patch_embedding.weight"] = np.zeros((24, 36, 1, 2, 2), np.float32)
    save_file(tensors, tmp_path / "a.safetensors")
    twice = "blocks.2.ffn.net.2.bias"
    save_file({twice: tensors[twice]}, tmp_path / "b.safetensors")
    with pytest.raises(UserError) as caught:
        convert_wan.read_dit(tmp_path, CONFIG)
    message = str(caught.value)
    for part in (
        "diffusers naming",
        "missing proj_out.bias",
        "missing blocks.1.attn1.to_q.weight",
        "unknown blocks.0.attn2.add_k_proj.weight",
        "unknown blocks.3.norm2.weight",
        f"duplicate {twice}",
        "patch_embedding.weight is (24, 36, 1, 2, 2), not (24, 16, 1, 2, 2)",
    ):
        assert part in message
    assert message.count(";") == 5


def test_files_that_are_something_else(tmp_path):
    with pytest.raises(UserError, match="nowhere.safetensors"):
        convert_wan.read_dit(tmp_path / "nowhere.safetensors", CONFIG)
    with pytest.raises(UserError, match="holds no .safetensors"):
        convert_wan.read_dit(tmp_path, CONFIG)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"not a header")
    with pytest.raises(UserError, match="torn.safetensors"):
        convert_wan.read_dit(torn, CONFIG)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[]")
    with pytest.raises(UserError, match="index"):
        convert_wan.read_dit(index, CONFIG)
    other = tmp_path / "vae.safetensors"
    save_file({"decoder.conv1.weight": np.zeros(3, np.float32)}, other)
    with pytest.raises(UserError, match="right file"):
        convert_wan.read_dit(other, CONFIG)


def test_writing_refuses_a_tree_that_is_not_the_model():
    params = convert_wan.read_dit(random_tensors("official"), CONFIG)
    params["blocks"]["self_attn"]["q"]["lora_a"] = np.zeros((3, 24, 4), np.float32)
    params["head"]["out"]["bias"] = np.zeros(63, np.float32)
    del params["embed"]["patch"]["bias"]
    with pytest.raises(UserError) as caught:
        convert_wan.to_official(params, CONFIG)
    for part in ("unknown blocks/self_attn/q/lora_a", "missing embed/patch/bias", "(63,)"):
        assert part in str(caught.value)
