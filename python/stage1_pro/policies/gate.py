"""The gate exit policy: Stage A answers when the gate's calibrated P(Stage A is correct) is at or above a threshold.

NumPy only. An image exits iff ``sigmoid(a * gate_logit + b) >= threshold``, computed in float64 by ``score`` alone, in
calibration, evaluation and the cascade. ``a`` and ``b`` are Platt's, from ``val_select`` or a half of ``val_calib``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from stage1_pro.arguments import array, floats
from stage1_pro.errors import InputError, NotReachableError
from stage1_pro.native import sweep
from stage1_pro.policies.bounds import exact
from stage1_pro.policies.certificate import CertificateRecord, SweepRow
from stage1_pro.policies.counts import meets
from stage1_pro.policies.exiting import ByLimits, Limits, walked
from stage1_pro.policies.planning import Planned, PlanTerms
from stage1_pro.policies.platt import Platt, fit_platt, score
from stage1_pro.policies.policy import Origin, Policy
from stage1_pro.policies.rows import Rows
from stage1_pro.policies.target import Gate
from stage1_pro.record import Record

GRID = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)


class GateConstraints(Record):
    """What the gate policy was asked for; all at once, at one threshold."""

    min_coverage: float | None = Field(None, gt=0, lt=1, description="null = not asked for, here and below")
    max_exit_error: float | None = Field(None, gt=0, lt=1)
    target_fnr_exit: float | None = Field(None, gt=0, lt=1)


class ByGate(Policy):
    """A policy whose score is the gate's P(Stage A is correct) = ``sigmoid(a * gate_logit + b)``, in float64."""

    a: float
    b: float
    fitted: bool = Field(description="false: Platt scaling was impossible, a = 1 and b = 0 stand in; see platt")
    platt: str = Field(description="how a and b came about")

    def scores(self, probs: ArrayLike, gate_logits: ArrayLike | None = None) -> NDArray[np.float64]:
        """The gate's calibrated P(Stage A is correct); NaN where Stage A gave no numbers. See ``Policy.scores``."""
        values = self.check_probs(probs)
        gate_logits = None if gate_logits is None else floats("gate_logits", gate_logits)
        if gate_logits is None or gate_logits.shape != values.shape[:1]:
            got = "None" if gate_logits is None else list(gate_logits.shape)
            raise InputError(f"gate_logits must have shape [{len(values)}] for the {self.policy} policy, got {got}")
        known = np.isfinite(values).all(axis=1)
        scores: NDArray[np.float64] = np.where(known, score(gate_logits, self.a, self.b), np.nan)
        return scores

    def compiled(self) -> tuple[float, float]:
        """Scale and offset of the gate's logit, whose sigmoid is the score."""
        return self.a, self.b

    def rule(self) -> str:
        """The rule of exits in words."""
        return (
            f"exit when the gate's P(Stage A is correct) = sigmoid({self.a:.6g} * gate logit + {self.b:.6g}) "
            f"is at or above {self.exit_threshold:.6g}"
        )


