"""GGUF files in llama.cpp itself."""

import os
import shlex
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import LAYOUTS, save_layout
from running import PROMPTS, Found, assert_same, needs, python_of, run_probe, teacher_forced
from spellings import BYTE_LEVEL, HARD_TEXTS, save_byte_level, save_sentencepiece
from transformers import AutoTokenizer

from ffn_fusion.core.plan import Plan
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.resolve import resolve_model
from ffn_fusion.hf.student import write_student
from ffn_fusion.serving import gguf_file

PLAN = (
    "A0F0 A1F1 A2F2 A3F3 A4F4 A5F5 -F6+7 A8F8 A9F9 A10F10 A11F11 A12F12 A13F13 A14F14 A15F15 -F16+17 A18F18 A19F19+20 "
    "A21F21 A22F22 A23F23 A24F24 -F25+26 A27F27 A28F28+29"
)
pytestmark = needs("llama.cpp")


def probe(
    file: Path,
    folder: Path,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    texts: Sequence[str] = (),
    new_tokens: int = 12,
) -> Found:
    """What llama.cpp makes of a file."""
    return run_probe(
        "llama.cpp", "llama_cpp", {"it": file}, folder, prompts=prompts, texts=texts, new_tokens=new_tokens
    )["it"]


def assert_same_model(student: ModelFolder, folder: Path, prompts: Sequence[Sequence[int]] = PROMPTS) -> None:
    assert gguf_file.why_not(student) is None
    gguf_file.write(student, folder, "f32")
    assert_same(probe(folder / "model-f32.gguf", folder, prompts), student, prompts=prompts)


def tokenised(folder: Path, out: Path, texts: Sequence[str]) -> list[tuple[str, list[int], list[int]]]:
    """(text, ids in llama.cpp, ids in transformers) of the texts that the two cut differently."""
    out.mkdir()
    gguf_file.write(ModelFolder(folder), out, "f32")
    found = probe(out / "model-f32.gguf", out, [[5]], texts, new_tokens=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    pairs = [(text, found.ids[number], ids) for number, (text, ids) in enumerate(zip(texts, expected, strict=True))]
    return [(text, ours, theirs) for text, ours, theirs in pairs if ours != theirs]


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "first"])
def test_every_layout_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    assert_same_model(ModelFolder(save_layout(name, tmp_path / "student")), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_theta": 20000.0, "rope_type": "linear", "factor": 2.0}},
        {
            "rope_parameters": {
                "rope_theta": 5000.0,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ],
    ids=["tied", "linear", "llama3"],
)
def test_head_and_rope_variants_compute_what_transformers_computes(changes: Any, tmp_path: Path) -> None:
    prompts = [torch.randint(4, 100, (120,), generator=torch.Generator().manual_seed(1)).tolist()]
    assert_same_model(ModelFolder(save_layout("fusion", tmp_path / "student", **changes)), tmp_path, prompts)


@pytest.mark.parametrize("style", BYTE_LEVEL)
def test_byte_level_text_is_cut_as_transformers_cuts_it(style: str, tmp_path: Path) -> None:
    texts = [text for text in HARD_TEXTS if style != "tekken" or not text.startswith("marks")]
    folder = save_byte_level(style, save_layout("lastwide", tmp_path / "student"))
    assert tokenised(folder, tmp_path / "gguf", texts) == []


@pytest.mark.parametrize("style", ["always", "first", "never"])
def test_sentencepiece_text_is_cut_as_transformers_cuts_it(style: str, tmp_path: Path) -> None:
    texts = [text for text in HARD_TEXTS if style == "never" or not (text.startswith(" ") or "<|" in text)]
    folder = save_sentencepiece(style, save_layout("lastwide", tmp_path / "student"))
    assert tokenised(folder, tmp_path / "gguf", texts) == []


def test_llama_cpps_own_quantiser_makes_a_file_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "llama-quantize"
    program.parent.mkdir()
    code = (
        "import sys, ctypes, llama_cpp as l; p = l.llama_model_quantize_default_params(); "
        "p.ftype = getattr(l, 'LLAMA_FTYPE_MOSTLY_' + sys.argv[3]); "
        "sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(p)))"
    )
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(python_of("llama.cpp"))} -c {shlex.quote(code)} "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    student = ModelFolder(save_layout("ffnfree", tmp_path / "student"))
    errors = {}
    for dtype in ("q8_0", "q6_k", "q4_k_m", "q4_0"):
        gguf_file.write(student, tmp_path, dtype)
        found = probe(tmp_path / f"model-{dtype}.gguf", tmp_path)
        expected = teacher_forced(student, found.tokens)
        errors[dtype] = float(np.abs(found.logits - expected).mean() / expected.std())
    assert errors["q8_0"] < errors["q6_k"] < errors["q4_k_m"] < errors["q4_0"] < 1
    assert not list(tmp_path.glob(".*partial"))


def test_a_fused_smollm2_computes_and_chats_as_in_transformers(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    folder.mkdir()
    write_student(resolve_model("builtin:smollm2-135m"), Plan.parse(PLAN), folder, "folded", {}, {})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France? Write 3 facts, in 100 words."}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    student = ModelFolder(folder)
    gguf_file.write(student, tmp_path, "f32")
    texts = [text, *HARD_TEXTS]
    found = probe(tmp_path / "model-f32.gguf", tmp_path, [prompt], texts, new_tokens=24)
    assert found.ids == [tokenizer(each, add_special_tokens=False)["input_ids"] for each in texts]
    assert_same(found, student, prompts=[prompt])
