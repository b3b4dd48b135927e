"""What the loop's states do, with real rows and without training: watching, dealing labels."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import matthews_corrcoef

pytest.importorskip("sqlalchemy", reason="the loop needs [continual]")

from fitting import fit_gate_policy
from kit.claims import OF_EXITS
from kit.tiny import CLASSES, copy_run, make_images, make_model, make_run
from PIL import Image

from stage1_pro.continual.learn.rewards import NOBODY, Actions, RewardSpec, verified
from stage1_pro.continual.ledger import audit
from stage1_pro.continual.ledger.labels import Label, add_events, add_labels
from stage1_pro.continual.ledger.store import Store
from stage1_pro.continual.loop.config import RoundsConfig
from stage1_pro.continual.loop.executors import Inline, Work
from stage1_pro.continual.loop.history import History
from stage1_pro.continual.loop.machine import Loop, Round
from stage1_pro.continual.loop.promotion import Anchor, Side, Terms, Verdict, evaluate, judge_anchor
from stage1_pro.continual.loop.registry import Registry
from stage1_pro.continual.loop.roles import LabelledImage, Snapshot
from stage1_pro.continual.loop.rounds import Rounds, remember_run
from stage1_pro.continual.serving.events import SKETCH_SIZE, BundleFacts, Event, EventLog, Novelty, ReviewPlan
from stage1_pro.continual.serving.live import Pair, _append_pairs, novelty_path, tightened
from stage1_pro.continual.watch.monitor import TriggerConfig
from stage1_pro.continual.watch.srt import ControllerConfig, to_logit, to_score
from stage1_pro.continual.watch.status import MonitorConfig
from stage1_pro.data.images import ImageError
from stage1_pro.data.splits import Splits, hash_splits
from stage1_pro.deploy.bundle import load_bundle
from stage1_pro.deploy.cascade import Cascade
from stage1_pro.deploy.exporting import export
from stage1_pro.errors import NotReachableError
from stage1_pro.files import sha256_bytes, sha256_file, uniform, write_bytes

SKETCH = (0.0,) * SKETCH_SIZE


@pytest.fixture(scope="module")
def bundle(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_run(tiny, tmp_path_factory.mktemp("rounds") / "run") / "bundle"


def make_rounds(root: Path, bundle: Path, **changes: Any) -> Rounds:
    """A loop that has begun at 0, with nothing served."""
    registry = Registry(root, Store(root / "loop.db"))
    name = registry.add(bundle)
    Loop.begin(registry, name, now=0.0, by="ada")
    remember_run(root, name, bundle.parent, "0")
    log = EventLog(root / "log")
    log.describe(BundleFacts(bundle=name, classes=CLASSES, positive="roadwork"))
    return Rounds(registry, log, Inline(), RoundsConfig(**{"monitor": MonitorConfig(alpha=0.02), **changes}))


def serve(rounds: Rounds, n: int, first: int = 0, **changes: Any) -> list[Event]:
    """Exits, all of them selected for review, a second apart."""
    name = rounds.registry.alias("champion").bundle
    values: dict[str, Any] = {
        "bundle": name, "action": "exit", "stage": "A", "label": "none", "prob_a": 0.1, "prob_b": None,
        "confidence": 0.9, "gate_logit": None, "exit_score": 0.97, "threshold": 0.6, "propensity": 0.5,
        "selected": True, "sketch": SKETCH,
    }  # fmt: skip
    made = [
        Event(id=f"e{i:05d}", time=10.0 + i, image_sha256=sha256_bytes(b"%d" % i), **(values | changes))
        for i in range(first, first + n)
    ]
    add_events(rounds.store, made)
    return made


def answer(rounds: Rounds, event: Event, name: str, at: float, annotator: str = "ada") -> None:
    add_labels(rounds.store, [Label(event_id=event.id, label=name, source="review", annotator=annotator, time=at)])


def watch(rounds: Rounds, memory: Any, now: float) -> Any:
    return rounds.watch(memory, rounds.registry.alias("champion"), now=now, manual=False)


def test_looks_on_the_way_leave_the_state_that_a_replay_gives(tmp_path: Path, bundle: Path) -> None:
    rounds = make_rounds(tmp_path, bundle)
    served = serve(rounds, 60)
    memory: Any = {}
    for i, event in enumerate(served):
        answer(rounds, event, "roadwork" if i % 9 == 0 else "none", at=100.0 + i)
        if i % 7 == 0:  # A second person, days later, says the same.
            answer(rounds, served[i // 2], "none", at=100.5 + i, annotator="ben")
        if i == 40:  # Dated back: somebody's list of yesterday.
            answer(rounds, served[59], "roadwork", at=101.25, annotator="list")
        if i % 5 == 0:
            memory = watch(rounds, memory, now=101.0 + i).memory
    fresh = watch(rounds, {}, now=200.0)
    last = watch(rounds, memory, now=200.0)
    assert last.threshold == fresh.threshold and last.threshold > 0.6


def test_evidence_is_one_process_from_the_first_day_however_often_one_looks(tmp_path: Path, bundle: Path) -> None:
    monitor = MonitorConfig(alpha=0.1, recent=50)
    rounds = make_rounds(tmp_path, bundle, monitor=monitor, steer=False)
    served = serve(rounds, 200)
    champion, n = rounds.registry.alias("champion"), []
    for i, event in enumerate(served):
        answer(rounds, event, "roadwork" if i % 20 < 3 else "none", at=1000.0 + i)
        if i % 40 == 39:
            n.append(rounds.status({}, champion, now=1001.0 + i).evidence.n)
    assert n == [40, 80, 120, 160, 200]


def test_an_alarm_and_a_watch_have_one_name_however_often_they_are_seen(tmp_path: Path, bundle: Path) -> None:
    rounds = make_rounds(tmp_path, bundle)
    served = serve(rounds, 60, exit_score=0.999, confidence=0.999)
    assert not watch(rounds, {}, now=90.0).alerts
    memory = watch(rounds, {}, now=91.0).memory
    for i, event in enumerate(served[:10]):
        answer(rounds, event, "roadwork" if i == 0 else "none", at=100.0 + i)
    # Where a round waits nothing is remembered, and the watch keeps its name.
    names = [set(watch(rounds, memory, now=now).alerts) for now in (120.0, 130.0)]
    assert names[0] == names[1] and {name.split("/")[0] for name in names[0]} == {"watch"}
    seen = watch(rounds, memory, now=140.0)
    assert seen.alerts["".join(names[0])].kind == "watch" and not watch(rounds, seen.memory, now=141.0).alerts
    for i, event in enumerate(served[10:40]):
        answer(rounds, event, "roadwork", at=200.0 + i)
    names = [set(watch(rounds, seen.memory, now=now).alerts) for now in (300.0, 310.0)]
    assert names[0] == names[1] and {name.split("/")[0] for name in names[0]} == {"alarm"}


def test_rolling_figures_are_of_answers_and_abstentions_gave_none(tmp_path: Path, bundle: Path) -> None:
    rounds = make_rounds(tmp_path, bundle)
    served = serve(rounds, 100)
    served += serve(rounds, 20, first=100, action="defer", stage="B", label="roadwork", prob_b=0.9)
    silent = serve(rounds, 10, first=120, action="abstain", stage="B", label="", prob_b=0.5)
    for i, event in enumerate(served[1:]):  # Whoever reviews left one out.
        answer(rounds, event, "roadwork" if i % 4 == 0 else "none", at=200.0)
    for event in silent:
        answer(rounds, event, "roadwork", at=200.0)
    seen = rounds.status({}, rounds.registry.alias("champion"), now=300.0).rolling
    given = [(one.label, "roadwork" if i % 4 == 0 else "none") for i, one in enumerate(served[1:])]
    assert seen.n == 119 and seen.accuracy_10 == sum(a == b for a, b in given[-10:]) / 10
    assert seen.mcc_100 == pytest.approx(matthews_corrcoef(*zip(*given[-100:], strict=True)))


def test_what_is_known_is_learned_once_from_a_champions_first_events(tmp_path: Path, bundle: Path) -> None:
    draw = np.random.default_rng(0).normal(size=(60, SKETCH_SIZE)).astype(np.float32)
    for novelty in (0.0, 0.25):
        plan = ReviewPlan(novelty=novelty)
        rounds = make_rounds(tmp_path / str(novelty), bundle, plan=plan, novelty_events=40, steer=False)
        path = novelty_path(rounds.root, rounds.registry.alias("champion").bundle or "")
        serve(rounds, 1)  # Features that were no numbers.
        for i in range(1, 40):
            serve(rounds, 1, first=i, sketch=draw[i])
        watch(rounds, {}, now=100.0)
        assert not path.exists()
        for i in range(40, 50):
            serve(rounds, 1, first=i, sketch=draw[i])
        rounds.status({}, rounds.registry.alias("champion"), now=100.0)
        assert not path.exists()  # To look is to change nothing.
        watch(rounds, {}, now=100.0)
        assert path.exists() == (novelty > 0)
    assert Novelty.read(path) == Novelty.fit(draw[1:41])
    before = path.read_bytes()
    for i in range(50, 60):
        serve(rounds, 1, first=i, sketch=draw[i])
    watch(rounds, {}, now=101.0)
    assert path.read_bytes() == before


@pytest.mark.parametrize(("score", "alarms"), [(0.9, True), (0.5, False)])
def test_a_tightened_threshold_does_not_hide_that_the_promise_is_broken(
    tmp_path: Path, bundle: Path, score: float, alarms: bool
) -> None:
    rounds = make_rounds(tmp_path, bundle, monitor=MonitorConfig(alpha=0.1, floor=0.5), plan=ReviewPlan(floor=0.5))
    # Deferred at .95; at the certified .6 what scores .9 would exit.
    deferred = serve(rounds, 80, action="defer", stage="B", exit_score=score, threshold=0.95, prob_b=0.1)
    for i, event in enumerate(deferred):
        answer(rounds, event, "roadwork" if i % 2 else "none", at=100.0 + i)
    seen = watch(rounds, {}, now=1000.0)
    certified = rounds.registry.load(rounds.registry.alias("champion").bundle or "").policy.exit_threshold
    assert (seen.memory["alarm_at"] is not None) == alarms
    safe = to_score(to_logit(certified) + ControllerConfig(alpha=0.1, certified=certified).jump)
    assert (seen.threshold >= safe) if alarms else seen.threshold == certified
    # Days of right answers later it has not gone back.
    late = [one.model_copy(update={"id": f"l{i}", "time": 2000.0 + i}) for i, one in enumerate(deferred * 8)]
    add_events(rounds.store, late)
    for i, event in enumerate(late):
        answer(rounds, event, "none", at=3000.0 + i)
    assert watch(rounds, seen.memory, now=9000.0).threshold == (pytest.approx(safe) if alarms else certified)


@pytest.fixture(scope="module")
def certified(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that promises of photos that at most a tenth of the exits are wrong."""
    run = copy_run(tiny, tmp_path_factory.mktemp("certified") / "run")
    (run / "thresholds.json").unlink()
    old = load_bundle(run / "bundle").policy
    rng = np.random.default_rng(0)
    sure, labels = rng.uniform(0.6, 0.99, 2000), rng.integers(0, 2, 2000)
    positive = np.where(labels == 1, sure, 1 - sure)
    fit_gate_policy(
        np.stack([1 - positive, positive], axis=1), np.log(sure / (1 - sure)), labels, classes=CLASSES,
        positive="roadwork", halves=np.where(rng.random(2000) < 0.5, "fit", "certify"), guarantee="ltt",
        max_exit_error=0.1, min_coverage=0.5, split_hashes=old.split_hashes, model_fingerprint=old.model_fingerprint,
        preprocessing_fingerprint=old.preprocessing_fingerprint,
    ).write(run / "gateparams.json")  # fmt: skip
    return export(run, overwrite=True)


