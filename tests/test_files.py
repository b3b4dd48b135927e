"""Files on disk: one lock that a killed holder frees, modes, YAML, and what a wrong value is told."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from stage1_pro.config import load_config
from stage1_pro.errors import InputError
from stage1_pro.files import atomic_directory, locked, recover_directory, sweep, write_csv, write_text
from stage1_pro.record import Record, parse_yaml, read_yaml, wrong

HOLD = "import os, sys, time; from stage1_pro.files import locked\nwith locked(sys.argv[1]) as lock:\n"


def holding(path: Path, then: str) -> subprocess.Popen:
    """A process that holds the lock and has said so; then it does what it is told."""
    code = f"{HOLD}    print('held', flush=True)\n    {then}"
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


def test_a_killed_holder_frees_the_lock_and_leaves_nothing_that_blocks(tmp_path):
    path = tmp_path / ".lock"
    holder = holding(path, "time.sleep(600)")
    with pytest.raises(InputError, match="the folder is taken"), locked(path, wait=0, busy="the folder is taken"):
        pass
    start = time.monotonic()
    with pytest.raises(InputError), locked(path, wait=0.2):
        pass
    assert time.monotonic() - start >= 0.2
    holder.kill()
    holder.communicate()
    with locked(path, wait=0):
        assert [p.name for p in tmp_path.iterdir()] == [".lock"]
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_waiting_process_goes_on_when_the_holder_ends(tmp_path):
    path = tmp_path / ".lock"
    holder = holding(path, "time.sleep(.5)")
    with locked(path):
        assert holder.wait(5) == 0 or holder.poll() is None
    holder.communicate()


def test_a_forked_child_does_not_keep_a_killed_holders_lock(tmp_path):
    """Decoders are forked; one that outlives its trainer must not block the next training."""
    path = tmp_path / ".lock"
    fork = "child = os.fork()\n    if child == 0: time.sleep(600)\n    print(child, flush=True); time.sleep(600)"
    holder = holding(path, fork)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    holder.kill()
    holder.wait()
    try:
        with locked(path, wait=5):
            os.kill(child, 0)  # it lives still
    finally:
        os.kill(child, 9)
        holder.stdout.close()


def test_a_started_child_keeps_the_lock_that_it_was_given(tmp_path):
    path = tmp_path / ".lock"
    start = (
        "import subprocess; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " pass_fds=[lock], stdout=subprocess.DEVNULL); print(child.pid, flush=True); time.sleep(600)"
    )
    holder = holding(path, start)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    holder.kill()
    holder.communicate()
    try:
        with pytest.raises(InputError), locked(path, wait=0.2):
            pass
    finally:
        os.kill(child, 9)
    with locked(path, wait=5):
        pass


def test_threads_of_one_process_exclude_each_other(tmp_path):
    path, inside, most = tmp_path / ".lock", [], []

    def work():
        for _ in range(20):
            with locked(path):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 80 and max(most) == 1


def test_a_thread_that_would_wait_for_itself_is_told(tmp_path):
    with locked(tmp_path / ".lock"):
        with pytest.raises(RuntimeError), locked(tmp_path / ".lock"):
            pass
        with pytest.raises(InputError), locked(tmp_path / ".lock", wait=0):
            pass


def test_a_lock_makes_no_folder_and_follows_no_link(tmp_path):
    with pytest.raises(FileNotFoundError), locked(tmp_path / "none" / ".lock"):
        pass
    assert not list(tmp_path.iterdir())
    (tmp_path / "kept").write_text("kept")
    (tmp_path / ".lock").symlink_to(tmp_path / "kept")
    with pytest.raises(OSError), locked(tmp_path / ".lock", wait=0):  # noqa: PT011 - ELOOP has no class of its own
        pass
    assert (tmp_path / "kept").read_text() == "kept"


@pytest.mark.parametrize(
    "module", ["deploy.cascade", "deploy.prediction", "data.splits", "training.run", "continual.loop.rounds", "cli"]
)
def test_the_package_imports_where_there_is_no_fcntl(module):
    code = f"import sys; sys.modules['fcntl'] = None; import stage1_pro.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_what_is_written_has_the_mode_that_umask_leaves(tmp_path, umask):
    """The shell's own ``touch`` and ``mkdir`` under the same umask are the judge."""
    code = (
        "import sys; from pathlib import Path; from stage1_pro.files import atomic_directory, write_text\n"
        "root = Path(sys.argv[1]); write_text(root / 'a', 'x'); write_text(root / 'secret', 'x', mode=0o600)\n"
        "with atomic_directory(root / 'd') as folder: (folder / 'f').write_text('x')\n"
    )
    command = f'umask {umask:03o}; cd "$0"; touch file; mkdir folder; exec "$1" -c "$2" .'
    subprocess.run(["/bin/sh", "-c", command, tmp_path, sys.executable, code], check=True)
    mode = {path.name: path.stat().st_mode & 0o777 for path in (*tmp_path.iterdir(), tmp_path / "d" / "f")}
    assert mode["a"] == mode["f"] == mode["file"] and mode["d"] == mode["folder"]
    assert mode["secret"] == 0o600


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="/proc names the file behind a descriptor")
@pytest.mark.parametrize("before", [False, True], ids=["new", "in the place of another"])
def test_content_is_on_disk_before_it_has_its_name_and_the_name_after(tmp_path, monkeypatch, before):
    """A power cut finds the old or the new, never an empty file under the new one's name."""
    seen: list[tuple[str, str]] = []
    sync, rename = os.fsync, Path.replace

    def synced(descriptor):
        seen.append(("sync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        sync(descriptor)

    def renamed(path, target):
        seen.append((str(path), str(target)))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    for _ in range(1 + before):
        seen.clear()
        write_text(tmp_path / "file", "x")
        (temporary, _), place = next((one, k) for k, one in enumerate(seen) if one[1] == str(tmp_path / "file"))
        assert ("sync", temporary) in seen[:place] and ("sync", str(tmp_path)) in seen[place:]
        seen.clear()
        with atomic_directory(tmp_path / "folder") as staging:
            (staging / "deep").mkdir()
            for name in ("a", "deep/b"):
                (staging / name).write_text(name)
        place = seen.index((str(staging), str(tmp_path / "folder")))
        assert {("sync", str(staging / name)) for name in ("a", "deep/b")} <= set(seen[:place])
        assert ("sync", str(tmp_path)) in seen[place:]


@pytest.mark.parametrize(
    "data",
    [
        b"a: [",
        b"- 1",
        b"1",
        b"\xff\xfe",
        b"a: 2001-99-99",
        b"[" * 100_000,
        b"a: !!python/object:os.system {}",
        b"a: \x07",
    ],
)
def test_yaml_that_is_none_is_told_in_one_line(tmp_path, data):
    (tmp_path / "c.yaml").write_bytes(data)
    with pytest.raises(InputError, match=r"c\.yaml must") as error:
        read_yaml(tmp_path / "c.yaml")
    assert str(error.value).isprintable()


def test_yaml_gives_keys_and_values(tmp_path):
    (tmp_path / "c.yaml").write_text("a: {b: 1}\nc: [x]\n")
    assert read_yaml(tmp_path / "c.yaml") == {"a": {"b": 1}, "c": ["x"]}
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "c.yaml") == {}
    for path in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(InputError, match=path.name):
            read_yaml(path)


class Part(Record):
    rate: float = Field(0.5, gt=0, lt=1)
    kind: Literal["gate", "softmax"] = "gate"


class Whole(Record):
    n: int
    part: Part = Part()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"n": "many"}, "n must be a whole number, got 'many'"),
        ({"n": 1, "part": {"rate": 1.5}}, "part.rate must be less than 1, got 1.5"),
        ({"n": 1, "part": {"kind": "gat"}}, "part.kind must be one of gate, softmax, got 'gat'; did you mean 'gate'?"),
        ({"n": 1, "part": 3}, "part must be keys and values, got 3"),
        ({}, "n must be given, got nothing"),
        ({"n": 1, "m": 2}, "m must be left out, got 2; nothing has this name here"),
        ({"n": "\x1b[2J"}, r"n must be a whole number, got '\x1b[2J'"),
    ],
)
def test_a_wrong_value_is_told_with_its_place(values, told):
    with pytest.raises(ValidationError) as error:
        Whole.model_validate(values)
    assert wrong(error.value) == told


