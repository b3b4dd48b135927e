"""What was served and which labels hold, read once: whatever looks at the loop at one moment shares it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from sqlalchemy import select

from stage1_pro.continual.ledger.labels import GUARD_SOURCES, Resolved, events, read_bundles, resolve
from stage1_pro.continual.ledger.store import Store
from stage1_pro.continual.serving.events import Action, BundleFacts
from stage1_pro.errors import InputError


class ServedRow(NamedTuple):
    """A served decision as ``Event`` has it, without what looks do not need: its sketch above all."""

    id: str
    time: float
    bundle: str
    image_sha256: str
    action: Action
    label: str
    prob_a: float | None
    exit_score: float | None
    propensity: float
    selected: bool


@dataclass(frozen=True)
class History:
    """Everything served before a moment by time and id, and the labels known by then that may guard a promotion."""

    served: Sequence[ServedRow]
    held: Mapping[str, Resolved]
    bundles: Mapping[str, BundleFacts]

    @classmethod
    def read(cls, store: Store, until: float = math.inf) -> Self:
        """One pass over the events, one over the labels."""
        query = select(*(events.c[name] for name in ServedRow._fields)).order_by(events.c.time, events.c.id)
        if until < math.inf:
            query = query.where(events.c.time < until)
        with store.read() as connection:
            rows = connection.execute(query, execution_options={"yield_per": 5000})
            # Each of the few bundles' hashes is one string in memory.
            served = [ServedRow._make((*row[:2], sys.intern(row[2]), *row[3:])) for row in rows]
        return cls(served, resolve(store, sources=GUARD_SOURCES, until=until), read_bundles(store))

    def of(self, bundle: str, since: float = -math.inf) -> list[ServedRow]:
        """What one bundle served from a time on."""
        return [one for one in self.served if one.bundle == bundle and one.time >= since]

    def classes(self, bundle: str) -> tuple[str, ...]:
        """Classes of a bundle that served; none before its first event."""
        facts = self.bundles.get(bundle)
        return () if facts is None else facts.classes

    def errors_of_a(self, served: Iterable[ServedRow]) -> dict[str, bool]:
        """Whether Stage A's own answer is wrong, by event, of what was selected for review and has a label.

        Labels of events that were not selected are left out: their chance of being labelled is not their propensity.
        Where Stage B answered, P(positive) of Stage A decides, ties as argmax breaks them.

        Raises:
            InputError: a deferred event of a bundle with more than two classes.
        """
        known = (one for one in served if one.selected and one.id in self.held)
        return {one.id: self._answer_of_a(one) != self.held[one.id].label for one in known}

    def _answer_of_a(self, one: ServedRow) -> str:
        """What Stage A alone would answer; empty where it gave no number."""
        if one.action == "exit":
            return one.label
        classes = self.classes(one.bundle)
        if len(classes) != 2:
            got = f"{len(classes)} classes" if classes else "nothing"
            raise InputError(f"bundle {one.bundle[:12]} must be known to have two classes, got {got}; ingest its log")
        if one.prob_a is None:
            return ""
        positive = classes.index(self.bundles[one.bundle].positive)
        # At one half argmax takes the first class.
        first = one.prob_a >= 0.5 if positive == 0 else one.prob_a <= 0.5
        return classes[0 if first else 1]
