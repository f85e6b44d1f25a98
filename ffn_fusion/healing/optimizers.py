"""What moves the weights: AdamW, or Muon for the matrices of the blocks."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from ffn_fusion.core.curriculum import TrainingStage
from ffn_fusion.healing.sharded import Model

BETAS = (0.9, 0.95)
MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
ADAMW_RMS = 0.2
"""Root mean square of AdamW's updates at learning rate 1, as Liu and others found it."""
AT_ONCE = 2**27
"""Weights that are made orthogonal in one batch; with all their copies, about a GB."""


def optimizers(student: Model, stage: TrainingStage) -> list[Optimizer]:
    """Between them they have every parameter of the student that trains."""
    rest = [parameter for parameter in student.parameters() if parameter.requires_grad]
    found: list[Optimizer] = []
    if stage.optimizer == "muon":
        inner = [parameter for parameter in student.model.model.layers.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in inner if parameter.ndim == 2]
        if matrices:
            found.append(Muon(matrices, stage.weight_decay))
        taken = set(map(id, matrices))
        rest = [parameter for parameter in rest if id(parameter) not in taken]
    if rest:
        found.append(torch.optim.AdamW(rest, betas=BETAS, weight_decay=stage.weight_decay, fused=True))
    return found


class Muon(Optimizer):
    """Momentum whose matrices are made orthogonal, so that a weight moves as far in every direction: K. Jordan and
    others, 2024 (kellerjordan.github.io/posts/muon), as far as AdamW does by Liu and others (arXiv 2502.16982, section
    2.2), so that learning rates carry over.

    `torch.optim.Muon` does the same a matrix at a time: on the DTensors of FSDP2 some thousands of dispatches, which
    take longer than the rest of a step. On several ranks each gathers every matrix's momentum and does all of the work,
    then keeps its own part.
    """

    def __init__(self, parameters: Iterable[Tensor], weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": 1e-3, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape].append(parameter)
            for shape, parameters in alike.items():
                for some in _batches(parameters, max(1, AT_ONCE // shape.numel())):
                    self._move(some, group)

    def _move(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        steps = orthogonal(torch.stack([self._momentum(parameter) for parameter in parameters]))
        rate = group["lr"] * ADAMW_RMS * sqrt(max(steps.shape[1:]))
        for parameter, step in zip(parameters, steps.unbind(), strict=True):
            own = _local(parameter)
            own.mul_(1 - group["lr"] * group["weight_decay"])
            own.add_(_part(step, parameter), alpha=-rate)

    def _momentum(self, parameter: Tensor) -> Tensor:
        """Nesterov's, whole."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient, momentum = _local(parameter.grad), _local(state["momentum"])
        momentum.lerp_(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(momentum, MOMENTUM)
        if not isinstance(parameter, DTensor) or parameter.device_mesh.size() == 1:
            return ahead
        return _spread(ahead, parameter).full_tensor()


def orthogonal(matrices: Tensor) -> Tensor:
    """Each of `matrices` [n, rows, columns] with singular values near 1 (0.7 to 1.2), by Newton and Schulz's iteration
    in bfloat16; zeros stay zeros."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _spread(own: Tensor, like: DTensor) -> DTensor:
    """This rank's part as what it is a part of."""
    return DTensor.from_local(own, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def _part(whole: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of a matrix that all have."""
    if not isinstance(like, DTensor) or like.device_mesh.size() == 1:
        return whole
    everywhere = DTensor.from_local(whole, like.device_mesh, [Replicate()], run_check=False)
    return everywhere.redistribute(placements=like.placements).to_local()


def _batches(values: list[Tensor], size: int) -> Iterator[list[Tensor]]:
    rest = iter(values)
    while some := list(islice(rest, size)):
        yield some
