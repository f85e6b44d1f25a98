"""Estimates: the ratio of sums, and the error of a mean over windows."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ffn_fusion.core.stats import estimate

values = st.lists(st.floats(-100, 100), min_size=2, max_size=30)


@given(values, st.integers(1, 1000))
def test_with_equal_counts_an_estimate_is_the_plain_mean_and_its_standard_error(means: list[float], count: int) -> None:
    found = estimate([mean * count for mean in means], [count] * len(means))
    n = len(means)
    stderr = np.std(means, ddof=1) / math.sqrt(n)
    low, high = np.mean(means) + np.array([-1, 1]) * stats.t(n - 1).ppf(0.975) * stderr
    assert found.mean == pytest.approx(np.mean(means), rel=1e-9, abs=1e-9)
    assert found.stderr == pytest.approx(stderr, rel=1e-9, abs=1e-9)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9, abs=1e-8)
    assert found.n == n


def test_the_interval_is_that_of_a_t_test() -> None:
    means = [0.3, 0.5, 0.4, 0.9]
    found = estimate(means, [1] * 4)
    expected = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_with_unequal_counts_every_token_weighs_the_same() -> None:
    found = estimate([10.0, 2.0], [1, 9])
    assert found.mean == pytest.approx(1.2)
    # Residuals 10 - 1.2 and 2 - 10.8, so sqrt(2 / 1 * 2 * 8.8^2) / 10.
    assert found.stderr == pytest.approx(math.sqrt(2 * 2 * 8.8**2) / 10)


@given(values, st.floats(0.1, 10))
def test_an_estimate_scales_with_its_sums_and_not_with_its_unit_of_count(sums: list[float], factor: float) -> None:
    counts = [1 + i % 3 for i in range(len(sums))]
    found = estimate(sums, counts)
    scaled = estimate([s * factor for s in sums], counts)
    recounted = estimate([s * factor for s in sums], [c * factor for c in counts])
    assert (scaled.mean, scaled.stderr) == pytest.approx((found.mean * factor, found.stderr * factor), abs=1e-9)
    assert (recounted.mean, recounted.stderr) == pytest.approx((found.mean, found.stderr), abs=1e-9)


def test_a_constant_has_no_error() -> None:
    found = estimate([6.0, 9.0, 3.0], [2, 3, 1])
    assert (found.mean, found.stderr, found.low, found.high) == pytest.approx((3, 0, 3, 3))


def test_one_window_has_no_interval() -> None:
    found = estimate([3.0], [4])
    assert found.mean == 0.75
    assert (found.stderr, found.low, found.high, found.n) == (math.inf, -math.inf, math.inf, 1)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        counts = rng.integers(50, 150, 16)
        found = estimate(counts * rng.normal(2.0, 0.5, 16), counts)
        hits += found.low <= 2.0 <= found.high
    assert 920 <= hits <= 975


def test_an_estimate_prints_mean_and_error() -> None:
    assert str(estimate([1.0, 2.0, 3.0], [1, 1, 1])) == "2 ± 0.58"
