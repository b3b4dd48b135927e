"""Certificates against exact arithmetic, slow twins and simulation; the gate policy; claims that are counted."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from fitting import fit_gate_policy, fit_softmax_policy
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from stage1_pro import cli
from stage1_pro.commands.calibrate import calibrate
from stage1_pro.data.predictions import Predictions
from stage1_pro.data.splits import Merging, Row, Splits, hash_splits
from stage1_pro.errors import ArtifactError, InputError, NotReachableError
from stage1_pro.metrics.measured import Metric
from stage1_pro.policies.bounds import binomial_cdf, coverage_p_value, errors_allowed, fixed_sequence, trials_needed
from stage1_pro.policies.candidates import Risk
from stage1_pro.policies.certify import certify, certify_threshold, plan_calibration
from stage1_pro.policies.claims import Claims
from stage1_pro.policies.gate import GateParams
from stage1_pro.policies.ordering import certify_halves, order_candidates, record
from stage1_pro.policies.platt import fit_platt, score
from stage1_pro.policies.policy import read_policy
from stage1_pro.policies.ranking import GateChoice
from stage1_pro.policies.rows import cut_halves
from stage1_pro.policies.softmax import Thresholds, softmax
from stage1_pro.training.calibration import render

BINARY = {"classes": ["none", "roadwork"], "positive": "roadwork"}


# --------------------------------------------------------------------------------------------
# p-values, sequences, planning


def exact_cdf(k: int, m: int, p: Fraction) -> Fraction:
    """P(Bin(m, p) <= k) in exact integers."""
    return sum((math.comb(m, i) * p**i * (1 - p) ** (m - i) for i in range(k + 1)), Fraction(0))


@pytest.mark.parametrize("alpha", ["0.01", "0.05", "0.3"])
def test_p_values_of_all_small_counts_are_exact(alpha: str) -> None:
    pairs = [(k, m) for m in range(41) for k in range(m + 1)]
    k, m = np.array(pairs).T
    share = Fraction(alpha)
    risk, coverage = binomial_cdf(k, m, float(alpha)), coverage_p_value(k, m, float(alpha))
    for i, (errors, trials) in enumerate(pairs):
        below = exact_cdf(errors, trials, share)
        above = 1 - below + math.comb(trials, errors) * share**errors * (1 - share) ** (trials - errors)
        assert risk[i] == pytest.approx(float(below), rel=1e-11)
        assert coverage[i] == pytest.approx(float(above), rel=1e-11)
        if trials:
            judge = stats.binomtest(errors, trials, float(alpha), alternative="less").pvalue
            assert risk[i] == pytest.approx(judge, rel=1e-11)
            judge = stats.binomtest(errors, trials, float(alpha), alternative="greater").pvalue
            assert coverage[i] == pytest.approx(judge, rel=1e-11)


def test_counts_must_be_counts() -> None:
    with pytest.raises(InputError, match="integers, got float64 and int64; count, never"):
        coverage_p_value([0.5], [3], 0.1)
    with pytest.raises(InputError, match="accepted must .*0.*got 4 of 3"):
        coverage_p_value([4], [3], 0.1)
    with pytest.raises(InputError, match="min_coverage must .*0.*1.*got 1.0"):
        coverage_p_value([1], [3], 1.0)


def test_a_sequence_stops_at_its_first_failure() -> None:
    assert fixed_sequence([0.01, 0.05, 0.051, 0.0], 0.05) == 2
    assert fixed_sequence([0.2, 0.0], 0.05) == 0
    assert fixed_sequence([0.0, math.nan, 0.0], 0.05) == 1
    assert fixed_sequence([], 0.05) == 0


@pytest.mark.parametrize(
    ("alpha", "table"), [(0.01, {0: 299, 1: 473, 2: 628, 5: 1049, 10: 1693}), (0.02, {0: 149, 5: 523})]
)
def test_exits_needed_are_the_known_ones(alpha: float, table: dict[int, int]) -> None:
    for errors, trials in table.items():
        assert trials_needed(errors, alpha, 0.05) == trials
        assert errors_allowed(trials, alpha, 0.05) == errors
        assert errors_allowed(trials - 1, alpha, 0.05) == errors - 1


def test_plans_have_the_power_they_promise() -> None:
    rng = np.random.default_rng(0)
    for power, n in ((0.8, 2945), (0.9, 3825)):
        assert plan_calibration(0.01, 0.05, 0.7, 0.005, power) == n
        m = rng.binomial(n, 0.7, 20_000)
        passed = binomial_cdf(rng.binomial(m, 0.005), m, 0.01) <= 0.05
        assert passed.mean() == pytest.approx(power, abs=0.012)
    assert plan_calibration(0.01, 0.05, None, 0.0) == 299
    assert plan_calibration(0.02, 0.05, 1.0, 0.0) == 149
    # The normal approximation takes over where the exact sum would be long.
    assert plan_calibration(0.01, 0.05, 0.7, 0.0098) > 10**6
    with pytest.raises(InputError, match="expected_error must .*0.*0.01.*got 0.01"):
        plan_calibration(0.01, 0.05, 0.7, 0.01)


# --------------------------------------------------------------------------------------------
# The threshold


def slow_certificate(scores, errors, trials, candidates, alpha, delta, min_coverage):
    """The walk, row by row in exact fractions: (threshold, counts) or None."""
    best = None
    for threshold in candidates:
        taken = [i for i, value in enumerate(scores) if value >= threshold]
        m = sum(trials[i] for i in taken)
        k = sum(trials[i] and errors[i] for i in taken)
        p = exact_cdf(k, m, Fraction(alpha))
        if min_coverage is not None:
            p = max(p, 1 - exact_cdf(len(taken) - 1, len(scores), Fraction(min_coverage)))
        if p > Fraction(delta):
            break
        best = threshold, len(taken), m, k
    return best


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6))
def test_certificate_is_the_slow_walk(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 60))
    scores = rng.integers(0, 9, n) / 8.0  # many ties
    scores[rng.random(n) < 0.1] = np.nan
    errors, positive = rng.random(n) < 0.05, rng.random(n) < 0.8
    candidates = np.sort(rng.integers(0, 10, 6) / 9.0)[::-1]
    alpha, delta = str(rng.choice(["0.1", "0.2", "0.4"])), "0.1"
    min_coverage = [None, "0.3", "0.6"][rng.integers(3)]
    only = bool(rng.integers(2))
    found = certify_threshold(
        scores, errors, alpha=float(alpha), delta=float(delta), candidates=candidates,
        min_coverage=None if min_coverage is None else float(min_coverage),
        condition="exit&y=1" if only else "exit", labels=positive if only else None,
    )  # fmt: skip
    trials = positive if only else np.ones(n, dtype=bool)
    wanted = slow_certificate(
        scores.tolist(), errors.tolist(), trials.tolist(), candidates.tolist(), alpha, delta, min_coverage
    )
    assert found.feasible == (wanted is not None)
    if wanted is not None:
        assert (found.threshold, found.accepted, found.trials, found.errors) == wanted
        assert found.coverage == wanted[1] / n
        assert found.risk_bound <= float(alpha) + 1e-12
        assert found.n_needed is None
        assert found.reason == ""
    else:
        assert found.threshold is None
        assert found.reason


def test_more_constraints_take_the_largest_p_value() -> None:
    scores = np.linspace(1, 0, 1000)
    first, second = np.zeros(1000, dtype=bool), np.arange(1000) % 2 == 0
    risks = [Risk("a", 0.1, first), Risk("b", 0.1, second)]
    assert certify(scores, risks[:1], delta=0.05, candidates=[0.5]).feasible
    both = certify(scores, risks, delta=0.05, candidates=[0.5])
    assert not both.feasible
    assert [risk.p_value <= 0.05 for risk in both.risks] == [True, False]
    assert "b is 250 of 500" in both.reason
    assert "a is" not in both.reason


def test_infeasible_says_why_and_what_would_do() -> None:
    scores, errors = np.linspace(1, 0, 200), np.zeros(200, dtype=bool)
    found = certify_threshold(scores, errors, alpha=0.01, delta=0.05, min_coverage=0.7, candidates=[0.2, 0.1])
    assert not found.feasible
    assert found.guarantee == "none: infeasible"
    assert found.min_certifiable_alpha == found.risk_bound == pytest.approx(1 - 0.05 ** (1 / 160))
    assert found.coverage_there == 0.8
    assert "error on accepted rows is 0 of 160" in found.reason
    assert "no error at all would need 299" in found.reason
    # At the first threshold 80% are accepted, and 299 of them take about 375.
    assert found.n_needed == pytest.approx(trials_needed(0, 0.01, 0.05) / 0.8, rel=0.1)
    assert found.needed.low <= found.n_needed <= found.needed.high
    # It was the smallest: that wish passes, a smaller one does not.
    kwargs = {"delta": 0.05, "min_coverage": 0.7, "candidates": [0.2]}
    assert certify_threshold(scores, errors, alpha=found.min_certifiable_alpha + 1e-9, **kwargs).feasible
    assert not certify_threshold(scores, errors, alpha=found.min_certifiable_alpha - 1e-9, **kwargs).feasible
    hopeless = certify_threshold(scores, ~errors, alpha=0.01, delta=0.05, candidates=[0.2])
    assert (hopeless.n_needed, hopeless.min_certifiable_alpha) == (None, 1.0)
    # Its p-value is .95**52 = .069: named, though no error was seen and delta is nearly met.
    nearly = certify_threshold([1.0] * 52, [False] * 52, alpha=0.05, delta=0.05, candidates=[0.5])
    assert not nearly.feasible and "error on accepted rows is 0 of 52" in nearly.reason
    uncovered = certify_threshold(scores, errors, alpha=0.5, delta=0.05, min_coverage=0.7, candidates=[0.3])
    assert "too few to certify a coverage of 0.7" in uncovered.reason
    assert uncovered.min_certifiable_alpha is None


@pytest.mark.parametrize("method", ["rcps", "sgr"])
def test_a_coverage_beside_a_risk_takes_half_of_delta(method: str) -> None:
    """No error in 65 has a p-value of .95**65 = .036: below delta, above half of it."""
    ask = {"alpha": 0.05, "delta": 0.05, "candidates": [0.5], "method": method}
    assert certify_threshold([1.0] * 65, [False] * 65, **ask).feasible
    assert not certify_threshold([1.0] * 65, [False] * 65, min_coverage=0.1, **ask).feasible


def test_no_rows_ties_and_nan_have_answers() -> None:
    none = certify_threshold([], [], alpha=0.1, delta=0.05, min_coverage=0.5)
    assert (none.feasible, none.n, none.coverage, none.reason) == (False, 0, None, "there are no certify rows")
    blind = certify_threshold([np.nan] * 100, [0] * 100, alpha=0.1, delta=0.05, candidates=[0.0])
    assert (blind.feasible, blind.accepted, blind.n) == (False, 0, 100)
    assert (blind.p_values == 1).all()
    # One score for all: the tie group goes whole, or not at all.
    tied = certify_threshold([0.5] * 100, [0] * 100, alpha=0.1, delta=0.05)
    assert (tied.feasible, tied.accepted) == (True, 100)
    bad = certify_threshold([0.5] * 100, [1] * 60 + [0] * 40, alpha=0.1, delta=0.05)
    assert not bad.feasible
    # NaN counts among all rows for the coverage, and is never accepted.
    half = certify_threshold([0.9] * 50 + [np.nan] * 50, [0] * 50 + [1] * 50, alpha=0.1, delta=0.05, candidates=[0.0])
    assert (half.feasible, half.coverage, half.errors) == (True, 0.5, 0)


def test_ranks_never_cut_a_tie_group() -> None:
    rng = np.random.default_rng(2)
    scores = np.round(rng.random(3000), 1)
    errors = rng.random(3000) < 0.3 * (1 - scores)
    found = certify_threshold(scores, errors, alpha=0.15, delta=0.05, min_coverage=0.3)
    assert found.feasible
    assert found.accepted == (scores >= found.threshold).sum()
    assert found.errors == errors[scores >= found.threshold].sum()
    # What is accepted lies strictly above a score that was seen.
    assert np.nextafter(found.threshold, -np.inf) in scores
    assert any("ranks are walked" in text for text in found.assumptions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [[0.1, 0.2, 0.3]]}, r"scores must have shape \[N\], got \[1, 3\]"),
        ({"errors": [0.5, 0, 1]}, "errors must be 0 or 1, got other values; exact binomial bounds need 0/1 losses"),
        ({"errors": [0, 1]}, r"errors must have shape \[3\] as scores, got \[2\]"),
        ({"alpha": 0.0}, r"alpha of error on accepted rows must be inside \(0, 1\), got 0.0"),
        ({"delta": 1.0}, r"delta must be inside \(0, 1\), got 1.0"),
        ({"min_coverage": 1.0}, r"min_coverage must be inside \(0, 1\), got 1.0"),
        ({"candidates": []}, "candidates must be at least one threshold"),
        ({"candidates": [0.5, math.nan]}, "candidates must be at least one threshold"),
        (
            {"method": "ltt_fts"},
            "method must be one of ltt_fst, bonferroni, holm, sgr, rcps, crc, got 'ltt_fts'; did you mean 'ltt_fst'",
        ),
        ({"condition": "y"}, "condition must be 'exit' or 'exit&y=1', got 'y'"),
        ({"condition": "exit&y=1"}, "labels must be given for condition 'exit&y=1', got None"),
        ({"groups": ["a"]}, r"groups must have shape \[3\] as scores, got \[1\]"),
        ({"unit": "groups"}, "groups must be given where the unit is groups"),
        (
            {"groups": list("aab"), "unit": "rows"},
            r"unit must be groups where rows share one \(2 groups of 3 rows\), got",
        ),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    arguments = {"scores": [0.1, 0.2, 0.3], "errors": [0, 0, 1], "alpha": 0.1, "delta": 0.05, **change}
    with pytest.raises(InputError, match=message):
        certify_threshold(arguments.pop("scores"), arguments.pop("errors"), **arguments)  # type: ignore[arg-type]


def test_the_unit_is_the_group() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(400), 5)
    scores, errors = rng.random(2000), rng.random(2000) < 0.01
    found = certify_threshold(scores, errors, alpha=0.1, delta=0.05, min_coverage=0.3, groups=groups, candidates=[0.5])
    assert (found.unit, found.n) == ("groups", 400)
    assert "one image drawn from a new group" in found.guarantee
    kwargs = {"alpha": 0.1, "delta": 0.05, "groups": groups, "candidates": [0.5]}
    assert certify_threshold(scores, errors, **kwargs).n == 400
    stated = certify_threshold(scores, errors, rows_independent=True, unit="rows", **kwargs)
    assert (stated.unit, stated.n) == ("rows", 2000)
    assert "rows of one group are independent, as the caller states" in stated.assumptions
    # The row that speaks for its group is drawn by the seed, never by score or error.
    again = certify_threshold(rng.permutation(scores), ~errors, seed=0, **kwargs)
    assert again.n == found.n
    other = [certify_threshold(scores, errors, seed=s, **kwargs).accepted for s in range(6)]
    assert len(set(other)) > 1
    # Of positives, one per group that has any.
    labels = (groups % 4 == 0) & (np.arange(2000) % 5 < 2)
    few = certify_threshold(scores * 0 + 1, errors, alpha=0.2, delta=0.05, groups=groups, candidates=[0.5],
                            condition="exit&y=1", labels=labels)  # fmt: skip
    assert (few.n, few.trials, few.accepted) == (400, 100, 400)


def test_methods_say_what_they_promise_and_differ_as_they_must() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random(6000)
    errors = rng.random(6000) < 0.03 * (1 - scores) ** 2
    wish = {"alpha": 0.01, "delta": 0.05, "min_coverage": 0.5}
    found = {m: certify_threshold(scores, errors, method=m, **wish) for m in ("ltt_fst", "bonferroni", "holm", "sgr")}
    assert all(one.feasible and one.method == method for method, one in found.items())
    assert all(one.risk_bound <= 0.01 and one.errors == errors[scores >= one.threshold].sum() for one in found.values())
    assert found["holm"].coverage >= found["bonferroni"].coverage
    assert found["ltt_fst"].coverage >= found["sgr"].coverage
    assert found["bonferroni"].p_values.size == 20
    assert found["sgr"].p_values.size <= 13
    assert "binary search" in found["sgr"].guarantee
    assert "the risk does not fall as the threshold gets laxer" in found["sgr"].assumptions
    # The joint share is another quantity: less than the exit error, so it goes further.
    rcps = certify_threshold(scores, errors, method="rcps", **wish)
    assert "share of images that are accepted and wrong" in rcps.guarantee
    assert rcps.trials == 6000
    assert rcps.coverage > found["ltt_fst"].coverage
    crc = certify_threshold(scores, errors, alpha=0.005, delta=0.05, method="crc")
    assert crc.feasible
    assert "an expectation" in crc.guarantee
    assert "With probability" not in crc.guarantee
    assert (crc.errors + 1) / 6001 <= 0.005 < (crc.errors + 2) / 6001 or crc.coverage == 1
    assert crc.risk_bound == (crc.errors + 1) / 6001
    assert crc.p_values.size == 0
    labels = rng.random(6000) < 0.5
    mpr = certify_threshold(scores, errors, alpha=0.02, delta=0.05, method="rcps", condition="exit&y=1", labels=labels)
    assert "share of positives that are accepted and wrong" in mpr.guarantee
    assert mpr.trials == labels.sum()
    with pytest.raises(InputError, match="min_coverage must .*got 0.5"):
        certify_threshold(scores, errors, method="crc", **wish)


@pytest.mark.parametrize("method", ["ltt_fst", "bonferroni", "holm", "sgr", "rcps", "crc"])
@pytest.mark.parametrize("unit", ["rows", "group_means"])
def test_every_method_is_infeasible_with_a_reason(method: str, unit: str) -> None:
    scores = np.linspace(1, 0, 100)
    groups, candidates = (np.arange(100), scores) if unit == "group_means" else (None, None)
    kwargs = {"alpha": 0.005, "delta": 0.05, "method": method, "groups": groups, "unit": unit, "candidates": candidates}
    found = certify_threshold(scores, np.zeros(100), **kwargs)
    assert not found.feasible
    assert (found.threshold, found.guarantee) == (None, "none: infeasible")
    assert "error on accepted rows is 0 of" in found.reason
    assert found.min_certifiable_alpha is not None
    assert found.min_certifiable_alpha > 0.005
    # Where groups are walked, the first candidate takes one in a hundred.
    first = 100 if (unit, method) == ("group_means", "ltt_fst") else 1
    assert found.n_needed == pytest.approx(199 if method == "crc" else 598 * first, rel=0.05)
    hopeless = certify_threshold(scores, np.ones(100), **kwargs)
    assert not hopeless.feasible
    assert hopeless.n_needed is None
    for empty in (certify_threshold([], [], **{**kwargs, "groups": None if groups is None else []}),):
        assert not empty.feasible
        assert "there are no certify" in empty.reason
    blind = certify_threshold([np.nan] * 100, np.zeros(100), **{**kwargs, "alpha": 0.3})
    assert not blind.feasible or blind.accepted == 0


def test_group_means_are_one_row_each_where_groups_are_rows() -> None:
    rng = np.random.default_rng(1)
    scores, errors = rng.random(3000), rng.random(3000) < 0.004
    kwargs = {"alpha": 0.02, "delta": 0.05, "min_coverage": 0.3, "candidates": [0.6, 0.4, 0.2]}
    means = certify_threshold(scores, errors, groups=np.arange(3000), unit="group_means", **kwargs)
    rows = certify_threshold(scores, errors, **kwargs)
    assert means.feasible
    assert (means.unit, means.n, means.threshold) == ("group_means", 3000, rows.threshold)
    assert (means.accepted, means.trials, means.errors) == (rows.accepted, rows.trials, rows.errors)
    assert means.coverage == pytest.approx(rows.coverage)
    assert means.errors / means.trials < means.risk_bound <= 0.02
    assert "betting on group means" in means.guarantee
    assert record(means, claims=1, use=None).unit == "group_means"
    assert means.p_values[1] == means.p_values[list(means.candidates).index(0.4)]
    with pytest.raises(InputError, match="groups must be given where the unit is groups"):
        certify_threshold(scores, errors, unit="group_means", **kwargs)
    with pytest.raises(InputError, match="candidates must .*got None"):
        certify_threshold(scores, errors, alpha=0.02, delta=0.05, groups=scores, unit="group_means")
    with pytest.raises(InputError, match="rows_independent must be False"):
        certify_threshold(scores, errors, groups=scores, unit="group_means", rows_independent=True, **kwargs)


def test_candidates_come_from_the_fit_half_alone() -> None:
    rng = np.random.default_rng(1)
    scores, errors = rng.random(1000), rng.random(1000) < 0.02
    order = order_candidates(scores, [Risk("e", 0.1, errors)], n_certify=1000, min_coverage=0.7, lowest=0.0)
    assert (np.diff(order) < 0).all()
    margin = 3 * math.sqrt(0.7 * 0.3 * 2 / 1000)
    assert (scores >= order[0]).mean() >= 0.7 + margin
    tight = order_candidates(scores, [Risk("e", 0.021, scores < 0.28)], n_certify=1000, min_coverage=0.7, lowest=0.0)
    assert (scores >= tight[0]).mean() == pytest.approx(0.7 + margin, abs=0.0011)
    assert (scores >= order[-1]).all()
    # No threshold lies nearer to a row than half the gap.
    assert not np.isin(order, scores).any()
    wide = order_candidates(scores[:20], [Risk("e", 0.1, errors[:20])], n_certify=20, min_coverage=0.9)
    assert wide.size == 1
    with pytest.raises(InputError, match="scores of the rows that fix the order .*NaN"):
        order_candidates([np.nan], [Risk("e", 0.1, np.array([False]))], n_certify=3)


def test_halves_are_cut_by_group() -> None:
    groups = np.repeat(np.arange(101), 3)
    halves = cut_halves(303, groups, seed=4)
    assert (halves.reshape(101, 3) == halves[::3, None]).all()
    assert (halves == "fit").sum() == 153
    assert (cut_halves(10) == "fit").sum() == 5


# --------------------------------------------------------------------------------------------
# Simulation


class Scenario:
    """The notes' gate scenario: exit error .5% at coverage .70, 1% at .82; score 1 - u, u uniform."""

    def __init__(self) -> None:
        def ratio(b: float) -> float:
            return (math.expm1(0.82 * b) / 0.82) / (math.expm1(0.7 * b) / 0.7) - 2

        self.b = optimize.brentq(ratio, 1, 30)
        self.a = 0.005 * 0.7 * self.b / math.expm1(0.7 * self.b)

    def draw(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        u = rng.random(n)
        return 1 - u, rng.random(n) < self.a * np.exp(self.b * u)

    def violates(self, threshold: float) -> bool:
        coverage = 1 - threshold
        return coverage < 0.7 or self.a * math.expm1(self.b * coverage) / (self.b * coverage) > 0.01


def naive(scores: np.ndarray, errors: np.ndarray) -> float | None:
    """The largest coverage whose empirical error and coverage meet the wish."""
    order = np.argsort(-scores)
    m = np.arange(1, scores.size + 1)
    good = np.flatnonzero((np.cumsum(errors[order]) <= 0.01 * m) & (m >= 0.7 * scores.size))
    return float(scores[order[good[-1]]]) if good.size else None


@pytest.mark.slow
@pytest.mark.parametrize(("n", "least_power"), [(500, 0.0), (2000, 0.2), (10_000, 0.85)])
def test_the_certified_gate_keeps_its_promise_and_the_naive_one_does_not(n: int, least_power: float) -> None:
    """Done when 4: n certify rows, as many fit rows; share of all draws that deploy a threshold that truly violates."""
    scenario, rng, draws = Scenario(), np.random.default_rng(n), 1000
    certified = broken = naively = 0
    for _ in range(draws):
        fit_scores, fit_errors = scenario.draw(rng, n)
        scores, errors = scenario.draw(rng, n)
        candidates = order_candidates(
            fit_scores, [Risk("exit error", 0.01, fit_errors)], n_certify=n, min_coverage=0.7, lowest=0.0
        )
        found = certify_threshold(scores, errors, alpha=0.01, delta=0.05, min_coverage=0.7, candidates=candidates)
        certified += found.feasible
        broken += found.threshold is not None and scenario.violates(found.threshold)
        chosen = naive(scores, errors)
        naively += chosen is not None and scenario.violates(chosen)
    print(
        f"n = {n}: ltt violates {broken / draws:.3f}, deploys {certified / draws:.3f}; "
        f"naive violates {naively / draws:.3f}"
    )
    assert broken / draws <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)
    assert certified / draws >= least_power
    assert naively / draws > 0.25


