"""How the scores of tasks are written and drawn: their unit, their digits, and the axes that they share."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ffn_fusion.core.records import TaskMetric, TaskResult
from ffn_fusion.core.stats import Estimate


@dataclass(frozen=True)
class Scale:
    """`percent` if scores are shares of 1 and more is better; `decimals` are the same for all scores of a metric."""

    percent: bool
    decimals: int

    @property
    def factor(self) -> int:
        return 100 if self.percent else 1

    def text(self, value: float, fewer: int = 0) -> str:
        """A score without its unit; `fewer` digits for a figure."""
        text = f"{self.factor * value:,.{max(self.decimals - fewer, 0)}f}"
        return text.replace("-", "−" if _is_seen(text) else "")

    def change(self, value: float, fewer: int = 0) -> str:
        """A difference, in points if scores are percentages."""
        text = self.text(value, fewer)
        return f"+{text}" if value > 0 and _is_seen(text) else text

    def interval(self, estimate: Estimate) -> str:
        """The 95% interval of a score; one item has none."""
        return self._between(self.text(estimate.low), self.text(estimate.high), estimate)

    def interval_of_change(self, estimate: Estimate) -> str:
        return self._between(self.change(estimate.low), self.change(estimate.high), estimate)

    @staticmethod
    def _between(low: str, high: str, estimate: Estimate) -> str:
        return f"{low} to {high}" if math.isfinite(estimate.stderr) else "no interval"


def _is_seen(text: str) -> bool:
    """What rounds to zero has no sign."""
    return any(digit in text for digit in "123456789")


def scale(metric: TaskMetric) -> Scale:
    """Percentages have two decimals, the largest of any other scores four digits."""
    means = [score.value.mean for score in metric.scores if math.isfinite(score.value.mean)]
    percent = metric.is_share
    largest = max(map(abs, means), default=0)
    digits = math.floor(math.log10(largest)) if largest else 0
    return Scale(percent, 2 if percent else max(3 - digits, 0))


@dataclass(frozen=True)
class Axis:
    """Ticks, the first and the last of which are the ends of the axis."""

    ticks: list[float]

    def at(self, value: float) -> float:
        """A place in percent of the length; what lies beyond an end is drawn at the end."""
        low, high = self.ticks[0], self.ticks[-1]
        return round(100 * (min(max(value, low), high) - low) / (high - low), 2)


def axis(values: Iterable[float]) -> Axis:
    """Up to six round ticks around 0 and all values that are finite."""
    held = [0.0, *(value for value in values if math.isfinite(value))]
    length = max(held) - min(held)
    step = _round_step(length / 4 if length > 1e-12 else 1.0)
    first, last = math.floor(min(held) / step + 1e-9), math.ceil(max(held) / step - 1e-9)
    return Axis([step * i for i in range(first, max(last, first + 1) + 1)])


def _round_step(least: float) -> float:
    size = 10.0 ** math.floor(math.log10(least))
    return next(step * size for step in (1, 2, 2.5, 5, 10) if step * size >= least * (1 - 1e-9))


@dataclass(frozen=True)
class Panel:
    """Tasks whose first metrics share axes, one for scores and one for differences."""

    tasks: list[TaskResult]
    scale: Scale
    scores: Axis
    changes: Axis


def panels(tasks: Sequence[TaskResult]) -> list[Panel]:
    """Percentages share a panel, which comes first; any other metric has its own."""
    percent = [task for task in tasks if scale(task.metrics[0]).percent]
    alone = [[task] for task in tasks if not scale(task.metrics[0]).percent]
    return [_panel(group) for group in ([percent] if percent else []) + alone]


def _panel(tasks: list[TaskResult]) -> Panel:
    metrics = [task.metrics[0] for task in tasks]
    own = scale(metrics[0])
    scores = [s.value for metric in metrics for s in metric.scores]
    changes = [s.difference.difference for metric in metrics for s in metric.scores if s.difference]
    # Both sides of zero are shown, and differences too small to be written are not spread over the whole axis.
    least = 10.0 ** (1 - own.decimals) / own.factor
    return Panel(
        tasks=tasks,
        scale=own,
        scores=axis([1.0] if own.percent else _ends(scores)),
        changes=axis([-least, least, *_ends(changes)]),
    )


def _ends(estimates: Sequence[Estimate]) -> list[float]:
    return [end for e in estimates for end in (e.mean, e.low, e.high)]
