"""The threshold of an exit policy: certified in a frozen order, or the best on all rows. NumPy only."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from stage1_pro.arguments import Grid, choice
from stage1_pro.errors import InputError, NotReachableError
from stage1_pro.metrics.binomial import clopper_pearson_upper
from stage1_pro.policies.bounds import exact
from stage1_pro.policies.by_answer import COMMON, AnswerCell, best_cells, certify_cells, scaled
from stage1_pro.policies.candidates import Mix, Risk
from stage1_pro.policies.certificate import CertificateRecord, PromiseCheck, SweepRow
from stage1_pro.policies.certify import Certificate
from stage1_pro.policies.checks import check_claim, unjudged
from stage1_pro.policies.counts import ExitCounts, count_exits, meets, sweep_table
from stage1_pro.policies.ordering import certify_halves, infeasible, record
from stage1_pro.policies.policy import Checked, Origin, Policy, risk_of
from stage1_pro.policies.rows import Rows, Unit, counting_unit, groups_in_error, one_each
from stage1_pro.policies.target import OfExits, Target
from stage1_pro.policies.useful import OVERRIDE, Exits, weigh_exits
from stage1_pro.record import Record

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
    mix: dict[str, float] | None = None
    cells: list[AnswerCell] | None = None  # where each answer has a threshold of its own

    @property
    def caution(self) -> str:
        """A sentence on a promise that says nothing and was wanted all the same; empty otherwise."""
        useless = self.weighed.useless if self.certificate is not None else ""
        return f" This promise was wanted although it says nothing (allow_useless): {useless}." if useless else ""

    @property
    def mixed(self) -> str:
        """A sentence on the mix of classes, where another one was asked for than they came in; empty otherwise."""
        if self.mix is None:
            return ""
        seen = np.bincount(self.rows.labels, minlength=len(self.mix)) / self.rows.labels.size
        told = (
            f"'{name}' {share:.1%} (here {here:.1%})"
            for (name, share), here in zip(self.mix.items(), seen, strict=True)
        )
        return f" The mix: {', '.join(told)}."

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
        made = record(self.certificate, claims=claims, use=use, largest_group=largest_group)
        return made if self.mix is None else made.model_copy(update={"mix": self.mix, "mix_of": self.rows.positive})

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
            **({} if self.cells is None else {"cells": self.cells}),
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
        grid: dtype that scores came in.

    Raises:
        InputError: no halves where something is to be certified.
        NotReachableError: the target cannot be met or certified.
    """
    if isinstance(target, OfExits) and target.by is not None:
        return _by_answer(target, rows, score, lowest, grid)
    certificate, n_tried, mix = None, 0, None
    if target.guarantee == "ltt":
        fit = ~rows.kept_half()
        mix = mix_of(target, rows)
        certificate = _certified(target, rows, score, lowest, grid)
        if not certificate.feasible:
            raise infeasible(certificate, target.words(), halved=rows.halved)
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
    weighed = _useful(target, rows, exited, certificate, mix)
    sweep = sweep_table(counts, count_exits(rows, score, shown, lowest=lowest), row, rows.labels.size)
    named = None if mix is None else dict(zip(rows.classes, mix.shares.tolist(), strict=True))
    return Chosen(rows, row, sweep, exited, certificate, n_tried, weighed, named)


def _useful(
    target: Target, rows: Rows, exited: NDArray[np.bool_], certificate: Certificate | None, mix: Mix | None = None
) -> Exits:
    """How right exits are; raises NotReachableError where a certificate of them says nothing and that is not wanted."""
    weighed = _weighed(target, rows, exited, "groups" if certificate is None else certificate.unit, mix)
    if weighed.useless and certificate is not None and not target.allow_useless:
        raise NotReachableError(
            f"{target.words()} must be a promise that says something, but it is INFEASIBLE: "
            f"{weighed.useless}. Train a better Stage A, or {OVERRIDE}. No policy was written"
        )
    return weighed


