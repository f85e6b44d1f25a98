"""Results of `score` and `search`."""

from dataclasses import dataclass, field

from ffn_fusion.core.cost_table import Measured
from ffn_fusion.core.plan import Plan
from ffn_fusion.core.records import Sample
from ffn_fusion.core.stats import Estimate

INTERACTIONS = "interactions.safetensors"
"""File beside the record of `score`: "gram" [M, M], the Gram matrix of the changes' deviations."""


@dataclass(frozen=True)
class Similarity:
    """Per layer, mean cosine between the input and output of its attention, its FFN (LLM-Drop) and the whole layer
    (ShortGPT: one less its block influence)."""

    attention: list[float]
    ffn: list[float]
    layer: list[float]


@dataclass(frozen=True)
class ChangeScore:
    """One change of the parent and what it costs alone: KL to the parent, and the rise of the LM loss, in nats a token.

    `block` stands in the place of layers `first` to `last`; empty if nothing does.
    """

    first: int
    last: int
    block: str
    kl: Estimate
    nll: Estimate


@dataclass(frozen=True)
class ScoreResult:
    """Replace-one-block scores of a parent (Puzzle). How two changes interact is in `INTERACTIONS`."""

    model: str
    num_layers: int
    sample: Sample
    fit_sample: Sample | None
    scores: list[ChangeScore]
    similarity: Similarity

    def summary(self) -> str:
        ranked = sorted(self.scores, key=lambda score: score.kl.mean)
        return f"{len(self.scores)} changes scored on {self.sample.num_tokens:,} tokens, cheapest (KL):\n" + "\n".join(
            f"  {score.block or f'without {score.first}':16} {score.kl}" for score in ranked[:12]
        )


@dataclass(frozen=True)
class SearchStep:
    """One decision of the search: what was tried, its KL, and whether it was kept."""

    action: str
    kl: Estimate
    kept: bool


@dataclass(frozen=True)
class Candidate:
    """A plan that the search measured. Times are of one decode step, in milliseconds, sizes as `Ledger.model` names
    them; predicted values come from scores and costs."""

    origin: str
    """Where it came from: the solver's round, or the name of a baseline."""
    target: str
    """The budget it was found for."""
    plan: str
    predicted_kl: float
    predicted_ms: float
    uses: dict[str, float]
    kl: Estimate
    measured_ms: Measured | None = None
    status: str = ""
    """Of the solver: "optimal" or "time limit"; empty for a baseline."""
    gap: float = 0.0
    best: bool = False
    """Whether it is the one taken for its budget."""

    def __str__(self) -> str:
        timed = f" (measured {self.measured_ms.ms:.3f})" if self.measured_ms else ""
        return (
            f"{self.origin:14} KL {self.kl} (predicted {self.predicted_kl:.3f}), decode {self.predicted_ms:.3f} ms"
            f"{timed}{'  <- taken' if self.best else ''}"
        )


@dataclass(frozen=True)
class SearchResult:
    """The plan found. `predicted_kl` is what the single scores say; `unfused_kl` (nothing fitted or fused) and `kl`
    were measured on `sample`."""

    plan: str
    predicted_kl: float
    unfused_kl: Estimate
    kl: Estimate
    calibrated: bool
    sample: Sample
    steps: list[SearchStep]
    candidates: list[Candidate] = field(default_factory=list)
    """Of a search under a budget, in the order of measuring."""
    parent_ms: float | None = None
    """A decode step of the parent, by the cost table."""
    parent_measured_ms: Measured | None = None
    note: str = ""

    @property
    def front(self) -> list[Candidate]:
        """The candidates taken, one a budget."""
        return [candidate for candidate in self.candidates if candidate.best]

    def summary(self) -> str:
        plan = Plan.parse(self.plan)
        how = "calibrated" if self.calibrated else "as fused"
        lines = [
            f"{plan}",
            f"predicted KL {self.predicted_kl:.3f}, measured {self.unfused_kl} with nothing fused or fitted, "
            f"{self.kl} {how}",
            f"{len(plan.blocks)} blocks, {plan.num_sublayers} sequential sublayers, "
            f"FFNs fused: {plan.groups or 'none'}",
        ]
        if self.parent_ms:
            measured = f", {self.parent_measured_ms.ms:.3f} measured" if self.parent_measured_ms else ""
            lines.append(f"parent: decode {self.parent_ms:.3f} ms by the cost table{measured}")
        for target in dict.fromkeys(candidate.target for candidate in self.candidates):
            lines.append(f"{target}:")
            lines += [f"  {candidate}" for candidate in self.candidates if candidate.target == target]
        return "\n".join(lines + ([self.note] if self.note else []))
