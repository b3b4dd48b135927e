"""Monitors of a served cascade: evidence of harm on audited exits, risk from biased labels, drift, triggers.

No database, no torch, no clock. Only labels show harm (an e-process, weighted estimates). Scores show covariate shift
(CBPE, river's detectors) and are blind to a concept shift.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator
from scipy.special import ndtri

from stage1_pro.arguments import check_share
from stage1_pro.errors import InputError, need
from stage1_pro.metrics.binomial import clopper_pearson
from stage1_pro.metrics.probabilistic import accuracy, mcc
from stage1_pro.policies.bets import compound
from stage1_pro.policies.bounds import betting_upper
from stage1_pro.record import Record

# Smallest share of exits that is audited at random, in any configuration.
LEAST_AUDIT_RATE = 0.02
# Alternatives that the e-process bets on, as multiples of the odds of alpha.
_ODDS = (1.5, 2.0, 3.0, 5.0, 8.0)
# A quarter of the capital is bet from the first audit on. The rest enters over time; half of that within 300 audits.
_FIRST = 0.25
_HALF = 300
# A bet never risks more than this share of the capital on one audit.
_MOST_RISKED = 0.9
MCC_ROWS, ACCURACY_ROWS = 100, 10
Detector = Literal["adwin", "page_hinkley", "kswin"]


@dataclass(frozen=True)
class ServedColumns:
    """Served decisions in the order of time, a column each [N].

    Args:
        time: seconds since the epoch.
        exited: Stage A answered.
        wrong: Stage A's own answer is wrong (also where Stage B answered), 0 or 1; NaN where no label is known.
        propensity: chance with which the row was selected for review, in (0, 1].
        score: what the threshold is compared with, in [0, 1]; higher is surer.
        predicted: class index of the answer that was served, for the rolling figures.
        label: class index of the truth; -1 where it is not known.

    Raises:
        InputError: shapes differ, a column is outside its range, or time runs backwards.
    """

    time: NDArray[np.float64]
    exited: NDArray[np.bool_]
    wrong: NDArray[np.float64]
    propensity: NDArray[np.float64]
    score: NDArray[np.float64]
    predicted: NDArray[np.int64] | None = None
    label: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        kinds = {"exited": np.bool_, "predicted": np.int64, "label": np.int64}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value is None:
                continue
            column: NDArray[Any] = np.asarray(value, dtype=kinds.get(name, np.float64))
            if column.shape != np.shape(self.time) or column.ndim != 1:
                raise InputError(f"{name} must have shape [{np.size(self.time)}], got {list(column.shape)}")
            object.__setattr__(self, name, column)
        _between("propensity", self.propensity, strictly=True)
        _between("score", self.score)
        if not np.isin(self.wrong[~np.isnan(self.wrong)], (0, 1)).all():
            raise InputError("wrong must be 0, 1 or NaN (no label yet), got others")
        if not np.isfinite(self.time).all() or (np.diff(self.time) < 0).any():
            raise InputError("time must be finite and never run backwards; sort the rows by it")
        if (self.predicted is None) != (self.label is None):
            raise InputError("predicted and label must be given together; the rolling figures need both")

    def __len__(self) -> int:
        return int(self.time.size)

    @property
    def audited(self) -> NDArray[np.bool_]:
        """[N] exits whose label is known."""
        return np.asarray(self.exited & ~np.isnan(self.wrong), dtype=bool)

    def last(self, n: int) -> ServedColumns:
        """The last ``n`` rows."""
        first = max(len(self) - n, 0)
        columns = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return replace(self, **{name: one[first:] for name, one in columns.items() if one is not None})


# -------------------------------------------------------------------------------- risk from rows chosen for review


class Estimate(Record):
    """A risk with its interval; null where nothing is known, and then ``note`` says why."""

    value: float | None
    low: float | None
    high: float | None
    level: float
    n: int = Field(description="labelled rows that it rests on")
    n_wrong: int
    n_effective: float = Field(description="independent equally weighted rows worth as much: (sum w)^2 / sum w^2")
    method: Literal["clopper-pearson", "betting", "none"]
    note: str = ""


def naive_risk(wrong: ArrayLike, *, level: float = 0.95) -> Estimate:
    """Share of wrong answers among the labelled rows, in [0, 1]; **biased** unless all rows had one chance of review.

    Its interval is Clopper and Pearson's.

    Args:
        wrong: 0 or 1 [n].
        level: two-sided, inside (0, 1).
    """
    values, _ = _labelled(wrong, np.ones(np.shape(wrong)))
    return _equal(values, level, "every labelled row counts alike, whatever its chance of being chosen")


def hajek_risk(
    wrong: ArrayLike,
    propensity: ArrayLike,
    *,
    floor: float = LEAST_AUDIT_RATE,
    ceiling: float = 1.0,
    level: float = 0.95,
    alpha: float | None = None,
) -> Estimate:
    """Risk among all rows, from labelled rows weighted by 1 / propensity; in [0, 1], lower is better.

    The Hájek estimate, sum(wrong / e) / sum(1 / e). Late labels cost precision and add no bias, provided that their
    delay does not depend on being wrong. Its interval holds for any n and any propensities that the design allows, also
    those of rows that happened not to be drawn: by betting on E[(floor / e) wrong] against r E[floor / e] (Waudby-Smith
    & Ramdas 2010.09686), in an order shuffled with a fixed seed: if the risk changed over time, the interval is of its
    average. Where the design gives every row one chance (floor = ceiling) it is Clopper and Pearson's.

    Args:
        wrong: 0 or 1 [n].
        propensity: chance of each of having been chosen [n], in [floor, ceiling].
        floor: smallest chance of any row, drawn or not, in (0, 1].
        ceiling: largest chance of any row, drawn or not, in [floor, 1].
        level: two-sided, inside (0, 1).
        alpha: the risk in question, which the bets aim at; the interval holds for any.

    Raises:
        InputError: shapes differ or a value is outside its range.
    """
    values, chance = _labelled(wrong, propensity)
    check_share("level", level)
    if not 0 < floor <= ceiling <= 1:
        raise InputError(
            f"floor and ceiling must be in (0, 1] in this order, got {floor} and {ceiling}; floor is the smallest and "
            "ceiling the largest chance of any row"
        )
    outside = np.flatnonzero((chance < floor) | (chance > ceiling))
    if outside.size:
        raise InputError(
            f"propensity must be in [{floor:g}, {ceiling:g}], got {chance[outside[0]]:g} in row {outside[0]}; give the "
            "smallest and largest chance that any row had as floor and ceiling"
        )
    if values.size == 0 or floor == ceiling:
        return _equal(values, level)
    order, tail = _shuffled(values.size), (1 - level) / 2
    values, chance = values[order], chance[order]
    weight = floor / chance
    high = betting_upper(weight * values, tail, weights=weight, alpha=alpha)
    low = 1 - betting_upper(weight * (1 - values), tail, weights=weight)
    return _weighted(values, weight, float(weight @ values / weight.sum()), (low, high), level)


def horvitz_thompson_risk(wrong: ArrayLike, propensity: ArrayLike, *, level: float = 0.95) -> Estimate:
    """Risk among all N rows as sum(wrong / e) / N; unbiased if **every** selected row has its label.

    The Horvitz-Thompson estimate. Missing labels count as right, so late labels make it too low. Its interval holds for
    any N, by betting on the mean of e0 wrong / e over all rows (0 without a label, e0 the smallest e), shuffled as in
    ``hajek_risk``.

    Args:
        wrong: 0 or 1, NaN where the row was not chosen [N].
        propensity: chance of each row of being chosen [N], in (0, 1].
        level: two-sided, inside (0, 1).

    Raises:
        InputError: shapes differ or a value is outside its range.
    """
    every, chances = np.asarray(wrong, dtype=np.float64), np.asarray(propensity, dtype=np.float64)
    if every.shape != chances.shape:
        raise InputError(f"wrong and propensity must have one shape, got {list(every.shape)} and {list(chances.shape)}")
    known = ~np.isnan(every)
    values, chance = _labelled(every[known], chances[known])
    check_share("level", level)
    if values.size == 0:
        return _equal(values, level)
    scale, tail = float(chances.min()), (1 - level) / 2
    losses = np.zeros(every.size)
    losses[known] = scale * values / chance
    losses = losses[_shuffled(losses.size)]
    high = betting_upper(losses, tail) / scale
    low = (1 - betting_upper(1 - losses, tail)) / scale
    value = float((values / chance).sum() / every.size)
    found = _weighted(values, scale / chance, value, (low, high), level)
    return found.model_copy(update={"note": "above 1: weights are large and few"}) if value > 1 else found


# -------------------------------------------------------------------------------- evidence


class Evidence(Record):
    """An e-process on audited exits against "the risk of exits is at most alpha": large values are evidence of harm.

    It bets on 0/1 outcomes of audits, weighted by reference / propensity, and averages over five alternatives and over
    starting times of the harm. If the risk is at most alpha, its expectation is at most 1 at **any** time, so it ever
    reaches 1 / delta with chance delta at most (Ville; Waudby-Smith & Ramdas 2010.09686; starting times have a prior
    here, and none in e-detectors, Shin et al. 2203.03532).
    """

    alpha: float = Field(gt=0, lt=1)
    delta: float = Field(0.05, gt=0, lt=1, description="largest chance of any false alarm, ever")
    reference: float = Field(1.0, gt=0, le=1, description="propensity of an exit that counts once")
    floor: float = Field(LEAST_AUDIT_RATE, gt=0, le=1, description="no audited exit may have a smaller propensity")
    n: int = 0
    n_wrong: int = 0
    capital: tuple[float, ...] = (0.0,) * len(_ODDS)
    value: float = 1.0
    peak: float = 1.0
    alarm_at: float | None = Field(None, description="when it first reached 1 / delta")
    alarm_n: int | None = Field(None, description="after how many audited exits")

    @model_validator(mode="after")
    def _floor_below_reference(self) -> Self:
        if self.floor > self.reference:
            raise ValueError(f"floor must be at most reference, got {self.floor} and {self.reference}")
        return self

    @property
    def alarm(self) -> bool:
        """It has reached its limit since its start."""
        return self.alarm_at is not None

    @property
    def limit(self) -> float:
        """The value at which it alarms, 1 / delta."""
        return 1 / self.delta

    def after(self, wrong: ArrayLike, *, propensity: ArrayLike, time: ArrayLike) -> Evidence:
        """The evidence with one more audited exit, or several in the order in which labels became known.

        The delay of a label must not depend on being wrong.

        Args:
            wrong: the answer was wrong, 0 or 1; one or [n].
            propensity: chance with which it was chosen, in [floor, 1]; one or [n].
            time: when the label became known; one or [n].

        Raises:
            InputError: a propensity below the floor, for which the bets are too bold.
        """
        values, chance = _labelled(np.atleast_1d(wrong), np.atleast_1d(propensity))
        if chance.size and chance.min() < self.floor:
            raise InputError(
                f"propensity must be in [{self.floor:g}, 1], got {chance.min():g}; audit no exit more rarely, or begin "
                "with a smaller floor"
            )
        capital, bets = np.array(self.capital), self.bets
        value, peak, alarm_at, alarm_n = self.value, self.peak, self.alarm_at, self.alarm_n
        gains = (values - self.alpha) * self.reference / chance
        for n, (gain, at) in enumerate(zip(gains, np.atleast_1d(time).tolist(), strict=True), self.n + 1):
            capital, worth = grow(capital, n, gain, bets)
            value = float(worth)
            peak = max(peak, value)
            if alarm_at is None and value >= self.limit:
                alarm_at, alarm_n = float(at), n
        counts = {"n": self.n + int(values.size), "n_wrong": self.n_wrong + int(values.sum())}
        worths = {"capital": tuple(capital.tolist()), "value": value, "peak": peak}
        return self.model_copy(update={**counts, **worths, "alarm_at": alarm_at, "alarm_n": alarm_n})

    @property
    def bets(self) -> NDArray[np.float64]:
        """Share of the capital per unit of gain that each alternative bets [5]; never ruinous at the floor."""
        odds = np.array(_ODDS)
        most = _MOST_RISKED * self.floor / (self.alpha * self.reference)
        return np.minimum((odds - 1) / (odds * self.alpha + 1 - self.alpha), most)


def grow(
    capital: NDArray[np.float64], n: int, gain: NDArray[np.float64] | np.float64, bets: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Feed one audit to any number of e-processes: the new capital [..., 5], and the value of each [...].

    Args:
        capital: of each alternative [..., 5], zeros at the beginning.
        n: which audit this is, from 1.
        gain: (wrong - alpha) reference / propensity [...].
        bets: of ``Evidence``.
    """
    starting = (1 - _FIRST) * _HALF / ((n + _HALF - 1) * (n + _HALF)) + (_FIRST if n == 1 else 0.0)
    grown = compound(capital + starting, np.expand_dims(gain, -1), bets)
    return grown, np.asarray((1 - _FIRST) * _HALF / (n + _HALF) + grown.sum(axis=-1) / grown.shape[-1])


