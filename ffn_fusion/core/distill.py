"""Losses of distillation on logits and on the stream, with their gradients in closed form.

Logits of a vocabulary are many times larger than the hidden states they are made of. `head_loss` therefore goes from
hidden states to loss *and* gradient a chunk of tokens at a time: neither model's logits ever exist as a whole.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ffn_fusion.core.topk import TopK
from ffn_fusion.errors import UserError

LOGITS_AT_ONCE = {"cpu": 2**23, "cuda": 2**26}
"""Logits in one chunk, of each model. Fewer would add up gradients of the head too often."""
ON_STREAM = ("cosine", "mse")


@dataclass(frozen=True)
class Losses:
    """Weights of the losses that are added up; the paper's (Puzzle, GKD) are `kl` and `cosine`.

    Forward KL, reverse KL and Jensen-Shannon divergence are between the predictions, in nats a token; `lm` is the
    negative log-likelihood of the text itself; `cosine` and `mse` compare streams behind matched blocks, averaged over
    blocks and tokens, the latter relative to the parent's stream.
    """

    kl: float = 0.0
    reverse_kl: float = 0.0
    jsd: float = 0.0
    lm: float = 0.0
    cosine: float = 0.0
    mse: float = 0.0
    temperature: float = 1.0
    """Divides both models' logits in `kl`, `reverse_kl` and `jsd`, which are multiplied by its square (Hinton)."""
    jsd_share: float = 0.5
    """The parent's share of the mixture in `jsd`."""

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if value < 0 or (name == "temperature" and value == 0) or (name == "jsd_share" and not 0 < value < 1):
                raise UserError(f"loss {name}: {value} is out of range")
        if not self.weights:
            raise UserError(f"no loss has a weight; there are {', '.join(_TERMS)}")

    @property
    def weights(self) -> dict[str, float]:
        """The losses that count, by name."""
        return {name: getattr(self, name) for name in _TERMS if getattr(self, name)}

    @property
    def on_logits(self) -> bool:
        return any(name not in ON_STREAM for name in self.weights)

    @property
    def on_stream(self) -> bool:
        return any(name in ON_STREAM for name in self.weights)

    @property
    def against_parent(self) -> bool:
        """Whether the parent's predictions are asked for."""
        return bool(self.kl or self.reverse_kl or self.jsd)


_TERMS = ("kl", "reverse_kl", "jsd", "lm", *ON_STREAM)


class Scored(NamedTuple):
    """Sums over tokens of each loss on logits [losses], in the order of `names`, and the gradient [N, V] of their
    weighted sum."""

    sums: Tensor
    gradient: Tensor


def logit_names(losses: Losses) -> list[str]:
    """The losses on logits that count, in the order of `Scored.sums`."""
    return [name for name in losses.weights if name not in ON_STREAM]


def score_logits(losses: Losses, student: Tensor, parent: Tensor | TopK | None, targets: Tensor | None) -> Scored:
    """Losses of N positions, and their gradient with respect to the student's logits [N, V] in the dtype of those.

    `parent` is the parent's logits [N, V], or its `TopK` [N, k] at the temperature of the losses. `targets` [N] holds
    the next token of each position, -1 where none is known. Whatever the logits' dtype, this reckons in float32 at
    least; compiled, no float32 copy of them is ever written.
    """
    dtype = student.dtype
    student = _precise(student)
    parent = _precise(parent) if isinstance(parent, Tensor) else parent
    total = torch.zeros_like(student)
    sums = []
    for name in logit_names(losses):
        if name == "lm":
            assert targets is not None
            value, gradient = _likelihood(student, targets)
        else:
            value, gradient = _divergence(name, losses, student, parent)
        sums.append(value)
        total += losses.weights[name] * gradient
    return Scored(torch.stack(sums), total.to(dtype))


