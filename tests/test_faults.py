"""Killed is normal: after `kill -9` at any durable step, the same command finishes, and nothing is left lying about."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from faults import faults, leftovers

import stage1_pro
from stage1_pro.cli import main
from stage1_pro.continual.ledger import audit
from stage1_pro.continual.ledger.labels import read_events
from stage1_pro.continual.ledger.store import Store
from stage1_pro.continual.loop.folder import init, opened
from stage1_pro.continual.loop.history import History
from stage1_pro.continual.loop.rounds import remember_run
from stage1_pro.continual.serving.events import SKETCH_SIZE, Event, EventLog, ReviewPlan
from stage1_pro.continual.serving.live import POINTER
from stage1_pro.data.splits import Splits
from stage1_pro.errors import InputError
from stage1_pro.files import sha256_bytes, sha256_file, sweep


@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_init_finishes_what_it_began(tiny: Path, tmp_path: Path, database: str, request: pytest.FixtureRequest) -> None:
    root, late, number = tmp_path / "loop", 0, 0
    new = (lambda: root) if database == "sqlite" else request.getfixturevalue("new_postgres_url")
    with faults("stage1_pro.continual.loop.folder") as children:
        while True:
            words = ("continual", "init", "--root", root, "--run", tiny, "--alpha", ".1", "--store", new())
            ended = children.run(words, kill=number)
            if ended.rc == -9:
                again = children.run(words)
                # Only the last fsync and its tidying come after all that a loop needs.
                done = again.rc == 2 and "stage1 continual status" in again.err and (root / POINTER).is_file()
                assert again.rc == 0 or done, (number, ended.steps[-1], again.err)
                late += done
            assert leftovers(root) == []
            with opened(root) as (_, registry, _parts, loop):
                assert loop.resume().state == "MONITOR" and registry.alias("champion").version == 1
                assert audit.verify(registry.store).rows == 1
            assert children.run(words).rc == 2, "a loop that has begun begins once"
            if ended.rc != -9:
                break
            shutil.rmtree(root)
            number += 1
    assert ended.rc == 0 and late <= 2
    assert {"commit", "os.fsync"} < set(ended.steps) and any(POINTER in one for one in ended.steps)


@pytest.mark.slow
def test_split_finishes_what_it_began(streets: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    words = ("split", "--labels", streets / "labels.csv", "--out")
    with faults("stage1_pro.data.splits") as children:
        assert children.run((*words, whole)).rc == 0
        for number, ended in children.each((*words, run)):
            if ended.rc == -9:
                if (run / "splits.json").exists():
                    assert (run / "splits.json").read_bytes() == (whole / "splits.json").read_bytes()
                again = children.run((*words, run))
                assert again.rc == 0, (number, ended.steps[-1], again.err)
            assert leftovers(run) == []
            for name in ("splits.json", "quarantine.csv"):
                assert (run / name).read_bytes() == (whole / name).read_bytes()
            shutil.rmtree(run)
        assert ended.rc == 0 and number > 3


def decisions(bundle: str, batch: int, at: float) -> list[Event]:
    """Forty deferrals, drawn as the loop's own plan draws."""
    names = [f"{batch}-{number}" for number in range(40)]
    return [
        Event(
            id=name, time=at + number, bundle=bundle, image_sha256=sha256_bytes(name.encode()), action="defer",
            stage="B", label="none", prob_a=0.1, prob_b=0.1, confidence=0.9, gate_logit=None, exit_score=0.7,
            threshold=0.8, propensity=0.2, selected=ReviewPlan().selects(name, 0.2), sketch=(0.0,) * SKETCH_SIZE,
        )
        for number, name in enumerate(names)
    ]  # fmt: skip


