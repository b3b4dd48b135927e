"""From a metric's value and its resamples to an interval.

Constructions, by what they are good for:

- ``bca`` (Efron 1987), the default for metrics that are smooth in the weights of the rows; its acceleration comes from
  the influence of every row (or group), in closed form, so no jackknife is run;
- ``t``, of differences by group in place of ``bca``: few groups differ, and a resample of them knows no tails;
- ``exact``, always used for Risk@Coverage and Coverage@Risk: binomial tests that hold for every threshold at once;
  ``by group`` and ``by weight``, the same tests with the effective number of trials of groups, or of rows with weights,
  which is an estimate;
- ``percentile``, for differences of those two and for what is no sum over rows;
- ``by bin``, of the ECE, which chance makes larger, never smaller, and resampling once more;
- ``logit``, the closed-form standard error on the logit scale (the log scale for NLL), without any resample.

Where no resample can help (no error at all, nobody exits) the interval is Clopper and Pearson's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit, ndtr, ndtri, stdtrit

from stage1_pro import native
from stage1_pro.metrics.binomial import binomial_ends
from stage1_pro.metrics.table import MetricSpec
from stage1_pro.notebook import Shown

# Below this the bootstrap's coverage falls under its level whatever the construction (BCa: .79 at two errors of 200).
FEW_ERRORS = 10
# By their effective number (NLL of 20 and of 30 even groups: .89).
FEW_GROUPS = 40


@dataclass(frozen=True, repr=False)
class Interval(Shown):
    """A value with its standard error and interval; NaN where there is none, and then ``note`` says why.

    ``method`` is "bca", "t", "exact", "by group", "by weight", "percentile", "by bin", "logit", "delong",
    "clopper-pearson" or "none".
    ``note`` is empty or a caution to show with the interval. ``replicates`` [B] are the metric of resamples.
    """

    value: float
    std: float
    low: float
    high: float
    level: float = 0.95
    method: str = "bca"
    note: str = ""
    replicates: NDArray[np.float64] = field(default_factory=lambda: np.empty(0), repr=False, compare=False)


@dataclass(frozen=True)
class Events:
    """How many independent units hold an event that a metric counts, of how many it speaks of.

    ``only`` says that no row is one ("no") or every row ("nothing but"), for a bound from one side; ``worth``, how many
    units of one size are worth as much, by the rows of each that the metric speaks of.
    """

    wrong: int
    units: int
    only: Literal["no", "nothing but"] | None
    worth: float

    @classmethod
    def among(
        cls,
        hit: NDArray[Any],
        unit: NDArray[np.uint32] | None,
        rows: NDArray[np.bool_] | slice = slice(None),
        weight: NDArray[np.float64] | None = None,
    ) -> Events:
        """Count hits [N] (0/1, or losses) among some rows by row, or by the unit [N] they belong to."""
        hit, unit = hit[rows], None if unit is None else unit[rows]
        weight = None if weight is None else weight[rows]
        only: Literal["no", "nothing but"] | None = "nothing but" if hit.size and hit.min() == 1 else None
        if not hit.any():
            only = "no"
        if unit is None:
            return cls(int(np.count_nonzero(hit)), hit.size, only, hit.size if weight is None else worth(weight))
        wrong, sizes = np.bincount(unit[hit > 0]), np.bincount(unit, weight)
        return cls(int(np.count_nonzero(wrong)), int(np.count_nonzero(sizes)), only, worth(sizes.astype(np.float64)))


def worth(weights: NDArray[np.float64]) -> float:
    """How many equal weights are worth as much as these, (sum w)^2 / sum w^2 (Kish); 0 of none."""
    total = float(np.einsum("i,i->", weights, weights))
    return float(weights.sum()) ** 2 / total if total > 0 else 0.0


def unit_of(n_rows: int, n_units: int) -> str:
    """What is resampled: "rows", also as groups that hold one each, or "groups"."""
    return "rows" if n_units == n_rows else "groups"


class Sizes(NamedTuple):
    """How many units of one size are worth as much as units of their sizes s: for a ``mean`` by s, for its ``spread``
    by s squared.
    """

    mean: float
    spread: float

    @classmethod
    def of(
        cls,
        unit: NDArray[np.integer],
        rows: NDArray[np.bool_] | slice = slice(None),
        weight: NDArray[np.float64] | None = None,
    ) -> Sizes:
        """Of the units of some rows, by each row's unit [N]."""
        sizes = np.bincount(unit[rows], None if weight is None else weight[rows]).astype(np.float64)
        return cls(worth(sizes), worth(sizes**2))


