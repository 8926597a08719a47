"""Each physical loss and its gradient: by hand, against float64 NumPy, and at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prophy_jax import build, losses
from prophy_jax.losses import prophy
from prophy_jax.models.beside.prophy import router_statistics
from tests.conftest import get_config

# fp32 sums of a few hundred products, compared with float64.
TOLERANCE = dict(rtol=2e-5, atol=2e-6)


def softmax64(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cosine64(v):
    norm = np.linalg.norm(v, axis=-1, keepdims=True)
    unit = np.divide(v, norm, out=np.zeros_like(v), where=norm > 0)
    return unit @ unit.T


def relative64(logits, category):
    difference = (cosine64(softmax64(logits)) - cosine64(category)) ** 2
    labelled = category.sum(-1) > 0
    return sum(
        difference[i, j]
        for i in range(len(category))
        for j in range(i + 1, len(category))
        if labelled[i] and labelled[j]
    )


def alignment64(predicted, target, present, count):
    total = 0.0
    for b, n, e in np.ndindex(target.shape):
        if present[b, e] and target[b, n, e] > 0:
            total += (predicted[b, n, e] - target[b, n, e]) ** 2
    return total / max(count, 1)


def balance64(rho, k):
    experts = rho.shape[-1]
    f, flat = np.zeros(experts), rho.reshape(-1, experts)
    for row in flat:
        f[np.argsort(-row, kind="stable")[:k]] += 1
    return experts * (f / (len(flat) * k) * flat.mean(0)).sum()


def numerical_gradient(function, x, step=1e-6):
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


@pytest.mark.parametrize(
    ("clips", "zero", "idle"),
    [
        (2, set(), set()),
        (1, set(), {"relative"}),
        (2, {"category"}, {"relative", "bce"}),
        (2, {"alignment"}, {"alignment"}),
        (2, {"alignment", "alignment_present"}, {"alignment", "absolute_alignment"}),
    ],
)
def test_a_loss_says_when_it_can_only_be_0(clips, zero, idle):
    rows, model = {**losses.TABLE}, build.build_model(get_config("tiny"))
    chosen = losses.Chosen(rows, dict.fromkeys(rows, 1.0), {}, dict.fromkeys(rows, "branch"))
    reasons = chosen.idle(model, clips, zero)
    assert reasons.keys() == idle
    assert all("nothing teaches" in reason and "\n" not in reason for reason in reasons.values())
    assert all(reason.startswith("can only be 0: ") for reason in reasons.values())
    unweighted = losses.Chosen(rows, dict.fromkeys(rows, 0.0), {}, dict.fromkeys(rows, "branch"))
    assert not unweighted.idle(model, clips, zero)


def test_balance_says_that_it_is_constant_when_every_expert_is_chosen():
    config = get_config("tiny")
    config.losses = dict(balance=0.01)
    for top_k, idle in ((7, set()), (8, {"balance"})):
        config.parts.branch.refinement.top_k = top_k
        model = build.build_model(config)
        reasons = build.build_losses(config, model).idle(model, 4, set())
        assert reasons.keys() == idle
    assert reasons["balance"].startswith("is always 1: every token takes all 8 refinement experts")


# --- By hand ---------------------------------------------------------------------------------------


def test_relative_by_hand():
    # rho = (1/2, 1/2) and (3/4, 1/4): cosine (3/8 + 1/8) / (sqrt(1/2) sqrt(10/16)) = 2 / sqrt(5).
    logits = jnp.log(jnp.array([[0.5, 0.5], [0.75, 0.25]]))
    category = jnp.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])  # cosine 1 / sqrt(2)
    expected = (2 / np.sqrt(5) - 1 / np.sqrt(2)) ** 2
    np.testing.assert_allclose(prophy.relative(logits, category), expected, rtol=1e-5)


def test_alignment_by_hand():
    predicted = jnp.array([[[0.5, 0.9], [0.1, 0.2]]])
    target = jnp.array([[[1.0, 1.0], [-0.3, 0.5]]])
    present = jnp.array([[1.0, 0.0]])
    mask = prophy.alignment_mask(target, present)
    np.testing.assert_array_equal(mask, [[[True, False], [False, False]]])
    np.testing.assert_allclose(prophy.alignment(predicted, target, mask, mask.sum()), 0.25)
    gradient = jax.grad(prophy.alignment)(predicted, target, mask, 1.0)
    np.testing.assert_allclose(gradient, [[[2 * (0.5 - 1.0), 0], [0, 0]]], rtol=1e-6)
    everywhere = prophy.alignment_mask(target, present, positive=False)
    np.testing.assert_array_equal(everywhere, [[[True, False], [True, False]]])
    np.testing.assert_allclose(
        prophy.alignment(predicted, target, everywhere, 2.0), (0.25 + 0.16) / 2, rtol=1e-6
    )


def test_balance_by_hand():
    # Two tokens, both choose expert 0: f = (1, 0), p = (0.75, 0.25), E f.p = 1.5.
    rho = jnp.array([[[0.9, 0.1], [0.6, 0.4]]])
    np.testing.assert_allclose(prophy.balance(rho, 1), 1.5, rtol=1e-6)
    np.testing.assert_allclose(prophy.balance(rho, 2), 1.0, rtol=1e-6)  # all chosen: even load
    # dL/d rho = E f / tokens: only the loaded expert is pushed down.
    gradient = jax.grad(prophy.balance)(rho, 1)
    np.testing.assert_allclose(gradient, [[[1.0, 0.0], [1.0, 0.0]]], rtol=1e-6)


def test_bce_by_hand():
    logits, category = jnp.zeros((1, 17)), jnp.zeros((1, 17)).at[0, 3].set(1.0)
    np.testing.assert_allclose(prophy.bce(logits, category), np.log(2), rtol=1e-6)
    gradient = jax.grad(prophy.bce)(logits, category)
    np.testing.assert_allclose(gradient[0, 3], -0.5 / 17, rtol=1e-6)
    np.testing.assert_allclose(gradient[0, 4], 0.5 / 17, rtol=1e-6)


# --- Against float64, value and gradient -----------------------------------------------------------


@pytest.mark.parametrize("batch", [2, 3, 7])
def test_relative_against_float64(batch):
    rng = np.random.default_rng(batch)
    logits = rng.normal(size=(batch, 17))
    category = (rng.random((batch, 17)) < 0.2).astype(np.float64)
    category[0] = 0  # one clip without labels
    value, gradient = jax.value_and_grad(prophy.relative)(jnp.float32(logits), jnp.float32(category))
    np.testing.assert_allclose(value, relative64(logits, category), **TOLERANCE)
    expected = numerical_gradient(lambda x: relative64(x, category), logits)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=2e-6)  # fp32, many cancelling terms


def test_alignment_against_float64():
    rng = np.random.default_rng(0)
    predicted, target = rng.normal(size=(2, 2, 5, 17))
    present = (rng.random((2, 17)) < 0.4).astype(np.float64)
    mask = prophy.alignment_mask(jnp.float32(target), jnp.float32(present))
    count = float(mask.sum())
    value, gradient = jax.value_and_grad(prophy.alignment)(
        jnp.float32(predicted), jnp.float32(target), mask, count
    )
    np.testing.assert_allclose(value, alignment64(predicted, target, present, count), **TOLERANCE)
    expected = numerical_gradient(lambda x: alignment64(x, target, present, count), predicted)
    np.testing.assert_allclose(gradient, expected, **TOLERANCE)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_balance_against_float64(k):
    rho = softmax64(np.random.default_rng(k).normal(size=(2, 9, 8)))
    value, gradient = jax.value_and_grad(prophy.balance)(jnp.float32(rho), k)
    np.testing.assert_allclose(value, balance64(rho, k), **TOLERANCE)
    # The choices do not move under so small a step, so the difference quotient sees p_e alone.
    expected = numerical_gradient(lambda x: balance64(x, k), rho)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


# --- Edges -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "category",
    [
        np.eye(17)[:1],  # batch 1: no pair
        np.zeros((3, 17)),  # no labels at all
        np.vstack([np.eye(17)[:1], np.zeros((1, 17))]),  # one labelled clip: no pair
    ],
)
def test_relative_without_pairs_is_zero_with_zero_gradient(category):
    logits = jnp.float32(np.random.default_rng(0).normal(size=(len(category), 17)))
    value, gradient = jax.value_and_grad(prophy.relative)(logits, jnp.float32(category))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_relative_one_category_pulls_routers_together():
    logits = jnp.float32(np.random.default_rng(0).normal(size=(2, 17)))
    category = jnp.ones((2, 1)) * jnp.eye(17)[4]
    value, gradient = jax.value_and_grad(prophy.relative)(logits, category)
    cosine = cosine64(softmax64(np.float64(logits)))[0, 1]
    np.testing.assert_allclose(value, (cosine - 1) ** 2, rtol=1e-4)
    assert prophy.relative(logits - gradient, category) < value


def test_relative_reduction_mean_divides_by_the_pairs():
    logits = jnp.float32(np.random.default_rng(0).normal(size=(4, 17)))
    category = jnp.eye(17)[:4].at[3].set(0)  # 3 labelled clips: 3 pairs
    np.testing.assert_allclose(
        prophy.relative(logits, category, "mean"), prophy.relative(logits, category) / 3, rtol=1e-6
    )


def test_alignment_of_an_empty_mask_is_zero_with_zero_gradient():
    predicted = jnp.ones((2, 4, 17))
    for target, present in [
        (jnp.ones((2, 4, 17)), jnp.zeros((2, 17))),  # no labels
        (-jnp.ones((2, 4, 17)), jnp.ones((2, 17))),  # labels, nothing significant
    ]:
        mask = prophy.alignment_mask(target, present)
        value, gradient = jax.value_and_grad(prophy.alignment)(predicted, target, mask, mask.sum())
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)


def test_extreme_logits_stay_finite():
    logits = jnp.array([[1e4] + [-1e4] * 16, [-1e4] * 16 + [1e4]])
    category = jnp.eye(17)[:2]
    for loss in (prophy.relative, prophy.bce):
        value, gradient = jax.value_and_grad(loss)(logits, category)
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_router_statistics_at_their_ends():
    even, collapsed = jnp.full((6, 8), 1 / 8), jnp.eye(8)[jnp.zeros(6, int)]
    spread = jnp.eye(8)  # every decision sure, each expert once
    for rho, entropy, mean_entropy, first_load in [
        (even, 1, 1, 1 / 8),
        (collapsed, 0, 0, 1),
        (spread, 0, 1, 1 / 8),
    ]:
        values = router_statistics("r", rho)
        got = [values["r/entropy"], values["r/mean_entropy"], values["r/load_0"]]
        np.testing.assert_allclose(got, [entropy, mean_entropy, first_load], atol=1e-6)
        assert sum(values[f"r/load_{e}"] for e in range(8)) == pytest.approx(1)
    top_2 = router_statistics("r", jnp.array([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3]]), 2)
    np.testing.assert_allclose([top_2[f"r/load_{e}"] for e in range(3)], [0.5, 0.25, 0.25])
