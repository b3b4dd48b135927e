"""What answers do to each class: confusion matrix, precision, recall, F1, AUROC, average precision, top-k."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from stage1_pro.arguments import names, whole
from stage1_pro.errors import InputError
from stage1_pro.metrics.probabilistic import auroc, check_probabilities
from stage1_pro.metrics.ranking import average_precision
from stage1_pro.record import Record
from stage1_pro.tables import Sheet, grid

CLASS_COLUMNS = (
    "stage",
    "class",
    "n",
    "n_answers",
    "n_right",
    "precision",
    "recall",
    "f1",
    "auroc",
    "average_precision",
)


class ClassFigures(Record):
    """One class against the rest; higher is better, null where it is undefined."""

    name: str
    n: int = Field(ge=0, description="rows of it")
    n_answers: int = Field(ge=0, description="rows that are answered so")
    n_right: int = Field(ge=0)
    precision: float | None = Field(ge=0, le=1, description="n_right / n_answers")
    recall: float | None = Field(ge=0, le=1, description="n_right / n")
    f1: float | None = Field(ge=0, le=1, description="2 n_right / (n + n_answers)")
    auroc: float | None = Field(ge=0, le=1, description="of its probability, against all other rows")
    average_precision: float | None = Field(ge=0, le=1, description="AUPRC as a sum of steps")


class ByClass(Record):
    """Figures of every class, and their means over the classes in which they are defined."""

    confusion: list[list[int]] = Field(description="rows by label (down) and answer (across)")
    classes: list[ClassFigures]
    macro_f1: float | None
    macro_auroc: float | None
    top_2: float | None = Field(description="share of rows whose class is among the two most probable; null of two")


def by_class(probs: ArrayLike, labels: ArrayLike, classes: Sequence[str] | None = None) -> ByClass:
    """Figures of every class; the answer is the most probable class, the first one on a tie.

    Args:
        probs: [N, K] probabilities.
        labels: [N] class indices.
        classes: K names; 0, 1, ... by default.

    Raises:
        InputError: an argument is not what it must be.
    """
    values, truth = check_probabilities(probs, labels)
    n_classes = values.shape[1]
    given = range(n_classes) if classes is None else names("classes", classes, n_classes, like="probs has columns")
    answers = values.argmax(axis=1)
    confusion = np.bincount(truth * n_classes + answers, minlength=n_classes**2).reshape(n_classes, n_classes)
    found = []
    for k, name in enumerate(given):
        n, answered, right = int(confusion[k].sum()), int(confusion[:, k].sum()), int(confusion[k, k])
        found.append(
            ClassFigures(
                name=str(name), n=n, n_answers=answered, n_right=right,
                precision=right / answered if answered else None, recall=right / n if n else None,
                f1=2 * right / (n + answered) if n + answered else None,
                auroc=_known(auroc(values[:, k], truth == k)),
                average_precision=_known(average_precision(values[:, k], truth == k)),
            )
        )  # fmt: skip
    return ByClass(
        confusion=confusion.tolist(), classes=found, macro_f1=_mean([one.f1 for one in found]),
        macro_auroc=_mean([one.auroc for one in found]),
        top_2=top_k_accuracy(values, truth, 2) if n_classes > 2 else None,
    )  # fmt: skip


def macro_auroc(probs: ArrayLike, labels: ArrayLike) -> float:
    """AUROC of each class against the rest, as a mean over the classes in which it is defined, in [0, 1]; NaN of none.

    Args:
        probs: [N, K] probabilities.
        labels: [N] class indices.

    Raises:
        InputError: an argument is not what it must be.
    """
    values, truth = check_probabilities(probs, labels)
    found = _mean([_known(auroc(column, truth == k)) for k, column in enumerate(values.T)])
    return math.nan if found is None else found


def top_k_accuracy(probs: ArrayLike, labels: ArrayLike, k: int) -> float:
    """Share of rows whose class is among the k most probable, in [0, 1]; of equal ones the first classes count.

    Args:
        probs: [N, K] probabilities.
        labels: [N] class indices.
        k: from 1 to K.

    Raises:
        InputError: an argument is not what it must be.
    """
    values, truth = check_probabilities(probs, labels)
    if whole("k", k) < 1 or k > values.shape[1]:
        raise InputError(f"k must be from 1 to the {values.shape[1]} classes, got {k}")
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    return float((order == truth[:, None]).any(axis=1).mean())


def class_rows(stage: str, found: ByClass) -> list[dict[str, object]]:
    """A row of ``classes.csv`` for every class of a stage."""
    return [
        {"stage": stage, "class": one.name, **{name: getattr(one, name) for name in CLASS_COLUMNS[2:]}}
        for one in found.classes
    ]


def confusion_rows(stage: str, found: ByClass) -> list[dict[str, object]]:
    """A row of ``confusion.csv`` for every label of a stage, with how many rows of it were answered as each class."""
    names = [one.name for one in found.classes]
    return [
        {"stage": stage, "label": name, **dict(zip((f"answer_{one}" for one in names), counts, strict=True))}
        for name, counts in zip(names, found.confusion, strict=True)
    ]


def add_classes(sheet: Sheet, title: str, found: ByClass) -> None:
    """Show a row a class, and the means over all classes."""
    columns = ("rows", "answers", "precision", "recall", "F1", "AUROC", "AUPRC")
    table = grid((title, *columns), left=(title,))
    for one in found.classes:
        rates = (one.precision, one.recall, one.f1, one.auroc, one.average_precision)
        shown = ("-" if rate is None else f"{rate:.3f}" for rate in rates)
        table.add_row(one.name[:24], str(one.n), str(one.n_answers), *shown)
    sheet.add(table)
    means = {"macro F1": found.macro_f1, "macro AUROC": found.macro_auroc, "among the two most probable": found.top_2}
    sheet.add("; ".join(f"{name} {value:.3f}" for name, value in means.items() if value is not None))


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [one for one in values if one is not None]
    return float(np.mean(known)) if known else None
