"""What looks keep of the past changes nothing of what they see: a history is what reading everything gives."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sqlalchemy", reason="the loop needs [continual]")

from sqlalchemy import event, select
from sqlalchemy.exc import DatabaseError

from stage1_pro.continual.ledger import audit
from stage1_pro.continual.ledger.labels import (
    GUARD_SOURCES,
    Label,
    Outside,
    add_events,
    add_labels,
    add_outside,
    bundles,
    ingest,
    read_events,
    resolve,
)
from stage1_pro.continual.ledger.store import Store
from stage1_pro.continual.loop import history as module
from stage1_pro.continual.loop import roles, watching
from stage1_pro.continual.loop.compaction import compact
from stage1_pro.continual.loop.config import RoundsConfig
from stage1_pro.continual.loop.executors import Inline
from stage1_pro.continual.loop.history import History
from stage1_pro.continual.loop.machine import Loop
from stage1_pro.continual.loop.registry import Registry
from stage1_pro.continual.loop.rounds import Rounds, remember_run
from stage1_pro.continual.serving.events import SKETCH_SIZE, BundleFacts, Event, EventLog, ReviewPlan
from stage1_pro.continual.watch.monitor import Evidence
from stage1_pro.continual.watch.srt import ControllerConfig, Feedback, ThresholdController, to_logit
from stage1_pro.continual.watch.status import MonitorConfig
from stage1_pro.errors import NotReachableError
from stage1_pro.files import uniform

BUNDLES, CLASSES, CERTIFIED = ("a" * 64, "b" * 64), ("none", "roadwork"), 0.7
RECENT = 15


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every path is taken by a few rows."""
    monkeypatch.setattr(module, "KEEP_EVERY", 4)
    monkeypatch.setattr(watching, "KEEP_EVERY", 4)
    monkeypatch.setattr(module, "_CHUNK", 3)
    monkeypatch.setattr(module, "_FETCH", 5)
    monkeypatch.setattr(watching, "USUAL", 6)
    monkeypatch.setattr(roles, "_SOME", 2)


def configured(floor: float = 0.4, **changes: float) -> RoundsConfig:
    plan = ReviewPlan(floor=floor, seed=3, **changes)
    return RoundsConfig(monitor=MonitorConfig(alpha=0.1, recent=RECENT, floor=floor), plan=plan, least_rows=2,
                        least_guard=2)  # fmt: skip


# -------------------------------------------------------------------------------- by reading everything


