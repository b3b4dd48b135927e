"""The one door to compiled code: picks the backend once, checks shapes and dtypes, and names what is wrong.

``STAGE1_BACKEND=compiled`` or ``reference`` in the environment forces a backend; otherwise the compiled one is taken
when it is there. Both draw the same resamples and give the same integer sums, bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro import _reference
from stage1_pro.errors import DependencyError, InputError

Backend = Literal["compiled", "reference"]
MAX_ROWS = 2**31 - 1
SUITE = _reference.COLUMNS


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

    Float32 confidence stays float32; everything else becomes float64, so no two values become tied on the way.
    Errors that are all 0 or 1 become uint8 (exact integer arithmetic), other losses float64. Raises InputError for
    other shapes, no rows, NaN (naming the row), and errors outside [0, 1].
    """
    scores = np.ascontiguousarray(confidence)
    if scores.dtype != np.float32:
        scores = _floats("confidence", scores)
    losses = np.ascontiguousarray(error)
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
    return np.ascontiguousarray(values, dtype=np.float64)


def augrc(confidence: ArrayLike, error: ArrayLike) -> float:
    """AUGRC of checked rows: confidence [N], error [N] in [0, 1]."""
    return float(_kernels.augrc(*rows(confidence, error)))


def bootstrap_augrc(
    confidence: ArrayLike,
    error: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    n_replicates: int,
    seed: int = 0,
    threads: int = 0,
) -> NDArray[np.float64]:
    """AUGRC of resampled rows, or of resampled groups with all their rows, [n_replicates].

    The same (seed, replicate) gives the same bits for any number of threads, any row order and either backend.

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
    replicates: NDArray[np.float64] = _kernels.bootstrap_augrc(
        scores, losses, unit, n_units, count_tables([n_units]), n_replicates, seed, _workers(threads, n_replicates)
    )
    return replicates


@dataclass(frozen=True, eq=False)
class Columns:
    """What one model says of N rows, in any order; ``None`` where it is not known.

    ``confidence`` [N] and ``error`` [N] as ``rows`` gives them; ``positive`` and ``missed`` bool [N]: of the positive
    class, and of it but answered otherwise; ``nll`` and ``brier`` float64 [N]; ``threshold``: a row exits iff its
    confidence is at or above it.
    """

    confidence: NDArray[Any]
    error: NDArray[Any]
    positive: NDArray[np.bool_] | None = None
    missed: NDArray[np.bool_] | None = None
    nll: NDArray[np.float64] | None = None
    brier: NDArray[np.float64] | None = None
    threshold: float | None = None

    def kind(self) -> NDArray[np.uint8]:
        """What the row is to the positive class [N], or [0]: 1 of it, 3 of it and missed."""
        if self.positive is None or self.missed is None:
            return np.zeros(0, dtype=np.uint8)
        return (self.positive + 2 * (self.missed & self.positive)).astype(np.uint8)

    def keys(self) -> list[NDArray[Any]]:
        """All that tells rows apart, the most important first."""
        extra = [values for values in (self.kind(), self.nll, self.brier) if values is not None and values.size]
        return [-self.confidence, self.error, *extra]


def bootstrap_suite(
    models: Sequence[Columns],
    *,
    groups: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    coverages: Sequence[float] = (),
    risks: Sequence[float] = (),
    n_replicates: int,
    seed: int = 0,
    threads: int = 0,
) -> list[NDArray[np.float64]]:
    """Every metric of resamples, [n_replicates, 8 + coverages + risks] for each model; columns: ``SUITE``, then these.

    All models see the same resamples (paired). Row order never matters, nor does the number of threads.

    Args:
        models: of the same N rows in the same order.
        groups: [N] clips or tracks to resample whole; None resamples rows.
        strata: [N]; resample rows within each stratum, which keeps its size. Not together with groups.
        coverages: targets of Risk@Coverage.
        risks: targets of Coverage@Risk.
        n_replicates: at least 1.
        seed: 0 to 2**64 - 1.
        threads: 0 = one per processor this process may use.
    """
    _check_resampling(n_replicates, seed, threads)
    if groups is not None and strata is not None:
        raise InputError("groups and strata must not be given together: whole groups cannot keep every stratum's size")
    n = models[0].confidence.size
    unit, sizes = _units(models, n, groups, strata)
    empty = np.zeros(0)
    found = []
    for model in models:
        keys = model.keys() if unit is None else [*model.keys(), unit]
        order, ends = _ranked(keys)
        columns = [np.zeros(0) if values is None else values[order] for values in (model.nll, model.brier)]
        kind = model.kind()
        n_exit = None if model.threshold is None else int(np.count_nonzero(model.confidence >= model.threshold))
        found.append(
            _kernels.bootstrap_suite(
                model.error[order],
                ends,
                np.zeros(0, dtype=np.uint32) if unit is None else unit[order],
                np.asarray(sizes, dtype=np.uint32),
                count_tables(sizes),
                kind[order] if kind.size else kind,
                n_exit,
                *columns,
                np.asarray(coverages, dtype=np.float64) if coverages else empty,
                np.asarray(risks, dtype=np.float64) if risks else empty,
                n_replicates,
                seed,
                _workers(threads, n_replicates),
            )
        )
    return found


def _units(
    models: Sequence[Columns], n: int, groups: ArrayLike | None, strata: ArrayLike | None
) -> tuple[NDArray[np.uint32] | None, list[int]]:
    """Which unit each row is drawn with [N] (None: the rows of the one model in its own order), and strata's sizes."""
    if groups is not None:
        unit = cluster_numbers(groups, n)
        return unit, [int(unit.max()) + 1]
    if strata is None and len(models) == 1:
        return None, [n]
    # Rows are numbered by what they are, not by where they stand, so that row order never matters.
    keys = [key for model in models for key in model.keys()]
    sizes = [n]
    if strata is not None:
        stratum = cluster_numbers(strata, n)
        keys.insert(0, stratum)
        sizes = np.bincount(stratum).tolist()
    unit = np.empty(n, dtype=np.uint32)
    unit[np.lexsort(keys[::-1])] = np.arange(n, dtype=np.uint32)
    return unit, sizes


def _ranked(keys: Sequence[NDArray[Any]]) -> tuple[NDArray[np.intp], NDArray[np.uint32]]:
    """The order of rows by their keys [N], and one past each run of an equal first key [M]."""
    order = np.lexsort(keys[::-1])
    ranked = keys[0][order]
    ends = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]) + 1, ranked.size)
    return order, ends.astype(np.uint32)


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


def _check_resampling(n_replicates: int, seed: int, threads: int) -> None:
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
    return np.unique(names, return_inverse=True)[1].astype(np.uint32)
