"""Intervals on metrics: bootstrap by row or by group, closed forms, and exact binomial bounds. NumPy in, no torch.

Three constructions, by what they are good for:

- ``bca`` (Efron 1987), the default for metrics that are smooth in the weights of the rows; its acceleration comes from
  the influence of every row (or group), in closed form, so no jackknife is run;
- ``percentile``, always used for the stepwise ones (Risk@Coverage, Coverage@Risk);
- ``logit``, the closed-form standard error on the logit scale (the log scale for NLL), without any resample.

Where no resample can help (no error at all, nobody exits) the interval is Clopper and Pearson's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv, expit, logit, ndtr, ndtri

from stage1_pro import native
from stage1_pro.errors import InputError, nearest
from stage1_pro.metrics.probabilistic import (
    ECE_BINS,
    brier_rows,
    calibration_places,
    check_probabilities,
    largest,
    nll_rows,
)

Method = Literal["bca", "percentile", "logit"]
COVERAGES = (0.5, 0.6, 0.7, 0.8, 0.9)
RISKS = (0.01, 0.02, 0.05, 0.1)
# Below this the bootstrap's coverage falls under its level whatever the construction (BCa: .79 at two errors of 200).
FEW_ERRORS = 10
FEW_GROUPS = 10

_COVERAGE, _RISK = "risk_at_coverage_", "coverage_at_risk_"
_EXITS = ("coverage", "exit_error", "fnr_on_exited")
_PROBABILITIES = ("nll", "brier")
# Metrics that are shares lie in [0, top]; NLL has no top.
_TOP = {"augrc": 0.5, "nll": math.inf}


@dataclass(frozen=True)
class Interval:
    """A value with its standard error and interval; NaN where there is none, and then ``note`` says why.

    ``method`` is "bca", "percentile", "logit", "clopper-pearson" or "none". ``note`` is empty or a caution to show with
    the interval. ``replicates`` [B] is what the interval was cut from.
    """

    value: float
    std: float
    low: float
    high: float
    level: float = 0.95
    method: str = "bca"
    note: str = ""
    replicates: NDArray[np.float64] = field(default_factory=lambda: np.empty(0), repr=False, compare=False)


class Intervals(Mapping[str, Interval]):
    """Metrics by name, in a fixed order: ``intervals["augrc"].low``; ``unit`` is what was resampled, rows or groups."""

    def __init__(self, intervals: Mapping[str, Interval], *, n_rows: int, n_units: int, unit: str) -> None:
        self._intervals = dict(intervals)
        self.n_rows, self.n_units, self.unit = n_rows, n_units, unit

    def __getitem__(self, name: str) -> Interval:
        try:
            return self._intervals[name]
        except KeyError:
            raise KeyError(f"{name!r} was not measured{nearest(name, self._intervals)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._intervals)

    def __len__(self) -> int:
        return len(self._intervals)

    def __repr__(self) -> str:
        lines = [
            "; ".join(
                filter(None, [f"  {name:<24}{one.value:>10.5f} [{one.low:.5f}, {one.high:.5f}] {one.method}", one.note])
            )
            for name, one in self.items()
        ]
        return "\n".join([f"Intervals of {self.n_rows} rows, {self.n_units} {self.unit}", *lines])


def bootstrap(
    probs: ArrayLike,
    labels: ArrayLike,
    *,
    confidence: ArrayLike | None = None,
    threshold: float | None = None,
    groups: ArrayLike | None = None,
    metrics: str | Sequence[str] = "all",
    n_replicates: int = 1000,
    level: float = 0.95,
    method: Method = "bca",
    seed: int = 0,
    threads: int = 0,
    positive: int | None = None,
    stratify: bool = False,
) -> Intervals:
    """Every metric of a selective classifier with its interval, from one pass over each resample.

    ``augrc``, ``aurc``, ``risk_at_coverage_C`` for C of .5 to .9, ``coverage_at_risk_R`` for R of .01, .02, .05, .1,
    ``accuracy``, ``nll``, ``brier``; with a threshold also ``coverage``, ``exit_error`` and ``fnr_on_exited``. Any
    other target can be asked for by its name, such as ``risk_at_coverage_0.95``.

    With ``groups`` whole groups are resampled: rows of one clip are near-copies, and intervals that take them for
    independent are far too narrow. The same seed gives the same bits for any number of threads and any row order.

    Stated answers: a metric that is undefined on the rows is NaN and its note says why. No error among the rows that a
    metric speaks of (or nothing but errors, or nobody or everybody exits): Clopper and Pearson's bound over rows, also
    for one row; over groups one counts as wrong when any of its rows is, and where groups differ in size that bounds
    the share of groups, which the share of rows can exceed (the note says so). Otherwise one row or group, replicates
    that are all equal, or no variance: NaN ends. An interval without width says so.

    Args:
        probs: [N, K], rows sum to 1; or [N]: of the second of two classes.
        labels: [N] class indices 0..K-1.
        confidence: [N], higher is surer; the largest probability by default.
        threshold: a row exits iff its confidence is at or above it; both are compared as float64.
        groups: [N] names or numbers of the independent units; None = every row is one.
        metrics: "all", or names.
        n_replicates: resamples.
        level: nominal coverage, in (0, 1).
        method: "bca", "percentile" or "logit"; stepwise metrics take percentiles all the same.
        seed: of the resamples.
        threads: 0 = one per processor.
        positive: index of the positive class, for FNR; of two classes the second one by default.
        stratify: resample within each class, whose size it keeps; not together with groups.

    Raises:
        InputError: an argument is not what it must be; NaN names its row.
    """
    columns, truth = _columns(probs, labels, confidence, threshold, positive)
    return _intervals(
        [columns], groups, truth if stratify else None, metrics, n_replicates, level, method, seed, threads
    )


def bootstrap_errors(
    confidence: ArrayLike,
    error: ArrayLike,
    *,
    threshold: float | None = None,
    groups: ArrayLike | None = None,
    metrics: str | Sequence[str] = "all",
    n_replicates: int = 1000,
    level: float = 0.95,
    method: Method = "bca",
    seed: int = 0,
    threads: int = 0,
) -> Intervals:
    """The part of ``bootstrap`` that needs no probabilities: error [N] is 0/1 or a loss in [0, 1]."""
    columns = native.Columns(*native.rows(confidence, error), threshold=_threshold(threshold))
    return _intervals([columns], groups, None, metrics, n_replicates, level, method, seed, threads)


def compare(
    a: ArrayLike,
    b: ArrayLike,
    labels: ArrayLike,
    *,
    confidence: tuple[ArrayLike | None, ArrayLike | None] = (None, None),
    threshold: float | tuple[float | None, float | None] | None = None,
    groups: ArrayLike | None = None,
    metrics: str | Sequence[str] = "all",
    n_replicates: int = 1000,
    level: float = 0.95,
    method: Method = "bca",
    seed: int = 0,
    threads: int = 0,
    positive: int | None = None,
    stratify: bool = False,
) -> Intervals:
    """Each metric of model ``a`` minus that of model ``b`` on the same rows, with its paired interval.

    Both models are measured on the same resamples, so what the rows have in common cancels. Of AUGRC, AURC, risks, NLL
    and Brier a negative difference speaks for ``a``; of accuracy and coverages a positive one.

    Args:
        a: probabilities [N, K] or [N] of one model.
        b: of the other one.
        labels: [N] class indices.
        confidence: [N] of each model, where it is not the largest probability.
        threshold: of both models, or of each.
        groups: [N] names or numbers of the independent units; None = every row is one.
        metrics: "all", or names.
        n_replicates: resamples.
        level: nominal coverage, in (0, 1).
        method: "bca" or "percentile".
        seed: of the resamples.
        threads: 0 = one per processor.
        positive: index of the positive class, for FNR; of two classes the second one by default.
        stratify: resample within each class, whose size it keeps; not together with groups.

    Raises:
        InputError: as ``bootstrap``.
    """
    if method not in ("bca", "percentile"):
        raise InputError(
            f"method must be bca or percentile for a difference, got '{method}'; a difference has no logit"
        )
    limits = threshold if isinstance(threshold, tuple | list) else (threshold, threshold)
    if len(limits) != 2 or not isinstance(confidence, tuple | list) or len(confidence) != 2:
        raise InputError(
            "confidence and threshold must be pairs, one of each model; threshold may be one number for both"
        )
    if _n_classes(a) != _n_classes(b):
        raise InputError(
            f"a and b must have the same classes, got {_n_classes(a)} and {_n_classes(b)} columns; give both the same"
        )
    pairs = [
        _columns(probs, labels, sure, limit, positive)
        for probs, sure, limit in zip((a, b), confidence, limits, strict=True)
    ]
    if pairs[0][0].confidence.size != pairs[1][0].confidence.size:
        raise InputError("a and b must be of the same rows, got other numbers of them; compare row by row")
    models = [columns for columns, _ in pairs]
    strata = pairs[0][1] if stratify else None
    return _intervals(models, groups, strata, metrics, n_replicates, level, method, seed, threads)


def bootstrap_answers(
    probs: ArrayLike,
    labels: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    n_replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    positive: int | None = None,
) -> Intervals:
    """``balanced_accuracy``, ``mcc``, ``auroc`` and ``ece`` with percentile intervals.

    They are no sums over sorted rows, so they are measured on resampled confusion counts, bins and ranks. The ECE of a
    resample is larger than that of the rows on average, so its interval leans to larger values. What is
    undefined on the rows (AUROC and MCC where only one class is there) is NaN; resamples in which a metric is undefined
    are left out, and the note counts them.

    Args:
        probs: [N, K], rows sum to 1; or [N]: of the second of two classes.
        labels: [N] class indices 0..K-1.
        groups: [N] names or numbers of the independent units; None = every row is one.
        n_replicates: resamples.
        level: nominal coverage, in (0, 1).
        seed: of the resamples.
        positive: index of the class that AUROC holds against the others; of two classes the second one by default,
            and without one AUROC is left out.

    Raises:
        InputError: as ``bootstrap``.
    """
    _check_level(level)
    _, truth = _columns(probs, labels, None, None, positive)
    values = np.asarray(probs, dtype=np.float64)
    values = np.stack([1 - values, values], axis=1) if values.ndim == 1 else values
    n, n_classes = values.shape
    wanted = 1 if positive is None and n_classes == 2 else positive
    score = values[:, 0 if wanted is None else wanted]
    # Rows stand and are numbered by what they are, so that row order never matters; by score first, for AUROC.
    order = np.lexsort((truth, *values.T, score))
    values, truth, score = values[order], truth[order], score[order]
    answered, sure = largest(values)
    unit = None if groups is None else native.cluster_numbers(groups, n)[order]
    n_units = n if unit is None else int(unit.max()) + 1
    place = calibration_places(sure, bins=ECE_BINS)
    # Rows of one truth, answer and bin are one cell: its count is all that the metrics of answers need.
    cells, cell = np.unique((truth * n_classes + answered) * ECE_BINS + place, return_inverse=True)
    cell_truth, cell_answer = np.divmod(cells // ECE_BINS, n_classes)
    bins = np.eye(ECE_BINS)[cells % ECE_BINS]
    classes = np.eye(n_classes)
    starts = np.append(0, np.flatnonzero(score[1:] != score[:-1]) + 1)

    def measure(times: NDArray[np.uint8]) -> list[float]:
        weights = times.astype(np.float64)
        counts = np.bincount(cell, weights, cells.size)
        right = counts * (cell_truth == cell_answer)
        sums = [part @ classes[of] for part, of in ((right, cell_truth), (counts, cell_truth), (counts, cell_answer))]
        apart = np.bincount(place, weights * sure, ECE_BINS) - right @ bins
        found = [*_of_confusion(*sums), float(np.abs(apart).sum() / counts.sum())]
        return found if wanted is None else [*found, _auroc_of_counts(times, starts, truth == wanted)]

    names = ["balanced_accuracy", "mcc", "ece", "auroc"][: 3 if wanted is None else 4]
    value = measure(np.ones(n, dtype=np.uint8))
    replicates = np.empty((n_replicates, len(names)))
    for replicate in range(n_replicates):
        times = native.resample_counts([n_units], 1, first=replicate, seed=seed)[0]
        replicates[replicate] = measure(times if unit is None else times[unit])
    kind = "rows" if groups is None else "groups"
    found = {
        name: _Measured(name, value[k], replicates[:, k], None, None, n_units, scale=max(abs(value[k]), 1e-3)).interval(
            level, "percentile", kind
        )
        for k, name in enumerate(names)
    }
    return Intervals(
        {name: found[name] for name in ("balanced_accuracy", "mcc", "auroc", "ece") if name in found},
        n_rows=n,
        n_units=n_units,
        unit=kind,
    )


def _of_confusion(
    right: NDArray[np.float64], true: NDArray[np.float64], given: NDArray[np.float64]
) -> tuple[float, float]:
    """Balanced accuracy and MCC from right answers, rows and answers of each class [K]; MCC of one class is NaN."""
    there, n = true > 0, true.sum()
    balanced = float(np.mean(right[there] / true[there]))
    spread = (n * n - true @ true) * (n * n - given @ given)
    correlation = float((right.sum() * n - true @ given) / math.sqrt(spread)) if spread > 0 else 0.0
    return balanced, correlation if there.sum() > 1 else math.nan


def _auroc_of_counts(times: NDArray[np.uint8], starts: NDArray[np.intp], positive: NDArray[np.bool_]) -> float:
    """AUROC of rows in ascending order of score, counted ``times`` [N]; tie groups begin at ``starts``."""
    positives, rows = (times * positive).astype(np.int64), times.astype(np.int64)
    if starts.size < times.size:
        positives, rows = (np.add.reduceat(each, starts) for each in (positives, rows))
    negatives = rows - positives
    through = np.cumsum(negatives)
    # A positive is above the negatives before its tie group, and half above those in it.
    above = int((positives * (2 * through - negatives)).sum())
    pairs = 2 * int(positives.sum()) * int(through[-1])
    return above / pairs if pairs else math.nan


def bootstrap_augrc(
    confidence: ArrayLike,
    error: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    n_replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    threads: int = 0,
    method: Method = "bca",
) -> Interval:
    """AUGRC with its interval: ``bootstrap_errors`` for this metric alone, the fastest there is.

    Where fewer than one row in 256 is wrong and there are no groups, runs of right and wrong rows are resampled as
    cells: other resamples than those of the whole suite, from the same law.

    Args:
        confidence: [N], higher is surer.
        error: [N], 0/1 or a loss in [0, 1].
        groups: [N] names or numbers of the independent units; None = every row is one.
        n_replicates: resamples.
        level: nominal coverage, in (0, 1).
        seed: of the resamples.
        threads: 0 = one per processor.
        method: "bca", "percentile" or "logit".

    Raises:
        InputError: as ``augrc``, and for arguments out of range.
    """
    return bootstrap_errors(
        confidence,
        error,
        groups=groups,
        metrics=["augrc"],
        n_replicates=n_replicates,
        level=level,
        seed=seed,
        threads=threads,
        method=method,
    )["augrc"]


def percentile_interval(
    value: float, replicates: NDArray[np.float64], *, level: float = 0.95, n_units: int, unit: str = "groups"
) -> Interval:
    """The percentile interval of any statistic from its own resamples [B]; those that are NaN are left out and counted.

    No ends where there is one unit only or all resamples are equal, as everywhere in this module.

    Args:
        value: the statistic of the rows themselves.
        replicates: [B] of the resamples.
        level: nominal coverage, in (0, 1).
        n_units: how many independent units were resampled.
        unit: what they are, ``rows`` or ``groups``.
    """
    _check_level(level)
    scale = max(abs(value), float(np.nanmax(np.abs(replicates), initial=0.0)))
    # Its name is only shown where the value is NaN.
    measured = _Measured("mcc", value, replicates, None, None, n_units, difference=True, scale=scale)
    return measured.interval(level, "percentile", unit)


def clopper_pearson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval of a share of ``k`` in ``n`` independent trials; n = 0 gives (0, 1)."""
    _check_level(level)
    tail = (1 + level) / 2
    return clopper_pearson_lower(k, n, tail), clopper_pearson_upper(k, n, tail)


