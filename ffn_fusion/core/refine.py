"""What measured plans teach about the scores of single changes, which do not quite add up."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

COMMON, OWN, NOISE = 0.3, 0.3, 0.02
"""Standard deviations, relative: of an error that all scores share, of each score's own, of a measured plan."""
SPREAD = 0.1
"""Standard deviation of the strength of interactions."""

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Lesson:
    """A measured plan: the changes that it makes [K], its score (KL, or a rise of a loss) by theirs alone, what
    interactions of full strength add, and the score that was measured."""

    made: NDArray[np.bool_]
    additive: float
    interactions: float
    measured: float


def learned(scores: Sequence[float], strength: float, lessons: Sequence[Lesson]) -> tuple[Vector, float]:
    """Corrections of the scores [K] and the strength of interactions, expected after `lessons`.

    A linear model with Gaussian errors: a plan's score = sum of (score + correction) + strength * interactions + noise.
    With few plans a residual goes mostly to what all have in common; the more differ, the more of it goes to the
    changes that explain it.
    """
    if not lessons:
        return np.zeros(len(scores)), strength
    prior = np.abs(np.asarray(scores, dtype=np.float64))
    prior = np.maximum(prior, 0.1 * np.median(prior))
    covariance = np.zeros((len(prior) + 1,) * 2)
    covariance[:-1, :-1] = np.outer(COMMON * prior, COMMON * prior) + np.diag(np.square(OWN * prior))
    covariance[-1, -1] = SPREAD**2
    features = np.array([[*lesson.made, lesson.interactions] for lesson in lessons], dtype=np.float64)
    measured = np.array([lesson.measured for lesson in lessons])
    predicted = np.array([lesson.additive + strength * lesson.interactions for lesson in lessons])
    # A rise may be near 0 where a fall was predicted; it is not the surer for that.
    noise = np.diag(np.square(NOISE * np.maximum(np.abs(measured), np.abs(predicted))))
    gain = covariance @ features.T @ np.linalg.inv(features @ covariance @ features.T + noise)
    found = gain @ (measured - predicted)
    return found[:-1], float(np.clip(strength + found[-1], 0.0, 1.0))
