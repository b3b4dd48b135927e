"""Intervals on metrics: bootstrap by row or by group, and exact binomial bounds. NumPy in, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv, ndtr, ndtri

from stage1_pro import _native
from stage1_pro.errors import InputError

Method = Literal["bca", "percentile"]
# Below this the bootstrap's coverage falls under its level whatever the construction (BCa: .79 at two errors of 200).
FEW_ERRORS = 10
FEW_GROUPS = 10


@dataclass(frozen=True)
class Interval:
    """A value with its standard error and interval; NaN where there is none, and then ``note`` says why.

    ``method`` is "bca", "percentile", "clopper-pearson" or "none". ``note`` is empty or a caution to show with the
    interval. ``replicates`` [B] is what the interval was cut from.
    """

    value: float
    std: float
    low: float
    high: float
    level: float = 0.95
    method: str = "bca"
    note: str = ""
    replicates: NDArray[np.float64] = field(default_factory=lambda: np.empty(0), repr=False, compare=False)


def bootstrap_augrc(
    confidence: ArrayLike,
    error: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    n_replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    threads: int = 0,
    method: Method = "bca",
) -> Interval:
    """AUGRC with its bootstrap interval; the same bits for a seed, whatever the threads or the order of the rows.

    With ``groups`` whole groups are resampled: rows of one clip are near-copies, and intervals that take them for
    independent are far too narrow. BCa (Efron 1987) takes its acceleration from the closed-form jackknife.

    Stated answers: no error at all, or nothing but errors: a bound from Clopper-Pearson over rows (or groups) and the
    attainable AUGRC at that error rate, never [0, 0]. One group, or replicates that are all equal: NaN.

    Args:
        confidence: [N], higher is surer.
        error: [N], 0/1 or a loss in [0, 1].
        groups: [N] names or numbers of the independent units; None = every row is one.
        n_replicates: resamples.
        level: nominal coverage, in (0, 1).
        seed: of the resamples.
        threads: 0 = one per processor.
        method: "bca", or "percentile".

    Raises:
        InputError: as ``augrc``, and for arguments out of range.
    """
    _check_level(level)
    if method not in ("bca", "percentile"):
        raise InputError(f"method must be bca or percentile, got '{method}'; bca is the better one for AUGRC")
    scores, losses = _native.rows(confidence, error)
    value = _native.augrc(scores, losses)
    replicates = _native.bootstrap_augrc(scores, losses, groups, n_replicates=n_replicates, seed=seed, threads=threads)
    cluster = None if groups is None else _native.cluster_numbers(groups, scores.size)
    units = scores.size if cluster is None else int(cluster.max()) + 1
    kind = "rows" if cluster is None else "groups"
    if losses.max() == 0 or losses.min() == 1:
        return _degenerate(value, bool(losses.max() == 0), units, kind, level, replicates)
    if units == 1 or replicates.min() == replicates.max():
        reason = f"1 {kind[:-1]} cannot be resampled" if units == 1 else "all replicates are equal"
        nan = float("nan")
        return Interval(value, nan, nan, nan, level, "none", f"no interval: {reason}", replicates)
    tails = (1 - level) / 2, (1 + level) / 2
    if method == "bca":
        left_out = leave_one_out_augrc(scores, losses, cluster)
        tails = _bca_tails(value, replicates, left_out, tails)
    low, high = np.quantile(replicates, tails)
    return Interval(
        value,
        float(replicates.std(ddof=1)) if n_replicates > 1 else float("nan"),
        float(low),
        float(high),
        level,
        method,
        _caution(losses, cluster, units),
        replicates,
    )


def leave_one_out_augrc(
    confidence: NDArray[Any], error: NDArray[Any], cluster: NDArray[np.uint32] | None = None
) -> NDArray[np.float64]:
    """AUGRC without row i, [N], or without cluster i, [G], all in closed form after one sort.

    2n²·AUGRC is a sum over ordered pairs of rows, so leaving rows out subtracts their share as accepted rows, their
    share as errors, and adds back the pairs counted twice.
    """
    n = confidence.size
    _, place, tied = np.unique(-confidence, return_inverse=True, return_counts=True)
    errors = np.bincount(place, weights=error)
    errors_through, rows_through = np.cumsum(errors), np.cumsum(tied)
    as_row = (2 * errors_through - errors)[place]
    as_error = error * (2 * (n - rows_through) + tied)[place]
    if cluster is None:
        sizes: NDArray[Any] = np.ones(n)
        share, inside = as_row + as_error, error
    else:
        sizes = np.bincount(cluster)
        share = np.bincount(cluster, weights=as_row + as_error)
        inside = _pairs_inside(place, error, cluster)
    return np.asarray((as_row.sum() - share + inside) / (2.0 * (n - sizes) ** 2), dtype=np.float64)


def _pairs_inside(place: NDArray[np.intp], error: NDArray[Any], cluster: NDArray[np.uint32]) -> NDArray[np.float64]:
    """2n²·AUGRC of each cluster's own rows, [G]; ``place`` [N] is the rank of a row's tie group."""
    order = np.lexsort((place, cluster))
    owner, rank, wrong = cluster[order], place[order], error[order].astype(np.float64)
    starts = np.flatnonzero(np.append(True, (owner[1:] != owner[:-1]) | (rank[1:] != rank[:-1])))
    rows = np.diff(np.append(starts, owner.size))
    errors, tie_owner = np.add.reduceat(wrong, starts), owner[starts]
    through = np.cumsum(errors)
    before_owner = (through - errors)[np.searchsorted(tie_owner, np.arange(int(owner[-1]) + 1))]
    pairs = rows * (2 * (through - before_owner[tie_owner]) - errors)
    return np.asarray(np.bincount(tie_owner, weights=pairs), dtype=np.float64)


def clopper_pearson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval of a share of ``k`` in ``n`` independent trials; n = 0 gives (0, 1)."""
    _check_level(level)
    tail = (1 + level) / 2
    return clopper_pearson_lower(k, n, tail), clopper_pearson_upper(k, n, tail)


