"""`bench`: prefill and decode time of several models, interleaved in one process, beside what the memory allows."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ffn_fusion.core.cost import Cost
from ffn_fusion.core.cost_table import Scenario
from ffn_fusion.core.records import BenchModel, BenchResult, BenchRow
from ffn_fusion.folder import Environment, Record, StageFolder, run_stage
from ffn_fusion.hf.arena import Arena
from ffn_fusion.hf.machine import device_map, pick_device, pick_dtype, where
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.resolve import labels, resolve_model
from ffn_fusion.hf.timing import Flush, Step, cache_values, elapsed_ms, spread
from ffn_fusion.progress import track
from ffn_fusion.settings import Machine, Positive

COPY_BYTES = 2**28


@dataclass(frozen=True)
class _Loaded:
    name: str
    model: PreTrainedModel
    cost: Cost


def bench(
    parent: str,
    *students: str,
    out: Path,
    batch_sizes: tuple[Positive, ...] = (1, 4),
    prompt_length: Positive = 128,
    new_tokens: Positive = 16,
    repeats: Positive = 5,
    machine: Machine = Machine(),  # noqa: B008, frozen
) -> Record[BenchResult]:
    """Time prefill and decode of a parent and its students, interleaved in one process.

    Parameters
    ----------
    parent
        Folder, GGUF file, Hub id or builtin:smollm2-135m.
    students
        Any number of models to compare with it.
    out
        New folder for the record.
    batch_sizes
        Sequences decoded at once; give the option again for each.
    prompt_length
        Tokens of a prefill.
    new_tokens
        Tokens decoded after the prompt: as many steps in each repeat, all timed as the middle one.
    repeats
        Timed repeats of each model and batch size, after one untimed.
    """
    names = labels((parent, *students))
    folders = [resolve_model(name) for name in (parent, *students)]
    dtype = pick_dtype(machine, folders[0].checkpoint)
    settings = {"batch_sizes": batch_sizes, "prompt": prompt_length, "new_tokens": new_tokens, "repeats": repeats}
    inputs = {"models": [folder.fingerprint for folder in folders], "names": names, "dtype": str(dtype), **settings}

    def work(_: StageFolder) -> tuple[BenchResult, Environment]:
        loaded = [
            _Loaded(name, folder.load(dtype, device_map(machine)), cost_of(folder, dtype))
            for name, folder in zip(names, folders, strict=True)
        ]
        bandwidth = _copy_bandwidth(pick_device(machine))
        rows: list[BenchRow] = []
        hows: set[str] = set()
        for batch_size in batch_sizes:
            scenario = Scenario(batch_size, prompt_length, new_tokens)
            steps = _steps(loaded, scenario)
            rows += _rows(loaded, steps, scenario, repeats, bandwidth)
            hows |= {f"{step.how} {step.note}".strip() for pair in steps for step in pair}
        counted = [_counts(entry) for entry in loaded]
        how = f"{'; '.join(sorted(hows))}, with a cache of fixed size"
        result = BenchResult(counted, rows, prompt_length, new_tokens, repeats, bandwidth / 1e9, how)
        return result, where(machine, dtype)

    return run_stage("bench", out, inputs, BenchResult, work)


def cost_of(folder: ModelFolder, dtype: torch.dtype) -> Cost:
    """Counts of a model folder."""
    specs = folder.checkpoint.specs
    sizes = {name: torch.Size(spec.shape).numel() for name, spec in specs.items()}
    embedding = 0 if folder.config.tie_word_embeddings else sizes["model.embed_tokens.weight"]
    return Cost(folder.shapes, sum(sizes.values()), embedding, folder.head_dim, dtype.itemsize)


def _counts(entry: _Loaded) -> BenchModel:
    cost = entry.cost
    return BenchModel(
        entry.name,
        cost.num_parameters,
        cost.kv_bytes_per_token,
        len(cost.blocks),
        cost.num_attentions,
        cost.num_sublayers,
    )


def _rows(
    loaded: list[_Loaded], steps: list[tuple[Step, Step]], scenario: Scenario, repeats: int, bandwidth: float
) -> list[BenchRow]:
    """Every repeat runs all models one after the other, so that drift of the machine hits all alike."""
    batch_size = scenario.batch_size
    flush = Flush(loaded[0].model.device)
    times: list[list[tuple[float, float]]] = [[] for _ in loaded]
    for repeat in track(range(repeats + 1), f"bench: batch size {batch_size}", repeats + 1):
        for (prefill, decode), kept in zip(steps, times, strict=True):
            flush()
            prefill_ms = elapsed_ms(prefill)
            flush()
            timed = prefill_ms, elapsed_ms(decode, scenario.new_tokens)
            if repeat > 0:
                kept.append(timed)
    spreads = [tuple(spread(list(column)) for column in zip(*kept, strict=True)) for kept in times]
    return [
        BenchRow(
            model=entry.name,
            batch_size=batch_size,
            prefill_ms=prefill_ms,
            decode_ms=decode_ms,
            bandwidth_share=entry.cost.decode_bytes(batch_size, scenario.context) / bandwidth / decode_ms.median * 1e3,
            prefill_speedup=spreads[0][0].median / prefill_ms.median,
            decode_speedup=spreads[0][1].median / decode_ms.median,
        )
        for entry, (prefill_ms, decode_ms) in zip(loaded, spreads, strict=True)
    ]


def _steps(loaded: list[_Loaded], scenario: Scenario) -> list[tuple[Step, Step]]:
    """A prefill and a decode step of each model, captured where possible. Their caches share one stretch of memory."""
    batch_size, context = scenario.batch_size, scenario.context
    models = [entry.model for entry in loaded]
    arena = None
    # Over several GPUs each cache must lie beside its layer.
    if len({parameter.device for model in models for parameter in model.parameters()}) == 1:
        length = max(context, scenario.prompt_length)
        room = max(cache_values(model.config, batch_size, length) for model in models)
        arena = Arena(room, models[0].device, models[0].dtype)
    pool = torch.cuda.graph_pool_handle() if models[0].device.type == "cuda" else None
    steps = []
    for model in models:
        pair = []
        for past, new in ((0, scenario.prompt_length), (context - 1, 1)):
            if arena:
                arena.rewind()
            pair.append(Step(model, batch_size, past, new, arena.take if arena else None))
            pair[-1].prepare(pool)
        steps.append((pair[0], pair[1]))
    return steps


def _copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of a large copy on the device: the ceiling that decoding can reach."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(_copy_seconds(source, target) for _ in range(5))
    return 2 * COPY_BYTES / best


def _copy_seconds(source: Tensor, target: Tensor) -> float:
    _wait()
    start = time.perf_counter()
    target.copy_(source)
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
