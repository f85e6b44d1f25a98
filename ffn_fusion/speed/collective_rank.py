"""One rank of `collectives`: `python -m ffn_fusion.speed.collective_rank ORDER`; rank 0 prints the times as JSON."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ffn_fusion.speed.ranks import joined

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

    timed = _graphed(chain) if device.type == "cuda" else _plain(chain)
    return [timed() / CHAIN for _ in range(REPEATS)]


def _plain(chain: Callable[[], None]) -> Callable[[], float]:
    def timed() -> float:
        dist.barrier()
        start = time.perf_counter()
        chain()
        return (time.perf_counter() - start) * 1e3

    timed()
    return timed


def _graphed(chain: Callable[[], None]) -> Callable[[], float]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        chain()  # NCCL sets up its connections outside of the graph
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog thread asks for events meanwhile, which the global mode forbids.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        chain()

    def timed() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The first replay brings the ranks together.
        graph.replay()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    timed()
    return timed


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    result = main(request)
    if request["rank"] == 0:
        print(json.dumps(result))
