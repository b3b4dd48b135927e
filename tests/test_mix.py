"""Promises for another share of positives than calibration rows have: what is tested is that mix, and no other."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from stage1_pro import cli
from stage1_pro.data.splits import SplitsSummary
from stage1_pro.errors import InputError, NotReachableError
from stage1_pro.policies.bounds import betting_p_value
from stage1_pro.policies.candidates import Mix, Risk
from stage1_pro.policies.certify import certify
from stage1_pro.policies.checks import check_mix
from stage1_pro.policies.gate import GateParams
from stage1_pro.policies.policy import read_policy
from stage1_pro.policies.possible import foresee
from stage1_pro.policies.rows import Rows
from stage1_pro.policies.softmax import Thresholds, confidence
from stage1_pro.policies.standing import standing
from stage1_pro.policies.target import Gate, Softmax

CLASSES = ["none", "roadwork"]
# How far apart classes lie: positives are harder, so that their share decides the error.
MARGINS = np.array([3.0, 2.0])


def drawn(rng: np.random.Generator, n: int, prior: float) -> tuple[Any, Any]:
    labels = (rng.random(n) < prior).astype(np.int64)
    margin = rng.normal(MARGINS[labels], 1.5)
    second = 1 / (1 + np.exp(-np.where(labels == 1, margin, -margin)))
    return np.column_stack([1 - second, second]), labels


def rows_of(rng: np.random.Generator, n: int, prior: float, **more: Any) -> Rows:
    probs, labels = drawn(rng, n, prior)
    gate = 3 * probs.max(axis=1) + rng.normal(size=n)
    return Rows.of(
        probs, labels, classes=CLASSES, positive="roadwork", gate=gate, rows_independent=True, told_apart=True,
        halves=np.where(np.arange(n) < n // 3, "fit", "certify"), **more,
    )  # fmt: skip


def error_at(threshold: float, prior: float, n: int = 200_000) -> float:
    """Of exits in a mix, from many rows of it."""
    probs, labels = drawn(np.random.default_rng(99), n, prior)
    exits = probs.max(axis=1) >= threshold
    return float((probs.argmax(axis=1) != labels)[exits].mean())


@pytest.mark.parametrize("shares", [(0.9, 0.1), (0.2, 0.3, 0.5), (0.0, 0.25, 0.75)])
def test_weights_have_the_mean_of_the_mix_at_every_step_whatever_came_before(shares: tuple[float, ...]) -> None:
    """All orders of six rows: a step's weight by class, over what may come next, is in the ratio of the shares."""
    labels = np.array([0, 0, 1, 1, 1, 2][: 6 if len(shares) == 3 else 5])
    mix = Mix(np.array(shares), labels)
    seen: dict[tuple[int, ...], dict[int, tuple[int, float]]] = {}
    # The order is drawn from the seed alone, so seeds stand in for orders; each is met many times.
    for seed in range(4000):
        rows, weight = mix.visits(seed)
        assert ((weight >= 0) & (weight <= 1 + 1e-12)).all()
        came = tuple(labels[rows].tolist())
        for step, (one, value) in enumerate(zip(came, weight.tolist(), strict=True)):
            cell = seen.setdefault(came[:step], {})
            count, before = cell.get(one, (0, value))
            assert value == pytest.approx(before)
            cell[one] = count + 1, value
    checked = 0
    for before, nexts in seen.items():
        left = np.bincount(labels, minlength=len(shares)) - np.bincount(np.array(before, int), minlength=len(shares))
        if any(label not in nexts for label in np.flatnonzero(left)):
            continue
        chance = {label: Fraction(int(left[label]), int(left.sum())) for label in nexts}
        mean = {label: float(chance[label]) * nexts[label][1] for label in nexts}
        total = sum(mean.values())
        assert {label: one / total for label, one in mean.items()} == pytest.approx(
            {label: shares[label] for label in nexts}
        )
        checked += 1
    assert checked > 5


def test_a_test_of_a_mix_is_the_bet_on_weighted_rows() -> None:
    rng = np.random.default_rng(1)
    labels, scores, errors = rng.integers(0, 2, 300), rng.random(300), rng.random(300) < 0.02
    mix = Mix(np.array([0.9, 0.1]), labels)
    rows, weight = mix.visits(0)
    exits = scores[rows] >= 0.4
    # By the numbers of classes alone: sum of share^2 / count, in the unit of the largest weight there can be.
    counts = np.bincount(labels)
    square = (mix.shares**2 / counts).sum() / 300 / (mix.shares / counts).max() ** 2
    expected = betting_p_value(
        weight * (errors[rows] & exits), 0.1, 0.05, weights=weight * exits, variance=0.1 * 0.9 * square
    )
    found = certify(scores, [Risk("error", 0.1, errors)], delta=0.05, candidates=[0.4], mix=mix, rows_independent=True)
    assert found.p_values == pytest.approx([expected])
    share = [float((scores >= 0.4)[labels == label].mean()) for label in (0, 1)]
    assert found.coverage == pytest.approx(0.9 * share[0] + 0.1 * share[1])
    assert "in the mix of classes that was asked for" in found.guarantee


