"""Platt scaling: P(correct) = sigmoid(a * logit + b). NumPy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, log_expit

from stage1_pro.arguments import array, floats
from stage1_pro.errors import InputError


@dataclass(frozen=True)
class Platt:
    """P(correct) = sigmoid(a * logit + b); ``fitted`` False: there was nothing to fit, and ``reason`` says why."""

    a: float
    b: float
    fitted: bool
    reason: str
    n: int


def fit_platt(logit: ArrayLike, correct: ArrayLike) -> Platt:
    """Fit P(correct) = sigmoid(a * logit + b) by maximum likelihood on Platt's targets; ``a`` > 0 keeps the order.

    The targets (N+ + 1)/(N+ + 2) and 1/(N- + 2) in place of 1 and 0 (Platt 1999) keep the optimum finite where the
    classes can be separated. Newton's method with step halving, on standardised logits. Rows whose logit is not finite
    are left out. With one class only, or logits all equal, there is nothing to fit: a = 1, b = 0, ``fitted`` False.

    Args:
        logit: [N] of the gate.
        correct: [N] of 0 and 1: whether Stage A's answer is right.

    Raises:
        InputError: another shape, or other values than 0 and 1.
    """
    values, right = floats("logit", logit), array("correct", correct)
    if values.ndim != 1 or right.shape != values.shape:
        raise InputError(
            f"logit and correct must both have shape [N], got {list(values.shape)} and {list(right.shape)}; "
            "give one of each per row"
        )
    if not np.isin(right, (0, 1)).all():
        raise InputError("correct must be 0 or 1, got other values; it is prediction == label")
    known = np.isfinite(values)
    values, right = values[known], right[known].astype(bool)
    n_right, n = int(right.sum()), right.size
    if n_right in (0, n):
        what = "no rows" if n == 0 else "only right answers" if n_right else "only wrong answers"
        return Platt(1.0, 0.0, False, f"{what} among the rows that fit it, so the gate's own sigmoid stands", n)
    center, spread = float(values.mean()), float(values.std())
    # Of equal numbers the mean rounds, and so do their differences from it.
    if not spread > 1e-12 * max(1.0, abs(center)):
        return Platt(
            1.0, 0.0, False, "all gate logits of the rows that fit it are equal, so the gate's own sigmoid stands", n
        )
    x = (values - center) / spread
    target = np.where(right, (n_right + 1) / (n_right + 2), 1 / (n - n_right + 2))
    slope, offset = 0.0, float(np.log((n_right + 1) / (n - n_right + 1)))

    def loss(slope: float, offset: float) -> float:
        z = slope * x + offset
        return float(-(target * log_expit(z) + (1 - target) * log_expit(-z)).sum())

    current = loss(slope, offset)
    for _ in range(100):
        p = expit(slope * x + offset)
        residual, weight = p - target, p * (1 - p)
        gradient = np.array([residual @ x, residual.sum()])
        hessian = np.array([[weight @ (x * x), weight @ x], [weight @ x, weight.sum()]]) + 1e-12 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while size > 1e-10 and loss(slope - size * step[0], offset - size * step[1]) > current:
            size /= 2
        slope, offset = slope - size * float(step[0]), offset - size * float(step[1])
        before, current = current, loss(slope, offset)
        if before - current <= 1e-13 * abs(current):
            break
    a = slope / spread
    if not a > 0:
        why = f"the gate's logit does not rise with being right on the rows that fit it (slope {a:.3g})"
        return Platt(1.0, 0.0, False, f"{why}, so its own sigmoid stands", n)
    said = f"Platt scaling on {n} rows that certify nothing, {n_right} answered rightly"
    return Platt(a, offset - a * center, True, said, n)


def score(gate_logits: ArrayLike, a: float, b: float) -> NDArray[np.float64]:
    """Give P(Stage A is correct) = sigmoid(a * gate_logit + b), [N] in [0, 1], float64; NaN where it is not finite."""
    values = floats("gate_logits", gate_logits)
    if values.ndim != 1:
        raise InputError(f"gate_logits must have shape [N], got {list(values.shape)}; give one per row")
    with np.errstate(invalid="ignore", over="ignore"):
        found: NDArray[np.float64] = np.where(np.isfinite(values), expit(a * values + b), np.nan)
    return found
