"""The sample command: what it writes, that it resumes, meshes, guidance, bad input."""

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prophy_jax import build, models, sample
from prophy_jax.diffusion import generate, solvers, v_prediction
from prophy_jax.evaluation import pictures, validation
from prophy_jax.prepare import list_grids
from prophy_jax.run import checkpoints, encoders, parallel, workdir
from prophy_jax.run.errors import NotFinite, UserError
from prophy_jax.testing.counting import count_compiles
from tests import tiny_pipeline
from tests.commands import run_here
from tests.conftest import ROOT, build_run, get_config, xla_flags
from tests.videos import read_clip, read_video

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
    layout = build_run(config).layout
    backbone, branch = str(folder / "backbone"), str(folder / "branch")
    digest = checkpoints.save_params(backbone, random_like(layout["backbone"], 0), {})
    about = {"part": "branch", "backbone_sha256": digest}
    checkpoints.save_params(branch, random_like(layout["branch"], 1), about)
    return backbone, branch


def run(out, *more, prompts=PROMPTS, devices=1):
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
        env={**os.environ, "XLA_FLAGS": xla_flags(devices)},
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
    shown, _ = read_video(out / overlays[0])
    assert shown.shape[1] == 256 + pictures.LEGEND and shown.shape[2] in (256, 512, 768)
    manifest = json.loads((out / "manifest.json").read_text())
    assert [clip["file"] for clip in manifest["clips"]] == clips
    assert manifest["clips"][3] == {
        "file": "0001_baseline.mp4", "prompt": PROMPTS[1], "seed": 0, "scale": 0.0,
    }  # fmt: skip
    assert manifest["settings"]["samples"]["steps"] == 3
    for part, folder in (("backbone", backbone), ("branch", branch)):
        assert manifest["settings"][f"{part}_sha256"] == checkpoints.read_manifest(folder, "")["sha256"]
    frames = {name: read_clip(out / name, 9, 8, 32, 32) for name in clips}
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

    done = run(out, *arguments, prompts=[*PROMPTS, "smoke rises"])
    assert f"8 clips in {out}, already there: nothing to do\n" in done.stdout

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
        (
            ["--checkpoint={backbone}", "--branch={branch}", "--config.parts.branch.layers=(0,)"],
            "not fit the",
        ),
        (["--checkpoint={backbone}", "--baseline"], "--branch"),
        (["--checkpoint={backbone}", "--config.data.frames=8"], "4n + 1"),
        (["--checkpoint={backbone}", "--config.data.height=44"], "multiples of 8, such as 48 x 32"),
        (["--checkpoint={backbone}", "--prompts=nowhere.txt"], "nowhere.txt"),
        (
            ["--checkpoint={backbone}", "--batch=3", "--config.samples.guidance=1.0"],
            "3 rows, with those of guidance, cannot be",
        ),
        (["--checkpoint={backbone}", "--config.samples.skip=(3,)"], "samples.skip=(3,)"),
        (["--checkpoint={backbone}", "--config.samples.solver=heun"], "heun"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(weights, tmp_path, arguments, message):
    places = dict(zip(("backbone", "branch"), weights, strict=True))
    words = ["--config.samples.steps=3", *[word.format(**places) for word in arguments]]
    done = run_here(
        "prophy_jax.sample",
        "--config=configs/wan.py:tiny",
        f"--out={tmp_path / 'out'}",
        "--prompt=smoke",
        *words,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error:") and message in done.stderr
    assert not (tmp_path / "out").exists()


def spoiled(folder, tmp_path, change) -> str:
    """A copy of a backbone with its last layer changed."""
    config = small_config()
    config.batch_size = 0
    layout = build_run(config).layout["backbone"]
    tree = checkpoints.load_params(folder, layout, "")
    tree["head"]["out"] = change(**tree["head"]["out"])
    checkpoints.save_params(str(tmp_path / "spoiled"), tree, {})
    return str(tmp_path / "spoiled")


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (
            lambda kernel, bias: dict(kernel=kernel, bias=bias.at[3].set(np.nan)),
            [],
            "spoiled holds NaN or infinity in head/out/bias",
        ),
        # Finite weights, and a guided sum that float32 does not hold.
        (
            lambda kernel, bias: dict(kernel=1e37 * kernel, bias=bias),
            ["--config.samples.guidance=1e6"],
            "0000.mp4, 0001.mp4, 0002.mp4: the latents became NaN or infinite in step 1 of 3",
        ),
    ],
)
def test_numbers_that_are_not_finite_are_named_and_no_clip_is_written(
    weights, tmp_path, change, more, message
):
    backbone = spoiled(weights[0], tmp_path, change)
    done = run(tmp_path / "out", f"--checkpoint={backbone}", "--batch=3", *more)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error:") and message in last, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_a_latent_that_is_not_finite_has_its_row_and_step(weights):
    config = small_config()
    config.samples.steps = 20  # ten pieces of two
    _, make_clips = make(config, weights, clips=3)
    noise = np.asarray(make_clips.keywords["noise"]).copy()
    noise[1, 0, 0, 0, 0] = np.inf
    done = []
    with pytest.raises(NotFinite, match="in one of steps 1 to 2 of 20") as caught:
        make_clips(noise=noise, after_steps=done.append)
    assert caught.value.rows == [1] and not done


