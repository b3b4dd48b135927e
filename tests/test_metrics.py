"""Metrics against their definitions, brute force and scikit-learn; every degenerate input has its stated answer."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from stage1_pro import native
from stage1_pro.errors import InputError
from stage1_pro.metrics import (
    accuracy,
    augrc,
    aurc,
    auroc,
    balanced_accuracy,
    bootstrap,
    bootstrap_answers,
    bootstrap_augrc,
    bootstrap_errors,
    brier,
    clopper_pearson,
    clopper_pearson_lower,
    clopper_pearson_upper,
    compare,
    coverage_at_risk,
    ece,
    fnr_on_exited,
    mcc,
    nll,
    risk_at_coverage,
    risk_coverage,
)
from stage1_pro.metrics.table import lookup
from stage1_pro.native import _reference

judge = pytest.importorskip("sklearn.metrics", reason="scikit-learn, the judge, comes with the train extra")

RANKED_ROWS = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=40)


def curve_by_hand(confidence, error):
    """(coverage, errors accepted / n, errors accepted / accepted) at each distinct confidence, one by one."""
    points = []
    for threshold in sorted(set(confidence), reverse=True):
        accepted = [r for c, r in zip(confidence, error, strict=True) if c >= threshold]
        points.append((len(accepted) / len(error), sum(accepted) / len(error), sum(accepted) / len(accepted)))
    return points


# ---------------------------------------------------------------------------------------------- selective


@pytest.mark.parametrize(
    ("confidence", "error", "expected"),
    [
        ([0.9, 0.8, 0.7, 0.6], [0, 1, 0, 1], 0.1875),
        ([0.5] * 4, [1, 0, 0, 0], 0.125),
        ([0.5] * 4, [0, 0, 1, 0], 0.125),
        ([0.5] * 4, [0, 0, 0, 1], 0.125),
        ([0.9, 0.9, 0.6, 0.6], [1, 0, 0, 1], 0.25),
        ([0.9, 0.8, 0.7], [1, 1, 1], 0.5),
        ([0.3], [1], 0.5),
        ([0.9, 0.8, 0.7], [0, 0, 0], 0.0),
        ([0.3], [0], 0.0),
        ([0.9, 0.8, 0.7, 0.6], [0.1, 0.5, 0.2, 0.4], 0.13125),
    ],
)
def test_augrc_of_stated_cases(confidence, error, expected):
    assert augrc(confidence, error) == pytest.approx(expected, abs=1e-15)


def test_nan_names_its_row_unless_asked_otherwise():
    with pytest.raises(InputError, match="confidence must .*got NaN at row 1"):
        augrc([0.5, np.nan], [0, 1])
    assert math.isnan(augrc([0.5, np.nan], [0, 1], nan_policy="propagate"))
    assert math.isnan(aurc([0.5, 0.6], [0, np.nan], nan_policy="propagate"))
    assert augrc([0.5, 0.6], [0, 1], nan_policy="propagate") == augrc([0.5, 0.6], [0, 1])
    with pytest.raises(InputError, match="nan_policy must .*got 'omit'"):
        augrc([0.5], [0], nan_policy="omit")


@settings(deadline=None)
@given(RANKED_ROWS, st.randoms(use_true_random=False))
def test_augrc_invariants(rows, random):
    confidence, error = [c / 6 for c, _ in rows], [int(r) for _, r in rows]
    value, e = augrc(confidence, error), float(np.mean(error))
    shuffled = random.sample(range(len(rows)), len(rows))
    assert augrc([confidence[i] for i in shuffled], [error[i] for i in shuffled]) == value
    assert augrc(np.exp(np.array(confidence) * 3), error) == value
    assert e**2 / 2 - 1e-12 <= value <= e - e**2 / 2 + 1e-12
    points = [(0.0, 0.0, 0.0), *curve_by_hand(confidence, error)]
    trapezoid = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))
    assert value == pytest.approx(trapezoid, abs=1e-12)
    if 0 < e < 1:
        failure = judge.roc_auc_score(1 - np.array(error), confidence)
        assert value == pytest.approx((1 - failure) * e * (1 - e) + e**2 / 2, abs=1e-12)


def test_augrc_equals_the_pairwise_definition_on_thousands_of_cases():
    """O(n²) over pairs of rows: ties, weights, losses, and the identity with the AUROC of failure detection."""
    rng = np.random.default_rng(20)
    for case in range(4000):
        n = int(rng.integers(1, 40))
        confidence = rng.integers(0, rng.integers(1, 30), n) / 7 - 1
        losses = rng.random(n) if case % 4 == 0 else (rng.random(n) < rng.random()).astype(float)
        weights = rng.integers(0, 4, n) if case % 2 else rng.random(n)
        above, tied = confidence[:, None] > confidence[None, :], confidence[:, None] == confidence[None, :]
        pays = 2 * above.T + tied  # row i pays for the error of row j at or above it
        plain = (pays * losses).sum() / (2 * n * n)
        assert augrc(confidence, losses) == pytest.approx(plain, abs=1e-12)
        moved = rng.permutation(n)
        assert augrc(confidence[moved], losses[moved]) == augrc(confidence, losses)
        if weights.sum() > 0:
            weighted = (weights[:, None] * pays * losses * weights).sum() / (2 * weights.sum() ** 2)
            assert augrc(confidence, losses, weights=weights) == pytest.approx(weighted, abs=1e-12)
        if case % 2 and weights.sum() > 0:
            rows = np.repeat(np.arange(n), weights)
            assert augrc(confidence[rows], losses[rows]) == pytest.approx(weighted, abs=1e-12)
        error_rate = losses.mean()
        if case % 4 and 0 < error_rate < 1:
            right, wrong = confidence[losses == 0], confidence[losses == 1]
            failure = (right[:, None] > wrong).mean() + 0.5 * (right[:, None] == wrong).mean()
            identity = (1 - failure) * error_rate * (1 - error_rate) + error_rate**2 / 2
            assert augrc(confidence, losses) == pytest.approx(identity, abs=1e-12)


def test_weights_are_checked():
    for weights, message in [
        ([1.0], r"weights must have shape \[2\], one per row, got \[1\]"),
        ([1.0, -1.0], "weights must be finite and not negative, got -1 at row 1"),
        ([np.nan, 1.0], "weights must be finite and not negative, got nan at row 0"),
        ([0.0, 0.0], "weights must not all be 0"),
    ]:
        with pytest.raises(InputError, match=message):
            augrc([0.5, 0.6], [0, 1], weights=weights)


def test_augrc_is_not_the_area_under_selective_risk():
    rng = np.random.default_rng(0)
    confidence = rng.random(500)
    error = rng.random(500) < 0.4 * (1 - confidence)
    curve = risk_coverage(confidence, error)
    selective = np.trapezoid(curve.selective_risk, curve.coverage)
    assert abs(augrc(confidence, error) - selective) > 0.02
    assert aurc(confidence, error) == pytest.approx(selective, abs=0.01)


@settings(deadline=None)
@given(RANKED_ROWS)
def test_the_curve_and_its_points_by_hand(rows):
    confidence, error = [c / 6 for c, _ in rows], [int(r) for _, r in rows]
    curve, points = risk_coverage(confidence, error), curve_by_hand(confidence, error)
    assert curve.threshold.tolist() == sorted(set(confidence), reverse=True)
    found = np.stack([curve.coverage, curve.generalized_risk, curve.selective_risk], axis=1)
    assert found == pytest.approx(np.array(points), abs=1e-15)
    area = points[0][0] * points[0][2] + sum((b[0] - a[0]) * (a[2] + b[2]) / 2 for a, b in itertools.pairwise(points))
    assert aurc(confidence, error) == pytest.approx(area, abs=1e-12)
    for share in (0.1, 0.5, 0.8, 1.0):
        point = risk_at_coverage(confidence, error, share)
        best = next(p for p in points if p[0] >= share)
        assert (point.coverage, point.selective_risk) == pytest.approx((best[0], best[2]))
        assert np.mean(np.array(confidence) >= point.threshold) == point.coverage
    for risk in (0.0, 0.1, 0.5, 1.0):
        met = [p[0] for p in points if p[2] <= risk]
        point = coverage_at_risk(confidence, error, risk)
        assert point.coverage == (met[-1] if met else 0.0)
        assert math.isinf(point.threshold) == math.isnan(point.selective_risk) == (not met)


def test_points_do_not_lose_a_row_to_rounding():
    confidence, error = np.arange(100, 0, -1.0), np.arange(100) % 10 == 9
    assert risk_at_coverage(confidence, error, 0.07).coverage == 0.07
    assert risk_at_coverage(confidence, error, 0.29).coverage == 0.29
    assert coverage_at_risk(confidence, error, 0.1).coverage == 1.0
    for call, message in [
        (lambda: risk_at_coverage(confidence, error, 0), r"coverage must be in \(0, 1\], got 0"),
        (lambda: coverage_at_risk(confidence, error, 1.1), r"risk must be in \[0, 1\], got 1.1"),
    ]:
        with pytest.raises(InputError, match=message):
            call()


def test_fnr_on_exited():
    positive, answer, exited = [1, 1, 1, 0, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]
    assert fnr_on_exited(positive, answer, exited) == pytest.approx(2 / 3)
    assert math.isnan(fnr_on_exited([1, 0], [0, 0], [0, 1]))
    assert math.isnan(fnr_on_exited([], [], []))
    with pytest.raises(InputError, match="must have one shape"):
        fnr_on_exited([1], [1, 0], [1])


# ---------------------------------------------------------------------------------------------- probabilistic


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 5)), min_size=2, max_size=40))
def test_metrics_of_answers_agree_with_scikit_learn(rows):
    labels, answers, scores = (np.array(column) for column in zip(*rows, strict=True))
    assert accuracy(answers, labels) == pytest.approx(judge.accuracy_score(labels, answers))
    recall = judge.recall_score(labels, answers, average=None, labels=np.unique(labels), zero_division=0)
    assert balanced_accuracy(answers, labels) == pytest.approx(np.mean(recall))
    # scikit-learn warns when everything is of one class; ours says 0, as it does.
    one_class = np.unique(np.concatenate([labels, answers])).size == 1
    assert mcc(answers, labels) == pytest.approx(0 if one_class else judge.matthews_corrcoef(labels, answers))
    positive = labels == 1
    if 0 < positive.sum() < positive.size:
        assert auroc(scores, positive) == pytest.approx(judge.roc_auc_score(positive, scores))
    else:
        assert math.isnan(auroc(scores, positive))


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_proper_scores_agree_with_scikit_learn(classes):
    rng = np.random.default_rng(classes)
    probs, labels = rng.dirichlet(np.ones(classes), 200), rng.integers(0, classes, 200)
    known = list(range(classes))
    assert nll(probs, labels) == pytest.approx(judge.log_loss(labels, probs, labels=known))
    if classes == 2:
        expected = judge.brier_score_loss(labels, probs[:, 1])
    else:
        expected = ((probs - np.eye(classes)[labels]) ** 2).sum(1).mean()
    assert brier(probs, labels) == pytest.approx(expected)


def test_certain_answers_have_finite_scores():
    assert nll([[1.0, 0.0], [0.0, 1.0]], [0, 1]) == 0
    assert 300 < nll([[1.0, 0.0], [0.0, 1.0]], [0, 0]) < 709
    assert brier([[1.0, 0.0]], [1]) == 1.0
    assert brier([[1.0, 0.0, 0.0]], [1]) == 2.0
    assert auroc([np.inf, -np.inf], [True, False]) == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accuracy([], []), "at least one row"),
        (lambda: mcc([1], [1, 0]), "one value per row"),
        (lambda: auroc([0.1, np.nan], [True, False]), "score must not be NaN, got NaN at row 1"),
        (lambda: auroc([0.1, 0.2], [2, 1]), "positive must be booleans"),
        (lambda: nll([[0.5, 0.5]], [2]), "labels must be class indices 0 to 1, got 2 at row 0"),
        (lambda: nll([[2.0, -1.0]], [0]), "logits need a softmax first"),
        (lambda: brier([0.5, 0.5], [0, 1]), r"probs must have shape \[N, K\]"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


# ---------------------------------------------------------------------------------------------- intervals


SMOOTH = ["augrc", "aurc", "accuracy", "nll", "brier", "coverage", "exit_error", "fnr_on_exited"]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.booleans(), st.floats(0.01, 1)), min_size=2, max_size=20),
    st.integers(0, 6),
)
def test_the_closed_form_influence_is_the_derivative(rows, level):
    """Of every smooth metric along the weight of each row, by central differences of the weighted definition."""
    confidence, error, positive, nll_of = (np.array(column) for column in zip(*rows, strict=True))
    scores, errors = native.rows(confidence / 5, error)
    columns = native.Columns(scores, errors, positive, positive & error, nll_of, nll_of**2, threshold=level / 5)
    suite = native.Suite([columns])
    ranked, values = suite.models[0], suite.values()[0]
    weights = np.ones(len(rows))

    def weighted(i, step):
        moved = weights.copy()
        moved[i] += step
        ends = ranked.ends.astype(np.int64)
        return _reference.measure(
            moved, ranked.error, ends, ranked.kind, ranked.n_exit, ranked.nll, ranked.brier, np.zeros(0), np.zeros(0)
        )

    step = 1e-6
    slopes = np.array([(weighted(i, step) - weighted(i, -step)) / (2 * step) for i in range(len(rows))])
    for k, name in enumerate(SMOOTH):
        if not math.isnan(values[k]):
            influence = lookup(name)[0].influence_on(ranked, values[k], 0.0).slope
            assert influence == pytest.approx(slopes[:, k], abs=1e-6), name
            assert influence.sum() == pytest.approx(0, abs=1e-9)


def selective_rows(rng, n, rate):
    """Errors at a mean rate, likelier where confidence is low."""
    confidence = rng.random(n)
    return confidence, rng.random(n) < np.minimum(2 * rate * (1 - confidence), 1)


def test_interval_is_bca_of_its_replicates():
    from scipy.stats import bootstrap as judge_bootstrap

    confidence, error = selective_rows(np.random.default_rng(5), 300, 0.15)
    ours = bootstrap_augrc(confidence, error, n_replicates=4000, seed=1)
    with np.errstate(all="raise"):
        theirs = judge_bootstrap(
            (confidence, error), augrc, paired=True, vectorized=False, n_resamples=4000, method="BCa", rng=2
        )
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.06 * width)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.06 * width)
    assert ours.std == pytest.approx(theirs.standard_error, rel=0.05)
    assert ours.value == augrc(confidence, error)
    assert ours.low < ours.value < ours.high
    assert (ours.method, ours.note, ours.replicates.shape) == ("bca", "", (4000,))
    again = bootstrap_augrc(confidence, error, n_replicates=4000, seed=1, threads=1)
    assert (again.low, again.high) == (ours.low, ours.high)
    percentile = bootstrap_augrc(confidence, error, n_replicates=4000, seed=1, method="percentile")
    assert (percentile.low, percentile.high) == pytest.approx(tuple(np.quantile(ours.replicates, [0.025, 0.975])))


def answers_of_a_model(rng, n, *, sharpness=2.0):
    """Labels of two classes and P(second) of a model that is right more often where it is surer."""
    labels = rng.integers(0, 2, n)
    score = (2 * labels - 1) + rng.normal(0, 1, n)
    return 1 / (1 + np.exp(-sharpness * score)), labels


@pytest.mark.parametrize("name", ["aurc", "accuracy", "nll", "brier", "coverage", "exit_error", "fnr_on_exited"])
def test_every_smooth_metric_has_scipys_bca_interval(name):
    from scipy.stats import bootstrap as judge_bootstrap

    probs, labels = answers_of_a_model(np.random.default_rng(4), 250)
    ours = bootstrap(probs, labels, threshold=0.7, metrics=name, n_replicates=4000, seed=1)[name]

    def statistic(p, y):
        two = np.stack([1 - p, p], axis=1)
        wrong, sure = two.argmax(1) != y, two.max(1)
        exited = sure >= 0.7
        return {
            "aurc": lambda: aurc(sure, wrong),
            "accuracy": lambda: 1 - wrong.mean(),
            "nll": lambda: nll(two, y),
            "brier": lambda: brier(two, y),
            "coverage": exited.mean,
            "exit_error": wrong[exited].mean,
            "fnr_on_exited": lambda: fnr_on_exited(y == 1, p > 0.5, exited),
        }[name]()

    theirs = judge_bootstrap(
        (probs, labels), statistic, paired=True, vectorized=False, n_resamples=4000, method="BCa", rng=2
    )
    assert ours.value == pytest.approx(statistic(probs, labels), abs=1e-12)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.08 * width)
    assert ours.std == pytest.approx(theirs.standard_error, rel=0.05)
    closed = bootstrap(probs, labels, threshold=0.7, metrics=name, method="logit")[name]
    assert closed.std == pytest.approx(ours.std, rel=0.06)
    assert (closed.low, closed.high) == pytest.approx((ours.low, ours.high), abs=0.12 * width)
    assert closed.method == "logit"


def test_the_suite_is_named_complete_and_cut_to_what_is_asked():
    probs, labels = answers_of_a_model(np.random.default_rng(1), 400)
    whole = bootstrap(probs, labels, threshold=0.8, n_replicates=200)
    assert list(whole) == [
        "augrc", "aurc", "risk_at_coverage_0.5", "risk_at_coverage_0.6", "risk_at_coverage_0.7", "risk_at_coverage_0.8",
        "risk_at_coverage_0.9", "coverage_at_risk_0.01", "coverage_at_risk_0.02", "coverage_at_risk_0.05",
        "coverage_at_risk_0.1", "accuracy", "nll", "brier", "coverage", "exit_error", "fnr_on_exited",
    ]  # fmt: skip
    assert list(bootstrap(probs, labels, n_replicates=20)) == list(whole)[:-3], "no threshold, no exits"
    two_columns = bootstrap(np.stack([1 - probs, probs], axis=1), labels, threshold=0.8, n_replicates=200)
    for name, interval in whole.items():
        assert interval.low <= interval.value <= interval.high, name
        assert interval.replicates.shape == (200,)
        assert two_columns[name] == interval
        assert interval.method == ("exact" if "_at_" in name else "bca")
        alone = bootstrap(probs, labels, threshold=0.8, metrics=[name], n_replicates=200)
        assert list(alone) == [name]
        assert (alone[name].low, alone[name].high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert bootstrap(probs, labels, metrics="risk_at_coverage_0.95", n_replicates=50)["risk_at_coverage_0.95"].high > 0
    without = bootstrap_errors(np.maximum(probs, 1 - probs), (probs > 0.5) != labels, threshold=0.8, n_replicates=200)
    assert list(without) == [name for name in whole if name not in ("nll", "brier", "fnr_on_exited")]
    assert without["augrc"] == whole["augrc"]
    assert "augrc" in repr(whole)
    with pytest.raises(KeyError, match="did you mean 'augrc'"):
        whole["augrcs"]


def test_several_classes_and_a_confidence_of_ones_own():
    rng = np.random.default_rng(2)
    probs, labels = rng.dirichlet(np.ones(4), 300), rng.integers(0, 4, 300)
    own = rng.random(300)
    found = bootstrap(probs, labels, confidence=own, threshold=0.5, positive=2, n_replicates=100)
    error = probs.argmax(1) != labels
    assert found["augrc"].value == augrc(own, error)
    assert found["brier"].value == pytest.approx(brier(probs, labels))
    expected = fnr_on_exited(labels == 2, probs.argmax(1) == 2, own >= 0.5)
    assert found["fnr_on_exited"].value == pytest.approx(expected)
    assert "fnr_on_exited" not in bootstrap(probs, labels, threshold=0.5, n_replicates=10), (
        "no class is the positive one"
    )


def test_strata_keep_their_sizes():
    """Given the classes' sizes, what depends on the class alone does not vary."""
    labels = np.repeat([0, 1], [300, 100])
    probs = np.where(labels == 1, 0.6, 0.1) + np.random.default_rng(0).uniform(-0.05, 0.05, 400)
    names = ["nll", "brier"]
    plain = bootstrap(probs, labels, metrics=names, n_replicates=2000)
    stratified = bootstrap(probs, labels, metrics=names, n_replicates=2000, stratify=True)
    closed = bootstrap(probs, labels, metrics=names, method="logit", stratify=True)
    for name in names:
        assert stratified[name].std < 0.3 * plain[name].std
        assert closed[name].std == pytest.approx(stratified[name].std, rel=0.08)


