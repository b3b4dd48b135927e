"""Metrics alone: the selective suite of anybody's predictions, and the paired difference of two files. No model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from stage1_pro.classes import NEGATIVE_NAMES, choose_positive
from stage1_pro.data.tables import read_table
from stage1_pro.errors import InputError, nearest
from stage1_pro.files import load_npz, write_bytes, write_csv
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
from stage1_pro.policies.softmax import softmax
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

    def metric(self, name: str) -> Metric:
        """One metric; KeyError when it was not measured."""
        for found in self.metrics:
            if found.metric == name:
                return found
        raise KeyError(name)


WAYS = "label and prob, label and prob_<class> of every class, or error and confidence"
ARRAYS = "labels and probs, labels and logits, or error and confidence"
# What four decimals of K probabilities may lack.
SUM_TOLERANCE = 1e-3
# Labels as spreadsheets and data frames give them.
PLAIN = {"0.0": "0", "1.0": "1"}


@dataclass(frozen=True)
class Labelled:
    """Probabilities [N, K] of ``classes`` and labels [N]."""

    probs: NDArray[np.float64]
    labels: NDArray[np.int64]
    classes: list[str]


@dataclass(frozen=True)
class Table:
    """Predictions of one file: labelled probabilities, or an error [N] for every row beside its confidence.

    ``confidence`` [N] beside probabilities replaces the largest one. ``groups`` and ``ids`` [N] if the file has them.
    """

    path: Path
    answers: Labelled | NDArray[np.float64]
    positive: str | None
    confidence: NDArray[np.float64] | None
    groups: NDArray[Any] | None
    ids: NDArray[Any] | None

    @property
    def index(self) -> int | None:
        """Index of the positive class, where there is one."""
        if self.positive is None or not isinstance(self.answers, Labelled):
            return None
        return self.answers.classes.index(self.positive)

    @property
    def error(self) -> NDArray[np.float64]:
        """Error of each row [N]; 0 or 1 beside labels."""
        if isinstance(self.answers, Labelled):
            return np.asarray(self.answers.probs.argmax(axis=1) != self.answers.labels, dtype=np.float64)
        return self.answers

    @property
    def sure(self) -> NDArray[np.float64]:
        """What ranks the rows [N]."""
        if isinstance(self.answers, Labelled) and self.confidence is None:
            return np.asarray(self.answers.probs.max(axis=1))
        assert self.confidence is not None
        return self.confidence


def measure(asked: Metrics) -> Measurement:
    """Measure a file of predictions, every metric with its interval; or its difference from another file.

    Raises:
        InputError: a file or argument is not what it must be; wrong cells name their row.
    """
    if not asked.metrics:
        raise InputError("metrics must name at least one metric, got none; leave it out to measure every one")
    table = read_predictions(asked.path, positive=asked.positive)
    other = None if asked.compare_with is None else _paired(table, asked.compare_with, asked.positive)
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
    )
    if asked.out is not None:
        pictures = _pictures(table, how) if other is None else _difference_pictures(intervals)
        _write(asked.out, found, pictures)
    return found


def read_predictions(path: Path, *, positive: str | None = None) -> Table:
    """Read a file of predictions; the manual's page on metrics says which columns or arrays it must have.

    Raises:
        InputError: the file or one of its cells is not what it must be.
    """
    if path.suffix.lower() == ".npz":
        return _read_npz(path, positive)
    if path.suffix.lower() == ".csv":
        return _read_csv(path, positive)
    raise InputError(f"FILE must end in .csv or .npz, got {path}; `stage1 metrics --help` shows both forms")


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


def _labelled(table: Table) -> Labelled:
    if not isinstance(table.answers, Labelled):
        raise InputError(
            f"{table.path} must hold labels and probabilities to be compared, got error and confidence; "
            "add the columns label and prob"
        )
    return table.answers


def _paired(table: Table, path: Path, positive: str | None) -> Table:
    """The other file, checked to hold the same rows in the same order, with its classes in this one's order."""
    other = read_predictions(path, positive=positive)
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
                f"'{ours[at]}' in {_row_name(path, at)}; sort both files by the same key"
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


# ---------------------------------------------------------------------------------------------- reading


