"""Search under a hardware budget (Puzzle): a solver proposes plans, each is built and measured, and the solver learns.

Scores of single changes do not add up exactly, so a plan is not taken at its word: what was measured corrects the
scores, the solver proposes again, and the best plan that was measured wins.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Literal

import numpy as np
import torch

from ffn_fusion.core import baselines
from ffn_fusion.core.budget import STRENGTH, Uses, Variants
from ffn_fusion.core.cost import shapes_of
from ffn_fusion.core.cost_table import CostTable, Measured
from ffn_fusion.core.plan import Plan
from ffn_fusion.core.problem import Choice, Problem, evaluate, items_of
from ffn_fusion.core.refine import Lesson, Vector, learned
from ffn_fusion.core.search_records import Candidate, Goal, Objective, Rises, SearchResult
from ffn_fusion.core.solve import OutOfTimeError, Solution, solve
from ffn_fusion.errors import UserError
from ffn_fusion.folder import StageFolder, write_atomically
from ffn_fusion.hf.machine import pick_device
from ffn_fusion.hf.meter import Meter
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.remote.configuration_ffn_fusion import WIDTH_MULTIPLE
from ffn_fusion.progress import track
from ffn_fusion.settings import Machine, Method
from ffn_fusion.speed.stacks import Stack, time_stacks
from ffn_fusion.stages.evidence import Evidence

PLANS = "plans"
"""Folder of the plans of several budgets, by number."""
FIRST, OVERLAP = (1.0, 0.0, 3.0), 0.85
"""Of the first plans: how many times as strong interactions are as expected, and the part of their layers that they
share at most. Later ones only differ."""
SOLVER_SECONDS, SOLVER_GAP = (5.0, 60.0), 0.01
"""For each proposal, the second time where a busy machine finds none in the first. Scores are known to a few per cent,
so a proof of the last per cent would be worth nothing."""
TOLERANCE = 1.03
"""Times a limit that a plan's measured time may be; the sums of costs are that good (docs/method.md, section 8)."""
REPEATS = 20
"""Timed decode steps of each plan that is taken."""
Part = Literal["attention", "ffn", "layer"]
SLACK = 0.003
"""Part of a limit by which a plan's exact cost may pass what its links were said to save."""


@dataclass(frozen=True)
class Rule:
    """How plans are chosen. `trials` is how many of the solver's are measured for each budget."""

    method: Method
    interactions: bool
    groups: bool
    trials: int
    max_width: int | None
    seed: int


@dataclass(frozen=True)
class Tried:
    """A plan that was measured. What is predicted is by the scores as they came, not as they were corrected."""

    solution: Solution
    origin: str
    target: str
    predicted: float
    """By the objective."""
    predicted_kl: float
    lesson: Lesson
    rises: Rises

    def goal(self, objective: Objective) -> Goal | None:
        """What the search goes by beside the KL."""
        return None if objective == "kl" else Goal(self.predicted, self.rises.by(objective), self.rises.accuracy)


def search_within(
    evidence: Evidence, wanted: Mapping[str, Uses], rule: Rule, meter: Meter, folder: StageFolder
) -> SearchResult:
    """The best plan measured within each of the budgets `wanted`; the first one's is the result's plan."""
    search = _Search(meter, evidence, rule, folder)
    for target, limits in wanted.items():
        search.find(target, limits)
    taken = {target: search.best(limits) for target, limits in wanted.items()}
    parent, ledger = meter.parent, evidence.ledger
    plans = [parent.plan, *(tried.solution.plan for tried in taken.values())]
    # Costs of another device say nothing about times here.
    own, *times = [None] * len(plans) if evidence.note else decode_times(parent, ledger.table, plans, meter.machine)
    timed = dict(zip(taken, times, strict=True))
    candidates = []
    for target, best in taken.items():
        # The best may have been found for another budget.
        for tried in [*(t for t in search.tried if t.target == target and t is not best), best]:
            uses = dict(ledger.model(tried.solution.plan.blocks))
            candidates.append(
                Candidate(
                    origin=tried.origin,
                    target=target,
                    plan=str(tried.solution.plan),
                    predicted_kl=tried.predicted_kl,
                    kl=tried.rises.kl,
                    predicted_ms=uses["decode_ms"],
                    uses=uses,
                    measured_ms=timed[target] if tried is best else None,
                    status=tried.solution.status,
                    gap=tried.solution.gap,
                    best=tried is best,
                    goal=tried.goal(evidence.objective),
                )
            )
    first = next(candidate for candidate in candidates if candidate.best)
    missed = [
        f"{target}: {time.ms:.4g} ms measured, over the limit of {limits['decode_ms']:.4g}; give a tighter one"
        for (target, limits), time in zip(wanted.items(), times, strict=True)
        if time and time.ms > limits.get("decode_ms", np.inf) * TOLERANCE
    ]
    estimated = [
        f"{target}: no cost was measured of {', '.join(sizes)}; estimated from the last two sizes"
        for target, tried in taken.items()
        if (sizes := ledger.table.extrapolated(ledger.sized(tried.solution.plan.blocks)))
    ]
    _write_plans(folder, {target: tried.solution.plan for target, tried in taken.items()})
    return SearchResult(
        plan=first.plan,
        predicted_kl=first.predicted_kl,
        unfused_kl=meter.plain(Plan.parse(first.plan).unfused()),
        kl=first.kl,
        calibrated=meter.calibrates,
        sample=meter.sample,
        steps=[],
        candidates=candidates,
        parent_ms=ledger.parent()["decode_ms"],
        parent_measured_ms=own,
        note="; ".join([evidence.note] * bool(evidence.note) + missed + estimated),
        objective=evidence.objective,
    )


