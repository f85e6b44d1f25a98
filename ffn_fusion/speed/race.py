"""Times several models, interleaved, in our own forward pass or in transformers': what `bench --engine torch` does.

`race` is run in this process, or as `python -m ffn_fusion.speed.race ORDER` once a rank. Laps are written as they are
made, so that those before a failure stay, and those that are there are not run again.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import cattrs
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ffn_fusion.core.bench_records import Lap, Site, Timed
from ffn_fusion.core.cost_table import Scenario
from ffn_fusion.hf.model import ModelFolder, skeleton
from ffn_fusion.progress import track
from ffn_fusion.speed.arena import Arena, aligned, available
from ffn_fusion.speed.decode import Compile, Decoder, DecodeStep
from ffn_fusion.speed.energy import energy_counter
from ffn_fusion.speed.kernels import count_kernels
from ffn_fusion.speed.ranks import Ranks, joined
from ffn_fusion.speed.sublayers import Rank, Settle
from ffn_fusion.speed.timing import Flush, Repeated, Step, Take, cache_values, elapsed_ms, graph_pool

COPIED = {"cpu": 2**28, "cuda": 2**30}
"""Bytes of the copy that bandwidth is measured by."""
ROOM = 0.95
"""Share of the free memory that weights and cache may take; activations need some, too."""
LONG_MS = 1e3
"""Decoding whose energy is measured."""
PROBED = (2, 64)
"""Batch and tokens of a kv cache whose memory is measured."""


@dataclass(frozen=True)
class Race:
    """What to time. Models are folders; `random` ones hold configurations only. `answer` is the file of laps."""

    folders: list[str]
    random: bool
    engine: Literal["torch", "transformers"]
    device_map: str
    dtype: str
    compile: Compile
    slice: int
    scenarios: list[tuple[int, int]]
    """Batch sizes and prompt lengths."""
    new_tokens: int
    repeats: int
    time_limit: float
    """Seconds after which no lap is begun."""
    answer: str


def read_laps(answer: Path) -> tuple[Site | None, list[Lap]]:
    """What a race has written so far."""
    lines = answer.read_text(encoding="utf-8").splitlines() if answer.is_file() else []
    # A line may have been cut off by a kill.
    whole = [json.loads(line) for line in lines if line.endswith("}}")]
    sites = [cattrs.structure(line["site"], Site) for line in whole if "site" in line]
    return sites[-1] if sites else None, [cattrs.structure(line["lap"], Lap) for line in whole if "lap" in line]


class Built:
    """A model in memory: makes its steps, and knows the room of their caches."""

    def __init__(self, model: PreTrainedModel | Decoder) -> None:
        self.model = model

    def room(self, batch_size: int, past: int, new: int) -> int:
        """Values of a kv cache."""
        if isinstance(self.model, Decoder):
            return self.model.cache_values(batch_size, past, new)
        return cache_values(self.model.config, batch_size, past + new)

    def step(self, batch_size: int, past: int, new: int, take: Take | None) -> DecodeStep | Step:
        kind = DecodeStep if isinstance(self.model, Decoder) else Step
        return kind(self.model, batch_size, past, new, take)


def race(order: Race, ranks: Ranks) -> None:
    """Run every lap that the answer does not hold yet; rank 0 writes it."""
    answer, start = Path(order.answer), time.monotonic()
    known = {(lap.batch_size, lap.prompt_length) for lap in read_laps(answer)[1]}
    # Before any rank can write.
    ranks.meet()
    runner = _Runner(order, ranks)
    leads = ranks.rank.index == 0
    if leads:
        append_answer(answer, "site", runner.site)
    for batch_size, prompt_length in order.scenarios:
        if ranks.agree(float(time.monotonic() - start > order.time_limit), largest=True):
            return
        if (batch_size, prompt_length) not in known:
            lap = runner.lap(Scenario(batch_size, prompt_length, order.new_tokens))
            if leads:
                append_answer(answer, "lap", lap)


def append_answer(answer: Path, name: str, value: Site | Lap) -> None:
    with answer.open("a", encoding="utf-8") as file:
        # Behind a line that a kill cut off.
        file.write("\n" + json.dumps({name: asdict(value)}) + "\n")


class _Runner:
    def __init__(self, order: Race, ranks: Ranks) -> None:
        self.order, self.ranks, self.device = order, ranks, ranks.device
        self.dtype: torch.dtype = getattr(torch, order.dtype)
        self.reasons = [""] * len(order.folders)
        on_gpu = self.device.type == "cuda"
        # Of torch's kernels for one query, only FlashAttention's splits the cache over the whole GPU.
        torch.backends.cuda.enable_cudnn_sdp(False)
        bandwidth = copy_bandwidth(self.device)
        torch.cuda.empty_cache()
        memory = torch.cuda.get_device_properties(self.device).total_memory / 1e9 if on_gpu else None
        self.built = self._random() if order.random else [self._loaded(ModelFolder(Path(f))) for f in order.folders]
        held = [self._kv_bytes(built) if built else None for built in self.built]
        self.site = Site(bandwidth / 1e9, memory, held, self.reasons)
        self.flush = Flush(self.device)
        self.energy = energy_counter(self.device)

    def _decoder(self, model: PreTrainedModel, settle: Settle) -> Decoder:
        ranks, part = self.ranks, Rank(0, self.order.slice)
        if ranks.alone:
            return Decoder(model, settle, rank=part, compile=self.order.compile)
        return Decoder(model, settle, rank=ranks.rank, total=ranks.total, join=ranks.join, compile=self.order.compile)

    def _loaded(self, folder: ModelFolder) -> Built:
        if self.order.engine == "transformers":
            return Built(folder.load(self.dtype, self.order.device_map))
        return Built(self._decoder(folder.load(self.dtype, "cpu"), lambda weight: weight.detach().to(self.device)))

    def _random(self) -> list[Built | None]:
        """Models without weights of their own: all take theirs from one stretch of random numbers."""
        models = [skeleton(ModelFolder(Path(folder)).config) for folder in self.order.folders]
        batch, prompt = self.order.scenarios[0]
        context = Scenario(batch, prompt, self.order.new_tokens).context
        free, sizes = ROOM * available(self.device), []
        for index, model in enumerate(models):
            outline, size = self._outline(model)
            sizes.append(size)
            needed = (sizes[-1] + outline.cache_values(batch, context - 1, 1)) * self.dtype.itemsize
            if self.ranks.agree(float(needed > free), largest=True):
                self.reasons[index] = (
                    f"does not fit: needs {needed / 1e9:,.1f} GB on each device for weights and the kv cache of batch "
                    f"{batch}, {free / 1e9:,.1f} GB are free"
                )
        fitting = [size for size, reason in zip(sizes, self.reasons, strict=True) if not reason]
        arena = Arena(max(fitting, default=0), self.device, self.dtype)

        def settled(model: PreTrainedModel) -> Built:
            arena.rewind()
            return Built(self._decoder(model, lambda weight: arena.take(tuple(weight.shape))))

        return [None if reason else settled(model) for model, reason in zip(models, self.reasons, strict=True)]

    def _outline(self, model: PreTrainedModel) -> tuple[Decoder, int]:
        """A decoder without memory, and the room that its weights need."""
        counted = 0

        def count(weight: Tensor) -> Tensor:
            nonlocal counted
            counted += aligned(weight.numel())
            return weight

        return self._decoder(model, count), counted

    def _kv_bytes(self, built: Built) -> float:
        """Bytes a token of cache: what the allocator gave for one on a GPU, the tensors' sizes elsewhere."""
        batch, tokens = PROBED
        taken: list[Tensor] = []

        def take(shape: tuple[int, ...]) -> Tensor:
            taken.append(torch.empty(shape, dtype=self.dtype, device=self.device))
            return taken[-1]

        before = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        built.step(batch, tokens - 1, 1, take)
        held = float(sum(tensor.nbytes for tensor in taken))
        if self.device.type == "cuda":
            held = float(torch.cuda.memory_allocated(self.device) - before)
        return self.ranks.agree(held) / (batch * tokens)

    def lap(self, scenario: Scenario) -> Lap:
        """Every repeat runs all models one after the other, so that drift of the machine hits all alike."""
        reasons = list(self.reasons)
        steps = self._steps(scenario, reasons)
        times: list[list[tuple[float, float]]] = [[] for _ in steps]
        label = f"bench: batch {scenario.batch_size}, prompt {scenario.prompt_length}"
        for repeat in track(range(self.order.repeats + 1), label, self.order.repeats + 1):
            for pair, kept in zip(steps, times, strict=True):
                if pair:
                    elapsed = self._elapsed(pair[0], 1), self._elapsed(pair[1], scenario.new_tokens)
                    if repeat:  # the first is not timed
                        kept.append(elapsed)
        timed = [self._timed(pair, kept) if pair else None for pair, kept in zip(steps, times, strict=True)]
        return Lap(scenario.batch_size, scenario.prompt_length, timed, reasons)

    def _elapsed(self, step: Repeated, times: int) -> float:
        self.flush()
        return elapsed_ms(step, times, self.ranks.meet)

    def _timed(self, pair: tuple[Repeated, Repeated], times: list[tuple[float, float]]) -> Timed:
        prefill, decode = ([*column] for column in zip(*times, strict=True))
        hows = sorted({f"{step.how} {step.note}".strip() for step in pair})
        kernels = count_kernels(pair[1].graph) if pair[1].graph else None
        return Timed(prefill, decode, "; ".join(hows), kernels, self._joules(pair[1], median(decode)))

    def _joules(self, step: Repeated, ms: float) -> float | None:
        if self.energy is None:
            return None
        number = int(self.ranks.agree(max(LONG_MS / ms, 1), largest=True))
        before = self.energy()
        elapsed_ms(step, number, self.ranks.meet)
        return self.ranks.agree(self.energy() - before) / number

    def _steps(self, scenario: Scenario, reasons: list[str]) -> list[tuple[Repeated, Repeated] | None]:
        """A prefill and a decode step of each model, captured where possible; a model that does not fit is left out,
        with the reason."""
        calls = (0, scenario.prompt_length), (scenario.context - 1, 1)
        arena = self._cache(scenario.batch_size, calls, reasons)
        pool = graph_pool(self.device)
        pairs: list[list[Repeated]] = [[] for _ in self.built]

        def make(built: Built, pair: list[Repeated]) -> None:
            for past, new in calls:
                if arena:
                    arena.rewind()
                pair.append(built.step(scenario.batch_size, past, new, arena.take if arena else None))

        def warm_up(_: Built, pair: list[Repeated]) -> None:
            for step in pair:
                step.warm_up()

        def capture(_: Built, pair: list[Repeated]) -> None:
            for step in pair:
                step.capture(pool)

        # All are warm before the first capture, as in `timing.prepare`.
        for stage in (make, warm_up, capture):
            self._each(stage, pairs, reasons)
        return [(pair[0], pair[1]) if pair else None for pair in pairs]

    def _each(
        self, stage: Callable[[Built, list[Repeated]], None], pairs: list[list[Repeated]], reasons: list[str]
    ) -> None:
        for index, (built, pair) in enumerate(zip(self.built, pairs, strict=True)):
            try:
                if built and not reasons[index]:
                    stage(built, pair)
            except torch.OutOfMemoryError:
                reasons[index] = "out of memory: the activations of this batch and prompt do not fit"
                pair.clear()

    def _cache(self, batch_size: int, calls: Iterable[tuple[int, int]], reasons: list[str]) -> Arena | None:
        """One stretch of memory for the caches of all models that it suffices for."""
        rooms = [max(e.room(batch_size, *call) for call in calls) if e else 0 for e in self.built]
        # What the lap before left behind.
        torch.cuda.empty_cache()
        free = ROOM * available(self.device)
        for index, room in enumerate(rooms):
            if self.ranks.agree(float(room * self.dtype.itemsize > free), largest=True):
                needed = room * self.dtype.itemsize / 1e9
                reasons[index] = f"does not fit: the kv cache needs {needed:,.1f} GB, {free / 1e9:,.1f} GB are free"
        fitting = [room for room, reason in zip(rooms, reasons, strict=True) if not reason]
        # Over several GPUs each cache must lie beside its layer.
        spread = self.order.device_map == "balanced"
        return None if spread else Arena(max(fitting, default=0), self.device, self.dtype)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of a large copy on the device: the ceiling that decoding can reach."""
    source = torch.ones(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = Repeated(device, lambda: target.copy_(source))
    elapsed_ms(copy)
    best = min(elapsed_ms(copy, 5) for _ in range(5))
    return 2e3 * len(source) / best


def main(order: dict[str, object]) -> None:
    with joined(order) as ranks:
        race(cattrs.structure(order["race"], Race), ranks)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
