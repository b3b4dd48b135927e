"""NumPy twin of every kernel in ``csrc``: the oracle of the tests, and the fallback where nothing is compiled.

Functions have the names, arguments and results of ``_core``; ``native`` checks what goes in. Resamples, integer sums
and what is made of them agree bit for bit; sums of floating-point numbers to 1e-12, since they are added in another
order.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Confidence = NDArray[np.float32] | NDArray[np.float64]
Error = NDArray[np.uint8] | NDArray[np.float64]
Counts = NDArray[np.int64]
# At every threshold: itself, then rows, errors, positives, false negatives, negatives and false positives.
Swept = tuple[NDArray[np.float64], Counts, NDArray[Any], Counts, Counts, Counts, Counts]

# Columns of a replicate of ``bootstrap_suite``; Risk@Coverage and Coverage@Risk follow.
COLUMNS = ("augrc", "aurc", "accuracy", "nll", "brier", "coverage", "exit_error", "fnr_on_exited")
# Resamples up to this size are drawn one by one: the Poisson mean would not be positive.
SMALLEST_POISSON = 17

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
# Shares that differ by rounding alone are the same share: 0.07 of 100 rows is 7 rows.
_ROUNDING = 1e-12


def augrc(confidence: Confidence, error: Error) -> float:
    """AUGRC of [N] rows; see ``stage1_pro.metrics.selective.augrc``."""
    ranked, ends = _sort(confidence, error)
    return _augrc(np.ones(error.size, np.int64), error[ranked], ends)


def bootstrap_augrc(
    confidence: Confidence,
    error: Error,
    unit: NDArray[np.uint32],
    n_units: int,
    table: NDArray[np.uint64],
    reach: NDArray[np.uint64],
    starts: NDArray[np.uint32],
    lowest: NDArray[np.uint32],
    n_replicates: int,
    seed: int,
    threads: int,
) -> tuple[NDArray[np.float64], float, float, float]:
    """AUGRC of [n_replicates] resamples of the units, AUGRC itself, and two sums over the units' influences on it.

    These are of squares and of cubes; an influence is the derivative along the weights of a unit's rows. ``unit`` [N]
    says which unit a row is drawn with, [0] where every row is one; ``table`` [1, 32] what their counts are drawn from.
    With laws (``reach`` one behind the other, ``starts`` of each, its first count in ``lowest``) runs of right and of
    wrong rows are drawn as cells. ``threads`` is without effect here.
    """
    ranked, ends = _sort(confidence, error, unit)
    loss, owner = error[ranked], unit[ranked] if unit.size else None
    replicates = np.empty(n_replicates)
    cells = _Cells(loss, ends, reach, starts, lowest) if lowest.size and loss.dtype == np.uint8 else None
    for replicate in range(n_replicates):
        if cells is not None:
            replicates[replicate] = cells.augrc(cells.draw(seed, replicate))
            continue
        counts = _stratum_counts(n_units, seed, replicate, table[0], 0)
        replicates[replicate] = _augrc(counts if owner is None else counts[owner], loss, ends)
    n = loss.size
    influence = augrc_influence(loss, ends)
    if owner is not None:
        influence = np.bincount(owner, influence, n_units).astype(np.float64)
    value = _augrc(np.ones(n, np.int64), loss, ends)
    squares = influence * influence
    return replicates, value, float(squares.sum()), float((squares * influence).sum())


class _Cells:
    """Sorted rows with few errors as runs of equal errors; the right and the wrong rows of a tie group stay apart."""

    def __init__(
        self,
        loss: NDArray[Any],
        ends: NDArray[np.int64],
        reach: NDArray[np.uint64],
        starts: NDArray[np.uint32],
        lowest: NDArray[np.uint32],
    ) -> None:
        begins = np.append(0, ends[:-1])
        mixed = loss[begins] != loss[ends - 1]
        turns = np.flatnonzero(loss[1:] != loss[:-1]) + 1
        first = np.unique(np.concatenate([[0], turns, begins[mixed], ends[mixed]]))
        self.first = first[first < loss.size]
        self.n = loss.size
        self.sizes = np.diff(np.append(self.first, self.n))
        self.wrong = loss[self.first] == 1
        group = np.searchsorted(ends, self.first, side="right")
        self.mixed = self.wrong & mixed[group]
        self.laws = [reach[a:b] for a, b in itertools.pairwise(starts)], lowest.astype(np.int64)

    def draw(self, seed: int, replicate: int) -> NDArray[np.int64]:
        """How many of n uniform draws fall into each cell: Multinomial(n, sizes / n)."""
        cell = np.arange(self.sizes.size, dtype=np.uint64)
        keys = _keys(seed, replicate, 0)
        while True:
            sub, gamma = next(keys)
            counts = np.zeros(self.sizes.size, dtype=np.int64)
            for law, (reach, lowest) in enumerate(zip(*self.laws, strict=True)):
                have = np.flatnonzero((self.sizes >> law) & 1)
                words = _hash(sub, gamma, np.uint64(32) * cell[have] + np.uint64(law + 1))
                counts[have] += lowest + np.searchsorted(reach, words, side="right")
            missing = self.n - int(counts.sum())
            if missing >= 0:
                units = _draw(missing, self.n, _mix(sub + 2), gamma)
                place = np.searchsorted(self.first, units, side="right") - 1
                return counts + np.bincount(place, minlength=counts.size)

    def augrc(self, counts: NDArray[np.int64]) -> float:
        """AUGRC of cell counts: right rows pay for the errors before them, tied ones for those of their group too."""
        errors = counts * self.wrong
        before = np.cumsum(errors) - errors
        tied = np.append(0, counts[:-1]) * self.mixed
        pairs = int((2 * counts * before + errors * (counts + tied)).sum())
        return float(pairs) / float(2 * self.n * self.n)


def augrc_influence(
    loss: NDArray[Any], ends: NDArray[np.int64], weight: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Derivative of AUGRC along the weight of each sorted row [N], all 1 or 1 on average.

    The root of the sum of its squares, each times the row's weight, is AUGRC's standard error.
    """
    n = loss.size
    tied = np.diff(ends, prepend=0).astype(np.intp, copy=False)
    rows: NDArray[Any] = tied
    if weight is None:
        through = np.cumsum(loss, dtype=np.float64)[ends - 1]
    else:
        through = np.cumsum(weight * loss)[ends - 1]
        rows = np.diff(np.cumsum(weight)[ends - 1], prepend=0)
    # What an accepted row pays for errors at or above it, and an error for the rows at or below it.
    as_row = 2 * through
    as_row -= np.diff(through, prepend=0)
    as_error = 2.0 * (n - (ends if weight is None else np.cumsum(rows)))
    as_error += rows
    value = float((rows * as_row).sum()) / (2 * n * n)
    if tied.size < n:
        as_row, as_error = np.repeat(as_row, tied), np.repeat(as_error, tied)
    influence = loss * as_error
    influence += as_row
    influence /= 2 * n * n
    influence -= 2 * value / n
    return np.asarray(influence, dtype=np.float64)