@pytest.mark.slow
def test_ranks_keep_their_promise() -> None:
    scenario, rng, draws = Scenario(), np.random.default_rng(5), 400
    found = [
        certify_threshold(*scenario.draw(rng, 8000), alpha=0.01, delta=0.05, min_coverage=0.7) for _ in range(draws)
    ]
    broken = np.mean([c.threshold is not None and scenario.violates(c.threshold) for c in found])
    assert broken <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)
    assert np.mean([c.feasible for c in found]) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [0.3, 0.45, 0.6])
@pytest.mark.parametrize(("tracks", "risk"), [(100, 0.025), (400, 0.0201)])
def test_groups_keep_the_promise_that_rows_break(tracks: int, risk: float, correlation: float) -> None:
    """Done when 5: tracks of 30 rows, true error above alpha = 2%, so a certificate is false whenever it is given.

    100 groups can never certify 2% (149 would with no error); 400 can, which is where chance could break the promise.
    """
    rng, draws, rows, alpha, delta = np.random.default_rng(0), 1000, 30, 0.02, 0.05
    # A track's own error rate is Beta with this mean; the rows' correlation is 1 / (a + b + 1).
    total = 1 / correlation - 1
    groups = np.repeat(np.arange(tracks), rows)
    scores = np.ones(tracks * rows)
    by_group = by_row = 0
    for draw in range(draws):
        rate = rng.beta(risk * total, (1 - risk) * total, tracks)
        errors = (rng.random((tracks, rows)) < rate[:, None]).ravel()
        kwargs = {"alpha": alpha, "delta": delta, "candidates": [0.5], "groups": groups}
        by_group += certify_threshold(scores, errors, seed=draw, **kwargs).feasible
        by_row += certify_threshold(scores, errors, rows_independent=True, **kwargs).feasible
    print(
        f"{tracks} tracks, error {risk:g}, correlation {correlation}: certified by group {by_group / draws:.3f}, "
        f"by row {by_row / draws:.3f}"
    )
    assert by_group / draws <= delta + 3 * math.sqrt(delta * (1 - delta) / draws)
    assert by_row / draws > 0.10


