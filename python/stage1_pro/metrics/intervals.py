"""Intervals on the metrics of a selective classifier, from resamples of rows or groups. NumPy in, no torch.

``table`` says what each metric is, ``estimate`` how an interval is cut from its resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, Unpack, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro import native
from stage1_pro.arguments import array, flag, floats, number, shown, whole
from stage1_pro.errors import InputError, nearest
from stage1_pro.metrics.binomial import check_level
from stage1_pro.metrics.estimate import Estimate, Events, Interval, Sizes, unit_of
from stage1_pro.metrics.probabilistic import AnswerRows, Resampled, brier_rows, check_probabilities, largest, nll_rows
from stage1_pro.metrics.selective import check_weights
from stage1_pro.metrics.table import METRICS, Need, lookup, means, names
from stage1_pro.metrics.thresholds import Walk
from stage1_pro.notebook import Shown

Method = Literal["bca", "percentile", "logit"]
_NEEDED = {"probabilities": "probabilities", "threshold": "a threshold", "positive": "the positive class"}


class HowOptions(TypedDict, total=False):
    """Fields of ``How`` as keywords."""

    n_replicates: int
    level: float
    method: Method
    seed: int
    threads: int


@dataclass(frozen=True)
class How:
    """How intervals are made.

    ``n_replicates`` resamples; ``level``, the nominal coverage, in (0, 1); ``method`` "bca", "percentile" or "logit"
    (risk at coverage and coverage at risk are "exact", or "by group", all the same); ``seed`` of the resamples;
    ``threads``, 0 = one per processor.

    Raises:
        InputError: a level or method that is none.
    """

    n_replicates: int = 1000
    level: float = 0.95
    method: Method = "bca"
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        check_level(self.level)
        if not isinstance(self.method, str) or self.method not in get_args(Method):
            raise InputError(f"method must be bca, percentile or logit, got {shown(self.method)}; bca is the usual one")


class Intervals(Shown, dict[str, Interval]):
    """Metrics by name, in a fixed order: ``intervals["augrc"].low``; ``unit`` is what was resampled, rows or groups."""

    def __init__(self, intervals: Mapping[str, Interval], *, n_rows: int, n_units: int) -> None:
        super().__init__(intervals)
        self.n_rows, self.n_units, self.unit = n_rows, n_units, unit_of(n_rows, n_units)

    def _fields(self) -> dict[str, Any]:
        return dict(self)

    def _table(self) -> tuple[dict[str, Sequence[Any]], dict[str, Any]]:
        rows = [one._fields() for one in self.values()]
        columns: dict[str, Sequence[Any]] = {"metric": list(self)}
        columns |= {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
        return columns, {"rows": self.n_rows, "unit": self.unit, "units": self.n_units}

    def __missing__(self, name: str) -> Interval:
        raise KeyError(f"{name!r} was not measured{nearest(name, self)}")

    def __repr__(self) -> str:
        lines = [f"Intervals of {self.n_rows} rows, {self.n_units} {self.unit}"]
        for name, one in self.items():
            ends = f"[{one.low:.5f}, {one.high:.5f}] {one.method}{'; ' if one.note else ''}{one.note}"
            lines.append(f"  {name:<24}{one.value:>10.5f} {ends}")
        return "\n".join(lines)


def bootstrap(
    probs: ArrayLike,
    labels: ArrayLike,
    *,
    confidence: ArrayLike | None = None,
    threshold: float | None = None,
    groups: ArrayLike | None = None,
    metrics: str | Sequence[str] = "all",
    positive: int | None = None,
    stratify: bool = False,
    weights: ArrayLike | None = None,
    **how: Unpack[HowOptions],
) -> Intervals:
    """Every metric of a selective classifier with its interval, from one pass over each resample.

    ``augrc``, ``aurc``, ``risk_at_coverage_C`` for C of .5 to .9, ``coverage_at_risk_R`` for R of .01, .02, .05, .1,
    ``accuracy``, ``nll``, ``brier``; with a threshold also ``coverage``, ``exit_error`` and ``fnr_on_exited``. Any
    other target can be asked for by its name, such as ``risk_at_coverage_0.95``.

    With ``groups`` whole groups are resampled: rows of one clip are near-copies, and intervals that take them for
    independent are far too narrow. The same seed gives the same bits for any number of threads and any row order.

    Stated answers: a metric that is undefined on the rows is NaN and its note says why. No error among the rows that a
    metric speaks of (or nothing but errors, or nobody or everybody exits): Clopper and Pearson's bound over rows, also
    for one row; over groups one counts as wrong when any of its rows is, and where groups differ in size by their
    effective number: larger groups that were not drawn could hold more (the note says so). Risk at coverage and
    coverage at risk have exact ends that hold for all thresholds at once, 0 where too few rows are accepted to certify
    any coverage; by groups they are not exact: groups count by an effective number that is estimated. Otherwise one row
    or group, replicates that are all equal, or no variance: NaN ends. An interval without width says so.

    With ``weights`` a row counts by its weight in every metric, as that many copies would, and is drawn as one row all
    the same: what is measured is another mix of rows (a prior, a stratified sample), whose intervals are wider. Equal
    weights change no bit. Resamples are then measured in NumPy, which takes longer.

    Args:
        probs: [N, K], rows sum to 1; or [N]: of the second of two classes.
        labels: [N] class indices 0..K-1.
        confidence: [N], higher is surer; the largest probability by default.
        threshold: a row exits iff its confidence is at or above it; both are compared as float64.
        groups: [N] names or numbers of the independent units; None = every row is one.
        metrics: "all", or names.
        positive: index of the positive class, for FNR; of two classes the second one by default.
        stratify: resample within each class, whose size it keeps; not together with groups.
        weights: [N], finite and not negative; 0 leaves a row out, their sum does not matter. Known, not estimated.
        **how: fields of ``How``: ``n_replicates``, ``level``, ``method``, ``seed``, ``threads``.

    Raises:
        InputError: an argument is not what it must be; NaN names its row.
    """
    columns, truth = _columns(probs, labels, confidence, threshold, positive, metrics)
    columns = _with_weights(columns, weights)
    return _intervals([columns], groups, truth if flag("stratify", stratify) else None, metrics, How(**how))


def bootstrap_errors(
    confidence: ArrayLike,
    error: ArrayLike,
    *,
    threshold: float | None = None,
    groups: ArrayLike | None = None,
    metrics: str | Sequence[str] = "all",
    weights: ArrayLike | None = None,
    **how: Unpack[HowOptions],
) -> Intervals:
    """The part of ``bootstrap`` that needs no probabilities: error [N] is 0/1 or a loss in [0, 1]."""
    columns = native.Columns(*native.rows(confidence, error), threshold=_threshold(threshold))
    return _intervals([_with_weights(columns, weights)], groups, None, metrics, How(**how))


def compare(
    a: ArrayLike,
    b: ArrayLike,
    labels: ArrayLike,
    *,
    confidence: tuple[ArrayLike | None, ArrayLike | None] = (None, None),
    threshold: float | tuple[float | None, float | None] | None = None,
    groups: ArrayLike | None = None,
    metrics: str | Sequence[str] = "all",
    positive: int | None = None,
    stratify: bool = False,
    **how: Unpack[HowOptions],
) -> Intervals:
    """Each metric of model ``a`` minus that of model ``b`` on the same rows, with its paired interval.

    Both models are measured on the same resamples, so what the rows have in common cancels. Of AUGRC, AURC, risks, NLL
    and Brier a negative difference speaks for ``a``; of accuracy and coverages a positive one. By groups the default is
    Student's t: a resample of the few groups in which two models differ knows no tails. The note counts these.

    ``a`` and ``b`` are probabilities [N, K] or [N]; ``confidence`` is a pair and ``threshold`` may be one, where models
    have their own. All else is as in ``bootstrap``, but for the method "logit", which no difference has.

    Raises:
        InputError: as ``bootstrap``.
    """
    done = How(**how)
    if done.method == "logit":
        raise InputError("method must be bca or percentile for a difference, got 'logit'; a difference has no logit")
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
        _columns(probs, labels, sure, limit, positive, metrics)
        for probs, sure, limit in zip((a, b), confidence, limits, strict=True)
    ]
    if pairs[0][0].confidence.size != pairs[1][0].confidence.size:
        raise InputError("a and b must be of the same rows, got other numbers of them; compare row by row")
    models = [columns for columns, _ in pairs]
    strata = pairs[0][1] if flag("stratify", stratify) else None
    return _intervals(models, groups, strata, metrics, done)


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
    """``balanced_accuracy``, ``mcc``, ``auroc`` (percentiles) and ``ece`` (by bin): every metric of kind "answers".

    They are no sums over sorted rows, so they are measured on resampled confusion counts, bins and ranks. Chance makes
    an ECE larger, never smaller: its lower end is the value less what the bins of resamples stray by in all, 0 for
    nearly every calibrated model. What is undefined on the rows (AUROC and MCC where only one class is there) is NaN;
    resamples in which a metric is undefined are left out, and the note counts them.

    Arguments are as in ``bootstrap``; ``positive`` is the class that AUROC holds against the others, of two classes the
    second one by default, and without one AUROC is left out.

    Raises:
        InputError: as ``bootstrap``.
    """
    check_level(level)
    whole("n_replicates", n_replicates, 1, 10**9)
    _, truth = _columns(probs, labels, None, None, positive)
    values = floats("probs", probs)
    values = np.stack([1 - values, values], axis=1) if values.ndim == 1 else values
    n, n_classes = values.shape
    rows = AnswerRows(values, truth, 1 if positive is None and n_classes == 2 else positive)
    unit = None if groups is None else native.cluster_numbers(groups, n)[rows.order]
    n_units = n if unit is None else int(unit.max()) + 1
    specs = [METRICS[name] for name in names("answers", without=("positive",) if rows.positive is None else ())]

    unchanged = Resampled(rows, np.ones(n, dtype=np.uint8))
    replicates = np.empty((n_replicates, len(specs)))
    strays = {spec.name: np.empty(n_replicates) for spec in specs if spec.strays is not None}
    for replicate in range(n_replicates):
        times = native.resample_counts([n_units], 1, first=replicate, seed=seed)[0]
        resampled = Resampled(rows, times if unit is None else times[unit])
        for i, spec in enumerate(specs):
            replicates[replicate, i] = spec.of(resampled) if spec.of is not None else math.nan
            if spec.strays is not None:
                strays[spec.name][replicate] = spec.strays(resampled, unchanged)
    kind = unit_of(n, n_units)
    measured = {}
    sizes = Sizes(n_units, n_units) if unit is None else Sizes.of(unit)
    for spec, drawn in zip(specs, replicates.T, strict=True):
        value = math.nan if spec.of is None else spec.of(unchanged)
        estimate = Estimate(spec, value, drawn, n_units, scale=max(abs(value), 1e-3), sizes=sizes)
        if spec.name in strays:
            wrong = Events.among(rows.answered != rows.truth, unit)
            apart = unchanged.ece_reach(level, unit)
            estimate = replace(estimate, strays=strays[spec.name], events=wrong, apart=apart)
        measured[spec.name] = estimate.interval(level, "percentile", kind)
    return Intervals(measured, n_rows=n, n_units=n_units)


def bootstrap_augrc(
    confidence: ArrayLike, error: ArrayLike, *, groups: ArrayLike | None = None, **how: Unpack[HowOptions]
) -> Interval:
    """AUGRC with its interval: ``bootstrap_errors`` for this metric alone, the fastest there is.

    Where fewer than one row in 256 is wrong and there are no groups, runs of right and wrong rows are resampled as
    cells: other resamples than those of the whole suite, from the same law.

    Raises:
        InputError: as ``augrc``, and for arguments out of range.
    """
    return bootstrap_errors(confidence, error, groups=groups, metrics=["augrc"], **how)["augrc"]


def _n_classes(probs: ArrayLike) -> int:
    values = array("probs", probs)
    return values.shape[1] if values.ndim == 2 else 2


def _columns(
    probs: ArrayLike,
    labels: ArrayLike,
    confidence: ArrayLike | None,
    threshold: float | None,
    positive: int | None,
    metrics: str | Sequence[str] = (),
) -> tuple[native.Columns, NDArray[np.int64]]:
    """Rows of one model from probabilities, and the labels."""
    column = array("probs", probs)
    both = np.stack([1 - column, column], axis=1) if column.ndim == 1 else probs
    values, truth = check_probabilities(both, labels)
    n_classes = values.shape[1]
    if positive is not None:
        whole("positive", positive, most=n_classes - 1, what="a class index")
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
        means={name: mean(values, truth) for name, mean in means(metrics)},
    ), truth


def _with_weights(columns: native.Columns, weights: ArrayLike | None) -> native.Columns:
    """The same rows with weights that are 1 on average; none where all are equal."""
    if weights is None:
        return columns
    values = check_weights(weights, columns.confidence.size)
    values = values / values.max()
    if values.min() == 1:
        return replace(columns, weight=None)
    # In one order, so that the order of the rows changes no bit.
    return replace(columns, weight=values * (values.size / np.sort(values).sum()))


def _threshold(threshold: float | None) -> float | None:
    if threshold is None:
        return None
    if math.isnan(number("threshold", threshold)):
        raise InputError("threshold must be a number, got NaN; leave it out to measure no exits")
    return float(threshold)


def metric_names(*, exits: bool = True) -> list[str]:
    """Names of all metrics of ``bootstrap``, those that need a threshold among them or not."""
    return names("rows", without=() if exits else ("threshold",))


def _wanted(metrics: str | Sequence[str], columns: native.Columns) -> list[str]:
    """The names asked for, checked against what these columns can give."""
    given = {"probabilities": columns.nll, "threshold": columns.threshold, "positive": columns.positive}
    absent: list[Need] = [need for need in get_args(Need) if given[need] is None]
    known = names("rows", without=absent)
    if isinstance(metrics, str):
        if metrics == "all":
            return known
        metrics = [metrics]
    metrics = [str(name)[:40] for name in metrics] if isinstance(metrics, list | tuple | set) else []
    if not metrics:
        raise InputError('metrics must name at least one metric, got none; "all" measures every one')
    for name in metrics:
        try:
            spec = lookup(name)[0]
        except KeyError:
            spec = None
        missing = [] if spec is None else [need for need in spec.needs if need in absent]
        if spec is None or spec.kind != "rows" or missing:
            hint = f"; it needs {_NEEDED[missing[0]]}" if missing else nearest(name, known)
            raise InputError(f"metrics must be all or names such as augrc, got {shown(name)}{hint}")
    return list(dict.fromkeys(metrics))


def _intervals(
    models: Sequence[native.Columns],
    groups: ArrayLike | None,
    strata: ArrayLike | None,
    metrics: str | Sequence[str],
    how: How,
) -> Intervals:
    """Intervals of one model's metrics, or of the difference of two."""
    wanted = _wanted(metrics, models[0])
    n, weight = models[0].confidence.size, models[0].weight
    if weight is not None and not weight.all():
        kept = weight > 0
        groups = None if groups is None else native.cluster_numbers(groups, n)[kept]
        strata = None if strata is None else np.asarray(strata)[kept]
        some = models[0].where(kept)
        return _intervals([_with_weights(some, some.weight)], groups, strata, metrics, how)
    if wanted == ["augrc"] and len(models) == 1 and strata is None and weight is None:
        return _augrc_interval(models[0], groups, how)
    found = {name: lookup(name) for name in wanted}
    if "brier" in found:
        found["brier"] = replace(METRICS["brier"], top=models[0].brier_top), None
    targets = {
        family: [target for spec, target in found.values() if spec.name == family and target is not None]
        for family in ("risk_at_coverage_", "coverage_at_risk_")
    }
    if not any("probabilities" in spec.needs for spec, _ in found.values()):
        models = [replace(model, nll=None, brier=None) for model in models]
    coverages, risks = targets.values()
    suite = native.Suite(models, groups=groups, strata=strata, coverages=coverages, risks=risks)
    columns: list[object] = [*native.SUITE, *((family, value) for family, all_ in targets.items() for value in all_)]
    values = suite.values()
    stepwise = any(spec.stepwise for spec, _ in found.values())
    drawn = [np.empty((0, len(columns)))] * len(models)
    if how.method != "logit" or stepwise:
        drawn = suite.resample(how.n_replicates, seed=how.seed, threads=how.threads)
    unit = unit_of(n, suite.n_units)
    result: dict[str, Interval] = {}
    walk: Walk | None = None
    for name, (spec, target) in found.items():
        if spec.values is not None:
            n_replicates = 0 if how.method == "logit" else how.n_replicates
            each = suite.mean_of(name, n_replicates, seed=how.seed)
        else:
            at = columns.index(name if target is None else (spec.name, target))
            each = [(value[at], replicates[:, at]) for value, replicates in zip(values, drawn, strict=True)]
        estimates = [
            Estimate.of(spec, target or 0.0, ranked, value, replicates, suite.sizes)
            for ranked, (value, replicates) in zip(suite.models, each, strict=True)
        ]
        one = estimates[0] if len(estimates) == 1 else estimates[0].minus(estimates[1])
        if spec.exact is not None and len(models) == 1:
            walk = walk or Walk.of(suite.models[0], suite.n_units)
            result[name] = one.exactly(spec.exact(walk, target or 0.0, how.level), how.level, unit)
        else:
            result[name] = one.interval(how.level, "percentile" if spec.stepwise else how.method, unit)
    return Intervals(result, n_rows=n, n_units=suite.n_units)


def _augrc_interval(columns: native.Columns, groups: ArrayLike | None, how: How) -> Intervals:
    """AUGRC alone: the kernel sorts packed keys and brings value and moments along."""
    losses, replicates = columns.error, 1 if how.method == "logit" else how.n_replicates
    drawn = native.bootstrap_augrc(
        columns.confidence, losses, groups, n_replicates=replicates, seed=how.seed, threads=how.threads
    )
    cluster = None if groups is None else native.cluster_numbers(groups, losses.size)
    n_units = losses.size if cluster is None else int(cluster.max()) + 1
    unit = unit_of(losses.size, n_units)
    estimate = Estimate(
        METRICS["augrc"], drawn.value, drawn.replicates if how.method != "logit" else np.empty(0), n_units,
        Sizes(n_units, n_units) if cluster is None else Sizes.of(cluster), (drawn.second, drawn.third),
        Events.among(losses, cluster), scale=drawn.value,
    )  # fmt: skip
    found = {"augrc": estimate.interval(how.level, how.method, unit)}
    return Intervals(found, n_rows=losses.size, n_units=n_units)
