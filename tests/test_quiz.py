"""Questions for a search: their losses against the harness' own answers, and what cannot be asked."""

from collections.abc import Callable
from math import exp, log
from pathlib import Path

import pytest
from questions import ARC, MMLU, PIQA, Rows, cut_off, write_rows
from reference import one_line

pytest.importorskip("lm_eval")

import torch
from conftest import tiny_tokenizer
from test_evaluate_tasks import write_mt_bench
from transformers import PreTrainedModel

from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.settings import Tasks
from ffn_fusion.tasks.benchmark import Setting
from ffn_fusion.tasks.catalog import Catalog
from ffn_fusion.tasks.harness import HarnessTask
from ffn_fusion.tasks.quiz import LIMIT, Quiz
from ffn_fusion.tasks.scorer import Scorer

LAMBADA: Rows = [{"text": f"the old man went down to the {end}"} for end in ("river", "stone", "door", "sea")]
WINOGRANDE: Rows = [
    {"sentence": f"the man took the bird and the light because the _ was {how}", "option1": "bird", "option2": "light"}
    | {"answer": str(1 + number % 2)}
    for number, how in enumerate(("old", "quiet", "far", "near"))
]
ROWS = {"arc_easy": ARC, "piqa": PIQA, "lambada_openai": LAMBADA, "winogrande": WINOGRANDE, "mmlu_anatomy": MMLU}


@pytest.fixture(autouse=True)
def fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    return cut_off(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def model(tiny_parent: Callable[[str], Path]) -> PreTrainedModel:
    return ModelFolder(tiny_parent("llama")).load(torch.float32, "cpu")


def tasks(folder: Path, *names: str, limit: int | None = None) -> Tasks:
    data = tuple(f"{name}={write_rows(folder / f'{name}.jsonl', ROWS[name])}" for name in names)
    return Tasks(tasks=names, data=data, limit=limit, num_fewshot=0)


def by_harness(name: str, folder: Path, model: PreTrainedModel) -> tuple[HarnessTask, Scorer]:
    tokenizer = tiny_tokenizer()
    catalog = Catalog({name: write_rows(folder / f"{name}.jsonl", ROWS[name])}, 0)
    (leaf,) = catalog.leaves(name)
    return HarnessTask(catalog, leaf, Setting(tokenizer, False, None)), Scorer(model, tokenizer, {})


@pytest.mark.parametrize("name", ROWS)
def test_what_is_right_is_what_the_harness_says(name: str, tmp_path: Path, model: PreTrainedModel) -> None:
    task, scorer = by_harness(name, tmp_path, model)
    values = task.run(scorer, scorer).values
    found = Quiz(tasks(tmp_path, name), tiny_tokenizer())(model)
    assert found.right == (values["acc_norm"] if name in ("arc_easy", "piqa") else values["acc"])
    assert 0 < sum(found.right) < len(found.right) or name in ("arc_easy", "lambada_openai")
    assert len(set(found.loss)) == len(found.right) == len(ROWS[name])


def test_losses_are_those_of_a_choice_by_likelihood_for_its_length(tmp_path: Path, model: PreTrainedModel) -> None:
    _, scorer = by_harness("arc_easy", tmp_path, model)
    expected = []
    for row in ARC:
        texts = row["choices"]["text"]
        total = scorer.log_probability([f"Question: {row['question']}\nAnswer:"] * 3, [f" {text}" for text in texts])
        mean = sum(map(len, texts)) / 3
        scores = [value / len(text) * mean for value, text in zip(total, texts, strict=True)]
        expected.append(log(sum(map(exp, scores))) - scores["ABC".index(row["answerKey"])])
    assert Quiz(tasks(tmp_path, "arc_easy"), tiny_tokenizer())(model).loss == pytest.approx(expected, rel=1e-4)


def test_a_single_answer_costs_its_own_surprise(tmp_path: Path, model: PreTrainedModel) -> None:
    _, scorer = by_harness("lambada_openai", tmp_path, model)
    prompts, words = zip(*(row["text"].rsplit(" ", 1) for row in LAMBADA), strict=True)
    expected = [-value for value in scorer.log_probability(prompts, [f" {word}" for word in words])]
    assert Quiz(tasks(tmp_path, "lambada_openai"), tiny_tokenizer())(model).loss == pytest.approx(expected, rel=1e-4)


def test_tasks_are_asked_one_after_another_and_limited(tmp_path: Path, model: PreTrainedModel) -> None:
    apart = [Quiz(tasks(tmp_path, name, limit=3), tiny_tokenizer())(model) for name in ("arc_easy", "piqa")]
    quiz = Quiz(tasks(tmp_path, "arc_easy", "piqa", limit=3), tiny_tokenizer())
    both = quiz(model)
    assert both.loss == pytest.approx(apart[0].loss + apart[1].loss, rel=1e-4)
    asked = quiz.asked(both)
    assert (asked.tasks, asked.num_items) == (["arc_easy", "piqa"], 6)
    assert asked.accuracy.mean == pytest.approx(sum(both.right) / 6)
    assert asked.loss.mean == pytest.approx(sum(both.loss) / 6)
    assert len(ARC) < LIMIT, "all of them without a limit, here"
    assert len(Quiz(tasks(tmp_path, "arc_easy"), tiny_tokenizer())(model).loss) == len(ARC)


def test_the_same_questions_can_be_asked_again_and_only_they(tmp_path: Path, model: PreTrainedModel) -> None:
    quiz = Quiz(tasks(tmp_path, "arc_easy"), tiny_tokenizer())
    again = Quiz.again(quiz.inputs, tiny_tokenizer())
    assert again.inputs == quiz.inputs
    assert again(model) == quiz(model)
    write_rows(tmp_path / "arc_easy.jsonl", ARC[1:])
    one_line(lambda: Quiz.again(quiz.inputs, tiny_tokenizer()), "arc_easy", "score again")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("agreement", "has models write"),
        ("mt_bench", "judge"),
        ("gsm8k", "gsm8k offers no answers"),
        ("hellaswag", "--fetch-data"),
    ],
)
def test_what_cannot_be_asked_is_one_line(name: str, says: str, fetched: Path, tmp_path: Path) -> None:
    write_mt_bench(fetched)
    rows: Rows = [{"question": "How many birds?", "answer": "#### 4"}]
    data = (f"gsm8k={write_rows(tmp_path / 'gsm8k.jsonl', rows)}",) if name == "gsm8k" else ()
    asked = Tasks(tasks=(name,), data=data, num_fewshot=0)
    one_line(lambda: Quiz(asked, tiny_tokenizer()), says)


def test_a_question_without_a_right_answer_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "arc_easy.jsonl", [ARC[0] | {"answerKey": "D"}])
    asked = Tasks(tasks=("arc_easy",), data=(f"arc_easy={tmp_path / 'arc_easy.jsonl'}",))
    one_line(lambda: Quiz(asked, tiny_tokenizer()), "arc_easy")
