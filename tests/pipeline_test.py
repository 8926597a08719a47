"""From public files to trained branch and back: convert, prepare, train, sample, export, by command lines.

Tiny random weights under the official names; the VAE and the text encoder are the real ones.
"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from prophy_jax.run import checkpoints, encoders
from tests import tiny_pipeline
from tests.commands import run_here
from tests.conftest import ROOT, xla_flags
from tests.videos import read_clip

pytestmark = pytest.mark.jobs

CONFIG = "--config=tests/tiny_pipeline.py"
PROMPT = "A red ball falls into the blue box."


def run(*arguments: str, cwd: pathlib.Path, devices: int = 2) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "XDG_CACHE_HOME": str(cwd / "cache"),
            "XLA_FLAGS": xla_flags(devices),
        },
        capture_output=True,
        text=True,
    )


def succeed(*arguments: str, cwd: pathlib.Path, devices: int = 2) -> str:
    done = run(*arguments, cwd=cwd, devices=devices)
    assert done.returncode == 0, done.stderr
    return done.stdout


def convert(module: str, *arguments: str) -> None:
    done = run_here(f"convert.{module}", *arguments)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """Public files in PLACE/public, converted ones in PLACE/wan, three captioned clips in PLACE/clips."""
    place = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline.save_public(place / "public")
    convert("wan", f"--src={place / 'public'}", f"--dst={place / 'wan'}")
    tiny_pipeline.save_clips(place / "clips")
    return place


def weights(place: pathlib.Path) -> list[str]:
    parts = {"backbone": "transformer", "codec": "vae", "text_encoder": "text_encoder"}
    return [f"--config.{part}_params={place / 'wan' / name}" for part, name in parts.items()]


@pytest.fixture(scope="module")
def trained(place) -> pathlib.Path:
    """A run of three steps beside the converted backbone, on clips that the converted VAE encoded."""
    arguments = [CONFIG, *weights(place), f"--source={place / 'clips'}", f"--out={place / 'data'}"]
    succeed("prophy_jax.prepare", *arguments, cwd=place)
    workdir = place / "run"
    arguments = [*weights(place), f"--config.data.dir={place / 'data'}", f"--workdir={workdir}"]
    succeed("prophy_jax.train", CONFIG, *arguments, cwd=place)
    return workdir


def test_training_beside_converted_weights(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3 and np.isfinite(lines[-1]["loss/total"])
    clip = read_clip(trained / "samples" / "step_0000003.mp4", 9, 16, 96, 80)  # sample above real
    # The lower half is a clip of the data, encoded and decoded by a VAE that knows nothing: any picture.
    assert clip.std() > 1


def test_two_processes_prepare_the_same_bytes(place, tmp_path):
    """With the real VAE and text encoder, on one device each: devices that share threads may round apart."""

    def prepare(name: str, *more: str) -> str:
        arguments = [
            CONFIG,
            *weights(place),
            f"--source={place / 'clips'}",
            f"--out={tmp_path / name}",
            *more,
        ]
        return succeed("prophy_jax.prepare", *arguments, cwd=place, devices=1)

    prepare("one")
    assert "1 shard left" in prepare("two", "--process=1/2")
    prepare("two", "--process=0/2")
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.array_record*")}
        for name in ("one", "two")
    )
    assert len(one) == 2 and one == two


def test_labels_of_a_vision_language_model_reach_the_loss(place, trained, tmp_path):
    pytest.importorskip("torch", reason="labels need the extra label")
    from tests.tiny_vlm import save_tiny_vlm

    save_tiny_vlm(tmp_path / "vlm")
    labels = tmp_path / "labels"
    arguments = [f"--vlm={tmp_path / 'vlm'}", f"--data={place / 'data'}", f"--out={labels}"]
    assert "labels of 3 clips" in succeed("prophy_jax.label", CONFIG, *arguments, cwd=place)
    data = [f"--config.data.dir={place / 'data'}", f"--config.data.side.alignment={labels}"]
    arguments = [CONFIG, *weights(place), *data, f"--workdir={tmp_path / 'run'}"]
    succeed("prophy_jax.train", *arguments, cwd=place)

    def losses(workdir: pathlib.Path) -> dict[str, float]:
        last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
        names = ("diffusion", "relative", "alignment", "balance")
        return {name: last[f"loss/{name}"] for name in names}

    with_labels, without = losses(tmp_path / "run"), losses(trained)
    assert np.isfinite(list(with_labels.values())).all()
    assert with_labels["alignment"] > 0 and without["alignment"] == 0
    assert min(with_labels["diffusion"], with_labels["balance"]) > 0


@pytest.mark.slow  # tests of the sample command make the same clips with stand-ins
def test_sampling_with_the_branch_beside_the_backbone_alone(place, trained):
    text_encoder = place / "wan" / "text_encoder" / "tree"
    prompts = [f"--prompt={PROMPT}", "--prompt=A blue box."]
    arguments = [CONFIG, f"--checkpoint={place / 'wan'}", f"--branch={trained / 'branch'}", *prompts]
    sampled = [*arguments, "--config.samples.steps=2", "--baseline", "--overlay"]
    succeed("prophy_jax.sample", *sampled, f"--out={place / 'samples'}", cwd=place)
    files = {f"000{i}{kind}.mp4" for i in range(2) for kind in ("", "_baseline", "_routing")}
    assert set(os.listdir(place / "samples")) == files | {"manifest.json"}
    assert read_clip(place / "samples" / "0000.mp4", 9, 16, 48, 80).shape == (9, 48, 80, 3)
    settings = json.loads((place / "samples" / "manifest.json").read_text())["settings"]
    for part, name in (("backbone", "transformer"), ("codec", "vae"), ("text_encoder", "text_encoder")):
        manifest = checkpoints.read_manifest(str(place / "wan" / name), "")
        assert settings[f"{part}_sha256"] == manifest["sha256"]

    # The encoded prompts are kept: without the encoder's weights the same prompts give the same clips. Two
    # devices that share threads may round apart, which the video codec spreads over blocks of a few pixels.
    # The routing is stretched until that shows.
    text_encoder.rename(text_encoder.with_name("away"))
    try:
        succeed("prophy_jax.sample", *sampled, f"--out={place / 'again'}", cwd=place)
        assert set(os.listdir(place / "again")) == files | {"manifest.json"}
        other = read_clip(place / "samples" / "0000.mp4", 9, 16, 48, 80)
        for name in (f"000{i}{kind}.mp4" for i in range(2) for kind in ("", "_baseline")):
            first, again = (read_clip(place / out / name, 9, 16, 48, 80) for out in ("samples", "again"))
            assert np.abs(first.astype(int) - again).mean() < 0.25
        assert np.abs(first.astype(int) - other).mean() > 1  # another prompt's
        done = run("prophy_jax.sample", *arguments, "--prompt=New.", f"--out={place / 'new'}", cwd=place)
        assert done.returncode == 1 and "text_encoder" in done.stderr.splitlines()[-1]
    finally:
        text_encoder.with_name("away").rename(text_encoder)


def test_encoded_texts_are_kept(place, tmp_path):
    config = tiny_pipeline.get_config()
    config.text_encoder_params = str(place / "wan" / "text_encoder")
    texts = [PROMPT, "", f"  {PROMPT} "]  # the last is the first, cleaned
    text, mask = encoders.load_text_encoder(config, str(tmp_path))(texts)
    assert text.shape == (3, tiny_pipeline.LENGTH, 32) and mask.sum(1).tolist()[1] == 1
    assert np.abs(text[0] - text[1]).max() > 0.1 and not text[~mask].any()
    np.testing.assert_array_equal(text[0], text[2])
    assert len(list(tmp_path.rglob("*.npz"))) == 2

    kept = encoders.load_text_encoder(config, str(tmp_path))
    kept._load = None  # the weights are not read
    for first, again in zip((text, mask), kept(texts), strict=True):
        np.testing.assert_array_equal(first, again)
    with pytest.raises(TypeError):
        kept(["a new text"])
    config.text_encoder.length = 8  # other settings, other results
    assert encoders.load_text_encoder(config, str(tmp_path))(texts)[0].shape == (3, 8, 32)
    assert encoders.load_text_encoder(config).words_lost(PROMPT) > 0


def test_export_gives_the_weights_back(place, trained):
    for checkpoint, dst in ((place / "wan", "back"), (trained, "exported")):
        arguments = [f"--checkpoint={checkpoint}", "--format=diffusers", f"--dst={place / dst}"]
        convert("export", *arguments)
    convert("wan", f"--src={place / 'back'}", f"--dst={place / 'wan_again'}")
    for part in ("transformer", "vae", "text_encoder"):
        first, again = (
            checkpoints.read_manifest(str(place / folder / part), "") for folder in ("wan", "wan_again")
        )
        assert first["sha256"] == again["sha256"] and first["shapes"] == again["shapes"]
        assert first["source"]["format"] == "official" and again["source"]["format"] == "diffusers"
    branch = load_file(place / "exported" / "prophy_branch.safetensors")
    assert branch["exits.1.weight"].shape == (48, 48) and np.abs(branch["exits.1.weight"]).max() > 0


def test_adapters_from_training_to_a_file_and_merged_weights(place, trained):
    """The same clip by the trained part, by its exported file and by merged weights."""
    config, workdir, file = (
        f"{CONFIG}:demo_data,lora",
        place / "lora",
        place / "adapters" / "prophy_lora.safetensors",
    )

    def do(module: str, *arguments: str) -> str:
        return succeed(module, *arguments, cwd=place, devices=1)

    rates = "--config.optimizer.learning_rates.lora=0.3"  # far in three steps
    data = f"--config.data.dir={place / 'data'}"
    do("prophy_jax.train", config, *weights(place), data, rates, f"--workdir={workdir}")
    assert sorted(path.name for path in workdir.glob("*/tree")) == ["tree"] and (workdir / "lora").is_dir()
    do("convert.export", f"--checkpoint={workdir}", "--format=diffusers", f"--dst={file.parent}")
    merge = ("convert.merge", f"--checkpoint={place / 'wan'}", f"--lora={file}", f"--dst={place / 'merged'}")
    assert "1 LoRA merged" in do(*merge)
    clips = {}
    for name, checkpoint, adapters in (
        ("plain", "wan", ()),
        ("part", "wan", (f"--branch={workdir / 'lora'}",)),
        ("file", "wan", (f"--lora={file}",)),
        ("twice half", "wan", (f"--lora={file}=0.25", f"--lora={file}=0.75")),
        ("merged", "merged", ()),
    ):
        own = (f"--checkpoint={place / checkpoint}", *adapters, f"--out={place / 'clips of' / name}")
        do("prophy_jax.sample", config, f"--prompt={PROMPT}", "--config.samples.steps=1", *own)
        clips[name] = read_clip(place / "clips of" / name / "0000.mp4", 9, 16, 48, 80).astype(int)
    assert np.abs(clips["plain"] - clips["part"]).mean() > 1
    for name in ("file", "twice half", "merged"):  # roundings of another order, which H.264 spreads
        assert np.abs(clips[name] - clips["part"]).mean() < 0.25, name

    # Nothing is merged or sampled twice, and nothing is written on bad input.
    merged = (f"--checkpoint={place / 'merged'}", f"--out={place / 'no'}", f"--prompt={PROMPT}")
    for arguments, message in (
        (("prophy_jax.sample", config, *merged, f"--lora={file}"), "merged into it already"),
        (("prophy_jax.sample", config, *merged, "--lora=nowhere=2"), "there is no file nowhere"),
        (("prophy_jax.sample", config, *merged, f"--lora={file}=nan"), "give a finite strength"),
        (
            ("prophy_jax.sample", config, *merged, f"--lora={place / 'wan' / 'vae' / 'manifest.json'}"),
            "not a readable",
        ),
        ((*merge[:2], f"--lora={file}=0.5", merge[-1]), "exists: name another --dst"),
        ((*merge[:2], f"--dst={place / 'no'}"), "name a LoRA with --lora=FILE"),
        ((merge[0], merged[0], merge[2], f"--dst={place / 'no'}"), "merged into it already"),
    ):
        done = run_here(*arguments)
        assert done.returncode == 1 and message in done.stderr.splitlines()[-1]
        assert not (place / "no").exists()


def test_a_part_that_was_not_converted(place, tmp_path):
    (tmp_path / "transformer").symlink_to(place / "wan" / "transformer")
    done = run(
        "prophy_jax.sample", CONFIG, f"--checkpoint={tmp_path}", f"--prompt={PROMPT}",
        f"--out={tmp_path / 'out'}", cwd=place,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "convert.wan" in done.stderr and not (tmp_path / "out").exists()
