"""Statistics on arrays against scikit-learn, SciPy, MAPIE, crepes, brute force, and simulations with known truths."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import sklearn.metrics as judge
from crepes import ConformalClassifier
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.rates import show
from scipy import stats
from test_intervals import LAWS, enough, thresholds_of, truths_of
from test_scrc import drawn, mapie_sets, slow_scores

from stage1_pro import native
from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.metrics import (
    ConfidenceHistogram,
    auarc,
    augrc,
    aurc,
    average_precision,
    bootstrap,
    bootstrap_errors,
    calibration_test,
    cheapest_threshold,
    cost_of_exits,
    coverage_at_risk,
    delong,
    ece,
    excess_augrc,
    excess_aurc,
    fpr_at_tpr,
    mcnemar,
    permutation_test,
    risk_at_coverage,
    risk_band,
)
from stage1_pro.metrics.histogram import BINS, _least, _moves, _places
from stage1_pro.metrics.table import METRICS
from stage1_pro.policies import AdaptiveSets, conformal_sets

ROWS = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=60)


def at_most(share: float, promise: float, draws: int) -> bool:
    """Whether a share of draws is at most what was promised, but for three standard errors."""
    return share <= promise + 3 * math.sqrt(promise * (1 - promise) / draws)


# ---------------------------------------------------------------------------------------------- ranking


@given(ROWS, st.sampled_from([0.5, 0.8, 0.95, 1.0]))
@settings(deadline=None, max_examples=50)
def test_average_precision_and_fpr_are_scikit_learns(rows, tpr):
    score, positive = (np.array(column) for column in zip(*rows, strict=True))
    if positive.any():
        assert average_precision(score, positive) == pytest.approx(judge.average_precision_score(positive, score))
    else:
        assert math.isnan(average_precision(score, positive))
    if positive.all() or not positive.any():
        assert math.isnan(fpr_at_tpr(score, positive, tpr))
        return
    fpr, reached, _ = judge.roc_curve(positive, score, drop_intermediate=False)
    assert fpr_at_tpr(score, positive, tpr) == pytest.approx(fpr[np.argmax(reached >= tpr - 1e-12)])


@given(st.lists(st.booleans(), min_size=1, max_size=6))
@settings(deadline=None, max_examples=20)
def test_excess_is_over_the_best_of_all_rankings(wrong):
    """The best of all orders of these errors, one by one."""
    n, rate = len(wrong), sum(wrong) / len(wrong)
    best = min(aurc(-np.arange(n), np.array(order)) for order in itertools.permutations(wrong))
    given_order = -np.arange(n)
    assert excess_aurc(given_order, wrong) == pytest.approx(aurc(given_order, wrong) - best, abs=1e-15)
    assert excess_augrc(given_order, wrong) == pytest.approx(augrc(given_order, wrong) - rate**2 / 2, abs=1e-15)
    assert excess_aurc(-np.array(sorted(range(n), key=wrong.__getitem__)), sorted(wrong)) >= -1e-15


def test_excess_and_accuracy_rejection_have_their_published_forms():
    rng = np.random.default_rng(0)
    sure = rng.random(20_000)
    wrong = rng.random(20_000) > sure
    e = wrong.mean()
    assert excess_aurc(sure, wrong) == pytest.approx(aurc(sure, wrong) - (e + (1 - e) * math.log(1 - e)), abs=1e-4)
    auroc = judge.roc_auc_score(~wrong, sure)
    assert excess_augrc(sure, wrong) == pytest.approx((1 - auroc) * e * (1 - e), abs=1e-12)
    order = np.argsort(-sure)
    kept = np.cumsum(~wrong[order]) / np.arange(1, 20_001)
    assert auarc(sure, wrong) == pytest.approx(kept.mean(), abs=1e-4)


# ---------------------------------------------------------------------------------------------- tests


@given(ROWS)
@settings(deadline=None, max_examples=50)
def test_delong_of_one_auroc_is_brunner_and_munzels_test(rows):
    """Theirs has the same statistic and, for the normal law, the same p-value."""
    score, positive = (np.array(column) for column in zip(*rows, strict=True))
    found = delong(score, positive)
    if min(positive.sum(), (~positive).sum()) < 2 or math.isnan(found.std):
        assert math.isnan(found.p_value)
        return
    assert found.value == pytest.approx(judge.roc_auc_score(positive, score))
    theirs = stats.brunnermunzel(score[~positive], score[positive], distribution="normal")
    assert found.p_value == pytest.approx(theirs.pvalue, abs=1e-12)
    assert found.low <= found.value <= found.high


def test_delong_of_a_pair_is_the_covariance_of_all_placements():
    rng = np.random.default_rng(1)
    positive = rng.random(150) < 0.4
    first = np.round(positive + rng.normal(size=150), 1)
    second = np.round(positive + 2 * rng.normal(size=150) + 0.3 * first, 1)
    above = [
        np.heaviside(score[positive][:, None] - score[~positive][None], 0.5) for score in (first, second)
    ]  # [m, n] each
    by_positive, by_negative = (np.cov([one.mean(axis=axis) for one in above]) for axis in (1, 0))
    m, n = above[0].shape
    variance = sum(np.array([1, -1]) @ c @ [1, -1] / size for c, size in ((by_positive, m), (by_negative, n)))
    found = delong(first, positive, second)
    difference = above[0].mean() - above[1].mean()
    assert (found.value, found.std) == pytest.approx((difference, math.sqrt(variance)))
    assert found.p_value == pytest.approx(2 * stats.norm.sf(abs(difference) / math.sqrt(variance)))
    turned = delong(second, positive, first)
    assert (turned.value, turned.p_value) == pytest.approx((-found.value, found.p_value))
    assert not found.note
    assert "only 29 rows of one class" in delong(first[:100], np.arange(100) < 29).note
    copies = delong(*(np.repeat(x, 4) for x in (first, positive, second)), groups=np.repeat(np.arange(150), 4))
    assert (copies.value, copies.std) == pytest.approx((found.value, found.std), rel=0.02)


def test_delong_errs_as_often_as_it_says_also_by_groups():
    rng, draws = np.random.default_rng(2), 800
    rejected, covered = np.zeros(2), np.zeros(2)
    for _ in range(draws):
        positive = rng.random(60) < 0.4
        common = positive + rng.normal(size=60)
        first, second = common + rng.normal(size=60), common + rng.normal(size=60)
        rejected[0] += delong(first, positive, second).p_value <= 0.05
        truth = stats.norm.cdf(1 / math.sqrt(2) / math.sqrt(2))
        covered[0] += delong(first, positive).low <= truth <= delong(first, positive).high
        clips = np.repeat(np.arange(60), 3)
        many = [np.repeat(x, 3) + 0.3 * rng.normal(size=180) for x in (first, second)]
        rejected[1] += delong(many[0], np.repeat(positive, 3), many[1], groups=clips).p_value <= 0.05
        one = delong(many[0], np.repeat(positive, 3), groups=clips)
        covered[1] += one.low <= stats.norm.cdf(1 / math.sqrt(2 * (2 + 0.09))) <= one.high
    show("DeLong rejects at .05, rows and groups", "60 positives and negatives", "at most .05", rejected / draws, draws)
    assert all(at_most(share, 0.06, draws) for share in rejected / draws), "a normal law of 60 rows"
    assert all(enough(share, 0.94, draws) for share in covered / draws)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80), st.sampled_from([0.9, 0.95]))
@settings(deadline=None, max_examples=50)
def test_mcnemar_is_scipys_binomial_test(rows, level):
    first, second = (np.array(column) for column in zip(*rows, strict=True))
    found, differ = mcnemar(first, second, level=level), int((first != second).sum())
    if not differ:
        assert (found.p_value, found.low, found.high) == (1.0, 0.0, 1.0)
        return
    theirs = stats.binomtest(int((first & ~second).sum()), differ)
    ends = theirs.proportion_ci(level, "exact")
    assert found.p_value == pytest.approx(theirs.pvalue)
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high))
    assert (found.low <= 0.5 <= found.high) == (found.p_value > 1 - level + 1e-12)
    assert permutation_test(first, second).p_value == pytest.approx(theirs.pvalue)


@pytest.mark.parametrize("seed", range(6))
def test_permutation_weighs_the_patterns_that_scipy_lists(seed):
    rng = np.random.default_rng(seed)
    clips = rng.integers(0, 11, 40)
    loss, other = rng.integers(0, 2 + 3 * (seed % 2), (2, 40)) / 4
    sums = np.bincount(clips, loss - other)
    theirs = stats.permutation_test(
        (sums, np.zeros(sums.size)), lambda a, b: (a - b).sum(), permutation_type="samples", n_resamples=np.inf
    )
    found = permutation_test(loss, other, groups=clips)
    assert found.p_value == pytest.approx(theirs.pvalue)
    assert found.value == pytest.approx((loss - other).mean())
    moved = np.random.default_rng(9).permutation(40)
    assert permutation_test(loss[moved], other[moved], groups=clips[moved]).p_value == found.p_value


def test_drawn_permutations_agree_with_all_of_them_and_reject_as_often_as_they_say():
    rng = np.random.default_rng(3)
    few = rng.normal(0.3, 1, 15)
    exact = permutation_test(few, np.zeros(15)).p_value
    # The same sums among rows that do not matter, so that signs are drawn.
    drawn_ones = permutation_test(
        np.append(few, 1e-9 * rng.random(30)), np.zeros(45), n_permutations=20_000, seed=1
    ).p_value
    assert drawn_ones == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000))
    draws, rejected = 600, np.zeros(2)
    for draw in range(draws):
        first, second = rng.exponential(size=(2, 25))
        rejected[0] += permutation_test(first, second, n_permutations=199, seed=draw).p_value <= 0.05
        wrong = rng.random((2, 40)) < 0.3
        rejected[1] += permutation_test(*wrong, groups=np.arange(40) // 2).p_value <= 0.05
    assert all(at_most(share, 0.05, draws) for share in rejected / draws)
    assert permutation_test([1, 2], [1, 2]).p_value == 1
    assert permutation_test([1, 0], [0, 0], groups=["a", "a"]).p_value == 1


def test_a_calibrated_model_is_seldom_called_uncalibrated_and_a_bold_one_often():
    rng, draws = np.random.default_rng(4), 300
    called, bold, over = 0, 0, []
    for draw in range(draws):
        p = rng.uniform(0.5, 1, 150)
        labels = (rng.random(150) > p).astype(int)
        probs = np.stack([p, 1 - p], 1)
        found = calibration_test(probs, labels, n_draws=99, seed=draw)
        assert found.value == pytest.approx(ece(probs, labels))
        called += found.p_value <= 0.05
        over.append(found.value - found.expected)
        sharp = p**0.4
        bold += calibration_test(np.stack([sharp, 1 - sharp], 1), labels, n_draws=99, seed=draw).p_value <= 0.05
    assert at_most(called / draws, 0.05, draws)
    assert abs(np.mean(over)) < 3 * np.std(over) / math.sqrt(draws), "what chance gives is taken off"
    assert bold / draws > 0.9


# ---------------------------------------------------------------------------------------------- costs


@given(ROWS, st.floats(0.1, 20), st.floats(0, 5))
@settings(deadline=None, max_examples=50)
def test_the_cheapest_threshold_is_that_of_all(rows, wrong, deferral):
    sure, error = (np.array(column) for column in zip(*rows, strict=True))
    found = cheapest_threshold(sure, error, wrong=wrong, deferral=deferral)
    every = {
        t: sum(wrong * e if s >= t else deferral for s, e in rows) / len(rows) for t in [*sorted(set(sure)), math.inf]
    }
    assert found.cost == pytest.approx(min(every.values()))
    assert cost_of_exits(sure, error, found.threshold, wrong=wrong, deferral=deferral) == pytest.approx(found.cost)
    assert found.coverage == pytest.approx((sure >= found.threshold).mean())
    assert (found.all_exit, found.all_deferred) == pytest.approx((every[sure.min()], deferral))


def test_prices_want_chows_threshold_where_confidence_is_calibrated():
    rng = np.random.default_rng(5)
    sure = rng.random(200_000)
    error = rng.random(200_000) > sure
    found = cheapest_threshold(sure, error, wrong=10, deferral=2)
    assert found.bayes == 0.8
    assert found.threshold == pytest.approx(0.8, abs=0.03)
    second = rng.random(200_000) > 0.95
    priced = cheapest_threshold(sure, error, wrong=10, deferral=0.5 + 10 * second)
    assert math.isnan(priced.bayes)
    assert priced.threshold == pytest.approx(1 - (0.5 + 0.5) / 10, abs=0.03)


# ---------------------------------------------------------------------------------------------- bands


def band_covers(law: str, size: str, draws: int, points: int) -> float:
    """The share of draws in which the truth lies inside the band at every one of its points."""
    rng = np.random.default_rng(6)
    n, groups = (0, int(size.split(maxsplit=1)[0])) if "groups" in size else (int(size), 0)
    coverage, risk = truths_of(law)
    # Of a threshold -u the coverage is u; of 20 levels that of the level.
    held = 0
    for _ in range(draws):
        sure, wrong, group = thresholds_of(law, n, rng, groups)
        band = risk_band(sure, wrong, groups=group if groups else None, points=points)
        depth = -band.threshold if law != "20 levels" else (1 - band.threshold) / 20
        at = np.minimum(np.searchsorted(coverage, depth - 1e-9), coverage.size - 1)
        truth = np.where(band.coverage == 1, risk[-1], risk[at])
        held += bool(((band.low <= truth) & (truth <= band.high)).all())
    return held / draws


@pytest.mark.parametrize("law", ["risk at coverage c is c / 10", "20 levels"])
@pytest.mark.parametrize("size", ["300", "150 groups"])
def test_the_band_covers_the_whole_curve_quickly(law, size):
    assert enough(band_covers(law, size, 200, 20), 0.95, 200)


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("size", ["100", "1000", "5000", "60 groups", "400 groups"])
def test_the_band_covers_the_whole_curve(law, size):
    share = band_covers(law, size, 1000, 100)
    show("risk band, all points at once", f"{law}, {size}", "covers .95", [share], 1000)
    assert enough(share, 0.95, 1000)


def test_the_band_is_clopper_and_pearsons_at_a_shared_level():
    rng = np.random.default_rng(7)
    sure = rng.random(200)
    error = rng.random(200) > sure
    band = risk_band(sure, error, points=4, level=0.9)
    assert np.array_equal(band.coverage, [0.25, 0.5, 0.75, 1.0])
    for j, at in enumerate(band.threshold):
        k, n = int(error[sure >= at].sum()), int((sure >= at).sum())
        ends = stats.binomtest(k, n).proportion_ci(1 - 0.1 / 4, "exact")
        assert (band.low[j], band.high[j]) == pytest.approx((ends.low, ends.high))
    one = risk_band([0.5], [1])
    assert (one.coverage.tolist(), one.selective_risk.tolist(), one.high.tolist()) == ([1.0], [1.0], [1.0])
    tied = risk_band(np.ones(50), np.arange(50) % 2)
    assert tied.coverage.tolist() == [1.0]


# ---------------------------------------------------------------------------------------------- weights


def rows_of(n: int, seed: int = 8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    logits = rng.normal(size=(n, 3)) + 1.5 * np.eye(3)[labels]
    probs = np.round(np.exp(logits) / np.exp(logits).sum(1, keepdims=True), 2)
    return probs / probs.sum(1, keepdims=True), labels


@pytest.mark.parametrize("more", [{}, {"groups": np.arange(150) // 3}, {"stratify": True}, {"metrics": "augrc"}])
def test_equal_weights_change_no_bit(more):
    probs, labels = rows_of(150)
    asked = {"threshold": 0.6, "positive": 1, "n_replicates": 30, **more}
    if more.get("metrics"):
        asked = {"n_replicates": 30, **more}
    plain = bootstrap(probs, labels, **asked)
    for weight in (1, 0.3):
        found = bootstrap(probs, labels, weights=np.full(150, weight), **asked)
        assert repr(found.to_dict()) == repr(plain.to_dict())
        assert all(np.array_equal(found[name].replicates, plain[name].replicates, equal_nan=True) for name in plain)


def test_weights_of_one_in_numpy_measure_what_the_kernel_measures():
    rng = np.random.default_rng(9)
    sure, error = native.rows(np.round(rng.random(300), 2), rng.random(300) < 0.3)
    plain = native.Columns(sure, error, threshold=0.5)
    weighted = native.Columns(sure, error, threshold=0.5, weight=np.ones(300))
    suites = [native.Suite([one], coverages=[0.5], risks=[0.2]) for one in (plain, weighted)]
    for made in (lambda suite: suite.values()[0], lambda suite: suite.resample(20, seed=3)[0]):
        np.testing.assert_allclose(made(suites[0]), made(suites[1]), rtol=1e-12, equal_nan=True)


def test_whole_weights_are_repeated_rows():
    """Every value is that of the repeated rows, and so is the mean over resamples of groups of them."""
    probs, labels = rows_of(120)
    times = np.random.default_rng(10).integers(0, 4, 120)
    copies = np.repeat(np.arange(120), times)
    asked = {"threshold": 0.6, "positive": 1, "n_replicates": 400}
    found = bootstrap(probs, labels, weights=times, **asked)
    plain = bootstrap(probs[copies], labels[copies], groups=copies, **asked)
    assert found.n_rows == (times > 0).sum() == plain.n_units
    for name, one in found.items():
        assert one.value == pytest.approx(plain[name].value, abs=1e-12), name
        if one.method == "bca" and plain[name].method == "bca":
            noise = 4 * math.sqrt(2) * one.std / math.sqrt(400)
            assert one.replicates.mean() == pytest.approx(plain[name].replicates.mean(), abs=noise), name
            assert one.std == pytest.approx(plain[name].std, rel=0.25), name
    moved = np.random.default_rng(11).permutation(120)
    again = bootstrap(probs[moved], labels[moved], weights=times[moved], **asked)
    assert all(np.array_equal(again[name].replicates, found[name].replicates, equal_nan=True) for name in found)
    twice = bootstrap(probs, labels, weights=2.0 * times, **asked)
    assert all(twice[name].low == pytest.approx(found[name].low, abs=1e-9, nan_ok=True) for name in found)


def test_influences_under_weights_are_the_derivatives():
    probs, labels = rows_of(60)
    rng = np.random.default_rng(12)
    answered = probs.argmax(1)
    weight = rng.uniform(0.2, 3, 60)
    weight *= 60 / weight.sum()
    columns = native.Columns(
        probs.max(1), (answered != labels).astype(np.uint8), positive=labels == 1,
        missed=(labels == 1) & (answered != 1), nll=rng.random(60), brier=rng.random(60), threshold=0.6, weight=weight,
    )  # fmt: skip
    suite = native.Suite([columns])
    (ranked,), (values,) = suite.models, suite.values()
    for at, name in enumerate(native.SUITE):
        slope = METRICS[name].influence_on(ranked, values[at], 0.0).slope
        for row in range(0, 60, 7):
            changed = ranked.weight.copy()
            changed[row] *= 1 + 1e-6
            moved = suite._weighted(ranked, changed)[at]
            assert slope[row] == pytest.approx((moved - values[at]) / 1e-6, abs=1e-6), (name, row)


def test_weights_say_what_they_leave():
    sure, weight = np.arange(50.0), np.append(np.full(5, 100.0), np.ones(45))
    found = bootstrap_errors(sure, np.zeros(50), weights=weight, n_replicates=20)
    assert "by their unlike weights they count as 6" in found["accuracy"].note
    assert found["coverage_at_risk_0.1"].method == "by weight"
    some = bootstrap_errors(sure, np.arange(50) % 3 == 0, weights=weight, n_replicates=20)
    assert "only 6 rows by their weights" in some["augrc"].note
    for wrong in (np.zeros(50), -weight, weight[:3], np.full(50, np.nan)):
        with pytest.raises(InputError, match="weights must"):
            bootstrap_errors(sure, np.zeros(50), weights=wrong)


@pytest.mark.slow
def test_weighted_intervals_cover_the_metric_of_another_mix():
    """Drawn half and half, measured for one positive in ten; truth from a million rows."""

    def draw(n: int, share: float, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        positive = rng.random(n) < share
        sure = np.where(positive, rng.beta(2, 1, n), rng.beta(5, 1, n))
        return sure, rng.random(n) > sure, np.where(positive, 0.1 / 0.5, 0.9 / 0.5)

    rng, draws = np.random.default_rng(13), 500
    sure, error, _ = draw(1_000_000, 0.1, rng)
    truth = {"augrc": augrc(sure, error), "aurc": aurc(sure, error), "accuracy": 1 - error.mean()}
    truth["risk_at_coverage_0.8"] = risk_at_coverage(sure, error, 0.8).selective_risk
    truth["coverage_at_risk_0.1"] = coverage_at_risk(sure, error, 0.1).coverage
    held = np.zeros(len(truth))
    for seed in range(draws):
        sure, error, weight = draw(400, 0.5, rng)
        found = bootstrap_errors(sure, error, weights=weight, metrics=[*truth], n_replicates=300, seed=seed)
        held += [found[name].low <= value <= found[name].high for name, value in truth.items()]
    show("weighted intervals", ", ".join(truth), "covers .95", held / draws, draws)
    assert all(enough(share, 0.94, draws) for share in held / draws)


# ---------------------------------------------------------------------------------------------- histograms


def counted(n: int, seed: int = 14) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    sure = rng.beta(6, 0.5, n)
    return sure, rng.random(n) > sure


def test_parts_add_up_to_the_whole_and_files_bring_them_back(tmp_path):
    sure, error = counted(30_000)
    whole = ConfidenceHistogram().add(sure, error)
    parts = [ConfidenceHistogram().add(sure[i::3].tolist(), error[i::3]) for i in range(3)]
    merged = parts[2] + parts[0] + parts[1]
    assert np.array_equal(merged.counts, whole.counts)
    assert whole.n == 30_000
    merged.write(tmp_path / "counts.npz")
    assert np.array_equal(ConfidenceHistogram.read(tmp_path / "counts.npz").counts, whole.counts)
    np.savez(tmp_path / "other.npz", counts=np.ones(3))
    with pytest.raises(ArtifactError, match="counts of a ConfidenceHistogram"):
        ConfidenceHistogram.read(tmp_path / "other.npz")


def test_bins_are_in_order_and_have_the_edges_they_say():
    edges = _least(np.arange(BINS))
    assert (np.diff(edges) > 0).all()
    assert np.array_equal(_places(edges), np.arange(BINS))
    assert np.array_equal(_places(np.nextafter(edges[1:], 0)), np.arange(BINS - 1))
    rng = np.random.default_rng(15)
    sure = np.sort(np.concatenate([rng.random(5000), 1 - 10.0 ** rng.uniform(-17, 0, 5000), [0, 0.5, 1]]))
    assert (np.diff(_places(sure)) >= 0).all()
    low, high = 1 - edges[BINS // 2 + 1 : -1], 1 - edges[BINS // 2 + 2 :]
    assert (low / high).max() < 1 + 2**-9


@given(st.integers(1, 3000), st.integers(0, 10**6), st.integers(1, 5))
@settings(deadline=None, max_examples=40)
def test_the_grid_moves_metrics_no_more_than_it_says(n, seed, digits):
    """Also of coarse scores, and of scores that crowd into few bins."""
    rng = np.random.default_rng(seed)
    sure = np.round(rng.random(n), digits) if seed % 2 else 0.5 + rng.random(n) * 10.0**-digits / 40
    error = rng.random(n) < 0.3
    counts = ConfidenceHistogram().add(sure, error)
    found, moves = counts.measure(), _moves(*counts._through())
    assert abs(found["augrc"].value - augrc(sure, error)) <= moves["augrc"] + 1e-12
    assert abs(found["aurc"].value - aurc(sure, error)) <= moves["aurc"] + 1e-12
    assert found["accuracy"].value == pytest.approx(1 - error.mean())


def test_its_metrics_are_those_of_the_rows_on_the_grid():
    sure, error = counted(20_000)
    on_grid = _least(_places(sure))
    counts = ConfidenceHistogram().add(sure, error)
    found, rows = counts.measure(), bootstrap_errors(on_grid, error, method="logit", n_replicates=2)
    assert list(found) == list(rows)
    for name, one in found.items():
        more = _moves(*counts._through()).get(name, 0.0)
        assert (one.value, one.method) == (pytest.approx(rows[name].value, abs=1e-12), rows[name].method)
        assert (one.low + more, one.high - more) == pytest.approx((rows[name].low, rows[name].high), abs=1e-9), name
    curve = counts.curve()
    for at in (0, 100, -1):
        taken = sure >= curve.threshold[at]
        assert taken.mean() == curve.coverage[at]
        assert error[taken].mean() == pytest.approx(curve.selective_risk[at])


def test_memory_and_time_are_those_of_the_grid_whatever_n():
    sure, error = (np.tile(values, 20) for values in counted(100_000))
    tracemalloc.start()
    counts = ConfidenceHistogram().add(sure.astype(np.float32), error)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - 4 * sure.size < 8 << 20, "but for the float32 copy that was handed over"
    small, many = counts.measure(), ConfidenceHistogram(counts.counts * 10**6)
    large = many.measure()
    assert many.n == 2 * 10**12
    assert large["augrc"].value == pytest.approx(small["augrc"].value, rel=1e-12)
    assert large["augrc"].std == pytest.approx(small["augrc"].std / 1000, rel=1e-5)
    full = ConfidenceHistogram(np.random.default_rng(0).integers(1, 1000, (2, BINS)))
    for use in (full.measure, full.curve):
        tracemalloc.start()
        use()
        peak = tracemalloc.get_traced_memory()[1] + full.counts.nbytes
        tracemalloc.stop()
        assert peak < 8 << 20, peak


def test_what_is_no_row_is_not_counted():
    counts = ConfidenceHistogram()
    with pytest.raises(InputError, match="at least one row"):
        counts.measure()
    sure = np.full(70_000, 0.9)
    sure[69_999] = np.nan
    with pytest.raises(InputError, match=r"got nan at row 69999"):
        counts.add(sure, np.zeros(70_000))
    with pytest.raises(InputError, match="error must be 0 or 1"):
        counts.add([0.5, 0.6], [0, 0.5])
    assert counts.n == 0
    one = counts.add([1.0], [0]).measure()
    assert one["accuracy"].method == "clopper-pearson"


@pytest.mark.slow
def test_closed_form_intervals_of_counts_cover():
    sure, error = counted(2_000_000, 16)
    truth, draws, held = {"augrc": augrc(sure, error), "aurc": aurc(sure, error)}, 1000, np.zeros(2)
    for seed in range(draws):
        found = ConfidenceHistogram().add(*counted(2000, seed)).measure()
        held += [found[name].low <= value <= found[name].high for name, value in truth.items()]
    show("intervals of counts: AUGRC, AURC", "n = 2000", "covers .95", held / draws, draws)
    assert all(enough(share, 0.94, draws) for share in held / draws)


# ---------------------------------------------------------------------------------------------- conformal sets


@pytest.mark.parametrize("n_classes", [2, 5])
def test_plain_sets_are_those_of_mapie(n_classes):
    rng = np.random.default_rng(n_classes)
    for _ in range(15):
        probs, labels, new = drawn(rng, int(rng.integers(80, 400)), n_classes)
        alpha = float(rng.choice([0.05, 0.1, 0.13]))
        ours = conformal_sets(probs, labels).sets(new, alpha)
        np.testing.assert_array_equal(ours, mapie_sets(probs, labels, new, alpha))


@pytest.mark.parametrize("score", ["lac", "aps", "raps"])
@pytest.mark.parametrize("by_class", [False, True])
def test_p_values_are_those_of_crepes(by_class, score):
    rng = np.random.default_rng(17)
    probs, labels, new = drawn(rng, 300, 3)
    losses = np.array([slow_scores(row, score, (0.01, 2), True) for row in probs])[np.arange(300), labels]
    theirs = ConformalClassifier().fit(losses, bins=labels if by_class else None)
    wrong = np.array([slow_scores(row, score, (0.01, 2), True) for row in new])
    expected = [
        theirs.predict_p(wrong[:, [k]], bins=np.full(50, k) if by_class else None, smoothing=False)[:, 0]
        for k in range(3)
    ]
    ours = conformal_sets(probs, labels, score=score, by_class=by_class)
    np.testing.assert_allclose(ours.p_values(new), np.stack(expected, 1))
    np.testing.assert_array_equal(ours.sets(new, 0.107), ours.p_values(new) > 0.107)


def test_sets_miss_as_seldom_as_promised_by_class_too_and_groups_count_once():
    rng, draws = np.random.default_rng(18), 300
    missed = np.zeros(4)
    for _ in range(draws):
        labels = rng.choice(3, 400, p=[0.7, 0.2, 0.1])
        logits = rng.normal(size=(400, 3)) + np.array([3, 1, 0.5])[labels][:, None] * np.eye(3)[labels]
        probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        inside = [
            conformal_sets(probs[:200], labels[:200], by_class=by_class).sets(probs[200:], 0.1)[
                np.arange(200), labels[200:]
            ]
            for by_class in (False, True)
        ]
        missed[0] += (~inside[0]).mean() / draws
        missed[1:] += [(~inside[1])[labels[200:] == k].mean() / draws for k in range(3)]
    assert all(at_most(share, 0.1, draws * 20) for share in missed), missed
    assert missed[0] > 0.09
    grouped = conformal_sets(probs, labels, groups=np.arange(400) // 4)
    assert (grouped.unit, grouped.losses[0].size) == ("groups", 100)
    none = conformal_sets(probs, np.zeros(400, int), by_class=True)
    assert none.sets(probs, 0.1)[:, 1:].all(), "nothing speaks against a class without a row"
    assert conformal_sets(probs[:9], labels[:9]).sets(probs, 0.05).all(), "9 rows cannot exclude at 5%"


def test_an_alpha_that_is_a_whole_number_of_rows_is_decided_by_fractions():
    p = np.arange(1, 100) / 100
    sets = conformal_sets(np.stack([p, 1 - p], 1), np.zeros(99, int)).sets(np.stack([p, 1 - p], 1), 0.29)
    # Nonconformity 1 - p: of class 0 the p-value of the i-th smallest p is (i + 1) / 100, rounding apart.
    assert sets[:, 0].sum() == 99 - 28


@pytest.mark.parametrize("stream", ["shifts", "adversary", "calibrated"])
def test_online_sets_keep_the_share_of_misses_of_any_stream(stream):
    rng = np.random.default_rng(19)
    probs, labels, _ = drawn(rng, 300, 3)
    fitted, gamma, alpha, n = conformal_sets(probs, labels), 0.02, 0.1, 2000
    online = AdaptiveSets(fitted, alpha, gamma=gamma)
    seen, truth, _ = drawn(rng, n, 3)
    if stream == "shifts":
        truth[n // 2 :] = seen[n // 2 :].argmin(1)
    if stream == "adversary":
        chosen = []
        for row in seen:
            outside = np.flatnonzero(~online.predict(row[None])[0])
            chosen.append(int(outside[0]) if outside.size else 0)
            online.follow(row[None], [chosen[-1]])
        truth, online = np.array(chosen), AdaptiveSets(fitted, alpha, gamma=gamma)
    sets = online.follow(seen, truth)
    missed = ~sets[np.arange(n), truth]
    assert (online.n, online.missed) == (n, missed.sum())
    assert abs(missed.mean() - alpha) <= (max(alpha, 1 - alpha) + gamma) / (gamma * n) + 1e-12
    level = alpha
    for row in range(n):
        assert (sets[row] == (fitted.p_values(seen[[row]])[0] > level)).all() or row % 50
        level += gamma * (alpha - missed[row])
    assert online.level == pytest.approx(level)
    halves = AdaptiveSets(fitted, alpha, gamma=gamma)
    first = halves.follow(seen[:700], truth[:700])
    resumed = AdaptiveSets(fitted, alpha, gamma=gamma, level=halves.level, n=halves.n, missed=halves.missed)
    assert np.array_equal(np.concatenate([first, resumed.follow(seen[700:], truth[700:])]), sets)
    assert resumed == online
