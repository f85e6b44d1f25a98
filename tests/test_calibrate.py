"""Calibrated fusion on tiny models: it helps where it says so, resumes bit for bit, and refuses what has no target."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from texts import as_windows
from torch import Tensor

from ffn_fusion.core.plan import Plan
from ffn_fusion.errors import UserError
from ffn_fusion.hf.calibrate import Calibration, Streams, blocks_to_fit
from ffn_fusion.hf.meter import Meter
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.probe import record
from ffn_fusion.hf.walk import ParentWalk
from ffn_fusion.settings import Fusion, Machine

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "gemma", "smollm3", "arcee", "starcoder2")
PLAN = Plan.parse("A0F0 A1F1+2 -F3 A4F4 A5F5")
MACHINE = Machine(batch_size=3)


def calibration(folder: ModelFolder, plan: Plan, target: str = "parent") -> Calibration:
    fusion = Fusion(calibrate=target)  # type: ignore[arg-type]
    walk = ParentWalk(
        folder, folder.checkpoint, device=torch.device("cpu"), dtype=torch.float32, batch_size=MACHINE.batch_size
    )
    return Calibration(walk, plan, fusion, {})


def windows(count: int, seed: int) -> Tensor:
    return torch.randint(4, 128, (count, 24), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_fitted_blocks_come_closer_to_the_parent_in_every_family(
    family: str, tiny_parent: Callable[[str], Path]
) -> None:
    folder = ModelFolder(tiny_parent(family))
    fits = [fit for fit, _, _ in calibration(folder, PLAN).run(windows(32, 0))]
    assert [fit.block for fit in fits] == [1, 2]
    assert all(fit.error_after <= fit.error_before for fit in fits)
    assert any(fit.error_after < 0.95 * fit.error_before for fit in fits)


@pytest.mark.parametrize("target", ["parent", "unfused"])
def test_a_fit_lowers_the_kl_of_the_whole_model(target: str, tiny_parent: Callable[[str], Path]) -> None:
    folder = ModelFolder(tiny_parent("llama"))
    model = folder.load(torch.float32, "cpu")
    plan = PLAN if target == "parent" else Plan.parse("A0F0 A1F1 -F2+3+4 A5F5")
    meter = Meter(
        folder, model, as_windows(windows(8, 1)), as_windows(windows(64, 0)), Fusion(calibrate=target), MACHINE
    )  # type: ignore[arg-type]
    fitted = meter.fused(plan).mean
    meter.fusion = replace(meter.fusion, calibrate="none")
    assert fitted < meter.fused(plan).mean


def test_the_identity_plan_costs_nothing_and_fits_nothing(tiny_parent: Callable[[str], Path]) -> None:
    folder = ModelFolder(tiny_parent("llama"))
    meter = Meter(
        folder,
        folder.load(torch.float32, "cpu"),
        as_windows(windows(4, 1)),
        as_windows(windows(8, 0)),
        Fusion(),
        MACHINE,
    )
    assert abs(meter.fused(folder.plan).mean) < 1e-5
    assert list(calibration(folder, folder.plan).run(windows(8, 0))) == []


def test_streams_of_an_unchanged_plan_are_those_of_the_model(tiny_parent: Callable[[str], Path]) -> None:
    """The last target is the parent's last hidden state, with the masks and multipliers of any family."""
    for family in ("qwen2", "granite", "gemma"):
        folder = ModelFolder(tiny_parent(family))
        plan = Plan.parse("A0F0 A1F1 A2F2 A3F3 A4F4 -F5")
        ids = windows(8, 0)
        *_, (_, _, state) = calibration(folder, plan).run(ids)
        seen: list[Tensor] = []
        model = folder.load(torch.float32, "cpu")
        model.model.layers[-1].register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        with torch.no_grad():
            model(input_ids=ids)
        torch.testing.assert_close(state.parent, seen[0], rtol=1e-4, atol=1e-4)


