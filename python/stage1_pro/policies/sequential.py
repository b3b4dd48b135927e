"""Label until it is proven: a certificate that may be looked at after every label, and that says which to label next.

Units come one at a time, in an order drawn beforehand. Thresholds are proven in their own order, frozen beforehand,
each at the full delta: the first false one, and so anything false, is ever proven with chance delta at most. The bets
are those of ``policies.bets``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from stage1_pro.arguments import check_share, floats, shown, whole
from stage1_pro.errors import InputError
from stage1_pro.files import sha256_bytes
from stage1_pro.policies.bets import Bets, draw_for_labelling, labelling_chances, texts
from stage1_pro.record import Record


class ThresholdState(Record):
    """One threshold's proof so far; sums are over units with photos that exit at it."""

    threshold: float = Field(description="a photo exits iff its score is at or above it")
    proven_at: int | None = Field(None, ge=0, description="labels of all photos when its capital reached 1 / delta")
    capital: tuple[float, ...]
    photos: float
    squares: float
    guessed: float
    labels: float
    wrong: float
    expected: float
    losses: tuple[float, ...]
    roots: tuple[float, ...]
    growth: float


class SequentialState(Record):
    """Where a ``SequentialCertificate`` stands; the same labels give the same bytes."""

    alpha: float = Field(gt=0, lt=1)
    delta: float = Field(gt=0, lt=1)
    floor: float = Field(gt=0, le=1, description="no exit has a smaller chance of being labelled")
    largest_unit: int = Field(ge=1, description="photos of the largest unit there can be")
    budget: int | None = Field(ge=1, description="labels by which the choice of photos hopes to be done")
    seed: int = Field(ge=0, description="of the draw")
    thresholds: tuple[ThresholdState, ...] = Field(min_length=1, description="in the order of testing")
    labels: int = Field(ge=0, description="photos labelled")
    wrong: int = Field(ge=0, description="of them, wrong answers")
    photos: int = Field(ge=0, description="photos looked through")
    units: tuple[str, ...] = Field(description="hashes of units' names, in their order")


@dataclass(frozen=True, eq=False)
class UnitAsked:
    """One unit and what is to be labelled of it: given by ``SequentialCertificate.ask``, taken by ``add``.

    Args:
        name: of a photo, or of the group whose photos it holds.
        place: how many came before it.
        photos: names, m.
        scores: [m], higher is surer; NaN never exits.
        p_hat: guessed chance of each answer to be wrong [m].
        chances: of each to be labelled [m]; 0 where it exits at no threshold that is still to be proven.
        drawn: whether it is labelled [m].
    """

    name: str
    place: int
    photos: tuple[str, ...]
    scores: NDArray[np.float64]
    p_hat: NDArray[np.float64]
    chances: NDArray[np.float64]
    drawn: NDArray[np.bool_]


