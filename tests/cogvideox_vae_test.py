"""The CogVideoX VAE without torch: recorded values, pieces, tiles, sizes, memory, sharding, bad input."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from configs.cogvideox import get_config as cogvideox_config
from prophy_jax import models
from prophy_jax.models.codecs import causal_vae, cogvideox_vae
from prophy_jax.run.errors import UserError

# Values recorded from the public PyTorch model have six decimals and its own fp32 rounding.
GOLDEN = 1e-5
# fp32 sums taken in another order by another program, on values of order 1.
SAME = 1e-5

SIZES = dict(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4)
MODEL = cogvideox_vae.build(**SIZES, scaling_factor=0.5)
LED = cogvideox_vae.build(**SIZES, scaling_factor=0.5, lead=1)


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def compiled(method: str, **arguments):
    model = cogvideox_vae.build(**SIZES, scaling_factor=0.5, **arguments)
    return jax.jit(getattr(model, method))


@pytest.fixture(scope="module")
def params() -> dict:
    """The weights of the recorded model: tensors drawn in the order of the sorted diffusers names."""
    shapes = traverse_util.flatten_dict(jax.eval_shape(MODEL.init, jax.random.key(0)), sep="/")
    names = {}
    for path in shapes:
        module, _, leaf = path.rpartition("/")
        names[f"{module}/{'bias' if leaf == 'bias' else 'weight'}".replace("/", ".")] = path
    draw, tree = np.random.RandomState(0).standard_normal, {}
    for name in sorted(names):
        path = names[name]
        shape = shapes[path].shape
        if path.endswith("kernel"):
            *kernel, inputs, outputs = shape
            order = (*range(2, len(shape)), 1, 0)  # (O, I, T, H, W) -> (T, H, W, I, O)
            noise = 0.05 * draw((outputs, inputs, *kernel)).transpose(order)
        else:
            noise = float(path.endswith("scale")) + 0.05 * draw(shape)
        tree[path] = jnp.asarray(noise, jnp.float32)
    return traverse_util.unflatten_dict(tree, sep="/")


def channels_last(array: np.ndarray) -> jax.Array:
    return jnp.asarray(array.transpose(0, 2, 3, 4, 1), jnp.float32)


@pytest.fixture(scope="module")
def recorded_inputs():
    """A video of 17 frames, and latents as the decoder network takes them."""
    draw = np.random.RandomState(1)
    video = channels_last(draw.uniform(-1, 1, (1, 3, 17, 16, 24)))
    return video, channels_last(draw.standard_normal((1, 4, 5, 2, 3)))


@pytest.fixture(scope="module")
def video(recorded_inputs):
    return recorded_inputs[0]


@pytest.fixture(scope="module")
def latents(recorded_inputs):
    """As `decode` takes them."""
    return recorded_inputs[1] * MODEL.config.scaling_factor


def recorded(array: jax.Array, mean: float, std: float, total: float, values: dict[int, float]) -> None:
    """Asserts mean, standard deviation, sum of magnitudes, and values by their index channel first."""
    array = np.asarray(array, np.float64).transpose(0, 4, 1, 2, 3)
    got = [array.mean(), array.std(), *array.ravel()[list(values)]]
    np.testing.assert_allclose(got, [mean, std, *values.values()], rtol=0, atol=GOLDEN)
    np.testing.assert_allclose(np.abs(array).sum(), total, rtol=0, atol=GOLDEN * array.size)


def test_encode_has_the_recorded_values(params, video):
    mean, log_variance = compiled("moments")(params, video)
    assert mean.shape == log_variance.shape == (1, 5, 2, 3, 4)
    # fmt: off
    recorded(
        mean, -0.114330, 0.313152, 34.3032,
        {0: 0.473438, 1: 0.118636, 2: 0.048501, 40: -0.397519, 60: -0.560190, 118: -0.511472, 119: -0.177347},
    )
    recorded(
        log_variance, -0.076510, 0.363432, 36.6202,
        {0: -0.261596, 1: -0.701978, 2: -0.649653, 40: -0.571599, 60: -0.294715, 118: -0.310072,
         119: -0.419661},
    )
    # fmt: on


def test_a_clip_encoded_whole_has_the_values_of_the_reference_code(params, video):
    """Recorded from the encoder of the CogVideoX reference code (its tag v1.0), 4 groups to a norm."""
    whole, log_variance = compiled("moments", encode_whole=True)(params, video)
    # fmt: off
    recorded(
        whole, -0.108799, 0.314798, 34.6871,
        {0: 0.430549, 1: 0.141004, 2: 0.121063, 40: -0.342440, 60: -0.574975, 118: -0.446761, 119: 0.018867},
    )
    recorded(
        log_variance, -0.062084, 0.369121, 39.1236,
        {0: -0.288406, 1: -0.605208, 2: -0.557240, 40: -0.499108, 60: -0.341231, 118: -0.484669,
         119: -0.377279},
    )
    # fmt: on
    difference = np.asarray(whole - compiled("moments")(params, video)[0])
    # What docs/cogvideox.md says of it, in two digits; the deviation of the latents is 0.31.
    np.testing.assert_allclose(np.abs(difference).max(), 0.25, atol=5e-3)
    np.testing.assert_allclose(np.sqrt(np.square(difference).mean()), 0.080, atol=5e-4)


@pytest.mark.parametrize("frames", [1, 8, 9])
def test_clips_of_one_piece_are_encoded_alike(params, video, frames):
    clip = video[:, :frames]
    whole, pieces = compiled("encode", encode_whole=True)(params, clip), compiled("encode")(params, clip)
    np.testing.assert_array_equal(whole, pieces)


def test_decoding_is_in_pieces_even_so(params, latents):
    whole, pieces = compiled("decode", encode_whole=True), compiled("decode")
    np.testing.assert_array_equal(whole(params, latents), pieces(params, latents))


def test_decode_has_the_recorded_values(params, latents):
    frames = compiled("decode")(params, latents)
    assert frames.shape == (1, 17, 16, 24, 3)
    # fmt: off
    recorded(
        frames, -0.050529, 0.104992, 1955.3361,
        {0: 0.081979, 1: 0.050398, 2: 0.032675, 6528: -0.144710, 9792: -0.181019, 19582: -0.101636,
         19583: -0.103883},
    )
    # fmt: on


def test_encode_scales_the_mean_and_outputs_are_clipped(params, video, latents):
    mean, _ = compiled("moments")(params, video)
    np.testing.assert_allclose(compiled("encode")(params, video), 0.5 * mean, rtol=0, atol=1e-6)
    wild = jax.tree.map(lambda leaf: leaf, params)
    for part in ("encoder", "decoder"):
        wild[part]["conv_out"] = jax.tree.map(lambda leaf: 1000 * leaf, params[part]["conv_out"])
    mean, log_variance = compiled("moments")(wild, video)
    assert (float(log_variance.min()), float(log_variance.max())) == (-30, 20)
    assert float(jnp.abs(mean).max()) > 100  # as it is
    frames = compiled("decode")(wild, latents)
    assert (float(frames.min()), float(frames.max())) == (-1, 1)


# Norms -----------------------------------------------------------------------------------------------


def test_group_norm_takes_frames_pixels_and_the_channels_of_a_group():
    """Against float64, far from zero: E[x^2] - E[x]^2 in fp32 would be wrong by more than the result."""
    rng = np.random.default_rng(0)
    x = (100 + 0.1 * rng.standard_normal((2, 3, 4, 5, 8))).astype(np.float32)
    p = {"scale": rng.standard_normal(8, np.float32), "bias": rng.standard_normal(8, np.float32)}
    wide = x.astype(np.float64).reshape(2, 3, 4, 5, 4, 2)  # four groups of two channels
    wide = wide - wide.mean((1, 2, 3, 5), keepdims=True)
    wide = wide / np.sqrt((wide**2).mean((1, 2, 3, 5), keepdims=True) + 1e-6)
    expected = wide.reshape(x.shape) * p["scale"] + p["bias"]
    out = jax.jit(functools.partial(cogvideox_vae._group_norm, MODEL.config))(p, x)
    # A sum of 60 values near 100 is rounded by up to 2.4e-4 at each step, at random: 2e-3 in all, so that the
    # mean is off by 3e-5 or 3e-4 deviations.
    np.testing.assert_allclose(out, expected, rtol=0, atol=5e-4)


def test_spatial_norm_shows_each_pixel_its_latent():
    """By hand: a constant layer is normed to its bias, 2, so the result is 2 y + b of the latent."""
    norm = {
        "norm_layer": {"scale": jnp.ones(4), "bias": jnp.full(4, 2.0)},
        "conv_y": {"conv": {"kernel": jnp.ones((1, 1, 1, 1, 4)), "bias": jnp.zeros(4)}},
        "conv_b": {"conv": {"kernel": jnp.zeros((1, 1, 1, 1, 4)), "bias": jnp.full(4, 0.5)}},
    }
    for times, frames, seen in (
        (1, 1, [0]),
        (3, 9, [0, 1, 1, 1, 1, 2, 2, 2, 2]),
        (2, 8, [0, 0, 0, 0, 1, 1, 1, 1]),
    ):
        latents = jnp.arange(times * 2.0).reshape(1, times, 1, 2, 1)
        norm_of = jax.jit(functools.partial(cogvideox_vae._spatial_norm, MODEL.config))
        out = norm_of(latents, norm, jnp.ones((1, frames, 2, 4, 4)))
        expected = [[[2 * (2 * time + column) + 0.5 for column in (0, 0, 1, 1)]] * 2 for time in seen]
        for channel in range(4):
            np.testing.assert_allclose(out[0, ..., channel], expected, rtol=0, atol=1e-5)


# Pieces ----------------------------------------------------------------------------------------------


def test_pieces_are_part_of_the_model(params, video, latents, monkeypatch):
    """Other pieces give other values, because of the norms' statistics and of nothing else."""
    in_pieces = {
        "encoder": jnp.concatenate(compiled("moments")(params, video), axis=-1),
        "decoder": compiled("decode")(params, latents),
    }
    arguments = {"encoder": (video, 9, 8, 2), "decoder": (latents / 0.5, 3, 2, 8)}

    def run(name: str, whole: bool = False) -> jax.Array:
        # A function of its own each time: no program is taken from before the norm was replaced.
        network = functools.partial(getattr(cogvideox_vae, name), MODEL.config)
        x, first, frames_in, frames_out = arguments[name]
        first = x.shape[1] if whole else first
        run = functools.partial(causal_vae.in_pieces, network, first=first, frames_in=frames_in)
        return jax.jit(functools.partial(run, frames_out=frames_out))(params, x=x)

    for name, expected in in_pieces.items():
        # A tenth of the deviation was seen with larger weights; a hundredth is far above rounding.
        difference = run(name, whole=True) - expected
        assert float(jnp.std(difference)) > 0.01 * float(jnp.std(expected)), name
    monkeypatch.setattr(cogvideox_vae, "_group_norm", lambda config, p, x: 4 * x * p["scale"] + p["bias"])
    expected = run("decoder", whole=True)
    assert float(jnp.std(expected)) > 0.01
    np.testing.assert_allclose(run("decoder"), expected, rtol=1e-4, atol=1e-6)


