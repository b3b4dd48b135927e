"""The softmax policy against brute force, and calibration of runs and of anybody's logits."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from fitting import fit_softmax_policy
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from stage1_pro.classes import choose_positive
from stage1_pro.commands.calibrate import calibrate
from stage1_pro.data.predictions import Predictions
from stage1_pro.data.splits import Merging, Row, Splits
from stage1_pro.errors import ArtifactError, InputError, NotReachableError
from stage1_pro.metrics.binomial import clopper_pearson_upper
from stage1_pro.policies.counts import SWEEP_ROWS, gaps
from stage1_pro.policies.policy import read_policy
from stage1_pro.policies.rows import groups_in_error
from stage1_pro.policies.softmax import GRID, Thresholds, confidence, softmax
from stage1_pro.training.calibration import render

BINARY = {"classes": ["none", "roadwork"], "positive": "roadwork"}


def noisy(n: int, *, seed: int = 0, k: int = 2, strength: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits [n, k] float32 that know something of the labels [n]."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    logits = rng.normal(size=(n, k)) + strength * np.eye(k)[labels] * rng.random((n, 1))
    return logits.astype(np.float32), labels


# --------------------------------------------------------------------------------------------
# Probabilities and confidence


def test_softmax_agrees_with_scipy_and_survives_extremes() -> None:
    logits, _ = noisy(500, k=5, strength=30)
    np.testing.assert_allclose(softmax(logits), special.softmax(logits.astype(np.float64), axis=1), rtol=1e-13)
    assert softmax(logits).dtype == np.float64
    np.testing.assert_array_equal(softmax([[1e5, -1e5], [-np.inf, 0.0]]), [[1, 0], [0, 1]])
    assert softmax(np.zeros((0, 3))).shape == (0, 3)


def test_rows_with_nan_stay_nan_and_never_exit() -> None:
    probs = softmax([[np.nan, 1.0], [np.inf, 0.0], [9.0, 0.0]])
    assert np.isnan(probs[:2]).all()
    assert np.isnan(confidence(probs)[:2]).all()
    labels = np.array([0, 1])
    policy = fit_softmax_policy([[0.9, 0.1], [0.2, 0.8]], labels, **BINARY)
    assert policy.exits(probs).tolist() == [False, False, True]


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(InputError, match=r"logits must have shape \[N, K\], got \[2\]"):
        softmax([0.1, 0.2])
    with pytest.raises(InputError, match=r"probs must have shape \[N, K\], got \[2\]"):
        confidence([0.1, 0.2])
    policy = fit_softmax_policy([[0.9, 0.1], [0.2, 0.8]], [0, 1], **BINARY)
    with pytest.raises(InputError, match=r"probs must have shape \[N, 2\] as the policy's classes, got \[1, 3\]"):
        policy.exits([[0.2, 0.3, 0.5]])


# --------------------------------------------------------------------------------------------
# The choice


@st.composite
def small_cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, str]:
    """Probabilities on a coarse grid (many ties), labels, the positive class and a decimal target."""
    k = draw(st.integers(2, 4))
    n = draw(st.integers(1, 24))
    counts = draw(st.lists(st.lists(st.integers(0, 6), min_size=k, max_size=k).filter(any), min_size=n, max_size=n))
    labels = draw(st.lists(st.integers(0, k - 1), min_size=n, max_size=n))
    probs = np.array(counts, dtype=np.float64)
    target = draw(st.sampled_from(["0.02", "0.1", "0.125", "0.2", "0.25", "0.3", "0.5", "0.75", "0.9"]))
    return probs / probs.sum(1, keepdims=True), np.array(labels), draw(st.integers(0, k - 1)), target


def brute_force(probs: np.ndarray, labels: np.ndarray, positive: int, target: str) -> int | None:
    """The most rows that may exit, trying every confidence as the threshold, in exact fractions."""
    best = None
    for threshold in {max(row) for row in probs.tolist()}:
        rows = [i for i, row in enumerate(probs.tolist()) if max(row) >= threshold]
        positives = [i for i in rows if labels[i] == positive]
        missed = [i for i in positives if probs[i].tolist().index(max(probs[i])) != positive]
        if positives and Fraction(len(missed), len(positives)) <= Fraction(target):
            best = max(best or 0, len(rows))
    return best


@settings(max_examples=300, deadline=None)
@given(small_cases())
def test_the_choice_is_the_brute_force_optimum(case: tuple[np.ndarray, np.ndarray, int, str]) -> None:
    probs, labels, positive, target = case
    classes = [f"c{i}" for i in range(probs.shape[1])]
    wanted = brute_force(probs, labels, positive, target)
    if wanted is None:
        with pytest.raises(NotReachableError, match="No policy was written"):
            fit_softmax_policy(probs, labels, classes=classes, positive=classes[positive], target_fnr=float(target))
        return
    policy = fit_softmax_policy(probs, labels, classes=classes, positive=classes[positive], target_fnr=float(target))
    exited = policy.exits(probs)
    assert exited.sum() == policy.n_exited == wanted
    truth, answer = labels[exited] == positive, probs.argmax(1)[exited]
    assert policy.n_positive_exited == truth.sum()
    assert policy.n_false_negative == (truth & (answer != positive)).sum()
    assert policy.fnr_on_exited == policy.n_false_negative / policy.n_positive_exited
    assert policy.exit_accuracy == np.mean(answer == labels[exited])
    assert policy.coverage == exited.mean()
    for row in policy.sweep_results:
        out = probs.max(1) >= row.threshold
        assert row.n_exited == out.sum()
        assert row.n_positive_exited == (out & (labels == positive)).sum()
        assert (row.fnr_on_exited is None) == (row.n_positive_exited == 0)
        assert (row.exit_accuracy is None) == (row.n_exited == 0)
    order = np.random.default_rng(0).permutation(labels.size)
    shuffled = fit_softmax_policy(
        probs[order], labels[order], classes=classes, positive=classes[positive], target_fnr=float(target)
    )
    assert shuffled == policy


@pytest.mark.parametrize(
    ("missed", "positives", "target"), [(1, 50, 0.02), (3, 100, 0.03), (7, 100, 0.07), (29, 100, 0.29)]
)
def test_a_target_is_met_at_exact_equality(missed: int, positives: int, target: float) -> None:
    # .29 * 100 is 28.999999999999996 in floats: a product would refuse what is exactly 29%.
    right = np.tile([0.1, 0.9], (positives - missed, 1))
    probs = np.vstack([right, np.tile([0.9, 0.1], (missed, 1))])
    policy = fit_softmax_policy(probs, np.ones(positives, int), **BINARY, target_fnr=target)
    assert (policy.n_exited, policy.n_false_negative) == (positives, missed)
    with pytest.raises(NotReachableError):
        fit_softmax_policy(probs, np.ones(positives, int), **BINARY, target_fnr=target - 1e-9)


def test_the_threshold_stands_in_the_middle_of_the_gap() -> None:
    probs = [[0.02, 0.98], [0.9, 0.1], [0.3, 0.7], [0.6, 0.4]]
    policy = fit_softmax_policy(probs, [1, 0, 1, 1], **BINARY)
    assert policy.exit_threshold == pytest.approx((0.7 + 0.6) / 2)
    assert policy.exit_upper_threshold == policy.exit_threshold
    assert policy.exit_lower_threshold == pytest.approx(1 - policy.exit_threshold)
    everything = fit_softmax_policy(probs[:3], [1, 0, 1], **BINARY)
    assert everything.coverage == 1
    assert everything.exit_threshold == pytest.approx((0.7 + 0.5) / 2)


def test_rounding_parts_no_photo_from_its_copy() -> None:
    """One photo five times in a batch has up to three scores in torch and one in onnxruntime: all exit, or none."""
    sure = np.array([0.9, 0.75, 0.75 - 1e-7, 0.75 + 2e-7, np.nextafter(0.75, 0), 0.75, 0.7])
    right = np.array([1, 1, 0, 0, 0, 1, 0])
    for target in (0.2, 0.4, 0.55, 0.7):
        probs = np.stack([np.where(right, 1 - sure, sure), np.where(right, sure, 1 - sure)], axis=1)
        policy = fit_softmax_policy(probs, np.ones(7, dtype=int), **BINARY, target_fnr=target)
        copies = sure[1:6] >= policy.exit_threshold
        assert copies.all() or not copies.any()
    # Where scores that differ only by rounding go on and on, each stands for itself.
    dense = np.linspace(0.8, 0.7999, 2000)
    last, thresholds = gaps(dense, 0.5)
    assert last.size == dense.size and np.all(np.diff(thresholds) < 0)
    # Of scores of unknown scale neighbouring floats are two numbers.
    last, thresholds = gaps(np.array([0.75, np.nextafter(0.75, 0)]), -np.inf)
    assert last.tolist() == [0, 1] and thresholds[0] == 0.75


def test_rounding_of_a_runtime_flips_no_calibration_row() -> None:
    logits, labels = noisy(400, seed=3)
    policy = fit_softmax_policy(softmax(logits), labels, **BINARY, target_fnr=0.1)
    rng = np.random.default_rng(1)
    for _ in range(20):
        shaken = softmax(logits + rng.uniform(-1e-6, 1e-6, logits.shape))
        assert policy.exits(shaken).tolist() == policy.exits(softmax(logits)).tolist()


def test_grid_and_thinned_sweep() -> None:
    logits, labels = noisy(5000, seed=1)
    policy = fit_softmax_policy(softmax(logits), labels, **BINARY)
    grid = [row.threshold for row in policy.sweep_results if row.grid]
    swept = [row.threshold for row in policy.sweep_results if not row.grid]
    assert grid == list(GRID)
    assert 500 < len(swept) <= SWEEP_ROWS
    assert policy.exit_threshold in swept
    thresholds = [row.threshold for row in policy.sweep_results]
    assert thresholds == sorted(thresholds)


def test_several_classes_have_no_lower_threshold() -> None:
    logits, labels = noisy(900, k=3, strength=9)
    policy = fit_softmax_policy(softmax(logits), labels, classes=["a", "b", "c"], positive="b", target_fnr=0.05)
    assert policy.exit_lower_threshold is None
    assert 1 / 3 <= policy.exit_threshold <= 1


def test_a_million_rows_are_quick() -> None:
    logits, labels = noisy(10**6)
    probs = softmax(logits)
    began = time.perf_counter()
    fit_softmax_policy(probs, labels, **BINARY)
    assert time.perf_counter() - began < 8


# --------------------------------------------------------------------------------------------
# What the choice says of itself


def test_it_never_promises() -> None:
    logits, labels = noisy(300, seed=5)
    policy = fit_softmax_policy(softmax(logits), labels, **BINARY, target_fnr=0.1)
    assert policy.guarantee == "none"
    assert "Empirical choice, no guarantee: nothing is promised for new images" in policy.statement
    assert "not corrected for that search" in policy.statement
    said = policy.model_dump_json() + render(policy)
    for word in ("satisfied", "certified", "guaranteed"):
        assert word not in said.lower()


def test_the_bound_counts_groups() -> None:
    # Ten exited positive tracks of 20 rows; one row of one track is missed.
    probs = np.tile([0.1, 0.9], (200, 1))
    probs[0] = [0.95, 0.05]
    groups = np.repeat([f"track{i}" for i in range(10)], 20)
    labels = np.ones(200, int)
    policy = fit_softmax_policy(probs, labels, **BINARY, groups=groups)
    assert policy.grouped
    assert policy.n_positive_groups == 10
    assert policy.fnr_on_exited == 1 / 200
    assert policy.fnr_upper_bound == pytest.approx(stats.beta.ppf(0.95, 2, 9))
    assert "10 groups" in policy.statement
    assert "missed 1 of 10" in policy.bound_method
    alone = fit_softmax_policy(probs, labels, **BINARY)
    assert (alone.grouped, alone.n_positive_groups) == (False, 200)
    assert alone.fnr_upper_bound == pytest.approx(stats.beta.ppf(0.95, 2, 199))
    singles = fit_softmax_policy(probs, labels, **BINARY, groups=np.arange(200))
    assert singles == alone


@given(st.integers(0, 60), st.integers(0, 60), st.sampled_from([0.9, 0.95, 0.99]))
def test_clopper_pearson_solves_its_equation(errors: int, right: int, level: float) -> None:
    bound = clopper_pearson_upper(errors, errors + right, level=level)
    if right == 0:
        assert bound == 1
    else:
        assert stats.binom.cdf(errors, errors + right, bound) == pytest.approx(1 - level, rel=1e-6)


def test_groups_in_error_counts_by_hand() -> None:
    assert groups_in_error([True, False, True, False], ["a", "a", "a", "b"]) == (1, 2)
    assert groups_in_error([True, False, True]) == (2, 3)
    assert groups_in_error([], []) == (0, 0)
    with pytest.raises(InputError, match=r"k must be from 0 to n, got k = 3, n = 2"):
        clopper_pearson_upper(3, 2)
    with pytest.raises(InputError, match=r"level must be in \(0, 1\), got 1"):
        clopper_pearson_upper(0, 2, level=1)


# --------------------------------------------------------------------------------------------
# Not reachable, and wrong input


def test_not_reachable_says_what_would_be() -> None:
    probs = [[0.95, 0.05], [0.1, 0.9], [0.2, 0.8], [0.7, 0.3]]
    with pytest.raises(NotReachableError) as caught:
        fit_softmax_policy(probs, [1, 1, 1, 0], **BINARY, groups=["a", "a", "b", "c"])
    said = str(caught.value)
    assert "FNR on exits <= 0.02 must be reachable" in said
    assert "the smallest FNR on exits is 0.3333 (1 of 3), at threshold 0.6 with coverage 1" in said
    assert caught.value.exit_code == 3


def test_no_positive_at_all_is_not_reachable() -> None:
    with pytest.raises(NotReachableError, match="none of the 2 rows is of the class 'roadwork'"):
        fit_softmax_policy([[0.9, 0.1], [0.8, 0.2]], [0, 0], **BINARY)


def test_one_row() -> None:
    policy = fit_softmax_policy([[0.1, 0.9]], [1], **BINARY)
    assert (policy.coverage, policy.fnr_on_exited, policy.n_rows) == (1, 0, 1)
    assert policy.fnr_upper_bound == pytest.approx(0.95)
    with pytest.raises(NotReachableError, match="smallest FNR on exits is 1"):
        fit_softmax_policy([[0.9, 0.1]], [1], **BINARY)


@pytest.mark.parametrize(
    ("probs", "labels", "changes", "message"),
    [
        ([[0.5, 0.5], [np.nan, 0.5]], [0, 1], {}, "probs must be free of NaN, got NaN in row 1"),
        ([[0.5, 0.6]], [0], {}, "probs must sum to 1 in each row, got 1.1 in row 0; pass logits through softmax"),
        ([[1.5, -0.5]], [0], {}, r"probs must be in \[0, 1\], got \[1.5, -0.5\] in row 0"),
        ([[0.5, 0.5]], [2], {}, r"labels must be class indices 0 to 1, got 2 at row 0"),
        ([[0.5, 0.5]], [-1], {}, r"labels must be class indices 0 to 1, got -1 at row 0"),
        ([[0.5, 0.5]], [0.5], {}, r"labels must be class indices 0 to 1, got 0.5 at row 0"),
        ([[0.5, 0.5]], ["none"], {}, r"labels must be class indices, got text"),
        ([[0.5, 0.5]], [0, 1], {}, r"labels must have shape \[1\] as probs has rows, got \[2\]"),
        (np.zeros((0, 2)), [], {}, r"probs must have shape \[N, 2\] with at least one row, got \[0, 2\]"),
        ([[0.2, 0.3, 0.5]], [0], {}, r"probs must have shape \[N, 2\] with at least one row, got \[1, 3\]"),
        ([[0.5, 0.5]], [0], {"groups": ["a", "b"]}, r"groups must have shape \[1\] as probs has rows, got \[2\]"),
        (
            [[0.5, 0.5]],
            [0],
            {"positive": "roadwrk"},
            "positive must be one of none, roadwork, got 'roadwrk'; did you mean 'roadwork'",
        ),
        ([[0.5, 0.5]], [0], {"target_fnr": 1.0}, r"fnr must be inside \(0, 1\), got 1.0"),
        ([[0.5, 0.5]], [0], {"target_fnr": float("nan")}, r"fnr must be inside \(0, 1\), got nan"),
        ([[0.5, 0.5]], [0], {"classes": ["a", "a"]}, "classes must be at least two different names"),
    ],
)
def test_wrong_input_is_named(probs: object, labels: object, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_softmax_policy(probs, labels, **{**BINARY, **changes})  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------
# The station


def make_run(
    run: Path, *, n: int = 200, split: str = "val_calib", seed: int = 0, strength: float = 12.0
) -> Predictions:
    """A run folder with splits.json and predictions of one split, two rows a group."""
    logits, labels = noisy(n, seed=seed, strength=strength)
    classes = ["none", "roadwork"]
    rows = [
        Row(
            id=f"r{i}",
            file=f"images/{i}.png",
            label=classes[y],
            group=f"g{i // 2}",
            source=f"city{i % 3}",
            split=split,
            half="fit" if i // 2 % 2 == 0 else "certify",
            sha256=f"{i}",
        )
        for i, y in enumerate(labels)
    ]
    names = ("train", "val_select", "val_calib", "val_test")
    Splits(
        root=str(run),
        classes=classes,
        positive="roadwork",
        seed=0,
        fractions=dict.fromkeys(names, 0.25),
        counts={name: {} for name in names},
        groups=dict.fromkeys(names, 0),
        hashes={name: f"hash-of-{name}" for name in (*names, "val_calib.fit", "val_calib.certify")},
        merging=Merging(pairs=0, components=0, largest_rows=0, largest_share=0, largest_groups=[]),
        rows=rows,
    ).write(run / "splits.json")
    predictions = Predictions(
        row_ids=np.array([row.id for row in rows]),
        groups=np.array([row.group for row in rows]),
        sources=np.array([row.source for row in rows]),
        halves=np.array([row.half for row in rows]),
        logits_a=logits,
        logits_b=logits + np.float32(0.5),
        gate_logits=np.abs(logits[:, 1] - logits[:, 0]),
        labels=labels,
        classes=classes,
        positive="roadwork",
        split=split,
        split_hash=f"hash-of-{split}",
        model_fingerprint="m" * 64,
        preprocessing_fingerprint="p" * 64,
    )
    predictions.save(run / f"{split}.npz")
    return predictions


def test_calibrate_writes_the_only_policy_of_a_run(tmp_path: Path) -> None:
    predictions = make_run(tmp_path)
    (tmp_path / "gateparams.json").write_text("{}")
    policy = calibrate(tmp_path, guarantee="none", target_fnr=0.1)
    assert not (tmp_path / "gateparams.json").exists()
    assert read_policy(tmp_path) == policy
    written = json.loads((tmp_path / "thresholds.json").read_text())
    jsonschema.validate(written, Thresholds.model_json_schema())
    for key in ("exit_threshold", "exit_lower_threshold", "exit_upper_threshold", "fnr_on_exited", "coverage",
                "exit_accuracy", "sweep_results", "target_fnr", "guarantee", "split_hashes"):  # fmt: skip
        assert key in written
    assert written["split_hashes"]["val_calib"] == "hash-of-val_calib"
    assert (policy.model_fingerprint, policy.preprocessing_fingerprint) == ("m" * 64, "p" * 64)
    assert policy.grouped
    expected = fit_softmax_policy(
        softmax(predictions.logits_a), predictions.labels, **BINARY, target_fnr=0.1, groups=predictions.groups
    )
    assert policy.exit_threshold == expected.exit_threshold


def test_a_refusal_leaves_the_policy_that_stands(tmp_path: Path) -> None:
    predictions = make_run(tmp_path)
    policy = calibrate(tmp_path, guarantee="none", target_fnr=0.1)
    # A worse model: every positive is answered negative, most surely.
    spoiled = predictions.logits_a.copy()
    spoiled[predictions.labels == 1] = [9, -9]
    Predictions(**{**predictions.__dict__, "logits_a": spoiled}).save(tmp_path / "val_calib.npz")
    with pytest.raises(NotReachableError, match=r"No policy was written.*thresholds.json stands") as refused:
        calibrate(tmp_path, guarantee="none", target_fnr=0.1)
    assert "--guarantee none" not in str(refused.value), "that was asked for"
    assert read_policy(tmp_path) == policy


def test_foreign_calibration_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"splits.json must exist"):
        calibrate(tmp_path)
    predictions = make_run(tmp_path)
    (tmp_path / "val_calib.npz").unlink()
    with pytest.raises(ArtifactError, match=r"val_calib.npz must exist, but there is no such file; run `stage1 train"):
        calibrate(tmp_path)
    Predictions(**{**predictions.__dict__, "split": "val_test"}).save(tmp_path / "val_calib.npz")
    with pytest.raises(ArtifactError, match="must hold the split val_calib, got val_test"):
        calibrate(tmp_path)
    Predictions(**{**predictions.__dict__, "split_hash": "other"}).save(tmp_path / "val_calib.npz")
    with pytest.raises(ArtifactError, match="train again on these splits"):
        calibrate(tmp_path)
    (tmp_path / "val_calib.npz").write_bytes(b"PK broken")
    with pytest.raises(ArtifactError, match="must be a NumPy .npz file"):
        calibrate(tmp_path)


def test_two_policy_files_are_refused(tmp_path: Path) -> None:
    for name in ("thresholds.json", "scrcparams.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ArtifactError, match=r"exactly one policy file, got thresholds.json, scrcparams.json"):
        read_policy(tmp_path)


def test_anybodys_logits(tmp_path: Path) -> None:
    logits, labels = noisy(300, seed=2, strength=12)
    file = tmp_path / "theirs.npz"
    np.savez(file, logits=logits, labels=labels, classes=["no", "yes"], groups=np.arange(300) // 3)
    policy = calibrate(logits=file, guarantee="none", target_fnr=0.1, out=tmp_path / "out")
    assert (policy.positive, policy.grouped) == ("yes", True)
    assert read_policy(tmp_path / "out") == policy
    other = calibrate(logits=file, guarantee="none", target_fnr=0.1, positive="no", out=tmp_path / "mine.json")
    assert Thresholds.read(tmp_path / "mine.json") == other
    assert other.positive == "no"

    # One logit a row, and probabilities, say the same.
    np.savez(file, logits=logits[:, 1] - logits[:, 0], labels=labels)
    single = calibrate(logits=file, guarantee="none", target_fnr=0.1)
    assert (single.classes, single.positive) == (["0", "1"], "1")
    assert single.exit_threshold == pytest.approx(policy.exit_threshold, abs=1e-6)
    np.savez(file, probs=softmax(logits), labels=labels, positive="1")
    assert calibrate(logits=file, guarantee="none", target_fnr=0.1).exit_threshold == policy.exit_threshold


def test_logits_not_reachable_leaves_what_stood_there(tmp_path: Path) -> None:
    file, out = tmp_path / "theirs.npz", tmp_path / "thresholds.json"
    np.savez(file, logits=[[0.0, 3.0], [3.0, 0.0]], labels=[1, 0])
    calibrate(logits=file, guarantee="none", out=out)
    np.savez(file, logits=[[0.0, 3.0], [3.0, 0.0]], labels=[0, 1])
    with pytest.raises(NotReachableError):
        calibrate(logits=file, guarantee="none", out=out)
    assert Thresholds.read(out).guarantee == "none"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"logits": [[0.0, 1.0]]}, "must hold labels"),
        ({"labels": [0]}, "must hold exactly one of logits and probs, got labels"),
        (
            {"logits": [[0.0, 1.0]], "probs": [[0.5, 0.5]], "labels": [0]},
            "exactly one of logits and probs, got logits and probs",
        ),
        ({"logits": [["a", "b"]], "labels": [0]}, "logits must be numbers"),
        ({"logits": np.zeros((1, 2, 2)), "labels": [0]}, r"logits must have shape \[N, K\] or \[N\], got \[1, 2, 2\]"),
        ({"logits": [[0.0, np.nan]], "labels": [0]}, "probs must be free of NaN, got NaN in row 0"),
        ({"logits": [[0.0, 1.0, 2.0]], "labels": [0]}, "--positive must name"),
    ],
)
def test_wrong_logit_files_are_named(tmp_path: Path, arrays: dict[str, object], message: str) -> None:
    file = tmp_path / "theirs.npz"
    np.savez(file, **arrays)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        calibrate(logits=file, fnr=0.02)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    make_run(tmp_path)
    with pytest.raises(InputError, match="exactly one of run or logits"):
        calibrate()
    with pytest.raises(InputError, match="exactly one of run or logits"):
        calibrate(tmp_path, logits=tmp_path)
    with pytest.raises(InputError, match="policy must be softmax.*auto, got 'softmx'; did you mean 'softmax'"):
        calibrate(tmp_path, policy="softmx")
    with pytest.raises(InputError, match="guarantee must be one of ltt, none, got 'lt'; did you mean 'ltt'"):
        calibrate(tmp_path, guarantee="lt")
    with pytest.raises(InputError, match="fnr must go with policy gate or softmax, got it with scrc"):
        calibrate(tmp_path, policy="scrc", fnr=0.5)
    with pytest.raises(InputError, match="claims must go with guarantee ltt, got it with none"):
        calibrate(tmp_path, guarantee="none", claims=2)
    with pytest.raises(InputError, match=r"delta must be inside \(0, 1\), got 1.5"):
        calibrate(tmp_path, delta=1.5)
    with pytest.raises(InputError, match="got them with --run"):
        calibrate(tmp_path, positive="x")
    with pytest.raises(InputError, match="no such file"):
        calibrate(logits=tmp_path / "none.npz")


def test_render_shows_the_grid_and_the_choice(tmp_path: Path) -> None:
    make_run(tmp_path)
    policy = calibrate(tmp_path, guarantee="none", target_fnr=0.1)
    text = render(policy)
    for threshold in GRID:
        assert f"{threshold:.2f}" in text
    assert text.count("<- chosen") == 1
    assert f"{policy.exit_threshold:.6g}" in text
    assert "guarantee: none" in text


@pytest.mark.parametrize(
    ("classes", "positive"),
    [
        (["none", "roadwork"], "roadwork"),
        (["roadwork", "No Roadwork"], "roadwork"),
        (["1", "0"], "1"),
        (["non-sign", "sign"], "sign"),
    ],
)
def test_the_negative_name_tells_the_positive_class(classes: list[str], positive: str) -> None:
    assert choose_positive(classes) == positive
    assert choose_positive(classes, classes[0]) == classes[0]


@pytest.mark.parametrize("classes", [["cat", "dog"], ["none", "no"], ["none", "cat", "dog"]])
def test_names_that_do_not_tell_ask_for_one(classes: list[str]) -> None:
    with pytest.raises(InputError, match="--positive must name the class to be found, got none; classes: "):
        choose_positive(classes)
    with pytest.raises(InputError, match="--positive must be one of .*, got 'dogg'"):
        choose_positive(classes, "dogg")


def test_calibration_and_evaluation_import_no_torch() -> None:
    code = "import sys, stage1_pro.training.calibration, stage1_pro.training.evaluation; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr
