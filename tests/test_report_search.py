"""Searches under a budget on the report: their picture, scores, costs, trained blocks; older records as before."""

import html
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_report import browse, figures_of, measured, needs_browser, page_of, sample, search, write
from test_report_tasks import text_of

from ffn_fusion.core.block_records import BldResult, UnitResult
from ffn_fusion.core.comparison import Series, labels, proof, target_words
from ffn_fusion.core.cost import ParameterCounts
from ffn_fusion.core.cost_records import Checked, CostResult
from ffn_fusion.core.cost_table import Communication, CostTable, Measured, ModelFacts, Scenario, SublayerTime, Timing
from ffn_fusion.core.score_grid import grid, row_of
from ffn_fusion.core.search_records import Asked, Candidate, ChangeScore, Goal, ScoreResult, SearchResult, Similarity
from ffn_fusion.folder import RECORD, read_record

PARENT_MS = 8.0
PLANS = ["A0F0 A1F1 -F2+3 A4F4", "A0F0 A1F1 A2F2 -F3+4", "A0F0 -F1+2+3 A4F4", "A0/1F0 A1F1:64 A2F2 A3LF3 A4F4"]


def candidate(plan: str, target: str, kl: float, ms: float, **changes: Any) -> Candidate:
    made = Candidate("MIP 1", target, plan, kl * 1.25, ms, {"decode_ms": ms}, measured(kl), status="optimal")
    return replace(made, **changes)


def taken(plan: str, target: str, kl: float, ms: float, **changes: Any) -> Candidate:
    return candidate(plan, target, kl, ms, best=True, measured_ms=Measured(ms * 1.1, ms, ms * 1.2), **changes)


def budget(*candidates: Candidate) -> SearchResult:
    first = next(c for c in candidates if c.best)
    spread = Measured(8.8, 8.5, 9.0)
    return SearchResult(
        first.plan, first.predicted_kl, measured(0.05), first.kl, True, sample("measure"), [], list(candidates),
        PARENT_MS, spread,
    )  # fmt: skip


def solver() -> SearchResult:
    return budget(
        candidate(PLANS[3], "1.25x", 0.06, 6.2, gap=0.0123, status="time limit"),
        taken(PLANS[0], "1.25x", 0.04, 6.4),
        replace(candidate(PLANS[2], "1.6x", 0.5, 5.1), kl=measured(0.5, n=1)),
        taken(PLANS[1], "1.6x", 0.2, 5.0),
    )


def rival(origin: str, kl: float) -> SearchResult:
    gone = {"origin": origin, "status": "dropped in order", "gap": math.inf}
    return budget(
        taken("A0F0 A1F1 A2F2 A4F4", "1.25x", kl, 6.4, **gone), taken("A0F0 A4F4", "1.6x", 4 * kl, 4.9, **gone)
    )


def put(folder: Path, result: SearchResult, method: str = "mip", **inputs: Any) -> Path:
    write(folder, "search", result)
    record = json.loads((folder / RECORD).read_text())
    record["inputs"] |= {"rule": {"method": method}} | inputs
    (folder / RECORD).write_text(json.dumps(record))
    return folder


def score() -> ScoreResult:
    blocks = [
        (0, 0, "A0/1F0", 0.02), (0, 0, "A0F0:128", 0.05), (0, 0, "A0F0:64", 0.3), (0, 0, "A0", 4.0),
        (0, 1, "A0F0+1", 0.7), (1, 1, "A1LF1", 0.03), (1, 1, "-F1", 0.04), (1, 1, "A1F1L", 0.2), (1, 1, "", 1.5),
        (1, 1, "A1/2F1", 0.0),
    ]  # fmt: skip
    scores = [ChangeScore(first, last, block, measured(kl), measured(kl / 2)) for first, last, block, kl in blocks]
    alike = Similarity([0.1, 0.2], [0.1, 0.2], [0.1, 0.2])
    return ScoreResult("the/parent", 2, sample("measure"), sample("fit"), scores, alike)


def timing(prefill: float, decode: float) -> Timing:
    return Timing(*(Measured(ms, ms * 0.9, ms * 1.1) for ms in (prefill, decode)))


