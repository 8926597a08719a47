"""The train step: equal on every mesh, equal under accumulation, exact randomness, frozen stays frozen."""

import functools
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from prophy_jax import build, losses, train
from prophy_jax.losses import prophy
from prophy_jax.models.beside.part import Part
from prophy_jax.run import optim, parallel
from prophy_jax.run.errors import UserError
from tests.backbone_test import Bias
from tests.conftest import ROOT, build_run, get_config

BATCH, TOKENS = 8, 3 * 4 * 4
EMPTY = {"text": np.zeros((6, 8), np.float32), "text_mask": np.arange(6) < 1}


def tiny(**changes):
    config = get_config("tiny")
    config.backbone.update(dim=24, num_heads=2, ffn_dim=32, text_dim=8, text_len=6, freq_dim=16)
    config.parts.branch.semantic.hidden = 8
    config.optimizer.groups = (("branch/blocks/", 2e-3), ("branch/", 1e-2), ("backbone/", None))
    config.optimizer.warmup = 1
    config.batch_size = BATCH
    for name, value in changes.items():
        config[name] = value
    return config


def make_batch(seed=0, size=BATCH):
    rng = np.random.default_rng(seed)
    present = (rng.random((size, 17)) < 0.3).astype(np.float32)
    present[-1] = 0  # a clip without labels
    return {
        "latents": rng.normal(size=(size, 3, 8, 8, 16)).astype(np.float32),
        "text": rng.normal(size=(size, 6, 8)).astype(np.float32),
        "text_mask": np.arange(6) < rng.integers(1, 7, (size, 1)),
        "category": present,
        "alignment": rng.uniform(-1, 1, (size, TOKENS, 17)).astype(np.float32) * present[:, None],
        "alignment_present": present,
    }


def init(run):
    """(trainable, frozen) parameters at step 0."""
    params = build.init_params(run.config, run.model, run.layout)
    return optim.split(params, optim.groups_of(run.config.optimizer))


def start(run):
    """As `init`, with exits and a head away from zero."""
    trainable, frozen = init(run)
    if "exits" in trainable.get("branch", ()):
        exits = trainable["branch"]["exits"]
        exits["kernel"] = exits["kernel"] + 0.05 * jax.random.normal(jax.random.key(9), exits["kernel"].shape)
    head = (frozen if "backbone" in frozen else trainable)["backbone"]["head"]["out"]
    head["kernel"] = head["kernel"] + 0.1 * jax.random.normal(jax.random.key(8), head["kernel"].shape)
    return trainable, frozen


@functools.cache
def compiled(config, devices, more_parts, _):
    """What `config` describes, its state and frozen parameters from `start`, and its step.

    The step takes the three settings of the run that `run_steps` says, then what every step takes.
    """
    run = build_run(config, devices, dict(more_parts))
    with jax.set_mesh(run.mesh):
        trainable, frozen = start(run)
        optimizer = optim.make_optimizer(trainable, config.steps, config.optimizer)
        state = train.place_state(trainable, optimizer, run.mesh)

    def step(settings, *arguments):
        own = types.SimpleNamespace(accumulation=config.accumulation, **settings)
        own.optimizer = types.SimpleNamespace(ema=settings["ema"])
        return train.make_train_step(run.model, run.objective, run.chosen, optimizer, own)(*arguments)

    return run, state, frozen, jax.jit(step)


def run_steps(config, devices=None, steps=2, batch=None, more_parts=None):
    """Metrics of each step, trained parameters, frozen parameters, from `start`.

    Runs that differ in seed, caption dropout or EMA alone are of one compiled program, and start the same.
    """
    settings = dict(seed=config.seed, caption_dropout=config.caption_dropout, ema=config.optimizer.ema)
    one = config.copy_and_resolve_references()
    one.update(seed=0, caption_dropout=0.0)
    one.optimizer.ema = 0.0
    parts = tuple((more_parts or {}).items())
    key = FrozenConfigDict(one), devices and tuple(devices), parts, parallel.MIN_SHARDED_SIZE
    run, state, frozen, step = compiled(*key)
    with jax.set_mesh(run.mesh):
        placed = parallel.put_batch(batch or make_batch(), run.mesh)
        history = []
        for _ in range(steps):
            state, metrics = step(settings, state, frozen, EMPTY, placed)
            history.append({name: float(value) for name, value in metrics.items()})
        return history, jax.device_get(state), frozen


@pytest.fixture(scope="module")
def begin():
    """(trainable, frozen) of `tiny` as a run has them at step 0."""
    return init(build_run(tiny(), jax.devices()[:1]))


