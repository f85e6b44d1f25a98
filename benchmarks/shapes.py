"""Folders of a parent's shape and its fused student's without weights, to time an engine with dummy weights.

python benchmarks/shapes.py OUT [--plan PLAN]    Llama-3.1-8B's shape unless --config names another config.json.
"""

import argparse
import json
from pathlib import Path

from ffn_fusion.core.plan import Plan
from ffn_fusion.hf.model import ModelFolder, copy_companions, student_config

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
TEN_REMOVED = " ".join(
    [
        *(f"A{i}F{i}" for i in range(17)),
        "A17F17+18+19+20+21+22",
        "-F23+24+25+26+27",
        *(f"A{i}F{i}" for i in range(28, 32)),
    ]
)
"""Ten attentions gone and eleven FFNs fused into two: 64 sequential sublayers become 45."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--plan", default=TEN_REMOVED)
    options = parser.parse_args()
    fields = json.loads(options.config.read_text()) if options.config else LLAMA_8B
    parent, student = options.out / "parent", options.out / "fused"
    for folder in (parent, student):
        folder.mkdir(parents=True)
    (parent / "config.json").write_text(json.dumps(fields))
    config = student_config(ModelFolder(parent), Plan.parse(options.plan))
    (student / "config.json").write_text(json.dumps(config.to_dict()))
    copy_companions(parent, student)


if __name__ == "__main__":
    main()