def bootstrap_suite(
    error: Error,
    tie_ends: NDArray[np.uint32],
    unit: NDArray[np.uint32],
    sizes: NDArray[np.uint32],
    tables: NDArray[np.uint64],
    kind: NDArray[np.uint8],
    n_exit: int | None,
    nll: NDArray[np.float64],
    brier: NDArray[np.float64],
    coverages: NDArray[np.float64],
    risks: NDArray[np.float64],
    n_replicates: int,
    seed: int,
    threads: int,
) -> NDArray[np.float64]:
    """Every metric of [n_replicates] resamples of sorted rows, [n_replicates, 8 + coverages + risks].

    Rows are as ``Ranked`` has them, surest first. ``sizes`` [S] are the units of each stratum, ``tables`` [S, 32] what
    their counts are drawn from; ``coverages`` and ``risks`` the targets. ``threads`` is without effect here.
    """
    replicates = np.empty((n_replicates, len(COLUMNS) + coverages.size + risks.size))
    ends = tie_ends.astype(np.int64)
    for replicate in range(n_replicates):
        counts = resample_counts(sizes, tables, replicate, 1, seed)[0].astype(np.int64)
        counts = counts[unit] if unit.size else counts
        replicates[replicate] = measure(counts, error, ends, kind, n_exit, nll, brier, coverages, risks)
    return replicates


