"""Arms of a comparison over several seeds: the mean over seeds, and paired differences by group. NumPy in, no torch.

A clip that is in ``val_select`` of several seeds is one clip: each resample draws a weight for every group of the data
set once, and this weight counts in every seed and every arm. What the seeds and arms have in common so cancels in
differences, and overlapping splits are not taken for new data.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro import native
from stage1_pro.errors import InputError
from stage1_pro.metrics.estimate import Interval
from stage1_pro.metrics.intervals import percentile_interval
from stage1_pro.metrics.probabilistic import check_probabilities, largest

# The measures of an arm.
ARM_METRICS = ("accuracy", "mcc", "augrc", "gate_augrc")
_CHUNK = 1 << 21


@dataclass(frozen=True)
class SeedRows:
    """What one arm answers on one seed's rows.

    ``probs`` [N, K] of Stage A; ``gate`` [N], higher is surer; ``labels`` [N]; ``groups`` [N] names that mean the same
    in every seed.
    """

    probs: NDArray[np.float64]
    gate: NDArray[np.float64]
    labels: NDArray[np.int64]
    groups: NDArray[np.str_]


@dataclass(frozen=True)
class ArmIntervals:
    """One arm: every metric's mean over seeds with its interval, its value in each seed, and what it is against.

    ``differences`` are this arm minus the first one, and ``seed_differences`` [S] those in each seed; empty for the
    first arm itself.
    """

    means: Mapping[str, Interval]
    values: Mapping[str, NDArray[np.float64]]
    differences: Mapping[str, Interval]
    seed_differences: Mapping[str, NDArray[np.float64]]


def compare_seeds(
    arms: Mapping[str, Sequence[SeedRows]], *, n_replicates: int = 2000, level: float = 0.95, seed: int = 0
) -> dict[str, ArmIntervals]:
    """Accuracy, MCC, AUGRC by max softmax and by the gate of every arm, and of every arm minus the first.

    Percentile intervals of means over seeds, from resamples of whole groups that all seeds and arms share. They speak
    of other groups, for models like these: how much another training seed changes a model is the spread over seeds,
    which is beside them and not in them.

    Args:
        arms: name to the rows of every seed; the same seeds, rows and labels in the same order in every arm.
        n_replicates: resamples.
        level: nominal coverage, in (0, 1).
        seed: of the resamples.

    Raises:
        InputError: no arm or seed, rows that differ between arms, or values that are no probabilities.
    """
    if not arms or not all(arms.values()):
        raise InputError(f"arms must hold one arm with one seed or more, got {len(arms)} arms; name what to compare")
    first_name, first = next(iter(arms.items()))
    for name, seeds in arms.items():
        if len(seeds) != len(first):
            raise InputError(
                f"arms must have the same seeds, got {len(first)} of {first_name} and {len(seeds)} of {name}"
            )
        for k, (one, other) in enumerate(zip(first, seeds, strict=True)):
            if not (np.array_equal(one.labels, other.labels) and np.array_equal(one.groups, other.groups)):
                raise InputError(
                    f"arms must answer the same rows, got others in seed number {k} of {first_name} and {name}"
                )
    sizes = np.cumsum([0, *(len(rows.labels) for rows in first)])
    units = native.cluster_numbers(np.concatenate([rows.groups for rows in first]), int(sizes[-1]))
    n_units = int(units.max()) + 1
    unit_of = [units[a:b] for a, b in itertools.pairwise(sizes)]
    ranked = {name: [_Ranked(rows) for rows in seeds] for name, seeds in arms.items()}

    def measure(weights: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Metrics [S, M, B] of every arm under weights of the units [B, units]."""
        return {
            name: np.stack([one.measure(weights[:, unit]) for one, unit in zip(seeds, unit_of, strict=True)])
            for name, seeds in ranked.items()
        }

    plain = {name: found[:, :, 0] for name, found in measure(np.ones((1, n_units))).items()}
    parts: dict[str, list[NDArray[np.float64]]] = {name: [] for name in arms}
    for weights in _resamples(n_units, max(np.diff(sizes)), n_replicates, seed):
        for name, found in measure(weights).items():
            parts[name].append(found.mean(axis=0))
    drawn = {name: np.concatenate(found, axis=1) for name, found in parts.items()}

    def interval(value: float, replicates: NDArray[np.float64]) -> Interval:
        return percentile_interval(value, replicates, level=level, n_units=n_units, unit="groups")

    result = {}
    for name in arms:
        own, base = plain[name], plain[first_name]
        metrics = list(enumerate(ARM_METRICS))
        others = [] if name == first_name else metrics
        result[name] = ArmIntervals(
            means={m: interval(float(own[:, i].mean()), drawn[name][i]) for i, m in metrics},
            values={m: own[:, i] for i, m in metrics},
            differences={
                m: interval(float((own[:, i] - base[:, i]).mean()), drawn[name][i] - drawn[first_name][i])
                for i, m in others
            },
            seed_differences={m: own[:, i] - base[:, i] for i, m in others},
        )
    return result


