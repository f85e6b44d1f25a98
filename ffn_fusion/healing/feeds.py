"""What a step learns from: windows of text, and the parent's answer to them, live or out of a cache."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ffn_fusion.core.curriculum import TrainingStage
from ffn_fusion.core.distill import Losses, logits_of
from ffn_fusion.core.plan import Plan
from ffn_fusion.core.topk import TopK
from ffn_fusion.errors import UserError
from ffn_fusion.healing.corpus import Corpus
from ffn_fusion.healing.sharded import Model, Pass
from ffn_fusion.healing.teacher_cache import TeacherCache
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
        """[N, d] -> [N, vocabulary]."""
        return logits_of(hidden, self.weight, self.scale)


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
        ids = _sent(self._corpus.read(places), self._device)
        if self._parent is None:
            return Batch(ids, None, {})
        with torch.no_grad():
            found: Pass = self._parent(ids, lambda found: found, keep=self._keep)
        hidden = found.hidden.flatten(0, 1)
        predictions = (lambda place: self._head.logits(hidden[place])) if self._predicts else None
        return Batch(ids, predictions, found.streams)


class CachedFeed:
    """The parent answered before (`teach`): its windows are the text, and it is not in memory."""

    def __init__(self, cache: TeacherCache, order: np.ndarray, losses: Losses, device: torch.device) -> None:
        self._cache, self._order, self._device = cache, order, device
        self._predicts = losses.against_parent

    def batch(self, places: Sequence[int]) -> Batch:
        cached = self._cache.read(self._order[list(places)].tolist())
        top = TopK(*(_sent(part.flatten(0, 1), self._device) for part in cached.top))
        predictions = (lambda place: TopK(*(part[place] for part in top))) if self._predicts else None
        streams = {layer + 1: _sent(stream, self._device) for layer, stream in cached.streams.items()}
        return Batch(_sent(cached.ids, self._device), predictions, streams)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; the host does not wait until a GPU has done what it was given before."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def needs_parent(stage: TrainingStage) -> bool:
    """Whether a stage asks the parent for anything."""
    return stage.losses.against_parent or stage.losses.on_stream


def check_cache(cache: TeacherCache, stage: TrainingStage, asked: Collection[int]) -> None:
    """`UserError` if the answers do not serve this stage; `asked` are the streams it compares."""
    losses, name = stage.losses, f"stage {stage.name}"
    if stage.length != cache.length:
        raise UserError(f"{name} has windows of {stage.length:,} tokens, the cached answers of {cache.length:,}")
    if losses.reverse_kl or losses.jsd:
        raise UserError(f"{name}: reverse_kl and jsd need the live parent; cached answers are its likeliest tokens")
    if losses.kl and losses.temperature != cache.temperature:
        raise UserError(f"{name} has temperature {losses.temperature:g}, the cached answers {cache.temperature:g}")
    missing = sorted(set(asked) - {layer + 1 for layer in cache.layers})
    if missing:
        layers = " ".join(str(stream - 1) if stream else "embeddings" for stream in missing)
        raise UserError(f"{name} compares streams behind layers {layers}, which the cached answers lack")


def spans(plan: Plan) -> list[tuple[int, int]]:
    """For each block, how many parent layers are in front of it and behind it: a fused block ends where its last member
    did (FFN Fusion leaves open how streams are matched)."""
    return [(min(block.layers), max(block.layers) + 1) for block in plan.blocks]
