"""A parent's answers on disk: windows of tokens, the likeliest next tokens at each, streams if wanted.

A shard is a safetensors file of compressed windows (docs/formats.md), each of which is read by itself.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ffn_fusion.core.teach_records import Answers, Form, TeachResult
from ffn_fusion.core.topk import Packed, TopK, join_bytes, pack, split_bytes, top_k, unpack
from ffn_fusion.errors import UserError
from ffn_fusion.folder import read_record, write_atomically
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.probe import streams_after
from ffn_fusion.hf.resolve import load_tokenizer

SHARD = "shard-{:05d}.safetensors"
SHARD_BYTES = 2**25
"""Of a shard before compression: what is lost when a run is killed, and held in memory."""
ZSTD = pa.Codec("zstd", compression_level=1)
"""Higher levels save nothing: bytes of token ids are nearly random, and each row has statistics of its own."""


class Cached(NamedTuple):
    """`ids` [batch, length]; `top` [batch, length, k], position t predicting token t + 1; `streams` [batch, length, d]
    in bf16, by the parent's layer behind which they were taken."""

    ids: Tensor
    top: TopK
    streams: dict[int, Tensor]


class Field(NamedTuple):
    """Integers of one kind in a window, and the bytes that each takes."""

    shape: tuple[int, ...]
    num_bytes: int


def fields(form: Form) -> list[Field]:
    """What a window consists of, in the order of storage; ranks before positions, which compresses better."""
    word, length = 2 if form.vocab_size <= 2**16 else 3, form.length
    streams = [Field((length, form.hidden_size), 2)] * len(form.layers)
    top = [Field((form.k, length), word), Field((form.k - 1, length), 2), Field((length,), 2)]
    return [Field((length,), word), *top, *streams]


