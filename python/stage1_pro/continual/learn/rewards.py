"""Rewards of actions on rows whose label is known, and rewards of whole sets.

A classifier with a gate is a contextual bandit: on every image it takes one action, EXIT with class k, DEFER or
ABSTAIN, and gets one reward. NumPy, no torch. Rewards need true labels: every label carries its source, and labels by a
model or by a mere match are refused here, for every objective. Rewarding agreement with a model teaches its mistakes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from stage1_pro.errors import InputError
from stage1_pro.record import Record

# Sources of a label that a reward may be paid on, the most trusted first.
PAID = ("owner", "review")
UNPAID = ("match", "model")
NOBODY = -1

Counted = NDArray[np.float64]
# Reward of a set from its counts of true and false positives, false and true negatives, each of any one shape.
SetReward = Callable[[Counted, Counted, Counted, Counted], Counted]


class RewardSpec(Record):
    """What each action earns on an image whose label is known.

    A right answer earns ``right``. A wrong one costs ``k_fn`` where the truth is the positive class, else ``k_fp``.
    DEFER earns what Stage B's answer earns, less ``defer_cost``; ABSTAIN ``guess`` (what no answer is worth, such as a
    fixed fallback's mean reward) less ``abstain_cost``.
    """

    right: float = 1.0
    k_fp: float = Field(3.5, ge=0, description="what a wrong answer costs on an image that is not positive")
    k_fn: float = Field(3.5, ge=0, description="what a wrong answer costs on a positive image")
    defer_cost: float = Field(0.05, ge=0, description="price of Stage B")
    guess: float = Field(0.0, description="reward of an image that nobody answers, before its price")
    abstain_cost: float = Field(0.25, ge=0, description="price of no answer")


@dataclass(frozen=True)
class Verified:
    """Labels that a reward may be paid on: indices [N] of ``classes``, and the source of each [N].

    Raises:
        InputError: a source other than owner or review, a label that is no class, or a positive class that is none.
    """

    labels: NDArray[np.int64]
    sources: NDArray[np.str_]
    classes: tuple[str, ...]
    positive: str | None

    def __post_init__(self) -> None:
        n = self.labels.size
        if self.labels.ndim != 1 or self.sources.shape != (n,):
            raise InputError(
                f"labels and sources must have shape [N], got {list(self.labels.shape)} and {list(self.sources.shape)}"
            )
        unpaid = np.flatnonzero(~np.isin(self.sources, PAID))
        if unpaid.size:
            raise InputError(
                f"sources must be {' or '.join(PAID)} for a reward, got '{self.sources[unpaid[0]]}' at row "
                f"{unpaid[0]}; a pseudo-label teaches its own mistakes: leave the row out or have it reviewed"
            )
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.classes)))
        if outside.size:
            raise InputError(
                f"labels must be from 0 to {len(self.classes) - 1}, got {self.labels[outside[0]]} at row {outside[0]}"
            )
        if self.positive is not None and self.positive not in self.classes:
            raise InputError(f"positive must be one of {', '.join(self.classes)}, got '{self.positive}'")

    @property
    def is_positive(self) -> NDArray[np.bool_]:
        """Which rows [N] are of the positive class; none where there is no such class."""
        return np.equal(self.labels, -1 if self.positive is None else self.classes.index(self.positive))

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Verified:
        """Some of the rows."""
        return Verified(self.labels[rows], self.sources[rows], self.classes, self.positive)


def verified(
    labels: ArrayLike, sources: str | Sequence[str], *, classes: Sequence[str], positive: str | None
) -> Verified:
    """Labels that may be rewarded.

    Args:
        labels: class indices [N].
        sources: of all labels, or of each [N].
        classes: names, in the order of the indices.
        positive: name of the positive class; None: there is none, and every wrong answer costs alike.

    Raises:
        InputError: as ``Verified``; above all a source such as ``model`` or ``match``.
    """
    given = np.asarray(labels)
    if given.dtype.kind not in "iu" and given.size:
        raise InputError(f"labels must be class indices, got {given.dtype}; look them up in classes")
    indices = given.astype(np.int64)
    named = [sources] * indices.size if isinstance(sources, str) else [str(source) for source in sources]
    return Verified(indices, np.asarray(named, dtype=np.str_), tuple(map(str, classes)), positive)


@dataclass(frozen=True)
class Actions:
    """What a cascade did: ``answers`` [N] class indices, -1 where nobody answered; ``deferred`` [N]: Stage B ran."""

    answers: NDArray[np.int64]
    deferred: NDArray[np.bool_]

    def __post_init__(self) -> None:
        if self.answers.ndim != 1 or self.deferred.shape != self.answers.shape:
            raise InputError(
                f"answers and deferred must have shape [N], got {list(self.answers.shape)} and "
                f"{list(self.deferred.shape)}"
            )

    def differ(self, other: Actions) -> NDArray[np.bool_]:
        """The rows [N] on which two cascades did not do the same; the others need no label to compare them."""
        return np.asarray((self.answers != other.answers) | (self.deferred != other.deferred), dtype=bool)


def action_rewards(spec: RewardSpec, truth: Verified, answers_b: ArrayLike) -> NDArray[np.float64]:
    """Reward of every action on every row, [N, K + 2]: EXIT with class 0..K-1, DEFER, ABSTAIN.

    Args:
        spec: what actions earn.
        truth: labels, N rows.
        answers_b: [N] Stage B's answers as class indices; -1 where it would not answer.

    Raises:
        InputError: another number of answers, or one that is no class.
    """
    answers, classes = np.asarray(answers_b, dtype=np.int64), len(truth.classes)
    _check_answers("answers_b", answers, truth)
    each = np.tile(np.arange(classes), (truth.labels.size, 1))
    exits = _answered(spec, truth, each)
    abstain = np.full((truth.labels.size, 1), spec.guess - spec.abstain_cost)
    of_b = np.where(answers == NOBODY, abstain[:, 0], _answered(spec, truth, answers[:, None])[:, 0])
    return np.concatenate([exits, (of_b - spec.defer_cost)[:, None], abstain], axis=1)


def earned(spec: RewardSpec, truth: Verified, decisions: Actions) -> NDArray[np.float64]:
    """What a cascade's decisions earned on every row, [N]; higher is better.

    Raises:
        InputError: other rows than those of the labels.
    """
    _check_answers("decisions.answers", decisions.answers, truth)
    answered = _answered(spec, truth, decisions.answers[:, None])[:, 0]
    base = np.where(decisions.answers == NOBODY, spec.guess - spec.abstain_cost, answered)
    return np.asarray(base - spec.defer_cost * decisions.deferred, dtype=np.float64)


def _answered(spec: RewardSpec, truth: Verified, answers: NDArray[np.int64]) -> NDArray[np.float64]:
    cost = np.where(truth.is_positive, spec.k_fn, spec.k_fp)[:, None]
    return np.where(answers == truth.labels[:, None], spec.right, -cost).astype(np.float64)


def _check_answers(name: str, answers: NDArray[np.int64], truth: Verified) -> None:
    if answers.shape != truth.labels.shape:
        raise InputError(f"{name} must have shape {list(truth.labels.shape)} as labels, got {list(answers.shape)}")
    if answers.size and not (answers.min() >= NOBODY and answers.max() < len(truth.classes)):
        raise InputError(f"{name} must be from -1 (nobody) to {len(truth.classes) - 1}, got others")


# -------------------------------------------------------------------------------- sets


def mcc_reward(tp: ArrayLike, fp: ArrayLike, fn: ArrayLike, tn: ArrayLike) -> NDArray[np.float64]:
    """Matthews' correlation of sets from their counts, in [-1, 1], higher is better; 0 where it is undefined."""
    a, b, c, d = (np.asarray(count, dtype=np.float64) for count in (tp, fp, fn, tn))
    spread = (a + b) * (a + c) * (d + b) * (d + c)
    return np.where(spread > 0, (a * d - b * c) / np.sqrt(np.where(spread > 0, spread, 1.0)), 0.0)


