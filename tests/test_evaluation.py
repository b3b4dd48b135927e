"""Evaluation against scikit-learn, its files, and the report as a reader gets it."""

from __future__ import annotations

import csv
import html.parser
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from sklearn import metrics as judge

from stage1_pro.artifacts import Evaluation, Merging, Predictions, Row, Splits, Thresholds
from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.metrics import plots
from stage1_pro.metrics.selective import augrc
from stage1_pro.policies.softmax import confidence, decide, fit_softmax_policy, softmax
from stage1_pro.report import training_picture
from stage1_pro.stations.evaluation import answer, evaluate, evaluate_predictions, find_mistakes, render

SPLITS = ("train", "val_select", "val_calib", "val_test")
FIGURES = (
    "risk_coverage_curve", "augrc", "reliability", "confidence", "fnr_on_exited", "coverage", "training_curve",
)  # fmt: skip
NASTY = "images/<script>alert('x')</script> & \"co\".png"


def make_predictions(
    n: int = 240, *, seed: int = 0, k: int = 2, split: str = "val_test", strength: float = 4.0
) -> Predictions:
    """Predictions with three sources, of which the last holds negatives alone, and two rows a group."""
    rng = np.random.default_rng(seed)
    sources = np.array([f"city{i // 2 % 3}" for i in range(n)])
    labels = np.where(sources == "city2", 0, rng.integers(0, k, n))
    signal = np.eye(k)[labels]
    logits_a = rng.normal(size=(n, k)) + strength * signal * rng.random((n, 1))
    logits_b = rng.normal(size=(n, k)) + 1.5 * strength * signal * rng.random((n, 1))
    return Predictions(
        row_ids=np.array([f"r{i}" for i in range(n)]),
        groups=np.array([f"g{i // 2}" for i in range(n)]),
        sources=sources,
        halves=np.array([""] * n),
        logits_a=logits_a.astype(np.float32),
        logits_b=logits_b.astype(np.float32),
        gate_logits=np.zeros(n, np.float32),
        labels=labels.astype(np.int64),
        classes=[f"class {i}" for i in range(k)],
        positive="class 1",
        split=split,
        split_hash=f"hash-of-{split}",
        model_fingerprint="m" * 64,
        preprocessing_fingerprint="p" * 64,
    )


def changed(predictions: Predictions, **values: object) -> Predictions:
    return Predictions(**{**predictions.__dict__, **values})  # type: ignore[arg-type]


def make_policy(predictions: Predictions, target: float = 0.1) -> Thresholds:
    return fit_softmax_policy(
        softmax(predictions.logits_a),
        predictions.labels,
        classes=predictions.classes,
        positive=predictions.positive,
        target_fnr=target,
        groups=predictions.groups,
        model_fingerprint=predictions.model_fingerprint,
        preprocessing_fingerprint=predictions.preprocessing_fingerprint,
    )


def make_run(run: Path, predictions: Predictions) -> None:
    """A run folder with the photos of ``predictions``, one with a hostile name, one broken, one gone."""
    run.mkdir(exist_ok=True)
    (run / "images").mkdir()
    names = [f"images/{i}.png" for i in range(predictions.labels.size)]
    wrong = np.flatnonzero(softmax(predictions.logits_a).argmax(1) != predictions.labels)
    shown = wrong[np.argsort(-confidence(softmax(predictions.logits_a))[wrong])]
    names[shown[0]] = NASTY
    rng = np.random.default_rng(0)
    for i, name in enumerate(names):
        if i == shown[1]:
            (run / name).write_bytes(b"no photo")
        elif i != shown[2]:
            path = run / "images" / "nasty.png" if name == NASTY else run / name
            Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(path)
    rows = [
        Row(
            id=str(predictions.row_ids[i]), file=names[i], label=predictions.classes[predictions.labels[i]],
            group=str(predictions.groups[i]), source=str(predictions.sources[i]), split="val_test", sha256="0",
        )
        for i in range(len(names))
    ]  # fmt: skip
    Splits(
        root=str(run), classes=predictions.classes, positive=predictions.positive, seed=0,
        fractions=dict.fromkeys(SPLITS, 0.25), counts={s: {} for s in SPLITS}, groups=dict.fromkeys(SPLITS, 0),
        hashes={s: f"hash-of-{s}" for s in SPLITS}, rows=rows,
        merging=Merging(pairs=0, components=0, largest_rows=0, largest_share=0, largest_groups=[]),
    ).write(run / "splits.json")  # fmt: skip


