"""The state machine: every edge survives kill -9 with the same verdict, and work is done once."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sqlalchemy", reason="the loop needs [continual]")
pytest.importorskip("torch", reason="bundles are exported with [train]")

from kit.loop_parts import Parts, promote, read_pointer
from kit.tiny import bright, copy_run

from stage1_pro.cli import main
from stage1_pro.continual.ledger import audit
from stage1_pro.continual.ledger.labels import Label, add_labels, ingest, read_events
from stage1_pro.continual.ledger.store import Store
from stage1_pro.continual.loop.executors import (
    ExecutorConfig,
    Inline,
    Launched,
    RayExecutor,
    WorkError,
    do_work,
    find_work,
    make_executor,
)
from stage1_pro.continual.loop.folder import LoopFile, opened
from stage1_pro.continual.loop.machine import EDGES, Loop, LoopConfig, Watched, read_verdict
from stage1_pro.continual.loop.registry import LostRaceError, Registry
from stage1_pro.continual.serving.events import EventLog, ReviewPlan
from stage1_pro.continual.serving.live import LiveCascade
from stage1_pro.continual.watch.alerts import Alert, Delivery
from stage1_pro.continual.watch.outbox import OLDEST, deliver
from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.files import sha256_file, uniform

FORK = multiprocessing.get_context("fork")
QUICK = LoopConfig(auto_promote=True, shadow_seconds=5.0, canary_seconds=5.0, hold_seconds=5.0)


@pytest.fixture(scope="module")
def bundle(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_run(tiny, tmp_path_factory.mktemp("loop") / "run") / "bundle"


def begin(root: Path, url: str, bundle: Path) -> None:
    """A loop with its first champion and a guard."""
    store = Store(url)
    registry = Registry(root, store)
    Loop.begin(registry, registry.add(bundle), now=0.0, by="ada")
    Parts(registry, bundle).open_guard()
    store.close()


def open_loop(
    root: Path, url: str, bundle: Path, config: LoopConfig = QUICK, observe: Any = None, **parts: Any
) -> Loop:
    registry = Registry(root, Store(url))
    return Loop(registry, Parts(registry, bundle, **parts), Inline(), config, observe=observe)


def go(loop: Loop, *, rounds: int = 1) -> list[str]:
    """Run rounds from MONITOR to MONITOR on a clock that follows the row's; the states on the way."""
    loop.resume()
    seen = [loop.row().state]
    while not (seen[-1] == "MONITOR" and loop.row().round.number >= rounds):
        row = loop.row()
        step = loop.step(now=row.time + 10.0, manual=row.state == "MONITOR")
        if step.moved:
            seen.append(step.row.state)
    return seen


@pytest.fixture
def root(tmp_path: Path, store_url: str, bundle: Path) -> Path:
    begin(tmp_path / "root", store_url, bundle)
    return tmp_path / "root"


WAYS = {
    "promoted": ({"better": True}, ["COLLECT", "PROPOSE", "SELECT", "RECALIBRATE", "EVALUATE", "SHADOW", "CANARY",
                                    "CHAMPION", "MONITOR"]),
    "held": ({"better": False}, ["COLLECT", "PROPOSE", "SELECT", "RECALIBRATE", "EVALUATE", "HOLD", "MONITOR"]),
    "harmful": ({"harmful": True}, ["COLLECT", "PROPOSE", "SELECT", "RECALIBRATE", "EVALUATE", "SHADOW", "CANARY",
                                    "ROLLBACK", "MONITOR"]),
}  # fmt: skip


def outcome(loop: Loop) -> dict[str, Any]:
    """What must not depend on crashes."""
    row, verified = loop.row(), audit.verify(loop.store)
    assert verified.ok, verified
    edges = [json.loads(one.body) for one in audit.read(loop.store, kind="edge")]
    assert read_verdict(loop.registry.root, row.round.verdict or "").fingerprint() == row.round.verdict
    return {
        "verdict": row.round.verdict,
        "candidate": row.round.candidate,
        "pointer": read_pointer(loop.registry.root),
        "edges": [(one["from"], one["to"]) for one in edges],
        "proposals": row.round.proposals,
        "looks": loop.parts.vault.looks_taken("one"),  # type: ignore[attr-defined]
        "aliases": [loop.registry.alias(name).bundle for name in ("champion", "shadow", "canary")],
    }


