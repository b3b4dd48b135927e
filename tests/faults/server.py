"""Forks a process for every command on stdin, kills it at a durable step, and says how it ended; see ``faults``."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event

from stage1_pro.cli import main

DURABLE = {"os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.truncate"}


def watch(kill: int | None, steps: Path) -> None:
    """Note every durable step of this process, and end it before number ``kill``."""
    owner, log = os.getpid(), os.open(steps, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    taken = 0

    def step(name: str) -> None:
        nonlocal taken
        if os.getpid() != owner:
            return
        os.write(log, f"{name}\n".encode())
        if taken == kill:
            os.kill(owner, signal.SIGKILL)
        taken += 1

    def before(name: str) -> Callable[..., Any]:
        act = getattr(os, name)

        def call(*arguments: Any) -> Any:
            step(f"os.{name}")
            return act(*arguments)

        return call

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name in DURABLE:
            step(f"{name} {arguments[0]}")

    for name in ("fsync", "fdatasync"):  # these alone have no audit event
        setattr(os, name, before(name))
    event.listen(Engine, "commit", lambda _: step("commit"))
    sys.addaudithook(hook)


def child(words: list[str], kill: int | None, folder: Path) -> None:
    """Run a command with its output in files; never returns."""
    for number in (1, 2):
        os.dup2(os.open(folder / str(number), os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    watch(kill, folder / "steps")
    code = 70
    try:
        code = main(words)
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Answer every line of stdin with one of stdout."""
    for module in sys.argv[1:]:
        importlib.import_module(module)
    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            pid = os.fork()
            if pid == 0:
                child(asked["words"], asked["kill"], folder)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            read = {key: (folder / key).read_text(errors="replace") for key in ("steps", "1", "2")}
        answer = {"rc": code, "steps": read["steps"].splitlines(), "out": read["1"], "err": read["2"]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
