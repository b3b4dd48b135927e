"""What passes the anchor: draws that lose the margin and should not, and draws that lose nothing and should.

    python benchmarks/continual_anchor.py [--draws 300]

Of one test at level 5% and a margin of .05 of the mean reward: the share of draws that pass by the gate's p-value, and
by the lower bound of a percentile bootstrap over clusters (1,000 resamples).
"""

from __future__ import annotations

import argparse

import numpy as np

from stage1_pro.continual.learn.rewards import RewardSpec
from stage1_pro.continual.loop import promotion

MARGIN, LEVEL = 0.05, 0.05
# What a wrong answer takes from a right one's reward, and what an exit saves that was a deferral.
LOSS, GAIN = 4.5, 0.05
AT_THE_MARGIN = ("rare losses", "and small gains", "in large clusters", "in clips of any length")
AS_GOOD = ("the same", "1% worse, 1% better", "1% worse, 2% better")


def draw(kind: str, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Differences of rows and their clusters, n of these; the first kinds lose the margin, no more, each in its way."""
    ids, u = np.arange(n), rng.random(n)
    if kind == "rare losses":
        return np.where(u < MARGIN / LOSS, -LOSS, 0.0), ids
    if kind == "and small gains":
        lost = (MARGIN + 0.9 * GAIN) / (LOSS + GAIN)
        return np.where(u < lost, -LOSS, np.where(u < lost + 0.9 * (1 - lost), GAIN, 0.0)), ids
    if kind == "in large clusters":
        large = rng.random(n) < 0.05
        size = np.where(large, 20, 1)
        losing = large & (u < MARGIN * 1.95 / (LOSS * 0.05 * 20))
        return np.repeat(np.where(losing, -LOSS, 0.0), size), np.repeat(ids, size)
    if kind == "in clips of any length":
        size = np.minimum(1 + rng.pareto(1.2, n) * 2, 40).astype(int)
        return np.repeat(np.where(u < MARGIN / LOSS, -LOSS, 0.0), size), np.repeat(ids, size)
    better = {"the same": 0.0, "1% worse, 1% better": 0.01, "1% worse, 2% better": 0.02}[kind]
    worse = 0.01 if better else 0.0
    return np.where(u < worse, -LOSS, np.where(u < worse + better, LOSS, 0.0)), ids


def passes(kind: str, n: int, draws: int, seed: int = 0) -> tuple[float, float]:
    """Shares of draws that pass by the gate's p-value and by the bootstrap."""
    rng, reach = np.random.default_rng([seed, n]), promotion.largest_difference(RewardSpec())
    ours = bootstrap = 0
    for k in range(draws):
        differences, clusters = draw(kind, n, rng)
        names = clusters.astype(np.str_)
        ours += promotion.AnchorQuestion("", differences, names, MARGIN, reach, 0).p_value(LEVEL, k) <= LEVEL
        bootstrap += promotion.lower_bound(differences, names, level=LEVEL, n_replicates=1000, seed=k) > -MARGIN
    return ours / draws, bootstrap / draws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=300)
    options = parser.parse_args()
    for title, kinds in (("loses the margin", AT_THE_MARGIN), ("loses nothing", AS_GOOD)):
        for kind in kinds:
            for n in (300, 500, 1000, 3000):
                ours, bootstrap = passes(kind, n, options.draws)
                print(f"{title:17} {kind:24} {n:5} clusters  gate {ours:.3f}  bootstrap {bootstrap:.3f}", flush=True)


if __name__ == "__main__":
    main()
