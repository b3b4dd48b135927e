"""A local page on which a person answers by key; its server, on this machine alone."""

from __future__ import annotations

import contextlib
import hmac
import io
import json
import os
import secrets
import tempfile
import threading
import webbrowser
from abc import abstractmethod
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import Field, ValidationError

from stage1_pro.data.images import ImageError, read_image
from stage1_pro.errors import InputError, explain
from stage1_pro.files import write_text
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


class Request(Record):
    """What the page asks for: the photo, and the class of an answer."""

    event_id: str = Field(default="", max_length=64)
    label: str = Field(default="", max_length=1000)


class Page:
    """A local page on 127.0.0.1 alone, for the first who comes with the random token of ``url``; base of what it shows.

    Args:
        port: 0: any free one.

    Raises:
        InputError: the port is taken.
    """

    known: ClassVar[tuple[str, ...]] = ("next", "answer", "skip", "undo")  # what may be asked for
    unavailable: ClassVar[tuple[type[Exception], ...]] = (OSError,)  # nothing was stored, and it may be tried again
    away: ClassVar[str] = "it could not be written down; try again"  # what the reader is told then

    def __init__(self, port: int = 0) -> None:
        self._tokens: set[str] = set()
        self._lock = threading.Lock()
        self.token, self.session = self.issue(), secrets.token_urlsafe(24)
        try:
            self._server = _Server(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"port must be a free one of this machine, got {port}: {error}") from None
        self._server.page = self
        self.port = int(self._server.server_address[1])

    @abstractmethod
    def act(self, what: str, request: Request) -> dict[str, Any]:
        """Do what the page asks for, and give what it shows next."""

    @abstractmethod
    def photo(self, event_id: str) -> bytes | None:
        """The photo that is shown now, as it is on disk; None where it is another or gone."""

    def image(self, event_id: str) -> tuple[str, bytes] | None:
        """Type and bytes of the photo that is shown now, as a browser can show it."""
        data = self.photo(event_id)
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

    def stop(self) -> None:
        """End ``serve`` once the request at hand is answered."""
        threading.Thread(target=self._server.shutdown, daemon=True).start()

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


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    page: Page


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
        except self.server.page.unavailable:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE)
        else:
            self._send(HTTPStatus.OK, *found) if found else self._refuse(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        what = self.path.lstrip("/")
        size = self.headers.get("Content-Length", "")
        # Other pages of this browser cannot send JSON here without being asked for leave, which is never given.
        if not self._is_local() or not self._is_known() or self.headers.get_content_type() != "application/json":
            self._refuse(HTTPStatus.FORBIDDEN)
        elif what not in self.server.page.known:
            self._refuse(HTTPStatus.NOT_FOUND)
        elif not size.isdecimal() or int(size) > _BODY_LIMIT:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        else:
            try:
                request = Request.model_validate_json(self.rfile.read(int(size)))
                found = self.server.page.act(what, request)
            except ValidationError:
                self._json(HTTPStatus.BAD_REQUEST, {"error": "the request is not what this page sends"})
            except InputError as error:
                self._json(HTTPStatus.BAD_REQUEST, {"error": str(error)})
            except self.server.page.unavailable as error:
                say(f"not stored: {explain(error)}")
                self._json(HTTPStatus.SERVICE_UNAVAILABLE, {"error": self.server.page.away})
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
def opened(page: Page) -> Iterator[None]:
    """Have the browser open the page, by a file that only this user reads: all users read a process's arguments."""
    with tempfile.TemporaryDirectory(prefix="stage1-review-") as folder:
        file = Path(folder) / "open.html"
        address = page.address(page.issue())
        write_text(file, f'<meta http-equiv="refresh" content="0;url={address}">\n', mode=0o600)
        # A browser in the terminal ends when its reader does.
        threading.Thread(target=webbrowser.open, args=(file.as_uri(),), daemon=True).start()
        yield


def serve(page: Page, said: str, *, browser: bool = True, ready: Callable[[str], None] | None = None) -> None:
    """Serve a page until it ends, Ctrl-C or SIGTERM, and have a browser open it where there is a screen.

    Args:
        page: what to serve.
        said: what it is, for the line with its address.
        browser: open it.
        ready: is given the address once it is served.
    """
    with contextlib.ExitStack() as opening, page:
        say(f"{said}: {page.url}   (Ctrl-C ends)")
        if ready is not None:
            ready(page.url)
        if browser and (os.name == "nt" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            opening.enter_context(opened(page))
        with terminable():
            try:
                page.serve()
            except KeyboardInterrupt:
                say("ended; every answer is kept")
