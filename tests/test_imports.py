"""Plans of other tools, with the layouts that NVIDIA released as the oracle."""

import json
from pathlib import Path
from typing import Any

import pytest
from reference import one_line

from ffn_fusion.core.cost import BlockShape
from ffn_fusion.core.imports import config_plan, drop_list_plan, mergekit_plan, parse_group
from ffn_fusion.core.layout import Layout, LayoutBlock, portable_blocks
from ffn_fusion.core.plan import Plan
from ffn_fusion.hf.remote.configuration_ffn_fusion import width_of
from ffn_fusion.hf.resolve import read_source

# Llama-3_1-Nemotron-Ultra-253B-v1, as released: (config slots, attention there, FFN width). All other slots are empty.
ULTRA = [
    ([0], True, 5_376),
    ([1], True, 10_752),
    ([*range(2, 8)], True, 16_128),
    ([8, 13, 14, 15], True, 21_504),
    ([16, 17, 24, 25, 26, 32, 33, 34], True, 53_248),
    ([35], True, 26_624),
    ([39, 40, 41], True, 21_504),
    ([42], False, 21_504),
    ([43], True, 53_248),
    ([44], False, 53_248),
    ([*range(50, 54), *range(59, 63), *range(68, 72), *range(77, 81), 86], True, 53_248),
    ([87, 88, 89], True, 37_376),
    ([92], True, 32_000),
    ([93, 94, 95], True, 26_624),
    ([96, 97], False, 26_624),
    ([98], True, 26_624),
    ([*range(100, 107)], False, 26_624),
    ([107], True, 26_624),
    ([113], True, 32_000),
    ([114], True, 53_248),
    ([115], False, 53_248),
    ([116], True, 53_248),
    ([125], False, 399_360),
    ([134], False, 425_984),
    ([143], False, 343_040),
    ([149], False, 301_056),
    ([150], False, 21_504),
    ([151], True, 21_504),
    ([152, 154, 155], True, 26_624),
    ([156], True, 37_376),
    ([*range(157, 161)], True, 53_248),
    ([161], True, 26_624),
]
ULTRA_GROUPS = tuple(tuple(range(a, b + 1)) for a, b in ((66, 73), (74, 85), (86, 100), (101, 114)))
ULTRA_PADDING = [
    *range(9, 13), *range(18, 24), *range(27, 32), *range(36, 39), *range(45, 50), *range(54, 59), *range(63, 68),
    *range(72, 77), *range(81, 86), 90, 91, 99, *range(108, 113), *range(117, 125), *range(126, 134),
    *range(135, 143), *range(144, 149), 153,
]  # fmt: skip
# Llama-3_3-Nemotron-Super-49B-v1: (first layer, last layer, attention there, FFN width).
SUPER = [
    (0, 0, True, 14_336), (1, 5, True, 28_672), (6, 7, False, 14_336), (8, 10, True, 28_672), (11, 11, False, 17_920),
    (12, 41, True, 28_672), (42, 42, False, 7_168), (43, 44, False, 14_336), (45, 45, False, 7_168),
    (46, 46, False, 28_672), (47, 47, False, 7_168), (48, 48, False, 14_336), (49, 51, False, 7_168),
    (52, 52, True, 28_672), (53, 53, False, 7_168), (54, 55, False, 5_632), (56, 56, False, 7_168),
    (57, 59, False, 5_632), (60, 61, False, 7_168), (62, 63, False, 2_816), (64, 65, False, 5_632),
    (66, 67, False, 2_816), (68, 68, False, 5_632), (69, 70, False, 2_816), (71, 79, True, 28_672),
]  # fmt: skip
SUPER_REMOVED = [6, 7, 11, *range(42, 52), *range(53, 71)]
OFFICIAL_MULTIPLIERS = {399_360: 36.5625, 425_984: 39.0, 343_040: 31.40625, 301_056: 27.5625}


