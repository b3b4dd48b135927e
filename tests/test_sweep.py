"""Sort, sweep and dual-threshold search against brute force, NumPy and scikit-learn."""

from __future__ import annotations

import concurrent.futures
import importlib.util
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_curve

from stage1_pro import metrics, native
from stage1_pro.errors import InputError, NotReachableError
from stage1_pro.native.rows import floor_fraction

COMPILED = importlib.util.find_spec("stage1_pro._core") is not None
needs_core = pytest.mark.skipif(not COMPILED, reason="stage1_pro._core is not built (STAGE1_PURE, or no compiler)")
BACKENDS = ["reference", pytest.param("compiled", marks=needs_core)]


def hard_confidences(rng, n):
    """Confidences of every kind that a radix sort could get wrong, by name."""
    exponents = rng.integers(-300, 300, n)
    return {
        "softmax": rng.uniform(0.5, 1, n),
        "float32 in float64": rng.random(n).astype(np.float32).astype(np.float64),
        "saturated": 1 - 10.0 ** rng.uniform(-17, -9, n),
        "two runs of close values": np.where(rng.random(n) < 0.5, 0.25, 0.75) + rng.integers(0, 9, n) * 2.0**-52,
        "levels": rng.integers(0, 7, n) / 7,
        "one": np.full(n, 0.3),
        "zeros": np.where(rng.random(n) < 0.5, -0.0, 0.0),
        "signs and sizes": rng.choice([-1, 1], n) * 10.0**exponents,
        "infinities": rng.choice([np.inf, -np.inf, 0.0, -0.0, 1.0, 5e-324, -5e-324], n),
    }


@needs_core
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 34, 500, 20_000])
@pytest.mark.parametrize("losses", [False, True], ids=["errors", "losses"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_order_is_that_of_the_twin(n, losses, dtype):
    rng = np.random.default_rng(n)
    with np.errstate(over="ignore", under="ignore"):
        kinds = {name: values.astype(dtype) for name, values in hard_confidences(rng, n).items()}
    for name, confidence in kinds.items():
        error = rng.choice([rng.random(n), rng.integers(0, 4, n) / 4]) if losses else rng.random(n) < 0.3
        with native.use("reference"):
            expected = native.order(confidence, error)
        found = native.order(confidence, error)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.dtype == np.uint32
            assert np.array_equal(ours, theirs), name


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.tuples(st.floats(allow_nan=False), st.integers(0, 3)), min_size=1, max_size=70))
def test_the_order_is_python_s_own(backend, rows):
    confidence, error = np.array([c for c, _ in rows]), np.array([e / 3 for _, e in rows])
    with native.use(backend):
        places, tie_ends = native.order(confidence, error)
    expected = sorted(range(len(rows)), key=lambda row: (-confidence[row], error[row], row))
    assert places.tolist() == expected
    ends = [
        i + 1 for i in range(len(rows)) if i + 1 == len(rows) or confidence[expected[i]] != confidence[expected[i + 1]]
    ]
    assert tie_ends.tolist() == ends


def draw_answers(rng, n, *, levels, classes=2):
    """Confidences with ties, labels, answers and errors of a classifier that is right three times in four."""
    confidence = rng.integers(0, levels, n) / levels
    labels = rng.integers(0, classes, n)
    predicted = np.where(rng.random(n) < 0.75, labels, rng.integers(0, classes, n))
    return confidence, labels, predicted, predicted != labels


def rate(part, whole):
    return part / whole if whole else float("nan")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(30))
def test_a_sweep_counts_what_each_threshold_accepts(backend, seed):
    rng = np.random.default_rng(seed)
    n, classes = int(rng.integers(1, 40)), int(rng.integers(2, 4))
    confidence, labels, predicted, error = draw_answers(rng, n, levels=int(rng.integers(1, 20)), classes=classes)
    positive = int(rng.integers(0, classes))
    with native.use(backend):
        swept = metrics.sweep(confidence, error, labels, predicted, positive)
    assert swept.threshold.tolist() == sorted(set(confidence.tolist()), reverse=True)
    for point, threshold in enumerate(swept.threshold):
        rows = confidence >= threshold
        truth, answer = labels[rows] == positive, predicted[rows] == positive
        missed, alarms = int((truth & ~answer).sum()), int((~truth & answer).sum())
        assert swept.n_accepted[point] == rows.sum()
        assert swept.n_errors[point] == error[rows].sum()
        assert (swept.n_positive[point], swept.n_false_negative[point]) == (truth.sum(), missed)
        assert (swept.n_negative[point], swept.n_false_positive[point]) == ((~truth).sum(), alarms)
        assert swept.coverage[point] == rows.sum() / n
        assert swept.selective_risk[point] == error[rows].mean()
        assert swept.generalized_risk[point] == error[rows].sum() / n
        np.testing.assert_equal(swept.fnr[point], rate(missed, int(truth.sum())))
        np.testing.assert_equal(swept.fpr[point], rate(alarms, int((~truth).sum())))


