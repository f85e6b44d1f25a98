"""Muon against torch's own and against what it promises."""

import torch

from ffn_fusion.healing.muon import Muon, orthogonal


def test_singular_values_come_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 32, 32), (2, 16, 64), (2, 64, 16)):
        found = orthogonal(torch.randn(shape) * 1e-3).float()
        assert found.shape == shape
        values = torch.linalg.svdvals(found)
        assert float(values.max()) < 1.3
        assert float(values.median()) > 0.6


def test_steps_are_those_of_torch() -> None:
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((32, 48), (48, 32), (32, 48), (24, 24))]
    theirs = [torch.nn.Parameter(matrix.detach().clone()) for matrix in ours]
    kept = ours[3].detach().clone()
    mine = Muon(ours, lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        # The last one has no gradient.
        for matrix, other in zip(ours[:3], theirs[:3], strict=True):
            matrix.grad = torch.randn_like(matrix)
            other.grad = matrix.grad.clone()
        mine.step()
        reference.step()
    for matrix, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(matrix, other, rtol=0, atol=2e-3)
    assert float((ours[0] - theirs[0]).detach().abs().mean()) < 2e-4
    assert torch.equal(ours[3], kept)
