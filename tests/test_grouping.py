"""Rules that group FFNs in a search without a hardware budget, from the command line."""

from collections.abc import Callable
from pathlib import Path

import pytest
from test_pipeline import call
from texts import write_text

from ffn_fusion.core.plan import Plan
from ffn_fusion.core.records import AnalyzeResult
from ffn_fusion.core.search_records import SearchResult
from ffn_fusion.folder import read_record

SMALL = ["--length", 24, "--windows", 2, "--batch-size", 2]
START = "A0F0 -F1 -F2 -F3 A4F4 -F5"
NO_LIMIT = ["--fusion-slack", 1e9]
Search = Callable[..., SearchResult]


@pytest.fixture(scope="module")
def evidence(tiny_parent: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    folder = tmp_path_factory.mktemp("grouping")
    text = ["--text", write_text(folder, "text", 0, documents=150), *SMALL]
    assert call("analyze", tiny_parent("llama"), "--out", folder / "analysis", *text) == 0
    return [tiny_parent("llama"), "--analysis", folder / "analysis", "--fit-windows", 8, *text]


@pytest.fixture
def search(evidence: list[object], tmp_path: Path) -> Search:
    def run(*options: object) -> SearchResult:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        assert call("search", *evidence, "--out", out, *options) == 0
        return read_record(out, SearchResult).result

    return run


@pytest.mark.parametrize(
    ("options", "plan"),
    [
        ([], "A0F0 -F1+2+3 A4F4 -F5"),
        (["--skip-last"], "A0F0 -F1+2 -F3 A4F4 -F5"),
        (["--max-fused-width", 200], "A0F0 -F1+2 -F3 A4F4 -F5"),
        (["--max-fused-width", 100], START),
    ],
)
def test_the_papers_rule_fills_attention_free_runs(options: list[object], plan: str, search: Search) -> None:
    result = search("--start", START, "--grouping", "paper", *NO_LIMIT, *options)
    assert result.plan == plan
    assert result.kl == result.steps[-1].kl, "what was measured last is what was taken"
    actions = [step.action for step in result.steps]
    assert actions[:2] == ["begin with the plan given", "calibrate, nothing fused"]
    assert actions[2:] == ([] if plan == START else [f"fuse by rule: {'1-3' if plan.count('+') == 2 else '1-2'}"])


def test_a_linear_ffn_ends_a_run(search: Search) -> None:
    result = search("--start", "A0F0 -F1 -F2 -F3L -F4 -F5", "--grouping", "paper", *NO_LIMIT)
    assert result.plan == "A0F0 -F1+2 -F3L -F4+5"


def test_a_rule_keeps_the_limit_as_a_whole_or_not_at_all(search: Search) -> None:
    result = search("--start", START, "--grouping", "paper", "--max-kl", 1e-6)
    assert result.plan == START
    assert [step.kept for step in result.steps] == [True, True, False]
    assert result.kl == result.steps[1].kl


def test_a_threshold_keeps_apart_what_depends_on_each_other(search: Search, evidence: list[object]) -> None:
    matrix = read_record(Path(str(evidence[2])), AnalyzeResult).result.ffn_dependency
    pairs = sorted(matrix[i][i + 1] for i in (0, 1, 2, 4))
    options = ["--start", START, "--grouping", "threshold", *NO_LIMIT]
    assert search(*options, "--max-dependency", pairs[0] * 0.99).plan == START
    for threshold in (pairs[0], pairs[2], 10.0):
        groups = Plan.parse(search(*options, "--max-dependency", threshold).plan).groups
        assert groups
        assert all(matrix[i][j] <= threshold for group in groups for i in group for j in group if i < j)
    assert groups == [(0, 1, 2, 3), (4, 5)], "beyond any dependency all that may be fused is"


REFUSED = [
    (["--start", START, "--grouping", "threshold"], "--max-dependency"),
    (["--start", START, "--max-dependency", 0.5], "--grouping threshold"),
    (["--speedup", 2, "--grouping", "paper"], "--speedup"),
    (["--plan", "A0F0 -F1+2+3 A4F4 A5F5", "--max-fused-width", 200], "group 1-3 is 288 channels wide"),
    (["--plan", "A0F0 -F1+2+3 A4F4 A5F5", "--skip-last"], "FFN 3, the last of its run"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED)
def test_rules_that_do_not_fit_are_one_line(
    options: list[object], says: str, evidence: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert call("search", *evidence, "--out", tmp_path / "out", *options) == 2
    err = capsys.readouterr().err.splitlines()
    assert says in err[-1]
    assert not (tmp_path / "out").exists()