@dataclass
class Everything:
    """All events and labels before a moment, and what the definitions say of them."""

    config: RoundsConfig
    served: list[Event]
    held: dict[str, Any]

    @classmethod
    def read(cls, store: Store, config: RoundsConfig, until: float) -> Everything:
        return cls(config, list(read_events(store, until=until)), resolve(store, sources=GUARD_SOURCES, until=until))

    def wrong(self, one: Event) -> bool:
        said = one.label
        if one.action != "exit":
            assert one.prob_a is not None
            said = CLASSES[int(one.prob_a > 0.5)]
        return said != self.held[one.id].label

    def view(self, bundle: str, since: float) -> dict[str, Any]:
        config, floor = self.config, self.config.plan.floor
        served = [
            one for one in self.served if one.bundle == bundle and one.time >= since and one.exit_score is not None
        ]
        feedback = sorted(
            Feedback(self.held[one.id].time, one.id, one.exit_score or 0.0, wrong=self.wrong(one),
                     exited=one.action == "exit", propensity=one.propensity)
            for one in served if one.selected and one.id in self.held
        )  # fmt: skip
        how = ControllerConfig(alpha=0.1, certified=CERTIFIED, audit_rate=floor, floor=floor)
        state = ThresholdController.replay(how, feedback).state
        promised = [one for one in feedback if one.score >= CERTIFIED]
        usual = [one.propensity for one in served if one.action == "exit"][:6]
        reference = max(float(np.median(usual)), floor) if usual else floor
        evidence = Evidence(alpha=0.1, delta=config.monitor.delta, reference=reference, floor=floor).after(
            [one.wrong for one in promised], propensity=[one.propensity for one in promised],
            time=[one.known for one in promised],
        )  # fmt: skip
        if evidence.alarm:
            jumped = to_logit(CERTIFIED) + how.jump
            state = state.at_least(max(jumped, -math.inf if state.centre is None else state.centre))
        alarm = max((at for at in (evidence.alarm_at, state.alarm_at) if at is not None), default=-math.inf)
        times = {one.id: one.time for one in served}
        last = served[-RECENT:]
        return {
            "evidence": evidence, "controller": state,
            "harm": max((times[one.event] for one in promised if one.known <= alarm), default=-math.inf),
            "time": [one.time for one in last],
            "wrong": [float(self.wrong(one)) if one.selected and one.id in self.held else None for one in last],
            "label": [CLASSES.index(self.held[one.id].label) if one.label and one.id in self.held else -1
                      for one in last],
        }  # fmt: skip

    def deal(self, since: dict[Any, float], after: float, exclude: set[str]) -> Any:
        """The rows of each role; the event of another plan where there is one that counts."""
        plan = self.config.plan
        found: dict[str, dict[str, Any]] = {"guard": {}, "certify": {}, "learn": {}}
        parts: dict[str, str] = {}
        for one in self.served:
            fresh = [part for part, time in since.items() if one.time >= time and one.time > after]
            if fresh and (one.propensity < plan.floor or one.selected != plan.selects(one.id, one.propensity)):
                return one.id
            draw = uniform(plan.seed, "review", one.id)
            part = roles.role(one.image_sha256, draw, self.config) if one.selected else "learn"
            if parts.get(one.image_sha256, "learn") == "learn":
                parts[one.image_sha256] = part
            if one.id in self.held and one.selected and part in ("learn", *fresh):
                label = self.held[one.id]
                found[part].setdefault(one.image_sha256, (one.image_sha256, label.label, label.source))
        return {
            part: [row for name, row in sorted(rows.items()) if parts[name] == part and name not in exclude]
            for part, rows in found.items()
        }

    def last_served(self) -> dict[str, float]:
        return {one.image_sha256: one.time for one in self.served}


# -------------------------------------------------------------------------------- random histories


@dataclass
class Past:
    """Somebody serves, labels, imports, promotes and rolls back, in whatever order."""

    store: Store
    rng: np.random.Generator
    now: float = 1000.0
    config: RoundsConfig = field(default_factory=configured)
    champion: tuple[str, float] = (BUNDLES[0], 0.0)
    made: list[Event] = field(default_factory=list)
    records: list[Outside] = field(default_factory=list)
    rounds: int = 0
    images: int = 40
    twin: Store | None = None

    @property
    def stores(self) -> list[Store]:
        return [self.store, *filter(None, [self.twin])]

    def image(self, number: int) -> str:
        return f"{number:064x}"

    def serve(self) -> None:
        new = []
        for _ in range(int(self.rng.integers(1, 9))):
            late = self.rng.random() < 0.1  # another machine's log, or a clock that is ahead
            chance = float(self.rng.choice([0.4, 0.6, 1.0], p=[0.6, 0.3, 0.1]))
            name = f"e{len(self.made):05d}"
            selected = self.config.plan.selects(name, chance)
            if self.rng.random() < 0.004:  # another review plan's
                selected = not selected
            action = str(self.rng.choice(["exit", "exit", "exit", "defer", "abstain"]))
            one = Event(
                id=name, time=self.now + float(self.rng.normal(0, 40)) if late else self.now,
                bundle=self.champion[0] if self.rng.random() < 0.85 else BUNDLES[1],
                image_sha256=self.image(int(self.rng.integers(self.images))), action=action, stage="A",
                label="" if action == "abstain" else str(self.rng.choice(CLASSES)),
                prob_a=float(self.rng.random()), prob_b=None, confidence=None, gate_logit=None,
                exit_score=float(self.rng.random()) if self.rng.random() < 0.95 else None, threshold=0.5,
                propensity=chance, selected=selected, sketch=(0.0,) * SKETCH_SIZE,
            )  # fmt: skip
            self.now += float(self.rng.random())
            new.append(one)
            self.made.append(one)
        for store in self.stores:
            add_events(store, new)

    def _when(self) -> float:
        """Mostly now; dated back or, by a clock that is ahead, into the future."""
        return self.now + float(self.rng.choice([0.0, 0.0, 0.0, -60.0, 30.0]) * self.rng.random())

    def _label(self) -> Label:
        one = self.made[-1 - int(min(len(self.made) - 1, self.rng.exponential(12)))]
        return Label(
            event_id=one.id, label=str(self.rng.choice(CLASSES, p=[0.7, 0.3])), time=self._when(),
            source=str(self.rng.choice(["review", "review", "owner", "model"])),
            annotator=str(self.rng.choice(["ada", "ben"])),
        )  # fmt: skip

    def label(self) -> None:
        new = [self._label() for _ in range(int(self.rng.integers(1, 7)))]
        for store in self.stores:
            add_labels(store, new)

    def record(self) -> None:
        """An import: answers of another tool, the same again, changed, or withdrawn."""
        if self.records and self.rng.random() < 0.6:
            old = self.records[int(self.rng.integers(len(self.records)))]
            label = old.label.model_copy(update={"time": self._when(), "label": str(self.rng.choice(CLASSES))})
            one = Outside(label, old.record, withdrawn=bool(self.rng.random() < 0.4))
        else:
            one = Outside(self._label(), f"other/{len(self.records)}")
        self.records.append(one)
        for store in self.stores:
            add_outside(store, [one])

    def promote(self) -> None:
        """Another champion, or an earlier one again."""
        self.champion = (str(self.rng.choice(BUNDLES)), self.now)

    def freeze(self) -> None:
        self.rounds += 1
        until = self.now - float(self.rng.random() * 30)
        body = {"from": "COLLECT", "to": str(self.rng.choice(["PROPOSE", "HOLD"])),
                "round": {"number": self.rounds, "snapshot": {"until": until, "guard": f"g{self.rounds}"}}}  # fmt: skip
        for store in self.stores:
            with store.write() as connection:
                audit.append(connection, store, "edge", body, self.now)

    def configure(self) -> None:
        self.config = configured(float(self.rng.choice([0.4, 0.3])))