@pytest.mark.parametrize("way", WAYS)
def test_a_round_goes_its_way(root: Path, store_url: str, bundle: Path, way: str) -> None:
    parts, states = WAYS[way]
    loop = open_loop(root, store_url, bundle, **parts)
    old = loop.registry.alias("champion").bundle
    assert go(loop) == ["MONITOR", *states]
    found = outcome(loop)
    assert found["looks"] == 1 and found["aliases"][1:] == [None, None]
    assert (found["aliases"][0] == found["candidate"]) == (way == "promoted")
    assert way == "promoted" or found["aliases"][0] == old
    assert all(after in EDGES[before] for before, after in found["edges"])
    assert read_verdict(root, found["verdict"]).promoted == (way != "held")
    # The champion that was being replaced had a stricter threshold from the first look on.
    rows = [json.loads(one.body) for one in audit.read(loop.store, kind="edge")]
    assert rows[0]["threshold"] == 0.9
    if way != "promoted":
        assert found["pointer"].threshold == 0.9
    loop.store.close()


def _until_killed(root: Path, url: str, bundle: Path, parts: dict[str, Any], done: Path) -> None:
    killed = set(done.read_text().splitlines()) if done.exists() else set()

    def observe(moment: str) -> None:
        if moment not in killed:
            with done.open("a") as file:
                file.write(f"{moment}\n")
            os.kill(os.getpid(), signal.SIGKILL)

    go(open_loop(root, url, bundle, observe=observe, **parts))


@pytest.mark.parametrize("way", WAYS)
def test_killed_at_every_moment_it_ends_in_the_same_verdict(
    root: Path, store_url: str, bundle: Path, tmp_path: Path, way: str, request: pytest.FixtureRequest
) -> None:
    parts, states = WAYS[way]
    done = tmp_path / "killed"
    for _ in range(60):
        process = FORK.Process(target=_until_killed, args=(root, store_url, bundle, parts, done))
        process.start()
        process.join(120)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    moments = done.read_text().splitlines()
    expected = {f"{state} {moment}" for state in ["MONITOR", *states[:-1]] for moment in ("begin", "done", "committed")}
    assert set(moments) == expected and len(moments) == len(expected)
    # The same round without a crash, elsewhere.
    begin(tmp_path / "calm", str(tmp_path / "calm.db"), bundle)
    calm = open_loop(tmp_path / "calm", str(tmp_path / "calm.db"), bundle, **parts)
    go(calm)
    stormy = open_loop(root, store_url, bundle, **parts)
    assert outcome(stormy) == outcome(calm)
    for loop in (calm, stormy):
        loop.store.close()


def test_nobody_is_promoted_without_approval(tmp_path: Path, bundle: Path) -> None:
    root, url = tmp_path / "root", str(tmp_path / "loop.db")
    begin(root, url, bundle)
    loop = open_loop(root, url, bundle, QUICK.model_copy(update={"auto_promote": False}))
    with pytest.raises(InputError, match="got state MONITOR"):
        loop.approve(now=1.0, by="ada")
    loop.run(now=10.0, manual=True)
    assert loop.row().state == "SHADOW"
    assert "waits for 5 s" in loop.step(now=10.0).note
    waits = loop.step(now=20.0)
    assert not waits.moved and "waits for approval" in waits.note
    with pytest.raises(InputError, match="candidate must be the one in the shadow"):
        loop.approve(now=21.0, by="ada", candidate="zzz")
    loop.approve(now=21.0, by="ada", candidate=(loop.row().round.candidate or "")[:8])
    assert loop.approve(now=21.0, by="bob").round.approved_by == "ada"
    assert [one.row.state for one in loop.run(now=22.0)] == ["CANARY", "CANARY"]
    assert read_pointer(root).canary_share == 0.1
    assert [one.kind for one in audit.read(loop.store)][-3:] == ["edge", "approval", "edge"]
    # What a person takes back is back at once, and the round is over.
    loop.run(now=40.0)
    new = loop.registry.alias("champion").bundle
    took = time.perf_counter()
    pointer = loop.rollback(now=50.0, by="ada")
    assert time.perf_counter() - took <= 1.0
    assert pointer.champion != new and loop.row().state == "ROLLBACK"
    # Who asks again may have been killed after the first time: nothing goes two steps back.
    assert loop.rollback(now=50.5, by="ada") == pointer
    loop.step(now=51.0)
    assert loop.row().state == "MONITOR"
    with pytest.raises(InputError, match="now must not be before"):
        loop.step(now=1.0)
    loop.store.close()