@needs_core
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("losses", [False, True], ids=["errors", "losses"])
@pytest.mark.parametrize("levels", [1, 11, 5000])
def test_a_sweep_is_that_of_the_twin(dtype, losses, levels):
    rng = np.random.default_rng(levels)
    confidence, labels, predicted, error = draw_answers(rng, 5000, levels=levels)
    confidence = (confidence - 0.5).astype(dtype)
    confidence[confidence == 0] *= rng.choice([-1, 1], int((confidence == 0).sum())).astype(dtype)
    error = rng.random(5000) if losses else error
    for answers in ((), (labels, predicted)):
        with native.use("reference"):
            expected = metrics.sweep(confidence, error, *answers)
        found = metrics.sweep(confidence, error, *answers)
        for name, values in vars(expected).items():
            ours = getattr(found, name)
            assert (ours is None and values is None) or ours.tobytes() == values.tobytes(), name


def test_a_sweep_is_the_risk_coverage_curve_and_scikit_learn_s_roc():
    rng = np.random.default_rng(4)
    score, labels, _, _ = draw_answers(rng, 3000, levels=200)
    score = np.clip(score + 0.2 * labels, 0, 1).astype(np.float32)
    error = (score >= 0.5) != labels
    confidence = np.maximum(score, 1 - score)
    swept, curve = metrics.sweep(confidence, error, labels), metrics.risk_coverage(confidence, error)
    for name, values in vars(curve).items():
        assert np.array_equal(getattr(swept, name), values), name
    # Accepting as positive what scores high: the accepted are the answered positives of a ROC curve.
    swept = metrics.sweep(score, np.zeros(3000), labels, np.ones(3000, int))
    false_positives, true_positives, thresholds = roc_curve(labels, score, drop_intermediate=False)
    assert np.array_equal(swept.threshold, thresholds[1:])
    assert swept.n_positive / swept.n_positive[-1] == pytest.approx(true_positives[1:], abs=1e-12)
    assert swept.n_false_positive / swept.n_negative[-1] == pytest.approx(false_positives[1:], abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 60), losses=st.booleans())
def test_a_sweep_ignores_row_order_and_monotone_maps(seed, n, losses):
    rng = np.random.default_rng(seed)
    confidence, labels, predicted, error = draw_answers(rng, n, levels=9)
    error = rng.random(n) if losses else error
    swept = vars(metrics.sweep(confidence, error, labels, predicted))
    order = rng.permutation(n)
    moved = vars(metrics.sweep(confidence[order], error[order], labels[order], predicted[order]))
    mapped = vars(metrics.sweep(np.exp(5 * confidence) - 7, error, labels, predicted))
    for name, values in swept.items():
        assert moved[name].tobytes() == values.tobytes()
        assert name == "threshold" or mapped[name].tobytes() == values.tobytes()


def test_a_two_class_answer_follows_from_label_and_error():
    rng = np.random.default_rng(0)
    confidence, labels, predicted, error = draw_answers(rng, 300, levels=20)
    for positive in (0, 1):
        told = metrics.sweep(confidence, error, labels, predicted, positive)
        derived = metrics.sweep(confidence, error, labels, positive=positive)
        assert derived.fnr.tobytes() == told.fnr.tobytes()
        assert derived.fpr.tobytes() == told.fpr.tobytes()
    unlabelled = metrics.sweep(confidence, error)
    assert np.isnan(unlabelled.fnr).all() and np.isnan(unlabelled.fpr).all()
    assert unlabelled.n_positive is None
    only = metrics.sweep([0.9, 0.8], [0, 1], [0, 1])
    assert np.isnan(only.fnr[0]) and only.fnr[1] == 1 and only.fpr.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5, 0.6], [0, 1], [0, 2]), "predicted must be given unless the classes are 0 and 1, got label 2 at row 1"),
        (([0.5, 0.6], [0, 1], [0, 1], None, 2), "predicted must be given unless .* got positive 2"),
        (([0.5, 0.6], [0, 0.5], [0, 1]), "predicted must be given when error holds losses"),
        (([0.5, 0.6], [0, 1], None, [0, 1]), "labels must be given with predicted"),
        (([0.5, 0.6], [0, 1], [0]), r"labels must have shape \[2\] as confidence, got \[1\]"),
        (([0.5, 0.6], [0, 1], [0, 1], [[0, 1]]), r"predicted must have shape \[2\]"),
        (([0.5, 0.6], [0, 1], ["a", "b"]), "labels must be class indices"),
        (([0.5, np.nan], [0, 1]), "confidence must not be NaN, got NaN at row 1"),
    ],
)
def test_what_a_sweep_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        metrics.sweep(*arguments)


