"""The scrc policy: after the cascade, a set of labels for what is accepted; nobody answers the rest. NumPy only.

``fit_scrc_policy`` makes the record, ``answer_sets`` applies it, the one rule of cascade, evaluation and router, and
``verify_sets`` holds it against rows that calibrated nothing. The statistics are those of ``scrc.SCRC``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator
from scipy.special import logit

from stage1_pro.errors import InputError, NotReachableError, nearest
from stage1_pro.files import sha256_bytes
from stage1_pro.policies import gate
from stage1_pro.policies.base import BasePolicy
from stage1_pro.policies.bounds import check_share
from stage1_pro.policies.certificate import PromiseCheck
from stage1_pro.policies.certify import check_halves
from stage1_pro.policies.scrc import SCRC, Cell, FittedSCRC, Loss, Rate, Score, Variant, Verification, nonconformity
from stage1_pro.policies.softmax import check_rows, confidence, count_exits_by, meets
from stage1_pro.policies.target import Scrc
from stage1_pro.record import Record


class ScrcCell(Record):
    """A limit on nonconformity, and the certify rows it comes from; a class is in the set iff it is at or below it."""

    name: str = Field(description="all, a stage (A or B), or a class")
    limit: float = Field(ge=0, description="a hair above the one certified, against rounding; that only enlarges sets")
    trials: int = Field(ge=0, description="accepted units of the cell")
    errors: int = Field(ge=0, description="of them, sets at the certified limit that miss the label")
    budget: int = Field(ge=0, description="the most that could be certified")
    delta: float | None = Field(gt=0, lt=1, description="of this cell; null where risk is an expectation or nothing")
    bound: float = Field(
        ge=0, le=1, description="Clopper-Pearson at 1 - delta (pac), (errors + 1) / (trials + 1) (I, T)"
    )


# Above every P(correct): a threshold here lets nobody exit.
NOBODY_EXITS = float(np.nextafter(1.0, 2.0))


class ScrcParams(BasePolicy):
    """``scrcparams.json``: selective conformal risk control after the cascade.

    An image exits at Stage A iff ``sigmoid(a * gate_logit + b)``, in float64, is at or above ``exit_threshold``; else
    Stage B answers. P(answer correct) is that score where it exits and ``sigmoid(a_b * logit + b_b)`` otherwise, of the
    logit of Stage B's largest probability. The image is accepted iff it is at or above ``lambda_1``, and then gets the
    set of classes whose nonconformity is at or below its cell's limit in ``lambda_2``; otherwise nobody answers.

    Both Platt scalings and the exit rule come from the fit half, ``lambda_1``, ``lambda_2`` and all counts and bounds
    from the certify half. ``calibrator_fingerprint`` is recomputed on reading: other numbers void the certificate.
    """

    # What was certified is the whole cascade behind this very exit rule; of exits alone nothing was.
    steerable: ClassVar[bool] = False

    format_version: Literal[1] = 1
    policy: Literal["scrc"] = "scrc"
    classes: list[str] = Field(min_length=2)
    positive: str
    a: float
    b: float
    fitted: bool = Field(description="false: Platt scaling was impossible, a = 1 and b = 0 stand in; see platt")
    platt: str = Field(description="how a and b came about")
    exit_threshold: float = Field(ge=0, le=NOBODY_EXITS, description="just above 1: nobody exits")
    max_exit_error: float = Field(gt=0, lt=1, description="what the exit rule was asked for, on the fit half")
    exit_error: float | None = Field(ge=0, le=1, description="of the fit half; null when nobody exits")
    exit_rate: float = Field(ge=0, le=1, description="of the fit half")
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
    lambda_2: list[ScrcCell] = Field(min_length=1)
    rank: int = Field(
        ge=1, description="of the certify units' scores: the last one accepted (pac), or the first one that is not"
    )
    n: int = Field(ge=1, description="units of the certify half")
    unit: Literal["rows", "groups"]
    seed: int = Field(description="of the row that speaks for its group")
    accepted: int = Field(ge=0, description="units of the certify half")
    coverage: float = Field(ge=0, le=1, description="accepted / n")
    coverage_bound: float | None = Field(description="lower, at 1 - delta[0]; null for T and naive")
    risk_bound: float = Field(ge=0, le=1, description="the largest of all cells")
    fnr_bound: float | None = Field(
        ge=0, le=1, description="of accepted positives whose set lacks the positive; null where cells do not tell it"
    )
    guarantee: Literal["none", "pac", "expectation"]
    statement: str
    assumptions: list[str]
    claims: int = Field(ge=1, description="how many claims delta was divided for, before the first")
    certify_uses: int | None = Field(description="which claim on the certify half this is; null when nobody counted")
    n_fit_rows: int
    grouped: bool
    split_hashes: dict[str, str]
    model_fingerprint: str | None = Field(default=None, description="of all weights, the gate's among them")
    preprocessing_fingerprint: str | None = None
    calibrator_fingerprint: str = Field(description="sha256 over everything else here")

    @property
    def target_fnr(self) -> float | None:
        """The wished FNR on exits: none, the promise is on sets."""
        return None

    @property
    def target(self) -> Scrc:
        """What it was asked for; delta is that of its own claim."""
        return Scrc(
            alpha=self.alpha, min_coverage=self.xi, variant=self.variant, loss=self.loss, score=self.score,
            cells=self.cells, allow_empty=self.allow_empty, raps=self.raps, max_exit_error=self.max_exit_error,
            guarantee="none" if self.variant == "naive" else "ltt", delta=math.fsum(self.delta),
        )  # fmt: skip

    def _stricter(self, threshold: float, statement: str) -> Self:
        """Stage B's answers to what no longer exits were never part of what was certified; see ``at``."""
        given_up = {"exit_threshold": min(threshold, NOBODY_EXITS), "guarantee": "none", "statement": statement}
        values = dict(self) | given_up | {"assumptions": []}
        del values["calibrator_fingerprint"]
        return self.seal(**values)

    @classmethod
    def seal(cls, **values: Any) -> Self:
        """Make a record with the fingerprint of its own numbers."""
        return cls(**values, calibrator_fingerprint=cls.model_construct(**values).fingerprint_numbers())

    def fingerprint_numbers(self) -> str:
        """Hex sha256 over all else: what decides, what is promised and assumed, and of which model."""
        content = self.model_dump(mode="json", exclude={"calibrator_fingerprint"})
        data = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return sha256_bytes(data.encode())

    @model_validator(mode="after")
    def _sealed(self) -> Self:
        found = self.fingerprint_numbers()
        if self.calibrator_fingerprint != found:
            raise ValueError(
                f"calibrator_fingerprint must be of what stands beside it, got {self.calibrator_fingerprint[:12]} "
                f"instead of {found[:12]}; something was changed, so the certificate is void: calibrate again"
            )
        return self


