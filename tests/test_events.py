"""Room continual: the event log, selection for review, the store's rows of events and labels, what goes in and out."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy import stats
from sqlalchemy import exc, select, text

from stage1_pro.continual.ledger.exchange import (
    export_csv,
    export_label_studio,
    export_parquet,
    import_csv,
    import_label_studio,
)
from stage1_pro.continual.ledger.labels import (
    GUARD_SOURCES,
    Disagreement,
    Label,
    Source,
    add_events,
    add_labels,
    disagreement,
    ingest,
    labels,
    read_events,
    read_labels,
    resolve,
)
from stage1_pro.continual.ledger.store import Store
from stage1_pro.continual.loop import folder
from stage1_pro.continual.loop.config import RoundsConfig
from stage1_pro.continual.loop.history import History
from stage1_pro.continual.serving.events import (
    SKETCH_SIZE,
    BundleFacts,
    Event,
    EventLog,
    Novelty,
    Position,
    ReviewPlan,
    entropy,
    sketch,
)
from stage1_pro.continual.serving.served import Served
from stage1_pro.continual.watch.status import MonitorConfig
from stage1_pro.data.images import PreprocessSpec
from stage1_pro.deploy.bundle import Bundle
from stage1_pro.deploy.cascade import Cascade
from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.files import sha256_bytes, sha256_file, uniform
from stage1_pro.policies.softmax import Thresholds

BUNDLE = "a" * 64
FACTS = BundleFacts(bundle=BUNDLE, classes=("none", "roadwork"), positive="roadwork")


def make_event(index: int, **changes: Any) -> Event:
    values: dict[str, Any] = {
        "id": f"e{index:05d}", "time": 1000.0 + index, "bundle": BUNDLE, "image_sha256": sha256_bytes(b"%d" % index),
        "action": "exit", "stage": "A", "label": "none", "prob_a": 0.1, "prob_b": None, "confidence": 0.9,
        "gate_logit": 1 / 3, "exit_score": 0.9, "threshold": 0.8, "propensity": 0.25, "selected": True,
        "sketch": np.random.default_rng(index).normal(size=SKETCH_SIZE).astype(np.float32),
    }  # fmt: skip
    return Event(**(values | changes))


def label(event: str, name: str = "none", source: Any = "review", annotator: str = "ada", at: float = 5.0) -> Label:
    return Label(event_id=event, label=name, source=source, annotator=annotator, time=at)


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    made = EventLog(tmp_path / "log")
    made.describe(FACTS)
    return made


@pytest.fixture
def filled(store: Store, log: EventLog) -> Store:
    """A store with twelve selected events of a known bundle."""
    log.append([make_event(index) for index in range(12)])
    assert ingest(store, log).events == 12
    return store


# --------------------------------------------------------------------------------------------
# The log


def test_what_is_logged_is_read(log: EventLog) -> None:
    events = [
        make_event(0),
        make_event(1, prob_a=None, exit_score=None, confidence=None, stage="", label="", action="abstain"),
    ]
    log.append(events[:1])
    log.append(events[1:])
    log.append([])
    assert list(log) == events
    assert log.read(log.read().position).events == ()
    assert EventLog(log.folder).bundles() == {BUNDLE: FACTS}
    line = json.loads((log.folder / "events-00000000.jsonl").read_text().splitlines()[0])
    assert line["id"] == "e00000" and isinstance(line["sketch"], str)


@pytest.mark.parametrize(
    ("change", "needle"),
    [({"sketch": [1.0] * 63}, "64 values"), ({"propensity": 0.0}, "greater than 0"), ({"bundle": "x"}, "pattern"),
     ({"action": "stop"}, "exit"), ({"time": math.nan}, "finite")],
)  # fmt: skip
def test_an_event_is_checked(change: dict[str, Any], needle: str) -> None:
    with pytest.raises(ValueError, match=needle):
        make_event(0, **change)


def test_segments_are_begun(tmp_path: Path) -> None:
    log = EventLog(tmp_path, segment_bytes=2000, sync_seconds=0)
    for index in range(12):
        log.append([make_event(index)])
    assert len(list(tmp_path.glob("events-*.jsonl"))) > 2
    assert [one.id for one in log] == [f"e{i:05d}" for i in range(12)]
    # In small helpings too.
    position, seen = Position(), []
    while (tail := log.read(position, limit=5)).events:
        position, seen = tail.position, [*seen, *tail.events]
    assert len(seen) == 12
    assert log.read(position).events == ()
    log.append([make_event(99)])
    assert [one.id for one in log.read(position).events] == ["e00099"]


def test_a_torn_line_is_reported_and_harms_no_other(log: EventLog) -> None:
    log.append([make_event(0)])
    path = log.folder / "events-00000000.jsonl"
    with path.open("ab") as file:
        file.write(make_event(1).model_dump_json().encode()[:200])
    tail = log.read()
    assert [one.id for one in tail.events] == ["e00000"] and tail.pending == 200 and not tail.torn
    log.append([make_event(2)])
    after = log.read(tail.position)
    assert [one.id for one in after.events] == ["e00002"] and after.pending == 0
    (torn,) = after.torn
    assert torn.startswith(f"0:{tail.position.offset}: ") and "JSON" in torn
    assert [one.id for one in log] == ["e00000", "e00002"]


def test_a_full_disk_leaves_nothing_behind(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    log.append([make_event(0)])
    real, calls = os.write, []

    def write(file: int, data: Any) -> int:
        calls.append(len(data))
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(file, bytes(data)[:100])

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="No space"):
        log.append([make_event(1)])
    monkeypatch.undo()
    log.append([make_event(2)])
    tail = log.read()
    assert [one.id for one in tail.events] == ["e00000", "e00002"] and not tail.torn and not tail.pending


WRITER = """
import sys
from stage1_pro.continual.serving.events import Event, EventLog
log = EventLog(sys.argv[1], segment_bytes=300_000)
events = [Event.model_validate_json(line) for line in open(sys.argv[2])]
print("ready", flush=True)
sys.stdin.readline()
size, k = len(events), 0
while sys.argv[3] == "for ever" or k < size:
    log.append(events[k % size : k % size + 7])
    k += 7
    print(k, flush=True)
