"""The softmax exit policy: Stage A answers when its largest probability is at or above a threshold.

NumPy only. An image exits iff ``confidence >= exit_threshold``; confidence is the largest softmax
probability, computed in float64; the answer is the most probable class (the first one on a tie).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from stage1_pro.errors import InputError, NotReachableError, nearest
from stage1_pro.metrics.binomial import clopper_pearson_upper
from stage1_pro.policies.base import BasePolicy
from stage1_pro.policies.candidates import Risk
from stage1_pro.policies.certificate import CertificateRecord, SweepRow
from stage1_pro.policies.certify import Certificate, certify_halves, gaps, groups_in_error, infeasible, record
from stage1_pro.policies.target import Softmax


class Thresholds(BasePolicy):
    """``thresholds.json``: the softmax exit policy.

    An image exits at Stage A iff its confidence (largest softmax probability) is at or above
    ``exit_threshold``. For two classes that is P(positive) at or above ``exit_upper_threshold``
    or at or below ``exit_lower_threshold``; for more classes the lower one is null.
    """

    format_version: Literal[1] = 1
    policy: Literal["softmax"] = "softmax"
    classes: list[str] = Field(min_length=2)
    positive: str
    exit_threshold: float = Field(ge=0, le=1)
    exit_lower_threshold: float | None = Field(default=None, ge=0, le=1)
    exit_upper_threshold: float = Field(ge=0, le=1)
    fnr_on_exited: float = Field(ge=0, le=1)
    coverage: float = Field(ge=0, le=1)
    exit_accuracy: float = Field(ge=0, le=1)
    target_fnr: float = Field(gt=0, lt=1)
    guarantee: Literal["none", "ltt"]
    certificate: CertificateRecord | None = Field(default=None, description="null with guarantee none")
    statement: str
    fnr_upper_bound: float = Field(ge=0, le=1)
    bound_level: float = Field(gt=0, lt=1)
    bound_method: str
    n_rows: int
    n_exited: int
    n_positive_exited: int
    n_false_negative: int
    n_positive_groups: int
    grouped: bool
    sweep_results: list[SweepRow]
    split_hashes: dict[str, str]
    model_fingerprint: str | None = None
    preprocessing_fingerprint: str | None = None

    @property
    def target(self) -> Softmax:
        """What it was asked for; delta is that of its own claim."""
        claim = {} if self.certificate is None else {"delta": self.certificate.delta}
        return Softmax(target_fnr=self.target_fnr, guarantee=self.guarantee, **claim)

    def _stricter(self, threshold: float, statement: str) -> Self:
        changed = {"exit_threshold": threshold, "guarantee": "none", "certificate": None, "statement": statement}
        return self.model_copy(update=changed)


GRID = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.88, 0.9, 0.92, 0.95)
BOUND_LEVEL = 0.95
SWEEP_ROWS = 512
# Rows of probabilities may carry the rounding of float16 or of a CSV with four decimals.
SUM_TOLERANCE = 1e-3


def softmax(logits: ArrayLike) -> NDArray[np.float64]:
    """Give probabilities [N, K] in float64 for logits [N, K]; a row with NaN or +inf becomes all NaN."""
    values = np.asarray(logits, dtype=np.float64)
    if values.ndim != 2:
        raise InputError(f"logits must have shape [N, K], got {list(values.shape)}; add the missing axis")
    # inf - inf is NaN on purpose: such a row has no confidence and never exits.
    with np.errstate(invalid="ignore"):
        powers = np.exp(values - values.max(axis=1, keepdims=True, initial=-np.inf))
    probs: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return probs


def confidence(probs: ArrayLike) -> NDArray[np.float64]:
    """Give the largest probability of every row [N], in [1/K, 1]; NaN where the row holds NaN."""
    values = np.asarray(probs, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] == 0:
        raise InputError(f"probs must have shape [N, K], got {list(values.shape)}; add the missing axis")
    largest: NDArray[np.float64] = np.minimum(values.max(axis=1), 1.0)
    return largest


def decide(probs: ArrayLike, policy: Thresholds) -> NDArray[np.bool_]:
    """Say which rows exit [N]: confidence at or above ``policy.exit_threshold``; NaN never does.

    Raises:
        InputError: ``probs`` [N, K] has another number of classes than the policy.
    """
    values = np.asarray(probs, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != len(policy.classes):
        raise InputError(
            f"probs must have shape [N, {len(policy.classes)}] as the policy's classes, got {list(values.shape)}; "
            "use the policy of this model"
        )
    exited: NDArray[np.bool_] = confidence(values) >= policy.exit_threshold
    return exited


@dataclass(frozen=True)
class ExitCounts:
    """Integer counts among exits at T thresholds; every array has shape [T]."""

    threshold: NDArray[np.float64]
    n_exited: NDArray[np.int64]
    n_positive: NDArray[np.int64]
    n_false_negative: NDArray[np.int64]
    n_correct: NDArray[np.int64]

    def row(self, index: int, n_rows: int, *, grid: bool) -> SweepRow:
        """Turn one threshold's counts into rates; undefined ones are None."""
        exited, positive = int(self.n_exited[index]), int(self.n_positive[index])
        missed, correct = int(self.n_false_negative[index]), int(self.n_correct[index])
        return SweepRow(
            threshold=float(self.threshold[index]),
            coverage=exited / n_rows,
            fnr_on_exited=missed / positive if positive else None,
            exit_accuracy=correct / exited if exited else None,
            n_exited=exited,
            n_positive_exited=positive,
            n_false_negative=missed,
            grid=grid,
        )


