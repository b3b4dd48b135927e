"""Every selective metric of rows and of their resamples, and the tables that resamples are drawn from."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal, localcontext
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro.arguments import whole
from stage1_pro.errors import InputError
from stage1_pro.native import _reference
from stage1_pro.native.backend import kernels
from stage1_pro.native.rows import cluster_numbers, order, rows

SUITE = _reference.COLUMNS
# With fewer errors than that, drawing cells costs less than drawing rows.
ROWS_PER_ERROR = 256


def augrc(confidence: ArrayLike, error: ArrayLike) -> float:
    """AUGRC of checked rows: confidence [N], error [N] in [0, 1]."""
    return float(kernels().augrc(*rows(confidence, error)))


class AugrcReplicates(NamedTuple):
    """AUGRC of resamples [B], of the rows themselves, and its moments.

    ``second`` and ``third`` are the sums of squares and cubes of the influences of the resampled units; the root of
    ``second`` is the standard error.
    """

    replicates: NDArray[np.float64]
    value: float
    second: float
    third: float


def bootstrap_augrc(
    confidence: ArrayLike,
    error: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    n_replicates: int,
    seed: int = 0,
    threads: int = 0,
) -> AugrcReplicates:
    """AUGRC of resampled rows, or of resampled groups with all their rows.

    The same (seed, replicate) gives the same replicates, bit for bit, for any number of threads, any row order and
    either backend (the moments agree to rounding). Where fewer than one row in 256 is wrong, runs of right and wrong
    rows are drawn as cells: other numbers than ``Suite`` draws, from the same law, with the work of the errors and not
    of the rows.

    ``groups`` [N] are names or numbers; ``threads`` 0 is one per processor this process may use.
    """
    _check_resampling(n_replicates, seed, threads)
    scores, losses = rows(confidence, error)
    unit = np.zeros(0, dtype=np.uint32) if groups is None else cluster_numbers(groups, scores.size)
    n_units = int(unit.max()) + 1 if unit.size else scores.size
    few = groups is None and losses.dtype == np.uint8
    few = few and losses.size > ROWS_PER_ERROR * max(1, int(losses.sum(dtype=np.int64)))
    laws = _cell_laws(n_units if few else 0)
    resamples = n_replicates, seed, _workers(threads, n_replicates)
    found = kernels().bootstrap_augrc(scores, losses, unit, n_units, count_tables([n_units]), *laws, *resamples)
    return AugrcReplicates(*found)


_COLUMNS = ("confidence", "error", "positive", "missed", "nll", "brier", "weight")


@dataclass(frozen=True, eq=False)
class Columns:
    """What one model says of N rows; ``None`` where it is not known.

    ``confidence`` [N] and ``error`` [N] as ``rows`` gives them; ``positive`` and ``missed`` bool [N]: of the positive
    class, and of it but answered otherwise; ``nll`` and ``brier`` float64 [N], the latter at most ``brier_top``;
    ``threshold``: a row exits iff its confidence is at or above it, both as float64. ``weight`` [N], how much each row
    counts, above 0 and 1 on average; None: all alike. ``means``: by name, other values [N] whose mean is a metric.
    """

    confidence: NDArray[Any]
    error: NDArray[Any]
    positive: NDArray[np.bool_] | None = None
    missed: NDArray[np.bool_] | None = None
    nll: NDArray[np.float64] | None = None
    brier: NDArray[np.float64] | None = None
    threshold: float | None = None
    brier_top: float = 1.0
    weight: NDArray[np.float64] | None = None
    means: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def where(self, rows: NDArray[np.bool_]) -> Columns:
        """The same of some rows [N]."""
        given = {name: getattr(self, name) for name in _COLUMNS}
        some: dict[str, Any] = {name: None if values is None else values[rows] for name, values in given.items()}
        return replace(self, **some, means={name: values[rows] for name, values in self.means.items()})


class Ranked:
    """The columns of one model in sorted order, surest first; what the suite's kernel reads.

    ``order`` [N], which row stands where; ``error`` [N]; ``ends`` [M], one past each tie group; ``unit`` uint32 [N],
    which unit a row is drawn with, or [0]: row i is unit i; ``kind`` uint8 [N] or [0], 1 for a positive row and 3 for a
    missed one; ``n_exit`` rows exit, None without a threshold; ``nll``, ``brier`` and ``weight`` [N] or [0]; ``means``
    [N] each.
    """

    def __init__(self, columns: Columns, unit: NDArray[np.uint32] | None) -> None:
        kind = np.zeros(0, dtype=np.uint8)
        if columns.positive is not None and columns.missed is not None:
            kind = (columns.positive + 2 * (columns.missed & columns.positive)).astype(np.uint8)
        given = columns.nll, columns.brier, columns.weight
        nll, brier, weight = (np.zeros(0) if values is None else values for values in given)
        place, self.ends = order(columns.confidence, columns.error)
        # Rows that are tied in all that was sorted by are told apart by the rest, so that row order never matters.
        keys = (kind, nll, brier, weight, *columns.means.values(), unit)
        minor = [values for values in keys if values is not None and values.size]
        self.order = place = _settle(place, columns.confidence, columns.error, minor)
        self.error: NDArray[Any] = columns.error[place]
        self.kind: NDArray[np.uint8] = kind[place] if kind.size else kind
        self.nll: NDArray[np.float64] = nll[place] if nll.size else nll
        self.brier: NDArray[np.float64] = brier[place] if brier.size else brier
        self.weight: NDArray[np.float64] = weight[place] if weight.size else weight
        self.means = {name: values[place] for name, values in columns.means.items()}
        self.unit = np.zeros(0, dtype=np.uint32) if unit is None else unit[place]
        self.n_exit = None
        if columns.threshold is not None:
            self.n_exit = int(np.count_nonzero(columns.confidence.astype(np.float64) >= columns.threshold))

    def times(self, counts: NDArray[np.uint8]) -> NDArray[np.float64]:
        """How much each row [N] counts in a resample that holds every unit so often, [units]."""
        drawn = (counts[self.unit] if self.unit.size else counts).astype(np.float64)
        return drawn * self.weight if self.weight.size else drawn

    @functools.cached_property
    def through(self) -> NDArray[np.float64]:
        """Rows up to the end of each tie group, or their weight."""
        if not self.weight.size:
            return self.ends.astype(np.float64)
        return np.asarray(np.cumsum(self.weight)[self.ends.astype(np.int64) - 1])


class Suite:
    """Every selective metric of one model's rows, or of several models' answers to the same rows, and of resamples.

    All models see the same resamples (paired). Neither row order nor the number of threads changes a resample. With
    weights a drawn row counts by its weight; that is measured in NumPy, which takes longer.

    Args:
        models: of the same N rows in the same order.
        groups: [N] clips or tracks to resample whole; None resamples rows.
        strata: [N]; resample rows within each stratum, which keeps its size. Not together with groups.
        coverages: targets of Risk@Coverage.
        risks: targets of Coverage@Risk.
    """

    def __init__(
        self,
        models: Sequence[Columns],
        *,
        groups: ArrayLike | None = None,
        strata: ArrayLike | None = None,
        coverages: Sequence[float] = (),
        risks: Sequence[float] = (),
    ) -> None:
        n = models[0].confidence.size
        if groups is not None and strata is not None:
            raise InputError("groups and strata must not be given together; whole groups cannot keep a stratum's size")
        unit: NDArray[np.uint32] | None = None
        sizes = [n]
        if groups is not None:
            unit = cluster_numbers(groups, n)
            sizes = [int(unit.max()) + 1]
        elif strata is not None or len(models) > 1:
            # Rows are numbered by what they are, not by where they stand.
            unit = np.empty(n, dtype=np.uint32)
            keys = [key for model in models for key in _keys(model)]
            if strata is not None:
                stratum = cluster_numbers(strata, n)
                keys.insert(0, stratum)
                sizes = np.bincount(stratum).tolist()
            unit[np.lexsort(keys[::-1])] = np.arange(n, dtype=np.uint32)
        self.n_units = sum(sizes)
        self.models = [Ranked(model, unit) for model in models]
        self.sizes = sizes
        self._targets = [np.asarray(values, dtype=np.float64) for values in (coverages, risks)]

    def values(self) -> list[NDArray[np.float64]]:
        """The metrics of the rows themselves, [8 + coverages + risks] for each model; columns: ``SUITE``, targets."""
        return [
            self._weighted(one, one.weight)
            if one.weight.size
            else kernels().measure_suite(one.error, one.ends, *self._measured(one))
            for one in self.models
        ]

    def resample(self, n_replicates: int, *, seed: int = 0, threads: int = 0) -> list[NDArray[np.float64]]:
        """The metrics of resamples, [n_replicates, 8 + coverages + risks] for each model."""
        _check_resampling(n_replicates, seed, threads)
        drawn = np.asarray(self.sizes, dtype=np.uint32), count_tables(self.sizes)
        resamples = n_replicates, seed, _workers(threads, n_replicates)
        if any(one.weight.size for one in self.models):
            found = [np.empty((n_replicates, len(SUITE) + sum(map(len, self._targets)))) for _ in self.models]
            for replicate in range(n_replicates):
                times = resample_counts(self.sizes, 1, first=replicate, seed=seed)[0]
                for one, rows_of in zip(self.models, found, strict=True):
                    rows_of[replicate] = self._weighted(one, one.times(times))
            return found
        return [
            kernels().bootstrap_suite(one.error, one.ends, one.unit, *drawn, *self._measured(one), *resamples)
            for one in self.models
        ]

    def _weighted(self, one: Ranked, weight: NDArray[np.float64]) -> NDArray[np.float64]:
        """The metrics of sorted rows of these weights."""
        return _reference.measure(weight, one.error, one.ends.astype(np.int64), *self._measured(one))

    def _measured(self, one: Ranked) -> tuple[Any, ...]:
        return one.kind, one.n_exit, one.nll, one.brier, *self._targets

    def mean_of(self, name: str, n_replicates: int, *, seed: int = 0) -> list[tuple[float, NDArray[np.float64]]]:
        """The mean of ``Columns.means[name]`` for each model, and of the resamples that ``resample`` draws [B]."""
        drawn: list[list[float]] = [[] for _ in self.models]
        for replicate in range(n_replicates):
            counts = resample_counts(self.sizes, 1, first=replicate, seed=seed)[0]
            for one, means in zip(self.models, drawn, strict=True):
                times = one.times(counts)
                means.append(float((times * one.means[name]).sum() / times.sum()))
        return [
            (float(np.average(one.means[name], weights=one.weight if one.weight.size else None)), np.array(means))
            for one, means in zip(self.models, drawn, strict=True)
        ]


def augrc_influence(
    error: NDArray[Any], ends: NDArray[np.uint32], weight: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Derivative of AUGRC along the weight of each sorted row [N]; ``ends`` and ``weight`` as ``Ranked`` has them."""
    return _reference.augrc_influence(error, ends.astype(np.int64), weight)


