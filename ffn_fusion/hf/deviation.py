"""Replace-one-block scores (Puzzle, section 2.5 of docs/method.md): what each single change of the parent costs."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ffn_fusion.core.fisher import Sketcher, signs
from ffn_fusion.core.losses import kl_to, nll
from ffn_fusion.core.search_records import Similarity
from ffn_fusion.core.space import Change
from ffn_fusion.hf.arch import ATTENTION, FFN
from ffn_fusion.hf.meter import Meter
from ffn_fusion.hf.probe import record, resume


@dataclass(frozen=True)
class Deviation:
    """What one change does to the parent's predictions on the measuring text.

    `kl` and `nll` (of the changed model) are sums over the tokens of each window, in nats; `sketch` [N, K] is the
    change of the logits in the Fisher metric (core/fisher.py).
    """

    kl: list[float]
    nll: list[float]
    sketch: Tensor


class Deviations:
    """Measures changes one by one, each built, fitted and run from the first layer that it touches.

    Memory beside the meter's: the parent's streams on the measuring text, on the host.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        projection = signs(meter.parent.config.vocab_size, meter.model.device)
        self._sketchers = [Sketcher(ref, projection) for ref in meter.references]
        self._streams: list[list[Tensor]] = []
        turns: list[Tensor] = []
        self.nll: list[float] = []
        """Of the parent, summed over the tokens of each window."""
        for ids in meter.batches:
            clean = record(meter.model, ids)
            self._streams.append([stream.cpu() for stream in clean.streams])
            self.nll += _nll(clean.logits, ids)
            turns.append(torch.stack(list(_similarities(meter.model, clean.streams, clean.outputs))))
        self.similarity = _mean(turns)

    def of(self, change: Change) -> Deviation:
        """Build, fit and measure one change."""
        meter = self._meter
        plan = change.applied(meter.parent.plan)
        student, fitted = meter.student(plan)
        # Blocks before the first that differs are the parent's, and so is the stream behind them.
        blocks = [block.layers[0] for block in meter.parent.plan.blocks]
        first = min([blocks.index(change.first), *fitted])
        kl: list[float] = []
        loss: list[float] = []
        sketches = []
        batches = zip(meter.batches, meter.references, self._streams, self._sketchers, strict=True)
        for ids, ref, streams, sketch in batches:
            logits = resume(student, ids, first, streams[blocks[first]].to(student.device))
            assert logits is not None
            kl += kl_to(ref, logits.flatten(0, 1)).view(ids.shape).sum(1).tolist()
            loss += _nll(logits, ids)
            sketches.append(sketch(logits.flatten(0, 1)).cpu())
        return Deviation(kl, loss, torch.cat(sketches))


def _nll(logits: Tensor, ids: Tensor) -> list[float]:
    per_token = nll(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    sums: list[float] = per_token.view(len(ids), -1).sum(1).tolist()
    return sums


def _similarities(
    model: PreTrainedModel, streams: list[Tensor], outputs: dict[tuple[int, str], Tensor]
) -> Iterator[Tensor]:
    """For each layer, mean over tokens of the cosine between input and output of its attention, FFN and whole, [3]."""
    for index, layer in enumerate(model.model.layers):
        x = streams[index].float()
        cosines = []
        middle = x
        for part in (ATTENTION, FFN):
            out = outputs.get((index, part))
            after = middle if out is None else middle + out.float() * layer.residual_multiplier
            cosines.append(torch.nn.functional.cosine_similarity(middle, after, dim=-1).mean())
            middle = after
        whole = torch.nn.functional.cosine_similarity(x, streams[index + 1].float().to(x.device), dim=-1).mean()
        yield torch.stack([*cosines, whole]).cpu()


def _mean(batches: list[Tensor]) -> Similarity:
    attention, ffn, layer = torch.stack(batches).mean(0).T.tolist()
    return Similarity(attention, ffn, layer)
