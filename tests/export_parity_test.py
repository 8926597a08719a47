"""Exported files in PyTorch: diffusers and transformers load them, and the branch runs too."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import export as convert_export
from convert import leaves as lv
from convert import t5 as convert_t5
from convert import wan as convert_wan
from prophy_jax import models
from prophy_jax.models.beside.part import Model
from prophy_jax.run import checkpoints
from tests import state_dicts
from tests.late import late

torch = late("torch")
diffusers = late("diffusers")
transformers = late("transformers")
safetensors_torch = late("safetensors.torch")

DOCS = pathlib.Path(__file__).parent.parent / "docs"
DIT = dict(module="wan", dim=36, num_heads=2, num_layers=4, ffn_dim=40, text_dim=24, freq_dim=32)
VAE = dict(module="wan_vae", base_dim=8)
T5 = dict(module="t5", vocab_size=40, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3)
LEAVES = {"wan": convert_wan.dit_leaves, "wan_vae": convert_wan.vae_leaves, "t5": convert_t5.leaves}


def randomise(model, seed=0, dtype="float32"):
    """Every parameter random, norms and biases included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith(("weight", "gamma")):
                parameter.copy_(1 + 0.3 * noise)
            else:
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
                parameter.copy_(noise / fan_in**0.5)
    return model.eval().to(getattr(torch, dtype))


def build_transformer(dtype="float32"):
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=18,
        num_layers=4,
        ffn_dim=40,
        text_dim=24,
        freq_dim=32,
    )
    return randomise(model, dtype=dtype)


def build_vae():
    return randomise(diffusers.AutoencoderKLWan(base_dim=8))


def build_text_encoder(shared_bias=False, dtype="float32"):
    config, model = transformers.UMT5Config, transformers.UMT5EncoderModel
    if shared_bias:
        config, model = transformers.T5Config, transformers.T5EncoderModel
    sizes = dict(vocab_size=40, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3)
    return randomise(model(config(**sizes, feed_forward_proj="gated-gelu")), dtype=dtype)


def to_numpy(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def save_ours(folder, part: str, spec, model):
    """The weights of a PyTorch model as `convert.wan` leaves them."""
    table = LEAVES[spec["module"]](models.build(spec).config, "diffusers")
    names = lv.tensor_shapes(table)
    state = {name: to_numpy(tensor) for name, tensor in model.state_dict().items() if name in names}
    lv.check([(n, t.shape) for n, t in state.items()], table, "the PyTorch model")
    checkpoints.save_params(str(folder), state_dicts.read(state, table), {"part": part, "model": spec})


def assert_same_state(got, want):
    got, want = got.state_dict(), want.state_dict()
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        assert torch.equal(got[name], want[name]), name


def assert_same_config(folder, reference_folder, *bookkeeping):
    """Fields that the class knows, as its own save_pretrained writes them."""
    ours, reference = (json.loads((f / "config.json").read_text()) for f in (folder, reference_folder))
    for field in ("_diffusers_version", *bookkeeping):
        ours.pop(field, None)
        reference.pop(field, None)
    assert ours.items() <= reference.items()
    return {field: reference[field] for field in reference.keys() - ours.keys()}


def no_complaints(info):
    assert not any(info.values()), info


def settle(*models):
    """Moves weights out of the mapped file, where they may lie so that PyTorch sums in another order."""
    for model in models:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformer_loads_and_computes_the_same(tmp_path, dtype):
    source, dtype = build_transformer(dtype), getattr(torch, dtype)
    save_ours(tmp_path / "ours", "transformer", DIT, source)
    convert_export.export(str(tmp_path / "ours"), "diffusers", str(tmp_path / "out"), shard_bytes=20_000)
    assert len(list((tmp_path / "out" / "transformer").glob("*.safetensors"))) > 1
    loaded, info = diffusers.WanTransformer3DModel.from_pretrained(
        tmp_path / "out" / "transformer", torch_dtype=dtype, output_loading_info=True
    )
    no_complaints(info)
    source.save_pretrained(tmp_path / "theirs")
    rest = assert_same_config(tmp_path / "out" / "transformer", tmp_path / "theirs")
    assert rest == {"pos_embed_seq_len": None}  # the class's default

    reference = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "theirs", torch_dtype=dtype)
    assert_same_state(loaded, reference)
    if dtype == torch.float32:
        assert_same_state(loaded, source)
    settle(loaded, reference)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn((2, 16, 3, 4, 6), generator=generator).to(dtype)
    text = torch.randn((2, 7, 24), generator=generator).to(dtype)
    with torch.no_grad():
        out, want = (m(latents, torch.tensor([3, 870]), text).sample for m in (loaded, reference))
    assert want.isfinite().all() and want.std() > 0.1
    assert torch.equal(out, want)


