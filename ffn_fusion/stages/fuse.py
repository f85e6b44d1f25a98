"""`fuse`: parent and plan → student folder."""

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ffn_fusion.core.plan import Plan
from ffn_fusion.core.records import FitSummary, FuseResult, Sample
from ffn_fusion.folder import Environment, Record, StageFolder, run_stage
from ffn_fusion.hf.calibrate import Calibration, Streams
from ffn_fusion.hf.machine import pick_device, pick_dtype, where
from ffn_fusion.hf.model import ModelFolder, student_arch
from ffn_fusion.hf.resolve import load_tokenizer, read_plan, resolve_model
from ffn_fusion.hf.student import model_card, write_student
from ffn_fusion.hf.text import Windows, read_windows
from ffn_fusion.progress import track
from ffn_fusion.settings import Fusion, Machine, Text, TwoOrMore

FITS = "calibration.json"
STREAMS = "streams.safetensors"


def fuse(
    model: str,
    *,
    plan: str,
    out: Path,
    fit_windows: TwoOrMore = 64,
    fusion: Fusion = Fusion(),  # noqa: B008, frozen
    text: Text = Text(length=1024),  # noqa: B008
    machine: Machine = Machine(),  # noqa: B008
) -> Record[FuseResult]:
    """Build the student of a plan: a folder that transformers, vLLM, MLX-LM and others load.

    Parameters
    ----------
    model
        Parent: folder, GGUF file, Hub id or builtin:smollm2-135m.
    plan
        One-line text, plan.json, or another tool's: config.json with drop lists or block_configs, mergekit YAML.
    out
        New student folder.
    fit_windows
        Windows of text to fit on; one in eight of them is held out to choose the regularisation.
    """
    parent = resolve_model(model)
    wanted = read_plan(plan, parent.num_layers)
    parent.check_plan(wanted)
    dtype = pick_dtype(machine, parent.checkpoint)
    sample = None
    if fusion.calibrate != "none":
        tokenizer = load_tokenizer(parent, machine.trust_remote_code)
        sample = read_windows(text, tokenizer, fit_windows, "fit")
    inputs = {
        "model": parent.fingerprint,
        "plan": str(wanted),
        "fusion": asdict(fusion),
        "text": sample.sample.digest if sample else None,
        "dtype": str(dtype) if sample else None,
    }

    def work(folder: StageFolder) -> tuple[FuseResult, Environment]:
        names, fits = {}, []
        if sample:
            calibration = Calibration(
                parent,
                parent.checkpoint,
                wanted,
                fusion=fusion,
                device=pick_device(machine),
                dtype=dtype,
                batch_size=machine.batch_size,
            )
            fits = _calibrate(calibration, sample, folder)
            names = {calibration.output_name(block): _fit_path(folder, block) for block in calibration.to_fit}
        dropped = write_student(parent, wanted, folder.path, fusion.norm, names)
        layout = student_arch(parent).class_name
        card = model_card(model, wanted, layout)
        (folder.path / "README.md").write_text(card, encoding="utf-8")
        result = _result(model, parent, wanted, folder.path, fusion, dropped, fits, sample.sample if sample else None)
        return result, where(machine, dtype)

    return run_stage("fuse", out, inputs, FuseResult, work)


def _calibrate(calibration: Calibration, windows: Windows, folder: StageFolder) -> list[FitSummary]:
    """Fit block after block; each fit and the streams behind it are saved, so that a killed run loses one block."""
    state = folder.load(FITS) or {"fits": []}
    summaries = [FitSummary(**fit) for fit in state["fits"]]
    start = None
    if summaries:
        tensors = load_file(folder.state / STREAMS)
        start = Streams(state["block"], state["layer"], tensors["parent"], tensors["student"])
    fits = calibration.run(windows.ids, start)
    remaining = len(calibration.to_fit) - len(summaries)
    for fit, weight, streams in track(fits, "fuse: blocks calibrated", remaining):
        _save(_fit_path(folder, fit.block), {"weight": weight})
        _save(folder.state / STREAMS, {"parent": streams.parent, "student": _present(streams.student)})
        summaries.append(FitSummary(fit.name, fit.error_before, fit.error_after, list(fit.strengths)))
        folder.save(FITS, {"fits": list(map(asdict, summaries)), "block": streams.block, "layer": streams.layer})
    return summaries


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary)
    temporary.replace(path)


def _present(stream: Tensor | None) -> Tensor:
    assert stream is not None
    return stream


def _fit_path(folder: StageFolder, block: int) -> Path:
    return folder.state / f"fit-{block}.safetensors"


def _result(
    name: str,
    parent: ModelFolder,
    plan: Plan,
    student: Path,
    fusion: Fusion,
    dropped: list[str],
    fits: list[FitSummary],
    sample: Sample | None,
) -> FuseResult:
    return FuseResult(
        parent=name,
        plan=str(plan),
        layout=student_arch(parent).class_name,
        norm=fusion.norm,
        calibrate=fusion.calibrate,
        num_parameters=count_parameters(ModelFolder(student)),
        parent_parameters=count_parameters(parent),
        dropped=dropped,
        fits=fits,
        sample=sample,
    )


def count_parameters(model: ModelFolder) -> int:
    """Stored weights; a tied head counts once."""
    return sum(torch.Size(spec.shape).numel() for spec in model.checkpoint.specs.values())
