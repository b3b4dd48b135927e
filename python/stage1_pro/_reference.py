"""NumPy twin of every kernel in ``csrc``: the oracle of the tests, and the fallback where nothing is compiled.

Functions have the names, arguments and results of ``_core``, bit for bit; ``_native`` checks what goes in.
"""

from __future__ import annotations

import bisect
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Confidence = NDArray[np.float32] | NDArray[np.float64]
Error = NDArray[np.uint8] | NDArray[np.float64]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def augrc(confidence: Confidence, error: Error) -> float:
    """AUGRC of [N] rows; see ``stage1_pro.metrics.selective.augrc``."""
    loss, _, ends = _sort(confidence, error, np.zeros(0, np.uint32))
    return _evaluate(np.ones(loss.size, np.int64), loss, ends)


def bootstrap_augrc(
    confidence: Confidence,
    error: Error,
    cluster: NDArray[np.uint32],
    n_clusters: int,
    n_replicates: int,
    seed: int,
    threads: int,
) -> NDArray[np.float64]:
    """AUGRC of [n_replicates] resamples of the rows, or of whole clusters; ``threads`` has no effect here."""
    loss, cluster, ends = _sort(confidence, error, cluster)
    replicates = np.empty(n_replicates)
    for replicate in range(n_replicates):
        counts = resample_counts(n_clusters or loss.size, seed, replicate)
        replicates[replicate] = _evaluate(counts[cluster] if n_clusters else counts, loss, ends)
    return replicates


def resample_counts(n: int, seed: int, replicate: int) -> NDArray[np.int64]:
    """How often each of ``n`` units is drawn in one replicate: exactly Multinomial(n, 1/n), int64 [n]."""
    return np.bincount(_draw(n, seed, replicate), minlength=n)


def _draw(n: int, seed: int, replicate: int) -> NDArray[np.int64]:
    """Draw ``n`` units out of ``n``: Lemire's multiplication with rejection on the 32-bit halves of hashed counters."""
    key = _mix(_mix(seed + _GOLDEN) + _GOLDEN * (replicate + 1))
    gamma = _mix(key ^ _GOLDEN) | 1
    words = _hash(key, gamma, np.arange(1, (n + 1) // 2 + 1, dtype=np.uint64))
    words = np.stack([words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)], axis=1).ravel()[:n]
    product = words * np.uint64(n)
    limit = np.uint64((1 << 32) % n)
    rejected = np.flatnonzero((product & np.uint64(0xFFFFFFFF)) < limit)
    attempt = 0
    while rejected.size:
        # A rejected draw has a stream of attempts of its own, so the others do not depend on it.
        attempt += 1
        words = _hash(_mix(key + attempt), gamma, rejected.astype(np.uint64)) >> np.uint64(32)
        product[rejected] = words * np.uint64(n)
        rejected = rejected[(product[rejected] & np.uint64(0xFFFFFFFF)) < limit]
    return (product >> np.uint64(32)).astype(np.int64)


def _mix(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014), of one Python integer modulo 2**64."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _hash(key: int, gamma: int, counter: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = np.uint64(key) + np.uint64(gamma) * counter
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _sort(
    confidence: Confidence, error: Error, cluster: NDArray[np.uint32]
) -> tuple[NDArray[Any], NDArray[np.uint32], NDArray[np.int64]]:
    """Sort rows by descending confidence; within ties by cluster and error, so that row order never matters.

    Returns the errors [N], the clusters [N] or [0], and where each tie group ends [M].
    """
    keys = (error, cluster, -confidence) if cluster.size else (error, -confidence)
    order = np.lexsort(keys)
    ranked = confidence[order]
    ends = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]) + 1, ranked.size)
    return error[order], cluster[order] if cluster.size else cluster, ends


def _evaluate(counts: NDArray[np.int64], loss: NDArray[Any], ends: NDArray[np.int64]) -> float:
    """AUGRC of sorted rows under counts: Σ C_g (2 E_before + E_g) over 2 n², integers all the way for 0/1 errors."""
    rows = np.cumsum(counts)[ends - 1]
    errors = np.cumsum(counts * loss)[ends - 1]
    pairs = np.cumsum(np.diff(rows, prepend=0) * (np.concatenate([errors[:1] * 0, errors[:-1]]) + errors))[-1]
    total = int(rows[-1])
    return float(pairs) / float(2 * total * total)


def order(confidence: Confidence, error: Error) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Rows [N] by descending confidence, then error, then index, and where tie groups end [M]."""
    places = np.lexsort((error, -confidence))
    ranked = confidence[places]
    ends = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]) + 1, ranked.size)
    return places.astype(np.uint32), ends.astype(np.uint32)


def sweep(
    confidence: Confidence, error: Error, answer: NDArray[np.uint8]
) -> tuple[
    NDArray[np.float64],
    NDArray[np.int64],
    NDArray[Any],
    NDArray[np.int64],
    NDArray[np.int64],
    NDArray[np.int64],
    NDArray[np.int64],
]:
    """At every distinct threshold [M]: itself, then rows, errors and what is known of answers; see ``sweep.hpp``."""
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
    """Tie groups above the upper and before the lower threshold, of the best pair and the nearest (``sweep.hpp``)."""
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
    gate: NDArray[np.float32],
    use_gate: bool,
    scale: float,
    offset: float,
    threshold: float,
    exited: NDArray[np.uint8],
    score: NDArray[np.float32],
    label: NDArray[np.int32],
    probability: NDArray[np.float32],
    deferred: NDArray[np.int32],
) -> int:
    """Decide rows [N, K] into the five arrays [N], and return how many are deferred; see ``route.hpp``."""
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
        if use_gate:
            logit = scale * gate.astype(np.float64) + offset
            power = _exponential(-np.abs(logit))
            sigmoid = np.where(logit >= 0, 1.0, power) / (1.0 + power)
            score[:] = np.where(defined & np.isfinite(gate), sigmoid, np.nan)
        exited[:] = score >= np.float32(threshold)
    rows = np.flatnonzero(exited == 0)
    deferred[: rows.size] = rows
    return int(rows.size)


def gather(source: NDArray[np.float32], index: NDArray[np.int32], out: NDArray[np.float32]) -> None:
    """Rows index [M] of source [N, D] into out [M, D]."""
    out[:] = source[index]


def merge(
    index: NDArray[np.int32],
    label: NDArray[np.int32],
    probability: NDArray[np.float32],
    score: NDArray[np.float32],
    out_label: NDArray[np.int32],
    out_probability: NDArray[np.float32],
    out_score: NDArray[np.float32],
) -> None:
    """Write answers [M] to rows index [M] of the three arrays [N]."""
    out_label[index], out_probability[index], out_score[index] = label, probability, score


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
