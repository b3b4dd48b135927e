"""How fast decisions are logged, ingested and lent for review, on SQLite and, where its programs are, PostgreSQL.

    python benchmarks/continual_store.py [--events 20000] [--postgres URL]

Every figure is the median of --rounds rounds on fresh folders or emptied databases; SQLite syncs every transaction.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sqlalchemy import text

from stage1_pro.continual.ledger.labels import add_events, ingest, resolve
from stage1_pro.continual.ledger.review import ReviewQueue
from stage1_pro.continual.ledger.store import Store
from stage1_pro.continual.serving.events import BundleFacts, Event, EventLog
from stage1_pro.files import sha256_bytes

BUNDLE = "a" * 64


def make_events(count: int) -> list[Event]:
    rng = np.random.default_rng(0)
    sketches = rng.normal(size=(count, 64)).astype(np.float32)
    probs = rng.random(count)
    return [
        Event(
            id=f"{i:032x}", time=1e9 + i, bundle=BUNDLE, image_sha256=sha256_bytes(b"image"), action="exit", stage="A",
            label="none", prob_a=probs[i], prob_b=None, confidence=max(probs[i], 1 - probs[i]), gate_logit=0.5,
            exit_score=max(probs[i], 1 - probs[i]), threshold=0.5, propensity=0.02, selected=i % 50 == 0,
            sketch=sketches[i],
        )
        for i in range(count)
    ]  # fmt: skip


def rate(count: int, work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return count / (time.perf_counter() - start)


def append_in_batches(log: EventLog, events: list[Event], size: int) -> None:
    for start in range(0, len(events), size):
        log.append(events[start : start + size])
    log.close()


def review_all(store: Store, log: EventLog, count: int) -> None:
    queue = ReviewQueue(store, log.images)
    for _ in range(count):
        item = queue.take("ada", 1e9)
        assert item is not None
        queue.answer(item.event_id, "none", "ada", 1e9)


def measure(url: str | None, events: list[Event], figures: dict[str, list[float]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = EventLog(Path(folder) / "log")
        log.describe(BundleFacts(bundle=BUNDLE, classes=("none", "roadwork"), positive="roadwork"))
        log.images.put(events[0].image_sha256, b"image", 1e9)
        done = {"log append, 32 a batch": rate(len(events), lambda: append_in_batches(log, events, 32))}
        store = Store(url or folder)
        done["ingest from the log"] = rate(len(events), lambda: ingest(store, log, double_share=0))
        done["take and answer"] = rate(100, lambda: review_all(store, log, 100))
        done["resolve 100 labels, per second"] = rate(1, lambda: resolve(store))
        if url:
            with store.write() as connection:
                names = "events, labels, leases, log_positions, served_bundles"
                connection.execute(text("SET session_replication_role = replica"))
                connection.execute(text(f"DROP TABLE {names} CASCADE"))
        store.close()
        store = Store(url or Path(folder) / "bare.db")
        for size in (32, 1000, 5000):
            rows = events if size > 32 else events[: len(events) // 5]
            parts = [
                [one.model_copy(update={"id": f"{size}-{one.id}"}) for one in rows[start : start + size]]
                for start in range(0, len(rows), size)
            ]
            done[f"insert, {size} a transaction"] = rate(len(rows), lambda p=parts: [add_events(store, x) for x in p])
        if url:
            with store.write() as connection:
                connection.execute(text(f"DROP TABLE {names} CASCADE"))
        store.close()
    for name, value in done.items():
        figures.setdefault(name, []).append(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--postgres", help="URL of an empty database that may be written to and emptied")
    options = parser.parse_args()
    events = make_events(options.events)
    for name, url in (("SQLite", None), ("PostgreSQL", options.postgres)):
        if name == "PostgreSQL" and url is None:
            print("PostgreSQL: not run, no --postgres URL")
            continue
        figures: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            measure(url, events, figures)
        for what, values in figures.items():
            low, high = min(values), max(values)
            print(f"{name:<11} {what:<32} {statistics.median(values):>9,.0f}/s   ({low:,.0f} to {high:,.0f})")


if __name__ == "__main__":
    main()
