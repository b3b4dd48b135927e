"""continual simulate: thirty days of the loop on real photos, on a simulated clock.

Every decision is the loop's own: served bundles, events, the review plan, the threshold controller, triggers,
proposals (``mgrpo``), certificates, the guard's vault, the promotion test, shadow and canary, aliases and the audit.
Simulated are the clock, the order of photos, the change of photos once the world shifts, and the reviewer, who knows
the folder's labels and answers late and within a budget.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from stage1_pro.continual.learn.rewards import NOBODY, Actions, RewardSpec, earned, verified
from stage1_pro.continual.ledger import audit as chain
from stage1_pro.continual.ledger.labels import Label, add_labels, ingest, read_events
from stage1_pro.continual.loop.folder import init, opened
from stage1_pro.continual.loop.machine import Loop, read_verdict
from stage1_pro.continual.loop.registry import Registry
from stage1_pro.continual.loop.world import World
from stage1_pro.continual.serving.events import EventLog
from stage1_pro.continual.serving.live import LiveCascade, tightened
from stage1_pro.data.splits import Splits
from stage1_pro.deploy.cascade import Cascade
from stage1_pro.errors import InputError
from stage1_pro.files import sha256_bytes, uniform, write_bytes
from stage1_pro.progress import say
from stage1_pro.studies.simulated import LEAST_PER_DAY, Alarm, Check, Day, RoundResult, Simulation, SimulationConfig

if TYPE_CHECKING:
    from stage1_pro.commands.simulate import Simulate

DAY = 86400.0
# The simulated clock begins here: 1 January 2026, UTC.
START = 1_767_225_600.0
RECORD = "simulation.json"
SLACK = 1.3
# Options of the proposals that every round makes; val_select chooses among them.
PROPOSALS: tuple[dict[str, Any], ...] = ({"lr": 1e-3}, {"lr": 1e-4})
REAL = (
    "bundles served by LiveCascade, which follows champion.json",
    "events with logged propensities, the review plan's draws, labels in the store",
    "threshold controller and triggers (watch), certificates (ltt)",
    "proposals by mgrpo: new rows, replayed features, KL to anchor and champion",
    "guard vault and its looks, promotion gate, shadow, canary, registry, hash-chained audit",
)
SIMULATED = (
    "the clock: every time is passed in",
    "the stream: photos of the folder in a drawn order, changed by the validator's protocol from the shift on",
    "the reviewer: the folder's labels, late by half to one and a half of the delay, so many a day, oldest first",
    "latency: the gate does not time candidates here, so that a run can be repeated",
    "approval by hand: a verdict that promotes is enough (auto_promote)",
)
LIMITS = (
    "the unit is the photo: near-copies of a place lie in the past and in the stream; nothing here is of new places",
    "one world and one shift a run: checks are single outcomes, not rates",
    "what learns are the heads of both stages, on a backbone that stays",
    "where more photos are served than there are, they come again, and those that taught may be among those that judge",
)


def simulate(asked: Simulate) -> Simulation:
    """What ``commands.simulate.simulate`` does.

    It writes ``OUT/run`` (unless ``run`` is given), ``OUT/loop`` (the loop's folder), ``simulation.json`` and figures.
    """
    data, out = asked.data, asked.out
    config = SimulationConfig(**asked.model_dump(include=set(SimulationConfig.model_fields)))
    if (out / "loop").exists() or (out / RECORD).exists():
        raise InputError(f"out must be a new folder, got {out}, where something was simulated")
    if data.is_dir() and (data / "labels.csv").is_file():
        data = data / "labels.csv"
    world = World(
        data, columns=asked.columns, positive=asked.positive, past_share=config.past_share, judged=config.judged,
        protocol=config.protocol, level=config.level, seed=config.seed,
    )  # fmt: skip
    if config.per_day == 0:
        config = config.model_copy(update={"per_day": len(world.stream) // config.days})
    if config.per_day < LEAST_PER_DAY:
        raise InputError(
            f"data must have {LEAST_PER_DAY} photos a day for the stream, got {len(world.stream)} for {config.days} "
            "days; name --per-day, and photos come again"
        )
    trained = _train(world, out / "run", config, asked.backbone, asked.image_size) if asked.run is None else asked.run
    if Splits.read(trained / "splits.json").hashes != world.past.hashes:
        raise InputError(f"run must be of the same photos and seed, got {trained}; leave it out to train one")
    root = out / "loop"
    first = init(
        root, trained, alpha=config.alpha, store=asked.store, config=_loop_config(config), by="simulation", now=START
    )["champion"]  # fmt: skip
    with opened(root) as (_, registry, parts, loop):
        days, alarms = _live_through(world, config, registry, parts.log, loop, first)
        rounds = _rounds(world, config, registry)
        held = chain.verify(registry.store)
        checks = _checks(config, registry, days, alarms, rounds)
    found = Simulation(
        config=config, real=list(REAL), simulated=list(SIMULATED), limits=list(LIMITS),
        past={split: sum(counts.values()) for split, counts in world.past.counts.items()}, stream=len(world.stream),
        first_champion=first, days=days, alarms=alarms, rounds=rounds, checks=checks, audit_rows=held.rows,
        audit_whole=held.ok,
    )  # fmt: skip
    for name, png in _figures(found).items():
        write_bytes(out / f"{name}.png", png)
    found.write(out / RECORD)
    say(f"wrote {out / RECORD}")
    return found


# -------------------------------------------------------------------------------- before the first day


def _train(world: World, run: Path, config: SimulationConfig, backbone: str, image_size: int | None) -> Path:
    """The first champion's run: trained on the past, certified, exported."""
    from stage1_pro.commands.calibrate import Calibrate
    from stage1_pro.config import build_config
    from stage1_pro.deploy.exporting import export
    from stage1_pro.training.calibration import calibrate
    from stage1_pro.training.loop import train

    if run.exists():
        raise InputError(f"out must be a new folder, got one with {run}; name it with --run to use it again")
    run.mkdir(parents=True)
    world.past.write(run / "splits.json")
    frozen = Path(backbone).is_dir()
    epochs = config.epochs or (200 if frozen else 30)
    train(
        run,
        build_config({
            "seed": config.seed,
            "model": {"backbone": backbone, "image_size": image_size},
            "augment": {"horizontal_flip": 0.0},
            "train": {"mode": "linear" if frozen else "full", "epochs": epochs, "workers": 0},
        }),
    )  # fmt: skip
    calibrate(
        Calibrate.of(
            run=run, policy="gate", guarantee="ltt", max_exit_error=config.alpha, min_coverage=config.min_coverage
        )
    )
    export(run, target="onnx")
    return run


def _loop_config(config: SimulationConfig) -> dict[str, Any]:
    """Limits that fit so many photos a day."""
    day = config.per_day
    return {
        "loop": {
            "auto_promote": True, "executor": {"kind": "inline"}, "shadow_seconds": DAY / 2, "shadow_pairs": day // 4,
            "canary_seconds": DAY, "canary_pairs": day, "canary_share": 0.2, "hold_seconds": DAY / 4,
        },
        "rounds": {
            "monitor": {
                "alpha": config.alpha, "floor": config.audit_rate, "recent": 5 * day,
                "triggers": {
                    "min_labels": config.min_labels, "cooldown": 2 * DAY, "max_age": 365 * DAY,
                    "audit_rate": config.audit_rate, "raised_audit_rate": max(config.audit_rate, 0.3),
                },
            },
            "plan": {"floor": config.audit_rate, "deferral": 0.5, "novelty": 0.0, "seed": config.seed},
            "least_rows": 30,
            "least_certify": config.least_certify,
            "least_guard": config.least_certify // 2,
            "guard_share": 0.3,
            "certify_share": 0.4,
            "select_share": 0.4,
            # Wide, as the anchor is small: narrow ones rule nothing out on it.
            "terms": {"margin": 0.15, "fnr_margin": 0.1},
            # A measured time would differ from run to run, and so would the verdict's name.
            "largest_slowdown": None,
            "mgrpo": [{"seed": config.seed, **one} for one in PROPOSALS],
        },
    }  # fmt: skip


# -------------------------------------------------------------------------------- the days


@dataclass
class _Reviewer:
    """Knows every label, answers late, and only so many a day."""

    registry: Registry
    log: EventLog
    config: SimulationConfig
    waiting: dict[str, tuple[float, str]] = field(default_factory=dict)
    spent: int = 0

    def see(self, images: Sequence[tuple[bytes, str]], since: float) -> None:
        """Take note of what was drawn for review since then; a photo's bytes tell its label."""
        truth = {sha256_bytes(image): label for image, label in images}
        ingest(self.registry.store, self.log)
        for event in read_events(self.registry.store, since=since):
            if event.selected:
                late = (0.5 + uniform(self.config.seed, "delay", event.id)) * self.config.delay_days * DAY
                self.waiting[event.id] = (event.time + late, truth[event.image_sha256])

    def answer(self, now: float) -> int:
        """Answer what is due, oldest first, as far as today's budget goes; how many."""
        due = sorted((at, one) for one, (at, _) in self.waiting.items() if at <= now)[: self.config.budget - self.spent]
        given = [
            Label(event_id=one, label=self.waiting.pop(one)[1], source="review", annotator="simulated", time=now)
            for _, one in due
        ]
        add_labels(self.registry.store, given)
        self.spent += len(given)
        return len(given)


def _live_through(
    world: World, config: SimulationConfig, registry: Registry, log: EventLog, loop: Loop, first: str
) -> tuple[list[Day], list[Alarm]]:
    """Serve, review, and let the loop take its steps, day after day."""
    live = LiveCascade(registry.root, threads=1, log=log, writer=f"simulation/{config.seed}")
    static = Cascade.load(registry.load(first), threads=1)
    reviewer = _Reviewer(registry, log, config)
    days: list[Day] = []
    alarms: list[Alarm] = []
    parts = np.array_split(np.arange(config.per_day), config.looks_per_day)
    for day in range(config.days):
        shifted = day >= config.shift_day
        reviewer.spent = 0
        count = dict.fromkeys(("exits", "wrong_exits", "wrong", "static_exits", "static_wrong_exits", "answered"), 0)
        for place, part in enumerate(parts):
            now = START + (day + (place + 0.5) / len(parts)) * DAY
            drawn = [world.photo(day * config.per_day + int(number), shifted=shifted) for number in part]
            images, truth = [image for image, _ in drawn], np.array([label for _, label in drawn])
            served, plain = live.predict(images, now=now), static.predict(images)
            for name, one in (("", served), ("static_", plain)):
                count[f"{name}exits"] += int(one.exited.sum())
                count[f"{name}wrong_exits"] += int((one.exited & (one.label != truth)).sum())
            count["wrong"] += int((served.accepted & (served.label != truth)).sum())
            reviewer.see(drawn, now)
            later = now + 0.4 / len(parts) * DAY
            count["answered"] += reviewer.answer(later)
            before = live.refresh().threshold
            loop.run(now=later)
            _note_alarm(alarms, loop, before, live.refresh().threshold, later)
        pointer = live.refresh()
        policy = registry.load(pointer.champion).policy
        days.append(
            Day(
                day=day, shifted=shifted, served=config.per_day, **count, waiting=len(reviewer.waiting),
                threshold=tightened(policy, pointer.threshold).exit_threshold, certified=policy.exit_threshold,
                champion=pointer.champion,
            )
        )  # fmt: skip
        say(f"day {day}: {count['exits']} exits, {count['wrong_exits']} wrong; {loop.row().state}")
    return days, alarms


def _note_alarm(alarms: list[Alarm], loop: Loop, before: float | None, after: float | None, now: float) -> None:
    """Note an alarm of the e-process or the controller once, with what the threshold did in that step."""
    at = loop.row().memory.get("alarm_at")
    if at is None or any(one.at == at for one in alarms):
        return
    certified = loop.registry.load(loop.registry.alias("champion").bundle or "").policy.exit_threshold
    low, high = (max(value or 0.0, certified) for value in (before, after))
    alarms.append(Alarm(day=_day(now), at=at, before=low, after=high))


def _day(time: float) -> float:
    return round((time - START) / DAY, 4)


# -------------------------------------------------------------------------------- afterwards


def _rounds(world: World, config: SimulationConfig, registry: Registry) -> list[RoundResult]:
    """The rounds as the audit tells them, and what promotions were worth on photos that nobody has seen."""
    edges, thresholds = list[tuple[float, dict[str, Any]]](), list[tuple[float, str, float]]()
    for row in chain.read(registry.store):
        body = json.loads(row.body)
        if row.kind == "threshold" and body["threshold"] is not None:
            thresholds.append((row.time, body["bundle"], body["threshold"]))
        elif row.kind == "edge":
            edges.append((row.time, body))
            if body["from"] == "MONITOR" and body.get("threshold") is not None:
                thresholds.append((row.time, body["round"]["champion"], body["threshold"]))
    found = []
    for number in sorted({body["round"]["number"] for _, body in edges}):
        mine = [(time, body) for time, body in edges if body["round"]["number"] == number]
        last = mine[-1][1]["round"]
        moves = {(body["from"], body["to"]): time for time, body in mine}
        outcome: Literal["promoted", "held", "rolled back", "open"] = "open"
        ended = None
        for (before, after), time in moves.items():
            if (before, after) == ("CHAMPION", "MONITOR"):
                outcome, ended = "promoted", time
            elif after in ("HOLD", "ROLLBACK"):
                outcome, ended = "held" if after == "HOLD" else "rolled back", time
        note = next((body["why"] for _, body in mine if body["to"] in ("HOLD", "ROLLBACK")), mine[-1][1]["why"])
        gains: tuple[float | None, float | None] = (None, None)
        if outcome == "promoted":
            assert ended is not None
            old = last["champion"]
            stricter = [value for time, bundle, value in thresholds if bundle == old and time <= ended]
            shifted = _day(ended) >= config.shift_day
            gains = _gains(world, config, registry, old, last["candidate"], stricter[-1:], shifted=shifted)
        verdict = last["verdict"]
        found.append(
            RoundResult(
                number=number, began=_day(mine[0][0]), reasons=mine[0][1]["round"]["reasons"], outcome=outcome,
                ended=None if ended is None else _day(ended), note=note, candidate=last["candidate"], verdict=verdict,
                gate=None if verdict is None else read_verdict(registry.root, verdict).promoted,
                gain=gains[0], gain_as_served=gains[1],
            )
        )  # fmt: skip
    return found


def _gains(
    world: World, config: SimulationConfig, registry: Registry, old: str, new: str, stricter: Sequence[float], *,
    shifted: bool,
) -> tuple[float, float]:  # fmt: skip
    """Mean reward of a new champion over the old one, which is at its certificate's threshold, and as it was served."""
    judged = [world.photo(number, shifted=shifted, judged=True) for number in range(config.judged)]
    images = [image for image, _ in judged]
    classes = tuple(world.past.classes)
    truth = verified(
        np.array([classes.index(label) for _, label in judged], dtype=np.int64), "owner",
        classes=classes, positive=world.past.positive,
    )  # fmt: skip

    def worth(bundle: str, threshold: float | None) -> float:
        loaded = registry.load(bundle)
        cascade = Cascade.load(replace(loaded, policy=tightened(loaded.policy, threshold)), threads=1)
        said = cascade.predict(images)
        answers = np.array([classes.index(name) if name else NOBODY for name in said.label.tolist()], dtype=np.int64)
        return float(earned(RewardSpec(), truth, Actions(answers, ~said.exited)).mean())

    after, before = worth(new, None), worth(old, None)
    served = worth(old, stricter[-1]) if stricter else before
    return after - before, after - served


def _checks(
    config: SimulationConfig, registry: Registry, days: Sequence[Day], alarms: Sequence[Alarm],
    rounds: Sequence[RoundResult],
) -> list[Check]:  # fmt: skip
    """What was to be shown."""
    checks: list[Check] = []

    def note(name: str, passed: bool, value: float | None, limit: float | None, text: str) -> None:
        checks.append(Check(name=name, passed=passed, value=value, limit=limit, note=text))

    shift = config.shift_day
    early = sum(one.day < shift for one in alarms)
    first = next((one for one in alarms if one.day >= shift), None)
    delay, before, after = (None,) * 3 if first is None else (first.day - shift, first.before, first.after)
    text = "days from the shift to the first alarm, labels' delay included"
    note("alarm after the shift", delay is not None, delay, None, text)
    note("no alarm before it", early == 0, early, 0, "alarms")
    text = "threshold after and before the step that saw the first alarm"
    note("safe threshold at once", first is not None and first.after > first.before, after, before, text)
    own = {name: registry.load(name).policy.exit_threshold for name in registry.bundles()}
    low = sum(event.threshold < own[event.bundle] for event in read_events(registry.store))
    text = "decisions at a threshold below their bundle's certified one"
    note("never past the certificate", low == 0, low, 0, text)
    if first is not None:
        later = [one for one in days if one.day > first.day]
        checks.append(_risk("risk from the alarm on", config, later))
        checks.append(_risk("risk without the loop", config, later, static=True))
    promoted = [one for one in rounds if one.outcome == "promoted"]
    since = next((one.ended for one in promoted if one.ended is not None and one.ended >= shift), None)
    delay = None if since is None else since - shift
    note("promotion after the shift", since is not None, delay, None, "days from the shift to the promotion")
    if since is not None:
        checks.append(_risk("risk after the promotion", config, [one for one in days if one.day > since]))
    worst = min((one.gain for one in promoted if one.gain is not None), default=None)
    text = f"least gain in mean reward of {len(promoted)} promotions, on {config.judged} photos never served"
    note("no harmful promotion", worst is None or worst >= 0, worst, 0.0, text)
    served = min((one.gain_as_served for one in promoted if one.gain_as_served is not None), default=None)
    text = "the same, the champion before at the threshold it had been tightened to"
    note("nor beside what was served", served is None or served >= 0, served, 0.0, text)
    return checks


def _risk(name: str, config: SimulationConfig, days: Sequence[Day], *, static: bool = False) -> Check:
    exits = sum(one.static_exits if static else one.exits for one in days)
    wrong = sum(one.static_wrong_exits if static else one.wrong_exits for one in days)
    value = wrong / exits if exits else None
    limit = SLACK * config.alpha
    # Without the loop the risk is to be seen above the limit, or there was nothing to guard against.
    passed = value is not None and (value > limit if static else value <= limit)
    whose = "the first champion at its own threshold" if static else "served"
    return Check(
        name=name, passed=passed, value=value, limit=limit,
        note=f"{wrong} wrong of {exits} exits, {whose}, {len(days)} whole days; "
        + ("to be above the limit" if static else f"limit {SLACK:g} alpha"),
    )  # fmt: skip


def _figures(found: Simulation) -> dict[str, bytes]:
    """Risk, coverage and threshold of every day, with alarms and promotions."""
    from stage1_pro.metrics.figures import timeline_png

    days, config = found.days, found.config
    marks = {
        "alarm": [one.day for one in found.alarms],
        "shift": [float(config.shift_day)],
        "promotion": [one.ended for one in found.rounds if one.outcome == "promoted" and one.ended is not None],
    }

    def daily(name: str) -> NDArray[np.float64]:
        return np.array([getattr(one, name) for one in days], dtype=np.float64)

    x, exits, static, served = daily("day") + 0.5, daily("exits"), daily("static_exits"), daily("served")
    with np.errstate(invalid="ignore"):
        risk = {"with the loop": daily("wrong_exits") / exits, "without": daily("static_wrong_exits") / static}
    coverage = {"with the loop": exits / served, "without": static / served}
    threshold = {"in force": np.minimum(daily("threshold"), 1.0), "certified": daily("certified")}
    limits = {"alpha": config.alpha, f"{SLACK:g} alpha": SLACK * config.alpha}
    return {
        "risk": timeline_png(x, risk, y="share of exits that are wrong", limits=limits, marks=marks),
        "coverage": timeline_png(x, coverage, y="share of photos that exit", marks=marks),
        "threshold": timeline_png(x, threshold, y="threshold", marks=marks, steps=True, percent=False),
    }
