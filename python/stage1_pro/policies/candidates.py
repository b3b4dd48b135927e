"""Tests at candidate thresholds, on exact counts or on means of groups, and the choice among those that pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro.arguments import binary, check_share, floats, indices, shown, whole
from stage1_pro.errors import InputError
from stage1_pro.metrics.binomial import clopper_pearson_upper
from stage1_pro.policies import bounds
from stage1_pro.policies.certificate import Method, RiskCounts

# These speak of the joint share P(error and accepted), which cannot fall as the threshold gets laxer.
JOINT = ("rcps", "crc")


@dataclass(frozen=True)
class Risk:
    """A risk to hold below ``alpha``: the share of errors among the accepted rows that are trials.

    ``errors`` and ``trials`` are 0/1 or bool [N]; an error that is no trial does not count. ``trials`` None: every row
    is one. With ``otherwise`` [N], the errors of rows that are not accepted, the share is of all trials, accepted or
    not.

    Raises:
        InputError: name is no text, alpha is outside (0, 1), or errors or trials are not what they must be.
    """

    name: str
    alpha: float
    errors: NDArray[np.bool_]
    trials: NDArray[np.bool_] | None = None
    otherwise: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise InputError(f"name must be a text, got {shown(self.name)}; name the risk for messages")
        check_share(f"alpha of {self.name}", self.alpha)
        object.__setattr__(self, "errors", binary(f"errors of {self.name}", self.errors))
        if self.trials is not None:
            object.__setattr__(self, "trials", binary(f"trials of {self.name}", self.trials))
        if self.otherwise is not None:
            object.__setattr__(self, "otherwise", binary(f"errors otherwise of {self.name}", self.otherwise))

    def where(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> Risk:
        """The risk of some rows; ``rows`` bool [N], or indices."""
        trials, otherwise = (None if one is None else one[rows] for one in (self.trials, self.otherwise))
        return replace(self, errors=self.errors[rows], trials=trials, otherwise=otherwise)

    def outcomes(self, accepted: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Errors and trials [N] where these rows are accepted."""
        trials = np.ones(accepted.shape, dtype=bool) if self.trials is None else self.trials
        if self.otherwise is None:
            return self.errors & trials & accepted, trials & accepted
        return np.where(accepted, self.errors, self.otherwise) & trials, trials

    def tally(
        self, values: NDArray[np.float64], order: NDArray[np.float64], rows: NDArray[np.int64], *, joint: bool = False
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Errors and trials among ``rows``, all of which are trials, at each threshold; both [T].

        Args:
            values: scores [N].
            order: thresholds [T].
            rows: indices.
            joint: trials count whether accepted or not.
        """
        k, m = count_at_least(values[rows[self.errors[rows]]], order), count_at_least(values[rows], order)
        if self.otherwise is None:
            return k, np.full(order.size, rows.size) if joint else m
        other = rows[self.otherwise[rows]]
        return k + other.size - count_at_least(values[other], order), np.full(order.size, rows.size)


@dataclass(frozen=True)
class Mix:
    """Another mix of classes than rows come in: the share of each class [K] where it serves, and the class of rows [N].

    Rows are visited in a random order, in which the class that comes next is drawn from what is left, with chances that
    are known: by share / chance a row counts for the mix, whatever classes rows come in.

    Raises:
        InputError: shares that are no mix, or classes beyond them.
    """

    shares: NDArray[np.float64]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        values = floats("shares", self.shares)
        if values.ndim != 1 or not (values >= 0).all() or abs(float(values.sum()) - 1) > 1e-9:
            raise InputError(f"shares must be those of the classes, 0 or more and 1 in all, got {shown(self.shares)}")
        object.__setattr__(self, "shares", values)
        object.__setattr__(self, "labels", indices("labels", self.labels, n_classes=values.size))

    @classmethod
    def at(cls, prior: float, positive: int, labels: NDArray[np.int64], n_classes: int) -> Mix:
        """The mix in which one class has another share, and the others share the rest as they do among rows [N]."""
        counts = np.bincount(labels, minlength=n_classes).astype(np.float64)
        counts[positive] = 0
        if not counts.any():
            counts = np.ones(n_classes)
            counts[positive] = 0
        shares = (1 - prior) * counts / counts.sum()
        shares[positive] = prior
        return cls(shares, labels)

    def where(self, rows: NDArray[np.generic]) -> Mix:
        """The same of some rows, by mask or index."""
        return Mix(self.shares, self.labels[rows])

    @property
    def _counts(self) -> NDArray[np.int64]:
        return np.bincount(self.labels, minlength=self.shares.size)

    @property
    def known(self) -> bool:
        """Whether each class of the mix is among the rows."""
        return bool(self._counts[self.shares > 0].all())

    @property
    def effective(self) -> float:
        """So many rows in the mix itself would tell as much."""
        return float(1 / (self.shares**2 / np.maximum(self._counts, 1)).sum())

    @property
    def square(self) -> float:
        """Mean square of the weights of ``visits``, by the numbers of classes alone."""
        each = self.shares / np.maximum(self._counts, 1)
        return float((self.shares * each).sum() / self.labels.size / each.max() ** 2)

    def visits(self, seed: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Rows [M] as they are visited, and the weight of each [M] in (0, 1], as far as each class is still to come."""
        order = np.random.default_rng(seed).permutation(self.labels.size)
        labels, left = self.labels[order], self._counts - np.zeros((order.size, 1), dtype=np.int64)
        left[1:] -= np.cumsum(labels[:, None] == np.arange(self.shares.size), axis=0)[:-1]
        some = self.shares > 0
        n = int((left[:, some] > 0).all(axis=1).sum())
        each = self.shares[some] / left[:n, some]
        at = (np.cumsum(some) - 1)[labels[:n]]
        # A class that the mix has not counts nothing.
        weight = np.where(some[labels[:n]], each[np.arange(n), at], 0.0) / each.max(axis=1, initial=0.0)
        return order[:n], weight

    def ratios(self) -> NDArray[np.float64]:
        """By how much every row [N] counts more in the mix than among these rows."""
        seen = self._counts / max(self.labels.size, 1)
        return np.asarray((self.shares / np.where(seen > 0, seen, 1.0))[self.labels])


class Counts:
    """Exact binomial tests at every candidate, one row a unit.

    ``joint``: trials count whether accepted or not.
    """

    chunk = 4096

    def __init__(
        self,
        values: NDArray[np.float64],
        risks: Sequence[Risk],
        drawn: NDArray[np.int64],
        among: Sequence[NDArray[np.int64]],
        order: NDArray[np.float64],
        min_coverage: float | None,
        joint: bool,
    ) -> None:
        self.n, self.order, self.risks, self.min_coverage = drawn.size, order, risks, min_coverage
        self.accepted = count_at_least(values[drawn], order)
        counted = [risk.tally(values, order, rows, joint=joint) for risk, rows in zip(risks, among, strict=True)]
        self.k, self.m = [k for k, _ in counted], [m for _, m in counted]

    def p_coverage(self, at: NDArray[np.int64]) -> NDArray[np.float64]:
        """Of "the coverage is below its limit" at candidates [T]; 0 where there is no limit."""
        if self.min_coverage is None:
            return np.zeros(at.size)
        return bounds.coverage_p_value(self.accepted[at], self.n, self.min_coverage)

    def p_risk(self, at: NDArray[np.int64], alphas: Sequence[float] | None = None) -> NDArray[np.float64]:
        """Of "a risk is above its limit": the largest of the risks' at candidates [T]; ``alphas``: other limits."""
        limits = [risk.alpha for risk in self.risks] if alphas is None else alphas
        found = [
            bounds.binomial_cdf(k[at].astype(np.float64), m[at].astype(np.float64), alpha)
            for alpha, k, m in zip(limits, self.k, self.m, strict=True)
        ]
        return np.asarray(np.max(found, axis=0), dtype=np.float64)

    def risks_at(self, i: int, level: float) -> tuple[RiskCounts, ...]:
        """Counts at candidate ``i``, with bounds at 1 - level."""
        counts = [(int(k[i]), int(m[i])) for k, m in zip(self.k, self.m, strict=True)]
        return tuple(
            RiskCounts(
                name=risk.name, alpha=risk.alpha, trials=m, errors=k, bound=clopper_pearson_upper(k, m, 1 - level),
                p_value=float(bounds.binomial_cdf(np.array(float(k)), np.array(float(m)), risk.alpha)),
            )
            for risk, (k, m) in zip(self.risks, counts, strict=True)
        )  # fmt: skip

    def accepted_at(self, i: int) -> int:
        """Units accepted."""
        return int(self.accepted[i])

    def coverage_at(self, i: int) -> float:
        """Their share."""
        return int(self.accepted[i]) / max(self.n, 1)

    def crc_risk(self, risk: int, i: int) -> float:
        """(errors + 1) / (trials + 1)."""
        return (int(self.k[risk][i]) + 1) / (int(self.m[risk][i]) + 1)

    def within_crc(self, i: int) -> bool:
        """Whether that is within every limit, in exact integers."""
        return all(
            int(k[i]) <= bounds.crc_budget(risk.alpha, int(m[i]))
            for risk, k, m in zip(self.risks, self.k, self.m, strict=True)
        )


class Means:
    """Tests by betting on the means of groups, which are visited in a seeded order; the interface of ``Counts``."""

    chunk = 8

    def __init__(
        self,
        values: NDArray[np.float64],
        risks: Sequence[Risk],
        names: NDArray[np.generic],
        order: NDArray[np.float64],
        delta: float,
        min_coverage: float | None,
        joint: bool,
        seed: int,
        largest: int | None = None,
        squares: Sequence[float] | None = None,
    ) -> None:
        _, member = np.unique(names, return_inverse=True)
        self.n = int(member.max(initial=-1)) + 1
        self.order, self.risks, self.delta, self.min_coverage, self.joint = order, risks, delta, min_coverage, joint
        # An order of betting that no value decides.
        self.member = np.random.default_rng(seed).permutation(self.n)[member]
        self.ranked = ranked(values)
        self.ends = count_at_least(values, order)
        everyone = np.ones(values.size, dtype=bool)

        def weights(trials: NDArray[np.bool_]) -> NDArray[np.float64]:
            # Of photos: whole counts, divided by the largest group once. Else means: a group's rows share one.
            return group_weights(self.member, trials) if largest is None else trials.astype(np.float64)

        self.photos, self.scale = largest is not None, largest or 1
        self.everyone = weights(everyone)
        self.sizes = np.bincount(self.member, minlength=self.n)
        self.whole = np.ones(self.n) if largest is None else self.sizes / largest
        self.trials = [everyone if risk.trials is None else risk.trials for risk in risks]
        self.shares = [weights(trials) for trials in self.trials]
        self.squares = squares

    def _means(self, i: int, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Each group's sum of the weights of accepted rows [G]: a mean, as they sum to 1 over all its trials."""
        rows = self.ranked[: self.ends[i]]
        return np.minimum(np.bincount(self.member[rows], weights[rows], self.n) / self.scale, 1.0)

    def _pairs(self, risk: int, i: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Losses and weights of the groups that have trials."""
        share = self.shares[risk]
        has = np.bincount(self.member, share, self.n) > 0
        loss, otherwise = self._means(i, share * self.risks[risk].errors), self.risks[risk].otherwise
        if otherwise is not None:
            of_all = np.bincount(self.member, share * otherwise, self.n) / self.scale
            loss = loss + np.maximum(of_all - self._means(i, share * otherwise), 0.0)
            whole = np.bincount(self.member, share, self.n) / self.scale
            return np.minimum(loss, whole)[has], whole[has]
        return loss[has], np.ones(int(has.sum())) if self.joint else self._means(i, share)[has]

    def p_coverage(self, at: NDArray[np.int64]) -> NDArray[np.float64]:
        """Of "the coverage is below its limit", from the accepted share of each group."""
        if self.min_coverage is None:
            return np.zeros(at.size)
        wish = 1 - self.min_coverage
        deferred = [np.maximum(self.whole - self._means(int(i), self.everyone), 0.0) for i in at]
        return np.array([
            bounds.betting_p_value(one, wish, self.delta, weights=self.whole, variance=self._variance(0, wish))
            for one in deferred
        ])  # fmt: skip

    def _variance(self, place: int, alpha: float) -> float | None:
        """What bets begin with: that of errors at the limit; place 0 is the coverage's, then come the risks'."""
        return None if self.squares is None else alpha * (1 - alpha) * self.squares[place]

    def p_risk(self, at: NDArray[np.int64]) -> NDArray[np.float64]:
        """Of "a risk is above its limit", from the pairs of each risk."""
        return np.array([max(self._p_one(risk, int(i)) for risk in range(len(self.risks))) for i in at])

    def _p_one(self, risk: int, i: int) -> float:
        (loss, weights), alpha = self._pairs(risk, i), self.risks[risk].alpha
        variance = self._variance(1 + risk, alpha)
        return bounds.betting_p_value(loss, alpha, self.delta, weights=weights, variance=variance)

    def risks_at(self, i: int, level: float) -> tuple[RiskCounts, ...]:
        """Counts of groups at candidate ``i``; bounds at 1 - level and p-values from the means."""
        found = []
        for number, risk in enumerate(self.risks):
            loss, weights = self._pairs(number, i)
            variance = self._variance(1 + number, risk.alpha)
            bound = bounds.betting_upper(loss, level, weights=weights, alpha=risk.alpha, variance=variance)
            trials, errors = int(np.count_nonzero(weights)), int(np.count_nonzero(loss))
            found.append(RiskCounts(
                name=risk.name, alpha=risk.alpha, trials=trials, errors=errors, bound=bound,
                p_value=self._p_one(number, i),
            ))  # fmt: skip
        return tuple(found)

    def accepted_at(self, i: int) -> int:
        """Groups with an accepted row."""
        return int(np.count_nonzero(self._means(i, self.everyone)))

    def coverage_at(self, i: int) -> float:
        """The mean of their accepted shares; where photos are counted, the share of accepted photos."""
        accepted = np.bincount(self.member[self.ranked[: self.ends[i]]], minlength=self.n)
        if self.photos:
            return int(accepted.sum()) / max(int(self.sizes.sum()), 1)
        return float((accepted / self.sizes).sum()) / max(self.n, 1)

    def crc_risk(self, risk: int, i: int) -> float:
        """(sum of losses + 1) / (groups + 1)."""
        loss, _ = self._pairs(risk, i)
        return (float(loss.sum()) + 1) / (loss.size + 1)

    def within_crc(self, i: int) -> bool:
        """Whether that is within every limit."""
        return all(self.crc_risk(number, i) <= bounds.exact(risk.alpha) for number, risk in enumerate(self.risks))


class Mixed(Means):
    """Tests for another mix of classes, one row a unit: by betting (``Mix``), and exact within one class.

    Args:
        counts: the same as exact tests, for what is of one class alone and for what is counted.
        drawn: the row of each unit.
        mix: of all rows.
    """

    def __init__(
        self, values: NDArray[np.float64], counts: Counts, drawn: NDArray[np.int64], mix: Mix, delta: float, seed: int
    ) -> None:
        cut = mix.where(drawn)
        visited, weight = cut.visits(seed)
        rows = drawn[visited]
        self.counts, self.n, self.order, self.delta, self.joint = counts, rows.size, counts.order, delta, False
        self.min_coverage, self.photos, self.scale = counts.min_coverage, False, 1
        self.risks = [replace(risk.where(rows), trials=None) for risk in counts.risks]
        self.mixed = [place for place, risk in enumerate(counts.risks) if risk.trials is None]
        self.member, self.everyone, self.whole = np.arange(rows.size), weight, weight
        self.ranked, self.ends = ranked(values[rows]), count_at_least(values[rows], counts.order)
        self.shares = [weight] * len(self.risks)
        self.values, self.ratios, self.square = values[drawn], cut.ratios(), cut.square
        self.first = counts.risks[0].where(drawn)
        self.squares = [self.square] * (1 + len(self.risks))

    def p_risk(self, at: NDArray[np.int64]) -> NDArray[np.float64]:
        """Of "a risk is above its limit": the largest of the risks'."""
        return np.array([
            max(self._p_one(risk, int(i)) if risk in self.mixed else self._exact(risk, int(i)) for risk in self._all)
            for i in at
        ])  # fmt: skip

    @property
    def _all(self) -> range:
        return range(len(self.risks))

    def _exact(self, risk: int, i: int) -> float:
        return self.counts.risks_at(i, self.delta)[risk].p_value

    def risks_at(self, i: int, level: float) -> tuple[RiskCounts, ...]:
        """Counts of units as they came; bounds at 1 - level and p-values of the mix."""
        found = list(self.counts.risks_at(i, level))
        for number in self.mixed:
            loss, weights = self._pairs(number, i)
            alpha = self.risks[number].alpha
            bound = bounds.betting_upper(
                loss, level, weights=weights, alpha=alpha, variance=self._variance(1 + number, alpha)
            )
            found[number] = found[number].model_copy(update={"bound": bound, "p_value": self._p_one(number, i)})
        return tuple(found)

    def accepted_at(self, i: int) -> int:
        """Units accepted."""
        return self.counts.accepted_at(i)

    def coverage_at(self, i: int) -> float:
        """Their share in the mix."""
        return float(np.average(self.values >= self.order[i], weights=self.ratios))

    def rate_at(self, i: int) -> tuple[float, float]:
        """The first risk in the mix as it was seen, and the share of units that are its trials; 0 and 0 of none."""
        errors, trials = self.first.outcomes(self.values >= self.order[i])
        among = float(self.ratios[trials].sum())
        return (float(self.ratios[errors].sum()) / among, among / float(self.ratios.sum())) if among else (0.0, 0.0)


@dataclass(frozen=True)
class Choice:
    """The candidate to deploy and what led to it.

    ``shown`` is the deployed one, or where it failed. Bounds hold at 1 - ``level``; the coverage is tested at
    ``coverage_level``.
    """

    deployed: int | None
    shown: int
    tested: NDArray[np.int64]
    p_values: NDArray[np.float64]
    level: float
    coverage_level: float


def choose(tests: Counts | Means, method: Method, delta: float) -> Choice:
    """Test candidates by a method that ``certify`` describes, and choose the laxest that may be relied on."""
    size = tests.order.size
    everything = np.arange(size)

    def both(at: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.maximum(tests.p_coverage(at), tests.p_risk(at))

    def prefix(passed: int, p_values: NDArray[np.float64], level: float) -> Choice:
        last = passed - 1 if passed else None
        return Choice(last, max(passed - 1, 0), everything[: passed + 1], p_values, level, level)

    if method == "ltt_fst":
        found = prefix(*_walk(tests, both, delta), delta)
    elif method == "crc":
        passed = 0
        while passed < size and tests.within_crc(passed):
            passed += 1
        found = prefix(passed, np.empty(0), delta)
    elif method in ("bonferroni", "holm"):
        p_values, reject = both(everything), bounds.holm if method == "holm" else bounds.bonferroni
        good = np.flatnonzero(reject(p_values, delta))
        laxest = int(good[tests.order[good].argmin()]) if good.size else None
        shown = int(p_values.argmin()) if laxest is None else laxest
        level = delta / (size - (int((p_values < p_values[shown]).sum()) if method == "holm" else 0))
        found = Choice(laxest, shown, everything, p_values, level, level)
    else:
        # Risk and coverage are tested apart: each has half of delta.
        half = delta if tests.min_coverage is None else delta / 2
        if method == "rcps":
            found = prefix(*_walk(tests, tests.p_risk, half), half)
        else:
            last, path = bounds.binary_search(lambda i: float(tests.p_risk(np.array([i]))[0]), size, half)
            tested = np.array(path)
            level = half / max(size.bit_length(), 1)
            found = Choice(last, path[-1] if last is None else last, tested, tests.p_risk(tested), level, half)
        if float(tests.p_coverage(np.array([found.shown]))[0]) > half:
            found = replace(found, deployed=None)
    # Nothing accepted is never wrong, and no answer either.
    return replace(found, deployed=None) if tests.accepted_at(found.shown) == 0 else found


def _walk(
    tests: Counts | Means, p_value: Callable[[NDArray[np.int64]], NDArray[np.float64]], level: float
) -> tuple[int, NDArray[np.float64]]:
    """How many candidates pass before the first that fails, and the p-values up to it."""
    found = np.empty(0)
    for start in range(0, tests.order.size, tests.chunk):
        found = np.append(found, p_value(np.arange(start, min(start + tests.chunk, tests.order.size))))
        if bounds.fixed_sequence(found, level) < found.size:
            break
    passed = bounds.fixed_sequence(found, level)
    return passed, found[: passed + 1]


def group_weights(groups: ArrayLike | None, eligible: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Weight of every row [N] that makes groups count alike: 1 / eligible rows of its group; 0 for the others."""
    weights = eligible.astype(np.float64)
    if groups is not None:
        _, member = np.unique(np.asarray(groups), return_inverse=True)
        weights /= np.maximum(np.bincount(member, weights), 1)[member]
    return weights


def photo_shares(
    groups: NDArray[np.generic], trials: NDArray[np.bool_] | None, largest: int, seed: int = 0
) -> NDArray[np.float64]:
    """Photos of each group that are trials [G], as shares of the largest group, in the order of betting; none is 0.

    Raises:
        InputError: a group is larger than was stated.
    """
    whole("largest_group", largest, most=bounds.MOST_UNITS)
    names, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if sizes.max(initial=0) > largest:
        raise InputError(
            f"largest_group must be at least the number of photos of every group, got {largest} and group "
            f"'{names[sizes.argmax()]}' with {sizes.max()}; state the largest group that can ever come"
        )
    order = np.random.default_rng(seed).permutation(names.size)
    counts = np.bincount(order[member], None if trials is None else trials, names.size)
    return counts[counts > 0] / largest


def ranked(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Rows whose score is a number, surest first; ties as they come."""
    known = np.flatnonzero(~np.isnan(scores))
    return known[np.argsort(-scores[known], kind="stable")]


def count_at_least(scores: NDArray[np.float64], thresholds: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many scores are at or above each threshold [T]; NaN is above none."""
    known = np.sort(scores[~np.isnan(scores)])
    return np.asarray(known.size - np.searchsorted(known, thresholds, side="left"), dtype=np.int64)
