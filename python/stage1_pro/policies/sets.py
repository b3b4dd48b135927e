"""The scrc policy: after the cascade, a set of labels for what is accepted; nobody answers the rest. NumPy only.

``ScrcParams.answer`` is the one rule of cascade, evaluation and router. The statistics are those of ``scrc.SCRC``.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator
from scipy.special import logit

from stage1_pro.arguments import binary, floats
from stage1_pro.classes import index_of
from stage1_pro.errors import InputError, NotReachableError
from stage1_pro.files import sha256_bytes
from stage1_pro.policies.bounds import selection_rank
from stage1_pro.policies.certificate import NOT_COUNTED, Cell, Outcome, PhotoCounts, SetCheck, SetRates
from stage1_pro.policies.checks import unjudged
from stage1_pro.policies.counts import count_exits, meets
from stage1_pro.policies.exiting import beside_groups
from stage1_pro.policies.gate import ByGate
from stage1_pro.policies.planning import Planned, PlanTerms
from stage1_pro.policies.platt import fit_platt, score
from stage1_pro.policies.policy import Checked, Origin
from stage1_pro.policies.rows import Rows
from stage1_pro.policies.scrc import SCRC, FittedSCRC, nonconformity
from stage1_pro.policies.softmax import confidence
from stage1_pro.policies.target import Scrc, Variant
from stage1_pro.policies.useful import OVERRIDE

# Above every P(correct): a threshold here lets nobody exit.
NOBODY_EXITS = float(np.nextafter(1.0, 2.0))
GUARANTEES: dict[Variant, Literal["none", "pac", "expectation"]] = {
    "pac": "pac", "I": "expectation", "T": "expectation", "naive": "none",
}  # fmt: skip
# Limits are stored this much above the certified ones, far above the rounding between runtimes: sets only grow.
LIMIT_SLACK = 1e-6
# A logit of a probability beyond these is the rounding of softmax.
_CLIP = 1e-12
# Far above the rounding between batch shapes (1e-7), far below what anybody calibrates to.
_NEAR, _NEAR_LOGIT = 1e-5, 1e-3
_STAGES = ("A", "B")
# What a target and its policy have under the same name.
_ASKED = ("alpha", "variant", "loss", "score", "cells", "allow_empty", "raps", "max_exit_error")
# What a policy has of the statistics.
_CERTIFIED = ("rank", "n", "unit", "seed", "accepted", "coverage", "coverage_bound")


class ScrcParams(ByGate):
    """``scrcparams.json``: selective conformal risk control after the cascade.

    An image exits at Stage A iff ``sigmoid(a * gate_logit + b)``, in float64, is at or above ``exit_threshold``; else
    Stage B answers. P(answer correct) is that score where it exits and ``sigmoid(a_b * logit + b_b)`` otherwise, of the
    logit of Stage B's largest probability. The image is accepted iff it is at or above ``lambda_1``, and then gets the
    set of classes whose nonconformity is at or below its cell's limit in ``lambda_2``; otherwise nobody answers.

    Both Platt scalings and the exit rule come from rows that certify nothing, ``lambda_1``, ``lambda_2`` and all counts
    and bounds from those kept for the certificate. ``calibrator_fingerprint`` is recomputed on reading: other numbers
    void the certificate.
    """

    file: ClassVar[str] = "scrcparams.json"
    asks: ClassVar[type[Scrc]] = Scrc
    abstains: ClassVar[bool] = True
    # What was certified is the whole cascade behind this very exit rule; of exits alone nothing was.
    steerable: ClassVar[bool] = False

    policy: Literal["scrc"] = "scrc"
    exit_threshold: float = Field(ge=0, le=NOBODY_EXITS, description="just above 1: nobody exits")
    max_exit_error: float = Field(gt=0, lt=1, description="what the exit rule was asked for, on the rows that fit it")
    exit_error: float | None = Field(ge=0, le=1, description="of the rows that fit it; null when nobody exits")
    exit_rate: float = Field(ge=0, le=1, description="of the same rows")
    a_b: float
    b_b: float
    platt_b: str = Field(description="how a_b and b_b came about")
    alpha: float = Field(gt=0, lt=1, description="largest risk among the accepted")
    xi: float = Field(gt=0, lt=1, description="least share accepted")
    delta: tuple[float, float] = Field(description="chance of failure of selection and risk, divided by claims")
    variant: Literal["pac", "I", "T", "naive"]
    loss: Literal["miscoverage", "fnr"] = Field(description="miscoverage: the set misses the label; fnr: of positives")
    score: Literal["lac", "aps", "raps"]
    cells: Literal["stage", "class"] | None = Field(description="what has a limit of its own; null: one for all")
    allow_empty: bool
    raps: tuple[float, int] = Field(description="penalty for each rank beyond the second number")
    lambda_1: float = Field(description="accepted iff P(answer correct) is at or above it")
    lambda_2: list[Cell] = Field(min_length=1)
    rank: int = Field(
        ge=1, description="of the certify units' scores: the last one accepted (pac), or the first one that is not"
    )
    n: int = Field(ge=1, description="units kept for the certificate")
    unit: Literal["rows", "groups"]
    seed: int = Field(description="of the row that speaks for its group")
    accepted: int = Field(ge=0, description="of them")
    coverage: float = Field(ge=0, le=1, description="accepted / n")
    coverage_bound: float | None = Field(description="lower, at 1 - delta[0]; null for T and naive")
    risk_bound: float = Field(ge=0, le=1, description="the largest of all cells")
    fnr_bound: float | None = Field(
        ge=0, le=1, description="of accepted positives whose set lacks the positive; null where cells do not tell it"
    )
    guarantee: Literal["none", "pac", "expectation"]
    statement: str
    assumptions: list[str]
    useless: str = Field("", description="why the sets tell nothing, where they were wanted all the same")
    of_photos: PhotoCounts | None = Field(
        None, description="of all photos kept for the certificate, where groups count"
    )
    claims: int = Field(ge=1, description="how many claims delta was divided for, before the first")
    certify_uses: int | None = Field(
        description="which claim on the rows kept for the certificate this is; null when nobody counted"
    )
    n_fit_rows: int
    grouped: bool
    split_hashes: dict[str, str]
    model_fingerprint: str | None = Field(default=None, description="of all weights, the gate's among them")
    preprocessing_fingerprint: str | None = None
    calibrator_fingerprint: str = Field(description="sha256 over everything else here")

    @classmethod
    def fit(cls, target: Scrc, rows: Rows, *, use: int | None = None, origin: Origin | None = None) -> Self:
        """Fit both Platt scalings and the exit rule on the fit rows, and both risk-controlled thresholds on the others.

        The exit rule is the laxest one whose exit error on the fit rows is at most ``max_exit_error``, in exact
        integers; where there is none nobody exits. It may be poor without harm: what is promised is counted on the
        others, on what this very cascade answers there. Stage B's scaling sees the deferred ones of the fit rows,
        all of them where those are answered only rightly or only wrongly. Without gate logits the logit of Stage A's
        largest probability stands in; without Stage B there is one stage, which answers deferred rows too.

        A fifth of delta is for the selection, the rest for the risk. See ``Policy.fit``.
        """
        target.promises(rows.positive)  # refuses what needs a positive class
        fit = rows.fit_half() if target.variant == "naive" else ~rows.kept_half()
        first = _answer_fit_half(rows, fit, target.max_exit_error)
        delta = (target.delta / 5 / target.claims, 4 * target.delta / 5 / target.claims)
        wish = _wish(target, target.min_coverage, delta, index_of(rows.classes, rows.positive))
        found = _calibrate(wish, first, rows, fit)
        if not found.feasible:
            raise found.infeasible()
        if found.useless and not target.allow_useless:
            raise NotReachableError(
                f"{target.words()} must be a promise that says something, but it is INFEASIBLE: {found.useless}. Train "
                f"a better model, or {OVERRIDE}. No policy was written"
            )
        nobody_exits = first.fields["exit_threshold"] == NOBODY_EXITS
        _check_stages(found, {"B"} if nobody_exits else {*_STAGES})
        limits = [cell.model_copy(update={"limit": (cell.limit or 0.0) + LIMIT_SLACK}) for cell in found.cells]
        bound = max(cell.bound for cell in limits)
        fnr = next((cell.bound for cell in limits if target.cells == "class" and cell.name == rows.positive), None)
        return cls.seal(
            classes=rows.classes,
            positive=rows.positive,
            **first.fields,
            **{name: getattr(target, name) for name in _ASKED},
            **{name: getattr(found, name) for name in _CERTIFIED},
            xi=target.min_coverage,
            delta=delta,
            lambda_1=found.threshold,
            lambda_2=limits,
            risk_bound=bound,
            fnr_bound=bound if target.loss == "fnr" else fnr,
            guarantee=GUARANTEES[target.variant],
            statement=_statement(found, limits),
            useless=found.useless,
            of_photos=_of_photos(found, first, rows, ~fit) if found.unit == "groups" else None,
            assumptions=[*found.assumptions, *([NOT_COUNTED] if use is None and target.variant != "naive" else [])],
            claims=target.claims,
            certify_uses=use if target.variant != "naive" else None,
            n_fit_rows=int(fit.sum()),
            grouped=rows.groups is not None,
            **(origin or Origin()).fields(),
        )

    @classmethod
    def planned(cls, terms: PlanTerms) -> Planned:
        """Both scalings and the exit rule of the fit rows, rank and budgets of the others; see ``Policy.planned``.

        Of the least share alone: the threshold that accepts more is chosen so that it certifies as often.
        """
        least, (selection, risk), several = terms.min_coverage, terms.delta, len(terms.cells) > 1
        most = Scrc.model_fields["max_exit_error"].default

        def certifies(rows: Rows, alpha: float) -> tuple[float, bool] | None:
            fit, first = rows.fit_half(), _answer_fit_half(rows, rows.fit_half(), most)
            wish = SCRC(least, alpha, (selection, risk), groups="class" if several else None)
            found = wish.calibrate(
                first.probs[~fit], first.correct[~fit], rows.labels[~fit],
                groups=None if rows.groups is None else rows.groups[~fit],
            )  # fmt: skip
            single = 1 - 1 / len(rows.classes)  # a limit up to here lets no second class in
            wide = terms.one_class and any((cell.limit or 0.0) > single for cell in found.cells)
            return None if wide or not found.feasible else (found.accepted / found.n, not found.useless)

        def most_trials(n: int) -> int:
            return math.floor((selection_rank(n, least, selection) or 0) * min(terms.cells))

        each = f", in each of {len(terms.cells)} classes" if several else ""
        said = [f"classes hold shares of {', '.join(f'{share:.3g}' for share in terms.cells)}"] if several else []
        if terms.one_class:
            said.append(
                "it succeeds where every set that is certified has one class with the least share accepted; more is "
                "accepted where val_select says that one class each will still do"
            )
        return Planned(
            least * min(terms.cells), risk / len(terms.cells), certifies, most_trials,
            wish=f"at least {100 * least:g}% accepted and the label outside the set in at most "
            f"{100 * terms.alpha:g}% of those{each} (scrc, pac)",
            assumptions=said, coverage=(least, selection),
        )  # fmt: skip

    # ------------------------------------------------------------------------ what it decides

    def answer(
        self, probs: ArrayLike, exited: ArrayLike, gate_logits: ArrayLike | None = None
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Give sets, empty where nobody answers, and what is accepted; see ``Policy.answer``."""
        values = floats("probs", probs)
        correct = self.p_correct(values, exited, gate_logits)
        if self.cells != "stage":
            return self.statistics.predict_sets(values, correct)
        stage = np.where(binary("exited", exited), *_STAGES)
        # Only who is made to exit can be of a stage that never answered: nobody knows its risk.
        unknown = ~np.isin(stage, [cell.name for cell in self.lambda_2])
        correct[unknown], stage[unknown] = np.nan, self.lambda_2[0].name
        return self.statistics.predict_sets(values, correct, stage)

    def p_correct(self, probs: ArrayLike, exited: ArrayLike, gate_logits: ArrayLike | None) -> NDArray[np.float64]:
        """Give P(answer correct) [N] of the stage that answered; NaN where it gave no number; see ``Policy.answer``."""
        values, out = self.check_probs(probs), binary("exited", exited)
        gate_logits = None if gate_logits is None else floats("gate_logits", gate_logits)
        if gate_logits is None or gate_logits.shape != values.shape[:1] or out.shape != values.shape[:1]:
            got = "None" if gate_logits is None else list(gate_logits.shape)
            raise InputError(
                f"exited and gate_logits must have shape [{len(values)}] for the scrc policy, got {list(out.shape)} "
                f"and {got}; give one of each per row"
            )
        found: NDArray[np.float64] = np.where(
            out, score(gate_logits, self.a, self.b), score(confidence_logit(values), self.a_b, self.b_b)
        )
        return found

    def near(self, probs: ArrayLike, exited: ArrayLike, gate_logits: ArrayLike | None = None) -> NDArray[np.bool_]:
        """Say which rows [N] lie so near the selection threshold or a limit that rounding could decide; ``close``."""
        values = floats("probs", probs)
        found = close(self.p_correct(values, exited, gate_logits), self.lambda_1)
        known = np.flatnonzero(np.isfinite(values).all(axis=1))
        scores = nonconformity(self.statistics.scrc, values[known])
        if not self.allow_empty:
            # The most probable class is in whatever its limit.
            scores[values[known] == values[known].max(axis=1, keepdims=True)] = np.nan
        for k, limit in enumerate(self.statistics.limits.tolist()):
            # Near the limit of another stage only costs time.
            column = slice(k, k + 1) if self.cells == "class" else slice(None)
            found[known] |= close(scores[:, column], limit).any(axis=1)
        return found

    @property
    def statistics(self) -> FittedSCRC:
        """The statistics behind the record, ready to predict and to verify."""
        return FittedSCRC(
            _wish(self, self.xi, self.delta, index_of(self.classes, self.positive)), len(self.classes), self.n,
            self.unit, self.seed, self.rank, self.accepted, self.lambda_1, tuple(self.lambda_2),
        )  # fmt: skip

    # ------------------------------------------------------------------------ what it promises

    @property
    def target(self) -> Scrc:
        """What it was asked for; delta is that of its own claim."""
        guarantee = "none" if self.variant == "naive" else "ltt"
        asked = {name: getattr(self, name) for name in _ASKED}
        return Scrc(
            min_coverage=self.xi, guarantee=guarantee, delta=math.fsum(self.delta),
            allow_useless=bool(self.useless), **asked,
        )  # fmt: skip

    @property
    def claims_made(self) -> tuple[int, int | None]:
        """How many claims delta was divided for, and which of them this is; None when nobody counted."""
        return self.claims, self.certify_uses

    @property
    def n_certified(self) -> int:
        """Units that certified it."""
        return self.n

    def check(self, rows: Rows) -> Checked:
        """Hold its promises against rows that calibrated nothing: ``FittedSCRC.verify`` on what the cascade answers.

        Rates are given per stage too, and promises and rates per source where there are several.
        """
        exited = self.exits(rows.probs, rows.gate)
        values = np.where(exited[:, None], rows.probs, rows.probs if rows.probs_b is None else rows.probs_b)
        correct, stage = self.p_correct(values, exited, rows.gate), np.where(exited, *_STAGES)

        def verified(part: NDArray[np.bool_]) -> SetCheck:
            return self.statistics.verify(
                values[part], correct[part], rows.labels[part], stage[part],
                groups=None if rows.groups is None else rows.groups[part], seed=self.seed,
            )  # fmt: skip

        def rates(part: str, name: str, seen: SetCheck) -> SetRates:
            same = {field: getattr(seen, field) for field in SetRates.model_fields if hasattr(seen, field)}
            return SetRates(part=part, name=name, **same)

        whole = verified(np.ones(rows.labels.size, dtype=bool))
        promises = list(whole.promises)
        parts = [rates("stage", name, verified(stage == name)) for name in np.unique(stage).tolist()]
        sources = [] if rows.sources is None else np.unique(rows.sources).tolist()
        for source in sources if len(sources) > 1 else []:
            seen = verified(rows.sources == source)
            name = str(source) or "(no source)"
            parts.append(rates("source", name, seen))
            promises += [one.model_copy(update={"source": name}) for one in unjudged(seen.promises)]
        more: dict[str, Any] = {"statement": _outcome(self.guarantee, whole), "promises": promises, "parts": parts}
        if not self.promises:
            more |= {"outcome": None, "promises": unjudged(promises)}
        return Checked(sets=whole.model_copy(update=more))

    def assuming(self, *assumptions: str) -> Self:
        """The policy with what else its certificate takes for granted."""
        return self._but(assumptions=[*self.assumptions, *assumptions])

    def _stricter(self, threshold: float, statement: str) -> Self:
        """Stage B's answers to what no longer exits were never part of what was certified; see ``at``."""
        return self._but(
            exit_threshold=min(threshold, NOBODY_EXITS), guarantee="none", statement=statement, assumptions=[]
        )

    def _but(self, **changed: Any) -> Self:
        values = dict(self) | changed
        del values["calibrator_fingerprint"]
        return self.seal(**values)

    # ------------------------------------------------------------------------ what is said of it

    @property
    def usual_exit_rate(self) -> float:
        """Share that exits of the rows that fit the exit rule."""
        return self.exit_rate

    def rule(self) -> str:
        """The rule in words."""
        limits = ", ".join(
            f"{cell.limit:.6g}" + ("" if self.cells is None else f" ({self.cells} {cell.name})")
            for cell in self.lambda_2
        )
        nobody = self.exit_threshold == NOBODY_EXITS
        out = "nobody exits" if nobody else super().rule()
        return (
            f"{out}; accept when P(answer correct) is at or above {self.lambda_1:.6g}, with the set of classes whose "
            f"{self.score} nonconformity is at or below {limits}; nobody answers the rest"
        )

    def headline(self) -> str:
        """The policy and what was asked for, in a line."""
        return f"scrc policy, variant {self.variant}, {self._of_positive()}{self.target.words()}"

    def found(self) -> list[str]:
        """What the rows that fit it and those kept for the certificate gave."""
        rate = "-" if self.exit_error is None else f"{self.exit_error:.2%}"
        bound = "" if self.coverage_bound is None else f", lower bound {self.coverage_bound:.1%}"
        named = ["sets" if self.cells is None else f"{self.cells} {cell.name}" for cell in self.lambda_2]
        return [
            (
                f"of the {self.n_fit_rows} rows that fit the exit rule: exits {self.exit_rate:.1%}, exit error {rate} "
                f"(at most {self.max_exit_error:g} asked for)"
            ),
            f"  gate: {self.platt}",
            f"  Stage B: {self.platt_b}",
            (
                f"of the {self.n} {self.unit} kept for the certificate: accepted {self.accepted} "
                f"({self.coverage:.1%}{bound}), at P(answer correct) >= {self.lambda_1:.6g}"
            ),
            *(
                f"  {name}: {self.score} limit {cell.limit:.6g}, {cell.errors} of {cell.trials} wrong (at most "
                f"{cell.budget} allowed), risk bound {cell.bound:.2%}"
                for name, cell in zip(named, self.lambda_2, strict=True)
            ),
            *self._beside_groups(),
        ]

    def _beside_groups(self) -> list[str]:
        seen = self.of_photos
        if seen is None or self.guarantee == "none":
            return []
        trials, errors = sum(cell.trials for cell in self.lambda_2), sum(cell.errors for cell in self.lambda_2)
        return beside_groups(
            self.unit,
            ("are accepted", seen.accepted, seen.n, self.coverage),
            ("sets that count miss the label", seen.errors, seen.trials, errors / trials if trials else None),
            advice=", and nothing is promised of that",
        )

    def story(self) -> list[str]:
        """What it does and promises, to whom and from which photos, for anybody."""
        unit = "photos" if self.unit == "rows" else "groups (clips, tracks or places, one photo drawn from each)"
        sets = (
            "For a photo that is accepted the answer is a set of classes: one class where the model is sure enough, "
            "several where it cannot tell them apart. For the others nobody answers, and a person should look."
        )
        risk = "the right class is missing from the set"
        if self.loss == "fnr":
            risk = f"of “{self.positive}” photos, “{self.positive}” is missing from the set"
        each = {None: "", "stage": ", for each stage that answers", "class": ", for the photos of each class"}[
            self.cells
        ]
        whom = "photos" if self.unit == "rows" else "photos, each drawn from a clip of its own,"
        wish = (
            f"At least {percent(self.xi)} of {whom} are accepted, and among "
            f"those at most {percent(self.alpha)} of the time {risk}{each}"
        )
        end = {
            "pac": "This holds for these very thresholds, unless the calibration photos were an unlucky draw: a chance "
            f"of at most {percent(sum(self.delta))}.",
            "expectation": "This holds on average over many such calibrations; of these very thresholds it says less.",
            "none": "This is what was asked for and looked true on the calibration photos; nothing is promised.",
        }[self.guarantee]
        kept = "the risk of each class" if self.cells == "class" else "the risk" if self.loss == "fnr" else ""
        source = (
            f"It comes from {self.n} {unit} kept for the certificate, which neither trained the model nor "
            "chose who exits, and it speaks of new photos like those: the same cameras and places, the same mix of "
            "classes. "
            + (
                f"Where that mix is another, the share accepted is promised no more, {kept} still is."
                if kept
                else "Where that mix is another, all of it is void."
            )
        )
        useless = [f"This was wanted although it says nothing: {self.useless}."] if self.useless else []
        return [sets, f"{wish}. {end}", *useless, source]

    def measured(self) -> str:
        """Figures on the calibration rows with their bounds, in a line."""
        bound = "" if self.coverage_bound is None else f" (lower bound {self.coverage_bound:.1%})"
        risks = ", ".join(
            f"{cell.name} {cell.errors} of {cell.trials} (bound {cell.bound:.2%})" for cell in self.lambda_2
        )
        return (
            f"accepted {self.coverage:.1%} of {self.n} {self.unit} kept for the certificate{bound}, "
            f"wished {self.xi:.1%}; risk {risks}, wished {self.alpha:.2%}; exits elsewhere {self.exit_rate:.1%}"
        )

    @classmethod
    def seal(cls, **values: Any) -> Self:
        """Make a record with the fingerprint of its own numbers."""
        return cls(**values, calibrator_fingerprint=cls.model_construct(**values).fingerprint_numbers())

    def fingerprint_numbers(self) -> str:
        """Hex sha256 over all else: what decides, what is promised and assumed, and of which model."""
        content = self.model_dump(mode="json", exclude={"calibrator_fingerprint"})
        for name in ("useless", "of_photos"):
            # Files of older versions do not have them.
            if not content.get(name):
                content.pop(name, None)
        data = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return sha256_bytes(data.encode())

    @model_validator(mode="after")
    def _sealed(self) -> Self:
        if any(cell.limit is None or cell.budget < 0 for cell in self.lambda_2):
            raise ValueError("lambda_2 must have a limit and a budget of 0 or more in each cell, got none")
        found = self.fingerprint_numbers()
        if self.calibrator_fingerprint != found:
            raise ValueError(
                f"calibrator_fingerprint must be of what stands beside it, got {self.calibrator_fingerprint[:12]} "
                f"instead of {found[:12]}; something was changed, so the certificate is void: calibrate again"
            )
        return self


