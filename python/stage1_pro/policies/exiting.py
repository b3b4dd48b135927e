"""The threshold of an exit policy: certified in a frozen order, or the best on all rows. NumPy only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from stage1_pro.arguments import Grid
from stage1_pro.errors import NotReachableError
from stage1_pro.metrics.binomial import clopper_pearson_upper
from stage1_pro.policies.certificate import CertificateRecord, SweepRow
from stage1_pro.policies.certify import Certificate
from stage1_pro.policies.counts import ExitCounts, count_exits, sweep_table
from stage1_pro.policies.ordering import certify_halves, infeasible, record
from stage1_pro.policies.policy import Origin, Policy, risk_of
from stage1_pro.policies.rows import Rows, Unit, groups_in_error
from stage1_pro.policies.target import Target
from stage1_pro.policies.useful import OVERRIDE, Exits, weigh_exits

BOUND_LEVEL = 0.95


@dataclass(frozen=True)
class Chosen:
    """A threshold and what it does on the rows that its figures are of: those kept for the certificate, or all."""

    rows: Rows
    row: SweepRow
    sweep: list[SweepRow]
    exited: NDArray[np.bool_]
    certificate: Certificate | None
    n_tried: int
    weighed: Exits

    @property
    def caution(self) -> str:
        """A sentence on a promise that says nothing and was wanted all the same; empty otherwise."""
        useless = self.weighed.useless if self.certificate is not None else ""
        return f" This promise was wanted although it says nothing (allow_useless): {useless}." if useless else ""

    @property
    def n_errors(self) -> int:
        """Exits that are answered wrongly."""
        return int((self.exited & self.rows.wrong).sum())

    def groups(self, errors: NDArray[np.bool_], among: NDArray[np.bool_]) -> tuple[int, int, float]:
        """Groups in error and all groups among rows [N], with the upper bound of the share at ``BOUND_LEVEL``."""
        names = None if self.rows.groups is None else self.rows.groups[among]
        wrong, n = groups_in_error(errors[among], names)
        return wrong, n, clopper_pearson_upper(wrong, n, level=BOUND_LEVEL)

    def record(self, claims: int, use: int | None, largest_group: int | None = None) -> CertificateRecord | None:
        """The certificate as it is stored."""
        if self.certificate is None:
            return None
        return record(self.certificate, claims=claims, use=use, largest_group=largest_group)

    def fields(self, target: Target, use: int | None, origin: Origin | None) -> dict[str, Any]:
        """What every policy of this package stores of it."""
        rows, row = self.rows, self.row
        return {
            "classes": rows.classes, "positive": rows.positive, "coverage": row.coverage,
            "fnr_on_exited": row.fnr_on_exited, "guarantee": target.guarantee,
            "certificate": self.record(target.claims, use, target.largest), "n_rows": rows.labels.size,
            "n_exited": row.n_exited, "n_positive_exited": row.n_positive_exited,
            "n_false_negative": row.n_false_negative, "grouped": rows.groups is not None,
            "sweep_results": self.sweep, **(origin or Origin()).fields(),
            "useless": "" if self.certificate is None else self.weighed.useless,
            "commonest": self.weighed.commonest, "commonest_rate": self.weighed.rate, "exits_right": self.weighed.right,
        }  # fmt: skip


def choose_exits(
    target: Target,
    rows: Rows,
    score: NDArray[np.float64],
    *,
    best: Callable[[ExitCounts], int],
    lowest: float = 0.0,
    shown: ArrayLike = (),
    called: str = "",
    grid: Grid = "float64",
) -> Chosen:
    """Choose the threshold for a target: certified on the half that chose nothing, or the best on all rows.

    Args:
        target: what is asked of exits, by its ``promises``.
        rows: calibration rows.
        score: [N] what decides, higher is surer.
        best: the index to take where nothing is certified; raises NotReachableError where none will do.
        lowest: lower end of the scores' range.
        shown: thresholds to show beside those of the rows.
        called: the target in messages.
        grid: dtype that scores came in.

    Raises:
        InputError: no halves where something is to be certified.
        NotReachableError: the target cannot be met or certified.
    """
    certificate, n_tried = None, 0
    if target.guarantee == "ltt":
        fit = ~rows.kept_half()
        certificate = _certified(target, rows, score, lowest, grid)
        if not certificate.feasible:
            raise infeasible(certificate, called or target.words(), halved=rows.halved)
        assert certificate.threshold is not None
        rows, score = rows.where(~fit), score[~fit]
        counts = count_exits(rows, score, lowest=lowest, grid=grid)
        row = count_exits(rows, score, [certificate.threshold], lowest=lowest).row(0, rows.labels.size, grid=False)
    else:
        counts = count_exits(rows, score, lowest=lowest, grid=grid)
        row, n_tried = counts.row(best(counts), rows.labels.size, grid=False), counts.threshold.size
    exited = score >= row.threshold
    if int(exited.sum()) != row.n_exited:
        raise AssertionError("the stored threshold does not decide as the sweep did")
    weighed = _weighed(target, rows, exited, "groups" if certificate is None else certificate.unit)
    if weighed.useless and certificate is not None and not target.allow_useless:
        raise NotReachableError(
            f"{called or target.words()} must be a promise that says something, but it is INFEASIBLE: "
            f"{weighed.useless}. Train a better Stage A, or {OVERRIDE}. No policy was written"
        )
    sweep = sweep_table(counts, count_exits(rows, score, shown, lowest=lowest), row, rows.labels.size)
    return Chosen(rows, row, sweep, exited, certificate, n_tried, weighed)


def walked(target: Target, rows: Rows, score: NDArray[np.float64], lowest: float = 0.0) -> tuple[float, bool] | None:
    """The coverage that ``choose_exits`` would certify for a target, and whether that says something; None: neither."""
    certificate = _certified(target, rows, score, lowest, "float64", smallest=False)
    if certificate.threshold is None or certificate.coverage is None:
        return None
    kept = ~rows.fit_half()
    weighed = _weighed(target, rows.where(kept), score[kept] >= certificate.threshold, certificate.unit)
    return certificate.coverage, not weighed.useless


def _weighed(target: Target, rows: Rows, exited: NDArray[np.bool_], unit: Unit) -> Exits:
    asked = target.promises(rows.positive)
    of_one_class = all(one.label is not None for one in asked)
    return weigh_exits(rows, exited, unit, asked[0].limit if of_one_class else None)


def _certified(
    target: Target, rows: Rows, score: NDArray[np.float64], lowest: float, grid: Grid, *, smallest: bool = True
) -> Certificate:
    asked = target.promises(rows.positive)
    assert rows.halves is not None
    return certify_halves(
        score, [risk_of(one, rows) for one in asked if one.quantity != "coverage"], rows.halves,
        delta=target.delta / target.claims, groups=rows.given_groups(), lowest=lowest, smallest=smallest, grid=grid,
        largest_group=target.largest, rows_independent=rows.independent, alike=rows.halved,
        min_coverage=next((one.limit for one in asked if one.quantity == "coverage"), None),
    )  # fmt: skip


def assumed(certificate: Certificate) -> str:
    """What a certificate takes for granted, as a sentence."""
    return f"Provided that {'; '.join(certificate.assumptions)}."


def beside_groups(
    unit: str | None, *seen: tuple[str, int, int, float | None], advice: str = ": --unit photo promises that"
) -> list[str]:
    """Lines on rates of photos beside promises that are of groups; none where they are of photos or there are none.

    Args:
        unit: of the certificate; None: there is none.
        *seen: of each promise what is counted, how many photos of how many, and the rate of groups; a rate that is the
            same is not shown.
        advice: how to have that promised, if it can be.
    """
    if unit not in ("groups", "group_means"):
        return []
    promise = "promised of one photo drawn from a new group; of all photos kept for the certificate"
    return [
        f"{promise} {count} of {n} {what} ({count / n:.2%}), where large groups count more{advice}"
        for what, count, n, rate in seen
        if n and count / n != rate
    ]


def certified_bound(certificate: Certificate) -> str:
    """How the bounds of a certified policy came about, in words."""
    if certificate.unit == "photos":
        return f"betting on sums over groups, one-sided at level {1 - certificate.delta:g}, on what was kept for it"
    drawn = ", one row drawn from each group" if certificate.unit == "groups" else ""
    counts = ", ".join(f"{risk.name} {risk.errors} of {risk.trials}" for risk in certificate.risks)
    return (
        f"Clopper-Pearson, one-sided at level {1 - certificate.delta:g}, on {certificate.unit} kept for the "
        f"certificate{drawn} ({counts})"
    )


# What ``inspect`` shows of a policy of exits; null where it has none.
_FACTS = (
    "certificate", "useless", "coverage", "fnr_on_exited", "fnr_upper_bound", "bound_level", "bound_method",
    "n_positive_groups", "target_fnr", "exit_error", "exit_error_upper_bound", "constraints", "platt",
)  # fmt: skip


class ExitPolicy(Policy):
    """A policy whose promises are of exits alone, with a certificate; what ``choose_exits`` chose."""

    threshold_field: ClassVar[str] = "exit_threshold"

    useless: str = Field("", description="why the promise says nothing, where it was wanted all the same")
    commonest: str | None = Field(None, description="the class of most units that the figures are of")
    commonest_rate: float | None = Field(None, description="its share: how often always answering it would be right")
    exits_right: float | None = Field(None, description="share of exits among these units that are answered rightly")

    if TYPE_CHECKING:
        certificate: CertificateRecord | None
        coverage: float
        sweep_results: list[SweepRow]

    @property
    def own_delta(self) -> dict[str, Any]:
        """Delta of the claim that was certified, and what it is of, as fields of the target."""
        if self.certificate is None:
            return {}
        useless = {"allow_useless": True} if self.useless else {}
        largest = self.certificate.largest_group
        of = {} if largest is None else {"unit": "photo", "largest_group": largest}
        return {"delta": self.certificate.delta, **of, **useless}

    @property
    def claims_made(self) -> tuple[int, int | None]:
        """How many claims delta was divided for, and which of them this is; None when nobody counted."""
        return (1, None) if self.certificate is None else (self.certificate.claims, self.certificate.use)

    @property
    def n_certified(self) -> int:
        """Units that certified it; 0 without a certificate."""
        return 0 if self.certificate is None else self.certificate.n

    @property
    def groups_are_photos(self) -> bool:
        """Whether each photo that certified it was a group of its own."""
        return self.certificate is not None and self.certificate.unit == "rows"

    @property
    def usual_exit_rate(self) -> float | None:
        """Share of calibration rows that exit."""
        return self.coverage

    @property
    def sweep(self) -> list[SweepRow]:
        """Thresholds that were looked at, the chosen one among them."""
        return self.sweep_results

    def assuming(self, *assumptions: str) -> Self:
        """The policy with what else its certificate takes for granted; itself where it has no certificate."""
        if self.certificate is None:
            return self
        more = {"assumptions": [*self.certificate.assumptions, *assumptions]}
        return self.model_copy(update={"certificate": self.certificate.model_copy(update=more)})

    def facts(self) -> dict[str, Any]:
        """Its figures, for ``inspect``."""
        values = {**self.model_dump(mode="json"), "target_fnr": self.fnr_target}
        return {name: values.get(name) for name in _FACTS}

    def measured(self) -> str:
        """Figures on the calibration rows with their bounds, in a line."""
        seen = self.facts()
        level = f"{seen['bound_level'] or 0:.4g} upper bound"
        parts = [f"coverage {self.coverage:.1%}"]
        if seen["exit_error"] is not None:
            asked = self.target.promises(self.positive)
            limit = next((f"; wished {one.limit:.2%}" for one in asked if one.quantity == "exit error"), "")
            parts.append(f"exit error {seen['exit_error']:.2%} ({level} {seen['exit_error_upper_bound']:.2%}{limit})")
        if seen["fnr_on_exited"] is not None:
            notes = [f"{level} {seen['fnr_upper_bound']:.2%}"] if seen["fnr_upper_bound"] is not None else []
            notes.append(f"{seen['n_positive_groups']} positive groups")
            if self.fnr_target is not None:
                notes.append(f"target {self.fnr_target:.2%}")
            parts.append(f"FNR on exits {seen['fnr_on_exited']:.2%} ({'; '.join(notes)})")
        return ", ".join(parts) + ("" if self.certificate else "; bounds are not corrected for the search")

    def _stricter(self, threshold: float, statement: str) -> Self:
        changed = {"guarantee": "none", "certificate": None, "statement": statement}
        return self.model_copy(update={self.threshold_field: threshold, **changed})
