"""The graph that ONNX and OpenVINO are written from, in torch alone: cached steps, padding, beams, free sizes."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, VOCAB_SIZE
from torch import Tensor

from ffn_fusion.core.plan import Plan
from ffn_fusion.errors import UserError
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.student import write_student
from ffn_fusion.serving import onnx, openvino, traced
from ffn_fusion.serving.traced import Traced, program

IDS = torch.randint(4, VOCAB_SIZE, (2, 20), generator=torch.Generator().manual_seed(0))


def make_student(family: str, tiny_parent: Callable[[str], Path], folder: Path) -> ModelFolder:
    write_student(ModelFolder(tiny_parent(family)), Plan.parse("A0F0 A1F1+2 -F3 A4F4+5"), folder, "folded", {}, {})
    return ModelFolder(folder)


def load(student: ModelFolder) -> Traced:
    return Traced(student.load(torch.float32, "cpu")).requires_grad_(False)


def no_past(module: Traced, batch: int) -> list[Tensor]:
    return [torch.zeros(batch, heads, 0, width) for heads, width in module.cache_shapes for _ in range(2)]


def ones(batch: int, length: int) -> Tensor:
    return torch.ones(batch, length, dtype=torch.int64)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_cached_steps_equal_the_whole_text_at_once(
    family: str, tiny_parent: Callable[[str], Path], tmp_path: Path
) -> None:
    module = load(make_student(family, tiny_parent, tmp_path))
    past, rows = no_past(module, 2), []
    for start, end in ((0, 9), (9, 10), (10, 11), (11, 20)):
        logits, past = module(IDS[:, start:end], ones(2, end), past)
        rows.append(logits)
    assert [tuple(entry.shape) for entry in past] == [
        (2, *shape[:1], 20, shape[1]) for shape in module.cache_shapes * 2
    ]
    torch.testing.assert_close(torch.cat(rows, 1), module.model(IDS).logits, rtol=0, atol=1e-4)


def test_padding_on_the_left_changes_nothing(tiny_parent: Callable[[str], Path], tmp_path: Path) -> None:
    module = load(make_student("qwen2", tiny_parent, tmp_path))
    mask = ones(2, 20)
    mask[1, :7] = 0
    logits, past = module(IDS[:, :19], mask[:, :19], no_past(module, 2))
    last, _ = module(IDS[:, 19:], mask, past)
    expected = module.model(IDS[1:, 7:]).logits[0]
    torch.testing.assert_close(torch.cat((logits, last), 1)[1, 7:], expected, rtol=0, atol=1e-4)


def test_an_exported_graph_takes_any_size_and_beams_continue_their_row(
    tiny_parent: Callable[[str], Path], tmp_path: Path
) -> None:
    module = load(make_student("llama", tiny_parent, tmp_path))
    run = program(module, beams=True).module()
    whole = module.model(IDS).logits
    own, swapped = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32)
    _, past = run(input_ids=IDS[:, :18], attention_mask=ones(2, 18), past=no_past(module, 2), beam_idx=own)
    logits, past = run(input_ids=IDS.flip(0)[:, 18:19], attention_mask=ones(2, 19), past=past, beam_idx=swapped)
    torch.testing.assert_close(logits[:, 0], whole[:, 18].flip(0), rtol=0, atol=1e-4)
    first = run(input_ids=IDS[:1], attention_mask=ones(1, 20), past=no_past(module, 1), beam_idx=own[:1])[0]
    torch.testing.assert_close(first, whole[:1], rtol=0, atol=1e-4)


def test_missing_packages_are_named_with_the_command_that_installs_them(
    tiny_parent: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = ModelFolder(tiny_parent("llama"))
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match="pip install openvino"):
        openvino.write(student, tmp_path, "f32")
    monkeypatch.setattr(onnx.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install onnx onnxscript"):
        onnx.write(student, tmp_path, "f32")


def test_rotary_positions_that_follow_the_length_are_refused(tiny_parent: Callable[[str], Path]) -> None:
    student = ModelFolder(tiny_parent("llama"))
    assert traced.why_not(student) is None
    student.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert "rotary" in str(traced.why_not(student))
