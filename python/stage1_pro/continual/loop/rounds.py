"""What the loop's states do with real bundles, events and labels: the parts of ``loop.Loop``.

Labels are dealt by the draw that selected their event. Draws below the audit floor are a plain random sample of all
that was served, whatever the cascade thought of it: by a hash of the image they judge candidates (the guard), certify
them (a fresh ``val_calib``) or teach. All other labels, mostly of hard images, teach. An image has one
role for good. Importing this loads no torch; training and export (``tasks``) run where the executor says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from stage1_pro.continual.learn.rewards import Decisions, RewardSpec, verified
from stage1_pro.continual.ledger import audit
from stage1_pro.continual.ledger.guard import GuardVault
from stage1_pro.continual.ledger.labels import (
    GUARD_SOURCES,
    Resolved,
    audited,
    ingest,
    read_bundles,
    read_events,
    resolve,
)
from stage1_pro.continual.loop import tasks
from stage1_pro.continual.loop.executors import FILES, Executor, Work, do_work
from stage1_pro.continual.loop.machine import WORK, Compared, Job, Round, Watched
from stage1_pro.continual.loop.promotion import Anchor, Measured, Side, Terms, Verdict, evaluate, refuse
from stage1_pro.continual.loop.registry import Alias, Registry
from stage1_pro.continual.serving.events import EventLog, Novelty, ReviewPlan, uniform
from stage1_pro.continual.serving.live import PLAN, novelty_path, read_pairs
from stage1_pro.continual.watch.alerts import Alert
from stage1_pro.continual.watch.monitor import Evidence, Rows, TriggerState
from stage1_pro.continual.watch.srt import (
    HIGHEST,
    ControllerConfig,
    ControllerState,
    Feedback,
    ThresholdController,
    to_logit,
)
from stage1_pro.continual.watch.status import MonitorConfig, Status, look, write_page
from stage1_pro.data.duplicates import cluster_copies
from stage1_pro.data.photos import Folder
from stage1_pro.data.splits import Row, Splits
from stage1_pro.deploy.bundle import Bundle
from stage1_pro.deploy.reference import TOLERANCES
from stage1_pro.errors import ArtifactError, InputError, NotReachableError
from stage1_pro.files import sha256_bytes, sha256_file, write_bytes
from stage1_pro.record import Record

Role = Literal["guard", "certify", "learn"]
# Exits whose propensity is the usual one.
_USUAL = 200


class RoundsConfig(Record):
    """What is watched and how candidates are made and judged; part of ``loop.json``."""

    monitor: MonitorConfig
    plan: ReviewPlan = ReviewPlan()
    novelty_events: int = Field(500, ge=2, description="first ones of a champion, which later ones are novel beside")
    steer: bool = Field(True, description="the threshold follows labels, never below the certificate")
    guard_share: float = Field(0.3, gt=0, lt=1, description="of random audits, that judge candidates")
    certify_share: float | None = Field(
        None, gt=0, lt=1, description="the same, that certify them; null: .4, or what is left. The others teach"
    )
    select_share: float = Field(0.2, gt=0, lt=1, description="of learned rows, to stop training by")
    least_rows: int = Field(50, ge=2, description="fewest new rows of each role")
    least_certify: int = Field(0, ge=0, description="fewest new rows that certify, where that is more")
    least_guard: int = Field(
        300, ge=0, description="the same of rows that judge: fewer see but the largest gains, and a look uses them up"
    )
    spec: RewardSpec = RewardSpec()
    mgrpo: tuple[dict[str, Any], ...] = Field(({},), description="options of mgrpo.propose, a proposal each")
    tuning: tuple[dict[str, Any], ...] = Field((), description="options of rlvr.tune, a proposal each")
    through: Literal["heads", "adapter"] = Field("heads", description="what tuning moves; mgrpo moves heads")
    recent: int = Field(512, ge=1, description="images served last whose policy mgrpo keeps near the champion's")
    terms: Terms = Terms()
    largest_growth: float = Field(1.1, gt=0, description="candidate's size over the champion's, at most")
    largest_slowdown: float | None = Field(
        1.25, gt=0, description="candidate's time of a decision over the champion's: upper end of its interval, at "
        "most; null: not asked, for what must come out the same twice, such as a simulation"
    )  # fmt: skip
    timed_photos: int = Field(200, ge=10, description="of the guard, at most, to time decisions on")
    timed_passes: int = Field(3, ge=1, description="over these photos; each counts with its fastest")
    timed_seconds: float = Field(300.0, gt=0, description="that timing may take, ten decisions apart")

    @model_validator(mode="after")
    def _some_proposal(self) -> Self:
        if not self.mgrpo and not self.tuning:
            raise ValueError("mgrpo or tuning must name the options of one proposal or more")
        if self.guard_share + self.certified_share > 1:
            raise ValueError("guard_share and certify_share must be at most 1 together")
        return self

    @property
    def certified_share(self) -> float:
        """Of random audits, that certify."""
        return min(0.4, 1 - self.guard_share) if self.certify_share is None else self.certify_share

    def least(self, part: Role) -> int:
        """Fewest new rows of a role."""
        more = {"guard": self.least_guard, "certify": self.least_certify, "learn": 0}
        return max(self.least_rows, more[part])


class RunOf(Record):
    """Which run a bundle of the registry came from."""

    run: str
    model_fingerprint: str


class Snapshot(Record):
    """What was collected: image and label of every row that may be learned from or certified on, none of the guard's.

    ``guard`` names the guard epoch alone.
    """

    until: float
    learn: tuple[tuple[str, str, str], ...] = Field(description="image, label, source")
    certify: tuple[tuple[str, str, str], ...]
    recent: tuple[str, ...] = Field(description="images of those to learn from, the ones served last")
    guard: str
    n_guard: int
    threshold: float | None = Field(
        None, description="that the champion was held to then; it is judged as it served. Null: its policy's"
    )


class _Seen(NamedTuple):
    """What is known of a champion: labels that hold by event, its decisions, evidence, threshold.

    ``harm`` is when the last of the exits was served that its last alarm was made of.
    """

    bundle: str
    held: dict[str, Resolved]
    rows: Rows
    evidence: Evidence
    controller: ControllerState | None
    harm: float


def role(image_sha256: str, draw: float, config: RoundsConfig) -> Role:
    """What a labelled image is for, by its event's draw in [0, 1).

    Some random audits teach: all else that is labelled was deferred, doubted or new, and of what is sure and wrong
    nothing would be learned.
    """
    if draw >= config.plan.floor:
        return "learn"
    place = uniform(config.plan.seed, "guard", image_sha256)
    if place < config.guard_share:
        return "guard"
    return "certify" if place < config.guard_share + config.certified_share else "learn"


class Rounds:
    """The parts of a loop.

    Args:
        registry: bundles, aliases and the folder of everything.
        log: what serving writes.
        executor: where decisions on guard and anchor are made.
        config: how.
    """

    def __init__(self, registry: Registry, log: EventLog, executor: Executor, config: RoundsConfig) -> None:
        self.registry, self.log, self.executor, self.config = registry, log, executor, config
        # Work is found by its inputs, and paths are among them: however the folder is called, they must be the same.
        self.store, self.root = registry.store, registry.root.absolute()
        self.vault = GuardVault(registry.store)
        self.seen: Status | None = None
        """What the last ``watch`` saw."""

    # ---------------------------------------------------------------------------- monitor

    def watch(self, memory: Mapping[str, Any], champion: Alias, *, now: float, manual: bool) -> Watched:
        """Ingest what was served, and look at the champion's decisions since it began to serve."""
        status, triggers, controller, _ = self._look(memory, champion, now, manual)
        alarms = (status.evidence.alarm_at, None if controller is None else controller.alarm_at)
        self.seen = status
        self._learn_known(champion)
        before = memory.get("health") or {"is": None, "since": champion.time}
        health = before if before["is"] == status.health else {"is": status.health, "since": now}
        kept = {
            "triggers": triggers.model_dump(),
            "health": health,
            "alarm_at": max((at for at in alarms if at is not None), default=None),
        }
        return Watched(
            train=status.verdict.train,
            reasons=status.verdict.reasons,
            # As it comes back from the store, or a look that changed nothing would look like one that did.
            memory=json.loads(json.dumps(kept)),
            threshold=None if controller is None else controller.threshold,
            audit_rate=self._audit_rate(status),
            news=_news(status, controller, champion, before),
            facts={"health": status.health, "exit_risk": status.exit_risk.value, "n_labelled": status.n_labelled},
        )

    def _learn_known(self, champion: Alias) -> None:
        """From the champion's first events, once: what is known, so that serving can say what is novel."""
        assert champion.bundle is not None
        path, least = novelty_path(self.root, champion.bundle), self.config.novelty_events
        if self.config.plan.novelty == 0 or path.exists():
            return
        events = read_events(self.store, since=champion.time, bundle=champion.bundle)
        # Features that were no numbers left zeros.
        first = list(islice((one.sketch for one in events if any(one.sketch)), least))
        if len(first) == least:
            Novelty.fit(first).write(path)

    def _audit_rate(self, status: Status) -> float | None:
        """What the triggers ask for, where that is more than the plan's floor."""
        rate = status.verdict.audit_rate
        return rate if rate > self.config.plan.floor else None

    def status(self, memory: Mapping[str, Any], champion: Alias, *, now: float, page: Path | None = None) -> Status:
        """What ``watch`` would see, changing nothing; also as a page for people."""
        status, _, _, rows = self._look(memory, champion, now, manual=False)
        if page is not None:
            write_page(page, status, rows)
        return status

    def _look(
        self, memory: Mapping[str, Any], champion: Alias, now: float, manual: bool
    ) -> tuple[Status, TriggerState, ControllerState | None, Rows]:
        ingest(self.store, self.log)
        bundle = champion.bundle
        assert bundle is not None
        before = memory.get("triggers")
        triggers = TriggerState(since=champion.time) if before is None else TriggerState.model_validate(before)
        seen = self._seen(bundle, champion.time, now)
        since = max(champion.time, triggers.trained_at or champion.time)
        new = sum(one.time > since for one in seen.held.values())
        status, after = look(
            seen.rows, self.config.monitor, now=now, triggers_before=triggers, new_labels=new, manual=manual,
            missing=self._missing(seen, now), evidence=seen.evidence, controller=seen.controller, bundle=bundle,
        )  # fmt: skip
        floor = self.config.plan.floor
        verdict = status.verdict.model_copy(update={"audit_rate": max(status.verdict.audit_rate, floor)})
        in_force = max(self.registry.audit_rate() or 0.0, floor)
        status = status.model_copy(update={"verdict": verdict, "audit_rate": in_force})
        return status, after, seen.controller, seen.rows

    def _seen(self, bundle: str, since: float, until: float) -> _Seen:
        """What a bundle served since it is champion, and what labels known by then say of it."""
        held = resolve(self.store, sources=GUARD_SOURCES, until=until)
        known = audited(self.store, since=since, until=until, bundle=bundle)
        wrong = dict(zip(known.event_id.tolist(), known.wrong_a.tolist(), strict=True))
        served = [
            one for one in read_events(self.store, since=since, until=until, bundle=bundle)
            if one.exit_score is not None
        ]  # fmt: skip
        classes = {name: index for index, name in enumerate(self._classes(bundle))}
        # Who abstained gave no answer, so there is none to be right or wrong.
        told = [one.label in classes and one.id in held and held[one.id].label in classes for one in served]
        rows = Rows(
            time=np.array([one.time for one in served], dtype=np.float64),
            exited=np.array([one.action == "exit" for one in served], dtype=bool),
            wrong=np.array([float(wrong.get(one.id, math.nan)) for one in served], dtype=np.float64),
            propensity=np.array([one.propensity for one in served], dtype=np.float64),
            score=np.array([one.exit_score for one in served], dtype=np.float64),
            predicted=np.array([classes.get(one.label, -1) for one in served], dtype=np.int64),
            label=np.array(
                [classes[held[one.id].label] if known else -1 for one, known in zip(served, told, strict=True)],
                dtype=np.int64,
            ),
        )
        # All of it, every time: an answer may be dated back, or take another's place, and was then no news to a state
        # that only went on.
        feedback = sorted(
            Feedback(held[one.id].time, one.id, one.exit_score or 0.0, wrong=bool(wrong[one.id]),
                     exited=one.action == "exit", propensity=one.propensity)
            for one in served if one.id in wrong
        )  # fmt: skip
        policy = self.registry.load(bundle).policy
        certified = policy.exit_threshold
        # Nothing is stricter than a threshold at which nobody exits.
        steer = self.config.steer and policy.steerable and to_logit(min(certified, 1.0)) < HIGHEST
        controller = self._steer(certified, feedback) if steer else None
        # What a tightened threshold defers would exit at the certified one: its labels speak of the promise as well, or
        # the threshold would hide that it is broken, at the price of exits.
        promised = [one for one in feedback if one.score >= certified]
        evidence = self._evidence(rows, promised)
        if controller is not None and evidence.alarm:
            # Until the next champion: what is known to be broken is not gone back to because few errors came of late.
            jumped = to_logit(controller.config.certified) + controller.config.jump
            controller = controller.at_least(max(jumped, -math.inf if controller.centre is None else controller.centre))
        # Rows served before may be of the world before it; those that it was made of, by what was wrong with them, are
        # no plain sample, in whatever order they were answered.
        alarms = (evidence.alarm_at, None if controller is None else controller.alarm_at)
        alarm = max((at for at in alarms if at is not None), default=-math.inf)
        times = {one.id: one.time for one in served}
        harm = max((times[one.event] for one in promised if one.known <= alarm), default=-math.inf)
        return _Seen(bundle, held, rows, evidence, controller, harm)

    def _classes(self, bundle: str) -> tuple[str, ...]:
        """Of a bundle that served; none before the first event."""
        facts = read_bundles(self.store).get(bundle)
        return () if facts is None else facts.classes

    def _steer(self, certified: float, feedback: Sequence[Feedback]) -> ControllerState:
        floor = self._floor()
        config = ControllerConfig(
            alpha=self.config.monitor.alpha, certified=min(certified, 1.0), audit_rate=floor, floor=floor
        )
        return ThresholdController.replay(config, feedback).state

    def _evidence(self, rows: Rows, promised: Sequence[Feedback]) -> Evidence:
        """One e-process from the day the champion began to serve, in the order that labels became known.

        One of the recent rows alone would begin anew at every look, and its false alarms would add up.

        Args:
            rows: what was served.
            promised: labels of what exits at the certified threshold.
        """
        monitor, floor = self.config.monitor, self._floor()
        usual = rows.propensity[rows.exited][:_USUAL]  # Of the first ones, so that later looks bet as earlier ones did.
        reference = max(float(np.median(usual)), floor) if usual.size else floor
        evidence = Evidence(alpha=monitor.alpha, delta=monitor.delta, reference=reference, floor=floor)
        return evidence.after(
            np.array([one.wrong for one in promised]),
            propensity=np.array([one.propensity for one in promised]),
            time=np.array([one.known for one in promised]),
        )

    def _floor(self) -> float:
        return min(self.config.plan.floor, self.config.monitor.floor)

    # ---------------------------------------------------------------------------- round

    def collect(self, work: Round) -> Mapping[str, Any]:
        """Freeze what was labelled before the round's time, open its guard epoch, keep the images beyond their time.

        A guard epoch is of images served since the last one that was looked at was frozen; what certifies, since the
        last round. None are from before the champion's last alarm: what judges and certifies is of the world as it is.
        What the champion's run holds judges and certifies nothing: it was learned from.
        """
        until = work.entered
        ingest(self.store, self.log)
        start = max(one.time for one in self.registry.history("champion") if one.bundle == work.champion)
        seen = self._seen(work.champion, start, until)
        dealt = self._deal(seen, until, self._used(work.number))
        kept = {part: [row for row in rows if self._keep(row[0])] for part, rows in dealt.items()}
        missing = self._short(kept)
        if missing:
            raise NotReachableError(f"labelled images must be enough for a round, got {missing}; have more reviewed")
        names = [name for name, _, _ in kept["guard"]]
        # Its rows are in its name: labels dated back while this was killed make another epoch; neither has had a look.
        epoch = f"round-{work.number}-{sha256_bytes(audit.canonical(kept['guard']).encode())[:16]}"
        self._open(epoch, names, kept["guard"], until)
        learn = {name for name, _, _ in kept["learn"]}
        last = {one.image_sha256: one.time for one in read_events(self.store, until=until) if one.image_sha256 in learn}
        # Where nothing steers, what did so before is still in force.
        threshold = self.registry.sync().threshold if seen.controller is None else seen.controller.threshold
        snapshot = Snapshot(
            until=until, learn=tuple(kept["learn"]), certify=tuple(kept["certify"]),
            recent=tuple(sorted(last, key=lambda name: (-last[name], name))[: self.config.recent]), guard=epoch,
            n_guard=len(names), threshold=threshold,
        )  # fmt: skip
        name = snapshot.fingerprint()
        snapshot.write(self.root / "snapshots" / f"{name}.json")
        return {"snapshot": name, "until": until, "guard": epoch, "n_guard": len(names),
                "n_learn": len(snapshot.learn), "n_certify": len(snapshot.certify)}  # fmt: skip

    def _deal(self, seen: _Seen, until: float, used: Mapping[Role, float]) -> dict[Role, list[tuple[str, str, str]]]:
        """Image, label and source of what was labelled by then, by role; ``used``: what earlier rounds used up."""
        plan = self.config.plan
        first = self.registry.history("champion")[0].time
        since = {part: max(time, first) for part, time in used.items()}
        origin = Splits.read(Path(self._run(seen.bundle).run) / "splits.json")
        learned_from = {row.sha256 for row in origin.rows}
        found: dict[Role, dict[str, tuple[str, str, str]]] = {"guard": {}, "certify": {}, "learn": {}}
        roles: dict[str, Role] = {}
        for one in read_events(self.store, until=until):
            fresh = [part for part, time in since.items() if one.time >= time and one.time > seen.harm]
            if fresh and (one.propensity < plan.floor or one.selected != plan.selects(one.id, one.propensity)):
                raise NotReachableError(
                    f"events must be drawn by the loop's own review plan, got {one.id} of another: draws below the "
                    f"floor are no plain sample then; serve with {self.root / PLAN}"
                )
            draw = uniform(plan.seed, "review", one.id)
            # An image that ever judges or certifies is never learned from, whatever it is drawn for later.
            part = role(one.image_sha256, draw, self.config) if one.selected else "learn"
            if roles.get(one.image_sha256, "learn") == "learn":
                roles[one.image_sha256] = part
            if one.id in seen.held and one.selected and part in ("learn", *fresh):
                answer = seen.held[one.id]
                found[part].setdefault(one.image_sha256, (one.image_sha256, answer.label, answer.source))
        return {
            part: [row for name, row in sorted(rows.items()) if roles[name] == part and name not in learned_from]
            for part, rows in found.items()
        }

    def _short(self, dealt: Mapping[Role, Sequence[object]]) -> str:
        """Which roles have too few rows; empty: none."""
        few = [(part, len(rows), self.config.least(part)) for part, rows in dealt.items()]
        return ", ".join(f"{n} of {least} to {part}" for part, n, least in few if n < least)

    def _missing(self, seen: _Seen, now: float) -> str:
        """What a round begun now would lack: labels whose images are still there, or the champion's run."""
        try:
            dealt = self._deal(seen, now, self._used(None))
        except NotReachableError:
            return ""  # The round itself says it, once.
        except ArtifactError as error:
            return str(error)  # Watching and the threshold need no run.
        return self._short({part: [row for row in rows if self._there(row[0])] for part, rows in dealt.items()})

    def proposals(self, work: Round) -> Sequence[Job]:
        """A proposal from the champion's run for every set of options.

        Half of the first run's ``val_select`` is the gate's anchor, which no proposal sees; images of the other half,
        without their labels, are what ``mgrpo`` is held by.
        """
        snapshot, origin = self._snapshot(work), self._run(work.champion)
        judging = {row.sha256 for row in self._anchor_rows()}
        first = self.registry.history("champion")[0].bundle
        holding = Splits.read(Path(self._run(first or "").run) / "splits.json").of("val_select")
        inputs = {
            "run": origin.run, "model": origin.model_fingerprint, "images": str(self.root / "images"),
            "learn": [list(row) for row in snapshot.learn], "certify": [list(row) for row in snapshot.certify],
            "leave_out": sorted(judging), "select_share": self.config.select_share,
            "spec": self.config.spec.model_dump(),
        }  # fmt: skip
        anchor = sorted({row.sha256 for row in holding} - judging)
        by_mgrpo = {**inputs, "method": "mgrpo", "anchor": anchor, "recent": list(snapshot.recent)}
        by_tuning = {**inputs, "method": "tune", "through": self.config.through}
        given = [*((by_mgrpo, one) for one in self.config.mgrpo), *((by_tuning, one) for one in self.config.tuning)]
        return [Job(f"{tasks.__name__}:propose", {**how, "options": options}) for how, options in given]

    def select(self, work: Round, done: Sequence[Work]) -> str:
        """The proposal that gains most on ``val_select``."""
        del work
        gains = {one.key: one.result["gain"] for one in done}
        best = max(gains, key=lambda key: (gains[key] is not None, gains[key] or 0.0))
        if gains[best] is None:
            why = "; ".join(one.result["why"] for one in done)
            raise NotReachableError(f"no proposal earns more than the champion on val_select: {why}")
        return best

    def recalibration(self, work: Round, chosen: Work) -> Job:
        """Certify on the fresh rows what the champion promises, and export."""
        target = self.registry.load(work.champion).policy.target.model_dump(mode="json")
        run = self.root / WORK / chosen.key / FILES / "run"
        return Job(f"{tasks.__name__}:recalibrate", {"run": str(run), "proposal": chosen.key, "target": target})

    def evaluate(self, work: Round) -> Verdict:
        """The gate: the candidate's bundle is measured, both decide on the guard and on the anchor, then every test.

        On the guard the champion decides at the threshold that labels held it to when they were frozen: better than
        what it did before an alarm is not yet better than what serves. The anchor asks of the first one's policy.
        """
        assert work.candidate is not None
        assert work.recalibrated is not None
        run = self.root / WORK / work.recalibrated / FILES / "run"
        candidate, champion = self.registry.load(work.candidate), self.registry.load(work.champion)
        fingerprint = candidate.manifest.provenance.model_fingerprint
        remember_run(self.root, work.candidate, run, fingerprint)
        snapshot = self._snapshot(work)
        epoch = snapshot.guard
        guard = [str(self.root / "images" / name) for name in self.vault.row_ids(epoch)]
        measured = self._measured(champion, candidate, work, guard)
        spec, terms = self.config.spec, self.config.terms
        refused = refuse(work.champion, work.candidate, epoch, measured, spec=spec, now=work.entered, terms=terms)
        if refused is not None:
            return refused
        rows = self._anchor_rows()
        origin = self.registry.history("champion")[0].bundle
        splits = Splits.read(Path(self._run(origin or "").run) / "splits.json")
        files = [str(photo) for photo in splits.photos_of(rows)]
        labels = splits.indices(rows)
        anchor = Anchor(
            verified(labels, "owner", classes=splits.classes, positive=splits.positive),
            np.array([row.group for row in rows], dtype=np.str_),
            {one: np.array([row.source == one for row in rows]) for one in sorted({row.source for row in rows} - {""})},
            origin=self._decide(origin or work.champion, files),
        )
        return evaluate(
            self.vault, epoch,
            Side(work.champion, self._decide(work.champion, guard, snapshot.threshold),
                 self._decide(work.champion, files),
                 champion.policy, champion.manifest.provenance.model_fingerprint),
            Side(work.candidate, self._decide(work.candidate, guard), self._decide(work.candidate, files),
                 candidate.policy, fingerprint),
            anchor, spec=spec, now=work.entered, terms=terms, measured=measured,
        )  # fmt: skip

    def compare(self, work: Round, *, delta: float) -> Compared:
        """Evidence that the candidate is wrong more often than right where it differs from the champion.

        Audited disagreements count alike: weighted by their propensities, which differ fifty-fold, the bets have to be
        so small that a candidate wrong in all of them stays for a hundred audits.
        """
        assert work.candidate is not None
        since = work.shadow_since or 0.0
        ingest(self.store, self.log)
        events = {(one.image_sha256, one.time): one for one in read_events(self.store, since=since) if one.selected}
        held = resolve(self.store, sources=GUARD_SOURCES)
        count, differ, audits = 0, 0, []
        for pair in read_pairs(self.log.folder, work.candidate):
            if pair.time < since:
                continue
            count += 1
            if pair.champion_label == pair.candidate_label:
                continue
            differ += 1
            event = events.get((pair.image_sha256, pair.time))
            if event is not None and event.id in held:
                right = [label == held[event.id].label for label in (pair.champion_label, pair.candidate_label)]
                if sum(right) == 1:
                    audits.append((held[event.id].time, event.id, right[0]))
        evidence = Evidence(alpha=0.5, delta=delta, floor=1.0)
        if audits:
            times, _, wrong = zip(*sorted(audits), strict=True)
            evidence = evidence.after(wrong, propensity=np.ones(len(wrong)), time=times)
        return Compared(count, differ, evidence)

    # ---------------------------------------------------------------------------- helpers

    def _there(self, image: str) -> bool:
        """Whether ``_keep`` would find it."""
        return (self.root / "images" / image).is_file() or image in self.log.images

    def _keep(self, image: str) -> bool:
        """Copy an image of the log to the loop's own; whether it is there."""
        path = self.root / "images" / image
        if not path.is_file():
            data = self.log.images.get(image)
            if data is None:
                return False
            write_bytes(path, data)
        return True

    def _open(self, epoch: str, names: list[str], rows: Sequence[tuple[str, str, str]], now: float) -> None:
        """Open the epoch, or find it as a process that was killed left it."""
        try:
            there = self.vault.row_ids(epoch)
        except InputError:
            # Frames of one place are one witness, however many of them were drawn.
            self.vault.open(epoch, names, cluster_copies(Folder(str(self.root / "images")), names), now=now)
            there = names
        if there != names:
            raise ArtifactError(f"guard epoch '{epoch}' must hold the rows that were collected, got others")
        for source in GUARD_SOURCES:
            self.vault.label(epoch, {name: label for name, label, of in rows if of == source}, source)

    def _used(self, number: int | None) -> dict[Role, float]:
        """Until when rounds before this one (None: all) have used rows up: those that certified, those that judged.

        Rows of a guard epoch that was never looked at have judged nobody: they are this champion's still, if it was
        the one that they were frozen for.
        """
        began = self.registry.history("champion")[-1].time
        used: dict[Role, float] = {"guard": -math.inf, "certify": -math.inf}
        for row in audit.read(self.store, kind="edge"):
            body = json.loads(row.body)
            if (body["from"], body["to"]) != ("COLLECT", "PROPOSE"):
                continue
            earlier, frozen = body["round"]["number"], body["round"]["snapshot"]
            if number is None or earlier < number:
                used["certify"] = max(used["certify"], frozen["until"])
                if frozen["until"] < began or self.vault.looked(frozen["guard"]):
                    used["guard"] = max(used["guard"], frozen["until"])
        return used

    def _snapshot(self, work: Round) -> Snapshot:
        assert work.snapshot is not None
        name = work.snapshot["snapshot"]
        path = self.root / "snapshots" / f"{name}.json"
        if path.is_file() and not {"recent", "threshold"} <= json.loads(path.read_text(encoding="utf-8")).keys():
            raise NotReachableError(
                "labels were frozen by an earlier version of this program; the next round does anew"
            )
        found = Snapshot.read(path)
        if found.fingerprint() != name:
            raise ArtifactError(f"snapshot {name[:12]} must be as it was written, got another; it was changed")
        return found

    def _run(self, bundle: str) -> RunOf:
        return RunOf.read(self.root / "runs" / f"{bundle}.json")

    def _anchor_rows(self) -> list[Row]:
        """Half of the first run's ``val_select``, by group, which no proposal sees."""
        first = self.registry.history("champion")[0].bundle
        splits = Splits.read(Path(self._run(first or "").run) / "splits.json").verify()
        return [row for row in splits.of("val_select") if uniform(0, "anchor", row.group) < 0.5]

    def _measured(self, champion: Bundle, candidate: Bundle, work: Round, guard: Sequence[str]) -> list[Measured]:
        """Size, parity and latency; of the champion nothing is asked but that it runs, whatever its format lacks.

        Latency is held against its limit by the upper end of its interval: a machine too busy to tell, like a sample
        too small, has not shown that the candidate is fast enough.
        """
        limit = self.config.largest_slowdown
        sizes = [sum(one.size for one in bundle.manifest.files.values()) for bundle in (candidate, champion)]
        # Names of guard images are hashes: the first ones are as good a draw as any.
        inputs = {
            "champion": work.champion, "candidate": work.candidate, "root": str(self.root),
            "files": _hashed(guard[: self.config.timed_photos]),
            "passes": 0 if limit is None else self.config.timed_passes,
            "seconds": self.config.timed_seconds,
        }  # fmt: skip
        found = do_work(self.root / WORK, f"{tasks.__name__}:measure", inputs, self.executor).result
        parity, latency, why = found["parity"], found["latency"], found["why"]
        timed = why
        if latency:
            took = [f"{latency['milliseconds'][one]:.3g}" for one in ("candidate", "champion")]
            timed = f"mean over photos of the fastest of {latency['passes']} passes: {took[0]} against {took[1]} ms"
        measured = [
            Measured(name="size over the champion's", value=sizes[0] / sizes[1], limit=self.config.largest_growth),
            Measured(
                name="parity with its reference", value=parity and parity["logit"], limit=TOLERANCES["onnxruntime"],
                note="largest difference of a logit" if parity else why,
            ),
            Measured(name="reference rows that exit otherwise", value=parity and parity["flips"], limit=0,
                     note="" if parity else why),
        ]  # fmt: skip
        if limit is not None:
            measured.append(Measured(
                name="latency over the champion's", value=latency and latency["ratio"],
                bound=latency and latency["high"], n=latency["n"] if latency else 0, limit=limit, note=timed,
            ))  # fmt: skip
        return measured

    def _decide(self, bundle: str, files: Sequence[str], threshold: float | None = None) -> Decisions:
        inputs = {"bundle": bundle, "root": str(self.root), "files": _hashed(files), "threshold": threshold}
        found = do_work(self.root / WORK, f"{tasks.__name__}:decide", inputs, self.executor).result
        return Decisions(np.array(found["answers"], dtype=np.int64), np.array(found["deferred"], dtype=bool))