def test_paired_differences_cancel_what_the_rows_share():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 1500)
    shared = (2 * labels - 1) + rng.normal(0, 1, 1500)
    a, b = (1 / (1 + np.exp(-2 * (shared + rng.normal(0, noise, 1500)))) for noise in (0.05, 0.5))
    found = compare(a, b, labels, threshold=0.8)
    one, other = (bootstrap(p, labels, threshold=0.8) for p in (a, b))
    for name, difference in found.items():
        assert difference.value == pytest.approx(one[name].value - other[name].value)
    for name in ("augrc", "nll", "brier"):
        assert found[name].high < 0, f"{name}: the noisier model is worse, and the pairing shows it"
        assert found[name].std < math.hypot(one[name].std, other[name].std)
    swapped = compare(b, a, labels, threshold=0.8)
    assert swapped["accuracy"].value == pytest.approx(-found["accuracy"].value)
    assert swapped["augrc"].low == pytest.approx(-found["augrc"].high, abs=0.1 * found["augrc"].std)
    same = compare(a, a, labels)["augrc"]
    assert same.value == 0
    assert math.isnan(same.low)
    assert "all replicates are equal" in same.note
    with pytest.raises(InputError, match="method must .*bca .*percentile"):
        compare(a, b, labels, method="logit")
    with pytest.raises(InputError, match="a and b must be of the same rows|must have one value per row"):
        compare(a, b[:-1], labels)