def percent(value: float | None) -> str:
    """A share for people, such as 97.5%; a dash for none."""
    if value is None:
        return "–"
    digits = 0 if value in (0, 1) else 2 if value < 0.01 or value > 0.99 else 1
    return f"{100 * value:.{digits}f}%"


def confidence_logit(probs: ArrayLike) -> NDArray[np.float64]:
    """Give the logit of the largest probability [N], clipped to where it is no rounding; NaN where the row holds it."""
    found: NDArray[np.float64] = logit(np.clip(confidence(probs), _CLIP, 1 - _CLIP))
    return found


def close(scores: NDArray[np.float64], threshold: float) -> NDArray[np.bool_]:
    """Say where scores are so near a threshold that the rounding between runtimes and batch shapes could decide.

    Near means within 1e-5 and, since scores of sure answers crowd at 0 and 1, within 1e-3 in their logit. NaN never is.
    """
    inside = 0 < threshold < 1
    away = np.abs(logit(np.clip(scores, _CLIP, 1 - _CLIP)) - logit(threshold)) if inside else np.zeros(scores.shape)
    found: NDArray[np.bool_] = (np.abs(scores - threshold) < _NEAR) & (away < _NEAR_LOGIT)
    return found


# -------------------------------------------------------------------------------- fitting


