"""The text of a training stage: windows of token ids of several sources in their shares, in an order that the seed
alone decides, on disk."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ffn_fusion.core.curriculum import Source
from ffn_fusion.core.heal_records import Drawn
from ffn_fusion.errors import UserError
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
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int, path: Path
) -> Corpus:
    """`count` windows of `length` tokens; a source with too little text is read again and again, each time shuffled.

    Only the part of a source that is not for measuring is read (`read_windows`). `path` is where ids are kept.
    """
    shares = np.array([source.share for source in sources])
    if (shares <= 0).any():
        raise UserError("shares of text must be positive")
    ends = np.round(np.cumsum(shares) / shares.sum() * count).astype(int)
    generator = np.random.default_rng(seed)
    found, orders, start = [], [], 0
    for source, wanted in zip(sources, np.diff(ends, prepend=0).tolist(), strict=True):
        windows = _windows(source, tokenizer, length, wanted, seed)
        orders += [start + repeated(wanted, len(windows), generator)] if wanted else []
        found.append(windows)
        start += len(windows)
    np.save(path, np.concatenate(found))
    held = [(source.text, len(windows)) for source, windows in zip(sources, found, strict=True)]
    return Corpus(np.load(path, mmap_mode="r"), generator.permutation(np.concatenate(orders)), held)


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


def _windows(source: Source, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> np.ndarray:
    """At most `count` windows of a source, at least one; uint32 [windows, length]."""
    text = replace(Text(), text=(source.text,), column=source.column, length=length, seed=seed)
    # Four bytes a token, where a list takes 36.
    ids = array("i")
    for some in _tokenised(shuffled_pieces(text, tokenizer, "fit"), tokenizer):
        ids.extend(some)
        if len(ids) >= length * count:
            break
    whole = min(len(ids) // length, max(1, count))
    if not whole:
        raise UserError(f"text {source.text} has only {len(ids):,} tokens in its 'fit' part; a window has {length:,}")
    return np.frombuffer(ids, dtype=np.int32)[: whole * length].astype(np.uint32).reshape(whole, length)


def _tokenised(pieces: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    start = 0
    while start < len(pieces):
        some = list(pieces[start : start + AT_ONCE])
        yield [token for ids in tokenizer(some, verbose=False)["input_ids"] for token in ids]
        start += AT_ONCE
