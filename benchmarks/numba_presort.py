"""AUGRC's bootstrap in numba, given the packed sort: the strong baseline of peers.py.

Rows are packed into one 64-bit key (order-preserving bits of the float32 confidence, then the error bit) and sorted, as
the compiled core does it. A replicate draws counts and passes over them once, in integers, so that the value is exact.
Three ways, all of them exactly multinomial:

- ``plain``: what one writes first. xoshiro256+ inlined, n increments of uint32 counts, one pass in row order.
- ``blocked``: the same with everything numba was found to gain from: random words hashed a block at a time (LLVM
  vectorises that), uint8 counts, and the rows laid out in 32 interleaved segments so that the pass vectorises as well.
- ``poisson``: counts from Poisson(1 - 4/sqrt(n)) by table look-up with 64-bit refinement, then topped up to n by
  uniform draws (drawn anew should the sum exceed n); the pass of ``blocked``. Given their sum, Poisson counts are
  multinomial.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, localcontext
from typing import Literal

import numba
import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

Variant = Literal["plain", "blocked", "poisson"]

LANES = 32  # segments of the interleaved layout: eight 4-lane or two 16-lane vectors of uint32
BLOCK = 512  # 64-bit random words hashed at a time: 4 KiB stay in L1
TABLE_BITS = 12
CHUNK = 8  # replicates
AMBIGUOUS = np.uint8(255)

_U = np.uint64
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_LOW = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True)
class Presorted:
    """Sorted rows: ``error`` uint8 [N] by descending confidence, and where wrong and right rows are tied.

    Within a tie right rows come first, so a pass by row misses (right rows) x (wrong rows) of each mixed tie, and
    ``mixed`` [M, 3] holds first row, first wrong row and end of each to add it.
    """

    error: NDArray[np.uint8]
    mixed: NDArray[np.int64]


def presort(confidence: NDArray[np.float32], error: NDArray[np.bool_]) -> Presorted:
    """Pack, sort and unpack; confidence float32 [N] without NaN, error [N]."""
    bits = (confidence + np.float32(0)).view(np.uint32)
    descending = np.where(bits >> 31 == 1, bits, ~(bits | np.uint32(1 << 31)))
    keys = descending.astype(np.uint64) << _U(32) | error.astype(np.uint64)
    keys.sort()
    wrong = (keys & _U(1)).astype(np.uint8)
    score = (keys >> _U(32)).astype(np.uint32)
    # A mixed tie is where a right row and a wrong row of one score meet, and they meet once.
    meet = np.flatnonzero((score[1:] == score[:-1]) & (wrong[1:] != wrong[:-1])) + 1
    met = score[meet]
    first, end = np.searchsorted(score, met, side="left"), np.searchsorted(score, met, side="right")
    return Presorted(wrong, np.stack([first, meet, end], axis=1).astype(np.int64))


def augrc(rows: Presorted) -> float:
    """AUGRC of the rows themselves."""
    counts = np.ones(rows.error.size, np.uint32)
    n = rows.error.size
    return int(_pass_by_row(counts, _mask(rows.error, np.uint32)) + _ties_by_row(counts, rows.mixed)) / (2 * n * n)


def bootstrap_augrc(
    rows: Presorted, n_replicates: int, *, seed: int = 0, threads: int = 2, variant: Variant = "blocked"
) -> NDArray[np.float64]:
    """AUGRC of [n_replicates] resamples of the rows."""
    n = rows.error.size
    assert n < 1 << 23, "the interleaved pass multiplies in 32 bits"
    numba.set_num_threads(threads)
    sums = np.empty(n_replicates, np.uint64)
    # Chunks are handed out as threads come free, so one that is held up elsewhere does not hold up the whole.
    with numba.parallel_chunksize(CHUNK):
        if variant == "plain":
            scratch = np.empty((threads, n), np.uint32)
            _plain(rows.mixed, _mask(rows.error, np.uint32), _U(seed), scratch, sums)
        else:
            scratch = np.empty((threads, n), np.uint8)
            words = np.empty((threads, BLOCK), np.uint64)
            mask = _interleave(_mask(rows.error, np.uint8))
            edges = _poisson_edges(n) if variant == "poisson" else np.empty(0, np.uint64)
            _interleaved(rows.mixed, mask, _U(seed), edges, _poisson_table(edges), scratch, words, sums)
    return sums / (2.0 * n * n)


def resample_counts(n: int, *, seed: int = 0, variant: Variant = "blocked") -> NDArray[np.int64]:
    """How often each of n rows is drawn in one replicate, int64 [n] (for tests)."""
    stream = _stream(_U(seed), 0)
    if variant == "plain":
        wide = np.zeros(n, np.uint32)
        _draw_plain(wide, stream)
        return wide.astype(np.int64)
    counts, words = np.zeros(n, np.uint8), np.empty(BLOCK, np.uint64)
    if variant == "poisson":
        edges = _poisson_edges(n)
        _draw_poisson(counts, stream, words, edges, _poisson_table(edges))
    else:
        _draw_blocked(counts, stream, words)
    return counts.astype(np.int64)


def _mask(error: NDArray[np.uint8], dtype: type) -> NDArray[np.unsignedinteger]:
    """All bits set where a row is wrong: "and" is cheaper than a product."""
    return error.astype(dtype) * np.array(np.iinfo(dtype).max, dtype)


def _interleave(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Row l * length + j goes to place j * LANES + l; the last n % LANES rows stay where they are."""
    length = values.size // LANES
    body = length * LANES
    return np.concatenate([values[:body].reshape(LANES, length).T.ravel(), values[body:]])