def test_a_calibration_taken_up_again_gives_the_same_fits(tiny_parent: Callable[[str], Path]) -> None:
    folder = ModelFolder(tiny_parent("llama"))
    ids = windows(16, 0)
    whole = [weight for _, weight, _ in calibration(folder, PLAN).run(ids)]
    run = calibration(folder, PLAN).run(ids)
    _, first, state = next(run)
    saved = Streams(state.block, state.layer, state.parent.clone(), state.student.clone())
    rest = [weight for _, weight, _ in calibration(folder, PLAN).run(ids, saved)]
    assert torch.equal(first, whole[0])
    assert len(rest) == 1
    assert torch.equal(rest[0], whole[1])


def test_known_parent_streams_give_the_same_fits(tiny_parent: Callable[[str], Path]) -> None:
    folder = ModelFolder(tiny_parent("granite"))
    ids = windows(16, 0)
    known = record(folder.load(torch.float32, "cpu"), ids).streams
    computed = [weight for _, weight, _ in calibration(folder, PLAN).run(ids)]
    given = [weight for _, weight, _ in calibration(folder, PLAN).run(ids, known=known)]
    for a, b in zip(computed, given, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_wide_blocks_are_fitted_in_slices(tiny_parent: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ModelFolder(tiny_parent("llama"))
    (whole, _, _), *_ = calibration(folder, PLAN).run(windows(32, 0))
    monkeypatch.setattr("ffn_fusion.hf.fit.MAX_CHANNELS", 100)
    (sliced, _, _), *_ = calibration(folder, PLAN).run(windows(32, 0))
    assert len(sliced.strengths) == 2 * 3  # 256 channels in three slices, two sweeps
    assert sliced.error_after < 0.5 * (sliced.error_before + whole.error_after)


def test_blocks_to_fit_are_those_that_differ_from_the_parent() -> None:
    parent = Plan.identity(6)
    assert blocks_to_fit(PLAN, parent, "parent") == [1, 2]
    assert blocks_to_fit(PLAN, parent, "unfused") == [1]
    assert blocks_to_fit(parent, parent, "parent") == []
    dropped = Plan.parse("A0F0 A1F1 A3F3 A4F4 A5F5")
    assert blocks_to_fit(dropped, parent, "parent") == [1]  # it stands where layer 2 was


def test_blocks_of_other_sizes_than_the_parents_are_fitted() -> None:
    parent = Plan.identity(6)
    plan = Plan.parse("A0F0 A1F1:64 A2F2 A3/1F3 A4/1 A5F5")
    assert blocks_to_fit(plan, parent, "parent") == [1, 3, 5]
    assert blocks_to_fit(plan, parent, "unfused") == [1]


def test_an_ffn_answers_for_the_attention_without_ffn_in_front_of_it() -> None:
    parent = Plan.identity(6)
    assert blocks_to_fit(Plan.parse("A0F0 A1 A2F2 A3F3 A4F4 A5"), parent, "parent") == [2]
    assert blocks_to_fit(Plan.parse("A0F0 A1 A2 A3F3 A4F4 -F5"), parent, "parent") == [3, 5]


def test_blocks_that_the_parent_has_as_they_are_need_no_fit() -> None:
    parent = Plan.parse("A0F0 A1 -F2 A5F5")  # layers 3 and 4 hold nothing
    assert blocks_to_fit(parent, parent, "parent") == []
    assert blocks_to_fit(parent.without_attention([1]), parent, "parent") == [0]
    assert blocks_to_fit(Plan.parse("A0F0 A1 -F2 -F5"), parent, "parent") == [3]


def test_a_plan_that_reorders_layers_is_refused(tiny_parent: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="reorders"):
        calibration(ModelFolder(tiny_parent("llama")), Plan.parse("A0F0 A2F2 A1F1 A3F3 A4F4 A5F5"))
