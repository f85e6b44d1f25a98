"""Result of `merge`, as it is written to the `record.json` of a merged student."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Merged:
    """One of the students that were averaged: its share, and how far its weights are from the average, as a share of
    the average's norm."""

    student: str
    share: float
    distance: float

    def __str__(self) -> str:
        return f"{self.share:.1%} {self.student}, {self.distance:.1%} from the average"


@dataclass(frozen=True)
class MergeResult:
    """A student whose weights are the average of others'."""

    plan: str
    students: list[Merged]
    texts: list[str]
    """What any of them was calibrated or trained on."""

    def summary(self) -> str:
        return "\n".join([f"plan {self.plan}", *map(str, self.students)])