# -------------------------------------------------------------------------------- what scores alone can tell


class Cbpe(Record):
    """Confidence-based estimate of the risk of exits, which assumes that confidences are still calibrated.

    It shows a covariate shift (other scores) and is **blind to a concept shift**: it does not move if the same scores
    become wrong more often. It replaces no audit.
    """

    value: float | None = Field(description="mean of 1 - confidence over exits; null without one")
    low: float | None
    high: float | None
    level: float
    n: int = Field(description="exits")


def cbpe(confidence: ArrayLike, exited: ArrayLike, *, level: float = 0.95) -> Cbpe:
    """Estimate the risk of exits from calibrated confidences alone, in [0, 1]; lower is better. See ``Cbpe``.

    The interval is of the share of wrong answers in so many exits, by the normal law with a continuity correction.

    Args:
        confidence: chance that Stage A is right [N].
        exited: bool [N].
        level: two-sided, inside (0, 1).

    Raises:
        InputError: shapes differ or a confidence is outside [0, 1].
    """
    check_share("level", level)
    sure, out = np.asarray(confidence, dtype=np.float64), np.asarray(exited, dtype=bool)
    if sure.ndim != 1 or sure.shape != out.shape:
        raise InputError(f"confidence and exited must have shape [N], got {list(sure.shape)} and {list(out.shape)}")
    _between("confidence", sure)
    chance = 1 - sure[out]
    n = int(chance.size)
    if n == 0:
        return Cbpe(value=None, low=None, high=None, level=level, n=0)
    value = float(chance.mean())
    reach = float(ndtri((1 + level) / 2) * np.sqrt((chance * (1 - chance)).sum()) / n + 0.5 / n)
    return Cbpe(value=value, low=max(value - reach, 0.0), high=min(value + reach, 1.0), level=level, n=n)


