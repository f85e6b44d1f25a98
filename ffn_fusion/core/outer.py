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

    The form is a sum of squares along its principal directions; each of the first has a column for its coordinate
    and one for half of its square, and the others have one column together.
    """

    def __init__(self, program: Program, brings: Matrix, gram: Matrix, blocks: Matrix) -> None:
        self.program, self.brings, self.gram = program, brings, gram
        scores = np.asarray(program.problem.scores, dtype=np.float64)
        # In units of a typical score, so that all columns are of one size.
        self.unit = float(np.abs(scores).mean()) or 1.0
        exact = np.einsum("kv,kl,lv->v", brings, blocks, brings, optimize=True) / 2
        self.costs = ((scores - np.diag(gram) / 2) @ brings + exact) / self.unit
        values, vectors = np.linalg.eigh((gram - blocks) / self.unit)
        ways = (vectors * np.sqrt(np.maximum(values, 0.0))).T[::-1]
        self.ways, others = ways[:NUM_DIRECTIONS], ways[NUM_DIRECTIONS:]
        self.others = others.T @ others
        self.items = [program.add_column(1.0) for _ in range(len(gram))]
        for item, column in enumerate(self.items):
            row = dict.fromkeys(np.flatnonzero(brings[item]).tolist(), -1.0)
            program.add_row(row | {column: 1.0}, 0, 0)
        self.along = [program.add_column(lower=-inf) for _ in self.ways]
        for way, column in zip(self.ways, self.along, strict=True):
            program.add_row(dict(zip(self.items, way.tolist(), strict=True)) | {column: -1.0}, 0, 0)
        self.halves = [program.add_column() for _ in self.ways]
        self.rest = program.add_column()
        self.objective = np.zeros(self.rest + 1)
        self.objective[: program.num_binary] = self.costs
        self.objective[[*self.halves, self.rest]] = 1.0

    def relax(self, until: float) -> Vector | None:
        """Add tangents at optima of the relaxation until it is exact there; the binaries at the best point."""
        best: tuple[float, Vector] | None = None
        for _ in range(ROUNDS):
            answer = self.program.solve(self.objective, until - monotonic(), whole=False)
            if answer.point is None:
                break
            binaries = answer.point[: self.program.num_binary]
            z = self.brings @ binaries
            value = float(self.costs @ binaries + np.sum((self.ways @ z) ** 2) / 2 + z @ self.others @ z / 2)
            if best is None or value < best[0]:
                best = value, binaries
            if best[0] - answer.bound <= PRECISION * abs(answer.bound):
                break
            self._cut(binaries, answer.point)
        return best[1] if best else None

    def solve(self, until: float, gap: float) -> tuple[Choice | None, float] | None:
        """Solve, add tangents at what was found, and again, until nothing new is found or the gap is closed."""
        self.relax(until)
        found: dict[Choice, float] = {}
        tried: set[Choice] = set()
        bound = -inf
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
                if choice in tried:  # the approximation is exact at its own optimum
                    break
                tried.add(choice)
                for point in (choice, polished(self.program, self.brings, self.gram, choice)):
                    found[point] = evaluate(self.program.problem, point)
                    self._cut(self.program.point(point), None)
            best = min(found.values(), default=inf)
            if best - bound <= gap * abs(best):
                break
        return (min(found, key=found.__getitem__), bound) if found else None

    def _cut(self, binaries: Vector, point: Vector | None) -> None:
        """Tangents at z of the binaries, those that `point` does not obey; all if it is None."""
        z = self.brings @ binaries
        for way, along, half in zip(self.ways, self.along, self.halves, strict=True):
            at = float(way @ z)
            if point is None or at * at / 2 - point[half] > PRECISION / 100:
                self.program.add_row({half: 1.0, along: -at}, -at * at / 2)
        slope = self.others @ z
        row = dict(zip(self.items, (-slope).tolist(), strict=True)) | {self.rest: 1.0}
        self.program.add_row(row, -float(z @ slope) / 2)
