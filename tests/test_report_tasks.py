"""Benchmark tasks on the report: every score and its warning is shown, scales are kept apart, nothing overlaps."""

import html
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_report import bench, browse, evaluate, figures_of, fuse, measured, needs_browser, page_of, search, write

from ffn_fusion.core.records import EvalResult, TaskMetric, TaskResult, TaskScore, Unscored, averages
from ffn_fusion.core.scale import axis, panels, scale
from ffn_fusion.core.stats import Estimate, Paired, estimate, paired
from ffn_fusion.folder import RECORD

MODELS = ("parent", "student", "other student")
LIMITED = "limited, n = 200"


def around(mean: float, half: float, n: int = 500) -> Estimate:
    return Estimate(mean, half / 2, mean - half, mean + half, n)


def metric(name: str, values: list[float], half: float, higher: bool = True) -> TaskMetric:
    parent, *rest = values
    scores = [TaskScore(MODELS[0], around(parent, half), None, None)]
    for model, value, p_value in zip(MODELS[1:], rest, (0.0123, 0.0001), strict=False):
        against = Paired(around(value - parent, half), p_value, "McNemar" if parent < 1 else "bootstrap")
        scores.append(TaskScore(model, around(value, half), against, value / parent))
    return TaskMetric(name, higher, scores)


def task(name: str, metrics: list[TaskMetric], n: int = 500, total: int = 500) -> TaskResult:
    return TaskResult(name, f"v-{name}", f"data of {name}", n, total, 5, name == "mt_bench", metrics)


def tasks() -> list[TaskResult]:
    """MT-Bench stands between percentages, where a shared axis would take it."""
    acc_norm = metric("acc_norm", [0.625, 0.5, 0.6245], 0.0211)
    mt_bench = metric("judge", [6.0, 5.25, 5.9], 0.25)
    lambada = [metric("acc", [0.4, 0.36, 0.2], 0.03), metric("perplexity", [12.5, 15.0, 20.0], 1.5, higher=False)]
    return [
        replace(task("arc_easy", [acc_norm, metric("acc", [0.5, 0.45, 0.55], 0.02)]), overlap=12),
        replace(task("mt_bench", [mt_bench], n=80, total=80), note="Judged by a small model."),
        task("mmlu", [metric("acc", [0.3, 0.29, 0.31], 0.06)], n=200, total=14_042),
        replace(task("lambada", lambada), overlap=0),
    ]


def evaluated(given: list[TaskResult], unscored: tuple[Unscored, ...] = ()) -> EvalResult:
    """The last student has another tokenizer: no KL, but tasks."""
    base = evaluate()
    foreign = replace(base.scores[1], model=MODELS[2], kl=None, top1_agreement=None, nll_difference=None)
    return EvalResult(base.sample, [*base.scores, foreign], given, list(unscored))


def page(tmp_path: Path, *results: EvalResult) -> str:
    folders = [write(tmp_path / "work" / f"eval{i}", "eval", result) for i, result in enumerate(results)]
    return page_of(*folders, out=tmp_path / "report.html")


def text_of(markup: str) -> str:
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<style>.*?</style>|<[^>]*>", " ", markup, flags=re.DOTALL)))


def figure(markup: str, name: str) -> str:
    found = re.search(f'<figure id="{name}".*?</figure>', markup, flags=re.DOTALL)
    assert found is not None
    return found[0]


def rows(markup: str) -> dict[str, str]:
    """The rows of a figure by the name of their task."""
    parts = markup.split('<div class="row">')[1:]
    return {text_of(part.split('class="task">')[1].split("</span>")[0]): part for part in parts}


def test_table_has_every_score_interval_test_and_share(tmp_path: Path) -> None:
    text = text_of(page(tmp_path, evaluated(tasks(), (Unscored("gsm8k", "no room for answers"),))))
    for shown in (
        "arc_easy acc_norm n = 500 parent 62.50% 60.39 to 64.61",
        "student 50.00% 47.89 to 52.11 −12.50 −14.61 to −10.39 0.012 McNemar 80.0%",
        "other student 62.45% 60.34 to 64.56 −0.05 −2.16 to +2.06 <0.001 McNemar 99.9%",
        "arc_easy acc parent 50.00%",
        "mt_bench judge n = 80 parent 6.000 5.750 to 6.250 student 5.250 5.000 to 5.500 −0.750 −1.000 to −0.500",
        "lambada perplexity, lower is better parent 12.50 11.00 to 14.00",
        "+2.50 +1.00 to +4.00 0.012 bootstrap 120.0%",
        "arc_easy 12 items share 13 words with the calibration text.",
        "mt_bench Judged by a small model.",
        "arc_easy 500 5 no v-arc_easy 12 data of arc_easy",
        "mt_bench 80 5 yes v-mt_bench not checked data of mt_bench",
        f"mmlu {LIMITED} 200 of 14,042 5 no v-mmlu not checked",
        "lambada 500 5 no v-lambada none data of lambada",
        "Not scored: gsm8k : no room for answers",
    ):  # fmt: skip
        assert shown in text, shown


