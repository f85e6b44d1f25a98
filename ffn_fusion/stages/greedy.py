"""Greedy search: attentions removed one by one with re-scoring, then FFNs fused as far as the measured KL allows."""

from collections.abc import Callable, Sequence
from itertools import count

from ffn_fusion.core.dependency import Merge, apply_merges, propose_merges
from ffn_fusion.core.groups import check_groups, fuse_independent, fuse_runs
from ffn_fusion.core.plan import Plan, contiguous
from ffn_fusion.core.records import AnalyzeResult
from ffn_fusion.core.search_records import SearchResult, SearchStep
from ffn_fusion.core.stats import Estimate
from ffn_fusion.errors import UserError
from ffn_fusion.folder import StageFolder
from ffn_fusion.hf.meter import Meter
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.progress import track
from ffn_fusion.settings import Budget, Grouping


def search_greedily(
    analysed: AnalyzeResult,
    budget: Budget,
    grouping: Grouping,
    given: Plan | None,
    begun: Plan | None,
    meter: Meter,
    folder: StageFolder,
) -> SearchResult:
    """A plan found by measuring step after step; `given` is only measured, `begun` is where the fusing starts."""
    parent, steps = meter.parent, list[SearchStep]()

    def measure_fused(plan: Plan) -> Estimate:
        return folder.remember(f"fused {plan}", Estimate, lambda: meter.fused(plan))

    if given:
        unfused, found, kl = meter.plain(given.unfused()), given, measure_fused(given)
    else:
        if begun:
            base, unfused = begun, meter.plain(begun)
            steps.append(SearchStep("begin with the plan given", unfused, True))
        else:
            base, unfused = _remove(parent.plan, analysed, _Removals(meter, folder), budget, steps)
        limit = budget.max_kl if budget.max_kl is not None else unfused.mean * (1 + budget.fusion_slack)
        if grouping.grouping == "measured":
            widths = widths_of(base, parent)
            merges = propose_merges(base, analysed.ffn_dependency, widths, budget.max_fused_width, budget.skip_last)
            found, kl = fuse_within(base, merges, measure_fused, limit, budget.trials, steps)
        else:
            ruled = _by_rule(base, parent, analysed, budget, grouping)
            found, kl = _whole_or_not(base, ruled, measure_fused, limit, steps)
    predicted = _predicted(parent.plan, found, analysed)
    return SearchResult(str(found), predicted, unfused, kl, meter.calibrates, meter.sample, steps)


def widths_of(plan: Plan, parent: ModelFolder) -> list[int]:
    """Channels that each FFN of the parent has in a plan."""
    return [plan.widths.get(layer, own) for layer, own in enumerate(parent.config.ffn_widths)]


def check_grouping(grouping: Grouping, budget: Budget, given: Plan | None, parent: ModelFolder) -> None:
    """`UserError` if a rule lacks its threshold or has one in vain, or the groups of a given plan break the rules."""
    if (grouping.grouping == "threshold") != (grouping.max_dependency is not None):
        raise UserError("--grouping threshold and --max-dependency X go together; give both or neither")
    if given:
        check_groups(given, given.groups, widths_of(given, parent), budget.max_fused_width, budget.skip_last)


def _by_rule(base: Plan, parent: ModelFolder, analysed: AnalyzeResult, budget: Budget, grouping: Grouping) -> Plan:
    """The plan with the groups that the paper's rule or a threshold of dependency gives."""
    widths, most = widths_of(base, parent), budget.max_fused_width
    if grouping.max_dependency is None:
        return fuse_runs(base, widths, most, budget.skip_last)
    return fuse_independent(base, analysed.ffn_dependency, grouping.max_dependency, widths, most, budget.skip_last)


class _Removals:
    """Measures sets of removed attentions, each once."""

    def __init__(self, meter: Meter, folder: StageFolder) -> None:
        self.meter, self.folder = meter, folder

    def __call__(self, removed: list[int], candidates: list[int]) -> dict[int, Estimate]:
        key = f"without {sorted(removed)}: {sorted(candidates)}"
        return self.folder.remember(key, dict[int, Estimate], lambda: self.meter.removals(removed, candidates))


