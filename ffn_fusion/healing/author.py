"""The parent as an author: it writes prompts and answers itself, for users who have no text of their own.

An instruct model that is given its chat template up to the place where a user speaks writes what a user would say
(Magpie, arXiv 2406.08464); then it answers. A model without a template writes documents from the token that begins one,
and so does any model if that is wanted: what it was trained on, in its own words (LLM-QAT, arXiv 2305.17888). Or it
goes on from stretches of a given text, which keeps it to the subjects and the manner of that text.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ffn_fusion.errors import UserError
from ffn_fusion.hf.text import bare
from ffn_fusion.settings_training import Writing

Continue = Callable[[Tensor, int, float, float], Tensor]
"""Beginnings [texts, n], tokens to add, temperature, top-p → token ids behind each beginning, [texts, tokens]."""
MARK = "\ue000"
"""Stands in for what is said; a character that no template and no text uses."""
RUN = 8
MOST_REPEATED = 0.5
END = 200
"""Characters that no other text ends with: texts may begin alike."""


class Document(NamedTuple):
    """A conversation or a text, exactly as the parent read and wrote it, and what another one may not share with it."""

    text: str
    messages: list[dict[str, str]]

    @property
    def key(self) -> str:
        """Of a conversation the prompt, since answers to one question are alike; of another text how it ends."""
        words = self.messages[0]["content"] if self.messages else self.text[-END:]
        return " ".join(words.casefold().split())


class _End(NamedTuple):
    """What ends something written: tokens, and a string where the template has no token for it."""

    tokens: list[int]
    string: str | None


class _Said(NamedTuple):
    """Something written, whether it came to its end, and why it is of no use, if it is not."""

    text: str
    finished: bool
    fault: str | None


def repeats(ids: Sequence[int]) -> bool:
    """Most runs of eight tokens were there before: a model caught in a loop."""
    runs = [tuple(ids[start : start + RUN]) for start in range(len(ids) - RUN + 1)]
    return len(set(runs)) < MOST_REPEATED * len(runs)


def _fault(text: str, ids: Sequence[int]) -> str | None:
    if not any(map(str.isalnum, text)):
        return "empty"
    return "repeating itself" if repeats(ids) else None


class Author:
    """Writes documents a batch at a time; a batch depends on its number, the seed, and what must not be repeated."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        writing: Writing,
        seed: int,
        batch_size: int,
        sampler: Continue | None = None,
        openings: Tensor | None = None,
    ) -> None:
        """`sampler` writes what is no conversation; without it the model's own `generate` does. `openings` [number, n]
        are stretches of text for documents to begin with, each in its turn."""
        self._model, self._tokenizer, self._writing, self._sampler = model, tokenizer, writing, sampler
        self._seed, self._batch_size, self._openings = seed, batch_size, openings
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.chat = bool(tokenizer.chat_template) and not writing.documents and openings is None
        self._opening, user_end, answer_end = _template(tokenizer) if self.chat else (_beginning(tokenizer), "", "")
        self._user_end, self._answer_end = self._end(user_end), self._end(answer_end)
        self._closing = answer_end
        begun = len(self._ids(self._opening)) if openings is None else openings.shape[1]
        room = begun + (2 if self.chat else 1) * writing.max_new_tokens
        if room > model.config.max_position_embeddings:
            raise UserError(
                f"a document may come to {room:,} tokens; the model takes {model.config.max_position_embeddings:,}: "
                "lower --max-new-tokens"
            )

    def batch(self, number: int, known: set[str]) -> tuple[list[Document], Counter[str]]:
        """New documents whose keys are not `known`, and how many others were begun, by what was wrong with them."""
        devices = range(torch.cuda.device_count()) if self._model.device.type == "cuda" else ()
        with torch.random.fork_rng(devices):
            # torch's generator on a CPU looks at 32 bits of a seed only.
            torch.manual_seed(Random(f"{self._seed} {number}").getrandbits(32))
            return self._chats(known) if self.chat else self._texts(number, known)

    def _chats(self, known: set[str]) -> tuple[list[Document], Counter[str]]:
        rejected: Counter[str] = Counter()
        prompts: dict[str, str] = {}
        for said in self._write([self._opening] * self._batch_size, self._writing.prompt_temperature, self._user_end):
            asked = Document("", [{"role": "user", "content": said.text.strip()}])
            fault = said.fault or (None if said.finished else "unfinished")
            fault = fault or ("duplicate" if asked.key in known | prompts.keys() else None)
            if fault:
                rejected[fault] += 1
            else:
                prompts[asked.key] = said.text.strip()
        questions = [[{"role": "user", "content": prompt}] for prompt in prompts.values()]
        heads = [self._render(question) for question in questions]
        documents = []
        answers = self._write(heads, self._writing.answer_temperature, self._answer_end)
        for question, head, said in zip(questions, heads, answers, strict=True):
            if said.fault:
                rejected[said.fault] += 1
            else:
                text = head + said.text + (self._closing if said.finished else "")
                answer = {"role": "assistant", "content": said.text.strip()}
                documents.append(Document(bare(text, self._tokenizer), [*question, answer]))
        return documents, rejected

    def _texts(self, number: int, known: set[str]) -> tuple[list[Document], Counter[str]]:
        """Where a text ends the next one begins, as in training; nobody waits for the longest of a batch."""
        rejected: Counter[str] = Counter()
        documents: dict[str, Document] = {}
        for ids in self._freely(number):
            document = Document(bare(self._tokenizer.decode(ids).strip(), self._tokenizer), [])
            fault = _fault(document.text, ids)
            fault = fault or ("duplicate" if document.key in known | documents.keys() else None)
            if fault:
                rejected[fault] += 1
            else:
                documents[document.key] = document
        return list(documents.values()), rejected

    def _freely(self, number: int) -> list[list[int]]:
        """Token ids of texts that go on as far as is allowed, with what they open with if it is given text."""
        wanted, size = self._writing, self._batch_size
        if self._openings is None:
            beginnings = torch.tensor([self._ids(self._opening)]).expand(size, -1)
        else:
            beginnings = self._openings[torch.arange(number * size, (number + 1) * size) % len(self._openings)]
        if self._sampler is None:
            ids = self._sample(beginnings, torch.ones_like(beginnings), wanted.prompt_temperature)
        else:
            ids = self._sampler(beginnings, wanted.max_new_tokens, wanted.prompt_temperature, wanted.top_p).cpu()
        rows: list[list[int]] = (ids if self._openings is None else torch.cat([beginnings, ids], 1)).tolist()
        return rows

    def _write(self, heads: list[str], temperature: float, end: _End) -> list[_Said]:
        """Continue each head to its end, or as far as is allowed."""
        options: dict[str, Any] = {"stop_strings": [end.string], "tokenizer": self._tokenizer} if end.string else {}
        stops = [*end.tokens, *self._tokenizer.all_special_ids]
        if not heads:
            return []
        inputs = self._tokenizer(heads, add_special_tokens=False, padding=True, return_tensors="pt")
        ids = self._sample(inputs["input_ids"], inputs["attention_mask"], temperature, eos_token_id=stops, **options)
        return [self._said(row, end) for row in ids.tolist()]

    @torch.no_grad()
    def _sample(self, heads: Tensor, mask: Tensor, temperature: float, **stopping: Any) -> Tensor:
        """Token ids that the model puts behind each head; without `stopping` all that are allowed."""
        ids: Tensor = self._model.generate(
            input_ids=heads.to(self._model.device),
            attention_mask=mask.to(self._model.device),
            max_new_tokens=self._writing.max_new_tokens,
            do_sample=True,
            temperature=temperature,
            top_p=self._writing.top_p,
            top_k=0,
            repetition_penalty=1.0,
            pad_token_id=self._tokenizer.pad_token_id,
            use_cache=True,
            **({"eos_token_id": None} | stopping),
        )
        return ids[:, heads.shape[1] :].cpu()

    def _said(self, ids: list[int], end: _End) -> _Said:
        # Any other special token is out of turn: another's words, or the padding behind an end.
        stops = {*end.tokens, *self._tokenizer.all_special_ids}
        length = next((place for place, token in enumerate(ids) if token in stops), len(ids))
        text, ended, _ = self._tokenizer.decode(ids[:length]).partition(end.string or MARK)
        finished = bool(ended) or ids[length : length + 1] in [[token] for token in end.tokens]
        fault = _fault(text, self._ids(text))
        if fault != "empty" and length < len(ids) and not finished:
            fault = "out of turn"
        return _Said(text, finished, fault)

    def _end(self, string: str) -> _End:
        """The model's own end tokens, and the template's, if it is one token, else as a string."""
        configured = self._model.generation_config.eos_token_id
        tokens = {self._tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
        string = string.strip() or string
        first = self._ids(string)[:1]
        if first and first[0] in self._tokenizer.added_tokens_decoder:
            tokens.add(first[0])
            string = ""
        return _End(sorted(tokens - {None}), string or None)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _render(self, messages: list[dict[str, str]]) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _template(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """What a chat template puts in front of a user's words, behind them, and behind an answer."""
    asked = [{"role": "user", "content": MARK}]
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    opening, found, user_end = str(tokenizer.apply_chat_template(asked, tokenize=False)).partition(MARK)
    _, answered, answer_end = str(tokenizer.apply_chat_template(said, tokenize=False)).partition(MARK)
    if not (found and answered):
        raise UserError("the chat template does not hand on what user and assistant say; give a text with --text")
    return opening, user_end, answer_end


def _beginning(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that begins a document: of its own, or the one that ends the document before."""
    begin = tokenizer.bos_token or tokenizer.eos_token
    if begin is None:
        raise UserError("the tokenizer has no token that begins a text; give a text with --text")
    return str(begin)
