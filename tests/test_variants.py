"""Narrower FFNs and fewer kv heads: in every family the student is what a slow reference makes of its plan."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, VOCAB_SIZE, save_tiny_parent
from reference import one_line, planned_logits, relative_error, top_channels
from safetensors.torch import load_file
from test_contract import TOLERANCE, in_memory
from texts import as_windows, write_text
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ffn_fusion.core.losses import kl_to, reference
from ffn_fusion.core.plan import Plan
from ffn_fusion.core.pruning import Cuts, kept_channels
from ffn_fusion.core.records import FuseResult
from ffn_fusion.folder import RECORD, read_record
from ffn_fusion.hf.calibrate import Calibration
from ffn_fusion.hf.contribution import Passed, measure
from ffn_fusion.hf.meter import Meter
from ffn_fusion.hf.model import ModelFolder, expected_specs, student_arch, student_config
from ffn_fusion.hf.student import write_student
from ffn_fusion.hf.surgery import student_recipes
from ffn_fusion.hf.walk import ParentWalk
from ffn_fusion.settings import Fusion, Machine, Text
from ffn_fusion.stages.fuse import fuse

PLAN = Plan.parse("A0/1F0:40 A1F1:24+2+3:70 A4/1 A5F5:90")
"""A cut FFN alone, cut ones in a group, merged kv heads with and without FFN."""
Parent = Callable[[str], Path]
families = pytest.mark.parametrize("family", FAMILIES)
folded_or_last = pytest.mark.parametrize("norm", ["folded", "last"])


@pytest.fixture(scope="module")
def stock(tiny_parent: Parent) -> Callable[[str], nn.Module]:
    return cache(lambda family: AutoModelForCausalLM.from_pretrained(tiny_parent(family), dtype=torch.float32).eval())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    path = write_text(tmp_path_factory.mktemp("texts"), "fit", 0, documents=100)
    return Text(text=(str(path),), length=24)


def windows(count: int = 5, seed: int = 5) -> Tensor:
    return torch.randint(4, VOCAB_SIZE, (count, 12), generator=torch.Generator().manual_seed(seed))


def walk_of(folder: ModelFolder, batch_size: int = 2) -> ParentWalk:
    cpu = torch.device("cpu")
    return ParentWalk(folder, folder.checkpoint, device=cpu, dtype=torch.float32, batch_size=batch_size)


def contributions(folder: ModelFolder, plan: Plan = PLAN) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for passed in measure(walk_of(folder), windows(), plan.widths):
        found = passed.found
    return found


def chosen(folder: ModelFolder, plan: Plan = PLAN) -> dict[int, Tensor]:
    found = contributions(folder, plan)
    return {layer: kept_channels(found[layer], width) for layer, width in plan.widths.items()}


@pytest.mark.parametrize("family", ["llama", "gemma", "starcoder2"])
@pytest.mark.parametrize("steps", [1, 3, 96])
@torch.no_grad()
def test_channels_go_in_steps_each_by_what_is_left_of_the_output(
    family: str, steps: int, tiny_parent: Parent, stock: Callable[[str], nn.Module]
) -> None:
    layer, hidden = 2, list[Tensor]()
    mlp = stock(family).model.layers[layer].mlp
    down = mlp.c_proj if family == "starcoder2" else mlp.down_proj
    hook = down.register_forward_pre_hook(lambda _, args: hidden.append(args[0].flatten(0, 1)))
    stock(family)(input_ids=windows())
    hook.remove()
    each = torch.cat(hidden)[:, :, None] * down.weight.T  # [N, h, d]
    gone: list[int] = []
    for step in range(steps):
        left = [channel for channel in range(96) if channel not in gone]
        change = {channel: float(each[:, [*gone, channel]].sum(1).norm(dim=-1).mean()) for channel in left}
        gone += sorted(left, key=change.__getitem__)[: 96 * (step + 1) // steps - len(gone)]
    walk = walk_of(ModelFolder(tiny_parent(family)))
    *_, passed = measure(walk, windows(), [layer], steps=steps)
    found = passed.found[layer].argsort().tolist()
    # So near to each other in float32 that either may go first.
    assert sum(a != b for a, b in zip(found, gone, strict=True)) <= 2
    *_, once = measure(walk, windows(), [layer])
    assert (found == once.found[layer].argsort().tolist()) == (steps == 1)
    assert torch.equal(passed.stream, once.stream)


def test_a_student_with_channels_chosen_in_steps(tiny_parent: Parent, text: Text, tmp_path: Path) -> None:
    plan, students = "A0F0:40 A1F1 A2F2:24 A3F3 A4F4 A5F5", []
    for name, steps in (("once", 1), ("steps", 8)):
        fusion = Fusion(calibrate="none", channel_steps=steps)
        out, model = tmp_path / name, str(tiny_parent("llama"))
        made = fuse(model, plan=plan, out=out, fit_windows=4, fusion=fusion, text=text)
        assert [cut.share is None for cut in made.result.cuts] == [steps > 1] * 2
        assert str(made.result.cuts[0]).startswith("F0: 40 of 96 channels")
        assert ("channel_steps" in made.inputs["fusion"]) == (steps > 1), "results from before stay valid"
        students.append(ModelFolder(out).checkpoint.read("model.layers.0.mlp.up_proj.weight"))
    assert students[0].shape == students[1].shape
    assert not torch.equal(*students)


@families
@folded_or_last
@torch.no_grad()
def test_a_student_of_other_sizes_computes_what_its_plan_says(
    family: str, norm: str, tiny_parent: Parent, stock: Callable[[str], nn.Module]
) -> None:
    parent = ModelFolder(tiny_parent(family))
    parent.check_plan(PLAN)
    channels = chosen(parent)
    best = {layer: top_channels(stock(family), windows(), layer, width) for layer, width in PLAN.widths.items()}
    assert {layer: kept.tolist() for layer, kept in channels.items()} == best
    student = in_memory(parent, PLAN, norm, channels)
    expected = planned_logits(stock(family), PLAN, windows(), norm, best)
    assert relative_error(student(input_ids=windows()).logits, expected) < TOLERANCE
    # The reference tells sizes, and channels, apart.
    worst = {layer: [c for c in range(96) if c not in kept][: len(kept)] for layer, kept in best.items()}
    for plan, other in ((PLAN, worst), (Plan.parse("A0F0:40 A1F1:24+2+3:70 A4 A5F5:90"), best)):
        assert relative_error(planned_logits(stock(family), plan, windows(), norm, other), expected) > 100 * TOLERANCE


@families
@torch.no_grad()
def test_it_decodes_with_a_cache_as_it_does_without(family: str, tiny_parent: Parent) -> None:
    parent = ModelFolder(tiny_parent(family))
    model, past, steps = in_memory(parent, PLAN, "folded", chosen(parent)), None, []
    for part in windows().split([7, 1, 4], dim=1):
        out = model(input_ids=part, past_key_values=past, use_cache=True)
        past = out.past_key_values
        steps.append(out.logits)
    assert relative_error(torch.cat(steps, 1), model(input_ids=windows(), use_cache=False).logits) < TOLERANCE


@families
def test_recipes_announce_the_shapes_of_the_configuration_before_channels_are_known(
    family: str, tiny_parent: Parent
) -> None:
    parent = ModelFolder(tiny_parent(family))
    recipes = student_recipes(PLAN, parent.checkpoint, student_arch(parent), "folded", Cuts(parent.head_dim))
    config = student_config(parent, PLAN)
    assert {name: recipe.spec.shape for name, recipe in recipes.items()} == expected_specs(config)[0]
    assert config.ffn_widths == [256] * 4
    assert [block.attention.n_heads_in_group for block in config.block_configs] == [4, 2, 4, 2]
    assert config.num_key_value_heads == 2
    merged = student_config(parent, Plan.parse("A0/1F0 -F1 A2/1F2"))
    assert merged.num_key_value_heads == 1, "for engines that know one number for all"
    cuts = Cuts(parent.head_dim, chosen(parent))
    for name, recipe in student_recipes(PLAN, parent.checkpoint, student_arch(parent), "folded", cuts).items():
        built = recipe.build()
        assert (tuple(built.shape), built.dtype) == recipe.spec, name


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2"])
@torch.no_grad()
def test_neighbouring_kv_heads_are_merged(family: str, tmp_path: Path) -> None:
    """Four into two: a group of heads next to each other, and not every second one."""
    parent = ModelFolder(save_tiny_parent(family, tmp_path / "parent", num_key_value_heads=4))
    stock = AutoModelForCausalLM.from_pretrained(parent.folder, dtype=torch.float32).eval()
    plan = Plan.parse("A0/2F0 A1F1 A2/1F2 A3/4F3 A4F4 A5/2F5")
    student = in_memory(parent, plan, "folded")
    expected = planned_logits(stock, plan, windows(), "folded")
    assert relative_error(student(input_ids=windows()).logits, expected) < TOLERANCE


@families
@torch.no_grad()
def test_a_saved_student_loads_to_the_logits_of_the_one_in_memory(
    family: str, tiny_parent: Parent, text: Text, tmp_path: Path
) -> None:
    parent = ModelFolder(tiny_parent(family))
    result = fuse(
        str(parent.folder), plan=str(PLAN), out=tmp_path / "student", fit_windows=4, text=text,
        fusion=Fusion(calibrate="none"),
    ).result  # fmt: skip
    assert [(cut.layer, cut.width, cut.parent_width) for cut in result.cuts] == [
        (layer, width, 96) for layer, width in PLAN.widths.items()
    ]
    assert all(cut.width / 96 < cut.share < 1 for cut in result.cuts)
    assert "F0: 40 of 96 channels, " in result.summary()
    assert result.sample is not None
    student = ModelFolder(tmp_path / "student")
    assert Plan.from_json((student.folder / "plan.json").read_text()) == PLAN
    ours = student.load(torch.float32, "cpu")(input_ids=windows()).logits
    shipped = AutoModelForCausalLM.from_pretrained(student.folder, trust_remote_code=True).eval()
    assert torch.equal(shipped(input_ids=windows()).logits, ours)


def test_a_plan_that_only_merges_heads_needs_no_text(tiny_parent: Parent, tmp_path: Path) -> None:
    plan, nothing = "A0/1F0 A1F1 A2F2 A3F3 A4F4 A5F5", Fusion(calibrate="none")
    result = fuse(str(tiny_parent("llama")), plan=plan, out=tmp_path / "s", fusion=nothing).result
    assert result.sample is None
    assert result.cuts == []


def test_a_cut_of_nothing_changes_nothing(tiny_parent: Parent) -> None:
    parent = ModelFolder(tiny_parent("llama"))
    plan = Plan.parse("A0/2F0:96 A1F1 A2F2 A3F3 A4F4 A5F5")
    student = in_memory(parent, plan, "folded", chosen(parent, plan))
    whole = in_memory(parent, parent.plan, "folded")
    with torch.no_grad():
        assert torch.equal(student(input_ids=windows()).logits, whole(input_ids=windows()).logits)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ("A0F0 A1F1:97", ["FFN 1", "97", "96"]),
        ("A0F0 A1/3F1", ["attention 1", "3 kv heads", "divisor of the 2"]),
        ("A0F0 A1/4F1", ["attention 1", "4 kv heads"]),
    ],
)
def test_sizes_that_the_parent_cannot_be_cut_to_are_refused(plan: str, says: list[str], tiny_parent: Parent) -> None:
    parent = ModelFolder(tiny_parent("llama"))
    one_line(lambda: parent.check_plan(Plan.parse(plan)), *says)
    one_line(lambda: fuse(str(parent.folder), plan=plan, out=Path("nowhere")), *says)


def test_a_measurement_taken_up_again_and_one_in_other_batches_find_the_same(tiny_parent: Parent) -> None:
    folder = ModelFolder(tiny_parent("granite"))
    whole = contributions(folder)
    first = next(iter(measure(walk_of(folder), windows(), PLAN.widths)))
    saved = Passed(first.layer, first.stream.clone(), dict(first.found))
    assert list(saved.found) == [0]
    for passed in measure(walk_of(folder), windows(), PLAN.widths, saved):
        rest = passed.found
    assert all(torch.equal(rest[layer], whole[layer]) for layer in whole)
    assert list(measure(walk_of(folder), windows(), PLAN.widths, passed)) == []
    for passed in measure(walk_of(folder, batch_size=5), windows(), PLAN.widths):
        torch.testing.assert_close(passed.found[0], whole[0])


def test_the_student_that_is_measured_is_the_one_that_is_written(tiny_parent: Parent, tmp_path: Path) -> None:
    folder, fit = ModelFolder(tiny_parent("llama")), windows(16, 0)
    model, machine = folder.load(torch.float32, "cpu"), Machine(batch_size=2)
    fusion = Fusion(calibrate="none")
    meter = Meter(folder, model, as_windows(windows()), as_windows(fit), fusion, machine)
    for passed in measure(walk_of(folder), fit, PLAN.widths):
        channels = {layer: kept_channels(c, PLAN.widths[layer]) for layer, c in passed.found.items()}
    write_student(folder, PLAN, tmp_path, "folded", {}, channels)
    student = ModelFolder(tmp_path).load(torch.float32, "cpu")
    with torch.no_grad():
        ref = reference(model(input_ids=windows()).logits.flatten(0, 1))
        kl = kl_to(ref, student(input_ids=windows()).logits.flatten(0, 1)).mean()
    assert meter.plain(PLAN).mean == pytest.approx(float(kl), rel=1e-4)
    assert meter.plain(PLAN.unfused()).mean > 0


@pytest.mark.parametrize("target", ["parent", "unfused"])
def test_a_fit_makes_up_for_smaller_sublayers(target: str, tiny_parent: Parent) -> None:
    folder = ModelFolder(tiny_parent("llama"))
    plan = Plan.parse("A0F0 A1/1F1:64 A2F2 A3F3:48 A4F4 A5F5")
    fusion = Fusion(calibrate=target)  # type: ignore[arg-type]
    fits = [fit for fit, _, _ in Calibration(walk_of(folder), plan, fusion, chosen(folder, plan)).run(windows(48, 1))]
    assert [fit.block for fit in fits] == [1, 3]
    assert all(fit.error_after <= fit.error_before for fit in fits)
    meter = Meter(
        folder,
        folder.load(torch.float32, "cpu"),
        as_windows(windows(8, 2)),
        as_windows(windows(64, 1)),
        fusion,
        Machine(),
    )
    assert meter.fused(plan).mean < meter.plain(plan).mean


def test_a_cut_plan_that_reorders_layers_is_refused_before_anything_is_measured(
    tiny_parent: Parent, tmp_path: Path
) -> None:
    plan = "A0F0 A2F2:64 A1F1 A3F3 A4F4 A5F5"
    one_line(lambda: fuse(str(tiny_parent("llama")), plan=plan, out=tmp_path / "s"), "reorders", "--calibrate none")
    assert list(tmp_path.iterdir()) == []


def first_channels(self: object, index: int, tensor: Tensor, dim: int) -> Tensor:
    width = self.members[index].width  # type: ignore[attr-defined]
    return tensor if width is None else tensor.narrow(dim, 0, width)


@folded_or_last
def test_a_student_with_other_channels_than_were_chosen_is_never_finished(
    norm: str, tiny_parent: Parent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ModelFolder(tiny_parent("llama"))
    channels = chosen(folder)
    monkeypatch.setattr("ffn_fusion.hf.surgery._FfnRecipes._kept", first_channels)
    with pytest.raises(AssertionError, match="differs from its members"):
        write_student(folder, PLAN, tmp_path, norm, {}, channels)  # type: ignore[arg-type]
    assert not (tmp_path / "config.json").exists()


def test_a_student_of_other_sizes_is_the_same_each_time(tiny_parent: Parent, text: Text, tmp_path: Path) -> None:
    for name in "ab":
        fuse(str(tiny_parent("qwen3")), plan=str(PLAN), out=tmp_path / name, fit_windows=8, text=text)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_records_from_before_there_were_sizes_are_read(tiny_student: Parent, tmp_path: Path) -> None:
    record = json.loads((tiny_student("llama") / RECORD).read_text())
    del record["result"]["cuts"]
    (tmp_path / RECORD).write_text(json.dumps(record))
    assert read_record(tmp_path, FuseResult).result.cuts == []
