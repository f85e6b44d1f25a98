"""Calibrated fusion on a model: two streams, parent and student, go through the layers side by side.

Each layer is in memory only while the streams pass it, so the cost in memory is one block and the streams; the
whole fit is about one forward pass of the parent and three of the student's changed blocks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ffn_fusion.core.plan import Block, Plan
from ffn_fusion.core.pruning import Channels, Cuts
from ffn_fusion.errors import UserError
from ffn_fusion.hf.arch import FFN
from ffn_fusion.hf.fit import down_projection, fit_down, inverse_squares
from ffn_fusion.hf.model import materialise, skeleton, student_arch, student_config
from ffn_fusion.hf.replace import LINEAR_FFN
from ffn_fusion.hf.surgery import LAYER, Trained, block_recipes
from ffn_fusion.hf.walk import Layer, ParentWalk, ffn_half
from ffn_fusion.settings import Fusion


@dataclass(frozen=True)
class BlockFit:
    """What calibration did to one block: held-out error relative to |target - input|^2, and the strengths chosen."""

    block: int
    name: str
    error_before: float
    error_after: float
    strengths: tuple[float | None, ...]


@dataclass
class Streams:
    """Where a calibration stands: next block, next parent layer, and both residual streams [windows, length, d]."""

    block: int
    layer: int
    parent: Tensor
    student: Tensor | None
    """None while the student is still equal to its parent."""


def blocks_to_fit(plan: Plan, parent: Plan, target: str) -> list[int]:
    """Blocks with an FFN whose part of the parent is not what they are; for "unfused" those with a new FFN only.

    A block answers for the parent's sublayers from the end of the last block with an FFN to its own end: for layers
    dropped behind it, and for an attention without FFN in front of it, which has nothing to fit.
    """
    if target == "unfused":
        held = {ffn for block in parent.blocks for ffn in block.ffns}
        return [index for index, block in enumerate(plan.blocks) if block.is_fused or not held.issuperset(block.ffns)]
    ends = _ends(plan, parent.blocks[-1].layers[-1] + 1)
    found, start, first = [], 0, 0
    for index, block in enumerate(plan.blocks):
        if block.ffns:
            theirs = [held for held in parent.blocks if start <= held.layers[0] < ends[index]]
            if theirs != list(plan.blocks[first : index + 1]):
                found.append(index)
            start, first = ends[index], index + 1
    return found


def check_order(plan: Plan) -> None:
    """`UserError` if no stream of the parent corresponds to those between the plan's blocks."""
    if not plan.is_ordered:
        raise UserError("a plan that reorders layers has no target to be fitted to; use --calibrate none")


def _ends(plan: Plan, num_layers: int) -> list[int]:
    """Parent layer whose input corresponds to each block's output: the next block's first layer."""
    return [min(block.layers) for block in plan.blocks[1:]] + [num_layers]


class Calibration:
    """Fits the down projections of a student, and the linear layers in the place of its FFNs, front to back, so that
    each fit sees the drift of those before it. A linear attention stays as it was made."""

    def __init__(
        self, walk: ParentWalk, plan: Plan, fusion: Fusion, channels: Channels, trained: Trained | None = None
    ) -> None:
        """`channels` are those kept of each FFN that the plan cuts; the fit starts from `trained` blocks."""
        assert fusion.calibrate != "none"
        check_order(plan)
        parent = walk.parent
        self.walk, self.plan, self.trained = walk, plan, trained
        self.norm, self.target = fusion.norm, fusion.calibrate
        self.cuts = Cuts(parent.head_dim, channels)
        self.arch = student_arch(parent)
        self._student_shell = skeleton(student_config(parent, plan))
        self._ends = _ends(plan, parent.num_layers)
        self.to_fit = blocks_to_fit(plan, parent.plan, self.target)

    def output_name(self, block: int) -> str:
        """Name of the tensor that a fit of this block replaces."""
        output = LINEAR_FFN if self.plan.blocks[block].has_linear_ffn else f"{FFN}.{self.arch.output}"
        return f"{LAYER.format(block)}{output}.weight"

    @torch.no_grad()
    def run(
        self, ids: Tensor, streams: Streams | None = None, known: Sequence[Tensor] | None = None
    ) -> Iterator[tuple[BlockFit, Tensor, Streams]]:
        """Yield each fit, the block's new down projection [d, h] or linear FFN [d, d], and the state to resume from,
        front to back.

        `ids` is [windows, length]; the last eighth of the windows is held out. `known` is the parent's stream
        before each layer and after the last, for callers that fit many plans on the same text.
        """
        self._known = known
        embedded = self.walk.enter(ids if known is None else ids[: self.walk.batch_size])
        embedded = embedded if known is None else known[0]
        state = streams or Streams(0, 0, embedded, None)
        for index in range(state.block, max(self.to_fit, default=-1) + 1):
            if state.student is None and index in self.to_fit:
                state.student = state.parent.clone()
            done = self._step(state, index)
            state.block = index + 1
            if done is not None:
                yield *done, state

    def _step(self, state: Streams, index: int) -> tuple[BlockFit, Tensor] | None:
        """Take both streams past one block, fitting it on the way if it is to be fitted."""
        if state.student is None:
            self._advance_parent(state, self._ends[index])
            return None
        block, student = self.plan.blocks[index], state.student
        layer = self._student_layer(index, block)
        if block.attention:
            self.walk.advance(student, partial(self.walk.attend, layer, block.attention.layer))
        self._advance_parent(state, self._ends[index])
        target = self._unfused(student, block) if self.target == "unfused" else state.parent
        fit = fit_down(self.walk, layer, student, target, inverse_squares(student)) if index in self.to_fit else None
        self.walk.advance(student, partial(ffn_half, layer))
        weight = down_projection(self.walk, layer).weight.data
        layer.to("meta")
        return (BlockFit(index, str(block), *fit), weight) if fit else None

    def _student_layer(self, index: int, block: Block) -> Layer:
        recipes = block_recipes(block, self.walk.source, self.arch, self.norm, self.cuts, self.trained)
        makers = {name: recipe.build for name, recipe in recipes.items()}
        return materialise(self._student_shell.model.layers[index], makers, self.walk.device, self.walk.dtype)

    def _advance_parent(self, state: Streams, end: int) -> None:
        if self._known is not None:
            state.parent, state.layer = self._known[end], end
            return
        for index in range(state.layer, end):
            self.walk.step(state.parent, index)
        state.layer = end

    def _unfused(self, student: Tensor, block: Block) -> Tensor:
        """What the parent's own FFNs make of the student's stream one after the other."""
        stream = student.clone()
        for ffn in block.ffns:
            layer = self.walk.layer(ffn.layer)
            self.walk.advance(stream, partial(ffn_half, layer))
            layer.to("meta")
        return stream