def _resamples(n_units: int, rows: int, n_replicates: int, seed: int) -> Iterator[NDArray[np.float64]]:
    size = max(1, _CHUNK // max(rows, n_units))
    for first in range(0, n_replicates, size):
        count = min(size, n_replicates - first)
        yield native.resample_counts([n_units], count, first=first, seed=seed).astype(np.float64)


class _Ranked:
    """One arm's rows of one seed, sorted once by each score, to be measured under many weights."""

    def __init__(self, rows: SeedRows) -> None:
        probs, truth = check_probabilities(rows.probs, rows.labels)
        answered, sure = largest(probs)
        self._wrong = (answered != truth).astype(np.float64)
        classes = np.eye(probs.shape[1])
        self._true, self._given = classes[truth], classes[answered]
        self._orders = [native.order(score, answered != truth) for score in (sure, _scores(rows.gate, truth))]

    def measure(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Metrics [4, B] in the order of ``ARM_METRICS`` under weights [B, N]; NaN where no row counts."""
        total = weights.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            right = total - weights @ self._wrong
            return np.stack([
                right / total,
                _mcc(right, total, weights @ self._true, weights @ self._given),
                *(self._augrc(weights, *order) for order in self._orders),
            ])  # fmt: skip

    def _augrc(
        self, weights: NDArray[np.float64], order: NDArray[np.uint32], ends: NDArray[np.uint32]
    ) -> NDArray[np.float64]:
        """``metrics.augrc`` with many weights at once, [B]: a sum over tie groups."""
        at = ends.astype(np.int64) - 1
        ranked = weights[:, order]
        rows = np.cumsum(ranked, axis=1)[:, at]
        errors = np.cumsum(ranked * self._wrong[order], axis=1)[:, at]
        both = errors.copy()
        both[:, 1:] += errors[:, :-1]
        area: NDArray[np.float64] = (np.diff(rows, prepend=0, axis=1) * both).sum(axis=1) / (2 * rows[:, -1] ** 2)
        return area


def _mcc(
    right: NDArray[np.float64], total: NDArray[np.float64], true: NDArray[np.float64], given: NDArray[np.float64]
) -> NDArray[np.float64]:
    """``metrics.mcc`` of resamples [B], from their right answers, rows, and rows and answers of each class [B, K]."""
    spread = (total**2 - (true**2).sum(axis=1)) * (total**2 - (given**2).sum(axis=1))
    found = (right * total - (true * given).sum(axis=1)) / np.sqrt(np.maximum(spread, 0))
    # As for whole rows: 0 when all answers or all labels are of one class.
    return np.where(total > 0, np.where(spread > 0, found, 0.0), np.nan)


def _scores(gate: ArrayLike, truth: NDArray[np.int64]) -> NDArray[np.float64]:
    scores = np.asarray(gate, dtype=np.float64)
    if scores.shape != truth.shape or np.isnan(scores).any():
        raise InputError(f"gate must be numbers of shape [{truth.size}], got shape {list(scores.shape)} or NaN in it")
    return scores
