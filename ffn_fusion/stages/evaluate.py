"""`eval`: parent and students on held-out text, paired."""

from dataclasses import asdict
from math import exp, log
from pathlib import Path

import cattrs
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ffn_fusion.core.losses import kl_to, nll, reference
from ffn_fusion.core.records import EvalResult, ModelScore
from ffn_fusion.core.stats import estimate
from ffn_fusion.errors import UserError
from ffn_fusion.folder import Environment, Record, StageFolder, run_stage
from ffn_fusion.hf.machine import device_map, pick_dtype, where
from ffn_fusion.hf.resolve import labels, load_tokenizer, resolve_model
from ffn_fusion.hf.text import Windows, read_windows
from ffn_fusion.progress import track
from ffn_fusion.settings import Machine, Positive, Text

HELD_OUT = Text(text=("builtin:novels",), length=1024)


def evaluate(
    parent: str,
    *students: str,
    out: Path,
    windows: Positive = 16,
    text: Text = HELD_OUT,
    machine: Machine = Machine(),  # noqa: B008, frozen
) -> Record[EvalResult]:
    """Perplexity, bits per byte, KL to the parent and top-1 agreement on held-out text.

    Parameters
    ----------
    parent
        Folder, GGUF file, Hub id or builtin:smollm2-135m.
    students
        Any number of models to compare with it, token by token.
    out
        New folder for the record.
    windows
        Windows of text to measure on.
    """
    names = labels((parent, *students))
    folders = [resolve_model(name) for name in (parent, *students)]
    for student in folders[1:]:
        if student.config.vocab_size != folders[0].config.vocab_size:
            raise UserError(f"{student.folder} has another vocabulary size than the parent; KL needs the same tokens")
    held_out = read_windows(text, load_tokenizer(folders[0], machine.trust_remote_code), windows)
    dtype = pick_dtype(machine, folders[0].checkpoint)
    inputs = {
        "models": [folder.fingerprint for folder in folders],
        "names": names,
        "text": held_out.sample.digest,
        "dtype": str(dtype),
    }

    def work(folder: StageFolder) -> tuple[EvalResult, Environment]:
        scores = cattrs.structure(folder.load("scores.json") or [], list[ModelScore])
        loaded = folders[0].load(dtype, device_map(machine))
        for name, model in list(zip(names, folders, strict=True))[len(scores) :]:
            student = None if model is folders[0] else model.load(dtype, device_map(machine))
            scores.append(_score(name, loaded, student, held_out))
            folder.save("scores.json", [asdict(score) for score in scores])
        return EvalResult(held_out.sample, scores), where(machine, dtype)

    return run_stage("eval", out, inputs, EvalResult, work)


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
