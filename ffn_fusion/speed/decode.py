"""A forward pass made for speed: what engines do to a model of one of our families.

Static kv cache, merged weights, `torch.compile` of each kind of sublayer, one all-reduce a sublayer under tensor
parallelism, and the whole call one CUDA graph. A `Decoder` is made from a model of ours, with weights or without (then
of random numbers), so plans, biases, head norms, multipliers, sliding windows and linear layers follow from it.

Shapes: B sequences, T tokens of the call, L tokens attended to, d hidden size, K kv heads of D.
"""

from collections.abc import Callable
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import DynamicCache, PreTrainedModel

from ffn_fusion.hf.arch import arch_of
from ffn_fusion.hf.remote.modeling_ffn_fusion import LinearAttention, LinearFfn
from ffn_fusion.speed.arena import aligned
from ffn_fusion.speed.sublayers import AttentionStep, Cache, FfnStep, HeadStep, LinearStep, Rank, Settle
from ffn_fusion.speed.timing import Repeated, Take

Compile = Literal["off", "on", "tuned"]
"""Of a decode step: not at all; by inductor; and with one-row products as kernels of its own, tuned for this device."""
Exchange = Callable[[Tensor], Tensor]
"""A tensor of one rank → what all ranks make of theirs."""
MANY = 1024
"""Kinds of sublayers times batch sizes that may be compiled."""


class Decoder:
    """A model, or one rank's part of it, as a row of sublayers.

    `total` sums a tensor over the ranks, `join` puts their logits side by side; without them a part runs alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settle: Settle,
        *,
        rank: Rank = Rank(),  # noqa: B008, immutable
        total: Exchange | None = None,
        join: Exchange | None = None,
        compile: Compile = "off",
    ) -> None:
        config, trunk, arch = model.config, model.model, arch_of(model.config.model_type)
        self.config, self.total, self.call = config, total, compiled(compile)
        # A skeleton has no frequencies; they are few, so they are made anew for any model.
        self.rotary = type(trunk.rotary_emb)(config=config)
        self.table = settle(trunk.embed_tokens.weight)
        scale: float | None = getattr(trunk.embed_tokens, "scalar_embed_scale", None)
        self.embedding_scale = float(getattr(trunk, "embedding_multiplier", 1.0) if scale is None else scale)
        kinds = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
        self.sublayers: list[nn.Module] = []
        self.windows: list[int | None] = []
        """Of each attention that has a cache."""
        for layer, window in zip(trunk.layers, kinds, strict=True):
            split = (arch, rank, settle, float(layer.residual_multiplier))
            if isinstance(layer.self_attn, LinearAttention):
                self.sublayers.append(LinearStep(layer.self_attn.linear_attn, layer.input_layernorm, *split))
            elif layer.self_attn is not None:
                self.sublayers.append(AttentionStep(layer, config, *split))
                self.windows.append(window)
            for ffn in (layer, *layer.following_ffns):
                norm = ffn.post_attention_layernorm
                if isinstance(ffn.mlp, LinearFfn):
                    self.sublayers.append(LinearStep(ffn.mlp.linear_mlp, norm, *split))
                elif ffn.mlp is not None:
                    self.sublayers.append(FfnStep(ffn.mlp, norm, config.hidden_act, *split))
        # A vocabulary that does not split is there whole on every rank.
        part = rank if config.vocab_size % rank.number == 0 else Rank()
        self.join = join if part.number > 1 else None
        head = part.rows(self.table) if config.tie_word_embeddings else settle(part.rows(model.lm_head.weight))
        divisor = float(getattr(config, "logits_scaling", 1.0))
        self.head = HeadStep(trunk.norm, head, arch, settle, divisor)

    @property
    def device(self) -> torch.device:
        return self.table.device

    @property
    def attentions(self) -> list[AttentionStep]:
        return [sublayer for sublayer in self.sublayers if isinstance(sublayer, AttentionStep)]

    def cache_shapes(self, batch_size: int, past: int, new: int) -> list[tuple[int, ...]]:
        """[B, K, L, D] of the keys, and of the values, of each attention; a sliding window keeps less of the past."""
        kept = [past if window is None else min(past, window - 1) for window in self.windows]
        pairs = zip(self.attentions, kept, strict=True)
        return [(batch_size, step.kv_heads, length + new, step.head_dim) for step, length in pairs]

    def cache_values(self, batch_size: int, past: int, new: int) -> int:
        """Room in an arena for all keys and values."""
        return sum(2 * aligned(prod(shape)) for shape in self.cache_shapes(batch_size, past, new))

    def caches(self, batch_size: int, past: int, new: int, take: Take) -> list[Cache]:
        """Caches of a call with `new` tokens behind `past` ones, which hold what `take` gives."""
        assert new == 1 or not past, "a call has one token, or is the first"
        places = torch.arange(new, device=self.device)
        found = []
        for shape, window in zip(self.cache_shapes(batch_size, past, new), self.windows, strict=True):
            far = places.unsqueeze(1) - places
            seen = (far >= 0) & (far < window) if window is not None and window < new else None
            found.append(Cache(take(shape), take(shape), places + shape[2] - new, seen))
        return found

    def positions(self, past: int, new: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotary positions, [T, 1, R]."""
        cos, sin = self.rotary(torch.empty(0, dtype=self.table.dtype), torch.arange(past, past + new).unsqueeze(0))
        return cos[0].unsqueeze(1).to(self.device), sin[0].unsqueeze(1).to(self.device)

    @torch.no_grad()
    def logits(self, ids: Tensor, positions: tuple[Tensor, Tensor], caches: list[Cache]) -> Tensor:
        """Of the last position, [B, 1, V]."""
        x = embedding(ids, self.table)
        x = x if self.embedding_scale == 1.0 else x * self.embedding_scale
        # A prefill is bound by products, which compiling leaves as they are.
        call = self.call if ids.shape[1] == 1 else _call
        update, held = torch.zeros_like(x), iter(caches)
        for sublayer in self.sublayers:
            place = (*positions, next(held)) if isinstance(sublayer, AttentionStep) else ()
            x, update = call(sublayer, x, update, *place)
            update = self.total(update) if self.total else update
        logits: Tensor = call(self.head, x, update)
        return self.join(logits) if self.join else logits


