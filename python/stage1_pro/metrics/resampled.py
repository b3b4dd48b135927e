"""Answers under many weights of their rows: what metrics that are no sums over sorted rows are measured on."""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

from stage1_pro.metrics.probabilistic import ECE_BINS, calibration_places, largest


class AnswerRows:
    """Rows by what they are, the score of the positive class first, so that row order never matters.

    ``order`` [N], which row stands where; ``probs`` [N, K], ``truth`` and ``answered`` class indices [N]. Rows of one
    truth, answer and confidence bin are one cell: its count is all that most metrics of answers need.

    Args:
        probs: [N, K], rows sum to 1.
        truth: [N] class indices.
        positive: index of the positive class; None where there is none.
    """

    def __init__(self, probs: NDArray[np.float64], truth: NDArray[np.int64], positive: int | None) -> None:
        n_classes = probs.shape[1]
        score = probs[:, 0 if positive is None else positive]
        self.order = np.lexsort((truth, *probs.T, score))
        self.probs, self.truth, score = probs[self.order], truth[self.order], score[self.order]
        self.answered, self.sure = largest(self.probs)
        self.positive = None if positive is None else self.truth == positive
        self.place = calibration_places(self.sure, bins=ECE_BINS)
        cells, self.cell = np.unique(
            (self.truth * n_classes + self.answered) * ECE_BINS + self.place, return_inverse=True
        )
        self.n_cells = cells.size
        self.cell_truth, self.cell_answer = np.divmod(cells // ECE_BINS, n_classes)
        self.bins, self.classes = np.eye(ECE_BINS)[cells % ECE_BINS], np.eye(n_classes)
        self.starts = np.append(0, np.flatnonzero(score[1:] != score[:-1]) + 1)


class Resampled:
    """One resample of ``rows``: how often each row is in it, [N] uint8, and what metrics are made of.

    ``right``, ``true`` and ``given`` [K]: right answers, rows and answers of each class.
    """

    def __init__(self, rows: AnswerRows, times: NDArray[np.uint8]) -> None:
        self.rows, self.times = rows, times
        self.weights = times.astype(np.float64)
        self._counts = np.bincount(rows.cell, self.weights, rows.n_cells)
        self._right = self._counts * (rows.cell_truth == rows.cell_answer)
        self.right, self.true, self.given = (
            part @ rows.classes[of]
            for part, of in (
                (self._right, rows.cell_truth),
                (self._counts, rows.cell_truth),
                (self._counts, rows.cell_answer),
            )
        )

    @functools.cached_property
    def confusion(self) -> NDArray[np.float64]:
        """Rows by class [K] and answer [K]."""
        return self.rows.classes[self.rows.cell_truth].T @ (
            self._counts[:, None] * self.rows.classes[self.rows.cell_answer]
        )

    def balanced_accuracy(self) -> float:
        """Mean recall over the classes that are there, in [0, 1]; higher is better."""
        there = self.true > 0
        return float(np.mean(self.right[there] / self.true[there]))

    def mcc(self) -> float:
        """Matthews correlation, in [-1, 1]; higher is better. NaN where one class is there, 0 for one answer to all."""
        n = self.true.sum()
        spread = (n * n - self.true @ self.true) * (n * n - self.given @ self.given)
        correlation = float((self.right.sum() * n - self.true @ self.given) / math.sqrt(spread)) if spread > 0 else 0.0
        return correlation if (self.true > 0).sum() > 1 else math.nan

    def ece(self) -> float:
        """Expected calibration error over bins of equal width, in [0, 1]; lower is better."""
        apart = np.bincount(self.rows.place, self.weights * self.rows.sure, ECE_BINS) - self._right @ self.rows.bins
        return float(np.abs(apart).sum() / self._counts.sum())

    def auroc(self) -> float:
        """P(a positive scores above another row), ties counted half, in [0, 1]; NaN where one of both is missing."""
        assert self.rows.positive is not None
        starts = self.rows.starts
        positives, rows = (self.times * self.rows.positive).astype(np.int64), self.times.astype(np.int64)
        if starts.size < self.times.size:
            positives, rows = (np.add.reduceat(each, starts) for each in (positives, rows))
        negatives = rows - positives
        through = np.cumsum(negatives)
        # A positive is above the negatives before its tie group, and half above those in it.
        above = int((positives * (2 * through - negatives)).sum())
        pairs = 2 * int(positives.sum()) * int(through[-1])
        return above / pairs if pairs else math.nan
