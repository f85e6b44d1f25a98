"""A fused model: its parent family's own modules, with attention left out and FFNs widened block by block.

Shipped with every student of ffn-fusion. The stock model is built as ever and its layers are then edited to
`config.block_configs`; embeddings, masks, rotary positions, caches, generation and the head stay the family's.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    ArceeForCausalLM,
    GemmaForCausalLM,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Phi3ForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    SmolLM3ForCausalLM,
    Starcoder2ForCausalLM,
)

from .configuration_ffn_fusion import (
    DeciLMConfig,
    FusedArceeConfig,
    FusedGemmaConfig,
    FusedGraniteConfig,
    FusedLlamaConfig,
    FusedMistralConfig,
    FusedPhi3Config,
    FusedQwen2Config,
    FusedQwen3Config,
    FusedSmolLM3Config,
    FusedStarcoder2Config,
)


class Block:
    """Forward of one block, mixed into the family's own layer class: either sublayer may be None."""

    residual_multiplier = 1.0

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.self_attn is not None:
            attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            hidden_states = self.add(hidden_states, attended)
        if self.mlp is not None:
            hidden_states = self.add(hidden_states, self.mlp(self.post_attention_layernorm(hidden_states)))
        return hidden_states

    def add(self, hidden_states: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        return hidden_states + (update if self.residual_multiplier == 1.0 else update * self.residual_multiplier)


def with_fields(config: Any, **fields: Any) -> Any:
    """A copy of a configuration with other field values, without re-validation."""
    changed = copy.copy(config)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def edit_layer(layer: nn.Module, index: int, config: Any) -> None:
    """Turn a stock decoder layer into block `index`; it stays an instance of its class under the same name."""
    stock = type(layer)
    layer.__class__ = type(stock.__name__, (Block, stock), {})
    block, width = config.block_configs[index], config.ffn_widths[index]
    if block["attention"]["no_op"]:
        layer.self_attn = layer.input_layernorm = None
    else:
        kv_heads = config.num_attention_heads // block["attention"]["n_heads_in_group"]
        if kv_heads != config.num_key_value_heads:
            narrowed = with_fields(config, num_key_value_heads=kv_heads)
            layer.self_attn = type(layer.self_attn)(narrowed, layer_idx=index)
    if width == 0:
        layer.mlp = layer.post_attention_layernorm = None
    elif width != config.intermediate_size:
        layer.mlp = type(layer.mlp)(with_fields(config, intermediate_size=width))


class Fused:
    """Mixed into a family's causal LM: edits the layers once they are built."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            edit_layer(layer, index, config)
        self.post_init()


class DeciLMForCausalLM(Fused, LlamaForCausalLM):
    config_class = DeciLMConfig


class FusedLlamaForCausalLM(Fused, LlamaForCausalLM):
    config_class = FusedLlamaConfig


class FusedMistralForCausalLM(Fused, MistralForCausalLM):
    config_class = FusedMistralConfig


class FusedQwen2ForCausalLM(Fused, Qwen2ForCausalLM):
    config_class = FusedQwen2Config


class FusedQwen3ForCausalLM(Fused, Qwen3ForCausalLM):
    config_class = FusedQwen3Config


class FusedPhi3ForCausalLM(Fused, Phi3ForCausalLM):
    config_class = FusedPhi3Config


class FusedGraniteForCausalLM(Fused, GraniteForCausalLM):
    config_class = FusedGraniteConfig


class FusedGemmaForCausalLM(Fused, GemmaForCausalLM):
    config_class = FusedGemmaConfig


class FusedSmolLM3ForCausalLM(Fused, SmolLM3ForCausalLM):
    config_class = FusedSmolLM3Config


class FusedArceeForCausalLM(Fused, ArceeForCausalLM):
    config_class = FusedArceeConfig


class FusedStarcoder2ForCausalLM(Fused, Starcoder2ForCausalLM):
    config_class = FusedStarcoder2Config
