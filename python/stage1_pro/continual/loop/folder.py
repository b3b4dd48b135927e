"""continual: the loop that keeps learning, from the command line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from stage1_pro.chain import verify_file
from stage1_pro.continual.ledger import audit as chain
from stage1_pro.continual.ledger.exchange import (
    export_csv,
    export_label_studio,
    export_parquet,
    import_csv,
    import_label_studio,
)
from stage1_pro.continual.ledger.labels import Source, ingest
from stage1_pro.continual.ledger.store import DATABASE, Store
from stage1_pro.continual.loop import compaction
from stage1_pro.continual.loop.config import RoundsConfig
from stage1_pro.continual.loop.executors import make_executor
from stage1_pro.continual.loop.machine import Loop, LoopConfig, read_verdict
from stage1_pro.continual.loop.registry import Registry
from stage1_pro.continual.loop.rounds import Rounds, remember_run, within
from stage1_pro.continual.serving.events import EventLog
from stage1_pro.continual.serving.live import BUNDLES, PLAN, POINTER
from stage1_pro.continual.watch.alerts import Alert
from stage1_pro.continual.watch.outbox import AlertsConfig, deliver
from stage1_pro.continual.watch.status import dashboard, write_textfile
from stage1_pro.deploy.bundle import load_bundle
from stage1_pro.errors import ArtifactError, InputError, Stage1Error, explain, printable
from stage1_pro.files import sweep, write_text
from stage1_pro.progress import say
from stage1_pro.record import Record, read_yaml

CONFIG = "loop.json"


class LoopFile(Record):
    """``loop.json`` in the loop's folder: where things are, and every limit.

    Paths in the loop's folder are relative to it, so that it can move. Those of version 1 were absolute.
    """

    format_version: Literal[1, 2] = 2
    store: str = Field(description="folder or file of SQLite, or a database's URL")
    log: str = Field(description="folder that serving logs to")
    loop: LoopConfig = LoopConfig()
    rounds: RoundsConfig
    alerts: AlertsConfig = AlertsConfig()
    metrics: str | None = Field(
        None, pattern=r"\.prom$", description="file for Prometheus' textfile collector that every look of `run` writes"
    )


def _path(root: Path, file: LoopFile, given: str) -> Path:
    """Where a path of ``loop.json`` leads."""
    return root.absolute() / given if file.format_version > 1 else Path(given)


def find_store(root: Path, file: LoopFile) -> str:
    """The store of a loop, found in its folder where that was moved.

    Raises:
        InputError: it is neither where ``loop.json`` says nor there.
    """
    if "://" in file.store:
        return file.store
    return str(_find(root, file, "store", lambda path: path.is_file() or (path / DATABASE).is_file(), root))


def find_log(root: Path, file: LoopFile) -> Path:
    """The folder that serving logs to, found in the loop's folder where that was moved; errors as ``find_store``."""
    return _find(root, file, "log", lambda path: (path / "log.json").is_file(), root / "log")


def _find(root: Path, file: LoopFile, name: str, there: Callable[[Path], bool], own: Path) -> Path:
    named = _path(root, file, getattr(file, name))
    for path in (named, own.absolute()):
        if there(path):
            return path
    raise InputError(
        f"{name} of {root / CONFIG} must be where it says, got {named}, which is not there; put it back, or write "
        "into that file where it is"
    )


@contextmanager
def opened(
    root: Path | str, *, read_only: bool = False, busy: float = 30.0
) -> Iterator[tuple[LoopFile, Registry, Rounds, Loop]]:
    """A loop that has begun, and its parts.

    With ``read_only`` nothing is written and nothing ingested; ``busy`` is how many seconds SQLite's writers wait.

    Raises:
        InputError: no loop's folder.
        ArtifactError: ``loop.json`` is damaged.
    """
    root = Path(root)
    if not (root / CONFIG).is_file():
        raise InputError(f"root must be a loop's folder, got {root}; `stage1 continual init` makes one")
    config = LoopFile.read(root / CONFIG)
    store = Store(find_store(root, config), read_only=read_only, busy=busy)
    try:
        registry = Registry(root, store)
        executor = make_executor(config.loop.executor)
        log = EventLog(find_log(root, config), read_only=read_only)
        parts = Rounds(registry, log, executor, config.rounds)
        yield config, registry, parts, Loop(registry, parts, executor, config.loop, observe=_observe)
    finally:
        store.close()


