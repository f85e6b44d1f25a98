"""The changes that a parent's search space consists of, and the plans that they make."""

from ffn_fusion.core.cost import BlockShape
from ffn_fusion.core.plan import Block, Plan
from ffn_fusion.core.space import Change, Sizes, changes

WHOLE = Plan.identity(3)
SHAPES = [BlockShape(8, 1000)] * 3


def blocks_of(found: list[Change], layer: int) -> list[str]:
    return [str(change.block or "none") for change in found if change.first == change.last == layer]


def test_every_divisor_of_the_kv_heads_and_widths_on_the_grid() -> None:
    found = changes(WHOLE, SHAPES, Sizes(shares=(0.5, 0.1, 0.99, 1.0), multiple=64))
    # 500 goes up to 512, 100 to 128; 990 to 1024, which is no narrower than the parent.
    attentions = ["A1/4F1", "A1/2F1", "A1/1F1", "-F1"]
    assert blocks_of(found, 1) == [*attentions, "A1F1:512", "A1F1:128", "A1", "none"]
    assert [str(change) for change in found if change.last > change.first] == ["A0F0+1", "A1F1+2"]
    assert "without 1" in [str(change) for change in found]


def test_the_first_layer_keeps_its_attention() -> None:
    assert blocks_of(changes(WHOLE, SHAPES, Sizes(kv_heads=(2,), shares=(), linear=True)), 0) == [
        "A0/2F0",
        "A0F0L",
        "A0",
    ]


def test_only_the_kv_heads_asked_for_and_only_divisors() -> None:
    uneven = [BlockShape(8, 10), BlockShape(6, 10), BlockShape(4, 10)]
    found = changes(WHOLE, uneven, Sizes(kv_heads=(4, 3, 2), shares=()))
    assert [blocks_of(found, layer)[: -3 if layer else -1] for layer in range(3)] == [
        ["A0/4F0", "A0/2F0"],
        ["A1/3F1", "A1/2F1"],
        ["A2/2F2"],
    ]


def test_linear_layers_stand_beside_removal() -> None:
    assert blocks_of(changes(WHOLE, SHAPES, Sizes((), (), linear=True)), 2) == ["A2LF2", "-F2", "A2F2L", "A2", "none"]


def test_a_change_applied_is_the_parent_but_for_one_place() -> None:
    plans = {str(change): str(change.applied(WHOLE)) for change in changes(WHOLE, SHAPES, Sizes((1,), (0.5,)))}
    assert plans["A1/1F1"] == "A0F0 A1/1F1 A2F2"
    assert plans["A2F2:500"] == "A0F0 A1F1 A2F2:500"
    assert plans["-F2"] == "A0F0 A1F1 -F2"
    assert plans["without 1"] == "A0F0 A2F2"
    assert plans["A0F0+1"] == "A0F0+1 A2F2", "the attention between two fused FFNs goes, too"
    assert plans["A1F1+2"] == "A0F0 A1F1+2"


def test_a_parent_that_lacks_sublayers_already() -> None:
    """As a student's own plan, or another tool's with padding at layer 2."""
    parent = Plan.parse("A0F0 -F1 A3 A4F4 A5LF5L A6F6")
    shapes = [BlockShape(2, 100)] * 7
    found = changes(parent, shapes, Sizes(shares=(0.5,), linear=True))
    assert blocks_of(found, 1) == ["-F1:50", "-F1L", "none"], "without its FFN there would be no block"
    assert blocks_of(found, 2) == []
    assert blocks_of(found, 3) == ["A3/1", "A3L", "none"]
    assert [str(change) for change in found if change.last > change.first] == ["A0F0+1"], (
        "not over padding, an attention alone or a linear FFN"
    )
    # A linear layer has no kv heads or channels to cut, and is one already.
    shapes[5] = BlockShape(0, 0, True, True)
    found = changes(parent, shapes, Sizes(shares=(0.5,), linear=True))
    assert blocks_of(found, 5) == ["-F5L", "A5L", "none"]
    own = {str(block) for block in parent.blocks}
    for change in found:
        assert str(change) not in own
        changed = change.applied(parent)
        assert Block.parse("A6F6") in changed.blocks or change.first == 6
        assert len(parent.blocks) - len(changed.blocks) == (change.block is None) + (change.last > change.first)
