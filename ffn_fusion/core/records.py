"""Results of the stages, as they are written to `record.json` and returned by the Python API."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from ffn_fusion.core.plan import Plan, contiguous
from ffn_fusion.core.stats import Estimate, Paired

SEEN = 0.1
"""Share of a task's items that may overlap with text that a student was fitted to."""
NORMAL = 1.96
"""Standard errors in half a 95 % interval."""


@dataclass(frozen=True)
class Sample:
    """The text behind a figure."""

    sources: list[str]
    part: str
    num_windows: int
    length: int
    seed: int
    digest: str

    @property
    def num_tokens(self) -> int:
        return self.num_windows * self.length


@dataclass(frozen=True)
class Geometry:
    """Per layer, mean over tokens: how far the layer turns the stream, how large its contribution is, and whether
    the contribution is orthogonal to the stream (FFN Fusion, section 5.5)."""

    turn: list[float]
    """1 - cos(x, f(x))."""
    norm_ratio: list[float]
    """|h| / |x|."""
    alignment: list[float]
    """cos(h, x)."""


@dataclass(frozen=True)
class MassiveActivation:
    """A token whose stream is far longer than the median after a layer."""

    layer: int
    position: int
    channel: int
    norm: float
    median_norm: float


@dataclass(frozen=True)
class AnalyzeResult:
    """Sublayer scores, dependency matrices and geometry of a parent.

    `attention` and `ffn` hold the KL to the parent when that sublayer is removed (None where there is none), in nats
    a token. `block_dependency[i][j]` is the cosine distance between block j's contribution with and without block i;
    `sublayer_dependency` the same for sublayers in the order A0 F0 A1 F1 ... Rows are removed, columns measured.
    """

    model: str
    num_layers: int
    sample: Sample
    attention: list[Estimate | None]
    ffn: list[Estimate | None]
    block_dependency: list[list[float]]
    sublayer_dependency: list[list[float]]
    geometry: Geometry
    massive: list[MassiveActivation]

    @property
    def ffn_dependency(self) -> list[list[float]]:
        """The FFN to FFN part of the sublayer matrix."""
        return [row[1::2] for row in self.sublayer_dependency[1::2]]

    def summary(self) -> str:
        scored = [(e.mean, layer) for layer, e in enumerate(self.attention) if e is not None]
        cheap = ", ".join(f"{layer} ({kl:.3f})" for kl, layer in sorted(scored)[:8])
        dear = ", ".join(f"{layer} ({kl:.2f})" for kl, layer in sorted(scored, reverse=True)[:4])
        named = contiguous({m.layer for m in self.massive})
        massive = f"\nmassive activations after layers {named}" if self.massive else ""
        return (
            f"{self.num_layers} layers, KL measured on {self.sample.num_tokens:,} tokens\n"
            f"attentions cheapest to remove (KL): {cheap}\ndearest: {dear}{massive}"
        )


@dataclass(frozen=True)
class FitSummary:
    """Calibration of one block: held-out error relative to |target - input|^2."""

    block: str
    error_before: float
    error_after: float
    strengths: list[float | None]


@dataclass(frozen=True)
class CutSummary:
    """An FFN made narrower: the channels kept, of how many, and their share of the contribution of all (Puzzle);
    chosen in several steps, channels have places and no such share."""

    layer: int
    width: int
    parent_width: int
    share: float | None

    def __str__(self) -> str:
        share = "" if self.share is None else f", {self.share:.1%} of the contribution"
        return f"F{self.layer}: {self.width:,} of {self.parent_width:,} channels{share}"