@pytest.mark.parametrize(("prior", "counts"), [(0.05, (150, 150)), (0.5, (280, 40)), (0.9, (150, 150))])
def test_a_true_error_above_the_limit_passes_as_rarely_as_promised(prior: float, counts: tuple[int, int]) -> None:
    """Error at the very limit of .1 in the mix, all of it in one class or in both."""
    shares, n, runs = np.array([1 - prior, prior]), sum(counts), 1000
    labels = np.repeat([0, 1], counts)
    mix, rng = Mix(shares, labels), np.random.default_rng(7)
    for rates in ((0.1, 0.1), (0.1 / (1 - prior), 0.0), (0.0, min(1.0, 0.1 / prior))):
        if shares @ np.array(rates) < 0.1 - 1e-12:
            continue
        false = 0
        for seed in range(runs):
            rows, weight = mix.visits(seed)
            errors = rng.random(rows.size) < np.array(rates)[labels[rows]]
            false += betting_p_value(weight * errors, 0.1, 0.05, weights=weight, variance=0.09 * mix.square) <= 0.05
        assert false / runs <= 0.05 + 3 * (0.05 * 0.95 / runs) ** 0.5, (rates, n)


@pytest.mark.parametrize("kind", [(Thresholds, Softmax), (GateParams, Gate)])
def test_a_policy_for_another_prior_says_so_and_is_held_to_it(kind: tuple[Any, Any], tmp_path: Path) -> None:
    policy, asks = kind
    target = asks(exit_error=0.04, prior=0.05)
    made = policy.fit(target, rows_of(np.random.default_rng(0), 3000, 0.5))
    as_they_come = policy.fit(asks(exit_error=0.04), rows_of(np.random.default_rng(0), 3000, 0.5))
    assert made.target == target
    # The easy class is nearly all there is.
    assert made.exit_threshold < as_they_come.exit_threshold
    (promise,) = made.promises
    assert promise.prior == 0.05 and "where 'roadwork' has a share of 0.05" in str(promise)
    assert not promise.covers(as_they_come.promises[0]) and not as_they_come.promises[0].covers(promise)
    assert made.mix == pytest.approx({"none": 0.95, "roadwork": 0.05})
    assert "'roadwork' 5.0% (here " in made.statement
    # Nothing is promised of photos in the mix of calibration.
    assert made.says_of_exits(0.04)[0] == "asked for"
    made.write(tmp_path / made.file)
    assert read_policy(tmp_path) == made
    # Held against rows in either mix it says the same, since each class counts by its share.
    for prior in (0.5, 0.1):
        (check,) = made.check(rows_of(np.random.default_rng(5), 20_000, prior)).promises
        assert check.outcome == "PASS" and check.lower <= 0.04
    tightened = made.at(min(1.0, made.exit_threshold + 0.01))
    assert tightened.promises == () and tightened.mix is None and tightened.target.prior is None


def test_its_error_in_the_mix_is_below_the_limit_and_above_it_elsewhere() -> None:
    made = Thresholds.fit(Softmax(exit_error=0.03, prior=0.05), rows_of(np.random.default_rng(2), 6000, 0.5))
    assert error_at(made.exit_threshold, 0.05) <= 0.03 < error_at(made.exit_threshold, 0.5)


def test_a_limit_within_one_class_is_tested_as_without_a_mix() -> None:
    rows = rows_of(np.random.default_rng(3), 2000, 0.5)
    score, kept = confidence(rows.probs), rows.halves == "certify"
    missed, positive = rows.missed("roadwork")[kept], rows.is_class("roadwork")[kept]
    made = Thresholds.fit(Softmax(fnr=0.1, exit_error=0.1, prior=0.05), rows)
    assert [one.prior for one in made.promises] == [0.05, None]
    assert made.certificate is not None
    exits = score[kept] >= made.exit_threshold
    found = {one.name: one for one in made.certificate.risks}["FNR on exits"]
    assert (found.errors, found.trials) == (int((exits & missed).sum()), int((exits & positive).sum()))
    assert found.p_value == pytest.approx(binom.cdf(found.errors, found.trials, 0.1))


