"""One self-contained HTML page: figures of an evaluation in plain words, pictures and mistakes embedded."""

from __future__ import annotations

import base64
import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stage1_pro.errors import Stage1Error
from stage1_pro.files import write_text
from stage1_pro.metrics import table
from stage1_pro.metrics.answers import Measure
from stage1_pro.metrics.estimate import FEW_ERRORS, FEW_GROUPS
from stage1_pro.metrics.figures import training_png
from stage1_pro.metrics.selective import relative_cost
from stage1_pro.policies.policy import Policy
from stage1_pro.policies.ranking import DIFFERENCE, GATE, JOINT, SOFTMAX
from stage1_pro.policies.sets import percent

if TYPE_CHECKING:
    from stage1_pro.studies.measuring import Measurement
    from stage1_pro.training.evaluation import Evaluation


THUMBNAILS = 24
THUMBNAIL_SIDE = 220
# Thumbnails of each kind of change: fixed and broken.
EXAMPLES = 6
STAGE_NAMES = {"stage_a": "Stage A alone", "stage_b": "Stage B alone", "cascade": "Cascade"}
WORST_GROUPS = 20
# What can rank Stage A's answers, by the metric that says how well.
RANKINGS = {
    GATE: "the gate", SOFTMAX: "max softmax", JOINT: "the gate before it was refitted",
    DIFFERENCE: "difference, gate minus max softmax",
}  # fmt: skip
QUALITY = ("accuracy", "balanced_accuracy", "mcc", "auroc", "augrc")
EXITS = ("coverage", "exit_accuracy", "fnr_on_exited", "deferred_accuracy")
# Panels of the training figure: the first column of each row that the file has.
TRAINING_PANELS = (
    ("training loss", ("train_loss", "loss")),
    ("accuracy on val_select", ("accuracy", "val_accuracy")),
    ("AUGRC on val_select (lower is better)", ("augrc", "val_augrc")),
)


# Pictures that more than one page has.
PICTURES = {
    "risk_coverage_curve": "Risk against coverage",
    "augrc": "How far AUGRC may be off",
    "reliability": "Is it as sure as it is right?",
    "confidence": "Confidence of right and wrong answers",
    "confusion": "Which classes are taken for which",
    "fnr_on_exited": "How far FNR on exits may be off",
    "coverage": "How far coverage may be off",
}


@dataclass(frozen=True)
class Picture:
    """A figure of the report: file stem, title, what to see in it, PNG bytes."""

    name: str
    title: str
    caption: str
    png: bytes

    @classmethod
    def of(cls, name: str, caption: str, png: bytes) -> Picture:
        """Make one of ``PICTURES``."""
        return cls(name, PICTURES[name], caption, png)


def training_picture(metrics_csv: Path) -> Picture | None:
    """Draw the training curve of a run's ``metrics.csv``; None when there is no usable one."""
    try:
        with metrics_csv.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        return None
    series: dict[str, list[float]] = {}
    for title, columns in TRAINING_PANELS:
        values = next(([_number(row[c]) for row in rows] for c in columns if rows and c in rows[0]), [])
        if any(map(math.isfinite, values)):
            series[title] = values
    if not series:
        return None
    epochs = [_number(row.get("epoch")) for row in rows]
    if not all(map(math.isfinite, epochs)):
        epochs = [float(index) for index in range(len(rows))]
    caption = "One point an epoch. The checkpoint with the lowest AUGRC on val_select is the one measured here."
    return Picture("training_curve", "Training", caption, training_png(epochs, series))


def write_report(
    path: Path | str,
    evaluation: Evaluation,
    *,
    policy: Policy | None,
    pictures: Sequence[Picture],
    mistakes: Sequence[Mapping[str, object]],
    changes: Sequence[Mapping[str, object]] = (),
    groups: Sequence[Mapping[str, object]],
    image_root: Path,
) -> None:
    """Write the report atomically; it refers to no other file and no network.

    ``mistakes``, ``changes`` and ``groups`` are rows of the CSV files of these names, the worst first, of which the
    first are shown, with thumbnails of photos under ``image_root``.
    """
    fixed, broken = ([row for row in changes if row["effect"] == effect] for effect in ("fixed", "broken"))
    bad = [row for row in groups if row["errors"] or row["missed_positives"]]
    notes: list[str] = []
    check, promises = evaluation.one_verdict()
    measured = {(m.source, m.stage, m.metric): m for m in evaluation.measures}
    suite_stages = [stage for stage in STAGE_NAMES if any(m[1:] == (stage, "augrc") for m in measured)]
    html = page(
        "report.html.j2",
        evaluation=evaluation,
        policy=policy,
        check=check,
        promises=promises,
        sets=evaluation.verification,
        promised=[] if policy is None else policy.story(),
        measured=measured,
        sources=[None, *sorted({m.source for m in evaluation.measures if m.source is not None})],
        stages=STAGE_NAMES,
        quality=tuple(name for name in QUALITY if (None, "stage_a", name) in measured),
        suite=_suite(evaluation, suite_stages, notes),
        suite_stages=[STAGE_NAMES[stage] for stage in suite_stages],
        suite_notes=notes,
        rankings=[
            (title, measured[None, "stage_a", name])
            for name, title in RANKINGS.items()
            if (None, "stage_a", name) in measured
        ],
        exits=tuple(
            name
            for name in EXITS
            if policy is not None and (evaluation.positive is not None or name != "fnr_on_exited")
        ),
        of_one_class=policy is not None
        and (evaluation.positive is not None or any(one.label for one in policy.target.promises(None))),
        effects=evaluation.effects,
        apart=evaluation.measure("accuracy_minus_stage_b") if policy else None,
        examples=[*fixed[:EXAMPLES], *broken[:EXAMPLES]],
        cost=_cost(evaluation),
        grid=_grid(policy) if policy else [],
        pictures=pictures,
        # Where every row is a group of its own the table would be the mistakes again.
        groups=bad[:WORST_GROUPS] if evaluation.n_groups < evaluation.n_rows else [],
        n_bad_groups=len(bad),
        named_sources=any(row["source"] for row in groups),
        mistakes=mistakes[:THUMBNAILS],
        thumbnail=lambda file: _thumbnail(image_root / file),
    )
    write_text(path, html)


