"""Text to video, whole: diffusers' CogVideoXPipeline and ours from the same files, prompts and noise.

Tiny random components, saved by diffusers and transformers in their own file formats and converted by our
command; sampled by the settings of configs/cogvideox.py.
"""

import jax
import numpy as np
import pytest

from convert import cogvideox as convert_cogvideox
from prophy_jax import build, sample
from prophy_jax.diffusion import generate, solvers
from prophy_jax.run import encoders
from tests import tiny_pipeline
from tests.cogvideox_vae_parity_test import model_of
from tests.conftest import build_run
from tests.late import late
from tests.tiny_models import randomise
from tests.tiny_tokenizer import save_tiny_tokenizer

torch = late("torch")
diffusers = late("diffusers")
transformers = late("transformers")

PROMPT = "A red ball falls on the blue box and rolls into it."
# By variants of configs/cogvideox.py: what tells their config.json apart, with 3 x 4 tokens for 30 x 45.
SHORT = dict(sample_height=6, sample_width=8, sample_frames=49)
LATER = dict(sample_height=300, sample_width=300, sample_frames=81, patch_size_t=2, patch_bias=False)
ROPE = dict(use_rotary_positional_embeddings=True)
VARIANTS = {"2b": SHORT, "": SHORT | ROPE, "1.5-5b": LATER | ROPE}
SCHEDULERS = {"ddim": "CogVideoXDDIMScheduler", "cogvideox-dpm": "CogVideoXDPMScheduler"}


@pytest.fixture(scope="module", autouse=True)
def _full_precision(one_torch_thread):
    with jax.default_matmul_precision("highest"):
        yield


def random_transformer(config, fields: dict):
    """Of the sizes of `config`, every weight random."""
    sizes = config.backbone
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=sizes.num_heads,
        attention_head_dim=sizes.dim // sizes.num_heads,
        num_layers=sizes.num_layers,
        text_embed_dim=sizes.text_dim,
        time_embed_dim=sizes.time_dim,
        max_text_seq_length=sizes.text_len,
        **fields,
    )
    randomise(transformer, seed=0)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "norm" in name and parameter.ndim == 2:  # they modulate: 1 + 0.2 noise -> by their fan-in
                parameter.sub_(1).mul_(5 / parameter.shape[1] ** 0.5)
    return transformer.eval()


def random_text_encoder(config):
    names = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    sizes = {name: config.text_encoder[name] for name in names}
    encoder = transformers.T5EncoderModel(transformers.T5Config(feed_forward_proj="gated-gelu", **sizes))
    randomise(encoder, seed=1, scale=0.5)  # attention is not divided by sqrt(d)
    return encoder.eval()


def random_vae(config):
    names = ("block_out_channels", "layers_per_block", "norm_num_groups", "scaling_factor")
    vae, _ = model_of({name: config.codec[name] for name in names})
    return vae


@pytest.fixture(scope="module")
def pipeline(request, tmp_path_factory):
    """A configuration, and diffusers' pipeline from the files that its converted checkpoint was made of."""
    config = tiny_pipeline.cogvideox(request.param)
    root = tmp_path_factory.mktemp("cogvideox")
    save_tiny_tokenizer(root / "tokenizer", vocab_size=250)
    whole = diffusers.CogVideoXPipeline(
        transformers.AutoTokenizer.from_pretrained(root / "tokenizer"),
        random_text_encoder(config),
        random_vae(config),
        random_transformer(config, VARIANTS[request.param]),
        getattr(diffusers, SCHEDULERS[config.samples.solver])(),
    )
    whole.save_pretrained(root / "public")
    convert_cogvideox.main([f"--src={root / 'public'}", f"--dst={root / 'ours'}"])
    sample.use_checkpoint(config, str(root / "ours"))
    whole = diffusers.CogVideoXPipeline.from_pretrained(root / "public")
    whole.set_progress_bar_config(disable=True)
    return config, whole