BOMB = "\n".join(
    ["a: &a [x, x, x, x, x, x, x, x, x]"]
    + [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefghi")]
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "a reference to another place"),
        ("model: " + "[" * 5000, "more than 40 levels"),
        ("seed: " + "9" * 5000, "a number of 5000 digits"),
            ("seed: 0x" + "f" * 5000, "a number of 5002 digits"),
            ("seed: !!int ''", "list index|IndexError|string index"),
            ("seed: !!bool x", "x"),
            ("seed: !!timestamp x", "NoneType"),
            ("".join(f"k{i}: 1\n" for i in range(9000)) + "k8999: 2\n", "the key k8999 more than once"),
        ("seed: 1\ntrain: {}\nseed: 2\n", "the key seed more than once"),
        ("train: {epochs: 1, epochs: 2}", "the key epochs more than once"),
        ("#" * (1 << 20) + "#", "bytes"),
        ("a: !!python/object/apply:os.system [x]", "python/object"),
        ("a: [", "expected"),
    ],
)  # fmt: skip
def test_yaml_that_would_cost_or_hide_something_is_refused_at_once(tmp_path, text, words):
    path = tmp_path / "some.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(InputError, match=words) as caught:
        read_yaml(path)
    assert time.process_time() - began < 2
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    if words != "bytes":
        with pytest.raises(InputError):
            load_config(None, [f"train={text}"])


