"""A walk through the parent: residual streams go through its layers, and one layer at a time is in memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ffn_fusion.hf.checkpoint import Source
from ffn_fusion.hf.model import ModelFolder, materialise, restore_buffers, skeleton
from ffn_fusion.hf.surgery import LAYER

Layer = Any
"""A decoder layer of some family, edited by our model file."""


class ParentWalk:
    """Takes streams [windows, length, d], which stay on the host, through the layers of a parent.

    `source` has its weights: the checkpoint, or the same model in memory. Call `enter` before anything else: it
    learns what the family's own forward hands to each layer.
    """

    def __init__(
        self, parent: ModelFolder, source: Source, *, device: torch.device, dtype: torch.dtype, batch_size: int = 4
    ) -> None:
        self.parent, self.source = parent, source
        self.device, self.dtype, self.batch_size = device, dtype, batch_size
        self._shell = skeleton(parent.config)
        self._kwargs: list[dict[str, Any]] = []

    @torch.no_grad()
    def enter(self, ids: Tensor) -> Tensor:
        """The stream before the first layer, of windows [windows, length] of token ids."""
        model = skeleton(self.parent.config)
        trunk = model.model
        kwargs: list[dict[str, Any]] = []
        trunk.layers = nn.ModuleList(_Recorder(kwargs) for _ in range(self.parent.num_layers))
        trunk.norm = nn.Identity()
        weight = self.source.read("model.embed_tokens.weight").to(self.device, self.dtype)
        trunk.embed_tokens.weight = nn.Parameter(weight, requires_grad=False)
        restore_buffers(model, self.device)
        embedded = [
            trunk(input_ids=batch.to(self.device), use_cache=False).last_hidden_state.cpu()
            for batch in ids.split(self.batch_size)
        ]
        self._kwargs = kwargs[: self.parent.num_layers]
        return torch.cat(embedded)

    def layer(self, index: int) -> Layer:
        """One layer of the parent; move it to "meta" when it is done."""
        prefix = LAYER.format(index)
        names = [name for name in self.source.specs if name.startswith(prefix)]
        makers = {name.removeprefix(prefix): partial(self.source.read, name) for name in names}
        return materialise(self._shell.model.layers[index], makers, self.device, self.dtype)

    def advance(self, stream: Tensor, step: Callable[[Tensor], Tensor]) -> None:
        """Replace the stream by what `step` makes of it, a batch at a time."""
        for start in range(0, len(stream), self.batch_size):
            batch = stream[start : start + self.batch_size]
            batch.copy_(step(batch.to(self.device)))

    @torch.no_grad()
    def step(self, stream: Tensor, index: int) -> None:
        """Take a stream through layer `index`."""
        layer = self.layer(index)
        self.through(stream, index, layer)
        layer.to("meta")

    def through(self, stream: Tensor, index: int, layer: Layer) -> None:
        """Take a stream through layer `index`, which is in memory."""
        self.advance(stream, lambda x: layer(x, **self.kwargs(index, x)))

    def attend(self, layer: Layer, source: int, x: Tensor) -> Tensor:
        """The attention half of a block in memory, x + attention(norm(x)); the attention is that of layer `source`."""
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(x), **self.kwargs(source, x))
        stream: Tensor = layer.add(x, attended)
        return stream

    def kwargs(self, layer: int, x: Tensor) -> dict[str, Any]:
        """What the family hands to layer `layer` beside the stream `x`."""
        kwargs = self._kwargs[layer]
        mask = kwargs.get("attention_mask")
        return kwargs if mask is None else kwargs | {"attention_mask": mask[: len(x)]}


def ffn_half(layer: Layer, x: Tensor) -> Tensor:
    """The FFN half of a block: x + mlp(norm(x))."""
    result: Tensor = layer.add(x, layer.mlp(layer.post_attention_layernorm(x)))
    return result


class _Recorder(nn.Module):
    """Stands in for a decoder layer and keeps what it is called with."""

    def __init__(self, kwargs: list[dict[str, Any]]) -> None:
        super().__init__()
        self._kwargs = kwargs

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self._kwargs.append(kwargs)
        return hidden_states