def nemotron_entry(attention: bool, width: int, hidden_size: int, group: int) -> dict[str, Any]:
    """One block as the official files write it."""
    return {
        "attention": {
            "n_heads_in_group": group if attention else None,
            "no_op": not attention,
            "num_sink_tokens": None,
            "replace_with_linear": False,
            "sparsify": None,
            "unshifted_sink": False,
            "use_prefill_window_in_sink_attention": False,
            "window_length": None,
        },
        "ffn": {
            "ffn_mult": OFFICIAL_MULTIPLIERS.get(width, 1.5 * width / hidden_size) if width else None,
            "no_op": not width,
            "replace_with_linear": False,
            "sparsify": None,
        },
    }


def nemotron_config(blocks: list[tuple[bool, int]], hidden_size: int, num_heads: int) -> dict[str, Any]:
    return {
        "model_type": "nemotron-nas",
        "hidden_size": hidden_size,
        "num_attention_heads": num_heads,
        "num_key_value_heads": None,
        "intermediate_size": None,
        "num_hidden_layers": len(blocks),
        "vocab_size": 128_256,
        "tie_word_embeddings": False,
        "block_configs": [nemotron_entry(*block, hidden_size, num_heads // 8) for block in blocks],
    }


def ultra() -> dict[str, Any]:
    blocks = [(False, 0)] * 162
    for slots, attention, width in ULTRA:
        for slot in slots:
            blocks[slot] = (attention, width)
    return nemotron_config(blocks, 16_384, 128)


def super_49b() -> dict[str, Any]:
    return nemotron_config([(a, width) for first, last, a, width in SUPER for _ in range(first, last + 1)], 8_192, 64)


def puzzletron(*blocks: tuple[int, int], **fields: Any) -> dict[str, Any]:
    """A config with (kv heads, FFN width) of each block in Puzzletron's keys."""
    entries = [
        {
            "attention": {
                "no_op": not kv_heads,
                "num_key_value_heads": kv_heads or None,
                "llama4": None,
                "mamba": None,
            },
            "ffn": {"no_op": not width, "intermediate_size": width or None, "moe": None},
            "parallel_blocks": None,
        }
        for kv_heads, width in blocks
    ]
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": len(blocks), "vocab_size": 128}
    return {"model_type": "llama", **sizes, "block_configs": entries, **fields}


def test_ultra_253b_is_read_as_it_was_released() -> None:
    layout = Layout.of(ultra())
    assert (layout.num_slots, layout.num_padding, len(layout.blocks)) == (162, 81, 81)
    assert sorted(set(range(162)) - {block.slot for block in layout.blocks}) == ULTRA_PADDING
    assert (layout.num_attentions, layout.num_ffns) == (64, 81)
    assert f"{layout.num_parameters / 1e9:.1f}" == "253.4"
    assert [block.ffn_width for block in layout.blocks if block.ffn_width > 53_248] == [*OFFICIAL_MULTIPLIERS]
    assert {block.kv_heads for block in layout.blocks} == {0, 8}
    assert [block.ffn_width for block in layout.blocks if block.slot in (0, 8, 50, 92, 161)] == [
        *(5_376, 21_504, 53_248, 32_000, 26_624)
    ]


def test_the_groups_of_ultra_253b_give_a_plan_of_its_parents_126_layers() -> None:
    plan = Layout.of(ultra()).plan(126, ULTRA_GROUPS)
    assert plan.ffn_layers == list(range(126))
    assert tuple(plan.groups) == ULTRA_GROUPS
    assert len(plan.attention_layers) == 126 - 62
    removed = set(range(126)) - set(plan.attention_layers)
    assert removed == {24, 26, 51, 52, *range(54, 61), 64, *range(66, 116)}
    assert plan.is_ordered
    assert plan.num_sublayers == 64 + 81


def test_the_groups_may_be_named_in_any_order() -> None:
    layout = Layout.of(ultra())
    assert layout.plan(126, ULTRA_GROUPS[::-1]) == layout.plan(126, ULTRA_GROUPS)


def test_ultra_253b_without_groups_or_with_others_is_no_plan_for_its_parent() -> None:
    layout = Layout.of(ultra())
    one_line(lambda: layout.plan(126), "81 source layers", "126", "--groups")
    one_line(lambda: layout.plan(126, ULTRA_GROUPS[:3]), "66-73, 74-85, 86-100", "113 source layers", "126")
    one_line(lambda: layout.plan(80), "81 source layers", "80")
    assert layout.plan(162).ffn_layers == [block.slot for block in layout.blocks]


def test_super_49b_is_read_as_it_was_released() -> None:
    layout = Layout.of(super_49b())
    assert (layout.num_slots, layout.num_padding, layout.num_attentions, layout.num_ffns) == (80, 0, 49, 80)
    assert f"{layout.num_parameters / 1e9:.1f}" == "49.9"
    plan = layout.plan(80)
    assert plan == Plan.identity(80).without_attention(SUPER_REMOVED)
    assert plan.groups == []


def test_sizes_that_differ_from_the_parents_are_the_plans() -> None:
    plan = Layout.of(super_49b()).plan(80, own=[BlockShape(8, 28_672)] * 80)
    widths = {layer: w for first, last, _, w in SUPER for layer in range(first, last + 1) if w != 28_672}
    assert plan.widths == widths
    assert plan.kv_heads == {}
    assert str(plan).startswith("A0F0:14336 A1F1 A2F2 A3F3 A4F4 A5F5 -F6:14336")
    layout = Layout.of(puzzletron((4, 96), (0, 64), (1, 0), (2, 96)))
    own = [BlockShape(4, 96)] * 4
    assert str(layout.plan(4, own=own)) == "A0F0 -F1:64 A2/1 A3/2F3"
    assert str(layout.plan(5, [(1, 2)], [BlockShape(4, 128)] * 5)) == "A0F0:96 -F1+2 A3/1 A4/2F4:96", "members unknown"
    assert str(layout.plan(4)) == "A0F0 -F1 A2 A3F3", "without the parent's sizes nothing is known to differ"


def test_a_width_that_is_the_parents_own_rounded_up_is_no_cut() -> None:
    layout = Layout.of(nemotron_config([(True, 1_536), (True, 1_280)], 576, 8))
    assert str(layout.plan(2, own=[BlockShape(8, 1_500)] * 2)) == "A0F0 A1F1:1280"


def test_parameters_are_those_of_the_sizes() -> None:
    """By hand: q and o 64 x 64, k and v 64 x 16 a kv head, three projections an FFN, one gain a norm."""
    layout = Layout.of(puzzletron((2, 96), (1, 0), (0, 0), (0, 256)))
    attention = (2 * 64 * 64 + 2 * 64 * 32) + (2 * 64 * 64 + 2 * 64 * 16)
    expected = attention + 3 * 64 * (96 + 256) + 64 * 5
    assert layout.num_parameters == expected + 2 * 128 * 64
    assert Layout.of(puzzletron((2, 96), (1, 0), (0, 0), (0, 256), tie_word_embeddings=True)).num_parameters == (
        expected + 128 * 64
    )
    wide = Layout.of(puzzletron((2, 96), (1, 0), (0, 0), (0, 256), head_dim=32))
    assert wide.num_parameters == expected + attention + 2 * 128 * 64


def test_puzzletron_and_nemotron_keys_say_the_same() -> None:
    blocks = [(2, 256), (4, 512), (0, 0), (1, 0), (0, 768)]
    layout = Layout.of(puzzletron(*blocks))
    found = [LayoutBlock(slot, *block) for slot, block in enumerate(blocks) if any(block)]
    assert list(layout.blocks) == found
    assert str(layout.plan(5)) == "A0F0 A1F1 A3 -F4"
    entries = puzzletron(*blocks)
    for entry, (kv_heads, width) in zip(entries["block_configs"], blocks, strict=True):
        entry["attention"] = {"no_op": not kv_heads, "n_heads_in_group": 4 // kv_heads if kv_heads else None}
        entry["ffn"] = {"no_op": not width, "ffn_mult": 1.5 * width / 64 if width else None}
    assert Layout.of(entries) == layout


def test_what_puzzletron_found_for_an_8b_model_is_a_plan_that_fuses() -> None:
    """At 78,000 MiB: attention removed in 17 to 28 of Llama-3.1-8B, FFNs untouched (its README)."""
    blocks = [(0 if 17 <= layer <= 28 else 8, 14_336) for layer in range(32)]
    sizes = {"hidden_size": 4_096, "num_attention_heads": 32, "vocab_size": 128_256, "tie_word_embeddings": False}
    layout = Layout.of(puzzletron(*blocks, **sizes))
    assert layout.num_parameters / 1e9 == pytest.approx(7.527, abs=5e-4)
    plan = layout.plan(32)
    assert plan == Plan.identity(32).without_attention(range(17, 29))
    assert plan.runs() == [tuple(range(16, 29))]
    fused = plan.fuse(range(17, 23)).fuse(range(23, 28))
    assert (fused.num_sublayers, len(fused.blocks)) == (43, 23)


@pytest.mark.parametrize("multiplier", [0.25, 1.0, 2.625, 4.0, 5.25, 36.5625, 0.001])
@pytest.mark.parametrize("hidden_size", [64, 576, 8_192, 16_384])
def test_widths_follow_the_rule_of_the_shipped_configuration(multiplier: float, hidden_size: int) -> None:
    config = nemotron_config([(True, 256)], hidden_size, 8)
    config["block_configs"][0]["ffn"]["ffn_mult"] = multiplier
    assert Layout.of(config).blocks[0].ffn_width == width_of(multiplier, hidden_size)


def test_blocks_take_the_parents_layers_in_order_where_slots_are_not_layers() -> None:
    layout = Layout.of(puzzletron((4, 96), (0, 0), (2, 192), (0, 0), (0, 96)))
    assert str(layout.plan(4, [(1, 2)])) == "A0F0 A1F1+2 -F3"
    assert str(layout.plan(3)) == "A0F0 A1F1 -F2"
    assert str(layout.plan(5)) == "A0F0 A2F2 -F4", "as many slots as layers: each slot is its layer"
    assert str(layout.plan(5, [(1, 2, 3)])) == "A0F0 A1F1+2+3 -F4"


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ([(1, 2), (2, 3)], ["1-2 and 2-3 overlap"]),
        ([(1, 2), (1, 2, 3)], ["overlap"]),
        ([(1, 3)], ["1, 3", "no range"]),
        ([(1,)], ["no range of two"]),
        ([(8, 9)], ["8-9", "beyond", "9 layers"]),
        ([(2, 3)], ["2-3", "slot 2", "no FFN"]),
        ([(1, 2, 3, 4)], ["6 source layers", "9"]),
    ],
)
def test_groups_that_cannot_be_are_refused(groups: list[tuple[int, ...]], says: list[str]) -> None:
    layout = Layout.of(puzzletron((4, 96), (2, 96), (2, 0)))
    one_line(lambda: layout.plan(9, groups), *says)


def test_a_group_is_written_as_a_range() -> None:
    assert parse_group("66-73") == tuple(range(66, 74))
    for text in ("66", "73-66", "5-5", "66..73", "a-b", "1-2-3", ""):
        one_line(lambda text=text: parse_group(text), "66-73")  # type: ignore[misc]


def changed(part: str, **fields: Any) -> dict[str, Any]:
    config = puzzletron((4, 96), (2, 96))
    config["block_configs"][1][part] = config["block_configs"][1][part] | fields
    return config


def without(name: str) -> dict[str, Any]:
    config = puzzletron((4, 96))
    del config["block_configs"][0][name]
    return config


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (changed("ffn", moe={"num_local_experts": 4}), ["[1].ffn", "moe"]),
        (changed("attention", mamba={"state_dim": 4}), ["mamba"]),
        (changed("attention", window_length=1024), ["window_length"]),
        (changed("attention", num_key_value_heads=3), ["num_key_value_heads 3", "4 heads"]),
        (changed("attention", num_key_value_heads=None), ["num_key_value_heads None"]),
        (changed("attention", n_heads_in_group=8), ["n_heads_in_group 8"]),
        (changed("ffn", intermediate_size=None), ["[1].ffn", "ffn_mult or intermediate_size"]),
        (changed("ffn", intermediate_size=-1), ["-1"]),
        (puzzletron((4, 96), num_hidden_layers=3), ["1 entries for 3 layers"]),
        (puzzletron((4, 96), block_configs={}), ["no list"]),
        (puzzletron((4, 96), block_configs=[7]), ["[0]"]),
        (puzzletron((4, 96), hidden_size=None), ["hidden_size"]),
        (puzzletron((4, 96), vocab_size="many"), ["vocab_size", "many"]),
        (without("ffn"), ["[0]", "'ffn'"]),
        (without("attention"), ["'attention'"]),
    ],
)
def test_block_configs_that_we_cannot_express_are_refused(config: dict[str, Any], says: list[str]) -> None:
    one_line(lambda: Layout.of(config), *says)


