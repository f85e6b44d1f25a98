"""The one train loop: a stage of a recipe, step by step, whatever its losses and wherever its targets come from."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ffn_fusion.core.curriculum import TrainingStage
from ffn_fusion.core.distill import ON_STREAM, Losses, Scored, head_loss, logit_names, score_logits, stream_loss
from ffn_fusion.core.heal_records import TrainingPoint
from ffn_fusion.core.topk import TopK
from ffn_fusion.healing.feeds import Batch, Feed
from ffn_fusion.healing.optimizers import optimizers
from ffn_fusion.healing.ranks import Ranks
from ffn_fusion.healing.sharded import Model, Pass

P = ParamSpec("P")
T = TypeVar("T")
IGNORED = -1
"""Target of a position whose next token is not in the window."""


@dataclass(frozen=True)
class Objective:
    """Losses of a student on a batch. `spans` has the parent layers in front of and behind each block; in a local stage
    only the blocks in `local` run, each on the parent's stream."""

    losses: Losses
    spans: list[tuple[int, int]]
    local: frozenset[int] | None
    compiled: bool = False

    @property
    def names(self) -> list[str]:
        return logit_names(self.losses) + [name for name in self.losses.weights if name in ON_STREAM]

    @property
    def blocks(self) -> list[int]:
        """Blocks whose streams are compared."""
        everywhere = range(len(self.spans)) if self.losses.on_stream else ()
        return sorted(self.local) if self.local is not None else list(everywhere)

    @property
    def asked(self) -> set[int]:
        """Streams that the parent is asked for."""
        ends = {self.spans[block][1] for block in self.blocks}
        return ends | ({self.spans[block][0] for block in self.blocks} if self.local is not None else set())

    def __call__(self, student: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        """The weighted sum over tokens, to go backward from (its value is not that of the losses on logits), and each
        loss's own sum [losses], in the order of `names`."""
        given = None if self.local is None else {i: batch.streams[self.spans[i][0]] for i in self.local}
        keep = [block + 1 for block in self.blocks]
        total, sums = student(batch.ids, partial(self._use, batch, student.logit_scale), keep=keep, given=given)
        return total, sums

    def _use(self, batch: Batch, scale: float, found: Pass) -> tuple[Tensor, Tensor]:
        total = torch.zeros((), device=found.hidden.device)
        sums = []
        if self.losses.on_logits:
            score = partial(self._score, batch.predictions, next_tokens(batch.ids))
            hidden = found.hidden.flatten(0, 1)
            total, logit_sums = head_loss(hidden, found.head, scale, score, len(logit_names(self.losses)))
            sums.append(logit_sums)
        for name in self.names[len(logit_names(self.losses)) :]:
            pairs = [(found.streams[block + 1], batch.streams[self.spans[block][1]]) for block in self.blocks]
            compare = self._fast(stream_loss)
            loss = torch.stack([compare(name, *pair) for pair in pairs]).mean()
            total = total + self.losses.weights[name] * loss
            sums.append(loss.detach()[None])
        return total, torch.cat(sums)

    def _score(
        self, predictions: Callable[[slice], Tensor | TopK] | None, targets: Tensor, logits: Tensor, place: slice
    ) -> Scored:
        parent = predictions(place) if predictions else None
        return self._fast(score_logits)(self.losses, logits, parent, targets[place])

    def _fast(self, function: Callable[P, T]) -> Callable[P, T]:
        """The function as few kernels, if this objective is compiled."""
        return _compiled(function) if self.compiled else function


@cache
def _compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Once a process; and for each shape by itself, of which there are few, because kernels of any shape are slower."""
    return torch.compile(function, dynamic=False)


def next_tokens(ids: Tensor) -> Tensor:
    """What follows each position of windows [windows, length], flattened."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], dim=1).flatten()


@dataclass(frozen=True)
class Done:
    """Steps that were made: means over their tokens, and the first step whose loss was not a number, if one was."""

    point: TrainingPoint
    loss: float
    broken: int | None


class Training:
    """A stage under way. Steps are counted from 0 within the stage; of each this rank has a `share` of windows, so many
    `at_once`."""

    def __init__(
        self, student: Model, stage: TrainingStage, objective: Objective, feed: Feed, ranks: Ranks, batch_size: int
    ) -> None:
        self.student, self.stage, self.objective, self.feed, self.ranks = student, stage, objective, feed, ranks
        self.share = ranks.share(stage.windows_per_step)
        self.at_once = min(batch_size, self.share)
        self._parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self.optimizers = optimizers(student, stage)

    @property
    def num_trained(self) -> int:
        return sum(parameter.numel() for parameter in self._parameters)

    def run(self, start: int, stops: Sequence[int]) -> Iterator[Done]:
        """Train from step `start` on, and say at each stop what came of the steps since the last."""
        for stop in stops:
            rows = [self._step(step) for step in range(start, stop)]
            start = stop
            yield self._done(stop - 1, rows)

    def _step(self, step: int) -> Tensor:
        """One optimizer step; [losses + 1], sums over this step's tokens on all ranks and the gradient's norm."""
        size, num_windows = self.ranks.size, self.stage.windows_per_step
        first = step * num_windows
        places = range(first + self.ranks.rank, first + num_windows, size)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.stage.rate(step)
        batches = [places[i : i + self.at_once] for i in range(0, self.share, self.at_once)]
        sums = torch.zeros(len(self.objective.names), device=self.ranks.device)
        for number, some in enumerate(batches, start=1):
            cast(FSDPModule, self.student).set_requires_gradient_sync(number == len(batches))
            total, losses = self.objective(self.student, self.feed.batch(some))
            # Gradients of ranks are averaged.
            (total / (self.share * self.stage.length)).backward()
            sums += losses
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.stage.max_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([sums, norm.detach().reshape(1).to(sums.device)])

    def _done(self, step: int, rows: Sequence[Tensor]) -> Done:
        # Only here does the host wait for the device.
        table = torch.stack(list(rows))
        norms = table[:, -1].clone()
        table = self.ranks.sum(table).cpu()[:, :-1] / (self.stage.windows_per_step * self.stage.length)
        bad = (~torch.isfinite(table.sum(1) + norms.cpu())).nonzero().flatten().tolist()
        means = dict(zip(self.objective.names, table.mean(0).tolist(), strict=True))
        point = TrainingPoint(
            step=step + 1,
            num_tokens=(step + 1) * self.stage.windows_per_step * self.stage.length,
            learning_rate=self.stage.rate(step),
            norm=float(norms.mean()),
            losses=means,
        )
        loss = sum(weight * means[name] for name, weight in self.objective.losses.weights.items())
        return Done(point, loss, step + 1 - len(rows) + bad[0] if bad else None)


def evenly(count: int, parts: int) -> list[int]:
    """The last of each of `parts` parts of `count` steps."""
    return sorted({math.ceil(count * part / parts) for part in range(1, parts + 1)})