def count_exits(
    probs: NDArray[np.float64], labels: NDArray[np.int64], positive: int, at: ArrayLike | None = None
) -> ExitCounts:
    """Count exits by confidence at every achievable threshold, strictest first, or at the thresholds ``at`` [T].

    See ``count_exits_by``; 1/K closes the last gap.

    Args:
        probs: [N, K], N >= 1, free of NaN.
        labels: [N] class indices.
        positive: index of the positive class.
        at: thresholds to count at instead.
    """
    return count_exits_by(confidence(probs), probs, labels, positive, at, lowest=1 / probs.shape[1])


def count_exits_by(
    score: NDArray[np.float64],
    probs: NDArray[np.float64],
    labels: NDArray[np.int64],
    positive: int,
    at: ArrayLike | None = None,
    *,
    lowest: float,
) -> ExitCounts:
    """Count exits of rows whose score is at or above each threshold, strictest first; NaN never exits.

    One sort and cumulative sums; rows of equal score exit together. Without ``at`` there is one
    threshold per distinct score, in the middle of the gap below it: as far as can be from every
    calibration row, so that a runtime's rounding does not flip one.

    Args:
        score: [N] what decides, higher is surer; at least one is not NaN.
        probs: [N, K] Stage A's answers, free of NaN.
        labels: [N] class indices.
        positive: index of the positive class.
        at: thresholds to count at instead.
        lowest: lower end of the score's range, closes the last gap.
    """
    known = np.flatnonzero(~np.isnan(score))
    order = known[np.argsort(-score[known], kind="stable")]
    descending, sorted_labels = score[order], labels[order]
    predicted = probs.argmax(axis=1)[order]
    is_positive = sorted_labels == positive
    if at is None:
        last, threshold = gaps(descending, lowest)
        n_exited = last + 1
    else:
        threshold = np.asarray(at, dtype=np.float64)
        n_exited = np.searchsorted(-descending, -threshold, side="right")

    def upto(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        counts: NDArray[np.int64] = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])[n_exited]
        return counts

    return ExitCounts(
        threshold=threshold,
        n_exited=n_exited.astype(np.int64),
        n_positive=upto(is_positive),
        n_false_negative=upto(is_positive & (predicted != positive)),
        n_correct=upto(predicted == sorted_labels),
    )


