"""Result of `bench`: what was timed, and what follows from the times."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles

import numpy as np

RESAMPLES = 2000
BUSY = 0.1
"""Quartiles of a row's times further apart than this share of the median: something else ran on the device."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a timing, in milliseconds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(median(values), low, high)

    @property
    def width(self) -> float:
        """Distance of the quartiles, as a share of the median."""
        return (self.high - self.low) / self.median


@dataclass(frozen=True)
class Ratio:
    """How many times as fast a model is as its parent: the median over repeats, each with its own parent's time, and
    the 95 % bootstrap interval of that median."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, parent: Sequence[float], own: Sequence[float]) -> "Ratio":
        ratios = np.asarray(parent, dtype=np.float64) / np.asarray(own, dtype=np.float64)
        drawn = np.random.default_rng(0).integers(len(ratios), size=(RESAMPLES, len(ratios)))
        low, high = np.quantile(np.median(ratios[drawn], axis=1), (0.025, 0.975))
        return cls(float(np.median(ratios)), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.value:.2f}x [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Timed:
    """One model in one scenario, as an engine measured it: milliseconds of each repeat."""

    prefill_ms: list[float]
    decode_ms: list[float]
    how: str
    kernels: int | None = None
    """Of a decode step, on a GPU that lets itself be looked into."""
    joules: float | None = None
    """Of a decode step, all devices together."""


@dataclass(frozen=True)
class Lap:
    """All models in one scenario: what was timed, or why not, in the models' order."""

    batch_size: int
    prompt_length: int
    timed: list[Timed | None]
    reasons: list[str]


@dataclass(frozen=True)
class Site:
    """What an engine told before the first lap: of the device, and of each model."""

    copy_gb_per_s: float
    device_gb: float | None
    kv_bytes: list[float | None]
    """Bytes that a token of kv cache took in memory, on all devices together."""
    reasons: list[str]
    """Why a model is not there; empty for those that are."""


@dataclass(frozen=True)
class BenchRow:
    """One model at one batch size and prompt length."""

    model: str
    batch_size: int
    prefill_ms: Spread
    decode_ms: Spread
    bandwidth_share: float
    """Bytes that a decode step must move on one device, over the measured copy bandwidth times its time."""
    prefill_speedup: float | None
    """None where the parent has no row."""
    decode_speedup: float | None
    prompt_length: int | None = None
    """None in records of older versions, which had one for all rows."""
    ratio: Ratio | None = None
    """Decoding, with its interval; None for the parent."""
    fusion: Ratio | None = None
    """Of a fused model over the searched one: what fusion wins by itself."""
    step_bytes: int = 0
    """Those of `bandwidth_share`."""
    step_flops: float = 0.0
    """Of one device in a decode step."""
    all_reduces: int = 0
    kernels: int | None = None
    joules: float | None = None
    """Per decode step, all devices together."""
    how: str = ""

    def tokens_per_s(self) -> float:
        return 1e3 * self.batch_size / self.decode_ms.median

    @property
    def is_busy(self) -> bool:
        """Whether the row was made on a busy device: its times lie too far apart."""
        return self.decode_ms.width > BUSY

    def device_ms_per_token(self, devices: int) -> float:
        """Cost: milliseconds of all devices together for one token of output (docs/method.md)."""
        return devices * self.decode_ms.median / self.batch_size


@dataclass(frozen=True)
class BenchModel:
    """What a model costs by count alone, on all devices together."""

    model: str
    num_parameters: int
    kv_bytes_per_token: int
    num_blocks: int
    num_attentions: int
    num_sublayers: int
    """Sequential sublayers; as many all-reduces a token under tensor parallelism."""
    step: str = ""
    """parent, searched (nothing fused), fused or student; empty in older records."""
    plan: str = ""
    weight_bytes: int = 0
    kv_bytes_measured: float | None = None
    """What a token of the cache took in memory, where an engine tells."""
    tokens_that_fit: int | None = None
    """Tokens of kv cache beside the weights in the memory of the devices."""


@dataclass(frozen=True)
class Failure:
    """A model or a row that could not be measured, and why."""

    model: str
    reason: str
    batch_size: int | None = None
    prompt_length: int | None = None

    def __str__(self) -> str:
        where = "" if self.batch_size is None else f", batch {self.batch_size}, prompt {self.prompt_length}"
        return f"{self.model}{where}: {self.reason}"


