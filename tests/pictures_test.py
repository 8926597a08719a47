"""Pictures over clips: timing, colours, and files that lose nothing."""

import io

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


def test_overlay_strongest_shows_the_category_with_the_highest_peak():
    clip = np.full((9, 16, 32, 3), 100, np.uint8)
    alignment = np.random.default_rng(1).uniform(0, 0.5, (24, 17))
    alignment[5, 3] = 0.9
    shown = pictures.overlay_strongest(clip, alignment, GRID)
    heat = pictures.tokens_to_frames(pictures.stretch(alignment[:, 3]), GRID, (9, 16, 32))
    np.testing.assert_array_equal(shown[:, :16], pictures.overlay(clip, heat))
    # Below, on every frame: from the colour of what is low to that of what is high.
    assert shown.shape == (9, 16 + pictures.LEGEND, 32, 3) and (shown[:, 16:] == shown[:1, 16:]).all()
    assert shown[0, -1, 0].sum() < 20 and shown[0, -1, -1].sum() > 500
    wide = [pictures.legend(320, index, 17) for index in (3, 4)]
    assert not np.array_equal(*wide)  # it says which map


def test_webp_is_lossless_and_keeps_time():
    clip = frames(np.random.default_rng(3))
    file = io.BytesIO()
    pictures.save_webp(file, clip, fps=8)
    image = Image.open(file)
    assert image.n_frames == 9 and image.info["loop"] == 0
    for frame, expected in zip(ImageSequence.Iterator(image), clip, strict=True):
        np.testing.assert_array_equal(np.asarray(frame.convert("RGB")), expected)
        assert frame.info["duration"] == 125
