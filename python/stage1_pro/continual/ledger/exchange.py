"""Labels in and out: CSV, Label Studio's JSON, and Parquet of all there is."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sqlalchemy import select

from stage1_pro.continual.ledger.labels import (
    SOURCES,
    TRUST,
    Added,
    Label,
    Outside,
    Source,
    add_outside,
    events,
    label_records,
    labels,
    read_events,
    read_labels,
    resolve,
)
from stage1_pro.continual.ledger.store import Store
from stage1_pro.continual.serving.events import SKETCH_SIZE, STORED, Event
from stage1_pro.data.tables import read_table
from stage1_pro.errors import InputError, nearest, need, printable
from stage1_pro.files import atomic_path, write_csv, write_text
from stage1_pro.record import parse_json, wrong

COLUMNS = tuple(Label.model_fields)
# Some hundred thousand tasks; as objects in memory they take ten times as much as in their file.
_SIZE_LIMIT, _VALUES_LIMIT, _DEPTH_LIMIT = 2**28, 2**22, 64
_NAME_LIMIT = 200
_YEAR_10000 = 253402300800.0
# What annotations keep of the answers that they were exported from.
_EXPORTED = ("label", "source", "annotator", "time")


# --------------------------------------------------------------------------------------------
# CSV


def export_csv(store: Store, path: Path | str, *, sources: Collection[Source] = SOURCES) -> int:
    """Write every answer that stands as ``event_id,label,source,annotator,time``, atomically; give how many."""
    rows = [dict(one) for one in read_labels(store, sources=sources)]
    write_csv(path, rows, COLUMNS)
    return len(rows)


def import_csv(
    store: Store,
    path: Path | str,
    *,
    now: float,
    columns: Mapping[str, str] | None = None,
    source: Source | None = None,
    annotator: str | None = None,
) -> Added:
    """Add the labels of a CSV, all or none; imported again it adds nothing, and changes no time.

    A row with a time is one answer of its annotator: with another label later it takes the first one's place. Rows
    without a time are the annotator's last word on the event.

    Args:
        store: where to.
        path: CSV with ``event_id`` and ``label``, and optional ``source``, ``annotator``, ``time`` (seconds since the
            epoch, or ISO 8601 with its offset).
        now: time of rows without one.
        columns: what the file calls its columns, where that is not so.
        source: the most that the file's labels are believed; a row may say less. None: what each row says.
        annotator: of rows without one.

    Raises:
        InputError: an unreadable file, a missing or unknown column, a bad row (named by its line), an event that the
            store does not have, or a label that is no class.
    """
    path = Path(path)
    table = read_table(path, COLUMNS, required=("event_id", "label"), columns=columns)
    for name in table.columns:
        if name and name not in COLUMNS:
            raise InputError(
                f"{path.name} must have columns of {', '.join(COLUMNS)}, got '{printable(name)}'"
                f"{nearest(name, COLUMNS)}; leave it out"
            )
    given = [
        Outside(
            _label(
                where,
                event_id=cells["event_id"],
                label=cells["label"],
                source=_believed(cells.get("source"), source),
                annotator=cells.get("annotator") or annotator,
                time=_time(where, cells.get("time") or now),
            ),
            timed=bool(cells.get("time")),
        )
        for where, cells in table
    ]
    return add_outside(store, given)


def _label(where: str, **values: Any) -> Label:
    for name, value in values.items():
        if value is None or value == "":
            hint = f"; give {name}= for rows that have none" if name in ("source", "annotator") else ""
            raise InputError(f"{where} must have a value for {name}, got none{hint}")
    if not str(values["annotator"]).isprintable() or len(str(values["annotator"])) > _NAME_LIMIT:
        raise InputError(f"{where} must name its annotator in at most {_NAME_LIMIT} printable characters, got another")
    try:
        return Label(**values)
    except ValidationError as error:
        raise InputError(f"{where}: {wrong(error)}") from None


def _believed(claimed: Any, source: Source | None) -> Any:
    """What a file says of a label's source, where that is no more than its importer vouches for."""
    known = claimed in SOURCES if isinstance(claimed, str) else False
    if not claimed or (known and source is not None and TRUST[claimed] > TRUST[source]):
        return source
    return claimed


