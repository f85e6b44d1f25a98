"""What measured plans teach about scores."""

import numpy as np
import pytest

from ffn_fusion.core import refine
from ffn_fusion.core.refine import corrected

SCORES = [0.5, 0.1, 0.2, 0.3, 0.4]


def test_one_plan_that_costs_more_than_predicted_raises_all_scores_by_the_common_error() -> None:
    made = np.array([[True, True, False, False, False]])
    found = np.array(corrected(SCORES, made, np.array([0.6]), np.array([0.9])))
    rise = found / np.array(SCORES)
    assert np.ptp(rise[2:]) < 1e-12, "scores that no plan used keep their order"
    assert 1 < rise[2] < rise[1] < rise[0], "those that it did rise by their own error, too, the larger the more"


def test_corrected_scores_repeat_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "NOISE", 1e-5)
    rng = np.random.default_rng(0)
    made = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [0, 1, 1, 1, 1]], dtype=bool)
    predicted = made @ np.array(SCORES)
    measured = predicted * rng.uniform(0.7, 1.5, 3)
    assert made @ np.array(corrected(SCORES, made, predicted, measured)) == pytest.approx(measured, rel=1e-3)


def test_interactions_in_the_prediction_are_not_counted_twice() -> None:
    """Predictions come with the interactions; scores change by residuals alone."""
    made = np.array([[True, True, False, False, False]])
    assert corrected(SCORES, made, np.array([0.8]), np.array([0.8])) == pytest.approx(SCORES)


def test_what_only_bad_plans_have_in_common_is_blamed() -> None:
    made = np.array([[1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0]], dtype=bool)
    truth = np.array([0.5, 0.3, 0.2, 0.3, 0.4])  # the second costs three times what it was said to
    found = np.array(corrected(SCORES, made, made @ np.array(SCORES), made @ truth))
    assert np.argmax(found / np.array(SCORES)) == 1
    assert abs(found - truth).sum() < abs(np.array(SCORES) - truth).sum()


def test_scores_of_zero_and_noise_below_it_can_still_rise() -> None:
    made = np.array([[False, False, True, True, False]])
    found = corrected([0.2, 0.3, 0.0, -1e-4, 0.2], made, np.array([0.0]), np.array([0.1]))
    assert min(found[2:4]) > 0
