"""Records of finished stages, gathered for the page."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from ffn_fusion.core.align_records import AlignResult
from ffn_fusion.core.bench_records import BenchResult
from ffn_fusion.core.block_records import BldResult
from ffn_fusion.core.comparison import METHODS, SOLVER, Series
from ffn_fusion.core.cost_records import CostResult
from ffn_fusion.core.engine_records import ExportResult, SpeculateResult
from ffn_fusion.core.ffn_records import FfnResult
from ffn_fusion.core.heal_records import HealResult
from ffn_fusion.core.latency import LatencyResult
from ffn_fusion.core.plan import Plan
from ffn_fusion.core.records import AnalyzeResult, EvalResult, FuseResult, Sample
from ffn_fusion.core.search_records import GOALS, ScoreResult, SearchResult
from ffn_fusion.errors import UserError
from ffn_fusion.folder import RECORD, Record, read_record

T = TypeVar("T")
TYPES: dict[str, type[Any]] = {
    "analyze": AnalyzeResult,
    "score": ScoreResult,
    "cost": CostResult,
    "bld": BldResult,
    "search": SearchResult,
    "fuse": FuseResult,
    "heal": HealResult,
    "align": AlignResult,
    "eval": EvalResult,
    "bench": BenchResult,
    "ffn": FfnResult,
    "latency": LatencyResult,
    "export": ExportResult,
    "speculate": SpeculateResult,
}


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A record and the folder that held it."""

    folder: str
    record: Record[T]

    @property
    def result(self) -> T:
        return self.record.result

    def made(self, sample: Sample | None = None) -> str:
        """Where a figure comes from: n, seed, dtype, device and date."""
        seed = sample.seed if sample else self.record.inputs.get("seed")
        text = ""
        if sample:
            windows = f"n = {sample.num_windows} windows of {sample.length:,} tokens"
            text = f"{windows} ({', '.join(sample.sources)}, {sample.part}), "
        where = self.record.environment
        return f"{text}seed {'none' if seed is None else seed}, {where.dtype}, {where.device}, {where.date[:10]}"


@dataclass(frozen=True)
class Comparison:
    """Searches of one parent under budgets that may stand in one picture: same text, same costs."""

    entries: list[Entry[SearchResult]]

    @property
    def series(self) -> list[Series]:
        """One for each search, the solver's first; searches by the same rule are told apart by their folders."""
        rules = [_rule(entry) for entry in self.entries]
        found = []
        for entry, rule in sorted(zip(self.entries, rules, strict=True), key=lambda pair: _rank(pair[1])):
            result = entry.result
            name = METHODS.get(rule, rule)
            name += f" by {GOALS[result.objective]}" if result.objective != "kl" else ""
            name += f", {entry.folder}" if rules.count(rule) > 1 else ""
            found.append(Series(name, result.candidates, result.parent_measured_ms, result.objective))
        return found

    @property
    def parent_ms(self) -> float | None:
        """A decode step of the parent by the cost table, which all of the searches share."""
        return self.entries[0].result.parent_ms

    @property
    def made(self) -> list[str]:
        """Where the figures come from, each different answer once."""
        return list(dict.fromkeys(entry.made(entry.result.sample) for entry in self.entries))

    @property
    def notes(self) -> list[str]:
        return list(dict.fromkeys(entry.result.note for entry in self.entries if entry.result.note))


def _rule(entry: Entry[SearchResult]) -> str:
    """How a search under a budget chose its plans."""
    return str(entry.record.inputs.get("rule", {}).get("method", SOLVER))


def _rank(rule: str) -> int:
    return list(METHODS).index(rule) if rule in METHODS else len(METHODS)


