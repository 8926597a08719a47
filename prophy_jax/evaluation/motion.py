"""An evaluator: how much the generated clip moves. b clips, F H W video."""

from collections.abc import Mapping

import numpy as np

from prophy_jax.evaluation.evaluator import Clips, Evaluator, Metric


class Motion(Evaluator):
    """The evaluator."""

    metrics = {
        "motion": Metric("mean absolute difference of consecutive generated frames, in levels of 255", None)
    }

    def score(self, clips: Clips) -> Mapping[str, np.ndarray]:
        frames = clips.generated.astype(np.float32)
        if frames.shape[1] < 2:
            return {"motion": np.full(len(frames), np.nan)}
        return {"motion": np.abs(np.diff(frames, axis=1)).mean((1, 2, 3, 4))}


def build() -> Motion:
    """The evaluator of `dict(module="motion")`."""
    return Motion()