def test_a_paired_difference_covers_its_truth():
    """400 sets: the difference of accuracies of two correlated answers, whose truth is known, at 95%."""
    rng = np.random.default_rng(11)
    hits = 0
    for trial in range(400):
        labels = np.ones(200, dtype=int)
        both = rng.random(200)
        a, b = np.where(both < 0.85, 0.9, 0.2), np.where(both < 0.8, 0.9, 0.2)
        b = np.where((both > 0.95) & (rng.random(200) < 0.4), 0.9, b)
        found = compare(a, b, labels, metrics="accuracy", n_replicates=400, seed=trial)["accuracy"]
        hits += found.low <= 0.85 - 0.82 <= found.high
    # Four standard errors of a share of 400 around 94%.
    assert 0.89 <= hits / 400 <= 0.985


@pytest.mark.parametrize("grouped", [False, True], ids=["rows", "groups"])
def test_metrics_of_answers_have_the_bootstrap_by_hand(grouped):
    """Every replicate equals scikit-learn's metric on the rows it drew, and the interval its quantiles."""
    rng = np.random.default_rng(6)
    labels = rng.integers(0, 3, 120)
    probs = rng.dirichlet(np.ones(3), 120) * 0.6 + 0.4 * np.eye(3)[labels]
    probs = np.round(probs, 1) + 1e-3
    probs /= probs.sum(axis=1, keepdims=True)
    groups = rng.integers(0, 30, 120) if grouped else None
    found = bootstrap_answers(probs, labels, groups=groups, n_replicates=40, seed=5, positive=1)
    assert list(found) == ["balanced_accuracy", "mcc", "auroc", "ece"]
    unit = np.empty(120, dtype=int)
    if grouped:
        unit = np.unique(groups, return_inverse=True)[1]
    else:
        unit[np.lexsort((labels, *probs.T, probs[:, 1]))] = np.arange(120)
    drawn = native.resample_counts([int(unit.max()) + 1], 40, seed=5)
    answered = probs.argmax(1)
    for replicate in range(40):
        rows = np.repeat(np.arange(120), drawn[replicate][unit])
        truth, given, part = labels[rows], answered[rows], probs[rows]
        assert found["balanced_accuracy"].replicates[replicate] == pytest.approx(balanced_accuracy(given, truth))
        assert found["mcc"].replicates[replicate] == pytest.approx(judge.matthews_corrcoef(truth, given))
        assert found["auroc"].replicates[replicate] == pytest.approx(judge.roc_auc_score(truth == 1, part[:, 1]))
        assert found["ece"].replicates[replicate] == pytest.approx(ece(part, truth))
    one = found["mcc"]
    assert one.value == pytest.approx(mcc(answered, labels))
    assert (one.low, one.high) == pytest.approx(tuple(np.quantile(one.replicates, [0.025, 0.975])))
    one = found["ece"]
    assert (one.value, one.method) == (pytest.approx(ece(probs, labels)), "by bin")
    assert 0 <= one.low < one.value < one.high < 1
    moved = rng.permutation(120)
    again = bootstrap_answers(
        probs[moved],
        labels[moved],
        groups=None if groups is None else groups[moved],
        n_replicates=40,
        seed=5,
        positive=1,
    )
    for name, one in found.items():
        assert again[name].replicates == pytest.approx(one.replicates, abs=1e-12)


