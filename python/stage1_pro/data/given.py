"""Predictions that anybody hands in: a CSV or an ``.npz`` of labels and probabilities, read alike by every command."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from stage1_pro.classes import MOST_CLASSES, NEGATIVE_NAMES, check_names, choose_positive, spelled
from stage1_pro.data.tables import Sheet, is_table, read_table
from stage1_pro.errors import InputError, nearest, printable
from stage1_pro.files import load_npz
from stage1_pro.policies.softmax import softmax

WAYS = "label and prob, label and prob_<class> of every class, or error and confidence"
ARRAYS = "labels and probs, labels and logits, or error and confidence"
# What four decimals of K probabilities may lack.
SUM_TOLERANCE = 1e-3
COLUMNS = ("label", "prob", "prob_*", "error", "confidence", "group", "id")
# Beside these, of logits that a policy is calibrated on; the arrays of an `.npz` are called so, too.
FOR_POLICIES = ("gate_logits", "half")
LARGEST = 2**30
_DECIMAL = re.compile(r"[+-]?[0-9]*,[0-9]+([eE][+-]?[0-9]+)?")
_THOUSANDS = re.compile(r"[+-]?[1-9][0-9]{0,2}(,[0-9]{3})+")


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


def read_predictions(path: Path, *, positive: str | None = None, columns: Mapping[str, str] | None = None) -> Table:
    """Read a file of predictions; the manual's page on metrics says which columns or arrays it must have.

    ``columns`` says what a CSV calls them.

    Raises:
        InputError: the file or one of its cells is not what it must be.
    """
    if is_table(path):
        return _of_sheet(path, read_table(path, COLUMNS, columns=columns), positive)
    _refuse_pairs(path, columns)
    if path.suffix.lower() == ".npz":
        return _read_npz(path, positive)
    raise InputError(f"FILE must end in .csv or .npz, got {path}; `stage1 metrics --help` shows both forms")


def read_arrays(
    path: Path, *, positive: str | None = None, columns: Mapping[str, str] | None = None
) -> dict[str, NDArray[Any]]:
    """The arrays of an ``.npz`` of logits, or of a run's own, such as ``val_calib.npz``; of a CSV what they would be.

    A CSV is as ``read_predictions`` takes it, and may have the columns ``gate_logits`` and ``half``, too.

    Raises:
        InputError: the file or one of its cells is not what it must be.
    """
    if not is_table(path):
        _refuse_pairs(path, columns)
        return _load(path)
    sheet = read_table(path, (*COLUMNS, *FOR_POLICIES), columns=columns)
    table = _of_sheet(path, sheet, positive)
    if not isinstance(table.answers, Labelled):
        raise InputError(f"{path} must hold labels and probabilities, got error and confidence; a policy needs {WAYS}")
    found: dict[str, NDArray[Any]] = {
        "probs": table.answers.probs, "labels": table.answers.labels, "classes": np.asarray(table.answers.classes)
    }  # fmt: skip
    if table.groups is not None:
        found["groups"] = table.groups
    if "prob" in sheet.columns and table.positive is not None:
        found["positive"] = np.asarray(table.positive)
    if "gate_logits" in sheet.columns:
        found["gate_logits"] = _numbers(path, _pointed(path, sheet.by_column(), ["gate_logits"]), "gate_logits")
    if "half" in sheet.columns:
        found["half"] = np.asarray(sheet.column("half"))
    return found


# What the files of a run call their arrays, where others say it otherwise.
_OF_RUN = {"logits_a": "logits", "halves": "half", "row_ids": "ids"}


def _load(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an ``.npz``; those of a run's own, which are of Stage A first, by the names of all others."""
    arrays = load_npz(path, most=LARGEST)
    if "logits_a" not in arrays or "logits" in arrays or "probs" in arrays:
        return arrays
    found = {_OF_RUN.get(name, name): values for name, values in arrays.items()}
    if "half" in found and not found["half"].astype(bool).all():
        del found["half"]  # only val_calib has halves
    return found


def _refuse_pairs(path: Path, columns: Mapping[str, str] | None) -> None:
    if columns:
        raise InputError(f"--columns must go with a CSV, got it with {path}; leave it out")


