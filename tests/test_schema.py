"""Stores have a schema version: an older store is migrated once, others are named in one line; on both databases."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text
from sqlalchemy.exc import DatabaseError

# Every module that declares tables.
from stage1_pro.continual.ledger import audit, guard, review, schema
from stage1_pro.continual.ledger.labels import Label, add_labels, events, labels, read_events, resolve
from stage1_pro.continual.ledger.store import Store
from stage1_pro.continual.loop import history, machine, registry
from stage1_pro.continual.watch import outbox
from stage1_pro.errors import ArtifactError, InputError

DATA = Path(__file__).parent / "data"
_DECLARED = (audit, guard, review, history, machine, registry, outbox)


def run_sql(url: str, *statements: str) -> None:
    """Run statements without opening a store; ``%`` stays as it is."""
    if "://" not in url:
        with sqlite3.connect(url) as connection:
            for one in statements:
                connection.executescript(one)
        connection.close()
        return
    import psycopg

    with psycopg.connect(url.replace("postgresql+psycopg", "postgresql"), autocommit=True) as connection:
        for one in statements:
            connection.execute(one)  # type: ignore[call-overload]


def scalars(url: str, query: str) -> list[object]:
    """The first column of a query, without opening a store."""
    if "://" not in url:
        connection = sqlite3.connect(url)
        found = [row[0] for row in connection.execute(query)]
        connection.close()
        return found
    import psycopg

    with psycopg.connect(url.replace("postgresql+psycopg", "postgresql")) as connection:
        return [row[0] for row in connection.execute(query)]  # type: ignore[call-overload]


@pytest.fixture
def old_url(store_url: str) -> str:
    """A store of commit 9031a61, which wrote no version: three events, labels, an undo, a guard, an audit of two."""
    dialect = "postgresql" if "://" in store_url else "sqlite"
    run_sql(store_url, (DATA / f"store_9031a61.{dialect}.sql").read_text())
    return store_url


def tables(url: str) -> set[object]:
    """Names of what is there."""
    if "://" not in url:
        return set(scalars(url, "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"))
    return set(scalars(url, "SELECT table_name FROM information_schema.tables WHERE table_schema = current_schema()"))


def triggers(url: str) -> list[object]:
    """Names of the triggers that are there, in order."""
    return sorted(scalars(url, schema._TRIGGERS["postgresql" if "://" in url else "sqlite"]), key=str)


def guards_since(url: str) -> list[object]:
    """Triggers of tables that came after the old store."""
    guards = schema.metadata.tables["label_records"].info["guards"]
    return list(guards["postgresql" if "://" in url else "sqlite"][1])


class TestVersions:
    def test_a_new_store_has_the_newest_version_and_every_table(self, store_url: str) -> None:
        Store(store_url).close()
        assert scalars(store_url, "SELECT version_num FROM schema_version") == [schema.HEAD]
        assert tables(store_url) == set(schema.metadata.tables)

    def test_the_named_version_is_the_newest_revision(self) -> None:
        config = Config()
        config.set_main_option("script_location", str(schema.MIGRATIONS))
        assert ScriptDirectory.from_config(config).get_heads() == [schema.HEAD]

    def test_an_old_store_opens_with_all_that_it_held(self, old_url: str) -> None:
        before = triggers(old_url)
        store = Store(old_url)
        assert scalars(old_url, "SELECT version_num FROM schema_version") == [schema.HEAD]
        assert [one.id for one in read_events(store)] == ["e0", "e1", "e2"]
        assert [one.sketch[0] for one in read_events(store)] == [0.0, 0.5, 1.0]
        assert {name: one.label for name, one in resolve(store).items()} == {"e1": "none"}
        assert audit.verify(store).ok
        assert audit.verify(store).rows == 2
        assert guard.GuardVault(store).row_ids("round-1") == ["r0", "r1"]
        assert triggers(old_url) == sorted({*before, *guards_since(old_url)}, key=str)
        add_labels(store, [Label(event_id="e2", label="works", source="owner", annotator="bob", time=9.0)])
        with store.write() as connection:
            audit.append(connection, store, "more", {}, 9.0)
        assert audit.verify(store).rows == 3
        store.close()

    @pytest.mark.parametrize("table", ["events", "labels", "audit", "aliases", "guard_rows", "guards", "alerts"])
    def test_rows_of_an_old_store_stay_immutable(self, old_url: str, table: str) -> None:
        store = Store(old_url)
        column = {"guards": "epoch", "guard_rows": "row_id", "alerts": "body", "aliases": "bundle"}.get(table, "time")
        value = "7" if column == "time" else "'other'"
        for statement in (f"UPDATE {table} SET {column} = {value}", f"DELETE FROM {table}"):
            with pytest.raises(DatabaseError, match="append-only"), store.write() as connection:
                connection.exec_driver_sql(statement)
        store.close()

    def test_a_store_from_before_triggers_gets_them(self, old_url: str) -> None:
        """Stores were once begun without some triggers and indexes."""
        on = " ON labels" if "://" in old_url else ""
        whole = triggers(old_url)
        run_sql(old_url, f"DROP TRIGGER labels_no_update{on};", "DROP INDEX events_to_review;")
        store = Store(old_url)
        assert triggers(old_url) == sorted({*whole, *guards_since(old_url)}, key=str)
        with pytest.raises(DatabaseError, match="append-only"), store.write() as connection:
            connection.execute(labels.update().values(time=7.0))
        with store.read() as connection:
            assert "events_to_review" in [one["name"] for one in _indexes(connection)]
        store.close()

    def test_opening_again_writes_nothing(self, old_url: str) -> None:
        Store(old_url).close()
        store = Store(old_url)
        with store.read() as connection:
            assert schema.is_current(connection, "it")
        store.close()

    def test_what_is_declared_is_what_an_old_store_becomes(self, old_url: str) -> None:
        """Changing a declaration without a revision fails here."""
        store = Store(old_url)
        with store.read() as connection:
            context = MigrationContext.configure(connection, opts={"version_table": schema.VERSION.name})
            assert compare_metadata(context, schema.metadata) == []
        store.close()


class TestRefused:
    @pytest.mark.parametrize("versioned", [False, True])
    def test_a_table_without_a_column_is_named_and_nothing_changes(self, old_url: str, versioned: bool) -> None:
        if versioned:
            Store(old_url).close()
        on = " ON events" if "://" in old_url else ""
        names = [one for one in triggers(old_url) if str(one).startswith("events")]
        run_sql(old_url, *(f"DROP TRIGGER {one}{on};" for one in names), "ALTER TABLE events DROP COLUMN sketch;")
        before = tables(old_url)
        with pytest.raises(ArtifactError, match="events has no column sketch") as caught:
            Store(old_url)
        assert "\n" not in str(caught.value)
        assert tables(old_url) == before
        assert ("schema_version" in before) == versioned

    def test_a_newer_version_is_named(self, store_url: str) -> None:
        Store(store_url).close()
        run_sql(store_url, "UPDATE schema_version SET version_num = '0999';")
        with pytest.raises(ArtifactError, match="got version 0999"):
            Store(store_url)
        assert scalars(store_url, "SELECT version_num FROM schema_version") == ["0999"]

    def test_a_file_that_is_no_database_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "loop.db").write_bytes(b"no database" * 100)
        with pytest.raises(InputError, match=r"loop\.db"):
            Store(tmp_path)


class TestInterrupted:
    def test_processes_that_open_an_old_store_at_once(self, old_url: str) -> None:
        processes = [_open_in_process(old_url) for _ in range(3)]
        assert [process.wait(120) for process in processes] == [0] * 3
        assert scalars(old_url, "SELECT version_num FROM schema_version") == [schema.HEAD]

    @pytest.mark.parametrize("moment", ["_migrate", "_complete"])
    def test_a_killed_migration_leaves_the_old_store(self, old_url: str, moment: str) -> None:
        before = tables(old_url)
        killed = (
            f"import os, signal\ndone = schema.{moment}\n"
            f"def kill(*given):\n    done(*given)\n    os.kill(os.getpid(), signal.SIGKILL)\nschema.{moment} = kill\n"
        )
        assert _open_in_process(old_url, killed).wait(120) == -9
        assert tables(old_url) == before
        store = Store(old_url)
        assert len(list(read_events(store))) == 3
        store.close()


REVISION = """
import sqlalchemy as sa
from alembic import op

