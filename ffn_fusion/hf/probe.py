"""Look into a model's forward pass, switch sublayers off, and start a pass in the middle.

All of it acts on the loaded model from outside: the family's own forward makes masks, positions and logits.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ffn_fusion.hf.arch import ATTENTION, FFN

SUBLAYERS = (ATTENTION, FFN)
Visit = Callable[[int, str, Tensor], None]


@dataclass(frozen=True)
class Pass:
    """One recorded forward pass: the stream before each layer and after the last, each sublayer's output, logits."""

    streams: list[Tensor]
    outputs: dict[tuple[int, str], Tensor]
    logits: Tensor

    def contribution(self, layer: int) -> Tensor:
        """What the layer adds to the stream, in float32: the sum of its sublayers' outputs, zeros if it has none."""
        found = [self.outputs[layer, part].float() for part in SUBLAYERS if (layer, part) in self.outputs]
        return torch.stack(found).sum(0) if found else torch.zeros_like(self.streams[layer], dtype=torch.float32)


@torch.no_grad()
def record(model: PreTrainedModel, ids: Tensor, outputs: bool = True) -> Pass:
    """Run the model on `ids` [windows, length] and keep streams, logits and, if wanted, sublayer outputs."""
    streams: list[Tensor] = []
    kept: dict[tuple[int, str], Tensor] = {}
    with ExitStack() as stack:
        for layer in model.model.layers:
            stack.callback(layer.register_forward_pre_hook(lambda _, args: streams.append(args[0])).remove)
        last = model.model.layers[-1].register_forward_hook(lambda _, __, out: streams.append(out))
        stack.callback(last.remove)
        if outputs:
            stack.enter_context(visiting(model, lambda i, part, out: kept.__setitem__((i, part), out)))
        logits = model(input_ids=ids, use_cache=False).logits
    return Pass(streams, kept, logits)


@torch.no_grad()
def resume(model: PreTrainedModel, ids: Tensor, start: int, stream: Tensor, head: bool = True) -> Tensor | None:
    """Logits of a pass whose stream before layer `start` is `stream`; earlier layers cost nothing.

    Without `head` the layers run, and nothing is returned. `ids` only gives the shape to the family's forward.
    """
    layers = model.model.layers
    skipped: list[nn.Module] = [Passthrough() for _ in range(start)]
    if skipped:
        skipped[-1] = _Give(stream)
    model.model.layers = nn.ModuleList([*skipped, *layers[start:]])
    try:
        if head:
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
            return logits
        model.model(input_ids=ids, use_cache=False)
        return None
    finally:
        model.model.layers = layers


@contextmanager
def without(model: PreTrainedModel, layer: int, part: str) -> Iterator[None]:
    """Run with one sublayer removed."""
    owner = model.model.layers[layer]
    module = getattr(owner, part)
    setattr(owner, part, None)
    try:
        yield
    finally:
        setattr(owner, part, module)


@contextmanager
def streams_after(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """The streams behind these layers, filled in by the next pass."""
    streams: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for index in layers:
            hook = model.model.layers[index].register_forward_hook(
                lambda _, __, out, index=index: streams.__setitem__(index, out)
            )
            stack.callback(hook.remove)
        yield streams


@contextmanager
def visiting(model: PreTrainedModel, visit: Visit) -> Iterator[None]:
    """Call `visit(layer, part, output)` after every sublayer that runs."""
    with ExitStack() as stack:
        for index, layer in enumerate(model.model.layers):
            for part in SUBLAYERS:
                module = getattr(layer, part, None)
                if module is not None:
                    stack.callback(module.register_forward_hook(_hook(visit, index, part)).remove)
        yield


def _hook(visit: Visit, layer: int, part: str) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, out: Any) -> None:
        visit(layer, part, out[0] if isinstance(out, tuple) else out)

    return hook


class Passthrough(nn.Module):
    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


class _Give(nn.Module):
    def __init__(self, stream: Tensor) -> None:
        super().__init__()
        self._stream = stream

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return self._stream