def _time(where: str, value: Any) -> float:
    """Seconds since the epoch from a number, or from ISO 8601 with an offset."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        try:
            moment = datetime.fromisoformat(str(value))
        except ValueError:
            moment = None
        if moment is None or moment.tzinfo is None:
            raise InputError(
                f"{where}: time must be seconds since the epoch or ISO 8601 with its offset (…Z), "
                f"got '{printable(str(value))}'"
            ) from None
        found = moment.timestamp()
    if not 0 <= found < _YEAR_10000:
        raise InputError(f"{where}: time must be finite, from 1970 to the year 9999, got '{printable(str(value))}'")
    return found


# --------------------------------------------------------------------------------------------
# Label Studio


def export_label_studio(
    store: Store,
    path: Path | str,
    *,
    image: Callable[[Event], str] | None = None,
    sources: Collection[Source] = SOURCES,
    blind: bool = True,
) -> int:
    """Write events selected for review as Label Studio tasks, with their labels; give how many.

    Args:
        store: where from.
        path: JSON to write, atomically.
        image: gives the URL under which Label Studio finds an event's image; its sha256 under local files otherwise.
        sources: labels of these are written as annotations.
        blind: without what the cascade said and did, so that it sways nobody; False: with it, as predictions.
    """
    given: dict[str, list[Label]] = {}
    for one in read_labels(store, sources=sources):
        given.setdefault(one.event_id, []).append(one)
    url = image or (lambda one: f"/data/local-files/?d={one.image_sha256[:2]}/{one.image_sha256}")
    tasks = []
    for served in read_events(store):
        if not served.selected and served.id not in given:
            continue
        answer = [] if blind or not served.label else [{
            "model_version": served.bundle[:12], "score": served.confidence, "result": [_choice(served.label)],
        }]  # fmt: skip
        tasks.append({
            "data": {
                "image": url(served), "event_id": served.id, **({} if blind else {"action": served.action}),
            },
            "annotations": [
                {
                    "completed_by": {"email": label.annotator},
                    "created_at": datetime.fromtimestamp(label.time, UTC).isoformat(),
                    "was_cancelled": False,
                    "result": [
                        _choice(label.label, meta={name: getattr(label, name) for name in _EXPORTED}),
                    ],
                }
                for label in given.get(served.id, [])
            ],
            "predictions": answer,
        })  # fmt: skip
    write_text(path, json.dumps(tasks, indent=1) + "\n")
    return len(tasks)


def _choice(label: str, **more: Any) -> dict[str, Any]:
    return {"from_name": "label", "to_name": "image", "type": "choices", "value": {"choices": [label]}, **more}


def import_label_studio(
    store: Store, path: Path | str, *, now: float, source: Source = "review", annotator: str | None = None
) -> Added:
    """Bring labels to the state of a Label Studio export (JSON, not JSON-MIN), all or none; again, it adds nothing.

    An annotation (its project, task and id) takes the place of what it was at an earlier import, unless that is
    newer by ``updated_at``; a cancelled one, and one that a task has no more, is withdrawn. Without an id it is an
    answer of its annotator at its time, as in a CSV.

    Args:
        store: where to.
        path: a list of tasks whose ``data`` has the ``event_id`` they were exported with.
        now: time of annotations without ``updated_at`` and ``created_at``.
        source: the most that the file's labels are believed; an annotation may say less.
        annotator: of annotations without ``completed_by``.

    Raises:
        InputError: an unreadable file, one of another form, an annotation without exactly one choice, an event that
            the store does not have, or a label that is no class.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if not path.is_file() or size > _SIZE_LIMIT:
            raise InputError(f"{path.name} must be a plain file of at most {_SIZE_LIMIT} bytes, got {size}; split it")
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"labels must be a readable JSON file, got {path}: {error.strerror}") from None
    tasks = parse_json(content.removeprefix(BOM_UTF8), path.name, InputError, values=_VALUES_LIMIT, depth=_DEPTH_LIMIT)
    if not isinstance(tasks, list):
        raise InputError(f"{path.name} must be a list of tasks, got {type(tasks).__name__}; export it as JSON")
    given: list[Outside] = []
    known = _read_records(store)
    for index, task in enumerate(tasks):
        where = f"{path.name} task {index}"
        data = task.get("data") if isinstance(task, Mapping) else None
        if not isinstance(data, Mapping) or not isinstance(data.get("event_id"), str):
            raise InputError(f"{where} must have data.event_id as it was exported with, got none")
        annotations = task.get("annotations", [])
        if not isinstance(annotations, list):
            raise InputError(f"{where} must have a list of annotations, got {type(annotations).__name__}")
        for one in annotations:
            if not isinstance(one, Mapping):
                raise InputError(f"{where} must have annotations that are objects, got {type(one).__name__}")
            _check_names(where, task, one)
            record = _record(task, one)
            if not one.get("was_cancelled"):
                given.append(_annotated(where, data["event_id"], one, record, now, source, annotator))
            elif (last := known.get(data["event_id"], {}).get(record)) is not None:
                given.append(_withdrawn(where, last, record, one.get("updated_at") or now))
        given += _gone(where, task, annotations, known.get(data["event_id"], {}))
    return add_outside(store, given)