class SequentialCertificate:
    """Proves thresholds label by label: stop whenever you like, and what is proven is false with chance delta at most.

    The promise is about photos of the kind that units are drawn from, independently: for single photos, or one of each
    group, P(wrong | exit) <= alpha of such a photo; for whole groups the share of all exiting photos that are wrong.
    Every unit of the pool comes in an order drawn beforehand (``bets.shuffle_units``), and none is left out.

    >>> proof = SequentialCertificate([0.9], alpha=0.1, floor=1.0)
    >>> for number in range(60):
    ...     unit = proof.ask(f"photo {number}", scores=0.95, p_hat=0.01)
    ...     proof.add(unit, wrong=[0])
    ...     if proof.proven:
    ...         break
    >>> proof.threshold, int(proof.state.labels)
    (0.9, 32)

    Args:
        thresholds: in the order of testing, frozen before any label was seen: of ``order_candidates``, or given.
        alpha: largest error among exits, inside (0, 1).
        delta: largest chance that anything is ever proven falsely, inside (0, 1).
        floor: smallest chance of being labelled, in (0, 1]; 1 labels every exit.
        largest_unit: photos of the largest group that can ever come, where units are groups.
        budget: labels by which you hope to be done, such as what one look would take; the choice of photos aims at it.
        seed: of the draw.

    Raises:
        InputError: an argument is not what it must be.
    """

    def __init__(
        self, thresholds: ArrayLike, *, alpha: float, delta: float = 0.05, floor: float = 0.1, largest_unit: int = 1,
        budget: int | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        order = floats("thresholds", thresholds)
        if order.ndim != 1 or not order.size or not np.isfinite(order).all() or np.unique(order).size != order.size:
            raise InputError("thresholds must be finite numbers [T], each once, at least one; give them in their order")
        check_share("alpha", alpha)
        check_share("delta", delta)
        check_share("floor", floor, most=True)
        whole("largest_unit", largest_unit, least=1, most=10**6)
        whole("seed", seed)
        self._order = order
        self._budget = None if budget is None else whole("budget", budget, least=1, most=10**12)
        self._seed = seed
        self._bets = Bets.start(order.size, alpha=alpha, delta=delta, floor=floor, largest=largest_unit, budget=budget)
        self._proven_at: list[int | None] = [None] * order.size
        self._labels = self._wrong = self._photos = self._asked = 0
        self._units: dict[str, None] = {}

    @classmethod
    def resume(cls, state: SequentialState) -> SequentialCertificate:
        """The certificate that had this state; it goes on as that one would."""
        made = cls(
            [one.threshold for one in state.thresholds], alpha=state.alpha, delta=state.delta, floor=state.floor,
            largest_unit=state.largest_unit, budget=state.budget, seed=state.seed,
        )  # fmt: skip
        for name in _SUMS:
            values = np.array([getattr(one, name) for one in state.thresholds], dtype=np.float64)
            if values.shape != getattr(made._bets, name).shape:
                raise InputError(f"state must have sums of this version, got {name} of shape {list(values.shape)}")
            setattr(made._bets, name, values)
        made._proven_at = [one.proven_at for one in state.thresholds]
        made._labels, made._wrong, made._photos = state.labels, state.wrong, state.photos
        made._units = dict.fromkeys(state.units)
        made._asked = len(state.units)
        return made

    def __copy__(self) -> SequentialCertificate:
        """The same, to go on apart from this one."""
        made = SequentialCertificate.__new__(SequentialCertificate)
        # Sums are replaced as they grow, never changed.
        made.__dict__ |= {**self.__dict__, "_bets": copy.copy(self._bets)}
        made._proven_at, made._units = [*self._proven_at], dict(self._units)
        return made

    # ---------------------------------------------------------------------------- labels

    def ask(self, name: str, scores: ArrayLike, p_hat: ArrayLike, *, photos: Sequence[str] | None = None) -> UnitAsked:
        """The next unit: which of its photos are to be labelled. Chances rest on what was added before.

        Args:
            name: of the photo or group, new.
            scores: one, or [m].
            p_hat: guessed chance of each answer to be wrong, in [0, 1], from rows that prove nothing.
            photos: names [m] by which photos are drawn; of one photo ``name``.

        Raises:
            InputError: a name that came before, more photos than the largest unit, or another value out of range.
        """
        values, guess = np.atleast_1d(floats("scores", scores)), np.atleast_1d(floats("p_hat", p_hat))
        self._check_new(name)
        called = (name,) if photos is None else tuple(texts("photos", photos))
        if values.ndim != 1 or values.shape != guess.shape or len(called) != values.size:
            raise InputError(
                f"scores, p_hat and photos must be of as many photos, got {list(values.shape)}, {list(guess.shape)} "
                f"and {len(called)}"
            )
        if values.size > self._bets.largest:
            raise InputError(
                f"largest_unit must be at least the photos of any unit, got {self._bets.largest} and {values.size} of "
                f"{name!r}; begin again with the largest there can be"
            )
        todo = self._todo
        spread = 0.0 if todo is None else float(self._bets.spread[todo])
        chances = labelling_chances(guess, self._bets.floor, alpha=self._bets.alpha, spread=spread)
        chances = np.where(self._exits(values).any(axis=0), chances, 0.0)
        drawn = draw_for_labelling(called, chances, seed=self._seed)
        asked = UnitAsked(name, self._asked, called, values, guess, chances, drawn)
        self._asked += 1
        return asked

    def add(self, unit: UnitAsked, wrong: ArrayLike) -> None:
        """Take a unit's labels; units come in the order in which they were asked for, also those without any.

        Args:
            unit: of ``ask``.
            wrong: of each photo that was drawn, in their order, whether Stage A's answer is wrong: 0 or 1.

        Raises:
            InputError: another unit is next, its draw was changed, or there is no label for each that was drawn.
        """
        if not isinstance(unit, UnitAsked):
            raise InputError(f"unit must be what ask gave, got {shown(unit)}; ask for it first")
        self._check_new(unit.name)
        if unit.place != len(self._units):
            raise InputError(
                f"units must be added in the order they were asked for, got {unit.name!r}, which is number "
                f"{unit.place + 1}, after {len(self._units)}; labels that come first must not choose"
            )
        exits = self._exits(unit.scores)
        exiting = exits.any(axis=0)
        again = draw_for_labelling(unit.photos, unit.chances, seed=self._seed)
        if not (again == unit.drawn).all() or (exiting & (unit.chances < self._bets.floor)).any():
            raise InputError(f"unit must be as it was asked for, got {unit.name!r} changed; a draw is made once")
        answers = np.atleast_1d(floats("wrong", wrong)) if np.size(wrong) else np.zeros(0)
        if answers.shape != (int(unit.drawn.sum()),) or not np.isin(answers, (0, 1)).all():
            raise InputError(
                f"wrong must be 0 or 1 for each of the {int(unit.drawn.sum())} drawn photos of {unit.name!r}, got "
                f"{answers.tolist()}; skip none"
            )
        self._labels += answers.size
        self._wrong += int(answers.sum())
        self._photos += unit.scores.size
        self._units[_key(unit.name)] = None
        if exiting.any():
            given = np.full(unit.scores.shape, np.nan)
            given[unit.drawn] = answers
            chances = np.where(exiting, unit.chances, 1.0)
            self._bets.add(unit.p_hat[None], chances[None], given[None], exits)
            for at in np.flatnonzero(self._bets.log_missing <= 0):
                if self._proven_at[at] is None:
                    self._proven_at[at] = self._labels

    def _check_new(self, name: str) -> None:
        texts("name", (name,))
        if _key(name) in self._units:
            raise InputError(f"name must be of a unit that has not come yet, got {name!r} again; each counts once")

    def _exits(self, scores: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Photos [T, m] that exit at a threshold which is still to be proven."""
        open_ones = np.array([at is None for at in self._proven_at])
        return np.asarray((scores >= self._order[:, None]) & open_ones[:, None], dtype=bool)

    # ---------------------------------------------------------------------------- what is known

    @property
    def _todo(self) -> int | None:
        """The first threshold that is not proven."""
        return next((place for place, at in enumerate(self._proven_at) if at is None), None)

    @property
    def proven(self) -> bool:
        """Whether a threshold is proven."""
        return self._proven_at[0] is not None

    @property
    def threshold(self) -> float | None:
        """The laxest proven so far, of those before the first that is not; None: none."""
        done = self._order[: self._todo]
        return float(done.min()) if done.size else None

    @property
    def capital(self) -> NDArray[np.float64]:
        """Of every threshold [T]; 1 / delta proves it."""
        return np.asarray(self._bets.capital.sum(axis=1))

    @property
    def progress(self) -> NDArray[np.float64]:
        """How far each threshold is [T], in [0, 1]: log capital over its goal; 1 where it has ever been reached."""
        done = np.array([at is not None for at in self._proven_at])
        share = 1 + self._bets.log_missing / math.log(self._bets.delta)
        return np.asarray(np.where(done, 1.0, np.clip(share, 0.0, 1.0)))

    @property
    def more(self) -> int | None:
        """About how many more labels prove the next threshold, if errors go on as they seem; None: no number would.

        0 where all are proven.
        """
        at = self._todo
        if at is None:
            return 0
        growth, photos = float(self._bets.growth[at]), float(self._bets.photos[at])
        if growth <= 0 or not photos or self._bets.error[at] >= self._bets.alpha:
            return None
        return math.ceil(float(self._bets.log_missing[at]) / growth * float(self._bets.labels[at]) / photos)

    @property
    def advice(self) -> str:
        """What to do now, in one sentence: go on, stop, or give up."""
        at = self._todo
        if at is None:
            return "All thresholds are proven: stop."
        named, alpha = f"threshold {self._order[at]:.4g}", self._bets.alpha
        if not self._bets.labels[at]:
            return f"Label photos to prove {named}."
        seems = self._bets.error[at]
        if self.more is None:
            return (
                f"The error of exits at {named} looks like {seems:.2%}, above {alpha:.2%} or too near to it: give up, "
                "or begin again with stricter thresholds and other photos."
            )
        return f"About {self.more:,} more labels prove {named}, if errors go on as they seem ({seems:.2%})."

    @property
    def state(self) -> SequentialState:
        """All there is of it, to be written and resumed."""
        sums = {name: getattr(self._bets, name).tolist() for name in _SUMS}
        cells = [
            ThresholdState(
                threshold=float(threshold), proven_at=self._proven_at[place],
                **{name: values[place] for name, values in sums.items()},
            )
            for place, threshold in enumerate(self._order)
        ]  # fmt: skip
        bets = self._bets
        return SequentialState(
            alpha=bets.alpha, delta=bets.delta, floor=bets.floor, largest_unit=bets.largest, budget=self._budget,
            seed=self._seed, thresholds=tuple(cells), labels=self._labels, wrong=self._wrong, photos=self._photos,
            units=tuple(self._units),
        )  # fmt: skip


# What of ``Bets`` is kept for each threshold.
_SUMS = [one.name for one in fields(Bets) if one.name in ThresholdState.model_fields]


def _key(name: str) -> str:
    return sha256_bytes(name.encode())[:16]
