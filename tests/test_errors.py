"""Every failure is one line with its own code: errors of libraries, of the system, and of what output goes to."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from stage1_pro import cli, progress
from stage1_pro.command import Result
from stage1_pro.errors import (
    PROMISE_FAILED,
    ArtifactError,
    DependencyError,
    InputError,
    Stage1Error,
    TemporaryError,
    UnforeseenError,
    explain,
    legible,
    out_of_memory,
)
from stage1_pro.files import write_bytes

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="/dev/full is Linux's")
SPELLINGS = [
    "CUDA out of memory. Tried to allocate 20.00 MiB",
    "CUDA error: out of memory",
    "MPS backend out of memory (MPS allocated: 1 GB)",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes",
    "DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes",
    "Failed to allocate memory for requested buffer of size 1000",
    "std::bad_alloc",
    "bad allocation",
    "cudaErrorMemoryAllocation",
    "Unable to allocate 1.00 TiB for an array",
    "Cannot allocate memory",
]


@pytest.mark.parametrize("text", SPELLINGS)
def test_memory_that_ran_out_is_known_in_every_spelling(text):
    assert out_of_memory(RuntimeError(text))
    assert isinstance(explain(RuntimeError(text)), TemporaryError)


def test_other_errors_are_not_taken_for_memory():
    for error in (
        RuntimeError("shapes do not match"),
        InputError("got out of memory.jpg"),
        OSError(errno.ENOENT, "no"),
    ):
        assert not out_of_memory(error)
    assert out_of_memory(MemoryError()) and out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))


def database(kind: str, said: str) -> Exception:
    sqlalchemy = pytest.importorskip("sqlalchemy")
    found: type[Exception] = getattr(sqlalchemy.exc, kind)
    return found("SELECT secret", {"password": "hunter2"}, Exception(said))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: OSError(errno.ENOSPC, "No space left on device", "a/b.pth"), TemporaryError, "a/b.pth"),
        (lambda: OSError(errno.EDQUOT, "Disk quota exceeded", b"a\xff"), TemporaryError, "quota"),
        (lambda: OSError(errno.EMFILE, "Too many open files"), TemporaryError, "ulimit -n"),
        (lambda: PermissionError(errno.EACCES, "Permission denied", "x"), InputError, "x"),
        (lambda: database("OperationalError", "database is locked"), TemporaryError, "database is locked"),
        (lambda: database("IntegrityError", "UNIQUE constraint failed"), ArtifactError, "UNIQUE"),
        (lambda: BrokenProcessPool("A process in the process pool was terminated"), TemporaryError, "terminated"),
        (lambda: RuntimeError("DataLoader worker (pid 7) is killed by signal"), TemporaryError, "train.workers"),
        (lambda: RecursionError("maximum recursion depth exceeded"), InputError, "nested"),
        (lambda: ModuleNotFoundError("No module named 'torch'", name="torch"), DependencyError, "[train]"),
        (lambda: ImportError("libfoo.so: cannot open shared object file"), DependencyError, "libfoo"),
        (lambda: KeyError("a\nb"), UnforeseenError, "KeyError"),
    ],
)  # fmt: skip
def test_what_libraries_raise_is_a_line_with_its_own_code(make, kind, words):
    found = explain(make())
    assert type(found) is kind
    assert words in str(found) and "\n" not in str(found)
    assert "hunter2" not in str(found) and "secret" not in str(found)


def test_every_kind_has_a_code_of_its_own_that_the_manual_names(repository):
    def below(kind: type[Stage1Error]) -> list[type[Stage1Error]]:
        return [kind, *(one for found in kind.__subclasses__() for one in below(found))]

    text = (repository / "python/stage1_pro/manual/exit-codes.md").read_text()
    named = {int(code) for cell in re.findall(r"^\| ([\d, ]+) \|", text, re.MULTILINE) for code in cell.split(",")}
    assert {kind.exit_code for kind in below(Stage1Error)} | {0, PROMISE_FAILED, 130, 143} == named


@needs_full
def test_a_full_disk_names_the_file_that_was_to_be_written(tmp_path, monkeypatch):
    def full(_: Path, data: bytes) -> None:
        with FULL.open("wb", buffering=0) as file:
            file.write(data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="here.bin") as caught:
        write_bytes(tmp_path / "here.bin", b"x")
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------- the command line


def stage1(*words: object, shell: str = "", **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a shell, which redirects its output by ``shell``."""
    command = 'exec "$0" -m stage1_pro.cli "$@" ' + shell
    return subprocess.run(
        ["sh", "-c", command, sys.executable, *map(str, words)], capture_output=True, text=True, **options
    )  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    for name in ("日本.png", "plain.png"):
        Image.fromarray(noise).save(folder / name)
    return folder


