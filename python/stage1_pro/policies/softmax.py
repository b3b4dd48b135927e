"""The softmax exit policy: Stage A answers when its largest probability is at or above a threshold.

NumPy only. An image exits iff ``confidence >= exit_threshold``; confidence is the largest softmax
probability, computed in float64; the answer is the most probable class (the first one on a tie).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from stage1_pro.arguments import floats
from stage1_pro.errors import InputError
from stage1_pro.policies.certificate import CertificateRecord, SweepRow
from stage1_pro.policies.exiting import ByLimits, Limits, walked
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


class Thresholds(ByLimits):
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
    coverage: float = Field(ge=0, le=1)
    exit_accuracy: float | None = Field(ge=0, le=1, description="null where photos without labels certified it")
    target_fnr: float | None = Field(gt=0, lt=1, description="largest FNR on exits; null = any")
    limits: Limits | None = Field(None, description="what else was asked for; null in files of the first version")
    guarantee: Literal["none", "ltt"]
    certificate: CertificateRecord | None = Field(default=None, description="null with guarantee none")
    statement: str
    n_rows: int
    n_exited: int
    n_positive_exited: int
    n_false_negative: int
    grouped: bool
    sweep_results: list[SweepRow]
    split_hashes: dict[str, str]
    model_fingerprint: str | None = None
    preprocessing_fingerprint: str | None = None

    @classmethod
    def fit(cls, target: Softmax, rows: Rows, *, use: int | None = None, origin: Origin | None = None) -> Self:
        """Choose the threshold of largest coverage under all limits at once, certified or empirically.

        See ``ByLimits.chosen`` and ``Policy.fit``.
        """
        found, fields = cls.chosen(
            target, rows, confidence(rows.probs), use=use, origin=origin, lowest=1 / len(rows.classes), shown=GRID,
            grid=rows.grid,
        )  # fmt: skip
        return cls.made(target, rows, found.row.threshold, fields, None if rows.unlabelled else found.row.exit_accuracy)

    @classmethod
    def scored(cls, rows: Rows) -> tuple[NDArray[np.float64], float]:
        """The largest probability [N]; see ``ByLimits.scored``."""
        return confidence(rows.probs), 1 / len(rows.classes)

    @classmethod
    def made(
        cls, target: Softmax, rows: Rows, threshold: float, fields: Mapping[str, Any], accuracy: float | None
    ) -> Self:
        """With the threshold in its three forms; see ``ByLimits.made``."""
        return cls(
            **fields,
            exit_threshold=threshold,
            # Derived and rounded, for readers of the two-sided form; confidence >= exit_threshold decides.
            exit_lower_threshold=1 - threshold if len(rows.classes) == 2 and target.by is None else None,
            exit_upper_threshold=threshold,
            exit_accuracy=accuracy,
            target_fnr=target.fnr,
            limits=Limits.of(target),
        )

    @classmethod
    def planned(cls, terms: PlanTerms) -> Planned:
        """The walk whose trials are the positives that exit; see ``Policy.planned``."""
        delta = terms.delta[0]

        def certifies(rows: Rows, alpha: float) -> tuple[float, bool] | None:
            return walked(Softmax(fnr=alpha, delta=delta), rows, confidence(rows.probs), 1 / len(rows.classes))

        return Planned(
            terms.min_coverage * terms.positives, delta, certifies,
            most_trials=lambda n: math.floor(n * terms.positives),
            wish=f"FNR on exits at most {100 * terms.alpha:g}% (softmax)",
            assumptions=["the threshold may let fewer exit than hoped for: nothing is asked of the coverage"],
            positives=terms.positives,
        )  # fmt: skip

    def scores(self, probs: ArrayLike, gate_logits: ArrayLike | None = None) -> NDArray[np.float64]:
        """The largest probability, scaled where each answer has a threshold of its own; see ``Policy.scores``."""
        del gate_logits
        return self._by_answer(probs, confidence(self.check_probs(probs)))

    def compiled(self) -> None:
        """The largest probability is the score."""
        self._check_one_threshold()

    def rule(self) -> str:
        """The rule in words."""
        if self.cells is not None:
            return self._rule_by_answer(self.cells)
        return f"exit when the largest probability of Stage A is at or above {self.exit_threshold:.6g}"

    @property
    def target(self) -> Softmax:
        """What it was asked for; delta is that of its own claim."""
        limits = {} if self.limits is None else self.limits.asked()
        return Softmax(**{**limits, "fnr": self.target_fnr, **self.own_delta}, guarantee=self.guarantee)
