"""Alerts to people: written in the transaction that they tell of, sent afterwards, and noted as sent.

None tells of a transaction that was undone. A process killed between a delivery and its note sends the alert again.
Later looks retry failed deliveries until an alert is a day old.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

from pydantic import Field, model_validator
from sqlalchemy import Column, Connection, Double, Integer, String, Table, Text, func, select

from stage1_pro.continual.ledger.labels import insert
from stage1_pro.continual.ledger.schema import append_only, metadata
from stage1_pro.continual.ledger.store import Store
from stage1_pro.continual.watch.alerts import Alert, Delivery, Hook, Program, Webhook
from stage1_pro.errors import InputError
from stage1_pro.record import Record

# What a hook did not take for so long is old news.
OLDEST = 86400.0

_alerts = Table(
    "alerts",
    metadata,
    Column("seq", Integer, nullable=False),
    Column("key", String(120), primary_key=True),
    Column("body", Text, nullable=False),
    Column("time", Double, nullable=False),
)
_sent = Table(
    "alerts_sent",
    metadata,
    Column("key", String(120), primary_key=True),
    Column("hook", String(64), primary_key=True),
    Column("time", Double, nullable=False),
)
append_only(_alerts, ignores=True)
append_only(_sent, ignores=True)


class AlertsConfig(Record):
    """Who is told; part of ``loop.json``, which is for its owner's eyes where there is a secret in a URL."""

    webhooks: tuple[str, ...] = Field((), description="http(s) URLs that get each alert as JSON by POST")
    commands: tuple[tuple[str, ...], ...] = Field(
        (), description="programs with their arguments that get it on standard input; no shell"
    )

    @model_validator(mode="after")
    def _usable(self) -> Self:
        try:
            _ = self.hooks
        except InputError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def hooks(self) -> tuple[Hook, ...]:
        """Webhooks, then commands."""
        return (*(Webhook(url) for url in self.webhooks), *(Program(words) for words in self.commands))


def post(connection: Connection, store: Store, alerts: Mapping[str, Alert]) -> None:
    """Write alerts down within a transaction of ``store.write()``, by what happened; what is there already stays."""
    if not alerts:
        return
    store.serialise(connection)
    last = connection.execute(select(func.max(_alerts.c.seq))).scalar() or 0
    rows = [
        {"seq": seq, "key": key, "body": alert.model_dump_json(), "time": alert.time}
        for seq, (key, alert) in enumerate(alerts.items(), last + 1)
    ]
    connection.execute(insert(store, _alerts).on_conflict_do_nothing(), rows)


def unknown(store: Store, alerts: Mapping[str, Alert]) -> dict[str, Alert]:
    """Those that nobody has written down yet."""
    if not alerts:
        return {}
    with store.read() as connection:
        known = set(connection.execute(select(_alerts.c.key).where(_alerts.c.key.in_(list(alerts)))).scalars())
    return {key: alert for key, alert in alerts.items() if key not in known}


def deliver(store: Store, hooks: Sequence[Hook], *, now: float) -> list[Delivery]:
    """Send every hook what it has not got yet, the oldest first; what became of it.

    A hook that fails gets no more of them this time, so that it gets them in their order. Call it from one process.

    Args:
        store: where alerts are written down.
        hooks: who is told.
        now: seconds since the epoch; alerts of more than ``OLDEST`` before are left.
    """
    with store.read() as connection:
        query = select(_alerts).where(_alerts.c.time >= now - OLDEST).order_by(_alerts.c.seq)
        alerts = [(row.key, Alert.parse(row.body, f"alert {row.key}")) for row in connection.execute(query)]
        done = {(row.key, row.hook) for row in connection.execute(select(_sent).where(_sent.c.time >= now - OLDEST))}
    found = []
    for hook in hooks:
        for key, alert in alerts:
            if (key, hook.fingerprint) in done:
                continue
            delivery = hook.send(alert)
            found.append(delivery)
            if not delivery.delivered:
                break
            row = {"key": key, "hook": hook.fingerprint, "time": now}
            with store.write() as connection:
                connection.execute(insert(store, _sent).on_conflict_do_nothing(), [row])
    return found
