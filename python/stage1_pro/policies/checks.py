"""Promises held against rows that calibrated nothing: PASS, FAIL or INCONCLUSIVE, and what would settle them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from stage1_pro.metrics.binomial import clopper_pearson, clopper_pearson_lower, clopper_pearson_upper
from stage1_pro.policies.bounds import betting_upper, first_enough
from stage1_pro.policies.candidates import Mix
from stage1_pro.policies.certificate import Outcome, PromiseCheck, ShareOf

PASS_LEVEL, FAIL_LEVEL = 0.95, 0.99
# Where no smaller number of rows settles a question, none is named.
_MOST_ROWS = 10**9


def check_claim(name: str, errors: int, trials: int, limit: float, n: int, of: int = 1) -> PromiseCheck:
    """Hold a promise of at most ``limit`` against counts; ``n`` units in all, for the number that would settle it.

    ``of`` so many promises of one policy that are checked together, any fails by chance in at most 1% of cases: they
    share that level (Bonferroni). To pass together each must pass, so that level is not shared.
    """
    fail_level = 1 - (1 - FAIL_LEVEL) / of
    lower = clopper_pearson_lower(errors, trials, fail_level)
    upper = clopper_pearson_upper(errors, trials, PASS_LEVEL)
    outcome: Outcome = "FAIL" if lower > limit else "PASS" if upper <= limit else "INCONCLUSIVE"
    needed = None
    if outcome == "INCONCLUSIVE" and trials and errors / trials != limit:
        rate = Fraction(errors, trials)

        def settles(m: int) -> bool:
            if rate < limit:
                return clopper_pearson_upper(math.ceil(rate * m), m, PASS_LEVEL) <= limit
            return clopper_pearson_lower(math.floor(rate * m), m, fail_level) > limit

        more = first_enough(settles, trials, _MOST_ROWS)
        needed = None if more is None else math.ceil(more * n / trials)
    return PromiseCheck(
        name=name, limit=limit, errors=errors, trials=trials, lower=lower, upper=upper, outcome=outcome,
        n_to_settle=needed,
    )  # fmt: skip


def check_photos(
    name: str,
    errors: NDArray[np.bool_],
    trials: NDArray[np.bool_],
    groups: NDArray[np.generic],
    limit: float,
    largest: int,
    of: int = 1,
) -> PromiseCheck:
    """Hold a promise of at most ``limit`` of photos, in groups of at most ``largest``, against rows [N]: by betting.

    Errors that are no trials do not count. Where a group is larger than was stated its own size is taken, so that the
    bounds hold for rows like these.
    """
    names, member = np.unique(groups, return_inverse=True)
    order = np.random.default_rng(0).permutation(names.size)[member]
    scale = max(largest, int(np.bincount(member).max()))
    of_each, wrong = (np.bincount(order, one, names.size) / scale for one in (trials, errors & trials))
    upper = betting_upper(wrong, 1 - PASS_LEVEL, weights=of_each, alpha=limit)
    lower = 1 - betting_upper(of_each - wrong, (1 - FAIL_LEVEL) / of, weights=of_each, alpha=1 - limit)
    outcome: Outcome = "FAIL" if lower > limit else "PASS" if upper <= limit else "INCONCLUSIVE"
    return PromiseCheck(
        name=name, limit=limit, errors=int((errors & trials).sum()), trials=int(trials.sum()), lower=lower, upper=upper,
        outcome=outcome, n_to_settle=None,
    )  # fmt: skip


def check_mix(
    name: str, errors: NDArray[np.bool_], trials: NDArray[np.bool_], mix: Mix, limit: float, of: int = 1
) -> PromiseCheck:
    """Hold a promise of at most ``limit`` in another mix of classes against units [N]: by betting.

    Errors that are no trials do not count; counts are of units as they came. Where a class is missing nothing is known.
    """
    counts = {"errors": int((errors & trials).sum()), "trials": int(trials.sum())}
    lower, upper = 0.0, 1.0
    if mix.known:
        rows, weight = mix.visits(0)
        of_each, wrong = (weight * one[rows] for one in (trials, errors & trials))
        variance = limit * (1 - limit) * mix.square
        upper = betting_upper(wrong, 1 - PASS_LEVEL, weights=of_each, alpha=limit, variance=variance)
        right = np.maximum(of_each - wrong, 0.0)
        lower = 1 - betting_upper(right, (1 - FAIL_LEVEL) / of, weights=of_each, alpha=1 - limit, variance=variance)
    outcome: Outcome = "FAIL" if lower > limit else "PASS" if upper <= limit else "INCONCLUSIVE"
    return PromiseCheck(name=name, limit=limit, **counts, lower=lower, upper=upper, outcome=outcome, n_to_settle=None)


def unjudged(found: Sequence[PromiseCheck]) -> list[PromiseCheck]:
    """The same of what nobody promised: counts and bounds without an outcome."""
    return [one.model_copy(update={"outcome": None, "n_to_settle": None}) for one in found]


def share_of(count: int, of: int) -> ShareOf:
    """A share with Clopper and Pearson's two-sided 95% interval; null of nothing."""
    if not of:
        return ShareOf(value=None, low=0.0, high=1.0)
    low, high = clopper_pearson(count, of)
    return ShareOf(value=count / of, low=low, high=high)


def mean_size(sizes: NDArray[np.int64], n_classes: int, rng: np.random.Generator, *, smallest: int) -> ShareOf:
    """The mean number of classes in sets of these sizes [M], with its two-sided 95% interval; null of no sets.

    ``smallest`` is the size that no set can be below by design: 1 where sets are never empty.
    """
    if sizes.size == 0:
        return ShareOf(value=None, low=float(smallest), high=float(n_classes))
    if n_classes == smallest + 1:
        both = share_of(int((sizes > smallest).sum()), sizes.size)
        return ShareOf(value=smallest + (both.value or 0.0), low=smallest + both.low, high=smallest + both.high)
    # Betting needs an order that no value decides.
    room = n_classes - smallest
    shares = (sizes[rng.permutation(sizes.size)] - smallest) / room
    low, high = (smallest + room * end for end in (1 - betting_upper(1 - shares, 0.025), betting_upper(shares, 0.025)))
    value = float(sizes.mean())
    return ShareOf(value=value, low=min(low, value), high=max(high, value))
