"""Forks a process for every command on stdin, kills it at a durable step, and says how it ended; see ``faults``."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event

from stage1_pro.cli import main

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_USER, _NEW_MOUNTS = 0x1000_0000, 0x0002_0000
_READ_ONLY, _REMOUNT, _BIND = 1, 32, 4096
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


def settle(where: dict[str, Any]) -> None:
    """Put this process into surroundings, as ``Faults.run`` describes them."""
    if any(name in where for name in ("stranger", "tmpfs", "read_only")):
        _own_namespace(as_user=int(where.get("stranger", 0)))
    for name, value in where.get("env", {}).items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    os.umask(where.get("umask", 0o022))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding=where.get("encoding", "utf-8"), errors="strict")  # type: ignore[union-attr]
    if "read_only" in where:
        _mount(where["read_only"], where["read_only"], None, _BIND, None)
        _mount(None, where["read_only"], None, _BIND | _REMOUNT | _READ_ONLY, None)
    if "tmpfs" in where:
        _onto_a_disk(*where["tmpfs"])
    for number in where.get("closed", ()):
        os.close(number)
        setattr(sys, {1: "stdout", 2: "stderr"}[number], None)  # as Python starts without them


def _onto_a_disk(path: str, left: int) -> None:
    """Let a folder lie on a disk of its own that has ``left`` bytes left."""
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(path, copy, symlinks=True, dirs_exist_ok=True)
        _mount("none", path, "tmpfs", 0, "size=32m")
        shutil.copytree(copy, path, symlinks=True, dirs_exist_ok=True)
    with (Path(path) / "fill").open("wb", buffering=0) as fill:
        with contextlib.suppress(OSError):
            while fill.write(bytes(1 << 16)):
                pass
        fill.truncate(max(0, fill.tell() - left))


def _own_namespace(as_user: int) -> None:
    user, group = os.getuid(), os.getgid()
    if _LIBC.unshare(_NEW_USER | _NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{as_user} {user} 1"), ("gid_map", f"{as_user} {group} 1")):
        Path(f"/proc/self/{name}").write_text(text)


def _mount(what: str | None, path: str, kind: str | None, flags: int, data: str | None) -> None:
    words = [None if one is None else os.fsencode(one) for one in (what, path, kind, data)]
    if _LIBC.mount(*words[:3], flags, words[3]):
        raise OSError(ctypes.get_errno(), "mount", path)


def child(words: list[str], kill: int | None, clock: float | None, where: dict[str, Any], folder: Path) -> None:
    """Run a command with its output in files; never returns."""
    for number in (1, 2):
        os.dup2(os.open(folder / str(number), os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        settle(where)
    except OSError as error:
        (folder / "refused").write_text(str(error))
        os._exit(0)
    if clock is not None:
        time.time = lambda: clock
    if not where:
        watch(kill, folder / "steps")
    code = 70
    try:
        code = main(words)
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        if "tmpfs" in where:  # it goes with this process
            (Path(where["tmpfs"][0]) / "fill").unlink()
            shutil.copytree(where["tmpfs"][0], folder / "left", symlinks=True)
        os._exit(code)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


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
                child(asked["words"], asked["kill"], asked["clock"], asked["where"], folder)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            read = {key: _text(folder / key) for key in ("steps", "1", "2", "refused")}
            if (folder / "left").exists():
                shutil.rmtree(asked["where"]["tmpfs"][0])
                shutil.copytree(folder / "left", asked["where"]["tmpfs"][0], symlinks=True)
        answer = {
            "rc": code, "steps": read["steps"].splitlines(), "out": read["1"], "err": read["2"],
            "refused": read["refused"],
        }  # fmt: skip
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
