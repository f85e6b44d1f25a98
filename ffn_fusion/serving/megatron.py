"""Target `megatron`: the layer JSON of Megatron-Core's heterogeneous transformer, with the configuration around it.

The weights stay in the student folder: Megatron-Bridge imports the nemotron-nas layout itself. The tests run
Megatron-Core's reader of the JSON, not the model.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ffn_fusion.core.layout import is_linear
from ffn_fusion.hf.model import ModelFolder

LAYERS = "heterogeneous.json"
LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
"""What Megatron-Core's rope scaling has no flags for."""


def why_not(student: ModelFolder) -> str | None:
    """Why the heterogeneous block specification has no place for this student, or None."""
    if student.arch.class_name != "DeciLMForCausalLM":
        return f"its heterogeneous layers are Llama's, and this is the layout {student.arch.class_name}"
    rope = student.config.rope_parameters
    if rope["rope_type"] not in ("default", "llama3"):
        return f"it has no flags for rope type {rope['rope_type']!r}"
    if rope["rope_type"] == "llama3" and any(rope[name] != value for name, value in LLAMA3.items()):
        return f"its llama3 rope scaling is fixed to {', '.join(f'{name} {value}' for name, value in LLAMA3.items())}"
    return None


def write(student: ModelFolder, folder: Path, _dtype: str) -> None:
    """Write `heterogeneous.json`, one entry a block, and `arguments.txt`, the command-line flags that go with it."""
    blocks = [_block(student, index) for index in range(student.num_layers)]
    text = json.dumps({"block_configs": blocks}, indent=1)
    (folder / LAYERS).write_text(text + "\n", encoding="utf-8")
    (folder / "arguments.txt").write_text("\n".join(_arguments(student)) + "\n", encoding="utf-8")


def _block(student: ModelFolder, index: int) -> dict[str, Any]:
    """Both sizes are always there, null where there is nothing: without them other keys are looked for and missed."""
    config = student.config
    block, width = config.block_configs[index], config.ffn_widths[index]
    group = block.attention.n_heads_in_group
    return {
        "attention": {
            "no_op": block.attention.no_op,
            "replace_with_linear": is_linear(block.attention),
            "num_query_groups": config.num_attention_heads // group if group else None,
        },
        "mlp": {
            "no_op": block.ffn.no_op,
            "replace_with_linear": is_linear(block.ffn),
            "ffn_hidden_size": width or None,
        },
    }


def _arguments(student: ModelFolder) -> Iterator[str]:
    config = student.config
    yield f"--heterogeneous-layers-config-path {LAYERS}"
    yield f"--num-layers {config.num_hidden_layers}"
    yield f"--hidden-size {config.hidden_size}"
    yield f"--ffn-hidden-size {config.intermediate_size}"
    yield f"--num-attention-heads {config.num_attention_heads}"
    yield "--group-query-attention"
    yield f"--num-query-groups {config.num_key_value_heads}"
    yield f"--kv-channels {config.hidden_size // config.num_attention_heads}"
    yield f"--max-position-embeddings {config.max_position_embeddings}"
    yield "--position-embedding-type rope"
    yield f"--rotary-base {int(config.rope_parameters['rope_theta'])}"
    if config.rope_parameters["rope_type"] == "llama3":
        yield "--use-rope-scaling"
        yield f"--rope-scaling-factor {config.rope_parameters['factor']}"
    yield "--normalization RMSNorm"
    yield f"--norm-epsilon {config.rms_norm_eps}"
    yield "--swiglu"
    yield "--disable-bias-linear"
    if not config.tie_word_embeddings:
        yield "--untie-embeddings-and-output-weights"
