"""Is each promise of the menu false as rarely as it says? Every target under laws whose truth is known.

    python benchmarks/menu.py [--draws 200] [--laws ties ...] [--out FILE.json]

Ten laws are those of ``tests/test_menu.py``, where Stage A errs in 3 to 9% of photos and limits are .06 or .08; three
more are harder: groups of 1 to 12 copies of which those that are wrong are the larger, 60 units alone, and an order
fixed on photos of another law. Every draw calibrates once, 250 units fixing the order of thresholds and 500 certifying;
for the target of photos each unit is a group of 1 to 4 copies. delta is .05, and policies that say nothing are wanted.
The truth is that of 100,000 units, less three of its standard errors. Prints by law and target the share of draws that
deploy, the mean coverage of those, and how many of all draws break a promise, with the 95% Clopper-Pearson interval;
then every target over all laws, and the cell that is worst.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from resplits import alike
from scipy.special import logit
from scipy.stats import binom

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import test_menu

from stage1_pro.errors import NotReachableError
from stage1_pro.files import write_text
from stage1_pro.metrics.binomial import clopper_pearson_lower, clopper_pearson_upper
from stage1_pro.policies.policy import Policy, risk_of
from stage1_pro.policies.rows import Rows
from stage1_pro.policies.target import POLICIES, Target, parse_target
from stage1_pro.words import HALVES

Draw = Callable[[int, np.random.Generator], Rows]
WORLD = 100_000
LARGEST = 12
TARGETS: dict[str, dict[str, Any]] = {
    "exit error": {"exit_error": 0.06},
    "exit error, gate": {"policy": "gate", "exit_error": 0.06},
    "exit error of photos": {"exit_error": 0.06, "unit": "photo", "largest_group": LARGEST},
    "exit error, least coverage": {"exit_error": 0.06, "least_coverage": 0.5},
    "fnr": {"fnr": 0.06},
    "fnr of another class": {"fnr": 0.06, "fnr_class": "0"},
    "exit error and fnr": {"exit_error": 0.06, "fnr": 0.08},
    "cascade error": {"cascade_error": 0.06},
    "disagreement": {"disagreement": 0.08},
    "sets (scrc)": {"policy": "scrc", "alpha": 0.06, "min_coverage": 0.5},
}


def joined(parts: list[Rows]) -> Rows:
    """Rows one after another."""
    cut = {one.name: getattr(parts[0], one.name) for one in fields(Rows)}
    for name, value in cut.items():
        if isinstance(value, np.ndarray):
            cut[name] = np.concatenate([getattr(part, name) for part in parts])
    return Rows(**cut)


def copied(rows: Rows, size: np.ndarray, noise: np.ndarray, name: str) -> Rows:
    """Each row as a group of so many copies [N]; the gate's logit is the confidence with noise [N]."""
    at = np.repeat(np.arange(size.size), size)
    cut = {one.name: getattr(rows, one.name) for one in fields(rows)}
    cut = {key: value[at] if isinstance(value, np.ndarray) else value for key, value in cut.items()}
    sure = logit(rows.probs.max(axis=1)) + 0.5 * noise
    groups = np.char.add(f"{name} ", at.astype(str))
    return Rows(**{**cut, "gate": sure[at], "groups": groups, "units_known": True, "independent": False})


def laws() -> dict[str, tuple[Draw, Draw, int, bool]]:
    """By name: the law of the rows that fix the order, that of the others, how many certify, and uneven groups."""
    found = dict(test_menu.laws())
    steep, waves = found["steep"], found["not monotone"]
    every = {name: (draw, draw, 500, False) for name, draw in found.items()}
    return every | {
        "uneven groups": (steep, steep, 500, True),
        "60 units": (steep, steep, 60, False),
        "order of another law": (steep, waves, 500, False),
    }


def draw_units(draw: Draw, n: int, rng: np.random.Generator, uneven: bool, copies: bool, name: str) -> Rows:
    """``n`` units: rows, groups of 1 to 4 copies, or of 1 to ``LARGEST`` of which wrong ones are larger."""
    rows = draw(n, rng)
    size = rng.integers(1, 5, n) if copies or uneven else np.ones(n, dtype=np.int64)
    if uneven:
        size += rng.integers(0, LARGEST - 3, n) * rows.wrong
    return copied(rows, size, rng.normal(size=n), name)


def calibrate(target: Target, rows: Rows) -> Policy | None:
    """The policy that is certified; None: refused."""
    try:
        return POLICIES.find(target.policy).fit(target, rows)
    except NotReachableError:
        return None


