"""Outer approximation of a convex quadratic score (Duran and Grossmann 1986): a mixed-integer program and its cuts."""

from math import inf
from time import monotonic

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

from ffn_fusion.core.problem import Choice, evaluate
from ffn_fusion.core.program import Program, Vector

RELAXED_ROUNDS = 40


def split(
    gram: NDArray[np.float64], parts: list[list[int]], ridge: float = 1e-9
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gram = exact + rest, where `exact` has only entries within a part and `rest` is positive semidefinite.

    Of a part one option is chosen, so the pairs within it are a cost of that option and need no approximation.
    The more of them is taken out of the quadratic form, the tighter the relaxation of what is left (Billionnet and
    Elloumi 2007 do it with the diagonal). Taken is the largest multiple of the blocks of all parts that leaves the
    rest semidefinite: the least generalised eigenvalue. It is negative where `gram` itself is not semidefinite, so
    the result holds for every symmetric matrix.
    """
    blocks = np.zeros_like(gram)
    for items in parts:
        blocks[np.ix_(items, items)] = gram[np.ix_(items, items)]
    level = float(np.trace(blocks)) / max(len(gram), 1) or 1.0
    least = min(float(np.linalg.eigvalsh(blocks)[0]), 0.0) if len(gram) else 0.0
    blocks += (ridge * level - 2 * least) * np.eye(len(gram))
    share = float(eigh(gram, blocks, eigvals_only=True, subset_by_index=[0, 0])[0]) if len(gram) else 0.0
    exact = (share - ridge) * blocks
    return exact, gram - exact


class OuterApproximation:
    """Score = costs of the binaries + half of z' rest z, with z the items chosen. `epigraph` is the second term."""

    def __init__(self, program: Program, brings: Vector) -> None:
        problem = program.problem
        assert problem.interactions is not None
        gram = np.asarray(problem.interactions, dtype=np.float64)
        self.program, self.brings = program, brings
        parts = [sorted(items) for items in problem.items_of_parts() if items]
        exact, rest = split((gram + gram.T) / 2, parts)
        # In units of a typical score, so that the epigraph is of the size of the other columns.
        self.unit = float(np.abs(problem.scores).mean()) or 1.0
        single = np.asarray(problem.scores) - np.diag(gram) / 2
        pairs = np.einsum("kv,kl,lv->v", brings, exact, brings, optimize=True) / 2
        self.costs, self.rest = (single @ brings + pairs) / self.unit, rest / self.unit
        self.items = [program.add_column(1.0) for _ in range(len(gram))]
        for item, column in enumerate(self.items):
            bringing = np.flatnonzero(brings[item])
            program.add_row(dict.fromkeys(bringing.tolist(), -1.0) | {column: 1.0}, 0, 0)
        self.epigraph = program.add_column()
        self.objective = np.zeros(self.epigraph + 1)
        self.objective[: program.num_binary] = self.costs
        self.objective[self.epigraph] = 1.0

    def solve(self, until: float, gap: float) -> tuple[Choice | None, float] | None:
        """The best choice found and a bound of the best score; the result of `least` in solve.py."""
        self._relax(until)
        problem, tried = self.program.problem, dict[Choice, float]()
        bound = -inf
        while True:
            answer = self.program.solve(self.objective, until - monotonic(), gap / 2)
            if answer.infeasible:
                return None, inf
            bound = max(bound, answer.bound * self.unit)
            if answer.point is not None:
                choice = self.program.choice(answer.point)
                if not self.program.admits(choice):
                    self.program.exclude(choice)
                    continue
                if choice in tried:  # its tangent is there: the approximation is exact at its own optimum
                    break
                tried[choice] = evaluate(problem, choice)
                self._cut(np.round(answer.point))
            best = min(tried.values(), default=inf)
            if best - bound <= gap * abs(best) or monotonic() >= until:
                break
        return (min(tried, key=tried.__getitem__), bound) if tried else None

    def _relax(self, until: float) -> None:
        """Cuts at the optima of the relaxation, until they no longer raise it."""
        for _ in range(RELAXED_ROUNDS):
            answer = self.program.solve(self.objective, until - monotonic(), whole=False)
            if answer.point is None:
                return
            z = answer.point[self.items]
            if z @ self.rest @ z / 2 - answer.point[self.epigraph] <= 1e-4 * abs(answer.bound):
                return
            self._cut(answer.point)

    def _cut(self, point: Vector) -> None:
        """The tangent at a point: epigraph >= z' rest z0 - z0' rest z0 / 2."""
        z = self.brings @ point[: self.program.num_binary]
        slope = self.rest @ z
        row = dict(zip(self.items, (-slope).tolist(), strict=True)) | {self.epigraph: 1.0}
        self.program.add_row(row, -float(z @ slope) / 2)
