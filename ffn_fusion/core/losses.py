"""What a student's logits cost against its parent's: per token, in float32, a chunk of tokens at a time."""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 512


class Reference(NamedTuple):
    """A parent's predictions on N tokens, ready for many comparisons: probabilities [N, V], sum of p log p [N]."""

    probabilities: Tensor
    negative_entropy: Tensor
    top: Tensor


def reference(logits_nv: Tensor) -> Reference:
    """Softmax of the parent's logits, once."""
    parts = []
    for chunk in logits_nv.split(CHUNK):
        logp = chunk.float().log_softmax(-1)
        p = logp.exp()
        parts.append((p, (p * logp).sum(-1), chunk.argmax(-1)))
    return Reference(*(torch.cat(column) for column in zip(*parts, strict=True)))


def kl_to(ref: Reference, logits_nv: Tensor) -> Tensor:
    """KL(parent || student) of each token, [N], in nats: sum p log p - sum p z + logsumexp z."""
    out = []
    for p, negative_entropy, z in zip(
        ref.probabilities.split(CHUNK), ref.negative_entropy.split(CHUNK), logits_nv.split(CHUNK), strict=True
    ):
        z = z.float()
        out.append(negative_entropy - torch.einsum("nv,nv->n", p, z) + z.logsumexp(-1))
    return torch.cat(out)


def nll(logits_nv: Tensor, targets_n: Tensor) -> Tensor:
    """Negative log-likelihood of each target token, [N], in nats."""
    pairs = zip(logits_nv.split(CHUNK), targets_n.split(CHUNK), strict=True)
    return torch.cat([torch.nn.functional.cross_entropy(z.float(), t, reduction="none") for z, t in pairs])
