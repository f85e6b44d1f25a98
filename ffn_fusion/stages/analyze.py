"""`analyze`: what each sublayer is worth, which blocks depend on which, and the geometry behind fusion."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ffn_fusion.core.dependency import cosine_distance
from ffn_fusion.core.losses import kl_to, reference
from ffn_fusion.core.records import AnalyzeResult, Geometry, MassiveActivation, Sample
from ffn_fusion.core.stats import Estimate, estimate
from ffn_fusion.folder import Environment, Record, StageFolder, run_stage
from ffn_fusion.hf.arch import ATTENTION, FFN
from ffn_fusion.hf.machine import device_map, pick_dtype, where
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.probe import SUBLAYERS, Pass, record, resume, visiting, without
from ffn_fusion.hf.resolve import load_tokenizer, resolve_model
from ffn_fusion.hf.text import read_windows
from ffn_fusion.progress import track
from ffn_fusion.settings import Machine, Positive, Text

MASSIVE = 20.0
"""A token counts as massive when its stream is this many times longer than the median."""


def analyze(
    model: str,
    *,
    out: Path,
    windows: Positive = 16,
    text: Text = Text(),  # noqa: B008, frozen
    machine: Machine = Machine(),  # noqa: B008
) -> Record[AnalyzeResult]:
    """Score every sublayer and measure the pairwise dependency of blocks.

    Parameters
    ----------
    model
        Folder, GGUF file, Hub id or builtin:smollm2-135m.
    out
        New folder for the record.
    windows
        Windows of text to measure on.
    """
    parent = resolve_model(model)
    tokenizer = load_tokenizer(parent, machine.trust_remote_code)
    measured = read_windows(text, tokenizer, windows, "measure")
    dtype = pick_dtype(machine, parent.checkpoint)
    inputs = {"model": parent.fingerprint, "text": measured.sample.digest, "dtype": str(dtype)}

    def work(folder: StageFolder) -> tuple[AnalyzeResult, Environment]:
        loaded = parent.load(dtype, device_map(machine))
        sums = _measure(loaded, measured.ids.split(machine.batch_size), folder)
        return _result(model, parent, sums, measured.sample), where(machine, dtype)

    return run_stage("analyze", out, inputs, AnalyzeResult, work)


class _Sums:
    """Everything measured, as sums over tokens; JSON both ways, so that a killed run continues at the next batch."""

    def __init__(self, num_layers: int) -> None:
        m = num_layers
        self.tokens = 0
        self.counts: list[int] = []
        self.kl: dict[str, list[list[float]]] = {part: [[] for _ in range(m)] for part in SUBLAYERS}
        self.block = np.zeros((m, m))
        self.sublayer = np.zeros((2 * m, 2 * m))
        self.geometry = np.zeros((3, m))
        self.massive: dict[int, MassiveActivation] = {}

    def state(self) -> dict[str, object]:
        massive = [vars(found) for found in self.massive.values()]
        arrays = {name: getattr(self, name).tolist() for name in ("block", "sublayer", "geometry")}
        return {"tokens": self.tokens, "counts": self.counts, "kl": self.kl, "massive": massive, **arrays}

    def restore(self, state: dict[str, object]) -> None:
        self.tokens, self.counts, self.kl = state["tokens"], state["counts"], state["kl"]  # type: ignore[assignment]
        for name in ("block", "sublayer", "geometry"):
            setattr(self, name, np.array(state[name]))
        self.massive = {m["layer"]: MassiveActivation(**m) for m in state["massive"]}  # type: ignore[attr-defined]


def _measure(model: PreTrainedModel, batches: tuple[Tensor, ...], folder: StageFolder) -> _Sums:
    num_layers = len(model.model.layers)
    sums = _Sums(num_layers)
    done = 0
    if state := folder.load("sums.json"):
        sums.restore(state["sums"])
        done = state["batches"]
    steps = [(b, layer) for b in range(done, len(batches)) for layer in range(num_layers)]
    for b, layer in track(steps, "analyze: layers x batches", len(steps)):
        if layer == 0:
            ids = batches[b].to(model.device)
            clean = record(model, ids)
            ref = reference(clean.logits.flatten(0, 1))
            _geometry(clean, sums)
            sums.tokens += ids.numel()
            sums.counts += [ids.shape[1]] * len(ids)
        for part in SUBLAYERS:
            if (layer, part) in clean.outputs:
                logits = _without_sublayer(model, ids, clean, layer, part, sums)
                kl = kl_to(ref, logits.flatten(0, 1)).view(ids.shape).sum(1)
                sums.kl[part][layer] += kl.tolist()
        _without_block(model, ids, clean, layer, sums)
        if layer == num_layers - 1:
            folder.save("sums.json", {"batches": b + 1, "sums": sums.state()})
    return sums


def _without_sublayer(model: PreTrainedModel, ids: Tensor, clean: Pass, layer: int, part: str, sums: _Sums) -> Tensor:
    """Remove one sublayer, starting from its layer's cached stream; fills its row of the sublayer matrix."""
    row = sums.sublayer[2 * layer + SUBLAYERS.index(part)]

    def visit(j: int, seen: str, output: Tensor) -> None:
        # An FFN's row starts after it; its own layer's attention runs again unchanged.
        if j > layer or (part, seen) == (ATTENTION, FFN):
            row[2 * j + SUBLAYERS.index(seen)] += float(cosine_distance(output, clean.outputs[j, seen]).sum())

    with without(model, layer, part), visiting(model, visit):
        logits = resume(model, ids, layer, clean.streams[layer])
    assert logits is not None
    return logits


