"""Every figure of an evaluation with its interval: of each stage, of exits, and of the cascade beside Stage B."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stage1_pro.classes import index_of
from stage1_pro.data.predictions import Predictions
from stage1_pro.metrics.answers import Answered, FnrCounts, Measure, Stage, measure_fnr
from stage1_pro.metrics.estimate import Interval
from stage1_pro.metrics.intervals import Intervals, bootstrap, bootstrap_answers, compare, metric_names
from stage1_pro.policies.policy import Policy

LEVEL = 0.95
# Accuracy of the cascade minus that of Stage B answering everything, on the same rows.
DIFFERENCE = "accuracy_minus_stage_b"


@dataclass(frozen=True)
class Scope:
    """Some rows of predictions, how they were answered, and how they are measured; ``source`` None = all rows."""

    predictions: Predictions
    answers: Answered
    policy: Policy | None
    source: str | None
    rows: NDArray[np.bool_]
    n_replicates: int
    seed: int

    @property
    def positive(self) -> int | None:
        """Index of the positive class, if there is one."""
        return index_of(self.predictions.classes, self.predictions.positive)

    @property
    def how(self) -> dict[str, Any]:
        """Arguments of ``bootstrap`` that all figures share."""
        return {"n_replicates": self.n_replicates, "level": LEVEL, "seed": self.seed}

    def measure(self, name: str, stage: Stage, one: Interval, rows: NDArray[np.bool_]) -> Measure:
        """A figure of a stage on ``rows``."""
        n, n_groups = int(rows.sum()), np.unique(self.predictions.groups[rows]).size
        return Measure.of(name, one, source=self.source, stage=stage, n=n, n_groups=n_groups)


@dataclass(frozen=True)
class Measured:
    """The figures of a scope, and what pictures are drawn from: intervals of Stage A and, under a policy, of exits."""

    measures: list[Measure]
    stage_a: Intervals
    exits: Intervals | None


def scopes(
    predictions: Predictions, answers: Answered, policy: Policy | None, n_replicates: int, seed: int
) -> Iterator[Scope]:
    """All rows, then those of every source when there are several."""
    everything = np.ones(predictions.labels.size, dtype=bool)
    whole = Scope(predictions, answers, policy, None, everything, n_replicates, seed)
    yield whole
    names = np.unique(predictions.sources)
    if names.size > 1:
        for name in names.tolist():
            yield replace(whole, source=name or "(no source)", rows=predictions.sources == name)


def measure_scope(scope: Scope, extra: Sequence[str] = ()) -> Measured:
    """Every figure of a scope with its interval; ``extra`` metrics are measured of Stage A, and are no figures."""
    measures: list[Measure] = []
    names, rows, predictions = metric_names(exits=False), scope.rows, scope.predictions
    labels, groups = predictions.labels[rows], predictions.groups[rows]
    of_stage: dict[Stage, Intervals] = {}
    for stage, given in scope.answers.items():
        probs = given.probs[rows]
        of_stage[stage] = bootstrap(
            probs, labels, confidence=given.confidence[rows], groups=groups, positive=scope.positive,
            metrics=[*names, *(extra if stage == "stage_a" else ())], **scope.how,
        )  # fmt: skip
        found = {name: of_stage[stage][name] for name in names}
        found |= bootstrap_answers(probs, labels, groups=groups, positive=scope.positive, **scope.how)
        measures += [scope.measure(name, stage, one, rows) for name, one in found.items()]
    if scope.policy is None:
        return Measured([*measures, *_unknown_exits(scope)], of_stage["stage_a"], None)
    exits = _exit_intervals(scope, scope.policy)
    # Of the cascade beside Stage B alone, on the same resamples of groups.
    apart = compare(
        scope.answers["cascade"].probs[rows], scope.answers["stage_b"].probs[rows], labels, groups=groups,
        metrics=["accuracy"], **scope.how,
    )["accuracy"]  # fmt: skip
    measures += [*_exits(scope, exits), scope.measure(DIFFERENCE, "cascade", apart, rows)]
    return Measured(measures, of_stage["stage_a"], exits)


def fnr_counts(scope: Scope) -> FnrCounts:
    """Missed and all exited positives, and the groups that hold any of them."""
    predictions = scope.predictions
    among = scope.rows & scope.answers["cascade"].exited & (predictions.labels == scope.positive)
    missed = scope.answers["stage_a"].prediction[among] != scope.positive
    return FnrCounts.of(missed, predictions.groups[among])


def _unknown_exits(scope: Scope) -> list[Measure]:
    source, of_positive = scope.source, [] if scope.positive is None else ["fnr_on_exited"]
    of_a = ("coverage", "exit_error", "exit_accuracy", *of_positive)
    names: list[tuple[Stage, str]] = [*(("stage_a", name) for name in of_a), ("stage_b", "deferred_accuracy")]
    note = "undefined: no exit policy"
    return [Measure(source=source, stage=stage, metric=name, note=note, n=0, n_groups=0) for stage, name in names]


def _exits(scope: Scope, found: Intervals) -> list[Measure]:
    """What the policy does: exits of Stage A, and Stage B on the rest."""
    rows, predictions, stage_a = scope.rows, scope.predictions, scope.answers["stage_a"]
    out = scope.answers["cascade"].exited
    exited, deferred = rows & out, rows & ~out

    wrong = found["exit_error"]
    right = replace(wrong, value=1 - wrong.value, low=1 - wrong.high, high=1 - wrong.low)
    # The mean itself, not one minus another mean: the last bit counts where figures are compared.
    if exited.any():
        right = replace(right, value=float(np.mean(~stage_a.error[exited])))
    rest = Interval(math.nan, math.nan, math.nan, math.nan, method="none", note="undefined: no row is deferred")
    if deferred.any():
        rest = bootstrap(
            scope.answers["stage_b"].probs[deferred], predictions.labels[deferred],
            groups=predictions.groups[deferred], metrics=["accuracy"], **scope.how,
        )["accuracy"]  # fmt: skip
    return [
        scope.measure("coverage", "stage_a", found["coverage"], rows),
        scope.measure("exit_error", "stage_a", wrong, exited),
        scope.measure("exit_accuracy", "stage_a", right, exited),
        *(
            []
            if scope.positive is None
            else [measure_fnr(scope.source, fnr_counts(scope), found["fnr_on_exited"], LEVEL)]
        ),
        scope.measure("deferred_accuracy", "stage_b", rest, deferred),
    ]


def _exit_intervals(scope: Scope, policy: Policy) -> Intervals:
    """Of exits; that of their FNR has its upper end at the level of a one-sided bound."""
    predictions, rows = scope.predictions, scope.rows
    scores = policy.scores(scope.answers["stage_a"].probs, predictions.gate_logits)
    # A row without a score never exits.
    scores = np.where(np.isnan(scores), -np.inf, scores)

    def measured(metrics: list[str], level: float) -> Intervals:
        return bootstrap(
            scope.answers["stage_a"].probs[rows], predictions.labels[rows], confidence=scores[rows],
            threshold=policy.exit_threshold, groups=predictions.groups[rows], positive=scope.positive,
            metrics=metrics, **{**scope.how, "level": level},
        )  # fmt: skip

    found = measured(["coverage", "exit_error"], LEVEL)
    if scope.positive is not None:
        found |= measured(["fnr_on_exited"], 2 * LEVEL - 1)
    return found