def _poisson_edges(n: int) -> NDArray[np.uint64]:
    """Cumulative Poisson(1 - 4/sqrt(n)) probabilities in units of 2^-64; empty where the mean is not positive."""
    edges: list[int] = []
    with localcontext() as context:
        context.prec = 50
        mean = 1 - 4 / Decimal(n).sqrt()
        if mean > 0:
            probability = (-mean).exp()
            total = probability
            while int(total * 2**64) < 2**64 - 1:
                edges.append(int(total * 2**64))
                probability *= mean / len(edges)
                total += probability
    return np.array(edges, np.uint64)


def _poisson_table(edges: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """The count for each value of the leading TABLE_BITS bits, or AMBIGUOUS where an edge lies among them."""
    start = np.arange(1 << TABLE_BITS, dtype=np.uint64) << _U(64 - TABLE_BITS)
    lowest = np.searchsorted(edges, start, side="right")
    highest = np.searchsorted(edges, start + _U((1 << (64 - TABLE_BITS)) - 1), side="right")
    return np.where(lowest == highest, lowest, AMBIGUOUS).astype(np.uint8)


@njit(inline="always")
def _mix(value):
    """SplitMix64's finaliser (Steele, Lea and Flood 2014)."""
    value = (value ^ (value >> _U(30))) * _U(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> _U(27))) * _U(0x94D049BB133111EB)
    return value ^ (value >> _U(31))


@njit(cache=True)
def _stream(seed, replicate):
    return _mix(_mix(seed + _GOLDEN) + _GOLDEN * _U(replicate + 1))


@njit(inline="always")
def _place(word, n, reject_below, spare):
    """Lemire's multiplication with rejection: one of n places from the low 32 bits, and the state of spare draws."""
    product = (word & _LOW) * n
    while (product & _LOW) < reject_below:
        spare += _GOLDEN
        product = (_mix(spare) >> _U(32)) * n
    return product >> _U(32), spare


