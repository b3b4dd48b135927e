"""The loop as a state machine that a crash cannot confuse: one row says where it is, one transaction is one edge.

MONITOR → COLLECT → PROPOSE → SELECT → RECALIBRATE → EVALUATE → SHADOW → CANARY → CHAMPION → MONITOR; HOLD where a round
ends without a promotion, ROLLBACK where one is taken back. Every edge changes the row, moves aliases and adds one row
to the audit, together or not at all. The work of a state before its edge is idempotent: long work is found by the hash
of its inputs, and times are those of the row, so a process that was killed and restarted reaches the same verdict.

``Parts`` says what the states do; ``rounds`` has the real ones, and tests bring their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field
from sqlalchemy import Column, Connection, Double, Integer, String, Table, Text, select, update

from stage1_pro.continual.ledger import audit
from stage1_pro.continual.ledger.labels import insert
from stage1_pro.continual.ledger.schema import metadata
from stage1_pro.continual.loop.executors import Executor, ExecutorConfig, Work, do_work, find_work
from stage1_pro.continual.loop.promotion import Verdict
from stage1_pro.continual.loop.registry import Alias, AliasName, LostRaceError, Registry
from stage1_pro.continual.serving.live import Pointer
from stage1_pro.continual.watch import outbox
from stage1_pro.continual.watch.alerts import Alert
from stage1_pro.continual.watch.monitor import Evidence
from stage1_pro.errors import ArtifactError, InputError, NotReachableError
from stage1_pro.record import Record

State = Literal[
    "MONITOR", "COLLECT", "PROPOSE", "SELECT", "RECALIBRATE", "EVALUATE", "SHADOW", "CANARY", "CHAMPION", "ROLLBACK",
    "HOLD",
]  # fmt: skip
# Beside these every state may go to ROLLBACK, by hand.
EDGES: dict[State, tuple[State, ...]] = {
    "MONITOR": ("COLLECT",),
    "COLLECT": ("PROPOSE", "HOLD"),
    "PROPOSE": ("SELECT", "HOLD"),
    "SELECT": ("RECALIBRATE", "HOLD"),
    "RECALIBRATE": ("EVALUATE", "HOLD"),
    "EVALUATE": ("SHADOW", "HOLD"),
    "SHADOW": ("CANARY", "HOLD"),
    "CANARY": ("CHAMPION", "ROLLBACK"),
    "CHAMPION": ("MONITOR", "HOLD"),
    "ROLLBACK": ("MONITOR",),
    "HOLD": ("MONITOR",),
}
WORK = "work"

_row = Table(
    "loop",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("version", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("body", Text, nullable=False),
    Column("time", Double, nullable=False),
)


class LoopConfig(Record):
    """How a round goes on once there is a candidate; part of ``loop.json``."""

    auto_promote: bool = Field(False, description="a promoting verdict needs nobody's approval")
    executor: ExecutorConfig = ExecutorConfig()
    shadow_seconds: float = Field(86400.0, ge=0, description="shortest time in the shadow")
    shadow_pairs: int = Field(200, ge=0, description="fewest images that both have decided on there")
    canary_share: float = Field(0.1, gt=0, le=1, description="of images that the canary answers")
    canary_seconds: float = Field(86400.0, ge=0)
    canary_pairs: int = Field(500, ge=0, description="fewest images that both have decided on since the shadow began")
    rollback_delta: float = Field(0.05, gt=0, lt=1, description="the candidate goes where evidence reaches 1 / delta")
    hold_seconds: float = Field(3600.0, ge=0, description="rest after a round without promotion")


class Round(Record):
    """State of one round; a new one begins with every COLLECT."""

    number: int = 0
    entered: float = Field(0.0, description="when its present state was entered; states reckon with it")
    reasons: tuple[str, ...] = Field((), description="what triggered it")
    champion: str = ""
    champion_version: int = 0
    snapshot: dict[str, Any] | None = Field(None, description="what was collected, files by hash")
    proposals: tuple[str, ...] = Field((), description="keys of work")
    chosen: str | None = Field(None, description="key of the proposal that was selected")
    recalibrated: str | None = Field(None, description="key of work")
    candidate: str | None = Field(None, description="sha256 of its bundle.json")
    verdict: str | None = Field(None, description="fingerprint of verdict.json")
    shadow_since: float | None = None
    approved_by: str | None = None
    note: str = ""


class LoopRow(Record):
    """Where the loop is."""

    version: int = Field(ge=1)
    state: State
    time: float
    round: Round
    memory: dict[str, Any] = Field(description="what monitoring remembers between two looks")


@dataclass(frozen=True)
class Watched:
    """What monitoring saw: train or not, why, what it remembers, and what should be in force.

    ``audit_rate`` is the least chance of review that every event should have; None leaves it to the review plan.
    ``alerts`` are to be sent, keyed so that the same event is sent once.
    """

    train: bool
    reasons: Sequence[str]
    memory: Mapping[str, Any]
    threshold: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    audit_rate: float | None = None
    alerts: Mapping[str, Alert] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A piece of work to be done: ``module:name`` and its inputs."""

    function: str
    inputs: Mapping[str, Any]


