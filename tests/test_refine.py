"""What measured plans teach about the scores of changes and the strength of their interactions."""

from collections.abc import Sequence

import numpy as np
import pytest

from ffn_fusion.core import refine
from ffn_fusion.core.refine import Lesson, learned

SCORES = np.array([0.5, 0.1, 0.2, 0.3, 0.4])


def lesson(items: Sequence[int], measured: float, interactions: float = 0.0) -> Lesson:
    made = np.isin(np.arange(len(SCORES)), items)
    return Lesson(made, float(SCORES[made].sum()), interactions, measured)


def predicted(lesson: Lesson, corrections: np.ndarray, strength: float) -> float:
    return lesson.additive + float(corrections[lesson.made].sum()) + strength * lesson.interactions


def test_nothing_measured_teaches_nothing() -> None:
    corrections, strength = learned(SCORES.tolist(), 0.25, [])
    assert (corrections.tolist(), strength) == ([0.0] * 5, 0.25)
    corrections, strength = learned(SCORES.tolist(), 0.25, [lesson([0, 1], 0.6 + 0.25 * 0.4, 0.4)])
    assert corrections == pytest.approx(np.zeros(5), abs=1e-12)
    assert strength == pytest.approx(0.25)


def test_one_plan_that_costs_more_than_predicted_raises_all_scores_by_the_common_error() -> None:
    corrections, _ = learned(SCORES.tolist(), 0.25, [lesson([0, 1], 0.9)])
    rise = 1 + corrections / SCORES
    assert np.ptp(rise[2:]) < 1e-12, "scores that no plan used keep their order"
    assert 1 < rise[2] < rise[1] < rise[0], "those that it did rise by their own error, too, the larger the more"


def test_what_was_learned_repeats_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "NOISE", 1e-5)
    plans = [
        lesson([0, 1, 2], 1.1 * 0.8, 0.2),
        lesson([0, 2, 3], 1.2, 0.1),
        lesson([1, 2, 3, 4], 1.1, 0.3),
    ]
    found = learned(SCORES.tolist(), 0.25, plans)
    assert [predicted(plan, *found) for plan in plans] == pytest.approx([plan.measured for plan in plans], rel=1e-3)


def test_interactions_that_explain_the_residuals_grow_stronger_and_stay_a_share() -> None:
    sets = [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [0, 4]]
    amounts = [0.05, 0.8, 0.1, 0.9, 0.3]
    plans = [
        lesson(items, SCORES[items].sum() + 0.5 * amount, amount) for items, amount in zip(sets, amounts, strict=True)
    ]
    _, strength = learned(SCORES.tolist(), 0.25, plans)
    assert 0.4 < strength < 0.6
    for share, least, most in ((40.0, 1.0, 1.0), (-40.0, 0.0, 0.0)):
        far = [
            lesson(items, SCORES[items].sum() + share * amount, amount)
            for items, amount in zip(sets, amounts, strict=True)
        ]
        assert least <= learned(SCORES.tolist(), 0.25, far)[1] <= most


def test_what_only_bad_plans_have_in_common_is_blamed() -> None:
    truth = np.array([0.5, 0.3, 0.2, 0.3, 0.4])  # the second costs three times what it was said to
    plans = [lesson(items, truth[items].sum()) for items in ([0, 1], [0, 2], [1, 2], [2, 3])]
    corrections, _ = learned(SCORES.tolist(), 0.25, plans)
    assert np.argmax(corrections / SCORES) == 1
    assert np.abs(corrections + SCORES - truth).sum() < np.abs(SCORES - truth).sum()


def test_scores_of_zero_and_noise_below_it_can_still_rise() -> None:
    scores = [0.2, 0.3, 0.0, -1e-4, 0.2]
    made = np.array([False, False, True, True, False])
    corrections, _ = learned(scores, 0.0, [Lesson(made, -1e-4, 0.0, 0.1)])
    assert min(corrections[2:4]) > 1e-4
