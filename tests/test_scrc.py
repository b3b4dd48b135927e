"""SCRC against brute force, exact arithmetic, peers and simulation; what it answers where little can be said."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from crepes import ConformalClassifier
from hypothesis import given, settings
from hypothesis import strategies as st
from mapie.classification import SplitConformalClassifier
from scipy import stats
from scipy.special import expit, logit
from sklearn.base import BaseEstimator, ClassifierMixin

from stage1_pro.errors import InputError, NotReachableError
from stage1_pro.policies.scrc import ACCEPT_ALL, SCRC, FittedSCRC


def binary(right: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Probabilities [N, 2] that give the true label the probability ``right``."""
    return np.where(np.arange(2) == labels[:, None], right[:, None], 1 - right[:, None])


class Scenario:
    """Gate 1 - u with u uniform; the logit of the true label's probability is normal, lower where u is larger.

    ``risk`` and ``size`` are exact (quadrature), so simulations have no noise of a test set.
    """

    def __init__(self, top: float = 5.0, slope: float = 5.0, spread: float = 2.0) -> None:
        self.top, self.slope, self.spread = top, slope, spread
        self.nodes, self.weights = np.polynomial.legendre.leggauss(64)

    def draw(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        u, labels = rng.random(n), rng.integers(0, 2, n)
        return binary(expit(self.top - self.slope * u + self.spread * rng.normal(size=n)), labels), 1 - u, labels

    def over(self, coverage: float, low: float, high: float) -> float:
        """P(low < logit of the true label < high | accepted)."""
        mean = self.top - self.slope * coverage * (self.nodes + 1) / 2
        inside = stats.norm.cdf((high - mean) / self.spread) - stats.norm.cdf((low - mean) / self.spread)
        return float(inside @ self.weights) / 2

    def risk(self, fitted: FittedSCRC) -> float:
        limit = fitted.cells[0].limit
        assert limit is not None
        # Missed: less probable than the limit allows, and not the most probable class.
        lowest = float(logit(1 - limit)) if limit < 1 else -math.inf
        return self.over(self.coverage(fitted), -math.inf, lowest if fitted.scrc.allow_empty else min(lowest, 0.0))

    def coverage(self, fitted: FittedSCRC) -> float:
        assert fitted.threshold is not None
        return 1 - max(fitted.threshold, 0.0)


# --------------------------------------------------------------------------------------------
# Closed forms


def slow_scores(row: np.ndarray, score: str, raps: tuple[float, int], allow_empty: bool) -> list[float]:
    found = []
    for p in row:
        mass = 1 - p if score == "lac" else float(np.cumsum(np.sort(row)[::-1])[(row >= p).sum() - 1])
        if score == "raps":
            mass += raps[0] * max(int((row >= p).sum()) - raps[1], 0)
        found.append(0.0 if p == row.max() and not allow_empty else mass)
    return found


def test_the_closed_form_of_scrc_t_is_brute_force() -> None:
    """4,000 random inputs: for each new row a threshold among all n + 1 scores and an infimum over limits."""
    rng, sets_compared, refused = np.random.default_rng(0), 0, 0
    for _ in range(4000):
        n, n_classes = int(rng.integers(2, 30)), int(rng.integers(2, 5))
        xi, alpha = str(rng.choice(["0.3", "0.55", "0.7", "0.9"])), str(rng.choice(["0.07", "0.1", "0.2", "0.5"]))
        score, allow_empty = str(rng.choice(["lac", "aps", "raps"])), bool(rng.integers(2))
        probs, gate = rng.dirichlet(np.ones(n_classes), n), rng.random(n)
        labels = rng.integers(0, n_classes, n)
        new, new_gate = rng.dirichlet(np.ones(n_classes)), rng.random()
        wish = SCRC(float(xi), float(alpha), variant="T", score=score, allow_empty=allow_empty)  # type: ignore[arg-type]
        fitted = wish.calibrate(probs, gate, labels)
        # Brute force: the new row is one of n + 1.
        rank = math.ceil(Fraction(xi) * (n + 1))
        tau = sorted([*gate.tolist(), new_gate], reverse=True)[rank - 1]
        if new_gate < tau:
            assert not fitted.feasible or not fitted.predict_sets([new], [new_gate])[1][0]
            continue
        losses = [slow_scores(probs[i], score, wish.raps, allow_empty)[labels[i]] for i in range(n) if gate[i] >= tau]
        limits = [
            q for q in sorted(losses)
            if Fraction(sum(s > q for s in losses) + 1, len(losses) + 1) <= Fraction(alpha)
        ]  # fmt: skip
        assert fitted.feasible == bool(limits)
        if not limits:
            refused += 1
            continue
        sets, accepted = fitted.predict_sets([new], [new_gate])
        assert accepted[0]
        assert sets[0].tolist() == [s <= limits[0] for s in slow_scores(new, score, wish.raps, allow_empty)]
        sets_compared += 1
    assert sets_compared > 1000
    assert refused > 200


@pytest.mark.parametrize(("m", "expected"), [(349, 0.0087), (99, 0.01), (1000, 0.01), (50, None)])
def test_scrc_i_budgets_are_floors_of_exact_integers(m: int, expected: float | None) -> None:
    """With k losses allowed among m the expected miscoverage of a continuous score is (k + 1) / (m + 1)."""
    budget = SCRC(0.7, 0.01, variant="I")._budget(m, 1)
    if expected is None:
        assert budget == -1, "the published ceil(.51) - 1 = 0 would give 1 / 51 = .0196"
        return
    assert (budget + 1) / (m + 1) <= expected
    assert (budget + 2) / (m + 1) > 0.01, "one more would be too many"
    published = math.ceil(Fraction("0.01") * (m + 1)) - 1
    assert (published + 1) / (m + 1) > 0.01 or budget == published


def test_a_probability_a_hair_above_one_conforms_fully() -> None:
    """A float32 softmax gives 1 + 1e-7; a limit below 0 is none."""
    probs, gate, labels = easy(400)
    rounded = probs / probs.max(axis=1, keepdims=True) * (1 + 1e-7)
    rounded[:, 0], rounded[:, 1] = np.where(labels == 0, 1 + 1e-7, 0), np.where(labels == 1, 1 + 1e-7, 0)
    fitted = SCRC(0.5, 0.3, allow_empty=True).calibrate(rounded, gate, labels)
    assert fitted.feasible and fitted.cells[0].limit == 0
    sets, accepted = fitted.predict_sets(rounded, gate)
    assert (sets[accepted].sum(axis=1) == 1).all()


@pytest.mark.parametrize("n", [100, 500, 2001])
def test_scrc_i_accepts_the_fewest_that_its_bound_allows(n: int) -> None:
    """The share above every threshold at once is seen within sqrt(log(2 / delta) / 2n) (Massart 1990)."""
    accepted = SCRC(0.5, 0.3, variant="I").calibrate(*easy(n)).accepted
    slack = math.sqrt(math.log(2 / 0.01) / (2 * n))
    assert (accepted - 1) / n - slack < 0.5 <= accepted / n - slack


def test_shares_are_taken_by_their_decimal_text() -> None:
    assert math.ceil(100 * 0.55) == 56
    assert SCRC(0.55, 0.1, variant="T")._rank(99) == 55
    assert SCRC(0.55, 0.1, variant="naive")._rank(100) == 55
    assert SCRC(0.7, 0.29, variant="I")._budget(99, 1) == 28, "100 * .29 is 28.999999999999996 in floats"


@pytest.mark.parametrize("n", [20, 500, 2000])
def test_the_selection_rank_is_the_first_whose_beta_law_allows_it(n: int) -> None:
    rank = SCRC(0.7, 0.01)._rank(n)
    assert rank is not None
    assert stats.beta.cdf(0.7, rank, n + 1 - rank) <= 0.01 < stats.beta.cdf(0.7, rank - 1, n + 2 - rank)
    assert SCRC(0.7, 0.01)._rank(12) is None, ".7 to the 12th is above .01"
    assert SCRC(0.7, 0.01)._rank(13) == 13


# --------------------------------------------------------------------------------------------
# The promise


@pytest.mark.slow
@pytest.mark.parametrize("n", [500, 2000, 10_000])
def test_pac_holds_both_promises_and_naive_does_not(n: int) -> None:
    scenario, rng, draws = Scenario(), np.random.default_rng(n), 2000
    wishes = {name: SCRC(0.7, 0.01, variant=name, allow_empty=True) for name in ("pac", "T", "naive")}  # type: ignore[arg-type]
    risky, thin, either = (dict.fromkeys(wishes, 0) for _ in range(3))
    for _ in range(draws):
        rows = scenario.draw(rng, n)
        for name, wish in wishes.items():
            fitted = wish.calibrate(*rows)
            assert fitted.feasible
            too_risky, too_thin = scenario.risk(fitted) > 0.01, scenario.coverage(fitted) < 0.7
            risky[name] += too_risky
            thin[name] += too_thin
            either[name] += too_risky or too_thin
    print(f"n = {n}: risk above alpha {risky}, coverage below xi {thin}, either {either} of {draws}")

    def most(delta: float) -> float:
        return delta + 3 * math.sqrt(delta * (1 - delta) / draws)

    assert risky["pac"] / draws <= most(0.04)
    assert thin["pac"] / draws <= most(0.01)
    assert either["pac"] / draws <= most(0.05)
    assert risky["T"] / draws > 0.25
    assert either["naive"] / draws > 0.5


def test_pac_holds_on_scores_of_one_decimal_and_by_class() -> None:
    """Ties everywhere: gate and probabilities have one decimal. The most probable class alone would break the risk."""
    rng, draws, n = np.random.default_rng(3), 600, 400
    levels = np.arange(1, 10) / 10
    wrong = 0.14 / 0.3 * (1 - levels)  # by gate level: .14 on the five levels that are accepted
    of_wrong = np.array([0.1, 0.2, 0.3, 0.4])  # what the label of a wrong answer gets

    def draw(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        level, labels = rng.integers(0, 9, size), rng.integers(0, 2, size)
        right = np.where(
            rng.random(size) < wrong[level], rng.choice(of_wrong, size), np.round(rng.uniform(0.6, 1, size), 1)
        )
        return binary(right, labels), levels[level], labels

    broken = dict.fromkeys(("pac", "naive"), 0)
    for _ in range(draws):
        rows = draw(n)
        for variant in broken:
            fitted = SCRC(0.5, 0.11, groups="class", variant=variant).calibrate(*rows)  # type: ignore[arg-type]
            assert fitted.threshold is not None
            accepted = levels >= fitted.threshold
            if variant == "pac":
                assert any("tie group" in text for text in fitted.assumptions)
            limits = np.array([cell.limit for cell in fitted.cells], dtype=float)
            missed = [wrong[accepted].mean() * np.mean(1 - of_wrong > limit + 1e-9) for limit in limits]
            broken[variant] += accepted.mean() < 0.5 or max(missed) > 0.11
    noise = 3 * math.sqrt(0.05 * 0.95 / draws)
    assert broken["pac"] / draws <= 0.05 + noise
    assert broken["naive"] / draws > 0.2, "a test that the promise can fail"


@pytest.mark.slow
def test_pac_holds_of_positives_alone() -> None:
    """FNR of accepted sets <= 10% at delta .05, for the very thresholds found; 300 draws of 600 rows."""
    rng, draws = np.random.default_rng(4), 300

    def drawn(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        labels, strength = (rng.random(n) < 0.4).astype(int), rng.normal(size=n) + 1
        p = 1 / (1 + np.exp(-(2 * labels - 1) * strength * 1.5))
        return np.stack([1 - p, p], axis=1), np.abs(p - 0.5) + rng.normal(size=n) * 0.05, labels

    probs, gate, labels = drawn(200_000)
    found, broken = 0, 0
    for _ in range(draws):
        fitted = SCRC(0.6, 0.1, loss="fnr").calibrate(*drawn(600))
        if not fitted.feasible:
            continue
        found += 1
        sets, accepted = fitted.predict_sets(probs, gate)
        chosen = accepted & (labels == 1)
        broken += (~sets[chosen, 1]).mean() > 0.1 or accepted.mean() < 0.6
    print(f"FNR of accepted sets: found {found / draws:.3f}, broken {broken / draws:.3f} +- .013, at most .05")
    assert found > 0.5 * draws
    assert broken / draws <= 0.05 + 3 * (0.05 * 0.95 / draws) ** 0.5


@pytest.mark.parametrize(("n", "xi"), [(90, 0.95), (50, 0.9), (500, 0.7)])
def test_pac_covers_where_a_score_is_an_atom_that_was_drawn_once(n: int, xi: float) -> None:
    """A threshold above an atom loses all of it, though only one calibration row sits there."""
    rng, draws, atom = np.random.default_rng(1), 1500, 1 - xi + 1e-4
    short = 0
    for _ in range(draws):
        gate = np.where(rng.random(n) < atom, 0.0, rng.uniform(0.01, 1, n))
        labels = rng.integers(0, 2, n)
        fitted = SCRC(xi, 0.2).calibrate(binary(np.full(n, 0.95), labels), gate, labels)
        if fitted.threshold is not None:
            above = np.clip((1 - fitted.threshold) / 0.99, 0, 1) * (1 - atom)
            short += (1.0 if fitted.threshold <= 0 else above) < xi
    assert short / draws <= 0.01 + 3 * math.sqrt(0.01 * 0.99 / draws)


def test_one_row_speaks_for_its_group_and_rows_alone_would_lie() -> None:
    """200 clips of 30 near-copies: the row-level limit breaks its promise, the one by group keeps it."""
    rng, draws, clips = np.random.default_rng(5), 300, 400
    groups = np.repeat(np.arange(clips), 30)
    by_group = by_row = 0
    for draw in range(draws):
        right = np.repeat(expit(rng.normal(1.5, 1.5, clips)), 30)  # near-copies: one probability a clip
        labels = np.zeros(right.size, dtype=int)
        rows = binary(right, labels), rng.random(right.size), labels
        wish = SCRC(0.5, 0.05, allow_empty=True)
        limits = [
            wish.calibrate(*rows, groups=groups, seed=draw, rows_independent=stated).cells[0].limit
            for stated in (False, True)
        ]
        truth = stats.norm.cdf((logit(1 - np.array(limits, dtype=float)) - 1.5) / 1.5)
        by_group += truth[0] > 0.05
        by_row += truth[1] > 0.05
    assert by_group / draws <= 0.04 + 3 * math.sqrt(0.04 * 0.96 / draws)
    assert by_row / draws > 0.2


# --------------------------------------------------------------------------------------------
# Accepting the most


def slow_choice(wish: SCRC, rows: tuple[np.ndarray, ...], n: int, threshold: float) -> tuple[float, bool]:
    """The chance that single classes keep the risk of ``n`` units, by SciPy, and whether they say anything."""
    probs, gate, labels = rows
    accepted = gate >= threshold
    wrong = ~(probs == probs.max(axis=1, keepdims=True))[np.arange(labels.size), labels]
    by_class = wish.groups == "class"
    cells = [labels == k for k in range(probs.shape[1])] if by_class else [np.ones(labels.size, dtype=bool)]
    commonest, chance = np.bincount(labels).max() / labels.size, 1.0
    for cell in cells:
        m, k = int((accepted & cell).sum()), int((accepted & cell & wrong).sum())
        trials = m * n // labels.size
        level = wish.delta[1] / len(cells)
        allowed = int((stats.binom.cdf(np.arange(trials), trials, wish.alpha) <= level).sum()) - 1
        if not by_class:
            allowed = min(allowed, math.floor(trials * (1 - commonest) / 2))
        chance *= 0.0 if allowed < 0 else stats.betabinom.cdf(allowed, trials, k + 0.5, m - k + 0.5)
    right = [1 - wrong[accepted & cell].mean() if (accepted & cell).any() else 0.0 for cell in cells]
    return chance, float(np.mean(right)) > (1 / probs.shape[1] if by_class else commonest)


@pytest.mark.parametrize("cells", [None, "class"])
def test_the_threshold_is_the_laxest_at_which_one_class_each_is_likely_enough(cells: str | None) -> None:
    """Brute force over every score, ties and NaN among them; the package looks at 16 quantiles of the error rate."""
    rng, found = np.random.default_rng(11), 0
    for _ in range(40):
        top, slope = float(rng.uniform(5, 10)), float(rng.uniform(0, 9))
        probs, gate, labels = Scenario(top, slope, 1.5).draw(rng, int(rng.integers(60, 200)))
        gate = np.round(gate, int(rng.integers(1, 3)))
        gate[rng.random(gate.size) < 0.05] = np.nan
        wish, n = SCRC(0.5, float(rng.choice([0.05, 0.1, 0.2])), groups=cells), int(rng.integers(60, 500))  # type: ignore[arg-type]
        chosen = wish.choose_threshold(probs, gate, labels, n=n)
        chances = {t: slow_choice(wish, (probs, gate, labels), n, t) for t in np.unique(gate[~np.isnan(gate)])}
        if chosen is not None:
            found += 1
            at = min(t for t in chances if t >= chosen)
            assert chances[at][0] >= 0.88 and chances[at][1]
        laxer = [t for t in chances if chosen is None or t < chosen]
        assert not any(chances[t][0] > 0.92 and chances[t][1] for t in laxer)
    assert 10 < found < 40


def test_one_row_of_a_group_chooses_and_nothing_is_chosen_where_nothing_can() -> None:
    probs, gate, labels = easy(900)
    groups = np.arange(900) // 3
    wish = SCRC(0.7, 0.05)
    chosen = wish.choose_threshold(probs, gate, labels, n=300, groups=groups)
    assert chosen == wish.choose_threshold(probs, gate, labels, n=300, groups=groups) is not None
    assert wish.choose_threshold(probs, np.full(900, np.nan), labels, n=300) is None
    assert wish.choose_threshold(probs, gate, labels, n=10) is None, "ten units certify no risk of 5%"
    assert replace(wish, allow_empty=True).choose_threshold(probs, gate, labels, n=300) is None
    assert wish.choose_threshold(probs, gate, np.where(gate > 0.1, 1 - labels, labels), n=300) is None
    with pytest.raises(InputError, match="n must be"):
        wish.choose_threshold(probs, gate, labels, n=-1)
    with pytest.raises(InputError, match="stage must .*got None"):
        replace(wish, groups="stage").choose_threshold(probs, gate, labels, n=300)


def test_an_answer_that_is_always_the_same_is_not_accepted_for_its_low_risk() -> None:
    """One class in 33 is rare, and a model that errs on 2.9% of all: a risk of 5% could be had without looking."""
    rng, refused = np.random.default_rng(12), dict.fromkeys((False, True), 0)
    for _ in range(40):
        parts = []
        for _ in range(2):
            labels, hard = (rng.random(1500) < 0.03).astype(int), rng.random(1500) < 0.15
            right = np.where(rng.random(1500) < 0.81, 0.9, 0.2)
            probs = binary(np.where(hard, right, rng.uniform(0.95, 1, 1500)), labels)
            parts.append((probs, np.where(hard, 0.2, 0.8) + 0.1 * rng.random(1500), labels))
        wish = SCRC(0.7, 0.05)
        for widened in refused:
            threshold = wish.choose_threshold(*parts[0], n=1500) if widened else None
            refused[widened] += bool(wish.calibrate(*parts[1], threshold=threshold).useless)
    assert refused[True] <= refused[False] + 2


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_whatever_threshold_is_given_never_less_is_accepted_or_certified(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs, gate, labels = Scenario(6.0, 5.0, 1.5).draw(rng, int(rng.integers(20, 300)))
    gate = np.round(gate, int(rng.integers(1, 4)))
    gate[rng.random(gate.size) < 0.05] = np.nan
    cells = rng.choice([None, "class"])
    for variant in ("pac", "I", "T", "naive"):
        wish = SCRC(0.5, 0.2, variant=variant, groups=cells)  # type: ignore[arg-type]
        least = wish.calibrate(probs, gate, labels)
        most = wish.calibrate(probs, gate, labels, threshold=float(rng.uniform(-0.1, 1.1)))
        assert most.feasible >= least.feasible
        if not least.feasible:
            continue
        assert most.accepted >= least.accepted
        assert (most.coverage_bound or 0) >= (least.coverage_bound or 0)
        sets, accepted = most.predict_sets(probs, gate)
        assert accepted.sum() == most.accepted
        # Of T the row at the threshold of the floor is accepted and calibrates nothing.
        missed = accepted & ~sets[np.arange(labels.size), labels]
        assert missed.sum() <= sum(cell.budget for cell in most.cells) + (variant == "T")
        if variant == "pac" and most.accepted == least.accepted:
            assert most.limits.tolist() == least.limits.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("hopeful", [1.0, 0.3])
def test_the_promise_holds_and_more_is_accepted(hopeful: float, capsys: pytest.CaptureFixture[str]) -> None:
    """Risk <= 1%, at least 70% accepted, 88% could be. ``hopeful``: share of errors that the rows which choose show."""
    scenario, draws, n = Scenario(9.0, 8.0, 1.5), 1000, 1500
    risky, thin, said = 0, 0, []
    shares = {"most": np.zeros(draws), "least": np.zeros(draws)}
    average = {"I": np.zeros((draws, 2)), "T": np.zeros((draws, 2))}
    for draw in range(draws):
        rng = np.random.default_rng([draw, n])
        probs, gate, labels = scenario.draw(rng, 1000)
        wrong = probs[np.arange(1000), labels] < 0.5
        kept = ~wrong | (rng.random(1000) < hopeful)
        rows = scenario.draw(rng, n)
        for variant in ("pac", "I", "T"):
            wish = SCRC(0.7, 0.01, variant=variant)  # type: ignore[arg-type]
            most = wish.calibrate(*rows, threshold=wish.choose_threshold(probs[kept], gate[kept], labels[kept], n=n))
            assert most.feasible
            if variant != "pac":
                average[variant][draw] = scenario.risk(most), scenario.coverage(most)
                continue
            risky += scenario.risk(most) > 0.01
            thin += scenario.coverage(most) < 0.7
            shares["most"][draw] = scenario.coverage(most)
            shares["least"][draw] = scenario.coverage(wish.calibrate(*rows))
    for variant, found in average.items():
        error = 3 * found.std(axis=0) / math.sqrt(draws)
        said.append(f"{variant}: risk {found[:, 0].mean():.4f}, accepted {found[:, 1].mean():.3f}")
        assert found[:, 0].mean() <= 0.01 + error[0] and found[:, 1].mean() >= 0.7 - error[1]
    with capsys.disabled():
        print(
            f"\nerrors x {hopeful}: risk above alpha {risky / draws:.3f} (at most .04), thin {thin / draws:.3f} (.01), "
            f"accepted {shares['most'].mean():.3f}, at the floor {shares['least'].mean():.3f}; {'; '.join(said)}"
        )
    assert risky / draws <= 0.04 + 3 * math.sqrt(0.04 * 0.96 / draws)
    assert thin / draws <= 0.01 + 3 * math.sqrt(0.01 * 0.99 / draws)
    assert shares["most"].mean() > shares["least"].mean() + 0.03


@pytest.mark.parametrize("place", [0.35, 0.5, 0.55])
def test_the_promise_holds_at_any_threshold_of_other_rows(place: float) -> None:
    """Ten levels of gate scores, risk at the very limit among those that are let in; near the floor and beyond it."""
    rng, draws, n = np.random.default_rng(int(100 * place)), 800, 300
    levels = np.arange(1, 11) / 10
    wrong = 0.1 + 0.001 * (levels < 0.6) + 0.02 * (levels == 0.6)  # not monotone
    broken = 0
    for _ in range(draws):
        level, labels = rng.integers(0, 10, n), rng.integers(0, 2, n)
        right = np.where(rng.random(n) < wrong[level], rng.uniform(0.1, 0.4, n), 0.9)
        fitted = SCRC(0.5, 0.1).calibrate(binary(right, labels), levels[level], labels, threshold=place)
        assert fitted.threshold is not None and fitted.cells[0].limit is not None
        accepted = levels >= fitted.threshold
        missed = wrong[accepted].mean() * np.clip((1 - fitted.cells[0].limit - 0.1) / 0.3, 0, 1)
        broken += missed > 0.1 or accepted.mean() < 0.5
    assert broken / draws <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)


# --------------------------------------------------------------------------------------------
# Peers


class Given(ClassifierMixin, BaseEstimator):
    """A model whose input is its output, for MAPIE."""

    def __init__(self, n_classes: int = 2) -> None:
        self.n_classes, self.classes_ = n_classes, np.arange(n_classes)

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def fit(self, X: np.ndarray, y: np.ndarray) -> Given:
        return self

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        return np.asarray(X)

    def predict(self, X: np.ndarray) -> np.ndarray:
        return np.asarray(X).argmax(axis=1)


def mapie_sets(probs: np.ndarray, labels: np.ndarray, new: np.ndarray, alpha: float) -> np.ndarray:
    judge = SplitConformalClassifier(Given(probs.shape[1]), confidence_level=1 - alpha, prefit=True)
    return judge.conformalize(probs, labels).predict_set(new)[1][:, :, 0]


def drawn(rng: np.random.Generator, n: int, n_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    probs = rng.dirichlet(np.ones(n_classes), n)
    labels = (rng.random(n)[:, None] > np.cumsum(probs, axis=1)).sum(axis=1).clip(max=n_classes - 1)
    labels[:n_classes] = np.arange(n_classes)
    return probs, labels, rng.dirichlet(np.ones(n_classes), 50)


def everything(alpha: float, **changes: object) -> SCRC:
    """SCRC-T that accepts every row is split conformal prediction."""
    return SCRC(0.9999, alpha, variant="T", allow_empty=True, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("n_classes", [2, 5])
def test_sets_are_those_of_mapie(n_classes: int) -> None:
    """LAC; its APS and RAPS calibrate on randomised scores, so those are held against crepes."""
    rng = np.random.default_rng(n_classes)
    for _ in range(25):
        probs, labels, new = drawn(rng, int(rng.integers(80, 400)), n_classes)
        alpha = float(rng.choice([0.05, 0.1, 0.13]))
        fitted = everything(alpha).calibrate(probs, rng.random(len(probs)), labels)
        assert fitted.threshold == ACCEPT_ALL
        sets, accepted = fitted.predict_sets(new, np.zeros(50))
        assert accepted.all()
        np.testing.assert_array_equal(sets, mapie_sets(probs, labels, new, alpha))


@pytest.mark.parametrize("score", ["lac", "aps", "raps"])
@pytest.mark.parametrize("by_class", [False, True])
def test_sets_are_those_of_crepes(by_class: bool, score: str) -> None:
    rng = np.random.default_rng(7)
    for _ in range(25):
        probs, labels, new = drawn(rng, int(rng.integers(150, 400)), 3)
        alpha = float(rng.choice([0.051, 0.107]))  # never a whole share of n + 1
        fitted = everything(alpha, groups="class" if by_class else None, score=score).calibrate(
            probs, rng.random(len(probs)), labels
        )
        wrong, n_new = np.array([slow_scores(row, score, (0.01, 2), True) for row in new]), len(new)
        losses = np.array(
            [slow_scores(row, score, (0.01, 2), True)[k] for row, k in zip(probs, labels.tolist(), strict=True)]
        )
        judge = ConformalClassifier().fit(losses, bins=labels if by_class else None)
        columns = [
            judge.predict_set(
                wrong[:, [k]], bins=np.full(n_new, k) if by_class else None, confidence=1 - alpha, smoothing=False
            )[:, 0]
            for k in range(3)
        ]
        np.testing.assert_array_equal(fitted.predict_sets(new, np.zeros(n_new))[0], np.stack(columns, 1).astype(bool))


@pytest.mark.filterwarnings("ignore:WARNING. your conformalization dataset has less labels")
def test_class_wise_sets_are_those_of_mapie_on_each_class() -> None:
    """MAPIE has no class-wise sets: it is fitted on the rows of one class, and asked about that class alone."""
    rng = np.random.default_rng(8)
    for _ in range(10):
        probs, labels, new = drawn(rng, 400, 3)
        sets, _ = everything(0.1, groups="class").calibrate(probs, rng.random(400), labels).predict_sets(new, [0] * 50)
        for k in range(3):
            theirs = mapie_sets(probs[labels == k], labels[labels == k], new, 0.1)
            np.testing.assert_array_equal(sets[:, k], theirs[:, k])


def test_crepes_keeps_a_label_of_p_value_alpha_exactly() -> None:
    """At 99 rows and alpha = 1/10 it includes one rank more than needed: wider, not wrong."""
    losses = np.arange(1, 100) / 100
    probs = binary(1 - losses, np.zeros(99, dtype=int))
    fitted = everything(0.1).calibrate(probs, np.arange(99.0), np.zeros(99, dtype=int))
    assert fitted.cells[0].limit == losses[89], "9 of 99 lie above: (9 + 1) / 100 = alpha"
    new = np.array([[0.905], [0.895]])
    theirs = ConformalClassifier().fit(losses).predict_set(new, confidence=0.9, smoothing=False)[:, 0]
    assert (new[:, 0] <= fitted.cells[0].limit).tolist() == [False, True]
    assert theirs.tolist() == [1, 1]


# --------------------------------------------------------------------------------------------
# Stated answers


def easy(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return Scenario(top=8.0, slope=2.0, spread=1.0).draw(np.random.default_rng(seed), n)


def test_too_few_rows_are_infeasible_with_what_would_do() -> None:
    rows = easy(300)
    fitted = SCRC(0.7, 0.01).calibrate(*rows)
    assert not fitted.feasible
    assert fitted.guarantee == "none: infeasible"
    assert "where even no loss at all needs 321" in fitted.reason
    assert fitted.n_needed is not None
    assert SCRC(0.7, 0.01).calibrate(*easy(fitted.n_needed)).feasible
    assert not SCRC(0.7, 0.01).calibrate(*easy(fitted.n_needed - 1)).feasible
    least = fitted.min_certifiable_alpha
    assert least is not None
    assert SCRC(0.7, least + 1e-9).calibrate(*rows).feasible
    assert not SCRC(0.7, least - 1e-9).calibrate(*rows).feasible
    for attempt in (lambda: fitted.predict_sets(*rows[:2]), lambda: fitted.verify(*rows)):
        with pytest.raises(NotReachableError, match="INFEASIBLE: risk 0.01 .* smallest risk .* rows would do"):
            attempt()
    tiny = SCRC(0.7, 0.3).calibrate(*easy(12))
    assert "too few of 12 rows have a gate score to accept a share of 0.7 (delta 0.01)" in tiny.reason
    for variant in ("pac", "I", "T", "naive"):
        none = SCRC(0.7, 0.3, variant=variant).calibrate(np.empty((0, 2)), [], np.empty(0, dtype=int))  # type: ignore[arg-type]
        assert (none.feasible, none.n, none.coverage) == (False, 0, 0.0)


@pytest.mark.parametrize("variant", ["pac", "I", "T", "naive"])
def test_nan_is_never_accepted_and_all_nan_is_infeasible(variant: str) -> None:
    probs, gate, labels = easy(2000)
    gate[::5] = np.nan
    probs[1::5] = np.nan
    wish = SCRC(0.5, 0.05, variant=variant)  # type: ignore[arg-type]
    fitted = wish.calibrate(probs, gate, labels)
    assert fitted.feasible
    assert fitted.accepted <= 1200
    sets, accepted = fitted.predict_sets(probs, gate)
    assert accepted.sum() == fitted.accepted
    assert not sets[~accepted].any()
    assert not accepted[::5].any()
    assert not accepted[1::5].any()
    assert sets[accepted].any(axis=1).all()
    blind = replace(wish, xi=0.7).calibrate(probs, gate, labels)
    assert not blind.feasible
    assert "have a gate score" in blind.reason
    assert not wish.calibrate(probs, np.full(2000, np.nan), labels).feasible


def test_a_tie_group_is_accepted_whole() -> None:
    probs, gate, labels = easy(2000)
    for decimals in (0, 1):
        tied = np.round(gate, decimals)
        for variant in ("pac", "I", "T", "naive"):
            fitted = SCRC(0.7, 0.05, variant=variant).calibrate(probs, tied, labels)  # type: ignore[arg-type]
            assert fitted.threshold is not None
            _, accepted = fitted.predict_sets(probs, tied)
            assert accepted.sum() == fitted.accepted >= 1400
            assert all(accepted[tied == value].all() or not accepted[tied == value].any() for value in np.unique(tied))
    one = SCRC(0.7, 0.05).calibrate(probs, np.full(2000, 0.5), labels)
    assert (one.threshold, one.accepted) == (ACCEPT_ALL, 2000)


def test_tied_probabilities_are_in_the_set_together() -> None:
    probs, gate, labels = easy(2000)
    fitted = SCRC(0.7, 0.05).calibrate(np.round(probs, 1), gate, labels)
    sets, _ = fitted.predict_sets([[0.5, 0.5], [0.9, 0.1]], [1.0, 1.0])
    assert sets.tolist() == [[True, True], [True, False]]
    for score in ("aps", "raps"):
        three = SCRC(0.7, 0.3, score=score).calibrate(  # type: ignore[arg-type]
            np.random.default_rng(0).dirichlet(np.ones(3), 500), np.arange(500.0), np.arange(500) % 3
        )
        sets, _ = three.predict_sets([[0.2, 0.4, 0.4], [0.4, 0.2, 0.4]], [1e3, 1e3])
        assert sets[0, 1] == sets[0, 2]
        assert sets[1, 0] == sets[1, 2]


def test_a_class_absent_among_exits_is_infeasible() -> None:
    probs, gate, labels = easy(2000)
    gate = np.where(labels == 1, gate - 2, gate)  # the gate rejects class 1
    wish = SCRC(0.3, 0.05, groups="class")
    fitted = wish.calibrate(probs, gate, labels)
    assert not fitted.feasible
    assert "0 accepted rows of class 1, where even no loss at all needs" in fitted.reason
    assert (fitted.n_needed, fitted.min_certifiable_alpha) == (None, None)
    positive = SCRC(0.3, 0.05, loss="fnr").calibrate(probs, gate, labels)
    assert "0 accepted positives" in positive.reason
    assert replace(wish, groups=None).calibrate(probs, gate, labels).feasible


def test_all_rows_rejected_settles_the_coverage_and_nothing_else() -> None:
    fitted = SCRC(0.7, 0.05).calibrate(*easy(2000))
    probs, _, labels = easy(500, seed=1)
    found = fitted.verify(probs, np.full(500, -1.0), labels)
    assert [claim.outcome for claim in found.promises] == ["FAIL", "INCONCLUSIVE"]
    assert found.outcome == "FAIL"
    assert (found.accepted, found.rejection_rate.value) == (0, 1.0)
    assert found.average_set_size.value is None
    assert (found.ambiguous_rate.low, found.ambiguous_rate.high) == (0.0, 1.0)
    assert found.promises[1].n_to_settle is None


def test_cells_share_delta_and_have_their_own_limits() -> None:
    rng = np.random.default_rng(4)
    probs, gate, labels = Scenario().draw(rng, 8000)
    stage = np.where(rng.random(8000) < 0.6, "a", "b")
    probs[stage == "b"] = binary(np.full((stage == "b").sum(), 0.9), labels[stage == "b"])
    fitted = SCRC(0.7, 0.02, groups="stage").calibrate(probs, gate, labels, stage)
    assert [cell.name for cell in fitted.cells] == ["a", "b"]
    assert [cell.delta for cell in fitted.cells] == [0.02, 0.02]
    assert "in each of the 2 cells by stage together" in fitted.guarantee
    a, b = fitted.cells
    assert a.limit is not None
    assert b.limit is not None
    assert a.limit > b.limit == 0.0
    assert a.bound <= 0.02
    sets, _ = fitted.predict_sets([[0.3, 0.7]] * 2, [1.0, 1.0], ["a", "b"])
    assert sets.tolist() == [[a.limit >= 0.7, True], [False, True]]
    found = fitted.verify(probs, gate, labels, stage)
    assert [claim.name for claim in found.promises] == ["rejection rate", "risk of stage a", "risk of stage b"]
    with pytest.raises(InputError, match="stage must .*got 'c' in row 0"):
        fitted.predict_sets([[0.3, 0.7]], [1.0], ["c"])
    with pytest.raises(InputError, match="stage must .*got None"):
        fitted.predict_sets([[0.3, 0.7]], [1.0])
    # Positives alone: the other class is not what is promised.
    positives = SCRC(0.7, 0.02, loss="fnr").calibrate(probs, gate, labels)
    _, accepted = positives.predict_sets(probs, gate)
    assert positives.cells[0].trials == (accepted & (labels == 1)).sum()
    by_stage = SCRC(0.7, 0.02, loss="fnr", groups="stage").calibrate(probs, gate, labels, stage)
    _, accepted = by_stage.predict_sets(probs, gate, stage)
    of = [int((accepted & (labels == 1) & (stage == name)).sum()) for name in "ab"]
    assert [cell.trials for cell in by_stage.cells] == of
    assert [claim.trials for claim in by_stage.verify(probs, gate, labels, stage).promises[1:]] == of


def test_verification_has_three_outcomes() -> None:
    scenario = Scenario()
    fitted = SCRC(0.7, 0.02).calibrate(*scenario.draw(np.random.default_rng(1), 1000))
    few = fitted.verify(*scenario.draw(np.random.default_rng(2), 300))
    risk = few.promises[1]
    assert (risk.outcome, few.outcome) == ("INCONCLUSIVE", "INCONCLUSIVE")
    assert risk.n_to_settle is not None
    many = fitted.verify(*scenario.draw(np.random.default_rng(3), 20_000))
    assert many.outcome == "PASS"
    assert many.promises[1].upper <= 0.02
    probs, gate, labels = scenario.draw(np.random.default_rng(4), 3000)
    wrong = fitted.verify(probs, gate, np.where(np.arange(3000) % 10 == 0, 1 - labels, labels))
    assert wrong.promises[1].outcome == "FAIL"
    assert wrong.promises[1].lower > 0.02
    # Binary mean set size is 1 + the share of two.
    sets, accepted = fitted.predict_sets(probs, gate)
    assert wrong.average_set_size.value == pytest.approx(sets[accepted].sum(axis=1).mean())
    assert wrong.average_set_size.low == 1 + wrong.ambiguous_rate.low
    judge = stats.binomtest(int((~accepted).sum()), 3000).proportion_ci(0.95, "exact")
    assert (wrong.rejection_rate.low, wrong.rejection_rate.high) == pytest.approx((judge.low, judge.high))
    # Settled: with that many rows at the rates seen the outcome is another.
    scale = risk.n_to_settle / few.n
    upper = stats.beta.ppf(0.95, math.ceil(risk.errors * scale) + 1, risk.trials * scale - risk.errors * scale)
    assert risk.errors / risk.trials > 0.02 or upper <= 0.0202
    with pytest.raises(InputError, match="labels must be class indices 0 to 1"):
        fitted.verify(probs, gate, labels + 1)


def test_groups_are_the_unit_of_calibration_and_verification() -> None:
    probs, gate, labels = easy(3000)
    groups = np.arange(3000) // 3
    fitted = SCRC(0.7, 0.05).calibrate(probs, gate, labels, groups=groups)
    assert (fitted.n, fitted.unit) == (1000, "groups")
    assert "one image drawn from a new group" in fitted.guarantee
    assert fitted == SCRC(0.7, 0.05).calibrate(probs, gate, labels, groups=groups)
    assert fitted != SCRC(0.7, 0.05).calibrate(probs, gate, labels, groups=groups, seed=1)
    stated = SCRC(0.7, 0.05).calibrate(probs, gate, labels, groups=groups, rows_independent=True)
    assert (stated.n, stated.unit) == (3000, "rows")
    assert (fitted.verify(probs, gate, labels, groups=groups).n, fitted.verify(probs, gate, labels).n) == (1000, 3000)


def test_words_say_what_is_promised() -> None:
    rows = easy(3000)
    said = {v: SCRC(0.7, 0.05, variant=v).calibrate(*rows).guarantee for v in ("pac", "I", "T", "naive")}  # type: ignore[arg-type]
    assert said["pac"].startswith("With probability at least 95% over the draw of the 3000 calibration rows, of a new")
    assert said["I"].startswith("With probability at least 99%")
    assert "(an expectation" in said["I"]
    assert "(an expectation" in said["T"]
    assert said["naive"].startswith("none: ")


def test_sets_may_be_empty_only_when_asked() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 3000)
    probs = np.full((3000, 3), 0.02)
    probs[np.arange(3000), labels] = 0.96
    for allow_empty in (True, False):
        fitted = SCRC(0.7, 0.05, allow_empty=allow_empty).calibrate(probs, rng.random(3000), labels)
        sets, _ = fitted.predict_sets([[0.5, 0.3, 0.2]], [2.0])
        assert sets[0].tolist() == [not allow_empty, False, False]
    found = SCRC(0.7, 0.05, allow_empty=True).calibrate(probs, rng.random(3000), labels)
    probs[:300] = [0.5, 0.3, 0.2]
    seen = found.verify(probs, np.full(3000, 2.0), labels)
    assert seen.empty_rate.value == 0.1
    assert seen.average_set_size.value == pytest.approx(0.9)
    assert 0.8 < seen.average_set_size.low < 0.9 < seen.average_set_size.high < 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"xi": 1.0}, r"xi must be inside \(0, 1\), got 1.0"),
        ({"alpha": 0.0}, r"alpha must be inside \(0, 1\), got 0.0"),
        ({"delta": (0.5, 0.6)}, r"delta must be inside \(0, 1\), got 1.1"),
        ({"delta": (0.05,)}, "delta must be two shares"),
        ({"variant": "pak"}, "variant must be one of pac, I, T, naive, got 'pak'; did you mean 'pac'"),
        ({"loss": "fpr"}, "loss must be one of miscoverage, fnr, got 'fpr'"),
        ({"score": "abs"}, "score must be one of lac, aps, raps, got 'abs'"),
        ({"groups": "clip"}, "groups must be None, 'stage' or 'class', got 'clip'"),
        ({"groups": "class", "loss": "fnr"}, "groups must not be 'class' with loss fnr"),
        ({"raps": (-1.0, 2)}, "raps must be a penalty and a rank"),
    ],
)
def test_wrong_wishes_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SCRC(**{"xi": 0.7, "alpha": 0.05, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probs": [0.1, 0.9]}, r"probs must have shape \[N, K >= 2\], got \[2\]"),
        ({"probs": [[0.5, 0.9], [0.5, 0.5]]}, "probs must be probabilities whose rows sum to 1, got others in row 0"),
        ({"gate": [0.5]}, r"gate must have shape \[2\] as probs has rows, got \[1\]"),
        ({"labels": [0]}, r"labels must have shape \[2\] as probs has rows, got \[1\]"),
        ({"labels": [0, 2]}, "labels must be class indices 0 to 1, got 2"),
        ({"labels": [0.5, 1]}, "labels must be class indices 0 to 1, got 0.5"),
        ({"stage": ["a"]}, r"stage must have shape \[2\] as probs has rows, got \[1\]"),
        ({"groups": ["a"]}, r"groups must have shape \[2\] as scores, got \[1\]"),
    ],
)
def test_wrong_rows_are_named(change: dict[str, object], message: str) -> None:
    arguments = {"probs": [[0.5, 0.5], [0.2, 0.8]], "gate": [0.1, 0.2], "labels": [0, 1], **change}
    with pytest.raises(InputError, match=message):
        SCRC(0.7, 0.05).calibrate(**arguments)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="positive must .*0.*2.*got None"):
        SCRC(0.7, 0.05, loss="fnr").calibrate(np.full((2, 3), 1 / 3), [0.1, 0.2], [0, 1])


def test_no_torch_is_needed() -> None:
    code = "import sys, stage1_pro.policies.scrc; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_row_order_and_the_scale_of_the_gate_change_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(30, 200))
    probs, labels = np.round(rng.dirichlet(np.ones(3), n), 2), rng.integers(0, 3, n)
    probs[:, 2] = 1 - probs[:, :2].sum(axis=1)
    probs = np.abs(probs)
    gate = np.round(rng.random(n), int(rng.integers(1, 4)))
    wish = SCRC(0.4, 0.4, variant=str(rng.choice(["pac", "I", "T", "naive"])), score=str(rng.choice(["lac", "aps"])))  # type: ignore[arg-type]
    fitted, order = wish.calibrate(probs, gate, labels), rng.permutation(n)
    assert wish.calibrate(probs[order], gate[order], labels[order]) == fitted
    scaled = wish.calibrate(probs, 3 * gate - 1, labels)
    assert scaled.feasible == fitted.feasible
    if fitted.feasible:
        for one, other in zip(fitted.predict_sets(probs, gate), scaled.predict_sets(probs, 3 * gate - 1), strict=True):
            np.testing.assert_array_equal(one, other)
