"""`bench`: rows follow from what an engine times; what cannot be timed is told and spares the rest."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cattrs
import pytest
import torch
from conftest import BASE, STUDENT_PLAN
from reference import one_line

from ffn_fusion.core.bench_records import BenchResult, Lap, Ratio, Site, Spread, Timed, cost_ratios
from ffn_fusion.core.laps import Split, Subject, rows_of
from ffn_fusion.core.plan import Plan
from ffn_fusion.errors import UserError
from ffn_fusion.folder import read_record
from ffn_fusion.serving import latency
from ffn_fusion.serving.engines import Engine
from ffn_fusion.settings import Machine
from ffn_fusion.speed import race
from ffn_fusion.speed.decode import DecodeStep
from ffn_fusion.speed.ranks import Ranks
from ffn_fusion.speed.sublayers import Rank
from ffn_fusion.stages import timekeeper
from ffn_fusion.stages.bench import bench
from ffn_fusion.stages.entrants import cost_of, of_shape, read_shape

Parents = Callable[[str], Path]
CALL: dict[str, Any] = {"batch_sizes": (1, 2), "prompt_lengths": (8,), "new_tokens": 4, "repeats": 2}
FP32 = Machine(dtype="fp32")
CONFIG = BASE | {"model_type": "llama", "hidden_size": 64, "intermediate_size": 512}
PLAN = "A0F0 A1F1+2 -F3:256 A4 A5F5"


def clock(step: DecodeStep, times: int = 1, meet: object = None) -> float:
    """A clock that counts what a call reads, in thousands of values."""
    if not isinstance(step, DecodeStep):
        return 1.0
    weights = sum(w.numel() for part in (*step.decoder.sublayers, step.decoder.head) for w in tensors(part))
    return (weights + sum(cache.keys.numel() + cache.values.numel() for cache in step.caches)) / 1e3


def tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    return [w for part in module.modules() for w in vars(part).values() if isinstance(w, torch.Tensor)]


@pytest.fixture
def shape(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path / "config.json")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "elapsed_ms", clock)


@pytest.mark.usefixtures("counted")
def test_a_shape_is_timed_in_its_three_steps(shape: str, tmp_path: Path) -> None:
    result = bench(shape=shape, plan=PLAN, out=tmp_path / "out", machine=FP32, **CALL).result
    assert [model.step for model in result.models] == ["parent", "searched", "fused"]
    assert [model.plan for model in result.models[1:]] == [str(Plan.parse(PLAN).unfused()), PLAN]
    # An attention without FFN has one of 256 zeros behind it.
    assert [model.num_sublayers for model in result.models] == [12, 10, 9]
    assert [(row.model, row.batch_size) for row in result.rows] == [
        (f"config.json, {step}", batch) for batch in (1, 2) for step in ("parent", "searched", "fused")
    ]
    parent, searched, fused = result.rows[:3]
    assert parent.ratio is None
    assert fused.ratio
    assert fused.ratio.value == pytest.approx(parent.decode_ms.median / fused.decode_ms.median)
    assert fused.ratio.low <= fused.ratio.value <= fused.ratio.high
    assert fused.fusion
    assert fused.fusion.value == pytest.approx(searched.decode_ms.median / fused.decode_ms.median)
    assert (parent.fusion, searched.fusion) == (None, None)
    # What the clock counts in thousands of float32 is what the row says must move.
    assert searched.decode_ms.median * 4e3 == pytest.approx(searched.step_bytes, rel=1e-3)
    assert [model.kv_bytes_measured for model in result.models] == [m.kv_bytes_per_token for m in result.models]
    assert (result.engine, result.dtype, parent.all_reduces, parent.kernels) == ("torch", "float32", 0, None)
    assert result.rows[3].prompt_length == 8
    assert read_record(tmp_path / "out", BenchResult).result == result
    assert "config.json, fused" in result.summary()


@pytest.mark.usefixtures("counted")
def test_a_slice_is_one_rank_alone(shape: str, tmp_path: Path) -> None:
    whole = bench(shape=shape, plan=PLAN, out=tmp_path / "whole", machine=FP32, **CALL).result
    part = bench(shape=shape, plan=PLAN, slice_of=2, out=tmp_path / "part", machine=FP32, **CALL).result
    assert part.rows[0].step_bytes == whole.rows[0].step_bytes // 2
    assert part.rows[0].decode_ms.median == pytest.approx(whole.rows[0].decode_ms.median / 2, rel=0.02)
    assert [m.kv_bytes_measured for m in part.models] == [m.kv_bytes_per_token for m in whole.models]
    assert part.devices == 2
    assert part.rows[0].all_reduces == 0


def test_ranks_reduce_once_a_sublayer(shape: str, tmp_path: Path) -> None:
    result = bench(shape=shape, plan=PLAN, tensor_parallel=2, out=tmp_path / "out", machine=FP32, **CALL).result
    assert [row.all_reduces for row in result.rows] == [12, 10, 9] * 2
    assert [m.kv_bytes_measured for m in result.models] == [m.kv_bytes_per_token for m in result.models]
    assert all(row.decode_ms.median > 0 for row in result.rows)


@pytest.mark.usefixtures("counted")
def test_students_with_weights_are_compared_with_their_parent(
    tiny_parent: Parents, tiny_student: Parents, tmp_path: Path
) -> None:
    models = (str(tiny_parent("llama")), str(tiny_student("llama")))
    result = bench(*models, out=tmp_path / "out", **CALL).result
    assert [model.step for model in result.models] == ["parent", "student"]
    assert len(result.rows) == 4
    assert result.rows[1].ratio
    assert result.models[1].num_blocks == len(Plan.parse(STUDENT_PLAN).blocks)


@pytest.mark.usefixtures("counted")
def test_what_does_not_fit_says_how_much_it_needs(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {
        m.step: m.weight_bytes
        for m in bench(shape=shape, plan=PLAN, out=tmp_path / "1", machine=FP32, **CALL).result.models
    }
    monkeypatch.setattr(race, "available", lambda _: (sizes["parent"] + sizes["searched"]) / 2 / race.ROOM)
    result = bench(shape=shape, plan=PLAN, out=tmp_path / "2", machine=FP32, **CALL).result
    assert [row.model.split()[-1] for row in result.rows] == ["searched", "fused"] * 2
    assert {row.ratio for row in result.rows} == {None}
    assert len(result.failures) == 1
    assert "does not fit: needs 0.0 GB on each device" in result.failures[0].reason
    monkeypatch.setattr(race, "available", lambda _: 1000.0)
    one_line(lambda: bench(shape=shape, plan=PLAN, out=tmp_path / "3", machine=FP32, **CALL), "does not fit")


@pytest.mark.usefixtures("counted")
def test_a_model_that_runs_out_of_memory_is_left_out(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def warm_up(step: DecodeStep) -> None:
        if len(step.decoder.sublayers) == 10 and len(step.ids) == 2:
            raise torch.OutOfMemoryError
        done.append("warm")

    monkeypatch.setattr(DecodeStep, "warm_up", warm_up)
    monkeypatch.setattr(DecodeStep, "capture", lambda *_: done.append("captured"))
    result = bench(shape=shape, plan=PLAN, out=tmp_path / "out", machine=FP32, **CALL).result
    assert [row.model.split()[-1] for row in result.rows] == ["parent", "searched", "fused", "parent", "fused"]
    assert [(f.batch_size, f.reason.split(":")[0]) for f in result.failures] == [(2, "out of memory")]
    # A warm-up behind a capture would need memory beside the graph's.
    assert done == ["warm"] * 6 + ["captured"] * 6 + ["warm"] * 4 + ["captured"] * 4


def test_a_killed_bench_goes_on_with_the_next_lap(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []

    def stopping(step: DecodeStep, *_: object) -> float:
        if isinstance(step, DecodeStep):
            batches.append(len(step.ids))
            if len(step.ids) == 2 and stop:
                raise KeyboardInterrupt
        return clock(step)

    stop = True
    monkeypatch.setattr(race, "elapsed_ms", stopping)
    with pytest.raises(KeyboardInterrupt):
        bench(shape=shape, out=tmp_path / "out", machine=FP32, **CALL)
    stop = False
    batches.clear()
    result = bench(shape=shape, out=tmp_path / "out", machine=FP32, **CALL).result
    assert set(batches) == {2}
    assert [row.batch_size for row in result.rows] == [1, 2]


@pytest.mark.usefixtures("counted")
def test_when_time_is_up_the_rows_so_far_are_kept(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 1.0, 9.0])
    monkeypatch.setattr(race, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    result = bench(shape=shape, out=tmp_path / "out", time_limit=5.0, machine=FP32, **CALL).result
    assert [row.batch_size for row in result.rows] == [1]
    assert [(f.batch_size, f.reason) for f in result.failures] == [(2, "not begun: --time-limit was reached")]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "name models to time, or a --shape"),
        ({"shape": "llama-9b"}, "no shape 'llama-9b'; there are smollm2-135m, llama-3.1-8b"),
        ({"shape": "llama-3.1-8b", "engine": "llama.cpp"}, "take, not llama.cpp"),
        ({"shape": "llama-3.1-8b", "slice_of": 2, "tensor_parallel": 2}, "--slice times one rank alone"),
        ({"shape": "llama-3.1-8b", "engine": "vllm", "compile": "on"}, "--compile is for torch"),
        ({"shape": "llama-3.1-8b", "machine": Machine(device="balanced"), "engine": "torch"}, "--device balanced"),
        ({"shape": "llama-3.1-8b", "fp8": True}, "--fp8 is for vllm on a GPU"),
        ({"shape": "llama-3.1-8b", "machine": Machine(device="cuda")}, "torch sees no GPU here"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    if torch.cuda.is_available() and "GPU" in says:
        pytest.skip("there is a GPU")
    one_line(lambda: bench(out=tmp_path / "out", **options), says)


def test_a_plan_is_for_shapes_and_llama_cpp_for_one_sequence(tiny_parent: Parents, tmp_path: Path) -> None:
    model = str(tiny_parent("llama"))
    one_line(lambda: bench(model, plan=PLAN, out=tmp_path / "out"), "--plan is the student's on a --shape")
    one_line(lambda: bench(model, engine="llama.cpp", out=tmp_path / "out"), "llama.cpp is timed at batch 1")
    one_line(lambda: bench(model, tensor_parallel=3, out=tmp_path / "out"), "does not split over 3 devices")


ENGINE = """
import json, sys, time
request = json.load(open(sys.argv[1]))
name = request["model"].split("/")[-1]
if name == "searched" and FAILS == "start":
    sys.exit("ValueError: no such engine")
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if name == "searched" and FAILS == "hang" and asked["batch_size"] == 2:
        time.sleep(60)
    ms = {"parent": 4.0, "searched": 3.0, "fused": 2.0}[name] * asked["batch_size"]
    lost = name == "searched" and FAILS == "noise" and asked["batch_size"] == 2
    print(json.dumps({"prefill_ms": 10 * ms, "decode_ms": -0.1 if lost else ms}), flush=True)
