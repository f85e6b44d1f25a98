"""Measured times of single sublayers on a parent's shapes, and what they add up to for any plan (Puzzle).

A model's time is an offset (embedding, final norm, head, sampling) plus that of each sublayer, plus one all-reduce a
sublayer under tensor parallelism. Sublayers run one after the other, so their times add; `check` in the record of
`cost` says how well.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Literal

import numpy as np

from ffn_fusion.core.cost import BlockShape, Cost, ParameterCounts
from ffn_fusion.errors import UserError

Kind = Literal["attention", "ffn", "linear"]
Phase = Literal["prefill", "decode"]
QUANTILE = 0.25
RESAMPLES = 500


@dataclass(frozen=True)
class Scenario:
    """The request that times are for."""

    batch_size: int
    prompt_length: int
    new_tokens: int

    @property
    def context(self) -> int:
        """Tokens that a decode step attends to, in the middle of decoding."""
        return self.prompt_length + self.new_tokens // 2


@dataclass(frozen=True)
class ModelFacts:
    """What the times depend on besides the blocks' sizes. The depth is no part of it."""

    family: str
    hidden_size: int
    num_heads: int
    head_dim: int
    vocab_size: int
    sliding_window: int | None
    kv_heads: int
    """Most that an attention of the parent has."""
    ffn_width: int
    """Widest FFN of the parent."""
    counts: ParameterCounts


@dataclass(frozen=True)
class Measured:
    """Milliseconds: the lower quartile over repeats, and where 90 % of bootstrap resamples of the repeats put it.

    Whatever else runs on a machine only adds to a time, so the upper part of the repeats says more about that; the
    least one would hang on a single repeat.
    """

    ms: float
    low: float
    high: float

    @classmethod
    def of(cls, times: Sequence[float], other: Sequence[float] = (), parts: int = 1) -> "Measured":
        """Of a time, less that of `other` measured in the same repeats, over so many parts."""
        repeats = np.array([times, other or [0.0] * len(times)])
        drawn = np.random.default_rng(0).integers(len(times), size=(RESAMPLES, len(times)))
        lows = np.quantile(repeats[:, drawn], QUANTILE, axis=-1)
        low, high = np.quantile((lows[0] - lows[1]) / parts, (0.05, 0.95))
        whole = np.quantile(repeats, QUANTILE, axis=-1)
        return cls(float(whole[0] - whole[1]) / parts, float(low), float(high))


@dataclass(frozen=True)
class Timing:
    """One prefill and one decode step."""

    prefill: Measured
    decode: Measured

    def of(self, phase: Phase) -> float:
        return self.prefill.ms if phase == "prefill" else self.decode.ms


@dataclass(frozen=True)
class SublayerTime:
    """One sublayer with its norm and residual addition.

    `size` is the whole model's number of kv heads, of channels, or 0 for a linear layer, although under tensor
    parallelism one rank's slice is timed, without the all-reduce.
    """

    kind: Kind
    size: int
    num_blocks: int
    """Blocks in the stack that was timed."""
    time: Timing


@dataclass(frozen=True)
class Communication:
    """Across the ranks of tensor parallelism: an all-reduce of the stream, and the gathering of the logits."""

    all_reduce: Timing
    gather: Timing

    @classmethod
    def none(cls) -> "Communication":
        nothing = Measured(0.0, 0.0, 0.0)
        return cls(Timing(nothing, nothing), Timing(nothing, nothing))


