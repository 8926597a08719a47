"""V-prediction: the schedule, the path, its target, times and timesteps, and the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prophy_jax import train
from prophy_jax.diffusion import flow, v_prediction
from prophy_jax.run.errors import UserError

SHAPE = (3, 2, 4, 4, 16)  # (B,T,h,w,c)
TIMESTEPS = (0, 1, 19, 39, 99, 199, 499, 799, 979, 999)
GOLDEN = {  # alpha^2 at TIMESTEPS
    1.0: (0.9991500000, 0.9982334461, 0.9810104569, 0.9602639405, 0.8880858948)
    + (0.7387001074, 0.2423591666, 0.0178831639, 8.57878e-5, 0.0),
    3.0: (0.9974543276, 0.9948006264, 0.9465729792, 0.8923313385, 0.7308668668)
    + (0.4903731065, 0.0959695617, 0.0058210755, 2.71944e-5, 0.0),
}


@pytest.fixture
def pair():
    key_data, key_noise = jax.random.split(jax.random.key(0))
    return jax.random.normal(key_data, SHAPE), jax.random.normal(key_noise, SHAPE)


def times(family, *timesteps):
    """(B,) float32, as `sample_time` gives them for these timesteps."""
    share = v_prediction.noise_share(v_prediction.signal(family.snr_shift))
    return jnp.float32(share[list(timesteps)])


@pytest.mark.parametrize("snr_shift", GOLDEN)
def test_schedule(snr_shift):
    squared = v_prediction.signal(snr_shift)
    assert squared.shape == (1000,) and squared.dtype == np.float64
    assert np.all(np.diff(squared) < 0) and squared[-1] == 0.0
    # Ten decimals were recorded.
    np.testing.assert_allclose(squared[list(TIMESTEPS)], GOLDEN[snr_shift], rtol=0, atol=6e-11)


def test_the_shift_divides_the_signal_to_noise_ratio():
    # Where the schedule starts the scaling changes nothing. Float64 rounding of 1 - alpha^2 = 8.5e-4.
    ratio = [a / (1 - a) for a in (v_prediction.signal(s)[0] for s in (1.0, 3.0, 0.5))]
    np.testing.assert_allclose(ratio, [ratio[0], ratio[0] / 3, ratio[0] / 0.5], rtol=1e-12)


@pytest.mark.parametrize("snr_shift", GOLDEN)
def test_path_target_and_predicted_data_agree(pair, snr_shift):
    x0, noise = pair
    family = v_prediction.build(snr_shift=snr_shift)
    time = times(family, 39, 499, 999)
    x, v = family.add_noise(x0, noise, time), family.target(x0, noise, time)
    squared = np.float64(GOLDEN[snr_shift])[[3, 6, 9]].reshape(3, 1, 1, 1, 1)
    alpha, sigma = np.sqrt(squared), np.sqrt(1 - squared)
    # float32 rounding of values up to 5
    np.testing.assert_allclose(x, alpha * x0 + sigma * noise, atol=1e-6)
    np.testing.assert_allclose(v, alpha * noise - sigma * x0, atol=1e-6)
    np.testing.assert_allclose(family.predicted_data(x, v, time), x0, atol=2e-6)
    np.testing.assert_array_equal(x[2], noise[2])  # no signal is left at the last timestep
    np.testing.assert_array_equal(v[2], -x0[2])


@pytest.mark.parametrize("snr_shift", [0.1, 1.0, 3.0, 30.0])
def test_every_timestep_is_its_own_nearest(snr_shift):
    family = v_prediction.VPrediction(snr_shift)
    timestep = jax.jit(family.model_time)(times(family, *range(1000)))
    assert timestep.dtype == jnp.float32
    np.testing.assert_array_equal(timestep, np.arange(1000))


@pytest.mark.parametrize(
    ("snr_shift", "expected"), [(1.0, [0, 56, 337, 693, 999]), (3.0, [0, 21, 195, 568, 999])]
)
def test_a_time_means_as_noisy_an_input_as_in_flow_matching(pair, snr_shift, expected):
    x0, noise = pair
    family, time = v_prediction.VPrediction(snr_shift), jnp.array([0.0, 0.2, 0.5, 0.8, 1.0])
    np.testing.assert_array_equal(family.model_time(time), expected)
    x = family.add_noise(x0, noise, time[1:4])
    # Inputs of the two families differ by a factor, alpha + sigma, and by how near the next level is: half
    # the largest distance of two levels near the times, 3.8e-3.
    squared = v_prediction.signal(snr_shift)[expected[1:4]].reshape(3, 1, 1, 1, 1)
    scaled = x / (np.sqrt(squared) + np.sqrt(1 - squared))
    straight = flow.FlowMatching().add_noise(x0, noise, time[1:4])
    np.testing.assert_allclose(scaled, straight, rtol=0, atol=2e-3 * float(jnp.abs(noise - x0).max()))


@pytest.mark.parametrize("snr_shift", GOLDEN)
def test_timesteps_are_drawn_uniformly(snr_shift):
    family = v_prediction.VPrediction(snr_shift)
    draw = jax.jit(lambda key: family.model_time(family.sample_time(key, 100_000)))
    timestep = np.asarray(draw(jax.random.key(1)))
    assert timestep.min() == 0 and timestep.max() == 999
    np.testing.assert_array_equal(timestep, np.round(timestep))
    share, _ = np.histogram(timestep, bins=10, range=(0, 1000))
    # Four standard errors of 1e5 draws: 4 sqrt(0.1 0.9 / 1e5).
    np.testing.assert_allclose(share / 100_000, 0.1, atol=3.8e-3)
    np.testing.assert_array_equal(timestep, draw(jax.random.key(1)))
    assert not np.array_equal(timestep, draw(jax.random.key(2)))


def test_loss_equals_the_weighted_error_of_the_predicted_data_by_hand():
    # One number: x0 = 2, noise = -1, and the network says v = 0.5.
    for snr_shift, t in ((1.0, 499), (3.0, 39)):
        squared = GOLDEN[snr_shift][TIMESTEPS.index(t)]
        alpha, sigma = squared**0.5, (1 - squared) ** 0.5
        x = alpha * 2.0 - sigma * 1.0
        weighted = (alpha * x - sigma * 0.5 - 2.0) ** 2 / (1 - squared)
        family = v_prediction.VPrediction(snr_shift)
        x0, noise, velocity = (jnp.full((1, 1), value) for value in (2.0, -1.0, 0.5))
        loss = family.per_sample_loss(velocity, x0, noise, times(family, t))
        np.testing.assert_allclose(loss, [weighted], rtol=1e-6)  # float32 rounding


@pytest.mark.parametrize("snr_shift", GOLDEN)
def test_loss_equals_the_weighted_error_of_the_predicted_data(pair, snr_shift):
    x0, noise = pair
    family = v_prediction.VPrediction(snr_shift)
    prediction = jax.random.normal(jax.random.key(2), SHAPE)
    time = times(family, 0, 199, 999)
    loss = family.per_sample_loss(prediction, x0, noise, time)
    guess = np.float64(family.predicted_data(family.add_noise(x0, noise, time), prediction, time))
    weight = 1 / (1 - np.float64(GOLDEN[snr_shift])[[0, 5, 9]])
    assert weight[0] > 300  # it multiplies the rounding of x and of the prediction's share in it
    weighted = weight * np.mean((guess - x0) ** 2, axis=(1, 2, 3, 4))
    np.testing.assert_allclose(loss, weighted, rtol=3e-5)


def test_loss_is_per_sample_and_float32(pair):
    x0, noise = pair
    family = v_prediction.VPrediction(3.0)
    time = times(family, 5, 499, 999)
    offset = jnp.array([0.0, 1.0, 2.0]).reshape(3, 1, 1, 1, 1)
    v = family.target(x0, noise, time)
    loss = family.per_sample_loss(v + offset, x0, noise, time)
    np.testing.assert_allclose(loss, [0.0, 1.0, 4.0], atol=1e-5)  # float32 rounding
    half = family.per_sample_loss(v.astype(jnp.bfloat16), x0, noise, time)
    assert loss.shape == (3,) and half.dtype == jnp.float32


def test_half_precision_latents_are_noised_in_float32(pair):
    x0, noise = (value.astype(jnp.bfloat16) for value in pair)
    family = v_prediction.VPrediction(1.0)
    time = times(family, 0, 5, 10)
    x, v = family.add_noise(x0, noise, time), family.target(x0, noise, time)
    assert x.dtype == v.dtype == family.predicted_data(x0, noise, time).dtype == jnp.float32
    # In bfloat16 the three amplitudes would be 0, 0.0625 and 0.1084.
    squared = v_prediction.signal(1.0)[[0, 5, 10]].reshape(3, 1, 1, 1, 1)
    np.testing.assert_allclose(np.sqrt(1 - squared).ravel(), [0.0292, 0.0740, 0.1010], atol=5e-5)
    expected = np.sqrt(squared) * np.float64(x0) + np.sqrt(1 - squared) * np.float64(noise)
    np.testing.assert_allclose(x, expected, atol=1e-6)  # float32 rounding
    np.testing.assert_allclose(family.predicted_data(x, v, time), np.float32(x0), atol=2e-6)


def test_what_a_train_step_draws():
    batch = {
        "latents": jnp.zeros((64, 1, 2, 2, 4)),
        "text": jnp.ones((64, 3, 2)),
        "text_mask": jnp.ones((64, 3)),
    }
    empty = {"text": jnp.zeros((3, 2)), "text_mask": jnp.zeros(3)}
    family = v_prediction.VPrediction(3.0)
    drawn = train.draw_inputs(jax.random.key(0), family, batch, empty, 0.0)
    timestep = family.model_time(drawn["time"])
    assert drawn["time"].shape == (64,) and len(np.unique(timestep)) > 50
    np.testing.assert_array_equal(times(family, *np.int64(timestep)), drawn["time"])  # none is rounded


@pytest.mark.parametrize("snr_shift", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_settings_are_the_users_error(snr_shift):
    with pytest.raises(UserError, match="shift"):
        v_prediction.build(snr_shift=snr_shift)