def _check_names(where: str, task: Mapping[str, Any], annotation: Mapping[str, Any]) -> None:
    names = (task.get("id"), task.get("project"), *(annotation.get(name) for name in ("id", "task", "project")))
    for name in names:
        if (
            not (name is None or type(name) is int or (isinstance(name, str) and name.isprintable()))
            or len(str(name)) > 99
        ):
            raise InputError(f"{where} must have numbers or short texts as id, project and task, got {name!r}")


def _record(task: Mapping[str, Any], annotation: Mapping[str, Any]) -> str | None:
    """What Label Studio calls an annotation; None where it has no id."""
    if annotation.get("id") is None:
        return None
    project = task.get("project", annotation.get("project"))
    return f"label-studio/{project}/{task.get('id', annotation.get('task'))}/{annotation['id']}"


def _read_records(store: Store) -> dict[str, dict[str | None, Label]]:
    """The last answer of every annotation that was imported before, by event and name."""
    joined = labels.join(label_records, label_records.c.label_id == labels.c.id)
    query = select(labels, label_records.c.record).select_from(joined).order_by(labels.c.id)
    found: dict[str, dict[str | None, Label]] = {}
    with store.read() as connection:
        for row in connection.execute(query).mappings():
            found.setdefault(row["event_id"], {})[row["record"]] = Label(**{name: row[name] for name in COLUMNS})
    return found


def _annotated(
    where: str, event_id: str, one: Mapping[str, Any], record: str | None, now: float, source: Source,
    annotator: str | None,
) -> Outside:  # fmt: skip
    """An annotation's answer; what it was exported from, or imported as by its ``created_at``, is the earlier one."""
    label, meta = _chosen(where, one.get("result"))
    # A number, or an object with an email and an id.
    by = one.get("completed_by")
    by = by.get("email") or by.get("id") if isinstance(by, Mapping) else by
    created = one.get("created_at")
    # Text times are rounded to microseconds; ours came with the number.
    time = (None if record else meta.get("time")) or one.get("updated_at") or created
    values = {"event_id": event_id, "label": label, "source": _believed(meta.get("source"), source)}
    new = _label(
        where, **values, annotator=(None if by is None else str(by)) or annotator, time=_time(where, time or now)
    )
    earlier = None
    if record and (meta.get("time") or created):
        who = meta.get("annotator") if isinstance(meta.get("annotator"), str) else new.annotator
        earlier = _label(where, **values, annotator=who, time=_time(where, meta.get("time") or created))
    unchanged = earlier is not None and meta.get("label") == label
    return Outside(new, record, bool(time), earlier, unchanged)


