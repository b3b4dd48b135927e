"""Label until it is proven: exact bets, replay to the byte, refusals, and truth under optional stopping."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binom

from stage1_pro.continual.watch.monitor import Evidence, grow
from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.policies.bets import MOST_CAPITAL, Bets, draw_for_labelling, labelling_chances, shuffle_units
from stage1_pro.policies.bounds import errors_allowed
from stage1_pro.policies.sequential import SequentialCertificate, SequentialState

ALPHA = 0.05


def label(proof, rng, n, *, start=0, error=0.02):
    """Ask for ``n`` units of single photos and add their labels; give the units."""
    units = []
    for number in range(start, start + n):
        unit = proof.ask(f"photo {number}", scores=rng.random(), p_hat=float(error * rng.exponential()))
        proof.add(unit, rng.random(int(unit.drawn.sum())) < error)
        units.append(unit)
    return units


def walked(*, floor=0.2, budget=60, n=120):
    rng = np.random.default_rng(3)
    proof = SequentialCertificate([0.8, 0.2, 0.5], alpha=ALPHA, floor=floor, budget=budget, seed=5)
    return proof, rng, label(proof, rng, n)


# -------------------------------------------------------------------------------- arithmetic


def one_bet(bets, p_hat, chance, wrong):
    made = copy.deepcopy(bets)
    row = np.array([[p_hat]])
    made.add(row, np.array([[chance]]), np.array([[wrong]]), np.ones((made.photos.size, 1), dtype=bool))
    return made.capital.sum(axis=1)


@pytest.mark.parametrize(("floor", "chance"), [(1.0, 1.0), (0.1, 0.1), (0.1, 0.45)])
def test_at_alpha_no_bet_gains_on_average_whatever_was_guessed_and_below_it_every_bet_does(floor, chance):
    """Two kinds of photos, whose errors average alpha, by all of their outcomes."""
    bets = Bets.start(1, alpha=ALPHA, delta=0.05, floor=floor)
    rng = np.random.default_rng(0)
    for _ in range(40):
        p_hat = rng.random() * 0.2
        bets.add(np.array([[p_hat]]), np.array([[1.0]]), np.array([[rng.random() < 0.02]]) * 1.0, np.array([[True]]))

    def mean(truth, guesses):
        found = 0.0
        for true, guess in zip(truth, guesses, strict=True):
            right, wrong = one_bet(bets, guess, chance, 0.0), one_bet(bets, guess, chance, 1.0)
            missing = one_bet(bets, guess, chance, np.nan) if chance < 1 else 0.0
            found += ((1 - chance) * missing + chance * ((1 - true) * right + true * wrong))[0] / 2
        return found

    before = bets.capital.sum()
    assert mean((0.0, 2 * ALPHA), (0.3, 0.001)) == pytest.approx(before, rel=1e-12)
    assert mean((0.04, 0.06), (0.04, 0.06)) == pytest.approx(before, rel=1e-12)
    assert mean((0.02, 0.09), (0.02, 0.09)) < before < mean((0.02, 0.06), (0.02, 0.06))


def test_capital_is_the_product_of_its_bets_by_hand_and_controls_are_the_best_ones():
    rng = np.random.default_rng(1)
    bets = Bets.start(1, alpha=ALPHA, delta=0.05, floor=0.2)
    accounts = bets.capital[0].tolist()
    for _ in range(60):
        guess, bet = float(0.2 * rng.random()), float(bets.bets[0])
        chance = float(labelling_chances([guess], 0.2, alpha=ALPHA)[0])
        likely = min(float(bets.scale[0]) * guess, 0.99)

        def loss(control, chance=chance, likely=likely, bet=bet):
            # As small bets see it: those without a draw are linear.
            drawn = (1 - likely) * np.log1p(bet * control / chance) + likely * np.log1p(-bet * (1 - control) / chance)
            return bet * control - chance * drawn

        control = minimize_scalar(loss, bounds=(0, 1), method="bounded", options={"xatol": 1e-10}).x
        drawn, wrong = rng.random() < chance, float(rng.random() < 0.03)
        gain = ALPHA - control - (drawn and (wrong - control) / chance)
        accounts = [one * (1 + stake * bet * gain) for one, stake in zip(accounts, (1.0, 0.5), strict=True)]
        bets.add(
            np.array([[guess]]), np.array([[chance]]), np.array([[wrong if drawn else np.nan]]), np.array([[True]])
        )
        assert bets.capital.sum() == pytest.approx(sum(accounts), rel=1e-4)
        accounts = bets.capital[0].tolist()


def test_a_group_is_one_bet_on_its_sum_and_no_group_can_ruin_it():
    bets = Bets.start(1, alpha=ALPHA, delta=0.05, floor=0.5, largest=4)
    worst = 4 * (1 / 0.5 - ALPHA)
    for _ in range(30):
        before, bet = bets.capital.copy(), bets.bets[0]
        assert 0 < bet * worst < 1
        bets.add(np.zeros((1, 4)), np.full((1, 4), 0.5), np.ones((1, 4)), np.ones((1, 4), dtype=bool))
        assert (bets.capital > 0).all() and (bets.capital < before).all()
    assert bets.wrong[0] == 120 and bets.squares[0] == 30 * 16


def test_the_alarm_of_the_loop_grows_as_it_did():
    """The formula of the monitor before it shared its step, to the bit."""
    rng = np.random.default_rng(2)
    bets = Evidence(alpha=0.05, reference=0.2, floor=0.1).bets
    capital = np.zeros((3, bets.size))
    for n in range(1, 400):
        gain = (np.array([rng.random(3) < (0.01, 0.2, 0.9)]) - 0.05)[0]
        starting = 0.75 * 300 / ((n + 299) * (n + 300)) + (0.25 if n == 1 else 0.0)
        wanted = np.minimum((capital + starting) * (1 + bets * np.expand_dims(gain, -1)), MOST_CAPITAL)
        capital, _ = grow(capital, n, gain, bets)
        assert (capital == wanted).all()
    assert capital.max() == MOST_CAPITAL


# -------------------------------------------------------------------------------- the draw


def test_chances_follow_the_root_of_the_guess_between_floor_and_one():
    chances = labelling_chances([0.0, 0.01, 0.02, 0.9], 0.1, alpha=0.01)
    assert chances == pytest.approx([0.1, 0.1 * math.sqrt(3), 0.1 * math.sqrt(5), 1.0])
    assert (labelling_chances(np.linspace(0, 1, 50), 1.0, alpha=0.01) == 1).all()


def test_the_draw_is_a_hash_that_anybody_can_repeat_with_the_chances_stated():
    photos = [f"{number:05d}.jpg" for number in range(8_000)]
    chances = np.repeat([0.1, 0.6], 4_000)
    drawn = draw_for_labelling(photos, chances, seed=1)
    assert (drawn[::-1] == draw_for_labelling(photos[::-1], chances[::-1], seed=1)).all()
    assert (drawn != draw_for_labelling(photos, chances, seed=2)).any()
    for part, chance in ((drawn[:4_000], 0.1), (drawn[4_000:], 0.6)):
        assert abs(part.mean() - chance) < 4 * math.sqrt(chance * (1 - chance) / 4_000)
    # More chance never takes a photo out of the draw.
    assert (drawn <= draw_for_labelling(photos, chances + 0.1, seed=1)).all()
    order = shuffle_units(photos, seed=1)
    assert order == shuffle_units(photos[::-1], seed=1) != sorted(photos) == sorted(order)


# -------------------------------------------------------------------------------- a certificate


def test_the_same_labels_give_the_same_bytes_at_once_or_after_a_stop(tmp_path):
    proof, _, _ = walked()
    again, rng, _ = walked(n=50)
    again.state.write(tmp_path / "half.json")
    again = SequentialCertificate.resume(SequentialState.read(tmp_path / "half.json"))
    label(again, rng, 70, start=50)
    for name, one in (("all.json", proof), ("again.json", again)):
        one.state.write(tmp_path / name)
    assert (tmp_path / "all.json").read_bytes() == (tmp_path / "again.json").read_bytes()
    assert proof.state.fingerprint() == again.state.fingerprint() != walked(n=119)[0].state.fingerprint()
    (tmp_path / "half.json").write_text((tmp_path / "half.json").read_text().replace('"alpha"', '"beta"'))
    with pytest.raises(ArtifactError, match=r"half.json is not a valid SequentialState"):
        SequentialState.read(tmp_path / "half.json")


def test_thresholds_are_proven_in_their_order_and_the_laxest_of_them_is_given():
    """Of 0.9, 0.3, 0.6 the second is full of errors: the third may not be proven past it, however well it does."""
    proof = SequentialCertificate([0.9, 0.3, 0.6], alpha=ALPHA, floor=1.0)
    rng, seen = np.random.default_rng(0), set()
    for number in range(400):
        score = float(rng.choice([0.4, 0.7, 0.95]))
        unit = proof.ask(str(number), scores=score, p_hat=0.01)
        proof.add(unit, [score < 0.5])
        seen.add((proof.proven, proof.threshold))
    assert seen == {(False, None), (True, 0.9)}
    assert [one.proven_at is not None for one in proof.state.thresholds] == [True, False, True]
    assert proof.progress.tolist() == [1, 0, 1]
    assert "give up" in proof.advice and proof.more is None
    # What exits at a proven threshold alone is labelled no more; what exits at none never was.
    asked = [proof.ask(f"late {score}", scores=score, p_hat=0.5).chances[0] for score in (0.95, 0.4, 0.2, math.nan)]
    assert asked == [1.0, 1.0, 0.0, 0.0]


def test_all_proven_says_stop_and_labels_nobody():
    proof = SequentialCertificate([0.5], alpha=ALPHA, floor=1.0)
    for number in range(100):
        proof.add(unit := proof.ask(str(number), scores=0.7, p_hat=0.01), [0] * int(unit.drawn.sum()))
    assert proof.proven and proof.more == 0 and proof.threshold == 0.5 and proof.capital[0] >= 20
    assert proof.state.labels == proof.state.thresholds[0].proven_at <= 75
    assert proof.advice == "All thresholds are proven: stop."


def test_a_forecast_is_near_the_labels_that_are_taken():
    """Over many proofs, the labels forecast after 15 of them are within a factor of 1.6 of those taken, on average."""
    forecast, taken = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        proof, said = SequentialCertificate([0.0], alpha=0.2, floor=1.0, seed=seed), None
        while not proof.proven:
            unit = proof.ask(str(proof.state.labels), scores=0.5, p_hat=0.06)
            proof.add(unit, [rng.random() < 0.06])
            if proof.state.labels == 15:
                said = proof.more
                assert f"About {said:,} more labels" in proof.advice
        forecast.append(said)
        taken.append(proof.state.labels - 15)
    assert 1 / 1.6 < np.mean(forecast) / np.mean(taken) < 1.6


def test_groups_are_whole_units():
    proof = SequentialCertificate([0.5], alpha=0.1, floor=0.5, largest_unit=3)
    unit = proof.ask("clip", scores=[0.9, 0.1, 0.8], p_hat=[0.9, 0.9, 0.9], photos=["a", "b", "c"])
    assert unit.chances.tolist() == [1.0, 0.0, 1.0] and unit.drawn.tolist() == [True, False, True]
    proof.add(unit, [0, 1])
    state = proof.state
    assert (state.labels, state.wrong, state.photos) == (2, 1, 3)
    assert (state.thresholds[0].photos, state.thresholds[0].squares) == (2, 4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"thresholds": []}, r"thresholds must be finite numbers \[T\], each once"),
        ({"thresholds": [0.5, 0.5]}, "thresholds must be finite"),
        ({"thresholds": [math.nan]}, "thresholds must be finite"),
        ({"alpha": 0}, "alpha must be inside"),
        ({"delta": 1.0}, "delta must be inside"),
        ({"floor": 0.0}, "floor must be in"),
        ({"largest_unit": 0}, "largest_unit must be from 1"),
        ({"budget": 0}, "budget must be from 1"),
        ({"seed": -1}, "seed must be 0 or more"),
    ],
)
def test_it_does_not_begin_with(change, said):
    with pytest.raises(InputError, match=said):
        SequentialCertificate(**{"thresholds": [0.5], "alpha": 0.05, **change})


def test_refusals_change_nothing():
    proof, _, units = walked()
    state = proof.state
    first, second = (proof.ask(name, scores=0.9, p_hat=1.0) for name in ("next", "later"))
    assert first.drawn.all()
    rolled = copy.copy(second)
    object.__setattr__(rolled, "place", first.place)
    object.__setattr__(rolled, "drawn", ~rolled.drawn)
    rare = copy.copy(first)
    object.__setattr__(rare, "chances", np.array([0.01]))
    object.__setattr__(rare, "drawn", draw_for_labelling(rare.photos, rare.chances, seed=5))
    for call, said in (
        (lambda: proof.ask(units[3].name, scores=0.9, p_hat=0.1), "a unit that has not come yet"),
        (lambda: proof.ask("x", scores=[0.9, 0.8], p_hat=[0.1, 0.1], photos=["a", "b"]), "largest_unit must be"),
        (lambda: proof.ask("x", scores=[0.9, 0.8], p_hat=[0.1]), "must be of as many photos"),
        (lambda: proof.ask("x", scores=0.9, p_hat=1.5), r"p_hat must be in \[0, 1\]"),
        (lambda: proof.ask("x", scores=0.9, p_hat=math.nan), r"p_hat must be in \[0, 1\]"),
        (lambda: proof.add(second, [0]), "in the order they were asked for"),
        (lambda: proof.add(units[0], []), "a unit that has not come yet"),
        (lambda: proof.add(rolled, []), "a draw is made once"),
        (lambda: proof.add(rare, []), "a draw is made once"),
        (lambda: proof.add(first, []), "wrong must be 0 or 1 for each of the 1 drawn photos"),
        (lambda: proof.add(first, [0.5]), "wrong must be 0 or 1"),
        (lambda: proof.add(first, [math.nan]), "wrong must be 0 or 1"),
    ):
        with pytest.raises(InputError, match=said):
            call()
    assert proof.state == state
    proof.add(first, [True])
    assert proof.state.labels == state.labels + 1
    torn = state.model_copy(update={"thresholds": (state.thresholds[0].model_copy(update={"roots": (1.0,)}),)})
    with pytest.raises(InputError, match="state must have sums of this version"):
        SequentialCertificate.resume(torn)


# -------------------------------------------------------------------------------- truth under optional stopping


def _law(name, rng, runs, mean):
    """Guesses, truths and sizes of one unit for each run [runs, m], whose errors average ``mean`` of photos."""
    one = (runs, 1)
    if name == "even, no guess":
        return np.zeros(one), np.full(one, mean), np.ones(one, dtype=bool)
    if name == "two values, tied":
        hard = rng.random(one) < 0.1
        return np.where(hard, 0.4, 0.01), np.where(hard, 5 * mean, mean * 5 / 9), np.ones(one, dtype=bool)
    if name == "backwards":
        hard = rng.random(one) < 0.2
        return np.where(hard, 0.001, 0.3), np.where(hard, 5 * mean, 0.0), np.ones(one, dtype=bool)
    if name == "rare and always wrong":
        hard = rng.random(one) < mean
        return np.full(one, 0.02), hard * 1.0, np.ones(one, dtype=bool)
    if name.startswith("guessed well"):
        truth = np.where(rng.random(one) < 0.5, 1.5, 0.5) * mean
        factor = {"guessed well": 1.0, "guessed half": 0.5, "guessed thrice": 3.0}[name]
        return np.minimum(factor * truth * rng.choice([0.7, 1.3], one), 1.0), truth, np.ones(one, dtype=bool)
    size = rng.integers(1, 7, one)
    exits = np.arange(6) < size
    if name == "groups wrong together":
        truth = np.broadcast_to((rng.random(one) < mean) * 1.0, exits.shape)
    elif name == "large groups worse":
        # The sizes 1 to 6 average 3.5, and their squares 91 / 6.
        truth = np.broadcast_to(mean * size * 3.5 * 6 / 91, exits.shape)
    else:
        # Non-monotone: within a group photos that seem surer are worse.
        truth = np.where(np.arange(6) == 0, mean * 3.5, 0.0) * np.ones(exits.shape)
    return np.full(exits.shape, 0.03), truth, exits


LAWS = {
    "even, no guess": 0.2,
    "two values, tied": 0.2,
    "backwards": 0.1,
    "rare and always wrong": 0.3,
    "guessed well": 0.1,
    "guessed half": 0.1,
    "guessed thrice": 0.2,
    "groups wrong together": 0.5,
    "large groups worse": 0.5,
    "the surest are worst": 0.3,
}


def false_proofs(name, *, times, runs, looks, budget, seed=0):
    """Share of runs proven at any of the looks, though the error is ``times`` alpha."""
    rng, floor = np.random.default_rng(seed), LAWS[name]
    largest = 6 if "group" in name or "surest" in name else 1
    bets, proven = (
        Bets.start(runs, alpha=ALPHA, delta=0.05, floor=floor, largest=largest, budget=budget),
        np.zeros(runs, dtype=bool),
    )
    for _ in range(looks):
        guess, truth, exits = _law(name, rng, runs, times * ALPHA)
        root = np.sqrt(1 + bets.spread[:, None] * guess / ALPHA)
        chances = np.minimum(floor * root, 1.0)
        wrong = np.where(rng.random(guess.shape) < chances, (rng.random(guess.shape) < truth) * 1.0, np.nan)
        bets.add(guess, chances, wrong, exits)
        proven |= bets.log_missing <= 0
    return proven.mean()


@pytest.mark.parametrize("name", ["backwards", "groups wrong together"])
def test_a_false_proof_is_rare_however_often_one_looks(name):
    share = false_proofs(name, times=1.0, runs=300, looks=300, budget=60)
    assert share <= binom.ppf(0.999, 300, 0.05) / 300


@pytest.mark.slow
@pytest.mark.parametrize("budget", [None, 150])
@pytest.mark.parametrize("times", [1.0, 1.1])
@pytest.mark.parametrize("name", LAWS)
def test_false_proofs_on_ten_laws(name, times, budget):
    runs = 800
    share = false_proofs(name, times=times, runs=runs, looks=2000, budget=budget)
    print(
        f"{name:24} error {times:g} alpha, budget {budget}: {share:.1%} of {runs} proven falsely at any of 2,000 looks"
    )
    assert share <= binom.ppf(0.999, runs, 0.05) / runs


@pytest.mark.slow
def test_false_proofs_of_thresholds_in_an_order_that_is_not_monotone():
    """Of 0.8, 0.4 and 0.6 the second errs in just alpha: its proof is false, whatever the others do."""
    runs, false, true = 150, 0, 0
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        proof = SequentialCertificate([0.8, 0.4, 0.6], alpha=0.1, floor=0.4, seed=seed, budget=80)
        for number in range(600):
            score = float(rng.random())
            # Exits above 0.8 err in 1%, those above 0.4 in 10%, those above 0.6 in 7.75%.
            chance = 0.01 if score >= 0.8 else 0.145
            unit = proof.ask(str(number), scores=score, p_hat=0.5 * chance)
            proof.add(unit, rng.random(int(unit.drawn.sum())) < chance)
        false += proof.threshold == 0.4
        true += proof.proven
    print(f"false {false / runs:.1%}, something true {true / runs:.1%} of {runs}")
    assert false <= binom.ppf(0.999, runs, 0.05) and true > runs / 2


def test_half_of_alpha_is_proven_with_fewer_labels_than_one_look_takes():
    n = np.arange(1, 3000)
    allowed = errors_allowed(n, 0.2, 0.05)
    one_look = int(n[binom.cdf(allowed, n, 0.1) >= 0.9][0])
    rng, taken = np.random.default_rng(0), np.full(200, np.inf)
    bets = Bets.start(200, alpha=0.2, delta=0.05, floor=0.25)
    for _ in range(300):
        truth = np.where(rng.random((200, 1)) < 0.15, 0.5, 0.03)
        chances = labelling_chances(truth, 0.25, alpha=0.2)
        wrong = np.where(rng.random(truth.shape) < chances, (rng.random(truth.shape) < truth) * 1.0, np.nan)
        bets.add(truth, chances, wrong, np.ones(truth.shape, dtype=bool))
        taken = np.where(np.isinf(taken) & (bets.log_missing <= 0), bets.labels, taken)
    assert np.median(taken) < 0.7 * one_look