# --------------------------------------------------------------------------------------------
# Figures


@pytest.mark.parametrize("k", [2, 4])
def test_figures_agree_with_scikit_learn(k: int) -> None:
    predictions = make_predictions(k=k)
    policy = make_policy(predictions)
    found = evaluate_predictions(predictions, policy, n_replicates=50)
    probs_a, probs_b = softmax(predictions.logits_a), softmax(predictions.logits_b)
    out = decide(probs_a, policy)
    assert 0 < out.sum() < out.size
    cascade = np.where(out[:, None], probs_a, probs_b)
    for source in (None, "city0", "city1"):
        rows = np.ones(out.size, bool) if source is None else predictions.sources == source
        labels = predictions.labels[rows]
        for stage, probs in (("stage_a", probs_a), ("stage_b", probs_b), ("cascade", cascade)):
            given = probs[rows].argmax(1)
            assert found.value("accuracy", stage, source) == pytest.approx(judge.accuracy_score(labels, given))
            assert found.value("balanced_accuracy", stage, source) == pytest.approx(
                judge.balanced_accuracy_score(labels, given)
            )
            assert found.value("mcc", stage, source) == pytest.approx(judge.matthews_corrcoef(labels, given))
            assert found.value("auroc", stage, source) == pytest.approx(
                judge.roc_auc_score(labels == 1, probs[rows, 1])
            )
            interval = found.measure("augrc", stage, source)
            assert interval.value == pytest.approx(augrc(confidence(probs[rows]), given != labels))
            assert interval.low is not None and interval.high is not None
            assert interval.low <= interval.value <= interval.high


def test_exits_by_hand() -> None:
    predictions = make_predictions()
    policy = make_policy(predictions)
    found = evaluate_predictions(predictions, policy, n_replicates=20)
    probs = softmax(predictions.logits_a)
    out, given, labels = decide(probs, policy), probs.argmax(1), predictions.labels
    assert found.n_exited == out.sum()
    assert found.value("coverage", "stage_a") == out.mean()
    assert found.value("exit_accuracy", "stage_a") == np.mean(given[out] == labels[out])
    given_b = predictions.logits_b.argmax(1)
    assert found.value("deferred_accuracy", "stage_b") == np.mean(given_b[~out] == labels[~out])
    positives = out & (labels == 1)
    missed = positives & (given != 1)
    measure = found.measure("fnr_on_exited", "stage_a")
    assert (measure.value, measure.n) == (missed.sum() / positives.sum(), positives.sum())
    groups, bad = set(predictions.groups[positives]), set(predictions.groups[missed])
    assert measure.n_groups == len(groups)
    assert len(bad) > 0
    assert measure.high == pytest.approx(stats.beta.ppf(0.95, len(bad) + 1, len(groups) - len(bad)))
    assert measure.low is None
    wrong = np.where(out, given, given_b) != labels
    assert found.n_mistakes == wrong.sum()


def test_one_class_in_a_source_is_undefined_not_zero() -> None:
    predictions = make_predictions()
    found = evaluate_predictions(predictions, make_policy(predictions), n_replicates=20)
    for metric in ("auroc", "mcc"):
        assert found.value(metric, "stage_a", "city2") is None
    assert found.value("accuracy", "stage_a", "city2") is not None
    missing = found.measure("fnr_on_exited", "stage_a", "city2")
    assert (missing.value, missing.high, missing.n) == (None, None, 0)


def test_no_policy_leaves_exits_empty_and_says_so() -> None:
    found = evaluate_predictions(make_predictions(), n_replicates=20)
    assert (found.policy, found.n_exited, found.exit_threshold) == (None, None, None)
    for metric, stage in (("coverage", "stage_a"), ("fnr_on_exited", "stage_a"), ("deferred_accuracy", "stage_b")):
        assert found.value(metric, stage) is None
    with pytest.raises(KeyError):
        found.value("accuracy", "cascade")
    assert "No exit policy has been calibrated" in found.statement
    assert "No exit policy has been calibrated" in render(found)


def test_one_row_and_everything_right() -> None:
    predictions = make_predictions(1)
    found = evaluate_predictions(predictions, n_replicates=10)
    assert found.value("auroc", "stage_a") is None
    assert found.n_rows == 1
    sure = np.eye(2, dtype=np.float32)[make_predictions(40).labels] * 8
    right = evaluate_predictions(changed(make_predictions(40), logits_a=sure, logits_b=sure), n_replicates=10)
    interval = right.measure("augrc", "stage_a")
    assert interval.value == 0
    assert interval.high is None or interval.high > 0


