"""A fused model: its parent family's own modules, with attention left out and FFNs widened block by block.

Linear layers may stand in the place of either (`replace_with_linear`), under the names of nemotron-nas.

Shipped with every student of ffn-fusion. The stock model is built as ever and its layers are then edited to
`config.block_configs`; embeddings, masks, rotary positions, caches, generation and the head stay the family's.
In the folded form a layer is an attention followed by several FFNs, so that every layer has an attention.
"""

import copy
import functools
from typing import Any

import torch
from torch import nn
from transformers import (
    ArceeForCausalLM,
    ArceeModel,
    GemmaForCausalLM,
    GemmaModel,
    GraniteForCausalLM,
    GraniteModel,
    LlamaForCausalLM,
    LlamaModel,
    MistralForCausalLM,
    MistralModel,
    Phi3ForCausalLM,
    Phi3Model,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3Model,
    SmolLM3ForCausalLM,
    SmolLM3Model,
    Starcoder2ForCausalLM,
    Starcoder2Model,
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
    is_linear,
)


class Ffn(nn.Module):
    """An FFN with its norm, as it follows the first one of a folded layer."""

    def __init__(self, norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.post_attention_layernorm, self.mlp = norm, mlp


class LinearAttention(nn.Module):
    """One linear layer where an attention was: each token by itself, nothing cached."""

    def __init__(self, hidden_size: int, bias: bool) -> None:
        super().__init__()
        self.linear_attn = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return self.linear_attn(hidden_states), None


class LinearFfn(nn.Module):
    """One linear layer where an FFN was."""

    def __init__(self, hidden_size: int, bias: bool) -> None:
        super().__init__()
        self.linear_mlp = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear_mlp(hidden_states)


def has_bias(module: nn.Module) -> bool:
    """Whether a projection of a family's attention or FFN has a bias; a linear layer in its place then has one too."""
    return any(isinstance(part, nn.Linear) and part.bias is not None for part in module.children())


class Block:
    """Forward of one block, mixed into the family's own layer class: either sublayer may be None."""

    residual_multiplier = 1.0

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.self_attn is not None:
            attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            hidden_states = self.add(hidden_states, attended)
        if self.self_attn is None or isinstance(self.self_attn, LinearAttention):
            self.pass_by(hidden_states, kwargs.get("past_key_values"))
        for ffn in (self, *self.following_ffns):
            if ffn.mlp is not None:
                update = ffn.mlp(ffn.post_attention_layernorm(hidden_states))
                hidden_states = self.add(hidden_states, update)
        return hidden_states

    def add(self, hidden_states: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        return hidden_states + (update if self.residual_multiplier == 1.0 else update * self.residual_multiplier)

    def pass_by(self, hidden_states: torch.Tensor, cache: Any) -> None:
        """Start this block's cache entry, which stays empty.

        Speculative decoding crops caches entry by entry, and transformers 5.17 fails on one that was never written.
        """
        entries = getattr(cache, "layers", None)
        if entries is not None and not (self.layer_idx < len(entries) and entries[self.layer_idx].is_initialized):
            empty = hidden_states.new_empty(hidden_states.shape[0], 1, 0, 0)
            cache.update(empty, empty, self.layer_idx)


def with_fields(config: Any, **fields: Any) -> Any:
    """A copy of a configuration with other field values, without re-validation."""
    changed = copy.copy(config)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


@functools.cache
def edited(stock: type) -> type:
    """A family's layer class with our forward; one for all layers, or torch.compile would compile each by itself."""
    return type(stock.__name__, (Block, stock), {})


def edit_layer(layer: nn.Module, index: int, config: Any) -> None:
    """Turn a stock decoder layer into block `index`; it stays an instance of its class under the same name."""
    layer.__class__ = edited(type(layer))
    layer.layer_idx = index
    layer.following_ffns = nn.ModuleList()
    block = config.block_configs[index]
    edit_attention(layer, index, config, block["attention"])
    if block["ffn"]["no_op"]:
        layer.mlp = layer.post_attention_layernorm = None
        return
    stock, norm = layer.mlp, layer.post_attention_layernorm
    first, *widths = config.widths_of(block)
    if is_linear(block["ffn"]) or first != config.intermediate_size:
        layer.mlp = ffn_like(stock, config, block["ffn"], first)
    following = zip(block.get("following_ffns", ()), widths, strict=True)
    layer.following_ffns.extend(
        Ffn(copy.deepcopy(norm), ffn_like(stock, config, entry, width)) for entry, width in following
    )


def edit_attention(layer: nn.Module, index: int, config: Any, entry: Any) -> None:
    if entry["no_op"]:
        layer.self_attn = layer.input_layernorm = None
        return
    if is_linear(entry):
        layer.self_attn = LinearAttention(config.hidden_size, has_bias(layer.self_attn))
        return
    kv_heads = config.num_attention_heads // entry["n_heads_in_group"]
    if kv_heads != config.num_key_value_heads:
        narrowed = with_fields(config, num_key_value_heads=kv_heads)
        layer.self_attn = type(layer.self_attn)(narrowed, layer_idx=index)


def ffn_like(stock: nn.Module, config: Any, entry: Any, width: int) -> nn.Module:
    """An FFN of the stock one's kind and some width, or a linear layer in its place.

    In the folded form it may stand for an attention, whose projections have biases of their own: the entry says so.
    """
    if is_linear(entry):
        return LinearFfn(config.hidden_size, entry.get("bias", has_bias(stock)))
    return type(stock)(with_fields(config, intermediate_size=width))


class Fused:
    """Mixed into a family's model, with or without a head: edits the layers once they are built."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.base_model.layers):
            edit_layer(layer, index, config)
        self.post_init()


class DeciLMModel(Fused, LlamaModel):
    config_class = DeciLMConfig


class DeciLMForCausalLM(Fused, LlamaForCausalLM):
    config_class = DeciLMConfig


class FusedLlamaModel(Fused, LlamaModel):
    config_class = FusedLlamaConfig


class FusedLlamaForCausalLM(Fused, LlamaForCausalLM):
    config_class = FusedLlamaConfig


class FusedMistralModel(Fused, MistralModel):
    config_class = FusedMistralConfig


class FusedMistralForCausalLM(Fused, MistralForCausalLM):
    config_class = FusedMistralConfig


class FusedQwen2Model(Fused, Qwen2Model):
    config_class = FusedQwen2Config


class FusedQwen2ForCausalLM(Fused, Qwen2ForCausalLM):
    config_class = FusedQwen2Config


class FusedQwen3Model(Fused, Qwen3Model):
    config_class = FusedQwen3Config


class FusedQwen3ForCausalLM(Fused, Qwen3ForCausalLM):
    config_class = FusedQwen3Config


class FusedPhi3Model(Fused, Phi3Model):
    config_class = FusedPhi3Config


class FusedPhi3ForCausalLM(Fused, Phi3ForCausalLM):
    config_class = FusedPhi3Config


class FusedGraniteModel(Fused, GraniteModel):
    config_class = FusedGraniteConfig


class FusedGraniteForCausalLM(Fused, GraniteForCausalLM):
    config_class = FusedGraniteConfig


class FusedGemmaModel(Fused, GemmaModel):
    config_class = FusedGemmaConfig


class FusedGemmaForCausalLM(Fused, GemmaForCausalLM):
    config_class = FusedGemmaConfig


class FusedSmolLM3Model(Fused, SmolLM3Model):
    config_class = FusedSmolLM3Config


class FusedSmolLM3ForCausalLM(Fused, SmolLM3ForCausalLM):
    config_class = FusedSmolLM3Config


class FusedArceeModel(Fused, ArceeModel):
    config_class = FusedArceeConfig


class FusedArceeForCausalLM(Fused, ArceeForCausalLM):
    config_class = FusedArceeConfig


class FusedStarcoder2Model(Fused, Starcoder2Model):
    config_class = FusedStarcoder2Config


class FusedStarcoder2ForCausalLM(Fused, Starcoder2ForCausalLM):
    config_class = FusedStarcoder2Config
