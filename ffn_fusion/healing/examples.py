"""Chat and preference files → token ids, with the tokens to learn marked: what `align` trains and scores on.

Records are objects with `messages` (every answer of the assistant is learnt), with `prompt` and `completion`, or with
`prompt`, `chosen` and `rejected`; texts, or lists of messages, which go through the model's chat template.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ffn_fusion.core.align_records import Method
from ffn_fusion.errors import UserError
from ffn_fusion.hf.text import json_lines, read_table

Messages = list[dict[str, str]]
Ids = list[int]
COLUMNS = {
    "sft": (("messages",), ("prompt", "completion")),
    "dpo": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
}
"""Columns that a record of each method has, one of these sets; without a prompt it is what both answers begin with."""
NEEDED = {"sft": "messages, or prompt and completion", "dpo": "prompt, chosen and rejected"}
IGNORED = -100
"""Label of a token that is not to be learnt."""


@dataclass(frozen=True)
class Answer:
    """A text as token ids, and as many labels: the id where the token is to be learnt."""

    ids: Ids
    labels: Ids

    @property
    def num_learnt(self) -> int:
        return len(self.labels) - self.labels.count(IGNORED)


@dataclass(frozen=True)
class Example:
    """One record: its answer, or the chosen and the rejected one, which begin with the same prompt."""

    prompt: str
    """What is asked, as a key: records that ask the same are held out together or not at all."""
    answers: tuple[Answer, ...]

    @property
    def length(self) -> int:
        return max(len(answer.ids) for answer in self.answers)


def read_examples(paths: Sequence[Path], method: Method, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """All records of these files; `UserError` at the first that is none for this method."""
    encoder = _Encoder(tokenizer)
    examples = []
    for path in paths:
        for where, row in _rows(path):
            columns = next((names for names in COLUMNS[method] if all(row.get(n) is not None for n in names)), None)
            if columns is None:
                found = ", ".join(row) or "no columns"
                raise UserError(f"{where} has {found}; --method {method} needs {NEEDED[method]}")
            try:
                examples.append(encoder.example({name: row[name] for name in columns}))
            except _WrongRecordError as error:
                raise UserError(f"{where}: {error}") from None
    if not examples:
        raise UserError(f"--data {', '.join(map(str, paths))} holds no records")
    return examples


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Records to train on and a share to hold out, chosen by prompt, so that no prompt is on both sides."""
    prompts = sorted({example.prompt for example in examples})
    random.Random(seed).shuffle(prompts)
    count = round(share * len(prompts))
    if not 2 <= count < len(prompts):
        raise UserError(
            f"--hold-out {share} of {len(prompts)} different prompts is {count}; "
            "at least 2 must be held out and 1 trained on"
        )
    held_out = set(prompts[:count])
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        sides[example.prompt in held_out].append(example)
    return sides


def digest(examples: Sequence[Example]) -> str:
    """Changes when the token ids or labels of any record do."""
    found = hashlib.sha256()
    for example in examples:
        found.update(repr([(answer.ids, answer.labels) for answer in example.answers]).encode())
    return found.hexdigest()[:16]


class _WrongRecordError(Exception):
    """What is wrong with a record; the file and line are added where they are known."""


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise UserError(f"--data {path} is no file; give JSONL or parquet")
    if path.suffix == ".parquet":
        for number, row in enumerate(read_table(path).to_pylist(), start=1):
            yield f"{path} row {number}", row
    else:
        for number, row in json_lines(path):
            yield f"{path} line {number}", row


def _text(name: str, value: Any) -> str | Messages:
    """A column's value as text or messages, without keys that templates may not know."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
        raise _WrongRecordError(f"{name} is neither text nor a list of messages")
    for message in value:
        if not (isinstance(message.get("role"), str) and isinstance(message.get("content"), str)):
            raise _WrongRecordError(f"a message in {name} lacks a role or a content that is text")
    return [{"role": message["role"], "content": message["content"]} for message in value]


class _Encoder:
    """A tokenizer and its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-text token, which an answer ends with")

    def example(self, row: dict[str, Any]) -> Example:
        """A record whose columns are one of the sets above."""
        texts = {name: _text(name, value) for name, value in row.items()}
        if "messages" in texts:
            return self._conversation(texts["messages"])
        if "completion" in texts:
            return self._answers(texts["prompt"], [texts["completion"]])
        if "prompt" in texts:
            return self._answers(texts["prompt"], [texts["chosen"], texts["rejected"]])
        chosen, rejected = texts["chosen"], texts["rejected"]
        if isinstance(chosen, str) or isinstance(rejected, str):
            raise _WrongRecordError("without prompt, chosen and rejected are lists of messages")
        prompt = _shared(chosen, rejected)
        return self._answers(prompt, [chosen[len(prompt) :], rejected[len(prompt) :]])

    def _conversation(self, messages: str | Messages) -> Example:
        """A conversation, every answer of the assistant in it to be learnt."""
        if isinstance(messages, str):
            raise _WrongRecordError("messages is text; it is a list of messages with role and content")
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns or turns[0] == 0:
            raise _WrongRecordError("messages has no answer of an assistant with a question in front of it")
        ids = self._render(messages)
        labels = [IGNORED] * len(ids)
        for turn in turns:
            start = len(_shared(self._render(messages[:turn], ask=True), ids))
            told = self._render(messages[: turn + 1])
            if ids[: len(told)] != told:
                raise _WrongRecordError(
                    "the chat template rewrites an answer once others follow; give each as prompt and completion"
                )
            labels[start : len(told)] = ids[start : len(told)]
        return Example(_key(messages[: turns[0]]), (Answer(ids, labels),))

    def _answers(self, prompt: str | Messages, answers: Sequence[str | Messages]) -> Example:
        """Answers to one prompt; only they are to be learnt."""
        if isinstance(prompt, str):
            asked = self._ids(prompt)
            written = [self._ended(self._ids(prompt + text)) for text in answers if isinstance(text, str)]
        else:
            asked = self._render(prompt, ask=True)
            written = [self._render([*prompt, *text]) for text in answers if not isinstance(text, str) and text]
        if len(written) != len(answers):
            raise _WrongRecordError("prompt and answers are all texts, or all lists of messages, none of them empty")
        # Tokens may merge across the boundary: the answer begins where the two differ, at one place for both.
        start = min(len(_shared(asked, ids)) for ids in written)
        return Example(_key(prompt), tuple(Answer(ids, [IGNORED] * start + ids[start:]) for ids in written))

    def _ids(self, text: str) -> Ids:
        ids: Ids = self._tokenizer(text, verbose=False)["input_ids"]
        return ids

    def _ended(self, ids: Ids) -> Ids:
        end: int = self._tokenizer.eos_token_id
        return ids if ids[-1:] == [end] else [*ids, end]

    def _render(self, messages: Messages, ask: bool = False) -> Ids:
        """Messages through the chat template; `ask` adds what an answer comes after."""
        if not self._tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template, which messages need; give prompt and answers as text")
        try:
            found = self._tokenizer.apply_chat_template(messages, add_generation_prompt=ask, return_dict=True)
        except TemplateError as error:
            raise _WrongRecordError(f"the chat template refuses it: {error}") from None
        ids: Ids = found["input_ids"]
        return ids


def _shared(first: list[Any], second: list[Any]) -> list[Any]:
    """What both lists begin with."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return [item for item, _ in pairs]


def _key(prompt: str | Messages) -> str:
    return hashlib.sha256(json.dumps(prompt).encode()).hexdigest()
