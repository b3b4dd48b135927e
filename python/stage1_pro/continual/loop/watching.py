"""What is known of a champion: its decisions, evidence against its promise, the threshold that labels hold it to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from stage1_pro.chain import canonical
from stage1_pro.continual.loop.config import RoundsConfig
from stage1_pro.continual.loop.history import KEEP_EVERY, Answered, History, Kept, ServedRow
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
from stage1_pro.continual.watch.status import Status, Timeline
from stage1_pro.files import sha256_bytes
from stage1_pro.record import Record

# Exits whose median propensity is the usual one.
USUAL = 200
# A name, and the states to keep under it.
Unkept = tuple[str, list[Kept]]


@dataclass(frozen=True)
class ChampionView:
    """What one look knows of a champion.

    Args:
        decisions: what it served last, with the labels that hold.
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


class Folded(Record):
    """What the labels say of a champion, up to one of them: the e-process, and its threshold where labels steer it."""

    evidence: Evidence
    controller: ControllerState | None


def view_champion(
    history: History, bundle: str, since: float, config: RoundsConfig, *, certified: float, steer: bool
) -> tuple[ChampionView, Unkept]:
    """What a bundle served since it is champion, and what the labels say of it; and the states to keep of the latter.

    ``certified`` is the threshold of its certificate, which labels may tighten where it may ``steer``.
    """
    served = history.recent(bundle, since, config.monitor.recent)
    held = {one.id: one for one in history.answered(bundle, served[0].time)} if served else {}
    folded, unkept = _fold(history, bundle, since, config, certified, steer=steer)
    evidence, controller = folded.evidence, folded.controller
    if controller is not None and evidence.alarm:
        # Until the next champion: a promise that is known to be broken stays broken, however few errors came of late.
        jumped = to_logit(controller.config.certified) + controller.config.jump
        controller = controller.at_least(max(jumped, -math.inf if controller.centre is None else controller.centre))
    view = ChampionView(_columns(history, bundle, served, held), evidence, controller)
    # Rows served before the alarm may be of the world before it; the rows that made it were picked by their errors.
    # Neither is a random sample of the world as it is.
    return replace(view, newest_harm=history.newest_harm(bundle, since, certified, view.alarm_at)), unkept


def timeline(history: History, bundle: str, since: float, view: ChampionView) -> Timeline:
    """All that a champion served, to be drawn: its decisions where the view has them all, else their sums by hours."""
    hours = history.hours(bundle, since)
    if sum(one.n for one in hours) <= len(view.decisions):
        return Timeline.of(view.decisions)
    audited = sorted(
        (one.time, float(history.error_of_a(one)), one.propensity)
        for one in history.answered(bundle, since)
        if one.selected and one.action == "exit" and one.exit_score is not None
    )
    lows, highs = ([end for one in hours if (end := getattr(one, name)) is not None] for name in ("low", "high"))
    n = np.array([one.n for one in hours], dtype=np.float64)
    return Timeline(
        time=np.array([one.seconds for one in hours]) / n, n=n, exits=np.array([float(one.exits) for one in hours]),
        doubt=np.array([one.doubt for one in hours]), chances=(min(lows), max(highs)) if lows else None,
        audited=np.array(audited, dtype=np.float64).reshape(-1, 3),
    )  # fmt: skip


def _columns(history: History, bundle: str, served: Sequence[ServedRow], held: Mapping[str, Answered]) -> ServedColumns:
    """The served rows as columns; who abstained gave no answer that could be right or wrong."""
    classes = {name: index for index, name in enumerate(history.classes(bundle))}
    wrong = {name: float(history.error_of_a(one)) for name, one in held.items() if one.selected}

    def truth(one: ServedRow) -> int:
        answer = held.get(one.id)
        return -1 if answer is None or one.label not in classes else classes.get(answer.truth, -1)

    return ServedColumns(
        time=np.array([one.time for one in served], dtype=np.float64),
        exited=np.array([one.action == "exit" for one in served], dtype=bool),
        wrong=np.array([wrong.get(one.id, math.nan) for one in served], dtype=np.float64),
        propensity=np.array([one.propensity for one in served], dtype=np.float64),
        score=np.array([one.exit_score for one in served], dtype=np.float64),
        predicted=np.array([classes.get(one.label, -1) for one in served], dtype=np.int64),
        label=np.array([truth(one) for one in served], dtype=np.int64),
    )


def _fold(
    history: History, bundle: str, since: float, config: RoundsConfig, certified: float, *, steer: bool
) -> tuple[Folded, Unkept]:
    """One e-process from the champion's first day on, and its threshold, by labels in the order that they became known.

    A process of the recent rows alone would begin anew at every look, and its false alarms would add up. It goes on
    from the last state behind which nothing has changed: an answer may be dated back, or take another's place.
    """
    monitor, floor = config.monitor, _floor(config)
    # The first ones, so that later looks bet as earlier ones.
    usual = history.propensities(bundle, since, USUAL)
    reference = max(float(np.median(usual)), floor) if usual else floor
    evidence = Evidence(alpha=monitor.alpha, delta=monitor.delta, reference=reference, floor=floor)
    controller = None
    # Nothing is stricter than a threshold at which nobody exits.
    if steer and to_logit(min(certified, 1.0)) < HIGHEST:
        how = ControllerConfig(alpha=monitor.alpha, certified=min(certified, 1.0), audit_rate=floor, floor=floor)
        controller = ThresholdController(how)
    begun = Folded(evidence=evidence, controller=None if controller is None else controller.state)
    key = sha256_bytes(canonical([bundle, since, certified, begun.model_dump()]).encode())
    n, behind, states = 0, (-math.inf, ""), []
    last = history.kept(key)
    if last is not None:
        n, behind = last.n, (last.known, last.event_id)
        before = Folded.parse(last.body, "a state that was kept")
        evidence = before.evidence
        controller = None if before.controller is None else ThresholdController.resume(before.controller, last.window)
    feedback = [
        Feedback(one.known, one.id, one.exit_score or 0.0, wrong=history.error_of_a(one), exited=one.action == "exit",
                 propensity=one.propensity)
        for one in history.feedback(bundle, since, behind)
    ]  # fmt: skip
    while feedback:
        part = feedback[: KEEP_EVERY - n % KEEP_EVERY]
        feedback = feedback[len(part) :]
        # What a tightened threshold defers would exit at the certified one. Its labels count for the promise as well:
        # without them tightening would hide that the promise is broken.
        promised = [one for one in part if one.score >= certified]
        evidence = evidence.after(
            np.array([one.wrong for one in promised]),
            propensity=np.array([one.propensity for one in promised]),
            time=np.array([one.known for one in promised]),
        )
        if controller is not None:
            controller.update(part)
        n += len(part)
        found = Folded(evidence=evidence, controller=None if controller is None else controller.state)
        window = b"" if controller is None else controller.window
        states.append(Kept(n, part[-1].known, part[-1].event, found.model_dump_json(), window))
    return Folded(evidence=evidence, controller=None if controller is None else controller.state), (key, states)


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
