"""Labelled rows of both stages, checked once, when made; their halves, and the unit that is counted. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro.arguments import Grid, choice, flag, floats, grid_of, indices, names, shown, sum_slack, whole
from stage1_pro.errors import InputError, NotReachableError

Unit = Literal["rows", "groups", "group_means", "photos"]
# Of n different photos so many (n^2 / this) may have another's answer by the rounding of float32 alone.
_CHANCE = 1 << 22
# Above this float32 has few values, so that different photos share one.
_SATURATED = 1 - 1e-3
# So many random values are on a grid by chance in 3 of 10,000 cases.
_MANY = 64


@dataclass(frozen=True)
class Rows:
    """What a policy is fitted on or held against; ``Rows.of`` checks it and says what each field is."""

    probs: NDArray[np.float64]
    labels: NDArray[np.int64]
    classes: list[str]
    positive: str | None
    gate: NDArray[np.float64] | None = None
    probs_b: NDArray[np.float64] | None = None
    halves: NDArray[np.str_] | None = None
    groups: NDArray[np.str_] | None = None
    sources: NDArray[np.str_] | None = None
    grid: Grid = "float64"  # dtype that the probabilities came in
    units_known: bool = False
    told_apart: bool = False
    independent: bool = False  # as the caller states, without groups
    halved: bool = True  # those of the fit half are of the same split as those that certify
    unlabelled: bool = False  # labels of those that certify are Stage B's answers

    @classmethod
    def of(
        cls,
        probs: ArrayLike,
        labels: ArrayLike,
        *,
        classes: Sequence[str],
        positive: str | None,
        gate: ArrayLike | None = None,
        probs_b: ArrayLike | None = None,
        halves: ArrayLike | None = None,
        groups: ArrayLike | None = None,
        sources: ArrayLike | None = None,
        rows_independent: bool = False,
        told_apart: bool = False,
    ) -> Rows:
        """Check and convert; a group that has one row in every case is as good as none.

        Units are groups where they are given, else rows where their independence is stated; nothing else makes one.

        Args:
            probs: [N, K] probabilities of Stage A.
            labels: [N] indices into ``classes``.
            classes: K names, K >= 2.
            positive: name of the positive class; None: no class is the positive one.
            gate: [N] logits; one that is not finite has no score.
            probs_b: [N, K] probabilities of Stage B.
            halves: [N] of ``fit`` and ``certify``.
            groups: [N] clip or track of every row; nothing is certified without them or ``rows_independent``.
            sources: [N] names.
            rows_independent: the caller states that every row is a photo of its own, independent of the others.
            told_apart: no photo is in both halves, by the contents of the photos; answers need not tell.

        Raises:
            InputError: an argument is not what it must be; NaN names its row.
        """
        called = [str(name) for name in classes]
        values, truth, units = check_rows(probs, labels, groups, called)
        second = None if probs_b is None else check_rows(probs_b, labels, groups, called)[0]
        if positive is not None:
            choice("positive", positive, called)
        logits = None if gate is None else floats("gate", gate)
        if logits is not None and logits.shape != truth.shape:
            raise InputError(f"gate_logits must have shape [{truth.size}] as probs has rows, got {list(logits.shape)}")
        if halves is not None:
            check_halves(halves, truth.size, units)
        parts = None if halves is None else names("halves", halves, truth.size)
        known = None if sources is None else names("sources", sources, truth.size)
        stated = groups is not None or rows_independent
        return cls(
            values, truth, called, positive, logits, second, parts, units, known, grid_of(probs), stated, told_apart,
            rows_independent and groups is None and units is None,
        )  # fmt: skip

    def where(self, mask: NDArray[np.bool_]) -> Rows:
        """Some of the rows, without halves; ``mask`` bool [N]."""
        cut = {one.name: getattr(self, one.name) for one in fields(self)}
        cut = {name: value[mask] if isinstance(value, np.ndarray) else value for name, value in cut.items()}
        return Rows(**{**cut, "halves": None})

    def is_class(self, name: str | None) -> NDArray[np.bool_]:
        """Which rows [N] are of a class; of None, none. Raises InputError where it is no class of these."""
        if name is None:
            return np.zeros(self.labels.size, dtype=bool)
        return np.asarray(self.labels == self.classes.index(choice("class", name, self.classes)))

    def missed(self, name: str | None) -> NDArray[np.bool_]:
        """Which rows [N] are of a class and answered as another by Stage A; of None, none."""
        return np.asarray(self.is_class(name) & self.wrong)

    @property
    def wrong(self) -> NDArray[np.bool_]:
        """Which rows [N] Stage A answers wrongly."""
        return np.asarray(self.probs.argmax(axis=1) != self.labels)

    @property
    def answers_b(self) -> NDArray[np.int64]:
        """Stage B's answers [N].

        Raises:
            InputError: its probabilities were not given.
        """
        if self.probs_b is None:
            raise InputError("probs_b must be given where Stage B's answers are asked about, got None (logits_b)")
        return np.asarray(self.probs_b.argmax(axis=1))

    @property
    def unit(self) -> str:
        """What counts once: rows, or groups where rows share one."""
        return "rows" if self.groups is None else "groups"

    def given_groups(self) -> NDArray[Any] | None:
        """Groups [N] as they were given, numbers where each has one row; None where there were none."""
        if self.groups is None and self.units_known and not self.independent:
            return np.arange(self.labels.size)
        return self.groups

    def fit_half(self) -> NDArray[np.bool_]:
        """Which rows [N] are of the fit half.

        Raises:
            InputError: there are no halves.
        """
        if self.halves is None:
            raise InputError("halves must be given with guarantee ltt, got None; one half cannot choose and certify")
        return np.asarray(self.halves == "fit")

    def kept_half(self) -> NDArray[np.bool_]:
        """Which rows [N] are kept for a certificate.

        Raises:
            InputError: there are no halves, nobody said which rows are independent, or copies are in different units.
            NotReachableError: as ``check_answers_differ``.
        """
        kept = ~self.fit_half()
        self.check_answers_differ()
        if not self.units_known:
            raise InputError(
                "groups must be given where something is certified, got None; name the clip, track or place of every "
                "row, or state that each is a photo of its own with rows_independent=True (--rows-independent)"
            )
        if self._copies is not None:
            first, other, n = self._copies
            raise InputError(
                f"groups must hold copies of a row together, got rows {first} and {other} in different units, of which "
                f"the models say the very same ({n} such rows); give copies one group, the clip, track or place, or "
                "give logits that are not rounded"
            )
        return kept

    def check_answers_differ(self) -> None:
        """Raise NotReachableError where the models say the very same of every row; photos of runs are not asked."""
        n = self.labels.size
        if n > 1 and not self.told_apart and not self._alike.any():
            raise NotReachableError(
                f"answers must differ between rows, got INFEASIBLE: the model says the same of all {n} rows, so "
                "nothing tells them apart; train it further, or look for what makes its logits equal"
            )

    @cached_property
    def _alike(self) -> NDArray[np.int64]:
        """A number for every row [N], from 0, that bit-identical rows share."""
        said = np.column_stack([one for one in (self.probs, self.gate, self.probs_b) if one is not None])
        whole = np.ascontiguousarray(said).view(np.dtype((np.void, said.itemsize * said.shape[1]))).ravel()
        return np.asarray(np.unique(whole, return_inverse=True)[1], dtype=np.int64)

    @cached_property
    def _copies(self) -> tuple[int, int, int] | None:
        """Two rows that are copies and lie in different units, and how many such rows there are; None: no copies.

        Bit-identical rows of different units are copies unless ties explain them: a set with different labels, a
        largest probability near 1, scores that are rounded, or so few that float32 makes them. Rows that differ in
        the last bit are not found.
        """
        n, alike = self.labels.size, self._alike
        if self.told_apart:
            return None
        member = np.arange(n) if self.groups is None else np.unique(self.groups, return_inverse=True)[1]
        # One row of each unit in each set.
        _, rows = np.unique(alike * n + member, return_index=True)
        size = np.bincount(alike[rows], minlength=n)
        least, most = np.full(n, n), np.zeros(n, dtype=np.int64)
        np.minimum.at(least, alike, self.labels)
        np.maximum.at(most, alike, self.labels)
        surest = self.probs.max(axis=1)
        doubt = (size > 1) & (least == most)
        doubt[alike[surest > _SATURATED]] = False
        extra = int((size[doubt] - 1).sum())
        # Float32 makes more ties where scores crowd: one for 2^11 pairs of values that are this close; four times that.
        values = np.unique(surest[surest <= _SATURATED])
        near = int((np.searchsorted(values, values + 2**-14, side="right") - np.arange(values.size) - 1).sum())
        if extra <= min(max(n**2 / _CHANCE, near / 2**9), n / 20) or self._rounded(surest):
            return None
        twins = rows[alike[rows] == np.flatnonzero(doubt)[0]]
        return int(twins[0]), int(twins[1]), extra + int(doubt.sum())

    def _rounded(self, surest: NDArray[np.float64]) -> bool:
        """Whether scores lie on a grid: their distinct values are further apart than random ones ever are.

        The least gap of D random values is above the mean gap / sqrt(D) with chance exp(-sqrt(D)) only. That is no
        small chance for few values: all of their gaps must be multiples of one step as well, so nearly that random ones
        would be in 1 of 10,000 cases (all but one are within r of a multiple with chance (2 r)^(D - 2)); of two or
        three values nothing tells. Of 1 - p and p one alone may be rounded, so answers of the first and of the last
        class are looked at by themselves as well, where they are many; steps as fine as float32's are no grid.
        """
        answer, rows = self.probs.argmax(axis=1), surest <= _SATURATED
        for of, least in ((rows, 3), (rows & (answer == 0), _MANY), (rows & (answer == len(self.classes) - 1), _MANY)):
            gaps = np.diff(np.unique(surest[of]))
            # Sums such as 1 - p leave the grid in their last bits, those of float32 too.
            gaps = gaps[gaps > 2**-22]
            if gaps.size < least or gaps.min() <= max(gaps.mean() / (gaps.size + 1) ** 0.5, 2**-20):
                continue
            steps = np.rint(gaps / gaps.min())
            off = np.abs(gaps * (steps.sum() / gaps.sum()) - steps).max()
            if gaps.size >= _MANY or (2 * off) ** (gaps.size - 1) < 1e-4:
                return True
        return False


def check_rows(
    probs: ArrayLike, labels: ArrayLike, groups: ArrayLike | None, classes: list[str]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.str_] | None]:
    """Probabilities, class indices and groups (None when each row is its own) that can be trusted."""
    if len(classes) < 2 or len(set(classes)) != len(classes):
        raise InputError(f"classes must be at least two different names, got {shown(classes)}")
    values = floats("probs", probs)
    if values.ndim != 2 or values.shape[0] == 0 or values.shape[1] != len(classes):
        raise InputError(
            f"probs must have shape [N, {len(classes)}] with at least one row, got {list(values.shape)}; "
            "give one probability per class"
        )
    row = _first(np.isnan(values).any(axis=1))
    if row is not None:
        raise InputError(f"probs must be free of NaN, got NaN in row {row}; leave such rows out or mend the model")
    slack = sum_slack(probs)
    row = _first(((values < 0) | (values > 1 + slack)).any(axis=1))
    if row is not None:
        raise InputError(
            f"probs must be in [0, 1], got {values[row].tolist()} in row {row}; pass logits through softmax"
        )
    total = values.sum(axis=1)
    row = _first(np.abs(total - 1) > slack)
    if row is not None:
        raise InputError(
            f"probs must sum to 1 in each row, got {total[row]:.6g} in row {row}; pass logits through softmax"
        )
    truth = indices("labels", labels, total.size, len(classes), like="probs has rows")
    return values, truth, _check_groups(groups, total.size)


def _check_groups(groups: ArrayLike | None, n: int) -> NDArray[np.str_] | None:
    if groups is None:
        return None
    given = names("groups", groups, n, like="probs has rows")
    # Other things than text and numbers by what Python writes of them; bytes by the one text of each.
    listed = [one.decode("latin-1") if isinstance(one, bytes) else str(one) for one in given.tolist()]
    units = np.array(listed) if given.dtype.kind in "OS" else given.astype(np.str_)
    return None if np.unique(units).size == units.size else units


def check_halves(halves: ArrayLike, n: int, groups: ArrayLike | None = None) -> NDArray[np.bool_]:
    """Say which rows [N] are of the fit half.

    Raises:
        InputError: another shape, another word than ``fit`` and ``certify``, an empty half, or a group in both.
    """
    given = names("halves", halves, n)
    fit: NDArray[np.bool_] = given == "fit"
    other = np.flatnonzero(~fit & (given != "certify"))
    if other.size:
        raise InputError(f"halves must be fit or certify, got '{given[other[0]]}' in row {other[0]}; split again")
    for name, rows in (("fit", fit), ("certify", ~fit)):
        if not rows.any():
            raise InputError(f"halves must both hold rows, got none of '{name}'; calibrate on more groups")
    if groups is not None:
        units = names("groups", groups, n)
        both = np.intersect1d(units[fit], units[~fit])
        if both.size:
            raise InputError(
                f"halves must not share a group, got '{both[0]}' in both ({both.size} such); near-copies of a row that "
                "chose the threshold cannot certify it: split again"
            )
    return fit


def cut_halves(n: int, groups: ArrayLike | None = None, seed: int = 0) -> NDArray[np.str_]:
    """Cut rows into ``fit`` and ``certify`` [N], at random and by group: every second group of a seeded order.

    Args:
        n: rows.
        groups: [N] clip or track of every row; None = every row is its own.
        seed: of the order.
    """
    whole("n", n)
    units, member = np.unique(np.arange(n) if groups is None else names("groups", groups, n), return_inverse=True)
    place = np.random.default_rng(whole("seed", seed)).permutation(units.size)
    return np.where(place[member] % 2 == 0, "fit", "certify")


def groups_in_error(errors: ArrayLike, groups: ArrayLike | None = None) -> tuple[int, int]:
    """Count the groups with at least one error, and all groups: ``(errors, trials)`` for a bound.

    Rows of one clip or track are no independent trials, so the group is the unit. One error in a
    group makes the whole group an error: never less than the mean of the groups' error rates.

    Args:
        errors: bool [M], one per row.
        groups: [M] group names; ``None`` makes every row its own group.
    """
    wrong = np.asarray(errors, dtype=bool)
    if groups is None:
        return int(wrong.sum()), wrong.size
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    hit: NDArray[np.bool_] = np.zeros(int(member.max(initial=-1)) + 1, dtype=bool)
    hit[member[wrong]] = True
    return int(hit.sum()), hit.size


def counting_unit(
    groups: ArrayLike | None, n: int, unit: str, rows_independent: bool
) -> tuple[Unit, NDArray[np.generic] | None]:
    """What is counted, and the group of every row (None when rows are)."""
    choice("unit", unit, ("auto", *get_args(Unit)))
    flag("rows_independent", rows_independent)
    units = None if groups is None else names("groups", groups, n)
    if unit in ("groups", "group_means") and units is None:
        raise InputError("groups must be given where the unit is groups, got None")
    if unit in ("group_means", "photos") and units is not None:
        if rows_independent:
            raise InputError(f"rows_independent must be False where the unit is {unit}, got True; choose one")
        return ("photos" if unit == "photos" else "group_means"), units
    if units is None or rows_independent or (unit != "groups" and np.unique(units).size == n):
        return "rows", None
    if unit == "rows":
        raise InputError(
            f"unit must be groups where rows share one ({np.unique(units).size} groups of {n} rows), got rows; rows of "
            "one clip are near-copies and a bound on them is false: pass rows_independent=True only if they are not"
        )
    return "groups", units


def one_each(groups: NDArray[np.generic] | None, eligible: NDArray[np.bool_], seed: int) -> NDArray[np.int64]:
    """One eligible row of every group that has one, [U] indices; drawn without a look at scores or errors."""
    rows = np.flatnonzero(eligible)
    whole("seed", seed)
    if groups is None:
        return rows
    shuffled = rows[np.random.default_rng(seed).permutation(rows.size)]
    _, first = np.unique(groups[shuffled], return_index=True)
    return np.sort(shuffled[first])


def _first(mask: ArrayLike) -> int | None:
    found = np.flatnonzero(mask)
    return int(found[0]) if found.size else None
