"""Search under a hardware budget on a tiny model, from the command line; a clock that counts stands in for time."""

import json
import shutil
from collections.abc import Callable, Iterator
from copy import copy
from pathlib import Path
from typing import Any, get_args

import pytest
from conftest import save_tiny_parent
from test_cost import values
from test_parents import BLOCKS, puzzletron, uneven_parent
from test_pipeline import call
from texts import write_text

from ffn_fusion.core.cost_table import Measured
from ffn_fusion.core.plan import Plan
from ffn_fusion.core.search_records import INTERACTIONS, Candidate, SearchResult
from ffn_fusion.core.solve import OutOfTimeError, Solution, solve
from ffn_fusion.folder import read_record
from ffn_fusion.hf.meter import Meter
from ffn_fusion.settings import Method
from ffn_fusion.speed import timing
from ffn_fusion.stages import puzzle
from ffn_fusion.stages.puzzle import SLACK

SMALL = ["--length", 24, "--windows", 3, "--batch-size", 2, "--fit-windows", 8]
BASELINES = [method for method in get_args(Method) if method != "mip"]


class Bench:
    """A tiny parent with its scores and costs."""

    def __init__(self, parent: Path, text: Path, folder: Path) -> None:
        self.parent, self.folder = parent, folder
        self.text = ["--text", text, *SMALL]
        assert call("score", parent, "--out", folder / "scores", "--widths", 0.5, *self.text) == 0
        options = ["--batch-size", 2, "--prompt-length", 8, "--new-tokens", 4, "--repeats", 2]
        assert call("cost", parent, "--out", folder / "costs", *options) == 0

    def call(self, out: Path, *options: object, **other: Path) -> int:
        made = {"scores": self.folder / "scores", "costs": self.folder / "costs"} | other
        evidence = [word for name, path in made.items() for word in (f"--{name}", path)]
        return call("search", self.parent, "--out", out, *evidence, *self.text, *options)

    def search(self, out: Path, *options: object, **other: Path) -> SearchResult:
        assert self.call(out, *options, **other) == 0
        return read_record(out, SearchResult).result


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("texts"), "text", 0, documents=150)


@pytest.fixture(scope="module", autouse=True)
def clock() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "elapsed_ms", values)
        yield


