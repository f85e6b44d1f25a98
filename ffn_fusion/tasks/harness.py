"""Tasks of lm-evaluation-harness: its prompts, requests, filters and metrics, item by item.

The loop over them is ours, so that requests are built once for all models and values stay by item.
"""

import contextlib
import functools
import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import lm_eval.utils

from ffn_fusion.errors import UserError
from ffn_fusion.tasks.benchmark import About, Items, Setting
from ffn_fusion.tasks.catalog import Catalog, Leaf
from ffn_fusion.tasks.scorer import Scorer, chat_prompt

# The harness compiles its templates anew for every document: nine tenths of the time that building requests takes.
lm_eval.utils.env.from_string = functools.cache(lm_eval.utils.env.from_string)

SEED = 1234
"""The harness' own seed for drawing examples."""
CHAT = ("ifeval", "humaneval_instruct")
"""Tasks that are put to a chat model as a chat unless told otherwise."""
FIRST = ("acc_norm", "acc", "exact_match, flexible-extract", "exact_match", "pass@1", "prompt_level_strict_acc")
"""Metrics by which a task is customarily known, in order of preference."""
MEANS = {"mean": "", "agg_inst_level_acc": "", "perplexity": ", log-likelihood"}
"""Aggregations that are a mean over items, or become one: what is then added to the metric's name."""

NEVER = -1e9
"""Log-likelihood of an answer that is not to be chosen."""


@dataclass(frozen=True)
class Offer:
    """A question with the answers that it offers: a request for each, what divides its log-likelihood, and which of
    them are right."""

    requests: list[Any]
    lengths: list[float]
    right: set[int]


class HarnessTask:
    """One task of the harness."""

    compares = False

    def __init__(self, catalog: Catalog, leaf: Leaf, setting: Setting) -> None:
        self.name = leaf.name
        self._task = _load(catalog, leaf)
        self._limit = setting.limit
        self._task.set_fewshot_seed(seed=SEED)
        # The harness draws a bar for it, whatever the terminal.
        with contextlib.redirect_stderr(io.StringIO()):
            self._task.build_all_requests(
                limit=setting.limit,
                apply_chat_template=setting.chat,
                fewshot_as_multiturn=setting.chat,
                chat_template=chat_prompt(setting.tokenizer) if setting.chat else None,
            )
        total = len(self._task.eval_docs)
        self.about = About(
            version=f"{self._task.VERSION} (lm-eval {version('lm-eval')})",
            data=leaf.data,
            num_items=min(setting.limit or total, total),
            total_items=total,
            num_fewshot=self._task.config.num_fewshot,
            chat_template=setting.chat,
            note=leaf.note,
        )
        judged = [leaf.name, self.about.version, self._task.config.filter_list, self._task.config.metric_list]
        # Some filters and metrics are functions or classes.
        digest = hashlib.sha256(json.dumps(judged, default=lambda made: made.__qualname__).encode())
        # The right answers, too, which are in no request.
        for _, document in self._documents():
            digest.update(repr(document).encode())
        for request in self._task.instances:
            digest.update(repr((request.request_type, request.args)).encode())
        self.key = digest.hexdigest()

    def texts(self) -> list[str]:
        return [_text(self._task, document) for _, document in self._documents()]

    def run(self, lm: Scorer, parent: Scorer) -> Items:
        requests = self._task.instances
        responses = _answer(lm, requests)
        self._task.apply_filters()
        by_document = defaultdict(list)
        for request in requests:
            by_document[request.doc_id].append(request)
        filters = list(requests[0].filtered_resps)
        values: dict[str, list[float | None]] = defaultdict(list)
        for document_id, document in self._documents():
            for name in filters:
                answers = [request.filtered_resps[name] for request in by_document[document_id]]
                for metric, value in self._task.process_results(document, answers).items():
                    label = f"{metric}, {name}" if len(filters) > 1 else metric
                    self._add(values, metric, label, value)
        if not values:
            raise UserError(f"none of the metrics of {self.name} is a mean over items")
        order = sorted(values, key=lambda m: FIRST.index(m) if m in FIRST else len(FIRST))
        higher = self._task.higher_is_better()
        better = {label: bool(higher.get(label.partition(",")[0], True)) for label in order}
        better |= {label: True for label in order if label.endswith(MEANS["perplexity"])}
        return Items({label: values[label] for label in order}, better, responses)

    def offers(self) -> list[Offer]:
        """Its questions; `UserError` where the task does not choose by the likelihood of answers that it offers."""
        by_document = defaultdict(list)
        for request in self._task.instances:
            by_document[request.doc_id].append(request)
        return [self._offer(document, by_document[document_id]) for document_id, document in self._documents()]

    def _offer(self, document: dict[str, Any], requests: list[Any]) -> Offer:
        metric = next((name for name in ("acc_norm", "acc") if name in self._task.aggregation()), None)
        if metric is None or any(request.request_type != "loglikelihood" for request in requests):
            raise UserError(f"{self.name} offers no answers to choose from; take tasks such as arc_easy or hellaswag")

        def chosen(best: int) -> float:
            """What the harness makes of a model that is sure of one answer."""
            sure = [(0.0, True) if at == best else (NEVER, False) for at in range(len(requests))]
            return float(self._task.process_results(document, sure)[metric])

        right = {at for at in range(len(requests)) if chosen(at) == 1}
        if not right:
            raise UserError(f"{self.name} holds a question of which no offered answer is right")
        lengths = [1.0] * len(requests)
        if metric == "acc_norm":
            # The harness divides by characters; relative to their mean, nats stay nats.
            sizes = [len(request.args[1].removeprefix(self._task.config.target_delimiter)) for request in requests]
            lengths = [size * len(sizes) / sum(sizes) for size in sizes]
        return Offer(requests, lengths, right)

    def _documents(self) -> Iterator[tuple[int, dict[str, Any]]]:
        documents: Iterator[tuple[int, dict[str, Any]]] = self._task.doc_iterator(limit=self._limit)
        return documents

    def _add(self, values: dict[str, list[float | None]], metric: str, label: str, value: Any) -> None:
        aggregation = getattr(self._task.aggregation().get(metric), "__name__", "")
        if aggregation in MEANS:
            # Several values where an item holds several questions, as the instructions of IFEval.
            values[label + MEANS[aggregation]] += map(float, value if isinstance(value, list) else [value])