def write_measurement(path: Path | str, found: Measurement, pictures: Sequence[Picture]) -> None:
    """Write the page of ``stage1 metrics`` atomically; it refers to no other file and no network."""
    columns = ["Value", "Std", "Interval", "Method", "Note"]
    if found.compared_with is not None:
        columns = ["A", "B", "A − B", *columns[1:]]
    write_text(path, page("metrics.html.j2", found=found, columns=columns, pictures=pictures))


def short_note(note: str) -> str:
    """A note without its counts, so that one line serves many figures; the files have them."""
    note = re.sub(r"only (?:about )?\d+ (row|group)s?( with| in which)", rf"fewer than {FEW_ERRORS} \1s\2", note)
    note = re.sub(r"they count as \d+", "they count as fewer", note)
    note = re.sub(r"only \d+ groups?( by their sizes)?", f"fewer than {FEW_GROUPS} groups", note)
    return re.sub(r"(errors|exits|positives) in \d+ (row|group)s", r"\1 in any \2", note)


def page(template: str, **values: object) -> str:
    """Fill one of the package's HTML templates; every value is escaped, a missing one is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("stage1_pro"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["png"] = lambda data: "data:image/png;base64," + base64.b64encode(data).decode()
    environment.filters |= {"percent": percent, "many": _many, "wrong": _wrong, "points": _points, "short": short_note}
    environment.filters |= {"cell": _cell, "metric": table.title, "plain": _plain}
    environment.filters["stage"] = lambda name: {"stage_a": "Stage A", "stage_b": "Stage B"}[name]
    return environment.get_template(template).render(**values)


def _cost(evaluation: Evaluation) -> float | None:
    """Share of a full pass's blocks that the cascade ran; None where the tap is not known."""
    if evaluation.tap is None or evaluation.n_blocks is None or evaluation.n_exited is None:
        return None
    return float(relative_cost(evaluation.n_exited / evaluation.n_rows, evaluation.tap, evaluation.n_blocks))


def _many(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def _wrong(accuracy: Measure) -> str:
    """How many answers were wrong, and their share."""
    value = accuracy.value or 0.0
    return f"{accuracy.n - round(value * accuracy.n)} ({percent(1 - value)})"


def _points(share: float) -> str:
    return f"{100 * share:+.2f}".replace("-", "−")


def _suite(evaluation: Evaluation, stages: Sequence[str], notes: list[str]) -> list[dict[str, object]]:
    """A row a metric over all photos, a cell a stage; cautions are collected in ``notes`` and marked by number."""
    names = [m.metric for m in evaluation.measures if m.source is None and m.stage == stages[0] and m.n]
    lines: list[dict[str, object]] = []
    for name in names:
        if name in EXITS or name == "exit_error" or name in RANKINGS:
            continue
        cells = []
        for stage in stages:
            measure = evaluation.measure(name, stage)
            mark = ""
            if measure.note:
                note = short_note(measure.note)
                if note not in notes:
                    notes.append(note)
                mark = str(notes.index(note) + 1)
            cells.append({**_cell(measure), "mark": mark})
        lines.append({"name": table.title(name), "cells": cells})
    return lines


def _grid(policy: Policy) -> list[dict[str, object]]:
    """The classic grid with the chosen threshold in its place; scrc has no one threshold."""
    rows = [row for row in policy.sweep if row.grid or row.threshold == policy.exit_threshold]
    chosen = next((i for i, row in enumerate(rows) if not row.grid), None)
    return [{"row": row, "chosen": index == chosen} for index, row in enumerate(rows)]


def _cell(measure: Measure) -> dict[str, str]:
    spec, _ = table.lookup(measure.metric)

    def show(value: float | None) -> str:
        if value is None:
            return "–"
        if measure.metric in RANKINGS:
            return f"{value:.4f}".replace("-", "−")
        return percent(value) if spec.share else f"{value:.{spec.digits}f}"

    if measure.low is not None and measure.high is not None:
        return {"value": show(measure.value), "note": f"{show(measure.low)} to {show(measure.high)}"}
    return {"value": show(measure.value), "note": "" if measure.high is None else f"at most {show(measure.high)}"}


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.5f}".replace("-", "−")


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _thumbnail(path: Path) -> str | None:
    """A small JPEG as a data URL; None when the photo cannot be read any more."""
    from PIL import Image

    from stage1_pro.data.images import read_image

    try:
        image = read_image(path)
    except (Stage1Error, OSError):
        return None
    # Crops of 15 px are enlarged, for eyes to tell what they show.
    scale = THUMBNAIL_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