def _observe(moment: str) -> None:
    state, what = moment.split()
    if what == "begin" and state not in ("MONITOR", "HOLD"):
        say(f"{state.lower()} …")


def init(
    root: Path,
    run: Path,
    *,
    bundle: Path | None = None,
    alpha: float | None = None,
    store: str | None = None,
    log: Path | None = None,
    config: Path | Mapping[str, Any] | None = None,
    by: str,
    now: float | None = None,
) -> dict[str, Any]:
    """Begin a loop: the run's bundle is the first champion. Options are those of ``stage1 continual init``.

    Where an earlier call was killed, this one goes on with the same bundle and writes ``loop.json`` anew.

    Args:
        root: a new folder.
        run: trained and calibrated run, which proposals start from.
        bundle: of that run; ``RUN/bundle`` by default.
        alpha: error of exits that is watched; by default what the policy was asked for.
        store: ``ROOT`` (SQLite) by default.
        log: what serving writes; ``ROOT/log`` by default.
        config: YAML of what in ``loop.json`` differs from the defaults, or its keys and values.
        by: who does it.
        now: seconds since the epoch; the clock's by default.

    Raises:
        InputError: the loop has begun, alpha is in no policy, or an unknown key.
        ArtifactError: the bundle is damaged, or another run's.
    """
    if (root / CONFIG).is_file() and (root / POINTER).is_file():
        raise InputError(
            f"root must be a new folder, got {root}, where a loop has begun; `stage1 continual status` shows it"
        )
    loaded = load_bundle(run / "bundle" if bundle is None else bundle)
    policy, model = loaded.policy, loaded.manifest.provenance.model_fingerprint
    if policy.model_fingerprint != model or not (run / "splits.json").is_file():
        raise ArtifactError(f"run must be the one that {loaded.path} was exported from, got {run}")
    alpha = policy.target.watched() if alpha is None else alpha
    if alpha is None:
        raise InputError(
            f"alpha must be given, got none; the {policy.policy} policy promises nothing of the error of exits, "
            "which is what audits test: --alpha A watches it against a limit of your own"
        )
    given = dict(config) if isinstance(config, Mapping) else _read_config(config)
    if isinstance(given.get("metrics"), str):
        given["metrics"] = within(root, given["metrics"])
    where = {
        "store": store if store and "://" in store else within(root, store or root),
        "log": within(root, log or root / "log"),
    }
    file = _described(given, where, alpha)
    place, logs = file.store if "://" in file.store else _path(root, file, file.store), _path(root, file, file.log)
    kept = Store(place)
    try:
        registry = Registry(root, kept)
        for folder in (root, root / "runs", root / BUNDLES, logs):
            sweep(folder)
        EventLog(logs)
        name = registry.add(loaded.path)
        remember_run(root, name, run, model)
        file.rounds.plan.write(root / PLAN)
        again = _begun_here(root, file)
        # Before the loop's first row, so that there is no row that no command finds. Its URLs may hold secrets.
        file.write(root / CONFIG, mode=0o600)
        pointer = Loop.begin(registry, name, now=time.time() if now is None else now, by=by, again=again)
    finally:
        kept.close()
    shown = make_url(file.store).render_as_string(hide_password=True) if "://" in file.store else str(place)
    return {"root": str(root), "champion": pointer.champion, "alpha": alpha, "store": shown, "log": str(logs)}


def _begun_here(root: Path, file: LoopFile) -> bool:
    """Whether a row in the store can only be of an ``init`` of this folder that was killed, not of another loop."""
    if (root / CONFIG).is_file():
        there = LoopFile.read(root / CONFIG)
        return there.store == file.store or _path(root, there, there.store) == _path(root, file, file.store)
    # An older version wrote loop.json last.
    return (root / POINTER).is_file() or file.store == "."


def _read_config(path: Path | None) -> dict[str, Any]:
    found = {} if path is None else read_yaml(path)
    if any(not isinstance(found.get(key, {}), dict) for key in ("loop", "rounds")):
        raise InputError(f"config must hold the keys loop, rounds, alerts or metrics, got {path}")
    return found


