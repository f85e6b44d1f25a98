"""Costs: counts against student folders, sums against a clock that counts, and the cache that steps are timed on."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, NUM_LAYERS, STUDENT_PLAN, save_tiny_parent
from reference import one_line
from transformers import DynamicCache

from ffn_fusion import cli
from ffn_fusion.core.bench_records import BenchResult
from ffn_fusion.core.cost import BlockShape, ParameterCounts, shapes_of
from ffn_fusion.core.cost_table import (
    Communication,
    CostTable,
    Measured,
    ModelFacts,
    Scenario,
    SublayerTime,
    Timing,
    check_table,
)
from ffn_fusion.core.plan import Plan
from ffn_fusion.errors import UserError
from ffn_fusion.folder import read_record
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.resolve import resolve_model
from ffn_fusion.speed import arena, timing
from ffn_fusion.speed.collectives import measure_communication
from ffn_fusion.speed.ranks import check_ranks
from ffn_fusion.speed.stacks import Stack, facts_of, read_costs
from ffn_fusion.speed.timing import Step
from ffn_fusion.stages.bench import bench
from ffn_fusion.stages.cost import cost
from ffn_fusion.stages.entrants import cost_of
from ffn_fusion.stages.plan import plan

Parents = Callable[[str], Path]
CPU = torch.device("cpu")
COUNTS = ParameterCounts(1_000, 400, 50, 20, 10, 3, 17, 16)
FACTS = ModelFacts("LlamaForCausalLM", 64, 4, 16, 128, None, 2, 200, COUNTS)


def timed(prefill: float, decode: float) -> Timing:
    return Timing(Measured(prefill, prefill, prefill), Measured(decode, decode, decode))


TABLE = CostTable(
    device="a device",
    dtype="bfloat16",
    bytes_per_value=2,
    torch="2.11",
    how="eager",
    scenario=Scenario(batch_size=2, prompt_length=10, new_tokens=6),
    tensor_parallel=1,
    facts=FACTS,
    num_layers=6,
    offset=timed(7.0, 1.0),
    rows=[
        SublayerTime("ffn", 400, 2, timed(8.0, 4.0)),
        SublayerTime("ffn", 100, 6, timed(3.0, 1.0)),
        SublayerTime("ffn", 200, 6, timed(5.0, 3.0)),
        SublayerTime("attention", 1, 6, timed(2.0, 0.5)),
        SublayerTime("attention", 2, 6, timed(2.5, 0.75)),
        SublayerTime("linear", 0, 6, timed(0.25, 0.125)),
    ],
    communication=Communication.none(),
)


def test_between_measured_widths_the_time_is_linear_and_beyond_them_too() -> None:
    expected = {100: 1.0, 150: 2.0, 200: 3.0, 300: 3.5, 400: 4.0, 800: 6.0, 60: 0.2, 1: 0.0}
    assert {width: TABLE.sublayer_ms("ffn", width, "decode") for width in expected} == pytest.approx(expected)
    assert TABLE.sublayer_ms("ffn", 300, "prefill") == 6.5
    assert (TABLE.sublayer_ms("attention", 2, "decode"), TABLE.sublayer_ms("attention", 1, "prefill")) == (0.75, 2.0)
    assert TABLE.extrapolated([BlockShape(2, 400), BlockShape(1, 100), BlockShape(0, 0, True)]) == []
    assert TABLE.extrapolated([BlockShape(4, 800)]) == [
        "4 kv heads (measured: 1 to 2)",
        "800 channels (measured: 100 to 400)",
    ]
    lonely = replace(TABLE, rows=TABLE.rows[:1])
    assert lonely.sublayer_ms("ffn", 400, "decode") == 4.0
    with pytest.raises(UserError, match="no ffn of size 200"):
        lonely.sublayer_ms("ffn", 200, "decode")


def test_a_model_is_its_offset_and_its_sublayers() -> None:
    shapes = [
        BlockShape(2, 200),
        BlockShape(0, 400),
        BlockShape(1, 0),
        BlockShape(0, 100, True),
        BlockShape(2, 0, False, True),
    ]
    assert TABLE.decode_ms(shapes) == 1.0 + (0.75 + 3.0) + 4.0 + 0.5 + (0.125 + 1.0) + (0.75 + 0.125)
    assert TABLE.prefill_ms(shapes) == 7.0 + (2.5 + 5.0) + 8.0 + 2.0 + (0.25 + 3.0) + (2.5 + 0.25)
    assert TABLE.request_ms(shapes) == TABLE.prefill_ms(shapes) + 6 * TABLE.decode_ms(shapes)
    assert TABLE.throughput(shapes) == pytest.approx(2 * 6 / (TABLE.request_ms(shapes) / 1e3))
    # Eight sublayers, and the embeddings; the logits are gathered once.
    split = replace(TABLE, communication=Communication(timed(10.0, 0.25), timed(0.5, 0.5)))
    assert split.decode_ms(shapes) == TABLE.decode_ms(shapes) + 9 * 0.25 + 0.5
    assert split.alone() == TABLE


def test_counts_come_from_one_place() -> None:
    shapes = [BlockShape(2, 200), BlockShape(0, 0, True, True)]
    own = TABLE.cost(shapes)
    assert own.num_parameters == 1_000 + (50 + 2 * 20) + (10 + 200 * 3) + 17 + 16
    assert own.weight_bytes == 2 * own.num_parameters
    assert own.kv_bytes_per_token == 2 * 2 * 16 * 2
    assert own.memory_bytes(3, 5) == own.weight_bytes + 15 * own.kv_bytes_per_token
    assert own.num_sublayers == 4
    assert own.num_attentions == 1


def test_a_time_is_the_lower_quartile_and_noise_hardly_moves_it() -> None:
    quiet = Measured.of([3.0, 3.0, 3.0, 3.0], [1.0, 1.0, 1.0, 1.0], parts=2)
    assert (quiet.ms, quiet.low, quiet.high) == (1.0, 1.0, 1.0)
    noisy = Measured.of([3.0, 90.0, 3.1, 70.0, 3.0, 3.0, 50.0, 3.0], [1.0] * 8, parts=2)
    assert noisy.ms == pytest.approx(1.0)
    assert noisy.low <= noisy.ms < noisy.high < 45


def test_shapes_of_a_plan() -> None:
    parent = [BlockShape(4, 96), BlockShape(2, 100), BlockShape(2, 300), BlockShape(4, 0), BlockShape(1, 96)]
    plan = Plan.parse("A0/2F0:40 A1F1+2:7 A3 -F4")
    assert shapes_of(plan.blocks, parent) == [
        BlockShape(2, 40),
        BlockShape(2, 107),
        BlockShape(4, 0),
        BlockShape(0, 96),
    ]
    assert [shape.ffn_width for shape in shapes_of(plan.blocks, parent, 64)] == [64, 128, 64, 128]


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_real_folders(family: str, tiny_parent: Parents, tiny_student: Parents) -> None:
    parent, student = ModelFolder(tiny_parent(family)), ModelFolder(tiny_student(family))
    table = replace(TABLE, facts=facts_of(parent), bytes_per_value=4)
    shapes = shapes_of(Plan.parse(STUDENT_PLAN).blocks, parent.shapes, 256)
    assert shapes == student.shapes
    for folder, own in ((parent, table.cost(parent.shapes)), (student, table.cost(shapes))):
        real = cost_of(folder, torch.float32)
        assert own.num_parameters == real.num_parameters
        assert own.kv_bytes_per_token == real.kv_bytes_per_token
        assert own.decode_bytes(3, 50) == real.decode_bytes(3, 50)


def test_tables_of_other_models_and_devices_are_refused() -> None:
    assert check_table(TABLE, FACTS, "a device", "bfloat16") == ""
    with pytest.raises(UserError, match="other shape: hidden size 64, here 128"):
        check_table(TABLE, replace(FACTS, hidden_size=128), "a device", "bfloat16", force=True)
    with pytest.raises(UserError, match="other parameters"):
        check_table(TABLE, replace(FACTS, counts=replace(COUNTS, channel=4)), "a device", "bfloat16")
    with pytest.raises(UserError, match="measured on device a device, not another; measure here"):
        check_table(TABLE, FACTS, "another", "bfloat16")
    with pytest.raises(UserError, match="dtype bfloat16, not float32"):
        check_table(TABLE, FACTS, "a device", "float32")
    note = check_table(TABLE, FACTS, "another", "float32", force=True)
    assert note == "costs of device a device, not another and dtype bfloat16, not float32"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_on_the_fixed_cache_gives_the_logits_of_a_growing_one(family: str, tiny_student: Parents) -> None:
    model = ModelFolder(tiny_student(family)).load(torch.float32, "cpu")
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(5))
    grown = DynamicCache(config=model.config)
    with torch.no_grad():
        before = model(input_ids=ids[:, :-1], past_key_values=grown, use_cache=True).logits[:, -1:]
        step = Step(model, 2, past=11, new=1)
        for fixed, layer in zip(step.cache.layers, grown.layers, strict=True):
            if fixed.keys is not None:
                # A window forgets what lies before it, the token that is written over included.
                fixed.keys[:, :, :-1] = layer.keys[:, :, -fixed.kept :]
                fixed.values[:, :, :-1] = layer.values[:, :, -fixed.kept :]
        after = model(input_ids=ids[:, -1:], past_key_values=grown, use_cache=True).logits
    step.ids.copy_(ids[:, -1:])
    for _ in range(2):
        torch.testing.assert_close(step.logits(), after)
    prefill = Step(model, 2, past=0, new=11)
    prefill.ids.copy_(ids[:, :-1])
    torch.testing.assert_close(prefill.logits(), before)


def test_a_decode_step_feeds_its_token_to_the_next(tiny_parent: Parents) -> None:
    step = Step(ModelFolder(tiny_parent("llama")).load(torch.float32, "cpu"), 2, past=5, new=1)
    expected = step.logits().argmax(-1)
    step.run()
    assert torch.equal(step.ids, expected)


def values(step: Step, times: int = 1) -> float:
    """A clock that counts what a call reads and writes, in thousands of values."""
    cached = sum(2 * layer.keys.numel() for layer in step.cache.layers if layer.keys is not None)
    weights = sum(parameter.numel() for parameter in step.model.parameters())
    return (weights + cached + step.ids.numel()) / 1e3


@pytest.mark.parametrize(
    ("family", "ranks"), [("llama", 1), ("llama", 2), ("qwen2", 1), ("starcoder2", 4), ("phi3", 2)]
)
def test_sums_predict_whole_models(
    family: str, ranks: int, tiny_parent: Parents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What every weight and every cached value costs adds up, so the only error left is that of the method."""
    monkeypatch.setattr(timing, "elapsed_ms", values)
    monkeypatch.setattr("ffn_fusion.stages.cost.measure_communication", lambda *_: TABLE.communication)
    options = {"batch_size": 2, "prompt_length": 8, "new_tokens": 4, "repeats": 2}
    result = cost(str(tiny_parent(family)), out=tmp_path / "cost", tensor_parallel=ranks, **options).result
    assert len(result.check) == 4
    assert len({row.plan for row in result.check}) == 4
    # A sliding window sees less than the full attention of another layer: rows are means over the parent's kinds.
    tolerance = 0.05 if family == "qwen2" else 1e-9
    assert abs(result.worst_decode_error) < tolerance
    assert abs(result.worst_prefill_error) < tolerance
    rows = {(row.kind, row.size): row.time.decode.ms * 1e3 for row in result.table.rows}
    if family == "llama":
        counts = result.table.facts.counts
        assert rows["ffn", 96] == pytest.approx(64 + 96 * 3 * 64 / ranks)
        # Two kv heads on two ranks: one on each, with its keys and values of ten tokens in two sequences.
        cached = 2 * 2 * 16 * 10 * 2 / ranks
        assert rows["attention", 2] == pytest.approx(64 + (counts.attention - 64 + 2 * counts.kv_head) / ranks + cached)
        assert rows["linear", 0] == pytest.approx(64 + 64 * 64 / ranks)
    assert "worst error: prefill" in result.summary()
    parent = ModelFolder(tiny_parent(family))
    assert read_costs(tmp_path / "cost", parent, result.table.device, "float32") == (result.table, "")
    assert read_costs(tmp_path / "cost", parent, "a GPU", "float32", force=True)[1].startswith("costs of device CPU")


