"""Events and labels as rows that never change, and the label that holds if an event has several."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from pydantic import Field
from scipy.special import betaincinv
from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Connection,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    func,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite

from stage1_pro.classes import known_as
from stage1_pro.continual.ledger.schema import append_only, metadata
from stage1_pro.continual.ledger.store import Store
from stage1_pro.continual.serving.events import (
    STORED,
    BundleFacts,
    Event,
    EventLog,
    Position,
    pack_floats,
    unpack_floats,
)
from stage1_pro.errors import InputError, nearest, printable
from stage1_pro.files import uniform
from stage1_pro.record import Record

Source = Literal["owner", "review", "match", "model"]
# A label of a more trusted source holds.
TRUST: dict[Source, int] = {"owner": 3, "review": 2, "match": 1, "model": 0}
SOURCES: tuple[Source, ...] = tuple(TRUST)
# The only sources that may guard a promotion.
GUARD_SOURCES: tuple[Source, ...] = ("owner", "review")
DOUBLE_SHARE = 0.05

events = Table(
    "events",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("time", Double, nullable=False),
    Column("bundle", String(64), nullable=False),
    Column("image_sha256", String(64), nullable=False),
    Column("action", String(8), nullable=False),
    Column("stage", String(1), nullable=False),
    Column("label", Text, nullable=False),
    Column("prob_a", Double),
    Column("prob_b", Double),
    Column("confidence", Double),
    Column("gate_logit", Double),
    Column("exit_score", Double),
    Column("threshold", Double, nullable=False),
    Column("propensity", Double, nullable=False),
    Column("selected", Boolean, nullable=False),
    Column("sketch", LargeBinary, nullable=False),
    Column("reviews", Integer, nullable=False, comment="how many reviewers are wanted"),
    Column("seq", BigInteger, comment="in the order of ingestion; null: ingested by a version that did not count"),
    Index("events_by_time", "time", "id"),
    Index("events_by_seq", "seq"),
    Index("events_by_image", "image_sha256"),
)
Index("events_to_review", events.c.time, events.c.id, sqlite_where=events.c.reviews > 0,
      postgresql_where=events.c.reviews > 0)  # fmt: skip
Index("events_exits", events.c.time, events.c.id, sqlite_where=events.c.action == "exit",
      postgresql_where=events.c.action == "exit")  # fmt: skip

labels = Table(
    "labels",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("kind", String(6), nullable=False),
    Column("event_id", String(64), ForeignKey("events.id"), nullable=False, index=True),
    Column("label", Text),
    Column("source", String(6), nullable=False),
    Column("trust", Integer, nullable=False),
    Column("annotator", Text, nullable=False),
    Column("time", Double, nullable=False),
    Column("supersedes", Integer, ForeignKey("labels.id"), unique=True),
    Index("labels_by_time", "time"),
    CheckConstraint("kind IN ('answer', 'skip', 'undo')", name="labels_kind"),
    CheckConstraint("(kind = 'answer') = (label IS NOT NULL)", name="labels_answer"),
    CheckConstraint("(kind = 'undo') <= (supersedes IS NOT NULL)", name="labels_undo"),
    sqlite_autoincrement=True,
)

label_records = Table(
    "label_records",
    metadata,
    Column("label_id", Integer, ForeignKey("labels.id"), primary_key=True, autoincrement=False),
    Column("record", Text, nullable=False, comment="what another tool calls the answer it was imported from"),
)

bundles = Table(
    "served_bundles", metadata, Column("bundle", String(64), primary_key=True), Column("facts", Text, nullable=False)
)

log_positions = Table(
    "log_positions",
    metadata,
    Column("log", String(64), primary_key=True),
    Column("segment", Integer, nullable=False),
    Column("position", Integer, nullable=False),
)

append_only(events, ignores=True)
append_only(labels)
append_only(label_records)


def insert(store: Store, table: Table) -> Any:
    """An insert of the store's dialect, which knows ``on_conflict_do_nothing`` and ``on_conflict_do_update``."""
    return (sqlite if store.is_sqlite else postgresql).insert(table)


def standing() -> Any:
    """The condition that no other row supersedes a row of ``labels``."""
    later = labels.alias()
    return ~select(later.c.id).where(later.c.supersedes == labels.c.id).exists()


# --------------------------------------------------------------------------------------------
# Events