def _precise(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _likelihood(student: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy: p - 1 at the target."""
    known = (targets >= 0).unsqueeze(1)
    log_q = student.log_softmax(-1)
    index = targets.clamp(min=0).unsqueeze(1)
    value = -(log_q.gather(1, index) * known).sum()
    gradient = log_q.exp_().scatter_add_(1, index, -torch.ones_like(index, dtype=student.dtype)) * known
    return value, gradient


def _divergence(name: str, losses: Losses, student: Tensor, parent: Tensor | TopK | None) -> tuple[Tensor, Tensor]:
    """One of the divergences at the temperature T, times T^2; its gradient then has one T left."""
    assert parent is not None
    t = losses.temperature
    log_q = (student / t).log_softmax(-1)
    if isinstance(parent, TopK):
        if name != "kl":
            raise UserError(f"loss {name} needs the parent's whole prediction; its top tokens serve kl only")
        value, gradient = _kl_of_top(log_q, parent)
    else:
        log_p = (parent / t).log_softmax(-1)
        value, gradient = _OF[name](log_p, log_q, losses)
    return t**2 * value, t * gradient


def _kl(log_p: Tensor, log_q: Tensor, _: Losses) -> tuple[Tensor, Tensor]:
    """KL(p || q): q - p."""
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(), log_q.exp() - p


def _reverse_kl(log_p: Tensor, log_q: Tensor, _: Losses) -> tuple[Tensor, Tensor]:
    """KL(q || p): q (log q/p - KL)."""
    q, ratio = log_q.exp(), log_q - log_p
    per_token = (q * ratio).sum(-1, keepdim=True)
    return per_token.sum(), q * (ratio - per_token)


def _jsd(log_p: Tensor, log_q: Tensor, losses: Losses) -> tuple[Tensor, Tensor]:
    """b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q: (1 - b) q (log q/m - KL(q || m))."""
    b = losses.jsd_share
    p, q = log_p.exp(), log_q.exp()
    log_m = (b * p + (1 - b) * q).clamp_min(torch.finfo(p.dtype).tiny).log()
    ratio = log_q - log_m
    own = (q * ratio).sum(-1, keepdim=True)
    return b * (p * (log_p - log_m)).sum() + (1 - b) * own.sum(), (1 - b) * q * (ratio - own)


_OF: dict[str, Callable[[Tensor, Tensor, Losses], tuple[Tensor, Tensor]]] = {
    "kl": _kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
}


def _kl_of_top(log_q: Tensor, top: TopK) -> tuple[Tensor, Tensor]:
    """KL of the parent's top k and tail, k + 1 outcomes, to the student's: q - p where p is known, and in the tail, of
    mass r for the parent and s for the student, q (1 - r / s)."""
    q, p, tail = log_q.exp(), top.log_probs.exp(), top.tail.exp()
    known_q = log_q.gather(1, top.ids)
    # What is left of one; the rounding of a long sum must not make it nothing.
    rest = (1 - known_q.exp().sum(-1)).clamp(min=1e-7)
    value = (p * (top.log_probs - known_q)).sum() + (tail * (top.tail - rest.log())).nan_to_num(0.0).sum()
    gradient = q * (1 - tail / rest).unsqueeze(1)
    return value, gradient.scatter_(1, top.ids, known_q.exp() - p)


Score = Callable[[Tensor, slice], Scored]
"""Losses and gradient of the positions of a slice, given the student's logits of them [n, V]."""


def logits_of(hidden: Tensor, head: Tensor, scale: float) -> Tensor:
    """[N, d] through a head [V, d] and its scale: [N, V], in float32 where something scales them."""
    logits = hidden @ head.T
    return logits if scale == 1 else logits.float() * scale


def head_loss(hidden: Tensor, head: Tensor, scale: float, score: Score, num_losses: int) -> tuple[Tensor, Tensor]:
    """Weighted sum of the losses, ready for `backward`, and their sums [num_losses].

    `hidden` [N, d] goes through the head [V, d] and `scale`. The gradient is computed here, chunk by chunk, and handed
    on by `backward`.
    """
    total, sums = _HeadLoss.apply(hidden, head, scale, score, num_losses)
    return total, sums


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, scale: float, score: Score, num_losses: int
    ) -> tuple[Tensor, Tensor]:
        to_hidden, to_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if to_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if to_head else None
        sums = torch.zeros(num_losses, device=hidden.device)
        for place in token_chunks(len(hidden), len(head), hidden.device):
            x = hidden[place]
            scored = score(logits_of(x, head, scale), place)
            sums += scored.sums
            gradient = scored.gradient if scale == 1 else (scored.gradient * scale).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(gradient, head, out=grad_hidden[place])
            if grad_head is not None:
                grad_head += gradient.T @ x
        ctx.gradients = grad_hidden, None if grad_head is None else grad_head.to(head.dtype)
        ctx.mark_non_differentiable(sums)
        # Its value is not needed: what counts is the gradient, and the sums tell the losses.
        return hidden.new_zeros((), dtype=torch.float32), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: FunctionCtx) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, head = (None if g is None else g * grad.to(g.dtype) for g in ctx.gradients)
        return hidden, head, None, None, None


def token_chunks(num_tokens: int, vocab_size: int, device: torch.device) -> list[slice]:
    """Slices of tokens whose logits fit into one chunk; of one size, for which kernels are compiled, if twice as many
    can be."""
    most = max(1, LOGITS_AT_ONCE.get(device.type, 2**26) // vocab_size)
    fewest = max(1, -(-num_tokens // most))
    number = next((n for n in range(fewest, 2 * fewest) if num_tokens % n == 0), fewest)
    size = max(1, -(-num_tokens // number))
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def stream_loss(name: str, student: Tensor, parent: Tensor) -> Tensor:
    """Sum over tokens of what the student's stream [..., d] lacks to the parent's: 1 - cos, or |x - y|^2 / |y|^2.

    Relative to each token, not to the mean of all: a few massive activations would otherwise be all there is to learn.
    """
    x, y = student.float(), parent.float()
    if name == "cosine":
        return (1 - torch.nn.functional.cosine_similarity(x, y, dim=-1)).sum()
    return ((x - y).square().sum(-1) / y.square().sum(-1).clamp(min=1e-12)).sum()
