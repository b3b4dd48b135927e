"""Every threshold at once: ``metrics.sweep`` and ``metrics.dual_threshold`` against NumPy, sort included.

    python benchmarks/sweep.py [--rows 1000000] [--rounds 9]

The twin is the package's own NumPy version (lexsort and cumulative sums). Each round times all of them in turn, so a
noisy machine hits all alike; figures are medians over rounds, with the fastest in brackets.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from stage1_pro import metrics, native


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def on_twin(work: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with native.use("reference"):
            return work()

    return run


def show(name: str, runs: dict[str, Callable[[], object]], rounds: int) -> None:
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(rounds):
        for label, work in runs.items():
            seconds[label].append(timed(work))
    base = statistics.median(seconds["compiled"])
    for label, values in seconds.items():
        middle = statistics.median(values)
        print(f"{name:34} {label:9} {1e3 * middle:8.1f} ms ({1e3 * min(values):.1f})  x{middle / base:.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    n = options.rows
    labels = rng.random(n) < 0.1
    score = 1 / (1 + np.exp(-rng.normal(6 * labels - 3, 2)))
    predicted = score >= 0.5
    error = predicted != labels
    confidence = np.maximum(score, 1 - score)
    for dtype in (np.float32, np.float64):
        values = confidence.astype(dtype)
        for name, work in {
            "order": lambda values=values: native.order(values, error),
            "sweep without labels": lambda values=values: metrics.sweep(values, error),
            "sweep with labels and answers": lambda values=values: metrics.sweep(values, error, labels, predicted),
            "sweep of losses": lambda values=values: metrics.sweep(values, score),
        }.items():
            show(f"{name}, {np.dtype(dtype).name}", {"compiled": work, "twin": on_twin(work)}, options.rounds)
    values = score.astype(np.float32)
    for second in ("max_fpr", "max_exit_error"):
        limits = {"max_fnr": 0.02, second: 0.01}

        def work(limits: dict[str, float] = limits) -> object:
            return metrics.dual_threshold(values, labels, **limits)

        show(f"dual_threshold, {second}", {"compiled": work, "twin": on_twin(work)}, 3)


if __name__ == "__main__":
    main()
