"""Outer approximation of a convex quadratic score (Duran and Grossmann 1986): a mixed-integer program and its cuts."""

from math import inf
from time import monotonic

import numpy as np

from ffn_fusion.core.convex import Matrix, equal_share, tightened
from ffn_fusion.core.local import polished
from ffn_fusion.core.problem import Choice, evaluate
from ffn_fusion.core.program import Program, Vector

ROUNDS = 60
PRECISION = 1e-3
"""Of the relaxation, as a part of its value."""
NUM_DIRECTIONS = 64
"""Principal directions with tangents of their own. One tangent for all converges slowly (Hijazi et al. 2014)."""
SPARSE = 0.25
"""Part of the interactions up to which they are taken to be of neighbours."""
MAX_TIGHTENED = 600
"""Items up to which the split is worth its time, which grows with their cube."""
BASE = 0.2
"""Gain of every item beside that at the relaxed optimum, in mean gains: an option unused there may be used later."""


def solve_convex(program: Program, brings: Matrix, until: float, gap: float) -> tuple[Choice | None, float] | None:
    """The best choice found and a bound of the best score, where pairs of items interact.

    No choice if there is none; None if time runs out before the first. `brings` says which items each binary brings.
    """
    assert program.problem.interactions is not None
    gram = np.asarray(program.problem.interactions, dtype=np.float64)
    gram = (gram + gram.T) / 2
    parts = [sorted(items) for items in program.problem.items_of_parts() if items]
    blocks = equal_share(gram, parts)
    if len(gram) <= MAX_TIGHTENED:
        weights = _Approximation(program.copy(), brings, gram, blocks).relax(until)
        if weights is not None:
            gains = (brings * weights) @ brings.T - np.outer(brings @ weights, brings @ weights)
            gains += BASE * (float(np.diag(gains).mean()) or 1.0) * np.eye(len(gram))
            blocks = tightened(gram, parts, gains)
    return _Approximation(program, brings, gram, blocks).solve(until, gap)


