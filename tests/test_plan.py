"""Plans: what is one, what is none, and what search and fusion may do to one."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import one_line

from ffn_fusion.core.plan import FORMAT, SIZED_FORMAT, Attention, Block, Ffn, Plan, contiguous


@st.composite
def plans(draw: st.DrawFn, ordered: bool = False) -> Plan:
    """Any valid plan of up to nine layers: sublayers dropped, fused, made smaller and (unless `ordered`) reordered.

    Attentions without FFN stand between the other blocks.
    """
    ffns = draw(st.permutations(range(draw(st.integers(1, 9)))))
    ffns = ffns[: draw(st.integers(1, len(ffns)))]
    if ordered:
        ffns = sorted(ffns)
    cuts = sorted(draw(st.sets(st.integers(1, len(ffns) - 1)))) if len(ffns) > 1 else []
    groups = [ffns[a:b] for a, b in zip([0, *cuts], [*cuts, len(ffns)], strict=True)]
    attentions = draw(st.permutations(range(1, 9)))
    kept = [draw(st.booleans()) for _ in groups]
    firsts = [group[0] for group in groups] if ordered else [0, *attentions]
    heads = [Attention(0) if i == 0 else Attention(firsts[i]) if keep else None for i, keep in enumerate(kept)]
    blocks = []
    alone = [layer for layer in attentions if Attention(layer) not in heads]
    for i, (head, group) in enumerate(zip(heads, groups, strict=True)):
        blocks.append(Block(head, tuple(map(Ffn, group))))
        end = groups[i + 1][0] if i + 1 < len(groups) else 9
        free = [layer for layer in alone if not ordered or group[-1] < layer < end]
        if free and draw(st.booleans()):
            blocks.append(Block(Attention(free[0]), ()))
            alone.remove(free[0])
    return Plan(
        tuple(
            Block(
                draw(changed(block.attention, "kv_heads", block.attention.layer > 0)) if block.attention else None,
                tuple(draw(changed(ffn, "width", not block.is_fused)) for ffn in block.ffns),
            )
            for block in blocks
        )
    )


def changed(sublayer: Attention | Ffn, size: str, may_be_linear: bool) -> st.SearchStrategy[Attention | Ffn]:
    """A sublayer as it is, of another size or, if it may be, linear."""
    found = st.none() | st.integers(1, 30_000)
    sized = found.map(lambda value: replace(sublayer, **{size: value}))  # type: ignore[arg-type]
    return sized | st.just(replace(sublayer, linear=True)) if may_be_linear else sized


@given(plans())
def test_text_and_json_give_the_same_plan_back(plan: Plan) -> None:
    assert Plan.parse(str(plan)) == plan
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.parse("\n ".join(str(plan).split())) == plan


@given(plans())
def test_json_has_one_line_a_block(plan: Plan) -> None:
    data = json.loads(plan.to_json())
    assert data["format"] == (SIZED_FORMAT if plan.widths or plan.kv_heads or plan.has_linear else FORMAT)
    assert len(data["blocks"]) == len(plan.blocks)
    assert len(plan.to_json().splitlines()) == len(plan.blocks) + 5


@given(plans())
def test_sizes_stay_with_their_sublayers(plan: Plan) -> None:
    unfused = plan.unfused()
    assert (unfused.widths, unfused.kv_heads) == (plan.widths, plan.kv_heads)
    removed = plan.attention_layers[1:]
    left = plan.without_attention(removed)
    assert left.widths == plan.widths
    assert (unfused.linear_attentions, unfused.linear_ffns) == (plan.linear_attentions, plan.linear_ffns)
    assert (left.linear_attentions, left.linear_ffns) == ([], plan.linear_ffns)
    assert left.kv_heads == {layer: n for layer, n in plan.kv_heads.items() if layer not in removed}


def test_sizes_are_read_and_written() -> None:
    plan = Plan.parse("A0/2F0 A6/1F2:1024 -F3:512+4+5:1024 A7/4")
    assert plan.blocks[1] == Block(Attention(6, 1), (Ffn(2, 1024),))
    assert plan.blocks[2] == Block(None, (Ffn(3, 512), Ffn(4), Ffn(5, 1024)))
    assert plan.kv_heads == {0: 2, 6: 1, 7: 4}
    assert plan.widths == {2: 1024, 3: 512, 5: 1024}
    assert [block.is_cut for block in plan.blocks] == [False, True, True, False]
    assert json.loads(plan.to_json())["blocks"][2] == {
        "attention": None,
        "ffns": [{"layer": 3, "width": 512}, {"layer": 4}, {"layer": 5, "width": 1024}],
    }
    assert json.loads(plan.to_json())["blocks"][3] == {"attention": {"layer": 7, "kv_heads": 4}, "ffns": []}
    assert Plan.parse("A0F0 A1F1") != Plan.parse("A0F0 A1F1:64")


def test_linear_layers_are_read_and_written() -> None:
    plan = Plan.parse("A0F0 A5LF5 A6F6L -F7L A8L")
    assert plan.blocks[1] == Block(Attention(5, linear=True), (Ffn(5),))
    assert plan.blocks[2] == Block(Attention(6), (Ffn(6, linear=True),))
    assert (plan.linear_attentions, plan.linear_ffns) == ([5, 8], [6, 7])
    assert plan.attention_layers == [0, 5, 6, 8]
    assert plan.num_sublayers == 2 + 2 + 2 + 1 + 1
    assert not any(block.is_cut for block in plan.blocks)
    blocks = json.loads(plan.to_json())["blocks"]
    assert blocks[1] == {"attention": {"layer": 5, "linear": True}, "ffns": [{"layer": 5}]}
    assert blocks[3] == {"attention": None, "ffns": [{"layer": 7, "linear": True}]}
    assert Plan.parse("A0F0 A1F1") != Plan.parse("A0F0 A1F1L")
    assert Plan.from_json(plan.to_json().replace('"layer": 0}', '"layer": 0, "linear": false}')) == plan
    one_line(lambda: Attention(1, kv_heads=2, linear=True), "attention 1", "linear", "kv heads")
    one_line(lambda: Ffn(1, width=2, linear=True), "FFN 1", "linear", "channels")


def test_a_linear_ffn_is_in_no_group_and_between_two() -> None:
    plan = Plan.parse("A0F0 -F1 -F2L -F3 -F4 A5LF5 -F6 A7F7L -F8 -F9")
    assert plan.runs() == [(0, 1), (3, 4), (5, 6), (8, 9)]
    assert str(plan.fuse([2])) == str(plan)
    one_line(lambda: plan.fuse([1, 2]), "cannot fuse FFNs [1, 2]: FFN 2 is a linear layer")
    one_line(lambda: plan.fuse([3, 4, 5]), "attention 5 stands between")
    one_line(lambda: Block(None, (Ffn(1), Ffn(2, linear=True))), "FFN 2 is a linear layer")


def test_the_file_of_a_plan_without_sizes_is_what_it_was() -> None:
    text = Plan.parse("A0F0 -F1+2").to_json()
    assert text == (
        '{\n  "format": "ffn-fusion-plan/1",\n  "blocks": [\n'
        '    {"attention": {"layer": 0}, "ffns": [{"layer": 0}]},\n'
        '    {"attention": null, "ffns": [{"layer": 1}, {"layer": 2}]}\n  ]\n}\n'
    )


@given(st.integers(1, 9))
def test_the_identity_plan_keeps_every_sublayer_in_order(num_layers: int) -> None:
    plan = Plan.identity(num_layers)
    assert str(plan) == " ".join(f"A{i}F{i}" for i in range(num_layers))
    assert plan.attention_layers == plan.ffn_layers == list(range(num_layers))
    assert plan.num_sublayers == 2 * num_layers
    assert plan.is_ordered
    assert plan.groups == plan.runs() == []


def test_a_plan_can_be_read_sublayer_by_sublayer() -> None:
    plan = Plan.parse("A0F0 A1F1+2 -F3 A5F4")
    assert plan.blocks[1] == Block(Attention(1), (Ffn(1), Ffn(2)))
    assert plan.blocks[2] == Block(None, (Ffn(3),))
    assert plan.attention_layers == [0, 1, 5]
    assert plan.ffn_layers == [0, 1, 2, 3, 4]
    assert plan.groups == [(1, 2)]
    assert plan.num_sublayers == 4 + 3
    assert [block.layers for block in plan.blocks] == [(0,), (1, 2), (3,), (5, 4)]
    assert [block.is_fused for block in plan.blocks] == [False, True, False, False]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "at least one block"),
        ("   ", "at least one block"),
        ("A1F1 A2F2", "A1F1"),
        ("-F0 A1F1", "-F0"),
        ("A1F0 A0F1", "A1F0"),
        ("A0F0 A1F1 A1F2", "A1 twice"),
        ("A0F0 A1F1 A2F1", "F1 twice"),
        ("A0F0 -F1+2+1", "F1 twice"),
        ("A0F0 A", "'A'"),
        ("A0", "at least one FFN"),
        ("A0 A1 A2", "at least one FFN"),
        ("A0F0 -", "'-'"),
        ("A0F0 A1F", "'A1F'"),
        ("A0F0 F1", "'F1'"),
        ("A0F0 -F1+", "'-F1+'"),
        ("A0F0 A1F1,A2F2", "'A1F1,A2F2'"),
        ("A0F0 a1f1", "'a1f1'"),
        ("A0F0 A-1F1", "'A-1F1'"),
        ("A0F0 A1F1 - F2", "'-'"),
        ("A0F0 A1/F1", "'A1/F1'"),
        ("A0F0 A1/0F1", "attention 1 of a plan has 0 kv heads"),
        ("A0F0 A1F1:", "'A1F1:'"),
        ("A0F0 A1F1:0", "FFN 1 of a plan has 0 channels"),
        ("A0F0 A1F1:-5", "'A1F1:-5'"),
        ("A0F0 A1:2F1", "'A1:2F1'"),
        ("A0F0 A1F1/2", "'A1F1/2'"),
        ("A0F0 -/1F1", "'-/1F1'"),
        ("A0F0 A1/2LF1", "'A1/2LF1'"),
        ("A0F0 A1L/2F1", "'A1L/2F1'"),
        ("A0F0 A1F1:64L", "'A1F1:64L'"),
        ("A0F0 A1F1LL", "'A1F1LL'"),
        ("A0F0 -LF1", "'-LF1'"),
        ("A0LF0 A1F1", "the attention of layer 0 cannot be linear"),
        ("A0F0 A1F1+2L", "cannot fuse FFNs [1, 2]: FFN 2 is a linear layer"),
    ],
)
def test_what_is_no_plan_is_refused_and_named(text: str, named: str) -> None:
    one_line(lambda: Plan.parse(text), named)


def test_a_block_of_nothing_is_refused() -> None:
    one_line(lambda: Plan((Block(Attention(0), (Ffn(0),)), Block(None, ()))), "block 1", "an attention or an FFN")


def test_an_attention_can_stand_without_ffn() -> None:
    plan = Plan.parse("A0F0 A1 A2F2+3 A4")
    assert plan.blocks[1] == Block(Attention(1), ())
    assert str(plan) == "A0F0 A1 A2F2+3 A4"
    assert json.loads(plan.to_json())["blocks"][1] == {"attention": {"layer": 1}, "ffns": []}
    assert plan.num_sublayers == 2 + 1 + 2 + 1
    assert plan.blocks[1].layers == (1,)
    assert not plan.blocks[1].is_fused
    assert plan.is_ordered
    assert str(plan.unfused()) == "A0F0 A1 A2F2 -F3 A4"


def test_an_attention_without_ffn_ends_a_run() -> None:
    plan = Plan.parse("A0F0 -F1 A2 -F3 -F4 A5 A6 -F7")
    assert plan.runs() == [(0, 1), (3, 4)]
    assert str(plan.fuse([3, 4])) == "A0F0 -F1 A2 -F3+4 A5 A6 -F7"
    one_line(lambda: plan.fuse([0, 1, 3, 4]), "attention 2 stands between")
    one_line(lambda: plan.fuse([4, 7]), "attention 5 stands between")


def test_removing_the_attention_of_a_block_that_has_nothing_else_removes_the_block() -> None:
    plan = Plan.parse("A0F0 -F1 A2 -F3")
    assert str(plan.without_attention([2])) == "A0F0 -F1 -F3"
    assert plan.without_attention([2]).runs() == [(0, 1, 3)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        "[]",
        "5",
        "null",
        "{}",
        '{"format": "other/1", "blocks": []}',
        f'{{"format": "{FORMAT}"}}',
        f'{{"format": "{FORMAT}", "blocks": 3}}',
        f'{{"format": "{FORMAT}", "blocks": []}}',
        f'{{"format": "{FORMAT}", "blocks": ["A0F0"]}}',
        f'{{"format": "{FORMAT}", "blocks": [{{"attention": {{"layer": 0}}}}]}}',
        f'{{"format": "{FORMAT}", "blocks": [{{"attention": {{"layer": "x"}}, "ffns": [{{"layer": 0}}]}}]}}',
        f'{{"format": "{FORMAT}", "blocks": [{{"attention": null, "ffns": [{{"layer": 0}}]}}]}}',
        *(
            f'{{"format": "{SIZED_FORMAT}", "blocks": '
            f'[{{"attention": {{"layer": 0{kv}}}, "ffns": [{{"layer": 0{width}}}]}}]}}'
            for kv, width in [
                *[("", ', "width": 0'), ("", ', "width": 1.5'), (', "kv_heads": true', "")],
                *[("", ', "linear": 1'), (', "linear": true', ""), ("", ', "width": 9, "linear": true')],
            ]
        ),
    ],
)
def test_json_that_holds_no_plan_is_refused(text: str) -> None:
    one_line(lambda: Plan.from_json(text))


def test_removing_attention_changes_only_the_blocks_named() -> None:
    plan = Plan.identity(5)
    assert str(plan.without_attention([2, 3])) == "A0F0 A1F1 -F2 -F3 A4F4"
    assert plan.without_attention([]) == plan
    assert str(plan) == "A0F0 A1F1 A2F2 A3F3 A4F4"


def test_attention_that_is_not_there_or_that_engines_need_cannot_be_removed() -> None:
    plan = Plan.parse("A0F0 -F1 A2F2")
    one_line(lambda: plan.without_attention([1]), "layer 1")
    one_line(lambda: plan.without_attention([2, 7]), "layer 7")
    one_line(lambda: plan.without_attention([0]), "layer 0")


def test_fusing_joins_whole_consecutive_blocks() -> None:
    plan = Plan.parse("A0F0 A1F1 -F2 -F3 A4F4")
    assert str(plan.fuse([2, 3])) == "A0F0 A1F1 -F2+3 A4F4"
    assert str(plan.fuse([1, 2, 3])) == "A0F0 A1F1+2+3 A4F4"
    assert plan.fuse([3, 2, 1]) == plan.fuse([1, 2]).fuse([1, 2, 3]) == plan.fuse([2, 3]).fuse([1, 2, 3])
    assert plan.fuse([2]) == plan


@pytest.mark.parametrize("layers", [[0, 1], [3, 4], [0, 1, 2, 3, 4]])
def test_fusing_across_an_attention_is_refused(layers: list[int]) -> None:
    plan = Plan.parse("A0F0 A1F1 -F2 -F3 A4F4")
    one_line(lambda: plan.fuse(layers), "attention", "stands between")


@pytest.mark.parametrize("layers", [[1, 3], [2, 9], [9], [2, 2], [1, 2]])
def test_fusing_what_is_not_whole_consecutive_blocks_is_refused(layers: list[int]) -> None:
    plan = Plan.parse("A0F0 -F1 -F2+3 -F4")
    one_line(lambda: plan.fuse(layers), "whole consecutive blocks")


def test_fusing_nothing_is_refused() -> None:
    one_line(lambda: Plan.identity(3).fuse([]), "cannot fuse")


def test_a_run_starts_with_a_block_that_may_have_attention_and_goes_on_without() -> None:
    assert Plan.parse("A0F0 A1F1 -F2 -F3 A4F4").runs() == [(1, 2, 3)]
    assert Plan.parse("A0F0 -F1 A2F2 A3F3 -F4").runs() == [(0, 1), (3, 4)]
    assert Plan.parse("A0F0+1 -F2+3 A4F4").runs() == [(0, 1, 2, 3)]
    assert Plan.parse("A0F0 A1F1").runs() == []


@given(plans())
def test_every_run_can_be_fused_whole_and_no_two_runs_together(plan: Plan) -> None:
    for run in plan.runs():
        fused = plan.fuse(run)
        assert tuple(run) in fused.groups
        assert fused.ffn_layers == plan.ffn_layers
        assert fused.attention_layers == plan.attention_layers
        assert (fused.widths, fused.kv_heads) == (plan.widths, plan.kv_heads)
        assert fused.num_sublayers <= plan.num_sublayers
    runs = plan.runs()
    for a, b in pairwise(runs):
        one_line(lambda a=a, b=b: plan.fuse(a + b), "cannot fuse")  # type: ignore[misc]


@given(plans(ordered=True))
def test_a_plan_that_names_layers_in_rising_order_is_ordered(plan: Plan) -> None:
    assert plan.is_ordered


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A0F0 A1F2 A3F3", True),
        ("A0F0 A2F2 A1F1", False),
        ("A0F0 A2F1", False),
        ("A0F0 -F2+1", False),
        ("A0F1+0", False),
        ("A0F0 A1F3 -F2", False),
        ("A0F0 A1F2 A2F3", False),
        ("A0F0 A1 A2F2", True),
        ("A0 A1F2 A3", True),
        ("A0F0 A2 A1F1", False),
        ("A0F0 A1F3 A2", False),
        ("A0F0 A1 -F1", False),
    ],
)
def test_order_is_that_of_all_source_layers(text: str, expected: bool) -> None:
    assert Plan.parse(text).is_ordered is expected


def test_layers_are_listed_as_people_write_them() -> None:
    assert contiguous([4, 9, 6, 7, 8, 12]) == "4, 6-9, 12"
    assert contiguous([1, 2]) == "1-2"
    assert contiguous([]) == ""
