"""Metrics against their definitions, brute force and scikit-learn; every degenerate input has its stated answer."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from stage1_pro.errors import InputError
from stage1_pro.metrics import (
    accuracy,
    augrc,
    aurc,
    auroc,
    balanced_accuracy,
    bootstrap_augrc,
    brier,
    clopper_pearson,
    clopper_pearson_lower,
    clopper_pearson_upper,
    coverage_at_risk,
    fnr_on_exited,
    mcc,
    nll,
    risk_at_coverage,
    risk_coverage,
)
from stage1_pro.metrics.intervals import leave_one_out_augrc

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
    with pytest.raises(InputError, match="confidence must not be NaN, got NaN at row 1"):
        augrc([0.5, np.nan], [0, 1])
    assert math.isnan(augrc([0.5, np.nan], [0, 1], nan_policy="propagate"))
    assert math.isnan(aurc([0.5, 0.6], [0, np.nan], nan_policy="propagate"))
    assert augrc([0.5, 0.6], [0, 1], nan_policy="propagate") == augrc([0.5, 0.6], [0, 1])
    with pytest.raises(InputError, match="nan_policy must be raise or propagate, got 'omit'"):
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


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.floats(0, 1, width=32), st.integers(0, 4)), min_size=2, max_size=25),
    st.booleans(),
)
def test_the_closed_form_jackknife_is_leaving_out(rows, binary):
    confidence, losses, names = (np.array(column) for column in zip(*rows, strict=True))
    error = (losses > 0.5).astype(float) if binary else losses
    expected = [augrc(np.delete(confidence, i), np.delete(error, i)) for i in range(len(rows))]
    assert leave_one_out_augrc(confidence.astype(float), error) == pytest.approx(np.array(expected), abs=1e-12)
    found, cluster = np.unique(names, return_inverse=True)
    assume(found.size > 1)
    expected = [augrc(confidence[cluster != k], error[cluster != k]) for k in range(found.size)]
    left_out = leave_one_out_augrc(confidence.astype(float), error, cluster.astype(np.uint32))
    assert left_out == pytest.approx(np.array(expected), abs=1e-12)


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
    assert (percentile.low, percentile.high) == tuple(np.quantile(ours.replicates, [0.025, 0.975]))


def test_copies_in_a_group_do_not_narrow_the_interval():
    rng = np.random.default_rng(6)
    confidence, error = selective_rows(rng, 100, 0.2)
    once = bootstrap_augrc(confidence, error, seed=3)
    names = np.repeat([f"clip{i:03}" for i in range(100)], 9)
    rows = np.repeat(confidence, 9), np.repeat(error, 9)
    grouped, plain = bootstrap_augrc(*rows, groups=names, seed=3), bootstrap_augrc(*rows, seed=3)
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
    with pytest.raises(InputError, match="k must be from 0 to n, got k = 4, n = 3"):
        clopper_pearson(4, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "rate"), [(200, 0.05), (200, 0.1), (1000, 0.02), (1000, 0.1)])
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