def _of_sheet(path: Path, table: Sheet, positive: str | None) -> Table:
    columns = table.by_column()
    if not columns:
        raise InputError(f"{path} must have a header line with {WAYS}, got an empty file")
    if not len(table):
        raise InputError(
            f"{path} must hold at least one row below its header, got none; a metric of no rows is undefined"
        )
    by_class = [name for name in columns if name.startswith("prob_")]
    check_names(classes := [spelled(name.removeprefix("prob_")) for name in by_class])
    columns |= _pointed(path, columns, [*by_class, *(one for one in ("prob", "error", "confidence") if one in columns)])
    confidence = _numbers(path, columns, "confidence") if "confidence" in columns else None
    answers: Labelled | NDArray[np.float64]
    if "label" in columns and ("prob" in columns or by_class):
        if "prob" in columns and by_class:
            raise InputError(f"{path} must have either prob or prob_<class> columns, got both; drop one of them")
        if by_class:
            labels = columns["label"]
            if len(classes) < 2:
                raise InputError(
                    f"{path} must have a prob_<class> column of every class, got {by_class[0]} alone; name it prob for "
                    "the positive class of two"
                )
            probs = np.stack([_shares(path, name, _numbers(path, columns, name)) for name in by_class], axis=1)
            _check_sums(path, probs)
        else:
            labels = columns["label"]
            share = _shares(path, "prob", _numbers(path, columns, "prob"))
            probs = np.stack([1 - share, share], axis=1)
            classes, positive = _two_classes(path, labels, positive)
        answers = Labelled(probs, _indices(path, labels, classes), classes)
        positive = _positive_of(classes, positive)
    elif "error" in columns and confidence is not None:
        answers = _shares(path, "error", _numbers(path, columns, "error"))
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
        f"{path} must have a column '{missing}', got {printable(', '.join(columns))}{nearest(missing, columns)}; it "
        f"needs {WAYS}"
    )


def _read_npz(path: Path, positive: str | None) -> Table:
    arrays = _load(path)
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
        named = np.atleast_1d(arrays.get("classes", np.arange(probs.shape[1])))
        if named.shape != probs.shape[1:]:
            raise InputError(
                f"classes must name the {probs.shape[1]} columns of {given[0]}, got shape {list(named.shape)}"
            )
        classes = [spelled(str(name)) for name in named]
        check_names(classes)
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
        return _indices(path, [spelled(str(name)) for name in values], classes)
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


def _pointed(path: Path, columns: Mapping[str, list[str]], names: Sequence[str]) -> dict[str, list[str]]:
    """Cells of columns of numbers with decimal points, where the table has decimal commas throughout.

    Raises:
        InputError: points and commas both occur, or the commas may part thousands.
    """
    found = {name: columns[name] for name in names}
    with_comma = [(at, cell) for cells in found.values() for at, cell in enumerate(cells) if "," in cell]
    if not with_comma:
        return found
    at, cell = with_comma[0]
    pointed = next((one for cells in found.values() for one in cells if "." in one), None)
    advice = "write numbers with a decimal point, and nothing between thousands"
    if pointed is not None:
        _wrong(path, "numbers", "written one way", f"'{cell}' beside '{pointed}'", at, advice)
    if all(_THOUSANDS.fullmatch(one) for _, one in with_comma):
        _wrong(path, "numbers", "told from thousands", f"'{cell}', which may be two numbers,", at, advice)
    return {
        name: [one.replace(",", ".") if _DECIMAL.fullmatch(one) else one for one in cells]
        for name, cells in found.items()
    }


def _numbers(path: Path, columns: Mapping[str, list[str]], column: str) -> NDArray[np.float64]:
    cells = columns[column]
    if "_" in "".join(cells):  # Python takes 1_0 for 10
        at = next(at for at, cell in enumerate(cells) if "_" in cell)
        _wrong(path, column, "a number", f"'{cells[at]}'", at)
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
    check_names(names[: MOST_CLASSES + 1], "labels")
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


def row_name(path: Path, index: int) -> str:
    """What a message calls the row with an index from 0."""
    # Spreadsheets count from 1 and arrays from 0; the word says which.
    return f"row {index + 1}" if is_table(path) else f"row {index} (from 0)"


def _wrong(path: Path, what: str, expected: str, got: str, at: int, advice: str = "") -> NoReturn:
    raise InputError(
        f"{what} must be {expected}, got {printable(got)} in {row_name(path, at)} of {path}; "
        f"{advice or 'mend or drop the row'}"
    )
