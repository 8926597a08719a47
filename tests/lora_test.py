"""Adapters next to any backbone: nothing at step 0, as merged weights later, gradients for them alone."""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from prophy_jax import build, models
from prophy_jax.models.beside import lora
from prophy_jax.models.beside.lora import Lora
from prophy_jax.models.beside.part import Model
from prophy_jax.models.beside.prophy import ProPhy, RefinementConfig, SemanticConfig
from prophy_jax.run import optim
from prophy_jax.run.errors import UserError
from tests.backbone_test import randomised
from tests.conftest import ROOT

WAN = dict(module="wan", dim=48, num_heads=3, num_layers=4, ffn_dim=64, text_dim=8, text_len=6, freq_dim=8)
COGVIDEOX = dict(
    **dict(module="cogvideox", dim=48, num_heads=3, num_layers=4, ffn_dim=64, text_dim=8, text_len=6),
    **dict(time_dim=16, base_grid=(4, 6)),
)
LATENT, TEXT = (3, 8, 12, 16), (6, 8)
EVERYWHERE = ("backbone/blocks/.*",)
BRANCH = ProPhy((0, 2), SemanticConfig(LATENT[:3], hidden=8), RefinementConfig())


@pytest.fixture(params=[WAN, COGVIDEOX], ids=["wan", "cogvideox"])
def spec(request):
    return request.param


def make(spec, parts, moved=()):
    """A model, and parameters at step 0; those of the parts `moved` are random."""
    model = Model(models.build(spec), parts)
    params = {"backbone": randomised(jax.eval_shape(model.backbone.init, jax.random.key(0)))}
    for name in parts:
        params[name] = jax.jit(functools.partial(model.init_part, name))(jax.random.key(1), params)
        if name in moved:
            params[name] = randomised(params[name], seed=len(params))
    return model, params


def inputs(seed=2):
    rng = np.random.default_rng(seed)
    latents, text = (rng.standard_normal((2, *shape), np.float32) for shape in (LATENT, TEXT))
    mask = np.arange(TEXT[0]) < np.array([[3], [5]])
    return latents, jnp.array([37.0, 800.0]), {"text": text * mask[..., None], "text_mask": mask}


def predict(model, params):
    return jax.jit(lambda params, *rest: model(params, *rest).prediction)(params, *inputs())


@pytest.mark.parametrize("parts", [{}, {"branch": BRANCH}], ids=["alone", "with the branch"])
def test_at_step_0_nothing_changes_bit_for_bit(spec, parts):
    model, params = make(spec, {**parts, "lora": Lora(4, 8.0, EVERYWHERE)}, moved=("branch",))
    np.testing.assert_array_equal(predict(model, params), predict(model.without("lora"), params))
    assert all(not leaf.any() for path, leaf in flatten_dict(params["lora"]).items() if path[-1] == "up")
    assert all(leaf.all() for path, leaf in flatten_dict(params["lora"]).items() if path[-1] == "down")


@pytest.mark.parametrize("stable", [False, True])
def test_adapters_are_the_merged_weights(spec, stable):
    part = Lora(4, 3.0, EVERYWHERE, stable, strength=0.5)
    assert part.scale == (0.75 if stable else 0.375)
    model, params = make(spec, {"lora": part}, moved=("lora",))
    merged = {"backbone": part.merge(params["lora"], params)["backbone"]}
    want = predict(model.without(), merged)
    # Two products in place of one; fp32 sums of 48 to 64 terms.
    np.testing.assert_allclose(predict(model, params), want, rtol=0, atol=2e-5 * np.abs(want).max())
    assert np.abs(want - predict(model.without(), params)).max() > 0.02


def test_two_adapters_and_a_branch_that_is_adapted_itself():
    parts = {
        "a": Lora(2, 2.0, ("backbone/blocks/self_attn/q",)),
        "branch": BRANCH,
        "c": Lora(3, 3.0, ("backbone/blocks/self_attn/[qk]", "branch/blocks/ffn")),
    }
    model, params = make(WAN, parts, moved=("a", "branch", "c"))
    assert params["c"]["branch"]["ffn"]["up"]["down"].shape == (2, 48, 3)
    merged = parts["c"].merge(params["c"], parts["a"].merge(params["a"], params))
    want = predict(model.without("a", "c"), merged)
    np.testing.assert_allclose(predict(model, params), want, rtol=0, atol=2e-5 * np.abs(want).max())
    for name in ("a", "c"):
        assert np.abs(want - predict(model.without(name), params)).max() > 1e-3