def test_a_plan_is_priced_by_costs_of_anywhere(
    tiny_parent: Parents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "elapsed_ms", values)
    parent, costs = tiny_parent("llama"), tmp_path / "cost"
    result = cost(str(parent), out=costs, repeats=2, prompt_length=8, new_tokens=4).result
    removed = next(row for row in result.check if row.name == "every other attention removed")
    record = json.loads((costs / "record.json").read_text())
    record["result"]["table"]["device"] = "a GPU far away"
    (costs / "record.json").write_text(json.dumps(record))
    (tmp_path / "shape").mkdir()
    shutil.copy(parent / "config.json", tmp_path / "shape")
    said = plan(removed.plan, parent=str(tmp_path / "shape"), costs=costs).splitlines()
    whole = result.check[0].predicted_decode_ms
    assert said[2] == "by the costs of a GPU far away, float32, batch 1, 8 + 4 tokens"
    share = f"{removed.predicted_decode_ms / whole:.3f}x"
    assert said[3] == f"decode step {removed.predicted_decode_ms:,.4g} ms, the parent {whole:,.4g}: {share}"
    assert said[6].endswith(f"{(NUM_LAYERS + 1) // 2 / NUM_LAYERS:.3f}x")
    assert "estimated" not in said[-1]
    wide = plan(f"A0F{'+'.join(map(str, range(NUM_LAYERS)))}", parent=str(parent), costs=costs).splitlines()
    assert wide[-1].startswith("estimated, not measured:")
    one_line(lambda: plan(removed.plan, costs=costs), "--costs needs the parent")
    one_line(lambda: plan(removed.plan, parent=str(tiny_parent("qwen2")), costs=costs), "model of other shape")


