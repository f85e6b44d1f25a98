"""What a user asks for after --tasks → tasks that are ready to run, and reasons for those that are not."""

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import datasets
from transformers import PreTrainedTokenizerBase

from ffn_fusion.core.records import Unscored
from ffn_fusion.errors import UserError
from ffn_fusion.settings import Judging, Tasks
from ffn_fusion.tasks.agreement import Agreement
from ffn_fusion.tasks.benchmark import Benchmark, Setting
from ffn_fusion.tasks.catalog import QUICK_LIMIT, TASK_SETS, Catalog
from ffn_fusion.tasks.chat import ArenaHard, Judged, MtBench
from ffn_fusion.tasks.harness import CHAT, HarnessTask
from ffn_fusion.tasks.judge import Judge
from ffn_fusion.tasks.longcontext import KINDS, LongContext

JUDGED: tuple[type[Judged], ...] = (MtBench, ArenaHard)
OWN = (*(judged.name for judged in JUDGED), Agreement.name, *(f"{kind}@4096" for kind in KINDS))


@dataclass(frozen=True)
class Request:
    """A task as it was named, and its parts: the subjects of a group, else itself."""

    name: str
    parts: list[Benchmark]


class Selection:
    """Every task asked for, made `ready`, or the reason why it is not. Unknown names are refused at once."""

    def __init__(self, tasks: Tasks, judging: Judging, tokenizer: PreTrainedTokenizerBase, cache: Path) -> None:
        datasets.disable_progress_bars()
        self.ready: list[Request] = []
        self.unscored: list[Unscored] = []
        self._tasks, self._judging, self._tokenizer, self._cache = tasks, judging, tokenizer, cache
        self._catalog = Catalog(_files(tasks.data), tasks.num_fewshot)
        names = _names(tasks.tasks)
        for name in names:
            if not _long_context(name):
                self._catalog.check(name, OWN)
        for name, limit in names.items():
            try:
                self.ready.append(Request(name, self._parts(name, tasks.limit or limit)))
            except UserError as error:
                self.unscored.append(Unscored(name, str(error)))
        if self._catalog.unused:
            unused = ", ".join(sorted(self._catalog.unused))
            raise UserError(f"--data names {unused}, which is none of the harness' tasks that were asked for")

    @cached_property
    def _judge(self) -> Judge:
        if self._judging.judge is None:
            raise UserError(
                "it needs a judge: --judge URL of an OpenAI-style endpoint; "
                "without one, the task agreement measures likeness to the parent"
            )
        judge = Judge(
            self._judging.judge,
            self._cache / "replies.jsonl",
            name=self._judging.judge_model,
            key=os.environ.get(self._judging.judge_key, ""),
            timeout=self._judging.judge_timeout,
        )
        judge.check()
        return judge

    def _parts(self, name: str, limit: int | None) -> list[Benchmark]:
        if long := _long_context(name):
            return [LongContext(long[1], int(long[2]), self._setting(True, limit))]
        if name == Agreement.name:
            return [Agreement(self._setting(True, limit))]
        for judged in JUDGED:
            if name == judged.name:
                return [judged(self._setting(True, limit), self._judge)]
        leaves = self._catalog.leaves(name)
        # A limit is meant for the whole of a group.
        share = -(-limit // len(leaves)) if limit else None
        return [HarnessTask(self._catalog, leaf, self._setting(leaf.name in CHAT, share)) for leaf in leaves]

    def _setting(self, usual_chat: bool, limit: int | None) -> Setting:
        wanted = usual_chat if self._tasks.chat == "auto" else self._tasks.chat == "always"
        if self._tasks.chat == "always" and not self._tokenizer.chat_template:
            raise UserError("the model has no chat template")
        return Setting(self._tokenizer, wanted and bool(self._tokenizer.chat_template), limit)


def _names(listed: tuple[str, ...]) -> dict[str, int | None]:
    """Each task once, with the limit that its set sets."""
    names: dict[str, int | None] = {}
    for name in (part.strip() for entry in listed for part in entry.split(",")):
        for task in TASK_SETS.get(name, (name,) if name else ()):
            names.setdefault(task, QUICK_LIMIT if name == "quick" else None)
    return names


def _files(listed: tuple[str, ...]) -> dict[str, Path]:
    files = {}
    for entry in listed:
        task, separator, path = entry.partition("=")
        if not separator:
            raise UserError(f"--data {entry}: write TASK=FILE")
        if not Path(path).expanduser().exists():
            raise UserError(f"--data {entry}: {path} does not exist")
        files[task] = Path(path).expanduser()
    return files


def _long_context(name: str) -> re.Match[str] | None:
    return re.fullmatch(rf"({'|'.join(KINDS)})@(\d+)", name)
