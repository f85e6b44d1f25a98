"""Results of `score` and `search`."""

from dataclasses import dataclass, field
from typing import Literal

from ffn_fusion.core.cost_table import Measured
from ffn_fusion.core.plan import Plan
from ffn_fusion.core.records import Sample
from ffn_fusion.core.stats import Estimate

INTERACTIONS = "interactions.safetensors"
"""File beside the record of `score`: "gram" [M, M], the Gram matrix of the changes' deviations."""

Objective = Literal["kl", "nll", "task"]
"""What a search makes as small as it can; also the name of its field in `Rises` and `ChangeScore`."""
GOALS: dict[Objective, str] = {"kl": "KL", "nll": "LM loss", "task": "loss of answers"}
"""The objectives in words; of a loss it is the rise that counts."""


@dataclass(frozen=True)
class Rises:
    """What was measured of a plan: KL to the parent and rise of the LM loss, in nats a token; where questions were
    asked, the rise of the loss of the right answer in nats a question, and the change of the share of right ones."""

    kl: Estimate
    nll: Estimate
    task: Estimate | None = None
    accuracy: Estimate | None = None

    def by(self, objective: Objective) -> Estimate:
        """What the objective is about."""
        found: Estimate = getattr(self, objective)
        return found


@dataclass(frozen=True)
class Similarity:
    """Per layer, mean cosine between the input and output of its attention, its FFN (LLM-Drop) and the whole layer
    (ShortGPT: one less its block influence)."""

    attention: list[float]
    ffn: list[float]
    layer: list[float]


@dataclass(frozen=True)
class ChangeScore:
    """One change of the parent and what it costs alone, as in `Rises`.

    `block` stands in the place of layers `first` to `last`; empty if nothing does.
    """

    first: int
    last: int
    block: str
    kl: Estimate
    nll: Estimate
    task: Estimate | None = None
    accuracy: Estimate | None = None


@dataclass(frozen=True)
class Asked:
    """The questions that changes were scored on, and the parent's own answers: loss of the right one in nats a
    question, and the share of right ones."""

    tasks: list[str]
    num_items: int
    data: str
    loss: Estimate
    accuracy: Estimate


@dataclass(frozen=True)
class ScoreResult:
    """Replace-one-block scores of a parent (Puzzle). How two changes interact is in `INTERACTIONS`."""

    model: str
    num_layers: int
    sample: Sample
    fit_sample: Sample | None
    scores: list[ChangeScore]
    similarity: Similarity
    asked: Asked | None = None
    parent_key: str = ""
    """Whose scores these are, wherever the parent's files lie; older records lack it."""

    def summary(self) -> str:
        ranked = sorted(self.scores, key=lambda score: score.kl.mean)
        questions = f" and {self.asked.num_items:,} questions" if self.asked else ""
        lines = [f"{len(self.scores)} changes scored on {self.sample.num_tokens:,} tokens{questions}, cheapest (KL):"]
        for score in ranked[:12]:
            answers = f"  answers' loss {score.task}" if score.task else ""
            lines.append(f"  {score.block or f'without {score.first}':16} {score.kl}{answers}")
        return "\n".join(lines)


@dataclass(frozen=True)
class SearchStep:
    """One decision of the search: what was tried, its KL, and whether it was kept."""

    action: str
    kl: Estimate
    kept: bool


@dataclass(frozen=True)
class Goal:
    """What a search went by where that is not the KL, as in `Rises`: predicted by the scores, and measured."""

    predicted: float
    measured: Estimate
    accuracy: Estimate | None = None
    """Change of the share of right answers, where questions were asked."""


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
    goal: Goal | None = None
    """None where the search goes by the KL."""

    def __str__(self) -> str:
        timed = f" (measured {self.measured_ms.ms:.3f})" if self.measured_ms else ""
        goal = f" goal {self.goal.measured} (predicted {self.goal.predicted:.3f})," if self.goal else ""
        kl = f" KL {self.kl} (predicted {self.predicted_kl:.3f}),"
        taken = "  <- taken" if self.best else ""
        return f"{self.origin:14}{goal}{kl} decode {self.predicted_ms:.3f} ms{timed}{taken}"


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
    objective: Objective = "kl"

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
        if self.objective != "kl":
            lines.append(f"goal: least rise of the {GOALS[self.objective]}")
        for target in dict.fromkeys(candidate.target for candidate in self.candidates):
            lines.append(f"{target}:")
            lines += [f"  {candidate}" for candidate in self.candidates if candidate.target == target]
        return "\n".join(lines + ([self.note] if self.note else []))