def _by_answer(target: OfExits, rows: Rows, score: NDArray[np.float64], lowest: float, grid: Grid) -> Chosen:
    """The threshold of each answer, and the scores that all of them share; see ``by_answer``."""
    limit, certificate = target.exit_error, None
    assert limit is not None
    if target.guarantee == "ltt":
        cells, certificate = certify_cells(rows, score, limit, target.delta / target.claims, lowest=lowest, grid=grid)
        kept = rows.kept_half()
        part, own = rows.where(kept), score[kept]
    else:
        part, own, cells = rows, score, best_cells(rows, score, limit, lowest=lowest, grid=grid)
    if all(cell.threshold is None for cell in cells):
        raise NotReachableError(
            f"{target.words()} must be reachable for one answer at least, but it is INFEASIBLE: "
            f"{'; '.join(map(str, cells))}. Train a better Stage A, bring more photos, or ask for less. No policy was "
            "written"
        )
    common = scaled(cells, part.probs, own)
    row = count_exits(part, common, [COMMON], lowest=0.0).row(0, part.labels.size, grid=False)
    exited = common >= COMMON
    return Chosen(part, row, [row], exited, certificate, 0, _useful(target, part, exited, certificate), cells=cells)


def walked(target: Target, rows: Rows, score: NDArray[np.float64], lowest: float = 0.0) -> tuple[float, bool] | None:
    """The coverage that ``choose_exits`` would certify for a target, and whether that says something; None: neither."""
    certificate = _certified(target, rows, score, lowest, "float64", smallest=False)
    if certificate.threshold is None or certificate.coverage is None:
        return None
    kept = ~rows.fit_half()
    exited = score[kept] >= certificate.threshold
    weighed = _weighed(target, rows.where(kept), exited, certificate.unit, mix_of(target, rows))
    return certificate.coverage, not weighed.useless


def mix_of(target: Target, rows: Rows) -> Mix | None:
    """The mix of classes that a target is for, of all rows: others than the class share the rest as they certify."""
    prior = target.served_prior
    if prior is None:
        return None
    of = next(one.prior_of for one in target.promises(rows.positive) if one.prior_of is not None)
    kept = ~rows.fit_half()
    drawn = one_each(None if rows.groups is None else rows.groups[kept], np.ones(int(kept.sum()), dtype=bool), 0)
    mix = Mix.at(
        prior, rows.classes.index(choice("fnr_class", of, rows.classes)), rows.labels[kept][drawn], len(rows.classes)
    )
    return replace(mix, labels=rows.labels)


def _weighed(target: Target, rows: Rows, exited: NDArray[np.bool_], unit: Unit, mix: Mix | None) -> Exits:
    asked = [one for one in target.promises(rows.positive) if one.quantity != "coverage"]
    if all(one.quantity == "cascade error" for one in asked):
        # What it answers is every photo, each by the stage that does.
        assert rows.probs_b is not None
        answered = np.where(exited[:, None], rows.probs, rows.probs_b)
        rows, exited = replace(rows, probs=answered), np.ones(exited.size, dtype=bool)
    of_one_class = all(one.label is not None for one in asked)
    shares = None if mix is None else mix.shares
    return weigh_exits(rows, exited, unit, asked[0].limit if of_one_class else None, shares=shares)