revision, down_revision = "0003", "0002"


def upgrade() -> None:
    op.add_column("events", sa.Column("camera", sa.Text()))
    op.execute("{more}")
"""


@pytest.fixture
def next_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the package know a second revision, which adds a column and runs one more statement."""

    def add(more: str) -> None:
        folder = tmp_path / "migrations"
        shutil.copytree(schema.MIGRATIONS, folder)
        (folder / "versions" / "0003_camera.py").write_text(REVISION.format(more=more))
        monkeypatch.setattr(schema, "MIGRATIONS", folder)
        monkeypatch.setattr(schema, "HEAD", "0003")

    return add


class TestNextVersion:
    @pytest.mark.parametrize("versioned", [False, True])
    def test_a_later_revision_is_applied_once(
        self, old_url: str, next_version: Callable[[str], None], versioned: bool
    ) -> None:
        if versioned:
            Store(old_url).close()
        next_version("SELECT 1")
        for _ in range(2):
            store = Store(old_url)
            with store.read() as connection:
                assert connection.execute(text("SELECT camera FROM events")).scalars().all() == [None] * 3
            with pytest.raises(DatabaseError, match="append-only"), store.write() as connection:
                connection.execute(events.update().values(time=7.0))
            store.close()
        assert scalars(old_url, "SELECT version_num FROM schema_version") == ["0003"]

    def test_a_revision_that_fails_changes_nothing(self, old_url: str, next_version: Callable[[str], None]) -> None:
        Store(old_url).close()
        next_version("INSERT INTO nowhere VALUES (1)")
        with pytest.raises(ArtifactError, match="nowhere"):
            Store(old_url)
        assert scalars(old_url, "SELECT version_num FROM schema_version") == ["0002"]
        with pytest.raises((sqlite3.Error, Exception), match="camera"):
            scalars(old_url, "SELECT camera FROM events")


def _open_in_process(url: str, before: str = "") -> subprocess.Popen[bytes]:
    code = (
        "import sys\nfrom stage1_pro.continual.ledger import audit, guard, review, schema\n"
        "from stage1_pro.continual.loop import machine\nfrom stage1_pro.continual.ledger.store import Store\n"
        f"{before}Store(sys.argv[1]).close()\n"
    )
    return subprocess.Popen([sys.executable, "-c", code, url])


def _indexes(connection: object) -> list[dict[str, object]]:
    from sqlalchemy import inspect

    return inspect(connection).get_indexes("events")  # type: ignore[no-any-return, attr-defined]
