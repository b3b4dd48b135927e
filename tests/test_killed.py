"""Every command that writes, killed at durable steps: run again it ends as if nothing had been, and nothing lies about.

STAGE1_EVERY_STEP=1 kills at every step instead of some (half an hour).
"""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults import Faults, faults, leftovers

pytest.importorskip("torch")

from stage1_pro.continual.serving.events import EventLog
from stage1_pro.data.splits import Splits
from stage1_pro.files import sha256_file
from stage1_pro.training.epochs import TIMINGS

MODULES = ("data.duplicates", "training.loop", "training.calibration", "training.evaluation", "deploy.onnx",
           "deploy.exporting", "deploy.prediction", "models.adapters", "studies.measuring")  # fmt: skip
TRAIN = (
    "--set train.workers=0 --set model.image_size=32 --set train.batch_size=32 --set train.save_every_steps=2 "
    "--set gate.folds=2"
)


@dataclass(frozen=True)
class Command:
    """A command in the life of a run; ``{w}`` is its folder, ``{p}`` the photos'.

    ``again`` is given once a file of that name is there; the command is killed from ``start`` on at every ``stride``th
    step; files and folders of ``loose`` differ from run to run.
    """

    words: str
    stride: int = 1
    start: int = 0
    again: tuple[str, str] | None = None
    loose: tuple[str, ...] = ()


LIFE = {
    "split": Command("split --labels {p}/labels.csv --out {w}/run"),
    "train": Command(f"train --run {{w}}/run --set train.epochs=1 {TRAIN}", 8, 1, ("run/config.json", "--resume")),
    "more epochs": Command("train --run {w}/run --resume --set train.epochs=2", 9, 4),
    # A choice that is made again is another look at these rows.
    "calibrate": Command("calibrate --run {w}/run --guarantee none --fnr .9", 2, loose=("run/claims.json",)),
    "evaluate": Command("evaluate --run {w}/run --replicates 20", 13),
    "export": Command("export --run {w}/run", 23, 10),
    "infer": Command(
        "infer --run {w}/run --split val_test --out {w}/infer.csv", 2, 0, ("infer.csv.partial.json", "--resume")
    ),
    "predict": Command(
        "predict --bundle {w}/run/bundle {p} --threads 1 --batch-size 8 --out {w}/predict.csv --log {w}/log", 7, 0,
        ("predict.csv.partial.json", "--resume"), ("log",),
    ),
    "metrics": Command("metrics {w}/infer.npz --replicates 20 --out {w}/metrics", 4),
    "keys": Command("keys new {w}/key", loose=("key", "key.pub")),
    "sign": Command("sign {w}/run/bundle --key {w}/key"),
    "train anew": Command(f"train --run {{w}}/run --overwrite --set train.epochs=1 {TRAIN}", 17, 3),
    "adapter": Command(
        f"train --run {{w}}/lora --mode lora --set model.tap=2 --set train.epochs=1 {TRAIN}", 18, 6,
        ("lora/config.json", "--resume"),
    ),
    "merge": Command("merge --adapter {w}/lora/adapter --base tiny --out {w}/merged", 3),
    "split anew": Command("split --labels {p}/labels.csv --out {w}/run --seed 3 --overwrite", 6),
}  # fmt: skip


@pytest.fixture(scope="module")
def children() -> Iterator[Faults]:
    with faults(*(f"stage1_pro.{name}" for name in MODULES)) as found:
        yield found


def words(command: Command, work: Path, photos: Path) -> list[str]:
    return [one.format(w=work, p=photos) for one in command.words.split()]


def prepared(name: str, work: Path) -> None:
    """What of a command's input no command makes."""
    if name == "metrics":
        import numpy as np

        with np.load(work / "run" / "val_select.npz") as found:
            np.savez(work / "infer.npz", logits=found["logits_a"], labels=found["labels"])
    if name == "adapter":
        (work / "lora").mkdir()
        for one in ("splits.json", "quarantine.csv"):
            shutil.copy(work / "run" / one, work / "lora" / one)


@pytest.fixture(scope="module")
def life(once: Callable[[str, Callable[[Path], object]], Path], streets: Path, children: Faults) -> Path:
    """A folder with the state before and after each command, undisturbed."""

    def make(folder: Path) -> None:
        work = folder / "work"
        work.mkdir(parents=True)
        for name, command in LIFE.items():
            prepared(name, work)
            shutil.copytree(work, folder / f"{name} before")
            ended = children.run(words(command, work, streets))
            assert ended.rc == 0, (name, ended.err)
            shutil.copytree(work, folder / f"{name} after")

    return once("life", make)


def contents(work: Path, loose: tuple[str, ...]) -> dict[str, str | list[dict[str, str]]]:
    """Every file's hash; tables of epochs without their timings."""
    found: dict[str, str | list[dict[str, str]]] = {}
    for path in work.rglob("*"):
        name = str(path.relative_to(work))
        if path.is_dir() or path.name in (".lock", "train.log") or name.startswith(loose):
            continue
        if path.name == "metrics.csv":
            rows = csv.DictReader(io.StringIO(path.read_text()))
            found[name] = [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]
        elif path.name == "splits.json" and path.parent.name != "bundle":
            # The way from the run to the photos is another in every folder of a test.
            found[name] = Splits.read(path).fingerprint()
        else:
            found[name] = sha256_file(path)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", LIFE)
def test_killed_at_a_durable_step_a_command_ends_the_same(
    name: str, life: Path, streets: Path, children: Faults, tmp_path: Path
) -> None:
    command, work, kills = LIFE[name], tmp_path / "work", 0
    every = bool(os.environ.get("STAGE1_EVERY_STEP"))
    wanted = contents(life / f"{name} after", command.loose)
    given = words(command, work, streets)
    shutil.copytree(life / f"{name} before", work)
    stride, start = (1, 0) if every else (command.stride, command.start)
    for number, ended in children.each(given, stride=stride, start=start):
        if ended.rc == -9:
            kills += 1
            there = command.again is not None and (work / command.again[0]).exists()
            again = children.run([*given, *([command.again[1]] if command.again and there else [])])
            # It may have been killed when all was written, and some commands refuse to do that again.
            done = again.rc == 2 and contents(work, command.loose) == wanted
            assert again.rc == 0 or done, (number, ended.steps[-1], again.err)
            assert "Traceback" not in again.err
        else:
            assert ended.rc == 0, ended.err
        found = contents(work, command.loose)
        assert found.keys() == wanted.keys(), (number, ended.steps[-1:], found.keys() ^ wanted.keys())
        assert found == wanted, (number, ended.steps[-1:], [key for key in found if found[key] != wanted[key]])
        # Images of a log go by their age.
        left = [one for one in leftovers(work) if not one.startswith("log/images")]
        assert left == [], (number, ended.steps[-1:])
        if name == "predict":
            events = [event.image_sha256 for event in EventLog(work / "log", read_only=True)]
            assert len(events) == len(set(events)) == 120
        shutil.rmtree(work)
        shutil.copytree(life / f"{name} before", work)
    assert kills > 1
