"""`bench` in real engines: a parent and its student with weights in llama.cpp, a shape without any in vLLM."""

import json
from pathlib import Path
from typing import Any

from conftest import save_tiny_parent
from running import needs, python_of

from ffn_fusion.settings import Fusion, Machine
from ffn_fusion.stages.bench import bench
from ffn_fusion.stages.fuse import fuse

CALL: dict[str, Any] = {"prompt_lengths": (16,), "new_tokens": 64, "repeats": 2, "timeout": 600, "untested": True}
SIZES = {"hidden_size": 256, "intermediate_size": 512}
CONFIG = SIZES | {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@needs("llama.cpp")
def test_a_parent_and_its_student_in_llama_cpp(tmp_path: Path) -> None:
    parent, student = save_tiny_parent("llama", tmp_path / "parent", **SIZES), tmp_path / "student"
    fuse(str(parent), plan="A0F0 A1F1+2 -F3 A4F4 A5F5", out=student, fusion=Fusion(calibrate="none"))
    engine = {"engine": "llama.cpp", "engine_python": python_of("llama.cpp"), "batch_sizes": (1,)}
    result = bench(str(parent), str(student), out=tmp_path / "out", **engine, **CALL).result
    assert [failure.reason for failure in result.failures] == []
    assert [row.decode_ms.median > 0 for row in result.rows] == [True, True]
    assert result.rows[1].ratio


@needs("vllm")
def test_a_shape_in_vllm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    result = bench(
        shape=str(tmp_path / "config.json"),
        plan="A0F0 A1F1+2 A3F3",
        engine="vllm",
        engine_python=python_of("vllm"),
        batch_sizes=(1, 2),
        out=tmp_path / "out",
        machine=Machine(dtype="bf16"),
        **CALL | {"new_tokens": 128},  # 64 can take no longer than the prompt on a busy machine
    ).result
    assert [failure.reason for failure in result.failures] == []
    assert len(result.rows) == 6
    assert all(row.decode_ms.median > 0 for row in result.rows)
