"""Local search from a choice: better options for one layer or two, within all limits."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from ffn_fusion.core.convex import Matrix
from ffn_fusion.core.problem import ROUNDING, Choice, Problem, chosen, evaluate, groups_of, resources_used
from ffn_fusion.core.program import Program

MAX_PAIRED = 2_000
"""Options up to which all pairs of them are looked at."""


def polished(program: Program, brings: Matrix, gram: Matrix, choice: Choice) -> Choice:
    """The choice after exchanging the options of one layer or two as long as the score falls; links stay."""
    brings, score = brings[:, : program.num_options], evaluate(program.problem, choice)
    curves = (csr_array(brings.T) @ gram).T
    while True:
        better = _exchanged(program, brings, gram, curves, choice)
        if not program.admits(better) or (after := evaluate(program.problem, better)) >= score:
            return choice
        choice, score = better, after


def _exchanged(program: Program, brings: Matrix, gram: Matrix, curves: Matrix, choice: Choice) -> Choice:
    """The best exchange of the options of at most two layers that keeps the limits; `curves` is gram times brings."""
    problem = program.problem
    sizes = [len(options) for options in problem.options]
    layer_of = np.repeat(np.arange(problem.num_layers), sizes)
    now = program.starts[:-1] + np.array(choice.options)
    z = brings[:, now].sum(axis=1) + _linked(problem, choice, len(gram))
    change = brings - brings[:, now[layer_of]]
    curved = curves - curves[:, now[layer_of]]
    single = (np.asarray(problem.scores) - np.diag(gram) / 2) @ change + z @ curved + (change * curved).sum(axis=0) / 2
    single[~_allowed(problem, choice)] = np.inf
    amounts = [program.amounts(name)[: program.num_options] for name in program.limits]
    more = [amount - amount[now[layer_of]] for amount in amounts]
    used = resources_used(problem, choice)
    room = [limit + ROUNDING * abs(limit) - used[name] for name, limit in program.limits.items()]
    if program.num_options > MAX_PAIRED:
        for extra, left in zip(more, room, strict=True):
            single = np.where(extra > left, np.inf, single)
        taken = [int(np.argmin(single))]
    else:
        pairs = single[:, None] + single[None, :] + change.T @ curved
        pairs[layer_of[:, None] == layer_of[None, :]] = np.inf
        for extra, left in zip(more, room, strict=True):
            pairs[extra[:, None] + extra[None, :] > left] = np.inf
        taken = [int(at) for at in np.unravel_index(np.argmin(pairs), pairs.shape)]
    options = list(choice.options)
    for column in taken:
        options[layer_of[column]] = column - int(program.starts[layer_of[column]])
    return replace(choice, options=tuple(options))


def _linked(problem: Problem, choice: Choice, num_items: int) -> Matrix:
    """1 for each item of a link made."""
    z = np.zeros(num_items)
    z[[link.item for link in problem.links if link.left in choice.links and link.item is not None]] = 1.0
    return z


def _allowed(problem: Problem, choice: Choice) -> NDArray[np.bool_]:
    """Options that can take the place of their layer's without breaking a group or making one wider."""
    grouped = {layer for group in groups_of(choice) for layer in group}
    followers = {layer + 1 for layer in choice.links}
    return np.array(
        [
            layer not in grouped
            or (option.may_lead and option.width <= own.width and (layer not in followers or option.may_follow))
            for layer, (own, options) in enumerate(zip(chosen(problem, choice), problem.options, strict=True))
            for option in options
        ]
    )