def _certified(
    target: Target, rows: Rows, score: NDArray[np.float64], lowest: float, grid: Grid, *, smallest: bool = True
) -> Certificate:
    asked = target.promises(rows.positive)
    assert rows.halves is not None
    return certify_halves(
        score, _risks(target, rows), rows.halves,
        delta=target.delta / target.claims, groups=rows.given_groups(), lowest=lowest, smallest=smallest, grid=grid,
        largest_group=target.largest, rows_independent=rows.independent, alike=rows.halved,
        min_coverage=next((one.limit for one in asked if one.quantity == "coverage"), None), mix=mix_of(target, rows),
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
    "n_positive_groups", "cells", "target_fnr", "exit_error", "exit_error_upper_bound", "constraints", "platt",
    "limits",
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
        of: dict[str, Any] = {} if largest is None else {"unit": "photo", "largest_group": largest}
        if self.mix is not None:
            name = self.certificate.mix_of
            assert name is not None
            of |= {"prior": self.mix[name]} | ({} if name == self.positive else {"fnr_class": name})
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
    def mix(self) -> dict[str, float] | None:
        """Share of each class that it promises for."""
        return None if self.certificate is None else self.certificate.mix

    @property
    def usual_exit_rate(self) -> float | None:
        """Share of calibration rows that exit, in the mix of classes that was asked for."""
        made = self.certificate
        return self.coverage if made is None or made.mix is None else made.coverage

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
            notes = [] if seen["exit_error_upper_bound"] is None else [f"{level} {seen['exit_error_upper_bound']:.2%}"]
            notes += [f"wished {one.limit:.2%}" for one in asked if one.quantity == "exit error"]
            parts.append(f"exit error {seen['exit_error']:.2%}" + (f" ({'; '.join(notes)})" if notes else ""))
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


class Limits(Record):
    """What exits were asked for beside what the policy file of the first version had a place for; null = not."""

    exit_error: float | None = Field(None, gt=0, lt=1)
    fnr_class: str | None = None
    cascade_error: float | None = Field(None, gt=0, lt=1)
    disagreement: float | None = Field(None, gt=0, lt=1)
    least_coverage: float | None = Field(None, gt=0, lt=1)
    by: Literal["class"] | None = None

    @classmethod
    def of(cls, target: OfExits) -> Limits:
        """Those of a target."""
        found = cls(**{name: getattr(target, name) for name in cls.model_fields})
        # Of a mix of classes the certificate knows it.
        return found if target.fnr is not None else found.model_copy(update={"fnr_class": None})

    def asked(self) -> dict[str, Any]:
        """The same as fields of a target."""
        return self.model_dump()


class ByLimits(ExitPolicy):
    """A policy of exits that is asked for limits of risks and a least coverage, whatever its score is."""

    exit_error: float | None = Field(None, ge=0, le=1, description="null in files of the first version")
    exit_error_upper_bound: float | None = Field(
        None, ge=0, le=1, description="null where a certificate is of other risks"
    )
    fnr_on_exited: float | None = Field(ge=0, le=1, description="of fnr_class; null when none of it exits")
    fnr_upper_bound: float | None = Field(
        None, ge=0, le=1, description="null when none of the class exits, or a certificate is of other risks"
    )
    bound_level: float = Field(gt=0, lt=1)
    bound_method: str
    n_errors: int | None = None
    unlabelled: str = Field(
        "",
        description="fingerprint of the photos from outside the splits that certified it, without labels or labelled "
        "until it was proven; empty: it was val_calib",
    )
    n_exited_groups: int | None = None
    n_positive_groups: int
    cells: list[AnswerCell] | None = Field(
        None, description="a threshold for each answer; scores are scaled to a common one then. null: one for all"
    )

    if TYPE_CHECKING:
        n_rows: int
        n_exited: int
        n_positive_exited: int
        n_false_negative: int

    @classmethod
    def chosen(
        cls,
        target: OfExits,
        rows: Rows,
        score: NDArray[np.float64],
        *,
        use: int | None,
        origin: Origin | None,
        **how: Any,
    ) -> tuple[Chosen, dict[str, Any]]:
        """The threshold of largest coverage under all limits at once, and the fields that every such policy stores.

        ``ltt``: candidates and their order come from the fit rows, the others test them in a fixed sequence by exact
        binomials, by group, and figures are those of the others. ``none``: the best on all rows, compared in exact
        integers; it promises nothing.

        Args:
            target: what is asked for.
            rows: calibration rows.
            score: [N] what decides, higher is surer.
            use: which of the claims this is.
            origin: of the rows.
            **how: further arguments of ``choose_exits``.

        Raises:
            InputError: an argument is not what it must be.
            NotReachableError: the target cannot be met or certified.
        """
        about = rows
        if target.fnr_class is not None:
            about = replace(rows, positive=choice("fnr_class", target.fnr_class, rows.classes))
        found = choose_exits(target, about, score, best=lambda counts: _laxest(target, about, score, counts), **how)
        fields = {**found.fields(target, use, origin), **_said(found, target), "positive": rows.positive}
        fields["exit_error"] = found.n_errors / found.row.n_exited
        if rows.unlabelled:
            # Whatever takes labels was counted against Stage B's answers.
            unknown = ("exit_error", "exits_right", "commonest", "commonest_rate", "fnr_on_exited", "n_errors")
            fields |= dict.fromkeys(unknown)
            blank = {"fnr_on_exited": None, "exit_accuracy": None}
            fields["sweep_results"] = [row.model_copy(update=blank) for row in found.sweep]
        return found, fields

    @classmethod
    @abstractmethod
    def scored(cls, rows: Rows) -> tuple[NDArray[np.float64], float]:
        """What decides for rows of which the fit half may fix it: scores [N], higher is surer, and their least value.

        Raises:
            InputError: rows lack what it is made of.
        """

    @classmethod
    @abstractmethod
    def made(cls, target: Any, rows: Rows, threshold: float, fields: Mapping[str, Any], accuracy: float | None) -> Self:
        """The policy of a threshold, with what it has beside ``fields``, which all such policies store.

        Args:
            target: what was asked for.
            rows: of which the fit half may fix scores.
            threshold: that was found.
            fields: as ``chosen`` gives them.
            accuracy: share of exits that are answered rightly; None: unknown.
        """

    @property
    def outside(self) -> str:
        """Fingerprint of the photos from outside the splits that certified it."""
        return self.unlabelled

    @property
    def _fnr_class(self) -> str | None:
        asked = self.target.promises(self.positive)
        return next((one.label for one in asked if one.label is not None), self.positive)

    def check(self, rows: Rows) -> Checked:
        """The same, for each answer that has a threshold of its own; what other photos certified is not judged here."""
        checked = super().check(rows) if self.cells is None else Checked(self._check_cells(rows, self.cells))
        return checked if not self.unlabelled else replace(checked, promises=unjudged(checked.promises))

    def _check_cells(self, rows: Rows, cells: Sequence[AnswerCell]) -> list[PromiseCheck]:
        exited, answer = self.exits(rows.probs, rows.gate), rows.probs.argmax(axis=1)
        _, names = counting_unit(rows.groups, rows.labels.size, "auto", False)
        drawn = one_each(names, np.ones(rows.labels.size, dtype=bool), 0)
        limit, found = self.target.promises(self.positive)[0].limit, []
        named = [place for place, cell in enumerate(cells) if cell.threshold is not None]
        for place in named:
            trials = exited & (answer == place)
            among, wrong = drawn[trials[drawn]], rows.wrong & trials
            name = f"exit error of '{cells[place].name}'"
            check = check_claim(name, int(wrong[among].sum()), among.size, limit, drawn.size, len(named))
            photos = {"photo_errors": int(wrong.sum()), "photo_trials": int(trials.sum())}
            found.append(check if names is None else check.model_copy(update=photos))
        return found if self.promises else unjudged(found)

    def _by_answer(self, probs: ArrayLike, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Scores [N] as they are compared: those given, or scaled where each answer has a threshold of its own."""
        return scores if self.cells is None else scaled(self.cells, self.check_probs(probs), scores)

    def _check_one_threshold(self) -> None:
        if self.cells is not None:
            raise InputError(
                "policy must have one threshold for the compiled router, got one for each answer; serve with Cascade"
            )

    def _rule_by_answer(self, cells: Sequence[AnswerCell]) -> str:
        tightened = "" if self.exit_threshold == COMMON else f", tightened to {self.exit_threshold:.6g} on their scale"
        limits = {one.name: "never" if one.threshold is None else f"{one.threshold:.6g}" for one in cells}
        named = "; ".join(f"'{name}' {limit}" for name, limit in limits.items())
        return f"exit when {self.score_title} is at or above the threshold of its answer: {named}{tightened}"

    def found(self) -> list[str]:
        """What exits, what is seen of photos where groups are promised, and what the promise does not bound."""
        error = "" if self.exit_error is None else f", exit error {self.exit_error:.2%}"
        cells = [] if self.cells is None else [f"  {cell}" for cell in self.cells]
        return [f"coverage {self.coverage:.1%}{error}", *cells, *self._beside(), *self._unbound()]

    def _beside(self) -> list[str]:
        """What is seen of photos where groups are promised."""
        made = self.certificate
        if made is None or made.method == "sequential":  # likely errors were labelled more often
            return []
        photos = {
            "exit error": ("exits are wrong", self.n_errors or 0, self.n_exited),
            "FNR on exits": (
                f"exited photos of '{self._fnr_class}' are missed", self.n_false_negative,
                self.n_positive_exited,
            ),
        }  # fmt: skip
        seen = [
            (*photos[one.name], one.errors / one.trials if one.trials else None)
            for one in made.risks
            if one.name in photos
        ]
        return beside_groups(made.unit, ("exit", self.n_exited, self.n_rows, made.accepted / made.n), *seen)

    def _unbound(self) -> list[str]:
        """What a limit of one class alone does not bound."""
        asked = [one for one in self.target.promises(self.positive) if one.quantity != "coverage"]
        if any(one.label is None for one in asked) or self.exits_right is None or self.commonest_rate is None:
            return []
        said = (
            f"nothing is promised of exits that are wrong in another way than missing '{self._fnr_class}': "
            f"{self.exits_right:.1%} of the exits are right; always answering '{self.commonest}' would be right in "
            f"{self.commonest_rate:.1%}"
        )
        return [said]


_COUNTED = {
    "exit error": "of {m} exits {k} were wrong",
    "FNR on exits": "of {m} exited {unit} of '{label}' {k} were missed",
    "cascade error": "of {m} {unit} the cascade answered {k} wrongly",
    "disagreement": "of {m} exits Stage B would have answered {k} otherwise",
}


def _risks(target: Target, rows: Rows) -> list[Risk]:
    return [risk_of(one, rows) for one in target.promises(rows.positive) if one.quantity != "coverage"]


def _said(found: Chosen, target: Target) -> dict[str, Any]:
    """The statement of a threshold, its bounds with how they came about, and the groups that are behind them."""
    rows, row, certificate, unit = found.rows, found.row, found.certificate, found.rows.unit
    wrong, n, bound = found.groups(rows.wrong, found.exited)
    missed, n_positive, fnr_bound = found.groups(
        rows.missed(rows.positive), found.exited & rows.is_class(rows.positive)
    )
    counts = {"n_errors": found.n_errors, "n_exited_groups": n, "n_positive_groups": n_positive}
    risks = _risks(target, rows)

    def told(counted: Iterable[tuple[int, int]], unit: str) -> str:
        return "; ".join(
            _COUNTED[risk.name].format(k=k, m=m, unit=unit, label=rows.positive)
            for risk, (k, m) in zip(risks, counted, strict=True)
        )

    outcomes = [risk.outcomes(found.exited) for risk in risks]
    of_photos = [(int(errors.sum()), int(trials.sum())) for errors, trials in outcomes]
    if certificate is not None and found.cells is not None:
        return counts | {
            "statement": (
                f"{certificate.guarantee} {certificate.accepted} of {certificate.n} {unit} of those kept for the "
                f"certificate exited. They chose nothing. {assumed(certificate)}{found.caution}"
            ),
            "exit_error_upper_bound": certificate.risk_bound, "fnr_upper_bound": None,
            "bound_level": 1 - certificate.delta, "bound_method": certified_bound(certificate),
        }  # fmt: skip
    if certificate is not None:
        bounds = {one.name: one.bound for one in certificate.risks}
        out, n_all, seen = certificate.accepted, certificate.n, [(one.errors, one.trials) for one in certificate.risks]
        if certificate.unit == "photos":
            out, n_all, seen, unit = row.n_exited, rows.labels.size, of_photos, "photos"
        return counts | {
            "statement": (
                f"{certificate.guarantee}{found.mixed} {out} of {n_all} {unit} of those kept for the certificate "
                f"exited; {told(seen, unit)}. They chose nothing. {assumed(certificate)}{found.caution}"
            ),
            "exit_error_upper_bound": bounds.get("exit error"),
            "fnr_upper_bound": bounds.get("FNR on exits") if row.n_positive_exited else None,
            "bound_level": 1 - certificate.delta,
            "bound_method": certified_bound(certificate),
        }
    shown = {"exit error": (bound, n), "FNR on exits": (fnr_bound, n_positive)}
    asked = [(risk.name, *shown[risk.name]) for risk in risks if risk.name in shown]
    upper = "; ".join(f"of the {name} with {of} {unit}: {100 * value:.1f}%" for name, value, of in asked)
    best = "" if found.cells is not None else f" as the best of {found.n_tried}"
    groups = "" if rows.groups is None else "; a group is an error when any of its exited rows is"
    return counts | {
        "statement": (
            f"Empirical choice, no guarantee: nothing is promised for new images. Of {rows.labels.size} calibration "
            f"rows {row.n_exited} exit ({n} {unit}, taken as independent); {told(of_photos, 'rows')}. The threshold "
            f"was chosen on the same rows{best}, so this looks better than it is."
            + (f" 95% upper bound {upper}, not corrected for that search." if upper else "")
        ),
        "exit_error_upper_bound": bound,
        "fnr_upper_bound": fnr_bound if row.n_positive_exited else None,
        "bound_level": BOUND_LEVEL,
        "bound_method": (
            f"Clopper-Pearson, one-sided, on exited {unit}{groups} (wrong {wrong} of {n}"
            + ("" if rows.positive is None else f"; of '{rows.positive}' missed {missed} of {n_positive}")
            + "); not corrected for the choice on the same rows"
        ),
    }


def _laxest(target: OfExits, rows: Rows, score: NDArray[np.float64], counts: ExitCounts) -> int:
    """The laxest threshold that meets every limit on these rows, in exact integers."""
    n, everyone = rows.labels.size, np.arange(rows.labels.size)
    wish = f"{target.words()} must be reachable on the calibration rows, but"
    least = target.least_coverage
    covered = counts.n_exited >= (1 if least is None else math.ceil(exact(least) * n))
    good, rates = covered.copy(), []
    for risk in _risks(target, rows):
        among = everyone if risk.trials is None else np.flatnonzero(risk.trials)
        if among.size == 0:
            raise NotReachableError(
                f"{wish} none of the {n} rows is of the class '{rows.positive}', so FNR on exits is undefined; "
                "calibrate on rows that hold some. No policy was written"
            )
        k, m = risk.tally(score, counts.threshold, among)
        good &= meets(k, m, risk.alpha)
        with np.errstate(invalid="ignore", divide="ignore"):
            rates.append((risk, k, m, np.where(covered & (m > 0), k / m, np.inf)))
    reached = np.flatnonzero(good)
    if reached.size:
        return int(reached[-1])
    if not covered.any():
        raise NotReachableError(
            f"{wish} the largest coverage is {counts.n_exited[-1] / n:.4g}: the other scores are not finite; train "
            "again. No policy was written"
        )
    # The risk that is furthest from its limit says why.
    risk, k, m, rate = max(rates, key=lambda one: float(one[3].min()) / one[0].alpha)
    # Of equal rates the one with the largest coverage, which is the last.
    best = int(rate.size - 1 - rate[::-1].argmin())
    raise NotReachableError(
        f"{wish} the smallest {risk.name}{'' if least is None else ' at that coverage'} is {rate[best]:.4g} "
        f"({int(k[best])} of {int(m[best])}), at threshold {counts.threshold[best]:.6g} with coverage "
        f"{counts.n_exited[best] / n:.4g}. Train a better Stage A, or accept a larger error or a smaller coverage. No "
        "policy was written"
    )