def _wish(of: Scrc | ScrcParams, xi: float, delta: tuple[float, float], positive: int | None) -> SCRC:
    return SCRC(
        xi=xi, alpha=of.alpha, delta=delta, variant=of.variant, loss=of.loss, score=of.score, groups=of.cells,
        allow_empty=of.allow_empty, positive=positive, raps=of.raps,
    )  # fmt: skip


@dataclass(frozen=True)
class _Cascade:
    """What the fit rows decided, as fields of the record, and how all rows [N] are answered by it."""

    fields: dict[str, Any]
    stage: NDArray[np.str_]
    probs: NDArray[np.float64]
    correct: NDArray[np.float64]


def _answer_fit_half(rows: Rows, fit: NDArray[np.bool_], max_exit_error: float) -> _Cascade:
    second = rows.probs if rows.probs_b is None else rows.probs_b
    logits = confidence_logit(rows.probs) if rows.gate is None else rows.gate
    platt = fit_platt(logits[fit], ~rows.wrong[fit])
    sure = score(logits, platt.a, platt.b)
    threshold = _exit_threshold(rows.where(fit), sure[fit], max_exit_error)
    exited = sure >= threshold
    b_right, b_logit = second.argmax(axis=1) == rows.labels, confidence_logit(second)
    platt_b, seen = fit_platt(b_logit[fit & ~exited], b_right[fit & ~exited]), "deferred rows"
    if not platt_b.fitted:
        platt_b, seen = fit_platt(b_logit[fit], b_right[fit]), "all rows"
    n_exited, right = int(exited[fit].sum()), int((exited & ~rows.wrong)[fit].sum())
    return _Cascade(
        {
            "a": platt.a, "b": platt.b, "fitted": platt.fitted, "platt": platt.reason,
            "exit_threshold": threshold, "exit_error": 1 - right / n_exited if n_exited else None,
            "exit_rate": n_exited / int(fit.sum()), "a_b": platt_b.a, "b_b": platt_b.b,
            "platt_b": f"{platt_b.reason} (of Stage B, {seen})",
        },
        stage=np.where(exited, *_STAGES),
        probs=np.where(exited[:, None], rows.probs, second),
        correct=np.where(exited, sure, score(b_logit, platt_b.a, platt_b.b)),
    )  # fmt: skip


