"""Plans of other tools: LLM-Drop's lists, mergekit's slices, `block_configs` of nemotron-nas and Puzzletron.

All take what a JSON or YAML parser gives; hf/resolve.py reads the files. Every refusal is a `UserError` of one line.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ffn_fusion.core.cost import BlockShape
from ffn_fusion.core.fusion import padded_width
from ffn_fusion.core.plan import Attention, Block, Ffn, Plan, contiguous
from ffn_fusion.errors import UserError

Group = tuple[int, ...]
BLOCK_CONFIGS = "block_configs"
DROP_LISTS = ("drop_attn_list", "drop_mlp_list")
WIDTH_MULTIPLE = 256
_UNKNOWN = {
    "attention": ("replace_with_linear", "sparsify", "num_sink_tokens", "window_length", "mamba", "llama4"),
    "ffn": ("replace_with_linear", "sparsify", "moe"),
}
"""What `block_configs` can ask for and a plan cannot say."""
_KEPT = "a plan keeps it, because engines size their cache by layer 0"


@dataclass(frozen=True)
class LayoutBlock:
    """A real block of `block_configs`: its index there; `kv_heads` and `ffn_width` are 0 where there is none."""

    slot: int
    kv_heads: int
    ffn_width: int

    def of(self, layers: Group, own: BlockShape | None) -> Block:
        """The plan's block of these source layers, with the sizes that differ from the first one's `own`, if known."""
        kv_heads = None if own is None or self.kv_heads == own.kv_heads else self.kv_heads
        # nemotron-nas can say multiples of 256 only, so the parent's own width may be there rounded up.
        whole = own is None or self.ffn_width in (own.ffn_width, padded_width(own.ffn_width, WIDTH_MULTIPLE))
        width = None if whole or len(layers) > 1 else self.ffn_width
        attention = Attention(layers[0], kv_heads) if self.kv_heads else None
        return Block(attention, tuple(Ffn(layer, width) for layer in layers) if self.ffn_width else ())


@dataclass(frozen=True)
class Layout:
    """What a `block_configs` list describes, its padding left out, with the sizes that its parameters follow from."""

    num_slots: int
    blocks: tuple[LayoutBlock, ...]
    hidden_size: int
    num_heads: int
    head_dim: int
    vocab_size: int
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Layout":
        """Read a configuration with `block_configs`, in nemotron-nas' or in Puzzletron's keys."""
        entries = portable_blocks(config)
        if any(entry.get("following_ffns") for entry in entries):
            raise UserError("block_configs are in folded form, several FFNs a slot; use the student it was made from")
        hidden_size, num_heads = (_positive(config, name) for name in ("hidden_size", "num_attention_heads"))
        found = [
            LayoutBlock(slot, _kv_heads(entry["attention"], num_heads), _width(entry["ffn"], hidden_size))
            for slot, entry in enumerate(entries)
        ]
        return cls(
            num_slots=len(entries),
            blocks=tuple(block for block in found if block.kv_heads or block.ffn_width),
            hidden_size=hidden_size,
            num_heads=num_heads,
            head_dim=_positive(config, "head_dim") if config.get("head_dim") else hidden_size // num_heads,
            vocab_size=_positive(config, "vocab_size"),
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def num_attentions(self) -> int:
        return sum(block.kv_heads > 0 for block in self.blocks)

    @property
    def num_ffns(self) -> int:
        return sum(block.ffn_width > 0 for block in self.blocks)

    @property
    def num_padding(self) -> int:
        """Slots with neither attention nor FFN."""
        return self.num_slots - len(self.blocks)

    @property
    def is_uneven(self) -> bool:
        """Whether its attentions, or its FFNs, differ in size."""
        sizes = [(block.kv_heads, block.ffn_width) for block in self.blocks]
        return any(len(set(column) - {0}) > 1 for column in zip(*sizes, strict=True))

    @property
    def num_parameters(self) -> int:
        """Weights of a model with gated FFNs and one gain a norm; biases and norms of queries and keys not counted."""
        d = self.hidden_size
        heads = sum(2 * (self.num_heads + block.kv_heads) for block in self.blocks if block.kv_heads)
        attention = heads * self.head_dim * d
        ffn = 3 * d * sum(block.ffn_width for block in self.blocks)
        norms = d * (self.num_attentions + self.num_ffns + 1)
        return attention + ffn + norms + (1 if self.tied else 2) * self.vocab_size * d

    def plan(self, num_layers: int, groups: Sequence[Group] = (), own: Sequence[BlockShape] | None = None) -> Plan:
        """The plan of this layout for a parent of `num_layers` layers.

        With as many slots as the parent has layers, each slot is its layer. Else, or with `groups`, blocks take the
        parent's layers in order, and a block that comes to the first layer of a group takes all of the group. Widths
        cannot tell the groups: members may have been pruned before they were fused. `own` has the sizes of the
        parent's layers; kv heads and widths that differ from them are the plan's, but for the members of a group,
        whose widths the block's alone does not tell: they are taken whole.
        """
        in_place = num_layers == self.num_slots and not groups
        named = [(b.slot,) for b in self.blocks] if in_place else self._in_order(num_layers, groups)
        pairs = zip(self.blocks, named, strict=True)
        return Plan(tuple(block.of(layers, own[layers[0]] if own else None) for block, layers in pairs))

    def _in_order(self, num_layers: int, groups: Sequence[Group]) -> list[Group]:
        starts = {group[0]: group for group in _checked(groups, num_layers)}
        named: list[Group] = []
        at = 0
        for block in self.blocks:
            layers = starts.get(at, (at,))
            if len(layers) > 1 and not block.ffn_width:
                raise UserError(f"--groups {contiguous(layers)} falls on slot {block.slot}, which has no FFN")
            named.append(layers)
            at = layers[-1] + 1
        if at != num_layers:
            given = f" with groups {', '.join(map(contiguous, groups))}" if groups else ""
            raise UserError(
                f"{len(self.blocks)} blocks stand for {at} source layers{given}, the parent has {num_layers}; say "
                "which layers each fused FFN holds: ffn-fusion plan SOURCE --groups 66-73 --groups 74-85 --out P.json"
            )
        return named


def config_plan(
    config: Mapping[str, Any], num_layers: int | None, groups: Sequence[Group], own: Sequence[BlockShape] | None = None
) -> tuple[Plan, Layout | None]:
    """Plan of a `config.json` with `block_configs` or drop lists, for a parent with its own layers if not `num_layers`.

    The layout is that of `block_configs`, or None. `own` has the sizes of the parent's layers, as in `Layout.plan`.
    """
    if config.get(BLOCK_CONFIGS) is not None:
        layout = Layout.of(config)
        return layout.plan(num_layers or layout.num_slots, groups, own), layout
    if not is_changed(config):
        raise UserError(f"holds no plan: neither 'blocks' of a plan, nor {', '.join(DROP_LISTS)}, nor {BLOCK_CONFIGS}")
    if groups:
        raise UserError("--groups names the fused FFNs of block_configs; this holds drop lists, which fuse nothing")
    return drop_list_plan(config, num_layers or _positive(config, "num_hidden_layers")), None


def is_changed(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` says what another tool changed; others describe an ordinary model."""
    return any(config.get(name) is not None for name in (BLOCK_CONFIGS, *DROP_LISTS))


