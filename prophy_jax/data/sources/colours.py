"""Video in wide or HDR colours, brought to what an SDR screen shows: BT.709 primaries, gamma 2.4.

HDR (PQ and HLG, ITU-R BT.2100) becomes light in cd/m2 and then SDR: reference white of HDR, 203 cd/m2
(ITU-R BT.2408), counts as 1; the "mobius" curve of FFmpeg's tonemap filter leaves what is below 0.3 as it is
and brings up to 1,000 cd/m2 into range; what is brighter is white. This is `zscale=t=linear:npl=203,
zscale=p=bt709,tonemap=mobius:desat=0:peak=4.926,zscale=t=bt709` of the ffmpeg program, which PyAV lacks.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from prophy_jax.run.errors import UserError

# The code points of ITU-T H.273.
PQ, HLG = 16, 18
BT2020, DISPLAY_P3 = 9, 12
CONVERTED_BY_FFMPEG = (0, 1, 2, 3, 4, 5, 6, 7, 9)  # matrices; it takes any other for BT.601
# To linear BT.709 from linear light of these primaries, all with white D65.
TO_BT709 = {
    BT2020: (
        (1.660491, -0.587641, -0.072850),
        (-0.124550, 1.132900, -0.008349),
        (-0.018151, -0.100579, 1.118730),
    ),
    DISPLAY_P3: ((1.224940, -0.224940, 0.0), (-0.042057, 1.042057, 0.0), (-0.019638, -0.078636, 1.098274)),
}
WHITE, PEAK, KNEE = 203.0, 1000.0, 0.3  # cd/m2, cd/m2, share of white
GAMMA = 2.4  # of an SDR screen, ITU-R BT.1886


def converter(frame: Any, name: str) -> Callable[[np.ndarray], np.ndarray] | None:
    """What brings RGB of a PyAV frame, float32 (H,W,3) in [0, 1], to uint8 of BT.709; None where it is that.

    Raises UserError where the frame's colours cannot be read as RGB.
    """
    matrix, transfer, primaries = (int(x) for x in (frame.colorspace, frame.color_trc, frame.color_primaries))
    if matrix not in CONVERTED_BY_FFMPEG:
        raise UserError(f"{name}: colours: a matrix that cannot be converted (number {matrix} of H.273)")
    if transfer not in (PQ, HLG) and primaries not in TO_BT709:
        return None
    to_linear = {PQ: _linear_pq, HLG: _linear_hlg}.get(transfer)
    to_bt709 = np.float32(TO_BT709.get(primaries, np.eye(3)))

    def convert(rgb: np.ndarray) -> np.ndarray:
        rgb = np.clip(rgb, 0, 1)  # resizing overshoots
        linear = to_linear(rgb) / WHITE if to_linear else rgb**GAMMA
        linear = np.maximum(linear @ to_bt709.T, 0)  # (H, W, 3)
        if to_linear:
            linear = _tone_map(linear)
        return np.uint8(np.rint(255 * np.minimum(linear, 1) ** (1 / GAMMA)))

    return convert


def _linear_pq(rgb: np.ndarray) -> np.ndarray:
    """cd/m2, by the EOTF of SMPTE ST 2084."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = rgb ** (1 / m2)
    return 10_000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)


def _linear_hlg(rgb: np.ndarray) -> np.ndarray:
    """cd/m2 on a screen of `PEAK`, by the inverse OETF and the OOTF of BT.2100."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(rgb <= 0.5, rgb**2 / 3, (np.exp((rgb - c) / a) + b) / 12)
    luminance = scene @ np.float32([0.2627, 0.6780, 0.0593])
    return PEAK * scene * luminance[..., None] ** 0.2


def _tone_map(linear: np.ndarray) -> np.ndarray:
    """Compresses the largest of R, G and B, and the others by the same factor, so that hues stay."""
    peak = PEAK / WHITE
    a = -(KNEE**2) * (peak - 1) / (KNEE**2 - 2 * KNEE + peak)
    b = (KNEE**2 - 2 * KNEE * peak + peak) / (peak - 1)
    largest = np.maximum(linear.max(-1, keepdims=True), 1e-6)
    bright = np.minimum(largest, peak)
    curve = (b**2 + 2 * b * KNEE + KNEE**2) / (b - a) * (bright + a) / (bright + b)
    return linear * np.where(largest > KNEE, curve / largest, 1)