def clips(rng: np.random.Generator, n: int, error: tuple[float, float]) -> tuple[np.ndarray, ...]:
    """Groups of two kinds: short clips (1 to 5 rows) that exit rarely, long ones (20 to 60) that exit often.

    Each clip has error and exit rates of its own around those of its kind; scores are 1 (exits) or 0.
    """
    long = rng.random(n) < 0.5
    sizes = np.where(long, rng.integers(20, 61, n), rng.integers(1, 6, n))
    groups = np.repeat(np.arange(n), sizes)
    mean_error, mean_exit = np.where(long, error[1], error[0]), np.where(long, 0.9, 0.5)
    rates = [rng.beta(3 * mean, 3 * (1 - mean))[groups] for mean in (mean_error, mean_exit)]
    return (rng.random(groups.size) < rates[1]).astype(float), rng.random(groups.size) < rates[0], groups


@pytest.mark.slow
def test_group_means_keep_the_promise_with_groups_of_unlike_size() -> None:
    """The promise is P(wrong | exit) for one image drawn from a new group: E[v] / E[a] over groups.

    Errors sit in short clips, so the pooled rows' rate is far below it, and every row-level certificate is false.
    """
    rng, draws, n, delta = np.random.default_rng(0), 1000, 250, 0.05
    error = (0.12, 0.03)
    risk = (0.5 * error[0] + 0.9 * error[1]) / (0.5 + 0.9)
    kwargs = {"delta": delta, "candidates": [0.5]}
    false = dict.fromkeys(("means", "one row", "rows"), 0)
    given_ = dict.fromkeys(("means", "one row"), 0)
    for draw in range(draws):
        scores, errors, groups = clips(rng, n, error)
        hows = {"means": {"unit": "group_means"}, "one row": {}, "rows": {"rows_independent": True}}
        for name, how in hows.items():
            kwargs.update(groups=groups, seed=draw)
            false[name] += certify_threshold(scores, errors, alpha=risk - 1e-4, **how, **kwargs).feasible
            if name in given_:
                given_[name] += certify_threshold(scores, errors, alpha=1.6 * risk, **how, **kwargs).feasible
    print(f"risk {risk:.4f}: false certificates {false}, power at 1.6 times the risk {given_} of {draws}")
    for name in ("means", "one row"):
        assert false[name] / draws <= delta + 3 * math.sqrt(delta * (1 - delta) / draws)
    assert false["rows"] / draws > 0.3
    assert given_["means"] / draws > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bonferroni", "holm", "sgr", "rcps", "crc"])
