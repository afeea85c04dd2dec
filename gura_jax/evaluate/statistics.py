"""Intervals and tests for scores of several seeds and folds, whose training data overlap."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


class Difference(NamedTuple):
    """Paired difference of scores.

    Attributes:
        mean: of the pairs; NaN of none.
        low, high: confidence interval; None of a single pair, or of pairs that are all the same.
        p: of no difference, two-sided; None likewise.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None


def compare(values: Sequence[float], others: Sequence[float] | None, test_share: float) -> Difference:
    """Compare paired scores by the corrected resampled t-test (Nadeau and Bengio, 2003).

    Scores of folds and seeds share most of their training data, so their mean varies more than that of independent
    ones: the variance of the mean is taken as (1 / n + test / train) of theirs. Scores that are not finite, as of a
    metric that a fold does not define, are left out with their pairs.

    Args:
        values: n scores, by seed and fold.
        others: of the same seeds and folds; None: an interval of ``values`` themselves.
        test_share: clips tested over clips trained on, of a fold.
    """
    from scipy import stats

    found = np.asarray(values, np.float64) - (0.0 if others is None else np.asarray(others, np.float64))
    found = found[np.isfinite(found)]
    n, mean = len(found), float(found.mean()) if len(found) else math.nan
    if n < 2 or np.ptp(found) == 0:  # equal differences, as of few clips, say nothing of their spread
        return Difference(mean, None, None, None)
    error = math.sqrt((1 / n + test_share) * float(found.var(ddof=1)))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    return Difference(mean, mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, n - 1)))


def holm(p: Sequence[float]) -> list[float]:
    """Adjust p-values of several tests for their number (Holm, 1979)."""
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted
