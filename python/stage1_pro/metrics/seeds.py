"""Arms of a comparison over several seeds: the mean over seeds, and paired differences by group. NumPy in, no torch.

A clip that is in ``val_select`` of several seeds is one clip: each resample draws a weight for every group of the data
set once, and this weight counts in every seed and every arm. What the seeds and arms have in common so cancels in
differences, and overlapping splits are not taken for new data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stage1_pro import native
from stage1_pro.errors import InputError
from stage1_pro.metrics.binomial import check_level
from stage1_pro.metrics.estimate import Estimate, Interval, Sizes
from stage1_pro.metrics.probabilistic import check_probabilities, largest, mcc_of_counts
from stage1_pro.metrics.selective import weighted_augrc
from stage1_pro.metrics.table import METRICS

# The measures of an arm.
ARM_METRICS = ("accuracy", "mcc", "augrc", "gate_augrc")
_CHUNK = 1 << 21
Floats = NDArray[np.float64]


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

    means: dict[str, Interval] = field(default_factory=dict)
    values: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    differences: dict[str, Interval] = field(default_factory=dict)
    seed_differences: dict[str, NDArray[np.float64]] = field(default_factory=dict)


def compare_seeds(
    arms: Mapping[str, Sequence[SeedRows]], *, n_replicates: int = 2000, level: float = 0.95, seed: int = 0
) -> dict[str, ArmIntervals]:
    """Accuracy, MCC, AUGRC by max softmax and by the gate of every arm, and of every arm minus the first.

    Percentile intervals of means over seeds, from resamples of whole groups that all seeds and arms share; differences
    by Student's t over groups, as in ``compare``. They speak of other groups, for models like these: how much another
    training seed changes a model is the spread over seeds, which is beside them and not in them.

    Args:
        arms: name to the rows of every seed; the same seeds, rows and labels in the same order in every arm.
        n_replicates: resamples.
        level: nominal coverage, in (0, 1).
        seed: of the resamples.

    Raises:
        InputError: no arm or seed, rows that differ between arms, or values that are no probabilities.
    """
    check_level(level)
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
    size = max(1, _CHUNK // max(*np.diff(sizes), n_units))
    for start in range(0, n_replicates, size):
        count = min(size, n_replicates - start)
        weights = native.resample_counts([n_units], count, first=start, seed=seed).astype(np.float64)
        for name, found in measure(weights).items():
            parts[name].append(found.mean(axis=0))
    drawn = {name: np.concatenate(found, axis=1) for name, found in parts.items()}

    influence = {name: [one.influence() for one in seeds] for name, seeds in ranked.items()}
    worth = Sizes.of(units)

    def interval(metric: str, value: float, replicates: NDArray[np.float64], apart: Floats | None = None) -> Interval:
        scale = max(abs(value), float(np.nanmax(np.abs(replicates), initial=0.0)))
        one = Estimate(METRICS[metric], value, replicates, n_units, scale=scale, sizes=worth)
        if apart is None:
            return one.interval(level, "percentile", "groups")
        return one.with_influence(apart).interval(level, "bca", "groups")

    result = {}
    for name, own in plain.items():
        result[name] = arm = ArmIntervals()
        apart, drawn_apart = own - plain[first_name], drawn[name] - drawn[first_name]
        for i, metric in enumerate(ARM_METRICS):
            arm.values[metric] = own[:, i]
            arm.means[metric] = interval(metric, float(own[:, i].mean()), drawn[name][i])
            if name != first_name:
                by_unit = sum(
                    np.bincount(unit, mine[i] - its[i], n_units)
                    for unit, mine, its in zip(unit_of, influence[name], influence[first_name], strict=True)
                )
                arm.seed_differences[metric] = apart[:, i]
                arm.differences[metric] = interval(
                    metric, float(apart[:, i].mean()), drawn_apart[i], np.asarray(by_unit) / len(first)
                )
    return result


class _Ranked:
    """One arm's rows of one seed, sorted once by each score, to be measured under many weights."""

    def __init__(self, rows: SeedRows) -> None:
        probs, truth = check_probabilities(rows.probs, rows.labels)
        answered, sure = largest(probs)
        self._wrong = (answered != truth).astype(np.float64)
        classes = np.eye(probs.shape[1])
        self._true, self._given = classes[truth], classes[answered]
        gate = np.asarray(rows.gate, dtype=np.float64)
        if gate.shape != truth.shape or np.isnan(gate).any():
            raise InputError(f"gate must be numbers of shape [{truth.size}], got shape {list(gate.shape)} or NaN in it")
        self._truth, self._answered = truth, answered
        self._orders = [native.order(score, answered != truth) for score in (sure, gate)]

    def measure(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Metrics [4, B] in the order of ``ARM_METRICS`` under weights [B, N]; NaN where no row counts."""
        total = weights.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            right = total - weights @ self._wrong
            mcc = np.where(total > 0, mcc_of_counts(right, weights @ self._true, weights @ self._given), np.nan)
            areas = [weighted_augrc(weights, self._wrong, *order) for order in self._orders]
            return np.stack([right / total, mcc, *areas])

    def influence(self) -> Floats:
        """Derivative of each metric along the weight of every row [4, N]."""
        n = self._wrong.size
        right = (1 - self._wrong).sum()
        areas = []
        for order, ends in self._orders:
            area = np.empty(n)
            area[order] = native.augrc_influence(self._wrong[order], ends)
            areas.append(area)
        true, given = self._true.sum(axis=0), self._given.sum(axis=0)
        true_apart, given_apart = n * n - true @ true, n * n - given @ given
        spread = math.sqrt(true_apart * given_apart)
        mcc = np.zeros(n)
        if spread > 0:
            value = (right * n - true @ given) / spread
            of_true, of_given = true[self._truth], given[self._answered]
            mcc = ((1 - self._wrong) * n + right - given[self._truth] - true[self._answered]) / spread
            mcc -= value * ((n - of_true) / true_apart + (n - of_given) / given_apart)
        return np.stack([(1 - self._wrong - right / n) / n, mcc, *areas])
