"""Exit error at most 6%, delta 5%: how often promised, of how many photos, how often falsely? Ours and theirs.

    pip install --no-deps -c constraints.txt deferguard==0.3.0 ville==0.1.0 --target PEERS
    PYTHONPATH=PEERS python benchmarks/power.py [--draws 100] [--laws steep ...]

The same rows for all, drawn from laws of ``benchmarks/menu.py`` whose truth is known: 250 and 500. What is compared:

- ours: the 250 fix the order of thresholds, the 500 certify.
- MAPIE: the precision of "is the answer right?" at least 94%, which is the same quantity, on its own 100 thresholds of
  the confidence, stretched to [0, 1]. ``holm`` (its default) and ``fixed sequence`` see all 750 rows; ``split fixed
  sequence`` learns its order from the 250.
- deferguard: its calibrator on all 750 rows; its one alpha is limit and chance of failing, so it may fail in 6%.
- crepes, sets of one class: exit where the conformal set at 6% is of
  one class. It promises that sets hold the label in 94% of all photos, and nothing of exits: shown since people do it.

Peers know no groups: in ``uneven groups`` they take the copies of a photo as so many photos, and are held to the rate
of photos; ours to that of groups, which is what it promises. An error of theirs, such as too few rows, is a refusal.
With ville also: labels until an error of .5% is proven to be below 1% by its sequence of confidence bounds, all photos
labelled, beside ours (``benchmarks/sequential.py``).
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from crepes import ConformalClassifier
from crepes.extras import hinge
from mapie.risk_control import BinaryClassificationController, precision
from menu import WORLD, World, calibrate, draw_units, joined, laws, shares
from sequential import labels_taken, law, one_look

from stage1_pro.policies.rows import Rows
from stage1_pro.policies.softmax import confidence
from stage1_pro.policies.target import Softmax
from stage1_pro.words import HALVES

ALPHA, DELTA = 0.06, 0.05
LAWS = ("steep", "flat", "not monotone", "worst at the top", "ties", "five classes", "uneven groups")
# From rows that fix an order and rows that certify: which rows of a world exit; None: refused.
Exits = Callable[[Rows], np.ndarray]
Contestant = Callable[[Rows, Rows], Exits | None]


def ours(first: Rows, second: Rows) -> Exits | None:
    rows = joined([first, second])
    halves = np.repeat(HALVES, [first.labels.size, second.labels.size])
    policy = calibrate(Softmax(exit_error=ALPHA, delta=DELTA, allow_useless=True), replace(rows, halves=halves))
    return None if policy is None else lambda world: policy.exits(world.probs)


def stretched(rows: Rows) -> np.ndarray:
    """The confidence [N], from what the laws give, .01 to .99 of the way from 1 / K to 1, to [0, 1]."""
    least = 1 / len(rows.classes)
    return ((confidence(rows.probs) - least) / (1 - least) - 0.01) / 0.98


def mapie(method: str) -> Contestant:
    def fit(first: Rows, second: Rows) -> Exits | None:
        control = BinaryClassificationController(
            lambda x: np.column_stack([1 - x, x]), precision, target_level=1 - ALPHA, confidence_level=1 - DELTA,
            fwer_method=method,
        )  # fmt: skip
        rows = second if method.startswith("split") else joined([first, second])
        with warnings.catch_warnings():
            # It warns where nothing is found, and of risks that are not monotone.
            warnings.simplefilter("ignore")
            if method.startswith("split"):
                control.learn_fixed_sequence_order(stretched(first), (~first.wrong).astype(int))
            control.calibrate(stretched(rows), (~rows.wrong).astype(int))
        threshold = control.best_predict_param
        return None if threshold is None else lambda world: stretched(world) >= threshold

    return fit


def deferguard(first: Rows, second: Rows) -> Exits | None:
    from deferguard.core.calibrator import Calibrator
    from deferguard.core.decision import CalibrationExample
    from deferguard.core.validation import InsufficientCalibrationDataError

    rows = joined([first, second])
    pairs = zip(confidence(rows.probs).tolist(), (~rows.wrong).tolist(), strict=True)
    with warnings.catch_warnings():
        # It warns of confidence that does not follow what is right.
        warnings.simplefilter("ignore")
        try:
            found = Calibrator(alpha=ALPHA).fit(
                [CalibrationExample(signal=sure, correct=right) for sure, right in pairs]
            )
        except InsufficientCalibrationDataError:
            return None
    return None if not found.achieved else lambda world: confidence(world.probs) >= found.threshold


def sets_of_one(first: Rows, second: Rows) -> Exits | None:
    rows = joined([first, second])
    names = np.arange(len(rows.classes))
    made = ConformalClassifier().fit(hinge(rows.probs, names, rows.labels))
    return lambda world: made.predict_set(hinge(world.probs), confidence=1 - ALPHA, smoothing=False).sum(axis=1) == 1


CONTESTANTS: dict[str, Contestant] = {
    "ours": ours,
    "MAPIE, Holm": mapie("bonferroni_holm"),
    "MAPIE, fixed sequence": mapie("fixed_sequence"),
    "MAPIE, split fixed sequence": mapie("split_fixed_sequence"),
    "deferguard": deferguard,
    "crepes, sets of one class": sets_of_one,
}


def try_law(name: str, contestants: dict[str, Contestant], draws: int) -> dict[str, tuple[int, int, float]]:
    """By contestant: draws that deploy, those that are truly above the limit, and the mean coverage of the deployed."""
    first, second, n, uneven = laws()[name]
    rows = draw_units(second, WORLD, np.random.default_rng(1), uneven, False, "world")
    by_unit = {True: World.of(rows, False), False: World.of(rows, True)}
    counts = {one: [0, 0, 0.0] for one in contestants}
    for seed in range(draws):
        rng = np.random.default_rng([3, seed])
        parts = (draw_units(first, n // 2, rng, uneven, False, "fit"), draw_units(second, n, rng, uneven, False, "new"))
        for one, fit in contestants.items():
            found = fit(*parts)
            if found is None:
                continue
            world, exits = by_unit[one == "ours"], found(rows)
            counts[one][0] += 1
            counts[one][1] += world.above(rows.wrong, exits, ALPHA)
            counts[one][2] += float(np.average(exits, weights=world.weights))
    return {one: (n, false, covered / max(n, 1)) for one, (n, false, covered) in counts.items()}


def sequences(runs: int) -> None:
    """Print the labels until an error of .5% is proven to be below 1%."""
    from ville import BernoulliCS

    truth, look = law(0.005, 2.0), one_look(0.005, 0.01, DELTA)
    labels, _ = labels_taken(truth, alpha=0.01, delta=DELTA, runs=runs, seed=0, budget=look)
    theirs, rng = np.full(runs, np.inf), np.random.default_rng(0)
    for run in range(runs):
        upper = BernoulliCS(alpha=DELTA).update(rng.random(20_000) < 0.005).upper_
        reached = np.flatnonzero(np.asarray(upper) < 0.01)
        theirs[run] = reached[0] + 1 if reached.size else math.inf
    for name, found in (("ours, drawn by guessed errors", labels), ("ville, every photo labelled", theirs)):
        middle, late = np.quantile(found, (0.5, 0.9), method="higher")
        print(f"{name}: {middle:,.0f} / {late:,.0f} labels (one look with 90% power: {look:,})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--laws", nargs="+", choices=list(laws()), default=LAWS)
    parser.add_argument("--runs", type=int, default=200, help="of labels one by one, beside ville")
    options = parser.parse_args()
    here = {name: importlib.util.find_spec(name) is not None for name in ("deferguard", "ville")}
    contestants = {name: fit for name, fit in CONTESTANTS.items() if here.get(name, True)}
    for name in (name for name, there in here.items() if not there):
        print(f"{name} is not installed, so it is left out")
    print(f"{options.draws} draws: deployed / mean coverage of those / false of all")
    print(f"| law | {' | '.join(contestants)} |\n{'|---' * (1 + len(contestants))}|")
    for name in options.laws:
        found = try_law(name, contestants, options.draws)
        cells = [
            f"{n / options.draws:.0%} / {covered:.2f} / {shares(false, options.draws)}"
            for n, false, covered in found.values()
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    if here["ville"]:
        sequences(options.runs)


if __name__ == "__main__":
    main()
