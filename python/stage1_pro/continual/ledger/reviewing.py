"""review: a local page on which a person answers what was selected for review."""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stage1_pro.continual.ledger.labels import disagreement, ingest
from stage1_pro.continual.ledger.review import LEASE_SECONDS, ReviewQueue
from stage1_pro.continual.ledger.review_page import ReviewServer
from stage1_pro.continual.ledger.store import Store
from stage1_pro.continual.serving.events import EventLog
from stage1_pro.errors import InputError
from stage1_pro.progress import say


def review(
    store: str,
    log: Path | None = None,
    *,
    reviewer: str | None = None,
    port: int = 0,
    lease: float = LEASE_SECONDS,
    blind: bool = False,
    browser: bool = True,
    purge: bool = False,
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
        ready: is given the page's address once it is served.

    Returns:
        Counts: images purged, events ingested, and after a session its progress and reviewers' disagreement.

    Raises:
        InputError: no such log, no such store, or an argument out of range.
        DependencyError: a database's driver is missing.
    """
    if log is None:
        log = Path(store) / "log"
    if not (log / "log.json").is_file():
        raise InputError(f"log must be a folder that serving logged to, got {log}; name it with --log")
    events = EventLog(log)
    result: dict[str, Any] = {"purged": events.images.purge(time.time())}
    if purge:
        return result
    kept = Store(store)
    try:
        found = ingest(kept, events)
        result["ingested"] = found.events
        for line in found.torn:
            say(f"{log}: a line is no event and was passed over, {line}")
        name = reviewer or getpass.getuser()
        queue = ReviewQueue(kept, events.images, lease=lease)
        with ReviewServer(
            queue, name, clock=time.time, port=port, blind=blind, refresh=lambda: ingest(kept, events)
        ) as page:
            say(f"review as {name}: {page.url}   (Ctrl-C ends)")
            if ready is not None:
                ready(page.url)
            if browser and (os.name == "nt" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
                webbrowser.open(page.url)
            with _terminated_as_interrupted():
                try:
                    page.serve()
                except KeyboardInterrupt:
                    say("ended; every answer is kept")
        result["progress"] = queue.progress(name, time.time()).model_dump()
        result["disagreement"] = disagreement(kept).model_dump()
    finally:
        kept.close()
    return result


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let whoever stops a process in the background end the page as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def render(result: dict[str, Any]) -> str:
    """Lines for people."""
    lines = [f"purged {result['purged']} images whose time was over"]
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
