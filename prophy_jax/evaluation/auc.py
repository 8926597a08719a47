"""The area under the ROC curve, and which tokens it compares.

Written by hand: scikit-learn, which has it too, would be a dependency for these ten lines alone.
"""

import numpy as np

POSITIVE = 0.25  # a token counts as covered from this label on, as uncovered at 0; others are left out


def roc_auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: how often a positive scores above a negative, ties counting half.

    Args:
        scores: (n,) float.
        positive: (n,) bool.

    Returns:
        A number from 0 to 1, or NaN where there are no positives or no negatives.
    """
    positives = int(positive.sum())
    negatives = positive.size - positives
    if not positives or not negatives:
        return float("nan")
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(sizes) - (sizes - 1) / 2)[group]  # from 1; equal scores share their mean rank
    wins = ranks[positive].sum() - positives * (positives + 1) / 2
    return float(wins / (positives * negatives))