def test_metrics_of_answers_where_one_class_is_there():
    found = bootstrap_answers([0.9, 0.8, 0.3], [1, 1, 1], n_replicates=50)
    assert found["auroc"].note == found["mcc"].note == "undefined: only one class is there"
    assert found["balanced_accuracy"].value == pytest.approx(2 / 3)
    few = bootstrap_answers([0.9, 0.8, 0.3, 0.4], [1, 1, 1, 0], n_replicates=200)["auroc"]
    assert "of 200 resamples" in few.note


def test_what_cannot_be_measured_is_stated():
    sure = bootstrap([0.9, 0.8, 0.7], [1, 1, 1], threshold=0.95, n_replicates=50)
    assert math.isnan(sure["exit_error"].value)
    assert sure["exit_error"].note == "undefined: no row exits"
    assert sure["fnr_on_exited"].note == "undefined: no positive row exits"
    assert sure["coverage"].method == "clopper-pearson"
    assert sure["coverage"].high == pytest.approx(clopper_pearson(0, 3)[1])
    for name, interval in sure.items():
        assert math.isnan(interval.value) or interval.low != interval.high, f"{name} has no width"
    worst = clopper_pearson(0, 3)[1]
    assert sure["accuracy"].low == pytest.approx(1 - worst)
    assert sure["aurc"].high == pytest.approx(worst * (1 - math.log(worst)))
    assert (sure["coverage_at_risk_0.1"].low, sure["coverage_at_risk_0.1"].high) == (0, 1)
    enough = bootstrap(np.full(500, 0.9), np.ones(500, int), metrics="coverage_at_risk_0.1")["coverage_at_risk_0.1"]
    assert (enough.low, enough.high) == (1, 1), "with an error rate below .1 at this level all may be accepted"
    one = bootstrap([0.9], [0], threshold=0.5, n_replicates=20)
    assert math.isnan(one["nll"].low)
    assert one["accuracy"].high == pytest.approx(1 - clopper_pearson(1, 1)[0])
    few = bootstrap(np.r_[np.full(60, 0.9), 0.3], np.ones(61, int), threshold=0.8, n_replicates=400)
    assert few["exit_error"].method == "clopper-pearson", "the one error does not exit"
    assert few["accuracy"].note == "only 1 row with errors: the interval covers less often than its level"
    rare = bootstrap([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0], threshold=0.85, n_replicates=400)["exit_error"]
    assert rare.method == "clopper-pearson"
    # Both models accept everything at this risk, and in most resamples they do.
    wrong, above = np.arange(400) % 13 == 12, np.arange(400) / 4000
    a, b = np.where(wrong, 0.4, 0.6 + above), np.where(wrong, 0.45, 0.6 + above[::-1])
    piled = compare(a, b, np.ones(400, int), metrics="coverage_at_risk_0.11", n_replicates=400)
    piled = piled["coverage_at_risk_0.11"]
    assert (piled.low, piled.high, piled.method) == (0, 0, "percentile")
    assert piled.std > 0
    assert re.search(r"no width: 9\d\.\d% of the resamples give this value", piled.note)
    half = bootstrap_errors([0.9, 0.8, 0.7], [1, 0, 0], threshold=0.75, n_replicates=400)["exit_error"]
    assert "of 400 resamples" in half.note, "resamples without an exit have no exit error"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": "augcr"}, "got 'augcr'; did you mean 'augrc'"),
        ({"metrics": ["coverage"]}, "got 'coverage'; it needs a threshold"),
        ({"metrics": ["risk_at_coverage_1.5"]}, "got 'risk_at_coverage_1.5'"),
        ({"metrics": []}, "metrics must name at least one metric"),
        ({"method": "normal"}, "method must be bca, percentile or logit, got 'normal'"),
        ({"level": 0}, r"level must be in \(0, 1\), got 0"),
        ({"positive": 2}, "positive must be a class index 0 to 1, got 2"),
        ({"threshold": math.nan}, "threshold must be a number, got NaN"),
        ({"groups": ["a"]}, r"groups must have shape \[3\]"),
        ({"groups": [1, 2, 3], "stratify": True}, "groups and strata must not be given together"),
        ({"confidence": [0.1, math.nan, 0.3]}, "confidence must not be NaN, got NaN at row 1"),
        ({"n_replicates": 0}, "n_replicates must be from 1"),
    ],
)
def test_wrong_arguments_of_the_suite_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        bootstrap([0.1, 0.8, 0.7], [0, 1, 0], **arguments)
    with pytest.raises(InputError, match="must not be NaN, got NaN at row 1"):
        bootstrap([0.1, math.nan], [0, 1])


