"""Review: a queue that lends each event to one person at a time, and a local page to answer it by key."""

from __future__ import annotations

import contextlib
import hmac
import io
import json
import secrets
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import Field, ValidationError
from sqlalchemy import Column, Connection, Double, String, Table, Text, and_, func, or_, select

from stage1_pro.continual.ledger.labels import TRUST, bundles, events, insert, labels, standing, undo
from stage1_pro.continual.ledger.schema import metadata
from stage1_pro.continual.ledger.store import Store
from stage1_pro.continual.serving.events import BundleFacts, ImageStore
from stage1_pro.data.images import ImageError, read_image
from stage1_pro.errors import InputError, nearest
from stage1_pro.record import Record

LEASE_SECONDS = 300.0
_FETCH = 50

leases = Table(
    "leases",
    metadata,
    Column("event_id", String(64), primary_key=True),
    Column("reviewer", Text, nullable=False),
    Column("expires", Double, nullable=False),
)


class Item(Record):
    """An event that a reviewer holds until ``expires``, and what the cascade said about it."""

    event_id: str
    image_sha256: str
    classes: tuple[str, ...]
    positive: str
    action: str
    label: str = Field(description="the answer; empty where nobody answered")
    answer_a: str | None = Field(description="what Stage A says; None with more than two classes unless it answered")
    answer_b: str | None = Field(description="what Stage B says; None where it was not asked")
    prob_a: float | None
    prob_b: float | None
    second: bool = Field(description="somebody else has answered already")
    served: float = Field(description="when it was served")
    expires: float


class Progress(Record):
    """How far the queue is: events answered by all who were wanted, those left, and what this reviewer did."""

    selected: int
    finished: int
    left: int = Field(description="not finished, not skipped or answered by this reviewer, image still there")
    lent: int = Field(description="of those, held by others now")
    answered_here: int
    skipped_here: int


class LeaseLostError(InputError):
    """The event was lent to somebody else meanwhile, or needs no answer any more."""


