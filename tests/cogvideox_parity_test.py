"""The CogVideoX transformers against the public PyTorch implementation (diffusers), on random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prophy_jax.models import cogvideox
from tests.cogvideox_test import from_diffusers
from tests.late import late

torch = late("torch")
diffusers = late("diffusers")
embeddings = late("diffusers.models.embeddings")
pipeline_cogvideox = late("diffusers.pipelines.cogvideo.pipeline_cogvideox")

HEADS, HEAD_DIM, TEXT_LEN, TEXT_DIM = 3, 32, 7, 24
ROWS, COLUMNS = 6, 10  # of the latents that the positions were made for
# (B, T, h, w): that grid, others of its shape, wider, taller, square, and of one token.
SHAPES = {
    "2b": [(2, 3, 6, 10), (1, 1, 2, 14), (2, 2, 10, 6)],
    "5b": [(2, 3, 6, 10), (1, 1, 12, 20), (1, 2, 2, 14), (2, 5, 10, 4), (1, 3, 6, 6), (1, 1, 2, 2)],
    "1.5-5b": [(2, 4, 6, 10), (1, 2, 2, 14), (2, 6, 14, 6)],
}
CASES = [(variant, shape) for variant, shapes in SHAPES.items() for shape in shapes]
POSITIONS = {"2b": "sincos", "5b": "rope_crop", "1.5-5b": "rope_slice"}


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_torch_thread):
    yield


@pytest.fixture(scope="module")
def models():
    """{variant: (torch model, ours, our parameters)}, every weight random, norms included."""
    return {variant: make(variant) for variant in SHAPES}


def make(variant):
    pairs = variant == "1.5-5b"
    with torch.no_grad():
        reference = diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            num_layers=3,
            time_embed_dim=20,
            text_embed_dim=TEXT_DIM,
            max_text_seq_length=TEXT_LEN,
            sample_height=ROWS,
            sample_width=COLUMNS,
            sample_frames=9,
            patch_size_t=2 if pairs else None,
            patch_bias=not pairs,  # the model has one all the same
            use_rotary_positional_embeddings=variant != "2b",
        )
        generator = torch.Generator().manual_seed(0)
        for name, parameter in reference.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
                parameter.copy_(noise / fan_in**0.5)
    width = HEADS * HEAD_DIM
    model = cogvideox.build(
        **dict(dim=width, num_heads=HEADS, num_layers=3, ffn_dim=4 * width, time_dim=20),
        **dict(text_dim=TEXT_DIM, text_len=TEXT_LEN, patch_size=(2 if pairs else 1, 2, 2)),
        **dict(positions=POSITIONS[variant], base_grid=(ROWS // 2, COLUMNS // 2)),
    )
    reference.requires_grad_(False)
    state = {name: tensor.numpy() for name, tensor in reference.named_parameters()}
    return reference, model, from_diffusers(state, model.config)


def inputs(shape, times=(999, 37)):
    """Channel-last NumPy arrays."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((*shape, 16), np.float32)
    text = rng.standard_normal((shape[0], TEXT_LEN, TEXT_DIM), np.float32)
    return latents, np.array(times[: shape[0]]), text


def run_reference(reference, latents, times, text):
    """Channel-last torch tensors in and out, with the rotary tables that the pipeline makes."""
    _, frames, rows, columns, _ = latents.shape
    grid, rope = (rows // 2, columns // 2), None
    if reference.config.patch_size_t is not None:
        rope = embeddings.get_3d_rotary_pos_embed(
            HEAD_DIM, None, grid, frames // 2, grid_type="slice", max_size=(150, 150)
        )
    elif reference.config.use_rotary_positional_embeddings:
        crop = pipeline_cogvideox.get_resize_crop_region_for_grid(grid, COLUMNS // 2, ROWS // 2)
        rope = embeddings.get_3d_rotary_pos_embed(HEAD_DIM, crop, grid, frames)
    out = reference(latents.permute(0, 1, 4, 2, 3), text, times, image_rotary_emb=rope, return_dict=False)[0]
    return out.permute(0, 1, 3, 4, 2)


@pytest.mark.parametrize(("variant", "shape"), CASES)
def test_forward(models, variant, shape):
    reference, model, params = models[variant]
    for times in ((999, 37), (0, 500)):
        arrays = inputs(shape, times)
        with torch.no_grad():
            expected = run_reference(reference, *map(torch.from_numpy, arrays)).numpy()
        out = np.asarray(jax.jit(model)(params, *arrays))
        assert np.abs(expected).max() > 1
        # fp32 on both sides; at t near 1000 a rounded phase of the time embedding weighs most.
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", SHAPES)
def test_gradients_of_inputs_and_of_every_weight(models, variant):
    reference, model, params = models[variant]
    model = dataclasses.replace(model, remat="self_attention")  # Must not change a gradient.
    latents, times, text = inputs(SHAPES[variant][0])
    weight = np.random.default_rng(9).standard_normal(latents.shape, np.float32) / latents.size

    torch_latents = torch.from_numpy(latents).requires_grad_()
    torch_text = torch.from_numpy(text).requires_grad_()
    reference.requires_grad_(True)
    reference.zero_grad()
    out = run_reference(reference, torch_latents, torch.from_numpy(times), torch_text)
    (out * torch.from_numpy(weight)).sum().backward()
    weights = {name: p.grad.numpy() for name, p in reference.named_parameters()}
    reference.requires_grad_(False)
    expected = {
        "params": from_diffusers(weights, model.config),
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
        name, got, want = jax.tree_util.keystr(path), np.asarray(got), np.asarray(want)
        if model.config.positions == "sincos" and name.endswith("['norm_k']['bias']"):
            # Adds the same to all scores of a query, unless keys are rotated: softmax does not see it.
            np.testing.assert_allclose([got, want], 0, atol=1e-8, err_msg=name)
            continue
        largest = np.abs(want).max()
        assert largest > 1e-6, name
        # fp32 sums over all tokens, taken in another order: relative to the largest entry.
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * largest, err_msg=name)
