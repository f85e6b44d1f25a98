"""What a search under a budget goes by: scores, costs, and the limits that the budget sets."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ffn_fusion.core.budget import Ledger, Scores, Uses
from ffn_fusion.core.cost_table import CostTable
from ffn_fusion.core.search_records import INTERACTIONS, Objective, ScoreResult, Similarity
from ffn_fusion.errors import UserError
from ffn_fusion.folder import read_record
from ffn_fusion.hf.machine import where
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.remote.configuration_ffn_fusion import WIDTH_MULTIPLE
from ffn_fusion.settings import Limits, Machine
from ffn_fusion.speed.stacks import read_costs


@dataclass(frozen=True)
class Evidence:
    """What the search goes by: scores, costs, and a note where the costs are of another machine."""

    objective: Objective
    scores: Scores
    """By the objective."""
    kl: Scores
    inputs: Mapping[str, Any]
    """Of the scores: what they were made with."""
    similarity: Similarity
    ledger: Ledger
    note: str

    @property
    def table(self) -> CostTable:
        return self.ledger.table


def read_evidence(
    parent: ModelFolder,
    scores: Path,
    costs: Path,
    objective: Objective,
    *,
    machine: Machine,
    dtype: torch.dtype,
    force: bool,
) -> Evidence:
    """Scores and costs of this parent; `UserError` if they are of another or damaged, costs of another device or
    dtype, or nothing was scored by the objective."""
    scored = read_record(scores, ScoreResult)
    if scored.result.parent_key != parent.checkpoint.key:
        raise UserError(f"{scores} scores another model ({scored.result.model}), or an older version made it")
    here = where(machine, dtype)
    table, note = read_costs(costs, parent, here.device, here.dtype, force)
    if objective == "task" and scored.result.asked is None:
        raise UserError(f"{scores} holds no scores by a task; score with --tasks NAME")
    try:
        gram = load_file(scores / INTERACTIONS)["gram"].numpy()
    except (SafetensorError, OSError) as error:
        raise UserError(f"{scores / INTERACTIONS} cannot be read ({error}); run ffn-fusion score again") from None

    def by(objective: Objective) -> Scores:
        means = [getattr(score, objective).mean for score in scored.result.scores]
        return Scores(scored.result.scores, np.array(means), gram)

    ledger = Ledger(table, parent.shapes, WIDTH_MULTIPLE)
    return Evidence(objective, by(objective), by("kl"), scored.inputs, scored.result.similarity, ledger, note)


def targets(limits: Limits, ledger: Ledger) -> dict[str, Uses]:
    """Limits of resources for each budget asked for, by its name: that of the options, then each of the sweep's."""
    own = ledger.parent()
    request = ledger.table.scenario
    stated = {
        "decode_ms": _least(limits.latency_ms, limits.speedup and own["decode_ms"] / limits.speedup),
        "request_ms": limits.throughput and 1e3 * request.batch_size * request.new_tokens / limits.throughput,
        "memory_bytes": limits.memory_gb and limits.memory_gb * 1e9,
        "kv_bytes": limits.kv_bytes,
        "parameters": limits.parameters,
        "sublayers": limits.sublayers,
    }
    given = {name: float(limit) for name, limit in stated.items() if limit is not None}
    named = ", ".join(f"{name} <= {limit:,.6g}" for name, limit in given.items())
    found: dict[str, Uses] = {named: given} if given else {}
    for speedup in limits.sweep:
        at_most = _least(given.get("decode_ms"), own["decode_ms"] / speedup)
        assert at_most is not None
        found[f"{speedup:g}x"] = given | {"decode_ms": at_most}
    return found


def _least(*values: float | None) -> float | None:
    return min((value for value in values if value), default=None)
