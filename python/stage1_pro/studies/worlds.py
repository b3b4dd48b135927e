"""Worlds that ``stage1 plan`` draws calibrations from: a stated curve of errors, or rows that a model has answered.

A world gives ``rows(n, rng)``: n units that certify and two thirds as many that fix the order, as ``val_calib`` and
``val_select`` have them by default. More units from the same seed begin with the same ones, so that powers of different
n share their noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray
from scipy.special import logit

from stage1_pro.policies.rows import Rows

_PATTERN = np.array(["certify", "fit", "certify", "fit", "certify"])


def parts(n: int) -> NDArray[np.str_]:
    """``certify`` or ``fit`` of every unit [N], of which n certify and at least one does not."""
    rounds, rest = divmod(n, 3)
    return np.resize(_PATTERN, max(5 * rounds + (0, 1, 3)[rest], 2))


class World(Protocol):
    """Where calibration rows come from."""

    def rows(self, n: int, rng: np.random.Generator) -> Rows:
        """Rows of ``n`` units that certify, and of others."""


@dataclass(frozen=True)
class Stated:
    """Answers whose error among the surest share c is ``error`` (c / ``coverage``)^``growth``, up to ``lost``.

    An answer at depth u of the ranking, uniform in (0, 1), is wrong with chance d/dc of c times that, at most 1; its
    class does not depend on it. Gate and probabilities rank alike.
    """

    error: float
    coverage: float
    growth: float
    shares: Sequence[float]  # of classes, the positive one last

    @property
    def lost(self) -> float:
        """Depth of the ranking from which every answer is wrong, as a chance is no more than 1; 1: there is none."""
        steep = self.error * (self.growth + 1)
        return 1.0 if steep == 0 or self.growth == 0 else min(1.0, self.coverage * steep ** (-1 / self.growth))

    def __str__(self) -> str:
        """What is assumed, in words."""
        said = f"of the surest share c of answers {self.error:g} (c / {self.coverage:g})^{self.growth:g} are wrong"
        return said + (", and no more" if self.lost == 1 else f", up to c = {self.lost:.3g}; all the others are wrong")

    def rows(self, n: int, rng: np.random.Generator) -> Rows:
        """See the module."""
        halves = parts(n)
        depth, chance, kind = np.maximum(rng.random((halves.size, 3)), 1e-12).T
        with np.errstate(over="ignore", invalid="ignore"):  # 0 of infinity is no error
            wrong = chance < self.error * (self.growth + 1) * (depth / self.coverage) ** self.growth
        k = len(self.shares)
        labels = np.minimum(np.searchsorted(np.cumsum(self.shares), kind, side="right"), k - 1)
        sure = 1 - depth * (1 - 1 / k)
        probs = np.repeat(((1 - sure) / (k - 1))[:, None], k, axis=1)
        probs[np.arange(halves.size), (labels + wrong) % k] = sure
        names = [str(i) for i in range(k)]
        return Rows(probs, labels, names, names[-1], logit(1 - depth), halves=halves)


@dataclass(frozen=True)
class Resampled:
    """Groups of answered rows, drawn with replacement; each time one is drawn it is a group of its own."""

    known: Rows

    @cached_property
    def _groups(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Rows by group, where each group begins, and its size."""
        names = self.known.groups
        if names is None:
            rows = np.arange(self.known.labels.size)
            return rows, rows, np.ones_like(rows)
        _, member = np.unique(names, return_inverse=True)
        size = np.bincount(member)
        return np.argsort(member, kind="stable"), np.cumsum(size) - size, size

    @property
    def units(self) -> int:
        """Groups, or rows where they are independent."""
        return self._groups[1].size

    def rows(self, n: int, rng: np.random.Generator) -> Rows:
        """See the module."""
        order, start, size = self._groups
        halves = parts(n)
        drawn = rng.integers(0, size.size, halves.size)
        unit = np.repeat(np.arange(halves.size), size[drawn])
        place = np.arange(unit.size) - np.repeat(np.cumsum(size[drawn]) - size[drawn], size[drawn])
        at, known = order[start[drawn][unit] + place], self.known
        return Rows(
            known.probs[at], known.labels[at], known.classes, known.positive,
            gate=None if known.gate is None else known.gate[at],
            probs_b=None if known.probs_b is None else known.probs_b[at],
            halves=halves[unit],
            # Numbers name groups as well as words do, and faster.
            groups=None if known.groups is None else cast("NDArray[np.str_]", unit),
        )  # fmt: skip