@pytest.mark.parametrize("steer", [True, False])
def test_an_alarm_tells_of_the_promise_that_broke(tmp_path: Path, certified: Path, steer: bool) -> None:
    policy = load_bundle(certified).policy
    assert policy.says_of_exits(0.1) == ("promised", 0.1)
    rounds = make_rounds(
        tmp_path, certified, monitor=MonitorConfig(alpha=0.1, floor=0.5), plan=ReviewPlan(floor=0.5), steer=steer
    )
    for i, event in enumerate(serve(rounds, 80, threshold=policy.exit_threshold)):
        answer(rounds, event, "roadwork" if i % 2 else "none", at=100.0 + i)
    seen = watch(rounds, {}, now=1000.0)
    (alarm,) = seen.alerts.values()
    # What steers tightens at once, and nothing is promised from then on: the alarm is of what was.
    assert alarm.kind == "alarm" and ("was promised" in alarm.title) == steer == ("was promised" in alarm.text)
    assert ("than promised" in alarm.title) != steer and not re.search(
        "no policy promises|nothing .* of it", alarm.text
    )
    if steer:
        champion = rounds.registry.alias("champion")
        with rounds.store.write() as connection:
            rounds.registry.tighten(connection, champion.bundle or "", seen.threshold, now=1000.0)
        found = rounds.status(seen.memory, champion, now=1001.0, page=tmp_path / "page.html")
        assert (found.threshold, found.promises, found.limit) == (seen.threshold, [], "asked for")
        assert found.headline == alarm.title and found.calibrated == policy.exit_threshold
        page = (tmp_path / "page.html").read_text()
        assert alarm.title in page and not OF_EXITS.search(page)
        rounds.config = rounds.config.model_copy(update={"steer": False})  # labels steer no more; it stays in force
        assert rounds.status(seen.memory, champion, now=1001.0).threshold == seen.threshold


