"""Scores and costs put together: the problem that `search` solves (Puzzle, Appendix B; fusion included).

Every resource is a sum over layers: times by the cost table, bytes and parameters by count. A link saves what two FFNs
cost more apart than side by side; as far as the time of an FFN is affine in its width, links of a chain add up too.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from ffn_fusion.core.cost import BlockShape, shapes_of
from ffn_fusion.core.cost_table import CostTable
from ffn_fusion.core.plan import Block, Plan
from ffn_fusion.core.problem import Link, Option, Problem
from ffn_fusion.core.search_records import ChangeScore

STRENGTH = {True: 0.1, False: 0.5}
"""Share of the second-order interactions that counts, if students are fitted and if not (docs/method.md): KL grows
slower than its expansion, and a fitted block makes up for part of what those before it did."""
Uses = Mapping[str, float]


@dataclass(frozen=True)
class Ledger:
    """What blocks take of each resource: decode_ms, request_ms, memory_bytes, kv_bytes, parameters, sublayers.

    `shapes` are those of the parent's layers, `multiple` is what the student's layout rounds widths up to.
    """

    table: CostTable
    shapes: Sequence[BlockShape]
    multiple: int

    def parent(self) -> Uses:
        """What the parent takes, nothing rounded."""
        return self._uses(self.shapes)

    def fixed(self) -> Uses:
        """What a model takes beside its blocks."""
        return self.model([])

    def block(self, block: Block) -> Uses:
        """What one block adds to a model."""
        return _difference(self.model([block]), self.fixed())

    def model(self, blocks: Sequence[Block]) -> Uses:
        """What a model of these blocks takes, each fused FFN by its own width."""
        return self._uses(self.sized(blocks))

    def sized(self, blocks: Sequence[Block]) -> list[BlockShape]:
        """Shapes of these blocks in the student's layout."""
        return shapes_of(blocks, self.shapes, self.multiple)

    def _uses(self, shapes: Sequence[BlockShape]) -> Uses:
        cost, request = self.table.cost(shapes), self.table.scenario
        return {
            "decode_ms": self.table.decode_ms(shapes),
            "request_ms": self.table.request_ms(shapes),
            "memory_bytes": cost.memory_bytes(request.batch_size, request.prompt_length + request.new_tokens),
            "kv_bytes": cost.kv_bytes_per_token,
            "parameters": cost.num_parameters,
            "sublayers": cost.num_sublayers,
        }


def _difference(more: Uses, less: Uses) -> Uses:
    return {name: value - less[name] for name, value in more.items()}


@dataclass(frozen=True)
class Scores:
    """Single changes of a parent, what each costs by some objective [M], and the Gram matrix of their deviations
    [M, M], all in the same order."""

    changes: Sequence[ChangeScore]
    values: NDArray[np.float64]
    gram: NDArray[np.float64]


class Variants:
    """The scored changes of a parent, sorted into the options of each layer and the links between layers."""

    def __init__(self, parent: Plan, scores: Scores) -> None:
        self._own = {block.layers[0]: block for block in parent.blocks}
        self._scores = scores
        self._at = {(score.first, score.last, score.block): i for i, score in enumerate(scores.changes)}

    def problem(self, ledger: Ledger, limits: Uses, *, max_width: int | None, fuse: bool, strength: float) -> Problem:
        """The choice among all variants within `limits`. `strength` 0 leaves the interactions out."""
        gram = strength * self._scores.gram
        links = list(self._links(ledger)) if fuse else []
        values, gram = _relative_to_removal(
            self._scores.values, gram, {link.item: self._removal(link.left + 1) for link in links}
        )
        return Problem(
            options=[list(self._options(layer, ledger)) for layer in range(len(ledger.shapes))],
            scores=values.tolist(),
            limits=limits,
            fixed=ledger.fixed(),
            links=links,
            interactions=gram if strength else None,
            max_width=max_width,
        )

    def _options(self, layer: int, ledger: Ledger) -> Iterator[Option]:
        if layer not in self._own:
            yield Option(None)  # padding in the parent, so that options are found by layer
            return
        own = self._own[layer]
        blocks = [Block.parse(s.block) for s in self._scores.changes if s.first == s.last == layer and s.block]
        attentions = [own.attention, *(block.attention for block in blocks if block.ffns == own.ffns)]
        ffns = [own.ffns, *(block.ffns for block in blocks if block.attention == own.attention)]
        for attention, kept in product(attentions, ffns):
            block = Block(attention, kept)
            if not block.layers:
                continue
            items = [
                self._at[layer, layer, str(part)]
                for part in (Block(attention, own.ffns), Block(own.attention, kept))
                if part != own
            ]
            width = sum(ffn.width or ledger.shapes[ffn.layer].ffn_width for ffn in kept)
            fusible = not any(ffn.linear for ffn in kept)
            yield Option(block, tuple(items), ledger.block(block), width, fusible)
        if (layer, layer, "") in self._at:
            yield Option(None, (self._at[layer, layer, ""],))

    def _links(self, ledger: Ledger) -> Iterator[Link]:
        for number, score in enumerate(self._scores.changes):
            if score.last == score.first:
                continue
            first, last = self._own[score.first].ffns, self._own[score.last].ffns
            apart = ledger.model([Block(None, first), Block(None, last)])
            yield Link(score.first, number, _difference(apart, ledger.model([Block(None, first + last)])))

    def _removal(self, layer: int) -> int | None:
        """The change that takes the attention of a layer away; None if the parent has none there."""
        own = self._own[layer]
        return None if own.attention is None else self._at[layer, layer, str(Block(None, own.ffns))]


def _relative_to_removal(
    values: NDArray[np.float64], gram: NDArray[np.float64], removals: Mapping[int | None, int | None]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores and Gram matrix with each link in place of the change that it was measured as.

    That change removes an attention, too, which is an item of its own: the link's vector is the difference of the
    two, and its score what makes both together cost what was measured.
    """
    into = np.eye(len(values))
    values = values.copy()
    for link, removal in removals.items():
        if link is not None and removal is not None:
            into[link, removal] = -1.0
            values[link] -= values[removal] + gram[removal, link] - gram[removal, removal]
    return values, into @ gram @ into.T
