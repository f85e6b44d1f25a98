"""Calibrated fusion: the down projection of a block refitted in closed form (docs/method.md, section 4).

    minimise over D   sum_t w_t |a_t D - r_t|^2 + lambda |D|^2

a_t [h] hidden activations on the student's own input, r_t [d] what the block still lacks to reach its target, D the
change of the down projection. Ridge regression around the weights that fusion gave, solved in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
"""Regularisation tried, relative to the mean of the Gram diagonal."""


class RidgeSystem:
    """Gram matrix [h, h] and right-hand side [h, d], summed over batches of tokens."""

    def __init__(self, num_channels: int, hidden_size: int, device: torch.device) -> None:
        self.gram = torch.zeros(num_channels, num_channels, device=device)
        self.cross = torch.zeros(num_channels, hidden_size, device=device)

    def add(self, activations_nh: Tensor, residual_nd: Tensor, weights_n: Tensor) -> None:
        """Add N tokens."""
        weighted = activations_nh.float() * weights_n.sqrt()[:, None]
        self.cross.addmm_(weighted.T, residual_nd.float() * weights_n.sqrt()[:, None])
        self.gram.addmm_(weighted.T, weighted)

    def solve(self, strength: float) -> Tensor | None:
        """D [h, d] for one regularisation strength, relative to the mean of the Gram diagonal.

        None where the strength is too small to make the system positive definite at the precision of its sums.
        """
        system = self.gram.double()
        diagonal = system.diagonal()
        ridge = strength * diagonal.mean()
        # A channel that never fires has an empty row; the floor keeps the factorisation defined.
        diagonal += torch.clamp(ridge, min=torch.finfo(torch.float64).tiny)
        factor, info = torch.linalg.cholesky_ex(system)
        return None if int(info) else torch.cholesky_solve(self.cross.double(), factor).float()


@dataclass(frozen=True)
class Solution:
    """The best D found, its strength (None: no fit helps) and the held-out error before and after."""

    delta: Tensor | None
    strength: float | None
    error_before: float
    error_after: float


def best_solution(
    system: RidgeSystem, held_out_error: Callable[[Tensor | None], float], start: float = 0.1
) -> Solution:
    """Walk along `STRENGTHS` from `start` to the lowest held-out error; keep D = 0 where no strength is better."""
    at = STRENGTHS.index(start)
    tried: dict[int, tuple[float, Tensor | None]] = {}

    def error(i: int) -> float:
        if i not in tried:
            delta = system.solve(STRENGTHS[i])
            tried[i] = (inf if delta is None else held_out_error(delta), delta)
        return tried[i][0]

    step = 1 if at + 1 < len(STRENGTHS) and error(at + 1) < error(at) else -1
    while 0 <= at + step < len(STRENGTHS) and error(at + step) < error(at):
        at += step
    before = held_out_error(None)
    if not error(at) < before:
        return Solution(None, None, before, before)
    return Solution(tried[at][1], STRENGTHS[at], before, error(at))
