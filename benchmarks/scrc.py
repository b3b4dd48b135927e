"""What guarantees buy: Monte-Carlo tables of thresholds and of sets, with a figure.

    python benchmarks/scrc.py [--draws 1000] [--out benchmarks/scrc.png] [--json FILE]

Each draw calibrates once, and the truth is exact (closed forms or quadrature), so no test rows add noise. Scenarios are
those of the tests. Five tables, at n = 500, 2,000 and 10,000 certify rows:

- gate: exit error <= 1% and coverage >= 70%, delta 5%; true error 0.5% at coverage .70 and 1% at .82. ``naive`` is the
  laxest threshold whose counts meet the wish; ``crc`` holds P(wrong and accepted) <= 1% x 70% in expectation, which
  implies it at that coverage, and is deployed where the rows' coverage is 70%; ``ltt`` has its candidates from a fit
  half of n other rows.
- fnr: FNR on exits <= 2% of a softmax whose logits are normal (5.5% if all exit); ``grid``: ten probabilities.
- sets: xi = .7, alpha = 1%, sets that may be empty; ``I published`` has the budget ceil(alpha (m + 1)) - 1.
- most: xi = .7, alpha = 1%, sets that are never empty; one class each keeps that up to a coverage of .88. ``least``
  accepts what certifies xi, ``most`` what n other rows say that one class each will certify.
- groups: 250 clips of unlike size, errors in the short ones; true risk just above alpha (false certificates), and
  alpha at 1.6 times the risk (power).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import matplotlib as mpl
import numpy as np
from scipy.stats import norm

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import test_certify
import test_scrc

from stage1_pro.policies.candidates import Risk
from stage1_pro.policies.certify import certify_threshold
from stage1_pro.policies.ordering import order_candidates
from stage1_pro.policies.scrc import SCRC, FittedSCRC

SIZES = (500, 2000, 10_000)
GRID = np.log(np.arange(50, 100, 5) / 100) - np.log1p(-np.arange(50, 100, 5) / 100)  # logits of .50, .55 ... .95
Table = dict[str, dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    jobs = [(table, n) for n in reversed(SIZES) for table in ("gate", "fnr", "sets", "most")] + [("groups", 250)]
    with ProcessPoolExecutor(2) as pool:
        results = dict(zip(jobs, pool.map(run, jobs, [options.draws] * len(jobs)), strict=True))
    for table in ("gate", "fnr", "sets", "most"):
        show(table, {str(n): results[table, n] for n in SIZES})
    show("groups", {"250": results["groups", 250]})
    noise = 100 * math.sqrt(0.05 * 0.95 / options.draws)
    print(f"{options.draws} draws; standard error of a share of 5%: {noise:.1f} points, of 50%: {noise * 2.29:.1f}")
    if options.json:
        options.json.write_text(json.dumps({f"{table} {n}": found for (table, n), found in results.items()}, indent=1))
    plot(results, options.out)


def run(job: tuple[str, int], draws: int) -> Table:
    table, n = job
    rng = np.random.default_rng([n, len(table)])
    return {"gate": gate, "fnr": fnr, "sets": sets, "most": most, "groups": groups}[table](rng, n, draws)


def shares(counts: dict[str, list[float]], names: tuple[str, ...], draws: int) -> Table:
    return {method: dict(zip(names, (x / draws for x in found), strict=True)) for method, found in counts.items()}


def gate(rng: np.random.Generator, n: int, draws: int) -> Table:
    scenario = test_certify.Scenario()
    counts = {method: [0.0, 0.0] for method in ("naive", "crc", "ltt")}
    for _ in range(draws):
        fit_scores, fit_errors = scenario.draw(rng, n)
        scores, errors = scenario.draw(rng, n)
        order = order_candidates(fit_scores, [Risk("", 0.01, fit_errors)], n_certify=n, min_coverage=0.7, lowest=0.0)
        found = {
            "naive": test_certify.naive(scores, errors),
            "crc": expected(scores, errors),
            "ltt": certify_threshold(
                scores, errors, alpha=0.01, delta=0.05, min_coverage=0.7, candidates=order
            ).threshold,
        }
        for method, threshold in found.items():
            if threshold is not None:
                counts[method][0] += scenario.violates(threshold)
                counts[method][1] += 1
    return shares(counts, ("violates", "deployed"), draws)


def expected(scores: np.ndarray, errors: np.ndarray) -> float | None:
    """Conformal risk control of the joint share, where that leaves a coverage of 70% on these rows."""
    found = certify_threshold(scores, errors, alpha=0.007, delta=0.05, method="crc")
    return max(found.threshold, 0.0) if found.threshold is not None and (found.coverage or 0) >= 0.7 else None


def true_fnr(threshold: float) -> float:
    missed, right = norm.cdf((-threshold - 3.2) / 2), norm.sf((threshold - 3.2) / 2)
    return float(missed / (missed + right))


def fnr(rng: np.random.Generator, n: int, draws: int) -> Table:
    counts = {method: [0.0, 0.0] for method in ("naive", "grid", "ltt")}
    for _ in range(draws):
        scores, missed, labels = test_certify.signs(rng, n)
        order = order_candidates(scores, [Risk("", 0.02, missed, labels)], n_certify=n, lowest=0.0)
        scores, missed, labels = test_certify.signs(rng, n)
        found = {
            "naive": meets(scores, missed, labels, np.sort(scores)),
            "grid": meets(scores, missed, labels, GRID),
            "ltt": certify_threshold(
                scores, missed, alpha=0.02, delta=0.05, candidates=order, condition="exit&y=1", labels=labels
            ).threshold,
        }
        for method, threshold in found.items():
            if threshold is not None:
                counts[method][0] += true_fnr(threshold) > 0.02
                counts[method][1] += 1
    return shares(counts, ("violates", "deployed"), draws)


def meets(scores: np.ndarray, missed: np.ndarray, labels: np.ndarray, ascending: np.ndarray) -> float | None:
    """The laxest of the thresholds at which exited positives are missed in at most 2%."""
    wrong, positive = np.sort(scores[missed]), np.sort(scores[labels])
    k = wrong.size - np.searchsorted(wrong, ascending)
    m = positive.size - np.searchsorted(positive, ascending)
    good = np.flatnonzero((50 * k <= m) & (m > 0))
    return float(ascending[good[0]]) if good.size else None


def sets(rng: np.random.Generator, n: int, draws: int) -> Table:
    scenario = test_scrc.Scenario(slope=4.2)
    counts = {method: [0.0] * 4 for method in ("naive", "T", "I published", "I", "pac")}
    for _ in range(draws):
        rows = scenario.draw(rng, n)
        for method, found in counts.items():
            wish = SCRC(0.7, 0.01, variant=method.split()[0], allow_empty=True)  # type: ignore[arg-type]
            fitted = published(wish, *rows) if method == "I published" else wish.calibrate(*rows)
            if not fitted.feasible:
                continue
            limit = fitted.cells[0].limit
            assert limit is not None
            coverage, reach = scenario.coverage(fitted), math.log(limit / (1 - limit))
            found[0] += scenario.risk(fitted) > 0.01
            found[1] += coverage < 0.7
            found[2] += 1 + math.copysign(scenario.over(coverage, -abs(reach), abs(reach)), reach)
            found[3] += 1
    tables = shares(counts, ("risk above alpha", "coverage below xi", "size", "deployed"), draws)
    for found in tables.values():
        found["size"] /= max(found["deployed"], 1e-9)
    return tables


def most(rng: np.random.Generator, n: int, draws: int) -> Table:
    scenario = test_scrc.Scenario(9.0, 8.0, 1.5)
    names = ("risk above alpha", "coverage below xi", "accepted", "several classes", "deployed")
    counts = {f"{variant}, {how}": [0.0] * 5 for variant in ("pac", "I", "T") for how in ("least", "most")}
    for _ in range(draws):
        others, rows = scenario.draw(rng, n), scenario.draw(rng, n)
        for method, found in counts.items():
            variant, how = method.split(", ")
            wish = SCRC(0.7, 0.01, variant=variant)  # type: ignore[arg-type]
            fitted = wish.calibrate(*rows, threshold=wish.choose_threshold(*others, n=n) if how == "most" else None)
            if not fitted.feasible:
                continue
            limit, coverage = max(fitted.cells[0].limit or 0.0, 0.5), scenario.coverage(fitted)
            reach = math.log(limit / (1 - limit))
            found[0] += scenario.risk(fitted) > 0.01
            found[1] += coverage < 0.7
            found[2] += coverage
            found[3] += scenario.over(coverage, -reach, reach)
            found[4] += 1
    table = shares(counts, names, draws)
    for found in table.values():
        for name in names[2:4]:
            found[name] /= max(found["deployed"], 1e-9)
    return table


def published(wish: SCRC, probs: np.ndarray, gate: np.ndarray, labels: np.ndarray) -> FittedSCRC:
    """SCRC-I with its published budget: one loss more wherever alpha (m + 1) is no integer."""
    fitted = wish.calibrate(probs, gate, labels)
    m = fitted.cells[0].trials
    budget = math.ceil(Fraction("0.01") * (m + 1)) - 1
    above = np.argsort(-gate)[:m]
    losses = np.sort(1 - probs[above, labels[above]])
    cell = replace(fitted.cells[0], limit=float(losses[m - 1 - budget]), budget=budget)
    return replace(fitted, threshold=float(np.nextafter(np.sort(gate)[-m - 1], 2)), cells=(cell,))


def groups(rng: np.random.Generator, n: int, draws: int) -> Table:
    error = (0.12, 0.03)
    risk = (0.5 * error[0] + 0.9 * error[1]) / (0.5 + 0.9)
    hows = {"rows": {"rows_independent": True}, "one row each": {}, "group means": {"unit": "group_means"}}
    counts = {method: [0.0, 0.0] for method in hows}
    for draw in range(draws):
        scores, errors, names = test_certify.clips(rng, n, error)
        for method, how in hows.items():
            for place, alpha in enumerate((risk - 1e-4, 1.6 * risk)):
                counts[method][place] += certify_threshold(
                    scores, errors, alpha=alpha, delta=0.05, candidates=[0.5], groups=names, seed=draw, **how
                ).feasible
    return shares(counts, ("false", "power"), draws)


def show(title: str, columns: dict[str, Table]) -> None:
    print(f"\n{title}: " + " / ".join(next(iter(next(iter(columns.values())).values()))) + ", % (size as it is)")
    print(f"{'':<14}" + "".join(f"{'n = ' + n:>30}" for n in columns))
    for method in next(iter(columns.values())):
        cells = [
            " / ".join(f"{v:.2f}" if name == "size" else f"{100 * v:.1f}" for name, v in table[method].items())
            for table in columns.values()
        ]
        print(f"{method:<14}" + "".join(f"{cell:>30}" for cell in cells))


def plot(results: dict[tuple[str, int], Table], path: Path) -> None:
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = (
        ("gate", "violates", "Gate: exit error <= 1%, coverage >= 70%"),
        ("fnr", "violates", "Softmax: FNR on exits <= 2%"),
        ("sets", "risk above alpha", "Sets: risk <= 1% among the accepted"),
    )
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True, layout="constrained")
    for axis, (table, share, title) in zip(axes, panels, strict=True):
        for method in results[table, SIZES[0]]:
            kept = method in ("ltt", "pac")
            values = [100 * results[table, n][method][share] for n in SIZES]
            axis.plot(SIZES, values, marker="o", markersize=4, label=method, linewidth=2.5 if kept else 1.2)
        axis.axhline(4 if table == "sets" else 5, color="black", linewidth=0.8, linestyle="--")
        axis.set(xscale="log", title=title, xlabel="calibration rows", xticks=SIZES)
        axis.set_xticks([], minor=True)
        axis.set_xticklabels([f"{n:,}" for n in SIZES])
        axis.title.set_size(9)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("draws that break the promise, %")
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
