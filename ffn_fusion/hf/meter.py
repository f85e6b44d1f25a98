"""Measures what a plan costs: builds the student in memory, fits it, and takes its KL to the parent."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ffn_fusion.core.answers import Answers
from ffn_fusion.core.losses import Reference, kl_to, nll, reference
from ffn_fusion.core.plan import Plan
from ffn_fusion.core.pruning import Cuts, kept_channels
from ffn_fusion.core.search_records import Rises
from ffn_fusion.core.stats import Estimate, estimate
from ffn_fusion.errors import UserError
from ffn_fusion.hf.arch import ATTENTION
from ffn_fusion.hf.calibrate import Calibration
from ffn_fusion.hf.contribution import contribution_of
from ffn_fusion.hf.library import Library
from ffn_fusion.hf.machine import pick_device
from ffn_fusion.hf.model import ModelFolder, ResidentSource, assemble, student_arch
from ffn_fusion.hf.probe import Pass, record, resume, without
from ffn_fusion.hf.surgery import student_recipes
from ffn_fusion.hf.text import Windows
from ffn_fusion.hf.walk import ParentWalk
from ffn_fusion.settings import Fusion, Machine

Ask = Callable[[PreTrainedModel], Answers]
"""Puts questions to a model."""
T = TypeVar("T")


class Meter:
    """Holds a parent in memory with its predictions on the measuring text, and measures students against it.

    Students have a library's trained blocks, if there is one, before they are fitted. With `ask`, students and parent
    answer the same questions, too.
    Memory: the parent, its probabilities on all measured tokens in float32, the changed blocks of one student, and on
    the host the parent's streams on the fitting text. Where that is too much for the device, batches are halved.
    """

    def __init__(
        self,
        parent: ModelFolder,
        model: PreTrainedModel,
        measure: Windows,
        fit: Windows,
        fusion: Fusion,
        machine: Machine,
        library: Library | None = None,
        ask: Ask | None = None,
    ) -> None:
        self.parent, self.model, self.fusion, self.machine, self.library = parent, model, fusion, machine, library
        self.sample, self._fit = measure.sample, fit.ids
        self.ids = measure.ids.to(model.device)
        self.counts = [measure.sample.length] * measure.sample.num_windows
        self._walk = ParentWalk(
            parent,
            ResidentSource(model),
            device=pick_device(machine),
            dtype=model.dtype,
            batch_size=machine.batch_size,
        )
        self._contributions = dict(library.contributions) if library else {}
        self.references: list[Reference]
        """The parent's predictions on each window."""
        self.nll: list[float]
        """Loss of the parent, summed over the tokens of each window."""
        self.references, self.nll = self.halving(self._predictions)
        self.ask = ask
        self.answers = self.halving(lambda: ask(model)) if ask else None
        """The parent's own."""

    @property
    def calibrates(self) -> bool:
        return self.fusion.calibrate != "none"

    @property
    def batch_size(self) -> int:
        """Windows computed at once."""
        return self._walk.batch_size

    def batches(self) -> Iterator[slice]:
        """The windows of the measuring text that are computed at once."""
        for start in range(0, len(self.ids), self.batch_size):
            yield slice(start, start + self.batch_size)

    def halving(self, measure: Callable[[], T]) -> T:
        """What `measure` returns, begun anew with batches half as large while the device is out of memory."""
        while True:
            try:
                return measure()
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise UserError(
                        f"the GPU has too little memory to measure {len(self.ids)} windows of {self.sample.length} "
                        "tokens, even one at a time; choose fewer --windows, a shorter --length or another --dtype"
                    ) from None
            # Not in the handler: the error holds on to the tensors of what failed.
            torch.cuda.empty_cache()
            self._walk.batch_size //= 2
            print(f"the GPU is out of memory; going on with --batch-size {self.batch_size}", file=sys.stderr)

    def _predictions(self) -> tuple[list[Reference], list[float]]:
        references: list[Reference] = []
        losses: list[float] = []
        for batch in self.batches():
            logits = record(self.model, self.ids[batch], outputs=False).logits
            references += [reference(window) for window in logits]
            losses += nll_per_window(logits, self.ids[batch])
        return references, losses

    def plain(self, plan: Plan) -> Estimate:
        """KL of the plan as it is put together, nothing fitted."""
        return self.halving(lambda: self._kl_of(self._student(plan, {})))

    def fused(self, plan: Plan) -> Estimate:
        """KL of the plan after the calibration that `fusion` asks for."""
        return self.halving(lambda: self._kl_of(self.student(plan)[0]))

    def rises(self, plan: Plan) -> Rises:
        """All that is measured of the plan after the calibration that `fusion` asks for."""
        return self.halving(lambda: self._rises_of(self.student(plan)[0]))

    def rises_by(self, kl: Sequence[float], loss: Sequence[float], answers: Answers | None) -> Rises:
        """How far a student is from the parent, from its sums over each window and its answers."""
        per_window = [own - parents for own, parents in zip(loss, self.nll, strict=True)]
        # The last token of a window predicts nothing that is known.
        found = Rises(estimate(kl, self.counts), estimate(per_window, [count - 1 for count in self.counts]))
        if answers is None or self.answers is None:
            return found
        rise, change = (
            estimate([own - parents for own, parents in zip(after, before, strict=True)], [1] * len(after))
            for after, before in ((answers.loss, self.answers.loss), (answers.right, self.answers.right))
        )
        return replace(found, task=rise, accuracy=change)

    def student(self, plan: Plan) -> tuple[PreTrainedModel, list[int]]:
        """The plan's student after the calibration that `fusion` asks for, and the blocks that were fitted."""
        if not self.calibrates:
            return self._student(plan, {}), []
        calibration = Calibration(self._walk, plan, self.fusion, self._channels(plan), self.library)
        fitted = calibration.run(self._fit, known=self._fit_streams)
        fits = {calibration.output_name(fit.block): weight for fit, weight, _ in fitted}
        return self._student(plan, fits), calibration.to_fit

    def _channels(self, plan: Plan) -> dict[int, Tensor]:
        """Channels kept of each FFN that the plan cuts; contributions are measured once for all plans."""
        missing = [layer for layer in plan.widths if layer not in self._contributions]
        if missing:
            self._walk.enter(self._fit[: self.batch_size])
        for layer in missing:
            self._contributions[layer] = contribution_of(
                self._walk, self._fit_streams[layer].clone(), layer, self.fusion.channel_steps
            )
        return {layer: kept_channels(self._contributions[layer], width) for layer, width in plan.widths.items()}

    @cached_property
    def _fit_streams(self) -> list[Tensor]:
        """The parent's stream on the fitting text before each layer and after the last, on the host."""
        batches = self._fit.to(self.model.device).split(self.batch_size)
        passes = [[s.cpu() for s in record(self.model, ids, outputs=False).streams] for ids in batches]
        return [torch.cat(parts) for parts in zip(*passes, strict=True)]

    def removals(self, removed: list[int], candidates: list[int]) -> dict[int, Estimate]:
        """KL with the attentions `removed` and each one of `candidates` gone, from the layer where it differs."""
        return self.halving(lambda: self._removals(removed, candidates))

    def _removals(self, removed: list[int], candidates: list[int]) -> dict[int, Estimate]:
        sums: dict[int, list[float]] = {layer: [] for layer in candidates}
        with _without_all(self.model, removed):
            for batch in self.batches():
                base = record(self.model, self.ids[batch], outputs=False)
                for layer in candidates:
                    sums[layer] += self._removal(batch, base, layer)
        return {layer: estimate(per_window, self.counts) for layer, per_window in sums.items()}

    def _removal(self, batch: slice, base: Pass, layer: int) -> list[float]:
        with without(self.model, layer, ATTENTION):
            logits = resume(self.model, self.ids[batch], layer, base.streams[layer])
        assert logits is not None
        return kl_per_window(self.references[batch], logits)

    def _student(self, plan: Plan, fits: dict[str, Tensor]) -> PreTrainedModel:
        cuts = Cuts(self.parent.head_dim, self._channels(plan))
        arch = student_arch(self.parent)
        recipes = student_recipes(plan, self._walk.source, arch, self.fusion.norm, cuts, self.library)
        makers: dict[str, Callable[[], Tensor]] = {name: recipe.build for name, recipe in recipes.items()}
        makers |= {name: (lambda weight=weight: weight) for name, weight in fits.items()}  # type: ignore[misc]
        return assemble(self.parent, plan, makers, self.model)

    @torch.no_grad()
    def _kl_of(self, student: PreTrainedModel) -> Estimate:
        sums: list[float] = []
        for batch in self.batches():
            logits = student(input_ids=self.ids[batch], use_cache=False).logits
            sums += kl_per_window(self.references[batch], logits)
        return estimate(sums, self.counts)

    @torch.no_grad()
    def _rises_of(self, student: PreTrainedModel) -> Rises:
        kl: list[float] = []
        loss: list[float] = []
        for batch in self.batches():
            logits = student(input_ids=self.ids[batch], use_cache=False).logits
            kl += kl_per_window(self.references[batch], logits)
            loss += nll_per_window(logits, self.ids[batch])
        return self.rises_by(kl, loss, self.ask(student) if self.ask else None)


def kl_per_window(references: Sequence[Reference], logits: Tensor) -> list[float]:
    """KL of logits [windows, length, V] to the parent's predictions, summed over the tokens of each window."""
    sums = [kl_to(ref, window).sum() for ref, window in zip(references, logits, strict=True)]
    return [float(total) for total in torch.stack(sums)]


def nll_per_window(logits: Tensor, ids: Tensor) -> list[float]:
    """Loss of the tokens of `ids` [windows, length] by logits [windows, length, V], summed over each window."""
    per_token = nll(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    sums: list[float] = per_token.view(len(ids), -1).sum(1).tolist()
    return sums


def _without_all(model: PreTrainedModel, layers: list[int]) -> ExitStack:
    stack = ExitStack()
    for layer in layers:
        stack.enter_context(without(model, layer, ATTENTION))
    return stack
