"""What the loop's states do, with real rows and without training: watching, dealing labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sqlalchemy", reason="the loop needs [continual]")

from test_deploy import CLASSES, make_model, make_run

from stage1_pro.artifacts import sha256_bytes
from stage1_pro.continual.events import SKETCH_SIZE, BundleFacts, Event, EventLog
from stage1_pro.continual.executors import Inline
from stage1_pro.continual.labels import Label, add_events, add_labels
from stage1_pro.continual.loop import Loop
from stage1_pro.continual.registry import Registry
from stage1_pro.continual.rounds import Rounds, RoundsConfig
from stage1_pro.continual.status import MonitorConfig
from stage1_pro.continual.store import Store
from stage1_pro.stations.exporting import export

SKETCH = (0.0,) * SKETCH_SIZE


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(make_run(tmp_path_factory.mktemp("rounds") / "run", make_model()))


def make_rounds(root: Path, bundle: Path, **changes: Any) -> Rounds:
    """A loop that has begun at 0, with nothing served."""
    registry = Registry(root, Store(root / "loop.db"))
    name = registry.add(bundle)
    Loop.begin(registry, name, now=0.0, by="ada")
    log = EventLog(root / "log")
    log.describe(BundleFacts(bundle=name, classes=CLASSES, positive="roadwork"))
    return Rounds(registry, log, Inline(), RoundsConfig(**{"monitor": MonitorConfig(alpha=0.02), **changes}))


def serve(rounds: Rounds, n: int, **changes: Any) -> list[Event]:
    """Exits, all of them selected for review, a second apart."""
    name = rounds.registry.alias("champion").bundle
    values: dict[str, Any] = {
        "bundle": name, "action": "exit", "stage": "A", "label": "none", "prob_a": 0.1, "prob_b": None,
        "confidence": 0.9, "gate_logit": None, "exit_score": 0.97, "threshold": 0.6, "propensity": 0.5,
        "selected": True, "sketch": SKETCH,
    }  # fmt: skip
    made = [
        Event(id=f"e{i:05d}", time=10.0 + i, image_sha256=sha256_bytes(b"%d" % i), **(values | changes))
        for i in range(n)
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
