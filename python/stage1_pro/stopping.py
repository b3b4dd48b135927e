"""Ending when asked: Ctrl-C, and SIGTERM, which is what stops a process in the background."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from stage1_pro.progress import say


class Terminated(KeyboardInterrupt):
    """SIGTERM came; the command line gives it the exit code 143."""


@contextlib.contextmanager
def _handled(handler: Callable[[int], None], *numbers: int) -> Iterator[None]:
    """Let ``handler`` answer signals in this process, but those that it was told to ignore, as ``nohup`` does.

    Forked children end by theirs, and other threads hear of none.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def answer(number: int, _: FrameType | None) -> None:
        if os.getpid() == owner:
            handler(number)
            return
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, answer) for number in heard}
    try:
        yield
    finally:
        for number, handled in before.items():
            signal.signal(number, handled)


def _stop(number: int) -> None:
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def terminable() -> contextlib.AbstractContextManager[None]:
    """Let SIGTERM end what runs within as Ctrl-C does, so that everything is closed and nothing half-written stays."""
    return _handled(_stop, signal.SIGTERM)


class Stop:
    """Whether somebody asked work to stop that goes on in steps."""

    def __init__(self) -> None:
        self._asked: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._asked)

    def ask(self, number: int) -> None:
        """Note the first signal; the second one stops at once."""
        if self:
            _stop(number)
        self._asked.append(number)
        say("stopping after this step, which is saved; once more stops at once")

    def now(self) -> None:
        """Stop; raises Terminated or KeyboardInterrupt."""
        _stop(self._asked[0])


@contextlib.contextmanager
def between_steps(*, wait: bool = True) -> Iterator[Stop]:
    """Put Ctrl-C and SIGTERM off until work that goes on in steps has saved one; without ``wait`` they stop at once."""
    stop = Stop()
    with _handled(stop.ask if wait else _stop, signal.SIGTERM, signal.SIGINT):
        yield stop
