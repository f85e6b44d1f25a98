"""Replace-one-block scores as a grid: a row for each kind of change, a column for each layer."""

from collections.abc import Sequence
from dataclasses import dataclass

from ffn_fusion.core.plan import Block
from ffn_fusion.core.search_records import ChangeScore
from ffn_fusion.core.stats import Estimate

FFN, LAYER, FUSED = 1, 2, 3
"""Rows in this order, those of attentions first; within it from the largest size to linear layers and removal."""
LINEAR, REMOVED = 0, -1


@dataclass(frozen=True, order=True)
class Row:
    """A kind of change. Rows are sorted: `part` first, `rank` is minus the size that is left."""

    part: int
    rank: int
    name: str


def row_of(score: ChangeScore) -> Row:
    """The kind of change that a score is of."""
    if score.last > score.first:
        return Row(FUSED, 0, "FFN fused with the next")
    if not score.block:
        return Row(LAYER, 0, "layer dropped")
    block = Block.parse(score.block)
    return _attention_row(block) or _ffn_row(block) or Row(0, -REMOVED, "attention removed")


def _attention_row(block: Block) -> Row | None:
    """An attention that was changed and is still there."""
    attention = block.attention
    if attention and attention.kv_heads:
        heads = attention.kv_heads
        return Row(0, -heads, f"attention, {heads} kv head{'s' if heads > 1 else ''}")
    return Row(0, LINEAR, "attention linear") if attention and attention.linear else None


def _ffn_row(block: Block) -> Row | None:
    """An FFN that was changed or removed."""
    if block.has_linear_ffn:
        return Row(FFN, LINEAR, "FFN linear")
    if block.is_cut:
        width = max(ffn.width or 0 for ffn in block.ffns)
        return Row(FFN, -width, f"FFN, {width:,} channels")
    return None if block.ffns else Row(FFN, -REMOVED, "FFN removed")


def grid(scores: Sequence[ChangeScore], num_layers: int) -> list[tuple[str, list[Estimate | None]]]:
    """KL of every kind of change at every layer; None where there is no such change."""
    rows: dict[Row, list[Estimate | None]] = {}
    for score in scores:
        rows.setdefault(row_of(score), [None] * num_layers)[score.first] = score.kl
    return [(row.name, rows[row]) for row in sorted(rows)]
