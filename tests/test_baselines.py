"""The rivals of the search: what each does on a problem worked out by hand, and that none beats the best."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from problems import every_choice, large, layer_options, small, used_by
from reference import one_line

from ffn_fusion.core.baselines import at_random, drop_in_order, greedy, max_parameters
from ffn_fusion.core.plan import Plan
from ffn_fusion.core.problem import Link, Problem
from ffn_fusion.core.solve import Solution, solve
from ffn_fusion.errors import UserError

ALL: list[Callable[[Problem], Solution]] = [
    greedy,
    lambda problem: greedy(problem, links=True),
    lambda problem: at_random(problem, 0),
    lambda problem: at_random(problem, 1, links=True),
    max_parameters,
    lambda problem: max_parameters(problem, links=True),
    lambda problem: drop_in_order(problem, [(1, "ffn"), (1, "attention"), (0, "ffn")]),
]


@settings(max_examples=600, deadline=None)
@given(small())
def test_no_baseline_beats_the_best_or_passes_a_limit(problem: Problem) -> None:
    allowed = every_choice(problem)
    for baseline in ALL:
        try:
            found = baseline(problem)
        except UserError:
            continue
        assert found.choice in allowed
        assert found.score == pytest.approx(allowed[found.choice])
        assert found.uses == pytest.approx(used_by(problem, found.choice))


@settings(max_examples=600, deadline=None)
@given(small(interactions=False))
def test_the_most_parameters_are_the_most_of_all_choices(problem: Problem) -> None:
    allowed = every_choice(problem)
    if not allowed:
        one_line(lambda: max_parameters(problem, links=True), "no plan keeps within")
        return
    most = max(used_by(problem, choice)["parameters"] for choice in allowed)
    assert max_parameters(problem, links=True).uses["parameters"] == pytest.approx(most)
    unlinked = [choice for choice in allowed if not choice.links]
    if unlinked:
        most = max(used_by(problem, choice)["parameters"] for choice in unlinked)
        assert max_parameters(problem).uses["parameters"] == pytest.approx(most)


def three_layers(ms: float, scores: dict[int, float]) -> Problem:
    """Three layers of 5 ms: attention 2, FFN 3, half an FFN 2, a linear one 1. Changes cost 1 if not said otherwise.

    Items of layer l: 4 l no attention, + 1 half an FFN, + 2 a linear FFN, + 3 no FFN; 12 and 13 the links.
    """
    options = [layer_options(layer, 4 * layer, 1.0) for layer in range(3)]
    links = [Link(left, 12 + left, {"ms": 1.0}) for left in range(2)]
    return Problem(options, [scores.get(item, 1.0) for item in range(14)], {"ms": ms}, {}, links)


def test_greedy_makes_the_cheapest_change_per_unit_first_and_undoes_the_unneeded() -> None:
    # 15 ms to 12. Per ms: half an FFN of layer 2 costs 0.1; attention 1 costs 0.3 / 2; so both, and that is 12.
    assert str(greedy(three_layers(12, {9: 0.1, 4: 0.3})).plan) == "A0F0 -F1 A2F2:4"
    # To 13: the cheap half first (14), then attention 1 (12), after which the half is not needed.
    assert str(greedy(three_layers(13, {9: 0.1, 4: 0.3})).plan) == "A0F0 -F1 A2F2"
    assert greedy(three_layers(15, {})).score == 0


def test_greedy_fuses_only_when_told() -> None:
    problem = three_layers(12, {4: 0.1, 12: 0.05})
    assert str(greedy(problem, links=True).plan) == "A0F0+1 A2F2"
    assert greedy(problem).plan.groups == []
    assert max_parameters(problem).plan.groups == at_random(problem, 3).plan.groups == []


def test_greedy_looks_at_the_tightest_resource_first() -> None:
    """Bytes are passed by more than ms; the half of an FFN saves as many bytes as an attention, at less."""
    problem = replace(three_layers(14.9, {1: 0.2, 4: 0.3, 8: 0.3}), limits={"ms": 14.9, "bytes": 32.0})
    assert str(greedy(problem).plan) == "A0F0:4 A1F1 A2F2"


def test_random_choices_follow_the_seed() -> None:
    problem = large(12)
    assert at_random(problem, 1) == at_random(problem, 1)
    assert len({str(at_random(problem, seed).plan) for seed in range(5)}) == 5


@pytest.mark.parametrize(
    ("ms", "ranking", "expected"),
    [
        (15, [(1, "layer")], "A0F0 A1F1 A2F2"),
        (13, [(1, "attention"), (2, "ffn")], "A0F0 -F1 A2F2"),
        (12.5, [(1, "attention"), (2, "ffn")], "A0F0 -F1 A2"),
        (10, [(0, "layer"), (0, "attention"), (2, "layer"), (1, "ffn")], "A0F0 A1F1"),
        (10, [(2, "attention"), (2, "ffn"), (1, "layer")], "A0F0 A1F1"),
        (5, [(2, "attention"), (2, "attention"), (1, "ffn"), (2, "layer"), (1, "attention")], "A0F0"),
    ],
)
def test_a_ranking_is_dropped_until_the_limit_holds(ms: float, ranking: list, expected: str) -> None:
    found = drop_in_order(three_layers(ms, {}), ranking)
    assert found.plan == Plan.parse(expected)
    assert found.status == "dropped in order"


def test_a_baseline_that_finds_nothing_says_how_far_it_came() -> None:
    one_line(lambda: drop_in_order(three_layers(5, {}), [(2, "layer")]), "ranking", "ms 10 (limit 5)")
    one_line(lambda: greedy(three_layers(0.5, {})), "greedy search ends at ms", "limit 0.5")
    one_line(lambda: at_random(three_layers(0.5, {}), 0), "random searches end", "limit 0.5")
    one_line(lambda: max_parameters(three_layers(0.5, {})), "no plan keeps within ms 0.5", "at least 3 alone")


def test_a_baseline_needs_the_parents_own_layer() -> None:
    problem = three_layers(9, {})
    with pytest.raises(ValueError, match="layer 1"):
        greedy(replace(problem, options=[problem.options[0], problem.options[1][1:], problem.options[2]]))


def test_the_search_beats_its_rivals() -> None:
    problem = large(20)
    best = solve(problem).score
    linked, alone = greedy(problem, links=True).score, greedy(problem).score
    others = [at_random(problem, 0).score, at_random(problem, 0, links=True).score, max_parameters(problem).score]
    assert best <= linked * (1 + 1e-4)
    assert best < alone < min(others)
