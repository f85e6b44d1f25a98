"""Scores and costs put together: counts against real folders, scores against what was measured."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAMILIES, STUDENT_PLAN
from test_cost import TABLE

from ffn_fusion.core.budget import Ledger, Scores, Variants
from ffn_fusion.core.cost import BlockShape
from ffn_fusion.core.plan import Block, Plan
from ffn_fusion.core.problem import Choice, Problem, evaluate, items_of, plan_of, resources_used
from ffn_fusion.core.search_records import ChangeScore
from ffn_fusion.core.space import Sizes, changes
from ffn_fusion.core.stats import Estimate
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.speed.stacks import facts_of
from ffn_fusion.stages.entrants import cost_of

MULTIPLE = 256
NOTHING = Estimate(0.0, 0.0, 0.0, 0.0, 8)
PARENTS = ["A0F0 A1F1 A2F2 A3F3", "A0F0 -F1 A3 A4F4 A5F5", "A0F0 A1F1 A3F3"]
"""The second and third with padding at layer 2."""


def scored(parent: Plan, ledger: Ledger, sizes: Sizes) -> Scores:
    """Every change with a KL of its own, and deviations whose squared lengths are twice these."""
    rng = np.random.default_rng(0)
    found = [
        ChangeScore(
            change.first, change.last, str(change.block or ""), replace(NOTHING, mean=rng.uniform(0.01, 0.5)), NOTHING
        )
        for change in changes(parent, ledger.shapes, sizes)
    ]
    deviations = rng.normal(size=(len(found), 9)) + rng.normal(size=9)
    deviations *= (np.sqrt([2 * score.kl.mean for score in found]) / np.linalg.norm(deviations, axis=1))[:, None]
    return Scores(found, np.array([score.kl.mean for score in found]), deviations @ deviations.T)


def ledger_of(parent: Plan) -> Ledger:
    shapes = [BlockShape(0, 0)] * (parent.blocks[-1].layers[0] + 1)
    for block in parent.blocks:
        shapes[block.layers[0]] = BlockShape(2 if block.attention else 0, 512 if block.ffns else 0)
    return Ledger(TABLE, shapes, MULTIPLE)


def choice_of(problem: Problem, plan: Plan) -> Choice:
    """The choice that stands for a plan, found by looking through the options."""
    own = {block.layers[0]: block for block in plan.unfused().blocks}
    options = [[option.block for option in row].index(own.get(layer)) for layer, row in enumerate(problem.options)]
    return Choice(tuple(options), frozenset(layer for group in plan.groups for layer in group[:-1]))


@pytest.fixture(params=PARENTS)
def held(request: pytest.FixtureRequest) -> tuple[Plan, Ledger, Scores]:
    parent = Plan.parse(request.param)
    ledger = ledger_of(parent)
    return parent, ledger, scored(parent, ledger, Sizes((1,), (0.5,), True, MULTIPLE))


def problem_of(held: tuple[Plan, Ledger, Scores], strength: float = 0.25, fuse: bool = True) -> Problem:
    parent, ledger, scores = held
    return Variants(parent, scores).problem(ledger, {}, max_width=None, fuse=fuse, strength=strength)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ledger_counts_what_a_real_folder_has(
    family: str, tiny_parent: Callable[[str], Path], tiny_student: Callable[[str], Path]
) -> None:
    parent, student = ModelFolder(tiny_parent(family)), ModelFolder(tiny_student(family))
    table = replace(TABLE, facts=facts_of(parent), bytes_per_value=4)
    ledger = Ledger(table, parent.shapes, MULTIPLE)
    for uses, folder in (
        (ledger.parent(), parent),
        (ledger.model(Plan.parse(STUDENT_PLAN).blocks), student),
    ):
        real = cost_of(folder, torch.float32)
        assert uses["parameters"] == real.num_parameters
        assert uses["kv_bytes"] == real.kv_bytes_per_token
        assert uses["memory_bytes"] == real.memory_bytes(2, 16)
        assert uses["decode_ms"] == table.decode_ms(folder.shapes)
        assert uses["request_ms"] == table.request_ms(folder.shapes)
        assert uses["sublayers"] == real.num_sublayers
    assert ledger.parent()["sublayers"] == parent.plan.num_sublayers


def test_blocks_add_up_to_a_model() -> None:
    ledger = ledger_of(Plan.identity(4))
    for text in ("A0F0 A1/1F1:256 -F2 A3", "A0F0+1+2 A3LF3L"):
        plan = Plan.parse(text)
        parts = [ledger.fixed(), *map(ledger.block, plan.blocks)]
        assert {name: sum(part[name] for part in parts) for name in parts[0]} == pytest.approx(
            ledger.model(plan.blocks)
        )


def test_there_is_an_option_for_every_pair_of_attention_and_ffn(held: tuple[Plan, Ledger, Scores]) -> None:
    parent, ledger, _ = held
    problem = problem_of(held)
    assert problem.num_layers == len(ledger.shapes)
    for block in parent.blocks:
        layer = block.layers[0]
        heads = ["", "/1", "L", None] if block.attention else [None]
        ffns = ["", ":256", "L", None] if block.ffns else [None]
        words = [
            ("-" if a is None else f"A{layer}{a}") + ("" if f is None else f"F{layer}{f}")
            for a, f in product(heads, ffns)
        ]
        expected = {word for word in words if word != "-"}
        expected = {word for word in expected if layer or (word.startswith("A") and not word.startswith("A0L"))}
        expected |= {"None"} if layer else set()
        assert sorted(str(option.block) for option in problem.options[layer]) == sorted(expected)
    padding = set(range(len(ledger.shapes))) - {block.layers[0] for block in parent.blocks}
    assert all(str(problem.options[layer][0].block) == "None" and len(problem.options[layer]) == 1 for layer in padding)


def test_options_use_what_their_blocks_do(held: tuple[Plan, Ledger, Scores]) -> None:
    _, ledger, _ = held
    problem = problem_of(held)
    for option in (option for row in problem.options for option in row):
        if option.block:
            assert option.uses == ledger.block(option.block)
            assert option.width == sum(ffn.width or 512 for ffn in option.block.ffns)
            assert option.fusible is not option.block.has_linear_ffn
        else:
            assert not option.uses


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
def test_a_single_change_is_predicted_to_cost_what_was_measured(
    held: tuple[Plan, Ledger, Scores], strength: float
) -> None:
    """A link too, together with the removal of the attention that it implies."""
    parent, _, scores = held
    problem = problem_of(held, strength=strength)
    assert (problem.interactions is None) == (strength == 0)
    found = changes(parent, held[1].shapes, Sizes((1,), (0.5,), True, MULTIPLE))
    assert any(change.last > change.first for change in found)
    for change, score in zip(found, scores.changes, strict=True):
        choice = choice_of(problem, change.applied(parent))
        assert plan_of(problem, choice) == change.applied(parent)
        assert evaluate(problem, choice) == pytest.approx(score.kl.mean, abs=1e-12)


def test_two_changes_cost_their_interaction_beside_their_sum(held: tuple[Plan, Ledger, Scores]) -> None:
    parent, _, scores = held
    problem = problem_of(held, strength=0.5)
    first, second = (
        next(i for i, s in enumerate(scores.changes) if s.block == word) for word in ("A0/1F0", "A0F0:256")
    )
    changed = Plan((Block.parse("A0/1F0:256"), *parent.blocks[1:]))
    values = [scores.changes[i].kl.mean for i in (first, second)]
    assert evaluate(problem, choice_of(problem, changed)) == pytest.approx(sum(values) + scores.gram[first, second] / 2)


def test_links_save_what_two_ffns_cost_more_apart() -> None:
    parent = Plan.identity(4)
    ledger = ledger_of(parent)
    problem = problem_of((parent, ledger, scored(parent, ledger, Sizes((), ()))))
    assert [link.left for link in problem.links] == [0, 1, 2]
    one, both = (TABLE.sublayer_ms("ffn", width, "decode") for width in (512, 1024))
    saved = 2 * one - both
    assert saved > 0
    for link in problem.links:
        assert link.saves["decode_ms"] == pytest.approx(saved)
        assert link.saves["sublayers"] == 1
        assert link.saves["parameters"] == FFN_NORM
        assert link.saves["kv_bytes"] == 0
    plan = Plan.parse("A0F0+1 A3F3")
    assert resources_used(problem, choice_of(problem, plan)) == pytest.approx(ledger.model(plan.blocks))


FFN_NORM = TABLE.facts.counts.ffn
"""What an FFN has beside its channels; two that are fused have it once."""


def test_without_fusion_there_are_no_links(held: tuple[Plan, Ledger, Scores]) -> None:
    problem = problem_of(held, fuse=False)
    assert problem.links == []
    used = {item for row in problem.options for option in row for item in option.items}
    assert len(used) == sum(score.first == score.last for score in held[2].changes)
    parents = choice_of(problem, held[0])
    assert items_of(problem, parents) == []
    assert evaluate(problem, parents) == 0