def test_what_stands_at_which_prior() -> None:
    made = Thresholds.fit(Softmax(exit_error=0.03, prior=0.05), rows_of(np.random.default_rng(0), 3000, 0.5))
    counts = {"val_calib": {"none": 1000, "roadwork": 1000}}
    splits = SplitsSummary(
        seed=0, fractions={}, hashes={}, classes=CLASSES, positive="roadwork", counts=counts,
        groups={"val_calib": 2000},
    )  # fmt: skip
    assert standing(made, splits, 0.05).stands == ("exit error",)
    for other in (0.5, 0.06):
        found = standing(made, splits, other)
        assert found.void == ("exit error",) and "as was stated" in found.note


def test_the_share_of_any_class_can_be_stated(tmp_path: Path) -> None:
    target = Softmax(exit_error=0.04, prior=0.95, fnr_class="none")
    made = Thresholds.fit(target, rows_of(np.random.default_rng(0), 3000, 0.5))
    same = Thresholds.fit(Softmax(exit_error=0.04, prior=0.05), rows_of(np.random.default_rng(0), 3000, 0.5))
    assert made.exit_threshold == same.exit_threshold
    assert made.target == target and "'none' has a share of 0.95" in str(made.promises[0])
    assert made.at(made.exit_threshold + 0.001).target.fnr_class is None
    both = Softmax(exit_error=0.1, fnr=0.3, fnr_class="none", prior=0.9)
    assert Thresholds.fit(both, rows_of(np.random.default_rng(0), 3000, 0.5)).target == both
    with pytest.raises(InputError, match="fnr or prior"):
        Softmax.of(fnr_class="none")


@pytest.mark.parametrize("asked", [
    {"guarantee": "none"}, {"unit": "photo", "largest_group": 3}, {"prior": 0.0}, {"prior": 1.0}, {"fnr": 0.1},
])  # fmt: skip
def test_what_has_no_other_mix_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="prior"):
        Softmax.of(**{"prior": 0.1, **asked})


def test_a_class_that_no_certifying_row_has_is_refused_and_foreseen() -> None:
    rng = np.random.default_rng(0)
    probs, labels = drawn(rng, 900, 0.5)
    labels[300:] = 0
    rows = Rows.of(
        probs, labels, classes=CLASSES, positive="roadwork", halves=np.repeat(["fit", "certify"], [300, 600]),
        rows_independent=True, told_apart=True,
    )  # fmt: skip
    target = Softmax(exit_error=0.1, prior=0.2)
    (outlook,) = foresee(target, rows)
    assert not outlook.possible and outlook.n == 0
    with pytest.raises(NotReachableError, match="each class"):
        Thresholds.fit(target, rows)


def test_what_is_foreseen_is_what_errors_of_none_certify() -> None:
    rows = rows_of(np.random.default_rng(0), 900, 0.5)
    (outlook,) = foresee(Softmax(exit_error=0.02, prior=0.1), rows)
    assert outlook.best is not None
    perfect = Rows.of(
        np.eye(2)[rows.labels] * 0.8 + 0.1, rows.labels, classes=CLASSES, positive="roadwork", halves=rows.halves,
        rows_independent=True, told_apart=True,
    )  # fmt: skip
    Thresholds.fit(Softmax(exit_error=outlook.best, prior=0.1), perfect)
    with pytest.raises(NotReachableError, match="rows kept for it would do"):
        Thresholds.fit(Softmax(exit_error=outlook.best * 0.98, prior=0.1), perfect)


def test_a_check_without_one_class_knows_nothing() -> None:
    mix = Mix(np.array([0.5, 0.5]), np.zeros(50, dtype=np.int64))
    everyone = np.ones(50, dtype=bool)
    found = check_mix("exit error", ~everyone, everyone, mix, 0.1)
    assert (found.outcome, found.lower, found.upper) == ("INCONCLUSIVE", 0.0, 1.0)


def test_the_command_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(4)
    probs, labels = drawn(rng, 3000, 0.5)
    np.savez(tmp_path / "logits.npz", logits=np.log(probs), labels=labels, classes=CLASSES, positive="roadwork")
    words = ["calibrate", "--logits", str(tmp_path / "logits.npz"), "--rows-independent", "--exit-error", ".03"]
    assert cli.main([*words, "--prior", ".05", "--out", str(tmp_path / "one")]) == 0
    assert "The mix: 'none' 95.0%" in " ".join(capsys.readouterr().out.split())
    made = read_policy(tmp_path / "one")
    assert made is not None and made.promises[0].prior == 0.05
    assert cli.main([*words, "--prior", ".05", "--guarantee", "none"]) == 2


def test_orders_are_all_alike_likely() -> None:
    """What the martingale stands on: each order of rows is as likely as any other."""
    labels = np.array([0, 1, 1, 2])
    mix = Mix(np.array([0.2, 0.3, 0.5]), labels)
    first = np.bincount([int(mix.visits(seed)[0][0]) for seed in range(4000)], minlength=4)
    assert (abs(first - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5).all()