"""


@pytest.mark.parametrize("fails", ["", "start", "hang", "noise"])
def test_an_engine_that_fails_or_hangs_spares_the_other_rows(
    fails: str, shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "engine.py").write_text(f"FAILS = {fails!r}\n{ENGINE}")
    monkeypatch.setattr(latency.Contest, "script", tmp_path / "engine.py")
    monkeypatch.setattr(Engine, "version", lambda *_: "0.26.0")
    result = bench(
        shape=shape, plan=PLAN, engine="vllm", timeout=5, engine_python=sys.executable, out=tmp_path / "out", **CALL
    ).result
    timed = {(row.model.split()[-1], row.batch_size): row for row in result.rows}
    assert timed["fused", 2].ratio == Ratio(2.0, 2.0, 2.0)
    assert timed["fused", 1].decode_ms == Spread(2.0, 2.0, 2.0)
    said = {
        "": [],
        "start": ["vllm failed: ValueError: no such engine"],
        "hang": ["vllm gave no answer within 5 seconds and was killed"],
        "noise": [f"{CALL['new_tokens']} tokens took no longer than the prompt: too short to tell; raise --new-tokens"],
    }
    assert [failure.reason for failure in result.failures] == said[fails]
    one = {("searched", 2)}
    missing = {"": set(), "start": {("searched", 1), *one}, "hang": one, "noise": one}
    every = {(step, batch) for step in ("parent", "searched", "fused") for batch in (1, 2)}
    assert every - timed.keys() == missing[fails]


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="processes are looked up in /proc")
def test_an_engine_that_dies_between_questions_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "engine.py").write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen(['sleep', '60'], stdin=subprocess.DEVNULL)\n"
        "sys.stdin.close()\n"
        "print('{}', flush=True)\n"
        "sys.exit('RuntimeError: it broke')\n"
    )
    contest: Any = SimpleNamespace(python=sys.executable, script=tmp_path / "engine.py", timeout=20)
    engine = latency.Process(contest, {}, tmp_path)
    engine.child.wait()
    assert is_running(engine.child.pid)
    with pytest.raises(latency.EngineError, match="it broke"):
        engine.ask(1, 8, 4)
    deadline = time.monotonic() + 10
    while is_running(engine.child.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(group: int) -> bool:
    """Whether a group has processes that have not ended; a zombie has."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, own = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # ended meanwhile
            continue
        if int(own) == group and state != "Z":
            return True
    return False