class GateParams(ByGate, ByLimits):
    """``gateparams.json``: the gate exit policy.

    An image exits at Stage A iff ``sigmoid(a * gate_logit + b)``, in float64, is at or above ``threshold``. Rates and
    counts are those of the calibration rows (with ``ltt`` of those kept for the certificate); ``a`` and ``b`` come
    from rows that certify nothing.
    """

    file: ClassVar[str] = "gateparams.json"
    asks: ClassVar[type[Gate]] = Gate
    threshold_field: ClassVar[str] = "threshold"

    policy: Literal["gate"] = "gate"
    threshold: float = Field(ge=0, le=1)
    coverage: float = Field(ge=0, le=1)
    constraints: GateConstraints
    limits: Limits | None = Field(None, description="what else was asked for; null in files of the first version")
    guarantee: Literal["none", "ltt"]
    certificate: CertificateRecord | None = Field(description="null with guarantee none")
    certify_uses: int | None = Field(
        description="claims on the rows kept for the certificate so far, with this one; null: not counted"
    )
    statement: str
    n_rows: int
    n_exited: int
    n_positive_exited: int
    n_false_negative: int
    n_fit_rows: int = Field(description="rows that Platt scaling saw")
    grouped: bool
    sweep_results: list[SweepRow]
    split_hashes: dict[str, str]
    model_fingerprint: str | None = None
    preprocessing_fingerprint: str | None = None

    @classmethod
    def fit(cls, target: Gate, rows: Rows, *, use: int | None = None, origin: Origin | None = None) -> Self:
        """Choose the gate's threshold of largest coverage under all limits at once, certified or empirically.

        Platt scaling sees the fit rows alone either way. See ``ByLimits.chosen`` and ``Policy.fit``.
        """
        _, sure = _sure(rows)
        if target.guarantee == "none" and np.isnan(sure).all():
            raise NotReachableError(
                f"{target.words()} must be reachable on the calibration rows, but no gate logit is finite, so nothing "
                "may exit; train again. No policy was written"
            )
        found, fields = cls.chosen(target, rows, sure, use=use, origin=origin, shown=GRID)
        return cls.made(target, rows, found.row.threshold, fields, None)

    @classmethod
    def scored(cls, rows: Rows) -> tuple[NDArray[np.float64], float]:
        """The gate's P(Stage A is correct) [N]; see ``ByLimits.scored``."""
        return _sure(rows)[1], 0.0

    @classmethod
    def made(
        cls, target: Gate, rows: Rows, threshold: float, fields: Mapping[str, Any], accuracy: float | None
    ) -> Self:
        """With Platt's scaling on the fit rows; see ``ByLimits.made``."""
        del accuracy
        platt, certificate = _sure(rows)[0], fields["certificate"]
        return cls(
            **fields,
            a=platt.a, b=platt.b, fitted=platt.fitted, platt=platt.reason, n_fit_rows=platt.n, threshold=threshold,
            constraints=GateConstraints(
                min_coverage=target.least_coverage, max_exit_error=target.exit_error, target_fnr_exit=target.fnr
            ),
            limits=Limits.of(target), certify_uses=None if certificate is None else certificate.use,
        )  # fmt: skip

    def scores(self, probs: ArrayLike, gate_logits: ArrayLike | None = None) -> NDArray[np.float64]:
        """The same, scaled where each answer has a threshold of its own."""
        return self._by_answer(probs, super().scores(probs, gate_logits))

    def rule(self) -> str:
        """The rule in words."""
        return super().rule() if self.cells is None else self._rule_by_answer(self.cells)

    def compiled(self) -> tuple[float, float]:
        """Scale and offset of the gate's logit."""
        self._check_one_threshold()
        return super().compiled()

    @classmethod
    def check_fit_half(cls, rows: Rows) -> None:
        """Raise NotReachableError where no gate logit of the fit rows is finite."""
        if rows.gate is not None and not np.isfinite(rows.gate[rows.fit_half()]).any():
            raise NotReachableError(
                "gate logits of the rows that fix the order must be finite in one at least, got none, so nothing may "
                "exit; train again. No policy was written, and no claim was made"
            )

    @classmethod
    def planned(cls, terms: PlanTerms) -> Planned:
        """Platt's scaling on the fit rows, and the walk on the others; see ``Policy.planned``."""
        least, delta = terms.min_coverage, terms.delta[0]

        def certifies(rows: Rows, alpha: float) -> tuple[float, bool] | None:
            target = Gate(exit_error=alpha, least_coverage=least, delta=delta)
            return walked(target, rows, _sure(rows)[1])

        return Planned(
            least, delta, certifies, most_trials=lambda n: n,
            wish=f"coverage at least {100 * least:g}% and exit error at most {100 * terms.alpha:g}% (gate)",
            assumptions=[], coverage=(least, delta),
        )  # fmt: skip

    @property
    def exit_threshold(self) -> float:
        """The threshold under the name that every policy has."""
        return self.threshold

    @property
    def target(self) -> Gate:
        """What it was asked for; delta is that of its own claim."""
        own, limits = self.constraints, {} if self.limits is None else self.limits.asked()
        asked = {"exit_error": own.max_exit_error, "fnr": own.target_fnr_exit, "least_coverage": own.min_coverage}
        return Gate(**{**limits, **asked, **self.own_delta}, guarantee=self.guarantee)

    def found(self) -> list[str]:
        """The scaling, and what exits."""
        return [self.platt, *super().found()]


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
    values, failed = floats("score", score), array("wrong", wrong)
    if values.ndim != 1 or values.size == 0 or failed.shape != values.shape:
        raise InputError(
            f"score and wrong must both have shape [N], got {list(values.shape)} and {list(failed.shape)}; "
            "give one of each per row"
        )
    known = ~np.isnan(values)
    if not known.any():
        return Reach(False, math.nan, 0.0)
    _, exited, errors, *_ = sweep(values[known], failed[known])
    covered = exited >= math.ceil(exact(min_coverage) * values.size)
    good = meets(errors.astype(np.int64), exited, max_exit_error)
    return Reach(
        feasible=bool((covered & good).any()),
        exit_error=float((errors[covered] / exited[covered]).min()) if covered.any() else math.nan,
        coverage=float(exited[good].max(initial=0) / values.size),
    )


def _sure(rows: Rows) -> tuple[Platt, NDArray[np.float64]]:
    """Platt's scaling of the fit rows' gate logits, and P(Stage A is correct) of all rows [N]."""
    if rows.gate is None:
        raise InputError("gate must be given for the gate policy, got None; give its logit for every row")
    fit = rows.fit_half()
    platt = fit_platt(rows.gate[fit], ~rows.wrong[fit])
    return platt, score(rows.gate, platt.a, platt.b)
