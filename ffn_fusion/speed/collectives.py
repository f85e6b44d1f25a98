"""What tensor parallelism adds to a sublayer: an all-reduce across ranks, measured in processes of its own.

NCCL on as many GPUs, inside a CUDA graph; gloo on the CPU. Engines with an all-reduce of their own are faster on small
tensors.
"""

import json

import torch

from ffn_fusion.core.cost_table import Communication, Measured, Scenario, Timing
from ffn_fusion.speed.ranks import check_ranks, run_ranks

RANK = "ffn_fusion.speed.collective_rank"
TIMEOUT = 600


def measure_communication(
    ranks: int, scenario: Scenario, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> Communication:
    """Times across `ranks` devices; all nothing for one. The logits are gathered for the last position only."""
    if ranks == 1:
        return Communication.none()
    check_ranks(ranks, device)
    batch = scenario.batch_size
    requests = [
        ("all_reduce", [batch * scenario.prompt_length, hidden_size]),
        ("all_reduce", [batch, hidden_size]),
        ("all_gather", [batch, -(-vocab_size // ranks)]),
    ]
    prefill, decode, gather = (Measured.of(times) for times in _run(ranks, requests, dtype, device))
    return Communication(Timing(prefill, decode), Timing(gather, gather))


def _run(
    ranks: int, requests: list[tuple[str, list[int]]], dtype: torch.dtype, device: torch.device
) -> list[list[float]]:
    order = {"dtype": str(dtype).removeprefix("torch."), "requests": requests}
    said = run_ranks(RANK, order, ranks, device.type, TIMEOUT, f"the all-reduce across {ranks} ranks")
    times: list[list[float]] = json.loads(said.splitlines()[-1])
    return times