@njit(cache=True)
def _draw_plain(counts, stream):
    """n uniform draws by xoshiro256+ (Blackman and Vigna 2018), two a word."""
    size = counts.size
    n, reject_below = _U(size), _U((1 << 32) % size)
    spare = _mix(stream ^ _GOLDEN)
    a = _mix(stream + _GOLDEN)
    b = _mix(a + _GOLDEN)
    c = _mix(b + _GOLDEN)
    d = _mix(c + _GOLDEN)
    for pair in range((size + 1) // 2):
        word = a + d
        shifted = b << _U(17)
        c ^= a
        d ^= b
        b ^= c
        a ^= d
        c ^= shifted
        d = (d << _U(45)) | (d >> _U(19))
        place, spare = _place(word >> _U(32), n, reject_below, spare)
        counts[place] += np.uint32(1)
        if 2 * pair + 1 < size:
            place, spare = _place(word, n, reject_below, spare)
            counts[place] += np.uint32(1)


@njit(cache=True)
def _draw_blocked(counts, stream, words):
    """n uniform draws from words that are hashed counters, a block at a time."""
    size = counts.size
    n, reject_below = _U(size), _U((1 << 32) % size)
    spare = _mix(stream ^ _GOLDEN)
    halves = words.view(np.uint32)
    for start in range(0, size, 2 * BLOCK):
        for word in range(BLOCK):
            words[word] = _mix(stream + _GOLDEN * _U(word + 1))
        stream += _GOLDEN * _U(BLOCK)
        for half in range(min(2 * BLOCK, size - start)):
            place, spare = _place(_U(halves[half]), n, reject_below, spare)
            counts[place] += np.uint8(1)


@njit(cache=True)
def _draw_poisson(counts, stream, words, edges, table):
    """Poisson counts by table, 4 rows a word; what is missing to n is drawn uniformly."""
    size = counts.size
    if edges.size == 0:
        _draw_blocked(counts, stream, words)
        return
    n, reject_below = _U(size), _U((1 << 32) % size)
    spare = _mix(stream ^ _GOLDEN)
    quarters = words.view(np.uint16)
    total = size + 1
    while total > size:
        for start in range(0, size, 4 * BLOCK):
            for word in range(BLOCK):
                words[word] = _mix(stream + _GOLDEN * _U(word + 1))
            stream += _GOLDEN * _U(BLOCK)
            for quarter in range(min(4 * BLOCK, size - start)):
                leading = quarters[quarter] >> (16 - TABLE_BITS)
                count = table[leading]
                if count == AMBIGUOUS:
                    spare += _GOLDEN
                    value = (_U(leading) << _U(64 - TABLE_BITS)) | (_mix(spare) >> _U(TABLE_BITS))
                    count = np.uint8(0)
                    while count < edges.size and value >= edges[count]:
                        count += np.uint8(1)
                counts[start + quarter] = count
        total = 0
        for row in range(size):
            total += counts[row]
    for _ in range(size - total):
        spare += _GOLDEN
        place, spare = _place(_mix(spare) >> _U(32), n, reject_below, spare)
        counts[place] += np.uint8(1)


@njit(cache=True)
def _pass_by_row(counts, mask):
    """2 n^2 AUGRC, mixed ties apart."""
    errors = _U(0)
    pairs = _U(0)
    for row in range(counts.size):
        times = _U(counts[row])
        wrong = times & _U(mask[row])
        pairs += times * (errors + errors + wrong)
        errors += wrong
    return pairs


@njit(cache=True)
def _ties_by_row(counts, mixed):
    missed = _U(0)
    for tie in range(mixed.shape[0]):
        right = _U(0)
        for row in range(mixed[tie, 0], mixed[tie, 1]):
            right += _U(counts[row])
        wrong = _U(0)
        for row in range(mixed[tie, 1], mixed[tie, 2]):
            wrong += _U(counts[row])
        missed += right * wrong
    return missed


@njit(cache=True)
def _pass_interleaved(counts, mask):
    """2 n^2 AUGRC, mixed ties apart: every lane passes over a segment of its own, then segments are joined."""
    lane_errors = np.zeros(LANES, np.uint32)
    lane_rows = np.zeros(LANES, np.uint32)
    lane_pairs = np.zeros(LANES, np.uint64)
    length = counts.size // LANES
    for step in range(length):
        first = step * LANES
        for lane in range(LANES):
            times = np.uint32(counts[first + lane])
            wrong = times & np.uint32(mask[first + lane])
            lane_pairs[lane] += _U(times * (lane_errors[lane] + lane_errors[lane] + wrong))
            lane_errors[lane] += wrong
            lane_rows[lane] += times
    errors = _U(0)
    pairs = _U(0)
    for lane in range(LANES):
        pairs += lane_pairs[lane] + _U(2) * _U(lane_rows[lane]) * errors
        errors += _U(lane_errors[lane])
    for row in range(length * LANES, counts.size):
        times = _U(counts[row])
        wrong = times & _U(mask[row])
        pairs += times * (errors + errors + wrong)
        errors += wrong
    return pairs


@njit(cache=True)
def _ties_interleaved(counts, mixed):
    length = counts.size // LANES
    missed = _U(0)
    for tie in range(mixed.shape[0]):
        right = _U(0)
        wrong = _U(0)
        for row in range(mixed[tie, 0], mixed[tie, 2]):
            place = row if row >= length * LANES else row % length * LANES + row // length
            if row < mixed[tie, 1]:
                right += _U(counts[place])
            else:
                wrong += _U(counts[place])
        missed += right * wrong
    return missed


@njit(parallel=True, cache=True)
def _plain(mixed, mask, seed, scratch, sums):
    for replicate in prange(sums.size):
        counts = scratch[numba.get_thread_id()]
        counts[:] = 0
        _draw_plain(counts, _stream(seed, replicate))
        sums[replicate] = _pass_by_row(counts, mask) + _ties_by_row(counts, mixed)


@njit(parallel=True, cache=True)
def _interleaved(mixed, mask, seed, edges, table, scratch, words, sums):
    for replicate in prange(sums.size):
        thread = numba.get_thread_id()
        counts = scratch[thread]
        stream = _stream(seed, replicate)
        if edges.size == 0:
            counts[:] = 0
            _draw_blocked(counts, stream, words[thread])
        else:
            _draw_poisson(counts, stream, words[thread], edges, table)
        sums[replicate] = _pass_interleaved(counts, mask) + _ties_interleaved(counts, mixed)
