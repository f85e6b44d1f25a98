"""Result of `ffn`: FFNs in sequence against the same number fused in groups, on one device or several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ffn_fusion.core.bench_records import BUSY, Ratio, Spread

PLAIN, COMPILED, TUNED = "plain", "compiled", "tuned"
CODES = (PLAIN, COMPILED, TUNED)
"""Every operation a kernel, gate and up two products; compiled, gate and up one; and products of one row tuned."""


@dataclass(frozen=True)
class FfnRow:
    """One way to compute all FFNs on so many tokens."""

    tokens: int
    code: str
    fused: bool
    ms: Spread
    bandwidth_share: float
    """Weight bytes of a device over the measured copy bandwidth times the time."""
    over_same: Ratio | None
    """Fused: how many times as fast as in sequence by the same code."""
    over_plain: Ratio | None
    """How many times as fast as in sequence by plain code."""
    over_best: Ratio | None
    """Fused: how many times as fast as the fastest code in sequence, the honest figure."""

    @property
    def is_busy(self) -> bool:
        return self.ms.width > BUSY


@dataclass(frozen=True)
class FfnResult:
    """FFNs with their norms and residual additions; with several devices an all-reduce behind each."""

    hidden_size: int
    width: int
    """Channels of one FFN on each device."""
    number: int
    group: int
    tensor_parallel: int
    repeats: int
    copy_gb_per_s: float
    how: str
    rows: list[FfnRow]

    def summary(self) -> str:
        devices = f" on each of {self.tensor_parallel} devices" if self.tensor_parallel > 1 else ""
        lines = [
            f"{self.number} FFNs of {self.hidden_size:,} x {self.width:,}{devices}, fused by {self.group}; {self.how}",
            f"{'tokens':>6} {'code':9} {'':10} {'ms':>9} {'of limit':>8} {'same code':>20} {'plain':>20} {'best':>20}",
        ]
        lines += [
            f"{row.tokens:6d} {row.code:9} {'fused' if row.fused else 'sequential':10} {row.ms.median:9.3f} "
            f"{row.bandwidth_share:8.1%} {row.over_same or '-'!s:>20} {row.over_plain or '-'!s:>20} "
            f"{row.over_best or '-'!s:>20}" + (" busy device" if row.is_busy else "")
            for row in self.rows
        ]
        return "\n".join([*lines, f"copying moves {self.copy_gb_per_s:,.0f} GB/s"])


Way = tuple[str, bool]
"""Code, and whether FFNs are fused."""


def ffn_rows(tokens: int, times: Mapping[Way, Sequence[float]], least_ms: float) -> list[FfnRow]:
    """Rows of one number of tokens from milliseconds in each repeat; `least_ms` is what moving the weights takes."""
    spreads = {way: Spread.of(own) for way, own in times.items()}
    sequential = [way for way in times if not way[1]]
    best = min(sequential, key=lambda way: spreads[way].median)
    rows = []
    for way, own in times.items():
        code, fused = way
        rows.append(
            FfnRow(
                tokens=tokens,
                code=code,
                fused=fused,
                ms=spreads[way],
                bandwidth_share=least_ms / spreads[way].median,
                over_same=Ratio.of(times[code, False], own) if fused else None,
                over_plain=Ratio.of(times[PLAIN, False], own) if way != (PLAIN, False) else None,
                over_best=Ratio.of(times[best], own) if fused else None,
            )
        )
    return rows
