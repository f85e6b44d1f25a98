"""`search`: which sublayers to remove, narrow and fuse, every plan that counts measured."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ffn_fusion.core.plan import Plan
from ffn_fusion.core.records import AnalyzeResult
from ffn_fusion.core.search_records import Objective, SearchResult
from ffn_fusion.errors import UserError, needs_extra
from ffn_fusion.folder import RECORD, Environment, Record, StageFolder, read_record, run_stage, write_atomically
from ffn_fusion.hf.machine import where
from ffn_fusion.hf.meter import Ask, Meter
from ffn_fusion.hf.model import PLAN_FILE, ModelFolder
from ffn_fusion.hf.resolve import read_plan, resolve_model
from ffn_fusion.hf.setup import set_up
from ffn_fusion.settings import Budget, Fusion, Grouping, Limits, Machine, Method, Positive, Text, TwoOrMore
from ffn_fusion.stages import evidence, greedy, puzzle


def search(
    model: str,
    *,
    out: Path,
    analysis: Path | None = None,
    scores: Path | None = None,
    costs: Path | None = None,
    force_costs: bool = False,
    plan: str | None = None,
    start: str | None = None,
    library: Path | None = None,
    method: Method = "mip",
    objective: Objective = "kl",
    interactions: bool = True,
    groups: bool = True,
    windows: Positive = 8,
    fit_windows: TwoOrMore = 16,
    budget: Budget = Budget(),  # noqa: B008, frozen
    grouping: Grouping = Grouping(),  # noqa: B008
    limits: Limits = Limits(),  # noqa: B008
    fusion: Fusion = Fusion(),  # noqa: B008
    text: Text = Text(),  # noqa: B008
    machine: Machine = Machine(),  # noqa: B008
) -> Record[SearchResult]:
    """Find a plan within a hardware budget (Puzzle), or remove attentions greedily and fuse what that leaves.

    A hardware budget (--speedup, --memory-gb, ...) needs --scores and --costs; --remove-attention and --max-kl need
    --analysis.

    Parameters
    ----------
    model
        Folder, GGUF file, Hub id or builtin:smollm2-135m.
    out
        New folder; the plan is its plan.json.
    analysis
        Folder that `analyze` made of the same model.
    scores
        Folder that `score` made of the same model.
    costs
        Folder that `cost` made on the machine that the budget is for.
    force_costs
        Use costs of another device or dtype; the result says so.
    plan
        A plan to measure instead of searching, in any form that `fuse` reads.
    start
        A plan to begin with in place of removing attentions, in any form that `fuse` reads; FFNs are grouped anew.
    library
        Trained blocks to build candidates with, a folder that `bld` made of the same parent.
    method
        How a plan is chosen within a hardware budget: the solver, or one of the rivals it is compared with.
    objective
        What to lose least of within a hardware budget: KL to the parent, the LM loss, or the loss of right answers to
        the tasks that `score --tasks` asked.
    interactions
        Count how changes interact, not only the sum of their scores.
    groups
        Let the solver fuse FFNs.
    windows
        Windows of text to measure on.
    fit_windows
        Windows of text to fit candidates on; fewer than for the student do to compare them.
    """
    parent = resolve_model(model)
    given, begun = given_plans(parent, plan, start, budget, limits)
    check_objective(objective, limits)
    greedy.check_grouping(grouping, budget, given, parent)
    setup = set_up(parent, library, windows, fit_windows, fusion=fusion, text=text, machine=machine)
    inputs = setup.inputs | {
        "plan": str(given or ""),
        "budget": asdict(budget),
        # Left out where they are not used, so that results from before there were any stay valid.
        **({"start": str(begun)} if begun else {}),
        **({"grouping": asdict(grouping)} if grouping != Grouping() else {}),
        **({"objective": objective} if objective != "kl" else {}),
    }
    ask: Ask | None = None
    within: Callable[[Meter, StageFolder], SearchResult]
    if limits.given:
        if grouping != Grouping():
            raise UserError(
                f"within {limits.given} the solver groups the FFNs; leave --grouping out, or use --no-groups"
            )
        rule = puzzle.Rule(method, interactions, groups, budget.trials, budget.max_fused_width, text.seed)
        scores, costs = _needed(scores, "--scores", "score"), _needed(costs, "--costs", "cost")
        known = evidence.read_evidence(
            parent, scores, costs, objective, machine=machine, dtype=setup.dtype, force=force_costs
        )
        wanted = evidence.targets(limits, known.ledger)
        inputs |= {"scores": _digest(scores), "costs": _digest(costs), "limits": asdict(limits), "rule": asdict(rule)}
        within = partial(puzzle.search_within, known, wanted, rule)
        if objective == "task":
            with needs_extra("--objective task", "eval"):
                from ffn_fusion.tasks.quiz import Quiz  # an extra, and slow to import
            ask = Quiz.again(known.inputs, setup.tokenizer)
    else:
        analysed = _analysis(_needed(analysis, "--analysis", "analyze"), parent)
        inputs |= {"analysis": analysed.sample.digest}
        within = partial(greedy.search_greedily, analysed, budget, grouping, given, begun)

    def work(folder: StageFolder) -> tuple[SearchResult, Environment]:
        result = within(setup.meter(ask), folder)
        write_atomically(folder.path / PLAN_FILE, Plan.parse(result.plan).to_json())
        return result, where(machine, setup.dtype)

    return run_stage("search", out, inputs, SearchResult, work)


def given_plans(
    parent: ModelFolder, plan: str | None, start: str | None, budget: Budget, limits: Limits
) -> tuple[Plan | None, Plan | None]:
    """The plan to measure and the plan to begin with, its groups taken apart; at most one of them is not None.

    `UserError` if the dial is not turned, is turned twice, or a plan does not fit the parent.
    """
    dials = {
        "--remove-attention": budget.remove_attention,
        "--start": start,
        "--plan": plan,
        limits.given: limits.given,
    }
    turned = [name for name, value in dials.items() if value]
    if len(turned) > 1:
        raise UserError(f"{turned[0]} says how far to go, and so does {turned[1]}; choose one")
    if not turned and budget.max_kl is None:
        raise UserError(
            "say how far to go: --speedup X or another limit, --max-kl X, --remove-attention N, --plan 'A0F0 ...', or "
            "--start PLAN"
        )
    given, begun = (None if text is None else read_plan(text, parent) for text in (plan, start))
    return given, begun.unfused() if begun else None


def check_objective(objective: Objective, limits: Limits) -> None:
    """`UserError` if a search that knows no other goal than the KL is to have one."""
    if objective != "kl" and not limits.given:
        raise UserError(f"--objective {objective} is for a hardware budget, such as --speedup; the rest goes by KL")


def _needed(folder: Path | None, option: str, verb: str) -> Path:
    if folder is None:
        raise UserError(f"this search goes by what `{verb}` measured; give its folder as {option}")
    return folder


def _analysis(folder: Path, parent: ModelFolder) -> AnalyzeResult:
    analysed = read_record(folder, AnalyzeResult).result
    if analysed.num_layers != parent.num_layers:
        raise UserError(
            f"{folder} analyses a model of {analysed.num_layers} layers, {parent.folder} has {parent.num_layers}"
        )
    return analysed


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / RECORD).read_bytes()).hexdigest()[:16]
