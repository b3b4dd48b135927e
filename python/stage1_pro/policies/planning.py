"""How many rows a promise takes: the power to certify it with n rows, exactly, and the smallest n that has it.

Power is the chance that calibration rows certify the wish when the true risk is the one hoped for. NumPy and SciPy.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, ndtri

from stage1_pro.arguments import check_share, number
from stage1_pro.errors import InputError
from stage1_pro.policies.bounds import binomial_cdf, coverage_p_value, errors_allowed, selection_rank

# Beyond this many trials the normal approximation plans as well as the exact sum, to a fraction of a percent.
_EXACT_TRIALS = 200_000
# Standard deviations around a mean that exact sums run over.
_REACH = 8.0
_MOST_CELLS = 100


@dataclass(frozen=True)
class PlanTerms:
    """What a plan takes for given: what is asked for, and what is hoped for."""

    alpha: float  # largest risk
    delta: Sequence[float]  # chance of failure; of a policy that abstains of the selection and of the risk
    min_coverage: float
    expected_coverage: float | None
    positives: float  # share of units that are
    cells: Sequence[float]  # share of each cell among the accepted


@dataclass(frozen=True)
class Planned:
    """How a policy would certify a target, for a plan."""

    share: float  # of units that are trials of the risk
    level: float  # at which the risk is tested
    power: Callable[[int, float, float], float]  # with so many units, of a limit, at a true risk
    wish: str
    assumptions: list[str]
    positives: float | None = None  # share of units that are, where it matters


def certify_power(
    n: int, alpha: float, delta: float, share: float, expected_error: float, *, min_coverage: float | None = None
) -> float:
    """Chance that ``n`` units certify risk <= alpha at a threshold fixed beforehand, in [0, 1]; higher is surer.

    The number of trials is binomial(n, share), the errors among them binomial with ``expected_error``; it succeeds when
    the exact binomial test passes. The walk over thresholds costs a little more.

    Args:
        n: rows of the certify half; groups, where rows share one.
        alpha: largest risk, inside (0, 1).
        delta: largest chance of a false certificate, inside (0, 1).
        share: share of units that are trials, in (0, 1].
        expected_error: the true risk, in [0, 1].
        min_coverage: least coverage that is to be certified too, where units that are trials are those accepted; its
            exact test at the same delta must pass as well.

    Raises:
        InputError: an argument outside its range.
    """
    _check(alpha, delta, share)
    if n < 1:
        return 0.0
    low, high = _reach(n, share)
    trials = np.arange(low, high + 1, dtype=np.float64)
    if share == 1:
        chance = np.ones(1)
    else:
        ways = gammaln(n + 1) - gammaln(trials + 1) - gammaln(n - trials + 1)
        chance = np.exp(ways + trials * math.log(share) + (n - trials) * math.log1p(-share))
    success = binomial_power(trials, alpha, delta, expected_error)
    if min_coverage is not None:
        success = success * (coverage_p_value(trials.astype(np.int64), n, min_coverage) <= delta)
    return min(float(chance @ success), 1.0)


def scrc_power(
    n: int, xi: float, alpha: float, delta: tuple[float, float], expected_error: float, cells: Sequence[float] = (1.0,)
) -> float:
    """Chance that SCRC-PAC with ``n`` units keeps a limit whose true risk is ``expected_error``, in [0, 1].

    The rank that certifies coverage xi at ``delta[0]`` depends on n alone (``selection_rank``), so a fixed number of
    units is accepted. They fall into cells by their shares (multinomial), errors in each are binomial, and every cell
    must stay within Clopper and Pearson's budget at ``delta[1] / cells``. Then the limits found are at most the one
    hoped for, so sets are no larger than its sets.

    Args:
        n: rows of the certify half; groups, where rows share one.
        xi: least share accepted, inside (0, 1).
        alpha: largest risk among the accepted, inside (0, 1).
        delta: chance of failure of the selection and of the risk.
        expected_error: the true risk of the limit hoped for, in [0, 1].
        cells: share of each cell among the accepted; they sum to 1.

    Raises:
        InputError: an argument outside its range.
    """
    _check(alpha, delta[1], 1.0)
    if not (1 <= len(cells) <= _MOST_CELLS and min(cells) > 0 and abs(sum(cells) - 1) <= 1e-6):
        raise InputError(
            f"cells must be 1 to {_MOST_CELLS} positive shares that sum to 1, got {len(cells)} with "
            f"sum {sum(cells):g}; they are shares of the accepted units"
        )
    rank = selection_rank(n, xi, delta[0])
    if rank is None:
        return 0.0
    accepted, each = rank, delta[1] / len(cells)
    if len(cells) == 1:
        return float(binomial_power(np.array([float(accepted)]), alpha, each, expected_error)[0])
    # Counts of cells are independent Poisson variables given their sum: convolve, then condition on the sum.
    start, joint = 0, np.ones(1)
    for share in cells:
        low, high = _reach(accepted, share)
        trials = np.arange(low, high + 1, dtype=np.float64)
        mean = accepted * share
        weight = np.exp(trials * math.log(mean) - mean - gammaln(trials + 1)) if accepted else np.ones(1)
        joint = np.convolve(joint, weight * binomial_power(trials, alpha, each, expected_error))
        start += low
    total = math.exp(accepted * math.log(accepted) - accepted - gammaln(accepted + 1)) if accepted else 1.0
    at = accepted - start
    return min(float(joint[at]) / total, 1.0) if 0 <= at < joint.size else 0.0


def plan_calibration(
    alpha: float,
    delta: float,
    min_coverage: float | None,
    expected_error: float,
    power: float = 0.9,
    *,
    exact_to: int = _EXACT_TRIALS,
) -> int:
    """How many rows the certify half needs (groups, where rows share one) to certify risk <= alpha; fewer is cheaper.

    The smallest n from which ``certify_power`` stays at ``power``. ``val_calib`` is halved, so it needs twice as many.

    Args:
        alpha: largest risk, inside (0, 1).
        delta: largest chance of a false certificate.
        min_coverage: share of rows that are trials, in (0, 1]: the coverage, or the share of exited positives. None: 1.
        expected_error: the true risk that is hoped for, in [0, alpha).
        power: wished chance to succeed, inside (0, 1).
        exact_to: trials beyond which the normal approximation's answer stands.

    Raises:
        InputError: an argument outside its range; at ``expected_error >= alpha`` no number of rows would do.
    """
    share = 1.0 if min_coverage is None else min_coverage
    _check(alpha, delta, share)
    return smallest_n(
        lambda n: certify_power(n, alpha, delta, share, expected_error), power,
        alpha=alpha, delta=delta, share=share, expected_error=expected_error, exact_to=exact_to,
    )  # fmt: skip


def smallest_n(
    power_at: Callable[[int], float],
    power: float,
    *,
    alpha: float,
    delta: float,
    share: float,
    expected_error: float,
    exact_to: int = _EXACT_TRIALS,
) -> int:
    """The smallest number of units from which a power stays at ``power``.

    Power saws a little with n, so the search goes on for the span of one more error. Where the normal approximation
    asks for more than 200,000 trials its answer stands.

    Args:
        power_at: of n.
        power: wished, inside (0, 1).
        alpha: largest risk.
        delta: chance of a false certificate of that risk.
        share: share of units that are trials of it, in (0, 1].
        expected_error: the true risk, in [0, alpha).
        exact_to: trials beyond which the normal approximation's answer stands.

    Raises:
        InputError: an argument outside its range; at ``expected_error >= alpha`` no number of rows would do.
    """
    check_share("power", power)
    if not 0 <= number("expected_error", expected_error) < alpha:
        raise InputError(
            f"expected_error must be in [0, alpha = {alpha:g}), got {expected_error:g}; no number of rows certifies a "
            "risk that is not below alpha"
        )
    spread = -ndtri(delta) * math.sqrt(alpha * (1 - alpha))
    spread += ndtri(power) * math.sqrt(expected_error * (1 - expected_error))
    rough = float(max((spread / (alpha - expected_error)) ** 2, 1))
    if rough > exact_to:
        return math.ceil(rough / share)

    def enough(n: int) -> bool:
        return power_at(n) >= power

    low, high = 0, math.ceil(rough / share)
    while not enough(high):
        low, high = high, 2 * high
        if high * share > 100 * _EXACT_TRIALS:
            raise InputError(
                f"power must be reachable, got {power:g}, which {low} units do not reach; expect a larger coverage or "
                "ask for less"
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    span = max(1, math.ceil(1 / (alpha * share)))
    n = high
    while n - high < span:
        n += max(1, span // 16)
        if not enough(n):
            high = n + 1
            while not enough(high):
                high += 1
            n = high
    return high


def smallest_alpha(power_at: Callable[[float], float], power: float) -> float | None:
    """The smallest risk that a power reaches, to four decimals, rounded up; None where none below 1 is reached.

    Args:
        power_at: of alpha; it must not fall as alpha grows.
        power: wished, inside (0, 1).
    """
    check_share("power", power)
    steps = bisect_left(range(1, 10_000), True, key=lambda step: power_at(step / 10_000) >= power) + 1
    return steps / 10_000 if steps < 10_000 else None


def binomial_power(trials: NDArray[np.float64], alpha: float, delta: float, true: float) -> NDArray[np.float64]:
    """Chance that the exact binomial test shows a rate below ``alpha`` at level ``delta``, [T] for trials [T].

    Args:
        trials: numbers of independent trials.
        alpha: rate that is tested, inside (0, 1).
        delta: level, inside (0, 1).
        true: the true rate, in [0, 1].
    """
    allowed = errors_allowed(trials, alpha, delta).astype(np.float64)
    found = binomial_cdf(np.maximum(allowed, 0), trials, true)
    return np.asarray(np.where(allowed >= 0, found, 0.0), dtype=np.float64)


def _reach(n: int, share: float) -> tuple[int, int]:
    """Counts of binomial(n, share) that matter."""
    deviation = math.sqrt(n * share * (1 - share))
    return (max(0, math.floor(n * share - _REACH * deviation)), min(n, math.ceil(n * share + _REACH * deviation)))


def _check(alpha: float, delta: float, share: float) -> None:
    check_share("alpha", alpha)
    check_share("delta", delta)
    if not 0 < number("min_coverage", share) <= 1:
        raise InputError(f"min_coverage must be in (0, 1], got {share}; it is the share of rows that are trials")
