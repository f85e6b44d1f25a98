"""Losses of distillation: gradients against autograd, chunks against the whole, top tokens against all of them."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from ffn_fusion.core import distill
from ffn_fusion.core.distill import Losses, head_loss, logit_names, score_logits, stream_loss
from ffn_fusion.core.topk import TopK
from ffn_fusion.errors import UserError

N, V, D = 7, 23, 5


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(name: str, z: Tensor, parent: Tensor, targets: Tensor, losses: Losses) -> Tensor:
    """Each loss as torch has it."""
    if name == "lm":
        return cross_entropy(z, targets, ignore_index=-1, reduction="sum")
    t, b = losses.temperature, losses.jsd_share
    log_q, log_p = (z / t).log_softmax(-1), (parent / t).log_softmax(-1)

    def kl(of: Tensor, to: Tensor) -> Tensor:
        return kl_div(to, of, log_target=True, reduction="sum")

    log_m = (b * log_p.exp() + (1 - b) * log_q.exp()).log()
    values = {"kl": kl(log_p, log_q), "reverse_kl": kl(log_q, log_p)}
    values["jsd"] = b * kl(log_p, log_m) + (1 - b) * kl(log_q, log_m)
    return t**2 * values[name]


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jsd", "lm"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradient_are_those_of_autograd(name: str, temperature: float) -> None:
    losses = Losses(**{name: 1.7}, temperature=temperature, jsd_share=0.3)
    z, parent = drawn(N, V).requires_grad_(), drawn(N, V, seed=1)
    targets = torch.arange(N) - 1
    wanted = plain(name, z, parent, targets, losses)
    (gradient,) = torch.autograd.grad(1.7 * wanted, z)
    found = score_logits(losses, z.detach(), parent, targets)
    torch.testing.assert_close(found.sums, wanted.detach()[None])
    torch.testing.assert_close(found.gradient, gradient)


def test_half_precision_is_only_that_of_the_logits_themselves() -> None:
    z, parent = drawn(N, V).bfloat16(), drawn(N, V, seed=1).bfloat16()
    found = score_logits(Losses(kl=1.0), z, parent, None)
    wanted = score_logits(Losses(kl=1.0), z.float(), parent.float(), None)
    assert torch.equal(found.sums, wanted.sums)
    assert torch.equal(found.gradient, wanted.gradient.bfloat16())


def test_top_tokens_and_tail_are_a_distribution_of_their_own() -> None:
    z, parent = drawn(N, V).requires_grad_(), drawn(N, V, seed=1)
    log_p = parent.log_softmax(-1)
    top, ids = log_p.topk(4)
    tail = (1 - top.exp().sum(-1)).log()
    q = z.softmax(-1)
    own = q.gather(1, ids)
    rest = 1 - own.sum(-1)
    wanted = (top.exp() * (top - own.log())).sum() + (tail.exp() * (tail - rest.log())).sum()
    (gradient,) = torch.autograd.grad(wanted, z)
    found = score_logits(Losses(kl=1.0), z.detach(), TopK(ids, top, tail), None)
    torch.testing.assert_close(found.sums, wanted.detach()[None])
    torch.testing.assert_close(found.gradient, gradient)


def test_all_tokens_in_the_top_are_the_whole_divergence() -> None:
    z, log_p = drawn(N, V), drawn(N, V, seed=1).log_softmax(-1)
    top, ids = log_p.topk(V)
    whole = score_logits(Losses(kl=1.0), z, log_p, None)
    found = score_logits(Losses(kl=1.0), z, TopK(ids, top, torch.full((N,), -torch.inf, dtype=z.dtype)), None)
    torch.testing.assert_close(found.sums, whole.sums)
    torch.testing.assert_close(found.gradient, whole.gradient)


def test_only_forward_kl_can_be_had_of_top_tokens() -> None:
    log_p, ids = drawn(N, V).log_softmax(-1).topk(3)
    with pytest.raises(UserError, match="top tokens serve kl only"):
        score_logits(Losses(jsd=1.0), drawn(N, V), TopK(ids, log_p, log_p[:, 0]), None)


def test_the_head_is_worked_through_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = Losses(kl=1.0, lm=0.5)
    parent, targets = drawn(N, V, seed=1).float(), torch.arange(N)
    seen: list[int] = []

    def score(logits: Tensor, place: slice) -> distill.Scored:
        seen.append(len(logits))
        return score_logits(losses, logits, parent[place], targets[place])

    def run(room: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        monkeypatch.setitem(distill.LOGITS_AT_ONCE, "cpu", room)
        hidden, head = drawn(N, D, seed=2).float().requires_grad_(), drawn(V, D, seed=3).float().requires_grad_()
        total, sums = head_loss(hidden, head, 0.5, score, len(logit_names(losses)))
        (total * 2 / N).backward()
        return sums, hidden.grad, head.grad

    whole = run(N * V)
    pieces = run(3 * V)
    assert seen == [7, 3, 3, 1]
    for found, wanted in zip(pieces, whole, strict=True):
        torch.testing.assert_close(found, wanted)
    hidden, head = drawn(N, D, seed=2).float().requires_grad_(), drawn(V, D, seed=3).float().requires_grad_()
    z = 0.5 * hidden @ head.T
    loss = plain("kl", z, parent, targets, losses) + 0.5 * plain("lm", z, parent, targets, losses)
    (loss * 2 / N).backward()
    torch.testing.assert_close(whole[1], hidden.grad)
    torch.testing.assert_close(whole[2], head.grad)


@pytest.mark.parametrize(
    ("num_tokens", "sizes"), [(12, [4] * 3), (16, [4] * 4), (15, [5] * 3), (11, [4, 4, 3]), (0, [])]
)
def test_chunks_are_of_one_size_where_they_can_be(
    num_tokens: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(distill.LOGITS_AT_ONCE, "cpu", 5 * V + 1)
    found = distill.token_chunks(num_tokens, V, torch.device("cpu"))
    assert [place.stop - place.start for place in found] == sizes
    assert [token for place in found for token in range(place.start, place.stop)] == list(range(num_tokens))


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, head = drawn(N, D).requires_grad_(), drawn(V, D)

    def score(logits: Tensor, place: slice) -> distill.Scored:
        return score_logits(Losses(lm=1.0), logits, None, torch.arange(N)[place])

    total, _ = head_loss(hidden, head, 1.0, score, 1)
    total.backward()
    assert hidden.grad is not None
    assert head.grad is None


def test_streams_are_compared_token_by_token() -> None:
    parent = drawn(2, 3, D)
    parent[0, 0] *= 1e4
    assert float(stream_loss("mse", parent, parent)) == 0
    assert float(stream_loss("mse", torch.zeros_like(parent), parent)) == pytest.approx(6)
    assert float(stream_loss("cosine", 3 * parent, parent)) == pytest.approx(0, abs=1e-6)
    assert float(stream_loss("cosine", -parent, parent)) == pytest.approx(12)


@pytest.mark.parametrize(
    ("fields", "said"),
    [({}, "no loss has a weight"), ({"kl": -1.0}, "out of range"), ({"kl": 1.0, "temperature": 0.0}, "out of range")],
)
def test_losses_that_make_no_sense_are_refused(fields: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Losses(**fields)
