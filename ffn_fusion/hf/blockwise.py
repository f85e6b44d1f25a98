"""Blockwise local distillation: one walk through the parent, and at each layer the units that end there are trained.

A unit sees the parent's stream in front of it and the one behind it; no gradient crosses it. In memory are one layer
(in float32, with the optimizer's state), and on the host the parent's stream, once more for each span that is open.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ffn_fusion.core.block_records import Kept
from ffn_fusion.core.blockwise import in_place, rate, scale, span, token_weights, trained_parts
from ffn_fusion.core.plan import Block
from ffn_fusion.core.pruning import Cuts
from ffn_fusion.hf.contribution import contribution_of
from ffn_fusion.hf.fit import fit_down, num_held_out
from ffn_fusion.hf.library import PREFIXES, Library
from ffn_fusion.hf.model import materialise, skeleton, student_arch, student_config
from ffn_fusion.hf.recipe import Recipe
from ffn_fusion.hf.surgery import Norm, block_recipes
from ffn_fusion.hf.walk import Layer, ParentWalk, ffn_half

BETAS = (0.9, 0.95)
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Training:
    """Gradient steps of a unit; with no epochs the closed-form fit is all there is."""

    epochs: int
    learning_rate: float
    """Relative to the scale of each weight."""
    seed: int


@dataclass(frozen=True)
class TrainedUnit:
    """One unit when it is done: its tensors where they differ from the untrained block's, and its losses."""

    block: Block
    tensors: Tensors
    kept: Kept
    start: float
    fitted: float | None
    trained: float | None
    num_tokens: int
    seconds: float


class Distillation:
    """Trains units of a parent, front to back; `library` is what they start from, and the caller adds to it."""

    def __init__(
        self, walk: ParentWalk, norm: Norm, training: Training, library: Library, channel_steps: int = 1
    ) -> None:
        self.walk, self.norm, self.training, self.library = walk, norm, training, library
        self.channel_steps = channel_steps

    def run(self, ids: Tensor, blocks: Collection[Block], measured: Callable[[], None]) -> Iterator[TrainedUnit]:
        """Yield each unit when it is done. `ids` is [windows, length]; the last eighth of the windows is held out.

        Contributions of channels are measured where a block is the first to need them; `measured` is then called.
        """
        stream = self.walk.enter(ids)
        starts: dict[int, Tensor] = {}
        for index in range(max((span(block)[1] for block in blocks), default=-1) + 1):
            if any(span(block)[0] == index for block in blocks):
                starts[index] = stream.clone()
            self._step(stream, index, blocks, measured)
            # Decoupled units first: coupled ones start from them.
            here = [block for block in blocks if span(block)[1] == index]
            for block in sorted(here, key=lambda block: len(trained_parts(block))):
                yield self._unit(block, starts[span(block)[0]], stream)
            open_ = {first for first, last in map(span, blocks) if last > index}
            starts = {first: held for first, held in starts.items() if first in open_}

    def _step(self, stream: Tensor, index: int, blocks: Collection[Block], measured: Callable[[], None]) -> None:
        cut = any(ffn.layer == index and ffn.width is not None for block in blocks for ffn in block.ffns)
        if cut and index not in self.library.contributions:
            self.library.contributions[index] = contribution_of(self.walk, stream, index, self.channel_steps)
            measured()
        else:
            self.walk.step(stream, index)

    def _unit(self, block: Block, x: Tensor, y: Tensor) -> TrainedUnit:
        since = time.monotonic()
        unit = _Unit(self.walk, self.norm, block, self.library)
        weights = _token_weights(self.walk, x, y)
        attended = unit.attended(x) if "ffn" in unit.parts else x
        # A frozen attention is passed once, and not in every step.
        stream = x if "attention" in unit.parts else attended
        tried: dict[Kept, tuple[float, Tensors]] = {}

        def attempt(name: Kept, tensors: Tensors) -> None:
            tried[name] = unit.loss(stream, y, weights), tensors

        attempt("start", unit.initial)
        if "ffn" in unit.parts:
            fit_down(self.walk, unit.layer, attended, y, weights)
            attempt("fitted", unit.rounded())
        if self.training.epochs:
            unit.load(_best(tried)[1])
            self._train(unit, stream, y, weights)
            attempt("trained", unit.rounded())
        unit.layer.to("meta")
        losses = {name: loss for name, (loss, _) in tried.items()}
        return TrainedUnit(
            block,
            unit.changed(_best(tried)[1]),
            min(losses, key=losses.__getitem__),
            start=losses["start"],
            fitted=losses.get("fitted"),
            trained=losses.get("trained"),
            num_tokens=self.training.epochs * (len(x) - num_held_out(x)) * x.shape[1],
            seconds=round(time.monotonic() - since, 2),
        )

    def _train(self, unit: "_Unit", stream: Tensor, y: Tensor, weights: Tensor) -> None:
        """Gradient steps on all windows but the held-out ones, in an order that the seed alone decides."""
        num_windows = len(stream) - num_held_out(stream)
        num_steps = self.training.epochs * -(-num_windows // self.walk.batch_size)
        optimizer = torch.optim.AdamW(self._groups(unit.masters()), betas=BETAS, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate, num_steps=num_steps))
        generator = torch.Generator().manual_seed(self.training.seed)
        half = self.walk.dtype == torch.bfloat16
        for _ in range(self.training.epochs):
            for windows in torch.randperm(num_windows, generator=generator).split(self.walk.batch_size):
                x, target, weight = (part[windows].to(self.walk.device).float() for part in (stream, y, weights))
                with torch.autocast(self.walk.device.type, torch.bfloat16, enabled=half):
                    out = unit.forward(x)
                loss = (weight * (out.float() - target).square().sum(-1)).mean()
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

    def _groups(self, weights: Sequence[Tensor]) -> list[dict[str, Any]]:
        """A group of its own for each weight, because the learning rate is relative to its scale.

        Weights of 0.19 (SmolLM2) and of 0.02 (Llama 3) then take the same option, and so do those that a gain was
        folded into. A bias of zeros has no scale, and takes the mean of the others'.
        """
        scales = [scale(weight.detach()) for weight in weights]
        mean = sum(scales) / max(1, sum(each > 0 for each in scales))
        rates = [self.training.learning_rate * (each or mean) for each in scales]
        return [{"params": [weight], "lr": lr} for weight, lr in zip(weights, rates, strict=True)]