@pytest.mark.parametrize("better", [True, False])
def test_the_threshold_follows_labels_while_a_round_waits(tmp_path: Path, bundle: Path, better: bool) -> None:
    root, url = tmp_path / "root", str(tmp_path / "loop.db")
    begin(root, url, bundle)
    loop = open_loop(root, url, bundle, QUICK.model_copy(update={"auto_promote": False}), better=better)
    loop.run(now=10.0, manual=True)
    state = loop.row().state
    assert state == ("SHADOW" if better else "HOLD") and read_pointer(root).threshold == 0.9
    loop.parts.watch = lambda memory, champion, *, now, manual: Watched(True, ["risk alarm"], {"other": 1}, 0.97)  # type: ignore[method-assign]
    loop.step(now=11.0)
    assert read_pointer(root).threshold == 0.97
    # Its training is asked for when the loop is back in MONITOR.
    assert (loop.row().state, loop.row().memory) == (state, {"looks": 1})
    assert [one.kind for one in audit.read(loop.store)][-1] == "threshold"
    loop.store.close()


def test_the_audit_rate_is_part_of_what_is_in_force(tmp_path: Path, bundle: Path) -> None:
    root, url = tmp_path / "root", str(tmp_path / "loop.db")
    begin(root, url, bundle)
    loop = open_loop(root, url, bundle)
    seen: dict[str, Any] = {"threshold": 0.9, "audit_rate": 0.3}
    loop.parts.watch = lambda memory, champion, *, now, manual: Watched(manual, ["manual"], {"looks": 1}, **seen)  # type: ignore[method-assign]

    def crash(moment: str) -> None:
        raise RuntimeError(moment)

    # One transaction, one audit row; a crash before the file is written is made good by the next start.
    loop._observe = lambda moment: crash(moment) if moment == "MONITOR committed" else None
    with pytest.raises(RuntimeError, match="committed"):
        loop.step(now=10.0)
    assert read_pointer(root).audit_rate is None
    loop._observe = lambda _: None
    loop.resume()
    assert (read_pointer(root).audit_rate, read_pointer(root).threshold) == (0.3, 0.9)
    for now in (11.0, 12.0):
        loop.step(now=now)
    seen["audit_rate"] = None
    loop.step(now=13.0)
    assert read_pointer(root).audit_rate is None
    rows = [(one.kind, json.loads(one.body)) for one in audit.read(loop.store)][1:]
    assert [kind for kind, _ in rows] == ["threshold", "audit rate"]
    assert [(body["audit_rate_before"], body["audit_rate"]) for _, body in rows] == [(None, 0.3), (0.3, None)]
    # While a round waits it rises and does not fall; a round that begins takes it along.
    seen["audit_rate"] = 0.2
    loop.run(now=14.0, manual=True)
    assert loop.row().state == "SHADOW" and read_pointer(root).audit_rate == 0.2
    for rate, expected in ((None, 0.2), (0.5, 0.5), (0.3, 0.5)):
        seen["audit_rate"] = rate
        loop.step(now=15.0)
        assert read_pointer(root).audit_rate == expected
    loop.store.close()


