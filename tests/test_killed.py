"""Every command that writes, killed at durable steps: run again it ends as if nothing had been, and nothing lies about.

STAGE1_EVERY_STEP=1 kills at every step instead of some, of a proposal at every tenth (hours).
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shlex
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from faults import Faults, faults, leftovers

pytest.importorskip("torch")
pytest.importorskip("sqlalchemy")

import numpy as np
from kit.tiny import bright

from stage1_pro.continual.ledger.labels import Label
from stage1_pro.continual.serving.events import EventLog
from stage1_pro.continual.serving.live import LiveCascade
from stage1_pro.files import sha256_file, write_csv
from stage1_pro.training.epochs import TIMINGS

MODULES = ("data.duplicates", "training.loop", "training.calibration", "training.evaluation", "training.exploration",
           "training.certifying", "deploy.onnx", "deploy.exporting", "deploy.prediction", "models.adapters",
           "studies.measuring", "studies.comparing", "continual.loop.folder", "continual.learn.rlvr")  # fmt: skip
TRAIN = (
    "--set train.workers=0 --set model.image_size=32 --set train.batch_size=32 --set train.save_every_steps=2 "
    "--set gate.folds=2"
)
EXPLORE = (
    "explora --images {p}/images --run {w}/run --set explora.train=full --set explora.epochs=2 "
    "--set explora.decoder_warmup_epochs=0 --set explora.batch_size=16 --set explora.keep=adapted "
    "--set explora.save_every_steps=2 --set model.image_size=32 "
    "--set train.workers=0"
)
COMPARE = (
    f"compare --data {{p}}/labels.csv --out {{w}}/compared --config {{w}}/few.yaml {{w}}/more.yaml --seeds 1 "
    f"--replicates 50 {TRAIN}"
)
LOOP_CONFIG = """
loop: {executor: {kind: inline}, shadow_seconds: 0, shadow_pairs: 20, canary_seconds: 0, canary_pairs: 80,
  canary_share: 0.5}
rounds: {plan: {floor: 0.35, deferral: 0.9, entropy: 0.9, seed: 3}, least_rows: 8, least_guard: 8, steer: false,
  largest_slowdown: null, novelty_events: 100,
  terms: {require_certificate: false, margin: 5.0, fnr_margin: 1.0, n_replicates: 1000},
  tuning: [{epochs: 200, lr: 0.01, patience: 50}]}
"""
# The wall clock of the loop's commands stands still, and goes on by a minute from one to the next.
CLOCK = 1.8e9
# What records say of time, memory and the machine differs from run to run.
COSTS = {"seconds", "n_timed", "peak_memory", "machine"}


@dataclass(frozen=True)
class Command:
    """A command in the life of a run or loop; ``{w}`` is its folder, ``{p}`` the photos', ``{r}`` a trained run.

    ``again`` is given once a file of that name is there; the command is killed from ``start`` on at every ``stride``th
    step; files and folders of ``loose`` differ from run to run.
    """

    words: str
    stride: int = 1
    start: int = 0
    again: tuple[str, str] | None = None
    loose: tuple[str, ...] = ()


RUN = {
    "split": Command("split --labels {p}/labels.csv --out {w}/run"),
    "explora": Command(EXPLORE, 5, 1, ("run/explora/config.json", "--resume")),
    # Killed when all was written, it is set aside by the one that follows.
    "explora anew": Command(f"{EXPLORE} --overwrite --set seed=1", 13, 2, loose=("run/explora/.before",)),
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
    # Said again by whoever goes on; another beginning would be another claim.
    "certify": Command(
        "certify --run {w}/run --images {w}/pool --rows-independent --exit-error .9 --allow-useless --floor 1 "
        "--policy softmax --labels {w}/pool.csv", 3
    ),
    "train anew": Command(f"train --run {{w}}/run --overwrite --set train.epochs=1 {TRAIN}", 17, 3),
    "adapter": Command(
        f"train --run {{w}}/lora --mode lora --set model.tap=2 --set train.epochs=1 {TRAIN}", 18, 6,
        ("lora/config.json", "--resume"),
    ),
    "merge": Command("merge --adapter {w}/lora/adapter --base tiny --out {w}/merged", 3),
    "split anew": Command("split --labels {p}/labels.csv --out {w}/run --seed 3 --overwrite", 6),
}  # fmt: skip
# What tells of time alone.
COST = ("logs", "few/seed0/cost", "more/seed0/cost", "compare.csv", "compare.md", "figures/accuracy_seconds",
        "figures/augrc_seconds")  # fmt: skip
COMPARISON = {
    "compare": Command(f"{COMPARE} --no-test", 23, 5, loose=tuple(f"compared/{name}" for name in COST)),
    "compare on val_test": Command(COMPARE, 4),
}
LOOP = {
    "init": Command(
        "continual init --root {w}/loop --run {r} --alpha .05 --config {w}/loop.yaml --by ada",
        3,
        loose=("loop/log/log.json",),
    ),
    "ingest": Command("continual ingest --root {w}/loop"),
    "look": Command("continual run --root {w}/loop"),
    "import": Command("continual labels --root {w}/loop --import {w}/labels.csv"),
    "export labels": Command("continual labels --root {w}/loop --export {w}/labels_out.csv"),
    "export tasks": Command("continual labels --root {w}/loop --export {w}/tasks.json"),
    "export tables": Command("continual labels --root {w}/loop --export {w}/tables"),
    "import tasks": Command("continual labels --root {w}/loop --import {w}/answered.json"),
    "review": Command("continual review --root {w}/loop --reviewer eva"),
    "propose": Command("continual propose --root {w}/loop", 211, 30),
    "evaluate a candidate": Command("continual evaluate --root {w}/loop", 5),
    "promote": Command("continual promote --root {w}/loop --by ada"),
    "canary": Command("continual run --root {w}/loop"),
    "champion": Command("continual run --root {w}/loop"),
    "status": Command(
        "continual status --root {w}/loop --page {w}/s.html --metrics {w}/s.prom --grafana {w}/s.json", 5, 2
    ),
    "rollback": Command("continual rollback --root {w}/loop --by ada"),
    "monitor": Command("continual run --root {w}/loop"),
    "export audit": Command("continual audit --root {w}/loop --export {w}/audit.jsonl"),
    "purge": Command("review --store {w}/loop --purge --yes", 9, 3),
}
LIVES = {"run": RUN, "comparison": COMPARISON, "loop": LOOP}
NAMES = {name: life for life, commands in LIVES.items() for name in commands}


@pytest.fixture(scope="module")
def acknowledged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reviewer of a page notes what was acknowledged."""
    return tmp_path_factory.mktemp("review") / "acknowledged"


