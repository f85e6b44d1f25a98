"""HumanEval (Chen et al., arXiv 2107.03374) with its tests run in the sandbox."""

from typing import Any

from ffn_fusion.errors import UserError
from ffn_fusion.tasks.sandbox import run_program, why_no_sandbox

SECONDS = 3.0
"""The benchmark's own limit."""


def score(document: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """pass@1 of one greedy answer, an item of the harness."""
    reason = why_no_sandbox()
    if reason:
        raise UserError(reason)
    program = f"{document['prompt']}{answers[0]}\n{document['test']}\ncheck({document['entry_point']})\n"
    return {"pass@1": float(run_program(program, SECONDS).passed)}


def score_chat(document: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """The same for an answer that goes on in a code block of a chat."""
    return score(document, [answers[0].partition("```")[0]])


CONFIG: dict[str, Any] = {
    "process_results": score,
    "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
    "filter_list": None,
    "unsafe_code": False,
}
CHAT_CONFIG = CONFIG | {"process_results": score_chat}