def _load(catalog: Catalog, leaf: Leaf) -> Any:
    try:
        return catalog.load(leaf)
    except UserError:
        raise
    except Exception as error:  # the harness and the datasets library raise many types, all about the data
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if leaf.data.startswith("the Hub"):
            raise UserError(f"{leaf.data} did not give its data ({reason}); {leaf.remedy}") from None
        raise UserError(f"{leaf.data} does not fit the task: {reason}{_columns(leaf)}") from None


def _columns(leaf: Leaf) -> str:
    """What a data file holds, for the message that something is missing in it."""
    import datasets

    files = leaf.config["dataset_kwargs"]["data_files"]
    with contextlib.suppress(Exception):
        data = datasets.load_dataset(leaf.config["dataset_path"], data_files=files)
        return f"; its columns are {', '.join(next(iter(data.values())).column_names)}"
    return ""


def _answer(lm: Scorer, requests: list[Any]) -> list[str]:
    """Let the model answer all requests, by kind; returns what it generated."""
    by_kind: dict[str, list[Any]] = defaultdict(list)
    for request in requests:
        # A request keeps the answers of the model before.
        request.resps, request.filtered_resps = [], {}
        by_kind[request.request_type] += [request] * (request.repeats or 1)
    for kind, same in by_kind.items():
        for request, answer in zip(same, lm.answer(kind, same), strict=True):
            request.resps.append(answer)
    written = (request for request in requests if request.request_type == "generate_until")
    return [str(answer) for request in written for answer in request.resps]


def _text(task: Any, document: dict[str, Any]) -> str:
    """Question, choices and answer."""
    parts = [task.doc_to_text(document), task.doc_to_target(document)]
    if task.config.doc_to_choice is not None:
        parts += task.doc_to_choice(document)
    return "\n".join(part for part in parts if isinstance(part, str))