def test_a_scale_may_be_of_one_part(spec):
    model, params = make(spec, {"branch": BRANCH, "lora": Lora(2, 2.0)}, moved=("branch", "lora"))
    run = jax.jit(lambda scale: model(params, *inputs(), scale=scale).prediction)
    np.testing.assert_array_equal(run({"branch": 0.5}), run(0.5))
    np.testing.assert_array_equal(run({}), run(1.0))
    assert np.abs(run({"branch": 0.5}) - run({})).max() > 1e-3


def test_text_that_is_read_ahead_is_adapted_too(spec):
    model, params = make(spec, {"lora": Lora(4, 4.0, EVERYWHERE)}, moved=("lora",))
    latents, t, prompt = inputs()

    @jax.jit
    def ahead(params):
        return model.predict(params, latents, t, model.read_ahead(params, prompt)).prediction

    np.testing.assert_allclose(ahead(params), predict(model, params), rtol=0, atol=1e-5)


def test_gradients_reach_the_adapters_alone_and_all_of_them(spec):
    model, params = make(spec | dict(remat="attention"), {"lora": Lora(4, 4.0)}, moved=("lora",))

    def loss(own, rest):
        return jnp.square(model({**rest, "lora": own}, *inputs()).prediction).mean()

    gradient = jax.jit(jax.grad(loss))(params["lora"], {"backbone": params["backbone"]})
    paths = flatten_dict(gradient, sep="/")
    attentions = ("self_attn", "cross_attn") if spec is WAN else ("attn",)
    assert set(paths) == {
        f"backbone/{attention}/{name}/{side}"
        for attention in attentions
        for name in "qkvo"
        for side in ("down", "up")
    }
    assert all(np.abs(leaf).max((1, 2)).min() > 0 for leaf in paths.values())  # in every block


def test_in_bf16_the_product_is_that_of_the_layer():
    part = Lora(4, 4.0, ("backbone/blocks/ffn",))
    model, params = make(WAN | dict(dtype="bfloat16"), {"lora": part}, moved=("lora",))
    program = str(jax.make_jaxpr(lambda params: model(params, *inputs()).prediction)(params))
    assert "bf16[2,72,4]" in program and "f32[2,72,4]" not in program.replace("bf16", "")


def test_what_cannot_be_adapted_is_refused_with_the_nearest_layer():
    with pytest.raises(UserError, match="rank=0"):
        lora.build(0, 1.0)
    with pytest.raises(UserError, match="alpha=0.0"):
        lora.build(1, 0.0)
    with pytest.raises(UserError, match="alpha"):
        models.build(dict(module="lora", rank=4))
    for targets in ((), "backbone/blocks/ffn"):
        with pytest.raises(UserError, match="give a list"):
            lora.build(1, 1.0, targets)
    with pytest.raises(UserError, match=r"'\(self_attn' is not a regular expression"):
        lora.build(1, 1.0, ("(self_attn",))
    with pytest.raises(
        UserError,
        match=r"no dense layer matches .*self_attn/to_q.*nearest is 'backbone/blocks/self_attn/[qko]'",
    ):
        make(WAN, {"lora": Lora(2, 2.0, ("backbone/blocks/self_attn/to_q",))})


def arms_of_the_docs():
    """(arm, trained millions of Wan2.1-1.3B, of CogVideoX-5B), from the table of docs/lora.md."""
    rows = re.findall(
        r"^\| (`.*?) \| ([\d,.]+) M \|.*?\| ([\d,.]+) M \|", (ROOT / "docs/lora.md").read_text(), re.M
    )
    return [
        (arm, *(float(number.replace(",", "")) for number in numbers))
        for names, *numbers in rows
        if "alone" not in names
        for arm in re.findall("`(.*?)`", names)
    ]


@pytest.mark.parametrize(("arm", "wan", "cogvideox"), arms_of_the_docs())
def test_the_docs_say_how_many_parameters_each_arm_trains(arm, wan, cogvideox):
    for file, millions in (("wan", wan), ("cogvideox", cogvideox)):
        config = importlib.import_module(f"configs.{file}").get_config(f",{arm}")
        mesh = build.build_mesh(config.mesh, 1, jax.devices()[:1])
        layout = build.place(
            build.build_model(config, mesh), mesh, config.frozen_dtype, optim.groups_of(config.optimizer)
        )
        trainable, _ = optim.split(layout, optim.groups_of(config.optimizer))
        found = sum(leaf.size for leaf in jax.tree.leaves(trainable))
        assert found == pytest.approx(1e6 * millions, abs=5e4)


def test_the_docs_have_every_arm():
    with pytest.raises(UserError, match="it has") as error:
        importlib.import_module("configs.wan").get_config(",none")
    assert set(re.findall("'([^']*)'", str(error.value))) - {"none"} == {
        arm for arm, *_ in arms_of_the_docs()
    }