def test_figures_show_scores_and_differences_in_place(tmp_path: Path) -> None:
    markup = page(tmp_path, evaluated(tasks()))
    bars = rows(figure(markup, "fig-tasks"))
    # As in the table: percentages first.
    assert list(bars) == ["arc_easy", "mmlu", "lambada", "mt_bench"]
    assert [float(width) for width in re.findall(r'<rect x="0.0%" width="([\d.]+)%"', bars["arc_easy"])] == [
        62.5,
        50,
        62.45,
    ]
    assert [float(width) for width in re.findall(r'<rect x="0.0%" width="([\d.]+)%"', bars["mt_bench"])] == [
        75,
        65.62,
        73.75,
    ]
    assert re.findall(r'class="whisker" x1="([\d.]+)%" x2="([\d.]+)%"', bars["arc_easy"])[0] == ("60.39", "64.61")
    assert re.findall(r'y="([-\d.]+)" height', bars["arc_easy"]) == ["-17.5", "-4.5", "8.5"]
    assert "acc_norm" in bars["arc_easy"]
    assert "62.5 50.0 62.5" in text_of(bars["arc_easy"])
    assert "6.00 5.25 5.90" in text_of(bars["mt_bench"])
    changes = rows(figure(markup, "fig-task-differences"))
    assert list(changes) == list(bars)
    assert re.findall(r'<g class="(\w+)"', changes["arc_easy"]) == ["clear", "unclear"]
    assert re.findall(r'cy="([-\d.]+)"', changes["arc_easy"]) == ["-6.5", "6.5"]
    assert "<b>−12.5</b>" in changes["arc_easy"]
    assert "<b>−0.1</b>" not in changes["arc_easy"]
    zero = re.findall(r'class="zero" x1="([\d.]+)%"', changes["mmlu"])
    left, right = (float(place) for place in re.findall(r'cx="([\d.]+)%"', changes["mmlu"]))
    assert left < float(zero[0]) < right
    low, high = re.findall(r'<line x1="([\d.]+)%" x2="([\d.]+)%" y1="-6.5"', changes["arc_easy"])[0]
    assert 0 <= float(low) < float(high) < float(zero[0])


def test_scales_are_kept_apart(tmp_path: Path) -> None:
    found = panels(tasks())
    assert [[task.task for task in panel.tasks] for panel in found] == [["arc_easy", "mmlu", "lambada"], ["mt_bench"]]
    assert found[0].scores.ticks == [0, 0.25, 0.5, 0.75, 1]
    assert found[1].scores.ticks[-1] >= 6.25
    drawn = figure(page(tmp_path, evaluated(tasks())), "fig-tasks").split('class="panel"')
    assert len(drawn) == 3
    assert "score in % 0 25 50 75 100" in text_of(drawn[1])
    assert "score 0 2 4 6 8" in text_of(drawn[2])


def test_a_small_loss_is_no_percentage() -> None:
    assert scale(metric("bits_per_byte", [0.8, 0.9, 0.85], 0.1, higher=False)).percent is False
    assert scale(metric("acc", [0.8, 0.9, 0.85], 0.1)).percent is True
    assert scale(metric("judge", [0.8, 9.0, 8.5], 0.1)).percent is False


def test_a_limited_task_says_so_wherever_its_score_is(tmp_path: Path) -> None:
    markup = page(tmp_path, evaluated(tasks()))
    for name in ("fig-tasks", "fig-task-differences"):
        limited = [task for task, row in rows(figure(markup, name)).items() if LIMITED in text_of(row)]
        assert limited == ["mmlu"]
    heads = re.findall(r'<tr class="about.*?</tr>', markup, flags=re.DOTALL)
    assert [text_of(head).split()[0] for head in heads if LIMITED in head] == ["mmlu"]
    assert re.search(r"the parent's mean 85.6% limited, \[[\d.%, ]+\]; 3 tasks; other student", text_of(markup))