def check(past: Past, until: float, store: Store) -> int:
    """A look sees what reading everything gives; how many labels it took."""
    config, (bundle, since) = past.config, past.champion
    whole = Everything.read(past.store, config, until)
    expected = whole.view(bundle, since)
    with History.look(store, config, until) as history:
        view, unkept = watching.view_champion(history, bundle, since, config, certified=CERTIFIED, steer=True)
        assert (view.evidence, view.controller, view.newest_harm) == (
            expected["evidence"], expected["controller"], expected["harm"]
        )  # fmt: skip
        assert view.decisions.time.tolist() == expected["time"]
        assert [None if math.isnan(one) else one for one in view.decisions.wrong] == expected["wrong"]
        assert view.decisions.label is not None and view.decisions.label.tolist() == expected["label"]
        assert history.answers_since(until - 50) == sum(one.time > until - 50 for one in whole.held.values())
        asked = {one.image_sha256 for one in whole.served if one.selected or one.id in whole.held}
        last = whole.last_served()
        assert history.last_served(asked) == {image: last[image] for image in asked}
        edges = [json.loads(row.body)["round"] for row in audit.read(past.store, kind="edge") if "PROPOSE" in row.body]
        frozen = [(one["number"], one["snapshot"]["until"], one["snapshot"]["guard"]) for one in edges]
        assert sorted(history.frozen()) == frozen
        for back in (math.inf, 40.0):
            used = {"guard": until - back, "certify": until - back / 2}
            after, gone = max(view.newest_harm, until - 200), {past.image(one) for one in range(0, past.images, 7)}
            there = {past.image(one) for one in range(0, past.images, 2 if back == 40 else 5)}
            rows = whole.deal(used, after, gone)
            if isinstance(rows, str):
                with pytest.raises(NotReachableError, match=rows):
                    roles.deal(history, since=used, after=after, exclude=gone)
                continue
            assert roles.deal(history, since=used, after=after, exclude=gone) == rows
            counts = roles.count(history, config, there, since=used, after=after, exclude=gone)
            assert counts == {part: min(sum(row[0] in there for row in rows[part]), 2) for part in rows}
    history.keep(store, *unkept)
    return 0 if view.controller is None else view.controller.n


@pytest.fixture
def past(store: Store, request: pytest.FixtureRequest) -> Past:
    with store.write() as connection:
        for name in BUNDLES:
            facts = BundleFacts(bundle=name, classes=CLASSES, positive="roadwork").model_dump_json()
            connection.execute(bundles.insert(), {"bundle": name, "facts": facts})
    return Past(store, np.random.default_rng(request.param))


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))]