def _withdrawn(where: str, last: Label, record: str | None, time: Any) -> Outside:
    return Outside(last.model_copy(update={"time": _time(where, time)}), record, withdrawn=True)


def _gone(
    where: str, task: Mapping[str, Any], annotations: list[Any], known: Mapping[str | None, Label]
) -> list[Outside]:
    """Annotations that a task had at an earlier import and has no more; a task that tells no time tells nothing."""
    total, given = task.get("total_annotations"), sum(not one.get("was_cancelled") for one in annotations)
    whole = "annotations" in task and not (isinstance(total, int) and total > given)
    if task.get("id") is None or not task.get("updated_at") or not whole:
        return []
    mine, there = str(_record(task, {"id": ""})), {_record(task, one) for one in annotations}
    return [
        _withdrawn(where, last, record, task["updated_at"])
        for record, last in known.items()
        if str(record).startswith(mine) and record not in there
    ]


def _chosen(where: str, result: Any) -> tuple[str, Mapping[str, Any]]:
    """The one choice of an annotation, and what this package added to it."""
    found: list[tuple[Any, Mapping[str, Any]]] = []
    for one in result if isinstance(result, list) else []:
        if isinstance(one, Mapping) and one.get("type") == "choices":
            value = one.get("value")
            choices = value.get("choices") if isinstance(value, Mapping) else None
            meta = one.get("meta")
            kept = meta if isinstance(meta, Mapping) else {}
            found += [(name, kept) for name in (choices if isinstance(choices, list) else [])]
    if len(found) != 1 or not isinstance(found[0][0], str):
        got = printable(", ".join(str(name) for name, _ in found)) or "none"
        raise InputError(f"{where} must have exactly one choice in each annotation, got {got}; answer it or cancel it")
    return found[0]


# --------------------------------------------------------------------------------------------
# Parquet


def export_parquet(store: Store, folder: Path | str) -> dict[str, int]:
    """Write ``events.parquet`` and ``labels.parquet``, each atomically; give the number of rows of each.

    Events have the label that holds with its source and trust (null where nobody answered). Labels are the table as it
    is: answers, skips and undos, and what superseded what.

    Raises:
        DependencyError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise need("continual", error.name or "pyarrow") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held = resolve(store)
    kinds = {"sketch": pa.list_(pa.float32(), SKETCH_SIZE), "selected": pa.bool_(), "held_trust": pa.int32(),
             "answers": pa.int32()}  # fmt: skip
    kinds |= {column.name: pa.float64() for column in events.columns if column.type.python_type is float}
    names = [*STORED, "held_label", "held_source", "held_trust", "answers"]
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in names])
    counts = {"events": 0, "labels": 0}
    with atomic_path(folder / "events.parquet") as path, pq.ParquetWriter(path, schema) as writer:
        part: list[dict[str, Any]] = []
        for one in read_events(store):
            label = held.get(one.id)
            part.append({
                **one.model_dump(include=set(STORED)),
                "held_label": label and label.label, "held_source": label and label.source,
                "held_trust": label and label.trust, "answers": label.answers if label else 0,
            })  # fmt: skip
            counts["events"] += 1
            if len(part) == 10_000:
                writer.write_table(pa.Table.from_pylist(part, schema))
                part = []
        writer.write_table(pa.Table.from_pylist(part, schema))
    with store.read() as connection:
        rows = [dict(row) for row in connection.execute(select(labels).order_by(labels.c.id)).mappings()]
    kinds = {"id": pa.int64(), "trust": pa.int32(), "time": pa.float64(), "supersedes": pa.int64()}
    form = pa.schema([(column.name, kinds.get(column.name, pa.string())) for column in labels.columns])
    with atomic_path(folder / "labels.parquet") as path:
        pq.write_table(pa.Table.from_pylist(rows, form), path)
    counts["labels"] = len(rows)
    return counts