def drop_list_plan(config: Mapping[str, Any], num_layers: int) -> Plan:
    """Plan of LLM-Drop's `drop_attn_list` and `drop_mlp_list`: layer numbers, or one bool a layer."""
    stated = config.get("num_hidden_layers", num_layers)
    if stated != num_layers:
        raise UserError(f"its drop lists are for a model of {stated} layers, the parent has {num_layers}")
    attentions, ffns = (_dropped(config.get(name) or [], name, num_layers) for name in DROP_LISTS)
    if 0 in attentions:
        raise UserError(f"{DROP_LISTS[0]} drops the attention of layer 0; {_KEPT}: take 0 out of the list")
    blocks = [
        Block(None if layer in attentions else Attention(layer), () if layer in ffns else (Ffn(layer),))
        for layer in range(num_layers)
    ]
    return Plan(tuple(block for block in blocks if block.layers))


def _dropped(listed: Any, name: str, num_layers: int) -> set[int]:
    """Layers that a list drops. In Python a bool is an int, in a drop list it is not."""
    kinds = {type(entry) for entry in listed} if isinstance(listed, list) else {str}
    if kinds == {bool}:
        if len(listed) != num_layers:
            raise UserError(
                f"{name} has {len(listed)} bools; expected one for each of the parent's {num_layers} layers"
            )
        return {layer for layer, drop in enumerate(listed) if drop}
    if not kinds <= {int}:
        raise UserError(f"{name} is {str(listed)[:60]!r}; expected a list of layer numbers, or of bools")
    missing = sorted(layer for layer in listed if not 0 <= layer < num_layers)
    if missing:
        raise UserError(f"{name} names layer {missing[0]}; the parent has layers 0 to {num_layers - 1}")
    return set(listed)


