"""What a loop no longer needs is removed: files, photos and events that no figure, test, certificate or replay reads.

Of events only those go that were not selected for review, have no label, and are older than what is kept. Their sums
stay. Every step is whole by itself, so a process that was killed left what it had done, and the next one goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field
from sqlalchemy import Connection, and_, delete, func, or_, select
from sqlalchemy.exc import DatabaseError

from stage1_pro.continual.ledger import audit
from stage1_pro.continual.ledger.labels import events, insert, labels, log_positions
from stage1_pro.continual.ledger.schema import removable
from stage1_pro.continual.loop import history
from stage1_pro.continual.loop.history import History, Hour
from stage1_pro.continual.loop.rounds import Rounds
from stage1_pro.continual.loop.watching import USUAL
from stage1_pro.continual.serving.events import Position, Purged
from stage1_pro.continual.serving.live import PAIRS, novelty_path
from stage1_pro.record import Record


class Compacted(Record):
    """What was removed, or would be; ``store`` and ``log`` are bytes that are left."""

    dry_run: bool
    until: float = Field(description="events served from this time on stay whatever they are")
    events: int = Field(description="neither selected nor labelled, whose sums are kept")
    left: int = Field(description="events in the store after it")
    files: int = Field(description="of the log, whose events are all in the store")
    pairs: int = Field(description="files of candidates that are no longer tried")
    photos: int = Field(description="whose time is over")
    note: str = ""


def compact(rounds: Rounds, *, keep: float, now: float, dry_run: bool = False) -> Compacted:
    """Remove what a loop no longer needs; the audit says how many events went, if any.

    Args:
        rounds: of the loop.
        keep: seconds before the newest event for which every event stays: a clock that leapt removes nothing.
        now: seconds since the epoch.
        dry_run: only say what would go.
    """
    store, log = rounds.store, rounds.log
    if not dry_run:
        rounds.ingest()
    leapt = log.leapt(now)
    with History.look(store, rounds.config, now) as seen:
        newest = seen.connection.execute(select(func.max(events.c.time))).scalar()
        until = min(now, *(one for one in (newest, leapt) if one is not None)) - keep
        gone = _unneeded(rounds, seen, until)
        count = seen.connection.execute(select(func.count()).select_from(events).where(gone)).scalar_one()
        total = seen.connection.execute(select(func.count()).select_from(events)).scalar_one()
        place = _place(seen.connection, log.info.id)
    pairs, files = _old_pairs(rounds), log.behind(place)
    found = Compacted(
        dry_run=dry_run, until=until, events=count, left=total - count, files=len(files), pairs=len(pairs),
        photos=sum(image for _, image in log.images.over(now)),
    )  # fmt: skip
    if dry_run:
        return found
    purged = log.purge(now)
    for path in pairs:
        path.unlink(missing_ok=True)
    with store.write() as connection:
        # Whoever ingests holds this row, and reads no file meanwhile.
        log.discard(_place(connection, log.info.id, hold=True))
    if count:
        count = _remove(rounds, until, now)
    return found.model_copy(update={
        "events": count, "left": total - count, "photos": purged.removed, "note": _shrunk(rounds, purged)
    })  # fmt: skip


def _shrunk(rounds: Rounds, purged: Purged) -> str:
    """Give space back; what cannot be done now, in words."""
    said = str(purged) if purged.in_doubt else ""
    try:
        rounds.store.shrink()
    except DatabaseError as error:
        why = f"the file of the store is as large as before ({error.orig}); `compact` again makes it smaller"
        return f"{said}; {why}" if said else why
    return said


def _place(connection: Connection, log: str, *, hold: bool = False) -> Position:
    """Up to where a log was ingested."""
    query = select(log_positions.c.segment, log_positions.c.position).where(log_positions.c.log == log)
    row = connection.execute(query.with_for_update() if hold else query).first()
    return Position() if row is None else Position(*row)


def _old_pairs(rounds: Rounds) -> list[Path]:
    """Files of pairs of candidates that are neither in the shadow nor the canary."""
    pointer = rounds.registry.pointer()
    folder = rounds.log.folder / PAIRS
    return [path for path in folder.glob("*.jsonl") if path.stem not in (pointer.shadow, pointer.canary)]


def _unneeded(rounds: Rounds, seen: History, until: float) -> Any:
    """The condition that nothing asks for an event any more."""
    champion, config = rounds.registry.alias("champion"), rounds.config
    bundle = champion.bundle or ""
    last = seen.recent(bundle, champion.time, config.monitor.recent)
    # What the present figures are of; who is judged by them began at the champion's time.
    until = min([until, *(one.time for one in last[:1])])
    other = events.alias()
    answered = select(labels.c.id).where(labels.c.event_id == other.c.id)
    # An image that teaches has a last time of serving, and one that judges has a role.
    image = select(other.c.id).where(
        other.c.image_sha256 == events.c.image_sha256, or_(other.c.selected, answered.exists())
    )
    first = select(events.c.id).where(*seen.served(bundle, champion.time)).order_by(events.c.time, events.c.id)
    needed = [first.where(events.c.action == "exit").limit(USUAL).subquery()]
    if config.plan.novelty > 0 and not novelty_path(rounds.root, bundle).exists():
        every = select(events.c.id).where(events.c.bundle == bundle, events.c.time >= champion.time)
        needed.append(every.order_by(events.c.time, events.c.id).limit(10 * config.novelty_events).subquery())
    newest = select(func.max(events.c.seq)).scalar_subquery()
    return and_(
        events.c.time < until,
        ~events.c.selected,
        ~image.exists(),
        ~select(history.foreign_events.c.id).where(history.foreign_events.c.id == events.c.id).exists(),
        # Numbers of events never begin anew.
        or_(events.c.seq.is_(None), events.c.seq < newest),
        *(events.c.id.not_in(select(one.c.id)) for one in needed),
    )


def _remove(rounds: Rounds, until: float, now: float) -> int:
    """Remove events and keep their sums, in one transaction with its row of the audit; give how many."""
    store = rounds.store
    with store.write() as connection:
        store.serialise(connection)
        with History.within(connection, rounds.config, now) as seen:
            gone = _unneeded(rounds, seen, until)
        hours: dict[tuple[str, int], Hour] = {}
        for hour in _hours(connection, gone):
            history.add_hour(hours, hour)
        with removable(connection, events):
            count = connection.execute(delete(events).where(gone)).rowcount
        past, derived = history.past_hours, history.derived_hours
        for row in connection.execute(select(past)).all():
            if row[:2] in hours:
                history.add_hour(hours, Hour._make(row))
        for name, number in hours:
            for table in (past, derived):
                connection.execute(delete(table).where(table.c.bundle == name, table.c.hour == number))
        if hours:
            connection.execute(insert(store, past), [one._asdict() for one in hours.values()])
        left: dict[tuple[str, int], Hour] = {}
        for hour in _hours(connection, events.c.time < history.HOUR * (math.floor(until / history.HOUR) + 1)):
            if hour[:2] in hours:
                history.add_hour(left, hour)
        if left:
            connection.execute(insert(store, derived), [one._asdict() for one in left.values()])
        audit.append(connection, store, "compact", {"until": until, "events": count}, now)
    return count


def _hours(connection: Connection, these: Any) -> Iterator[Hour]:
    """Sums of each of these decisions."""
    names = ("bundle", "time", "action", "exit_score", "propensity")
    query = select(*(events.c[name] for name in names)).where(these, events.c.exit_score.is_not(None))
    with connection.execute(query, execution_options={"yield_per": 5000}) as rows:
        for row in rows:
            yield history.hour_of(*row)


def render(found: Compacted) -> str:
    """Lines for people."""
    verb = "would go" if found.dry_run else "removed"
    lines = [
        f"events neither selected nor labelled {verb}: {found.events}, {found.left} left",
        f"files of the log that the store has {verb}: {found.files}",
        f"files of candidates no longer tried {verb}: {found.pairs}",
        f"photos whose time is over {verb}: {found.photos}",
    ]
    return "\n".join([*lines, *filter(None, [found.note])])
