"""``stage1 metrics``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from stage1_pro.command import Command, Count, Flag, Result, Share, Words, keywords, within

if TYPE_CHECKING:
    from stage1_pro.studies.measuring import Measurement

Finite = Annotated[float, within(math.isfinite, "a number and finite", "leave it out to measure no exits")]


class Metrics(Command):
    """Measure anybody's predictions: AUGRC and the suite with intervals, no model."""

    topic: ClassVar[str] = "metrics"

    path: Annotated[Path, Flag(positional=True, metavar="FILE.csv|FILE.npz")] = Field(
        description="predictions: columns or arrays as `stage1 help metrics` lists them"
    )
    compare_with: Annotated[Path | None, Flag("--compare", metavar="FILE")] = Field(
        None, description="predictions on the same rows: FILE.csv minus these"
    )
    positive: str | None = Field(None, description="name of the positive class; 1 of labels 0 and 1")
    threshold: Finite | None = Field(None, description="a row exits at or above it; adds coverage and errors of exits")
    n_replicates: Annotated[Count, Flag("--replicates")] = Field(
        1000, description="bootstrap replicates of an interval"
    )
    level: Share = Field(0.95, description="nominal coverage of the intervals")
    method: Literal["bca", "percentile", "logit"] = Field("bca", description="how intervals are made")
    seed: int = Field(0, description="seed of the bootstrap")
    metrics: Words = Field(("all",), description="comma-separated names, such as augrc,risk_at_coverage_0.95")
    out: Path | None = Field(None, description="folder for metrics.csv, metrics.json, figures and report.html")

    def execute(self) -> Result:
        """Print every metric with its interval."""
        from stage1_pro.studies.measuring import measure, render

        found = measure(self)
        return Result(render(found), found.model_dump(mode="json"))


@keywords(Metrics)
def measure(path: Path | str, **options: Any) -> Measurement:
    """Measure a file of predictions, every metric with its interval; or its difference from another file.

    Raises:
        InputError: a file or argument is not what it must be; wrong cells name their row.
    """
    from stage1_pro.studies.measuring import measure as work

    return work(Metrics.of(path=path, **options))
