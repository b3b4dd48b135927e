"""Figures of each class equal scikit-learn's, and an evaluation shows them where there are more than two."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stage1_pro import metrics
from stage1_pro.errors import InputError
from stage1_pro.metrics.figures import confusion_png

judge = pytest.importorskip("sklearn.metrics")


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 60))
def test_figures_are_those_of_scikit_learn(seed: int, n_classes: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n)
    probs = np.round(rng.random((n, n_classes)), 1) + 0.05 + 0.5 * np.eye(n_classes)[labels]
    probs /= probs.sum(axis=1, keepdims=True)
    found, answers, every = metrics.by_class(probs, labels), probs.argmax(axis=1), list(range(n_classes))
    assert found.confusion == judge.confusion_matrix(labels, answers, labels=every).tolist()
    figures = judge.precision_recall_fscore_support(labels, answers, labels=every, zero_division=np.nan)
    for k, one in enumerate(found.classes):
        mine_theirs = zip((one.precision, one.recall, one.f1, one.n), (column[k] for column in figures), strict=True)
        for mine, theirs in mine_theirs:
            assert mine == pytest.approx(theirs) if mine is not None else np.isnan(theirs)
        if 0 < one.n < n:
            assert one.auroc == pytest.approx(judge.roc_auc_score(labels == k, probs[:, k]))
            assert one.average_precision == pytest.approx(judge.average_precision_score(labels == k, probs[:, k]))
        else:
            assert one.auroc is None
    if n_classes > 2 and np.unique(labels).size == n_classes:
        assert found.macro_auroc == pytest.approx(
            judge.roc_auc_score(labels, probs, multi_class="ovr", average="macro", labels=every)
        )
        assert found.macro_f1 == pytest.approx(judge.f1_score(labels, answers, average="macro"))
    for k in every:
        share = metrics.top_k_accuracy(probs, labels, k + 1)
        beaten = [(probs[i] > probs[i, label]).sum() + (probs[i, :label] == probs[i, label]).sum()
                  for i, label in enumerate(labels)]  # fmt: skip
        assert share == pytest.approx(np.mean(np.array(beaten) <= k))


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(InputError, match="k must be from 1 to the 2 classes, got 3"):
        metrics.top_k_accuracy([[0.5, 0.5]], [0], 3)
    with pytest.raises(InputError, match="classes must"):
        metrics.by_class([[0.5, 0.5]], [0], ["one"])


def test_the_picture_is_a_png_of_any_number_of_classes() -> None:
    for n in (2, 7, 30):
        assert confusion_png(np.eye(n), [f"a long name of class {i}" for i in range(n)])[:4] == b"\x89PNG"


@pytest.mark.slow
def test_an_evaluation_shows_every_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four classes, from a table of labels to the report."""
    pytest.importorskip("torch")
    from PIL import Image

    from stage1_pro import cli

    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    lines = ["file,label,group"]
    for i in range(240):
        k = i % 4
        pixels = rng.integers(0, 90, (32, 32, 3)) + np.array([[150, 0, 0], [0, 150, 0], [0, 0, 150], [90, 90, 0]])[k]
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / f"{i}.png")
        lines.append(f"{i}.png,{('red', 'green', 'blue', 'olive')[k]},place {i // 2}")
    (tmp_path / "photos" / "labels.csv").write_text("\n".join(lines) + "\n")
    run = tmp_path / "run"
    chosen = ("model.image_size=32", "train.workers=0", "train.epochs=6", "gate.folds=2")
    shown = [word for one in chosen for word in ("--set", one)]
    given_words = ["--labels", str(tmp_path / "photos" / "labels.csv"), "--positive", "red"]
    assert cli.main(["split", *given_words, "--out", str(run)]) == 0
    assert cli.main(["train", "--run", str(run), *shown]) == 0
    assert cli.main(["calibrate", "--run", str(run), "--guarantee", "none", "--exit-error", ".3"]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", "--run", str(run), "--replicates", "20"]) == 0
    said = capsys.readouterr().out
    assert "class, cascade" in said and "macro AUROC" in said and all(name in said for name in ("red", "olive"))
    with (run / "evaluation" / "classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and {row["class"] for row in rows} == {"red", "green", "blue", "olive"}
    with (run / "evaluation" / "confusion.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert sum(int(row[f"answer_{name}"]) for row in table for name in ("red", "green", "blue", "olive")) == 3 * sum(
        int(row["n"]) for row in rows if row["stage"] == "cascade"
    )
    assert (run / "evaluation" / "confusion.png").is_file()
    assert "Which classes are taken for which" in (run / "report.html").read_text()