def test_copies_in_a_group_do_not_narrow_the_interval():
    rng = np.random.default_rng(6)
    confidence, error = selective_rows(rng, 100, 0.2)
    once = bootstrap_augrc(confidence, error, seed=3, n_replicates=8000)
    names = np.repeat([f"clip{i:03}" for i in range(100)], 9)
    rows = np.repeat(confidence, 9), np.repeat(error, 9)
    grouped = bootstrap_augrc(*rows, groups=names, seed=3, n_replicates=8000)
    plain = bootstrap_augrc(*rows, seed=3)
    assert grouped.high - grouped.low == pytest.approx(once.high - once.low, rel=0.1)
    assert plain.high - plain.low < 0.5 * (grouped.high - grouped.low)


def test_no_errors_is_a_bound_and_not_a_point():
    interval = bootstrap_augrc(np.linspace(0, 1, 50), np.zeros(50))
    worst = clopper_pearson(0, 50)[1]
    assert (interval.value, interval.low) == (0, 0)
    assert interval.high == pytest.approx(worst - worst**2 / 2)
    assert interval.method == "clopper-pearson"
    assert "no errors in 50 rows" in interval.note
    grouped = bootstrap_augrc(np.linspace(0, 1, 50), np.zeros(50), groups=np.arange(50) // 10)
    assert grouped.high > interval.high
    assert "5 groups" in grouped.note


def test_nothing_but_errors_is_a_bound_and_not_a_point():
    interval = bootstrap_augrc([0.1, 0.5, 0.9], [1, 1, 1])
    assert (interval.value, interval.high) == (0.5, 0.5)
    assert interval.low == pytest.approx(clopper_pearson(3, 3)[0] ** 2 / 2)
    one = bootstrap_augrc([0.4], [1])
    assert 0 < one.low < one.value == one.high


def test_what_cannot_be_resampled_is_nan_with_its_reason():
    one_group = bootstrap_augrc([0.1, 0.5, 0.9], [1, 0, 1], groups=["a", "a", "a"])
    assert math.isnan(one_group.low) and math.isnan(one_group.high) and math.isnan(one_group.std)
    assert one_group.value == augrc([0.1, 0.5, 0.9], [1, 0, 1])
    assert "1 group" in one_group.note
    constant = bootstrap_augrc([0.1, 0.5], [0.5, 0.5])
    assert math.isnan(constant.low)
    assert "all replicates are equal" in constant.note
    assert math.isnan(bootstrap_augrc([0.7], [0.5]).high)


def test_few_errors_are_said():
    confidence = np.linspace(0, 1, 200)
    interval = bootstrap_augrc(confidence, np.arange(200) % 67 == 0)
    assert interval.note == "only 3 rows with errors: the interval covers less often than its level"
    many = np.arange(200) % 3 == 0
    assert (
        "only 4 groups with errors and only 4 groups"
        in bootstrap_augrc(confidence, many, groups=np.arange(200) // 50).note
    )
    for wrong, message in [({"level": 1.0}, "level must be in"), ({"method": "normal"}, "method must be bca")]:
        with pytest.raises(InputError, match=message):
            bootstrap_augrc(confidence, many, **wrong)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 30), (1, 30), (15, 30), (29, 30), (30, 30), (3, 1000)])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.999])
