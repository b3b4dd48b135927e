"""The tables of a store, the triggers that keep their rows, and the version that says which code they are of.

A new store gets every table as it is declared now, and the newest version. A store of an older version is migrated by
alembic (``migrations/``) within the transaction that opens it; one without a version counts as the first. A table is
created when a store is opened by a process that declares it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import DDL, Column, Connection, MetaData, String, Table, event, text
from sqlalchemy.exc import DatabaseError

from stage1_pro.errors import ArtifactError, need

# Every module of the package declares its tables here.
metadata = MetaData()
# The newest revision in ``migrations/versions``.
HEAD = "0002"
MIGRATIONS = Path(__file__).parent / "migrations"
# Alembic's own layout, under a name that no other program's alembic uses in the same database.
VERSION = Table("schema_version", metadata, Column("version_num", String(32), primary_key=True))

_CATALOGUE = {
    "sqlite": "SELECT m.name, c.name FROM sqlite_master m JOIN pragma_table_info(m.name) c WHERE m.type = 'table'",
    "postgresql": "SELECT table_name, column_name FROM information_schema.columns"
    " WHERE table_schema = current_schema()",
}
_TRIGGERS = {
    "sqlite": "SELECT name FROM sqlite_master WHERE type = 'trigger'",
    "postgresql": "SELECT tgname FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid"
    " WHERE c.relnamespace = current_schema()::regnamespace AND NOT t.tgisinternal",
}


def append_only(table: Table, *, ignores: bool = False, once: Collection[str] = ()) -> None:
    """Have the database refuse to change or remove rows of a table; call it where the table is declared.

    Args:
        table: of ``metadata``; guarded from its creation on.
        ignores: set it for tables filled by INSERT ... ON CONFLICT DO NOTHING. SQLite then cannot block INSERT OR
            REPLACE, which deletes without firing delete triggers.
        once: columns that may be null at first and are given a value once.
    """
    name, message = table.name, f"{table.name} is append-only: add a row that supersedes instead"
    if once:
        message = f"{table.name} is append-only: {' and '.join(sorted(once))} can be given once, nothing else changes"

    def same(equal: str) -> str:
        kept = [f"NEW.{one.name} {equal} OLD.{one.name}" for one in table.columns if one.name not in once]
        return " AND ".join([*kept, *(f"(OLD.{one} IS NULL OR NEW.{one} {equal} OLD.{one})" for one in sorted(once))])

    abort = f"BEGIN SELECT RAISE(ABORT, '{message}'); END"
    changes = f"WHEN NOT ({same('IS')}) " if once else ""
    sqlite = {
        f"{name}_no_update": f"BEFORE UPDATE ON {name} {changes}{abort}",
        f"{name}_no_delete": f"BEFORE DELETE ON {name} {abort}",
    }
    if not ignores:
        key = " AND ".join(f"{column.name} = NEW.{column.name}" for column in table.primary_key)
        taken = " OR ".join([f"({key})", *(f"{one.name} = NEW.{one.name}" for one in table.columns if one.unique)])
        there = f"EXISTS (SELECT 1 FROM {name} WHERE {taken})"  # noqa: S608 (names of a declaration)
        sqlite[f"{name}_no_replace"] = f"BEFORE INSERT ON {name} WHEN {there} {abort}"
    refuse = f"{name}_append_only()"
    body = f"RETURNS trigger AS $$ BEGIN RAISE EXCEPTION '{message}'; END $$ LANGUAGE plpgsql"
    changes = f"WHEN (NOT ({same('IS NOT DISTINCT FROM')})) " if once else ""
    postgresql = {
        f"{name}_no_{moment.lower()}": f"BEFORE {moment} ON {name} FOR EACH {unit} {when}EXECUTE FUNCTION {refuse}"
        for moment, unit, when in (("UPDATE", "ROW", changes), ("DELETE", "ROW", ""), ("TRUNCATE", "STATEMENT", ""))
    }
    # Before its triggers what they call, of each kind of database.
    table.info["guards"] = {
        "sqlite": ([], sqlite),
        "postgresql": ([f"CREATE OR REPLACE FUNCTION {refuse} {body}"], postgresql),
    }

    def guard(_: Table, connection: Connection, **__: Any) -> None:
        _guard(connection, table, set())

    event.listen(table, "after_create", guard)


def _guard(connection: Connection, table: Table, there: Collection[str]) -> None:
    """Create the triggers of a table that are not there."""
    functions, triggers = table.info.get("guards", {}).get(connection.dialect.name, ([], {}))
    missing = [f"CREATE TRIGGER {name} {rule}" for name, rule in triggers.items() if name not in there]
    for statement in [*functions, *missing] if missing else []:
        connection.execute(DDL(statement.replace("%", "%%")))  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def removable(connection: Connection, table: Table) -> Iterator[None]:
    """Let rows of an append-only table be removed within a transaction, which nobody else sees before its end."""
    name = f"{table.name}_no_delete"
    there = set(connection.execute(text(_TRIGGERS[connection.dialect.name])).scalars()) - {name}
    on = f" ON {table.name}" if connection.dialect.name == "postgresql" else ""
    connection.execute(DDL(f"DROP TRIGGER {name}{on}"))  # type: ignore[no-untyped-call]
    yield
    _guard(connection, table, there)


# -------------------------------------------------------------------------------- versions


def _read(connection: Connection, name: str) -> tuple[dict[str, set[str]], str | None]:
    """What a database holds: columns by table, and its version, if one was written; it must be known to this code."""
    columns: dict[str, set[str]] = {}
    for table, column in connection.execute(text(_CATALOGUE[connection.dialect.name])):
        columns.setdefault(table, set()).add(column)
    version = connection.execute(VERSION.select()).scalar() if VERSION.name in columns else None
    known = {path.stem.split("_")[0] for path in (MIGRATIONS / "versions").glob("[0-9]*.py")}
    if version is not None and version not in known:
        raise ArtifactError(
            f"{name} must be a store of schema version {HEAD} or older, got version {version}; open it with the newer "
            "stage1_pro that made it, or update this one"
        )
    return columns, version


def _check_columns(columns: Mapping[str, set[str]], name: str) -> None:
    """Refuse a store that lacks a column which code would ask for."""
    for table in metadata.tables.values():
        lacking = [one.name for one in table.columns if one.name not in columns.get(table.name, ())]
        if lacking and table.name in columns and table is not VERSION:
            raise _unusable(name, f"table {table.name} has no column {lacking[0]}")


def is_current(connection: Connection, name: str) -> bool:
    """Whether a store is of the newest version and has every table that this process declares; nothing is written.

    Args:
        connection: to read by.
        name: of the store, for messages.

    Raises:
        ArtifactError: a version that this code does not know, or a table that lacks a column.
    """
    columns, version = _read(connection, name)
    if version != HEAD or any(table not in columns for table in metadata.tables):
        return False
    _check_columns(columns, name)
    return True


def bring_up(connection: Connection, name: str) -> None:
    """Make a store one of the newest version, within a transaction that no other process shares; idempotent.

    Args:
        connection: to write by; the transaction is the caller's.
        name: of the store, for messages.

    Raises:
        ArtifactError: a version that this code does not know, a migration that failed, or a table that lacks a column.
        DependencyError: the store is older, and alembic is not installed.
    """
    columns, version = _read(connection, name)
    new = version is None and not any(table in columns for table in metadata.tables if table != VERSION.name)
    if not new and version != HEAD:
        _migrate(connection, name)
    try:
        metadata.create_all(connection)
        if new:
            connection.execute(VERSION.insert(), {"version_num": HEAD})
        else:
            _complete(connection)
    except DatabaseError as error:
        raise _unusable(name, error) from None
    _check_columns(_read(connection, name)[0], name)


def _migrate(connection: Connection, name: str) -> None:
    """Run alembic's revisions from the store's version to ``HEAD``."""
    try:
        from alembic import command
        from alembic.config import Config
    except ModuleNotFoundError as error:
        raise need("continual", error.name or "alembic") from error
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, HEAD)
    except DatabaseError as error:
        raise _unusable(name, error) from None


def _complete(connection: Connection) -> None:
    """Add the triggers and indexes that a store begun before they were declared lacks."""
    there = set(connection.execute(text(_TRIGGERS[connection.dialect.name])).scalars())
    for table in metadata.tables.values():
        _guard(connection, table, there)
        for index in table.indexes:
            index.create(connection, checkfirst=True)


def _unusable(name: str, problem: str | DatabaseError) -> ArtifactError:
    said = problem if isinstance(problem, str) else str(problem.orig).splitlines()[0]
    return ArtifactError(
        f"{name} must be a store as stage1_pro made it, got one that was changed: {said}; restore it from a copy, "
        "or begin a new loop with `stage1 continual init`"
    )
