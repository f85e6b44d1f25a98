"""The latency model: it finds the costs that times were made of, and predicts what it has not seen."""

from pathlib import Path

import pytest
from reference import one_line

from ffn_fusion.core.bench_records import BenchModel, BenchResult, BenchRow, Spread
from ffn_fusion.core.latency import PAPER, Costs, LatencyResult, Point, Work, check, fit, predict
from ffn_fusion.folder import Environment, read_record, run_stage
from ffn_fusion.stages.latency import latency

COSTS = Costs(per_gigabyte=0.25, per_launch=0.01, per_sync=0.02, per_teraflop=1.5)
WORKS = [
    Work(size / ranks, layers, layers * (ranks > 1), size * batch / 1e3)
    for size, layers in ((16.0, 65), (15.0, 53), (15.0, 44), (100.0, 161))
    for ranks in (1, 2)
    for batch in (1, 64)
]


def test_the_fit_finds_the_costs_that_times_were_made_of() -> None:
    points = [Point(str(work), work, COSTS.ms(work)) for work in WORKS]
    found = fit(points)
    assert vars(found) == pytest.approx(vars(COSTS), rel=1e-6)
    assert max(abs(point.error) for point in check(points)) < 1e-6


def test_no_cost_is_negative_and_an_odd_row_is_told_by_leaving_it_out() -> None:
    points = [Point(str(work), work, COSTS.ms(work)) for work in WORKS]
    odd = Point("odd", WORKS[0], 2 * COSTS.ms(WORKS[0]))
    fitted = check([*points, odd])
    assert min(vars(fit([*points, odd])).values()) >= 0
    assert max(fitted, key=lambda point: abs(point.error)).name == "odd"
    assert fitted[-1].error == pytest.approx(-0.5, abs=0.05)


def test_a_prediction_scales_bytes_alone_with_the_bandwidth() -> None:
    work = Work(10.0, 100, 99, 0.0)
    slow = predict("slow", work, COSTS, bandwidth=0.5, published=100.0)
    assert slow.ms == pytest.approx(2 * 2.5 + 1.0 + 1.98)
    # 10 ms published, 5 of them for bytes, over 99 sublayers.
    assert slow.implied_us == pytest.approx(1e3 * 5 / 99)


def written(folder: Path, ranks: int, busy: bool = False, device: str = "H200") -> Path:
    """A bench whose times are made of `COSTS`."""
    rows, models = [], []
    for size, layers in ((16.0, 64), (15.0, 43)):
        models.append(BenchModel(f"of {layers}", 1, 1, 1, 1, layers))
        for batch in (1, 64):
            work = Work(size / ranks, layers + 1, layers * (ranks > 1), size * batch / 1e3)
            ms = COSTS.ms(work)
            rows.append(
                BenchRow(
                    model=f"of {layers}",
                    batch_size=batch,
                    prefill_ms=Spread(1, 1, 1),
                    decode_ms=Spread(ms, ms, ms * (2 if busy else 1)),
                    bandwidth_share=1.0,
                    prefill_speedup=1.0,
                    decode_speedup=1.0,
                    prompt_length=128,
                    step_bytes=round(work.gigabytes * 1e9),
                    step_flops=work.teraflops * 1e12,
                    all_reduces=work.syncs,
                )
            )
    result = BenchResult(models, rows, 128, 16, 5, 4300.0, engine="torch", tensor_parallel=ranks, dtype="bfloat16")
    where = Environment("2026-11-22", device, "bfloat16", "", {})
    run_stage("bench", folder, {"ranks": ranks}, BenchResult, lambda _: (result, where))
    return folder


def test_benches_are_fitted_and_the_papers_rates_predicted(tmp_path: Path) -> None:
    benches = [written(tmp_path / str(ranks), ranks) for ranks in (1, 2)]
    result = latency(*benches, out=tmp_path / "out").result
    assert vars(result.costs) == pytest.approx(vars(COSTS), rel=1e-3)
    assert result.worst_error < 1e-3
    assert [p.published_tokens_per_s for p in result.predictions[: len(PAPER)]] == [p.tokens_per_s for p in PAPER]
    parent, before, fused = result.predictions[:3]
    assert (parent.work.syncs, before.work.syncs, fused.work.syncs) == (252, 190, 145)
    assert before.ms - fused.ms == pytest.approx(45 * (COSTS.per_launch + COSTS.per_sync), rel=1e-2)
    # 403.7 of 405.8 B parameters are read, an eighth on each device, in one byte.
    assert parent.work.gigabytes == pytest.approx(50.5, rel=1e-2)
    assert read_record(tmp_path / "out", LatencyResult).result == result
    assert "PREDICTED, not measured" in result.summary()


def test_busy_rows_do_not_count_and_kinds_do_not_mix(tmp_path: Path) -> None:
    quiet, busy = written(tmp_path / "1", 1), written(tmp_path / "2", 2, busy=True)
    one_line(lambda: latency(quiet, busy, out=tmp_path / "out"), "4 rows of quiet benches are too few")
    other = written(tmp_path / "3", 2, device="H100")
    one_line(lambda: latency(quiet, other, out=tmp_path / "out"), "several engines, devices or dtypes")