@pytest.fixture
def small_parts(monkeypatch):
    """Small parameters are split over devices too."""
    monkeypatch.setattr(parallel, "MIN_SHARDED_SIZE", 64)


@pytest.fixture(scope="module")
def whole():
    return run_steps(tiny(), jax.devices()[:1])


def losses_of(metrics):
    return {name: value for name, value in metrics.items() if name.startswith("loss/")}


@pytest.mark.parametrize(
    "mesh",
    # (2, 2, 2) splits the parameters over fsdp too.
    [*(pytest.param(mesh, marks=pytest.mark.slow) for mesh in [(8, 1, 1), (1, 8, 1)]), (2, 2, 2), (1, 1, 8)],
    ids=lambda mesh: "x".join(map(str, mesh)),
)
def test_losses_and_parameters_are_equal_on_every_mesh(whole, mesh, small_parts):
    config = tiny(mesh=dict(zip(parallel.AXES, mesh, strict=True)))
    history, state, _ = run_steps(config)
    for got, expected in zip(history, whole[0], strict=True):
        assert losses_of(got).keys() == losses_of(expected).keys()
        for name, value in losses_of(expected).items():
            assert got[name] == pytest.approx(value, rel=1e-5), name
    # Adam turns rounding of a gradient near zero into a visible step; 1e-4 of a 1e-2 step remains.
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(whole[1].params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_fsdp_splits_the_trained_parameters(small_parts):
    trainable, frozen = init(build_run(tiny(mesh=dict(data=1, fsdp=8, context=1))))
    kernel = trainable["branch"]["blocks"]["ffn"]["up"]["kernel"]  # (2, 24, 32)
    assert kernel.addressable_shards[0].data.shape == (2, 24, 4)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(frozen))


def without_balance(reduction="mean"):
    """Changes that leave out the loss that is a product of means and is taken per microbatch."""
    return dict(
        reduction=dict(relative="sum", alignment=reduction), losses=dict(relative=0.1, alignment=0.02)
    )


@pytest.mark.parametrize("reduction", ["mean", pytest.param("sum", marks=pytest.mark.slow)])
def test_accumulation_is_exact(reduction):
    changes = without_balance(reduction)
    one, whole_state, _ = run_steps(tiny(**changes), jax.devices()[:1], steps=1)
    four, state, _ = run_steps(tiny(accumulation=4, **changes), jax.devices()[:1], steps=1)
    for name, value in losses_of(one[0]).items():
        assert four[0][name] == pytest.approx(value, rel=1e-5), name
    for name, value in one[0].items():
        if name.startswith("gradient/"):
            assert four[0][name] == pytest.approx(value, rel=1e-4), name  # norms of small sums
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(whole_state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_coarse_loss_is_of_the_whole_batch_however_it_is_split(whole, begin, small_parts):
    batch, model = make_batch(), build_run(tiny(), jax.devices()[:1]).model
    logits = model.parts["branch"].read(begin[0]["branch"], jax.tree.map(jnp.asarray, batch))
    expected = float(prophy.relative(logits, jnp.asarray(batch["category"])))
    assert expected > 0.1
    sharded, _, _ = run_steps(tiny(mesh=dict(data=8, fsdp=1, context=1)), steps=1)
    split, _, _ = run_steps(tiny(accumulation=4, **without_balance()), jax.devices()[:1], steps=1)
    for history in (whole[0], sharded, split):
        assert history[0]["loss/relative"] == pytest.approx(expected, rel=1e-5)


def test_frozen_parameters_do_not_move_and_have_no_optimizer_state(whole, begin):
    _, state, frozen = whole
    # Its head was moved by the test itself.
    before = {"backbone": {**begin[1]["backbone"], "head": frozen["backbone"]["head"]}}
    for a, b in zip(jax.tree.leaves(frozen), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)
    assert set(state.params) == {"branch"}
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert moments == 2 * trained


def test_every_part_of_the_branch_moves(whole, begin):
    start = begin[0]["branch"]
    for name, part in whole[1].params["branch"].items():
        moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), part, start[name])
        assert max(jax.tree.leaves(moved)) > 1e-4, name


def test_ema_by_hand():
    config = tiny()
    config.optimizer.ema = 0.75
    _, first, _ = run_steps(config, jax.devices()[:1], steps=1)
    _, second, _ = run_steps(config, jax.devices()[:1], steps=2)
    for ema1, ema2, params in zip(*map(jax.tree.leaves, (first.ema, second.ema, second.params)), strict=True):
        np.testing.assert_allclose(ema2, 0.75 * ema1 + 0.25 * params, atol=1e-6)


