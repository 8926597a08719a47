"""Key tables of Wan2.1: names, layouts, exact round trips in memory, errors that name everything."""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest

from convert import leaves as lv
from convert import t5 as convert_t5
from convert import wan as convert_wan
from prophy_jax.models import wan
from prophy_jax.models.codecs import wan_vae
from prophy_jax.models.text import t5
from prophy_jax.run import checkpoints
from prophy_jax.run.errors import UserError
from tests import state_dicts

NAMINGS = ("official", "diffusers")
DIT = wan.build(dim=24, num_heads=2, num_layers=3, ffn_dim=32, text_dim=8)
VAE = wan_vae.build(base_dim=8)
UMT5 = t5.build(vocab_size=30, d_model=12, d_kv=5, d_ff=20, num_layers=3, num_heads=2, shared_bias=False)
T5 = t5.build(vocab_size=30, d_model=12, d_kv=5, d_ff=20, num_layers=3, num_heads=2, shared_bias=True)

MODELS = {
    "transformer": (DIT, functools.partial(convert_wan.dit_leaves, DIT.config)),
    "vae": (VAE, functools.partial(convert_wan.vae_leaves, VAE.config)),
    "umt5": (UMT5, functools.partial(convert_t5.leaves, UMT5.config)),
    "t5": (T5, functools.partial(convert_t5.leaves, T5.config)),
}