def clopper_pearson_upper(k: int, n: int, level: float = 0.95) -> float:
    """The exact one-sided upper bound of a share of ``k`` in ``n`` independent trials, in [0, 1]; n = 0 gives 1."""
    _check_counts(k, n, level)
    return 1.0 if k == n else float(betaincinv(k + 1, n - k, level))


def clopper_pearson_lower(k: int, n: int, level: float = 0.95) -> float:
    """The exact one-sided lower bound of a share of ``k`` in ``n`` independent trials, in [0, 1]; n = 0 gives 0."""
    _check_counts(k, n, level)
    return 0.0 if k == 0 else float(betaincinv(k, n - k + 1, 1 - level))


# ---------------------------------------------------------------------------------------------- what is measured


def _n_classes(probs: ArrayLike) -> int:
    values = np.asarray(probs)
    return 2 if values.ndim == 1 else values.shape[-1]


def _columns(
    probs: ArrayLike, labels: ArrayLike, confidence: ArrayLike | None, threshold: float | None, positive: int | None
) -> tuple[native.Columns, NDArray[np.int64]]:
    """Rows of one model from probabilities, and the labels."""
    values = np.asarray(probs)
    if values.ndim == 1 and values.dtype.kind in "biuf":
        values = np.stack([1 - values, values], axis=1)
    values, truth = check_probabilities(values, labels)
    n_classes = values.shape[1]
    if positive is not None and (not isinstance(positive, int | np.integer) or not 0 <= positive < n_classes):
        raise InputError(f"positive must be a class index 0 to {n_classes - 1}, got {positive}; number it by columns")
    answered, highest = largest(values)
    sure = highest if confidence is None else confidence
    scores, errors = native.rows(sure, answered != truth)
    wanted = 1 if positive is None and n_classes == 2 else positive
    is_positive = None if wanted is None else truth == wanted
    return native.Columns(
        scores,
        errors,
        positive=is_positive,
        missed=None if is_positive is None else is_positive & (answered != wanted),
        nll=nll_rows(values, truth),
        brier=brier_rows(values, truth),
        brier_top=1.0 if n_classes == 2 else 2.0,
        threshold=_threshold(threshold),
    ), truth