@dataclass(frozen=True)
class Compared:
    """Champion and candidate side by side while both decide: pairs so far, and evidence against the candidate."""

    pairs: int
    disagreements: int
    evidence: Evidence

    def facts(self) -> dict[str, Any]:
        """For the audit."""
        return {"pairs": self.pairs, "disagreements": self.disagreements, "evidence": self.evidence.value}

    def against(self) -> str:
        """Why the candidate goes."""
        e = self.evidence
        wrong = f"the candidate was wrong in {e.n_wrong} of {e.n} audited disagreements"
        return f"{wrong}, evidence {e.peak:.3g} reached {e.limit:g}"

    def short(self, left: float, pairs: int) -> str:
        """What the candidate waits for: seconds, and images of ``pairs``."""
        wait = f"{left:.0f} s" if left > 0 else ""
        more = f"{pairs - self.pairs} more images" if self.pairs < pairs else ""
        return f"waits for {' and '.join(filter(None, (wait, more)))}; {self.disagreements} disagreements so far"


@dataclass(frozen=True)
class _Changes:
    """What a look changes of what is in force: kind and body of its audit row, and how it is written."""

    kind: str | None
    body: Mapping[str, Any]
    write: Callable[[Connection], None]


class Parts(Protocol):
    """What the states do. Each may raise NotReachableError: the round then ends in HOLD, for that reason.

    All depend on their arguments and the store alone, and on times of the round in place of a clock: they are
    idempotent.
    """

    def watch(self, memory: Mapping[str, Any], champion: Alias, *, now: float, manual: bool) -> Watched:
        """Look at what was served since ``memory``; called in MONITOR, and for the threshold where a round waits."""

    def collect(self, current: Round) -> Mapping[str, Any]:
        """Freeze the labels that a proposal may learn from, known before the round's ``entered``; never guard rows."""

    def proposals(self, current: Round) -> Sequence[Job]:
        """What makes candidates of the snapshot."""

    def select(self, current: Round, done: Sequence[Work]) -> str:
        """The key of the proposal to go on with, chosen on ``val_select`` and never on the guard."""

    def recalibration(self, current: Round, chosen: Work) -> Job:
        """What calibrates, certifies and exports it; its result names a bundle in its files as ``bundle``."""

    def evaluate(self, current: Round) -> Verdict:
        """The promotion test."""

    def compare(self, current: Round, *, delta: float) -> Compared:
        """Champion and candidate since ``shadow_since``, by audited disagreements."""


@dataclass(frozen=True)
class LoopStep:
    """One step of the loop: the state afterwards, whether an edge was taken, and what it waits for where not."""

    row: LoopRow
    moved: bool
    note: str


