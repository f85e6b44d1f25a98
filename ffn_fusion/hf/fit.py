"""One FFN's down projection refitted in closed form: the streams around it → a ridge system, its solution in place."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ffn_fusion.core.calibration import RidgeSystem, Solution, best_solution
from ffn_fusion.hf.remote.modeling_ffn_fusion import LinearFfn
from ffn_fusion.hf.walk import Layer, ParentWalk, ffn_half

MAX_CHANNELS = 16_384
"""Widest Gram matrix; wider blocks are fitted a slice of channels at a time."""
SWEEPS = 2
HELD_OUT = 8
"""One window in this many is held out to choose the regularisation, or between trained and untrained weights."""


class DownFit(NamedTuple):
    """Held-out error before and after, relative to |target - input|^2, and the strengths chosen."""

    error_before: float
    error_after: float
    strengths: tuple[float | None, ...]


@torch.no_grad()
def fit_down(walk: ParentWalk, layer: Layer, stream: Tensor, wanted: Tensor, weights: Tensor) -> DownFit:
    """Refit the down projection of a layer in memory, so that its FFN takes `stream` closer to `wanted`.

    Both are [windows, length, d], the first in front of the FFN; `weights` [windows, length] multiply each token's
    squared error. The last eighth of the windows is held out.
    """
    width = down_projection(walk, layer).in_features
    slices = [slice(start, min(start + MAX_CHANNELS, width)) for start in range(0, width, MAX_CHANNELS)]
    sweeps = SWEEPS if len(slices) > 1 else 1
    fits = [_fit_slice(walk, layer, channels, (stream, wanted, weights)) for channels in slices * sweeps]
    scale = _held_out_scale(stream, wanted, weights)
    return DownFit(fits[0].error_before / scale, fits[-1].error_after / scale, tuple(fit.strength for fit in fits))


def down_projection(walk: ParentWalk, layer: Layer) -> nn.Linear:
    """The last projection of a layer's FFN; of a linear one, the only one."""
    output = layer.mlp.linear_mlp if isinstance(layer.mlp, LinearFfn) else getattr(layer.mlp, walk.parent.arch.output)
    assert isinstance(output, nn.Linear)
    return output


def num_held_out(stream: Tensor) -> int:
    """How many windows at the end of a stream are held out."""
    return max(1, len(stream) // HELD_OUT)


def inverse_squares(stream: Tensor) -> Tensor:
    """1 / |x|^2 of each token, so that a few massive activations do not own the fit."""
    return torch.cat([1 / x.float().square().sum(-1).clamp(min=1e-12) for x in stream.split(1)])


def _fit_slice(walk: ParentWalk, layer: Layer, channels: slice, data: tuple[Tensor, Tensor, Tensor]) -> Solution:
    output = down_projection(walk, layer)
    system = RidgeSystem(channels.stop - channels.start, output.out_features, walk.device)
    held = num_held_out(data[0])
    for batch in _batches(walk, [part[:-held] for part in data]):
        system.add(*_tokens(output, layer, channels, *batch))
    held_out = [_tokens(output, layer, channels, *batch) for batch in _batches(walk, [part[-held:] for part in data])]

    def error(delta: Tensor | None) -> float:
        total = 0.0
        for activations, residual, weights in held_out:
            left = residual if delta is None else residual - activations.float() @ delta
            total += float((left.square().sum(-1) * weights).sum())
        return total

    solution = best_solution(system, error)
    if solution.delta is not None:
        weight = output.weight.data
        weight[:, channels] = (weight[:, channels].float() + solution.delta.T).to(weight.dtype)
    return solution


def _tokens(
    output: nn.Linear, layer: Layer, channels: slice, x: Tensor, wanted: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden activations [N, h], residual [N, d] in the units of the down projection, and weights [N]."""
    seen: list[Tensor] = []
    hook = output.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    y = ffn_half(layer, x)
    hook.remove()
    residual = (wanted.float() - y.float()) / layer.residual_multiplier
    return seen[0][..., channels].flatten(0, 1), residual.flatten(0, 1), weights.flatten()


def _batches(walk: ParentWalk, data: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    for batch in zip(*(part.split(walk.batch_size) for part in data), strict=True):
        yield tuple(part.to(walk.device) for part in batch)


def _held_out_scale(stream: Tensor, wanted: Tensor, weights: Tensor) -> float:
    """Weighted size of the change that the held-out windows ask for."""
    held = num_held_out(stream)
    change = wanted[-held:].float() - stream[-held:].float()
    # Zero where an FFN of zeros, as behind an attention alone in a student, is replaced by another.
    return max(float((change.square().sum(-1) * weights[-held:]).sum()), torch.finfo(torch.float32).tiny)
