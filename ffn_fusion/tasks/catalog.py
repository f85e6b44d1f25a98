"""Names of tasks → the harness' configurations, pointed at local data where there is some."""

import difflib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import constants, get_session
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml

from ffn_fusion.errors import UserError
from ffn_fusion.tasks import humaneval, ifeval
from ffn_fusion.tasks.data import SETS, set_folder

Config = dict[str, Any]

TASK_SETS = {
    "quick": ("arc_easy", "hellaswag", "piqa", "winogrande", "lambada_openai"),
    "commonsense": (
        *("hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande"),
        *("boolq", "openbookqa", "lambada_openai"),
    ),
    "paper": ("mmlu", "mmlu_pro", "humaneval", "gsm8k_cot", "ifeval", "mt_bench", "arena_hard"),
}
QUICK_LIMIT = 200
SHOTS = {"cais/mmlu": 5}
"""Examples shown where the harness leaves the number open and the field has settled on one."""
ADAPTED = {
    "humaneval": humaneval.CONFIG,
    "humaneval_instruct": humaneval.CHAT_CONFIG,
    "ifeval": ifeval.CONFIG,
}
"""Tasks whose harness files would reach for the network or run generated code unfenced."""
FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True)
class Leaf:
    """One task of the harness: its configuration, where its data is, and what must be said about it."""

    name: str
    config: Config
    data: str
    note: str = ""
    remedy: str = ""
    """What helps if the data cannot be had."""