def test_engines_in_turn_say_what_they_had_no_time_for(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that has room for one of three, the first takes all the time."""
    (tmp_path / "engine.py").write_text(f"FAILS = ''\n{ENGINE}")
    monkeypatch.setattr(latency.Contest, "script", tmp_path / "engine.py")
    monkeypatch.setattr(latency, "copy_bandwidth", lambda _: 1e12)
    memory = SimpleNamespace(total_memory=int(1.2 * latency.OVERHEAD))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    seconds = iter([0.0, 1.0, 1.0])
    monkeypatch.setattr(latency, "time", SimpleNamespace(monotonic=lambda: next(seconds, 9.0)))
    models = [entrant.folder for entrant in of_shape(shape, read_shape(shape), PLAN, tmp_path / "models")]
    contest = latency.Contest(
        engine="vllm",
        python=sys.executable,
        folders=models,
        costs=[cost_of(model, torch.bfloat16) for model in models],
        random=True,
        dtype=torch.bfloat16,
        fp8=False,
        ranks=1,
        scenarios=[(1, 8), (2, 8)],
        new_tokens=4,
        repeats=2,
        timeout=20,
        time_limit=5,
        device=torch.device("cuda"),
    )
    latency.hold_contest(contest, tmp_path / "laps.jsonl")
    site, laps = race.read_laps(tmp_path / "laps.jsonl")
    assert site
    assert site.reasons == ["", "", ""]
    late = "not begun: --time-limit was reached"
    assert [lap.reasons for lap in laps] == [["", late, late]] * 2
    assert all(latency.ALONE in timed.how for lap in laps for timed in lap.timed if timed)


def test_ranks_that_hang_leave_the_laps_that_they_made(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hanging(_: str, order: dict[str, Any], *__: object) -> str:
        first = cattrs.structure(order["race"], race.Race)
        race.race(replace(first, scenarios=first.scenarios[:1]), Ranks(Rank(), torch.device("cpu")))
        raise UserError("timing on 2 ranks did not finish within 5 seconds")

    monkeypatch.setattr(timekeeper, "run_ranks", hanging)
    result = bench(shape=shape, tensor_parallel=2, out=tmp_path / "out", machine=FP32, **CALL).result
    assert [row.batch_size for row in result.rows] == [1]
    assert [(f.batch_size, f.reason) for f in result.failures] == [
        (2, "timing on 2 ranks did not finish within 5 seconds")
    ]
    # Nothing at all: the reason is the error.
    monkeypatch.setattr(race, "race", lambda *_: None)
    one_line(
        lambda: bench(shape=shape, tensor_parallel=2, out=tmp_path / "none", machine=FP32, **CALL), "did not finish"
    )


def lap(batch: int, *decode: list[float]) -> Lap:
    return Lap(batch, 8, [Timed([1.0] * len(ms), ms, "") for ms in decode], [""] * len(decode))


@pytest.mark.usefixtures("counted")
def test_ratios_are_paired_and_a_busy_device_is_marked(shape: str, tmp_path: Path) -> None:
    """A machine that slows down for all alike leaves the ratio alone, but not the times."""
    models = bench(shape=shape, plan=PLAN, out=tmp_path / "out", machine=FP32, **CALL).result
    subjects = [Subject(m.model, m.step, m.plan, _Cost()) for m in models.models[:2]]  # type: ignore[arg-type]
    site = Site(100.0, None, [None, None], ["", ""])
    drifting = [10.0, 12.0, 14.0, 16.0, 18.0]
    rows = rows_of(subjects, site, [lap(1, drifting, [ms / 2 for ms in drifting])], 4, Split())
    assert rows[1].ratio == Ratio(2.0, 2.0, 2.0)
    assert [row.is_busy for row in rows] == [True, True]
    quiet = rows_of(subjects, site, [lap(1, [10.0] * 5, [10.1, 9.9, 10.0, 10.0, 10.0])], 4, Split())
    assert [row.is_busy for row in quiet] == [False, False]


class _Cost:
    num_parameters, embedding_parameters, num_sublayers = 1000, 0, 10

    def decode_bytes(self, batch_size: int, context: int) -> int:
        return 1000

    def decode_flops(self, batch_size: int) -> float:
        return 2000.0


def test_cost_of_a_token_names_both_comparators(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed(step: DecodeStep, *_: object) -> float:
        """Batch 2 takes as long as batch 1, students two thirds of it."""
        return 3.0 if isinstance(step, DecodeStep) and len(step.decoder.sublayers) == 12 else 2.0

    monkeypatch.setattr(race, "elapsed_ms", fixed)
    result = bench(shape=shape, plan=PLAN, out=tmp_path / "out", machine=FP32, **CALL).result
    found = {
        (r.reading, r.dear.batch_size, r.cheap.model.split()[-1], r.cheap.batch_size): r.value
        for r in cost_ratios(result)
    }
    assert found["equal batch", 2, "fused", 2] == pytest.approx(1.5)
    assert found["different batches", 1, "fused", 2] == pytest.approx(3.0)
    assert found["different batches", 1, "parent", 2] == pytest.approx(2.0)
    assert not any(reading == "equal batch" and name == "parent" for reading, _, name, _ in found)
