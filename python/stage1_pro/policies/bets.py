"""Bets against "the error of what exits is above alpha", looked at after every label: the engine of e-processes.

Each photo is drawn for labelling with a chance pi that depends on the past and on its own guessed error alone, and is
never below a floor. With xi = 1 where it was drawn, a control c that is as predictable, and err known where xi = 1,
estimate = c + xi (err - c) / pi has the mean of err, so

    capital <- capital (1 + bet * sum over the unit's exits (alpha - estimate)),    bet >= 0 from the past alone,

is a supermartingale while the error is at least alpha: it ever reaches 1 / delta with chance delta at most (Ville;
Waudby-Smith & Ramdas 2010.09686; active, anytime-valid risk control 2406.10490). Every bounded e-value of a mean has
this form. Bets, chances and controls are free to choose: guesses that are wrong cost labels, never truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro.arguments import check_share, floats, number, shown, whole
from stage1_pro.errors import InputError
from stage1_pro.files import uniform

# Capital is cut off here: more would say nothing new, and JSON must be able to hold it.
MOST_CAPITAL = 1e100
# A little of the capital bets half as much: it stays where guesses are wrong and the bold bets are ruined.
_SHARES, _STAKES = (0.98, 0.02), np.array([1.0, 0.5])
# Bets to choose from, as shares of the largest that no loss can ruin.
_BOLD = 0.995
_STEPS = np.linspace(0.05, _BOLD, 32)
# The guessed errors count as much as so many labelled errors.
_PRIOR = 12.0
# With a budget, bets are the largest as long as the error seems to be at most this share of alpha.
_SURE = 0.75
# How much more often likely errors are labelled, least first; without a budget _PLAIN.
_SPREADS, _PLAIN = np.array([0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0]), 2.0
# Labels are thought to take so many times what they take if none is wrong.
_MARGIN = 1.8
# The growth that a forecast rests on is that of about so many photos.
_RECENT = 500


def compound(
    capital: NDArray[np.float64], gain: NDArray[np.float64] | np.float64, bets: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Capital after a bet on one outcome, of its shape: the step that every e-process here takes.

    Args:
        capital: at least 0.
        gain: of mean 0 or less under the hypothesis, given the past.
        bets: shares of the capital per unit of gain, from the past; bets * gain >= -1.
    """
    return np.minimum(capital * (1 + bets * gain), MOST_CAPITAL)


def labelling_chances(
    p_hat: ArrayLike, floor: float = 0.1, *, alpha: float, spread: float = _PLAIN
) -> NDArray[np.float64]:
    """Chances of being labelled [N], in [floor, 1]: floor sqrt(1 + spread p_hat / alpha), more where errors are likely.

    For large p_hat that is the square root by which the variance of a fixed number of labels is smallest.

    Args:
        p_hat: guessed chance of each photo's answer to be wrong [N], in [0, 1], from rows that prove nothing.
        floor: smallest chance, in (0, 1]; a smaller one looks at more photos for as many labels.
        alpha: the error in question.
        spread: the larger, the fewer labels go where no error is expected.

    Raises:
        InputError: an argument outside its range.
    """
    guess = floats("p_hat", p_hat)
    if not ((guess >= 0) & (guess <= 1)).all():
        raise InputError("p_hat must be in [0, 1], got others; it is the chance that an answer is wrong")
    check_share("floor", floor, most=True)
    check_share("alpha", alpha)
    if not 0 <= number("spread", spread) < math.inf:
        raise InputError(f"spread must be a number of at least 0, got {spread}; the larger, the more where errors are")
    return np.minimum(floor * np.sqrt(1 + spread * guess / alpha), 1.0)


def shuffle_units(units: Sequence[str], *, seed: int = 0) -> list[str]:
    """The order in which units come: by a hash of seed and name, whatever order they are given in.

    Raises:
        InputError: names that are no text.
    """
    whole("seed", seed)
    return sorted(texts("units", units), key=lambda unit: (uniform(seed, "certify order", unit), unit))