def _call(sublayer: nn.Module, *arguments: Any) -> Any:
    return sublayer(*arguments)


def _call_tuned(sublayer: nn.Module, x: Tensor, *arguments: Any) -> Any:
    """Of one row, inductor makes gate, up and what is done to them one kernel, if they are two products."""
    if isinstance(sublayer, FfnStep) and x.shape[0] * x.shape[1] == 1:
        return sublayer(x, *arguments, apart=True)
    return sublayer(x, *arguments)


def compiled(how: Compile) -> Callable[..., Any]:
    """What runs a sublayer. Compiled, it is one graph, and sublayers of one kind and size share their code."""
    if how == "off":
        return _call
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MANY
    options: dict[str, Any] = {"coordinate_descent_tuning": True} if how == "tuned" else {}
    call = _call_tuned if how == "tuned" else _call
    return torch.compile(call, fullgraph=True, dynamic=False, options=options)


class DecodeStep(Repeated):
    """A call of a decoder with `new` tokens behind `past` ones, ready to be repeated; `take` gives the cache's memory.

    A decode step feeds its token to the next one.
    """

    def __init__(self, decoder: Decoder, batch_size: int, past: int, new: int, take: Take | None = None) -> None:
        super().__init__(decoder.device)
        self.decoder = decoder
        device, dtype = decoder.device, decoder.table.dtype
        take = take or (lambda shape: torch.randn(shape, dtype=dtype, device=device))
        self.caches, self.positions = decoder.caches(batch_size, past, new, take), decoder.positions(past, new)
        ids = torch.randint(decoder.config.vocab_size, (batch_size, new), generator=torch.Generator().manual_seed(0))
        self.ids = ids.to(device)

    def logits(self) -> Tensor:
        return self.decoder.logits(self.ids, self.positions, self.caches)

    def call(self) -> None:
        token = self.logits().argmax(-1)
        if token.shape == self.ids.shape:
            self.ids.copy_(token)
