"""The sample command: what it writes, that it goes on where it was, meshes, guidance, bad input."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prophy_jax import checkpoints, experiment, models, parallel, sample
from prophy_jax.data import video
from prophy_jax.errors import UserError
from tests.conftest import ROOT, get_config

PROMPTS = ["a red ball bounces on the left", "orange flames burn on logs", "blue ink spreads in water"]


def small_config():
    config = get_config("tiny")
    config.samples.steps = 3
    return config


def random_like(tree, seed: int):
    """Weights without a zero, so that every part has its say."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), tree)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Folders of a backbone and of a branch trained beside it."""
    folder = tmp_path_factory.mktemp("weights")
    config = small_config()
    config.batch_size = 0
    layout = experiment.abstract_params(experiment.build(config))
    backbone, branch = str(folder / "backbone"), str(folder / "branch")
    digest = checkpoints.save_params(backbone, random_like(layout["backbone"], 0), {})
    about = {"backbone_sha256": digest}
    checkpoints.save_params(branch, random_like(layout["branch"], 1), about)
    return backbone, branch


def run(out, *more, prompts=PROMPTS, devices=1):
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "prophy_jax.sample",
            "--config=configs/wan.py:tiny",
            "--config.samples.steps=3",
            f"--out={out}",
            *[f"--prompt={prompt}" for prompt in prompts],
            *more,
        ],  # fmt: skip
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )


def test_what_a_run_writes_and_that_it_goes_on(weights, tmp_path):
    out, (backbone, branch) = tmp_path / "clips", weights
    arguments = [f"--checkpoint={backbone}", f"--branch={branch}", "--baseline", "--overlay", "--batch=2"]
    done = run(out, *arguments)
    assert done.returncode == 0, done.stderr
    clips = [f"{i:04d}{suffix}.mp4" for i in range(3) for suffix in ("", "_baseline")]
    overlays = [f"{i:04d}_routing.mp4" for i in range(3)]
    assert sorted(os.listdir(out)) == sorted([*clips, *overlays, "manifest.json"])
    manifest = json.loads((out / "manifest.json").read_text())
    assert [clip["file"] for clip in manifest["clips"]] == clips
    assert manifest["clips"][3] == {
        "file": "0001_baseline.mp4", "prompt": PROMPTS[1], "seed": 0, "scale": 0.0,
    }  # fmt: skip
    assert manifest["settings"]["samples"]["steps"] == 3
    for part, folder in (("backbone", backbone), ("branch", branch)):
        assert manifest["settings"][f"{part}_sha256"] == checkpoints.read_manifest(folder, "")["sha256"]
    frames = {name: video.read_clip(out / name, 9, 8, 32, 32) for name in clips}
    assert all(np.abs(frames[a].astype(int) - frames[b]).mean() > 1 for a in clips for b in clips if a < b)

    # Two files lost, one prompt more: the batches that miss something are made again, bit for bit.
    before = {name: (out / name).read_bytes() for name in clips}
    times = {name: os.stat(out / name).st_mtime_ns for name in clips}
    (out / "0000.mp4").unlink()
    (out / "0002_baseline.mp4").unlink()
    done = run(out, *arguments, prompts=[*PROMPTS, "smoke rises"])
    assert done.returncode == 0, done.stderr
    assert "8 clips" in done.stdout and "2 of them from before" in done.stdout
    assert {name: (out / name).read_bytes() for name in clips[:4]} == {n: before[n] for n in clips[:4]}
    assert os.stat(out / "0001_baseline.mp4").st_mtime_ns == times["0001_baseline.mp4"]
    assert (out / "0003.mp4").exists() and (out / "0003_baseline.mp4").exists()

    # Another way to make them, or another prompt under the same name: refused, nothing touched.
    listing = sorted((name, os.stat(out / name).st_mtime_ns) for name in os.listdir(out))
    for more, prompts, word in (
        (["--config.samples.guidance=3.0"], PROMPTS, "guidance"),
        (["--seed=1"], PROMPTS, "seed"),
        ([], ["another prompt"], "another prompt"),
    ):
        done = run(out, *arguments, *more, prompts=prompts)
        assert done.returncode == 1 and word in done.stderr and done.stderr.startswith("error:")
    assert listing == sorted((name, os.stat(out / name).st_mtime_ns) for name in os.listdir(out))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint=nowhere"], "no checkpoint at nowhere"),
        (["--checkpoint={backbone}", "--branch=nowhere"], "no checkpoint at nowhere"),
        (["--checkpoint={backbone}", "--branch={backbone}"], "does not fit"),
        (["--checkpoint={backbone}", "--baseline"], "--branch"),
        (["--checkpoint={backbone}", "--config.data.frames=8"], "4n + 1"),
        (["--checkpoint={backbone}", "--config.data.height=44"], "multiples of 8"),
        (["--checkpoint={backbone}", "--prompts=nowhere.txt"], "nowhere.txt"),
        (["--checkpoint={backbone}", "--batch=3"], "does not divide"),
        (["--checkpoint={backbone}", "--config.samples.solver=heun"], "heun"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(weights, tmp_path, arguments, message):
    places = dict(zip(("backbone", "branch"), weights, strict=True))
    done = run(tmp_path / "out", *[word.format(**places) for word in arguments], devices=2)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error:") and message in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_branch_of_another_backbone_is_refused(weights, tmp_path):
    config, (backbone, branch) = small_config(), weights
    config.batch_size, config.backbone_params = 0, str(tmp_path / "other")
    run = experiment.build(config)
    layout = experiment.abstract_params(run)
    checkpoints.save_params(config.backbone_params, random_like(layout["backbone"], 2), {})
    with pytest.raises(UserError, match="another backbone"):
        experiment.check_params(run, branch)
    config.backbone_params = backbone
    assert set(experiment.check_params(run, branch)) == {"backbone_sha256", "branch_sha256"}


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "0000.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="not empty"):
        sample.claim_folder(str(tmp_path), {}, [])


def test_a_sampler_split_over_devices_equals_one_device(weights):
    config = small_config()
    encoder, codec = models.build(config.text_encoder), models.build(config.codec)
    text, mask = encoder([*PROMPTS, "smoke rises", ""])
    negative = {"text": text[-1], "text_mask": mask[-1]}
    noise = sample.make_noise(0, np.arange(4), codec.latent_shape(9, 32, 32))
    results = []
    for shape in ({"data": 1}, {"data": 4}, {"data": 2, "context": 2}):
        config.mesh, config.batch_size = {"data": 1, "fsdp": 1, "context": 1, **shape}, 4
        count = config.mesh["data"] * config.mesh["context"]
        run = experiment.build(config, jax.devices()[:count])
        params = experiment.load_params(run, *weights)
        with jax.set_mesh(run.mesh):
            inputs = {"noise": np.asarray(noise), "text": text[:4], "text_mask": mask[:4]}
            inputs = parallel.put_batch(inputs, run.mesh)
            latents = sample.make_generator(run.model, config)(params, **inputs, negative=negative)
            assert len({str(shard.index) for shard in latents.addressable_shards}) == config.mesh["data"]
        results.append(np.asarray(latents))
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=0, atol=1e-4)  # fp32, three guided steps


