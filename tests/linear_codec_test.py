"""The fixed codec: what it loses, and that it is linear, orthonormal and causal."""

import numpy as np
import pytest

from benchmarks.sandbox import measure_tables
from prophy_jax import models
from prophy_jax.data.sandbox.clip import make_clip
from prophy_jax.models.codecs import linear_codec
from prophy_jax.run.errors import NotFinite, UserError


def psnr(clip: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 clips of one shape, in dB."""
    error = np.mean((clip.astype(np.float32) - other.astype(np.float32)) ** 2)
    return float(10 * np.log10(255**2 / np.maximum(error, 1e-10)))


@pytest.fixture(scope="module")
def codec() -> linear_codec.LinearCodec:
    return models.build({"module": "linear_codec"})


@pytest.fixture(scope="module")
def held_out() -> np.ndarray:
    return np.stack([make_clip(0, "test", index).frames for index in range(96)])


def test_psnr_on_held_out_clips(codec, held_out):
    decoded = codec.decode(codec.encode(held_out))
    scores = [psnr(a, b) for a, b in zip(held_out, decoded, strict=True)]
    assert np.mean(scores) >= 28
    assert np.min(scores) >= 25


def test_latents_are_normalised(codec, held_out):
    latents = codec.encode(held_out)  # (96, 4, 16, 16, 16)
    assert latents.shape == (96, 4, 16, 16, 16) and latents.dtype == np.float32
    for part in (latents[:, 0], latents[:, 1:].reshape(-1, 16, 16, 16)):
        # 96 clips hold 200 scenes: sampling errors of a mean or deviation are 5 to 10 percent.
        assert np.all(np.abs(part.mean((0, 1, 2))) < 0.15)
        assert abs((part**2).mean() - 1) < 0.1  # variances average to 1
    for row, part in enumerate((latents[:, 0], latents[:, 1:].reshape(-1, 16, 16, 16))):
        own = np.array(linear_codec.STD[row])
        np.testing.assert_allclose(part.std((0, 1, 2)), np.sqrt(own / own.mean()), rtol=0.25)


def test_basis_is_orthonormal(codec):
    for basis in (codec.first, codec.later):
        np.testing.assert_allclose(basis @ basis.T, np.eye(16), atol=1e-5)  # float32 rounding


def test_decode_inverts_encode_on_smooth_clips(codec):
    y, x = np.mgrid[:16, :24]
    grey = (90 + 2 * x + 3 * y).astype(np.uint8)
    clip = np.broadcast_to(grey[None, ..., None], (9, 16, 24, 3))
    error = codec.decode(codec.encode(clip)).astype(int) - clip
    assert np.abs(error).max() <= 2  # two grey levels: the dropped cosines of a ramp


def test_is_linear_but_for_the_mean(codec, held_out):
    a, b = held_out[0] // 2, held_out[1] // 2  # halves, so that the sum stays a uint8
    zero = codec.encode(np.zeros_like(a))
    total = codec.encode(a) + codec.encode(b) - zero
    np.testing.assert_allclose(codec.encode(a + b), total, atol=1e-3)  # float32, values up to 25


def test_timing_is_causal(codec, held_out):
    clip = held_out[0].copy()
    before = codec.encode(clip)
    clip[5:] = 255 - clip[5:]  # frames 5..8 are latent 2
    after = codec.encode(clip)
    np.testing.assert_array_equal(before[:2], after[:2])
    assert np.abs(before[2] - after[2]).max() > 1
    np.testing.assert_allclose(codec.encode(clip[:1]), after[:1], atol=1e-5)


def test_one_frame_is_a_clip(codec, held_out):
    picture = held_out[0, :1]
    decoded = codec.decode(codec.encode(picture))
    assert decoded.shape == picture.shape
    assert psnr(picture, decoded) > 30


def test_batch_equals_one_by_one(codec, held_out):
    batch = codec.encode(held_out[:2])
    np.testing.assert_allclose(batch[1], codec.encode(held_out[1]), atol=1e-5)
    np.testing.assert_array_equal(codec.decode(batch)[1], codec.decode(batch[1]))


def test_tables_match_the_sandbox():
    clips = [make_clip(0, "train", index).frames for index in range(24)]
    tables = measure_tables(clips)
    # 24 clips rank the weakest coefficients differently than the 400 of the tables.
    for name in ("FIRST", "LATER"):
        assert len(set(tables[name]) & set(getattr(linear_codec, name))) >= 13
    assert np.shape(tables["MEAN"]) == np.shape(linear_codec.STD) == (2, 16)


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((12, 16, 16, 3), np.uint8),
        ((5, 20, 16, 3), np.uint8),
        ((5, 16, 12, 3), np.uint8),
        ((5, 16, 16, 4), np.uint8),
        ((16, 16, 3), np.uint8),
        ((5, 0, 16, 3), np.uint8),
        ((5, 16, 16, 3), np.float32),
    ],
)
def test_wrong_frames_raise(codec, shape, dtype):
    with pytest.raises(UserError, match="linear codec"):
        codec.encode(np.zeros(shape, dtype))


@pytest.mark.parametrize("size", [(5, 0, 16), (5, 16, -8), (-3, 16, 16), (0, 16, 16)])
def test_sizes_that_are_none_raise(codec, size):
    with pytest.raises(UserError, match="linear codec: .* all above 0, got "):
        codec.latent_shape(*size)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_frames_that_are_not_finite_raise(codec, value):
    latents = np.zeros((3, 2, 4, 4, 16), np.float32)
    latents[1, 1, 0, 0, 0] = value
    with pytest.raises(NotFinite, match="NaN or infinity") as caught:
        codec.decode(latents)
    assert caught.value.rows == [1]
    with pytest.raises(NotFinite):
        codec.decode(latents[1])


def test_wrong_latents_raise(codec):
    with pytest.raises(UserError, match="16"):
        codec.decode(np.zeros((2, 4, 4, 8), np.float32))