def test_a_champion_that_moved_meanwhile_holds_the_round(tmp_path: Path, bundle: Path) -> None:
    root, url = tmp_path / "root", str(tmp_path / "loop.db")
    begin(root, url, bundle)
    loop = open_loop(root, url, bundle)
    now = 10.0
    loop.run(now=now, manual=True)
    while loop.row().state != "CHAMPION":
        now += 10.0
        loop.step(now=now)
    champion = loop.registry.alias("champion")
    promote(loop.registry, champion.bundle or "", expected=champion.version, now=now, by="somebody")
    assert loop.step(now=now + 1).row.state == "HOLD"
    assert "champion must still be at version 1" in loop.row().round.note
    assert loop.registry.alias("shadow").bundle is None
    loop.store.close()


def test_two_processes_do_not_take_one_edge_twice(tmp_path: Path, bundle: Path) -> None:
    root, url = tmp_path / "root", str(tmp_path / "loop.db")
    begin(root, url, bundle)
    one, two = (open_loop(root, url, bundle) for _ in range(2))
    row = two.row()
    one.step(now=10.0, manual=True)
    two.row = lambda connection=None: row  # type: ignore[method-assign, assignment]
    with pytest.raises(LostRaceError, match="the loop must still be at version 1"):
        two.step(now=10.0, manual=True)
    assert len(list(audit.read(one.store, kind="edge"))) == 1
    with pytest.raises(InputError, match="one has begun"):
        Loop.begin(one.registry, row.round.champion, now=1.0, by="bob")
    for loop in (one, two):
        loop.store.close()


def test_an_empty_store_says_what_to_do(tmp_path: Path, bundle: Path) -> None:
    loop = open_loop(tmp_path / "root", str(tmp_path / "loop.db"), bundle)
    with pytest.raises(InputError, match="stage1 continual init"):
        loop.row()
    loop.store.close()


# --------------------------------------------------------------------------------------------
# Work


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def test_work_is_found_again_and_done_again_where_it_was_changed(tmp_path: Path) -> None:
    inputs = {"seconds": 0.0}
    first = do_work(tmp_path, "kit.loop_parts:sleep", inputs, Inline())
    assert do_work(tmp_path, "kit.loop_parts:sleep", inputs, Inline()) == first
    began = tmp_path / first.key / "began"
    assert len(began.read_text().splitlines()) == 1
    (tmp_path / first.key / "files" / "done").write_text("changed")
    assert find_work(tmp_path, first.key) is None
    assert do_work(tmp_path, "kit.loop_parts:sleep", inputs, Inline()) == first
    assert len(began.read_text().splitlines()) == 2
    assert do_work(tmp_path, "kit.loop_parts:sleep", {"seconds": 0.001}, Inline()).key != first.key


@pytest.mark.usefixtures("importable")
def test_a_fresh_interpreter_gives_the_same_and_tells_errors(tmp_path: Path) -> None:
    executor = make_executor(ExecutorConfig(kind="subprocess", timeout=120.0))
    assert isinstance(executor, Launched)
    inputs = {"seed": 1, "snapshot": {"rows": [1, 2]}}
    there = do_work(tmp_path / "a", "kit.loop_parts:propose", inputs, executor)
    assert there == do_work(tmp_path / "b", "kit.loop_parts:propose", inputs, Inline())
    with pytest.raises(InputError, match="rows must be 1 or more"):
        do_work(tmp_path, "kit.loop_parts:refuse", {"kind": "input"}, executor)
    with pytest.raises(WorkError, match=r"ended with code 1: ZeroDivisionError: a bug; see .*log.txt"):
        do_work(tmp_path, "kit.loop_parts:refuse", {"kind": "bug"}, executor)
    with pytest.raises(InputError, match="function must be module:name"):
        do_work(tmp_path, "kit.loop_parts:nothing", {}, Inline())
    with pytest.raises(WorkError, match="must be done in 0.5 s"):
        do_work(tmp_path, "kit.loop_parts:sleep", {"seconds": 60}, Launched((sys.executable, "-m"), 0.5))