def _described(given: dict[str, Any], where: Mapping[str, str], alpha: float) -> LoopFile:
    """``loop.json`` by what a configuration says of it."""
    rounds = dict(given.pop("rounds", {}))
    monitor = rounds.get("monitor", {})
    if not isinstance(monitor, Mapping):
        raise InputError(f"rounds.monitor must hold keys and values, got {printable(repr(monitor))}")
    rounds["monitor"] = {"alpha": alpha, **monitor}
    try:
        return LoopFile.model_validate({**where, "rounds": rounds, **given})
    except ValidationError as error:
        first = error.errors()[0]
        key = printable(".".join(map(str, first["loc"])))
        # URLs of hooks are secrets.
        got = "another value" if key.startswith("alerts") else printable(repr(first["input"]))
        raise InputError(f"{key} must be valid, got {got}: {printable(first['msg'])}") from None


def ingest_log(root: Path) -> dict[str, Any]:
    """Put what serving logged into the store."""
    with opened(root) as (_, registry, parts, _loop):
        return ingest(registry.store, parts.log).model_dump(mode="json")


def _catch_up(root: Path) -> str | None:
    """Ingest what was served and write ``champion.json``; why that cannot be, where a disk or store takes no more."""
    try:
        with opened(root, busy=2.0) as (_, registry, parts, _loop):
            parts.keep_up(registry.alias("champion"), now=time.time())
            registry.sync()
    except ArtifactError:
        raise
    except (Stage1Error, OSError, SQLAlchemyError) as error:
        if not (root / CONFIG).is_file():
            raise
        return str(explain(error))
    return None


def status(
    root: Path,
    *,
    page: Path | None = None,
    metrics: Path | None = None,
    grafana: Path | None = None,
    test_alert: bool = False,
) -> dict[str, Any]:
    """Where the loop is, what serves, and how it is doing; where nothing can be written, as far as it is known.

    Raises:
        InputError: a test alert without hooks, or another ending than .prom.
    """
    behind = _catch_up(root)
    with opened(root, read_only=True) as (config, registry, parts, loop):
        if test_alert and not config.alerts.hooks:
            raise InputError(f"alerts of {root / CONFIG} must name webhooks or commands to test, got none")
        row, now = loop.row(), time.time()
        seen = parts.status(row.memory, registry.alias("champion"), now=now, page=page)
        if metrics is not None:
            write_textfile(metrics, seen)
        if grafana is not None:
            write_text(grafana, json.dumps(dashboard(), indent=2) + "\n")
        test = Alert(time=now, kind="test", title="Test of alerts", text="Nothing happened.", bundle=seen.bundle)
        sent = [hook.send(test) for hook in config.alerts.hooks] if test_alert else []
        return {
            "deliveries": [one.model_dump(mode="json") for one in sent],
            "behind": behind,
            "state": row.state,
            "round": row.round.model_dump(mode="json"),
            "pointer": registry.pointer().model_dump(mode="json"),
            "champions": [one.model_dump(mode="json") for one in registry.history("champion")],
            "monitor": seen.model_dump(mode="json"),
            "audit": chain.verify(registry.store).model_dump(mode="json"),
        }


def labels(
    root: Path,
    *,
    imported: Path | None = None,
    exported: Path | None = None,
    columns: Mapping[str, str] | None = None,
    source: Source | None = None,
    annotator: str | None = None,
    blind: bool = True,
) -> dict[str, Any]:
    """Import labels from CSV or Label Studio's JSON, or export them as CSV, as JSON, or to a folder as Parquet.

    Raises:
        InputError: answers are to be shown (``blind`` is False) by anything but an export as JSON.
    """
    if not blind and (exported is None or exported.suffix != ".json"):
        given = f"--import {imported}" if exported is None else f"--export {exported}"
        raise InputError(f"--show-answers must come with --export to .json, got {given}; leave it out")
    if columns and (imported is None or imported.suffix == ".json"):
        raise InputError("--columns must come with --import of a CSV, got it without; leave it out")
    with opened(root) as (_, registry, parts, _loop):
        store = registry.store
        parts.ingest()
        now = time.time()
        if imported is not None:
            if imported.suffix == ".json":
                source = source or "review"
                found = import_label_studio(store, imported, now=now, source=source, annotator=annotator)
            else:
                found = import_csv(store, imported, now=now, columns=columns, source=source, annotator=annotator)
            return {"added": found.added, "known": found.known, "withdrawn": found.withdrawn}
        assert exported is not None
        if exported.suffix not in (".csv", ".json"):
            return {"wrote": str(exported), **export_parquet(store, exported)}
        write: Callable[[Store, Path], int] = export_csv
        if exported.suffix == ".json":
            write = partial(export_label_studio, blind=blind)
        return {"wrote": str(exported), "rows": write(store, exported)}


