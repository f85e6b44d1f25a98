"""Scores and searches by the LM loss and by a task, on a tiny model from the command line."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_puzzle
from conftest import save_tiny_parent, tiny_tokenizer
from questions import ARC, cut_off, write_rows
from test_cost import values
from test_pipeline import call
from test_puzzle import SMALL, refused
from texts import write_text

pytest.importorskip("lm_eval")

import torch

from ffn_fusion.core.plan import Block, Plan
from ffn_fusion.core.search_records import Objective, ScoreResult
from ffn_fusion.core.space import Change
from ffn_fusion.folder import RECORD, read_record
from ffn_fusion.hf.meter import Meter
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.text import read_windows
from ffn_fusion.settings import Fusion, Machine, Tasks, Text
from ffn_fusion.speed import timing
from ffn_fusion.tasks.quiz import Quiz

GOALS: list[Objective] = ["kl", "nll", "task"]


class Bench(test_puzzle.Bench):
    """A tiny parent, scored on text and questions, and its costs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parent = save_tiny_parent("llama", folder / "parent", intermediate_size=512, num_hidden_layers=4)
        text = write_text(folder, "text", 0, documents=150)
        self.text = ["--text", text, *SMALL]
        self.questions = [
            *("--tasks", "arc_easy", "--limit", 6),
            *("--data", f"arc_easy={write_rows(folder / 'arc_easy.jsonl', ARC)}"),
        ]
        assert self.score(folder / "scores") == 0
        options = ["--batch-size", 2, "--prompt-length", 8, "--new-tokens", 4, "--repeats", 2]
        assert call("cost", self.parent, "--out", folder / "costs", *options) == 0

    def score(self, out: Path) -> int:
        return call("score", self.parent, "--out", out, "--widths", 0.5, *self.questions, *self.text)

    @property
    def scores(self) -> ScoreResult:
        return read_record(self.folder / "scores", ScoreResult).result

    def meter(self) -> Meter:
        """What measures plans in these tests, put together by hand."""
        parent = ModelFolder(self.parent)
        text = Text(text=(str(self.text[1]),), length=24)
        measured, fit = (read_windows(text, tiny_tokenizer(), n, part) for n, part in ((3, "measure"), (8, "fit")))
        quiz = Quiz(Tasks(tasks=("arc_easy",), limit=6, data=(str(self.questions[-1]),)), tiny_tokenizer())
        model = parent.load(torch.float32, "cpu")
        return Meter(parent, model, measured, fit, Fusion(), Machine(batch_size=2), ask=quiz)


@pytest.fixture(scope="module", autouse=True)
def clock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "elapsed_ms", values)
        cut_off(patch, tmp_path_factory.mktemp("kept"))
        yield