def clopper_pearson_upper(k: int, n: int, level: float = 0.95) -> float:
    """The exact one-sided upper bound of a share of ``k`` in ``n`` independent trials, in [0, 1]; n = 0 gives 1."""
    _check_counts(k, n, level)
    return 1.0 if k == n else float(betaincinv(k + 1, n - k, level))


def clopper_pearson_lower(k: int, n: int, level: float = 0.95) -> float:
    """The exact one-sided lower bound of a share of ``k`` in ``n`` independent trials, in [0, 1]; n = 0 gives 0."""
    _check_counts(k, n, level)
    return 0.0 if k == 0 else float(betaincinv(k, n - k + 1, 1 - level))


def _degenerate(
    value: float, right: bool, units: int, kind: str, level: float, replicates: NDArray[np.float64]
) -> Interval:
    """Bound AUGRC by the error rates that the absence (or ubiquity) of errors allows: e²/2 ≤ AUGRC ≤ e − e²/2."""
    lowest, highest = clopper_pearson(0 if right else units, units, level)
    return Interval(
        value,
        float("nan"),
        lowest**2 / 2,
        highest - highest**2 / 2,
        level,
        "clopper-pearson",
        f"{'no' if right else 'nothing but'} errors in {units} {kind}: a bound from Clopper-Pearson, not a bootstrap",
        replicates,
    )


def _bca_tails(
    value: float, replicates: NDArray[np.float64], left_out: NDArray[np.float64], tails: tuple[float, float]
) -> tuple[float, float]:
    """Shift the two tail probabilities for bias and skewness (Efron 1987)."""
    n = replicates.size
    below = (np.count_nonzero(replicates < value) + np.count_nonzero(replicates <= value)) / (2 * n)
    # A value outside all its replicates has no finite normal score; half a replicate is as far as they can tell.
    bias = float(ndtri(min(max(below, 0.5 / n), 1 - 0.5 / n)))
    influence = left_out.mean() - left_out
    spread = float((influence**2).sum())
    acceleration = float((influence**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0

    def shift(tail: float) -> float:
        score = bias + float(ndtri(tail))
        scale = 1 - acceleration * score
        return float(ndtr(bias + score / scale)) if scale > 0 else float(score > 0)

    return shift(tails[0]), shift(tails[1])


def _caution(losses: NDArray[Any], cluster: NDArray[np.uint32] | None, units: int) -> str:
    wrong = losses > 0
    notes = []
    few = int(np.count_nonzero(wrong)) if cluster is None else int(np.unique(cluster[wrong]).size)
    if few < FEW_ERRORS:
        notes.append(f"only {few} {'rows' if cluster is None else 'groups'} with errors")
    if cluster is not None and units < FEW_GROUPS:
        notes.append(f"only {units} groups")
    return f"{' and '.join(notes)}: the interval covers less often than its level" if notes else ""


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise InputError(f"level must be in (0, 1), got {level}; 0.95 is usual")


def _check_counts(k: int, n: int, level: float) -> None:
    _check_level(level)
    if not 0 <= k <= n or math.isnan(k):
        raise InputError(f"k must be from 0 to n, got k = {k}, n = {n}; k counts among the n trials")
