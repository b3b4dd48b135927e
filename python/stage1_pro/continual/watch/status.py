"""How the loop is doing, at a glance: one record, one HTML page, metrics for Prometheus, a dashboard for Grafana."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from stage1_pro.continual.watch.monitor import (
    Advice,
    Cbpe,
    Drift,
    DriftConfig,
    Estimate,
    Evidence,
    Rolling,
    ServedColumns,
    Signals,
    TriggerConfig,
    TriggerState,
    cbpe,
    drift,
    hajek_risk,
    horvitz_thompson_risk,
    naive_risk,
    rolling,
    triggers,
)
from stage1_pro.continual.watch.srt import ControllerState
from stage1_pro.errors import DependencyError, InputError, need
from stage1_pro.files import write_bytes, write_text
from stage1_pro.policies.policy import Policy, Said
from stage1_pro.record import Record

Health = Literal["holds", "not shown", "watch", "alarm"]
_DAY = 86400.0
# Parts of the time in a picture: as many as have this many audited exits each, within limits.
_AUDITS_OF_BLOCK = 100
_BLOCKS = (4, 30)


class MonitorConfig(Record):
    """What is watched, and with which limits."""

    alpha: float = Field(gt=0, lt=1, description="limit of the risk of exits")
    delta: float = Field(0.05, gt=0, lt=1, description="chance of any false alarm of the e-process")
    level: float = Field(0.95, gt=0, lt=1, description="of intervals")
    recent: int = Field(5000, ge=1, description="last rows that estimates, CBPE and drift are made of")
    floor: float = Field(0.02, gt=0, le=1, description="smallest propensity with which an exit is audited")
    drift: DriftConfig = DriftConfig()
    triggers: TriggerConfig = TriggerConfig()


class Status(Record):
    """``status.json``: what is known of the cascade that serves, and what is to be done."""

    format_version: Literal[1] = 1
    time: float = Field(description="seconds since the epoch")
    bundle: str = Field("", description="sha256 of its manifest")
    health: Health = Field(description="alarm: harm is shown; watch: a sign of it; holds: interval below alpha")
    headline: str
    sentences: list[str]
    alpha: float
    limit: Said = Field(
        "watched",
        description="what alpha, a limit of photos, is to the policy at the threshold in force: promised by its "
        "certificate, covered by a stricter promise, promised of groups, only asked for, or neither",
    )
    promises: list[str] = Field([], description="all that the policy promises at the threshold in force, in words")
    n_rows: int = Field(description="recent decisions that the figures speak of")
    n_exits: int
    exit_rate: float | None
    n_labelled: int
    threshold: float | None = Field(description="in force; null where nobody moved the policy's. Above 1: nobody exits")
    certified: float | None = Field(description="calibrated, where something is promised of it and it is in force")
    calibrated: float | None = Field(None, description="threshold of the policy; labels never loosen it further")
    exit_risk: Estimate = Field(description="of exits, by Hájek's weights")
    exit_risk_horvitz_thompson: Estimate
    stage_a_error: Estimate = Field(description="of Stage A on all rows, by Hájek's weights")
    stage_a_error_naive: Estimate = Field(description="the same from labels as they came: biased to hard images")
    evidence: Evidence
    cbpe: Cbpe
    drift: Drift | None = Field(description="null where river is not installed")
    rolling: Rolling | None
    verdict: Advice
    audit_rate: float | None = Field(
        None, description="least chance of review in force; the verdict's is asked for. Null: not known here"
    )


def assess(
    rows: ServedColumns,
    config: MonitorConfig,
    *,
    now: float,
    triggers_before: TriggerState,
    evidence: Evidence,
    new_labels: int = 0,
    manual: bool = False,
    missing: str = "",
    controller: ControllerState | None = None,
    threshold: float | None = None,
    bundle: str = "",
    policy: Policy | None = None,
) -> tuple[Status, TriggerState]:
    """Look at everything once: figures of the recent rows, evidence, drift, and what the triggers make of them.

    Args:
        rows: served decisions; the last ``config.recent`` are looked at.
        config: what is watched.
        now: seconds since the epoch.
        triggers_before: what the last look gave.
        evidence: the e-process, kept from the day a model or threshold began to serve.
        new_labels: since the last training.
        manual: somebody asks for a training.
        missing: what a training still needs, as ``Signals`` has it.
        controller: state of the threshold, where one steers it; its alarms count, too.
        bundle: sha256 of the manifest that serves.
        threshold: that of exits which serves, where one was set; a stricter one of the controller is in force with it.
        policy: the one that was exported, at its own threshold: it says what was promised, and what still is at the
            threshold in force; without it nothing is said to be.
    """
    recent = rows.last(config.recent)
    known = ~np.isnan(recent.wrong)
    out, audited = recent.exited, recent.audited
    estimated = cbpe(recent.score, out, level=config.level)
    try:
        seen = drift(recent.score, config.drift)
    except DependencyError:
        seen = None
    alarms = [at for at in (evidence.alarm_at, None if controller is None else controller.alarm_at) if at is not None]
    drifting = seen is not None and seen.drifting
    signals = Signals(
        alarm_at=max(alarms, default=None), cbpe=estimated, drifting=drifting, new_labels=new_labels, manual=manual,
        missing=missing,
    )  # fmt: skip
    after, verdict = triggers(triggers_before, signals, alpha=config.alpha, now=now, config=config.triggers)
    answered = None
    if recent.predicted is not None and recent.label is not None:
        has = recent.label >= 0
        answered = rolling(recent.predicted[has], recent.label[has])
    exit_risk = _risk(recent, audited, out, level=config.level, alpha=config.alpha)
    health = _health(config.alpha, exit_risk, estimated, seen, evidence, verdict)
    start, in_force = _thresholds(controller, threshold, policy)
    # Evidence and alarms are of what was promised; what a tightened threshold gives up is promised no more.
    held = policy if policy is None or in_force is None else policy.at(in_force)
    limit: Said = "watched" if held is None else held.says_of_exits(config.alpha)[0]
    promises = [] if held is None else [str(one) for one in held.promises]
    headline, watched = _words(health, config.alpha, policy, given_up=held is not policy)
    status = Status(
        time=now,
        bundle=bundle,
        health=health,
        headline=headline,
        sentences=_sentences(
            config.alpha,
            exit_risk,
            estimated,
            seen,
            evidence,
            verdict,
            thresholds=(start, in_force),
            limit=watched,
            others=promises if limit == "watched" else [],
            certified=None if policy is None else bool(policy.promises),
        ),
        alpha=config.alpha,
        limit=limit,
        promises=promises,
        n_rows=len(recent),
        n_exits=int(out.sum()),
        exit_rate=float(out.mean()) if len(recent) else None,
        n_labelled=int(known.sum()),
        threshold=in_force,
        certified=start if promises else None,
        calibrated=start,
        exit_risk=exit_risk,
        exit_risk_horvitz_thompson=horvitz_thompson_risk(recent.wrong[out], recent.propensity[out], level=config.level),
        stage_a_error=_risk(recent, known, np.ones_like(known), level=config.level),
        stage_a_error_naive=naive_risk(recent.wrong[known], level=config.level),
        evidence=evidence,
        cbpe=estimated,
        drift=seen,
        rolling=answered,
        verdict=verdict,
    )
    return status, after


def _thresholds(
    controller: ControllerState | None, threshold: float | None, policy: Policy | None
) -> tuple[float | None, float | None]:
    """The threshold that was calibrated and the one in force; both None where nobody moves it."""
    start = None
    if controller is not None:
        start = controller.config.certified
    elif threshold is not None:
        start = threshold if policy is None else policy.exit_threshold
    known = (start, threshold, None if controller is None else controller.threshold)
    return start, max((one for one in known if one is not None), default=None)


def _risk(rows: ServedColumns, labelled: NDArray[Any], among: NDArray[np.bool_], **how: float) -> Estimate:
    """Hájek's risk from labelled rows; the chances of all rows ``among`` which they were drawn are the design."""
    chances = rows.propensity[among]
    design = {"floor": float(chances.min()), "ceiling": float(chances.max())} if chances.size else {}
    return hajek_risk(rows.wrong[labelled], rows.propensity[labelled], **design, **how)


