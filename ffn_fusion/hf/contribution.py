"""Which channels of an FFN matter: their contribution, measured on the parent's own stream (Puzzle, Appendix A)."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ffn_fusion.core import pruning
from ffn_fusion.hf.walk import ParentWalk


@dataclass
class Passed:
    """Where the measurement stands: the next layer, the stream in front of it [windows, length, d], and the
    contributions found, by layer [h]."""

    layer: int
    stream: Tensor
    found: dict[int, Tensor]


def measure(walk: ParentWalk, ids: Tensor, layers: Collection[int], passed: Passed | None = None) -> Iterator[Passed]:
    """Take windows [windows, length] through the parent and yield the state, to resume from, after each of `layers`."""
    embedded = walk.enter(ids if passed is None else ids[: walk.batch_size])
    state = passed or Passed(0, embedded, {})
    for index in range(state.layer, max(layers) + 1):
        if index in layers:
            state.found[index] = contribution_of(walk, state.stream, index)
        else:
            walk.step(state.stream, index)
        state.layer = index + 1
        if index in layers:
            yield state


@torch.no_grad()
def contribution_of(walk: ParentWalk, stream: Tensor, index: int) -> Tensor:
    """Contribution of each channel of one layer's FFN, [h] in float64; takes the stream through the layer."""
    layer = walk.layer(index)
    output = getattr(layer.mlp, walk.parent.arch.output)
    total = torch.zeros(output.in_features, dtype=torch.float64, device=walk.device)

    def add(_: nn.Module, args: tuple[Tensor]) -> None:
        total.add_(args[0].abs().flatten(0, -2).sum(0, dtype=torch.float64))

    hook = output.register_forward_pre_hook(add)
    walk.through(stream, index, layer)
    hook.remove()
    found = pruning.contribution(total / stream[..., 0].numel(), output.weight)
    layer.to("meta")
    return found.cpu()
