"""prophy_jax.load: from folders of weights to clips, on both backbones; bad input; the blocks of docs/library.md."""

import os

import jax
import numpy as np
import pytest

import prophy_jax
from prophy_jax.library import loaded
from prophy_jax.run import checkpoints, workdir
from prophy_jax.run.errors import UserError
from tests import tiny_pipeline
from tests.commands import run_here
from tests.conftest import build_run, get_config
from tests.sample_test import random_like, save_converted
from tests.tiny_tokenizer import save_tiny_tokenizer

PROMPTS = ["a red ball bounces on the left", "blue ink spreads in water"]
SIZE = (9, 48, 80)  # of the tiny public models


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """A run of configs/wan.py:tiny that trained a backbone and a branch, three solver steps."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    config = get_config("tiny")
    config.samples.steps, config.batch_size = 3, 0
    layout, stored = build_run(config).layout, workdir.config_as_json(config)
    workdir.claim_run(folder, config, {})
    about = checkpoints.describe_part(stored, "backbone", 1, {})
    digest = checkpoints.save_params(str(folder / "backbone"), random_like(layout["backbone"], 0), about)
    about = checkpoints.describe_part(stored, "branch", 1, {"backbone_sha256": digest})
    checkpoints.save_params(str(folder / "branch"), random_like(layout["branch"], 1), about)
    return str(folder)


@pytest.fixture(scope="module")
def pipe(run):
    return prophy_jax.load(f"{run}/backbone", branch=f"{run}/branch")


def save_whole(folder, config) -> str:
    """A folder of converted weights: backbone, codec, text encoder and its tokenizer."""
    for name, part in (("transformer", "backbone"), ("vae", "codec"), ("text_encoder", "text_encoder")):
        save_converted(folder, name, **config[part])
    save_tiny_tokenizer(folder / "text_encoder" / "tokenizer")
    return str(folder)


def test_the_command_and_the_library_make_the_same_clips(run, pipe, tmp_path, monkeypatch, capsys):
    """Latents and frames, bit by bit, with another scale, size, guidance, seed and number of steps."""
    made, make_clips = [], loaded.Loaded.make_clips

    def spy(self, *args):
        made.append(make_clips(self, *args))
        return made[-1]

    monkeypatch.setattr(loaded.Loaded, "make_clips", spy)
    keys = ("samples.steps=4", "samples.guidance=3.0", "data.height=16", "data.frames=5")
    done = run_here(
        *("prophy_jax.sample", "--config=configs/wan.py:tiny", f"--checkpoint={run}/backbone"),
        *(f"--branch={run}/branch", "--seed=7", "--scale=0.5", f"--out={tmp_path / 'out'}", "--overlay"),
        *(f"--config.{key}" for key in keys),
        *(f"--prompt={prompt}" for prompt in PROMPTS),
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.undo()
    capsys.readouterr()
    half = pipe.with_scale(0.5)
    clips = half.sample(half.encode(PROMPTS), seed=7, steps=4, guidance=3.0, size=(5, 16, 32))
    [(latents, frames)] = made
    np.testing.assert_array_equal(clips.latents, latents)
    np.testing.assert_array_equal(clips.frames, frames)
    written = clips.save(tmp_path / "own", routing=True)
    assert [os.path.basename(path) for path in written] == [
        f"000{i}{kind}.mp4" for i in range(2) for kind in ("", "_routing")
    ]
    for path in written:
        assert (tmp_path / "out" / os.path.basename(path)).read_bytes() == open(path, "rb").read()
    assert capsys.readouterr() == ("", "")


def test_shapes_ranges_and_that_nothing_is_mutated(pipe, tmp_path, capsys):
    text = pipe.encode(PROMPTS)
    assert text.text.shape == (2, 64, 64) and text.text_mask.dtype == bool and len(text) == 2
    clips = pipe.sample(text)
    assert clips.frames.shape == (2, 9, 32, 32, 3) and clips.frames.dtype == np.uint8 and len(clips) == 2
    assert clips.latents.shape == (2, 3, 8, 8, 16) and clips.latents.dtype == np.float32
    assert clips.routing.shape == (2, 3, 4, 4, 17) and len(clips.categories) == 17
    assert clips.routing.dtype == np.float32 and clips.routing.std() > 1e-3
    assert clips.settings["steps"] == 3 and clips.fps == 8 and clips.prompts == tuple(PROMPTS)

    one = pipe.sample(PROMPTS[0])  # encoded on the way; the first prompt has the same noise
    np.testing.assert_allclose(one.latents[0], clips.latents[0], rtol=0, atol=1e-4)
    other = pipe.with_scale(branch=0.0).sample(text)
    assert np.abs(other.latents - clips.latents).max() > 1e-2
    assert pipe.with_scale(branch=0.0).params["backbone"] is pipe.params["backbone"]
    assert dict(pipe.scale) == {"branch": 1.0}
    with pytest.raises(TypeError):
        pipe.scale["branch"] = 0.0
    np.testing.assert_array_equal(pipe.sample(text).latents, clips.latents)
    assert np.abs(pipe.sample(text, seed=1).latents - clips.latents).max() > 0.1
    negative = pipe.sample(text, negative_prompt="a blue box")
    assert np.abs(negative.latents - clips.latents).max() > 1e-3

    noise = np.random.default_rng(0).standard_normal(clips.latents.shape)
    from_noise = pipe.sample(text, noise=noise)
    np.testing.assert_array_equal(from_noise.latents, pipe.sample(text, noise=noise, seed=3).latents)
    assert np.abs(from_noise.latents - clips.latents).max() > 0.1
    html = clips.show(routing=True)._repr_html_()
    assert html.count("<video") == 2 and f'title="{PROMPTS[1]}"' in html and len(html) > 5000
    assert one.save(tmp_path / "a" / "clip.mp4") == [str(tmp_path / "a" / "clip.mp4")]
    assert capsys.readouterr() == ("", "")
    pipe.sample(text, progress=True)
    assert "6/6" in capsys.readouterr().err


def test_a_run_and_its_checkpoint_and_a_backbone_alone(run, pipe):
    whole = prophy_jax.load(run, branch=run)
    assert whole.config.backbone_params == f"{run}/backbone" and dict(whole.scale) == {"branch": 1.0}
    alone = prophy_jax.load(run)
    clips = alone.sample(PROMPTS[0])
    np.testing.assert_array_equal(clips.latents, whole.with_scale(0).sample(PROMPTS[0]).latents)
    for ask in (lambda: clips.routing, lambda: clips.categories, lambda: clips.show(routing=True)):
        with pytest.raises(UserError, match="no part that routes tokens: load one with branch="):
            ask()
    with pytest.raises(UserError, match="no part 'branch'; it has none: load one"):
        alone.with_scale(branch=1.0)


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> dict[str, str]:
    """Converted weights of both backbones, whole and tiny."""
    root = tmp_path_factory.mktemp("public")
    configs = {"wan": tiny_pipeline.get_config(), "cogvideox": tiny_pipeline.cogvideox("2b")}
    configs["wan"].backbone.text_len = 512
    for name, config in configs.items():
        save_whole(root / name, config)
    tiny_pipeline.save_lora(root / "lora.safetensors")
    return {name: str(root / name) for name in (*configs, "lora.safetensors")}


@pytest.fixture(scope="module")
def pipes(public):
    """Two pipelines of different models side by side."""
    small = {"frozen_dtype": "float32", "backbone.dtype": "float32", "text_encoder.dtype": "float32"}
    return {name: prophy_jax.load(public[name], settings=small) for name in ("wan", "cogvideox")}


def test_two_models_side_by_side(pipes):
    """With no configuration named: that of the nearest public model."""
    wan, cogvideox = pipes["wan"], pipes["cogvideox"]
    assert (wan.config.samples.solver, wan.config.samples.guidance) == ("unipc", 6.0)
    assert (cogvideox.config.samples.solver, cogvideox.config.objective.snr_shift) == ("ddim", 3.0)  # of 2B
    assert wan.config.backbone.num_layers == 3 and cogvideox.config.backbone.num_heads == 3
    first = wan.sample(PROMPTS[0], steps=2, size=SIZE)
    other = cogvideox.sample(PROMPTS[0], steps=2, size=(9, 24, 32))
    again = wan.sample(PROMPTS[0], steps=2, size=SIZE)
    assert first.frames.shape == (1, *SIZE, 3) and other.frames.shape == (1, 9, 24, 32, 3)
    np.testing.assert_array_equal(first.frames, again.frames)
    with pytest.raises(UserError, match="of another text encoder"):
        wan.sample(cogvideox.encode(PROMPTS[0]))
    assert jax.sharding.get_abstract_mesh().empty


def test_lora_and_its_scale(public, pipes):
    file, small = public["lora.safetensors"], {"frozen_dtype": "float32", "backbone.dtype": "float32"}
    twice = prophy_jax.load(public["wan"], lora=[file, (file, 0.5)], settings=small)
    assert dict(twice.scale) == {"lora_0": 1.0, "lora_1": 0.5}
    half = prophy_jax.load(public["wan"], lora=(file, 0.5), settings=small)

    def latents(pipe):
        return pipe.sample(PROMPTS[0], steps=2, size=SIZE).latents

    np.testing.assert_array_equal(latents(twice.with_scale(lora_0=0)), latents(half))
    plain = latents(twice.with_scale(lora=0))
    np.testing.assert_array_equal(plain, latents(twice.with_scale(0.0)))
    assert np.abs(plain - latents(half)).max() > 1e-3