def _calibrate(wish: SCRC, first: _Cascade, rows: Rows, fit: NDArray[np.bool_]) -> FittedSCRC:
    """Both thresholds from the rows that are kept; the fit rows say how many of them may be accepted."""
    groups = rows.given_groups()

    def part(of: NDArray[np.bool_]) -> dict[str, Any]:
        return {
            "probs": first.probs[of], "gate": first.correct[of], "labels": rows.labels[of],
            "stage": first.stage[of] if wish.groups == "stage" else None,
            "groups": None if groups is None else groups[of], "rows_independent": rows.independent,
        }  # fmt: skip

    n = int((~fit).sum()) if rows.groups is None else np.unique(rows.groups[~fit]).size
    return wish.calibrate(**part(~fit), threshold=wish.choose_threshold(**part(fit), n=n), classes=rows.classes)


def _exit_threshold(rows: Rows, sure: NDArray[np.float64], most: float) -> float:
    """The laxest threshold on P(Stage A is correct) whose exit error is at most this; ``NOBODY_EXITS``: none is."""
    if np.isnan(sure).all():
        return NOBODY_EXITS
    counts = count_exits(rows, sure, lowest=0.0)
    reached = np.flatnonzero(meets(counts.n_exited - counts.n_correct, counts.n_exited, most))
    return float(counts.threshold[reached[-1]]) if reached.size else NOBODY_EXITS