class _Approximation:
    """Score = costs of the binaries + half of z' (gram - blocks) z, z being the items; tangents bound the second.

    The form is a sum of squares, and parts of it have a column and tangents of their own. Where all items interact,
    these are its first principal directions, whose coordinate has a column too, and the others together. Where only
    neighbours do, they are the rows that the Cholesky factor has for each layer or link, and few items are in each.
    """

    def __init__(self, program: Program, brings: Matrix, gram: Matrix, blocks: Matrix) -> None:
        self.program, self.brings, self.gram = program, brings, gram
        scores = np.asarray(program.problem.scores, dtype=np.float64)
        # In units of a typical score, so that all columns are of one size.
        self.unit = float(np.abs(scores).mean()) or 1.0
        exact = np.einsum("kv,kl,lv->v", brings, blocks, brings, optimize=True) / 2
        self.costs = ((scores - np.diag(gram) / 2) @ brings + exact) / self.unit
        form = (gram - blocks) / self.unit
        self.ways, self.rests = _neighbours(program, form) if np.mean(form != 0) < SPARSE else _principal(form)
        self.items = [program.add_column(1.0) for _ in range(len(gram))]
        for item, column in enumerate(self.items):
            row = dict.fromkeys(np.flatnonzero(brings[item]).tolist(), -1.0)
            program.add_row(row | {column: 1.0}, 0, 0)
        self.along = [program.add_column(lower=-inf) for _ in self.ways]
        for way, column in zip(self.ways, self.along, strict=True):
            program.add_row(dict(zip(self.items, way.tolist(), strict=True)) | {column: -1.0}, 0, 0)
        self.halves = [program.add_column() for _ in range(len(self.ways) + len(self.rests))]
        self.objective = np.zeros(len(program.upper))
        self.objective[: program.num_binary] = self.costs
        self.objective[self.halves] = 1.0

    def relax(self, until: float) -> Vector | None:
        """Add tangents at optima of the relaxation until it is exact there; the binaries at the best point."""
        best: tuple[float, Vector] | None = None
        for _ in range(ROUNDS):
            answer = self.program.solve(self.objective, until - monotonic(), whole=False)
            if answer.point is None:
                break
            binaries = answer.point[: self.program.num_binary]
            value = float(self.costs @ binaries + self._squares(self.brings @ binaries).sum() / 2)
            if best is None or value < best[0]:
                best = value, binaries
            if best[0] - answer.bound <= PRECISION * abs(answer.bound):
                break
            self._cut(binaries, answer.point)
        return best[1] if best else None

    def solve(self, until: float, gap: float) -> tuple[Choice | None, float] | None:
        """Solve, add tangents at what was found, and again, until nothing new is found or the gap is closed."""
        weights = self.relax(monotonic() + (until - monotonic()) / 4)
        found: dict[Choice, float] = {}
        tried: set[Choice] = set()
        bound = -inf
        if weights is not None:
            self._start(weights, found, until)
        while monotonic() < until:
            answer = self.program.solve(self.objective, until - monotonic(), gap / 2)
            if answer.infeasible:
                return None, inf
            bound = max(bound, answer.bound * self.unit)
            if answer.point is not None:
                choice = self.program.choice(answer.point)
                if not self.program.admits(choice):
                    self.program.exclude(choice)
                    continue
                if choice in tried:
                    # The approximation is exact at its own optimum, but for the solver's tolerance in many rows.
                    proven = found[choice] - gap / 2 * abs(found[choice]) if answer.in_time else -inf
                    bound = max(bound, min(proven, min(found.values())))
                    break
                tried.add(choice)
                self._note(choice, found)
            best = min(found.values(), default=inf)
            if best - bound <= gap * abs(best):
                break
        return (min(found, key=found.__getitem__), bound) if found else None

    def _start(self, weights: Vector, found: dict[Choice, float], until: float) -> None:
        """A choice to have one early: the best by the tangent at the relaxed optimum."""
        z = self.brings @ weights
        slope = self.ways.T @ (self.ways @ z) + sum(rest.T @ (rest @ z) for rest in self.rests)
        answer = self.program.solve(self.costs + slope @ self.brings, (until - monotonic()) / 4, 1e-2)
        if answer.point is not None and self.program.admits(choice := self.program.choice(answer.point)):
            self._note(choice, found)

    def _note(self, choice: Choice, found: dict[Choice, float]) -> None:
        """Keep a choice and what local search makes of it, and add the tangents there."""
        for point in (choice, polished(self.program, self.brings, self.gram, choice)):
            found[point] = evaluate(self.program.problem, point)
            self._cut(self.program.point(point), None)

    def _squares(self, z: Vector) -> Vector:
        """The terms of the form."""
        return np.array([*(self.ways @ z) ** 2, *(np.sum((rest @ z) ** 2) for rest in self.rests)])

    def _cut(self, binaries: Vector, point: Vector | None) -> None:
        """Tangents at z of the binaries, those that `point` does not obey; all if it is None."""
        z = self.brings @ binaries
        wrong = np.full(len(self.halves), True)
        if point is not None:
            wrong = self._squares(z) / 2 - point[self.halves] > PRECISION / 100
        for at in np.flatnonzero(wrong).tolist():
            half = self.halves[at]
            if at < len(self.ways):
                place = float(self.ways[at] @ z)
                self.program.add_row({half: 1.0, self.along[at]: -place}, -place * place / 2)
                continue
            rest = self.rests[at - len(self.ways)]
            slope = rest.T @ (rest @ z)
            row = {self.items[item]: -float(slope[item]) for item in np.flatnonzero(slope)}
            self.program.add_row(row | {half: 1.0}, -float(z @ slope) / 2)


def _principal(form: Matrix) -> tuple[Matrix, list[Matrix]]:
    """The first principal directions, scaled, and the others together."""
    values, vectors = np.linalg.eigh(form)
    ways = (vectors * np.sqrt(np.maximum(values, 0.0))).T[::-1]
    return ways[:NUM_DIRECTIONS], [ways[NUM_DIRECTIONS:]]


def _neighbours(program: Program, form: Matrix) -> tuple[Matrix, list[Matrix]]:
    """No direction alone; the rows of the Cholesky factor of each layer and each link, in the order of layers."""
    problem = program.problem
    parts = [sorted(items) for items in problem.items_of_parts()]
    places = [*range(problem.num_layers), *(link.left + 0.5 for link in problem.links)]
    order = [item for at in np.argsort(places) for item in parts[at]]
    order += sorted(set(range(len(form))) - set(order))
    factor = np.zeros_like(form)
    level = float(np.diag(form).mean())
    factor[:, order] = np.linalg.cholesky(form[np.ix_(order, order)] + 1e-8 * level * np.eye(len(form))).T
    where = np.argsort(order)
    return np.zeros((0, len(form))), [factor[where[items]] for items in parts if items]
