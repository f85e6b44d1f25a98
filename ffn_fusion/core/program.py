"""The mixed-integer program of a problem of choice, in the form that HiGHS takes (scipy.optimize.milp)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import floor, inf
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ffn_fusion.core.problem import Choice, Link, Option, Problem, is_buildable, passed, resources_used

Vector = NDArray[np.float64]
FINENESS = 1e4
"""Limits are scaled to this number, so that the solver's tolerance of 1e-6 is 1e-10 of a limit."""


@dataclass(frozen=True)
class Answer:
    """What the solver found: no point if there is none or none in time; `bound` holds for every feasible point."""

    point: Vector | None
    bound: float
    infeasible: bool
    in_time: bool


class Program:
    """Columns: one binary an option, one a link, then continuous ones. The least of a cost over them is sought.

    Rows hold for every choice that is a plan within the problem's limits, and for no other.
    """

    def __init__(self, problem: Problem, limits: Mapping[str, float]) -> None:
        self.problem, self.limits = problem, limits
        self.earlier: list[tuple[Choice, int]] = []
        sizes = [len(options) for options in problem.options]
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        self.num_options = int(self.starts[-1])
        self.parts: list[Option | Link] = [option for options in problem.options for option in options]
        self.parts += problem.links
        self.link_at = {link.left: self.num_options + i for i, link in enumerate(problem.links)}
        self.num_binary = len(self.parts)
        self.lower: list[float] = [0.0] * self.num_binary
        self.upper: list[float] = [1.0] * self.num_binary
        self._data: list[float] = []
        self._columns: list[int] = []
        self._ends: list[int] = [0]
        self._low: list[float] = []
        self._high: list[float] = []
        for layer in range(problem.num_layers):
            self.add_row(dict.fromkeys(self._of(layer), 1.0), 1, 1)
        self.add_row(self._where(lambda option: option.has_ffn, range(problem.num_layers)), 1)
        self._add_limits(limits)
        self._add_links()
        if problem.max_width is not None:
            self._add_widths(problem.max_width)

    def copy(self) -> "Program":
        """A program to which rows and columns can be added without changing this one."""
        return deepcopy(self, {id(self.problem): self.problem})

    def add_column(self, upper: float = inf, lower: float = 0.0) -> int:
        """A continuous column; its index."""
        self.lower.append(lower)
        self.upper.append(upper)
        return len(self.upper) - 1

    def add_row(self, row: Mapping[int, float], low: float = -inf, high: float = inf) -> None:
        """low <= sum of value times column <= high."""
        self._columns += row.keys()
        self._data += row.values()
        self._ends.append(len(self._data))
        self._low.append(low)
        self._high.append(high)

    def amounts(self, resource: str) -> Vector:
        """What each binary adds to a resource; fusing takes away."""
        return np.array(
            [part.uses.get(resource, 0.0) if isinstance(part, Option) else -part.saves.get(resource, 0.0)
             for part in self.parts]
        )  # fmt: skip

    def keep_apart(self, earlier: Choice, overlap: float) -> None:
        """At most `overlap` of all layers built as in an earlier choice (Puzzle, Appendix B).

        A layer is built alike if its option is the same and it is fused with the next one in both or in neither.
        """
        alike: dict[int, float] = {}
        for layer, index in enumerate(earlier.options):
            option, link = int(self.starts[layer]) + index, self.link_at.get(layer)
            if link is None:
                alike[option] = 1.0
                continue
            both = self.add_column(1.0)
            alike[both] = 1.0
            if layer in earlier.links:
                self.add_row({both: 1.0, option: -1.0, link: -1.0}, -1.0)
            else:
                self.add_row({both: 1.0, option: -1.0, link: 1.0}, 0.0)
        most = floor(overlap * self.problem.num_layers + 1e-9)
        self.add_row(alike, high=most)
        self.earlier.append((earlier, most))

    def admits(self, choice: Choice) -> bool:
        """Whether a choice obeys every rule exactly; the solver's points do so up to its tolerance."""
        used = resources_used(self.problem, choice)
        return (
            is_buildable(self.problem, choice)
            and not passed(self.limits, used)
            and all(choice.shared(other) <= most for other, most in self.earlier)
        )

    def exclude(self, choice: Choice) -> None:
        """Rule out one choice."""
        ones = np.flatnonzero(self.point(choice)).tolist()
        links = range(self.num_options, self.num_binary)
        row = dict.fromkeys(links, 1.0) | dict.fromkeys(ones, -1.0)
        self.add_row(row, 1.0 - len(ones))

    def choice(self, point: Vector) -> Choice:
        """The choice at a point whose binaries are whole numbers, or the nearest one that takes an option a layer."""
        options = (int(np.argmax(point[a:b])) for a, b in zip(self.starts[:-1], self.starts[1:], strict=True))
        links = (left for left, column in self.link_at.items() if point[column] > 0.5)
        return Choice(tuple(options), frozenset(links))

    def point(self, choice: Choice) -> Vector:
        """The binaries of a choice."""
        point = np.zeros(self.num_binary)
        point[self.starts[:-1] + np.array(choice.options)] = 1.0
        point[[self.link_at[left] for left in choice.links]] = 1.0
        return point

    def solve(self, cost: Vector, seconds: float, gap: float = 0.0, whole: bool = True) -> Answer:
        """The least cost; `cost` is of the first columns, the others cost nothing. Not `whole`: the relaxation."""
        costs = np.zeros(len(self.upper))
        costs[: len(cost)] = cost
        integrality = np.zeros(len(self.upper))
        integrality[: self.num_binary] = whole
        # Costs are scaled so that the solver's absolute tolerances mean as much whatever their unit.
        size = float(np.abs(costs[costs != 0]).mean()) if costs.any() else 1.0
        shape = (len(self._low), len(self.upper))
        matrix = csr_array((self._data, self._columns, self._ends), shape=shape)
        found: Any = milp(
            costs / size,
            integrality=integrality,
            bounds=Bounds(np.array(self.lower), np.array(self.upper)),
            constraints=LinearConstraint(matrix, np.array(self._low), np.array(self._high)),
            options={"time_limit": max(seconds, 0.01), "mip_rel_gap": gap},
        )
        bound = found.mip_dual_bound if whole else found.fun
        return Answer(
            found.x, -inf if bound is None else float(bound) * size, found.status == 2, found.status in (0, 2)
        )

    def _of(self, layer: int) -> range:
        return range(int(self.starts[layer]), int(self.starts[layer + 1]))

    def _options(self, layer: int) -> Iterable[tuple[int, Option]]:
        """Column of each option of a layer, and the option."""
        return zip(self._of(layer), self.problem.options[layer], strict=True)

    def _where(self, holds: Callable[[Option], bool], layers: Iterable[int]) -> dict[int, float]:
        return {column: 1.0 for layer in layers for column, option in self._options(layer) if holds(option)}

    def _add_limits(self, limits: Mapping[str, float]) -> None:
        for name, limit in limits.items():
            amounts, left = self.amounts(name), limit - self.problem.fixed.get(name, 0.0)
            scale = FINENESS / max(abs(left), float(np.abs(amounts).max()), 1e-300)
            used = np.flatnonzero(amounts)
            row = dict(zip(used.tolist(), (amounts[used] * scale).tolist(), strict=True))
            self.add_row(row, high=left * scale)

    def _add_links(self) -> None:
        for left, link in self.link_at.items():
            self.add_row({link: -1.0} | self._where(lambda option: option.may_lead, [left]), 0)
            self.add_row({link: -1.0} | self._where(lambda option: option.may_follow, [left + 1]), 0)

    def _add_widths(self, most: int) -> None:
        """A running total: the width of a layer's FFN and, where it is fused with those before it, of theirs."""
        totals: dict[int, int] = {}
        for left, link in sorted(self.link_at.items()):
            before, after = (self._widths(layer, most) for layer in (left, left + 1))
            if left not in totals:
                totals[left] = self.add_column(self._widest(before))
                self.add_row({totals[left]: 1.0} | {column: -width for column, width in before.items()}, 0)
            total = totals[left + 1] = self.add_column(max(FINENESS, self._widest(after)))
            own = {column: -width for column, width in after.items()}
            self.add_row({total: 1.0} | own, 0)
            reach = max(FINENESS, self._widest(before))
            self.add_row({total: 1.0, totals[left]: -1.0, link: -reach} | own, -reach)
            excess = max(0.0, self._widest(after) - FINENESS)
            self.add_row({total: 1.0, link: excess}, high=FINENESS + excess)

    def _widths(self, layer: int, most: int) -> dict[int, float]:
        """Scaled width of each option of a layer, by column."""
        return {column: option.width * FINENESS / most for column, option in self._options(layer) if option.width}

    @staticmethod
    def _widest(widths: Mapping[int, float]) -> float:
        return max(widths.values(), default=0.0)


def columns_of(parts: Sequence[Option | Link], num_items: int) -> Vector:
    """Which items each binary brings, [items, binaries]."""
    brings = np.zeros((num_items, len(parts)))
    for column, part in enumerate(parts):
        items = part.items if isinstance(part, Option) else (() if part.item is None else (part.item,))
        brings[list(items), column] = 1.0
    return brings
