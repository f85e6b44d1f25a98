"""OpenVINO: the graph with its cache as the engine's state, and the tokenizer.

Names of files and inputs are those of optimum-intel, `beam_idx` included, so that its readers find them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ffn_fusion.errors import UserError
from ffn_fusion.hf.model import ModelFolder, copy_tokenizer
from ffn_fusion.serving import traced
from ffn_fusion.serving.traced import Traced, program, quiet

DTYPES = ("f32", "f16")


def why_not(student: ModelFolder) -> str | None:
    """Why a student cannot become an OpenVINO graph, or None."""
    return traced.why_not(student)


def write(student: ModelFolder, folder: Path, dtype: str) -> None:
    """Write `openvino_model.xml` and `.bin`; f16 is how weights are stored, not how they are computed with.

    `UserError` without the package openvino.
    """
    try:
        import openvino
        from openvino._offline_transformations import apply_make_stateful_transformation
    except ImportError:
        raise UserError("writing OpenVINO needs one more package: pip install openvino") from None
    module = Traced(student.load(torch.float32, "cpu"))
    with quiet():
        graph = openvino.convert_model(program(module, beams=True))
    names = [f"{ordinal}.{part}" for ordinal in range(len(module.ordinals)) for part in ("key", "value")]
    past, present = [f"past_key_values.{name}" for name in names], [f"present.{name}" for name in names]
    _name(graph.inputs, ["input_ids", "attention_mask", *past, "beam_idx"])
    _name(graph.outputs, ["logits", *present])
    for ordinal, (heads, dimension) in enumerate(module.cache_shapes):
        for part in ("key", "value"):
            # The conversion frees every size of an input.
            cache = graph.input(f"past_key_values.{ordinal}.{part}").get_node()
            cache.set_partial_shape(openvino.PartialShape([-1, heads, -1, dimension]))
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, dict(zip(past, present, strict=True)))
    _start_empty(graph)
    openvino.save_model(graph, folder / "openvino_model.xml", compress_to_fp16=dtype == "f16")
    copy_tokenizer(student.folder, folder)


def _name(ports: Sequence[Any], names: Sequence[str]) -> None:
    for port, name in zip(ports, names, strict=True):
        port.tensor.set_names({name})


def _start_empty(graph: Any) -> None:
    """Give each state its first value, no tokens for each sequence of the batch: a state alone starts without any."""
    from openvino import opset15 as ops

    shape = ops.shape_of(graph.input("input_ids"), output_type="i64")
    batch = ops.gather(shape, ops.constant([0]), ops.constant(0))
    for state in graph.get_ops():
        if state.get_type_name() == "ReadValue":
            _, heads, _, dimension = state.get_output_partial_shape(0)
            rest = ops.constant([heads.get_length(), 0, dimension.get_length()])
            zero = ops.constant(0.0, dtype=state.get_output_element_type(0))
            state.set_arguments([ops.broadcast(zero, ops.concat([batch, rest], 0))])
    graph.validate_nodes_and_infer_types()
