"""CogVideoX files that torch, diffusers and transformers wrote, converted and exported, compute the same."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import cogvideox as convert_cogvideox
from convert import export as convert_export
from prophy_jax import models
from prophy_jax.run import checkpoints
from tests.convert_cogvideox_test import LOSS, SAT_TRANSFORMER, to_sat, vae_to_sat
from tests.convert_files_test import load
from tests.late import late
from tests.tiny_models import randomise
from tests.tiny_tokenizer import save_tiny_tokenizer

torch = late("torch")
diffusers = late("diffusers")
embeddings = late("diffusers.models.embeddings")
transformers = late("transformers")

HEADS, WIDTH = 3, 16
SIZES = dict(
    num_attention_heads=HEADS,
    attention_head_dim=WIDTH,
    num_layers=3,
    text_embed_dim=24,
    time_embed_dim=20,
    max_text_seq_length=6,
    sample_height=6,
    sample_width=8,
    sample_frames=9,  # 3 latents
)
VARIANTS = {
    "2b": SIZES,
    "5b": dict(SIZES, use_rotary_positional_embeddings=True),
    "1.5": dict(
        SIZES,
        use_rotary_positional_embeddings=True,
        patch_size_t=2,
        patch_bias=False,
        sample_height=300,
        sample_width=300,
        sample_frames=81,
    ),
}
VAE = dict(
    block_out_channels=[32, 32, 64],
    down_block_types=["CogVideoXDownBlock3D"] * 3,
    up_block_types=["CogVideoXUpBlock3D"] * 3,
    layers_per_block=1,
    latent_channels=16,
    scaling_factor=0.7,
)
T5 = dict(vocab_size=256, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4)


@pytest.fixture(scope="module")
def modules():
    """Text encoder, VAE and a transformer of each variant, every weight random."""
    built = {
        "text_encoder": transformers.T5EncoderModel(
            transformers.T5Config(feed_forward_proj="gated-gelu", **T5)
        ),
        "vae": diffusers.AutoencoderKLCogVideoX(**VAE),
    }
    for variant, sizes in VARIANTS.items():
        built[variant] = diffusers.CogVideoXTransformer3DModel(**sizes)
    for seed, (name, module) in enumerate(built.items()):
        randomise(module, seed, 0.5 if name == "text_encoder" else 1.0)
        module.eval()
    return built


def convert(src, dst, *flags: str):
    convert_cogvideox.main([f"--src={src}", f"--dst={dst}", *flags])
    return dst


def export(src, dst):
    convert_export.main([f"--checkpoint={src}", "--format=diffusers", f"--dst={dst}"])
    return dst


def rope(frames: int, rows: int, columns: int):
    """Of positions 0, 1, 2..., as at the size of training."""
    return embeddings.get_3d_rotary_pos_embed(
        WIDTH, None, (rows, columns), frames, grid_type="slice", max_size=(rows, columns)
    )


def inputs(variant: str):
    """latents (2, T, 6, 8, 16), t (2,), text (2, 6, 24); as NumPy arrays."""
    rng = np.random.default_rng(1)
    frames = 4 if variant == "1.5" else 3
    latents = rng.standard_normal((2, frames, 6, 8, 16), np.float32)
    # Early times: of late ones both sides round the angles of the time embedding, by up to 6e-5.
    return latents, np.array([5, 37]), rng.standard_normal((2, 6, 24), np.float32)


def run_reference(module, variant: str) -> np.ndarray:
    latents, t, text = inputs(variant)
    video = torch.from_numpy(latents.transpose(0, 1, 4, 2, 3).copy())
    frames = latents.shape[1] // (module.config.patch_size_t or 1)
    tables = None if variant == "2b" else rope(frames, 3, 4)
    with torch.no_grad():
        out = module(video, torch.from_numpy(text), torch.from_numpy(t), image_rotary_emb=tables).sample
    return out.numpy().transpose(0, 1, 3, 4, 2)


def assert_same_state(got, want):
    got, want = got.state_dict(), want.state_dict()
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


def settle(module):
    """Moves weights out of the mapped file, where they may lie so that PyTorch sums in another order."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return module


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_there_and_back(tmp_path, modules, variant):
    module = modules[variant]
    module.save_pretrained(tmp_path / "src" / "transformer")
    ours = convert(tmp_path / "src", tmp_path / "ours")
    spec = checkpoints.read_manifest(str(ours / "transformer"), "")["model"]
    model, params = models.build(spec), load(ours / "transformer")
    want = run_reference(module, variant)
    with jax.default_matmul_precision("highest"):
        out = jax.jit(model.__call__)(params, *map(jnp.asarray, inputs(variant)))
    # fp32 on both sides, outputs up to 5 after three layers: every tensor is where it belongs.
    assert want.std() > 0.3
    np.testing.assert_allclose(np.asarray(out), want, rtol=0, atol=3e-5)

    folder = export(ours, tmp_path / "out") / "transformer"
    loaded, info = diffusers.CogVideoXTransformer3DModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_state(loaded, module)
    written, theirs = (
        json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "src" / "transformer")
    )
    assert written.keys() == theirs.keys() - {"_name_or_path"}
    # A number of frames that is in no formula is written as published.
    differing = {key for key in written if written[key] != theirs[key]}
    assert differing == {"_diffusers_version"} | (set() if variant == "1.5" else {"sample_frames"})
    np.testing.assert_array_equal(run_reference(settle(loaded), variant), want)