def test_a_video_codec_that_makes_nan_names_the_clip(tmp_path):
    config = get_config("demo_data")
    config.codec.base_dim = 4
    model, mesh = models.build(config.codec), build.build_mesh(config.mesh, devices=jax.devices()[:2])
    config.codec_params = str(tmp_path / "vae")
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    checkpoints.save_params(config.codec_params, random_like(shapes, 0), {})
    codec = encoders.load_codec(config, mesh)
    latents = np.zeros((3, 1, 2, 2, 16), np.float32)
    assert codec.decode(latents).shape == (3, 1, 16, 16, 3)
    latents[2, 0, 1, 1, 3] = np.inf
    with pytest.raises(NotFinite, match="the video codec makes frames of NaN") as caught:
        codec.decode(latents)
    assert caught.value.rows == [2]


def test_a_training_run_goes_on_without_a_clip_that_is_not_finite(tiny_config, weights, tmp_path, capsys):
    tiny_config.samples.guidance = 1e39
    tiny_config.samples.steps = 2
    run = build_run(tiny_config, jax.devices()[:1])
    with jax.set_mesh(run.mesh):
        write = validation.make_validation_clips(tiny_config, run.model, run.objective, run.mesh)
        write(load(run, weights), str(tmp_path / "samples" / "step.mp4"))
    assert "step.mp4 is not written: frames came out as NaN" in capsys.readouterr().err
    assert not (tmp_path / "samples").exists()


def test_a_branch_of_another_backbone_is_refused(weights, tmp_path):
    config, other, (backbone, branch) = small_config(), str(tmp_path / "other"), weights
    config.batch_size = 0
    layout = build_run(config).layout
    checkpoints.save_params(other, random_like(layout["backbone"], 2), {})
    with pytest.raises(UserError, match="another backbone"):
        build.check_params(config, layout, {"backbone": other, "branch": branch})
    hashes = build.check_params(config, layout, {"backbone": backbone, "branch": branch})
    assert set(hashes) == {"backbone_sha256", "branch_sha256"}
    damaged = tmp_path / "branch"
    shutil.copytree(branch, damaged)
    manifest = json.loads((damaged / "manifest.json").read_text())
    for stored in ("x", {"refinement": 3}):
        content = json.dumps(manifest | {"model": {"branch": stored}})
        (damaged / "manifest.json").write_text(content)
        with pytest.raises(UserError, match="branch/manifest.json is damaged .*: name WORKDIR/branch"):
            build.check_params(config, layout, {"backbone": backbone, "branch": str(damaged)})


