"""What measured plans teach about the scores of single changes (Puzzle's scores are additive; real plans are not)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

COMMON, OWN, NOISE = 0.3, 0.3, 0.02
"""Standard deviations, relative: of an error that all scores share, of each score's own, of a measured KL."""

Vector = NDArray[np.float64]


def corrected(scores: Sequence[float], made: NDArray[np.bool_], predicted: Vector, measured: Vector) -> list[float]:
    """Scores [K] after P plans were measured: their expectation given the residuals, all errors being Gaussian.

    `made` [P, K] says which changes a plan makes; `predicted` and `measured` [P] are KLs. With few plans a residual
    goes mostly to the error that all share; the more differ, the more of it goes to the changes that explain it.
    """
    prior = np.abs(np.asarray(scores, dtype=np.float64))
    prior = np.maximum(prior, 0.1 * np.median(prior))
    covariance = np.outer(COMMON * prior, COMMON * prior) + np.diag(np.square(OWN * prior))
    z = made.astype(np.float64)
    noise = np.diag(np.square(NOISE * measured))
    gain = covariance @ z.T @ np.linalg.inv(z @ covariance @ z.T + noise)
    return list(np.asarray(scores) + gain @ (measured - predicted))
