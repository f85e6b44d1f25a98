"""`score`: what every single change of the parent costs, and how any two of them add up."""

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ffn_fusion.core.fisher import gram
from ffn_fusion.core.search_records import INTERACTIONS, ChangeScore, ScoreResult
from ffn_fusion.core.space import Change, Sizes, changes
from ffn_fusion.core.stats import estimate
from ffn_fusion.folder import Environment, Record, StageFolder, run_stage
from ffn_fusion.hf.deviation import Deviations
from ffn_fusion.hf.library import open_library
from ffn_fusion.hf.machine import device_map, pick_dtype, where
from ffn_fusion.hf.meter import Meter
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.remote.configuration_ffn_fusion import WIDTH_MULTIPLE
from ffn_fusion.hf.resolve import load_tokenizer, resolve_model
from ffn_fusion.hf.text import read_windows
from ffn_fusion.progress import track
from ffn_fusion.settings import Fusion, Machine, Positive, Space, Text, TwoOrMore

SKETCHES = "sketches"


def score(
    model: str,
    *,
    out: Path,
    library: Path | None = None,
    windows: Positive = 8,
    fit_windows: TwoOrMore = 16,
    space: Space = Space(),  # noqa: B008, frozen
    fusion: Fusion = Fusion(),  # noqa: B008
    text: Text = Text(),  # noqa: B008
    machine: Machine = Machine(),  # noqa: B008
) -> Record[ScoreResult]:
    """Score every variant of every layer by replacing it in the otherwise whole parent (Puzzle's replace-1-block).

    Each change is built and fitted as it would be in a student. One pass also gives how any two changes interact, so
    that `search` knows more than their sum.

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
    parent = resolve_model(model)
    trained = open_library(library, parent, fusion.norm)
    tokenizer = load_tokenizer(parent, machine.trust_remote_code)
    measured = read_windows(text, tokenizer, windows, "measure")
    fit = read_windows(text, tokenizer, fit_windows, "fit")
    dtype = pick_dtype(machine, parent.checkpoint)
    inputs = {
        "model": parent.fingerprint,
        "text": [measured.sample.digest, fit.sample.digest],
        "space": asdict(space),
        "fusion": asdict(fusion),
        "dtype": str(dtype),
        "library": trained.fingerprint if trained else None,
    }

    def work(folder: StageFolder) -> tuple[ScoreResult, Environment]:
        meter = Meter(parent, parent.load(dtype, device_map(machine)), measured, fit, fusion, machine, trained)
        deviations = Deviations(meter)
        found = changes_of(parent, space)
        (folder.state / SKETCHES).mkdir(exist_ok=True)
        scored = [
            _score(change, number, deviations, meter.counts, folder)
            for number, change in enumerate(track(found, "score: changes", len(found)))
        ]
        sketches = [load_file(_sketch_path(folder, number))["sketch"] for number in range(len(found))]
        save_file({"gram": gram(torch.stack(sketches))}, folder.path / INTERACTIONS)
        result = ScoreResult(
            model=model,
            num_layers=parent.num_layers,
            sample=measured.sample,
            fit_sample=fit.sample if fusion.calibrate != "none" else None,
            scores=scored,
            similarity=deviations.similarity,
        )
        return result, where(machine, dtype)

    return run_stage("score", out, inputs, ScoreResult, work)


def changes_of(parent: ModelFolder, space: Space) -> list[Change]:
    """Every single change of a parent that the space allows."""
    return changes(parent.plan, parent.shapes, Sizes(space.kv_heads, space.widths, space.linear, WIDTH_MULTIPLE))


def _score(change: Change, number: int, deviations: Deviations, counts: list[int], folder: StageFolder) -> ChangeScore:
    """One change measured, or read back; its sketch is on disk before its score counts."""

    def measure() -> dict[str, list[float]]:
        found = deviations.of(change)
        save_file({"sketch": found.sketch}, _sketch_path(folder, number))
        return {"kl": found.kl, "nll": found.nll}

    sums = folder.remember(f"{change.first}-{change.last} {change}", dict[str, list[float]], measure)
    rise = [own - parents for own, parents in zip(sums["nll"], deviations.nll, strict=True)]
    return ChangeScore(
        first=change.first,
        last=change.last,
        block=str(change.block or ""),
        kl=estimate(sums["kl"], counts),
        nll=estimate(rise, [count - 1 for count in counts]),
    )


def _sketch_path(folder: StageFolder, number: int) -> Path:
    return folder.state / SKETCHES / f"{number}.safetensors"
