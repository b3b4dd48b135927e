"""The vault of guard labels: it alone reads them, answers one question about a candidate, and counts the looks.

A guard set tells whether a candidate earns more than the champion, and every answer leaks a little of the set. So a
guard epoch has ten looks, each at level 1%; a look is a row that is committed before the labels are read; after the
last one the guard must be refreshed. No label leaves the vault, only the result of a test.

The promise, by the union bound: until an epoch's first promotion every look has answered "no", so no candidate before
it can depend on the labels, and the chance that the first promotion is harmful is at most looks times level. This holds
only if proposals never see anything but the yes/no answer; the figures in ``verdict.json`` are for people.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Column,
    Connection,
    Float,
    ForeignKey,
    Integer,
    Row,
    String,
    Table,
    bindparam,
    func,
    insert,
    select,
    update,
)  # fmt: skip
from sqlalchemy.exc import IntegrityError

from stage1_pro.continual.learn.rewards import PAID, Actions, Verified, verified
from stage1_pro.continual.ledger.schema import append_only, metadata
from stage1_pro.continual.ledger.store import Store
from stage1_pro.errors import InputError, NotReachableError
from stage1_pro.files import sha256_bytes

LOOKS = 10
LEVEL = 0.01
T = TypeVar("T")

_epochs = Table(
    "guards",
    metadata,
    Column("epoch", String(80), primary_key=True),
    Column("looks", Integer, nullable=False),
    Column("level", Float, nullable=False),
    Column("time", Float, nullable=False),
)
_rows = Table(
    "guard_rows",
    metadata,
    Column("epoch", String(80), ForeignKey("guards.epoch"), primary_key=True),
    Column("place", Integer, primary_key=True),
    Column("row_id", String(200), nullable=False, index=True),
    Column("cluster", String(200), nullable=False),
    Column("label", String(200)),
    Column("source", String(20)),
)
_looks = Table(
    "looks",
    metadata,
    Column("epoch", String(80), ForeignKey("guards.epoch"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("asked", String(64), nullable=False),
    Column("candidate", String(80), nullable=False),
    Column("time", Float, nullable=False),
    Column("promoted", Boolean),
    CheckConstraint("number >= 1", name="look_number"),
)
# What a look cost cannot be taken back, and a label is given once, whoever writes to the database.
append_only(_epochs)
append_only(_rows, once=("label", "source"))
append_only(_looks, once=("promoted",))


class LooksSpentError(NotReachableError):
    """Every look of this guard epoch has been taken; only a fresh guard can promote anything."""


@dataclass(frozen=True)
class Look:
    """One look: its number of so many, the level of its test, when it was first taken, promotions before it."""

    epoch: str
    number: int
    of: int
    level: float
    time: float
    earlier_promotions: int


class GuardVault:
    """Guard rows of a store and the looks at them; the only reader of guard labels.

    Args:
        store: where the tables are.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def open(
        self,
        epoch: str,
        row_ids: Sequence[str],
        clusters: Sequence[str],
        *,
        now: float,
        looks: int = LOOKS,
        level: float = LEVEL,
    ) -> None:
        """Begin an epoch with these rows, in this order; labels follow by ``label``.

        Args:
            epoch: its name, a new one.
            row_ids: [N], each once.
            clusters: [N] clip, track or place of every row, the independent unit.
            now: seconds since the epoch of the clock.
            looks: how many candidates may be judged.
            level: of each look's test, inside (0, 1).

        Raises:
            InputError: an epoch of this name, rows twice, or numbers out of range.
        """
        if looks < 1 or not 0 < level < 1:
            raise InputError(f"looks must be 1 or more and level inside (0, 1), got {looks} and {level}")
        if len(row_ids) != len(clusters) or not row_ids:
            raise InputError(f"clusters must be one for each of 1 or more rows, got {len(clusters)} for {len(row_ids)}")
        if len(set(row_ids)) != len(row_ids):
            raise InputError("row_ids must be there once each, got some twice; a guard counts an image once")
        numbered = enumerate(zip(row_ids, clusters, strict=True))
        values = [{"epoch": epoch, "place": at, "row_id": one, "cluster": cluster} for at, (one, cluster) in numbered]
        try:
            with self._store.write() as connection:
                connection.execute(insert(_epochs), {"epoch": epoch, "looks": looks, "level": level, "time": now})
                connection.execute(insert(_rows), values)
        except IntegrityError:
            raise InputError(f"epoch must be a new name, got '{epoch}', which is there; take another") from None

    def label(self, epoch: str, labels: Mapping[str, str], source: str) -> None:
        """Put labels of rows by id; the same again changes nothing.

        Raises:
            InputError: a source that may not judge, a row that is not there, or another label than it has.
        """
        if source not in PAID:
            raise InputError(f"source must be {' or '.join(PAID)} for a guard label, got '{source}'; have it reviewed")
        with self._store.write() as connection:
            self._epoch(connection, epoch)
            of_epoch = select(_rows.c.row_id, _rows.c.label).where(_rows.c.epoch == epoch)
            known: dict[str, str | None] = {row.row_id: row.label for row in connection.execute(of_epoch)}
            for one, label in labels.items():
                if one not in known:
                    raise InputError(f"labels must be of rows of epoch '{epoch}', got '{one}', which it does not hold")
                if known[one] not in (None, label):
                    raise InputError(
                        f"labels must stay as they are, got '{label}' for '{one}', which is '{known[one]}'; a guard "
                        "label that changes after a look is none: open a fresh epoch"
                    )
            fresh = [{"one": one, "given": label} for one, label in labels.items() if known[one] is None]
            if fresh:
                mine = (_rows.c.epoch == epoch, _rows.c.row_id == bindparam("one"), _rows.c.label.is_(None))
                put = update(_rows).where(*mine).values(label=bindparam("given"), source=source)
                connection.execute(put, fresh)

    def row_ids(self, epoch: str) -> list[str]:
        """Ids of an epoch's rows in their order: what must be kept from training, and what to run both models on."""
        with self._store.read() as connection:
            self._epoch(connection, epoch)
            found = connection.execute(select(_rows.c.row_id).where(_rows.c.epoch == epoch).order_by(_rows.c.place))
            return [row.row_id for row in found]

    def unlabelled(self, epoch: str, champion: Actions, candidate: Actions) -> list[str]:
        """Ids of rows that must be labelled before these two can be compared: they differ there. No look is taken."""
        with self._store.read() as connection:
            self._epoch(connection, epoch)
            given = select(_rows.c.row_id, _rows.c.label.is_not(None).label("there"))
            rows = connection.execute(given.where(_rows.c.epoch == epoch).order_by(_rows.c.place)).all()
        for name, one in (("champion", champion), ("candidate", candidate)):
            if (n := one.answers.size) != len(rows):
                raise InputError(f"{name} must have decisions on the {len(rows)} guard rows, got {n}; run all")
        differ = champion.differ(candidate)
        return [row.row_id for row, other in zip(rows, differ, strict=True) if other and not row.there]

    def looks_taken(self, epoch: str) -> int:
        """How many candidates this epoch has judged; rows that judged none may be another epoch's."""
        with self._store.read() as connection:
            self._epoch(connection, epoch)
            counted = select(func.count()).select_from(_looks).where(_looks.c.epoch == epoch)
            return connection.execute(counted).scalar_one()

    def judge(
        self,
        epoch: str,
        champion: Actions,
        candidate: Actions,
        question: Callable[[Look, Verified, NDArray[np.bool_], NDArray[np.str_]], T],
        *,
        terms: str,
        name: str,
        classes: Sequence[str],
        positive: str | None,
        now: float,
    ) -> T:
        """Take a look and answer one question about two cascades' decisions on the rows of an epoch, in their order.

        The look is committed before a label is read. The same decisions again, by a process that was killed and came
        back, are the same look; anything else is another one.

        Args:
            epoch: which guard.
            champion: decisions of what serves now.
            candidate: decisions of what would replace it.
            question: gets the look, the truth of the rows on which the two differ, which rows [N] those are, and all
                rows' clusters [N]; its result is returned, and hands on no label.
            terms: hash of all else that the answer depends on; the same decisions under other terms are another look.
            name: of the candidate, for the record.
            classes: names, in the order of the decisions' indices.
            positive: name of the positive class, if there is one.
            now: seconds since the epoch of the clock.

        Raises:
            LooksSpentError: no look is left.
            InputError: decisions of other rows, or rows that differ and have no label (no look is taken then).
        """
        missing = self.unlabelled(epoch, champion, candidate)
        if missing:
            raise InputError(
                f"guard rows must be labelled where champion and candidate differ, got {len(missing)} without a label, "
                f"such as '{missing[0]}'; have them reviewed (no look was taken)"
            )
        sides = (
            part for one in (champion, candidate) for part in (one.answers.astype("<i8"), one.deferred.astype("u1"))
        )
        words = "\n".join([*classes, positive or "", terms]).encode()
        look = self._take(epoch, sha256_bytes(b"".join([*(side.tobytes() for side in sides), words])), name, now)
        with self._store.read() as connection:
            rows = connection.execute(select(_rows).where(_rows.c.epoch == epoch).order_by(_rows.c.place)).all()
        differ = champion.differ(candidate)
        read = [row for row, other in zip(rows, differ, strict=True) if other]
        names = list(classes)
        unknown = sorted({row.label for row in read} - set(names))
        if unknown:
            raise InputError(f"guard labels must be of {', '.join(names)}, got '{unknown[0]}'; classes have changed")
        indices = [names.index(row.label) for row in read]
        truth = verified(indices, [row.source for row in read], classes=names, positive=positive)
        return question(look, truth, differ, np.asarray([row.cluster for row in rows], dtype=np.str_))

    def close(self, look: Look, *, promoted: bool) -> None:
        """Note what came of a look; the same again changes nothing.

        Raises:
            InputError: something else has come of it.
        """
        mine = (_looks.c.epoch == look.epoch, _looks.c.number == look.number)
        with self._store.write() as connection:
            note = update(_looks).where(*mine, _looks.c.promoted.is_(None)).values(promoted=promoted)
            if not connection.execute(note).rowcount:
                before = connection.execute(select(_looks.c.promoted).where(*mine)).scalar_one_or_none()
                if before != promoted:
                    raise InputError(
                        f"promoted must be what came of look {look.number} of '{look.epoch}', {before}, got "
                        f"{promoted}; the same question has one answer"
                    )

    def _take(self, epoch: str, asked: str, name: str, now: float) -> Look:
        """Commit the next look, or find the one that this very question took."""
        while True:
            try:
                with self._store.write() as connection:
                    of = self._epoch(connection, epoch)
                    of_epoch = select(_looks).where(_looks.c.epoch == epoch).order_by(_looks.c.number)
                    taken = connection.execute(of_epoch).all()
                    (mine,) = [row for row in taken if row.asked == asked] or (None,)
                    number = len(taken) + 1 if mine is None else int(mine.number)
                    if number > of.looks:
                        raise LooksSpentError(
                            f"looks must be at most {of.looks} in guard epoch '{epoch}', and all are taken; open a "
                            "fresh epoch on new rows: this one can promote nothing more"
                        )
                    if mine is None:
                        values = {"epoch": epoch, "number": number, "asked": asked, "candidate": name, "time": now}
                        connection.execute(insert(_looks), values)
                    time = now if mine is None else float(mine.time)
                    before = sum(bool(row.promoted) for row in taken if row.number < number)
                    return Look(epoch, number, int(of.looks), float(of.level), time, before)
            except IntegrityError:
                continue  # Another process took this number between our reading and writing (PostgreSQL).

    def _epoch(self, connection: Connection, epoch: str) -> Row[tuple[str, int, float, float]]:
        found = connection.execute(select(_epochs).where(_epochs.c.epoch == epoch)).one_or_none()
        if found is None:
            raise InputError(f"epoch must be one of this store, got '{epoch}', which is not there; open it first")
        return found