def _write_plans(folder: StageFolder, plans: Mapping[str, Plan]) -> None:
    """Of several budgets, a plan file each."""
    if len(plans) > 1:
        (folder.path / PLANS).mkdir(exist_ok=True)
        for number, plan in enumerate(plans.values(), start=1):
            write_atomically(folder.path / PLANS / f"{number}.json", plan.to_json())


@dataclass(frozen=True)
class _Forecast:
    """What scores say of plans as they came: `alone` is their sum, `together` has the interactions in full."""

    alone: Problem
    together: Problem

    def of(self, choice: Choice) -> tuple[float, float]:
        """The sum of a plan's scores, and what interactions of full strength add to it."""
        additive = evaluate(self.alone, choice)
        return additive, evaluate(self.together, choice) - additive


@dataclass
class _Search:
    """Solves, measures and learns. What was measured is remembered in the stage's folder."""

    meter: Meter
    evidence: Evidence
    rule: Rule
    folder: StageFolder
    tried: list[Tried] = field(default_factory=list)

    @property
    def _strength(self) -> float:
        """Of interactions, before anything is measured: those of the logits say nothing about answers to questions."""
        return 0.0 if self.evidence.objective == "task" else self._kl_strength

    @property
    def _kl_strength(self) -> float:
        return STRENGTH[self.meter.calibrates] if self.rule.interactions else 0.0

    @cached_property
    def _variants(self) -> Variants:
        return Variants(self.meter.parent.plan, self.evidence.scores)

    @cached_property
    def _goal(self) -> _Forecast:
        return self._forecast(self._variants)

    @cached_property
    def _kl(self) -> _Forecast:
        return self._forecast(Variants(self.meter.parent.plan, self.evidence.kl))

    def _forecast(self, variants: Variants) -> _Forecast:
        return _Forecast(self._choice(variants, {}, 0.0), self._choice(variants, {}, 1.0))

    def _choice(self, variants: Variants, limits: Uses, strength: float) -> Problem:
        ledger, rule = self.evidence.ledger, self.rule
        return variants.problem(ledger, limits, max_width=rule.max_width, fuse=rule.groups, strength=strength)

    def find(self, target: str, limits: Uses) -> None:
        """Measure plans for one budget: several of the solver's, or the one of a baseline."""
        if self.rule.method == "mip":
            self._learn(target, limits)
        else:
            problem = self._problem(limits, 0.0)
            self._try(_baseline(problem, self.evidence, self.rule), self.rule.method, target)

    def _problem(self, limits: Uses, strength: float, corrections: Vector | float = 0.0) -> Problem:
        """The choice within these limits, by scores and interactions as far as they are known."""
        problem = self._choice(self._variants, limits, strength)
        return replace(problem, scores=(np.asarray(problem.scores) + corrections).tolist())

    def best(self, limits: Uses) -> Tried:
        """The best plan measured that keeps these limits, whatever budget it was found for."""
        kept = [tried for tried in self.tried if self._keeps(tried, limits)]
        return min(kept, key=lambda tried: tried.rises.by(self.evidence.objective).mean)

    def _learn(self, target: str, limits: Uses) -> None:
        """Propose and measure plans, each by what all that were measured before have taught."""
        for number in track(range(self.rule.trials), f"search: plans measured, {target}", self.rule.trials):
            corrections, strength = self._learned()
            # The first proposals differ in how much interactions count, which no measurement has said yet.
            strength *= FIRST[number] if number < len(FIRST) else 1.0
            problem = self._problem(limits, strength, corrections)
            overlap = OVERLAP if number < len(FIRST) else (problem.num_layers - 1) / problem.num_layers
            try:
                found = self._within(problem, overlap)
            except UserError:
                if any(self._keeps(tried, limits) for tried in self.tried):
                    return  # no other plan is left
                raise
            self._try(found, f"MIP {number + 1}", target)

    def _within(self, problem: Problem, overlap: float) -> Solution:
        """A solution whose exact cost keeps the limits: links take the time of an FFN to be affine in its width."""
        limits = dict(problem.limits)
        while True:
            found = self._proposed(replace(problem, limits=limits), overlap)
            exact = self.evidence.ledger.model(found.plan.blocks)
            past = {name: exact[name] / limit for name, limit in problem.limits.items()}
            if all(ratio <= 1 + SLACK for ratio in past.values()):
                return found
            limits |= {name: limits[name] / ratio for name, ratio in past.items() if ratio > 1}

    def _proposed(self, problem: Problem, overlap: float) -> Solution:
        earlier = [tried.solution for tried in self.tried]
        ask = partial(solve, problem, earlier=earlier, overlap=overlap, gap=SOLVER_GAP)
        first, second = SOLVER_SECONDS
        try:
            return ask(seconds=first)
        except OutOfTimeError:
            return ask(seconds=second)

    def _learned(self) -> tuple[Vector, float]:
        """Corrections of the scores and the strength of interactions."""
        strength, scores = self._strength, self._goal.alone.scores
        if not strength:
            lessons = [replace(tried.lesson, interactions=0.0) for tried in self.tried]
            return learned(scores, 0.0, lessons)[0], 0.0
        return learned(scores, strength, [tried.lesson for tried in self.tried])

    def _try(self, found: Solution, origin: str, target: str) -> None:
        rises = self.folder.remember(f"rises {found.plan}", Rises, lambda: self.meter.rises(found.plan))
        made = np.zeros(len(self._goal.alone.scores), dtype=bool)
        made[items_of(self._goal.alone, found.choice)] = True
        additive, interactions = self._goal.of(found.choice)
        kl, kl_interactions = self._kl.of(found.choice)
        lesson = Lesson(made, additive, interactions, rises.by(self.evidence.objective).mean)
        predicted = additive + self._strength * interactions
        predicted_kl = kl + self._kl_strength * kl_interactions
        self.tried.append(Tried(found, origin, target, predicted, predicted_kl, lesson, rises))

    def _keeps(self, tried: Tried, limits: Uses) -> bool:
        exact = self.evidence.ledger.model(tried.solution.plan.blocks)
        return all(exact[name] <= limit * (1 + SLACK) for name, limit in limits.items())