def fit_softmax_policy(
    probs: ArrayLike,
    labels: ArrayLike,
    *,
    classes: Sequence[str],
    positive: str,
    target_fnr: float = 0.02,
    guarantee: Literal["none", "ltt"] = "none",
    halves: ArrayLike | None = None,
    delta: float = 0.05,
    claims: int = 1,
    use: int | None = None,
    groups: ArrayLike | None = None,
    split_hashes: Mapping[str, str] | None = None,
    model_fingerprint: str | None = None,
    preprocessing_fingerprint: str | None = None,
) -> Thresholds:
    """Choose the threshold of largest coverage whose FNR on exits is at most ``target_fnr``, empirically or certified.

    FNR on exits = exited positives answered negative / exited positives; where no positive exits it is
    undefined and the target counts as missed.

    ``none`` tries all thresholds on the given rows, compared in exact integers: it promises nothing.
    ``ltt`` takes candidates and their order from the fit half and certifies on the other, by exact binomial
    tests in a fixed sequence, by group: with probability 1 - ``delta`` the FNR on exits of new images is at
    most the target. The record's figures are then those of the certify half.

    Args:
        probs: [N, K] probabilities of Stage A, N >= 1.
        labels: [N] indices into ``classes``.
        classes: K names, K >= 2.
        positive: name of the positive class.
        target_fnr: inside (0, 1); read as the decimal number it is written as.
        guarantee: ``none`` or ``ltt``.
        halves: [N] of ``fit`` and ``certify``, for ``ltt``.
        delta: largest chance of a false certificate, all claims together; each gets ``delta / claims``.
        claims: how many claims on the certify half were declared before the first.
        use: which of them this is, for the record; None when nobody counts.
        groups: [N] clip or track of every row; the unit of the bounds. ``None``: rows are independent.
        split_hashes: which rows these are, for the record.
        model_fingerprint: which model gave the probabilities.
        preprocessing_fingerprint: how its pixels were prepared.

    Raises:
        InputError: an argument is not what it must be; NaN names its row.
        NotReachableError: no threshold meets the target, or none can be certified; nothing is chosen in its place.
    """
    names = [str(name) for name in classes]
    values, truth, units = check_rows(probs, labels, groups, names)
    if positive not in names:
        raise InputError(f"positive must be one of {', '.join(names)}, got '{positive}'{nearest(positive, names)}")
    if not 0 < target_fnr < 1:
        raise InputError(f"target_fnr must be inside (0, 1), got {target_fnr}; 0.02 is usual")
    if guarantee not in ("none", "ltt"):
        raise InputError(f"guarantee must be none or ltt, got '{guarantee}'")
    index = names.index(positive)
    certificate = None
    if guarantee == "ltt":
        if halves is None:
            raise InputError("halves must be given with guarantee ltt, got None; one half cannot choose and certify")
        certificate = _certify(values, truth, units, index, target_fnr, halves, delta / claims)
        kept = np.asarray(halves) == "certify"
        values, truth, units = values[kept], truth[kept], None if units is None else units[kept]
        assert certificate.threshold is not None
        found = count_exits(values, truth, index, [certificate.threshold])
        row, correct = found.row(0, truth.size, grid=False), int(found.n_correct[0])
        counts, n_tried = count_exits(values, truth, index), 0
    else:
        counts = count_exits(values, truth, index)
        reached = np.flatnonzero(meets(counts.n_false_negative, counts.n_positive, target_fnr))
        if reached.size == 0:
            raise NotReachableError(_why_not(counts, values, truth, units, index, positive, target_fnr))
        chosen = int(reached[-1])
        row, correct = counts.row(chosen, truth.size, grid=False), int(counts.n_correct[chosen])
        n_tried = counts.threshold.size
    exited = confidence(values) >= row.threshold
    if int(exited.sum()) != row.n_exited:
        raise AssertionError("the stored threshold does not decide as the sweep did")
    wrong_groups, n_groups, bound = _bound(values, truth, units, index, exited)
    unit = "rows" if units is None else "groups"
    if certificate is None:
        statement = (
            f"Empirical choice, no guarantee: nothing is promised for new images. Of {truth.size} calibration rows "
            f"{row.n_exited} exit, {row.n_positive_exited} of them positive ({n_groups} {unit}, taken as independent), "
            f"and {row.n_false_negative} of those positives are answered negative. The threshold was chosen on the "
            f"same rows as the best of {n_tried}, so this looks better than it is. 95% upper bound with "
            f"{n_groups} {unit}: {100 * bound:.1f}%, not corrected for that search."
        )
        level = BOUND_LEVEL
        bound_method = (
            "Clopper-Pearson, one-sided, on exited positives as independent rows"
            if units is None
            else "Clopper-Pearson, one-sided, on groups with an exited positive; a group is an error when any of its "
            "exited positives is answered negative"
        ) + f" ({wrong_groups} of {n_groups}); not corrected for the choice of the threshold on the same rows"
    else:
        bound, level = certificate.risks[0].bound, 1 - certificate.delta
        statement = (
            f"{certificate.guarantee} {certificate.errors} of {certificate.trials} exited positive {unit} were "
            f"answered negative on the certify half, whose rows chose nothing. {assumed(certificate)}"
        )
        bound_method = certified_bound(certificate)
    return Thresholds(
        classes=names,
        positive=positive,
        exit_threshold=row.threshold,
        # Derived and rounded, for readers of the two-sided form; confidence >= exit_threshold decides.
        exit_lower_threshold=1 - row.threshold if len(names) == 2 else None,
        exit_upper_threshold=row.threshold,
        fnr_on_exited=row.n_false_negative / row.n_positive_exited,
        coverage=row.coverage,
        exit_accuracy=correct / row.n_exited,
        target_fnr=target_fnr,
        guarantee=guarantee,
        certificate=None if certificate is None else record(certificate, claims=claims, use=use),
        statement=statement,
        fnr_upper_bound=bound,
        bound_level=level,
        bound_method=bound_method,
        n_rows=truth.size,
        n_exited=row.n_exited,
        n_positive_exited=row.n_positive_exited,
        n_false_negative=row.n_false_negative,
        n_positive_groups=n_groups,
        grouped=units is not None,
        sweep_results=sweep_table(counts, count_exits(values, truth, index, GRID), row, truth.size),
        split_hashes=dict(split_hashes or {}),
        model_fingerprint=model_fingerprint,
        preprocessing_fingerprint=preprocessing_fingerprint,
    )


