"""The likeliest tokens of a prediction and the mass of all others: taken from logits, and packed into small integers.

Shapes: n tokens, v words of the vocabulary, k likeliest of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ffn_fusion.core.losses import chunks

STEPS = 256
"""Steps that a nat is divided into: no stored log-ratio is off by more than 1/512 nat. bf16 logits beyond 1/2 are
multiples of a step, so that ratios of theirs are stored exactly at temperature 1."""
MOST = 2**16 - 1


class TopK(NamedTuple):
    """`ids` [..., k] int64, likeliest first; `log_probs` [..., k] float32 at the temperature asked for; `tail` [...]
    float32, the log of the mass of all other tokens."""

    ids: Tensor
    log_probs: Tensor
    tail: Tensor


class Packed(NamedTuple):
    """The same in integers from 0 to 65,535 (ids: to v): `gaps` [..., k-1] from each log-probability down to the next,
    `odds` [...] of the tail, the log of its mass over the rest's; both in steps, the second with an offset of 2^15.

    That probabilities sum to one gives the likeliest token's own, so it is not stored.
    """

    ids: Tensor
    gaps: Tensor
    odds: Tensor


def top_k(logits_nv: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The k < v likeliest tokens of each prediction, in float32, a chunk of tokens at a time."""
    shape = (len(logits_nv), k)
    top = TopK(
        logits_nv.new_empty(shape, dtype=torch.long),
        logits_nv.new_empty(shape, dtype=torch.float),
        logits_nv.new_empty(shape[:1], dtype=torch.float),
    )
    # Into place: results kept from each chunk would sit between the chunks in a CPU's heap, and none of it came free.
    for chunk, ids, log_probs, tail in zip(chunks(logits_nv), *map(chunks, top), strict=True):
        z = chunk.float() / temperature
        torch.topk(z, k, out=(log_probs, ids))
        total = z.logsumexp(-1)
        # Not 1 - sum: a tail of less than 1e-7 would be lost in rounding.
        torch.sub(z.scatter_(-1, ids, -torch.inf).logsumexp(-1), total, out=tail)
        log_probs -= total[:, None]
    return top


def pack(top: TopK) -> Packed:
    """Rounded to steps; each rank's distance from the first is rounded, not each gap, so that errors do not add up."""
    log_probs = top.log_probs.double()
    below = ((log_probs[..., :1] - log_probs) * STEPS).round().clamp(0, MOST).long()
    odds = (top.tail.double() - log_probs.logsumexp(-1)) * STEPS
    return Packed(top.ids, below.diff(dim=-1), odds.round().clamp(-(2**15), 2**15 - 1).long() + 2**15)


def unpack(packed: Packed) -> TopK:
    """Log-probabilities and tail, which sum to one again."""
    odds = (packed.odds.double() - 2**15) / STEPS
    below = torch.nn.functional.pad(packed.gaps.double().cumsum(-1), (1, 0)) / STEPS
    log_probs = (-below).log_softmax(-1) + torch.nn.functional.logsigmoid(-odds)[..., None]
    return TopK(packed.ids.long(), log_probs.float(), torch.nn.functional.logsigmoid(odds).float())


def split_bytes(values: Tensor, count: int) -> Tensor:
    """Integers below 256^count as `count` rows of bytes, the lowest first: a row of like bytes compresses better."""
    flat = values.long().flatten()
    return torch.stack([(flat >> (8 * place)) & 255 for place in range(count)]).to(torch.uint8)


def join_bytes(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The integers [*shape] int64 of which `split_bytes` made these rows."""
    values = [row.long() << (8 * place) for place, row in enumerate(rows)]
    return torch.stack(values).sum(0).view(shape)
