"""`run`: the main job, every stage in order with one dial; the one stage that calls others."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from cyclopts import Parameter

from ffn_fusion.core.plan import Plan
from ffn_fusion.core.search_records import Objective
from ffn_fusion.errors import UserError
from ffn_fusion.healing.flops import matrix_flops
from ffn_fusion.hf.machine import pick_device, pick_dtype, pick_training_dtype
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.resolve import resolve_model
from ffn_fusion.settings import (
    Above0,
    Blocks,
    Budget,
    Fusion,
    Limits,
    LongText,
    Machine,
    NotNegative,
    Positive,
    Space,
    Tasks,
    Text,
    TwoOrMore,
)
from ffn_fusion.stages.analyze import analyze
from ffn_fusion.stages.bench import bench
from ffn_fusion.stages.bld import bld
from ffn_fusion.stages.cost import cost
from ffn_fusion.stages.evaluate import HELD_OUT, evaluate
from ffn_fusion.stages.fuse import fuse
from ffn_fusion.stages.heal import heal, read_recipe
from ffn_fusion.stages.report import report
from ffn_fusion.stages.score import changes_of, score
from ffn_fusion.stages.search import check_objective, given_plans, search

PLAIN = Fusion(calibrate="none")


def run(
    model: str,
    *,
    out: Path,
    plan: str | None = None,
    start: str | None = None,
    costs: Path | None = None,
    force_costs: bool = False,
    objective: Objective = "kl",
    library: Path | None = None,
    bld_epochs: NotNegative = 0,
    bld_windows: TwoOrMore = 256,
    heal_by: Annotated[str | None, Parameter(name="--heal")] = None,
    heal_scale: Above0 = 1.0,
    windows: Positive = 8,
    fit_windows: TwoOrMore = 64,
    eval_text: tuple[str, ...] = HELD_OUT.text,
    eval_windows: Positive = 16,
    steps: bool = True,
    dry_run: bool = False,
    limits: Limits = Limits(),  # noqa: B008, frozen
    budget: Budget = Budget(),  # noqa: B008
    space: Space = Space(),  # noqa: B008
    tasks: Tasks = Tasks(),  # noqa: B008
    fusion: Fusion = Fusion(),  # noqa: B008
    text: Text = Text(),  # noqa: B008
    machine: Machine = Machine(),  # noqa: B008
) -> str:
    """Turn a model into a fused one: analyze, score, cost, search, fuse, heal, eval, bench and report, with one dial.

    The dial is --speedup, --latency-ms, --memory-gb or another limit of the hardware; or --remove-attention, --max-kl,
    --plan or --start, which need no costs. Stages that are done are not done again; the student is in OUT/student, the
    page is OUT/report.html.

    Parameters
    ----------
    model
        Folder, GGUF file, Hub id or builtin:smollm2-135m.
    out
        Folder for everything.
    plan
        A plan to build instead of searching, in any form that `fuse` reads.
    start
        A plan to begin the search with in place of removing attentions, such as another tool's.
    costs
        Costs that `cost` measured on another machine, to search for that one; without it, they are measured here.
    force_costs
        Use costs of another device or dtype; the result says so.
    objective
        What to lose least of within a hardware budget: KL to the parent, the LM loss, or with --tasks the loss of right
        answers. Tasks that the search goes by say less about the student afterwards.
    library
        Trained blocks to build with, a folder that `bld` made of the same parent.
    bld_epochs
        Epochs of blockwise local distillation that the blocks of the plan found get; it needs no labels and one layer
        of memory.
    bld_windows
        Windows of calibration text for that.
    heal_by
        Also train the student back to its parent by this recipe of `heal` (quick, local-first, or a file), on --text.
    heal_scale
        Times as many tokens as that recipe says.
    windows
        Windows of calibration text that scores are measured on.
    fit_windows
        Windows of calibration text that the student is fitted on.
    eval_text
        Held-out text, from another source than --text.
    eval_windows
        Windows of held-out text, 1,024 tokens each.
    steps
        Also build and measure the unfused and the uncalibrated student, so that each step's cost is seen.
    dry_run
        Print what it will cost and stop.
    """
    if set(eval_text) & set(text.text):
        raise UserError(
            f"{', '.join(set(eval_text) & set(text.text))} is both calibration and held-out text; choose two"
        )
    parent = resolve_model(model)
    given_plans(parent, plan, start, budget, limits)
    check_objective(objective, limits)
    if (objective == "task") != bool(tasks.tasks):
        raise UserError("--objective task and --tasks go together; give both or neither")
    if heal_by or bld_epochs:
        pick_training_dtype(machine, parent.checkpoint)  # refused before hours of searching
    recipe = read_recipe(heal_by).scaled(heal_scale, None) if heal_by else None
    num_changes = len(changes_of(parent, space)) if limits.given else 0
    if dry_run:
        healed = sum(stage.tokens for stage in recipe.stages) if recipe else 0
        told = forecast(parent, windows, fit_windows, text, eval_windows, steps, machine, num_changes, healed)
        told += "\nquestions of --tasks come on top of score and search" * bool(tasks.tasks)
        return told + "\nblocks that --bld-epochs trains come on top" * bool(bld_epochs)
    analyze(model, out=out / "analysis", windows=windows, text=text, machine=machine)
    few = min(16, fit_windows)
    searching = partial(
        search,
        model,
        out=out / "search",
        library=library,
        windows=windows,
        fit_windows=few,
        budget=budget,
        fusion=fusion,
        text=text,
        machine=machine,
    )
    if limits.given:
        scores = out / "scores"
        score(
            model,
            out=scores,
            library=library,
            windows=windows,
            fit_windows=few,
            space=space,
            tasks=tasks,
            fusion=fusion,
            text=text,
            machine=machine,
        )
        if costs is None:
            costs = out / "costs"
            cost(model, out=costs, device=machine.device, dtype=machine.dtype)
        found = searching(scores=scores, costs=costs, force_costs=force_costs, objective=objective, limits=limits)
    else:
        found = searching(analysis=out / "analysis", plan=plan, start=start)
    best = Plan.parse(found.result.plan)
    student = out / ("fused" if heal_by else "student")
    # The text for all of them: channels are chosen by it where the plan cuts FFNs.
    build = partial(fuse, model, fit_windows=fit_windows, text=LongText(**asdict(text)), machine=machine)
    if bld_epochs and best != parent.plan:
        bld(
            model,
            out=out / "library",
            library=library,
            blocks=Blocks(plan=str(best)),
            norm=fusion.norm,
            channel_steps=fusion.channel_steps,
            windows=bld_windows,
            epochs=bld_epochs,
            text=text,
            machine=machine,
        )
        library = out / "library"
    build(plan=str(best), out=student, library=library, fusion=fusion)
    students = [student]
    if steps:
        unfused, plain = out / "steps" / "attention-removed", out / "steps" / "fused-not-calibrated"
        apart = replace(PLAIN, channel_steps=fusion.channel_steps)
        build(plan=str(best.unfused()), out=unfused, fusion=apart)
        build(plan=str(best), out=plain, fusion=replace(apart, norm=fusion.norm))
        students = [unfused, plain, student]
    if heal_by:
        student = out / "student"
        heal(
            model,
            str(out / "fused"),
            out=student,
            stages=heal_by,
            scale=heal_scale,
            text=text.text,
            column=text.column,
            seed=text.seed,
            machine=machine,
        )
        students.append(student)
    held_out = replace(HELD_OUT, text=eval_text, column=text.column, seed=text.seed)
    scored = evaluate(
        model, *map(str, students), out=out / "eval", windows=eval_windows, text=held_out, machine=machine
    )
    assert not isinstance(scored, str)  # which it is when data is fetched only
    timed = bench(model, str(student), out=out / "bench", machine=machine)
    page = report(out, out=out / "report.html")
    parts = [
        found.result.summary(),
        scored.result.summary(),
        timed.result.summary(),
        f"student: {student}\npage: {page}",
    ]
    return "\n\n".join(parts)


def forecast(
    parent: ModelFolder,
    windows: int,
    fit_windows: int,
    text: Text,
    eval_windows: int,
    steps: bool,
    machine: Machine,
    num_changes: int,
    healed: int,
) -> str:
    """What a run will cost, from a timed matrix product and the model's sizes: an order of magnitude.

    `num_changes` are scored for a search under a hardware budget, `healed` tokens are trained on.
    """
    dtype, device = pick_dtype(machine, parent.checkpoint), pick_device(machine)
    parameters = sum(torch.Size(spec.shape).numel() for spec in parent.checkpoint.specs.values())
    size = sum(spec.num_bytes for spec in parent.checkpoint.specs.values())
    # Attention, norms and small products keep a model at about half of what a product reaches.
    seconds_per_token = 2 * parameters / (0.5 * matrix_flops(dtype, device))
    measured, layers = windows * text.length, parent.num_layers
    tokens = {
        "analyze": measured * layers * 2,
        # Half of the layers and the head run again, and three layers on the text for fits.
        "score": num_changes * (measured * 0.6 + 16 * text.length * 3 / layers),
        # Greedy removal, or none; then fused plans.
        "search": measured * layers * 3 * (not num_changes) + 8 * (16 * text.length * 4 + measured),
        "fuse": fit_windows * text.length * 5,
        # Forward and, twice as dear, backward; the parent forward.
        "heal": healed * 4,
        "eval": eval_windows * 1024 * (6 if steps else 2),
    }
    lines = [f"{parameters:,} parameters, {layers} layers, {device} in {str(dtype).removeprefix('torch.')}"]
    lines += [f"{stage:8} about {_minutes(count * seconds_per_token)}" for stage, count in tokens.items() if count]
    students = (3 if steps else 1) + bool(healed)
    logits = measured * parent.config.vocab_size * 4
    lines.append(f"disk     {students * size / 1e9:.1f} GB for {students} student(s)")
    lines.append(f"memory   about {(2 * size + logits) / 1e9 + 1:.1f} GB (parent, one student, parent's predictions)")
    return "\n".join(lines)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