def test_more_ranks_than_kv_heads_hold_one_each(tiny_parent: Parents) -> None:
    stack = Stack(resolve_model(str(tiny_parent("llama"))), [BlockShape(2, 96)], ranks=4)
    attention = stack.model.model.layers[0].self_attn
    assert tuple(attention.q_proj.weight.shape) == (16, 64)
    assert tuple(attention.k_proj.weight.shape) == (16, 64)
    with pytest.raises(UserError, match="attention heads, 4, does not split over 3"):
        Stack(resolve_model(str(tiny_parent("llama"))), [BlockShape(2, 96)], ranks=3)
    with pytest.raises(UserError, match="FFN width, 97, does not split"):
        Stack(resolve_model(str(tiny_parent("llama"))), [BlockShape(2, 97)], ranks=2)


def test_weights_of_one_model_do_not_overlap(tiny_parent: Parents) -> None:
    parent = resolve_model(str(tiny_parent("gemma")))
    stack = Stack(parent, parent.shapes)
    room = arena.Arena(stack.num_values(2, 10), CPU, torch.float32)
    stack.settle(room)
    step = stack.step(room, 2, 9, 1)
    assert room.used == len(room.values)
    held = [*stack.model.parameters(), *(t for layer in step.cache.layers for t in (layer.keys, layer.values))]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in held)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_where_memory_is_short_smaller_stacks_are_tried(
    tiny_parent: Parents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "elapsed_ms", values)
    model = str(tiny_parent("llama"))
    whole = Stack(resolve_model(model), resolve_model(model).shapes).num_values(1, 256)
    monkeypatch.setattr(arena, "available", lambda _: 4 * whole * 0.8)
    options = ["--repeats", "2", "--prompt-length", "8", "--new-tokens", "4"]
    result = cost(model, out=tmp_path / "half", repeats=2, prompt_length=8, new_tokens=4).result
    assert result.depth == NUM_LAYERS // 2
    assert abs(result.worst_decode_error) < 1e-9
    assert f"whole models had {NUM_LAYERS // 2} of {NUM_LAYERS} layers" in result.summary()
    monkeypatch.setattr(arena, "available", lambda _: 1e4)
    assert cli._status(["cost", model, "--out", str(tmp_path / "none"), *options]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("ffn-fusion: the memory of CPU")


def test_a_killed_measurement_goes_on_where_it_was(
    tiny_parent: Parents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def clock(step: Step, times: int = 1) -> float:
        calls.append(step.ids.shape[1])
        if len(calls) == 20:
            raise KeyboardInterrupt
        return values(step)

    monkeypatch.setattr(timing, "elapsed_ms", clock)
    measure = {"out": tmp_path / "cost", "repeats": 1, "prompt_length": 8, "new_tokens": 4}
    with pytest.raises(KeyboardInterrupt):
        cost(str(tiny_parent("llama")), **measure)
    assert calls[-1] == 1
    calls += [0]
    cost(str(tiny_parent("llama")), **measure)
    assert 8 not in calls[calls.index(0) :]


def test_an_all_reduce_over_two_ranks() -> None:
    scenario = Scenario(batch_size=2, prompt_length=64, new_tokens=4)
    found = measure_communication(2, scenario, 512, 1_000, torch.bfloat16, CPU)
    assert min(found.all_reduce.prefill.ms, found.all_reduce.decode.ms, found.gather.decode.ms) > 0
    assert measure_communication(1, scenario, 512, 1_000, torch.bfloat16, CPU) == Communication.none()
    with pytest.raises(UserError, match="the all-reduce across 2 ranks failed: "):
        measure_communication(2, scenario, -1, 1_000, torch.bfloat16, CPU)


def test_fewer_gpus_than_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_ranks(2, torch.device("cuda"))
    with pytest.raises(UserError, match="--tensor-parallel 4 needs 4 GPUs; there are 2 here"):
        check_ranks(4, torch.device("cuda"))


def test_bench_times_the_same_steps_and_reads_older_records(
    tiny_parent: Parents, tiny_student: Parents, tmp_path: Path
) -> None:
    out = tmp_path / "bench"
    models = (str(tiny_parent("qwen2")), str(tiny_student("qwen2")))
    call: dict[str, Any] = {"batch_sizes": (2,), "prompt_lengths": (9,), "new_tokens": 3, "repeats": 2}
    result = bench(*models, out=out, engine="transformers", **call).result
    assert result.how == "eager, with a cache of fixed size"
    assert all(row.prefill_ms.median > 0 and row.decode_ms.median > 0 for row in result.rows)
    record = json.loads((out / "record.json").read_text())
    old = ("models", "rows", "prompt_length", "new_tokens", "repeats", "copy_gb_per_s")
    record["result"] = {name: record["result"][name] for name in old}
    kept = ("model", "batch_size", "prefill_ms", "decode_ms", "bandwidth_share", "prefill_speedup", "decode_speedup")
    record["result"]["rows"] = [{name: row[name] for name in kept} for row in record["result"]["rows"]]
    (out / "record.json").write_text(json.dumps(record))
    read = read_record(out, BenchResult).result
    assert read.how == "eager, with a cache that grows"
    assert [read.prompt_of(row) for row in read.rows] == [9, 9]
    assert read.rows[1].decode_ms == result.rows[1].decode_ms
    assert "parent " in read.summary()


def test_uneven_parents_are_timed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student as a parent: attentions missing, fused FFNs."""
    monkeypatch.setattr(timing, "elapsed_ms", values)
    from ffn_fusion.settings import Fusion
    from ffn_fusion.stages.fuse import fuse

    parent = save_tiny_parent("llama", tmp_path / "parent")
    fuse(str(parent), plan=STUDENT_PLAN, out=tmp_path / "student", fusion=Fusion(calibrate="none"))
    result = cost(str(tmp_path / "student"), out=tmp_path / "cost", repeats=2, prompt_length=8, new_tokens=4).result
    assert abs(result.worst_decode_error) < 1e-9
    assert result.check[0].plan == "A0F0 A1F1 -F2 A3F3 A4F4"


def test_what_cannot_be_captured_runs_eagerly_and_says_so(
    tiny_parent: Parents, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def refusing(*_: object, **__: object) -> Iterator[None]:
        yield
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda **_: object())
    monkeypatch.setattr(torch.cuda, "graph", refusing)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    step = Step(ModelFolder(tiny_parent("llama")).load(torch.float32, "cpu"), 1, past=5, new=1)
    step._capture(None)
    assert step.note == "not captured: operation not permitted when stream is capturing"
    assert step.how == "eager"
    step.run()
