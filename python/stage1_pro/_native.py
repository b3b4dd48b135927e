"""The one door to compiled code: picks the backend once, checks shapes and dtypes, and names what is wrong.

``STAGE1_BACKEND=compiled`` or ``reference`` in the environment forces a backend; otherwise the compiled one is taken
when it is there. Both give the same bits.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from fractions import Fraction
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro import _reference
from stage1_pro.errors import DependencyError, InputError

Backend = Literal["compiled", "reference"]
MAX_ROWS = 2**31 - 1


def _load(wanted: str | None) -> tuple[ModuleType, Backend, str]:
    if wanted not in (None, "", "compiled", "reference"):
        raise InputError(f"STAGE1_BACKEND must be compiled or reference, got '{wanted}'; unset it to choose by itself")
    if wanted == "reference":
        return _reference, "reference", "the NumPy twin was asked for"
    try:
        core = importlib.import_module("stage1_pro._core")
    except ModuleNotFoundError as error:
        # Only the absence of _core itself is a choice of installation; anything else in it is a defect to be seen.
        if error.name != "stage1_pro._core":
            raise
        if wanted == "compiled":
            raise DependencyError(
                "stage1_pro._core is not built; with a C++20 compiler at hand, install again without STAGE1_PURE"
            ) from None
        return _reference, "reference", "stage1_pro._core is not built; NumPy computes the same, more slowly"
    return core, "compiled", f"stage1_pro._core {core.__version__}"


_kernels, _backend, _why = _load(os.environ.get("STAGE1_BACKEND"))


def backend() -> Backend:
    """Which kernels are in use."""
    return _backend


def why() -> str:
    """One line that says why, for ``stage1 doctor``."""
    return _why


@contextlib.contextmanager
def use(name: Backend) -> Iterator[None]:
    """Use one backend inside a ``with`` block (tests and benchmarks; not for use from several threads)."""
    global _kernels, _backend, _why
    before = _kernels, _backend, _why
    _kernels, _backend, _why = _load(name)
    try:
        yield
    finally:
        _kernels, _backend, _why = before


def rows(confidence: ArrayLike, error: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    """Check confidence [N] and error [N] and give them the kernels' dtypes.

    Float32 confidence stays float32; everything else becomes float64, so no two values become tied on the way.
    Errors that are all 0 or 1 become uint8 (exact integer arithmetic), other losses float64. Raises InputError for
    other shapes, no rows, NaN (naming the row), and errors outside [0, 1].
    """
    scores = np.ascontiguousarray(confidence)
    if scores.dtype != np.float32:
        scores = _floats("confidence", scores)
    losses = np.ascontiguousarray(error)
    if losses.dtype != np.bool_:
        losses = _floats("error", losses)
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


def _floats(name: str, values: NDArray[Any]) -> NDArray[np.float64]:
    if values.dtype.kind not in "biuf":
        raise InputError(f"{name} must be numbers, got an array of {values.dtype}; convert it first")
    return np.ascontiguousarray(values, dtype=np.float64)


def augrc(confidence: ArrayLike, error: ArrayLike) -> float:
    """AUGRC of checked rows: confidence [N], error [N] in [0, 1]."""
    return float(_kernels.augrc(*rows(confidence, error)))


def bootstrap_augrc(
    confidence: ArrayLike,
    error: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    n_replicates: int,
    seed: int = 0,
    threads: int = 0,
) -> NDArray[np.float64]:
    """AUGRC of resampled rows, or of resampled groups with all their rows, [n_replicates].

    The same (seed, replicate) gives the same bits for any number of threads, any row order and either backend.

    Args:
        confidence: [N], higher is surer.
        error: [N], 0/1 or a loss in [0, 1].
        groups: [N] names or numbers; None resamples rows.
        n_replicates: at least 1.
        seed: 0 to 2**64 - 1.
        threads: 0 = one per processor this process may use.
    """
    if n_replicates < 1:
        raise InputError(f"n_replicates must be at least 1, got {n_replicates}; 1000 is usual")
    if not 0 <= seed < 2**64:
        raise InputError(f"seed must be from 0 to 2**64 - 1, got {seed}; choose a non-negative number")
    if threads < 0:
        raise InputError(f"threads must be 0 or more, got {threads}; 0 takes every processor")
    scores, losses = rows(confidence, error)
    cluster = np.zeros(0, dtype=np.uint32)
    if groups is not None:
        cluster = cluster_numbers(groups, scores.size)
    n_clusters = int(cluster.max()) + 1 if cluster.size else 0
    replicates: NDArray[np.float64] = _kernels.bootstrap_augrc(
        scores, losses, cluster, n_clusters, n_replicates, seed, min(threads or _processors(), n_replicates)
    )
    return replicates


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cluster_numbers(groups: ArrayLike, n: int) -> NDArray[np.uint32]:
    """Number groups 0..G-1 in sorted order of their names, [N], so that row order does not matter."""
    names = np.asarray(groups)
    if names.shape != (n,):
        raise InputError(
            f"groups must have shape [{n}], one group per row, got {list(names.shape)}; pass one name per row"
        )
    return np.unique(names, return_inverse=True)[1].astype(np.uint32)


def order(confidence: ArrayLike, error: ArrayLike) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Rows by descending confidence, then error, then index, [N], and one past the last place of each tie group, [M].

    Arguments and errors as in ``rows``; the same order in either backend.
    """
    places: NDArray[np.uint32]
    tie_ends: NDArray[np.uint32]
    places, tie_ends = _kernels.order(*rows(confidence, error))
    return places, tie_ends


def sweep(
    confidence: ArrayLike,
    error: ArrayLike,
    positive: NDArray[np.bool_] | None = None,
    predicted_positive: NDArray[np.bool_] | None = None,
) -> tuple[
    NDArray[np.float64],
    NDArray[np.int64],
    NDArray[Any],
    NDArray[np.int64],
    NDArray[np.int64],
    NDArray[np.int64],
    NDArray[np.int64],
]:
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
    return _kernels.sweep(scores, losses, answer)  # type: ignore[no-any-return]


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
    cuts: tuple[int, int, int, int] = _kernels.search_dual(
        accepted, positives, exit_error, fnr.numerator, fnr.denominator, second.numerator, second.denominator
    )
    return cuts


def floor_fraction(value: Fraction, limit: int) -> Fraction:
    """The largest fraction at most ``value`` whose denominator is at most ``limit``; 0 <= value, 1 <= limit."""
    if value.denominator <= limit:
        return value
    # Continued fraction: the last convergent that fits and the last semiconvergent stand on either side of the value.
    (p, q), (next_p, next_q) = (0, 1), (1, 0)
    numerator, denominator = value.numerator, value.denominator
    while True:
        step, rest = divmod(numerator, denominator)
        if q + step * next_q > limit:
            break
        (p, q), (next_p, next_q) = (next_p, next_q), (p + step * next_p, q + step * next_q)
        numerator, denominator = denominator, rest
    steps = (limit - q) // next_q
    sides = Fraction(next_p, next_q), Fraction(p + steps * next_p, q + steps * next_q)
    return max(side for side in sides if side <= value)
