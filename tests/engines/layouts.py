"""Tiny random students of every layout that engines treat differently; tests of engines share them."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from conftest import tiny_tokenizer

from ffn_fusion.hf.block_configs import attention_entry, ffn_entry
from ffn_fusion.hf.model import PLAN_FILE, ModelFolder, copy_companions
from ffn_fusion.hf.remote.configuration_ffn_fusion import DeciLMConfig
from ffn_fusion.hf.remote.modeling_ffn_fusion import DeciLMForCausalLM

HIDDEN, HEADS, VOCAB_SIZE = 256, 4, 512
LAYOUTS: dict[str, list[tuple[int, int]]] = {
    "fusion": [(2, 512), (2, 512), (0, 1536), (2, 512), (0, 1024), (1, 512)],
    "padded": [(2, 500), (2, 500), (0, 1500), (2, 500), (0, 1000), (2, 500)],
    "wideattn": [(2, 512), (2, 2048), (0, 4096), (2, 512)],
    "empty": [(2, 512), (0, 0), (0, 1536), (2, 512), (0, 0), (2, 512)],
    "ffnfree": [(2, 512), (2, 0), (0, 1536), (2, 512)],
    "lastwide": [(2, 512), (2, 512), (0, 1536)],
    "lastempty": [(2, 512), (0, 1536), (2, 512), (0, 0)],
    "lastffnfree": [(2, 512), (0, 1536), (2, 0)],
    "first": [(0, 512), (2, 512), (0, 1536), (2, 512)],
}
"""(kv heads, FFN width) of each block, 0 without one. Widths go up to a multiple of 256, the new channels zero."""


def layout_config(name: str, **changes: object) -> DeciLMConfig:
    """A student's configuration with the blocks of a layout; `changes` override its other fields."""
    blocks = [
        {
            "attention": attention_entry(HEADS // kv_heads if kv_heads else None),
            "ffn": ffn_entry(width, HIDDEN) | ({} if width else {"no_op": True, "ffn_mult": None}),
        }
        for kv_heads, width in LAYOUTS[name]
    ]
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"},
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    config = DeciLMConfig(**fields | changes, num_hidden_layers=len(blocks), block_configs=blocks)
    config.architectures = ["DeciLMForCausalLM"]
    config.auto_map = {
        "AutoConfig": "configuration_ffn_fusion.DeciLMConfig",
        "AutoModelForCausalLM": "modeling_ffn_fusion.DeciLMForCausalLM",
    }
    return config


def save_layout(name: str, folder: Path, **changes: object) -> Path:
    """Make a float32 student of a layout in `folder`, with a tokenizer of printable ASCII."""
    config = layout_config(name, **changes)
    model = DeciLMForCausalLM(config).float()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Gains far from one and large weights, or a wrong layer would pass unseen.
            parameter.copy_(noise * 0.2 + 1 if "norm" in parameter_name else noise * 0.08)
        for block, (_, width) in zip(model.model.layers, LAYOUTS[name], strict=True):
            if width:
                block.mlp.gate_proj.weight[width:] = 0
                block.mlp.down_proj.weight[:, width:] = 0
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    with TemporaryDirectory() as parent:
        tiny_tokenizer().save_pretrained(parent)
        copy_companions(Path(parent), folder)
    student = ModelFolder(folder)
    student.check()
    if LAYOUTS[name][0][0]:
        # A plan has an attention in layer 0.
        (folder / PLAN_FILE).write_text(student.plan.to_json(), encoding="utf-8")
    return folder