class Ingested(Record):
    """What an ingestion found: events that are new and that were known, and lines that are none."""

    events: int
    known: int
    torn: tuple[str, ...] = Field(description="segment:offset: reason, of every line that is no event")
    pending: int = Field(description="bytes of a line without an end, of a writer that was killed")


def ingest(store: Store, log: EventLog, *, double_share: float = DOUBLE_SHARE, seed: int = 0) -> Ingested:
    """Put what a log has new into a store, exactly once: rows and place in the log are one transaction.

    Args:
        store: where to.
        log: where from.
        double_share: share of selected events that two people are asked about, by a hash of seed and id.
        seed: of that draw.

    Raises:
        InputError: ``double_share`` is outside [0, 1].
        ArtifactError: the log lost bytes that were ingested before.
    """
    if not 0 <= double_share <= 1:
        raise InputError(f"double_share must be in [0, 1], got {double_share}")
    new = known = 0
    torn: tuple[str, ...] = ()
    mine = log_positions.c.log == log.info.id
    with store.write() as connection:
        for name, facts in log.bundles().items():
            row = {"bundle": name, "facts": facts.model_dump_json()}
            connection.execute(insert(store, bundles).values(row).on_conflict_do_nothing())
    while True:
        with store.write() as connection:
            # Where it goes on; the row is held until the transaction ends.
            first = {"log": log.info.id, "segment": 0, "position": 0}
            connection.execute(insert(store, log_positions).values(first).on_conflict_do_nothing())
            place = select(log_positions.c.segment, log_positions.c.position).where(mine).with_for_update()
            start = Position(*connection.execute(place).one())
            tail = log.read(start)
            if tail.position != start:
                where = {"segment": tail.position.segment, "position": tail.position.offset}
                connection.execute(log_positions.update().where(mine).values(where))
            rows = [_row(one, double_share, seed) for one in tail.events]
            added = _insert_events(store, connection, rows)
        new, known = new + added, known + len(rows) - added
        torn += tail.torn
        if tail.position == start:
            return Ingested(events=new, known=known, torn=torn, pending=tail.pending)


def _row(one: Event, double_share: float, seed: int) -> dict[str, Any]:
    double = uniform(seed, "double", one.id) < double_share
    kept = {name: getattr(one, name) for name in STORED}
    return {**kept, "sketch": pack_floats(one.sketch), "reviews": (2 if double else 1) if one.selected else 0}


