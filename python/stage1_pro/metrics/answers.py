"""What is measured of answers: figures by stage and source, FNR on exits, and what Stage B changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from stage1_pro.metrics.binomial import binomial_ends, clopper_pearson_upper
from stage1_pro.metrics.estimate import Interval, worth
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
    """Whether FNR on exits keeps the policy's target on these rows, by an upper bound on the share of groups.

    ``holds``: the bound is at or below the target; ``not shown``: the value is, the bound is not (or no positive
    exited); ``exceeded``: the value itself is above the target. No bound is on the rate of photos: a large group that
    was not drawn could hold any number of misses.
    """

    outcome: Literal["holds", "not shown", "exceeded"] | None = Field(description="null: nothing was promised")
    value: float | None = Field(description="null when no positive exited")
    upper_bound: float | None = Field(
        description="on the share of groups that hold a miss; higher where few large groups hold most exited positives"
    )
    target: float
    level: float = Field(gt=0, lt=1)
    n_missed: int = Field(description="exited positives that were answered otherwise")
    n_positives: int = Field(description="exited positives")
    n_groups_missed: int
    n_groups: int = Field(description="groups of the exited positives")
    photos: str = Field(default="", description="what is shown of photos, in words")
    statement: str = Field(description="the outcome in words")


class FnrCounts(NamedTuple):
    """Exited positives: missed and all; groups that hold a missed one and all; what these are worth by their sizes, and
    how many exited positives the largest holds.
    """

    missed: int
    n: int
    groups_missed: int
    n_groups: int
    effective: float
    largest: int

    @classmethod
    def of(cls, missed: NDArray[np.bool_], groups: NDArray[Any]) -> Self:
        """Count exited positives [M], missed or not, and their groups [M]."""
        _, unit, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        held = int(np.unique(unit[missed]).size)
        largest = int(sizes.max(initial=0))
        return cls(int(missed.sum()), missed.size, held, sizes.size, worth(sizes.astype(np.float64)), largest)


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

    ``probs`` [N, K]; ``prediction`` [N] class indices; ``probability`` [N] of the positive class, if there is one;
    ``confidence`` [N] of the answer; ``error`` bool [N]; ``exited`` bool [N]: answered by Stage A.
    """

    probs: NDArray[np.float64]
    prediction: NDArray[np.int64]
    probability: NDArray[np.float64] | None
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


def measure_fnr(source: str | None, counts: FnrCounts, interval: Interval, level: float) -> Measure:
    """FNR on exits with an upper bound on the share of groups that hold a missed positive.

    It is Clopper and Pearson's of whole groups, which is never less than one on the mean of their rates. Where groups
    differ in size it is raised to the bounds on the rate of rows that the effective number of groups and the bootstrap
    give; neither knows of larger groups that were not drawn, so it is none on photos.

    Args:
        source: of the rows; None = all.
        counts: of exited positives.
        interval: of the bootstrap by group, two-sided at ``2 * level - 1``: its upper end is one-sided at ``level``.
        level: of the bound.
    """
    if counts.n == 0:
        note = "undefined: no positive row exits"
        return Measure(source=source, stage="stage_a", metric="fnr_on_exited", note=note, n=0, n_groups=0)
    value = counts.missed / counts.n
    high, method = clopper_pearson_upper(counts.groups_missed, counts.n_groups, level=level), "clopper-pearson"
    note = (
        f"one-sided upper bound on groups, not on photos: {counts.groups_missed} of {counts.n_groups} groups hold a "
        "missed positive"
    )
    raised = {method: high}
    if counts.effective < counts.n_groups - 0.5:
        raised["clopper-pearson"] = max(
            high, float(binomial_ends(value * counts.effective, counts.effective, 1 - level, upper=True))
        )
        if interval.method in ("bca", "percentile"):
            raised[interval.method] = interval.high
    if max(raised.values()) > high:
        high, method = max((end, name) for name, end in raised.items())
        note += "; raised, since the groups' sizes differ"
    return Measure(
        source=source, stage="stage_a", metric="fnr_on_exited", value=value, std=known(interval.std), high=high,
        method=method, note=note, n=counts.n, n_groups=counts.n_groups,
    )  # fmt: skip


def check_fnr(measure: Measure, counts: FnrCounts, target: float, level: float, *, promised: bool = True) -> FnrCheck:
    """Hold FNR on exits against the policy's target, by its upper bound on groups; arguments as in ``measure_fnr``.

    A target that is not ``promised`` stands beside what is seen, and nothing is judged.
    """
    outcome: Literal["holds", "not shown", "exceeded"] | None
    photos = ""
    if measure.value is None or measure.high is None:
        nothing = "no positive row exits, so nothing is known"
        outcome, words = ("not shown", f"not shown: {nothing}") if promised else (None, nothing)
    else:
        photos = (
            f"of photos nothing is shown: a group larger than those here (at most {counts.largest} exited "
            f"positive{'s' if counts.largest > 1 else ''} each) could hold any number of misses"
        )
        figures = (
            f"{counts.missed} of {counts.n} exited positives missed ({measure.value:.2%}), in {counts.groups_missed} "
            f"of {counts.n_groups} groups, {level:.0%} upper bound on groups {measure.high:.2%}, target {target:.2%}"
        )
        if not promised:
            outcome, words = None, figures
        elif measure.value > target:
            outcome, words = "exceeded", f"exceeded: the measured rate itself is above the target; {figures}"
        elif measure.high <= target:
            outcome, words = "holds", f"holds by its bound, of groups: even that meets the target; {figures}; {photos}"
        else:
            outcome = "not shown"
            words = f"not shown: the measured rate meets the target, its upper bound does not; {figures}"
    return FnrCheck(
        outcome=outcome, value=measure.value, upper_bound=measure.high, target=target, level=level,
        n_missed=counts.missed, n_positives=counts.n, n_groups_missed=counts.groups_missed, n_groups=counts.n_groups,
        photos=photos, statement=words,
    )  # fmt: skip
