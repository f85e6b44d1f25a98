"""Means over tokens with errors over windows: sum and count are kept apart and divided once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


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
