"""Energy that a GPU has used, where NVIDIA's management library and its package nvidia-ml-py tell."""

from collections.abc import Callable

import torch


def energy_counter(device: torch.device) -> Callable[[], float] | None:
    """What returns the joules used so far; None on a CPU, without the package, or where the device does not count."""
    if device.type != "cuda":
        return None
    try:
        import pynvml  # the extra "energy", which vLLM brings along, too
    except ImportError:
        return None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
