"""The search for a plan by mixed-integer programming (Puzzle, arXiv 2411.19146, Appendix B), with HiGHS."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context
from math import inf
from time import monotonic

import numpy as np

from ffn_fusion.core.outer import solve_convex
from ffn_fusion.core.plan import Plan
from ffn_fusion.core.problem import Choice, Problem, evaluate, passed, plan_of, resources_used
from ffn_fusion.core.program import Program, Vector, columns_of
from ffn_fusion.errors import UserError

TOLERANCE = 1e-4
"""Of the solver, in mean single scores: 1e-6 in each of the rows that bound a score (outer.py has up to 65)."""


class OutOfTimeError(UserError):
    """Nothing was found in the time given, though there may be something."""


@dataclass(frozen=True)
class Solution:
    """A plan within the limits."""

    plan: Plan
    score: float
    """Predicted score of `choice`."""
    uses: Mapping[str, float]
    """Exact amount of every resource."""
    status: str
    """ "optimal" if no choice is better by more than the gap asked for, else "time limit"; of a baseline its name."""
    gap: float
    """How much lower than `score` the best may be at most, as a part of `score`; infinite if nothing was proven."""
    choice: Choice


def solve(
    problem: Problem,
    *,
    earlier: Sequence[Solution] = (),
    overlap: float = 0.8,
    seconds: float = 60,
    gap: float = 1e-4,
) -> Solution:
    """The choice of least score that keeps within the limits and differs from `earlier` solutions.

    At most `overlap` of all layers are built as in any earlier solution. A layer is built alike if its option is the
    same and it is fused with the next one in both or in neither. `UserError` if there is no such choice,
    `OutOfTimeError` if none was found.
    """
    until = monotonic() + seconds
    program = Program(problem, problem.limits)
    for solution in earlier:
        program.keep_apart(solution.choice, overlap)
    brings = columns_of(program.parts, len(problem.scores))
    if problem.interactions is None:
        answer = least(program, np.asarray(problem.scores, dtype=np.float64) @ brings, until, gap)
    else:
        answer = solve_convex(program, brings, until, gap)
    if answer is None:
        raise OutOfTimeError(f"no plan was found in {seconds:g} s; allow more time or raise a limit")
    choice, bound = answer
    if choice is None:
        if earlier:
            solve(problem, seconds=seconds, gap=1.0)  # any plan will do; raises the limits' own error if there is none
            raise UserError(
                f"no further plan shares at most {overlap:.0%} of its layers with each of {len(earlier)} earlier ones; "
                "raise the overlap or a limit"
            )
        raise infeasible(problem, seconds)
    within = _gap(problem, evaluate(problem, choice), bound)
    return solution_of(problem, choice, "optimal" if within <= gap else "time limit", within)


def tightest(problem: Problem, resource: str, *, others: bool = True, seconds: float = 60) -> float | None:
    """The least of a resource that a plan can use, within the `others` limits or alone; None if those allow no plan."""
    limits = {name: limit for name, limit in problem.limits.items() if others and name != resource}
    program = Program(problem, limits)
    answer = least(program, program.amounts(resource), monotonic() + seconds, 1e-6)
    if answer is None:
        raise OutOfTimeError(f"the least {resource} was not found in {seconds:g} s; allow more time")
    choice, _ = answer
    return None if choice is None else resources_used(problem, choice)[resource]


def infeasible(problem: Problem, seconds: float = 60) -> UserError:
    """What to raise where no plan keeps within the limits: one line with the tightest value of each."""
    limits = problem.limits
    if not any(option.has_ffn for options in problem.options for option in options):
        return UserError("no plan can be built: no layer has an option with an FFN")
    within = {name: tightest(problem, name, seconds=seconds) for name in limits}
    alone = {name: tightest(problem, name, others=False, seconds=seconds) or 0.0 for name in limits}
    stated = " and ".join(f"{name} {limit:g}" for name, limit in limits.items())
    tight = "; ".join(f"{name} at least {_up(alone[name])} alone{_given(within[name], len(limits))}" for name in limits)
    together = "" if passed(limits, alone) else "each limit can be met, but not all together, "
    return UserError(f"no plan keeps within {stated}: {together}{tight}")


def solution_of(problem: Problem, choice: Choice, status: str, gap: float = inf) -> Solution:
    """A choice with what it costs."""
    plan, used = plan_of(problem, choice), resources_used(problem, choice)
    return Solution(plan, evaluate(problem, choice), used, status, gap, choice)


def least(program: Program, costs: Vector, until: float, gap: float) -> tuple[Choice | None, float] | None:
    """The choice of least cost and a bound of that cost; no choice if there is none; None if time runs out first."""
    while True:
        answer = program.solve(costs, until - monotonic(), gap)
        if answer.infeasible:
            return None, inf
        if answer.point is None:
            return None
        choice = program.choice(answer.point)
        if program.admits(choice):
            return choice, answer.bound
        program.exclude(choice)  # within the solver's tolerance of a limit, but past it


def _gap(problem: Problem, score: float, bound: float) -> float:
    """How much lower the best may be, as a part of `score`; what is within the solver's tolerance is nothing."""
    tolerance = TOLERANCE * float(np.abs(problem.scores).mean()) if len(problem.scores) else 1e-300
    return max(0.0, score - bound - tolerance) / max(abs(score), tolerance)


def _given(value: float | None, num_limits: int) -> str:
    if num_limits < 2:
        return ""
    return ", out of reach within the other limits" if value is None else f", {_up(value)} within the other limits"


def _up(value: float) -> str:
    """Six digits, rounded up, so that the number can be given as a limit."""
    return f"{Context(prec=6, rounding=ROUND_CEILING).create_decimal_from_float(value):g}"