def test_linear_layers_are_read() -> None:
    config = changed("attention", replace_with_linear=True)
    config["block_configs"].append(puzzletron((2, 96))["block_configs"][0])
    config["block_configs"][2]["ffn"] = {"no_op": False, "replace_with_linear": True}
    config["num_hidden_layers"] = 3
    layout = Layout.of(config)
    assert layout.blocks[1] == LayoutBlock(1, 0, 96, linear_attention=True)
    assert layout.blocks[2] == LayoutBlock(2, 2, 0, linear_ffn=True)
    own = [BlockShape(4, 96), BlockShape(2, 96), BlockShape(4, 96)]
    assert str(layout.plan(3)) == "A0F0 A1LF1 A2F2L"
    assert str(layout.plan(3, own=own)) == "A0F0 A1LF1 A2/2F2L"
    ordinary = Layout.of(puzzletron((4, 96), (2, 96), (2, 96)))
    d, heads, size = layout.hidden_size, layout.num_heads, layout.head_dim
    assert ordinary.num_parameters - layout.num_parameters == 2 * (heads + 2) * size * d - d * d + 3 * d * 96 - d * d
    assert [entry["attention"]["n_heads_in_group"] for entry in portable_blocks(config)] == [1, None, 2]
    one_line(lambda: layout.plan(4, [(2, 3)]), "FFN 2 is a linear layer")
    config["block_configs"][0]["attention"]["replace_with_linear"] = True
    one_line(lambda: Layout.of(config).plan(3), "layer 0 cannot be linear")


