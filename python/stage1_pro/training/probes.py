"""What features are worth before any training: a linear probe and nearest neighbours on held-out groups.

NumPy in, no torch. Every row is answered by a probe that has seen no row of its group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from stage1_pro.errors import InputError
from stage1_pro.metrics.estimate import Interval, Sizes, reach
from stage1_pro.metrics.intervals import bootstrap_answers, compare
from stage1_pro.metrics.measured import known
from stage1_pro.metrics.probabilistic import accuracy
from stage1_pro.policies.softmax import softmax
from stage1_pro.training.gate_head import fit_head, fold_of
from stage1_pro.training.run import ProbeFigure

Array = NDArray[np.float64]

FOLDS = 5
# Cuts into folds whose answers are averaged: what one cut says of small data is chance to a good part.
CUTS = 3
NEIGHBOURS = 10
# Weight of a neighbour: exp(cosine / .07), as in DINO (Caron et al., 2104.14294).
_TEMPERATURE = 0.07
Probe = Literal["linear", "knn"]
PROBES: tuple[Probe, ...] = get_args(Probe)


def probe(
    features: NDArray[np.floating], labels: NDArray[np.int64], groups: Sequence[str], classes: int, *, seed: int
) -> dict[str, Array]:
    """Probabilities [N, K] that a balanced linear probe (``linear``) and 10 neighbours (``knn``) give each row.

    Of features [N, F], class indices [N] and names of groups [N], which ``seed`` cuts into folds.

    Raises:
        InputError: features that are not finite, or fewer than two groups.
    """
    rows = np.asarray(features, dtype=np.float64)
    if not np.isfinite(rows).all():
        raise InputError("features must be finite, got NaN or infinity; the backbone that gave them is broken")
    if len(set(groups)) < 2:
        raise InputError(
            f"train rows must come from two groups or more to be judged on held-out ones, got {len(set(groups))}; "
            "label more clips or places"
        )
    found = {name: np.zeros((labels.size, classes)) for name in PROBES}
    with threadpool_limits(limits=1, user_api="blas"):
        unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        for cut in range(CUTS):
            fold = fold_of(groups, FOLDS, seed + cut)
            for number in range(int(fold.max()) + 1):
                held = fold == number
                known = labels[~held]
                counts = np.bincount(known, minlength=classes)
                weights = (known.size / (np.count_nonzero(counts) * np.maximum(counts, 1)))[known]
                matrix, offsets = fit_head(rows[~held], known, weights, classes)
                found["linear"][held] += softmax(rows[held] @ matrix + offsets)
                found["knn"][held] += _vote(unit[held] @ unit[~held].T, known, weights, classes)
    return {name: probs / CUTS for name, probs in found.items()}


def judge(
    before: dict[str, Array],
    after: dict[str, Array],
    labels: NDArray[np.int64],
    groups: Sequence[str],
    *,
    positive: int | None,
    seed: int,
    n_replicates: int = 1000,
) -> list[ProbeFigure]:
    """Every figure of both probes before and after, and the difference on the same resamples of groups.

    ``before`` and ``after`` are probabilities [N, K] by probe, with the base and with the adapted backbone; ``labels``
    and ``positive`` class indices, ``groups`` names [N]. Without a positive class there is no AUROC.
    """
    options: dict[str, Any] = {
        "groups": np.asarray(groups), "n_replicates": n_replicates, "seed": seed, "positive": positive,
    }  # fmt: skip
    shown = ("balanced_accuracy",) if positive is None else ("balanced_accuracy", "auroc")
    worth = Sizes.of(np.unique(options["groups"], return_inverse=True)[1]).spread
    found = []
    for name in PROBES:
        a, b = after[name], before[name]
        ours, theirs = (bootstrap_answers(probs, labels, **options) for probs in (a, b))
        apart = {"accuracy": compare(a, b, labels, metrics=["accuracy"], **options)["accuracy"]}
        # The same seed draws the same groups for both, so replicates are paired.
        apart |= {metric: _difference(ours[metric], theirs[metric], worth) for metric in shown}
        start = {"accuracy": accuracy(b.argmax(1), labels), **{m: theirs[m].value for m in apart if m in theirs}}
        found += [_figure(name, metric, start[metric], difference) for metric, difference in apart.items()]
    return found


def verdict(figures: Sequence[ProbeFigure]) -> tuple[bool, str]:
    """Whether the adapted backbone is kept, and why: better by the linear probe, and no worse by neighbours.

    What counts is balanced accuracy on held-out groups of train rows; a tie keeps the base.
    """
    measured = {one.probe: one for one in figures if one.metric == "balanced_accuracy"}
    linear, knn = (measured[name].difference or 0.0 for name in PROBES)
    words = f"balanced accuracy of the linear probe {linear:+.4f}, of nearest neighbours {knn:+.4f}"
    if linear > 0 and knn >= 0:
        clear = (measured["linear"].low or 0) > 0
        return True, f"{words}{'' if clear else '; the interval of the former does not exclude 0'}"
    return False, f"{words}: it must be above 0 by the linear probe and not below 0 by neighbours"


def _vote(cosine: Array, labels: NDArray[np.int64], weights: Array, classes: int) -> Array:
    count = min(NEIGHBOURS, labels.size)
    near = np.argpartition(-cosine, count - 1, axis=1)[:, :count]
    vote = np.exp((np.take_along_axis(cosine, near, axis=1) - 1) / _TEMPERATURE) * weights[near]
    shares = np.stack([(vote * (labels[near] == k)).sum(axis=1) for k in range(classes)], axis=1)
    total = shares.sum(axis=1, keepdims=True)
    # Neighbours all but opposite have no weight that a double could hold.
    out: Array = np.where(total > 0, shares / np.where(total > 0, total, 1), 1 / classes)
    return out


def _difference(a: Interval, b: Interval, n_groups: float) -> Interval:
    replicates = a.replicates - b.replicates
    defined, apart = replicates[np.isfinite(replicates)], a.value - b.value
    if defined.size < 2 or math.isnan(apart):
        return Interval(apart, math.nan, math.nan, math.nan, method="none", note="no resample has it")
    std = float(defined.std(ddof=1))
    width = reach(a.level, n_groups) * std
    return Interval(apart, std, max(apart - width, -1.0), min(apart + width, 1.0), a.level, "t")


def _figure(name: Probe, metric: str, before: float, apart: Interval) -> ProbeFigure:
    return ProbeFigure(
        probe=name, metric=cast("Any", metric), before=known(before), after=known(before + apart.value),
        difference=known(apart.value), low=known(apart.low), high=known(apart.high), method=apart.method,
    )  # fmt: skip
