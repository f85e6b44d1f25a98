"""Fused groups cut from attention-free runs, with the layout of Ultra-253B as the oracle."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import one_line

from ffn_fusion.core.groups import attention_free_runs, check_groups, fuse_independent, fuse_runs
from ffn_fusion.core.plan import Plan

FULL = 53_248
"""Channels of an FFN of Llama-3.1-405B."""
CAP = 8 * FULL
ULTRA = Plan.identity(126).without_attention([24, 26, 51, 52, *range(54, 61), 64, *range(66, 116)])
RELEASED = {(66, 73): 399_360, (74, 85): 425_984, (86, 100): 343_040, (101, 114): 301_056}
"""First and last layer of each group and its channels, as released; those of single members are not known."""
GROUPS = [list(range(first, last + 1)) for first, last in RELEASED]


def ultra_widths() -> list[int]:
    """Members that sum to the released groups, as equal as can be."""
    widths = [FULL] * 126
    for (first, last), total in RELEASED.items():
        size = last + 1 - first
        for at, layer in enumerate(range(first, last + 1)):
            widths[layer] = total * (at + 1) // size - total * at // size
    return widths


def test_the_released_groups_of_ultra_253b_are_admissible() -> None:
    widths = ultra_widths()
    assert [sum(widths[layer] for layer in group) for group in GROUPS] == [*RELEASED.values()]
    assert max(widths) == FULL
    check_groups(ULTRA, GROUPS, widths, CAP, skip_last=True)
    one_line(lambda: check_groups(ULTRA, GROUPS, widths, CAP - 1, skip_last=True), "74-85", "425984", "425983")
    longer = [*GROUPS[:3], [*GROUPS[3], 115]]
    one_line(lambda: check_groups(ULTRA, longer, widths, CAP, skip_last=True), "101-115", "FFN 115", "last of its run")
    check_groups(ULTRA, longer, widths, CAP, skip_last=False)


def test_filling_the_long_run_of_ultra_253b_covers_what_was_released_in_as_many_groups() -> None:
    widths = ultra_widths()
    groups = fuse_runs(ULTRA, widths, CAP, skip_last=True, num_runs=1).groups
    check_groups(ULTRA, groups, widths, CAP, skip_last=True)
    assert [layer for group in groups for layer in group] == list(range(66, 115))
    assert len(groups) == len(GROUPS)
    assert groups[:2] == [tuple(group) for group in GROUPS[:2]]
    # The third released group had room for one more FFN of any width there is, so no rule of filling gives it.
    assert RELEASED[86, 100] + FULL < CAP
    assert len(groups[2]) > len(GROUPS[2])


def test_the_runs_of_ultra_253b_are_its_attention_free_layers() -> None:
    assert attention_free_runs(ULTRA) == [tuple(range(66, 116)), tuple(range(54, 61)), (51, 52)]
    plan = fuse_runs(ULTRA, ultra_widths(), CAP, skip_last=True)
    assert plan.groups[0] == tuple(range(54, 60))
    assert len(plan.groups) == 5
    assert plan.unfused() == ULTRA


RUNS = Plan.parse("A0F0 -F1 -F2 A3F3 -F4 -F5 -F6 -F7 A8F8 A9 -F10 -F11")


@pytest.mark.parametrize(
    ("max_width", "skip_last", "num_runs", "expected"),
    [
        (None, True, None, "A0F0 -F1 -F2 A3F3 -F4+5+6 -F7 A8F8 A9 -F10 -F11"),
        (None, False, None, "A0F0 -F1+2 A3F3 -F4+5+6+7 A8F8 A9 -F10+11"),
        (None, False, 1, "A0F0 -F1 -F2 A3F3 -F4+5+6+7 A8F8 A9 -F10 -F11"),
        (None, False, 2, "A0F0 -F1+2 A3F3 -F4+5+6+7 A8F8 A9 -F10 -F11"),
        (20, False, None, "A0F0 -F1+2 A3F3 -F4+5 -F6+7 A8F8 A9 -F10+11"),
        (19, False, None, "A0F0 -F1 -F2 A3F3 -F4 -F5 -F6 -F7 A8F8 A9 -F10 -F11"),
    ],
)
def test_runs_are_filled_from_the_left(max_width: int, skip_last: bool, num_runs: int, expected: str) -> None:
    assert str(fuse_runs(RUNS, [10] * 12, max_width, skip_last, num_runs)) == expected


def test_an_ffn_wider_than_the_cap_stands_alone_and_old_groups_are_cut_anew() -> None:
    widths = [1, 1, 1, 1, 1, 9, 1, 1, 1, 1, 1, 1]
    assert str(fuse_runs(RUNS, widths, 8, False, 1)) == "A0F0 -F1 -F2 A3F3 -F4 -F5 -F6+7 A8F8 A9 -F10 -F11"
    assert fuse_runs(RUNS.fuse([5, 6]), [10] * 12, 20, False, 1) == fuse_runs(RUNS, [10] * 12, 20, False, 1)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=9), st.integers(1, 20), st.booleans())
def test_what_is_filled_is_admissible_and_no_group_has_room_for_the_next_ffn(
    sizes: list[int], max_width: int, skip_last: bool
) -> None:
    widths = [5, *sizes]
    plan = Plan.identity(len(widths)).without_attention(range(1, len(widths)))
    fused = fuse_runs(plan, widths, max_width, skip_last)
    check_groups(plan, fused.groups, widths, max_width, skip_last)
    ends = range(1, len(widths) - skip_last)
    parts = [block.ffns for block in fused.blocks if block.ffns[0].layer in ends]
    for left, right in pairwise(parts):
        assert sum(widths[ffn.layer] for ffn in left) + widths[right[0].layer] > max_width


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ([[4]], ["group 4", "one FFN"]),
        ([[]], ["at least two"]),
        ([[4, 6]], ["[4, 6]", "consecutive"]),
        ([[7, 8]], ["attention 8"]),
        ([[8, 10]], ["attention 9", "stands between"]),
        ([[4, 5], [5, 6]], ["group 5-6", "FFN 5"]),
        ([[4, 5], [4, 5]], ["group 4-5", "FFN 4"]),
        ([[6, 7]], ["group 6-7", "last of its run"]),
        ([[4, 5, 6]], ["group 4-6", "30", "25"]),
        ([[4, 99]], ["cannot fuse"]),
    ],
)
def test_groups_that_cannot_be_are_refused_with_the_reason(groups: list[list[int]], says: list[str]) -> None:
    one_line(lambda: check_groups(RUNS, groups, [10] * 12, 25, skip_last=True), *says)


def test_groups_may_begin_with_the_ffn_behind_an_attention() -> None:
    check_groups(RUNS, [[0, 1], [3, 4, 5]], [10] * 12, None, skip_last=True)


MATRIX = [[0.1 * (i + j) if j > i else 0.0 for j in range(12)] for i in range(12)]


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.0, str(RUNS)),
        (0.35, "A0F0+1+2 A3F3 -F4 -F5 -F6 -F7 A8F8 A9 -F10 -F11"),
        (0.75, "A0F0+1+2 A3F3+4 -F5 -F6 -F7 A8F8 A9 -F10 -F11"),
        (1.15, "A0F0+1+2 A3F3+4+5+6 -F7 A8F8 A9 -F10 -F11"),
        (9.0, "A0F0+1+2 A3F3+4+5+6+7 A8F8 A9 -F10+11"),
    ],
)
def test_a_group_has_no_dependency_over_the_threshold(threshold: float, expected: str) -> None:
    fused = fuse_independent(RUNS, MATRIX, threshold, [10] * 12, None, skip_last=False)
    assert str(fused) == expected
    assert all(MATRIX[i][j] <= threshold for group in fused.groups for i in group for j in group if i < j)