def _hashed(files: Sequence[str]) -> list[list[str]]:
    return [[path, sha256_file(path)] for path in files]


def _news(
    status: Status, controller: ControllerState | None, champion: Alias, before: Mapping[str, Any]
) -> dict[str, Alert]:
    """An alarm under the moment that it began; a watch where the look that is remembered saw none, under its time."""
    figures = {"exit_risk": status.exit_risk.value, "exit_risk_low": status.exit_risk.low, "alpha": status.alpha}

    def alert(kind: Literal["alarm", "watch"]) -> Alert:
        text = " ".join(status.sentences)
        return Alert(time=status.time, kind=kind, title=status.headline, text=text, bundle=status.bundle,
                     figures=figures)  # fmt: skip

    alarms = (status.evidence.alarm_at, None if controller is None else controller.alarm_at)
    began = [at for at in alarms if at is not None]
    found = {f"alarm/{champion.version}/{max(began)!r}": alert("alarm")} if began else {}
    if status.health == "alarm" and not began and before["is"] != "alarm":
        found[f"alarm/{champion.version}/after {before['since']!r}"] = alert("alarm")
    if status.health == "watch" and before["is"] not in ("watch", "alarm"):
        found[f"watch/{champion.version}/after {before['since']!r}"] = alert("watch")
    return found


def remember_run(root: Path | str, bundle: str, run: Path | str, model_fingerprint: str) -> None:
    """Note which run a bundle came from; proposals for it start there."""
    record = RunOf(run=str(Path(run).resolve()), model_fingerprint=model_fingerprint)
    record.write(Path(root) / "runs" / f"{bundle}.json")