class Loop:
    """The state machine on a registry and its store.

    Args:
        registry: bundles and aliases.
        parts: what the states do.
        executor: where long work runs.
        config: how a round goes on.
        observe: is told of every moment that a crash could fall into: ``STATE begin``, ``STATE done`` (its edge is
            next), ``STATE committed`` (``champion.json`` is next).
    """

    def __init__(
        self,
        registry: Registry,
        parts: Parts,
        executor: Executor,
        config: LoopConfig | None = None,
        *,
        observe: Callable[[str], None] | None = None,
    ) -> None:
        self.registry, self.parts, self.executor = registry, parts, executor
        self.store, self.config = registry.store, config or LoopConfig()
        self.work = registry.root / WORK
        self._observe = observe or (lambda _: None)

    @staticmethod
    def begin(registry: Registry, bundle: str, *, now: float, by: str, again: bool = False) -> Pointer:
        """Make a bundle of the registry the first champion, and the row of the loop.

        With ``again`` a row that was begun with the same bundle and has taken no step stays, and ``champion.json``
        follows it: so goes on what was killed.

        Raises:
            InputError: the loop has begun.
        """
        store = registry.store
        with store.write() as connection:
            store.serialise(connection)
            row = LoopRow(version=1, state="MONITOR", time=now, round=Round(entered=now), memory={})
            made = connection.execute(
                insert(store, _row).on_conflict_do_nothing().returning(_row.c.id), [{"id": 1, **_columns(row)}]
            ).all()
            if made:
                registry.move(connection, "champion", bundle, expected=0, now=now, by=by)
                audit.append(connection, store, "begin", {"champion": bundle, "by": by}, now)
            else:
                champion = registry.alias("champion", connection)
                version = connection.execute(select(_row.c.version)).scalar_one()
                if not again or (version, champion.version, champion.bundle) != (1, 1, bundle):
                    raise InputError(
                        f"root must be a new loop's, got {registry.root}, where one has begun with the bundle "
                        f"{(champion.bundle or 'none')[:12]}; `stage1 continual status` shows it"
                    )
        return registry.sync()

    def row(self) -> LoopRow:
        """Where the loop is.

        Raises:
            InputError: it has not begun.
        """
        with self.store.read() as connection:
            found = connection.execute(select(_row).where(_row.c.id == 1)).first()
        if found is None:
            raise InputError("the loop must have begun, got an empty store; run `stage1 continual init` first")
        return LoopRow.parse(found.body, "the loop's row")

    def resume(self) -> LoopRow:
        """Bring ``champion.json`` up to what the store says, as a process that was killed may have left it behind."""
        self.registry.sync()
        return self.row()

    def run(self, *, now: float, manual: bool = False) -> list[LoopStep]:
        """The steps that can be taken at one time, a hundred at most.

        Where another process moves the loop, this one follows.
        """
        return [step for _, step in islice(self.steps(lambda: now, manual=manual), 100)]

    def steps(
        self, clock: Callable[[], float], *, manual: bool = False, until: str | None = None
    ) -> Iterator[tuple[State, LoopStep]]:
        """Steps, each with the state before it, until one waits or the work of state ``until`` is next.

        ``manual`` asks for a round as a person would. Where another process moves the loop, this one follows.
        """
        row = self.resume()
        while row.state != until:
            try:
                step = self.step(now=clock(), manual=manual)
            except LostRaceError:
                row = self.row()
                continue
            yield row.state, step
            if not step.moved:
                break
            manual = manual and step.row.state == "MONITOR"
            row = step.row

    def step(self, *, now: float, manual: bool = False) -> LoopStep:
        """Do what the present state does, and take one edge where it can be taken; ``now`` is not before the row's.

        ``manual`` asks for a round: heard in MONITOR, and in HOLD, which then ends.

        Raises:
            LostRaceError: another process moved the loop meanwhile.
            WorkError: long work failed; the state is as before.
            InputError: something is missing that a person has to bring, such as guard labels; the same.
        """
        row = self.row()
        if now < row.round.entered:
            raise InputError(f"now must not be before the loop's own time {row.round.entered}, got {now}")
        self._observe(f"{row.state} begin")
        if row.state in _WAITING:
            row = self._steer(row, now)
        try:
            return self._STEPS[row.state](self, row, now, manual)
        except LostRaceError:
            raise
        except NotReachableError as error:
            if "HOLD" not in EDGES[row.state]:
                raise
            return self._edge(row, "HOLD", now, str(error), clear=True)

    def approve(self, *, now: float, by: str, candidate: str | None = None) -> LoopRow:
        """Let the candidate in the shadow go on to answer images; one that was approved stays so, and nothing changes.

        Raises:
            InputError: there is none whose verdict promotes it, or it is another one.
        """
        row = self.row()
        current = row.round
        if row.state != "SHADOW" or current.candidate is None:
            raise InputError(
                f"there must be a candidate in the shadow to promote, got state {row.state}; only a verdict that "
                "promotes brings one there"
            )
        if candidate is not None and not current.candidate.startswith(candidate):
            raise InputError(f"candidate must be the one in the shadow, {current.candidate[:12]}, got {candidate}")
        if current.approved_by is not None:
            return row
        body = {"candidate": current.candidate, "verdict": current.verdict, "by": by}
        return self._write(row, now, "approval", body, round=current.model_copy(update={"approved_by": by}))

    def rollback(self, *, now: float, by: str, to: str | None = None) -> Pointer:
        """Bring back the champion before this one (or an earlier one, ``to``) at once, and end the present round.

        Until the loop's next step the champion that was brought back stays, however often one asks without ``to``: who
        asks again may have been killed after the first time.

        Raises:
            InputError: there was none before.
        """
        row, champion = self.row(), self.registry.alias("champion")
        taken = row.state == "ROLLBACK" and champion.time == row.round.entered
        if taken and to in (None, champion.bundle):
            return self.registry.sync()

        def back(connection: Connection) -> None:
            self.registry.rollback(connection, now=now, by=by, to=to)
            self._clear(connection, now, by)

        self._edge(row, "ROLLBACK", now, f"by hand ({by})", move=back)
        return self.registry.sync()

    # ---------------------------------------------------------------------------- states

    def _monitor(self, row: LoopRow, now: float, manual: bool) -> LoopStep:
        champion, seen, changes = self._look(row, now, manual)
        # What is in force changes first, in the same transaction that asks for a training.
        if seen.train:
            current = Round(
                number=row.round.number + 1, reasons=tuple(seen.reasons), champion=champion.bundle or "",
                champion_version=champion.version,
            )  # fmt: skip
            facts = {key: value for key, value in changes.body.items() if key not in ("bundle", "before")}
            return self._edge(row, "COLLECT", now, ", ".join(seen.reasons), current=current, memory=seen.memory,
                              move=changes.write, facts=facts, alerts=seen.alerts)  # fmt: skip
        memory = dict(seen.memory)
        if memory != row.memory or changes.kind is not None:
            row = self._write(row, now, changes.kind, changes.body, changes.write, seen.alerts, memory=memory)
            self._observe("MONITOR committed")
            self.registry.sync()
        self._tell(seen.alerts)
        return LoopStep(row, moved=False, note="nothing asks for a training")

    def _steer(self, row: LoopRow, now: float) -> LoopRow:
        """Where a round waits, for days perhaps, the champion's threshold goes on following labels.

        Nothing else of the look is remembered, so an alarm asks for its training in MONITOR. The audit rate only rises
        meanwhile, since the time of the last drift is not remembered either.
        """
        _, seen, changes = self._look(row, now, manual=False, falls=False)
        self._tell(seen.alerts)
        if changes.kind is None:
            return row
        row = self._write(row, now, changes.kind, changes.body, changes.write)
        self.registry.sync()
        return row

    def _look(self, row: LoopRow, now: float, manual: bool, *, falls: bool = True) -> tuple[Alias, Watched, _Changes]:
        """The champion, what was seen of it, and what has to change for that to be in force."""
        champion = self.registry.alias("champion")
        seen = self.parts.watch(row.memory, champion, now=now, manual=manual)
        said, bundle, threshold, rate = self.registry.sync(), champion.bundle, seen.threshold, seen.audit_rate
        tightens = bundle is not None and threshold is not None and threshold != said.threshold
        audits = rate != said.audit_rate and (falls or (rate or 0.0) > (said.audit_rate or 0.0))

        def write(connection: Connection) -> None:
            if tightens:
                assert bundle is not None
                assert threshold is not None
                self.registry.tighten(connection, bundle, threshold, now=now)
            if audits:
                self.registry.audit_at(connection, rate, now=now)

        changed = {"audit_rate_before": said.audit_rate, "audit_rate": rate} if audits else {}
        body = {"bundle": bundle, "before": said.threshold, "threshold": threshold, **changed, **seen.facts}
        return champion, seen, _Changes("threshold" if tightens else "audit rate" if audits else None, body, write)

    def _collect(self, row: LoopRow, now: float, _manual: bool) -> LoopStep:
        snapshot = dict(self.parts.collect(row.round))
        return self._edge(row, "PROPOSE", now, "labels are frozen", snapshot=snapshot)

    def _propose(self, row: LoopRow, now: float, _manual: bool) -> LoopStep:
        done = [do_work(self.work, job.function, job.inputs, self.executor) for job in self.parts.proposals(row.round)]
        return self._edge(row, "SELECT", now, f"{len(done)} proposals", proposals=tuple(one.key for one in done))

    def _select(self, row: LoopRow, now: float, _manual: bool) -> LoopStep:
        chosen = self.parts.select(row.round, [self.finished(key) for key in row.round.proposals])
        return self._edge(row, "RECALIBRATE", now, f"proposal {chosen[:12]} is the best on val_select", chosen=chosen)

    def _recalibrate(self, row: LoopRow, now: float, _manual: bool) -> LoopStep:
        assert row.round.chosen is not None
        job = self.parts.recalibration(row.round, self.finished(row.round.chosen))
        done = do_work(self.work, job.function, job.inputs, self.executor)
        candidate = self.registry.add(self.work / done.key / "files" / done.result["bundle"])
        if candidate == row.round.champion:
            raise NotReachableError("a candidate must differ from the champion, got the same bundle")
        return self._edge(row, "EVALUATE", now, "a fresh certificate", recalibrated=done.key, candidate=candidate)

    def _evaluate(self, row: LoopRow, now: float, _manual: bool) -> LoopStep:
        verdict = self.parts.evaluate(row.round)
        name = verdict.fingerprint()
        verdict.write(self.registry.root / "verdicts" / f"{name}.json")
        if not verdict.promoted:
            return self._edge(row, "HOLD", now, verdict.reason, verdict=name, clear=True)

        move = partial(self._point, name="shadow", bundle=row.round.candidate, now=now)
        return self._edge(row, "SHADOW", now, verdict.reason, verdict=name, shadow_since=now, move=move)

    def _shadow(self, row: LoopRow, now: float, _manual: bool) -> LoopStep:
        config, current = self.config, row.round
        found = self.parts.compare(current, delta=config.rollback_delta)
        if found.evidence.alarm:
            return self._edge(row, "HOLD", now, found.against(), clear=True)
        left = current.entered + config.shadow_seconds - now
        if left > 0 or found.pairs < config.shadow_pairs:
            return LoopStep(row, moved=False, note=found.short(left, config.shadow_pairs))
        if not config.auto_promote and current.approved_by is None:
            note = f"round {current.number} has a candidate, {current.candidate}, that passed the promotion test"
            text, bundle = f"{note}; stage1 continual promote lets it answer", current.candidate or ""
            alert = Alert(time=now, kind="approval", title="A candidate waits for approval", text=text, bundle=bundle)
            self._tell({f"approval/{current.number}": alert})
            return LoopStep(row, moved=False, note="waits for approval: stage1 continual promote")
        who = current.approved_by or "auto_promote"
        move = partial(self._point, name="canary", bundle=current.candidate, now=now, share=config.canary_share)
        return self._edge(row, "CANARY", now, f"approved by {who}", move=move, facts=found.facts())

    def _canary(self, row: LoopRow, now: float, _manual: bool) -> LoopStep:
        config = self.config
        found = self.parts.compare(row.round, delta=config.rollback_delta)
        if found.evidence.alarm:
            return self._edge(row, "ROLLBACK", now, found.against(), clear=True, facts=found.facts())
        left = row.round.entered + config.canary_seconds - now
        if left > 0 or found.pairs < config.canary_pairs:
            return LoopStep(row, moved=False, note=found.short(left, config.canary_pairs))
        return self._edge(row, "CHAMPION", now, "the canary lives", facts=found.facts())

    def _champion(self, row: LoopRow, now: float, _manual: bool) -> LoopStep:
        current = row.round
        crown = partial(
            self.registry.move, name="champion", bundle=current.candidate, expected=current.champion_version, now=now,
            by=f"round {current.number}",
        )  # fmt: skip
        try:
            return self._edge(row, "MONITOR", now, "a new champion", memory={}, move=crown, clear=True)
        except LostRaceError as error:
            if self.row().version != row.version:
                raise
            return self._edge(row, "HOLD", now, str(error), clear=True)

    def _rolled_back(self, row: LoopRow, now: float, _manual: bool) -> LoopStep:
        # A candidate that goes leaves the champion what was seen of it; another champion is looked at afresh.
        same = self.registry.alias("champion").version == row.round.champion_version
        return self._edge(row, "MONITOR", now, "the old champion serves", memory=row.memory if same else {})

    def _hold(self, row: LoopRow, now: float, manual: bool) -> LoopStep:
        left = row.round.entered + self.config.hold_seconds - now
        if left > 0 and not manual:
            return LoopStep(row, moved=False, note=f"rests for {left:.0f} s: {row.round.note}")
        return self._edge(row, "MONITOR", now, "rested")

    _STEPS: Mapping[State, Callable[[Loop, LoopRow, float, bool], LoopStep]] = {
        "MONITOR": _monitor, "COLLECT": _collect, "PROPOSE": _propose, "SELECT": _select, "RECALIBRATE": _recalibrate,
        "EVALUATE": _evaluate, "SHADOW": _shadow, "CANARY": _canary, "CHAMPION": _champion, "ROLLBACK": _rolled_back,
        "HOLD": _hold,
    }  # fmt: skip

    # ---------------------------------------------------------------------------- edges

    def finished(self, key: str) -> Work:
        """A piece of work that an earlier state did.

        Raises:
            ArtifactError: its files were changed or removed.
        """
        found = find_work(self.work, key)
        if found is None:
            raise ArtifactError(
                f"{self.work / key} must hold finished work as it was left; `continual run` cannot go on"
            )
        return found

    def _edge(
        self,
        row: LoopRow,
        to: State,
        now: float,
        why: str,
        *,
        current: Round | None = None,
        memory: Mapping[str, Any] | None = None,
        move: Callable[[Connection], object] | None = None,
        clear: bool = False,
        facts: Mapping[str, Any] | None = None,
        alerts: Mapping[str, Alert] | None = None,
        **changes: Any,
    ) -> LoopStep:
        assert to in EDGES[row.state] or to == "ROLLBACK"
        self._observe(f"{row.state} done")

        def moves(connection: Connection) -> None:
            if move is not None:
                move(connection)
            if clear:
                self._clear(connection, now, f"round {row.round.number}")

        current = (current or row.round).model_copy(update={**changes, "entered": now, "note": why})
        body = {"from": row.state, "to": to, "why": why, **(facts or {}), "round": current.model_dump()}
        told = {**(alerts or {}), **_alerts_of(row.state, to, why, current, row.version + 1, now)}
        kept = row.memory if memory is None else dict(memory)
        after = self._write(row, now, "edge", body, moves, told, state=to, round=current, memory=kept)
        self._observe(f"{row.state} committed")
        self.registry.sync()
        return LoopStep(after, moved=True, note=why)

    def _write(
        self,
        row: LoopRow,
        now: float,
        kind: str | None,
        body: Mapping[str, Any],
        move: Callable[[Connection], object] | None = None,
        alerts: Mapping[str, Alert] | None = None,
        **changes: Any,
    ) -> LoopRow:
        """The one place that changes the row: only if it is still the one that was read."""
        after = row.model_copy(update={**changes, "version": row.version + 1, "time": now})
        with self.store.write() as connection:
            self.store.serialise(connection)
            changed = connection.execute(
                update(_row).where(_row.c.id == 1, _row.c.version == row.version).values(_columns(after))
            )
            if changed.rowcount != 1:
                raise LostRaceError(
                    f"the loop must still be at version {row.version}: another process moved it meanwhile"
                )
            if move is not None:
                move(connection)
            if kind is not None:
                audit.append(connection, self.store, kind, body, now)
            outbox.post(connection, self.store, alerts or {})
        return after

    def _tell(self, alerts: Mapping[str, Alert]) -> None:
        """Post alerts that need no edge because every look sees them again; each is posted once."""
        new = outbox.unknown(self.store, alerts)
        if new:
            with self.store.write() as connection:
                outbox.post(connection, self.store, new)

    def _point(
        self,
        connection: Connection,
        name: AliasName,
        bundle: str | None,
        now: float,
        by: str = "loop",
        share: float | None = None,
    ) -> None:
        at = self.registry.alias(name, connection)
        if at.bundle != bundle:
            self.registry.move(connection, name, bundle, expected=at.version, now=now, by=by, share=share)

    def _clear(self, connection: Connection, now: float, by: str) -> None:
        self._point(connection, "shadow", None, now, by)
        self._point(connection, "canary", None, now, by)


