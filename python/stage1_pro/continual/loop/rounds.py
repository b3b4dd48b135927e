"""What the loop's states do with real bundles, events and labels: the parts of ``machine.Loop``.

Who judges, certifies and teaches is dealt in ``roles``; what is known of the champion is in ``watching``. Importing
this loads no torch; training and export (``tasks``) run where the executor says.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from sqlalchemy import select

from stage1_pro.chain import canonical
from stage1_pro.continual.learn.rewards import Actions, verified
from stage1_pro.continual.ledger.guard import GuardVault
from stage1_pro.continual.ledger.labels import GUARD_SOURCES, events, ingest, resolve_within
from stage1_pro.continual.loop import tasks
from stage1_pro.continual.loop.config import Role, RoundsConfig
from stage1_pro.continual.loop.executors import FILES, Executor, Work, do_work
from stage1_pro.continual.loop.history import History
from stage1_pro.continual.loop.machine import WORK, Compared, Job, Round, Watched
from stage1_pro.continual.loop.promotion import Anchor, Measured, Side, Verdict, evaluate, refuse
from stage1_pro.continual.loop.registry import Alias, Registry
from stage1_pro.continual.loop.roles import LabelledImage, Snapshot, available, count, deal, shortfall
from stage1_pro.continual.loop.watching import ChampionView, Unkept, alerts_of, timeline, view_champion
from stage1_pro.continual.serving.events import EventLog, Novelty, unpack_floats
from stage1_pro.continual.serving.live import novelty_path, read_pairs
from stage1_pro.continual.watch.monitor import Evidence, TriggerState
from stage1_pro.continual.watch.status import Status, assess, write_page
from stage1_pro.data.duplicates import cluster_copies
from stage1_pro.data.photos import Folder, Photo
from stage1_pro.data.splits import Row, Splits
from stage1_pro.deploy.bundle import Bundle
from stage1_pro.deploy.reference import TOLERANCES
from stage1_pro.errors import ArtifactError, InputError, NotReachableError
from stage1_pro.files import sha256_bytes, uniform, write_bytes
from stage1_pro.policies.policy import Policy
from stage1_pro.record import Record


class RunOf(Record):
    """Which run a bundle of the registry came from."""

    run: str = Field(description="its folder, relative to the loop's where it lies in that")
    model_fingerprint: str


class Rounds:
    """The parts of a loop; the executor is where decisions on guard and anchor are made."""

    def __init__(self, registry: Registry, log: EventLog, executor: Executor, config: RoundsConfig) -> None:
        self.registry, self.log, self.executor, self.config = registry, log, executor, config
        # Work is found by its inputs, and paths are among them: however the folder is called, they must be the same.
        self.store, self.root = registry.store, registry.root.absolute()
        self.vault = GuardVault(registry.store)
        self.seen: Status | None = None
        """What the last ``watch`` saw."""

    def ingest(self) -> None:
        """Put what serving logged into the store, unless the log was opened to be read only."""
        if not self.log.read_only:
            ingest(self.store, self.log)

    def keep_up(self, champion: Alias, *, now: float) -> None:
        """Ingest what was served, and keep what every later look would else find anew."""
        self.ingest()
        assert champion.bundle is not None
        policy = self.registry.load(champion.bundle).policy
        with History.look(self.store, self.config, now) as history:
            _, unkept = self._view(history, champion.bundle, champion.time, policy)
        history.keep(self.store, *unkept)

    # ---------------------------------------------------------------------------- monitor

    def watch(self, memory: Mapping[str, Any], champion: Alias, *, now: float, manual: bool) -> Watched:
        """Ingest what was served, and look at the champion's decisions since it began to serve."""
        status, triggers, view = self._look(memory, champion, now, manual)
        self.seen = status
        self._learn_known(champion)
        before = memory.get("health") or {"is": None, "since": champion.time}
        health = before if before["is"] == status.health else {"is": status.health, "since": now}
        rate = status.verdict.audit_rate
        kept = {"triggers": triggers.model_dump(), "health": health, "alarm_at": view.alarm_at}
        return Watched(
            train=status.verdict.train,
            reasons=status.verdict.reasons,
            # As it comes back from the store, or a look that changed nothing would look like one that did.
            memory=json.loads(json.dumps(kept)),
            threshold=None if view.controller is None else view.controller.threshold,
            audit_rate=rate if rate > self.config.plan.floor else None,
            alerts=alerts_of(status, view.alarm_at, champion, before),
            facts={"health": status.health, "exit_risk": status.exit_risk.value, "n_labelled": status.n_labelled},
        )

    def _learn_known(self, champion: Alias) -> None:
        """Fit what counts as known to the champion's first events, once, so that serving can tell what is novel."""
        assert champion.bundle is not None
        path, least = novelty_path(self.root, champion.bundle), self.config.novelty_events
        if self.config.plan.novelty == 0 or path.exists():
            return
        served = select(events.c.sketch).where(events.c.bundle == champion.bundle, events.c.time >= champion.time)
        # Features that were not finite left zeros; where all did, no look reads them all.
        query = served.order_by(events.c.time, events.c.id).limit(10 * least)
        with self.store.read() as connection:
            sketches = (unpack_floats(data) for data in connection.execute(query).scalars())
            first = list(islice((one for one in sketches if any(one)), least))
        if len(first) == least:
            Novelty.fit(first).write(path)

    def status(self, memory: Mapping[str, Any], champion: Alias, *, now: float, page: Path | None = None) -> Status:
        """The status that ``watch`` would see, and its page for people; nothing is changed."""
        status, _, view = self._look(memory, champion, now, manual=False)
        if page is not None:
            bundle = champion.bundle or ""
            with History.look(self.store, self.config, now) as history:
                write_page(page, status, timeline(history, bundle, champion.time, view))
        return status

    def _look(
        self, memory: Mapping[str, Any], champion: Alias, now: float, manual: bool
    ) -> tuple[Status, TriggerState, ChampionView]:
        self.ingest()
        bundle = champion.bundle
        assert bundle is not None
        before = memory.get("triggers")
        triggers = TriggerState(since=champion.time) if before is None else TriggerState.model_validate(before)
        policy = self.registry.load(bundle).policy
        with History.look(self.store, self.config, now) as history:
            view, unkept = self._view(history, bundle, champion.time, policy)
            since = max(champion.time, triggers.trained_at or champion.time)
            new_labels, missing = history.answers_since(since), self._missing(history, bundle, view)
        history.keep(self.store, *unkept)
        pointer = self.registry.pointer()
        status, after = assess(
            view.decisions, self.config.monitor, now=now, triggers_before=triggers, manual=manual,
            new_labels=new_labels, missing=missing, evidence=view.evidence, controller=view.controller,
            threshold=pointer.threshold, bundle=bundle, policy=policy,
        )  # fmt: skip
        floor = self.config.plan.floor
        advice = status.verdict.model_copy(update={"audit_rate": max(status.verdict.audit_rate, floor)})
        in_force = max(pointer.audit_rate or 0.0, floor)
        return status.model_copy(update={"verdict": advice, "audit_rate": in_force}), after, view

    def _view(self, history: History, bundle: str, since: float, policy: Policy) -> tuple[ChampionView, Unkept]:
        steer = self.config.steer and policy.steerable
        return view_champion(history, bundle, since, self.config, certified=policy.exit_threshold, steer=steer)

    # ---------------------------------------------------------------------------- round

    def collect(self, current: Round) -> Mapping[str, Any]:
        """Freeze what was labelled before the round's time, open its guard epoch, keep the images beyond their time.

        A guard epoch is of images served since the last one that was looked at was frozen; what certifies, since the
        last round. None are from before the champion's last alarm: what judges and certifies is of the world as it is.
        Images of the champion's run judge and certify nothing: it learned from them.

        Raises:
            NotReachableError: too few labelled images for a role.
        """
        until = current.entered
        self.ingest()
        start = max(one.time for one in self.registry.history("champion") if one.bundle == current.champion)
        policy = self.registry.load(current.champion).policy
        with History.look(self.store, self.config, until) as history:
            view, _ = self._view(history, current.champion, start, policy)
            dealt = deal(history, **self._fresh(history, current.champion, view, current.number))
            last = history.last_served([row.image for row in dealt["learn"]])
        there = self._there()
        dealt = available(dealt, lambda image: image in there and self._keep(image))
        missing = shortfall({part: len(rows) for part, rows in dealt.items()}, self.config)
        if missing:
            raise NotReachableError(f"labelled images must be enough for a round, got {missing}; have more reviewed")
        # Its rows are in its name: labels dated back while this was killed make another epoch; neither has had a look.
        epoch = f"round-{current.number}-{sha256_bytes(canonical(dealt['guard']).encode())[:16]}"
        self._open(epoch, dealt["guard"], until)
        learn = [row.image for row in dealt["learn"]]
        # Where nothing steers, what did so before is still in force.
        threshold = self.registry.sync().threshold if view.controller is None else view.controller.threshold
        snapshot = Snapshot(
            until=until, learn=tuple(dealt["learn"]), certify=tuple(dealt["certify"]),
            recent=tuple(sorted(learn, key=lambda name: (-last[name], name))[: self.config.recent]), guard=epoch,
            n_guard=len(dealt["guard"]), threshold=threshold,
        )  # fmt: skip
        name = snapshot.fingerprint()
        snapshot.write(self.root / "snapshots" / f"{name}.json")
        return {"snapshot": name, "until": until, "guard": epoch, "n_guard": snapshot.n_guard,
                "n_learn": len(snapshot.learn), "n_certify": len(snapshot.certify)}  # fmt: skip

    def _fresh(self, history: History, bundle: str, view: ChampionView, number: int | None) -> dict[str, Any]:
        """Which rows ``deal`` may give; rounds before this one (None: all) have used earlier ones up."""
        first = self.registry.history("champion")[0].time
        since = {part: max(time, first) for part, time in self._used(history, number).items()}
        learned_from = {row.sha256 for row in self._splits(bundle).rows}
        return {"since": since, "after": view.newest_harm, "exclude": learned_from}

    def _missing(self, history: History, bundle: str, view: ChampionView) -> str:
        """What a round begun now would lack: labels whose images are still there, or the champion's run."""
        try:
            counts = count(history, self.config, self._there(), **self._fresh(history, bundle, view, None))
        except NotReachableError:
            return ""  # The round itself says it, once.
        except ArtifactError as error:
            return str(error)  # Watching and the threshold need no run.
        return shortfall(counts, self.config)

    def proposals(self, current: Round) -> Sequence[Job]:
        """A proposal from the champion's run for every set of options.

        Half of the first run's ``val_select`` is the promotion test's anchor, which no proposal sees; ``mgrpo`` stays
        close to the champion on images of the other half, without their labels.
        """
        snapshot, origin = self._snapshot(current), self._run(current.champion)
        splits = self._splits(self._first()).verify()
        judging = {row.sha256 for row in _anchor_rows(splits)}
        inputs = {
            "run": origin.run, "model": origin.model_fingerprint, "images": str(self.root / "images"),
            "learn": [list(row) for row in snapshot.learn], "certify": [list(row) for row in snapshot.certify],
            "leave_out": sorted(judging), "select_share": self.config.select_share,
            "spec": self.config.spec.model_dump(),
        }  # fmt: skip
        anchor = sorted({row.sha256 for row in splits.of("val_select")} - judging)
        by_mgrpo = {**inputs, "method": "mgrpo", "anchor": anchor, "recent": list(snapshot.recent)}
        by_tuning = {**inputs, "method": "tune", "through": self.config.through}
        given = [*((by_mgrpo, one) for one in self.config.mgrpo), *((by_tuning, one) for one in self.config.tuning)]
        return [Job(f"{tasks.__name__}:propose", {**how, "options": options}) for how, options in given]

    def select(self, current: Round, done: Sequence[Work]) -> str:
        """The proposal that gains most on ``val_select``.

        Raises:
            NotReachableError: none gains anything.
        """
        del current
        gains = {one.key: one.result["gain"] for one in done}
        best = max(gains, key=lambda key: (gains[key] is not None, gains[key] or 0.0))
        if gains[best] is None:
            why = "; ".join(one.result["why"] for one in done)
            raise NotReachableError(f"no proposal earns more than the champion on val_select: {why}")
        return best

    def recalibration(self, current: Round, chosen: Work) -> Job:
        """Certify on the fresh rows what the champion promises, and export."""
        target = self.registry.load(current.champion).policy.target.model_dump(mode="json")
        run = self.root / WORK / chosen.key / FILES / "run"
        return Job(f"{tasks.__name__}:recalibrate", {"run": str(run), "proposal": chosen.key, "target": target})

    def evaluate(self, current: Round) -> Verdict:
        """The promotion test: measure the candidate's bundle, have both decide on guard and anchor, then test.

        On the guard the champion decides at the threshold in force when labels were frozen: a candidate that beats the
        champion as it was before an alarm does not yet beat what serves. The anchor compares with the first champion.
        """
        assert current.candidate is not None
        assert current.recalibrated is not None
        run = self.root / WORK / current.recalibrated / FILES / "run"
        candidate, champion = self.registry.load(current.candidate), self.registry.load(current.champion)
        fingerprint = candidate.manifest.provenance.model_fingerprint
        remember_run(self.root, current.candidate, run, fingerprint)
        snapshot = self._snapshot(current)
        epoch = snapshot.guard
        images = Folder(str(self.root / "images"))
        guard = [Photo(images, name, name) for name in self.vault.row_ids(epoch)]
        measured = self._measured(champion, candidate, current, guard)
        spec, terms = self.config.spec, self.config.terms
        refused = refuse(
            current.champion, current.candidate, epoch, measured, spec=spec, now=current.entered, terms=terms
        )
        if refused is not None:
            return refused
        anchor, kept = self._anchor()

        def side(name: str, bundle: Bundle, threshold: float | None = None) -> Side:
            fingerprint = bundle.manifest.provenance.model_fingerprint
            guards, anchors = self._decide(name, guard, threshold), self._decide(name, kept)
            return Side(name, guards, anchors, bundle.policy, fingerprint)

        return evaluate(
            self.vault, epoch, side(current.champion, champion, snapshot.threshold), side(current.candidate, candidate),
            anchor, spec=spec, now=current.entered, terms=terms, measured=measured,
        )  # fmt: skip

    def _anchor(self) -> tuple[Anchor, list[Photo]]:
        """Rows of what must not be forgotten, and their photos."""
        first = self._first()
        splits = self._splits(first).verify()
        rows = _anchor_rows(splits)
        photos = splits.photos_of(rows)
        labels = splits.indices(rows)
        anchor = Anchor(
            verified(labels, "owner", classes=splits.classes, positive=splits.positive),
            np.array([row.group for row in rows], dtype=np.str_),
            {one: np.array([row.source == one for row in rows]) for one in sorted({row.source for row in rows} - {""})},
            origin=self._decide(first, photos),
        )
        return anchor, photos

    def compare(self, current: Round, *, delta: float) -> Compared:
        """Evidence that the candidate is wrong more often than right where it differs from the champion.

        Audited disagreements count alike: weighted by their propensities, which differ fifty-fold, the bets have to be
        so small that a candidate wrong in all of them stays for a hundred audits.
        """
        assert current.candidate is not None
        since = current.shadow_since or 0.0
        self.ingest()
        pairs = [pair for pair in read_pairs(self.log.folder, current.candidate) if pair.time >= since]
        differ = [pair for pair in pairs if pair.champion_label != pair.candidate_label]
        audits = []
        with self.store.read() as connection:
            for start in range(0, len(differ), 500):
                part = {(pair.image_sha256, pair.time): pair for pair in differ[start : start + 500]}
                query = select(events.c.id, events.c.image_sha256, events.c.time).where(
                    events.c.time.in_({time for _, time in part}), events.c.selected
                )
                served = {row.id: part.get((row.image_sha256, row.time)) for row in connection.execute(query)}
                held = resolve_within(connection, sources=GUARD_SOURCES, among=list(served))
                for name, label in held.items():
                    if (pair := served[name]) is not None:
                        right = [one == label.label for one in (pair.champion_label, pair.candidate_label)]
                        if sum(right) == 1:
                            audits.append((label.time, name, right[0]))
        evidence = Evidence(alpha=0.5, delta=delta, floor=1.0)
        if audits:
            times, _, wrong = zip(*sorted(audits), strict=True)
            evidence = evidence.after(wrong, propensity=np.ones(len(wrong)), time=times)
        return Compared(len(pairs), len(differ), evidence)

    # ---------------------------------------------------------------------------- helpers

    def _there(self) -> set[str]:
        """Images of the log and of the loop's own: two folders are read faster than every photo is looked for."""
        return self.log.images.names() | _names(self.root / "images")

    def _keep(self, image: str) -> bool:
        """Copy an image of the log to the loop's own; whether it is there."""
        path = self.root / "images" / image
        if not path.is_file():
            data = self.log.images.get(image)
            if data is None:
                return False
            write_bytes(path, data)
        return True

    def _open(self, epoch: str, rows: Sequence[LabelledImage], now: float) -> None:
        """Open the epoch, or find it as a process that was killed left it."""
        names = [row.image for row in rows]
        try:
            there = self.vault.row_ids(epoch)
        except InputError:
            # Frames of one place are one witness, however many of them were drawn.
            self.vault.open(epoch, names, cluster_copies(Folder(str(self.root / "images")), names), now=now)
            there = names
        if there != names:
            raise ArtifactError(f"guard epoch '{epoch}' must hold the rows that were collected, got others")
        for source in GUARD_SOURCES:
            self.vault.label(epoch, {row.image: row.label for row in rows if row.source == source}, source)

    def _used(self, history: History, number: int | None) -> dict[Role, float]:
        """Until when rounds before this one (None: all) have used rows up: those that certified, those that judged.

        Rows of a guard epoch that was never looked at have judged nobody: they are this champion's still, if it was
        the one that they were frozen for.
        """
        began = self.registry.history("champion")[-1].time
        used: dict[Role, float] = {"guard": -math.inf, "certify": -math.inf}
        before = [one for one in history.frozen() if number is None or one.number < number]
        for one in sorted(before, key=lambda one: one.until, reverse=True):
            used["certify"] = max(used["certify"], one.until)
            if one.until < began or self.vault.looks_taken(one.guard):
                used["guard"] = one.until
                break
        return used

    def _snapshot(self, current: Round) -> Snapshot:
        assert current.snapshot is not None
        name = current.snapshot["snapshot"]
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
        """The run of a bundle; one of the loop's own work is there wherever the loop's folder was moved."""
        found = RunOf.read(self.root / "runs" / f"{bundle}.json")
        path = self.root / found.run
        if not path.is_dir() and WORK in path.parts:
            own = self.root.joinpath(*path.parts[path.parts.index(WORK) :])
            path = own if own.is_dir() else path
        return found.model_copy(update={"run": str(path)})

    def _splits(self, bundle: str) -> Splits:
        return Splits.read(Path(self._run(bundle).run) / "splits.json")

    def _first(self) -> str:
        """The first champion."""
        first = self.registry.history("champion")[0].bundle
        assert first is not None
        return first

    def _measured(self, champion: Bundle, candidate: Bundle, current: Round, guard: Sequence[Photo]) -> list[Measured]:
        """Size, parity and latency; the champion only has to run, whatever its format lacks."""
        # Names of guard images are hashes: the first ones are as good a draw as any.
        inputs = {
            "champion": current.champion, "candidate": current.candidate, "root": str(self.root),
            **_named(guard[: self.config.timed_photos]),
            "passes": 0 if self.config.largest_slowdown is None else self.config.timed_passes,
            "seconds": self.config.timed_seconds,
        }  # fmt: skip
        sizes = [sum(one.size for one in bundle.manifest.files.values()) for bundle in (candidate, champion)]
        return _figures(self._work("measure", inputs), sizes[0] / sizes[1], self.config)

    def _work(self, task: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return do_work(self.root / WORK, f"{tasks.__name__}:{task}", inputs, self.executor).result

    def _decide(self, bundle: str, photos: Sequence[Photo], threshold: float | None = None) -> Actions:
        inputs = {"bundle": bundle, "root": str(self.root), **_named(photos), "threshold": threshold}
        found = self._work("decide", inputs)
        return Actions(np.array(found["answers"], dtype=np.int64), np.array(found["deferred"], dtype=bool))


def _names(folder: Path) -> set[str]:
    """Names of the files in a folder; none without it."""
    try:
        with os.scandir(folder) as found:
            return {one.name for one in found}
    except FileNotFoundError:
        return set()


def _named(photos: Sequence[Photo]) -> dict[str, Any]:
    """Photos of one source as work is told of them; ``tasks.photos_of`` gives them again."""
    return {"photos": photos[0].photos.root if photos else "", "files": [[one.key, one.sha256] for one in photos]}


def _anchor_rows(splits: Splits) -> list[Row]:
    """Half of the first run's ``val_select``, by group, which no proposal sees."""
    return [row for row in splits.of("val_select") if uniform(0, "anchor", row.group) < 0.5]


def _figures(found: Mapping[str, Any], growth: float, config: RoundsConfig) -> list[Measured]:
    """What ``tasks.measure`` found, beside its limits.

    Latency is held against its limit by the upper end of its interval: a machine too busy to tell, like a sample too
    small, has not shown that the candidate is fast enough.
    """
    parity, latency, why = found["parity"], found["latency"], found["why"]
    measured = [
        Measured(name="size over the champion's", value=growth, limit=config.largest_growth),
        Measured(
            name="parity with its reference", value=parity and parity["logit"], limit=TOLERANCES["onnxruntime"],
            note="largest difference of a logit" if parity else why,
        ),
        Measured(name="reference rows that exit otherwise", value=parity and parity["flips"], limit=0,
                 note="" if parity else why),
    ]  # fmt: skip
    if config.largest_slowdown is None:
        return measured
    if latency:
        took = [f"{latency['milliseconds'][one]:.3g}" for one in ("candidate", "champion")]
        why = f"mean over photos of the fastest of {latency['passes']} passes: {took[0]} against {took[1]} ms"
    timed = Measured(
        name="latency over the champion's", value=latency and latency["ratio"], bound=latency and latency["high"],
        n=latency["n"] if latency else 0, limit=config.largest_slowdown, note=why,
    )  # fmt: skip
    return [*measured, timed]


def within(root: Path | str, path: Path | str) -> str:
    """A path as the loop's files name it: relative to the loop's folder where it lies there, so that it can move."""
    found, folder = Path(path).absolute(), Path(root).absolute()
    return str(found.relative_to(folder) if found.is_relative_to(folder) else found)


def remember_run(root: Path | str, bundle: str, run: Path | str, model_fingerprint: str) -> None:
    """Note which run a bundle came from, and the run's model; proposals for it start there."""
    place = within(Path(root).resolve(), Path(run).resolve())
    RunOf(run=place, model_fingerprint=model_fingerprint).write(Path(root) / "runs" / f"{bundle}.json")
