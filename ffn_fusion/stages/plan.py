"""`plan`: what a plan says, our own or another tool's, and its plan.json."""

import os
from collections.abc import Iterator
from pathlib import Path

from ffn_fusion.core.budget import Ledger
from ffn_fusion.core.cost_records import CostResult
from ffn_fusion.core.cost_table import check_table
from ffn_fusion.core.imports import is_changed, parse_group
from ffn_fusion.core.layout import Layout
from ffn_fusion.core.plan import Plan, contiguous
from ffn_fusion.errors import UserError
from ffn_fusion.folder import read_record, write_atomically
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.remote.configuration_ffn_fusion import WIDTH_MULTIPLE
from ffn_fusion.hf.resolve import read_source, resolve_model
from ffn_fusion.settings import Positive
from ffn_fusion.speed.stacks import facts_of

PRICES = (
    ("decode_ms", "decode step", "ms", 1),
    ("request_ms", "request", "s", 1e3),
    ("memory_bytes", "weights and cache", "GB", 1e9),
    ("kv_bytes", "cache", "kB a token", 1e3),
)
"""What a plan is priced by: resource, its name and unit in words, and how many of the ledger's units are one."""


def plan(
    source: str,
    *,
    parent: str | None = None,
    layers: Positive | None = None,
    groups: tuple[str, ...] = (),
    costs: Path | None = None,
    out: Path | None = None,
) -> str:
    """Say what a plan holds and what it costs, and write it as plan.json.

    Parameters
    ----------
    source
        One-line text, plan.json, config.json with drop lists or block_configs, mergekit YAML, or a model folder.
    parent
        The model that the plan is for; its layers are compared with the plan's. A folder of config.json will do.
    layers
        Layers of the parent, where the parent itself is not at hand.
    groups
        Source layers of a fused FFN of block_configs, such as 66-73; give the option again for each.
    costs
        What `cost` measured of the parent, on any device: the plan is priced by it.
    out
        New plan.json.
    """
    if parent is not None and layers is not None:
        raise UserError("--parent and --layers both say how many layers the parent has; choose one")
    if out is not None and out.exists():
        raise UserError(f"{out} exists; choose another --out")
    if groups and parent is None and layers is None:
        raise UserError("--groups needs the parent's layers: add --parent MODEL or --layers N")
    if costs is not None and parent is None:
        raise UserError("--costs needs the parent that they were measured on: add --parent MODEL")
    held = resolve_model(parent, weights=False) if parent is not None else None
    num_layers = held.num_layers if held else layers
    folder = ModelFolder(Path(source).expanduser())
    if _is_ordinary(folder) and not groups:
        found, layout = folder.plan, None
    else:
        own = held.shapes if held else None
        found, layout = read_source(source, num_layers, tuple(map(parse_group, groups)), own)
    if held:
        held.check_plan(found)
    said = list(_lines(found, layout, sized=held is not None))
    if held and costs is not None:
        said += _prices(found, held, costs)
    if out is not None:
        _write(found, out)
    return "\n".join(said)


def _is_ordinary(model: ModelFolder) -> bool:
    """Whether this is the folder of a model that is nobody's plan: it stands for itself."""
    is_model = os.path.isfile(model.folder / "config.json")
    return is_model and model.made_by is None and not is_changed(model.raw_config)


def _write(plan: Plan, out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, plan.to_json())
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None


def _lines(plan: Plan, layout: Layout | None, sized: bool) -> Iterator[str]:
    yield str(plan)
    layers = {layer for block in plan.blocks for layer in block.layers}
    yield (
        f"{len(layers)} source layers, {len(plan.blocks)} blocks, {len(plan.attention_layers)} attentions, "
        f"{sum(bool(block.ffns) for block in plan.blocks)} FFNs{_linear(plan)}, "
        f"{plan.num_sublayers} sequential sublayers, "
        f"fused groups: {'; '.join(map(contiguous, plan.groups)) or 'none'}"
    )
    if layout:
        widths = [block.ffn_width for block, ours in zip(layout.blocks, plan.blocks, strict=True) if ours.is_fused]
        shown = f"fused FFNs {'; '.join(f'{width:,}' for width in widths)} wide" if widths else ""
        shown = shown or f"widest FFN {max(block.ffn_width for block in layout.blocks):,}"
        yield (
            f"{layout.num_slots} slots, {layout.num_padding} of them padding, "
            f"{layout.num_parameters / 1e9:.1f} B parameters, {shown}"
        )
        if not sized and layout.is_uneven:
            yield "its blocks differ in size; with --parent MODEL the plan says which are smaller than the parent's"


def _prices(plan: Plan, parent: ModelFolder, costs: Path) -> Iterator[str]:
    """What a plan takes by a table of costs, beside its parent."""
    table = read_record(costs, CostResult).result.table
    check_table(table, facts_of(parent), table.device, table.dtype)
    ledger, request = Ledger(table, parent.shapes, WIDTH_MULTIPLE), table.scenario
    uses, own = ledger.model(plan.blocks), ledger.parent()
    yield (
        f"by the costs of {table.device}, {table.dtype}, batch {request.batch_size}, {request.prompt_length:,} + "
        f"{request.new_tokens:,} tokens" + (f", {table.tensor_parallel} devices" if table.tensor_parallel > 1 else "")
    )
    for name, what, unit, scale in PRICES:
        share = uses[name] / own[name]
        yield f"{what} {uses[name] / scale:,.4g} {unit}, the parent {own[name] / scale:,.4g}: {share:.3f}x"
    yield from (f"estimated, not measured: {size}" for size in table.extrapolated(ledger.sized(plan.blocks)))


def _linear(plan: Plan) -> str:
    """How many of its attentions and FFNs are linear layers, if any are."""
    counts = len(plan.linear_attentions), len(plan.linear_ffns)
    return f" ({counts[0]} of these attentions and {counts[1]} of these FFNs linear)" if plan.has_linear else ""
