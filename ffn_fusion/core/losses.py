"""What a student's logits cost against its parent's: per token, in float32, a chunk of tokens at a time."""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNKS = {"cpu": 32, "cuda": 512}
"""Tokens at once: logits of so many fit into a CPU's cache, which makes passes over them twice to eight times as fast;
on a GPU more of them hide the launches."""


class Reference(NamedTuple):
    """A parent's predictions on N tokens, ready for many comparisons: probabilities [N, V], sum of p log p [N]."""

    probabilities: Tensor
    negative_entropy: Tensor
    top: Tensor


def chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    """A tensor of N tokens in pieces that its device works through fastest."""
    pieces: tuple[Tensor, ...] = tensor.split(CHUNKS.get(tensor.device.type, 512))
    return pieces


def reference(logits_nv: Tensor) -> Reference:
    """Softmax of the parent's logits, once."""
    parts = []
    for chunk in chunks(logits_nv):
        logp = chunk.float().log_softmax(-1)
        p = logp.exp()
        parts.append((p, (p * logp).sum(-1), chunk.argmax(-1)))
    return Reference(*(torch.cat(column) for column in zip(*parts, strict=True)))


def kl_to(ref: Reference, logits_nv: Tensor) -> Tensor:
    """KL(parent || student) of each token, [N], in nats: sum p log p - sum p z + logsumexp z."""
    out = []
    for p, negative_entropy, z in zip(
        chunks(ref.probabilities), chunks(ref.negative_entropy), chunks(logits_nv), strict=True
    ):
        z = z.float()
        out.append(negative_entropy - torch.einsum("nv,nv->n", p, z) + z.logsumexp(-1))
    return torch.cat(out)


def nll(logits_nv: Tensor, targets_n: Tensor) -> Tensor:
    """Negative log-likelihood of each target token, [N], in nats."""
    pairs = zip(chunks(logits_nv), chunks(targets_n), strict=True)
    return torch.cat([torch.nn.functional.cross_entropy(z.float(), t, reduction="none") for z, t in pairs])
