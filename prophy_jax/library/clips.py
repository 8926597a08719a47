"""What a pipeline returns: clips, to look at, to save, and to read the token routing of.

B clips, F H W video, T h w latent grid, N = T' h' w' token grid, E categories.
"""

import base64
import dataclasses
import functools
import html
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from prophy_jax.data.sources import video
from prophy_jax.evaluation import pictures
from prophy_jax.library.arguments import own_words
from prophy_jax.run import storage
from prophy_jax.run.errors import UserError


@dataclasses.dataclass(frozen=True, repr=False)
class Clips:
    """Clips of B prompts; what `Pipeline.sample` returns.

    Attributes:
        frames: (B, F, H, W, 3) uint8, RGB, 0 to 255.
        latents: (B, T, h, w, 16) float32, normalised.
        prompts: Of the clips.
        fps: Frames per second.
        settings: How they were made: seed, steps, guidance and so on.
    """

    frames: np.ndarray
    latents: np.ndarray
    prompts: tuple[str, ...]
    fps: float
    settings: Mapping[str, Any]
    _look: Callable[[], tuple[tuple[str, ...], np.ndarray] | None]

    def __len__(self) -> int:
        return len(self.frames)

    def __repr__(self) -> str:
        return f"Clips(frames {self.frames.shape}, {self.fps:g} fps, {list(self.prompts)})"

    @functools.cached_property
    def _routing(self) -> tuple[tuple[str, ...], np.ndarray]:
        with own_words():
            found = self._look()
        if found is None:
            raise UserError("this pipeline has no part that routes tokens: load one with branch=FOLDER")
        return found

    @property
    def routing(self) -> np.ndarray:
        """Token routing (B, T', h', w', E) float32: how much of each category is there, of targets in 0 to 1.

        The first use computes it: the model looks once at each finished clip, under a fifth of noise, with
        every scale at 1. Raises UserError where no part routes tokens.
        """
        return self._routing[1]

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the E categories of `routing`. Raises UserError where no part routes tokens."""
        return self._routing[0]

    def save(self, path: str | os.PathLike, routing: bool = False) -> list[str]:
        """Writes H.264 videos: one clip to a file NAME.mp4, or any number to a folder, as 0000.mp4, 0001.mp4.

        Existing files are replaced.

        Args:
            path: The file or the folder, which is made.
            routing: Also NAME_routing.mp4, the clip with the routing of its strongest categories laid over.

        Returns:
            The files.

        Raises:
            UserError: several clips for one file, another ending than .mp4, a place that cannot be
                written, or no part that routes.
        """
        start, ending = os.path.splitext(os.fspath(path))
        if ending not in ("", ".mp4"):
            raise UserError(f"{path}: clips are saved as .mp4, or into a folder")
        if ending and len(self) > 1:
            raise UserError(f"{path} is one file for {len(self)} clips: name a folder")
        starts = [start] if ending else [os.path.join(path, f"{row:04d}") for row in range(len(self))]
        if routing:
            self._routing  # noqa: B018  (raises before anything is written)
        written = []
        for row, start in enumerate(starts):
            try:
                storage.path(os.path.dirname(start) or ".").mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{path} cannot be made: {error.strerror}") from error
            written.append(f"{start}.mp4")
            video.write_mp4(written[-1], self.frames[row], self.fps)
            if routing:
                written.append(f"{start}_routing.mp4")
                video.write_mp4(written[-1], self._overlay(row), self.fps)
        return written

    def show(self, routing: bool = False) -> "Player":
        """The clips as a notebook shows them, with the routing laid over if `routing`."""
        shown = [self._overlay(row) if routing else self.frames[row] for row in range(len(self))]
        return Player(shown, self.prompts, self.fps)

    def _overlay(self, row: int) -> np.ndarray:
        maps = self.routing[row]
        tokens = maps.reshape(-1, maps.shape[-1])  # (T', h', w', E) -> (N, E)
        return pictures.overlay_strongest(self.frames[row], tokens, maps.shape[:3], self.categories)


class Player:
    """Videos for a notebook, which shows what `_repr_html_` returns. Small ones are enlarged."""

    def __init__(self, clips: Sequence[np.ndarray], prompts: Sequence[str], fps: float) -> None:
        elements = []
        with tempfile.TemporaryDirectory() as folder:
            for clip, prompt in zip(clips, prompts, strict=True):
                path = os.path.join(folder, "clip.mp4")
                video.write_mp4(path, clip, fps)
                with open(path, "rb") as file:
                    data = base64.b64encode(file.read()).decode()
                elements.append(
                    f'<video controls loop autoplay muted width="{max(clip.shape[2], pictures.PANEL)}" '
                    f'style="image-rendering: pixelated" title="{html.escape(prompt)}" '
                    f'src="data:video/mp4;base64,{data}"></video>'
                )
        self._html = "\n".join(elements)

    def _repr_html_(self) -> str:
        return self._html
