"""Named shapes: the released models' own counts, and the same counts as the models that are built of them."""

import json
from pathlib import Path

import pytest
import torch

from ffn_fusion.core.plan import Plan
from ffn_fusion.core.shapes import SHAPES, ULTRA_GROUPS, cost_of_shape, steps_of
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.stages.entrants import cost_of


def steps(name: str) -> dict[str, Plan]:
    shape = SHAPES[name]
    return steps_of(Plan.identity(shape.config["num_hidden_layers"]), Plan.parse(shape.plan) if shape.plan else None)


@pytest.mark.parametrize(
    ("name", "step", "billions", "attentions", "sublayers"),
    [
        ("smollm2-135m", "parent", 0.1345, 30, 60),
        ("llama-3.1-8b", "parent", 8.030, 32, 64),
        ("llama-3.1-70b", "parent", 70.55, 80, 160),
        ("llama-3.1-405b", "parent", 405.9, 126, 252),
        ("super-49b", "searched", 49.87, 49, 129),
        ("super-49b", "fused", 49.87, 49, 105),
        ("ultra-253b", "searched", 253.4, 64, 190),
        ("ultra-253b", "fused", 253.4, 64, 145),
    ],
)
def test_counts_are_those_of_the_released_models(
    name: str, step: str, billions: float, attentions: int, sublayers: int
) -> None:
    cost = cost_of_shape(SHAPES[name].config, steps(name)[step], 2)
    assert cost.num_parameters / 1e9 == pytest.approx(billions, rel=1e-3)
    assert (cost.num_attentions, cost.num_sublayers) == (attentions, sublayers)


def test_ultra_is_fused_as_it_was_released() -> None:
    fused = steps("ultra-253b")["fused"]
    assert [(group[0], group[-1]) for group in fused.groups] == list(ULTRA_GROUPS)
    assert len(fused.blocks) == 81
    widths = {block.ffns[0].layer: sum(ffn.width or 53248 for ffn in block.ffns) for block in fused.blocks}
    assert [widths[first] for first, _ in ULTRA_GROUPS] == [399360, 425984, 343040, 301056]


def test_steps_that_change_nothing_are_left_out() -> None:
    assert list(steps("llama-3.1-70b")) == ["parent"]
    parent = Plan.parse("A0F0 A1F1 A2F2")
    assert list(steps_of(parent, Plan.parse("A0F0 -F1 A2F2"))) == ["parent", "searched"]
    assert list(steps_of(parent, Plan.parse("A0F0 -F1+2"))) == ["parent", "searched", "fused"]


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3.1-8b"])
def test_counts_are_those_of_the_model_that_is_built(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(dict(SHAPES[name].config)))
    parent = steps(name)["parent"]
    built, counted = cost_of(ModelFolder(tmp_path), torch.bfloat16), cost_of_shape(SHAPES[name].config, parent, 2)
    assert built == counted
