"""Long-context tasks made here, at any length: needles in a haystack and variable tracking.

After RULER (Hsieh et al., arXiv 2404.06654): the same kinds of question, with our own wording and haystack.
"""

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from ffn_fusion.errors import UserError
from ffn_fusion.hf.builtin import builtin_text
from ffn_fusion.tasks.benchmark import About, Items, Setting
from ffn_fusion.tasks.scorer import Scorer

HAYSTACK = "wikipedia"
NUM_ITEMS = 50
ANSWER_TOKENS = 64
CHAIN = 4
THINGS = (
    *("apple", "bridge", "candle", "desert", "engine", "falcon", "garden", "harbor", "island", "jacket"),
    *("kettle", "lantern", "meadow", "needle", "orchard", "pepper", "quarry", "ribbon", "saddle", "temple"),
)


@dataclass(frozen=True)
class Question:
    """What is hidden in the text, what is asked about it, and what the answer must hold."""

    hidden: list[str]
    asked: str
    expected: list[str]


def _needle(rng: random.Random, keys: int) -> Question:
    names, numbers = rng.sample(THINGS, keys), [str(rng.randrange(10**6, 10**7)) for _ in range(keys)]
    hidden = [f"The secret number of the {name} is {number}." for name, number in zip(names, numbers, strict=True)]
    rng.shuffle(hidden)  # or the number asked for would be the first in every text
    return Question(hidden, f"What is the secret number of the {names[0]}?", numbers[:1])


def _chain(rng: random.Random) -> Question:
    names = ["".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=5)) for _ in range(CHAIN)]
    value = str(rng.randrange(10**4, 10**5))
    hidden = [f"Variable {names[0]} has the value {value}."]
    hidden += [f"Variable {name} has the same value as {before}." for before, name in pairwise(names)]
    return Question(hidden, f"Which {CHAIN} variables have the value {value}?", names)


KINDS: dict[str, Callable[[random.Random], Question]] = {
    "niah_single": lambda rng: _needle(rng, 1),
    "niah_multikey": lambda rng: _needle(rng, 4),
    "vt": _chain,
}


class LongContext:
    """`kind` at `length` tokens, the prompt and the answer included; items differ in text, secret and depth."""

    compares = False

    def __init__(self, kind: str, length: int, setting: Setting) -> None:
        self.name = f"{kind}@{length}"
        self._length, self._setting = length, setting
        total = max(NUM_ITEMS, setting.limit or 0)
        rng = random.Random(0)
        sentences = _sentences(setting.tokenizer)
        self._questions = [KINDS[kind](rng) for _ in range(setting.limit or total)]
        self._prompts = [self._prompt(question, sentences, rng) for question in self._questions]
        self.about = About(
            "1",
            f"builtin:{HAYSTACK} with hidden sentences, seed 0",
            len(self._prompts),
            total,
            chat_template=setting.chat,
        )
        self.key = hashlib.sha256(repr((self.name, self._prompts)).encode()).hexdigest()

    def texts(self) -> list[str]:
        return ["\n".join(question.hidden) for question in self._questions]

    def run(self, lm: Scorer, parent: Scorer) -> Items:
        if lm.max_length < self._length:
            raise UserError(f"the model takes {lm.max_length:,} tokens at most")
        answers = lm.generate(self._prompts, ANSWER_TOKENS, () if self._setting.chat else ("\n\n",))
        found: list[float | None] = [
            sum(word in answer for word in question.expected) / len(question.expected)
            for question, answer in zip(self._questions, answers, strict=True)
        ]
        return Items({"recall": found}, {"recall": True}, answers)

    def _prompt(self, question: Question, sentences: list[tuple[str, int]], rng: random.Random) -> str:
        def written(lines: list[str]) -> str:
            task = "Some facts are hidden in the text below. Remember them.\n\n" + " ".join(lines)
            return self._setting.prompt(
                [{"role": "user", "content": f"{task}\n\n{question.asked} Answer with the facts alone."}]
            )

        room = self._length - ANSWER_TOKENS - _count(self._setting.tokenizer, written(question.hidden))
        if room <= 0:
            raise UserError(f"{self.name} is too short to hold its question")
        start = rng.randrange(len(sentences))
        lines: list[str] = []
        while room > 0:
            sentence, count = sentences[(start + len(lines)) % len(sentences)]
            # A token more for the space before it.
            room -= count + 1
            lines.append(sentence)
        places = sorted(rng.randrange(len(lines)) for _ in question.hidden)
        for offset, (place, hidden) in enumerate(zip(places, question.hidden, strict=True)):
            lines.insert(place + offset, hidden)
        while _count(self._setting.tokenizer, written(lines)) > self._length - ANSWER_TOKENS:
            lines.remove(next(line for line in reversed(lines) if line not in question.hidden))
        return written(lines)


def _count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, verbose=False)["input_ids"])


def _sentences(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, int]]:
    """Sentences of the haystack with their numbers of tokens."""
    text = [s for document in builtin_text(HAYSTACK) for s in re.split(r"(?<=[.!?]) +", " ".join(document.split()))]
    counts = [len(ids) for ids in tokenizer(text, verbose=False)["input_ids"]]
    return list(zip(text, counts, strict=True))
