"""Commands that are killed at each of their durable steps: before every commit, rename, link, removal and fsync.

A server process loads the package once and forks a child for every run, which `kill -9` ends before its n-th step.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, -9 where it was killed before ``step``; the names of the steps it took."""

    rc: int
    steps: list[str]
    out: str
    err: str
    refused: str = ""


class Faults:
    """Runs of the command line in processes of their own."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server

    def run(
        self, words: Sequence[object], *, kill: int | None = None, clock: float | None = None, **where: Any
    ) -> Ended:
        """One command; killed before its durable step number ``kill``, counted from 0, if it takes so many.

        Its wall clock stands at ``clock``, so that the same command writes the same times again.
        ``where`` are its surroundings: ``stranger`` (a number of a user whom the system does not know), ``env`` (None
        takes a variable away), ``umask``, ``encoding`` of its output, ``closed`` streams, ``read_only`` (a folder), and
        ``tmpfs`` (a folder, and how many bytes are left of the disk that it lies on). Steps are told without any. Where
        the system does not allow them, ``refused`` says why.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(
            json.dumps({"words": [str(one) for one in words], "kill": kill, "clock": clock, "where": where}) + "\n"
        )
        self._server.stdin.flush()
        return Ended(**json.loads(self._server.stdout.readline()))

    def each(
        self, words: Sequence[object], *, stride: int = 1, start: int = 0, clock: float | None = None
    ) -> Iterator[tuple[int, Ended]]:
        """The command killed before its step ``start``, and every ``stride`` later, and at last not at all.

        The caller brings its folders into the state before the command again, after each.
        """
        number = start
        while True:
            ended = self.run(words, kill=number, clock=clock)
            yield number, ended
            if ended.rc != -9:
                return
            number += stride


@contextlib.contextmanager
def faults(*modules: str, env: dict[str, str] | None = None) -> Iterator[Faults]:
    """A server, with variables of its own, that has loaded the command line and ``modules`` for its children."""
    here = Path(__file__).parent / "server.py"
    with subprocess.Popen(
        [sys.executable, here, *modules], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    ) as server:  # fmt: skip
        yield Faults(server)
        assert server.stdin is not None
        server.stdin.close()


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders of killed writers below a folder."""
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob(".*") if path.suffix in (".tmp", ".old")
    )  # fmt: skip
