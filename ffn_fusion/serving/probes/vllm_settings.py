"""What every probe of vLLM sets before vLLM is imported, unless the user's environment says otherwise."""

import os

SETTINGS = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # On a CPU the cache takes half of the memory unless told otherwise; in GB.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # vLLM 0.26 asks for FlashInfer's sampler even where FlashInfer is not installed; greedy decoding needs neither.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}


def settle(**more: str) -> None:
    """Set these and `more`, as far as they are not set."""
    for name, value in (SETTINGS | more).items():
        os.environ.setdefault(name, value)