@pytest.fixture(scope="module")
def children(acknowledged: Path) -> Iterator[Faults]:
    reviewer = shlex.join([sys.executable, str(Path(__file__).parent / "faults" / "reviewer.py")])
    variables = {"BROWSER": f"{reviewer} %s", "DISPLAY": ":0", "ACKNOWLEDGED": str(acknowledged),
                 "TMPDIR": str(acknowledged.parent)}  # fmt: skip
    # Libraries that take seconds, besides.
    with faults("river.drift", "pyarrow.parquet", *(f"stage1_pro.{name}" for name in MODULES), env=variables) as found:
        yield found


def clock(name: str) -> float | None:
    """When a command of the loop runs; the time of photos is over at last."""
    if name == "certify":
        return CLOCK
    return CLOCK + 60 * list(LOOP).index(name) + 1e7 * (name == "purge") if name in LOOP else None


def serve(root: Path, photos: Path, count: int, name: str) -> None:
    """Decide on photos as the loop's champion, and candidate, half a minute before a command."""
    with EventLog(root / "log") as log:
        live = LiveCascade(root, threads=1, log=log, writer=name)
        for number, photo in enumerate(sorted(photos.iterdir())[:count]):
            live.predict([photo], now=(clock(name) or 0.0) - 30 + number / 10)


def prepared(name: str, work: Path, run: Path) -> None:
    """What of a command's input no command makes."""
    if name == "metrics":
        with np.load(work / "run" / "val_select.npz") as found:
            np.savez(work / "infer.npz", logits=found["logits_a"], labels=found["labels"])
    elif name == "certify":
        named = bright(work / "pool", 30, seed=91)
        write_csv(work / "pool.csv", [{"file": path.name, "label": label} for path, label in named], ["file", "label"])
    elif name == "adapter":
        (work / "lora").mkdir()
        for one in ("splits.json", "quarantine.csv"):
            shutil.copy(work / "run" / one, work / "lora" / one)
    elif name == "compare":
        for one, epochs in (("few", 1), ("more", 2)):
            (work / f"{one}.yaml").write_text(f"train: {{epochs: {epochs}}}\n")
    elif name == "init":
        (work / "loop.yaml").write_text(LOOP_CONFIG)
        bright(work.parent / "street", 240, seed=77)
    elif name == "ingest":
        serve(work / "loop", work.parent / "street", 240, name)
    elif name == "import":
        truth = {sha256_file(path): int(path.stem) % 2 for path in (work.parent / "street").iterdir()}
        selected = [event for event in EventLog(work / "loop" / "log", read_only=True) if event.selected]
        rows = [
            Label(
                event_id=one.id, label=("none", "roadwork")[truth[one.image_sha256]], source="owner", annotator="ada",
                time=one.time + 1,
            ).model_dump()
            for one in selected[:-20]
        ]  # fmt: skip
        write_csv(work / "labels.csv", rows, list(Label.model_fields))
    elif name == "import tasks":
        tasks = json.loads((work / "tasks.json").read_text())
        for number, task in enumerate([one for one in tasks if not one["annotations"]][:10]):
            choice = {"from_name": "label", "to_name": "image", "type": "choices", "value": {"choices": ["none"]}}
            task["annotations"].append({"id": number, "completed_by": 7, "result": [choice]})
        (work / "answered.json").write_text(json.dumps(tasks))
    elif name in ("canary", "champion"):
        serve(work / "loop", work.parent / "street", 60, name)