def cost(tensor_parallel: int = 1, depth: int = 2) -> CostResult:
    counts = ParameterCounts(*(1 for _ in ParameterCounts.__dataclass_fields__))
    facts = ModelFacts("llama", 64, 4, 16, 512, None, 4, 256, counts)
    rows = [
        SublayerTime("ffn", 256, 2, timing(0.8, 0.2)), SublayerTime("ffn", 64, 2, timing(0.4, 0.1)),
        SublayerTime("attention", 4, 2, timing(1.0, 0.3456)), SublayerTime("linear", 0, 2, timing(0.1, 0.01)),
    ]  # fmt: skip
    table = CostTable(
        "a device", "bf16", 2, "9.8.7", "CUDA graphs", Scenario(4, 128, 64), tensor_parallel, facts, 2,
        timing(12.5, 1.75), rows, Communication(timing(0.07, 0.007), timing(0.09, 0.009)),
    )  # fmt: skip
    check = [Checked("FFNs fused by 3", "A0F0 -F1", timing(10.0, 2.0), 10.5, 1.9, 0.05, -0.05)]
    return CostResult("the/parent", table, depth, 20, check, 0.05, -0.05, "no graph of the prefill")


def bld(units: int = 2) -> BldResult:
    fitted = UnitResult("-F2+3", "blocks/0.safetensors", "fitted", 0.5, 0.25, None, 0, 1.5)
    trained = UnitResult("A1/1F1", "blocks/1.safetensors", "trained", 0.4, None, 0.3, 14_336, 11.8)
    return BldResult("the/parent", "key", "folded", [fitted, trained] * (units // 2), sample("bld"))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A search by the solver, two rivals, and all that it went by."""
    put(tmp_path / "work" / "solver", solver())
    put(tmp_path / "work" / "random", rival("random", 0.9), "random")
    put(tmp_path / "work" / "shortgpt", rival("shortgpt", 0.3), "shortgpt")
    for stage, result in {"score": score(), "cost": cost(), "bld": bld()}.items():
        write(tmp_path / "work" / stage, stage, result)
    return tmp_path / "work"


def section(markup: str, title: str) -> str:
    return markup.split(f"<h2>{title}</h2>")[1].split("<h2>")[0]


def rows_of(markup: str) -> list[str]:
    return [text_of(row).strip() for row in re.findall("<tr>.*?</tr>", markup, flags=re.DOTALL)]


def test_every_search_is_a_series_and_every_taken_plan_a_row(work: Path, tmp_path: Path) -> None:
    markup = page_of(work, out=tmp_path / "report.html")
    assert figures_of(markup) == ["plan", "steps", "pareto", "predictions", "changes"]
    shown = section(markup, "Search under a budget")
    pareto, predictions = re.findall(r'<figure id="fig-(?:pareto|predictions).*?</figure>', shown, flags=re.DOTALL)
    for words in ("parent", "solver (MIP)", "random", "ShortGPT", "1.25×", "1.6×", "times as fast as the parent"):
        assert f">{words}</text>" in pareto, words
    assert "n = 8 windows of 128 tokens (builtin:wikipedia, measure), seed 7, fp32, test device, 2030-01-02" in shown
    assert text_of(pareto).count("n = 8 windows") == 1
    error = (
        "solver (MIP) 25.0% (4 plans), random 25.0% (2 plans), ShortGPT 25.0% (2 plans). Of the decode step: 9.1% (6"
    )
    assert error in text_of(predictions)
    rows = rows_of(shown.split("<details><summary>All plans")[0])
    first = "0.04000 0.03200 to 0.04800 0.05000 7.040 6.400 to 7.680 6.400 1.25× measured 1.25× optimal plan"
    assert rows[1] == f"1.25× solver (MIP) {first} {PLANS[0]}"
    assert [row.split(" 0.")[0] for row in rows[2:5]] == ["ShortGPT", "random", "1.6× solver (MIP)"]
    assert "measured 1.25× – plan A0F0 A1F1 A2F2 A4F4" in rows[2]
    everything = rows_of(shown.split("<details><summary>All plans")[1])
    assert len(everything) == 1 + 8
    assert everything[1].startswith("1.25× solver (MIP) MIP 1, taken 0.04000")
    assert "– 6.200 1.29× time limit, gap 1.23% plan" in everything[2]
    assert "0.5000 – 0.6250 – 5.100" in everything[6]


def test_the_student_is_the_solvers_though_rivals_came_later(work: Path, tmp_path: Path) -> None:
    markup = page_of(work, out=tmp_path / "report.html")
    assert len(re.findall('<figure id="fig-plan', markup)) == 1
    assert f"<code>{PLANS[0]}</code>" in section(markup, "The plan")
    quality = text_of(section(markup, "Quality"))
    assert "nothing fused or fitted" in quality
    assert "attention removed" not in quality
    assert "<h2>Search</h2>" not in markup
    alone = page_of(work / "random", out=tmp_path / "alone.html")
    assert "<code>A0F0 A1F1 A2F2 A4F4</code>" in section(alone, "The plan")


def test_a_search_by_a_task_shows_what_it_went_by(work: Path, tmp_path: Path) -> None:
    plain = section(page_of(work, out=tmp_path / "plain.html"), "Search under a budget")
    goals = [Goal(0.5, measured(0.25), measured(-0.125)), Goal(0.3, measured(0.5), None)]
    plans = [replace(made, goal=goal) for made, goal in zip(solver().front, goals, strict=True)]
    put(work / "by-task", replace(budget(*plans), objective="task"), objective="task")
    markup = page_of(work, out=tmp_path / "report.html")
    shown = section(markup, "Search under a budget")
    predictions = re.findall(r'<figure id="fig-predictions.*?</figure>', shown, flags=re.DOTALL)[0]
    assert ">rise, loss of answers</text>" in predictions
    assert "Of the rise, solver (MIP) by loss of answers, by-task: 70.0%." in text_of(predictions)
    rows = rows_of(shown)
    assert "measured rise predicted rise" in rows[0]
    (row,) = [row for row in rows if "by-task" in row and PLANS[0] in row and "taken" not in row]
    assert "0.2500 0.2000 to 0.3000 right answers −12.5% 0.5000" in row
    (random,) = [row for row in rows if row.startswith("random") and "1.25×" in row and "taken" not in row]
    assert "1.125 – – " in random
    assert "measured rise" not in plain
    assert "rise" not in text_of(plain)


def test_questions_stand_beside_the_scores(tmp_path: Path) -> None:
    result = score()
    scores = [replace(s, task=measured(0.5), accuracy=measured(-0.25)) for s in result.scores]
    asked = Asked(["arc_easy", "piqa"], 1200, "a set", measured(1.25), measured(0.5))
    write(tmp_path / "score", "score", replace(result, scores=scores, asked=asked))
    shown = text_of(section(page_of(tmp_path / "score", out=tmp_path / "r.html"), "What each change costs alone"))
    assert "Also asked: 1,200 questions of arc_easy, piqa (a set), of which the parent answers 50.0% rightly" in shown
    assert "attention, 1 kv head 0 0.02000 0.01600 to 0.02400 0.01000 0.5000 0.4000 to 0.6000 −25.0% A0/1F0" in shown
    assert read_record(tmp_path / "score", ScoreResult).result.asked == asked


def test_what_cannot_be_compared_is_apart(work: Path, tmp_path: Path) -> None:
    put(work / "again", solver())
    put(work / "other", solver(), model="another parent")
    put(work / "untimed", replace(solver(), parent_ms=None, parent_measured_ms=None))
    markup = page_of(work, out=tmp_path / "report.html")
    assert [name for name in figures_of(markup) if "pareto" in name] == ["pareto", "pareto-2", "pareto-3"]
    shown = section(markup, "Search under a budget")
    assert re.findall("<h3>(.*?)</h3>", shown) == ["again, random, shortgpt, solver", "other", "untimed"]
    assert "solver (MIP), again" in shown
    untimed = shown.split("<h3>untimed</h3>")[1]
    assert "times as fast" not in untimed
    assert ">parent</text>" not in untimed


def test_a_search_without_candidates_is_shown_as_before(tmp_path: Path) -> None:
    before = page_of(write(tmp_path / "search", "search", search()), out=tmp_path / "report.html")
    record = json.loads((tmp_path / "search" / RECORD).read_text())
    for name in ("candidates", "parent_ms", "parent_measured_ms", "note"):
        del record["result"][name]
    (tmp_path / "search" / RECORD).write_text(json.dumps(record))
    assert page_of(tmp_path / "search", out=tmp_path / "report.html") == before
    assert figures_of(before) == ["plan", "steps"]
    assert "2 steps tried, 1 kept" in text_of(section(before, "Search"))
    assert "under a budget" not in before
    put(tmp_path / "work" / "budget", solver())
    both = page_of(tmp_path / "search", tmp_path / "work", out=tmp_path / "report.html")
    assert "plan-2" in figures_of(both)
    assert "pareto" in figures_of(both)
    assert text_of(section(both, "Search")) == text_of(section(before, "Search"))


def test_one_plan_alone_is_drawn(tmp_path: Path) -> None:
    one = budget(candidate(PLANS[0], "decode_ms <= 6.5, memory_bytes <= 1e+09", 0.0, 6.4, best=True))
    markup = page_of(put(tmp_path / "one", replace(one, parent_ms=None)), out=tmp_path / "report.html")
    shown = section(markup, "Search under a budget")
    assert "decode ≤ 6.5 ms, memory ≤ 1,000,000,000 bytes" in text_of(shown)
    assert figures_of(shown) == ["pareto"]


def test_budgets_and_proofs_in_words() -> None:
    assert [target_words(t) for t in ("1.5x", "decode_ms <= 2.11784", "kv_bytes <= 23,040, sublayers <= 40")] == [
        "1.5×", "decode ≤ 2.118 ms", "kv cache ≤ 23,040 bytes a token, ≤ 40 sublayers",
    ]  # fmt: skip
    made = taken(PLANS[0], "1.5x", 0.1, 5.0)
    cases = [("optimal", 0.0), ("time limit", 0.05), ("time limit", math.inf), ("greedy", math.inf)]
    assert [proof(replace(made, status=status, gap=gap)) for status, gap in cases] == [
        "optimal", "time limit, gap 5.00%", "time limit, no bound", "",
    ]  # fmt: skip


def test_a_plan_taken_for_two_budgets_is_one_point_with_both_names() -> None:
    twice = Series("solver", [candidate(PLANS[0], "2x", 0.1, 4.0), taken(PLANS[0], "1.5x", 0.1, 4.0)])
    again = Series("solver", [*twice.candidates, taken(PLANS[0], "2x", 0.1, 4.0)])
    assert (twice.front, twice.others) == ([twice.candidates[1]], [])
    worse = Series("rival", [taken(PLANS[1], "2x", 0.3, 4.0)])
    assert [(c.plan, words) for c, words in labels([again, worse])] == [(PLANS[0], "1.5×, 2×")]
    assert len(again.plans) == len(again.front) == 1


def test_scores_are_a_grid_of_changes_and_layers(work: Path, tmp_path: Path) -> None:
    result = score()
    rows = {name: [kl and kl.mean for kl in row] for name, row in grid(result.scores, result.num_layers)}
    assert rows == {
        "attention, 2 kv heads": [None, 0.0],
        "attention, 1 kv head": [0.02, None],
        "attention linear": [None, 0.03],
        "attention removed": [None, 0.04],
        "FFN, 128 channels": [0.05, None],
        "FFN, 64 channels": [0.3, None],
        "FFN linear": [None, 0.2],
        "FFN removed": [4.0, None],
        "layer dropped": [None, 1.5],
        "FFN fused with the next": [0.7, None],
    }
    assert next(iter(rows)) == row_of(result.scores[-1]).name == "attention, 2 kv heads"
    shown = section(page_of(work, out=tmp_path / "report.html"), "What each change costs alone")
    assert all(f">{name}</text>" in shown for name in rows)
    text = text_of(shown)
    assert "10 changes, each fitted on 8 other windows of 128 tokens; measured on 1,024 tokens." in text
    assert "attention, 1 kv head 0 0.02000 0.01600 to 0.02400 0.01000 A0/1F0" in text


def test_costs_are_microseconds_beside_their_check(work: Path, tmp_path: Path) -> None:
    shown = section(page_of(work, out=tmp_path / "report.html"), "What each sublayer takes")
    text = text_of(shown)
    for words in (
        "attention, 4 kv heads 1,000 900.0 to 1,100 345.6 311.0 to 380.2 FFN, 64 channels 400.0",
        "offset: all but the blocks 12,500",
        "Batch 4, prompt of 128 tokens, decoding at 160 tokens (CUDA graphs).",
        "n = 20 repeats; small print: 90% intervals; lines: share of the longest in the column.",
        "share of the longest in the column. seed 7, fp32, test device, 2030-01-02",
        "FFNs fused by 3 10.50 10.00 9.000 to 11.00 +5.0% 1.900 2.000 1.800 to 2.200 −5.0%",
        "no graph of the prefill",
    ):
        assert words in text, words
    assert re.findall(r"--share: ([\d.]+%)", shown)[:4] == ["100.0%", "100.0%", "40.0%", "28.9%"]
    assert "all-reduce" not in text
    write(tmp_path / "ranks" / "cost", "cost", cost(tensor_parallel=2, depth=1))
    text = text_of(page_of(tmp_path / "ranks", out=tmp_path / "report.html"))
    for words in (
        "all-reduce over 2 70.00",
        "one rank's slice of 2",
        "Whole models had 1 of 2 layers",
        "of the/parent",
    ):
        assert words in text, words


def test_trained_blocks_are_a_table(work: Path, tmp_path: Path) -> None:
    shown = section(page_of(work, out=tmp_path / "report.html"), "Trained blocks")
    assert "-F2+3 0.5000 0.2500 – −50.0% 0 1.5 A1/1F1 0.4000 – 0.3000 −25.0% 14,336 11.8" in text_of(shown)
    assert re.findall("<b>(.*?)</b>", shown) == ["0.2500", "0.3000"]
    assert "<details open>" in shown
    write(tmp_path / "many" / "bld", "bld", bld(20))
    assert "<details>" in section(page_of(tmp_path / "many", out=tmp_path / "report.html"), "Trained blocks")


@pytest.mark.parametrize(
    ("stage", "titles"),
    [
        ("solver", ["The plan", "Quality", "Search under a budget"]),
        ("score", ["What each change costs alone"]),
        ("cost", ["What each sublayer takes"]),
        ("bld", ["Trained blocks"]),
    ],
)
def test_sections_are_there_only_with_their_records(work: Path, tmp_path: Path, stage: str, titles: list[str]) -> None:
    markup = page_of(work / stage, out=tmp_path / "report.html")
    assert re.findall("<h2>(.*?)</h2>", markup) == [*titles, "Environment"]
    assert "Undefined" not in markup
    ids = re.findall(r'\bid="([^"]+)"', markup)
    assert len(ids) == len(set(ids))


def test_records_are_read_back_as_they_were_written(work: Path) -> None:
    assert read_record(work / "shortgpt", SearchResult).result == rival("shortgpt", 0.3)
    assert read_record(work / "cost", CostResult).result == cost()


@needs_browser
@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_screen(work: Path, tmp_path: Path, width: int) -> None:
    markup = page_of(work, out=tmp_path / "report.html")
    measure = "document.title = 'width ' + this.contentDocument.documentElement.scrollWidth"
    frame = f'<iframe width="{width}" height="3000" onload="{measure}" srcdoc="{html.escape(markup)}"></iframe>'
    (tmp_path / "frame.html").write_text(f'<!doctype html><meta charset="utf-8">{frame}', encoding="utf-8")
    dom, log = browse(tmp_path / "frame.html", tmp_path / "profile", f"--window-size={width + 50},3100", "--dump-dom")
    found = re.search(r"<title>width (\d+)</title>", dom)
    assert found is not None
    assert 0 < int(found[1]) <= width
    assert [line for line in log.splitlines() if "CONSOLE" in line or "Uncaught" in line] == []
