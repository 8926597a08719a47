"""Trajectories equal those of diffusers' schedulers; so does the objective of CogVideoX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prophy_jax.diffusion import flow, solvers, v_prediction
from tests.late import late

torch = late("torch")
diffusers = late("diffusers")

# Raised by NumPy 2 inside diffusers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SETTINGS = [(1, 3.0), (2, 8.0), (3, 5.0), (5, 8.0), (20, 3.0), (50, 5.0), (100, 12.0)]
NOISE = np.random.RandomState(0).standard_normal((2, 3, 4)).astype(np.float32)

# Both sides round each float32 step, and diffusers takes logarithms of float32 sigmas: at most 1e-5
# on states of order 1 after 100 steps.
TOLERANCE = 1e-5


def velocity(x, t, tanh):
    return 1.2 * tanh(1.7 * x + 0.3) - 0.8 * x + 0.001 * t * x - 0.2


def reference_trajectory(scheduler):
    """All states (N,...) of a scheduler on which set_timesteps was called."""
    scheduler.set_begin_index(0)  # count steps: equal timesteps must not be looked up
    x, states = torch.from_numpy(NOISE), []
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, t.to(torch.float32), torch.tanh), t, x).prev_sample
        states.append(x.numpy())
    return np.stack(states)


def our_trajectory(table):
    state, states = solvers.start(table, NOISE), []
    for i in range(table.num_steps):
        row = jax.tree.map(lambda leaf, i=i: leaf[i], table.steps)
        state = solvers.step(row, state, lambda x, t: velocity(x, t, jnp.tanh))
        states.append(np.asarray(state.x))
    return np.stack(states)


def assert_same(table, scheduler):
    np.testing.assert_allclose(table.sigmas, scheduler.sigmas.numpy(), rtol=0, atol=6e-8)
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps.numpy(), rtol=1e-7)
    difference = np.abs(our_trajectory(table) - reference_trajectory(scheduler)).max()
    assert difference <= TOLERANCE


@pytest.mark.parametrize(("num_steps", "shift"), SETTINGS)
def test_unipc(num_steps, shift):
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(num_steps)
    assert_same(flow.unipc(num_steps, shift, grid="diffusers"), scheduler)


@pytest.mark.parametrize(("num_steps", "shift"), SETTINGS)
def test_unipc_update_on_the_official_grid(num_steps, shift):
    # diffusers no longer builds this grid, so its scheduler is given ours: this compares the
    # updates alone.
    table = flow.unipc(num_steps, shift)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(num_steps)
    scheduler.sigmas = torch.from_numpy(table.sigmas)
    scheduler.timesteps = torch.from_numpy(table.timesteps).to(torch.int64)
    assert_same(table, scheduler)


@pytest.mark.parametrize(("num_steps", "shift"), SETTINGS)
def test_dpmpp_update(num_steps, shift):
    # diffusers starts this solver at 0.999 before the shift, the Wan reference code at 1: the grid
    # is ours again.
    table = flow.dpmpp_2m(num_steps, shift)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(num_steps)
    scheduler.sigmas = torch.from_numpy(table.sigmas)
    scheduler.timesteps = torch.from_numpy(table.timesteps).to(torch.int64)
    assert_same(table, scheduler)


@pytest.mark.parametrize(("num_steps", "shift"), SETTINGS)
def test_euler(num_steps, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    assert_same(flow.euler(num_steps, shift, grid="diffusers"), scheduler)


# ---- CogVideoX -----------------------------------------------------------------------------------

# Steps that divide 1000 and steps that do not; 48 has timesteps halfway between two numbers.
COG_SETTINGS = [(n, s) for n in (1, 2, 7, 28, 30, 48, 50) for s in (1.0, 3.0)]


def cog_scheduler(kind, snr_shift):
    """As CogVideoX's own configuration has it; the defaults of the classes differ in every one of these."""
    return kind(
        **dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        **dict(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True),
        snr_shift_scale=snr_shift,
    )