@pytest.mark.slow
def test_compact_finishes_what_it_began_and_loses_nothing(tiny: Path, tmp_path: Path, store_url: str) -> None:
    """After each kill what is left is all there, and the next call goes on; then more of the past is served."""
    root, now = tmp_path / "loop", time.time()
    rounds = {"monitor": {"recent": 3}, "plan": {"novelty": 0.0}}
    champion = init(root, tiny, alpha=0.1, store=store_url, by="ada", config={"rounds": rounds}, now=now - 9e6)[
        "champion"
    ]
    served: list[Event] = []
    log = EventLog(root / "log", segment_bytes=10_000)

    def serve(batch: int) -> None:
        made = decisions(champion, batch, now - 2.4e6 + 9e4 * batch)
        for start in range(0, 40, 8):
            log.append(made[start : start + 8])
        kept = next(one for one in made if one.selected)
        log.images.put(kept.image_sha256, b"photo", now - 3e6)
        (log.folder / "pairs").mkdir(exist_ok=True)
        (log.folder / "pairs" / f"{'c' * 64}.jsonl").touch()
        served.extend(made)

    def held() -> tuple[Any, ...]:
        """What figures are of: all decisions by sums, and the rows that were selected."""
        with opened(root) as (config, registry, parts, loop):
            parts.ingest()
            with History.look(registry.store, config.rounds, now) as history:
                count = sum(one.n for one in history.hours(champion, 0.0))
            rows = {one.id for one in read_events(registry.store) if one.selected}
            seen = parts.status(loop.row().memory, registry.alias("champion"), now=now).model_dump()
            return count, rows, seen, audit.verify(registry.store).ok

    words = ("continual", "compact", "--root", root, "--keep", "1d", "--json")
    with faults("stage1_pro.continual.loop.folder") as children:
        number = 0
        while True:
            serve(number)
            whole = held()
            assert whole[0] == len(served) and whole[1] == {one.id for one in served if one.selected} and whole[3]
            ended = children.run(words, kill=number)
            assert held() == whole, (number, ended.steps[-1])
            if ended.rc != -9:
                break
            again = children.run(words)
            assert again.rc == 0, (number, ended.steps[-1], again.err)
            assert held() == whole
            number += 1
    found = json.loads(ended.out)
    assert ended.rc == 0 and number > 8 and {"commit"} < set(ended.steps)
    assert found["left"] < len(served) and 0 < found["events"] < 40 and found["files"] and found["photos"] == 1
    assert not list((log.folder / "pairs").iterdir()) and len(list(log.folder.glob("events-*"))) == 1


