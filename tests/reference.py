"""Slow, obvious versions of what ffn_fusion does, to compare with. Nothing here imports its arithmetic."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffn_fusion.core.plan import Plan

EPS = 1e-6


@dataclass
class Member:
    """One FFN with the norm in front of it. `gate` is None in a plain FFN; absent biases are None."""

    gain: Tensor
    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    norm_bias: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def width(self) -> int:
        return self.up.shape[0]


def normalise(x: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """LayerNorm if there is a bias, else RMSNorm."""
    if bias is not None:
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gain
    return x if bias is None else x + bias


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight.T if bias is None else x @ weight.T + bias


def ffn(x: Tensor, member: Member) -> Tensor:
    """What a member adds to the stream `x`: SwiGLU where it has a gate, else a plain GELU FFN."""
    normed = normalise(x, member.gain, member.norm_bias)
    hidden = project(normed, member.up, member.up_bias)
    if member.gate is None:
        hidden = nn.functional.gelu(hidden)
    else:
        hidden = nn.functional.silu(project(normed, member.gate, member.gate_bias)) * hidden
    return project(hidden, member.down, member.down_bias)


def parallel(x: Tensor, members: Sequence[Member]) -> Tensor:
    """All members see the same stream, one after the other."""
    out = x.clone()
    for member in members:
        out = out + ffn(x, member)
    return out


def sequential(x: Tensor, members: Sequence[Member]) -> Tensor:
    """Each member sees what the ones before it have made of the stream."""
    for member in members:
        x = x + ffn(x, member)
    return x


def grouping(
    run: Sequence[int], matrix: Any, widths: Sequence[int], max_width: int | None
) -> list[tuple[set[int], float]]:
    """Every merge of one run as (the FFNs that become one, the cost), by trying all pairs of neighbours each time."""
    groups = [[layer] for layer in run]
    merges = []
    while True:
        best, where = None, None
        for at in range(len(groups) - 1):
            width = 0
            for layer in groups[at] + groups[at + 1]:
                width += widths[layer]
            if max_width is not None and width > max_width:
                continue
            cost = -float("inf")
            for i in groups[at]:
                for j in groups[at + 1]:
                    cost = max(cost, matrix[i][j])
            if best is None or cost < best:
                best, where = cost, at
        if where is None:
            return merges
        groups[where] += groups.pop(where + 1)
        merges.append((set(groups[where]), best))


@torch.no_grad()
def top_channels(stock: nn.Module, ids: Tensor, layer: int, width: int) -> list[int]:
    """The channels of one FFN that change its output most when they are dropped, mean over all tokens, in order.

    Each channel is dropped by itself on each token, and the change of the output is measured.
    """
    seen: list[Tensor] = []
    output = output_of(stock.model.layers[layer].mlp)
    hook = output.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    stock(input_ids=ids, use_cache=False)
    hook.remove()
    tokens = seen[0].flatten(0, -2).double()
    weight = output.weight.double()
    scores = []
    for channel in range(tokens.shape[1]):
        whole = tokens @ weight.T
        dropped = tokens.clone()
        dropped[:, channel] = 0
        scores.append(float((whole - dropped @ weight.T).norm(dim=-1).mean()))
    return sorted(sorted(range(len(scores)), key=lambda channel: -scores[channel])[:width])


def output_of(mlp: nn.Module) -> nn.Linear:
    return mlp.c_proj if hasattr(mlp, "c_proj") else mlp.down_proj


def narrowed(mlp: nn.Module, channels: Sequence[int]) -> nn.Module:
    """A copy in which only these channels reach the output; none is taken out."""
    mlp = copy.deepcopy(mlp)
    weight = output_of(mlp).weight
    for channel in range(weight.shape[1]):
        if channel not in channels:
            weight[:, channel] = 0
    return mlp


def merged(attention: nn.Module, kv_heads: int) -> nn.Module:
    """A copy that keeps all of its kv heads, each now the mean of its group of neighbours: the same function."""
    attention, head_dim = copy.deepcopy(attention), attention.head_dim
    own = attention.config.num_key_value_heads
    if hasattr(attention, "qkv_proj"):
        queries = attention.config.num_attention_heads * head_dim
        starts = [(attention.qkv_proj, queries), (attention.qkv_proj, queries + own * head_dim)]
    else:
        starts = [(attention.k_proj, 0), (attention.v_proj, 0)]
    for projection, start in starts:
        for tensor in projection.parameters():
            for first in range(0, own, own // kv_heads):
                heads = [
                    slice(start + head * head_dim, start + (head + 1) * head_dim)
                    for head in range(first, first + own // kv_heads)
                ]
                mean = sum(tensor[head].clone() for head in heads) / len(heads)
                for head in heads:
                    tensor[head] = mean
    return attention


@torch.no_grad()
def planned_logits(
    stock: nn.Module, plan: Plan, ids: Tensor, norm: str, channels: Mapping[int, Sequence[int]] | None = None
) -> Tensor:
    """Logits of `plan`, from the stock model's own sublayers called by hand.

    The stock forward runs once to learn what it hands to each layer; its last layer's output is then replaced.
    `channels` are those kept of each FFN that the plan cuts.
    """
    layers = stock.model.layers
    inputs: list[Tensor] = []
    handed: list[dict[str, Any]] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0] if args else kwargs.pop("hidden_states"))
        handed.append(kwargs)

    def replace(_: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        return by_hand(layers, plan, inputs[0], handed, norm, channels or {})

    hooks: list[Any] = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(replace))
    try:
        return stock(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()


def by_hand(
    layers: nn.ModuleList,
    plan: Plan,
    x: Tensor,
    handed: Sequence[dict[str, Any]],
    norm: str,
    channels: Mapping[int, Sequence[int]],
) -> Tensor:
    """The residual stream after all blocks of a plan."""
    for block in plan.blocks:
        if block.attention is not None:
            layer = layers[block.attention.layer]
            kv_heads = block.attention.kv_heads
            attention = layer.self_attn if kv_heads is None else merged(layer.self_attn, kv_heads)
            attend = alone if block.attention.linear else together
            x = add(layer, x, attend(attention, layer.input_layernorm(x), handed[block.attention.layer]))
        shared = x
        for member in block.ffns:
            layer = layers[member.layer]
            owner = layers[block.ffns[-1].layer] if norm == "last" else layer
            mlp = layer.mlp if member.width is None else narrowed(layer.mlp, channels[member.layer])
            normed = owner.post_attention_layernorm(shared)
            x = add(layer, x, ungated(mlp, normed) if member.linear else mlp(normed))
    return x


def together(attention: nn.Module, normed: Tensor, handed: Mapping[str, Any]) -> Tensor:
    """An attention as the family runs it."""
    return attention(hidden_states=normed, **handed)[0]


def alone(attention: nn.Module, normed: Tensor, handed: Mapping[str, Any]) -> Tensor:
    """The same attention where each token attends to itself: every one is a sequence of its own."""
    outputs = []
    for place in range(normed.shape[1]):
        positions = tuple(part[:, place : place + 1] for part in handed["position_embeddings"])
        token = normed[:, place : place + 1]
        outputs.append(attention(hidden_states=token, position_embeddings=positions, attention_mask=None)[0])
    return torch.cat(outputs, 1)


def ungated(mlp: nn.Module, normed: Tensor) -> Tensor:
    """An FFN's two projections one behind the other, without gate and activation."""
    if hasattr(mlp, "gate_up_proj"):
        return mlp.down_proj(mlp.gate_up_proj(normed)[..., mlp.down_proj.in_features :])
    up = mlp.c_fc if hasattr(mlp, "c_fc") else mlp.up_proj
    return output_of(mlp)(up(normed))


def add(layer: nn.Module, x: Tensor, update: Tensor) -> Tensor:
    """Granite scales each contribution, all others add it as it is."""
    return x + update * getattr(layer, "residual_multiplier", 1.0)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest deviation, relative to the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())


def one_line(action: Callable[[], Any], *words: str) -> str:
    """Run what must fail with a `UserError` of one line that names each of `words`; return its message."""
    import pytest

    from ffn_fusion.errors import UserError

    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert message.strip()
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message
    return message