def test_folders_are_of_the_parts_that_the_configuration_names(weights):
    config, (backbone, branch) = small_config(), weights
    assert sample.find_parts(config, [branch]) == {"branch": branch} and sample.find_parts(config, []) == {}
    for folders, message in (
        ([backbone], "is of the part ''; config.parts names \\['branch'\\]"),
        ([branch, branch], "the part 'branch' twice"),
        (["nowhere"], "no checkpoint at nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            sample.find_parts(config, folders)


def test_clips_are_added_to_a_folder_that_an_earlier_version_made(tmp_path):
    """It said `branch` where configurations say `parts`."""
    settings = workdir.run_identity(get_config("tiny"), "clips") | {"backbone_sha256": "0"}
    clips = [{"file": f"{i:04d}.mp4", "prompt": prompt, "seed": 0} for i, prompt in enumerate(PROMPTS)]
    sample.claim_folder(str(tmp_path), settings, clips[:2])
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["checksum"]
    manifest["settings"]["branch"] = manifest["settings"].pop("parts")["branch"]
    del manifest["settings"]["branch"]["module"]
    path.write_text(json.dumps(manifest))
    sample.claim_folder(str(tmp_path), settings, clips[1:])
    assert json.loads(path.read_text())["clips"] == clips
    with pytest.raises(UserError, match="backbone_sha256 was 0, is 1"):
        sample.claim_folder(str(tmp_path), settings | {"backbone_sha256": "1"}, clips)


@pytest.mark.parametrize("content", ["{}", "[]", "3", '{"clips": 3}', '{"clips": [3], "settings": {}}'])
def test_a_damaged_folder_of_clips_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=f"{tmp_path}/manifest.json is .*: name another --out"):
        sample.claim_folder(str(tmp_path), {}, [])
    assert (tmp_path / "manifest.json").read_text() == content


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "0000.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="not empty"):
        sample.claim_folder(str(tmp_path), {}, [])


def make(config, weights, devices=1, clips=4):
    """(model, mesh, a function of scale and whatever else `generate` takes) of `clips` clips."""
    encoder, codec = models.build(config.text_encoder), models.build(config.codec)
    text, mask = encoder([*PROMPTS, "smoke rises", ""])
    run = build_run(config, jax.devices()[:devices])
    params = load(run, weights)
    noise = generate.make_noise(0, np.arange(clips), codec.latent_shape(9, 32, 32))
    prompt = parallel.put_batch({"text": text[:clips], "text_mask": mask[:clips]}, run.mesh)
    noise = parallel.put_batch({"noise": np.asarray(noise)}, run.mesh)["noise"]
    negative = {"text": text[-1], "text_mask": mask[-1]}
    make_clips = generate.make_generator(run.model, run.objective, config.samples)
    return run, functools.partial(make_clips, params, noise=noise, prompt=prompt, negative=negative)


def load(run, weights):
    return build.load_params(run.config, run.layout, dict(zip(("backbone", "branch"), weights, strict=True)))


def test_a_sampler_split_over_devices_equals_one_device(weights):
    config, results = small_config(), []
    for shape in ({"data": 1}, {"data": 4}, {"data": 2, "context": 2}):
        config.mesh, config.batch_size = {"data": 1, "fsdp": 1, "context": 1, **shape}, 4
        run, make_clips = make(config, weights, config.mesh["data"] * config.mesh["context"])
        with jax.set_mesh(run.mesh):
            latents = make_clips()
            assert len({str(shard.index) for shard in latents.addressable_shards}) == config.mesh["data"]
        results.append(np.asarray(latents))
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=0, atol=1e-4)  # fp32, three guided steps


def test_a_single_guided_clip_takes_two_devices(weights):
    config, results = small_config(), []
    config.batch_size = 0
    for devices in (1, 2):
        run, make_clips = make(config, weights, devices, clips=1)
        with jax.set_mesh(run.mesh):
            results.append(np.asarray(make_clips()))
            begin, loop = generate.make_sampler(run.model, run.objective, config.samples)
            arguments = abstract_arguments(run, frames=5)
            prompt, state = jax.eval_shape(functools.partial(begin, rows=32), *arguments)
            program = loop.lower(arguments[0], state, prompt, 1.0, 0, 3).compile().as_text()
        # The MLP is 96 wide and reads the 5 x 4 x 4 tokens of both rows of the pair, or of one a device.
        rows = set(re.findall(r"f32\[(\d),80,96\]", program))
        assert rows == ({"2"} if devices == 1 else {"1"})
    np.testing.assert_allclose(results[1], results[0], rtol=0, atol=1e-4)


