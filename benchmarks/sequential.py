"""Labels until an exit error is proven: one look at a planned number, looks after each label, and which to label.

    python benchmarks/sequential.py [--runs 400] [--alpha .01] [--delta .05]

Errors of a photo are logistic-normal with a spread sd; guessed errors are the true chances, or wrong on purpose.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit, ndtri

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
    """Labels from which one exact test has the power, whatever larger number is taken."""
    n = np.arange(1, 20_000)
    short = np.flatnonzero(binomial_cdf(np.maximum(errors_allowed(n, alpha, delta), -1.0), n * 1.0, error) < power)
    return int(n[short[-1]]) + 1


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