# States in which a round waits for time, images or a person, or for work that may fail again and again.
_WAITING = set(EDGES) - {"MONITOR", "CHAMPION", "ROLLBACK"}


def read_verdict(root: Path | str, fingerprint: str) -> Verdict:
    """A verdict that the loop has written.

    Raises:
        ArtifactError: it is not there, or was changed.
    """
    verdict = Verdict.read(Path(root) / "verdicts" / f"{fingerprint}.json")
    if verdict.fingerprint() != fingerprint:
        raise ArtifactError(f"verdict {fingerprint[:12]} must be as it was written, got another; it was changed")
    return verdict


def _alerts_of(state: State, to: State, why: str, current: Round, version: int, now: float) -> dict[str, Alert]:
    """What people should be told of an edge."""
    if to == "COLLECT":
        text = f"Round {current.number} begins: {why}."
        alert = Alert(time=now, kind="train", title="A training is asked for", text=text, bundle=current.champion)
    elif to == "ROLLBACK":
        alert = Alert(time=now, kind="rollback", title="Rolled back", text=f"Round {current.number}: {why}.")
    elif state == "CHAMPION" and to == "MONITOR":
        text = f"Round {current.number}: the candidate is the champion now, for every photo."
        alert = Alert(time=now, kind="champion", title="A new champion", text=text, bundle=current.candidate or "")
    else:
        return {}
    return {f"{alert.kind}/{version}": alert}


def _columns(row: LoopRow) -> dict[str, Any]:
    return {"version": row.version, "state": row.state, "body": row.model_dump_json(), "time": row.time}
