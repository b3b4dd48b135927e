"""An answer of another tool has an identity: imports are idempotent, and end in the state that the tool shows."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

from stage1_pro.continual.ledger.exchange import export_csv, export_label_studio, import_csv, import_label_studio
from stage1_pro.continual.ledger.labels import Label, add_events, add_labels, disagreement, labels, read_labels, resolve
from stage1_pro.continual.ledger.store import Store
from stage1_pro.continual.serving.events import Event

CLASSES = ("none", "work")


def fill(store: Store, count: int = 3) -> Store:
    add_events(store, [
        Event(
            id=f"e{index}", time=float(index), bundle="b" * 64, image_sha256=f"{index:064x}", action="exit", stage="A",
            label="none", prob_a=0.1, prob_b=None, confidence=0.9, gate_logit=None, exit_score=0.9, threshold=0.8,
            propensity=0.5, selected=True, sketch=np.zeros(64),
        )
        for index in range(count)
    ])  # fmt: skip
    return store


@pytest.fixture
def kept(store: Store) -> Store:
    return fill(store)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Store]:
    with_events = fill(Store(tmp_path / "other.db"))
    yield with_events
    with_events.close()


def iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat()


def annotation(label: str, at: float, *, number: int = 9, by: int = 1, **more: Any) -> dict[str, Any]:
    choice = {"from_name": "label", "to_name": "image", "type": "choices", "value": {"choices": [label]}}
    return {"id": number, "completed_by": by, "was_cancelled": False, "created_at": iso(5), "updated_at": iso(at),
            "result": [choice], **more}  # fmt: skip


def task(*annotations: dict[str, Any], event: int = 0, **more: Any) -> dict[str, Any]:
    return {"id": event + 1, "project": 4, "data": {"event_id": f"e{event}"}, "annotations": list(annotations), **more}


def imports(store: Store, path: Path, *tasks: dict[str, Any], now: float = 99.0, **more: Any) -> tuple[int, int, int]:
    path.with_suffix(".json").write_text(json.dumps(tasks))
    found = import_label_studio(store, path.with_suffix(".json"), now=now, **more)
    return found.added, found.known, found.withdrawn


def count(store: Store) -> int:
    with store.read() as connection:
        return len(connection.execute(select(labels.c.id)).all())


def test_an_annotator_who_corrects_himself_is_one_answer(kept: Store, tmp_path: Path) -> None:
    for at, name in ((5.0, "work"), (6.0, "none"), (7.0, "work")):
        assert imports(kept, tmp_path / "x", task(annotation(name, at))) == (1, 0, 0)
        found = resolve(kept)["e0"]
        assert (found.label, found.time, found.answers) == (name, at, 1)
        assert imports(kept, tmp_path / "x", task(annotation(name, at))) == (0, 1, 0)
    assert [resolve(kept, until=at)["e0"].label for at in (5.5, 6.5, 7.5)] == ["work", "none", "work"]
    # An export of before the correction comes in late.
    assert imports(kept, tmp_path / "x", task(annotation("none", 6.0))) == (0, 1, 0)
    assert resolve(kept)["e0"].label == "work"
    # Saved again without a change nothing is known later.
    assert imports(kept, tmp_path / "x", task(annotation("work", 50.0))) == (0, 1, 0)
    assert resolve(kept)["e0"].time == 7.0 and resolve(kept)["e0"].agree
    assert disagreement(kept).doubled == 0


def test_annotations_of_others_are_answers_of_their_own(kept: Store, tmp_path: Path) -> None:
    two = task(annotation("work", 5.0), annotation("none", 6.0, number=10, by=2))
    assert imports(kept, tmp_path / "x", two) == (2, 0, 0)
    assert resolve(kept)["e0"].answers == 2 and not resolve(kept)["e0"].agree and disagreement(kept).disagreeing == 1
    elsewhere = task(annotation("work", 7.0)) | {"project": 5}
    assert imports(kept, tmp_path / "x", elsewhere) == (1, 0, 0)


def test_what_the_tool_has_no_more_is_withdrawn(kept: Store, tmp_path: Path) -> None:
    whole = task(annotation("work", 5.0), annotation("none", 6.0, number=10, by=2), updated_at=iso(6))
    imports(kept, tmp_path / "x", whole)
    cancelled = task(annotation("work", 8.0, was_cancelled=True), whole["annotations"][1], updated_at=iso(8))
    assert imports(kept, tmp_path / "x", cancelled) == (0, 1, 1)
    assert [one.annotator for one in read_labels(kept)] == ["2"]
    assert imports(kept, tmp_path / "x", cancelled) == (0, 1, 0)
    # An old export changes nothing; one without all annotations, or without a time, tells nothing of the others.
    for old in (whole, task(updated_at=iso(4)), task(), task(updated_at=iso(9), total_annotations=1)):
        assert imports(kept, tmp_path / "x", old)[2] == 0 and len(read_labels(kept)) == 1
    assert imports(kept, tmp_path / "x", task(updated_at=iso(9))) == (0, 0, 1)
    assert resolve(kept) == {} and set(resolve(kept, until=8.5)) == {"e0"}
    assert imports(kept, tmp_path / "x", task(annotation("work", 10.0))) == (1, 0, 0)
    assert resolve(kept)["e0"].label == "work"


def test_labels_of_an_import_without_identity_are_taken_over(kept: Store, tmp_path: Path) -> None:
    """Older versions kept ``created_at`` alone."""
    add_labels(kept, [Label(event_id="e0", label="work", source="review", annotator="1", time=5.0)])
    assert imports(kept, tmp_path / "x", task(annotation("work", 7.0))) == (0, 1, 0)
    assert imports(kept, tmp_path / "x", task(annotation("none", 8.0))) == (1, 0, 0)
    assert [one.label for one in read_labels(kept)] == ["none"]


def test_a_label_that_went_out_and_was_edited_comes_back_as_one(kept: Store, other: Store, tmp_path: Path) -> None:
    add_labels(kept, [Label(event_id="e0", label="work", source="review", annotator="ada", time=2.5)])
    export_label_studio(kept, tmp_path / "out.json")
    tasks = json.loads((tmp_path / "out.json").read_text())
    # Label Studio gives numbers, and makes whoever imports the annotator.
    for index, one in enumerate(tasks):
        one |= {"id": index + 1, "project": 4}
        for made in one["annotations"]:
            made |= {"id": 9, "completed_by": 1, "created_at": iso(20), "updated_at": iso(20)}
    for store, added in ((kept, 0), (other, 1)):
        assert imports(store, tmp_path / "x", *tasks) == (added, 1 - added, 0)
        assert [(one.annotator, one.time) for one in read_labels(store)] == [("ada", 2.5)]
    made = tasks[0]["annotations"][0]
    for at, name in ((30.0, "none"), (40.0, "work")):
        made["updated_at"], made["result"][0]["value"] = iso(at), {"choices": [name]}
        for store in (kept, other):
            assert imports(store, tmp_path / "x", *tasks) == (1, 0, 0)
            assert [(one.label, one.time) for one in read_labels(store)] == [(name, at)]


def test_a_table_imported_again_changes_no_time(kept: Store, tmp_path: Path) -> None:
    path, given = tmp_path / "t.csv", {"source": "owner", "annotator": "city"}
    path.write_text("event_id,label\ne0,work\ne1,none\n")
    assert import_csv(kept, path, now=10.0, **given).added == 2
    before = resolve(kept)
    path.write_text("event_id,label\ne0,work\ne1,none\ne2,none\n")
    found = import_csv(kept, path, now=20.0, **given)
    assert (found.added, found.known) == (1, 2) and {**resolve(kept), **before} == resolve(kept)
    for now, name in ((30.0, "none"), (40.0, "work")):
        path.write_text(f"event_id,label\ne0,{name}\n")
        for again in (0.0, 1.0):
            import_csv(kept, path, now=now + again, **given)
        found_now = resolve(kept)["e0"]
        assert (found_now.label, found_now.time, found_now.answers) == (name, now, 1)
    path.write_text("event_id,label,time\ne2,work,5\n")
    import_csv(kept, path, now=50.0, **given)
    for name in ("none", "work", "none"):
        path.write_text(f"event_id,label,time\ne2,{name},25\n")
        assert [import_csv(kept, path, now=60.0, **given).added for _ in range(2)] == [1, 0]
        assert resolve(kept)["e2"].label == name


def test_what_was_undone_here_stays_undone(kept: Store, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("event_id,label,time\ne0,work,5\ne1,work,\n")
    import_csv(kept, path, now=6.0, source="review", annotator="ada")
    imports(kept, tmp_path / "x", task(annotation("none", 6.0), event=2))
    with kept.write() as connection:
        for row in connection.execute(select(labels)).mappings().all():
            values = {name: value for name, value in row.items() if name != "id"}
            connection.execute(labels.insert(), values | {
                "kind": "undo", "label": None, "time": 8.0, "supersedes": row["id"],
            })  # fmt: skip
    assert import_csv(kept, path, now=9.0, source="review", annotator="ada").added == 0
    assert imports(kept, tmp_path / "x", task(annotation("none", 6.0), event=2)) == (0, 1, 0)
    assert resolve(kept) == {}


def test_who_vouches_for_more_raises_an_annotation(kept: Store, tmp_path: Path) -> None:
    one = task(annotation("work", 6.0))
    for source, added in (("match", 1), ("owner", 1), ("review", 0)):
        assert imports(kept, tmp_path / "x", one, source=source)[0] == added
    found = resolve(kept)["e0"]
    assert (found.source, found.time, found.answers) == ("owner", 6.0, 1)


@pytest.mark.parametrize("seed", range(12))
def test_any_history_of_imports_exports_and_edits(kept: Store, tmp_path: Path, seed: int) -> None:
    """Each import twice: the second adds nothing; the store ends as the tool does; our own exports change nothing."""
    rng, clock = random.Random(seed), itertools.count(100)
    shown: dict[tuple[int, int], dict[str, Any]] = {}
    exports: list[list[dict[str, Any]]] = []
    for _ in range(25):
        now = float(next(clock))
        key = (rng.randrange(3), rng.randrange(2))
        if rng.random() < 0.15:
            shown.pop(key, None)
        else:
            shown[key] = annotation(rng.choice(CLASSES), now, number=key[0] * 2 + key[1], by=key[1])
        tasks = [
            task(*(shown[at] for at in sorted(shown) if at[0] == index), event=index, updated_at=iso(now))
            for index in range(3)
        ]
        if rng.random() < 0.5:
            continue
        exports.append(json.loads(json.dumps(tasks)))
        imports(kept, tmp_path / "x", *exports[-1], now=1e6)
        rows, held = count(kept), resolve(kept)
        answers = {(one.event_id, one.annotator): one.label for one in read_labels(kept)}
        assert answers == {
            (f"e{event}", str(by)): one["result"][0]["value"]["choices"][0] for (event, by), one in shown.items()
        }
        export_csv(kept, tmp_path / "own.csv")
        export_label_studio(kept, tmp_path / "own.json")
        for again in (exports[-1], rng.choice(exports)):
            imports(kept, tmp_path / "x", *again, now=2e6)
        import_csv(kept, tmp_path / "own.csv", now=3e6)
        import_label_studio(kept, tmp_path / "own.json", now=3e6)
        assert count(kept) == rows and resolve(kept) == held
        for earlier in range(100, int(now)):
            assert all(one.time < earlier for one in resolve(kept, until=earlier).values())