def test_a_sublayer_that_is_not_there_is_not_linear() -> None:
    config = changed("ffn", no_op=True, replace_with_linear=True)
    assert str(Layout.of(config).plan(2)) == "A0F0 A1"


def test_parallel_blocks_are_refused_unless_null() -> None:
    config = puzzletron((4, 96), (2, 96))
    config["block_configs"][1]["parallel_blocks"] = [{}]
    one_line(lambda: Layout.of(config), "[1]", "parallel_blocks")


def test_blocks_with_activations_of_their_own_are_refused() -> None:
    assert Layout.of(changed("ffn", hidden_act="silu") | {"hidden_act": "silu"})
    one_line(lambda: Layout.of(changed("ffn", hidden_act="relu2") | {"hidden_act": "silu"}), "relu2", "silu")


def test_the_folded_form_is_refused_as_a_layout_but_kept_as_a_model() -> None:
    config = puzzletron((4, 96), (2, 96))
    config["block_configs"][1]["following_ffns"] = [{"no_op": False, "intermediate_size": 96}]
    one_line(lambda: Layout.of(config), "folded")
    assert portable_blocks(config)[1]["following_ffns"] == [{"no_op": False, "intermediate_size": 96}]


def test_layer_0_without_attention_is_refused() -> None:
    one_line(lambda: Layout.of(puzzletron((0, 96), (4, 96))).plan(2), "attention of layer 0")