def test_the_vae_there_and_back(tmp_path, modules):
    module = modules["vae"]
    module.save_pretrained(tmp_path / "src" / "vae")
    ours = convert(tmp_path / "src", tmp_path / "ours")
    video = torch.randn((1, 3, 9, 16, 16), generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    model = models.build(checkpoints.read_manifest(str(ours / "vae"), "")["model"])
    params = load(ours / "vae")
    with torch.no_grad():
        moments = module.encode(video).latent_dist.parameters
        latents = moments[:, :16]
        frames = module.decode(latents).sample
    with jax.default_matmul_precision("highest"):
        pixels = jnp.asarray(video.numpy().transpose(0, 2, 3, 4, 1))
        mean, _ = jax.jit(model.moments)(params, pixels)
        normalised = jnp.asarray(latents.numpy().transpose(0, 2, 3, 4, 1)) * 0.7
        decoded = jax.jit(model.decode)(params, normalised)
    want = latents.numpy().transpose(0, 2, 3, 4, 1)
    # fp32 through norms: 1e-5 of values of size 1.
    np.testing.assert_allclose(np.asarray(mean), want, rtol=0, atol=1e-4)
    want = frames.clamp(-1, 1).numpy().transpose(0, 2, 3, 4, 1)
    np.testing.assert_allclose(np.asarray(decoded), want, rtol=0, atol=1e-4)

    folder = export(ours, tmp_path / "out") / "vae"
    loaded, info = diffusers.AutoencoderKLCogVideoX.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_state(loaded, module)
    with torch.no_grad():
        assert torch.equal(settle(loaded).decode(latents).sample, frames)
    written, theirs = (
        json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "src" / "vae")
    )
    assert written.keys() == theirs.keys() - {"_name_or_path"}
    assert {key for key in written if written[key] != theirs[key]} == {"_diffusers_version"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_sat_files_of_torch_have_the_same_hashes(tmp_path, modules, variant):
    """A transformer in bfloat16, as the public files are, and the VAE of its training with the losses."""
    half = {name: t.detach().to(torch.bfloat16) for name, t in modules[variant].state_dict().items()}
    raw = {
        name: t.view(torch.int16).numpy() for name, t in half.items() if name != "patch_embed.pos_embedding"
    }
    sat = {name: torch.from_numpy(t).view(torch.bfloat16) for name, t in to_sat(raw).items()}
    if variant == "2b":
        sat["model.diffusion_model.mixins.pos_embed.pos_embedding"] = torch.zeros(1, 42, 48)
    (tmp_path / "sat" / SAT_TRANSFORMER).parent.mkdir(parents=True)
    torch.save({"module": sat}, tmp_path / "sat" / SAT_TRANSFORMER)
    state = {name: t.numpy() for name, t in modules["vae"].state_dict().items()}
    vae = {name: torch.from_numpy(np.array(t)) for name, t in (vae_to_sat(state) | LOSS).items()}
    (tmp_path / "sat" / "vae").mkdir()
    torch.save({"state_dict": vae}, tmp_path / "sat" / "vae" / "3d-vae.pt")

    modules["vae"].save_pretrained(tmp_path / "src" / "vae")
    module = diffusers.CogVideoXTransformer3DModel(**VARIANTS[variant]).to(torch.bfloat16)
    module.load_state_dict(half, strict=False)
    module.save_pretrained(tmp_path / "src" / "transformer")
    hashes = [
        [checkpoints.read_manifest(str(dst / part), "")["sha256"] for part in ("transformer", "vae")]
        for dst in (convert(tmp_path / "sat", tmp_path / "a"), convert(tmp_path / "src", tmp_path / "b"))
    ]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("variant", ["2b", "5b"])
def test_the_whole_pipeline_loads_and_samples(tmp_path, modules, variant):
    for part, name in [("transformer", variant), ("vae", "vae"), ("text_encoder", "text_encoder")]:
        modules[name].save_pretrained(tmp_path / "src" / part)
    save_tiny_tokenizer(tmp_path / "src" / "tokenizer")
    out = export(convert(tmp_path / "src", tmp_path / "ours"), tmp_path / "out")
    pipeline = diffusers.CogVideoXPipeline.from_pretrained(out)
    kind = diffusers.CogVideoXDDIMScheduler if variant == "2b" else diffusers.CogVideoXDPMScheduler
    assert type(pipeline.scheduler) is kind
    # The public table of noise: see diffusion/v_prediction.py.
    first = {"2b": 0.9974543276, "5b": 0.9991500000}[variant]
    alphas = pipeline.scheduler.alphas_cumprod
    assert abs(alphas[0] - first) < 1e-9 and alphas[-1] == 0

    wanted = kind(
        prediction_type="v_prediction",
        clip_sample=False,
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0 if variant == "2b" else 1.0,
        timestep_spacing="trailing",
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "src" / "tokenizer")
    parts = (tokenizer, modules["text_encoder"], modules["vae"], modules[variant], wanted)
    reference = diffusers.CogVideoXPipeline(*parts)
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        settle(module)
    arguments = dict(height=24, width=32, num_frames=9, num_inference_steps=2, max_sequence_length=6)
    clips = []
    for pipe in (pipeline, reference):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        clips.append(pipe("a ball", generator=generator, output_type="np", **arguments).frames)
    assert clips[1].std() > 0.01
    np.testing.assert_array_equal(*clips)