@dataclass(frozen=True)
class FuseResult:
    """The student written by `fuse`."""

    parent: str
    plan: str
    layout: str
    norm: str
    calibrate: str
    num_parameters: int
    parent_parameters: int
    dropped: list[str]
    fits: list[FitSummary]
    sample: Sample | None
    cuts: list[CutSummary] = field(default_factory=list)
    library: str | None = None
    library_texts: list[str] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        """All text that fitted it or trained its blocks."""
        return list(dict.fromkeys([*(self.sample.sources if self.sample else ()), *self.library_texts]))

    def summary(self) -> str:
        plan = Plan.parse(self.plan)
        lines = [f"{plan}", f"{self.num_parameters:,} of {self.parent_parameters:,} parameters, layout {self.layout}"]
        lines += [f"  {cut}" for cut in self.cuts]
        lines += [
            f"  {fit.block}: held-out error {fit.error_before:.3f} -> {fit.error_after:.3f}, strength {fit.strengths}"
            for fit in self.fits
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class ModelScore:
    """One model on held-out text; the last four compare it with the parent on the same tokens (None for itself)."""

    model: str
    nll: Estimate
    perplexity: float
    bits_per_byte: float
    kl: Estimate | None
    top1_agreement: Estimate | None
    nll_difference: Estimate | None


@dataclass(frozen=True)
class TaskScore:
    """One metric of one model on a task's items; the last two compare it with the parent, item by item."""

    model: str
    value: Estimate
    difference: Paired | None
    """Student minus parent (None for the parent itself)."""
    share_of_parent: float | None


@dataclass(frozen=True)
class TaskMetric:
    """A metric of a task, all models on the same items, the parent first."""

    name: str
    higher_is_better: bool
    scores: list[TaskScore]

    @property
    def is_share(self) -> bool:
        """A share of 1 of which more is better, as accuracies are."""
        means = [score.value.mean for score in self.scores if math.isfinite(score.value.mean)]
        return self.higher_is_better and all(0 <= mean <= 1 for mean in means)


@dataclass(frozen=True)
class TaskResult:
    """A task as it was run. `metrics` has the customary one first.

    `overlap` counts the items that share 13 words in a row with a text that a student was fitted to; None if there
    was no such text or none could be read.
    """

    task: str
    version: str
    data: str
    """Where the items came from."""
    num_items: int
    total_items: int
    num_fewshot: int
    chat_template: bool
    metrics: list[TaskMetric]
    overlap: int | None = None
    note: str = ""

    @property
    def seen(self) -> bool:
        """More than a tenth of the items overlap with text that a student was fitted to."""
        return (self.overlap or 0) > SEEN * self.num_items

    @property
    def limited(self) -> str:
        """The warning that stands wherever a score of a part of the items does."""
        return f"limited, n = {self.num_items:,}" if self.num_items < self.total_items else ""


@dataclass(frozen=True)
class Average:
    """Means over tasks of a student and its parent, and half the 95 % interval of their difference on these items."""

    model: str
    num_tasks: int
    student: float
    parent: float
    half: float

    @property
    def share(self) -> float:
        return self.student / self.parent

    @property
    def interval(self) -> str:
        low, high = ((self.student + half) / self.parent for half in (-self.half, self.half))
        return f"[{low:.1%}, {high:.1%}]"


def averages(tasks: Sequence[TaskResult]) -> list[Average]:
    """Of each student, over the customary metrics that are shares; tasks whose items it may have seen do not count.

    Tasks are independent samples, and student and parent had the same items.
    """
    pairs: dict[str, list[tuple[float, Estimate]]] = {}
    for task in tasks:
        metric = task.metrics[0]
        for score in metric.scores[1:] if metric.is_share and not task.seen else ():
            if score.difference:
                pair = (metric.scores[0].value.mean, score.difference.difference)
                pairs.setdefault(score.model, []).append(pair)
    found = []
    for model, both in pairs.items():
        parent, change = fmean(mean for mean, _ in both), fmean(difference.mean for _, difference in both)
        stderr = math.sqrt(sum(difference.stderr**2 for _, difference in both)) / len(both)
        if parent > 0:
            found.append(Average(model, len(both), parent + change, parent, NORMAL * stderr))
    return found


@dataclass(frozen=True)
class Unscored:
    """A task that could not be scored, and why."""

    task: str
    reason: str


@dataclass(frozen=True)
class EvalResult:
    """Held-out scores of a parent and its students, and the tasks they were given."""

    sample: Sample
    scores: list[ModelScore]
    tasks: list[TaskResult] = field(default_factory=list)
    unscored: list[Unscored] = field(default_factory=list)

    def summary(self) -> str:
        lines = [f"{'model':36} {'ppl':>9} {'bits/byte':>9} {'KL to parent':>18} {'top-1':>7} {'nll - parent':>18}"]
        for s in self.scores:
            top = f"{s.top1_agreement.mean:.1%}" if s.top1_agreement else "-"
            kl, difference = str(s.kl or "-"), str(s.nll_difference or "-")
            lines.append(
                f"{s.model[-36:]:36} {s.perplexity:9.2f} {s.bits_per_byte:9.4f} {kl:>18} {top:>7} {difference:>18}"
            )
        lines.append(f"{self.sample.num_tokens:,} tokens of {', '.join(self.sample.sources)}")
        for task in self.tasks:
            lines += ["", *_task_lines(task)]
        left_out = [task.task for task in self.tasks if task.seen]
        without = f", without {', '.join(left_out)}" if left_out else ""
        lines += [
            f"\n{a.model[-36:]} keeps {a.share:.1%} {a.interval} of the parent's mean over {a.num_tasks} tasks{without}"
            for a in averages(self.tasks)
            if a.num_tasks > 1
        ]
        lines += [f"\n{u.task} was not scored: {u.reason}" for u in self.unscored]
        return "\n".join(lines)


def _task_lines(task: TaskResult) -> list[str]:
    about = [task.limited or f"n = {task.num_items:,}", f"{task.num_fewshot}-shot"]
    about += ["chat template"] if task.chat_template else []
    about += [f"{task.overlap:,} items overlap with the calibration text"] if task.overlap else []
    lines = [f"{task.task} ({', '.join(about)})" + (f"; {task.note}" if task.note else "")]
    for metric in task.metrics:
        for score in metric.scores:
            against = f"  {score.difference}" if score.difference else ""
            share = f"  {score.share_of_parent:.1%} of parent" if score.share_of_parent is not None else ""
            lines.append(f"  {metric.name:22} {score.model[-30:]:30} {score.value!s:>18}{against}{share}")
    return lines