@pytest.mark.usefixtures("importable")
def test_what_a_killed_loop_had_started_is_waited_for(tmp_path: Path) -> None:
    script = (
        "import sys; from stage1_pro.continual.loop.executors import *\n"
        f"do_work({str(tmp_path)!r}, 'kit.loop_parts:sleep', {{'seconds': 4}}, Launched((sys.executable, '-m'), 120))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/began")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    work = do_work(tmp_path, "kit.loop_parts:sleep", {"seconds": 4}, Launched((sys.executable, "-m"), 120))
    assert len((tmp_path / work.key / "began").read_text().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize(
    ("kind", "arguments", "ranks"),
    [
        ("torchrun", ["--nproc-per-node=2", "--standalone"], 2),
        # Without MPI it starts one process on a CPU.
        ("accelerate", ["--cpu", "--num_processes=1", "--num_machines=1", "--mixed_precision=no",
                        "--dynamo_backend=no"], 1),
    ],
)  # fmt: skip
def test_launchers_start_every_rank_and_rank_0_answers(
    tmp_path: Path, kind: Any, arguments: list[str], ranks: int
) -> None:
    executor = make_executor(ExecutorConfig(kind=kind, arguments=arguments, timeout=300.0))
    work = do_work(tmp_path, "kit.loop_parts:sleep", {"seconds": 0.1}, executor)
    assert work.result["rank"] in (None, "0") and work.result["size"] in (None, str(ranks))
    assert len((tmp_path / work.key / "began").read_text().splitlines()) == ranks


@pytest.mark.slow
@pytest.mark.usefixtures("importable")
@pytest.mark.filterwarnings("ignore")
def test_ray_gives_the_same(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed: its executor was not run")
    inputs = {"seed": 1, "snapshot": {"rows": [1, 2]}}
    there = do_work(tmp_path / "a", "kit.loop_parts:propose", inputs, RayExecutor(resources={"num_cpus": 1}))
    assert there == do_work(tmp_path / "b", "kit.loop_parts:propose", inputs, Inline())
    executor = RayExecutor(resources={"num_cpus": 1})
    with pytest.raises(InputError, match="rows must be 1 or more"):
        do_work(tmp_path, "kit.loop_parts:refuse", {"kind": "input"}, executor)
    with pytest.raises(WorkError, match="kit.loop_parts:refuse failed: a bug"):
        do_work(tmp_path, "kit.loop_parts:refuse", {"kind": "bug"}, executor)
    ray.shutdown()


def test_a_verdict_that_was_changed_is_refused(tmp_path: Path, bundle: Path) -> None:
    root, url = tmp_path / "root", str(tmp_path / "loop.db")
    begin(root, url, bundle)
    loop = open_loop(root, url, bundle)
    loop.run(now=10.0, manual=True)
    name = loop.row().round.verdict or ""
    path = root / "verdicts" / f"{name}.json"
    path.write_text(path.read_text().replace('"estimate": 0.', '"estimate": 1.', 1))
    with pytest.raises(ArtifactError, match="it was changed"):
        read_verdict(root, name)
    loop.store.close()


# --------------------------------------------------------------------------------------------
# Telling people


class Postman:
    """A hook that keeps what it gets, may refuse the next few, and may die."""

    fingerprint = "postman"

    def __init__(self) -> None:
        self.got: list[Alert] = []
        self.fails, self.dies = 0, False

    def send(self, alert: Alert) -> Delivery:
        if self.fails:
            self.fails -= 1
            return Delivery(hook="postman", delivered=False, tries=3, reason="HTTP 503")
        self.got.append(alert)
        if self.dies:
            raise KeyboardInterrupt
        return Delivery(hook="postman", delivered=True, tries=1)


def test_people_are_told_once_of_everything_that_needs_them(root: Path, store_url: str, bundle: Path) -> None:
    loop = open_loop(root, store_url, bundle, QUICK.model_copy(update={"auto_promote": False}))
    postman, now = Postman(), 10.0
    loop.run(now=now, manual=True)
    postman.fails = 1
    (failed,) = deliver(loop.store, [postman], now=now)
    assert not failed.delivered and not postman.got
    postman.dies = True
    # Killed after it went out and before that was written down: it goes out again.
    with pytest.raises(KeyboardInterrupt):
        deliver(loop.store, [postman], now=now)
    postman.dies = False
    for _ in range(3):
        now += 6.0
        loop.run(now=now)
        deliver(loop.store, [postman], now=now)
    assert [one.kind for one in postman.got] == ["train", "train", "approval"]
    loop.approve(now=now, by="ada")
    for _ in range(3):
        now += 6.0
        loop.run(now=now)
        # Another process, after a restart.
        again = open_loop(root, store_url, bundle)
        deliver(again.store, [postman], now=now)
        again.store.close()
    loop.rollback(now=now, by="ada")
    assert [one.delivered for one in deliver(loop.store, [postman], now=now)] == [True]
    assert [one.kind for one in postman.got] == ["train", "train", "approval", "champion", "rollback"]
    assert deliver(loop.store, [postman], now=now) == []
    # Who comes later gets what is not a day old yet.
    other = Postman()
    other.fingerprint = "other"
    assert deliver(loop.store, [other], now=now + 2 * OLDEST) == []
    # One refused holds back those behind it, so that they come in their order.
    other.fails = 1
    assert [one.delivered for one in deliver(loop.store, [other], now=now)] == [False] and not other.got
    assert len(deliver(loop.store, [other], now=now)) == 4
    assert [one.kind for one in other.got] == ["train", "approval", "champion", "rollback"]
    loop.store.close()


def test_what_a_look_sees_is_told_once_while_a_round_waits(tmp_path: Path, bundle: Path) -> None:
    root, url = tmp_path / "root", str(tmp_path / "loop.db")
    begin(root, url, bundle)
    loop = open_loop(root, url, bundle, QUICK.model_copy(update={"auto_promote": False}))
    loop.run(now=10.0, manual=True)
    postman = Postman()
    alarm = Alert(time=11.0, kind="alarm", title="Alarm", text="Exits are wrong.")
    loop.parts.watch = lambda memory, champion, *, now, manual: Watched(False, [], {"looks": 1}, alerts={"a/1": alarm})  # type: ignore[method-assign]
    for now in (11.0, 12.0, 13.0):
        loop.step(now=now)
        deliver(loop.store, [postman], now=now)
    assert loop.row().state == "SHADOW"
    assert sorted(one.kind for one in postman.got) == ["alarm", "train"]
    loop.store.close()


# --------------------------------------------------------------------------------------------
# With real bundles, events and labels


@pytest.mark.slow
def test_from_served_photos_to_a_new_champion_by_the_command_line(
    bright_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "loop"
    (tmp_path / "loop.yaml").write_text("""
loop: {executor: {kind: inline}, shadow_seconds: 0, shadow_pairs: 20, canary_seconds: 0, canary_pairs: 40,
  canary_share: 0.5}
rounds: {plan: {floor: 0.35, deferral: 0.9, entropy: 0.9, seed: 3}, least_rows: 8, least_guard: 8, steer: false,
  largest_slowdown: 99,
  terms: {require_certificate: false, margin: 5.0, fnr_margin: 1.0, n_replicates: 1000},
  tuning: [{epochs: 200, lr: 0.01, patience: 50}]}
""")

    def stage1(*words: str) -> Any:
        capsys.readouterr()
        code = main(["continual", words[0], "--root", str(root), *words[1:], "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out)

    begun = stage1("init", "--run", str(bright_run), "--alpha", "0.05", "--config", str(tmp_path / "loop.yaml"))
    assert main(["continual", "init", "--root", str(root), "--run", str(bright_run), "--alpha", ".05"]) == 2
    assert stage1("status")["state"] == "MONITOR"
    photos = dict(bright(tmp_path / "street", 240, seed=77))
    live = LiveCascade(root, threads=1, log=EventLog(root / "log"))
    first = live.predict(photos)
    truth = {sha256_file(path): label for path, label in photos.items()}
    with opened(root) as (config, registry, parts, _loop):
        ingest(registry.store, parts.log)
        events = [event for event in read_events(registry.store) if event.selected]
        add_labels(registry.store, [
            Label(event_id=event.id, label=truth[event.image_sha256], source="owner", annotator="ada", time=time.time())
            for event in events
        ])  # fmt: skip
        assert config == LoopFile.read(root / "loop.json")
    proposed = stage1("propose")
    assert proposed["state"] == "EVALUATE", proposed["note"]
    judged = stage1("evaluate")
    assert judged["state"] == "SHADOW" and judged["verdict"]["promoted"], judged
    with opened(root) as (_, _registry, parts, loop):
        snapshot = parts._snapshot(loop.row().round)
        guard = set(parts.vault.row_ids(snapshot.guard))
        learned = {name for name, _, _ in snapshot.learn}
        certified = {name for name, _, _ in snapshot.certify}
        assert not guard & learned and not guard & certified and not learned & certified and guard
        draws = {event.image_sha256: uniform(3, "review", event.id) for event in events}
        assert all(draws[name] < 0.35 for name in guard | certified)
        assert {draws[name] < 0.35 for name in learned} == {True, False}
    live.predict(list(photos)[:30])
    assert "waits for approval" in stage1("run")["note"]
    stage1("promote", "--by", "ada")
    assert stage1("run")["state"] == "CANARY"
    assert live.refresh().canary is not None
    live.predict(list(photos)[:30])
    assert stage1("run")["state"] == "MONITOR"
    second = live.predict(photos)
    assert live.pointer.previous == begun["champion"] and live.pointer.canary is None
    right = [float(np.mean(found.label == np.array(list(photos.values())))) for found in (first, second)]
    assert right[1] > right[0] + 0.1, right
    stage1("status", "--page", str(tmp_path / "status.html"))
    assert "<html" in (tmp_path / "status.html").read_text()
    assert stage1("labels", "--export", str(tmp_path / "labels.csv"))["rows"] == len(events)
    took = time.perf_counter()
    assert stage1("rollback")["champion"] == begun["champion"]
    assert np.array_equal(live.predict(photos).prob, first.prob)
    assert stage1("run")["state"] == "MONITOR" and time.perf_counter() - took < 60
    assert stage1("audit", "--export", str(tmp_path / "audit.jsonl"))["ok"]
    data = bytearray((tmp_path / "audit.jsonl").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "audit.jsonl").write_bytes(data)
    assert main(["continual", "audit", "--root", str(root), "--file", str(tmp_path / "audit.jsonl")]) == 4


def test_alerts_and_metrics_by_the_command_line(
    bright_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], hook: tuple[str, list[bytes], list[int]]
) -> None:
    url, posted, answers = hook
    root, told = tmp_path / "loop", tmp_path / "told.jsonl"
    keep = f"import sys; open({str(told)!r}, 'a').write(sys.stdin.read() + chr(10))"
    words = [sys.executable, "-c", keep, "SECRET"]
    config = tmp_path / "loop.yaml"

    def stage1(*words: str, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        assert main(["continual", words[0], "--root", str(root), *words[1:]]) == code
        out, err = capsys.readouterr()
        assert "SECRET" not in out + err
        return out, err

    begin = ("init", "--run", str(bright_run), "--alpha", "0.05", "--config", str(config))
    for wrong, said in (
        ({"alerts": {"webhooks": ["ftp://host/SECRET"]}}, "url must be http:// or https://"),
        ({"alerts": {"webhooks": "https://host/SECRET"}}, "alerts.webhooks must be valid"),
        ({"alerts": {"commands": [[]]}}, "words must be a program"),
        ({"metrics": "stage1.txt"}, "metrics must be valid"),
        ({"alert": {}}, "alert must be valid"),
    ):
        config.write_text(json.dumps(wrong))
        assert said in stage1(*begin, code=2)[1]
        assert not (root / "loop.json").exists()
    config.write_text(json.dumps({
        "alerts": {"webhooks": [url], "commands": [words, [sys.executable, "-c", "raise SystemExit(3)"]]},
        "metrics": str(tmp_path / "now.prom"), "loop": {"executor": {"kind": "inline"}},
        "rounds": {"monitor": {"triggers": {"min_labels": 10**6}}, "least_rows": 10**6},
    }))  # fmt: skip
    stage1(*begin)
    assert (root / "loop.json").stat().st_mode & 0o077 == 0
    out, _ = stage1("status", "--test-alert", "--metrics", str(tmp_path / "m.prom"), "--grafana",
                    str(tmp_path / "g.json"), code=1)  # fmt: skip
    assert out.count(": delivered") == 2 and out.count("NOT delivered, exit code 3") == 1
    assert [json.loads(line)["kind"] for line in told.read_text().splitlines()] == ["test"]
    assert "stage1_audit_rate" in (tmp_path / "m.prom").read_text()
    assert json.loads((tmp_path / "g.json").read_text())["panels"]
    photos = dict(bright(tmp_path / "street", 120, seed=77))
    with EventLog(root / "log") as log:
        LiveCascade(root, threads=1, log=log, plan=ReviewPlan(floor=1.0)).predict(photos)
    with opened(root) as (_, registry, parts, _loop):
        ingest(registry.store, parts.log)
        other = {"none": "roadwork", "roadwork": "none"}
        add_labels(registry.store, [
            Label(event_id=one.id, label=other[one.label], source="owner", annotator="ada", time=time.time())
            for one in read_events(registry.store) if one.label
        ])  # fmt: skip
    before = told.read_text()
    answers += [500, 500, 500]  # The webhook's host is down at first, and up at the next look.
    # A hook that fails stops neither the loop nor the other one, and is told of again; who has got it is not.
    for _ in range(2):
        _, err = stage1("run")
        assert "alert not delivered by" in err
    kinds = [json.loads(line)["kind"] for line in told.read_text()[len(before) :].splitlines()]
    assert kinds == ["alarm"]  # Its training waits for labels that certify.
    sent = [json.loads(body)["kind"] for body in posted]
    assert sent == ["test", *["alarm"] * 4] and not answers
    metrics = (tmp_path / "now.prom").read_text()
    assert 'stage1_alarm{bundle="' in metrics and "} 1.0" in metrics.split("stage1_alarm{")[1]
    (root / "loop.json").write_text((root / "loop.json").read_text().replace("now.prom", "told.jsonl/now.prom"))
    assert "metrics not written" in stage1("run")[1]


def test_a_folder_that_is_no_loop_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["continual", "status", "--root", str(tmp_path)]) == 2
    assert "`stage1 continual init` makes one" in capsys.readouterr().err


def test_a_missing_library_is_named_with_the_extra_that_brings_it(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['sqlalchemy'] = None\n"
        "from stage1_pro.cli import main\n"
        f"sys.exit(main(['continual', 'status', '--root', {str(tmp_path)!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 5 and "stage1_pro[continual]" in done.stderr


def test_a_plan_says_how_many_audits_see_which_harm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["continual", "plan", "--alpha", ".02", "--harm", ".04", "--json"]) == 0
    (harm,) = json.loads(capsys.readouterr().out)["harms"]
    assert harm["n_normal"] == 391 and harm["n_anytime"] > harm["n_exact"] > 300
    assert main(["continual", "plan", "--alpha", ".02", "--audit-rate", ".01"]) == 2
    assert "audit_rate must be in [0.02, 1]" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["null", "5", "[1]"])
def test_a_monitor_without_keys_is_named(
    text: str, tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop.yaml").write_text(f"rounds: {{monitor: {text}}}")
    given = ["--root", str(tmp_path / "loop"), "--run", str(bundle.parent), "--alpha", ".05"]
    assert main(["continual", "init", *given, "--config", str(tmp_path / "loop.yaml")]) == 2
    assert "rounds.monitor must hold keys and values" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["", "plan", "init", "ingest", "status", "review", "labels", "run", "propose",
                                  "evaluate", "promote", "rollback", "audit"])  # fmt: skip
def test_help_teaches(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["continual", *filter(None, [what]), "--help"])
    assert len(capsys.readouterr().out) > 150
