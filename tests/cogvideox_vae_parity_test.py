"""The CogVideoX VAE against the public PyTorch implementation (diffusers), on random weights."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from prophy_jax.models.codecs import cogvideox_vae
from tests.late import late

torch = late("torch")
diffusers = late("diffusers")

SIZES = dict(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4)
# Without the blocks that resample no time: half the programs to compile.
SHALLOW = SIZES | dict(block_out_channels=(8, 8, 16))
# (B, F, H, W): an image, one piece and several, with and without a frame left over, the length of the public
# models, sides of one and of an odd number of latents.
ENCODED = [(2, 1, 40, 24), (1, 9, 24, 40), (2, 16, 24, 8), (1, 49, 16, 24)]
DECODED = [(2, 1, 40, 24), (2, 8, 8, 24), (1, 17, 8, 56), (1, 49, 16, 24)]
# fp32 on both sides: sums taken in another order through some 25 layers, on values of order 1.
SAME = 1e-5


@pytest.fixture(autouse=True)
def _full_precision(one_torch_thread):
    with jax.default_matmul_precision("highest"):
        yield


def our_name(name: str, ndim: int) -> str:
    module, _, leaf = name.replace(".", "/").rpartition("/")
    if leaf == "weight":
        leaf = "kernel" if ndim > 1 else "scale"
    return f"{module}/{leaf}"


def our_layout(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The order of axes: (O, I, ...) -> (..., I, O)."""
    return (*range(2, len(shape)), 1, 0)[-len(shape) :]


def our_tree(state) -> dict:
    tree = {
        our_name(name, tensor.ndim): jnp.asarray(tensor.numpy().transpose(our_layout(tensor.shape)))
        for name, tensor in state.items()
    }
    return traverse_util.unflatten_dict(tree, sep="/")


def model_of(sizes: dict):
    """(torch model, our parameters), every weight random, scales and biases included."""
    stages = len(sizes["block_out_channels"])
    reference = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * stages,
        up_block_types=("CogVideoXUpBlock3D",) * stages,
        **sizes,
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
            if (name.endswith("weight") and parameter.ndim == 1) or name.endswith("conv_y.conv.bias"):
                parameter.copy_(1 + 0.3 * noise)
            elif ".conv_y." in name:  # scales around 1: of any size, each norm would magnify rounding
                parameter.copy_(0.3 * noise / fan_in**0.5)
            else:
                parameter.copy_(noise / fan_in**0.5)
        # So that most frames lie within [-1, 1], where they are not clipped.
        reference.decoder.conv_out.conv.weight.div_(2)
    return reference, our_tree(reference.state_dict())


@pytest.fixture(scope="module")
def models():
    return model_of(SIZES)


@functools.cache
def compiled(method: str, **arguments):
    return jax.jit(getattr(cogvideox_vae.build(**(SIZES | arguments)), method))


def torch_moments(reference, video: np.ndarray) -> np.ndarray:
    """(B, F, H, W, 3) -> mean and clipped log-variance (B, T, h, w, 2z)."""
    with torch.no_grad():
        latents = reference.encode(channels_first(video)).latent_dist
    return torch.cat([latents.mean, latents.logvar], 1).permute(0, 2, 3, 4, 1).numpy()


def torch_decode(reference, latents: np.ndarray, scaling_factor: float = 0.7) -> np.ndarray:
    """Normalised (B, T, h, w, z) -> (B, F, H, W, 3); the pipeline undoes the normalisation, and clips."""
    latents = channels_first(latents / np.float32(scaling_factor)).to(reference.dtype)
    with torch.no_grad():
        frames = reference.decode(latents).sample
    return frames.permute(0, 2, 3, 4, 1).float().clamp(-1, 1).numpy()


def channels_first(array: np.ndarray):
    # Contiguous: the group norm of PyTorch loses digits on channels-last memory.
    return torch.from_numpy(array).permute(0, 4, 1, 2, 3).contiguous()


def video_of(shape) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (*shape, 3)).astype(np.float32)


def latents_of(shape) -> np.ndarray:
    grid = cogvideox_vae.build(**SIZES).latent_shape(*shape[1:])
    return np.random.default_rng(1).standard_normal((shape[0], *grid), np.float32)


@pytest.mark.parametrize("shape", ENCODED)
def test_moments(models, shape):
    reference, params = models
    expected = torch_moments(reference, video_of(shape))
    out = jnp.concatenate(compiled("moments")(params, video_of(shape)), axis=-1)
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(out, expected, rtol=0, atol=SAME)


@pytest.mark.parametrize("shape", DECODED)
def test_decode(models, shape):
    reference, params = models
    expected = torch_decode(reference, latents_of(shape))
    out = compiled("decode")(params, latents_of(shape))
    assert out.shape == (*shape, 3)
    assert np.std(expected) > 0.2 and (np.abs(expected) < 1).mean() > 0.5  # not all clipped
    np.testing.assert_allclose(out, expected, rtol=0, atol=SAME)


def test_tiles():
    """Rows and columns by their own sizes; the columns overlap, and the last tiles are narrower."""
    reference, params = model_of(SHALLOW)
    video = video_of((1, 1, 16, 36))
    latents = np.random.default_rng(1).standard_normal((1, 1, 4, 9, 4), np.float32)
    untiled = torch_moments(reference, video), torch_decode(reference, latents)
    reference.enable_tiling(8, 20, None, 1 / 5)
    reference.tile_overlap_factor_height = 0.0  # as an argument it would be taken for None
    expected = torch_moments(reference, video), torch_decode(reference, latents)
    tile = ((8, 8), (20, 16))
    moments = jnp.concatenate(compiled("moments", tile=tile, **SHALLOW)(params, video), axis=-1)
    out = moments, compiled("decode", tile=tile, **SHALLOW)(params, latents)
    for ours, theirs, whole in zip(out, expected, untiled, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=SAME)
        assert np.abs(theirs - whole).max() > 0.01


def test_public_tiles_are_those_of_their_default():
    with torch.device("meta"):
        reference = diffusers.AutoencoderKLCogVideoX()
    for size, stride, factor, latent in (
        (reference.tile_sample_min_height, 200, reference.tile_overlap_factor_height, 30),
        (reference.tile_sample_min_width, 288, reference.tile_overlap_factor_width, 45),
    ):
        assert (size, int(size * (1 - factor))) == (8 * latent, stride)
        assert int(latent * (1 - factor)) == stride // 8 and size - int(size * factor) == stride
    assert (reference.tile_sample_min_height, reference.tile_sample_min_width) == (240, 360)


def test_bfloat16_is_as_close_to_fp32_as_theirs(models):
    reference, params = models
    latents = latents_of((1, 8, 8, 24))
    expected = torch_decode(reference, latents)
    theirs = torch_decode(copy.deepcopy(reference).to(torch.bfloat16), latents)
    ours = compiled("decode", dtype="bfloat16")(params, latents)

    def error(out) -> float:
        return float(np.sqrt(np.mean((np.asarray(out) - expected) ** 2)))

    # Both round the result of every layer; ours rounds the sums over time too, but not the norms.
    assert error(ours) < 1.25 * error(theirs)


def test_full_size_has_their_names_and_shapes():
    with torch.device("meta"):
        reference = diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(128, 256, 256, 512),
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            layers_per_block=3,
        )
    expected = {
        our_name(name, tensor.ndim): tuple(tensor.shape[axis] for axis in our_layout(tensor.shape))
        for name, tensor in reference.state_dict().items()
    }
    tree = jax.eval_shape(cogvideox_vae.build().init, jax.random.key(0))
    assert {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()} == expected
