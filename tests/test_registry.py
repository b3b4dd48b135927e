"""Bundles under their hash, aliases that one of many writers moves, what serving follows, and the audit's chain."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sqlalchemy", reason="the loop needs [continual]")
pytest.importorskip("torch", reason="bundles are exported with [train]")

from kit.loop_parts import promote, read_pointer
from kit.tiny import copy_run, rehash
from sqlalchemy import text

from stage1_pro.chain import AuditRow, canonical, verify_file
from stage1_pro.continual.ledger import audit
from stage1_pro.continual.ledger.store import Store
from stage1_pro.continual.loop.registry import LostRaceError, Registry
from stage1_pro.continual.serving.events import SKETCH_SIZE, EventLog, Novelty, ReviewPlan
from stage1_pro.continual.serving.live import (
    POINTER,
    LiveCascade,
    Pointer,
    novelty_path,
    read_pairs,
    takes_canary,
    tightened,
)
from stage1_pro.deploy.bundle import load_bundle
from stage1_pro.deploy.cascade import Cascade
from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.files import write_bytes

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_run(tiny, tmp_path_factory.mktemp("registry") / "run")


@pytest.fixture(scope="module")
def bundle(run: Path) -> Path:
    return run / "bundle"


@pytest.fixture(scope="module")
def strict(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another bundle: the same graphs, and nothing exits."""
    path = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("strict") / "bundle"))
    policy = json.loads((path / "thresholds.json").read_text())
    (path / "thresholds.json").write_text(json.dumps({**policy, "exit_threshold": 1.0}))
    rehash(path, "thresholds.json")
    return path


@pytest.fixture(scope="module")
def photos(run: Path) -> list[Path]:
    return sorted((run / "images").iterdir())


@pytest.fixture
def registry(tmp_path: Path, store: Store) -> Registry:
    return Registry(tmp_path / "root", store)


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Registry]:
    """On SQLite alone, for what has nothing to do with the database."""
    opened = Store(tmp_path / "root" / "loop.db")
    yield Registry(tmp_path / "root", opened)
    opened.close()


def move(registry: Registry, name: Any, bundle: str | None, **options: Any) -> None:
    with registry.store.write() as connection:
        expected = registry.alias(name, connection).version
        registry.move(connection, name, bundle, expected=expected, now=1.0, by="test", **options)
    registry.sync()


def back(registry: Registry, **options: Any) -> Pointer:
    with registry.store.write() as connection:
        registry.rollback(connection, now=9.0, by="test", **options)
    return registry.sync()


# --------------------------------------------------------------------------------------------
# Bundles


def test_a_bundle_is_kept_under_its_hash_and_once(local: Registry, bundle: Path, strict: Path) -> None:
    name = local.add(bundle)
    assert local.add(bundle) == name
    other = local.add(strict)
    assert local.bundles() == sorted([name, other])
    assert local.load(name).policy == load_bundle(bundle).policy
    graph = local.path(name) / "stage_a.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    with pytest.raises(ArtifactError, match="it was changed"):
        local.load(name)
    with pytest.raises(ArtifactError, match="it was changed"):
        local.add(bundle)
    with pytest.raises(InputError, match="bundle must be one of the registry"):
        local.load("0" * 64)