def mergekit_plan(data: Mapping[str, Any], num_layers: int | None) -> Plan:
    """Plan of a mergekit configuration with `merge_method: passthrough` that keeps slices of one model, each once.

    Without `num_layers` the last layer named is taken to exist.
    """
    method = data.get("merge_method")
    if method != "passthrough":
        raise UserError(f"merge_method is {method!r}; only passthrough, which keeps layers as they are, is a plan")
    slices = data.get("slices")
    if not isinstance(slices, list) or not slices:
        raise UserError("a mergekit configuration needs 'slices', a list of 'sources' with 'model' and 'layer_range'")
    sources = [_only_source(entry) for entry in slices]
    models = list(dict.fromkeys(str(source.get("model")) for source in sources))
    if len(models) > 1:
        raise UserError(f"slices are of {len(models)} models, {models[0]} and {models[1]}; a plan has one parent")
    layers = [layer for source in sources for layer in _layer_range(source, num_layers)]
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        raise UserError(f"slices repeat layer {twice[0]}; a plan names each sublayer once, so a layer cannot run twice")
    if layers[0] != 0:
        raise UserError(f"slices begin with layer {layers[0]}, not with the attention of layer 0; {_KEPT}")
    return Plan(tuple(Block(Attention(layer), (Ffn(layer),)) for layer in layers))


def _only_source(entry: Any) -> Mapping[str, Any]:
    sources = entry.get("sources") if isinstance(entry, Mapping) else None
    if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], Mapping):
        raise UserError("a slice of a passthrough merge has exactly one source, with 'model' and 'layer_range'")
    if sources[0].get("parameters") or entry.get("parameters"):
        raise UserError("a slice has parameters, which scale weights; a plan takes layers as they are")
    return sources[0]


def _layer_range(source: Mapping[str, Any], num_layers: int | None) -> range:
    bounds = source.get("layer_range")
    if not isinstance(bounds, list) or len(bounds) != 2 or any(type(bound) is not int for bound in bounds):
        raise UserError(f"layer_range is {bounds!r}; expected [first, last + 1]")
    first, end = bounds
    if not 0 <= first < end:
        raise UserError(f"layer_range {bounds} is empty; expected [first, last + 1]")
    if num_layers is not None and end > num_layers:
        raise UserError(f"layer_range {bounds} goes beyond the parent's {num_layers} layers")
    return range(first, end)


def parse_group(text: str) -> Group:
    """Layers of ``--groups 66-73``."""
    match = re.fullmatch(r"(\d+)-(\d+)", text.strip())
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(f"--groups {text!r} is no range of layers; expected one such as 66-73")
    return tuple(range(int(match[1]), int(match[2]) + 1))


