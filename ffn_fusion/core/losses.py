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
    ref = Reference(
        torch.empty_like(logits_nv, dtype=torch.float),
        logits_nv.new_empty(len(logits_nv), dtype=torch.float),
        logits_nv.new_empty(len(logits_nv), dtype=torch.long),
    )
    # Into place, here and below: parts that are joined in the end would be held twice, and those kept from each chunk
    # would sit between the chunks in a CPU's heap.
    for z, p, negative_entropy, top in zip(chunks(logits_nv), *map(chunks, ref), strict=True):
        logp = z.float().log_softmax(-1)
        torch.exp(logp, out=p)
        torch.sum(p * logp, -1, out=negative_entropy)
        torch.argmax(z, -1, out=top)
    return ref


def kl_to(ref: Reference, logits_nv: Tensor) -> Tensor:
    """KL(parent || student) of each token, [N], in nats: sum p log p - sum p z + logsumexp z."""
    total = ref.negative_entropy.clone()
    for kl, p, z in zip(chunks(total), chunks(ref.probabilities), chunks(logits_nv), strict=True):
        z = z.float()
        kl -= torch.einsum("nv,nv->n", p, z)
        kl += z.logsumexp(-1)
    return total


def nll(logits_nv: Tensor, targets_n: Tensor) -> Tensor:
    """Negative log-likelihood of each target token, [N], in nats."""
    total = logits_nv.new_empty(len(targets_n), dtype=torch.float)
    for out, z, t in zip(chunks(total), chunks(logits_nv), chunks(targets_n), strict=True):
        out.copy_(torch.nn.functional.cross_entropy(z.float(), t, reduction="none"))
    return total
