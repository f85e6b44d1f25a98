"""The text of a training stage: windows of token ids of several sources in their shares, in an order that the seed
alone decides, on disk."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ffn_fusion.core.curriculum import Source
from ffn_fusion.core.heal_records import Drawn
from ffn_fusion.errors import UserError
from ffn_fusion.folder import StageFolder
from ffn_fusion.hf.text import shuffled_pieces
from ffn_fusion.settings import Text

AT_ONCE = 256
"""Pieces tokenised at once."""


@dataclass(frozen=True)
class Corpus:
    """`order` says which of the windows [windows, length] each place in the stage has; `sources` how many of them are
    of each text, one after the other."""

    windows: np.ndarray
    order: np.ndarray
    sources: list[tuple[str, int]]

    def read(self, places: Sequence[int]) -> Tensor:
        """Windows at these places of the stage, [places, length]."""
        return torch.from_numpy(self.windows[self.order[list(places)]].astype(np.int64))


def build_corpus(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int,
    seed: int,
    folder: StageFolder,
    name: str,
    is_first: bool,
) -> Corpus:
    """`count` windows of `length` tokens; a source with too little text is read again and again, each time shuffled.

    Only the part of a source that is not for measuring is read (`read_windows`). Ids are kept under `name` in the
    folder's state, where all ranks and a run that goes on find them. One rank tokenises, for as long as it takes: no
    collective would wait for it that long.
    """
    path, counts = folder.state / name, f"{name}.json"
    wanted = _wanted(sources, count)
    if is_first and folder.load(counts) is None:
        with path.open("wb") as file:
            pairs = zip(sources, wanted, strict=True)
            written = [_write(source, tokenizer, length, number, seed, file) for source, number in pairs]
        folder.save(counts, written)
    while (held := folder.load(counts)) is None:
        time.sleep(1)
    generator = np.random.default_rng(seed)
    orders, start = [], 0
    for number, there in zip(wanted, held, strict=True):
        orders += [start + repeated(number, there, generator)] if number else []
        start += there
    windows = np.memmap(path, dtype=np.uint32, mode="r", shape=(start, length))
    named = [(source.text, there) for source, there in zip(sources, held, strict=True)]
    return Corpus(windows, generator.permutation(np.concatenate(orders)), named)


def _wanted(sources: Sequence[Source], count: int) -> list[int]:
    """Windows of each source, by its share."""
    shares = np.array([source.share for source in sources])
    if (shares <= 0).any():
        raise UserError("shares of text must be positive")
    ends = np.round(np.cumsum(shares) / shares.sum() * count).astype(int)
    wanted: list[int] = np.diff(ends, prepend=0).tolist()
    return wanted


def drawn(order: np.ndarray, sources: Sequence[tuple[str, int]], length: int) -> list[Drawn]:
    """What windows in this order took of each source; of sources that were not read, nothing."""
    found, start = [], 0
    for text, count in sources:
        taken = order[(start <= order) & (order < start + count)]
        if len(taken):
            found.append(Drawn(text, len(taken) * length, len(np.unique(taken)) * length))
        start += count
    return found


def repeated(count: int, of: int, generator: np.random.Generator) -> np.ndarray:
    """`count` numbers below `of`, all of them once, shuffled, before any comes again."""
    rounds = [generator.permutation(of) for _ in range(-(-count // of))]
    return np.concatenate(rounds)[:count]


def _write(
    source: Source, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int, file: BinaryIO
) -> int:
    """Append at most `count` windows of a source, at least one; how many."""
    text = replace(Text(), text=(source.text,), column=source.column, length=length, seed=seed)
    wanted, written = length * max(1, count), 0
    for some in _tokenised(shuffled_pieces(text, tokenizer, "fit"), tokenizer):
        part = np.array(some[: wanted - written], dtype=np.uint32)
        file.write(part.tobytes())
        written += len(part)
        if written == wanted:
            break
    if written < length:
        raise UserError(f"text {source.text} has only {written:,} tokens in its 'fit' part; a window has {length:,}")
    # The last window is whole or is none.
    file.seek(-4 * (written % length), os.SEEK_CUR)
    file.truncate()
    return written // length


def _tokenised(pieces: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    start = 0
    while start < len(pieces):
        some = list(pieces[start : start + AT_ONCE])
        yield [token for ids in tokenizer(some, verbose=False)["input_ids"] for token in ids]
        start += AT_ONCE