def _certify(
    probs: NDArray[np.float64],
    labels: NDArray[np.int64],
    groups: NDArray[np.str_] | None,
    positive: int,
    target_fnr: float,
    halves: ArrayLike,
    delta: float,
) -> Certificate:
    is_positive = labels == positive
    risk = Risk("FNR on exits", target_fnr, is_positive & (probs.argmax(axis=1) != positive), is_positive)
    certificate = certify_halves(
        confidence(probs), [risk], halves, delta=delta, groups=groups, lowest=1 / probs.shape[1]
    )
    if not certificate.feasible:
        raise infeasible(certificate, f"target_fnr {target_fnr:g}")
    return certificate


def assumed(certificate: Certificate) -> str:
    """What a certificate takes for granted, as a sentence."""
    return f"Provided that {'; '.join(certificate.assumptions)}."


def certified_bound(certificate: Certificate) -> str:
    """How the bounds of a certified policy came about, in words."""
    drawn = ", one row drawn from each group" if certificate.unit == "groups" else ""
    counts = ", ".join(f"{risk.name} {risk.errors} of {risk.trials}" for risk in certificate.risks)
    return (
        f"Clopper-Pearson, one-sided at level {1 - certificate.delta:g}, on {certificate.unit} of the certify "
        f"half{drawn} ({counts})"
    )


def check_rows(
    probs: ArrayLike, labels: ArrayLike, groups: ArrayLike | None, classes: list[str]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.str_] | None]:
    """Probabilities, class indices and groups (None when each row is its own) that can be trusted."""
    if len(classes) < 2 or len(set(classes)) != len(classes):
        raise InputError(f"classes must be at least two different names, got {classes}")
    values = np.asarray(probs, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] == 0 or values.shape[1] != len(classes):
        raise InputError(
            f"probs must have shape [N, {len(classes)}] with at least one row, got {list(values.shape)}; "
            "give one probability per class"
        )
    row = _first(np.isnan(values).any(axis=1))
    if row is not None:
        raise InputError(f"probs must be free of NaN, got NaN in row {row}; leave such rows out or mend the model")
    row = _first(((values < 0) | (values > 1 + SUM_TOLERANCE)).any(axis=1))
    if row is not None:
        raise InputError(
            f"probs must be in [0, 1], got {values[row].tolist()} in row {row}; pass logits through softmax"
        )
    total = values.sum(axis=1)
    row = _first(np.abs(total - 1) > SUM_TOLERANCE)
    if row is not None:
        raise InputError(
            f"probs must sum to 1 in each row, got {total[row]:.6g} in row {row}; pass logits through softmax"
        )
    truth = np.asarray(labels)
    if truth.shape != total.shape:
        raise InputError(f"labels must have shape [{total.size}] as probs has rows, got {list(truth.shape)}")
    if truth.dtype.kind not in "biuf":
        raise InputError(f"labels must be class indices 0..{len(classes) - 1}, got {truth.dtype}; map names to indices")
    row = _first(~np.isin(truth, np.arange(len(classes))))
    if row is not None:
        raise InputError(f"labels must be class indices 0..{len(classes) - 1}, got {truth[row]} in row {row}")
    units = None
    if groups is not None:
        units = np.asarray(groups).astype(np.str_)
        if units.shape != total.shape:
            raise InputError(f"groups must have shape [{total.size}] as probs has rows, got {list(units.shape)}")
        if np.unique(units).size == units.size:
            units = None
    return values, truth.astype(np.int64), units


