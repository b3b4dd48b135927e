"""The audit: rows of what the loop did, each with the hash of the row before, so that a later change is found."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import Column, Connection, Double, Integer, String, Table, Text, func, select
from sqlalchemy.exc import DatabaseError

from stage1_pro.chain import GENESIS, AuditRow, ChainCheck, canonical, verify_rows
from stage1_pro.continual.ledger.schema import append_only, metadata
from stage1_pro.continual.ledger.store import Store
from stage1_pro.files import write_text

_audit = Table(
    "audit",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("time", Double, nullable=False),
    Column("kind", String(40), nullable=False),
    Column("body", Text, nullable=False),
    Column("previous", String(64), nullable=False),
    Column("hash", String(64), nullable=False, unique=True),
)
append_only(_audit)


def append(connection: Connection, store: Store, kind: str, body: Mapping[str, Any], now: float) -> AuditRow:
    """Add a row within a transaction of ``store.write()``, so that it is kept if, and only if, that transaction is.

    Args:
        connection: of the transaction.
        store: that it is of.
        kind: of row, such as ``edge``.
        body: facts, as JSON.
        now: seconds since the epoch.
    """
    store.serialise(connection)
    last = connection.execute(select(_audit.c.seq, _audit.c.hash).order_by(_audit.c.seq.desc()).limit(1)).first()
    seq, previous = (1, GENESIS) if last is None else (last.seq + 1, last.hash)
    row = AuditRow.after(seq, previous, kind, body, now)
    connection.execute(_audit.insert(), row.model_dump())
    return row


def read(store: Store, *, kind: str | None = None) -> Generator[AuditRow, None, None]:
    """Rows in their order, of one kind or all."""
    with store.read() as connection:
        yield from rows(connection, kind=kind)


def rows(connection: Connection, *, kind: str | None = None, after: int = 0) -> Generator[AuditRow, None, None]:
    """Rows behind number ``after`` within a transaction."""
    query = select(_audit).where(_audit.c.seq > after).order_by(_audit.c.seq)
    if kind is not None:
        query = query.where(_audit.c.kind == kind)
    with connection.execute(query, execution_options={"yield_per": 1000}) as found:
        for row in found.mappings():
            yield AuditRow.model_construct(**row)


def newest(connection: Connection) -> int:
    """Number of the last row; 0 where there is none."""
    return connection.execute(select(func.max(_audit.c.seq))).scalar() or 0


def verify(store: Store, *, head: str | None = None) -> ChainCheck:
    """Check every row of a store against its hash and the row before.

    Args:
        store: whose audit.
        head: hash that was noted earlier; a chain that does not hold it was cut off.
    """
    try:
        with contextlib.closing(read(store)) as found:
            return verify_rows(found, head)
    except (DatabaseError, UnicodeDecodeError) as error:
        reason = str(getattr(error, "orig", error)).splitlines()[0]
        return ChainCheck(ok=False, rows=0, head=GENESIS, broken_at=1, reason=f"the database cannot be read: {reason}")


def export(store: Store, path: Path | str) -> int:
    """Write every row as a line of canonical JSON, atomically; give how many."""
    lines = [canonical(row.model_dump()) for row in read(store)]
    write_text(path, "".join(f"{line}\n" for line in lines))
    return len(lines)
