"""Which clips to show, and token maps as pictures over a clip.

F H W video, M clips, T' H' W' token grid, N = T' H' W' tokens, E categories. Causal timing: latent 0 is
frame 0, latent k is frames 4k-3 to 4k.
"""

from collections.abc import Sequence

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

LEGEND = 16  # pixels


def choose_clips(category: np.ndarray, sizes: Sequence[int]) -> list[int]:
    """Clips with `sizes` phenomena, each time one with the most phenomena that none shows so far.

    Where no clip has the wanted number, any will do; ties go to the first.

    Args:
        category: (M, E), which phenomena each clip shows.
        sizes: How many phenomena each chosen clip should show.
    """
    chosen: list[int] = []
    for size in sizes[: len(category)]:
        new = ~category[chosen].any(0)  # (E,)
        score = (category[:, new] > 0).sum(1) + 100 * (category.sum(1) == size)
        score[chosen] = -1
        chosen.append(int(score.argmax()))
    return chosen


def tokens_to_frames(
    tokens: np.ndarray, grid: tuple[int, int, int], shape: tuple[int, int, int]
) -> np.ndarray:
    """(N,) token values -> (F, H, W) float32, each token repeated over the pixels and frames it covers."""
    frames, height, width = shape
    maps = np.asarray(tokens, np.float32).reshape(grid)  # (N,) -> (T', H', W')
    maps = maps.repeat(height // grid[1], axis=1).repeat(width // grid[2], axis=2)
    latent_of_frame = (np.arange(frames) + 3) // 4
    return maps[latent_of_frame]


def overlay(frames: np.ndarray, heat: np.ndarray, opacity: float = 0.65) -> np.ndarray:
    """uint8 frames (F, H, W, 3) under a heat map (F, H, W) in [0, 1]; what is cold stays visible."""
    colour = matplotlib.colormaps["inferno"](np.clip(heat, 0, 1))[..., :3] * 255  # (F, H, W, 3)
    alpha = opacity * np.clip(heat, 0, 1)[..., None]
    grey = frames.mean(-1, keepdims=True)  # the clip in grey, so that the colours are the map's
    return ((1 - alpha) * grey + alpha * colour).astype(np.uint8)


def legend(width: int, index: int, experts: int) -> np.ndarray:
    """uint8 (LEGEND, width, 3): the colours of `overlay` from low to high, and which map is shown."""
    ramp = matplotlib.colormaps["inferno"](np.linspace(0, 1, width))[None, :, :3] * 255  # (1, width, 3)
    image = Image.fromarray(ramp.astype(np.uint8).repeat(LEGEND, 0))
    draw = ImageDraw.Draw(image)
    draw.text((2, 2), "low", fill="white")
    draw.text((width - 26, 2), "high", fill="black")
    if width >= 160:  # otherwise the words would not fit
        draw.text((width // 2, 2), f"map {index + 1} of {experts}", fill="white", anchor="ma")
    return np.asarray(image)


def overlay_strongest(frames: np.ndarray, alignment: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """Frames (F, H, W, 3) under the map of the category whose P'_r (N, E) peaks highest, over its own range.

    Returns uint8 (F, H + LEGEND, W, 3), with the `legend` below.
    """
    index = int(alignment.max(0).argmax())
    shown = overlay(frames, tokens_to_frames(stretch(alignment[:, index]), grid, frames.shape[:3]))
    below = legend(frames.shape[2], index, alignment.shape[1])[None].repeat(len(frames), 0)
    return np.concatenate([shown, below], axis=1)


def stretch(tokens: np.ndarray) -> np.ndarray:
    """Token values over their own range: the median and below become 0, the 99th percentile becomes 1."""
    low, high = np.quantile(tokens, (0.5, 0.99))
    return np.clip((tokens - low) / max(high - low, 1e-6), 0, 1)


def save_webp(file, frames: np.ndarray, fps: float) -> None:
    """Writes frames (F, H, W, 3) as a lossless animated WebP, endlessly repeated, to a path or file."""
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(
        file, "WEBP", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0,
        lossless=True, method=4,
    )  # fmt: skip
