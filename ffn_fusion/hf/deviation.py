"""Replace-one-block scores (Puzzle; docs/method.md, section 10): what each single change of the parent costs."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ffn_fusion.core.answers import Answers
from ffn_fusion.core.fisher import Sketcher, signs
from ffn_fusion.core.search_records import Similarity
from ffn_fusion.core.space import Change
from ffn_fusion.hf.arch import ATTENTION, FFN
from ffn_fusion.hf.meter import Meter, kl_per_window, nll_per_window
from ffn_fusion.hf.probe import record, resume


@dataclass(frozen=True)
class Deviation:
    """What one change does to the parent's predictions on the measuring text, and what the changed model answers.

    `kl` and `nll` (of the changed model) are sums over the tokens of each window, in nats; `sketch` [N, K] is the
    change of the logits in the Fisher metric (core/fisher.py).
    """

    kl: list[float]
    nll: list[float]
    sketch: Tensor
    answers: Answers | None


class Deviations:
    """Measures changes one by one, each built, fitted and run from the first layer that it touches.

    Memory beside the meter's: the parent's streams on the measuring text, on the host.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        projection = signs(meter.parent.config.vocab_size, meter.model.device)
        self._sketchers = meter.halving(lambda: [Sketcher(ref, projection) for ref in meter.references])
        self._streams: list[list[Tensor]]
        """The parent's stream before each layer and after the last, [length, d] of each window."""
        self._streams, self.similarity = meter.halving(self._parent)

    def _parent(self) -> tuple[list[list[Tensor]], Similarity]:
        meter = self._meter
        streams, turns = [], []
        for batch in meter.batches():
            clean = record(meter.model, meter.ids[batch])
            host = [stream.cpu() for stream in clean.streams]
            streams += [[stream[window] for stream in host] for window in range(len(host[0]))]
            turns.append(torch.stack(list(_similarities(meter.model, clean.streams, clean.outputs)), 1))
        attention, ffn, layer = torch.cat(turns).mean(0).T.tolist()
        return streams, Similarity(attention, ffn, layer)

    def of(self, change: Change) -> Deviation:
        """Build, fit and measure one change."""
        return self._meter.halving(lambda: self._of(change))

    def _of(self, change: Change) -> Deviation:
        meter = self._meter
        student, fitted = meter.student(change.applied(meter.parent.plan))
        # Blocks before the first that differs are the parent's, and so is the stream behind them.
        blocks = [block.layers[0] for block in meter.parent.plan.blocks]
        first = min([blocks.index(change.first), *fitted])
        kl: list[float] = []
        loss: list[float] = []
        sketches: list[Tensor] = []
        for batch in meter.batches():
            ids = meter.ids[batch]
            stream = torch.stack([streams[blocks[first]] for streams in self._streams[batch]])
            logits = resume(student, ids, first, stream.to(student.device))
            assert logits is not None
            kl += kl_per_window(meter.references[batch], logits)
            loss += nll_per_window(logits, ids)
            sketches += [sketch(window).cpu() for sketch, window in zip(self._sketchers[batch], logits, strict=True)]
        return Deviation(kl, loss, torch.cat(sketches), meter.ask(student) if meter.ask else None)


def _similarities(
    model: PreTrainedModel, streams: list[Tensor], outputs: dict[tuple[int, str], Tensor]
) -> Iterator[Tensor]:
    """For each layer, the cosine between input and output of its attention, FFN and whole, [windows, 3]: means over
    the tokens of each window."""
    for index, layer in enumerate(model.model.layers):
        x = streams[index].float()
        cosines = []
        middle = x
        for part in (ATTENTION, FFN):
            out = outputs.get((index, part))
            after = middle if out is None else middle + out.float() * layer.residual_multiplier
            cosines.append(torch.nn.functional.cosine_similarity(middle, after, dim=-1).mean(-1))
            middle = after
        whole = torch.nn.functional.cosine_similarity(x, streams[index + 1].float().to(x.device), dim=-1).mean(-1)
        yield torch.stack([*cosines, whole], -1).cpu()
