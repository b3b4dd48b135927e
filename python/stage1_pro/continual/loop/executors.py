"""Where the loop's long work runs, and how it is found again: a piece of work is named by the hash of its inputs.

Work is a function ``module:name`` from inputs (JSON) and a folder to a result (JSON); equal inputs give equal results.
The result is written last, with the hashes of the files beside it, so that killed work is done again and finished work
is found. Other processes run this module as a program.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from stage1_pro.errors import DependencyError, InputError, Stage1Error, need
from stage1_pro.files import locked, sha256_bytes, sha256_file, write_text
from stage1_pro.record import FileEntry, Record

RESULT = "result.json"
FILES = "files"
_REQUEST = "request.json"
_LOG = "log.txt"
_OUTCOME = "outcome.json"

# Package and module of a launcher.
_LAUNCHERS = {
    "torchrun": ("torch", "torch.distributed.run"), "accelerate": ("accelerate", "accelerate.commands.launch"),
}  # fmt: skip


class WorkError(Stage1Error):
    """A piece of work failed or took too long; nothing of it counts, and it can be tried again."""


class Work(Record):
    """``result.json`` of a finished piece of work."""

    format_version: Literal[1] = 1
    key: str = Field(description="sha256 of function and inputs")
    function: str
    inputs: dict[str, Any]
    result: dict[str, Any]
    files: dict[str, FileEntry] = Field(description="what it left in its folder")


class ExecutorConfig(Record):
    """Where work runs."""

    kind: Literal["inline", "subprocess", "torchrun", "accelerate", "ray"] = "subprocess"
    timeout: float = Field(24 * 3600.0, gt=0, description="seconds for one piece; inline work has none")
    arguments: list[str] = Field([], description="for torchrun or accelerate launch, such as --nproc-per-node=4")
    address: str | None = Field(None, description="of a Ray cluster; null: one is started here")
    resources: dict[str, float] = Field({}, description="for Ray: num_cpus, num_gpus")


class Executor(Protocol):
    """Runs a function with inputs and a folder somewhere, and gives its result."""

    def run(self, function: str, inputs: Mapping[str, Any], folder: Path, lock: int) -> dict[str, Any]:
        """The result; ``lock`` is the descriptor of the work's lock, which a child process holds while it works."""


def make_executor(config: ExecutorConfig) -> Executor:
    """The executor that a configuration names.

    Raises:
        DependencyError: Ray, torchrun or accelerate is not installed.
    """
    if config.kind == "inline":
        return Inline()
    if config.kind == "ray":
        return RayExecutor(config.address, dict(config.resources), config.timeout)
    if config.kind == "subprocess":
        return Launched((sys.executable, "-m"), config.timeout)
    package, module = _LAUNCHERS[config.kind]
    if importlib.util.find_spec(package) is None:
        raise need("train", package)
    return Launched((sys.executable, "-m", module, *config.arguments, "-m"), config.timeout)