# -------------------------------------------------------------------------------- the page


@dataclass(frozen=True)
class Timeline:
    """Served decisions in parts of time, in their order, of which a picture is drawn: a row each, or sums of hours.

    Args:
        time: mean serving time of each part [N], seconds since the epoch.
        n: decisions [N].
        exits: of them exits [N].
        doubt: sum of 1 - score over exits [N].
        chances: smallest and largest propensity of any exit; None without exits.
        audited: time, wrong (0 or 1) and propensity of every exit with a label [n, 3], in the order of time.
    """

    time: NDArray[np.float64]
    n: NDArray[np.float64]
    exits: NDArray[np.float64]
    doubt: NDArray[np.float64]
    chances: tuple[float, float] | None
    audited: NDArray[np.float64]

    @classmethod
    def of(cls, rows: ServedColumns) -> Self:
        """Rows, each a part."""
        chances, known = rows.propensity[rows.exited], rows.audited
        return cls(
            time=rows.time, n=np.ones(len(rows)), exits=rows.exited.astype(np.float64),
            doubt=np.where(rows.exited, 1 - rows.score, 0.0),
            chances=(float(chances.min()), float(chances.max())) if chances.size else None,
            audited=np.stack([rows.time[known], rows.wrong[known], rows.propensity[known]], axis=1),
        )  # fmt: skip

    def blocks(self, count: int) -> list[Timeline]:
        """About so many pieces with about as many decisions each."""
        place = np.floor((np.cumsum(self.n) - self.n / 2) * count / self.n.sum()).astype(np.int64)
        starts = self.time[np.unique(place, return_index=True)[1]]
        audited = np.searchsorted(starts[1:], self.audited[:, 0], side="right")
        return [
            replace(self, time=self.time[mine], n=self.n[mine], exits=self.exits[mine], doubt=self.doubt[mine],
                    audited=self.audited[audited == number])
            for number, mine in enumerate(place == one for one in np.unique(place))
        ]  # fmt: skip

    @property
    def middle(self) -> float:
        """Mean serving time."""
        return float(self.time @ self.n / self.n.sum())

    @property
    def risk(self) -> Estimate:
        """Of exits, by Hájek's weights."""
        design = {} if self.chances is None else dict(zip(("floor", "ceiling"), self.chances, strict=True))
        return hajek_risk(self.audited[:, 1], self.audited[:, 2], **design)

    @property
    def expected(self) -> float:
        """Risk of exits by confidences alone, as ``cbpe`` has it; NaN without exits."""
        exits = float(self.exits.sum())
        return float(self.doubt.sum()) / exits if exits else math.nan


