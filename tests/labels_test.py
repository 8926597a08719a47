"""Questions, and the way from attention maps to targets, against cases worked out by hand."""

import numpy as np
import pytest

from prophy_jax.data.taxonomy import WISA
from prophy_jax.labels import targets


def test_every_phenomenon_has_its_own_question():
    assert len({*WISA.questions.values(), WISA.background}) == 18
    assert all("Describe" in text and "where" in text for text in WISA.questions.values())
    assert not any(name in WISA.background for name in WISA.names)


# --- Normalising, denoising, scaling ---------------------------------------------------------------


def test_normalise_gives_mean_one():
    np.testing.assert_array_equal(targets.normalise(np.array([1.0, 3.0])), [0.5, 1.5])
    np.testing.assert_array_equal(targets.normalise(np.zeros(3)), np.zeros(3))


@pytest.mark.parametrize(
    "how, expected",
    [
        ("difference", [1.0, 0.0, -1.5]),
        ("ratio", [1.0, 0.0, -0.75]),
        ("log_ratio", [np.log(2), 0.0, -np.log(4)]),
        ("none", [2.0, 0.5, 0.5]),
    ],
)
def test_denoise(how, expected):
    out = targets.denoise(np.array([2.0, 0.5, 0.5]), np.array([1.0, 0.5, 2.0]), how)
    np.testing.assert_allclose(out, expected, rtol=1e-15)


def test_ratios_stay_finite_where_the_background_has_nothing():
    attention, background = np.array([1.0, 0.0]), np.array([0.0, 0.0])
    assert targets.denoise(attention, background, "ratio").tolist() == [999, -1]
    np.testing.assert_allclose(targets.denoise(attention, background, "log_ratio"), [np.log(1000), 0])


def test_scale():
    tokens = np.array([1.0, -4.0, 3.0, 0.0])
    np.testing.assert_array_equal(targets.scaled(tokens, "max"), [0.25, -1, 0.75, 0])
    assert targets.scaled(tokens, "std").std() == pytest.approx(1)
    np.testing.assert_array_equal(targets.scaled(np.zeros(2), "max"), [0, 0])


# --- Resampling ------------------------------------------------------------------------------------


def test_overlap_of_thirds_with_halves():
    thirds, halves = np.linspace(0, 1, 4), np.linspace(0, 1, 3)
    expected = [[1, 0], [0.5, 0.5], [0, 1]]
    np.testing.assert_allclose(targets.overlap(thirds, halves), expected, atol=1e-15)
    # The other way: of each half, two thirds are its own third, and one is of the middle one.
    expected = [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]]
    np.testing.assert_allclose(targets.overlap(halves, thirds), expected, atol=1e-15)


def test_time_edges():
    np.testing.assert_array_equal(targets.time_edges(4, 1), [0, 1, 2, 3, 4])
    # Of 5 latents, 0, 2 and 4: latents 1 and 3 are half the one's and half the other's.
    np.testing.assert_array_equal(targets.time_edges(5, 2), [0, 1.5, 3.5, 5])
    expected = [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]]
    np.testing.assert_allclose(
        targets.overlap(np.arange(6.0), targets.time_edges(5, 2)), expected, atol=1e-15
    )
    # Of 6 latents, 0 and 4: between them the border is at 2.5; the last is only seen by latent 4.
    np.testing.assert_array_equal(targets.time_edges(6, 4), [0, 2.5, 6])


def test_resample_doubles_cells():
    """Two by two tokens to a cell repeat it; order t, h, w."""
    cells = np.arange(12.0).reshape(2, 2, 3)
    expected = cells.repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_allclose(targets.resample(cells, (2, 4, 6)), expected, rtol=1e-14)


