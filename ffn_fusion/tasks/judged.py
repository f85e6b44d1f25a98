"""MT-Bench (Zheng et al. 2023, arXiv:2306.05685) and Arena-Hard (Li et al. 2024, arXiv:2406.11939): answers to values.

Questions and the judge's prompts are data, read from a folder; here is which prompt goes with which question, what a
verdict looks like in a reply, and what it is worth.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from ffn_fusion.errors import UserError
from ffn_fusion.tasks.judge import Form, Judge

Answers = Sequence[Sequence[str]]
"""A model's answers to each question, one a turn."""

WITH_REFERENCE = ("math", "reasoning", "coding")
MT_PROMPTS = {
    "single-v1": {"question", "answer"},
    "single-v1-multi-turn": {"question_1", "answer_1", "question_2", "answer_2"},
    "single-math-v1": {"question", "answer", "ref_answer_1"},
    "single-math-v1-multi-turn": {"question_1", "answer_1", "question_2", "answer_2", "ref_answer_1", "ref_answer_2"},
}
"""The judge's prompts and their fields: first and second turn, without and with a reference."""
ARENA_FIELDS = {"QUESTION", "ANSWER_A", "ANSWER_B"}
GAMES = {"A>>B": (3.0, 3), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, 3)}
"""Wins of A and games: a significant win counts as three, as in Arena-Hard's own tables."""
RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
LABELS = (re.compile(r"\[\[([AB](?:>>?|<<?|=)[AB])\]\]"), re.compile(r"\[([AB](?:>>?|<<?|=)[AB])\]"))


@dataclass(frozen=True)
class JudgePrompt:
    """What the judge is told, with fields in braces for questions and answers."""

    system: str
    template: str

    def fill(self, fields: dict[str, str]) -> list[dict[str, str]]:
        """The chat to send; fields that the template has not are left out."""
        user = self.template.format(**fields)
        return [{"role": "system", "content": self.system}, {"role": "user", "content": user}]


@dataclass(frozen=True)
class Question:
    """A conversation to answer: what the user says, turn by turn, and what the judge is told about each answer."""

    id: str
    category: str
    turns: tuple[str, ...]
    prompts: tuple[JudgePrompt, ...]
    references: tuple[str, ...] = ()


def load_mt_bench(folder: Path) -> list[Question]:
    """Questions of two turns from `question.jsonl`, `judge_prompts.jsonl` and `reference.jsonl`, as FastChat has them.

    Raises `UserError` if a file is missing or not of this form, or a question that needs a reference has none.
    """
    with _reading(folder / "judge_prompts.jsonl") as path:
        rows = {row["name"]: row for row in _rows(path)}
        prompts = [_prompt(rows[n]["system_prompt"], rows[n]["prompt_template"], MT_PROMPTS[n]) for n in MT_PROMPTS]
    with _reading(folder / "reference.jsonl") as path:
        references = {row["question_id"]: tuple(row["choices"][0]["turns"]) for row in _rows(path)}
    questions = []
    with _reading(folder / "question.jsonl") as path:
        for row in _rows(path):
            first, second = row["turns"]
            needs = row["category"] in WITH_REFERENCE
            found = references.get(row["question_id"], ()) if needs else ()
            if needs and len(found) != 2:
                raise ValueError(f"no reference answers to question {row['question_id']} ({row['category']})")
            pair = prompts[2:] if needs else prompts[:2]
            questions.append(Question(str(row["question_id"]), row["category"], (first, second), tuple(pair), found))
    return questions


