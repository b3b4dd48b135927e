"""What is measured of answers: figures by stage and source, FNR on exits, and what Stage B changes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stage1_pro.metrics.measured import Metric
from stage1_pro.record import Record


class Measure(Metric):
    """One figure of an evaluation, with its interval and the data behind it; undefined ones are null."""

    source: str | None = Field(description="null = all rows")
    stage: Literal["stage_a", "stage_b", "cascade"] = Field(description="whose answers are measured")
    n: int = Field(description="rows that the figure is a mean over")
    n_groups: int


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
