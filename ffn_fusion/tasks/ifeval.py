"""IFEval (Zhou et al., arXiv 2311.07911) with the harness' own checks, made to work without a network."""

from pathlib import Path
from typing import Any

from ffn_fusion.hf.builtin import cache_folder, new_folder

ABBREVIATIONS = "mr mrs ms dr prof st vs etc e.g i.e u.s no vol inc ltd co jr sr a.m p.m fig dept approx"


def score(document: dict[str, Any], answers: list[str]) -> dict[str, Any]:
    """Instructions followed, an item of the harness."""
    _sentence_splitter()
    import langdetect

    # It draws at random, and a short answer would pass in one run and fail in the next.
    langdetect.DetectorFactory.seed = 0
    from lm_eval.tasks.ifeval.utils import process_results  # looks for nltk's data at import

    values: dict[str, Any] = process_results(document, answers)
    return values


def _sentence_splitter() -> None:
    """Give nltk a Punkt model if it has none: nltk would fetch one, and no package holds it.

    An untrained model with common abbreviations splits the prose of answers as well; only instructions that count
    sentences use it.
    """
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        top = cache_folder() / "nltk_data"
        if not top.is_dir():
            with new_folder(top) as folder:
                _write_punkt(folder / "tokenizers" / "punkt_tab" / "english")
        nltk.data.path.insert(0, str(top))


def _write_punkt(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "abbrev_types.txt").write_text("\n".join(ABBREVIATIONS.split()) + "\n", encoding="utf-8")
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (folder / name).write_text("", encoding="utf-8")


CONFIG: dict[str, Any] = {
    "process_results": score,
    "metric_list": [
        {"metric": f"{level}_level_{how}_acc", "aggregation": "mean", "higher_is_better": True}
        for level in ("prompt", "inst")
        for how in ("strict", "loose")
    ],
}
