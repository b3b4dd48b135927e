"""Metrics alone: the selective suite of anybody's predictions, and the paired difference of two files. No model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from pydantic import Field

from stage1_pro.data.given import Labelled, Table, read_predictions, row_name
from stage1_pro.errors import InputError
from stage1_pro.files import write_bytes, write_csv
from stage1_pro.metrics.by_class import ByClass, add_classes, by_class, class_rows, confusion_rows
from stage1_pro.metrics.figures import (
    BAND_METRICS,
    confidence_png,
    distribution_png,
    reliability_png,
    risk_band,
    risk_coverage_png,
)
from stage1_pro.metrics.intervals import Intervals, bootstrap, bootstrap_answers, bootstrap_errors, compare
from stage1_pro.metrics.measured import Metric, known
from stage1_pro.metrics.probabilistic import ece
from stage1_pro.metrics.table import names
from stage1_pro.progress import say
from stage1_pro.record import Record
from stage1_pro.report import Picture, short_note, write_measurement
from stage1_pro.tables import Notes, Sheet, grid

if TYPE_CHECKING:
    from stage1_pro.commands.metrics import Metrics


class Measurement(Record):
    """What ``stage1 metrics`` found in a file of predictions, or of the difference of two files."""

    format_version: Literal[1] = 1
    file: str
    compared_with: str | None = Field(description="the other file; metrics are then those of this one minus its")
    n_rows: int
    n_units: int
    unit: Literal["rows", "groups"] = Field(description="what is resampled")
    classes: list[str] | None = Field(description="null when the file holds errors instead of labels")
    positive: str | None
    threshold: float | None
    level: float = Field(gt=0, lt=1)
    method: Literal["bca", "percentile", "logit"]
    n_replicates: int
    seed: int
    metrics: list[Metric]
    values: dict[str, tuple[float | None, float | None]] = Field(
        default_factory=dict, description="of a difference: the metric of this file and of the other one"
    )

    by_class: ByClass | None = Field(None, description="of more than two classes, and of no difference")

    def metric(self, name: str) -> Metric:
        """One metric; KeyError when it was not measured."""
        for found in self.metrics:
            if found.metric == name:
                return found
        raise KeyError(name)


def measure(asked: Metrics) -> Measurement:
    """Measure a file of predictions, every metric with its interval; or its difference from another file.

    Raises:
        InputError: a file or argument is not what it must be; wrong cells name their row.
    """
    if not asked.metrics:
        raise InputError("metrics must name at least one metric, got none; leave it out to measure every one")
    table = read_predictions(asked.path, positive=asked.positive, columns=asked.columns)
    other = None if asked.compare_with is None else _paired(table, asked.compare_with, asked)
    chosen = "all" if asked.metrics == ("all",) else list(asked.metrics)
    how: dict[str, Any] = asked.model_dump(include={"threshold", "level", "method", "seed", "n_replicates"})
    points, values = {}, {}
    if other is None:
        points = _points(table, chosen, how)
        wanted = "all" if chosen == "all" else [name for name in chosen if name not in points]
        intervals = _bootstrap(table, wanted, how)
    else:
        intervals = _difference(table, other, chosen, how)
        exact = {**how, "n_replicates": 1, "method": "percentile"}
        alone = [_bootstrap(one, list(intervals), exact) for one in (table, other)]
        values = {name: (known(alone[0][name].value), known(alone[1][name].value)) for name in intervals}
    found = Measurement(
        file=table.path.name,
        compared_with=None if other is None else other.path.name,
        n_rows=intervals.n_rows,
        n_units=intervals.n_units,
        unit=cast("Literal['rows', 'groups']", intervals.unit),
        classes=table.answers.classes if isinstance(table.answers, Labelled) else None,
        positive=table.positive,
        **how,
        metrics=[*(Metric.of(name, one) for name, one in intervals.items()), *points.values()],
        values=values,
        by_class=None if other is not None else _by_class(table),
    )
    if asked.out is not None:
        pictures = _pictures(table, how) if other is None else _difference_pictures(intervals)
        _write(asked.out, found, pictures)
    return found


def render(found: Measurement) -> str:
    """Show a measurement as text."""
    sheet, notes = Sheet(), Notes()
    units = f" in {found.n_units} groups" if found.unit == "groups" else ""
    if found.compared_with is not None:
        sheet.add(f"A = {found.file}, B = {found.compared_with}: the same {found.n_rows} rows{units}")
    else:
        about = "" if found.positive is None else f", positive class '{found.positive}'"
        sheet.add(f"{found.file}: {found.n_rows} rows{units}{about}")
    wide, values = f"{100 * found.level:.4g}% interval", ("A", "B", "A - B") if found.values else ("value",)
    table = grid(("metric", *values, "std", wide, "method"), left=("metric", wide, "method"))
    for one in found.metrics:
        both = [_text(value) for value in found.values.get(one.metric, ())]
        interval = "-" if one.low is None or one.high is None else f"[{one.low:.5f}, {one.high:.5f}]"
        method = "-" if one.method == "none" else one.method
        method += notes.mark(short_note(one.note))
        table.add_row(one.metric, *both, _text(one.value), _text(one.std), interval, method)
    sheet.add(table, *notes.lines())
    if found.compared_with is not None:
        sheet.add(
            "A negative difference of AUGRC, AURC, risks, NLL and Brier speaks for A, a positive one of accuracy and "
            "coverages; an interval that holds 0 speaks for neither."
        )
    if found.by_class is not None:
        add_classes(sheet, "class", found.by_class)
    if found.unit == "rows":
        sheet.add("Rows are taken for independent: those of one clip or track must share a name in the group column.")
    return sheet.text()


# ---------------------------------------------------------------------------------------------- measuring


def _bootstrap(table: Table, metrics: str | Sequence[str], how: dict[str, Any]) -> Intervals:
    answers, groups = table.answers, table.groups
    if not metrics:
        n = len(table.error)
        n_units = n if groups is None else np.unique(groups).size
        return Intervals({}, n_rows=n, n_units=n_units)
    if isinstance(answers, Labelled):
        how = {**how, "confidence": table.confidence, "positive": table.index}
        return bootstrap(answers.probs, answers.labels, groups=groups, metrics=metrics, **how)
    return bootstrap_errors(table.sure, answers, groups=groups, metrics=metrics, **how)


def _difference(table: Table, other: Table, metrics: str | Sequence[str], how: dict[str, Any]) -> Intervals:
    mine, its = _labelled(table), _labelled(other)
    return compare(
        mine.probs, its.probs, mine.labels, confidence=(table.confidence, other.confidence),
        groups=other.groups if table.groups is None else table.groups, metrics=metrics, positive=table.index, **how,
    )  # fmt: skip


def _points(table: Table, metrics: str | Sequence[str], how: dict[str, Any]) -> dict[str, Metric]:
    """Metrics of answers and probabilities, of those asked for; always with percentile intervals."""
    wanted = [name for name in names("answers") if metrics == "all" or name in metrics]
    answers = table.answers
    if not isinstance(answers, Labelled) or not wanted:
        return {}
    how = {name: how[name] for name in ("n_replicates", "level", "seed")}
    found = bootstrap_answers(answers.probs, answers.labels, groups=table.groups, positive=table.index, **how)
    return {name: Metric.of(name, found[name]) for name in wanted if name in found}


def _by_class(table: Table) -> ByClass | None:
    """Figures of every class where there are more than two."""
    answers = table.answers
    if not isinstance(answers, Labelled) or len(answers.classes) == 2:
        return None
    return by_class(answers.probs, answers.labels, answers.classes)


def _labelled(table: Table) -> Labelled:
    if not isinstance(table.answers, Labelled):
        raise InputError(
            f"{table.path} must hold labels and probabilities to be compared, got error and confidence; "
            "add the columns label and prob"
        )
    return table.answers


def _paired(table: Table, path: Path, asked: Metrics) -> Table:
    """The other file, checked to hold the same rows in the same order, with its classes in this one's order."""
    other = read_predictions(path, positive=asked.positive, columns=asked.columns)
    mine, its = _labelled(table), _labelled(other)
    if its.labels.size != mine.labels.size:
        raise InputError(
            f"{path} must hold the rows of {table.path}, got {its.labels.size} rows instead of {mine.labels.size}; "
            "compare predictions on the same rows"
        )
    if sorted(its.classes) != sorted(mine.classes):
        raise InputError(
            f"{path} must have the classes of {table.path} ({', '.join(mine.classes)}), got "
            f"{', '.join(its.classes)}; name classes alike in both files"
        )
    pairs: list[tuple[str, Any, Any]] = [("id", table.ids, other.ids), ("group", table.groups, other.groups)]
    pairs.append(("label", np.asarray(mine.classes)[mine.labels], np.asarray(its.classes)[its.labels]))
    for name, ours, theirs in pairs:
        if ours is None or theirs is None:
            continue
        differs = np.flatnonzero(ours.astype(str) != theirs.astype(str))
        if differs.size:
            at = int(differs[0])
            raise InputError(
                f"{path} must hold the rows of {table.path} in its order, got {name} '{theirs[at]}' instead of "
                f"'{ours[at]}' in {row_name(path, at)}; sort both files by the same key"
            )
    if its.classes == mine.classes:
        return other
    order = [its.classes.index(name) for name in mine.classes]
    turned = Labelled(its.probs[:, order], np.argsort(order)[its.labels], mine.classes)
    return replace(other, answers=turned, positive=table.positive)


