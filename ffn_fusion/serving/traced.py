"""A student as one graph of tensors with its cache outside: what the ONNX and the OpenVINO target both write.

Caches are numbered by attention ordinal: blocks without attention, or with a linear one, have none.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from ffn_fusion.core.layout import is_linear
from ffn_fusion.hf.model import ModelFolder

RESCALED = ("dynamic", "longrope")
"""Kinds of rotary positions whose frequencies depend on the length of the text."""


def why_not(student: ModelFolder) -> str | None:
    """Why a student cannot become such a graph, or None."""
    rotary = (getattr(student.config, "rope_parameters", None) or {}).get("rope_type")
    if rotary not in RESCALED:
        return None
    return f"its rotary frequencies ({rotary}) follow the length of the text, a graph's do not"


class GrowingCache:
    """The part of a transformers cache that the blocks use, over tensors [batch, KV heads, past, head dimension].

    `past` holds keys and values in turn; `present` the same, longer by the new tokens, after a forward.
    """

    def __init__(self, past: list[Tensor], ordinals: dict[int, int]) -> None:
        self.past, self.ordinals = past, ordinals
        self.present: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if layer not in self.ordinals:
            return keys, values
        at = 2 * self.ordinals[layer]
        grown = torch.cat((self.past[at], keys), 2), torch.cat((self.past[at + 1], values), 2)
        self.present += grown
        return grown


class Traced(nn.Module):
    """A loaded student whose cache goes in and comes out as tensors; any family of the table."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        attentions = [block["attention"] for block in config.block_configs]
        held = [layer for layer, entry in enumerate(attentions) if not entry["no_op"] and not is_linear(entry)]
        self.ordinals = {layer: ordinal for ordinal, layer in enumerate(held)}
        self.window = getattr(config, "sliding_window", None)
        # Families with a window on some layers only take a mask of each kind by name.
        self.mixed = hasattr(model.base_model, "has_sliding_layers")

    @property
    def cache_shapes(self) -> list[tuple[int, int]]:
        """KV heads and head dimension of each attention in turn."""
        config: Any = self.model.config
        dimension = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        groups = [config.block_configs[layer]["attention"]["n_heads_in_group"] for layer in self.ordinals]
        return [(config.num_attention_heads // group, dimension) for group in groups]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor], beam_idx: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits [batch, new, vocabulary] in f32 and the present keys and values.

        `input_ids` is [batch, new], `attention_mask` [batch, past + new] with 0 at padding, which stands on the left;
        `beam_idx` [batch] the row of the past that each sequence continues, its own unless given.
        """
        if beam_idx is not None:
            past = [entry.index_select(0, beam_idx) for entry in past]
        # Indices rather than slices: an exported slice asks whether it is empty and binds the lengths to each other.
        new = torch.arange(input_ids.shape[1], device=input_ids.device) + past[0].shape[2]
        cache = GrowingCache(past, self.ordinals)
        logits = self.model(
            input_ids=input_ids,
            attention_mask=self._masks(attention_mask, new),
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0).index_select(1, new),
            past_key_values=cache,
            use_cache=True,
        ).logits
        return logits.float(), cache.present

    def _masks(self, attention_mask: Tensor, new: Tensor) -> Any:
        """Which tokens see which [batch, 1, new, past + new], in the form that the family's model takes as it is."""
        keys = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        queries = new[:, None]
        # Padding sees itself: a row that sees nothing would be NaN.
        full = ((keys <= queries) & (attention_mask[:, None, None, :] != 0)) | (keys == queries)
        near = full & (keys > queries - self.window) if self.window else full
        return {"full_attention": full, "sliding_attention": near} if self.mixed else near


def program(traced: Traced, beams: bool) -> ExportedProgram:
    """The graph, every batch and length free; with `beam_idx`, int32 as OpenVINO's pipelines feed it, where `beams`."""
    # No size of the example is 0 or 1 or equals another: those would be taken for constants of the graph.
    batch, past, new = 2, 3, 5
    dtype = traced.model.dtype
    shapes = [shape for shape in traced.cache_shapes for _ in range(2)]
    example: dict[str, Any] = {
        "input_ids": torch.zeros(batch, new, dtype=torch.int64),
        "attention_mask": torch.ones(batch, past + new, dtype=torch.int64),
        "past": [torch.zeros(batch, heads, past, dimension, dtype=dtype) for heads, dimension in shapes],
    }
    free: dict[str, Any] = {
        "input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC},
        "attention_mask": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC},
        "past": [{0: Dim.DYNAMIC, 2: Dim.DYNAMIC} for _ in shapes],
    }
    if beams:
        example["beam_idx"], free["beam_idx"] = torch.zeros(batch, dtype=torch.int32), {0: Dim.DYNAMIC}
    with torch.no_grad(), quiet():
        return torch.export.export(traced, (), example, dynamic_shapes=free, strict=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' warnings, which are about their own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)
