"""Plain conformal sets on arrays: every row gets a set of classes that holds the right one often enough; none abstains.

Split conformal prediction (Vovk et al. 2005) with the scores LAC (Sadinle et al. 2019), APS (Romano et al. 2020) and
RAPS (Angelopoulos et al. 2021), for all rows or for each class (Mondrian), and for streams that shift (ACI, Gibbs and
Candès 2021). What also selects whom to answer is ``scrc.SCRC``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro.arguments import array, check_share, flag, number, whole
from stage1_pro.errors import InputError
from stage1_pro.metrics.probabilistic import check_probabilities
from stage1_pro.notebook import Shown
from stage1_pro.policies.bounds import exact
from stage1_pro.policies.rows import counting_unit, one_each
from stage1_pro.policies.scrc import SCRC, nonconformity
from stage1_pro.policies.target import Score


@dataclass(frozen=True, eq=False, repr=False)
class ConformalSets(Shown):
    """Nonconformity of the right class on calibration rows, sorted: ``losses`` [n], or [n_k] for each of K classes.

    ``unit`` is what was counted, rows or groups.
    """

    losses: tuple[NDArray[np.float64], ...]
    n_classes: int
    by_class: bool
    score: SCRC
    unit: str

    def p_values(self, probs: ArrayLike) -> NDArray[np.float64]:
        """How well each class fits each row beside the calibration rows, [N, K] in (0, 1]; small speaks against it.

        (calibration rows with as large a nonconformity + 1) / (n + 1), of the rows of that class where ``by_class``:
        for a new row like them the right class has a p-value of at most a with a chance of at most a. A class without
        a calibration row has 1 for every row. Nothing is randomised, so ties make p-values larger, never smaller.

        Args:
            probs: [N, K], rows sum to 1.

        Raises:
            InputError: another shape, or what are no probabilities.
        """
        counts, sizes = self._as_large(probs)
        return np.asarray((counts + 1) / (sizes + 1))

    def sets(self, probs: ArrayLike, alpha: float) -> NDArray[np.bool_]:
        """Which classes are in each row's set, bool [N, K]: those of a p-value above ``alpha``.

        On average over calibrations and new rows like them, a set lacks the right class at most ``alpha`` of the time,
        among the rows of each class where ``by_class``. A set may be empty, and holds every class where there are fewer
        than 1 / alpha − 1 calibration rows.

        Args:
            probs: [N, K], rows sum to 1.
            alpha: inside (0, 1), taken by its decimal text.

        Raises:
            InputError: as ``p_values``; or an alpha out of range.
        """
        check_share("alpha", alpha)
        counts, sizes = self._as_large(probs)
        # Whole numbers against a fraction: no rounding decides.
        allowed = np.array([math.floor(exact(alpha) * int(size + 1)) for size in sizes])
        return np.asarray(counts + 1 > allowed)

    def _as_large(self, probs: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        values = array("probs", probs)
        if values.ndim != 2 or values.shape[1] != self.n_classes:
            raise InputError(
                f"probs must have shape [N, {self.n_classes}], got {list(values.shape)}; give a column for each class"
            )
        if not len(values):
            return np.zeros(values.shape, dtype=np.int64), np.zeros(self.n_classes, dtype=np.int64)
        losses = nonconformity(self.score, check_probabilities(probs, np.zeros(len(values), dtype=np.int64))[0])
        of = self.losses if self.by_class else self.losses * self.n_classes
        counts = [cell.size - np.searchsorted(cell, column) for cell, column in zip(of, losses.T, strict=True)]
        return np.stack(counts, axis=1), np.array([cell.size for cell in of])


def conformal_sets(
    probs: ArrayLike,
    labels: ArrayLike,
    *,
    score: Score = "lac",
    by_class: bool = False,
    raps: tuple[float, int] = (0.01, 2),
    groups: ArrayLike | None = None,
    rows_independent: bool = False,
    seed: int = 0,
) -> ConformalSets:
    """Calibrate conformal sets on rows that trained nothing; the share of misses is chosen when sets are made.

    Where rows share clips or tracks one seeded row speaks for its group, and what holds is about one image drawn from a
    new group.

    Args:
        probs: [N, K], rows sum to 1.
        labels: [N] class indices.
        score: ``lac`` 1 − p, the smallest sets on average; ``aps`` the mass of classes at least as probable, which
            follows how hard a row is; ``raps`` adds ``raps[0]`` for each rank beyond ``raps[1]``.
        by_class: calibrate each class on its own rows, so that the promise holds for each.
        raps: penalty and the rank from which it counts.
        groups: [N] clip or track of every row.
        rows_independent: the caller states that rows of one group are independent.
        seed: of the row that speaks for its group.

    Raises:
        InputError: an argument is not what it must be.
    """
    # Of the wish only the score is used.
    scored = SCRC(xi=0.5, alpha=0.5, score=score, raps=raps, allow_empty=True)
    flag("by_class", by_class)
    values, truth = check_probabilities(probs, labels)
    unit, units = counting_unit(groups, truth.size, "auto", rows_independent)
    drawn = one_each(units, np.ones(truth.size, dtype=bool), seed)
    values, truth = values[drawn], truth[drawn]
    losses = nonconformity(scored, values)[np.arange(truth.size), truth]
    n_classes = values.shape[1]
    cells = [losses[truth == k] for k in range(n_classes)] if by_class else [losses]
    return ConformalSets(tuple(np.sort(cell) for cell in cells), n_classes, by_class, scored, unit)


@dataclass
class AdaptiveSets:
    """Sets for a stream whose law may shift: the level of the next set follows the misses (ACI, Gibbs and Candès 2021).

    After each label ``level`` moves by ``gamma`` (``alpha`` − missed). For any stream whatever, after n labels the
    share of sets that lacked the right class is within (max(level₀, 1 − level₀) + gamma) / (gamma n) of ``alpha``;
    it promises nothing about any single set. All of the state is in the fields, so that a stream can be resumed.

    Args:
        sets: calibrated beforehand.
        alpha: share of misses, inside (0, 1).
        gamma: inside (0, 1); larger follows faster and swings more.
        level: that the next set is made at; ``alpha`` to begin with. At 0 or below a set holds all classes, at 1 or
            above none.
        n: labels seen.
        missed: sets among them that lacked the right class.

    Raises:
        InputError: an argument is not what it must be.
    """

    sets: ConformalSets
    alpha: float
    gamma: float = 0.005
    level: float = math.nan
    n: int = 0
    missed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.sets, ConformalSets):
            raise InputError(f"sets must be what conformal_sets gives, got {type(self.sets).__name__}; calibrate first")
        check_share("alpha", self.alpha)
        check_share("gamma", self.gamma)
        if math.isnan(number("level", self.level)):
            self.level = self.alpha
        whole("missed", self.missed, most=whole("n", self.n))

    def predict(self, probs: ArrayLike) -> NDArray[np.bool_]:
        """Which classes are in each row's set at the level of now, bool [N, K]."""
        return self.sets.p_values(probs) > self.level

    def follow(self, probs: ArrayLike, labels: ArrayLike) -> NDArray[np.bool_]:
        """Sets of rows in the order of the stream, bool [T, K]: each is made before its label is learned.

        Args:
            probs: [T, K], rows sum to 1.
            labels: [T] class indices.

        Raises:
            InputError: an argument is not what it must be; then nothing is learned.
        """
        fits = self.sets.p_values(probs)
        truth = check_probabilities(probs, labels)[1]
        levels = np.empty(truth.size)
        for row, fit in enumerate(fits[np.arange(truth.size), truth].tolist()):
            levels[row] = self.level
            miss = fit <= self.level
            self.level += self.gamma * (self.alpha - miss)
            self.missed += miss
        self.n += truth.size
        return np.asarray(fits > levels[:, None])
