"""``Metric``: one figure with its interval, as files hold it."""

from __future__ import annotations

import math
from typing import Any, Self

from pydantic import Field

from stage1_pro.metrics.estimate import Interval
from stage1_pro.record import Record


class Metric(Record):
    """One metric with its interval; what is undefined is null, and ``note`` says why."""

    metric: str
    value: float | None = None
    std: float | None = None
    low: float | None = None
    high: float | None = Field(default=None, description="an upper bound alone when low is null")
    method: str = Field(default="none", description="of the interval: one of those in the manual's page on metrics")
    note: str = Field(default="", description="why there is no value or interval, or a caution to show with it")

    @classmethod
    def of(cls, metric: str, one: Interval, **more: Any) -> Self:
        """Make the row of a metric from its interval; ``more`` are fields of a subclass."""
        ends = {name: known(getattr(one, name)) for name in ("value", "std", "low", "high")}
        return cls(metric=metric, **ends, method=one.method, note=one.note, **more)


def known(value: float) -> float | None:
    """Give the number, or None for what no file can hold: NaN and infinities."""
    return float(value) if math.isfinite(value) else None
