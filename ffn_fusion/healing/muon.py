"""Muon: steps in orthogonal directions for the matrices of blocks.

K. Jordan et al., 2024, https://kellerjordan.github.io/posts/muon; steps are as long as AdamW's would be (J. Liu et al.,
arXiv 2502.16982, section 2.2), so that a learning rate means the same for both.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Jordan's quintic: five rounds bring singular values from 1e-3 to 1 to between 0.7 and 1.2, fast rather than close."""
ROUNDS = 5
LENGTH = 0.2
"""Root mean square of an update's elements, in learning rates; AdamW's are mostly 0.2 to 0.4."""
AT_ONCE = 2**27
"""Elements made orthogonal together."""


class Muon(Optimizer):
    """For matrices [out, in], whole or spread over ranks by rows. The momentum is each rank's own share; to make it
    orthogonal takes the whole matrix, so every rank gathers it and keeps its rows."""

    def __init__(self, matrices: Iterable[Tensor], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step from the gradients that are there; `closure` is not called."""
        for group in self.param_groups:
            for matrices in _alike(group["params"]):
                self._step(matrices, group)

    def _step(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        own = [_own(matrix) for matrix in matrices]
        gradients = [_own(cast(Tensor, matrix.grad)) for matrix in matrices]
        momenta = [_own(self.state[matrix]["momentum"]) for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        # Nesterov's: what the momentum will be if the next gradient is like this one.
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
        whole = torch.stack([_gathered(step, matrix) for step, matrix in zip(ahead, matrices, strict=True)])
        found = orthogonal(whole).float()
        length = LENGTH * max(matrices[0].shape) ** 0.5
        torch._foreach_mul_(own, 1 - group["lr"] * group["weight_decay"])
        steps = [_own_rows(each, matrix) for each, matrix in zip(found, matrices, strict=True)]
        torch._foreach_add_(own, steps, alpha=-group["lr"] * length)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [n, rows, columns] with their singular values brought near 1; bfloat16, as the rounds forgive it."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    found: Tensor = (matrices.mT if tall else matrices).bfloat16()
    found = found / (found.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ROUNDS):
        gram = found @ found.mT
        found = a * found + (b * gram + c * gram @ gram) @ found
    return found.mT if tall else found


def _alike(matrices: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Those with gradients, in lists of one shape, so that a list takes few kernels and not too much memory."""
    shapes = defaultdict(list)
    for matrix in matrices:
        if matrix.grad is not None:
            shapes[matrix.shape].append(matrix)
    for shape, alike in shapes.items():
        count = max(1, AT_ONCE // shape.numel())
        yield from (alike[start : start + count] for start in range(0, len(alike), count))


def _own(tensor: Tensor) -> Tensor:
    """This rank's rows."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gathered(rows: Tensor, matrix: Tensor) -> Tensor:
    """The whole of what this rank has rows of, as of `matrix`."""
    if not isinstance(matrix, DTensor) or rows.shape == matrix.shape:
        return rows
    spread = DTensor.from_local(
        rows, matrix.device_mesh, matrix.placements, shape=matrix.shape, stride=matrix.stride(), run_check=False
    )
    return spread.full_tensor()


def _own_rows(whole: Tensor, matrix: Tensor) -> Tensor:
    """What this rank has of `matrix`, out of `whole`."""
    if not isinstance(matrix, DTensor) or _own(matrix).shape == matrix.shape:
        return whole
    everywhere = [Replicate()] * matrix.device_mesh.ndim
    held = DTensor.from_local(whole, matrix.device_mesh, everywhere)
    return held.redistribute(placements=matrix.placements).to_local()
