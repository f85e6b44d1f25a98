"""MT-Bench and Arena-Hard as tasks: the models write, a judge rates."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from ffn_fusion.errors import UserError
from ffn_fusion.tasks.benchmark import About, Items, Setting
from ffn_fusion.tasks.data import SETS, set_folder
from ffn_fusion.tasks.judge import Judge
from ffn_fusion.tasks.judged import Question, compare_arena, load_arena_hard, load_mt_bench, rate_mt_bench
from ffn_fusion.tasks.scorer import Conversation, Scorer

ANSWER_TOKENS = 1024
MT_BENCH, ARENA_HARD = "lmsys/mt_bench", "lmarena/arena_hard_v2"


class Judged(ABC):
    """What both have in common: greedy answers to questions of one or more turns, and the judge."""

    name: str
    dataset: str
    compares: bool
    rule: str
    """What the judge's verdicts come to, in a few words."""

    def __init__(self, setting: Setting, judge: Judge) -> None:
        questions = self.load(question_folder(self.dataset))
        self._setting, self._judge = setting, judge
        self._questions = questions[: setting.limit]
        self.about = About(
            "1",
            f"{SETS[self.dataset].package.requirement} ({self.dataset})",
            len(self._questions),
            len(questions),
            chat_template=setting.chat,
            note=f"judge {judge.model}; {self.rule}",
        )
        self.key = hashlib.sha256(repr((self.name, judge.model, setting.chat, self._questions)).encode()).hexdigest()

    @staticmethod
    @abstractmethod
    def load(folder: Path) -> list[Question]:
        """The questions in a fetched folder."""

    @abstractmethod
    def run(self, lm: Scorer, parent: Scorer) -> Items: ...

    def texts(self) -> list[str]:
        return ["\n".join(question.turns) for question in self._questions]

    def _answers(self, lm: Scorer) -> list[tuple[str, ...]]:
        """Greedy answers, turn by turn; each turn sees what was said before."""
        conversations: list[Conversation] = [[] for _ in self._questions]
        for turn in range(max(len(question.turns) for question in self._questions)):
            asked = [i for i, question in enumerate(self._questions) if turn < len(question.turns)]
            for i in asked:
                conversations[i].append({"role": "user", "content": self._questions[i].turns[turn]})
            written = lm.generate([self._setting.prompt(conversations[i]) for i in asked], ANSWER_TOKENS)
            for i, answer in zip(asked, written, strict=True):
                conversations[i].append({"role": "assistant", "content": answer})
        return [tuple(turn["content"] for turn in said if turn["role"] == "assistant") for said in conversations]


class MtBench(Judged):
    """MT-Bench (Zheng et al., arXiv 2306.05685)."""

    name, dataset, compares = "mt_bench", MT_BENCH, False
    rule = "each of two turns rated 1 to 10"
    load = staticmethod(load_mt_bench)

    def run(self, lm: Scorer, parent: Scorer) -> Items:
        answers = self._answers(lm)
        ratings = rate_mt_bench(self._questions, answers, self._judge)
        return Items({"rating": ratings}, {"rating": True}, _flat(answers))


class ArenaHard(Judged):
    """Arena-Hard (Li et al., arXiv 2406.11939) with the parent's answers as the baseline."""

    name, dataset, compares = "arena_hard", ARENA_HARD, True
    rule = "share of wins over the parent, which has 0.5 by definition"
    load = staticmethod(load_arena_hard)

    def __init__(self, setting: Setting, judge: Judge) -> None:
        super().__init__(setting, judge)
        self._baseline: list[tuple[str, ...]] = []

    def run(self, lm: Scorer, parent: Scorer) -> Items:
        self._baseline = self._baseline or self._answers(parent)
        answers = self._baseline if lm is parent else self._answers(lm)
        wins: list[float | None] = [0.5] * len(answers)
        if lm is not parent:
            wins = compare_arena(self._questions, self._baseline, answers, self._judge)
        return Items({"wins over parent": wins}, {"wins over parent": True}, _flat(answers))


def question_folder(dataset: str) -> Path:
    """The fetched questions and prompts of a judged benchmark."""
    folder = set_folder(dataset) / "default"
    if not folder.is_dir():
        raise UserError(f"{dataset} is not here; run once: ffn-fusion eval --fetch-data")
    return folder


def _flat(answers: Sequence[Sequence[str]]) -> list[str]:
    return [answer for said in answers for answer in said]
