"""A fixed linear space-time codec: it stands in for a video VAE on sandbox clips.

Each latent holds 16 coefficients of an orthonormal discrete cosine transform over time, rows,
columns and (red, green, blue). Timing is causal, as in the video VAEs: latent 0 codes frame 0
alone, latent k the frames 4k-3 .. 4k. NumPy only; nothing is trained.

Legend: F frames, H W pixels, T = (F-1)/4 + 1 latent times, h = H/4, w = W/4.
"""

import numpy as np

from prophy_jax.run.errors import NotFinite, UserError

STRIDE = 4  # pixels a side, and frames per latent after the first
CHANNELS = 16
# fmt: off
# The chosen coefficients as (time, row, column, colour) frequencies, one per channel: 16 of 48 for
# latent 0, 16 of 192 for the others. benchmarks/sandbox.py found them, and the statistics below, on 400
# training clips.
FIRST = (
    (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 1, 2),
    (0, 1, 0, 2), (0, 0, 1, 1), (0, 1, 0, 1), (0, 0, 2, 0), (0, 1, 1, 0), (0, 2, 0, 0),
    (0, 2, 0, 1), (0, 0, 2, 1), (0, 3, 0, 0), (0, 0, 3, 0),
)
LATER = (
    (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2), (0, 1, 0, 0), (0, 0, 1, 0), (1, 0, 0, 0),
    (1, 0, 0, 1), (0, 0, 1, 1), (0, 1, 0, 1), (0, 0, 2, 0), (2, 0, 0, 0), (0, 2, 0, 0),
    (1, 0, 0, 2), (1, 1, 0, 0), (2, 0, 0, 1), (0, 0, 3, 0),
)
# Of the coefficients: one row for latent 0, one for the others.
MEAN = (
    (
        -0.9225, -0.2771, 0.0555, -0.0026, 0.0007, -0.0002, 0.0, 0.0003,
        -0.0132, -0.0014, 0.0, 0.0267, -0.004, -0.0016, -0.0038, -0.0,
    ),
    (
        -1.679, -0.4362, 0.1077, -0.0096, 0.0012, -0.0114, -0.0137, -0.0,
        -0.0287, -0.0003, -0.0069, 0.052, 0.0, -0.0005, -0.0034, 0.0002,
    ),
)
STD = (
    (
        1.4337, 0.9335, 0.4993, 0.4074, 0.3462, 0.128, 0.1105, 0.2364,
        0.2003, 0.1871, 0.1078, 0.1669, 0.0947, 0.0852, 0.074, 0.1163,
    ),
    (
        3.197, 1.7859, 0.9059, 0.76, 0.6771, 0.5619, 0.4428, 0.4303,
        0.3599, 0.3468, 0.3025, 0.2849, 0.2701, 0.251, 0.2309, 0.2153,
    ),
)
# fmt: on


def _cosines(n: int) -> np.ndarray:
    """(n, n) orthonormal discrete cosine transform (type II); row k has frequency k."""
    k, i = np.arange(n)[:, None], np.arange(n)
    rows = np.sqrt(2 / n) * np.cos(np.pi * k * (2 * i + 1) / (2 * n))
    rows[0] /= np.sqrt(2)
    return rows


def basis(frames: int) -> np.ndarray:
    """Every basis vector of a patch: (frames, 4, 4, 3 frequencies, frames * 4 * 4 * 3 pixels)."""
    time, space, colour = _cosines(frames), _cosines(STRIDE), _cosines(3)
    whole = np.einsum("ta,yb,xc,kd->tyxkabcd", time, space, space, colour)
    return whole.reshape(frames, STRIDE, STRIDE, 3, -1)


def patches(video: np.ndarray, frames: int) -> np.ndarray:
    """(..., n frames, H, W, 3) -> (..., n, h, w, frames * 4 * 4 * 3)."""
    *lead, _, height, width, _ = video.shape
    h, w, b = height // STRIDE, width // STRIDE, len(lead)
    split = video.reshape(*lead, -1, frames, h, STRIDE, w, STRIDE, 3)
    order = [*range(b), *(b + axis for axis in (0, 2, 4, 1, 3, 5, 6))]  # n h w frames 4 4 3
    return split.transpose(order).reshape(*lead, split.shape[b], h, w, -1)


