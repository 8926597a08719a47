"""prophy_jax.load: from folders of weights to clips, on both backbones; bad input; docs/library.md."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import prophy_jax
from configs import cogvideox
from prophy_jax.library import loaded
from prophy_jax.run import checkpoints, checksums, storage, workdir
from prophy_jax.run.errors import NotFinite, UserError
from tests import tiny_pipeline
from tests.commands import run_here
from tests.conftest import ROOT, build_run, get_config
from tests.sample_test import random_like, save_converted
from tests.tiny_tokenizer import save_tiny_tokenizer

PROMPTS = ["a red ball bounces on the left", "blue ink spreads in water"]
SIZE = (1, 16, 16)  # of the tiny public models, whose video codecs take most of the time


def save_run(folder, config, backbone: str = "") -> str:
    """A run that trained a branch, beside a backbone of its own or the one in a folder."""
    size, config.batch_size = config.batch_size, 0
    layout = build_run(config).layout
    config.batch_size = size
    workdir.claim_run(folder, config, {})
    stored = workdir.config_as_json(config)
    if backbone:
        digest = checkpoints.read_manifest(backbone, "")["sha256"]
    else:
        about = checkpoints.describe_part(stored, "backbone", 1, {})
        digest = checkpoints.save_params(str(folder / "backbone"), random_like(layout["backbone"], 0), about)
    about = checkpoints.describe_part(stored, "branch", 1, {"backbone_sha256": digest})
    checkpoints.save_params(str(folder / "branch"), random_like(layout["branch"], 1), about)
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """A run of configs/wan.py:tiny that trained a backbone and a branch, three solver steps."""
    config = get_config("tiny")
    config.samples.steps = 3
    return save_run(tmp_path_factory.mktemp("runs") / "tiny", config)


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
    with pytest.raises(AttributeError):
        pipe.config.samples.steps = 1
    np.testing.assert_array_equal(pipe.sample(text).latents, clips.latents)
    assert np.abs(pipe.sample(text, seed=1).latents - clips.latents).max() > 0.1
    negative = pipe.sample(text, negative_prompt="a blue box")
    assert np.abs(negative.latents - clips.latents).max() > 1e-3
    assert negative.settings == clips.settings | {"negative_prompt": "a blue box"}

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
    with pytest.raises(UserError, match="no part to scale: load one with branch="):
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


@pytest.fixture
def one_device():
    """Real codecs and text encoders take long on eight devices that share two cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        yield


@pytest.fixture
def pipes(public, one_device):
    """Two pipelines of different models side by side."""
    small = {"frozen_dtype": "float32", "backbone.dtype": "float32", "text_encoder.dtype": "float32"}
    return {name: prophy_jax.load(public[name], settings=small) for name in ("wan", "cogvideox")}


@pytest.mark.slow
def test_two_models_side_by_side(pipes):
    """With no configuration named: that of the nearest public model."""
    wan, cogvideox = pipes["wan"], pipes["cogvideox"]
    assert (wan.config.samples.solver, wan.config.samples.guidance) == ("unipc", 6.0)
    assert (cogvideox.config.samples.solver, cogvideox.config.objective.snr_shift) == ("ddim", 3.0)  # of 2B
    assert wan.config.backbone.num_layers == 3 and cogvideox.config.backbone.num_heads == 3
    first = wan.sample(PROMPTS[0], steps=2, size=SIZE)
    other = cogvideox.sample(PROMPTS[0], steps=2, size=(1, 16, 16))
    again = wan.sample(PROMPTS[0], steps=2, size=SIZE)
    assert first.frames.shape == (1, *SIZE, 3) and other.frames.shape == (1, 1, 16, 16, 3)
    np.testing.assert_array_equal(first.frames, again.frames)
    with pytest.raises(UserError, match="of another text encoder"):
        wan.sample(cogvideox.encode(PROMPTS[0]))
    assert jax.sharding.get_abstract_mesh().empty


def test_lora_and_its_scale(public, one_device):
    file, small = public["lora.safetensors"], {"frozen_dtype": "float32", "backbone.dtype": "float32"}
    twice = prophy_jax.load(public["wan"], lora=[file, (file, 0.5)], settings=small)
    assert dict(twice.scale) == {"lora_0": 1.0, "lora_1": 0.5}
    half = prophy_jax.load(public["wan"], lora=(file, 0.5), settings=small)
    text = half.encode(PROMPTS[0])
    assert half._loaded._encoder._params is None and "params" not in vars(half._loaded)  # freed; not read yet

    def latents(pipe):
        return pipe.sample(text, steps=2, size=SIZE).latents

    np.testing.assert_array_equal(latents(twice.with_scale(lora_0=0)), latents(half))
    plain = latents(twice.with_scale(lora=0))
    np.testing.assert_array_equal(plain, latents(twice.with_scale(0.0)))
    assert np.abs(plain - latents(half)).max() > 1e-3


