"""The one door to compiled code: picks the backend once, checks shapes and dtypes, and names what is wrong.

``STAGE1_BACKEND=compiled`` or ``reference`` in the environment forces a backend; otherwise the compiled one is taken
when it is there. Both draw the same resamples and give the same integer sums, bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro import _reference
from stage1_pro.errors import DependencyError, InputError

Backend = Literal["compiled", "reference"]
MAX_ROWS = 2**31 - 1
SUITE = _reference.COLUMNS
# With fewer errors than that, drawing cells costs less than drawing rows.
ROWS_PER_ERROR = 256


def _load(wanted: str | None) -> tuple[ModuleType, Backend, str]:
    if wanted not in (None, "", "compiled", "reference"):
        raise InputError(f"STAGE1_BACKEND must be compiled or reference, got '{wanted}'; unset it to choose by itself")
    if wanted == "reference":
        return _reference, "reference", "the NumPy twin was asked for"
    try:
        core = importlib.import_module("stage1_pro._core")
    except ModuleNotFoundError as error:
        # Only the absence of _core itself is a choice of installation; anything else in it is a defect to be seen.
        if error.name != "stage1_pro._core":
            raise
        if wanted == "compiled":
            raise DependencyError(
                "stage1_pro._core is not built; with a C++20 compiler at hand, install again without STAGE1_PURE"
            ) from None
        return _reference, "reference", "stage1_pro._core is not built; NumPy computes the same, more slowly"
    return core, "compiled", f"stage1_pro._core {core.__version__}"


_kernels, _backend, _why = _load(os.environ.get("STAGE1_BACKEND"))


def backend() -> Backend:
    """Which kernels are in use."""
    return _backend


def why() -> str:
    """One line that says why, for ``stage1 doctor``."""
    return _why


@contextlib.contextmanager
def use(name: Backend) -> Iterator[None]:
    """Use one backend inside a ``with`` block (tests and benchmarks; not for use from several threads)."""
    global _kernels, _backend, _why
    before = _kernels, _backend, _why
    _kernels, _backend, _why = _load(name)
    try:
        yield
    finally:
        _kernels, _backend, _why = before


def rows(confidence: ArrayLike, error: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    """Check confidence [N] and error [N] and give them the kernels' dtypes.

    Float32 confidence stays float32; everything else becomes float64, so no two floats become tied on the way
    (integers beyond 2**53 may).
    Errors that are all 0 or 1 become uint8 (exact integer arithmetic), other losses float64. Raises InputError for
    other shapes, no rows, NaN (naming the row), and errors outside [0, 1].
    """
    # Aligned as well: an array may look into somebody's buffer at any byte.
    scores = np.require(confidence, requirements=["C", "A"])
    if scores.dtype != np.float32:
        scores = _floats("confidence", scores)
    losses = np.require(error, requirements=["C", "A"])
    if losses.dtype != np.bool_:
        losses = _floats("error", losses)
    if scores.ndim != 1 or losses.shape != scores.shape:
        raise InputError(
            f"confidence and error must have one shape [N], got {list(scores.shape)} and {list(losses.shape)}; "
            "pass one value per row"
        )
    if not 1 <= scores.size <= MAX_ROWS:
        raise InputError(
            f"confidence must hold 1 to {MAX_ROWS} rows, got {scores.size}; a metric of no rows is undefined"
        )
    for name, values in (("confidence", scores), ("error", losses)):
        missing = np.isnan(values)
        if missing.any():
            raise InputError(f"{name} must not be NaN, got NaN at row {int(missing.argmax())}; drop or mend the row")
    if losses.dtype == np.bool_:
        return scores, losses.view(np.uint8)
    outside = (losses < 0) | (losses > 1)
    if outside.any():
        row = int(outside.argmax())
        raise InputError(f"error must be in [0, 1], got {losses[row]:g} at row {row}; scale the loss")
    binary = losses.astype(np.uint8)
    return scores, binary if np.array_equal(binary, losses) else losses


def _floats(name: str, values: NDArray[Any]) -> NDArray[np.float64]:
    if values.dtype.kind not in "biuf":
        raise InputError(f"{name} must be numbers, got an array of {values.dtype}; convert it first")
    return np.require(values, dtype=np.float64, requirements=["C", "A"])


def augrc(confidence: ArrayLike, error: ArrayLike) -> float:
    """AUGRC of checked rows: confidence [N], error [N] in [0, 1]."""
    return float(_kernels.augrc(*rows(confidence, error)))


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

    Args:
        confidence: [N], higher is surer.
        error: [N], 0/1 or a loss in [0, 1].
        groups: [N] names or numbers; None resamples rows.
        n_replicates: at least 1.
        seed: 0 to 2**64 - 1.
        threads: 0 = one per processor this process may use.
    """
    _check_resampling(n_replicates, seed, threads)
    scores, losses = rows(confidence, error)
    unit = np.zeros(0, dtype=np.uint32) if groups is None else cluster_numbers(groups, scores.size)
    n_units = int(unit.max()) + 1 if unit.size else scores.size
    few = groups is None and losses.dtype == np.uint8
    few = few and losses.size > ROWS_PER_ERROR * max(1, int(losses.sum(dtype=np.int64)))
    return AugrcReplicates(
        *_kernels.bootstrap_augrc(
            scores,
            losses,
            unit,
            n_units,
            count_tables([n_units]),
            *_cell_laws(n_units if few else 0),
            n_replicates,
            seed,
            _workers(threads, n_replicates),
        )
    )