def load_arena_hard(folder: Path) -> list[Question]:
    """Questions of one turn from `question.jsonl`, and the prompts of `judge_prompts.json` (or .jsonl, of one row).

    That row has "template", "hard_prompt" and "creative_writing": the user's message and the two system prompts.
    Raises `UserError` if a file is missing or not of this form.
    """
    name = "judge_prompts.json"
    with _reading(folder / (name if (folder / name).is_file() else f"{name}l")) as path:
        row = json.loads(path.read_text(encoding="utf-8"))
        hard, creative = (
            _prompt(row[key], row["template"], ARENA_FIELDS) for key in ("hard_prompt", "creative_writing")
        )
    with _reading(folder / "question.jsonl") as path:
        return [
            Question(
                q["uid"], q["category"], (q["prompt"],), (creative if q["category"] == "creative_writing" else hard,)
            )
            for q in _rows(path)
        ]


def rate_mt_bench(questions: Sequence[Question], answers: Answers, judge: Judge) -> list[float | None]:
    """A rating from 1 to 10 of every answer by itself: turns 1 and 2 of the first question, then of the second, …

    None where the judge gave none. Raises what `Judge.ask_all` raises.
    """
    chats = []
    for question, replies in zip(questions, answers, strict=True):
        fields = {"question": question.turns[0], "answer": replies[0]}
        for name, texts in (("question", question.turns), ("answer", replies), ("ref_answer", question.references)):
            fields |= {f"{name}_{turn}": text for turn, text in enumerate(texts, start=1)}
        chats += [prompt.fill(fields) for prompt in question.prompts]
    return judge.ask_all(chats, RATING, "mt_bench: answers rated")


def compare_arena(
    questions: Sequence[Question], baseline: Answers, answers: Answers, judge: Judge
) -> list[float | None]:
    """The share of wins over the baseline, in [0, 1], for each question; the baseline against itself has 0.5.

    Two games a question, the baseline's answer first and second, so that a liking for a place cancels out. None where
    neither game has a verdict. Raises what `Judge.ask_all` raises.
    """
    chats = []
    for question, (before,), (after,) in zip(questions, baseline, answers, strict=True):
        for first, second in ((before, after), (after, before)):
            fields = {"QUESTION": question.turns[0], "ANSWER_A": first, "ANSWER_B": second}
            chats.append(question.prompts[0].fill(fields))
    labels = judge.ask_all(chats, LABEL, "arena_hard: games judged")
    return [_share(second, first) for first, second in zip(labels[::2], labels[1::2], strict=True)]


def _share(own: str | None, swapped: str | None) -> float | None:
    """Wins over games of the model that is A in the first game and B in the second."""
    played = [GAMES[own]] if own else []
    if swapped:
        wins, games = GAMES[swapped]
        played.append((games - wins, games))
    return sum(wins for wins, _ in played) / sum(games for _, games in played) if played else None


def read_rating(reply: str) -> float | None:
    """The first [[rating]], or else [rating], if it lies in 1..10."""
    for pattern in RATINGS:
        if found := pattern.search(reply):
            rating = float(found[1])
            return rating if 1 <= rating <= 10 else None
    return None


def read_label(reply: str) -> str | None:
    """The last [[label]], or else [label], as a key of `GAMES`; a judge may have named labels before it settled."""
    for pattern in LABELS:
        if found := pattern.findall(reply.upper()):
            # [[A<B]] is [[B>A]] read from the other side.
            label = found[-1] if found[-1] in GAMES else found[-1][::-1].replace("<", ">")
            return label if label in GAMES else None
    return None


RATING = Form(read_rating, 'Close with the rating itself, a number from 1 to 10, like this: "Rating: [[5]]".')
LABEL = Form(read_label, "Close with one of these labels: [[A>>B]], [[A>B]], [[A=B]], [[B>A]], [[B>>A]].")


def _prompt(system: str, template: str, fields: set[str]) -> JudgePrompt:
    found = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    if found != fields:
        raise ValueError(f"expected a template with {sorted(fields)}, found {sorted(found)}")
    return JudgePrompt(system, template)


def _rows(path: Path) -> list[dict[str, Any]]:
    # Not splitlines(): JSON strings may hold the other line separators of Unicode.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    try:
        yield path
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} has not the expected form: {type(error).__name__}: {error}") from None