class DriftConfig(Record):
    """How river's detectors watch the confidences."""

    recent: int = Field(1000, ge=1, description="a change counts as long as it lies in so many last rows")
    votes: int = Field(2, ge=1, le=3, description="so many of the three detectors must see one")
    reference: int = Field(200, ge=30, description="first rows, whose mean and SD standardise for Page-Hinkley")
    adwin_delta: float = Field(0.002, gt=0, lt=1)
    page_hinkley_delta: float = Field(0.1, ge=0, description="tolerated change, in standard deviations")
    page_hinkley_threshold: float = Field(70.0, gt=0)
    kswin_alpha: float = Field(1e-4, gt=0, lt=1)
    kswin_window: int = Field(300, ge=10)
    kswin_stat: int = Field(90, ge=5)
    kswin_every: int = Field(4, ge=1, description="rows to a row that KSWIN sees; it is slow")
    seed: int = 0

    @model_validator(mode="after")
    def _window_holds_both(self) -> Self:
        if 2 * self.kswin_stat > self.kswin_window:
            raise ValueError(f"kswin_window must be at least twice kswin_stat, got {self.kswin_window}")
        return self


class Drift(Record):
    """Changes of the confidences that river's detectors saw; rows are counted from the first one given."""

    changes: dict[Detector, list[int]]
    last: dict[Detector, bool] = Field(description="seen in the last rows")
    drifting: bool = Field(description="enough detectors saw one in the last rows")
    n: int


