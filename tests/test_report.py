"""The report: what it shows is what the records say, it needs no network, and a browser draws it."""

import html
import json
import math
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from ffn_fusion.core.bench_records import BenchModel, BenchResult, BenchRow, Spread
from ffn_fusion.core.plan import Plan
from ffn_fusion.core.records import (
    AnalyzeResult,
    CutSummary,
    EvalResult,
    FitSummary,
    FuseResult,
    Geometry,
    MassiveActivation,
    ModelScore,
    Sample,
)
from ffn_fusion.core.search_records import SearchResult, SearchStep
from ffn_fusion.core.stats import Estimate
from ffn_fusion.errors import UserError
from ffn_fusion.folder import RECORD, Environment, Record
from ffn_fusion.page.figures import Cell, columns, strip
from ffn_fusion.stages.report import report

PLAN = "A0F0 A1F1 -F2+3+4 A5F5"
FIGURES = ["plan", "steps", "speed", "scores", "geometry", "dependency", "ffn-dependency"]
WHERE = Environment("2030-01-02T03:04:05+00:00", "test device", "fp32", "TestOS, Python 3", {"torch": "9.8.7"})
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH")


def measured(mean: float, n: int = 8) -> Estimate:
    if n < 2:
        return Estimate(mean, math.inf, -math.inf, math.inf, n)
    return Estimate(mean, mean / 10, mean * 0.8, mean * 1.2, n)


def sample(part: str) -> Sample:
    return Sample(["builtin:wikipedia"], part, 8, 128, 7, "0" * 16)


def matrix(size: int) -> list[list[float]]:
    return [[0.0 if j < i else 1.0 if j == i else 0.3 / (1 + j - i) ** 3 for j in range(size)] for i in range(size)]


def analyze() -> AnalyzeResult:
    return AnalyzeResult(
        model="parent",
        num_layers=6,
        sample=sample("analysis"),
        attention=[measured(kl) for kl in (4.0, 0.3, 0.02, 0.015, 0.01, 0.0)],
        ffn=[measured(9.0), None, measured(0.5, n=1), measured(0.4), measured(0.6), measured(2.0)],
        block_dependency=matrix(6),
        sublayer_dependency=matrix(12),
        geometry=Geometry(
            [0.9, 0.1, 0.1, 0.2, 0.2, 0.5], [30.0, 0.3, 0.2, 0.2, 0.3, 0.6], [0.1, 0, -0.1, 0, 0.1, -0.3]
        ),
        massive=[MassiveActivation(layer, 0, 41, 1234.0 + layer, 11.0) for layer in (1, 2, 2, 3)],
    )


def search() -> SearchResult:
    steps = [SearchStep("remove attention 4", measured(0.01), True), SearchStep("remove <A1>", measured(0.7), False)]
    return SearchResult(PLAN, 0.0451, measured(0.0612), measured(0.0534), True, sample("search"), steps)


def fuse() -> FuseResult:
    fits = [FitSummary("-F2+3+4", 0.875, 0.4375, [0.1, None])]
    return FuseResult(
        "parent", PLAN, "nemotron-nas", "folded", "parent", 987_654, 1_234_567, ["layers.2.q"], fits, sample("fit")
    )


def evaluate(student: str = "student") -> EvalResult:
    parent = ModelScore("parent", measured(3.0), 20.09, 0.9123, None, None, None)
    other = ModelScore(student, measured(3.1), 22.2, 0.9456, measured(0.0789), measured(0.813), measured(0.1))
    return EvalResult(sample("test"), [parent, other])


def bench() -> BenchResult:
    rows = [
        BenchRow(name, batch, Spread(50, 49, 52), Spread(ms, ms - 0.1, ms + 0.2), 0.61, 1.2, speedup)
        for batch in (1, 8)
        for name, ms, speedup in (("parent", 7.25 + batch, 1.0), ("student", 5.5 + batch, 1.37 + batch / 100))
    ]
    models = [BenchModel("parent", 1_234_567, 768, 6, 6, 12), BenchModel("student", 987_654, 384, 4, 3, 7)]
    return BenchResult(models, rows, 64, 32, 5, 812.5)


def write(folder: Path, stage: str, result: Any) -> Path:
    folder.mkdir(parents=True)
    record = Record(stage, {"model": "parent", "seed": 7}, WHERE, 12.34, result)
    (folder / RECORD).write_text(json.dumps(asdict(record)), encoding="utf-8")
    return folder


@pytest.fixture
def stages(tmp_path: Path) -> Path:
    made = {"analyze": analyze(), "search": search(), "fuse": fuse(), "eval": evaluate(), "bench": bench()}
    for stage, result in made.items():
        write(tmp_path / "work" / stage, stage, result)
    return tmp_path / "work"


def figures_of(page: str) -> list[str]:
    return re.findall(r'<figure id="fig-([^"]+)"', page)


