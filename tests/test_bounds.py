"""Bounds and tests on counts and losses: against exact arithmetic, simulation, MAPIE and zugzwang."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from mapie.risk_control import BinaryClassificationController, precision
from mapie.risk_control.fwer_control import control_fwer
from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value
from scipy import stats
from zugzwang.core.certify import certify_threshold as zugzwang_threshold

from stage1_pro.errors import InputError
from stage1_pro.policies import bounds
from stage1_pro.policies.bounds import (
    betting_p_value,
    betting_upper,
    binary_search,
    binomial_cdf,
    bonferroni,
    crc_budget,
    errors_allowed,
    exact,
    first_enough,
    fixed_sequence,
    holm,
    selection_rank,
    trials_needed,
)
from stage1_pro.policies.certify import certify_threshold


def mapie_p_values(k: np.ndarray, m: np.ndarray, alpha: float) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return compute_hoeffding_bentkus_p_value(k / m, m, alpha, True)[:, 0]


def test_p_values_are_those_of_mapie_where_its_counts_are_right() -> None:
    """It multiplies a float mean by m again and rounds up: often one error too many (a larger p-value, less power)."""
    pairs = np.array([(k, m) for m in range(2, 101) for k in range(m + 1)])
    k, m = pairs.T
    right = np.ceil(k / m * m) == k
    ours, theirs = binomial_cdf(k, m, 0.1), mapie_p_values(k, m, 0.1)
    np.testing.assert_allclose(ours[right], theirs[right], rtol=1e-9)
    wrong = ~right
    assert 0.02 < wrong.mean() < 0.5
    one_more = binomial_cdf(np.minimum(k + 1, m), m, 0.1)[wrong]
    # Its Hoeffding part, which is never off, may be the smaller one of the two.
    assert (theirs[wrong] <= one_more + 1e-12).all()
    assert (theirs[wrong] >= ours[wrong] - 1e-12).all()
    inner = wrong & (ours < 0.9)
    assert (theirs[inner] > ours[inner] * 1.01).mean() > 0.5


def test_rejections_are_those_of_mapie() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        p = rng.random(int(rng.integers(1, 12))) ** 4
        for delta in (0.05, 0.2):
            assert np.flatnonzero(bonferroni(p, delta)).tolist() == control_fwer(p, delta, "bonferroni").tolist()
            assert np.flatnonzero(holm(p, delta)).tolist() == control_fwer(p, delta, "bonferroni_holm").tolist()
            first = list(range(fixed_sequence(p, delta)))
            assert control_fwer(p, delta, "fixed_sequence").tolist() == first
            assert (holm(p, delta) >= bonferroni(p, delta)).all()


def test_a_candidate_without_trials_does_not_spoil_the_others() -> None:
    """MAPIE: 0 / 0 is a NaN p-value, and its default Holm then rejects nothing at all."""
    k, m = np.array([0, 0]), np.array([400, 0])
    theirs = mapie_p_values(k, m, 0.02)
    assert math.isnan(theirs[1])
    assert control_fwer(theirs, 0.05, "bonferroni_holm").tolist() == []
    ours = binomial_cdf(k, m, 0.02)
    assert ours[1] == 1
    assert holm(ours, 0.05).tolist() == [True, False]
    assert holm([ours[0], math.nan], 0.05).tolist() == [True, False]
    assert bonferroni([ours[0], math.nan], 0.05).tolist() == [True, False]


def test_mapie_counts_the_frames_of_a_clip_as_photos_of_their_own() -> None:
    """60 clips of 10 frames, each wrong in 7% of clips as a whole: that the error is at most 6% is false."""
    draws, theirs, ours = 200, 0, 0
    clips, scores = np.repeat(np.arange(60), 10), np.full(600, 0.9)
    for seed in range(draws):
        wrong = (np.random.default_rng(seed).random(60) < 0.07)[clips]
        control = BinaryClassificationController(
            lambda x: np.column_stack([1 - x, x]), precision, target_level=0.94, confidence_level=0.95,
            list_predict_params=np.array([0.5]), fwer_method="bonferroni",
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(No predict parameters were found|All provided predict_params)")
            theirs += control.calibrate(scores, (~wrong).astype(int)).best_predict_param is not None
        ours += certify_threshold(scores, wrong, alpha=0.06, delta=0.05, candidates=[0.5], groups=clips).feasible
    assert theirs > 0.12 * draws and ours <= stats.binom.ppf(0.999, draws, 0.05)


def test_zugzwang_cuts_a_tie_group() -> None:
    """All rows have one score, every fifth is wrong, and the wrong ones come last: it certifies 2%."""
    scores, errors = np.full(1000, 0.5), np.arange(1000) >= 800
    theirs = zugzwang_threshold(scores, errors.astype(int), 0.02, delta=0.05)
    assert theirs.threshold == 0.5
    assert theirs.risk_bound <= 0.02
    assert errors[scores >= theirs.threshold].mean() == 0.2
    for method in ("ltt_fst", "bonferroni", "holm", "sgr", "rcps"):
        assert not certify_threshold(scores, errors, alpha=0.02, delta=0.05, method=method).feasible


@pytest.mark.parametrize("variance", [None, 1e-4, 1.0])
def test_betting_holds_and_inverts(variance: float | None) -> None:
    """At whatever spread the bets begin with."""
    rng, draws = np.random.default_rng(2), 3000
    worst = 1.0 if variance is None else 0.95
    for mean, losses in ((0.1, rng.beta(0.5, 4.5, (draws, 80))), (0.05, rng.random((draws, 200)) < 0.05)):
        p = np.array([betting_p_value(row, mean, 0.05, variance=variance, worst=worst) for row in losses])
        upper = np.array([betting_upper(row, 0.05) for row in losses[:500]])
        assert (p <= 0.05).mean() <= 0.05 + 3 * math.sqrt(0.05 / draws)
        assert (upper < mean).mean() <= 0.05 + 3 * math.sqrt(0.05 / 500)
    # A ratio of means, whose parts depend on each other.
    weights = rng.random((draws, 300)) ** 3
    losses = weights * rng.beta(0.4, 3.6, weights.shape) * (1 + weights) / 2
    ratio = float(losses.mean() / weights.mean())
    p = np.array(
        [betting_p_value(v, ratio, 0.05, weights=a, variance=variance) for v, a in zip(losses, weights, strict=True)]
    )
    assert (p <= 0.05).mean() <= 0.05 + 3 * math.sqrt(0.05 / draws)
    bounds = [
        betting_upper(v, 0.05, weights=a, alpha=1.5 * ratio) for v, a in zip(losses[:1000], weights[:1000], strict=True)
    ]
    assert np.mean(np.array(bounds) < ratio) <= 0.05 + 3 * math.sqrt(0.05 / 1000)
    upper = betting_upper(losses[0], 0.05, weights=weights[0], alpha=0.2)
    assert betting_p_value(losses[0], 0.2, 0.05, weights=weights[0]) <= 0.05 or upper > 0.2
    assert ratio < upper < 0.3
    assert (betting_upper([], 0.05), betting_p_value([], 0.1, 0.05)) == (1.0, 1.0)
    with pytest.raises(InputError, match="variance and worst must be"):
        betting_p_value([0.5], 0.1, 0.05, variance=0.0)
    with pytest.raises(InputError, match="worst must be the most that any pair can lose"):
        betting_p_value([0.5], 0.1, 0.05, worst=0.3)
    with pytest.raises(InputError, match=r"losses must be in \[0, 1\]"):
        betting_p_value([1.5], 0.1, 0.05)
    with pytest.raises(InputError, match=r"shape \[G\], got \[2\] and \[1\]"):
        betting_p_value([0.5, 0.5], 0.1, 0.05, weights=[1.0])


def test_a_bet_is_chosen_before_its_pair_is_seen() -> None:
    gains = np.random.default_rng(5).uniform(-0.5, 0.5, 40)
    bets = bounds._bets(gains, 0.01, 20, 0.05, most=9.0)
    for i in (0, 7, 39):
        changed = gains.copy()
        changed[i] += 0.3
        other = bounds._bets(changed, 0.01, 20, 0.05, most=9.0)
        assert (other[: i + 1] == bets[: i + 1]).all() and (other[i + 1 :] != bets[i + 1 :]).all()


def test_betting_gains_where_losses_vary_little() -> None:
    """Means of .05 that vary little are certified below .1 from few."""
    losses = np.random.default_rng(3).uniform(0.03, 0.07, 70)
    assert betting_p_value(losses, 0.1, 0.05) <= 0.05
    # From fewer still, where it is known beforehand that they do, and that none can be above .4.
    few = losses[:25]
    assert betting_p_value(few, 0.1, 0.05, variance=1e-3, worst=0.3) <= 0.05 < betting_p_value(few, 0.1, 0.05)


@pytest.mark.parametrize(("n", "xi", "delta"), [(13, 0.7, 0.01), (500, 0.7, 0.01), (77, 0.9, 0.2)])
def test_the_selection_rank_follows_the_beta_law(n: int, xi: float, delta: float) -> None:
    rank = selection_rank(n, xi, delta)
    assert rank is not None
    rng = np.random.default_rng(n)
    scores = np.sort(rng.random((4000, n)), axis=1)[:, ::-1]
    coverage = 1 - scores[:, rank - 1]
    assert (coverage < xi).mean() <= delta + 3 * math.sqrt(delta / 4000)
    assert stats.binom.sf(rank - 1, n, xi) <= delta < stats.binom.sf(rank - 2, n, xi)
    assert selection_rank(12, 0.7, 0.01) is None


def test_crc_budgets_are_exact() -> None:
    for m in range(400):
        for alpha in ("0.01", "0.07", "0.29", "0.55"):
            budget = crc_budget(float(alpha), m)
            assert Fraction(budget + 1, m + 1) <= Fraction(alpha) < Fraction(budget + 2, m + 1)
    assert math.ceil(100 * exact(0.55)) == 55


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 100])
def test_binary_search_finds_the_last_pass_in_its_budget_of_tests(size: int) -> None:
    steps = math.ceil(math.log2(size + 1))
    for last in range(-1, size):
        found, tested = binary_search(lambda i, last=last: 0.05 / steps if i <= last else 0.06, size, 0.05)
        assert found == (last if last >= 0 else None)
        assert len(tested) <= steps
    assert binary_search(lambda i: 0.0, 0, 0.05) == (None, [])


def test_a_search_finds_the_first_that_is_enough_up_to_the_most() -> None:
    for right in range(1, 40):
        for start in range(1, 12):
            for most in range(1, 45):
                found = first_enough(lambda m, right=right: m >= right, start, most)
                assert found == (max(start, right) if max(start, right) <= most else None)


@pytest.mark.parametrize("errors", [0, 1, 700])
def test_trials_are_named_up_to_the_most_and_alpha_beyond(errors: int) -> None:
    for alpha in (1e-7, 1e-9):
        n = trials_needed(errors, alpha, 0.05)
        assert errors_allowed([n - 1, n], alpha, 0.05).tolist() == [errors - 1, errors]
    with pytest.raises(InputError, match="alpha must be"):
        trials_needed(errors, 1e-13, 0.05)
