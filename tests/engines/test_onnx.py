"""ONNX graphs in ONNX Runtime GenAI. FFN_FUSION_ENGINE_ONNX_GENAI names a Python that has it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from graphs import STUDENTS, largest_error, make_student

from ffn_fusion.export import onnx

RUN = (os.environ.get("FFN_FUSION_ENGINE_ONNX_GENAI", ""), "onnx_genai_probe.py")
pytestmark = pytest.mark.skipif(not RUN[0], reason="FFN_FUSION_ENGINE_ONNX_GENAI is not set")


@pytest.mark.parametrize("name", STUDENTS)
def test_the_graph_computes_what_the_student_computes(
    name: str, tiny_parent: Callable[[str], Path], tmp_path: Path
) -> None:
    student = make_student(name, tiny_parent, tmp_path / "student")
    assert largest_error(onnx, student, "f32", RUN, tmp_path) < 1e-4
