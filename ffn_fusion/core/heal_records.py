"""Results of `heal`: what was trained on what, how fast, and what every check-up on held-out domains found."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from typing import Literal

from ffn_fusion.core.stats import Estimate

Measure = Literal["kl", "nll"]
NAMES: dict[Measure, str] = {"kl": "KL to the parent", "nll": "negative log-likelihood"}
TOLERANCE: dict[Measure, float] = {"kl": 0.10, "nll": 0.02}
"""A domain has regressed if it is worse than it ever was by this share and by two standard errors, and recovers no such
share from one check-up to the next."""


@dataclass(frozen=True)
class Drawn:
    """Tokens that a stage took from a text, and how many different ones there were."""

    text: str
    num_tokens: int
    unique_tokens: int

    def __str__(self) -> str:
        times = self.num_tokens / self.unique_tokens
        return f"{self.num_tokens:,} tokens of {self.text}" + (f", read {times:.1f} times" if times > 1 else "")


@dataclass(frozen=True)
class DomainScore:
    """A domain at one check-up, in nats a token."""

    kl: Estimate
    nll: Estimate
    parent_nll: float

    def value(self, measure: Measure) -> Estimate:
        return self.kl if measure == "kl" else self.nll

    @property
    def perplexity_ratio(self) -> float:
        return exp(self.nll.mean - self.parent_nll)


@dataclass(frozen=True)
class CheckUp:
    """Held-out domains after so many steps of the whole recipe, and the mean loss of the steps since the last time."""

    step: int
    num_tokens: int
    stage: str
    loss: float | None
    domains: dict[str, DomainScore]

    def mean(self, measure: Measure) -> float:
        """Mean over domains."""
        return sum(score.value(measure).mean for score in self.domains.values()) / len(self.domains)


@dataclass(frozen=True)
class TrainingPoint:
    """Means over the steps since the last point; losses are unweighted, in nats or relative, a token."""

    step: int
    num_tokens: int
    learning_rate: float
    norm: float
    """Of the gradient before it is clipped."""
    losses: dict[str, float]


@dataclass(frozen=True)
class StageOutcome:
    """One stage of a recipe as it was run."""

    name: str
    num_steps: int
    num_tokens: int
    length: int
    num_trained: int
    """Parameters that moved."""
    seconds: float
    """Of training alone, without check-ups."""
    tokens_per_second: float
    """Over all ranks, once warm."""
    share_of_peak: float | None
    """Model FLOPs a second (docs/method.md) over those of a large matrix product on the same device."""
    peak_memory_gb: float | None
    drawn: list[Drawn]

    def __str__(self) -> str:
        share = f", {self.share_of_peak:.0%} of the device's matrix product" if self.share_of_peak else ""
        memory = f", {self.peak_memory_gb:.1f} GB at most" if self.peak_memory_gb else ""
        return (
            f"{self.name}: {self.num_steps:,} steps, {self.num_tokens:,} tokens in windows of {self.length:,}, "
            f"{self.tokens_per_second:,.0f} tokens/s{share}{memory}"
        )


@dataclass(frozen=True)
class HealResult:
    """A healed student: the weights of the best check-up, and how they came about."""

    parent: str
    student: str
    plan: str
    recipe: str
    ranks: int
    measure: Measure
    stages: list[StageOutcome]
    check_ups: list[CheckUp]
    curve: list[TrainingPoint]
    best: int
    """The check-up whose weights are in the folder."""
    stopped: str
    """Why training ended before its time; empty if it did not."""
    earlier_texts: list[str]
    """What the student that came in had been fitted to or trained on, and what cached answers were given on."""

    @property
    def texts(self) -> list[str]:
        """Every text that the student has seen, once."""
        return list(dict.fromkeys([*self.earlier_texts, *(d.text for stage in self.stages for d in stage.drawn)]))

    @property
    def verdict(self) -> str:
        """In so many words, what came of it."""
        start, best, last = self.check_ups[0], self.check_ups[self.best], self.check_ups[-1]
        means = [check_up.mean(self.measure) for check_up in (start, best, last)]
        name = NAMES[self.measure]
        if self.best == 0:
            said = f"mean {name} {means[0]:.4f}, at the end {means[2]:.4f}"
            return f"NO BETTER than before: {said}; these are the old weights"
        said = f"mean {name} over the domains {means[0]:.4f} -> {means[1]:.4f}"
        worse = [
            domain
            for domain, score in best.domains.items()
            if score.value(self.measure).mean > start.domains[domain].value(self.measure).mean
        ]
        said += f"; WORSE than before on {', '.join(worse)}" if worse else ""
        if self.best != len(self.check_ups) - 1:
            said += f"; the last check-up was worse ({means[2]:.4f}), these are the weights after step {best.step:,}"
        return said

    def summary(self) -> str:
        lines = [*map(str, self.stages), ""]
        lines += [f"{'domain':12} {'KL before':>18} {'KL after':>18} {'perplexity / parent, before and after':>38}"]
        start, best = self.check_ups[0], self.check_ups[self.best]
        for domain, after in best.domains.items():
            before = start.domains[domain]
            ratios = f"{before.perplexity_ratio:.3f} {after.perplexity_ratio:.3f}"
            lines.append(f"{domain:12} {before.kl!s:>18} {after.kl!s:>18} {ratios:>38}")
        lines += ["", *(f"stopped: {self.stopped}" for _ in range(bool(self.stopped))), self.verdict]
        return "\n".join(lines)


def best_of(check_ups: Sequence[CheckUp], measure: Measure) -> int:
    """The check-up with the lowest mean over domains."""
    means = [check_up.mean(measure) for check_up in check_ups]
    return means.index(min(means))


def regression(check_ups: Sequence[CheckUp], measure: Measure, patience: int) -> str:
    """Why to stop: a domain that got worse at each of the last `patience` check-ups, though the loss fell; or nothing.

    Healing on one kind of text can cost what another kind had won back (NVIDIA saw MMLU-Pro fall from 23 to 6).
    """
    if not patience or len(check_ups) <= patience:
        return ""
    recent = check_ups[-patience:]
    for domain in recent[-1].domains:
        if all(_is_worse(check_ups, len(check_ups) - 1 - i, domain, measure) for i in range(patience)):
            best = min(c.domains[domain].value(measure).mean for c in check_ups)
            now = recent[-1].domains[domain].value(measure).mean
            said = f"{NAMES[measure]} {best:.4f} at its best, {now:.4f} after step {recent[-1].step:,}"
            return f"{domain} regressed while the loss fell: {said}"
    return ""


def _is_worse(check_ups: Sequence[CheckUp], index: int, domain: str, measure: Measure) -> bool:
    now, before = check_ups[index], check_ups[index - 1]
    value = now.domains[domain].value(measure)
    best = min(c.domains[domain].value(measure).mean for c in check_ups[:index])
    fell = before.loss is None or (now.loss is not None and now.loss <= before.loss)
    # The first steps at a high rate can cost a domain what the later ones win back.
    recovers = value.mean < before.domains[domain].value(measure).mean * (1 - TOLERANCE[measure])
    return fell and not recovers and value.mean > max(best * (1 + TOLERANCE[measure]), best + 2 * value.stderr)
