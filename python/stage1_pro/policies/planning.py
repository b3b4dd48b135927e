"""How many rows one exact test takes, and what a policy says of itself to ``stage1 plan``. NumPy and SciPy.

Power is the chance that calibration rows certify the wish when the true risk is the one hoped for. Of a single test at
a threshold fixed beforehand it is exact; that of a policy is simulated (``studies.planning``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, ndtri

from stage1_pro.arguments import check_share, number
from stage1_pro.errors import InputError
from stage1_pro.policies.bounds import binomial_cdf, errors_allowed

if TYPE_CHECKING:
    from stage1_pro.policies.rows import Rows

# Beyond this many trials the normal approximation plans as well as the exact sum, to a fraction of a percent.
_EXACT_TRIALS = 200_000
# More units than this are not counted exactly by float64.
_MOST_PLANNED = 1e12
# Standard deviations around a mean that exact sums run over.
_REACH = 8.0


@dataclass(frozen=True)
class PlanTerms:
    """What a plan takes for given: what is asked for, and what is hoped for."""

    alpha: float  # largest risk
    delta: Sequence[float]  # chance of failure; of a policy that abstains of the selection and of the risk
    min_coverage: float
    positives: float  # share of units that are
    cells: Sequence[float]  # share of each cell among the accepted
    one_class: bool  # sets of several classes are no success


@dataclass(frozen=True)
class Planned:
    """How a policy would certify a target, for a plan."""

    share: float  # of units that are trials of the risk, at the coverage wished
    level: float  # at which the risk is tested
    # The coverage that rows certify with a limit, and whether that says something; None: they do not.
    certifies: Callable[[Rows, float], tuple[float, bool] | None]
    most_trials: Callable[[int], int]  # of the risk, among so many units, where as many as can be are accepted
    wish: str
    assumptions: list[str]
    positives: float | None = None  # share of units that are, where it matters
    coverage: tuple[float, float] | None = None  # the least that is tested too, and at what level

    def least_units(self, alpha: float) -> float:
        """Units below which no test can pass, also where no answer is wrong and all are accepted."""
        tests = [math.log(self.level) / math.log1p(-alpha) / self.share]
        tests += [] if self.coverage is None else [math.log(self.coverage[1]) / math.log(self.coverage[0])]
        return max(tests)


def certify_power(n: int, alpha: float, delta: float, share: float, expected_error: float) -> float:
    """Chance that ``n`` units certify risk <= alpha at a threshold fixed beforehand, in [0, 1]; higher is surer.

    The number of trials is binomial(n, share), the errors among them binomial with ``expected_error``; it succeeds when
    the exact binomial test passes. A policy, which walks over thresholds and may test its coverage, takes more units:
    ``stage1 plan`` simulates it.

    Args:
        n: rows that certify; groups, where rows share one.
        alpha: largest risk, inside (0, 1).
        delta: largest chance of a false certificate, inside (0, 1).
        share: share of units that are trials, in (0, 1].
        expected_error: the true risk, in [0, 1].

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
    return min(float(chance @ binomial_power(trials, alpha, delta, expected_error)), 1.0)


def plan_calibration(
    alpha: float, delta: float, min_coverage: float | None, expected_error: float, power: float = 0.9
) -> int:
    """How many rows (groups, where rows share one) one exact test takes to certify risk <= alpha; fewer is cheaper.

    The smallest n from which ``certify_power`` stays at ``power``, which saws a little with n. It is of one binomial
    test, at a threshold fixed beforehand whose coverage needs no proof. A policy has to find its threshold and proves
    its coverage too, which takes up to twice as many: ``stage1_pro.plan`` simulates that. Where the normal
    approximation asks for more than 200,000 trials its answer stands.

    Args:
        alpha: largest risk, inside (0, 1).
        delta: largest chance of a false certificate.
        min_coverage: share of rows that are trials, in (0, 1]: the coverage, or the share of exited positives. None: 1.
        expected_error: the true risk that is hoped for, in [0, alpha).
        power: wished chance to succeed, inside (0, 1).

    Raises:
        InputError: an argument outside its range, or one that takes more than 1e12 rows; at
            ``expected_error >= alpha`` no number of rows would do.
    """
    share = 1.0 if min_coverage is None else min_coverage
    _check(alpha, delta, share)
    check_share("power", power)
    if not 0 <= number("expected_error", expected_error) < alpha:
        raise InputError(
            f"expected_error must be in [0, alpha = {alpha:g}), got {expected_error:g}; no number of rows certifies a "
            "risk that is not below alpha"
        )
    spread = -ndtri(delta) * math.sqrt(alpha * (1 - alpha))
    spread += ndtri(power) * math.sqrt(expected_error * (1 - expected_error))
    root = min(float(spread) / (alpha - expected_error), _MOST_PLANNED)
    rough = max(root, 1.0) ** 2
    if rough / share > _MOST_PLANNED:
        raise InputError(
            f"alpha must be large enough for {_MOST_PLANNED:.0e} units, got {alpha:g} of a share of {share:g} with "
            f"expected_error {expected_error:g}; ask for a larger alpha or hope for a smaller error"
        )
    if rough > _EXACT_TRIALS:
        return math.ceil(rough / share)

    def enough(n: int) -> bool:
        return certify_power(n, alpha, delta, share, expected_error) >= power

    low, high = 0, math.ceil(rough / share)
    while not enough(high):
        low, high = high, 2 * high
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