def test_binomial_bounds_agree_with_scipy(k, n, level):
    expected = binomtest(k, n).proportion_ci(level, method="exact")
    assert clopper_pearson(k, n, level) == pytest.approx((expected.low, expected.high), abs=1e-12)
    upper = binomtest(k, n, alternative="less").proportion_ci(level, method="exact").high
    lower = binomtest(k, n, alternative="greater").proportion_ci(level, method="exact").low
    assert clopper_pearson_upper(k, n, level) == pytest.approx(upper, abs=1e-12)
    assert clopper_pearson_lower(k, n, level) == pytest.approx(lower, abs=1e-12)


def test_binomial_bounds_of_no_trials_and_of_wrong_counts():
    assert clopper_pearson(0, 0) == (0.0, 1.0)
    with pytest.raises(InputError, match="k must .*0.*got k = 4, n = 3"):
        clopper_pearson(4, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "rate"), [(200, 0.05), (200, 0.1), (1000, 0.01), (1000, 0.02), (1000, 0.1)])
def test_bca_covers_at_its_level(n, rate):
    """1,000 simulated sets; the truth is the AUGRC of the population they come from."""
    # Error probability 2·rate·(1 - c) at confidence c uniform: GR(t) = ∫_t^1 2·rate·(1 - c) dc = rate·(1 - t)²,
    # and coverage is 1 - t, so AUGRC = rate / 3.
    rng = np.random.default_rng(n)
    hits = 0
    for trial in range(1000):
        interval = bootstrap_augrc(*selective_rows(rng, n, rate), seed=trial)
        hits += interval.low <= rate / 3 <= interval.high
    assert 0.91 <= hits / 1000 <= 0.97


def test_cascade_risks_by_every_threshold() -> None:
    from stage1_pro.metrics import cascade_risks, relative_cost

    rng = np.random.default_rng(0)
    for n in (1, 7, 200):
        sure, a, b = rng.integers(0, 20, n) / 20, rng.random(n) < 0.3, rng.random(n) < 0.1
        rates, risks = cascade_risks(sure, a, b)
        exits = [np.zeros(n, bool), *(sure >= t for t in np.unique(sure)[::-1])]
        np.testing.assert_allclose(rates, [out.mean() for out in exits])
        np.testing.assert_allclose(risks, [np.where(out, a, b).mean() for out in exits], atol=1e-15)
    assert relative_cost([0, 0.8, 1], 6, 12).tolist() == pytest.approx([1, 0.6, 0.5])
    assert relative_cost(0.3, 4, 4) == 1
    with pytest.raises(InputError, match="tap must .*1.*4.*got 5"):
        relative_cost(0.5, 5, 4)
