"""Which bundle serves: bundles under their hash, aliases in the database, ``champion.json`` for those who serve.

The database is the truth. ``champion.json`` is written from it under a lock, so that the last file holds the last
state in whatever order writers come. Serving reads that file alone (``live``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from sqlalchemy import Column, Connection, Double, Integer, String, Table, Text, func, select

from stage1_pro.continual.ledger.labels import insert
from stage1_pro.continual.ledger.schema import append_only, metadata
from stage1_pro.continual.ledger.store import Store
from stage1_pro.continual.serving.live import BUNDLES, POINTER, Pointer, load_content
from stage1_pro.deploy.bundle import MANIFEST, SIGNATURE, Bundle, load_bundle, read_plain
from stage1_pro.errors import InputError, NotReachableError
from stage1_pro.files import atomic_directory, locked, sha256_bytes, write_bytes
from stage1_pro.record import Record

AliasName = Literal["champion", "shadow", "canary"]

_aliases = Table(
    "aliases",
    metadata,
    Column("name", String(10), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("bundle", String(64)),
    Column("parent", Integer),
    Column("share", Double),
    Column("time", Double, nullable=False),
    Column("by", Text, nullable=False),
)
_thresholds = Table(
    "thresholds",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("bundle", String(64), nullable=False),
    Column("threshold", Double, nullable=False),
    Column("time", Double, nullable=False),
)
_audit_rates = Table(
    "audit_rates",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("rate", Double),
    Column("time", Double, nullable=False),
)
append_only(_aliases, ignores=True)
append_only(_thresholds)
append_only(_audit_rates)


class LostRaceError(NotReachableError):
    """Another process moved the alias meanwhile; nothing was changed."""


class Alias(Record):
    """Where an alias points; version 0 was never set."""

    name: AliasName
    version: int = Field(ge=0)
    bundle: str | None
    parent: int | None = Field(None, description="version that a rollback goes back to")
    share: float | None = Field(None, description="of images, for canary")
    time: float = 0.0
    by: str = ""


class Registry:
    """Bundles and ``champion.json`` in a folder, aliases in a store."""

    def __init__(self, root: Path | str, store: Store) -> None:
        self.root, self.store = Path(root), store
        (self.root / BUNDLES).mkdir(parents=True, exist_ok=True)

    # ---------------------------------------------------------------------------- bundles

    def add(self, folder: Path | str) -> str:
        """Take in a bundle, verified before and after it is copied; give the sha256 of its ``bundle.json``.

        A bundle that is there stays as it is: equal hashes are equal files.

        Raises:
            ArtifactError: it is damaged, or the one that is there is.
        """
        source = load_bundle(folder)
        name = sha256_bytes(source.raw)
        target = self.root / BUNDLES / name
        with locked(self.root / ".lock"):
            if not target.is_dir():
                with atomic_directory(target) as staging:
                    source.copy_to(staging, source.manifest.files)
                    write_bytes(staging / MANIFEST, source.raw)
                    if (source.path / SIGNATURE).exists():
                        write_bytes(staging / SIGNATURE, read_plain(source.path, SIGNATURE))
                    load_bundle(staging, verify=False)  # the copies were checked
        self.load(name)
        return name

    def path(self, sha256: str) -> Path:
        """The folder of a bundle, there or not."""
        return self.root / BUNDLES / sha256

    def load(self, sha256: str) -> Bundle:
        """A bundle by its hash, verified.

        Raises:
            InputError: no such bundle.
            ArtifactError: it is damaged, or another one.
        """
        return load_content(self.root, sha256)

    def bundles(self) -> list[str]:
        """Hashes of all that are there."""
        return sorted(path.name for path in (self.root / BUNDLES).iterdir() if not path.name.startswith("."))

    # ---------------------------------------------------------------------------- aliases

    def alias(self, name: AliasName, connection: Connection | None = None) -> Alias:
        """Where an alias points now, or within a transaction."""
        if connection is None:
            with self.store.read() as opened:
                return self.alias(name, opened)
        query = select(_aliases).where(_aliases.c.name == name).order_by(_aliases.c.version.desc()).limit(1)
        row = connection.execute(query).mappings().first()
        return Alias(name=name, version=0, bundle=None) if row is None else Alias(**row)

    def history(self, name: AliasName) -> list[Alias]:
        """Everything that an alias pointed at, the first one first."""
        with self.store.read() as connection:
            query = select(_aliases).where(_aliases.c.name == name).order_by(_aliases.c.version)
            return [Alias(**row) for row in connection.execute(query).mappings()]

    def move(
        self,
        connection: Connection,
        name: AliasName,
        bundle: str | None,
        *,
        expected: int,
        now: float,
        by: str,
        share: float | None = None,
        parent: int | None = None,
    ) -> Alias:
        """Point an alias elsewhere within a transaction of the store, if it is still at version ``expected``.

        Compare-and-swap: of several writers that expect one version, one adds the next, at any isolation level.
        Call ``sync`` when the transaction is over. ``parent`` is the version that a rollback goes back to, ``expected``
        by default; ``share`` is the canary's, of images.

        Raises:
            InputError: no such bundle in the registry.
            LostRaceError: the alias is at another version; leave the transaction, so that nothing of it stays.
        """
        if bundle is not None and not (self.path(bundle) / MANIFEST).is_file():
            raise InputError(f"bundle must be one of the registry, got {bundle[:12]}; add it first")
        row = {
            "name": name, "version": expected + 1, "bundle": bundle, "share": share, "time": now, "by": by,
            "parent": parent if parent is not None else expected or None,
        }  # fmt: skip
        current = self.alias(name, connection).version
        statement = insert(self.store, _aliases).on_conflict_do_nothing().returning(_aliases.c.version)
        if current != expected or not connection.execute(statement, [row]).all():
            raise LostRaceError(
                f"{name} must still be at version {expected}, got {max(current, expected + 1)}: somebody else moved it "
                "meanwhile; look again"
            )
        return Alias(**row)

    def rollback(self, connection: Connection, *, now: float, by: str, to: str | None = None) -> Alias:
        """Point champion back within a transaction: at what it was before, or at an earlier one named ``to``.

        Rolling back twice goes back two steps. Those who serve follow after ``sync``.

        Raises:
            InputError: there was none before, or ``to`` never was champion.
        """
        current = self.alias("champion", connection)
        query = select(_aliases).where(_aliases.c.name == "champion", _aliases.c.version < current.version)
        if to is None:
            query = query.where(_aliases.c.version == (current.parent or 0))
        else:
            query = query.where(_aliases.c.bundle == to)
        row = connection.execute(query.order_by(_aliases.c.version.desc()).limit(1)).mappings().first()
        if row is None or row["bundle"] is None:
            raise InputError(
                f"champion must have been {'something' if to is None else to[:12]} before, got version "
                f"{current.version} without one; `stage1 continual status` shows the history"
            )
        # The first one has no parent of its own; 0 is before it.
        return self.move(
            connection, "champion", row["bundle"], expected=current.version, now=now, by=by, parent=row["parent"] or 0
        )

    def tighten(self, connection: Connection, bundle: str, threshold: float, *, now: float) -> None:
        """Have a bundle exit at this threshold while it is above its policy's own, from the next ``sync`` on."""
        self._append(connection, _thresholds, {"bundle": bundle, "threshold": threshold, "time": now})

    def audit_at(self, connection: Connection, rate: float | None, *, now: float) -> None:
        """Have every served event reviewed with at least this chance, from the next ``sync`` on; None: as planned.

        It holds for every bundle: photos changed, no bundle did.
        """
        self._append(connection, _audit_rates, {"rate": rate, "time": now})

    def pointer(self) -> Pointer:
        """What ``champion.json`` should say.

        Raises:
            InputError: there is no champion yet.
        """
        with self.store.read() as connection:
            return self._pointer(connection)

    def sync(self) -> Pointer:
        """Write ``champion.json`` as the database says; after every transaction that moved anything, and on a start.

        Raises:
            InputError: there is no champion yet.
        """
        with locked(self.root / ".lock"):
            pointer = self.pointer()
            data = (pointer.model_dump_json(indent=2) + "\n").encode()
            path = self.root / POINTER
            if not path.is_file() or path.read_bytes() != data:
                write_bytes(path, data)
        return pointer

    def _pointer(self, connection: Connection) -> Pointer:
        champion, shadow, canary = (self.alias(name, connection) for name in ("champion", "shadow", "canary"))
        if champion.bundle is None:
            raise InputError("champion must be set, got none; `stage1 continual init --bundle` sets the first")
        before = select(_aliases.c.bundle).where(
            _aliases.c.name == "champion", _aliases.c.version == (champion.parent or 0)
        )
        mine = select(_thresholds.c.threshold).where(_thresholds.c.bundle == champion.bundle)
        rates = select(_audit_rates.c.rate).order_by(_audit_rates.c.version.desc())
        changes = _newest(connection, _thresholds) + _newest(connection, _audit_rates)
        return Pointer(
            serial=champion.version + shadow.version + canary.version + changes,
            champion=champion.bundle,
            version=champion.version,
            previous=connection.execute(before).scalar(),
            threshold=connection.execute(mine.order_by(_thresholds.c.version.desc()).limit(1)).scalar(),
            audit_rate=connection.execute(rates.limit(1)).scalar(),
            shadow=shadow.bundle,
            canary=canary.bundle,
            canary_share=canary.share or 0.0,
        )

    def _append(self, connection: Connection, table: Table, values: Mapping[str, Any]) -> None:
        self.store.serialise(connection)
        connection.execute(table.insert(), {"version": _newest(connection, table) + 1, **values})


def _newest(connection: Connection, table: Table) -> int:
    """The last version in a table; 0 in an empty one."""
    return connection.execute(select(func.max(table.c.version))).scalar() or 0
