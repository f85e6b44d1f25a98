"""ONNX for ONNX Runtime GenAI: the graph, its `genai_config.json` and the tokenizer."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from ffn_fusion.errors import UserError
from ffn_fusion.hf.checkpoint import read_json
from ffn_fusion.hf.model import ModelFolder, copy_tokenizer
from ffn_fusion.serving import traced
from ffn_fusion.serving.traced import Traced, program, quiet

DTYPES = ("f32", "f16")
OPSET = 20
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


def why_not(student: ModelFolder) -> str | None:
    """Why a student cannot become an ONNX graph, or None."""
    return traced.why_not(student)


def write(student: ModelFolder, folder: Path, dtype: str) -> None:
    """Write `model.onnx` with its weights beside it; `UserError` without the packages that torch.onnx needs."""
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
        raise UserError("writing ONNX needs two more packages: pip install onnx onnxscript")
    module = Traced(student.load(torch.float16 if dtype == "f16" else torch.float32, "cpu"))
    names = [f"{{}}.{ordinal}.{part}" for ordinal in range(len(module.ordinals)) for part in ("key", "value")]
    with quiet():
        made = torch.onnx.export(
            program(module, beams=False),
            input_names=["input_ids", "attention_mask", *(name.format("past_key_values") for name in names)],
            output_names=["logits", *(name.format("present") for name in names)],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert made is not None
    made.save(folder / "model.onnx", external_data=True)
    text = json.dumps(genai_config(student, module), indent=2)
    (folder / "genai_config.json").write_text(text, encoding="utf-8")
    copy_tokenizer(student.folder, folder)


def genai_config(student: ModelFolder, module: Traced) -> dict[str, Any]:
    """ONNX Runtime GenAI's description of the graph; it counts caches, not blocks, as layers."""
    config = student.config
    path = student.folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    kv_heads, head_size = module.cache_shapes[0]
    decoder = {
        "filename": "model.onnx",
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": kv_heads,
        "head_size": head_size,
        "num_hidden_layers": len(module.ordinals),
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    special = {name: generation.get(name, getattr(config, name)) for name in ("bos_token_id", "eos_token_id")}
    ends = special["eos_token_id"]
    padding = generation.get("pad_token_id", config.pad_token_id)
    special["pad_token_id"] = padding if padding is not None else ends[0] if isinstance(ends, list) else ends
    length = config.max_position_embeddings
    return {
        "model": {
            # Its name for any decoder of text; what kind of blocks it has is the graph's.
            "type": "llama",
            "vocab_size": config.vocab_size,
            "context_length": length,
            **{name: value for name, value in special.items() if value is not None},
            "decoder": decoder,
        },
        "search": {
            **{name: generation[name] for name in SAMPLING if generation.get(name) is not None},
            "max_length": length,
            # A shared buffer would need one size for all caches, and kernels that write into it.
            "past_present_share_buffer": False,
        },
    }
