"""Tests with their p-values: DeLong of AUROC, exact McNemar, permutation of a paired difference, calibration.

Each says what holds if there is nothing to find (``expected``), what was seen, and how rarely chance alone goes as far.
A p-value is of one test that was planned: of several, ``policies`` has Holm's and Bonferroni's corrections.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, expit, gammaln, logit, ndtr, ndtri, stdtr, stdtrit

from stage1_pro import native
from stage1_pro.arguments import binary, floats, whole
from stage1_pro.errors import InputError
from stage1_pro.metrics.binomial import check_level, clopper_pearson
from stage1_pro.metrics.estimate import Interval, cluster_t, worth
from stage1_pro.metrics.probabilistic import ECE_BINS, calibration_places, check_probabilities, largest, scored

Floats = NDArray[np.float64]
# So many different sums are weighed one by one, which is exact; beyond them signs are drawn.
_MOST_PATTERNS = 200_000
# With 10 positives DeLong's test rejects at .05 7 times in 100 where nothing is there, with 30 5 times.
_FEW = 30
# Entries that are drawn at once.
_AT_ONCE = 1 << 20


@dataclass(frozen=True, repr=False)
class Tested(Interval):
    """A value with its interval, and ``p_value``: how likely one as far from ``expected`` is if nothing is there.

    Two-sided, but for ``calibration_test``. NaN where the rows allow no test, and then ``note`` says why.
    """

    p_value: float = math.nan
    expected: float = 0.0


def delong(
    score: ArrayLike,
    positive: ArrayLike,
    other: ArrayLike | None = None,
    *,
    groups: ArrayLike | None = None,
    level: float = 0.95,
) -> Tested:
    """AUROC in [0, 1] held against chance (.5), or its difference in [−1, 1] from that of ``other`` scores against 0.

    A positive difference speaks for ``score``. The variance is that of the placements of positives among negatives and
    the reverse (DeLong, DeLong and Clarke-Pearson 1988), ties counted half, in O(N log N). With groups their sums vary
    (Obuchowski 1997) and Student's t counts those that matter. One AUROC has its interval on the logit scale.

    Stated answers: NaN where one class is missing, no interval where one class has one row or nothing varies; a note
    where there are fewer than 30 rows of one class, or 30 groups.

    Args:
        score: [N], higher is more positive.
        positive: [N] booleans.
        other: [N] scores of another model on the same rows.
        groups: [N] names or numbers of the independent units; None = every row is one.
        level: of the interval.

    Raises:
        InputError: another shape, a NaN, or no row.
    """
    check_level(level)
    truth = scored(score, positive)[1]
    first, influence = _placed(score, truth)
    value, expected = first, 0.5
    if other is not None:
        second, less = _placed(other, truth)
        value, influence, expected = first - second, influence - less, 0.0
    few, units = min(int(truth.sum()), int((~truth).sum())), "rows of one class"
    if few == 0:
        return _untested(value, level, "undefined: only one class is there", expected)
    degrees = math.inf
    if groups is None:
        sizes = np.where(truth, truth.sum(), (~truth).sum()).astype(np.float64)
        squares = influence**2 * sizes / np.maximum(sizes - 1, 1)
    else:
        sums = np.bincount(native.cluster_numbers(groups, truth.size), influence).astype(np.float64)
        few, units = sums.size, "groups"
        squares = sums**2 * sums.size / max(sums.size - 1, 1)
        degrees = max(worth(sums**2) - 1, 1.0)
    error = math.sqrt(float(squares.sum()))
    if few == 1 or error < 1e-12:
        why = "one row or group tells no spread" if few == 1 else "its standard error is 0"
        return _untested(value, level, f"no interval: {why}", expected)
    note = f"only {few} {units}: a normal law fits badly" if few < _FEW else ""
    t = (value - expected) / error
    far = float(ndtri((1 + level) / 2) if math.isinf(degrees) else stdtrit(degrees, (1 + level) / 2)) * error
    tail = float(ndtr(-abs(t)) if math.isinf(degrees) else stdtr(degrees, -abs(t)))
    ends = max(value - far, -1.0), min(value + far, 1.0)
    if other is None:
        center, width = float(logit(value)), far / (value * (1 - value)) if 0 < value < 1 else 0.0
        ends = float(expit(center - width)), float(expit(center + width))
    return Tested(value, error, *ends, level, "delong", note, p_value=2 * tail, expected=expected)


def _placed(score: ArrayLike, truth: NDArray[np.bool_]) -> tuple[float, Floats]:
    """AUROC and the influence of every row [N] on it."""
    scores, _ = scored(score, truth)
    above, below = scores[truth], np.sort(scores[~truth])
    if not above.size or not below.size:
        return math.nan, np.zeros(scores.size)
    ordered, influence = np.sort(above), np.empty(scores.size)
    influence[truth] = (np.searchsorted(below, above) + np.searchsorted(below, above, "right")) / (2 * below.size)
    value = float(influence[truth].mean())
    lower = np.searchsorted(ordered, scores[~truth]) + np.searchsorted(ordered, scores[~truth], "right")
    influence[~truth] = 1 - lower / (2 * above.size)
    influence -= value
    influence[truth] /= above.size
    influence[~truth] /= below.size
    return value, influence


def mcnemar(error: ArrayLike, other: ArrayLike, *, level: float = 0.95) -> Tested:
    """Of the rows that just one of two models gets wrong, the share that the first does, in [0, 1], held against .5.

    Less than .5 speaks for the first model. Exact: the binomial law of those rows (McNemar 1947), and Clopper and
    Pearson's interval of the share, which leaves .5 out just where the p-value is at most 1 − level. Rows must be
    independent; where they come in groups, ``permutation_test`` takes them.

    Stated answer: where no row tells the two apart the share is NaN and the p-value 1.

    Args:
        error: [N] 0/1 of the first model.
        other: [N] 0/1 of the second, on the same rows.
        level: of the interval.

    Raises:
        InputError: another shape, or what is no 0/1.
    """
    check_level(level)
    first, second = _pair({"error": binary("error", error), "other": binary("other", other)})
    only, differ = int((first & ~second).sum()), int((first != second).sum())
    if not differ:
        note = "undefined: no row is right for one model and wrong for the other"
        return Tested(math.nan, math.nan, 0.0, 1.0, level, "clopper-pearson", note, p_value=1.0, expected=0.5)
    share, tail = only / differ, float(bdtr(min(only, differ - only), differ, 0.5))
    error_of = math.sqrt(share * (1 - share) / differ)
    ends = clopper_pearson(only, differ, level)
    return Tested(share, error_of, *ends, level, "clopper-pearson", p_value=min(1.0, 2 * tail), expected=0.5)


def permutation_test(
    loss: ArrayLike,
    other: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    n_permutations: int = 9999,
    seed: int = 0,
    level: float = 0.95,
) -> Tested:
    """The mean of ``loss`` − ``other`` on the same rows, held against 0 by swapping the two models in whole groups.

    If the models are alike, each group's sum of differences has either sign with one chance. All sign patterns are
    weighed where they give up to 200,000 different sums, which is exact (0/1 losses by row: McNemar's test); else
    ``n_permutations`` are drawn, and the p-value (hits + 1) / (draws + 1) holds for any number. The interval is
    Student's t from the influence of every group.

    Args:
        loss: [N] of the first model, any finite numbers; lower is better.
        other: [N] of the second.
        groups: [N] names or numbers of the independent units; None = every row is one.
        n_permutations: draws where not all patterns are weighed.
        seed: of the draws: the same gives the same p-value, whatever the order of the rows.
        level: of the interval.

    Raises:
        InputError: another shape, a NaN or infinity, or no row.
    """
    check_level(level)
    whole("n_permutations", n_permutations, 1, 10**9)
    whole("seed", seed, most=2**64 - 1)
    first, second = _pair({"loss": _finite("loss", loss), "other": _finite("other", other)})
    unit = np.arange(first.size) if groups is None else native.cluster_numbers(groups, first.size)
    sums, sizes = np.bincount(unit, first - second), np.bincount(unit)
    value, largest_sum = float(sums.sum() / first.size), float(np.abs(sums).max())
    if largest_sum == 0:
        return _untested(value, level, "no interval: the two differ nowhere", p_value=1.0)
    if sums.size == 1:
        return _untested(value, level, "no interval: one row or group tells no spread", p_value=1.0)
    # Sums in another order differ by rounding; what is closer is the same number.
    sizes_of, times = np.unique(np.round(np.abs(sums) / largest_sum, 12), return_counts=True)
    sizes_of, times = sizes_of[sizes_of > 0], times[sizes_of > 0]
    seen = abs(float(sums.sum())) / largest_sum - 1e-9
    if np.log1p(times).sum() <= math.log(_MOST_PATTERNS):
        p_value = _weigh_all(sizes_of, times, seen)
    else:
        rng, hits = np.random.default_rng(seed), 0
        step = max(_AT_ONCE // times.size, 1)
        for start in range(0, n_permutations, step):
            ups = rng.binomial(times, 0.5, (min(step, n_permutations - start), times.size))
            hits += int((np.abs((2 * ups - times) @ sizes_of) >= seen).sum())
        p_value = (hits + 1) / (n_permutations + 1)
    influence = (sums - value * sizes) / first.size
    error = math.sqrt(float((influence**2).sum()) * sums.size / (sums.size - 1))
    if error < 1e-12 * largest_sum:
        return _untested(value, level, "no interval: its standard error is 0", p_value=p_value)
    return Tested(value, error, *cluster_t(value, influence, level), level, "t", p_value=p_value)


def _weigh_all(sizes: Floats, times: NDArray[np.int64], seen: float) -> float:
    """P(|Σ ± size| >= seen) over all signs of ``times`` sums of each size."""
    reached, share = np.zeros(1), np.ones(1)
    for size, n in zip(sizes.tolist(), times.tolist(), strict=True):
        ups = np.arange(n + 1)
        law = np.exp(gammaln(n + 1) - gammaln(ups + 1) - gammaln(n - ups + 1) - n * math.log(2))
        reached = np.add.outer(reached, size * (2 * ups - n)).ravel()
        share = np.multiply.outer(share, law).ravel()
    return min(float(share[np.abs(reached) >= seen].sum()), 1.0)


def calibration_test(
    probs: ArrayLike, labels: ArrayLike, *, bins: int = ECE_BINS, n_draws: int = 999, seed: int = 0
) -> Tested:
    """The ECE of these rows, in [0, 1], held against that of a model that is as often right as it is sure.

    Chance alone makes an ECE larger than 0: ``expected`` is its mean over draws in which every answer is right with a
    chance of its confidence (Bröcker and Smith 2007; Vaicenavicius et al. 2019), so ``value`` − ``expected`` is what
    speaks against calibration. ``p_value`` is (draws with as large an ECE + 1) / (draws + 1), one-sided, and holds for
    any number of independent rows. For an interval of the ECE see ``bootstrap_answers``.

    Args:
        probs: [N, K], rows sum to 1.
        labels: [N] class indices.
        bins: of equal width over [0, 1].
        n_draws: the smallest p-value is 1 / (n_draws + 1).
        seed: of the draws.

    Raises:
        InputError: as ``ece``.
    """
    whole("bins", bins, 1, 10**6)
    whole("n_draws", n_draws, 1, 10**9)
    whole("seed", seed, most=2**64 - 1)
    values, truth = check_probabilities(probs, labels)
    answered, sure = largest(values)
    # Rows by what they are, so that their order changes no draw.
    order = np.lexsort((answered != truth, sure))
    sure, right = sure[order], (answered == truth)[order]
    place = calibration_places(sure, bins=bins)
    starts = np.flatnonzero(np.append(True, place[1:] != place[:-1]))
    sums = np.add.reduceat(sure, starts)
    seen = float(np.abs(np.add.reduceat(right.astype(np.float64), starts) - sums).sum()) / sure.size
    rng, drawn = np.random.default_rng(seed), np.empty(n_draws)
    for draw in range(n_draws):
        made = np.add.reduceat((rng.random(sure.size) < sure).astype(np.float64), starts)
        drawn[draw] = np.abs(made - sums).sum() / sure.size
    p_value = (int((drawn >= seen - 1e-12).sum()) + 1) / (n_draws + 1)
    nan = math.nan
    note = "no interval: bootstrap_answers makes one"
    return Tested(seen, nan, nan, nan, 0.95, "none", note, drawn, p_value=p_value, expected=float(drawn.mean()))


def _pair(models: dict[str, NDArray[Any]]) -> tuple[NDArray[Any], NDArray[Any]]:
    (name, first), (called, second) = models.items()
    if first.ndim != 1 or first.shape != second.shape or first.size == 0:
        raise InputError(
            f"{name} and {called} must have one value per row and at least one row, got shapes {list(first.shape)} "
            f"and {list(second.shape)}; compare row by row"
        )
    return first, second


def _finite(name: str, values: ArrayLike) -> Floats:
    found = floats(name, values)
    off = ~np.isfinite(found)
    if off.any():
        raise InputError(f"{name} must be finite numbers, got {found[off][0]:g} at row {int(np.argmax(off))}; mend it")
    return found


def _untested(value: float, level: float, note: str, expected: float = 0.0, p_value: float = math.nan) -> Tested:
    nan = math.nan
    return Tested(value, nan, nan, nan, level, "none", note, p_value=p_value, expected=expected)