@dataclass(frozen=True)
class Estimate:
    """One metric of the rows and of their resamples, and what its interval can be made from.

    ``moments``: sums of squares and cubes of the units' influences; None for stepwise metrics. ``events``: what it
    counts; None for means of other things. ``influence`` [units], for differences. ``scale`` is what the value's
    rounding is relative to. ``sizes``: what the sizes of the units leave of their number. ``differing``: of a
    difference, the effective number of units in which the two differ. ``strays`` [B]: how far each resample is from the
    rows, in the distance that the metric is a length of; ``apart``: how far below and above it the truth can be by
    what binomial laws allow. ``paired``: a difference of two models. ``weighted``: rows count by their weights.
    """

    spec: MetricSpec
    value: float
    replicates: NDArray[np.float64]
    n_units: int
    sizes: Sizes
    moments: tuple[float, float] | None = None
    events: Events | None = None
    influence: NDArray[np.float64] | None = None
    scale: float = 0.0
    differing: float | None = None
    strays: NDArray[np.float64] | None = None
    apart: tuple[float, float] = (0.0, 0.0)
    paired: bool = False
    weighted: bool = False

    @classmethod
    def of(
        cls,
        spec: MetricSpec,
        target: float,
        ranked: native.Ranked,
        value: float,
        replicates: NDArray[np.float64],
        sizes: Sequence[int],
    ) -> Estimate:
        """Make one of sorted rows: ``replicates`` [B] of it, ``sizes`` the units of each stratum, ``target`` of its
        name.
        """
        n_units = sum(sizes)
        unit = ranked.unit if ranked.unit.size else None
        influence, rows, hit = spec.influence_on(ranked, value, target)
        if influence is not None and unit is not None:
            influence = np.bincount(unit, influence, n_units).astype(np.float64)
        if influence is not None and len(sizes) > 1:
            # A stratum keeps its size, so only what differs within it varies.
            means = np.add.reduceat(influence, np.cumsum([0, *sizes[:-1]])) / sizes
            influence = influence - np.repeat(means, sizes)
        moments = None if influence is None else _moments(influence)
        grouped = unit if unit is not None and n_units < unit.size else None
        weight = ranked.weight if ranked.weight.size else None
        events = None if hit is None else Events.among(hit, grouped, rows, weight)
        worths = Sizes(n_units, n_units)
        if grouped is not None or weight is not None:
            worths = Sizes.of(np.arange(ranked.error.size) if grouped is None else grouped, rows, weight)
        return cls(
            spec, float(value), replicates, n_units, worths, moments, events, influence, abs(value),
            weighted=weight is not None,
        )  # fmt: skip

    def minus(self, other: Estimate) -> Estimate:
        """The difference of two models' metric, from their resamples in pairs."""
        value, replicates = self.value - other.value, self.replicates - other.replicates
        events = None
        if self.events is not None and other.events is not None:
            # No bound of one model is one of the difference.
            events = replace(min(self.events, other.events, key=lambda one: one.wrong), only=None)
        both = replace(
            self, value=value, replicates=replicates, moments=None, events=events, influence=None,
            scale=self.scale + other.scale, paired=True, sizes=Sizes(*map(min, self.sizes, other.sizes)),
        )  # fmt: skip
        if self.influence is None or other.influence is None:
            return both
        return both.with_influence(self.influence - other.influence)

    def with_influence(self, influence: NDArray[np.float64]) -> Estimate:
        """The same difference with the influence of every unit [units] on it."""
        return replace(self, influence=influence, moments=_moments(influence), differing=worth(influence**2))

    def exactly(self, ends: tuple[float, float], level: float, unit: str) -> Interval:
        """The interval with ends that no resample made."""
        std = self._std()
        method, note = ("exact", "") if unit == "rows" else ("by group", self._caution(unit))
        if self.weighted:
            method, note = "by weight", self._caution(unit)
        low, high = min(ends[0], self.value), max(ends[1], self.value)
        return Interval(self.value, std, low, high, level, method, note, self.replicates)

    def interval(self, level: float, method: str, unit: str) -> Interval:
        """Cut the interval, or say why there is none; ``unit``: rows or groups."""
        nan = math.nan
        if math.isnan(self.value):
            return Interval(nan, nan, nan, nan, level, "none", f"undefined: {self.spec.undefined}", self.replicates)
        bound = self._bound(level, unit)
        if bound is not None:
            return bound
        defined = self.replicates[~np.isnan(self.replicates)]
        std = self._std()
        # Sums in another order differ by so much; what is closer is the same number.
        close = 1e-11 * self.scale
        reason = ""
        if self.n_units == 1:
            reason = f"1 {unit[:-1]} cannot be resampled"
        elif method == "logit":
            if self.moments is None or math.sqrt(self.moments[0]) <= close or not 0 < self.value < self.spec.top:
                reason = "its standard error is 0"
        elif defined.size < 2 or (max(self.apart) <= close and defined.max() - defined.min() <= close):
            few = ("it is undefined in every resample", "one resample gives none")
            reason = few[defined.size] if defined.size < 2 else "all replicates are equal"
        if reason:
            return Interval(self.value, nan, nan, nan, level, "none", f"no interval: {reason}", self.replicates)
        notes = [self._caution(unit)]
        if defined.size < self.replicates.size:
            notes.append(f"undefined in {self.replicates.size - defined.size} of {self.replicates.size} resamples")
        note = "; ".join(filter(None, notes))
        if method == "logit":
            assert self.moments is not None
            # The sum of squares takes the units' mean as known; a factor mends that where they are few.
            error = math.sqrt(self.moments[0] * self.n_units / (self.n_units - 1))
            low, high = _on_logit_scale(self.value, error, level, self.spec.top)
            return Interval(self.value, error, low, high, level, method, note, self.replicates)
        method, (low, high) = self._ends(level, method, unit, defined, close)
        if high - low <= close:
            # Replicates differ, but most pile up on one value, such as a coverage of 1.
            share = np.count_nonzero(np.abs(defined - low) <= close) / defined.size
            note = "; ".join(filter(None, [note, f"no width: {share:.1%} of the resamples give this value"]))
        if method == "by bin" and low <= self.spec.bottom:
            note = "; ".join(filter(None, [note, "a calibrated model can give as much on so few rows"]))
        low, high = min(low, self.value), max(high, self.value)
        return Interval(self.value, std, low, high, level, method, note, self.replicates)

    def _ends(
        self, level: float, method: str, unit: str, defined: NDArray[np.float64], close: float
    ) -> tuple[str, tuple[float, float]]:
        """The method that serves, and its ends."""
        tails = (1 - level) / 2, (1 + level) / 2
        if self.strays is not None:
            return "by bin", self._by_bin(level)
        if method == "bca" and self.moments is not None:
            if self.influence is not None and self.differing and unit == "groups":
                most = self.spec.top - self.spec.bottom
                low, high = cluster_t(self.value, self.influence, level)
                return "t", (max(low, -most), min(high, most))
            if unit == "groups":
                # Percentiles take the spread of the units for known; few units tell it badly (Hesterberg 2015).
                far = reach(level, self.sizes.spread)
                tails = max(float(ndtr(-far)), 1e-9), min(float(ndtr(far)), 1 - 1e-9)
            tails = _bca_tails(self.value, defined, self.moments, tails, close)
        else:
            method = "percentile"
        low, high = np.quantile(defined, tails)
        return method, (float(low), float(high))

    def _by_bin(self, level: float) -> tuple[float, float]:
        """Ends of a sum of absolute values, which noise makes larger, never smaller.

        The truth is no smaller than the value less what the bins stray in all, and no larger than what the value is on
        average. Resamples of few errors know no more of them, so binomial laws reach as far at least.
        """
        assert self.strays is not None
        far = reach(level, self.sizes.spread)
        stray = float(np.quantile(self.strays, (1 + level) / 2)) * far / float(ndtri((1 + level) / 2))
        low = self.value - max(stray, self.apart[0])
        high = self.value + max(far * float(self.replicates.std(ddof=1)), self.apart[1])
        return max(low, self.spec.bottom), min(high, self.spec.top)

    def _std(self) -> float:
        defined = self.replicates[~np.isnan(self.replicates)]
        return float(defined.std(ddof=1)) if defined.size > 1 else math.nan

    def _bound(self, level: float, unit: str) -> Interval | None:
        """From Clopper and Pearson's interval of the share that the absence (or ubiquity) of events allows."""
        events = self.events
        if self.spec.bound is None or events is None or events.only is None or events.units == 0:
            return None
        share, tail = 0.0 if events.only == "no" else events.worth, (1 - level) / 2
        ends = self.spec.bound(*(float(binomial_ends(share, events.worth, tail, upper=end)) for end in (False, True)))
        units = unit[:-1] if events.units == 1 else unit
        note = f"{events.only} {self.spec.events} in {events.units} {units}: Clopper-Pearson, not a bootstrap"
        if events.worth < events.units - 0.5:
            unlike = "weights" if self.weighted else "sizes"
            note += f"; by their unlike {unlike} they count as {events.worth:.0f}, and larger ones could hold more"
        return Interval(self.value, math.nan, *ends, level, "clopper-pearson", note, self.replicates)

    def _caution(self, unit: str) -> str:
        notes = []
        if self.differing is not None:
            if self.differing < FEW_ERRORS - 0.5:
                notes.append(f"only about {self.differing:.0f} {unit} in which the two differ")
        elif self.events is not None and self.events.units and self.events.wrong < FEW_ERRORS:
            notes.append(f"only {_counted(self.events.wrong, unit)} with {self.spec.events}")
        if self.paired and self.spec.jumps:
            notes.append("resamples of values that jump")
        # Where nothing is accepted there are no sizes.
        effective = self.sizes.mean or self.n_units
        if (unit == "groups" or self.weighted) and effective < FEW_GROUPS:
            even = effective > self.n_units - 0.5
            by = "" if even else f" by their {'weights' if self.weighted else 'sizes'}"
            notes.append(f"only {_counted(round(effective), unit)}{by}")
        return f"{' and '.join(notes)}: the interval covers less often than its level" if notes else ""