def test_folders_that_cannot_be_loaded(run, public, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "downloaded" / "transformer").mkdir(parents=True)
    about = json.dumps({"_class_name": "WanTransformer3DModel"})
    (tmp_path / "downloaded" / "transformer" / "config.json").write_text(about)
    layout = build_run(get_config("tiny"), jax.devices()[:1]).layout
    checkpoints.save_params("other", random_like(layout["backbone"], 2), {"part": "backbone"})
    lora, backbone = public["lora.safetensors"], f"{run}/backbone"
    (tmp_path / "text.safetensors").write_text("no tensors")
    convert = "python -m convert.wan --src=Wan-AI/Wan2.1-T2V-1.3B --dst="
    for load, message in (
        (dict(checkpoint="Wan-AI/Wan2.1-T2V-1.3B"), f"is no folder: .*{convert}checkpoints/wan2.1-t2v-1.3b"),
        (
            dict(checkpoint="zai-org/CogVideoX-2b"),
            "is no folder: .*convert.cogvideox --src=zai-org/CogVideoX-2b",
        ),
        (
            dict(checkpoint="downloaded"),
            "downloaded holds no converted weights: .*convert.wan --src=downloaded",
        ),
        (dict(checkpoint=3), "checkpoint=3: name a folder"),
        (dict(checkpoint=""), "checkpoint='': name a folder"),
        (dict(checkpoint=f"{run}/branch"), "is of 'branch', not of a backbone"),
        (dict(checkpoint=f"{public['wan']}/vae"), "is of 'vae', not of a backbone"),
        (dict(checkpoint=backbone, branch=""), "branch='': name a folder"),
        (dict(checkpoint=backbone, lora=3), "lora=3: name a file"),
        (dict(checkpoint=backbone, branch="nowhere"), "no checkpoint at nowhere: name a run"),
        (dict(checkpoint=backbone, branch=backbone), "is of a backbone alone: name it as checkpoint"),
        (dict(checkpoint=backbone, branch=[run, f"{run}/branch"]), "names the part 'branch' twice"),
        (dict(checkpoint="other", branch=run), "beside another backbone than checkpoint=other"),
        (dict(checkpoint=public["cogvideox"], branch=run), "beside another backbone than checkpoint="),
        (dict(checkpoint=backbone, lora="nowhere"), "lora=nowhere: there is no such file"),
        (dict(checkpoint=backbone, lora="text.safetensors"), "is not a readable safetensors file"),
        (
            dict(checkpoint=backbone, lora=[(lora, float("nan"))]),
            "the strength of lora=.*=nan: give a finite",
        ),
        (dict(checkpoint=public["cogvideox"], lora=lora), "fits no layer of this model"),
        (dict(checkpoint=backbone, lora=lora), "fits no layer of this model with 16 of its 48"),
        (dict(checkpoint=backbone, settings={"codec.tiles": 3}), "'codec.tiles', which is no key"),
        (dict(checkpoint=backbone, settings={"samples.guidance": "x"}), "'samples.guidance'\\]='x': "),
        (dict(checkpoint=backbone, settings={"backbone.dtype": "int3"}), "unknown compute dtype 'int3'"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            prophy_jax.load(**load)
        assert "\n" not in str(caught.value) and not re.search(
            "--(branch|checkpoint|lora)", str(caught.value)
        )
    assert prophy_jax.UserError is UserError


def test_weights_that_hold_a_lora_already(public, tmp_path):
    shutil.copytree(public["wan"], tmp_path / "merged")
    path, lora = tmp_path / "merged" / "transformer" / "manifest.json", public["lora.safetensors"]
    manifest = json.loads(path.read_text()) | {"merged": [storage.hash_file(lora)]}
    path.write_text(json.dumps(checksums.sealed({k: v for k, v in manifest.items() if k != "checksum"})))
    with pytest.raises(UserError, match=f"merged into it already: leave out lora={lora}"):
        prophy_jax.load(tmp_path / "merged", lora=lora)


def test_calls_that_cannot_be_answered(pipe, tmp_path):
    text, nan = pipe.encode("smoke"), float("nan")
    clips = pipe.sample(text)
    two = dataclasses.replace(clips, frames=clips.frames.repeat(2, 0))
    (tmp_path / "file").write_text("")
    for call, message in (
        (lambda: pipe.encode(""), "the prompt '' is empty"),
        (lambda: pipe.encode(["a", " "]), "the prompt ' ' is empty"),
        (lambda: pipe.encode(["a", 3]), "the prompt 3 is no text"),
        (lambda: pipe.encode([]), "give a prompt, or a list"),
        (lambda: pipe.sample(3), "prompts=3: give a prompt"),
        (lambda: pipe.sample(text, steps=0), "steps=0: give a whole number from 1"),
        (lambda: pipe.sample(text, steps=2.5), "steps=2.5: give a whole"),
        (lambda: pipe.sample(text, seed=-1), "seed=-1: give a whole number from 0 to 4294967295"),
        (lambda: pipe.sample(text, guidance=nan), "guidance=nan: give a finite number"),
        (lambda: pipe.sample(text, size=(9, 44, 32)), "multiples of 8, such as 48 x 32: change size"),
        (lambda: pipe.sample(text, size=(8, 32, 32)), "F must be 4n \\+ 1"),
        (lambda: pipe.sample(text, size=32), "size=32: give \\(frames, height, width\\)"),
        (lambda: pipe.sample(text, solver="heun"), "heun"),
        (lambda: pipe.sample(text, batch=3, guidance=1.0), "^batch=3: 3 rows"),
        (lambda: pipe.sample(text, negative_prompt=3), "negative_prompt=3 is no text"),
        (lambda: pipe.sample(text, noise=np.zeros((1, 3, 8, 8, 4))), "noise is .*take \\(1, 3, 8, 8, 16\\)"),
        (lambda: pipe.sample(text, noise="pink"), "noise is no array of numbers"),
        (lambda: pipe.sample(text, noise=np.full((1, 3, 8, 8, 16), nan)), "noise holds NaN"),
        (lambda: pipe.with_scale(lora=0.5), "no part 'lora'; it has branch"),
        (lambda: pipe.with_scale(branch="half"), "the scale of branch='half': give a finite number"),
        (lambda: pipe.with_scale(), "such as branch=0.5"),
        (lambda: two.save(tmp_path / "clip.mp4"), "is one file for 2 clips"),
        (lambda: clips.save(tmp_path / "clip.gif"), "saved as .mp4"),
        (lambda: clips.save(tmp_path / "file" / "clips"), "file/clips"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value) and "--" not in str(caught.value)
    with pytest.raises(
        NotFinite, match="'smoke', 'fire': the latents became NaN.*a lower guidance"
    ) as caught:
        pipe.sample(["smoke", "fire"], guidance=1e39)
    assert caught.value.rows == [0, 1]
    with pytest.warns(UserWarning, match="no room for the end of a prompt, 3 words lost: the last words"):
        pipe.encode("word " * 63 + "the last words")


def test_importing_the_package_imports_no_jax():
    code = "import prophy_jax, sys; print(prophy_jax.__version__, prophy_jax.UserError, 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("False\n") and "UserError" in done.stdout, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'unload'"):
        prophy_jax.unload  # noqa: B018


def test_what_the_documentation_shows(run, public, one_device, tmp_path, monkeypatch, capsys):
    """Each block of Python, one after the other, where the folders are that they name."""
    config = tiny_pipeline.get_config()
    config.data.update(frames=5, height=16, width=32)
    config.samples.steps = 4  # one program for most blocks
    save_run(tmp_path / "runs" / "wan", config, f"{public['wan']}/transformer")
    (tmp_path / "checkpoints").mkdir()
    for place, target in (
        ("checkpoints/wan2.1-t2v-1.3b", public["wan"]),
        ("my.safetensors", public["lora.safetensors"]),
        ("runs/tiny", run),
    ):
        (tmp_path / place).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "library.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == text.count("```python") == 5
    names = {}
    for block in blocks:
        exec(compile(block.replace("steps=50", "steps=4"), "docs/library.md", "exec"), names)
    assert sorted(os.listdir("clips"))[:2] == ["0000.mp4", "0000_routing.mp4"]
    assert os.path.getsize("water.mp4") > 0 and os.path.getsize("weaker.mp4") > 0
    assert dict(names["pipe"].scale) == {"branch": 1.0, "lora_0": 1.0}
    assert np.abs(names["first"].latents - names["second"].latents).max() > 1e-3
    assert "convert.wan" in capsys.readouterr().out

    # A copy of the branch, without the run's config.json: the nearest public model, the branch's sizes.
    shutil.copytree("runs/wan/branch", "copy")
    copied = prophy_jax.load("checkpoints/wan2.1-t2v-1.3b", branch="copy").config
    assert copied.parts.branch == names["pipe"].config.parts.branch
    assert (copied.samples.steps, names["pipe"].config.samples.steps) == (50, 4)


def test_a_run_on_the_other_backbone(one_device, tmp_path):
    pipe = prophy_jax.load(save_run(tmp_path, cogvideox.get_config("tiny")), branch=tmp_path)
    clips = pipe.sample(PROMPTS, steps=2, size=(5, 32, 32))
    assert clips.frames.shape == (2, 5, 32, 32, 3) and clips.routing.shape == (2, 2, 4, 4, 17)
    assert (
        np.abs(clips.latents - pipe.with_scale(0).sample(PROMPTS, steps=2, size=(5, 32, 32)).latents).max()
        > 0.01
    )