class _Unit:
    """A block in memory, with the names of what trains."""

    def __init__(self, walk: ParentWalk, norm: Norm, block: Block, library: Library) -> None:
        self.walk, self.block, self.parts = walk, block, trained_parts(block)
        parent = walk.parent
        plan = in_place(block, parent.plan)
        cuts = Cuts(parent.head_dim, library.channels(plan))
        made = partial(block_recipes, block, walk.source, student_arch(parent), norm, cuts)
        self._untrained: dict[str, Recipe] = made()
        prefixes = tuple(prefix for part in self.parts for prefix in PREFIXES[part])
        self._names = [name for name in self._untrained if name.startswith(prefixes)]
        self.layer: Layer = skeleton(student_config(parent, plan)).model.layers[plan.blocks.index(block)]
        built = {name: recipe.build() for name, recipe in made(library).items()}
        self.initial = {name: built[name].cpu() for name in self._names}
        self._put(built, walk.dtype)

    def load(self, tensors: Tensors) -> None:
        """Put these tensors in place, in the arithmetic of the walk."""
        self._put(tensors, self.walk.dtype)

    def masters(self) -> list[Tensor]:
        """The weights that train, in float32 and in place; the frozen ones are float32 too."""
        self._put(dict(self.layer.named_parameters()), torch.float32)
        trained = [self.layer.get_parameter(name) for name in self._names]
        return [weight.requires_grad_() for weight in trained]

    def rounded(self) -> Tensors:
        """The weights that train as they will be stored, which the layer has from now on, as it has the frozen ones."""
        own = dict(self.layer.named_parameters())
        stored = {name: own[name].detach().to(recipe.spec.dtype).cpu() for name, recipe in self._untrained.items()}
        self._put(stored, self.walk.dtype)
        return {name: stored[name] for name in self._names}

    def changed(self, tensors: Tensors) -> Tensors:
        """Of these tensors, the ones that the untrained block does not have."""
        return {name: t for name, t in tensors.items() if not torch.equal(t, self._untrained[name].build().cpu())}

    @torch.no_grad()
    def attended(self, x: Tensor) -> Tensor:
        """The stream [windows, length, d] in front of the block's FFN."""
        if self.block.attention is None:
            return x
        stream = x.clone()
        self.walk.advance(stream, partial(self.walk.attend, self.layer, self.block.attention.layer))
        return stream

    def forward(self, x: Tensor) -> Tensor:
        """The part of the block from the first weight that trains on."""
        if self.block.attention is None or "attention" not in self.parts:
            return ffn_half(self.layer, x)
        out: Tensor = self.layer(x, **self.walk.kwargs(self.block.attention.layer, x))
        return out

    @torch.no_grad()
    def loss(self, stream: Tensor, y: Tensor, weights: Tensor) -> float:
        """Loss on the held-out windows."""
        held, total = num_held_out(stream), 0.0
        parts = (part[-held:].split(self.walk.batch_size) for part in (stream, y, weights))
        for x, target, weight in zip(*parts, strict=True):
            x, target, weight = (part.to(self.walk.device) for part in (x, target, weight))
            error = (self.forward(x).float() - target.float()).square().sum(-1)
            total += float((weight * error).sum(dtype=torch.float64))
        return total / weights[-held:].numel()

    def _put(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        makers: dict[str, Callable[[], Tensor]] = {name: partial(_copied, tensor) for name, tensor in tensors.items()}
        materialise(self.layer, makers, self.walk.device, dtype)


def _copied(tensor: Tensor) -> Tensor:
    """A copy, because fit and optimizer write in place, and a source may hand out the parent's own weights."""
    return tensor.detach().clone()


def _best(tried: Mapping[Kept, tuple[float, Tensors]]) -> tuple[float, Tensors]:
    return min(tried.values(), key=lambda pair: pair[0])


def _token_weights(walk: ParentWalk, x: Tensor, y: Tensor) -> Tensor:
    """Weight of each token [windows, length]; leaving the stream as it is costs 1 on the windows to train on, and 1 on
    those held out."""
    pairs = zip(x.split(walk.batch_size), y.split(walk.batch_size), strict=True)
    found = [token_weights(*(part.to(walk.device) for part in pair)) for pair in pairs]
    weights, change = (torch.cat(parts) for parts in zip(*found, strict=True))
    held = num_held_out(x)
    for windows in (slice(0, -held), slice(-held, None)):
        weights[windows] /= (weights[windows] * change[windows]).mean()
    return weights.cpu()
