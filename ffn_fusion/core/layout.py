"""The layout that a `block_configs` list describes, in the keys of nemotron-nas or of Puzzletron, as a plan.

Every refusal is a `UserError` of one line.
"""

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
WIDTH_MULTIPLE = 256
_UNKNOWN = {
    "attention": ("sparsify", "num_sink_tokens", "window_length", "mamba", "llama4"),
    "ffn": ("sparsify", "moe"),
}
"""What `block_configs` can ask for and a plan cannot say."""


@dataclass(frozen=True)
class LayoutBlock:
    """A real block of `block_configs`: its index there; `kv_heads` and `ffn_width` are 0 where there is none, and where
    a linear layer stands in its place."""

    slot: int
    kv_heads: int
    ffn_width: int
    linear_attention: bool = False
    linear_ffn: bool = False

    @property
    def has_attention(self) -> bool:
        return self.kv_heads > 0 or self.linear_attention

    @property
    def has_ffn(self) -> bool:
        return self.ffn_width > 0 or self.linear_ffn

    def of(self, layers: Group, own: BlockShape | None) -> Block:
        """The plan's block of these source layers, with the sizes that differ from the first one's `own`, if known."""
        same_heads = own is None or self.linear_attention or self.kv_heads == own.kv_heads
        kv_heads = None if same_heads else self.kv_heads
        # nemotron-nas can say multiples of 256 only, so the parent's own width may be there rounded up.
        whole = own is None or self.ffn_width in (own.ffn_width, padded_width(own.ffn_width, WIDTH_MULTIPLE))
        width = None if whole or len(layers) > 1 or self.linear_ffn else self.ffn_width
        attention = Attention(layers[0], kv_heads, self.linear_attention) if self.has_attention else None
        return Block(attention, tuple(Ffn(layer, width, self.linear_ffn) for layer in layers) if self.has_ffn else ())


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
        hidden_size, num_heads = (positive(config, name) for name in ("hidden_size", "num_attention_heads"))
        found = [
            LayoutBlock(
                slot,
                _kv_heads(entry["attention"], num_heads),
                _width(entry["ffn"], hidden_size),
                is_linear(entry["attention"]),
                is_linear(entry["ffn"]),
            )
            for slot, entry in enumerate(entries)
        ]
        return cls(
            num_slots=len(entries),
            blocks=tuple(block for block in found if block.has_attention or block.has_ffn),
            hidden_size=hidden_size,
            num_heads=num_heads,
            head_dim=positive(config, "head_dim") if config.get("head_dim") else hidden_size // num_heads,
            vocab_size=positive(config, "vocab_size"),
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def num_attentions(self) -> int:
        return sum(block.has_attention for block in self.blocks)

    @property
    def num_ffns(self) -> int:
        return sum(block.has_ffn for block in self.blocks)

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
        """Weights of a model with gated FFNs, [d, d] linear layers and one gain a norm.

        Biases and norms of queries and keys are not counted.
        """
        d = self.hidden_size
        heads = sum(2 * (self.num_heads + block.kv_heads) for block in self.blocks if block.kv_heads)
        attention = heads * self.head_dim * d
        ffn = 3 * d * sum(block.ffn_width for block in self.blocks)
        linear = d * d * sum(block.linear_attention + block.linear_ffn for block in self.blocks)
        norms = d * (self.num_attentions + self.num_ffns + 1)
        return attention + ffn + linear + norms + (1 if self.tied else 2) * self.vocab_size * d

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
            if len(layers) > 1 and not block.has_ffn:
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
    `intermediate_size`; a linear layer in their place has neither. Other keys stay.
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
        attention["n_heads_in_group"] = None if is_linear(attention) else _group(config, attention, where)
    if not ffn["no_op"] and not is_linear(ffn):
        _check_ffn(config, ffn, where)
    return {**entry, "attention": attention, "ffn": ffn}


def is_linear(entry: Mapping[str, Any]) -> bool:
    """Whether a linear layer stands in the place of an attention or FFN of `block_configs`."""
    return bool(entry.get("replace_with_linear")) and not entry.get("no_op")


def _group(config: Mapping[str, Any], attention: Mapping[str, Any], where: str) -> int:
    """Query heads a kv head, from either tool's key."""
    heads = positive(config, "num_attention_heads")
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
    return 0 if attention["no_op"] or is_linear(attention) else num_heads // int(attention["n_heads_in_group"])


def _width(ffn: Mapping[str, Any], hidden_size: int) -> int:
    """Two thirds of the multiplier times the hidden size, cut to an integer, up to a multiple of 256."""
    if ffn["no_op"] or is_linear(ffn):
        return 0
    if not ffn.get("ffn_mult"):
        return int(ffn["intermediate_size"])
    return padded_width(int(2 * ffn["ffn_mult"] * hidden_size / 3), WIDTH_MULTIPLE)


def positive(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise UserError(f"{name} is {value!r}; expected a positive number")
    return value
