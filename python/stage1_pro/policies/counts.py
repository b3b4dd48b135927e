"""Counts among exits at every threshold: one sort, tie groups never cut, thresholds in the gaps. NumPy only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro.arguments import Grid, on_grid
from stage1_pro.policies.bounds import exact
from stage1_pro.policies.candidates import ranked
from stage1_pro.policies.certificate import SweepRow
from stage1_pro.policies.rows import Rows

SWEEP_ROWS = 512
# Rounding of a logit between runtimes and batch shapes, as a share of one plus its size.
NOISE = 4e-6


def gaps(
    descending: NDArray[np.float64], lowest: float, grid: Grid = "float64"
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Where equal scores end, [T] indices, and thresholds [T] in the middle of the gap below each.

    As far as can be from every row, so that a runtime's rounding flips none. Neighbouring floats have no number between
    them; the threshold is then the score itself. Probabilities (a finite ``lowest``) that differ by no more than
    rounding count as equal: one photo twice in a batch can get two scores, and no threshold may part them. Where scores
    lie so dense that a run of such differences is longer than rounding, each stands for itself. Thresholds are numbers
    of the dtype that scores came in, ``grid``, which decides alike when it compares in itself.
    """
    ends = descending[1:] < descending[:-1]
    if math.isfinite(lowest):
        ends &= ~_rounding(descending)
    last = np.append(np.flatnonzero(ends), descending.size - 1)
    high = descending[last]
    first = np.append(0, last[:-1] + 1)
    low = np.append(descending[first][1:], min(lowest, high[-1]))
    with np.errstate(invalid="ignore"):
        middle = on_grid(low + (high - low) / 2, grid)
    return last, np.where((middle > low) & (middle <= high), middle, high)


def _rounding(descending: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which neighbours [N - 1] of descending probabilities are one number but for a runtime's rounding.

    Logits in float32 are good to some 1e-6 of their size; that much in a logit moves a probability by p (1 - p) of it.
    """
    sure = np.clip(descending, 1e-300, 1 - 1e-16)
    slack = NOISE * sure * (1 - sure) * (1 + np.abs(np.log(sure) - np.log1p(-sure)))
    near: NDArray[np.bool_] = descending[:-1] - descending[1:] <= slack[:-1]
    # Runs of near neighbours, each with the spread from its first to its last member.
    start = np.flatnonzero(near & ~np.append(False, near[:-1]))
    stop = np.flatnonzero(near & ~np.append(near[1:], False)) + 1
    long = descending[start] - descending[stop] > 2 * slack[start]
    inside = np.zeros(near.size + 1, dtype=np.int64)
    inside[start[long]], inside[stop[long]] = 1, -1
    near &= np.cumsum(inside)[:-1] == 0
    return near


@dataclass(frozen=True)
class ExitCounts:
    """Integer counts among exits at T thresholds; every array has shape [T]."""

    threshold: NDArray[np.float64]
    n_exited: NDArray[np.int64]
    n_positive: NDArray[np.int64]
    n_false_negative: NDArray[np.int64]
    n_correct: NDArray[np.int64]

    def row(self, index: int, n_rows: int, *, grid: bool) -> SweepRow:
        """Turn one threshold's counts into rates; undefined ones are None."""
        exited, positive = int(self.n_exited[index]), int(self.n_positive[index])
        missed, correct = int(self.n_false_negative[index]), int(self.n_correct[index])
        return SweepRow(
            threshold=float(self.threshold[index]),
            coverage=exited / n_rows,
            fnr_on_exited=missed / positive if positive else None,
            exit_accuracy=correct / exited if exited else None,
            n_exited=exited,
            n_positive_exited=positive,
            n_false_negative=missed,
            grid=grid,
        )


def count_exits(
    rows: Rows, score: NDArray[np.float64], at: ArrayLike | None = None, *, lowest: float, grid: Grid = "float64"
) -> ExitCounts:
    """Count exits of rows whose score is at or above each threshold, strictest first; NaN never exits.

    One sort and cumulative sums; rows of equal score exit together. Without ``at`` there is one
    threshold per distinct score, in the middle of the gap below it: as far as can be from every
    calibration row, so that a runtime's rounding does not flip one.

    Args:
        rows: whose exits.
        score: [N] what decides, higher is surer; at least one is not NaN.
        at: thresholds [T] to count at instead.
        lowest: lower end of the score's range, closes the last gap.
        grid: dtype that scores came in, which thresholds are numbers of.
    """
    order = ranked(score)
    descending, missed = score[order], rows.missed(rows.positive)[order]
    if at is None:
        last, threshold = gaps(descending, lowest, grid)
        n_exited = last + 1
    else:
        threshold = np.asarray(at, dtype=np.float64)
        n_exited = np.searchsorted(-descending, -threshold, side="right")

    def upto(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        counts: NDArray[np.int64] = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])[n_exited]
        return counts

    return ExitCounts(
        threshold=threshold,
        n_exited=n_exited.astype(np.int64),
        n_positive=upto(rows.is_class(rows.positive)[order]),
        n_false_negative=upto(missed),
        n_correct=upto(~rows.wrong[order]),
    )


def meets(part: NDArray[np.int64], whole: NDArray[np.int64], most: float) -> NDArray[np.bool_]:
    """Part / whole <= most, in integers: the float .02 is a little more than 2%, a product rounds. 0 / 0 is not met."""
    target = exact(most)
    kind = np.int64 if target.denominator * int(whole.max(initial=1)) < 2**62 else object
    counted = part.astype(kind) * target.denominator
    allowed = whole.astype(kind) * target.numerator
    met: NDArray[np.bool_] = np.asarray(counted <= allowed, dtype=bool) & (whole > 0)
    return met


def sweep_table(counts: ExitCounts, grid: ExitCounts, chosen: SweepRow, n_rows: int) -> list[SweepRow]:
    """Grid rows, evenly thinned sweep rows and the chosen one, laxest first."""
    total = counts.threshold.size
    kept = np.arange(total)
    if total > SWEEP_ROWS:
        kept = np.unique(np.linspace(0, total - 1, SWEEP_ROWS - 1).round().astype(np.int64))
    rows = [grid.row(index, n_rows, grid=True) for index in range(grid.threshold.size)]
    rows += [
        counts.row(int(index), n_rows, grid=False) for index in kept if counts.threshold[index] != chosen.threshold
    ]
    return sorted([*rows, chosen], key=lambda row: (row.threshold, not row.grid))
