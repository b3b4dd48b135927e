"""Every error a user can cause, with the exit code the command line gives it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Exit code of ``stage1 evaluate`` where a promise fails on val_test: a result, written like any other, not an error.
PROMISE_FAILED = 7


class Stage1Error(Exception):
    """Base of all errors raised on purpose; shown as one message without a traceback."""

    exit_code = 1


class InputError(Stage1Error):
    """An argument, a configuration key or a data file is not what the station needs."""

    exit_code = 2


class NotReachableError(Stage1Error):
    """The requested target cannot be met on this data; nothing was deployed in its place."""

    exit_code = 3


class ArtifactError(Stage1Error):
    """A checkpoint, policy or bundle is damaged, changed, incomplete or of another model."""

    exit_code = 4


class DependencyError(Stage1Error):
    """An optional library or tool is missing; the message names the command that adds it."""

    exit_code = 5


class TrainingError(Stage1Error):
    """Training cannot go on (out of memory at the smallest batch, loss not finite)."""

    exit_code = 6


class DeviceError(Stage1Error):
    """A GPU, or the runtime on it, failed at work it had accepted."""

    exit_code = 8


def nearest(word: str, options: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest option, or an empty string."""
    close = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def need(extra: str, package: str) -> DependencyError:
    """Build the error for a missing optional package, naming the extra that brings it."""
    return DependencyError(
        f"{package} is not installed; install it with: pip install -c constraints.txt 'stage1_pro[{extra}]'"
    )


def printable(text: str, limit: int = 300) -> str:
    """Text of a file for a message: no control characters that a terminal obeys, and not a page of it."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return plain + "…" if len(text) > limit else plain
