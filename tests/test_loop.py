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

import pytest

pytest.importorskip("sqlalchemy", reason="the loop needs [continual]")
pytest.importorskip("torch", reason="bundles are exported with [train]")

from loop_parts import Parts
from test_deploy import make_model, make_run

from stage1_pro.continual import audit
from stage1_pro.continual.executors import (
    Command,
    ExecutorConfig,
    Inline,
    RayExecutor,
    WorkError,
    do_work,
    find_work,
    make_executor,
)
from stage1_pro.continual.live import read_pointer
from stage1_pro.continual.loop import EDGES, Loop, LoopConfig, read_verdict
from stage1_pro.continual.registry import LostRaceError, Registry
from stage1_pro.continual.store import Store
from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.stations.exporting import export

FORK = multiprocessing.get_context("fork")
QUICK = LoopConfig(auto_promote=True, shadow_seconds=5.0, canary_seconds=5.0, hold_seconds=5.0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(make_run(tmp_path_factory.mktemp("loop") / "run", make_model()))


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
        "looks": loop.parts.vault.looks_left("one"),  # type: ignore[attr-defined]
        "aliases": [loop.registry.alias(name).bundle for name in ("champion", "shadow", "canary")],
    }


@pytest.mark.parametrize("way", WAYS)
def test_a_round_goes_its_way(root: Path, store_url: str, bundle: Path, way: str) -> None:
    parts, states = WAYS[way]
    loop = open_loop(root, store_url, bundle, **parts)
    old = loop.registry.alias("champion").bundle
    assert go(loop) == ["MONITOR", *states]
    found = outcome(loop)
    assert found["looks"] == 9 and found["aliases"][1:] == [None, None]
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
    assert [one.row.state for one in loop.run(now=22.0)] == ["CANARY", "CANARY"]
    assert read_pointer(root).canary_share == 0.1
    assert [one.kind for one in audit.read(loop.store)][-2:] == ["approval", "edge"]
    # What a person takes back is back at once, and the round is over.
    loop.run(now=40.0)
    new = loop.registry.alias("champion").bundle
    took = time.perf_counter()
    pointer = loop.rollback(now=50.0, by="ada")
    assert time.perf_counter() - took <= 1.0
    assert pointer.champion != new and loop.row().state == "ROLLBACK"
    loop.step(now=51.0)
    assert loop.row().state == "MONITOR"
    with pytest.raises(InputError, match="now must not be before"):
        loop.step(now=1.0)
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
    loop.registry.promote(champion.bundle or "", expected=champion.version, now=now, by="somebody")
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
    first = do_work(tmp_path, "loop_parts:sleep", inputs, Inline())
    assert do_work(tmp_path, "loop_parts:sleep", inputs, Inline()) == first
    began = tmp_path / first.key / "began"
    assert len(began.read_text().splitlines()) == 1
    (tmp_path / first.key / "files" / "done").write_text("changed")
    assert find_work(tmp_path, first.key) is None
    assert do_work(tmp_path, "loop_parts:sleep", inputs, Inline()) == first
    assert len(began.read_text().splitlines()) == 2
    assert do_work(tmp_path, "loop_parts:sleep", {"seconds": 0.001}, Inline()).key != first.key


@pytest.mark.usefixtures("importable")
def test_a_fresh_interpreter_gives_the_same_and_tells_errors(tmp_path: Path) -> None:
    executor = make_executor(ExecutorConfig(kind="subprocess", timeout=120.0))
    assert isinstance(executor, Command)
    inputs = {"seed": 1, "snapshot": {"rows": [1, 2]}}
    there = do_work(tmp_path / "a", "loop_parts:propose", inputs, executor)
    assert there == do_work(tmp_path / "b", "loop_parts:propose", inputs, Inline())
    with pytest.raises(InputError, match="rows must be 1 or more"):
        do_work(tmp_path, "loop_parts:refuse", {"kind": "input"}, executor)
    with pytest.raises(WorkError, match=r"ended with code 1: ZeroDivisionError: a bug; see .*log.txt"):
        do_work(tmp_path, "loop_parts:refuse", {"kind": "bug"}, executor)
    with pytest.raises(InputError, match="function must be module:name"):
        do_work(tmp_path, "loop_parts:nothing", {}, Inline())
    with pytest.raises(WorkError, match="must be done in 0.5 s"):
        do_work(tmp_path, "loop_parts:sleep", {"seconds": 60}, Command((sys.executable, "-m"), 0.5))


@pytest.mark.usefixtures("importable")
def test_what_a_killed_loop_had_started_is_waited_for(tmp_path: Path) -> None:
    script = (
        "import sys; from stage1_pro.continual.executors import *\n"
        f"do_work({str(tmp_path)!r}, 'loop_parts:sleep', {{'seconds': 4}}, Command((sys.executable, '-m'), 120))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/began")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    work = do_work(tmp_path, "loop_parts:sleep", {"seconds": 4}, Command((sys.executable, "-m"), 120))
    assert len((tmp_path / work.key / "began").read_text().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("kind", ["torchrun", "accelerate"])
def test_launchers_start_every_rank_and_rank_0_answers(tmp_path: Path, kind: Any) -> None:
    arguments = {
        "torchrun": ["--nproc-per-node=2", "--master-port=0", "--standalone"],
        "accelerate": ["--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"],
    }[kind]
    executor = make_executor(ExecutorConfig(kind=kind, arguments=arguments, timeout=300.0))
    work = do_work(tmp_path, "loop_parts:sleep", {"seconds": 0.1}, executor)
    assert work.result == {"rank": "0", "size": "2"}
    assert len((tmp_path / work.key / "began").read_text().splitlines()) == 2


@pytest.mark.slow
def test_ray_gives_the_same(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: its executor was not run")
    inputs = {"seed": 1, "snapshot": {"rows": [1, 2]}}
    there = do_work(tmp_path / "a", "loop_parts:propose", inputs, RayExecutor(resources={"num_cpus": 1}))
    assert there == do_work(tmp_path / "b", "loop_parts:propose", inputs, Inline())


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