class ReviewQueue:
    """Events selected for review, the oldest first, each lent to one reviewer at a time.

    An event is finished when as many reviewers as are wanted have answered, or its owner has. The order is that of
    serving and of nothing else, so that whatever is finished up to a time is a sample with the logged propensities.
    A skipped event is offered to other reviewers.

    Args:
        store: of events and labels.
        images: where the images are; an event whose image is gone cannot be reviewed.
        lease: seconds that an event is lent.
    """

    def __init__(self, store: Store, images: ImageStore, *, lease: float = LEASE_SECONDS) -> None:
        if not lease > 0:
            raise InputError(f"lease must be a positive number of seconds, got {lease}")
        self.store, self.images, self.lease = store, images, lease

    def take(self, reviewer: str, now: float) -> Item | None:
        """Borrow the oldest event that this reviewer may answer; the one already held, until its lease ends."""
        with self._serial() as connection:
            query = (
                select(events.c.id, events.c.image_sha256)
                .where(self._open(reviewer, now), ~self._lent(reviewer, now))
                .order_by(self._mine(reviewer, now).desc(), events.c.time, events.c.id)
            )
            found = connection.execute(query, execution_options={"yield_per": _FETCH})
            chosen = next((row.id for row in found if row.image_sha256 in self.images), None)
            found.close()
            return None if chosen is None else self._lend(connection, chosen, reviewer, now)

    def answer(self, event_id: str, label: str, reviewer: str, now: float) -> int:
        """Append an answer and end the lease; give the label's id.

        Raises:
            InputError: a label that is no class of the bundle that served it.
            LeaseLostError: somebody else holds the event, or it is answered.
        """
        with self._serial() as connection:
            facts = self._facts(connection, event_id)
            if label not in facts.classes:
                raise InputError(
                    f"label must be one of {', '.join(facts.classes)}, got '{label}'{nearest(label, facts.classes)}"
                )
            return self._append(connection, event_id, reviewer, now, kind="answer", label=label)

    def skip(self, event_id: str, reviewer: str, now: float) -> int:
        """Say that one cannot tell: the event goes to somebody else; give the row's id.

        Raises:
            LeaseLostError: somebody else holds the event, or it is answered.
        """
        with self._serial() as connection:
            return self._append(connection, event_id, reviewer, now, kind="skip", label=None)

    def undo(self, reviewer: str, now: float) -> Item | None:
        """Supersede the reviewer's last answer or skip by an undo, and lend the event again; None: nothing to undo.

        Where somebody else holds the event meanwhile the undo stands, and None is given.
        """
        with self._serial() as connection:
            last = connection.execute(
                select(labels)
                .where(labels.c.annotator == reviewer, labels.c.source == "review", labels.c.kind != "undo", standing())
                .order_by(labels.c.id.desc())
                .limit(1)
            ).mappings().one_or_none()  # fmt: skip
            if last is None:
                return None
            undo(connection, dict(last), annotator=reviewer, now=now)
            held = connection.execute(
                select(events.c.id).where(events.c.id == last["event_id"], self._lent(reviewer, now))
            ).first()
            return None if held is not None else self._lend(connection, last["event_id"], reviewer, now)

    def progress(self, reviewer: str, now: float) -> Progress:
        """How far the queue is, as this reviewer sees it."""
        with self.store.read() as connection:

            def count(*conditions: Any) -> int:
                return connection.execute(select(func.count()).select_from(events).where(*conditions)).scalar_one()

            kinds = (
                select(labels.c.kind, func.count().label("rows"))
                .where(labels.c.annotator == reviewer, labels.c.source == "review", standing())
                .group_by(labels.c.kind)
            )
            mine = {row.kind: row.rows for row in connection.execute(kinds)}
            return Progress(
                selected=count(events.c.reviews > 0),
                finished=count(events.c.reviews > 0, self._finished()),
                left=count(self._open(reviewer, now)),
                lent=count(self._open(reviewer, now), self._lent(reviewer, now)),
                answered_here=mine.get("answer", 0),
                skipped_here=mine.get("skip", 0),
            )

    def holds(self, event_id: str, reviewer: str, now: float) -> str | None:
        """The sha256 of an event's image while the reviewer holds the event, None otherwise."""
        query = select(events.c.image_sha256).where(events.c.id == event_id, self._mine(reviewer, now))
        with self.store.read() as connection:
            return connection.execute(query).scalar_one_or_none()

    @contextlib.contextmanager
    def _serial(self) -> Iterator[Connection]:
        """A transaction during which no other one of any queue on this store is at work."""
        with self.store.write() as connection:
            self.store.serialise(connection)
            yield connection

    @staticmethod
    def _answers(*conditions: Any) -> Any:
        return select(labels.c.id).where(labels.c.event_id == events.c.id, standing(), *conditions)

    def _finished(self) -> Any:
        reviewers = (
            select(func.count(labels.c.annotator.distinct()))
            .where(labels.c.event_id == events.c.id, labels.c.kind == "answer", labels.c.source == "review", standing())
            .scalar_subquery()
        )
        return or_(
            reviewers >= events.c.reviews, self._answers(labels.c.kind == "answer", labels.c.source == "owner").exists()
        )

    def _open(self, reviewer: str, now: float) -> Any:
        done = self._answers(
            labels.c.annotator == reviewer, labels.c.source == "review", labels.c.kind != "undo"
        ).exists()
        # Images are gone after their time, and what nobody can see needs no look at the disk.
        return and_(events.c.reviews > 0, events.c.time > now - self.images.ttl, ~self._finished(), ~done)

    @staticmethod
    def _mine(reviewer: str, now: float) -> Any:
        held = leases.c.event_id == events.c.id
        return select(leases.c.event_id).where(held, leases.c.reviewer == reviewer, leases.c.expires > now).exists()

    @staticmethod
    def _lent(reviewer: str, now: float) -> Any:
        held = leases.c.event_id == events.c.id
        return select(leases.c.event_id).where(held, leases.c.reviewer != reviewer, leases.c.expires > now).exists()

    def _lend(self, connection: Connection, event_id: str, reviewer: str, now: float) -> Item:
        row = {"event_id": event_id, "reviewer": reviewer, "expires": now + self.lease}
        statement = insert(self.store, leases).values(row)
        connection.execute(statement.on_conflict_do_update(index_elements=["event_id"], set_=row))
        one = connection.execute(select(events).where(events.c.id == event_id)).one()
        facts = self._facts(connection, event_id)
        others = self._answers(labels.c.kind == "answer", labels.c.annotator != reviewer).exists()
        second = connection.execute(select(events.c.id).where(events.c.id == event_id, others)).first() is not None
        exited = one.action == "exit"
        return Item(
            event_id=event_id,
            image_sha256=one.image_sha256,
            classes=facts.classes,
            positive=facts.positive,
            action=one.action,
            label=one.label,
            answer_a=one.label if exited else _answer(one.prob_a, facts),
            answer_b=None if exited else one.label or _answer(one.prob_b, facts),
            prob_a=one.prob_a,
            prob_b=one.prob_b,
            second=second,
            served=one.time,
            expires=row["expires"],
        )

    @staticmethod
    def _facts(connection: Connection, event_id: str) -> BundleFacts:
        joined = events.join(bundles, bundles.c.bundle == events.c.bundle)
        found = connection.execute(select(bundles.c.facts).select_from(joined).where(events.c.id == event_id)).first()
        if found is None:
            raise InputError(f"event_id must be an event of a bundle whose log was ingested, got '{event_id}'")
        return BundleFacts.parse(found.facts, "served_bundles")

    def _append(
        self, connection: Connection, event_id: str, reviewer: str, now: float, *, kind: str, label: str | None
    ) -> int:
        allowed = connection.execute(
            select(events.c.id).where(events.c.id == event_id, self._open(reviewer, now), ~self._lent(reviewer, now))
        ).first()
        if allowed is None:
            raise LeaseLostError(f"event_id must be one that {reviewer} may answer, got {event_id}; take another one")
        row = {"kind": kind, "event_id": event_id, "label": label, "source": "review", "trust": TRUST["review"],
               "annotator": reviewer, "time": now}  # fmt: skip
        written = connection.execute(labels.insert().values(row).returning(labels.c.id)).scalar_one()
        connection.execute(leases.delete().where(leases.c.event_id == event_id))
        return int(written)


