"""Commands in surroundings that are not as usual: each ends with the right code, one line if any, and nothing torn."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import Ended, Faults, faults, leftovers
from kit.tiny import copy_run

pytest.importorskip("torch")
pytest.importorskip("sqlalchemy")

import numpy as np

from stage1_pro.continual.loop.folder import init
from stage1_pro.training.inference import infer_split, save_calibration

MODULES = ("data.duplicates", "training.calibration", "training.evaluation", "deploy.prediction", "deploy.trained",
           "studies.measuring", "continual.loop.folder")  # fmt: skip
# Those that write stand first; ``{w}`` is the folder of all of them, ``{p}`` that of photos with labels.
WRITERS = {
    "split": "split --labels {p}/labels.csv --out {w}/split",
    "train": "train --run {w}/split --set train.epochs=1 --set train.workers=0 --set model.image_size=32",
    "calibrate": "calibrate --run {w}/run --guarantee none --fnr .9",
    "evaluate": "evaluate --run {w}/run --replicates 20",
    "predict": "predict --bundle {w}/run/bundle {w}/run/images --out {w}/predict.csv --log {w}/log --threads 1",
    "infer": "infer --run {w}/run --split val_test --out {w}/infer.csv",
    "metrics": "metrics {w}/some.npz --replicates 20 --out {w}/metrics",
    "keys": "keys new {w}/key",
    "sign": "sign {w}/run/bundle --key {w}/key",
    "ingest": "continual ingest --root {w}/loop",
    "run": "continual run --root {w}/loop",
    "labels": "continual labels --root {w}/loop --export {w}/todo.csv",
}
READERS = {
    "verify": "verify {w}/run/bundle",
    "inspect": "inspect {w}/run/bundle",
    "table": "predict --bundle {w}/run/bundle {w}/run/images/00.png --threads 1",
    "status": "continual status --root {w}/loop",
    "audit": "continual audit --root {w}/loop",
    "doctor": "doctor",
    "plan": "plan --fnr .05",
}
COMMANDS = {**WRITERS, **READERS}
NOBODY = dict.fromkeys(("HOME", "USER", "LOGNAME", "XDG_CONFIG_HOME"))
SURROUNDINGS: dict[str, dict[str, Any]] = {
    "a user whom the system does not know": {"stranger": 12345, "env": NOBODY},
    "umask 077": {"umask": 0o077},
    "no HOME": {"env": NOBODY},
    "closed stdout": {"closed": [1]},
    "closed stderr": {"closed": [2]},
    "closed both": {"closed": [1, 2]},
    "cp1252": {"encoding": "cp1252"},
}


@pytest.fixture(scope="module")
def children() -> Iterator[Faults]:
    with faults(*(f"stage1_pro.{name}" for name in MODULES)) as found:
        yield found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> tuple[Path, Path]:
    """A folder with a run, its bundle and a loop, and a copy of it to be put in its place again."""
    folder = tmp_path_factory.mktemp("whole") / "w"
    run = copy_run(tiny, folder / "run")
    save_calibration(run, infer_split(run, "val_calib"))
    init(folder / "loop", run, alpha=0.5, by="ada")
    np.savez(folder / "some.npz", logits=np.eye(2)[[0, 1, 1, 0, 1]] * 3, labels=[0, 1, 0, 0, 1])
    return folder, shutil.copytree(folder, folder.with_name("copy"))


@pytest.fixture
def work(whole: tuple[Path, Path]) -> Path:
    """The folder as it was made."""
    shutil.rmtree(whole[0])
    return shutil.copytree(whole[1], whole[0])


@pytest.fixture(scope="module")
def usual(children: Faults, whole: tuple[Path, Path], streets: Path) -> dict[str, int]:
    """The code of each command in usual surroundings."""
    folder, copy = whole
    codes = {name: children.run(told(name, folder, streets)).rc for name in COMMANDS}
    shutil.rmtree(folder)
    shutil.copytree(copy, folder)
    assert set(codes.values()) <= {0, 2, 3, 7} and sum(code == 0 for code in codes.values()) > len(codes) - 3, codes
    return codes


def told(name: str, work: Path, streets: Path) -> list[str]:
    return [word.format(w=work, p=streets) for word in COMMANDS[name].split()]


def said_plainly(name: str, ended: Ended) -> None:
    if ended.refused:
        pytest.skip(f"this system does not allow it: {ended.refused}")
    for text in (ended.out, ended.err):
        assert "Traceback" not in text and "Exception ignored" not in text, (name, text)
    assert ended.rc not in (1, 70), (name, ended.err)
    assert ended.rc in (0, 7) or len([line for line in ended.err.splitlines() if "error: " in line]) <= 1, ended.err


def nothing_torn(work: Path) -> None:
    assert leftovers(work) == []
    for path in work.rglob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))
    for path in work.rglob("*.npz"):
        with np.load(path) as found:
            assert all(found[key].size >= 0 for key in found.files)


@pytest.mark.slow
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_commands_do_what_they_do_in_other_surroundings(
    name: str, children: Faults, work: Path, streets: Path, usual: dict[str, int]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*")}
    for command in COMMANDS:
        ended = children.run(told(command, work, streets), **SURROUNDINGS[name])
        said_plainly(command, ended)
        assert ended.rc == usual[command], (command, ended.err)
    nothing_torn(work)
    if name == "umask 077":
        new = [path for path in work.rglob("*") if before.get(path) != path.lstat().st_mtime_ns and path not in before]
        assert len(new) > 20
        open_to_others = [
            str(path) for path in new
            if stat.S_IMODE(path.lstat().st_mode) & 0o077 and not path.name.startswith("loop.db-")  # as loop.db is
        ]  # fmt: skip
        assert open_to_others == []


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 40])
def test_commands_on_a_disk_that_is_full(
    left: int, children: Faults, work: Path, streets: Path, usual: dict[str, int]
) -> None:
    full = 0
    for command in WRITERS:
        ended = children.run(told(command, work, streets), tmpfs=(str(work), left * 1024))
        said_plainly(command, ended)
        # What a command before it could not write is missing here.
        assert ended.rc in (usual[command], 75, 2, 4), (command, ended.rc, ended.err)
        full += ended.rc == 75
        nothing_torn(work)
    assert full > (0 if left else 4), "the disk must be full for some"


@pytest.mark.slow
def test_commands_where_nothing_can_be_written(
    children: Faults, work: Path, streets: Path, usual: dict[str, int]
) -> None:
    def contents() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in work.rglob("*") if path.is_file()}

    before = contents()
    for command in COMMANDS:
        ended = children.run(told(command, work, streets), read_only=str(work))
        said_plainly(command, ended)
        if command in READERS:
            assert ended.rc == usual[command], (command, ended.err)
        else:
            assert ended.rc in (2, 3, 4, 75), (command, ended.rc, ended.err)
    assert contents() == before


def clock(days: int) -> dict[str, str]:
    """Variables under which a process's clock is off by days; skips where Debian's faketime is not there."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not found:
        pytest.skip("libfaketime is not installed (Debian: faketime)")
    return {"LD_PRELOAD": str(found[0]), "FAKETIME": f"{days:+}d", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [lambda: clock(90), lambda: clock(-90), lambda: {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}],
    ids=["90 days ahead", "90 days back", "LC_ALL=C"],
)
def test_commands_under_another_clock_or_locale(
    variables: Callable[[], dict[str, str]], work: Path, streets: Path, usual: dict[str, int]
) -> None:
    (work / "run" / "images" / os.fsdecode("日本.png".encode())).symlink_to(work / "run" / "images" / "00.png")
    with faults("stage1_pro.training.evaluation", "stage1_pro.continual.loop.folder", env=variables()) as children:
        for command, text in COMMANDS.items():
            if command != "train":
                ended = children.run(told(command, work, streets))
                said_plainly(command, ended)
                # A clock that stands before what the loop has seen is refused by that name.
                early = "--root" in text and "now must not be before" in ended.err
                assert ended.rc == (2 if early else usual[command]), (command, ended.err)
        assert len((work / "predict.csv").read_bytes().splitlines()) == 18
    nothing_torn(work)