def our_noisy_trajectory(table, noises):
    state, states = solvers.start(table, NOISE), []
    for i, noise in enumerate(noises):
        row = jax.tree.map(lambda leaf, i=i: leaf[i], table.steps)
        state = solvers.step(row, state, lambda x, t: velocity(x, t, jnp.tanh), noise)
        states.append(np.asarray(state.x))
    return np.stack(states)


@pytest.mark.parametrize(("num_steps", "snr_shift"), COG_SETTINGS)
def test_ddim(num_steps, snr_shift):
    scheduler = cog_scheduler(diffusers.CogVideoXDDIMScheduler, snr_shift)
    scheduler.set_timesteps(num_steps)
    table = v_prediction.ddim(num_steps, snr_shift)
    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy())
    x, states = torch.from_numpy(NOISE), []
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, t.to(torch.float32), torch.tanh), t, x).prev_sample
        states.append(x.numpy())
    assert np.abs(our_trajectory(table) - np.stack(states)).max() <= TOLERANCE


@pytest.mark.parametrize(("num_steps", "snr_shift"), COG_SETTINGS)
def test_cogvideox_dpm(num_steps, snr_shift, monkeypatch):
    from diffusers.schedulers import scheduling_dpm_cogvideox

    noises = np.random.RandomState(1).standard_normal((num_steps, *NOISE.shape)).astype(np.float32)
    scheduler = cog_scheduler(diffusers.CogVideoXDPMScheduler, snr_shift)
    scheduler.set_timesteps(num_steps)
    table = v_prediction.cogvideox_dpm(num_steps, snr_shift)
    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy())
    x, data, states, back = torch.from_numpy(NOISE), None, [], None
    for t, noise in zip(scheduler.timesteps, noises, strict=True):
        # It draws once or twice in a step; every draw of a step is made the same.
        monkeypatch.setattr(
            scheduling_dpm_cogvideox, "randn_tensor", lambda *_, noise=noise, **__: torch.from_numpy(noise)
        )
        v = velocity(x, t.to(torch.float32), torch.tanh)
        x, data = scheduler.step(v, data, t, back, x)
        back = t
        states.append(x.to(torch.float32).numpy())
    assert np.abs(our_noisy_trajectory(table, noises) - np.stack(states)).max() <= TOLERANCE


@pytest.mark.parametrize("snr_shift", [1.0, 3.0])
def test_objective(snr_shift):
    scheduler = cog_scheduler(diffusers.CogVideoXDPMScheduler, snr_shift)
    family = v_prediction.VPrediction(snr_shift)
    squared = v_prediction.signal(snr_shift)
    np.testing.assert_allclose(squared, scheduler.alphas_cumprod.numpy(), rtol=0, atol=1e-14)  # float64
    timesteps = np.array([0, 1, 5, 56, 499, 998, 999])
    x0, noise = np.random.RandomState(2).standard_normal((2, 7, 3, 4, 5)).astype(np.float32)
    time = jnp.float32(v_prediction.noise_share(squared)[timesteps])
    np.testing.assert_array_equal(family.model_time(time), timesteps)
    arguments = torch.from_numpy(x0), torch.from_numpy(noise), torch.from_numpy(timesteps)
    # float32 rounding of values up to 4; diffusers takes 1 - alpha^2 in float32, which moves the smallest
    # sigma, 0.03, by up to 1e-6.
    x, v = family.add_noise(x0, noise, time), family.target(x0, noise, time)
    np.testing.assert_allclose(x, scheduler.add_noise(*arguments).numpy(), rtol=0, atol=5e-6)
    np.testing.assert_allclose(v, scheduler.get_velocity(*arguments).numpy(), rtol=0, atol=5e-6)
    guess = scheduler.get_velocity(torch.from_numpy(noise), torch.from_numpy(np.array(x)), arguments[2])
    predicted = family.predicted_data(x, jnp.float32(noise), time)
    np.testing.assert_allclose(predicted, guess.numpy(), rtol=0, atol=5e-6)
