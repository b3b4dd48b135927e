"""The audit: rows of what the loop did, each with the hash of the row before, so that a later change is found."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from sqlalchemy import Column, Connection, Double, Integer, String, Table, Text, func, select
from sqlalchemy.exc import DatabaseError

from stage1_pro.continual.ledger.schema import append_only, metadata
from stage1_pro.continual.ledger.store import Store
from stage1_pro.errors import ArtifactError
from stage1_pro.files import sha256_bytes, write_text
from stage1_pro.record import Record, wrong

GENESIS = "0" * 64

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


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


class AuditRow(Record):
    """One thing that happened."""

    seq: int = Field(ge=1)
    time: float = Field(description="seconds since the epoch, UTC")
    kind: str = Field(min_length=1, max_length=40)
    body: str = Field(description="canonical JSON, as it was hashed")
    previous: str = Field(description="hash of the row before; zeros before the first")
    hash: str = Field(description="sha256 of the canonical JSON of all the above")

    def expected_hash(self) -> str:
        """The hash that these values should have."""
        return sha256_bytes(canonical(self.model_dump(exclude={"hash"})).encode())


class ChainCheck(Record):
    """Whether a chain is whole; if not, the first row that differs from what was written."""

    ok: bool
    rows: int = Field(description="rows that are as they were written, from the first on")
    head: str = Field(description="hash of the last of them; note it elsewhere, and a cut-off end is found, too")
    broken_at: int | None = None
    reason: str = ""


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
    row = AuditRow(
        seq=1 if last is None else last.seq + 1,
        time=now,
        kind=kind,
        body=canonical(body),
        previous=GENESIS if last is None else last.hash,
        hash="",
    )
    row = row.model_copy(update={"hash": row.expected_hash()})
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
            return _verify(found, head)
    except (DatabaseError, UnicodeDecodeError) as error:
        reason = str(getattr(error, "orig", error)).splitlines()[0]
        return ChainCheck(ok=False, rows=0, head=GENESIS, broken_at=1, reason=f"the database cannot be read: {reason}")


def verify_file(path: Path | str, *, head: str | None = None) -> ChainCheck:
    """Check an exported audit, every byte of it; ``head`` as in ``verify``.

    Raises:
        ArtifactError: no such file.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} must be an exported audit, got: {error.strerror}") from None
    return _verify(_parsed(data), head)


def export(store: Store, path: Path | str) -> int:
    """Write every row as a line of canonical JSON, atomically; give how many."""
    lines = [canonical(row.model_dump()) for row in read(store)]
    write_text(path, "".join(f"{line}\n" for line in lines))
    return len(lines)


def _parsed(data: bytes) -> Iterator[AuditRow | str]:
    """The rows of an export, or what is wrong with a line."""
    lines = data.split(b"\n")
    if lines[-1] != b"":
        lines.append(b"")
    for line in lines[:-1]:
        try:
            row = AuditRow.model_validate_json(line)
        except ValidationError as error:
            yield f"it is no row: {wrong(error)}"
            continue
        yield row if canonical(row.model_dump()).encode() == line else "it is not written as rows are"


def _verify(rows: Iterable[AuditRow | str], head: str | None) -> ChainCheck:
    previous, count, seen = GENESIS, 0, head in (None, GENESIS)
    for expected, row in enumerate(rows, 1):
        reason = row if isinstance(row, str) else _problem(row, expected, previous)
        if reason or isinstance(row, str):
            return ChainCheck(ok=False, rows=count, head=previous, broken_at=expected, reason=reason)
        previous, count = row.hash, expected
        seen = seen or row.hash == head
    if not seen:
        reason = "the head that was noted is not in the chain: rows were cut off or written anew"
        return ChainCheck(ok=False, rows=count, head=previous, broken_at=count + 1, reason=reason)
    return ChainCheck(ok=True, rows=count, head=previous)


def _problem(row: AuditRow, expected: int, previous: str) -> str:
    if row.seq != expected:
        return f"row {expected} is missing, row {row.seq} follows"
    if row.previous != previous:
        return "it does not follow the row before"
    try:
        whole = row.hash == AuditRow.model_validate(dict(row), strict=True).expected_hash()
    except ValueError:  # Of another type, such as text that became bytes, or no number.
        whole = False
    return "" if whole else "it is not what was written"
