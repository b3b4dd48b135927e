"""Metrics of a selective classifier: how much is wrong among what it is sure of.

Everywhere: ``confidence`` [N] is higher where surer; ``error`` [N] is 0/1 or a loss in [0, 1]; a row is accepted iff
its confidence is at or above the threshold, so a tie group is never cut. Definitions after Traub et al., "Overcoming
Common Flaws in the Evaluation of Selective Classification Systems", NeurIPS 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro import native
from stage1_pro.arguments import binary, check_share, choice, floats, number, whole
from stage1_pro.errors import InputError
from stage1_pro.notebook import Shown

NanPolicy = Literal["raise", "propagate"]
# Shares that differ by rounding alone are the same share: 0.07 of 100 rows is 7 rows.
_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False, repr=False)
class RiskCoverage(Shown):
    """The risk-coverage curve: one point per distinct confidence, from the highest down; all arrays [M].

    ``coverage`` is the share accepted, ``selective_risk`` the mean error among the accepted, and
    ``generalized_risk`` the accepted errors over all rows: P(wrong and accepted).
    """

    threshold: NDArray[np.float64]
    coverage: NDArray[np.float64]
    selective_risk: NDArray[np.float64]
    generalized_risk: NDArray[np.float64]


@dataclass(frozen=True, repr=False)
class OperatingPoint(Shown):
    """One achievable threshold; with nothing accepted: threshold inf, coverage 0, selective risk NaN."""

    threshold: float
    coverage: float
    selective_risk: float


def relative_cost(exit_rate: ArrayLike, tap: int, n_blocks: int) -> NDArray[np.float64]:
    """The cascade's blocks over those of a full pass, in [k/L, 1]; lower is better. Its inverse is the ideal speed-up.

    k/L + (1 - exit rate)(1 - k/L): every row pays the blocks up to the tap, deferred ones the others as well.

    Args:
        exit_rate: share of rows that exit, in [0, 1]; any shape, which the result has too.
        tap: block k that Stage A ends with, 1..L.
        n_blocks: L.

    Raises:
        InputError: a tap that is none of the blocks, or rates outside [0, 1].
    """
    if not 1 <= whole("tap", tap, -(2**62)) <= whole("n_blocks", n_blocks):
        raise InputError(f"tap must be a block from 1 to {n_blocks}, got {tap}; count from 1")
    share, rates = tap / n_blocks, floats("exit_rate", exit_rate)
    if not ((rates >= 0) & (rates <= 1)).all():
        raise InputError("exit_rate must be in [0, 1], got others; it is a share of the rows")
    cost: NDArray[np.float64] = share + (1 - rates) * (1 - share)
    return cost


def cascade_risks(
    confidence: ArrayLike, error_a: ArrayLike, error_b: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Exit rate and risk of the cascade's answers at every threshold, from nobody exits to everybody: two arrays [M].

    Rows at or above a threshold are answered by Stage A, the others by Stage B; a tie group exits whole.

    Args:
        confidence: [N], N >= 1, what exits are decided by; higher exits first.
        error_a: [N] in [0, 1] of Stage A's answers.
        error_b: [N] of Stage B's.

    Raises:
        InputError: other lengths, NaN, or no row.
    """
    sure, first = native.rows(confidence, error_a)
    _, second = native.rows(confidence, error_b)
    order = np.argsort(-sure, kind="stable")
    ranked = sure[order]
    ends = np.append(np.flatnonzero(ranked[1:] < ranked[:-1]) + 1, ranked.size)
    exits = np.concatenate([[0], ends])
    before_a, before_b = (np.concatenate([[0.0], np.cumsum(e[order], dtype=np.float64)]) for e in (first, second))
    risk = (before_a[exits] + before_b[-1] - before_b[exits]) / ranked.size
    return exits / ranked.size, risk


def augrc(
    confidence: ArrayLike, error: ArrayLike, *, weights: ArrayLike | None = None, nan_policy: NanPolicy = "raise"
) -> float:
    """Area under the generalized-risk-coverage curve, in [e²/2, e − e²/2] for error rate e; lower is better.

    The trapezoid over distinct confidences from (0, 0), in the exact form Σ C_g (2 E_before + E_g) / (2 n²) over tie
    groups g of C_g rows and E_g errors: the same bits for any row order. It is not the integral of *selective* risk.

    Args:
        confidence: [N], higher is surer; infinities are allowed.
        error: [N], 0/1 or a loss in [0, 1].
        weights: [N], how much each row counts, finite and not negative; None = every row once.
        nan_policy: "raise" names the first NaN row; "propagate" returns NaN.

    Raises:
        InputError: wrong shape, no rows, a NaN, an error outside [0, 1], or weights that are negative or all 0.

    >>> augrc([0.9, 0.8, 0.7, 0.6], [0, 1, 0, 1])
    0.1875
    """
    if _propagates(confidence, error, nan_policy):
        return float("nan")
    if weights is None:
        return native.augrc(confidence, error)
    _, losses = native.rows(confidence, error)
    shares = check_weights(weights, losses.size)
    return float(weighted_augrc(shares, losses, *native.order(confidence, error)))