@pytest.mark.parametrize(
    ("attention", "ffn", "expected"),
    [
        ([3, 2], [], "A0F0 A1F1 -F2 -F3 A4F4 A5F5"),
        ([], [5, 2], "A0F0 A1F1 A2 A3F3 A4F4 A5"),
        ([2, 3], [3, 4], "A0F0 A1F1 -F2 A4 A5F5"),
        ([False, False, True, False, False, True], None, "A0F0 A1F1 -F2 A3F3 A4F4 -F5"),
        ([2], [True] * 5 + [False], "A0 A1 A3 A4 A5F5"),
        ([], [], "A0F0 A1F1 A2F2 A3F3 A4F4 A5F5"),
        ([1, 1], None, "A0F0 -F1 A2F2 A3F3 A4F4 A5F5"),
    ],
)
def test_drop_lists_are_layers_or_one_bool_a_layer(attention: Any, ffn: Any, expected: str) -> None:
    config = {"drop_attn_list": attention, "drop_mlp_list": ffn, "num_hidden_layers": 6}
    assert str(drop_list_plan(config, 6)) == expected
    assert config_plan(config, None, ()) == (Plan.parse(expected), None)


@pytest.mark.parametrize(
    ("attention", "says"),
    [
        ([6], ["drop_attn_list", "layer 6", "0 to 5"]),
        ([-1], ["layer -1"]),
        ([0], ["drop_attn_list", "layer 0", "cache"]),
        ([True] + [False] * 5, ["layer 0", "cache"]),
        ([True, False], ["2 bools", "6 layers"]),
        ([1, True], ["numbers, or of bools"]),
        (["1"], ["numbers, or of bools"]),
        ([1.0], ["numbers, or of bools"]),
        ("all", ["drop_attn_list", "'all'"]),
    ],
)
def test_a_bad_drop_list_is_refused(attention: Any, says: list[str]) -> None:
    one_line(lambda: drop_list_plan({"drop_attn_list": attention, "drop_mlp_list": [1]}, 6), *says)