def _check_stages(found: FittedSCRC, answering: set[str]) -> None:
    """Raise NotReachableError where a stage that may answer answered nothing of what was kept for the certificate."""
    missing = answering - {cell.name for cell in found.cells}
    if found.scrc.groups == "stage" and missing:
        raise NotReachableError(
            f"risk {found.scrc.alpha:g} must be certifiable for each stage, but it is INFEASIBLE: Stage "
            f"{missing.pop()} answered none of {found.n} {found.unit} kept for the certificate; bring more. "
            "No policy was written"
        )


def _of_photos(found: FittedSCRC, first: _Cascade, rows: Rows, kept: NDArray[np.bool_]) -> PhotoCounts:
    """What the sets do on all rows that are kept [N]."""
    labels = rows.labels[kept]
    stage = first.stage[kept] if found.scrc.groups == "stage" else None
    sets, accepted = found.predict_sets(first.probs[kept], first.correct[kept], stage)
    trials = accepted & rows.is_class(rows.positive)[kept] if found.scrc.loss == "fnr" else accepted
    missed = trials & ~sets[np.arange(labels.size), labels]
    return PhotoCounts(n=labels.size, accepted=int(accepted.sum()), trials=int(trials.sum()), errors=int(missed.sum()))


def _statement(found: FittedSCRC, cells: list[Cell]) -> str:
    missed = " and ".join(
        f"{cell.errors} of {cell.trials}" + ("" if len(cells) == 1 else f" ({found.scrc.groups} {cell.name})")
        for cell in cells
    )
    of = "calibrated" if found.scrc.variant == "naive" else "kept for the certificate, which fitted nothing else"
    counted = (
        f"Of {found.n} {found.unit} {of}, {found.accepted} are accepted "
        f"and of the sets that count {missed} miss at the limit."
    )
    if found.scrc.variant == "naive":
        return (
            f"Empirical choice, no guarantee: nothing is promised for new images. {counted} Both thresholds were "
            "chosen on these same rows, so this looks better than it is."
        )
    useless = f" They were wanted although they say nothing (allow_useless): {found.useless}." if found.useless else ""
    return f"{found.guarantee} {counted} Provided that {'; '.join(found.assumptions)}.{useless}"


