"""The review queue: it lends each event to one person at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from pydantic import Field
from sqlalchemy import Column, Connection, Double, String, Table, Text, and_, func, or_, select

from stage1_pro.continual.ledger.labels import TRUST, bundles, events, insert, labels, standing
from stage1_pro.continual.ledger.schema import metadata
from stage1_pro.continual.ledger.store import Store
from stage1_pro.continual.serving.events import BundleFacts, ImageStore
from stage1_pro.errors import InputError, nearest
from stage1_pro.record import Record

LEASE_SECONDS = 300.0
_FETCH = 50

leases = Table(
    "leases",
    metadata,
    Column("event_id", String(64), primary_key=True),
    Column("reviewer", Text, nullable=False),
    Column("expires", Double, nullable=False),
)


class Item(Record):
    """An event that a reviewer holds until ``expires``, and what the cascade said about it."""

    event_id: str
    image_sha256: str
    classes: tuple[str, ...]
    positive: str | None
    action: str
    label: str = Field(description="the answer; empty where nobody answered")
    answer_a: str | None = Field(description="what Stage A says; None with more than two classes unless it answered")
    answer_b: str | None = Field(description="what Stage B says; None where it was not asked")
    prob_a: float | None
    prob_b: float | None
    second: bool = Field(description="somebody else has answered already")
    served: float = Field(description="when it was served")
    expires: float


class Progress(Record):
    """How far the queue is: events answered by all who were wanted, those left, and what this reviewer did."""

    selected: int
    finished: int
    left: int = Field(description="not finished, not skipped or answered by this reviewer, image still there")
    lent: int = Field(description="of those, held by others now")
    answered_here: int
    skipped_here: int


class LeaseLostError(InputError):
    """The event was lent to somebody else meanwhile, or needs no answer any more."""


class ReviewQueue:
    """Events selected for review, the oldest first, each lent to one reviewer at a time.

    An event is finished when as many reviewers as are wanted have answered, or its owner has. The order is that of
    serving and of nothing else, so that whatever is finished up to a time is a sample with the logged propensities.
    A skipped event is offered to other reviewers.

    Args:
        store: of events and labels.
        images: where the images are; an event whose image is gone cannot be reviewed.
        lease: seconds that an event is lent.
    """

    def __init__(self, store: Store, images: ImageStore, *, lease: float = LEASE_SECONDS) -> None:
        if not lease > 0:
            raise InputError(f"lease must be a positive number of seconds, got {lease}")
        self.store, self.images, self.lease = store, images, lease

    def take(self, reviewer: str, now: float) -> Item | None:
        """Borrow the oldest event that this reviewer may answer; the one already held, until its lease ends."""
        with self._serial() as connection:
            query = (
                select(events.c.id, events.c.image_sha256)
                .where(self._open(reviewer, now), ~self._lent(reviewer, now))
                .order_by(self._mine(reviewer, now).desc(), events.c.time, events.c.id)
            )
            found = connection.execute(query, execution_options={"yield_per": _FETCH})
            chosen = next((row.id for row in found if row.image_sha256 in self.images), None)
            found.close()
            return None if chosen is None else self._lend(connection, chosen, reviewer, now)

    def answer(self, event_id: str, label: str, reviewer: str, now: float) -> int:
        """Append an answer and end the lease; give the label's id.

        Raises:
            InputError: a label that is no class of the bundle that served it.
            LeaseLostError: somebody else holds the event, or it is answered.
        """
        with self._serial() as connection:
            facts = self._facts(connection, event_id)
            if label not in facts.classes:
                raise InputError(
                    f"label must be one of {', '.join(facts.classes)}, got '{label}'{nearest(label, facts.classes)}"
                )
            return self._append(connection, event_id, reviewer, now, kind="answer", label=label)

    def skip(self, event_id: str, reviewer: str, now: float) -> int:
        """Say that one cannot tell: the event goes to somebody else; give the row's id.

        Raises:
            LeaseLostError: somebody else holds the event, or it is answered.
        """
        with self._serial() as connection:
            return self._append(connection, event_id, reviewer, now, kind="skip", label=None)

    def undo(self, reviewer: str, now: float) -> Item | None:
        """Supersede the reviewer's last answer or skip by an undo, and lend the event again; None: nothing to undo.

        Where somebody else holds the event meanwhile the undo stands, and None is given.
        """
        with self._serial() as connection:
            found = select(labels).where(*self._by(reviewer), labels.c.kind != "undo", standing())
            last = connection.execute(found.order_by(labels.c.id.desc()).limit(1)).mappings().one_or_none()
            if last is None:
                return None
            kept = {name: value for name, value in last.items() if name != "id"}
            row = {**kept, "kind": "undo", "label": None, "time": now, "supersedes": last["id"]}
            connection.execute(labels.insert(), row)
            lent = select(events.c.id).where(events.c.id == last["event_id"], self._lent(reviewer, now))
            held = connection.execute(lent).first() is not None
            return None if held else self._lend(connection, last["event_id"], reviewer, now)

    def progress(self, reviewer: str, now: float) -> Progress:
        """How far the queue is, as this reviewer sees it."""
        with self.store.read() as connection:

            def count(*conditions: Any) -> int:
                return connection.execute(select(func.count()).select_from(events).where(*conditions)).scalar_one()

            kinds = select(labels.c.kind, func.count().label("rows")).where(*self._by(reviewer), standing())
            mine = {row.kind: row.rows for row in connection.execute(kinds.group_by(labels.c.kind))}
            return Progress(
                selected=count(events.c.reviews > 0),
                finished=count(events.c.reviews > 0, self._finished()),
                left=count(self._open(reviewer, now)),
                lent=count(self._open(reviewer, now), self._lent(reviewer, now)),
                answered_here=mine.get("answer", 0),
                skipped_here=mine.get("skip", 0),
            )

    def holds(self, event_id: str, reviewer: str, now: float) -> str | None:
        """The sha256 of an event's image while the reviewer holds the event, None otherwise."""
        query = select(events.c.image_sha256).where(events.c.id == event_id, self._mine(reviewer, now))
        with self.store.read() as connection:
            return connection.execute(query).scalar_one_or_none()

    @contextlib.contextmanager
    def _serial(self) -> Iterator[Connection]:
        """A transaction during which no other one of any queue on this store is at work."""
        with self.store.write() as connection:
            self.store.serialise(connection)
            yield connection

    @staticmethod
    def _by(reviewer: str) -> tuple[Any, ...]:
        """That a row of ``labels`` is a reviewer's."""
        return labels.c.annotator == reviewer, labels.c.source == "review"

    @staticmethod
    def _answers(*conditions: Any) -> Any:
        return select(labels.c.id).where(labels.c.event_id == events.c.id, standing(), *conditions)

    def _finished(self) -> Any:
        answers = self._answers(labels.c.kind == "answer", labels.c.source == "review")
        reviewers = answers.with_only_columns(func.count(labels.c.annotator.distinct())).scalar_subquery()
        owned = self._answers(labels.c.kind == "answer", labels.c.source == "owner").exists()
        return or_(reviewers >= events.c.reviews, owned)

    def _open(self, reviewer: str, now: float) -> Any:
        done = self._answers(*self._by(reviewer), labels.c.kind != "undo").exists()
        # Images are gone after their time, and what nobody can see needs no look at the disk.
        return and_(events.c.reviews > 0, events.c.time > now - self.images.ttl, ~self._finished(), ~done)

    @staticmethod
    def _mine(reviewer: str, now: float) -> Any:
        held = leases.c.event_id == events.c.id
        return select(leases.c.event_id).where(held, leases.c.reviewer == reviewer, leases.c.expires > now).exists()

    @staticmethod
    def _lent(reviewer: str, now: float) -> Any:
        held = leases.c.event_id == events.c.id
        return select(leases.c.event_id).where(held, leases.c.reviewer != reviewer, leases.c.expires > now).exists()

    def _lend(self, connection: Connection, event_id: str, reviewer: str, now: float) -> Item:
        row = {"event_id": event_id, "reviewer": reviewer, "expires": now + self.lease}
        statement = insert(self.store, leases).values(row)
        connection.execute(statement.on_conflict_do_update(index_elements=["event_id"], set_=row))
        others = self._answers(labels.c.kind == "answer", labels.c.annotator != reviewer).exists()
        one = connection.execute(select(events, others.label("second")).where(events.c.id == event_id)).one()
        facts = self._facts(connection, event_id)
        exited = one.action == "exit"
        return Item(
            event_id=event_id,
            image_sha256=one.image_sha256,
            classes=facts.classes,
            positive=facts.positive,
            action=one.action,
            label=one.label,
            answer_a=one.label if exited else _answer(one.prob_a, facts),
            answer_b=None if exited else one.label or _answer(one.prob_b, facts),
            prob_a=one.prob_a,
            prob_b=one.prob_b,
            second=bool(one.second),
            served=one.time,
            expires=row["expires"],
        )

    @staticmethod
    def _facts(connection: Connection, event_id: str) -> BundleFacts:
        joined = events.join(bundles, bundles.c.bundle == events.c.bundle)
        found = connection.execute(select(bundles.c.facts).select_from(joined).where(events.c.id == event_id)).first()
        if found is None:
            raise InputError(f"event_id must be an event of a bundle whose log was ingested, got '{event_id}'")
        return BundleFacts.parse(found.facts, "served_bundles")

    def _append(
        self, connection: Connection, event_id: str, reviewer: str, now: float, *, kind: str, label: str | None
    ) -> int:
        allowed = select(events.c.id).where(
            events.c.id == event_id, self._open(reviewer, now), ~self._lent(reviewer, now)
        )
        if connection.execute(allowed).first() is None:
            raise LeaseLostError(f"event_id must be one that {reviewer} may answer, got {event_id}; take another one")
        row = {"kind": kind, "event_id": event_id, "label": label, "source": "review", "trust": TRUST["review"],
               "annotator": reviewer, "time": now}  # fmt: skip
        written = connection.execute(labels.insert().values(row).returning(labels.c.id)).scalar_one()
        connection.execute(leases.delete().where(leases.c.event_id == event_id))
        return int(written)


def _answer(prob: float | None, facts: BundleFacts) -> str | None:
    """The class that P(positive) means where there are two."""
    if prob is None or facts.positive is None or len(facts.classes) != 2:
        return None
    (negative,) = (name for name in facts.classes if name != facts.positive)
    return facts.positive if prob > 0.5 else negative
