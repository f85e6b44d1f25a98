"""The loss of right answers among those offered, against probabilities written out."""

from math import exp, inf, log

import pytest

from ffn_fusion.core.answers import loss_of


def test_the_loss_is_that_of_a_choice_among_the_answers() -> None:
    scores = [-3.0, -1.0, -2.5]
    chances = [exp(score) / sum(map(exp, scores)) for score in scores]
    for right in range(3):
        assert loss_of(scores, {right}) == pytest.approx(-log(chances[right]))
    assert loss_of(scores, {0, 2}) == pytest.approx(-log(chances[0] + chances[2])), "any right one will do"
    assert loss_of(scores, {0, 1, 2}) == pytest.approx(0, abs=1e-12)
    assert loss_of([score - 50 for score in scores], {1}) == pytest.approx(loss_of(scores, {1})), (
        "only differences count"
    )


def test_long_answers_do_not_overflow() -> None:
    assert loss_of([-2000.0, -900.0], {0}) == pytest.approx(1100)
    assert loss_of([-inf, -900.0], {1}) == 0


def test_a_single_answer_is_written_and_not_chosen() -> None:
    assert loss_of([-4.5], {0}) == 4.5