def windows_per_shard(form: Form, batch_size: int) -> int:
    """Whole batches of windows that make up a shard."""
    window = sum(math.prod(field.shape) * field.num_bytes for field in fields(form))
    return max(1, SHARD_BYTES // (window * batch_size)) * batch_size


@torch.no_grad()
def ask(model: PreTrainedModel, ids: Tensor, form: Form) -> Cached:
    """The parent's answers on windows [batch, length], as a cache would give them back but for rounding."""
    with streams_after(model, form.layers) as streams:
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
    top = top_k(logits.flatten(0, 1), form.k, form.temperature)
    if not torch.isfinite(top.log_probs).all():
        raise UserError(
            f"the parent's logits are not finite in {str(logits.dtype).removeprefix('torch.')}; try --dtype"
        )
    top = TopK(*(part.unflatten(0, ids.shape).cpu() for part in top))
    return Cached(ids, top, {layer: stream.bfloat16().cpu() for layer, stream in streams.items()})


def write_shard(path: Path, batches: Iterable[Cached], form: Form) -> tuple[int, float]:
    """Write a shard so that it is there whole or not at all; returns its bytes, and the sum of its tails' masses."""
    rows: list[list[bytes]] = []
    mass = 0.0
    for cached in batches:
        rows += _rows(cached, form)
        mass += float(cached.top.tail.double().exp().sum())
    windows = [b"".join(row) for row in rows]
    data = save(
        {
            "data": torch.frombuffer(bytearray(b"".join(windows)), dtype=torch.uint8),
            "offsets": torch.tensor([0, *(len(piece) for row in rows for piece in row)]).cumsum(0),
            "crc32": torch.tensor([zlib.crc32(window) for window in windows]),
        }
    )
    write_atomically(path, data)
    return len(data), mass


def _rows(cached: Cached, form: Form) -> Iterator[list[bytes]]:
    """Each window of a batch as compressed pieces: one for every byte of every field."""
    packed = pack(cached.top)
    parts = [cached.ids, packed.ids.mT, packed.gaps.mT, packed.odds]
    parts += [cached.streams[layer].view(torch.int16) for layer in form.layers]
    for row in zip(*parts, strict=True):
        pairs = zip(row, fields(form), strict=True)
        pieces = [piece for values, field in pairs for piece in split_bytes(values, field.num_bytes)]
        yield [ZSTD.compress(piece.numpy().data, asbytes=True) for piece in pieces]


class TeacherCache:
    """Answers in a finished folder. Reading keeps no file open and no state, so that processes may share a cache."""

    def __init__(self, folder: Path, answers: Answers, sources: Sequence[str] = ()) -> None:
        self.folder, self._answers, self.sources = folder, answers, tuple(sources)
        form = answers.form
        self.num_windows, self.length, self.k = answers.num_windows, form.length, form.k
        self.temperature, self.vocab_size = form.temperature, form.vocab_size
        self.layers = tuple(form.layers)
        self._fields = fields(form)
        self._num_pieces = sum(field.num_bytes for field in self._fields)
        for number in range(answers.num_shards):
            self._check(number)

    def read(self, windows: Sequence[int]) -> Cached:
        """The windows of these numbers, in this order; `UserError` if what the file holds is not what was written."""
        rows = [self._window(window) for window in windows]
        ids, top, gaps, odds, *streams = (torch.stack(column) for column in zip(*rows, strict=True))
        pairs = zip(self.layers, streams, strict=True)
        kept = {layer: stream.to(torch.int16).view(torch.bfloat16) for layer, stream in pairs}
        return Cached(ids, unpack(Packed(top.mT, gaps.mT, odds)), kept)

    def _window(self, window: int) -> list[Tensor]:
        """The fields of one window."""
        number, row = divmod(window, self._answers.windows_per_shard)
        path = self.folder / SHARD.format(number)
        with safe_open(path, framework="pt") as file:
            first = row * self._num_pieces
            ends: list[int] = file.get_slice("offsets")[first : first + self._num_pieces + 1].tolist()
            data = file.get_slice("data")[ends[0] : ends[-1]].numpy().tobytes()
            crc32 = int(file.get_slice("crc32")[row : row + 1])
        if zlib.crc32(data) != crc32:
            raise _damaged(path, f"window {window} is not what was written")
        pieces = iter(data[start - ends[0] : end - ends[0]] for start, end in pairwise(ends))
        return [_field(field, pieces) for field in self._fields]

    def _check(self, number: int) -> None:
        """A shard is there and as long as its header says."""
        path = self.folder / SHARD.format(number)
        held = self._answers.held(number)
        try:
            with safe_open(path, framework="pt") as file:
                shape = file.get_slice("offsets").get_shape()
        except (SafetensorError, OSError) as error:
            raise _damaged(path, str(error)) from None
        if shape != [held * self._num_pieces + 1]:
            raise _damaged(path, f"it does not hold {held} windows")


def _field(field: Field, pieces: Iterator[bytes]) -> Tensor:
    size = math.prod(field.shape)
    rows = [
        np.frombuffer(ZSTD.decompress(next(pieces), decompressed_size=size, asbytes=True), np.uint8)
        for _ in range(field.num_bytes)
    ]
    return join_bytes(torch.from_numpy(np.stack(rows)), field.shape)


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged ({reason}); delete {path.parent} and run ffn-fusion teach again")


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Which token each id stands for, as one string."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def open_cache(folder: Path, parent: ModelFolder, trust_remote_code: bool = False) -> TeacherCache:
    """The answers that `teach` left in a folder; `UserError` if they are another model's, unfinished or damaged."""
    result = read_record(folder, TeachResult).result
    if result.answers is None:
        raise UserError(f"{folder} holds text without answers; run ffn-fusion teach without --windows 0")
    if result.answers.form.vocab_size != parent.config.vocab_size:
        raise UserError(
            f"the answers in {folder} are of a vocabulary of {result.answers.form.vocab_size:,}; "
            f"that of {parent.folder} has {parent.config.vocab_size:,}"
        )
    if result.parent_key != parent.checkpoint.key:
        raise UserError(f"the answers in {folder} are those of another model, {result.parent}, not of {parent.folder}")
    if result.tokenizer_key != tokenizer_key(load_tokenizer(parent, trust_remote_code)):
        raise UserError(f"the answers in {folder} were given with another tokenizer than that in {parent.folder}")
    return TeacherCache(folder, result.answers, result.sample.sources if result.sample else ())
