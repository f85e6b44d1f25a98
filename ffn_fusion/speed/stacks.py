"""Models of any blocks on a parent's shapes, with random weights: what sublayers and plans are timed on.

They are of the parent's own model class, made from its configuration; no weight is read from disk.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from ffn_fusion.core.cost import BlockShape, ParameterCounts
from ffn_fusion.core.cost_records import CostResult
from ffn_fusion.core.cost_table import CostTable, ModelFacts, check_table
from ffn_fusion.errors import UserError
from ffn_fusion.folder import read_record
from ffn_fusion.hf.arch import ATTENTION, FFN
from ffn_fusion.hf.model import ModelFolder, materialise, restore_buffers, skeleton
from ffn_fusion.speed.arena import Arena, aligned
from ffn_fusion.speed.timing import Step, cache_values, interleaved, prepare


class LinearSlice(nn.Module):
    """One rank's part of a linear layer that is split by its inputs, [d / ranks] -> [d], before the all-reduce."""

    def __init__(self, hidden_size: int, ranks: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, hidden_size // ranks))

    def forward(self, hidden: Tensor) -> Tensor:
        return linear(hidden[..., : self.weight.shape[1]], self.weight)


def facts_of(parent: ModelFolder) -> ModelFacts:
    """What the costs of a parent's sublayers depend on."""
    config, shapes = parent.config, parent.shapes
    return ModelFacts(
        family=parent.arch.class_name,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        head_dim=parent.head_dim,
        vocab_size=config.vocab_size,
        sliding_window=getattr(config, "sliding_window", None),
        kv_heads=max(shape.kv_heads for shape in shapes),
        ffn_width=max(shape.ffn_width for shape in shapes),
        counts=count_parameters(parent),
    )


def read_costs(costs: Path, parent: ModelFolder, device: str, dtype: str, force: bool = False) -> tuple[CostTable, str]:
    """The table that `cost` left in a folder, also elsewhere, and what `check_table` notes or raises."""
    table = read_record(costs, CostResult).result.table
    return table, check_table(table, facts_of(parent), device, dtype, force)


def count_parameters(parent: ModelFolder) -> ParameterCounts:
    """Counted on layers without memory: of one kv head and of all, of one channel and of two."""
    heads = parent.config.num_attention_heads
    model = skeleton(stack_config(parent, [BlockShape(1, 0), BlockShape(heads, 0), BlockShape(0, 1), BlockShape(0, 2)]))
    one_head, all_heads, one_channel, two_channels = (_size(layer) for layer in model.model.layers)
    kv_head = (all_heads - one_head) // max(heads - 1, 1)
    channel = two_channels - one_channel
    embedding = 0 if parent.config.tie_word_embeddings else model.model.embed_tokens.weight.numel()
    attention, ffn = model.model.layers[0], model.model.layers[2]
    return ParameterCounts(
        outside=_size(model) - sum(_size(layer) for layer in model.model.layers),
        embedding=embedding,
        attention=one_head - kv_head,
        kv_head=kv_head,
        ffn=one_channel - channel,
        channel=channel,
        linear_attention=_size(attention.input_layernorm) + _linear_size(getattr(attention, ATTENTION), parent),
        linear_ffn=_size(ffn.post_attention_layernorm) + _linear_size(getattr(ffn, FFN), parent),
    )


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _linear_size(sublayer: nn.Module, parent: ModelFolder) -> int:
    """Of a linear layer in a sublayer's place, with a bias where a projection of the sublayer has one."""
    hidden = int(parent.config.hidden_size)
    biased = any(isinstance(part, nn.Linear) and part.bias is not None for part in sublayer.children())
    return hidden * hidden + hidden * biased


def stack_config(
    parent: ModelFolder, shapes: Sequence[BlockShape], layers: Sequence[int] | None = None, ranks: int = 1
) -> Any:
    """Configuration of a model of these blocks, or of one rank's slice of it.

    `layers` names the parent's layer whose kind of attention (sliding, without rotary positions) each block has;
    without it, the parent's in order. Raises `UserError` if a size does not split over the ranks.
    """
    source = parent.config
    heads = _split(source.num_attention_heads, ranks, "number of attention heads")
    layers = [index % parent.num_layers for index in range(len(shapes))] if layers is None else layers
    fields = source.to_dict() | {
        "num_hidden_layers": len(shapes),
        "num_attention_heads": heads,
        "num_key_value_heads": min(heads, source.num_key_value_heads),
        "head_dim": parent.head_dim,
        "vocab_size": -(-source.vocab_size // ranks),
        # It may lie outside of a rank's slice of the vocabulary.
        "pad_token_id": None,
        "block_configs": [_entry(shape, heads, ranks) for shape in shapes],
    }
    for name in parent.arch.layer_lists:
        if isinstance(fields.get(name), list):
            fields[name] = [fields[name][layer] for layer in layers]
    fields.pop("model_type", None)
    return type(source).from_dict(fields)


def _entry(shape: BlockShape, heads: int, ranks: int) -> dict[str, Any]:
    # A linear layer stands where the FFN is: timed alone, it does not matter which sublayer it replaces.
    assert not shape.linear_attention
    assert not (shape.linear_ffn and shape.ffn_width)
    kv_heads = _split(shape.kv_heads, ranks, "number of kv heads") if shape.kv_heads > ranks else 1
    if shape.kv_heads and ranks % min(shape.kv_heads, ranks):
        raise UserError(f"the number of kv heads, {shape.kv_heads}, does not split over {ranks} devices")
    width = 1 if shape.linear_ffn else _split(shape.ffn_width, ranks, "FFN width")
    return {
        "attention": {"no_op": not shape.kv_heads, "n_heads_in_group": heads // kv_heads if shape.kv_heads else None},
        "ffn": {"no_op": not width, "intermediate_size": width},
    }


def _split(size: int, ranks: int, name: str) -> int:
    if size % ranks:
        raise UserError(f"the {name}, {size:,}, does not split over {ranks} devices")
    return size // ranks


class Stack:
    """A model of these blocks, without memory until it is given some. Raises what `stack_config` does."""

    def __init__(
        self, parent: ModelFolder, shapes: Sequence[BlockShape], layers: Sequence[int] | None = None, ranks: int = 1
    ) -> None:
        self.shapes = list(shapes)
        with warnings.catch_warnings():
            # A stack without FFNs is built with stock ones of width 0 first.
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            self.model: PreTrainedModel = skeleton(stack_config(parent, shapes, layers, ranks))
        for layer, shape in zip(self.model.model.layers, shapes, strict=True):
            if shape.linear_ffn:
                layer.mlp = LinearSlice(parent.config.hidden_size, ranks)
        self.tied = set(self.model._tied_weights_keys or {}) if parent.config.tie_word_embeddings else set()

    def num_values(self, batch_size: int, context: int) -> int:
        """Room that weights and kv cache need in an arena."""
        weights = sum(aligned(parameter.numel()) for parameter in self.model.parameters())
        return weights + cache_values(self.model.config, batch_size, context)

    def settle(self, arena: Arena) -> None:
        """Take every weight from the arena."""
        arena.rewind()
        names = [name for name, _ in self.model.named_parameters() if name not in self.tied]
        device, dtype = arena.values.device, arena.values.dtype
        for name in names:
            weight = arena.take(tuple(self.model.get_parameter(name).shape))
            materialise(self.model, {name: lambda weight=weight: weight}, device, dtype)  # type: ignore[misc]
        restore_buffers(self.model, device)
        self.model.tie_weights()
        self.end_of_weights = arena.used

    def step(self, arena: Arena, batch_size: int, past: int, new: int) -> Step:
        """A call of the model, its cache behind the weights in the arena."""
        arena.used = self.end_of_weights
        return Step(self.model, batch_size, past, new, arena.take)


def time_stacks(
    stacks: Sequence[Stack],
    call: tuple[int, int, int],
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
    label: str,
) -> tuple[list[list[float]], list[Step]]:
    """Milliseconds [stack][repeat] of a call of each, (batch size, past tokens, new tokens), interleaved."""
    batch_size, past, new = call
    arena = Arena(max(stack.num_values(batch_size, past + new) for stack in stacks), device, dtype)
    for stack in stacks:
        stack.settle(arena)
    steps = [stack.step(arena, batch_size, past, new) for stack in stacks]
    prepare(steps, label)
    return interleaved(steps, repeats, label), steps
