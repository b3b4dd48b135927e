"""The softmax exit policy: Stage A answers when its largest probability is at or above a threshold.

NumPy only. An image exits iff ``confidence >= exit_threshold``; confidence is the largest softmax
probability, computed in float64; the answer is the most probable class (the first one on a tie).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from stage1_pro.arguments import floats
from stage1_pro.errors import InputError, NotReachableError
from stage1_pro.policies.certificate import CertificateRecord, SweepRow
from stage1_pro.policies.counts import ExitCounts, meets
from stage1_pro.policies.exiting import (
    BOUND_LEVEL,
    Chosen,
    ExitPolicy,
    assumed,
    beside_groups,
    certified_bound,
    choose_exits,
    walked,
)
from stage1_pro.policies.planning import Planned, PlanTerms
from stage1_pro.policies.policy import Origin
from stage1_pro.policies.rows import Rows
from stage1_pro.policies.target import Softmax

GRID = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.88, 0.9, 0.92, 0.95)


def softmax(logits: ArrayLike) -> NDArray[np.float64]:
    """Give probabilities [N, K] in float64 for logits [N, K]; a row with NaN or +inf becomes all NaN."""
    values = floats("logits", logits)
    if values.ndim != 2:
        raise InputError(f"logits must have shape [N, K], got {list(values.shape)}; add the missing axis")
    # inf - inf is NaN on purpose: such a row has no confidence and never exits.
    with np.errstate(invalid="ignore"):
        powers = np.exp(values - values.max(axis=1, keepdims=True, initial=-np.inf))
    probs: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return probs


def confidence(probs: ArrayLike) -> NDArray[np.float64]:
    """Give the largest probability of every row [N], in [1/K, 1]; NaN where the row holds NaN."""
    values = floats("probs", probs)
    if values.ndim != 2 or values.shape[1] == 0:
        raise InputError(f"probs must have shape [N, K], got {list(values.shape)}; add the missing axis")
    largest: NDArray[np.float64] = np.minimum(values.max(axis=1), 1.0)
    return largest


class Thresholds(ExitPolicy):
    """``thresholds.json``: the softmax exit policy.

    An image exits at Stage A iff its confidence (largest softmax probability) is at or above
    ``exit_threshold``. For two classes that is P(positive) at or above ``exit_upper_threshold``
    or at or below ``exit_lower_threshold``; for more classes the lower one is null.
    """

    file: ClassVar[str] = "thresholds.json"
    asks: ClassVar[type[Softmax]] = Softmax
    needs_gate: ClassVar[bool] = False
    score_title: ClassVar[str] = "Stage A's confidence"

    policy: Literal["softmax"] = "softmax"
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

    @classmethod
    def fit(cls, target: Softmax, rows: Rows, *, use: int | None = None, origin: Origin | None = None) -> Self:
        """Choose the threshold of largest coverage whose FNR on exits is at most the target.

        FNR on exits = exited positives answered negative / exited positives; where no positive exits it is
        undefined and the target counts as missed.

        ``none`` tries all thresholds on the given rows, compared in exact integers: it promises nothing.
        ``ltt`` takes candidates and their order from the fit rows and certifies on the others, by exact binomial
        tests in a fixed sequence, by group: with probability 1 - delta the FNR on exits of new images is at
        most the target. The record's figures are then those of the others. See ``Policy.fit``.
        """

        def best(counts: ExitCounts) -> int:
            reached = np.flatnonzero(meets(counts.n_false_negative, counts.n_positive, target.target_fnr))
            if reached.size == 0:
                raise NotReachableError(_why_not(counts, rows, target.target_fnr))
            return int(reached[-1])

        found = choose_exits(
            target, rows, confidence(rows.probs), best=best, lowest=1 / len(rows.classes), shown=GRID,
            called=f"target_fnr {target.target_fnr:g}", grid=rows.grid,
        )  # fmt: skip
        threshold = found.row.threshold
        return cls(
            **found.fields(target, use, origin),
            **_said(found),
            exit_threshold=threshold,
            # Derived and rounded, for readers of the two-sided form; confidence >= exit_threshold decides.
            exit_lower_threshold=1 - threshold if len(rows.classes) == 2 else None,
            exit_upper_threshold=threshold,
            exit_accuracy=found.row.exit_accuracy,
            target_fnr=target.target_fnr,
        )

    @classmethod
    def planned(cls, terms: PlanTerms) -> Planned:
        """The walk whose trials are the positives that exit; see ``Policy.planned``."""
        delta = terms.delta[0]

        def certifies(rows: Rows, alpha: float) -> tuple[float, bool] | None:
            return walked(Softmax(target_fnr=alpha, delta=delta), rows, confidence(rows.probs), 1 / len(rows.classes))

        return Planned(
            terms.min_coverage * terms.positives, delta, certifies,
            most_trials=lambda n: math.floor(n * terms.positives),
            wish=f"FNR on exits at most {100 * terms.alpha:g}% (softmax)",
            assumptions=["the threshold may let fewer exit than hoped for: nothing is asked of the coverage"],
            positives=terms.positives,
        )  # fmt: skip

    def scores(self, probs: ArrayLike, gate_logits: ArrayLike | None = None) -> NDArray[np.float64]:
        """The largest probability; see ``Policy.scores``."""
        del gate_logits
        return confidence(self.check_probs(probs))

    def compiled(self) -> None:
        """The largest probability is the score."""

    def rule(self) -> str:
        """The rule in words."""
        return f"exit when the largest probability of Stage A is at or above {self.exit_threshold:.6g}"

    def found(self) -> list[str]:
        """What is seen of photos where groups are promised, and what the promise does not bound."""
        what = "exited positives are missed"
        unit = None if self.certificate is None else self.certificate.unit
        said = beside_groups(unit, (what, self.n_false_negative, self.n_positive_exited, None))
        if self.commonest is not None and self.exits_right is not None and self.commonest_rate is not None:
            said.append(
                f"nothing is promised of exits that are wrong in another way than missing '{self.positive}': "
                f"{self.exits_right:.1%} of the exits are right; always answering '{self.commonest}' would be right in "
                f"{self.commonest_rate:.1%}"
            )
        return said

    @property
    def target(self) -> Softmax:
        """What it was asked for; delta is that of its own claim."""
        return Softmax(target_fnr=self.target_fnr, guarantee=self.guarantee, **self.own_delta)


def _said(found: Chosen) -> dict[str, Any]:
    """The statement of a threshold, its bound of FNR on exits with how that came about, and groups of positives."""
    rows, row, certificate, unit = found.rows, found.row, found.certificate, found.rows.unit
    wrong, n, bound = found.groups(rows.missed(rows.positive), found.exited & rows.is_class(rows.positive))
    if certificate is not None:
        missed, trials = certificate.errors, certificate.trials
        if certificate.unit == "photos":
            missed, trials, unit = row.n_false_negative, row.n_positive_exited, "photos"
        return {
            "statement": (
                f"{certificate.guarantee} {missed} of {trials} exited positive {unit} were "
                f"answered negative among those kept for the certificate, which chose nothing. {assumed(certificate)}"
                f"{found.caution}"
            ),
            "fnr_upper_bound": certificate.risks[0].bound,
            "bound_level": 1 - certificate.delta,
            "bound_method": certified_bound(certificate),
            "n_positive_groups": n,
        }
    how = "exited positives as independent rows"
    if rows.groups is not None:
        how = (
            "groups with an exited positive; a group is an error when any of its exited positives is answered negative"
        )
    return {
        "statement": (
            f"Empirical choice, no guarantee: nothing is promised for new images. Of {rows.labels.size} calibration "
            f"rows {row.n_exited} exit, {row.n_positive_exited} of them positive ({n} {unit}, taken as independent), "
            f"and {row.n_false_negative} of those positives are answered negative. The threshold was chosen on the "
            f"same rows as the best of {found.n_tried}, so this looks better than it is. 95% upper bound with {n} "
            f"{unit}: {100 * bound:.1f}%, not corrected for that search."
        ),
        "fnr_upper_bound": bound,
        "bound_level": BOUND_LEVEL,
        "bound_method": (
            f"Clopper-Pearson, one-sided, on {how} ({wrong} of {n}); not corrected for the choice of the threshold on "
            "the same rows"
        ),
        "n_positive_groups": n,
    }


def _why_not(counts: ExitCounts, rows: Rows, target_fnr: float) -> str:
    """The message of NotReachableError: the smallest rate there is, where, and on how much data."""
    wish = f"target_fnr {target_fnr:g} must be reachable on the calibration rows, but"
    if not rows.is_class(rows.positive).any():
        return (
            f"{wish} none of the {rows.labels.size} rows is of the positive class '{rows.positive}', so FNR on exits "
            "is undefined; calibrate on rows that hold positives. No policy was written"
        )
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = np.where(counts.n_positive > 0, counts.n_false_negative / counts.n_positive, np.inf)
    # Of equal rates the one with the largest coverage, which is the last.
    best = int(rate.size - 1 - rate[::-1].argmin())
    row = counts.row(best, rows.labels.size, grid=False)
    exited = (confidence(rows.probs) >= row.threshold) & rows.is_class(rows.positive)
    unit = "" if rows.groups is None else f" from {np.unique(rows.groups[exited]).size} groups"
    return (
        f"{wish} the smallest FNR on exits is {rate[best]:.4g}, at threshold {row.threshold:.6g} with coverage "
        f"{row.coverage:.4g}: {row.n_false_negative} of {row.n_positive_exited} exited positives{unit} are answered "
        "negative. Train a better Stage A, bring more positives, or accept a larger target. No policy was written"
    )