@dataclass(frozen=True)
class BenchResult:
    """Decode and prefill times of a parent and its students, interleaved."""

    models: list[BenchModel]
    rows: list[BenchRow]
    prompt_length: int
    """Of the first rows."""
    new_tokens: int
    repeats: int
    copy_gb_per_s: float
    how: str = "eager, with a cache that grows"
    engine: str = "transformers"
    engine_version: str = ""
    tensor_parallel: int = 1
    slice: int = 1
    """Ranks that the model is split over of which one was timed, without the others."""
    dtype: str = ""
    device_gb: float | None = None
    failures: list[Failure] = field(default_factory=list)

    def prompt_of(self, row: BenchRow) -> int:
        return self.prompt_length if row.prompt_length is None else row.prompt_length

    @property
    def devices(self) -> int:
        """Devices that a row stands for: those timed, or those that a slice is one of."""
        return self.tensor_parallel * self.slice

    def device_ms(self, row: BenchRow) -> float:
        return row.device_ms_per_token(self.devices)

    def summary(self) -> str:
        head = f"{'model':30} {'batch':>5} {'prompt':>6} {'prefill ms':>10} {'ms/token':>9} {'tokens/s':>9} "
        head += f"{'ratio to parent':>21} {'fusion alone':>21} "
        lines = [head + f"{'of limit':>8} {'reduces':>7} {'kernels':>7} {'J/token':>8}"]
        lines += [self._line(row) for row in self.rows]
        for m in self.models:
            fits = "" if m.tokens_that_fit is None else f", {m.tokens_that_fit:,} tokens of cache fit"
            measured = "" if m.kv_bytes_measured is None else f" ({m.kv_bytes_measured:,.0f} measured)"
            lines.append(
                f"{m.model[-30:]:30} {m.num_parameters:,} parameters, {m.kv_bytes_per_token:,} kv bytes/token"
                f"{measured}, {m.num_sublayers} sequential sublayers{fits}"
            )
        lines += [f"not measured: {failure}" for failure in self.failures]
        part = f", one rank's slice of {self.slice}" if self.slice > 1 else ""
        ranks = f", tensor parallel over {self.tensor_parallel}" if self.tensor_parallel > 1 else ""
        engine = f"{self.engine} {self.engine_version}".strip()
        lines.append(f"timed: {engine}, {self.how}{ranks}{part}; copying moves {self.copy_gb_per_s:,.0f} GB/s")
        return "\n".join([*lines, *cost_lines(self)])

    def _line(self, row: BenchRow) -> str:
        kernels = "-" if row.kernels is None else str(row.kernels)
        joules = "-" if row.joules is None else f"{row.joules / row.batch_size:.3f}"
        return (
            f"{row.model[-30:]:30} {row.batch_size:5d} {self.prompt_of(row):6d} {row.prefill_ms.median:10.2f} "
            f"{row.decode_ms.median:9.3f} {row.tokens_per_s():9.1f} {row.ratio or '-'!s:>21} "
            f"{row.fusion or '-'!s:>21} "
            f"{row.bandwidth_share:8.0%} "
            f"{row.all_reduces:7d} {kernels:>7} {joules:>8}" + (" busy device" if row.is_busy else "")
        )


@dataclass(frozen=True)
class CostRatio:
    """Cost per token of one row over that of another: `dear` is the comparator, `cheap` what is compared with it."""

    reading: str
    dear: BenchRow
    cheap: BenchRow
    value: float


def cost_ratios(result: BenchResult) -> list[CostRatio]:
    """What a token costs less: at equal batch, and with the parent at the smallest batch as comparator.

    Only rows of the first prompt length; the second reading mixes what batching and what the student wins.
    """
    rows = [row for row in result.rows if result.prompt_of(row) == result.prompt_length]
    parents = {row.batch_size: row for row in rows if result.models and row.model == result.models[0].model}
    if not parents:
        return []
    first = parents[min(parents)]
    found = []
    for row in rows:
        same = parents.get(row.batch_size)
        pairs = [("equal batch", same)] if same and same is not row else []
        pairs += [("different batches", first)] if row.batch_size != first.batch_size else []
        found += [
            CostRatio(reading, dear, row, result.device_ms(dear) / result.device_ms(row)) for reading, dear in pairs
        ]
    return found


def cost_lines(result: BenchResult) -> list[str]:
    """The cost of a token in words at the smallest and the largest batch, each ratio with both of its comparators."""
    ends = {pick(row.batch_size for row in result.rows) for pick in (min, max)}
    ratios = [ratio for ratio in cost_ratios(result) if ratio.cheap.batch_size in ends]
    if not ratios:
        return []
    lines = ["device-milliseconds per output token (docs/method.md):"]
    for ratio in ratios:
        sides = [
            f"{row.model[-30:]} at batch {row.batch_size} ({result.device_ms(row):.3f})"
            for row in (ratio.dear, ratio.cheap)
        ]
        lines.append(f"  {ratio.reading}: {' against '.join(sides)}: {ratio.value:.2f}x")
    return lines