def cluster_t(value: float, influence: NDArray[np.float64], level: float) -> tuple[float, float]:
    """Ends by Student's t from the influence of every unit [G].

    Degrees of freedom count the units that the spread rests on: many that do not differ at all tell nothing of how much
    those vary that do.
    """
    squares = influence**2
    error = math.sqrt(float(squares.sum()) * influence.size / (influence.size - 1))
    width = float(stdtrit(max(worth(squares) - 1, 1.0), (1 + level) / 2)) * error
    return value - width, value + width


def _counted(number: int, unit: str) -> str:
    return f"{number} {unit[:-1] if number == 1 else unit}"


def reach(level: float, n: float) -> float:
    """How many standard errors of ``n`` units an interval reaches, by Student's t."""
    n = max(n, 2.0)
    return float(stdtrit(n - 1, (1 + level) / 2)) * math.sqrt(n / (n - 1))


def _moments(influence: NDArray[np.float64]) -> tuple[float, float]:
    # No array in between: new memory costs more than the sums.
    squares, cubes = np.einsum("i,i->", influence, influence), np.einsum("i,i,i->", influence, influence, influence)
    return float(squares), float(cubes)


def _on_logit_scale(value: float, error: float, level: float, top: float) -> tuple[float, float]:
    """A normal interval on the logit scale of [0, top], or the log scale where there is no top."""
    reach = float(ndtri((1 + level) / 2))
    if math.isinf(top):
        step = math.exp(reach * error / value)
        return value / step, value * step
    share = value / top
    center, width = float(logit(share)), reach * error / top / (share * (1 - share))
    return top * float(expit(center - width)), top * float(expit(center + width))


def _bca_tails(
    value: float,
    replicates: NDArray[np.float64],
    moments: tuple[float, float],
    tails: tuple[float, float],
    close: float,
) -> tuple[float, float]:
    """Shift the two tail probabilities for bias and skewness (Efron 1987); what is within ``close`` is a tie."""
    n = replicates.size
    below = (np.count_nonzero(replicates < value - close) + np.count_nonzero(replicates <= value + close)) / (2 * n)
    # A value outside all its replicates has no finite normal score; half a replicate is as far as they can tell.
    bias = float(ndtri(min(max(below, 0.5 / n), 1 - 0.5 / n)))
    second, third = moments
    acceleration = third / (6 * second**1.5) if second > 0 else 0.0

    def shift(tail: float) -> float:
        score = bias + float(ndtri(tail))
        scale = 1 - acceleration * score
        return float(ndtr(bias + score / scale)) if scale > 0 else float(score > 0)

    return shift(tails[0]), shift(tails[1])