@pytest.mark.parametrize("ranks", [False, True])
def test_every_method_keeps_its_promise(method: str, ranks: bool) -> None:
    """Exit error <= 1% at n = 2,000 (rcps, crc: the joint share <= .5%); thresholds truly violate in at most delta."""
    scenario, rng, draws = Scenario(), np.random.default_rng(11), 600
    joint = method in ("rcps", "crc")
    broken, shares = 0, []
    for _ in range(draws):
        scores, errors = scenario.draw(rng, 2000)
        candidates = None if ranks else np.linspace(0.5, 0.1, 20)
        found = certify_threshold(
            scores, errors, alpha=0.005 if joint else 0.01, delta=0.05, method=method, candidates=candidates
        )
        coverage = 0.0 if found.threshold is None else 1 - max(found.threshold, 0.0)
        share = scenario.a * math.expm1(scenario.b * coverage) / scenario.b
        shares.append(share)
        broken += share > (0.005 if joint else 0.01 * coverage)
    print(f"{method}: violates {broken / draws:.3f}, mean joint share {np.mean(shares):.5f}")
    if method == "crc":
        assert np.mean(shares) <= 0.005 + 3 * np.std(shares) / math.sqrt(draws)
        assert broken / draws > 0.2, "an expectation says nothing about one threshold"
    else:
        assert broken / draws <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)


def signs(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """|logit|, missed positives, positives: the logit is normal around 3.2 or -3.2, with spread 2."""
    labels = rng.random(n) < 0.5
    logit = np.where(labels, 3.2, -3.2) + rng.normal(0, 2, n)
    return np.abs(logit), labels & (logit < 0), labels


@pytest.mark.slow
def test_the_certified_softmax_choice_has_power() -> None:
    """FNR on exits <= 2% at n = 2,000 certify rows: true where given, and given often."""
    rng, draws = np.random.default_rng(1), 300
    big = np.random.default_rng(99)

    scores, missed, labels = signs(big, 1_000_000)
    given_, broken = 0, 0
    for _ in range(draws):
        s, e, y = signs(rng, 2000)
        candidates = order_candidates(s, [Risk("fnr", 0.02, e, y)], n_certify=2000)
        s, e, y = signs(rng, 2000)
        found = certify_threshold(s, e, alpha=0.02, delta=0.05, candidates=candidates, condition="exit&y=1", labels=y)
        given_ += found.feasible
        if found.threshold is not None:
            taken = (scores >= found.threshold) & labels
            broken += missed[taken].mean() > 0.02
    print(f"softmax FNR: deploys {given_ / draws:.3f}, violates {broken / draws:.3f}")
    assert broken / draws <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)
    assert given_ / draws > 0.85


