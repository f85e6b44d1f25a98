"""What a healing run is given: the models, what is read, and how to go about it."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ffn_fusion.core.curriculum import TrainingStage
from ffn_fusion.core.plan import Plan
from ffn_fusion.healing.domains import Domain
from ffn_fusion.healing.feeds import spans
from ffn_fusion.healing.loop import Objective
from ffn_fusion.healing.teacher_cache import TeacherCache
from ffn_fusion.hf.model import ModelFolder


@dataclass(frozen=True)
class Pair:
    """Parent and student, and the plan that leads from one to the other."""

    parent: ModelFolder
    student: ModelFolder
    plan: Plan

    def changed(self, stage: TrainingStage) -> frozenset[int]:
        """Blocks that the stage trains if it does not train all."""
        found = {i for i, block in enumerate(self.plan.blocks) if block not in self.parent.plan.blocks}
        if stage.trains == "neighbours":
            found |= {i + step for i in found for step in (-1, 1)} & set(range(len(self.plan.blocks)))
        return frozenset(found)

    def objective(self, stage: TrainingStage, compiled: bool = False) -> Objective:
        return Objective(stage.losses, spans(self.plan), self.changed(stage) if stage.local else None, compiled)


@dataclass(frozen=True)
class Material:
    """What is read: text by this tokenizer, or a cache of the parent's answers, and the domains."""

    tokenizer: PreTrainedTokenizerBase
    domains: list[Domain]
    cache: TeacherCache | None = None


@dataclass(frozen=True)
class Habits:
    """How to go about it; none of it changes what is learned, but for rounding."""

    dtype: torch.dtype
    batch_size: int
    check_ups: int
    save_minutes: float
    patience: int
    compiled: bool
    checkpointed: bool
    seed: int
