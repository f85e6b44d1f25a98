"""Metrics as they come: a line of JSON each, and TensorBoard where it is installed."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ffn_fusion.core.heal_records import CheckUp, TrainingPoint
from ffn_fusion.folder import write_atomically

METRICS = "metrics.jsonl"
BOARD = "tensorboard"


class Journal:
    """`curve` is what a killed run had noted; lines that came after its last checkpoint are dropped."""

    def __init__(self, folder: Path, curve: Sequence[TrainingPoint], writes: bool) -> None:
        self._writes = writes
        if not writes:
            return
        self._path = folder / METRICS
        last = curve[-1].step if curve else -1
        # The last line may have been cut; a whole one has an end.
        lines = self._path.read_text(encoding="utf-8").split("\n")[:-1] if self._path.is_file() else []
        kept = [line for line in lines if json.loads(line)["step"] <= last]
        write_atomically(self._path, "".join(f"{line}\n" for line in kept))
        self._board = _board(folder / BOARD, last)

    def add(self, point: TrainingPoint) -> None:
        self._line({"kind": "training", **asdict(point)})
        self._scalars(
            {"learning_rate": point.learning_rate, "gradient_norm": point.norm} | point.losses, "training", point
        )

    def add_check_up(self, found: CheckUp) -> None:
        self._line({"kind": "check-up", **asdict(found)})
        for name in ("kl", "nll"):
            self._scalars({domain: getattr(score, name).mean for domain, score in found.domains.items()}, name, found)

    def _line(self, row: dict[str, Any]) -> None:
        if self._writes:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def _scalars(self, values: dict[str, float], group: str, at: TrainingPoint | CheckUp) -> None:
        if self._writes and self._board:
            for name, value in values.items():
                self._board.add_scalar(f"{group}/{name}", value, at.step)


def _board(folder: Path, last: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter  # an extra
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=last + 1)
