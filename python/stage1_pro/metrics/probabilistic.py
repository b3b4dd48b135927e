"""Metrics of answers and probabilities, of rows and of their resamples, in NumPy alone: the base install has no
scikit-learn (the tests' judge).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro.arguments import binary, floats, indices, sum_slack, whole
from stage1_pro.errors import InputError
from stage1_pro.metrics.binomial import binomial_ends

# -log of it is 708.4: a certain and wrong answer costs much, but the mean stays a number.
ECE_BINS = 15
# Up to so many columns a loop over them beats a reduction over rows.
_FEW_CLASSES = 8
_SMALLEST = float(np.finfo(np.float64).tiny)


def accuracy(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Share of right answers, in [0, 1]; higher is better. Both are class indices [N]."""
    answers, truth = _answers(predicted, labels)
    return float(np.mean(answers == truth))


def balanced_accuracy(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Mean recall over the classes that occur in ``labels``, in [0, 1]; higher is better. Both are indices [N]."""
    answers, truth = _answers(predicted, labels)
    return float(np.mean([np.mean(answers[truth == name] == name) for name in np.unique(truth)]))


def mcc(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Matthews correlation of any number of classes, in [-1, 1]; 0 is chance, higher is better. Both are indices [N].

    0 when all answers or all labels are of one class (Gorodkin 2004 leaves it undefined; 0 is the usual reading).
    """
    answers, truth = _answers(predicted, labels)
    names, codes = np.unique([truth, answers], return_inverse=True)
    true, given = (np.bincount(each, minlength=names.size).astype(np.float64) for each in codes.reshape(2, -1))
    return float(mcc_of_counts(np.count_nonzero(answers == truth), true, given))


def mcc_of_counts(right: ArrayLike, true: NDArray[np.float64], given: NDArray[np.float64]) -> NDArray[np.float64]:
    """``mcc`` from right answers [...], rows of each class and answers of each class [..., K]; all zeros give 0."""
    n = true.sum(axis=-1)
    spread = (n * n - (true * true).sum(axis=-1)) * (n * n - (given * given).sum(axis=-1))
    apart = np.asarray(right) * n - (true * given).sum(axis=-1)
    return np.where(spread > 0, apart / np.sqrt(np.where(spread > 0, spread, 1.0)), 0.0)


def auroc(score: ArrayLike, positive: ArrayLike) -> float:
    """P(a positive scores above a negative), ties counted half, in [0, 1]; higher is better; NaN with one class only.

    Args:
        score: [N], higher is more positive.
        positive: [N] booleans.
    """
    scores, truth = scored(score, positive)
    n_positive, n_negative = int(truth.sum()), int((~truth).sum())
    if n_positive == 0 or n_negative == 0:
        return float("nan")
    _, place, tied = np.unique(scores, return_inverse=True, return_counts=True)
    # Twice the mean rank of a tie group, in integers: the same bits for any order of the rows.
    twice_rank = 2 * np.cumsum(tied) - tied + 1
    above = int(twice_rank[place[truth]].sum()) - n_positive * (n_positive + 1)
    return above / (2 * n_positive * n_negative)


def scored(score: ArrayLike, positive: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Give scores [N] without NaN and which rows are positive [N], at least one row; InputError for others."""
    scores, truth = floats("score", score), binary("positive", positive)
    _one_shape("score", scores, "positive", truth)
    _no_nan("score", scores)
    return scores, truth


def nll(probs: ArrayLike, labels: ArrayLike) -> float:
    """Mean negative log likelihood in nats, at least 0; lower is better.

    A probability of 0 counts as the smallest normal number, so one row costs at most 708.4.

    Args:
        probs: [N, K], rows sum to 1.
        labels: [N] class indices 0..K-1.
    """
    values, truth = check_probabilities(probs, labels)
    return float(np.mean(nll_rows(values, truth)))


def nll_rows(probs: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Negative log likelihood of each row [N], of checked arguments."""
    if probs.shape[1] == 2:
        likelihood = np.where(labels == 1, probs[:, 1], probs[:, 0])
    else:
        likelihood = probs[np.arange(labels.size), labels]
    return np.asarray(-np.log(np.maximum(likelihood, _SMALLEST)), dtype=np.float64)


def brier(probs: ArrayLike, labels: ArrayLike) -> float:
    """Mean squared distance of probabilities from the truth; lower is better.

    For two classes mean (p − y)² of one of them, in [0, 1] (Brier's sum is twice that); for more the sum over
    classes, in [0, 2]: scikit-learn's ``scale_by_half="auto"``. Arguments as in ``nll``.
    """
    values, truth = check_probabilities(probs, labels)
    return float(np.mean(brier_rows(values, truth)))


def brier_rows(probs: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Brier score of each row [N], of checked arguments; halved for two classes."""
    n_classes = probs.shape[1]
    if n_classes == 2:
        return np.asarray((probs[:, 0] - (labels == 0)) ** 2 + (probs[:, 1] - (labels == 1)) ** 2) / 2
    at_label = probs[np.arange(labels.size), labels]
    return np.asarray((probs**2).sum(1) - at_label**2 + (1 - at_label) ** 2, dtype=np.float64)


def largest(probs: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The first class of largest probability and that probability, [N] each; faster than NumPy for few classes."""
    if probs.shape[1] > _FEW_CLASSES:
        return probs.argmax(axis=1), probs.max(axis=1)
    if probs.shape[1] == 2:
        return (probs[:, 1] > probs[:, 0]).astype(np.int64), np.maximum(probs[:, 0], probs[:, 1])
    best, value = np.zeros(probs.shape[0], dtype=np.int64), probs[:, 0].copy()
    for name in range(1, probs.shape[1]):
        better = probs[:, name] > value
        best[better] = name
        value[better] = probs[better, name]
    return best, value


def _across(ufunc: np.ufunc, values: NDArray[Any]) -> NDArray[Any]:
    """Reduce [N, K] over K; column by column for few classes, where NumPy's own reduction is slow."""
    if values.shape[1] > _FEW_CLASSES:
        return np.asarray(ufunc.reduce(values, axis=1))
    return np.asarray(functools.reduce(ufunc, values.T))


def ece(probs: ArrayLike, labels: ArrayLike, *, bins: int = ECE_BINS) -> float:
    """Expected calibration error of the answer's confidence, in [0, 1]; 0 is as sure as right, lower is better.

    Σ over bins of (rows in the bin / rows) · |share right − mean confidence|, with ``bins`` bins of equal width
    ((k − 1)/bins, k/bins] over [0, 1] and the largest probability as confidence (Guo et al., "On Calibration of Modern
    Neural Networks", ICML 2017). It says nothing of the other classes' probabilities, and grows with ``bins`` on few
    rows. Other arguments as in ``nll``.
    """
    values, truth = check_probabilities(probs, labels)
    whole("bins", bins, 1, 10**6)
    count, sure, right = calibration_bins(values.max(axis=1), values.argmax(axis=1) == truth, bins=bins)
    kept = count > 0
    return float(np.sum(count[kept] * np.abs(sure[kept] - right[kept])) / truth.size)


def calibration_places(confidence: NDArray[np.float64], *, bins: int) -> NDArray[np.intp]:
    """Which of ``bins`` equal bins (low, high] over [0, 1] each confidence [N] is in."""
    edges = np.arange(bins + 1) / bins
    return np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)


def calibration_bins(
    confidence: ArrayLike, correct: ArrayLike, *, bins: int = ECE_BINS
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Rows, mean confidence and share right of each of ``bins`` equal bins (low, high] over [0, 1]; NaN where empty.

    Args:
        confidence: [N] in [0, 1].
        correct: bool [N].
        bins: how many, at least 1.
    """
    sure, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    _one_shape("confidence", sure, "correct", right)
    _no_nan("confidence", sure)
    place = calibration_places(sure, bins=bins)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(place, values, bins) / count for values in (sure, right)]
    return count, means[0], means[1]


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
        cell = (self.truth * n_classes + self.answered) * ECE_BINS + self.place
        cells, self.cell = np.unique(cell, return_inverse=True)
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
        of_truth, of_answer = rows.classes[rows.cell_truth], rows.classes[rows.cell_answer]
        self.right, self.true, self.given = self._right @ of_truth, self._counts @ of_truth, self._counts @ of_answer

    def balanced_accuracy(self) -> float:
        """Mean recall over the classes that are there, in [0, 1]; higher is better."""
        there = self.true > 0
        return float(np.mean(self.right[there] / self.true[there]))

    def mcc(self) -> float:
        """Matthews correlation, in [-1, 1]; higher is better. NaN where one class is there, 0 for one answer to all."""
        return float(mcc_of_counts(self.right.sum(), self.true, self.given)) if (self.true > 0).sum() > 1 else math.nan

    def ece(self) -> float:
        """Expected calibration error over bins of equal width, in [0, 1]; lower is better."""
        return float(np.abs(self._apart()).sum() / self._counts.sum())

    def bins_apart(self) -> NDArray[np.float64]:
        """What each bin adds to the ECE, with its sign: confidence less right answers, over all rows [bins]."""
        return np.asarray(self._apart() / self._counts.sum(), dtype=np.float64)

    def _apart(self) -> NDArray[np.float64]:
        sure = np.bincount(self.rows.place, self.weights * self.rows.sure, ECE_BINS)
        return np.asarray(sure - self._right @ self.rows.bins, dtype=np.float64)

    def ece_reach(self, level: float, unit: NDArray[np.integer] | None) -> tuple[float, float]:
        """How far below and above the ECE its truth can be by Clopper and Pearson's ends of every bin's share right.

        Bins err apart, so their distances add in squares (Zou and Donner 2008). Rows of one ``unit`` [N] count as
        near-copies, (sum s)^2 / sum s^2 of them.
        """
        place, tail = self.rows.place, (1 - level) / 2
        count, right = np.bincount(place, self.weights, ECE_BINS), self._right @ self.rows.bins
        there = count > 0
        trials, share = count[there].astype(np.float64), right[there] / count[there]
        if unit is not None:
            bins, sizes = np.unique(np.stack([place, unit]), axis=1, return_counts=True)
            trials = trials**2 / np.bincount(bins[0], sizes.astype(np.float64) ** 2, ECE_BINS)[there]
        sure = share + self._apart()[there] / count[there]
        ends = [binomial_ends(share * trials, trials, tail, upper=upper) for upper in (False, True)]
        far = np.maximum(np.abs(ends[0] - sure), np.abs(ends[1] - sure))
        near = np.maximum(np.maximum(ends[0] - sure, sure - ends[1]), 0)
        weight, apart = count[there] / count.sum(), np.abs(sure - share)
        below, above = (float(np.linalg.norm(weight * (end - apart))) for end in (near, far))
        return below, above

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


def _answers(predicted: ArrayLike, labels: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    answers, truth = indices("predicted", predicted), indices("labels", labels)
    _one_shape("predicted", answers, "labels", truth)
    return answers, truth


def check_probabilities(probs: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Give probabilities [N, K] and labels [N] that can be trusted; raise InputError naming the first wrong row."""
    values = floats("probs", probs)
    if values.ndim != 2 or values.shape[1] < 2:
        raise InputError(
            f"probs must have shape [N, K] with K at least 2, got {list(values.shape)}; one column per class"
        )
    truth = indices("labels", labels, n_classes=values.shape[1])
    _one_shape("probs", values[:, 0], "labels", truth)
    with np.errstate(invalid="ignore"):
        off = (_across(np.minimum, values) < 0) | ~(np.abs(_across(np.add, values) - 1) <= sum_slack(probs))
    if off.any():
        # A NaN is off as well.
        _no_nan("probs", values)
        row = int(off.argmax())
        raise InputError(
            f"probs must be non-negative rows that sum to 1, got {values[row].tolist()} at row {row}; "
            "logits need a softmax first"
        )
    return values, truth


def _one_shape(first_name: str, first: NDArray[Any], second_name: str, second: NDArray[Any]) -> None:
    if first.ndim != 1 or second.shape != first.shape or first.size == 0:
        raise InputError(
            f"{first_name} and {second_name} must have one value per row and at least one row, got shapes "
            f"{list(first.shape)} and {list(second.shape)}; a metric of no rows is undefined"
        )


def _no_nan(name: str, values: NDArray[np.float64]) -> None:
    missing = np.isnan(values) if values.ndim == 1 else _across(np.logical_or, np.isnan(values))
    if missing.any():
        raise InputError(f"{name} must not be NaN, got NaN at row {int(missing.argmax())}; drop or mend the row")