def test_cells_that_do_not_divide_the_tokens():
    """45 columns in 23 cells: a token across a border has of each cell the share that it covers."""
    out = targets.resample(np.arange(23.0).reshape(1, 1, 23), (1, 1, 45))[0, 0]
    # Token j covers j/45 to (j + 1)/45. The first border, 1/23, is 22/23 of a token into token 1.
    # The middle token is in the middle cell, whose borders are at 21.5 and 23.5 tokens.
    np.testing.assert_allclose(out[[0, 1, 2, 22, 43, 44]], [0, 1 / 23, 1, 11, 21 + 22 / 23, 22], atol=1e-13)
    np.testing.assert_allclose(out + out[::-1], 22, atol=1e-13)


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize(
    "grid, cells", [((21, 30, 52), (15, 26)), ((13, 30, 45), (15, 23)), ((5, 3, 3), (4, 5))]
)
def test_resample_keeps_constants_and_ranges(grid, cells, every):
    """Rows of every overlap matrix sum to 1, also for an odd number of tokens a side."""
    shape = (len(range(0, grid[0], every)), *cells)
    np.testing.assert_allclose(targets.resample(np.full(shape, 2.5), grid, every), 2.5, rtol=1e-13)
    noise = np.random.default_rng(0).normal(size=shape)
    out = targets.resample(noise, grid, every)
    assert out.shape == grid
    assert noise.min() - 1e-12 <= out.min() and out.max() <= noise.max() + 1e-12


# --- The whole way ---------------------------------------------------------------------------------

GRID = (2, 2, 2)  # tokens; cells (2, 1, 2)


def make(values):
    """(1, 2, 1, 2) raw map of one layer."""
    return np.array(values, np.float32).reshape(1, 2, 1, 2)


def test_target_by_hand():
    # Normalised: [2, 1, 1, 0] and [1, 1, 1, 1]; difference [1, 0, 0, -1]; a cell is two tokens.
    out = targets.target(make([4, 2, 2, 0]), make([3, 3, 3, 3]), GRID, "difference", "max")
    assert out.dtype == np.float16
    assert out.tolist() == [1, 0, 1, 0, 0, -1, 0, -1]


def test_target_of_odd_sides_by_hand():
    """Three rows and columns of tokens in two of cells each; of three latents the first and last are seen."""
    maps = np.zeros((1, 2, 2, 2), np.float32)
    maps[0, 0, 0, 0] = 16  # of all cells 1 on average: normalised 8, less the background's 1
    grid = (3, 3, 3)
    out = targets.target(maps, np.ones_like(maps), grid, "difference", "max", every=2).reshape(grid)
    # The share of each token in that cell; all other cells are -1, so a share of s is 8 s - 1, over 7.
    side = np.array([1, 0.5, 0])
    share = np.array([1, 0.5, 0])[:, None, None] * side[:, None] * side
    np.testing.assert_allclose(out, (8 * share - 1) / 7, atol=5e-4)  # 11 bits of float16
    assert out[0, 0, 0] == 1 and out[2, 2, 2] == np.float16(-1 / 7)


def test_layers_are_averaged_before_they_are_normalised():
    """A layer that hardly looks at the video has little say."""
    faint = np.concatenate([make([4, 2, 2, 0]), 1e-3 * make([0, 0, 0, 8])])
    even = np.concatenate([make([2, 2, 2, 2]), 1e-3 * make([2, 2, 2, 2])])
    out = targets.target(faint, even, GRID, "difference", "max")
    expected = targets.target(make([4, 2, 2, 8e-3]), make([1, 1, 1, 1]), GRID, "difference", "max")
    np.testing.assert_array_equal(out, expected)


def test_a_sink_common_to_both_prompts_cancels():
    """An additive spatial bias of any size and place, in both maps, leaves the target exactly as it was.

    Both have the same mass before it; the second prompt then has 4 times the attention on the video in all,
    as prompts differ in length. Powers of two, so that nothing is rounded.
    """
    question, background = make([5, 1, 1, 1]), make([2, 2, 2, 2])
    clean = targets.target(question, background, GRID, "difference", "max")
    np.testing.assert_array_equal(clean, np.float16([1, -1 / 3, 1, -1 / 3, *[-1 / 3] * 4]))
    sink = make([0, 8, 0, 0])
    out = targets.target(question + sink, 4 * (background + sink), GRID, "difference", "max")
    np.testing.assert_array_equal(out, clean)
    # Without denoising the sink is the target, and without normalising first it would be the difference.
    assert targets.target(question + sink, background, GRID, "none", "max").argmax() == 1
    plain = (question + sink) - 4 * (background + sink)
    assert np.abs(plain).argmax() == 1
