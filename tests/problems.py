"""Problems of choice for the tests of the search, and a slow, obvious solution of them."""

from collections.abc import Mapping
from itertools import chain, combinations, product

import numpy as np
from hypothesis import strategies as st

from ffn_fusion.core.plan import Attention, Block, Ffn
from ffn_fusion.core.problem import Choice, Link, Option, Problem

WIDTH = 8


def layer_options(layer: int, first_item: int, speed: float) -> list[Option]:
    """The parent's layer, its attention or FFN removed or cut, and (not of layer 0) the whole layer dropped.

    Items: no attention, FFN of half the channels, a linear FFN, no FFN.
    """
    options = []
    for attention, ffn in product((0, 1), (0, 1, 2, 3)):
        if layer == 0 and attention:
            continue
        items = tuple(first_item + item for item in ([0] if attention else []) + ([ffn] if ffn else []))
        width = (WIDTH, WIDTH // 2, 0, 0)[ffn]
        ffns = (Ffn(layer, WIDTH // 2 if ffn == 1 else None),) if ffn < 3 else ()
        head = None if attention else Attention(layer)
        uses = {"ms": (0 if attention else 2 * speed) + (3, 2, 1, 0)[ffn], "bytes": 4.0 * (not attention) + width}
        uses |= {"parameters": 10.0 * (not attention) + 3 * width + (ffn == 2)}
        options.append(Option(Block(head, ffns) if head or ffns else None, items, uses, width, ffn != 2))
    return options


@st.composite
def small(draw: st.DrawFn, interactions: bool | None = None) -> Problem:
    """Two or three layers, some links, perhaps a widest group, random limits and perhaps interactions."""
    num_layers = draw(st.integers(2, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    keep = draw(st.sampled_from([0.4, 0.7, 1.0]))
    options = []
    for layer in range(num_layers):
        all_options = layer_options(layer, 4 * layer, float(rng.choice([0.5, 1.0, 1.7])))
        options.append([all_options[0], *(option for option in all_options[1:] if rng.random() < keep)])
    lefts = draw(st.sets(st.integers(0, num_layers - 2)))
    links = [
        Link(left, 4 * num_layers + i if rng.random() < 0.8 else None, {"ms": float(rng.uniform(0.2, 1.5))})
        for i, left in enumerate(sorted(lefts))
    ]
    num_items = 4 * num_layers + len(links)
    deviations = rng.normal(size=(num_items, draw(st.sampled_from([3, 40])))) + rng.normal()
    deviations *= rng.uniform(0.05, 1, size=(num_items, 1))
    gram = deviations @ deviations.T
    scores = np.diag(gram) / 2 * rng.uniform(0.6, 1.4, num_items)
    most = {name: sum(row[0].uses[name] for row in options) for name in ("ms", "bytes")}
    parts = draw(st.dictionaries(st.sampled_from(["ms", "bytes"]), st.sampled_from([0.3, 0.5, 0.75, 1.0])))
    return Problem(
        options,
        scores.tolist(),
        {name: part * most[name] + 1 for name, part in parts.items()},
        {"ms": 1.0, "bytes": 1.0},
        links,
        gram if interactions or (interactions is None and draw(st.booleans())) else None,
        draw(st.sampled_from([None, WIDTH // 2, WIDTH, 2 * WIDTH, 3 * WIDTH])),
    )


def score_of(problem: Problem, choice: Choice) -> float:
    """The definition: every single score, and every pair's interaction."""
    options = [options[index] for options, index in zip(problem.options, choice.options, strict=True)]
    items = list(chain.from_iterable(option.items for option in options))
    items += [link.item for link in problem.links if link.left in choice.links and link.item is not None]
    pairs = 0.0
    if problem.interactions is not None:
        pairs = sum(problem.interactions[k][m] for k, m in combinations(items, 2))
    return sum(problem.scores[item] for item in items) + pairs


def used_by(problem: Problem, choice: Choice) -> Mapping[str, float]:
    used = dict.fromkeys(("ms", "bytes", "parameters"), 0.0)
    for name in used:
        used[name] += problem.fixed.get(name, 0.0)
        used[name] += sum(row[i].uses.get(name, 0.0) for row, i in zip(problem.options, choice.options, strict=True))
        used[name] -= sum(link.saves.get(name, 0.0) for link in problem.links if link.left in choice.links)
    return used


def every_choice(problem: Problem) -> dict[Choice, float]:
    """Every choice that is allowed, with its score."""
    lefts = [link.left for link in problem.links]
    subsets = list(chain.from_iterable(combinations(lefts, n) for n in range(len(lefts) + 1)))
    found = {}
    for indexes in product(*(range(len(row)) for row in problem.options)):
        for links in subsets:
            choice = Choice(indexes, frozenset(links))
            used = used_by(problem, choice)
            if _can_be_built(problem, choice) and all(used[r] <= most + 1e-9 for r, most in problem.limits.items()):
                found[choice] = score_of(problem, choice)
    return found


def _can_be_built(problem: Problem, choice: Choice) -> bool:
    blocks = [row[i] for row, i in zip(problem.options, choice.options, strict=True)]
    if not any(option.block and option.block.ffns for option in blocks):
        return False
    total = 0
    for layer, option in enumerate(blocks):
        if layer - 1 not in choice.links:
            total = option.width
            continue
        before = blocks[layer - 1]
        for member in (before, option):
            if member.block is None or not member.block.ffns or not member.fusible:
                return False
        if option.block is None or option.block.attention:
            return False
        total += option.width
        if problem.max_width is not None and total > problem.max_width:
            return False
    return True


def large(num_layers: int, interactions: bool = False, part: float = 0.6, seed: int = 0) -> Problem:
    """Six attention and nine FFN variants a layer, with costs and scores of a plausible size; scores grow with the cut.

    Deviations are those of a layer's sublayer, of the variant alone, and one that all have in common.
    """
    rng = np.random.default_rng(seed)
    width, dim = 53_248, 2_000
    scores: list[float] = []
    deviations: list[np.ndarray] = []

    def item(cut: float, own: np.ndarray, size: float) -> int:
        alone = rng.standard_normal(dim) * 0.6
        deviations.append((0.7 * own + alone + 0.3 * common) * np.sqrt(size * cut**1.5 / dim))
        scores.append(float(deviations[-1] @ deviations[-1]) / 2 * rng.uniform(0.8, 1.2))
        return len(scores) - 1

    common = rng.standard_normal(dim)
    options = []
    for layer in range(num_layers):
        own = rng.standard_normal((2, dim))
        sizes = np.exp(rng.normal([-4, -3], 0.8))
        heads = [(Attention(layer, kv if kv < 8 else None), 1 - kv / 10) for kv in (8, 4, 2, 1)]
        heads += [(Attention(layer, 3), 0.95), (None, 1.0)]
        shares = [1.0, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.05, 0.0]
        attentions = [(head, () if not at else (item(cut, own[0], sizes[0]),)) for at, (head, cut) in enumerate(heads)]
        ffns = [(share, () if share == 1 else (item(1 - share, own[1], sizes[1]),)) for share in shares]
        row = []
        for (head, changed), (share, cut) in product(attentions[: 6 if layer else 5], ffns):
            ffn = (Ffn(layer, round(share * width) if share < 1 else None),) if share else ()
            kv_heads = 0 if head is None else head.kv_heads or 8
            uses = {"ms": (0.05 + 0.004 * kv_heads) * (head is not None) + (0.03 + 0.09 * share) * bool(ffn)}
            uses["bytes"] = 6e8 * (head is not None) + 4e7 * kv_heads + 2.6e9 * share
            uses["parameters"] = 6e8 * (head is not None) + 3e7 * kv_heads + 2.6e9 * share
            block = Block(head, ffn) if head or ffn else None
            row.append(Option(block, (*changed, *cut), uses, round(share * width)))
        options.append(row)
    links = [
        Link(left, item(1.0, rng.standard_normal(dim), float(np.exp(rng.normal(-4.5, 1)))), {"ms": 0.03})
        for left in range(num_layers - 1)
    ]
    gram = np.array(deviations) @ np.array(deviations).T if interactions else None
    limits = {name: part * sum(row[0].uses[name] for row in options) for name in ("ms", "bytes")}
    return Problem(options, scores, limits, {}, links, gram, 8 * width)
