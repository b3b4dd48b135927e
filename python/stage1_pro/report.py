"""One self-contained HTML page: figures of an evaluation in plain words, pictures and mistakes embedded."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from stage1_pro.artifacts import Evaluation, Measure, Policy, write_text
from stage1_pro.errors import Stage1Error
from stage1_pro.metrics.plots import training_png

THUMBNAILS = 24
THUMBNAIL_SIDE = 220
STAGE_NAMES = {"stage_a": "Stage A alone", "stage_b": "Stage B alone", "cascade": "Cascade"}
METRIC_NAMES = {
    "accuracy": "Accuracy", "balanced_accuracy": "Balanced accuracy", "mcc": "MCC", "auroc": "AUROC", "augrc": "AUGRC",
    "coverage": "Coverage", "exit_accuracy": "Exit accuracy", "fnr_on_exited": "FNR on exits",
    "deferred_accuracy": "Deferred accuracy",
}  # fmt: skip
QUALITY = ("accuracy", "balanced_accuracy", "mcc", "auroc", "augrc")
SHARES = ("accuracy", "balanced_accuracy", "coverage", "exit_accuracy", "fnr_on_exited", "deferred_accuracy")
# Panels of the training figure: the first column of each row that the file has.
TRAINING_PANELS = (
    ("training loss", ("train_loss", "loss")),
    ("accuracy on val_select", ("accuracy", "val_accuracy")),
    ("AUGRC on val_select (lower is better)", ("augrc", "val_augrc")),
)


@dataclass(frozen=True)
class Picture:
    """A figure of the report: file stem, title, what to see in it, PNG bytes."""

    name: str
    title: str
    caption: str
    png: bytes


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
    image_root: Path,
) -> None:
    """Write the report atomically; it refers to no other file and no network.

    Args:
        path: HTML file to write.
        evaluation: the figures.
        policy: the policy they were measured under.
        pictures: in the order to show.
        mistakes: rows of ``mistakes.csv``, the most confident first; the first ones are shown as thumbnails.
        image_root: folder that their ``file`` is relative to.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["png"] = lambda data: "data:image/png;base64," + base64.b64encode(data).decode()
    environment.filters["percent"] = _percent
    environment.filters["stage"] = lambda name: {"stage_a": "Stage A", "stage_b": "Stage B"}[name]
    template = environment.from_string(
        files("stage1_pro").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    )
    shown = [{**row, "image": _thumbnail(image_root / str(row["file"]))} for row in mistakes[:THUMBNAILS]]
    html = template.render(
        evaluation=evaluation,
        policy=policy,
        story=_story(evaluation),
        quality=_table(evaluation),
        quality_names=[METRIC_NAMES[name] for name in QUALITY],
        exits=_exit_table(evaluation) if policy else [],
        grid=_grid(policy) if policy else [],
        pictures=pictures,
        mistakes=shown,
    )
    write_text(path, html)


def _story(evaluation: Evaluation) -> list[str]:
    """The opening: what happened to the photos, as sentences anybody can read."""
    n, positive, wrong = evaluation.n_rows, evaluation.positive, evaluation.n_mistakes
    groups = f" from {evaluation.n_groups} separate groups (clips, tracks or places)" if evaluation.n_groups < n else ""
    kept = (
        f"{_photos(n)}{groups} were kept aside and shown to the model only for this page. It sorts them into "
        f"{len(evaluation.classes)} classes; the one that must not be missed is “{positive}”."
    )
    if evaluation.n_exited is None:
        answered = (
            f"Stage A answered all of them and was wrong on {wrong} ({_percent(wrong / n)}). "
            "There is no exit policy yet, so nothing says when its answer is good enough."
        )
        return [kept, answered]
    exited, deferred = evaluation.n_exited, n - evaluation.n_exited
    answered = f"Stage A was sure enough to answer {_photos(exited)} ({_percent(exited / n)})"
    answered += f" and was wrong on {_wrong(evaluation.measure('exit_accuracy', 'stage_a'))}. " if exited else ". "
    if deferred:
        rest = _wrong(evaluation.measure("deferred_accuracy", "stage_b"))
        answered += f"The other {deferred} went to Stage B, which was wrong on {rest}. "
    answered += f"Together: {wrong} wrong answers in {_photos(n)} ({_percent(wrong / n)})."
    return [kept, answered, _missed(evaluation)]


