"""``stage1 metrics``: anybody's predictions against scikit-learn and the library; wrong files are told by their row."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as judge

import stage1_pro
from stage1_pro import cli
from stage1_pro.commands.metrics import measure
from stage1_pro.errors import InputError
from stage1_pro.metrics import augrc, aurc, bootstrap, bootstrap_errors, compare, ece
from stage1_pro.metrics.intervals import metric_names
from stage1_pro.studies.measuring import Measurement, render


def make(n: int = 300, *, k: int = 2, seed: int = 0, strength: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [N, K] with the six decimals of a CSV, and labels [N]."""
    rng = np.random.default_rng(seed)
    labels = np.random.default_rng(99).integers(0, k, n)
    powers = np.exp(rng.normal(size=(n, k)) + strength * np.eye(k)[labels] * rng.random((n, 1)))
    probs = np.round(powers / powers.sum(1, keepdims=True), 6)
    probs[:, 0] = 1 - probs[:, 1:].sum(1)
    return probs, labels


def write(path: Path, **columns: object) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def binary(path: Path, *, seed: int = 0, **columns: object) -> Path:
    probs, labels = make(seed=seed)
    return write(path, label=labels, prob=probs[:, 1], **columns)


def values(found: Measurement) -> dict[str, float | None]:
    return {one.metric: one.value for one in found.metrics}


GROUPS = [f"clip {i // 3}" for i in range(300)]


# --------------------------------------------------------------------------------------------
# Figures


