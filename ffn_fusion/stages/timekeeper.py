"""How `bench` has models timed: by a race in torch, in this process or one a rank, or by a contest of engines."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ffn_fusion.core.bench_records import BenchResult
from ffn_fusion.core.cost import Cost
from ffn_fusion.core.laps import NOT_BEGUN, Split, Subject, failures_of, models_of, rows_of
from ffn_fusion.errors import UserError
from ffn_fusion.hf.machine import device_map, pick_device
from ffn_fusion.serving.latency import Contest, hold_contest
from ffn_fusion.settings import Machine
from ffn_fusion.speed.decode import Compile
from ffn_fusion.speed.race import Race, race, read_laps
from ffn_fusion.speed.ranks import Ranks, run_ranks
from ffn_fusion.speed.sublayers import Rank
from ffn_fusion.stages.entrants import Entrant, cost_of

RACE = "ffn_fusion.speed.race"
ANSWER = "laps.jsonl"
IN_PROCESSES = ("vllm", "llama.cpp")
"""Engines that run in processes of their own."""
Engine = Literal["auto", "torch", "transformers", "vllm", "llama.cpp"]
UNIMPORTANT = ("python", "timeout", "time_limit")
"""Fields that no figure depends on."""
OURS = ", with a cache of fixed size"
COMPILED = {"off": "", "on": ", compiled", "tuned": ", compiled and tuned"}


@dataclass(frozen=True)
class Timekeeper:
    """An engine, what it is asked, and how the models are split."""

    engine: Engine
    python: str
    compile: Compile
    fp8: bool
    split: Split
    scenarios: list[tuple[int, int]]
    new_tokens: int
    repeats: int
    timeout: float
    time_limit: float

    @property
    def batch_sizes(self) -> list[int]:
        return sorted({batch for batch, _ in self.scenarios})

    @property
    def settings(self) -> dict[str, Any]:
        """What the figures depend on."""
        return {name: value for name, value in asdict(self).items() if name not in UNIMPORTANT}

    def result(
        self,
        models: Sequence[Entrant],
        random: bool,
        dtype: torch.dtype,
        machine: Machine,
        answer: Path,
        version: str,
    ) -> BenchResult:
        """Time what the answer does not hold yet, and make rows of all."""
        costs = [cost_of(model.folder, dtype) for model in models]
        if self.engine in IN_PROCESSES:
            fault = self._contest(models, costs, random, dtype, pick_device(machine), answer)
        else:
            fault = self._race(models, random, dtype, machine, answer)
        # In FP8 every value counts as one byte, which is the least that moves.
        counted = [replace(cost, bytes_per_value=1) if self.fp8 else cost for cost in costs]
        subjects = [Subject(m.name, m.step, m.plan, cost) for m, cost in zip(models, counted, strict=True)]
        site, laps = read_laps(answer)
        failures = failures_of(subjects, site, laps, self.scenarios, fault or NOT_BEGUN)
        rows = rows_of(subjects, site, laps, self.new_tokens, self.split) if site else []
        if site is None or not rows:
            raise UserError(fault or "; ".join(map(str, failures)))
        hows = sorted({row.how for row in rows})
        return BenchResult(
            models=models_of(subjects, site, self.split),
            rows=rows,
            prompt_length=self.scenarios[0][1],
            new_tokens=self.new_tokens,
            repeats=self.repeats,
            copy_gb_per_s=site.copy_gb_per_s,
            how=" or ".join(hows) + (OURS + COMPILED[self.compile] if self.engine not in IN_PROCESSES else ""),
            engine=self.engine,
            engine_version=version,
            tensor_parallel=self.split.ranks,
            slice=self.split.slices,
            dtype="fp8" if self.fp8 else str(dtype).removeprefix("torch."),
            device_gb=site.device_gb,
            failures=failures,
        )

    def _race(self, models: Sequence[Entrant], random: bool, dtype: torch.dtype, machine: Machine, answer: Path) -> str:
        """In torch, in this process or in one for each rank; what ended it early, or nothing."""
        order = Race(
            folders=[str(model.folder.folder.resolve()) for model in models],
            random=random,
            engine="torch" if self.engine == "torch" else "transformers",
            device_map=device_map(machine),
            dtype=str(dtype).removeprefix("torch."),
            compile=self.compile,
            slice=self.split.slices,
            scenarios=self.scenarios,
            new_tokens=self.new_tokens,
            repeats=self.repeats,
            time_limit=self.time_limit,
            answer=str(answer.resolve()),
        )
        device, ranks = pick_device(machine), self.split.ranks
        if ranks == 1:
            race(order, Ranks(Rank(), device))
            return ""
        try:
            limit = self.timeout * (1 + len(self.scenarios))
            run_ranks(RACE, {"race": asdict(order)}, ranks, device.type, limit, f"timing on {ranks} ranks")
        except UserError as error:
            return str(error)
        return ""

    def _contest(
        self,
        models: Sequence[Entrant],
        costs: Sequence[Cost],
        random: bool,
        dtype: torch.dtype,
        device: torch.device,
        answer: Path,
    ) -> str:
        contest = Contest(
            engine=self.engine,
            python=self.python,
            folders=[model.folder for model in models],
            costs=costs,
            random=random,
            dtype=dtype,
            fp8=self.fp8,
            ranks=self.split.ranks,
            scenarios=self.scenarios,
            new_tokens=self.new_tokens,
            repeats=self.repeats,
            timeout=self.timeout,
            time_limit=self.time_limit,
            device=device,
        )
        hold_contest(contest, answer)
        return ""
