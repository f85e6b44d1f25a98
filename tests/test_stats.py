"""Estimates: the ratio of sums, the error of a mean over windows, and two models on the same items."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ffn_fusion.core.stats import estimate, paired

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


answers = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=40)


@given(answers)
def test_right_and_wrong_answers_are_compared_by_the_binomial_of_the_disagreements(
    pairs: list[tuple[int, int]],
) -> None:
    found = paired(*zip(*pairs, strict=True))
    won, lost = pairs.count((0, 1)), pairs.count((1, 0))
    # Twice the tail of a fair coin, and the whole where it is even.
    tail = sum(math.comb(won + lost, heads) for heads in range(min(won, lost) + 1)) / 2 ** (won + lost)
    assert found.p_value == pytest.approx(min(1, 2 * tail))
    assert found.test == "McNemar"
    assert found.difference.mean == pytest.approx((won - lost) / len(pairs))


@pytest.mark.parametrize(
    ("won", "lost", "p_value"), [(0, 0, 1), (1, 0, 1), (5, 0, 1 / 16), (8, 1, 20 / 512), (4, 4, 1)]
)
def test_mcnemar_by_hand(won: int, lost: int, p_value: float) -> None:
    """Items on which the two agree change nothing."""
    for agreed in (1, 50):
        parent = [0] * won + [1] * lost + [1] * agreed + [0] * agreed
        student = [1] * won + [0] * lost + [1] * agreed + [0] * agreed
        assert paired(parent, student).p_value == pytest.approx(p_value)


scores = st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=3, max_size=20)


@given(scores | answers)
def test_the_interval_of_a_difference_is_that_of_a_paired_t_test(pairs: list[tuple[float, float]]) -> None:
    parent, student = zip(*pairs, strict=True)
    found = paired(parent, student).difference
    change = np.subtract(student, parent)
    assert (found.mean, found.n) == (pytest.approx(change.mean(), abs=1e-12), len(pairs))
    if change.std() > 1e-6:
        wanted = stats.ttest_rel(student, parent).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=1e-6, abs=1e-9)


@given(scores | answers)
def test_parent_and_student_change_places(pairs: list[tuple[float, float]]) -> None:
    parent, student = zip(*pairs, strict=True)
    one, other = paired(parent, student), paired(student, parent)
    assert other.difference.mean == -one.difference.mean
    assert (other.difference.low, other.difference.high) == pytest.approx((-one.difference.high, -one.difference.low))
    assert (other.p_value, other.test) == (one.p_value, one.test)


def test_values_in_between_are_compared_by_bootstrap() -> None:
    rng = np.random.default_rng(1)
    parent, noise = rng.normal(5, 1, 100), rng.normal(0, 1, 100)
    clear, nothing = paired(parent, parent + 1 + noise), paired(parent, parent + noise - noise.mean())
    assert clear.test == nothing.test == "bootstrap"
    assert clear.p_value == pytest.approx(2 / 10_001)
    assert nothing.p_value > 0.9
    assert paired(parent, parent).p_value == 1
    assert {paired([0, 1, 1], [0, 0.5, 1]).test, paired([0, 0.5, 1], [0, 1, 1]).test} == {"bootstrap"}


def test_a_bootstrap_is_repeatable_and_near_the_t_test() -> None:
    rng = np.random.default_rng(2)
    parent, student = rng.normal(0, 1, 200), rng.normal(0.15, 1, 200)
    found = paired(parent, student)
    assert found.p_value == paired(parent, student).p_value
    wanted = stats.ttest_rel(student, parent).pvalue
    assert 0.05 < wanted < 0.5
    assert found.p_value == pytest.approx(wanted, rel=0.15)


def test_one_item_has_a_difference_and_no_interval() -> None:
    found = paired([0.25], [0.75])
    assert (found.difference.mean, found.difference.low, found.difference.high) == (0.5, -math.inf, math.inf)
    assert found.p_value == paired([0], [1]).p_value == 1


def test_a_comparison_prints_difference_interval_and_test() -> None:
    assert str(paired([1, 1, 1, 1], [0, 0, 1, 1])) == "-0.5 [-1.419, +0.4187] p = 0.5 (McNemar)"
