"""Which channels of an FFN matter: their contribution, measured on the parent's own stream (Puzzle, Appendix A)."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ffn_fusion.core import pruning
from ffn_fusion.hf.walk import Layer, ParentWalk


@dataclass
class Passed:
    """Where the measurement stands: the next layer, the stream in front of it [windows, length, d], and the
    contributions found, by layer [h]."""

    layer: int
    stream: Tensor
    found: dict[int, Tensor]


def measure(
    walk: ParentWalk, ids: Tensor, layers: Collection[int], passed: Passed | None = None, steps: int = 1
) -> Iterator[Passed]:
    """Take windows [windows, length] through the parent and yield the state, to resume from, after each of `layers`."""
    embedded = walk.enter(ids if passed is None else ids[: walk.batch_size])
    state = passed or Passed(0, embedded, {})
    for index in range(state.layer, max(layers) + 1):
        if index in layers:
            state.found[index] = contribution_of(walk, state.stream, index, steps)
        else:
            walk.step(state.stream, index)
        state.layer = index + 1
        if index in layers:
            yield state


@torch.no_grad()
def contribution_of(walk: ParentWalk, stream: Tensor, index: int, steps: int = 1) -> Tensor:
    """Contribution of each channel of one layer's FFN, [h] in float64; takes the stream through the layer.

    In several `steps` the least channels go, so many at a time, and what the others contribute is measured anew; the
    result is then each channel's place in the order in which they went.
    """
    layer = walk.layer(index)
    down = getattr(layer.mlp, walk.parent.arch.output)
    if steps > 1:
        found = _places(walk, stream, index, layer, steps)
    else:
        total = _over_tokens(walk, stream, index, layer, lambda a: a.abs().sum(0, dtype=torch.float64))
        found = pruning.contribution(total / stream[..., 0].numel(), down.weight)
    layer.to("meta")
    return found.cpu()


def _places(walk: ParentWalk, stream: Tensor, index: int, layer: Layer, steps: int) -> Tensor:
    weight = getattr(layer.mlp, walk.parent.arch.output).weight
    size = weight.shape[1]
    places = torch.zeros(size, dtype=torch.float64, device=walk.device)
    removed = torch.zeros(size, dtype=torch.bool, device=walk.device)
    for step in range(steps):
        lengths = partial(pruning.lengths_without, removed_h=removed, down_dh=weight)
        before = stream if step == steps - 1 else stream.clone()  # the last pass takes the stream on
        total = _over_tokens(walk, before, index, layer, lengths)
        total[removed] = torch.inf
        gone, going = size * step // steps, size * (step + 1) // steps
        least = torch.sort(total, stable=True).indices[: going - gone]
        places[least] = torch.arange(gone, going, dtype=places.dtype, device=walk.device)
        removed[least] = True
    return places


def _over_tokens(walk: ParentWalk, stream: Tensor, index: int, layer: Layer, of: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum over all batches of what `of` makes of the FFN's hidden activations [N, h]; the stream goes on."""
    parts: list[Tensor] = []
    output = getattr(layer.mlp, walk.parent.arch.output)
    hook = output.register_forward_pre_hook(lambda _, args: parts.append(of(args[0].flatten(0, -2))))
    walk.through(stream, index, layer)
    hook.remove()
    return torch.stack(parts).sum(0)