# --------------------------------------------------------------------------------------------
# Platt scaling


def test_platt_agrees_with_logistic_regression_on_many_rows() -> None:
    rng = np.random.default_rng(0)
    logit = rng.normal(3, 2, 50_000)
    correct = rng.random(50_000) < expit(0.7 * logit - 0.5)
    found = fit_platt(logit, correct)
    judge = LogisticRegression(C=np.inf, tol=1e-10).fit(logit[:, None], correct)
    assert found.fitted
    assert found.a == pytest.approx(judge.coef_[0, 0], abs=2e-3)
    assert found.b == pytest.approx(judge.intercept_[0], abs=5e-3)


def test_platt_solves_its_equations_and_survives_separation() -> None:
    logit = np.concatenate([np.linspace(-3, -1, 20), np.linspace(1, 3, 30)])
    correct = logit > 0
    found = fit_platt(logit, correct)
    target = np.where(correct, 31 / 32, 1 / 22)
    residual = expit(found.a * logit + found.b) - target
    assert abs(residual.sum()) < 1e-6
    assert abs(residual @ logit) < 1e-6
    assert 0 < found.a < 20
    shifted = fit_platt(1000 + 5 * logit, correct)
    np.testing.assert_allclose(score(1000 + 5 * logit, shifted.a, shifted.b), score(logit, found.a, found.b), atol=1e-6)


@pytest.mark.parametrize(
    ("logit", "correct", "reason"),
    [
        ([1.0, 2.0], [1, 1], "only right answers among the rows that fit it"),
        ([1.0, 2.0], [0, 0], "only wrong answers among the rows that fit it"),
        ([np.nan, np.inf], [0, 1], "no rows among the rows that fit it"),
        ([0.1] * 30, [0, 1] * 15, "all gate logits of the rows that fit it are equal"),
    ],
)
def test_platt_says_where_nothing_can_be_fitted(logit: list[float], correct: list[int], reason: str) -> None:
    found = fit_platt(logit, correct)
    assert (found.a, found.b, found.fitted) == (1.0, 0.0, False)
    assert reason in found.reason


def test_platt_wants_ones_and_zeros() -> None:
    with pytest.raises(InputError, match="correct must be 0 or 1"):
        fit_platt([0.1], [2])
    with pytest.raises(InputError, match=r"must both have shape \[N\], got \[2\] and \[1\]"):
        fit_platt([0.1, 0.2], [1])
    assert np.isnan(score([np.nan, np.inf, -np.inf], 1, 0)).all()
    assert score([1e300, -1e300], 1e300, 0).tolist() == [1, 0]


# --------------------------------------------------------------------------------------------
# The gate policy


