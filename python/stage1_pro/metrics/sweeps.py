"""Every threshold at once: rates at each distinct confidence, and the best two thresholds under two constraints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro import native
from stage1_pro.arguments import Grid, binary, grid_of, indices, number, on_grid, whole
from stage1_pro.errors import InputError, NotReachableError
from stage1_pro.notebook import Shown


@dataclass(frozen=True, eq=False, repr=False)
class Sweep(Shown):
    """Rates and counts among accepted rows, one point per distinct confidence, from the highest down; arrays [M].

    ``fnr`` is false negatives over accepted positives, ``fpr`` false positives over accepted negatives; both are NaN
    where there are none, and everywhere without labels. ``n_errors`` is a float sum for losses. The counts of positives
    and negatives are None without labels.
    """

    threshold: NDArray[np.float64]
    coverage: NDArray[np.float64]
    selective_risk: NDArray[np.float64]
    generalized_risk: NDArray[np.float64]
    fnr: NDArray[np.float64]
    fpr: NDArray[np.float64]
    n_accepted: NDArray[np.int64]
    n_errors: NDArray[Any]
    n_positive: NDArray[np.int64] | None
    n_false_negative: NDArray[np.int64] | None
    n_negative: NDArray[np.int64] | None
    n_false_positive: NDArray[np.int64] | None


@dataclass(frozen=True, repr=False)
class DualThreshold(Shown):
    """Two thresholds on P(positive): exit as positive iff score >= upper, as negative iff score <= lower.

    ``coverage`` is the share of rows that exit. Among exits, ``fnr`` is positives answered negative over positives,
    ``fpr`` negatives answered positive over negatives (NaN without any), ``exit_error`` wrong over exited; lower is
    better. ``upper`` is inf where nothing may exit as positive, ``lower`` -inf where nothing may exit as negative.
    """

    lower: float
    upper: float
    coverage: float
    fnr: float
    fpr: float
    exit_error: float
    n_rows: int
    n_exited: int
    n_positive: int
    n_false_negative: int
    n_negative: int
    n_false_positive: int


def sweep(
    confidence: ArrayLike,
    error: ArrayLike,
    labels: ArrayLike | None = None,
    predicted: ArrayLike | None = None,
    positive: int = 1,
) -> Sweep:
    """Coverage, risks (lower is better), FNR and FPR on accepted rows at every distinct threshold, all in [0, 1].

    A row is accepted iff its confidence is at or above the threshold, so a tie group is never cut.

    Args:
        confidence: [N], higher is surer; infinities are allowed.
        error: [N], 0/1 or a loss in [0, 1].
        labels: [N] class indices; without them there is no FNR and no FPR.
        predicted: [N] class indices; not needed for labels of 0 and 1 with 0/1 errors, where a wrong answer is the
            other class.
        positive: index of the positive class.

    Raises:
        InputError: wrong shape, no rows, a NaN, an error outside [0, 1], or answers that cannot be told from errors.

    >>> sweep([0.9, 0.8, 0.8, 0.6], [0, 1, 0, 1]).selective_risk.tolist()
    [0.0, 0.3333333333333333, 0.5]
    """
    scores, losses = native.rows(confidence, error)
    truth = answer = None
    if labels is not None:
        truth, answer = _answers(labels, predicted, losses, positive)
    elif predicted is not None:
        raise InputError("labels must be given with predicted, got None; FNR and FPR compare the two")
    threshold, accepted, errors, *of_classes = native.sweep(scores, losses, truth, answer)
    positives, missed, negatives, alarms = of_classes
    n, known, fnr = scores.size, truth is not None, np.full(accepted.size, np.nan)
    fpr = fnr
    if known:
        with np.errstate(invalid="ignore"):
            fnr, fpr = missed / positives, alarms / negatives
    return Sweep(
        threshold=threshold,
        coverage=accepted / n,
        selective_risk=errors / accepted,
        generalized_risk=errors / n,
        fnr=fnr,
        fpr=fpr,
        n_accepted=accepted,
        n_errors=errors,
        n_positive=positives if known else None,
        n_false_negative=missed if known else None,
        n_negative=negatives if known else None,
        n_false_positive=alarms if known else None,
    )


def dual_threshold(
    score: ArrayLike,
    positive: ArrayLike,
    *,
    max_fnr: float,
    max_fpr: float | None = None,
    max_exit_error: float | None = None,
) -> DualThreshold:
    """The two thresholds of largest coverage, in (0, 1], with FNR on exits and a second rate within their limits.

    The best of all pairs, in exact integers; of equal coverage the one with the fewest wrong exits, then the fewest
    missed positives. A rate of no rows is undefined and does not meet its limit. The choice is empirical: it promises
    nothing for new rows. Thresholds lie far from every row, so that rounding flips none: in the middle of the gap
    beside the last exit, or a third into a gap that both share. A tie group is never cut.

    Args:
        score: [N] P(positive), in [0, 1].
        positive: [N] booleans or 0/1.
        max_fnr: exited positives answered negative / exited positives; in [0, 1), read as the decimal it is written as.
        max_fpr: exited negatives answered positive / exited negatives; in [0, 1).
        max_exit_error: wrong exits / exits; in [0, 1). Exactly one of the two must be given: under FNR alone a lower
            upper threshold adds true positives and coverage until everything exits.

    Raises:
        InputError: an argument is not what it must be; NaN names its row.
        NotReachableError: no pair meets both limits; the message names the nearest.
    """
    truth = binary("positive", positive)
    scores, found = native.rows(score, truth)
    outside = (scores < 0) | (scores > 1)
    if outside.any():
        row = int(outside.argmax())
        raise InputError(f"score must be in [0, 1], got {scores[row]:g} at row {row}; pass the positive's probability")
    if (max_fpr is None) == (max_exit_error is None):
        both = "neither" if max_fpr is None else "both"
        raise InputError(
            f"max_fpr or max_exit_error must be given, one of the two, got {both}; max_fnr alone is met by answering "
            "positive everywhere"
        )
    name, limit = ("max_fpr", max_fpr) if max_exit_error is None else ("max_exit_error", max_exit_error)
    assert limit is not None
    targets = {"max_fnr": max_fnr, name: limit}
    for target, value in targets.items():
        if not 0 <= number(target, value) < 1:
            raise InputError(f"{target} must be in [0, 1), got {value}; 0.02 is usual")
    values, accepted, positives, *_ = native.sweep(scores, found)
    accepted, positives = np.append(0, accepted), np.append(0, positives)
    upper, lower, *nearest = native.search_dual(
        accepted,
        positives,
        exit_error=max_exit_error is not None,
        max_fnr=Fraction(repr(float(max_fnr))),
        max_second=Fraction(repr(float(limit))),
    )
    if upper < 0:
        raise NotReachableError(_why_not(targets, accepted, positives, *nearest))
    chosen = _count(scores, truth, *_place(values, upper, lower, grid_of(score)))
    if chosen.n_exited != accepted[upper] + accepted[-1] - accepted[lower]:
        raise AssertionError("the thresholds do not decide as the search did")
    return chosen


def _answers(
    labels: ArrayLike, predicted: ArrayLike | None, losses: NDArray[Any], positive: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which rows are positive and which are answered positive, [N] each."""
    truth = indices("labels", labels, losses.size, like="confidence")
    whole("positive", positive, -(2**62))
    is_positive = np.ascontiguousarray(truth == positive)
    if predicted is not None:
        answered = indices("predicted", predicted, losses.size, like="confidence")
        return is_positive, np.ascontiguousarray(answered == positive)
    if losses.dtype != np.uint8:
        raise InputError("predicted must be given when error holds losses, got None; a loss does not tell the answer")
    other = (truth < 0) | (truth > 1)
    if other.any() or positive not in (0, 1):
        what = f"label {truth[other.argmax()]} at row {int(other.argmax())}" if other.any() else f"positive {positive}"
        raise InputError(
            f"predicted must be given unless the classes are 0 and 1, got {what}; a wrong answer can be any other class"
        )
    return is_positive, is_positive ^ losses.view(np.bool_)