def test_drop_lists_for_another_model_and_lists_that_leave_nothing_are_refused() -> None:
    one_line(lambda: drop_list_plan({"drop_attn_list": [1], "num_hidden_layers": 32}, 6), "32 layers", "has 6")
    one_line(lambda: drop_list_plan({"drop_mlp_list": list(range(6))}, 6), "at least one FFN")
    one_line(lambda: config_plan({"drop_mlp_list": [1]}, None, ()), "num_hidden_layers")
    one_line(lambda: config_plan({"drop_mlp_list": [1]}, 6, [(1, 2)]), "--groups")


def slices(*ranges: list[int], models: str = "a", **fields: Any) -> dict[str, Any]:
    named = models * len(ranges) if len(models) == 1 else models
    sources = [{"sources": [{"model": m, "layer_range": r}]} for m, r in zip(named, ranges, strict=True)]
    return {"slices": sources, "merge_method": "passthrough", "dtype": "bfloat16", **fields}


def test_mergekit_slices_end_before_their_last_number() -> None:
    assert str(mergekit_plan(slices([0, 2], [4, 6]), 6)) == "A0F0 A1F1 A4F4 A5F5"
    assert str(mergekit_plan(slices([0, 1], [4, 5], [2, 3]), None)) == "A0F0 A4F4 A2F2"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (slices([0, 4], [2, 6]), ["repeat layer 2", "once"]),
        (slices([0, 2], [0, 2]), ["repeat layer 0"]),
        (slices([0, 2], [2, 4], models="ab"), ["2 models", "a and b"]),
        (slices([0, 4], merge_method="slerp"), ["slerp", "passthrough"]),
        (slices([0, 4], merge_method=None), ["None", "passthrough"]),
        (slices([2, 4]), ["begin with layer 2", "layer 0", "cache"]),
        (slices([0, 7]), ["[0, 7]", "6 layers"]),
        (slices([3, 3]), ["[3, 3]", "empty"]),
        (slices([-1, 3]), ["[-1, 3]"]),
        (slices([0, 2, 4]), ["layer_range"]),
        (slices([0, True]), ["layer_range"]),
        (slices(), ["slices"]),
        ({"merge_method": "passthrough", "models": []}, ["slices"]),
        ({"merge_method": "passthrough", "slices": [3]}, ["one source"]),
        ({"merge_method": "passthrough", "slices": [{"sources": []}]}, ["one source"]),
        (slices([0, 2]) | {"slices": [{"sources": [{"layer_range": [0, 2]}] * 2}]}, ["one source"]),
        (
            slices() | {"slices": [{"sources": [{"layer_range": [0, 2], "parameters": {"scale": 0.5}}]}]},
            ["parameters", "scale"],
        ),
    ],
)
def test_a_merge_that_is_no_plan_is_refused_with_the_reason(data: dict[str, Any], says: list[str]) -> None:
    one_line(lambda: mergekit_plan(data, 6), *says)


