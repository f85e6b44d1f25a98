"""OpenVINO models in OpenVINO. FFN_FUSION_ENGINE_OPENVINO names a Python that has it and tokenizers."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from graphs import STUDENTS, largest_error, make_student

from ffn_fusion.export import openvino

RUN = (os.environ.get("FFN_FUSION_ENGINE_OPENVINO", ""), "openvino_probe.py")
pytestmark = pytest.mark.skipif(not RUN[0], reason="FFN_FUSION_ENGINE_OPENVINO is not set")


@pytest.mark.parametrize("name", STUDENTS)
def test_the_graph_computes_what_the_student_computes(
    name: str, tiny_parent: Callable[[str], Path], tmp_path: Path
) -> None:
    student = make_student(name, tiny_parent, tmp_path / "student")
    assert largest_error(openvino, student, "f32", RUN, tmp_path) < 1e-4
