"""Questions whose answers are offered, as a smooth score: how surprised a model is by the right one."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Answers:
    """A model's answers, question by question: the loss of the right one in nats, and 1 where it is the likeliest."""

    loss: list[float]
    right: list[float]


def loss_of(scores: Sequence[float], right: Collection[int]) -> float:
    """Cross-entropy of a softmax over the answers offered: how unlikely it is that one of the `right` is chosen.

    `scores` are their log-likelihoods. A single one is not chosen but written: its loss is that of all else that the
    vocabulary offers.
    """
    if len(scores) == 1:
        return -scores[0]
    values = np.asarray(scores, dtype=np.float64)
    return float(np.logaddexp.reduce(values) - np.logaddexp.reduce(values[sorted(right)]))
