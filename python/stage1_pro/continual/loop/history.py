"""What a look knows of the past, read from rows that grow with what comes in: a look costs what is new, not what was.

``digest*`` tables hold what looks would else read all events and labels for: the label that holds for each answered
event, which images may judge or certify, events of another review plan, labels that rounds froze, and the evidence at
some places of the labels' order. They are derived: a history is the same with them, without them, and with an old state
of them, since it makes good what they lack; ``look`` then keeps that for the next look, where the store can be written.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple, Self

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Double,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    delete,
    func,
    or_,
    select,
)

from stage1_pro.chain import canonical
from stage1_pro.continual.ledger import audit
from stage1_pro.continual.ledger.labels import GUARD_SOURCES, events, labels, read_bundles, resolve_within
from stage1_pro.continual.ledger.schema import metadata
from stage1_pro.continual.ledger.store import Store
from stage1_pro.continual.loop.config import Role, RoundsConfig
from stage1_pro.continual.loop.roles import role
from stage1_pro.continual.serving.events import Action, BundleFacts
from stage1_pro.errors import InputError
from stage1_pro.files import uniform

# Evidence is kept at every so many labels, so that a label that is dated back costs those after it and so many more.
KEEP_EVERY = 1024
_CHUNK = _FETCH = 500
HOUR = 3600.0


class ServedRow(NamedTuple):
    """A served decision as ``Event`` has it, without what looks do not need: its sketch above all."""

    id: str
    time: float
    bundle: str
    image_sha256: str
    action: Action
    label: str
    prob_a: float | None
    exit_score: float | None
    propensity: float
    selected: bool


class Answered(NamedTuple):
    """A served decision with the label that holds: when that became known, what it is, whose, and the image's role.

    ``part`` is the role by this event's draw; another event of the image may have drawn another (``History.drawn``).
    """

    id: str
    time: float
    bundle: str
    image_sha256: str
    action: Action
    label: str
    prob_a: float | None
    exit_score: float | None
    propensity: float
    selected: bool
    known: float
    truth: str
    source: str
    part: Role


class Frozen(NamedTuple):
    """Labels that a round froze: its number, until when they are known, and its guard epoch."""

    number: int
    until: float
    guard: str


class Hour(NamedTuple):
    """Sums of a bundle's decisions in an hour since the epoch.

    ``seconds`` of their times, ``doubt`` of 1 - score over exits; ``low`` and ``high`` are the exits' propensities.
    """

    bundle: str
    hour: int
    n: int
    exits: int
    seconds: float
    doubt: float
    low: float | None
    high: float | None

    def plus(self, other: Hour) -> Hour:
        """The sums of both, which are of one hour."""
        lows, highs = ([one for one in pair if one is not None] for pair in zip(self[-2:], other[-2:], strict=True))
        return self._replace(
            n=self.n + other.n, exits=self.exits + other.exits, seconds=self.seconds + other.seconds,
            doubt=self.doubt + other.doubt, low=min(lows, default=None), high=max(highs, default=None),
        )  # fmt: skip


class Kept(NamedTuple):
    """A state kept at a place in the order of labels: behind ``n`` of them, the last one known at ``known``."""

    n: int
    known: float
    event_id: str
    body: str
    window: bytes


_place = Table(
    "digest",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("dealt", Text, nullable=False, comment="what roles depend on"),
    Column("events", BigInteger, nullable=False),
    Column("labels", Integer, nullable=False),
    Column("audit", Integer, nullable=False),
    Column("until", Double, nullable=False),
)
_answers = Table(
    "digest_answers",
    metadata,
    *(Column(name, events.c[name].type, primary_key=name == "id", nullable=events.c[name].nullable)
      for name in ServedRow._fields),
    Column("known", Double, nullable=False),
    Column("truth", Text, nullable=False),
    Column("source", String(6), nullable=False),
    Column("part", String(8), nullable=False),
    Index("digest_answers_by_known", "known"),
    Index("digest_answers_by_time", "time"),
    Index("digest_answers_by_part", "part", "time"),
    Index("digest_answers_by_image", "image_sha256"),
)  # fmt: skip
_drawn = Table(
    "digest_drawn",
    metadata,
    Column("image_sha256", String(64), primary_key=True),
    Column("time", Double, nullable=False),
)
foreign_events = Table(
    "digest_foreign",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("time", Double, nullable=False),
    Index("digest_foreign_by_time", "time"),
)
_frozen = Table(
    "digest_frozen",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("number", Integer, nullable=False),
    Column("until", Double, nullable=False),
    Column("guard", Text, nullable=False),
)
_kept = Table(
    "digest_kept",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("n", Integer, primary_key=True, autoincrement=False),
    Column("known", Double, nullable=False),
    Column("event_id", String(64), nullable=False),
    Column("body", Text, nullable=False),
    Column("window", LargeBinary, nullable=False),
)


def _of_hours(name: str) -> Table:
    return Table(
        name,
        metadata,
        Column("bundle", String(64), primary_key=True),
        Column("hour", Integer, primary_key=True, autoincrement=False),
        Column("n", Integer, nullable=False),
        Column("exits", Integer, nullable=False),
        Column("seconds", Double, nullable=False),
        Column("doubt", Double, nullable=False),
        Column("low", Double),
        Column("high", Double),
    )


derived_hours = _of_hours("digest_hours")
# Of events that are gone: nothing can derive them.
past_hours = _of_hours("past_hours")
_DERIVED = (derived_hours, _answers, _drawn, foreign_events, _frozen, _kept)


def _parts(names: Iterable[str]) -> Iterator[list[str]]:
    """Names in lists that a statement can hold."""
    every = list(names)
    return (every[start : start + _CHUNK] for start in range(0, len(every), _CHUNK))


def hour_of(bundle: str, time: float, action: str, score: float, chance: float) -> Hour:
    """The sums of one decision."""
    out = action == "exit"
    ends = (chance, chance) if out else (None, None)
    return Hour(bundle, math.floor(time / HOUR), 1, int(out), time, (1 - score) * out, *ends)


def add_hour(hours: dict[tuple[str, int], Hour], more: Hour) -> None:
    """Add sums to those of the same hour."""
    before = hours.get(more[:2])
    hours[more[:2]] = more if before is None else before.plus(more)


def _dealt(config: RoundsConfig) -> str:
    """All of a configuration that the derived rows depend on."""
    return canonical([config.plan.floor, config.plan.seed, config.guard_share, config.certified_share])


@dataclass(frozen=True)
class _Place:
    """Up to where the derived rows go: numbers of events, labels and audit rows, and the time of that look."""

    events: int = 0
    labels: int = 0
    audit: int = 0
    until: float = -math.inf


@dataclass
class History:
    """Everything served before a moment, and the labels known by then that may guard a promotion.

    It reads on the connection that it was made with, as long as that is open.
    """

    connection: Connection
    config: RoundsConfig
    until: float
    bundles: Mapping[str, BundleFacts]
    _at: _Place
    _now: _Place
    # What the derived rows lack: rows in the place of others, by event; which events; images and events that are new.
    _stead: dict[str, Answered] = field(default_factory=dict)
    _gone: set[str] = field(default_factory=set)
    _images: dict[str, float] = field(default_factory=dict)
    _others: list[tuple[float, str]] = field(default_factory=list)
    _rounds: dict[int, Frozen] = field(default_factory=dict)
    _sums: dict[tuple[str, int], Hour] = field(default_factory=dict)
    # Nothing that became known before has changed.
    _changed: float = math.inf

    @classmethod
    @contextlib.contextmanager
    def look(cls, store: Store, config: RoundsConfig, until: float = math.inf) -> Iterator[Self]:
        """The history before ``until``; what the derived rows lack is kept first, if the store can be written."""
        bundles = read_bundles(store)
        if not store.read_only and until < math.inf:
            with store.read() as connection:
                seen = cls._read(connection, config, until, bundles, numbers_only=True)
                # What is new is read once, where it is kept.
                lacks = seen._lacks or cls._read(connection, config, until, bundles)._lacks
            if lacks:
                with store.write() as connection:
                    store.serialise(connection)
                    cls._read(connection, config, until, bundles)._keep()
        with store.read() as connection:
            yield cls._read(connection, config, until, bundles)

    @classmethod
    @contextlib.contextmanager
    def within(cls, connection: Connection, config: RoundsConfig, until: float) -> Iterator[Self]:
        """The same within a transaction that no other look shares; what the derived rows lack is kept with it."""
        cls._read(connection, config, until, {})._keep()
        yield cls._read(connection, config, until, {})

    @classmethod
    def _read(
        cls,
        connection: Connection,
        config: RoundsConfig,
        until: float,
        bundles: Mapping[str, BundleFacts],
        *,
        numbers_only: bool = False,
    ) -> Self:
        row = connection.execute(select(_place)).first()
        at = _Place()
        if row is not None and row.dealt == _dealt(config):
            at = _Place(row.events, row.labels, row.audit, row.until)
        number, label = (connection.execute(select(func.max(one))).scalar() or 0 for one in (events.c.seq, labels.c.id))
        now = _Place(number, label, audit.newest(connection), until)
        found = cls(connection, config, until, bundles, at, now)
        if not numbers_only:
            found._see_events()
            found._see_labels()
            found._see_rounds()
        return found

    # ---------------------------------------------------------------------------- what the derived rows lack

    def _see_events(self) -> None:
        """Draw for events that are new: which images may judge or certify, and which events are of another plan."""
        if self._at.events == self._now.events and self._begun:
            return
        names = ("id", "time", "image_sha256", "propensity", "selected", "bundle", "action", "exit_score")
        query = select(*(events.c[name] for name in names))
        # Events of an older version have no number.
        if self._begun:
            query = query.where(events.c.seq > self._at.events)
        plan, rows = self.config.plan, self.connection.execute(query, execution_options={"yield_per": 5000})
        for name, time, image, chance, selected, bundle, action, score in rows:
            draw = uniform(plan.seed, "review", name)
            if chance < plan.floor or selected != (draw < chance):
                self._others.append((time, name))
            if selected and draw < plan.floor and role(image, draw, self.config) != "learn":
                self._images[image] = min(time, self._images.get(image, math.inf))
            if score is not None:
                add_hour(self._sums, hour_of(bundle, time, action, score, chance))

    def _see_labels(self) -> None:
        """The label that holds now for each event that got another row, or one of whose rows is of the time between."""
        low, high = sorted((self._at.until, self.until))
        # Two searches: one for both would read the table.
        changes = [labels.c.id > self._at.labels, (labels.c.time >= low) & (labels.c.time < high)]
        queries = [select(labels.c.event_id).where(one) for one in changes[: 1 + self._begun]]
        names = dict.fromkeys(name for one in queries for name in self.connection.execute(one).scalars())
        for part in _parts(names):
            before = {one.id: one for one in self._rows(select(_answers).where(_answers.c.id.in_(part)))}
            held = resolve_within(self.connection, sources=GUARD_SOURCES, until=self.until, among=part)
            query = select(*(events.c[name] for name in ServedRow._fields)).where(events.c.id.in_(list(held)))
            after = {}
            for row in self.connection.execute(query):
                one, holds = ServedRow._make(row), held[row.id]
                draw = uniform(self.config.plan.seed, "review", one.id)
                dealt = role(one.image_sha256, draw, self.config) if one.selected else "learn"
                after[one.id] = Answered(*one, holds.time, holds.label, holds.source, dealt)
            for name in part:
                old, new = before.get(name), after.get(name)
                if old != new:
                    self._gone.add(name)
                    self._changed = min([self._changed, *(one.known for one in (old, new) if one is not None)])
                    if new is not None:
                        self._stead[name] = new
        # Answers to what is served by one of the two times alone.
        crossing = select(func.min(_answers.c.known)).where(_answers.c.time >= low, _answers.c.time < high)
        if self._begun:
            self._changed = min(self._changed, self._first(crossing) or math.inf)

    def _see_rounds(self) -> None:
        for row in audit.rows(self.connection, kind="edge", after=self._at.audit):
            body = json.loads(row.body)
            if (body["from"], body["to"]) == ("COLLECT", "PROPOSE"):
                kept = body["round"]["snapshot"]
                self._rounds[row.seq] = Frozen(body["round"]["number"], kept["until"], kept["guard"])

    @property
    def _begun(self) -> bool:
        """There are derived rows of this configuration."""
        return self._at.until > -math.inf

    @property
    def _lacks(self) -> bool:
        """The derived rows lack something, and are not of a later look."""
        numbers = (self._at.events, self._at.labels) != (self._now.events, self._now.labels)
        more = numbers or self._gone or self._rounds or self._changed < math.inf
        return self.until >= self._at.until and (bool(more) or not self._begun)

    def _keep(self) -> None:
        """Write what the derived rows lack, within a transaction that no other look shares."""
        if not self._lacks:
            return
        run = self.connection.execute
        if not self._begun:
            for table in (_place, *_DERIVED):
                run(delete(table))
        for part in _parts(self._gone):
            run(delete(_answers).where(_answers.c.id.in_(part)))
        for part in _parts(self._images):
            for row in run(select(_drawn).where(_drawn.c.image_sha256.in_(part))).all():
                self._images[row.image_sha256] = min(row.time, self._images[row.image_sha256])
            run(delete(_drawn).where(_drawn.c.image_sha256.in_(part)))
        for name, hour in self._sums:
            mine = (derived_hours.c.bundle == name, derived_hours.c.hour == hour)
            for row in run(select(derived_hours).where(*mine)).all():
                add_hour(self._sums, Hour._make(row))
            run(delete(derived_hours).where(*mine))
        for table, rows in (
            (_answers, [one._asdict() for one in self._stead.values()]),
            (_drawn, [{"image_sha256": image, "time": time} for image, time in self._images.items()]),
            (foreign_events, [{"id": name, "time": time} for time, name in self._others]),
            (derived_hours, [one._asdict() for one in self._sums.values()]),
            (_frozen, [{"seq": seq, **one._asdict()} for seq, one in self._rounds.items()]),
        ):
            if rows:
                run(table.insert(), rows)
        run(delete(_kept).where(_kept.c.known >= self._changed))
        run(delete(_place))
        now = self._now
        # No later than what there is: a clock that is ahead once must not hold back the looks after it.
        ends = [run(select(func.max(one))).scalar() for one in (events.c.time, labels.c.time)]
        until = min(now.until, max((math.nextafter(one, math.inf) for one in ends if one is not None), default=0.0))
        values = {"events": now.events, "labels": now.labels, "audit": now.audit, "until": until}
        run(_place.insert(), {"id": 1, "dealt": _dealt(self.config), **values})

    # ---------------------------------------------------------------------------- what was served

    def served(self, bundle: str, since: float) -> tuple[Any, ...]:
        """That an event is one of a bundle's decisions from a time on."""
        mine = (events.c.bundle == bundle, events.c.exit_score.is_not(None), events.c.time >= since)
        return mine if self.until == math.inf else (*mine, events.c.time < self.until)

    def recent(self, bundle: str, since: float, n: int) -> list[ServedRow]:
        """The last ``n`` decisions of a bundle from a time on that have an exit score, in the order of serving."""
        query = select(*(events.c[name] for name in ServedRow._fields)).where(*self.served(bundle, since))
        newest = query.order_by(events.c.time.desc(), events.c.id.desc()).limit(n)
        return [ServedRow._make(row) for row in self.connection.execute(newest)][::-1]

    def propensities(self, bundle: str, since: float, n: int) -> list[float]:
        """Chances of review of the first ``n`` exits of a bundle from a time on."""
        query = select(events.c.propensity).where(*self.served(bundle, since), events.c.action == "exit")
        return list(self.connection.execute(query.order_by(events.c.time, events.c.id).limit(n)).scalars())

    def last_served(self, images: Collection[str]) -> dict[str, float]:
        """When each of these images was last served."""
        found: dict[str, float] = {}
        for part in _parts(images):
            query = select(events.c.image_sha256, func.max(events.c.time)).where(
                events.c.image_sha256.in_(part), events.c.time < self.until
            )
            rows = self.connection.execute(query.group_by(events.c.image_sha256))
            found |= {image: time for image, time in rows}  # noqa: C416 (rows are no pairs to mypy)
        return found

    def foreign(self, since: float, after: float) -> str | None:
        """The first event served from ``since`` on, and later than ``after``, that another review plan drew."""
        query = select(foreign_events.c.time, foreign_events.c.id).where(
            foreign_events.c.time >= since, foreign_events.c.time > after
        )
        first = query.order_by(foreign_events.c.time, foreign_events.c.id).limit(1)
        known = self.connection.execute(first).all() if self._begun else []
        found = [(time, name) for time, name in chain(known, self._others) if time >= since and time > after]
        time, name = min(found, default=(math.inf, None))
        return name if time < self.until else None

    def hours(self, bundle: str, since: float) -> list[Hour]:
        """Sums of a bundle's decisions from the hour of a time on, those included whose events are gone."""
        found: dict[tuple[str, int], Hour] = {}
        for table in (derived_hours, past_hours) if self._begun else (past_hours,):
            query = select(table).where(table.c.bundle == bundle, table.c.hour >= math.floor(since / HOUR))
            for row in self.connection.execute(query):
                add_hour(found, Hour._make(row))
        for one in self._sums.values():
            if one.bundle == bundle and one.hour >= math.floor(since / HOUR):
                add_hour(found, one)
        return sorted(found.values(), key=lambda one: one.hour)

    # ---------------------------------------------------------------------------- what was answered

    def _answered(self, *conditions: Any) -> Iterator[Answered]:
        """Derived rows, and those in their place, that a condition on the table may hold for; the caller asks again."""
        yield from self._rows(select(_answers).where(*conditions))
        yield from self._stead.values()

    def _rows(self, query: Any) -> Iterator[Answered]:
        """Derived rows that still hold."""
        if self._begun:
            with self.connection.execute(query, execution_options={"yield_per": _FETCH}) as rows:
                yield from (Answered._make(row) for row in rows if row.id not in self._gone)

    def answered(self, bundle: str, since: float) -> Iterator[Answered]:
        """What a bundle served from a time on and a label is known of."""
        for one in self._answered(_answers.c.time >= since):
            if one.bundle == bundle and since <= one.time < self.until:
                yield one

    def feedback(self, bundle: str, since: float, behind: tuple[float, str]) -> list[Answered]:
        """Of what was selected and has an exit score, answers behind one, in the order in which they became known.

        Labels of events that were not selected are left out: their chance of being labelled is not their propensity.
        """
        found = (
            one for one in self._answered(_answers.c.known >= behind[0])
            if one.bundle == bundle and one.selected and one.exit_score is not None and since <= one.time < self.until
            and (one.known, one.id) > behind
        )  # fmt: skip
        return sorted(found, key=lambda one: (one.known, one.id))

    def newest_harm(self, bundle: str, since: float, certified: float, alarm: float | None) -> float:
        """Serving time of the newest promised exit whose answer was known by an alarm; -inf without one."""
        if alarm is None:
            return -math.inf
        counted = (
            _answers.c.bundle == bundle, _answers.c.selected, _answers.c.exit_score >= certified,
            _answers.c.known <= alarm, _answers.c.time >= since, _answers.c.time < self.until,
        )  # fmt: skip
        if self._begun and not self._gone:
            return self._first(select(func.max(_answers.c.time)).where(*counted)) or -math.inf
        found = (
            one.time for one in self._answered(*counted)
            if one.bundle == bundle and one.selected and one.exit_score is not None and one.exit_score >= certified
            and one.known <= alarm and since <= one.time < self.until
        )  # fmt: skip
        return max(found, default=-math.inf)

    def answers_since(self, known: float) -> int:
        """How many labels that hold became known after a time."""
        count = 0
        if self._begun:
            query = select(func.count()).select_from(_answers).where(_answers.c.known > known)
            count = self.connection.execute(query).scalar_one()
            for part in _parts(self._gone):
                count -= self.connection.execute(query.where(_answers.c.id.in_(part))).scalar_one()
        return count + sum(one.known > known for one in self._stead.values())

    def answers_of(
        self, part: Role, since: float, after: float, *, among: Collection[str] | None = None
    ) -> Iterator[Answered]:
        """Answers of a role, served from ``since`` on and later than ``after``; the last ones served come first.

        With ``among`` only those to these images, in whatever order.
        """
        newest = _answers.c.time.desc()
        query = select(_answers).where(
            _answers.c.part == part, _answers.c.selected, _answers.c.time >= since, _answers.c.time > after,
            _answers.c.time < self.until,
        )  # fmt: skip
        judging = set[str]()
        if part == "learn":
            # An image that ever judges or certifies is never learned from, whatever it is drawn for later.
            judges = select(_drawn.c.time).where(_drawn.c.image_sha256 == _answers.c.image_sha256)
            query = query.where(~judges.where(_drawn.c.time < self.until).exists())
            judging = {image for image, time in self._images.items() if time < self.until}
            judging |= self._judging([one.image_sha256 for one in self._stead.values()])
        known: Iterator[Answered] = self._rows(query.order_by(newest))
        if among is not None:
            parts = (_answers.c.image_sha256.in_(names) for names in _parts(among))
            known = chain.from_iterable(self._rows(query.where(these)) for these in parts)
        for one in self._stead.values():
            mine = one.part == part and one.selected and since <= one.time < self.until and one.time > after
            if mine and one.image_sha256 not in judging and (among is None or one.image_sha256 in among):
                yield one
        yield from (one for one in known if one.image_sha256 not in judging)

    def _judging(self, images: Sequence[str]) -> set[str]:
        """Of these images, those that the derived rows know to judge or certify."""
        found: set[str] = set()
        for part in _parts(images) if self._begun else ():
            query = select(_drawn.c.image_sha256).where(_drawn.c.image_sha256.in_(part), _drawn.c.time < self.until)
            found.update(self.connection.execute(query).scalars())
        return found

    def frozen(self) -> list[Frozen]:
        """What every round froze that got so far."""
        columns = [_frozen.c[name] for name in Frozen._fields]
        known = [Frozen._make(row) for row in self.connection.execute(select(*columns))] if self._begun else []
        return [*known, *self._rounds.values()]

    # ---------------------------------------------------------------------------- what was kept

    def kept(self, key: str) -> Kept | None:
        """The last state under a name behind which nothing has changed."""
        query = select(*(_kept.c[name] for name in Kept._fields)).where(_kept.c.key == key)
        if self._changed < math.inf:
            query = query.where(_kept.c.known < self._changed)
        row = self.connection.execute(query.order_by(_kept.c.n.desc()).limit(1)).first() if self._begun else None
        return None if row is None else Kept._make(row)

    def keep(self, store: Store, key: str, states: Sequence[Kept]) -> None:
        """Keep states under a name, and of earlier ones those at round numbers, unless labels have come meanwhile."""
        if not states or store.read_only or self._lacks or self.until < self._at.until:
            return
        with store.write() as connection:
            store.serialise(connection)
            row = connection.execute(select(_place)).first()
            if row is None or (row.dealt, row.labels, row.until) != (
                _dealt(self.config), self._at.labels, self._at.until
            ):  # fmt: skip
                return
            passing = _kept.c.n % KEEP_EVERY != 0
            connection.execute(delete(_kept).where(or_(_kept.c.key != key, passing, _kept.c.n >= states[0].n)))
            connection.execute(_kept.insert(), [{"key": key, **one._asdict()} for one in states])

    # ---------------------------------------------------------------------------- who was wrong

    def classes(self, bundle: str) -> tuple[str, ...]:
        """Classes of a bundle that served; none before its first event."""
        facts = self.bundles.get(bundle)
        return () if facts is None else facts.classes

    def error_of_a(self, one: Answered) -> bool:
        """Whether Stage A's own answer is wrong.

        Where Stage B answered, P(positive) of Stage A decides, ties as argmax breaks them.

        Raises:
            InputError: a deferred event of a bundle with more than two classes.
        """
        return self._answer_of_a(one) != one.truth

    def _answer_of_a(self, one: Answered) -> str:
        """What Stage A alone would answer; empty where it gave no number."""
        if one.action == "exit":
            return one.label
        classes = self.classes(one.bundle)
        if len(classes) != 2:
            got = f"{len(classes)} classes" if classes else "nothing"
            raise InputError(f"bundle {one.bundle[:12]} must be known to have two classes, got {got}; ingest its log")
        if one.prob_a is None:
            return ""
        positive = classes.index(self.bundles[one.bundle].positive)
        # At one half argmax takes the first class.
        first = one.prob_a >= 0.5 if positive == 0 else one.prob_a <= 0.5
        return classes[0 if first else 1]

    def _first(self, query: Any) -> Any:
        return self.connection.execute(query).scalar()
