"""Questions that many models answer: a smooth score of a task, for searches."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import cattrs
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ffn_fusion.core.answers import Answers, loss_of
from ffn_fusion.core.search_records import Asked
from ffn_fusion.core.stats import estimate
from ffn_fusion.errors import UserError
from ffn_fusion.hf.builtin import cache_folder
from ffn_fusion.settings import Judging, Tasks
from ffn_fusion.tasks.harness import HarnessTask
from ffn_fusion.tasks.scorer import Scorer, Tokens
from ffn_fusion.tasks.select import Selection

LIMIT = 100
"""Questions of each task, unless told otherwise: hundreds of models answer them."""


class Quiz:
    """Tasks whose answers are offered, put together: call it with a model.

    `inputs` is what a stage's inputs say of it, from which `again` makes it anew.
    """

    def __init__(self, tasks: Tasks, tokenizer: PreTrainedTokenizerBase) -> None:
        asked = replace(tasks, limit=tasks.limit or LIMIT)
        selection = Selection(asked, Judging(), tokenizer, cache_folder() / "judge")
        if selection.unscored:
            missing = selection.unscored[0]
            raise UserError(f"{missing.task} cannot be asked: {missing.reason}")
        parts = [(request.name, part) for request in selection.ready for part in request.parts]
        generating = [name for name, part in parts if not isinstance(part, HarnessTask)]
        if generating:
            raise UserError(f"{generating[0]} has models write; a search needs tasks that offer answers, as arc_easy")
        self._tasks = [part for _, part in parts if isinstance(part, HarnessTask)]
        self._names = [request.name for request in selection.ready]
        self._offers = [offer for task in self._tasks for offer in task.offers()]
        self._tokenizer = tokenizer
        self._tokens: Tokens = {}
        key = hashlib.sha256(json.dumps([task.key for task in self._tasks]).encode()).hexdigest()[:16]
        self.inputs: dict[str, Any] = {"tasks": asdict(tasks), "questions": key}

    @classmethod
    def again(cls, inputs: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> "Quiz":
        """The same questions once more; `UserError` if the tasks hold others now."""
        quiz = cls(cattrs.structure(inputs["tasks"], Tasks), tokenizer)
        if quiz.inputs["questions"] != inputs["questions"]:
            raise UserError(f"the questions of {', '.join(quiz._names)} have changed since the scores; score again")
        return quiz

    def __call__(self, model: PreTrainedModel) -> Answers:
        """What a model answers."""
        scorer = Scorer(model, self._tokenizer, self._tokens)
        requests = [request for offer in self._offers for request in offer.requests]
        found = iter(scorer.answer("loglikelihood", requests, quiet=True))
        loss, right = [], []
        for offer in self._offers:
            answers = [next(found) for _ in offer.requests]
            scores = [value / length for (value, _), length in zip(answers, offer.lengths, strict=True)]
            loss.append(loss_of(scores, offer.right))
            # A single answer is right where it would be written.
            likeliest = scores.index(max(scores)) in offer.right
            right.append(float(likeliest if len(scores) > 1 else answers[0][1]))
        return Answers(loss, right)

    def asked(self, parent: Answers) -> Asked:
        """The questions in words, and what the parent makes of them."""
        once = [1] * len(self._offers)
        data = "; ".join(dict.fromkeys(task.about.data for task in self._tasks))
        return Asked(self._names, len(once), data, estimate(parent.loss, once), estimate(parent.right, once))
