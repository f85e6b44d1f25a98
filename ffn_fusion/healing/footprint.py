"""What a stage takes of a GPU's memory, and whether more windows at once would fit there."""

import torch

KEPT = 0.2
"""Share of the memory that a suggestion leaves free."""


def start_peak(device: torch.device) -> None:
    """The peak is counted from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float | None:
    """The most that was in use, in 10^9 bytes; only GPUs tell."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def suggestion(at_once: int, share: int, device: torch.device) -> str | None:
    """What to say to whoever computes few of a rank's `share` of windows at once: a GPU waits for its host then."""
    if device.type != "cuda":
        return None
    used = torch.cuda.max_memory_allocated(device) / torch.cuda.get_device_properties(device).total_memory
    better = more_at_once(at_once, share, used)
    taken = f"{at_once} windows at once take {used:.0%} of the GPU's memory"
    return f"{taken}; more are faster: stop, and go on with --batch-size {better}" if better else None


def more_at_once(at_once: int, share: int, used: float) -> int | None:
    """How many of `share` windows to compute at once, doubling their number as long as it fits; None if it is to stay.

    `used` is the share of the memory in use, taken as if all of it were the windows'.
    """
    better = at_once
    while better < share and 2 * better / at_once * used <= 1 - KEPT:
        better *= 2
    return min(better, share) if better > at_once else None