@pytest.fixture(scope="module")
def bench(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    parent = save_tiny_parent("llama", folder / "parent", intermediate_size=512)
    return Bench(parent, text, folder)


def taken(result: SearchResult) -> Candidate:
    (best,) = result.front
    return best


def test_a_speedup_is_met_by_the_best_plan_measured(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = bench.search(tmp_path / "search", "--speedup", 1.4, "--trials", 4)
    assert result.parent_ms
    limit = result.parent_ms / 1.4
    assert [candidate.origin for candidate in result.candidates if not candidate.best]
    assert sorted(candidate.origin for candidate in result.candidates) == [f"MIP {n}" for n in range(1, 5)]
    assert len({candidate.plan for candidate in result.candidates}) == 4
    assert all(candidate.predicted_ms <= limit * (1 + SLACK) for candidate in result.candidates)
    best = taken(result)
    assert best.kl.mean == min(candidate.kl.mean for candidate in result.candidates)
    assert (best.plan, best.kl) == (result.plan, result.kl)
    assert Plan.from_json((tmp_path / "search" / "plan.json").read_text()) == Plan.parse(result.plan)
    # The clock counts, so tables and whole models agree but for what is rounded off.
    assert best.measured_ms
    assert result.parent_measured_ms
    assert best.measured_ms.ms == pytest.approx(best.predicted_ms, rel=1e-6)
    assert result.parent_measured_ms.ms == pytest.approx(result.parent_ms, rel=1e-6)
    shown = capsys.readouterr().out
    assert "<- taken" in shown
    assert "decode_ms <=" in shown


@pytest.mark.parametrize("method", BASELINES)
def test_every_rival_keeps_the_limits(method: str, bench: Bench, tmp_path: Path) -> None:
    limits = ["--speedup", 1.3, "--sublayers", 10]
    result = bench.search(tmp_path / "search", "--method", method, *limits)
    best = taken(result)
    assert (best.origin, len(result.candidates)) == (method, 1)
    assert result.parent_ms
    assert best.uses["decode_ms"] <= result.parent_ms / 1.3 * (1 + 1e-9)
    assert best.uses["sublayers"] <= 10
    assert Plan.parse(result.plan).groups == []


def test_links_and_interactions_can_be_left_out(bench: Bench, tmp_path: Path) -> None:
    options = ["--sublayers", 8, "--trials", 1]
    plain = bench.search(tmp_path / "plain", *options, "--no-groups", "--no-interactions")
    assert Plan.parse(plain.plan).groups == []
    scores = json.loads((bench.folder / "scores" / "record.json").read_text())["result"]["scores"]
    single = {score["block"] or f"without {score['first']}": score["kl"]["mean"] for score in scores}
    parent = Plan.identity(6)
    lost = sum(
        single[str(block)] if block.layers else 0
        for block in Plan.parse(plain.plan).blocks
        if block not in parent.blocks and str(block) in single
    )
    kept = {block.layers[0] for block in Plan.parse(plain.plan).blocks}
    lost += sum(single[f"without {layer}"] for layer in set(range(6)) - kept)
    assert plain.predicted_kl == pytest.approx(lost), "the sum of single scores"
    fused = bench.search(tmp_path / "fused", "--sublayers", 5, "--trials", 1, "--max-fused-width", 1024)
    widths = [sum(512 for _ in group) for group in Plan.parse(fused.plan).groups]
    assert max(widths, default=0) <= 1024


def test_a_sweep_finds_a_plan_for_each_speedup(bench: Bench, tmp_path: Path) -> None:
    options = ["--memory-gb", 1, "--sweep", 1.2, "--sweep", 1.25, "--sweep", 2, "--trials", 2]
    result = bench.search(tmp_path / "search", *options)
    assert result.parent_ms
    targets = [candidate.target for candidate in result.front]
    assert targets == ["memory_bytes <= 1e+09", "1.2x", "1.25x", "2x"]
    for candidate, speedup in zip(result.front[1:], (1.2, 1.25, 2), strict=True):
        assert candidate.predicted_ms <= result.parent_ms / speedup * (1 + SLACK)
    costs = [candidate.kl.mean for candidate in result.front]
    assert costs == sorted(costs), "a plan for a tighter budget is one for a looser"
    plans = [(tmp_path / "search" / "plans" / f"{number}.json").read_text() for number in range(1, 5)]
    assert [str(Plan.from_json(plan)) for plan in plans] == [candidate.plan for candidate in result.front]
    assert result.plan == result.front[0].plan


def test_a_budget_whose_plans_were_all_measured_for_another_takes_the_best_of_those(text: Path, tmp_path: Path) -> None:
    parent = save_tiny_parent("llama", tmp_path / "parent", num_hidden_layers=2)
    few = Bench(parent, text, tmp_path)
    result = few.search(tmp_path / "search", "--sublayers", 3, "--sweep", 1.01, "--trials", 40)
    first, second = result.front
    assert 3 < len(result.candidates) < 40
    assert second.plan in {candidate.plan for candidate in result.candidates if candidate.target == first.target}
    assert second.kl.mean >= first.kl.mean


@pytest.mark.parametrize(("factor", "said"), [(1.02, False), (1.05, True)])
def test_a_plan_that_takes_longer_than_its_limit_is_named(
    factor: float, said: bool, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = bench.search(tmp_path / "search", "--speedup", 1.3, "--trials", 1)
    assert result.parent_ms
    time = result.parent_ms / 1.3 * factor
    monkeypatch.setattr(puzzle, "decode_times", lambda *_: [Measured.of([time]), Measured.of([time])])
    note = bench.search(tmp_path / "again", "--speedup", 1.3, "--trials", 1).note
    assert (f"{time:.4g} ms measured, over the limit of {result.parent_ms / 1.3:.4g}" in note) == said


def test_a_solver_that_finds_nothing_in_time_gets_more(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[float]()

    def slow(*arguments: Any, seconds: float, **options: Any) -> Solution:
        asked.append(seconds)
        if seconds == puzzle.SOLVER_SECONDS[0]:
            raise OutOfTimeError("no plan was found")
        return solve(*arguments, seconds=seconds, **options)

    monkeypatch.setattr(puzzle, "solve", slow)
    result = bench.search(tmp_path / "search", "--sublayers", 8, "--trials", 3)
    assert len(result.candidates) == 3
    assert asked == [*puzzle.SOLVER_SECONDS] * 3


def test_an_impossible_budget_is_one_line_with_the_tightest(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.call(tmp_path / "search", "--speedup", 1000) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "no plan keeps within decode_ms" in err
    tightest = float(err.split("decode_ms at least ")[1].split()[0])
    assert not (tmp_path / "search").exists()
    result = bench.search(tmp_path / "search", "--latency-ms", tightest * 1.0001, "--trials", 1)
    assert taken(result).predicted_ms == pytest.approx(tightest, rel=1e-3)


def refused(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: object, **other: Path) -> str:
    capsys.readouterr()
    assert bench.call(tmp_path / "refused", *options, **other) == 2
    assert not (tmp_path / "refused").exists()
    return capsys.readouterr().err.splitlines()[-1]


def test_foreign_scores_and_costs_are_refused(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_parent: Callable[[str], Path]
) -> None:
    for name in ("scores", "costs"):
        shutil.copytree(bench.folder / name, tmp_path / name)
        path = tmp_path / name / "record.json"
        record = json.loads(path.read_text())
        if name == "scores":
            record["result"] |= {"model": "their/model", "parent_key": "another"}
        else:
            record["result"]["table"] |= {"device": "NVIDIA H100", "dtype": "bfloat16"}
        path.write_text(json.dumps(record))
    speedup = ("--speedup", 1.2)
    assert "another model (their/model)" in refused(bench, tmp_path, capsys, *speedup, scores=tmp_path / "scores")
    foreign = refused(bench, tmp_path, capsys, *speedup, costs=tmp_path / "costs")
    assert "NVIDIA H100" in foreign
    assert "bfloat16, not float32" in foreign
    forced = bench.search(tmp_path / "forced", *speedup, "--trials", 1, "--force-costs", costs=tmp_path / "costs")
    assert "NVIDIA H100" in forced.note
    assert forced.note in forced.summary()
    assert taken(forced).measured_ms is None, "times here say nothing about that device"


def test_scores_are_of_the_weights_wherever_they_lie(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(bench.parent, tmp_path / "moved")
    for name in ("scores", "costs"):
        shutil.copytree(bench.folder / name, tmp_path / name)
    moved = copy(bench)
    moved.parent, moved.folder = tmp_path / "moved", tmp_path
    options = ("--sublayers", 8, "--trials", 1)
    assert moved.search(tmp_path / "out", *options).plan
    (tmp_path / "scores" / INTERACTIONS).unlink()
    assert f"{INTERACTIONS} cannot be read" in refused(moved, tmp_path, capsys, *options)


def test_sizes_that_no_cost_was_measured_of_are_named(bench: Bench, tmp_path: Path) -> None:
    shutil.copytree(bench.folder / "costs", tmp_path / "costs")
    path = tmp_path / "costs" / "record.json"
    record = json.loads(path.read_text())
    rows = record["result"]["table"]["rows"]
    record["result"]["table"]["rows"] = [row for row in rows if row["kind"] != "ffn" or row["size"] <= 512]
    path.write_text(json.dumps(record))
    # So few sublayers that FFNs must be fused.
    options = ["--sublayers", 4, "--trials", 1]
    fused = bench.search(tmp_path / "fused", *options, costs=tmp_path / "costs")
    assert Plan.parse(fused.plan).groups
    assert "sublayers <= 4: no cost was measured of " in fused.note
    assert "channels (measured: 256 to 512)" in fused.note
    assert fused.note in fused.summary()
    assert bench.search(tmp_path / "known", *options).note == ""


def test_one_dial_and_its_evidence(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = refused(bench, tmp_path, capsys, "--speedup", 1.2, "--remove-attention", 2)
    assert "--speedup" in both
    assert "--remove-attention" in both
    assert "--plan" in refused(bench, tmp_path, capsys, "--memory-gb", 1, "--plan", "A0F0 A1F1")
    capsys.readouterr()
    assert call("search", bench.parent, "--out", tmp_path / "s", "--speedup", 2, *bench.text) == 2
    assert "--scores" in capsys.readouterr().err


def test_a_killed_search_measures_nothing_again(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--speedup", 1.4, "--trials", 3]
    whole = bench.search(tmp_path / "whole", *options)
    measured: list[str] = []
    measure = Meter.rises

    def killed(self: Meter, plan: Plan) -> object:
        measured.append(str(plan))
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure(self, plan)

    monkeypatch.setattr(Meter, "rises", killed)
    assert bench.call(tmp_path / "search", *options) == 130
    again = bench.search(tmp_path / "search", *options)
    assert measured[2:] == [measured[2]] * 2
    assert sorted(measured[:3]) == sorted(candidate.plan for candidate in again.candidates)
    assert [c.kl for c in again.candidates] == [c.kl for c in whole.candidates]


@pytest.mark.parametrize("method", get_args(Method))
def test_a_parent_with_padding_and_half_layers(
    method: str, text: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """Layers keep their numbers where the parent has none at some of them."""
    folder = tmp_path_factory.getbasetemp() / "uneven"
    if not folder.exists():
        Bench(uneven_parent(folder / "parent", BLOCKS, puzzletron), text, folder)
    bench = Bench(folder / "parent", text, folder)
    result = bench.search(tmp_path / "search", "--method", method, "--parameters", 360_000, "--trials", 2)
    assert taken(result).uses["parameters"] <= 360_000 * (1 + SLACK)
    parent = {0, 1, 3, 4, 5, 6, 7}
    assert {layer for block in Plan.parse(result.plan).blocks for layer in block.layers} <= parent
