"""Times models in engines of their own processes, turn by turn: a started engine answers one question at a time.

An engine that is silent for too long is killed with all that it started; the others go on.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ffn_fusion.core.bench_records import Lap, Site, Timed
from ffn_fusion.core.cost import Cost
from ffn_fusion.core.laps import NOT_BEGUN
from ffn_fusion.errors import UserError
from ffn_fusion.hf.model import ModelFolder, copy_companions, student_config
from ffn_fusion.progress import track
from ffn_fusion.serving import gguf_file, probes
from ffn_fusion.serving.engines import reason_in
from ffn_fusion.serving.hf import check_engine
from ffn_fusion.speed.race import append_answer, copy_bandwidth, read_laps

GGUF = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
OVERHEAD, PER_TOKEN = 8e9, 200e3
"""Bytes that vLLM takes beside weights and cache: always, and for each token of a prefill."""
SHARE = 0.9
"""Of a GPU's memory, for all engines that run on it at once."""
ALONE = "one model after the other: their memory does not suffice for all at once"


@dataclass(frozen=True)
class Contest:
    """Models in an engine: their folders, with configurations only where weights shall be `random`, and counts."""

    engine: str
    python: str
    folders: Sequence[ModelFolder]
    costs: Sequence[Cost]
    random: bool
    dtype: torch.dtype
    fp8: bool
    ranks: int
    scenarios: Sequence[tuple[int, int]]
    """Batch sizes and prompt lengths."""
    new_tokens: int
    repeats: int
    timeout: float
    time_limit: float
    device: torch.device

    @property
    def script(self) -> Path:
        return Path(probes.__file__).parent / f"{self.engine.replace('.', '_')}_latency_probe.py"

    @property
    def max_length(self) -> int:
        return max(prompt for _, prompt in self.scenarios) + self.new_tokens + 16

    @property
    def max_tokens(self) -> int:
        """Of a prefill: all prompts of a batch at once."""
        return max(max(batch * prompt for batch, prompt in self.scenarios), self.max_length)

    def bytes_of(self, cost: Cost) -> float:
        """What an engine needs of each device."""
        batch = max(batch for batch, _ in self.scenarios)
        held = cost.memory_bytes(batch, self.max_length) / self.ranks
        return 1.05 * held + OVERHEAD + PER_TOKEN * self.max_tokens


class EngineError(Exception):
    """An engine that failed or was killed, in words."""


