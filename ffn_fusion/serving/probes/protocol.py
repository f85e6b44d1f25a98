"""What every probe does: read a request, decode greedily in its engine, write tokens and logits.

A probe is run by path (``PYTHON vllm_probe.py REQUEST.json ...``) in an environment that has the engine and numpy and
may lack this package. Each request holds `model`, `prompts` (token ids), `texts` (to tokenise), `new_tokens`, `answer`
(the npz file to write) and `options` of the engine.
"""

import gc
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Greedy = Callable[[Sequence[int], int], tuple[list[int], np.ndarray]]
"""Prompt and number of new tokens → the tokens [new] and the logits that each was chosen from [new, vocabulary]."""


@dataclass(frozen=True)
class Loaded:
    """A model in its engine; `tokenize` gives ids without special tokens added, those spelled in the text parsed."""

    greedy: Greedy
    tokenize: Callable[[str], Sequence[int]]


def answer(load: Callable[[str, dict[str, Any]], Loaded]) -> None:
    """Run the requests named on the command line, one after the other, with the engine that `load(model, options)`
    starts."""
    for path in sys.argv[1:]:
        request = json.loads(Path(path).read_text(encoding="utf-8"))
        loaded = load(request["model"], request["options"])
        ids = [list(loaded.tokenize(text)) for text in request["texts"]]
        decoded = [loaded.greedy(prompt, request["new_tokens"]) for prompt in request["prompts"]]
        arrays = {f"ids_{number}": np.array(found, dtype=np.int64) for number, found in enumerate(ids)}
        arrays["tokens"] = np.array([tokens for tokens, _ in decoded], dtype=np.int64)
        arrays["logits"] = np.stack([logits for _, logits in decoded]).astype(np.float32)
        np.savez(request["answer"], **arrays)  # type: ignore[arg-type]
        # Engines that go take what is global with them, so this one goes before the next one comes.
        del loaded
        gc.collect()
