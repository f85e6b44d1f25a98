"""Calibrated fusion on a model: two streams, parent and student, go through the layers side by side.

Each layer is in memory only while the streams pass it, so the cost in memory is one block and the streams; the
whole fit is about one forward pass of the parent and three of the student's changed blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ffn_fusion.core.calibration import RidgeSystem, Solution, best_solution
from ffn_fusion.core.plan import Block, Plan
from ffn_fusion.errors import UserError
from ffn_fusion.hf.arch import FFN
from ffn_fusion.hf.checkpoint import Source
from ffn_fusion.hf.model import ModelFolder, materialise, restore_buffers, skeleton, student_arch, student_config
from ffn_fusion.hf.surgery import LAYER, block_recipes
from ffn_fusion.settings import Fusion

Layer = Any
"""A decoder layer of some family, edited by our model file."""
MAX_CHANNELS = 16_384
"""Widest Gram matrix; wider blocks are fitted a slice of channels at a time."""
SWEEPS = 2
HELD_OUT = 8
"""One calibration window in this many is held out to choose the regularisation."""


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
    """Blocks with an FFN whose part of the parent is not what they are; for "unfused" the fused ones only.

    A block answers for the parent's sublayers from the end of the last block with an FFN to its own end: for layers
    dropped behind it, and for an attention without FFN in front of it, which has nothing to fit.
    """
    if target == "unfused":
        return [index for index, block in enumerate(plan.blocks) if block.is_fused]
    ends = _ends(plan, parent.blocks[-1].layers[-1] + 1)
    found, start, first = [], 0, 0
    for index, block in enumerate(plan.blocks):
        if block.ffns:
            theirs = [held for held in parent.blocks if start <= held.layers[0] < ends[index]]
            if theirs != list(plan.blocks[first : index + 1]):
                found.append(index)
            start, first = ends[index], index + 1
    return found


def _ends(plan: Plan, num_layers: int) -> list[int]:
    """Parent layer whose input corresponds to each block's output: the next block's first layer."""
    return [min(block.layers) for block in plan.blocks[1:]] + [num_layers]


class Calibration:
    """Fits the down projections of a student, front to back, so that each fit sees the drift of those before it."""

    def __init__(
        self,
        parent: ModelFolder,
        source: Source,
        plan: Plan,
        *,
        fusion: Fusion,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int = 4,
    ) -> None:
        assert fusion.calibrate != "none"
        if not plan.is_ordered:
            raise UserError("a plan that reorders layers has no target to be fitted to; use --calibrate none")
        self.parent, self.source, self.plan = parent, source, plan
        self.norm, self.target = fusion.norm, fusion.calibrate
        self.device, self.dtype, self.batch_size = device, dtype, batch_size
        self.arch = student_arch(parent)
        self._parent_shell = skeleton(parent.config)
        self._student_shell = skeleton(student_config(parent, plan))
        self._ends = _ends(plan, parent.num_layers)
        self.to_fit = blocks_to_fit(plan, parent.plan, self.target)

    def output_name(self, block: int) -> str:
        """Name of the tensor that a fit of this block replaces."""
        return f"{LAYER.format(block)}{FFN}.{self.arch.output}.weight"

    @torch.no_grad()
    def run(
        self, ids: Tensor, streams: Streams | None = None, known: Sequence[Tensor] | None = None
    ) -> Iterator[tuple[BlockFit, Tensor, Streams]]:
        """Yield each fit, the block's new down projection [d, h], and the state to resume from, front to back.

        `ids` is [windows, length]; the last eighth of the windows is held out. `known` is the parent's stream
        before each layer and after the last, for callers that fit many plans on the same text.
        """
        self._known = known
        embedded, self._kwargs = self._enter(ids if known is None else ids[: self.batch_size])
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
            self._advance(student, partial(self._attend, layer, block.attention.layer))
        self._advance_parent(state, self._ends[index])
        target = self._unfused(student, block) if self.target == "unfused" else state.parent
        fit = self._fit(index, layer, student, target) if index in self.to_fit else None
        self._advance(student, partial(_ffn, layer))
        weight = self._output(layer).weight.data
        layer.to("meta")
        return (fit, weight) if fit else None

    def _enter(self, ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Embed every window, and record what the family's own forward hands to each layer."""
        model = skeleton(self.parent.config)
        trunk = model.model
        kwargs: list[dict[str, Any]] = []
        trunk.layers = nn.ModuleList(_Recorder(kwargs) for _ in range(self.parent.num_layers))
        trunk.norm = nn.Identity()
        weight = self.source.read("model.embed_tokens.weight").to(self.device, self.dtype)
        trunk.embed_tokens.weight = nn.Parameter(weight, requires_grad=False)
        restore_buffers(model, self.device)
        embedded = [
            trunk(input_ids=batch.to(self.device), use_cache=False).last_hidden_state.cpu()
            for batch in ids.split(self.batch_size)
        ]
        return torch.cat(embedded), kwargs[: self.parent.num_layers]

    def _student_layer(self, index: int, block: Block) -> Layer:
        recipes = block_recipes(block, self.source, self.arch, self.norm)
        makers = {name: recipe.build for name, recipe in recipes.items()}
        return materialise(self._student_shell.model.layers[index], makers, self.device, self.dtype)

    def _parent_layer(self, index: int) -> Layer:
        prefix = LAYER.format(index)
        names = [name for name in self.source.specs if name.startswith(prefix)]
        makers = {name.removeprefix(prefix): partial(self.source.read, name) for name in names}
        return materialise(self._parent_shell.model.layers[index], makers, self.device, self.dtype)

    def _advance(self, stream: Tensor, step: Callable[[Tensor], Tensor]) -> None:
        for start in range(0, len(stream), self.batch_size):
            batch = stream[start : start + self.batch_size]
            batch.copy_(step(batch.to(self.device)))

    def _advance_parent(self, state: Streams, end: int) -> None:
        if self._known is not None:
            state.parent, state.layer = self._known[end], end
            return
        for index in range(state.layer, end):
            layer = self._parent_layer(index)
            self._advance(state.parent, lambda x, layer=layer, i=index: layer(x, **self._layer_kwargs(i, x)))  # type: ignore[misc]
            layer.to("meta")
        state.layer = end

    def _layer_kwargs(self, layer: int, x: Tensor) -> dict[str, Any]:
        kwargs = self._kwargs[layer]
        mask = kwargs.get("attention_mask")
        return kwargs if mask is None else kwargs | {"attention_mask": mask[: len(x)]}

    def _attend(self, layer: Layer, source: int, x: Tensor) -> Tensor:
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(x), **self._layer_kwargs(source, x))
        stream: Tensor = layer.add(x, attended)
        return stream

    def _unfused(self, student: Tensor, block: Block) -> Tensor:
        """What the members make of the student's stream one after the other."""
        stream = student.clone()
        for ffn in block.ffns:
            layer = self._parent_layer(ffn.layer)
            self._advance(stream, partial(_ffn, layer))
            layer.to("meta")
        return stream

    def _fit(self, index: int, layer: Layer, student: Tensor, wanted: Tensor) -> BlockFit:
        width = self._output(layer).in_features
        slices = [slice(start, min(start + MAX_CHANNELS, width)) for start in range(0, width, MAX_CHANNELS)]
        sweeps = SWEEPS if len(slices) > 1 else 1
        fits = [self._fit_slice(layer, channels, student, wanted) for channels in slices * sweeps]
        scale = _held_out_scale(student, wanted)
        before, after = fits[0].error_before / scale, fits[-1].error_after / scale
        return BlockFit(index, str(self.plan.blocks[index]), before, after, tuple(fit.strength for fit in fits))

    def _fit_slice(self, layer: Layer, channels: slice, student: Tensor, wanted: Tensor) -> Solution:
        output = self._output(layer)
        system = RidgeSystem(channels.stop - channels.start, output.out_features, self.device)
        held = _num_held_out(student)
        for batch in self._batches(student[:-held], wanted[:-held]):
            system.add(*self._tokens(layer, channels, *batch))
        held_out = [self._tokens(layer, channels, *batch) for batch in self._batches(student[-held:], wanted[-held:])]

        def error(delta: Tensor | None) -> float:
            total = 0.0
            for activations, residual, weights in held_out:
                left = residual if delta is None else residual - activations.float() @ delta
                total += float((left.square().sum(-1) * weights).sum())
            return total

        solution = best_solution(system, error)
        if solution.delta is not None:
            weight = output.weight.data
            weight[:, channels] = (weight[:, channels].float() + solution.delta.T).to(weight.dtype)
        return solution

    def _tokens(self, layer: Layer, channels: slice, x: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden activations [N, h], residual [N, d] in the units of the down projection, and weights 1/|x|^2 [N]."""
        seen: list[Tensor] = []
        hook = self._output(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        y = _ffn(layer, x)
        hook.remove()
        residual = (wanted.float() - y.float()) / layer.residual_multiplier
        return seen[0][..., channels].flatten(0, 1), residual.flatten(0, 1), _weights(x).flatten()

    def _batches(self, student: Tensor, wanted: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(student.split(self.batch_size), wanted.split(self.batch_size), strict=True):
            yield x.to(self.device), y.to(self.device)

    def _output(self, layer: Layer) -> nn.Linear:
        output = getattr(layer.mlp, self.arch.output)
        assert isinstance(output, nn.Linear)
        return output


class _Recorder(nn.Module):
    """Stands in for a decoder layer and keeps what it is called with."""

    def __init__(self, kwargs: list[dict[str, Any]]) -> None:
        super().__init__()
        self._kwargs = kwargs

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self._kwargs.append(kwargs)
        return hidden_states


def _ffn(layer: Layer, x: Tensor) -> Tensor:
    """The FFN half of a block: x + mlp(norm(x))."""
    result: Tensor = layer.add(x, layer.mlp(layer.post_attention_layernorm(x)))
    return result


def _weights(x: Tensor) -> Tensor:
    """1 / |x|^2 of each token, so that a few massive activations do not own the fit."""
    return 1 / x.float().square().sum(-1).clamp(min=1e-12)


def _held_out_scale(student: Tensor, wanted: Tensor) -> float:
    """Weighted size of the change that the held-out windows ask for."""
    held = _num_held_out(student)
    change = wanted[-held:].float() - student[-held:].float()
    return float((change.square().sum(-1) * _weights(student[-held:])).sum())


def _num_held_out(stream: Tensor) -> int:
    return max(1, len(stream) // HELD_OUT)