@dataclass(frozen=True, eq=False)
class Columns:
    """What one model says of N rows; ``None`` where it is not known.

    ``confidence`` [N] and ``error`` [N] as ``rows`` gives them; ``positive`` and ``missed`` bool [N]: of the positive
    class, and of it but answered otherwise; ``nll`` and ``brier`` float64 [N], the latter at most ``brier_top``;
    ``threshold``: a row exits iff its confidence is at or above it, both as float64.
    """

    confidence: NDArray[Any]
    error: NDArray[Any]
    positive: NDArray[np.bool_] | None = None
    missed: NDArray[np.bool_] | None = None
    nll: NDArray[np.float64] | None = None
    brier: NDArray[np.float64] | None = None
    threshold: float | None = None
    brier_top: float = 1.0


class Ranked:
    """The columns of one model in sorted order, surest first; what the suite's kernel reads.

    ``order`` [N], which row stands where; ``error`` [N]; ``ends`` [M], one past each tie group; ``unit`` uint32 [N],
    which unit a row is drawn with, or [0]: row i is unit i; ``kind`` uint8 [N] or [0], 1 for a positive row and 3 for a
    missed one; ``n_exit`` rows exit, None without a threshold; ``nll`` and ``brier`` [N] or [0].
    """

    def __init__(self, columns: Columns, unit: NDArray[np.uint32] | None) -> None:
        kind = np.zeros(0, dtype=np.uint8)
        if columns.positive is not None and columns.missed is not None:
            kind = (columns.positive + 2 * (columns.missed & columns.positive)).astype(np.uint8)
        nll, brier = (np.zeros(0) if values is None else values for values in (columns.nll, columns.brier))
        place, ends = order(columns.confidence, columns.error)
        # Rows that are tied in all that was sorted by are told apart by the rest, so that row order never matters.
        minor = [values for values in (kind, nll, brier, unit) if values is not None and values.size]
        place = _settle(place, columns.confidence, columns.error, minor)
        self.order = place
        self.ends = ends
        self.error: NDArray[Any] = columns.error[place]
        self.kind: NDArray[np.uint8] = kind[place] if kind.size else kind
        self.nll: NDArray[np.float64] = nll[place] if nll.size else nll
        self.brier: NDArray[np.float64] = brier[place] if brier.size else brier
        self.unit = np.zeros(0, dtype=np.uint32) if unit is None else unit[place]
        self.n_exit = None
        if columns.threshold is not None:
            self.n_exit = int(np.count_nonzero(columns.confidence.astype(np.float64) >= columns.threshold))