# --------------------------------------------------------------------------------------------
# Dealing labels

DEALT = {"plan": ReviewPlan(floor=0.3, seed=4), "least_rows": 2, "least_guard": 2}


def deal(
    rounds: Rounds,
    n: int,
    first: int = 0,
    plan: ReviewPlan | None = None,
    chance: float = 0.6,
    *,
    labelled: bool = True,
) -> list[Event]:
    """Exits drawn by a plan, labelled where they were selected, with images."""
    name, plan = rounds.registry.alias("champion").bundle or "", plan or rounds.config.plan
    made = []
    for i in range(first, first + n):
        data = b"%d" % i
        event = Event(
            id=f"d{i:05d}", time=10.0 + i, bundle=name, image_sha256=sha256_bytes(data), action="exit", stage="A",
            label="none", prob_a=0.1, prob_b=None, confidence=0.9, gate_logit=None, exit_score=0.97, threshold=0.6,
            propensity=chance, selected=plan.selects(f"d{i:05d}", chance), sketch=SKETCH,
        )  # fmt: skip
        made.append(event)
        if event.selected:
            rounds.log.images.put(event.image_sha256, data, 0.0)
    add_events(rounds.store, made)
    for event in made:
        if event.selected and labelled:
            answer(rounds, event, "none", at=500.0)
    return made


def start(root: Path, bundle: Path) -> tuple[Rounds, Round]:
    rounds = make_rounds(root, bundle, **DEALT)
    champion = rounds.registry.alias("champion").bundle or ""
    return rounds, Round(number=1, entered=1000.0, champion=champion)


def test_what_the_champions_run_was_trained_on_guards_and_certifies_nothing(tmp_path: Path, bundle: Path) -> None:
    rounds, work = start(tmp_path, bundle)
    deal(rounds, 80)
    before = rounds.collect(work)
    taken = rounds.vault.row_ids(before["guard"])[0]
    snapshot = Snapshot.read(tmp_path / "snapshots" / f"{before['snapshot']}.json")
    splits = Splits.read(bundle.parent / "splits.json")
    more = [splits.rows[0].model_copy(update={"id": one, "sha256": one}) for one in (taken, snapshot.certify[0][0])]
    (tmp_path / "later").mkdir()
    splits.model_copy(update={"rows": [*splits.rows, *more]}).write(tmp_path / "later" / "splits.json")
    remember_run(tmp_path, work.champion, tmp_path / "later", "0")
    after = rounds.collect(work.model_copy(update={"number": 2}))
    assert taken not in rounds.vault.row_ids(after["guard"])
    assert (after["n_guard"], after["n_certify"]) == (before["n_guard"] - 1, before["n_certify"] - 1)


