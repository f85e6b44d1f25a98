"""Memory that models to be timed share: what their tensors hold does not matter, only where each model's lie."""

from math import inf, prod
from pathlib import Path

import torch
from torch import Tensor

ALIGNMENT = 128
"""Values; tensors begin at multiples of it, as they do when allocated one by one."""
SPREAD = 0.02
MEMINFO = Path("/proc/meminfo")


class Arena:
    """One stretch of random numbers that every model takes its tensors from, so that many need the room of one.

    Models of it share weights with each other, but no two tensors of one model do.
    """

    def __init__(self, num_values: int, device: torch.device, dtype: torch.dtype) -> None:
        # Asked first, since Linux would rather end the process than refuse.
        if device.type == "cpu" and num_values * dtype.itemsize > available(device):
            raise torch.OutOfMemoryError("more than the memory that is free")
        self.values = torch.empty(num_values, device=device, dtype=dtype).normal_(std=SPREAD)
        self.used = 0

    def rewind(self) -> None:
        self.used = 0

    def take(self, shape: tuple[int, ...]) -> Tensor:
        start = self.used
        self.used += aligned(prod(shape))
        return self.values[start : start + prod(shape)].view(shape)


def available(device: torch.device) -> float:
    """Bytes of a device's memory that are free."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    lines = MEMINFO.read_text().splitlines() if MEMINFO.is_file() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), inf)


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