def _unpatch(patches: np.ndarray, frames: int) -> np.ndarray:
    """The inverse of `patches`."""
    *lead, n, h, w, _ = patches.shape
    b = len(lead)
    split = patches.reshape(*lead, n, h, w, frames, STRIDE, STRIDE, 3)
    order = [*range(b), *(b + axis for axis in (0, 3, 1, 4, 2, 5, 6))]  # n frames h 4 w 4 3
    return split.transpose(order).reshape(*lead, n * frames, h * STRIDE, w * STRIDE, 3)


class LinearCodec:
    """`encode` and `decode`; both take any leading batch dimensions.

    On clips from the sandbox's test split, `decode(encode(clip))` has a PSNR of 31.5 dB, the mean
    of 300 clips of 64 x 64 pixels and 13 frames (lowest 26.8).
    """

    def __init__(self) -> None:
        first, later = basis(1), basis(STRIDE)
        self.first = np.stack([first[c] for c in FIRST]).astype(np.float32)  # (16, 48)
        self.later = np.stack([later[c] for c in LATER]).astype(np.float32)  # (16, 192)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(T, h, w, 16) of a clip of that size. Raises UserError on a size that `encode` would refuse."""
        if min(frames, height, width) < 1 or frames % STRIDE != 1 or height % 8 or width % 8:
            raise UserError(
                "linear codec: F must be 4n + 1 and H, W multiples of 8, all above 0, got "
                f"{(frames, height, width)}; cut or resize the clip"
            )
        return (frames - 1) // STRIDE + 1, height // STRIDE, width // STRIDE, CHANNELS

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """(..., F, H, W, 3) uint8 -> (..., T, h, w, 16) float32: zero mean, unit variance on average.

        Raises UserError unless F = 4n + 1 and H, W are multiples of 8.
        """
        shape = frames.shape
        if frames.dtype != np.uint8 or frames.ndim < 4 or shape[-1] != 3:
            raise UserError(f"linear codec: frames must be (F, H, W, 3) uint8, got {shape} {frames.dtype}")
        self.latent_shape(*shape[-4:-1])
        video = frames.astype(np.float32) / 127.5 - 1
        raw = patches(video[..., :1, :, :, :], 1) @ self.first.T
        if shape[-4] > 1:
            later = patches(video[..., 1:, :, :, :], STRIDE) @ self.later.T
            raw = np.concatenate([raw, later], axis=-4)
        mean, std = _statistics(raw.shape[-4])
        return (raw - mean) / std

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """(..., T, h, w, 16) -> (..., F, H, W, 3) uint8: the least-squares inverse, clipped.

        Raises UserError on another number of channels, `NotFinite` where a frame would be NaN or infinite.
        """
        latents = np.asarray(latents, np.float32)
        if latents.ndim < 4 or latents.shape[-1] != CHANNELS:
            raise UserError(f"linear codec: latents must be (T, h, w, 16), got {latents.shape}")
        mean, std = _statistics(latents.shape[-4])
        raw = latents * std + mean
        head = _unpatch(raw[..., :1, :, :, :] @ self.first, 1)
        tail = _unpatch(raw[..., 1:, :, :, :] @ self.later, STRIDE)
        video = np.concatenate([head, tail], axis=-4)
        finite = np.isfinite(video).all(axis=(-4, -3, -2, -1)).reshape(-1)
        if not finite.all():
            raise NotFinite("frames came out as NaN or infinity of the latents", np.flatnonzero(~finite))
        return np.clip((video + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)


def _statistics(times: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and divisor of each latent, (T, 1, 1, 16) float32.

    The divisor is the geometric mean of the channel's own deviation and the average one: variances
    average to 1 and spread less than before. Dividing by each channel's own deviation would give
    fine detail, which is zero almost everywhere and large at edges, the weight of the rest.
    """
    rows = np.minimum(np.arange(times), 1)  # row 0 for latent 0, row 1 for all others
    mean, std = np.asarray((MEAN, STD), np.float32)[:, rows, None, None]
    return mean, np.sqrt(std * std.mean(-1, keepdims=True))


def build() -> LinearCodec:
    """The codec; it has no settings."""
    return LinearCodec()
