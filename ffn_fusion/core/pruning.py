"""Sublayers made smaller without training (Puzzle, Appendix A): channels of an FFN kept by their contribution, and kv
heads merged by their mean.

Shapes: d hidden size, h FFN width, N tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ffn_fusion.core.fusion import wide

Channels = Mapping[int, Tensor]
"""Channels kept of each FFN that is cut, rising, by source layer."""


@dataclass(frozen=True)
class Cuts:
    """What a plan with sizes needs beside the weights: rows of an attention head, and the channels that are kept."""

    head_dim: int = 0
    channels: Channels = field(default_factory=dict)


def contribution(activations_h: Tensor, down_dh: Tensor) -> Tensor:
    """How much each channel adds to an FFN's output, [h] in float64: mean |activation| times its column's length.

    `activations_h` is the mean of |a_i| over tokens. A channel's activation times its column of the down projection
    is the change of the output when the channel is dropped.
    """
    lengths: Tensor = down_dh.double().norm(dim=0)
    return activations_h.double() * lengths


def lengths_without(activations_nh: Tensor, removed_h: Tensor, down_dh: Tensor) -> Tensor:
    """Length of the change of an FFN's output when a channel is dropped beside those `removed`, summed over tokens [h].

    With s the sum of what the removed ones add, |s + a_i d_i|^2 = |s|^2 + 2 a_i (s . d_i) + a_i^2 |d_i|^2.
    """
    activations, down = activations_nh.float(), down_dh.float()
    lost = (activations * removed_h) @ down.T
    squares = lost.square().sum(-1, keepdim=True) + 2 * activations * (lost @ down)
    squares += activations.square() * down.square().sum(0)
    # Below 0 by rounding, where a channel takes back what is lost.
    return squares.clamp(min=0).sqrt().sum(0, dtype=torch.float64)


def kept_channels(contribution_h: Tensor, width: int) -> Tensor:
    """The `width` channels of largest contribution (or last to go), in their own order; of equal ones the first."""
    order = torch.sort(contribution_h, descending=True, stable=True).indices
    return order[:width].sort().values


def share_kept(contribution_h: Tensor, channels: Tensor) -> float:
    """Contribution of these channels, as a share of that of all."""
    return float(contribution_h[channels].sum() / contribution_h.sum())


def pool_heads(rows: Tensor, head_dim: int, group: int, first: int) -> Tensor:
    """Heads merged by their mean, `group` neighbours into one, from row `first` on; rows before it stay.

    `rows` is a projection [first + heads * head_dim, d] or its bias, without the d. Keys and values packed behind one
    another are heads too: a group holds keys or values only, since it divides the number of either.
    """
    heads = rows[first:].unflatten(0, (-1, group, head_dim))
    merged = heads.to(wide(rows.dtype)).mean(1).flatten(0, 1)
    return torch.cat([rows[:first], merged.to(rows.dtype)])
