"""Muon a stack of matrices at a time is torch's, which takes one after the other."""

import pytest
import torch
from torch import nn

from ffn_fusion.healing import optimizers
from ffn_fusion.healing.optimizers import Muon, orthogonal


@pytest.mark.parametrize("at_once", [1, 2**27])
def test_muon_moves_matrices_as_torch_does(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 24), (24, 8), (8, 24), (16, 16), (24, 8)]
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    own = Muon(ours, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        own.step()
        reference.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def test_orthogonal_matrices_stay_what_they_are() -> None:
    generator = torch.Generator().manual_seed(1)
    made = orthogonal(torch.randn(3, 40, 16, generator=generator)).float()
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert not orthogonal(torch.zeros(1, 4, 4)).any()
