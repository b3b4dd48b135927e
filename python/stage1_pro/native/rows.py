"""Checks of rows, and what is counted over them: their order, sweeps over all thresholds, pairs of thresholds."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro.arguments import array, names
from stage1_pro.errors import InputError
from stage1_pro.native._reference import Swept
from stage1_pro.native.backend import kernels

MAX_ROWS = 2**31 - 1


def rows(confidence: ArrayLike, error: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    """Check confidence [N] and error [N] and give them the kernels' dtypes.

    Float32 confidence stays float32; everything else becomes float64, so no two floats become tied on the way
    (integers beyond 2**53 may).
    Errors that are all 0 or 1 become uint8 (exact integer arithmetic), other losses float64. Raises InputError for
    other shapes, no rows, NaN (naming the row), and errors outside [0, 1].
    """
    # Aligned as well: an array may look into somebody's buffer at any byte.
    scores = np.require(array("confidence", confidence), requirements=["C", "A"])
    if scores.dtype != np.float32:
        scores = np.require(scores, dtype=np.float64, requirements=["C", "A"])
    losses = np.require(array("error", error), requirements=["C", "A"])
    if losses.dtype != np.bool_:
        losses = np.require(losses, dtype=np.float64, requirements=["C", "A"])
    if scores.ndim != 1 or losses.shape != scores.shape:
        raise InputError(
            f"confidence and error must have one shape [N], got {list(scores.shape)} and {list(losses.shape)}; "
            "pass one value per row"
        )
    if not 1 <= scores.size <= MAX_ROWS:
        raise InputError(
            f"confidence must hold 1 to {MAX_ROWS} rows, got {scores.size}; a metric of no rows is undefined"
        )
    for name, values in (("confidence", scores), ("error", losses)):
        missing = np.isnan(values)
        if missing.any():
            raise InputError(f"{name} must not be NaN, got NaN at row {int(missing.argmax())}; drop or mend the row")
    if losses.dtype == np.bool_:
        return scores, losses.view(np.uint8)
    outside = (losses < 0) | (losses > 1)
    if outside.any():
        row = int(outside.argmax())
        raise InputError(f"error must be in [0, 1], got {losses[row]:g} at row {row}; scale the loss")
    binary = losses.astype(np.uint8)
    return scores, binary if np.array_equal(binary, losses) else losses


def cluster_numbers(groups: ArrayLike, n: int) -> NDArray[np.uint32]:
    """Number groups 0..G-1 in sorted order of their names, [N], so that row order does not matter."""
    return np.unique(names("groups", groups, n), return_inverse=True)[1].astype(np.uint32)


def order(confidence: ArrayLike, error: ArrayLike) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Rows by descending confidence, then error, then index, [N], and one past the last place of each tie group, [M].

    Arguments and errors as in ``rows``; the same order in either backend.
    """
    places: NDArray[np.uint32]
    tie_ends: NDArray[np.uint32]
    places, tie_ends = kernels().order(*rows(confidence, error))
    return places, tie_ends


def sweep(
    confidence: ArrayLike,
    error: ArrayLike,
    positive: NDArray[np.bool_] | None = None,
    predicted_positive: NDArray[np.bool_] | None = None,
) -> Swept:
    """Count what is accepted at every distinct threshold, from the highest down, [M] each.

    The threshold, then rows, errors (a float sum for losses), positives, false negatives, negatives and false
    positives; the last four are [0] without ``positive`` [N] and ``predicted_positive`` [N], which go together.
    """
    scores, losses = rows(confidence, error)
    answer: NDArray[np.uint8] = np.zeros(0, np.uint8)
    if positive is not None and predicted_positive is not None:
        answer = positive.view(np.uint8) | (predicted_positive.view(np.uint8) << np.uint8(1))
        if answer.shape != scores.shape:
            raise InputError(
                f"positive and predicted_positive must have shape {list(scores.shape)} as confidence, got "
                f"{list(answer.shape)}; pass one value per row"
            )
    return kernels().sweep(scores, losses, answer)  # type: ignore[no-any-return]


def search_dual(
    accepted: NDArray[np.int64],
    positives: NDArray[np.int64],
    *,
    exit_error: bool,
    max_fnr: Fraction,
    max_second: Fraction,
) -> tuple[int, int, int, int]:
    """Find the two thresholds of largest coverage under two constraints, as numbers of tie groups.

    Returns how many groups lie above the upper threshold and how many before the lower one, for the best pair and for
    the one with the smallest FNR within the second constraint; -1 where there is none.

    Args:
        accepted: [M + 1] rows in the first 0..M tie groups of descending score.
        positives: [M + 1] positives among them.
        exit_error: the second constraint is on exit error, not on FPR.
        max_fnr: in [0, 1).
        max_second: in [0, 1).
    """
    n = int(accepted[-1])
    # Shares of at most n rows compare alike with the next smaller fraction that n rows can have, and that fits 64 bits.
    fnr, second = floor_fraction(max_fnr, n), floor_fraction(max_second, n)
    cuts: tuple[int, int, int, int] = kernels().search_dual(
        accepted, positives, exit_error, fnr.numerator, fnr.denominator, second.numerator, second.denominator
    )
    return cuts


def floor_fraction(value: Fraction, limit: int) -> Fraction:
    """The largest fraction at most ``value`` whose denominator is at most ``limit``; 0 <= value, 1 <= limit."""
    near = value.limit_denominator(limit)
    if near <= value:
        return near
    # The next smaller fraction p / q: near.numerator * q - p * near.denominator = 1 with the largest q that is allowed.
    inverse = pow(near.numerator, -1, near.denominator)
    q = limit - (limit - inverse) % near.denominator
    return Fraction(near.numerator * q - 1, near.denominator * q)