class Suite:
    """Every selective metric of one model's rows, or of several models' answers to the same rows, and of resamples.

    All models see the same resamples (paired). Neither row order nor the number of threads changes a resample.

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
            _kernels.measure_suite(one.error, one.ends, one.kind, one.n_exit, one.nll, one.brier, *self._targets)
            for one in self.models
        ]

    def resample(self, n_replicates: int, *, seed: int = 0, threads: int = 0) -> list[NDArray[np.float64]]:
        """The metrics of resamples, [n_replicates, 8 + coverages + risks] for each model.

        Args:
            n_replicates: at least 1.
            seed: 0 to 2**64 - 1.
            threads: 0 = one per processor this process may use.
        """
        _check_resampling(n_replicates, seed, threads)
        sizes, tables = np.asarray(self.sizes, dtype=np.uint32), count_tables(self.sizes)
        return [
            _kernels.bootstrap_suite(
                one.error,
                one.ends,
                one.unit,
                sizes,
                tables,
                one.kind,
                one.n_exit,
                one.nll,
                one.brier,
                *self._targets,
                n_replicates,
                seed,
                _workers(threads, n_replicates),
            )
            for one in self.models
        ]


def augrc_influence(ranked: Ranked) -> NDArray[np.float64]:
    """Derivative of AUGRC along the weight of each sorted row [N]."""
    return _reference.augrc_influence(ranked.error, ranked.ends.astype(np.int64))


def _keys(model: Columns) -> list[NDArray[Any]]:
    """All that tells rows apart, the most important first."""
    extra = (model.positive, model.missed, model.nll, model.brier)
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

    Within each stratum of n units n are drawn with replacement: exactly Multinomial(n, 1/n).

    Args:
        sizes: units of each stratum, at least 1.
        n_replicates: at least 1.
        first: number of the first replicate.
        seed: 0 to 2**64 - 1.
    """
    _check_resampling(n_replicates, seed, 0)
    counts: NDArray[np.uint8] = _kernels.resample_counts(
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
    for name, value in (("n_replicates", n_replicates), ("seed", seed), ("threads", threads)):
        if not isinstance(value, int | np.integer):
            raise InputError(f"{name} must be an integer, got {value!r}; give a whole number")
    if n_replicates < 1:
        raise InputError(f"n_replicates must be at least 1, got {n_replicates}; 1000 is usual")
    if not 0 <= seed < 2**64:
        raise InputError(f"seed must be from 0 to 2**64 - 1, got {seed}; choose a non-negative number")
    if threads < 0:
        raise InputError(f"threads must be 0 or more, got {threads}; 0 takes every processor")


def _workers(threads: int, n_replicates: int) -> int:
    return min(threads or _processors(), n_replicates)


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cluster_numbers(groups: ArrayLike, n: int) -> NDArray[np.uint32]:
    """Number groups 0..G-1 in sorted order of their names, [N], so that row order does not matter."""
    names = np.asarray(groups)
    if names.shape != (n,):
        raise InputError(
            f"groups must have shape [{n}], one group per row, got {list(names.shape)}; pass one name per row"
        )
    if names.dtype.kind in "fO":
        # NaN, None and the gaps of tables are no group of their own.
        missing = np.fromiter((name is None or name != name for name in names.tolist()), dtype=bool, count=n)  # noqa: PLR0124
        if missing.any():
            row = int(missing.argmax())
            raise InputError(
                f"groups must name a group for every row, got {names[row]} at row {row}; name it or drop it"
            )
    try:
        return np.unique(names, return_inverse=True)[1].astype(np.uint32)
    except TypeError:
        raise InputError("groups must be all names or all numbers, got a mix; convert them to strings") from None


def order(confidence: ArrayLike, error: ArrayLike) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Rows by descending confidence, then error, then index, [N], and one past the last place of each tie group, [M].

    Arguments and errors as in ``rows``; the same order in either backend.
    """
    places: NDArray[np.uint32]
    tie_ends: NDArray[np.uint32]
    places, tie_ends = _kernels.order(*rows(confidence, error))
    return places, tie_ends


def sweep(
    confidence: ArrayLike,
    error: ArrayLike,
    positive: NDArray[np.bool_] | None = None,
    predicted_positive: NDArray[np.bool_] | None = None,
) -> tuple[
    NDArray[np.float64],
    NDArray[np.int64],
    NDArray[Any],
    NDArray[np.int64],
    NDArray[np.int64],
    NDArray[np.int64],
    NDArray[np.int64],
]:
    """Count what is accepted at every distinct threshold, from the highest down, [M] each.

    The threshold, then rows, errors (a float sum for losses), positives, false negatives, negatives and false
    positives; the last four are [0] without ``positive`` [N] and ``predicted_positive`` [N], which go together.
    """
    scores, losses = rows(confidence, error)
    answer: NDArray[np.uint8] = np.zeros(0, np.uint8)
    if positive is not None and predicted_positive is not None:
        answer = positive.view(np.uint8) | (predicted_positive.view(np.uint8) << np.uint8(1))
        if answer.shape != scores.shape:
            raise InputError(
                f"positive and predicted_positive must have shape {list(scores.shape)} as confidence, got "
                f"{list(answer.shape)}; pass one value per row"
            )
    return _kernels.sweep(scores, losses, answer)  # type: ignore[no-any-return]


def search_dual(
    accepted: NDArray[np.int64],
    positives: NDArray[np.int64],
    *,
    exit_error: bool,
    max_fnr: Fraction,
    max_second: Fraction,
) -> tuple[int, int, int, int]:
    """Find the two thresholds of largest coverage under two constraints, as numbers of tie groups.

    Returns how many groups lie above the upper threshold and how many before the lower one, for the best pair and for
    the one with the smallest FNR within the second constraint; -1 where there is none.

    Args:
        accepted: [M + 1] rows in the first 0..M tie groups of descending score.
        positives: [M + 1] positives among them.
        exit_error: the second constraint is on exit error, not on FPR.
        max_fnr: in [0, 1).
        max_second: in [0, 1).
    """
    n = int(accepted[-1])
    # Shares of at most n rows compare alike with the next smaller fraction that n rows can have, and that fits 64 bits.
    fnr, second = floor_fraction(max_fnr, n), floor_fraction(max_second, n)
    cuts: tuple[int, int, int, int] = _kernels.search_dual(
        accepted, positives, exit_error, fnr.numerator, fnr.denominator, second.numerator, second.denominator
    )
    return cuts


def floor_fraction(value: Fraction, limit: int) -> Fraction:
    """The largest fraction at most ``value`` whose denominator is at most ``limit``; 0 <= value, 1 <= limit."""
    if value.denominator <= limit:
        return value
    # Continued fraction: the last convergent that fits and the last semiconvergent stand on either side of the value.
    (p, q), (next_p, next_q) = (0, 1), (1, 0)
    numerator, denominator = value.numerator, value.denominator
    while True:
        step, rest = divmod(numerator, denominator)
        if q + step * next_q > limit:
            break
        (p, q), (next_p, next_q) = (next_p, next_q), (p + step * next_p, q + step * next_q)
        numerator, denominator = denominator, rest
    steps = (limit - q) // next_q
    return min(Fraction(next_p, next_q), Fraction(p + steps * next_p, q + steps * next_q))


class Routed(NamedTuple):
    """What became of rows [N]: views of a Router's buffers, valid until its next call.

    ``exited`` is 0 or 1; ``label`` the most probable class (first on a tie), -1 without an answer; ``probability`` that
    class's, in [1/K, 1]; ``score`` what was compared, in [0, 1]; ``deferred`` [M] the rows that did not exit, in order.
    """

    exited: NDArray[np.uint8]
    score: NDArray[np.float32]
    label: NDArray[np.int32]
    probability: NDArray[np.float32]
    deferred: NDArray[np.int32]


class Router:
    """Decides which rows of Stage A exit, and puts Stage B's answers to the others back; owns its buffers.

    A row exits iff its score is at or above the threshold, in float32. The score is the largest probability of its
    logits or, with ``platt`` = (scale, offset), sigmoid(scale * gate + offset). A row without an answer (NaN or +inf
    among its logits, or nothing but -inf; an infinite single logit) and a gate that is not finite always defer. Both
    backends give the same bits. Not for use from several threads: give each its own.

    Args:
        max_rows: the largest batch; nothing is allocated after this.
        threshold: rounded to float32; no NaN.
        platt: None decides by probability.
    """

    def __init__(self, max_rows: int, *, threshold: float, platt: tuple[float, float] | None = None) -> None:
        self.max_rows = max_rows
        self.uses_gate = platt is not None
        self.threshold = _check_rule(max_rows, threshold, platt)
        self._rule = (*(platt or (0.0, 0.0)), self.threshold)
        self._buffers = Routed(
            np.empty(max_rows, np.uint8),
            np.empty(max_rows, np.float32),
            np.empty(max_rows, np.int32),
            np.empty(max_rows, np.float32),
            np.empty(max_rows, np.int32),
        )
        self._views = self._buffers
        self._gathered = np.zeros(0, np.float32)

    def route(self, logits: NDArray[np.float32], gate: NDArray[np.float32] | None = None) -> Routed:
        """Decide rows: logits [N, K] float32 (K = 1: the logit of the second of two classes), gate [N] float32.

        Raises:
            InputError: another dtype or shape, strided memory, more than ``max_rows`` rows, a gate too many or missing.
        """
        _check_floats("logits", logits, 2)
        n = logits.shape[0]
        if n > self.max_rows or logits.shape[1] == 0:
            raise InputError(
                f"logits must have at most {self.max_rows} rows and at least one class, got shape "
                f"{list(logits.shape)}; make a router for the largest batch"
            )
        if (gate is not None) != self.uses_gate:
            raise _gate_error(self.uses_gate, gate)
        if gate is not None:
            _check_floats("gate", gate, 1)
            if gate.size != n:
                raise InputError(f"gate must have shape [{n}] as logits has rows, got [{gate.size}]; one per row")
        if self._views.exited.size != n:
            exited, score, label, probability, deferred = self._buffers
            self._views = Routed(exited[:n], score[:n], label[:n], probability[:n], deferred[:n])
        views = self._views
        count: int = _kernels.route(logits, gate, self._rule, views)
        return Routed(views.exited, views.score, views.label, views.probability, views.deferred[:count])

    def gather(self, source: NDArray[np.float32], index: NDArray[np.int32]) -> NDArray[np.float32]:
        """Rows ``index`` [M] of source [N, ...] float32, [M, ...]: a view of a buffer, valid until the next call."""
        if source.dtype != np.float32 or source.ndim < 1 or not source.flags.c_contiguous:
            raise InputError(
                f"source must be contiguous float32 [N, ...], got {source.dtype} {list(source.shape)}; copy it first"
            )
        _check_index(index)
        flat = source.reshape(source.shape[0], -1)
        size = index.size * flat.shape[1]
        if self._gathered.size < size:
            self._gathered = np.empty(
                self.max_rows * flat.shape[1] if index.size <= self.max_rows else size, np.float32
            )
        out = self._gathered[:size].reshape(index.size, flat.shape[1])
        try:
            _kernels.gather(flat, index, out)
        except ValueError:
            raise _beyond(index, source.shape[0]) from None
        return out.reshape(index.size, *source.shape[1:])

    def merge(
        self, routed: Routed, label: NDArray[np.int32], probability: NDArray[np.float32], score: NDArray[np.float32]
    ) -> None:
        """Write Stage B's answers [M] into ``routed`` at its deferred rows; ``exited`` still tells whose they are."""
        index = routed.deferred
        _check_index(index)
        for name, values, dtype in (
            ("label", label, np.int32),
            ("probability", probability, np.float32),
            ("score", score, np.float32),
        ):
            if values.dtype != dtype or values.shape != index.shape or not values.flags.c_contiguous:
                raise InputError(
                    f"{name} must be contiguous {np.dtype(dtype)} [{index.size}], one per deferred row, got "
                    f"{values.dtype} {list(values.shape)}; convert it first"
                )
        try:
            _kernels.merge(index, (label, probability, score), (routed.label, routed.probability, routed.score))
        except ValueError:
            raise _beyond(index, routed.label.size) from None


def _check_rule(max_rows: int, threshold: float, platt: tuple[float, float] | None) -> float:
    """The threshold as float32."""
    if not 1 <= max_rows <= MAX_ROWS:
        raise InputError(f"max_rows must be 1 to {MAX_ROWS}, got {max_rows}; take the largest batch")
    if math.isnan(threshold):
        raise InputError("threshold must be a number, got NaN; take it from a policy")
    if platt is not None and not all(map(math.isfinite, platt)):
        raise InputError(f"platt must be two finite numbers, got {platt}; fit the gate again")
    with np.errstate(over="ignore"):
        return float(np.float32(threshold))


def _gate_error(uses_gate: bool, gate: object) -> InputError:
    return InputError(
        f"gate must be {'given' if uses_gate else 'None'}, got {'None' if gate is None else 'values'}; "
        "a router with platt decides by gate, one without by probability"
    )


def _check_floats(name: str, values: NDArray[np.float32], ndim: int) -> None:
    if values.dtype != np.float32 or values.ndim != ndim or not values.flags.c_contiguous:
        raise InputError(
            f"{name} must be contiguous float32 {'[N, K]' if ndim == 2 else '[N]'}, got {values.dtype} "
            f"{list(values.shape)}; convert it first"
        )


def _check_index(index: NDArray[np.int32]) -> None:
    if index.dtype != np.int32 or index.ndim != 1 or not index.flags.c_contiguous:
        raise InputError(
            f"index must be contiguous int32 [M], got {index.dtype} {list(index.shape)}; take Routed.deferred"
        )


def _beyond(index: NDArray[np.int32], n: int) -> InputError:
    """What a kernel that refused an index means; kernels look at every one anyway."""
    return InputError(f"index must be from 0 to {n - 1}, got {int(index.min())} to {int(index.max())}; rows of source")


def cuda_why() -> str | None:
    """One line on the CUDA router for ``stage1 doctor``: None where it is not built."""
    module = _load_cuda()
    if module is None:
        return None
    count, missing = module.devices()
    found = f"{count} device{'s' * (count != 1)}" if count else f"no device: {missing}"
    return f"stage1_pro._cuda {module.__version__} for sm {module.built()[0]}, {found}"


@functools.cache
def _load_cuda() -> ModuleType | None:
    try:
        return importlib.import_module("stage1_pro._cuda")
    except ModuleNotFoundError as error:
        if error.name != "stage1_pro._cuda":
            raise
        return None


def _cuda() -> ModuleType:
    """The CUDA module where it is built and has a device; DependencyError naming what is missing otherwise."""
    module = _load_cuda()
    if module is None:
        raise DependencyError(
            "stage1_pro._cuda is not built; with a CUDA toolkit at hand, install again with "
            "--config-settings=cmake.define.STAGE1_CUDA=ON"
        )
    count, missing = module.devices()
    if count == 0:
        raise DependencyError(
            f"the CUDA router needs a device, got none ({missing}); install or update the NVIDIA driver, or use Router"
        )
    return module


class DeviceArray:
    """Memory of a device that another object owns and keeps: what torch, CuPy and Numba read without a copy.

    ``torch.as_tensor(array, device="cuda")`` shares it. ``shape``, ``dtype``, ``address``; ``owner`` is kept alive.
    """

    def __init__(self, address: int, shape: tuple[int, ...], dtype: str, owner: object) -> None:
        self.address, self.shape, self.dtype, self.owner = address, shape, np.dtype(dtype), owner

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "shape": self.shape, "typestr": self.dtype.str, "data": (self.address, False),
                "strides": None, "stream": None}  # fmt: skip


