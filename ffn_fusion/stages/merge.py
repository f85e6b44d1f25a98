"""`merge`: students of one plan → the student of their average weights."""

from collections.abc import Iterator, Sequence
from math import fsum, sqrt
from pathlib import Path

import torch
from torch import Tensor

from ffn_fusion.core.merge_records import Merged, MergeResult
from ffn_fusion.errors import UserError
from ffn_fusion.folder import Environment, Record, StageFolder, environment, run_stage
from ffn_fusion.healing.tuned import write_card, write_tuned
from ffn_fusion.hf.model import ModelFolder
from ffn_fusion.hf.provenance import texts_behind
from ffn_fusion.hf.resolve import resolve_model
from ffn_fusion.progress import track
from ffn_fusion.settings import Above0

MADE_BY = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
"""Fields of a configuration that say nothing of what the model computes."""


def merge(*students: str, out: Path, weight: tuple[Above0, ...] = ()) -> Record[MergeResult]:
    """Average the weights of students of one plan that were healed from one beginning ("model soup").

    Where two runs went different ways, on other text or with other losses, their average is often better than either
    (Wortsman et al., arXiv 2203.05482), and costs nothing when the model runs.

    Parameters
    ----------
    students
        Two folders or more, of one plan; those that never had weights in common average to nothing of use.
    out
        New student folder, in dtype and companions like the first.
    weight
        Of each student in the average, in their order; without it all count alike.
    """
    folders = [resolve_model(student) for student in students]
    shares = _shares(students, weight)
    for name, folder in zip(students[1:], folders[1:], strict=True):
        _check(students[0], folders[0], name, folder)
    inputs = {"students": [folder.fingerprint for folder in folders], "shares": shares}

    def work(stage: StageFolder) -> tuple[MergeResult, Environment]:
        average = _Average(folders, shares)
        write_tuned(folders[0], average.tensors(), stage.path)
        triples = zip(students, shares, average.distances, strict=True)
        result = MergeResult(
            plan=str(folders[0].made_by or folders[0].plan),
            students=[Merged(*triple) for triple in triples],
            texts=list(dict.fromkeys(text for folder in folders for text in texts_behind(folder))),
        )
        told = "\n".join(f"- {student}" for student in result.students)
        write_card(folders[0], f"## Merged\n\nThe average of {len(students)} students:\n\n{told}\n", stage.path)
        return result, environment("cpu", "float32")

    return run_stage("merge", out, inputs, MergeResult, work)


class _Average:
    """The weighted mean of checkpoints, one tensor at a time, and how far each of them is from it."""

    def __init__(self, folders: Sequence[ModelFolder], shares: Sequence[float]) -> None:
        self._folders, self._shares = folders, shares
        self._squares: list[list[float]] = []
        """Of each tensor: sums of squares of each model's difference, and of the average."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        names = self._folders[0].checkpoint.specs
        for name in track(names, "merge: tensors written", len(names)):
            parts = [folder.checkpoint.read(name).float() for folder in self._folders]
            mean = torch.zeros_like(parts[0])
            for share, part in zip(self._shares, parts, strict=True):
                mean.add_(part, alpha=share)
            self._squares.append([float((each - mean).square().sum()) for each in parts] + [float(mean.square().sum())])
            yield name, mean

    @property
    def distances(self) -> list[float]:
        *differences, mean = (fsum(column) for column in zip(*self._squares, strict=True))
        return [sqrt(each / mean) for each in differences]


def _shares(students: Sequence[str], weights: Sequence[float]) -> list[float]:
    if len(students) < 2:
        raise UserError("merge averages two students or more")
    if weights and len(weights) != len(students):
        raise UserError(f"--weight is given {len(weights)} times for {len(students)} students")
    weights = weights or [1.0] * len(students)
    return [weight / fsum(weights) for weight in weights]


def _check(first: str, one: ModelFolder, second: str, other: ModelFolder) -> None:
    """`UserError` unless the average of two models computes what either does."""
    if one.made_by != other.made_by:
        raise UserError(f"{first} and {second} are students of different plans")
    fields = sorted(
        name
        for name in (one.raw_config.keys() | other.raw_config.keys()) - MADE_BY
        if one.raw_config.get(name) != other.raw_config.get(name)
    )
    if fields:
        raise UserError(f"the configurations of {first} and {second} differ in {', '.join(fields)}")
    shapes, others = ({name: spec.shape for name, spec in each.checkpoint.specs.items()} for each in (one, other))
    if shapes != others:
        raise UserError(f"the tensors of {first} and {second} differ in name or shape")
