"""A latency model of decoding: bytes over bandwidth, plus a cost of every launch and of every synchronisation.

Fitted to the rows of benches by non-negative least squares on relative errors, and used for configurations that were
not measured. What it says of those is a prediction, of the paper's own too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from ffn_fusion.core.bench_records import BenchResult

H100_BANDWIDTH = 3.35 / 4.8
"""Of an H100's memory over an H200's, by their data sheets."""


@dataclass(frozen=True)
class Work:
    """What one device does in a decode step. `launches` are sequential sublayers and the head, each a few kernels."""

    gigabytes: float
    launches: int
    syncs: int
    teraflops: float

    @property
    def row(self) -> tuple[float, float, float, float]:
        return self.gigabytes, float(self.launches), float(self.syncs), self.teraflops


@dataclass(frozen=True)
class Costs:
    """Milliseconds of each kind of work."""

    per_gigabyte: float
    per_launch: float
    per_sync: float
    per_teraflop: float

    def ms(self, work: Work) -> float:
        costs = (self.per_gigabyte, self.per_launch, self.per_sync, self.per_teraflop)
        return sum(cost * amount for cost, amount in zip(costs, work.row, strict=True))


@dataclass(frozen=True)
class Point:
    """A measured row: what it is, the work, and its milliseconds."""

    name: str
    work: Work
    ms: float


@dataclass(frozen=True)
class Fitted:
    """A measured point beside the model's: fitted with it, and to all others but it."""

    name: str
    ms: float
    fitted_ms: float
    left_out_ms: float

    @property
    def error(self) -> float:
        """Predicted over measured, less one, by the fit that has not seen the point."""
        return self.left_out_ms / self.ms - 1


def points_of(result: BenchResult) -> list[Point]:
    """The rows of a bench on quiet devices; a slice timed alone has no syncs."""
    sublayers = {model.model: model.num_sublayers for model in result.models}
    ranks = f", TP {result.tensor_parallel}" if result.tensor_parallel > 1 else ""
    part = f", slice of {result.slice}" if result.slice > 1 else ""
    return [
        Point(
            f"{row.model}, batch {row.batch_size}, prompt {result.prompt_of(row)}{ranks}{part}",
            Work(row.step_bytes / 1e9, sublayers[row.model] + 1, row.all_reduces, row.step_flops / 1e12),
            row.decode_ms.median,
        )
        for row in result.rows
        if row.step_bytes and not row.is_busy
    ]


def fit(points: Sequence[Point]) -> Costs:
    """Non-negative least squares, every point with the same weight relative to its time."""
    times = np.array([point.ms for point in points])
    rows = np.array([point.work.row for point in points]) / times[:, None]
    # Columns of one scale: the solver's tolerance is absolute.
    scale = np.abs(rows).max(0)
    scale[scale == 0] = 1.0
    found, _ = nnls(rows / scale, np.ones(len(points)))
    return Costs(*(float(value) for value in found / scale))


def check(points: Sequence[Point]) -> list[Fitted]:
    """Each point beside what the fit to all says of it, and the fit to all the others."""
    costs = fit(points)
    return [
        Fitted(p.name, p.ms, costs.ms(p.work), fit([*points[:at], *points[at + 1 :]]).ms(p.work))
        for at, p in enumerate(points)
    ]


@dataclass(frozen=True)
class Published:
    """A rate of FFN Fusion, Table 2: one user, eight GPUs, FP8; prompt and output lengths are not told."""

    name: str
    shape: str
    step: str
    tokens_per_s: float
    bandwidth: float
    """Of the memory, relative to the H200's."""


PAPER = (
    Published("Llama-405B, 8 x H100", "llama-3.1-405b", "parent", 41.44, H100_BANDWIDTH),
    Published("253B before fusion, 8 x H100", "ultra-253b", "searched", 63.38, H100_BANDWIDTH),
    Published("Ultra-253B, 8 x H100", "ultra-253b", "fused", 70.92, H100_BANDWIDTH),
    Published("Llama-3.3-70B, 8 x H100", "llama-3.1-70b", "parent", 94.03, H100_BANDWIDTH),
    Published("Ultra-253B, 8 x H200", "ultra-253b", "fused", 90.05, 1.0),
)
PAPER_RANKS = 8


@dataclass(frozen=True)
class Prediction:
    """What the model says of a configuration that was not measured here, and what was published of it, if anything."""

    name: str
    work: Work
    ms: float
    published_tokens_per_s: float | None
    implied_us: float | None
    """Microseconds that the published rate leaves for each sublayer, its launches and its all-reduce, besides bytes."""

    @property
    def tokens_per_s(self) -> float:
        return 1e3 / self.ms


def predict(name: str, work: Work, costs: Costs, bandwidth: float = 1.0, published: float | None = None) -> Prediction:
    """The model's time on memory of another bandwidth, relative to what it was fitted on."""
    moved = costs.per_gigabyte * work.gigabytes / bandwidth
    ms = costs.ms(work) - costs.per_gigabyte * work.gigabytes + moved
    implied = 1e3 * (1e3 / published - moved) / work.syncs if published and work.syncs else None
    return Prediction(name, work, ms, published, implied)


@dataclass(frozen=True)
class LatencyResult:
    """A fitted model, how well it says what it has not seen, and what it says of what nobody measured here."""

    engine: str
    costs: Costs
    points: list[Fitted]
    mean_error: float
    """Mean size of the errors of points left out."""
    worst_error: float
    predictions: list[Prediction]
    records: list[str]

    def summary(self) -> str:
        c = self.costs
        rate = f"{1e3 / c.per_gigabyte:,.0f} GB/s" if c.per_gigabyte else "no cost of bytes"
        lines = [
            f"{self.engine}, {len(self.points)} rows: {rate}, {1e3 * c.per_launch:.2f} us a sublayer, "
            f"{1e3 * c.per_sync:.2f} us an all-reduce, {c.per_teraflop:.3f} ms a teraflop",
            f"left out, a row is predicted within {self.mean_error:.1%} (mean) and {self.worst_error:.1%} (worst)",
            "",
            f"{'PREDICTED, not measured':44} {'ms/token':>9} {'tokens/s':>9} {'published':>9} {'us/sublayer then':>16}",
        ]
        for p in self.predictions:
            published = "-" if p.published_tokens_per_s is None else f"{p.published_tokens_per_s:.2f}"
            implied = "-" if p.implied_us is None else f"{p.implied_us:.1f}"
            lines.append(f"{p.name[:44]:44} {p.ms:9.2f} {p.tokens_per_s:9.2f} {published:>9} {implied:>16}")
        return "\n".join(lines)
