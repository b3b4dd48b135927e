"""How well scores rank, beyond AUROC and AUGRC: average precision, FPR at a TPR, and what better ranking could gain."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro import native
from stage1_pro.arguments import check_share
from stage1_pro.metrics.probabilistic import scored
from stage1_pro.metrics.selective import augrc, aurc

_ROUNDING = 1e-12


def average_precision(score: ArrayLike, positive: ArrayLike) -> float:
    """Area under the precision-recall curve as a sum of steps, in (0, 1]; higher is better; NaN without a positive.

    Σ (R_g − R_g−1) P_g over distinct scores from the highest down: nothing is interpolated, a tie group is one step.
    The share of positives is what random scores give.

    Args:
        score: [N], higher is more positive.
        positive: [N] booleans.

    Raises:
        InputError: another shape, a NaN, or no row.
    """
    rows, hits = _through(score, positive)
    return float((np.diff(hits, prepend=0) * (hits / rows)).sum() / hits[-1]) if hits[-1] else float("nan")


def fpr_at_tpr(score: ArrayLike, positive: ArrayLike, tpr: float = 0.95) -> float:
    """The least share of negatives above a threshold that finds a share ``tpr`` of the positives, in [0, 1].

    Lower is better; thresholds are the scores themselves, so a tie group is never cut. NaN where one class is missing.
    FPR95 of the literature on foreign images is this at .95, the own images being the positives.

    Args:
        score: [N], higher is more positive.
        positive: [N] booleans.
        tpr: in (0, 1].

    Raises:
        InputError: as ``average_precision``; or a rate out of range.
    """
    check_share("tpr", tpr, most=True)
    rows, hits = _through(score, positive)
    n_positive, n_negative = int(hits[-1]), int(rows[-1] - hits[-1])
    if not n_positive or not n_negative:
        return float("nan")
    at = int(np.argmax(hits >= tpr * n_positive * (1 - _ROUNDING)))
    return float((rows[at] - hits[at]) / n_negative)


def auarc(confidence: ArrayLike, error: ArrayLike) -> float:
    """Area under the accuracy-rejection curve, in [0, 1]; higher is better.

    The mean over rejection rates of the accuracy among what is kept (Nadeem et al. 2009): 1 − AURC, exactly. Arguments
    and errors as in ``augrc``.
    """
    return 1 - aurc(confidence, error)


def excess_augrc(confidence: ArrayLike, error: ArrayLike) -> float:
    """AUGRC less that of a perfect ranking of the same errors, in [0, e (1 − e)] for 0/1 errors; lower is better.

    e-AUGRC = AUGRC − e²/2 for 0/1 errors of rate e, which is (1 − AUROC of right against wrong) e (1 − e): what another
    ranking could gain, whatever the accuracy is. Arguments and errors as in ``augrc``.
    """
    _, losses = native.rows(confidence, error)
    # An exact tie can differ by the rounding of two sums.
    return max(augrc(confidence, error) - augrc(-losses.astype(np.float64), losses), 0.0)


def excess_aurc(confidence: ArrayLike, error: ArrayLike) -> float:
    """AURC less that of a perfect ranking of the same errors without ties; 0 is perfect, lower is better.

    e-AURC of Geifman, Uziel and El-Yaniv (ICLR 2019), by the trapezoid of ``aurc``; for 0/1 errors of rate e the
    perfect AURC tends to e + (1 − e) ln(1 − e) as rows grow. A straight line through the wrong rows, where all of them
    are tied at the end, passes below the perfect curve: such scores get a little less than 0. Arguments and errors as
    in ``augrc``.
    """
    _, losses = native.rows(confidence, error)
    perfect: NDArray[np.float64] = np.sort(losses.astype(np.float64))
    return aurc(confidence, error) - aurc(-np.arange(losses.size), perfect)


def _through(score: ArrayLike, positive: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and positives at or above every distinct score, from the highest down, [M] each."""
    scores, truth = scored(score, positive)
    _, rows, hits, *_ = native.sweep(scores, truth)
    return rows, hits
