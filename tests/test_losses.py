"""KL and NLL of each token against torch's own, on both sides of every chunk border."""

import pytest
import torch
from torch.nn import functional

from ffn_fusion.core.losses import CHUNKS, kl_to, nll, reference

VOCAB = 11
CHUNK = CHUNKS["cpu"]
counts = pytest.mark.parametrize("num_tokens", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 3])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def draw(num_tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(num_tokens, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4).to(dtype)


def slow_kl(parent: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    logp, logq = (z.double().log_softmax(-1) for z in (parent, student))
    return functional.kl_div(logq, logp, log_target=True, reduction="none").sum(-1)


@counts
@dtypes
def test_kl_is_that_of_torch_in_float64(num_tokens: int, dtype: torch.dtype) -> None:
    parent, student = draw(num_tokens, 0, dtype), draw(num_tokens, 1, dtype)
    found = kl_to(reference(parent), student)
    assert found.shape == (num_tokens,)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), slow_kl(parent, student), rtol=1e-5, atol=1e-5)


@counts
@dtypes
def test_nll_is_the_cross_entropy_of_each_token(num_tokens: int, dtype: torch.dtype) -> None:
    logits = draw(num_tokens, 0, dtype)
    targets = torch.arange(num_tokens) % VOCAB
    expected = functional.cross_entropy(logits.double(), targets, reduction="none")
    found = nll(logits, targets)
    assert found.shape == (num_tokens,)
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


@counts
def test_a_reference_holds_probabilities_entropy_and_the_top_token(num_tokens: int) -> None:
    logits = draw(num_tokens, 0)
    ref = reference(logits)
    assert torch.allclose(ref.probabilities, logits.softmax(-1), atol=1e-6)
    assert torch.allclose(ref.negative_entropy, -torch.distributions.Categorical(logits=logits).entropy(), atol=1e-5)
    assert torch.equal(ref.top, logits.argmax(-1))


def test_kl_to_oneself_is_zero_and_to_others_positive() -> None:
    parent = draw(50, 0)
    assert kl_to(reference(parent), parent).abs().max() < 1e-5
    assert kl_to(reference(parent), parent + 7).abs().max() < 1e-5
    assert kl_to(reference(parent), draw(50, 1)).min() > 0


def test_kl_is_from_parent_to_student_and_not_the_other_way() -> None:
    parent, student = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    there, back = slow_kl(parent, student), slow_kl(student, parent)
    assert abs(there - back) > 0.05
    assert torch.allclose(kl_to(reference(parent), student).double(), there, atol=1e-6)


def test_kl_of_a_coin_is_what_paper_and_pencil_give() -> None:
    parent, student = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    expected = 0.5 * torch.log(torch.tensor([0.5 / 0.9])) + 0.5 * torch.log(torch.tensor([0.5 / 0.1]))
    assert torch.allclose(kl_to(reference(parent), student), expected, atol=1e-6)


def test_a_token_is_scored_the_same_wherever_chunks_are_cut() -> None:
    parent, student = draw(CHUNK + 5, 0), draw(CHUNK + 5, 1)
    whole = kl_to(reference(parent), student)
    assert torch.allclose(whole[3:], kl_to(reference(parent[3:]), student[3:]), atol=1e-6)


def test_a_comparison_of_different_numbers_of_tokens_fails() -> None:
    with pytest.raises((RuntimeError, ValueError)):
        kl_to(reference(draw(4, 0)), draw(5, 0))
    with pytest.raises((RuntimeError, ValueError)):
        nll(draw(4, 0), torch.zeros(5, dtype=torch.long))
