"""An evaluator: the diffusion loss of held-out clips, mean over noise levels. b clips."""

from collections.abc import Mapping

import numpy as np

from prophy_jax.evaluation.evaluator import Clips, Evaluator, Metric


class HeldOutLoss(Evaluator):
    """The evaluator."""

    metrics = {"diffusion_loss": Metric("diffusion loss of the held-out clip, mean over noise levels", False)}

    def score(self, clips: Clips) -> Mapping[str, np.ndarray]:
        return {"diffusion_loss": clips.loss.mean(1)}


def build() -> HeldOutLoss:
    """The evaluator of `dict(module="held_out_loss")`."""
    return HeldOutLoss()
