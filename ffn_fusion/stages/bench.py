"""`bench`: prefill and decode time of a parent and its students, interleaved in one engine, beside the limit."""

import sys
from collections.abc import Sequence
from importlib.metadata import version
from math import inf
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter

from ffn_fusion.core.bench_records import BenchResult
from ffn_fusion.core.laps import Split
from ffn_fusion.errors import UserError
from ffn_fusion.folder import Environment, Record, StageFolder, run_stage
from ffn_fusion.hf.machine import DTYPES, pick_device, pick_dtype, where
from ffn_fusion.hf.resolve import labels, resolve_model
from ffn_fusion.serving.engines import ENGINES
from ffn_fusion.serving.parallel import check_tensor_parallel
from ffn_fusion.settings import Above0, Machine, Positive
from ffn_fusion.speed.decode import Compile
from ffn_fusion.speed.ranks import check_ranks
from ffn_fusion.stages.entrants import named, of_shape, read_shape
from ffn_fusion.stages.timekeeper import ANSWER, IN_PROCESSES, Engine, Timekeeper


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
    time_limit: Above0 = inf,
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
    time_limit
        Seconds after which no other batch size or prompt is begun; the record says which are missing.
    engine_python
        Python that has the engine, if it is not this one.
    untested
        Go on with an engine version outside the tested range.
    """
    if engine == "auto":
        engine = "transformers" if machine.device == "balanced" else "torch"
    python = engine_python or sys.executable
    scenarios = [(batch, prompt) for prompt in prompt_lengths for batch in batch_sizes]
    split = Split(tensor_parallel, slice_of)
    keeper = Timekeeper(engine, python, compile, fp8, split, scenarios, new_tokens, repeats, timeout, time_limit)
    _check(keeper, models, shape, plan, machine)
    check_ranks(tensor_parallel, pick_device(machine))
    tested = ENGINES[engine].version(python, untested) if engine in IN_PROCESSES else version("torch")
    inputs: dict[str, Any] = keeper.settings | {"version": tested}
    if shape:
        source = read_shape(shape)
        dtype = DTYPES.get(machine.dtype, torch.bfloat16)
        inputs |= {"shape": source.config, "plan": plan or source.plan}
    else:
        folders = [resolve_model(name) for name in models]
        dtype = pick_dtype(machine, folders[0].checkpoint)
        inputs |= {"models": [folder.fingerprint for folder in folders], "names": labels(models)}
    here = where(machine, dtype)

    def work(folder: StageFolder) -> tuple[BenchResult, Environment]:
        entered = of_shape(shape, source, plan, folder.state / "models") if shape else named(models, folders)
        for entrant in entered:
            check_tensor_parallel(entrant.folder, split.devices)
        result = keeper.result(entered, bool(shape), dtype, machine, folder.state / ANSWER, tested)
        return result, where(machine, dtype)

    return run_stage("bench", out, inputs | {"dtype": str(dtype), "device": here.device}, BenchResult, work)


def _check(keeper: Timekeeper, models: Sequence[str], shape: str | None, plan: str | None, machine: Machine) -> None:
    """`UserError` for options that do not go together."""
    engine, split = keeper.engine, keeper.split
    splits = engine in ("torch", "vllm")
    balanced = machine.device == "balanced"
    rules = {
        "name models to time, or a --shape, and not both": bool(models) != bool(shape),
        "--plan is the student's on a --shape; `fuse` builds it with weights": not plan or bool(shape),
        f"--shape has random weights, which torch and vllm take, not {engine}": not shape or splits,
        f"--tensor-parallel is for torch and vllm, not for {engine}": split.ranks == 1 or splits,
        f"--slice is for torch, not for {engine}": split.slices == 1 or engine == "torch",
        "--slice times one rank alone; leave out --tensor-parallel": 1 in (split.slices, split.ranks),
        f"--compile is for torch, not for {engine}": keeper.compile == "off" or engine == "torch",
        "--fp8 is for vllm on a GPU": not keeper.fp8 or (engine == "vllm" and machine.device != "cpu"),
        "llama.cpp is timed at batch 1; say --batch-sizes 1": engine != "llama.cpp" or keeper.batch_sizes == [1],
        "--device balanced spreads a model by transformers; choose --engine transformers": not balanced
        or engine == "transformers",
    }
    broken = next((rule for rule, holds in rules.items() if not holds), None)
    if broken:
        raise UserError(broken)
