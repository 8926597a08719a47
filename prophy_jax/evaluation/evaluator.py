"""What an evaluator is: a file of this package that `config.evaluators` names, which scores held-out prompts.

The file has a function `build`, which makes it from the arguments of the configuration:
`config.evaluators.NAME = dict(module=FILE, ...)`.

b clips of a batch, S noise levels, F H W video, E categories.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Metric(NamedTuple):
    """What a score says, and whether a higher one is better; None where neither is."""

    text: str
    higher_is_better: bool | None


class Clips(NamedTuple):
    """What was sampled and measured of a batch of held-out prompts."""

    captions: Sequence[str]  # b
    category: np.ndarray  # (b, E)
    rows: Sequence[Mapping[str, Any]]  # b, of the records, as they are stored
    generated: np.ndarray  # (b, F, H, W, 3) uint8
    real: np.ndarray  # (b, F, H, W, 3) uint8, the clips of the records
    loss: np.ndarray  # (b, S), of the real clips, at `evaluation.diffusion.SIGMAS`
    fps: float


class Evaluator:
    """Scores clips, a batch at a time.

    Attributes:
        metrics: Those that it gives, by name.
    """

    metrics: Mapping[str, Metric] = {}

    def score(self, clips: Clips) -> Mapping[str, np.ndarray]:
        """For each of `metrics` an array (b,); NaN where it cannot be measured of a clip."""
        raise NotImplementedError
