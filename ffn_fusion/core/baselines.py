"""Rivals of the search: simpler ways to choose, in the same terms and within the same limits.

Puzzle (arXiv 2411.19146, section on ablations) compares its mixed-integer program with a greedy search, with the most
parameters that fit and with random choices from its library. ShortGPT (arXiv 2403.03853) drops layers, LLM-Drop
(arXiv 2406.15786) layers and sublayers, in the order of how little they change what goes through them.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import fsum
from time import monotonic
from typing import Literal

from ffn_fusion.core.plan import Block
from ffn_fusion.core.problem import Choice, Link, Option, Problem, chosen, is_buildable, passed, resources_used
from ffn_fusion.core.program import Program
from ffn_fusion.core.solve import Solution, infeasible, least, solution_of
from ffn_fusion.errors import UserError

RESTARTS = 100


@dataclass(frozen=True)
class _Change:
    """Another option for a layer, or (`option` None) its FFN fused with the next one's."""

    layer: int
    option: int | None
    score: float
    """What the single scores rise by."""
    saves: Mapping[str, float]

    def made(self, choice: Choice) -> Choice:
        if self.option is None:
            return Choice(choice.options, choice.links | {self.layer})
        options = (*choice.options[: self.layer], self.option, *choice.options[self.layer + 1 :])
        return Choice(options, choice.links)


def greedy(problem: Problem, *, links: bool = False) -> Solution:
    """Make the change of least score per unit saved of the tightest resource, one by one, until the limits hold.

    The tightest resource is the one that is passed by the largest part. Scores are the single ones: interactions are
    not looked at and nothing is measured anew. What turns out unneeded at the end is undone, the costliest first.
    This is the usual rule for knapsacks; Puzzle compares with a greedy search, too, which need not be this one.
    """
    choice, changes = _parents(problem), _Changes(problem, links)
    while _excess(problem, used := resources_used(problem, choice)):
        tight = max(problem.limits, key=lambda name: _part_over(problem, name, used))
        useful = [change for change in changes.of(choice) if change.saves.get(tight, 0.0) > 0]
        useful.sort(key=lambda change: change.score / change.saves[tight])
        made = next(_that_help(problem, choice, useful), None)
        if made is None:
            raise _stuck(problem, "the greedy search ends", used)
        choice = made
    return solution_of(problem, _undone(problem, choice), "greedy")


def at_random(problem: Problem, seed: int, *, links: bool = False) -> Solution:
    """Random changes, each of which brings the model nearer to its limits, until they hold (Puzzle, ablations)."""
    rng, changes = random.Random(seed), _Changes(problem, links)
    for _ in range(RESTARTS):
        choice: Choice | None = _parents(problem)
        while choice and _excess(problem, used := resources_used(problem, choice)):
            tried = changes.of(choice)
            rng.shuffle(tried)
            choice = next(_that_help(problem, choice, tried), None)
        if choice:
            return solution_of(problem, choice, "random")
    raise _stuck(problem, f"{RESTARTS} random searches end", used)


def max_parameters(problem: Problem, *, links: bool = False, seconds: float = 60) -> Solution:
    """The choice that keeps the most of the resource "parameters" within the limits (Puzzle, ablations)."""
    program = Program(problem if links else replace(problem, links=()), problem.limits)
    answer = least(program, -program.amounts("parameters"), monotonic() + seconds, 1e-4)
    if answer is None:
        raise UserError(f"the most parameters were not found in {seconds:g} s; allow more time")
    if answer[0] is None:
        raise infeasible(problem, seconds)
    return solution_of(problem, answer[0], "most parameters")


def drop_in_order(problem: Problem, ranking: Iterable[tuple[int, Literal["attention", "ffn", "layer"]]]) -> Solution:
    """Drop the sublayers and layers of a ranking, first to last, until the limits hold.

    A ranking is that of a criterion, such as block influence (ShortGPT) or the similarity of a sublayer's input and
    output (LLM-Drop). An entry for which the problem has no option, as the attention of layer 0, is passed over.
    """
    choice = _parents(problem)
    for layer, part in ranking:
        if not passed(problem.limits, resources_used(problem, choice)):
            break
        left = _without(chosen(problem, choice)[layer].block, part)
        index = next((at for at, option in enumerate(problem.options[layer]) if option.block == left), None)
        if index is not None:
            dropped = _Change(layer, index, 0.0, {}).made(choice)
            choice = dropped if is_buildable(problem, dropped) else choice
    used = resources_used(problem, choice)
    if passed(problem.limits, used):
        raise _stuck(problem, "dropping the whole ranking ends", used)
    return solution_of(problem, choice, "dropped in order")


