"""Students for the targets that write a graph, and the comparison of such an export, run in its engine, with them."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from layouts import save_layout
from transformers import AutoTokenizer

import ffn_fusion.export.probes
from ffn_fusion.core.plan import Plan
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.student import write_student

STUDENTS = ("fusion", "empty", "ffnfree", "lastempty", "llama", "qwen2", "smollm3", "granite")
"""Layouts, and families: those with a sliding window, without rotary positions and with multipliers among them."""
PLAN = Plan.parse("A0F0 A1F1+2 -F3 A4F4+5")
PROMPTS = [[5, 70, 9, 33, 12, 48, 90, 61], [1, 40, 41, 42], [7]]
TEXTS = ["Two  blanks", "a tab\tand\n\n1+2=3"]
NEW_TOKENS = 16


def make_student(name: str, tiny_parent: Callable[[str], Path], folder: Path) -> ModelFolder:
    if name in ("llama", "qwen2", "smollm3", "granite"):
        folder.mkdir()
        write_student(ModelFolder(tiny_parent(name)), PLAN, folder, "folded", {})
        return ModelFolder(folder)
    return ModelFolder(save_layout(name, folder))


def largest_error(target: ModuleType, student: ModelFolder, dtype: str, run: tuple[str, str], folder: Path) -> float:
    """Export, run (Python, probe) on it; the largest error of a logit. Fails on other tokens than the student's own."""
    out, request = folder / dtype, folder / "request.json"
    out.mkdir()
    assert target.why_not(student) is None
    target.write(student, out, dtype)
    asked = {"model": str(out), "prompts": PROMPTS, "texts": TEXTS, "new_tokens": NEW_TOKENS, "options": {}}
    request.write_text(json.dumps(asked | {"answer": str(folder / "answer.npz")}))
    python, probe = run
    script = Path(ffn_fusion.export.probes.__file__).with_name(probe)
    subprocess.run([python, str(script), str(request)], check=True, timeout=120, stdout=subprocess.DEVNULL)
    found = np.load(folder / "answer.npz")
    tokenizer = AutoTokenizer.from_pretrained(student.folder)
    for number, text in enumerate(TEXTS):
        assert found[f"ids_{number}"].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    expected = greedy_logits(student)
    error = float(np.abs(found["logits"] - expected).max())
    print(f"{target.__name__} {dtype}: {error:.1e}, standard deviation {expected.std():.2f}")
    assert dtype != "f32" or (found["tokens"] == expected.argmax(-1)).all()
    return error


@torch.no_grad()
def greedy_logits(student: ModelFolder) -> np.ndarray:
    """The student's own greedy logits [prompts, new, vocabulary], in float32 and without a cache."""
    model = student.load(torch.float32, "cpu")
    rows = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        for _ in range(NEW_TOKENS):
            row = model(input_ids=ids, use_cache=False).logits[:, -1]
            rows.append(row.numpy()[0])
            ids = torch.cat((ids, row.argmax(-1, keepdim=True)), 1)
    return np.stack(rows).reshape(len(PROMPTS), NEW_TOKENS, -1)
