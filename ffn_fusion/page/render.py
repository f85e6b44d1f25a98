"""Records as one self-contained HTML page: its headlines, and what its templates are given."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ffn_fusion.core import comparison
from ffn_fusion.core.cost_records import LABELS
from ffn_fusion.core.engine_records import QUESTION
from ffn_fusion.core.plan import Plan, contiguous
from ffn_fusion.core.records import EvalResult, ModelScore, TaskResult, averages
from ffn_fusion.core.scale import panels, scale
from ffn_fusion.core.score_grid import grid, row_of
from ffn_fusion.core.stats import Estimate
from ffn_fusion.page import figures, figures_heal, figures_search, figures_speed
from ffn_fusion.page.figures import Bar
from ffn_fusion.page.gather import Entry, Records

NO_VALUE = "–"


@dataclass(frozen=True)
class Headline:
    """One number at the top of the page."""

    name: str
    value: str
    note: str


def render(records: Records) -> str:
    """The page as text."""
    loader = FileSystemLoader(Path(__file__).parent)
    jinja = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    jinja.filters |= {
        "count": "{:,}".format,
        "sig": significant,
        "interval": interval,
        "signed": _signed,
        "contiguous": contiguous,
        "short": figures.short,
        "percent": _percent,
    }
    return jinja.get_template("report.html.jinja").render(
        records=records,
        plan=records.plan,
        parse=Plan.parse,
        identity=Plan.identity,
        figures=figures,
        bars=step_bars(records),
        headlines=_headlines(records),
        told=[entry for entry in records.eval if entry.result.tasks or entry.result.unscored],
        panels=panels,
        scale=scale,
        models=_models,
        removed=_removed(records),
        dash=NO_VALUE,
        question=QUESTION,
        drawn=figures_search,
        healing=figures_heal,
        speeds=figures_speed,
        compared=comparison,
        grid=grid,
        row_of=row_of,
        labels=LABELS,
        columns=_columns(records),
    )


def significant(value: float) -> str:
    """Four digits, zeros at the end included, so that columns line up."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def interval(estimate: Estimate) -> str:
    """The 95% interval; one window has none."""
    finite = math.isfinite(estimate.stderr)
    return f"{significant(estimate.low)} to {significant(estimate.high)}" if finite else NO_VALUE


def step_bars(records: Records) -> list[Bar]:
    """Loss of each step: the parent, what the search measured, what `eval` measured on held-out text."""
    bars = []
    for search in records.found:
        result = search.result
        first = "nothing fused or fitted" if result.candidates else "attention removed"
        last = "fused and calibrated" if result.calibrated else "fused"
        bars += [Bar(first, "search text", result.unfused_kl), Bar(last, "search text", result.kl)]
    for entry in records.text_evals:
        source = "held-out text" if len(records.text_evals) == 1 else f"held-out text, {entry.folder}"
        bars += [Bar(score.model, source, score.kl) for score in entry.result.scores if score.kl]
    return [Bar("parent", "", None), *bars] if bars else []


def _models(tasks: Sequence[TaskResult]) -> list[str]:
    """Every model that was given a task, the parent first."""
    return list(dict.fromkeys(s.model for task in tasks for metric in task.metrics for s in metric.scores))


def _headlines(records: Records) -> list[Headline]:
    """At most six: tasks take the place of perplexity, which stands in a table right below."""
    quality, tasks = list(_quality(records)), list(_tasks(records))
    kept = [line for line in quality if not tasks or line.name != "Perplexity"]
    return [*kept, *tasks, *_speed(records), *_size(records)]


def _tasks(records: Records) -> Iterator[Headline]:
    """What the last student keeps of its parent's mean."""
    tasks = [task for entry in records.eval for task in entry.result.tasks]
    student = _models(tasks)[-1] if tasks else ""
    for average in averages(tasks):
        if average.model == student:
            note = f"{average.interval}; {average.num_tasks} {'task' if average.num_tasks == 1 else 'tasks'}; {student}"
            note = f"limited, {note}" if any(task.limited for task in tasks) else note
            yield Headline("Tasks: share of the parent's mean", f"{average.share:.1%}", note)


def _student(records: Records) -> tuple[Entry[EvalResult], ModelScore] | None:
    """The student whose numbers stand at the top: the last one that was evaluated."""
    compared = [(entry, score) for entry in records.eval for score in entry.result.scores if score.kl]
    return compared[-1] if compared else None


def _quality(records: Records) -> Iterator[Headline]:
    student = _student(records)
    if student is None:
        if records.found:
            kl = records.found[-1].result.kl
            yield Headline("KL to parent", f"{kl.mean:.3f}", f"nats a token, {interval(kl)}; on the search's own text")
        return
    entry, score = student
    if score.kl:
        yield Headline("KL to parent", f"{score.kl.mean:.3f}", f"nats a token, {interval(score.kl)}; {score.model}")
    if score.top1_agreement:
        low, high = (f"{end:.1%}" for end in (score.top1_agreement.low, score.top1_agreement.high))
        note = f"same next token, {low} to {high}" if math.isfinite(score.top1_agreement.stderr) else "same next token"
        yield Headline("Top-1 agreement", f"{score.top1_agreement.mean:.1%}", note)
    parent = next((s for s in entry.result.scores if s.kl is None), None)
    before = f"{parent.perplexity:.2f} → " if parent else ""
    yield Headline("Perplexity", f"{before}{score.perplexity:.2f}", "parent → student, held-out text")


def _speed(records: Records) -> Iterator[Headline]:
    rows = [row for entry in records.bench for row in entry.result.rows if row.decode_speedup is not None]
    student = _student(records)
    own = [row for row in rows if student and row.model == student[1].model]
    shown = own or [row for row in rows if row.model == rows[-1].model]
    row = min(shown, key=attrgetter("batch_size"), default=None)
    if row:
        name = f"Decode speed-up, batch {row.batch_size}"
        yield Headline(name, f"{row.decode_speedup:.2f}×", f"{row.decode_ms.median:.2f} ms a token; {row.model}")


def _size(records: Records) -> Iterator[Headline]:
    if records.plan:
        before = 2 * records.num_layers
        if records.analyze:
            result = records.analyze[-1].result
            before = sum(e is not None for e in result.attention + result.ffn)
        after = records.plan.num_sublayers
        yield Headline("Sequential sublayers", f"{before} → {after}", "each one all-reduce a token in parallel serving")
    if records.fuse:
        fused = records.fuse[-1].result
        share = fused.num_parameters / fused.parent_parameters - 1
        value = f"{_millions(fused.parent_parameters)} → {_millions(fused.num_parameters)}"
        yield Headline("Parameters", value, f"{_signed(share)}; {fused.parent_parameters:,} → {fused.num_parameters:,}")


def _signed(share: float) -> str:
    """A change in percent, with a true minus sign."""
    return f"{share:+.1%}".replace("-", "−")


def _percent(share: float) -> str:
    """A mean error in percent; a dash where nothing was measured."""
    return f"{share:.1%}" if math.isfinite(share) else NO_VALUE


def _millions(count: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _removed(records: Records) -> set[int]:
    """Layers whose attention the plan leaves out."""
    return set(range(records.num_layers)) - set(records.plan.attention_layers) if records.plan else set()


def _columns(records: Records) -> int:
    """Columns of all plan strips, so that they line up."""
    drawn = [figures.columns(Plan.parse(entry.result.plan), records.num_layers) for entry in records.planned]
    return max(drawn, default=records.num_layers)