def test_a_label_dated_back_while_collecting_was_killed_stops_nothing(tmp_path: Path, bundle: Path) -> None:
    rounds, work = start(tmp_path, bundle)
    served = deal(rounds, 80)
    first = rounds.collect(work)
    guard = set(rounds.vault.row_ids(first["guard"]))
    assert rounds.collect(work) == first
    event = next(one for one in served if one.image_sha256 in guard)
    answer(rounds, event, "roadwork", at=600.0)
    again = rounds.collect(work)
    assert again["guard"] != first["guard"] and again["n_guard"] == first["n_guard"]
    assert rounds.vault.looks_taken(again["guard"]) == 0


def test_guard_rows_that_judged_nobody_go_on_to_the_next_round_and_what_certified_does_not(
    tmp_path: Path, bundle: Path
) -> None:
    """A round refused before the guard was looked at has used up what certified its candidate, and no guard row."""
    rounds, work = start(tmp_path, bundle)
    deal(rounds, 80)

    def collected(number: int, now: float) -> tuple[Any, set[str], set[str]]:
        found = rounds.collect(work.model_copy(update={"number": number, "entered": now}))
        snapshot = Snapshot.read(tmp_path / "snapshots" / f"{found['snapshot']}.json")
        frozen = {"number": number, "snapshot": {"until": now, "guard": found["guard"]}}
        with rounds.store.write() as connection:
            audit.append(connection, rounds.store, "edge", {"from": "COLLECT", "to": "PROPOSE", "round": frozen}, now)
        return found["guard"], set(rounds.vault.row_ids(found["guard"])), {name for name, _, _ in snapshot.certify}

    first, guard, certify = collected(1, 1000.0)
    assert rounds.collect(work)["guard"] == first  # A round that is killed here is not its own earlier one.
    assert "0 of 2 to certify" in rounds.status({}, rounds.registry.alias("champion"), now=1001.0).verdict.missing
    deal(rounds, 60, first=1100)
    second, more, others = collected(2, 2000.0)
    assert guard < more and others and not certify & others
    nobody = Actions(np.full(len(more), NOBODY), np.zeros(len(more), dtype=bool))
    decided = Actions(np.zeros(len(more), dtype=np.int64), np.zeros(len(more), dtype=bool))
    classes = {"classes": ("none", "roadwork"), "positive": "roadwork"}
    rounds.vault.judge(second, nobody, decided, lambda *_: None, terms="", name="c", now=1.0, **classes)
    assert rounds.vault.looks_taken(second) and not rounds.vault.looks_taken(first)
    deal(rounds, 60, first=2100)
    _, last, _ = collected(3, 3000.0)
    assert last and not last & more


def test_guard_rows_of_a_champion_before_are_not_carried_to_another(tmp_path: Path, bundle: Path) -> None:
    rounds, work = start(tmp_path, bundle)
    deal(rounds, 80)
    frozen = {"number": 1, "snapshot": {"until": 1000.0, "guard": rounds.collect(work)["guard"]}}
    with rounds.store.write() as connection:
        audit.append(connection, rounds.store, "edge", {"from": "COLLECT", "to": "PROPOSE", "round": frozen}, 1000.0)

    def used() -> float:
        with History.look(rounds.store, rounds.config, 1e9) as history:
            return rounds._used(history, None)["guard"]

    assert used() == -np.inf
    now = rounds.registry.alias("champion")
    with rounds.store.write() as connection:
        rounds.registry.move(connection, "champion", now.bundle, expected=now.version, now=2000.0, by="ada")
    assert used() == 1000.0


