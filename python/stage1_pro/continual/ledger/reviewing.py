"""review: a local page on which a person answers the review queue by key."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from stage1_pro.continual.ledger.labels import disagreement, ingest
from stage1_pro.continual.ledger.page import Page, Request, serve
from stage1_pro.continual.ledger.review import LEASE_SECONDS, LeaseLostError, ReviewQueue
from stage1_pro.continual.ledger.store import Store
from stage1_pro.continual.serving.events import EventLog, Purged
from stage1_pro.errors import InputError
from stage1_pro.files import user_name
from stage1_pro.progress import say


class ReviewServer(Page):
    """The page of the review queue, for one reviewer.

    Args:
        queue: what to review.
        reviewer: who answers.
        clock: gives the time, seconds since the epoch.
        port: 0: any free one.
        blind: what the cascade said is shown to nobody.
        refresh: called when the queue is empty, to look for more, such as an ingestion.

    Raises:
        InputError: no name of a reviewer, or the port is taken.
    """

    unavailable = (SQLAlchemyError, OSError)
    away = "the database cannot be reached; try again"

    def __init__(
        self,
        queue: ReviewQueue,
        reviewer: str,
        *,
        clock: Callable[[], float],
        port: int = 0,
        blind: bool = False,
        refresh: Callable[[], object] | None = None,
    ) -> None:
        if not reviewer.strip():
            raise InputError(f"reviewer must be a name, got '{reviewer}'")
        self.queue, self.reviewer, self.clock, self.blind, self.refresh = queue, reviewer, clock, blind, refresh
        super().__init__(port)

    def act(self, what: str, request: Request) -> dict[str, Any]:
        """Do what the page asks for, and give what it shows next: item, progress and a note for people."""
        now, note, item = self.clock(), "", None
        try:
            if what == "answer":
                self.queue.answer(request.event_id, request.label, self.reviewer, now)
                note = f"Answered {request.label}."
            elif what == "skip":
                self.queue.skip(request.event_id, self.reviewer, now)
                note = "Skipped; somebody else is asked."
            elif what == "undo":
                before = self.queue.progress(self.reviewer, now)
                item = self.queue.undo(self.reviewer, now)
                undone = before.answered_here + before.skipped_here > 0
                other = "Undone; somebody else has it now." if undone else "There is nothing to undo."
                note = "Undone; answer again." if item else other
        except LeaseLostError:
            note = "That one has been answered already, or is another's; nothing was changed."
        item = item or self.queue.take(self.reviewer, now)
        if item is None and self.refresh is not None:
            self.refresh()
            item = self.queue.take(self.reviewer, now)
        shown = None if item is None else item.model_dump(mode="json")
        if shown is not None and self.blind:
            shown |= dict.fromkeys(("label", "answer_a", "answer_b", "prob_a", "prob_b", "action"))
        progress = self.queue.progress(self.reviewer, now).model_dump(mode="json")
        return {"item": shown, "progress": progress, "note": note, "reviewer": self.reviewer, "blind": self.blind}

    def photo(self, event_id: str) -> bytes | None:
        """The image of an event that the reviewer holds."""
        sha256 = self.queue.holds(event_id, self.reviewer, self.clock())
        return None if sha256 is None else self.queue.images.get(sha256)


def review(
    store: str,
    log: Path | None = None,
    *,
    reviewer: str | None = None,
    port: int = 0,
    lease: float = LEASE_SECONDS,
    blind: bool = True,
    browser: bool = True,
    purge: bool = False,
    yes: bool = False,
    ready: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Purge old images, ingest the log, and serve the page until Ctrl-C or SIGTERM; ingest again when nothing is left.

    Args:
        store: of events and labels: a folder, a file or a database's URL.
        log: the log that serving writes, with the images; ``log`` in the store's folder by default.
        reviewer: whose answers they are; the user's name by default.
        port: of 127.0.0.1; 0: any free one.
        lease: seconds for which an image is this reviewer's alone.
        blind: show nothing of what the cascade said, so that it sways nobody.
        browser: open the page.
        purge: do not serve.
        yes: remove images also where the clock is far past the newest event.
        ready: is given the page's address once it is served.

    Returns:
        Counts: images purged, those that a clock in doubt keeps and why, events ingested, and after a session its
        progress and reviewers' disagreement.

    Raises:
        InputError: no such log, no such store, or an argument out of range.
        DependencyError: a database's driver is missing.
    """
    if log is None:
        log = Path(store) / "log"
    if not (log / "log.json").is_file():
        raise InputError(f"log must be a folder that serving logged to, got {log}; name it with --log")
    events = EventLog(log)
    purged = events.purge(time.time(), asked=purge and yes)
    result: dict[str, Any] = {"purged": purged.removed}
    if purged.in_doubt:
        result |= {"in_doubt": purged.in_doubt, "reason": purged.reason}
    if purge:
        return result
    with contextlib.closing(Store(store)) as kept:
        found = ingest(kept, events)
        result["ingested"] = found.events
        for line in found.torn:
            say(f"{log}: a line is no event and was passed over, {line}")
        name = reviewer or user_name()
        queue = ReviewQueue(kept, events.images, lease=lease)
        more = partial(ingest, kept, events)
        page = ReviewServer(queue, name, clock=time.time, port=port, blind=blind, refresh=more)
        serve(page, f"review as {name}", browser=browser, ready=ready)
        result["progress"] = queue.progress(name, time.time()).model_dump()
        result["disagreement"] = disagreement(kept).model_dump()
    return result


def render(result: dict[str, Any]) -> str:
    """Lines for people."""
    doubt = {"in_doubt": result.get("in_doubt", 0), "reason": result.get("reason", "")}
    lines = [str(Purged(removed=result["purged"], **doubt))]
    if "progress" in result:
        progress, double = result["progress"], result["disagreement"]
        lines.append(
            f"{progress['answered_here']} answered and {progress['skipped_here']} skipped by this reviewer; "
            f"{progress['finished']} of {progress['selected']} selected events are finished, {progress['left']} left"
        )
        if double["doubled"]:
            lines.append(
                f"reviewers disagree on {double['disagreeing']} of {double['doubled']} events that several answered "
                f"({double['rate']:.1%}, 95% interval {double['lower']:.1%} to {double['upper']:.1%})"
            )
    return "\n".join(lines)