def test_a_step_depends_on_its_number_and_the_seed_alone(whole):
    again, _, _ = run_steps(tiny(), jax.devices()[:1])
    assert again == whole[0]
    other, _, _ = run_steps(tiny(seed=1), jax.devices()[:1], steps=1)
    assert other[0]["loss/diffusion"] != whole[0][0]["loss/diffusion"]
    assert whole[0][0]["loss/diffusion"] != whole[0][1]["loss/diffusion"]


def test_caption_dropout_replaces_text_and_mask_but_not_for_the_coarse_loss(whole):
    batch = {name: jnp.asarray(value) for name, value in make_batch().items()}
    empty = {"text": jnp.full((6, 8), 7.0), "text_mask": jnp.arange(6) < 1}
    objective = build.build_objective(tiny())
    key = jax.random.key(0)
    for share, rows in ((0.0, batch["text"]), (1.0, jnp.full((BATCH, 6, 8), 7.0))):
        drawn = train.draw_inputs(key, objective, batch, empty, share)
        np.testing.assert_array_equal(drawn["input_text"], rows)
        np.testing.assert_array_equal(drawn["text"], batch["text"])
    np.testing.assert_array_equal(drawn["input_text_mask"].sum(1), 1)
    half = train.draw_inputs(key, objective, batch, empty, 0.5)
    dropped = np.asarray((half["input_text"] == 7).all((1, 2)))
    assert 0 < dropped.sum() < BATCH
    all_dropped, _, _ = run_steps(tiny(caption_dropout=1.0), jax.devices()[:1], steps=1)
    assert all_dropped[0]["loss/relative"] == pytest.approx(whole[0][0]["loss/relative"], rel=1e-6)


SEMANTIC, REFINEMENT = {"semantic": {"relative"}}, {"refinement": {"alignment", "balance"}}
COPIES = {"blocks": set(), "exits": set()}
# Arm -> what its branch has, and the losses that come with it.
ARMS = {
    "lora": {},
    "finetune": {},
    "lora+seb": SEMANTIC,
    "lora+reb": {"exits": set(), **REFINEMENT},
    "pb": COPIES,
    "pb+seb": COPIES | SEMANTIC,
    "pb+reb": COPIES | REFINEMENT,
    "full": COPIES | SEMANTIC | REFINEMENT,
    "full+lora": COPIES | SEMANTIC | REFINEMENT,
    "bce": COPIES | REFINEMENT | {"semantic": {"bce"}},
    "absolute": COPIES | SEMANTIC | {"refinement": {"absolute_alignment"}},
}
# Their parts are in those of other arms.
LIKE_OTHERS = ("lora", "pb", "pb+seb", "pb+reb", "full", "bce")


@pytest.mark.parametrize(
    "arm", [pytest.param(arm, marks=pytest.mark.slow if arm in LIKE_OTHERS else ()) for arm in ARMS]
)
def test_arms_have_the_parts_and_losses_they_name(arm):
    config = get_config(f"tiny,{arm}")
    reference = tiny()
    config.backbone, config.batch_size = reference.backbone, BATCH
    if config.parts.get("branch", {}).get("semantic"):
        config.parts.branch.semantic.hidden = 8
    history, state, _ = run_steps(config, jax.devices()[:1], steps=1)
    assert set(state.params.get("branch", ())) == set(ARMS[arm])
    assert ("lora" in state.params) == ("lora" in arm)
    expected = set().union(*ARMS[arm].values())
    names = {name.removeprefix("loss/") for name in losses_of(history[0])}
    assert names == expected | {"diffusion", "total"}
    weights = {"diffusion": 1.0, **config.losses}
    total = sum(weights[name] * history[0][f"loss/{name}"] for name in expected | {"diffusion"})
    assert history[0]["loss/total"] == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("labels", ["none", "one category", "nothing positive"])
def test_edge_labels_stay_finite(labels):
    batch = make_batch()
    if labels == "none":
        for name in ("category", "alignment", "alignment_present"):
            batch[name][:] = 0
    elif labels == "one category":
        batch["category"][:] = np.eye(17)[3]
    else:
        batch["alignment"][:] = -1
    history, state, _ = run_steps(tiny(), jax.devices()[:1], batch=batch)
    assert all(np.isfinite(value) for metrics in history for value in metrics.values())
    assert state.bad_step == -1
    if labels != "one category":
        assert history[0]["loss/alignment"] == 0
    if labels == "none":
        assert history[0]["loss/relative"] == 0


