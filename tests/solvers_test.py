"""Solvers against golden schedules, golden coefficients and golden end points of a toy equation."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prophy_jax.diffusion import flow, guided, solvers, v_prediction
from prophy_jax.run.errors import UserError

NAMES = ("unipc", "unipc-diffusers", "dpm++", "euler", "euler-diffusers")
V_NAMES = ("ddim", "cogvideox-dpm")  # of v-prediction, on the grid of diffusers
SAT_NAMES = ("ddim-sat", "cogvideox-dpm-sat")  # on that of the reference code
START = np.array([1.0, -0.5, 2.0], np.float32)


def choose(name, num_steps, shift):
    """The solver of the family that has it, as a configuration names it."""
    if name in V_NAMES + SAT_NAMES:
        return v_prediction.VPrediction(shift).solver(name, num_steps)
    return flow.FlowMatching().solver(name, num_steps, shift)


def sample(table, velocity, noise):
    """From noise to data in one loop, with at most one network call per step."""
    return solvers.advance(table, velocity, solvers.start(table, noise), 0, table.num_steps).x


def toy_velocity(x, t):
    return 1.2 * jnp.tanh(1.7 * x + 0.3) - 0.8 * x + 0.001 * t * x - 0.2


# ---- schedules -----------------------------------------------------------------------------------

# 50 integer timesteps as the reference schedulers print them.
TIMESTEPS = {
    ("unipc", 3.0): """999 992 985 978 971 963 956 948 939 931 922 913 904 894 884 874 864 853 841
        829 817 805 792 778 764 749 734 718 701 684 666 647 627 606 585 562 538 512 486 458 428 396
        363 327 290 249 206 160 111 57""",
    ("unipc-diffusers", 3.0): """999 993 986 979 971 964 956 948 940 931 923 914 904 895 885 875 864
        853 842 830 818 805 792 779 765 750 735 719 702 685 667 648 628 607 586 563 539 514 487 459
        429 398 365 329 292 251 208 162 113 60""",
    ("unipc", 5.0): """999 995 991 987 982 978 973 968 963 957 952 946 940 934 927 920 913 906 898
        890 882 873 863 854 843 833 821 809 796 783 768 753 737 720 701 681 660 636 611 584 555 522
        487 448 405 356 302 241 172 92""",
    ("unipc", 8.0): """999 997 994 991 989 986 983 979 976 973 969 965 961 957 953 948 944 939 934
        928 922 916 910 903 896 888 880 871 862 852 841 830 817 804 789 773 756 737 716 692 666 636
        603 565 521 470 409 337 249 140""",
    ("unipc-diffusers", 8.0): """999 997 994 992 989 986 983 980 976 973 969 965 962 957 953 949 944
        939 934 928 923 917 910 903 896 889 880 872 863 853 842 830 818 805 790 774 757 738 717 693
        667 638 605 567 523 473 413 341 254 146""",
}


@pytest.mark.parametrize(("name", "shift"), TIMESTEPS)
def test_integer_timesteps(name, shift):
    golden = [int(t) for t in TIMESTEPS[name, shift].split()]
    assert len(golden) == 50
    np.testing.assert_array_equal(choose(name, 50, shift).timesteps, golden)


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("unipc", 0.99987489, 0.14022775),
        ("unipc-diffusers", 0.99999899, 0.14634742),
        ("dpm++", 1.0, 0.14035088),
        ("euler", 1.0, 0.14035088),
        ("euler-diffusers", 1.0, 0.06020697),
    ],
)
def test_first_and_last_sigma(name, first, last):
    sigmas = choose(name, 50, 8.0).sigmas
    assert sigmas.shape == (51,) and sigmas.dtype == np.float32 and sigmas[-1] == 0
    # The golden values carry 8 digits; a float32 near 1 is good to 6e-8.
    np.testing.assert_allclose(sigmas[[0, -2]], [first, last], rtol=0, atol=6e-8)


def test_euler_hands_the_network_fractional_times_and_dpmpp_starts_at_1000():
    linear = flow.euler(50, 8.0)
    # 1000 sigma in float32: relative rounding 6e-8.
    np.testing.assert_allclose(linear.timesteps, 1000 * linear.sigmas[:-1], rtol=1e-7)
    assert flow.dpmpp_2m(50, 8.0).timesteps[0] == 1000


# ---- coefficients --------------------------------------------------------------------------------


def test_unipc_coefficients_at_five_steps():
    table = flow.unipc(5, 8.0)
    corrector = [  # of x, x_c', m, m', m''
        [1, 0, 0, 0, 0],
        [0, 0.9696712, 0.0151644, 0.0151644, 0],
        [0, 0.9518842, 0.0267320, 0.0215940, -0.0002103],
        [0, 0.9122160, 0.0431985, 0.0500139, -0.0054284],
        [0, 0.7915451, 0.1022660, 0.1288514, -0.0226625],
    ]
    predictor = [  # of x_c, m, m'
        [0.9696712, 0.0303288, 0],
        [0.9518842, 0.0523755, -0.0042597],
        [0.9122160, 0.1241282, -0.0363442],
        [0.7915451, 0.3345951, -0.1261402],
        [0, 1, 0],
    ]
    # Seven digits were recorded; 1.5e-7 is one unit of the last digit and float32 rounding.
    np.testing.assert_allclose(table.steps.corrector, corrector, rtol=0, atol=1.5e-7)
    np.testing.assert_allclose(table.steps.predictor, predictor, rtol=0, atol=1.5e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 20, 50, 200, 1000])
def test_coefficients_are_finite_and_keep_a_constant(name, num_steps):
    for shift in (0.5, 1.0, 3.0, 12.0, 20.0):
        table = choose(name, num_steps, shift)
        steps = table.steps
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(table))
        # A perfect prediction m of a point is a fixed point: every row's weights sum to 1.
        np.testing.assert_allclose(steps.corrector.sum(-1), 1, atol=5e-7)  # five float32 terms
        np.testing.assert_allclose(steps.predictor.sum(-1), 1, atol=5e-7)
        np.testing.assert_array_equal(steps.predictor[-1], [0, 1, 0])  # ends at m


# ---- v-prediction --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", V_NAMES)
def test_timesteps_of_v_prediction(name):
    np.testing.assert_array_equal(choose(name, 50, 1.0).timesteps, np.arange(999, 0, -20))
    uneven = choose(name, 28, 1.0).timesteps
    np.testing.assert_array_equal(uneven[[0, 1, 2, -1]], [999, 963, 928, 35])
    for num_steps in (48, 61, 1000):  # spaced by halves; by a step whose range is one too long; all
        timesteps = choose(name, num_steps, 1.0).timesteps
        assert len(timesteps) == num_steps and timesteps[0] == 999 and timesteps[-1] >= 0
        assert np.all(np.diff(timesteps) < 0)


@pytest.mark.parametrize(
    ("snr_shift", "i", "x", "data", "noise", "ratio"),
    [
        (1.0, 0, 0.0, 0.00926217, 0.99995711, np.inf),
        (1.0, 1, 0.47806040, 0.01494100, 0.87812454, np.inf),
        (1.0, 2, 0.63775546, 0.01800118, 0.76973970, 1.64144391),
        (1.0, 25, 0.91299371, 0.07010698, 0.31385665, 1.01843510),
        (1.0, 48, 0.47281169, 0.52713708, 0.10053115, 0.62012041),
        (1.0, 49, 0.0, 1.0, 0.0, np.inf),
        (3.0, 1, 0.47780604, 0.00842142, 0.87840110, np.inf),
        (3.0, 25, 0.92216923, 0.04522942, 0.34887831, 1.01841166),
        (3.0, 48, 0.48178987, 0.51780525, 0.16862625, 0.62084346),
    ],
)
def test_coefficients_of_cogvideox_dpm(snr_shift, i, x, data, noise, ratio):
    steps = v_prediction.cogvideox_dpm(50, snr_shift).steps
    expected = [x, data * (1 + 0.5 / ratio), -data * 0.5 / ratio]  # ratio of the step behind to the one ahead
    # Eight digits were recorded, and float32 is good to 6e-8 near 1.
    np.testing.assert_allclose(steps.predictor[i], expected, rtol=0, atol=6.5e-8)
    np.testing.assert_allclose(steps.noise[i], noise, rtol=0, atol=6.5e-8)


@pytest.mark.parametrize(
    ("snr_shift", "i", "x", "data"),
    [
        (1.0, 0, 0.99995711, 0.00926217),
        (1.0, 1, 0.99985529, 0.01010804),
        (1.0, 2, 0.99972676, 0.01099020),
        (1.0, 25, 0.98161818, 0.03632316),
        (1.0, 48, 0.69129730, 0.31303636),
        (1.0, 49, 0.0, 1.0),
        (3.0, 1, 0.99995405, 0.00569851),
        (3.0, 25, 0.99248840, 0.02344527),
        (3.0, 48, 0.70442672, 0.30749516),
    ],
)
def test_coefficients_of_ddim(snr_shift, i, x, data):
    predictor = v_prediction.ddim(50, snr_shift).steps.predictor
    np.testing.assert_allclose(predictor[i], [x, data, 0.0], rtol=0, atol=6.5e-8)  # as above


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 28, 50, 61, 1000])
@pytest.mark.parametrize("snr_shift", [0.5, 1.0, 3.0, 20.0])
def test_a_step_of_v_prediction_ends_at_its_level(num_steps, snr_shift):
    squared = v_prediction.signal(snr_shift)
    for name in V_NAMES:
        table = choose(name, num_steps, snr_shift)
        steps, timesteps = table.steps, table.timesteps.astype(int)
        ends = timesteps - 1000 // num_steps
        here, there = squared[timesteps], np.where(ends < 0, 1.0, squared[ends])
        p = np.float64(steps.predictor)
        noise = np.float64(steps.noise) if table.stochastic else np.zeros(num_steps)
        # Of x = alpha c + sigma z and a perfect m = m' = c it makes alpha c + sigma z at the level where it
        # ends: c is weighed with alpha, and the variances of the two noises add up. float32 rounding.
        np.testing.assert_allclose(p[:, 0] * np.sqrt(here) + p[:, 1] + p[:, 2], np.sqrt(there), atol=3e-7)
        np.testing.assert_allclose(p[:, 0] ** 2 * (1 - here) + noise**2, 1 - there, atol=3e-7)
        data = np.stack([np.sqrt(here), -np.sqrt(1 - here)], axis=1)
        np.testing.assert_allclose(steps.data, data, atol=6e-8)
        assert table.sigmas.shape == (num_steps + 1,) and np.all(np.diff(table.sigmas) < 0)
        assert table.sigmas[0] == 1 and (table.sigmas[-1] == 0) == (ends[-1] < 0)


def test_ddim_is_the_textbook_step():
    table = v_prediction.ddim(20, 3.0)
    squared, x = v_prediction.signal(3.0), START.astype(np.float64)
    for t in range(999, 0, -50):
        v = np.asarray(toy_velocity(x, t), np.float64)
        alpha, sigma = np.sqrt(squared[t]), np.sqrt(1 - squared[t])
        data, noise = alpha * x - sigma * v, alpha * v + sigma * x
        there = squared[t - 50] if t > 50 else 1.0
        x = np.sqrt(there) * data + np.sqrt(1 - there) * noise
    np.testing.assert_allclose(sample(table, toy_velocity, START), x, rtol=0, atol=2e-6)  # 20 steps


@pytest.mark.parametrize("name", V_NAMES + SAT_NAMES)
def test_one_step_of_v_prediction_is_minus_the_first_prediction(name):
    end = sample(choose(name, 1, 1.0), toy_velocity, START)
    np.testing.assert_allclose(end, -toy_velocity(START, 999.0), atol=5e-7)  # float32 rounding


@pytest.mark.parametrize("name", V_NAMES)
@pytest.mark.parametrize("num_steps", [7, 50])
def test_v_prediction_reaches_a_point_mass_from_any_noise(name, num_steps):
    # Data at one point c: the noise in x is (x - alpha c) / sigma, and v follows.
    table, squared = choose(name, num_steps, 3.0), jnp.float32(v_prediction.signal(3.0))

    def velocity(x, t):
        alpha = jnp.sqrt(squared[t.astype(int)])
        sigma = jnp.sqrt(1 - squared[t.astype(int)])
        return alpha * (x - alpha * 0.3) / sigma - sigma * 0.3

    end = sample(table, velocity, START)
    if num_steps == 50:
        np.testing.assert_allclose(end, np.full(3, 0.3), atol=2e-6)  # float32 rounding
    else:  # 1000 // 7 leaves the level of timestep 0
        assert table.sigmas[-1] > 0 and 1e-2 < np.abs(end - 0.3).max() < 0.5


# What the samplers and the denoiser of the CogVideoX reference code (its tag v1.0) made of `toy_velocity`,
# START and `many((N, 1, 3), 1)` as noise, in float32.
SAT_END_POINTS = [
    ("ddim-sat", 7, 3.0, [-0.0042727, -0.0910232, 1.0173340]),
    ("ddim-sat", 50, 1.0, [0.0978174, -0.1363692, 1.3016268]),
    ("cogvideox-dpm-sat", 7, 3.0, [-0.1217124, -0.0906192, -0.1114169]),
    ("cogvideox-dpm-sat", 50, 1.0, [0.1534197, 0.2215049, -0.0309146]),
]


@pytest.mark.parametrize(("name", "num_steps", "snr_shift", "expected"), SAT_END_POINTS)
def test_end_points_of_the_reference_code(name, num_steps, snr_shift, expected):
    def end(name):
        table = choose(name, num_steps, snr_shift)
        state = solvers.start(table, START[None])
        for i, noise in enumerate(many((num_steps, 1, 3), 1)):
            row = jax.tree.map(lambda leaf, i=i: leaf[i], table.steps)
            state = solvers.step(row, state, toy_velocity, noise)
        return state.x[0]

    # Both sides round every step, and the reference code its coefficients too, to float32: 3e-6 at 50 steps
    # of the largest shift tried, where the grid of diffusers is 3e-3 to 1e-2 away.
    np.testing.assert_allclose(end(name), expected, rtol=0, atol=6e-6)
    assert np.abs(end(name.removesuffix("-sat")) - np.float32(expected)).max() > 6e-4


@pytest.mark.parametrize("snr_shift", [1.0, 3.0])
def test_table_of_the_reference_code(snr_shift):
    # Written out again: only the levels that are visited are scaled, to fall from the last one's to 0.
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    product = np.cumprod(1 - beta)
    alpha = np.sqrt(product / (snr_shift + (1 - snr_shift) * product))
    for num_steps, timesteps in ((50, range(999, 0, -20)), (7, (999, 856, 713, 570, 428, 285, 142))):
        table = choose("ddim-sat", num_steps, snr_shift)
        np.testing.assert_array_equal(table.timesteps, timesteps)
        low, high = alpha[999], alpha[timesteps[-1]]
        visited = np.append([high * (alpha[t] - low) / (high - low) for t in timesteps], 1.0)
        # The share of noise in float32, between 0 and 1.
        np.testing.assert_allclose(table.sigmas, v_prediction.noise_share(visited**2), rtol=0, atol=6e-8)
    last = {1.0: 0.98224, 3.0: 0.94856}[snr_shift]  # alpha^2 where the last of 50 steps begins
    here = float(choose("ddim-sat", 50, snr_shift).sigmas[-2])
    np.testing.assert_allclose(here, v_prediction.noise_share(np.float64(last)), atol=5e-5)  # of five digits


# ---- noise on the way ----------------------------------------------------------------------------


def many(shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def test_a_step_adds_the_noise_that_it_is_given():
    table = v_prediction.cogvideox_dpm(50, 1.0)
    row = jax.tree.map(lambda leaf: leaf[25], table.steps)
    state = solvers.start(table, many((2, 100)))
    noise = many((2, 100), 1)
    with_noise, without = (solvers.step(row, state, toy_velocity, z).x for z in (noise, 0 * noise))
    np.testing.assert_allclose(with_noise - without, 0.31385665 * noise, atol=1e-6)  # float32 rounding


def test_noise_of_a_step_is_standard_normal_and_new_for_every_clip_and_step():
    state = solvers.start(v_prediction.cogvideox_dpm(50, 1.0), many((3, 40, 50)))
    draw = jax.jit(solvers.step_noise)
    draws = np.stack([draw(state, i) for i in range(5)])
    assert draws.shape == (5, 3, 40, 50) and draws.dtype == np.float32
    rows = np.concatenate([draws.reshape(15, -1), many((3, 2000))])  # with what the clips start from
    # Four standard errors of 2000 draws: 4 / sqrt(2000) = 0.09, sqrt(2) of that for squares.
    np.testing.assert_allclose(np.cov(rows), np.eye(18), atol=0.13)
    np.testing.assert_allclose(rows.mean(1), 0, atol=0.09)


def test_noise_of_a_clip_depends_on_what_it_starts_from_alone():
    table, noise = v_prediction.cogvideox_dpm(50, 1.0), many((4, 3, 5, 16))

    @jax.jit
    def draw(noise):
        return solvers.step_noise(solvers.start(table, noise), 7)

    whole = np.asarray(draw(noise))
    for rows in ([2], [0, 0, 2]):
        np.testing.assert_array_equal(draw(noise[rows]), whole[rows])
    # Not on the last digits, which platforms round differently.
    np.testing.assert_array_equal(draw(noise.astype(jnp.bfloat16)), whole)
    # Clips that differ in one sign are different.
    one = np.repeat(many((1, 64)), 64, axis=0)
    one[np.diag_indices(64)] *= -1
    keys = jax.random.key_data(jax.jit(solvers.sample_keys)(one))
    assert len(np.unique(keys, axis=0)) == 64


def test_a_stochastic_sample_is_the_same_alone_and_in_a_batch():
    table, noise = v_prediction.cogvideox_dpm(12, 3.0), many((4, 2, 3, 8))
    run = jax.jit(lambda noise: sample(table, toy_velocity, noise))
    whole = np.asarray(run(noise))
    assert np.abs(np.diff(whole, axis=0)).max() > 0.1
    for rows in ([1], [3, 1]):
        # Vectors of another length may round the velocity differently.
        np.testing.assert_allclose(run(noise[rows]), whole[rows], rtol=0, atol=1e-6)


def test_deterministic_solvers_draw_nothing():
    for name in (*NAMES, "ddim"):
        table = choose(name, 5, 3.0)
        state = solvers.start(table, many((2, 3)))
        assert not table.stochastic and state.keys is None and solvers.step_noise(state, 1) is None
        program = jax.make_jaxpr(lambda noise, table=table: sample(table, toy_velocity, noise))
        assert "random" not in str(program(many((2, 3)))) and "threefry" not in str(program(many((2, 3))))
    table = v_prediction.cogvideox_dpm(5, 3.0)
    assert "random" in str(jax.make_jaxpr(lambda z: sample(table, toy_velocity, z))(many((2, 3))))


# ---- trajectories --------------------------------------------------------------------------------

END_POINTS = {  # at N=5 shift 8, and at N=20 shift 3
    "unipc": ([0.1530095, -0.0305266, 1.1176475], [0.3131768, -0.1713599, 1.4356699]),
    "unipc-diffusers": ([0.1522289, -0.0296860, 1.1163380], [0.3126463, -0.1711544, 1.4344543]),
    "dpm++": ([0.1498462, -0.0312730, 1.1105359], [0.3134226, -0.1721716, 1.4351918]),
    "euler-diffusers": ([0.1326944, -0.0198788, 1.0643048], [0.2911614, -0.1600513, 1.3772355]),
}


@pytest.mark.parametrize("name", END_POINTS)
@pytest.mark.parametrize(("setting", "num_steps", "shift"), [(0, 5, 8.0), (1, 20, 3.0)])
def test_end_points_of_the_toy_equation(name, setting, num_steps, shift):
    end = sample(choose(name, num_steps, shift), toy_velocity, START)
    # Golden values are float32 runs of the reference code: both sides round every step, 20 steps of
    # 6e-8.
    np.testing.assert_allclose(end, END_POINTS[name][setting], rtol=0, atol=1.5e-6)


def test_euler_is_the_textbook_step():
    table = flow.euler(20, 3.0)
    x, s = START.astype(np.float64), table.sigmas.astype(np.float64)
    for i, t in enumerate(table.timesteps):
        x = x + (s[i + 1] - s[i]) * np.asarray(toy_velocity(x, t), np.float64)
    end = sample(table, toy_velocity, START)
    np.testing.assert_allclose(end, x, rtol=0, atol=2e-6)  # 20 float32 steps


@pytest.mark.parametrize(("name", "low", "high"), [("unipc", 6, 32), ("dpm++", 6, 32), ("euler", 3, 6)])
def test_order_of_convergence(name, low, high):
    def end(num_steps):
        table = choose(name, num_steps, 1.0)
        return np.asarray(sample(table, lambda x, t: jnp.sin(2 * x) + 0.5, START))

    # The official UniPC grid starts at 0.999, so each solver is compared with its own fine limit.
    limit = end(1280)
    coarse, fine = (np.abs(end(n) - limit).max() for n in (20, 80))
    # A quarter of the step divides the error by 4 at order 1 and by 16 at order 2, less what the
    # first and the last step cost, which have order 1 in every solver.
    assert low < coarse / fine < high


@pytest.mark.parametrize("name", NAMES)
def test_one_step_is_the_predicted_sample(name):
    table = choose(name, 1, 8.0)
    end = sample(table, toy_velocity, START)
    expected = START - table.sigmas[0] * toy_velocity(START, table.timesteps[0])
    np.testing.assert_allclose(end, expected, atol=5e-7)  # float32 rounding


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_are_two_euler_steps(name):
    # Both steps have order 1, and the corrector of the last step cannot reach the result.
    table = choose(name, 2, 8.0)
    s = table.sigmas
    x = START + (s[1] - s[0]) * toy_velocity(START, table.timesteps[0])
    x = x + (s[2] - s[1]) * toy_velocity(x, table.timesteps[1])
    end = sample(table, toy_velocity, START)
    np.testing.assert_allclose(end, x, atol=1e-6)  # float32 rounding


@pytest.mark.parametrize("name", NAMES)
def test_a_point_mass_is_reached_from_any_noise(name):
    # Data at one point c: v = (x - c) / sigma, and the path is a straight line that every solver
    # follows.
    table = choose(name, 7, 5.0)
    if name in ("euler", "euler-diffusers"):  # fractional times are 1000 sigma
        end = sample(table, lambda x, t: (x - 0.3) * 1000 / t, START)
        np.testing.assert_allclose(end, np.full(3, 0.3), atol=2e-6)  # float32 rounding
    # Truncated times are off by up to 1, so there sigma is looked up beside the time.
    sigma_of = dict(zip(table.timesteps.tolist(), table.sigmas.tolist(), strict=False))
    state = solvers.start(table, START)
    for i in range(table.num_steps):
        row = jax.tree.map(lambda leaf, i=i: leaf[i], table.steps)
        sigma = sigma_of[float(row.timestep)]
        state = solvers.step(row, state, lambda x, t, sigma=sigma: (x - 0.3) / sigma)
    np.testing.assert_allclose(state.x, np.full(3, 0.3), atol=2e-6)


def test_repeated_timesteps_are_separate_steps():
    table = flow.unipc(100, 12.0)
    assert len(np.unique(table.timesteps)) < 100  # truncation makes some equal
    assert np.all(np.diff(table.sigmas) < 0)  # the steps are not
    # With fractional times nothing repeats. Times move by less than 1, so the toy velocity by less
    # than 0.001 x; a skipped or a doubled step would move the end by more.
    fractional = table.steps._replace(timestep=1000 * table.sigmas[:-1])
    end = sample(table, toy_velocity, START)
    unique = sample(dataclasses.replace(table, steps=fractional), toy_velocity, START)
    np.testing.assert_allclose(end, unique, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", NAMES + V_NAMES)
def test_scan_equals_the_loop_over_one_compiled_step(name):
    table = choose(name, 12, 5.0)
    traces = []

    @jax.jit
    def advance(row, state, i):
        traces.append(row)
        return solvers.step(row, state, toy_velocity, solvers.step_noise(state, i))

    state = solvers.start(table, START)
    for i in range(table.num_steps):
        state = advance(jax.tree.map(lambda leaf, i=i: leaf[i], table.steps), state, i)
    scanned = jax.jit(lambda table, noise: sample(table, toy_velocity, noise))(table, START)
    # XLA may fuse the two programs differently: 12 steps of float32 rounding.
    np.testing.assert_allclose(scanned, state.x, rtol=0, atol=1e-6)
    assert len(traces) == 1


def test_solvers_of_equal_length_share_one_program():
    traces = []

    @jax.jit
    def run(table, noise):
        traces.append(table)
        return sample(table, toy_velocity, noise)

    for name in (*NAMES, "ddim"):
        run(choose(name, 6, 3.0), START)
    assert len(traces) == 1


# ---- skipping ------------------------------------------------------------------------------------


def test_a_skipped_step_takes_the_line_through_the_last_two_that_ran():
    table = flow.euler(8, 3.0)
    skip, s, x, ran = (2, 3, 5, 7), table.sigmas.astype(np.float64), START.astype(np.float64), []
    for i, t in enumerate(table.timesteps):
        if i in skip:
            (a, m_a), (b, m_b) = ran[-2:]
            data = m_b + (s[i] - s[b]) / (s[b] - s[a]) * (m_b - m_a)
        else:
            data = x - s[i] * np.asarray(toy_velocity(x, t), np.float64)
            ran.append((i, data))
        x = s[i + 1] / s[i] * x + (1 - s[i + 1] / s[i]) * data
    end = sample(solvers.skipping(table, skip), toy_velocity, START)
    np.testing.assert_allclose(end, x, rtol=0, atol=2e-6)  # 8 float32 steps


def test_the_second_step_takes_the_data_of_the_first():
    table = solvers.skipping(flow.euler(2, 3.0), (1,))
    end = sample(table, toy_velocity, START)
    once = START - table.sigmas[0] * toy_velocity(START, table.timesteps[0])
    np.testing.assert_allclose(end, once, rtol=0, atol=5e-7)  # float32 rounding


@pytest.mark.parametrize("name", (*NAMES, "ddim"))
def test_a_skipped_step_does_not_call_the_network(name):
    calls = []

    def velocity(x, t):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return toy_velocity(x, t)

    skip = (2, 5, 6)
    table = solvers.skipping(choose(name, 9, 3.0), skip)
    jax.block_until_ready(jax.jit(lambda noise: sample(table, velocity, noise))(START))
    jax.effects_barrier()
    assert sorted(calls) == sorted(np.delete(table.timesteps, skip).tolist())


@pytest.mark.parametrize("skip", [(0,), (8,), (-1,), (3, 3), (2.5,)])
def test_steps_that_cannot_be_skipped(skip):
    with pytest.raises(UserError, match="from 1 .* to 7"):
        solvers.skipping(flow.unipc(8, 3.0), skip)


def test_skipping_in_v_prediction_is_exact_where_the_data_moves_evenly_with_the_share_of_noise():
    table, squared = v_prediction.ddim(10, 1.0), v_prediction.signal(1.0)
    alpha, share = jnp.float32(np.sqrt(squared)), jnp.float32(v_prediction.noise_share(squared))
    sigma = jnp.float32(np.sqrt(1 - squared))

    def velocity(x, t):
        t = t.astype(int)
        return (alpha[t] * x - (0.3 + 0.5 * share[t])) / sigma[t]  # so that m = 0.3 + 0.5 share

    every = sample(table, velocity, START)
    skipped = sample(solvers.skipping(table, (3, 4, 7, 9)), velocity, START)
    np.testing.assert_allclose(skipped, every, rtol=0, atol=2e-6)  # float32 rounding
    held = sample(solvers.skipping(table, (1, 2, 3, 4, 5, 6, 7, 8, 9)), velocity, START)
    assert np.abs(held - every).max() > 0.1


def test_a_stochastic_solver_skips_nothing():
    table = v_prediction.cogvideox_dpm(8, 1.0)
    assert solvers.skipping(table, ()) is table
    with pytest.raises(UserError, match=r"samples.skip=\(2,\): .* such as ddim"):
        solvers.skipping(table, (2,))


# ---- dtype ---------------------------------------------------------------------------------------


def test_state_stays_float32_with_a_half_precision_network():
    end = sample(flow.unipc(4, 5.0), lambda x, t: x.astype(jnp.bfloat16), START.astype(jnp.bfloat16))
    assert end.dtype == jnp.float32 and np.all(np.isfinite(end))


# ---- guidance ------------------------------------------------------------------------------------


def _model(calls, text):
    def model(x, t):
        assert t.shape == x.shape[:1] == text.shape[:1]
        calls.append(x.shape[0])
        return x * 0.001 * t[:, None] + text

    return model


def test_guidance_batches_both_halves_and_extrapolates():
    x = jnp.array([[1.0] * 3, [2.0] * 3])
    cond, uncond = jnp.array([[2.0] * 3, [4.0] * 3]), jnp.full(3, 0.5)
    calls, text = [], guided.pair_prompts(cond, uncond, 5.0)
    v = guided.guided(_model(calls, text), 5.0)(x, jnp.float32(500))
    assert calls == [4]
    np.testing.assert_allclose(v[:, 0], [0.5 + 0.5 + 5 * 1.5, 1.0 + 0.5 + 5 * 3.5], atol=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 0.0])
def test_guidance_of_one_or_less_runs_the_conditional_half_alone(guidance):
    x, calls = jnp.ones((2, 3)), []
    text = guided.pair_prompts(jnp.full((2, 3), 2.0), jnp.zeros(3), guidance)
    v = guided.guided(_model(calls, text), guidance)(x, jnp.float32(500))
    assert calls == [2]
    np.testing.assert_allclose(v, 2.5)


def test_guided_sampling_runs_inside_the_scan():
    text = guided.pair_prompts(jnp.ones((1, 3)), jnp.zeros(3), 3.0)
    velocity = guided.guided(_model([], text), 3.0)
    table = flow.unipc(8, 5.0)
    end = sample(table, velocity, START[None])
    alone = sample(table, lambda x, t: x * 0.001 * t + 3.0, START[None])
    np.testing.assert_allclose(end, alone, atol=2e-6)  # float32 rounding of 0 + 3 (1 - 0)


# The dynamic guidance of 50 steps and a guidance of 6, at times 999, 979, ... 19.
DYNAMIC = """2.291487 2.543503 6.974352 6.420358 2.788098 4.271942 1.037598 4.170400 1.617975 6.983127
    1.004789 2.871981 6.976805 1.633099 4.329747 2.436601 6.377304 6.006840 3.447874 3.198098 1.654759
    6.610011 1.194746 4.295340 6.985373 1.521266 1.761637 1.057938 4.127507 1.482273 2.002566 5.947659
    4.143219 6.530550 6.139848 6.999941 6.168399 1.119920 2.097506 6.685006 6.999215 2.343218 6.212752
    1.250530 6.999645 6.864372 1.063552 1.000001 1.000004 1.123398"""


def test_dynamic_guidance():
    schedule = guided.guidance_schedule("dynamic", 6.0, 50)
    times = v_prediction.cogvideox_dpm(50, 1.0).timesteps.astype(int)
    # Six decimals were recorded; the cosine's argument, up to 8e6, is good to 1e-9 in float64.
    np.testing.assert_allclose(schedule[times], np.float64(DYNAMIC.split()), rtol=0, atol=1e-6)
    assert schedule.shape == (1001,) and schedule.min() >= 1 and schedule.max() <= 7
    # By hand: at the step's own number the exponent's base is a share of N. 1 + 6 (1 - cos(pi / 32)) / 2.
    np.testing.assert_allclose(schedule[25], 1.0144458, atol=1e-6)
    np.testing.assert_allclose(schedule[[0, 50]], [7.0, 1.0], atol=1e-6)


def test_constant_guidance_is_the_number_and_a_number_of_one_is_none():
    assert guided.guidance_schedule("constant", 6, 50) == 6.0
    assert guided.guidance_schedule("dynamic", 1.0, 50) == 1.0
    with pytest.raises(UserError, match="'linear'.*'constant' or 'dynamic'"):
        guided.guidance_schedule("linear", 6.0, 50)


def test_guidance_of_a_schedule_is_that_of_the_time_and_always_runs_both_halves():
    x, calls = jnp.array([[1.0] * 3, [2.0] * 3]), []
    schedule = guided.guidance_schedule("dynamic", 6.0, 50)
    text = guided.pair_prompts(jnp.array([[2.0] * 3, [4.0] * 3]), jnp.full(3, 0.5), schedule)
    velocity = jax.jit(guided.guided(_model(calls, text), schedule))
    for t, factor in ((999.0, 2.291487), (959.0, 6.974352), (59.0, 1.000001)):
        expected = np.array([1.0, 2.0]) * t / 1000 + 0.5 + factor * np.array([1.5, 3.5])
        np.testing.assert_allclose(velocity(x, jnp.float32(t))[:, 0], expected, rtol=1e-6)
    assert calls == [4]  # one trace


def test_a_guided_run_takes_the_guidance_of_each_step():
    text, uncond = jnp.ones((1, 3)), jnp.full(3, -0.5)
    schedule, table = guided.guidance_schedule("dynamic", 6.0, 10), v_prediction.ddim(10, 1.0)
    paired = guided.pair_prompts(text, uncond, schedule)
    end = sample(table, guided.guided(_model([], paired), schedule), START[None])
    state = solvers.start(table, START[None])
    for i, t in enumerate(range(999, 0, -100)):
        factor = 1 + 6 * (1 - np.cos(np.pi * ((10 - t) / 10) ** 5)) / 2
        row = jax.tree.map(lambda leaf, i=i: leaf[i], table.steps)
        state = solvers.step(row, state, lambda x, t, f=factor: 0.001 * t * x - 0.5 + f * 1.5)
    np.testing.assert_allclose(end, state.x, rtol=0, atol=2e-5)  # float32 rounding of values up to 20


# ---- bad input -----------------------------------------------------------------------------------


def test_unknown_solver_lists_the_names():
    for family, names in ((flow.FlowMatching(), NAMES), (v_prediction.VPrediction(), V_NAMES + SAT_NAMES)):
        with pytest.raises(UserError, match="samples.solver='heun'") as error:
            family.solver("heun", 10)
        assert str(error.value).partition("choose one of ")[2].split(", ") == list(names)


def test_solvers_of_another_family_are_refused():
    for family, others in ((flow.FlowMatching(), V_NAMES), (v_prediction.VPrediction(), NAMES)):
        for name in others:
            with pytest.raises(
                UserError, match=f"samples.solver='{re.escape(name)}' is not for this objective"
            ):
                family.solver(name, 10)


def test_the_shift_of_a_solver():
    family = flow.FlowMatching(shift=2.0)  # a sampler of flow matching may have its own
    for shift, expected in ((None, 2.0), (8.0, 8.0)):
        np.testing.assert_array_equal(family.solver("unipc", 9, shift).sigmas, flow.unipc(9, expected).sigmas)
    family = v_prediction.VPrediction(3.0)  # one of v-prediction has that of training
    for shift in (None, 3.0):
        np.testing.assert_array_equal(
            family.solver("ddim", 9, shift).sigmas, v_prediction.ddim(9, 3.0).sigmas
        )
    with pytest.raises(UserError, match="samples.shift=1.0 is not objective.snr_shift=3.0"):
        family.solver("ddim", 9, 1.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("num_steps", "shift"), [(0, 3.0), (10, 0.0), (10, -1.0), (10, float("nan")), (100, 1e9)]
)
def test_bad_steps_and_shift(name, num_steps, shift):
    with pytest.raises(UserError, match="step|shift"):
        choose(name, num_steps, shift)


@pytest.mark.parametrize("name", V_NAMES + SAT_NAMES)
@pytest.mark.parametrize(
    ("num_steps", "shift"), [(0, 3.0), (10, 0.0), (10, -1.0), (10, float("nan")), (1001, 1.0)]
)
def test_bad_steps_and_shift_of_v_prediction(name, num_steps, shift):
    with pytest.raises(UserError, match="step|shift"):
        choose(name, num_steps, shift)
