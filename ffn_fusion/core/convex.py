"""A quadratic score over choices, split into costs of single options, as much as can be, and a convex rest.

Of each part (a layer, a link) one option is chosen. So what a quadratic form has within the items of a part is a cost
of each option, and taking it out of the form changes no choice's score; but the less the form keeps, the higher is
its relaxation. This is quadratic convex reformulation (Billionnet and Elloumi 2007), with the blocks of parts in
place of a diagonal.
"""

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
RIDGE = 1e-9
BARRIER = (0.1, 0.03, 0.01)
"""Weights of the barrier, in mean gains. Lower ones fit the point given, at the expense of all others: measured."""
STEPS, PRODUCTS = 3, 12
"""Newton steps at each weight, and conjugate-gradient products in each."""


def equal_share(gram: Matrix, parts: list[list[int]]) -> Matrix:
    """The largest multiple of the parts' own blocks of `gram` that leaves a positive semidefinite rest.

    It is negative if `gram` is not semidefinite itself, so that the rest is so for every symmetric matrix.
    """
    root = _roots(gram, parts)
    share = float(np.linalg.eigvalsh(_whitened(gram, root))[0]) - RIDGE
    return _lowered(gram, np.asarray(share * root @ root.T))


def tightened(gram: Matrix, parts: list[list[int]], gains: Matrix) -> Matrix:
    """Blocks B with gram - B positive semidefinite and <gains, B> large.

    `gains` is what B raises the relaxation by at the relaxed optimum: the covariance of each part's items if options
    are drawn with the weights that they have there. The maximum of <gains, B> + barrier log det(gram - B) is followed
    for a falling barrier, by Newton's method with conjugate gradients.
    """
    mask = _mask(len(gram), parts)
    root = _roots(gram, parts)
    white = _whitened(gram, root)
    wanted = np.where(mask, root.T @ gains @ root, 0.0)
    least = float(np.linalg.eigvalsh(white)[0])
    blocks = (least - 0.1 * abs(least) - 1e-3) * np.eye(len(gram))
    unit = 5 * float(np.trace(wanted)) / len(gram)
    for barrier in BARRIER:
        for _ in range(STEPS):
            blocks = _newton(white, blocks, wanted, mask, barrier * unit)
    return _lowered(gram, root @ blocks @ root.T)


def _lowered(gram: Matrix, blocks: Matrix) -> Matrix:
    """The blocks, less what rounding put into them that the form does not have: a nearly singular part has a root that
    whitens badly."""
    rest = gram - blocks
    eye = np.eye(len(gram))
    try:
        np.linalg.cholesky(rest + RIDGE * float(np.abs(gram).max() or 1.0) * eye)
    except np.linalg.LinAlgError:
        return blocks + min(0.0, float(np.linalg.eigvalsh(rest)[0])) * eye
    return blocks


def _newton(white: Matrix, blocks: Matrix, wanted: Matrix, mask: NDArray[np.bool_], barrier: float) -> Matrix:
    """One damped Newton step towards the most of <wanted, B> + barrier log det(white - B)."""
    inverse = np.linalg.inv(white - blocks)
    residual = np.where(mask, wanted - barrier * inverse, 0.0)
    step, direction, gradient = np.zeros_like(blocks), residual, residual
    size = first = float(np.sum(residual**2))
    for _ in range(PRODUCTS if first else 0):
        curved = barrier * np.where(mask, inverse @ direction @ inverse, 0.0)
        length = size / float(np.sum(direction * curved))
        step, residual = step + length * direction, residual - length * curved
        size, before = float(np.sum(residual**2)), size
        if size < 1e-2 * first:
            break
        direction = residual + size / before * direction
    value, slope, length = _value(white, blocks, wanted, barrier), float(np.sum(gradient * step)), 1.0
    while _value(white, blocks + length * step, wanted, barrier) < value + 0.1 * length * slope:
        length /= 2
        if length < 1e-6:
            return blocks
    return blocks + length * step


def _value(white: Matrix, blocks: Matrix, wanted: Matrix, barrier: float) -> float:
    try:
        factor = np.linalg.cholesky(white - blocks)
    except np.linalg.LinAlgError:
        return -np.inf
    return float(np.sum(blocks * wanted) + 2 * barrier * np.log(np.diag(factor)).sum())


def _mask(size: int, parts: list[list[int]]) -> NDArray[np.bool_]:
    mask = np.zeros((size, size), dtype=bool)
    for items in parts:
        mask[np.ix_(items, items)] = True
    return mask


def _roots(gram: Matrix, parts: list[list[int]]) -> Matrix:
    """Cholesky factors of the parts' blocks, made definite where they are not."""
    blocks = np.where(_mask(len(gram), parts), gram, 0.0)
    level = float(np.abs(np.diag(blocks)).mean()) or 1.0
    least = float(np.linalg.eigvalsh(blocks)[0])
    shifted = blocks + (max(0.0, -2 * least) + RIDGE * level) * np.eye(len(gram))
    return np.asarray(np.linalg.cholesky(shifted), dtype=np.float64)


def _whitened(gram: Matrix, root: Matrix) -> Matrix:
    inverse = np.linalg.inv(root)
    white = inverse @ gram @ inverse.T
    return (white + white.T) / 2
