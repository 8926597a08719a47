"""Text encoding against the public PyTorch implementations (transformers, diffusers), on random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prophy_jax.models.text import t5
from prophy_jax.models.text import tokenizer as text
from tests.late import late
from tests.t5_test import from_transformers, tokens
from tests.text_test import CLEANED
from tests.tiny_tokenizer import save_tiny_tokenizer

torch = late("torch")
diffusers = late("diffusers")
transformers = late("transformers")

# The negative prompt of the Wan2.1 reference code: full-width commas, Chinese and Latin letters.
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
PROMPTS = [prompt for prompt, _ in CLEANED] + [NEGATIVE, "the  ball falls, &amp; rolls on; " * 40]

SIZES = {"vocab_size": 256, "d_model": 40, "d_kv": 12, "d_ff": 56, "num_layers": 3, "num_heads": 4}
# Real lengths and the padded width. Beyond 128 tokens the last bucket is met; 1 is an empty prompt.
SHAPES = [([7], 7), ([5, 1, 13], 13), ([150, 33], 171)]
KINDS = {
    "umt5": ("UMT5Config", "UMT5EncoderModel"),
    "t5": ("T5Config", "T5EncoderModel"),
}


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def reference_model(kind: str):
    """Every weight random; the position biases and the queries are large enough to shape the attention."""
    config_class, model_class = (getattr(transformers, name) for name in KINDS[kind])
    config = config_class(**SIZES, feed_forward_proj="gated-gelu", dropout_rate=0.0, use_cache=False)
    reference = model_class._from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif "relative_attention_bias" in name or "shared" in name:
                parameter.copy_(noise)
            else:
                scale = SIZES["d_kv"] ** -0.5 if name.endswith(".q.weight") else 1.0
                parameter.copy_(scale * noise / parameter.shape[1] ** 0.5)
    return reference


def to_ours(reference, kind: str) -> tuple[t5.T5, dict]:
    model = t5.build(shared_bias=kind == "t5", **SIZES)
    state = {name: tensor.float().numpy() for name, tensor in reference.state_dict().items()}
    return model, jax.tree.map(jnp.asarray, from_transformers(state, model.config))


def run_reference(reference, ids, mask) -> np.ndarray:
    mask = None if mask is None else torch.from_numpy(mask.astype(np.int64))
    with torch.no_grad():
        out = reference(torch.from_numpy(ids.astype(np.int64)), mask).last_hidden_state
    return out.float().numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("lengths", "width"), SHAPES)
@pytest.mark.parametrize("masked", [True, False])
def test_forward(kind, lengths, width, masked):
    reference = reference_model(kind)
    model, params = to_ours(reference, kind)
    ids, mask = tokens(lengths, width)
    expected = run_reference(reference, ids, mask if masked else None)
    if masked:
        # transformers encodes the padding's rows too: whoever uses them has to zero them.
        padding = np.abs(expected[~mask])
        assert padding.size == 0 or padding.max() > 0.1
        expected = np.where(mask[..., None], expected, 0)
    out = np.asarray(jax.jit(model)(params, ids, mask if masked else None))
    # fp32 on both sides, outputs up to 5 after three layers.
    np.testing.assert_allclose(out, expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_no_further_from_fp32_than_the_reference_is(kind):
    reference = reference_model(kind).bfloat16()
    model, params = to_ours(reference, kind)  # fp32 copies of the rounded weights
    ids, mask = tokens([150, 33], 171)
    exact = np.asarray(jax.jit(model)(params, ids, mask))[mask]
    half = dataclasses.replace(model, dtype=jnp.dtype(jnp.bfloat16))
    out = np.asarray(jax.jit(half)(params, ids, mask))[mask]
    theirs = run_reference(reference, ids, mask)[mask]
    their_error, our_error = (theirs - exact).std(), (out - exact).std()
    assert their_error > 1e-3  # it does compute in bfloat16
    # Both round the stream and the activations; the reference rounds scores, biases and norms as well.
    assert our_error < their_error
    # Two results, each that far from the exact one, differ by at most the sum of the two.
    assert (out - theirs).std() < their_error + our_error


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (64, 300)])
def test_buckets(num_buckets, max_distance):
    from transformers.models.umt5.modeling_umt5 import UMT5Attention

    config = transformers.UMT5Config(
        **SIZES, relative_attention_num_buckets=num_buckets, relative_attention_max_distance=max_distance
    )
    attention = UMT5Attention(config, has_relative_attention_bias=True)
    positions = torch.arange(600)
    expected = attention._relative_position_bucket(positions - positions[:, None]).numpy()
    np.testing.assert_array_equal(t5.relative_buckets(600, num_buckets, max_distance), expected)


def test_cleaning():
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    for prompt in PROMPTS:
        assert text.clean(prompt) == prompt_clean(prompt), prompt


def test_prompts_become_the_embeddings_of_the_pipeline(tmp_path):
    """From strings to zero-padded features, with WanPipeline's own tokenizer call and truncation."""
    save_tiny_tokenizer(tmp_path)
    reference = reference_model("umt5")
    pipeline = diffusers.WanPipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True),
        text_encoder=reference,
        vae=None,
        scheduler=None,
        transformer=None,
    )
    model, params = to_ours(reference, "umt5")
    tokenizer = text.load_tokenizer(tmp_path, model.config.vocab_size)
    for length in (9, 160):
        with torch.no_grad():
            expected = pipeline._get_t5_prompt_embeds(PROMPTS, max_sequence_length=length).numpy()
        out = np.asarray(jax.jit(model)(params, *tokenizer(PROMPTS, length)))
        np.testing.assert_allclose(out, expected, rtol=0, atol=3e-5)
        assert np.all((out == 0).all(-1) == (expected == 0).all(-1))


def test_prompts_become_the_embeddings_of_the_cogvideox_pipeline(tmp_path):
    """All rows, with CogVideoXPipeline's own tokenizer call and truncation; it cleans no prompt."""
    save_tiny_tokenizer(tmp_path)
    reference = reference_model("t5")
    pipeline = diffusers.CogVideoXPipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True),
        text_encoder=reference,
        vae=None,
        scheduler=None,
        transformer=None,
    )
    model, params = to_ours(reference, "t5")
    model = dataclasses.replace(model, padding="encoded")
    tokenizer = text.load_tokenizer(tmp_path, model.config.vocab_size)
    prompts = ["", "a red ball falls on the box.", "the ball rolls into the box, " * 40]
    for length in (9, 226):
        with torch.no_grad():
            expected = pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=length).numpy()
        ids, mask = tokenizer(prompts, length)
        out = np.asarray(jax.jit(model)(params, ids, mask))
        assert out.shape == (3, length, SIZES["d_model"]) and mask.sum(1).tolist()[0] == 1
        np.testing.assert_allclose(out, expected, rtol=0, atol=3e-5)