def _read_csv(path: Path, positive: str | None) -> Table:
    table = read_table(path, ("label", "prob", "error", "confidence"))
    columns = {name: table.column(name) for name in table.columns}
    if not columns:
        raise InputError(f"{path} must have a header line with {WAYS}, got an empty file")
    if not len(table):
        raise InputError(
            f"{path} must hold at least one row below its header, got none; a metric of no rows is undefined"
        )
    by_class = [name for name in columns if name.startswith("prob_")]
    confidence = _numbers(path, "confidence", columns["confidence"]) if "confidence" in columns else None
    answers: Labelled | NDArray[np.float64]
    if "label" in columns and ("prob" in columns or by_class):
        if "prob" in columns and by_class:
            raise InputError(f"{path} must have either prob or prob_<class> columns, got both; drop one of them")
        if by_class:
            labels, classes = columns["label"], [name.removeprefix("prob_") for name in by_class]
            if len(classes) < 2:
                raise InputError(
                    f"{path} must have a prob_<class> column of every class, got {by_class[0]} alone; name it prob for "
                    "the positive class of two"
                )
            probs = np.stack([_shares(path, name, _numbers(path, name, columns[name])) for name in by_class], axis=1)
            _check_sums(path, probs)
        else:
            labels = [PLAIN.get(text, text) for text in columns["label"]]
            share = _shares(path, "prob", _numbers(path, "prob", columns["prob"]))
            probs = np.stack([1 - share, share], axis=1)
            classes, positive = _two_classes(path, labels, positive)
        answers = Labelled(probs, _indices(path, labels, classes), classes)
        positive = _positive_of(classes, positive)
    elif "error" in columns and confidence is not None:
        answers = _shares(path, "error", _numbers(path, "error", columns["error"]))
        if positive is not None:
            raise InputError("--positive must go with labels, got it with error and confidence; leave it out")
    else:
        _refuse_columns(path, list(columns))
    groups = np.asarray(columns["group"]) if "group" in columns else None
    if groups is not None and (groups == "").any():
        _wrong(path, "group", "a name in every row", "an empty cell", int((groups == "").argmax()))
    ids = np.asarray(columns["id"]) if "id" in columns else None
    return Table(path, answers, positive, confidence, groups, ids)


def _refuse_columns(path: Path, columns: list[str]) -> NoReturn:
    """Name the missing column of the form the file comes closest to."""
    pairs = [("label", "prob"), ("error", "confidence")]
    close = {name: bool(nearest(name, columns)) for pair in pairs for name in pair}
    pair = max(pairs, key=lambda names: sum(2 * (name in columns) + close[name] for name in names))
    missing = next(name for name in pair if name not in columns)
    raise InputError(
        f"{path} must have a column '{missing}', got {', '.join(columns)}{nearest(missing, columns)}; it needs {WAYS}"
    )


def _read_npz(path: Path, positive: str | None) -> Table:
    arrays = load_npz(path)
    names = list(arrays)
    for plural, single in (("groups", "group"), ("ids", "id"), ("error", "errors"), ("labels", "label")):
        if single in arrays and plural not in arrays:
            arrays[plural] = arrays.pop(single)
    given = [name for name in ("probs", "logits") if name in arrays]
    confidence = _array(path, "confidence", arrays["confidence"]) if "confidence" in arrays else None
    answers: Labelled | NDArray[np.float64]
    if "labels" in arrays and given:
        if len(given) == 2:
            raise InputError(f"{path} must hold exactly one of probs and logits, got both; drop one of them")
        probs = _npz_probs(path, given[0], arrays[given[0]])
        classes = [str(name) for name in np.atleast_1d(arrays.get("classes", np.arange(probs.shape[1])))]
        if len(classes) != probs.shape[1]:
            raise InputError(f"classes must name the {probs.shape[1]} columns of {given[0]}, got {len(classes)} names")
        if positive is None and "positive" in arrays:
            positive = str(arrays["positive"])
        positive = _positive_of(classes, positive)
        answers = Labelled(probs, _npz_labels(path, arrays["labels"], classes), classes)
        n = len(probs)
        if answers.labels.size != n:
            raise InputError(f"labels must be one per row of {given[0]}, got {answers.labels.size} for {n} rows")
    elif "error" in arrays and confidence is not None:
        answers = _shares(path, "error", _array(path, "error", arrays["error"]))
        n = answers.size
    else:
        wanted = "probs" if "labels" in arrays else "labels" if given or nearest("labels", names) else "error"
        found = ", ".join(sorted(names)) or "nothing"
        others = [name for name in names if name not in ("labels", "probs", "logits", "error", "confidence")]
        hint = nearest(wanted, others) or (nearest("logits", others) if wanted == "probs" else "")
        raise InputError(f"{path} must hold {ARRAYS}, got {found}{hint}")
    if n == 0:
        raise InputError(f"{path} must hold at least one row, got none; a metric of no rows is undefined")
    optional = {name: arrays.get(name) for name in ("groups", "ids")}
    for name, values in {**optional, "confidence": confidence}.items():
        if values is not None and values.shape != (n,):
            raise InputError(f"{name} must have one value per row, got shape {list(values.shape)} for {n} rows")
    return Table(path, answers, positive, confidence, optional["groups"], optional["ids"])


def _npz_probs(path: Path, name: str, values: NDArray[Any]) -> NDArray[np.float64]:
    """Probabilities [N, K]; one column stands for the second of two classes."""
    numbers = _array(path, name, values, dimensions=(1, 2))
    if numbers.ndim == 2 and numbers.shape[1] == 1:
        numbers = numbers[:, 0]
    if numbers.ndim == 1:
        if name == "probs":
            numbers = _shares(path, name, numbers)
        numbers = np.stack([1 - numbers if name == "probs" else np.zeros_like(numbers), numbers], axis=1)
    if name == "logits":
        return softmax(numbers)
    _shares(path, name, numbers)
    _check_sums(path, numbers)
    return numbers