@dataclass(frozen=True)
class Records:
    """Everything there is to show, each list in the order in which it was made."""

    analyze: list[Entry[AnalyzeResult]]
    score: list[Entry[ScoreResult]]
    cost: list[Entry[CostResult]]
    bld: list[Entry[BldResult]]
    search: list[Entry[SearchResult]]
    fuse: list[Entry[FuseResult]]
    heal: list[Entry[HealResult]]
    align: list[Entry[AlignResult]]
    eval: list[Entry[EvalResult]]
    bench: list[Entry[BenchResult]]
    ffn: list[Entry[FfnResult]]
    latency: list[Entry[LatencyResult]]
    export: list[Entry[ExportResult]]
    speculate: list[Entry[SpeculateResult]]

    @property
    def entries(self) -> list[Entry[Any]]:
        return [entry for field in fields(self) for entry in getattr(self, field.name)]

    @property
    def text_evals(self) -> list[Entry[EvalResult]]:
        """Evaluations on text, those of the same models on the same text once."""
        keys = {(e.result.sample.digest, *(s.model for s in e.result.scores)): e for e in self.eval}
        return list(keys.values())

    @property
    def found(self) -> list[Entry[SearchResult]]:
        """Searches whose plan is meant for use: rivals of the solver only if there is nothing else."""
        return [entry for entry in self.search if _rule(entry) == SOLVER] or self.search

    @property
    def comparisons(self) -> list[Comparison]:
        """Searches under a budget, those of the same parent, text and costs together."""
        groups: dict[tuple[Any, ...], list[Entry[SearchResult]]] = {}
        for entry in self.search:
            if entry.result.candidates:
                key = (entry.record.inputs.get("model"), entry.result.sample.digest, entry.result.parent_ms)
                groups.setdefault(key, []).append(entry)
        return [Comparison(group) for group in groups.values()]

    @property
    def planned(self) -> list[Entry[SearchResult] | Entry[FuseResult]]:
        """Records that hold a plan, the same plan once."""
        held: list[Entry[SearchResult] | Entry[FuseResult]] = [*self.found, *self.fuse]
        return list({entry.result.plan: entry for entry in reversed(held)}.values())[::-1]

    @property
    def plan(self) -> Plan | None:
        """The plan of the student shown: the last one fused, else the last one found."""
        last = (self.fuse or self.found)[-1:]
        return Plan.parse(last[0].result.plan) if last else None

    @property
    def num_layers(self) -> int:
        """Layers of the parent; without an analysis or scores, the most that any record speaks of."""
        counted = [e.result.num_layers for e in self.analyze] or [e.result.num_layers for e in self.score]
        if counted:
            return counted[-1]
        named = [layer for e in self.planned for b in Plan.parse(e.result.plan).blocks for layer in b.layers]
        benched = [model.num_blocks for entry in self.bench for model in entry.result.models]
        return max([layer + 1 for layer in named] + benched, default=0)

    @property
    def parent(self) -> str:
        """The name of the parent as the earliest stage gave it."""
        names = [e.result.model for e in self.analyze] + [e.result.parent for e in self.fuse]
        names += [s.model for e in self.eval for s in e.result.scores if s.kl is None]
        names += [m.model for e in self.bench for m in e.result.models]
        names += [e.result.target for e in self.speculate]
        names += [e.result.model for e in self.score] + [e.result.model for e in self.cost]
        names += [e.result.parent for e in self.bld] + [e.result.parent for e in self.heal]
        names += [e.result.model for e in self.align]
        return names[0] if names else ""


def read_all(folders: Sequence[Path]) -> Records:
    """The records in these folders and in their direct subfolders; `UserError` if there is none to show."""
    found: dict[str, list[Entry[Any]]] = {stage: [] for stage in TYPES}
    for folder in _stage_folders(folders):
        stage = _stage(folder / RECORD)
        if stage in TYPES:
            found[stage].append(Entry(folder.resolve().name, read_record(folder, TYPES[stage])))
    if not any(found.values()):
        looked = ", ".join(map(str, folders)) or "no folder"
        raise UserError(f"no {RECORD} of {', '.join(TYPES)} found in {looked}; name the folders of finished stages")
    return Records(**{stage: sorted(held, key=lambda e: e.record.environment.date) for stage, held in found.items()})


def _stage_folders(folders: Sequence[Path]) -> Iterator[Path]:
    seen = set()
    for top in folders:
        if not top.is_dir():
            raise UserError(f"{top} is no folder; name the folders of finished stages")
        for folder in [top, *sorted(top.iterdir())]:
            # A stage at work has a hidden folder: it is not finished.
            hidden = folder is not top and folder.name.startswith(".")
            if not hidden and (folder / RECORD).is_file() and folder.resolve() not in seen:
                seen.add(folder.resolve())
                yield folder


def _stage(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["stage"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no record of a stage: {error!r}; run that stage again") from error