def write_page(path: Path | str, status: Status, rows: ServedColumns | Timeline) -> None:
    """Write the status as one self-contained HTML page, atomically; a person sees at a glance whether all is well.

    Args:
        path: HTML file to write.
        status: what ``assess`` gave.
        rows: the decisions to draw, of any length.
    """
    from stage1_pro.report import page

    one, stage_a = status.exit_risk, status.stage_a_error
    estimates: tuple[tuple[str, Estimate | Cbpe, str], ...] = (
        ("Risk of exits", one, f"{one.n_wrong} wrong of {one.n} audited"),
        ("Stage A's error on all photos", stage_a, f"{stage_a.n} labels, weighted"),
        ("The same, unweighted", status.stage_a_error_naive, "biased: hard photos are reviewed more often"),
        ("Risk of exits by confidences alone", status.cbpe, "assumes that confidences are still right"),
    )
    html = page(
        "status.html.j2",
        status=status,
        when=dt.datetime.fromtimestamp(status.time, dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        figures=[(title, found.value, found.low, found.high, note) for title, found, note in estimates],
        detectors={"adwin": "ADWIN", "page_hinkley": "Page–Hinkley", "kswin": "KSWIN"},
        closed=status.threshold is not None and status.threshold > 1,
        pictures=_pictures(status, Timeline.of(rows) if isinstance(rows, ServedColumns) else rows),
        level=f"{100 * one.level:.4g}%",
    )
    write_text(path, html)


def _pictures(status: Status, served: Timeline) -> list[Any]:
    """Risk and exits over days, as report pictures; none without rows."""
    from stage1_pro.metrics.figures import timeline_png
    from stage1_pro.report import Picture

    total = int(served.n.sum())
    if total < 2:
        return []
    start, limit = float(served.time[0]), "promised" if status.limit == "promised" else "limit"

    def days(parts: list[Timeline]) -> NDArray[np.float64]:
        """The middle of each part, in days from the first row."""
        return (np.array([part.middle for part in parts]) - start) / _DAY

    blocks = served.blocks(min(max(len(served.audited) // _AUDITS_OF_BLOCK, _BLOCKS[0]), _BLOCKS[1], total))
    fine = served.blocks(min(_BLOCKS[1], total))
    risks = [part.risk for part in blocks]
    value, low, high = np.array([(one.value, one.low, one.high) for one in risks], dtype=np.float64).T
    expected = np.array([part.expected for part in blocks], dtype=np.float64)
    alarm_at = status.evidence.alarm_at
    alarms = {"alarm": [(alarm_at - start) / _DAY] if alarm_at is not None and alarm_at >= start else []}
    risk = timeline_png(
        days(blocks), {"from audits": value, "from confidences": expected}, y="share of exits that are wrong",
        band=(low, high), limits={limit: status.alpha}, marks=alarms,
    )  # fmt: skip
    rates = {"exits": [float(part.exits.sum() / part.n.sum()) for part in fine]}
    return [
        Picture(
            "risk", "Risk of exits",
            "Wrong answers among exits, from audited ones, in equal parts with 95% intervals; beside it "
            "what confidences alone would say. Where the two part, the world has changed in a way scores do not show.",
            risk,
        ),
        Picture(
            "exits", "Exits",
            "Share of photos that Stage A answers. It falls when the threshold tightens: safety costs Stage B's "
            "time.",
            timeline_png(days(fine), rates, y="share of photos", marks=alarms),
        ),
    ]  # fmt: skip


# -------------------------------------------------------------------------------- Prometheus and Grafana

# Every metric that is exposed: its help, and where ``Status`` has it. Each has the label ``bundle``.
METRICS = {
    "stage1_alpha": ("limit of the risk of exits", "alpha"),
    "stage1_exit_risk": ("risk of exits from audited ones (Hajek)", "exit_risk.value"),
    "stage1_exit_risk_low": ("lower end of its interval", "exit_risk.low"),
    "stage1_exit_risk_high": ("upper end of its interval", "exit_risk.high"),
    "stage1_stage_a_error": ("error of Stage A on all rows, weighted by 1 / propensity", "stage_a_error.value"),
    "stage1_stage_a_error_naive": ("the same from labels as they came, biased", "stage_a_error_naive.value"),
    "stage1_cbpe_exit_risk": ("risk of exits by confidences alone", "cbpe.value"),
    "stage1_evidence": ("e-value against risk <= alpha", "evidence.value"),
    "stage1_evidence_limit": ("e-value at which it alarms", "evidence.limit"),
    "stage1_alarm": ("1 when the e-process has alarmed", "evidence.alarm"),
    "stage1_drifting": ("1 when enough detectors see a change of confidences", "drift.drifting"),
    "stage1_threshold": ("exit threshold in force", "threshold"),
    "stage1_threshold_calibrated": ("threshold of the policy, which labels never loosen further", "calibrated"),
    "stage1_exit_rate": ("share of recent decisions that exited", "exit_rate"),
    "stage1_decisions": ("recent decisions that these figures speak of", "n_rows"),
    "stage1_labels": ("of them, those with a label", "n_labelled"),
    "stage1_audited_exits": ("exits with a label", "exit_risk.n"),
    "stage1_audit_rate": ("share of exits to audit now", "verdict.audit_rate"),
    "stage1_rolling_mcc": ("Matthews correlation of the last 100 labelled answers", "rolling.mcc_100"),
    "stage1_rolling_accuracy": ("accuracy of the last 10 labelled answers", "rolling.accuracy_10"),
    "stage1_train_wanted": ("1 when the triggers ask for a training", "verdict.train"),
    "stage1_status_time_seconds": ("when these figures were made, since the epoch", "time"),
}


def samples(status: Status) -> Iterator[tuple[str, float]]:
    """Names of ``METRICS`` with their values; what is not known is left out."""
    for name, (_, place) in METRICS.items():
        value: Any = status
        for field in place.split("."):
            value = None if value is None else getattr(value, field)
        if value is not None:
            yield name, float(value)


def exposition(status: Status) -> bytes:
    """The metrics in Prometheus' text format.

    Raises:
        DependencyError: prometheus_client is not installed.
    """
    try:
        from prometheus_client import CollectorRegistry, Gauge, generate_latest
    except ModuleNotFoundError as error:
        raise need("continual", error.name or "prometheus_client") from error
    registry = CollectorRegistry()
    for name, value in samples(status):
        Gauge(name, METRICS[name][0], ["bundle"], registry=registry).labels(status.bundle[:12]).set(value)
    return generate_latest(registry)


def write_textfile(path: Path | str, status: Status) -> None:
    """Write the metrics for the textfile collector of Prometheus' node exporter, atomically; the name ends in .prom.

    Raises:
        InputError: another ending, which the collector would not read.
        DependencyError: prometheus_client is not installed.
    """
    if Path(path).suffix != ".prom":
        raise InputError(f"path must end in .prom, got {path}; the textfile collector reads no other file")
    write_bytes(path, exposition(status))


# Panels of the dashboard: title, unit, and the metrics that it draws.
_PANELS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Alarm", "bool_on_off", ("stage1_alarm",)),
    ("Risk of exits", "percentunit",
     ("stage1_exit_risk", "stage1_exit_risk_low", "stage1_exit_risk_high", "stage1_cbpe_exit_risk", "stage1_alpha")),
    ("Evidence of harm", "none", ("stage1_evidence", "stage1_evidence_limit")),
    ("Threshold", "none", ("stage1_threshold", "stage1_threshold_calibrated")),
    ("Exits and audits", "percentunit", ("stage1_exit_rate", "stage1_audit_rate")),
    ("Stage A's error", "percentunit", ("stage1_stage_a_error", "stage1_stage_a_error_naive")),
    ("Rolling figures", "none", ("stage1_rolling_mcc", "stage1_rolling_accuracy")),
    ("Drift, training wanted", "bool_on_off", ("stage1_drifting", "stage1_train_wanted")),
    ("Decisions and labels", "none", ("stage1_decisions", "stage1_labels", "stage1_audited_exits")),
    ("Age of the figures", "s", ("stage1_status_time_seconds",)),
)  # fmt: skip


def dashboard(title: str = "stage1: is the risk kept?") -> dict[str, Any]:
    """A dashboard for Grafana (classic JSON model, importable), of the metrics that ``exposition`` gives."""
    source = {"type": "prometheus", "uid": "${source}"}
    panels = []
    for place, (name, unit, metrics) in enumerate(_PANELS):
        targets = [
            {
                "refId": chr(ord("A") + index),
                "datasource": source,
                "expr": f'{"time() - " if unit == "s" else ""}{metric}{{bundle=~"$bundle"}}',
                "legendFormat": metric.removeprefix("stage1_").replace("_", " ") + " {{bundle}}",
            }
            for index, metric in enumerate(metrics)
        ]
        panels.append({
            "id": place + 1, "title": name, "type": "timeseries", "datasource": source, "targets": targets,
            "description": "; ".join(METRICS[metric][0] for metric in metrics),
            "gridPos": {"x": 12 * (place % 2), "y": 8 * (place // 2), "w": 12, "h": 8},
            "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        })  # fmt: skip
    variables = [
        {"name": "source", "label": "Data source", "type": "datasource", "query": "prometheus"},
        {
            "name": "bundle", "label": "Bundle", "type": "query", "datasource": source, "refresh": 2,
            "query": {"query": "label_values(stage1_alpha, bundle)", "refId": "bundle"},
            "includeAll": True, "multi": True, "current": {"text": "All", "value": "$__all"},
        },
    ]  # fmt: skip
    return {
        "id": None, "uid": "stage1-continual", "title": title, "tags": ["stage1"], "timezone": "utc",
        "schemaVersion": 39, "version": 1, "editable": True, "refresh": "1m", "panels": panels,
        "time": {"from": "now-7d", "to": "now"}, "templating": {"list": variables}, "annotations": {"list": []},
    }  # fmt: skip


# -------------------------------------------------------------------------------- helpers

_HEADLINES: dict[Health, str] = {
    "holds": "Exits are wrong no more often than the limit.",
    "not shown": "No sign of harm; too few audits to show that exits stay within the limit.",
    "watch": "Watch: something has changed.",
    "alarm": "Alarm: exits are wrong more often than the limit.",
}
# Where the exit error is promised at this very limit, and where it was until the threshold was tightened.
_PROMISED: dict[Health, str] = _HEADLINES | {
    "holds": "The promise holds.",
    "not shown": "No sign of harm; too few audits to show that the promise holds.",
    "alarm": "Alarm: exits are wrong more often than promised.",
}
_WAS_PROMISED: dict[Health, str] = _HEADLINES | {"alarm": "Alarm: exits are wrong more often than was promised."}
# ``own`` is the policy's limit, ``alpha`` the one that is watched, of photos.
_LIMITS: dict[Said, str] = {
    "promised": "Promised was at most {own}.",
    "covered by a promise": "It is watched against a limit of {alpha}; promised is less, at most {own}.",
    "promised of groups": "Promised of groups, one photo drawn from each: at most {own}. Watched here: photos, of "
    "which large groups have more, against a limit of {alpha}. This page does not test the promise.",
    "asked for": "Asked for was at most {own}; nothing is promised of it. It is watched against a limit of {alpha}.",
    "watched": "It is watched against a limit of {alpha}, which no policy promises.",
}
# The same where the threshold has been tightened since.
_GIVEN_UP: dict[Said, str] = _LIMITS | {
    "promised": "At the certified threshold, at most {own} was promised.",
    "covered by a promise": "It is watched against a limit of {alpha}; at the certified threshold, less was promised, "
    "at most {own}.",
    "promised of groups": "At the certified threshold, at most {own} was promised of groups, one photo drawn from "
    "each. Watched here: photos, of which large groups have more, against a limit of {alpha}. This page does not test "
    "what was promised.",
}


def _words(health: Health, alpha: float, policy: Policy | None, *, given_up: bool) -> tuple[str, str]:
    """Headline, and what the limit is or was to the policy at its own threshold; ``given_up``: a stricter one serves.

    Evidence is against the policy as it was calibrated, whatever is promised by now.
    """
    if policy is None:
        return _HEADLINES[health], f"It is watched against a limit of {_share(alpha)}."
    said, own = policy.says_of_exits(alpha)
    headlines = _HEADLINES if said != "promised" else _WAS_PROMISED if given_up else _PROMISED
    sentence = (_GIVEN_UP if given_up else _LIMITS)[said]
    return headlines[health], sentence.format(own=_share(own), alpha=_share(alpha))


def _health(
    alpha: float, risk: Estimate, estimated: Cbpe, seen: Drift | None, evidence: Evidence, verdict: Advice
) -> Health:
    alarmed = evidence.alarm or "risk alarm" in (*verdict.reasons, *verdict.waiting)
    if alarmed or (risk.low is not None and risk.low > alpha):
        return "alarm"
    shifted = estimated.low is not None and estimated.low > alpha
    if shifted or (seen is not None and seen.drifting) or (risk.value is not None and risk.value > alpha):
        return "watch"
    return "holds" if risk.high is not None and risk.high <= alpha else "not shown"


def _sentences(
    alpha: float, risk: Estimate, estimated: Cbpe, seen: Drift | None, evidence: Evidence,
    verdict: Advice, *, thresholds: tuple[float | None, float | None], limit: str, others: Sequence[str],
    certified: bool | None,
) -> list[str]:  # fmt: skip
    """What a person should know, in plain words: ``limit`` says what alpha is, ``others`` what else is promised.

    ``thresholds`` are the calibrated one, ``certified`` or not (None: not known), and the one in force.
    """
    said = []
    calibrated = "certified" if certified else "calibrated"
    if risk.value is None or risk.low is None or risk.high is None:
        said.append("No exit has been audited yet, so nothing is known of the risk. Review some.")
    else:
        said.append(
            f"{risk.n} exits were checked and {risk.n_wrong} were wrong: about {_share(risk.value)} of all exits, "
            f"between {_share(risk.low)} and {_share(risk.high)}. {limit}"
        )
    if others:
        said.append(f"The policy promises something else: {'; '.join(others)}. This page does not test it.")
    if evidence.alarm and evidence.alarm_n is not None:
        said.append(
            f"The alarm came after {evidence.alarm_n} checked photos that exit at the {calibrated} threshold. While "
            f"exits are wrong no more often than {_share(alpha)}, it ever comes in at most {_share(evidence.delta)} of "
            "all cases."
        )
    if seen is not None and seen.drifting:
        said.append("Confidences have changed: other photos come than before. More is audited until that is over.")
    if estimated.low is not None and estimated.low > alpha:
        said.append("Judged by confidences alone, exits would be wrong more often than the limit.")
    start, in_force = thresholds
    if start is not None and in_force is not None:
        if in_force > 1:
            said.append("The threshold is at its highest: nobody exits, Stage B answers every photo.")
        elif in_force > start:
            said.append(
                f"The threshold is tightened from {start:.4f} to {in_force:.4f}: "
                "fewer photos exit, and nothing is promised there."
            )
        else:
            said.append(
                f"The threshold is the {calibrated} one{', not a certified one' if certified is False else ''}."
            )
    if verdict.train:
        said.append(f"Training is asked for: {', '.join(verdict.reasons)}.")
    elif verdict.waiting:
        why = ", ".join(verdict.waiting)
        labels = f"Training ({why}) waits for labels: {verdict.missing}."
        said.append(labels if verdict.missing else f"Training waits until the last one is old enough: {why}.")
    return said


def _share(value: float) -> str:
    return f"{100 * value:.3g}%"
