"""Differences between two arms of a study, paired by seed and prompt, and how far chance explains them.

S seeds, P prompts, R draws of the bootstrap.
"""

from typing import NamedTuple

import numpy as np
from scipy import stats  # which jax brings

DRAWS = 10_000
LEVEL = 0.95  # of the interval


class Difference(NamedTuple):
    """A mean difference, its interval, and the two-sided p-value of no difference."""

    mean: float
    low: float
    high: float
    p: float


def standard_error(values: np.ndarray) -> float | None:
    """Of the mean over seeds, of (S, P) scores or differences; None of one seed, which says nothing of it."""
    means = values.mean(1)  # (S,)
    return float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else None


def in_both(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(P,) bool: the prompts of which all seeds have a number, in own and other, (S, P) or (1, P) each."""
    return np.isfinite(own).all(0) & np.isfinite(other).all(0)


def differences(own: np.ndarray, other: np.ndarray) -> list[float]:
    """Of each seed the mean of own - other, (S, P) or (1, P) each, over the prompts that all have."""
    measured = in_both(own, other)
    return (own - other)[:, measured].mean(1).tolist() if measured.any() else []


def p_over_seeds(own: np.ndarray, other: np.ndarray) -> float | None:
    """Of a paired t-test over the means of the seeds, (S, P) or (1, P) each: of other seeds on these prompts.

    None of one seed, and where all seeds differ by the same.
    """
    means = (own - other).mean(1)  # (S,)
    if len(means) < 2 or means.std() <= 1e-12 * np.abs(means).max():
        return None
    return float(stats.ttest_1samp(means, 0.0).pvalue)


def paired_bootstrap(own: np.ndarray, other: np.ndarray, seed: int = 0, draws: int = DRAWS) -> Difference:
    """The mean of own - other, with the percentile interval of a bootstrap over seeds and prompts, crossed.

    Each draw takes S seeds and P prompts with replacement, and the mean over all their pairs. The p-value is
    twice the smaller share of draws on one side of zero, each share with one draw more, and at most 1. Of few
    seeds the interval is too narrow: what differs from seed to seed is drawn from those few alone. Of one
    seed it is about the prompts alone.

    Args:
        own: (S, P), or (1, P) of what has no seeds and is paired with every seed of the other.
        other: likewise.
        seed: Of the draws.
        draws: R.
    """
    difference = own - other  # (S, P)
    seeds, prompts = difference.shape
    rng = np.random.default_rng(seed)
    seed_counts = rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws)  # (R, S)
    prompt_counts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), draws)  # (R, P)
    means = ((seed_counts @ difference) * prompt_counts).sum(1) / (seeds * prompts)  # (R,)
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    beyond = min((means <= 0).sum(), (means >= 0).sum())
    p = min(1.0, 2 * (1 + int(beyond)) / (draws + 1))
    return Difference(float(difference.mean()), float(low), float(high), p)
