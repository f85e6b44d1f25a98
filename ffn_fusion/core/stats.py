"""Means over tokens with errors over windows: sum and count are kept apart and divided once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

BOOTSTRAP = 10_000


@dataclass(frozen=True)
class Estimate:
    """A token-weighted mean, its standard error over `n` windows, and the 95 % t-interval."""

    mean: float
    stderr: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.stderr:.2g}"


def estimate(sums: Sequence[float], counts: Sequence[float]) -> Estimate:
    """Ratio estimate sum(sums) / sum(counts), with windows as the unit of sampling.

    Tokens of one window are correlated, so the error is that of a ratio estimator over windows (linearised), with
    n - 1 degrees of freedom. One window has no error: its interval is infinite.
    """
    s, c = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    n = len(s)
    mean = s.sum() / c.sum()
    if n < 2:
        return Estimate(float(mean), float("inf"), float("-inf"), float("inf"), n)
    residual = s - mean * c
    stderr = float(np.sqrt(n / (n - 1) * np.square(residual).sum()) / c.sum())
    half = float(stats.t.ppf(0.975, n - 1)) * stderr
    return Estimate(float(mean), stderr, float(mean) - half, float(mean) + half, n)


@dataclass(frozen=True)
class Paired:
    """Mean of student minus parent over the same items, and how likely as much would be by chance."""

    difference: Estimate
    p_value: float
    test: str
    """ "McNemar" (exact, two-sided) where every item is right or wrong, else "bootstrap"."""

    def __str__(self) -> str:
        low, high = self.difference.low, self.difference.high
        return f"{self.difference.mean:+.4g} [{low:+.4g}, {high:+.4g}] p = {self.p_value:.2g} ({self.test})"


def paired(parent: Sequence[float], student: Sequence[float]) -> Paired:
    """Compare two models on the same items. Items are the unit of sampling; the interval is that of a paired t-test.

    The p-value is McNemar's exact one (1947) where all values are 0 or 1, so that only items on which the two
    disagree count; otherwise that of 10,000 bootstrap resamples of the mean difference, with seed 0.
    """
    before, after = np.asarray(parent, dtype=np.float64), np.asarray(student, dtype=np.float64)
    change = after - before
    difference = estimate(change.tolist(), [1] * len(change))
    if np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all():
        won, lost = int((change > 0).sum()), int((change < 0).sum())
        p_value = float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0
        return Paired(difference, p_value, "McNemar")
    if len(change) < 2:
        return Paired(difference, 1.0, "bootstrap")  # one item would be resampled as itself, and look certain
    rng = np.random.default_rng(0)
    # In slices: resamples of a large task at once would not fit in memory.
    means = np.concatenate([rng.choice(change, (100, len(change))).mean(axis=1) for _ in range(BOOTSTRAP // 100)])
    # One resample more on either side, so that no p-value is zero.
    tail = (min((means <= 0).sum(), (means >= 0).sum()) + 1) / (BOOTSTRAP + 1)
    return Paired(difference, float(min(1.0, 2 * tail)), "bootstrap")