def work_key(function: str, inputs: Mapping[str, Any]) -> str:
    """The name of a piece of work: sha256 of function and inputs as canonical JSON."""
    text = json.dumps({"function": function, "inputs": inputs}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256_bytes(text.encode())


def do_work(root: Path | str, function: str, inputs: Mapping[str, Any], executor: Executor) -> Work:
    """Do a piece of work, or find it done; of several processes that ask for it one does it and the others wait.

    Args:
        root: folder of all work; this one's is ``root/<key>``, its files are in ``files`` there.
        function: ``module:name``, of ``(inputs, folder) -> result``.
        inputs: JSON; all that the result depends on, files by their hash.
        executor: where.

    Raises:
        WorkError: it failed or took too long.
        Stage1Error: the function's own, of its own kind.
    """
    key = work_key(function, inputs)
    folder = Path(root) / key
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock") as lock:
        found = find_work(root, key)
        if found is not None:
            return found
        # The process that waited for this work may have been killed after the work ended well.
        result = None if (folder / RESULT).is_file() else _outcome(folder).get("result")
        if result is None:
            for name in (RESULT, _OUTCOME):
                (folder / name).unlink(missing_ok=True)
            if (folder / FILES).is_dir():
                shutil.rmtree(folder / FILES)
            (folder / FILES).mkdir()
            result = executor.run(function, inputs, folder / FILES, lock)
        work = Work(key=key, function=function, inputs=dict(inputs), result=result, files=_entries(folder / FILES))
        work.write(folder / RESULT)
        return work


def find_work(root: Path | str, key: str) -> Work | None:
    """A finished piece of work whose files are as it left them; None where there is none."""
    folder = Path(root) / key
    if not (folder / RESULT).is_file():
        return None
    work = Work.read(folder / RESULT)
    whole = work.key == key == work_key(work.function, work.inputs) and work.files == _entries(folder / FILES)
    return work if whole else None


# -------------------------------------------------------------------------------- where


@dataclass(frozen=True)
class Inline:
    """In this process."""

    def run(self, function: str, inputs: Mapping[str, Any], folder: Path, lock: int) -> dict[str, Any]:
        """The function's result."""
        del lock
        return _call(function, inputs, folder)


@dataclass(frozen=True)
class Launched:
    """In a fresh interpreter, or in those that a launcher such as torchrun starts; all are killed in the end.

    ``launcher`` holds the words before the module's name; the last is ``-m``.
    """

    launcher: Sequence[str]
    timeout: float

    def run(self, function: str, inputs: Mapping[str, Any], folder: Path, lock: int) -> dict[str, Any]:
        """The result that the process of rank 0 wrote.

        Raises:
            WorkError: it failed or took too long.
        """
        home = folder.parent
        request = {"function": function, "inputs": dict(inputs), "folder": str(folder), "timeout": self.timeout}
        (home / _REQUEST).write_text(json.dumps(request))
        with (home / _LOG).open("wb") as log:
            # It holds the work's lock, too: a loop that is killed and comes back waits for what it had started.
            process = subprocess.Popen(
                [*self.launcher, __name__, str(home / _REQUEST)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, pass_fds=[lock],
            )  # fmt: skip
            try:
                code: int | None = process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code is None:
            raise WorkError(f"{function} must be done in {self.timeout:g} s, got no result; see {home / _LOG}")
        outcome = _outcome(home)
        if "result" in outcome:
            result: dict[str, Any] = outcome["result"]
            return result
        if outcome:
            kinds = {kind.__name__: kind for kind in _kinds(Stage1Error)}
            raise kinds.get(outcome["kind"], WorkError)(outcome["error"])
        last = (home / _LOG).read_text("utf-8", "replace").strip().rpartition("\n")[2] or "it said nothing"
        ended = f"{function} ({shlex.join(self.launcher)}) ended with code {code}"
        raise WorkError(f"{ended}: {last}; see {home / _LOG}")


@dataclass(frozen=True)
class RayExecutor:
    """On a Ray cluster whose machines see the same folder; see ``ExecutorConfig``."""

    address: str | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    timeout: float = 24 * 3600.0

    def run(self, function: str, inputs: Mapping[str, Any], folder: Path, lock: int) -> dict[str, Any]:
        """The function's result."""
        del lock
        try:
            import ray
        except ImportError as error:
            raise need("ray", error.name or "ray") from error
        if not ray.is_initialized():
            ray.init(address=self.address, log_to_driver=False)
        task = ray.remote(_call).options(**self.resources).remote(function, dict(inputs), folder.resolve())
        try:
            result: dict[str, Any] = ray.get(task, timeout=self.timeout)
        except ray.exceptions.GetTimeoutError:
            ray.cancel(task, force=True)
            raise WorkError(f"{function} must be done in {self.timeout:g} s, got no result") from None
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Stage1Error):
                raise error.cause from None
            raise WorkError(f"{function} failed: {error.cause}") from None
        return result


# -------------------------------------------------------------------------------- helpers


def _call(function: str, inputs: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    module, _, name = function.partition(":")
    try:
        found: Callable[[Mapping[str, Any], Path], dict[str, Any]] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and not module.startswith(error.name):
            raise DependencyError(f"{function} needs {error.name}, which is not installed") from error
        raise InputError(f"function must be module:name that can be imported, got '{function}': {error}") from None
    # Through JSON, so that a result is the same wherever it was made.
    result: dict[str, Any] = json.loads(json.dumps(found(inputs, folder), allow_nan=False))
    return result


def _outcome(home: Path) -> dict[str, Any]:
    """What a process of rank 0 wrote of its work; empty where it did not come to that."""
    try:
        outcome: dict[str, Any] = json.loads((home / _OUTCOME).read_text())
    except (OSError, ValueError):
        return {}
    return outcome


def _kinds(kind: type[Stage1Error]) -> Iterator[type[Stage1Error]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _kinds(below)


def _entries(folder: Path) -> dict[str, FileEntry]:
    return {
        path.relative_to(folder).as_posix(): FileEntry(sha256=sha256_file(path), size=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def main(arguments: Sequence[str]) -> int:
    """Run one request in this process, of any rank; rank 0 writes the outcome."""
    request_path = Path(arguments[0])
    request = json.loads(request_path.read_text())
    # The process that waits may be gone.
    signal.setitimer(signal.ITIMER_REAL, request["timeout"] + 5)
    outcome: dict[str, Any]
    try:
        outcome = {"result": _call(request["function"], request["inputs"], Path(request["folder"]))}
    except Stage1Error as error:
        outcome = {"error": str(error), "kind": type(error).__name__}
    if os.environ.get("RANK", "0") == "0":
        write_text(request_path.with_name(_OUTCOME), json.dumps(outcome))
    return 0 if "result" in outcome else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