def drift(confidence: ArrayLike, config: DriftConfig | None = None) -> Drift:
    """Watch the confidences of served rows with ADWIN, Page-Hinkley and KSWIN; more votes are surer.

    A change of confidences is no harm: it raises the audit rate (``triggers``), and starts no training by itself. Same
    rows and seed, same result.

    Args:
        confidence: [N] in [0, 1], in the order of time.
        config: of the detectors.

    Raises:
        InputError: not a column in [0, 1].
        DependencyError: river is not installed.
    """
    config = DriftConfig() if config is None else config
    values = np.asarray(confidence, dtype=np.float64)
    if values.ndim != 1:
        raise InputError(f"confidence must have shape [N], got {list(values.shape)}")
    _between("confidence", values)
    try:
        from river.drift import ADWIN, KSWIN, PageHinkley
    except ModuleNotFoundError as error:
        raise need("continual", error.name or "river") from error
    first = values[: config.reference]
    centre, spread = (float(first.mean()), float(first.std())) if first.size else (0.0, 1.0)
    # Beyond ten standard deviations a value says no more of a change that lasts.
    standard = np.clip((values - centre) / max(spread, 1e-6), -10, 10)
    adwin = ADWIN(delta=config.adwin_delta)  # type: ignore[no-untyped-call]
    page_hinkley = PageHinkley(delta=config.page_hinkley_delta, threshold=config.page_hinkley_threshold)
    kswin = KSWIN(
        alpha=config.kswin_alpha, window_size=config.kswin_window, stat_size=config.kswin_stat, seed=config.seed
    )

    def seen(detector: Any, watched: NDArray[np.float64], every: int = 1) -> list[int]:
        """Places at which a detector of river saw a change."""
        found = []
        for place in range(0, watched.size, every):
            detector.update(float(watched[place]))
            if detector.drift_detected:
                found.append(place)
        return found

    changes: dict[Detector, list[int]] = {
        "adwin": seen(adwin, values),
        "page_hinkley": seen(page_hinkley, standard),
        "kswin": seen(kswin, values, config.kswin_every),
    }
    last = {name: bool(places) and places[-1] >= values.size - config.recent for name, places in changes.items()}
    return Drift(changes=changes, last=last, drifting=sum(last.values()) >= config.votes, n=int(values.size))


