"""What is measured of answers: figures by stage and source, FNR on exits, and what Stage B changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from stage1_pro.metrics.binomial import clopper_pearson_upper
from stage1_pro.metrics.estimate import Interval
from stage1_pro.metrics.measured import Metric, known
from stage1_pro.record import Record

Stage = Literal["stage_a", "stage_b", "cascade"]
STAGES: tuple[Stage, ...] = ("stage_a", "stage_b", "cascade")
MEASURE_COLUMNS = ["scope", "source", "stage", *Metric.model_fields, "n", "n_groups"]


class Measure(Metric):
    """One figure of an evaluation, with its interval and the data behind it; undefined ones are null."""

    source: str | None = Field(description="null = all rows")
    stage: Stage = Field(description="whose answers are measured")
    n: int = Field(description="rows that the figure is a mean over")
    n_groups: int

    def flat(self) -> dict[str, object]:
        """Give the figure as a row of ``MEASURE_COLUMNS``."""
        return {"scope": "all" if self.source is None else "source", **self.model_dump()}


class FnrCheck(Record):
    """Whether FNR on exits keeps the policy's target on these rows, by its upper bound.

    ``holds``: the bound is at or below the target; ``not shown``: the value is, the bound is not (or no positive
    exited); ``exceeded``: the value itself is above the target.
    """

    outcome: Literal["holds", "not shown", "exceeded"]
    value: float | None = Field(description="null when no positive exited")
    upper_bound: float | None = Field(
        description="the larger of Clopper-Pearson on groups with a miss and the bootstrap by group"
    )
    target: float
    level: float = Field(gt=0, lt=1)
    n_missed: int = Field(description="exited positives that were answered otherwise")
    n_positives: int = Field(description="exited positives")
    n_groups_missed: int
    n_groups: int = Field(description="groups of the exited positives")
    statement: str = Field(description="the outcome in words")


class StageEffect(Record):
    """Stage A against Stage B on the rows that exit, or on those that are deferred, in counts.

    On deferred rows ``fixed`` and ``broken`` are what Stage B changes; on exited ones what it would have changed.
    """

    rows: Literal["exited", "deferred"]
    n: int
    both_right: int
    fixed: int = Field(description="Stage A is wrong, Stage B right")
    broken: int = Field(description="Stage A is right, Stage B wrong")
    both_wrong: int


@dataclass(frozen=True)
class Answers:
    """What one stage, or the cascade of both, answers on N rows.

    ``probs`` [N, K]; ``prediction`` [N] class indices; ``probability`` [N] of the positive class; ``confidence`` [N]
    of the answer; ``error`` bool [N]; ``exited`` bool [N]: answered by Stage A.
    """

    probs: NDArray[np.float64]
    prediction: NDArray[np.int64]
    probability: NDArray[np.float64]
    confidence: NDArray[np.float64]
    error: NDArray[np.bool_]
    exited: NDArray[np.bool_]


# Of both stages and, under a policy, of the cascade.
Answered = Mapping[Stage, Answers]


def count_effects(answers: Answered) -> list[StageEffect]:
    """Count on exited, then on deferred rows who of the two stages is right; under a policy."""
    a, b, exited = answers["stage_a"].error, answers["stage_b"].error, answers["cascade"].exited
    parts: dict[Literal["exited", "deferred"], NDArray[np.bool_]] = {"exited": exited, "deferred": ~exited}
    cases = {"both_right": ~a & ~b, "fixed": a & ~b, "broken": ~a & b, "both_wrong": a & b}
    return [
        StageEffect(rows=name, n=int(rows.sum()), **{case: int((rows & of).sum()) for case, of in cases.items()})
        for name, rows in parts.items()
    ]


def measure_fnr(source: str | None, counts: tuple[int, int, int, int], interval: Interval, level: float) -> Measure:
    """FNR on exits with an upper bound on the rate of rows, whatever the sizes of their groups.

    Clopper and Pearson's bound is on the share of groups that hold a miss. Where a large group is missed the share of
    rows is more than that, which the bootstrap by group sees; the larger of the two is the bound.

    Args:
        source: of the rows; None = all.
        counts: missed exited positives, exited positives, groups that hold a missed one, groups.
        interval: of the bootstrap by group.
        level: of the bound.
    """
    missed, n, groups_missed, n_groups = counts
    if n == 0:
        note = "undefined: no positive row exits"
        return Measure(source=source, stage="stage_a", metric="fnr_on_exited", note=note, n=0, n_groups=0)
    high, method = clopper_pearson_upper(groups_missed, n_groups, level=level), "clopper-pearson"
    note = f"one-sided upper bound: {groups_missed} of {n_groups} groups hold a missed positive"
    if n_groups < n and interval.method in ("bca", "percentile") and interval.high > high:
        high, method = interval.high, interval.method
        note += "; the bootstrap by group goes higher, since the groups' sizes differ"
    return Measure(
        source=source, stage="stage_a", metric="fnr_on_exited", value=missed / n, std=known(interval.std), high=high,
        method=method, note=note, n=n, n_groups=n_groups,
    )  # fmt: skip


def check_fnr(measure: Measure, counts: tuple[int, int, int, int], target: float, level: float) -> FnrCheck:
    """Hold FNR on exits against the policy's target, by its upper bound; arguments as in ``measure_fnr``."""
    missed, n, groups_missed, n_groups = counts
    outcome: Literal["holds", "not shown", "exceeded"]
    if measure.value is None or measure.high is None:
        outcome, words = "not shown", "not shown: no positive row exits, so nothing is known"
    else:
        figures = (
            f"{missed} of {n} exited positives missed ({measure.value:.2%}), {level:.0%} upper bound "
            f"{measure.high:.2%} from {n_groups} groups, target {target:.2%}"
        )
        if measure.value > target:
            outcome, words = "exceeded", f"exceeded: the measured rate itself is above the target; {figures}"
        elif measure.high <= target:
            outcome, words = "holds", f"holds by its bound: even the upper bound meets the target; {figures}"
        else:
            outcome = "not shown"
            words = f"not shown: the measured rate meets the target, its upper bound does not; {figures}"
    return FnrCheck(
        outcome=outcome, value=measure.value, upper_bound=measure.high, target=target, level=level, n_missed=missed,
        n_positives=n, n_groups_missed=groups_missed, n_groups=n_groups, statement=words,
    )  # fmt: skip