def test_nobody_exits() -> None:
    predictions = make_predictions()
    policy = make_policy(predictions).model_copy(update={"exit_threshold": 1.0})
    found = evaluate_predictions(predictions, policy, n_replicates=10)
    assert found.value("coverage", "stage_a") == 0
    assert found.value("exit_accuracy", "stage_a") is None
    assert found.value("fnr_on_exited", "stage_a") is None
    assert found.value("accuracy", "cascade") == found.value("accuracy", "stage_b")


def test_the_same_seed_gives_the_same_evaluation() -> None:
    predictions = make_predictions()
    first, second = (evaluate_predictions(predictions, n_replicates=50, seed=3) for _ in range(2))
    assert first == second
    assert Evaluation.parse(first.model_dump_json(), "again") == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "val_calib"}, "predictions must be of val_test, got val_calib"),
        (
            {"model_fingerprint": "x" * 64},
            "the policy must be of this model, got one calibrated on mmmmmmmmmmmm instead of xxxxxxxxxxxx",
        ),
        ({"preprocessing_fingerprint": "x" * 64}, "the policy must be of this preprocessing"),
        ({"positive": "class 0"}, "the policy must be of the classes"),
    ],
)
def test_parts_that_do_not_belong_together(change: dict[str, object], message: str) -> None:
    predictions = make_predictions()
    with pytest.raises(ArtifactError, match=message):
        evaluate_predictions(changed(predictions, **change), make_policy(predictions))


def test_nan_logits_name_their_row() -> None:
    predictions = make_predictions()
    logits = predictions.logits_b.copy()
    logits[7, 1] = np.nan
    with pytest.raises(ArtifactError, match="logits of Stage B must be finite, got NaN or infinity for row r7"):
        evaluate_predictions(changed(predictions, logits_b=logits))
    with pytest.raises(InputError, match="n_replicates must be at least 1, got 0"):
        evaluate_predictions(predictions, n_replicates=0)


def test_mistakes_are_the_deployed_ones_surest_first() -> None:
    predictions = make_predictions()
    answers = answer(predictions, make_policy(predictions))
    found = find_mistakes(predictions, answers, [f"{i}.png" for i in range(predictions.labels.size)])
    deployed = answers["cascade"]
    assert len(found) == deployed.error.sum() > 0
    sure = [row["confidence"] for row in found]
    assert sure == sorted(sure, reverse=True)
    for row in found:
        i = int(str(row["file"]).removesuffix(".png"))
        assert row["label"] == predictions.classes[predictions.labels[i]] != row["predicted"]
        logits = predictions.logits_a if row["stage"] == "stage_a" else predictions.logits_b
        assert row["confidence"] == softmax(logits)[i].max()
        assert row["probability"] == softmax(logits)[i, 1]
    assert {row["stage"] for row in found} == {"stage_a", "stage_b"}


# --------------------------------------------------------------------------------------------
# Files and the report


