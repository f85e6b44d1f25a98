"""The search space of Puzzle: what may stand in the place of one layer of the parent, or of two that are fused."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ffn_fusion.core.cost import BlockShape
from ffn_fusion.core.fusion import padded_width
from ffn_fusion.core.plan import Attention, Block, Ffn, Plan


@dataclass(frozen=True)
class Change:
    """Layers `first` to `last` of the parent replaced by one block, or by nothing.

    Over one layer it is a variant of Puzzle's block library; over two it is a link, the second layer's FFN fused into
    the first's.
    """

    first: int
    last: int
    block: Block | None

    def applied(self, parent: Plan) -> Plan:
        """The parent with this one change."""
        replaced = range(self.first, self.last + 1)
        before = [block for block in parent.blocks if block.layers[-1] < self.first]
        after = [block for block in parent.blocks if block.layers[0] > self.last]
        assert len(before) + len(after) + len(replaced) == len(parent.blocks)
        return Plan((*before, *([self.block] if self.block else []), *after))

    def __str__(self) -> str:
        return str(self.block) if self.block else f"without {self.first}"


@dataclass(frozen=True)
class Sizes:
    """What the library holds beside removal.

    `kv_heads` None: every divisor. `shares` are FFN widths as shares of the parent's, rounded up to `multiple`.
    """

    kv_heads: tuple[int, ...] | None = None
    shares: tuple[float, ...] = (0.75, 0.5, 0.25)
    linear: bool = False
    multiple: int = 1


def changes(parent: Plan, shapes: Sequence[BlockShape], sizes: Sizes) -> list[Change]:
    """Every single change of the parent, layer by layer: attention variants, FFN variants, the layer dropped, links.

    The first layer keeps its attention, which engines size their cache by. What a parent lacks or has as a linear layer
    already is no change of it.
    """
    blocks = {block.layers[0]: block for block in parent.blocks}
    found: list[Change] = []
    for layer, own in blocks.items():
        variants = [Block(attention, own.ffns) for attention in _attentions(own, shapes[layer], sizes, layer > 0)]
        variants += [Block(own.attention, ffns) for ffns in _ffns(own, shapes[layer], sizes)]
        found += [Change(layer, layer, variant) for variant in variants]
        if layer > 0:
            found.append(Change(layer, layer, None))
        below = blocks.get(layer + 1)
        if below and _fusible(own) and _fusible(below):
            found.append(Change(layer, layer + 1, Block(own.attention, own.ffns + below.ffns)))
    return found


def _fusible(block: Block) -> bool:
    return bool(block.ffns) and not block.has_linear_ffn


def _attentions(own: Block, shape: BlockShape, sizes: Sizes, removable: bool) -> Iterator[Attention | None]:
    if own.attention is None:
        return
    layer = own.attention.layer
    wanted = range(1, shape.kv_heads) if sizes.kv_heads is None else sizes.kv_heads
    for kv_heads in sorted(wanted, reverse=True):
        if kv_heads < shape.kv_heads and shape.kv_heads % kv_heads == 0:
            yield Attention(layer, kv_heads)
    if removable and sizes.linear and not own.attention.linear:
        yield Attention(layer, linear=True)
    if removable and own.ffns:
        yield None


def _ffns(own: Block, shape: BlockShape, sizes: Sizes) -> Iterator[tuple[Ffn, ...]]:
    if not own.ffns:
        return
    layer = own.ffns[0].layer
    # A share is rounded before the ceiling: 0.1 * 10240 is a little more than 1024.
    widths = {padded_width(round(share * shape.ffn_width), sizes.multiple) for share in sizes.shares}
    for width in sorted(widths, reverse=True):
        if 0 < width < shape.ffn_width:
            yield (Ffn(layer, width),)
    if sizes.linear and not own.has_linear_ffn:
        yield (Ffn(layer, linear=True),)
    if own.attention:
        yield ()
