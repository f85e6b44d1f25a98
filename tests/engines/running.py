"""Runs models in real engines. FFN_FUSION_ENGINES names a folder with an environment for each (`make test-engines`)."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ffn_fusion.serving.probes
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.serving.verify import Probed as Found
from ffn_fusion.serving.verify import read_answer

NEWEST = "newest transformers"
"""The transformers of this environment; the engine "transformers" is the oldest one supported."""
PROMPTS = ([5, 70, 9, 33, 12, 48, 90, 61], [1, 40, 41, 42])
NEW_TOKENS = 16
TOLERANCE = 1e-4
"""Largest difference of a logit in float32, in units of their standard deviation where that is above one."""


def python_of(engine: str) -> str:
    """The Python that has an engine, this one for `NEWEST`; empty if there is none."""
    if engine == NEWEST:
        return sys.executable
    python = Path(os.environ.get("FFN_FUSION_ENGINES", "no-folder")).absolute() / engine / "bin" / "python"
    return str(python) if python.is_file() else ""


def needs(engine: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not python_of(engine), reason=f"there is no {engine} in FFN_FUSION_ENGINES")


def run_probe(
    engine: str,
    probe: str,
    models: Mapping[str, Path],
    folder: Path,
    *,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    texts: Sequence[str] = (),
    new_tokens: int = NEW_TOKENS,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Found]:
    """All models, by name, one after the other in one process of the engine."""
    folder.mkdir(parents=True, exist_ok=True)
    requests = []
    for name, model in models.items():
        asked = {"model": str(model), "prompts": prompts, "texts": texts, "new_tokens": new_tokens}
        asked |= {"answer": str(folder / f"{name}.npz"), "options": options or {}}
        requests.append(folder / f"{name}.json")
        requests[-1].write_text(json.dumps(asked))
    script = Path(ffn_fusion.serving.probes.__file__).with_name(f"{probe}_probe.py")
    command = [python_of(engine), str(script), *map(str, requests)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: read_answer(folder / f"{name}.npz", len(texts)) for name in models}


@torch.no_grad()
def teacher_forced(student: ModelFolder, tokens: np.ndarray, prompts: Sequence[Sequence[int]] = PROMPTS) -> np.ndarray:
    """The student's own logits, in float32, at each place where the engine chose one of `tokens` [prompts, new]."""
    model = student.load(torch.float32, "cpu")
    rows = []
    for prompt, chosen in zip(prompts, tokens.tolist(), strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *chosen[:-1]]]), use_cache=False).logits[0]
        rows.append(logits[len(prompt) - 1 :].numpy())
    return np.stack(rows)


def largest_error(found: Found, expected: np.ndarray) -> float:
    return float(np.abs(found.logits[..., : expected.shape[-1]] - expected).max())


def assert_same(
    found: Found,
    student: ModelFolder,
    tolerance: float = TOLERANCE,
    prompts: Sequence[Sequence[int]] = PROMPTS,
) -> None:
    """Logits within the tolerance and every greedy token the student's own."""
    expected = teacher_forced(student, found.tokens, prompts)
    error = largest_error(found, expected)
    deviation = float(expected.std())
    assert error < tolerance * max(1.0, deviation), f"{student.folder.name}: {error:.1e}, deviation {deviation:.2f}"
    assert (found.tokens == expected.argmax(-1)).all()