def texts(name: str, given: Any) -> list[str]:
    """Names as a list.

    Raises:
        InputError: anything but a list of text, none of it empty.
    """
    listed = isinstance(given, list | tuple) or (isinstance(given, np.ndarray) and given.ndim == 1)
    found = list(given) if listed else [None]
    if not all(isinstance(one, str) and one for one in found):
        raise InputError(f"{name} must be a list of names, got {shown(given)}; give text that is not empty")
    return [str(one) for one in found]


def draw_for_labelling(photos: Sequence[str], chances: ArrayLike, *, seed: int = 0) -> NDArray[np.bool_]:
    """Which photos are labelled [N]: by a hash of seed and name, so the draw can be replayed and not repeated."""
    numbers = [uniform(seed, "certify", photo) for photo in texts("photos", photos)]
    return np.asarray(np.array(numbers, dtype=np.float64) < floats("chances", chances), dtype=bool)


@dataclass
class Bets:
    """E-processes [C] against "error >= alpha", and what their bets learn from; the engine of certificates.

    Args:
        alpha: the error in question.
        delta: a process is done when its capital reaches 1 / delta.
        floor: smallest chance of being labelled.
        largest: photos of the largest unit there can be.
        budget: labels by which each hopes to be done; None: no hurry.
        capital: of both accounts [C, 2].
        photos: that exit, so far [C]; ``squares``: the same of each unit's, squared.
        guessed: sum of their guessed errors.
        losses: of p_hat / (1 - bet (1 / chance - alpha)) for every bet to choose from [C, B].
        labels: of them; ``wrong``: of those; ``expected``: guessed errors among the labelled.
        roots: sums of sqrt(1 + spread p_hat / alpha) [C, S].
        growth: log capital that a photo is expected to add.
    """

    alpha: float
    delta: float
    floor: float
    largest: int
    budget: float | None
    capital: NDArray[np.float64]
    photos: NDArray[np.float64]
    squares: NDArray[np.float64]
    guessed: NDArray[np.float64]
    labels: NDArray[np.float64]
    wrong: NDArray[np.float64]
    expected: NDArray[np.float64]
    losses: NDArray[np.float64]
    roots: NDArray[np.float64]
    growth: NDArray[np.float64]

    @classmethod
    def start(
        cls, n: int, *, alpha: float, delta: float, floor: float, largest: int = 1, budget: float | None = None
    ) -> Self:
        """``n`` processes that have seen nothing."""
        sums = {name: np.zeros(n) for name in ("photos", "squares", "guessed", "labels", "wrong", "expected", "growth")}
        losses, roots = np.zeros((n, _STEPS.size)), np.zeros((n, _SPREADS.size))
        capital = np.tile(_SHARES, (n, 1))
        return cls(alpha, delta, floor, largest, budget, capital=capital, losses=losses, roots=roots, **sums)

    @property
    def _most(self) -> float:
        """The bet on one photo that the worst of them would just ruin."""
        return 1 / (1 / self.floor - self.alpha)

    @property
    def log_missing(self) -> NDArray[np.float64]:
        """What the log of each capital lacks of its goal [C]; 0 or less: reached."""
        return np.asarray(-math.log(self.delta) - np.log(np.maximum(self.capital.sum(axis=1), 1e-300)))

    @property
    def scale(self) -> NDArray[np.float64]:
        """How many times the guessed errors the true ones seem to be [C]."""
        return (_PRIOR + self.wrong) / (_PRIOR + self.expected)

    @property
    def error(self) -> NDArray[np.float64]:
        """The error of exits as it seems [C]; 0 before any photo."""
        return self.scale * self.guessed / np.maximum(self.photos, 1)

    @property
    def bets(self) -> NDArray[np.float64]:
        """Bets [C] by which the log of the capital grows fastest, if errors go on as they seem; never ruinous.

        Without controls its slope is alpha - E[err / (1 - bet (1 / pi - alpha))]. Photos of a unit count as one.
        """
        slope = self.alpha * self.photos[:, None] - self.scale[:, None] * self.losses
        chosen = _STEPS[np.maximum((slope >= 0).sum(axis=1) - 1, 0)]
        if self.budget is not None:
            # Who is in a hurry wins more by a risk than by what grows fastest in the end.
            chosen = np.where(self.error <= _SURE * self.alpha, _BOLD, chosen)
        size = np.maximum(self.squares, 1) / np.maximum(self.photos, 1)
        return np.asarray(np.minimum(chosen / size, _BOLD / self.largest) * self._most)

    @property
    def spread(self) -> NDArray[np.float64]:
        """The spread [C] of ``labelling_chances`` that suits: while the budget allows the safest, later the fastest.

        Without a budget, and beyond it, the one in the middle.
        """
        if self.budget is None:
            return np.full(self.photos.shape, _PLAIN)
        share = self.floor * self.roots / np.maximum(self.photos, 1)[:, None]
        needed = share * (_MARGIN * self.log_missing / np.log1p(self.bets * self.alpha))[:, None]
        left = self.budget - self.labels
        # The nearer the error is to alpha, the slower the growth, and the more does the place of a label matter.
        useful = 2 + 7 * self.error[:, None] / self.alpha >= _SPREADS
        fitting = np.maximum(((needed <= left[:, None]) & useful).sum(axis=1) - 1, 0)
        return np.asarray(np.where((left > 0) & (self.photos > 0), _SPREADS[fitting], _PLAIN))

    def add(
        self, p_hat: NDArray[np.float64], chances: NDArray[np.float64], wrong: NDArray[np.float64],
        exits: NDArray[np.bool_],
    ) -> None:  # fmt: skip
        """One more unit of m photos for each process.

        Args:
            p_hat: guessed errors [C or 1, m].
            chances: of being labelled [C or 1, m].
            wrong: 1 where the answer is wrong, 0 where right, NaN where it was not drawn [C or 1, m].
            exits: photos that count [C, m].
        """
        bets = self.bets[:, None]
        likely = np.minimum(self.scale[:, None] * p_hat, 0.99)
        control = _control(likely, chances / bets)
        drawn, gap = ~np.isnan(wrong), self.alpha - control
        estimate = np.where(drawn, (np.nan_to_num(wrong) - control) / chances, 0.0)
        gain = np.where(exits, gap - estimate, 0.0).sum(axis=1, keepdims=True)
        self.capital = compound(self.capital, gain, bets * _STAKES)
        right = np.log1p(bets * (gap + control / chances))
        missed = np.log1p(np.maximum(bets * (gap - (1 - control) / chances), -_BOLD))
        labelled = (1 - likely) * right + likely * missed
        growth = (1 - chances) * np.log1p(bets * gap) + chances * labelled
        size = exits.sum(axis=1)
        self.photos = self.photos + size
        self.squares = self.squares + size.astype(np.float64) ** 2
        losses = p_hat[..., None] / (1 - _STEPS * self._most * (1 / chances[..., None] - self.alpha))
        self.losses = self.losses + np.where(exits[..., None], losses, 0.0).sum(axis=1)
        roots = np.minimum(np.sqrt(1 + _SPREADS * p_hat[..., None] / self.alpha), 1 / self.floor)
        self.roots = self.roots + np.where(exits[..., None], roots, 0.0).sum(axis=1)
        for name, values in (
            ("guessed", p_hat), ("labels", drawn), ("wrong", np.nan_to_num(wrong)),
            ("expected", np.where(drawn, p_hat, 0.0)),
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) + np.where(exits, values, 0.0).sum(axis=1))
        mean = np.where(exits, growth, 0.0).sum(axis=1) / np.maximum(size, 1)
        self.growth = self.growth + (mean - self.growth) * np.where(
            size > 0, np.maximum(size / np.maximum(self.photos, 1), 1 / _RECENT), 0.0
        )


def _control(likely: NDArray[np.float64], room: NDArray[np.float64]) -> NDArray[np.float64]:
    """The control in [0, 1] by which the log of the capital grows fastest, for an error so likely and pi / bet."""
    one = 1 / room + 1
    grown = (one + np.sqrt((1 / room - 1) ** 2 + 4 * likely / room)) / 2
    return np.clip((grown - 1) * room, 0.0, 1.0)
