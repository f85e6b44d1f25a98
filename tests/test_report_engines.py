"""Exports and draft models on the report: what the records say, differences in bold, nothing wider than a phone."""

import html
import re
from dataclasses import replace
from pathlib import Path

import pytest
from test_report import bench, browse, evaluate, figures_of, needs_browser, page_of, sample, write
from test_report_tasks import text_of

from ffn_fusion.core.engine_records import QUESTION, Divergence, EngineCheck, ExportResult, SpeculateResult

STUDENT = "runs/some/where/far/down/the/student"


def check(engine: str = "transformers", **changes: object) -> EngineCheck:
    equal = EngineCheck(engine, "5.23.0", {}, 3, 1072, 3.25e-6, 1.3125, None, True, "The capital is Paris.")
    return replace(equal, **changes)  # type: ignore[arg-type]


def export(*checks: EngineCheck, target: str = "hf", dtype: str = "as the student") -> ExportResult:
    return ExportResult(STUDENT, target, dtype, 123_456_789, list(checks))


def speculate(**changes: object) -> SpeculateResult:
    result = SpeculateResult(
        target="the/target",
        draft="the/draft",
        engine="vllm",
        version="0.32.1",
        draft_tokens=4,
        num_prompts=8,
        new_tokens=64,
        sample=sample("test"),
        rounds=160,
        proposed=640,
        accepted=352,
        plain_seconds=16.0,
        drafted_seconds=10.0,
        equal_prompts=8,
    )
    return replace(result, **changes)  # type: ignore[arg-type]


def differing() -> EngineCheck:
    options = {"tensor_parallel": 2}
    changes = {"options": options, "divergence": Divergence(1, 4, 0.03125), "same_tokenizer": False, "answer": ""}
    return check("vllm", version="0.32.1", max_logit_error=0.04321, **changes)


def page(folder: Path, *results: ExportResult | SpeculateResult) -> str:
    for number, result in enumerate(results):
        stage = "export" if isinstance(result, ExportResult) else "speculate"
        write(folder / "work" / f"{stage}{number}", stage, result)
    return page_of(folder / "work", out=folder / "report.html")


def section(markup: str, title: str) -> str:
    return markup.split(f"<h2>{title}</h2>")[1].split("<h2>")[0]


def test_every_check_is_a_row(tmp_path: Path) -> None:
    shown = section(page(tmp_path, export(check(), differing()), export(target="gguf", dtype="q4_k_m")), "Engines")
    text = text_of(shown)
    for words in (
        f"Each export of {STUDENT} was run",
        f"Asked “{QUESTION}”",
        "hf as the student 123.5 MB",
        "transformers 5.23.0 3.2e-06 deviation 1.312 equal 1,072 tokens equal The capital is Paris.",
        "vllm 0.32.1 tensor parallel 2 0.043 deviation 1.312 differ prompt 2, token 5, by 0.03125 differs –",
        "gguf q4_k_m 123.5 MB not run",
        "export0: transformers n = 3 prompts, 1,072 tokens; vllm n = 3 prompts, 1,072 tokens; test device, 2030-01-02",
    ):
        assert words in text, words
    assert re.findall("<b>(.*?)</b>", shown) == ["differ", "differs"]
    assert len(re.findall('rowspan="2"', shown)) == 2
    assert [row.count("<td") for row in shown.split("<tr>")[2:]] == [7, 5, 3]


def test_exports_of_several_students_name_them(tmp_path: Path) -> None:
    other = replace(export(check()), student="another")
    text = text_of(section(page(tmp_path, export(check()), other), "Engines"))
    assert "Each export was run" in text
    assert "hf as the student …re/far/down/the/student 123.5 MB" in text
    assert "hf as the student another 123.5 MB" in text


def test_each_draft_is_a_row(tmp_path: Path) -> None:
    shown = section(page(tmp_path, speculate(), speculate(equal_prompts=7, num_prompts=9)), "Speculative decoding")
    text = text_of(shown)
    for words in (
        "the/target the/draft vllm 0.32.1 4 a round 55.0% 352 of 640 3.20 160 rounds 51.20 32.00 without 1.60× 8 of 8",
        "7 of 9",
        "speculate0: 64 new tokens after each prompt; n = 8 windows of 128 tokens (builtin:wikipedia, test), seed 7",
    ):
        assert words in text, words
    assert re.findall("<b>(.*?)</b>", shown) == ["7 of 9"]


def test_figures_agree_with_the_summary() -> None:
    result = speculate()
    assert result.acceptance == pytest.approx(0.55)
    assert result.tokens_per_round == pytest.approx(3.2)
    for words in ("55.0%", "3.20 tokens", "32.0 tokens/s without, 51.2 with", "1.60x", "8 of 8"):
        assert words in result.summary()


def test_sections_are_there_only_with_their_records(tmp_path: Path) -> None:
    titles = ("Engines", "Speculative decoding")
    one = page(tmp_path / "export", export(check()))
    assert [title in one for title in (f"<h2>{name}</h2>" for name in titles)] == [True, False]
    other = page(tmp_path / "speculate", speculate())
    assert [title in other for title in (f"<h2>{name}</h2>" for name in titles)] == [False, True]
    assert "<h1>FFN Fusion of the/target</h1>" in other
    write(tmp_path / "eval", "eval", evaluate())
    neither = page_of(tmp_path / "eval", out=tmp_path / "report.html")
    assert not any(f"<h2>{name}</h2>" in neither for name in titles)
    for markup in (one, other):
        assert figures_of(markup) == []
        assert "Undefined" not in markup
        assert "<summary>Inputs of" in markup


def test_what_an_engine_says_is_escaped(tmp_path: Path) -> None:
    odd = '<img src="x">'
    markup = page(tmp_path, export(check(odd, answer=odd)), speculate(target=odd, draft=odd))
    assert "<img" not in markup
    assert html.escape(odd).replace("&quot;", "&#34;") in markup


@needs_browser
@pytest.mark.parametrize("width", [360, 1200])
def test_tables_fit_the_screen(tmp_path: Path, width: int) -> None:
    write(tmp_path / "work" / "bench", "bench", bench())
    long = check(answer="Paris, and a word that has no end: " + "a" * 90)
    markup = page(tmp_path, export(check(), differing()), export(long), export(target="gguf"), speculate())
    measure = "document.title = 'width ' + this.contentDocument.documentElement.scrollWidth"
    frame = f'<iframe width="{width}" height="3000" onload="{measure}" srcdoc="{html.escape(markup)}"></iframe>'
    (tmp_path / "frame.html").write_text(f'<!doctype html><meta charset="utf-8">{frame}', encoding="utf-8")
    dom, _ = browse(tmp_path / "frame.html", tmp_path / "profile", f"--window-size={width + 50},3100", "--dump-dom")
    found = re.search(r"<title>width (\d+)</title>", dom)
    assert found is not None
    assert 0 < int(found[1]) <= width
