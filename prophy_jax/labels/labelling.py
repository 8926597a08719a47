"""Labels of one clip: how the vision-language model sees it, what it is asked, and what its answers give.

T h w token grid, N = T h w tokens, T' H' W' grid of the model, E categories, P of a clip, F frames.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from ml_collections import ConfigDict

from prophy_jax.data import taxonomy
from prophy_jax.labels import targets, vlm
from prophy_jax.run.errors import UserError

DTYPES = ("bfloat16", "float16", "float32")
_CHOICES = {
    "heads": vlm.HEADS,
    "rows": vlm.ROWS,
    "tokens": vlm.TOKENS,
    "denoise": targets.DENOISE,
    "scale": targets.SCALE,
    "dtype": DTYPES,
}


def check_settings(settings: ConfigDict) -> None:
    """Raises UserError when a value of `config.label` does not exist; the layers depend on the model."""
    for key, allowed in _CHOICES.items():
        if settings[key] not in allowed:
            raise UserError(f"config.label.{key}={settings[key]!r}: choose one of {', '.join(allowed)}")
    for key in ("max_new_tokens", "every", "cell", "batch"):
        if settings[key] < 1:
            raise UserError(f"config.label.{key}={settings[key]}: must be at least 1")


def choose_layers(layers: Sequence[int | float], num_layers: int) -> tuple[int, ...]:
    """Indices of the layers meant: two fractions of the depth are a band, whole numbers are indices.

    (0.5, 0.85) of 28 layers is 14 to 23. Raises UserError on anything else.
    """
    whole = [isinstance(layer, int) for layer in layers]
    if layers and all(whole) and all(0 <= layer < num_layers for layer in layers):
        return tuple(sorted(set(layers)))
    if len(layers) == 2 and not any(whole) and 0 <= layers[0] <= layers[1] <= 1:
        low, high = (min(int(fraction * num_layers), num_layers - 1) for fraction in layers)
        return tuple(range(low, high + 1))
    raise UserError(
        f"config.label.layers={tuple(layers)}: give a band of the depth such as (0.5, 0.85), or indices "
        f"from 0 to {num_layers - 1}"
    )


def make_reading(settings: ConfigDict, layers: tuple[int, ...]) -> vlm.Reading:
    """The part of `config.label` that says which attention is read."""
    return vlm.Reading(layers, settings.heads, settings.rows, settings.tokens, settings.max_new_tokens)


class View(NamedTuple):
    """How clips of one size and length are shown: pairs of frames, each in cells of 28 x 28 pixels."""

    grid: tuple[int, int, int]  # T h w
    frames: list[int]
    cells: tuple[int, int]  # H' W'
    seconds: float  # from pair to pair

    @classmethod
    def of(
        cls,
        grid: Sequence[int],
        latents: int,
        frames: int,
        fps: float,
        every: int,
        cell: float,
        lead: int = 0,
    ) -> "View":
        """The view of clips that a causal codec encodes: frame 0 first, then equally many frames at a time.

        Args:
            grid: T h w.
            latents: how many there are in time; a token covers one or several.
            frames: F.
            fps: frames per second.
            every: which tokens in time are shown: each, every second, ...
            cell: tokens a side of a cell: with 2, 15 x 26 cells for 30 x 52.
            lead: latents before that of frame 0, as CogVideoX1.5 has them.
        """
        times, height, width = grid
        cells = tuple(max(1, int(side / cell + 0.5)) for side in (height, width))
        later = max(1, latents - 1 - lead)  # latents after that of frame 0
        stride = max(1, (frames - 1) // later)  # frames of each of them
        last = np.maximum(frames - 1 - stride * np.arange(latents)[::-1], 0)  # frame of each latent
        first = np.maximum(last - stride + 1, 0)
        tokens = latents // times  # latents of a token
        shown = middle_pairs(first[::tokens][::every], last[tokens - 1 :: tokens][::every])
        return cls((times, height, width), shown, cells, stride * tokens * every / fps)

    @property
    def shown(self) -> tuple[int, int, int]:
        """T' H' W'."""
        return len(self.frames) // 2, *self.cells


def middle_pairs(first: Sequence[int], last: Sequence[int]) -> list[int]:
    """The two frames in the middle of each range from `first` to `last` (included); a single one twice."""
    pairs = [(a + (b - a + 1) // 2 - (b > a), a + (b - a + 1) // 2) for a, b in zip(first, last, strict=True)]
    return [int(frame) for pair in pairs for frame in pair]


def ask(
    model: vlm.Vlm,
    clips: Sequence[np.ndarray],
    categories: Sequence[np.ndarray],
    view: View,
    reading: vlm.Reading,
    known: taxonomy.Taxonomy = taxonomy.WISA,
) -> list[list[vlm.Answer]]:
    """For each clip, an answer for each phenomenon present, and last the one to the background prompt.

    Args:
        model: the vision-language model.
        clips: uint8 (F, H, W, 3), all of one size.
        categories: (E,) of each clip.
        view: how they are shown.
        reading: which attention is read.
        known: the E categories and their questions.

    Raises:
        UserError: the memory does not suffice.
    """
    if not clips:
        return []
    asked = list(known.questions.values())
    questions = [[*(asked[e] for e in np.flatnonzero(own)), known.background] for own in categories]
    shown = [vlm.resize(frames[view.frames], view.cells) for frames in clips]
    try:
        return model.answer(shown, questions, view.seconds, reading)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the model runs out of memory: lower config.label.batch, or show fewer video tokens with a "
            "larger config.label.cell or config.label.every"
        ) from error


def make_targets(answers: Sequence[vlm.Answer], view: View, settings: Mapping[str, Any]) -> np.ndarray:
    """(P, N) float16 of one clip, from its answers as `ask` gives them."""
    *own, background = (answer.maps for answer in answers)
    how = settings["denoise"], settings["scale"], settings["every"]
    maps = [targets.target(maps, background, view.grid, *how) for maps in own]
    return np.stack(maps)
