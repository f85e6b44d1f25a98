"""Processes that each hold one rank of a split model: NCCL between GPUs, gloo on the CPU.

`run_ranks` starts a module of ours once a rank; in each of them `joined` brings it together with the others.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ffn_fusion.errors import UserError
from ffn_fusion.speed.sublayers import Rank


def check_ranks(ranks: int, device: torch.device) -> None:
    """`UserError` if there are fewer GPUs than ranks."""
    if device.type == "cuda" and torch.cuda.device_count() < ranks:
        raise UserError(f"--tensor-parallel {ranks} needs {ranks} GPUs; there are {torch.cuda.device_count()} here")


def run_ranks(module: str, order: Mapping[str, Any], ranks: int, device: str, timeout: float, what: str) -> str:
    """Run `python -m MODULE ORDER` once a rank; what rank 0 printed. `UserError` if one fails or time is up."""
    # NVLS multicast can hang or fail on hosts that do not hand it through.
    environment = os.environ | {"NCCL_NVLS_ENABLE": "0"}
    with tempfile.TemporaryDirectory() as scratch:
        order = {**order, "ranks": ranks, "store": str(Path(scratch) / "store"), "device": device}
        logs = [(Path(scratch) / f"{rank}.out", Path(scratch) / f"{rank}.err") for rank in range(ranks)]
        children = []
        for rank, (out, err) in enumerate(logs):
            # Files and not pipes: a rank that writes much must not wait for one that is read first.
            with out.open("w") as stdout, err.open("w") as stderr:
                command = [sys.executable, "-m", module, json.dumps(order | {"rank": rank})]
                children.append(subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment))
        try:
            failed = _wait(children, timeout)
        finally:
            for child in children:
                child.kill()
                child.wait()
        if failed is None:
            raise UserError(f"{what} did not finish within {timeout:.0f} seconds")
        if failed:
            said = logs[failed - 1][1].read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise UserError(f"{what} failed: {said[-1] if said else children[failed - 1].returncode}")
        return logs[0][0].read_text(encoding="utf-8")


def _wait(children: list[subprocess.Popen[bytes]], timeout: float) -> int | None:
    """0 once all have ended well, the number (from 1) of the first to fail, None if time is up.

    The others are not waited for when one fails: they would wait for it in a collective.
    """
    left, step = timeout, 0.05
    while left > 0:
        codes = [child.poll() for child in children]
        for number, code in enumerate(codes, 1):
            if code:
                return number
        if all(code == 0 for code in codes):
            return 0
        try:
            children[codes.index(None)].wait(step)
        except subprocess.TimeoutExpired:
            left -= step
    return None


class Ranks:
    """This process among the ranks of a split model; alone without a process group."""

    def __init__(self, rank: Rank, device: torch.device) -> None:
        self.rank, self.device = rank, device
        self._one = torch.zeros(1, device=device)

    @property
    def alone(self) -> bool:
        return self.rank.number == 1

    def total(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        dist.all_reduce(values)
        return values

    def join(self, logits: Tensor) -> Tensor:
        """Parts [B, 1, V / ranks] side by side, [B, 1, V]."""
        batch, new, words = logits.shape
        parts = logits.new_empty(self.rank.number * batch, new, words)
        dist.all_gather_into_tensor(parts, logits.contiguous())
        return parts.view(-1, batch, new, words).permute(1, 2, 0, 3).reshape(batch, new, -1)

    def meet(self) -> None:
        """All ranks go on together; on a GPU their queues do."""
        if not self.alone:
            dist.all_reduce(self._one)

    def agree(self, value: float, largest: bool = False) -> float:
        """The sum of the ranks' values, or the largest."""
        if self.alone:
            return value
        held = torch.tensor([value], dtype=torch.float32, device=self.device)
        dist.all_reduce(held, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        return float(held)


@contextmanager
def joined(order: Mapping[str, Any]) -> Iterator[Ranks]:
    """Bring a process that `run_ranks` started together with the others."""
    index, number, on_gpu = order["rank"], order["ranks"], order["device"] == "cuda"
    device = torch.device("cuda", index) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // number))
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{order['store']}",
        rank=index,
        world_size=number,
        # NCCL connects at once, and a barrier has not to guess which GPU is this rank's.
        device_id=device if on_gpu else None,
    )
    try:
        yield Ranks(Rank(index, number), device)
    except BaseException as error:
        # At once: a process group waits for the others before it lets a process end.
        said = str(error) if isinstance(error, UserError) else traceback.format_exc()
        print(said, file=sys.stderr, flush=True)
        os._exit(1)
    # NCCL waits for graphs that hold its kernels.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
