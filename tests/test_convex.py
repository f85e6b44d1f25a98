"""The score of interacting changes: its split, its local search and its bound."""

from dataclasses import replace
from itertools import combinations, pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import every_choice, large, score_of, small

from ffn_fusion.core.baselines import greedy
from ffn_fusion.core.convex import Matrix, equal_share, tightened
from ffn_fusion.core.local import polished
from ffn_fusion.core.problem import Choice, Problem, evaluate
from ffn_fusion.core.program import Program, columns_of
from ffn_fusion.core.solve import Solution, solve
from ffn_fusion.errors import UserError

PARTS = [[0, 1, 2], [3], [4, 5, 6, 7], [8, 9]]


@st.composite
def grams(draw: st.DrawFn) -> Matrix:
    """Gram matrices of full and of low rank, and symmetric ones that are none."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    deviations = rng.normal(size=(10, draw(st.sampled_from([2, 12, 50])))) * rng.uniform(0.01, 3, size=(10, 1))
    gram = deviations @ deviations.T
    if draw(st.booleans()):
        wrong = rng.normal(size=(10, 10))
        gram += wrong + wrong.T
    return np.asarray(gram)


@given(grams())
def test_a_split_leaves_a_semidefinite_rest_and_takes_blocks_of_parts_only(gram: Matrix) -> None:
    gains = np.diag(np.linspace(0.1, 1, 10))
    mask = np.zeros((10, 10), dtype=bool)
    for items in PARTS:
        mask[np.ix_(items, items)] = True
    size = np.abs(gram).max()
    for blocks in (equal_share(gram, PARTS), tightened(gram, PARTS, gains)):
        assert not blocks[~mask].any()
        assert np.linalg.eigvalsh(gram - blocks)[0] > -1e-7 * size


@pytest.mark.parametrize("seed", [338, 494])
def test_a_split_leaves_a_semidefinite_rest_where_a_part_is_nearly_singular(seed: int) -> None:
    """Four items in three dimensions: without what takes rounding back, the rest is off by 1e-5 of its size."""
    rng = np.random.default_rng(seed)
    deviations = rng.normal(size=(10, 3)) * rng.uniform(0.01, 3, size=(10, 1))
    gram = deviations @ deviations.T
    rest = gram - tightened(gram, PARTS, np.diag(np.linspace(0.1, 1, 10)))
    assert np.linalg.eigvalsh(rest)[0] > -1e-7 * np.abs(gram).max()


@pytest.mark.parametrize("seed", range(5))
def test_the_tightened_split_gains_more_at_the_point_that_it_is_for(seed: int) -> None:
    deviations = np.random.default_rng(seed).normal(size=(10, 50)) + 0.5
    gram, gains = deviations @ deviations.T, np.diag(np.linspace(0.1, 1, 10))
    first, second = equal_share(gram, PARTS), tightened(gram, PARTS, gains)
    assert np.sum(gains * second) > 1.05 * np.sum(gains * first)


def test_a_split_takes_all_of_what_does_not_interact() -> None:
    gram = np.zeros((10, 10))
    for items in PARTS:
        gram[np.ix_(items, items)] = 0.5
    gram += np.eye(10)
    assert np.allclose(equal_share(gram, PARTS), gram, atol=1e-6)


@settings(max_examples=600, deadline=None)
@given(small(interactions=True))
def test_local_search_only_improves_and_stays_allowed(problem: Problem) -> None:
    allowed = every_choice(problem)
    program = Program(problem, problem.limits)
    brings = columns_of(program.parts, len(problem.scores))
    assert problem.interactions is not None
    for choice in list(allowed)[:5]:
        better = polished(program, brings, problem.interactions, choice)
        assert better in allowed
        assert evaluate(problem, better) == pytest.approx(score_of(problem, better))
        assert allowed[better] <= allowed[choice] + 1e-12


def test_no_exchange_of_two_layers_improves_what_local_search_ends_with() -> None:
    problem = large(5, interactions=True)
    program = Program(problem, problem.limits)
    assert problem.interactions is not None
    start = greedy(problem).choice
    end = polished(program, columns_of(program.parts, len(problem.scores)), problem.interactions, start)
    best = evaluate(problem, end)
    assert best <= evaluate(problem, start)
    for layers in combinations(range(5), 2):
        for taken in product(*(range(len(problem.options[layer])) for layer in layers)):
            options = list(end.options)
            for layer, index in zip(layers, taken, strict=True):
                options[layer] = index
            other = Choice(tuple(options))
            assert evaluate(problem, other) >= best - 1e-12 or not program.admits(other)


@settings(max_examples=60, deadline=None)
@given(small(interactions=True))
def test_interactions_of_neighbours_alone_are_solved_to_the_best(problem: Problem) -> None:
    near = np.zeros((len(problem.scores),) * 2)
    parts = problem.items_of_parts()[: problem.num_layers]
    for items in parts:
        near[np.ix_(sorted(items), sorted(items))] = 1.0
    for left, right in list(pairwise(parts))[:1]:
        near[np.ix_(sorted(left), sorted(right))] = near[np.ix_(sorted(right), sorted(left))] = 0.5
    assert problem.interactions is not None
    problem = replace(problem, interactions=problem.interactions * near)
    if allowed := every_choice(problem):
        assert solve(problem, gap=0).score == pytest.approx(min(allowed.values()), rel=1e-6, abs=1e-6)


def test_thirty_layers_of_which_all_interact_are_solved_to_a_small_gap() -> None:
    found = solve(large(30, interactions=True), seconds=60, gap=0.02)
    assert found.status == "optimal"
    assert found.gap <= 0.02


def test_what_is_not_proven_in_time_says_so() -> None:
    def found_within(seconds: float) -> Solution | None:
        try:
            return solve(large(20, interactions=True), seconds=seconds, gap=1e-9)
        except UserError:
            return None

    # A busy machine may find nothing in so short a time; in much more than it takes to find a plan, the best is proven.
    found = next(filter(None, (found_within(2 * 1.3**tries) for tries in range(14))), None)
    assert found is not None
    assert found.status == "time limit"
    # On a busy machine there may not even be a bound yet.
    assert found.gap > 1e-9
