"""Trajectories equal those of diffusers' schedulers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prophy_jax.diffusion import solvers

_REASON = "parity tests need the test extra on Python 3.11"
torch = pytest.importorskip("torch", reason=_REASON)
diffusers = pytest.importorskip("diffusers", reason=_REASON)

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
    state, states = solvers.start(NOISE), []
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
    assert_same(solvers.unipc(num_steps, shift, grid="diffusers"), scheduler)


@pytest.mark.parametrize(("num_steps", "shift"), SETTINGS)
def test_unipc_update_on_the_official_grid(num_steps, shift):
    # diffusers no longer builds this grid, so its scheduler is given ours: this compares the
    # updates alone.
    table = solvers.unipc(num_steps, shift)
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
    table = solvers.dpmpp_2m(num_steps, shift)
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
    assert_same(solvers.euler(num_steps, shift, grid="diffusers"), scheduler)
