"""Plans of other tools: LLM-Drop's lists, mergekit's slices, `block_configs` of nemotron-nas and Puzzletron.

All take what a JSON or YAML parser gives; hf/resolve.py reads the files. Every refusal is a `UserError` of one line.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ffn_fusion.core.cost import BlockShape
from ffn_fusion.core.layout import BLOCK_CONFIGS, Group, Layout, positive
from ffn_fusion.core.plan import Attention, Block, Ffn, Plan
from ffn_fusion.errors import UserError

DROP_LISTS = ("drop_attn_list", "drop_mlp_list")
_KEPT = "a plan keeps it, because engines size their cache by layer 0"


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
    return drop_list_plan(config, num_layers or positive(config, "num_hidden_layers")), None


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
