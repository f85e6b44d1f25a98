"""Results of `align`, as they are written to the record of a trained student, and the scores in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ffn_fusion.core.stats import Estimate, estimate

Method = Literal["sft", "dpo"]
Sums = list[list[float]]
"""Log-probability of every answer of every record: one answer for SFT, the chosen and the rejected one for DPO."""
Counts = list[list[int]]
"""Tokens of the same answers."""


@dataclass(frozen=True)
class Course:
    """How a model is trained; with the model and the records, all that the result depends on."""

    method: Method
    lora: int | None
    """Rank of the adapters that are merged in the end; None where every weight trains."""
    epochs: int
    learning_rate: float
    beta: float
    """For dpo: the weight of staying close to the model as it was."""
    batch_size: int
    accumulate: int
    """Batches that make one step."""
    ranks: int
    gradient_checkpointing: bool
    dtype: str
    """Arithmetic; weights that train are float32."""
    seed: int

    def num_steps(self, num_records: int) -> int:
        """Steps in all; the last one of an epoch may have fewer records."""
        batches = -(-num_records // (self.batch_size * self.ranks))
        return self.epochs * -(-batches // self.accumulate)


@dataclass(frozen=True)
class Score:
    """A measure of held-out records before and after training, and its change, record by record."""

    name: str
    higher_is_better: bool
    before: Estimate
    after: Estimate
    change: Estimate

    @property
    def verdict(self) -> str:
        """What the 95 % interval of the change says."""
        if self.change.low <= 0 <= self.change.high:
            return "no change that these records can tell"
        return "better" if (self.change.mean > 0) == self.higher_is_better else "WORSE than before"

    def __str__(self) -> str:
        low, high = self.change.low, self.change.high
        return (
            f"{self.name}: {self.before} -> {self.after}, "
            f"change {self.change.mean:+.4g} [{low:+.4g}, {high:+.4g}]: {self.verdict}"
        )


@dataclass(frozen=True)
class Records:
    """The records behind a training: how many were trained on, held out, and left out because of their length."""

    sources: list[str]
    num_trained: int
    num_held_out: int
    num_too_long: int
    num_tokens: int
    """Tokens of answers in the records trained on, once each."""
    length: int
    digest: str


@dataclass(frozen=True)
class StepLoss:
    """Training loss, the mean since the entry before."""

    step: int
    loss: float


@dataclass(frozen=True)
class AlignResult:
    """A student after instruction tuning or preference optimisation."""

    model: str
    course: Course
    records: Records
    trained_parameters: int
    losses: list[StepLoss]
    scores: list[Score]
    texts: list[str]
    """All texts behind the student: these records' files, and what it was calibrated or trained on before."""

    @property
    def num_steps(self) -> int:
        return self.losses[-1].step if self.losses else 0

    def summary(self) -> str:
        records = self.records
        left_out = f", {records.num_too_long:,} longer than {records.length:,} tokens left out"
        how = f"LoRA of rank {self.course.lora}, merged" if self.course.lora else "all weights"
        return "\n".join(
            [
                f"{self.course.method} on {records.num_trained:,} records ({records.num_tokens:,} tokens of answers"
                f"{left_out if records.num_too_long else ''}), {self.num_steps:,} steps, {how}: "
                f"{self.trained_parameters:,} parameters trained",
                f"on {records.num_held_out:,} held-out records, before -> after:",
                *(f"  {score}" for score in self.scores),
            ]
        )


def scores(before: Sums, after: Sums, counts: Counts) -> list[Score]:
    """Held-out scores of answers: their loss; of pairs of answers, which one is preferred, by how much, and the loss
    of the chosen one."""
    ones = [1.0] * len(counts)
    if all(len(record) == 1 for record in counts):
        return [_loss("loss, nats a token of the answers", before, after, counts)]
    return [
        _score("share of pairs whose chosen answer is likelier", True, _preferred(before), _preferred(after), ones),
        _score("margin, nats a pair", True, _margins(before), _margins(after), ones),
        _loss("loss, nats a token of the chosen answers", before, after, counts),
    ]


def _loss(name: str, before: Sums, after: Sums, counts: Counts) -> Score:
    first = [record[0] for record in counts]
    return _score(name, False, [-record[0] for record in before], [-record[0] for record in after], first)


def _margins(sums: Sums) -> list[float]:
    return [chosen - rejected for chosen, rejected in sums]


def _preferred(sums: Sums) -> list[float]:
    return [float(margin > 0) for margin in _margins(sums)]


def _score(
    name: str, higher_is_better: bool, before: Sequence[float], after: Sequence[float], counts: Sequence[float]
) -> Score:
    change = [new - old for old, new in zip(before, after, strict=True)]
    return Score(name, higher_is_better, estimate(before, counts), estimate(after, counts), estimate(change, counts))
