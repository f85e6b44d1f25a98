"""Result of `cost`: the table, and how well its sums predict whole models."""

from dataclasses import dataclass

from ffn_fusion.core.cost_table import CostTable, SublayerTime, Timing

LABELS = {"attention": "attention, {:,} kv heads", "ffn": "FFN, {:,} channels", "linear": "linear layer"}


@dataclass(frozen=True)
class Checked:
    """A whole model, timed among the stacks that the table is made of, beside the table's sum. No communication."""

    name: str
    plan: str
    measured: Timing
    predicted_prefill_ms: float
    predicted_decode_ms: float
    prefill_error: float
    """Predicted over measured, less one."""
    decode_error: float


@dataclass(frozen=True)
class CostResult:
    """Measured costs of a parent's sublayers. `note` says what did not go as it should, such as a failed capture."""

    model: str
    table: CostTable
    depth: int
    """Blocks of the deepest model that was timed; fewer than the parent's if its memory did not suffice."""
    repeats: int
    check: list[Checked]
    worst_prefill_error: float
    """Largest error by size, signed."""
    worst_decode_error: float
    note: str = ""

    def summary(self) -> str:
        table, scenario = self.table, self.table.scenario
        ranks = f", one rank's slice of {table.tensor_parallel}" if table.tensor_parallel > 1 else ""
        lines = [
            f"{table.device}, {table.dtype}, batch {scenario.batch_size}, prompt {scenario.prompt_length}, decoding at "
            f"{scenario.context} tokens ({table.how}){ranks}; lower quartile of {self.repeats} repeats (90 % interval)",
            f"{'':24} {'prefill':>33} {'decode':>33}",
            _line("offset", table.offset),
            *(_line(LABELS[row.kind].format(row.size), row.time) for row in _sorted(table.rows)),
        ]
        if table.tensor_parallel > 1:
            lines.append(_line(f"all-reduce over {table.tensor_parallel}", table.communication.all_reduce))
            lines.append(_line("gathering the logits", table.communication.gather))
        lines += ["", f"{'predicted / measured':32} {'prefill':>29} {'decode':>29}"]
        for row in self.check:
            prefill = _against(row.predicted_prefill_ms, row.measured.prefill.ms, row.prefill_error)
            decode = _against(row.predicted_decode_ms, row.measured.decode.ms, row.decode_error)
            lines.append(f"{row.name:32} {prefill:>29} {decode:>29}")
        lines.append(f"worst error: prefill {self.worst_prefill_error:+.1%}, decode {self.worst_decode_error:+.1%}")
        if self.depth < table.num_layers:
            lines.append(f"whole models had {self.depth} of {table.num_layers} layers: memory did not suffice for more")
        return "\n".join(lines + ([self.note] if self.note else []))


def _sorted(rows: list[SublayerTime]) -> list[SublayerTime]:
    return sorted(rows, key=lambda row: (row.kind, row.size))


def _line(name: str, time: Timing) -> str:
    spreads = [f"{_ms(s.ms)} ({_ms(s.low)} - {_ms(s.high)})" for s in (time.prefill, time.decode)]
    return f"{name:24} {spreads[0]:>33} {spreads[1]:>33}"


def _ms(value: float) -> str:
    return f"{value:.2f} ms" if abs(value) >= 1 else f"{value * 1e3:.1f} us"


def _against(predicted: float, measured: float, error: float) -> str:
    return f"{predicted:.2f} / {measured:.2f} ms {error:+.1%}"
