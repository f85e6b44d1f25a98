"""The pairwise dependency matrix of FFN Fusion (section 3) and the groups that it proposes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ffn_fusion.core.plan import Plan


def cosine_distance(a_nd: Tensor, b_nd: Tensor) -> Tensor:
    """1 - cos of each token's pair of vectors, [N], in float32. Two equal vectors give 0, a zero vector gives 1."""
    return 1 - torch.nn.functional.cosine_similarity(a_nd.float(), b_nd.float(), dim=-1)


@dataclass(frozen=True)
class Merge:
    """A step of the grouping: FFNs `left` and `right`, neighbours in a run, become one."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    dependency: float


def propose_merges(
    plan: Plan, matrix: Sequence[Sequence[float]], widths: Sequence[int], max_width: int | None, skip_last: bool
) -> list[Merge]:
    """Merge the FFNs of every run step by step, least dependent neighbours first.

    `matrix[i][j]` is the distance between FFN j's output with and without FFN i. The cost of a merge is the largest
    entry between a member of the left and one of the right part: fusing hides every left output from every right
    member. `skip_last` leaves the last FFN of each run out, as the paper does. A merge wider than `max_width`
    (in channels) is not proposed.
    """
    merges: list[Merge] = []
    part_of = {ffn.layer: tuple(f.layer for f in block.ffns) for block in plan.blocks for ffn in block.ffns}
    for run in plan.runs():
        parts = list(dict.fromkeys(part_of[layer] for layer in run))
        parts = parts[:-1] if skip_last else parts
        while len(parts) > 1:
            found = min(
                (
                    Merge(left, right, max(matrix[i][j] for i in left for j in right))
                    for left, right in pairwise(parts)
                    if max_width is None or sum(widths[layer] for layer in left + right) <= max_width
                ),
                key=lambda merge: merge.dependency,
                default=None,
            )
            if found is None:
                break
            merges.append(found)
            at = parts.index(found.left)
            parts[at : at + 2] = [found.left + found.right]
    return sorted(merges, key=lambda merge: merge.dependency)


def apply_merges(plan: Plan, merges: Sequence[Merge]) -> Plan:
    """The plan after these merges; a merge whose parts were not formed before joins whatever stands there."""
    for merge in merges:
        block = {ffn.layer: block for block in plan.blocks for ffn in block.ffns}
        left, right = block[merge.left[-1]], block[merge.right[0]]
        if left is not right:
            plan = plan.fuse([ffn.layer for part in (left, right) for ffn in part.ffns])
    return plan
