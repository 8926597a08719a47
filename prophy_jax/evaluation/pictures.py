"""Which clips to show, and token maps as pictures over a clip.

F H W video, M clips, T' H' W' token grid, N = T' H' W' tokens, E categories. Causal timing: latent 0 is
frame 0, latent k is frames 4k-3 to 4k.
"""

import textwrap
from collections.abc import Sequence

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

PANEL = 256  # pixels: narrower clips are enlarged before anything is written on them
LEGEND = 20  # pixels
STRONGEST = 3  # maps side by side at most
RANGE = 0.5, 0.99  # quantiles of a map that are its lowest and its highest colour


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


def enlarge(frames: np.ndarray) -> np.ndarray:
    """(F, H, W, 3) with each pixel repeated both ways until the width is at least PANEL."""
    times = -(-PANEL // frames.shape[2])
    return frames.repeat(times, axis=1).repeat(times, axis=2)


def write_name(frames: np.ndarray, name: str) -> np.ndarray:
    """uint8 frames (F, H, W, 3), W at least PANEL, with a name at the upper left, wrapped to fit."""
    images = [Image.fromarray(frame) for frame in frames]
    place, style = (4, 2), {"font_size": 13, "stroke_width": 2}
    pens = [ImageDraw.Draw(image) for image in images]
    for letters in range(frames.shape[2] // 6, 0, -1):
        lines = "\n".join(textwrap.wrap(name, letters))
        if pens[0].multiline_textbbox(place, lines, **style)[2] <= frames.shape[2] - 4:
            break
    for pen in pens:
        pen.text(place, lines, fill="white", stroke_fill="black", **style)
    return np.stack([np.asarray(image) for image in images])


def legend(width: int, low: float, high: float) -> np.ndarray:
    """uint8 (LEGEND, width, 3): the colours of `overlay`, with the values of both ends."""
    ramp = matplotlib.colormaps["inferno"](np.linspace(0, 1, width))[None, :, :3] * 255  # (1, width, 3)
    image = Image.fromarray(ramp.astype(np.uint8).repeat(LEGEND, 0))
    draw = ImageDraw.Draw(image)
    middle = LEGEND // 2
    draw.text((4, middle), f"low: {low:.2g}", fill="white", anchor="lm", font_size=12)
    draw.text((width - 4, middle), f"high: {high:.2g}", fill="black", anchor="rm", font_size=12)
    return np.asarray(image)


def overlay_strongest(
    frames: np.ndarray, alignment: np.ndarray, grid: tuple[int, int, int], names: Sequence[str] = ()
) -> np.ndarray:
    """Frames (F, H, W, 3) under the maps of the categories whose P'_r (N, E) peaks highest, side by side.

    Those that peak at half of the highest peak or more are shown, the highest first, at most STRONGEST. Each
    map has its own range, which the `legend` below says; above is its name, from `names` of all E categories.

    Returns:
        uint8 (F, H' + LEGEND, maps W', 3), of clips that `enlarge` made H' x W'.
    """
    peaks = alignment.max(0)
    order = np.argsort(-peaks, kind="stable")[:STRONGEST]
    panels = []
    for index in [order[0], *(e for e in order[1:] if peaks[e] >= peaks[order[0]] / 2 > 0)]:
        tokens = alignment[:, index]
        heat = tokens_to_frames(stretch(tokens), grid, frames.shape[:3])
        panel = enlarge(overlay(frames, heat))
        name = names[index] if names else f"map {index + 1} of {len(peaks)}"
        below = legend(panel.shape[2], *np.quantile(tokens, RANGE))[None].repeat(len(frames), 0)
        panels.append(np.concatenate([write_name(panel, f"routing: {name}"), below], axis=1))
    return np.concatenate(panels, axis=2)


def stretch(tokens: np.ndarray) -> np.ndarray:
    """Token values over their own range: the median and below become 0, the 99th percentile becomes 1."""
    low, high = np.quantile(tokens, RANGE)
    return np.clip((tokens - low) / max(high - low, 1e-6), 0, 1)


def save_webp(file, frames: np.ndarray, fps: float) -> None:
    """Writes frames (F, H, W, 3) as a lossless animated WebP, endlessly repeated, to a path or file."""
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(
        file, "WEBP", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0,
        lossless=True, method=4,
    )  # fmt: skip