def test_headlines_stay_six_and_take_shares_of_percentages_only(tmp_path: Path) -> None:
    full = [replace(t, total_items=t.num_items) for t in tasks()]
    for stage, result in {"search": search(), "fuse": fuse(), "bench": bench()}.items():
        write(tmp_path / "work" / stage, stage, result)
    write(tmp_path / "work" / "eval", "eval", evaluated(full))
    markup = page_of(tmp_path / "work", out=tmp_path / "report.html")
    assert len(re.findall("<dt>", markup)) == 6
    text = text_of(markup)
    share = (0.6245 + 0.31 + 0.2) / (0.625 + 0.3 + 0.4)
    assert re.search(rf"Tasks: share of the parent's mean {share:.1%} \[[\d.%, ]+\]; 3 tasks; other student", text)
    assert "Perplexity " not in text
    assert "limited" not in text


def test_what_a_student_keeps_of_the_mean_over_tasks() -> None:
    """By hand: 200 and 800 items, of which 20 and 40 are lost and 10 and 0 won; a task seen before does not count."""

    def answered(name: str, parent: list[int], student: list[int], overlap: int) -> TaskResult:
        before, after = (estimate(values, [1] * len(values)) for values in (parent, student))
        scores = [TaskScore("p", before, None, None), TaskScore("s", after, paired(parent, student), None)]
        return replace(task(name, [TaskMetric("acc", True, scores)], n=len(parent)), overlap=overlap)

    few = answered("few", [1] * 100 + [0] * 100, [0] * 20 + [1] * 90 + [0] * 90, 20)
    many = answered("many", [1] * 400 + [0] * 400, [1] * 360 + [0] * 440, 0)
    seen = answered("seen", [1] * 100 + [0] * 100, [0] * 200, 21)
    judged = task("judged", [metric("judge", [6.0, 5.0], 0.25)])
    (found,) = averages([few, many, seen, judged])
    assert (found.model, found.num_tasks, found.parent) == ("s", 2, 0.5)
    assert found.share == pytest.approx((0.45 + 0.45) / (0.5 + 0.5))
    # Variances of the differences: of 30 changes by -10 among 200, and of 40 lost among 800.
    variances = (30 - 10**2 / 200) / 199 / 200, (40 - 40**2 / 800) / 799 / 800
    assert found.half == pytest.approx(1.96 * sum(variances) ** 0.5 / 2)
    low, high = (f"{(0.45 + sign * found.half) / 0.5:.1%}" for sign in (-1, 1))
    lines = EvalResult(evaluate().sample, [], [few, many, seen]).summary()
    assert f"s keeps 90.0% [{low}, {high}] of the parent's mean over 2 tasks, without seen" in lines
    assert "keeps" not in EvalResult(evaluate().sample, [], [few]).summary()


def test_tasks_without_percentages_leave_the_headlines_alone(tmp_path: Path) -> None:
    text = text_of(page(tmp_path, evaluated([t for t in tasks() if t.task == "mt_bench"])))
    assert "parent's mean" not in text
    assert "Perplexity 20.09 → 22.20" in text


def test_names_are_escaped(tmp_path: Path) -> None:
    name = '<img src="x" onerror="alert(1)">'
    scores = [replace(s, model=f"{name}{s.model}") for s in tasks()[0].metrics[0].scores]
    odd = replace(tasks()[0], task=name, version=name, data=name, note=name, metrics=[TaskMetric(name, True, scores)])
    markup = page(tmp_path, evaluated([odd], (Unscored(name, name),)))
    assert "<img" not in markup
    assert html.escape(name).replace("&quot;", "&#34;") in markup


def test_records_without_tasks_are_read_and_shown_as_before(tmp_path: Path) -> None:
    before = page(tmp_path, evaluated([]))
    path = tmp_path / "work" / "eval0" / RECORD
    record = json.loads(path.read_text())
    del record["result"]["tasks"], record["result"]["unscored"]
    path.write_text(json.dumps(record))
    assert page_of(path.parent, out=tmp_path / "report.html") == before
    assert figures_of(before) == ["steps"]
    assert "tasks" not in before
    assert "Perplexity" in before


def test_text_and_tasks_may_be_in_different_records(tmp_path: Path) -> None:
    markup = page(tmp_path, evaluate(), evaluated(tasks()), evaluated([], (Unscored("gsm8k", "too long"),)))
    assert figures_of(markup) == ["steps", "tasks", "task-differences"]
    assert "Not scored: gsm8k : too long" in text_of(markup)
    again = page(tmp_path / "again", evaluated(tasks()[:1]), evaluated(tasks()[1:]))
    assert figures_of(again) == ["steps", "tasks", "task-differences", "tasks-2", "task-differences-2"]
    ids = re.findall(r'\bid="([^"]+)"', again)
    assert len(ids) == len(set(ids))


