"""The likeliest tokens and their tail against float64, and what is lost when they are packed."""

import pytest
import torch
from torch import Tensor

from ffn_fusion.core.losses import CHUNKS
from ffn_fusion.core.topk import STEPS, TopK, join_bytes, pack, split_bytes, top_k, unpack

VOCAB, K = 101, 7
CHUNK = CHUNKS["cpu"]


def draw(num_tokens: int, spread: float = 4, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def mass(top: TopK) -> Tensor:
    """Probability of everything, which is one."""
    return top.log_probs.double().exp().sum(-1) + top.tail.double().exp()


def kl(exact: TopK, stored: TopK) -> Tensor:
    """KL of each token between the two, the tail as one event."""
    p, q = (torch.cat([top.log_probs, top.tail[..., None]], -1).double() for top in (exact, stored))
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("num_tokens", [1, CHUNK, CHUNK + 1])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_likeliest_tokens_and_the_rest_are_those_of_the_whole_distribution(
    num_tokens: int, temperature: float
) -> None:
    logits = draw(num_tokens)
    top = top_k(logits, K, temperature)
    log_probs, order = (logits.double() / temperature).log_softmax(-1).sort(descending=True)
    assert torch.equal(top.ids, order[:, :K])
    assert torch.allclose(top.log_probs.double(), log_probs[:, :K], atol=1e-5)
    assert torch.allclose(top.tail.double(), log_probs[:, K:].logsumexp(-1), atol=1e-5)
    assert torch.equal(logits, draw(num_tokens)), "the logits are not written to"


def test_a_tail_that_rounding_would_lose_is_kept() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, :K] = 60.0
    exact = top_k(logits, K)
    assert float(exact.tail) == pytest.approx(-60 + torch.tensor((VOCAB - K) / K).log().item(), abs=1e-4)
    assert float(unpack(pack(exact)).tail) == pytest.approx(float(exact.tail), abs=1 / STEPS)


@pytest.mark.parametrize("spread", [0.1, 1, 4, 20])
@pytest.mark.parametrize("k", [1, K, VOCAB - 1])
def test_packing_loses_next_to_nothing_and_keeps_the_sum(spread: float, k: int) -> None:
    exact = top_k(draw(200, spread), k)
    stored = unpack(pack(exact))
    assert torch.equal(stored.ids, exact.ids)
    assert (stored.log_probs.dtype, stored.tail.dtype) == (torch.float32, torch.float32)
    assert torch.allclose(mass(stored), torch.ones(200).double(), atol=1e-6)
    assert kl(exact, stored).abs().max() < 4e-6
    assert kl(exact, stored).mean() < 1e-6
    likely = exact.log_probs > -100
    assert (stored.log_probs - exact.log_probs)[likely].abs().max() < 2 / STEPS
    if k > 1:
        ratios = [top.log_probs - top.log_probs[:, :1] for top in (stored, exact)]
        assert (ratios[0] - ratios[1]).abs().max() < 0.51 / STEPS


def test_ratios_of_bf16_logits_are_stored_exactly() -> None:
    logits = (draw(100).abs() + 0.5).bfloat16()
    exact = top_k(logits, K)
    stored = unpack(pack(exact))
    ratios = [top.log_probs.double() - top.log_probs[:, :1] for top in (stored, exact)]
    assert (ratios[0] - ratios[1]).abs().max() < 1e-5


@pytest.mark.parametrize("gap", [300.0, torch.inf])
def test_tokens_that_are_out_of_the_question_stay_so(gap: float) -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0 - gap, 1.0 - gap, 1.0 - gap]])
    stored = unpack(pack(top_k(logits, 3)))
    assert stored.log_probs[0, 2] < -200
    assert stored.tail[0] < -100
    assert torch.allclose(stored.log_probs[0, :2], logits[0, :2].log_softmax(-1), atol=1 / STEPS)


def test_packed_numbers_fit_into_their_bytes() -> None:
    for spread in (0.01, 1, 200):
        packed = pack(top_k(draw(100, spread), K))
        for part in packed:
            assert int(part.min()) >= 0
            assert int(part.max()) < 2**16


@pytest.mark.parametrize("count", [1, 2, 3])
def test_bytes_are_joined_to_what_they_were_split_from(count: int) -> None:
    values = torch.randint(0, 256**count, (5, 6), generator=torch.Generator().manual_seed(0))
    values[0, 0], values[0, 1] = 256**count - 1, 0
    rows = split_bytes(values, count)
    assert rows.shape == (count, 30)
    assert torch.equal(join_bytes(rows, (5, 6)), values)
    # As they come out of a file.
    assert rows[0].numpy().tobytes() == bytes(int(v) & 255 for v in values.flatten())
