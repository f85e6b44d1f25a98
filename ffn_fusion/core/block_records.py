"""Results of `bld`, as they are written to the `record.json` of a library of blocks."""

from dataclasses import dataclass
from typing import Literal

from ffn_fusion.core.records import Sample

Kept = Literal["start", "fitted", "trained"]


@dataclass(frozen=True)
class UnitResult:
    """One trained block. Losses are held-out and relative: 1 is what leaving the stream as it is costs.

    `start` is the loss of the untrained variant (or of what an earlier library had), `fitted` after the closed-form
    fit, `trained` after gradient steps (None where there was none). The file has the weights with the lowest.
    """

    block: str
    file: str
    kept: Kept
    start: float
    fitted: float | None
    trained: float | None
    num_tokens: int
    """Tokens that gradient steps saw, repetitions counted."""
    seconds: float

    @property
    def loss(self) -> float:
        """Held-out loss of the weights in the file."""
        return min(loss for loss in (self.start, self.fitted, self.trained) if loss is not None)

    def __str__(self) -> str:
        steps = [f"{loss:.4f} {name}" for name, loss in (("fitted", self.fitted), ("trained", self.trained)) if loss]
        return f"{self.block}: held-out loss {' -> '.join([f'{self.start:.4f}', *steps])}, kept: {self.kept}"


@dataclass(frozen=True)
class BldResult:
    """A library: trained blocks of one parent, named by their content, and the text behind them."""

    parent: str
    parent_key: str
    """Content of the parent's weights (hf/library.py)."""
    norm: str
    units: list[UnitResult]
    sample: Sample
    channel_steps: int = 1
    """In which channels were chosen."""

    def summary(self) -> str:
        return "\n".join(
            [f"{len(self.units)} blocks, {self.sample.num_tokens:,} tokens of text", *map(str, self.units)]
        )