def _missed(evaluation: Evaluation) -> str:
    """The sentence on positives that Stage A let go as something else."""
    measure, positive, aim = evaluation.measure("fnr_on_exited", "stage_a"), evaluation.positive, evaluation.target_fnr
    if measure.value is None:
        return f"No “{positive}” photo was answered by Stage A, so its rate of misses there is unknown."
    count = round(measure.value * measure.n)
    wish = "" if aim is None else f"; the aim on the calibration photos was at most {_percent(aim)}"
    if aim is not None and measure.value > aim:
        wish += ", so here it is more"
    if measure.n_groups == measure.n:
        unit, bound = _photos(measure.n), "of that rate"
    else:
        unit = f"{measure.n_groups} group" + ("" if measure.n_groups == 1 else "s")
        bound = "for a new group to hold any such miss"
    return (
        f"Of the {measure.n} “{positive}” photos that Stage A answered, {count} "
        f"{'was' if count == 1 else 'were'} called something else ({_percent(measure.value)}{wish}). "
        f"That rests on {unit}: the {evaluation.level:.0%} upper bound {bound} is {_percent(measure.high)}."
    )


def _photos(n: int) -> str:
    return f"{n} photo" + ("" if n == 1 else "s")


def _wrong(accuracy: Measure) -> str:
    value = accuracy.value or 0.0
    return f"{accuracy.n - round(value * accuracy.n)} ({_percent(1 - value)})"


def _sources(evaluation: Evaluation) -> list[str | None]:
    return [None, *sorted({m.source for m in evaluation.measures if m.source is not None})]


def _table(evaluation: Evaluation) -> list[dict[str, object]]:
    """Per source its rows: a stage's name and a cell per metric of ``QUALITY``."""
    found: dict[tuple[str | None, str, str], Measure] = {(m.source, m.stage, m.metric): m for m in evaluation.measures}
    return [
        {
            "source": source or "All photos",
            "n": found[source, "stage_a", "accuracy"].n,
            "lines": [
                {"stage": name, "cells": [_cell(found[source, stage, metric]) for metric in QUALITY]}
                for stage, name in STAGE_NAMES.items()
                if (source, stage, "accuracy") in found
            ],
        }
        for source in _sources(evaluation)
    ]


def _exit_table(evaluation: Evaluation) -> list[dict[str, object]]:
    wanted = [
        ("coverage", "stage_a"),
        ("exit_accuracy", "stage_a"),
        ("fnr_on_exited", "stage_a"),
        ("deferred_accuracy", "stage_b"),
    ]
    return [
        {
            "source": source or "All photos",
            "cells": [_cell(evaluation.measure(metric, stage, source)) for metric, stage in wanted],
            "positives": evaluation.measure("fnr_on_exited", "stage_a", source).n,
        }
        for source in _sources(evaluation)
    ]


def _grid(policy: Policy) -> list[dict[str, object]]:
    """The classic grid with the chosen threshold in its place."""
    rows = [row for row in policy.sweep_results if row.grid or row.threshold == policy.exit_threshold]
    chosen = next((i for i, row in enumerate(rows) if not row.grid), None)
    return [{"row": row, "chosen": index == chosen} for index, row in enumerate(rows)]


def _cell(measure: Measure) -> dict[str, str]:
    share = measure.metric in SHARES

    def show(value: float | None) -> str:
        if value is None:
            return "–"
        return _percent(value) if share else f"{value:.4f}" if measure.metric == "augrc" else f"{value:.3f}"

    if measure.low is not None and measure.high is not None:
        return {"value": show(measure.value), "note": f"{show(measure.low)} to {show(measure.high)}"}
    return {"value": show(measure.value), "note": "" if measure.high is None else f"at most {show(measure.high)}"}


def _percent(value: float | None) -> str:
    if value is None:
        return "–"
    digits = 0 if value in (0, 1) else 2 if value < 0.01 or value > 0.99 else 1
    return f"{100 * value:.{digits}f}%"


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
