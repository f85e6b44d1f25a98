"""From the user's machine options to torch: devices, dtypes, and the name of what computed a figure."""

import torch

from ffn_fusion.errors import UserError
from ffn_fusion.folder import Environment, environment
from ffn_fusion.hf.checkpoint import Checkpoint
from ffn_fusion.settings import Machine

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device(machine: Machine) -> torch.device:
    """The device that single tensors and streams live on."""
    wants_gpu = machine.device not in ("auto", "cpu")
    if wants_gpu and not torch.cuda.is_available():
        raise UserError(f"--device {machine.device}: torch sees no GPU here; use --device cpu")
    if machine.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        return torch.device(machine.device if ":" in machine.device else "cuda:0")
    except RuntimeError:
        raise UserError(f"--device {machine.device} is no device; use auto, cpu, cuda, cuda:N or balanced") from None


def device_map(machine: Machine) -> str:
    """What transformers spreads a model by."""
    return "balanced" if machine.device == "balanced" else str(pick_device(machine))


def pick_dtype(machine: Machine, checkpoint: Checkpoint) -> torch.dtype:
    """The arithmetic asked for, or the checkpoint's own (its most frequent dtype)."""
    if machine.dtype != "auto":
        return DTYPES[machine.dtype]
    stored = [spec.dtype for spec in checkpoint.specs.values()]
    return max(set(stored), key=stored.count)


def pick_training_dtype(machine: Machine, checkpoint: Checkpoint) -> torch.dtype:
    """The same for a stage that trains; `UserError` for float16."""
    dtype = pick_dtype(machine, checkpoint)
    if dtype == torch.float16:
        raise UserError("gradients leave the range of float16; use --dtype bf16 or fp32")
    return dtype


def where(machine: Machine, dtype: torch.dtype) -> Environment:
    """The environment record of a stage that computed on this machine."""
    device = pick_device(machine)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return environment(name, str(dtype).removeprefix("torch."))