def _keys(model: Columns) -> list[NDArray[Any]]:
    """All that tells rows apart, the most important first."""
    extra = (model.positive, model.missed, model.nll, model.brier, model.weight, *model.means.values())
    return [-model.confidence, model.error, *(values for values in extra if values is not None)]


def _settle(
    place: NDArray[np.uint32], confidence: NDArray[Any], error: NDArray[Any], minor: Sequence[NDArray[Any]]
) -> NDArray[np.uint32]:
    """Order the rows of each run of equal confidence and error by the minor keys."""
    if not minor or place.size < 2:
        return place
    same = (confidence[place[1:]] == confidence[place[:-1]]) & (error[place[1:]] == error[place[:-1]])
    inside = np.flatnonzero(np.append(same, False) | np.append(False, same))
    if inside.size == 0:
        return place
    run = np.cumsum(np.append(True, ~same))[inside]
    tied = place[inside]
    settled = place.copy()
    settled[inside] = tied[np.lexsort([*(key[tied] for key in minor[::-1]), run])]
    return settled


def resample_counts(sizes: Sequence[int], n_replicates: int, *, first: int = 0, seed: int = 0) -> NDArray[np.uint8]:
    """How often each unit is in each resample [n_replicates, units]; what ``Suite.resample`` draws.

    Of each stratum's n units n are drawn with replacement, exactly Multinomial(n, 1/n), from replicate ``first`` on.
    """
    _check_resampling(n_replicates, seed, 0)
    counts: NDArray[np.uint8] = kernels().resample_counts(
        np.asarray(sizes, dtype=np.uint32), count_tables(sizes), first, n_replicates, seed
    )
    return counts


