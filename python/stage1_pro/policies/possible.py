"""What the rows kept for a certificate can certify by their number alone, before any answer is looked at. NumPy only.

Counts of units, of their sizes and of those that hold a class are looked at: the tests are exact given them, so a wish
that is made in their knowledge is as good as one that was made before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stage1_pro.errors import NotReachableError
from stage1_pro.policies.bounds import (
    betting_p_value,
    coverage_p_value,
    crc_budget,
    errors_allowed,
    first_enough,
    last_digit,
)
from stage1_pro.policies.candidates import Mix, photo_shares
from stage1_pro.policies.exiting import mix_of
from stage1_pro.policies.ordering import mean_squares
from stage1_pro.policies.rows import Rows, one_each
from stage1_pro.policies.scrc import SCRC
from stage1_pro.policies.target import Promise, Scrc, Target

# Limits are said in four digits at most, and none beyond this is worth asking for.
_MOST = 0.999


@dataclass(frozen=True)
class Outlook:
    """What can be certified of one promise if nothing at all goes wrong: no error, everything answered."""

    promise: Promise
    n: int  # units that can tell of it
    unit: str
    label: str | None  # the class that these hold
    best: float | None  # the strictest limit that can be asked for; None: none can
    needed: int | None  # units that could certify what is asked for; None: not told by their number alone
    possible: bool

    def __str__(self) -> str:
        of = "" if self.label is None else f" with '{self.label}'"
        if self.best is None:
            best = "nothing can be asked for"
        else:
            word = "at best" if self.promise.bound == "at most" else "at most"
            best = f"{word} {self.best:.4g} can be asked for"
        needed = "" if self.needed is None else f", of at least {self.needed} that it takes"
        asked = f"{self.promise.name} {self.promise.bound} {self.promise.limit:g}"
        return f"{asked}: {self.n} {self.unit}{of}{needed}; {best}"


def foresee(target: Target, rows: Rows) -> list[Outlook]:
    """Say of every promise of a target whether the rows kept for the certificate can certify it, by counts alone.

    Args:
        target: what is asked for; nothing is foreseen of what promises nothing.
        rows: with halves.

    Raises:
        InputError: as ``Rows.kept_half``, or a group is larger than the target states.
    """
    if target.guarantee == "none":
        return []
    kept = rows.kept_half()
    mix, found = mix_of(target, rows), []
    for one in target.promises(rows.positive):
        level = target.level(one, len(rows.classes))
        for name in rows.classes if one.of == "each class" else [one.label]:
            trials = np.ones(kept.size, dtype=bool) if name is None else rows.is_class(name)
            units = _Units.of(rows, trials, kept, target.largest)
            if mix is not None and one.prior is not None:
                units = _Units.mixed(rows.where(kept), mix.where(kept))
            found.append(_outlook(target, one, name, units, level))
    return found


@dataclass(frozen=True)
class _Units:
    """Units of the kept half that have a trial; where photos are promised their trials as shares of the largest group.

    ``square`` is the mean square of those shares in the other half, which bets begin with.
    """

    n: int
    name: str
    shares: NDArray[np.float64] | None = None
    square: float = 1.0

    @classmethod
    def of(cls, rows: Rows, trials: NDArray[np.bool_], kept: NDArray[np.bool_], largest: int | None) -> _Units:
        if rows.groups is None:
            return cls(int((trials & kept).sum()), rows.unit)
        n = np.unique(rows.groups[trials & kept]).size
        if largest is None:
            return cls(n, rows.unit)
        (square,) = mean_squares(rows.groups[~kept], [trials[~kept]], largest)
        return cls(n, rows.unit, photo_shares(rows.groups[kept], trials[kept], largest), square)

    @classmethod
    def mixed(cls, kept: Rows, mix: Mix) -> _Units:
        """Units that count by their class."""
        drawn = mix.where(one_each(kept.groups, np.ones(kept.labels.size, dtype=bool), 0))
        weight = drawn.visits(0)[1] if drawn.known else np.zeros(0)
        return cls(weight.size, f"{kept.unit} that count by their class", weight, drawn.square)

    def bet(self, limit: float, level: float) -> bool:
        """Whether betting certifies a limit where no trial is an error."""
        assert self.shares is not None
        nothing, variance = np.zeros(self.shares.size), limit * (1 - limit) * self.square
        return betting_p_value(nothing, limit, level, weights=self.shares, variance=variance) <= level


def check_possible(target: Target, rows: Rows) -> None:
    """Raise NotReachableError where the number of rows kept for the certificate rules out what is asked for."""
    missing = [one for one in foresee(target, rows) if not one.possible]
    if missing:
        said = "; ".join(map(str, missing))
        raise NotReachableError(
            f"{target.words()} must be certifiable on the rows kept for the certificate, but it is INFEASIBLE by the "
            f"number of photos alone, even if no answer is wrong: {said}. Nothing was looked at; your claim "
            "is unspent and nothing was changed. Bring more such photos, or ask for what these can certify"
        )


def _outlook(target: Target, one: Promise, label: str | None, units: _Units, level: float) -> Outlook:
    n, photos = units.n, units.shares is not None

    def enough(m: int, limit: float) -> bool:
        if m == 0:
            return False
        if one.bound == "at least":
            return _covers(target, m, limit, level, units)
        if photos:
            return units.bet(limit, level)
        if one.strength == "on average":
            return crc_budget(limit, m) >= 0
        return int(errors_allowed(m, limit, level)) >= 0

    possible = enough(n, one.limit)
    needed = None
    if not photos and not possible:
        needed = first_enough(lambda m: enough(m, one.limit), max(n, 1), 10**7)
    best = _strictest(lambda limit: enough(n, limit), one.bound == "at most")
    return Outlook(one, n, units.name, label, best, needed, possible)


def _covers(target: Target, n: int, share: float, level: float, units: _Units) -> bool:
    if isinstance(target, Scrc):
        # The statistics' own rule; T accepts everything where its rank is beyond the rows.
        delta = (level, target.level(target.promises("")[1], 2))
        return target.variant == "T" or SCRC(share, target.alpha, delta, target.variant)._rank(n) is not None
    if units.shares is not None:
        return units.n > 0 and units.bet(1 - share, level)
    return float(coverage_p_value(n, n, share)) <= level


def _strictest(possible: Callable[[float], bool], smallest: bool) -> float | None:
    """The strictest limit of four digits that is possible, the smallest or the largest; None where none is."""

    def limit(share: float) -> float:
        return share if smallest else 1 - share

    strict, lax = 0.0, _MOST
    if not possible(limit(lax)):
        return None
    while lax - strict > 1e-5 * lax:
        middle = (strict + lax) / 2
        strict, lax = (strict, middle) if possible(limit(middle)) else (middle, lax)
    value = limit(lax)
    digit = last_digit(value, 4)
    said = round((math.ceil(value / digit) if smallest else math.floor(value / digit)) * digit, 12)
    return said if possible(said) else value


def told(outlooks: Sequence[Outlook]) -> list[str]:
    """A line for every promise, for ``--dry-run``."""
    return [f"{'possible' if one.possible else 'out of reach'}: {one}" for one in outlooks]