class Process:
    """An engine at work on one model."""

    def __init__(self, contest: Contest, request: Mapping[str, Any], state: Path) -> None:
        asked, self.log, self.timeout = state / "request.json", state / "engine.log", contest.timeout
        asked.write_text(json.dumps(request), encoding="utf-8")
        # A session of its own, so that the processes which it starts end with it.
        with self.log.open("w") as log:
            self.child = subprocess.Popen(
                [contest.python, str(contest.script), str(asked)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._answer("did not start")

    def ask(self, batch_size: int, prompt_length: int, new_tokens: int) -> tuple[float, float]:
        """Milliseconds of a prefill and of a decode step."""
        asked = {"batch_size": batch_size, "prompt_length": prompt_length, "new_tokens": new_tokens}
        assert self.child.stdin
        try:
            self.child.stdin.write(json.dumps(asked) + "\n")
            self.child.stdin.flush()
        except OSError:
            self.end()
            raise EngineError(self._reason()) from None
        timed = self._answer("gave no answer")
        return timed["prefill_ms"], timed["decode_ms"]

    def _answer(self, what: str) -> dict[str, Any]:
        assert self.child.stdout
        ready, _, _ = select.select([self.child.stdout], [], [], self.timeout)
        if not ready:
            self.end()
            raise EngineError(f"{what} within {self.timeout:.0f} seconds and was killed")
        line = self.child.stdout.readline()
        if not line:
            self.end()
            raise EngineError(self._reason())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _reason(self) -> str:
        return f"failed: {reason_in(self.log)[:300]}"

    def end(self) -> None:
        """Kill the engine and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
        for pipe in (self.child.stdin, self.child.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


@dataclass
class _Column:
    """One model in one scenario: the times of its repeats, and what went wrong."""

    times: list[tuple[float, float]] = field(default_factory=list)
    reason: str = ""


def hold_contest(contest: Contest, answer: Path) -> None:
    """Run every lap that the answer does not hold yet and write it there, as a race does."""
    start = time.monotonic()
    known = {(lap.batch_size, lap.prompt_length) for lap in read_laps(answer)[1]}
    scenarios = [scenario for scenario in contest.scenarios if scenario not in known]
    state, number = answer.parent / "engines", len(contest.folders)
    on_gpu = contest.device.type == "cuda"
    total = torch.cuda.get_device_properties(contest.device).total_memory if on_gpu else None
    site = Site(copy_bandwidth(contest.device) / 1e9, total and total / 1e9, [None] * number, [""] * number)
    if on_gpu:
        # The engines need the memory of the copy.
        torch.cuda.empty_cache()
    needs = [contest.bytes_of(cost) for cost in contest.costs]
    fitting = _fitting(needs, total, site.reasons)
    together = total is None or sum(needs[index] for index in fitting) <= SHARE * total
    shares = [need / total if total and together else SHARE for need in needs]
    columns = {scenario: [_Column() for _ in range(number)] for scenario in scenarios}
    for turn in [fitting] if together else [[index] for index in fitting]:
        with _started(contest, {index: shares[index] for index in turn}, state, site.reasons) as engines:
            if together:
                append_answer(answer, "site", site)
            for scenario in scenarios:
                if time.monotonic() - start > contest.time_limit:
                    for index in turn:
                        columns[scenario][index].reason = NOT_BEGUN
                    continue
                _lap(contest, scenario, engines, columns[scenario])
                if together:
                    append_answer(answer, "lap", _finished(contest, scenario, columns[scenario], ""))
    if not together:
        append_answer(answer, "site", site)
        for scenario in scenarios:
            append_answer(answer, "lap", _finished(contest, scenario, columns[scenario], ALONE))


def _fitting(needs: Sequence[float], total: int | None, reasons: list[str]) -> list[int]:
    """The models that fit onto a device by themselves; the others get their reason."""
    for index, need in enumerate(needs):
        if total and need > total:
            reasons[index] = f"does not fit: needs {need / 1e9:,.1f} GB on each device, which has {total / 1e9:,.1f}"
    return [index for index, reason in enumerate(reasons) if not reason]


@contextlib.contextmanager
def _started(
    contest: Contest, shares: Mapping[int, float], state: Path, reasons: list[str]
) -> Iterator[dict[int, Process]]:
    """The engines of these models, each with its share of the memory; what fails to start leaves its reason."""
    engines: dict[int, Process] = {}
    try:
        for index, share in track(shares.items(), f"bench: starting {contest.engine}", len(shares)):
            folder = state / str(index)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                engines[index] = Process(contest, _request(contest, index, share, folder), folder)
            except EngineError as fault:
                reasons[index] = f"{contest.engine} {fault}"
        yield engines
    finally:
        for engine in engines.values():
            engine.end()


def _request(contest: Contest, index: int, share: float, folder: Path) -> dict[str, Any]:
    model = contest.folders[index]
    if contest.engine == "vllm":
        check_engine(model, "vllm")
    return {
        "model": str(_gguf(model, contest.dtype, folder) if contest.engine == "llama.cpp" else model.folder.resolve()),
        "random": contest.random,
        "dtype": str(contest.dtype).removeprefix("torch."),
        "fp8": contest.fp8,
        "ranks": contest.ranks,
        "on_gpu": contest.device.type == "cuda",
        "batch_sizes": sorted({batch for batch, _ in contest.scenarios}),
        "max_length": contest.max_length,
        "max_tokens": contest.max_tokens,
        "memory_share": share,
        "threads": torch.get_num_threads(),
        "vocabulary": model.config.vocab_size,
    }


def _gguf(model: ModelFolder, dtype: torch.dtype, folder: Path) -> Path:
    """The model as a GGUF file; a parent has the student's architecture there, so that both run the same code."""
    if model.arch.class_name != "DeciLMForCausalLM":
        model = _renamed(model, folder / "renamed")
    obstacle = gguf_file.why_not(model)
    if obstacle:
        raise UserError(f"{model.folder} cannot be timed in llama.cpp: {obstacle}")
    made = folder / f"model-{GGUF[dtype]}.gguf"
    if not made.is_file():
        gguf_file.write(model, folder, GGUF[dtype])
    return made


def _renamed(parent: ModelFolder, folder: Path) -> ModelFolder:
    """A parent in the student's layout: the same tensors under another configuration."""
    if not folder.is_dir():
        folder.mkdir()
        copy_companions(parent.folder, folder)
        for path in parent.folder.glob("*.safetensors*"):
            (folder / path.name).symlink_to(path.resolve())
        config = student_config(parent, parent.plan).to_dict()
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return ModelFolder(folder)


def _lap(contest: Contest, scenario: tuple[int, int], engines: dict[int, Process], columns: Sequence[_Column]) -> None:
    """Every repeat asks all engines one after the other; one that fails is out."""
    batch, prompt = scenario
    label = f"bench: {contest.engine}, batch {batch}, prompt {prompt}"
    for repeat in track(range(contest.repeats + 1), label, contest.repeats + 1):
        for index, engine in list(engines.items()):
            try:
                timed = engine.ask(batch, prompt, contest.new_tokens)
            except EngineError as fault:
                columns[index].reason = f"{contest.engine} {fault}"
                del engines[index]
            else:
                if repeat:  # the first is not timed
                    columns[index].times.append(timed)


def _finished(contest: Contest, scenario: tuple[int, int], columns: Sequence[_Column], note: str) -> Lap:
    eager = contest.engine == "vllm" and contest.device.type == "cpu"
    how = "; ".join(filter(None, ("eager" if eager else "as it is", note)))
    reasons = [_reason(contest, column) for column in columns]
    timed = [
        None if reason else Timed([p for p, _ in column.times], [d for _, d in column.times], how)
        for column, reason in zip(columns, reasons, strict=True)
    ]
    return Lap(*scenario, timed, reasons)


def _reason(contest: Contest, column: _Column) -> str:
    """Why a model has no times in a scenario; empty if it has."""
    if len(column.times) < contest.repeats:
        return column.reason or f"{contest.engine} had ended before"
    # A decode step is what a generation takes beyond its first token, so on a busy machine it can come out negative.
    if min(decode for _, decode in column.times) <= 0:
        return f"{contest.new_tokens} tokens took no longer than the prompt: too short to tell; raise --new-tokens"
    return ""
