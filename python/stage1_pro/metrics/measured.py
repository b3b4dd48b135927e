"""``Metric``: one figure with its interval, as files hold it."""

from __future__ import annotations

from pydantic import Field

from stage1_pro.record import Record


class Metric(Record):
    """One metric with its interval; what is undefined is null, and ``note`` says why."""

    metric: str
    value: float | None = None
    std: float | None = None
    low: float | None = None
    high: float | None = Field(default=None, description="an upper bound alone when low is null")
    method: str = Field(default="none", description="of the interval: bca, percentile, logit, clopper-pearson or none")
    note: str = Field(default="", description="why there is no value or interval, or a caution to show with it")