def validator_reward(tp: ArrayLike, fp: ArrayLike, fn: ArrayLike, tn: ArrayLike) -> NDArray[np.float64]:
    """StreetVision's score of sets from their counts, in [0, 1]: (max(0, MCC) / 2 + accuracy / 2) cubed.

    The subnet takes MCC over the last 100 rounds and accuracy over the last 10; a set stands for both here.
    """
    a, b, c, d = (np.asarray(count, dtype=np.float64) for count in (tp, fp, fn, tn))
    n = a + b + c + d
    accuracy = (a + d) / np.where(n > 0, n, 1.0)
    return np.asarray((0.5 * np.maximum(0.0, mcc_reward(a, b, c, d)) + 0.5 * accuracy) ** 3, dtype=np.float64)


def difference_rewards(said_positive: ArrayLike, is_positive: ArrayLike, reward: SetReward) -> NDArray[np.float64]:
    """R(row i says positive, others as they are) - R(row i says negative, ...) for every row, [..., N].

    The marginal worth of a row's answer to its set, in O(N): rows of one label and one answer share it. It is the
    factor of the row's gradient: dE[R] = sum of dp_i E[difference_i], as the other rows do not depend on i's answer.

    Args:
        said_positive: [..., N] answers of one set, or of many draws of it.
        is_positive: [N] truth.
        reward: of a set from its counts.

    Raises:
        InputError: other shapes.
    """
    said, truth = np.asarray(said_positive, dtype=bool), np.asarray(is_positive, dtype=bool)
    if said.ndim == 0 or truth.ndim != 1 or said.shape[-1] != truth.size:
        raise InputError(
            f"said_positive must have shape [..., {truth.size}] as is_positive, got {list(said.shape)}; same rows"
        )
    tp, fp = ((said & rows).sum(-1, keepdims=True).astype(np.float64) for rows in (truth, ~truth))
    positives, negatives = float(truth.sum()), float((~truth).sum())
    # Of the others, that is without row i.
    tp_i, fp_i = tp - (said & truth), fp - (said & ~truth)
    up = (tp_i + truth, fp_i + ~truth)
    down = (tp_i, fp_i)
    one, none = (reward(t, f, positives - t, negatives - f) for t, f in (up, down))
    return np.asarray(one - none, dtype=np.float64)
