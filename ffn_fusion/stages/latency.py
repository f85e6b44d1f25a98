"""`latency`: a model of decode time fitted to benches, checked on them, and asked about what was not measured."""

from pathlib import Path
from statistics import fmean

from ffn_fusion.core.bench_records import BenchResult
from ffn_fusion.core.cost import Cost
from ffn_fusion.core.latency import (
    PAPER,
    PAPER_RANKS,
    Costs,
    LatencyResult,
    Prediction,
    Work,
    check,
    fit,
    points_of,
    predict,
)
from ffn_fusion.core.plan import Plan
from ffn_fusion.core.shapes import SHAPES, cost_of_shape, steps_of
from ffn_fusion.errors import UserError
from ffn_fusion.folder import Environment, Record, StageFolder, read_record, run_stage
from ffn_fusion.settings import Positive

LEAST = 5
"""Rows: one more than the model has costs."""
FP8, BF16 = 1, 2
STUDENTS = ("llama-3.1-8b", "super-49b", "ultra-253b")


def latency(
    *benches: Path, out: Path, tensor_parallel: Positive = 8, batch_size: Positive = 1
) -> Record[LatencyResult]:
    """Fit a latency model to benches of one engine on one device, and predict what they did not measure.

    Parameters
    ----------
    benches
        Folders of finished benches, on one and on several devices, so that an all-reduce can be told from a launch.
    out
        New folder for the record.
    tensor_parallel
        Devices that the named shapes are predicted on, besides the paper's own configurations.
    batch_size
        Sequences decoded at once there.
    """
    records = [read_record(folder, BenchResult) for folder in benches]
    points = [point for record in records for point in points_of(record.result)]
    if len(points) < LEAST:
        raise UserError(f"{len(points)} rows of quiet benches are too few to fit four costs to; give at least {LEAST}")
    made = {(r.result.engine, r.environment.device, r.result.dtype) for r in records}
    if len(made) > 1:
        kinds = "; ".join(" ".join(kind) for kind in sorted(made))
        raise UserError(f"benches of several engines, devices or dtypes have several models: {kinds}")
    inputs = {
        "benches": [[record.environment.date, record.inputs] for record in records],
        "tensor_parallel": tensor_parallel,
        "batch_size": batch_size,
    }

    def work(_: StageFolder) -> tuple[LatencyResult, Environment]:
        costs, fitted = fit(points), check(points)
        errors = [abs(point.error) for point in fitted]
        result = LatencyResult(
            engine=" ".join(next(iter(made))),
            costs=costs,
            points=fitted,
            mean_error=fmean(errors),
            worst_error=max(errors),
            predictions=[*_published(costs), *_shapes(costs, tensor_parallel, batch_size)],
            records=[str(folder) for folder in benches],
        )
        return result, records[0].environment

    return run_stage("latency", out, inputs, LatencyResult, work)


def _published(costs: Costs) -> list[Prediction]:
    """The paper's own configurations: FP8, one sequence, the cache left out, since its length is not told."""
    found = []
    for one in PAPER:
        amount = _work(_cost(one.shape, one.step, FP8), PAPER_RANKS, 1, 0)
        found.append(predict(one.name, amount, costs, one.bandwidth, one.tokens_per_s))
    return found


def _shapes(costs: Costs, ranks: int, batch_size: int) -> list[Prediction]:
    """Parent, searched and fused of the named students in bf16, at a short context."""
    found = []
    for name in STUDENTS:
        for step in ("parent", "searched", "fused"):
            amount = _work(_cost(name, step, BF16), ranks, batch_size, 192)
            found.append(predict(f"{name}, {step}, bf16, TP {ranks}, batch {batch_size}", amount, costs))
    return found


def _cost(name: str, step: str, bytes_per_value: int) -> Cost:
    shape = SHAPES[name]
    parent = Plan.identity(shape.config["num_hidden_layers"])
    steps = steps_of(parent, Plan.parse(shape.plan) if shape.plan else None)
    return cost_of_shape(shape.config, steps[step], bytes_per_value)


def _work(cost: Cost, ranks: int, batch_size: int, context: int) -> Work:
    return Work(
        gigabytes=cost.decode_bytes(batch_size, context) / ranks / 1e9,
        launches=cost.num_sublayers + 1,
        syncs=cost.num_sublayers if ranks > 1 else 0,
        teraflops=cost.decode_flops(batch_size) / ranks / 1e12,
    )