def _baseline(problem: Problem, evidence: Evidence, rule: Rule) -> Solution:
    """What another rule than the solver's chooses within the same limits, from the same variants, nothing fused."""
    alike, method = evidence.similarity, rule.method
    # What leaves the stream most as it is goes first; of whole layers also what costs least alone.
    scored = zip(evidence.scores.changes, evidence.scores.values.tolist(), strict=True)
    dropped = {score.first: -value for score, value in scored if not score.block}
    rankings: dict[str, dict[Part, Mapping[int, float]]] = {
        "shortgpt": {"layer": dict(enumerate(alike.layer))},
        "llm-drop": {"attention": dict(enumerate(alike.attention)), "ffn": dict(enumerate(alike.ffn))},
        "drop-layers": {"layer": dropped},
    }
    if method in rankings:
        values = {(layer, part): value for part, held in rankings[method].items() for layer, value in held.items()}
        return baselines.drop_in_order(problem, sorted(values, key=values.__getitem__, reverse=True))
    if method == "random":
        return baselines.at_random(problem, rule.seed)
    return baselines.greedy(problem) if method == "greedy" else baselines.max_parameters(problem)


def decode_times(parent: ModelFolder, table: CostTable, plans: Sequence[Plan], machine: Machine) -> list[Measured]:
    """A decode step of each plan's student, timed as the cost table was, random weights in its shapes."""
    stacks = [
        Stack(
            parent,
            shapes_of(plan.blocks, parent.shapes, WIDTH_MULTIPLE),
            [block.layers[0] for block in plan.blocks],
            table.tensor_parallel,
        )
        for plan in plans
    ]
    request = table.scenario
    call = (request.batch_size, request.context - 1, 1)
    dtype = getattr(torch, table.dtype)
    times, _ = time_stacks(stacks, call, REPEATS, pick_device(machine), dtype, "search: plans timed")
    exchanged = [_exchanged_ms(table, stack) for stack in stacks]
    return [Measured.of([ms + extra for ms in own]) for own, extra in zip(times, exchanged, strict=True)]


def _exchanged_ms(table: CostTable, stack: Stack) -> float:
    """Communication of a decode step, which a single rank's slice leaves out."""
    return table.decode_ms(stack.shapes) - table.alone().decode_ms(stack.shapes)