class Rolling(Record):
    """Figures of the last labelled answers; null until there are so many."""

    mcc_100: float | None = Field(description="Matthews correlation of the last 100, in [-1, 1]")
    accuracy_10: float | None = Field(description="of the last 10, in [0, 1]")
    n: int = Field(description="labelled answers; who abstained gave none")


def rolling(predicted: ArrayLike, label: ArrayLike) -> Rolling:
    """MCC of the last 100 and accuracy of the last 10 labelled answers; higher is better.

    Unweighted, over labelled rows alone: hard photos are over-represented.

    Args:
        predicted: class index of each answer [n], in the order of time.
        label: class index of each truth [n].

    Raises:
        InputError: shapes differ.
    """
    answers, truth = np.asarray(predicted, dtype=np.int64), np.asarray(label, dtype=np.int64)
    if answers.ndim != 1 or answers.shape != truth.shape:
        raise InputError(f"predicted and label must have shape [n], got {list(answers.shape)} and {list(truth.shape)}")
    n = int(answers.size)
    return Rolling(
        mcc_100=mcc(answers[-MCC_ROWS:], truth[-MCC_ROWS:]) if n >= MCC_ROWS else None,
        accuracy_10=accuracy(answers[-ACCURACY_ROWS:], truth[-ACCURACY_ROWS:]) if n >= ACCURACY_ROWS else None,
        n=n,
    )