# ---------------------------------------------------------------------------------------------- files


def _write(out: Path, found: Measurement, pictures: list[Picture]) -> None:
    both = ["value_a", "value_b"] if found.compared_with is not None else []
    rows = [one.model_dump() | dict(zip(both, found.values.get(one.metric, ()), strict=False)) for one in found.metrics]
    write_csv(out / "metrics.csv", rows, [*Metric.model_fields, *both])
    if found.by_class is not None:
        for name, listed in (("classes", class_rows), ("confusion", confusion_rows)):
            table = listed("all", found.by_class)
            write_csv(out / f"{name}.csv", table, list(table[0]))
    found.write(out / "metrics.json")
    for picture in pictures:
        write_bytes(out / f"{picture.name}.png", picture.png)
    write_measurement(out / "report.html", found, pictures)
    say(f"wrote {out}/metrics.csv, metrics.json, {len(pictures)} figures and report.html")


def _difference_pictures(intervals: Intervals) -> list[Picture]:
    """How the difference varies, of the three metrics that say most, where they were measured."""
    pictures = []
    for name, title in {"augrc": "AUGRC", "accuracy": "accuracy", "nll": "NLL"}.items():
        if name in intervals:
            label, target = f"{title} of A minus that of B", "no difference:"
            png = distribution_png(intervals[name], label, target=0.0, target_label=target)
            caption = "The difference on each resample, both files on the same one."
            pictures.append(Picture(f"difference_{name}", f"Difference in {title}", caption, png))
    return pictures


