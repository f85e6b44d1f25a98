"""Runs an export in its engine and compares it with the student: the same prompts, greedy, logits of every step."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ffn_fusion.core.engine_records import QUESTION, Divergence, EngineCheck
from ffn_fusion.errors import UserError
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.serving.engines import Installed

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
)
HARD_TEXTS = (
    *TEXTS,
    "  two  blanks\n\n\ttab, 3.14159 and 20,000 — ünïcode, 日本語, 🙂🙃!",
    "I'll don't CAN'T\r\n\r\n   end ",
)
"""Tokenised by the engine and by the student's own tokenizer."""
NEW_TOKENS = 24
LIMIT = 1e-3
"""Largest difference of a logit that float32 explains, in units of their deviation where that is above one."""


@dataclass(frozen=True)
class Probed:
    """What an engine answered: tokens [prompts, new], logits [prompts, new, vocabulary], ids of each hard text."""

    tokens: np.ndarray
    logits: np.ndarray
    ids: list[list[int]]


def verify(
    student: ModelFolder,
    tokenizer: PreTrainedTokenizerBase,
    exported: Path,
    installed: Installed,
    *,
    state: Path,
    exact: bool,
) -> EngineCheck:
    """Compare `exported`, run in its engine, with `student` in float32.

    The student is given the engine's own tokens, so that each step is compared on the same prefix. Raises `UserError`
    if the engine fails or its logits are no numbers, or if an `exact` export differs by more than float32 explains.
    """
    prompts = _prompts(tokenizer)
    probed = _probe(installed, exported, prompts, state)
    reference = _reference(student.load(torch.float32, "cpu"), prompts, probed.tokens)
    # Engines pad the vocabulary.
    error = float(np.abs(reference - probed.logits[..., : reference.shape[-1]]).max())
    if not isfinite(error):
        raise UserError(f"{installed.name} {installed.version} does not compute the student: its logits are no numbers")
    deviation = float(reference.std())
    if exact and error >= (limit := LIMIT * max(1.0, deviation)):
        raise UserError(
            f"{installed.name} {installed.version} does not compute the student: a logit differs by {error:.2g} "
            f"(float32 explains {limit:.1g})"
        )
    return EngineCheck(
        engine=installed.name,
        version=installed.version,
        options=installed.options,
        num_prompts=len(prompts),
        num_tokens=probed.tokens.size,
        max_logit_error=error,
        logit_std=deviation,
        divergence=_divergence(reference, probed.tokens),
        same_tokenizer=probed.ids == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in HARD_TEXTS],
        answer=_answer(tokenizer, probed.tokens[0].tolist()),
    )


def _probe(installed: Installed, model: Path, prompts: Sequence[list[int]], state: Path) -> Probed:
    answer = state / "answer.npz"
    request = {"model": model, "prompts": prompts, "texts": HARD_TEXTS, "new_tokens": NEW_TOKENS, "answer": answer}
    installed.run(installed.engine.probe, request, state)
    return read_answer(answer, len(HARD_TEXTS))


def read_answer(answer: Path, num_texts: int) -> Probed:
    """What a probe wrote (serving/probes/protocol.py)."""
    with np.load(answer) as found:
        ids = [found[f"ids_{number}"].tolist() for number in range(num_texts)]
        return Probed(found["tokens"], found["logits"], ids)


def _answer(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """The text up to the first special token, behind which the engine was made to go on."""
    end = next((place for place, token in enumerate(tokens) if token in tokenizer.all_special_ids), len(tokens))
    return str(tokenizer.decode(tokens[:end], skip_special_tokens=True)).strip()


def _prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """A question, through the chat template where there is one, and two texts to go on with."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": QUESTION}]
        question = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    else:
        question = tokenizer(QUESTION)["input_ids"]
    return [list(ids) for ids in (question, *(tokenizer(text)["input_ids"] for text in TEXTS))]


@torch.no_grad()
def _reference(model: PreTrainedModel, prompts: Sequence[list[int]], tokens: np.ndarray) -> np.ndarray:
    """Logits [prompts, new, vocabulary] that each of `tokens` [prompts, new] is chosen from."""
    rows = []
    for prompt, new in zip(prompts, tokens.tolist(), strict=True):
        ids = torch.tensor([prompt + new[:-1]])
        rows.append(model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float().numpy())
    return np.stack(rows)


def _divergence(reference: np.ndarray, tokens: np.ndarray) -> Divergence | None:
    """The first token that the student would not have chosen, and by how much its own choice leads."""
    for prompt, step in np.argwhere(reference.argmax(-1) != tokens).tolist():
        row = reference[prompt, step]
        return Divergence(prompt, step, float(row.max() - row[tokens[prompt, step]]))
    return None