def _place(values: NDArray[np.float64], upper: int, lower: int, grid: Grid) -> tuple[float, float]:
    """Thresholds (lower, upper) that exit the first ``upper`` groups as positive and those from ``lower`` as negative.

    Both are numbers of the scores' dtype: comparing with such scores rounds nothing. The caller's ``lower`` is not 0.
    """

    def between(low: float, high: float, share: float, otherwise: float) -> float:
        found = float(on_grid(low + share * (high - low), grid))
        return found if low < found < high else otherwise

    if upper == lower < values.size:
        high, low = float(values[upper - 1]), float(values[upper])
        below, above = between(low, high, 1 / 3, low), between(low, high, 2 / 3, high)
        # Neighbouring floats have no numbers between them; the thresholds are then the scores themselves.
        return (below, above) if low < below < above < high else (low, high)
    below, above = -math.inf, math.inf
    if lower < values.size:
        low = float(values[lower])
        below = between(low, float(values[lower - 1]), 1 / 2, low)
    if upper > 0:
        high = float(values[upper - 1])
        above = between(float(values[upper]) if upper < values.size else 0.0, high, 1 / 2, high)
    return below, above


def _count(scores: NDArray[Any], truth: NDArray[np.bool_], lower: float, upper: float) -> DualThreshold:
    as_positive, as_negative = scores >= upper, scores <= lower
    missed, alarms = int((as_negative & truth).sum()), int((as_positive & ~truth).sum())
    positives, negatives = int((as_positive & truth).sum()) + missed, int((as_negative & ~truth).sum()) + alarms
    exited = positives + negatives
    return DualThreshold(
        lower=lower,
        upper=upper,
        coverage=exited / scores.size,
        fnr=missed / positives if positives else math.nan,
        fpr=alarms / negatives if negatives else math.nan,
        exit_error=(missed + alarms) / exited,
        n_rows=scores.size,
        n_exited=exited,
        n_positive=positives,
        n_false_negative=missed,
        n_negative=negatives,
        n_false_positive=alarms,
    )


