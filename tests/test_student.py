"""Writing a student: what was written is compared with the members before the folder gets its name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES

from ffn_fusion.core import fusion
from ffn_fusion.core.plan import Plan
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.student import write_student

PLAN = Plan.parse("A0F0 A1F1+2+3 A4F4 A5F5")


@pytest.mark.parametrize("norm", ["folded", "last"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_right_student_passes_its_own_check(
    family: str, norm: str, tiny_parent: Callable[[str], Path], tmp_path: Path
) -> None:
    parent = ModelFolder(tiny_parent(family))
    dropped = write_student(parent, PLAN, tmp_path, norm, {}, {})  # type: ignore[arg-type]
    assert any("layers.2.self_attn" in name for name in dropped)
    assert not any("layers.2.mlp" in name for name in dropped)


def reversed_rows(members: list[torch.Tensor], rows: int) -> torch.Tensor:
    return stack_rows([*members][::-1], rows)


def forgotten_column(members: list[torch.Tensor], columns: int) -> torch.Tensor:
    first, *rest = members
    return stack_columns([torch.zeros_like(first), *rest], columns)


stack_rows, stack_columns = fusion.stack_rows, fusion.stack_columns


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("scale_columns", lambda weight, gain: weight),
        ("stack_rows", reversed_rows),
        ("stack_columns", forgotten_column),
    ],
)
def test_a_wrong_student_is_never_finished(
    name: str, wrong: object, tiny_parent: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion, name, wrong)
    with pytest.raises(AssertionError, match="differs from its members"):
        write_student(ModelFolder(tiny_parent("llama")), PLAN, tmp_path, "folded", {}, {})
    assert not (tmp_path / "config.json").exists()
