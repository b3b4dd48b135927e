"""Bounds, p-values and tests that certificates are made of: pure functions on integer counts or losses in [0, 1].

NumPy and SciPy only. Each says which hypothesis it speaks of and where it comes from. Clopper and Pearson's bounds
(one-sided and two-sided) are in ``metrics.binomial``.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainc, ndtri

from stage1_pro.arguments import array, check_share, floats, number, whole
from stage1_pro.errors import InputError

MOST_UNITS = 10**12
# -------------------------------------------------------------------------------- 0/1 losses: exact binomial


def coverage_p_value(accepted: ArrayLike, n: ArrayLike, min_coverage: float) -> NDArray[np.float64]:
    """P(Bin(n, c0) >= N): the exact p-value of "the coverage is below c0", in [0, 1]; small is evidence against.

    Args:
        accepted: N, integers of any shape.
        n: all rows or groups, integers of the same shape.
        min_coverage: c0, inside (0, 1).
    """
    count, total = _counts("accepted", accepted, "n", n)
    check_share("min_coverage", min_coverage)
    return np.where(count > 0, betainc(np.maximum(count, 1), total - count + 1.0, min_coverage), 1.0)


def binomial_cdf(k: NDArray[np.float64], m: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """P(Bin(m, alpha) <= k), also between integers; the regularised beta function, exact to rounding.

    For k errors of m trials it is the exact p-value of "the risk is above alpha", super-uniform under it given m, so a
    random number of accepted rows is fine (Learn then Test, 2110.01052, on 0/1 losses). No trial gives 1. Counts are
    integers: k from a float mean is off by one often.
    """
    inside = k < m
    return np.asarray(
        np.where(inside, betainc(np.where(inside, m - k, 1.0), k + 1.0, 1 - alpha), 1.0), dtype=np.float64
    )


def risk_p_value(errors: ArrayLike, trials: ArrayLike, alpha: float) -> NDArray[np.float64]:
    """P(Bin(m, alpha) <= k): the exact p-value of "the risk is above alpha", in [0, 1]; small is evidence against.

    See ``binomial_cdf``. No trial gives 1.

    Args:
        errors: k, integers of any shape.
        trials: m, integers of the same shape.
        alpha: inside (0, 1).

    Raises:
        InputError: counts that are no integers, or more errors than trials.
    """
    k, m = _counts("errors", errors, "trials", trials)
    check_share("alpha", alpha)
    return binomial_cdf(k.astype(np.float64), m.astype(np.float64), alpha)


def errors_allowed(trials: ArrayLike, alpha: float, delta: float) -> NDArray[np.int64]:
    """The most errors among ``trials`` with which risk <= alpha is still certified at delta; -1 where none is enough.

    Args:
        trials: m, integers of any shape.
        alpha: inside (0, 1).
        delta: inside (0, 1).
    """
    m = floats("trials", trials)
    check_share("alpha", alpha)
    check_share("delta", delta)
    if not ((m >= 0) & (m <= MOST_UNITS) & (m == np.floor(m))).all():
        raise InputError(f"trials must be whole numbers from 0 to {MOST_UNITS:.0e}, got others; count, never average")
    # Cornish and Fisher's quantile is seldom more than one away.
    z = float(ndtri(delta))
    guess = m * alpha + z * np.sqrt(m * alpha * (1 - alpha)) + (z * z - 1) * (1 - 2 * alpha) / 6 - 0.5
    k = np.floor(np.clip(guess, -1, m)).ravel()
    trials_of, unsettled = m.ravel(), np.arange(k.size)

    def passes(at: NDArray[np.int64], errors: NDArray[np.float64]) -> NDArray[np.bool_]:
        of = trials_of[at]
        enough = (errors < of) & (binomial_cdf(np.maximum(errors, 0.0), of, alpha) <= delta)
        return np.asarray((errors < 0) | enough, dtype=bool)

    while unsettled.size:
        unsettled = unsettled[~passes(unsettled, k[unsettled])]
        k[unsettled] -= 1
    unsettled = np.arange(k.size)
    while unsettled.size:
        unsettled = unsettled[passes(unsettled, k[unsettled] + 1)]
        k[unsettled] += 1
    return np.asarray(k, dtype=np.int64).reshape(m.shape)


def trials_needed(errors: int, alpha: float, delta: float) -> int:
    """The fewest trials that certify risk <= alpha at delta with this many errors among them (0 at 1%, 5%: 299).

    Args:
        errors: among them, from 0 to 1e9.
        alpha: inside (0, 1).
        delta: inside (0, 1).

    Raises:
        InputError: an argument outside its range, or an alpha that takes more than 1e12 trials.
    """
    whole("errors", errors, most=MOST_UNITS // 1000)
    check_share("alpha", alpha)
    check_share("delta", delta)
    # None at all takes log(delta) / log(1 - alpha).
    least = math.floor(min(math.log(delta) / math.log1p(-alpha), MOST_UNITS)) - 1
    found = first_enough(lambda m: int(errors_allowed(m, alpha, delta)) >= errors, max(errors, least, 1), MOST_UNITS)
    if found is None:
        raise InputError(
            f"alpha must be large enough for {MOST_UNITS:.0e} trials at delta {delta:g}, got {alpha:g} with {errors} "
            "errors; ask for a larger alpha"
        )
    return found


def last_digit(value: float, digits: int) -> float:
    """What one of the last digit of a positive number is worth, when it has so many: 0.01 of 1.23 with three."""
    return float(10.0 ** (math.floor(math.log10(value)) - digits + 1))


def first_enough(enough: Callable[[int], bool], start: int, most: int) -> int | None:
    """The smallest number from ``start`` to ``most`` that is enough, when more is never less; None where none is."""
    low, high = start - 1, start
    while high > most or not enough(high):
        if high >= most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


# -------------------------------------------------------------------------------- the law of the coverage at a rank


def selection_rank(n: int, xi: float, delta: float) -> int | None:
    """The fewest rows M whose acceptance certifies coverage >= xi at delta; None where n rows are too few.

    With continuous scores the share of new images strictly above the M-th largest of n calibration scores is Beta(M,
    n + 1 - M) (order statistics of uniforms; Wilks 1941). M is the smallest with P(Beta(M, n + 1 - M) <= xi) <= delta,
    which is also P(Bin(n, xi) >= M) <= delta: M accepted rows of n certify it for a threshold known beforehand.

    Args:
        n: calibration rows or groups.
        xi: least coverage, inside (0, 1).
        delta: inside (0, 1).
    """
    check_share("xi", xi)
    check_share("delta", delta)
    rank = 1 + bisect_left(range(1, n + 1), True, key=lambda m: bool(betainc(m, n + 1 - m, xi) <= delta))
    return rank if rank <= n else None


# -------------------------------------------------------------------------------- losses in [0, 1]


def betting_p_value(
    losses: ArrayLike,
    alpha: float,
    delta: float,
    *,
    weights: ArrayLike | None = None,
    variance: float | None = None,
    worst: float = 1.0,
) -> float:
    """p-value of "E[loss] >= alpha E[weight]" for independent pairs, by betting against it; small is evidence against.

    The capital prod(1 + b_i (alpha a_i - v_i)) of bets b_i in [0, 0.9 / worst], each chosen from the pairs before it,
    is a supermartingale under the hypothesis, so 1 / its maximum is a p-value (Ville; Waudby-Smith & Ramdas
    2010.09686). With weights it is a test of a ratio of means, E[v] / E[a] >= alpha. The order must not depend on the
    values.

    Args:
        losses: v [G] in [0, 1].
        alpha: inside (0, 1).
        delta: the level that the bets aim at; the p-value holds for any.
        weights: a [G] in [0, 1]; 1 by default.
        variance: that alpha a - v is expected to have: bets begin with it, and learn theirs over some twenty pairs. By
            default that of 0/1 losses at ``alpha``; what varies far less is bet on far too carefully with it.
        worst: more than this v - alpha a is of no pair, whatever the losses turn out to be.

    The p-value holds for any variance. It and ``worst`` must not come from the losses.

    Raises:
        InputError: an argument out of range, or a pair that is worse than ``worst``.
    """
    check_share("alpha", alpha)
    check_share("delta", delta)
    loss, weight = _losses(losses, weights)
    gains, spread = alpha * weight - loss, alpha * (1 - alpha) if variance is None else variance
    if not 0 < number("variance", spread) <= 1 or not 0 < number("worst", worst) <= 1:
        raise InputError(f"variance and worst must be in (0, 1], got {spread} and {worst}")
    if -gains.min(initial=0.0) > worst * (1 + 1e-9):
        raise InputError(f"worst must be the most that any pair can lose, got {worst}, and one lost {-gains.min()}")
    return math.exp(-_log_capital(gains, _bets(gains, spread, 20, delta, 0.9 / worst)))


def betting_upper(
    losses: ArrayLike,
    delta: float,
    *,
    weights: ArrayLike | None = None,
    alpha: float | None = None,
    variance: float | None = None,
) -> float:
    """Upper bound of a mean loss, or of E[loss] / E[weight], at level 1 - delta, in [0, 1]; no loss gives 1.

    The smallest ratio that the bets of ``betting_p_value`` reject; they are the same for every ratio, so it is a bound.

    Args:
        losses: [G] in [0, 1], in an order that does not depend on them.
        delta: inside (0, 1).
        weights: [G] in [0, 1]; 1 by default.
        alpha: the ratio that the bets aim at; without one they learn the spread from nothing.
        variance: with alpha: that alpha a - v is expected to have, as in ``betting_p_value``.
    """
    check_share("delta", delta)
    loss, weight = _losses(losses, weights)
    if alpha is None:
        bets = _bets(loss, 0.25, 1, delta)
    else:
        check_share("alpha", alpha)
        spread = check_share("variance", alpha * (1 - alpha) if variance is None else variance, most=True)
        bets = _bets(alpha * weight - loss, spread, 20, delta)
    return _smallest(lambda ratio: _log_capital(ratio * weight - loss, bets) >= -math.log(delta))


def crc_budget(alpha: float, trials: int) -> int:
    """The most errors among ``trials`` with (errors + 1) / (trials + 1) <= alpha: floor(alpha (m + 1)) - 1; -1: none.

    Conformal risk control (2208.02814) for 0/1 losses: the expected risk is then at most alpha. In exact integers of
    the decimal text of alpha. The budget published for SCRC-I, ceil(alpha (m + 1)) - 1, lets it exceed alpha.

    Args:
        alpha: inside (0, 1).
        trials: m.
    """
    check_share("alpha", alpha)
    return math.floor(exact(alpha) * (trials + 1)) - 1


def exact(value: float) -> Fraction:
    """The number that the shortest decimal text of ``value`` writes: .55 is 11/20, so ceil(100 * .55) is 55."""
    return Fraction(repr(float(value)))


# -------------------------------------------------------------------------------- several tests


def fixed_sequence(p_values: ArrayLike, delta: float) -> int:
    """How many hypotheses are rejected: those before the first p-value above ``delta``, each tested at the full delta.

    The chance that any of them is true is at most delta when the order was frozen before the data were seen (Maurer,
    Hothorn & Lehmacher 1995; fixed-sequence testing in Learn then Test). A NaN p-value counts as 1.

    Args:
        p_values: [T] in the order of testing.
        delta: inside (0, 1).
    """
    check_share("delta", delta)
    failed = np.flatnonzero(~(np.asarray(p_values, dtype=np.float64) <= delta))
    return int(failed[0]) if failed.size else np.size(p_values)


def bonferroni(p_values: ArrayLike, delta: float) -> NDArray[np.bool_]:
    """Which hypotheses [T] are rejected, each at delta / T; the chance of any false rejection is at most delta.

    A NaN p-value counts as 1.
    """
    check_share("delta", delta)
    p = np.asarray(p_values, dtype=np.float64)
    return np.asarray(p <= delta / max(p.size, 1), dtype=bool)


def holm(p_values: ArrayLike, delta: float) -> NDArray[np.bool_]:
    """Which hypotheses [T] are rejected by steps: the i-th smallest p-value at delta / (T + 1 - i) (Holm 1979).

    At least those of ``bonferroni``, with the same promise. A NaN p-value counts as 1.
    """
    check_share("delta", delta)
    p = np.asarray(p_values, dtype=np.float64)
    p = np.where(np.isnan(p), 1.0, p)
    order = np.argsort(p, kind="stable")
    rejected = np.zeros(p.size, dtype=bool)
    rejected[order[: fixed_sequence(p[order] * np.arange(p.size, 0, -1), delta)]] = True
    return rejected


def binary_search(p_value: Callable[[int], float], size: int, delta: float) -> tuple[int | None, list[int]]:
    """Search thresholds 0 (strict) to size - 1 (lax) for the laxest that passes; give it, and those that were tested.

    SGR (Geifman & El-Yaniv 2017, algorithm 1): a pass goes on to laxer ones, a failure to stricter ones. Where the risk
    does not fall as thresholds get laxer, a false pass must happen on the one path that right answers take, so each
    test has delta / its length. A search of T thresholds takes up to ceil(log2(T + 1)) tests, one more than the paper's
    ceil(log2 T) where T is a power of two.

    Args:
        p_value: of "the risk at this threshold is above its limit".
        size: T.
        delta: inside (0, 1).
    """
    check_share("delta", delta)
    each = delta / max(size.bit_length(), 1)
    found, tested, low, high = None, list[int](), 0, size - 1
    while low <= high:
        middle = (low + high) // 2
        tested.append(middle)
        if p_value(middle) <= each:
            found, low = middle, middle + 1
        else:
            high = middle - 1
    return found, tested


# -------------------------------------------------------------------------------- helpers


def _smallest(rejected: Callable[[float], bool]) -> float:
    """The smallest share that is rejected, from above, to 1e-12 of itself; 1 where none is."""
    low, high = 0.0, 1.0
    while high - low > max(1e-12 * high, 1e-300):
        middle = (low + high) / 2
        low, high = (low, middle) if rejected(middle) else (middle, high)
    return high


def _bets(
    gains: NDArray[np.float64], variance: float, weight: float, delta: float, most: float = 0.9
) -> NDArray[np.float64]:
    """Bets [G] that aim at 1 / delta after all of them, each from the gains before it and a prior of that variance."""
    n = gains.size
    before = np.arange(n)
    sums = np.cumsum(gains) - gains
    away = (gains - sums / (weight + before)) ** 2
    spread = (weight * variance + np.cumsum(away) - away) / (weight + before)
    return np.minimum(np.sqrt(-2 * math.log(delta) / (max(n, 1) * spread)), most)


def _log_capital(gains: NDArray[np.float64], bets: NDArray[np.float64]) -> float:
    """The largest log of the capital on the way, at least 0: it starts at 1."""
    return max(float(np.cumsum(np.log1p(bets * gains)).max(initial=0.0)), 0.0)


def _counts(
    part: str, of_part: ArrayLike, whole_name: str, of_whole: ArrayLike
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Integers of one shape, the first no more than the second."""
    count, total = array(part, of_part), array(whole_name, of_whole)
    if count.dtype.kind not in "iu" or total.dtype.kind not in "iu":
        raise InputError(
            f"{part} and {whole_name} must be integers, got {count.dtype} and {total.dtype}; count, never average"
        )
    try:
        count, total = np.broadcast_arrays(count, total)
    except ValueError:
        raise InputError(
            f"{part} and {whole_name} must have one shape, got {list(count.shape)} and {list(total.shape)}; pair them"
        ) from None
    bad = np.flatnonzero((count < 0) | (count > total))
    if bad.size:
        raise InputError(f"{part} must be from 0 to {whole_name}, got {count.flat[bad[0]]} of {total.flat[bad[0]]}")
    return count, total


def _losses(losses: ArrayLike, weights: ArrayLike | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    loss = floats("losses", losses)
    weight = np.ones(loss.shape) if weights is None else floats("weights", weights)
    if loss.ndim != 1 or weight.shape != loss.shape:
        raise InputError(f"losses and weights must have shape [G], got {list(loss.shape)} and {list(weight.shape)}")
    for name, values in (("losses", loss), ("weights", weight)):
        if not ((values >= 0) & (values <= 1)).all():
            raise InputError(f"{name} must be in [0, 1], got others; scale them")
    return loss, weight
