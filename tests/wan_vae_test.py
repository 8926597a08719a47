"""The Wan VAE without torch: recorded values, its two ways of running, tiles, memory, sharding, bad input."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from prophy_jax import models
from prophy_jax.models.codecs import causal_vae, wan_vae
from prophy_jax.run.errors import UserError

# Values recorded from the public PyTorch model have six decimals and its own fp32 rounding.
GOLDEN = 1e-5
# fp32 sums taken in another order by another program, on values of order 1.
SAME = 1e-5

# Key of the tensor, first four values, mean and standard deviation where recorded.
INTERMEDIATE = {
    "post_quant": ([1.354771, -0.493096, 2.178437, 0.856309],),
    "conv_in": ([0.191548, 0.513663, 0.334739, 0.674136],),
    "mid": ([-0.070239, -0.036618, -0.187173, 0.684972],),
    "up_blocks.0": ([-0.699862, -0.450175, -0.329320, -1.372592], -0.020988, 0.936494),
}


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


PIECES = wan_vae.build(base_dim=8)
WHOLE = wan_vae.build(base_dim=8, whole=True)


@functools.cache
def compiled(model: wan_vae.WanVAE, method: str):
    return jax.jit(getattr(model, method))


def golden_tree() -> dict:
    """The weights of the recorded model: tensors drawn in the order of the sorted diffusers names."""
    shapes = traverse_util.flatten_dict(jax.eval_shape(PIECES.init, jax.random.key(0)), sep="/")
    last = {"kernel": "weight", "scale": "gamma", "bias": "bias"}
    names = {}
    for path in shapes:
        module, _, leaf = path.rpartition("/")
        names[f"{module}/{last[leaf]}".replace("/", ".")] = path
    tree = {}
    for seed, name in enumerate(sorted(names)):
        path = names[name]
        *kernel, inputs, outputs = (1, *shapes[path].shape)[-5:]
        draw = np.random.RandomState(seed).standard_normal
        if name.endswith(".weight"):
            # (O, I, T, H, W) -> (T, H, W, I, O); of single frames T = 1, which our shape lacks
            noise = draw((outputs, inputs, *kernel)).transpose(2, 3, 4, 1, 0)
            noise = noise.reshape(shapes[path].shape) / math.sqrt(inputs * math.prod(kernel))
        elif name.endswith(".gamma"):
            noise = 1 + 0.1 * draw(shapes[path].shape)
        else:
            noise = 0.1 * draw(shapes[path].shape)
        tree[path] = jnp.asarray(noise, jnp.float32)
    return traverse_util.unflatten_dict(tree, sep="/")


@pytest.fixture(scope="module")
def params():
    return golden_tree()


def channels_last(array: np.ndarray) -> jax.Array:
    return jnp.asarray(array.transpose(0, 2, 3, 4, 1), jnp.float32)


@pytest.fixture(scope="module")
def video():
    return channels_last(np.tanh(np.random.RandomState(10003).standard_normal((1, 3, 9, 32, 48))))


@pytest.fixture(scope="module")
def raw_latents():
    """As the decoder network takes them."""
    return channels_last(np.random.RandomState(10004).standard_normal((1, 16, 3, 4, 6)))


@pytest.fixture(scope="module")
def latents(raw_latents):
    """As `decode` takes them."""
    config = PIECES.config
    return (raw_latents - np.float32(config.latents_mean)) / np.float32(config.latents_std)


def recorded(array: jax.Array, first: list[float], *moments: float, name: str = "") -> None:
    """Asserts the first values, channel first, and the mean and standard deviation if given."""
    array = np.asarray(array, np.float64).transpose(0, 4, 1, 2, 3)
    got = [*array.ravel()[: len(first)], *[array.mean(), array.std()][: len(moments)]]
    np.testing.assert_allclose(got, [*first, *moments], rtol=0, atol=GOLDEN, err_msg=name)


@pytest.mark.parametrize("model", [PIECES, WHOLE], ids=["pieces", "whole"])
def test_encode_has_the_recorded_values(model, params, video):
    moments = jnp.concatenate(compiled(model, "moments")(params, video), axis=-1)
    first = [-0.278005, -0.269627, -0.176382, -0.038644, -0.115511, -0.308603, -0.387444, -0.557713]
    assert moments.shape == (1, 3, 4, 6, 32)
    recorded(moments, first, -0.0829281, 0.4631815)


@pytest.mark.parametrize("model", [PIECES, WHOLE], ids=["pieces", "whole"])
def test_decode_has_the_recorded_values(model, params, latents):
    frames = compiled(model, "decode")(params, latents)
    assert frames.shape == (1, 9, 32, 48, 3)
    assert float(jnp.abs(frames).max()) == 1  # clipped
    first = [-0.249662, -0.234717, -0.177605, -0.274894, -0.232813, -0.092558, 0.047011, -0.032105]
    recorded(frames, first, -0.2465178, 0.4658192)


def test_tensors_inside_the_decoder_have_the_recorded_values(params, raw_latents):
    @jax.jit
    def inside(params, x):
        p, history = params["decoder"], wan_vae.History(None)
        tensors = {"post_quant": causal_vae.conv(params["post_quant_conv"], x)}
        tensors["conv_in"] = wan_vae._causal_conv(p["conv_in"], tensors["post_quant"], history)
        x = tensors["mid"] = wan_vae._mid_block(p["mid_block"], tensors["conv_in"], history)
        block = p["up_blocks"]["0"]
        for i in range(3):
            x = wan_vae._res_block(block["resnets"][str(i)], x, history)
        tensors["up_blocks.0"] = wan_vae._upsample(block["upsamplers"]["0"], x, history)
        return tensors

    tensors = inside(params, raw_latents)
    for name, values in INTERMEDIATE.items():
        recorded(tensors[name], *values, name=name)


def test_unclipped_output_has_the_recorded_values(params, latents):
    quarter = jax.tree.map(lambda leaf: leaf, params)
    quarter["decoder"]["conv_out"] = jax.tree.map(lambda leaf: leaf / 4, params["decoder"]["conv_out"])
    frames = 4 * compiled(WHOLE, "decode")(quarter, latents)  # exact: a power of two
    recorded(frames, [], -0.2743136, 0.5223371)
    np.testing.assert_allclose(jnp.abs(frames).max(), 2.452131, rtol=0, atol=GOLDEN)


def test_pieces_and_whole_clip_agree(params, video, latents):
    for method, x in (("encode", video), ("decode", latents)):
        in_pieces, whole = (compiled(model, method)(params, x) for model in (PIECES, WHOLE))
        np.testing.assert_allclose(in_pieces, whole, rtol=0, atol=SAME, err_msg=method)


def test_an_image_is_a_clip_of_one_frame(params, video, latents):
    """Frame 0 and latent 0 depend on nothing later."""
    encoded = compiled(PIECES, "encode")(params, video)[:, :1]
    np.testing.assert_allclose(compiled(PIECES, "encode")(params, video[:, :1]), encoded, rtol=0, atol=SAME)
    decoded = compiled(PIECES, "decode")(params, latents)[:, :1]
    np.testing.assert_allclose(compiled(PIECES, "decode")(params, latents[:, :1]), decoded, rtol=0, atol=SAME)


def test_time_is_causal(params, video, latents):
    """A later frame changes its own latent and later ones, and all the way back."""
    encode, decode = compiled(PIECES, "encode"), compiled(PIECES, "decode")
    changed = encode(params, video.at[:, 5:].multiply(0.5)) - encode(params, video)  # frames of latent 2
    np.testing.assert_array_equal(changed[:, :2], 0)
    assert float(jnp.abs(changed[:, 2]).max()) > 0.01
    changed = decode(params, latents.at[:, 1].multiply(0.5)) - decode(params, latents)
    np.testing.assert_array_equal(changed[:, :1], 0)
    for frame in range(1, 9):  # all four frames of latent 1, and those of latent 2
        assert float(jnp.abs(changed[:, frame]).max()) > 0.01, frame


def test_encode_normalises_the_mean(params, video):
    mean, log_variance = compiled(PIECES, "moments")(params, video)
    expected = (mean - np.float32(PIECES.config.latents_mean)) / np.float32(PIECES.config.latents_std)
    np.testing.assert_allclose(compiled(PIECES, "encode")(params, video), expected, rtol=0, atol=1e-6)
    wild = jax.tree.map(lambda leaf: leaf, params)
    wild["quant_conv"] = jax.tree.map(lambda leaf: 1000 * leaf, params["quant_conv"])
    mean, log_variance = compiled(PIECES, "moments")(wild, video)
    assert (float(log_variance.min()), float(log_variance.max())) == (-30, 20)
    assert float(jnp.abs(mean).max()) > 100  # as it is


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_bfloat16_is_close(method, params, video, latents):
    x = {"encode": video, "decode": latents}[method]
    half = wan_vae.build("bfloat16", base_dim=8, whole=True)
    out, expected = compiled(half, method)(params, x), compiled(WHOLE, method)(params, x)
    assert out.dtype == jnp.float32
    error = float(jnp.sqrt(jnp.mean((out - expected) ** 2)) / jnp.std(expected))
    # Some 30 convolutions, each with five values rounded to 2^-9 of themselves: 2^-9 * sqrt(150) = 0.024.
    assert 1e-4 < error < 0.03


# Tiles -----------------------------------------------------------------------------------------------


def test_tiles_run_by_themselves(params, latents):
    """Without overlap, tiled decoding is decoding each tile; a clip inside one tile is not cut."""
    tiled = wan_vae.build(base_dim=8, tile=(16, 16), whole=True)
    out = compiled(tiled, "decode")(params, latents[:, :1])
    # (1, 1, 4, 6, z) -> (6 tiles, 1, 2, 2, z), and the frames back from 16 x 16 pixels a tile
    tiles = latents[:, :1].reshape(2, 2, 3, 2, 16).transpose(0, 2, 1, 3, 4).reshape(6, 1, 2, 2, 16)
    frames = compiled(WHOLE, "decode")(params, tiles)
    frames = frames.reshape(2, 3, 16, 16, 3).transpose(0, 2, 1, 3, 4).reshape(1, 1, 32, 48, 3)
    np.testing.assert_allclose(out, frames, rtol=0, atol=SAME)
    assert float(jnp.abs(out - compiled(WHOLE, "decode")(params, latents[:, :1])).max()) > 0.01
    one = wan_vae.build(base_dim=8, tile=(48, 32))
    assert str(jax.make_jaxpr(one.decode)(params, latents)) == str(
        jax.make_jaxpr(PIECES.decode)(params, latents)
    )


# Sizes -----------------------------------------------------------------------------------------------


def test_full_size_has_the_published_parameters():
    tree = jax.eval_shape(wan_vae.build().init, jax.random.key(0))
    flat = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}
    assert len(flat) == 194
    count = {part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree[part])) for part in tree}
    assert count == {
        "encoder": 53_595_872,
        "decoder": 73_295_331,
        "quant_conv": 1_056,
        "post_quant_conv": 272,
    }
    assert sum(count.values()) == 126_892_531
    # One of each kind of block, where it is.
    for path, shape in {
        "encoder/conv_in/kernel": (3, 3, 3, 3, 96),
        "encoder/down_blocks/0/norm1/scale": (96,),
        "encoder/down_blocks/2/resample/1/kernel": (3, 3, 96, 96),
        "encoder/down_blocks/3/conv_shortcut/kernel": (1, 1, 1, 96, 192),
        "encoder/down_blocks/5/time_conv/kernel": (3, 1, 1, 192, 192),
        "encoder/down_blocks/10/conv2/bias": (384,),
        "encoder/mid_block/attentions/0/to_qkv/kernel": (1, 1, 384, 1152),
        "encoder/conv_out/kernel": (3, 3, 3, 384, 32),
        "quant_conv/kernel": (1, 1, 1, 32, 32),
        "decoder/mid_block/resnets/1/conv1/kernel": (3, 3, 3, 384, 384),
        "decoder/up_blocks/0/upsamplers/0/time_conv/kernel": (3, 1, 1, 384, 768),
        "decoder/up_blocks/1/resnets/0/conv_shortcut/kernel": (1, 1, 1, 192, 384),
        "decoder/up_blocks/1/upsamplers/0/resample/1/kernel": (3, 3, 384, 192),
        "decoder/up_blocks/2/upsamplers/0/resample/1/kernel": (3, 3, 192, 96),
        "decoder/up_blocks/3/resnets/2/conv2/kernel": (3, 3, 3, 96, 96),
        "decoder/norm_out/scale": (96,),
        "decoder/conv_out/bias": (3,),
    }.items():
        assert flat[path] == shape, path
    assert "decoder/up_blocks/2/upsamplers/0/time_conv/kernel" not in flat
    assert "decoder/up_blocks/3/upsamplers/0/resample/1/kernel" not in flat


def test_init_draws_every_kernel_by_itself():
    small = wan_vae.build(base_dim=8, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,))
    flat = traverse_util.flatten_dict(jax.jit(small.init)(jax.random.key(0)), sep="/")
    kernels = [np.asarray(leaf) for path, leaf in flat.items() if path.endswith("kernel")]
    assert len({kernel.ravel()[0] for kernel in kernels}) == len(kernels)
    for kernel in kernels:
        assert abs(kernel.std() * math.sqrt(math.prod(kernel.shape[:-1])) - 1) < 0.2
    assert all((leaf == 1).all() for path, leaf in flat.items() if path.endswith("scale"))


def test_sizes_of_a_configuration_file_build_the_same():
    spec = {"module": "wan_vae", "base_dim": 8, "dim_mult": [1, 2, 4, 4], "tile": [64, 48]}
    model = models.build(spec)
    assert model == wan_vae.build(base_dim=8, tile=(64, 48))
    assert hash(model) == hash(wan_vae.build(base_dim=8, tile=(64, 48)))


# Memory ----------------------------------------------------------------------------------------------

FRAME = 96 * 480 * 832 * 4  # bytes of one frame of the widest layer: 153 MB


@functools.cache
def temporary_bytes(dtype: str, method: str, times: int, sharding: NamedSharding | None = None) -> int:
    """Of the compiled program at 480 x 832, on one device; nothing runs."""
    model = wan_vae.build(dtype)
    params = jax.eval_shape(model.init, jax.random.key(0))
    shape = (1, times, 60, 104, 16) if method == "decode" else (1, 4 * times - 3, 480, 832, 3)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    program = jax.jit(getattr(model, method)).lower(params, x).compile()
    return program.memory_analysis().temp_size_in_bytes


def history_bytes(network, shape: tuple[int, ...]) -> int:
    """What a loop carries from one latent to the next, in fp32."""

    def run(params, x):
        history = wan_vae.History(None)
        network(params, x, history)
        return history.present

    params = jax.eval_shape(wan_vae.build().init, jax.random.key(0))
    kept = jax.eval_shape(run, params, jax.ShapeDtypeStruct(shape, jnp.float32))
    return sum(leaf.size * 4 for leaf in jax.tree.leaves(kept))


def test_history_at_480p_is_two_input_frames_of_every_convolution_over_time():
    assert round(history_bytes(wan_vae.decoder, (1, 1, 60, 104, 16)) / 1e9, 2) == 3.78
    assert round(history_bytes(wan_vae.encoder, (1, 1, 480, 832, 3)) / 1e9, 2) == 2.24


@pytest.mark.parametrize(
    ("dtype", "method", "frames"),
    [
        # The history once, and while a layer at full resolution runs: its input, the three frames joined,
        # the two kept, the three that the convolution sees, the result. Attention has 0.16 GB of scores.
        ("float32", "decode", 10),
        # Here XLA's schedule for CPUs holds some four frames more.
        ("float32", "encode", 14),
        # Half the history. Norms are fp32, and on CPUs convolutions too: they take what they took.
        ("bfloat16", "decode", 10),
    ],
)
def test_memory_at_480p_is_the_history_and_a_few_frames(dtype, method, frames):
    network, shape = {
        "decode": (wan_vae.decoder, (1, 1, 60, 104, 16)),
        "encode": (wan_vae.encoder, (1, 1, 480, 832, 3)),
    }[method]
    history = history_bytes(network, shape) * (2 if dtype == "bfloat16" else 4) // 4
    assert history < temporary_bytes(dtype, method, 21) < history + frames * FRAME


def test_memory_does_not_grow_with_the_length_of_the_clip():
    long, short = (temporary_bytes("float32", "decode", times) for times in (21, 5))
    latents = 16 * 60 * 104 * 16 * 4  # bytes of the 16 more, before they are decoded: 6 MB
    assert abs(long - short) < 1.1 * latents


# Sharding --------------------------------------------------------------------------------------------


def mesh(**axes: int) -> jax.sharding.Mesh:
    count = math.prod(axes.values())
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=jax.devices()[:count])


def test_decode_sharded_over_batch_rows_and_columns_is_the_same(params):
    sharding = NamedSharding(mesh(b=2, r=2, c=2), PartitionSpec("b", None, "r", "c"))
    latents = np.random.default_rng(1).standard_normal((2, 2, 4, 6, 16), np.float32)
    alone = compiled(PIECES, "decode")(params, latents)
    copies = jax.device_put(params, NamedSharding(sharding.mesh, PartitionSpec()))
    sharded = compiled(PIECES, "decode")(copies, jax.device_put(latents, sharding))
    assert sharded.sharding.is_equivalent_to(sharding, 5)
    np.testing.assert_allclose(sharded, alone, rtol=0, atol=SAME)


@pytest.mark.parametrize(("axis", "devices"), [("rows", 4), ("columns", 8)])
def test_sharded_over_space_each_device_holds_its_part_of_every_layer(axis, devices):
    spec = PartitionSpec(*[None] * (2 if axis == "rows" else 3), axis)
    part = temporary_bytes("float32", "decode", 21, NamedSharding(mesh(**{axis: devices}), spec))
    # Half as much again for the rows or columns that neighbours exchange, and what does not divide:
    # keys and values of the attention, cut kernels.
    assert part < 1.5 * temporary_bytes("float32", "decode", 21) / devices


# Bad input -------------------------------------------------------------------------------------------


def encode_shape(*shape, dtype=jnp.float32):
    return jax.eval_shape(PIECES.encode, {}, jax.ShapeDtypeStruct(shape, dtype))


def decode_shape(*shape):
    return jax.eval_shape(PIECES.decode, {}, jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode_shape(1, 8, 16, 16, 3), "8 frames are not 4n.*cut the clip to 5 .*extend it to 9"),
        (lambda: encode_shape(1, 0, 16, 16, 3), "0 frames are not"),
        (lambda: encode_shape(1, 5, 12, 16, 3), "12 x 16 pixels .H x W. are not multiples of 8: crop"),
        (lambda: encode_shape(1, 5, 16, 20, 3), "16 x 20 pixels"),
        (lambda: encode_shape(1, 5, 16, 16, 4), r"must be \(B, F, H, W, 3\)"),
        (lambda: encode_shape(5, 16, 16, 3), r"must be \(B, F, H, W, 3\)"),
        (lambda: encode_shape(1, 5, 16, 16, 3, dtype=jnp.uint8), "floating point in .* uint8"),
        (lambda: decode_shape(1, 2, 2, 2, 8), r"must be \(B, T, h, w, 16\)"),
        (lambda: decode_shape(2, 2, 2, 16), r"must be \(B, T, h, w, 16\)"),
        (lambda: decode_shape(1, 0, 2, 2, 16), r"must be \(B, T, h, w, 16\)"),
        (lambda: PIECES.latent_shape(7, 16, 16), "7 frames"),
        (lambda: wan_vae.build("float16"), "float16"),
        (lambda: wan_vae.build(width=3), "width"),
        (lambda: wan_vae.build(dim_mult=(1, 2)), "temporal_downsample has 3 entries"),
        (lambda: wan_vae.build(z_dim=4), "latents_mean must have z_dim = 4"),
        (lambda: wan_vae.build(tile=(256, 300)), "stride not above the size"),
        (lambda: wan_vae.build(tile=(250, 192)), "multiples of 8"),
        (lambda: wan_vae.build(tile=256), "size, stride"),
        (lambda: models.build({"module": "wan_vae", "widht": 3}), "widht"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_latent_shape():
    assert wan_vae.build().latent_shape(81, 480, 832) == (21, 60, 104, 16)
    assert wan_vae.build().latent_shape(1, 8, 16) == (1, 1, 2, 16)