class ShareOf(Record):
    """A share, or a mean set size, with its two-sided 95% interval; null where nothing was accepted."""

    value: float | None
    low: float
    high: float


class SetRates(Record):
    """What sets are like on the rows of one stage or source; for information, nobody promised it of them."""

    part: Literal["stage", "source"]
    name: str
    n: int = Field(description="units")
    accepted: int
    average_set_size: ShareOf
    ambiguous_rate: ShareOf
    rejection_rate: ShareOf


class SetCheck(Record):
    """Promises and rates of sets on ``val_test``. Shares of sets are of the accepted, the rejection rate of all."""

    outcome: Literal["PASS", "FAIL", "INCONCLUSIVE"] = Field(description="FAIL when any promise fails; sources aside")
    statement: str = Field(description="the outcome in words")
    promises: list[PromiseCheck]
    n: int
    unit: Literal["rows", "groups", "group_means"]
    accepted: int
    average_set_size: ShareOf
    ambiguous_rate: ShareOf
    empty_rate: ShareOf
    rejection_rate: ShareOf
    parts: list[SetRates] = Field(default=[], description="the same per stage that answered, and per source")


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


def fit_scrc_policy(
    probs_a: ArrayLike,
    gate_logits: ArrayLike | None,
    probs_b: ArrayLike | None,
    labels: ArrayLike,
    *,
    halves: ArrayLike,
    classes: Sequence[str],
    positive: str,
    alpha: float = 0.01,
    xi: float = 0.70,
    delta: float = 0.05,
    variant: Variant = "pac",
    loss: Loss = "miscoverage",
    score: Score = "lac",
    cells: Literal["stage", "class"] | None = None,
    allow_empty: bool = False,
    raps: tuple[float, int] = (0.01, 2),
    max_exit_error: float = 0.01,
    claims: int = 1,
    use: int | None = None,
    groups: ArrayLike | None = None,
    seed: int = 0,
    split_hashes: Mapping[str, str] | None = None,
    model_fingerprint: str | None = None,
    preprocessing_fingerprint: str | None = None,
) -> ScrcParams:
    """Fit both Platt scalings and the exit rule on the fit half, and both risk-controlled thresholds on the other.

    The exit rule is the laxest one whose exit error on the fit half is at most ``max_exit_error``, in exact integers;
    where there is none nobody exits. It may be poor without harm: what is promised is counted on the certify half, on
    what this very cascade answers there. Stage B's scaling sees the deferred rows of the fit half, all of them where
    those are answered only rightly or only wrongly.

    Args:
        probs_a: [N, K] probabilities of Stage A.
        gate_logits: [N]; a row whose logit is not finite never exits. None: the logit of Stage A's largest probability.
        probs_b: [N, K] of Stage B. None: there is one stage, which answers deferred rows too.
        labels: [N] indices into ``classes``.
        halves: [N] of ``fit`` and ``certify``.
        classes: K names, K >= 2.
        positive: name of the positive class.
        alpha: largest risk among the accepted, inside (0, 1).
        xi: least share accepted, inside (0, 1).
        delta: chance of failure, all claims together: a fifth for the selection, the rest for the risk.
        variant: see ``SCRC``.
        loss: see ``SCRC``.
        score: see ``SCRC``.
        cells: None, ``stage`` or ``class``: what gets a limit of its own.
        allow_empty: let sets be empty.
        raps: see ``SCRC``.
        max_exit_error: inside (0, 1); of the exit rule.
        claims: how many claims on the certify half were declared before the first; delta is divided by it.
        use: which of them this is, for the record; None when nobody counts.
        groups: [N] clip or track of every row; the unit. ``None``: rows are independent.
        seed: of the row that speaks for its group.
        split_hashes: which rows these are, for the record.
        model_fingerprint: which model gave the probabilities.
        preprocessing_fingerprint: how its pixels were prepared.

    Raises:
        InputError: an argument is not what it must be.
        NotReachableError: infeasible: nothing is chosen instead.
    """
    names = [str(name) for name in classes]
    first, truth, units = check_rows(probs_a, labels, groups, names)
    second = first if probs_b is None else check_rows(probs_b, labels, groups, names)[0]
    if positive not in names:
        raise InputError(f"positive must be one of {', '.join(names)}, got '{positive}'{nearest(positive, names)}")
    check_share("max_exit_error", max_exit_error)
    check_share("delta", delta)
    if claims < 1:
        raise InputError(f"claims must be at least 1, got {claims}")
    index = names.index(positive)
    wish = SCRC(
        xi=xi, alpha=alpha, delta=(delta / 5 / claims, 4 * delta / 5 / claims), variant=variant, loss=loss,
        score=score, groups=cells, allow_empty=allow_empty, positive=index, raps=raps,
    )  # fmt: skip
    fit = check_halves(halves, truth.size, units)
    logits = confidence_logit(first) if gate_logits is None else np.asarray(gate_logits, dtype=np.float64)
    if logits.shape != truth.shape:
        raise InputError(f"gate_logits must have shape [{truth.size}] as probs_a has rows, got {list(logits.shape)}")

    platt = gate.fit_platt(logits[fit], first[fit].argmax(axis=1) == truth[fit])
    sure = gate.score(logits, platt.a, platt.b)
    threshold = _exit_threshold(sure[fit], first[fit], truth[fit], index, max_exit_error)
    exited = sure >= threshold
    b_right, b_logit = second.argmax(axis=1) == truth, confidence_logit(second)
    platt_b = gate.fit_platt(b_logit[fit & ~exited], b_right[fit & ~exited])
    seen = "deferred rows"
    if not platt_b.fitted:
        platt_b, seen = gate.fit_platt(b_logit[fit], b_right[fit]), "all rows"

    merged = np.where(exited[:, None], first, second)
    correct = np.where(exited, sure, gate.score(b_logit, platt_b.a, platt_b.b))
    stage = np.where(exited, *_STAGES)
    certify = ~fit
    found = wish.calibrate(
        merged[certify], correct[certify], truth[certify], stage[certify] if cells == "stage" else None,
        groups=None if units is None else units[certify], seed=seed,
    )  # fmt: skip
    if not found.feasible:
        raise found.infeasible()
    if cells == "stage":
        missing = {"B"} if threshold == NOBODY_EXITS else {*_STAGES}
        missing -= {cell.name for cell in found.cells}
        if missing:
            raise NotReachableError(
                f"risk {alpha:g} must be certifiable for each stage, but it is INFEASIBLE: Stage {missing.pop()} "
                f"answered none of {found.n} {found.unit} of the certify half; bring more, or drop the cells"
            )
    limits = [_record(cell, names if cells == "class" else None) for cell in found.cells]
    right = exited & (first.argmax(axis=1) == truth)
    n_exited = int(exited[fit].sum())
    return ScrcParams.seal(
        classes=names,
        positive=positive,
        a=platt.a,
        b=platt.b,
        fitted=platt.fitted,
        platt=platt.reason,
        exit_threshold=threshold,
        max_exit_error=float(max_exit_error),
        exit_error=1 - int(right[fit].sum()) / n_exited if n_exited else None,
        exit_rate=n_exited / int(fit.sum()),
        a_b=platt_b.a,
        b_b=platt_b.b,
        platt_b=f"{platt_b.reason} (of Stage B, {seen})",
        alpha=float(alpha),
        xi=float(xi),
        delta=wish.delta,
        variant=variant,
        loss=loss,
        score=score,
        cells=cells,
        allow_empty=allow_empty,
        raps=wish.raps,
        lambda_1=found.threshold,
        lambda_2=limits,
        rank=found.rank,
        n=found.n,
        unit=found.unit,
        seed=seed,
        accepted=found.accepted,
        coverage=found.coverage,
        coverage_bound=found.coverage_bound,
        risk_bound=max(cell.bound for cell in limits),
        fnr_bound=_fnr_bound(limits, loss, cells, positive),
        guarantee=GUARANTEES[variant],
        statement=_statement(found, limits),
        assumptions=_assumptions(found, use),
        claims=claims,
        certify_uses=use if variant != "naive" else None,
        n_fit_rows=int(fit.sum()),
        grouped=units is not None,
        split_hashes=dict(split_hashes or {}),
        model_fingerprint=model_fingerprint,
        preprocessing_fingerprint=preprocessing_fingerprint,
    )