@dataclass(frozen=True, eq=False)
class CudaRouted:
    """``Routed`` on the device, of the router's ``max_rows``: rows of the last batch count, the others are older.

    ``count`` int32 [1] says how many of ``deferred`` are meant.
    """

    exited: DeviceArray
    score: DeviceArray
    label: DeviceArray
    probability: DeviceArray
    deferred: DeviceArray
    count: DeviceArray


class CudaRouter:
    """``Router`` on a GPU: ``route``, ``gather`` and ``merge`` are a launch each, on your stream, and wait for nothing.

    The bits are those of ``Router``. Arrays are C-contiguous and on the device: torch tensors, or anything with
    ``__cuda_array_interface__`` (CuPy, Numba). A stream is torch's or CuPy's object or its handle; 0 is the default
    stream. What is enqueued reads your arrays later: keep them until then. All three calls can be captured into a CUDA
    graph. Not for use from several threads or on several streams at once: give each its own.

    Stage B wants a batch that the host knows: ``mark`` after ``route``, then ``wait`` gives the count as soon as that
    launch is done, through pinned memory, and whatever was enqueued in between runs on.

    >>> router = CudaRouter(256, threshold=0.9)  # doctest: +SKIP
    >>> router.route(logits, stream=stream)  # doctest: +SKIP
    >>> router.gather(hidden, into, stream=stream)  # doctest: +SKIP
    >>> router.mark(stream)  # doctest: +SKIP
    >>> logits_b = stage_b(into[: bucket(router.wait())])  # doctest: +SKIP
    >>> router.merge(logits_b, stream=stream)  # doctest: +SKIP

    Args:
        max_rows: the largest batch; nothing is allocated after this.
        threshold: rounded to float32; no NaN.
        platt: None decides by probability, (scale, offset) by sigmoid(scale * gate + offset).
        device: number of the device.

    Raises:
        DependencyError: the module is not built, or there is no device.
        InputError: arguments as for ``Router``.
    """

    def __init__(
        self, max_rows: int, *, threshold: float, platt: tuple[float, float] | None = None, device: int = 0
    ) -> None:
        self.max_rows = max_rows
        self.uses_gate = platt is not None
        self.threshold = _check_rule(max_rows, threshold, platt)
        module = _cuda()
        scale, offset = platt or (0.0, 0.0)
        self._router = module.Router(max_rows, self.uses_gate, scale, offset, self.threshold, device)
        self.device = device
        dtypes = {"exited": "u1", "score": "f4", "label": "i4", "probability": "f4", "deferred": "i4"}
        self.routed = CudaRouted(
            **{
                name: DeviceArray(getattr(self._router, name), (max_rows,), dtype, self._router)
                for name, dtype in dtypes.items()
            },
            count=DeviceArray(self._router.count_address, (1,), "i4", self._router),
        )
        self._rows = 0

    def route(self, logits: Any, gate: Any = None, *, stream: Any = 0) -> CudaRouted:
        """Decide rows: logits [N, K] float32 (K = 1: the logit of the second of two classes), gate [N] float32."""
        address, shape = _on_device("logits", logits, ("float32",), 2)
        if shape[0] > self.max_rows or shape[1] == 0:
            raise InputError(
                f"logits must have at most {self.max_rows} rows and at least one class, got shape {list(shape)}; "
                "make a router for the largest batch"
            )
        if (gate is not None) != self.uses_gate:
            raise _gate_error(self.uses_gate, gate)
        at = 0
        if gate is not None:
            at, rows = _on_device("gate", gate, ("float32",), 1)
            if rows[0] != shape[0]:
                raise InputError(f"gate must have shape [{shape[0]}] as logits has rows, got {list(rows)}; one per row")
        self._router.route(address, shape[0], shape[1], at, _stream(stream))
        self._rows = shape[0]
        return self.routed

    def gather(self, source: Any, out: Any, *, stream: Any = 0) -> None:
        """Copy the deferred rows of source [N, ...] to the front of out [N or more, ...], both of one dtype and width.

        Rows of ``out`` behind them stay as they were. Float32, float16, bfloat16, int8, uint8 or int32.
        """
        address, shape = _on_device("source", source, tuple(_SIZES), None)
        into, room = _on_device("out", out, (_dtype_name(source),), None)
        if shape[0] != self._rows or room[0] < shape[0] or room[1:] != shape[1:]:
            raise InputError(
                f"source must have {self._rows} rows as logits had, and out as many of the same width, got "
                f"{list(shape)} and {list(room)}; make out for the largest batch"
            )
        row_bytes = math.prod(shape[1:]) * _SIZES[_dtype_name(source)]
        self._router.gather(address, row_bytes, shape[0], into, _stream(stream))

    def merge(self, logits: Any, *, stream: Any = 0) -> CudaRouted:
        """Answer the deferred rows by Stage B's logits [M or more, K] float32, M the count; others are ignored.

        Label, probability and, as score, the probability are what ``Router`` gives of these logits; ``exited`` still
        tells whose they are. More rows than logits must not be deferred: the host that chose M has seen the count.
        """
        address, shape = _on_device("logits", logits, ("float32",), 2)
        if shape[1] == 0:
            raise InputError(f"logits must have at least one class, got shape {list(shape)}; give Stage B's")
        self._router.merge(address, shape[1], min(shape[0], self._rows), _stream(stream))
        return self.routed

    def mark(self, stream: Any = 0) -> None:
        """Note the place on the stream that ``wait`` waits for."""
        self._router.mark(_stream(stream))

    def wait(self) -> int:
        """How many rows are deferred, once the stream has come to the mark. Blocks the host, not the device."""
        return int(self._router.count())

    def switch(self, buckets: Sequence[int], graphs: Sequence[Any]) -> BucketSwitch:
        """Stage B captured once for each bucket, of which the device runs the smallest that holds the count.

        Args:
            buckets: increasing numbers of rows, the last at least ``max_rows``.
            graphs: torch's ``CUDAGraph(keep_graph=True)`` or a ``cudaGraph_t`` handle each, all of this device and
                without allocations. They are copied, the memory they name is not: torch's are kept alive.

        Raises:
            InputError: buckets that do not increase or hold too few rows, other numbers of graphs.
            RuntimeError: CUDA refuses; before 12.8 always.
        """
        sizes = [int(rows) for rows in buckets]
        if not 1 <= len(sizes) <= 32 or sizes[0] < 1 or sorted(set(sizes)) != sizes or sizes[-1] < self.max_rows:
            raise InputError(
                f"buckets must be 1 to 32 increasing numbers of rows up to {self.max_rows} or more, got {sizes}"
            )
        if len(graphs) != len(sizes):
            raise InputError(f"graphs must be one per bucket, got {len(graphs)} for {len(sizes)}; capture each")
        handles = [int(graph.raw_cuda_graph()) if hasattr(graph, "raw_cuda_graph") else int(graph) for graph in graphs]
        made = _cuda().BucketSwitch(sizes, handles, self.routed.count.address, self.device)
        return BucketSwitch(made, self, graphs)


