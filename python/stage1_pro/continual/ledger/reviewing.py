"""review: a local page on which a person answers the review queue by key; its server, on this machine alone."""

from __future__ import annotations

import contextlib
import hmac
import io
import json
import os
import secrets
import tempfile
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator
from functools import partial
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import Field, ValidationError
from sqlalchemy.exc import SQLAlchemyError

from stage1_pro.continual.ledger.labels import disagreement, ingest
from stage1_pro.continual.ledger.review import LEASE_SECONDS, LeaseLostError, ReviewQueue
from stage1_pro.continual.ledger.store import Store
from stage1_pro.continual.serving.events import EventLog, Purged
from stage1_pro.data.images import ImageError, read_image
from stage1_pro.errors import InputError, explain
from stage1_pro.files import user_name, write_text
from stage1_pro.progress import say
from stage1_pro.record import Record
from stage1_pro.stopping import terminable

_TYPES = {"review.html": "text/html", "review.css": "text/css", "review.js": "text/javascript"}
# Only what this server sends is shown or run, and nobody frames it.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_SHOWN = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png", b"GIF8": "image/gif"}
_BODY_LIMIT = 10_000


class _Request(Record):
    event_id: str = Field(default="", max_length=64)
    label: str = Field(default="", max_length=1000)


class ReviewServer:
    """The page for one reviewer, on 127.0.0.1 alone, for the first who comes with the random token of ``url``.

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
        self._tokens: set[str] = set()
        self._lock = threading.Lock()
        self.token, self.session = self.issue(), secrets.token_urlsafe(24)
        try:
            self._server = _Server(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"port must be a free one of this machine, got {port}: {error}") from None
        self._server.page = self
        self.port = int(self._server.server_address[1])

    def issue(self) -> str:
        """A new token, which opens the page once."""
        token = secrets.token_urlsafe(24)
        with self._lock:
            self._tokens.add(token)
        return token

    def spend(self, token: str) -> bool:
        """Whether a token opens the page; it never does so again."""
        with self._lock:
            found = [one for one in self._tokens if hmac.compare_digest(one.encode(), token.encode())]
            self._tokens.difference_update(found)
        return bool(found)

    @property
    def url(self) -> str:
        """What to open, once; the token in it is exchanged for the session's cookie and leaves the address bar."""
        return self.address(self.token)

    def address(self, token: str) -> str:
        """What to open with a token."""
        return f"http://127.0.0.1:{self.port}/?token={token}"

    def serve(self) -> None:
        """Serve until ``close`` or an interrupt."""
        self._server.serve_forever(poll_interval=0.1)

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.server_close()

    def act(self, what: str, request: _Request) -> dict[str, Any]:
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

    def image(self, event_id: str) -> tuple[str, bytes] | None:
        """Type and bytes of the image of an event that the reviewer holds, as a browser can show it."""
        sha256 = self.queue.holds(event_id, self.reviewer, self.clock())
        data = None if sha256 is None else self.queue.images.get(sha256)
        if data is None:
            return None
        for start, kind in _SHOWN.items():
            if data.startswith(start):
                return kind, data
        buffer = io.BytesIO()
        try:
            read_image(data).save(buffer, "PNG")
        except ImageError:
            return None
        return "image/png", buffer.getvalue()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    page: ReviewServer


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "stage1", ""
    timeout = 30

    def log_message(self, *_: object) -> None:
        """Say nothing: the address of a request may hold the token."""

    def parse_request(self) -> bool:
        """Take path and query of what is asked for; refuse what is no address, such as ``http://[``."""
        if not super().parse_request():
            return False
        try:
            parts = urlsplit(self.path)
            self.query = {name: given[0] for name, given in parse_qs(parts.query, max_num_fields=10).items()}
        except ValueError:
            self._refuse(HTTPStatus.BAD_REQUEST)
            return False
        self.path = parts.path
        return True

    def do_GET(self) -> None:
        path, given = self.path, self.query.get("token", "")
        if not self._is_local():
            self._refuse(HTTPStatus.FORBIDDEN)
        elif path == "/" and given:
            if self._is_known():
                self._send(HTTPStatus.SEE_OTHER, "text/plain", b"", {"Location": "/"})
            elif self.server.page.spend(given):
                # Not Strict: a browser that comes from the redirecting file would not send it to where it is led.
                cookie = f"{self._cookie_name}={self.server.page.session}; HttpOnly; SameSite=Lax; Path=/"
                self._send(HTTPStatus.SEE_OTHER, "text/plain", b"", {"Location": "/", "Set-Cookie": cookie})
            else:
                self._refuse(HTTPStatus.FORBIDDEN)
        elif not self._is_known():
            self._refuse(HTTPStatus.FORBIDDEN)
        elif (name := path.lstrip("/") or "review.html") in _TYPES:
            data = files("stage1_pro").joinpath("templates", name).read_bytes()
            self._send(HTTPStatus.OK, f"{_TYPES[name]}; charset=utf-8", data)
        elif path == "/favicon.ico":
            self._send(HTTPStatus.NO_CONTENT, "image/x-icon", b"")
        elif path == "/image":
            self._image()
        else:
            self._refuse(HTTPStatus.NOT_FOUND)

    def _image(self) -> None:
        try:
            found = self.server.page.image(self.query.get("event", ""))
        except (SQLAlchemyError, OSError):
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE)
        else:
            self._send(HTTPStatus.OK, *found) if found else self._refuse(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        what = self.path.lstrip("/")
        size = self.headers.get("Content-Length", "")
        # Other pages of this browser cannot send JSON here without being asked for leave, which is never given.
        if not self._is_local() or not self._is_known() or self.headers.get_content_type() != "application/json":
            self._refuse(HTTPStatus.FORBIDDEN)
        elif what not in ("next", "answer", "skip", "undo"):
            self._refuse(HTTPStatus.NOT_FOUND)
        elif not size.isdecimal() or int(size) > _BODY_LIMIT:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        else:
            try:
                request = _Request.model_validate_json(self.rfile.read(int(size)))
                found = self.server.page.act(what, request)
            except ValidationError:
                self._json(HTTPStatus.BAD_REQUEST, {"error": "the request is not what this page sends"})
            except InputError as error:
                self._json(HTTPStatus.BAD_REQUEST, {"error": str(error)})
            except (SQLAlchemyError, OSError) as error:
                say(f"not stored: {explain(error)}")
                self._json(HTTPStatus.SERVICE_UNAVAILABLE, {"error": "the database cannot be reached; try again"})
            else:
                self._json(HTTPStatus.OK, found)

    @property
    def _cookie_name(self) -> str:
        # Cookies do not tell ports apart.
        return f"stage1-review-{self.server.page.port}"

    def _is_local(self) -> bool:
        """Asked for under this machine's own name: a foreign name that points here is refused."""
        origin = self.headers.get("Origin")
        hosts = {f"127.0.0.1:{self.server.page.port}", f"localhost:{self.server.page.port}"}
        return self.headers.get("Host") in hosts and (origin is None or origin in {f"http://{h}" for h in hosts})

    def _is_known(self) -> bool:
        try:
            found = SimpleCookie(self.headers.get("Cookie", "")).get(self._cookie_name)
        except CookieError:
            found = None
        return found is not None and hmac.compare_digest(found.value.encode(), self.server.page.session.encode())

    def _json(self, status: HTTPStatus, data: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(data).encode())

    def _refuse(self, status: HTTPStatus) -> None:
        self._send(status, "text/plain; charset=utf-8", f"{status.value} {status.phrase}\n".encode())

    def _send(self, status: HTTPStatus, kind: str, data: bytes, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind, "Content-Length": str(len(data)), "Cache-Control": "no-store",
            "Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin", **(more or {}),
        }  # fmt: skip
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(data)


@contextlib.contextmanager
def opened(page: ReviewServer) -> Iterator[None]:
    """Have the browser open the page, by a file that only this user reads: all users read a process's arguments."""
    with tempfile.TemporaryDirectory(prefix="stage1-review-") as folder:
        file = Path(folder) / "open.html"
        address = page.address(page.issue())
        write_text(file, f'<meta http-equiv="refresh" content="0;url={address}">\n', mode=0o600)
        # A browser in the terminal ends when its reader does.
        threading.Thread(target=webbrowser.open, args=(file.as_uri(),), daemon=True).start()
        yield


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
        with (
            contextlib.ExitStack() as opening,
            ReviewServer(queue, name, clock=time.time, port=port, blind=blind, refresh=more) as page,
        ):
            say(f"review as {name}: {page.url}   (Ctrl-C ends)")
            if ready is not None:
                ready(page.url)
            if browser and (os.name == "nt" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
                opening.enter_context(opened(page))
            with terminable():
                try:
                    page.serve()
                except KeyboardInterrupt:
                    say("ended; every answer is kept")
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