@pytest.mark.parametrize("past", SEEDS, indirect=True)
def test_a_look_sees_what_reading_everything_gives(past: Past, store_url: str) -> None:
    steps = ("serve", "label", "label", "record", "look", "look", "back", "read only", "promote", "freeze", "configure")
    often = [0.24, 0.2, 0.14, 0.06, 0.2, 0.04, 0.04, 0.05, 0.012, 0.013, 0.005]
    past.serve()
    most = 0
    for _ in range(150):
        step = str(past.rng.choice(steps, p=often))
        if step in ("serve", "label", "record", "promote", "freeze", "configure"):
            getattr(past, step)()
            continue
        until = past.now - float(past.rng.random() * 50) * (step == "back")
        other = Store(store_url, read_only=True) if step == "read only" else past.store
        most = max(most, check(past, until, other))
        if other is not past.store:
            other.close()
    check(past, past.now + 100, past.store)
    assert most > 5, "few labels reached the evidence; this history tests nothing"


@pytest.mark.parametrize("past", [9], indirect=True)
def test_what_was_kept_by_a_look_that_others_overtook_is_not_used(past: Past) -> None:
    """A label dated back comes between a look and its keeping."""
    config, (bundle, since) = past.config, past.champion
    for _ in range(12):
        past.serve()
        past.label()
    with History.look(past.store, config, past.now) as history:
        _, unkept = watching.view_champion(history, bundle, since, config, certified=CERTIFIED, steer=True)
    first = next(one for one in past.made if one.selected and one.exit_score is not None and one.bundle == bundle)
    add_labels(past.store, [Label(event_id=first.id, label="none", source="owner", annotator="x", time=5.0)])
    with History.look(past.store, config, past.now + 1):
        pass
    history.keep(past.store, *unkept)
    with past.store.read() as connection:
        assert not connection.execute(select(module._kept)).all()
    check(past, past.now + 1, past.store)


def began(root: Path, url: str, bundle: Path, config: RoundsConfig) -> Rounds:
    """A loop that began at 0 with a bundle."""
    registry = Registry(root, Store(url))
    name = registry.add(bundle)
    Loop.begin(registry, name, now=0.0, by="ada")
    remember_run(root, name, bundle.parent, "0")
    log = EventLog(root / "log")
    log.describe(BundleFacts(bundle=name, classes=CLASSES, positive="roadwork"))
    return Rounds(registry, log, Inline(), config)


