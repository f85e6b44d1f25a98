"""`fuse`: parent and plan → student folder."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ffn_fusion.core.plan import Plan
from ffn_fusion.core.pruning import kept_channels, share_kept
from ffn_fusion.core.records import CutSummary, FitSummary, FuseResult
from ffn_fusion.folder import Environment, Record, StageFolder, run_stage
from ffn_fusion.hf.calibrate import Calibration, Streams, check_order
from ffn_fusion.hf.contribution import Passed, measure
from ffn_fusion.hf.library import open_library
from ffn_fusion.hf.machine import pick_device, pick_dtype, where
from ffn_fusion.hf.model import ModelFolder, student_arch
from ffn_fusion.hf.resolve import load_tokenizer, read_plan, resolve_model
from ffn_fusion.hf.student import model_card, write_student
from ffn_fusion.hf.text import Windows, read_windows
from ffn_fusion.hf.walk import ParentWalk
from ffn_fusion.progress import track
from ffn_fusion.settings import Fusion, LongText, Machine, TwoOrMore

FITS = "calibration.json"
STREAMS = "streams.safetensors"
CONTRIBUTIONS = "contributions.safetensors"


def fuse(
    model: str,
    *,
    plan: str,
    out: Path,
    library: Path | None = None,
    fit_windows: TwoOrMore = 64,
    fusion: Fusion = Fusion(),  # noqa: B008, frozen
    text: LongText = LongText(),  # noqa: B008
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
    library
        Trained blocks to build with, a folder that `bld` made of the same parent; calibration comes on top.
    fit_windows
        Windows of text to choose channels and to fit on; the fit holds out one in eight to choose the regularisation.
    """
    parent = resolve_model(model)
    wanted = read_plan(plan, parent)
    if fusion.calibrate != "none":
        check_order(wanted)
    dtype = pick_dtype(machine, parent.checkpoint)
    sample = None
    blocks = open_library(library, parent, fusion.norm, fusion.channel_steps)
    known = blocks.contributions if blocks else {}
    unknown = sorted(wanted.widths.keys() - known.keys())
    if fusion.calibrate != "none" or unknown:
        tokenizer = load_tokenizer(parent, machine.trust_remote_code)
        sample = read_windows(text, tokenizer, fit_windows, "fit")
    inputs = {
        "model": parent.fingerprint,
        "plan": str(wanted),
        "fusion": fusion.inputs,
        "text": sample.sample.digest if sample else None,
        "dtype": str(dtype) if sample else None,
        **({"library": blocks.fingerprint} if blocks else {}),  # so that students from before there were any stay valid
    }

    def work(folder: StageFolder) -> tuple[FuseResult, Environment]:
        names, fits = {}, []
        steps = fusion.channel_steps
        channels, cuts = _choose_channels(wanted, known, steps)
        if sample:
            walk = ParentWalk(
                parent, parent.checkpoint, device=pick_device(machine), dtype=dtype, batch_size=machine.batch_size
            )
            if unknown:
                found = _contributions(walk, unknown, sample, steps, folder)
                channels, cuts = _choose_channels(wanted, {**known, **found}, steps)
            if fusion.calibrate != "none":
                calibration = Calibration(walk, wanted, fusion, channels, blocks)
                fits = _calibrate(calibration, sample, folder)
                names = {calibration.output_name(block): _fit_path(folder, block) for block in calibration.to_fit}
        dropped = write_student(parent, wanted, folder.path, fusion.norm, names, channels, blocks)
        layout = student_arch(parent).class_name
        card = model_card(model, wanted, layout)
        (folder.path / "README.md").write_text(card, encoding="utf-8")
        result = FuseResult(
            parent=model,
            plan=str(wanted),
            layout=layout,
            norm=fusion.norm,
            calibrate=fusion.calibrate,
            num_parameters=count_parameters(ModelFolder(folder.path)),
            parent_parameters=count_parameters(parent),
            dropped=dropped,
            fits=fits,
            sample=sample.sample if sample else None,
            cuts=cuts,
            library=str(library) if library else None,
            library_texts=blocks.texts if blocks else [],
        )
        return result, where(machine, dtype)

    return run_stage("fuse", out, inputs, FuseResult, work)


def _choose_channels(plan: Plan, found: Mapping[int, Tensor], steps: int) -> tuple[dict[int, Tensor], list[CutSummary]]:
    """Channels kept of each FFN that the plan cuts, by the contributions found; in several steps they are places."""
    widths = {layer: width for layer, width in plan.widths.items() if layer in found}
    channels = {layer: kept_channels(found[layer], width) for layer, width in widths.items()}
    return channels, [
        CutSummary(layer, len(kept), len(found[layer]), share_kept(found[layer], kept) if steps == 1 else None)
        for layer, kept in channels.items()
    ]


def _contributions(
    walk: ParentWalk, layers: list[int], windows: Windows, steps: int, folder: StageFolder
) -> dict[int, Tensor]:
    """Contributions of the channels of these layers, saved after each, so that a killed run goes on from there."""
    path = folder.state / CONTRIBUTIONS
    known, found = None, {}
    if path.is_file():
        tensors = load_file(path)
        stream = tensors.pop("stream")
        found = {int(layer): tensor for layer, tensor in tensors.items()}
        known = Passed(max(found) + 1, stream, found)
    left = len(layers) - len(found)
    for passed in track(measure(walk, windows.ids, layers, known, steps), "fuse: FFNs measured", left):
        found = passed.found
        _save(path, {"stream": passed.stream} | {str(layer): tensor for layer, tensor in found.items()})
    return found


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


def count_parameters(model: ModelFolder) -> int:
    """Stored weights; a tied head counts once."""
    return sum(torch.Size(spec.shape).numel() for spec in model.checkpoint.specs.values())