def test_yaml_that_is_no_plain_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", tmp_path, Path("/dev/zero")):
        with pytest.raises(InputError):
            read_yaml(path)


def test_times_and_names_are_no_numbers():
    found = parse_yaml("[1:30, 1_000, 010, .5, 1.5e+3, 0x10, -.inf, 12, -3.5, yes]")
    assert found == ["1:30", "1_000", "010", 0.5, 1500, 16, -math.inf, 12, -3.5, True]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=20,
    )
)
def test_what_is_dumped_is_read_as_it_was(value):
    assert parse_yaml(yaml.dump(value, Dumper=NoReferences)) == value


class NoReferences(yaml.SafeDumper):
    def ignore_aliases(self, _):
        return True


@given(st.lists(st.one_of(
    st.text(alphabet="'=+-@\ta1.", max_size=6),
    st.sampled_from(["=cmd|' /C calc'!A0", "@SUM(1).jpg", "+1.jpg", "-3", "+1e5", "'=x", "a=b", "-"]),
), min_size=1, max_size=8))  # fmt: skip
def test_no_cell_is_run_by_a_spreadsheet_and_all_come_back(cells: list[str]) -> None:
    from stage1_pro.data.tables import read_table

    cells = [cell.strip() or "x" for cell in cells]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.csv"
        write_csv(path, [{"file": cell, "n": -1.5} for cell in cells], ["file", "n"])
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                assert row["n"] == "-1.5"
                if row["file"][0] in "=+-@\t\r":
                    float(row["file"])
        assert read_table(path, ["file", "n"]).column("file") == cells


@pytest.mark.parametrize(
    "name", ["esc\x1b[31mred.jpg", "two\nlines.jpg", "\u202egpj.jpg", "a\u2066b.jpg", "c\x9bd.jpg"]
)
def test_names_reach_a_terminal_as_one_plain_line(name: str) -> None:
    from stage1_pro.deploy.prediction import COLUMNS, render

    said = render([dict.fromkeys(COLUMNS) | {"file": name, "error": f"{name}: is no image"}])
    assert all(line.isprintable() for line in said.split("\n")) and len(said.split("\n")) == 3


@pytest.mark.parametrize("name", ["run[1]", "a*b", "what?", "[!x]", "plain"])
def test_names_are_no_patterns(tmp_path: Path, name: str) -> None:
    mine, others = f".{name}.x1.tmp", [".run1.x1.tmp", ".aXb.x1.tmp", ".whatX.x1.tmp", ".y.x1.tmp", ".plainer.x1.tmp"]
    for one in (mine, *others):
        (tmp_path / one).touch()
    sweep(tmp_path, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
    (tmp_path / f".{name}.x2.old" / name).mkdir(parents=True)
    recover_directory(tmp_path / name)
    assert (tmp_path / name).is_dir()
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_that_is_replaced_is_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, before = tmp_path / "b", tmp_path / "b.before"

    def write(text: str) -> None:
        with atomic_directory(folder, keep=True) as staging:
            (staging / "x").write_text(text)

    write("1")
    assert not before.exists()
    write("2")
    write("3")
    assert ((folder / "x").read_text(), (before / "x").read_text()) == ("3", "2")
    replace, moves = Path.replace, []

    def dies(self: Path, to: Path) -> Path:
        if moves:
            raise KeyboardInterrupt
        moves.append(to)
        return replace(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            write("4")
    assert not folder.exists()
    recover_directory(folder)
    assert ((folder / "x").read_text(), (before / "x").read_text()) == ("3", "2")
    write("5")
    assert ((folder / "x").read_text(), (before / "x").read_text()) == ("5", "3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "b.before"]


def test_a_folder_of_ones_own_is_never_taken_for_a_backup(tmp_path: Path) -> None:
    folder, own = tmp_path / "b", tmp_path / "b.before"
    own.mkdir()
    (own / "diary").write_text("mine")
    recover_directory(folder)
    assert not folder.exists()
    for keep in (False, True):
        with atomic_directory(folder) as staging:
            (staging / "x").write_text("1")
        refused = pytest.raises(InputError, match="move it away") if keep else contextlib.nullcontext()
        with refused, atomic_directory(folder, keep=keep) as staging:
            (staging / "x").write_text("2")
        assert (own / "diary").read_text() == "mine"
        assert (folder / "x").read_text() == ("1" if keep else "2")