def test_a_parent_alone_and_a_single_item_are_drawn(tmp_path: Path) -> None:
    alone = [replace(t, metrics=[replace(m, scores=m.scores[:1]) for m in t.metrics]) for t in tasks()]
    markup = page(tmp_path, evaluated(alone))
    assert figures_of(markup) == ["steps", "tasks"]
    assert "− parent" not in text_of(markup).split("Benchmark tasks")[1]
    one = TaskScore("student", measured(0.5, n=1), Paired(measured(-0.5, n=1), 1.0, "McNemar"), 0.5)
    parent = TaskScore("parent", measured(1.0, n=1), None, None)
    markup = page(tmp_path / "one", evaluated([task("piqa", [TaskMetric("acc", True, [parent, one])], n=1, total=1)]))
    drawn = rows(figure(markup, "fig-tasks"))["piqa"] + rows(figure(markup, "fig-task-differences"))["piqa"]
    assert "whisker" not in drawn
    assert "inf" not in drawn
    assert 'class="unclear"' in drawn
    assert "student 50.00% no interval −50.00 no interval 1.000 McNemar 50.0%" in text_of(markup)


def test_students_equal_to_their_parent_lie_on_the_zero_line() -> None:
    made = panels([task("arc_easy", [metric("acc", [0.5, 0.5, 0.5], 0.0)])])[0].changes
    assert made.ticks[0] < 0 < made.ticks[-1] < 0.01
    assert made.at(0) == 50


@given(st.lists(st.floats(-1e6, 1e6), max_size=5))
def test_an_axis_has_few_round_ticks_around_zero_and_all_values(values: list[float]) -> None:
    made = axis([*values, math.inf])
    assert 2 <= len(made.ticks) <= 6
    assert 0 in made.ticks
    slack = 1e-6 * (made.ticks[-1] - made.ticks[0])
    assert all(made.ticks[0] - slack <= value <= made.ticks[-1] + slack for value in values)
    assert [made.at(made.ticks[0] - 1), made.at(made.ticks[-1] + 1)] == [0, 100]


def test_signs_are_those_of_what_is_written() -> None:
    percent = scale(metric("acc", [0.5, 0.4, 0.3], 0.1))
    assert [percent.change(v) for v in (-0.00001, 0.0, 0.00001, 0.0123, -0.0123)] == [
        "0.00", "0.00", "0.00", "+1.23", "−1.23",
    ]  # fmt: skip


MEASURE = """
const page = this.contentDocument, wrong = [];
const range = page.createRange();
const box = (node) => { range.selectNodeContents(node); return range.getBoundingClientRect(); };
if (page.documentElement.scrollWidth > WIDTH) wrong.push('wide');
page.querySelectorAll('.row').forEach((row) => {
  const parts = [...row.querySelectorAll('.name, .values, .track > svg, .track > span')].map((node) =>
    node.tagName === 'svg' ? node.getBoundingClientRect() : box(node));
  parts.forEach((a, i) => parts.slice(i + 1).forEach((b) => {
    const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (across > 0.5 && down > 0.5) wrong.push('overlap ' + row.textContent.trim().slice(0, 20));
  }));
  parts.forEach((a) => { if (a.left < 0 || a.right > WIDTH) wrong.push('clipped'); });
});
document.title = 'rows ' + page.querySelectorAll('.row').length + ' wrong ' + wrong.join(', ');
"""


@needs_browser
@pytest.mark.parametrize("width", [360, 700, 1200])
def test_nothing_overlaps_or_is_wider_than_the_screen(tmp_path: Path, width: int) -> None:
    given = tasks()
    names = ["mmlu", "a_task_with_a_name_that_is_long_enough_to_wrap", "arc_challenge"] * 4
    given += [replace(given[2], task=f"{name}_{i}") for i, name in enumerate(names)]
    markup = page(tmp_path, evaluated(given))
    onload = html.escape(MEASURE.replace("WIDTH", str(width)))
    frame = f'<iframe width="{width}" height="3000" onload="{onload}" srcdoc="{html.escape(markup)}"></iframe>'
    (tmp_path / "frame.html").write_text(f'<!doctype html><meta charset="utf-8">{frame}', encoding="utf-8")
    dom, _ = browse(tmp_path / "frame.html", tmp_path / "profile", f"--window-size={width + 50},3100", "--dump-dom")
    found = re.search(r"<title>rows (\d+) wrong (.*?)</title>", dom)
    assert found is not None
    # Two figures of 16 tasks, each with two axes.
    assert (int(found[1]), found[2]) == (36, "")