def _answer(prob: float | None, facts: BundleFacts) -> str | None:
    """The class that P(positive) means where there are two."""
    if prob is None or len(facts.classes) != 2:
        return None
    (negative,) = (name for name in facts.classes if name != facts.positive)
    return facts.positive if prob > 0.5 else negative


# --------------------------------------------------------------------------------------------
# The page

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
    """The page for one reviewer, on 127.0.0.1 alone, for whoever has the random token of ``url``.

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
        self.token = secrets.token_urlsafe(24)
        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        except (OSError, OverflowError) as error:
            raise InputError(f"port must be a free one of this machine, got {port}: {error}") from None
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """What to open; the token in it becomes a cookie and leaves the address bar."""
        return f"http://127.0.0.1:{self.port}/?token={self.token}"

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
                note = "Undone; answer again." if item else "Undone; somebody else has it now." if undone else (
                    "There is nothing to undo."
                )  # fmt: skip
        except LeaseLostError:
            note = "That one has been answered by somebody else; nothing was changed."
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


def _handler(page: ReviewServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "stage1", ""
        timeout = 30

        def log_message(self, *_: object) -> None:
            """Say nothing: the address of a request may hold the token."""

        def do_GET(self) -> None:
            target = self._target()
            if target is None:
                self._refuse(HTTPStatus.BAD_REQUEST)
                return
            path, query = target
            given = query.get("token", "")
            if not self._is_local():
                self._refuse(HTTPStatus.FORBIDDEN)
            elif path == "/" and given:
                if hmac.compare_digest(given.encode(), page.token.encode()):
                    cookie = f"{self._cookie_name}={page.token}; HttpOnly; SameSite=Strict; Path=/"
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
            elif path == "/image" and (found := page.image(query.get("event", ""))):
                self._send(HTTPStatus.OK, *found)
            else:
                self._refuse(HTTPStatus.NOT_FOUND)

        def do_POST(self) -> None:
            target = self._target()
            if target is None:
                self._refuse(HTTPStatus.BAD_REQUEST)
                return
            what = target[0].lstrip("/")
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
                    self._json(HTTPStatus.OK, page.act(what, request))
                except ValidationError:
                    self._json(HTTPStatus.BAD_REQUEST, {"error": "the request is not what this page sends"})
                except InputError as error:
                    self._json(HTTPStatus.BAD_REQUEST, {"error": str(error)})

        def _target(self) -> tuple[str, dict[str, str]] | None:
            """Path and query of what is asked for; None where that is no address, such as ``http://[``."""
            try:
                parts = urlsplit(self.path)
                return parts.path, {name: given[0] for name, given in parse_qs(parts.query, max_num_fields=10).items()}
            except ValueError:
                return None

        @property
        def _cookie_name(self) -> str:
            # Cookies do not tell ports apart.
            return f"stage1-review-{page.port}"

        def _is_local(self) -> bool:
            """Asked for under this machine's own name: a foreign name that points here is refused."""
            origin = self.headers.get("Origin")
            hosts = {f"127.0.0.1:{page.port}", f"localhost:{page.port}"}
            return self.headers.get("Host") in hosts and (origin is None or origin in {f"http://{h}" for h in hosts})

        def _is_known(self) -> bool:
            try:
                found = SimpleCookie(self.headers.get("Cookie", "")).get(self._cookie_name)
            except CookieError:
                found = None
            return found is not None and hmac.compare_digest(found.value.encode(), page.token.encode())

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

    return Handler
