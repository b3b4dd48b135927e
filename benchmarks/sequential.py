"""Labels until an exit error is proven: one look at a planned number, looks after each label, and which to label.

    python benchmarks/sequential.py --runs 400 --wrong-guesses
    python benchmarks/sequential.py --runs 4000 --false-proofs [--seed 1]

Errors of a photo are logistic-normal with a spread sd; guessed errors are the true chances, or wrong on purpose.
With ``--false-proofs``: how often an error of alpha itself is proven to be below it at any of 2,000 looks, on the ten
laws of the tests.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit, ndtri

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import test_sequential

from stage1_pro.policies.bets import Bets
from stage1_pro.policies.bounds import binomial_cdf, errors_allowed

FLOOR = 0.1
LAWS = [(error, spread) for error in (0.005, 0.002) for spread in (1.5, 2.0, 2.5)]
GUESSES = {"as good as can be": (1.0, 0.0), "half": (0.5, 0.0), "twice": (2.0, 0.0), "noise of one logit": (1.0, 1.0)}


def law(error: float, spread: float, n: int = 4096) -> NDArray[np.float64]:
    """Chances of ``n`` photos to be wrong, logistic-normal with this mean."""
    normal = spread * ndtri((np.arange(n) + 0.5) / n)
    return expit(brentq(lambda centre: expit(centre + normal).mean() - error, -20.0, 5.0) + normal)


def one_look(error: float, alpha: float, delta: float, power: float = 0.9) -> int:
    """The fewest labels with which one exact test has the power."""
    n = np.arange(1, 20_000)
    allowed = errors_allowed(n, alpha, delta)
    passes = np.where(allowed >= 0, binomial_cdf(np.maximum(allowed, 0).astype(float), n.astype(float), error), 0.0)
    return int(n[np.argmax(passes >= power)])


def keep_bets(bets: Bets, kept: NDArray[np.bool_]) -> Bets:
    """The same processes without those that are done."""
    arrays = {one.name: getattr(bets, one.name) for one in fields(bets)}
    return replace(bets, **{name: value[kept] for name, value in arrays.items() if isinstance(value, np.ndarray)})


def labels_taken(
    chances_wrong: NDArray[np.float64], *, alpha: float, delta: float, runs: int, seed: int, floor: float = FLOOR,
    budget: float | None = None, guess: tuple[float, float] = (1.0, 0.0), most: int = 60_000,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:  # fmt: skip
    """Labels and photos until each run is proven [runs]; inf where ``most`` photos were not enough."""
    rng = np.random.default_rng(seed)
    bets = Bets.start(runs, alpha=alpha, delta=delta, floor=floor, budget=budget)
    labels, photos, running = np.full(runs, np.inf), np.full(runs, np.inf), np.arange(runs)
    factor, noise = guess
    for photo in range(1, most + 1):
        p = chances_wrong[rng.integers(0, chances_wrong.size, running.size)]
        noisy = logit(p) + math.log(factor) + noise * rng.normal(size=p.size)
        guessed = p if guess == (1.0, 0.0) else expit(noisy)
        spread = bets.spread
        chance = np.minimum(floor * np.sqrt(1 + spread * guessed / alpha), 1.0)
        wrong = np.where(rng.random(p.size) < chance, rng.random(p.size) < p, np.nan)
        bets.add(guessed[:, None], chance[:, None], wrong[:, None], np.ones((p.size, 1), dtype=bool))
        done = bets.log_missing <= 0
        if done.any():
            labels[running[done]], photos[running[done]] = bets.labels[done], photo
            bets, running = keep_bets(bets, ~done), running[~done]
            if running.size < runs / 20:
                break
    return labels, photos


def constant_bet(
    truth: NDArray[np.float64], *, alpha: float, delta: float, runs: int, seed: int, active: bool
) -> NDArray[np.float64]:
    """Labels until one constant bet proves it [runs]: of every photo, or of those drawn by the root; no control.

    The bet is the one by which the log of the capital grows fastest, which only who knows the truth can choose.
    """
    rng, chances = np.random.default_rng(seed), np.ones(truth.size)
    if active:
        chances = np.clip(FLOOR * np.sqrt(2 * truth / alpha), FLOOR, 1.0)
    tried = np.linspace(0.02, 0.98, 97) / (1 / chances.min() - alpha)
    growth = [np.log1p(bet * alpha) + _lost(truth, chances, bet, alpha) for bet in tried]
    bet = tried[int(np.argmax(growth))]
    taken = np.full(runs, np.inf)
    for run in range(runs):
        at = rng.integers(0, truth.size, 12_000 if chances.min() == 1 else 60_000)
        drawn = rng.random(at.size) < chances[at]
        wrong = drawn & (rng.random(at.size) < truth[at])
        reached = np.cumsum(np.log1p(bet * (alpha - wrong / chances[at]))) >= -math.log(delta)
        if reached.any():
            taken[run] = drawn[: int(reached.argmax()) + 1].sum()
    return taken


def _lost(truth: NDArray[np.float64], chances: NDArray[np.float64], bet: float, alpha: float) -> float:
    """What wrong answers take from the log of the capital, for a photo."""
    wrong = np.log1p(bet * (alpha - 1 / chances)) - np.log1p(bet * alpha)
    return float((truth * chances * wrong).mean())


def show_false_proofs(runs: int, seed: int) -> None:
    """Print the share of false proofs by law, in no hurry and with a budget of 150 labels, with standard errors."""
    print(f"{runs} runs each, seed {seed}; at most 5% allowed")
    print("| law | no budget | budget 150 |\n|---|---|---|")
    for name in test_sequential.LAWS:
        cells = []
        for budget in (None, 150):
            share = test_sequential.false_proofs(name, times=1.0, runs=runs, looks=2000, budget=budget, seed=seed)
            cells.append(f"{share:.2%} ± {math.sqrt(share * (1 - share) / runs):.2%}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--alpha", type=float, default=0.01)
    parser.add_argument("--delta", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wrong-guesses", action="store_true", help="also with guessed errors that are wrong")
    parser.add_argument(
        "--false-proofs", action="store_true", help="only these; delta is .05 and alpha that of the tests"
    )
    given = parser.parse_args()
    if given.false_proofs:
        show_false_proofs(given.runs, given.seed)
        return
    common = {"alpha": given.alpha, "delta": given.delta, "runs": given.runs, "seed": given.seed}
    print(f"labels, median / 90th percentile of {given.runs} runs; shares of one look with 90% power in brackets")
    print("| true error, sd | one look | all labelled, best constant bet | drawn, best constant bet | ours | photos |")
    print("|---|---|---|---|---|---|")
    for error, spread in LAWS:
        truth, look = law(error, spread), one_look(error, given.alpha, given.delta)
        cells = [f"{error:.1%}, {spread:g}", f"{look:,}"]
        cells += [_cell(constant_bet(truth, active=active, **common), look) for active in (False, True)]
        for name, guess in GUESSES.items():
            if guess == (1.0, 0.0):
                labels, photos = labels_taken(truth, budget=look, **common)
                print(f"| {' | '.join([*cells, _cell(labels, look), _numbers(photos)])} |", flush=True)
            elif given.wrong_guesses:
                labels, photos = labels_taken(truth, budget=look, guess=guess, **common)
                print(f"| guessed {name} | | | | {_cell(labels, look)} | {_numbers(photos)} |", flush=True)


def _numbers(taken: NDArray[np.float64]) -> str:
    return " / ".join(f"{value:,.0f}" for value in np.quantile(taken, (0.5, 0.9), method="higher"))


def _cell(taken: NDArray[np.float64], look: int) -> str:
    middle, late = np.quantile(taken, (0.5, 0.9), method="higher") / look
    return f"{_numbers(taken)} ({middle:.2f} / {late:.2f})"


if __name__ == "__main__":
    main()
