"""What every latency probe does: start its engine on a model, then time what it is asked for, line by line.

A probe is run by path (``PYTHON vllm_latency_probe.py REQUEST.json``) in an environment that has the engine and may
lack this package. It answers each line of JSON on standard input with one on standard output; what the engine itself
prints goes to standard error.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Decode = Callable[[int, int, int], None]
"""Batch size, prompt length, new tokens → decoded greedily."""
ODD = 5000
"""Token ids of prompts are below it; they say nothing."""


def prompt_ids(length: int, number: int = 0, vocabulary: int = ODD) -> list[int]:
    """Tokens of a prompt, other ones for each number, so that nothing is found in a prefix cache."""
    return [(7 * number + 13 * place) % (min(vocabulary, ODD) - 10) + 10 for place in range(length)]


def seconds(decode: Decode, batch_size: int, prompt_length: int, new_tokens: int) -> float:
    start = time.perf_counter()
    decode(batch_size, prompt_length, new_tokens)
    return time.perf_counter() - start


def serve(start: Callable[[dict[str, Any]], Decode]) -> None:
    """Answer until standard input ends. The first answer comes when the engine is ready."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    decode = start(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        shape = asked["batch_size"], asked["prompt_length"]
        first = seconds(decode, *shape, 1)
        whole = seconds(decode, *shape, 1 + asked["new_tokens"])
        timed = {"prefill_ms": 1e3 * first, "decode_ms": 1e3 * (whole - first) / asked["new_tokens"]}
        print(json.dumps(timed), file=answers, flush=True)