def test_a_clip_is_causal_by_pieces(params, video, latents):
    """Frames change the piece they are in, all of it, and later pieces; nothing before."""
    encode, decode = compiled("encode"), compiled("decode")
    later = encode(params, video.at[:, 16:].multiply(0.5)) - encode(params, video)
    np.testing.assert_array_equal(later[:, :3], 0)
    assert (jnp.abs(later[:, 3:]).max(axis=(0, 2, 3, 4)) > 1e-5).all()
    later = decode(params, latents.at[:, 4:].multiply(0.5)) - decode(params, latents)
    np.testing.assert_array_equal(later[:, :9], 0)
    assert (jnp.abs(later[:, 9:]).max(axis=(0, 2, 3, 4)) > 1e-5).all()
    earlier = decode(params, latents.at[:, :1].multiply(0.5)) - decode(params, latents)
    assert float(jnp.abs(earlier[:, 9]).max()) > 1e-5  # by what the convolutions keep


@pytest.mark.parametrize(("frames", "times"), [(1, 1), (8, 2), (9, 3), (48, 12), (49, 13)])
def test_clips_come_back_in_their_size(frames, times):
    params = jax.eval_shape(MODEL.init, jax.random.key(0))
    video = jax.ShapeDtypeStruct((2, frames, 16, 24, 3), jnp.bfloat16)
    latents = jax.eval_shape(MODEL.encode, params, video)
    assert latents == jax.ShapeDtypeStruct((2, times, 2, 3, 4), jnp.float32)
    assert latents.shape[1:] == MODEL.latent_shape(frames, 16, 24)
    assert jax.eval_shape(MODEL.decode, params, latents) == jax.ShapeDtypeStruct(video.shape, jnp.float32)


