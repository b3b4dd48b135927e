"""Photos of no split, what a run's model says of them, and labels that prove a threshold; nothing here is a file."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logit

from stage1_pro.data.predictions import Predictions
from stage1_pro.files import uniform
from stage1_pro.policies.bets import shuffle_units
from stage1_pro.policies.candidates import Risk
from stage1_pro.policies.exiting import ByLimits
from stage1_pro.policies.ordering import order_candidates
from stage1_pro.policies.platt import fit_platt, score
from stage1_pro.policies.rows import Rows
from stage1_pro.policies.sequential import SequentialCertificate, UnitAsked
from stage1_pro.training.unlabelled import beside_order

# Thresholds that are tried, a step of coverage apart: they share most photos, so that more of them find little more.
_STEPS = 40


@dataclass(frozen=True)
class PoolAnswers:
    """Photos of no split and what the model says of each; the rows of ``val_select`` stand before them."""

    arrays: dict[str, NDArray[Any]]  # files, sha256, groups [N] and logits, of the photos
    rows: Rows
    scores: NDArray[np.float64]  # of all rows; NaN never exits
    lowest: float
    p_hat: NDArray[np.float64]  # guessed chance of each photo's answer to be wrong [N]

    @classmethod
    def of(cls, kind: type[ByLimits], order: Predictions, arrays: dict[str, NDArray[Any]]) -> PoolAnswers:
        """What a policy sees of them; guessed errors are learned from ``val_select``, whose rows prove nothing."""
        rows = beside_order(order, arrays, arrays["logits_a"].argmax(axis=1), arrays["groups"].tolist())
        scores, lowest = kind.scored(rows)
        fit = rows.fit_half()
        raw = logit(np.clip(scores, 1e-9, 1 - 1e-9))
        platt = fit_platt(raw[fit], ~rows.wrong[fit])
        p_hat = np.clip(1 - np.nan_to_num(score(raw[~fit], platt.a, platt.b), nan=0.0), 0.0, 1.0)
        return cls(arrays, rows, scores, lowest, p_hat)

    @cached_property
    def of_pool(self) -> NDArray[np.float64]:
        """Scores of the photos [N]."""
        return self.scores[~self.rows.fit_half()]

    @cached_property
    def sha256(self) -> list[str]:
        """Content hashes of the photos."""
        return [str(one) for one in self.arrays["sha256"]]

    @cached_property
    def groups(self) -> list[str]:
        """Groups of the photos."""
        return [str(one) for one in self.arrays["groups"]]

    def units(self, seed: int) -> list[int]:
        """One photo of each group [U], drawn by seed, in the order in which they are looked through."""
        drawn: dict[str, tuple[float, str, int]] = {}
        for place, (name, group) in enumerate(zip(self.sha256, self.groups, strict=True)):
            one = uniform(seed, "certify photo", name), name, place
            drawn[group] = min(drawn.get(group, one), one)
        places = {name: place for _, name, place in drawn.values()}
        return [places[name] for name in shuffle_units([*places], seed=seed)]

    def thresholds(self, alpha: float, n_units: int) -> NDArray[np.float64]:
        """Thresholds in the order of testing, from ``val_select`` alone, as a calibration takes them."""
        fit = self.rows.fit_half()
        found = order_candidates(
            self.scores[fit], [Risk("exit error", alpha, self.rows.wrong[fit])], n_certify=n_units,
            groups=None if self.rows.groups is None else self.rows.groups[fit], lowest=self.lowest, grid="float64",
        )  # fmt: skip
        return found[np.unique(np.linspace(0, found.size - 1, min(found.size, _STEPS)).astype(np.int64))]


@dataclass(frozen=True)
class Won:
    """A proof: its threshold, and what was known at its moment."""

    threshold: float
    labels: int
    photos: int  # looked through
    answers: int  # in the history


@dataclass(frozen=True)
class LabelGiven:
    """A label that counts."""

    at: int  # of the pool
    chance: float
    label: str | None  # None: nobody could tell
    wrong: bool


class Labelling:
    """Photos looked through one by one, some of them labelled, and what that proves; nothing is forgotten or skipped.

    Args:
        proof: with the thresholds, in their order.
        photos: to look through.
        classes: of the model.
        seed: of the draw and the order.
        batch: labels after which the progress is shown anew.
    """

    def __init__(
        self, proof: SequentialCertificate, photos: PoolAnswers, classes: Sequence[str], *, seed: int, batch: int
    ) -> None:
        self.proof, self.photos, self.classes, self.batch = proof, photos, list(classes), batch
        self.thresholds = [one.threshold for one in proof.state.thresholds]
        self.units = photos.units(seed)
        self.won: Won | None = None
        self.labels = self.wrong = self.place = 0  # labelled, of those wrong, looked through
        self.history: list[LabelGiven] = []
        self.asked: UnitAsked | None = None
        self.before: tuple[SequentialCertificate, int, UnitAsked] | None = None
        self._advance()
        self._tell()

    @property
    def photo(self) -> str | None:
        """Content hash of the photo to label next; None: no photo is left, or all thresholds are proven."""
        return None if self.asked is None else self.asked.name

    @property
    def at(self) -> int | None:
        """The place of that photo among all."""
        return None if self.asked is None else self.units[self.asked.place]

    @property
    def can_undo(self) -> bool:
        """Whether the last answer may be taken back: nobody has seen what came of it."""
        return self.before is not None

    @property
    def todo(self) -> int | None:
        """The next threshold to prove, by its place; None: all are."""
        at = 0 if self.won is None else self.thresholds.index(self.won.threshold) + 1
        return at if at < len(self.thresholds) else None

    @cached_property
    def unit_scores(self) -> NDArray[np.float64]:
        """Scores of the photos in the order in which they are looked through [U]."""
        return self.photos.of_pool[self.units]

    def count(self, label: str | None) -> bool:
        """Take the class of the photo asked for, None where nobody can tell; give whether that proves a threshold.

        Who cannot tell counts as a wrong answer of the model: leaving hard photos out would hide its errors.
        """
        unit, at = self.asked, self.at
        assert unit is not None
        assert at is not None
        answer = int(self.photos.arrays["logits_a"][at].argmax())
        wrong = label is None or self.classes.index(label) != answer
        self.before = copy.copy(self.proof), self.place, unit
        self.history.append(LabelGiven(at, float(unit.chances[0]), label, wrong))
        self.labels, self.wrong = self.labels + 1, self.wrong + wrong
        self.proof.add(unit, [wrong])
        threshold = self.proof.threshold
        proven = threshold is not None and (self.won is None or threshold < self.won.threshold)
        if threshold is not None and proven:
            self.won = Won(threshold, self.labels, self.place, len(self.history))
        if proven or self.labels % self.batch == 0:
            self.before = None
            self._tell()
        self._advance()
        return proven

    def take_back(self) -> bool:
        """Take the last answer back, if it may be; give whether it was.

        Only as long as nobody has seen what came of it: who sees the progress fall knows that the model disagreed.
        """
        if self.before is None:
            return False
        self.proof, self.place, self.asked = self.before
        self.before = None
        self.labels -= 1
        self.wrong -= self.history.pop().wrong
        return True

    def _advance(self) -> None:
        """Look through photos up to the next that is drawn."""
        self.asked = None
        while self.todo is not None and self.place < len(self.units):
            at = self.units[self.place]
            unit = self.proof.ask(self.photos.sha256[at], self.photos.of_pool[at], self.photos.p_hat[at])
            self.place += 1
            if unit.drawn.any():
                self.asked = unit
                return
            self.proof.add(unit, [])

    def _tell(self) -> None:
        """What may be shown of the progress until the next batch of labels."""
        todo = self.todo
        share = 1.0 if todo is None else float(self.proof.progress[todo])
        self.shown = {"labels": self.labels, "share": share, "more": self.proof.more if self.labels else None}