@dataclass(frozen=True)
class World:
    """All units of a law: rows, the number of each row's group [N], and weights [N] by which rates are of the unit."""

    rows: Rows
    member: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, rows: Rows, of_photos: bool) -> World:
        assert rows.groups is not None
        member = np.unique(rows.groups, return_inverse=True)[1]
        return cls(rows, member, np.ones(member.size) if of_photos else alike(rows.groups))

    def above(self, errors: np.ndarray, trials: np.ndarray, limit: float) -> bool:
        """Whether a rate is above a limit by more than three standard errors; rows bool [N]."""
        among = np.bincount(self.member, self.weights * trials)
        rate = self.weights @ (errors & trials) / max(among.sum(), 1e-12)
        return bool(rate > limit + 3 * math.sqrt(limit * (1 - limit) * (among @ among)) / max(among.sum(), 1e-12))

    def breaks(self, target: Target, policy: Policy) -> tuple[bool, float]:
        """Whether a promise is truly false, and the coverage, or the share that is accepted."""
        rows, everyone = self.rows, np.ones(self.member.size, dtype=bool)
        exits = accepted = policy.exits(rows.probs, rows.gate)
        limits = {one.quantity: one for one in target.promises(rows.positive)}
        least = limits.pop("share accepted", None) or limits.pop("coverage", None)
        if "risk" in limits:
            assert rows.probs_b is not None
            sets, accepted = policy.answer(np.where(exits[:, None], rows.probs, rows.probs_b), exits, rows.gate)
            missed = ~sets[np.arange(rows.labels.size), rows.labels]
            false = self.above(missed, accepted, limits["risk"].limit)
        else:
            false = any(self.above(*risk_of(one, rows).outcomes(exits), one.limit) for one in limits.values())
        false |= least is not None and self.above(~accepted, everyone, 1 - least.limit)
        return false, float(np.average(accepted, weights=self.weights))


def try_cell(law: tuple[Draw, Draw, int, bool], asked: dict[str, Any], draws: int) -> tuple[int, int, float]:
    """Of so many calibrations: those that deploy, those that break a promise, and the mean coverage of the deployed."""
    first, second, n, uneven = law
    target = parse_target({"policy": "softmax", "allow_useless": True, **asked})
    copies = target.largest is not None
    world = World.of(draw_units(second, WORLD, np.random.default_rng(1), uneven, copies, "world"), copies)
    deployed, false, covered = 0, 0, 0.0
    for seed in range(draws):
        rng = np.random.default_rng([2, seed])
        parts = [draw_units(first, n // 2, rng, uneven, copies, "fit")]
        parts.append(draw_units(second, n, rng, uneven, copies, "certify"))
        halves = np.repeat(HALVES, [part.labels.size for part in parts])
        policy = calibrate(target, replace(joined(parts), halves=halves))
        if policy is not None:
            broken, coverage = world.breaks(target, policy)
            deployed, false, covered = deployed + 1, false + broken, covered + coverage
    return deployed, false, covered / max(deployed, 1)


def shares(false: int, draws: int) -> str:
    low, high = clopper_pearson_lower(false, draws, 0.975), clopper_pearson_upper(false, draws, 0.975)
    return f"{false / draws:.1%} [{low:.1%}, {high:.1%}]"


def main() -> None:
    every = laws()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--laws", nargs="+", choices=list(every), default=list(every))
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    print("| law | target | deployed | mean coverage | false |\n|---|---|---|---|---|")
    found: dict[str, dict[str, tuple[int, int, float]]] = {}
    for target in options.targets:
        found[target] = {}
        for law in options.laws:
            found[target][law] = cell = try_cell(every[law], TARGETS[target], options.draws)
            print(
                f"| {law} | {target} | {cell[0] / options.draws:.0%} | {cell[2]:.3f} "
                f"| {shares(cell[1], options.draws)} |",
                flush=True,
            )
    if options.out:
        write_text(options.out, json.dumps(found, indent=1))
    print("\n| target | deployed | worst law | false there | false over all laws |\n|---|---|---|---|---|")
    for target, cells in found.items():
        worst = max(cells, key=lambda law: cells[law][1])
        deployed, false, draws = *np.sum([cell[:2] for cell in cells.values()], axis=0), options.draws * len(cells)
        print(
            f"| {target} | {deployed / draws:.0%} | {worst} | {shares(cells[worst][1], options.draws)} "
            f"| {shares(int(false), draws)} |"
        )
    n = len(found) * len(options.laws)
    most = int(binom.ppf(1 - 0.01 / n, options.draws, 0.05))
    print(
        f"If each promise were false in 5% of draws, the worst of {n} cells would be above {most / options.draws:.1%} "
        "with a chance of 1%."
    )


if __name__ == "__main__":
    main()
