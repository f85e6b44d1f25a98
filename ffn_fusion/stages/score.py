"""`score`: what every single change of the parent costs, and how any two of them add up."""

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ffn_fusion.core.answers import Answers
from ffn_fusion.core.fisher import gram
from ffn_fusion.core.search_records import INTERACTIONS, ChangeScore, ScoreResult
from ffn_fusion.core.space import Change, Sizes, changes
from ffn_fusion.errors import needs_extra
from ffn_fusion.folder import Environment, Record, StageFolder, run_stage
from ffn_fusion.hf.deviation import Deviations
from ffn_fusion.hf.machine import where
from ffn_fusion.hf.meter import Meter
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.remote.configuration_ffn_fusion import WIDTH_MULTIPLE
from ffn_fusion.hf.resolve import resolve_model
from ffn_fusion.hf.setup import set_up
from ffn_fusion.progress import track
from ffn_fusion.settings import Fusion, Machine, Positive, Space, Tasks, Text, TwoOrMore

SKETCHES = "sketches"


def score(
    model: str,
    *,
    out: Path,
    library: Path | None = None,
    windows: Positive = 8,
    fit_windows: TwoOrMore = 16,
    space: Space = Space(),  # noqa: B008, frozen
    tasks: Tasks = Tasks(),  # noqa: B008
    fusion: Fusion = Fusion(),  # noqa: B008
    text: Text = Text(),  # noqa: B008
    machine: Machine = Machine(),  # noqa: B008
) -> Record[ScoreResult]:
    """Score every variant of every layer by replacing it in the otherwise whole parent (Puzzle's replace-1-block).

    Each change is built and fitted as it would be in a student: KL to the parent, rise of the LM loss and, with
    --tasks, of the loss of right answers. One pass also gives how any two changes interact, so that `search` knows more
    than their sum.

    Parameters
    ----------
    model
        Folder, GGUF file, Hub id or builtin:smollm2-135m.
    out
        New folder for the scores.
    library
        Trained blocks to build changes with, a folder that `bld` made of the same parent.
    windows
        Windows of text to measure on.
    fit_windows
        Windows of text to fit each change on.
    """
    setup = set_up(resolve_model(model), library, windows, fit_windows, fusion=fusion, text=text, machine=machine)
    parent, quiz = setup.parent, None
    inputs = setup.inputs | {"space": asdict(space)}
    if tasks.tasks:
        with needs_extra("--tasks", "eval"):
            from ffn_fusion.tasks.quiz import Quiz  # an extra, and slow to import
        quiz = Quiz(tasks, setup.tokenizer)
        inputs |= quiz.inputs

    def work(folder: StageFolder) -> tuple[ScoreResult, Environment]:
        meter = setup.meter(quiz)
        deviations = Deviations(meter)
        found = changes_of(parent, space)
        (folder.state / SKETCHES).mkdir(exist_ok=True)
        scored = [
            _score(change, number, deviations, meter, folder)
            for number, change in enumerate(track(found, "score: changes", len(found)))
        ]
        sketches = [load_file(_sketch_path(folder, number))["sketch"] for number in range(len(found))]
        save_file({"gram": gram(torch.stack(sketches))}, folder.path / INTERACTIONS)
        result = ScoreResult(
            model=model,
            num_layers=parent.num_layers,
            sample=meter.sample,
            fit_sample=setup.fit.sample if meter.calibrates else None,
            scores=scored,
            similarity=deviations.similarity,
            asked=quiz.asked(meter.answers) if quiz and meter.answers else None,
            parent_key=parent.checkpoint.key,
        )
        return result, where(machine, setup.dtype)

    return run_stage("score", out, inputs, ScoreResult, work)


def changes_of(parent: ModelFolder, space: Space) -> list[Change]:
    """Every single change of a parent that the space allows."""
    return changes(parent.plan, parent.shapes, Sizes(space.kv_heads, space.widths, space.linear, WIDTH_MULTIPLE))


def _score(change: Change, number: int, deviations: Deviations, meter: Meter, folder: StageFolder) -> ChangeScore:
    """One change measured, or read back; its sketch is on disk before its score counts."""

    def measure() -> dict[str, list[float]]:
        found = deviations.of(change)
        save_file({"sketch": found.sketch}, _sketch_path(folder, number))
        answers = {"loss": found.answers.loss, "right": found.answers.right} if found.answers else {}
        return {"kl": found.kl, "nll": found.nll} | answers

    sums = folder.remember(f"{change.first}-{change.last} {change}", dict[str, list[float]], measure)
    answers = Answers(sums["loss"], sums["right"]) if "loss" in sums else None
    rises = meter.rises_by(sums["kl"], sums["nll"], answers)
    block = str(change.block or "")
    return ChangeScore(change.first, change.last, block, rises.kl, rises.nll, rises.task, rises.accuracy)


def _sketch_path(folder: StageFolder, number: int) -> Path:
    return folder.state / SKETCHES / f"{number}.safetensors"