def test_two_parts_train_next_to_each_other(whole):
    config, batch = tiny(), make_batch()
    config.optimizer.groups = (("bias/", 1e-2), *config.optimizer.groups)
    history, state, _ = run_steps(config, jax.devices()[:1], more_parts={"bias": Bias()})
    for name, value in losses_of(whole[0][0]).items():  # the bias starts at zero
        assert history[0][name] == pytest.approx(value, rel=1e-6), name
    assert min(history[0][f"gradient/{name}"] for name in ("bias/bias", "branch/exits", "branch/blocks")) > 0
    assert np.abs(state.params["bias"]["bias"]).max() > 1e-3
    assert history[1]["loss/diffusion"] != whole[0][1]["loss/diffusion"]
    categories = batch["category"].sum(-1).mean()
    assert history[0]["bias/categories"] == pytest.approx(categories, rel=1e-6)
    config.accumulation = 4
    split, _, _ = run_steps(config, jax.devices()[:1], steps=1, more_parts={"bias": Bias()})
    assert split[0]["bias/categories"] == pytest.approx(categories, rel=1e-6)
    assert split[0]["gradient/bias/bias"] == pytest.approx(history[0]["gradient/bias/bias"], rel=1e-2)


# Without accumulation the step is the loop's body alone.
@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_loss_that_reads_the_model_without_its_parts(monkeypatch, accumulation):
    """The distance from what the backbone alone predicts, which no gradient reaches though it is trained."""

    def share(seen, batch, count):
        assert seen.part is None and seen.of_part is None and not seen.reference.seen
        distance = jnp.square(seen.output.prediction - seen.reference.prediction)
        return len(distance) / count * distance.mean()

    monkeypatch.setitem(losses.TABLE, "distance", losses.Loss(share=share, reference=True))
    config = tiny(losses=dict(diffusion=0.0, distance=2.0))
    config.optimizer.groups = (("branch/", 1e-2), ("backbone/", 1e-2))
    run = build_run(config, jax.devices()[:1])
    assert run.chosen.reference and not build_run(tiny(), jax.devices()[:1]).chosen.reference
    trainable, _ = start(run)
    key, batch = jax.random.fold_in(jax.random.key(config.seed), 0), jax.tree.map(jnp.asarray, make_batch())
    drawn = train.draw_inputs(key, run.objective, batch, EMPTY, config.caption_dropout)
    noisy = run.objective.add_noise(drawn["latents"], drawn["noise"], drawn["time"])
    prompt = {"text": drawn["input_text"], "text_mask": drawn["input_text_mask"]}
    times = run.objective.model_time(drawn["time"])
    alone = jax.jit(run.model.backbone)(trainable["backbone"], noisy, times, prompt["text"])

    @jax.jit
    @jax.value_and_grad
    def by_hand(params):
        return jnp.square(run.model(params, noisy, times, prompt).prediction - alone).mean()

    value, gradient = by_hand(trainable)
    assert value > 1e-3
    config.accumulation = accumulation
    history, _, _ = run_steps(config, jax.devices()[:1], steps=1)
    assert history[0]["loss/distance"] == pytest.approx(float(value), rel=1e-4)
    assert history[0]["loss/total"] == pytest.approx(2 * float(value), rel=1e-4)
    for name, norm in optim.group_norms(gradient).items():
        assert history[0][f"gradient/{name}"] == pytest.approx(2 * float(norm), rel=1e-3, abs=1e-6), name


def test_random_choices_of_parts_are_their_own():
    """A part's key draws neither the noise of the step nor what another microbatch's draws."""
    keys = []

    class Random(Part):
        def leave(self, params, flow, outs):
            jax.debug.callback(lambda key: keys.append(key.tobytes()), jax.random.key_data(flow.key))
            return flow.stream, None

    run_steps(tiny(accumulation=4), jax.devices()[:1], more_parts={"random": Random()})
    jax.effects_barrier()
    steps = [jax.random.fold_in(jax.random.key(0), step) for step in range(2)]
    drawn = [key for step in steps for key in (step, *jax.random.split(step, 3))]
    assert len(set(keys)) == 8
    assert not set(keys) & {np.asarray(jax.random.key_data(key)).tobytes() for key in drawn}


def test_an_update_that_makes_nan_of_the_parameters_is_noticed():
    """The loss and its gradient are those of before the update."""
    config = tiny()
    config.optimizer.b1 = 1.0  # Adam divides by 1 - b1
    metrics, state, _ = run_steps(config, jax.devices()[:1], steps=1)
    assert np.isfinite(metrics[-1]["loss/total"]) and state.bad_step == 0