def _threshold(threshold: float | None) -> float | None:
    if threshold is None:
        return None
    if not isinstance(threshold, int | float | np.number) or math.isnan(float(threshold)):
        shown = "NaN" if isinstance(threshold, float) else repr(threshold)
        raise InputError(f"threshold must be a number, got {shown}; leave it out to measure no exits")
    return float(threshold)


def metric_names(*, probabilities: bool = True, exits: bool = True, fnr: bool = True) -> list[str]:
    """Names of all metrics in their order; without probabilities, exits or a positive class some cannot be measured."""
    names = ["augrc", "aurc", *(f"{_COVERAGE}{share:g}" for share in COVERAGES)]
    names += [*(f"{_RISK}{limit:g}" for limit in RISKS), "accuracy"]
    if probabilities:
        names += _PROBABILITIES
    if exits:
        names += _EXITS if fnr else _EXITS[:2]
    return names


def _wanted(metrics: str | Sequence[str], columns: native.Columns) -> list[str]:
    """The names asked for, checked against what these columns can give."""
    known = metric_names(
        probabilities=columns.nll is not None, exits=columns.threshold is not None, fnr=columns.positive is not None
    )
    if isinstance(metrics, str):
        if metrics == "all":
            return known
        metrics = [metrics]
    metrics = [str(name) for name in metrics]
    if not metrics:
        raise InputError('metrics must name at least one metric, got none; "all" measures every one')
    for name in metrics:
        if name in known or _target(name) is not None:
            continue
        missing = "a threshold" if name in _EXITS and columns.threshold is None else None
        if name == "fnr_on_exited" and columns.threshold is not None:
            missing = "the positive class"
        if name in _PROBABILITIES:
            missing = "probabilities"
        hint = f"; it needs {missing}" if missing else nearest(name, known)
        raise InputError(f"metrics must be all or names such as augrc, got '{name}'{hint}")
    return list(dict.fromkeys(metrics))