def _checked(groups: Sequence[Group], num_layers: int) -> list[Group]:
    for group in groups:
        if len(group) < 2 or any(b != a + 1 for a, b in pairwise(group)):
            raise UserError(f"--groups {contiguous(group)} is no range of two or more layers")
        if group[-1] >= num_layers:
            raise UserError(f"--groups {contiguous(group)} goes beyond the parent's {num_layers} layers")
    ordered = sorted(groups)
    for a, b in pairwise(ordered):
        if b[0] <= a[-1]:
            raise UserError(f"--groups {contiguous(a)} and {contiguous(b)} overlap; a layer has one FFN")
    return ordered


def portable_blocks(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of `block_configs`, Puzzletron's in the keys of nemotron-nas; `UserError` for what we cannot run.

    Every attention that is there gets `n_heads_in_group` (query heads a kv head), every FFN keeps `ffn_mult` or
    `intermediate_size`; other keys stay.
    """
    entries = config[BLOCK_CONFIGS]
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{BLOCK_CONFIGS} is no list of blocks")
    if config.get("num_hidden_layers", len(entries)) != len(entries):
        raise UserError(f"{BLOCK_CONFIGS} has {len(entries)} entries for {config['num_hidden_layers']} layers")
    return [_portable(config, entry, f"{BLOCK_CONFIGS}[{at}]") for at, entry in enumerate(entries)]


def _portable(config: Mapping[str, Any], entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or not all(isinstance(entry.get(part), Mapping) for part in _UNKNOWN):
        raise UserError(f"{where} needs an 'attention' and an 'ffn', each with its settings")
    if entry.get("parallel_blocks"):
        raise UserError(f"{where} has parallel_blocks, which a plan cannot say")
    for part, names in _UNKNOWN.items():
        used = next((name for name in names if entry[part].get(name)), None)
        if used:
            raise UserError(f"{where}.{part} has {used}, which neither a plan nor our models can express")
    attention, ffn = ({"no_op": False, **entry[part]} for part in _UNKNOWN)
    if not attention["no_op"]:
        attention["n_heads_in_group"] = _group(config, attention, where)
    if not ffn["no_op"]:
        _check_ffn(config, ffn, where)
    return {**entry, "attention": attention, "ffn": ffn}


def _group(config: Mapping[str, Any], attention: Mapping[str, Any], where: str) -> int:
    """Query heads a kv head, from either tool's key."""
    heads = _positive(config, "num_attention_heads")
    name = "n_heads_in_group" if attention.get("n_heads_in_group") else "num_key_value_heads"
    count = attention.get(name)
    if type(count) is not int or count < 1 or heads % count:
        raise UserError(f"{where}.attention has {name} {count!r}; expected a divisor of {heads} heads, or no_op")
    return count if name == "n_heads_in_group" else heads // count


def _check_ffn(config: Mapping[str, Any], ffn: Mapping[str, Any], where: str) -> None:
    size = ffn.get("ffn_mult") or ffn.get("intermediate_size")
    if not isinstance(size, int | float) or size <= 0:
        raise UserError(f"{where}.ffn has size {size!r}; expected ffn_mult or intermediate_size, or no_op")
    own, common = ffn.get("hidden_act"), config.get("hidden_act")
    if own and common and own != common:
        raise UserError(f"{where}.ffn has activation {own!r} and the model {common!r}; we run one for all blocks")


def _kv_heads(attention: Mapping[str, Any], num_heads: int) -> int:
    return 0 if attention["no_op"] else num_heads // int(attention["n_heads_in_group"])


def _width(ffn: Mapping[str, Any], hidden_size: int) -> int:
    """Two thirds of the multiplier times the hidden size, cut to an integer, up to a multiple of 256."""
    if ffn["no_op"]:
        return 0
    if not ffn.get("ffn_mult"):
        return int(ffn["intermediate_size"])
    return padded_width(int(2 * ffn["ffn_mult"] * hidden_size / 3), WIDTH_MULTIPLE)


def _positive(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise UserError(f"{name} is {value!r}; expected a positive number")
    return value