def _without(block: Block | None, part: str) -> Block | None:
    attention = None if block is None or part in ("attention", "layer") else block.attention
    ffns = () if block is None or part in ("ffn", "layer") else block.ffns
    return Block(attention, ffns) if attention or ffns else None


def _parents(problem: Problem) -> Choice:
    """The parent itself."""
    own = [next((at for at, option in enumerate(options) if not option.items), None) for options in problem.options]
    if None in own:
        raise ValueError(f"layer {own.index(None)} has no option without items, which is the parent's own")
    return Choice(tuple(at for at in own if at is not None))


class _Changes:
    """All single changes of a choice, buildable or not; those of a layer are kept until its option changes."""

    def __init__(self, problem: Problem, links: bool) -> None:
        self.problem = problem
        self.links = {
            link.left: _Change(link.left, None, _single(problem, link), link.saves)
            for link in (problem.links if links else ())
        }
        self._known: dict[tuple[int, int], list[_Change]] = {}

    def of(self, choice: Choice) -> list[_Change]:
        found = [change for left, change in self.links.items() if left not in choice.links]
        for layer, index in enumerate(choice.options):
            if (layer, index) not in self._known:
                self._known[layer, index] = self._of_layer(layer, index)
            found += self._known[layer, index]
        return found

    def _of_layer(self, layer: int, index: int) -> list[_Change]:
        options, limits = self.problem.options[layer], self.problem.limits
        now, before = options[index].uses, _single(self.problem, options[index])
        return [
            _Change(
                layer,
                at,
                _single(self.problem, option) - before,
                {name: now.get(name, 0.0) - option.uses.get(name, 0.0) for name in limits},
            )
            for at, option in enumerate(options)
            if at != index
        ]


def _single(problem: Problem, part: Option | Link) -> float:
    items: Sequence[int] = part.items if isinstance(part, Option) else [] if part.item is None else [part.item]
    return fsum(problem.scores[item] for item in items)


def _that_help(problem: Problem, choice: Choice, changes: Iterable[_Change]) -> Iterator[Choice]:
    """Choices after one of `changes`, in their order, that can be built and pass the limits by less."""
    used = resources_used(problem, choice)
    excess = _excess(problem, used)
    for change in changes:
        after = {name: amount - change.saves.get(name, 0.0) for name, amount in used.items()}
        if _excess(problem, after) < excess and is_buildable(problem, made := change.made(choice)):
            yield made


def _undone(problem: Problem, choice: Choice) -> Choice:
    """The choice with what the limits do not need undone, the costliest first, as far as they allow."""
    own = _parents(problem)
    now = chosen(problem, choice)
    layers = sorted(range(problem.num_layers), key=lambda layer: -_single(problem, now[layer]))
    for link in sorted(problem.links, key=lambda link: -_single(problem, link)):
        choice = _if_allowed(problem, Choice(choice.options, choice.links - {link.left}), choice)
    for layer in layers:
        scored = sorted(range(len(problem.options[layer])), key=lambda at: _single(problem, problem.options[layer][at]))
        for at in (own.options[layer], *scored):
            if _single(problem, problem.options[layer][at]) >= _single(problem, now[layer]):
                continue
            changed = _if_allowed(problem, _Change(layer, at, 0.0, {}).made(choice), choice)
            if changed is not choice:
                choice = changed
                break
    return choice


def _if_allowed(problem: Problem, wanted: Choice, else_: Choice) -> Choice:
    allowed = is_buildable(problem, wanted) and not passed(problem.limits, resources_used(problem, wanted))
    return wanted if allowed else else_


def _excess(problem: Problem, used: Mapping[str, float]) -> float:
    """By how many parts of their limits all resources together are passed."""
    return fsum(_part_over(problem, name, used) for name in passed(problem.limits, used))


def _part_over(problem: Problem, name: str, used: Mapping[str, float]) -> float:
    return (used[name] - problem.limits[name]) / (abs(problem.limits[name]) or 1.0)


def _stuck(problem: Problem, what: str, used: Mapping[str, float]) -> UserError:
    over = (f"{name} {used[name]:g} (limit {problem.limits[name]:g})" for name in passed(problem.limits, used))
    return UserError(f"{what} at {' and '.join(over)}; raise the limit or offer more options")
