"""Options that several verbs share. Each field is an option of the command line and an argument of the Python API."""

from dataclasses import dataclass
from typing import Literal

from cyclopts import Parameter

Dtype = Literal["auto", "bf16", "fp16", "fp32"]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and how to compute.

    Parameters
    ----------
    device
        "auto" (the first GPU, else the CPU), "cpu", "cuda", "cuda:1", or "balanced" to spread a model over GPUs.
    dtype
        Arithmetic; "auto" is the checkpoint's own.
    batch_size
        Windows computed at once.
    trust_remote_code
        Let a tokenizer run code from the model's folder. Model code from there is never run.
    """

    device: str = "auto"
    dtype: Dtype = "auto"
    batch_size: int = 4
    trust_remote_code: bool = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Text:
    """Text to measure and calibrate on.

    Parameters
    ----------
    text
        Files, folders, JSONL or parquet files, Hub datasets (owner/name:split), builtin:wikipedia or builtin:novels;
        give the option again for each.
    column
        Column of JSONL, parquet and Hub datasets.
    length
        Tokens in a window.
    seed
        Seed that picks the windows.
    """

    text: tuple[str, ...] = ("builtin:wikipedia",)
    column: str = "text"
    length: int = 512
    seed: int = 0
