"""Pictures over clips: timing, colours, and files that lose nothing."""

import io

import matplotlib
import numpy as np
from PIL import Image, ImageSequence

from prophy_jax.evaluation import pictures

GRID = (3, 2, 4)  # T' H' W' of a clip of 9 frames


def frames(rng):
    return rng.integers(0, 256, (9, 16, 32, 3), dtype=np.uint8)


def test_tokens_cover_their_frames_and_pixels():
    tokens = np.arange(24.0)
    maps = pictures.tokens_to_frames(tokens, GRID, (9, 16, 32))
    assert maps.shape == (9, 16, 32) and maps.dtype == np.float32
    latent = [0, 1, 1, 1, 1, 2, 2, 2, 2]  # causal: latent 0 is frame 0 alone
    for frame, row, column in np.ndindex(9, 16, 32):
        expected = tokens.reshape(GRID)[latent[frame], row // 8, column // 8]
        assert maps[frame, row, column] == expected


def test_overlay_leaves_the_cold_grey_and_colours_the_hot():
    clip = frames(np.random.default_rng(0))
    cold = pictures.overlay(clip, np.zeros(clip.shape[:3]))
    assert cold.dtype == np.uint8
    np.testing.assert_array_equal(cold, clip.mean(-1, keepdims=True).astype(np.uint8).repeat(3, -1))
    hot = pictures.overlay(clip, np.full(clip.shape[:3], 7.0), opacity=1)  # beyond 1 is 1
    np.testing.assert_array_equal(hot, pictures.overlay(clip, np.ones(clip.shape[:3]), opacity=1))
    assert len(np.unique(hot.reshape(-1, 3), axis=0)) == 1


def test_stretch():
    tokens = np.arange(101.0) * 3 - 50
    stretched = pictures.stretch(tokens)
    assert (stretched[:51] == 0).all() and (stretched[99:] == 1).all()
    assert stretched[75] == (75 - 50) / 49
    assert (pictures.stretch(np.full(5, 2.0)) == 0).all()


def test_overlay_strongest_shows_the_categories_with_the_highest_peaks():
    clip = np.full((9, 16, 32, 3), 100, np.uint8)
    alignment = np.random.default_rng(1).uniform(0, 0.3, (24, 17))
    for (token, category), peak in {(5, 3): 0.9, (11, 8): 0.5, (2, 1): 0.4}.items():
        alignment[token, category] = peak  # the last is below half of the highest
    shown = pictures.overlay_strongest(clip, alignment, GRID, [f"name {e}" for e in range(17)])
    height, width = 8 * 16, 8 * 32  # enlarged to 256
    assert shown.shape == (9, height + pictures.LEGEND, 2 * width, 3)
    for panel, category in zip(np.split(shown, 2, axis=2), (3, 8), strict=True):
        heat = pictures.tokens_to_frames(pictures.stretch(alignment[:, category]), GRID, (9, 16, 32))
        expected = pictures.enlarge(pictures.overlay(clip, heat))
        assert (panel[:, 32:height] == expected[:, 32:]).all()  # below the name
        assert (panel[:, :height] == pictures.write_name(expected, f"routing: name {category}")).all()
        low, high = np.quantile(alignment[:, category], pictures.RANGE)
        assert (panel[:, height:] == pictures.legend(width, low, high)).all()
    nameless = pictures.overlay_strongest(clip, alignment, GRID)[:, :height, :width]
    heat = pictures.tokens_to_frames(pictures.stretch(alignment[:, 3]), GRID, (9, 16, 32))
    expected = pictures.enlarge(pictures.overlay(clip, heat))
    assert (nameless == pictures.write_name(expected, "routing: map 4 of 17")).all()


def test_overlay_strongest_shows_at_most_three_and_one_where_no_peak_is_positive():
    clip = np.zeros((9, 16, 32, 3), np.uint8)
    for alignment, maps in ((np.ones((24, 17)), 3), (-np.ones((24, 17)), 1), (np.ones((24, 1)), 1)):
        assert pictures.overlay_strongest(clip, alignment, GRID).shape[2] == maps * 256


def test_the_ends_of_a_legend_do_not_touch():
    ramp = pictures.legend(pictures.PANEL, -0.00123, -12345.678)
    plain = (matplotlib.colormaps["inferno"](np.linspace(0, 1, pictures.PANEL))[:, :3] * 255).astype(np.uint8)
    written = np.flatnonzero((ramp != plain).any((0, 2)))
    assert written.min() >= 2 and written.max() < pictures.PANEL - 2 and np.diff(written).max() > 30


def test_long_names_are_wrapped_within_the_picture():
    black = np.zeros((1, 64, pictures.PANEL, 3), np.uint8)
    wide = pictures.write_name(black, "MWMW " * 12)
    assert wide.any() and not wide[:, :, -4:].any()  # nothing is cut
    assert pictures.write_name(black, "collision")[:, 24:].max() == 0 < wide[:, 24:].max()


def test_webp_is_lossless_and_keeps_time():
    clip = frames(np.random.default_rng(3))
    file = io.BytesIO()
    pictures.save_webp(file, clip, fps=8)
    image = Image.open(file)
    assert image.n_frames == 9 and image.info["loop"] == 0
    for frame, expected in zip(ImageSequence.Iterator(image), clip, strict=True):
        np.testing.assert_array_equal(np.asarray(frame.convert("RGB")), expected)
        assert frame.info["duration"] == 125