class Page(html.parser.HTMLParser):
    """Tags and visible text of a page; complains of unclosed ones."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_evaluate_writes_everything(tmp_path: Path) -> None:
    predictions = make_predictions()
    run = tmp_path / "run"
    make_run(run, predictions)
    policy = make_policy(predictions)
    policy.write(run / "thresholds.json")
    (run / "metrics.csv").write_text("epoch,train_loss,accuracy,augrc\n0,0.9,0.6,0.2\n1,0.5,,0.1\n")
    found = evaluate(run, n_replicates=50, predictions=predictions)

    rows = read_csv(run / "evaluation" / "metrics.csv")
    assert len(rows) == len(found.measures)
    table = {(r["scope"], r["source"], r["stage"], r["metric"]): r for r in rows}
    assert float(table["all", "", "cascade", "accuracy"]["value"]) == found.value("accuracy")
    assert table["source", "city2", "stage_a", "auroc"]["value"] == ""
    assert Evaluation.read(run / "evaluation" / "evaluation.json") == found
    mistakes = read_csv(run / "evaluation" / "mistakes.csv")
    assert list(mistakes[0]) == [
        "file",
        "label",
        "predicted",
        "probability",
        "confidence",
        "stage",
        "group",
        "source",
        "id",
    ]
    assert len(mistakes) == found.n_mistakes
    for name in FIGURES:
        folder = "metrics" if name == "training_curve" else "evaluation"
        with Image.open(run / folder / f"{name}.png") as image:
            assert min(image.size) > 300
    assert [p.name for p in (run / "metrics").iterdir()] == ["training_curve.png"], "val_select's figures are no test's"
    assert not list(run.rglob("*.tmp"))

    text = (run / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.isdisjoint({"script", "link", "iframe"})
    assert all(str(value).startswith("data:") for name, value in page.attributes if name in ("src", "href"))
    assert not re.search(r"url\(|@import|https?://", text)
    figures = [i for i in page.images if str(i["src"]).startswith("data:image/png;base64,")]
    assert len(figures) == len(FIGURES)
    thumbnails = [i for i in page.images if str(i["src"]).startswith("data:image/jpeg;base64,")]
    assert thumbnails
    assert f"{found.n_rows} photos from {found.n_groups} separate groups" in page.text
    assert "Nothing is guaranteed." in page.text
    assert policy.statement in page.text
    assert "satisfied" not in page.text
    assert f"{found.n_mistakes} wrong answers" in page.text
    assert "city2" in page.text


def test_the_report_escapes_names_and_survives_lost_photos(tmp_path: Path) -> None:
    predictions = changed(make_predictions(), classes=["<b>none</b>", "a & b"], positive="a & b")
    run = tmp_path / "run"
    make_run(run, predictions)
    evaluate(run, n_replicates=20, predictions=predictions)
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in text
    assert "<b>none</b>" not in text
    page = Page(text)
    assert NASTY in page.text
    assert "<b>none</b>" in page.text
    # The hostile name's file is not there under that name, one photo is broken, one is gone.
    assert page.text.count("photo not readable") == 3
    assert "Nothing: there is no exit policy." in page.text
    assert "stage1 calibrate" in page.text


def test_the_report_is_the_same_bytes_again(tmp_path: Path) -> None:
    predictions = make_predictions()
    make_run(tmp_path / "run", predictions)
    pages = []
    for _ in range(2):
        evaluate(tmp_path / "run", n_replicates=20, predictions=predictions)
        pages.append((tmp_path / "run" / "report.html").read_bytes())
    assert pages[0] == pages[1]


def test_other_rows_are_refused(tmp_path: Path) -> None:
    predictions = make_predictions()
    make_run(tmp_path / "run", predictions)
    with pytest.raises(ArtifactError, match="predictions must be of val_test in .*splits.json, got other rows"):
        evaluate(tmp_path / "run", predictions=changed(predictions, split_hash="other"))
    with pytest.raises(ArtifactError, match="splits.json must exist"):
        evaluate(tmp_path)


def test_render_is_a_table(tmp_path: Path) -> None:
    predictions = make_predictions()
    text = render(evaluate_predictions(predictions, make_policy(predictions), n_replicates=20))
    for word in ("AUROC", "AUGRC", "city0", "cascade", "FNR on exits", "guarantee: none"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 120


def test_training_curve_is_tolerant(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    assert training_picture(file) is None
    for text in ("", "epoch,train_loss\n", "epoch,other\n0,1\n", "epoch,train_loss\n0,\n1,?\n"):
        file.write_text(text)
        assert training_picture(file) is None
    for text in ("epoch,train_loss,val_accuracy\n0,1,.5\n1,,.6\n", "train_loss\n1\n.5\n", "epoch,train_loss\n0,1\n1\n"):
        file.write_text(text)
        picture = training_picture(file)
        assert picture is not None and picture.png.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("sure", "wrong"), [([1.0], [0]), ([0.5], [1]), ([1.0, 1.0], [1, 1]), ([0.5, 0.5, 0.9], [0, 0, 0])]
)
def test_figures_of_degenerate_data(sure: list[float], wrong: list[int]) -> None:
    right = 1 - np.array(wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for png in (
            plots.risk_coverage_png(sure, wrong, point=(1.0, 0.5)),
            plots.reliability_png(sure, right),
            plots.confidence_png(sure, right, threshold=0.75),
        ):
            assert png.startswith(b"\x89PNG")


def test_evaluation_is_strict_json() -> None:
    found = evaluate_predictions(make_predictions(), n_replicates=10)
    json.loads(found.model_dump_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
