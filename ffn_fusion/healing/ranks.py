"""The processes that train together: one, or those that torchrun started.

One process is a group of one, so that a single path through the code serves any number of ranks.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ffn_fusion.errors import UserError
from ffn_fusion.hf.machine import pick_device
from ffn_fusion.settings import Machine


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> int:
        """What each rank does of `count` things; `UserError` if they cannot be divided."""
        if count % self.size:
            raise UserError(f"{count} windows a step cannot be divided among {self.size} ranks; change step_tokens")
        return count // self.size

    def wait(self) -> None:
        dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value, in the order of ranks."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def tell(self, value: Any) -> Any:
        """The first rank's value."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        dist.all_reduce(values)
        return values


def started_by_torchrun() -> bool:
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


@contextmanager
def joined(machine: Machine) -> Iterator[Ranks]:
    """This process as a rank of its group, which ends with the block."""
    device = pick_device(machine)
    if started_by_torchrun():
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            if device.index >= torch.cuda.device_count():
                raise UserError(f"rank {os.environ['RANK']} finds {torch.cuda.device_count()} GPUs; start fewer ranks")
        where: dict[str, Any] = {}
    else:
        where = {"store": HashStore(), "rank": 0, "world_size": 1}
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # NVLS multicast can hang or fail on hosts that do not hand it through.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", **where)
    try:
        size = dist.get_world_size()
        yield Ranks(dist.get_rank(), size, device, init_device_mesh(device.type, (size,)))
    finally:
        dist.destroy_process_group()
