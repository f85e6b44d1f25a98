"""Times one call of a model at fixed shapes: a prefill, or a decode step in the middle of a long text.

On a GPU the call is captured in a CUDA graph and replayed, as engines do it, so that not the launching of kernels is
timed but their running. That needs a cache that neither grows nor moves.
"""

import time
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from ffn_fusion.progress import track
from ffn_fusion.speed.arena import aligned

WARMUP = 3
FLUSHED = {"cpu": 2**27, "cuda": 2**29}
"""Bytes that `Flush` reads."""
Take = Callable[[tuple[int, ...]], Tensor]
"""Memory for the keys or values of one attention, [batch, kv heads, tokens, head dim]."""


class FixedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of `past` tokens and those of the call: each call writes the same last positions over.

    With a sliding window only the part of the past that is seen is kept. Without attention there is no memory, but
    the lengths are the same, since masks are sized by any layer.
    """

    def __init__(self, past: int, new: int, window: int | None) -> None:
        super().__init__()
        self.past, self.is_sliding = past, window is not None
        self.kept = past if window is None else min(past, window - 1)
        self.length = self.kept + new
        # Else a block without attention would start its entry anew in each call.
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, self.kept :].copy_(key_states)
        self.values[:, :, self.kept :].copy_(value_states)
        return self.keys, self.values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """All memory is there from the start."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.kept + query_length, self.past - self.kept

    def get_seq_length(self) -> int:
        return self.past

    def get_max_length(self) -> int:
        return self.length


class FixedCache(Cache):  # type: ignore[misc]
    """A cache for calls with `new` tokens behind `past` ones. `take` gives its memory; without it, random numbers."""

    def __init__(self, model: PreTrainedModel, batch_size: int, past: int, new: int, take: Take | None = None) -> None:
        config = model.config
        windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
        layers = []
        for block, window, module in zip(config.block_configs, windows, model.model.layers, strict=True):
            layer = FixedLayer(past, new, window)
            if not block.attention.no_op:
                shape = cache_shape(config, block, batch_size, layer.length)
                device = next(module.parameters()).device
                layer.keys, layer.values = (
                    take(shape) if take else torch.randn(shape, dtype=model.dtype, device=device) for _ in range(2)
                )
            layers.append(layer)
        super().__init__(layers=layers)


def cache_shape(config: Any, block: Any, batch_size: int, length: int) -> tuple[int, ...]:
    """[batch, kv heads, tokens, head dim] of one attention's keys or values; no kv heads without attention."""
    group = None if block.attention.no_op else block.attention.n_heads_in_group
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return batch_size, config.num_attention_heads // group if group else 0, length, head_dim


def cache_values(config: Any, batch_size: int, length: int) -> int:
    """Room in an arena for the keys and values of all attentions; sliding windows need less."""
    return sum(2 * aligned(prod(cache_shape(config, b, batch_size, length))) for b in config.block_configs)


class Repeated:
    """A call at fixed shapes, ready to be repeated: `call` says what is done, a subclass or whoever makes it.

    `note` says why it runs eagerly on a GPU, if it does.
    """

    capturable = True

    def __init__(self, device: torch.device, call: Callable[[], object] | None = None) -> None:
        self.device = device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.note = ""
        if call:
            self.call = call  # type: ignore[method-assign]

    def call(self) -> object:
        raise NotImplementedError

    @property
    def how(self) -> str:
        return "eager" if self.graph is None else "CUDA graph"

    def run(self) -> None:
        if self.graph is None:
            self.call()
        else:
            self.graph.replay()

    def warm_up(self) -> None:
        if self.device.type != "cuda":
            self.call()
            return
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARMUP):
                    self.call()
            torch.cuda.current_stream().wait_stream(side)

    def capture(self, pool: Any = None) -> None:
        """Once warm, on a GPU, where that is possible. Steps that share a `pool` of memory must never run at once."""
        if self.device.type == "cuda" and self.capturable:
            with torch.cuda.device(self.device):
                self._capture(pool)

    def _capture(self, pool: Any) -> None:
        # Kept, so that its kernels can be counted.
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        try:
            # NCCL's watchdog thread asks for events meanwhile, which the global mode forbids.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self.call()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what CUDA refuses to capture, such as a read of a value on the host
            torch.cuda.synchronize()
            self.note = f"not captured: {' '.join(str(error).split())[:120]}"
        else:
            graph.instantiate()
            self.graph = graph


def prepare(steps: Sequence[Repeated], label: str) -> None:
    """Warm all up, then capture all; they must never run at once.

    A graph keeps its memory for itself, so that a warm-up behind a capture would need as much again.
    """
    for step in track(steps, f"{label}: warming up", len(steps)):
        step.warm_up()
    pool = graph_pool(steps[0].device)
    for step in steps:
        step.capture(pool)


def graph_pool(device: torch.device) -> Any:
    """Memory for graphs that never run at once."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


class Step(Repeated):
    """One call of a model with `new` tokens behind `past` ones that are in its cache, ready to be repeated.

    A decode step feeds its token to the next one.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int, past: int, new: int, take: Take | None = None) -> None:
        super().__init__(model.device)
        self.model = model
        self.cache = FixedCache(model, batch_size, past, new, take)
        ids = torch.randint(model.config.vocab_size, (batch_size, new), generator=torch.Generator().manual_seed(0))
        self.ids = ids.to(self.device)
        self.positions = torch.arange(past, past + new, device=self.device).unsqueeze(0)
        if len({parameter.device for parameter in model.parameters()}) > 1:
            self.capturable, self.note = False, "not captured: the model is spread over several devices"

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Of the last position, [batch, 1, vocabulary]."""
        logits: Tensor = self.model(
            input_ids=self.ids,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1:]

    def call(self) -> None:
        token = self.logits().argmax(-1)
        if token.shape == self.ids.shape:
            self.ids.copy_(token)


def elapsed_ms(step: Repeated, times: int = 1, meet: Callable[[], object] = lambda: None) -> float:
    """Milliseconds of a call, mean over `times` calls in a row; on a GPU of its work there, between two events.

    `meet` brings ranks together before the clock starts.
    """
    if step.device.type != "cuda":
        meet()
        start = time.perf_counter()
        for _ in range(times):
            step.run()
        return (time.perf_counter() - start) * 1e3 / times
    with torch.cuda.device(step.device):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        meet()
        begin.record()
        for _ in range(times):
            step.run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / times


class Flush:
    """Reads more than the device's caches hold, so that a call finds none of its weights there, as in a large model.

    On a GPU it also keeps the device busy while the call is queued, so that the launch of a graph is not timed.
    """

    def __init__(self, device: torch.device) -> None:
        self.values = torch.ones(FLUSHED[device.type] // 4, device=device)

    def __call__(self) -> None:
        self.values.sum()


def interleaved(steps: Sequence[Repeated], repeats: int, label: str) -> list[list[float]]:
    """Milliseconds [step][repeat]. All steps run once in every repeat, so that drift of the machine hits all alike."""
    flush = Flush(steps[0].device)
    times: list[list[float]] = [[] for _ in steps]
    for _ in track(range(repeats), label, repeats):
        for step, kept in zip(steps, times, strict=True):
            flush()
            kept.append(elapsed_ms(step))
    return times