class Catalog:
    """The harness' tasks. `files` maps task names to the user's own data; `num_fewshot` goes before a task's own.

    `unused` names the files that no task asked for so far takes.
    """

    def __init__(self, files: dict[str, Path], num_fewshot: int | None = None) -> None:
        self._files, self._num_fewshot = files, num_fewshot
        self.unused = set(files)

    @cached_property
    def _manager(self) -> TaskManager:
        return TaskManager()

    def check(self, name: str, own: tuple[str, ...]) -> None:
        """`UserError` with the nearest names if there is no such task; `own` names those beyond the harness."""
        if name in own or name in self._manager.task_index or Path(name).suffix == ".yaml":
            return
        near = difflib.get_close_matches(name, [*TASK_SETS, *own, *self._manager.all_tasks], 4)
        raise UserError(f"no task {name!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))

    def leaves(self, name: str) -> list[Leaf]:
        """The tasks behind a task's, group's or tag's name, or behind a task file."""
        self.unused.discard(name)
        found = list(self._expand(name, {}))
        self.unused.difference_update(leaf for leaf, _ in found)
        return [
            self._located(leaf, name, config, self._files.get(leaf) or self._files.get(name)) for leaf, config in found
        ]

    def load(self, leaf: Leaf) -> Any:
        """The harness' task object; `KeyError` if local data lacks a column that the task names."""
        task = next(iter(self._manager.load([leaf.config])["tasks"].values()))
        for field in (task.config.doc_to_text, task.config.doc_to_choice, task.config.doc_to_target):
            # The harness would take the name itself for the text or the answer, and count every item as wrong.
            if not leaf.remedy and isinstance(field, str) and field.isidentifier() and field not in task.features:
                raise KeyError(field)
        return task

    def _expand(self, name: str, overrides: Config) -> Iterator[tuple[str, Config]]:
        path = Path(name)
        entry = self._manager.task_index.get(name)
        if entry is None:
            if not path.is_file():
                raise UserError(f"task file {name} does not exist")
            config = _read(path)
            yield config["task"], config
        elif entry.kind is Kind.TAG:
            for child in sorted(entry.tags):
                yield from self._expand(child, overrides)
        elif entry.kind is Kind.GROUP:
            for child in load_yaml(entry.yaml_path)["task"]:
                yield from self._child(child, overrides)
        else:
            config = load_yaml(entry.yaml_path, resolve_func=False) if name in ADAPTED else _read(entry.yaml_path)
            yield name, config | ADAPTED.get(name, {}) | overrides | {"task": name}

    def _child(self, child: str | Config, overrides: Config) -> Iterator[tuple[str, Config]]:
        if isinstance(child, str):
            yield from self._expand(child, overrides)
        elif "group" in child and isinstance(child.get("task"), list):
            for grandchild in child["task"]:
                yield from self._child(grandchild, overrides)
        else:
            yield from self._expand(str(child.get("task") or child.get("group")), overrides | child)

    def _located(self, name: str, asked: str, config: Config, file: Path | None) -> Leaf:
        dataset = str(config.get("dataset_path"))
        shots = config.get("num_fewshot") if self._num_fewshot is None else self._num_fewshot
        config = config | {"num_fewshot": SHOTS.get(dataset, 0) if shots is None else shots}
        if file:
            return _with_splits(name, config, _files(file, config), _digest(file))
        config_name = config.get("dataset_name") or "default"
        if dataset in SETS and (set_folder(dataset) / config_name).is_dir():
            paths = {path.stem: path for path in (set_folder(dataset) / config_name).iterdir()}
            return _with_splits(name, config, paths, f"{SETS[dataset].package.requirement} ({dataset})")
        _offline_if_cut_off()
        remedy = f"give --data {asked}=FILE" if dataset not in SETS else "run once: ffn-fusion eval --fetch-data"
        return Leaf(name, config, f"the Hub ({dataset})", remedy=remedy)


def _read(path: Path) -> Config:
    """A task's file with its functions, which are imported; `UserError` if that cannot be done or must not."""
    try:
        config: Config = load_yaml(path, resolve_func=False)
        if config.get("unsafe_code"):
            raise UserError(
                f"{config.get('task')} runs generated code without a sandbox; of such tasks only humaneval has one here"
            )
        if not isinstance(config.get("task"), str):
            raise ValueError("it does not name one task")
        return dict(load_yaml(path))
    except UserError:
        raise
    except Exception as error:  # of YAML, and of whatever the functions import
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{path} cannot be read as a task: {reason}") from None


@cache
def _offline_if_cut_off() -> None:
    """Without a network, let what the Hub's libraries have cached be used at once, not after minutes of retries."""
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of whichever client the library is built on
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def _with_splits(name: str, config: Config, paths: dict[str, Path], data: str) -> Leaf:
    """The configuration with its splits taken from files; splits without a file are taken out of it."""
    wanted = config.get("test_split") or config.get("validation_split") or config.get("training_split")
    kept = {key: config[key] for key in SPLITS if config.get(key) in paths}
    if not kept.keys() & {"test_split", "validation_split"}:
        raise UserError(f"the data of {name} has no split {wanted!r}; it has {', '.join(paths) or 'none'}")
    shown = config.get("fewshot_split")
    if config["num_fewshot"] and shown and shown not in paths:
        raise UserError(
            f"{name} shows {config['num_fewshot']} examples out of split {shown!r}, which its data lacks; "
            f"give a folder that holds {wanted}.* and {shown}.*, or --num-fewshot 0"
        )
    used = kept.get("test_split") or kept["validation_split"]
    files = {"data_files": {split: str(paths[split]) for split in dict.fromkeys(kept.values())}}
    format_name = FORMATS[next(iter(paths.values())).suffix]
    local = {"dataset_path": format_name, "dataset_name": None, "dataset_kwargs": files}
    note = "" if used == wanted else f"split {used!r} in place of {wanted!r}"
    return Leaf(name, config | dict.fromkeys(SPLITS) | kept | local, data, note)


def _files(path: Path, config: Config) -> dict[str, Path]:
    """Split → file, of a folder of files named by split, or of one file, which then is the split to score."""
    if path.is_dir():
        found = {file.stem: file for file in sorted(path.iterdir()) if file.suffix in FORMATS}
    else:
        found = {config.get("test_split") or config.get("validation_split") or "test": path}
    if not found or not all(file.is_file() and file.suffix in FORMATS for file in found.values()):
        raise UserError(f"{path} is no {', '.join(FORMATS)} file and no folder of such files named by split")
    if len({FORMATS[file.suffix] for file in found.values()}) > 1:
        raise UserError(f"the files in {path} are of several formats")
    return found


def _digest(path: Path) -> str:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(file.read_bytes())
    return f"{path.name}, sha256 {digest.hexdigest()[:16]}"
