"""How many units a refused certificate would have taken, with the margin of what was seen. NumPy and SciPy.

Units are drawn from the rows that were refused, counted at some thirty thresholds: errors are then Poisson, the walk
starts where the method starts it, and its first test is exact. Rows drawn again give the interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc, ndtri, xlogy

from stage1_pro.policies.bounds import errors_allowed, selection_rank, trials_needed
from stage1_pro.policies.candidates import Risk, group_weights, ranked

POWER = 0.9
Rates = tuple[NDArray[np.float64], NDArray[np.float64]]
# Thresholds, numbers of units that are tried, fit halves drawn for each (with the rows seen, and with each draw of
# them), and draws of the rows.
_THRESHOLDS, _SIZES, _FITS, _AGAIN = 30, 12, (24, 2), 24


@dataclass(frozen=True)
class Needed:
    """Units for a power of .9 if answers are as good as those seen, and the 5% and 95% ends over rows drawn again.

    ``high`` None: no number would do there.
    """

    n: int
    low: int | None = None
    high: int | None = None

    def __str__(self) -> str:
        """In words, such as ``3,800 (between 1,700 and 13,000)``."""
        if self.low is None:
            return f"{self.n:,}"
        return (
            f"{self.n:,} ({f'between {self.low:,} and {self.high:,}' if self.high else f'{self.low:,} or many more'})"
        )


def units_needed(
    values: NDArray[np.float64],
    risks: Sequence[Risk],
    groups: NDArray[np.generic] | None,
    *,
    delta: float,
    min_coverage: float | None,
    start: float | Literal["ranks", "halves"],
) -> Needed | None:
    """Say how many units certify with a chance of .9, to two digits; None where no number would do.

    Args:
        values: scores [N].
        risks: of these rows.
        groups: [N] clip or track of every row; they count alike.
        delta: level of the tests.
        min_coverage: least coverage, if it is certified too.
        start: where the walk starts: at a threshold; by ranks (``certify``) or on a fit half (``order_candidates``),
            where another number of units starts elsewhere.
    """
    everyone = np.ones(values.size, dtype=bool)
    weights, order = group_weights(groups, everyone), ranked(values)
    total = float(weights.sum())
    if total == 0 or order.size == 0:
        return None
    covered = np.cumsum(weights[order]) / total
    if isinstance(start, str):
        # From the least coverage on, closest where walks begin.
        low = min_coverage or 0.0
        ends = np.searchsorted(covered, low + (1 - low) * np.linspace(0, 1, _THRESHOLDS + 1)[1:] ** 2)
        ends = np.unique(np.minimum(ends, order.size - 1))
    else:
        ends = np.array([max(int((values[order] >= start).sum()) - 1, 0)])
    rng = np.random.default_rng(0)
    # Of each threshold: the share accepted, and of each risk that of trials and of errors among all units.
    shares = covered[ends]
    seen: list[Rates] = []
    again: list[Rates] = []
    for risk in risks:
        share = group_weights(groups, everyone if risk.trials is None else risk.trials)[order]
        wrong = share * risk.errors[order]
        both = np.stack([share - wrong, wrong])[:, : ends[-1] + 1]
        cells = np.add.reduceat(both, np.r_[0, ends[:-1] + 1], axis=1)
        units = round(float(share.sum()))
        chance = np.append(cells.ravel(), max(units - cells.sum(), 0.0))
        drawn = rng.multinomial(units, chance / chance.sum(), _AGAIN) if units else np.zeros((_AGAIN, chance.size))
        for found, counts in ((seen, chance[None]), (again, drawn)):
            right, bad = np.moveaxis(counts[:, :-1].reshape(len(counts), 2, -1).cumsum(axis=2) / total, 1, 0)
            if start == "halves" and min_coverage is None:
                # The best of many thresholds looks better than it is: one error more, where that leaves room.
                bad = bad + np.minimum(shares / total, risk.alpha * (right + bad) / 2)
            found.append((right + bad, bad))
    alphas = [risk.alpha for risk in risks]
    sizes = trials_needed(0, max(alphas), delta) * np.geomspace(1, 2000, _SIZES)

    # Ranks are walked from where two errors would do.
    two = trials_needed(2, alphas[0], delta) if start == "ranks" else 0

    def crossing(rates: list[Rates], fits: int, sizes: NDArray[np.float64] = sizes) -> NDArray[np.float64]:
        return _reached(_power(sizes, shares, rates, alphas, delta, min_coverage, start, two, fits, rng), sizes)

    n = float(crossing(seen, _FITS[0])[0])
    if not math.isfinite(n):
        return None
    # Where no error was seen power jumps; look closer.
    near = n * np.geomspace(sizes[0] / sizes[1], sizes[1] / sizes[0], 11)
    n = min(float(crossing(seen, _FITS[0], near)[0]), float(near[-1]))
    others = np.sort(crossing(again, _FITS[1]))
    low, high = min(float(others[_AGAIN // 20]), n), max(float(others[-1 - _AGAIN // 20]), n)
    return Needed(_two_digits(n), _two_digits(low), _two_digits(high) if math.isfinite(high) else None)


def _power(
    sizes: NDArray[np.float64],
    shares: NDArray[np.float64],
    rates: list[Rates],
    alphas: Sequence[float],
    delta: float,
    min_coverage: float | None,
    start: float | str,
    two: int,
    fits: int,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Chance that units [S] pass the first test, [S, B] for shares of trials and errors [B, T] of each risk."""
    tried, (drawn, size) = len(sizes), rates[0][0].shape
    # A row for each number of units and each draw.
    rows, n = tried * drawn, np.repeat(sizes, drawn)[:, None]
    rates = [(np.tile(trials, (tried, 1)), np.tile(wrong, (tried, 1))) for trials, wrong in rates]
    first = np.zeros((1, 1), dtype=np.int64)
    if isinstance(start, str) and min_coverage is not None:
        spread = 3 * math.sqrt(2) if start == "halves" else -float(ndtri(delta))
        wanted = min_coverage + spread * np.sqrt(min_coverage * (1 - min_coverage) / n)
        first = np.minimum(np.searchsorted(shares, wanted), size - 1)
    elif start == "ranks":
        enough = rates[0][0] * n >= two
        first = np.where(enough.any(axis=1), enough.argmax(axis=1), size - 1)[:, None]
    at = np.broadcast_to(first, (rows, 1))
    if start == "halves":
        # The fit half starts where the p-values to expect are smallest: about exp(-D) of a Poisson count.
        evidence = np.full((rows, fits, size), np.inf)
        for (trials, wrong), alpha in zip(rates, alphas, strict=True):
            steps = (np.diff(wrong, axis=1, prepend=0.0) * n)[:, None]
            errors = rng.poisson(np.broadcast_to(steps, (rows, fits, size))).cumsum(axis=2)
            mean = (trials * n * alpha)[:, None]
            fewer = np.minimum(errors, mean)
            evidence = np.minimum(evidence, xlogy(fewer, fewer / np.maximum(mean, 1e-300)) - fewer + mean)
        if min_coverage is not None:
            tail = betainc(np.maximum(shares * n, 1e-9), n - np.minimum(shares, 1 - 1e-9) * n + 1, min_coverage)
            evidence = np.minimum(evidence, -np.log(np.maximum(tail, 1e-300))[:, None])
        at = np.maximum(evidence.argmax(axis=2), first)
    chance = np.ones(at.shape)
    for (trials, wrong), alpha in zip(rates, alphas, strict=True):
        m, k = (np.take_along_axis(x, at, axis=1) for x in (trials, wrong))
        count = np.floor(m * n)
        allowed = errors_allowed(count, alpha, delta)
        error = k / np.maximum(m, 1e-300)
        most = np.clip(allowed, 0, np.maximum(count - 1, 0))
        passed = betainc(np.maximum(count - most, 1), most + 1.0, 1 - np.clip(error, 0, 1))
        chance = chance * np.where(allowed >= 0, passed, 0.0)
    if min_coverage is not None and not isinstance(start, str):
        # A threshold that stays: its coverage is tested there.
        whole = [round(one) for one in sizes]
        ranks = [selection_rank(one, min_coverage, delta) for one in whole]
        pairs = zip(whole, ranks, strict=True)
        kept = [0.0 if rank is None else betainc(rank, one - rank + 1, shares[0]) for one, rank in pairs]
        chance = chance * np.repeat(kept, drawn)[:, None]
    return np.asarray(chance.mean(axis=1), dtype=np.float64).reshape(tried, drawn)


def _reached(powers: NDArray[np.float64], sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where powers [S, B] reach the wished one for good, [B]: the normal score is about linear in log n."""
    score, x, wished = ndtri(np.clip(powers, 1e-3, 1 - 1e-3)), np.log(sizes), float(ndtri(POWER))
    below = powers < POWER
    last = np.where(below.any(axis=0), sizes.size - 1 - below[::-1].argmax(axis=0), -1)
    found = np.full(powers.shape[1], sizes[0])
    found[last == sizes.size - 1] = np.inf
    inside = np.flatnonzero((last >= 0) & (last < sizes.size - 1))
    i = last[inside]
    low, high = score[i, inside], score[i + 1, inside]
    found[inside] = np.exp(x[i] + (wished - low) / (high - low) * (x[i + 1] - x[i]))
    return found


def _two_digits(n: float) -> int:
    """``n`` rounded up to two digits."""
    digit = int(10 ** max(math.floor(math.log10(max(n, 1))) - 1, 0))
    return digit * math.ceil(n / digit - 1e-9)