def pictured(rounds: Rounds, past: Past) -> list[Any]:
    """The sums that a status page draws, with so many decisions in the hour."""
    bundle, since = past.champion
    with History.look(rounds.store, past.config, past.now) as history:
        return [[round(one, 6) if isinstance(one, float) else one for one in row] for row in
                history.hours(bundle, since)]  # fmt: skip


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_a_compacted_loop_sees_what_the_whole_one_sees(
    store_url: str, tiny: Path, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its twin, which nobody compacts, is read whole; derived rows that are made anew change nothing."""
    monkeypatch.setattr(module, "HOUR", 60.0)
    rng = np.random.default_rng(seed)
    rounds = began(tmp_path / "loop", store_url, tiny / "bundle", configured())
    whole = began(tmp_path / "whole", str(tmp_path / "whole.db"), tiny / "bundle", configured())
    name = rounds.registry.alias("champion").bundle or ""
    past = Past(whole.store, rng, champion=(name, 0.0), images=2000, twin=rounds.store)
    ingest(rounds.store, rounds.log)
    ingest(whole.store, whole.log)
    steps = ("serve", "label", "look", "compact", "anew", "promote")
    gone = 0
    past.serve()
    for number in range(48):
        step = "compact" if number % 12 == 11 else str(rng.choice(steps, p=[0.6, 0.22, 0.11, 0.0, 0.03, 0.04]))
        if step in ("serve", "label"):
            for _ in range(2):
                getattr(past, step)()
        elif step == "promote" and rng.random() < 0.3:
            past.champion = (name, past.now)
            for one in (rounds, whole):
                with one.store.write() as connection:
                    version = one.registry.alias("champion", connection).version
                    one.registry.move(connection, "champion", name, expected=version, now=past.now, by="ada")
        elif step == "compact":
            # A clock that leapt removes nothing, and holds back no look after it.
            assert compact(rounds, keep=1e6, now=past.now + 2e6, dry_run=True).events == 0
            with rounds.store.read() as connection:
                assert connection.execute(module._place.select()).one().until < past.now + 1e6
            planned = compact(rounds, keep=15.0, now=past.now, dry_run=True)
            found = compact(rounds, keep=15.0, now=past.now)
            assert (planned.events, planned.left) == (found.events, found.left) and not found.note
            assert found.left == len(list(read_events(rounds.store)))
            assert compact(rounds, keep=15.0, now=past.now).events == 0
            gone += found.events
            check(past, past.now, rounds.store)
        elif step == "anew":
            with rounds.store.write() as connection:
                for table in (module._place, *module._DERIVED):
                    connection.execute(table.delete())
            check(past, past.now, rounds.store)
        else:
            check(past, past.now, rounds.store)
            assert pictured(rounds, past) == pictured(whole, past)
    assert gone > 10
    kept = {one.id for one in read_events(rounds.store)}
    lost = [one for one in past.made if one.id not in kept]
    assert len(lost) == gone and not any(one.selected for one in lost)
    assert audit.verify(rounds.store).ok
    with pytest.raises(DatabaseError, match="append-only"), rounds.store.write() as connection:
        connection.exec_driver_sql("DELETE FROM events")
    for one in (rounds, whole):
        one.store.close()


# -------------------------------------------------------------------------------- what a look costs


def steps_of(store: Store, work: Any) -> int:
    """Hundreds of steps that SQLite's machine takes for some work, on every connection."""
    count = 0

    def one() -> int:
        nonlocal count
        count += 1
        return 0

    def connected(connection: Any, *_: Any) -> None:
        connection.set_progress_handler(one, 100)

    store.engine.dispose()
    event.listen(store.engine, "connect", connected)
    try:
        work()
    finally:
        event.remove(store.engine, "connect", connected)
        store.engine.dispose()
    return count


def test_a_look_reads_what_is_new_however_much_there_was(tiny: Path, tmp_path: Path) -> None:
    """A look at 15 times the events and labels; one that read all of either would take 15 times the steps."""
    config, taken = configured(novelty=0.0), []
    for number, size in enumerate((1000, 15_000)):
        rounds = began(tmp_path / str(number), str(tmp_path / f"{number}.db"), tiny / "bundle", config)
        champion, name = rounds.registry.alias("champion"), rounds.registry.alias("champion").bundle or ""
        ingest(rounds.store, rounds.log)
        rng = np.random.default_rng(5)
        for first in range(0, size, 5000):
            made = [
                Event.model_construct(
                    id=f"e{i:06d}", time=float(i + 1), bundle=name, image_sha256=f"{i:064x}", action="exit", stage="A",
                    label="none", prob_a=0.1, prob_b=None, confidence=0.9, gate_logit=None,
                    exit_score=float(rng.random()), threshold=0.5, propensity=0.4,
                    selected=config.plan.selects(f"e{i:06d}", 0.4), sketch=(0.0,) * SKETCH_SIZE,
                )
                for i in range(first, min(first + 5000, size))
            ]  # fmt: skip
            add_events(rounds.store, made)
            add_labels(rounds.store, [
                Label(event_id=one.id, label="none", source="review", annotator="ada", time=one.time + 0.5)
                for one in made if one.selected and rng.random() < 0.1
            ])  # fmt: skip
        now = size + 10.0
        # `status` keeps up with what is new, and then only reads.
        rounds.keep_up(champion, now=now)
        reader = Store(tmp_path / f"{number}.db", read_only=True)
        with History.look(reader, config, now + 1) as history:
            assert not history._lacks
            certified = rounds.registry.load(name).policy.exit_threshold
            steer = rounds.registry.load(name).policy.steerable
            _, (_, new) = watching.view_champion(history, name, 0.0, config, certified=certified, steer=steer)
            assert new == []
        reader.close()

        def again(rounds: Rounds = rounds, champion: Any = champion, now: float = now) -> None:
            rounds.status({}, champion, now=now + 5)
            rounds.watch({}, champion, now=now + 6, manual=False)

        taken.append(steps_of(rounds.store, again))
        rounds.store.close()
    assert taken[1] < 2 * taken[0] + 50, taken