# Lead ------------------------------------------------------------------------------------------------


def test_the_first_latent_leads_and_is_dropped(monkeypatch):
    """By hand, with networks in place of the real ones that pass latents on as they are."""
    moments = jnp.arange(2 * 5 * 8.0).reshape(2, 5, 1, 1, 8)  # of 17 frames: 4 means, 4 log-variances

    def run(self, network, params, x, source, target):
        return moments if network is cogvideox_vae.encoder else x

    monkeypatch.setattr(cogvideox_vae.CogVideoXVAE, "_run", run)
    latents = LED.encode({}, jnp.zeros((2, 17, 8, 8, 3)))
    assert latents.shape == (2, *LED.latent_shape(17, 8, 8)) == (2, 6, 1, 1, 4)
    mean = 0.5 * moments[..., :4]
    np.testing.assert_array_equal(latents, mean[:, jnp.array([0, 0, 1, 2, 3, 4])])
    # Decoded is what follows, whatever was sampled in the first place.
    latents = latents.at[:, 0].set(-1) / 100
    np.testing.assert_allclose(LED.decode({}, latents), mean / 50, rtol=1e-6)


def test_a_clip_of_1_5_fits_its_patches():
    config = cogvideox_config("1.5-5b")
    codec, backbone = models.build(config.codec), models.build(config.backbone)
    shape = codec.latent_shape(config.data.frames, config.data.height, config.data.width)
    assert shape == (22, 96, 170, 16) and shape[:3] == config.parts.branch.semantic.basis_grid
    assert backbone.grid(shape) == (11, 48, 85)
    params = jax.eval_shape(codec.init, jax.random.key(0))
    frames = jax.eval_shape(codec.decode, params, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    assert frames.shape == (1, 81, 768, 1360, 3)
    assert jax.eval_shape(codec.encode, params, frames).shape == (1, *shape)
    # 1.0 takes any number of latents, and has no lead.
    assert models.build(cogvideox_config("").codec).latent_shape(49, 480, 720) == (13, 60, 90, 16)


def test_bfloat16_is_close(params, video):
    out, expected = compiled("encode", dtype="bfloat16")(params, video), compiled("encode")(params, video)
    assert out.dtype == jnp.float32
    error = float(jnp.sqrt(jnp.mean((out - expected) ** 2)) / jnp.std(expected))
    # Some 20 convolutions, each with five values rounded to 2^-9 of themselves: 2^-9 * sqrt(100) = 0.02.
    assert 1e-4 < error < 0.03


# Tiles -----------------------------------------------------------------------------------------------


def test_tiles_run_by_themselves(params, latents):
    """Without overlap, tiled decoding is decoding each tile; a clip inside one tile is not cut."""
    latents = latents[:, :1]
    out = compiled("decode", tile=((16, 16), (8, 8)))(params, latents)
    # (1, 1, 2, 3, z) -> (3 tiles, 1, 2, 1, z), and the frames back from 16 x 8 pixels a tile
    tiles = latents.transpose(3, 0, 1, 2, 4).reshape(3, 1, 2, 1, 4)
    frames = compiled("decode")(params, tiles)
    frames = frames.transpose(1, 2, 0, 3, 4).reshape(1, 1, 16, 24, 3)
    np.testing.assert_allclose(out, frames, rtol=0, atol=SAME)

    def program(tile):
        return str(jax.make_jaxpr(cogvideox_vae.build(**SIZES, tile=tile).decode)(params, latents))

    assert program(((16, 8), (24, 8))) == program((24, 8)) == program(None)
    assert program(((24, 8), (16, 8))) != program(None)


# Sizes -----------------------------------------------------------------------------------------------


def test_full_size_has_the_published_parameters():
    tree = jax.eval_shape(cogvideox_vae.build().init, jax.random.key(0))
    flat = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}
    assert len(flat) == 436
    count = {part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree[part])) for part in tree}
    assert count == {"encoder": 92_215_456, "decoder": 123_368_451}
    assert sum(count.values()) == 215_583_907
    # One of each kind of block, where it is.
    for path, shape in {
        "encoder/conv_in/conv/kernel": (3, 3, 3, 3, 128),
        "encoder/down_blocks/0/resnets/2/norm1/scale": (128,),
        "encoder/down_blocks/0/downsamplers/0/conv/kernel": (3, 3, 128, 128),
        "encoder/down_blocks/1/resnets/0/conv_shortcut/kernel": (1, 1, 1, 128, 256),
        "encoder/down_blocks/3/resnets/0/conv1/conv/kernel": (3, 3, 3, 256, 512),
        "encoder/mid_block/resnets/1/norm2/bias": (512,),
        "encoder/norm_out/scale": (512,),
        "encoder/conv_out/conv/bias": (32,),
        "decoder/conv_in/conv/kernel": (3, 3, 3, 16, 512),
        "decoder/mid_block/resnets/0/norm1/norm_layer/scale": (512,),
        "decoder/up_blocks/0/resnets/3/conv2/conv/kernel": (3, 3, 3, 512, 512),
        "decoder/up_blocks/1/resnets/0/norm1/conv_y/conv/kernel": (1, 1, 1, 16, 512),
        "decoder/up_blocks/1/resnets/0/conv_shortcut/kernel": (1, 1, 1, 512, 256),
        "decoder/up_blocks/2/upsamplers/0/conv/kernel": (3, 3, 256, 256),
        "decoder/up_blocks/3/resnets/0/norm2/conv_b/conv/bias": (128,),
        "decoder/norm_out/conv_y/conv/kernel": (1, 1, 1, 16, 128),
        "decoder/conv_out/conv/kernel": (3, 3, 3, 128, 3),
    }.items():
        assert flat[path] == shape, path
    assert "encoder/down_blocks/2/resnets/0/conv_shortcut/kernel" not in flat
    assert "encoder/down_blocks/3/downsamplers/0/conv/kernel" not in flat
    assert "decoder/up_blocks/3/upsamplers/0/conv/kernel" not in flat


