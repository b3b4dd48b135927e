"""Shared data, workers and quiet threads for every test."""

from __future__ import annotations

import os

# Workers share the cores: one thread each, said before anything loads torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import http.server
import itertools
import pwd
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from stage1_pro.continual.ledger.store import Store

# The same examples in every run, so that a change is judged by itself; HYPOTHESIS_PROFILE=explore draws new ones.
# The GPU script's machine may lack the library, and its tests do without.
with contextlib.suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("same", derandomize=True)
    settings.register_profile("explore", derandomize=False)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

pytest_plugins = ["kit.fixtures"]

REPOSITORY = Path(__file__).resolve().parents[1]
LEFT_OUT = pytest.StashKey[int]()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Give a worker to every core; none where less than a file is asked for, which then runs in this process."""
    if config.option.keyword or (config.args and all("::" in one for one in config.args)):
        return 0
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Count what the default selection leaves out; a worker tells it to the process that reports."""
    if config.option.markexpr == "not slow":
        config.stash[LEFT_OUT] = sum(item.get_closest_marker("slow") is not None for item in items)
        if hasattr(config, "workeroutput"):
            config.workeroutput["left_out"] = config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker counted."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what the default selection left out."""
    left_out = config.stash.get(LEFT_OUT, 0)
    if left_out:
        terminalreporter.write_line(f"{left_out} slow tests were left out; run them with: pytest -m slow")


def find_shared(name: str) -> Path:
    """Return ``shared/<name>``, looked for beside the repository or where STAGE1_SHARED says; skip when absent."""
    folder = Path(os.environ.get("STAGE1_SHARED", REPOSITORY.parent / "shared"))
    path = folder / name
    if not path.exists():
        pytest.skip(f"shared/{name} is not beside the repository; set STAGE1_SHARED to the folder that holds {name}")
    return path


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """The function ``shared(name) -> Path`` to real photos and weights, such as ``shared("data/roadwork_signs")``."""
    return find_shared


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout the tests lie in."""
    return REPOSITORY


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the ledger of built engines, keys and caches of tests out of the user's own folders."""
    os.environ["STAGE1_CONFIG"] = str(tmp_path_factory.mktemp("config"))
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def find_postgres() -> Path:
    """Return the folder of the newest PostgreSQL server's programs; skip when there is none."""
    on_path = shutil.which("initdb")
    folders = [Path(on_path).resolve().parent] if on_path else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    for folder in reversed(folders):
        if (folder / "initdb").is_file() and (folder / "pg_ctl").is_file():
            return folder
    pytest.skip("no PostgreSQL server: neither initdb on PATH nor in /usr/lib/postgresql/*/bin (Debian: postgresql)")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Callable[[str], str]]:
    """A PostgreSQL server of this session on a socket, no TCP; gives the function ``url(schema) -> str``."""
    programs = find_postgres()
    user = None
    if os.geteuid() == 0:
        # The server refuses to run as root.
        names = {one.pw_name for one in pwd.getpwall()}
        user = next((name for name in ("postgres", "nobody") if name in names), None)
        if user is None:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody to run it as")
    # Short, because a socket's path is at most 107 bytes; and not below pytest's folders, which are root's alone.
    folder = Path(tempfile.mkdtemp(prefix="stage1-pg-"))
    if user is not None:
        shutil.chown(folder, user)

    def call(program: str, *arguments: str) -> None:
        done = subprocess.run(
            [programs / program, *arguments], user=user, cwd=folder, capture_output=True, text=True, timeout=120,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
        )  # fmt: skip
        assert done.returncode == 0, f"{program}: {done.stderr}{done.stdout}"

    data, options = str(folder / "data"), f"-k {folder} -c listen_addresses= -c fsync=off -c max_connections=60"
    try:
        call("initdb", "-D", data, "-U", "stage1", "-A", "trust", "-E", "UTF8", "--no-sync")
        # The server must not hold this process's pipes, or nobody sees their end.
        call("pg_ctl", "-D", data, "-w", "-t", "60", "-o", options, "-l", str(folder / "log"), "start")
        try:
            yield lambda schema: f"postgresql+psycopg://stage1@/postgres?host={folder}&options=-csearch_path%3D{schema}"
        finally:
            call("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_SCHEMAS = itertools.count()


@pytest.fixture
def new_postgres_url(postgres_server: Callable[[str], str]) -> Callable[[], str]:
    """The function that makes a new, empty schema of PostgreSQL, and gives its URL: a database to whoever opens it."""
    import psycopg

    def make() -> str:
        name = f"test_{next(_SCHEMAS)}"
        address = postgres_server("public").replace("postgresql+psycopg", "postgresql")
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}")  # type: ignore[arg-type]
        return postgres_server(name)

    return make


@pytest.fixture
def postgres_url(new_postgres_url: Callable[[], str]) -> str:
    """The URL of one such schema."""
    return new_postgres_url()


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new, empty database: tests that ask for it run on SQLite and on PostgreSQL."""
    if request.param == "sqlite":
        return str(tmp_path / "loop.db")
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    """An empty store of the loop, on SQLite and on PostgreSQL in turn."""
    from stage1_pro.continual.ledger.store import Store

    opened = Store(store_url)
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def _same_torch_threads() -> None:
    """Give every test the same torch threads, whatever the one before it set; never import torch for that."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture
def hook() -> Iterator[tuple[str, list[bytes], list[int]]]:
    """A real server that answers with the statuses it is told, and keeps what it got."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(self.rfile.read(int(self.headers["Content-Length"])))
            status = answers.pop(0) if answers else 200
            if status == 0:
                time.sleep(1)
                status = 200
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "/elsewhere")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_args: object) -> None:
            pass

    got: list[bytes] = []
    answers: list[int] = []
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}/hook?secret=s3cret", got, answers
    running.shutdown()
    running.server_close()
    thread.join()
