"""A healing recipe as data: stages of training, the text they draw from, and the domains that guard them.

The paper's own is four stages of distillation, 54 B tokens at 8k, 5 B at 16k, 5 B at 32k and 0.8 B at 128k (FFN
Fusion, section 4); `scaled` makes the same shape of any size.
"""

from dataclasses import dataclass, field, replace
from math import ceil, cos, pi
from typing import Any, Literal

from ffn_fusion.core.distill import Losses
from ffn_fusion.errors import UserError

Schedule = Literal["cosine", "linear", "constant"]
Trains = Literal["all", "changed", "neighbours"]
Optimizers = Literal["adamw", "muon"]


@dataclass(frozen=True)
class Source:
    """A text, in any form that `--text` takes, and its share of the tokens."""

    text: str
    share: float = 1.0
    column: str = "text"


@dataclass(frozen=True)
class TrainingStage:
    """One stage: how many tokens, of what length, how fast, against what.

    `trains` is the parameters that move: all, those of blocks that the plan changed, or these and their neighbours.
    A `local` stage gives each of those blocks the parent's stream and takes its own no further: no gradient crosses
    blocks, and all other blocks are skipped. `rope` replaces the student's rope parameters, for longer contexts.
    """

    name: str
    tokens: int
    length: int
    step_tokens: int
    """Tokens of one optimizer step, over all ranks."""
    learning_rate: float
    losses: Losses
    schedule: Schedule = "cosine"
    warm_up: float = 0.05
    """Share of the steps over which the learning rate rises."""
    final_rate: float = 0.1
    """Share of the learning rate that is left at the end."""
    optimizer: Optimizers = "adamw"
    """Of the blocks' matrices; all else is AdamW's."""
    weight_decay: float = 0.0
    max_norm: float = 1.0
    """Gradients are clipped to this norm."""
    trains: Trains = "all"
    local: bool = False
    rope: dict[str, Any] | None = None
    text: list[Source] = field(default_factory=list)
    """Instead of the recipe's."""

    def __post_init__(self) -> None:
        least = {"tokens": 1, "length": 2, "step_tokens": self.length}
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise UserError(f"stage {self.name}: {name} {getattr(self, name):,} is below {limit:,}")
        if self.learning_rate <= 0 or not 0 <= self.warm_up <= 1 or not 0 <= self.final_rate <= 1:
            raise UserError(f"stage {self.name}: learning_rate, warm_up or final_rate is out of range")
        if self.local and (self.losses.on_logits or self.trains == "all"):
            raise UserError(
                f"stage {self.name}: a local stage has losses on the stream only, and trains changed blocks"
            )

    @property
    def windows_per_step(self) -> int:
        return max(1, round(self.step_tokens / self.length))

    @property
    def num_steps(self) -> int:
        return max(1, ceil(self.tokens / (self.windows_per_step * self.length)))

    def rate(self, step: int) -> float:
        """Learning rate of a step counted from 0: a straight warm-up, then the schedule down to `final_rate`."""
        rising = round(self.warm_up * self.num_steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        done = (step - rising) / max(1, self.num_steps - rising)
        left = {"cosine": 0.5 * (1 + cos(pi * done)), "linear": 1 - done, "constant": 1.0}[self.schedule]
        floor = 1.0 if self.schedule == "constant" else self.final_rate
        return self.learning_rate * (floor + (1 - floor) * left)


@dataclass(frozen=True)
class Curriculum:
    """Stages in order, the text they share, and held-out domains by name."""

    stages: list[TrainingStage]
    text: list[Source] = field(default_factory=list)
    domains: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise UserError("a recipe needs stages, each with a name of its own")

    def sources(self, stage: TrainingStage) -> list[Source]:
        return stage.text or self.text

    def reading(self, text: list[Source]) -> "Curriculum":
        """The same recipe, all of it on this text."""
        return replace(self, text=text, stages=[replace(stage, text=[]) for stage in self.stages])

    def scaled(self, tokens: float, length: int | None) -> "Curriculum":
        """The same recipe with `tokens` times as many tokens, and with contexts of the same ratio that begin with
        `length`; a step keeps its number of windows where it can."""
        first = self.stages[0].length
        share = length / first if length else 1.0

        def small(stage: TrainingStage) -> TrainingStage:
            own = max(2, round(stage.length * share))
            return replace(
                stage,
                tokens=max(1, round(stage.tokens * tokens)),
                length=own,
                step_tokens=max(own, round(stage.step_tokens * share)),
            )

        return replace(self, stages=[small(stage) for stage in self.stages])