def _target(name: str) -> float | None:
    """The coverage or risk in a metric's name; None when it has none."""
    for prefix, low in ((_COVERAGE, 0.0), (_RISK, -1.0)):
        text = name.removeprefix(prefix)
        if text != name and re.fullmatch(r"(\d+\.?\d*|\.\d+)(e-?\d+)?", text):
            return float(text) if low < float(text) <= 1 else None
    return None


def _intervals(
    models: Sequence[native.Columns],
    groups: ArrayLike | None,
    strata: ArrayLike | None,
    metrics: str | Sequence[str],
    n_replicates: int,
    level: float,
    method: Method,
    seed: int,
    threads: int,
) -> Intervals:
    """Intervals of one model's metrics, or of the difference of two."""
    _check_level(level)
    if method not in ("bca", "percentile", "logit"):
        raise InputError(f"method must be bca, percentile or logit, got '{method}'; bca is the usual one")
    names = _wanted(metrics, models[0])
    n = models[0].confidence.size
    if names == ["augrc"] and len(models) == 1 and strata is None:
        return _augrc_interval(models[0], groups, n_replicates, level, method, seed, threads)
    coverages = [_target(name) or 0.0 for name in names if name.startswith(_COVERAGE)]
    risks = [_target(name) or 0.0 for name in names if name.startswith(_RISK)]
    if not set(names) & set(_PROBABILITIES):
        models = [replace(model, nll=None, brier=None) for model in models]
    suite = native.Suite(models, groups=groups, strata=strata, coverages=coverages, risks=risks)
    columns = [*native.SUITE]
    columns += [f"{_COVERAGE}{share!r}" for share in coverages] + [f"{_RISK}{limit!r}" for limit in risks]
    place = {}
    for name in names:
        prefix = _COVERAGE if name.startswith(_COVERAGE) else _RISK
        place[name] = columns.index(name if name in native.SUITE else f"{prefix}{_target(name)!r}")
    stepwise = [name for name in names if _target(name) is not None]
    values = suite.values()
    drawn = [np.empty((0, len(columns)))] * len(models)
    if method != "logit" or stepwise:
        drawn = suite.resample(n_replicates, seed=seed, threads=threads)
    unit = "rows" if groups is None else "groups"
    found = {}
    for name in names:
        measured = [
            _Measured.of(name, ranked, value[place[name]], replicates[:, place[name]], suite.sizes)
            for ranked, value, replicates in zip(suite.models, values, drawn, strict=True)
        ]
        if name == "brier":
            measured = [replace(one, top=models[0].brier_top) for one in measured]
        one = measured[0] if len(measured) == 1 else measured[0].minus(measured[1])
        found[name] = one.interval(level, "percentile" if name in stepwise else method, unit)
    return Intervals(found, n_rows=n, n_units=suite.n_units, unit=unit)