def _first(mask: ArrayLike) -> int | None:
    found = np.flatnonzero(mask)
    return int(found[0]) if found.size else None


def meets(part: NDArray[np.int64], whole: NDArray[np.int64], most: float) -> NDArray[np.bool_]:
    """Part / whole <= most, in integers: the float .02 is a little more than 2%, a product rounds. 0 / 0 is not met."""
    target = Fraction(repr(float(most)))
    kind = np.int64 if target.denominator * int(whole.max(initial=1)) < 2**62 else object
    counted = part.astype(kind) * target.denominator
    allowed = whole.astype(kind) * target.numerator
    met: NDArray[np.bool_] = np.asarray(counted <= allowed, dtype=bool) & (whole > 0)
    return met


def _bound(
    probs: NDArray[np.float64],
    labels: NDArray[np.int64],
    groups: NDArray[np.str_] | None,
    positive: int,
    exited: NDArray[np.bool_],
) -> tuple[int, int, float]:
    """Groups in error and all groups among exited positives, with the upper bound."""
    rows = exited & (labels == positive)
    wrong, n_groups = groups_in_error(probs.argmax(axis=1)[rows] != positive, None if groups is None else groups[rows])
    return wrong, n_groups, clopper_pearson_upper(wrong, n_groups, level=BOUND_LEVEL)


def _why_not(
    counts: ExitCounts,
    probs: NDArray[np.float64],
    labels: NDArray[np.int64],
    groups: NDArray[np.str_] | None,
    positive: int,
    name: str,
    target_fnr: float,
) -> str:
    """The message of NotReachableError: the smallest rate there is, where, and on how much data."""
    wish = f"target_fnr {target_fnr:g} must be reachable on the calibration rows, but"
    if not (labels == positive).any():
        return (
            f"{wish} none of the {labels.size} rows is of the positive class '{name}', so FNR on exits is undefined; "
            "calibrate on rows that hold positives. No policy was written"
        )
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = np.where(counts.n_positive > 0, counts.n_false_negative / counts.n_positive, np.inf)
    # Of equal rates the one with the largest coverage, which is the last.
    best = int(rate.size - 1 - rate[::-1].argmin())
    row = counts.row(best, labels.size, grid=False)
    _, n_groups, _ = _bound(probs, labels, groups, positive, confidence(probs) >= row.threshold)
    unit = "" if groups is None else f" from {n_groups} groups"
    return (
        f"{wish} the smallest FNR on exits is {rate[best]:.4g}, at threshold {row.threshold:.6g} with coverage "
        f"{row.coverage:.4g}: {row.n_false_negative} of {row.n_positive_exited} exited positives{unit} are answered "
        "negative. Train a better Stage A, bring more positives, or accept a larger target. No policy was written"
    )


def sweep_table(counts: ExitCounts, grid: ExitCounts, chosen: SweepRow, n_rows: int) -> list[SweepRow]:
    """Grid rows, evenly thinned sweep rows and the chosen one, laxest first."""
    total = counts.threshold.size
    kept = np.arange(total)
    if total > SWEEP_ROWS:
        kept = np.unique(np.linspace(0, total - 1, SWEEP_ROWS - 1).round().astype(np.int64))
    rows = [grid.row(index, n_rows, grid=True) for index in range(grid.threshold.size)]
    rows += [
        counts.row(int(index), n_rows, grid=False) for index in kept if counts.threshold[index] != chosen.threshold
    ]
    return sorted([*rows, chosen], key=lambda row: (row.threshold, not row.grid))