@pytest.fixture(scope="module")
def before(
    once: Callable[[str, Callable[[Path], object]], Path], streets: Path, bright_run: Path, children: Faults
) -> Callable[[str], Path]:
    """The function ``before(name)``: a folder as it is before a command, undisturbed."""

    def make(life: str, folder: Path) -> None:
        work = folder / "work"
        work.mkdir(parents=True)
        for name, command in LIVES[life].items():
            prepared(name, work, bright_run)
            shutil.copytree(work, folder / name)
            ended = children.run(told(command, work, streets, bright_run), clock=clock(name))
            assert ended.rc == 0, (name, ended.err)

    return lambda name: once(f"life of a {NAMES[name]}", lambda folder: make(NAMES[name], folder)) / name


def told(command: Command, work: Path, photos: Path, run: Path) -> list[str]:
    return [one.format(w=work, p=photos, r=run) for one in command.words.split()]


def contents(work: Path, loose: tuple[str, ...] = ()) -> dict[str, Any]:
    """Every file's hash; what is in a database, and tables and records without what they say of time and memory."""
    found: dict[str, Any] = {}
    for path in work.rglob("*"):
        name = str(path.relative_to(work))
        if path.is_dir() or path.name in (".lock", "train.log") or name.startswith(loose):
            continue
        if path.name == "metrics.csv":
            rows = csv.DictReader(io.StringIO(path.read_text()))
            found[name] = [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]
        elif path.name in ("compare.json", "test.json", "result.json"):
            text = path.read_text()
            found[name] = json.loads(text, object_pairs_hook=lambda pairs: {k: v for k, v in pairs if k not in COSTS})
        elif path.suffix == ".db":
            with contextlib.closing(sqlite3.connect(path)) as database:
                found[name] = list(database.iterdump())
        elif not path.name.endswith(("-wal", "-shm")):
            found[name] = sha256_file(path)
    return found


def answered(work: Path) -> set[str]:
    """The events that the reviewer answered or skipped, as a killed process left them."""
    with contextlib.closing(sqlite3.connect(f"{(work / 'loop' / 'loop.db').as_uri()}?mode=ro", uri=True)) as database:
        return {name for (name,) in database.execute("SELECT event_id FROM labels WHERE annotator = 'eva'")}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_killed_at_a_durable_step_a_command_ends_the_same(
    name: str, before: Callable[[str], Path], streets: Path, bright_run: Path, children: Faults, acknowledged: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    command, work, kills = LIVES[NAMES[name]][name], tmp_path / "work", 0
    every = bool(os.environ.get("STAGE1_EVERY_STEP"))
    given, now = told(command, work, streets, bright_run), clock(name)

    def begin() -> None:
        acknowledged.unlink(missing_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(before(name), work)

    begin()
    assert children.run(given, clock=now).rc == 0
    wanted = contents(work, command.loose)
    # A proposal takes most of its steps for photos, one like another.
    stride, start = (max(1, command.stride // 20), 0) if every else (command.stride, command.start)
    begin()
    for number, ended in children.each(given, stride=stride, start=start, clock=now):
        at = number, ended.steps[-1:]
        if ended.rc == -9:
            kills += 1
            if acknowledged.exists():
                assert {*acknowledged.read_text().split()} <= answered(work), (at, "an answer was lost")
            there = command.again is not None and (work / command.again[0]).exists()
            again = children.run([*given, *([command.again[1]] if command.again and there else [])], clock=now)
            # It may have been killed when all was written, and some commands refuse to do that again.
            done = again.rc == 2 and contents(work, command.loose) == wanted
            assert again.rc == 0 or done, (at, again.err)
            assert "Traceback" not in again.err
        else:
            assert ended.rc == 0, ended.err
            if name in LOOP:  # as if it had been killed behind its last step
                assert children.run(given, clock=now).rc in (0, 2)
        found = contents(work, command.loose)
        assert found.keys() == wanted.keys(), (at, found.keys() ^ wanted.keys())
        assert found == wanted, (at, [key for key in found if found[key] != wanted[key]])
        # Images of a log go by their age.
        left = [one for one in leftovers(work) if not one.startswith("log/images")]
        assert left == [], at
        if name == "predict":
            events = [event.image_sha256 for event in EventLog(work / "log", read_only=True)]
            assert len(events) == len(set(events)) == 120
        begin()
    assert kills > 1
