"""What a plan may ask of its parent: sublayers that are there, and sizes that they can be cut to."""

from collections.abc import Sequence

from ffn_fusion.core.cost import BlockShape
from ffn_fusion.core.plan import Plan
from ffn_fusion.errors import UserError


def check_demands(plan: Plan, held: Plan, shapes: Sequence[BlockShape], parent: str) -> None:
    """`UserError` unless `parent` can give all of it: its own plan is `held`, the sizes of its layers are `shapes`."""
    for kind, named, there in (
        ("attention", plan.attention_layers, held.attention_layers),
        ("FFN", plan.ffn_layers, held.ffn_layers),
    ):
        extra = sorted(set(named) - set(there))
        if extra:
            raise UserError(f"the plan names {kind} {extra[0]}, which {parent} does not have ({len(there)} there)")
    for letter, named, linear, own in (
        ("A", plan.attention_layers, plan.linear_attentions, held.linear_attentions),
        ("F", plan.ffn_layers, plan.linear_ffns, held.linear_ffns),
    ):
        lost = sorted(set(named) & set(own) - set(linear))
        if lost:
            name = f"{letter}{lost[0]}"
            raise UserError(f"the plan names {name}; in {parent} a linear layer stands there, name it {name}L")
    _check_sizes(plan, shapes, parent)


def _check_sizes(plan: Plan, shapes: Sequence[BlockShape], parent: str) -> None:
    for layer, width in plan.widths.items():
        own = shapes[layer].ffn_width
        if width > own:
            raise UserError(f"the plan cuts FFN {layer} to {width:,} channels; {parent} has {own:,} there")
    for layer, kv_heads in plan.kv_heads.items():
        own = shapes[layer].kv_heads
        if own % kv_heads:
            raise UserError(
                f"the plan gives attention {layer} {kv_heads} kv heads; expected a divisor of the {own} "
                f"of {parent}, because kv heads are merged in groups of one size"
            )