def read_plan(text: str, num_layers: int) -> Plan:
    return read_source(text, num_layers)[0]


def write(path: Path, data: Any) -> str:
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return str(path)


YAML = """
slices:
  - sources:
      - model: someone/parent   # a comment
        layer_range: [0, 2]
  - sources:
      - model: someone/parent
        layer_range: [3, 4]
merge_method: passthrough
dtype: bfloat16
"""


def test_files_of_all_tools_are_read_where_a_plan_is(tmp_path: Path) -> None:
    assert str(read_plan(write(tmp_path / "merge.yaml", YAML), 4)) == "A0F0 A1F1 A3F3"
    assert str(read_plan(write(tmp_path / "drop.json", {"drop_attn_list": [2]}), 3)) == "A0F0 A1F1 -F2"
    layout = puzzletron((4, 96), (0, 96), (1, 0))
    assert str(read_plan(write(tmp_path / "config.json", layout), 3)) == "A0F0 -F1 A2"
    assert str(read_plan(str(tmp_path), 3)) == "A0F0 -F1 A2", "a folder stands for its config.json"
    write(tmp_path / "plan.json", Plan.parse("A0F0 -F2").to_json())
    assert str(read_plan(str(tmp_path), 3)) == "A0F0 -F2", "or for its plan.json"
    plan, found = read_source(write(tmp_path / "x.json", layout), 4, [(0, 1)])
    assert (str(plan), found) == ("A0F0+1 -F2 A3", Layout.of(layout))


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("merge.yaml", "slices: [", ["merge.yaml", "not YAML"]),
        ("merge.yaml", "- 1\n- 2\n", ["merge.yaml", "mapping"]),
        ("merge.yml", YAML.replace("[3, 4]", "[1, 4]"), ["merge.yml", "repeat layer 1"]),
        ("merge.yaml", YAML.replace("[0, 2]", "!!python/object/apply:os.getcwd []"), ["merge.yaml", "not YAML"]),
        ("config.json", "{", ["config.json", "not JSON"]),
        ("config.json", "[1]", ["config.json", "no JSON object"]),
        ("config.json", {"drop_attn_list": [9]}, ["config.json", "layer 9"]),
        ("config.json", {"model_type": "llama", "num_hidden_layers": 6}, ["config.json", "no plan", "drop_attn_list"]),
        ("plan.json", {"format": "other/2", "blocks": []}, ["plan.json", "other/2"]),
    ],
)
def test_a_file_that_holds_no_plan_is_named(name: str, data: Any, says: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / name, data)
    one_line(lambda: read_plan(path, 6), *says)


def test_files_that_are_not_there_or_are_no_text_are_named(tmp_path: Path) -> None:
    one_line(lambda: read_plan("missing.yaml", 6), "missing.yaml", "does not exist")
    one_line(lambda: read_plan(str(tmp_path), 6), "config.json", "does not exist")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    one_line(lambda: read_plan(str(tmp_path / "binary.yaml"), 6), "binary.yaml", "not YAML")


@pytest.mark.parametrize("name", ["plan.json", "merge.yaml"])
def test_groups_are_for_block_configs_only(name: str, tmp_path: Path) -> None:
    text = YAML if name.endswith("yaml") else Plan.identity(4).to_json()
    path = write(tmp_path / name, text)
    one_line(lambda: read_source(path, 4, [(1, 2)]), "--groups", "block_configs")
    one_line(lambda: read_source("A0F0 A1F1", 4, [(1, 2)]), "--groups")
