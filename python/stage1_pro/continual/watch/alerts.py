"""Send an alert to a webhook or a program. Failures are reported and never raised."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from stage1_pro.errors import InputError
from stage1_pro.files import sha256_bytes
from stage1_pro.record import Record

_LONGEST_REASON = 300


class Alert(Record):
    """What happened, as hooks get it: one JSON object, no file names and no image."""

    format_version: Literal[1] = 1
    time: float = Field(description="seconds since the epoch")
    kind: Literal["alarm", "watch", "train", "approval", "rollback", "champion", "test"]
    title: str
    text: str
    bundle: str = ""
    figures: dict[str, float | None] = Field(default_factory=dict)


class Delivery(Record):
    """What became of one alert at one hook."""

    hook: str = Field(description="host of a webhook, name of a command; no secret of either")
    delivered: bool
    tries: int
    reason: str = Field("", description="why it was not delivered")


@dataclass(frozen=True)
class Webhook:
    """Posts the alert as JSON to a URL.

    Tried again after a network error, a timeout, 429 or 5xx, waiting ``wait`` seconds, then twice that, and so on.
    Redirects are not followed.

    Args:
        url: http or https; whatever secret it holds is in no report.
        timeout: seconds for each try.
        tries: at most.
        wait: seconds before the second try.

    Raises:
        InputError: not an http(s) URL, or a limit that is not positive.
    """

    url: str
    timeout: float = 5.0
    tries: int = 3
    wait: float = 1.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(
                f"url must be http:// or https:// with a host, got scheme {parts.scheme!r}; a command is a Program"
            )
        if not (self.timeout > 0 and self.tries >= 1 and self.wait >= 0):
            raise InputError("timeout and tries must be positive and wait not negative; see Webhook")

    @property
    def fingerprint(self) -> str:
        """Hash of the URL, to know it again without writing it down."""
        return sha256_bytes(self.url.encode())

    def send(self, alert: Alert) -> Delivery:
        """Post it; never raises for what the other side does."""
        host = urlsplit(self.url).hostname or ""
        opener = urllib.request.build_opener(_NoRedirect)
        reason = ""
        for attempt in range(1, self.tries + 1):
            if attempt > 1:
                time.sleep(self.wait * 2 ** (attempt - 2))
            request = urllib.request.Request(  # noqa: S310 - the scheme was checked
                self.url,
                data=alert.model_dump_json().encode(),
                headers={"Content-Type": "application/json", "User-Agent": "stage1_pro"},
                method="POST",
            )
            try:
                with opener.open(request, timeout=self.timeout):
                    return Delivery(hook=host, delivered=True, tries=attempt)
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}"
                error.close()
                if error.code != 429 and error.code < 500:
                    return Delivery(hook=host, delivered=False, tries=attempt, reason=reason)
            except Exception as error:  # noqa: BLE001 - sockets, TLS and HTTP each raise kinds of their own
                cause = getattr(error, "reason", error)
                # What is said of an address that cannot be one quotes parts of it.
                said = "" if isinstance(cause, http.client.InvalidURL) else str(cause)
                reason = (said or type(cause).__name__).replace(self.url, "the URL")[:_LONGEST_REASON]
        return Delivery(hook=host, delivered=False, tries=self.tries, reason=reason)


@dataclass(frozen=True)
class Program:
    """Runs a program with the alert as JSON on its standard input; no shell reads the words.

    Args:
        words: the program and its arguments.
        timeout: seconds after which it and all it started are killed.

    Raises:
        InputError: no program, or a timeout that is not positive.
    """

    words: tuple[str, ...]
    timeout: float = 30.0

    def __post_init__(self) -> None:
        given: object = self.words
        if not isinstance(given, tuple) or not given or not all(isinstance(word, str) for word in given):
            raise InputError(f"words must be a program and its arguments, one string each, got {given!r}")
        if not self.timeout > 0:
            raise InputError(f"timeout must be positive, got {self.timeout}; it is in seconds")

    @property
    def fingerprint(self) -> str:
        """Hash of the words, to know it again without writing them down."""
        return sha256_bytes("\0".join(self.words).encode())

    def send(self, alert: Alert) -> Delivery:
        """Run it; never raises for what the program does."""
        name = os.path.basename(self.words[0])  # noqa: PTH119 - a word, not a path of ours
        try:
            reason = self._run(alert.model_dump_json().encode())
        except (OSError, ValueError) as error:
            reason = str(error) or type(error).__name__
        return Delivery(hook=name, delivered=not reason, tries=1, reason=reason[:_LONGEST_REASON])

    def _run(self, data: bytes) -> str:
        """Why the program did not take it; empty where it did."""
        pipe = subprocess.PIPE
        with subprocess.Popen(
            self.words, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe, start_new_session=True
        ) as process:
            try:
                _, said = process.communicate(data, timeout=self.timeout)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                return f"killed after {self.timeout:g} s"
        if process.returncode == 0:
            return ""
        lines = said.decode(errors="replace").strip().splitlines()
        return f"exit code {process.returncode}" + (f": {lines[-1]}" if lines else "")


Hook = Webhook | Program


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follow none: the answer then counts as the error that it is."""
        return