def run(root: Path, *, manual: bool = False, every: float | None = None, until: str | None = None) -> dict[str, Any]:
    """Take steps until one waits, or up to the work of state ``until``; ``manual`` asks for a round now.

    With ``every`` look again after so many seconds, for good; an error is said and tried again.
    """
    with opened(root) as (config, _registry, parts, loop):
        while True:
            try:
                _purge(parts.log)
                found = _steps(loop, manual, until, lambda: _report(root, config, parts))
            except (Stage1Error, OSError, SQLAlchemyError) as error:
                if every is None:
                    raise
                say(f"{type(error).__name__}: {error}; tried again in {every:g} s")
            else:
                if every is None:
                    return found
            manual = False
            time.sleep(every)


def _purge(log: EventLog) -> None:
    """Remove photos whose time is over, and say so; one who opens the page need not come."""
    try:
        found = log.purge(time.time())
    except OSError as error:
        say(f"photos not purged: {error}; tried again at the next look")
        return
    if found.removed or found.in_doubt:
        say(str(found))


def _report(root: Path, config: LoopFile, parts: Rounds) -> None:
    """Tell hooks and Prometheus what the last look saw; what fails is said, and stops nothing."""
    for one in deliver(parts.store, config.alerts.hooks, now=time.time()):
        if not one.delivered:
            say(f"alert not delivered by {one.hook}: {one.reason}; tried again at the next look")
    if config.metrics is not None and parts.seen is not None:
        try:
            write_textfile(_path(root, config, config.metrics), parts.seen)
        except (Stage1Error, OSError) as error:
            say(f"metrics not written: {error}")


def _steps(loop: Loop, manual: bool, until: str | None, report: Callable[[], None]) -> dict[str, Any]:
    taken, note = [], ""
    for state, step in loop.steps(time.time, manual=manual, until=until):
        # Before the next state's work, which may take hours.
        report()
        note = step.note
        if step.moved:
            taken.append({"from": state, "to": step.row.state, "why": note})
            say(f"{state} -> {step.row.state}: {note}")
    row = loop.row()
    return {"state": row.state, "steps": taken, "note": note, "round": row.round.model_dump(mode="json")}


def evaluate(root: Path) -> dict[str, Any]:
    """Judge the candidate where one waits for it, and give the last verdict.

    Raises:
        InputError: there is neither a candidate nor a verdict.
    """
    with opened(root) as (_, _registry, _parts, loop):
        row = loop.resume()
        if row.state == "EVALUATE":
            row = loop.step(now=time.time()).row
        if row.round.verdict is None:
            raise InputError(
                f"there must be a candidate or a verdict, got state {row.state}; `stage1 continual propose`"
            )
        return {"state": row.state, "verdict": read_verdict(root, row.round.verdict).model_dump(mode="json")}


def promote(root: Path, *, candidate: str | None = None, by: str) -> dict[str, Any]:
    """Approve the candidate in the shadow."""
    with opened(root) as (_, _registry, _parts, loop):
        row = loop.approve(now=time.time(), by=by, candidate=candidate)
        return {"state": row.state, **row.round.model_dump(include={"candidate", "approved_by", "verdict"})}


def rollback(root: Path, *, to: str | None = None, by: str) -> dict[str, Any]:
    """Bring the champion before this one back, at once; whoever serves follows with the next batch."""
    with opened(root) as (_, _registry, _parts, loop):
        pointer = loop.rollback(now=time.time(), by=by, to=to)
        return pointer.model_dump(mode="json")


