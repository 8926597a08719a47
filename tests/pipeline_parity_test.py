"""Text to video, whole: diffusers' WanPipeline and ours from the same files, prompts and noise.

Tiny random components, saved by diffusers and transformers in their own file formats, converted by our
command line; the official layout holds the same weights under the official names.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from convert import t5, wan
from prophy_jax import build, models, sample
from prophy_jax.diffusion import generate
from prophy_jax.run import checkpoints, encoders
from tests import tiny_models, tiny_pipeline
from tests.conftest import ROOT, build_run, xla_flags
from tests.late import late

torch = late("torch")
diffusers = late("diffusers")
safetensors_torch = late("safetensors.torch")

PROMPT = "A red ball falls on the blue box &amp; rolls  into it."
NEGATIVE = "静态，画面模糊, a box"
FRAMES, HEIGHT, WIDTH = 9, 48, 80
STEPS, GUIDANCE = 8, 5.0


@pytest.fixture(scope="module")
def pipeline():
    return tiny_models.random_parts()


@pytest.fixture(scope="module")
def sources(pipeline, tmp_path_factory) -> dict[str, pathlib.Path]:
    """The same weights in both public layouts."""
    transformer, vae, text, _ = pipeline
    root = tmp_path_factory.mktemp("public")
    public = {"diffusers": root / "diffusers", "official": root / "official"}
    tiny_models.save_pipeline(pipeline, public["diffusers"])

    official = public["official"]
    official.mkdir()
    sizes = {
        "transformer": models.build({"module": "wan", **tiny_pipeline.BACKBONE}),
        "vae": models.build({"module": "wan_vae", **tiny_pipeline.CODEC}),
        "text_encoder": models.build({"module": "t5", **tiny_pipeline.TEXT}),
    }
    renamed = {}
    for part, leaves, module in (
        ("transformer", wan.dit_leaves, transformer),
        ("vae", wan.vae_leaves, vae),
        ("text_encoder", t5.leaves, text),
    ):
        tables = [leaves(sizes[part].config, naming) for naming in ("diffusers", "official")]
        names = {
            theirs: ours
            for path in tables[0]
            for theirs, ours in zip(tables[0][path].names, tables[1][path].names, strict=True)
        }
        state = {name: value.contiguous() for name, value in module.state_dict().items() if name in names}
        renamed[part] = {names[name]: value for name, value in state.items()}
        assert len(state) == len(names)
    safetensors_torch.save_file(renamed["transformer"], official / "diffusion_pytorch_model.safetensors")
    torch.save(renamed["vae"], official / "Wan2.1_VAE.pth")
    torch.save(renamed["text_encoder"], official / "models_t5_umt5-xxl-enc-bf16.pth")
    fields = {
        **{"_class_name": "WanModel", "model_type": "t2v", "in_dim": 16, "out_dim": 16, "text_len": 512},
        **tiny_pipeline.BACKBONE,
    }
    (official / "config.json").write_text(json.dumps(fields))
    shutil.copytree(public["diffusers"] / "tokenizer", official / "google" / "umt5-xxl")
    return public


def run(*arguments: str, cache: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "XLA_FLAGS": xla_flags()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=["diffusers", "official"])
def checkpoint(request, sources, tmp_path_factory) -> pathlib.Path:
    """What `python -m convert.wan` makes of either layout."""
    root = tmp_path_factory.mktemp(request.param)
    run("convert.wan", f"--src={sources[request.param]}", f"--dst={root / 'wan'}", cache=root)
    return root / "wan"


@pytest.fixture(scope="module")
def expected(pipeline, sources):
    """noise (1, 16, T, h, w), latents and frames (F, H, W, 3) in [0, 1] of diffusers' pipeline."""
    whole = diffusers.WanPipeline.from_pretrained(sources["diffusers"])
    whole.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, 3, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(3))

    def sampled(output_type: str):
        return whole(
            prompt=PROMPT, negative_prompt=NEGATIVE, height=HEIGHT, width=WIDTH, num_frames=FRAMES,
            num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=noise.clone(),
            max_sequence_length=tiny_pipeline.LENGTH, output_type=output_type,
        ).frames  # fmt: skip

    latents, frames = sampled("latent").numpy(), sampled("np")[0]
    assert np.abs(latents - noise.numpy()).max() > 0.5  # it sampled something
    assert frames.std() > 0.1  # and not a grey screen
    return noise.numpy(), latents, frames


def test_both_layouts_have_one_hash(sources, tmp_path):
    hashes = {}
    for naming, source in sources.items():
        run("convert.wan", f"--src={source}", f"--dst={tmp_path / naming}", cache=tmp_path)
        hashes[naming] = {
            part: checkpoints.read_manifest(tmp_path / naming / part, "")["sha256"]
            for part in ("transformer", "vae", "text_encoder")
        }
    assert hashes["diffusers"] == hashes["official"]


def test_latents_and_frames(checkpoint, expected):
    noise, latents, frames = expected
    config = tiny_pipeline.get_config()
    config.samples.negative_prompt = NEGATIVE
    config.parts, config.losses, config.batch_size = {}, {}, 0
    config.optimizer.groups = (("backbone/", None),)
    sample.use_checkpoint(config, str(checkpoint))
    with jax.default_matmul_precision("highest"):
        built = build_run(config, jax.devices()[:1])
        text, mask = encoders.load_text_encoder(config)([PROMPT, NEGATIVE])
        ours = generate.make_generator(built.model, built.objective, config.samples)(
            build.load_params(config, built.layout, {"backbone": config.backbone_params}),
            noise.transpose(0, 2, 3, 4, 1),
            {"text": text[:1], "text_mask": mask[:1]},
            {"text": text[1], "text_mask": mask[1]},
        )
        # fp32 on both sides; guidance multiplies each step's rounding by up to 9.
        np.testing.assert_allclose(np.asarray(ours).transpose(0, 4, 1, 2, 3), latents, rtol=0, atol=1e-3)
        decoded = encoders.load_codec(config, built.mesh).decode(np.asarray(ours)[0])
    assert decoded.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert np.abs(decoded - 255 * frames).max() <= 2
    print(f"latents {np.abs(np.asarray(ours).transpose(0, 4, 1, 2, 3) - latents).max():.2e}, "
          f"frames {np.abs(decoded - 255 * frames).max():.3f} of 255")  # fmt: skip