def _augrc_interval(
    columns: native.Columns,
    groups: ArrayLike | None,
    n_replicates: int,
    level: float,
    method: Method,
    seed: int,
    threads: int,
) -> Intervals:
    """AUGRC alone: the kernel sorts packed keys and brings value and moments along."""
    losses = columns.error
    drawn = native.bootstrap_augrc(
        columns.confidence,
        losses,
        groups,
        n_replicates=1 if method == "logit" else n_replicates,
        seed=seed,
        threads=threads,
    )
    cluster = None if groups is None else native.cluster_numbers(groups, losses.size)
    n_units = losses.size if cluster is None else int(cluster.max()) + 1
    unit = "rows" if groups is None else "groups"
    measured = _Measured(
        "augrc",
        drawn.value,
        drawn.replicates if method != "logit" else np.empty(0),
        (drawn.second, drawn.third),
        _Events.among(losses, cluster, None),
        n_units,
        top=_TOP["augrc"],
        scale=drawn.value,
    )
    return Intervals({"augrc": measured.interval(level, method, unit)}, n_rows=losses.size, n_units=n_units, unit=unit)


# ---------------------------------------------------------------------------------------------- from replicates to ends


@dataclass(frozen=True)
class _Events:
    """How many independent units hold an event that a metric counts, of how many it speaks of.

    ``all`` says that every row is one, for a bound from the other side; ``uneven`` that units hold unlike numbers of
    the rows that the metric speaks of.
    """

    wrong: int
    units: int
    none: bool
    all: bool
    uneven: bool = False

    @classmethod
    def among(
        cls, hit: NDArray[Any], unit: NDArray[np.uint32] | None, rows: NDArray[np.bool_] | slice | None
    ) -> _Events:
        """Count hits [N] (0/1, or losses) among some rows by row, or by the unit [N] they belong to."""
        if rows is not None:
            hit, unit = hit[rows], None if unit is None else unit[rows]
        if unit is None:
            return cls(int(np.count_nonzero(hit)), hit.size, not hit.any(), bool(hit.size and hit.min() == 1))
        wrong, (names, rows_of) = np.unique(unit[hit > 0]).size, np.unique(unit, return_counts=True)
        uneven = bool(names.size and rows_of.min() != rows_of.max())
        return cls(wrong, names.size, not hit.any(), bool(hit.size and hit.min() == 1), uneven)


