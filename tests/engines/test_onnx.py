"""ONNX graphs in ONNX Runtime GenAI."""

from collections.abc import Callable
from pathlib import Path

import pytest
from graphs import STUDENTS, assert_exported_same, make_student
from running import needs

from ffn_fusion.serving import onnx

pytestmark = needs("onnxruntime-genai")


@pytest.mark.parametrize("name", STUDENTS)
def test_the_graph_computes_what_the_student_computes(
    name: str, tiny_parent: Callable[[str], Path], tmp_path: Path
) -> None:
    student = make_student(name, tiny_parent, tmp_path / "student")
    assert_exported_same(onnx, student, ("onnxruntime-genai", "onnx_genai"), tmp_path)