def test_the_suite_of_a_csv_agrees_with_its_judges(tmp_path: Path) -> None:
    probs, labels = make()
    found = measure(binary(tmp_path / "p.csv", group=GROUPS), threshold=0.8, n_replicates=200)
    assert [one.metric for one in found.metrics][: len(metric_names())] == metric_names()
    sure, wrong = probs.max(1), probs.argmax(1) != labels
    exits = sure >= 0.8
    expected = {
        "augrc": augrc(sure, wrong),
        "aurc": aurc(sure, wrong),
        "accuracy": judge.accuracy_score(labels, probs.argmax(1)),
        "nll": judge.log_loss(labels, probs),
        "brier": judge.brier_score_loss(labels, probs[:, 1]),
        "coverage": exits.mean(),
        "exit_error": wrong[exits].mean(),
        "fnr_on_exited": (exits & wrong & (labels == 1)).sum() / (exits & (labels == 1)).sum(),
        "balanced_accuracy": judge.balanced_accuracy_score(labels, probs.argmax(1)),
        "mcc": judge.matthews_corrcoef(labels, probs.argmax(1)),
        "auroc": judge.roc_auc_score(labels, probs[:, 1]),
        "ece": ece(probs, labels),
    }
    assert {name: values(found)[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    direct = bootstrap(probs[:, 1], labels, groups=GROUPS, threshold=0.8, n_replicates=200)
    for name, one in direct.items():
        shown = found.metric(name)
        assert (shown.low, shown.high) == pytest.approx((one.low, one.high), nan_ok=True), name
        assert (shown.method, shown.note) == (one.method, one.note)
    assert (found.n_rows, found.n_units, found.unit, found.positive) == (300, 100, "groups", "1")


def test_every_form_of_the_same_predictions_gives_the_same_figures(tmp_path: Path) -> None:
    probs, labels = make()
    names = np.array(["none", "cone"])
    np.savez(tmp_path / "probs.npz", labels=labels, probs=probs)
    np.savez(tmp_path / "one.npz", labels=labels, probs=probs[:, 1])
    np.savez(tmp_path / "logits.npz", labels=labels, logits=np.log(probs))
    np.savez(tmp_path / "odds.npz", labels=labels, logits=np.log(probs[:, 1] / probs[:, 0]))
    np.savez(tmp_path / "named.npz", labels=names[labels], probs=probs, classes=names)
    files = [
        *(tmp_path / f"{name}.npz" for name in ("probs", "one", "logits", "odds", "named")),
        write(tmp_path / "wide.csv", label=names[labels], prob_none=probs[:, 0], prob_cone=probs[:, 1]),
        write(tmp_path / "turned.csv", label=names[labels], prob_cone=probs[:, 1], prob_none=probs[:, 0]),
        write(tmp_path / "names.csv", label=names[labels], prob=probs[:, 1]),
        write(tmp_path / "floats.csv", prob=probs[:, 1], label=labels.astype(float)),
    ]
    wanted = values(measure(binary(tmp_path / "p.csv"), threshold=0.7, n_replicates=20))
    assert wanted["fnr_on_exited"] is not None
    for file in files:
        found = measure(file, threshold=0.7, n_replicates=20)
        # A softmax may part two rows that six decimals hold equal.
        assert values(found) == pytest.approx(wanted, abs=1e-6), file.name
        assert found.positive == ("1" if file.stem in ("probs", "one", "logits", "odds", "floats") else "cone")


def test_errors_and_confidence_are_enough(tmp_path: Path) -> None:
    probs, labels = make()
    sure, wrong = probs.max(1), (probs.argmax(1) != labels).astype(int)
    file = write(tmp_path / "e.csv", error=wrong, confidence=sure, group=GROUPS)
    found = measure(file, threshold=0.8, n_replicates=100, seed=4, level=0.9, method="percentile")
    direct = bootstrap_errors(
        sure, wrong, groups=GROUPS, threshold=0.8, n_replicates=100, seed=4, level=0.9, method="percentile"
    )
    assert [one.metric for one in found.metrics] == list(direct)
    assert found.metric("augrc").low == direct["augrc"].low
    assert (found.classes, found.positive) == (None, None)
    np.savez(tmp_path / "e.npz", error=wrong, confidence=sure, group=GROUPS)
    again = measure(tmp_path / "e.npz", threshold=0.8, n_replicates=100, seed=4, level=0.9, method="percentile")
    assert again.metrics == found.metrics


def test_several_classes_and_ones_own_confidence(tmp_path: Path) -> None:
    probs, labels = make(k=4)
    names = ["a", "b", "c", "d"]
    columns = {f"prob_{name}": probs[:, i] for i, name in enumerate(names)}
    sure = np.random.default_rng(5).random(300) * 10
    file = write(tmp_path / "p.csv", label=[names[i] for i in labels], confidence=sure, **columns)
    found = measure(file, n_replicates=20, positive="c", out=tmp_path / "out")
    assert values(found)["augrc"] == pytest.approx(augrc(sure, probs.argmax(1) != labels))
    assert values(found)["auroc"] == pytest.approx(judge.roc_auc_score(labels == 2, probs[:, 2]))
    assert (tmp_path / "out" / "reliability.png").exists(), "calibration is of the probabilities, whatever ranks rows"
    none = measure(file, n_replicates=20, threshold=5)
    assert none.positive is None
    assert "fnr_on_exited" not in values(none) and "auroc" not in values(none)


def test_metrics_are_chosen_by_name(tmp_path: Path) -> None:
    file = binary(tmp_path / "p.csv")
    found = measure(file, metrics=["risk_at_coverage_0.95", "ece", "augrc"], n_replicates=20)
    assert [one.metric for one in found.metrics] == ["risk_at_coverage_0.95", "augrc", "ece"]
    assert [one.metric for one in measure(file, metrics=["ece"]).metrics] == ["ece"]
    assert measure(file, metrics="ece").n_units == 300
    with pytest.raises(InputError, match="got 'augrk'; did you mean 'augrc'"):
        measure(file, metrics=["augrk"])
    with pytest.raises(InputError, match="threshold must .*got inf"):
        measure(file, n_replicates=20, threshold=float("inf"))
    with pytest.raises(InputError, match="'fnr_on_exited'; it needs a threshold"):
        measure(file, metrics=["fnr_on_exited"])


def test_the_positive_class_is_told_by_name(tmp_path: Path) -> None:
    probs, labels = make()
    names = np.array(["left", "right"])[labels]
    file = write(tmp_path / "p.csv", label=names, prob=probs[:, 1])
    with pytest.raises(InputError, match="--positive must .*got none"):
        measure(file)
    right = measure(file, positive="right", n_replicates=20)
    assert values(right)["accuracy"] == np.mean(probs.argmax(1) == labels)
    left = measure(file, positive="left", n_replicates=20)
    assert values(left)["accuracy"] == pytest.approx(1 - np.mean(probs.argmax(1) == labels))
    with pytest.raises(InputError, match="got 'rigth'; did you mean 'right'"):
        measure(file, positive="rigth")
    only = write(tmp_path / "only.csv", label=["none"] * 4, prob=[0.1, 0.2, 0.3, 0.6])
    assert values(measure(only, positive="cone", n_replicates=20))["accuracy"] == 0.75


# --------------------------------------------------------------------------------------------
# Two files


def test_a_comparison_is_the_paired_difference(tmp_path: Path) -> None:
    ids = [f"photo {i}" for i in range(300)]
    a = binary(tmp_path / "a.csv", id=ids, group=GROUPS)
    b = binary(tmp_path / "b.csv", id=ids, seed=1)
    found = measure(a, compare_with=b, n_replicates=100)
    (probs_a, labels), (probs_b, _) = make(), make(seed=1)
    direct = compare(probs_a[:, 1], probs_b[:, 1], labels, groups=GROUPS, n_replicates=100)
    assert [one.metric for one in found.metrics] == list(direct)
    for name, one in direct.items():
        shown = found.metric(name)
        assert (shown.value, shown.low, shown.high) == pytest.approx((one.value, one.low, one.high), nan_ok=True)
        first, second = found.values[name]
        assert first is not None and second is not None
        assert shown.value == pytest.approx(first - second)
    itself = measure(a, compare_with=a, n_replicates=20)
    assert {one.value for one in itself.metrics} == {0.0}
    # Columns may stand in another order; rows may not.
    names = np.array(["none", "cone"])[labels]
    turned = write(tmp_path / "t.csv", label=names, prob_cone=probs_b[:, 1], prob_none=probs_b[:, 0])
    straight = write(tmp_path / "s.csv", label=names, prob_none=probs_a[:, 0], prob_cone=probs_a[:, 1])
    other = measure(straight, compare_with=turned, n_replicates=100)
    assert values(other) == pytest.approx(values(found))


def test_classes_in_another_order_are_put_right(tmp_path: Path) -> None:
    (probs_a, labels), (probs_b, _) = make(k=3), make(k=3, seed=1)
    names = ["a", "b", "c"]
    label = [names[i] for i in labels]
    a = write(tmp_path / "a.csv", label=label, **{f"prob_{names[i]}": probs_a[:, i] for i in (0, 1, 2)})
    b = write(tmp_path / "b.csv", label=label, **{f"prob_{names[i]}": probs_b[:, i] for i in (2, 0, 1)})
    found = measure(a, compare_with=b, n_replicates=20)
    direct = compare(probs_a, probs_b, labels, n_replicates=20)
    assert values(found) == pytest.approx({name: one.value for name, one in direct.items()})
    c = write(tmp_path / "c.csv", label=label, prob_a=probs_b[:, 0], prob_b=probs_b[:, 1], prob_c=probs_b[:, 2])
    d = write(tmp_path / "d.csv", label=["a"] * 300, prob_a=probs_b[:, 0], prob_b=probs_b[:, 1], prob_d=probs_b[:, 2])
    assert measure(a, compare_with=c, n_replicates=20).metrics == found.metrics
    with pytest.raises(InputError, match=r"d\.csv must .*got a, b, d"):
        measure(a, compare_with=d)


def test_other_rows_are_not_compared(tmp_path: Path) -> None:
    probs, labels = make()
    ids = np.arange(300)
    a = write(tmp_path / "a.csv", label=labels, prob=probs[:, 1], id=ids)
    swapped = np.concatenate([ids[:7], ids[8:9], ids[7:8], ids[9:]])
    b = write(tmp_path / "b.csv", label=labels[swapped], prob=probs[swapped, 1], id=swapped)
    with pytest.raises(InputError, match=r"b\.csv must .*got id '8' instead of '7' in row 8"):
        measure(a, compare_with=b)
    flipped = labels.copy()
    flipped[3] = 1 - flipped[3]
    c = write(tmp_path / "c.csv", label=flipped, prob=probs[:, 1])
    with pytest.raises(InputError, match=f"got label '{flipped[3]}' instead of '{labels[3]}' in row 4"):
        measure(a, compare_with=c)
    d = write(tmp_path / "d.csv", label=labels[:9], prob=probs[:9, 1])
    with pytest.raises(InputError, match="got 9 rows instead of 300"):
        measure(a, compare_with=d)
    e = write(tmp_path / "e.csv", error=labels, confidence=probs[:, 1])
    with pytest.raises(InputError, match=r"e\.csv must"):
        measure(a, compare_with=e)
    with pytest.raises(InputError, match="method must .*bca .*percentile"):
        measure(a, compare_with=a, method="logit")


# --------------------------------------------------------------------------------------------
# Wrong files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have a header line with label and prob, .* got an empty file"),
        ("label,prob\n", "must hold at least one row below its header"),
        ("lable,prob\n1,.5\n", "must have a column 'label', got lable, prob; did you mean 'lable'"),
        ("label,probs\n1,.5\n", "must have a column 'prob', got label, probs; did you mean 'probs'"),
        ("error,confidense\n1,.5\n", "must have a column 'confidence', got .* did you mean 'confidense'"),
        ("label,prob,prob\n1,.5,.5\n", "must name every column once, got 'prob' more than once"),
        ("label,prob\n1,.5\n0\n", "prob must be a number, got an empty cell in row 2"),
        ("label,prob\n1,.5,9\n", "must have 2 cells in every row.* got 3 in line 2"),
        ("label,prob\n1,.5\n0,high\n", "prob must be a number, got 'high' in row 2"),
        ("label,prob\n1,.5\n0,\n", "prob must be a number, got an empty cell in row 2"),
        ("label,prob\n1,nan\n", "prob must be a finite number, got 'nan' in row 1"),
        ("label,prob\n1,.5\n0,1.5\n", r"prob must be in \[0, 1\], got 1.5 in row 2 .* logits need a softmax"),
        ("label,prob\n1,.5\n2,.5\n", "label must be 0 or 1, got '2' in row 2"),
        ("label,prob\n1,.5\n,.5\n", "label must be 0, 1 or a name, got an empty cell in row 2"),
        ("label,prob\na,.5\nb,.5\nc,.5\n", "label must be one of a, b .* got 'c' in row 3"),
        ("label,prob_a,prob_b\na,.5,.5\nbb,.5,.5\n", "label must be one of a, b, got 'bb' in row 2"),
        ("label,prob_cone,prob_none\nconne,.5,.5\n", "got 'conne' in row 1 .*did you mean 'cone'"),
        ("label,prob_a,prob_b\na,.5,.4\n", "probabilities must be 1 in sum over the classes, got 0.9 in row 1"),
        ("label,prob_a\na,.5\n", "must have a prob_<class> column of every class, got prob_a alone"),
        ("label,prob,prob_a,prob_b\na,.5,.5,.5\n", "must have either prob or prob_<class> columns"),
        ("error,confidence\n2,.5\n", r"error must be in \[0, 1\], got 2 in row 1"),
        ("error,confidence\n1,inf\n", "confidence must be a finite number, got 'inf' in row 1"),
        ("label,prob,group\n1,.5,\n", "group must be a name in every row, got an empty cell in row 1"),
        ('label,prob\n1,"0.5\n', "must be a CSV, got in line 2: unexpected end of data"),
    ],
)
def test_wrong_csv_files_are_told(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.csv").write_text(text)
    assert cli.main(["metrics", str(tmp_path / "p.csv")]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert said.startswith("stage1: error: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": [0, 1]}, "must hold labels and probs, .* got labels"),
        ({"labels": [0, 1], "logts": [0, 1]}, "did you mean 'logts'"),
        ({"lables": [0, 1], "probs": [0.5, 0.5]}, "did you mean 'lables'"),
        ({"labels": [0, 2], "probs": [0.5, 0.5]}, "labels must be class indices 0 to 1, got 2 in row 1 .from 0."),
        ({"labels": [0, 1], "probs": [0.5, np.nan]}, "probs must be finite numbers, got NaN or infinity in row 1"),
        ({"labels": [0, 1], "probs": [0.5, 1.2]}, r"probs must be in \[0, 1\], got 1.2 in row 1"),
        ({"labels": [0, 1], "probs": [[0.5, 0.5], [0.5, 0.6]]}, "1 in sum over the classes, got 1.1 in row 1"),
        ({"labels": [0, 1, 1], "probs": [0.5, 0.5]}, "labels must be one per row of probs, got 3 for 2 rows"),
        ({"labels": [0, 1], "probs": [0.5, 0.5], "logits": [0, 0]}, "exactly one of probs and logits"),
        ({"labels": [0, 1], "probs": ["a", "b"]}, "probs must be numbers of shape"),
        ({"labels": [0, 1], "probs": [0.5, 0.5], "groups": [1]}, "groups must have one value per row"),
        ({"labels": [0, 1], "probs": [0.5, 0.5], "classes": ["a", "b", "c"]}, "classes must name the 2 columns"),
        ({"labels": [], "probs": []}, "must hold at least one row"),
        ({"labels": ["a", "x"], "probs": [0.5, 0.5], "classes": ["a", "b"]}, "got 'x' in row 1"),
    ],
)
def test_wrong_npz_files_are_told(arrays: dict[str, object], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", **{name: np.asarray(value) for name, value in arrays.items()})
    with pytest.raises(InputError, match=message):
        measure(tmp_path / "p.npz")


def test_files_that_cannot_be_read_and_arguments_out_of_range(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latin.csv").write_bytes(b"label,prob\n1,.5\n\xe4,.5\n")
    (tmp_path / "broken.npz").write_bytes(b"PK no zip")
    (tmp_path / "folder.csv").mkdir()
    file = str(binary(tmp_path / "p.csv"))
    for arguments, message in (
        ([str(tmp_path / "none.csv")], "must exist, but there is no such file"),
        ([str(tmp_path / "none.npz")], "must exist, but there is no such file"),
        ([str(tmp_path / "latin.csv")], "must be UTF-8 text"),
        ([str(tmp_path / "broken.npz")], "must be a NumPy .npz file"),
        ([str(tmp_path / "folder.csv")], "folder.csv"),
        ([str(tmp_path / "p.txt")], "FILE must end in .csv or .npz"),
        ([file, "--replicates", "0"], "--replicates must be 1 or more, got 0"),
        ([file, "--level", "1"], "--level must be inside (0, 1)"),
        ([file, "--seed", "-1"], "seed"),
        ([file, "--threshold", "nan"], "threshold must be a number"),
        ([file, "--metrics", ","], "metrics must name at least one metric"),
        ([file, "--out", file], "p.csv"),
    ):
        assert cli.main(["metrics", *arguments]) == 2, arguments
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said, said


@pytest.mark.parametrize("label", [0, 1])
def test_one_row_has_stated_answers(label: int, tmp_path: Path) -> None:
    found = measure(write(tmp_path / "p.csv", label=[label], prob=[0.7]), threshold=0.9, out=tmp_path / "out")
    assert values(found)["accuracy"] == label
    assert found.metric("auroc").value is None and "one class" in found.metric("auroc").note
    assert found.metric("exit_error").value is None
    assert "-" in render(found)
    json.loads((tmp_path / "out" / "metrics.json").read_text(), parse_constant=pytest.fail)


# --------------------------------------------------------------------------------------------
# Files and the command


def test_the_command_writes_table_json_figures_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = binary(tmp_path / "p.csv", group=GROUPS)
    out = tmp_path / "out"
    arguments = ["metrics", str(file), "--threshold", "0.8", "--replicates", "50", "--out", str(out)]
    assert cli.main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    found = Measurement.read(out / "metrics.json")
    assert printed == found.model_dump(mode="json")
    assert str(tmp_path) not in (out / "metrics.json").read_text() + (out / "report.html").read_text()
    with (out / "metrics.csv").open(newline="") as text:
        rows = list(csv.DictReader(text))
    assert [row["metric"] for row in rows] == [one.metric for one in found.metrics]
    assert float(rows[0]["low"]) == found.metric("augrc").low
    pictures = {p.stem for p in out.glob("*.png")}
    assert pictures == {"risk_coverage_curve", "augrc", "reliability", "confidence", "coverage", "fnr_on_exited"}
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(pictures)
    assert not re.search(r"<script|https?://|\bnan\b|\bNone\b", re.sub(r"base64,[^\"]+", "", page))
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert cli.main(arguments) == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    text = capsys.readouterr().out
    assert "augrc" in text and "95% interval" in text and "in 100 groups" in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_comparison_is_written_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = binary(tmp_path / "a.csv"), binary(tmp_path / "b.csv", seed=1)
    assert cli.main(["metrics", str(a), "--compare", str(b), "--replicates", "50", "--out", str(tmp_path / "o")]) == 0
    text = capsys.readouterr().out
    assert "A - B" in text and "an interval that holds 0 speaks for neither" in " ".join(text.split())
    with (tmp_path / "o" / "metrics.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    assert float(row["value"]) == pytest.approx(float(row["value_a"]) - float(row["value_b"]))
    assert "Which is better?" in (tmp_path / "o" / "report.html").read_text()
    assert (tmp_path / "o" / "difference_augrc.png").exists()


def test_the_base_install_is_enough(tmp_path: Path) -> None:
    file = binary(tmp_path / "p.csv")
    for name in ("torch", "transformers", "sklearn", "accelerate"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name}', name='{name}')\n")
    done = subprocess.run(
        [sys.executable, "-m", "stage1_pro.cli", "metrics", str(file), "--replicates", "50", "--out", "out"],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_manuals_metrics_agree() -> None:
    text = (Path(stage1_pro.__file__).parent / "manual" / "metrics.md").read_text(encoding="utf-8")
    snippet = next(part for part in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "bootstrap" in part)
    names: dict[str, object] = {}
    exec(snippet, names)  # the page's own text
    found, difference, value = names["found"], names["difference"], names["value"]
    assert found["augrc"].low <= value == found["augrc"].value <= found["augrc"].high  # type: ignore[index]
    assert difference["augrc"].value < 0  # type: ignore[index]


# --------------------------------------------------------------------------------------------
# ECE


def ece_by_hand(probs: np.ndarray, labels: np.ndarray, bins: int) -> float:
    total = 0.0
    for k in range(bins):
        inside = [(p.max(), p.argmax() == y) for p, y in zip(probs, labels, strict=True)
                  if k / bins < p.max() <= (k + 1) / bins]  # fmt: skip
        if inside:
            sure, right = (np.mean([pair[i] for pair in inside]) for i in (0, 1))
            total += len(inside) * abs(sure - right)
    return total / len(labels)


@pytest.mark.parametrize(("k", "bins"), [(2, 15), (5, 15), (3, 4), (2, 1)])
def test_ece_is_its_definition(k: int, bins: int) -> None:
    probs, labels = make(200, k=k)
    assert ece(probs, labels, bins=bins) == pytest.approx(ece_by_hand(probs, labels, bins), abs=1e-12)


def test_ece_of_stated_cases() -> None:
    sure = np.array([[0.1, 0.9]] * 10)
    assert ece(sure, [1] * 9 + [0]) == pytest.approx(0)
    assert ece(sure, [0] * 10) == pytest.approx(0.9)
    # A confidence on an edge belongs below it: .6 is in (8/15, 9/15], .601 is not.
    assert ece([[0.4, 0.6], [0.399, 0.601]], [1, 0]) == pytest.approx((0.4 + 0.601) / 2)
    assert ece([[0.4, 0.6], [0.4, 0.6]], [1, 0]) == pytest.approx(0.1)
    with pytest.raises(InputError, match="bins must .*1.*got 0"):
        ece(sure, [1] * 10, bins=0)
    with pytest.raises(InputError, match="at row 0"):
        ece([[np.nan, 0.5]], [1])