def gated(n: int, *, seed: int = 0, quality: float = 1.0, per_group: int = 1) -> dict[str, np.ndarray]:
    """Answers of which about a tenth are wrong, and a gate that knows; ``quality`` 0: it knows nothing."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    gate = rng.normal(3, 2.5, n)
    wrong = rng.random(n) < expit(-(2 * gate * quality + 1.5 + 2 * (1 - quality)))
    answer = np.where(wrong, 1 - labels, labels)
    sure = rng.uniform(0.6, 0.99, n)
    probs = np.stack([np.where(answer == 0, sure, 1 - sure), np.where(answer == 1, sure, 1 - sure)], axis=1)
    groups = np.arange(n) // per_group
    return {
        "probs": probs, "gate_logits": gate.astype(np.float32), "labels": labels, "groups": groups,
        "halves": cut_halves(n, groups, seed),
    }  # fmt: skip


def test_a_certified_gate_is_what_it_says() -> None:
    rows = gated(12_000)
    policy = fit_gate_policy(**rows, **BINARY, max_exit_error=0.02, target_fnr=0.05)
    assert policy.guarantee == "ltt"
    certify_rows = rows["halves"] == "certify"
    exited = policy.exits(rows["probs"], rows["gate_logits"])[certify_rows]
    wrong = (rows["probs"].argmax(1) != rows["labels"])[certify_rows]
    assert policy.n_rows == certify_rows.sum() == policy.certificate.n
    assert policy.coverage == exited.mean() >= 0.7
    assert policy.exit_error == wrong[exited].mean()
    assert policy.certificate.risks[0].errors == wrong[exited].sum() == policy.n_errors
    assert policy.exit_error_upper_bound <= 0.02
    assert policy.fnr_upper_bound <= 0.05
    assert policy.certificate.p_value <= 0.05
    assert "With probability at least 95% over the draw of the 6000 certify rows" in policy.statement
    assert "coverage at least 70% and exit error at most 2% and FNR on exits at most 5%" in policy.statement
    jsonschema.validate(json.loads(policy.model_dump_json()), GateParams.model_json_schema())
    text = render(policy)
    assert text.count("<- chosen") == 1
    assert "guarantee: ltt" in text
    assert (policy.exit_threshold, policy.fnr_target) == (policy.threshold, 0.05)


def test_platt_never_sees_a_certify_row_and_the_certificate_no_fit_row() -> None:
    rows = gated(8_000)
    policy = fit_gate_policy(**rows, **BINARY, max_exit_error=0.02)
    fit, certify_rows = (np.flatnonzero(rows["halves"] == half) for half in ("fit", "certify"))

    changed = {**rows, "gate_logits": rows["gate_logits"].copy(), "labels": rows["labels"].copy()}
    surest = certify_rows[np.argsort(-rows["gate_logits"][certify_rows])[:8]]
    changed["gate_logits"][surest] += 3
    changed["labels"][surest] = 1 - rows["probs"][surest].argmax(1)
    other = fit_gate_policy(**changed, **BINARY, max_exit_error=0.02)
    assert (other.a, other.b) == (policy.a, policy.b)
    assert other.certificate.first_candidate == policy.certificate.first_candidate
    assert other.certificate.risks[0].errors > policy.certificate.risks[0].errors or other.threshold > policy.threshold

    changed = {**rows, "labels": rows["labels"].copy()}
    changed["labels"][fit[:40]] = 1 - changed["labels"][fit[:40]]
    other = fit_gate_policy(**changed, **BINARY, max_exit_error=0.02)
    assert (other.a, other.b) != (policy.a, policy.b)
    assert other.certificate.n == policy.certificate.n == certify_rows.size
    # What is counted at a threshold is of the certify rows alone.
    exited = other.exits(rows["probs"], rows["gate_logits"])
    wrong = rows["probs"].argmax(1) != rows["labels"]
    assert other.certificate.risks[0].trials == exited[certify_rows].sum()
    assert other.certificate.risks[0].errors == wrong[certify_rows][exited[certify_rows]].sum()


def test_the_certified_softmax_policy() -> None:
    rows = gated(12_000, per_group=2)
    policy = fit_softmax_policy(
        np.where(rows["probs"] > 0.5, 0.5 + 0.5 * expit(rows["gate_logits"])[:, None] ** 4,
                 0.5 - 0.5 * expit(rows["gate_logits"])[:, None] ** 4),
        rows["labels"], **BINARY, groups=rows["groups"], halves=rows["halves"], guarantee="ltt", delta=0.1, claims=2,
    )  # fmt: skip
    assert policy.guarantee == "ltt"
    assert (policy.certificate.delta, policy.certificate.claims, policy.certificate.unit) == (0.05, 2, "groups")
    assert policy.fnr_upper_bound <= 0.02
    assert policy.n_rows == 6000
    assert "FNR on exits at most 2%" in policy.statement
    assert "nobody counted" in policy.certificate.assumptions[-1]
    with pytest.raises(InputError, match="halves must be given with guarantee ltt"):
        fit_softmax_policy(rows["probs"], rows["labels"], **BINARY, guarantee="ltt")


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6))
def test_the_empirical_gate_is_the_brute_force_optimum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(4, 30))
    answer, labels = rng.integers(0, 2, n), rng.integers(0, 2, n)
    gate = rng.integers(0, 7, n).astype(np.float64)
    gate[rng.random(n) < 0.1] = np.nan
    halves = np.where(np.arange(n) % 2, "fit", "certify")
    probs = np.eye(2)[answer] * 0.8 + 0.1
    error, coverage, fnr = rng.choice([0.25, 0.4, 0.6]), rng.choice([0.2, 0.5]), rng.choice([0.5, 0.9])
    platt = fit_platt(gate[halves == "fit"], (answer == labels)[halves == "fit"])
    sure = score(gate, platt.a, platt.b)
    best = None
    values = np.unique(sure[~np.isnan(sure)])
    # A flat Platt curve gives scores that differ by rounding alone: no threshold parts them.
    for threshold in values[np.diff(values, prepend=-1.0) > 4e-6]:
        out = sure >= threshold
        positive = out & (labels == 1)
        good = out.sum() >= coverage * n and (answer != labels)[out].mean() <= error
        if good and positive.any() and (answer == 0)[positive].mean() <= fnr:
            best = max(best or 0, out.sum())
    arguments = {
        "halves": halves, "max_exit_error": error, "min_coverage": coverage, "target_fnr": fnr, "guarantee": "none",
    }  # fmt: skip
    if best is None:
        with pytest.raises(NotReachableError, match="No policy was written"):
            fit_gate_policy(probs, gate, labels, **BINARY, **arguments)
        return
    policy = fit_gate_policy(probs, gate, labels, **BINARY, **arguments)
    assert policy.n_exited == best == policy.exits(probs, gate).sum()
    assert policy.certificate is None
    assert "Empirical choice, no guarantee: nothing is promised" in policy.statement


def test_a_gate_policy_decides_alike_under_rounding_and_never_on_nan() -> None:
    rows = gated(3000)
    policy = fit_gate_policy(**rows, **BINARY, max_exit_error=0.03, guarantee="none")
    exited = policy.exits(rows["probs"], rows["gate_logits"])
    gaps = np.abs(policy.scores(rows["probs"], rows["gate_logits"]) - policy.threshold)
    shaken = rows["gate_logits"] + np.float32(1e-7)
    assert gaps.min() > 1e-7
    assert policy.exits(rows["probs"], shaken).tolist() == exited.tolist()
    first = np.flatnonzero(exited)[0]
    for broken in (np.nan, np.inf):
        changed = rows["gate_logits"].copy()
        changed[first] = broken
        assert not policy.exits(rows["probs"], changed)[first]
    probs = rows["probs"].copy()
    probs[first] = np.nan
    assert not policy.exits(probs, rows["gate_logits"])[first]
    with pytest.raises(InputError, match="gate_logits must .*3000.*got None"):
        policy.exits(rows["probs"])
    with pytest.raises(InputError, match=r"probs must .*2.*got \[1, 3\]"):
        policy.exits(np.ones((1, 3)), [0.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"halves": ["fit"] * 4}, "halves must both hold rows, got none of 'certify'"),
        ({"halves": ["fit", "fit", "fut", "certify"]}, "halves must be fit or certify, got 'fut' in row 2"),
        ({"groups": list("aaba")}, "halves must not share a group, got 'a' in both"),
        ({"gate_logits": [0.0]}, r"gate_logits must have shape \[4\] as probs has rows, got \[1\]"),
        ({"max_exit_error": 0.0}, r"exit_error must be inside \(0, 1\), got 0.0"),
        ({"min_coverage": 1.0}, r"least_coverage must be inside \(0, 1\), got 1.0"),
        ({"target_fnr": 2.0}, r"fnr must be inside \(0, 1\), got 2.0"),
        ({"guarantee": "crc"}, "guarantee must be .*none.*ltt, got 'crc'"),
    ],
)
def test_wrong_gate_input_is_named(change: dict[str, object], message: str) -> None:
    arguments = {
        "probs": np.full((4, 2), 0.5), "gate_logits": np.zeros(4), "labels": [0, 1, 0, 1],
        "halves": ["fit", "fit", "certify", "certify"], **BINARY, **change,
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        fit_gate_policy(**arguments)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------
# The station, its claims and its command


def make_run(run: Path, n: int = 12_000, seed: int = 0, **changes: object) -> Predictions:
    """A run folder with splits.json and val_calib.npz, whose default wishes can be certified."""
    run.mkdir(exist_ok=True)
    data = gated(n, seed=seed)
    # Surer where the gate is: the softmax policy can be certified as well.
    sure = expit(0.8 * data["gate_logits"] + 0.5)
    right = data["probs"].argmax(1)
    logits = np.zeros((n, 2), np.float32)
    logits[np.arange(n), right] = np.log1p(np.exp(data["gate_logits"])) + sure
    rows = [
        Row(id=f"r{i}", file=f"{i}.png", label=BINARY["classes"][y], group=f"g{seed}-{i}", split="val_calib", half=half,
            sha256=f"{seed}-{i}")
        for i, (y, half) in enumerate(zip(data["labels"].tolist(), data["halves"].tolist(), strict=True))
    ]  # fmt: skip
    names = ("train", "val_select", "val_calib", "val_test")
    splits = Splits(
        root=str(run), **BINARY, seed=seed, fractions=dict.fromkeys(names, 0.25), counts={name: {} for name in names},
        groups=dict.fromkeys(names, 0), hashes=hash_splits(rows), rows=rows,
        merging=Merging(pairs=0, components=0, largest_rows=0, largest_share=0, largest_groups=[]),
    )  # fmt: skip
    splits.write(run / "splits.json")
    predictions = Predictions(
        row_ids=np.array([row.id for row in rows]), groups=np.array([row.group for row in rows]),
        sources=np.array([""] * n), halves=data["halves"], logits_a=logits, logits_b=logits,
        gate_logits=data["gate_logits"], labels=data["labels"].astype(np.int64), **BINARY, split="val_calib",
        split_hash=splits.hashes["val_calib"], model_fingerprint="m" * 64, preprocessing_fingerprint="p" * 64,
    )  # fmt: skip
    predictions = replace(predictions, **changes)
    predictions.save(run / "val_calib.npz")
    return predictions


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a run but its lock."""
    files = [one for one in folder.rglob("*") if one.is_file() and one.name != ".lock"]
    return {str(one.relative_to(folder)): one.read_bytes() for one in files}


def test_the_first_claim_is_certified_and_the_same_one_is_no_second(tmp_path: Path) -> None:
    make_run(tmp_path)
    wish = {"policy": "gate", "max_exit_error": 0.02}
    policy = calibrate(tmp_path, **wish)
    assert read_policy(tmp_path) == policy
    assert [p.name for p in tmp_path.glob("*params.json")] == ["gateparams.json"]
    assert (policy.certificate.use, policy.certificate.claims, policy.certify_uses) == (1, 1, 1)
    hashes = Splits.read(tmp_path / "splits.json").hashes
    assert policy.split_hashes == hashes
    assert {"val_calib.fit", "val_calib.certify"} <= set(policy.split_hashes)
    written = (tmp_path / "gateparams.json").read_bytes()
    assert calibrate(tmp_path, **wish) == policy
    assert (tmp_path / "gateparams.json").read_bytes() == written
    known = Claims.read(tmp_path / "claims.json").halves[hashes["val_calib.certify"]]
    assert [use.outcome for use in known.uses] == ["certified"]


