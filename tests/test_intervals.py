"""Intervals cover what they are of: simulations with known truths, each beside its promise and its own noise.

``pytest -m slow -s tests/test_intervals.py`` prints a table; the fast tests here hold what needs no simulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kit.rates import show
from numpy.typing import NDArray
from scipy.stats import beta, binom

from stage1_pro.continual.watch.monitor import cbpe, hajek_risk, horvitz_thompson_risk, naive_risk
from stage1_pro.metrics import bootstrap, bootstrap_answers, bootstrap_errors, compare
from stage1_pro.metrics.estimate import Estimate, Sizes
from stage1_pro.metrics.intervals import metric_names
from stage1_pro.metrics.probabilistic import AnswerRows
from stage1_pro.metrics.table import METRICS, lookup
from stage1_pro.native import order
from stage1_pro.policies.checks import check_claim, mean_size, share_of

Floats = NDArray[np.float64]
NAN = math.nan


def enough(share: float, promise: float, draws: int) -> bool:
    """Whether a share of draws is at least what was promised, but for three standard errors."""
    return share >= promise - 3 * math.sqrt(promise * (1 - promise) / draws)


# ---------------------------------------------------------------------------- all thresholds at once

# Depth u in the ranking, uniform: P(wrong | depth), coverage is depth.
LAWS: dict[str, Callable[[Floats], Floats]] = {
    "risk at coverage c is c / 10": lambda u: 0.2 * u,
    "20 levels": lambda u: 0.01 * (2 * np.floor(20 * u) + 1) / 2,
    "the surest tenth is bad": lambda u: np.where(u < 0.1, 0.05, np.where(u < 0.6, 0.002, 0.2)),
    "a jump at .7": lambda u: np.where(u < 0.7, 0.004, 0.3),
}
DEPTHS = (np.arange(100_000) + 0.5) / 100_000


def thresholds_of(law: str, n: int, rng: np.random.Generator, groups: int = 0) -> tuple[Floats, ...]:
    """Confidence, error and group of rows; with groups all rows of one are near-copies."""
    sizes = rng.integers(1, 11, groups) if groups else np.ones(n, int)
    group = np.repeat(np.arange(sizes.size), sizes)
    depth, draw = rng.random(sizes.size)[group], rng.random(sizes.size)[group]
    wrong = draw < LAWS[law](depth)
    if law == "20 levels":
        depth = np.floor(20 * depth)
    return -depth, wrong, group


def truths_of(law: str) -> tuple[Floats, Floats]:
    """Coverage and selective risk at every threshold of the population."""
    risk = np.cumsum(LAWS[law](DEPTHS)) / np.arange(1, DEPTHS.size + 1)
    ends = np.arange(1, 21) * 5000 - 1 if law == "20 levels" else np.arange(DEPTHS.size)
    return (ends + 1) / DEPTHS.size, risk[ends]


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("size", ["200", "1000", "5000", "60 groups", "400 groups"])
def test_ends_hold_for_the_best_of_all_thresholds(law: str, size: str) -> None:
    rng, draws = np.random.default_rng(0), 300
    n, groups = (0, int(size.split(maxsplit=1)[0])) if "groups" in size else (int(size), 0)
    coverage, risk = truths_of(law)
    names = ("coverage_at_risk_0.01", "coverage_at_risk_0.02", "coverage_at_risk_0.05", "risk_at_coverage_0.8")
    truth = [max(coverage[risk <= r], default=0.0) for r in (0.01, 0.02, 0.05)] + [risk[np.argmax(coverage >= 0.8)]]
    held = np.zeros(len(names))
    for seed in range(draws):
        sure, wrong, group = thresholds_of(law, n, rng, groups)
        found = bootstrap_errors(
            sure, wrong, groups=group if groups else None, metrics=names, n_replicates=2, seed=seed
        )
        held += [found[name].low <= value <= found[name].high for name, value in zip(names, truth, strict=True)]
    show("coverage at risk .01, .02, .05; risk at coverage .8", f"{law}, {size}", "covers .95", held / draws, draws)
    assert all(enough(share, 0.95, draws) for share in held / draws)


def walked_by_hand(wrong: list[int], risk: float, level: float) -> tuple[float, float]:
    """The ends of Coverage@Risk from SciPy's binomial law, rank by rank; the surest row first."""
    n, tail = len(wrong), (1 - level) / 2
    errors = np.cumsum(wrong)
    high = 0.0
    for k in range(n, 0, -1):
        if binom.sf(errors[k - 1] - 1, k, risk) > 0.8 * tail:
            high = 1.0 if k == n else float(beta.ppf(1 - 0.2 * tail, k + 1, n - k))
            break
    else:
        high = float(beta.ppf(1 - 0.2 * tail, 1, n))
    per_error = -math.log1p(-risk)
    walks = max(1, 1 + math.floor(math.log2(max(n * per_error / -math.log(0.8 * tail), 1))))
    best = 0
    for walk in range(walks):
        k = max(1, math.ceil(math.log(walks / (0.8 * tail)) / per_error * 2**walk))
        while k <= n and binom.cdf(errors[k - 1], k, risk) <= 0.8 * tail / walks:
            best = max(best, k)
            k += 1
    low = 1.0 if best == n else float(beta.ppf(0.2 * tail, best, n - best + 1)) if best else 0.0
    return low, high


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 400), st.sampled_from([0.02, 0.1, 0.3, 0.5]), st.floats(0, 0.6), st.integers(0, 10**6))
@example(400, 0.1, 0.25, 3)
@example(300, 0.1, 0.4, 4)
@example(200, 0.3, 0.6, 2)
def test_the_walk_is_the_exact_one(n: int, risk: float, rate: float, seed: int) -> None:
    wrong = np.random.default_rng(seed).random(n) < np.linspace(0, rate, n)
    name = f"coverage_at_risk_{risk:g}"
    found = bootstrap_errors(-np.arange(n), wrong, metrics=name, n_replicates=2, level=0.9)[name]
    low, high = walked_by_hand(wrong.astype(int).tolist(), risk, 0.9)
    assert (found.low, found.high) == pytest.approx((min(low, found.value), max(high, found.value)), abs=1e-9)
    assert found.method == "exact"