def random_tensors(table, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = lv.tensor_shapes(table)
    return {n: rng.standard_normal(s, np.float32).astype(dtype) for n, s in shapes.items()}


def assert_same(got, want):
    """Equal structure, dtype and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("naming", NAMINGS)
def test_public_sizes_have_the_public_tensors(naming):
    tables = {
        (825, 1_418_996_800): convert_wan.dit_leaves(wan.WAN_1_3B, naming),
        (1095, 14_288_491_584): convert_wan.dit_leaves(wan.WAN_14B, naming),
        (194, 126_892_531): convert_wan.vae_leaves(wan_vae.WanVAEConfig(), naming),
        (242, 5_680_910_336): convert_t5.leaves(t5.UMT5_XXL, naming),
    }
    for (count, parameters), table in tables.items():
        shapes = lv.tensor_shapes(table)
        assert len(shapes) == count
        assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters


def test_names_and_shapes_of_the_published_transformer():
    official = {
        "patch_embedding.weight": (1536, 16, 1, 2, 2),
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
    assert official.items() <= lv.tensor_shapes(convert_wan.dit_leaves(wan.WAN_1_3B, "official")).items()
    assert diffusers.items() <= lv.tensor_shapes(convert_wan.dit_leaves(wan.WAN_1_3B, "diffusers")).items()


def test_names_and_shapes_of_the_published_vae():
    """A row of each kind: (our path, official, diffusers, shape)."""
    rows = [
        ("quant_conv/kernel", "conv1.weight", "quant_conv.weight", (32, 32, 1, 1, 1)),
        ("post_quant_conv/bias", "conv2.bias", "post_quant_conv.bias", (16,)),
        ("encoder/conv_in/kernel", "encoder.conv1.weight", "encoder.conv_in.weight", (96, 3, 3, 3, 3)),
        ("decoder/norm_out/scale", "decoder.head.0.gamma", "decoder.norm_out.gamma", (96, 1, 1, 1)),
        ("decoder/conv_out/kernel", "decoder.head.2.weight", "decoder.conv_out.weight", (3, 96, 3, 3, 3)),
        (
            "encoder/mid_block/resnets/1/norm2/scale",
            "encoder.middle.2.residual.3.gamma",
            "encoder.mid_block.resnets.1.norm2.gamma",
            (384, 1, 1, 1),
        ),
        (
            "decoder/mid_block/attentions/0/norm/scale",
            "decoder.middle.1.norm.gamma",
            "decoder.mid_block.attentions.0.norm.gamma",
            (384, 1, 1),
        ),
        (
            "encoder/mid_block/attentions/0/to_qkv/kernel",
            "encoder.middle.1.to_qkv.weight",
            "encoder.mid_block.attentions.0.to_qkv.weight",
            (1152, 384, 1, 1),
        ),
        (
            "encoder/down_blocks/3/conv_shortcut/kernel",
            "encoder.downsamples.3.shortcut.weight",
            "encoder.down_blocks.3.conv_shortcut.weight",
            (192, 96, 1, 1, 1),
        ),
        (
            "encoder/down_blocks/5/time_conv/kernel",
            "encoder.downsamples.5.time_conv.weight",
            "encoder.down_blocks.5.time_conv.weight",
            (192, 192, 3, 1, 1),
        ),
        (
            "decoder/up_blocks/1/resnets/0/conv2/kernel",
            "decoder.upsamples.4.residual.6.weight",
            "decoder.up_blocks.1.resnets.0.conv2.weight",
            (384, 384, 3, 3, 3),
        ),
        (
            "decoder/up_blocks/2/upsamplers/0/resample/1/kernel",
            "decoder.upsamples.11.resample.1.weight",
            "decoder.up_blocks.2.upsamplers.0.resample.1.weight",
            (96, 192, 3, 3),
        ),
        (
            "decoder/up_blocks/3/resnets/2/conv1/bias",
            "decoder.upsamples.14.residual.2.bias",
            "decoder.up_blocks.3.resnets.2.conv1.bias",
            (96,),
        ),
    ]
    for column, naming in enumerate(NAMINGS, start=1):
        table = convert_wan.vae_leaves(wan_vae.WanVAEConfig(), naming)
        for row in rows:
            assert (table[row[0]].names, table[row[0]].torch_shape) == ((row[column],), row[3])


def test_names_and_shapes_of_the_published_text_encoder():
    official = {
        "token_embedding.weight": (256384, 4096),
        "blocks.23.pos_embedding.embedding.weight": (32, 64),
        "blocks.0.norm1.weight": (4096,),
        "blocks.7.attn.o.weight": (4096, 4096),
        "blocks.0.ffn.gate.0.weight": (10240, 4096),
        "blocks.0.ffn.fc2.weight": (4096, 10240),
        "norm.weight": (4096,),
    }
    transformers = {
        "shared.weight": (256384, 4096),
        "encoder.block.23.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64),
        "encoder.block.0.layer.0.layer_norm.weight": (4096,),
        "encoder.block.7.layer.0.SelfAttention.o.weight": (4096, 4096),
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (10240, 4096),
        "encoder.block.0.layer.1.DenseReluDense.wo.weight": (4096, 10240),
        "encoder.final_layer_norm.weight": (4096,),
    }
    for naming, names in (("official", official), ("diffusers", transformers)):
        table = convert_t5.leaves(t5.UMT5_XXL, naming)
        assert names.items() <= lv.tensor_shapes(table).items()
    table = convert_t5.leaves(t5.UMT5_XXL, "diffusers")
    assert table["blocks/ffn/gate/kernel"].names[0].endswith("wi_0.weight")
    assert table["blocks/ffn/up/kernel"].names[0].endswith("wi_1.weight")


@pytest.mark.parametrize("part", MODELS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_round_trips_are_exact(part, dtype):
    model, leaves = MODELS[part]
    hashes = set()
    for naming in NAMINGS:
        tensors = random_tensors(leaves(naming), dtype)
        params = state_dicts.read(tensors, leaves(naming))
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0)))
        assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
        assert_same(state_dicts.write(params, leaves(naming)), tensors)
        for other in NAMINGS:
            assert_same(state_dicts.read(state_dicts.write(params, leaves(other)), leaves(other)), params)
            again = state_dicts.read(state_dicts.write(params, leaves(other)), leaves(other))
            hashes.add((naming, checkpoints.tree_hash(again)))
    assert len(hashes) == len(NAMINGS)  # The naming of the file does not change the hash.


def test_layouts_of_kernels():
    table = convert_wan.dit_leaves(DIT.config, "official")
    tensors = random_tensors(table)
    params = state_dicts.read(tensors, table)
    np.testing.assert_array_equal(
        params["blocks"]["ffn"]["up"]["kernel"][2], tensors["blocks.2.ffn.0.weight"].T
    )
    # Our patches are flattened (pt, ph, pw, c): row 1, column 0, channel 5 of a patch.
    np.testing.assert_array_equal(
        params["embed"]["patch"]["kernel"][2 * 16 + 5],
        tensors["patch_embedding.weight"][:, 5, 0, 1, 0],
    )
    table = convert_wan.vae_leaves(VAE.config, "official")
    tensors = random_tensors(table)
    params = state_dicts.read(tensors, table)
    kernel = params["decoder"]["conv_in"]["kernel"]  # (T, H, W, I, O)
    np.testing.assert_array_equal(kernel[2, 0, 1, 7], tensors["decoder.conv1.weight"][:, 7, 2, 0, 1])
    kernel = params["encoder"]["down_blocks"]["2"]["resample"]["1"]["kernel"]  # (H, W, I, O)
    np.testing.assert_array_equal(
        kernel[2, 1, 5], tensors["encoder.downsamples.2.resample.1.weight"][:, 5, 2, 1]
    )


@pytest.mark.parametrize("part", MODELS)
def test_rows_of_a_tensor_have_the_place_that_the_whole_tensor_gives_them(part):
    _, leaves = MODELS[part]
    table = leaves("official")
    tensors = random_tensors(table)
    for path, leaf in table.items():
        tensor = tensors[leaf.names[0]]
        whole = leaf.from_torch(tensor)
        assert whole.shape == leaf.piece_shape
        if leaf.transposed:
            np.testing.assert_array_equal(leaf.from_torch(tensor[1:3]), whole[..., 1:3], err_msg=path)
        elif tensor.shape == leaf.piece_shape:
            np.testing.assert_array_equal(leaf.from_torch(tensor[1:3]), whole[1:3], err_msg=path)


@pytest.mark.parametrize("naming", NAMINGS)
def test_the_naming_is_recognised(naming):
    for _, leaves in MODELS.values():
        tables = {name: leaves(name) for name in NAMINGS}
        names = sorted(lv.tensor_shapes(tables[naming]))
        assert lv.recognise(names[: len(names) // 2], tables) == naming
        assert lv.recognise(["model.layers.0.weight"], tables) is None


def test_one_error_names_every_problem():
    table = convert_wan.dit_leaves(DIT.config, "diffusers")
    shapes = lv.tensor_shapes(table)
    del shapes["proj_out.bias"], shapes["blocks.1.attn1.to_q.weight"]
    shapes["blocks.0.attn2.add_k_proj.weight"] = (24, 24)
    shapes["blocks.3.norm2.weight"] = (24,)
    shapes["patch_embedding.weight"] = (24, 36, 1, 2, 2)
    twice = "blocks.2.ffn.net.2.bias"
    with pytest.raises(UserError) as caught:
        lv.check([*shapes.items(), (twice, shapes[twice])], table, "the file is odd")
    message = str(caught.value)
    for part in (
        "the file is odd: ",
        "missing proj_out.bias",
        "missing blocks.1.attn1.to_q.weight",
        "unknown blocks.0.attn2.add_k_proj.weight",
        "unknown blocks.3.norm2.weight",
        f"duplicate {twice}",
        "patch_embedding.weight is (24, 36, 1, 2, 2), not (24, 16, 1, 2, 2)",
    ):
        assert part in message
    assert message.count(";") == 5


def test_the_same_problem_in_many_layers_is_one_entry():
    config = wan.build(dim=24, num_heads=2, num_layers=5, ffn_dim=32, text_dim=8).config
    table = convert_wan.dit_leaves(config, "official")
    shapes = lv.tensor_shapes(table)
    for layer in range(5):
        del shapes[f"blocks.{layer}.norm3.bias"]
    with pytest.raises(UserError, match=r"^odd: missing blocks\.\*\.norm3\.bias \(5 times\)$"):
        lv.check(shapes.items(), table, "odd")


def test_tensors_of_another_model_are_not_recognised():
    tables = {naming: convert_wan.dit_leaves(DIT.config, naming) for naming in NAMINGS}
    assert lv.recognise(["decoder.conv1.weight"], tables) is None


def test_a_tree_that_is_not_the_model_is_refused():
    table = convert_wan.dit_leaves(DIT.config, "official")
    params = state_dicts.read(random_tensors(table), table)
    params["blocks"]["self_attn"]["q"]["lora_a"] = np.zeros((3, 24, 4), np.float32)
    params["head"]["out"]["bias"] = np.zeros(63, np.float32)
    del params["embed"]["patch"]["bias"]
    with pytest.raises(UserError) as caught:
        state_dicts.write(params, table)
    for part in ("unknown blocks/self_attn/q/lora_a", "missing embed/patch/bias", "(63,)"):
        assert part in str(caught.value)