def _outcome(guarantee: str, seen: SetCheck) -> str:
    """The outcome as a sentence."""
    asked = "what was promised"

    def listed(*kinds: Outcome | None) -> str:
        return ", ".join(
            f"{one.name} {one.errors} of {one.trials} (at most {one.limit:.4g}; 99% lower bound {one.lower:.4g}, "
            f"95% upper bound {one.upper:.4g})"
            for one in seen.promises
            if one.outcome in kinds
        )

    if guarantee == "none":
        every = listed("PASS", "FAIL", "INCONCLUSIVE", None)
        return f"what was asked for (nothing was promised) and what is seen: {every}"
    average = ""
    if guarantee == "expectation":
        average = (
            "promised on average over many calibrations, which this one neither shows nor refutes, and what is seen: "
            f"{listed(None)}"
        )
    if seen.outcome is None:
        return average
    asked, average = ("the share accepted", f"; {average}") if average else (asked, "")
    if seen.outcome == "PASS":
        return f"PASS: {asked} holds on val_test by its 95% bounds: {listed('PASS')}{average}"
    if seen.outcome == "FAIL":
        return f"FAIL: {asked} does not hold on val_test, by its 99% bounds: {listed('FAIL')}{average}"
    needed = [one.n_to_settle for one in seen.promises if one.outcome == "INCONCLUSIVE"]
    settled = [number for number in needed if number is not None]
    words = f"INCONCLUSIVE: these rows neither show {asked} nor break it: {listed('INCONCLUSIVE')}"
    if settled and len(settled) == len(needed):
        return f"{words}; about {max(settled)} {seen.unit} in all would settle it if rates stay as seen{average}"
    return f"{words}; no number of {seen.unit} is known to settle it at the rates seen{average}"
