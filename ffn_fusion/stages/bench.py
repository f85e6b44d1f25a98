"""`bench`: prefill and decode time of several models, interleaved in one process, beside what the memory allows."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ffn_fusion.core.cost import Cost
from ffn_fusion.core.records import BenchModel, BenchResult, BenchRow, Spread
from ffn_fusion.folder import Environment, Record, StageFolder, run_stage
from ffn_fusion.hf.machine import device_map, pick_device, pick_dtype, where
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.resolve import labels, resolve_model
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
        Tokens in the cache when decoding starts.
    new_tokens
        Decode steps in each repeat.
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
        for batch_size in batch_sizes:
            rows += _rows(loaded, batch_size, prompt_length, new_tokens, repeats, bandwidth)
        counted = [_counts(entry) for entry in loaded]
        return BenchResult(counted, rows, prompt_length, new_tokens, repeats, bandwidth / 1e9), where(machine, dtype)

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
    loaded: list[_Loaded], batch_size: int, prompt_length: int, new_tokens: int, repeats: int, bandwidth: float
) -> list[BenchRow]:
    """Every repeat runs all models one after the other, so that drift of the machine hits all alike."""
    vocab = min(entry.model.config.vocab_size for entry in loaded)
    ids = torch.randint(vocab, (batch_size, prompt_length), generator=torch.Generator().manual_seed(0))
    times: list[list[tuple[float, float]]] = [[] for _ in loaded]
    for repeat in track(range(repeats + 1), f"bench: batch size {batch_size}", repeats + 1):
        for entry, kept in zip(loaded, times, strict=True):
            timed = _prefill_and_decode(entry.model, ids, new_tokens)
            if repeat > 0:
                kept.append(timed)
    spreads = [tuple(_spread(column) for column in zip(*kept, strict=True)) for kept in times]
    rows = []
    for entry, (prefill, decode) in zip(loaded, spreads, strict=True):
        moved = entry.cost.decode_bytes(batch_size, prompt_length + new_tokens // 2)
        rows.append(
            BenchRow(
                model=entry.name,
                batch_size=batch_size,
                prefill_ms=prefill,
                decode_ms=decode,
                bandwidth_share=moved / bandwidth / (decode.median / 1e3),
                prefill_speedup=spreads[0][0].median / prefill.median,
                decode_speedup=spreads[0][1].median / decode.median,
            )
        )
    return rows


@torch.no_grad()
def _prefill_and_decode(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> tuple[float, float]:
    """Milliseconds of one prefill and of one decode step (mean over `new_tokens`)."""
    cache = DynamicCache(config=model.config)
    ids = ids.to(model.device)

    def prefill() -> Tensor:
        return _next(model, ids, cache)

    start, token = _timed(prefill)

    def decode() -> Tensor:
        last = token
        for _ in range(new_tokens):
            last = _next(model, last, cache)
        return last

    steps, _ = _timed(decode)
    return start, steps / new_tokens


def _next(model: PreTrainedModel, ids: Tensor, cache: DynamicCache) -> Tensor:
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    token: Tensor = logits[:, -1:].argmax(-1)
    return token


def _timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    _wait()
    start = time.perf_counter()
    result = work()
    _wait()
    return (time.perf_counter() - start) * 1e3, result


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _spread(values: tuple[float, ...]) -> Spread:
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, _, high = quantiles(values, n=4, method="inclusive")
    return Spread(median(values), low, high)


def _copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of a large copy on the device: the ceiling that decoding can reach."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(_timed(lambda: target.copy_(source))[0] for _ in range(5))
    return 2 * COPY_BYTES / (best / 1e3)