def full_size_history(network, shape: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
    """What each convolution keeps of a first piece."""

    def run(params, x):
        history = causal_vae.History(None)
        network(cogvideox_vae.CogVideoXVAEConfig(), params, x, history)
        return history.present

    params = jax.eval_shape(cogvideox_vae.build().init, jax.random.key(0))
    return jax.eval_shape(run, params, jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize(
    ("network", "shape", "layers", "convolutions", "kept"),
    [
        # In: 9 or 8 frames, then those of every stage, the last again in the middle block.
        (
            cogvideox_vae.encoder,
            (1, 9, 480, 720, 3),
            [(9, 480, 720), (5, 240, 360), (3, 120, 180), (3, 60, 90), (3, 60, 90)],
            30,
            0.90,
        ),
        (
            cogvideox_vae.encoder,
            (1, 8, 480, 720, 3),
            [(8, 480, 720), (4, 240, 360), (2, 120, 180), (2, 60, 90), (2, 60, 90)],
            30,
            0.90,
        ),
        (
            cogvideox_vae.decoder,
            (1, 3, 60, 90, 16),
            [(3, 60, 90), (3, 60, 90), (5, 120, 180), (9, 240, 360), (9, 480, 720)],
            38,
            1.40,
        ),
        (
            cogvideox_vae.decoder,
            (1, 2, 60, 90, 16),
            [(2, 60, 90), (2, 60, 90), (4, 120, 180), (8, 240, 360), (8, 480, 720)],
            38,
            1.40,
        ),
    ],
)
def test_layers_of_a_480_by_720_clip(network, shape, layers, convolutions, kept, monkeypatch):
    seen, blocks = [], cogvideox_vae._res_blocks
    monkeypatch.setattr(
        cogvideox_vae,
        "_res_blocks",
        lambda norm, p, x, history: seen.append(x.shape[1:4]) or blocks(norm, p, x, history),
    )
    history = full_size_history(network, shape)
    assert seen == layers
    assert len(history) == convolutions
    assert round(sum(leaf.size for leaf in history) / 1e9, 2) == kept  # values: twice or four times the bytes


def test_sizes_of_a_configuration_file_build_the_same():
    spec = {"module": "cogvideox_vae", "block_out_channels": [32, 64], "temporal_compression_ratio": 2}
    model = models.build(spec | {"tile": [[240, 200], [360, 288]], "dtype": "bfloat16"})
    same = cogvideox_vae.build(
        "bfloat16",
        ((240, 200), (360, 288)),
        block_out_channels=(32, 64),
        temporal_compression_ratio=2,
    )
    assert model == same and hash(model) == hash(same)
    assert cogvideox_vae.build(tile=(64, 48)).tile == ((64, 48), (64, 48))


# Memory ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "method", "gigabytes"),
    [
        # The decoder's history is 5.6 GB in fp32. A layer of 8 frames at full resolution with 256 channels
        # is 2.8 GB: the last stage's first block holds its input, the same joined to the history and as
        # its convolution sees it, and results of half the channels.
        ("float32", "decode", 20.5),
        # Half the history; convolutions are computed in fp32 on CPUs.
        ("bfloat16", "decode", 15.0),
        ("float32", "encode", 16.1),
    ],
)
def test_memory_of_49_frames_of_480_by_720(dtype, method, gigabytes):
    """Temporaries of the compiled program; nothing runs."""
    model = cogvideox_vae.build(dtype)
    params = jax.eval_shape(model.init, jax.random.key(0))
    shape = (1, 13, 60, 90, 16) if method == "decode" else (1, 49, 480, 720, 3)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    program = jax.jit(getattr(model, method)).lower(params, x).compile()
    assert program.memory_analysis().temp_size_in_bytes < gigabytes * 1e9


# Sharding --------------------------------------------------------------------------------------------


def test_decode_sharded_over_rows_is_the_same(params, latents):
    """The norms' statistics are of all rows, wherever they are."""
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    sharding = NamedSharding(mesh, PartitionSpec(None, None, "rows"))
    copies = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    sharded = compiled("decode")(copies, jax.device_put(latents, sharding))
    assert sharded.sharding.is_equivalent_to(sharding, 5)
    np.testing.assert_allclose(sharded, compiled("decode")(params, latents), rtol=0, atol=SAME)


# Bad input -------------------------------------------------------------------------------------------


def encode_shape(*shape, dtype=jnp.float32):
    return jax.eval_shape(MODEL.encode, {}, jax.ShapeDtypeStruct(shape, dtype))


def decode_shape(*shape):
    return jax.eval_shape(MODEL.decode, {}, jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode_shape(1, 13, 16, 16, 3), "13 frames are neither 8n nor 8n . 1: cut .* 9 .* to 16"),
        (lambda: encode_shape(1, 5, 16, 16, 3), "5 frames .* cut the clip to 1 frames or extend it to 8"),
        (lambda: encode_shape(1, 0, 16, 16, 3), "0 frames are neither"),
        (lambda: encode_shape(1, 9, 12, 16, 3), "12 x 16 pixels .H x W. are not multiples of 8: crop"),
        (lambda: encode_shape(1, 9, 16, 20, 3), "16 x 20 pixels"),
        (lambda: encode_shape(1, 9, 16, 16, 4), r"must be \(B, F, H, W, 3\)"),
        (lambda: encode_shape(9, 16, 16, 3), r"must be \(B, F, H, W, 3\)"),
        (lambda: encode_shape(1, 9, 16, 16, 3, dtype=jnp.uint8), "floating point in .* uint8"),
        (lambda: decode_shape(1, 2, 2, 2, 8), r"must be \(B, T, h, w, 4\)"),
        (lambda: decode_shape(2, 2, 2, 4), r"must be \(B, T, h, w, 4\)"),
        (lambda: decode_shape(1, 0, 2, 2, 4), r"must be \(B, T, h, w, 4\)"),
        (lambda: MODEL.latent_shape(47, 16, 16), "cut the clip to 41 frames or extend it to 48"),
        (lambda: LED.latent_shape(80, 16, 16), "80 frames are not 16n . 1, .* to 65 frames or .* to 81"),
        (lambda: LED.latent_shape(89, 16, 16), "cut the clip to 81 frames or extend it to 97"),
        (lambda: LED.latent_shape(0, 16, 16), "cut the clip to 1 frames or extend it to 17"),
        (lambda: LED.latent_shape(17, 12, 16), "12 x 16 pixels"),
        (lambda: jax.eval_shape(LED.encode, {}, jnp.zeros((1, 9, 16, 16, 3))), "9 frames are not 16n . 1"),
        (lambda: jax.eval_shape(LED.decode, {}, jnp.zeros((1, 1, 2, 2, 4))), "T above 1, got .1, 1, 2, 2, 4"),
        (lambda: cogvideox_vae.build(lead=2), "lead must be 1 for CogVideoX1.5 and 0 for the others, got 2"),
        (lambda: cogvideox_vae.build("float16"), "float16"),
        (lambda: cogvideox_vae.build(width=3), "width"),
        (lambda: cogvideox_vae.build(norm_num_groups=48), "multiples of norm_num_groups = 48"),
        (lambda: cogvideox_vae.build(temporal_compression_ratio=3), "power of two, at most 8"),
        (lambda: cogvideox_vae.build(temporal_compression_ratio=16), "power of two, at most 8"),
        (lambda: cogvideox_vae.build(scaling_factor=0.0), "scaling_factor must be positive"),
        (lambda: cogvideox_vae.build(tile=(256, 300)), "stride not above the size"),
        (lambda: cogvideox_vae.build(tile=((240, 200), (360, 368))), "stride not above the size"),
        (lambda: cogvideox_vae.build(tile=(250, 192)), "multiples of 8"),
        (lambda: cogvideox_vae.build(tile=256), "size, stride"),
        (lambda: cogvideox_vae.build(tile=((240, 200), (360,))), "size, stride"),
        (lambda: cogvideox_vae.build(tile=(240, 0)), "size, stride"),
        (lambda: models.build({"module": "cogvideox_vae", "widht": 3}), "widht"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_latent_shape():
    model = cogvideox_vae.build()
    assert model.latent_shape(49, 480, 720) == (13, 60, 90, 16)
    assert model.latent_shape(81, 768, 1360) == (21, 96, 170, 16)
    assert model.latent_shape(1, 8, 16) == (1, 1, 2, 16)
