"""Sublayers replaced by one linear layer, initialised without training (Puzzle, Appendix A).

An attention becomes what it does where each token attends to itself: softmax is 1, so that queries and keys, and rotary
positions with them, drop out. An FFN becomes its two projections without gate and activation.

Shapes: d hidden size, h FFN width or query heads times head size.
"""

import torch
from torch import Tensor

from ffn_fusion.core.fusion import wide


def product(output_dh: Tensor, input_hd: Tensor) -> Tensor:
    """Weight [d, d] of the two projections one behind the other, rounded once to the dtype of the second."""
    dtype = wide(output_dh.dtype)
    return (output_dh.to(dtype) @ input_hd.to(dtype)).to(output_dh.dtype)


def product_bias(output_dh: Tensor, input_bias_h: Tensor | None, output_bias_d: Tensor | None) -> Tensor:
    """Bias [d] of the two projections one behind the other, of which at least one has a bias."""
    dtype = wide(output_dh.dtype)
    total = torch.zeros(output_dh.shape[0], dtype=dtype, device=output_dh.device)
    if input_bias_h is not None:
        total = total + output_dh.to(dtype) @ input_bias_h.to(dtype)
    if output_bias_d is not None:
        total = total + output_bias_d.to(dtype)
    return total.to(output_dh.dtype)


def repeat_heads(rows: Tensor, head_dim: int, group: int) -> Tensor:
    """Value heads [kv heads * head_dim, d], or their bias without the d, each repeated for its `group` query heads."""
    repeated: Tensor = rows.unflatten(0, (-1, head_dim)).repeat_interleave(group, 0).flatten(0, 1)
    return repeated
