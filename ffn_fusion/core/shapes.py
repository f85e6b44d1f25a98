"""Released models by their sizes alone: what a bench can be made of without a checkpoint.

Sources: the configurations of Llama-3.1, SmolLM2, Llama-3_3-Nemotron-Super-49B-v1, Llama-3_1-Nemotron-Ultra-253B-v1;
the fused groups of FFN Fusion (arXiv 2503.18908).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ffn_fusion.core.cost import BlockShape, Cost, ParameterCounts, shapes_of
from ffn_fusion.core.plan import Attention, Block, Ffn, Plan
from ffn_fusion.errors import UserError

Span = tuple[int, int, bool, int]
"""First and last layer, whether their attentions stay, and their FFN width (of a fused group: all its members')."""
UNIT = 256
"""Widths of members that are not known are multiples of it."""


@dataclass(frozen=True)
class Shape:
    """A parent's configuration, and the student's plan in `--plan`'s words; None: no student is known."""

    config: Mapping[str, Any]
    plan: str | None = None


def _llama(hidden_size: int, width: int, layers: int, heads: int, **other: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden_size,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        **other,
    }


def plan_of(spans: Sequence[Span], width: int, groups: Sequence[tuple[int, int]] = ()) -> Plan:
    """The plan of layers in order; `groups` are first and last layers of the spans that are one fused FFN."""
    blocks: list[Block] = []
    for first, last, attention, size in spans:
        layers = range(first, last + 1)
        if (first, last) in groups:
            blocks.append(Block(None, tuple(_members(layers, size, width))))
        else:
            blocks += [
                Block(Attention(layer) if attention else None, (Ffn(layer, None if size == width else size),))
                for layer in layers
            ]
    return Plan(tuple(blocks))


def _members(layers: range, total: int, width: int) -> Iterator[Ffn]:
    """Members of a fused FFN as equal as whole units allow: their widths were not released."""
    units, more = divmod(total // UNIT, len(layers))
    for at, layer in enumerate(layers):
        size = UNIT * (units + (at < more))
        yield Ffn(layer, None if size == width else size)


_8B, _70B, _405B = (
    _llama(*sizes) for sizes in ((4096, 14336, 32, 32), (8192, 28672, 80, 64), (16384, 53248, 126, 128))
)
SMOLLM2 = _llama(
    *(576, 1536, 30, 9),
    num_key_value_heads=3,
    vocab_size=49152,
    max_position_embeddings=8192,
    rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
    tie_word_embeddings=True,
)
TWELVE_REMOVED = plan_of(
    [
        *((0, 16, True, 14336), (17, 22, False, 6 * 14336), (23, 27, False, 5 * 14336)),
        *((28, 28, False, 14336), (29, 31, True, 14336)),
    ],
    14336,
    groups=[(17, 22), (23, 27)],
)
"""Attention removed in 17 to 28 of Llama-3.1-8B; 17 to 22 and 23 to 27 fused, 28 left out as the paper does."""

_SUPER: list[Span] = [
    *((0, 0, True, 14336), (1, 5, True, 28672), (6, 7, False, 14336), (8, 10, True, 28672), (11, 11, False, 17920)),
    *((12, 41, True, 28672), (42, 42, False, 7168), (43, 44, False, 14336), (45, 45, False, 7168)),
    *((46, 46, False, 28672), (47, 47, False, 7168), (48, 48, False, 14336), (49, 51, False, 7168)),
    *((52, 52, True, 28672), (53, 53, False, 7168), (54, 55, False, 5632), (56, 56, False, 7168)),
    *((57, 59, False, 5632), (60, 61, False, 7168), (62, 63, False, 2816), (64, 65, False, 5632)),
    *((66, 67, False, 2816), (68, 68, False, 5632), (69, 70, False, 2816), (71, 79, True, 28672)),
]
_ULTRA: list[Span] = [
    *((0, 0, True, 5376), (1, 1, True, 10752), (2, 7, True, 16128), (8, 11, True, 21504), (12, 19, True, 53248)),
    *((20, 20, True, 26624), (21, 23, True, 21504), (24, 24, False, 21504), (25, 25, True, 53248)),
    *((26, 26, False, 53248), (27, 43, True, 53248), (44, 46, True, 37376), (47, 47, True, 32000)),
    *((48, 50, True, 26624), (51, 52, False, 26624), (53, 53, True, 26624), (54, 60, False, 26624)),
    *((61, 61, True, 26624), (62, 62, True, 32000), (63, 63, True, 53248), (64, 64, False, 53248)),
    *((65, 65, True, 53248), (66, 73, False, 399360), (74, 85, False, 425984), (86, 100, False, 343040)),
    *((101, 114, False, 301056), (115, 115, False, 21504), (116, 116, True, 21504), (117, 119, True, 26624)),
    *((120, 120, True, 37376), (121, 124, True, 53248), (125, 125, True, 26624)),
]
ULTRA_GROUPS = ((66, 73), (74, 85), (86, 100), (101, 114))
SUPER_GROUPS = (tuple(range(42, 51)), tuple(range(53, 70)))
"""Step 4 of the paper's study of the 49B model: 26 FFNs in two. The released model is not fused."""


def _super_49b() -> Plan:
    plan = plan_of(_SUPER, 28672)
    for group in SUPER_GROUPS:
        plan = plan.fuse(group)
    return plan


SHAPES: dict[str, Shape] = {
    "smollm2-135m": Shape(SMOLLM2),
    "llama-3.1-8b": Shape(_8B, str(TWELVE_REMOVED)),
    "llama-3.1-70b": Shape(_70B),
    "llama-3.1-405b": Shape(_405B),
    "super-49b": Shape(_70B, str(_super_49b())),
    "ultra-253b": Shape(_405B, str(plan_of(_ULTRA, 53248, ULTRA_GROUPS))),
}
"""By the name of `bench --shape`; super-49b and ultra-253b are students of the 70B and 405B models."""


def shape_of(name: str) -> Shape:
    """A shape by its name, in any case; `UserError` names those there are."""
    found = SHAPES.get(name.lower())
    if found is None:
        raise UserError(f"no shape {name!r}; there are {', '.join(SHAPES)}, or name a config.json or its folder")
    return found


def steps_of(parent: Plan, plan: Plan | None) -> dict[str, Plan]:
    """The parent, the plan with nothing fused, and the plan: what a search wins and what fusion itself does.

    A step that changes nothing is left out.
    """
    steps = {"parent": parent}
    if plan is not None and plan.unfused() != parent:
        steps["searched"] = plan.unfused()
    if plan is not None and plan.groups:
        steps["fused"] = plan
    return steps


def cost_of_shape(config: Mapping[str, Any], plan: Plan, bytes_per_value: int) -> Cost:
    """Counts of a plan on a Llama of these sizes, without building it."""
    hidden, heads, words = config["hidden_size"], config["num_attention_heads"], config["vocab_size"]
    head_dim, embedding = hidden // heads, words * hidden
    tied = bool(config["tie_word_embeddings"])
    counts = ParameterCounts(
        outside=embedding * (1 if tied else 2) + hidden,
        embedding=0 if tied else embedding,
        attention=hidden + 2 * hidden * heads * head_dim,
        kv_head=2 * hidden * head_dim,
        ffn=hidden,
        channel=3 * hidden,
        linear_attention=hidden + hidden * hidden,
        linear_ffn=hidden + hidden * hidden,
    )
    layer = BlockShape(config["num_key_value_heads"], config["intermediate_size"])
    multiple = 1 if plan == Plan.identity(config["num_hidden_layers"]) else UNIT
    blocks = shapes_of(plan.blocks, [layer] * config["num_hidden_layers"], multiple)
    return Cost(blocks, counts.total(blocks), counts.embedding, head_dim, bytes_per_value)