def _why_not(
    targets: dict[str, float], accepted: NDArray[np.int64], positives: NDArray[np.int64], upper: int, lower: int
) -> str:
    """The message of NotReachableError: the smallest FNR within the second limit, or the smallest second rate."""
    (_, max_fnr), (name, limit) = targets.items()
    wish = f"max_fnr {max_fnr:g} with {name} {limit:g} must be reachable on these rows, but"
    n, found = int(accepted[-1]), int(positives[-1])
    if found == 0:
        return f"{wish} none of the {n} rows is positive, so FNR on exits is undefined; bring rows that hold positives"
    if upper >= 0:
        missed, below = found - int(positives[lower]), n - int(accepted[lower])
        exited = int(positives[upper]) + missed
        return (
            f"{wish} with {name} {limit:g} the smallest FNR on exits is {missed / exited:.4g}, with coverage "
            f"{(int(accepted[upper]) + below) / n:.4g}: {missed} of {exited} exited positives are answered negative. "
            "Train a better model, bring more rows, or accept larger limits"
        )
    if name == "max_fpr":
        return f"{wish} none of the {n} rows is negative, so FPR on exits is undefined; bring rows that hold negatives"
    # The error of two-sided exits is a mediant of the two sides' errors, so one side alone has the smallest.
    as_positive = (accepted - positives)[1:] / accepted[1:]
    as_negative = (found - positives)[:-1] / (n - accepted)[:-1]
    smallest = min(as_positive.min(), as_negative.min())
    return (
        f"{wish} the smallest exit error of any two thresholds is {smallest:.4g}, and with an exited positive none is "
        f"within {limit:g}. Train a better model, or accept larger limits"
    )