def _remove(
    plan: Plan, analysed: AnalyzeResult, removals: _Removals, budget: Budget, steps: list[SearchStep]
) -> tuple[Plan, Estimate]:
    """Remove attentions one by one; each step re-scores those whose last known cost is lowest.

    A candidate's cost is what the KL rose by when it was last tried, at first its single score: costs do not add up,
    but they keep their order well enough that re-scoring a few finds the best.
    """
    cost = {layer: score.mean for layer, score in enumerate(analysed.attention) if score and layer > 0}
    wanted = len(cost) if budget.remove_attention is None else min(budget.remove_attention, len(cost))
    removed: list[int] = []
    kl = removals.meter.plain(plan)
    for _ in track(range(wanted), "search: attentions removed", wanted):
        tried = removals(removed, sorted(cost, key=cost.__getitem__)[: budget.candidates])
        best = min(tried, key=lambda layer: tried[layer].mean)
        cost |= {layer: found.mean - kl.mean for layer, found in tried.items()}
        fits = budget.max_kl is None or tried[best].mean <= budget.max_kl
        steps.append(SearchStep(f"remove attention {best}", tried[best], fits))
        if not fits:
            break
        removed.append(best)
        kl = tried[best]
        del cost[best]
    return plan.without_attention(removed), kl


def fuse_within(
    plan: Plan,
    merges: Sequence[Merge],
    measure: Callable[[Plan], Estimate],
    limit: float,
    trials: int,
    steps: list[SearchStep],
) -> tuple[Plan, Estimate]:
    """Accept as many merges as keep the measured KL within `limit`, in the order given.

    All are tried at once; where that is too much the list is halved, so that a single bad merge is found with few
    measurements; it ends after `trials` of them. Returns the plan and its measured KL.
    """
    best = measure(plan)
    steps.append(SearchStep("calibrate, nothing fused", best, True))
    numbers = count(1)

    def accept(current: Plan, best: Estimate, part: Sequence[Merge]) -> tuple[Plan, Estimate]:
        trial = apply_merges(current, part)
        number = next(numbers)
        if trial == current or number > trials:
            return current, best
        kl = measure(trial)
        kept = kl.mean <= limit
        groups = "; ".join(contiguous(group) for group in trial.groups)
        steps.append(SearchStep(f"fuse, trial {number}: {groups}", kl, kept))
        if kept:
            return trial, kl
        if len(part) == 1:
            return current, best
        middle = len(part) // 2
        current, best = accept(current, best, part[:middle])
        return accept(current, best, part[middle:])

    return accept(plan, best, merges)


def _whole_or_not(
    plan: Plan, ruled: Plan, measure: Callable[[Plan], Estimate], limit: float, steps: list[SearchStep]
) -> tuple[Plan, Estimate]:
    """The groups of a rule if their measured KL is within `limit`, else none; the plan taken and its KL."""
    apart = measure(plan)
    steps.append(SearchStep("calibrate, nothing fused", apart, True))
    if ruled == plan:
        return plan, apart
    kl = measure(ruled)
    kept = kl.mean <= limit
    steps.append(SearchStep(f"fuse by rule: {'; '.join(map(contiguous, ruled.groups))}", kl, kept))
    return (ruled, kl) if kept else (plan, apart)


def _predicted(parent: Plan, plan: Plan, analysed: AnalyzeResult) -> float:
    """Sum of the single-removal scores of everything the plan leaves out; narrower sublayers have no score."""
    attentions = set(parent.attention_layers) - set(plan.attention_layers)
    ffns = set(parent.ffn_layers) - set(plan.ffn_layers)
    scores = [analysed.attention[layer] for layer in attentions] + [analysed.ffn[layer] for layer in ffns]
    return sum(score.mean for score in scores if score)