@dataclass(frozen=True)
class CostTable:
    """Times of sublayers on one device in one scenario, in milliseconds."""

    device: str
    dtype: str
    bytes_per_value: int
    torch: str
    how: str
    """How calls were run: eager, or as a CUDA graph."""
    scenario: Scenario
    tensor_parallel: int
    facts: ModelFacts
    num_layers: int
    """Depth of the parent that was measured."""
    offset: Timing
    rows: list[SublayerTime]
    communication: Communication

    @cached_property
    def _lines(self) -> dict[str, list[SublayerTime]]:
        kinds = {row.kind for row in self.rows}
        return {kind: sorted((r for r in self.rows if r.kind == kind), key=lambda r: r.size) for kind in kinds}

    def decode_ms(self, shapes: Sequence[BlockShape]) -> float:
        """One decode step of a model with these blocks."""
        return self._total(shapes, "decode")

    def prefill_ms(self, shapes: Sequence[BlockShape]) -> float:
        """One prefill, to the first token."""
        return self._total(shapes, "prefill")

    def request_ms(self, shapes: Sequence[BlockShape]) -> float:
        """The scenario's batch from its prompts to its last tokens."""
        return self.prefill_ms(shapes) + self.scenario.new_tokens * self.decode_ms(shapes)

    def throughput(self, shapes: Sequence[BlockShape]) -> float:
        """New tokens a second, over the batch."""
        return 1e3 * self.scenario.batch_size * self.scenario.new_tokens / self.request_ms(shapes)

    def offset_ms(self, phase: Phase) -> float:
        """What a model of no blocks takes; under tensor parallelism with the exchange of embeddings and logits."""
        exchanged = self.communication.all_reduce.of(phase) + self.communication.gather.of(phase)
        return self.offset.of(phase) + exchanged

    def block_ms(self, shape: BlockShape, phase: Phase) -> float:
        """What a block adds, its all-reduces included."""
        parts: list[tuple[Kind, int]] = [("attention", shape.kv_heads)] if shape.kv_heads else []
        parts += [("ffn", shape.ffn_width)] if shape.ffn_width else []
        parts += [("linear", 0)] * (shape.linear_attention + shape.linear_ffn)
        return sum(self.sublayer_ms(kind, size, phase) for kind, size in parts)

    def sublayer_ms(self, kind: Kind, size: int, phase: Phase) -> float:
        """A sublayer with its all-reduce: linear between measured sizes, beyond them on the line of the last two."""
        return self._compute_ms(kind, size, phase) + self.communication.all_reduce.of(phase)

    def cost(self, shapes: Sequence[BlockShape]) -> Cost:
        """Exact counts of a model with these blocks: parameters, bytes of weights and kv cache."""
        counts = self.facts.counts
        total = counts.total(shapes)
        return Cost(tuple(shapes), total, counts.embedding, self.facts.head_dim, self.bytes_per_value)

    def extrapolated(self, shapes: Sequence[BlockShape]) -> list[str]:
        """Sizes among these blocks that lie outside of what was measured, in words."""
        said: dict[str, None] = {}
        for kind, sizes in (("attention", [s.kv_heads for s in shapes]), ("ffn", [s.ffn_width for s in shapes])):
            rows = self._lines.get(kind, [])
            low, high = (rows[0].size, rows[-1].size) if rows else (0, 0)
            what = "kv heads" if kind == "attention" else "channels"
            outside = sorted({size for size in sizes if size and not low <= size <= high})
            said |= dict.fromkeys(f"{size:,} {what} (measured: {low:,} to {high:,})" for size in outside)
        return list(said)

    def alone(self) -> "CostTable":
        """The table of one rank's computation, without communication."""
        return replace(self, communication=Communication.none())

    def _total(self, shapes: Sequence[BlockShape], phase: Phase) -> float:
        return self.offset_ms(phase) + sum(self.block_ms(shape, phase) for shape in shapes)

    def _compute_ms(self, kind: Kind, size: int, phase: Phase) -> float:
        rows = self._lines.get(kind, [])
        known = {row.size: row.time.of(phase) for row in rows}
        if size in known:
            return known[size]
        if len(rows) < 2:
            raise UserError(f"the cost table has no {kind} of size {size:,} and too few others to estimate it by")
        above = min(max(bisect_left(list(known), size), 1), len(rows) - 1)
        low, high = rows[above - 1], rows[above]
        slope = (high.time.of(phase) - low.time.of(phase)) / (high.size - low.size)
        return max(low.time.of(phase) + slope * (size - low.size), 0.0)


def check_table(table: CostTable, facts: ModelFacts, device: str, dtype: str, force: bool = False) -> str:
    """A note for results made with a table of another device or dtype; empty where all is the same.

    `UserError` if the table is of another model shape, or, unless forced, of another device or dtype.
    """
    for field in fields(ModelFacts):
        measured, own = getattr(table.facts, field.name), getattr(facts, field.name)
        if measured != own:
            name = field.name.replace("_", " ")
            if field.name == "counts":
                raise UserError("the costs were measured on a model whose sublayers have other parameters")
            raise UserError(f"the costs were measured on a model of other shape: {name} {measured}, here {own}")
    pairs = (("device", table.device, device), ("dtype", table.dtype, dtype))
    foreign = [f"{what} {measured}, not {own}" for what, measured, own in pairs if measured != own]
    if foreign and not force:
        raise UserError(f"the costs were measured on {' and '.join(foreign)}; measure here or force their use")
    return f"costs of {' and '.join(foreign)}" if foreign else ""
