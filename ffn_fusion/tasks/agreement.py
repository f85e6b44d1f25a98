"""How far a student writes what its parent would, where no judge is at hand. It measures likeness, not quality."""

import hashlib

from ffn_fusion.tasks.benchmark import About, Items, Setting
from ffn_fusion.tasks.chat import MT_BENCH, question_folder
from ffn_fusion.tasks.data import SETS
from ffn_fusion.tasks.judged import load_mt_bench
from ffn_fusion.tasks.scorer import Scorer

ANSWER_TOKENS = 128


class Agreement:
    """Greedy answers to the first questions of MT-Bench, student against parent.

    "matching tokens" counts the tokens of the student's answer before it first departs from the parent's;
    "parent's log-probability" is what the parent gives a token of the student's answer on average, in nats.
    """

    name = "agreement"
    compares = True

    def __init__(self, setting: Setting) -> None:
        questions = load_mt_bench(question_folder(MT_BENCH))
        self._tokenizer = setting.tokenizer
        self._prompts = [setting.prompt([{"role": "user", "content": q.turns[0]}]) for q in questions[: setting.limit]]
        self._written: list[str] = []
        self.about = About(
            "1",
            f"{SETS[MT_BENCH].package.requirement} ({MT_BENCH}, first turns)",
            len(self._prompts),
            len(questions),
            chat_template=setting.chat,
            note=f"likeness to the parent in greedy answers of up to {ANSWER_TOKENS} tokens, not quality",
        )
        self.key = hashlib.sha256(repr((self.name, self._prompts)).encode()).hexdigest()

    def texts(self) -> list[str]:
        return self._prompts

    def run(self, lm: Scorer, parent: Scorer) -> Items:
        self._written = self._written or parent.generate(self._prompts, ANSWER_TOKENS)
        answers = self._written if lm is parent else lm.generate(self._prompts, ANSWER_TOKENS)
        # An empty answer has nothing to be scored.
        scored = [i for i, answer in enumerate(answers) if answer.strip()]
        sums = parent.log_probability([self._prompts[i] for i in scored], [answers[i] for i in scored])
        likely: list[float | None] = [None] * len(answers)
        for i, total in zip(scored, sums, strict=True):
            likely[i] = total / len(self._ids(answers[i]))
        matching: list[float | None] = [
            float(_common_prefix(self._ids(own), self._ids(other)))
            for own, other in zip(answers, self._written, strict=True)
        ]
        values = {"matching tokens": matching, "parent's log-probability": likely}
        return Items(values, dict.fromkeys(values, True), answers)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _common_prefix(own: list[int], other: list[int]) -> int:
    for place, (a, b) in enumerate(zip(own, other, strict=False)):
        if a != b:
            return place
    return min(len(own), len(other))
