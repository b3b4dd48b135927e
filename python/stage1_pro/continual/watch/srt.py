"""The selective retraining threshold: it follows recent labels, and never loosens past its certificate.

Three parts move u = logit(threshold): selective adaptive conformal inference at every label (Gibbs & Candès 2021, on
items that would exit at the current threshold), a slow pull to a rolling centre (weighted risk control over recent
labels), and a jump when an e-process on audited exits finds the risk above alpha. The same feedback gives the same
state byte for byte, in whatever order. No database, no torch, no clock.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from pydantic import Field, model_validator

from stage1_pro.continual.watch.monitor import LEAST_AUDIT_RATE, Evidence
from stage1_pro.errors import InputError
from stage1_pro.record import Record

# Scores of exactly 0 and 1 have no logit.
_FARTHEST = 40.0
# Above every score: nobody exits.
CLOSED = math.nextafter(1.0, 2.0)
# In logits: a threshold at which nobody exits.
HIGHEST = 12.0


@dataclass(frozen=True, slots=True, order=True)
class Feedback:
    """One reviewed decision; they are taken in the order of ``known``, then ``event``.

    Args:
        known: seconds since the epoch at which the label became known.
        event: id of the decision.
        score: exit score of Stage A, in [0, 1].
        wrong: Stage A's own answer is wrong; of a deferred item that is what would have been served had it exited.
        exited: Stage A's answer was served.
        propensity: chance with which the item was selected for review, in (0, 1].
    """

    known: float
    event: str
    score: float
    wrong: bool
    exited: bool
    propensity: float

    def __post_init__(self) -> None:
        if not 0 <= self.score <= 1:
            raise InputError(f"score must be in [0, 1], got {self.score} of event {self.event!r}")
        if not 0 < self.propensity <= 1:
            raise InputError(f"propensity must be in (0, 1], got {self.propensity} of event {self.event!r}")
        if not math.isfinite(self.known):
            raise InputError(f"known must be a time, got {self.known} of event {self.event!r}")


class ControllerConfig(Record):
    """How the threshold follows labels."""

    alpha: float = Field(gt=0, lt=1, description="largest risk of exits")
    certified: float = Field(ge=0, le=1, description="the certificate's threshold: never below it")
    step: float = Field(
        0.35, gt=0, description="eta', in logits: a wrong exit adds step * (1 - alpha), a right one takes step * alpha"
    )
    audit_rate: float = Field(1.0, gt=0, le=1, description="e_exit: propensity with which exits are usually audited")
    floor: float = Field(LEAST_AUDIT_RATE, gt=0, le=1, description="smallest propensity that can occur")
    highest: float = Field(HIGHEST, gt=0, lt=_FARTHEST, description="u_max, in logits; there nobody exits")
    window: int = Field(600, ge=1, description="last labels that the rolling centre is made of")
    pull: float = Field(0.002, ge=0, lt=1, description="share of the way to the centre at each label; 0: no centre")
    every: int = Field(20, ge=1, description="labels after which the centre is found anew")
    delta: float = Field(0.05, gt=0, lt=1, description="of the e-process; its alarm makes the threshold jump")
    jump: float = Field(1.0, ge=0, description="logits that an alarm tightens by at least")

    @model_validator(mode="after")
    def _consistent(self) -> ControllerConfig:
        if self.floor > self.audit_rate:
            raise ValueError(f"floor must be at most audit_rate, got {self.floor} and {self.audit_rate}")
        if to_logit(self.certified) >= self.highest:
            raise ValueError(f"certified must be below the highest threshold, got {self.certified}")
        return self


class ControllerState(Record):
    """Where a controller stands; equal feedback gives equal bytes.

    ``u - logit(certified) = from_feedback + from_centre + from_alarms + from_clips`` and ``from_feedback = step *
    (weight_wrong - alpha * weight_trials)``, to rounding.
    """

    config: ControllerConfig
    u: float = Field(description="logit of the threshold")
    centre: float | None = Field(None, description="logit; null until recent labels name one")
    n: int = Field(0, description="labels taken")
    n_trials: int = Field(0, description="of them, items that would have exited at the threshold of the moment")
    weight_trials: float = Field(0.0, description="sum of their audit_rate / propensity")
    weight_wrong: float = Field(0.0, description="the same of those that were wrong")
    from_feedback: float = 0.0
    from_centre: float = 0.0
    from_alarms: float = 0.0
    from_clips: float = Field(0.0, description="taken back at the certificate (positive) and at the highest (negative)")
    alarms: int = 0
    alarm_at: float | None = Field(None, description="last alarm")
    evidence: Evidence
    last: tuple[float, str] | None = Field(None, description="known and event of the last label taken")

    @property
    def threshold(self) -> float:
        """A row exits iff its score is at or above it; above 1 where nobody exits."""
        if self.u >= self.config.highest:
            return CLOSED
        return self.config.certified if self.u <= to_logit(self.config.certified) else to_score(self.u)

    def at_least(self, u: float) -> ControllerState:
        """The same with a threshold whose logit is ``u`` or higher; the difference counts among alarms."""
        higher = min(max(self.u, u), self.config.highest)
        return self.model_copy(update={"u": higher, "from_alarms": self.from_alarms + (higher - self.u)})


def to_logit(score: float) -> float:
    """The logit of a score in [0, 1]; 0 and 1 get a finite one.

    Raises:
        InputError: a score outside [0, 1].
    """
    if not 0 <= score <= 1:
        raise InputError(f"score must be in [0, 1], got {score}; thresholds and exit scores are shares")
    if score in (0.0, 1.0):
        return -_FARTHEST if score == 0 else _FARTHEST
    return min(max(math.log(score) - math.log1p(-score), -_FARTHEST), _FARTHEST)


def to_score(u: float) -> float:
    """The score whose logit is ``u``."""
    return 1 / (1 + math.exp(-u)) if u >= 0 else math.exp(u) / (1 + math.exp(u))


class ThresholdController:
    """Follows the feedback of reviewed decisions with an exit threshold; tightens freely, loosens to the certificate.

    >>> controller = ThresholdController(ControllerConfig(alpha=0.02, certified=0.9))
    >>> controller.update([Feedback(1.0, "a", 0.95, wrong=True, exited=True, propensity=1.0)])
    >>> round(controller.state.threshold, 3)
    0.927

    ``state`` is a frozen record of it; ``fingerprint()`` is its hash.
    """

    def __init__(self, config: ControllerConfig) -> None:
        self.config = config
        self._fresh = Evidence(alpha=config.alpha, delta=config.delta, reference=config.audit_rate, floor=config.floor)
        self._lowest = to_logit(config.certified)
        self.state = ControllerState(config=config, u=self._lowest, evidence=self._fresh)
        # Of each recent label the logit of its score, audit_rate / propensity, and whether the answer was wrong.
        self._window: deque[tuple[float, float, bool]] = deque(maxlen=config.window)

    @classmethod
    def replay(cls, config: ControllerConfig, feedback: Iterable[Feedback]) -> ThresholdController:
        """The controller that all of this feedback makes, in whatever order it is given."""
        controller = cls(config)
        controller.update(feedback)
        return controller

    @classmethod
    def resume(cls, state: ControllerState, window: bytes) -> ThresholdController:
        """The controller that had this state and ``window``; it goes on as that one would."""
        controller = cls(state.config)
        controller.state = state
        rows = np.frombuffer(window, dtype="<f8").reshape(-1, 3).tolist()
        controller._window.extend((u, weight, bool(wrong)) for u, weight, wrong in rows)
        return controller

    @property
    def window(self) -> bytes:
        """The recent labels that the centre is made of; with ``state``, all that there is of it."""
        return np.array(self._window, dtype="<f8").tobytes()

    def update(self, feedback: Iterable[Feedback]) -> None:
        """Take labels that became known since the last call, in the order of ``known`` and ``event``.

        Their decisions may be of any age and in any order: an item counts if it would exit at the present threshold.

        Args:
            feedback: one of each event.

        Raises:
            InputError: a label that became known before the last one taken, or an event twice in a row; nothing of the
                batch is taken then. Stamp labels when they are stored, or replay the log.
        """
        batch = sorted(feedback)
        keys = [(item.known, item.event) for item in batch]
        if self.state.last is not None:
            keys.insert(0, self.state.last)
        for before, after in itertools.pairwise(keys):
            if after <= before:
                raise InputError(
                    f"feedback must be of events in the order that labels became known, each once, got {after[1]!r} "
                    f"at {after[0]} after {before[1]!r} at {before[0]}; replay the log"
                )
        low = next((item for item in batch if item.propensity < self.config.floor), None)
        if low is not None:
            raise InputError(
                f"propensity must be at least the floor {self.config.floor:g}, got {low.propensity:g} of event "
                f"{low.event!r}; begin a controller with a smaller floor"
            )
        for item in batch:
            self._take(item)

    def _take(self, item: Feedback) -> None:
        config, now = self.config, self.state
        u = start = now.u
        score = to_logit(item.score)
        weight = config.audit_rate / item.propensity
        self._window.append((score, weight, item.wrong))
        change: dict[str, object] = {"n": now.n + 1, "last": (item.known, item.event)}

        # At the highest threshold nobody exits, so there is nothing to learn from but the window.
        trial = start <= score and start < config.highest
        if trial:
            raw = config.step * (float(item.wrong) - config.alpha) * weight
            u = self._clip(start + raw)
            change |= {
                "n_trials": now.n_trials + 1,
                "weight_trials": now.weight_trials + weight,
                "weight_wrong": now.weight_wrong + weight * item.wrong,
                "from_feedback": now.from_feedback + raw,
                "from_clips": now.from_clips + (u - (start + raw)),
            }

        centre = self._centre() if (now.n + 1) % config.every == 0 else now.centre
        change["centre"] = centre
        if centre is not None and config.pull:
            pulled = self._clip(u + config.pull * (centre - u))
            change["from_centre"] = now.from_centre + (pulled - u)
            u = pulled

        # Late labels of what would exit no more say nothing against the threshold of now.
        if item.exited and trial:
            evidence = now.evidence.after(item.wrong, propensity=item.propensity, time=item.known)
            if evidence.alarm:
                safe = max(u + config.jump, -math.inf if centre is None else centre)
                jumped = self._clip(safe)
                change |= {
                    "from_alarms": now.from_alarms + (jumped - u),
                    "alarms": now.alarms + 1,
                    "alarm_at": item.known,
                }
                u = jumped
                # What comes now is of another threshold.
                evidence = self._fresh
            change["evidence"] = evidence
        self.state = now.model_copy(update={**change, "u": u})

    def _clip(self, u: float) -> float:
        return min(max(u, self._lowest), self.config.highest)

    def _centre(self) -> float | None:
        """The laxest logit at which recent labels keep the risk: (sum w wrong + w0) / (sum w + w0) <= alpha.

        One more wrong item of the largest weight is counted, as in conformal risk control. Where no recent score lies
        between it and the certificate, nothing speaks against the certificate, and it is the centre.
        """
        rows = np.array(self._window, dtype=np.float64)
        u, weight, wrong = rows[np.argsort(-rows[:, 0], kind="stable")].T
        more = float(weight.max())
        risk = (np.cumsum(weight * wrong) + more) / (np.cumsum(weight) + more)
        whole = np.append(u[1:] != u[:-1], True)
        kept = np.flatnonzero(whole & (risk <= self.config.alpha))
        if not kept.size:
            return None
        place = int(kept[-1])
        free = place + 1 == u.size or u[place + 1] < self._lowest
        return self._lowest if free else self._clip(float(u[place]))