@pytest.mark.parametrize("n", [1, 30, 2000])
def test_risk_where_all_is_accepted_is_clopper_and_pearsons(n: int) -> None:
    wrong = np.arange(n) % 7 == 0
    one = bootstrap_errors(np.arange(n), wrong, metrics="risk_at_coverage_1", n_replicates=2)["risk_at_coverage_1"]
    k = int(wrong.sum())
    assert one.low == pytest.approx(beta.ppf(0.02, k, n - k + 1))
    assert one.high == pytest.approx(1.0 if k == n else beta.ppf(0.98, k + 1, n - k))


def test_copies_in_groups_certify_no_more_than_one_of_each() -> None:
    """Even groups of copies are worth their number, however many rows they have."""
    rng = np.random.default_rng(3)
    sure = rng.permutation(300).astype(float)
    wrong = rng.random(300) < 0.1 * (1 - sure / 300)
    once = bootstrap_errors(sure, wrong, metrics=["coverage_at_risk_0.1", "risk_at_coverage_0.5"], n_replicates=2)
    many = bootstrap_errors(
        np.repeat(sure, 9), np.repeat(wrong, 9), groups=np.repeat(np.arange(300), 9), metrics=list(once), n_replicates=2
    )
    for name, one in once.items():
        assert (many[name].value, many[name].low, many[name].high) == pytest.approx((one.value, one.low, one.high))


@pytest.mark.slow
def test_losses_hold_as_well() -> None:
    """Losses between 0 and 1, twice the depth to the fourth part: risk at coverage c is c / 10."""
    rng, draws, held = np.random.default_rng(1), 300, np.zeros(2)
    names = ("coverage_at_risk_0.05", "risk_at_coverage_0.5")
    for seed in range(draws):
        depth = rng.random(1000)
        loss = 0.2 * depth * 2 * rng.beta(0.5, 0.5, 1000)
        found = bootstrap_errors(-depth, loss, metrics=names, n_replicates=2, seed=seed)
        held += [
            found[names[0]].low <= 0.5 <= found[names[0]].high,
            found[names[1]].low <= 0.05 <= found[names[1]].high,
        ]
    show("coverage at risk .05; risk at coverage .5", "losses, 1,000", "covers .95", held / draws, draws)
    assert all(enough(share, 0.95, draws) for share in held / draws)


