"""The Wan transformer against the public PyTorch implementation (diffusers), on random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import wan as convert_wan
from prophy_jax.models import wan
from tests import state_dicts
from tests.late import late

torch = late("torch")
diffusers = late("diffusers")

HEADS, HEAD_DIM, TEXT_DIM, TEXT_LEN = 3, 16, 24, 20
SHAPES = [(2, 3, 6, 10), (1, 1, 2, 14), (2, 5, 4, 4)]  # (B, T, h, w): odd and even token grids.


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def models():
    return make()


def make():
    """(torch model, ours, our parameters), every weight random, norms and tables included."""
    reference = diffusers.WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=3,
        ffn_dim=40,
        text_dim=TEXT_DIM,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name.split(".")[-2] if "." in name else False
            if is_norm and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
                parameter.copy_(noise / fan_in**0.5)
    model = wan.build(dim=HEADS * HEAD_DIM, num_heads=HEADS, num_layers=3, ffn_dim=40, text_dim=TEXT_DIM)
    state = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    return reference, model, state_dicts.read(state, convert_wan.dit_leaves(model.config, "diffusers"))


def inputs(shape, t, seed=0):
    """Channel-last NumPy arrays; the second sample of a batch has a time between two integers."""
    rng = np.random.default_rng(seed)
    latents = rng.standard_normal((*shape, 16), np.float32)
    text = rng.standard_normal((shape[0], TEXT_LEN, TEXT_DIM), np.float32)
    text[:, 13:] = 0
    times = np.array([t, t * 0.9 + 0.37][: shape[0]], np.float32)
    return latents, times, text


def run_reference(reference, latents, times, text):
    """Channel-last torch tensors in and out."""
    out = reference(latents.permute(0, 4, 1, 2, 3), times, text, return_dict=False)[0]
    return out.permute(0, 2, 3, 4, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [0, 37, 500, 999])
def test_forward(models, shape, t):
    reference, model, params = models
    arrays = inputs(shape, t)
    with torch.no_grad():
        expected = run_reference(reference, *map(torch.from_numpy, arrays)).numpy()
    out = np.asarray(jax.jit(model)(params, *arrays))
    # fp32 on both sides. At t near 1000 a rounded phase of the time embedding alone costs 3e-5.
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4)


def test_gradients_of_inputs_and_of_every_weight(models):
    reference, model, params = models
    model = dataclasses.replace(model, remat="attention")  # Must not change a gradient.
    latents, times, text = inputs(SHAPES[0], 500)
    weight = np.random.default_rng(9).standard_normal(latents.shape, np.float32) / latents.size

    torch_latents = torch.from_numpy(latents).requires_grad_()
    torch_text = torch.from_numpy(text).requires_grad_()
    reference.zero_grad()
    out = run_reference(reference, torch_latents, torch.from_numpy(times), torch_text)
    (out * torch.from_numpy(weight)).sum().backward()
    weights = {name: p.grad.numpy() for name, p in reference.named_parameters()}
    expected = {
        "params": state_dicts.read(weights, convert_wan.dit_leaves(model.config, "diffusers")),
        "latents": torch_latents.grad.numpy(),
        "text": torch_text.grad.numpy(),
    }

    def loss(arguments):
        out = model(arguments["params"], arguments["latents"], times, arguments["text"])
        return (out * weight).sum()

    arguments = {"params": params, "latents": latents, "text": text}
    gradient = jax.jit(jax.grad(loss))(jax.tree.map(jnp.asarray, arguments))
    paths, _ = jax.tree.flatten_with_path(expected)
    for (path, want), got in zip(paths, jax.tree.leaves(gradient), strict=True):
        name, got = jax.tree_util.keystr(path), np.asarray(got)
        assert np.abs(want).max() > 0, name
        # fp32 sums over all tokens, taken in another order: relative to the largest entry.
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max(), err_msg=name)


def test_official_names_give_the_same_model(models):
    _, model, params = models
    table = convert_wan.dit_leaves(model.config, "official")
    official = state_dicts.read(state_dicts.write(params, table), table)
    arrays = inputs(SHAPES[0], 500)
    run = jax.jit(model)
    np.testing.assert_array_equal(run(official, *arrays), run(params, *arrays))


def test_our_weights_are_the_state_of_the_reference(models):
    reference, model, params = models
    state = state_dicts.write(params, convert_wan.dit_leaves(model.config, "diffusers"))
    expected = reference.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(state[name], tensor.numpy(), err_msg=name)