# -------------------------------------------------------------------------------- triggers

Reason = Literal["risk alarm", "alarm stands", "confidence and drift", "labels", "age", "manual"]


class TriggerConfig(Record):
    """When the loop trains, and how many exits are audited."""

    min_labels: int = Field(500, ge=1, description="new labels that are worth a training")
    again_labels: int | None = Field(
        None, ge=1, description="the same after a training that did not end the alarm: the champion is the old one; "
        "null: half of min_labels"
    )  # fmt: skip
    max_age: float = Field(30 * 86400.0, gt=0, description="seconds after which a model is old")
    cooldown: float = Field(86400.0, ge=0, description="least seconds between trainings; a wish by hand does not wait")
    rearm: float = Field(0.8, gt=0, le=1, description="share of alpha below which CBPE counts as well again")
    audit_rate: float = Field(0.1, ge=LEAST_AUDIT_RATE, le=1)
    raised_audit_rate: float = Field(0.3, ge=LEAST_AUDIT_RATE, le=1)
    hold: float = Field(2 * 86400.0, ge=0, description="seconds without drift until the audit rate falls again")

    @model_validator(mode="after")
    def _raised_is_higher(self) -> Self:
        if self.raised_audit_rate < self.audit_rate:
            raise ValueError("raised_audit_rate must be at least audit_rate")
        return self


class Signals(Record):
    """Input of the triggers at one moment."""

    alarm_at: float | None = Field(None, description="last alarm of the e-process")
    cbpe: Cbpe | None = None
    drifting: bool = False
    new_labels: int = Field(0, ge=0, description="since the last training")
    manual: bool = False
    missing: str = Field("", description="what a training still needs, such as labels that certify; empty: nothing")


class TriggerState(Record):
    """State of the triggers between two looks."""

    since: float = Field(description="when the model that serves was trained, or the watch began")
    trained_at: float | None = Field(None, description="last time a training was asked for")
    alarm_seen: float | None = Field(None, description="last alarm that has asked for one")
    shifted: bool = Field(False, description="CBPE and drift have asked, and CBPE is not well again")
    drift_at: float | None = Field(None, description="last look that saw drift while the audit rate is raised")


class Advice(Record):
    """Whether to train now and why, what a training waits for, and how much to audit."""

    train: bool
    reasons: list[Reason]
    waiting: list[Reason] = Field(description="reasons that wait for the cooldown to end, or for what is missing")
    missing: str = ""
    audit_rate: float


