"""Channels by contribution and merged heads, on tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffn_fusion.core.pruning import contribution, kept_channels, lengths_without, pool_heads, share_kept


@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 5), st.integers(0, 1000))
def test_contribution_is_the_mean_change_of_the_output_when_a_channel_is_dropped(
    num_tokens: int, width: int, hidden_size: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(num_tokens, width, generator=generator, dtype=torch.float64)
    down = torch.randn(hidden_size, width, generator=generator, dtype=torch.float64)
    found = contribution(a.abs().mean(0), down)
    for channel in range(width):
        dropped = a.clone()
        dropped[:, channel] = 0
        assert float(found[channel]) == pytest.approx(float((a @ down.T - dropped @ down.T).norm(dim=-1).mean()))


@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 5), st.integers(0, 1000))
def test_beside_removed_channels_it_is_the_change_by_all_of_them(
    num_tokens: int, width: int, hidden_size: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(num_tokens, width, generator=generator)
    down = torch.randn(hidden_size, width, generator=generator)
    removed = torch.rand(width, generator=generator) < 0.4
    found = lengths_without(a, removed, down)
    for channel in set(range(width)) - set(removed.nonzero().flatten().tolist()):
        left = ~removed
        left[channel] = False
        change = a @ down.T - (a * left) @ down.T
        assert float(found[channel]) == pytest.approx(float(change.norm(dim=-1).sum()), rel=1e-4, abs=1e-4)
    if not removed.any():
        assert found / num_tokens == pytest.approx(contribution(a.abs().mean(0), down), rel=1e-4, abs=1e-5)


def test_a_channel_that_makes_up_for_a_removed_one_goes_with_it() -> None:
    """Alone the first channel is the least; beside the second, the third, which cancels it."""
    down = torch.tensor([[1.0, 1.2, -1.2], [0.0, 0.0, 0.1]])
    tokens = torch.ones(4, 3)
    assert lengths_without(tokens, torch.tensor([False, False, False]), down).argmin() == 0
    found = lengths_without(tokens, torch.tensor([False, True, False]), down)
    assert found[2] < found[0]
    assert float(found[2]) == pytest.approx(0.4)


def test_the_largest_channels_are_kept_in_their_order_and_the_first_of_equal_ones() -> None:
    scores = torch.tensor([1.0, 5.0, 0.0, 3.0, 3.0, 4.0, 3.0])
    assert kept_channels(scores, 3).tolist() == [1, 3, 5]
    assert kept_channels(scores, 4).tolist() == [1, 3, 4, 5]
    assert kept_channels(scores, 7).tolist() == list(range(7))
    assert share_kept(scores, kept_channels(scores, 3)) == pytest.approx(12 / 19)


@pytest.mark.parametrize("columns", [(), (5,)])
@pytest.mark.parametrize(("kv_heads", "merged"), [(4, 2), (4, 1), (3, 1), (6, 3), (4, 4)])
def test_heads_are_merged_by_the_mean_of_neighbours(kv_heads: int, merged: int, columns: tuple[int, ...]) -> None:
    head_dim, group = 3, kv_heads // merged
    rows = torch.randn(kv_heads * head_dim, *columns)
    expected = []
    for at in range(merged):
        for row in range(head_dim):
            expected.append(sum(rows[(at * group + i) * head_dim + row] for i in range(group)) / group)
    torch.testing.assert_close(pool_heads(rows, head_dim, group, 0), torch.stack(expected))


def test_packed_queries_stay_and_keys_are_not_mixed_with_values() -> None:
    queries, keys, values = torch.randn(8, 5), torch.randn(8, 5), torch.randn(8, 5)
    found = pool_heads(torch.cat([queries, keys, values]), 2, 2, 8)
    expected = [queries, pool_heads(keys, 2, 2, 0), pool_heads(values, 2, 2, 0)]
    assert torch.equal(found, torch.cat(expected))


def test_the_mean_of_half_precision_is_rounded_once() -> None:
    rows = torch.tensor([1.0, 1.0, 1.0, 1.0078125]).to(torch.bfloat16)
    exact = rows.double().mean().to(torch.bfloat16)
    assert torch.equal(pool_heads(rows, 1, 4, 0), exact[None])
    assert pool_heads(rows, 1, 4, 0).dtype == torch.bfloat16