"""


def writer(folder: Path, events: range, how: str) -> subprocess.Popen[str]:
    """A process that appends these events, seven at a time, once told to, and says how many it has appended."""
    file = folder / f"input-{events.start}.txt"
    file.write_text("".join(make_event(index).model_dump_json() + "\n" for index in events))
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(file), how],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_many_processes_write_one_log(tmp_path: Path) -> None:
    writers = [writer(tmp_path, range(700 * n, 700 * n + 700), "once") for n in range(3)]
    for one in writers:
        assert one.stdout is not None and one.stdout.readline() == "ready\n"
    for one in writers:
        one.communicate("go\n", timeout=60)
    log = EventLog(tmp_path)
    assert len(list(tmp_path.glob("events-*.jsonl"))) > 1
    tail = log.read(limit=10**6)
    assert not tail.torn and not tail.pending
    assert sorted(one.id for one in tail.events) == [f"e{i:05d}" for i in range(2100)]
    assert {one.id: one for one in tail.events}["e00700"] == make_event(700)


def test_killed_writers_lose_nothing_they_had_appended(tmp_path: Path) -> None:
    """kill -9 in the middle of appending, eight times, beside a writer that goes on."""
    rng = np.random.default_rng(0)
    log = EventLog(tmp_path)
    promised = 0
    for _ in range(8):
        one = writer(tmp_path, range(700), "for ever")
        assert one.stdin is not None and one.stdout is not None and one.stdout.readline() == "ready\n"
        one.stdin.write("go\n")
        one.stdin.flush()
        time.sleep(float(rng.uniform(0, 0.03)))
        os.kill(one.pid, signal.SIGKILL)
        said = [line for line in one.communicate(timeout=30)[0].splitlines(keepends=True) if line.endswith("\n")]
        promised += int(said[-1]) if said else 0
        log.append([make_event(9999)])
        promised += 1
    found, torn, position = 0, 0, Position()
    while (tail := log.read(position)).position != position:
        found, torn, position = found + len(tail.events), torn + len(tail.torn), tail.position
    assert tail.pending == 0
    assert found >= promised > 8
    assert torn <= 8


def test_images_are_kept_for_their_time(log: EventLog) -> None:
    kept, name = log.images, sha256_bytes(b"picture")
    kept.put(name, b"picture", 1000.0)
    assert name in kept and kept.get(name) == b"picture"
    assert kept.purge(1000.0 + kept.ttl - 1) == 0
    kept.put(name, b"picture", 2000.0)
    assert kept.purge(1000.0 + kept.ttl) == 0
    assert kept.purge(2000.0 + kept.ttl) == 1
    assert kept.get(name) is None and name not in kept
    with pytest.raises(InputError, match="64 hexadecimal"):
        kept.get("../../etc/passwd")


def test_a_clock_that_leaps_removes_nothing_unasked(tmp_path: Path) -> None:
    day, log = 86400.0, EventLog(tmp_path / "log", image_ttl=30 * 86400.0)
    for index in range(40):
        data = b"%d" % index
        log.append([make_event(index, time=index * day)])
        log.images.put(sha256_bytes(data), data, index * day)
    there = lambda: {index for index in range(40) if sha256_bytes(b"%d" % index) in log.images}  # noqa: E731
    found = log.purge(40 * day)
    assert (found.removed, found.in_doubt) == (11, 0) and there() == set(range(11, 40))
    for leap in (31, 90, 10_000):
        found = log.purge((39 + leap) * day)
        assert found.removed == 0 and found.in_doubt == min(29, leap - 30 + 28) and there() == set(range(11, 40))
    assert log.purge(129 * day, asked=True).removed == 29 and not there()


def test_serving_removes_old_images_now_and_then(
    cascade: Cascade, log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stage1_pro.continual.serving.served.PURGE_SECONDS", 0.0)
    day, old = 86400.0, sha256_bytes(b"old")
    log.images.put(old, b"old", 0.0)
    served = Served(cascade, log, plan=ReviewPlan(floor=1.0))
    paths = photos(tmp_path, [30, 200])
    served.predict(paths, now=10 * day)
    for at in range(11, 30):
        served.predict(paths, now=at * day)
    assert old in log.images
    served.predict(paths, now=31 * day)
    assert old not in log.images
    mine = sha256_bytes(paths[0].read_bytes())
    late = photos(tmp_path / "late", [90])
    # A leap is no end of a photo's time, and stays none when its own events are in the log.
    for at in (100.0, 101.0, 102.0):
        served.predict(late, now=at * day)
        assert mine in log.images and log.purge(at * day).in_doubt == 2
    served.predict(late, now=140 * day)
    assert log.purge(140 * day).in_doubt == 2 and log.purge(140 * day, asked=True).removed == 2
    # Once it is put right, time goes on.
    log.images.put(old, b"old", 141 * day)
    served.predict(late, now=141 * day)
    log.purge(300 * day)
    assert log.purge(142 * day).in_doubt == 0 and old in log.images


def test_a_log_keeps_its_time_to_live(tmp_path: Path) -> None:
    first = EventLog(tmp_path, image_ttl=3600.0)
    again = EventLog(tmp_path)
    assert again.info == first.info and again.images.ttl == 3600
    with pytest.raises(InputError, match="3600 s, got 60"):
        EventLog(tmp_path, image_ttl=60.0)
    (tmp_path / "log.json").write_text("{}")
    with pytest.raises(ArtifactError, match="not a valid LogInfo"):
        EventLog(tmp_path)


@pytest.mark.parametrize(
    "given", [{"sync_seconds": -1.0}, {"segment_bytes": 0}, {"image_ttl": 0.0}, {"image_ttl": math.inf}]
)
def test_wrong_arguments_of_a_log(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{next(iter(given))} must be"):
        EventLog(tmp_path, **given)


# --------------------------------------------------------------------------------------------
# Selection


def test_the_floor_cannot_be_lowered() -> None:
    with pytest.raises(ValueError, match="floor"):
        ReviewPlan(floor=0.01)
    assert ReviewPlan(floor=0.05).floor == 0.05
    nothing = ReviewPlan(deferral=0, abstention=0, disagreement=0, entropy=0, novelty=0)
    assert nothing.propensity([False], [False], [False], [0.0], [0.0]).tolist() == [0.02]


def test_every_reason_raises_the_chance_and_none_lowers_it() -> None:
    plan = ReviewPlan()
    rng = np.random.default_rng(0)
    signals = [rng.random(200) < 0.5 for _ in range(3)] + [rng.random(200) for _ in range(2)]
    chance = plan.propensity(*signals)
    assert (chance >= plan.floor).all() and (chance <= 1).all()
    for index in range(5):
        raised = [s if i != index else np.ones(200) for i, s in enumerate(signals)]
        assert (plan.propensity(*raised) >= chance).all()
    assert ReviewPlan(disagreement=1.0).propensity([1], [0], [1], [0]).tolist() == [1.0]
    # A row without numbers is as unsure as can be.
    assert plan.propensity([0], [0], [0], [math.nan]) == plan.propensity([0], [0], [0], [1.0])


def test_selection_is_poisson_with_the_logged_chance_and_reproducible() -> None:
    plan = ReviewPlan(seed=7)
    ids = [f"event-{i}" for i in range(20_000)]
    chosen = np.array([plan.selects(name, 0.02) for name in ids])
    assert stats.binomtest(int(chosen.sum()), len(ids), 0.02).pvalue > 1e-3
    assert stats.kstest([uniform(7, "review", name) for name in ids], "uniform").pvalue > 1e-3
    assert chosen.tolist() == [ReviewPlan(seed=7).selects(name, 0.02) for name in ids]
    assert chosen.tolist() != [ReviewPlan(seed=8).selects(name, 0.02) for name in ids]
    # One number on every machine.
    assert uniform(0, "review", "e1") == 0.948439057048519
    # A larger chance selects whatever a smaller one does.
    assert all(plan.selects(name, 0.5) for name, was in zip(ids, chosen, strict=True) if was)


def test_weighing_by_the_chance_undoes_the_selection() -> None:
    """Naive error of the reviewed is far off, inverse propensities are not (fact 2 of the method)."""
    rng, plan = np.random.default_rng(1), ReviewPlan()
    n = 40_000
    deferred = rng.random(n) < 0.3
    wrong = rng.random(n) < np.where(deferred, 0.3, 0.02)
    chance = plan.propensity(deferred, np.zeros(n), deferred & (rng.random(n) < 0.5), np.where(deferred, 0.8, 0.1))
    chosen = np.array([plan.selects(str(i), p) for i, p in enumerate(chance)])
    assert abs(wrong[chosen].mean() - wrong.mean()) > 0.05
    weight = 1 / chance[chosen]
    assert abs((weight * wrong[chosen]).sum() / weight.sum() - wrong.mean()) < 0.02


def test_a_raised_plan_selects_more_and_leaves_the_floors_sample_as_it_was() -> None:
    plan = ReviewPlan(floor=0.02, entropy=0.5, seed=7)
    assert plan.raised(None) is plan and plan.raised(0.0) is plan
    raised = plan.raised(0.3)
    assert (raised.floor, raised.seed) == (plan.floor, plan.seed)
    no, signal = np.zeros(2000), np.linspace(0, 1, 2000)
    before, after = (one.propensity(no, no, no, signal) for one in (plan, raised))
    assert after.min() == 0.3 and np.array_equal(after, np.maximum(before, 0.3))
    names = [f"e{i}" for i in range(2000)]
    drawn = [
        {name for name, chance in zip(names, chances, strict=True) if one.selects(name, chance)}
        for one, chances in ((plan, before), (raised, after))
    ]
    assert drawn[0] < drawn[1] and len(drawn[1]) > 1.2 * len(drawn[0])
    # What the loop checks and deals by: chance and floor of the plan that never changes.
    assert all(plan.selects(name, chance) == (name in drawn[1]) for name, chance in zip(names, after, strict=True))
    assert ReviewPlan.model_validate_json('{"floor": 0.05}').least == 0.0


def test_entropy() -> None:
    assert entropy([[0.5, 0.5], [1.0, 0.0]]).tolist() == [1.0, 0.0]
    assert entropy(np.full((1, 7), 1 / 7)) == pytest.approx(1.0)
    assert np.isnan(entropy([[math.nan, math.nan]])).all()


def test_sketches_keep_distances_and_never_change() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(40, 5, 384)).astype(np.float32)
    made = sketch(tokens)
    assert made.shape == (40, SKETCH_SIZE) and made.dtype == np.float32
    assert np.array_equal(made, sketch(tokens[:, 0]))
    true = np.linalg.norm(tokens[1:, 0] - tokens[0, 0], axis=1)
    assert np.abs(np.linalg.norm(made[1:] - made[0], axis=1) / true - 1).max() < 0.35
    # The bits of SHAKE-256, written down: logs of years compare.
    basis = sketch(np.eye(384)[:1])[0] * 8
    assert "".join("1" if value > 0 else "0" for value in basis[:16]) == "1010000000101000"
    assert sketch(np.full((1, 8), np.nan)).tolist() == [[0.0] * SKETCH_SIZE]
    with pytest.raises(InputError, match="hidden must have shape"):
        sketch(np.zeros(5))


def test_novelty_is_of_what_lies_outside() -> None:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(SKETCH_SIZE, SKETCH_SIZE)) * np.linspace(0.01, 1, SKETCH_SIZE)
    known = rng.normal(size=(2000, SKETCH_SIZE)) @ mix
    fitted = Novelty.fit(known)
    assert (fitted.signal(known) > 0).mean() == pytest.approx(0.05, abs=0.01)
    fresh = rng.normal(size=(500, SKETCH_SIZE)) @ mix
    assert (fitted.signal(fresh) > 0).mean() < 0.12
    assert (fitted.signal(fresh * 4) == 1).mean() > 0.99
    # A direction in which known ones hardly vary counts, though its length is small.
    axes = np.linalg.svd(known - known.mean(axis=0), full_matrices=False)[2]
    assert fitted.signal(known.mean(axis=0) + 20 * axes[[0, -1]]).tolist() == [0, 1]
    assert Novelty.parse(fitted.model_dump_json(), "novelty") == fitted
    # Few rows do, and copies of one.
    assert Novelty.fit(known[:5]).signal(known[5:100] * 10).mean() > 0.9
    assert np.isfinite(Novelty.fit(np.ones((3, SKETCH_SIZE))).signal(known)).all()
    with pytest.raises(InputError, match="finite"):
        Novelty.fit(np.zeros((1, SKETCH_SIZE)))


# --------------------------------------------------------------------------------------------
# Serving


class Stages:
    """A runtime whose stages are functions of the mean pixel: no torch, no graph."""

    name = "arithmetic"

    def run(self, stage: str, inputs: Any) -> dict[str, Any]:
        if stage == "stage_b":
            level = inputs["hidden"].mean(axis=1)
            return {"logits": np.stack([level * 2, -level * 2], axis=1).astype(np.float32)}
        level = inputs["pixels"].mean(axis=(1, 2, 3))
        hidden = np.repeat(level[:, None], 8, axis=1) + np.arange(8) * 1e-3
        # NaN for the darkest, as a broken model gives.
        logits = np.where(level[:, None] < -1.95, np.nan, np.stack([-level, level], axis=1))
        return {"logits": logits.astype(np.float32), "gate_logit": level.astype(np.float32),
                "hidden": hidden.astype(np.float32)}  # fmt: skip


@pytest.fixture
def cascade(tmp_path: Path) -> Cascade:
    classes = ["none", "roadwork"]
    # Of a policy the cascade asks for its classes and its threshold alone.
    policy = Thresholds.model_construct(policy="softmax", classes=classes, positive="roadwork", exit_threshold=0.8)
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "bundle.json").write_text("{}")
    spec = PreprocessSpec(height=4, width=4)
    manifest: Any = type("M", (), {"classes": classes, "positive": "roadwork", "preprocessing": spec})
    return Cascade(Bundle(folder, manifest, policy, None, raw=b"{}"), Stages())  # type: ignore[arg-type]


def photos(folder: Path, levels: list[int]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = []
    for index, level in enumerate(levels):
        paths.append(folder / f"{index}.png")
        Image.fromarray(np.full((6, 6, 3), level, dtype=np.uint8)).save(paths[-1])
    return paths


def test_every_decision_is_an_event(cascade: Cascade, log: EventLog, tmp_path: Path) -> None:
    paths = photos(tmp_path / "photos", [255, 130, 110, 40, 0])
    served = Served(cascade, log, plan=ReviewPlan(disagreement=1.0), writer="w")
    decisions = served.predict(paths, now=50.0, batch_size=2)
    plain = cascade.predict(paths)
    assert decisions.to_dict().keys() == plain.to_dict().keys()
    for name in ("label", "stage", "exited", "accepted"):
        assert getattr(decisions, name).tolist() == getattr(plain, name).tolist()
    events = list(log)
    assert len(events) == 5 and len({one.id for one in events}) == 5
    assert {one.bundle for one in events} == {sha256_file(cascade.bundle.path / "bundle.json")}
    for one, path, row in zip(events, paths, decisions, strict=True):
        assert one.image_sha256 == sha256_file(path) and one.time == 50.0 and one.threshold == 0.8
        assert one.label == row["label"] and one.stage == row["stage"]
        assert one.action == ("abstain" if not row["accepted"] else "exit" if row["exited"] else "defer")
        if one.action == "exit":
            assert one.prob_b is None and one.prob_a == row["prob"] and one.exit_score == row["confidence"]
            assert one.exit_score >= one.threshold
        elif one.prob_b is not None:
            assert one.prob_b == row["prob"]
        assert one.propensity >= 0.02
    assert [one.action for one in events] == ["exit", "defer", "defer", "exit", "defer"]
    # Stage B says the opposite of Stage A here, so every deferred one with numbers of both is looked at.
    assert all(one.selected for one in events if one.action == "defer")
    for one, path in zip(events, paths, strict=True):
        assert (one.image_sha256 in log.images) == one.selected
        if one.selected:
            assert log.images.get(one.image_sha256) == path.read_bytes()
    assert events[4].prob_a is None and events[4].exit_score is None
    (facts,) = [one for name, one in log.bundles().items() if name != BUNDLE]
    assert facts.classes == ("none", "roadwork") and facts.positive == "roadwork"


def test_a_replay_gives_the_same_events(cascade: Cascade, tmp_path: Path) -> None:
    paths = photos(tmp_path / "photos", [255, 130, 110, 40, 0, 130])
    lines = []
    for name in ("one", "two"):
        log = EventLog(tmp_path / name)
        served = Served(cascade, log, writer="replay")
        served.predict(paths, now=1.5)
        served.predict(paths, now=1.5)
        lines.append((tmp_path / name / "events-00000000.jsonl").read_bytes())
    assert lines[0] == lines[1] and len({one.id for one in log}) == 12
    other = EventLog(tmp_path / "three")
    Served(cascade, other).predict(paths, now=1.5)
    assert not {one.id for one in other} & {one.id for one in log}


def test_exits_are_audited_at_the_floor(cascade: Cascade, log: EventLog, tmp_path: Path) -> None:
    (path,) = photos(tmp_path / "photos", [255])
    served = Served(cascade, log, plan=ReviewPlan(entropy=0, novelty=0), writer="w")
    served.predict([path.read_bytes()] * 3000, now=1.0, batch_size=500)
    events = list(log)
    assert {one.action for one in events} == {"exit"} and {one.propensity for one in events} == {0.02}
    assert stats.binomtest(sum(one.selected for one in events), 3000, 0.02).pvalue > 1e-3


def test_novel_features_are_looked_at(cascade: Cascade, log: EventLog, tmp_path: Path) -> None:
    known, new = photos(tmp_path / "photos", [255, 20])
    trace: list[Any] = []
    cascade.decide(np.stack([cascade.pixels(known)]), watch=trace.append)
    rng = np.random.default_rng(0)
    like = trace[0].hidden + rng.normal(0, 0.01, size=(300, 8))
    served = Served(cascade, log, novelty=Novelty.fit(sketch(like)), writer="w")
    served.predict([known, new], now=1.0)
    first, second = list(log)
    assert {first.action, second.action} == {"exit"} and second.propensity > first.propensity + 0.2


def test_an_answer_leaves_without_its_event_only_where_somebody_is_told(
    cascade: Cascade, log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, told = photos(tmp_path / "photos", [255, 130]), []
    monkeypatch.setattr(log, "append", lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        Served(cascade, log).predict(paths, now=1.0)
    found = Served(cascade, log, on_failure=told.append).predict(paths, now=1.0)
    assert found.to_dict() == cascade.predict(paths).to_dict()
    assert [str(one) for one in told] == ["full"]


def test_images_that_are_no_files(cascade: Cascade, log: EventLog) -> None:
    array = np.full((5, 6, 3), 130, dtype=np.uint8)
    served = Served(cascade, log, plan=ReviewPlan(floor=1.0), writer="w")
    served.predict([array, Image.fromarray(array)], now=1.0)
    first, second = list(log)
    assert first.image_sha256 == second.image_sha256 and first.id != second.id
    data = log.images.get(first.image_sha256)
    assert data is not None and data.startswith(b"\x89PNG")


def test_what_serving_refuses(cascade: Cascade, log: EventLog, tmp_path: Path) -> None:
    served = Served(cascade, log)
    (tmp_path / "no.png").write_text("no image")
    for bad in ("no.png", "absent.png"):
        with pytest.raises(Exception, match=bad):
            served.predict([tmp_path / bad], now=1.0)
    with pytest.raises(InputError, match="put it in a list"):
        served.predict("one.jpg", now=1.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="now must be"):
        served.predict([np.zeros((4, 4), dtype=np.uint8)], now=math.nan)
    with pytest.raises(InputError, match="cascade must be one of a bundle"):
        Served(Cascade(object(), Stages()), log)  # type: ignore[arg-type]
    assert len(served.predict([], now=1.0)) == 0 and list(log) == []


def test_serving_and_logging_need_the_base_install_alone() -> None:
    code = (
        "import sys, importlib.abc\n"
        "class Absent(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name.split('.')[0] in {'torch', 'sqlalchemy', 'psycopg', 'pyarrow', 'river'}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import stage1_pro.continual.serving.served, stage1_pro.deploy.prediction\n"
        "from stage1_pro.cli import main\n"
        "sys.exit(main(['review', '--store', 'x']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 5 and "stage1_pro[continual]" in done.stderr, done.stderr


@pytest.mark.slow
def test_predict_logs_what_a_real_bundle_decides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kit.tiny import make_model, make_policy, make_run, torch_answers

    from stage1_pro.cli import main
    from stage1_pro.data.images import preprocess, read_image
    from stage1_pro.data.splits import Splits
    from stage1_pro.deploy.exporting import export

    model = make_model()
    run = make_run(tmp_path / "run", model)
    images = run / "images"
    spec = model.architecture.preprocessing
    pixels = np.stack([preprocess(read_image(path), spec) for path in sorted(images.iterdir())])
    prob = torch_answers(model, pixels, 0.0)[1]
    middle = float(np.median(np.maximum(prob, 1 - prob)))
    make_policy(model, Splits.read(run / "splits.json").hashes, middle).write(run / "thresholds.json")
    bundle = export(run)
    (images / "broken.jpg").write_text("no image")
    answers = []
    for more in ([], ["--log", str(tmp_path / "log")]):
        assert main(["predict", "--bundle", str(bundle), str(images), "--json", *more]) == 1
        answers.append(json.loads(capsys.readouterr().out)["rows"])
    assert answers[0] == answers[1]
    rows = [row for row in answers[0] if row["error"] is None]
    events = list(EventLog(tmp_path / "log"))
    assert len(events) == len(rows) == 16
    for one, row in zip(events, rows, strict=True):
        assert one.image_sha256 == sha256_file(images / row["file"])
        assert (one.label, one.stage, one.confidence) == (row["label"], row["stage"], row["confidence"])
        assert one.action == {"exited": "exit", "deferred": "defer", "abstained": "abstain"}[row["decision"]]
        assert one.bundle == sha256_file(bundle / "bundle.json") and any(one.sketch)
    assert [one.action for one in events].count("exit") == 8


# --------------------------------------------------------------------------------------------
# The store


def test_ingestion_is_exactly_once(store: Store, log: EventLog) -> None:
    log.append([make_event(i, selected=i % 2 == 0) for i in range(500)])
    with (log.folder / "events-00000000.jsonl").open("ab") as file:
        file.write(b"torn\n{")
    first = ingest(store, log)
    assert (first.events, first.known, len(first.torn), first.pending) == (500, 0, 1, 1)
    log.append([make_event(500), make_event(3)])
    second = ingest(store, log)
    assert (second.events, second.known, len(second.torn)) == (1, 1, 1)
    assert ingest(store, log).events == 0
    assert list(read_events(store)) == [make_event(i, selected=i % 2 == 0 or i > 499) for i in range(501)]
    assert [one.id for one in read_events(store, since=1002, until=1004)] == ["e00002", "e00003"]
    assert list(read_events(store, bundle="b" * 64)) == []


def test_two_ingest_at_once(store_url: str, log: EventLog) -> None:
    log.append([make_event(i) for i in range(3000)])
    code = (
        "import sys\nfrom stage1_pro.continual.serving.events import EventLog\n"
        "from stage1_pro.continual.ledger.labels import ingest\n"
        "from stage1_pro.continual.ledger.store import Store\nlog = EventLog(sys.argv[2])\nprint('ready', flush=True)\n"
        "sys.stdin.readline()\nprint(ingest(Store(sys.argv[1]), log).events)\n"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code, store_url, str(log.folder)], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]  # fmt: skip
    for one in both:
        assert one.stdout is not None and one.stdout.readline() == "ready\n"
    for one in both:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    counts = [int(one.communicate(timeout=120)[0]) for one in both]
    assert sum(counts) == 3000
    store = Store(store_url)
    assert len(list(read_events(store))) == 3000
    store.close()


def test_events_without_a_log(store: Store, log: EventLog) -> None:
    assert add_events(store, [make_event(1), make_event(2)]) == 2
    assert add_events(store, [make_event(2), make_event(3)]) == 1
    with pytest.raises(InputError, match=r"double_share must be in \[0, 1\]"):
        ingest(store, log, double_share=2)


@pytest.mark.parametrize(
    "statement",
    ["UPDATE labels SET label = 'none'", "DELETE FROM labels", "UPDATE events SET propensity = 1", "DELETE FROM events",
     "UPDATE labels SET time = 0 WHERE id = 1"],
)  # fmt: skip
def test_the_database_refuses_to_change_rows(filled: Store, statement: str) -> None:
    add_labels(filled, [label("e00001", "roadwork")])
    with pytest.raises(exc.DBAPIError, match="append-only"), filled.write() as connection:
        connection.execute(text(statement))
    assert [one.label for one in read_labels(filled)] == ["roadwork"]
    assert len(list(read_events(filled))) == 12


def test_the_database_refuses_tricks(filled: Store) -> None:
    add_labels(filled, [label("e00001", "roadwork")])
    trick = "TRUNCATE labels CASCADE"
    if filled.is_sqlite:
        trick = (
            "INSERT OR REPLACE INTO labels (id, kind, event_id, label, source, trust, annotator, time) "
            "VALUES (1, 'answer', 'e00001', 'none', 'review', 2, 'eve', 1)"
        )
    with pytest.raises(exc.DBAPIError, match="append-only"), filled.write() as connection:
        connection.execute(text(trick))
    assert [one.label for one in read_labels(filled)] == ["roadwork"]


# --------------------------------------------------------------------------------------------
# Labels


def test_the_most_trusted_then_the_latest_label_holds(filled: Store) -> None:
    add_labels(filled, [
        label("e00001", "none", "model", "stage-b", 90.0),
        label("e00001", "roadwork", "review", "ada", 10.0),
        label("e00001", "none", "match", "public", 95.0),
        label("e00002", "none", "review", "ada", 10.0),
        label("e00002", "roadwork", "review", "bob", 11.0),
        label("e00003", "none", "review", "ada", 99.0),
        label("e00003", "roadwork", "owner", "city", 1.0),
        label("e00004", "none", "review", "ada", 5.0),
        label("e00004", "roadwork", "review", "ada", 5.0),
    ])  # fmt: skip
    held = resolve(filled)
    assert {name: one.label for name, one in held.items()} == dict.fromkeys(
        ("e00001", "e00002", "e00003", "e00004"), "roadwork"
    )
    assert held["e00001"].source == "review" and held["e00001"].answers == 3
    assert held["e00003"].trust == 3
    assert resolve(filled, sources=["model"])["e00001"].label == "none"
    assert set(resolve(filled, sources=GUARD_SOURCES)) == set(held)
    # What was known at a moment, for replays.
    assert resolve(filled, until=11.0)["e00002"].label == "none"
    with pytest.raises(InputError, match="did you mean 'review'"):
        resolve(filled, sources=["reviews"])  # type: ignore[list-item]


def withdraw(store: Store, label_id: int, now: float) -> None:
    with store.write() as connection:
        row = dict(connection.execute(select(labels).where(labels.c.id == label_id)).mappings().one())
        row |= {"kind": "undo", "label": None, "annotator": "ada", "time": now, "supersedes": row.pop("id")}
        connection.execute(labels.insert(), row)


def test_an_undo_is_a_row_more(filled: Store) -> None:
    add_labels(filled, [label("e00001", "none", at=5.0), label("e00001", "roadwork", at=6.0)])
    withdraw(filled, 2, now=8.0)
    assert resolve(filled)["e00001"].label == "none"
    assert resolve(filled, until=8.0)["e00001"].label == "roadwork"
    with filled.read() as connection:
        assert connection.execute(text("SELECT count(*) FROM labels")).scalar_one() == 3


def test_labels_are_checked_and_added_once(filled: Store) -> None:
    rows = [label("e00001"), label("e00002", "roadwork")]
    assert add_labels(filled, [*rows, rows[0]]).added == 2
    again = add_labels(filled, rows)
    assert (again.added, again.known) == (0, 2)
    with pytest.raises(InputError, match="one of the store's events, got 'e77777'"):
        add_labels(filled, [label("e00003"), label("e77777")])
    with pytest.raises(InputError, match="none, roadwork, got 'roadwrk'.*did you mean 'roadwork'"):
        add_labels(filled, [label("e00003", "roadwrk")])
    assert len(read_labels(filled)) == 2


def test_disagreement_of_double_labels(filled: Store) -> None:
    assert disagreement(filled).rate is None
    rows = [label(f"e{i:05d}", "none", annotator=who) for i in range(10) for who in ("ada", "bob")]
    rows[3] = label("e00001", "roadwork", annotator="bob")
    # A match and a lone answer are no second opinion; a changed mind is no disagreement with oneself.
    rows += [
        label("e00010"),
        label("e00010", "roadwork", "match", "public"),
        label("e00011"),
        label("e00011", "roadwork", at=9.0),
    ]
    add_labels(filled, rows)
    found = disagreement(filled)
    assert (found.doubled, found.disagreeing, found.event_ids) == (10, 1, ("e00001",))
    assert found.rate == 0.1
    exact = stats.binomtest(1, 10).proportion_ci(0.95, "exact")
    assert (found.lower, found.upper) == pytest.approx((exact.low, exact.high))
    answers = {str(i): pair for i, pair in enumerate(["ab"] * 3 + ["aa"] * 8 + ["bb"] * 5)}
    from sklearn.metrics import cohen_kappa_score

    expected = cohen_kappa_score([pair[0] for pair in answers.values()], [pair[1] for pair in answers.values()])
    assert Disagreement.of(answers).kappa == pytest.approx(expected)


def test_a_share_is_asked_about_twice(store: Store, log: EventLog) -> None:
    log.append([make_event(i) for i in range(4000)])
    ingest(store, log)
    with store.read() as connection:
        double = connection.execute(text("SELECT count(*) FROM events WHERE reviews = 2")).scalar_one()
    assert stats.binomtest(double, 4000, 0.05).pvalue > 1e-3


def test_audited_rows(store: Store, log: EventLog) -> None:
    log.append([
        make_event(0),
        make_event(1, action="defer", stage="B", label="none", prob_a=0.7, prob_b=0.2, exit_score=0.7),
        make_event(2, action="abstain", stage="", label="", prob_a=None, exit_score=None, confidence=None),
        make_event(3, selected=False),
        make_event(4),
    ])  # fmt: skip
    ingest(store, log)
    add_labels(store, [label(f"e{i:05d}", "roadwork", at=2000.0) for i in range(4)])
    add_labels(store, [label("e00004", "none", "match", at=2000.0)])
    config = RoundsConfig(monitor=MonitorConfig(alpha=0.1))
    for until, wrong in ((math.inf, {"e00000": True, "e00001": False, "e00002": True}), (2000.0, {})):
        with History.look(store, config, until) as history:
            found = {one.id: one for one in history.answered(BUNDLE, 0.0)}
            assert {name: history.error_of_a(one) for name, one in found.items() if one.selected} == wrong
            assert [one.id for one in history.recent(BUNDLE, 0.0, 9)] == ["e00000", "e00001", "e00003", "e00004"]


# --------------------------------------------------------------------------------------------
# In and out


def test_csv_round_trip(filled: Store, tmp_path: Path) -> None:
    rows = [label("e00001", "roadwork", annotator='Åda "x", y'), label("e00002", "none", "owner", "city", 0.1 + 0.2)]
    add_labels(filled, rows)
    assert export_csv(filled, tmp_path / "labels.csv") == 2
    other = Store(tmp_path / "other.db")
    add_events(other, [make_event(i) for i in range(12)])
    assert import_csv(other, tmp_path / "labels.csv", now=1.0).added == 2
    assert read_labels(other) == rows
    assert import_csv(other, tmp_path / "labels.csv", now=1.0).known == 2


def test_csv_of_a_spreadsheet(filled: Store, tmp_path: Path) -> None:
    path = tmp_path / "owner.csv"
    path.write_text(
        "\ufefflabel,event_id,time\r\nroadwork, e00001 ,2026-11-24T10:00:00Z\r\nnone,e00002,\r\n", encoding="utf-8"
    )
    assert import_csv(filled, path, now=7.0, source="owner", annotator="city").added == 2
    first, second = read_labels(filled)
    assert first == Label(event_id="e00001", label="roadwork", source="owner", annotator="city", time=1795514400.0)
    assert second.time == 7.0


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_of_any_program(delimiter: str, encoding: str, filled: Store, tmp_path: Path) -> None:
    lines = "label,event_id,time\nroadwork,e00001,5\nnone,e00002\n".replace(",", delimiter)
    (tmp_path / "l.csv").write_bytes(lines.encode(encoding))
    assert import_csv(filled, tmp_path / "l.csv", now=7.0, source="owner", annotator="city").added == 2
    found = [(one.event_id, one.label, one.time) for one in read_labels(filled)]
    assert found == [("e00001", "roadwork", 5.0), ("e00002", "none", 7.0)]


@pytest.mark.parametrize(
    ("content", "needle"),
    [
        (b"", "must have a column 'event_id', got an empty file"),
        (b"event_id\ne00001\n", "must have a column 'label'"),
        (b"event_id,label,sourc\n", "got 'sourc'; did you mean 'source'"),
        (b"event_id,label,label\n", "every column once, got 'label'"),
        (b"event_id,label\ne00001\n", "line 2 must have a value for label"),
        (b"event_id,label\ne00001,none,x\n", "2 cells in every row.*got 3 in line 2"),
        (b"event_id,label\ne00001,\n", "line 2 must have a value for label"),
        (b"event_id,label,source\ne00001,none,revew\n", "line 2: source must be one of .*did you mean 'review'"),
        (b"event_id,label,time\ne00001,none,yesterday\n", "line 2: time must be seconds since the epoch or ISO 8601"),
        (b"event_id,label,time\ne00001,none,2026-01-01T00:00\n", "with its offset"),
        (b"event_id,label,time\ne00001,none,inf\n", "finite"),
        (b"event_id,label\nnobody,none\n", "one of the store's events, got 'nobody'"),
        (b"event_id,label\n\xff\xfe,none\n", "must be UTF-8 text"),
        (b'event_id,label\n"e00001,none\n', "must be a CSV"),
    ],
)
def test_a_bad_csv_adds_nothing(content: bytes, needle: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "loop.db")
    add_events(store, [make_event(1)])
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(InputError, match=needle):
        import_csv(store, tmp_path / "bad.csv", now=1.0, source="owner", annotator="city")
    assert read_labels(store) == []


def test_csv_needs_a_source_from_somewhere(tmp_path: Path) -> None:
    store = Store(tmp_path / "loop.db")
    add_events(store, [make_event(1)])
    (tmp_path / "bare.csv").write_text("event_id,label\ne00001,none\n")
    with pytest.raises(InputError, match="value for source, got none; give source="):
        import_csv(store, tmp_path / "bare.csv", now=1.0)
    with pytest.raises(InputError, match="must exist"):
        import_csv(store, tmp_path / "absent.csv", now=1.0)


def test_label_studio_round_trip(filled: Store, tmp_path: Path) -> None:
    rows = [
        label("e00001", "roadwork", at=1700000000.123456789),
        label("e00001", "none", annotator="bob"),
        label("e00002", "none", "owner", "city"),
    ]
    add_labels(filled, rows)
    how = {"image": lambda event: f"https://x/{event.image_sha256}"}
    assert export_label_studio(filled, tmp_path / "blind.json", **how) == 12
    assert export_label_studio(filled, tmp_path / "tasks.json", **how, blind=False) == 12
    blind, tasks = (json.loads((tmp_path / name).read_text()) for name in ("blind.json", "tasks.json"))
    # Without being asked a task tells nothing of the cascade; all else is the same.
    assert all(set(one["data"]) == {"image", "event_id"} and one["predictions"] == [] for one in blind)
    assert [{**one, "data": {**one["data"], "action": "exit"}} for one in blind] == [
        {**one, "predictions": []} for one in tasks
    ]
    task = next(one for one in tasks if one["data"]["event_id"] == "e00001")
    assert task["data"]["image"] == f"https://x/{make_event(1).image_sha256}"
    assert task["predictions"][0]["result"][0]["value"] == {"choices": ["none"]}
    other = Store(tmp_path / "other.db")
    add_events(other, [make_event(i) for i in range(12)])
    assert import_label_studio(other, tmp_path / "tasks.json", now=1.0, source="owner").added == 3
    assert sorted(read_labels(other), key=str) == sorted(rows, key=str)
    assert import_label_studio(other, tmp_path / "tasks.json", now=1.0, source="owner").known == 3
    assert import_label_studio(other, tmp_path / "blind.json", now=1.0, source="owner").known == 3


@pytest.mark.parametrize("way", [{"exported": "all.csv"}, {"exported": "all"}, {"imported": "all.json"}])
def test_answers_are_shown_by_tasks_alone(tmp_path: Path, way: dict[str, str]) -> None:
    with pytest.raises(InputError, match="--show-answers"):
        folder.labels(tmp_path, **{name: tmp_path / file for name, file in way.items()}, blind=False)
    for chosen in ({**way, "blind": True}, {"exported": "all.json", "blind": False}):
        given = {name: value if name == "blind" else tmp_path / value for name, value in chosen.items()}
        with pytest.raises(InputError, match="^root must be"):  # it goes on, and there is no loop
            folder.labels(tmp_path, **given)


@pytest.mark.parametrize(
    ("claimed", "source", "held"),
    [
        ("owner", "review", "review"), ("owner", "match", "match"), ("owner", "owner", "owner"),
        ("review", "owner", "review"), ("match", "review", "match"), ("model", "owner", "model"),
    ],
)  # fmt: skip
def test_a_file_may_only_lower_what_its_importer_vouches_for(
    claimed: str, source: Source, held: str, filled: Store, tmp_path: Path
) -> None:
    meta = f'"meta": {{"source": "{claimed}"}}, "type": "choices"'
    task = one_task("e00001", more='"completed_by": 1, ').replace('"type": "choices"', meta)
    (tmp_path / "export.json").write_text(task)
    import_label_studio(filled, tmp_path / "export.json", now=1.0, source=source)
    (tmp_path / "labels.csv").write_text(f"event_id,label,source,annotator\ne00002,none,{claimed},ada\n")
    import_csv(filled, tmp_path / "labels.csv", now=1.0, source=source)
    assert [one.source for one in read_labels(filled)] == [held, held]


def test_label_studio_as_its_server_exports(filled: Store, tmp_path: Path) -> None:
    result = [
        {"from_name": "label", "id": "Dx", "to_name": "image", "type": "choices", "value": {"choices": ["roadwork"]}}
    ]
    tasks = [
        {"id": 1, "data": {"image": "/1.jpg", "event_id": "e00001"}, "annotations": [
            {"completed_by": 10, "result": result, "was_cancelled": False, "created_at": "2021-03-09T22:16:08.728353Z"},
            {"id": 8, "completed_by": {"id": 3, "email": "a@b.c"}, "result": [], "was_cancelled": True}]},
        {"id": 2, "data": {"image": "/2.jpg", "event_id": "e00002"}, "annotations": [
            {"completed_by": {"id": 3, "email": "a@b.c"}, "result": result}], "predictions": [{"result": result}]},
        {"id": 3, "data": {"image": "/3.jpg", "event_id": "e00003"}, "annotations": []},
    ]  # fmt: skip
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    assert import_label_studio(filled, tmp_path / "export.json", now=77.0).added == 2
    first, second = read_labels(filled)
    assert (first.annotator, first.source, first.time) == ("10", "review", pytest.approx(1615328168.728353))
    assert (second.annotator, second.time) == ("a@b.c", 77.0)


def one_task(event: str, choices: str = '"none"', more: str = "") -> str:
    result = '[{"type": "choices", "value": {"choices": [%s]}}]' % choices  # noqa: UP031
    return '[{"data": {"event_id": "%s"}, "annotations": [{%s"result": %s}]}]' % (event, more, result)  # noqa: UP031


@pytest.mark.parametrize(
    ("content", "needle"),
    [
        ("{", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ('{"a": 1}', "list of tasks, got dict"),
        ("[1]", r"task 0 must have data\.event_id"),
        ('[{"data": {"image": "x"}}]', r"task 0 must have data\.event_id"),
        ('[{"data": {"event_id": "e00001"}, "annotations": 3}]', "list of annotations, got int"),
        ('[{"data": {"event_id": "e00001"}, "annotations": [3]}]', "annotations that are objects"),
        ('[{"data": {"event_id": "e00001"}, "annotations": [{"result": []}]}]', "exactly one choice.*got none"),
        (one_task("e00001", choices='"none", "roadwork"'), "exactly one choice.*got none, roadwork"),
        (one_task("e00001"), "value for annotator, got none; give annotator="),
        (one_task("e9", more='"completed_by": 1, '), "store's events, got 'e9'"),
    ],
)  # fmt: skip
def test_a_bad_label_studio_file_adds_nothing(content: str, needle: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "loop.db")
    add_events(store, [make_event(1)])
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(InputError, match=needle):
        import_label_studio(store, tmp_path / "bad.json", now=1.0)
    assert read_labels(store) == []


def test_parquet_has_everything(filled: Store, tmp_path: Path) -> None:
    add_labels(filled, [label("e00001", "roadwork"), label("e00002", "none", "owner", "city")])
    withdraw(filled, 1, now=9.0)
    assert export_parquet(filled, tmp_path / "out") == {"events": 12, "labels": 3}
    events = pq.read_table(tmp_path / "out" / "events.parquet").to_pylist()
    held = {row.pop("id"): row for row in events}
    row = held["e00002"]
    assert (row.pop("held_label"), row.pop("held_source"), row.pop("held_trust"), row.pop("answers")) == (
        "none",
        "owner",
        3,
        1,
    )
    assert Event(id="e00002", **row) == make_event(2)
    assert held["e00001"]["held_label"] is None
    labels = pq.read_table(tmp_path / "out" / "labels.parquet").to_pylist()
    assert [(one["kind"], one["supersedes"]) for one in labels] == [("answer", None), ("answer", None), ("undo", 1)]


def test_parquet_of_an_empty_store(tmp_path: Path) -> None:
    assert export_parquet(Store(tmp_path / "loop.db"), tmp_path / "out") == {"events": 0, "labels": 0}
    assert pq.read_table(tmp_path / "out" / "events.parquet").num_rows == 0


def test_csv_columns_are_what_the_help_says(filled: Store, tmp_path: Path) -> None:
    export_csv(filled, tmp_path / "labels.csv")
    with (tmp_path / "labels.csv").open() as file:
        assert next(csv.reader(file)) == ["event_id", "label", "source", "annotator", "time"]
