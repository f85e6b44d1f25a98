"""Running tasks on models: each value measured once and kept, then parent and students set side by side."""

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import cattrs
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ffn_fusion.core.records import TaskMetric, TaskResult, TaskScore, Unscored
from ffn_fusion.core.stats import Estimate, estimate, paired
from ffn_fusion.errors import UserError
from ffn_fusion.folder import UNKNOWN, write_atomically
from ffn_fusion.hf.builtin import cache_folder
from ffn_fusion.hf.text import documents
from ffn_fusion.settings import Judging, Tasks
from ffn_fusion.tasks.benchmark import Benchmark, Items
from ffn_fusion.tasks.overlap import overlapping
from ffn_fusion.tasks.scorer import Scorer, Tokens
from ffn_fusion.tasks.select import Request, Selection

NONE = Estimate(float("nan"), float("inf"), float("-inf"), float("inf"), 0)


class Board:
    """Items by model and task. `cache` outlives the stage: what a model made of a task is measured once, ever.

    Models are added one by one, the parent first, which stays; a task that fails is given up for all models.
    """

    def __init__(self, selection: Selection, tokenizer: PreTrainedTokenizerBase, cache: Path) -> None:
        self.unscored = list(selection.unscored)
        self.asked: dict[str, list[str] | str] = {task.task: UNKNOWN for task in selection.unscored}
        self.asked |= {request.name: [part.key for part in request.parts] for request in selection.ready}
        self._requests = list(selection.ready)
        self._tokenizer = tokenizer
        self._tokens: Tokens = {}
        self._cache = cache
        self._models: list[str] = []
        self._items: dict[tuple[str, str], list[Items]] = {}
        self._parent: tuple[str, Scorer] | None = None

    def add(self, name: str, fingerprint: str, model: PreTrainedModel) -> None:
        """Score a model on every task."""
        own = f"{fingerprint} {model.dtype}"
        scorer = Scorer(model, self._tokenizer, self._tokens)
        self._parent = self._parent or (own, scorer)
        self._models.append(name)
        for request in list(self._requests):
            start = time.monotonic()
            try:
                self._items[name, request.name] = [self._measured(part, own, scorer) for part in request.parts]
                outcome = f"{time.monotonic() - start:.0f} s"
            except (UserError, torch.OutOfMemoryError) as error:
                reason = str(error) if isinstance(error, UserError) else "the GPU has too little memory for it"
                self._requests.remove(request)
                self.unscored.append(Unscored(request.name, reason))
                outcome = f"not scored: {reason}"
            print(f"eval: {name[-40:]}: {request.name}: {outcome}", file=sys.stderr)

    def results(self, fitted_on: Sequence[str], column: str) -> list[TaskResult]:
        """Every task that was scored, its items looked for in the texts named."""
        sources = set(fitted_on)
        unread: set[str] = set()
        overlap = None
        if sources:
            texts = {request.name: [t for part in request.parts for t in part.texts()] for request in self._requests}
            found = overlapping(texts, _documents(sources, column, unread))
            overlap = found if sources - unread else None
        return [self._result(request, overlap) for request in self._requests]

    def lines(self) -> Iterator[str]:
        """Every item's values and generated text as JSON lines, one for each model and part of a task."""
        for (model, name), items in self._items.items():
            for request in self._requests:
                if request.name == name:
                    for part, own in zip(request.parts, items, strict=True):
                        yield json.dumps({"model": model, "task": part.name} | asdict(own)) + "\n"

    def _result(self, request: Request, overlap: dict[str, int] | None) -> TaskResult:
        abouts = [part.about for part in request.parts]
        pooled = {model: _pooled(self._items[model, request.name]) for model in self._models}
        parent = pooled[self._models[0]]
        metrics = []
        for metric, before in parent.values.items():
            scores = [_score(name, before, own.values[metric], own is parent) for name, own in pooled.items()]
            metrics.append(TaskMetric(metric, parent.higher_is_better[metric], scores))
        missed = sum(value is None for items in pooled.values() for value in next(iter(items.values.values())))
        notes = [about.note for about in abouts] + ([f"{missed} items without a value"] if missed else [])
        return TaskResult(
            task=request.name,
            version=_joined(about.version for about in abouts),
            data=_joined(about.data for about in abouts),
            num_items=sum(about.num_items for about in abouts),
            total_items=sum(about.total_items for about in abouts),
            num_fewshot=max(about.num_fewshot for about in abouts),
            chat_template=any(about.chat_template for about in abouts),
            metrics=metrics,
            overlap=overlap[request.name] if overlap is not None else None,
            note=_joined(note for note in notes if note),
        )

    def _measured(self, part: Benchmark, own: str, scorer: Scorer) -> Items:
        assert self._parent
        parent, parent_scorer = self._parent
        depends = [part.key, own, parent if part.compares else "", torch.__version__]
        path = self._cache / f"{hashlib.sha256(json.dumps(depends).encode()).hexdigest()}.json"
        if path.is_file():
            return cattrs.structure(json.loads(path.read_text(encoding="utf-8")), Items)
        items = part.run(scorer, parent_scorer)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(items)))
        return items


def open_board(tasks: Tasks, judging: Judging, tokenizer: PreTrainedTokenizerBase) -> Board:
    """The tasks asked for, ready to run; `UserError` for names that do not exist."""
    cache = cache_folder()
    return Board(Selection(tasks, judging, tokenizer, cache / "judge"), tokenizer, cache / "scores")


def _documents(sources: set[str], column: str, unread: set[str]) -> Iterator[str]:
    for source in sorted(sources):
        try:
            yield from documents(source, column)
        except UserError as error:
            unread.add(source)
            print(f"eval: not looked for items in {source}: {error}", file=sys.stderr)


def _pooled(parts: list[Items]) -> Items:
    """The items of all parts as one list, for the metrics that all parts have."""
    shared = [metric for metric in parts[0].values if all(metric in part.values for part in parts)]
    values = {metric: [value for part in parts for value in part.values[metric]] for metric in shared}
    return Items(values, parts[0].higher_is_better)


def _score(model: str, parent: list[float | None], own: list[float | None], is_parent: bool) -> TaskScore:
    known = [value for value in own if value is not None]
    value = estimate(known, [1] * len(known)) if known else NONE
    pairs = [(before, after) for before, after in zip(parent, own, strict=True) if None not in (before, after)]
    if is_parent or not pairs:
        return TaskScore(model, value, None, None)
    before, after = zip(*pairs, strict=True)
    # A share of what is no score, as a log-likelihood, says nothing.
    share = sum(after) / sum(before) if min(before) >= 0 and sum(before) > 0 else None
    return TaskScore(model, value, paired(before, after), share)


def _joined(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))