def page_of(*folders: Path, out: Path) -> str:
    assert report(*folders, out=out) == out
    return out.read_text(encoding="utf-8")


def test_every_figure_and_number_is_there(stages: Path, tmp_path: Path) -> None:
    page = page_of(stages, out=tmp_path / "report.html")
    assert sorted(figures_of(page)) == sorted(FIGURES)
    text = html.unescape(re.sub(r"<[^>]*>", " ", page))
    for shown in (
        "0.079", "81.3%", "20.09 → 22.20", "1.38×", "11 → 7", "1,234,567 → 987,654",  # headlines
        "0.07890", "0.06312 to 0.09468", "0.9456", "0.08000 to 0.1200",  # scores
        "8.25", "6.5", "8.150 to 8.450", "61%", "812.5 GB/s",  # speed
        "0.0451", "0.0612", "0.0534", "remove <A1>", "2 steps tried, 1 kept",  # search
        "0.875", "0.4375", "−50.0%", "0.1, –", "987,654 of 1,234,567",  # calibration
        "after layers 1-3; the longest is 1,237", "channel 41", "removes (2-4)",  # analysis
        "n = 8 windows of 128 tokens", "seed 7, fp32, test device, 2030-01-02", "torch 9.8.7", "12.3",
    ):  # fmt: skip
        assert shown in text, shown


def test_page_needs_no_network(stages: Path, tmp_path: Path) -> None:
    page = page_of(stages, out=tmp_path / "report.html")
    assert not re.findall(r"""(?:src|href|url|action|data)\s*[=(]\s*["']?\s*(?:https?:)?//""", page)
    assert "<script" not in page
    assert "@import" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    named = set(re.findall(r'url\(#([^)"]+)\)|href="#([^"]+)"', page))
    assert {a or b for a, b in named} <= set(ids)


@pytest.mark.parametrize(
    ("stage", "figures"),
    [
        ("analyze", ["scores", "geometry", "dependency", "ffn-dependency"]),
        ("search", ["plan", "steps"]),
        ("fuse", ["plan"]),
        ("eval", ["steps"]),
        ("bench", ["speed"]),
    ],
)
def test_only_sections_of_records_that_exist(stages: Path, tmp_path: Path, stage: str, figures: list[str]) -> None:
    page = page_of(stages / stage, out=tmp_path / "report.html")
    assert figures_of(page) == figures
    assert "Undefined" not in page


def test_each_of_several_records_is_shown_once(stages: Path, tmp_path: Path) -> None:
    write(stages / "eval2", "eval", evaluate("another student"))
    write(stages / "bench2", "bench", bench())
    write(
        stages / "fuse2", "fuse", FuseResult("parent", "A0F0 A1F1 A2F2 A3F3 A4F4 -F5", "", "", "", 1, 1, [], [], None)
    )
    write(stages / ".half.partial", "bench", bench())
    page = page_of(stages, stages / "eval", out=tmp_path / "report.html")
    extra = ["plan-2", "speed-2"]
    assert sorted(figures_of(page)) == sorted(FIGURES + extra)
    assert "another student" in page
    assert len(re.findall("<summary>Inputs of eval", page)) == 2