def test_what_takes_no_torch_does_so_too(tiny: Path, tmp_path: Path) -> None:
    """A few of these for the quick suite."""
    work = tmp_path / "w"
    bundle = shutil.copytree(tiny / "bundle", work / "run" / "bundle")
    shutil.copytree(tiny / "images", work / "run" / "images")
    np.savez(work / "some.npz", logits=np.eye(2)[[0, 1, 1, 0, 1]] * 3, labels=[0, 1, 0, 0, 1])
    with faults("stage1_pro.deploy.prediction", "stage1_pro.studies.measuring") as children:
        for number, where in enumerate(SURROUNDINGS.values()):
            for command in ("predict", "metrics", "keys", "verify", "inspect"):
                ended = children.run(
                    [word.replace("{w}/key", f"{work}/key{number}") for word in told_of(command, work)], **where
                )
                if ended.refused:
                    continue
                said_plainly(command, ended)
                assert ended.rc == 0, (command, ended.err)
        key = stat.S_IMODE((work / "key1").stat().st_mode)
        assert key == 0o600 and (work / "log").is_dir() and bundle.is_dir()
    nothing_torn(work)


def told_of(name: str, work: Path) -> list[str]:
    return [word if "key" in word else word.format(w=work) for word in COMMANDS[name].split()]