def test_config_and_tensors_of_a_transformer_make_it(tmp_path):
    """What from_pretrained does, where accelerate is absent."""
    source = build_transformer()
    save_ours(tmp_path / "ours", "transformer", DIT, source)
    convert_export.export(str(tmp_path / "ours"), "diffusers", str(tmp_path / "out"))
    folder = tmp_path / "out" / "transformer"
    model = diffusers.WanTransformer3DModel.from_config(json.loads((folder / "config.json").read_text()))
    model.load_state_dict(
        safetensors_torch.load_file(folder / "diffusion_pytorch_model.safetensors"), strict=True
    )
    assert_same_state(model, source)
    internal = ("_name_or_path", "_use_default_values", "_class_name", "_diffusers_version")
    for field in source.config.keys() - set(internal):
        want = source.config[field]
        assert model.config[field] == (list(want) if isinstance(want, tuple) else want), field


def test_vae_loads_and_computes_the_same(tmp_path):
    source = build_vae()
    save_ours(tmp_path / "ours", "vae", VAE, source)
    convert_export.export(str(tmp_path / "ours"), "diffusers", str(tmp_path / "out"))
    loaded, info = diffusers.AutoencoderKLWan.from_pretrained(
        tmp_path / "out" / "vae", output_loading_info=True
    )
    no_complaints(info)
    assert_same_state(loaded, source)
    source.save_pretrained(tmp_path / "theirs")
    rest = assert_same_config(tmp_path / "out" / "vae", tmp_path / "theirs")
    assert rest == {  # the class's defaults
        "decoder_base_dim": None,
        "in_channels": 3,
        "is_residual": False,
        "out_channels": 3,
        "patch_size": None,
    }
    settle(loaded)
    video = torch.randn((1, 3, 5, 16, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        moments, want = (m.encode(video).latent_dist.parameters for m in (loaded, source))
        frames, expected = (m.decode(want[:, :16]).sample for m in (loaded, source))
    assert want.std() > 0.1 and expected.std() > 0.1
    assert torch.equal(moments, want) and torch.equal(frames, expected)


def test_vae_of_other_sizes(tmp_path):
    sizes = dict(base_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, z_dim=4)
    statistics = dict(latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[1.5, 2.5, 0.5, 1.0])
    scale = dict(scale_factor_spatial=4, scale_factor_temporal=2)
    source = randomise(
        diffusers.AutoencoderKLWan(**sizes, **statistics, **scale, temperal_downsample=[True, False])
    )
    spec = dict(module="wan_vae", **sizes, **statistics, temporal_downsample=[True, False])
    save_ours(tmp_path / "ours", "vae", spec, source)
    convert_export.export(str(tmp_path / "ours"), "diffusers", str(tmp_path / "out"))
    source.save_pretrained(tmp_path / "theirs")
    assert_same_config(tmp_path / "out" / "vae", tmp_path / "theirs")
    assert_same_state(diffusers.AutoencoderKLWan.from_pretrained(tmp_path / "out" / "vae"), source)


@pytest.mark.parametrize("shared_bias", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_text_encoder_loads_and_computes_the_same(tmp_path, shared_bias, dtype):
    source, dtype = build_text_encoder(shared_bias, dtype), getattr(torch, dtype)
    save_ours(tmp_path / "ours", "text_encoder", {**T5, "shared_bias": shared_bias}, source)
    convert_export.export(str(tmp_path / "ours"), "diffusers", str(tmp_path / "out"))
    folder = tmp_path / "out" / "text_encoder"
    loaded, info = type(source).from_pretrained(folder, output_loading_info=True)
    no_complaints(info)
    assert loaded.dtype == dtype  # the file's own
    assert_same_state(loaded, source)
    source.save_pretrained(tmp_path / "theirs")
    rest = assert_same_config(
        folder, tmp_path / "theirs", "torch_dtype", "dtype", "is_encoder_decoder", "decoder_start_token_id"
    )
    defaults = type(source.config)().to_dict()
    # Follow from feed_forward_proj.
    defaults |= {"dense_act_fn": "gelu_new", "is_gated_act": True, "use_cache": rest["use_cache"]}
    assert rest.items() <= {**defaults, "transformers_version": transformers.__version__}.items()

    settle(loaded)
    ids = torch.tensor([[5, 30, 39, 2, 1, 0, 0]])
    with torch.no_grad():
        out, want = (m(ids, attention_mask=(ids > 0).long()).last_hidden_state for m in (loaded, source))
    assert want.std() > 0.1
    assert torch.equal(out, want)


def save_tokenizer(folder):
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁ball", -2.0), ("▁", -3.0)]
    tokenizer = transformers.T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_the_whole_pipeline_loads_and_samples(tmp_path):
    parts = {
        "transformer": (DIT, build_transformer()),
        "vae": (VAE, build_vae()),
        "text_encoder": ({**T5, "shared_bias": False}, build_text_encoder()),
    }
    for part, (spec, model) in parts.items():
        save_ours(tmp_path / "ours" / part, part, spec, model)
    tokenizer = save_tokenizer(tmp_path / "ours" / "text_encoder" / "tokenizer")
    convert_export.export(str(tmp_path / "ours"), "diffusers", str(tmp_path / "out"))

    pipeline = diffusers.WanPipeline.from_pretrained(tmp_path / "out")
    scheduler = pipeline.scheduler
    assert type(scheduler) is diffusers.UniPCMultistepScheduler
    wanted = diffusers.UniPCMultistepScheduler(
        num_train_timesteps=1000,
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
    )
    internal = ("_use_default_values", "_diffusers_version", "_class_name", "_name_or_path")
    for field in wanted.config.keys() - set(internal):
        assert scheduler.config[field] == wanted.config[field], field

    reference = diffusers.WanPipeline(
        tokenizer=tokenizer,
        scheduler=wanted,
        **{part: model for part, (_, model) in parts.items()},
    )
    settle(pipeline.transformer, pipeline.vae, pipeline.text_encoder)
    arguments = dict(height=16, width=16, num_frames=5, num_inference_steps=2, output_type="np")
    clips = []
    for pipe in (pipeline, reference):
        pipe.set_progress_bar_config(disable=True)
        clips.append(pipe("a ball", generator=torch.Generator().manual_seed(0), **arguments).frames)
    assert clips[1].std() > 0.01
    np.testing.assert_array_equal(*clips)


def test_the_documented_lines_make_the_pth_files_of_the_reference_code(tmp_path, monkeypatch):
    specs = {"vae": (VAE, build_vae()), "text_encoder": ({**T5, "shared_bias": False}, build_text_encoder())}
    for part, (spec, model) in specs.items():
        save_ours(tmp_path / "ours" / part, part, spec, model)
    convert_export.export(str(tmp_path / "ours"), "official", str(tmp_path / "out"))
    monkeypatch.chdir(tmp_path / "out")
    code = re.search(r"the test runs this -->\n```python\n(.*?)```", (DOCS / "pytorch.md").read_text(), re.S)
    exec(code[1], {})
    for name, (part, (spec, _)) in zip(
        ("Wan2.1_VAE", "models_t5_umt5-xxl-enc-bf16"), specs.items(), strict=True
    ):
        state = torch.load(f"{name}.pth", weights_only=True)
        table = LEAVES[spec["module"]](models.build(spec).config, "official")
        assert {n: tuple(t.shape) for n, t in state.items()} == lv.tensor_shapes(table), part
        again = safetensors_torch.load_file(f"{name}.safetensors")
        assert all(torch.equal(state[n], again[n]) for n in state)


# --- The branch ------------------------------------------------------------------------------------

BRANCH = dict(
    module="prophy",
    layers=[0, 1, 3],
    semantic=dict(basis_grid=[3, 4, 6], experts=5, hidden=12),
    refinement=dict(experts=4, top_k=2, categories=7, align_hidden=6),
)
GRID = (3, 4, 6)


def example():
    from benchmarks import prophy_branch

    return prophy_branch


def random_branch(model, backbone):
    """Unlike a fresh branch: bases, exits and experts random, blocks not those of the backbone."""
    params = model.init_part("branch", jax.random.key(0), {"backbone": backbone})
    rng = np.random.default_rng(3)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        if path[-1].key == "scale":
            return 1 + 0.3 * noise
        if path[-1].key == "basis":
            return noise
        return noise / (leaf.shape[-2] ** 0.5 if path[-1].key == "kernel" else 2)

    return jax.tree_util.tree_map_with_path(draw, params)


def export_branch(folder, spec, transformer):
    """Returns our model and its parameters; writes the branch's file into `folder`/out."""
    model = Model(models.build(DIT), {"branch": models.build(spec)})
    state = {name: tensor.numpy() for name, tensor in transformer.state_dict().items()}
    backbone = state_dicts.read(state, convert_wan.dit_leaves(model.backbone.config, "diffusers"))
    params = {"backbone": backbone, "branch": random_branch(model, backbone)}
    about = {"part": "branch", "model": {"backbone": DIT, "branch": spec}}
    checkpoints.save_params(str(folder / "branch"), params["branch"], about)
    convert_export.export(str(folder / "branch"), "diffusers", str(folder / "out"))
    return model, params, folder / "out" / "prophy_branch.safetensors"


def branch_inputs(grid):
    rng = np.random.default_rng(4)
    latents = rng.standard_normal((2, *grid, 16), np.float32)
    text = rng.standard_normal((2, 9, 24), np.float32)
    mask = np.arange(9) < np.array([[9], [4]])
    return latents, np.array([37.0, 612.0], np.float32), text * mask[..., None], mask


TOKENS = {**BRANCH, "semantic": {**BRANCH["semantic"], "basis_grid": [3, 2, 3], "basis_space": "token"}}


@pytest.mark.parametrize(
    ("spec", "grid", "scale"),
    [
        pytest.param(BRANCH, GRID, 1.0, id="whole"),
        pytest.param(BRANCH, (5, 8, 8), 1.0, id="larger clip"),
        pytest.param(BRANCH, (2, 2, 8), 1.0, id="smaller clip", marks=pytest.mark.slow),
        pytest.param({**BRANCH, "refinement": None}, GRID, 1.0, id="pb+seb", marks=pytest.mark.slow),
        pytest.param({**BRANCH, "semantic": None}, GRID, 1.0, id="pb+reb", marks=pytest.mark.slow),
        pytest.param({**BRANCH, "semantic": None, "refinement": None}, GRID, 0.4, id="pb, weaker"),
        pytest.param(TOKENS, GRID, 1.0, id="token basis"),
    ],
)
def test_the_example_computes_what_we_compute(tmp_path, spec, grid, scale, record_property):
    transformer = build_transformer()
    model, params, file = export_branch(tmp_path, spec, transformer)
    latents, t, text, mask = branch_inputs(grid)
    with jax.default_matmul_precision("highest"):
        prompt = {"text": text, "text_mask": mask}
        want = jax.jit(model)(params, latents, t, prompt, scale)
        seen = want.seen["branch"]

    channels_first = torch.from_numpy(latents).permute(0, 4, 1, 2, 3)
    inputs = (channels_first, torch.from_numpy(t), torch.from_numpy(text))
    with torch.no_grad():
        alone = transformer(*inputs).sample
        prophy = example().ProPhy(transformer, str(file), scale)
        velocity, routing = prophy(*inputs)
        # The transformer has the branch from now on, as inside a pipeline.
        assert torch.equal(
            transformer(hidden_states=inputs[0], timestep=inputs[1], encoder_hidden_states=inputs[2]).sample,
            velocity,
        )
        prophy.scale = 0.0
        assert torch.equal(prophy(*inputs)[0], alone)
    assert (velocity - alone).abs().max() > 0.1  # The branch matters.

    expected = {
        "semantic": None if spec["semantic"] is None else jax.nn.softmax(seen.semantic_logits),
        "refinement": seen.refinement,
        "alignment": seen.alignment,
    }
    expected = {name: value for name, value in expected.items() if value is not None}
    assert routing.keys() == expected.keys()
    got = {"velocity": velocity.permute(0, 2, 3, 4, 1), **routing}
    for name, value in {"velocity": want.prediction, **expected}.items():
        difference = np.abs(got[name].numpy() - np.asarray(value)).max()
        record_property(name, float(difference))
        # fp32 sums in another order: 2e-6 measured, at velocities up to 5.
        assert difference < 2e-5, (name, difference)


def test_the_example_works_inside_a_pipeline(tmp_path):
    transformer = build_transformer()
    _, _, file = export_branch(tmp_path, BRANCH, transformer)
    pipeline = diffusers.WanPipeline(
        tokenizer=save_tokenizer(tmp_path / "tokenizer"),
        text_encoder=build_text_encoder(),
        transformer=transformer,
        vae=build_vae(),
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )
    pipeline.set_progress_bar_config(disable=True)

    def sample():
        arguments = dict(height=32, width=48, num_frames=9, num_inference_steps=2, output_type="latent")
        return pipeline("a ball", generator=torch.Generator().manual_seed(0), **arguments).frames

    alone = sample()
    prophy = example().ProPhy(transformer, str(file))
    assert (sample() - alone).abs().max() > 0.1
    prophy.scale = 0.0
    assert torch.equal(sample(), alone)


@pytest.mark.parametrize("size", [(3, 5, 7), (6, 9, 20), (2, 3, 11), (1, 1, 1), (5, 6, 10)])
def test_resize_is_that_of_jax(size):
    x = np.random.default_rng(5).standard_normal((2, 5, 6, 10, 3), np.float32)
    want = np.moveaxis(np.asarray(jax.image.resize(x, (2, *size, 3), "linear")), -1, 1)
    got = example().resize(torch.from_numpy(np.moveaxis(x, -1, 1).copy()), size).numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)  # fp32 sums in another order


def test_the_example_refuses_official_names(tmp_path):
    transformer = build_transformer()
    export_branch(tmp_path, BRANCH, transformer)
    convert_export.export(str(tmp_path / "branch"), "official", str(tmp_path / "official"))
    with pytest.raises(ValueError, match="--format=diffusers"):
        example().ProPhy(transformer, str(tmp_path / "official" / "prophy_branch.safetensors"))
