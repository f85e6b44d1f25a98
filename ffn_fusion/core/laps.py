"""From what an engine timed to the rows of a bench: bytes, ratios and shares of the limit follow from counts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ffn_fusion.core.bench_records import BenchModel, BenchRow, Failure, Lap, Ratio, Site, Spread
from ffn_fusion.core.cost import Cost
from ffn_fusion.core.cost_table import Scenario

NOT_BEGUN = "not begun: --time-limit was reached"


@dataclass(frozen=True)
class Subject:
    """A model to be timed; `step` says what it is of its parent."""

    name: str
    step: str
    plan: str
    cost: Cost


@dataclass(frozen=True)
class Split:
    """The devices a model is split over: `ranks` were timed together, or one slice of `slices` alone."""

    ranks: int = 1
    slices: int = 1

    @property
    def devices(self) -> int:
        return self.ranks * self.slices


def models_of(subjects: Sequence[Subject], site: Site, split: Split) -> list[BenchModel]:
    """The counts of each model, and how much cache fits beside its weights into all devices together."""
    return [_model(subject, site, held, split) for subject, held in zip(subjects, site.kv_bytes, strict=True)]


def _model(subject: Subject, site: Site, held: float | None, split: Split) -> BenchModel:
    cost = subject.cost
    per_token = cost.kv_bytes_per_token
    room = None if site.device_gb is None else site.device_gb * 1e9 * split.devices - cost.weight_bytes
    return BenchModel(
        model=subject.name,
        num_parameters=cost.num_parameters,
        kv_bytes_per_token=per_token,
        num_blocks=len(cost.blocks),
        num_attentions=cost.num_attentions,
        num_sublayers=cost.num_sublayers,
        step=subject.step,
        plan=subject.plan,
        weight_bytes=cost.weight_bytes,
        kv_bytes_measured=None if held is None else held * split.slices,
        tokens_that_fit=max(int(room // per_token), 0) if room is not None and per_token else None,
    )


def rows_of(
    subjects: Sequence[Subject], site: Site, laps: Sequence[Lap], new_tokens: int, split: Split
) -> list[BenchRow]:
    """A row for each model that was timed in a lap."""
    return [row for lap in laps for row in _rows(subjects, site, lap, new_tokens, split)]


def _rows(subjects: Sequence[Subject], site: Site, lap: Lap, new_tokens: int, split: Split) -> Iterator[BenchRow]:
    scenario = Scenario(lap.batch_size, lap.prompt_length, new_tokens)
    parent = lap.timed[0]
    steps = dict(zip((subject.step for subject in subjects), lap.timed, strict=True))
    for subject, timed in zip(subjects, lap.timed, strict=True):
        if timed is None:
            continue
        cost = subject.cost
        moved = cost.decode_bytes(lap.batch_size, scenario.context) // split.devices
        prefill, decode = Spread.of(timed.prefill_ms), Spread.of(timed.decode_ms)
        ratio = Ratio.of(parent.decode_ms, timed.decode_ms) if parent else None
        searched = steps.get("searched") if subject.step == "fused" else None
        yield BenchRow(
            model=subject.name,
            batch_size=lap.batch_size,
            prefill_ms=prefill,
            decode_ms=decode,
            bandwidth_share=moved / (site.copy_gb_per_s * 1e9) / decode.median * 1e3,
            prefill_speedup=Ratio.of(parent.prefill_ms, timed.prefill_ms).value if parent else None,
            decode_speedup=ratio.value if ratio else None,
            prompt_length=lap.prompt_length,
            ratio=ratio if timed is not parent else None,
            fusion=Ratio.of(searched.decode_ms, timed.decode_ms) if searched else None,
            step_bytes=moved,
            step_flops=cost.decode_flops(lap.batch_size) / split.devices,
            all_reduces=cost.num_sublayers if split.ranks > 1 else 0,
            kernels=timed.kernels,
            joules=timed.joules,
            how=timed.how,
        )


def failures_of(
    subjects: Sequence[Subject],
    site: Site | None,
    laps: Sequence[Lap],
    scenarios: Sequence[tuple[int, int]],
    fault: str,
) -> list[Failure]:
    """Every model that is not there, and every row that is missing; `fault` ended the race, if something did."""
    reasons = site.reasons if site else [""] * len(subjects)
    found = [Failure(subject.name, reason) for subject, reason in zip(subjects, reasons, strict=True) if reason]
    for lap in laps:
        found += [
            Failure(subject.name, reason, lap.batch_size, lap.prompt_length)
            for subject, reason, known in zip(subjects, lap.reasons, reasons, strict=True)
            if reason and not known
        ]
    ran = {(lap.batch_size, lap.prompt_length) for lap in laps}
    missing = [scenario for scenario in scenarios if scenario not in ran]
    return found + [Failure(s.name, fault, *scenario) for scenario in missing for s in subjects]