@pytest.fixture(scope="module")
def bench(clock: None, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def test_a_change_is_scored_by_the_answers_of_its_student(bench: Bench) -> None:
    meter, result = bench.meter(), bench.scores
    assert meter.answers
    assert result.asked
    assert (result.asked.tasks, result.asked.num_items) == (["arc_easy"], 6)
    assert result.asked.loss.mean == pytest.approx(sum(meter.answers.loss) / 6, rel=1e-4)
    for score in [s for s in result.scores if s.block in ("A1/1F1", "-F2", "A3F3:256", "A1F1+2", "")][:5]:
        block = Block.parse(score.block) if score.block else None
        found = meter.rises(Change(score.first, score.last, block).applied(meter.parent.plan))
        for objective in GOALS:
            measured = getattr(score, objective)
            assert measured.mean == pytest.approx(found.by(objective).mean, rel=2e-3, abs=1e-5)
            assert measured.stderr == pytest.approx(found.by(objective).stderr, rel=2e-3, abs=1e-5)
        assert score.accuracy == found.accuracy
    assert "6 questions" in result.summary()


@pytest.mark.parametrize("objective", GOALS)
def test_the_plan_that_loses_least_by_the_objective_is_taken(
    objective: Objective, bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = bench.search(tmp_path / "search", "--objective", objective, "--speedup", 1.3, "--trials", 4)
    assert result.objective == objective
    (best,) = result.front
    rises = {plan.plan: bench.meter().rises(Plan.parse(plan.plan)) for plan in result.candidates}
    assert rises[best.plan].by(objective).mean == min(found.by(objective).mean for found in rises.values())
    for candidate in result.candidates:
        assert candidate.kl.mean == pytest.approx(rises[candidate.plan].kl.mean, rel=1e-3)
        if objective == "kl":
            assert candidate.goal is None
        else:
            assert candidate.goal
            measured = rises[candidate.plan].by(objective)
            assert candidate.goal.measured.mean == pytest.approx(measured.mean, rel=2e-3, abs=1e-5)
            assert (candidate.goal.accuracy is None) == (objective == "nll")
    assert ("goal" in capsys.readouterr().out) == (objective != "kl")


def changes_of(own: Block, plan: Plan) -> list[str]:
    """The single changes that a plan makes of one block of the parent: of its attention and of its FFN."""
    (layer,) = own.layers
    block = next((block for block in plan.blocks if layer in block.layers), None)
    if block is None:
        return [f"without {layer}"]
    parts = (Block(block.attention, own.ffns), Block(own.attention, block.ffns))
    return [str(part) for part in parts if part != own]


def test_what_is_predicted_is_the_sum_of_scores_by_the_objective(bench: Bench, tmp_path: Path) -> None:
    """And of the KL beside it. Without interactions, which would come on top."""
    options = ["--sublayers", 6, "--trials", 1, "--no-groups", "--no-interactions"]
    single = {score.block or f"without {score.first}": score for score in bench.scores.scores}
    own = Plan.identity(4).blocks
    plans = []
    for objective in GOALS:
        (found,) = bench.search(tmp_path / objective, "--objective", objective, *options).candidates
        made = [change for block in own for change in changes_of(block, Plan.parse(found.plan))]
        changes = [single[name] for name in made]
        predicted = found.goal.predicted if found.goal else found.predicted_kl
        assert predicted == pytest.approx(sum(getattr(change, objective).mean for change in changes))
        assert found.predicted_kl == pytest.approx(sum(change.kl.mean for change in changes))
        plans.append(found.plan)
    assert len(set(plans)) > 1, "else the objectives would be one"


def test_interactions_of_the_logits_count_for_losses_on_text_only(bench: Bench, tmp_path: Path) -> None:
    options = ["--sublayers", 5, "--trials", 1]
    for objective in GOALS:
        counted = bench.search(tmp_path / f"{objective}-counted", "--objective", objective, *options).candidates[0]
        plain = ["--no-interactions", "--objective", objective, *options]
        alone = bench.search(tmp_path / f"{objective}-alone", *plain).candidates[0]
        predicted = [c.goal.predicted if c.goal else c.predicted_kl for c in (counted, alone)]
        assert (predicted[0] == pytest.approx(predicted[1])) == (objective == "task")


def test_a_killed_score_asks_nothing_again(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask, calls = Quiz.__call__, list[int]()

    def killed(self: Quiz, model: object) -> object:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return ask(self, model)  # type: ignore[arg-type]

    monkeypatch.setattr(Quiz, "__call__", killed)
    assert bench.score(tmp_path / "scores") == 130
    assert bench.score(tmp_path / "scores") == 0
    # The parent twice, and the change at which it was killed.
    assert len(calls) == len(bench.scores.scores) + 3
    assert read_record(tmp_path / "scores", ScoreResult).result == bench.scores


def test_an_objective_without_its_scores_is_one_line(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(bench.folder / "scores", tmp_path / "scores")
    record = json.loads((tmp_path / "scores" / RECORD).read_text())
    for name in ("task", "accuracy"):
        for score in record["result"]["scores"]:
            del score[name]
    del record["result"]["asked"], record["inputs"]["tasks"], record["inputs"]["questions"]
    (tmp_path / "scores" / RECORD).write_text(json.dumps(record))
    by_task = ("--objective", "task", "--speedup", 1.2)
    assert "score with --tasks" in refused(bench, tmp_path, capsys, *by_task, scores=tmp_path / "scores")
    by_loss = ["--objective", "nll", "--speedup", 1.2, "--trials", 1]
    assert bench.call(tmp_path / "nll", *by_loss, scores=tmp_path / "scores") == 0, "scores of before will do"
    assert "--objective nll is for a hardware budget" in refused(
        bench, tmp_path, capsys, "--objective", "nll", "--remove-attention", 1
    )
    for alone in (["--objective", "task"], [*bench.questions]):
        assert call("run", bench.parent, "--out", tmp_path / "refused", "--speedup", 1.2, *alone) == 2
        assert "go together" in capsys.readouterr().err
