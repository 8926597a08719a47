"""Flow matching: the path, its target, the draw of noise levels and the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prophy_jax.diffusion import flow
from prophy_jax.run.errors import UserError

SHAPE = (3, 2, 4, 4, 16)  # (B,T,h,w,c)


@pytest.fixture
def pair():
    key_data, key_noise = jax.random.split(jax.random.key(0))
    return jax.random.normal(key_data, SHAPE), jax.random.normal(key_noise, SHAPE)


def test_shift_map_keeps_the_ends_and_has_its_closed_form_inverse():
    sigma = np.linspace(0, 1, 11)
    shifted = flow.shift_sigma(sigma, 8.0)
    assert shifted[0] == 0 and shifted[-1] == 1
    # The map with 1/s undoes the map with s; 1e-12 is float64 rounding.
    np.testing.assert_allclose(flow.shift_sigma(shifted, 1 / 8), sigma, atol=1e-12)
    assert flow.shift_sigma(0.5, 3.0) == 0.75


def test_path_target_and_predicted_data_agree(pair):
    x0, noise = pair
    family = flow.FlowMatching()
    time = jnp.array([0.0, 0.25, 1.0])
    x = family.add_noise(x0, noise, time)
    np.testing.assert_array_equal(x[0], x0[0])
    np.testing.assert_array_equal(x[2], noise[2])
    np.testing.assert_allclose(x[1], 0.75 * x0[1] + 0.25 * noise[1], atol=1e-6)  # float32 rounding
    v = family.target(x0, noise, time)
    # The target is the derivative of the path in sigma: exact for a straight line, up to float32
    # rounding / 0.5.
    ahead, behind = (family.add_noise(x0, noise, jnp.full(3, s)) for s in (0.75, 0.25))
    np.testing.assert_allclose(v, (ahead - behind) / 0.5, atol=4e-6)
    np.testing.assert_allclose(family.predicted_data(x, v, time), x0, atol=2e-6)


def test_model_time_is_a_thousand_sigma():
    time = flow.FlowMatching().model_time(jnp.array([0.0, 0.5, 1.0]))
    np.testing.assert_array_equal(time, [0.0, 500.0, 1000.0])


def test_loss_is_per_sample_and_float32(pair):
    x0, noise = pair
    family, time = flow.FlowMatching(), jnp.full(3, 0.5)
    offset = jnp.array([0.0, 1.0, 2.0]).reshape(3, 1, 1, 1, 1)
    loss = family.per_sample_loss(noise - x0 + offset, x0, noise, time)
    np.testing.assert_allclose(loss, [0.0, 1.0, 4.0], atol=1e-5)  # float32 rounding
    half = family.per_sample_loss((noise - x0).astype(jnp.bfloat16), x0, noise, time)
    assert loss.shape == (3,) and half.dtype == jnp.float32


@pytest.mark.parametrize(
    ("distribution", "shift", "mean_sigma", "above"),
    # Mean of sigma and P(sigma > 0.9). For the uniform draw in closed form:
    # mean s/(s-1) - s ln s/(s-1)^2, tail 1 - u with u = 0.9/(s - 0.9 (s-1)).
    # For the logit-normal one the tail is a normal tail at ln 9 - ln s and the mean at s=1 is 1/2.
    [("uniform", 1.0, 0.5, 0.1), ("uniform", 3.0, 0.676, 0.25), ("uniform", 8.0, 0.803, 0.471)]
    + [("logit_normal", 1.0, 0.5, 0.014), ("logit_normal", 3.0, None, 0.136)],
)
def test_distribution_of_sigma(distribution, shift, mean_sigma, above):
    family = flow.FlowMatching(distribution, shift)
    sigma = np.asarray(family.sample_time(jax.random.key(1), 100_000))
    # Four standard errors of 1e5 draws: 4 * 0.5 / sqrt(1e5) = 6e-3 at most.
    assert abs(np.mean(sigma > 0.9) - above) < 6e-3
    if mean_sigma is not None:
        assert abs(sigma.mean() - mean_sigma) < 6e-3


def test_logit_normal_follows_mean_and_std():
    sigma = flow.FlowMatching("logit_normal", 1.0, mean=-0.5, std=0.7).sample_time(jax.random.key(2), 100_000)
    logit = np.log(sigma) - np.log1p(-sigma)
    # Four standard errors: 4 * 0.7 / sqrt(1e5) = 9e-3.
    assert abs(logit.mean() + 0.5) < 9e-3 and abs(logit.std() - 0.7) < 9e-3


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_sigma_never_reaches_the_ends(distribution):
    # A spread of 100 saturates the float32 sigmoid at both ends; a shift of 1e6 rounds sigma to 1.
    for shift in (1e-6, 1e6):
        family = flow.FlowMatching(distribution, shift, std=100.0)
        sigma = np.asarray(family.sample_time(jax.random.key(3), 10_000))
        assert sigma.dtype == np.float32 and sigma.min() > 0 and sigma.max() < 1


def test_same_key_same_draw_and_it_traces():
    family = flow.FlowMatching("logit_normal", 5.0)
    draw = jax.jit(family.sample_time, static_argnums=1)
    np.testing.assert_array_equal(draw(jax.random.key(4), 5), draw(jax.random.key(4), 5))
    assert not np.array_equal(draw(jax.random.key(4), 5), draw(jax.random.key(5), 5))


@pytest.mark.parametrize("bad", [{"distribution": "cosine"}, {"shift": 0.0}, {"std": -1.0}])
def test_bad_settings_are_the_users_error(bad):
    with pytest.raises(UserError, match=str(list(bad.values())[0])):
        flow.FlowMatching(**bad)
