"""One rank of `collectives`: `python -m ffn_fusion.speed.collective_rank ORDER`; rank 0 prints the times as JSON."""

import json
import sys
from typing import Any

import torch
import torch.distributed as dist

from ffn_fusion.errors import UserError
from ffn_fusion.speed.ranks import joined
from ffn_fusion.speed.timing import Repeated, elapsed_ms

REPEATS = 20
CHAIN = 20
"""Collectives in a row, each waiting for the one before; a time is the mean over them."""


def main(order: dict[str, Any]) -> list[list[float]]:
    dtype = getattr(torch, order["dtype"])
    with joined(order) as ranks:
        return [measure(name, shape, dtype, ranks.device) for name, shape in order["requests"]]


def measure(name: str, shape: list[int], dtype: torch.dtype, device: torch.device) -> list[float]:
    """Milliseconds of one collective on a tensor of this shape, `REPEATS` times."""
    values = torch.zeros(shape, dtype=dtype, device=device)
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]

    def chain() -> None:
        for _ in range(CHAIN):
            if name == "all_reduce":
                dist.all_reduce(values)
            else:
                dist.all_gather(parts, values)

    step = Repeated(device, chain)
    step.warm_up()
    step.capture()
    if step.note:
        raise UserError(step.note)
    # A chain before the clock starts brings the ranks together, and keeps a GPU busy while the next is queued.
    return [elapsed_ms(step, meet=step.run) / CHAIN for _ in range(REPEATS)]


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    result = main(request)
    if request["rank"] == 0:
        print(json.dumps(result))
