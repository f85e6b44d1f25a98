"""What measured plans teach about scores and interactions."""

from collections.abc import Sequence

import numpy as np
import pytest

from ffn_fusion.core import refine
from ffn_fusion.core.refine import Lesson, learned

SCORES = [0.5, 0.1, 0.2, 0.3, 0.4]


def lesson(made: Sequence[int], measured: float, interactions: float = 0.0) -> Lesson:
    return Lesson(np.array(made, dtype=bool), float(np.array(made) @ np.array(SCORES)), interactions, measured)


def scores_after(lessons: list[Lesson], strength: float = 0.1) -> np.ndarray:
    return np.array(SCORES) + learned(SCORES, strength, lessons)[0]


def test_without_a_measured_plan_nothing_is_learned() -> None:
    corrections, strength = learned(SCORES, 0.3, [])
    assert not corrections.any()
    assert strength == 0.3


def test_one_plan_that_costs_more_than_predicted_raises_all_scores_by_the_common_error() -> None:
    rise = scores_after([lesson([1, 1, 0, 0, 0], 0.9)]) / np.array(SCORES)
    assert np.ptp(rise[2:]) < 1e-12, "scores that no plan used keep their order"
    assert 1 < rise[2] < rise[1] < rise[0], "those that it did rise by their own error, too, the larger the more"


def test_corrected_scores_repeat_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "NOISE", 1e-5)
    rng = np.random.default_rng(0)
    made = [[1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [0, 1, 1, 1, 1]]
    lessons = [lesson(row, float(np.array(row) @ np.array(SCORES)) * rng.uniform(0.7, 1.5), 0.2) for row in made]
    corrections, strength = learned(SCORES, 0.1, lessons)
    found = np.array(made) @ (np.array(SCORES) + corrections) + strength * 0.2
    assert found == pytest.approx([each.measured for each in lessons], rel=1e-3)


def test_a_plan_that_costs_what_it_was_predicted_to_teaches_nothing() -> None:
    corrections, strength = learned(SCORES, 0.25, [lesson([1, 1, 0, 0, 0], 0.6 + 0.25 * 0.8, 0.8)])
    assert corrections == pytest.approx(np.zeros(5))
    assert strength == pytest.approx(0.25)


def test_plans_that_cost_more_the_more_their_changes_interact_make_interactions_stronger() -> None:
    truth = 0.3
    rng = np.random.default_rng(1)
    lessons = []
    for _ in range(8):
        made, interactions = rng.integers(0, 2, 5), rng.uniform(0, 3)
        lessons.append(lesson(made, float(made @ np.array(SCORES)) + truth * interactions, interactions))
    corrections, strength = learned(SCORES, 0.1, lessons)
    assert abs(strength - truth) < 0.04
    assert np.abs(corrections / np.array(SCORES)).max() < 0.15
    weaker = [lesson(each.made, each.additive, each.interactions) for each in lessons]
    assert 0 <= learned(SCORES, 0.1, weaker)[1] < 0.05


def test_what_only_bad_plans_have_in_common_is_blamed() -> None:
    made = [[1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0]]
    truth = np.array([0.5, 0.3, 0.2, 0.3, 0.4])  # the second costs three times what it was said to
    found = scores_after([lesson(row, float(np.array(row) @ truth)) for row in made])
    assert np.argmax(found / np.array(SCORES)) == 1
    assert abs(found - truth).sum() < abs(np.array(SCORES) - truth).sum()


def test_scores_of_zero_and_noise_below_it_can_still_rise() -> None:
    scores = [0.2, 0.3, 0.0, -1e-4, 0.2]
    made = np.array([False, False, True, True, False])
    corrections, _ = learned(scores, 0.1, [Lesson(made, -1e-4, 0.0, 0.1)])
    assert (np.array(scores) + corrections)[2:4].min() > 0
