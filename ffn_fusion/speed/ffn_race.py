"""Times FFNs in sequence and fused, plain and compiled, on random numbers: what `ffn` does, one rank or all.

`race_ffns` runs in this process, or as `python -m ffn_fusion.speed.ffn_race ORDER` once a rank, which prints it.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import cattrs
import torch
from torch import Tensor

from ffn_fusion.core.ffn_records import COMPILED, PLAIN, TUNED, Way
from ffn_fusion.errors import UserError
from ffn_fusion.hf.arch import ARCHS
from ffn_fusion.hf.machine import DTYPES
from ffn_fusion.progress import track
from ffn_fusion.speed.arena import Arena, aligned, available
from ffn_fusion.speed.decode import compiled
from ffn_fusion.speed.race import copy_bandwidth
from ffn_fusion.speed.ranks import Ranks, joined
from ffn_fusion.speed.sublayers import FfnStep, Rank
from ffn_fusion.speed.timing import Flush, Repeated, elapsed_ms, prepare

CALLS = 3
"""In a row, timed together."""


@dataclass(frozen=True)
class FfnOrder:
    """FFNs of `hidden_size` x `width` on each rank, `number` of them in groups of `group`."""

    hidden_size: int
    width: int
    number: int
    group: int
    tokens: list[int]
    dtype: str
    repeats: int

    @property
    def num_values(self) -> int:
        """Room of all FFNs, in sequence or fused."""
        return self.number * (3 * aligned(self.hidden_size * self.width) + aligned(self.hidden_size))

    @property
    def least_bytes(self) -> int:
        """What one pass must read on each rank."""
        return self.number * 3 * self.hidden_size * self.width * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class FfnTimes:
    """Milliseconds [tokens][way][repeat]."""

    copy_gb_per_s: float
    how: str
    ways: list[Way]
    ms: list[list[list[float]]]


def plain(step: FfnStep, x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """An FFN as modules are written: every operation a kernel, gate and up two products."""
    made: tuple[Tensor, Tensor] = step(x, update, apart=True)
    return made


def ffns(order: FfnOrder, group: int, arena: Arena) -> list[FfnStep]:
    """The FFNs of an order in groups; any grouping takes the whole arena."""
    arena.rewind()
    width, meta = group * order.width, torch.device("meta")

    def projection(outputs: int, inputs: int) -> Any:
        return SimpleNamespace(weight=torch.empty(outputs, inputs, device=meta), bias=None)

    def take(weight: Tensor) -> Tensor:
        return arena.take(tuple(weight.shape))

    hidden = order.hidden_size
    ffn = SimpleNamespace(
        gate_proj=projection(width, hidden), up_proj=projection(width, hidden), down_proj=projection(hidden, width)
    )
    norm = SimpleNamespace(weight=torch.empty(hidden, device=meta), variance_epsilon=1e-5)
    rank, arch = Rank(), ARCHS["llama"]
    return [FfnStep(ffn, norm, "silu", arch, rank, take, 1.0) for _ in range(order.number // group)]  # type: ignore[arg-type]


def race_ffns(order: FfnOrder, ranks: Ranks) -> FfnTimes:
    """All ways in turn in every repeat, so that drift hits all alike."""
    dtype, device = DTYPES[order.dtype], ranks.device
    needed, free = order.num_values * dtype.itemsize, available(device)
    if ranks.agree(float(needed > free), largest=True):
        raise UserError(
            f"{order.number} FFNs of {order.hidden_size:,} x {order.width:,} need {needed / 1e9:,.1f} GB on each "
            f"device; {free / 1e9:,.1f} GB are free"
        )
    bandwidth = copy_bandwidth(device)
    arena = Arena(order.num_values, device, dtype)
    stacks = {fused: ffns(order, order.group if fused else 1, arena) for fused in (False, True)}
    codes = {PLAIN: plain, COMPILED: compiled("on"), TUNED: compiled("tuned")}
    ways = [(code, fused) for code in codes for fused in stacks]
    flush, hows, times = Flush(device), set(), []
    for tokens in order.tokens:
        x = torch.randn(1, tokens, order.hidden_size, dtype=dtype, device=device)
        steps = [Repeated(device, _pass(stacks[fused], codes[code], x, ranks)) for code, fused in ways]
        prepare(steps, f"ffn: {tokens} tokens")
        hows |= {f"{step.how} {step.note}".strip() for step in steps}
        columns: list[list[float]] = [[] for _ in steps]
        for _ in track(range(order.repeats), f"ffn: {tokens} tokens", order.repeats):
            for step, column in zip(steps, columns, strict=True):
                flush()
                column.append(elapsed_ms(step, CALLS, ranks.meet))
        times.append(columns)
    return FfnTimes(bandwidth / 1e9, "; ".join(sorted(hows)), ways, times)


def _pass(stack: Sequence[FfnStep], call: Callable[..., Any], x: Tensor, ranks: Ranks) -> Callable[[], Tensor]:
    """All FFNs one after the other on the same input."""
    nothing = torch.zeros_like(x)

    @torch.no_grad()
    def run() -> Tensor:
        stream, update = x, nothing
        for ffn in stack:
            stream, update = call(ffn, stream, update)
            update = update if ranks.alone else ranks.total(update)
        return stream + update

    return run


def main(order: dict[str, Any]) -> None:
    with joined(order) as ranks:
        result = race_ffns(cattrs.structure(order["ffns"], FfnOrder), ranks)
    if ranks.rank.index == 0:
        print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