def bursts(
    groups: int, share: float, size: int, wrong: float, rng: np.random.Generator, *, surer: float = 0.0
) -> tuple[NDArray, ...]:
    """Confidence, error and group of rows: only bursts are ever wrong, and then every row of one."""
    sizes = np.where(rng.random(groups) < share, size, 1)
    group = np.repeat(np.arange(groups), sizes)
    bad = rng.random(groups) < np.where(sizes > 1, wrong, 0.0)
    return (rng.random(groups) + surer * (sizes > 1))[group], bad[group], group


@pytest.mark.slow
@pytest.mark.parametrize("surer", [0.0, 0.5])
@pytest.mark.parametrize(
    ("groups", "share", "size", "wrong"),
    [(1000, 0.01, 20, 0.5), (1000, 0.02, 10, 0.5), (3000, 0.01, 10, 0.3), (3000, 0.02, 30, 0.1)],
)
def test_errors_that_follow_the_size_of_groups(
    groups: int, share: float, size: int, wrong: float, surer: float
) -> None:
    rng, draws = np.random.default_rng(8), 300
    names = ("risk_at_coverage_1", "risk_at_coverage_0.8", "coverage_at_risk_0.01", "coverage_at_risk_0.05")
    # Rows above a confidence t: single ones uniform on [0, 1], bursts on [surer, 1 + surer].
    t = np.linspace(0, 1 + surer, 200_001)
    single, burst = (1 - share) * np.clip(1 - t, 0, 1), share * size * np.clip(1 + surer - t, 0, 1)
    rows = single + burst
    risk, coverage = wrong * burst[:-1] / rows[:-1], rows[:-1] / rows[0]
    truth = [risk[0], risk[coverage >= 0.8][-1]]
    truth += [max(coverage[risk <= limit * (1 + 1e-9)], default=0.0) for limit in (0.01, 0.05)]
    held, said = np.zeros(4), np.zeros(4)
    for seed in range(draws):
        sure, bad, group = bursts(groups, share, size, wrong, rng, surer=surer)
        found = bootstrap_errors(sure, bad, groups=group, metrics=names, n_replicates=2, seed=seed)
        held += [found[name].low <= value <= found[name].high for name, value in zip(names, truth, strict=True)]
        said += [bool(found[name].note) for name in names]
        assert all(found[name].method == "by group" for name in names)
    law = f"{groups} groups, {share:g} of {size}, surer by {surer:g}"
    show("risk at coverage 1, .8; coverage at risk .01, .05", law, "covers .95", held / draws, draws)
    show("their caution", law, "", said / draws, draws)
    assert all(enough(hold, 0.95, draws) for hold in held / draws)


def test_copies_of_wrong_rows_in_large_groups_widen_the_interval() -> None:
    """Errors in bursts alone say less than the sizes of the groups do; few wrong bursts are said."""
    sure, bad, group = bursts(1000, 0.03, 20, 0.5, np.random.default_rng(2))
    shuffled = bad[np.random.default_rng(0).permutation(bad.size)]
    name = "risk_at_coverage_1"
    ours, spread = (
        bootstrap_errors(sure, wrong, groups=group, metrics=name, n_replicates=2)[name] for wrong in (bad, shuffled)
    )
    assert ours.value == pytest.approx(spread.value)
    assert ours.high - ours.low > 1.3 * (spread.high - spread.low)
    assert not ours.note
    few = bootstrap_errors(sure, bad & (group <= group[bad][25]), groups=group, metrics=name, n_replicates=2)[name]
    assert "only 2 groups with errors" in few.note


def test_notes_count_groups_that_are_there() -> None:
    group = np.repeat(np.arange(12), 4)
    none = bootstrap_errors(np.arange(48), np.ones(48), groups=group, metrics="coverage_at_risk_0.05", n_replicates=2)
    assert (none["coverage_at_risk_0.05"].value, none["coverage_at_risk_0.05"].low) == (0, 0)
    assert "only 12 groups" in none["coverage_at_risk_0.05"].note
    one = bootstrap_errors([1.0, 2.0], [0, 1], groups=[0, 0], metrics="risk_at_coverage_1", n_replicates=2)
    assert "only 1 group with errors and only 1 group:" in one["risk_at_coverage_1"].note


