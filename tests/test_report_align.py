"""Tuned students on the report: what was trained, and scores that say when it got worse."""

from pathlib import Path

from test_report import measured, page_of, write
from test_report_tasks import text_of

from ffn_fusion.core.align_records import AlignResult, Course, Records, Score, StepLoss
from ffn_fusion.core.stats import Estimate


def tuned() -> AlignResult:
    return AlignResult(
        model="the/student",
        course=Course("dpo", 8, 1, 2.5e-5, 0.125, 4, 1, 1, False, "bfloat16", 7),
        records=Records(["pairs.jsonl"], 1200, 34, 5, 9876, 512, "0" * 16),
        trained_parameters=4321,
        losses=[StepLoss(300, 0.5)],
        scores=[
            Score("margin", True, measured(1.25), measured(2.5), Estimate(1.25, 0.1, 1.0, 1.5, 34)),
            Score("loss", False, measured(3.0), measured(3.5), Estimate(0.5, 0.1, 0.25, 0.75, 34)),
        ],
        texts=[],
    )


def test_a_tuned_student_stands_on_the_page_with_its_scores(tmp_path: Path) -> None:
    write(tmp_path / "work" / "align", "align", tuned())
    text = text_of(page_of(tmp_path / "work", out=tmp_path / "report.html"))
    for shown in (
        "Direct preference optimisation of the/student on 1,200 records, 300 steps, adapters of rank 8, merged",
        "learning rate 2.5e-05, beta 0.125",
        "5 records longer than 512 tokens were left out",
        "margin 1.250 1.000 to 1.500 2.500 2.000 to 3.000 1.250 1.000 to 1.500 better",
        "0.2500 to 0.7500 WORSE than before",
        "n = 34 held-out records, small print: 95% intervals, seed 7",
    ):
        assert shown in text, shown
