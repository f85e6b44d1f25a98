"""Log-probabilities of continuations: a shared context runs once, and logits are made only where they are read."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from ffn_fusion.errors import UserError

Ids = tuple[int, ...]
Answer = tuple[float, bool]
UNEVEN = 0.7
"""Contexts in a batch are at least this share as long as the longest: padding costs more than another batch."""


@dataclass(frozen=True)
class Row:
    """Tokens to feed, of which the last ones predict `targets` of requests: for options of one token, several."""

    ids: Ids
    targets: list[tuple[int, Ids]]
    """Request and its continuation."""

    @property
    def first(self) -> int:
        """Position that predicts the first token of a continuation."""
        return len(self.ids) - len(self.targets[0][1])


@dataclass(frozen=True)
class Stem:
    """A context without its last token, and what follows it: one row for each different continuation."""

    ids: Ids
    rows: list[Row]

    @property
    def width(self) -> int:
        return max(len(row.ids) for row in self.rows)


def score_continuations(
    model: PreTrainedModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int, budget: int
) -> Iterator[tuple[int, Answer]]:
    """For each (context, continuation): its place, log-probability in nats and whether greedy decoding would write it.

    Contexts that are too long lose their beginning; none may be empty. `budget` is the tokens of a batch.
    """
    for batch in _batches(_stems(pairs, max_length), budget):
        rows = [row for stem in batch for row in stem.rows]
        yield from _read(model, rows, _after(model, batch) if batch[0].ids else {"use_cache": False})


def _after(model: PreTrainedModel, batch: list[Stem]) -> dict[str, Any]:
    """Run the contexts of a batch; how to call the model so that each row follows its own."""
    device = model.device
    lengths = torch.tensor([len(stem.ids) for stem in batch], device=device)
    width = max(len(stem.ids) for stem in batch)
    # Padding on the left, as in generation: rows must follow directly.
    ids = torch.tensor([(0,) * (width - len(stem.ids)) + stem.ids for stem in batch], device=device)
    mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    options = {"past_key_values": cache, "use_cache": True}
    model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1, **options)
    counts = torch.tensor([len(stem.rows) for stem in batch], device=device)
    owner = torch.arange(len(batch), device=device).repeat_interleave(counts)
    cache.batch_select_indices(owner)
    longest = max(stem.width for stem in batch)
    return options | {
        "attention_mask": torch.cat([mask[owner], mask.new_ones(len(owner), longest)], dim=1),
        "position_ids": lengths[owner, None] + torch.arange(longest, device=device),
    }


def _stems(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int) -> list[Stem]:
    shared: dict[Ids, dict[Ids, list[tuple[int, Ids]]]] = defaultdict(lambda: defaultdict(list))
    for i, (context, continuation) in enumerate(pairs):
        if not 0 < len(continuation) <= max_length:
            raise UserError(f"an answer has {len(continuation):,} tokens; it takes 1 to {max_length:,} to be scored")
        excess = len(context) + len(continuation) - 1 - max_length
        kept = tuple(context[max(0, excess) :])
        shared[kept][tuple(continuation[:-1])].append((i, tuple(continuation)))
    stems = []
    for context, rows in shared.items():
        # Two passes pay where the context would be repeated more than the continuations are long.
        repeated = (len(rows) - 1) * len(context) > sum(len(fed) + 1 for fed in rows)
        cut = len(context) - 1 if repeated else 0
        stems.append(Stem(context[:cut], [Row(context[cut:] + fed, targets) for fed, targets in rows.items()]))
    return stems


def _batches(stems: list[Stem], budget: int) -> Iterator[list[Stem]]:
    """Longest first, so that memory runs out at once or never; contexts of about one length together."""
    batch: list[Stem] = []
    for stem in sorted(stems, key=lambda s: (len(s.ids), s.width), reverse=True):
        grown = [*batch, stem]
        tokens = len(grown[0].ids) * len(grown) + max(s.width for s in grown) * sum(len(s.rows) for s in grown)
        if batch and (tokens > budget or len(stem.ids) < UNEVEN * len(batch[0].ids)):
            yield batch
            grown = [stem]
        batch = grown
    if batch:
        yield batch


def _read(model: PreTrainedModel, rows: list[Row], options: dict[str, Any]) -> Iterator[tuple[int, Answer]]:
    width = max(len(row.ids) for row in rows)
    # Padding on the right: nothing that is read comes after it.
    ids = torch.tensor([row.ids + (0,) * (width - len(row.ids)) for row in rows], device=model.device)
    kept = width - min(row.first for row in rows)
    logits = model(input_ids=ids, logits_to_keep=kept, **options).logits
    places = [
        (r, row.first - (width - kept) + offset, token)
        for r, row in enumerate(rows)
        for _, continuation in row.targets
        for offset, token in enumerate(continuation)
    ]
    index = torch.tensor(places, device=logits.device)
    # In float32: in bfloat16 the sums over an answer would tie far too often.
    chosen = logits[index[:, 0], index[:, 1]].float()
    log_probs = (chosen.gather(1, index[:, 2:]).squeeze(1) - chosen.logsumexp(-1)).tolist()
    greedy = (chosen.argmax(-1) == index[:, 2]).tolist()
    start = 0
    for row in rows:
        for request, continuation in row.targets:
            end = start + len(continuation)
            yield request, (sum(log_probs[start:end]), all(greedy[start:end]))
            start = end
