"""Where the loop keeps its rows: SQLAlchemy Core on SQLite (write-ahead log) or PostgreSQL, the same code on both."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError

from stage1_pro.continual.ledger import schema
from stage1_pro.errors import InputError, need

# SQLite's file in a folder.
DATABASE = "loop.db"
_BUSY_SECONDS = 30.0
# Any number that nobody else's program locks in the same database.
_LOCK = 0x5354414745310001


class Store:
    """A database of the loop, shared by threads and processes; opening it migrates a store of an older version.

    Args:
        url: a folder or file of SQLite (``loop.db`` in a folder), or an SQLAlchemy URL such as
            ``postgresql+psycopg://user@host/name``.
        busy: seconds to wait for another writer of SQLite.
        read_only: nothing is made, migrated or written, so that a folder or disk that takes no more can be read.

    Raises:
        InputError: the URL is not one, or the database cannot be reached.
        ArtifactError: a store of a newer version, or one that was changed.
        DependencyError: its driver is not installed.
    """

    def __init__(self, url: str | Path, *, busy: float = _BUSY_SECONDS, read_only: bool = False) -> None:
        text, self.read_only = str(url), read_only
        if "://" not in text:
            path = Path(text)
            if path.is_dir() or path.suffix == "":
                path = path / DATABASE
            if not read_only:
                path.parent.mkdir(parents=True, exist_ok=True)
            text = f"sqlite:///{path.absolute()}"
        elif text.startswith("postgresql://"):
            text = "postgresql+psycopg" + text.removeprefix("postgresql")
        try:
            self.url = make_url(text)
            self.is_sqlite = self.url.get_backend_name() == "sqlite"
            given: dict[str, Any] = {"connect_args": {"timeout": busy}} if self.is_sqlite else {}
            self._copied: tempfile.TemporaryDirectory[str] | None = None
            if self.is_sqlite and read_only:
                given = {"creator": self._connect_to_read}
            self.engine = create_engine(self.url, pool_pre_ping=not self.is_sqlite, **given)
        except (ArgumentError, NoSuchModuleError) as error:
            raise InputError(f"url must be a file or an SQLAlchemy URL, got {text!r}: {error}") from None
        except ModuleNotFoundError as error:
            raise need("continual", error.name or "psycopg") from error
        if self.is_sqlite:
            _prepare_sqlite(self.engine, read_only=read_only)
        try:
            self._prepare(read_only=read_only)
        except DatabaseError as error:
            self.close()
            reason = str(error.orig).splitlines()[0]
            raise InputError(f"url must name a database that can be reached, got {self.url!r}: {reason}") from None
        except BaseException:
            self.close()
            raise

    def _connect_to_read(self) -> sqlite3.Connection:
        """Connect to SQLite without a write; where its log cannot be shared with writers, to the file as it lies."""
        path = Path(self.url.database or "").absolute()
        if self._copied is None:
            try:
                connection = _to_read(path, "mode=ro")
            except sqlite3.OperationalError:
                log = path.with_name(f"{path.name}-wal")
                if not log.is_file() or log.stat().st_size == 0:
                    return _to_read(path, "mode=ro&immutable=1")
                self._copied = tempfile.TemporaryDirectory(prefix="stage1-")
                for file in (path, log):
                    shutil.copyfile(file, Path(self._copied.name) / file.name)
            else:
                return connection
        return _to_read(Path(self._copied.name) / path.name, "mode=rw")

    def _prepare(self, *, read_only: bool) -> None:
        name = str(self.url.database) if self.is_sqlite else f"{self.url!r}"
        with self.read() as connection:
            if schema.is_current(connection, name):
                return
        if read_only:
            raise InputError(
                f"{name} must be of this version to be read only; `stage1 continual run` brings it up where it can "
                "be written"
            )
        # One transaction behind a lock: processes that open a new or an old store at once wait for the first of them,
        # and one that is killed leaves the store as it was.
        with self.write() as connection:
            self.serialise(connection)
            schema.bring_up(connection, name)

    def serialise(self, connection: Connection) -> None:
        """Make this transaction of ``write`` wait for all others that called this; SQLite's do anyhow."""
        if not self.is_sqlite:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction that may write; what it wrote is kept when the block ends, and nothing of it on an error.

        On SQLite it waits for the one writer's lock at its start, so that what it reads is what it decides on.
        """
        with self.engine.connect().execution_options(begin="BEGIN IMMEDIATE") as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection for reading one consistent state."""
        options = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        with self.engine.connect().execution_options(**options) as connection, connection.begin():
            yield connection

    def shrink(self) -> None:
        """Give the space of removed rows back to the disk, where it is a tenth or more; PostgreSQL does so by itself.

        Raises:
            DatabaseError: somebody reads or writes, or the disk has no room for a copy of what is left.
        """
        if self.is_sqlite:
            with self.engine.connect().execution_options(begin="SELECT 1") as connection:
                free, pages = (
                    connection.exec_driver_sql(f"PRAGMA {name}_count").scalar_one() for name in ("freelist", "page")
                )
                if free * 10 >= pages:
                    connection.exec_driver_sql("VACUUM")
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Give back every connection."""
        self.engine.dispose()
        if self._copied is not None:
            self._copied.cleanup()


def _to_read(path: Path, way: str) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{path.as_uri()}?{way}", uri=True, check_same_thread=False)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").close()
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare_sqlite(engine: Engine, *, read_only: bool) -> None:
    @event.listens_for(engine, "connect")
    def connected(connection: Any, _record: Any) -> None:
        # The driver would begin transactions by its own rules; here `begun` does.
        connection.isolation_level = None
        for setting in ("query_only=ON",) if read_only else ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {setting}").close()

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))
