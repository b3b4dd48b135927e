"""How fast decisions are logged, ingested and lent for review, on SQLite and, where its programs are, PostgreSQL.

    python benchmarks/continual_store.py [--events 20000] [--postgres URL]
    python benchmarks/continual_store.py look [--sizes 10000 100000 1000000] [--postgres URL]

Every figure is the median of --rounds rounds on fresh folders or emptied databases; SQLite syncs every transaction.

look: CPU seconds, within one process, of the first look at so many events, of a look with nothing new, of a look after
100 more events and 5 labels, of `status` and of its page, and of what `propose` does up to its training. About 6% of
the events are selected for review, 7 in 10 of those are labelled. Then what `compact --keep 30d` leaves.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sqlalchemy import text

from stage1_pro.continual.ledger.labels import Label, add_events, add_labels, ingest, resolve
from stage1_pro.continual.ledger.review import ReviewQueue
from stage1_pro.continual.ledger.store import Store
from stage1_pro.continual.serving.events import BundleFacts, Event, EventLog, ReviewPlan
from stage1_pro.files import sha256_bytes

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

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


class Stream:
    """A street camera's decisions: ten seconds apart, exits and deferrals, 4 in 100 wrong, reviewed within the hour."""

    apart = 10.0

    def __init__(self, bundle: str, start: float) -> None:
        self.bundle, self.time, self.rng, self.plan = bundle, start, np.random.default_rng(0), ReviewPlan()

    def take(self, count: int) -> tuple[list[Event], list[Label]]:
        rng, classes = self.rng, ("none", "roadwork")
        score, sketches = rng.beta(8, 1.5, count), rng.normal(size=(count, 64)).astype(np.float32)
        defer, entropy = score < 0.8, rng.random(count) * 0.2
        chances = self.plan.propensity(defer, np.zeros(count, bool), rng.random(count) < 0.02, entropy)
        events, labels = [], []
        for place, (sure, chance) in enumerate(zip(score.tolist(), chances.tolist(), strict=True)):
            self.time += self.apart
            name, said = rng.bytes(16).hex(), int(rng.random() < 0.3)
            one = Event.model_construct(
                id=name, time=self.time, bundle=self.bundle, image_sha256=rng.bytes(32).hex(),
                action="defer" if defer[place] else "exit", stage="AB"[int(defer[place])], label=classes[said],
                prob_a=sure, prob_b=None, confidence=sure, gate_logit=0.5, exit_score=sure, threshold=0.8,
                propensity=chance, selected=self.plan.selects(name, chance), sketch=tuple(sketches[place].tolist()),
            )  # fmt: skip
            events.append(one)
            if one.selected and rng.random() < 0.7:
                truth = classes[said if rng.random() > 0.04 else 1 - said]
                known = self.time + 50 + 1000 * rng.random()
                labels.append(Label(event_id=name, label=truth, source="review", annotator="ada", time=known))
        return events, labels


def cpu(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def look(sizes: list[int], url: str | None, rounds: int) -> None:
    """Print CPU seconds of looks, a line a size."""
    from kit.tiny import make_model, make_run

    from stage1_pro.deploy.exporting import export

    columns = ("first look", "nothing new", "100 new", "status", "page", "propose")
    with tempfile.TemporaryDirectory() as name:
        run = make_run(Path(name) / "run", make_model())
        export(run)
        print(f"{'events':>9} {'labels':>7} " + " ".join(f"{one:>11}" for one in columns) + "   compact --keep 30d")
        for size in sizes:
            labelled, took, left = look_at(size, Path(name) / f"loop{size}", run, url, rounds)
            print(f"{size:>9,} {labelled:>7,} " + " ".join(f"{one:>11.3f}" for one in took) + f"   {left}", flush=True)


def look_at(size: int, root: Path, run: Path, url: str | None, rounds: int) -> tuple[int, list[float], str]:
    """How many labels a loop of so many events has, CPU seconds of each kind of look, and what compacting leaves."""
    from stage1_pro.continual.loop import folder
    from stage1_pro.continual.loop.compaction import compact

    begun = folder.init(root, run, alpha=0.1, by="ada", store=url, now=1.7e9)
    stream, labelled = Stream(begun["champion"], 1.7e9), 0
    with folder.opened(root) as (_, registry, parts, loop):
        store, champion, memory = registry.store, registry.alias("champion"), loop.row().memory
        parts.log.describe(BundleFacts(bundle=stream.bundle, classes=("none", "roadwork"), positive="roadwork"))
        parts.ingest()

        def serve(count: int) -> int:
            events, labels = stream.take(count)
            add_events(store, events)
            add_labels(store, labels)
            return len(labels)

        def see(new: int = 0, page: Path | None = None) -> float:
            serve(new)
            return cpu(lambda: parts.status(memory, champion, now=stream.time + 2000, page=page))

        def propose() -> None:
            for _ in loop.steps(lambda: stream.time + 3000, manual=True, until="PROPOSE"):
                pass

        def middle(work: Callable[[], float]) -> float:
            return statistics.median(work() for _ in range(rounds))

        for first in range(0, size, 20_000):
            labelled += serve(min(20_000, size - first))
        took = [
            see(), middle(see), middle(lambda: see(100)), middle(lambda: cpu(lambda: folder.status(root))),
            middle(lambda: see(page=root / "page.html")), cpu(propose),
        ]  # fmt: skip
        was = (root / "loop.db").stat().st_size if url is None else 0
        said = f"{compact(parts, keep=30 * 86400.0, now=stream.time + 4000).left:,} events left"
        if url is None:
            said += f", {was / 1e6:,.0f} -> {(root / 'loop.db').stat().st_size / 1e6:,.0f} MB"
            said += f" ({was / size:,.0f} bytes an event)"
    return labelled, took, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["rates", "look"], default="rates")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**4, 10**5, 10**6], help="of look")
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--postgres", help="URL of an empty database that may be written to and emptied")
    options = parser.parse_args()
    if options.what == "look":
        look(options.sizes, options.postgres, options.rounds)
        return
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