def test_a_sweep_takes_what_the_dead_left_and_not_what_the_living_write(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from stage1_pro.files import atomic_directory, atomic_path\n"
        "root = Path(sys.argv[1])\n"
        "with atomic_path(root / 'file'), atomic_directory(root / 'folder'):\n"
        "    print('writes', flush=True); sys.stdin.readline(); os.kill(os.getpid(), 9) if sys.argv[2] else None\n"
    )
    for dies in ("", "yes"):
        with subprocess.Popen(
            [sys.executable, "-c", code, tmp_path, dies], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == "writes\n"
            sweep(tmp_path)
            assert len(leftovers(tmp_path)) == 2
            writer.communicate("\n")
        assert writer.returncode == (-9 if dies else 0) and len(leftovers(tmp_path)) == (2 if dies else 0)
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    # The only copy of a folder that was moved aside stays for `recover_directory`.
    (tmp_path / ".gone.x.old" / "gone").mkdir(parents=True)
    sweep(tmp_path)
    assert (tmp_path / ".gone.x.old" / "gone").is_dir()


@pytest.fixture
def served(tiny: Path, tmp_path: Path) -> Path:
    """A loop whose log has three events that no look has seen."""
    root = tmp_path / "loop"
    begun = init(root, tiny, alpha=0.1, by="ada")
    with EventLog(root / "log") as log:
        log.append([
            Event(
                id=str(number), time=time.time(), bundle=begun["champion"], image_sha256=f"{number:064x}",
                action="exit", stage="A", label="none", prob_a=0.1, prob_b=None, confidence=0.9, gate_logit=None,
                exit_score=0.9, threshold=0.8, propensity=1.0, selected=False, sketch=(0.0,) * SKETCH_SIZE,
            )
            for number in range(3)
        ])  # fmt: skip
    return root


def shown(root: Path, *, before: Sequence[str] = ()) -> dict[str, Any]:
    """What ``status`` says as JSON; ``audit`` finds the chain whole at the same moment."""
    found: list[dict[str, Any]] = []
    for command in ("status", "audit"):
        words = [*before, sys.executable, "-m", "stage1_pro.cli", "continual", command, "--root", str(root), "--json"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, (done.stdout, done.stderr)
        found.append(json.loads(done.stdout))
    assert found[0]["state"] == "MONITOR" and found[1]["ok"]
    return found[0]


PLACES = {
    "read only": 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0"',
    "full": 'cp -a "$0" "$0.copy" && mount -t tmpfs -o size=32m none "$0" && cp -a "$0.copy/." "$0" && rm -r "$0.copy"'
    ' && ! head -c 40m /dev/zero 2>/dev/null > "$0/fill"',
}


def within(root: Path, place: str) -> Sequence[str]:
    """Words before a command that show it the folder on a disk that takes nothing."""
    before = ("unshare", "--mount", "--map-root-user", "sh", "-c", f'{PLACES[place]} && exec "$@"', str(root))
    if shutil.which("unshare") is None or subprocess.run([*before, "true"], check=False).returncode:
        pytest.skip("this system lets nobody mount a folder")
    return before


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_status_is_to_be_had_where_nothing_can_be_written(served: Path, place: str) -> None:
    def contents() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in served.rglob("*") if path.is_file()}

    before, kept = within(served, place), contents()
    found = shown(served, before=before)
    assert found["behind"] and found["monitor"]["n_rows"] == 0 and contents() == kept
    found = shown(served)
    assert found["behind"] is None and found["monitor"]["n_rows"] == 3
    assert shown(served, before=before)["monitor"]["n_rows"] == 3


@pytest.mark.slow
def test_status_is_to_be_had_beside_a_writer(served: Path) -> None:
    with contextlib.closing(sqlite3.connect(served / "loop.db", isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        found = shown(served)
        assert "locked" in found["behind"] and found["monitor"]["n_rows"] == 0 and time.monotonic() - began < 25
        writer.execute("ROLLBACK")
        # What a writer that was killed has in its log counts, and no write is needed to see it.
        writer.execute("PRAGMA wal_autocheckpoint=0")
        assert shown(served)["monitor"]["n_rows"] == 3
        copy = shutil.copytree(served, served.parent / "copy", ignore=shutil.ignore_patterns("*-shm"))
    assert (copy / "loop.db-wal").stat().st_size
    config = copy / "loop.json"
    config.write_text(config.read_text().replace(f'"{served}', f'"{copy}'))
    assert shown(copy, before=within(copy, "read only"))["monitor"]["n_rows"] == 3


@pytest.mark.parametrize("old", [False, True], ids=["never made", "of another version"])
def test_a_store_that_is_not_there_to_be_read_is_not_made(tmp_path: Path, old: bool) -> None:
    if old:
        sqlite3.connect(tmp_path / "loop.db").close()
        (tmp_path / "loop.db").touch()
    with pytest.raises(InputError):
        Store(tmp_path / "loop.db", read_only=True)
    assert not old or (tmp_path / "loop.db").stat().st_size == 0
    assert len(list(tmp_path.iterdir())) == old


def test_photos_that_moved_keep_the_model(streets: Path, streets_run: Path, tmp_path: Path) -> None:
    run, photos = shutil.copytree(streets_run, tmp_path / "run"), shutil.copytree(streets, tmp_path / "photos")
    before = Splits.read(run / "splits.json")
    for name in ("model_best.pth", "last.pth", "thresholds.json"):
        (run / name).write_text(name)
    stage1_pro.split(photos / "labels.csv", run, seed=0)
    after = Splits.read(run / "splits.json").verify()
    assert after.root != before.root and Path(after.root).samefile(photos)
    assert after.model_copy(update={"root": before.root}) == before
    # Under other names they are the same photos.
    (photos / "below").mkdir()
    text = (photos / "labels.csv").read_text()
    for row in before.rows:
        (photos / row.file).rename(photos / "below" / Path(row.file).name)
        text = text.replace(f"{row.file},", f"below/{Path(row.file).name},")
    (photos / "labels.csv").write_text(text)
    stage1_pro.split(photos / "labels.csv", run, seed=0)
    found = Splits.read(run / "splits.json").verify()
    assert [row.sha256 for row in found.rows] == [row.sha256 for row in before.rows]
    assert all(sha256_file(photos / row.file) == row.sha256 for row in found.rows)
    assert all((run / name).read_text() == name for name in ("model_best.pth", "last.pth", "thresholds.json"))
    # Other splits are other splits.
    with pytest.raises(InputError, match="--overwrite"):
        stage1_pro.split(photos / "labels.csv", run, seed=1)
    assert (run / "model_best.pth").is_file()
    stage1_pro.split(photos / "labels.csv", run, seed=1, overwrite=True)
    assert not any((run / name).exists() for name in ("model_best.pth", "last.pth", "thresholds.json"))


@pytest.mark.parametrize("old", [False, True], ids=["as written now", "with absolute paths"])
def test_a_loops_folder_can_move(served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], old: bool) -> None:
    def stage1(command: str, *words: object) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["continual", command, "--root", str(root), *map(str, words), "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    root, config = served, served / "loop.json"
    if old:
        given = json.loads(config.read_text()) | {"format_version": 1, "store": str(root), "log": str(root / "log")}
        config.write_text(json.dumps(given))
    else:
        assert str(tmp_path) not in config.read_text()
    labels = tmp_path / "labels.csv"
    labels.write_text("event_id,label,source,annotator\n0,none,owner,ada\n")
    assert stage1("labels", "--import", labels)["added"] == 1
    assert stage1("run")["state"] == "MONITOR"
    before = [stage1("status"), stage1("audit")]
    (tmp_path / "elsewhere").mkdir()
    root = served.rename(tmp_path / "elsewhere" / "moved")
    after = [stage1("status"), stage1("audit")]
    for one in (before[0], after[0]):
        assert one["behind"] is None and one["monitor"].pop("time")
    assert after == before and after[0]["monitor"]["n_rows"] == 3
    with EventLog(root / "log") as log:
        log.append([next(iter(log)).model_copy(update={"id": "later", "time": time.time()})])
    labels.write_text("event_id,label,source,annotator\nlater,none,owner,ada\n")
    assert stage1("labels", "--import", labels)["added"] == 1
    assert stage1("run")["state"] == "MONITOR" and stage1("status")["monitor"]["n_rows"] == 4
    assert stage1("propose")["state"] == "HOLD"
    with opened(root) as (_, registry, parts, loop):
        assert registry.root == root and parts.log.folder == root / "log" and loop.row().state == "HOLD"
        assert Path(str(registry.store.url.database)) == root / "loop.db"
    found = stage1("audit")
    assert found["ok"] and found["rows"] == before[1]["rows"] + 2
    assert not served.exists(), "nothing was made where the loop was"
    # What is neither there nor in the folder is named, and not made.
    config = root / "loop.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"store": str(tmp_path / "gone" / "store")}))
    (root / "loop.db").rename(tmp_path / "loop.db")
    assert main(["continual", "status", "--root", str(root)]) == 2
    assert str(tmp_path / "gone") in capsys.readouterr().err and not (tmp_path / "gone").exists()


def test_the_run_of_a_candidate_moves_with_the_loop(served: Path, tmp_path: Path) -> None:
    place = served / "work" / "key" / "files" / "run"
    place.mkdir(parents=True)
    remember_run(served, "a" * 64, place, "0")
    note = served / "runs" / f"{'a' * 64}.json"
    for text in (note.read_text(), json.dumps(json.loads(note.read_text()) | {"run": str(place)})):
        note.write_text(text)
        moved = served.rename(tmp_path / "moved")
        with opened(moved) as (_, _registry, parts, _loop):
            assert Path(parts._run("a" * 64).run) == moved / "work" / "key" / "files" / "run"
        moved.rename(served)
