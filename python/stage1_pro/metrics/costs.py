"""What exits cost when a wrong one and a deferral have their prices, and the threshold that such prices want."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro import native
from stage1_pro.arguments import array, at_or_above, floats, number
from stage1_pro.errors import InputError
from stage1_pro.notebook import Shown

# A sum that differs by rounding alone is the same cost.
_ROUNDING = 1e-12


@dataclass(frozen=True, repr=False)
class CostPoint(Shown):
    """The threshold of least mean cost, and what it compares with; costs are per row, in the unit of the prices.

    ``threshold``: a row exits iff its confidence is at or above it, inf where nobody should; ``coverage`` in [0, 1] and
    ``selective_risk`` (NaN without an exit) there; ``all_exit`` and ``all_deferred`` are the costs of these two. It was
    chosen on the rows that it is measured on, so new rows cost more: measure it with ``cost_of_exits`` on others.
    ``bayes``: the confidence that the prices want where confidence is P(right): 1 − deferral / wrong (Chow 1970); NaN
    where the price of a deferral differs from row to row.
    """

    threshold: float
    coverage: float
    selective_risk: float
    cost: float
    all_exit: float
    all_deferred: float
    bayes: float


def cost_of_exits(
    confidence: ArrayLike, error: ArrayLike, threshold: float, *, wrong: float, deferral: ArrayLike
) -> float:
    """Mean cost per row at a threshold, at least 0; lower is better.

    Σ (wrong · error of rows that exit + deferral of the others) / N.

    Args:
        confidence: [N], higher is surer; a row exits iff it is at or above the threshold.
        error: [N] of the answers that exits get, 0/1 or a loss in [0, 1].
        threshold: inf defers every row.
        wrong: price of a wrong exit, more than 0.
        deferral: price of a deferred or abstained row, 0 or more: one number; or [N], such as the price of a review, or
            of Stage B's pass and its own error.

    Raises:
        InputError: an argument is not what it must be.
    """
    scores, losses, prices = _priced(confidence, error, wrong, deferral)
    if math.isnan(number("threshold", threshold)):
        raise InputError("threshold must be a number, got NaN; inf defers every row")
    exits = at_or_above("confidence", scores, threshold)
    return float(np.where(exits, wrong * losses, prices).mean())


def cheapest_threshold(confidence: ArrayLike, error: ArrayLike, *, wrong: float, deferral: ArrayLike) -> CostPoint:
    """The threshold of least mean cost on these rows, tie groups whole; of equal costs the one with most exits.

    Arguments and errors as in ``cost_of_exits``.
    """
    scores, losses, prices = _priced(confidence, error, wrong, deferral)
    order, ends = native.order(scores, losses)
    last = ends.astype(np.int64) - 1
    wrongs = np.append(0.0, np.cumsum(losses[order], dtype=np.float64)[last])
    saved = np.append(0.0, np.cumsum(prices[order])[last])
    costs = (wrong * wrongs + saved[-1] - saved) / losses.size
    best = int(np.flatnonzero(costs <= costs.min() + _ROUNDING * costs.max())[-1])
    exits = int(ends[best - 1]) if best else 0
    return CostPoint(
        threshold=float(scores[order[exits - 1]]) if exits else math.inf,
        coverage=exits / losses.size,
        selective_risk=float(wrongs[best] / exits) if exits else math.nan,
        cost=float(costs[best]),
        all_exit=float(costs[-1]),
        all_deferred=float(costs[0]),
        bayes=float(1 - prices[0] / wrong) if (prices == prices[0]).all() else math.nan,
    )


def _priced(
    confidence: ArrayLike, error: ArrayLike, wrong: float, deferral: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Confidence, error and the price of a deferral [N], checked."""
    scores, losses = native.rows(confidence, error)
    if not 0 < number("wrong", wrong) < math.inf:
        raise InputError(f"wrong must be a price above 0, got {wrong}; it is what a wrong exit costs")
    shape = array("deferral", deferral).shape
    if shape not in ((), losses.shape):
        raise InputError(f"deferral must be one price or have shape [{losses.size}], got {list(shape)}")
    prices = np.broadcast_to(floats("deferral", deferral), losses.shape)
    off = ~(np.isfinite(prices) & (prices >= 0))
    if off.any():
        row = int(off.argmax())
        raise InputError(f"deferral must be prices of 0 or more, got {prices[row]:g} at row {row}; give a cost")
    return scores.astype(np.float64), losses.astype(np.float64), prices