def _without_block(model: PreTrainedModel, ids: Tensor, clean: Pass, layer: int, sums: _Sums) -> None:
    """Remove a whole block: the next one sees its cached input; fills its row of the block matrix."""
    seen: dict[int, Tensor] = {}

    def visit(j: int, part: str, output: Tensor) -> None:
        seen[j] = seen[j] + output.float() if j in seen else output.float()
        if part == FFN or (j, FFN) not in clean.outputs:
            sums.block[layer, j] += float(cosine_distance(seen.pop(j), clean.contribution(j)).sum())

    if layer + 1 < len(model.model.layers):
        with visiting(model, visit):
            resume(model, ids, layer + 1, clean.streams[layer], head=False)


def _geometry(clean: Pass, sums: _Sums) -> None:
    for layer in range(len(clean.streams) - 1):
        x, fx = clean.streams[layer].float(), clean.streams[layer + 1].float().to(clean.streams[layer].device)
        h = clean.contribution(layer).to(x.device)
        cos = torch.nn.functional.cosine_similarity
        sums.geometry[:, layer] += [
            float((1 - cos(x, fx, dim=-1)).sum()),
            float((h.norm(dim=-1) / x.norm(dim=-1)).sum()),
            float(cos(h, x, dim=-1).sum()),
        ]
        norms = fx.norm(dim=-1)
        median, largest = float(norms.median()), float(norms.max())
        if largest > MASSIVE * median and largest > getattr(sums.massive.get(layer), "norm", 0.0):
            window, position = np.unravel_index(int(norms.argmax()), norms.shape)
            channel = int(fx[window, position].abs().argmax())
            sums.massive[layer] = MassiveActivation(layer, int(position), channel, largest, median)


def _result(name: str, parent: ModelFolder, sums: _Sums, sample: Sample) -> AnalyzeResult:
    def scores(part: str) -> list[Estimate | None]:
        return [estimate(per_window, sums.counts) if per_window else None for per_window in sums.kl[part]]

    turn, ratio, alignment = (sums.geometry / sums.tokens).tolist()
    return AnalyzeResult(
        model=name,
        num_layers=parent.num_layers,
        sample=sample,
        attention=scores(ATTENTION),
        ffn=scores(FFN),
        block_dependency=(sums.block / sums.tokens).tolist(),
        sublayer_dependency=(sums.sublayer / sums.tokens).tolist(),
        geometry=Geometry(turn, ratio, alignment),
        massive=[sums.massive[layer] for layer in sorted(sums.massive)],
    )