class BucketSwitch:
    """What ``CudaRouter.switch`` gives; keeps router and graphs alive. Compiled, but run on no GPU so far."""

    def __init__(self, switch: Any, router: CudaRouter, graphs: Sequence[Any]) -> None:
        self._switch, self._kept = switch, (router, list(graphs))

    def launch(self, stream: Any = 0) -> None:
        """Enqueue: the host neither waits nor learns the count; nothing runs where nothing is deferred."""
        self._switch.launch(_stream(stream))


# torch names a dtype as NumPy does but for bfloat16, which NumPy lacks.
_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int8": 1, "uint8": 1}


def _dtype_name(array: Any) -> str:
    if hasattr(array, "data_ptr"):
        return str(array.dtype).removeprefix("torch.")
    return str(np.dtype(array.__cuda_array_interface__["typestr"]))


def _on_device(name: str, array: Any, dtypes: tuple[str, ...], ndim: int | None) -> tuple[int, tuple[int, ...]]:
    """Address and shape of a contiguous array on a device."""
    wanted = f"contiguous {' or '.join(dtypes)} {'[N, ...]' if ndim is None else ['[N]', '[N, K]'][ndim - 1]} on a GPU"
    if hasattr(array, "data_ptr"):
        here, contiguous = bool(array.is_cuda), bool(array.is_contiguous())
        address, shape = int(array.data_ptr()), tuple(int(size) for size in array.shape)
    elif hasattr(array, "__cuda_array_interface__"):
        facts = array.__cuda_array_interface__
        address, shape = int(facts["data"][0]), tuple(int(size) for size in facts["shape"])
        here, strides = True, facts.get("strides")
        item = np.dtype(facts["typestr"]).itemsize
        packed = [item * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        contiguous = strides is None or list(strides) == packed
    else:
        raise InputError(f"{name} must be {wanted}, got {type(array).__name__}; move it there")
    dtype = _dtype_name(array)
    if not here or not contiguous or dtype not in dtypes or not shape or (ndim is not None and len(shape) != ndim):
        place = "on a GPU" if here else "in host memory"
        form = "" if contiguous else ", strided"
        raise InputError(f"{name} must be {wanted}, got {dtype} {list(shape)} {place}{form}; convert it first")
    return address, shape


def _stream(stream: Any) -> int:
    """Handle of a stream: torch's, CuPy's, or the number itself."""
    for name in ("cuda_stream", "ptr"):
        stream = getattr(stream, name, stream)
    return int(stream)
