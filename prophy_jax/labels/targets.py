"""From attention maps to the targets Q_r of the token alignment loss L_fine of ProPhy, in NumPy.

    raw maps, averaged over layers -> normalise -> denoise by the background -> resample to tokens -> scale

Normalising comes before subtracting: the share of attention that falls on the video differs between two
prompts, and would give the difference an offset that flips the sign mask of the loss everywhere. Attention
sinks, places that draw attention whatever is asked, are in both maps and cancel in the difference. Negative
values stay: the sign mask is the trainer's, and must follow the resampling.

T' H' W' grid of the vision-language model, T h w token grid of the diffusion model, N = T h w tokens.
"""

import numpy as np

DENOISE = ("difference", "ratio", "log_ratio", "none")
SCALE = ("max", "std")
FLOOR = 1e-3  # of a background map with mean 1: a ratio does not blow up where nobody looks


def normalise(attention: np.ndarray) -> np.ndarray:
    """A map of mean 1 over the video; zeros stay zeros."""
    mean = attention.mean(dtype=np.float64)
    return attention / mean if mean > 0 else np.zeros_like(attention)


def denoise(attention: np.ndarray, background: np.ndarray, how: str) -> np.ndarray:
    """What a map A shows beyond the background map B; 0 is as much attention as the background has.

    "difference" A - B, the paper's; "ratio" A / B - 1; "log_ratio" log(A / B); "none" A as it is, which has
    no negative values. Both maps are normalised.
    """
    if how == "difference":
        return attention - background
    if how == "ratio":
        return attention / np.maximum(background, FLOOR) - 1
    if how == "log_ratio":
        return np.log(np.maximum(attention, FLOOR) / np.maximum(background, FLOOR))
    if how == "none":
        return attention
    raise ValueError(how)


def overlap(target: np.ndarray, source: np.ndarray) -> np.ndarray:
    """(targets, sources) share of each target cell that each source cell covers; rows sum to 1.

    Args:
        target: the edges of the target cells, (targets + 1,), rising.
        source: those of the source cells, (sources + 1,), with the same ends.
    """
    low = np.maximum(target[:-1, None], source[None, :-1])
    high = np.minimum(target[1:, None], source[None, 1:])
    return np.maximum(high - low, 0) / np.diff(target)[:, None]


def time_edges(times: int, every: int) -> np.ndarray:
    """Edges, in tokens, of the cells of a video sampled at token 0, every, 2 every, ... of `times`.

    A cell reaches half way to its neighbours, the first and the last to the ends of the clip.
    """
    centres = np.arange(0, times, every) + 0.5
    return np.concatenate([[0], (centres[1:] + centres[:-1]) / 2, [times]])


def resample(cells: np.ndarray, grid: tuple[int, int, int], every: int = 1) -> np.ndarray:
    """(T', H', W') -> (T, h, w): each token the mean over the area and the time that it covers.

    Both grids span the same frame. T' is the number of times sampled, every `every`-th of T.
    """
    edges = [(np.arange(grid[0] + 1.0), time_edges(grid[0], every))]
    edges += [
        (np.linspace(0, 1, own + 1), np.linspace(0, 1, their + 1))
        for own, their in zip(grid[1:], cells.shape[1:], strict=True)
    ]
    return np.einsum("abc,ta,hb,wc->thw", cells, *(overlap(*pair) for pair in edges), optimize=True)


def scaled(tokens: np.ndarray, how: str) -> np.ndarray:
    """Divided by its largest magnitude ("max") or its standard deviation ("std"); zeros stay zeros."""
    size = np.abs(tokens).max() if how == "max" else tokens.std()
    return tokens / size if size > 0 else tokens


def target(
    maps: np.ndarray, background: np.ndarray, grid: tuple[int, int, int], how: str, scale: str, every: int = 1
) -> np.ndarray:
    """The target of one phenomenon in one clip.

    Args:
        maps: (layers, T', H', W') attention of the answer, raw.
        background: the same of the answer to the background prompt.
        grid: (T, h, w).
        how: one of DENOISE.
        scale: one of SCALE.
        every: tokens in time per cell.

    Returns:
        (N,) float16, flattened t, h, w; in [-1, 1] when the scale is "max".
    """
    raw, other = (normalise(attention.mean(0, dtype=np.float64)) for attention in (maps, background))
    tokens = resample(denoise(raw, other, how), grid, every)
    return scaled(tokens, scale).astype(np.float16).reshape(-1)  # (T, h, w) -> (N,)
