"""Small texts for tests: reproducible sentences, in files of every kind that the tool reads."""

import random
from pathlib import Path

from torch import Tensor

from ffn_fusion.core.records import Sample
from ffn_fusion.hf.text import Windows

WORDS = [
    "the",
    "a",
    "one",
    "river",
    "stone",
    "bird",
    "sings",
    "falls",
    "turns",
    "over",
    "under",
    "and",
    "then",
    "while",
    "old",
    "new",
    "light",
    "dark",
    "quiet",
    "loud",
]


def sentences(count: int, seed: int) -> str:
    draw = random.Random(seed)
    return "\n".join(" ".join(draw.choices(WORDS, k=9)).capitalize() + "." for _ in range(count)) + "\n"


def write_text(folder: Path, name: str = "text.txt", seed: int = 0, documents: int = 40) -> Path:
    """A folder of small documents, enough for a few thousand tokens of the tiny tokenizer."""
    path = folder / name
    path.mkdir(parents=True)
    for number in range(documents):
        (path / f"{number:03}.txt").write_text(sentences(12, seed * 1000 + number))
    return path


def as_windows(ids: Tensor) -> Windows:
    """Token ids [windows, length] as if a text had been read."""
    return Windows(ids, (1,) * len(ids), Sample([], "measure", len(ids), ids.shape[1], 0, ""))