def abstract_arguments(run, frames=3):
    """What `begin` takes, of one clip, without values."""
    params, config = run.layout, run.config
    length, width = config.text_encoder.length, config.text_encoder.dim
    text, mask = jax.ShapeDtypeStruct((length, width), "float32"), jax.ShapeDtypeStruct((length,), "bool")
    noise = jax.ShapeDtypeStruct((1, frames, 8, 8, 16), "float32")
    one = {name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for name, x in (("text", text), ("mask", mask))}
    prompt = {"text": one["text"], "text_mask": one["mask"]}
    return params, noise, prompt, {"text": text, "text_mask": mask}


def test_one_program_makes_every_clip_whole_or_in_pieces(weights):
    config, done = small_config(), []
    config.samples.steps = 23  # ten pieces of two lengths
    run, make_clips = make(config, weights, devices=2)
    noise = np.asarray(make_clips.keywords["noise"])
    other_noise = parallel.put_batch({"noise": noise + 1}, run.mesh)["noise"]
    with jax.set_mesh(run.mesh), count_compiles() as compiled:
        whole = np.asarray(make_clips())
        assert len(compiled) >= 2  # `begin` and `loop`
        compiled.clear()
        pieces = np.asarray(make_clips(after_steps=done.append))
        other = np.asarray(make_clips(scale=0.5, noise=other_noise))
        assert not compiled
    np.testing.assert_array_equal(whole, pieces)
    assert sum(done) == 23 and len(done) == generate.PIECES
    assert np.abs(other - whole).max() > 1e-2
    np.testing.assert_array_equal(noise, make_clips.keywords["noise"])  # the loop donates a copy of it


def test_the_program_holds_the_network_once_and_no_parameters(weights):
    config = small_config()
    run = build_run(config, jax.devices()[:1])
    begin, loop = generate.make_sampler(run.model, run.objective, config.samples)
    arguments = abstract_arguments(run)
    prompt, state = jax.eval_shape(functools.partial(begin, rows=32), *arguments)
    traced = loop.trace(arguments[0], state, prompt, 1.0, 0, 3)
    constants = sum(np.size(constant) for constant in traced.jaxpr.consts)
    assert constants < 1000  # tables of the solver
    once = jax.make_jaxpr(run.model.predict)(
        arguments[0], jnp.zeros((2, 3, 8, 8, 16)), jnp.zeros(2), prompt, 1.0
    )
    products = str(traced.jaxpr).count("dot_general[")
    assert products == str(once).count("dot_general[") > 10
    compiled = traced.lower().compile()
    latents = 4 * 3 * 8 * 8 * 16
    assert compiled.memory_analysis().alias_size_in_bytes == 4 * latents  # the whole state is donated


def test_skipped_steps_are_those_of_the_solver(weights):
    config = small_config()
    config.samples.steps = 6
    _, make_clips = make(config, weights, clips=1)
    every = np.asarray(make_clips())
    config.samples.skip = (2, 4)
    _, make_clips = make(config, weights, clips=1)
    two_skipped = np.asarray(make_clips())
    apart = np.linalg.norm(two_skipped - every) / np.linalg.norm(every)
    assert 1e-4 < apart < 0.5
    np.testing.assert_array_equal(two_skipped, make_clips(after_steps=lambda n: None))


def stochastic_config():
    """As CogVideoX-5B samples: noise in every step, and a guidance that changes from step to step."""
    config = small_config()
    config.objective = dict(module="v_prediction", snr_shift=1.0)
    config.samples.update(solver="cogvideox-dpm", steps=4, shift=1.0, guidance_schedule="dynamic")
    return config


def test_clips_of_a_stochastic_solver_are_their_own(weights):
    config, results = stochastic_config(), []
    for devices, clips in ((4, 4), (1, 1)):
        config.mesh, config.batch_size = {"data": devices, "fsdp": 1, "context": 1}, clips
        run, make_clips = make(config, weights, devices, clips)
        with jax.set_mesh(run.mesh):
            results.append(np.asarray(make_clips()))
            np.testing.assert_array_equal(results[-1], make_clips(after_steps=lambda n: None))
    spread, alone = results
    assert np.abs(np.diff(spread, axis=0)).max() > 0.5
    np.testing.assert_allclose(alone, spread[:1], rtol=0, atol=1e-4)  # fp32, four guided steps


