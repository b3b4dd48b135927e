"""NumPy twin of every kernel in ``csrc``: the oracle of the tests, and the fallback where nothing is compiled.

Functions have the names, arguments and results of ``_core``; ``_native`` checks what goes in. Resamples, integer sums
and what is made of them agree bit for bit; sums of floating-point numbers to 1e-12, since they are added in another
order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Confidence = NDArray[np.float32] | NDArray[np.float64]
Error = NDArray[np.uint8] | NDArray[np.float64]

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
    order, ends = _sort(confidence, error)
    return _augrc(np.ones(error.size, np.int64), error[order], ends)


def bootstrap_augrc(
    confidence: Confidence,
    error: Error,
    unit: NDArray[np.uint32],
    n_units: int,
    table: NDArray[np.uint64],
    n_replicates: int,
    seed: int,
    threads: int,
) -> NDArray[np.float64]:
    """AUGRC of [n_replicates] resamples of the units; ``threads`` has no effect here."""
    order, ends = _sort(confidence, error, unit)
    loss, owner = error[order], unit[order] if unit.size else None
    replicates = np.empty(n_replicates)
    for replicate in range(n_replicates):
        counts = resample_counts(n_units, seed, replicate, table[0])
        replicates[replicate] = _augrc(counts if owner is None else counts[owner], loss, ends)
    return replicates


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

    ``kind`` holds 1 for a positive row, plus 2 when it is answered otherwise; ``n_exit`` rows are at or above the
    threshold; ``unit`` says which unit a row is drawn with, and ``sizes`` how many units each stratum has.
    """
    replicates = np.empty((n_replicates, len(COLUMNS) + coverages.size + risks.size))
    ends = tie_ends.astype(np.int64)
    for replicate in range(n_replicates):
        counts = np.concatenate(
            [
                resample_counts(int(n), seed, replicate, table, stratum)
                for stratum, (n, table) in enumerate(zip(sizes, tables, strict=True))
            ]
        )
        counts = counts[unit] if unit.size else counts
        replicates[replicate] = _suite(counts, error, ends, kind, n_exit, nll, brier, coverages, risks)
    return replicates


def resample_counts(
    n: int, seed: int, replicate: int, table: NDArray[np.uint64], stratum: int = 0
) -> NDArray[np.int64]:
    """How often each of ``n`` units is drawn in one replicate: exactly Multinomial(n, 1/n), int64 [n].

    Poisson counts of a mean a little below one (16 bits a unit; what these leave open is settled by 48 more), then
    uniform draws for what is missing. Given their sum Poisson counts are multinomial, and so is the result.
    """
    key = _mix(_mix(seed + _GOLDEN) + _GOLDEN * (replicate + 1))
    gamma = _mix(key ^ _GOLDEN) | 1
    base = _mix(key + _GOLDEN * (stratum + 1))
    attempt = 0
    while True:
        attempt += 1
        sub = _mix(base + _GOLDEN * attempt)
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
    order = np.lexsort(keys)
    ranked = confidence[order]
    return order, np.append(np.flatnonzero(ranked[1:] != ranked[:-1]) + 1, ranked.size)


def _augrc(counts: NDArray[np.int64], loss: NDArray[Any], ends: NDArray[np.int64]) -> float:
    """AUGRC of sorted rows under counts: Σ C_g (2 E_before + E_g) over 2 n², integers all the way for 0/1 errors."""
    accepted = np.cumsum(counts)[ends - 1]
    errors = np.cumsum(counts * loss)[ends - 1]
    pairs = np.cumsum(np.diff(accepted, prepend=0) * (np.concatenate([errors[:1] * 0, errors[:-1]]) + errors))[-1]
    total = int(accepted[-1])
    return float(pairs) / float(2 * total * total)


def _suite(
    counts: NDArray[np.int64],
    loss: NDArray[Any],
    ends: NDArray[np.int64],
    kind: NDArray[np.uint8],
    n_exit: int | None,
    nll: NDArray[np.float64],
    brier: NDArray[np.float64],
    coverages: NDArray[np.float64],
    risks: NDArray[np.float64],
) -> NDArray[np.float64]:
    """One replicate: ``COLUMNS``, Risk@Coverage, Coverage@Risk."""
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
            positives, missed = (int(counts[:n_exit][(kind[:n_exit] & bit) > 0].sum()) for bit in (1, 2))
            exits[2] = missed / positives if positives else nan
    at_coverage = [risk[np.argmax(accepted >= share * n * (1 - _ROUNDING))] for share in coverages]
    at_risk = []
    for limit in risks:
        met = np.flatnonzero(errors <= limit * accepted * (1 + _ROUNDING))
        at_risk.append(accepted[met[-1]] / n if met.size else 0.0)
    means = [float(counts @ values) / n if values.size else nan for values in (nll, brier)]
    fixed = [_augrc(counts, loss, ends), aurc, (n - float(wrong[-1])) / n, *means, *exits]
    return np.array([*fixed, *at_coverage, *at_risk])