def every_pair(score, positive, max_fnr, second, limit):
    """All pairs of cuts between distinct scores: (exited, -wrong, -missed) of the best, and the smallest FNR."""
    values = sorted(set(score.tolist()), reverse=True)
    best, smallest = None, None
    for i in range(len(values) + 1):
        for j in range(i, len(values) + 1):
            as_positive, as_negative = np.isin(score, values[:i]), np.isin(score, values[j:])
            missed, alarms = int((as_negative & positive).sum()), int((as_positive & ~positive).sum())
            positives = int((as_positive & positive).sum()) + missed
            negatives = int((as_negative & ~positive).sum()) + alarms
            part, whole = (alarms, negatives) if second == "max_fpr" else (missed + alarms, positives + negatives)
            if not positives or not whole or Fraction(part, whole) > Fraction(repr(limit)):
                continue
            fnr = Fraction(missed, positives)
            smallest = fnr if smallest is None else min(smallest, fnr)
            worth = positives + negatives, -missed - alarms, -missed
            if fnr <= Fraction(repr(max_fnr)) and (best is None or worth > best):
                best = worth
    return best, smallest


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("second", ["max_fpr", "max_exit_error"])
def test_two_thresholds_are_the_best_of_all_pairs(backend, second):
    reached = unreached = partial = 0
    for seed in range(600):
        rng = np.random.default_rng(seed)
        n, levels = int(rng.integers(1, 26)), int(rng.integers(1, 14))
        positive = rng.random(n) < rng.choice([0.1, 0.5, 0.9])
        lean = rng.choice([0.0, 0.3, 0.6, -0.3])
        score = (np.clip(rng.random(n) + lean * (positive - 0.5), 0, 1) * levels).round() / levels
        score = score.astype(rng.choice([np.float32, np.float64]))
        max_fnr, limit = float(rng.choice([0, 0.1, 0.2, 0.25, 0.5])), float(rng.choice([0, 0.05, 0.125, 0.2, 0.4]))
        best, smallest = every_pair(score, positive, max_fnr, second, limit)
        with native.use(backend):
            if best is None:
                with pytest.raises(NotReachableError) as caught:
                    metrics.dual_threshold(score, positive, max_fnr=max_fnr, **{second: limit})
                unreached += 1
                if smallest is not None:
                    assert f"the smallest FNR on exits is {float(smallest):.4g}, " in str(caught.value)
                continue
            found = metrics.dual_threshold(score, positive, max_fnr=max_fnr, **{second: limit})
        reached += 1
        partial += found.coverage < 1
        assert (found.n_exited, -found.n_false_negative - found.n_false_positive, -found.n_false_negative) == best
        assert found.lower < found.upper
        # The record's own thresholds give the record's counts.
        as_positive, as_negative = score >= found.upper, score <= found.lower
        assert found.coverage == (as_positive | as_negative).mean()
        assert found.fnr == (as_negative & positive).sum() / (positive & (as_positive | as_negative)).sum()
        assert found.exit_error == ((as_negative & positive) | (as_positive & ~positive)).sum() / found.n_exited
        negatives = int((~positive & (as_positive | as_negative)).sum())
        np.testing.assert_equal(found.fpr, rate(int((as_positive & ~positive).sum()), negatives))
    assert min(reached, unreached, partial) > 50


@needs_core
@pytest.mark.parametrize("second", ["max_fpr", "max_exit_error"])
def test_the_search_is_that_of_the_twin(second):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        positive = rng.random(4000) < 0.4
        score = np.clip(rng.normal(0.35 + 0.3 * positive, 0.12), 0, 1).astype(np.float32)
        limits = {
            "max_fnr": float(rng.choice([0.001, 0.0123456789012345, 0.05])),
            second: float(rng.choice([0.002, 0.03])),
        }
        with native.use("reference"):
            expected = metrics.dual_threshold(score, positive, **limits)
        assert metrics.dual_threshold(score, positive, **limits) == expected
        assert 0 < expected.coverage < 1 or seed


@needs_core
@pytest.mark.parametrize("exit_error", [False, True])
def test_small_searches_are_those_of_the_twin_too(exit_error):
    rng = np.random.default_rng(9)
    for _ in range(1500):
        groups = rng.integers(0, 4, (int(rng.integers(1, 12)), 2))
        groups[groups.sum(axis=1) == 0, 0] = 1
        positives, negatives = np.concatenate([[[0, 0]], groups.cumsum(axis=0)]).T
        accepted = np.ascontiguousarray(positives + negatives)
        limits = {name: Fraction(int(rng.integers(0, 5)), 8) for name in ("max_fnr", "max_second")}
        with native.use("reference"):
            expected = native.search_dual(accepted, positives.copy(), exit_error=exit_error, **limits)
        assert native.search_dual(accepted, positives.copy(), exit_error=exit_error, **limits) == expected