def triggers(
    state: TriggerState, signals: Signals, *, alpha: float, now: float, config: TriggerConfig | None = None
) -> tuple[TriggerState, Advice]:
    """Decide whether to train, and at which rate to audit; harm trains, drift alone only raises the audit rate.

    An alarm asks once, and again with every ``again_labels`` new labels while its champion stays. CBPE above alpha
    together with drift asks once, and again only after CBPE was below ``rearm`` times alpha. Trainings are a cooldown
    apart, and the audit rate falls ``hold`` seconds after the last drift. A training waits for labels that it needs,
    and no reason is forgotten meanwhile; a request by hand does not wait.

    Args:
        state: what the last call gave.
        signals: as they are now.
        alpha: the limit of the risk.
        now: seconds since the epoch, not before the state's own times.
        config: limits.

    Raises:
        InputError: the clock runs backwards.
    """
    config = TriggerConfig() if config is None else config
    if now < max(state.since, state.trained_at or state.since):
        raise InputError(f"now must not be before the last training, got {now}; the clock runs backwards")
    cbpe_high = signals.cbpe is not None and signals.cbpe.low is not None and signals.cbpe.low > alpha
    cbpe_well = signals.cbpe is None or signals.cbpe.value is None or signals.cbpe.value < config.rearm * alpha
    alarmed = signals.alarm_at is not None and (state.alarm_seen is None or signals.alarm_at > state.alarm_seen)
    stands = signals.alarm_at is not None and not alarmed
    again = config.again_labels or -(-config.min_labels // 2)
    last = state.since if state.trained_at is None else state.trained_at
    asked: dict[Reason, bool] = {
        "risk alarm": alarmed,
        "alarm stands": stands and signals.new_labels >= again,
        "confidence and drift": cbpe_high and signals.drifting and not state.shifted,
        "labels": signals.new_labels >= config.min_labels,
        "age": now - last >= config.max_age,
        "manual": signals.manual,
    }
    reasons = [reason for reason, wanted in asked.items() if wanted]
    cool = state.trained_at is None or now - state.trained_at >= config.cooldown
    train = bool(reasons) and ((cool and not signals.missing) or signals.manual)
    drift_at = now if signals.drifting else state.drift_at
    if drift_at is not None and now - drift_at > config.hold:
        drift_at = None
    shifted = state.shifted and not cbpe_well
    # A round by hand that lacks something ends without a candidate, and what else asked has not been heard by it.
    heard = train and not signals.missing
    state = TriggerState(
        since=state.since,
        trained_at=now if heard else state.trained_at,
        alarm_seen=signals.alarm_at if heard and alarmed else state.alarm_seen,
        shifted=shifted or (heard and asked["confidence and drift"]),
        drift_at=drift_at,
    )
    rate = config.audit_rate if drift_at is None else config.raised_audit_rate
    split = {"reasons": reasons, "waiting": []} if train else {"reasons": [], "waiting": reasons}
    return state, Advice(train=train, **split, missing=signals.missing, audit_rate=rate)


# -------------------------------------------------------------------------------- helpers


def _between(name: str, values: NDArray[np.float64], *, strictly: bool = False) -> None:
    bad = np.flatnonzero(~((values > 0 if strictly else values >= 0) & (values <= 1)))
    if bad.size:
        raise InputError(f"{name} must be in {'(' if strictly else '['}0, 1], got {values[bad[0]]} in row {bad[0]}")


def _labelled(wrong: ArrayLike, propensity: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    values, chance = np.asarray(wrong, dtype=np.float64), np.asarray(propensity, dtype=np.float64)
    if values.ndim != 1 or values.shape != chance.shape:
        raise InputError(f"wrong and propensity must have shape [n], got {list(values.shape)} and {list(chance.shape)}")
    if not np.isin(values, (0, 1)).all():
        raise InputError("wrong must be 0 or 1, got others; leave out rows without a label")
    _between("propensity", chance, strictly=True)
    return values, chance


def _shuffled(n: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).permutation(n)


def _equal(values: NDArray[np.float64], level: float, note: str = "") -> Estimate:
    """The share of rows that all had one chance of review, if there are any."""
    check_share("level", level)
    n, k = int(values.size), int(values.sum())
    counts = {"level": level, "n": n, "n_wrong": k, "n_effective": float(n)}
    if n == 0:
        return Estimate(value=None, low=None, high=None, **counts, method="none", note="no label is known")
    low, high = clopper_pearson(k, n, level)
    return Estimate(value=k / n, low=low, high=high, **counts, method="clopper-pearson", note=note)


def _weighted(
    values: NDArray[np.float64], weight: NDArray[np.float64], value: float, ends: tuple[float, float], level: float
) -> Estimate:
    low, high = min(max(ends[0], 0.0), value), max(min(ends[1], 1.0), min(value, 1.0))
    counts = {"n": int(values.size), "n_wrong": int(values.sum())}
    effective = float(weight.sum() ** 2 / (weight @ weight))
    return Estimate(value=value, low=low, high=high, level=level, **counts, n_effective=effective, method="betting")
