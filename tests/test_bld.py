"""Blockwise local distillation on tiny models: what trains learns, what does not stays as it is, and a library is used
exactly as it was stored."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from shutil import copytree

import pytest
import torch
from conftest import save_tiny_parent
from reference import one_line
from safetensors.torch import load_file, save_file
from test_contract import in_memory
from texts import as_windows, write_text
from torch import Tensor

from ffn_fusion.core.block_records import BldResult, UnitResult
from ffn_fusion.core.blockwise import (
    changed_blocks,
    decoupled,
    in_place,
    layer_variants,
    rate,
    token_weights,
    trained_parts,
)
from ffn_fusion.core.plan import Block, Plan
from ffn_fusion.core.pruning import Cuts, kept_channels
from ffn_fusion.errors import UserError
from ffn_fusion.folder import RECORD, read_record
from ffn_fusion.hf.blockwise import Distillation, TrainedUnit, Training
from ffn_fusion.hf.contribution import measure
from ffn_fusion.hf.library import PREFIXES, Library
from ffn_fusion.hf.meter import Meter
from ffn_fusion.hf.model import ModelFolder, student_arch
from ffn_fusion.hf.probe import record, resume
from ffn_fusion.hf.provenance import texts_behind
from ffn_fusion.hf.student import write_student
from ffn_fusion.hf.surgery import block_recipes
from ffn_fusion.hf.walk import ParentWalk
from ffn_fusion.settings import Blocks, Fusion, Machine, Text
from ffn_fusion.stages.bld import bld
from ffn_fusion.stages.fuse import fuse

Parent = Callable[[str], Path]
families = pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "granite", "starcoder2", "phi3"])
BLOCKS = [Block.parse(word) for word in ("-F1", "A2F2:48", "A2/1F2", "A2/1F2:48", "-F3+4", "A5", "A4F4+5")]
NOT_FITTED = Fusion(calibrate="none")
UNITS = ("-F1", "A2F2:48", "A2/1F2")
COMPOSED = "A0F0 -F1 A2/1F2:48 A3F3 A4F4 A5F5"


def windows(count: int = 64, seed: int = 0) -> Tensor:
    return torch.randint(4, 128, (count, 16), generator=torch.Generator().manual_seed(seed))


def distilled(
    folder: ModelFolder,
    blocks: list[Block],
    training: Training = Training(4, 5e-3, 0),  # noqa: B008, frozen
    library: Library | None = None,
    ids: Tensor | None = None,
) -> dict[str, TrainedUnit]:
    walk = ParentWalk(folder, folder.checkpoint, device=torch.device("cpu"), dtype=torch.float32, batch_size=8)
    run = Distillation(walk, "folded", training, library or Library({}, {}))
    return {str(u.block): u for u in run.run(windows() if ids is None else ids, blocks, lambda: None)}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    path = write_text(tmp_path_factory.mktemp("texts"), "fit", 0, documents=100)
    return Text(text=(str(path),), length=24)


@pytest.fixture(scope="module")
def library(tiny_parent: Parent, text: Text, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("library") / "units"
    bld(str(tiny_parent("llama")), out=out, blocks=Blocks(blocks=UNITS), windows=32, epochs=1, text=text)
    return out


def tensors_of(library: Path, block: str) -> dict[str, Tensor]:
    units = {unit.block: unit for unit in read_record(library, BldResult).result.units}
    return load_file(library / units[block].file)


@pytest.mark.parametrize(
    ("block", "parts"),
    [
        ("A6/1F6", "attention"), ("A6F6:64", "ffn"), ("A6/1F6:64", "attention ffn"), ("-F6", "ffn"), ("-F6:64", "ffn"),
        ("A6", "attention"), ("A6/1", "attention"), ("-F5+6", "ffn"), ("A5F5+6", "ffn"), ("A5/1F5+6", "attention ffn"),
        ("A5F6", "ffn"), ("A6F6", ""),
    ],
)  # fmt: skip
def test_what_is_not_the_parents_own_trains(block: str, parts: str) -> None:
    assert trained_parts(Block.parse(block)) == set(parts.split())


def test_parts_of_a_block_stand_in_the_library_as_decoupled_units() -> None:
    both, fused = Block.parse("A6/1F6:64"), Block.parse("-F5+6:64")
    assert [str(decoupled(both, part)) for part in ("attention", "ffn")] == ["A6/1F6", "A6F6:64"]
    assert decoupled(fused, "attention") is None
    assert str(decoupled(fused, "ffn")) == "A5F5+6:64"
    assert decoupled(Block.parse("-F6"), "ffn") is None, "that part is the parent's own"
    assert decoupled(Block.parse("A6"), "attention") is None


def test_variants_of_a_layer_change_one_sublayer_each() -> None:
    def variants(layer: str) -> list[str]:
        return [str(block) for block in layer_variants(Block.parse(layer), (1,), (48,), ("attention", "ffn"))]

    assert variants("A2F2") == ["-F2", "A2", "A2/1F2", "A2F2:48"]
    assert variants("A0F0") == ["A0", "A0/1F0", "A0F0:48"]
    assert variants("-F2") == ["-F2:48"]


def test_units_are_the_changed_blocks_of_a_plan() -> None:
    parent = Plan.identity(4)
    assert list(map(str, changed_blocks(Plan.parse("A0F0 -F1+2 A3F3:8"), parent))) == ["-F1+2", "A3F3:8"]
    assert str(in_place(Block.parse("-F1+2"), parent)) == "A0F0 -F1+2 A3F3"
    with pytest.raises(UserError, match="no targets"):
        changed_blocks(Plan.parse("A0F0 A2F2 A1F1 A3F3"), parent)
    with pytest.raises(UserError, match="out of order"):
        in_place(Block.parse("-F2+1"), parent)


def test_a_massive_activation_weighs_no_more_than_another_token() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(1, 8, 16), torch.randn(1, 8, 16)
    x[0, 3] *= 1000
    y[0, 3] = x[0, 3] + y[0, 3]
    y[0, 5] *= 1000  # the token on which a layer makes one
    weights, change = token_weights(x, y)
    cost = (weights * change).flatten()
    assert cost[5] < 2 * cost[[0, 1, 2, 4, 6, 7]].mean()
    assert cost[3] < cost[5]


def test_the_learning_rate_warms_up_and_ends_near_nothing() -> None:
    rates = [rate(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(rates) == 1
    assert all(a >= b for a, b in pairwise(rates[5:]))
    assert rates[-1] < 0.01
    assert rate(0, 1) == 1


@families
def test_training_lowers_the_held_out_loss_and_only_parts_that_train_change(family: str, tiny_parent: Parent) -> None:
    folder = ModelFolder(tiny_parent(family))
    units = distilled(folder, BLOCKS)
    assert set(units) == set(map(str, BLOCKS))
    for unit in units.values():
        assert unit.trained is not None
        assert unit.trained < unit.start, unit.block
        assert unit.num_tokens == 4 * 56 * 16
        prefixes = tuple(prefix for part in trained_parts(unit.block) for prefix in PREFIXES[part])
        assert unit.tensors
        assert all(name.startswith(prefixes) for name in unit.tensors)
    assert units["-F1"].fitted is not None
    assert units["-F1"].fitted < units["-F1"].start
    assert units["A2/1F2"].fitted is None
    for block in ("-F1", "A2F2:48", "-F3+4"):
        if units[block].kept == "trained":  # and not only the down projection that was fitted
            assert {f"mlp.{name}.weight" for name in (*folder.arch.inputs, folder.arch.output)} <= set(
                units[block].tensors
            )
    assert any(unit.kept == "trained" for unit in units.values() if "ffn" in trained_parts(unit.block))


@families
def test_losses_are_those_of_the_block_in_a_student_on_the_parents_stream(family: str, tiny_parent: Parent) -> None:
    """Against the student that `fuse` makes, run from the parent's stream by the family's own forward."""
    folder, ids = ModelFolder(tiny_parent(family)), windows(16)
    units = distilled(folder, BLOCKS, Training(0, 1e-3, 0), ids=ids)
    streams = record(folder.load(torch.float32, "cpu"), ids, outputs=False).streams
    walk = ParentWalk(folder, folder.checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    *_, passed = measure(walk, ids, [2])
    for block in BLOCKS:
        plan = in_place(block, folder.plan)
        student = in_memory(folder, plan, "folded", {2: kept_channels(passed.found[2], 48)})
        at, first, last = plan.blocks.index(block), min(block.layers), max(block.layers)
        seen: list[Tensor] = []
        student.model.layers[at].register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        resume(student, ids, at, streams[first])
        x, y = streams[first], streams[last + 1]
        longer = torch.maximum(x.norm(dim=-1), y.norm(dim=-1))
        scale = ((y - x).norm(dim=-1) / longer).square()[-2:].mean()
        error = ((y - seen[0]).norm(dim=-1) / longer).square()[-2:].mean()
        assert units[str(block)].start == pytest.approx(float(error / scale), rel=1e-3), block


def test_units_do_not_depend_on_the_others_that_are_trained(tiny_parent: Parent) -> None:
    folder = ModelFolder(tiny_parent("llama"))
    together, alone = distilled(folder, BLOCKS)["-F3+4"], distilled(folder, [BLOCKS[4]])["-F3+4"]
    assert all(torch.equal(tensor, alone.tensors[name]) for name, tensor in together.tensors.items())
    other = distilled(folder, [BLOCKS[4]], Training(4, 5e-3, 1))["-F3+4"]
    assert not all(torch.equal(tensor, other.tensors[name]) for name, tensor in together.tensors.items())


def test_weights_that_got_worse_are_not_kept(tiny_parent: Parent) -> None:
    folder = ModelFolder(tiny_parent("llama"))
    blocks = [Block.parse("-F1"), Block.parse("A2/1F2")]
    wrecked = distilled(folder, blocks, Training(1, 100.0, 0))
    fitted = distilled(folder, blocks, Training(0, 1e-3, 0))
    assert wrecked["-F1"].trained is not None
    assert wrecked["-F1"].fitted is not None
    assert wrecked["-F1"].trained > wrecked["-F1"].fitted == fitted["-F1"].fitted
    assert (wrecked["-F1"].kept, wrecked["A2/1F2"].kept) == ("fitted", "start")
    assert list(wrecked["-F1"].tensors) == ["mlp.down_proj.weight"], "only what differs from the untrained block"
    down = "mlp.down_proj.weight"
    assert torch.equal(wrecked["-F1"].tensors[down], fitted["-F1"].tensors[down])
    assert wrecked["A2/1F2"].tensors == {}


def test_padding_stays_zero(tiny_parent: Parent) -> None:
    tensors = distilled(ModelFolder(tiny_parent("llama")), [BLOCKS[1]])["A2F2:48"].tensors
    assert tensors["mlp.up_proj.weight"].shape == (256, 64)
    assert not tensors["mlp.up_proj.weight"][48:].any()
    assert not tensors["mlp.down_proj.weight"][:, 48:].any()
    assert tensors["mlp.up_proj.weight"][:48].any()


def test_a_student_has_the_librarys_tensors_and_else_the_parents(
    library: Path, tiny_parent: Parent, text: Text, tmp_path: Path
) -> None:
    """-F1 as it stands there; A2/1F2:48, which does not, from A2/1F2 and A2F2:48."""
    parent = tiny_parent("llama")
    result = fuse(str(parent), plan=COMPOSED, out=tmp_path / "s", library=library, fusion=NOT_FITTED).result
    assert result.library == str(library)
    assert result.sample is None, "the channels are the library's"
    assert texts_behind(ModelFolder(tmp_path / "s")) == list(text.text)
    assert [cut.width for cut in result.cuts] == [48]
    student, own = load_file(tmp_path / "s" / "model.safetensors"), load_file(parent / "model.safetensors")
    alone, ffn, attention = (tensors_of(library, block) for block in UNITS)
    assert alone
    assert ffn
    assert attention
    trained = {f"model.layers.1.{name}": tensor for name, tensor in alone.items()}
    trained |= {f"model.layers.2.{name}": tensor for name, tensor in (ffn | attention).items()}
    assert all(torch.equal(student[name], tensor) for name, tensor in trained.items())
    rest = student.keys() - trained.keys()
    assert {name for name in rest if ".layers.2." in name} == set(), "both parts of it train"
    assert all(torch.equal(student[name][tuple(map(slice, own[name].shape))], own[name]) for name in rest)
    assert not any(torch.equal(student[name], own[name]) for name in trained if student[name].shape == own[name].shape)


def test_a_fit_comes_on_top_of_the_library(library: Path, tiny_parent: Parent, text: Text, tmp_path: Path) -> None:
    parent, plan = str(tiny_parent("llama")), COMPOSED
    students = {}
    for name, fusion in (("plain", NOT_FITTED), ("fitted", Fusion())):
        fuse(parent, plan=plan, out=tmp_path / name, library=library, fusion=fusion, text=text, fit_windows=32)
        students[name] = load_file(tmp_path / name / "model.safetensors")
    differ = [n for n, tensor in students["plain"].items() if not torch.equal(tensor, students["fitted"][n])]
    assert differ == ["model.layers.2.mlp.down_proj.weight"], "it sees the drift of the block before"
    fuse(parent, plan=plan, out=tmp_path / "without", text=text, fit_windows=32)
    without = load_file(tmp_path / "without" / "model.safetensors")
    assert not torch.equal(without[differ[0]], students["fitted"][differ[0]])


def test_a_library_is_of_one_way_to_choose_channels(library: Path, tiny_parent: Parent, tmp_path: Path) -> None:
    parent = str(tiny_parent("llama"))
    options = {"plan": COMPOSED, "out": tmp_path / "student", "library": library}
    steps = Fusion(calibrate="none", channel_steps=4)
    one_line(lambda: fuse(parent, fusion=steps, **options), "--channel-steps 1", "another library")  # type: ignore[arg-type]


def test_the_student_that_is_measured_is_the_one_that_is_written(
    library: Path, tiny_parent: Parent, tmp_path: Path
) -> None:
    folder = ModelFolder(tiny_parent("llama"))
    opened, plan = Library.open(library, folder, "folded"), Plan.parse(COMPOSED)
    model = folder.load(torch.float32, "cpu")
    meter = Meter(folder, model, as_windows(windows(8, 3)), as_windows(windows(8, 4)), NOT_FITTED, Machine(), opened)
    write_student(folder, plan, tmp_path, "folded", {}, opened.channels(plan), opened)
    student = ModelFolder(tmp_path)
    written = Meter(folder, model, as_windows(windows(8, 3)), as_windows(windows(8, 4)), NOT_FITTED, Machine())
    with torch.no_grad():
        kl = written._kl_of(student.load(torch.float32, "cpu")).mean
    assert meter.fused(plan).mean == pytest.approx(kl, rel=1e-4)


def test_trained_blocks_are_closer_to_the_parent_in_the_whole_model(tiny_parent: Parent, tmp_path: Path) -> None:
    folder = ModelFolder(tiny_parent("llama"))
    blocks = [Block.parse("-F1"), Block.parse("-F3+4")]
    plan, ids = Plan.parse("A0F0 -F1 A2F2 -F3+4 A5F5"), windows(512)
    known = Library({}, {})
    for number, unit in enumerate(distilled(folder, blocks, Training(4, 1e-2, 0), ids=ids).values()):
        known.files[str(unit.block)] = tmp_path / f"{number}.safetensors"
        save_file(unit.tensors, known.files[str(unit.block)])
    model = folder.load(torch.float32, "cpu")
    for fusion in (NOT_FITTED, Fusion()):
        trained, untrained = (
            Meter(folder, model, as_windows(windows(16, 3)), as_windows(ids), fusion, Machine(), library)
            for library in (known, None)
        )
        assert trained.fused(plan).mean < 0.96 * untrained.fused(plan).mean


def test_a_student_that_does_not_have_the_librarys_tensors_is_never_finished(
    library: Path, tiny_parent: Parent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ModelFolder(tiny_parent("llama"))
    opened, plan = Library.open(library, folder, "folded"), Plan.parse(COMPOSED)
    monkeypatch.setattr("ffn_fusion.hf.surgery._as", lambda spec, make: torch.zeros(spec.shape, dtype=spec.dtype))
    with pytest.raises(AssertionError, match="not the library's"):
        write_student(folder, plan, tmp_path, "folded", {}, opened.channels(plan), opened)


def test_a_coupled_unit_starts_from_its_decoupled_parts(tiny_parent: Parent, text: Text, tmp_path: Path) -> None:
    """Also where it is named in front of them."""
    parent, both = str(tiny_parent("llama")), "A2/1F2:48"
    results = {}
    for name, blocks in (("alone", (both,)), ("after", (both, *UNITS[1:]))):
        result = bld(parent, out=tmp_path / name, blocks=Blocks(blocks=blocks), windows=32, text=text).result
        results[name] = {unit.block: unit for unit in result.units}
    assert list(results["after"]) == [*UNITS[1:], both]
    alone, after = results["alone"][both], results["after"][both]
    assert after.start < alone.start
    assert after.loss < after.start
    assert tensors_of(tmp_path / "after", both).keys() > {"self_attn.k_proj.weight", "mlp.down_proj.weight"}


def test_held_out_windows_are_not_trained_on(tiny_parent: Parent) -> None:
    folder, blocks = ModelFolder(tiny_parent("llama")), [Block.parse("A2/1F2")]
    tensors = []
    for held in (windows(8, 7), windows(8, 8), windows(8, 7)):
        (unit,) = distilled(folder, blocks, ids=torch.cat([windows(56, 0), held])).values()
        assert unit.kept == "trained"
        tensors.append((unit.trained, unit.tensors["self_attn.k_proj.weight"]))
    assert all(torch.equal(tensors[0][1], other) for _, other in tensors)
    assert tensors[0][0] == tensors[2][0] != tensors[1][0]
    (unit,) = distilled(folder, blocks, ids=torch.cat([windows(56, 1), windows(8, 7)])).values()
    assert not torch.equal(tensors[0][1], unit.tensors["self_attn.k_proj.weight"])


def test_a_library_is_extended_and_an_old_block_trained_on(
    library: Path, tiny_parent: Parent, text: Text, tmp_path: Path
) -> None:
    parent, out = str(tiny_parent("llama")), tmp_path / "more"
    more = Blocks(blocks=("A2/1F2:48", "A3F3:40", "-F1"))
    record = bld(parent, out=out, blocks=more, library=library, windows=32, epochs=1, text=text)
    units = {unit.block: unit for unit in record.result.units}
    old = {unit.block: unit for unit in read_record(library, BldResult).result.units}
    assert set(units) == {*UNITS, "A2/1F2:48", "A3F3:40"}
    assert len({unit.file for unit in units.values()}) == len(units)
    for block in UNITS[1:]:
        assert replace(units[block], file="") == replace(old[block], file="")
        assert all(torch.equal(t, tensors_of(library, block)[n]) for n, t in tensors_of(out, block).items())
    assert units["-F1"].start == pytest.approx(old["-F1"].loss, rel=1e-5), "on the same text"
    assert units["-F1"].loss <= old["-F1"].loss
    found = [load_file(folder / "contributions.safetensors") for folder in (library, out)]
    assert [set(contributions) for contributions in found] == [{"2"}, {"2", "3"}]
    assert torch.equal(found[0]["2"], found[1]["2"])


def test_a_library_is_bound_to_the_content_of_its_parent(
    library: Path, tiny_parent: Parent, text: Text, tmp_path: Path
) -> None:
    same, other = tmp_path / "same", save_tiny_parent("llama", tmp_path / "other")
    copytree(tiny_parent("llama"), same)
    assert ModelFolder(same).checkpoint.key == ModelFolder(tiny_parent("llama")).checkpoint.key
    weights = load_file(other / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"] += 0.1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    plan = "A0F0 -F1 A2F2 A3F3 A4F4 A5F5"
    one_line(lambda: fuse(str(other), plan=plan, out=tmp_path / "s", library=library), "another parent")
    last = replace(NOT_FITTED, norm="last")
    one_line(lambda: fuse(str(same), plan=plan, out=tmp_path / "s", library=library, fusion=last), "--norm folded")
    one_line(
        lambda: bld(str(other), out=tmp_path / "b", blocks=Blocks(blocks=UNITS), library=library), "another parent"
    )
    fuse(str(same), plan=plan, out=tmp_path / "s", library=library, fusion=NOT_FITTED)
    one_line(lambda: fuse(str(same), plan=plan, out=tmp_path / "s", fusion=NOT_FITTED), "other library")


def test_a_student_from_before_there_were_libraries_stays_valid(tiny_parent: Parent, tmp_path: Path) -> None:
    parent, plan = str(tiny_parent("llama")), "A0F0 -F1 A2F2 A3F3 A4F4 A5F5"
    fuse(parent, plan=plan, out=tmp_path / "s", fusion=NOT_FITTED)
    path = tmp_path / "s" / RECORD
    data = json.loads(path.read_text())
    assert "library" not in data["inputs"]
    del data["result"]["library"]
    path.write_text(json.dumps(data))
    assert fuse(parent, plan=plan, out=tmp_path / "s", fusion=NOT_FITTED).result.library is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Blocks(), ["no blocks to train"]),
        (Blocks(blocks=("A1F1",)), ["no blocks to train"]),
        (Blocks(blocks=("-F0",)), ["attention of layer 0"]),
        (Blocks(blocks=("A1F1:4000",)), ["FFN 1", "4,000"]),
        (Blocks(blocks=("A2F1",)), ["out of order"]),
        (Blocks(blocks=("A9F9:40",)), ["attention 9"]),
        (Blocks(blocks=("F9",)), ["'F9' is no block"]),
        (Blocks(plan="A0F0 A2F2 A1F1"), ["reorders"]),
    ],
)
def test_blocks_that_cannot_be_trained_are_refused(
    options: Blocks, says: list[str], tiny_parent: Parent, tmp_path: Path
) -> None:
    one_line(lambda: bld(str(tiny_parent("llama")), out=tmp_path / "b", blocks=options), *says)
    assert list(tmp_path.iterdir()) == []


def test_half_precision_without_range_is_refused(tiny_parent: Parent, tmp_path: Path) -> None:
    machine = Machine(dtype="fp16")
    one_line(
        lambda: bld(str(tiny_parent("llama")), out=tmp_path / "b", blocks=Blocks(blocks=UNITS), machine=machine),
        "--dtype bf16",
    )


def test_options_make_units_of_every_layer(tiny_parent: Parent, text: Text, tmp_path: Path) -> None:
    options = Blocks(kv_heads=(1, 2), widths=(48,), no_attention=True)
    result = bld(str(tiny_parent("qwen2")), out=tmp_path / "b", blocks=options, windows=8, epochs=0, text=text).result
    expected = {f"A{i}/1F{i}" for i in range(6)} | {f"A{i}F{i}:48" for i in range(6)} | {f"-F{i}" for i in range(1, 6)}
    assert {unit.block for unit in result.units} == expected
    assert all(unit.kept != "trained" and unit.num_tokens == 0 for unit in result.units)
    assert result.summary().startswith("17 blocks, 192 tokens")
    assert "held-out loss" in result.summary()


def test_a_unit_says_which_weights_it_kept() -> None:
    unit = UnitResult("-F1", "blocks/0.safetensors", "fitted", 0.5, 0.25, 0.375, 10, 1.0)
    assert str(unit) == "-F1: held-out loss 0.5000 -> 0.2500 fitted -> 0.3750 trained, kept: fitted"
    assert unit.loss == 0.25


def test_half_precision_trains_too(tiny_parent: Parent) -> None:
    folder = ModelFolder(tiny_parent("qwen2"))
    walk = ParentWalk(folder, folder.checkpoint, device=torch.device("cpu"), dtype=torch.bfloat16, batch_size=8)
    units = [*Distillation(walk, "folded", Training(4, 5e-3, 0), Library({}, {})).run(windows(), BLOCKS, lambda: None)]
    assert all(unit.trained is not None and unit.trained < unit.start for unit in units)
    assert {tensor.dtype for unit in units for tensor in unit.tensors.values()} == {torch.float32}


def test_frozen_tensors_of_a_library_block_are_the_parents(library: Path, tiny_parent: Parent) -> None:
    folder = ModelFolder(tiny_parent("llama"))
    opened, block = Library.open(library, folder, "folded"), Block.parse("A2F2:48")
    cuts = Cuts(folder.head_dim, opened.channels(in_place(block, folder.plan)))
    recipes = block_recipes(block, folder.checkpoint, student_arch(folder), "folded", cuts, opened)
    for name in ("self_attn.q_proj.weight", "self_attn.v_proj.weight", "input_layernorm.weight"):
        assert torch.equal(recipes[name].build(), folder.checkpoint.read(f"model.layers.2.{name}"))
    name = "mlp.up_proj.weight"
    plain = block_recipes(block, folder.checkpoint, student_arch(folder), "folded", cuts)[name].build()
    assert torch.equal(recipes[name].build(), tensors_of(library, str(block))[name])
    assert not torch.equal(recipes[name].build(), plain)


def test_a_killed_run_continues_and_gives_the_same_library(tiny_parent: Parent, text: Text, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ffn_fusion", "bld", str(tiny_parent("llama")), "--text", text.text[0]]
    command += ["--length", "24", "--windows", "64", "--epochs", "4", "--widths", "48", "--kv-heads", "1"]
    command += ["--blocks=-F3+4", "--blocks", "A5/1F5:48"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out", tmp_path / "whole"], check=True, capture_output=True, env=environment)
    blocks = tmp_path / ".killed.partial" / "blocks"
    process = subprocess.Popen([*command, "--out", tmp_path / "killed"], stderr=subprocess.DEVNULL, env=environment)
    while process.poll() is None and not (blocks / "2.safetensors").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    before = {path.name: path.stat().st_mtime_ns for path in blocks.glob("[01].safetensors")}
    done = subprocess.run(
        [*command, "--out", tmp_path / "killed"], check=True, capture_output=True, text=True, env=environment
    )
    assert "taking up" in done.stderr
    whole, killed = (read_record(tmp_path / name, BldResult).result for name in ("whole", "killed"))
    assert len(whole.units) == 14
    assert [replace(unit, seconds=0) for unit in whole.units] == [replace(unit, seconds=0) for unit in killed.units]
    for file in ("contributions.safetensors", *(unit.file for unit in whole.units)):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()
    after = {name: (tmp_path / "killed" / "blocks" / name).stat().st_mtime_ns for name in before}
    assert after == before, "finished units are not trained again"