def test_a_second_claim_is_refused_and_the_message_teaches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path)
    arguments = ["calibrate", "--run", str(tmp_path), "--policy", "gate", "--least-coverage", "0.7"]
    assert cli.main([*arguments, "--alpha", "0.02"]) == 0
    assert "claim 1 of 1 on these photos; it certifies nothing else" in capsys.readouterr().out
    before = (tmp_path / "gateparams.json").read_bytes()
    for other in (["--max-exit-error", "0.03"], ["--alpha", "0.02", "--fnr", "0.6"]):
        assert cli.main([*arguments, *other]) == 2
        said = capsys.readouterr().err
        assert (
            "must serve one claim, which was made (1. gate: coverage >= 0.7, exit error <= 0.02, model mmmmmmmm" in said
        )
        assert "certified)" in said
        for way in ("--guarantee none", "another folder", "--claims K"):
            assert way in said
    assert (tmp_path / "gateparams.json").read_bytes() == before, "a refusal leaves the policy that stands"
    # Neither deleting the policy nor another model resets the count.
    (tmp_path / "gateparams.json").unlink()
    make_run(tmp_path, model_fingerprint="n" * 64)
    assert cli.main([*arguments, "--alpha", "0.02"]) == 2
    assert "must serve one claim" in capsys.readouterr().err
    assert cli.main(["calibrate", "--run", str(tmp_path), "--target-fnr", "0.05"]) == 2
    assert "got another (softmax: FNR on exits <= 0.05)" in capsys.readouterr().err
    # The empirical choice needs no claim; new splits start anew.
    assert cli.main([*arguments, "--alpha", "0.02", "--guarantee", "none"]) == 0
    make_run(tmp_path, seed=1)
    assert cli.main([*arguments, "--alpha", "0.03"]) == 0
    assert len(Claims.read(tmp_path / "claims.json").halves) == 2
    make_run(tmp_path)
    assert cli.main([*arguments, "--alpha", "0.03"]) == 2, "and the old splits are remembered"


def test_delta_divided_beforehand_allows_several_claims(tmp_path: Path) -> None:
    make_run(tmp_path)
    first = calibrate(tmp_path, policy="gate", max_exit_error=0.03, claims=2)
    assert (first.certificate.delta, first.certificate.use) == (0.025, 1)
    assert "With probability at least 97.5%" in first.statement
    with pytest.raises(InputError, match="--claims must be 2, as declared at the first claim"):
        calibrate(tmp_path, policy="gate", max_exit_error=0.02, claims=3)
    with pytest.raises(InputError, match="--delta must be 0.05, as declared at the first claim"):
        calibrate(tmp_path, policy="gate", max_exit_error=0.02, delta=0.1)
    second = calibrate(tmp_path, policy="softmax", target_fnr=0.05)
    assert (second.certificate.delta, second.certificate.use) == (0.025, 2)
    assert isinstance(read_policy(tmp_path), Thresholds)
    with pytest.raises(InputError, match="must serve the 2 claims declared, which were made"):
        calibrate(tmp_path, policy="gate", max_exit_error=0.02)


def test_infeasible_is_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, n=400)
    assert cli.main(["calibrate", "--run", str(tmp_path), "--guarantee", "none", "--target-fnr", ".3"]) == 0
    capsys.readouterr()
    assert cli.main(["calibrate", "--run", str(tmp_path), "--policy", "gate", "--exit-error", ".01"]) == 3
    said = capsys.readouterr().err
    assert "INFEASIBLE" in said and "unspent" in said and "200 rows, of at least 299" in said
    before = files_of(tmp_path)
    wish = ["calibrate", "--run", str(tmp_path), "--policy", "gate", "--alpha", ".02", "--min-coverage", ".9"]
    assert cli.main(wish) == 3
    said = capsys.readouterr().err
    assert "INFEASIBLE" in said and "The smallest exit error that could be certified is 0." in said
    assert "rows kept for it would do (there are 200" in said or "No number of rows would do" in said
    assert "--guarantee none" in said and "ask for less" not in said and "thresholds.json stands" in said
    after = files_of(tmp_path)
    assert after.pop("claims.json") != before.pop("claims.json") and after == before
    half = Splits.read(tmp_path / "splits.json").hashes["val_calib.certify"]
    assert Claims.read(tmp_path / "claims.json").halves[half].uses[0].outcome == "infeasible"
    assert cli.main(wish) == 3, "the same wish, the same answer"
    assert cli.main([*wish[:-3], ".05"]) == 2


def test_wrong_wishes_cost_no_claim(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path)
    for wrong, message in (
        (["--policy", "gate", "--alpha", "2"], "got 2.0"),
        (["--variant", "T"], "variant must go with policy scrc, got it with softmax"),
        (["--class", "roadwork"], "fnr_class must go with fnr"),
        (["--policy", "gate", "--alpha", "0.02", "--exit-error", "0.02"], "alpha and exit_error must not both"),
        (["--guarantee", "none", "--claims", "2"], "claims must go with guarantee ltt"),
        (["--claims", "0"], "got 0"),
    ):
        assert cli.main(["calibrate", "--run", str(tmp_path), *wrong]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "claims.json").exists()
    (tmp_path / "claims.json").write_text("{")
    with pytest.raises(ArtifactError, match="claims.json is not a valid Claims"):
        calibrate(tmp_path, policy="gate")


@pytest.mark.parametrize("what", ["sha256", "group"])
def test_overlapping_halves_are_refused(tmp_path: Path, what: str) -> None:
    predictions = make_run(tmp_path, n=40)
    replace(predictions, halves=np.roll(predictions.halves, 1)).save(tmp_path / "val_calib.npz")
    with pytest.raises(ArtifactError, match="val_calib.npz must .*splits.json.*got others"):
        calibrate(tmp_path)
    predictions.save(tmp_path / "val_calib.npz")
    values = json.loads((tmp_path / "splits.json").read_text())
    fit, other = (next(r for r in values["rows"] if r["half"] == half) for half in ("fit", "certify"))
    fit[what] = other[what]
    (tmp_path / "splits.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match=f"must not overlap, got the same {what} in both"):
        calibrate(tmp_path)
    assert not (tmp_path / "claims.json").exists()


def test_an_empirical_look_is_counted_and_the_certificate_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path)
    for alpha in (0.02, 0.03):
        calibrate(tmp_path, policy="gate", guarantee="none", max_exit_error=alpha)
    looks = Claims.read(tmp_path / "claims.json").looks
    assert list(looks.values()) == [2] and not Claims.read(tmp_path / "claims.json").halves
    policy = calibrate(tmp_path, policy="gate", max_exit_error=0.02)
    assert policy.certificate is not None
    assert any("2 empirical choice(s)" in text for text in policy.certificate.assumptions)
    assert any("another run folder" in text for text in policy.certificate.assumptions)
    assert "saw these photos 2 time(s) before" in capsys.readouterr().err
    fresh = tmp_path / "fresh"
    make_run(fresh)
    policy = calibrate(fresh, policy="gate", max_exit_error=0.02)
    assert policy.certificate is not None
    assert not any("empirical" in text for text in policy.certificate.assumptions)