def test_first_bad_step_is_kept():
    batch = make_batch()
    batch["latents"][2, 0, 0, 0, 0] = np.nan
    _, state, _ = run_steps(tiny(), jax.devices()[:1], steps=3, batch=batch)
    assert state.bad_step == 0 and state.step == 3


def test_the_paper_run_fits_together_at_its_real_size():
    """configs/wan.py itself, by shapes: no weights, no data, no memory."""
    config = get_config("")
    config.batch_size, config.accumulation = 2, 1
    run = build_run(config, jax.devices()[:1])
    latent, text = (21, 60, 104, 16), (512, 4096)
    tokens = 21 * 30 * 52
    trainable, frozen = optim.split(run.layout, optim.groups_of(config.optimizer))
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    assert sum(leaf.size for leaf in jax.tree.leaves(frozen)) == 1_418_996_800
    optimizer = optim.make_optimizer(trainable, config.steps, config.optimizer)
    state = jax.eval_shape(lambda params: train.new_state(params, optimizer), trainable)

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    batch = {
        "latents": shape(2, *latent),
        "text": shape(2, *text),
        "text_mask": shape(2, 512, dtype=bool),
        "category": shape(2, 17),
        "alignment": shape(2, tokens, 17),
        "alignment_present": shape(2, 17),
    }
    empty = {"text": shape(*text), "text_mask": shape(512, dtype=bool)}
    step = train.make_train_step(run.model, run.objective, run.chosen, optimizer, config)
    after, metrics = jax.eval_shape(step, state, frozen, empty, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert {"loss/relative", "loss/alignment", "loss/balance", "loss/diffusion"} <= metrics.keys()


@pytest.mark.parametrize(
    ("losses", "key"),
    [
        (dict(alignment=0.1), "refinement.categories"),
        (dict(absolute_alignment=0.1), "refinement.categories"),
        (dict(bce=0.1), "semantic.experts"),
    ],
)
def test_parts_that_do_not_fit_the_data_are_refused_for_the_losses_that_compare_them(losses, key):
    config = tiny()
    config.losses = losses
    run = build_run(config)
    sizes = build.sizes(config, run.model)
    build.check_shapes(run.model, run.chosen, sizes)
    sizes = sizes._replace(categories=20)  # data made with another list of categories
    with pytest.raises(UserError, match=rf"{key}=17, the .* have 20"):
        build.check_shapes(run.model, run.chosen, sizes)
    config.losses = dict(relative=0.1, balance=0.1)  # which compare nothing with the categories of the data
    run = build_run(config)
    build.check_shapes(run.model, run.chosen, sizes)


def test_configurations_that_do_not_fit_together_are_refused():
    cases = [
        (dict(losses=dict(relative=0.1, typo=1.0)), "typo"),
        (dict(accumulation=3), "accumulation=3 microbatches: --config.accumulation=1 does"),
        (dict(accumulation=6), "--config.accumulation=2 does"),
        (dict(mesh=dict(data=3, fsdp=1, context=1)), "does not fit 8 devices"),
        (dict(mesh=dict(data=8, fsdp=1, context=1), accumulation=2), "does not divide"),
    ]
    for changes, word in cases:
        with pytest.raises(UserError, match=word):
            build_run(tiny(**changes))
    config = tiny()
    config.parts.branch.semantic = None
    with pytest.raises(UserError, match="branch.semantic is absent"):
        build_run(config)


def test_model_and_step_import_with_jax_flax_optax_numpy_alone():
    """GPU machines often lack the data and checkpoint packages; the step must not need them."""
    blocked = (
        "absl.flags", "grain", "orbax", "tensorflow_datasets", "ml_collections", "tqdm",
        "tensorboardX", "transformers", "torch", "av", "matplotlib", "PIL", "pymunk",
    )  # fmt: skip
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        # Flax and optax bring some of these themselves; only our own imports count.
        frame = sys._getframe(1)
        while frame and 'importlib' in frame.f_code.co_filename:
            frame = frame.f_back
        if name.startswith({blocked!r}) and 'prophy_jax' in frame.f_code.co_filename:
            raise ImportError('blocked ' + name)
sys.meta_path.insert(0, Block())
import prophy_jax.train, prophy_jax.losses, prophy_jax.models.beside.prophy, prophy_jax.models.wan
import prophy_jax.diffusion.flow, prophy_jax.diffusion.solvers
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