def test_a_damaged_bundle_does_not_get_in(local: Registry, bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    (copy / "metrics.csv").write_text("changed")
    with pytest.raises(ArtifactError):
        local.add(copy)
    assert local.bundles() == []


# --------------------------------------------------------------------------------------------
# Aliases


def test_moves_swaps_and_steps_back(registry: Registry, bundle: Path, strict: Path) -> None:
    one, two = registry.add(bundle), registry.add(strict)
    with pytest.raises(InputError, match="champion must .*got none"):
        registry.sync()
    assert promote(registry, one, expected=0, now=1.0, by="ada").previous is None
    with pytest.raises(InputError, match="champion must have been something before"):
        back(registry)
    promote(registry, two, expected=1, now=2.0, by="ada")
    found = promote(registry, one, expected=2, now=3.0, by="ada")
    assert (found.champion, found.previous, found.version) == (one, two, 3)
    with pytest.raises(LostRaceError, match="champion must .*2.*got 3"):
        promote(registry, two, expected=2, now=4.0, by="bob")
    # Twice is two steps back, not to and fro.
    assert (back(registry).champion, back(registry).champion) == (two, one)
    with pytest.raises(InputError, match="champion must have been something"):
        back(registry)
    assert back(registry, to=two).champion == two
    with pytest.raises(InputError, match="to be one|must have been 000000000000"):
        back(registry, to="0" * 64)
    assert [alias.bundle for alias in registry.history("champion")] == [one, two, one, two, one, two]
    with pytest.raises(InputError, match="bundle must be one of the registry"):
        promote(registry, "1" * 64, expected=6, now=5.0, by="ada")
    with registry.store.read() as connection:
        assert connection.execute(text("SELECT count(*) FROM audit")).scalar() == 3


def _race(root: Path, url: str, bundle: str, start: Any, results: Any) -> None:
    registry = Registry(root, Store(url))
    start.wait()
    try:
        promote(registry, bundle, expected=1, now=2.0, by=str(multiprocessing.current_process().pid))
    except LostRaceError:
        results.put(False)
    else:
        results.put(True)


def test_of_eight_racing_promoters_one_wins(registry: Registry, store_url: str, bundle: Path, strict: Path) -> None:
    one, two = registry.add(bundle), registry.add(strict)
    promote(registry, one, expected=0, now=1.0, by="ada")
    registry.store.close()
    start, results = FORK.Barrier(8), FORK.Queue()
    racers = [FORK.Process(target=_race, args=(registry.root, store_url, two, start, results)) for _ in range(8)]
    for racer in racers:
        racer.start()
    won = sorted(results.get(timeout=120) for _ in racers)
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    assert won == [False] * 7 + [True]
    assert read_pointer(registry.root).version == 2
    assert [row.kind for row in audit.read(registry.store)] == ["champion"] * 2


def _read(root: Path, names: list[str], stop: Any, results: Any) -> None:
    """Read the pointer as fast as it goes; what is wrong with any of it."""
    count, last, bad = 0, 0, []
    while not stop.is_set():
        try:
            found = read_pointer(root)
        except ArtifactError as error:
            bad.append(str(error))
            continue
        count += 1
        # Odd versions are of the first, even ones of the second.
        if found.champion != names[(found.version + 1) % 2] or found.serial < last:
            bad.append(f"{found}")
        last = found.serial
    results.put((count, bad[:3]))


def _swap(registry: Registry, bundle: Path, strict: Path, swaps: int) -> int:
    names = [registry.add(bundle), registry.add(strict)]
    promote(registry, names[0], expected=0, now=0.0, by="test")
    registry.store.close()
    stop, results = FORK.Event(), FORK.Queue()
    readers = [FORK.Process(target=_read, args=(registry.root, names, stop, results)) for _ in range(3)]
    for reader in readers:
        reader.start()
    for version in range(1, swaps + 1):
        promote(registry, names[version % 2], expected=version, now=float(version), by="test")
    stop.set()
    found = [results.get(timeout=60) for _ in readers]
    for reader in readers:
        reader.join()
    assert [bad for _, bad in found] == [[]] * 3
    assert audit.verify(registry.store).rows == swaps + 1
    return sum(count for count, _ in found)


def test_no_reader_sees_a_torn_pointer(local: Registry, bundle: Path, strict: Path) -> None:
    assert _swap(local, bundle, strict, 100) > 100


@pytest.mark.slow
def test_no_reader_sees_a_torn_pointer_in_2000_swaps(local: Registry, bundle: Path, strict: Path) -> None:
    assert _swap(local, bundle, strict, 2000) > 2000


def test_the_pointer_is_brought_up_after_a_crash(local: Registry, bundle: Path, strict: Path) -> None:
    one, two = local.add(bundle), local.add(strict)
    promote(local, one, expected=0, now=1.0, by="ada")
    with local.store.write() as connection:
        local.move(connection, "champion", two, expected=1, now=2.0, by="ada")
    # Killed here: the store knows, the file does not.
    assert read_pointer(local.root).champion == one
    assert local.sync().champion == read_pointer(local.root).champion == two


# --------------------------------------------------------------------------------------------
# Serving


def same(left: Any, right: Any) -> bool:
    return all(np.array_equal(getattr(left, f), getattr(right, f)) for f in left.__dataclass_fields__)


def test_serving_follows_the_champion_and_a_rollback_within_a_second(
    local: Registry, bundle: Path, strict: Path, photos: list[Path]
) -> None:
    one, two = local.add(bundle), local.add(strict)
    promote(local, one, expected=0, now=1.0, by="ada")
    bytes_before = (local.path(one) / "stage_a.onnx").read_bytes()
    live = LiveCascade(local.root, threads=1)
    first, alone = live.predict(photos), live.predict(photos[:1])
    assert same(first, Cascade.load(bundle).predict(photos)) and first.exited.any()
    promote(local, two, expected=1, now=2.0, by="ada")
    assert same(live.predict(photos), Cascade.load(strict).predict(photos))
    assert live.pointer.champion == two
    took = time.perf_counter()
    back(local)
    again = live.predict(photos[:1])
    took = time.perf_counter() - took
    assert live.pointer.champion == one and took <= 1.0, f"{took:.2f} s"
    assert same(again, alone) and same(live.predict(photos), first)
    assert (local.path(one) / "stage_a.onnx").read_bytes() == bytes_before


def test_a_bad_bundle_or_file_leaves_the_old_one_serving(
    local: Registry, bundle: Path, strict: Path, photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = local.add(bundle), local.add(strict)
    promote(local, one, expected=0, now=1.0, by="ada")
    live = LiveCascade(local.root, threads=1, retry_seconds=0.0)
    first = live.predict(photos[:2])
    graph = local.path(two) / "stage_b.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole[:-1] + b"\0")
    promote(local, two, expected=1, now=2.0, by="ada")
    assert same(live.predict(photos[:2]), first)
    assert live.pointer.champion == one and "it was changed" in str(live.failure)
    assert "goes on serving" in capsys.readouterr().err
    pointer = (local.root / POINTER).read_bytes()
    for damage in (b"{", pointer.replace(two.encode(), b"f" * 64)):
        write_bytes(local.root / POINTER, damage)
        assert same(live.predict(photos[:2]), first) and live.failure
    (local.root / POINTER).unlink()
    assert same(live.predict(photos[:2]), first) and live.failure
    graph.write_bytes(whole)
    local.sync()
    live.predict(photos[:2])
    assert live.pointer.champion == two and live.failure is None


def test_answers_of_a_batch_are_of_one_champion_while_it_changes(
    local: Registry, bundle: Path, strict: Path, photos: list[Path]
) -> None:
    one, two = local.add(bundle), local.add(strict)
    promote(local, one, expected=0, now=1.0, by="ada")
    live = LiveCascade(local.root, threads=1)
    wanted = [Cascade.load(path, threads=1).predict(photos[:4]) for path in (bundle, strict)]
    assert not same(*wanted)
    stop, bad, counts = threading.Event(), [], [0, 0]

    def serve() -> None:
        while not stop.is_set():
            found = live.predict(photos[:4])
            which = [same(found, one_of) for one_of in wanted]
            if sum(which) != 1:
                bad.append(found)
            counts[which.index(True)] += 1

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for version in range(1, 9):
        promote(local, (one, two)[version % 2], expected=version, now=float(version), by="test")
        time.sleep(0.1)
    stop.set()
    for thread in threads:
        thread.join()
    assert not bad and min(counts) > 0


def test_a_shadow_decides_and_its_answers_do_not_leave(
    local: Registry, bundle: Path, strict: Path, photos: list[Path], tmp_path: Path
) -> None:
    one, two = local.add(bundle), local.add(strict)
    promote(local, one, expected=0, now=1.0, by="ada")
    move(local, "shadow", two)
    log = EventLog(tmp_path / "log")
    live = LiveCascade(local.root, threads=1, log=log)
    assert same(live.predict(photos, now=5.0), Cascade.load(bundle).predict(photos))
    assert {event.bundle for event in log} == {one}
    pairs = list(read_pairs(log.folder, two))
    assert len(pairs) == len(photos) and {pair.served for pair in pairs} == {"champion"}
    assert [pair.champion_exited for pair in pairs] == Cascade.load(bundle).predict(photos).exited.tolist()
    assert not any(pair.candidate_exited for pair in pairs)
    # A killed writer's torn line spoils no other.
    path = log.folder / "pairs" / f"{two}.jsonl"
    path.write_bytes(path.read_bytes() + b'\n{"time": 5')
    live.predict(photos[:1], now=6.0)
    assert len(list(read_pairs(log.folder, two))) == len(photos) + 1


def test_a_canary_answers_its_share_always_of_the_same_images(
    local: Registry, bundle: Path, strict: Path, photos: list[Path], tmp_path: Path
) -> None:
    one, two = local.add(bundle), local.add(strict)
    promote(local, one, expected=0, now=1.0, by="ada")
    move(local, "canary", two, share=0.5)
    log = EventLog(tmp_path / "log")
    live = LiveCascade(local.root, threads=1, log=log, plan=ReviewPlan(seed=1))
    both = [Cascade.load(path, threads=1).predict(photos) for path in (bundle, strict)]
    found = live.predict(photos, now=5.0)
    events = {event.image_sha256: event.bundle for event in log}
    hers = [takes_canary(pair.image_sha256, 0.5, two) for pair in read_pairs(log.folder, two)]
    assert 0 < sum(hers) < len(photos) == len(hers)
    assert all((bundle_ == two) == takes_canary(image, 0.5, two) for image, bundle_ in events.items())
    from stage1_pro.files import sha256_file

    for row, photo in enumerate(photos):
        mine = both[int(takes_canary(sha256_file(photo), 0.5, two))]
        assert found.stage[row] == mine.stage[row] and found.label[row] == mine.label[row]
    images = [f"{i:064x}" for i in range(2000)]
    few, more = ({i for i in images if takes_canary(i, share, two)} for share in (0.1, 0.3))
    assert few < more and abs(len(few) / 2000 - 0.1) < 0.03
    # Another candidate tries itself on other photos.
    assert len(few & {i for i in images if takes_canary(i, 0.1, "another")}) < 0.3 * len(few)


def test_a_canary_that_fails_takes_no_answer_with_it(
    local: Registry, bundle: Path, strict: Path, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = local.add(bundle), local.add(strict)
    promote(local, one, expected=0, now=1.0, by="ada")
    move(local, "canary", two, share=1.0)
    live = LiveCascade(local.root, threads=1, log=EventLog(tmp_path / "log"))
    seat = live._serving.candidate
    assert seat is not None

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    # It answers, but neither what it said nor that this failed can be written: one answer a photo all the same.
    read, write = os.pipe()
    os.close(read)
    with monkeypatch.context() as patch, os.fdopen(write, "w") as closed:
        patch.setattr("stage1_pro.continual.serving.live._append_pairs", fail)
        patch.setattr("sys.stderr", closed)
        assert same(live.predict(photos), Cascade.load(strict).predict(photos))
    assert live.candidate_failures == 1
    live.candidate_failures = 0
    monkeypatch.setattr(seat.cascade.runtime, "run", fail)
    assert same(live.predict(photos), Cascade.load(bundle).predict(photos))
    assert live.candidate_failures == 2


@pytest.mark.parametrize("name", ["canary", "shadow"])
def test_what_tightens_the_champion_is_not_the_candidates(
    local: Registry, bundle: Path, strict: Path, photos: list[Path], tmp_path: Path, name: str
) -> None:
    one, two = local.add(strict), local.add(bundle)
    promote(local, one, expected=0, now=1.0, by="ada")
    with local.store.write() as connection:
        local.tighten(connection, one, 1.0000001, now=2.0)
    move(local, name, two, **({"share": 1.0} if name == "canary" else {}))
    log = EventLog(tmp_path / "log")
    served = LiveCascade(local.root, threads=1, log=log).predict(photos)
    own = Cascade.load(bundle, threads=1).predict(photos).exited
    assert own.any()
    assert served.exited.tolist() == (own if name == "canary" else np.zeros_like(own)).tolist()
    assert [pair.candidate_exited for pair in read_pairs(log.folder, two)] == own.tolist()
    assert not any(pair.champion_exited for pair in read_pairs(log.folder, two))


def test_thresholds_that_served_once_are_not_kept(local: Registry, bundle: Path, photos: list[Path]) -> None:
    name = local.add(bundle)
    promote(local, name, expected=0, now=1.0, by="ada")
    live = LiveCascade(local.root, threads=1)
    for k in range(5):
        with local.store.write() as connection:
            local.tighten(connection, name, 0.9 + 0.01 * k, now=2.0)
        local.sync()
        live.predict(photos[:1], now=3.0)
    assert len(live._loaded) == 1 and live.pointer.threshold == 0.9 + 0.01 * 4


def test_a_threshold_tightens_and_never_loosens(local: Registry, bundle: Path, photos: list[Path]) -> None:
    one = local.add(bundle)
    promote(local, one, expected=0, now=1.0, by="ada")
    policy = local.load(one).policy
    live = LiveCascade(local.root, threads=1)
    assert live.predict(photos).exited.any()
    for threshold, exits in ((1.0000001, False), (0.0, True)):
        with local.store.write() as connection:
            local.tighten(connection, one, threshold, now=2.0)
        assert local.sync().threshold == threshold
        assert live.predict(photos).exited.any() == exits
        assert tightened(policy, threshold).exit_threshold >= policy.exit_threshold


def test_serving_audits_more_while_it_is_asked_to(
    local: Registry, bundle: Path, photos: list[Path], tmp_path: Path
) -> None:
    promote(local, local.add(bundle), expected=0, now=1.0, by="ada")
    plan = ReviewPlan(floor=0.02, deferral=0, abstention=0, disagreement=0, entropy=0, novelty=0, seed=5)
    log = EventLog(tmp_path / "log")
    live = LiveCascade(local.root, threads=1, log=log, plan=plan, writer="w")
    serials = [live.pointer.serial]
    for now, rate in ((2.0, None), (3.0, 0.4), (4.0, 0.01), (5.0, None)):
        with local.store.write() as connection:
            local.audit_at(connection, rate, now=now)
        serials.append(local.sync().serial)
        live.predict(photos, now=now)
        assert live.pointer.audit_rate == rate
    assert serials == sorted(set(serials))
    events = list(log)
    assert len({one.id for one in events}) == len(events) == 4 * len(photos)
    for one in events:
        assert one.propensity == (0.4 if one.time == 3.0 else 0.02)
        assert one.selected == plan.selects(one.id, one.propensity)


def test_serving_picks_up_what_is_known_without_a_restart(
    local: Registry, bundle: Path, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = local.add(bundle)
    promote(local, name, expected=0, now=1.0, by="ada")
    plan = ReviewPlan(deferral=0, abstention=0, disagreement=0, entropy=0, novelty=0.5)
    log = EventLog(tmp_path / "log")

    def rates(live: LiveCascade, now: float) -> set[float]:
        live.predict(photos, now=now)
        return {one.propensity for one in log if one.time == now}

    live = LiveCascade(local.root, threads=1, log=log, plan=plan)
    assert rates(live, 2.0) == {0.02}
    path = novelty_path(local.root, name)
    far = Novelty.fit(np.random.default_rng(0).normal(1e6, 1.0, size=(100, SKETCH_SIZE)))
    far.write(path)
    novel = {0.02 + 0.98 * 0.5}
    assert rates(live, 3.0) == novel == rates(LiveCascade(local.root, threads=1, log=log, plan=plan), 4.0)
    # A plan without novelty does not look; a damaged file is said and costs no answer.
    assert rates(LiveCascade(local.root, threads=1, log=log, plan=ReviewPlan(entropy=0, novelty=0, deferral=0,
                 disagreement=0)), 5.0) == {0.02}  # fmt: skip
    flat = far.model_copy(update={"factor": (far.mean,) * SKETCH_SIZE}).model_dump_json()
    for now, damaged in ((6.0, "{"), (7.0, flat)):
        path.write_text(damaged)
        capsys.readouterr()
        live = LiveCascade(local.root, threads=1, log=log, plan=plan)
        assert rates(live, now) == {0.02} == rates(live, now + 0.5)
        assert capsys.readouterr().err.count("nothing is novel to") == 1


def test_what_was_written_before_there_was_an_audit_rate_is_read(local: Registry, bundle: Path) -> None:
    promote(local, local.add(bundle), expected=0, now=1.0, by="ada")
    with local.store.write() as connection:
        connection.execute(text("DROP TABLE audit_rates"))
    old = json.loads((local.root / POINTER).read_text())
    del old["audit_rate"]
    write_bytes(local.root / POINTER, json.dumps(old).encode())
    assert read_pointer(local.root).audit_rate is None
    assert LiveCascade(local.root, threads=1).pointer.audit_rate is None
    opened = Store(local.root / "loop.db")
    assert Registry(local.root, opened).sync().audit_rate is None
    with opened.write() as connection:
        Registry(local.root, opened).audit_at(connection, 0.5, now=2.0)
    assert Registry(local.root, opened).sync().audit_rate == 0.5
    opened.close()


def test_serving_needs_neither_torch_nor_a_database() -> None:
    script = (
        "import sys\n"
        "for name in ('torch', 'sqlalchemy', 'transformers'): sys.modules[name] = None\n"
        "import stage1_pro.continual.serving.live\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


# --------------------------------------------------------------------------------------------
# Audit


def fill(store: Store, count: int = 12) -> None:
    for index in range(count):
        with store.write() as connection:
            audit.append(connection, store, "edge", {"b": index, "a": ["é", 0.1 * index]}, float(index))


@pytest.mark.parametrize("change", ["body = CAST(body AS BLOB)", "kind = CAST(kind AS BLOB)", "time = 9e999"])
def test_a_value_that_became_another_type_is_found(tmp_path: Path, change: str) -> None:
    store = Store(tmp_path / "loop.db")
    for index in (1.0, 2.0):
        with store.write() as connection:
            audit.append(connection, store, "edge", {"a": index}, index)
    with store.write() as connection:
        connection.execute(text("DROP TRIGGER audit_no_update"))
        connection.execute(text(f"UPDATE audit SET {change} WHERE seq = 2"))
    found = audit.verify(store)
    assert (found.ok, found.rows, found.broken_at) == (False, 1, 2)
    store.close()


def test_a_flipped_byte_is_found_and_where(store: Store, tmp_path: Path) -> None:
    fill(store)
    whole = audit.verify(store)
    assert (whole.ok, whole.rows) == (True, 12)
    assert audit.export(store, tmp_path / "audit.jsonl") == 12
    data = (tmp_path / "audit.jsonl").read_bytes()
    assert verify_file(tmp_path / "audit.jsonl") == whole
    lines = np.cumsum([len(line) + 1 for line in data.split(b"\n")[:-1]])
    rng = np.random.default_rng(0)
    for place in rng.choice(len(data), 300, replace=False):
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "flipped.jsonl").write_bytes(flipped)
        found = verify_file(tmp_path / "flipped.jsonl")
        row = int(np.searchsorted(lines, place, side="right")) + 1
        assert not found.ok and found.broken_at == row, (place, found)


def test_the_store_refuses_changes_and_a_forced_one_is_found(store: Store) -> None:
    fill(store)
    change = "UPDATE audit SET body = replace(body, '0.5', '0.6') WHERE seq = 6"
    with pytest.raises(Exception, match="append-only"), store.write() as connection:
        connection.execute(text(change))
    with store.write() as connection:
        if store.is_sqlite:
            connection.execute(text("DROP TRIGGER audit_no_update"))
        else:
            connection.execute(text("ALTER TABLE audit DISABLE TRIGGER ALL"))
        connection.execute(text(change))
    found = audit.verify(store)
    assert (found.ok, found.broken_at, found.reason) == (False, 6, "it is not what was written")


def test_rows_cut_off_are_found_by_the_head(store: Store, tmp_path: Path) -> None:
    fill(store)
    head = audit.verify(store).head
    audit.export(store, tmp_path / "all.jsonl")
    lines = (tmp_path / "all.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(lines[:-2]))
    assert verify_file(tmp_path / "cut.jsonl").ok
    assert not verify_file(tmp_path / "cut.jsonl", head=head).ok
    (tmp_path / "hole.jsonl").write_text("".join(lines[:4] + lines[5:]))
    assert verify_file(tmp_path / "hole.jsonl").broken_at == 5
    with pytest.raises(ArtifactError, match="must be an exported audit"):
        verify_file(tmp_path / "none.jsonl")
    # Row 6 written anew, with a hash of its own that is right: row 7 follows another.
    sixth = AuditRow.model_validate_json(lines[5]).model_copy(update={"time": 7e9})
    sixth = sixth.model_copy(update={"hash": sixth.expected_hash()})
    anew = [*lines[:5], canonical(sixth.model_dump()) + "\n", *lines[6:]]
    (tmp_path / "anew.jsonl").write_text("".join(anew))
    found = verify_file(tmp_path / "anew.jsonl")
    assert (found.ok, found.broken_at, found.reason) == (False, 7, "it does not follow the row before")


def test_a_row_stands_only_with_its_transaction(store: Store) -> None:
    fill(store, 2)

    def die() -> None:
        with store.write() as connection:
            audit.append(connection, store, "edge", {}, 3.0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        die()
    fill(store, 1)
    assert audit.verify(store).rows == 3


def _append(url: str, start: Any) -> None:
    store = Store(url)
    start.wait()
    fill(store, 10)


def test_appending_processes_make_one_chain(store: Store, store_url: str) -> None:
    store.close()
    start = FORK.Barrier(4)
    writers = [FORK.Process(target=_append, args=(store_url, start)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    assert audit.verify(store).rows == 40