def test_calibrations_at_once_wait_for_each_other(tmp_path: Path) -> None:
    """Two at once would lose a claim between reading and writing, or leave two policies."""
    make_run(tmp_path, 400)
    code = (
        "import sys; from stage1_pro.files import locked\n"
        "with locked(sys.argv[1] + '/.lock'): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        for guarantee in ("ltt", "none"):
            with pytest.raises(InputError, match="another process is at work in it"):
                calibrate(tmp_path, guarantee=guarantee)
        assert not (tmp_path / "claims.json").exists() and read_policy(tmp_path) is None
    finally:
        holder.communicate("")


def test_gate_logits_that_are_no_numbers_cost_no_claim(tmp_path: Path) -> None:
    predictions = make_run(tmp_path, 400)
    nothing = np.full_like(predictions.gate_logits, np.nan)
    make_run(tmp_path, 400, gate_logits=nothing)
    with pytest.raises(NotReachableError, match="no claim was made"):
        calibrate(tmp_path, policy="gate")
    assert not (tmp_path / "claims.json").exists()


def test_the_smallest_risk_that_is_named_can_be_certified() -> None:
    """Another alpha walks from another threshold: what is named is tried, for the risk that failed."""
    named = 0
    for seed in range(12):
        data = gated(1500, seed=seed)
        wish = {"delta": 0.05, "min_coverage": 0.5, "halves": data["halves"], "lowest": 0.0}
        sure, wrong = expit(data["gate_logits"]), data["probs"].argmax(1) != data["labels"]
        found = certify_halves(sure, [Risk("exit error", 0.004, wrong)], **wish)
        if found.feasible or found.min_certifiable_alpha is None:
            continue
        named += 1
        assert found.min_certifiable_alpha > 0.004 and found.smallest_of == "exit error"
        assert certify_halves(sure, [Risk("exit error", found.min_certifiable_alpha, wrong)], **wish).feasible
        assert not certify_halves(
            sure, [Risk("exit error", 0.97 * found.min_certifiable_alpha, wrong)], **wish
        ).feasible
        # The second risk fails alone: the number is its own.
        both = [Risk("exit error", 0.9, wrong), Risk("other", 0.004, wrong)]
        assert certify_halves(sure, both, **wish).smallest_of == "other"
    assert named > 5


@pytest.mark.parametrize("seed", [1, 2, 3, 5, 25])
def test_clips_of_unlike_size_without_an_error_are_refused_with_what_would_do(seed: int) -> None:
    """Shares of rows in their clips do not add up to whole numbers: their errors came out a hair below none."""
    size = np.random.default_rng(seed).integers(1, 5, 100)
    clip = np.repeat(np.arange(100), size)
    found = certify_threshold(
        1 - clip / 100, clip >= 50, alpha=0.05, delta=0.05, candidates=[0.505], groups=clip, unit="groups"
    )
    # 50 clips exit, all rightly, where 59 would do.
    assert not found.feasible and (found.risks[0].errors, found.risks[0].trials) == (0, 50)
    assert found.needed is not None and found.needed.low is not None
    assert found.needed.low <= 118 <= found.needed.n < 200


def test_no_positives_is_said_as_such(tmp_path: Path) -> None:
    data = gated(800)
    labels = np.where(data["halves"] == "certify", 0, data["labels"])
    with pytest.raises(NotReachableError, match="tell anything of FNR on exits"):
        fit_softmax_policy(data["probs"], labels, **BINARY, guarantee="ltt", halves=data["halves"])


def test_a_gate_that_is_wrong_way_round_is_not_turned() -> None:
    rng = np.random.default_rng(0)
    logit = rng.normal(size=500)
    platt = fit_platt(logit, rng.random(500) < expit(-2 * logit))
    assert (platt.a, platt.b, platt.fitted) == (1.0, 0.0, False)
    assert "does not rise" in platt.reason


def test_a_policy_replaces_policies_and_nothing_else(tmp_path: Path) -> None:
    data = gated(400)
    np.savez(tmp_path / "mine.npz", probs=data["probs"], labels=data["labels"], gate_logits=data["gate_logits"])
    precious = tmp_path / "precious.json"
    precious.write_text('{"mine": 1}')
    for wish in ({"policy": "gate", "max_exit_error": 0.0001, "guarantee": "ltt"}, {"guarantee": "none"}):
        with pytest.raises(InputError, match="must be a new file or a policy to replace"):
            calibrate(logits=tmp_path / "mine.npz", out=precious, **wish)
    assert precious.read_text() == '{"mine": 1}'
    folder = tmp_path / "out"
    easy = {"guarantee": "none", "logits": tmp_path / "mine.npz", "out": folder}
    calibrate(**easy, target_fnr=0.9)
    calibrate(**easy, policy="gate", max_exit_error=0.9, min_coverage=0.1)
    policy = read_policy(folder)
    assert policy is not None and policy.policy == "gate"


@pytest.mark.parametrize("name", ["[/weird] x", "[bold]", "[red]x[/red]"])
def test_brackets_in_names_are_shown_as_they_are(name: str) -> None:
    data = gated(400)
    classes = {"classes": ["none", name], "positive": name}
    policy = fit_softmax_policy(data["probs"], data["labels"], **classes, target_fnr=0.9)
    assert name in render(policy)


@pytest.mark.parametrize("better", ["gate", "softmax"])
def test_auto_takes_the_policy_that_ranked_better(
    better: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = make_run(tmp_path, 400)
    with pytest.raises(ArtifactError, match=r"gate\.json, but there is no such file"):
        calibrate(tmp_path, policy="auto", guarantee="none")
    figures = {name: Metric(metric=name, value=0.1) for name in ("gate_augrc", "softmax_augrc", "difference")}
    choice = GateChoice(
        fit="joint", form="joint", split_hash="h", model_fingerprint=predictions.model_fingerprint, asked="auto",
        confidence=better, **figures,
    )  # fmt: skip
    choice.write(tmp_path / "gate.json")
    wish = {"min_coverage": 0.3, "max_exit_error": 0.5} if better == "gate" else {"target_fnr": 0.5}
    assert calibrate(tmp_path, policy="auto", guarantee="none", **wish).policy == better
    assert f"policy {better}: gate.json found it" in capsys.readouterr().err
    choice.model_copy(update={"model_fingerprint": "other"}).write(tmp_path / "gate.json")
    with pytest.raises(ArtifactError, match="must be of the model that gave"):
        calibrate(tmp_path, policy="auto", guarantee="none")
    with pytest.raises(InputError, match="must go with --run"):
        calibrate(logits=tmp_path / "val_calib.npz", policy="auto")


def test_anybodys_logits_for_the_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = gated(12_000)
    file = tmp_path / "mine.npz"
    np.savez(file, probs=rows["probs"], labels=rows["labels"], gate_logits=rows["gate_logits"], half=rows["halves"])
    arguments = ["calibrate", "--logits", str(file), "--policy", "gate", "--alpha", ".02", "--out", str(tmp_path / "o"),
                 "--rows-independent"]  # fmt: skip
    assert cli.main([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    policy = GateParams.read(tmp_path / "o" / "gateparams.json")
    assert said == json.loads(policy.model_dump_json())
    expected = fit_gate_policy(**{**rows, "groups": None}, classes=["0", "1"], positive="1", max_exit_error=0.02)
    assert (policy.a, policy.b, policy.threshold) == (expected.a, expected.b, expected.threshold)
    assert (policy.certificate.use, policy.certify_uses) == (None, None)
    # Without halves they are cut here; without gate logits there is no gate.
    np.savez(file, probs=rows["probs"], labels=rows["labels"], gate_logits=rows["gate_logits"])
    assert calibrate(logits=file, policy="gate", max_exit_error=0.02, rows_independent=True).n_fit_rows == 6000
    np.savez(file, probs=rows["probs"], labels=rows["labels"])
    with pytest.raises(InputError, match="must hold gate_logits"):
        calibrate(logits=file, policy="gate")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["roadwork_signs", "roadwork_scenes"])
def test_the_real_sets_are_too_small_for_small_limits(name: str, shared, tmp_path: Path) -> None:
    """INFEASIBLE even for a model without a single error: their certify halves have too few groups."""
    folder = shared(f"data/{name}")
    assert cli.main(["split", "--labels", str(folder / "labels.csv"), "--positive", "roadwork",
                     "--out", str(tmp_path / "run")]) == 0  # fmt: skip
    splits = Splits.read(tmp_path / "run" / "splits.json")
    rows = splits.of("val_calib")
    labels = np.array([splits.classes.index(row.label) for row in rows])
    logits = (8 * np.eye(2)[labels]).astype(np.float32)
    rng = np.random.default_rng(0)
    Predictions(
        row_ids=np.array([row.id for row in rows]), groups=np.array([row.group for row in rows]),
        sources=np.array([row.source for row in rows]), halves=np.array([row.half for row in rows]), logits_a=logits,
        logits_b=logits, gate_logits=rng.normal(5, 1, labels.size).astype(np.float32), labels=labels,
        classes=splits.classes, positive=splits.positive, split="val_calib", split_hash=splits.hashes["val_calib"],
        model_fingerprint="m" * 64, preprocessing_fingerprint="p" * 64,
    ).save(tmp_path / "run" / "val_calib.npz")  # fmt: skip
    # Counts alone say so, 149 and 299 groups without an error being the least: no claim is spent.
    for wish, least in (({"fnr": 0.02}, "149"), ({"exit_error": 0.01}, "299")):
        with pytest.raises(NotReachableError, match="INFEASIBLE") as caught:
            calibrate(tmp_path / "run", policy="softmax", **wish)
        assert least in str(caught.value) and "unspent" in str(caught.value)
        assert not (tmp_path / "run" / "claims.json").exists()
    # The softmax of a sure model is what it is: nothing above depends on the logits' size.
    assert softmax(logits).max() > 0.99
