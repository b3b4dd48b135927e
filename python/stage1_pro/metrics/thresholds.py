"""Ends of Risk@Coverage and Coverage@Risk that hold at once for every threshold of the same rows.

A bootstrap takes the best of all thresholds for given. Here each threshold is a hypothesis, tested by exact binomial
tails, and thresholds are walked in an order that no error decides (fixed-sequence testing, as in Learn then Test,
2110.01052): a walk passes the true threshold only if the one test there errs. The sample's coverage is not the
population's, which costs a fifth of the tails.

Losses between 0 and 1 take e times the binomial tail (Bentkus 2004).

With groups nothing is exact. A share of rows is tested as if it were of so many independent trials as the accepted rows
are worth: (sum s)^2 / sum s^2 for s rows of each group (Kish), which is right for near-copies and safe for groups whose
rows differ, or r (1 - r) over the variance of the share r by groups (Korn and Graubard 1998) where that is less: errors
that follow the size of their group. Where few are wrong the variance says nothing, so Kish's number is made smaller by
as much as it is too large for all rows. Rows with weights count like groups of such sizes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc

from stage1_pro import native
from stage1_pro.metrics.binomial import binomial_ends

Floats = NDArray[np.float64]
# Of each tail, for where the threshold lies in the population; the rest is for the risk.
_PLACE = 0.2


class Walk:
    """What is accepted at every threshold of sorted rows, from the strictest to the laxest; arrays [M].

    ``accepted`` rows (or their weight), ``risk`` among them, and the independent ``trials`` that they are worth;
    ``places``, as how many trials all rows tell of the share that is accepted; ``n``, all rows; ``counts``: errors are
    0/1.
    """

    def __init__(
        self, accepted: Floats, wrong: Floats, *, worth: tuple[Floats, Floats] | None = None, counts: bool = True
    ) -> None:
        self.n = float(accepted[-1])
        self.accepted, self.wrong, self.risk = accepted, wrong, wrong / accepted
        self.trials: Floats = accepted if worth is None else worth[0]
        self.places: Floats = np.full(accepted.size, self.n) if worth is None else worth[1]
        self.counts = counts
        # Of rows with 0/1 errors only those thresholds decide that an error begins or ends at.
        self.rises = np.append(True, self.wrong[1:] > self.wrong[:-1])
        if worth is not None or not self.counts:
            self.rises[:] = True

    @classmethod
    def of(cls, ranked: native.Ranked, n_units: int) -> Self:
        """Of sorted rows, which belong to so many units."""
        last = ranked.ends.astype(np.int64) - 1
        grouped, counts = ranked.unit.size > 0 and n_units < ranked.error.size, ranked.error.dtype == np.uint8
        if not grouped and not ranked.weight.size:
            return cls(ranked.through, np.cumsum(ranked.error, dtype=np.float64)[last], counts=counts)
        weight = ranked.weight if ranked.weight.size else np.ones(ranked.error.size)
        unit = ranked.unit if grouped else np.arange(ranked.error.size, dtype=np.uint32)
        accepted, wrong = np.cumsum(weight)[last], np.cumsum(weight * ranked.error)[last]
        worths = cls._by_groups(unit, weight, weight * ranked.error, last, accepted, wrong / accepted)
        return cls(accepted, wrong, worth=worths, counts=counts)

    @classmethod
    def _by_groups(
        cls,
        unit: NDArray[np.uint32],
        weight: Floats,
        error: Floats,
        last: NDArray[np.int64],
        accepted: Floats,
        risk: Floats,
    ) -> tuple[Floats, Floats]:
        """``trials`` and ``places`` from sums over groups of their accepted rows s and the errors w among them."""
        rows, wrong = earlier_of_unit(unit, np.stack([weight, error]))
        square = np.cumsum(weight * (2 * rows + weight))[last]
        both = np.cumsum(error * (rows + weight) + weight * wrong)[last]
        wrongs, n = np.cumsum(error * (2 * wrong + error))[last], float(accepted[-1])
        kish = accepted**2 / square
        design = cls._worth(risk, wrongs - 2 * risk * both + risk**2 * square, accepted)
        trials = np.minimum(kish / max(1.0, kish[-1] / design[-1]), design)
        share, sizes = accepted / n, np.bincount(unit, weight)[unit]
        spread = square - 2 * share * np.cumsum(weight * sizes)[last] + share**2 * square[-1]
        return np.maximum(trials, 1.0), np.clip(cls._worth(share, spread, n), 1.0, kish[-1])

    @staticmethod
    def _worth(share: Floats, squares: Floats, rows: Floats | float) -> Floats:
        """Trials with the variance of a share by groups, from its sum of ``squares``; infinite where that is 0."""
        some = squares > 1e-9 * rows
        return np.where(some, share * (1 - share) * rows**2 / np.where(some, squares, 1.0), np.inf)

    def coverage_at_risk(self, risk: float, level: float) -> tuple[float, float]:
        """Two-sided ends of the largest coverage whose selective risk is at most ``risk``."""
        tail = (1 - level) / 2
        before = np.flatnonzero(np.append(self.rises[1:], True))
        open_ = before[~self._rejects(before, risk, (1 - _PLACE) * tail, above=True)]
        laxest = int(open_[-1]) if open_.size else -1
        # All that is laxer has too large a risk.
        high = 1.0 if laxest == self.risk.size - 1 else self._share(laxest, upper=True, tail=_PLACE * tail)
        certified = self._certified(risk, (1 - _PLACE) * tail)
        if certified == self.risk.size - 1:
            return 1.0, high
        return (self._share(certified, upper=False, tail=_PLACE * tail) if certified >= 0 else 0.0), high

    def risk_at_coverage(self, coverage: float, level: float) -> tuple[float, float]:
        """Two-sided ends of the selective risk at the smallest coverage that is at least ``coverage``."""
        tail = (1 - level) / 2
        hits = self.accepted / self.n * self.places

        def reached(j: int) -> bool:
            return bool(_at_most(hits[j], self.places[j], coverage) > _PLACE * tail)

        def passed(j: int) -> bool:
            return bool(_at_least(hits[j], self.places[j], coverage) <= _PLACE * tail)

        # The threshold is one of those whose share may be as large, up to the first before which it is surely larger.
        places = range(hits.size)
        first, last = bisect_left(places, True, key=reached), bisect_left(places, True, key=passed)
        wrong, rows, trials = (all_[first : last + 1] for all_ in (self.wrong, self.accepted, self.trials))
        # Of thresholds with the same errors the first has the highest upper end, the last the lowest lower one.
        new = np.append(True, wrong[1:] != wrong[:-1])
        ends = []
        for at, upper in ((new, True), (np.append(new[1:], True), False)):
            errors = self._hits(wrong[at] / rows[at], trials[at], up=upper)
            ends.append(binomial_ends(errors, trials[at], self._tail((1 - _PLACE) * tail), upper=upper))
        return float(ends[1].min()), float(ends[0].max())

    def risk_ends(self, at: NDArray[np.int64], tail: float) -> tuple[Floats, Floats]:
        """Ends of the risk at some thresholds, each of which has ``tail`` beyond either end."""
        low, high = (
            binomial_ends(
                self._hits(self.risk[at], self.trials[at], up=upper), self.trials[at], self._tail(tail), upper=upper
            )
            for upper in (False, True)
        )
        return low, high

    def _certified(self, risk: float, tail: float) -> int:
        """The laxest threshold to which a walk from a start gets while "the risk is above" is rejected; -1: none.

        Walks start where so many trials are accepted that no error among them is enough, and where twice, four times as
        many are; they share the tail.
        """
        if risk in (0, 1):
            return self.risk.size - 1 if risk else -1
        per_error = -math.log1p(-risk)
        most = self.trials.max()
        none = self._tail(tail)
        walks = max(1, 1 + math.floor(math.log2(max(most * per_error / -math.log(none), 1))))
        least = math.log(walks / none) / per_error
        starts = [int(np.argmax(self.trials >= least * 2**walk)) for walk in range(walks) if most >= least * 2**walk]
        tested = self.rises.copy()
        tested[starts] = True
        places = np.flatnonzero(tested)
        passes = self._rejects(places, risk, tail / walks, above=False)
        stops = np.append(places[~passes], self.risk.size)
        return max(
            (int(stops[np.searchsorted(stops, start)]) - 1 for start in starts if start not in stops), default=-1
        )

    def _rejects(self, at: NDArray[np.int64], risk: float, tail: float, *, above: bool) -> NDArray[np.bool_]:
        """At which thresholds "the risk is at most ``risk``" is rejected since it is ``above``, or the reverse."""
        tail, seen, trials = self._tail(tail), self.risk[at], self.trials[at]
        open_ = seen > risk if above else seen < risk
        # Hoeffding's bound spares many of the exact tails.
        rejected: NDArray[np.bool_] = open_ & (2 * trials * (seen - risk) ** 2 >= -math.log(tail))
        rest = np.flatnonzero(open_ & ~rejected)
        hits = self._hits(seen[rest], trials[rest], up=above)
        rejected[rest] = (_at_least if above else _at_most)(hits, trials[rest], risk) <= tail
        return rejected

    def _hits(self, risk: Floats, trials: Floats, *, up: bool) -> Floats:
        """Errors among the trials; a sum of losses is rounded to the safe side."""
        hits = risk * trials
        return np.round(hits, 9) if self.counts else np.floor(hits) if up else np.ceil(hits)

    def _tail(self, tail: float) -> float:
        return tail if self.counts else tail / math.e

    def _share(self, at: int, *, upper: bool, tail: float) -> float:
        """An end of the coverage of the threshold ``at``; -1 is stricter than all."""
        n = float(self.places[at])
        hits = 0.0 if at < 0 else float(self.accepted[at]) / self.n * n
        return float(binomial_ends(hits, n, tail, upper=upper))


def earlier_of_unit(unit: NDArray[np.uint32], values: Floats) -> Floats:
    """Sums [K, N] of ``values`` [K, N] over the earlier rows of each row's unit [N]."""
    place = np.argsort(unit, kind="stable")
    sizes, sums = np.bincount(unit), np.cumsum(values[:, place], axis=1) - values[:, place]
    earlier = np.empty(values.shape)
    earlier[:, place] = sums - np.repeat(sums[:, np.cumsum(sizes) - sizes], sizes, axis=1)
    return earlier


def _at_most(hits: Floats, trials: Floats | float, share: float) -> Floats:
    """P(Bin(trials, share) <= hits), also between integers."""
    inside = hits < trials
    return np.where(inside, betainc(np.where(inside, trials - hits, 1.0), hits + 1, 1 - share), 1.0)


def _at_least(hits: Floats, trials: Floats | float, share: float) -> Floats:
    """P(Bin(trials, share) >= hits), also between integers."""
    some = hits > 0
    return np.where(some, betainc(np.where(some, hits, 1.0), np.maximum(trials - hits, 0) + 1, share), 1.0)
