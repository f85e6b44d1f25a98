"""Blockwise local distillation (Puzzle, section 2; docs/method.md, section 9): which parts of a block train, which
blocks stand in for which, the weight of a token, the learning rate over time.

A *unit* is one block, trained to take the parent's stream in front of its first layer to the one behind its last.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from math import cos, pi
from typing import Literal

import torch
from torch import Tensor

from ffn_fusion.core.plan import Attention, Block, Ffn, Plan
from ffn_fusion.errors import UserError

Part = Literal["attention", "ffn"]
WARM_UP = 0.05
"""Share of the steps over which the learning rate rises."""


def trained_parts(block: Block) -> frozenset[Part]:
    """The parts of a block that train: those that are not a whole sublayer of the parent's, in their own place.

    Where the attention is gone, or another layer's, the FFN makes up for it; where the FFN is gone, the attention.
    """
    attention, ffns = block.attention, block.ffns
    own_attention = attention is not None and attention == Attention(attention.layer)
    own_ffn = len(ffns) == 1 and ffns[0] == Ffn(ffns[0].layer)
    in_place = attention is not None and bool(ffns) and attention.layer == ffns[0].layer
    parts: set[Part] = set()
    if attention is not None and not (own_attention and ffns):
        parts.add("attention")
    if ffns and not (own_ffn and in_place):
        parts.add("ffn")
    return frozenset(parts)


def decoupled(block: Block, part: Part) -> Block | None:
    """The unit that changes this part of a block alone, the rest of the layer being the parent's; None if that is
    no unit of its own: the part is missing, or is the parent's."""
    if part == "attention":
        found = replace(block, ffns=(Ffn(block.attention.layer),)) if block.attention else None
    else:
        found = replace(block, attention=Attention(min(ffn.layer for ffn in block.ffns))) if block.ffns else None
    return found if found is not None and trained_parts(found) == {part} else None


def span(block: Block) -> tuple[int, int]:
    """First and last parent layer that a block stands for."""
    return min(block.layers), max(block.layers)


def in_place(block: Block, parent: Plan) -> Plan:
    """The parent's plan with this block in place of its layers; `UserError` if that is no plan."""
    first, last = span(block)
    before = [held for held in parent.blocks if span(held)[1] < first]
    after = [held for held in parent.blocks if span(held)[0] > last]
    plan = Plan((*before, block, *after))
    if not plan.is_ordered:
        raise UserError(f"block {block} names its layers out of order; it has no target in the parent")
    return plan


def changed_blocks(plan: Plan, parent: Plan) -> list[Block]:
    """Blocks of a plan that the parent does not have."""
    if not plan.is_ordered:
        raise UserError("a plan that reorders layers has no targets to train its blocks on")
    return [block for block in plan.blocks if block not in parent.blocks]


def layer_variants(
    layer: Block, kv_heads: Collection[int], widths: Collection[int], drop: Collection[Part]
) -> Iterator[Block]:
    """Decoupled units of one parent layer: one sublayer made smaller or dropped, the other as it is."""
    if layer.attention and layer.ffns:
        if "attention" in drop and layer.attention.layer > 0:
            yield replace(layer, attention=None)
        if "ffn" in drop:
            yield replace(layer, ffns=())
    if layer.attention:
        yield from (replace(layer, attention=replace(layer.attention, kv_heads=number)) for number in kv_heads)
    if layer.ffns:
        yield from (replace(layer, ffns=(replace(layer.ffns[0], width=width),)) for width in widths)


def token_weights(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weight of each token's squared error, and the squared change |y - x|^2 that is asked for, both [windows, length].

    `x` and `y` [windows, length, d] are the stream in front of a unit and its target. Puzzle divides by the mean
    square of the target over all tokens; a few massive activations would then be all there is to learn.
    """
    x, y = x.float(), y.float()
    longer = torch.maximum(x.square().sum(-1), y.square().sum(-1))
    return 1 / longer.clamp(min=1e-12), (y - x).square().sum(-1)


def scale(weight: Tensor) -> float:
    """Root mean square of the entries of a weight that are not zero: padding is; 0 if all are."""
    entries = weight[weight != 0].float()
    return float(entries.square().mean().sqrt()) if len(entries) else 0.0


def rate(step: int, num_steps: int) -> float:
    """Share of the learning rate at a step counted from 0: a straight warm-up, then a cosine down to nothing."""
    warm_up = max(1, round(WARM_UP * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + cos(pi * (step - warm_up) / max(1, num_steps - warm_up)))