def weighted_augrc(
    weights: NDArray[np.float64], error: NDArray[Any], order: NDArray[np.uint32], ends: NDArray[np.uint32]
) -> NDArray[np.float64]:
    """``augrc`` of checked rows under many weights [..., N] at once, [...]; ``order`` and ``ends`` as of ``native``."""
    at = ends.astype(np.int64) - 1
    ranked = weights[..., order]
    rows = np.cumsum(ranked, axis=-1)[..., at]
    errors = np.cumsum(ranked * error[order], axis=-1)[..., at]
    both = errors.copy()
    both[..., 1:] += errors[..., :-1]
    area: NDArray[np.float64] = (np.diff(rows, prepend=0, axis=-1) * both).sum(axis=-1) / (2 * rows[..., -1] ** 2)
    return area


def aurc(confidence: ArrayLike, error: ArrayLike, *, nan_policy: NanPolicy = "raise") -> float:
    """Area under the selective-risk-coverage curve, in [0, 1]; lower is better. Prefer ``augrc``.

    The trapezoid over distinct confidences, with the risk of the highest one repeated down to coverage 0.
    Arguments and errors as in ``augrc``.
    """
    if _propagates(confidence, error, nan_policy):
        return float("nan")
    curve = risk_coverage(confidence, error)
    risk = np.concatenate([curve.selective_risk[:1], curve.selective_risk])
    return float(np.trapezoid(risk, np.concatenate([[0.0], curve.coverage])))


def risk_coverage(confidence: ArrayLike, error: ArrayLike) -> RiskCoverage:
    """Coverage and both risks at every distinct confidence; arguments and errors as in ``augrc``."""
    threshold, accepted, wrong, *_ = native.sweep(confidence, error)
    n = accepted[-1]
    return RiskCoverage(threshold, accepted / n, wrong / accepted, wrong / n)


def risk_at_coverage(confidence: ArrayLike, error: ArrayLike, coverage: float) -> OperatingPoint:
    """Selective risk at the smallest achievable coverage that is at least ``coverage``, in (0, 1].

    The returned point carries the coverage achieved: ties may force it above the one asked for.
    """
    check_share("coverage", coverage, most=True)
    curve = native.sweep(confidence, error)
    accepted = curve[1]
    return _point(curve, int(np.argmax(accepted >= coverage * int(accepted[-1]) * (1 - _ROUNDING))))


def coverage_at_risk(confidence: ArrayLike, error: ArrayLike, risk: float) -> OperatingPoint:
    """The largest achievable coverage whose selective risk is at most ``risk``, in [0, 1].

    Only achievable thresholds count; where none meets the risk, nothing is accepted (coverage 0).
    """
    if not 0 <= number("risk", risk) <= 1:
        raise InputError(f"risk must be in [0, 1], got {risk}; it is a mean error")
    curve = native.sweep(confidence, error)
    _, accepted, wrong, *_ = curve
    met = np.flatnonzero(wrong <= risk * accepted * (1 + _ROUNDING))
    if met.size == 0:
        return OperatingPoint(float("inf"), 0.0, float("nan"))
    return _point(curve, int(met[-1]))


def fnr_on_exited(positive: ArrayLike, predicted_positive: ArrayLike, exited: ArrayLike) -> float:
    """Exited positives answered negative over exited positives, in [0, 1], lower is better; NaN without any.

    All three are booleans [N]: the row is positive, Stage A answers positive, the row exits.
    """
    given = {"positive": positive, "predicted_positive": predicted_positive, "exited": exited}
    truth, answer, gone = (binary(name, values) for name, values in given.items())
    if truth.ndim != 1 or answer.shape != truth.shape or gone.shape != truth.shape:
        raise InputError(
            "positive, predicted_positive and exited must have one shape [N], got "
            f"{list(truth.shape)}, {list(answer.shape)} and {list(gone.shape)}; pass one value per row"
        )
    exited_positives = int((truth & gone).sum())
    missed = int((truth & gone & ~answer).sum())
    return missed / exited_positives if exited_positives else float("nan")


def _propagates(confidence: ArrayLike, error: ArrayLike, nan_policy: NanPolicy) -> bool:
    choice("nan_policy", nan_policy, ("raise", "propagate"))
    given = {"confidence": confidence, "error": error}
    return nan_policy == "propagate" and any(bool(np.isnan(floats(*one)).any()) for one in given.items())


def check_weights(weights: ArrayLike, n: int) -> NDArray[np.float64]:
    """Give weights [n] that are finite and not negative, one above 0 among them; InputError for others."""
    values = floats("weights", weights)
    if values.shape != (n,):
        raise InputError(f"weights must have shape [{n}], one per row, got {list(values.shape)}; give each row its own")
    wrong = ~np.isfinite(values) | (values < 0)
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(
            f"weights must be finite and not negative, got {values[row]:g} at row {row}; 0 leaves a row out"
        )
    if not values.any():
        raise InputError("weights must not all be 0, got no weight at all; a metric of no rows is undefined")
    return values


def _point(curve: tuple[NDArray[Any], ...], at: int) -> OperatingPoint:
    threshold, accepted, wrong, *_ = curve
    return OperatingPoint(float(threshold[at]), float(accepted[at] / accepted[-1]), float(wrong[at] / accepted[at]))
