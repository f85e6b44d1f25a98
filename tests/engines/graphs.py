"""Students for the targets that write a graph, and the comparison of such an export, run in its engine, with them."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from layouts import save_layout
from running import assert_same, run_probe
from transformers import AutoTokenizer

from ffn_fusion.core.plan import Plan
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.student import write_student

STUDENTS = ("fusion", "empty", "ffnfree", "lastempty", "llama", "qwen2", "smollm3", "granite")
"""Layouts, and families: those with a sliding window, without rotary positions and with multipliers among them."""
PLAN = Plan.parse("A0F0 A1F1+2 -F3 A4F4+5")
PROMPTS = ([5, 70, 9, 33, 12, 48, 90, 61], [1, 40, 41, 42], [7])
TEXTS = ("Two  blanks", "a tab\tand\n\n1+2=3")


def make_student(name: str, tiny_parent: Callable[[str], Path], folder: Path) -> ModelFolder:
    if name in ("llama", "qwen2", "smollm3", "granite"):
        folder.mkdir()
        write_student(ModelFolder(tiny_parent(name)), PLAN, folder, "folded", {}, {})
        return ModelFolder(folder)
    return ModelFolder(save_layout(name, folder))


def assert_exported_same(target: ModuleType, student: ModelFolder, run: tuple[str, str], folder: Path) -> None:
    """Export in f32 and run it by (engine, probe): logits, greedy tokens and tokenised texts are the student's own."""
    out = folder / "exported"
    out.mkdir()
    assert target.why_not(student) is None
    target.write(student, out, "f32")
    found = run_probe(*run, {"it": out}, folder, prompts=PROMPTS, texts=TEXTS)["it"]
    tokenizer = AutoTokenizer.from_pretrained(student.folder)
    assert found.ids == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert_same(found, student, prompts=PROMPTS)
