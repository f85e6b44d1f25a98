"""One rank of `collectives`: `python -m ffn_fusion.hf.collective_rank ORDER`; rank 0 prints the times as JSON."""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

REPEATS = 20
CHAIN = 20
"""Collectives in a row, each waiting for the one before; a time is the mean over them."""


def main(order: dict[str, Any]) -> list[list[float]]:
    rank, ranks, on_gpu = order["rank"], order["ranks"], order["device"] == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"file://{order['store']}", rank=rank, world_size=ranks
    )
    times = [measure(name, shape, getattr(torch, order["dtype"]), device) for name, shape in order["requests"]]
    dist.barrier()
    dist.destroy_process_group()
    return times


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
