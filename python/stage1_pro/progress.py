"""Progress and messages: on stderr, so that stdout carries results alone. Nobody listening ends no work."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from stage1_pro.errors import legible

if TYPE_CHECKING:
    from typing import TextIO

    from rich.console import Console

T = TypeVar("T")
# Seconds between two lines about long work where no terminal shows a bar.
HEARTBEAT = 30.0


def say(message: str) -> None:
    """Print one line to stderr; where that is closed or full, nobody hears it and the work goes on."""
    try:
        print(legible(message), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        give_up(sys.stderr)


def give_up(stream: TextIO) -> None:
    """Let what is still to be written to a stream go nowhere, or Python fails once more when it ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it may be no file at all
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def on_terminal() -> bool:
    """Whether somebody sees bars."""
    try:
        return sys.stderr.isatty()
    except (ValueError, AttributeError):  # closed, or none
        return False


class _Unheard:
    """Stderr for a bar, which draws from a thread of its own: what cannot be written is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            give_up(self._stream)


def console() -> Console:
    """What bars are drawn on: stderr, whose loss is no error."""
    from rich.console import Console

    return Console(file=_Unheard(sys.stderr))  # type: ignore[arg-type]


def track(items: Iterable[T], description: str, total: int | None = None, *, done: int = 0) -> Iterator[T]:
    """Yield the items behind a progress bar on stderr; a line now and then where stderr is no terminal.

    ``total`` counts those ``done`` before, which are not among the items.
    """
    if not on_terminal():
        yield from _told(items, description, total, done)
        return
    from rich.progress import track as rich_track

    yield from rich_track(items, description, total=total, completed=done, console=console(), transient=True)


def _told(items: Iterable[T], description: str, total: int | None, done: int) -> Iterator[T]:
    began = last = time.monotonic()
    for number, item in enumerate(items):
        now = time.monotonic()
        if number and now - last >= HEARTBEAT:
            rate, last, so_far = number / (now - began), now, done + number
            left = "" if total is None else f", {_clock((total - so_far) / rate)} left"
            of = so_far if total is None else f"{so_far}/{total}"
            say(f"{description}: {of}, {rate:.1f}/s{left}")
        yield item


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
