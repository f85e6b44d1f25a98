"""Ways to cut the attention-free runs of a plan into fused groups (FFN Fusion, arXiv 2503.18908, section 4)."""

from collections.abc import Sequence

from ffn_fusion.core.dependency import apply_merges, propose_merges
from ffn_fusion.core.plan import Plan, contiguous
from ffn_fusion.errors import UserError


def fuse_runs(
    plan: Plan, widths: Sequence[int], max_width: int | None, skip_last: bool, num_runs: int | None = None
) -> Plan:
    """Fuse as the paper does: each attention-free run from its first FFN on, in groups as wide as the devices hold.

    The longest runs come first, and with `num_runs` only so many are fused: the paper fuses one of the three runs of
    its 253B model. `skip_last` leaves the last FFN of each run out, which the paper found sensitive. A group is closed
    where the next FFN would make it wider than `max_width`, which gives the fewest groups; the paper gives its groups
    but not its rule, and the third of them had room for more. `widths` are channels by source layer. Groups that the
    plan has are cut anew.
    """
    plan = plan.unfused()
    for run in attention_free_runs(plan)[:num_runs]:
        for group in _filled(run[:-1] if skip_last else run, widths, max_width):
            plan = plan.fuse(group)
    return plan


def fuse_independent(
    plan: Plan,
    matrix: Sequence[Sequence[float]],
    threshold: float,
    widths: Sequence[int],
    max_width: int | None,
    skip_last: bool,
) -> Plan:
    """Fuse neighbours, least dependent first, while no FFN of a group depends on an earlier one by over `threshold`.

    `matrix` is that of section 3: [i, j] is the distance between FFN j's output with and without FFN i.
    """
    merges = propose_merges(plan, matrix, widths, max_width, skip_last)
    return apply_merges(plan, [merge for merge in merges if merge.dependency <= threshold])


def attention_free_runs(plan: Plan) -> list[tuple[int, ...]]:
    """Source layers of consecutive blocks that are FFNs alone and not linear layers, longest run first.

    Unlike `Plan.runs`, without the FFN of the attention block before them, which the paper never fuses.
    """
    runs: list[list[int]] = [[]]
    for block in plan.blocks:
        if block.attention or block.has_linear_ffn:
            runs.append([])
        else:
            runs[-1].extend(ffn.layer for ffn in block.ffns)
    return sorted((tuple(run) for run in runs if len(run) > 1), key=len, reverse=True)


def check_groups(
    plan: Plan, groups: Sequence[Sequence[int]], widths: Sequence[int], max_width: int | None, skip_last: bool
) -> None:
    """Raise `UserError` with the reason if the FFNs of a plan cannot be fused into these groups of source layers."""
    whole = plan.unfused()
    last = {run[-1] for run in whole.runs()}
    taken: set[int] = set()
    for group in groups:
        named = f"group {contiguous(group)}"
        if len(group) < 2:
            raise UserError(f"{named} is one FFN; a group has at least two")
        if taken.intersection(group):
            raise UserError(f"{named} names FFN {min(taken.intersection(group))}, which is in a group before it")
        whole.fuse(group)  # raises if they are not neighbours without attention between them
        if skip_last and last.intersection(group):
            raise UserError(f"{named} has FFN {max(group)}, the last of its run, which is to be left out")
        if max_width is not None and (width := sum(widths[layer] for layer in group)) > max_width:
            raise UserError(f"{named} is {width} channels wide, over the {max_width} allowed")
        taken.update(group)


def _filled(run: Sequence[int], widths: Sequence[int], max_width: int | None) -> list[list[int]]:
    """The run cut from the left into groups no wider than allowed; single FFNs between them are left out."""
    groups: list[list[int]] = [[]]
    for layer in run:
        if max_width is not None and sum(widths[member] for member in [*groups[-1], layer]) > max_width:
            groups.append([])
        groups[-1].append(layer)
    return [group for group in groups if len(group) > 1]