def test_unknown_stages_are_ignored_and_nothing_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "work" / "other", "another", {"anything": 1})
    with pytest.raises(UserError, match=r"no record\.json of .* found in"):
        report(tmp_path / "work", out=tmp_path / "report.html")
    with pytest.raises(UserError, match="is no folder"):
        report(tmp_path / "absent", out=tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_out_is_replaced_only_if_it_is_a_page(stages: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.html"
    first = page_of(stages, out=out)
    assert page_of(stages, out=out) == first
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    with pytest.raises(UserError, match=r"ends in \.html"):
        report(stages, out=stages / "fuse" / RECORD)


def test_broken_record_is_named(stages: Path, tmp_path: Path) -> None:
    (stages / "eval" / RECORD).write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"eval.record\.json is no record"):
        report(stages, out=tmp_path / "report.html")


STRIPS = [
    "A0F0 A1F1 -F2+3+4 A5F5",
    "A0F0 A1F1 -F3 A5F4+5",
    "A0F0 A3F3 -F1+2 A5F5",
    "A0F0 A1 A2F2+3 A5",
    "A0F0 A3 A1F1+2 A5 -F4",
    "A0 A1 A2 A3 A4 A5F5",
    "A0/1F0:64 A1F1 -F2:32+3+4:8 A5/2F5",
]


@pytest.mark.parametrize("text", STRIPS)
def test_strip_covers_every_place_once(text: str) -> None:
    cells = strip(Plan.parse(text), 6)
    places = [(cell.row, column) for cell in cells for column in range(cell.column, cell.column + cell.span)]
    assert sorted(places) == [(row, column) for row in (1, 2) for column in range(1, 7)]
    kept = {cell.label for cell in cells if cell.kind != "removed"}
    assert {"+".join(map(str, group)) for group in Plan.parse(text).groups} <= kept
    attentions = [cell.label for cell in cells if cell.row == 1 and cell.kind == "kept"]
    assert attentions == list(map(str, Plan.parse(text).attention_layers))


def test_an_attention_without_ffn_is_one_cell_at_its_layer_and_nothing_below() -> None:
    cells = strip(Plan.parse("A0F0 A1 A2F2+3"), 4)
    assert Cell(1, 2, 1, "1", "kept") in cells
    assert [cell for cell in cells if cell.row == 2] == [
        Cell(2, 1, 1, "0", "kept"),
        Cell(2, 3, 2, "2+3", "fused"),
        Cell(2, 2, 1, "", "removed"),
    ]


def test_cells_of_smaller_sublayers_say_their_sizes() -> None:
    cells = strip(Plan.parse("A0/1F0 A1F1:64 -F2:32+3"), 4)
    assert {cell.label: cell.sizes for cell in cells if cell.sizes} == {"0": "A0/1", "1": "F1:64", "2+3": "F2:32+3"}


def test_the_page_shows_what_was_made_smaller(stages: Path, tmp_path: Path) -> None:
    record = json.loads((stages / "fuse" / RECORD).read_text())
    record["result"] |= {"plan": "A0F0 A1/1F1 -F2:64+3+4 A5F5", "cuts": [asdict(CutSummary(2, 64, 1536, 0.25))]}
    (stages / "fuse" / RECORD).write_text(json.dumps(record))
    page = page_of(stages, out=tmp_path / "report.html")
    assert 'smaller" title="F2:64+3+4"' in page
    assert "F2: 64 of 1,536 channels, 25.0% of the contribution" in page
    assert "low: with fewer channels or kv heads" in page


def test_a_plan_out_of_order_is_as_long_as_its_blocks_those_without_ffn_included(tmp_path: Path) -> None:
    plan = Plan.parse("A0F1 A2 A1F0 A3 A4F2+3")
    assert columns(plan, 5) == 6
    cells = strip(plan, 5)
    assert [(cell.row, cell.column, cell.label) for cell in cells if cell.row == 1] == [
        *((1, 1, "0"), (1, 2, "2"), (1, 3, "1"), (1, 4, "3"), (1, 5, "4"), (1, 6, "")),
    ]
    assert {(cell.column, cell.label) for cell in cells if cell.row == 2 and cell.kind == "removed"} == {
        (2, ""),
        (4, ""),
    }
    page = page_of(write(tmp_path / "s", "search", replace(search(), plan=str(plan))), out=tmp_path / "report.html")
    assert "--columns: 6" in page
    assert "5 blocks" in re.sub(r"\s+", " ", page)


def test_a_plan_with_an_attention_alone_has_a_page(stages: Path, tmp_path: Path) -> None:
    write(stages / "search2", "search", replace(search(), plan="A0F0 A1 A2F2+3"))
    page = page_of(stages, out=tmp_path / "report.html")
    assert "plan-2" in figures_of(page)
    assert "<code>A0F0 A1 A2F2+3</code>" in page


def browse(page: Path, profile: Path, *options: str) -> tuple[str, str]:
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command = [CHROMIUM, *flags, f"--user-data-dir={profile}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


@needs_browser
def test_browser_draws_the_page_without_an_error(stages: Path, tmp_path: Path) -> None:
    out = report(stages, out=tmp_path / "report.html")
    dom, log = browse(out, tmp_path / "profile", "--dump-dom")
    assert sorted(figures_of(dom)) == sorted(FIGURES)
    assert [line for line in log.splitlines() if "CONSOLE" in line or "Uncaught" in line] == []


@needs_browser
@pytest.mark.parametrize("width", [390, 1200])
def test_page_is_not_wider_than_the_screen(stages: Path, tmp_path: Path, width: int) -> None:
    page = page_of(stages, out=tmp_path / "report.html")
    measure = "document.title = 'width ' + this.contentDocument.documentElement.scrollWidth"
    frame = f'<iframe width="{width}" height="3000" onload="{measure}" srcdoc="{html.escape(page)}"></iframe>'
    (tmp_path / "frame.html").write_text(f'<!doctype html><meta charset="utf-8">{frame}', encoding="utf-8")
    shot = tmp_path / "page.png"
    dom, _ = browse(tmp_path / "frame.html", tmp_path / "profile", f"--window-size={width + 50},3100", "--dump-dom")
    found = re.search(r"<title>width (\d+)</title>", dom)
    assert found is not None
    assert 0 < int(found[1]) <= width
    browse(out := tmp_path / "report.html", tmp_path / "profile", f"--window-size={width},3000", f"--screenshot={shot}")
    assert out.is_file()
    assert shot.read_bytes().startswith(b"\x89PNG")