def compact(root: Path, *, keep: float = 90.0, dry_run: bool = False) -> dict[str, Any]:
    """Remove what the loop no longer needs; events of the last ``keep`` days all stay."""
    with opened(root) as (_, _registry, parts, _loop):
        found = compaction.compact(parts, keep=keep * 86400.0, now=time.time(), dry_run=dry_run)
        return found.model_dump(mode="json")


def audit(
    root: Path, *, exported: Path | None = None, file: Path | None = None, head: str | None = None
) -> dict[str, Any]:
    """Verify the chain of what was done, in the store or of an exported file; export it.

    Raises:
        ArtifactError: it is not whole.
    """
    if file is not None:
        found, last = verify_file(file, head=head), []
    else:
        with opened(root, read_only=True) as (_, registry, _parts, _loop):
            found = chain.verify(registry.store, head=head)
            last = [
                {"seq": row.seq, "time": row.time, "kind": row.kind, **_brief(row.body)}
                for row in chain.read(registry.store)
            ]
            if exported is not None:
                chain.export(registry.store, exported)
    if not found.ok:
        raise ArtifactError(f"audit must be whole, got row {found.broken_at} of which: {found.reason}")
    return {**found.model_dump(mode="json"), "last": last[-10:]}


def _brief(body: str) -> dict[str, Any]:
    values = json.loads(body)
    return {key: values[key] for key in ("from", "to", "why", "by", "champion", "threshold") if key in values}


def _rolling(found: dict[str, Any]) -> str:
    figures = {"MCC of 100": found["mcc_100"], "accuracy of 10": found["accuracy_10"]}
    said = [f"{name} {value:.3f}" for name, value in figures.items() if value is not None]
    return ", ".join(said) or f"{found['n']}, too few for accuracy of 10 and MCC of 100"


def render(what: str, found: dict[str, Any]) -> str:
    """Lines for people."""
    if what == "status":
        pointer, monitor, work = found["pointer"], found["monitor"], found["round"]
        wanted = monitor["verdict"]["audit_rate"]
        lines = [
            f"{found['state']}, round {work['number']}{': ' + work['note'] if work['note'] else ''}",
            f"champion {pointer['champion'][:12]}, version {pointer['version']}",
            f"before it {(pointer['previous'] or 'none')[:12]}",
            f"exits at {monitor['threshold'] or 'its own threshold'}",
            *(f"{name} {pointer[name][:12]}" for name in ("shadow", "canary") if pointer[name]),
            f"audits at least {monitor['audit_rate']:.3g} of all decisions"
            + (f", {wanted:.3g} from the next look on" if wanted != monitor["audit_rate"] else ""),
            f"last labelled answers: {_rolling(monitor['rolling'])}",
            monitor["headline"],
            *(f"  {one}" for one in monitor["sentences"]),
            *(
                f"test alert by {one['hook']}: "
                + ("delivered" if one["delivered"] else f"NOT delivered, {one['reason']}")
                for one in found["deliveries"]
            ),
            f"audit: {found['audit']['rows']} rows, "
            + (f"whole, head {found['audit']['head'][:12]}" if found["audit"]["ok"] else found["audit"]["reason"]),
        ]
        if found["behind"]:
            lines.insert(0, f"what was served since the last look is not counted: {found['behind']}")
        return "\n".join(lines)
    if what == "evaluate":
        verdict = found["verdict"]
        lines = [f"{'promoted' if verdict['promoted'] else 'not promoted'}: {verdict['reason']}"]
        lines += [f"  {'ok  ' if one['passed'] else 'FAIL'} {one['name']} {one['note']}" for one in verdict["tests"]]
        return "\n".join([*lines, f"state {found['state']}"])
    if what == "compact":
        return compaction.render(compaction.Compacted.model_validate(found))
    if what == "audit":
        lines = [" ".join(f"{key}={value}" for key, value in one.items()) for one in found["last"]]
        return "\n".join([*lines, f"{found['rows']} rows, whole; head {found['head']}"])
    if what in ("run", "propose"):
        return f"{found['state']}: {found['note'] or found['round']['note']}"
    return "\n".join(f"{key}: {value}" for key, value in found.items())
