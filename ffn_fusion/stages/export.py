"""`export`: student → what an engine loads, tried in that engine on request."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ffn_fusion.core.engine_records import EngineCheck, ExportResult
from ffn_fusion.errors import UserError
from ffn_fusion.folder import RECORD, Environment, Record, StageFolder, environment, run_stage, write_atomically
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.resolve import load_tokenizer, resolve_model
from ffn_fusion.serving.engines import ENGINES, Installed
from ffn_fusion.serving.parallel import check_tensor_parallel
from ffn_fusion.serving.target import Target
from ffn_fusion.serving.targets import AS_IT_IS, TARGETS
from ffn_fusion.serving.verify import verify as verify_in
from ffn_fusion.settings import Positive

LATER = ".verify"
"""Folder inside a finished export for what an engine is asked and says; it stays if the engine fails."""


def export(
    student: str | None = None,
    *,
    to: str | None = None,
    out: Path | None = None,
    list_: Annotated[bool, Parameter(name="--list", negative="")] = False,
    dtype: str | None = None,
    tensor_parallel: Positive = 1,
    verify: bool = False,
    engine: str | None = None,
    engine_python: str = sys.executable,
    untested: bool = False,
) -> Record[ExportResult] | str:
    """Turn a student into what an engine loads; --list shows the targets, and which of them take this student.

    Parameters
    ----------
    student
        Folder that `fuse` made.
    to
        Target: hf, folded, mlx, gguf, onnx, openvino or megatron.
    out
        New folder.
    list_
        List the targets and stop.
    dtype
        Of the exported weights; without it, the target's first.
    tensor_parallel
        Number of devices that the engine will split the model over; sizes that do not divide are refused.
    verify
        Run the export in its engine and compare logits and greedy tokens with the student in float32.
    engine
        Engine to verify in; without it, the target's first. A finished export can be verified in another one later.
    engine_python
        Python that has the engine, if it is not this one.
    untested
        Go on with an engine version outside the tested range.
    """
    model = resolve_model(student) if student else None
    if list_:
        return "\n".join(_listed(model))
    if model is None or to is None or out is None:
        raise UserError("say what, to which target and where: export STUDENT --to TARGET --out DIR (or --list)")
    target = _target(to)
    weights = _checked(model, target, dtype, tensor_parallel)
    installed = None
    if verify or engine:
        installed = _installed(target, model, engine, engine_python, untested, tensor_parallel)
    inputs = {"model": model.fingerprint, "to": to, "dtype": weights, "tensor_parallel": tensor_parallel}

    def check(folder: Path, engine: Installed, state: Path) -> EngineCheck:
        exact = weights in (AS_IT_IS, "f32")
        return verify_in(model, load_tokenizer(model), folder, engine, state=state, exact=exact)

    def work(folder: StageFolder) -> tuple[ExportResult, Environment]:
        target.write(model, folder.path, weights)
        size = sum(path.stat().st_size for path in folder.path.iterdir() if path.is_file())
        checks = [check(folder.path, installed, folder.state)] if installed else []
        return ExportResult(str(student), to, weights, size, checks), environment("cpu", weights)

    record = run_stage("export", out, inputs, ExportResult, work)
    if installed is None or installed.name in [found.engine for found in record.result.checks]:
        return record
    return _checked_later(record, out, lambda state: check(out, installed, state))


def _checked_later(
    record: Record[ExportResult], out: Path, check: Callable[[Path], EngineCheck]
) -> Record[ExportResult]:
    """Add the check of one more engine to a finished export, which is not written again and outlives a failure."""
    state = out / LATER
    state.mkdir(exist_ok=True)
    checks = [*record.result.checks, check(state)]
    record = replace(record, result=replace(record.result, checks=checks))
    write_atomically(out / RECORD, json.dumps(asdict(record), indent=1))
    shutil.rmtree(state)
    return record


def _listed(student: ModelFolder | None) -> Iterator[str]:
    for target in TARGETS.values():
        about = [f"dtype {', '.join(target.dtypes)}"]
        about += [f"run in {', '.join(target.engines)}"] if target.engines else []
        about += [f"said to load in {', '.join(target.read_by)}"] if target.read_by else []
        if student:
            reason = _why_not(student, target)
            about.append(f"not for {student.folder}: {reason}" if reason else f"takes {student.folder}")
            about += [f"but {found}" for found in _obstacles(student, target)] if not reason else []
        yield "\n".join([f"{target.name:9} {target.help}", *(f"{'':9} {line}" for line in about)])


def _obstacles(student: ModelFolder, target: Target) -> Iterator[str]:
    """Why engines that load a target would not compute a student, one reason each."""
    for engine in (*target.engines, *target.read_by):
        found = target.why_not_in(student, engine)
        if found:
            yield found


def _target(name: str) -> Target:
    if name not in TARGETS:
        raise UserError(f"there is no target {name!r}; there are {', '.join(TARGETS)}")
    return TARGETS[name]


def _why_not(student: ModelFolder, target: Target) -> str | None:
    """Why a student cannot be exported: no plan makes it, as without attention in layer 0, or the target's reason."""
    try:
        student.check_plan(student.plan)
    except UserError as error:
        return str(error)
    return target.why_not(student)


def _checked(student: ModelFolder, target: Target, dtype: str | None, tensor_parallel: int) -> str:
    """The dtype to export in; `UserError` for what the target or its engines cannot take."""
    reason = _why_not(student, target)
    if reason:
        raise UserError(f"{student.folder} cannot be exported to {target.name}: {reason}")
    if dtype is not None and dtype not in target.dtypes:
        raise UserError(f"{target.name} is not written in {dtype!r}; there are {', '.join(target.dtypes)}")
    check_tensor_parallel(student, tensor_parallel)
    return dtype or target.dtypes[0]


def _installed(
    target: Target, student: ModelFolder, name: str | None, python: str, untested: bool, tensor_parallel: int
) -> Installed:
    """The engine to verify in; `UserError` if it does not read the target or this student, or is not there."""
    if not target.engines:
        raise UserError(f"no engine that reads {target.name} can be run here, so it cannot be verified")
    if name is not None and name not in target.engines:
        raise UserError(f"{target.name} is not verified in {name!r}; there are {', '.join(target.engines)}")
    engine = ENGINES[name or target.engines[0]]
    obstacle = target.why_not_in(student, engine.name)
    if obstacle:
        raise UserError(f"{student.folder} cannot be verified: {obstacle}")
    options = {"tensor_parallel": tensor_parallel} if tensor_parallel > 1 else {}
    return Installed(engine, python, engine.version(python, untested), options)