def test_a_champion_that_lets_nobody_exit_is_watched_without_a_threshold_to_tighten(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = make_rounds(tmp_path, bundle)
    loaded = rounds.registry.load(rounds.registry.alias("champion").bundle or "")
    for threshold in (0.999995, 1.0, 1.5):
        strict = replace(loaded, policy=tightened(loaded.policy, threshold))
        monkeypatch.setattr(rounds.registry, "load", lambda *_, strict=strict: strict)
        assert watch(rounds, {}, now=200.0).threshold is None


def test_images_that_are_gone_and_rows_learned_from_are_none_to_begin_a_round_with(
    tmp_path: Path, bundle: Path
) -> None:
    rounds, work = start(tmp_path, bundle)
    deal(rounds, 80)
    champion = rounds.registry.alias("champion")
    assert rounds.status({}, champion, now=1000.0).verdict.missing == ""
    for path in rounds.log.images.folder.glob("*/*"):
        path.rename(tmp_path / path.name)
    assert (
        rounds.status({}, champion, now=1000.0).verdict.missing == "0 of 2 to guard, 0 of 2 to certify, 0 of 2 to learn"
    )
    for path in tmp_path.glob("?" * 64):
        rounds.log.images.put(path.name, path.read_bytes(), 0.0)
    found = rounds.collect(work)
    snapshot = Snapshot.read(tmp_path / "snapshots" / f"{found['snapshot']}.json")
    splits = Splits.read(bundle.parent / "splits.json")
    more = [splits.rows[0].model_copy(update={"id": one, "sha256": one}) for one, _, _ in snapshot.learn]
    (tmp_path / "later").mkdir()
    splits.model_copy(update={"rows": [*splits.rows, *more]}).write(tmp_path / "later" / "splits.json")
    remember_run(tmp_path, work.champion, tmp_path / "later", "0")
    assert rounds.status({}, champion, now=1000.0).verdict.missing == "0 of 2 to learn"


def test_without_the_champions_run_the_threshold_still_follows_labels(tmp_path: Path, bundle: Path) -> None:
    rounds = make_rounds(tmp_path, bundle)
    remember_run(tmp_path, rounds.registry.alias("champion").bundle or "", tmp_path / "gone", "0")
    for event in serve(rounds, 60):
        answer(rounds, event, "roadwork", at=100.0)
    seen = watch(rounds, {}, now=200.0)
    assert seen.threshold > 0.6 and not seen.train
    assert "gone" in rounds.status({}, rounds.registry.alias("champion"), now=200.0).verdict.missing


@pytest.mark.parametrize("newest_first", [False, True])
def test_no_row_that_an_alarm_was_made_of_judges_or_certifies(newest_first: bool, tmp_path: Path, bundle: Path) -> None:
    rounds, work = start(tmp_path, bundle)
    made = [one for one in deal(rounds, 160, labelled=False) if one.selected]
    half = len(made) // 2
    told = made[:half][::-1] if newest_first else made[:half]
    for i, event in enumerate(told):
        answer(rounds, event, "roadwork" if i < 8 else "none", at=500.0 + i)
    alarm = rounds.status({}, rounds.registry.alias("champion"), now=900.0).evidence.alarm_at
    assert alarm is not None
    for i, event in enumerate(made[half:]):
        answer(rounds, event, "none", at=700.0 + i)
    found = rounds.collect(work)
    snapshot = Snapshot.read(tmp_path / "snapshots" / f"{found['snapshot']}.json")
    judging = {*rounds.vault.row_ids(found["guard"]), *(name for name, _, _ in snapshot.certify)}
    known = {event.image_sha256: 500.0 + i for i, event in enumerate(told)}
    assert judging and min(known.get(name, 900.0) for name in judging) > alarm
    first = {event.image_sha256: event.time for event in made}
    last = max(first[name] for name, at in known.items() if at <= alarm)
    assert min(first[name] for name in judging) > last


@pytest.mark.parametrize("missing", ["recent", "threshold"])
def test_a_round_that_an_earlier_version_began_ends_and_does_not_fail_for_good(
    tmp_path: Path, bundle: Path, missing: str
) -> None:
    rounds, work = start(tmp_path, bundle)
    deal(rounds, 80)
    found = rounds.collect(work)
    path = tmp_path / "snapshots" / f"{found['snapshot']}.json"
    values = json.loads(path.read_text())
    del values[missing]
    path.write_text(json.dumps(values))
    with pytest.raises(NotReachableError, match="earlier version"):
        rounds.proposals(work.model_copy(update={"snapshot": dict(found)}))


def test_work_is_the_same_however_the_loops_folder_is_called(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds, work = start(tmp_path, bundle)
    deal(rounds, 80)
    work = work.model_copy(update={"snapshot": dict(rounds.collect(work))})
    monkeypatch.chdir(tmp_path.parent)
    again = Rounds(Registry(tmp_path.name, rounds.store), rounds.log, Inline(), rounds.config)
    assert again.proposals(work) == rounds.proposals(work)


def test_events_drawn_by_another_plan_are_no_plain_sample(tmp_path: Path, bundle: Path) -> None:
    rounds, work = start(tmp_path, bundle)
    deal(rounds, 80)
    rounds.collect(work)
    deal(rounds, 10, first=80, plan=ReviewPlan(floor=0.3, seed=5))
    with pytest.raises(NotReachableError, match="must be drawn by the loop's own review plan"):
        rounds.collect(work)


def test_what_a_raised_rate_selects_teaches_and_the_floors_sample_judges(tmp_path: Path, bundle: Path) -> None:
    rounds, work = start(tmp_path, bundle)
    plan = rounds.config.plan
    made = deal(rounds, 80) + deal(rounds, 80, first=80, plan=plan.raised(0.9), chance=0.9)
    found = rounds.collect(work)
    snapshot = Snapshot.read(tmp_path / "snapshots" / f"{found['snapshot']}.json")
    draws = {one.image_sha256: uniform(plan.seed, "review", one.id) for one in made}
    assert {draws[name] < plan.floor for name in rounds.vault.row_ids(found["guard"])} == {True}
    assert {draws[name] < plan.floor for name, _, _ in snapshot.certify} == {True}
    taught = [draws[name] for name, _, _ in snapshot.learn]
    assert max(taught) > 0.6


def test_drift_raises_the_audit_rate_above_the_plans_floor(tmp_path: Path, bundle: Path) -> None:
    triggers = TriggerConfig(audit_rate=0.05, raised_audit_rate=0.4, hold=100.0)
    for floor, expected in ((0.02, [0.05, 0.4, 0.4, 0.05]), (0.1, [None, 0.4, 0.4, None])):
        monitor = MonitorConfig(alpha=0.02, triggers=triggers, recent=600)
        rounds = make_rounds(tmp_path / str(floor), bundle, monitor=monitor, plan=ReviewPlan(floor=floor))
        serve(rounds, 600)
        memory, rates = watch(rounds, {}, now=700.0).memory, []
        rates.append(watch(rounds, memory, now=700.0).audit_rate)
        # Other photos come, then no others than those.
        serve(rounds, 200, first=700, exit_score=0.7, confidence=0.7)
        for now in (1000.0, 1050.0):
            seen = watch(rounds, memory, now=now)
            memory = seen.memory
            rates.append(seen.audit_rate)
        serve(rounds, 1400, first=1100, exit_score=0.7, confidence=0.7)
        rates.append(watch(rounds, memory, now=2600.0).audit_rate)
        assert rates == expected


# --------------------------------------------------------------------------------------------
# The gate

FREE = {"require_certificate": False, "margin": 9.0, "slice_margin": 9.0, "fnr_margin": 2.0, "n_replicates": 1000}


@pytest.fixture(scope="module")
def rival(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model's bundle, of the same images."""
    return export(make_run(tmp_path_factory.mktemp("rival") / "run", make_model(seed=1)))


def first_run(run: Path, like: Path, n: int = 64) -> Path:
    """Splits of a run that has enough rows to hold a candidate against, from two sources."""
    splits = Splits.read(like / "splits.json")
    rows = [
        splits.rows[0].model_copy(update={
            "id": path.name, "file": str(path), "label": CLASSES[i % 2], "group": f"place-{i}", "split": "val_select",
            "half": None, "source": "car" if i % 4 < 2 else "phone", "sha256": sha256_file(path),
        })
        for i, path in enumerate(make_images(run / "images", n, seed=9))
    ]  # fmt: skip
    splits.model_copy(update={"rows": rows, "hashes": hash_splits(rows)}).write(run / "splits.json")
    return run


def to_judge(
    root: Path, bundle: Path, candidate: Path, n: int = 24, *, threshold: float | None = None, **changes: Any
) -> tuple[Rounds, Round]:
    """A round on its way into EVALUATE, with a guard of real photos."""
    config = {"terms": Terms(**FREE), "timed_passes": 1, "largest_slowdown": 99.0, **changes}
    rounds = make_rounds(root, bundle, **config)
    champion = rounds.registry.alias("champion").bundle or ""
    remember_run(root, champion, first_run(root / "first", bundle.parent), "0")
    ids = []
    for path in make_images(root / "photos", n, seed=7):
        ids.append(sha256_file(path))
        write_bytes(root / "images" / ids[-1], path.read_bytes())
    rounds.vault.open("one", ids, ids, now=0.0)
    rounds.vault.label("one", {one: CLASSES[i % 2] for i, one in enumerate(ids)}, "review")
    snapshot = Snapshot(until=0.0, learn=(), certify=(), recent=(), guard="one", n_guard=n, threshold=threshold)
    snapshot.write(root / "snapshots" / f"{snapshot.fingerprint()}.json")
    return rounds, Round(
        number=1, entered=1000.0, champion=champion, candidate=rounds.registry.add(candidate), recalibrated="none",
        snapshot={"snapshot": snapshot.fingerprint()},
    )  # fmt: skip


def names(verdict: Verdict) -> dict[str, bool]:
    return {one.name: one.passed for one in verdict.tests}


def test_the_gate_asks_for_size_parity_and_latency(tmp_path: Path, bundle: Path, rival: Path) -> None:
    rounds, work = to_judge(tmp_path, bundle, rival)
    verdict = rounds.evaluate(work)
    parity, latency = verdict.test("parity with its reference"), verdict.test("latency over the champion's")
    assert (parity.passed, latency.passed) == (True, True)
    assert parity.estimate is not None and 0 <= parity.estimate <= 1e-3
    assert (latency.n, latency.unit) == (24, "rows")
    assert latency.estimate is not None and latency.bound is not None and 0.2 < latency.estimate <= latency.bound
    assert "ms" in latency.note
    assert names(verdict)["size over the champion's"] and verdict.look == 1
    assert {"anchor reward, slice car", "anchor reward, slice phone"} <= names(verdict).keys()


@pytest.mark.parametrize("judges", ["first/images", "images"], ids=["anchor", "guard"])
def test_a_photo_that_was_changed_judges_nobody(judges: str, tmp_path: Path, bundle: Path, rival: Path) -> None:
    rounds, work = to_judge(tmp_path, bundle, rival, largest_slowdown=None)
    kept = rounds.vault.row_ids("one") if judges == "images" else [photo.key for photo in rounds._anchor()[1]]
    path = tmp_path / judges / kept[0]
    content = path.read_bytes()
    Image.new("RGB", (60, 50)).save(path, "PNG")
    with pytest.raises(ImageError, match=f"{path.name}.*is not the one"):
        rounds.evaluate(work)
    assert rounds.vault.looks_taken("one") == 0
    path.write_bytes(content)
    assert rounds.evaluate(work).look == 1


def test_a_candidate_that_forgets_one_source_is_refused_though_the_whole_anchor_would_pass(
    tmp_path: Path, bundle: Path, rival: Path
) -> None:
    """The loop's own anchor by source: the candidate is the champion but for the photos of a phone."""
    rounds, work = to_judge(tmp_path, bundle, rival)
    anchor, photos = rounds._anchor()
    splits = Splits.read(tmp_path / "first/splits.json")
    sources = {str(splits.path(row)): row.source for row in splits.of("val_select")}
    phone = np.array([sources[str(photo)] == "phone" for photo in photos])
    assert {name: mask.tolist() for name, mask in anchor.slices.items()} == {
        "car": (~phone).tolist(), "phone": phone.tolist()
    }  # fmt: skip
    before = rounds._decide(work.champion, photos)
    right = Actions(anchor.truth.labels, before.deferred)
    forgets = Actions(np.where(phone, 1 - anchor.truth.labels, anchor.truth.labels), before.deferred)
    terms = Terms(**{**FREE, "slice_margin": 0.1})
    tests = {one.name: one for one in judge_anchor(anchor, right, forgets, RewardSpec(), terms)}
    assert [name for name, one in tests.items() if not one.passed] == ["anchor reward, slice phone"]


@pytest.mark.parametrize("copies", [True, False])
def test_a_gain_on_sixty_copies_of_one_photo_is_one_lucky_photo(copies: bool, tmp_path: Path, bundle: Path) -> None:
    """Frames of a camera that stands still, as JPEG of many qualities, against as many different photos."""
    rounds = make_rounds(tmp_path, bundle)
    (tmp_path / "images").mkdir(exist_ok=True)
    rows = []
    paths = make_images(tmp_path / "photos", 120, seed=3)
    for i, path in enumerate(paths):
        image, buffer = Image.open(paths[0] if copies and i < 60 else path), io.BytesIO()
        image.resize((200 + i, 150)).save(buffer, "JPEG", quality=95 - i % 30)
        name = sha256_bytes(buffer.getvalue())
        write_bytes(tmp_path / "images" / name, buffer.getvalue())
        rows.append(LabelledImage(name, "none", "review"))
    gained = np.arange(120) < 60
    order = np.argsort([name for name, *_ in rows])
    rows, gained = [rows[i] for i in order], gained[order]
    rounds._open("epoch", rows, 0.0)
    flat, easy = np.zeros(120, dtype=bool), Actions(np.tile([0, 1], 300), np.zeros(600, dtype=bool))
    truth = verified(easy.answers, "owner", classes=CLASSES, positive="roadwork")
    verdict = evaluate(
        rounds.vault, "epoch", Side("old", Actions(gained.astype(np.int64), flat), easy),
        Side("new", Actions(np.zeros(120, dtype=np.int64), flat), easy),
        Anchor(truth, np.arange(600).astype(np.str_)), spec=RewardSpec(), now=1.0,
        terms=Terms(require_certificate=False, n_replicates=1000),
    )  # fmt: skip
    found = verdict.test("guard reward")
    assert (found.n, found.n_differ) == (61 if copies else 120, 60)
    assert verdict.promoted is not copies


def test_the_champion_is_judged_as_it_serves_and_not_as_it_did_before_an_alarm(
    tmp_path: Path, bundle: Path, rival: Path
) -> None:
    found = {}
    for name, threshold in (("certified", None), ("laxer", 0.01), ("tightened", 1.0)):
        rounds, work = to_judge(tmp_path / name, bundle, rival, threshold=threshold, largest_slowdown=None)
        verdict = rounds.evaluate(work)
        found[name] = (verdict.test("guard reward").n_differ, verdict.test("anchor reward").n_differ)
    champion, candidate = (rounds.registry.load(name or "") for name in (work.champion, work.candidate))
    files = [rounds.root / "images" / one for one in rounds.vault.row_ids("one")]
    theirs, certified = (Cascade.load(one).predict(files) for one in (candidate, champion))
    held = Cascade.load(replace(champion, policy=tightened(champion.policy, 1.0))).predict(files)
    expected = [
        int(((one.label != theirs.label) | (one.exited != theirs.exited)).sum()) for one in (certified, held)
    ]  # fmt: skip
    assert [found[name][0] for name in found] == [expected[0], expected[0], expected[1]] and expected[0] != expected[1]
    assert len({on_anchor for _, on_anchor in found.values()}) == 1


def test_the_threshold_that_labels_asked_for_is_frozen_with_them(tmp_path: Path, bundle: Path) -> None:
    rounds, work = start(tmp_path, bundle)
    deal(rounds, 80)

    def frozen(now: float) -> float | None:
        found = rounds.collect(work.model_copy(update={"entered": now}))
        return Snapshot.read(tmp_path / "snapshots" / f"{found['snapshot']}.json").threshold

    certified = rounds.registry.load(work.champion).policy.exit_threshold
    assert frozen(1000.0) == certified
    served = [event for event in deal(rounds, 60, first=1100, labelled=False) if event.selected]
    for event in served[:3]:
        answer(rounds, event, "roadwork", at=1500.0)
    tightened = watch(rounds, {}, now=2000.0).threshold
    assert frozen(1000.0) == certified and frozen(2000.0) == tightened > certified
    # Labels steer no more, and what they asked for last is still in force.
    with rounds.store.write() as connection:
        rounds.registry.tighten(connection, work.champion, 0.97, now=2100.0)
    rounds.config = rounds.config.model_copy(update={"steer": False})
    assert frozen(2000.0) == 0.97 != tightened


def test_a_slow_candidate_is_refused_without_a_look(tmp_path: Path, bundle: Path, rival: Path) -> None:
    rounds, work = to_judge(tmp_path, bundle, rival, largest_slowdown=0.01)
    verdict = rounds.evaluate(work)
    assert verdict.reason == "no promotion: latency over the champion's"
    assert verdict.look is None and rounds.vault.looks_taken("one") == 0
    assert names(verdict).keys().isdisjoint({"anchor reward"})  # nothing was decided for it


def test_without_a_limit_nothing_is_timed_and_two_loops_give_one_verdict(
    tmp_path: Path, bundle: Path, rival: Path
) -> None:
    found = []
    for name in ("one", "two"):
        rounds, work = to_judge(tmp_path / name, bundle, rival, largest_slowdown=None)
        found.append(rounds.evaluate(work))
    assert found[0].fingerprint() == found[1].fingerprint()
    assert "latency over the champion's" not in names(found[0]) and names(found[0])["parity with its reference"]


def test_a_candidate_that_has_more_to_do_is_slower(tmp_path: Path, bundle: Path) -> None:
    """The same model on pictures of four times the area: the interval tells it from the champion."""
    larger = export(make_run(tmp_path / "larger", make_model(image_size=128)))
    rounds, work = to_judge(tmp_path, bundle, larger, n=12, largest_growth=99.0, largest_slowdown=1.25, timed_passes=3)
    latency = rounds.evaluate(work).test("latency over the champion's")
    assert not latency.passed and (latency.estimate or 0) > 1.25


def tampered(bundle: Path, graph: Path, out: Path) -> Path:
    """A bundle whose Stage A is another's, with a manifest that says so."""
    shutil.copytree(bundle, out)
    shutil.copy2(graph, out / "stage_a.onnx")
    manifest = json.loads((out / "bundle.json").read_text())
    data = (out / "stage_a.onnx").read_bytes()
    manifest["files"]["stage_a.onnx"] = {"sha256": sha256_bytes(data), "size": len(data)}
    (out / "bundle.json").write_text(json.dumps(manifest))
    return out


def test_a_graph_that_is_not_the_certified_one_is_refused(tmp_path: Path, bundle: Path, rival: Path) -> None:
    changed = tampered(rival, bundle / "stage_a.onnx", tmp_path / "changed")
    rounds, work = to_judge(tmp_path / "root", bundle, changed)
    verdict = rounds.evaluate(work)
    parity = verdict.test("parity with its reference")
    assert not parity.passed and (parity.estimate or 0) > 1e-2
    assert verdict.test("latency over the champion's").note.startswith("not measured: not timed")
    assert verdict.look is None and rounds.vault.looks_taken("one") == 0


def aged(bundle: Path, out: Path) -> Path:
    """As format 1 was: without reference outputs."""
    shutil.copytree(bundle, out)
    manifest = json.loads((out / "bundle.json").read_text())
    (out / manifest.pop("reference")).unlink()
    manifest["files"].pop("reference.npz")
    for stage in manifest["stages"].values():
        stage.pop("variants", None)
    (out / "bundle.json").write_text(json.dumps({**manifest, "format_version": 1}))
    return out


def test_a_champion_of_an_older_format_is_timed_and_a_candidate_needs_its_reference(
    tmp_path: Path, bundle: Path, rival: Path
) -> None:
    run = Path(shutil.copytree(bundle.parent, tmp_path / "run"))
    shutil.rmtree(run / bundle.name)
    old = aged(bundle, run / "bundle")
    rounds, work = to_judge(tmp_path / "one", old, rival)
    verdict = rounds.evaluate(work)
    assert verdict.test("latency over the champion's").passed and verdict.test("parity with its reference").passed
    rounds, work = to_judge(tmp_path / "two", bundle, aged(rival, tmp_path / "aged"))
    parity = rounds.evaluate(work).test("parity with its reference")
    assert not parity.passed
    assert parity.note == "not measured: the bundle has no reference outputs; export it with this version"


KILLED = """
import os, signal, sys
import stage1_pro.continual.loop.rounds as module
from stage1_pro.continual.serving.events import EventLog
from stage1_pro.continual.loop.executors import Inline, Work
from stage1_pro.continual.loop.promotion import Anchor, Side, Terms, Verdict, evaluate, judge_anchor
from stage1_pro.continual.ledger.guard import GuardVault
from stage1_pro.continual.loop.machine import Round
from stage1_pro.continual.loop.registry import Registry
from stage1_pro.continual.ledger.store import Store
root, config, work, where = sys.argv[1:]
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
if where == "measured":
    module.evaluate = die
else:
    GuardVault.close = die
rounds = module.Rounds(Registry(root, Store(root + "/loop.db")), EventLog(root + "/log"), Inline(),
                       module.RoundsConfig.model_validate_json(config))
rounds.evaluate(Round.model_validate_json(work))
"""


@pytest.mark.parametrize("where", ["measured", "look"])
def test_killed_while_it_judges_it_comes_back_to_the_same_verdict(
    where: str, tmp_path: Path, bundle: Path, rival: Path
) -> None:
    """A time measured twice is never the same: what the killed process measured is what the verdict says."""
    rounds, work = to_judge(tmp_path, bundle, rival)
    arguments = [str(tmp_path), rounds.config.model_dump_json(), work.model_dump_json(), where]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    (measured,) = [one for path in (tmp_path / "work").glob("*/result.json")
                   if (one := Work.read(path)).function.endswith(":measure")]  # fmt: skip
    verdict = rounds.evaluate(work)
    latency = verdict.test("latency over the champion's")
    assert (latency.estimate, latency.bound) == (
        measured.result["latency"]["ratio"],
        measured.result["latency"]["high"],
    )
    assert rounds.evaluate(work).fingerprint() == verdict.fingerprint()
    assert rounds.vault.looks_taken("one") == 1


# --------------------------------------------------------------------------------------------
# Beside the champion


def test_a_candidate_wrong_in_all_audited_disagreements_goes_soon(tmp_path: Path, bundle: Path) -> None:
    rounds = make_rounds(tmp_path, bundle)
    champion = rounds.registry.alias("champion").bundle or ""
    work = Round(number=1, entered=5.0, champion=champion, candidate="c" * 64, shadow_since=5.0)
    served = serve(rounds, 20)
    _append_pairs(rounds.log.folder, [
        Pair(time=one.time, image_sha256=one.image_sha256, champion=work.champion, candidate="c" * 64,
             served="champion", champion_label="none", candidate_label="roadwork", champion_exited=True,
             candidate_exited=True)
        for one in served
    ])  # fmt: skip
    for i, event in enumerate(served):
        answer(rounds, event, "none", at=100.0 + i)
    found = rounds.compare(work, delta=0.05)
    assert (found.pairs, found.disagreements, found.evidence.n) == (20, 20, 20)
    assert found.evidence.alarm and (found.evidence.alarm_n or 99) <= 15