@dataclass(frozen=True)
class _Measured:
    """One metric of the rows and of their resamples, and what its interval can be made from.

    ``moments``: sums of squares and cubes of the units' influences; None for stepwise metrics. ``events``: what it
    counts; None for means of other things. ``influence`` [units], for differences. The metric lies in [0, ``top``];
    ``scale`` is what its rounding is relative to.
    """

    name: str
    value: float
    replicates: NDArray[np.float64]
    moments: tuple[float, float] | None
    events: _Events | None
    n_units: int
    influence: NDArray[np.float64] | None = None
    difference: bool = False
    top: float = 1.0
    scale: float = 0.0

    @classmethod
    def of(
        cls, name: str, ranked: native.Ranked, value: float, replicates: NDArray[np.float64], sizes: Sequence[int]
    ) -> _Measured:
        n_units = sum(sizes)
        unit = ranked.unit if ranked.unit.size else None
        influence, rows, hit = _influence(name, ranked, value)
        if influence is not None and unit is not None:
            influence = np.bincount(unit, influence, n_units).astype(np.float64)
        if influence is not None and len(sizes) > 1:
            # A stratum keeps its size, so only what differs within it varies.
            means = np.add.reduceat(influence, np.cumsum([0, *sizes[:-1]])) / sizes
            influence = influence - np.repeat(means, sizes)
        moments = None if influence is None else _moments(influence)
        grouped = unit if unit is not None and n_units < unit.size else None
        events = None if hit is None else _Events.among(hit, grouped, rows)
        top = _TOP.get(name, 1.0)
        return cls(name, float(value), replicates, moments, events, n_units, influence, top=top, scale=abs(value))

    def minus(self, other: _Measured) -> _Measured:
        moments = None
        if self.influence is not None and other.influence is not None:
            influence = self.influence - other.influence
            moments = _moments(influence)
        events = None
        if self.events is not None and other.events is not None:
            events = min(self.events, other.events, key=lambda one: one.wrong)
        return _Measured(
            self.name,
            self.value - other.value,
            self.replicates - other.replicates,
            moments,
            events,
            self.n_units,
            difference=True,
            scale=self.scale + other.scale,
        )

    def interval(self, level: float, method: str, unit: str) -> Interval:
        nan = math.nan
        if math.isnan(self.value):
            return Interval(nan, nan, nan, nan, level, "none", f"undefined: {_UNDEFINED[self.name]}", self.replicates)
        if not self.difference and self.events is not None and (self.events.none or self.events.all):
            bound = self._bound(self.events, level, unit)
            if bound is not None:
                return bound
        defined = self.replicates[~np.isnan(self.replicates)]
        std = float(defined.std(ddof=1)) if defined.size > 1 else nan
        # Sums in another order differ by so much; what is closer is the same number.
        close = 1e-11 * self.scale
        reason = ""
        if self.n_units == 1:
            reason = f"1 {unit[:-1]} cannot be resampled"
        elif method == "logit":
            if self.moments is None or math.sqrt(self.moments[0]) <= close or not 0 < self.value < self.top:
                reason = "its standard error is 0"
        elif defined.size == 0 or defined.max() - defined.min() <= close:
            reason = "all replicates are equal" if defined.size else "it is undefined in every resample"
        if reason:
            return Interval(self.value, nan, nan, nan, level, "none", f"no interval: {reason}", self.replicates)
        notes = [self._caution(unit)]
        if defined.size < self.replicates.size:
            notes.append(f"undefined in {self.replicates.size - defined.size} of {self.replicates.size} resamples")
        note = "; ".join(filter(None, notes))
        if method == "logit":
            assert self.moments is not None
            # The sum of squares takes the units' mean as known; a factor mends that where they are few.
            error = math.sqrt(self.moments[0] * self.n_units / (self.n_units - 1))
            low, high = _on_logit_scale(self.value, error, level, self.top)
            return Interval(self.value, error, low, high, level, method, note, self.replicates)
        tails = (1 - level) / 2, (1 + level) / 2
        if method == "bca" and self.moments is not None:
            tails = _bca_tails(self.value, defined, self.moments, tails, close)
        else:
            method = "percentile"
        low, high = np.quantile(defined, tails)
        if high - low <= close:
            # Replicates differ, but most pile up on one value, such as a coverage of 1.
            share = np.count_nonzero(np.abs(defined - low) <= close) / defined.size
            note = "; ".join(filter(None, [note, f"no width: {share:.1%} of the resamples give this value"]))
        return Interval(self.value, std, float(low), float(high), level, method, note, self.replicates)

    def _bound(self, events: _Events, level: float, unit: str) -> Interval | None:
        """From Clopper and Pearson's interval of the share that the absence (or ubiquity) of events allows."""
        if events.units == 0:
            return None
        lowest, highest = clopper_pearson(0 if events.none else events.units, events.units, level)
        low, high = _BOUNDS.get(self.name, _share_bounds)(lowest, highest)
        target = _target(self.name)
        if self.name.startswith(_RISK):
            assert target is not None
            # All errors could be at the top; only a share below the limit is met there too.
            low, high = (1.0 if highest <= target else 0.0, 1.0) if events.none else (0.0, 0.0)
            if high == 0:
                return None
        what = "no" if events.none else "nothing but"
        note = f"{what} {_EVENTS.get(self.name, 'errors')} in {_count(events.units, unit)}: "
        note += "Clopper-Pearson, not a bootstrap"
        if events.uneven:
            note += "; groups of unlike size, so it bounds the share of groups"
        return Interval(self.value, math.nan, low, high, level, "clopper-pearson", note, self.replicates)

    def _caution(self, unit: str) -> str:
        notes = []
        if self.events is not None and self.events.wrong < FEW_ERRORS:
            one = self.events.wrong == 1
            notes.append(
                f"only {self.events.wrong} {unit[:-1] if one else unit} with {_EVENTS.get(self.name, 'errors')}"
            )
        if unit == "groups" and self.n_units < FEW_GROUPS:
            notes.append(f"only {self.n_units} groups")
        return f"{' and '.join(notes)}: the interval covers less often than its level" if notes else ""