def test_limits_are_the_decimals_they_are_written_as():
    # 3 of 100 exited positives are missed, and 0.03 is a little less than 3/100 in binary; 1/3 is not 0.3333.
    score = np.concatenate([np.full(97, 0.9), np.full(3, 0.1), np.full(200, 0.1)])
    positive = np.arange(300) < 100
    found = metrics.dual_threshold(score, positive, max_fnr=0.03, max_fpr=0.1)
    assert (found.coverage, found.n_false_negative) == (1, 3)
    with pytest.raises(NotReachableError, match=r"smallest FNR on exits is 0\.03, with coverage 1: 3 of 100"):
        metrics.dual_threshold(score, positive, max_fnr=0.0299999999999, max_fpr=0.1)


def test_thresholds_lie_between_rows():
    found = metrics.dual_threshold([0.1, 0.4, 0.6, 0.9], [0, 1, 0, 1], max_fnr=0, max_fpr=0)
    assert (found.lower, found.upper) == (0.25, 0.75)
    found = metrics.dual_threshold([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], max_fnr=0, max_fpr=0)
    assert (found.lower, found.upper) == pytest.approx((0.4, 0.6))
    assert found.coverage == 1
    close = np.nextafter(np.float32(0.5), np.float32(1))
    found = metrics.dual_threshold(np.array([0.5, close], np.float32), [0, 1], max_fnr=0, max_exit_error=0)
    assert (found.lower, found.upper) == (0.5, close)
    found = metrics.dual_threshold([0.5, 0.9], [1, 1], max_fnr=0, max_exit_error=0)
    assert (found.lower, found.upper) == (-np.inf, 0.25)
    assert np.isnan(found.fpr)


@pytest.mark.parametrize(
    ("score", "positive", "limits", "error", "message"),
    [
        ([0.5], [1], {"max_fnr": 0.02}, InputError, "max_fpr or max_exit_error must be given.* got neither"),
        ([0.5], [1], {"max_fnr": 0.02, "max_fpr": 0.1, "max_exit_error": 0.1}, InputError, "got both"),
        ([0.5], [1], {"max_fnr": 1.0, "max_fpr": 0.1}, InputError, r"max_fnr must be in \[0, 1\), got 1.0"),
        ([0.5], [1], {"max_fnr": 0.1, "max_exit_error": -0.1}, InputError, "max_exit_error must be in"),
        ([0.5], [1], {"max_fnr": float("nan"), "max_fpr": 0.1}, InputError, "max_fnr must be in"),
        ([0.5, 1.5], [1, 0], {"max_fnr": 0.1, "max_fpr": 0.1}, InputError, "score must be in .* got 1.5 at row 1"),
        (
            [0.5, 0.6],
            [1, 2],
            {"max_fnr": 0.1, "max_fpr": 0.1},
            InputError,
            "positive must be booleans or 0/1, got 2 at",
        ),
        ([0.5, np.nan], [1, 0], {"max_fnr": 0.1, "max_fpr": 0.1}, InputError, "got NaN at row 1"),
        ([0.5], [0], {"max_fnr": 0.1, "max_fpr": 0.1}, NotReachableError, "none of the 1 rows is positive"),
        ([0.5], [1], {"max_fnr": 0.1, "max_fpr": 0.1}, NotReachableError, "none of the 1 rows is negative"),
        (
            [0.5, 0.5],
            [1, 0],
            {"max_fnr": 0.1, "max_exit_error": 0.1},
            NotReachableError,
            "smallest exit error .* is 0.5",
        ),
    ],
)
def test_what_two_thresholds_refuse(score, positive, limits, error, message):
    with pytest.raises(error, match=message):
        metrics.dual_threshold(score, positive, **limits)


@settings(deadline=None, max_examples=200)
@given(numerator=st.integers(0, 10**17), denominator=st.integers(1, 10**17), limit=st.integers(1, 60))
def test_the_floor_of_a_fraction_is_the_largest_below_it(numerator, denominator, limit):
    value = Fraction(numerator, denominator)
    assert floor_fraction(value, limit) == max(Fraction(value * q // 1, q) for q in range(1, limit + 1))


@needs_core
def test_concurrent_sweeps_give_the_serial_answers():
    rng = np.random.default_rng(1)
    cases = [draw_answers(rng, 20_000, levels=3000) for _ in range(8)]
    serial = [metrics.sweep(c, e, y).fnr.tobytes() for c, y, _, e in cases]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(metrics.sweep, c, e, y) for c, y, _, e in cases]
        assert [job.result().fnr.tobytes() for job in jobs] == serial