def confidence_logit(probs: ArrayLike) -> NDArray[np.float64]:
    """Give the logit of the largest probability [N], clipped to where it is no rounding; NaN where the row holds it."""
    found: NDArray[np.float64] = logit(np.clip(confidence(probs), _CLIP, 1 - _CLIP))
    return found


def answer_sets(
    policy: BasePolicy, probs: ArrayLike, exited: ArrayLike, gate_logits: ArrayLike | None = None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Give the classes in each image's set, bool [N, K], and which images are answered, bool [N].

    Under softmax and gate the set is the most probable class alone, and answered is what has an answer at all. Under
    scrc nobody answers what is not accepted: its set is empty.

    Args:
        policy: any.
        probs: [N, K] of the stage that answered.
        exited: [N] whether that was Stage A.
        gate_logits: [N], for scrc.

    Raises:
        InputError: another number of classes than the policy's, or gate logits that are missing.
    """
    values = np.asarray(probs, dtype=np.float64)
    if isinstance(policy, ScrcParams):
        correct = p_correct(policy, values, exited, gate_logits)
        found = fitted(policy)
        if policy.cells != "stage":
            return found.predict_sets(values, correct)
        stage = np.where(np.asarray(exited, dtype=bool), *_STAGES)
        # Only who is made to exit can be of a stage that never answered: nobody knows its risk.
        unknown = ~np.isin(stage, [cell.name for cell in policy.lambda_2])
        correct[unknown], stage[unknown] = np.nan, policy.lambda_2[0].name
        return found.predict_sets(values, correct, stage)
    answered = np.asarray(np.isfinite(values).all(axis=1))
    sets = np.zeros(values.shape, dtype=bool)
    sets[np.arange(len(values)), values.argmax(axis=1)] = True
    return sets & answered[:, None], answered


def p_correct(
    policy: ScrcParams, probs: ArrayLike, exited: ArrayLike, gate_logits: ArrayLike | None
) -> NDArray[np.float64]:
    """Give P(answer correct) [N] of the stage that answered; NaN where it gave no number. Arguments as above."""
    values, out = np.asarray(probs, dtype=np.float64), np.asarray(exited, dtype=bool)
    if values.ndim != 2 or values.shape[1] != len(policy.classes):
        raise InputError(
            f"probs must have shape [N, {len(policy.classes)}] as the policy's classes, got {list(values.shape)}; "
            "use the policy of this model"
        )
    if gate_logits is None or np.shape(gate_logits) != values.shape[:1] or out.shape != values.shape[:1]:
        got = "None" if gate_logits is None else list(np.shape(gate_logits))
        raise InputError(
            f"exited and gate_logits must have shape [{len(values)}] for the scrc policy, got {list(out.shape)} and "
            f"{got}; give one of each per row"
        )
    found: NDArray[np.float64] = np.where(
        out, gate.score(gate_logits, policy.a, policy.b), gate.score(confidence_logit(values), policy.a_b, policy.b_b)
    )
    return found


def near(policy: BasePolicy, probs: ArrayLike, exited: ArrayLike, gate_logits: ArrayLike | None) -> NDArray[np.bool_]:
    """Say which rows [N] lie so near a selection threshold or a limit that rounding could decide; see ``close``.

    Never under policies that have neither. Arguments as above.
    """
    values = np.asarray(probs, dtype=np.float64)
    if not isinstance(policy, ScrcParams):
        return np.zeros(len(values), dtype=bool)
    found = close(p_correct(policy, values, exited, gate_logits), policy.lambda_1)
    known = np.flatnonzero(np.isfinite(values).all(axis=1))
    scores = nonconformity(_wish(policy), values[known])
    if not policy.allow_empty:
        # The most probable class is in whatever its limit.
        scores[values[known] == values[known].max(axis=1, keepdims=True)] = np.nan
    for k, cell in enumerate(policy.lambda_2):
        # Near the limit of another stage only costs time.
        column = slice(k, k + 1) if policy.cells == "class" else slice(None)
        found[known] |= close(scores[:, column], cell.limit).any(axis=1)
    return found


def close(scores: NDArray[np.float64], threshold: float) -> NDArray[np.bool_]:
    """Say where scores are so near a threshold that the rounding between runtimes and batch shapes could decide.

    Near means within 1e-5 and, since scores of sure answers crowd at 0 and 1, within 1e-3 in their logit. NaN never is.
    """
    inside = 0 < threshold < 1
    away = np.abs(logit(np.clip(scores, _CLIP, 1 - _CLIP)) - logit(threshold)) if inside else np.zeros(scores.shape)
    found: NDArray[np.bool_] = (np.abs(scores - threshold) < _NEAR) & (away < _NEAR_LOGIT)
    return found


def fitted(policy: ScrcParams) -> FittedSCRC:
    """The statistics behind a record, ready to predict and to verify."""
    cells = tuple(
        Cell(_code(policy, cell.name), cell.limit, cell.trials, cell.errors, cell.budget, cell.delta, cell.bound)
        for cell in policy.lambda_2
    )
    return FittedSCRC(
        scrc=_wish(policy), n_classes=len(policy.classes), n=policy.n, unit=policy.unit, seed=policy.seed,
        rank=policy.rank, accepted=policy.accepted, threshold=policy.lambda_1, coverage_bound=policy.coverage_bound,
        cells=cells, reason="", n_needed=None, min_certifiable_alpha=None, guarantee=policy.statement,
        assumptions=tuple(policy.assumptions),
    )  # fmt: skip


def verify_sets(
    policy: ScrcParams,
    probs: ArrayLike,
    exited: ArrayLike,
    gate_logits: ArrayLike,
    labels: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    sources: ArrayLike | None = None,
) -> SetCheck:
    """Hold a policy's promises against rows that calibrated nothing: ``FittedSCRC.verify`` on what was answered.

    Args:
        policy: the record.
        probs: [N, K] of the stage that answered.
        exited: [N] whether that was Stage A.
        gate_logits: [N].
        labels: [N] class indices.
        groups: [N] clip or track; one seeded row speaks for its group, as in calibration.
        sources: [N] names; where there are several the promises are counted for each too, as information.
    """
    values, truth = np.asarray(probs, dtype=np.float64), np.asarray(labels)
    correct = p_correct(policy, values, exited, gate_logits)
    stage = np.where(np.asarray(exited, dtype=bool), *_STAGES)
    clips = None if groups is None else np.asarray(groups)
    scopes: list[tuple[str | None, NDArray[np.bool_]]] = [(None, np.ones(truth.size, dtype=bool))]
    if sources is not None:
        known = np.asarray(sources)
        names = np.unique(known)
        scopes += [(str(name) or "(no source)", known == name) for name in names] if names.size > 1 else []
    titles = ["rejection rate"]
    titles += [
        "risk" if len(policy.lambda_2) == 1 else f"risk of {policy.cells} {cell.name}" for cell in policy.lambda_2
    ]
    found = fitted(policy)

    def verified(rows: NDArray[np.bool_]) -> Verification:
        return found.verify(
            values[rows], correct[rows], truth[rows], stage[rows], groups=None if clips is None else clips[rows],
            seed=policy.seed,
        )  # fmt: skip

    promises: list[PromiseCheck] = []
    parts = [_rates("stage", name, verified(stage == name)) for name in np.unique(stage).tolist()]
    whole: Verification | None = None
    for source, rows in scopes:
        seen = verified(rows)
        whole = whole or seen
        if source is not None:
            parts.append(_rates("source", source, seen))
        promises += [
            PromiseCheck(
                name=title, source=source, limit=one.limit, errors=one.errors, trials=one.trials, lower=one.lower,
                upper=one.upper, outcome=one.outcome, n_to_settle=one.n_to_settle,
            )
            for title, one in zip(titles, seen.claims, strict=True)
        ]  # fmt: skip
    assert whole is not None
    return SetCheck(
        outcome=whole.outcome,
        statement=_outcome(policy, promises, whole.outcome, whole.unit),
        promises=promises,
        n=whole.n,
        unit=whole.unit,
        accepted=whole.accepted,
        average_set_size=_share(whole.average_set_size),
        ambiguous_rate=_share(whole.ambiguous_rate),
        empty_rate=_share(whole.empty_rate),
        rejection_rate=_share(whole.rejection_rate),
        parts=parts,
    )


def _rates(part: Literal["stage", "source"], name: str, seen: Verification) -> SetRates:
    return SetRates(
        part=part,
        name=name,
        n=seen.n,
        accepted=seen.accepted,
        average_set_size=_share(seen.average_set_size),
        ambiguous_rate=_share(seen.ambiguous_rate),
        rejection_rate=_share(seen.rejection_rate),
    )


def describe(policy: ScrcParams) -> str:
    """The wish in words."""
    risk = "sets that miss the label" if policy.loss == "miscoverage" else "positives whose set lacks the positive"
    each = "" if policy.cells is None else f", for each {policy.cells}"
    return f"accepted >= {policy.xi:g} with {risk} <= {policy.alpha:g}{each}"


# -------------------------------------------------------------------------------- helpers


def _exit_threshold(
    sure: NDArray[np.float64], probs: NDArray[np.float64], truth: NDArray[np.int64], positive: int, most: float
) -> float:
    """The laxest threshold on P(Stage A is correct) whose exit error is at most this; ``NOBODY_EXITS``: none is."""
    if np.isnan(sure).all():
        return NOBODY_EXITS
    counts = count_exits_by(sure, probs, truth, positive, lowest=0.0)
    reached = np.flatnonzero(meets(counts.n_exited - counts.n_correct, counts.n_exited, most))
    return float(counts.threshold[reached[-1]]) if reached.size else NOBODY_EXITS


def _wish(policy: ScrcParams) -> SCRC:
    return SCRC(
        xi=policy.xi, alpha=policy.alpha, delta=policy.delta, variant=policy.variant, loss=policy.loss,
        score=policy.score, groups=policy.cells, allow_empty=policy.allow_empty,
        positive=policy.classes.index(policy.positive), raps=policy.raps,
    )  # fmt: skip


def _code(policy: ScrcParams, name: str) -> str:
    """What ``SCRC`` calls a cell: classes by number."""
    return str(policy.classes.index(name)) if policy.cells == "class" else name


def _record(cell: Cell, classes: list[str] | None) -> ScrcCell:
    assert cell.limit is not None
    return ScrcCell(
        name=cell.name if classes is None else classes[int(cell.name)], limit=cell.limit + LIMIT_SLACK,
        trials=cell.trials, errors=cell.errors, budget=cell.budget, delta=cell.delta, bound=cell.bound,
    )  # fmt: skip


def _fnr_bound(cells: list[ScrcCell], loss: Loss, by: str | None, positive: str) -> float | None:
    if loss == "fnr":
        return max(cell.bound for cell in cells)
    return next((cell.bound for cell in cells if by == "class" and cell.name == positive), None)


def _statement(found: FittedSCRC, cells: list[ScrcCell]) -> str:
    missed = " and ".join(
        f"{cell.errors} of {cell.trials}" + ("" if len(cells) == 1 else f" ({found.scrc.groups} {cell.name})")
        for cell in cells
    )
    counted = (
        f"On the certify half, whose rows fitted nothing else, {found.accepted} of {found.n} {found.unit} are accepted "
        f"and of the sets that count {missed} miss at the limit."
    )
    if found.scrc.variant == "naive":
        return (
            f"Empirical choice, no guarantee: nothing is promised for new images. {counted} Both thresholds were "
            "chosen on these same rows, so this looks better than it is."
        )
    return f"{found.guarantee} {counted} Provided that {'; '.join(found.assumptions)}."


def _assumptions(found: FittedSCRC, use: int | None) -> list[str]:
    more = "no other claim was made on the same certify rows (nobody counted: they are of no run)"
    return [*found.assumptions, *([more] if use is None and found.scrc.variant != "naive" else [])]


def _outcome(policy: ScrcParams, promises: list[PromiseCheck], outcome: str, unit: str) -> str:
    """The outcome as a sentence."""
    own = [one for one in promises if one.source is None]
    asked = "what was promised" if policy.guarantee != "none" else "what was asked for (nothing was promised)"

    def listed(kind: str) -> str:
        return ", ".join(
            f"{one.name} {one.errors} of {one.trials} (at most {one.limit:.4g}; 99% lower bound {one.lower:.4g}, "
            f"95% upper bound {one.upper:.4g})"
            for one in own
            if one.outcome == kind
        )

    if outcome == "PASS":
        return f"PASS: {asked} holds on val_test by its 95% bounds: {listed('PASS')}"
    if outcome == "FAIL":
        if policy.guarantee == "expectation":
            return (
                f"FAIL: these thresholds are beyond their limits on val_test, by 99% bounds: {listed('FAIL')}; what "
                "was promised is an average over many calibrations, which one of them does not refute"
            )
        return f"FAIL: {asked} does not hold on val_test, by its 99% bounds: {listed('FAIL')}"
    needed = [one.n_to_settle for one in own if one.outcome == "INCONCLUSIVE"]
    settled = [number for number in needed if number is not None]
    words = f"INCONCLUSIVE: these rows neither show {asked} nor break it: {listed('INCONCLUSIVE')}"
    if settled and len(settled) == len(needed):
        return f"{words}; about {max(settled)} {unit} in all would settle it if rates stay as seen"
    return f"{words}; no number of {unit} is known to settle it at the rates seen"


def _share(rate: Rate) -> ShareOf:
    return ShareOf(value=None if math.isnan(rate.value) else rate.value, low=rate.low, high=rate.high)