def _npz_labels(path: Path, values: NDArray[Any], classes: list[str]) -> NDArray[np.int64]:
    if values.ndim != 1:
        raise InputError(f"labels must have shape [N], got {list(values.shape)}; one class per row")
    if values.dtype.kind in "US":
        return _indices(path, [str(name) for name in values], classes)
    wrong = ~np.isin(values, np.arange(len(classes)))
    if wrong.any():
        at = int(wrong.argmax())
        _wrong(path, "labels", f"class indices 0 to {len(classes) - 1}", str(values[at]), at)
    return values.astype(np.int64)


def _array(path: Path, name: str, values: NDArray[Any], dimensions: tuple[int, ...] = (1,)) -> NDArray[np.float64]:
    if values.dtype.kind not in "fiub" or values.ndim not in dimensions:
        shape = " or ".join("[N]" if d == 1 else "[N, K]" for d in dimensions)
        raise InputError(f"{name} must be numbers of shape {shape}, got {values.dtype} {list(values.shape)} in {path}")
    numbers = values.astype(np.float64)
    broken = ~np.isfinite(numbers) if numbers.ndim == 1 else ~np.isfinite(numbers).all(axis=1)
    if broken.any():
        _wrong(path, name, "finite numbers", "NaN or infinity", int(broken.argmax()))
    return numbers


def _numbers(path: Path, column: str, cells: list[str]) -> NDArray[np.float64]:
    try:
        numbers = np.asarray(cells, dtype=np.float64)
    except ValueError:
        for at, cell in enumerate(cells):
            try:
                float(cell)
            except ValueError:
                _wrong(path, column, "a number", f"'{cell}'" if cell else "an empty cell", at)
        raise
    broken = ~np.isfinite(numbers)
    if broken.any():
        _wrong(path, column, "a finite number", f"'{cells[int(broken.argmax())]}'", int(broken.argmax()))
    return numbers


def _shares(path: Path, column: str, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    outside = (numbers < 0) | (numbers > 1)
    if outside.any():
        at = int(outside.argmax()) if numbers.ndim == 1 else int(outside.any(axis=1).argmax())
        what = numbers[at] if numbers.ndim == 1 else numbers[at][outside[at]][0]
        _wrong(path, column, "in [0, 1]", f"{what:g}", at, "logits need a softmax or sigmoid first")
    return numbers


def _check_sums(path: Path, probs: NDArray[np.float64]) -> None:
    off = np.abs(probs.sum(axis=1) - 1) > SUM_TOLERANCE
    if off.any():
        at = int(off.argmax())
        _wrong(path, "probabilities", "1 in sum over the classes", f"{probs[at].sum():.6g}", at)


def _indices(path: Path, names: Sequence[str], classes: list[str]) -> NDArray[np.int64]:
    place = {name: i for i, name in enumerate(classes)}
    for at, name in enumerate(names):
        if name not in place:
            _wrong(path, "label", f"one of {', '.join(classes)}", f"'{name}'", at, nearest(name, classes)[2:])
    return np.asarray([place[name] for name in names], dtype=np.int64)


def _two_classes(path: Path, labels: list[str], positive: str | None) -> tuple[list[str], str]:
    """Classes with the negative one first, and the positive, of labels beside one column of probabilities."""
    names = list(dict.fromkeys(labels))
    if "" in names:
        _wrong(path, "label", "0, 1 or a name", "an empty cell", labels.index(""))
    if positive is None and set(names) <= {"0", "1"}:
        return ["0", "1"], "1"
    if positive is None and names[0] in ("0", "1"):
        at = next(i for i, name in enumerate(labels) if name not in ("0", "1"))
        advice = "names need --positive, more classes prob_<class> columns"
        _wrong(path, "label", "0 or 1", f"'{labels[at]}'", at, advice)
    if len(names) > 2:
        at = labels.index(names[2])
        expected = f"one of {names[0]}, {names[1]} beside one column prob"
        _wrong(path, "label", expected, f"'{names[2]}'", at, "more classes need prob_<class> columns")
    if positive is not None and len(names) == 1 and positive != names[0] and names[0].casefold() in NEGATIVE_NAMES:
        return [names[0], positive], positive
    positive = choose_positive(names, positive)
    others = [name for name in names if name != positive]
    return [others[0] if others else f"not {positive}", positive], positive


def _positive_of(classes: list[str], positive: str | None) -> str | None:
    """The positive class; of two classes the second one where neither flag nor names tell."""
    if positive is not None:
        return choose_positive(classes, positive)
    if len(classes) != 2:
        return None
    try:
        return choose_positive(classes)
    except InputError:
        return classes[1]


def _row_name(path: Path, index: int) -> str:
    # Spreadsheets count from 1 and arrays from 0; the word says which.
    return f"row {index + 1}" if path.suffix.lower() == ".csv" else f"row {index} (from 0)"


def _wrong(path: Path, what: str, expected: str, got: str, at: int, advice: str = "") -> NoReturn:
    raise InputError(
        f"{what} must be {expected}, got {got} in {_row_name(path, at)} of {path}; {advice or 'mend or drop the row'}"
    )


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"
