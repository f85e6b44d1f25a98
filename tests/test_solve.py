"""The search by mixed-integer programming, against trying every choice."""

from dataclasses import replace
from time import monotonic

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import every_choice, large, small, used_by
from reference import one_line

from ffn_fusion.core.plan import Attention, Block, Ffn
from ffn_fusion.core.problem import Choice, Link, Option, Problem, groups_of, plan_of
from ffn_fusion.core.solve import Solution, solve, tightest

FEW = settings(max_examples=600, deadline=None)


@FEW
@given(small())
def test_the_solution_is_the_best_of_all_choices(problem: Problem) -> None:
    allowed = every_choice(problem)
    if not allowed:
        one_line(lambda: solve(problem, gap=0), "no plan keeps within")
        return
    found = solve(problem, gap=0)
    assert found.choice in allowed
    assert found.score == pytest.approx(min(allowed.values()), rel=1e-6, abs=1e-9)
    assert found.score == pytest.approx(allowed[found.choice])
    assert (found.status, found.gap) == ("optimal", 0)
    assert found.plan == plan_of(problem, found.choice)
    assert len(found.plan.groups) == len(groups_of(found.choice))
    assert found.uses == pytest.approx(used_by(problem, found.choice))
    assert all(found.uses[name] <= limit * (1 + 1e-9) for name, limit in problem.limits.items())


@FEW
@given(small(interactions=False), st.sampled_from([0.0, 0.4, 0.7]))
def test_a_further_solution_is_the_best_of_those_that_differ_enough(problem: Problem, overlap: float) -> None:
    allowed = every_choice(problem)
    if not allowed:
        return
    first = solve(problem, gap=0)
    apart = {
        choice: score
        for choice, score in allowed.items()
        if alike(choice, first.choice) <= overlap * problem.num_layers + 1e-9
    }
    if not apart:
        one_line(lambda: solve(problem, earlier=[first], overlap=overlap, gap=0), "no further plan", f"{overlap:.0%}")
        return
    second = solve(problem, earlier=[first], overlap=overlap, gap=0)
    assert second.choice in apart
    assert second.score == pytest.approx(min(apart.values()), rel=1e-6, abs=1e-6)


def alike(a: Choice, b: Choice) -> int:
    together = zip(a.options, b.options, strict=True)
    return sum(x == y and ((i in a.links) == (i in b.links)) for i, (x, y) in enumerate(together))


@FEW
@given(small(interactions=False))
def test_the_tightest_value_of_a_resource_is_the_least_of_all_choices(problem: Problem) -> None:
    for name in ("ms", "bytes"):
        free = every_choice(replace(problem, limits={}))
        assert tightest(problem, name, others=False) == pytest.approx(min(used_by(problem, c)[name] for c in free))
        others = {other: limit for other, limit in problem.limits.items() if other != name}
        within = [used_by(problem, choice)[name] for choice in every_choice(replace(problem, limits=others))]
        assert tightest(problem, name) == (pytest.approx(min(within)) if within else None)


def chain(*widths: int, most: int | None, saves: float = 1.0) -> Problem:
    """FFNs of these widths in one run; only fusing them saves anything."""
    options = [
        [Option(Block(None if layer else Attention(0), (Ffn(layer),)), (), {"ms": 2.0}, width)]
        for layer, width in enumerate(widths)
    ]
    links = [Link(layer, layer, {"ms": saves}) for layer in range(len(widths) - 1)]
    scores = [1.0 + 0.1 * layer for layer in range(len(links))]
    return Problem(options, scores, {"ms": 2.0 * len(widths) - 2}, {}, links, None, most)


def test_groups_are_chains_of_links_within_the_widest() -> None:
    assert str(solve(chain(4, 4, 4, 4, most=None)).plan) == "A0F0+1+2 -F3"
    assert str(solve(chain(4, 4, 4, 4, most=8)).plan) == "A0F0+1 -F2+3"
    assert str(solve(chain(4, 4, 5, 4, 4, most=8)).plan) == "A0F0+1 -F2 -F3+4"
    assert str(solve(chain(4, 9, 4, 4, 4, most=12)).plan) == "A0F0 -F1 -F2+3+4"
    one_line(lambda: solve(chain(4, 9, 4, 4, most=8)), "ms 6", "at least 7 alone")


