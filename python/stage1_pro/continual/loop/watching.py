"""What is known of a champion: its decisions, evidence against its promise, the threshold that labels hold it to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from stage1_pro.continual.ledger.history import History, ServedRow
from stage1_pro.continual.loop.config import RoundsConfig
from stage1_pro.continual.loop.registry import Alias
from stage1_pro.continual.watch.alerts import Alert
from stage1_pro.continual.watch.monitor import Evidence, ServedColumns
from stage1_pro.continual.watch.srt import (
    HIGHEST,
    ControllerConfig,
    ControllerState,
    Feedback,
    ThresholdController,
    to_logit,
)
from stage1_pro.continual.watch.status import Status

# Exits whose median propensity is the usual one.
_USUAL = 200


@dataclass(frozen=True)
class ChampionView:
    """What one look knows of a champion.

    Args:
        decisions: what it served, with the labels that hold.
        evidence: the e-process against its promise.
        controller: state of its threshold; None where nothing steers it.
        newest_harm: serving time of the newest exit counted in the last alarm, -inf without one; later rows may judge a
            candidate.
    """

    decisions: ServedColumns
    evidence: Evidence
    controller: ControllerState | None
    newest_harm: float = -math.inf

    @property
    def alarm_at(self) -> float | None:
        """Time of the last alarm, of the e-process or of the controller."""
        alarms = (self.evidence.alarm_at, None if self.controller is None else self.controller.alarm_at)
        return max((at for at in alarms if at is not None), default=None)


def view_champion(
    history: History, bundle: str, since: float, config: RoundsConfig, *, certified: float, steer: bool
) -> ChampionView:
    """What a bundle served since it is champion, and what the labels say of it.

    ``certified`` is the threshold of its certificate, which labels may tighten where it may ``steer``.
    """
    served = [one for one in history.of(bundle, since) if one.exit_score is not None]
    wrong = history.errors_of_a(served)
    decisions = _columns(history, bundle, served, wrong)
    # All of it, every time: an answer may be dated back, or take another's place, which a state that only goes on
    # would miss.
    feedback = sorted(
        Feedback(history.held[one.id].time, one.id, one.exit_score or 0.0, wrong=wrong[one.id],
                 exited=one.action == "exit", propensity=one.propensity)
        for one in served if one.id in wrong
    )  # fmt: skip
    # Nothing is stricter than a threshold at which nobody exits.
    controller = None
    if steer and to_logit(min(certified, 1.0)) < HIGHEST:
        floor = _floor(config)
        how = ControllerConfig(alpha=config.monitor.alpha, certified=min(certified, 1.0), audit_rate=floor, floor=floor)
        controller = ThresholdController.replay(how, feedback).state
    # What a tightened threshold defers would exit at the certified one. Its labels count for the promise as well:
    # without them tightening would hide that the promise is broken.
    promised = [one for one in feedback if one.score >= certified]
    evidence = _evidence(decisions, promised, config)
    if controller is not None and evidence.alarm:
        # Until the next champion: a promise that is known to be broken stays broken, however few errors came of late.
        jumped = to_logit(controller.config.certified) + controller.config.jump
        controller = controller.at_least(max(jumped, -math.inf if controller.centre is None else controller.centre))
    view = ChampionView(decisions, evidence, controller)
    # Rows served before the alarm may be of the world before it; the rows that made it were picked by their errors.
    # Neither is a random sample of the world as it is.
    alarm = -math.inf if view.alarm_at is None else view.alarm_at
    times = {one.id: one.time for one in served}
    newest = max((times[one.event] for one in promised if one.known <= alarm), default=-math.inf)
    return replace(view, newest_harm=newest)


def _columns(history: History, bundle: str, served: Sequence[ServedRow], wrong: Mapping[str, bool]) -> ServedColumns:
    """The served rows as columns; who abstained gave no answer that could be right or wrong."""
    classes = {name: index for index, name in enumerate(history.classes(bundle))}

    def truth(one: ServedRow) -> int:
        held = history.held.get(one.id)
        return -1 if held is None or one.label not in classes else classes.get(held.label, -1)

    return ServedColumns(
        time=np.array([one.time for one in served], dtype=np.float64),
        exited=np.array([one.action == "exit" for one in served], dtype=bool),
        wrong=np.array([float(wrong.get(one.id, math.nan)) for one in served], dtype=np.float64),
        propensity=np.array([one.propensity for one in served], dtype=np.float64),
        score=np.array([one.exit_score for one in served], dtype=np.float64),
        predicted=np.array([classes.get(one.label, -1) for one in served], dtype=np.int64),
        label=np.array([truth(one) for one in served], dtype=np.int64),
    )


def _evidence(decisions: ServedColumns, promised: Sequence[Feedback], config: RoundsConfig) -> Evidence:
    """One e-process from the champion's first day on, in the order in which labels became known.

    A process of the recent rows alone would begin anew at every look, and its false alarms would add up.
    """
    monitor, floor = config.monitor, _floor(config)
    usual = decisions.propensity[decisions.exited][:_USUAL]  # The first ones, so that later looks bet as earlier ones.
    reference = max(float(np.median(usual)), floor) if usual.size else floor
    evidence = Evidence(alpha=monitor.alpha, delta=monitor.delta, reference=reference, floor=floor)
    return evidence.after(
        np.array([one.wrong for one in promised]),
        propensity=np.array([one.propensity for one in promised]),
        time=np.array([one.known for one in promised]),
    )


def _floor(config: RoundsConfig) -> float:
    return min(config.plan.floor, config.monitor.floor)


def alerts_of(status: Status, alarm_at: float | None, champion: Alias, before: Mapping[str, Any]) -> dict[str, Alert]:
    """Alerts of a look, keyed so that one alarm or one change of health is told once.

    ``alarm_at`` is when the last alarm began, ``before`` the health that is remembered (``is``) and since when.
    """
    figures = {"exit_risk": status.exit_risk.value, "exit_risk_low": status.exit_risk.low, "alpha": status.alpha}

    told: list[tuple[Literal["alarm", "watch"], str]] = [] if alarm_at is None else [("alarm", repr(alarm_at))]
    if status.health == "alarm" and alarm_at is None and before["is"] != "alarm":
        told.append(("alarm", f"after {before['since']!r}"))
    if status.health == "watch" and before["is"] not in ("watch", "alarm"):
        told.append(("watch", f"after {before['since']!r}"))
    text = " ".join(status.sentences)
    return {
        f"{kind}/{champion.version}/{when}": Alert(
            time=status.time, kind=kind, title=status.headline, text=text, bundle=status.bundle, figures=figures
        )
        for kind, when in told
    }
