"""A band for the risk-coverage curve that holds at all of its points at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro import native
from stage1_pro.arguments import whole
from stage1_pro.metrics.binomial import check_level
from stage1_pro.metrics.estimate import FEW_GROUPS, worth
from stage1_pro.metrics.thresholds import Walk
from stage1_pro.notebook import Shown

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False, repr=False)
class RiskBand(Shown):
    """The risk-coverage curve at M thresholds, the strictest first, and ends of its risk; arrays [M].

    ``method`` is "exact" of independent rows, "by group" where groups count by an effective number, which is an
    estimate; ``note`` is empty or a caution to show with the band.
    """

    threshold: Floats
    coverage: Floats
    selective_risk: Floats
    low: Floats
    high: Floats
    level: float
    method: str
    note: str = ""


def risk_band(
    confidence: ArrayLike, error: ArrayLike, *, groups: ArrayLike | None = None, points: int = 100, level: float = 0.95
) -> RiskBand:
    """The selective risk at coverages 1 / ``points``, 2 / ``points``, …, 1 with ends that hold for all of them at once.

    With a chance of at least ``level`` the risk of new rows at every one of these thresholds lies within [low, high],
    so any of them may be picked after a look at the curve. Between two points nothing is said.

    Given the score of rank k + 1, the k rows above it are independent draws from what lies above that score, whatever
    the law of the scores: errors among them are binomial. Each rank thus has an exact interval (Clopper and Pearson),
    at 1 − (1 − level) / ``points`` (Bonferroni over ranks that were fixed before the rows were seen). Losses between 0
    and 1 take e times the binomial tail (Bentkus 2004). With groups the rows above a score count as the trials that
    ``thresholds`` estimates from the sums by group.

    Stated answers: a tie group is never cut, so points may be fewer where scores are tied; one row has the point where
    all is accepted.

    Args:
        confidence: [N], higher is surer.
        error: [N], 0/1 or a loss in [0, 1].
        groups: [N] names or numbers of the independent units; None = every row is one.
        points: how many coverages share what may fail.
        level: of the whole band.

    Raises:
        InputError: as ``augrc``; or an argument out of range.
    """
    check_level(level)
    whole("points", points, 1, 10**6)
    suite = native.Suite([native.Columns(*native.rows(confidence, error))], groups=groups)
    (ranked,) = suite.models
    n, grouped = ranked.error.size, suite.n_units < ranked.error.size
    walk = Walk.of(ranked, suite.n_units)
    # Tie groups that end at or before the rank: all of them lie strictly above the score of the next one.
    ranks = -(-n * np.arange(1, points + 1) // points)
    at = np.unique(np.searchsorted(ranked.ends, ranks, side="right") - 1)
    at = at[at >= 0]
    low, high = walk.risk_ends(at, (1 - level) / (2 * points))
    scores = np.asarray(native.sweep(confidence, error)[0])[at]
    effective = worth(np.bincount(ranked.unit).astype(np.float64)) if grouped else float(n)
    note = "" if effective >= FEW_GROUPS or not grouped else f"only about {effective:.0f} groups by their sizes"
    return RiskBand(
        threshold=scores,
        coverage=walk.accepted[at] / n,
        selective_risk=walk.risk[at],
        low=np.minimum(low, walk.risk[at]),
        high=np.maximum(high, walk.risk[at]),
        level=level,
        method="by group" if grouped else "exact",
        note=f"{note}: the band covers less often than its level" if note else "",
    )