def two_resources() -> Problem:
    """Removing the FFN of layer 1 saves bytes only, removing its attention ms only, each at the other's expense."""
    whole = Option(Block(Attention(1), (Ffn(1),)), (), {"ms": 4.0, "bytes": 4.0})
    fast = Option(Block(None, (Ffn(1),)), (0,), {"ms": 1.0, "bytes": 6.0})
    light = Option(Block(Attention(1), ()), (1,), {"ms": 6.0, "bytes": 1.0})
    first = Option(Block(Attention(0), (Ffn(0),)), (), {"ms": 4.0, "bytes": 4.0})
    return Problem([[first], [whole, fast, light]], [0.1, 0.2], {"ms": 9.0, "bytes": 9.0}, {"bytes": 0.5})


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"ms": 4.5}, ["no plan keeps within ms 4.5:", "ms at least 5 alone"]),
        ({"bytes": 5.0}, ["bytes 5:", "bytes at least 5.5 alone"]),
        ({"ms": 5.0, "bytes": 6.0}, ["ms 5 and bytes 6", "not all together", "5 alone, 10 within", "5.5 alone, 10.5"]),
        ({"ms": 4.0, "bytes": 9.0}, ["ms at least 5 alone, 8 within the other", "bytes at least 5.5 alone, out of re"]),
    ],
)
def test_limits_that_no_plan_keeps_are_named_with_what_can_be_had(limits: dict[str, float], says: list[str]) -> None:
    message = one_line(lambda: solve(replace(two_resources(), limits=limits)), *says)
    assert ("not all together" in message) == ("not all together" in says)


def test_a_value_named_as_the_tightest_can_be_had() -> None:
    options = [[Option(Block(Attention(0), (Ffn(0),)), (), {"ms": 1 / 3})], [Option(None, (0,), {"ms": 1e-9})]]
    problem = Problem(options, [1.0], {"ms": 0.1})
    named = float(one_line(lambda: solve(problem)).split("at least ")[1].split()[0])
    assert 1 / 3 < named < 0.33334
    assert str(solve(replace(problem, limits={"ms": named})).plan) == "A0F0"


def test_a_plan_without_any_ffn_is_none() -> None:
    options = [[Option(Block(Attention(0), ()))], [Option(None, (0,)), Option(Block(None, (Ffn(1),)), (1,))]]
    assert str(solve(Problem(options, [0.1, 5.0], {})).plan) == "A0 -F1"
    one_line(lambda: solve(Problem([row[:1] for row in options], [0.1], {})), "no layer has an option with an FFN")


def test_each_solution_differs_from_all_earlier_ones() -> None:
    problem = large(10)
    found = [solve(problem, seconds=20)]
    while len(found) < 4:
        found.append(solve(problem, earlier=found, overlap=0.7, seconds=20))
    assert all(alike(a.choice, b.choice) <= 7 for i, a in enumerate(found) for b in found[:i])
    assert found[0].score == min(solution.score for solution in found)


@pytest.mark.parametrize(
    ("problem", "count"),
    [(replace(chain(4, 4, 4, most=8), limits={"ms": 5.0}), 2), (replace(two_resources(), limits={}), 3)],
)
def test_where_no_other_solution_is_left_that_is_said(problem: Problem, count: int) -> None:
    found: list[Solution] = []
    while len(found) < count:
        found.append(solve(problem, earlier=found, overlap=0.5))
    one_line(lambda: solve(problem, earlier=found, overlap=0.5), "no further plan", f"{count} earlier")


def test_what_describes_no_problem_is_refused() -> None:
    first = Option(Block(Attention(0), (Ffn(0),)), (0,))
    with pytest.raises(ValueError, match="item 0"):
        Problem([[first], [Option(None, (0,))]], [1.0], {})
    with pytest.raises(ValueError, match="layer 0 needs an attention"):
        Problem([[Option(Block(None, (Ffn(0),)))]], [], {})
    with pytest.raises(ValueError, match="layers"):
        Problem([[first]], [1.0], {}, {}, [Link(0)])


def test_a_large_problem_is_solved_in_time() -> None:
    """126 layers of 54 options, as the search of a model of the size of Llama-3.1-405B has them."""
    problem = large(126)
    assert {len(row) for row in problem.options[1:]} == {54}
    begin = monotonic()
    found = solve(problem)
    assert monotonic() - begin < 60
    assert found.status == "optimal"
    assert found.gap <= 1e-4
    assert found.plan.groups