def _insert_events(store: Store, connection: Connection, rows: list[dict[str, Any]]) -> int:
    if not rows:
        return 0
    # Numbers in the order of commits: whoever has seen one has seen all below.
    store.serialise(connection)
    last = connection.execute(select(func.max(events.c.seq))).scalar() or 0
    rows = [{**row, "seq": seq} for seq, row in enumerate(rows, last + 1)]
    if store.is_sqlite:
        statement = insert(store, events).on_conflict_do_nothing().returning(events.c.id)
        return len(connection.execute(statement, rows).all())
    # COPY takes a fifth of the time of inserts, but knows nothing of rows that are there already.
    names = ", ".join(column.name for column in events.columns)
    connection.exec_driver_sql("CREATE TEMPORARY TABLE incoming (LIKE events) ON COMMIT DROP")
    cursor: Any = connection.connection.cursor()
    with cursor:
        with cursor.copy(f"COPY incoming ({names}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row([row[column.name] for column in events.columns])
        move = f"INSERT INTO events ({names}) SELECT {names} FROM incoming ON CONFLICT DO NOTHING"  # noqa: S608
        cursor.execute(move)
        return int(cursor.rowcount)


def add_events(store: Store, new: Sequence[Event], *, double_share: float = DOUBLE_SHARE, seed: int = 0) -> int:
    """Put events into a store without a log; give how many were new.

    Args:
        store: where to.
        new: the events; known ids are left out.
        double_share: as ``ingest`` takes it.
        seed: the same.
    """
    with store.write() as connection:
        return _insert_events(store, connection, [_row(one, double_share, seed) for one in new])


def read_events(
    store: Store, *, since: float = -math.inf, until: float = math.inf, bundle: str | None = None
) -> Iterator[Event]:
    """Events with since <= time < until, by time and id.

    Args:
        store: where from.
        since: seconds since the epoch.
        until: the same.
        bundle: sha256 of the manifest that served; all by default.
    """
    query = select(*(events.c[name] for name in STORED)).order_by(events.c.time, events.c.id)
    if since > -math.inf:
        query = query.where(events.c.time >= since)
    if until < math.inf:
        query = query.where(events.c.time < until)
    if bundle is not None:
        query = query.where(events.c.bundle == bundle)
    with store.read() as connection:
        for row in connection.execute(query, execution_options={"yield_per": 5000}).mappings():
            yield Event.model_construct(**{**row, "sketch": unpack_floats(row["sketch"])})


def read_bundles(store: Store) -> dict[str, BundleFacts]:
    """Facts on every bundle that served, by its sha256."""
    with store.read() as connection:
        return {row.bundle: BundleFacts.parse(row.facts, row.bundle) for row in connection.execute(select(bundles))}


# --------------------------------------------------------------------------------------------
# Labels


class Label(Record):
    """Somebody's answer to an event."""

    event_id: str = Field(min_length=1, max_length=64)
    label: str = Field(min_length=1)
    source: Source
    annotator: str = Field(min_length=1)
    time: float = Field(description="seconds since the epoch, UTC")


@dataclass(frozen=True)
class Outside:
    """A label as another tool has it.

    Args:
        label: the answer; of a withdrawn one only event and time are used.
        record: what the other tool calls the answer. Without it an answer is its event, source, annotator and time.
        timed: the time is the tool's own. Otherwise it is that of the import, and no part of the identity.
        earlier: the answer that stands here in this one's place while ``record`` is not known.
        unchanged: the tool was given ``earlier``, and still has it.
        withdrawn: the tool has it no more.
    """

    label: Label
    record: str | None = None
    timed: bool = True
    earlier: Label | None = None
    unchanged: bool = False
    withdrawn: bool = False

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal of all states of one answer."""
        one = self.label
        if self.record is not None:
            return one.event_id, self.record
        return one.event_id, one.source, one.annotator, one.time if self.timed else None


@dataclass(frozen=True)
class Added:
    """How many labels were added, how many were there already or are older than what is there, how many withdrawn."""

    added: int
    known: int
    withdrawn: int = 0


def add_labels(store: Store, new: Iterable[Label]) -> Added:
    """Append labels, each known by event, source, annotator and time; all of them or, on an error, none.

    Raises:
        InputError: an event the store does not have, or a label that is no class of the bundle that served it.
    """
    return add_outside(store, [Outside(one) for one in new])


def add_outside(store: Store, new: Sequence[Outside]) -> Added:
    """Bring answers to the state that another tool shows, by rows that supersede; all of them or, on an error, none.

    Of several states of one answer the last counts. A state that is there already, was undone here, or is older than
    what is there adds nothing, so that nothing is known later for having been imported again.

    Raises:
        InputError: as ``add_labels``.
    """
    facts = read_bundles(store)
    added = withdrawn = 0
    with store.write() as connection:
        store.serialise(connection)
        named: list[Outside] = []
        for start in range(0, len(new), 500):
            part = new[start : start + 500]
            query = select(events.c.id, events.c.bundle).where(events.c.id.in_({one.label.event_id for one in part}))
            named += _named(part, {row.id: row.bundle for row in connection.execute(query)}, facts)
        # Answers without a time last: they are later than all that have one.
        for group in (
            [one for one in named if one.record is None and one.timed],
            [one for one in named if one.record is not None],
            [one for one in named if one.record is None and not one.timed],
        ):
            # What is left has one state of each identity, so that no row depends on another of its group.
            states = list({one.identity: one for one in group}.values())
            for start in range(0, len(states), 500):
                now = states[start : start + 500]
                known = _Answers(connection, {one.label.event_id for one in now})
                rows = [(one, row) for one in now if (row := known.row_for(one)) is not None]
                _append(connection, rows)
                gone = sum(one.withdrawn for one, _ in rows)
                added, withdrawn = added + len(rows) - gone, withdrawn + gone
    return Added(added, sum(not one.withdrawn for one in new) - added, withdrawn)


def _append(connection: Connection, rows: Sequence[tuple[Outside, Mapping[str, Any]]]) -> None:
    plain = [row for one, row in rows if one.record is None]
    if plain:
        connection.execute(labels.insert(), plain)
    for one, row in rows:
        if one.record is not None:
            written = connection.execute(labels.insert().values(row).returning(labels.c.id)).scalar_one()
            if not one.withdrawn:
                connection.execute(label_records.insert(), {"label_id": written, "record": one.record})


class _Answers:
    """All rows of ``labels`` on some events, to see what an outside answer changes."""

    def __init__(self, connection: Connection, event_ids: Collection[str]) -> None:
        joined = labels.outerjoin(label_records, label_records.c.label_id == labels.c.id)
        query = select(labels, label_records.c.record).select_from(joined).where(labels.c.event_id.in_(event_ids))
        self._superseded: dict[int, Any] = {}
        self._rows: dict[str, list[Any]] = {}
        for row in connection.execute(query.order_by(labels.c.id)):
            self._rows.setdefault(row.event_id, []).append(row)
            if row.supersedes is not None:
                self._superseded[row.supersedes] = row

    def row_for(self, one: Outside) -> dict[str, Any] | None:
        """The row to append, or None where nothing is to be said."""
        there = self._rows.get(one.label.event_id, [])
        answers = [row for row in there if row.kind == "answer"]
        if one.record is not None:
            mine = [row for row in there if row.record == one.record]
            return self._of_record(one, mine[-1]) if mine else self._first_of_record(one, answers)
        new = one.label
        by = [row for row in answers if (row.source, row.annotator) == (new.source, new.annotator)]
        if one.timed:
            by = [row for row in by if row.time == new.time]
        elif any(row.label == new.label and row.id not in self._superseded for row in by):
            return None
        last = by[-1] if by else None
        return None if last is not None and last.label == new.label else self._answer(new, last)

    def _of_record(self, one: Outside, last: Any) -> dict[str, Any] | None:
        # Undone here or withdrawn there: that is the state, from its own time on.
        undone = self._superseded.get(last.id)
        state = undone if undone is not None and undone.kind == "undo" else last
        new = one.label
        if one.timed and new.time < state.time:
            return None
        if one.withdrawn:
            return None if last.id in self._superseded else _undo(last, new.time)
        if state.kind == "undo":
            again = new.time > state.time if one.timed else new.label != last.label
            return self._answer(new, None) if again else None
        same = state.label == new.label and TRUST[new.source] <= state.trust
        return None if same else self._answer(new, state)

    def _first_of_record(self, one: Outside, answers: Sequence[Any]) -> dict[str, Any] | None:
        before = one.earlier
        if one.withdrawn:
            return None
        if before is None:
            return self._answer(one.label, None)
        key = (before.source, before.annotator, before.time)
        same = [row for row in answers if (row.source, row.annotator, row.time) == key and row.record is None]
        if same and same[-1].label == one.label.label:
            return None
        return self._answer(before if one.unchanged and not same else one.label, same[-1] if same else None)

    def _answer(self, new: Label, last: Any) -> dict[str, Any]:
        takes = None if last is None or last.id in self._superseded else last.id
        return {**dict(new), "kind": "answer", "trust": TRUST[new.source], "supersedes": takes}


def _undo(row: Any, now: float) -> dict[str, Any]:
    kept = {column.name: getattr(row, column.name) for column in labels.columns if column.name != "id"}
    return {**kept, "kind": "undo", "label": None, "time": now, "supersedes": row.id}


def _named(part: Sequence[Outside], served: Mapping[str, str], facts: Mapping[str, BundleFacts]) -> list[Outside]:
    """The same with every label as the bundle that served its event spells the class."""
    found = []
    for one in part:
        label = one.label
        known = facts.get(served.get(label.event_id, ""))
        name = label.label if known is None or one.withdrawn else known_as(label.label, known.classes)
        if label.event_id not in served and not one.withdrawn:
            raise InputError(
                f"event_id must be one of the store's events, got '{printable(label.event_id)}'; ingest the log that "
                "has it first"
            )
        if known is not None and name is None:
            raise InputError(
                f"label must be one of {', '.join(known.classes)}, got '{printable(label.label)}' for event "
                f"{label.event_id}{nearest(label.label, known.classes)}"
            )
        if name != label.label:
            earlier = None if one.earlier is None else one.earlier.model_copy(update={"label": name})
            one = replace(one, label=label.model_copy(update={"label": name}), earlier=earlier)  # noqa: PLW2901
        found.append(one)
    return found


@dataclass(frozen=True)
class Resolved:
    """The label that holds for an event, whose it is, how many answered, an annotator once for each source, and whether
    the last answers of all of them are this one.
    """

    label: str
    source: Source
    trust: int
    time: float
    answers: int
    agree: bool


def read_labels(store: Store, *, sources: Collection[Source] = SOURCES) -> list[Label]:
    """Every answer that stands, in the order of writing."""
    query = (
        select(*(labels.c[name] for name in Label.model_fields))
        .where(labels.c.kind == "answer", standing(), labels.c.source.in_(_sources(sources)))
        .order_by(labels.c.id)
    )
    with store.read() as connection:
        return [Label(**row) for row in connection.execute(query).mappings()]


def resolve(store: Store, *, sources: Collection[Source] = SOURCES, until: float = math.inf) -> dict[str, Resolved]:
    """The label that holds for each event: of the most trusted source; among those the latest; then the last written.

    Args:
        store: where from.
        sources: which are heard; ``GUARD_SOURCES`` for what guards a promotion.
        until: answers from this time on are not heard, nor are undos, so that a replay sees what was known then.
    """
    with store.read() as connection:
        return resolve_within(connection, sources=sources, until=until)


def resolve_within(
    connection: Connection,
    *,
    sources: Collection[Source] = SOURCES,
    until: float = math.inf,
    among: Collection[str] | None = None,
) -> dict[str, Resolved]:
    """``resolve`` within a transaction, of all events or ``among`` so many."""
    later = labels.alias()
    superseded = select(later.c.id).where(later.c.supersedes == labels.c.id)
    query = select(labels).where(labels.c.kind == "answer", labels.c.source.in_(_sources(sources)))
    if among is not None:
        query = query.where(labels.c.event_id.in_(among))
    if until < math.inf:
        superseded = superseded.where(later.c.time < until)
        query = query.where(labels.c.time < until)
    query = query.where(~superseded.exists()).order_by(
        labels.c.event_id, labels.c.trust.desc(), labels.c.time.desc(), labels.c.id.desc()
    )
    found: dict[str, list[Any]] = {}
    for row in connection.execute(query):
        found.setdefault(row.event_id, []).append(row)
    return {name: _resolved(rows) for name, rows in found.items()}


def _resolved(rows: Sequence[Any]) -> Resolved:
    """Of the answers of an event, the one that holds first and later ones of an annotator before earlier ones."""
    one, last = rows[0], dict[tuple[str, str], str]()
    for row in rows:
        last.setdefault((row.source, row.annotator), row.label)
    return Resolved(one.label, one.source, one.trust, one.time, len(last), set(last.values()) == {one.label})


def _sources(sources: Collection[Source]) -> list[Source]:
    for one in sources:
        if one not in TRUST:
            raise InputError(f"sources must be among {', '.join(TRUST)}, got '{one}'{nearest(one, TRUST)}")
    return list(sources)


class Disagreement(Record):
    """How often two reviewers of one event disagree: how good human labels are.

    ``rate`` and its exact 95% interval are over events with answers of two or more reviewers; an event disagrees
    unless all its reviewers answer alike. ``kappa`` is Cohen's, of the first two of each, in order.
    """

    doubled: int
    disagreeing: int
    rate: float | None
    lower: float
    upper: float
    kappa: float | None
    event_ids: tuple[str, ...] = Field(description="events that disagree")

    @classmethod
    def of(cls, answers: Mapping[str, Sequence[str]]) -> Self:
        """From the labels that each event got, of two or more different reviewers each."""
        wrong = tuple(sorted(name for name, given in answers.items() if len(set(given)) > 1))
        n, k = len(answers), len(wrong)
        kappa = None
        if n:
            first, second = (Counter(given[place] for given in answers.values()) for place in (0, 1))
            chance = sum(first[name] * second[name] for name in first) / n**2
            seen = sum(given[0] == given[1] for given in answers.values()) / n
            kappa = (seen - chance) / (1 - chance) if chance < 1 else None
        return cls(
            doubled=n,
            disagreeing=k,
            rate=k / n if n else None,
            lower=float(betaincinv(k, n - k + 1, 0.025)) if k else 0.0,
            upper=float(betaincinv(k + 1, n - k, 0.975)) if k < n else 1.0,
            kappa=kappa,
            event_ids=wrong,
        )


def disagreement(store: Store) -> Disagreement:
    """How often reviewers of the same event disagree, over answers that stand; each reviewer's last one counts."""
    given: dict[str, dict[str, str]] = {}
    for one in sorted(read_labels(store, sources=["review"]), key=lambda one: one.time):
        given.setdefault(one.event_id, {})[one.annotator] = one.label
    return Disagreement.of({name: list(by.values()) for name, by in given.items() if len(by) > 1})
