"""Fused weights are the sum of their members on a shared input, and nothing that is nearly so."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import Member, normalise, parallel, project, relative_error, sequential
from torch import Tensor, nn

from ffn_fusion.core import fusion

HIDDEN = 24
EXACT = 1e-10
"""Relative tolerance in float64."""
BF16 = 2**-6
"""Relative tolerance in bfloat16: each folded weight is rounded once (2^-9), and two or three of them multiply."""
WRONG = 1e-2
"""A mutant must miss by at least this, a hundred million times the tolerance."""


def make_members(seed: int, widths: list[int], gated: bool, biases: bool, layer_norm: bool) -> list[Member]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64) * 0.3

    return [
        Member(
            gain=torch.rand(HIDDEN, generator=g, dtype=torch.float64) + 0.5,
            up=draw(h, HIDDEN),
            down=draw(HIDDEN, h),
            gate=draw(h, HIDDEN) if gated else None,
            norm_bias=draw(HIDDEN) if layer_norm else None,
            up_bias=draw(h) if biases else None,
            gate_bias=draw(h) if biases and gated else None,
            down_bias=draw(HIDDEN) if biases else None,
        )
        for h in widths
    ]


def fuse(members: list[Member], multiple: int = 1, order: Tensor | None = None) -> Member:
    """The fused member that the functions under test make: gains and norm biases folded, widths padded.

    `order` mixes the columns of the down projection; it is there to make a mutant.
    """
    width = fusion.padded_width(sum(member.width for member in members), multiple)

    def weight(name: str) -> Tensor:
        return fusion.stack_rows((fusion.scale_columns(getattr(m, name), m.gain) for m in members), width)

    def bias(name: str) -> Tensor | None:
        if members[0].norm_bias is None and getattr(members[0], f"{name}_bias") is None:
            return None
        folded = (fusion.fold_bias(getattr(m, name), m.norm_bias, getattr(m, f"{name}_bias")) for m in members)
        return fusion.stack_rows(folded, width)

    gated = members[0].gate is not None
    down = fusion.stack_columns((m.down for m in members), width)
    down_biases = [m.down_bias for m in members if m.down_bias is not None]
    return Member(
        gain=torch.ones_like(members[0].gain),
        norm_bias=None if members[0].norm_bias is None else torch.zeros_like(members[0].norm_bias),
        up=weight("up"),
        up_bias=bias("up"),
        gate=weight("gate") if gated else None,
        gate_bias=bias("gate") if gated else None,
        down=down if order is None else down[:, order],
        down_bias=fusion.sum_biases(down_biases) if down_biases else None,
    )


def inputs(seed: int) -> Tensor:
    return torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) * 3


def error(members: list[Member], fused: Member, x: Tensor) -> float:
    """Of what the FFNs add, so that the stream cannot hide it."""
    return relative_error(parallel(x, [fused]) - x, parallel(x, members) - x)


widths = st.lists(st.integers(1, 40), min_size=2, max_size=15)
seeds = st.integers(0, 2**31)


@given(seeds, widths, st.booleans(), st.booleans(), st.booleans(), st.sampled_from([1, 64, 256]))
def test_a_fused_ffn_is_the_sum_of_its_members(
    seed: int, widths: list[int], gated: bool, biases: bool, layer_norm: bool, multiple: int
) -> None:
    members = make_members(seed, widths, gated, biases, layer_norm)
    assert error(members, fuse(members, multiple), inputs(seed)) < EXACT


@given(seeds, widths, st.booleans(), st.booleans(), st.booleans())
def test_in_bfloat16_a_fused_ffn_is_the_sum_of_its_members_to_rounding(
    seed: int, widths: list[int], gated: bool, biases: bool, layer_norm: bool
) -> None:
    members = [cast(m, torch.bfloat16) for m in make_members(seed, widths, gated, biases, layer_norm)]
    fused = fuse(members, 64)
    assert {t.dtype for t in vars(fused).values() if t is not None} == {torch.bfloat16}
    exact = [cast(member, torch.float64) for member in members]
    assert error(exact, cast(fused, torch.float64), inputs(seed)) < BF16


@given(seeds, widths, st.booleans(), st.booleans())
def test_in_bfloat16_only_the_folded_gain_costs_precision(
    seed: int, widths: list[int], gated: bool, biases: bool
) -> None:
    members = [cast(m, torch.bfloat16) for m in make_members(seed, widths, gated, biases, layer_norm=False)]
    members = [replace(m, gain=torch.ones_like(m.gain), down_bias=None) for m in members]
    fused = cast(fuse(members, 64), torch.float64)
    assert error([cast(member, torch.float64) for member in members], fused, inputs(seed)) < EXACT


def cast(member: Member, dtype: torch.dtype) -> Member:
    return Member(**{name: t if t is None else t.to(dtype) for name, t in vars(member).items()})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_folded_gain_is_rounded_once(dtype: torch.dtype) -> None:
    weight, gain = torch.randn(50, HIDDEN).to(dtype), torch.rand(HIDDEN).to(dtype) + 0.5
    expected = (weight.double() * gain.double()).to(dtype)
    assert torch.equal(fusion.scale_columns(weight, gain), expected)


@given(widths, st.sampled_from([1, 8, 256]))
def test_padding_is_zero_and_members_are_copied_bit_for_bit(widths: list[int], multiple: int) -> None:
    members = make_members(1, widths, True, True, False)
    total, width = sum(widths), fusion.padded_width(sum(widths), multiple)
    rows = fusion.stack_rows((m.up for m in members), width)
    columns = fusion.stack_columns((m.down for m in members), width)
    biases = fusion.stack_rows((m.up_bias for m in members if m.up_bias is not None), width)
    assert width % multiple == 0
    assert total <= width < total + multiple
    assert rows.shape == columns.T.shape == (width, HIDDEN)
    assert torch.equal(rows[:total], torch.cat([m.up for m in members]))
    assert torch.equal(columns[:, :total], torch.cat([m.down for m in members], 1))
    assert not rows[total:].any()
    assert not columns[:, total:].any()
    assert not biases[total:].any()


@given(seeds, st.booleans(), st.booleans())
def test_padding_one_member_changes_nothing(seed: int, gated: bool, biases: bool) -> None:
    member = make_members(seed, [17], gated, biases, layer_norm=False)[0]
    padded = fuse([replace(member, gain=torch.ones_like(member.gain))], 256)
    assert padded.width == 256
    assert error([member], replace(padded, gain=member.gain), inputs(seed)) < 1e-14


def test_members_that_do_not_fit_are_an_error() -> None:
    for stack in (fusion.stack_rows, fusion.stack_columns):
        with pytest.raises((AssertionError, RuntimeError)):
            stack([torch.ones(4, 4), torch.ones(4, 4)], 7)
        with pytest.raises(AssertionError):
            stack([], 7)


def test_small_contributions_make_parallel_and_sequential_agree_to_second_order() -> None:
    members, x = make_members(3, [20, 30, 10], True, False, False), inputs(3)
    gaps = []
    for scale in (1e-2, 1e-3):
        small = [replace(m, down=m.down * scale) for m in members]
        gaps.append(relative_error(parallel(x, [fuse(small)]), sequential(x, small)))
    assert gaps[0] / gaps[1] == pytest.approx(100, rel=0.2)


def mutants() -> dict[str, Member]:
    members = make_members(5, [20, 31, 12], True, True, True)
    fused, width = fuse(members), 63
    plain = [replace(m, gain=torch.ones_like(m.gain)) for m in members]
    no_bias = [replace(m, norm_bias=torch.zeros(HIDDEN, dtype=torch.float64)) for m in members]
    shuffled = torch.randperm(width, generator=torch.Generator().manual_seed(0))
    swapped = torch.cat([torch.arange(20, width), torch.arange(20)])
    return {
        "norms not folded": fuse(plain),
        "last norm for all": replace(fuse(plain), gain=members[-1].gain),
        "norm folded twice": replace(fused, gain=members[0].gain),
        "gate not folded": replace(fused, gate=fuse(plain).gate),
        "norm bias not folded": fuse(no_bias),
        "first member forgotten": fuse(members[1:]),
        "last member forgotten": fuse(members[:-1]),
        "member counted twice": fuse([*members, members[0]]),
        "down columns shuffled": fuse(members, order=shuffled),
        "down columns of another member": fuse(members, order=swapped),
        "up rows of another member": replace(fused, up=fused.up[swapped]),
        "gate and up swapped": replace(fused, gate=fused.up, up=fused.gate),  # type: ignore[arg-type]
        "down bias of one member only": replace(fused, down_bias=members[0].down_bias),
        "input bias missing": replace(fused, up_bias=None),
    }


def test_the_unmutated_fusion_passes_where_mutants_must_fail() -> None:
    members = make_members(5, [20, 31, 12], True, True, True)
    assert error(members, fuse(members), inputs(5)) < EXACT


@pytest.mark.parametrize("name", mutants())
def test_a_wrong_fusion_is_far_above_tolerance(name: str) -> None:
    members = make_members(5, [20, 31, 12], True, True, True)
    assert error(members, mutants()[name], inputs(5)) > WRONG


def test_a_layer_norm_is_its_gain_and_bias_on_a_shared_scale_free_part() -> None:
    """What folding rests on, against torch's own norms."""
    x, gain, bias = inputs(2), torch.rand(HIDDEN, dtype=torch.float64), torch.rand(HIDDEN, dtype=torch.float64)
    assert torch.allclose(normalise(x, gain, bias), nn.functional.layer_norm(x, (HIDDEN,), gain, bias, 1e-6))
    assert torch.allclose(normalise(x, gain, None), nn.functional.rms_norm(x, (HIDDEN,), gain, 1e-6))
    weight = torch.rand(3, HIDDEN, dtype=torch.float64)
    free = normalise(x, torch.ones_like(gain), torch.zeros_like(bias))
    folded = project(free, fusion.scale_columns(weight, gain), fusion.fold_bias(weight, bias, None))
    assert relative_error(folded, project(normalise(x, gain, bias), weight, None)) < EXACT
