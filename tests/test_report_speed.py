"""The page's section on speed: benches in steps, FFNs alone, the latency model."""

from pathlib import Path
from typing import Any

import pytest

from ffn_fusion.core.bench_records import BenchModel, BenchResult, BenchRow, Failure, Ratio, Spread
from ffn_fusion.core.ffn_records import PLAIN, FfnResult, ffn_rows
from ffn_fusion.core.latency import Costs, Fitted, LatencyResult, Work, predict
from ffn_fusion.folder import Environment, run_stage
from ffn_fusion.page.figures_speed import waterfall
from ffn_fusion.stages.report import report

STEPS = {"parent": 8.0, "searched": 7.0, "fused": 6.5}
COSTS = Costs(0.24, 0.004, 0.012, 1.2)


def bench() -> BenchResult:
    models = [BenchModel(f"8b, {s}", 8_030_000_000, 131_072, 32, 32, 64, s, "", 16, 131_072.0, 987_654) for s in STEPS]
    rows = [
        BenchRow(
            model=f"8b, {step}",
            batch_size=batch,
            prefill_ms=Spread(50, 49, 51),
            decode_ms=Spread(ms + batch, ms + batch, (ms + batch) * (1.2 if step == "fused" and batch == 8 else 1)),
            bandwidth_share=0.81,
            prefill_speedup=None,
            decode_speedup=(8 + batch) / (ms + batch),
            prompt_length=prompt,
            ratio=Ratio(1.234, 1.2, 1.3) if step != "parent" else None,
            fusion=Ratio(1.0567, 1.05, 1.06) if step == "fused" else None,
            all_reduces=64,
            kernels=321,
            joules=0.5,
        )
        for prompt in (128, 1024)
        for batch in (1, 8)
        for step, ms in STEPS.items()
    ]
    failures = [Failure("8b, parent", "does not fit: needs 812.0 GB", 64, 128)]
    return BenchResult(
        models, rows, 128, 16, 5, 4300.0, "CUDA graph", "torch", "2.11", 2, dtype="bfloat16", failures=failures
    )


def ffns() -> FfnResult:
    rows = ffn_rows(32, {(PLAIN, False): [3.0, 3.0], (PLAIN, True): [2.0, 2.0]}, least_ms=1.5)
    return FfnResult(16384, 6656, 12, 12, 2, 2, 4300.0, "CUDA graph", rows)


def fitted() -> LatencyResult:
    points = [Fitted("a", 5.0, 5.1, 5.2), Fitted("b", 3.0, 3.0, 2.9)]
    predictions = [predict("Ultra-253B, 8 x H100", Work(31.1, 146, 145, 0), COSTS, 0.7, 70.92)]
    return LatencyResult("torch H200 bfloat16", COSTS, points, 0.037, 0.04, predictions, [])


@pytest.fixture
def page(tmp_path: Path) -> str:
    made: dict[str, Any] = {"bench": bench(), "ffn": ffns(), "latency": fitted()}
    where = Environment("2026-11-22T10:00:00", "H200", "bfloat16", "", {})
    for stage, result in made.items():
        run_stage(stage, tmp_path / stage, {}, type(result), lambda _, result=result: (result, where))
    return report(tmp_path, out=tmp_path / "page.html").read_text()


def test_the_page_shows_every_figure_of_a_bench(page: str) -> None:
    wanted = ["1.23×", "1.06×", "1.20 to 1.30", "81%", "321", "busy device", "needs 812.0 GB", "131,072", "987,654"]
    wanted += ["tensor parallel over 2", 'id="fig-waterfall"', 'id="fig-waterfall-prompt-1024"', 'id="fig-roofline"']
    # Cost of a token: two devices, 9 ms, one sequence.
    wanted += ["18.00"]
    assert [text for text in wanted if text not in page] == []


def test_the_page_shows_ffns_alone_and_predictions(page: str) -> None:
    wanted = ["in sequence", "75%", "1.50×", "16,384 × 6,656", "3.7%", "70.92", "predicted, not measured"]
    assert [text for text in wanted if text not in page] == []


def test_a_waterfall_says_what_each_step_takes_off() -> None:
    result = bench()
    drawn = waterfall("name", result, result.rows[:6])
    # Searched takes 1 of 9 ms off, fusing another half.
    assert [text for text in ("9 ms", "−11.1", "−5.6", "batch 8") if text not in drawn] == []
    assert waterfall("name", result, result.rows[:1]) == ""
