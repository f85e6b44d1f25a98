"""What searches under a budget found, side by side: series of measured plans, and how far predictions were off."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from ffn_fusion.core.cost_table import Measured
from ffn_fusion.core.search_records import Candidate, Objective

SOLVER = "mip"
METHODS = {
    SOLVER: "solver (MIP)",
    "greedy": "greedy",
    "random": "random",
    "max-params": "most parameters",
    "shortgpt": "ShortGPT",
    "llm-drop": "LLM-Drop",
    "drop-layers": "layers dropped",
}
"""The rules of a search under a budget, in the order in which they are shown."""
RESOURCES = {
    "decode_ms": "decode ≤ {:,.4g} ms",
    "request_ms": "request ≤ {:,.4g} ms",
    "memory_bytes": "memory ≤ {:,.0f} bytes",
    "kv_bytes": "kv cache ≤ {:,.0f} bytes a token",
    "parameters": "≤ {:,.0f} parameters",
    "sublayers": "≤ {:,.0f} sublayers",
}
Pair = tuple[float, float]
"""Predicted and measured."""
_LIMIT = re.compile(r"(\w+) <= ([\d,.e+]+)(?=, |$)")


@dataclass(frozen=True)
class Series:
    """The plans that one search measured, and a decode step of the parent as timed beside them."""

    name: str
    candidates: Sequence[Candidate]
    parent_measured_ms: Measured | None = None
    objective: Objective = "kl"

    @property
    def plans(self) -> list[Candidate]:
        """Each plan once; one that was found for a budget and taken for another counts as taken."""
        return list({c.plan: c for c in sorted(self.candidates, key=lambda c: c.best)}.values())

    @property
    def front(self) -> list[Candidate]:
        """The plans taken, fastest first, each once."""
        return sorted({c.plan: c for c in self.candidates if c.best}.values(), key=lambda c: c.predicted_ms)

    @property
    def others(self) -> list[Candidate]:
        """The plans measured and not taken."""
        return [c for c in self.plans if not c.best]

    @property
    def kls(self) -> list[Pair]:
        """Predicted and measured KL of every plan."""
        return [(c.predicted_kl, c.kl.mean) for c in self.plans]

    @property
    def goals(self) -> list[Pair]:
        """Predicted and measured rise of what the search went by in place of the KL, of every plan."""
        return [(c.goal.predicted, c.goal.measured.mean) for c in self.plans if c.goal]

    @property
    def times(self) -> list[Pair]:
        """Predicted and measured milliseconds of every plan that was timed."""
        return [(c.predicted_ms, c.measured_ms.ms) for c in self.front if c.measured_ms]

    def measured_speedup(self, candidate: Candidate) -> float | None:
        """Parent over plan, both timed in this search's own run."""
        if self.parent_measured_ms is None or candidate.measured_ms is None:
            return None
        return self.parent_measured_ms.ms / candidate.measured_ms.ms


def mean_error(pairs: Iterable[Pair]) -> float:
    """Mean of |predicted / measured - 1|; NaN without a positive measurement."""
    errors = [abs(predicted / measured - 1) for predicted, measured in pairs if measured > 0]
    return fmean(errors) if errors else math.nan


def by_budget(series: Sequence[Series], taken: bool) -> dict[str, list[tuple[Series, Candidate]]]:
    """The plans found for each budget, or only those taken, the least KL first."""
    rows = [(own, c) for own in series for c in own.candidates if c.best or not taken]
    targets = dict.fromkeys(c.target for _, c in rows)
    return {t: sorted((row for row in rows if row[1].target == t), key=lambda row: row[1].kl.mean) for t in targets}


def labels(series: Iterable[Series]) -> list[tuple[Candidate, str]]:
    """For each budget the taken plan of least KL over all series, and the budget's name; a plan's budgets together."""
    least: dict[str, Candidate] = {}
    for candidate in (c for s in series for c in s.candidates if c.best):
        known = least.get(candidate.target)
        if known is None or candidate.kl.mean < known.kl.mean:
            least[candidate.target] = candidate
    return [
        (taken, ", ".join(target_words(target) for target, other in least.items() if other.plan == taken.plan))
        for taken in {candidate.plan: candidate for candidate in least.values()}.values()
    ]


def target_words(target: str) -> str:
    """A budget as `search` names it, such as `1.5x` or `decode_ms <= 2.1`, in words."""
    words = _LIMIT.sub(lambda m: RESOURCES.get(m[1], m[0]).format(float(m[2].replace(",", ""))), target)
    return re.sub(r"^([\d.]+)x$", r"\1×", words)


def proof(candidate: Candidate) -> str:
    """What the solver says of a plan, its gap as a part of the score; empty for a baseline, which proves nothing."""
    if math.isfinite(candidate.gap):
        return candidate.status + (f", gap {candidate.gap:.2%}" if candidate.gap > 0 else "")
    return "time limit, no bound" if candidate.status == "time limit" else ""
