"""The search for a plan as a problem of choice: one option for every layer, within limits, at the least score.

Puzzle (arXiv 2411.19146, Appendix B) chooses one variant a layer by its additive score. Two things are added here:
links, so that the groups of FFN Fusion (arXiv 2503.18908) are found in the same search, and interactions, since the
KL of two changes made together is not the sum of the two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum

import numpy as np
from numpy.typing import NDArray

from ffn_fusion.core.plan import Block, Plan

ROUNDING = 1e-9
"""A limit holds if it is passed by no more than this part of it, which is the rounding of long sums."""


@dataclass(frozen=True)
class Option:
    """One way to build one layer of the parent. An option without `items` is the parent's own layer."""

    block: Block | None
    """A block of this layer alone; None if the whole layer is dropped."""
    items: tuple[int, ...] = ()
    """Indexes of the scored changes that it consists of, for example one of the attention and one of the FFN."""
    uses: Mapping[str, float] = field(default_factory=dict)
    """Amount of each resource, in a unit of the resource's own."""
    width: int = 0
    """Channels of its FFN; they count towards the widest group."""
    fusible: bool = True
    """Whether its FFN, if there is one, may share its input with others."""

    @property
    def has_ffn(self) -> bool:
        return self.block is not None and bool(self.block.ffns)

    @property
    def may_lead(self) -> bool:
        """Whether the next layer's FFN can be fused with it."""
        return self.has_ffn and self.fusible

    @property
    def may_follow(self) -> bool:
        """Whether it can be fused with the FFN before it, which its own attention would have to see."""
        return self.may_lead and self.block is not None and self.block.attention is None


@dataclass(frozen=True)
class Link:
    """The FFN of layer `left` and that of the next layer share an input. Chains of links are the fused groups."""

    left: int
    item: int | None = None
    """The scored change of fusing these two; None if it costs nothing."""
    saves: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """What there is to choose from. Each item is that of one layer's options or of one link."""

    options: Sequence[Sequence[Option]]
    """The options of each layer."""
    scores: Sequence[float]
    """Of each item: the KL when this change alone is made."""
    limits: Mapping[str, float]
    """The most that may be used of each limited resource."""
    fixed: Mapping[str, float] = field(default_factory=dict)
    """What is used whatever is chosen, such as the memory of the embedding."""
    links: Sequence[Link] = ()
    interactions: NDArray[np.float64] | None = None
    """Gram matrix of the items' deviations: [k, l] is what both together cost above the sum of the two."""
    max_width: int | None = None
    """Channels of the widest fused FFN."""

    def __post_init__(self) -> None:
        owners: dict[int, int] = {}
        for owner, items in enumerate(self.items_of_parts()):
            for item in items:
                if owners.setdefault(item, owner) != owner:
                    raise ValueError(f"item {item} is a change of two layers or links; give each its own")
        lefts = [link.left for link in self.links]
        if len(set(lefts)) < len(lefts) or not set(lefts) <= set(range(len(self.options) - 1)):
            raise ValueError(f"links begin at layers {lefts}; expected each once, and not the last layer")
        if any(option.block is None or option.block.attention is None for option in self.options[0]):
            raise ValueError("every option of layer 0 needs an attention: engines size their cache by it")

    def items_of_parts(self) -> list[set[int]]:
        """Items of each layer's options and then of each link: of one part, one option is chosen."""
        layers = [{item for option in options for item in option.items} for options in self.options]
        return layers + [set() if link.item is None else {link.item} for link in self.links]

    @property
    def num_layers(self) -> int:
        return len(self.options)

    @property
    def resources(self) -> list[str]:
        """Every resource that is limited or used."""
        named = [option.uses for options in self.options for option in options] + [link.saves for link in self.links]
        return list(dict.fromkeys(name for uses in [self.limits, self.fixed, *named] for name in uses))


@dataclass(frozen=True)
class Choice:
    """Index of the option taken for each layer, and the layers whose FFN is fused with the next one's."""

    options: tuple[int, ...]
    links: frozenset[int] = frozenset()

    def shared(self, other: "Choice") -> int:
        """Layers that two choices build alike: the same option, and fused with the next layer in both or neither."""
        return sum(
            mine == theirs and (layer in self.links) == (layer in other.links)
            for layer, (mine, theirs) in enumerate(zip(self.options, other.options, strict=True))
        )


def chosen(problem: Problem, choice: Choice) -> list[Option]:
    return [options[index] for options, index in zip(problem.options, choice.options, strict=True)]


def items_of(problem: Problem, choice: Choice) -> list[int]:
    """The scored changes that a choice makes."""
    items = [item for option in chosen(problem, choice) for item in option.items]
    return items + [link.item for link in problem.links if link.left in choice.links and link.item is not None]


def evaluate(problem: Problem, choice: Choice) -> float:
    """Predicted score: the sum of the single scores and of the interactions of every pair of changes made."""
    items = items_of(problem, choice)
    pairs = 0.0
    if problem.interactions is not None:
        gram = problem.interactions[np.ix_(items, items)]
        pairs = float(gram.sum() - np.trace(gram)) / 2
    return fsum(problem.scores[item] for item in items) + pairs


def resources_used(problem: Problem, choice: Choice) -> dict[str, float]:
    """Exact amount of every resource."""
    uses = [problem.fixed, *(option.uses for option in chosen(problem, choice))]
    saves = [link.saves for link in problem.links if link.left in choice.links]
    return {
        name: fsum([*(amounts.get(name, 0.0) for amounts in uses), *(-amounts.get(name, 0.0) for amounts in saves)])
        for name in problem.resources
    }


def passed(limits: Mapping[str, float], used: Mapping[str, float]) -> list[str]:
    """Limited resources of which more is used than may be."""
    return [name for name, limit in limits.items() if used[name] - limit > ROUNDING * abs(limit)]


def groups_of(choice: Choice) -> list[list[int]]:
    """Layers of each fused group."""
    groups: list[list[int]] = []
    for left in sorted(choice.links):
        if groups and groups[-1][-1] == left:
            groups[-1].append(left + 1)
        else:
            groups.append([left, left + 1])
    return groups


def is_buildable(problem: Problem, choice: Choice) -> bool:
    """Whether the choice is a plan whose groups are allowed; limits of resources are not looked at."""
    options = chosen(problem, choice)
    if not any(option.has_ffn for option in options):
        return False
    if not all(options[left].may_lead and options[left + 1].may_follow for left in choice.links):
        return False
    widest = max((sum(options[layer].width for layer in group) for group in groups_of(choice)), default=0)
    return problem.max_width is None or widest <= problem.max_width


def plan_of(problem: Problem, choice: Choice) -> Plan:
    """The plan that a buildable choice stands for. Dropped layers vanish."""
    options = chosen(problem, choice)
    plan = Plan(tuple(option.block for option in options if option.block))
    for group in groups_of(choice):
        blocks = [options[layer].block for layer in group]
        plan = plan.fuse([ffn.layer for block in blocks if block for ffn in block.ffns])
    return plan
