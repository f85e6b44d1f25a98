"""`bench`: prefill and decode time of a parent and its students, interleaved in one engine, beside the limit."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from cyclopts import Parameter

from ffn_fusion.core.bench_records import BenchResult
from ffn_fusion.core.cost import Cost
from ffn_fusion.core.laps import Split, Subject, failures_of, models_of, rows_of
from ffn_fusion.core.shapes import Shape, shape_of, steps_of
from ffn_fusion.errors import UserError
from ffn_fusion.folder import Environment, Record, StageFolder, run_stage
from ffn_fusion.hf.checkpoint import read_json
from ffn_fusion.hf.decode import Compile
from ffn_fusion.hf.machine import DTYPES, device_map, pick_device, pick_dtype, where
from ffn_fusion.hf.model import ModelFolder, copy_companions, expected_specs, student_config
from ffn_fusion.hf.race import Race, race, read_laps
from ffn_fusion.hf.ranks import Ranks, check_ranks, run_ranks
from ffn_fusion.hf.resolve import labels, read_plan, resolve_model
from ffn_fusion.hf.sublayers import Rank
from ffn_fusion.serving.engines import ENGINES
from ffn_fusion.serving.latency import Contest, hold_contest
from ffn_fusion.serving.parallel import check_tensor_parallel
from ffn_fusion.settings import Above0, Machine, Positive

RACE = "ffn_fusion.hf.race"
ANSWER = "laps.jsonl"
IN_PROCESSES = ("vllm", "llama.cpp")
"""Engines that run in processes of their own."""
Engine = Literal["auto", "torch", "transformers", "vllm", "llama.cpp"]


@dataclass(frozen=True)
class _Model:
    """A model to be timed: its folder, which holds a configuration alone where the weights shall be random."""

    name: str
    step: str
    plan: str
    folder: ModelFolder


def bench(
    *models: str,
    out: Path,
    shape: str | None = None,
    plan: str | None = None,
    engine: Engine = "auto",
    compile: Compile = "off",
    tensor_parallel: Positive = 1,
    slice_of: Annotated[Positive, Parameter(name="--slice")] = 1,
    fp8: bool = False,
    batch_sizes: tuple[Positive, ...] = (1, 4),
    prompt_lengths: tuple[Positive, ...] = (128,),
    new_tokens: Positive = 16,
    repeats: Positive = 5,
    timeout: Above0 = 900.0,
    engine_python: str | None = None,
    untested: bool = False,
    machine: Machine = Machine(),  # noqa: B008, frozen
) -> Record[BenchResult]:
    """Time prefill and decode of a parent and its students, interleaved, all in the same engine.

    Parameters
    ----------
    models
        The parent, and any number of models to compare with it: folders, GGUF files, Hub ids, builtin:smollm2-135m.
    out
        New folder for the record.
    shape
        Instead of models: smollm2-135m, llama-3.1-8b, llama-3.1-70b, llama-3.1-405b, super-49b, ultra-253b, or a
        config.json, with random weights. The parent, its student with nothing fused, and fused are timed.
    plan
        The student's plan on that shape, in any form that `fuse` reads; super-49b, ultra-253b, llama-3.1-8b have one.
    engine
        "torch" is our own decode step, "transformers" the family's own modules ("auto": only where --device balanced
        needs them), both as CUDA graphs on a GPU; vllm and llama.cpp as they are.
    compile
        torch.compile in our own decode step: off, on, or tuned, with products of one row as kernels of its own.
    tensor_parallel
        Devices that each model is split over (torch, vllm).
    slice_of
        Time one rank's slice of a model that is split over so many devices, alone, without all-reduces (torch).
    fp8
        Weights and activations in FP8 (vllm, on a GPU that has it).
    batch_sizes
        Sequences decoded at once; give the option again for each.
    prompt_lengths
        Tokens of a prefill; give the option again for each.
    new_tokens
        Tokens decoded after the prompt: in torch as many steps in each repeat, all timed as the middle one.
    repeats
        Timed repeats of each model and batch size, all models in turn, after one untimed.
    timeout
        Seconds that an engine in a process of its own may take to start, and for each batch size and prompt; it is
        killed then, and the rows made so far stay.
    engine_python
        Python that has the engine, if it is not this one.
    untested
        Go on with an engine version outside the tested range.
    """
    chosen: Engine = ("transformers" if machine.device == "balanced" else "torch") if engine == "auto" else engine
    _check_options(chosen, models, shape, plan, compile, Split(tensor_parallel, slice_of), machine)
    device = pick_device(machine)
    check_ranks(tensor_parallel, device)
    python = engine_python or sys.executable
    ran = _Ran(
        engine=chosen,
        python=python,
        version=ENGINES[chosen].version(python, untested) if chosen in IN_PROCESSES else version("torch"),
        compile=compile,
        fp8=fp8,
        split=Split(tensor_parallel, slice_of),
        scenarios=[(batch, prompt) for prompt in prompt_lengths for batch in batch_sizes],
        new_tokens=new_tokens,
        repeats=repeats,
        timeout=timeout,
    )
    settings = {name: value for name, value in asdict(ran).items() if name not in ("python", "timeout")}
    if shape:
        source = _shape(shape)
        dtype = DTYPES.get(machine.dtype, torch.bfloat16)
        identity: dict[str, Any] = {"shape": source.config, "plan": plan or source.plan}
    else:
        folders = [resolve_model(name) for name in models]
        dtype = pick_dtype(machine, folders[0].checkpoint)
        identity = {"models": [folder.fingerprint for folder in folders], "names": labels(models)}

    def work(folder: StageFolder) -> tuple[BenchResult, Environment]:
        if shape:
            entered = _steps(shape, source, plan, folder.state / "models")
        else:
            steps = ["parent", *["student"] * (len(folders) - 1)]
            plans = [str(own.plan) for own in folders]
            entered = list(map(_Model, labels(models), steps, plans, folders))
        for one in entered:
            check_tensor_parallel(one.folder, ran.split.devices)
        return ran.result(entered, bool(shape), dtype, machine, folder.state / ANSWER), where(machine, dtype)

    inputs = {**identity, **settings, "dtype": str(dtype), "device": where(machine, dtype).device}
    return run_stage("bench", out, inputs, BenchResult, work)


@dataclass(frozen=True)
class _Ran:
    """How models are timed."""

    engine: Engine
    python: str
    version: str
    compile: Compile
    fp8: bool
    split: Split
    scenarios: list[tuple[int, int]]
    new_tokens: int
    repeats: int
    timeout: float

    def result(
        self, models: Sequence[_Model], random: bool, dtype: torch.dtype, machine: Machine, answer: Path
    ) -> BenchResult:
        costs = [cost_of(model.folder, dtype) for model in models]
        if self.engine in IN_PROCESSES:
            fault = self._contest(models, costs, random, dtype, pick_device(machine), answer)
        else:
            fault = self._race(models, random, dtype, machine, answer)
        # In FP8 every value counts as one byte, which is the least that moves.
        counted = [replace(cost, bytes_per_value=1) if self.fp8 else cost for cost in costs]
        subjects = [Subject(m.name, m.step, m.plan, cost) for m, cost in zip(models, counted, strict=True)]
        site, laps = read_laps(answer)
        failures = failures_of(subjects, site, laps, self.scenarios, fault)
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
            how=f"{' or '.join(hows)}, with a cache of fixed size{self._compiled}",
            engine=self.engine,
            engine_version=self.version,
            tensor_parallel=self.split.ranks,
            slice=self.split.slices,
            dtype="fp8" if self.fp8 else str(dtype).removeprefix("torch."),
            device_gb=site.device_gb,
            failures=failures,
        )

    @property
    def _compiled(self) -> str:
        return {"off": "", "on": ", compiled", "tuned": ", compiled and tuned"}[self.compile]

    def _race(self, models: Sequence[_Model], random: bool, dtype: torch.dtype, machine: Machine, answer: Path) -> str:
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
        models: Sequence[_Model],
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
            device=device,
        )
        hold_contest(contest, answer)
        return ""


def cost_of(folder: ModelFolder, dtype: torch.dtype) -> Cost:
    """Counts of a model folder, which may hold a configuration alone."""
    sizes = {name: prod(shape) for name, shape in expected_specs(folder.config)[0].items()}
    embedding = 0 if folder.config.tie_word_embeddings else sizes["model.embed_tokens.weight"]
    return Cost(folder.shapes, sum(sizes.values()), embedding, folder.head_dim, dtype.itemsize)


def _check_options(
    engine: Engine,
    models: Sequence[str],
    shape: str | None,
    plan: str | None,
    compile: Compile,
    split: Split,
    machine: Machine,
) -> None:
    """`UserError` for options that do not go together."""
    wrong = {
        "name models to time, or a --shape, not both": bool(models) == bool(shape),
        "--plan is the student's on a --shape; build it with `fuse` to time it with its weights": plan and not shape,
        f"--shape has random weights, which are timed in torch and vllm, not in {engine}": shape
        and engine not in ("torch", "vllm"),
        f"--tensor-parallel is for torch and vllm, not for {engine}": split.ranks > 1
        and engine not in ("torch", "vllm"),
        "--slice times one rank alone, in torch; leave out --tensor-parallel or --engine": split.slices > 1
        and (split.ranks > 1 or engine != "torch"),
        f"--compile is for torch, not for {engine}": compile != "off" and engine != "torch",
        "--device balanced spreads a model over GPUs by transformers; choose --engine transformers": machine.device
        == "balanced"
        and engine != "transformers",
    }
    found = next((text for text, applies in wrong.items() if applies), None)
    if found:
        raise UserError(found)


def _shape(name: str) -> Shape:
    """A named shape, or a config.json as one."""
    path = Path(name).expanduser()
    path = path / "config.json" if path.is_dir() else path
    return Shape(read_json(path)) if path.is_file() else shape_of(name)


def _steps(name: str, shape: Shape, plan: str | None, state: Path) -> list[_Model]:
    """The parent of a shape, its student with nothing fused, and fused, as folders without weights."""
    parent = _folder(state / "parent", shape.config)
    wanted = plan or shape.plan
    steps = steps_of(parent.plan, read_plan(wanted, parent) if wanted else None)
    models = []
    for step, own in steps.items():
        folder = parent
        if step != "parent":
            folder = _folder(state / step, student_config(parent, own).to_dict())
            copy_companions(parent.folder, folder.folder)
        # A path is long, and all steps have the same.
        label = Path(name).name if Path(name).exists() else name
        models.append(_Model(f"{label}, {step}", step, str(own), folder))
    return models


def _folder(path: Path, config: Mapping[str, Any]) -> ModelFolder:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return ModelFolder(path)
