"""Sublayers made for speed, out of those of one of our models: what `speed/decode.py` runs one after the other.

Each adds the update that the one before it left to the stream, normalises, and ends where tensor parallelism sums over
its ranks, so that addition and norm are one kernel once compiled. Weights on one input are one matrix.

Shapes: B sequences, T tokens of the call, L tokens attended to, d hidden size, H query heads and K kv heads of D.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, rms_norm, scaled_dot_product_attention
from transformers.activations import ACT2FN

from ffn_fusion.errors import UserError
from ffn_fusion.hf.arch import Arch

Settle = Callable[[Tensor], Tensor]
"""A merged weight → where it is to live: on a device, or in memory that models to be timed share."""


@dataclass(frozen=True)
class Rank:
    """One of the parts that a model is split into."""

    index: int = 0
    number: int = 1

    def rows(self, weight: Tensor) -> Tensor:
        return self._part(weight, 0)

    def columns(self, weight: Tensor) -> Tensor:
        return self._part(weight, 1)

    def heads(self, weight: Tensor, head_dim: int) -> Tensor:
        """Rows of this rank's kv heads; fewer heads than ranks are there several times."""
        count = weight.shape[0] // head_dim
        if count >= self.number:
            return self.rows(weight)
        if self.number % count:
            raise UserError(f"the number of kv heads, {count}, does not split over {self.number} devices")
        return Rank(self.index * count // self.number, count).rows(weight)

    def _part(self, weight: Tensor, axis: int) -> Tensor:
        if weight.shape[axis] % self.number:
            raise UserError(f"a weight of size {weight.shape[axis]:,} does not split over {self.number} devices")
        return weight.chunk(self.number, axis)[self.index]


class Cache(NamedTuple):
    """Keys and values of one attention [B, K, L, D], where the call's own go [T], and what it sees [T, L] if not all
    before it."""

    keys: Tensor
    values: Tensor
    own: Tensor
    seen: Tensor | None


class Norm(nn.Module):
    """RMSNorm, or LayerNorm where there is a bias."""

    def __init__(self, norm: nn.Module, settle: Settle, offset: float = 0.0) -> None:
        super().__init__()
        weight, bias = norm.weight, getattr(norm, "bias", None)
        assert isinstance(weight, Tensor)
        self.weight = settle(weight + offset if offset else weight)
        self.bias = settle(bias) if isinstance(bias, Tensor) else None
        eps = getattr(norm, "variance_epsilon", None)
        self.eps = float(norm.eps if eps is None else eps)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return rms_norm(x, self.weight.shape, self.weight, self.eps)
        return layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Merged(nn.Module):
    """Linear layers on one input as one; `part` takes this rank's rows of each."""

    def __init__(self, parts: Sequence[nn.Module], part: Sequence[Callable[[Tensor], Tensor]], settle: Settle) -> None:
        super().__init__()
        pairs = list(zip(parts, part, strict=True))
        self.weight = settle(torch.cat([take(p.weight) for p, take in pairs]))  # type: ignore[arg-type]
        biased = parts[0].bias is not None
        self.bias = settle(torch.cat([take(p.bias) for p, take in pairs])) if biased else None  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Two layers of one size by a product each."""
        biases = (None, None) if self.bias is None else self.bias.chunk(2)
        first, second = (linear(x, weight, bias) for weight, bias in zip(self.weight.chunk(2), biases, strict=True))
        return first, second


class Out(nn.Module):
    """The last linear layer of a sublayer, split by its inputs; ranks are summed behind it, so one has the bias."""

    def __init__(self, layer: nn.Module, rank: Rank, settle: Settle, multiplier: float) -> None:
        super().__init__()
        self.weight = settle(rank.columns(layer.weight))  # type: ignore[arg-type]
        has_bias = layer.bias is not None and rank.index == 0
        self.bias = settle(layer.bias) if has_bias else None  # type: ignore[arg-type]
        self.multiplier = multiplier

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight, self.bias)
        return y if self.multiplier == 1.0 else y * self.multiplier


class Packed(nn.Module):
    """A stretch of rows of a packed linear layer."""

    def __init__(self, layer: nn.Module, start: int, length: int) -> None:
        super().__init__()
        assert isinstance(layer.weight, Tensor)
        self.weight = layer.weight[start : start + length]
        self.bias = None if layer.bias is None else layer.bias[start : start + length]  # type: ignore[index]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the first channels of each head, as many as `cos` has; x [B, T, heads, D], cos [T, 1, R]."""
    turning = x[..., : cos.shape[-1]]
    left, right = turning.chunk(2, -1)
    turned = turning * cos + torch.cat((-right, left), -1) * sin
    return turned if cos.shape[-1] == x.shape[-1] else torch.cat((turned, x[..., cos.shape[-1] :]), -1)


class AttentionStep(nn.Module):
    """x + update, and what attention makes of it."""

    def __init__(
        self, layer: nn.Module, config: Any, arch: Arch, rank: Rank, settle: Settle, multiplier: float
    ) -> None:
        super().__init__()
        attention: Any = layer.self_attn
        self.head_dim = int(attention.head_dim)
        self.norm = Norm(layer.input_layernorm, settle, arch.norm_offset)  # type: ignore[arg-type]
        heads, kv_heads = config.num_attention_heads, config.num_attention_heads // attention.num_key_value_groups
        if len(arch.kv) == 1:
            sizes = [self.head_dim * n for n in (heads, kv_heads, kv_heads)]
            starts = (0, sizes[0], sizes[0] + sizes[1])
            packed = getattr(attention, arch.kv[0])
            parts: list[nn.Module] = [Packed(packed, *at) for at in zip(starts, sizes, strict=True)]
        else:
            parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        kv = partial(rank.heads, head_dim=self.head_dim)
        self.qkv = Merged(parts, (rank.rows, kv, kv), settle)
        self.heads = heads // rank.number
        self.kv_heads = (self.qkv.weight.shape[0] // self.head_dim - self.heads) // 2
        self.head_norms = [Norm(getattr(attention, n), settle) for n in ("q_norm", "k_norm") if hasattr(attention, n)]
        self.rotary = bool(getattr(attention, "use_rope", True))
        self.scale = float(attention.scaling)
        self.out = Out(attention.o_proj, rank, settle, multiplier)

    def forward(self, x: Tensor, update: Tensor, cos: Tensor, sin: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
        x = x + update
        batch, new = x.shape[:2]
        heads = self.qkv(self.norm(x)).view(batch, new, -1, self.head_dim)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), 2)
        if self.head_norms:
            q, k = self.head_norms[0](q), self.head_norms[1](k)
        if self.rotary:
            q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        keys = cache.keys.index_copy_(2, cache.own, k.transpose(1, 2))
        values = cache.values.index_copy_(2, cache.own, v.transpose(1, 2))
        if new == 1:
            # Queries that share a kv head as rows of it: no kernel has to know of groups, and nothing is repeated.
            grouped = q.reshape(batch, self.kv_heads, -1, self.head_dim)
            attended = scaled_dot_product_attention(grouped, keys, values, scale=self.scale)
        else:
            attended = scaled_dot_product_attention(
                q.transpose(1, 2),
                keys,
                values,
                attn_mask=cache.seen,
                is_causal=cache.seen is None,
                scale=self.scale,
                enable_gqa=self.heads != self.kv_heads,
            ).transpose(1, 2)
        return x, self.out(attended.reshape(batch, new, -1))


class FfnStep(nn.Module):
    """x + update, and what the FFN makes of it."""

    def __init__(
        self,
        ffn: nn.Module,
        norm: nn.Module,
        activation: str,
        arch: Arch,
        rank: Rank,
        settle: Settle,
        multiplier: float,
    ) -> None:
        super().__init__()
        self.norm = Norm(norm, settle, arch.norm_offset)
        inputs: list[nn.Module] = [getattr(ffn, name) for name in arch.inputs]
        if arch.parts == 2:
            width = inputs[0].weight.shape[0] // 2  # type: ignore[index]
            inputs = [Packed(inputs[0], start, width) for start in (0, width)]  # type: ignore[arg-type]
        self.gated = len(inputs) == 2
        self.inputs = Merged(inputs, [rank.rows] * len(inputs), settle)
        self.activation = ACT2FN[activation]
        self.out = Out(getattr(ffn, arch.output), rank, settle, multiplier)

    def forward(self, x: Tensor, update: Tensor, apart: bool = False) -> tuple[Tensor, Tensor]:
        """`apart`: gate and up are two products, as modules are written."""
        x = x + update
        z = self.norm(x)
        if not self.gated:
            return x, self.out(self.activation(self.inputs(z)))
        gate, up = self.inputs.halves(z) if apart else self.inputs(z).chunk(2, -1)
        return x, self.out(self.activation(gate) * up)


class LinearStep(nn.Module):
    """x + update, and what a linear layer in a sublayer's place makes of it, split over ranks by its inputs."""

    def __init__(
        self, layer: nn.Module, norm: nn.Module, arch: Arch, rank: Rank, settle: Settle, multiplier: float
    ) -> None:
        super().__init__()
        self.norm, self.rank = Norm(norm, settle, arch.norm_offset), rank
        self.out = Out(layer, rank, settle, multiplier)

    def forward(self, x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        x = x + update
        z = self.norm(x)
        return x, self.out(z.chunk(self.rank.number, -1)[self.rank.index])


class HeadStep(nn.Module):
    """Logits of the last position, [B, 1, V] or one rank's part of them."""

    def __init__(self, norm: nn.Module, weight: Tensor, arch: Arch, settle: Settle, divisor: float) -> None:
        super().__init__()
        self.norm, self.weight, self.divisor = Norm(norm, settle, arch.norm_offset), weight, divisor

    def forward(self, x: Tensor, update: Tensor) -> Tensor:
        logits = linear(self.norm(x[:, -1:] + update[:, -1:]), self.weight)
        return logits if self.divisor == 1.0 else logits / self.divisor
