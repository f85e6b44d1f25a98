"""The dependency matrix's distance, and the grouping that is read off it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import grouping

from ffn_fusion.core.dependency import Merge, apply_merges, cosine_distance, propose_merges
from ffn_fusion.core.plan import Plan

RUN = Plan.parse("A0F0 A1F1 -F2 -F3 -F4 A5F5")
MATRIX = [
    [0.0, 0.9, 0.9, 0.9, 0.9, 0.9],
    [0.0, 0.0, 0.3, 0.5, 0.2, 0.9],
    [0.0, 0.0, 0.0, 0.1, 0.6, 0.9],
    [0.0, 0.0, 0.0, 0.0, 0.2, 0.9],
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.9],
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
]
MERGES = [Merge((2,), (3,), 0.1), Merge((1,), (2, 3), 0.5), Merge((1, 2, 3), (4,), 0.6)]
"""By hand: 2+3 costs 0.1; then 1+(2,3) costs max(0.3, 0.5), (2,3)+4 max(0.6, 0.2); then all, max(0.2, 0.6, 0.2)."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cosine_distance_has_the_known_answers(dtype: torch.dtype) -> None:
    a = torch.tensor([[3.0, 4.0], [3.0, 4.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], dtype=dtype)
    b = torch.tensor([[3.0, 4.0], [-6.0, -8.0], [0.0, 5.0], [1.0, 1.0], [1.0, 0.0], [50.0, 50.0]], dtype=dtype)
    expected = torch.tensor([0.0, 2.0, 1.0, 1 - 0.5**0.5, 1.0, 0.0])
    distance = cosine_distance(a, b)
    assert distance.dtype == torch.float32
    assert torch.allclose(distance, expected, atol=1e-6)


def test_merges_come_in_the_order_worked_out_by_hand() -> None:
    assert propose_merges(RUN, MATRIX, [1] * 6, None, skip_last=False) == MERGES


def test_skip_last_leaves_the_last_ffn_of_each_run_out() -> None:
    assert propose_merges(RUN, MATRIX, [1] * 6, None, skip_last=True) == MERGES[:2]
    assert propose_merges(Plan.parse("A0F0 -F1 A2F2"), MATRIX, [1] * 6, None, skip_last=True) == []


def test_a_merge_wider_than_the_limit_is_not_proposed() -> None:
    assert propose_merges(RUN, MATRIX, [10] * 6, 30, skip_last=False) == MERGES[:2]
    assert propose_merges(RUN, MATRIX, [10] * 6, 29, skip_last=False) == [MERGES[0], Merge((1,), (2, 3), 0.5)][:1]
    assert propose_merges(RUN, MATRIX, [10] * 6, 19, skip_last=False) == []
    # Where the cheapest pair is too wide, the next one is taken.
    wide = propose_merges(RUN, MATRIX, [1, 1, 1, 9, 1, 1], 9, skip_last=False)
    assert wide == [Merge((1,), (2,), 0.3)]


def test_a_plan_without_runs_has_no_merges() -> None:
    assert propose_merges(Plan.identity(6), MATRIX, [1] * 6, None, skip_last=False) == []


@st.composite
def problems(draw: st.DrawFn) -> tuple[Plan, list[list[float]], list[int], int | None, bool]:
    n = draw(st.integers(2, 9))
    removed = draw(st.sets(st.integers(1, n - 1)))
    # Distinct costs: which of two equal ones comes first is no one's business.
    cells = draw(st.permutations(range(n * n)))
    matrix = [[cells[i * n + j] / (n * n) for j in range(n)] for i in range(n)]
    widths = draw(st.lists(st.integers(1, 5), min_size=n, max_size=n))
    return (
        Plan.identity(n).without_attention(removed),
        matrix,
        widths,
        draw(st.none() | st.integers(1, 20)),
        draw(st.booleans()),
    )


@given(problems())
def test_merges_are_those_of_trying_all_pairs(
    problem: tuple[Plan, list[list[float]], list[int], int | None, bool],
) -> None:
    plan, matrix, widths, max_width, skip_last = problem
    expected = [
        merge for run in plan.runs() for merge in grouping(run[:-1] if skip_last else run, matrix, widths, max_width)
    ]
    found = propose_merges(*problem)
    assert [({*merge.left, *merge.right}, merge.dependency) for merge in found] == sorted(expected, key=lambda m: m[1])


@given(problems())
def test_merging_all_gives_the_largest_groups_and_never_one_too_wide(
    problem: tuple[Plan, list[list[float]], list[int], int | None, bool],
) -> None:
    plan, _, widths, max_width, skip_last = problem
    merged = apply_merges(plan, propose_merges(*problem))
    assert merged.ffn_layers == plan.ffn_layers
    assert merged.attention_layers == plan.attention_layers
    for group in merged.groups:
        assert max_width is None or sum(widths[layer] for layer in group) <= max_width
    if max_width is None:
        assert merged.groups == [run for run in ((r[:-1] if skip_last else r) for r in plan.runs()) if len(run) > 1]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ([], "A0F0 A1F1 -F2 -F3 -F4 A5F5"),
        ([0], "A0F0 A1F1 -F2+3 -F4 A5F5"),
        ([0, 1], "A0F0 A1F1+2+3 -F4 A5F5"),
        ([0, 1, 2], "A0F0 A1F1+2+3+4 A5F5"),
        ([1], "A0F0 A1F1+2 -F3 -F4 A5F5"),
        ([2], "A0F0 A1F1 -F2 -F3+4 A5F5"),
        ([0, 2], "A0F0 A1F1 -F2+3+4 A5F5"),
        ([1, 2], "A0F0 A1F1+2 -F3+4 A5F5"),
        ([0, 0, 1, 1], "A0F0 A1F1+2+3 -F4 A5F5"),
    ],
)
def test_any_choice_of_merges_can_be_applied(chosen: list[int], expected: str) -> None:
    assert str(apply_merges(RUN, [MERGES[i] for i in chosen])) == expected


def test_groups_that_a_plan_already_has_are_kept_and_count_towards_the_limit() -> None:
    plan = Plan.parse("A0F0 -F1+2 -F3")
    matrix = [[0.0, 0.1, 0.1, 0.9], [0.0, 0.0, 0.5, 0.9], [0.0, 0.0, 0.0, 0.9], [0.0] * 4]
    merged = apply_merges(plan, propose_merges(plan, matrix, [1] * 4, 2, skip_last=False))
    assert all(len(group) <= 2 for group in merged.groups), str(merged)
    assert (1, 2) in merged.groups
