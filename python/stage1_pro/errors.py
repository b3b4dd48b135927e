"""Every error a user can cause, with the exit code the command line gives it, and the one that a library's error is."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable

# Exit code of ``stage1 evaluate`` where a promise fails on val_test: a result, written like any other, not an error.
PROMISE_FAILED = 7


class Stage1Error(Exception):
    """Base of all errors raised on purpose; shown as one message without a traceback.

    Its text is one line that a terminal shows as it is, whatever a file or an argument put into it.
    """

    exit_code = 1

    def __str__(self) -> str:
        return printable(printable(super().__str__(), 2500), 2500)  # escaped, it is longer


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


class TemporaryError(Stage1Error):
    """What this machine has too little of or cannot reach right now: memory, disk, processes, a database.

    What was finished is kept; the same command may succeed later.
    """

    exit_code = 75


class UnforeseenError(Stage1Error):
    """A fault of this program, or of a library at a place where none was expected."""

    exit_code = 70


def closest(word: str, options: Iterable[str]) -> str | None:
    """The option that is spelled most like a word; None where none is near."""
    import difflib

    return next(iter(difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)), None)


def nearest(word: str, options: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest option, or an empty string."""
    close = closest(word, options)
    return "" if close is None else f"; did you mean '{printable(close, 80)}'?"


def need(extra: str, package: str) -> DependencyError:
    """Build the error for a missing optional package, naming the extra that brings it."""
    return DependencyError(
        f"{package} is not installed; install it with: pip install -c constraints.txt 'stage1_pro[{extra}]'"
    )


def legible(text: str) -> str:
    """Lines of text without the control characters that a terminal obeys, or that turn text around."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def printable(text: str, limit: int = 300) -> str:
    """Text of a file for a message: in one line, legible, and not a page of it."""
    plain = legible(text[:limit]).replace("\n", "\\n")
    return plain + "…" if len(text) > limit else plain


_EXTRAS = {
    "train": ("torch", "transformers", "peft", "accelerate", "safetensors", "onnx", "onnxscript", "sklearn"),
    "continual": ("sqlalchemy", "psycopg", "pyarrow", "river", "prometheus_client", "alembic"),
}
# As Python, NumPy, PyTorch on CPU, CUDA and MPS, cuDNN, cuBLAS, onnxruntime and TensorRT spell it.
_NO_MEMORY = (
    r"out of memory|out_of_memory|memoryallocation|alloc_failed|bad[_ ]alloc|not enough memory"
    r"|(cannot|can't|unable to|failed to|could not) allocate"
)
_SCARCE = {
    errno.ENOSPC: "the disk is full; free some of it",
    errno.EDQUOT: "your quota of the disk is used up; free some of it",
    errno.EFBIG: "the file may grow no further (ulimit -f); raise that or write elsewhere",
    errno.ENOMEM: "memory ran out; free some of it",
    errno.EMFILE: "this process may open no more files (ulimit -n); raise it",
    errno.ENFILE: "this machine may open no more files; close others",
    errno.EAGAIN: "no more processes or threads are to be had (ulimit -u); end others",
    errno.EIO: "the device failed to read or write; look at the disk",
}


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, in any of the spellings of the libraries."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    own = isinstance(error, Stage1Error) or not isinstance(error, Exception)
    return not own and bool(re.search(_NO_MEMORY, str(error), re.IGNORECASE))


def explain(error: Exception) -> Stage1Error:
    """The error of ours that says in one line what a library, the system or the machine refused."""
    if isinstance(error, Stage1Error):
        return error
    text = printable(" ".join(str(error).split())) or type(error).__name__
    if out_of_memory(error):
        return TemporaryError(f"memory ran out: {text}; free some of it or ask for less at once, then run this again")
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").split(".")[0]
        extra = next((extra for extra, packages in _EXTRAS.items() if package in packages), None)
        return _unforeseen(error) if extra is None else need(extra, package)
    if isinstance(error, ImportError):
        return DependencyError(f"a library cannot be loaded: {text}; see `stage1 doctor`")
    if isinstance(error, OSError):
        where = f"{printable(os.fsdecode(error.filename))} " if isinstance(error.filename, str | bytes) else ""
        if error.errno in _SCARCE:
            advice = _SCARCE[error.errno]
            return TemporaryError(f"{where}cannot be used: {advice}, then run this again; what was finished is kept")
        return InputError(f"{where}cannot be used: {error.strerror or text}")
    if isinstance(error, RecursionError):
        return InputError("what is read must not be nested so deeply; look at the files that this command reads")
    kinds = {kind.__name__: kind for kind in type(error).__mro__}
    if "SQLAlchemyError" in kinds:
        said = printable(str(getattr(error, "orig", None) or error).strip().split("\n")[0])
        if {"OperationalError", "InterfaceError", "TimeoutError", "DisconnectionError"} & set(kinds):
            return TemporaryError(f"the database must be there, got: {said}; run this again when it is")
        return ArtifactError(f"the database must hold what this version wrote, got: {said}")
    if "BrokenProcessPool" in kinds or re.search(r"worker.*(killed|exited unexpectedly)", text):
        return TemporaryError(
            f"a process at work was ended from outside: {text}; most often memory ran out: use fewer (train.workers)"
        )
    return _unforeseen(error)


def _unforeseen(error: Exception) -> UnforeseenError:
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "stage1_pro" in frame.filename] or frames
    where = f" ({os.path.basename(own[-1].filename)}:{own[-1].lineno})" if own else ""  # noqa: PTH119
    text = printable(" ".join(str(error).split()))
    return UnforeseenError(
        f"a fault of this program: {type(error).__name__}: {text}{where}; what was finished is kept. Please report it "
        "with what STAGE1_TRACEBACK=1 prints"
    )