# ---------------------------------------------------------------------------- differences by group


def clips(kind: str, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Sizes of clips: even, 1 to 20, or lognormal."""
    if kind == "even":
        return np.full(n, 10)
    return rng.integers(1, 21, n) if kind == "1 to 20" else np.maximum(1, np.exp(rng.normal(1.5, 1, n)).astype(int))


@pytest.mark.slow
@pytest.mark.parametrize("n", [30, 60, 120])
@pytest.mark.parametrize("sizes", ["even", "1 to 20", "lognormal"])
def test_a_paired_difference_by_clip_covers(sizes: str, n: int) -> None:
    """The two differ in a fifth of the clips, and there in every row: 12% for one, 8% for the other."""
    rng, draws = np.random.default_rng(2), 400
    held, said = np.zeros(4), 0
    truth = [0.04, 0.0, 0.04, 0.04]  # accuracy; the others by a large sample
    for seed in range(-1, draws):
        size = clips(sizes, n if seed >= 0 else 40_000, rng)
        clip = np.repeat(np.arange(size.size), size)
        case, base = rng.random(size.size)[clip], rng.normal(0, 1, clip.size)
        right_b = rng.random(size.size)[clip] < 0.8
        right_a = np.where(case < 0.12, True, np.where(case < 0.2, False, right_b))
        right_b = np.where(case < 0.12, False, np.where(case < 0.2, True, right_b))
        a, b = (
            1 / (1 + np.exp(-np.where(right, 1, -1) * (0.2 + np.abs(base + noise))))
            for right, noise in ((right_a, rng.normal(0, 0.2, clip.size)), (right_b, rng.normal(0, 0.2, clip.size)))
        )
        names = ["accuracy", "augrc", "nll", "brier"]
        how = {"groups": clip, "metrics": names, "n_replicates": 50 if seed >= 0 else 2, "seed": max(seed, 0)}
        found = compare(a, b, np.ones(clip.size, int), **how)
        if seed < 0:
            truth = [found[name].value for name in names]
            truth[0] = 0.04
            continue
        held += [found[name].low <= value <= found[name].high for name, value in zip(names, truth, strict=True)]
        said += "in which the two differ" in found["accuracy"].note
    show("difference of accuracy, AUGRC, NLL, Brier", f"{n} clips, {sizes}", "covers .95", held / draws, draws)
    show("its caution", f"{n} clips, {sizes}", "", said / draws, draws)
    assert all(enough(share, 0.92, draws) for share in held / draws)


def test_a_difference_says_in_how_many_units_the_two_differ() -> None:
    labels, clip = np.ones(600, int), np.repeat(np.arange(60), 10)
    a = np.full(600, 0.9)  # six clips of sixty, and what the mean itself takes from the others
    b = np.where(clip < 6, 0.2, 0.9)
    found = compare(a, b, labels, groups=clip, metrics="accuracy", n_replicates=50)["accuracy"]
    assert (found.method, found.value) == ("t", pytest.approx(0.1))
    assert found.note.startswith("only about 7 groups in which the two differ")
    assert found.low < 0.1 < found.high
    differ = np.where(np.arange(600) < 6, 0.2, 0.9)
    rows = compare(a, differ, labels, metrics="accuracy", n_replicates=50)
    assert "only about 6 rows in which the two differ" in rows["accuracy"].note
    asked = compare(a, b, labels, groups=clip, metrics="accuracy", n_replicates=50, method="percentile")["accuracy"]
    assert asked.method == "percentile"


@pytest.mark.slow
@pytest.mark.parametrize("n", [200, 1000])
def test_a_difference_of_coverage_at_risk_is_said_to_cover_less_and_of_risk_at_coverage_covers(n: int) -> None:
    rng, draws = np.random.default_rng(10), 150
    laws = ("risk at coverage c is c / 10", "a jump at .7")
    names = ("coverage_at_risk_0.01", "coverage_at_risk_0.02", "risk_at_coverage_0.8")
    truth = np.zeros(3)
    for law, sign in zip(laws, (1, -1), strict=True):
        coverage, risk = truths_of(law)
        truth += sign * np.array([*(coverage[risk <= r].max() for r in (0.01, 0.02)), risk[np.argmax(coverage >= 0.8)]])
    held, said = np.zeros(3), np.zeros(3)
    for seed in range(draws):
        (sure_a, a, _), (sure_b, b, _) = (thresholds_of(law, n, rng) for law in laws)
        found = compare(
            np.where(a, 0.1, 0.9), np.where(b, 0.1, 0.9), np.ones(n, int), confidence=(sure_a, sure_b), metrics=names,
            n_replicates=200, seed=seed,
        )  # fmt: skip
        held += [found[name].low <= value <= found[name].high for name, value in zip(names, truth, strict=True)]
        said += [bool(found[name].note) for name in names]
    show("differences of coverage at risk .01, .02; risk at coverage .8", f"n = {n}", ".8 covers", held / draws, draws)
    show("their caution", f"n = {n}", "", said / draws, draws)
    assert said[:2].tolist() == [draws, draws]
    assert enough(held[2] / draws, 0.93, draws)


# ---------------------------------------------------------------------------- few and uneven groups


@pytest.mark.slow
@pytest.mark.parametrize("n", [12, 30, 100])
@pytest.mark.parametrize("sizes", ["even", "1 to 20", "lognormal"])
def test_few_or_uneven_groups_cover_or_are_said(sizes: str, n: int) -> None:
    rng, draws = np.random.default_rng(5), 300
    names = ["accuracy", "augrc", "nll", "brier"]

    def rows(count: int) -> tuple[NDArray, ...]:
        size = clips(sizes, count, rng)
        clip = np.repeat(np.arange(count), size)
        hard = rng.normal(0, 1.5, count)[clip] + rng.normal(0, 0.7, clip.size)
        p = 1 / (1 + np.exp(-1 - hard))
        right = rng.random(clip.size) < 1 / (1 + np.exp(-1.2 - 0.8 * hard))
        return p, np.where(right, p > 0.5, p <= 0.5).astype(int), clip

    large = bootstrap(*rows(40_000)[:2], metrics=names, n_replicates=2)
    held, said = np.zeros(len(names)), np.zeros(len(names))
    for seed in range(draws):
        p, labels, clip = rows(n)
        found = bootstrap(p, labels, groups=clip, metrics=names, n_replicates=400, seed=seed)
        held += [found[name].low <= large[name].value <= found[name].high for name in names]
        said += ["groups" in found[name].note for name in names]
    show("accuracy, AUGRC, NLL, Brier", f"{n} groups, {sizes}", "covers .95", held / draws, draws)
    show("their caution", f"{n} groups, {sizes}", "", said / draws, draws)
    assert all(share > 0.5 or enough(hold, 0.92, draws) for hold, share in zip(held / draws, said / draws, strict=True))
    assert all(enough(hold, 0.9, draws) for hold in held / draws)


def test_cautions_count_effective_groups() -> None:
    """Thirty groups of which one is large are worth few; every metric says so."""
    rng = np.random.default_rng(0)
    for sizes, worth in (
        (np.full(12, 5), "only 12 groups"),
        (np.r_[100, np.full(29, 2)], "only 2 groups by their sizes"),
    ):
        clip = np.repeat(np.arange(sizes.size), sizes)
        p, labels = rng.random(clip.size), rng.integers(0, 2, clip.size)
        means = ["augrc", "aurc", "accuracy", "nll", "brier", "coverage_at_risk_0.5"]
        for found in (
            bootstrap(p, labels, groups=clip, metrics=means, n_replicates=30),
            bootstrap_answers(p, labels, groups=clip, n_replicates=30),
            compare(p, rng.random(clip.size), labels, groups=clip, metrics=means, n_replicates=30),
        ):
            for name, one in found.items():
                assert worth in one.note, (name, one)
    clip = np.repeat(np.arange(40), 3)
    p, labels = rng.random(120), rng.integers(0, 2, 120)
    assert not bootstrap(p, labels, groups=clip, metrics="nll", n_replicates=30)["nll"].note


@pytest.mark.parametrize("n", [30, 200])
def test_groups_of_one_row_each_are_rows(n: int) -> None:
    """The same ends, methods and cautions, where resamples number them alike."""
    rng = np.random.default_rng(n)
    p, labels = rng.random(n), rng.integers(0, 2, n)
    ranked = order(np.maximum(p, 1 - p), (p > 0.5) != labels)[0]
    for measured, place, how in (
        (bootstrap, ranked, {"threshold": 0.6}),
        (bootstrap, ranked, {"method": "logit"}),
        (bootstrap, ranked, {"metrics": "augrc"}),
        (bootstrap_answers, AnswerRows(np.stack([1 - p, p], axis=1), labels, 1).order, {}),
    ):
        names = np.argsort(place)
        rows, groups = (measured(p, labels, groups=given, n_replicates=40, **how) for given in (None, names))
        assert (groups.n_units, groups.unit) == (rows.n_units, rows.unit) == (n, "rows")
        for name, one in rows.items():
            other = groups[name]
            assert (other.method, other.note) == (one.method, one.note), name
            assert (other.low, other.high) == pytest.approx((one.low, one.high), nan_ok=True), name
    rows, groups = (
        compare(p, rng.permutation(p), labels, groups=given, metrics=["accuracy", "nll"], n_replicates=40)
        for given in (None, names)
    )
    assert [one.method for one in groups.values()] == [one.method for one in rows.values()] == ["bca"] * 2


def test_one_resample_is_no_interval() -> None:
    p, labels = np.linspace(0.1, 0.9, 50), np.arange(50) % 3 // 2
    found = bootstrap(p, labels, metrics=["augrc", "nll"], n_replicates=1)
    found |= bootstrap_answers(p, labels, n_replicates=1)
    for name, one in found.items():
        assert math.isnan(one.low) and "one resample" in one.note and "equal" not in one.note, name


def test_a_difference_is_worth_the_less_of_both_models() -> None:
    one = Estimate(METRICS["accuracy"], 0.9, np.zeros(2), 9, Sizes(5, 4))
    assert one.minus(replace(one, sizes=Sizes(6, 2))).sizes == (5, 2)


def test_without_an_error_uneven_groups_count_by_their_effective_number() -> None:
    """Three bursts of 100 photos beside 57 single ones are no sixty groups."""
    clip = np.repeat(np.arange(60), np.r_[np.full(57, 1), np.full(3, 100)])
    p = np.full(clip.size, 0.9)
    one = bootstrap(p, np.ones(clip.size, int), groups=clip, metrics="accuracy", n_replicates=20)["accuracy"]
    worth = clip.size**2 / (57 + 3 * 100**2)
    assert one.low == pytest.approx(0.025 ** (1 / worth))
    assert "count as 4" in one.note
    even = bootstrap(p[:57], np.ones(57, int), groups=clip[:57] // 3, metrics="accuracy", n_replicates=20)["accuracy"]
    assert even.low == pytest.approx(0.025 ** (1 / 19))
    assert "unlike" not in even.note


# ---------------------------------------------------------------------------- calibration error


@pytest.mark.slow
@pytest.mark.parametrize("size", ["300", "2000", "30 groups"])
@pytest.mark.parametrize(
    ("law", "promise"), [("calibrated", 0.95), ("off by .05 above .75", 0.95), ("off by .1", 0.95)]
)
def test_the_calibration_error_covers(law: str, promise: float, size: str) -> None:
    rng, draws, held, own = np.random.default_rng(6), 300, 0, 0
    off = {
        "calibrated": lambda p: 0 * p,
        "off by .05 above .75": lambda p: 0.05 * (p > 0.75),
        "off by .1": lambda p: 0.1 + 0 * p,
    }
    grid = 0.5 + (np.arange(500_000) + 0.5) / 1_000_000
    truth = float(off[law](grid).mean())
    for seed in range(draws):
        sizes = rng.integers(1, 21, 30) if "groups" in size else np.ones(int(size), int)
        group = np.repeat(np.arange(sizes.size), sizes)
        p, draw = rng.uniform(0.5, 1, group.size), rng.random(group.size)
        found = bootstrap_answers(
            p, draw < p - off[law](p), groups=group if "groups" in size else None, n_replicates=200, seed=seed
        )["ece"]
        held += found.low <= truth <= found.high
        own += found.low <= found.value <= found.high
    show("ECE", f"{law}, {size}", f"covers {promise}", held / draws, draws)
    assert enough(held / draws, promise, draws)
    assert own == draws


def test_the_calibration_error_of_a_calibrated_model_reaches_zero() -> None:
    """The sample of the finding: its interval left out its own value, and the truth."""
    rng = np.random.default_rng(4)
    p = rng.uniform(0.5, 1, 300)
    found = bootstrap_answers(p, rng.random(300) < p)["ece"]
    assert (found.low, found.method) == (0, "by bin")
    assert found.value < found.high
    over = bootstrap_answers(np.full(2000, 0.99), np.arange(2000) % 10 < 7)["ece"]
    assert over.low > 0.2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "right", "sure"), [(100, 0.95, 0.999), (200, 0.98, 0.9995), (500, 0.99, 0.9995), (1000, 0.995, 0.9999)]
)
@pytest.mark.parametrize("copies", [1, 5])
def test_the_calibration_error_covers_behind_few_errors(n: int, right: float, sure: float, copies: int) -> None:
    """One bin of rows that are surer than right; with copies every group is so many of one row."""
    rng, draws, held, said, few = np.random.default_rng(9), 300, 0, 0, 0
    group = np.repeat(np.arange(n), copies)
    for seed in range(draws):
        labels = (rng.random(n) < right).astype(int)
        found = bootstrap_answers(
            np.full(group.size, sure), labels[group], groups=None if copies == 1 else group, n_replicates=50, seed=seed
        )["ece"]
        held += found.low <= sure - right <= found.high
        said += " with errors" in found.note
        few += np.count_nonzero(labels == 0) < 10
    show("ECE", f"{n} of {sure} sure, {right} right, {copies} copies", "covers .95", held / draws, draws)
    assert enough(held / draws, 0.95, draws)
    assert said == few


def test_the_calibration_error_of_no_error_reaches_what_could_be() -> None:
    """No error in 100 rows leaves a share wrong of up to 1 - .025^(1/100), where .001 is expected."""
    found = bootstrap_answers(np.full(100, 0.999), np.ones(100, int), n_replicates=20)["ece"]
    assert (found.low, found.method) == (0, "by bin")
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 100) - 0.001)
    assert "only 0 rows with errors" in found.note


def test_means_of_probabilities_count_errors_as_accuracy_does() -> None:
    probs, labels = np.full(300, 0.9), np.ones(300, int)
    labels[:4] = 0
    found = bootstrap(probs, labels, metrics=["accuracy", "nll", "brier"], n_replicates=30)
    assert {one.note for one in found.values()} == {found["accuracy"].note}
    assert "only 4 rows with errors" in found["nll"].note
    several = bootstrap(np.tile([0.8, 0.1, 0.1], (90, 1)), np.arange(90) // 84, metrics="brier", n_replicates=30)
    assert "only 6 rows with errors" in several["brier"].note


# ---------------------------------------------------------------------------- ranges


def tiny_rows(draw: st.DrawFn, n: int) -> tuple[NDArray, NDArray, NDArray]:
    """Probabilities [N, K] with ties and certainties, labels and groups, some of one kind only."""
    classes = draw(st.integers(2, 4))
    shares = st.lists(st.sampled_from([0.0, 1e-300, 0.1, 0.5, 1.0]), min_size=classes, max_size=classes)
    probs = np.array([draw(shares.filter(any)) for _ in range(n)])
    labels = np.array([draw(st.integers(0, draw(st.integers(0, classes - 1)))) for _ in range(n)])
    return probs / probs.sum(1, keepdims=True), labels, np.array([draw(st.integers(0, 3)) for _ in range(n)])


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_every_interval_is_inside_its_range_and_holds_its_value(data: st.DataObject) -> None:
    """Of every metric and difference, by rows and groups: or there is none, and a note says why."""
    probs, labels, groups = tiny_rows(data.draw, data.draw(st.integers(1, 12)))
    groups = data.draw(st.sampled_from([None, groups]))
    how = {
        "n_replicates": data.draw(st.sampled_from([1, 2, 40])), "level": data.draw(st.sampled_from([0.5, 0.95, 0.999])),
    }  # fmt: skip
    threshold, method = (
        data.draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
        data.draw(st.sampled_from(["bca", "percentile"])),
    )
    other = np.roll(probs, 1, axis=0)
    risks = ["coverage_at_risk_0", "coverage_at_risk_1", "risk_at_coverage_1", "risk_at_coverage_1e-9"]
    names = [*metric_names(), *risks]
    found = bootstrap(
        probs, labels, groups=groups, threshold=threshold, positive=1, metrics=names,
        method=data.draw(st.sampled_from([method, "logit"])), **how,
    )  # fmt: skip
    found |= bootstrap_answers(probs, labels, groups=groups, positive=1, **how)
    apart = compare(
        probs, other, labels, groups=groups, threshold=threshold, positive=1, metrics=names, method=method, **how
    )
    for name, one in [*found.items(), *apart.items()]:
        spec = lookup(name)[0]
        top = 2.0 if name == "brier" and probs.shape[1] > 2 else spec.top
        low, high = (spec.bottom - top, top - spec.bottom) if one is apart.get(name) else (spec.bottom, top)
        if math.isnan(one.value):
            assert math.isnan(one.low) and math.isnan(one.high) and one.note, name
            continue
        assert low - 1e-12 <= one.value <= high + 1e-12, name
        if math.isnan(one.low) or math.isnan(one.high):
            assert math.isnan(one.low) and math.isnan(one.high) and one.note and one.method == "none", name
        else:
            assert low - 1e-12 <= one.low <= one.value <= one.high <= high + 1e-12, (name, one)


@given(st.lists(st.booleans(), max_size=12), st.floats(0.05, 1), st.sampled_from([1e-6, 0.3, 1.0]))
def test_risks_of_audits_are_shares(wrong: list[bool], e: float, floor: float) -> None:
    chance = np.maximum(np.linspace(e, 1, len(wrong)), floor)
    for one in (
        hajek_risk(np.array(wrong, float), chance, floor=floor), naive_risk(np.array(wrong, float)),
        cbpe(chance, np.array(wrong, bool)),
    ):  # fmt: skip
        assert one.value is None or 0 <= one.low <= one.value <= one.high <= 1
    one = horvitz_thompson_risk(np.array(wrong, float), chance)
    assert one.value is None or (0 <= one.low <= one.value and (one.value > 1 or one.value <= one.high <= 1))


@settings(deadline=None)
@given(st.integers(2, 5), st.booleans(), st.data())
def test_mean_set_sizes_stay_where_sets_can_be(classes: int, empty: bool, data: st.DataObject) -> None:
    smallest = 0 if empty else 1
    sizes = np.array(data.draw(st.lists(st.integers(smallest, classes), max_size=200)), np.int64)
    one = mean_size(sizes, classes, np.random.default_rng(0), smallest=smallest)
    if one.value is None:
        assert (one.low, one.high) == (smallest, classes)
    else:
        assert smallest <= one.low <= one.value <= one.high <= classes


def test_sets_of_one_class_are_one_class_on_average() -> None:
    one = mean_size(np.ones(147, np.int64), 4, np.random.default_rng(0), smallest=1)
    assert (one.value, one.low) == (1, 1)
    assert mean_size(np.ones(147, np.int64), 2, np.random.default_rng(0), smallest=0).low < 1


@given(st.integers(0, 40), st.integers(0, 40), st.floats(1e-4, 0.9999))
def test_promises_held_against_counts_are_shares(errors: int, more: int, limit: float) -> None:
    one = check_claim("risk", errors, errors + more, limit, 2 * (errors + more))
    assert 0 <= one.lower <= one.upper <= 1
    share = share_of(errors, errors + more)
    assert share.value is None or 0 <= share.low <= share.value <= share.high <= 1
