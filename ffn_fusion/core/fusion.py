"""The algebra of FFN Fusion on weight tensors: tensors in, one new tensor out.

Shapes: d hidden size, h_j width of member j, n members. A gated FFN is down(act(gate x) * up x), a plain one
down(act(up x)); x is the normalised stream. Concatenating hidden channels commutes with element-wise functions and
the down projection sums over channels, so members on one input are one FFN (FFN Fusion, Theorem 3.1).

Every function works one tensor at a time, so that surgery on a checkpoint needs memory for one fused tensor only.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: a product of two half-precision numbers is exact in float32."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.float64


def scale_columns(weight_hd: Tensor, gain_d: Tensor) -> Tensor:
    """Fold a norm's gain into the projection that reads it: W diag(s), rounded once to the dtype of W."""
    dtype = wide(weight_hd.dtype)
    return (weight_hd.to(dtype) * gain_d.to(dtype)).to(weight_hd.dtype)


def stack_rows(members: Iterable[Tensor], rows: int) -> Tensor:
    """Input projections [h_j, d] (or biases [h_j]) one below another, zero rows up to `rows`.

    A zero gate row gives a zero product, so padding is exact. Members are consumed one by one.
    """
    stacked: Tensor | None = None
    start = 0
    for member in members:
        if stacked is None:
            stacked = member.new_zeros(rows, *member.shape[1:])
        stacked[start : start + member.shape[0]] = member
        start += member.shape[0]
    assert stacked is not None
    assert start <= rows
    return stacked


def stack_columns(members: Iterable[Tensor], columns: int) -> Tensor:
    """Output projections [d, h_j] side by side, zero columns up to `columns`."""
    stacked: Tensor | None = None
    start = 0
    for member in members:
        if stacked is None:
            stacked = member.new_zeros(member.shape[0], columns)
        stacked[:, start : start + member.shape[1]] = member
        start += member.shape[1]
    assert stacked is not None
    assert start <= columns
    return stacked


def fold_bias(weight_hd: Tensor, norm_bias_d: Tensor | None, bias_h: Tensor | None) -> Tensor:
    """Bias of an input projection once the norm's bias is folded into it: W b + bias, [h]."""
    dtype = wide(weight_hd.dtype)
    folded = torch.zeros(weight_hd.shape[0], dtype=dtype, device=weight_hd.device)
    if norm_bias_d is not None:
        folded += weight_hd.to(dtype) @ norm_bias_d.to(dtype)
    if bias_h is not None:
        folded += bias_h.to(dtype)
    return folded.to(weight_hd.dtype)


def sum_biases(biases: Sequence[Tensor]) -> Tensor:
    """Bias of the fused down projection: each member adds its own, [d]."""
    dtype = wide(biases[0].dtype)
    return torch.stack([bias.to(dtype) for bias in biases]).sum(0).to(biases[0].dtype)


def padded_width(width: int, multiple: int) -> int:
    """The width rounded up to what the student layout can express."""
    return -(-width // multiple) * multiple
