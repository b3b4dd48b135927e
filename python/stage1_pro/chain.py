"""A chain of rows, each with the hash of the row before, so that a later change is found; as lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError

from stage1_pro.errors import ArtifactError
from stage1_pro.files import sha256_bytes
from stage1_pro.record import Record, wrong

GENESIS = "0" * 64


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

    @classmethod
    def after(cls, seq: int, previous: str, kind: str, body: Mapping[str, Any], now: float) -> Self:
        """Row number ``seq``, behind the row of hash ``previous``."""
        row = cls(seq=seq, time=now, kind=kind, body=canonical(body), previous=previous, hash="")
        return row.model_copy(update={"hash": row.expected_hash()})

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


def verify_file(path: Path | str, *, head: str | None = None) -> ChainCheck:
    """Check an exported audit, every byte of it; a chain that does not hold ``head`` was cut off.

    Raises:
        ArtifactError: no such file.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} must be an exported audit, got: {error.strerror}") from None
    return verify_rows(parsed_rows(data), head)


def parsed_rows(data: bytes) -> Iterator[AuditRow | str]:
    """The rows of a file, or what is wrong with a line."""
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


def verify_rows(rows: Iterable[AuditRow | str], head: str | None = None) -> ChainCheck:
    """Check rows against their hashes and the rows before; ``head`` as in ``verify_file``; text says what is wrong."""
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
