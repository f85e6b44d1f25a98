"""What tensor parallelism adds to a sublayer: an all-reduce across ranks, measured in processes of its own.

NCCL on as many GPUs, inside a CUDA graph; gloo on the CPU. Engines with an all-reduce of their own are faster on small
tensors.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ffn_fusion.core.cost_table import Communication, Measured, Scenario, Timing
from ffn_fusion.errors import UserError

RANK = "ffn_fusion.hf.collective_rank"
TIMEOUT = 600


def check_ranks(ranks: int, device: torch.device) -> None:
    """`UserError` if there are fewer GPUs than ranks."""
    if device.type == "cuda" and torch.cuda.device_count() < ranks:
        raise UserError(f"--tensor-parallel {ranks} needs {ranks} GPUs; there are {torch.cuda.device_count()} here")


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
    # NVLS multicast can hang or fail on hosts that do not hand it through.
    environment = os.environ | {"NCCL_NVLS_ENABLE": "0"}
    with tempfile.TemporaryDirectory() as scratch:
        order = {
            "ranks": ranks,
            "store": str(Path(scratch) / "store"),
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "requests": requests,
        }
        children = [
            subprocess.Popen(
                [sys.executable, "-m", RANK, json.dumps(order | {"rank": rank})],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(ranks)
        ]
        try:
            answers = [child.communicate(timeout=TIMEOUT) for child in children]
        except subprocess.TimeoutExpired:
            raise UserError(f"{ranks} ranks did not finish an all-reduce within {TIMEOUT} seconds") from None
        finally:
            for child in children:
                child.kill()
    for child, (_, errors) in zip(children, answers, strict=True):
        if child.returncode:
            said = errors.strip().splitlines()
            raise UserError(f"the all-reduce across {ranks} ranks failed: {said[-1] if said else child.returncode}")
    times: list[list[float]] = json.loads(answers[0][0].splitlines()[-1])
    return times