def test_output_that_is_not_utf_8_takes_every_name(tiny, photos):
    done = stage1("predict", "--bundle", tiny / "bundle", photos, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0, done.stderr
    assert r"\u65e5\u672c.png" in done.stdout and "plain.png" in done.stdout


@needs_full
@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_output_on_a_full_disk_is_a_line_and_a_code(tiny, photos, flags):
    done = stage1("predict", "--bundle", tiny / "bundle", photos, *flags, shell=">/dev/full")
    assert done.returncode == TemporaryError.exit_code
    assert len(done.stderr.splitlines()) <= 2 and "Traceback" not in done.stderr and "disk is full" in done.stderr


@pytest.mark.parametrize("shell", [">&-", "2>&-", ">&- 2>&-", "<&-"])
def test_closed_streams_take_nothing_away(tiny, photos, tmp_path, shell):
    done = stage1("predict", "--bundle", tiny / "bundle", photos, "--out", tmp_path / "out.csv", shell=shell)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out.csv").read_text(encoding="utf-8").splitlines()) == 3
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_work_ends_with_its_code_where_nobody_reads_what_is_said(tiny, photos, tmp_path, stream):
    (photos / "broken.jpg").write_bytes(b"no picture")
    read, write = os.pipe()
    os.close(read)
    words = ("predict", "--bundle", tiny / "bundle", photos, "--out", tmp_path / "out.csv")
    done = subprocess.run(
        [sys.executable, "-m", "stage1_pro.cli", *map(str, words)],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: write},
    )
    os.close(write)
    assert done.returncode == 1, done.stderr
    assert len((tmp_path / "out.csv").read_text(encoding="utf-8").splitlines()) == 4
    assert b"Traceback" not in (done.stderr or b"") and b"Exception" not in (done.stderr or b"")


@needs_full
@pytest.mark.parametrize("kind", ["full", "closed", "broken", "terminal"])
def test_a_message_that_nobody_hears_ends_no_work(kind, monkeypatch):
    class Broken(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

        def isatty(self) -> bool:
            return kind == "terminal"

    with FULL.open("w") if kind in ("full", "closed") else Broken() as stream:
        if kind == "closed":
            stream.close()
        monkeypatch.setattr(sys, "stderr", stream)
        progress.say("heard?")
        assert list(progress.track([1, 2], "work", 2)) == [1, 2]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text())
def test_no_text_commands_a_terminal(capsys, text):
    """Whatever names and files hold: results and messages are printed without what a terminal obeys."""
    cli._show(Result(text, None), as_json=False)
    progress.say(text)
    for shown in capsys.readouterr():
        assert shown.replace("\n", "").isprintable()
        assert shown.count("\n") in (text.count("\n") + 1, 0)
    assert legible("a\nÄ 日本 é") == "a\nÄ 日本 é"
    assert legible("\x1b[31m\u202e\r\x9b") == r"\x1b[31m\u202e\r\x9b"


def test_long_work_says_how_far_it_is_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "HEARTBEAT", 0.02)
    slow = (time.sleep(0.03) or one for one in range(5))
    assert list(progress.track(slow, "work", 105, done=100)) == [0, 1, 2, 3, 4]
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(re.fullmatch(r"work: 10\d/105, \d+\.\d/s, 0:00:\d\d left", line) for line in lines), lines


def test_a_fault_is_a_line_and_its_traceback_can_be_had(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import stage1_pro.commands.doctor as d\n\ndef fault():\n    return {}['nothing']\n\nd.doctor = fault\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = stage1("doctor", env=environment)
    assert done.returncode == UnforeseenError.exit_code
    assert "KeyError: 'nothing'" in done.stderr and len(done.stderr.splitlines()) == 1
    again = stage1("doctor", env={**environment, "STAGE1_TRACEBACK": "1"})
    assert again.returncode == UnforeseenError.exit_code and "Traceback" in again.stderr


@pytest.mark.parametrize(
    "words",
    [
        "continual status --root LOOP",
        "continual run --root LOOP",
        "keys list",
        "predict --bundle BUNDLE PHOTOS",
        "doctor",
    ],
)
def test_a_user_whom_the_system_does_not_know(words, tiny, photos, tmp_path):
    pytest.importorskip("sqlalchemy")
    from stage1_pro.continual.loop.folder import init

    stranger = ["unshare", "-U", "--map-user=12345"]
    if shutil.which("unshare") is None or subprocess.run([*stranger, "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    init(tmp_path / "loop", run=tiny, alpha=0.1, by="ada")
    named = words.replace("LOOP", str(tmp_path / "loop")).replace("BUNDLE", str(tiny / "bundle"))
    command = [*stranger, sys.executable, "-m", "stage1_pro.cli", *named.replace("PHOTOS", str(photos)).split()]
    unknown = ("HOME", "USER", "LOGNAME", "XDG_CONFIG_HOME", "STAGE1_CONFIG")
    kept = {key: value for key, value in os.environ.items() if key not in unknown}
    done = subprocess.run(command, capture_output=True, text=True, env=kept)
    assert "Traceback" not in done.stderr
    assert done.returncode == (2 if words == "keys list" else 0), done.stderr
    assert words != "keys list" or "STAGE1_CONFIG" in done.stderr