def test_stochastic_generator_equals_the_model_called_step_by_step(weights):
    config = stochastic_config()
    run, make_clips = make(config, weights, clips=1)
    params, noise = make_clips.args[0], make_clips.keywords["noise"]
    text, mask = models.build(config.text_encoder)([PROMPTS[0], ""])

    def row(i):
        return {"text": text[[i]], "text_mask": mask[[i]]}

    table, model = v_prediction.cogvideox_dpm(4, 1.0), jax.jit(run.model)
    state = solvers.start(table, noise)
    for i, t in enumerate((999, 749, 499, 249)):
        factor = 1 + config.samples.guidance * (1 - np.cos(np.pi * ((4 - t) / 4) ** 5)) / 2

        def velocity(x, t, factor=factor):
            t = jnp.broadcast_to(t, (1,))
            without, with_prompt = (model(params, x, t, row(i)).prediction for i in (1, 0))
            return without + factor * (with_prompt - without)

        weighed = jax.tree.map(lambda leaf, i=i: leaf[i], table.steps)
        state = solvers.step(weighed, state, velocity, solvers.step_noise(state, i))
    np.testing.assert_allclose(make_clips(), state.x, rtol=0, atol=1e-4)  # fp32, four guided steps


@pytest.mark.parametrize(
    ("settings", "message"),
    [(dict(skip=(2,)), "samples.skip"), (dict(guidance_schedule="wave"), "guidance schedule 'wave'")],
)
def test_settings_that_a_stochastic_sampler_cannot_take(settings, message):
    config = stochastic_config()
    config.samples.update(**settings)
    with pytest.raises(UserError, match=message):
        generate.make_sampler(None, build.build_objective(config), config.samples)


def test_the_observer_noises_as_much_in_every_family(weights):
    config = small_config()
    run, make_clips = make(config, weights, clips=1)
    params, inputs, model = make_clips.args[0], make_clips.keywords, jax.jit(run.model)
    latents, prompt = inputs["noise"], inputs["prompt"]
    family, branch = v_prediction.VPrediction(1.0), run.model.parts["branch"]
    maps = branch.token_maps(generate.make_observer(run.model, family)(params, latents, prompt)["branch"])
    # alpha^2 of timestep 56, whose share of noise is the nearest to 0.2
    alpha, sigma = (np.float32(np.sqrt(a)) for a in (0.941307, 1 - 0.941307))
    assert abs(sigma / (alpha + sigma) - 0.2) < 1e-3  # levels are 1.7e-3 apart there
    noisy = alpha * latents + sigma * jax.random.normal(jax.random.key(0), latents.shape)
    expected, other = (model(params, noisy, jnp.full(1, t), prompt).seen["branch"] for t in (56.0, 200.0))
    np.testing.assert_allclose(maps, expected.alignment, rtol=0, atol=1e-4)  # alpha^2 to six digits
    assert np.abs(maps - other.alignment).max() > 1e-3


def test_generator_equals_the_model_called_step_by_step(weights):
    config = small_config()
    config.batch_size = 0
    run = build_run(config, jax.devices()[:1])
    params = load(run, weights)
    text, mask = models.build(config.text_encoder)([PROMPTS[0], ""])
    assert generate.text_rows(mask) == 32 < mask.shape[1]  # the padding is shortened here
    noise = generate.make_noise(0, np.arange(1), (3, 8, 8, 16))
    prompt, negative = {"text": text[:1], "text_mask": mask[:1]}, {"text": text[1], "text_mask": mask[1]}
    make_clips = generate.make_generator(run.model, run.objective, config.samples)
    latents, model = make_clips(params, noise, prompt, negative), jax.jit(run.model)

    def velocity(x, t):
        t = jnp.broadcast_to(t, (1,))
        empty = jax.tree.map(lambda leaf: leaf[None], negative)
        without, with_prompt = (model(params, x, t, one).prediction for one in (empty, prompt))
        return without + config.samples.guidance * (with_prompt - without)

    solver = run.objective.solver("unipc", 3, config.samples.shift)
    expected = solvers.advance(solver, velocity, solvers.start(solver, noise), 0, 3).x
    np.testing.assert_allclose(latents, expected, rtol=0, atol=1e-4)
    alone = generate.make_generator(run.model.without(), run.objective, config.samples)
    backbone = alone(params, noise, prompt, negative)
    silent = make_clips(params, noise, prompt, negative, scale=0.0)
    np.testing.assert_array_equal(backbone, silent)
    assert np.abs(backbone - latents).max() > 1e-2


