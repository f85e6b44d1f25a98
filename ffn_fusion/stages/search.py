"""`search`: which attentions to remove and which FFNs to fuse, every decision measured."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path

from ffn_fusion.core.dependency import Merge, apply_merges, propose_merges
from ffn_fusion.core.plan import Plan, contiguous
from ffn_fusion.core.records import AnalyzeResult, SearchResult, SearchStep
from ffn_fusion.core.stats import Estimate
from ffn_fusion.errors import UserError
from ffn_fusion.folder import Environment, Record, StageFolder, read_record, run_stage, write_atomically
from ffn_fusion.hf.machine import device_map, pick_dtype, where
from ffn_fusion.hf.meter import Meter
from ffn_fusion.hf.model import PLAN_FILE, ModelFolder
from ffn_fusion.hf.resolve import load_tokenizer, read_plan, resolve_model
from ffn_fusion.hf.text import read_windows
from ffn_fusion.progress import track
from ffn_fusion.settings import Budget, Fusion, Machine, Positive, Text, TwoOrMore


def search(
    model: str,
    *,
    analysis: Path,
    out: Path,
    plan: str | None = None,
    start: str | None = None,
    windows: Positive = 8,
    fit_windows: TwoOrMore = 16,
    budget: Budget = Budget(),  # noqa: B008, frozen
    fusion: Fusion = Fusion(),  # noqa: B008
    text: Text = Text(),  # noqa: B008
    machine: Machine = Machine(),  # noqa: B008
) -> Record[SearchResult]:
    """Find a plan: remove attentions greedily with re-scoring, then fuse FFNs as far as the measured KL allows.

    Parameters
    ----------
    model
        Folder, GGUF file, Hub id or builtin:smollm2-135m.
    analysis
        Folder that `analyze` made of the same model.
    out
        New folder; the plan is its plan.json.
    plan
        A plan to measure instead of searching, in any form that `fuse` reads.
    start
        A plan to begin with in place of removing attentions, in any form that `fuse` reads; FFNs are grouped anew.
    windows
        Windows of text to measure on.
    fit_windows
        Windows of text to fit candidates on; fewer than for the student do to compare them.
    """
    parent = resolve_model(model)
    analysed = read_record(analysis, AnalyzeResult).result
    if analysed.num_layers != parent.num_layers:
        raise UserError(f"{analysis} analyses a model of {analysed.num_layers} layers, {model} has {parent.num_layers}")
    given, begun = given_plans(parent, plan, start, budget)
    tokenizer = load_tokenizer(parent, machine.trust_remote_code)
    measure = read_windows(text, tokenizer, windows, "measure")
    fit = read_windows(text, tokenizer, fit_windows, "fit")
    dtype = pick_dtype(machine, parent.checkpoint)
    inputs = {
        "model": parent.fingerprint,
        "analysis": analysed.sample.digest,
        "text": [measure.sample.digest, fit.sample.digest],
        "plan": str(given or ""),
        "budget": asdict(budget),
        "fusion": asdict(fusion),
        "dtype": str(dtype),
        **({"start": str(begun)} if begun else {}),  # so that results from before there was one stay valid
    }

    def work(folder: StageFolder) -> tuple[SearchResult, Environment]:
        meter = Meter(parent, parent.load(dtype, device_map(machine)), measure.ids, fit.ids, fusion, machine)
        steps: list[SearchStep] = []

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
            widths = [base.widths.get(layer, own) for layer, own in enumerate(parent.config.ffn_widths)]
            merges = propose_merges(base, analysed.ffn_dependency, widths, budget.max_fused_width, budget.skip_last)
            limit = budget.max_kl if budget.max_kl is not None else unfused.mean * (1 + budget.fusion_slack)
            found, kl = fuse_within(base, merges, measure_fused, limit, budget.trials, steps)
        write_atomically(folder.path / PLAN_FILE, found.to_json())
        predicted = _predicted(parent.plan, found, analysed)
        calibrated = fusion.calibrate != "none"
        result = SearchResult(str(found), predicted, unfused, kl, calibrated, measure.sample, steps)
        return result, where(machine, dtype)

    return run_stage("search", out, inputs, SearchResult, work)


def given_plans(
    parent: ModelFolder, plan: str | None, start: str | None, budget: Budget
) -> tuple[Plan | None, Plan | None]:
    """The plan to measure and the plan to begin with, its groups taken apart; at most one of them is not None.

    `UserError` if the dial is not turned, is turned twice, or a plan does not fit the parent.
    """
    if start is not None and (plan is not None or budget.remove_attention is not None):
        other = "--plan" if plan is not None else "--remove-attention"
        raise UserError(f"--start says which attentions are removed, and so does {other}; choose one")
    if plan is None and start is None and budget.remove_attention is None and budget.max_kl is None:
        raise UserError("say how far to go: --max-kl X, --remove-attention N, --plan 'A0F0 ...', or --start PLAN")
    given, begun = (None if text is None else read_plan(text, parent) for text in (plan, start))
    return given, begun.unfused() if begun else None


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


def _predicted(parent: Plan, plan: Plan, analysed: AnalyzeResult) -> float:
    """Sum of the single-removal scores of everything the plan leaves out; narrower sublayers have no score."""
    attentions = set(parent.attention_layers) - set(plan.attention_layers)
    ffns = set(parent.ffn_layers) - set(plan.ffn_layers)
    scores = [analysed.attention[layer] for layer in attentions] + [analysed.ffn[layer] for layer in ffns]
    return sum(score.mean for score in scores if score)
