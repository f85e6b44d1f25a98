"""`ffn`: FFNs one after the other against the same weights fused in groups, plain and compiled."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import cattrs

from ffn_fusion.core.ffn_records import FfnResult, ffn_rows
from ffn_fusion.errors import UserError
from ffn_fusion.folder import Environment, Record, StageFolder, run_stage
from ffn_fusion.hf.machine import DTYPES, pick_device, where
from ffn_fusion.settings import Above0, Machine, Positive
from ffn_fusion.speed.ffn_race import FfnOrder, FfnTimes, race_ffns
from ffn_fusion.speed.ranks import Ranks, check_ranks, run_ranks
from ffn_fusion.speed.sublayers import Rank

RANK = "ffn_fusion.speed.ffn_race"


def ffn(
    *,
    out: Path,
    hidden_size: Positive = 16384,
    width: Positive = 6656,
    number: Positive = 12,
    group: Positive = 12,
    tokens: tuple[Positive, ...] = (1, 32),
    tensor_parallel: Positive = 1,
    repeats: Positive = 30,
    timeout: Above0 = 900.0,
    device: str = "auto",
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16",
) -> Record[FfnResult]:
    """Time pre-norm gated FFNs in sequence and fused: what fusion wins by itself, with nothing else around it.

    Parameters
    ----------
    out
        New folder for the record.
    hidden_size
        Of the stream. The default is one rank's slice of a Llama-3.1-405B split over eight.
    width
        Channels of one FFN on each device.
    number
        FFNs in sequence.
    group
        FFNs fused into one; divides their number.
    tokens
        Tokens at once; give the option again for each.
    tensor_parallel
        Devices that each FFN is split over, with an all-reduce behind each.
    repeats
        Timed repeats of each way, all ways in turn.
    timeout
        Seconds that several devices may take together.
    device
        "auto" (the first GPU, else the CPU), "cpu", "cuda" or "cuda:1".
    dtype
        Of weights and arithmetic.
    """
    if number % group:
        raise UserError(f"--number {number} FFNs do not fall into groups of {group}; choose a multiple")
    machine = Machine(device=device, dtype=dtype)
    place = pick_device(machine)
    check_ranks(tensor_parallel, place)
    order = FfnOrder(hidden_size, width, number, group, list(tokens), dtype, repeats)
    here = where(machine, DTYPES[dtype])
    inputs = {**asdict(order), "tensor_parallel": tensor_parallel, "device": here.device}

    def work(_: StageFolder) -> tuple[FfnResult, Environment]:
        if tensor_parallel == 1:
            timed = race_ffns(order, Ranks(Rank(), place))
        else:
            what = f"timing FFNs on {tensor_parallel} ranks"
            said = run_ranks(RANK, {"ffns": asdict(order)}, tensor_parallel, place.type, timeout, what)
            timed = cattrs.structure(json.loads(said.splitlines()[-1]), FfnTimes)
        least_ms = order.least_bytes / timed.copy_gb_per_s / 1e6
        rows = []
        for count, columns in zip(tokens, timed.ms, strict=True):
            rows += ffn_rows(count, dict(zip(timed.ways, columns, strict=True)), least_ms)
        result = FfnResult(
            hidden_size, width, number, group, tensor_parallel, repeats, timed.copy_gb_per_s, timed.how, rows
        )
        return result, where(machine, DTYPES[dtype])

    return run_stage("ffn", out, inputs, FfnResult, work)
