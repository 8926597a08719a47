"""The Wan VAE against the public PyTorch implementation (diffusers), on random weights."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from prophy_jax.models.codecs import wan_vae
from tests.late import late

torch = late("torch")
diffusers = late("diffusers")

SIZES = dict(base_dim=8, num_res_blocks=1)
# (B, F, H, W): an image, few and many frames, sides of one and of an odd number of latents.
SHAPES = [(2, 1, 40, 24), (1, 5, 8, 56), (1, 9, 40, 24), (2, 17, 24, 8)]
# fp32 on both sides: sums taken in another order through some 30 layers, on values of order 1.
SAME = 1e-5


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def our_name(name: str) -> str:
    module, _, leaf = name.replace(".", "/").rpartition("/")
    return f"{module}/{ {'weight': 'kernel', 'gamma': 'scale', 'bias': 'bias'}[leaf] }"


def our_layout(name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(order of axes, shape): (O, I, ...) -> (..., I, O), and gammas of one axis."""
    if name.endswith("weight"):
        order = (*range(2, len(shape)), 1, 0)
        return order, tuple(shape[axis] for axis in order)
    return tuple(range(len(shape))), shape[:1]


def our_tree(state) -> dict:
    tree = {}
    for name, tensor in state.items():
        order, shape = our_layout(name, tuple(tensor.shape))
        tree[our_name(name)] = jnp.asarray(tensor.numpy().transpose(order).reshape(shape))
    return traverse_util.unflatten_dict(tree, sep="/")


@pytest.fixture(scope="module")
def models():
    """(torch model, our parameters), every weight random, gammas and biases included."""
    reference = diffusers.AutoencoderKLWan(**SIZES).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gamma"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
                parameter.copy_(noise / fan_in**0.5)
    return reference, our_tree(reference.state_dict())


@functools.cache
def compiled(method: str, **arguments):
    return jax.jit(getattr(wan_vae.build(**SIZES, **arguments), method))


def torch_moments(reference, video: np.ndarray) -> np.ndarray:
    """(B, F, H, W, 3) -> mean and clipped log-variance (B, T, h, w, 32)."""
    with torch.no_grad():
        latents = reference.encode(torch.from_numpy(video).permute(0, 4, 1, 2, 3)).latent_dist
    return torch.cat([latents.mean, latents.logvar], 1).permute(0, 2, 3, 4, 1).numpy()


def torch_decode(reference, latents: np.ndarray) -> np.ndarray:
    """Normalised (B, T, h, w, 16) -> (B, F, H, W, 3); the pipeline undoes the normalisation."""
    mean, std = (np.float32(reference.config[f"latents_{name}"]) for name in ("mean", "std"))
    latents = torch.from_numpy(latents * std + mean).permute(0, 4, 1, 2, 3)
    with torch.no_grad():
        return reference.decode(latents.to(reference.dtype)).sample.permute(0, 2, 3, 4, 1).float().numpy()


def video_of(shape) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (*shape, 3)).astype(np.float32)


def latents_of(shape) -> np.ndarray:
    grid = wan_vae.build().latent_shape(*shape[1:])
    return np.random.default_rng(1).standard_normal((shape[0], *grid), np.float32)


@pytest.mark.parametrize("whole", [False, True], ids=["pieces", "whole"])
@pytest.mark.parametrize("shape", SHAPES)
def test_moments(models, shape, whole):
    reference, params = models
    expected = torch_moments(reference, video_of(shape))
    out = jnp.concatenate(compiled("moments", whole=whole)(params, video_of(shape)), axis=-1)
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(out, expected, rtol=0, atol=SAME)


@pytest.mark.parametrize("whole", [False, True], ids=["pieces", "whole"])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode(models, shape, whole):
    reference, params = models
    expected = torch_decode(reference, latents_of(shape))
    out = compiled("decode", whole=whole)(params, latents_of(shape))
    assert (np.abs(expected) < 1).mean() > 0.1  # not all clipped
    np.testing.assert_allclose(out, expected, rtol=0, atol=SAME)


def test_tiles(models):
    """Three rows of tiles and two columns, the last ones smaller."""
    reference, params = models
    tiled, shape, size = copy.deepcopy(reference), (1, 5, 40, 24), (24, 16)
    tiled.enable_tiling(size[0], size[0], size[1], size[1])
    moments = torch_moments(tiled, video_of(shape))
    out = jnp.concatenate(compiled("moments", tile=size, whole=True)(params, video_of(shape)), axis=-1)
    np.testing.assert_allclose(out, moments, rtol=0, atol=SAME)
    frames = torch_decode(tiled, latents_of(shape))
    out = compiled("decode", tile=size, whole=True)(params, latents_of(shape))
    np.testing.assert_allclose(out, frames, rtol=0, atol=SAME)
    assert np.abs(frames - torch_decode(reference, latents_of(shape))).max() > 0.01


def test_bfloat16_is_as_close_to_fp32_as_theirs(models):
    reference, params = models
    latents = latents_of((1, 5, 40, 24))
    expected = torch_decode(reference, latents)
    theirs = torch_decode(copy.deepcopy(reference).to(torch.bfloat16), latents)
    ours = compiled("decode", dtype="bfloat16", whole=True)(params, latents)

    def error(out) -> float:
        return float(np.sqrt(np.mean((np.asarray(out) - expected) ** 2)))

    # Both round the result of every layer; ours rounds the sums over time too.
    assert error(ours) < 1.25 * error(theirs)


def test_full_size_has_their_names_shapes_and_statistics():
    with torch.device("meta"):
        reference = diffusers.AutoencoderKLWan()
    model = wan_vae.build()
    expected = {
        our_name(name): our_layout(name, tuple(tensor.shape))[1]
        for name, tensor in reference.state_dict().items()
    }
    tree = jax.eval_shape(model.init, jax.random.key(0))
    assert {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()} == expected
    assert tuple(reference.config.latents_mean) == model.config.latents_mean
    assert tuple(reference.config.latents_std) == model.config.latents_std