def scheduler_of(solver: str, snr_shift: float):
    """As the public configurations have it; the defaults of the classes differ in every one of these."""
    return getattr(diffusers, SCHEDULERS[solver])(
        **dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        **dict(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True),
        snr_shift_scale=snr_shift,
    )


def sample_theirs(whole, config, noise, noises, monkeypatch):
    """Latents (1, T, h, w, 16) and frames (F, H, W, 3) in [0, 1] of diffusers' pipeline.

    In a step its scheduler draws noise once or twice and uses the last: all of them are those of `noises`.
    """
    noise, *noises = (torch.from_numpy(z.transpose(0, 1, 4, 2, 3).copy()) for z in (noise, *noises))
    steps = []  # The latents after each.

    def draw(shape, *_, **__):
        assert tuple(shape) == noise.shape
        return noises[len(steps)]

    def keep(_, i, t, tensors):
        steps.append(tensors["latents"])
        return {}

    from diffusers.schedulers import scheduling_dpm_cogvideox

    monkeypatch.setattr(scheduling_dpm_cogvideox, "randn_tensor", draw)
    whole.scheduler = scheduler_of(config.samples.solver, config.objective.snr_shift)
    settings, data = config.samples, config.data
    frames = whole(
        prompt=PROMPT, negative_prompt=settings.negative_prompt, height=data.height, width=data.width,
        num_frames=data.frames, num_inference_steps=settings.steps, guidance_scale=settings.guidance,
        use_dynamic_cfg=settings.guidance_schedule == "dynamic", latents=noise, output_type="np",
        max_sequence_length=tiny_pipeline.LENGTH, callback_on_step_end=keep,
    ).frames  # fmt: skip
    assert len(steps) == settings.steps
    return steps[-1].numpy().transpose(0, 1, 3, 4, 2), frames[0]


@pytest.mark.parametrize(
    ("pipeline", "changes"),
    [("2b", {}), ("", {}), ("", dict(solver="ddim", guidance_schedule="constant")), ("1.5-5b", {})],
    indirect=["pipeline"],
    ids=["2b", "5b", "5b-ddim", "1.5-5b"],
)
def test_latents_and_frames(pipeline, changes, monkeypatch):
    config, whole = pipeline
    config = config.copy_and_resolve_references()
    config.samples.update(changes)
    settings = config.samples
    run = build_run(config, jax.devices()[:1])
    codec = encoders.load_codec(config, run.mesh)
    shape = codec.latent_shape(config.data.frames, config.data.height, config.data.width)
    noise = np.asarray(generate.make_noise(3, np.arange(1), shape))
    table = run.objective.solver(settings.solver, settings.steps, settings.shift)
    noises = []
    if table.stochastic:
        state = solvers.start(table, noise)
        noises = [np.asarray(solvers.step_noise(state, i)) for i in range(settings.steps)]
    latents, frames = sample_theirs(whole, config, noise, noises, monkeypatch)
    assert np.abs(latents - noise).max() > 0.5  # it sampled something
    assert frames.std() > 0.1  # and not a grey screen

    text, mask = encoders.load_text_encoder(config)([PROMPT, settings.negative_prompt])
    assert generate.text_rows(mask) == 32  # of 48: what shortens padding for Wan is of no effect here
    ours = generate.make_generator(run.model, run.objective, settings)(
        build.load_params(config, run.layout, {"backbone": config.backbone_params}),
        noise,
        {"text": text[:1], "text_mask": mask[:1]},
        {"text": text[1], "text_mask": mask[1]},
    )
    ours = np.asarray(ours)
    decoded = codec.decode(ours[0])
    assert decoded.shape == (config.data.frames, config.data.height, config.data.width, 3)
    print(f"latents {np.abs(ours - latents).max():.2e} of {latents.std():.2f}, "
          f"frames {np.abs(decoded - 255 * frames).max():.3f} of 255")  # fmt: skip
    # fp32 on both sides; guidance multiplies each step's rounding by up to 13.
    np.testing.assert_allclose(ours, latents, rtol=0, atol=1e-3)
    assert np.abs(decoded - 255 * frames).max() <= 2