def test_generator_equals_the_model_called_step_by_step(weights):
    config = small_config()
    config.batch_size = 0
    run = experiment.build(config, jax.devices()[:1])
    params = experiment.load_params(run, *weights)
    text, mask = models.build(config.text_encoder)([PROMPTS[0], ""])
    assert sample.text_rows(mask) == 32 < mask.shape[1]  # the padding is shortened here
    noise = sample.make_noise(0, np.arange(1), (3, 8, 8, 16))
    negative = {"text": text[1], "text_mask": mask[1]}
    latents = sample.make_generator(run.model, config)(params, noise, text[:1], mask[:1], negative)

    solver = sample.solvers.solver("unipc", 3, config.samples.shift)

    def velocity(x, t):
        t = jnp.broadcast_to(t, (1,))
        without, with_prompt = (run.model(params, x, t, text[[i]], mask[[i]]).velocity for i in (1, 0))
        return without + config.samples.guidance * (with_prompt - without)

    expected = sample.solvers.sample(solver, velocity, noise)
    np.testing.assert_allclose(latents, expected, rtol=0, atol=1e-4)
    alone = dataclasses.replace(run.model, branch=None)
    backbone = sample.make_generator(alone, config)(params, noise, text[:1], mask[:1], negative)
    silent = sample.make_generator(run.model, config)(params, noise, text[:1], mask[:1], negative, scale=0.0)
    np.testing.assert_array_equal(backbone, silent)
    assert np.abs(backbone - latents).max() > 1e-2


def test_the_configuration_of_14b():
    config = get_config("14b")
    config.batch_size = 0
    layout = experiment.abstract_params(experiment.build(config, jax.devices()[:1]))
    sizes = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in layout.items()}
    assert sizes["backbone"] == 14_288_491_584 and sizes["branch"] > 10 / 40 * sizes["backbone"] * 0.9
    assert (config.samples.guidance, config.samples.shift) == (5.0, 5.0)
    assert "Wan2.1-T2V-14B" in config.backbone_remedy


def test_a_whole_folder_of_convert_wan_or_a_backbone_alone(tmp_path):
    config = get_config("")
    sample.use_checkpoint(config, str(tmp_path))
    assert config.backbone_params == str(tmp_path)
    assert config.codec_params == "checkpoints/wan2.1-t2v-1.3b/vae"
    (tmp_path / "transformer").mkdir()
    sample.use_checkpoint(config, str(tmp_path))
    assert config.backbone_params == str(tmp_path / "transformer")
    assert config.codec_params == str(tmp_path / "vae")
    assert config.text_encoder_params == str(tmp_path / "text_encoder")