def count_tables(sizes: Sequence[int]) -> NDArray[np.uint64]:
    """What a resample of each size is drawn from, [S, 32]; see ``CountTable`` in ``random.hpp``."""
    return np.array([_count_table(int(n)) for n in sizes], dtype=np.uint64)


@functools.lru_cache(maxsize=4096)
def _count_table(n: int) -> tuple[int, ...]:
    """Poisson(1 - 2.5 / sqrt(n)) as 6 cumulated 16-bit codes and 26 cumulated remainders, in units of 2**-64.

    Decimal arithmetic: the same integers on every machine, whatever its exp.
    """
    if n < _reference.SMALLEST_POISSON:
        return (0,) * 32
    with localcontext() as context:
        context.prec = 50
        mean = 1 - Decimal("2.5") / Decimal(n).sqrt()
        share = (-mean).exp()
        total = share
        cuts, rest, codes = [], [], 0
        for count in range(26):
            if count < 6:
                codes += int(share * 2**16)
                cuts.append(codes)
            rest.append(int(total * 2**64) - (codes << 48))
            share *= mean / (count + 1)
            total += share
    return (*cuts, *rest)


@functools.lru_cache(maxsize=64)
def _cell_laws(n: int) -> tuple[NDArray[np.uint64], NDArray[np.uint32], NDArray[np.uint32]]:
    """Cumulated Poisson laws of the means (1 - 2.5 / sqrt(n)) 2**j for all digits j of n; see ``PoissonTables``.

    Shares follow from their neighbours' by products alone, from the likeliest count outwards, so that every machine
    gets the same; they are good to 2**-50. For n = 0 there are none.
    """
    reach, starts, lowest = [np.zeros(0, dtype=np.uint64)], [0], []
    for digit in range(n.bit_length()):
        mean = (1 - 2.5 / math.sqrt(n)) * 2.0**digit
        spread = 10 * math.sqrt(mean) + 40
        likeliest, low, high = math.floor(mean), max(0, math.floor(mean - spread)), math.ceil(mean + spread)
        up = np.cumprod(mean / np.arange(likeliest + 1.0, high + 1.0))
        down = np.cumprod(np.arange(likeliest, low, -1.0) / mean)
        shares = np.concatenate([down[::-1], [1.0], up])
        through = np.cumsum(shares) / shares.sum()
        # The last share needs no number: what reaches all others is it.
        reach.append(np.minimum(through[:-1] * 2.0**64, 2.0**64 - 2048).astype(np.uint64))
        starts.append(starts[-1] + reach[-1].size)
        lowest.append(low)
    return np.concatenate(reach), np.asarray(starts, dtype=np.uint32), np.asarray(lowest, dtype=np.uint32)


def _check_resampling(n_replicates: int, seed: int, threads: int) -> None:
    whole("n_replicates", n_replicates, 1, 10**9)
    whole("seed", seed, most=2**64 - 1)
    whole("threads", threads)


def _workers(threads: int, n_replicates: int) -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(threads or available, n_replicates)