def test_the_configuration_of_14b():
    config = get_config("14b")
    config.batch_size = 0
    layout = build_run(config, jax.devices()[:1]).layout
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


def save_converted(folder, name: str, **model) -> None:
    """A part as convert writes it: the manifest has all sizes."""
    built = models.build(model)
    tree = random_like(jax.eval_shape(built.init, jax.random.key(0)), 0)
    sizes = {"module": model["module"], **dataclasses.asdict(built.config)}
    checkpoints.save_params(str(folder / name), tree, {"part": name, "model": sizes})


def test_sizes_are_those_of_the_checkpoint(tmp_path):
    """One block of width 24 with a configuration of two of width 48."""
    sizes = dict(module="wan", dim=24, num_heads=1, num_layers=1, ffn_dim=40, text_dim=64, freq_dim=64)
    save_converted(tmp_path, "backbone", **sizes)
    done = run(tmp_path / "out", f"--checkpoint={tmp_path / 'backbone'}", prompts=PROMPTS[:1])
    assert done.returncode == 0, done.stderr
    assert "takes the sizes of" in done.stdout and "dim 24, num_heads 1, num_layers 1" in done.stdout
    made = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["backbone"]
    assert made["dim"] == 24 and made["dtype"] == "float32"
    assert made["text_len"] == 64  # of prompts, as the configuration says

    same = get_config("tiny")
    sample.use_checkpoint(same, str(tmp_path / "backbone"))
    assert same.backbone.num_layers == 1 and same.backbone.remat == "none"


def test_sizes_of_every_part_and_what_is_no_size(tmp_path, capsys):
    config = tiny_pipeline.cogvideox()
    config.backbone.dim, config.backbone.ffn_dim = 96, 384
    config.codec.scaling_factor = 0.5
    config.text_encoder.d_ff = 48
    del config.backbone.text_len
    parts = {
        "transformer": dict(tiny_pipeline.cogvideox().backbone, text_len=40),
        "vae": dict(tiny_pipeline.cogvideox().codec),
        "text_encoder": dict(tiny_pipeline.cogvideox().text_encoder),
    }
    for name, model in parts.items():
        save_converted(tmp_path, name, **model)
    other = config.copy_and_resolve_references()
    sample.use_checkpoint(config, str(tmp_path))
    assert (config.backbone.dim, config.backbone.ffn_dim, config.text_encoder.d_ff) == (48, 192, 40)
    assert config.codec.scaling_factor == 0.7 and config.text_encoder.padding == "encoded"
    assert config.backbone.text_len == config.text_encoder.length == 40  # which the configuration leaves open
    assert capsys.readouterr().out.count("takes the sizes of") == 3
    build.check_params(
        config,
        build.place(build.build_model(config), build.build_mesh(config.mesh), "float32"),
        {"backbone": config.backbone_params},
    )

    other.backbone.variant = "2b"
    with pytest.raises(UserError, match="another kind of model .positions was sincos, is rope_crop"):
        sample.use_checkpoint(other, str(tmp_path))
    with pytest.raises(UserError, match="is of the model 'cogvideox', config.backbone of 'wan'"):
        sample.use_checkpoint(get_config(""), str(tmp_path))


@pytest.mark.parametrize(("height", "near"), [(50, "48 x 832"), (56, "64 x 832"), (8, "16 x 832")])
def test_the_multiple_of_sides_is_that_of_codec_and_patches(height, near):
    config = get_config("")
    config.data.height = height
    with pytest.raises(UserError, match=f"multiples of 16, such as {near}"):
        build.sizes(config, build.build_model(config))
    with pytest.raises(UserError, match="multiples of 16"):
        list_grids(config, models.build(config.codec), [(81, 480, 832), (81, height, 832)])
