"""The gate exit policy: Stage A answers when the gate's calibrated P(Stage A is correct) is at or above a threshold.

NumPy only. An image exits iff ``sigmoid(a * gate_logit + b) >= threshold``, computed in float64 by ``score`` alone, in
calibration, evaluation and the cascade. ``a`` and ``b`` are Platt's, from the fit half of ``val_calib``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from scipy.special import expit, log_expit

from stage1_pro.errors import InputError, NotReachableError, nearest
from stage1_pro.metrics.binomial import clopper_pearson_upper
from stage1_pro.native import sweep
from stage1_pro.policies.base import BasePolicy
from stage1_pro.policies.candidates import Risk
from stage1_pro.policies.certificate import CertificateRecord, SweepRow
from stage1_pro.policies.certify import Certificate, certify_halves, check_halves, groups_in_error, infeasible, record
from stage1_pro.policies.softmax import (
    BOUND_LEVEL,
    ExitCounts,
    assumed,
    certified_bound,
    check_rows,
    count_exits_by,
    meets,
    sweep_table,
)
from stage1_pro.policies.target import Gate
from stage1_pro.record import Record


class GateConstraints(Record):
    """What the gate policy was asked for; all at once, at one threshold."""

    min_coverage: float = Field(gt=0, lt=1)
    max_exit_error: float = Field(gt=0, lt=1)
    target_fnr_exit: float | None = Field(default=None, gt=0, lt=1, description="null = not asked for")


class GateParams(BasePolicy):
    """``gateparams.json``: the gate exit policy.

    An image exits at Stage A iff ``sigmoid(a * gate_logit + b)``, in float64, is at or above ``threshold``. Rates and
    counts are those of the calibration rows (with ``ltt`` of their certify half); ``a`` and ``b`` come from the fit
    half.
    """

    format_version: Literal[1] = 1
    policy: Literal["gate"] = "gate"
    classes: list[str] = Field(min_length=2)
    positive: str
    a: float
    b: float
    fitted: bool = Field(description="false: Platt scaling was impossible, a = 1 and b = 0 stand in; see platt")
    platt: str = Field(description="how a and b came about")
    threshold: float = Field(ge=0, le=1)
    coverage: float = Field(ge=0, le=1)
    exit_error: float = Field(ge=0, le=1)
    fnr_on_exited: float | None = Field(ge=0, le=1, description="null when no positive exits")
    constraints: GateConstraints
    guarantee: Literal["none", "ltt"]
    certificate: CertificateRecord | None = Field(description="null with guarantee none")
    certify_uses: int | None = Field(description="claims on the certify half so far, with this one; null: not counted")
    statement: str
    exit_error_upper_bound: float = Field(ge=0, le=1)
    fnr_upper_bound: float | None = Field(ge=0, le=1, description="null when no positive exits, or none was asked for")
    bound_level: float = Field(gt=0, lt=1)
    bound_method: str
    n_rows: int
    n_exited: int
    n_errors: int
    n_positive_exited: int
    n_false_negative: int
    n_exited_groups: int
    n_positive_groups: int
    n_fit_rows: int = Field(description="rows that Platt scaling saw")
    grouped: bool
    sweep_results: list[SweepRow]
    split_hashes: dict[str, str]
    model_fingerprint: str | None = None
    preprocessing_fingerprint: str | None = None

    @property
    def exit_threshold(self) -> float:
        """The threshold under the name that every policy has."""
        return self.threshold

    @property
    def target_fnr(self) -> float | None:
        """The wished FNR on exits; None when it was not asked for."""
        return self.constraints.target_fnr_exit

    @property
    def target(self) -> Gate:
        """What it was asked for; delta is that of its own claim."""
        claim = {} if self.certificate is None else {"delta": self.certificate.delta}
        limits = self.constraints
        return Gate(
            max_exit_error=limits.max_exit_error, min_coverage=limits.min_coverage, target_fnr=limits.target_fnr_exit,
            guarantee=self.guarantee, **claim,
        )  # fmt: skip

    def _stricter(self, threshold: float, statement: str) -> Self:
        changed = {"threshold": threshold, "guarantee": "none", "certificate": None, "statement": statement}
        return self.model_copy(update=changed)


GRID = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)


# --------------------------------------------------------------------------------------------
# Platt scaling


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
    values, right = np.asarray(logit, dtype=np.float64), np.asarray(correct)
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
        return Platt(1.0, 0.0, False, f"{what} in the fit half, so the gate's own sigmoid stands", n)
    center, spread = float(values.mean()), float(values.std())
    # Of equal numbers the mean rounds, and so do their differences from it.
    if not spread > 1e-12 * max(1.0, abs(center)):
        return Platt(1.0, 0.0, False, "all gate logits of the fit half are equal, so the gate's own sigmoid stands", n)
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
        return Platt(
            1.0, 0.0, False,
            f"the gate's logit does not rise with being right on the fit half (slope {a:.3g}), so its own sigmoid "
            "stands", n,
        )  # fmt: skip
    return Platt(
        a, offset - a * center, True, f"Platt scaling on {n} rows of the fit half, {n_right} answered rightly", n
    )


def score(gate_logits: ArrayLike, a: float, b: float) -> NDArray[np.float64]:
    """Give P(Stage A is correct) = sigmoid(a * gate_logit + b), [N] in [0, 1], float64; NaN where it is not finite."""
    values = np.asarray(gate_logits, dtype=np.float64)
    if values.ndim != 1:
        raise InputError(f"gate_logits must have shape [N], got {list(values.shape)}; give one per row")
    with np.errstate(invalid="ignore", over="ignore"):
        found: NDArray[np.float64] = np.where(np.isfinite(values), expit(a * values + b), np.nan)
    return found


# --------------------------------------------------------------------------------------------
# The choice


def fit_gate_policy(
    probs: ArrayLike,
    gate_logits: ArrayLike,
    labels: ArrayLike,
    *,
    halves: ArrayLike,
    classes: Sequence[str],
    positive: str,
    max_exit_error: float = 0.01,
    min_coverage: float = 0.70,
    target_fnr: float | None = None,
    guarantee: Literal["none", "ltt"] = "ltt",
    delta: float = 0.05,
    claims: int = 1,
    use: int | None = None,
    groups: ArrayLike | None = None,
    split_hashes: Mapping[str, str] | None = None,
    model_fingerprint: str | None = None,
    preprocessing_fingerprint: str | None = None,
) -> GateParams:
    """Choose the gate's threshold of largest coverage under all constraints at once, certified or empirically.

    Coverage at least ``min_coverage``, exit error P(wrong | exit) at most ``max_exit_error`` and, when asked for, FNR
    on exits at most ``target_fnr``. ``ltt``: candidates and their order come from the fit half, the certify half tests
    them in a fixed sequence by exact binomials, by group, and the record's figures are the certify half's. ``none``:
    the choice is the best on all rows, compared in exact integers, and promises nothing. Platt scaling sees the fit
    half alone either way.

    Args:
        probs: [N, K] probabilities of Stage A, N >= 1.
        gate_logits: [N]; a row whose logit is not finite never exits.
        labels: [N] indices into ``classes``.
        halves: [N] of ``fit`` and ``certify``.
        classes: K names, K >= 2.
        positive: name of the positive class.
        max_exit_error: inside (0, 1).
        min_coverage: inside (0, 1).
        target_fnr: inside (0, 1), or None.
        guarantee: ``ltt`` or ``none``.
        delta: largest chance of a false certificate, all claims together; each gets ``delta / claims``.
        claims: how many claims on the certify half were declared before the first.
        use: which of them this is, for the record; None when nobody counts.
        groups: [N] clip or track of every row; the unit. ``None``: rows are independent.
        split_hashes: which rows these are, for the record.
        model_fingerprint: which model gave the logits.
        preprocessing_fingerprint: how its pixels were prepared.

    Raises:
        InputError: an argument is not what it must be.
        NotReachableError: no threshold meets the constraints, or none can be certified; nothing is chosen instead.
    """
    names = [str(name) for name in classes]
    values, truth, units = check_rows(probs, labels, groups, names)
    if positive not in names:
        raise InputError(f"positive must be one of {', '.join(names)}, got '{positive}'{nearest(positive, names)}")
    wish = {"max_exit_error": max_exit_error, "min_coverage": min_coverage, "target_fnr": target_fnr}
    for name, value in wish.items():
        if value is not None and not 0 < value < 1:
            raise InputError(f"{name} must be inside (0, 1), got {value}")
    if guarantee not in ("none", "ltt"):
        raise InputError(f"guarantee must be none or ltt, got '{guarantee}'")
    fit = check_halves(halves, truth.size, units)
    logits = np.asarray(gate_logits, dtype=np.float64)
    if logits.shape != truth.shape:
        raise InputError(f"gate_logits must have shape [{truth.size}] as probs has rows, got {list(logits.shape)}")
    constraints = GateConstraints(min_coverage=min_coverage, max_exit_error=max_exit_error, target_fnr_exit=target_fnr)
    index = names.index(positive)
    platt = fit_platt(logits[fit], values[fit].argmax(axis=1) == truth[fit])
    sure = score(logits, platt.a, platt.b)
    certificate = None
    if guarantee == "ltt":
        certificate = _certify(sure, values, truth, units, index, constraints, halves, delta / claims)
        assert certificate.threshold is not None
        values, truth, sure = values[~fit], truth[~fit], sure[~fit]
        units = None if units is None else units[~fit]
        counts = count_exits_by(sure, values, truth, index, [certificate.threshold], lowest=0.0)
        chosen = 0
    else:
        counts, chosen = _best(sure, values, truth, index, constraints)
    row = counts.row(chosen, truth.size, grid=False)
    exited = sure >= row.threshold
    if int(exited.sum()) != row.n_exited:
        raise AssertionError("the stored threshold does not decide as the sweep did")
    wrong = values.argmax(axis=1) != truth
    over = {name: _groups(wrong, rows, units) for name, rows in (("error", exited), ("fnr", exited & (truth == index)))}
    n_errors = row.n_exited - int(counts.n_correct[chosen])
    unit = "rows" if units is None else "groups"
    if certificate is None:
        fnr_bound: float | None = over["fnr"][2]
        level, bound = BOUND_LEVEL, over["error"][2]
        statement = (
            f"Empirical choice, no guarantee: nothing is promised for new images. Of {truth.size} calibration rows "
            f"{row.n_exited} exit ({over['error'][1]} {unit}, taken as independent) and {n_errors} of those are wrong. "
            f"The threshold was chosen on the same rows, so this looks better than it is. 95% upper bound of the exit "
            f"error with {over['error'][1]} {unit}: {100 * bound:.1f}%, not corrected for that search."
        )
        bound_method = (
            f"Clopper-Pearson, one-sided, on exited {unit}"
            + ("" if units is None else "; a group is an error when any of its exited rows is wrong")
            + f" ({over['error'][0]} of {over['error'][1]}); not corrected for the choice on the same rows"
        )
    else:
        level, bound = 1 - certificate.delta, certificate.risks[0].bound
        fnr_bound = certificate.risks[1].bound if target_fnr is not None else None
        statement = (
            f"{certificate.guarantee} {certificate.accepted} of {certificate.n} {unit} exited on the certify half, "
            f"{certificate.errors} of them wrong; its rows chose nothing. {assumed(certificate)}"
        )
        bound_method = certified_bound(certificate)
    return GateParams(
        classes=names,
        positive=positive,
        a=platt.a,
        b=platt.b,
        fitted=platt.fitted,
        platt=platt.reason,
        threshold=row.threshold,
        coverage=row.coverage,
        exit_error=n_errors / row.n_exited,
        fnr_on_exited=row.fnr_on_exited,
        constraints=constraints,
        guarantee=guarantee,
        certificate=None if certificate is None else record(certificate, claims=claims, use=use),
        certify_uses=use if certificate is not None else None,
        statement=statement,
        exit_error_upper_bound=bound,
        fnr_upper_bound=fnr_bound if row.n_positive_exited else None,
        bound_level=level,
        bound_method=bound_method,
        n_rows=truth.size,
        n_exited=row.n_exited,
        n_errors=n_errors,
        n_positive_exited=row.n_positive_exited,
        n_false_negative=row.n_false_negative,
        n_exited_groups=over["error"][1],
        n_positive_groups=over["fnr"][1],
        n_fit_rows=platt.n,
        grouped=units is not None,
        sweep_results=_table(sure, values, truth, index, row),
        split_hashes=dict(split_hashes or {}),
        model_fingerprint=model_fingerprint,
        preprocessing_fingerprint=preprocessing_fingerprint,
    )


@dataclass(frozen=True)
class Reach:
    """How near a score comes to the gate's two constraints on some rows, by the best threshold for each.

    ``exit_error``: the smallest with the coverage asked for, lower is better; NaN where no threshold covers so much.
    ``coverage``: the largest within the exit error asked for, 0 when there is none. ``feasible``: both at once.
    """

    feasible: bool
    exit_error: float
    coverage: float


def reach(score: ArrayLike, wrong: ArrayLike, *, min_coverage: float = 0.70, max_exit_error: float = 0.01) -> Reach:
    """Say what the best threshold of a score can do on these rows, in exact integers; it promises nothing.

    Args:
        score: [N], higher is surer, N >= 1; a row whose score is NaN never exits.
        wrong: [N] of 0 and 1: whether Stage A's answer is wrong.
        min_coverage: inside (0, 1).
        max_exit_error: inside (0, 1).

    Raises:
        InputError: another shape, or a limit that is outside.
    """
    for name, value in (("min_coverage", min_coverage), ("max_exit_error", max_exit_error)):
        if not 0 < value < 1:
            raise InputError(f"{name} must be inside (0, 1), got {value}")
    values, failed = np.asarray(score, dtype=np.float64), np.asarray(wrong)
    if values.ndim != 1 or values.size == 0 or failed.shape != values.shape:
        raise InputError(
            f"score and wrong must both have shape [N], got {list(values.shape)} and {list(failed.shape)}; "
            "give one of each per row"
        )
    known = ~np.isnan(values)
    if not known.any():
        return Reach(False, math.nan, 0.0)
    _, exited, errors, *_ = sweep(values[known], failed[known])
    covered = exited >= _least(min_coverage, values.size)
    good = meets(errors.astype(np.int64), exited, max_exit_error)
    return Reach(
        feasible=bool((covered & good).any()),
        exit_error=float((errors[covered] / exited[covered]).min()) if covered.any() else math.nan,
        coverage=float(exited[good].max(initial=0) / values.size),
    )


def _least(share: float, n: int) -> int:
    """Fewest of n rows that are this share, in the decimals that it is written in: .7 * 10 is 6.999... in floats."""
    return math.ceil(Fraction(repr(float(share))) * n)


def describe(constraints: GateConstraints) -> str:
    """The wish in words."""
    fnr = constraints.target_fnr_exit
    return f"coverage >= {constraints.min_coverage:g} with exit error <= {constraints.max_exit_error:g}" + (
        f" and FNR on exits <= {fnr:g}" if fnr is not None else ""
    )


def _certify(
    sure: NDArray[np.float64],
    probs: NDArray[np.float64],
    labels: NDArray[np.int64],
    groups: NDArray[np.str_] | None,
    positive: int,
    constraints: GateConstraints,
    halves: ArrayLike,
    delta: float,
) -> Certificate:
    answered = probs.argmax(axis=1)
    risks = [Risk("exit error", constraints.max_exit_error, answered != labels)]
    if constraints.target_fnr_exit is not None:
        is_positive = labels == positive
        missed = is_positive & (answered != positive)
        risks.append(Risk("FNR on exits", constraints.target_fnr_exit, missed, is_positive))
    certificate = certify_halves(
        sure, risks, halves, delta=delta, min_coverage=constraints.min_coverage, groups=groups, lowest=0.0
    )
    if not certificate.feasible:
        raise infeasible(certificate, describe(constraints))
    return certificate


def _best(
    sure: NDArray[np.float64],
    probs: NDArray[np.float64],
    labels: NDArray[np.int64],
    positive: int,
    constraints: GateConstraints,
) -> tuple[ExitCounts, int]:
    """The laxest threshold that meets every constraint on these rows, in exact integers."""
    wish = f"{describe(constraints)} must be reachable on the calibration rows, but"
    if np.isnan(sure).all():
        raise NotReachableError(
            f"{wish} no gate logit is finite, so nothing may exit; train again. No policy was written"
        )
    counts = count_exits_by(sure, probs, labels, positive, lowest=0.0)
    wrong = counts.n_exited - counts.n_correct
    covered = counts.n_exited >= _least(constraints.min_coverage, labels.size)
    good = covered & meets(wrong, counts.n_exited, constraints.max_exit_error)
    if constraints.target_fnr_exit is not None:
        good &= meets(counts.n_false_negative, counts.n_positive, constraints.target_fnr_exit)
    reached = np.flatnonzero(good)
    if reached.size:
        return counts, int(reached[-1])
    if not covered.any():
        raise NotReachableError(
            f"{wish} the largest coverage is {counts.n_exited[-1] / labels.size:.4g}: the other gate logits are not "
            "finite; train again. No policy was written"
        )
    rate = np.where(covered, wrong / counts.n_exited, np.inf)
    best = int(rate.size - 1 - rate[::-1].argmin())
    row = counts.row(best, labels.size, grid=False)
    fnr = "" if row.fnr_on_exited is None else f" and FNR on exits {row.fnr_on_exited:.4g}"
    raise NotReachableError(
        f"{wish} the smallest exit error at that coverage is {rate[best]:.4g} ({int(wrong[best])} of {row.n_exited}), "
        f"at threshold {row.threshold:.6g} with coverage {row.coverage:.4g}{fnr}. Train a better Stage A or gate, or "
        "accept a larger error or a smaller coverage. No policy was written"
    )


def _groups(
    wrong: NDArray[np.bool_], rows: NDArray[np.bool_], groups: NDArray[np.str_] | None
) -> tuple[int, int, float]:
    """Groups in error and all groups among some rows, with the upper bound."""
    k, n = groups_in_error(wrong[rows], None if groups is None else groups[rows])
    return k, n, clopper_pearson_upper(k, n, level=BOUND_LEVEL)


def _table(
    sure: NDArray[np.float64], probs: NDArray[np.float64], labels: NDArray[np.int64], positive: int, chosen: SweepRow
) -> list[SweepRow]:
    counts = count_exits_by(sure, probs, labels, positive, lowest=0.0)
    grid = count_exits_by(sure, probs, labels, positive, GRID, lowest=0.0)
    return sweep_table(counts, grid, chosen, labels.size)