def _pictures(table: Table, how: dict[str, Any]) -> list[Picture]:
    threshold, level, answers = how["threshold"], how["level"], table.answers
    exits = [] if threshold is None else ["coverage"]
    if threshold is not None and table.index is not None:
        exits.append("fnr_on_exited")
    # The same seed and number of replicates: the resamples of the figures in the table.
    intervals = _bootstrap(table, ["augrc", *exits, *BAND_METRICS], how)
    error, sure = table.error, table.sure
    point = None
    if threshold is not None and (sure >= threshold).any():
        point = (float((sure >= threshold).mean()), float(error[sure >= threshold].mean()))
    caption = (
        "Answering only the surest rows (left), how many answers are wrong? Good confidence keeps the line low on "
        f"the left. Shaded: {100 * level:.4g}% interval at each coverage."
    )
    curve = risk_coverage_png(sure, error, point=point, band=risk_band(intervals), level=level)
    pictures = [Picture.of("risk_coverage_curve", caption, curve)]
    png = distribution_png(intervals["augrc"], "AUGRC (lower is better)")
    pictures.append(Picture.of("augrc", f"AUGRC on each resample of {intervals.unit}.", png))
    if isinstance(answers, Labelled):
        largest, right = np.minimum(answers.probs.max(axis=1), 1.0), error == 0
        caption = (
            "Points below the dashed line: surer than it should be. ECE is the mean length of the bars, weighted "
            "by rows, over 15 bins of equal width."
        )
        png = reliability_png(largest, right, error=ece(answers.probs, answers.labels))
        pictures.append(Picture.of("reliability", caption, png))
        png = confidence_png(largest, right, threshold=threshold if table.confidence is None else None)
        pictures.append(Picture.of("confidence", "Wrong answers far right are the costly ones.", png))
    labels = {"coverage": "coverage: share at or above the threshold", "fnr_on_exited": "FNR on exits"}
    for name in exits:
        if not math.isnan(intervals[name].value):
            png = distribution_png(intervals[name], labels[name], percent=True)
            pictures.append(Picture.of(name, f"On each resample of {intervals.unit}.", png))
    return pictures


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"