def _count(n: int, unit: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{n} {unit[:-1] if n == 1 else unit}"


def _moments(influence: NDArray[np.float64]) -> tuple[float, float]:
    # No array in between: new memory costs more than the sums.
    squares, cubes = np.einsum("i,i->", influence, influence), np.einsum("i,i,i->", influence, influence, influence)
    return float(squares), float(cubes)


def _share_bounds(low: float, high: float) -> tuple[float, float]:
    return low, high


# What an error rate between two bounds allows, whatever the order of the rows.
_BOUNDS: dict[str, Callable[[float, float], tuple[float, float]]] = {
    "augrc": lambda low, high: (low**2 / 2, high - high**2 / 2),
    "aurc": lambda low, high: (
        low + (1 - low) * math.log1p(-low) if low < 1 else 1.0,
        high * (1 - math.log(high)) if high > 0 else 0.0,
    ),
    "accuracy": lambda low, high: (1 - high, 1 - low),
}
_EVENTS = {"coverage": "exits", "exit_error": "wrong exits", "fnr_on_exited": "missed positives"}
_UNDEFINED = {
    "exit_error": "no row exits",
    "fnr_on_exited": "no positive row exits",
    "mcc": "only one class is there",
    "auroc": "only one class is there",
}


def _influence(
    name: str, ranked: native.Ranked, value: float
) -> tuple[NDArray[np.float64] | None, NDArray[np.bool_] | slice | None, NDArray[Any] | None]:
    """Derivative of a metric along each sorted row's weight [N], the rows it speaks of, and what it counts [N].

    The derivative is None for stepwise metrics, the count for means of other things than events.
    """
    error = ranked.error
    n = error.size
    if name == "accuracy":
        return (1 - error - value) / n, None, error
    if name == "nll":
        return (ranked.nll - value) / n, None, None
    if name == "brier":
        return (ranked.brier - value) / n, None, None
    if name == "augrc":
        return native.augrc_influence(ranked), None, error
    if name == "aurc":
        return _aurc_influence(ranked, value), None, error
    if name.startswith(_COVERAGE):
        # The rows accepted at the point that is reported.
        reached = np.searchsorted(ranked.ends, (_target(name) or 0.0) * n * (1 - 1e-12), side="left")
        return None, slice(0, int(ranked.ends[reached])), error
    if name.startswith(_RISK):
        return None, None, error
    exits = ranked.n_exit or 0
    influence = np.zeros(n)
    if name == "coverage":
        influence[:exits] = 1 / n
        influence -= value / n
        return influence, None, np.arange(n) < exits
    if name == "exit_error":
        influence[:exits] = (error[:exits] - value) / max(exits, 1)
        return influence, slice(0, exits), error
    among, missed = (ranked.kind & 1) > 0, (ranked.kind & 2) > 0
    among[exits:] = False
    influence[:exits] = among[:exits] * (missed[:exits] - value) / max(int(among.sum()), 1)
    return influence, among, missed


def _aurc_influence(ranked: native.Ranked, value: float) -> NDArray[np.float64]:
    """Derivative of AURC along each sorted row's weight [N].

    With risk ρ_g = E_g / C_g at the end of tie group g and trapezoid weights v_g, n·AURC is Σ v_g ρ_g. A row of group h
    widens that group's step, and moves every risk from h on by (r − ρ_g) / C_g.
    """
    # In place where it can be: new memory costs more than the arithmetic.
    ends = ranked.ends.astype(np.float64)
    repeats = np.diff(ranked.ends, prepend=np.uint32(0))
    weight = repeats / 2
    first = float(weight[0])
    weight[:-1] += weight[1:].copy()
    weight[0] += first
    risk = np.cumsum(ranked.error, dtype=np.float64)[ranked.ends - np.uint32(1)]
    risk /= ends
    steps = risk.copy()
    steps[1:] += risk[:-1]
    steps[0] *= 2
    steps /= 2
    np.divide(weight, ends, out=weight)
    slope = np.cumsum(weight[::-1])[::-1]
    weight *= risk
    steps -= np.cumsum(weight[::-1])[::-1]
    steps -= value
    if repeats.size < ranked.error.size:
        steps, slope = np.repeat(steps, repeats), np.repeat(slope, repeats)
    influence = ranked.error * slope
    influence += steps
    influence /= ranked.error.size
    return influence


def _on_logit_scale(value: float, error: float, level: float, top: float) -> tuple[float, float]:
    """A normal interval on the logit scale of [0, top], or the log scale where there is no top."""
    reach = float(ndtri((1 + level) / 2))
    if math.isinf(top):
        step = math.exp(reach * error / value)
        return value / step, value * step
    share = value / top
    center, width = float(logit(share)), reach * error / top / (share * (1 - share))
    return top * float(expit(center - width)), top * float(expit(center + width))


def _bca_tails(
    value: float,
    replicates: NDArray[np.float64],
    moments: tuple[float, float],
    tails: tuple[float, float],
    close: float,
) -> tuple[float, float]:
    """Shift the two tail probabilities for bias and skewness (Efron 1987); what is within ``close`` is a tie."""
    n = replicates.size
    below = (np.count_nonzero(replicates < value - close) + np.count_nonzero(replicates <= value + close)) / (2 * n)
    # A value outside all its replicates has no finite normal score; half a replicate is as far as they can tell.
    bias = float(ndtri(min(max(below, 0.5 / n), 1 - 0.5 / n)))
    second, third = moments
    acceleration = third / (6 * second**1.5) if second > 0 else 0.0

    def shift(tail: float) -> float:
        score = bias + float(ndtri(tail))
        scale = 1 - acceleration * score
        return float(ndtr(bias + score / scale)) if scale > 0 else float(score > 0)

    return shift(tails[0]), shift(tails[1])


def _check_level(level: float) -> None:
    if not isinstance(level, int | float | np.number) or not 0 < level < 1:
        raise InputError(f"level must be in (0, 1), got {level}; 0.95 is usual")


def _check_counts(k: int, n: int, level: float) -> None:
    _check_level(level)
    if not 0 <= k <= n or math.isnan(k):
        raise InputError(f"k must be from 0 to n, got k = {k}, n = {n}; k counts among the n trials")
