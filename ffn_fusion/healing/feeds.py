"""What a step learns from: windows of text, and the parent's answer to them, live or out of a cache."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ffn_fusion.core.distill import Losses
from ffn_fusion.core.plan import Plan
from ffn_fusion.core.topk import TopK
from ffn_fusion.healing.corpus import Corpus
from ffn_fusion.healing.sharded import Model, Pass
from ffn_fusion.hf.model import ModelFolder

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


class Batch(NamedTuple):
    """Windows [windows, length], the parent's predictions on a slice of their flattened positions, and its streams by
    the number of parent layers in front of them, [windows, length, d]."""

    ids: Tensor
    predictions: Callable[[slice], Tensor | TopK] | None
    streams: dict[int, Tensor]


class Feed(Protocol):
    """Batches for places of a stage."""

    def batch(self, places: Sequence[int]) -> Batch: ...


class Head(NamedTuple):
    """The parent's head [vocabulary, d] and what its logits are multiplied by."""

    weight: Tensor
    scale: float

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, d] -> [N, vocabulary], float32."""
        return (hidden @ self.weight.T).float() * self.scale


def head_of(parent: ModelFolder, device: torch.device, dtype: torch.dtype) -> Head:
    """The head of a model folder, whole on this rank."""
    name = HEAD if HEAD in parent.checkpoint.specs else EMBEDDING
    weight = parent.checkpoint.read(name).to(device, dtype)
    return Head(weight, 1 / float(getattr(parent.config, "logits_scaling", 1.0)))


class LiveFeed:
    """The parent is asked as training goes on; without one, there is only text."""

    def __init__(
        self,
        corpus: Corpus,
        losses: Losses,
        keep: Collection[int],
        parent: Model | None,
        head: Head,
        device: torch.device,
    ) -> None:
        self._corpus, self._keep, self._parent, self._head, self._device = corpus, keep, parent, head, device
        self._predicts = losses.against_parent

    def batch(self, places: Sequence[int]) -> Batch:
        ids = self._corpus.read(places).to(self._device)
        if self._parent is None:
            return Batch(ids, None, {})
        with torch.no_grad():
            found: Pass = self._parent(ids, lambda found: found, keep=self._keep)
        hidden = found.hidden.flatten(0, 1)
        predictions = (lambda place: self._head.logits(hidden[place])) if self._predicts else None
        return Batch(ids, predictions, found.streams)


def spans(plan: Plan) -> list[tuple[int, int]]:
    """For each block, how many parent layers are in front of it and behind it: a fused block ends where its last member
    did (FFN Fusion leaves open how streams are matched)."""
    return [(min(block.layers), max(block.layers) + 1) for block in plan.blocks]
