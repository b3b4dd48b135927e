"""``stage1 metrics``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from stage1_pro.command import Columns, Command, Count, Result, Share, Words, keywords, option, table_columns, within

if TYPE_CHECKING:
    from stage1_pro.studies.measuring import Measurement

Finite = Annotated[float, within(math.isfinite, "a number and finite", "leave it out to measure no exits")]


class Metrics(Command, topic="metrics"):
    """Measure anybody's predictions: AUGRC and the suite with intervals, no model."""

    path: Path = option(
        ...,
        "predictions: columns or arrays as `stage1 help metrics` lists them",
        positional=True,
        metavar="FILE.csv|FILE.npz",
    )
    compare_with: Path | None = option(
        None, "predictions on the same rows: FILE.csv minus these", name="--compare", metavar="FILE"
    )
    columns: Columns | None = table_columns("what a CSV calls its columns, such as label=truth,prob=score")
    positive: str | None = option(None, "name of the positive class; 1 of labels 0 and 1")
    threshold: Finite | None = option(None, "a row exits at or above it; adds coverage and errors of exits")
    n_replicates: Count = option(1000, "bootstrap replicates of an interval", name="--replicates")
    level: Share = option(0.95, "nominal coverage of the intervals")
    method: Literal["bca", "percentile", "logit"] = option("bca", "how intervals are made")
    seed: int = option(0, "seed of the bootstrap")
    metrics: Words = option(("all",), "comma-separated names, such as augrc,risk_at_coverage_0.95")
    out: Path | None = option(None, "folder for metrics.csv, metrics.json, figures and report.html")

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