def measure_suite(
    error: Error,
    tie_ends: NDArray[np.uint32],
    kind: NDArray[np.uint8],
    n_exit: int | None,
    nll: NDArray[np.float64],
    brier: NDArray[np.float64],
    coverages: NDArray[np.float64],
    risks: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Every metric of sorted rows, [8 + coverages + risks]; arguments as in ``bootstrap_suite``."""
    counts = np.ones(error.size, dtype=np.int64)
    return measure(counts, error, tie_ends.astype(np.int64), kind, n_exit, nll, brier, coverages, risks)


def resample_counts(
    sizes: NDArray[np.uint32], tables: NDArray[np.uint64], first: int, n_replicates: int, seed: int
) -> NDArray[np.uint8]:
    """How often each unit is in each resample [n_replicates, units], from replicate ``first`` on.

    Within each stratum of n units n are drawn with replacement: exactly Multinomial(n, 1/n). Poisson counts of a mean a
    little below one (16 bits a unit; what these leave open is settled by 48 more), then uniform draws for what is
    missing. Given their sum Poisson counts are multinomial, and so is the result.
    """
    strata = list(enumerate(zip(sizes.tolist(), tables, strict=True)))
    counts = [
        np.concatenate([_stratum_counts(n, seed, replicate, table, stratum) for stratum, (n, table) in strata])
        for replicate in range(first, first + n_replicates)
    ]
    return np.stack(counts).astype(np.uint8)


def _keys(seed: int, replicate: int, stratum: int) -> Iterator[tuple[int, int]]:
    """Key and step of the hashes that a stratum's counts are drawn from, one pair an attempt."""
    key = _mix(_mix(seed + _GOLDEN) + _GOLDEN * (replicate + 1))
    gamma = _mix(key ^ _GOLDEN) | 1
    base = _mix(key + _GOLDEN * (stratum + 1))
    for attempt in itertools.count(1):
        yield _mix(base + _GOLDEN * attempt), gamma


def _stratum_counts(n: int, seed: int, replicate: int, table: NDArray[np.uint64], stratum: int) -> NDArray[np.int64]:
    keys = _keys(seed, replicate, stratum)
    while True:
        sub, gamma = next(keys)
        counts = np.zeros(n, np.int64) if n < SMALLEST_POISSON else _poisson_counts(n, sub, gamma, table)
        missing = n - int(counts.sum())
        if missing >= 0:
            counts += np.bincount(_draw(missing, n, _mix(sub + 2), gamma), minlength=n)
            # The compiled counts are bytes.
            if counts.max() < 256:
                return counts


def _poisson_counts(n: int, key: int, gamma: int, table: NDArray[np.uint64]) -> NDArray[np.int64]:
    cuts, rest = table[:6], table[6:]
    words = _hash(key, gamma, np.arange(1, (n + 3) // 4 + 1, dtype=np.uint64))
    parts = [(words >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48)]
    codes = np.stack(parts, axis=1).ravel()[:n]
    counts = np.searchsorted(cuts, codes, side="right").astype(np.int64)
    left = np.flatnonzero(codes >= cuts[-1])
    low = _hash(_mix(key + 1), gamma, left.astype(np.uint64) + np.uint64(1)) >> np.uint64(16)
    counts[left] = np.searchsorted(rest, (codes[left] - cuts[-1]) << np.uint64(48) | low, side="right")
    return counts


def _draw(draws: int, n: int, key: int, gamma: int) -> NDArray[np.int64]:
    """Uniform draws out of ``n``: Lemire's multiplication with rejection on 32 bits of hashed counters."""
    counter = np.arange(1, draws + 1, dtype=np.uint64)
    product = (_hash(key, gamma, counter) >> np.uint64(32)) * np.uint64(n)
    limit = np.uint64((1 << 32) % n)
    rejected = np.flatnonzero((product & np.uint64(0xFFFFFFFF)) < limit)
    attempt = 0
    while rejected.size:
        # A rejected draw has attempts of its own, so the others do not depend on it.
        attempt += 1
        product[rejected] = (_hash(_mix(key + attempt), gamma, counter[rejected]) >> np.uint64(32)) * np.uint64(n)
        rejected = rejected[(product[rejected] & np.uint64(0xFFFFFFFF)) < limit]
    return (product >> np.uint64(32)).astype(np.int64)


def _mix(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014), of one Python integer modulo 2**64."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _hash(key: int, gamma: int, counter: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = np.uint64(key & _MASK) + np.uint64(gamma) * counter
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _sort(
    confidence: Confidence, error: Error, unit: NDArray[np.uint32] | None = None
) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """The order by descending confidence, then error, then unit [N], and where each tie group ends [M]."""
    keys = (error, -confidence) if unit is None or not unit.size else (unit, error, -confidence)
    ranked = np.lexsort(keys)
    sorted_confidence = confidence[ranked]
    ends = np.flatnonzero(sorted_confidence[1:] != sorted_confidence[:-1]) + 1
    return ranked, np.append(ends, ranked.size)


def _augrc(counts: NDArray[np.int64] | NDArray[np.float64], loss: NDArray[Any], ends: NDArray[np.int64]) -> float:
    """AUGRC of sorted rows under counts: Σ C_g (2 E_before + E_g) over 2 n², integers all the way for 0/1 errors."""
    accepted = np.cumsum(counts)[ends - 1]
    errors = np.cumsum(counts * loss)[ends - 1]
    pairs = np.cumsum(np.diff(accepted, prepend=0) * (np.concatenate([errors[:1] * 0, errors[:-1]]) + errors))[-1]
    total = accepted[-1].item()
    return float(pairs) / float(2 * total * total)


def measure(
    counts: NDArray[np.int64] | NDArray[np.float64],
    loss: NDArray[Any],
    ends: NDArray[np.int64],
    kind: NDArray[np.uint8],
    n_exit: int | None,
    nll: NDArray[np.float64],
    brier: NDArray[np.float64],
    coverages: NDArray[np.float64],
    risks: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The suite of sorted rows under counts or weights [N]: ``COLUMNS``, Risk@Coverage, Coverage@Risk.

    Tie groups end at ``ends`` [M]; those that nobody drew are no thresholds. The rest as in ``bootstrap_suite``.
    """
    nan = float("nan")
    rows, wrong = np.cumsum(counts), np.cumsum(counts * loss)
    accepted, errors = rows[ends - 1], wrong[ends - 1]
    n = float(rows[-1])
    # Tie groups that nobody drew are no thresholds of this resample.
    there = np.diff(accepted, prepend=0) > 0
    accepted, errors = accepted[there], errors[there]
    risk = errors / accepted
    before = np.concatenate([risk[:1], risk[:-1]])
    aurc = float((np.diff(accepted, prepend=0) * (before + risk)).sum() / (2 * n))
    exits = [nan, nan, nan]
    if n_exit is not None:
        exited = float(rows[n_exit - 1]) if n_exit else 0.0
        exits[0] = exited / n
        exits[1] = float(wrong[n_exit - 1]) / exited if exited else nan
        if kind.size:
            positives, missed = (float(counts[:n_exit][(kind[:n_exit] & bit) > 0].sum()) for bit in (1, 2))
            exits[2] = missed / positives if positives else nan
    at_coverage = risk[np.searchsorted(accepted, coverages * n * (1 - _ROUNDING))]
    at_risk = []
    for limit in risks:
        met = np.flatnonzero(errors <= limit * accepted * (1 + _ROUNDING))
        at_risk.append(accepted[met[-1]] / n if met.size else 0.0)
    # Not a dot product: the BLAS behind it would leave threads spinning beside the kernel that runs next.
    means = [float((counts * values).sum()) / n if values.size else nan for values in (nll, brier)]
    fixed = [_augrc(counts, loss, ends), aurc, (n - float(wrong[-1])) / n, *means, *exits]
    return np.array([*fixed, *at_coverage, *at_risk])


def order(confidence: Confidence, error: Error) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Rows [N] by descending confidence, then error, then index, and where tie groups end [M]."""
    places, ends = _sort(confidence, error)
    return places.astype(np.uint32), ends.astype(np.uint32)


def sweep(confidence: Confidence, error: Error, answer: NDArray[np.uint8]) -> Swept:
    """What is accepted at every distinct threshold [M]; see ``sweep.hpp``."""
    places, ends = order(confidence, error)
    last = ends.astype(np.int64) - 1
    accepted = last + 1
    losses = error[places]
    errors = np.cumsum(losses, dtype=np.float64 if losses.dtype == np.float64 else np.int64)[last]
    threshold = confidence[places][last].astype(np.float64) + 0.0
    if not answer.size:
        nothing = np.zeros(0, np.int64)
        return threshold, accepted, errors, nothing, nothing, nothing, nothing
    is_positive, said_positive = (answer[places] & 1).astype(bool), (answer[places] >> 1).astype(bool)

    def upto(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.asarray(np.cumsum(mask, dtype=np.int64)[last])

    positive = upto(is_positive)
    false_negative, false_positive = upto(is_positive & ~said_positive), upto(said_positive & ~is_positive)
    return threshold, accepted, errors, positive, false_negative, accepted - positive, false_positive


def search_dual(
    rows: NDArray[np.int64],
    positives: NDArray[np.int64],
    exit_error: bool,
    fnr_numerator: int,
    fnr_denominator: int,
    second_numerator: int,
    second_denominator: int,
) -> tuple[int, int, int, int]:
    """Tie groups above the upper and before the lower threshold, of the best pair and the nearest (``sweep.hpp``).

    ``rows`` and ``positives`` [M + 1] are counts in the first 0..M tie groups. FNR must be at most one fraction, the
    second rate (exit error or FPR) at most the other.
    """
    accepted, found = rows.tolist(), positives.tolist()
    n, all_positive = accepted[-1], found[-1]
    excess = [second_denominator * (a - p) - second_numerator * a for a, p in zip(accepted, found, strict=True)]
    negatives = [a - p for a, p in zip(accepted, found, strict=True)]
    last_with: list[int] = []  # indices of growing excess: each is the last with so little
    best, nearest = (-1, -1), (-1, -1)
    best_worth, nearest_missed, nearest_positive, nearest_exited = (0, 0, 0), 0, 0, 0
    for j in range(len(accepted)):
        missed, below = all_positive - found[j], n - accepted[j]
        if exit_error:
            while last_with and excess[last_with[-1]] >= excess[j]:
                last_with.pop()
            last_with.append(j)
            room = second_numerator * below - second_denominator * missed
            place = bisect.bisect_right(last_with, room, key=excess.__getitem__)
            if place == 0:
                continue
            i = last_with[place - 1]
        else:
            right = below - missed
            if right == 0:
                break
            most = second_numerator * right // (second_denominator - second_numerator)
            i = min(bisect.bisect_right(negatives, most) - 1, j)
        exited_positive = found[i] + missed
        if exited_positive == 0:
            continue
        exited, wrong = accepted[i] + below, negatives[i] + missed
        left, right = missed * nearest_positive, nearest_missed * exited_positive
        if nearest[0] < 0 or left < right or (left == right and exited >= nearest_exited):
            nearest, nearest_missed, nearest_positive, nearest_exited = (i, j), missed, exited_positive, exited
        worth = exited, -wrong, -missed
        if missed * fnr_denominator <= fnr_numerator * exited_positive and (best[0] < 0 or worth >= best_worth):
            best, best_worth = (i, j), worth
    return *best, *nearest


def route(
    logits: NDArray[np.float32],
    gate: NDArray[np.float32] | None,
    rule: tuple[float, float, float],
    out: tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int32], NDArray[np.float32], NDArray[np.int32]],
) -> int:
    """Decide rows [N, K] (by ``gate`` [N] where there is one) into five arrays [N]; return how many are deferred.

    ``rule`` is (scale, offset, threshold) of ``route.hpp``; ``out`` exited, score, label, probability and deferred.
    """
    exited, score, label, probability, deferred = out
    scale, offset, threshold = rule
    values = logits.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        if values.shape[1] == 1:
            defined = np.isfinite(values[:, 0])
            label[:] = values[:, 0] > 0
            total = 1.0 + _exponential(-np.abs(values[:, 0]))
        else:
            largest = values.max(axis=1)
            # A maximum is NaN where any is; -inf alone leaves no probability.
            defined = np.isfinite(largest)
            label[:] = values.argmax(axis=1)
            total = np.zeros(largest.size)
            for column in values.T:
                total += _exponential(column - largest)
        label[~defined] = -1
        probability[:] = np.where(defined, 1.0 / total, np.nan)
        score[:] = probability
        if gate is not None:
            logit = scale * gate.astype(np.float64) + offset
            power = _exponential(-np.abs(logit))
            sigmoid = np.where(logit >= 0, 1.0, power) / (1.0 + power)
            score[:] = np.where(defined & np.isfinite(gate), sigmoid, np.nan)
        exited[:] = score >= np.float32(threshold)
    rows = np.flatnonzero(exited == 0)
    deferred[: rows.size] = rows
    return int(rows.size)


def gather(source: NDArray[np.float32], index: NDArray[np.int32], out: NDArray[np.float32]) -> None:
    """Rows index [M] of source [N, D] into out [M, D]; ValueError for an index beyond them."""
    _check_index(index, len(source))
    out[:] = source[index]


def merge(
    index: NDArray[np.int32],
    answers: tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]],
    out: tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]],
) -> None:
    """Write (label, probability, score) [M] to rows index [M] of the same three; ValueError for one beyond them."""
    _check_index(index, len(out[0]))
    for values, place in zip(answers, out, strict=True):
        place[index] = values


def _check_index(index: NDArray[np.int32], n: int) -> None:
    # One reduction for both ends: read as unsigned, a negative index is beyond every row.
    if index.size and index.view(np.uint32).max() >= n:
        raise ValueError("index must be of rows that are there")


def _exponential(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp(x) for x <= 0, exp(-708) below that, by the very steps of ``route.cpp``: NumPy's own differs between CPUs."""
    clamped = np.where(x < -708.0, -708.0, x)
    shifted = clamped * float.fromhex("0x1.71547652b82fep+0") + 6755399441055744.0
    k = shifted - 6755399441055744.0
    r = (clamped - k * float.fromhex("0x1.62e42fefa3000p-1")) - k * float.fromhex("0x1.3de6af278ece6p-42")
    total = np.full(x.shape, 1.0 / math.factorial(11))
    for power in range(10, -1, -1):
        total = total * r + 1.0 / math.factorial(power)
    scale = ((shifted.view(np.uint64) + np.uint64(1023)) << np.uint64(52)).view(np.float64)
    return np.asarray(total * scale)
