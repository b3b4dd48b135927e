"""Do promises hold on real photos? A fixed model's rows, cut again and again into calibration and test, by group.

    python benchmarks/resplits.py --data ../shared/data --backbone ../shared/weights/dinov2-small --out DIR \
        [--signs RUN] [--scenes RUN] [--draws 200]

The rows are val_calib and val_test of a run together, which its training has not seen; without a run one is trained
(signs: the tiny model, minutes; scenes: a linear head on the backbone, a minute). Every draw calibrates Stage A twice
and measures both on groups that calibrated nothing:

- by group: half of the groups calibrate, one row speaks for each, and risks on the other half weigh groups alike;
- ignoring groups: rows of the same groups are cut at random into calibration and test, each counts as independent, and
  what was certified is measured on the rows of the other groups, the new photos that it is about.

Halves of one pool are no new data: where calibration was lucky the other half is unlucky. So the same is done once more
with the pool as the whole world: its groups are drawn with replacement, and true risks are those of the pool, exactly.
Writes resplits.json, resplits.md and resplits.png.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from scenes import OVERRIDES as SCENES
from signs import OVERRIDES as SIGNS

import stage1_pro
from stage1_pro.config import load_config
from stage1_pro.data.predictions import Predictions
from stage1_pro.files import write_text
from stage1_pro.metrics.binomial import clopper_pearson_lower, clopper_pearson_upper
from stage1_pro.policies.bounds import selection_rank
from stage1_pro.policies.certify import certify_threshold
from stage1_pro.policies.checks import FAIL_LEVEL, PASS_LEVEL
from stage1_pro.policies.scrc import SCRC
from stage1_pro.policies.softmax import softmax

DELTA = 0.05
# Least coverage and largest risk.
WISHES = {
    "roadwork_signs": ((0.7, 0.02), (0.9, 0.03), (0.7, 0.1)),
    "roadwork_scenes": ((0.5, 0.1), (0.5, 0.2), (0.7, 0.2)),
}
OUTCOMES = ("PASS", "INCONCLUSIVE", "FAIL")
FACTS = ("feasible", "broken", "risk", "coverage", "deceived", "size", "rejection", *OUTCOMES)
SPLITS = {"train": 0.4, "val_select": 0.1, "val_calib": 0.25, "val_test": 0.25}

Table = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Rows:
    """A pool: Stage A's probabilities [N, 2], gate scores, labels (1 = positive) and groups of rows [N]."""

    probs: np.ndarray
    gate: np.ndarray
    labels: np.ndarray
    groups: np.ndarray

    def __len__(self) -> int:
        return self.labels.size

    @property
    def wrong(self) -> np.ndarray:
        return self.probs.argmax(axis=1) != self.labels

    def members(self) -> list[np.ndarray]:
        """Row indices of every group."""
        _, member = np.unique(self.groups, return_inverse=True)
        return np.split(np.argsort(member, kind="stable"), np.cumsum(np.bincount(member))[:-1])


@dataclass(frozen=True)
class Deployed:
    """What a calibrated method does to every row of the pool, bool [N] and sizes [N]."""

    accepted: np.ndarray
    missed: np.ndarray
    trials: np.ndarray  # accepted rows that the risk is about
    sizes: np.ndarray
    covers: bool  # whether a coverage is promised too

    def measure(self, rows: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
        """Risk (0 where nothing is accepted), coverage and mean set size of the accepted, with weights [len(rows)]."""
        accepted, trials = weights * self.accepted[rows], weights * self.trials[rows]
        risk = trials @ self.missed[rows] / max(trials.sum(), 1e-12)
        return risk, accepted.sum() / weights.sum(), accepted @ self.sizes[rows] / max(accepted.sum(), 1e-12)

    def verify(self, rows: np.ndarray, alpha: float, xi: float) -> str:
        """PASS, FAIL or INCONCLUSIVE on rows that count as independent, as ``SCRC.verify`` decides."""
        trials = self.trials[rows]
        claims = [(int((self.missed[rows] & trials).sum()), int(trials.sum()), alpha)]
        if self.covers:
            claims.append((int((~self.accepted[rows]).sum()), rows.size, 1 - xi))
        found = {
            "FAIL" if clopper_pearson_lower(k, m, FAIL_LEVEL) > limit
            else "PASS" if clopper_pearson_upper(k, m, PASS_LEVEL) <= limit
            else "INCONCLUSIVE"
            for k, m, limit in claims
        }  # fmt: skip
        return "FAIL" if "FAIL" in found else "INCONCLUSIVE" if "INCONCLUSIVE" in found else "PASS"


Method = Callable[[Rows, Rows, bool, int], Deployed | None]


def methods(xi: float, alpha: float) -> dict[str, Method]:
    """By name: from calibration rows to what is done to every row of the pool; None when infeasible."""

    def threshold(scores: Callable[[Rows], np.ndarray], condition: str) -> Method:
        def fit(rows: Rows, pool: Rows, grouped: bool, seed: int) -> Deployed | None:
            found = certify_threshold(
                scores(rows), rows.wrong, alpha=alpha, delta=DELTA, condition=condition, labels=rows.labels,
                min_coverage=xi if condition == "exit" else None, groups=rows.groups, rows_independent=not grouped,
                seed=seed,
            )  # fmt: skip
            if found.threshold is None:
                return None
            accepted = scores(pool) >= found.threshold
            trials = accepted if condition == "exit" else accepted & (pool.labels == 1)
            return Deployed(accepted, pool.wrong, trials, np.ones(len(pool)), condition == "exit")

        return fit

    def sets(variant: str, empty: bool) -> Method:
        wish = SCRC(xi, alpha, variant=variant, allow_empty=empty)  # type: ignore[arg-type]

        def fit(rows: Rows, pool: Rows, grouped: bool, seed: int) -> Deployed | None:
            found = wish.calibrate(
                rows.probs, rows.gate, rows.labels, groups=rows.groups, rows_independent=not grouped, seed=seed
            )
            if not found.feasible:
                return None
            chosen, accepted = found.predict_sets(pool.probs, pool.gate)
            missed = ~chosen[np.arange(len(pool)), pool.labels]
            return Deployed(accepted, missed, accepted, chosen.sum(axis=1).astype(float), True)

        return fit

    return {
        "gate, ltt": threshold(lambda rows: rows.gate, "exit"),
        "softmax, ltt": threshold(lambda rows: rows.probs.max(axis=1), "exit&y=1"),
        "scrc pac, no empty set": sets("pac", empty=False),
        **{f"scrc {variant}": sets(variant, empty=True) for variant in ("pac", "I", "T", "naive")},
    }


def take(pool: Rows, rows: np.ndarray, groups: np.ndarray) -> Rows:
    return Rows(pool.probs[rows], pool.gate[rows], pool.labels[rows], groups)


def alike(groups: np.ndarray) -> np.ndarray:
    """Weights of rows that make groups count alike."""
    _, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    return 1 / sizes[member]


def cut(pool: Rows, rng: np.random.Generator, world: bool) -> tuple[np.ndarray, ...]:
    """Calibration rows, the group of each, the rows that tell the truth, and one row each of groups to verify on.

    ``world``: groups are drawn with replacement (each draw is a group of its own) and the truth is the whole pool.
    """
    members = pool.members()
    half = len(members) // 2
    if world:
        drawn, rest = rng.integers(0, len(members), half), rng.integers(0, len(members), half)
    else:
        drawn, rest = np.split(rng.permutation(len(members)), [half])
    rows, others = (np.concatenate([members[group] for group in part]) for part in (drawn, rest))
    names = np.repeat(np.arange(half), [members[group].size for group in drawn])
    verified = np.array([rng.choice(members[group]) for group in rest])
    return rows, names, np.arange(len(pool)) if world else others, verified


def one_draw(
    pool: Rows, found: dict[str, Method], xi: float, alpha: float, rng: np.random.Generator, world: bool
) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Calibrate every method by group and ignoring groups; yield method, unit and what came of it."""
    rows, names, truth, others = cut(pool, rng, world)
    seed = int(rng.integers(2**31))
    shuffled = rng.permutation(rows.size)
    fit, test = shuffled[: rows.size // 2], shuffled[rows.size // 2 :]
    for unit in ("groups", "rows"):
        grouped = unit == "groups"
        part = take(pool, rows, names) if grouped else take(pool, rows[fit], names[fit])
        weights = alike(pool.groups[truth]) if grouped else np.ones(truth.size)
        # What the one who certified would verify on: new groups, one row each; or other rows of the same groups.
        seen = others if grouped else rows[test]
        for name, method in found.items():
            deployed = method(part, pool, grouped, seed)
            facts = dict.fromkeys(FACTS, 0.0)
            if deployed is not None:
                risk, coverage, size = deployed.measure(truth, weights)
                missed = deployed.covers and coverage < xi
                outcome, broken = deployed.verify(seen, alpha, xi), risk > alpha or missed
                facts |= {
                    "feasible": 1, "broken": int(broken), "risk": int(risk > alpha), "coverage": int(missed),
                    "deceived": int(broken and outcome == "PASS"), "size": size, "rejection": 1 - coverage, outcome: 1,
                }  # fmt: skip
            yield name, unit, facts


def resplit(pool: Rows, xi: float, alpha: float, *, draws: int, seed: int = 0, world: bool = False) -> Table:
    """Shares of all draws, by method and unit; sizes and rejections are means over those that deployed something.

    ``risk``, ``coverage``: share of draws that deployed something which breaks that promise; ``broken``: either;
    ``deceived``: it is broken, and verifying said PASS.
    """
    found, sums = methods(xi, alpha), dict[tuple[str, str], Counter[str]]()
    for draw in range(draws):
        for name, unit, facts in one_draw(pool, found, xi, alpha, np.random.default_rng([seed, draw]), world):
            sums.setdefault((name, unit), Counter()).update(facts)
    table: Table = {}
    for (name, unit), total in sums.items():
        deployed = total["feasible"]
        of = {fact: deployed if fact in ("size", "rejection") else draws for fact in FACTS}
        table.setdefault(name, {})[unit] = {fact: total[fact] / of[fact] if of[fact] else 0.0 for fact in FACTS}
    return table


def limits(pool: Rows, wishes: tuple[tuple[float, float], ...]) -> dict[str, float]:
    """How many groups there are, and the smallest risk that any data can certify with them: if no error is seen."""
    positive = np.unique(pool.groups[pool.labels == 1]).size
    groups = len(pool.members())
    facts: dict[str, float] = {"rows": len(pool), "groups": groups, "positive groups": positive}
    for name, n in (
        ("half of the groups", groups // 2),
        ("a quarter (the certify half of val_calib)", groups // 4),
        ("half of the positive groups, for an FNR", positive // 2),
    ):
        facts[f"least risk with {name}: {n}"] = clopper_pearson_upper(0, n, 1 - DELTA)
    for xi in sorted({xi for xi, _ in wishes}):
        rank = selection_rank(groups // 2, xi, SCRC(xi, 0.1).delta[0])
        trials = 0 if rank is None else rank - 1
        facts[f"least risk of sets at coverage {xi:g}, with {trials} accepted groups"] = clopper_pearson_upper(
            0, trials, 1 - SCRC(xi, 0.1).delta[1]
        )
    return facts


def read_pool(run: Path) -> Rows:
    """Stage A's answers on val_calib and val_test of a run."""
    from stage1_pro.training.inference import infer_split

    parts = [Predictions.load(run / "val_calib.npz"), infer_split(run, "val_test")]
    positive = parts[0].classes.index(parts[0].positive)
    chance = np.concatenate([softmax(part.logits_a)[:, positive] for part in parts])
    return Rows(
        np.column_stack([1 - chance, chance]),
        np.concatenate([part.gate_logits for part in parts]).astype(np.float64),
        np.concatenate([part.labels == positive for part in parts]).astype(np.int64),
        np.concatenate([part.groups for part in parts]),
    )


def train(name: str, data: Path, backbone: Path, run: Path) -> Path:
    """Train the fixed model unless its folder is finished."""
    if not (run / "splits.json").exists():
        fractions = SPLITS if name == "roadwork_scenes" else None
        stage1_pro.split(data / name / "labels.csv", run, positive="roadwork", fractions=fractions)
    overrides = SIGNS if name == "roadwork_signs" else [*SCENES, f"model.backbone={backbone}"]
    stage1_pro.train(run, load_config(None, overrides), resume=(run / "config.json").exists())
    return run


def render(results: dict[str, dict[str, object]], draws: int) -> str:
    """Markdown: for every data set what can be certified at all, and a table."""
    lines = []
    for name, found in results.items():
        lines += [f"### {name}", ""]
        lines += [f"- {fact}: {value:.4g}" for fact, value in found["limits"].items()]  # type: ignore[attr-defined]
        tables: dict[str, dict[str, Table]] = found["wishes"]  # type: ignore[assignment]
        heads = [f"{wish}, {truth}" for wish, both in tables.items() for truth in both]
        lines += ["", f"| method, unit | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
        for method in next(iter(tables.values()))["other half"]:
            for unit in ("groups", "rows"):
                cells = [cell(table[method][unit]) for both in tables.values() for table in both.values()]
                lines.append(f"| {method}, by {unit} | {' | '.join(cells)} |")
        lines.append("")
    lines.append(
        f"Cells: deployed / risk broken / coverage broken, % of {draws} draws; mean set size and rejection of the "
        "deployed; PASS-INCONCLUSIVE-FAIL of verifying them, % of the deployed; verified as PASS though broken, % of "
        "draws."
    )
    return "\n".join(lines)


def cell(found: dict[str, float]) -> str:
    if not found["feasible"]:
        return "infeasible in every draw"
    shares = " / ".join(f"{100 * found[fact]:.3g}" for fact in ("feasible", "risk", "coverage"))
    outcomes = "-".join(f"{100 * found[fact] / found['feasible']:.0f}" for fact in OUTCOMES)
    return f"{shares}; {found['size']:.2f}, {100 * found['rejection']:.0f}%; {outcomes}, {100 * found['deceived']:.3g}"


def plot(results: dict[str, dict[str, object]], path: Path) -> None:
    """Share of deployed calibrations that break their promise, by group and ignoring groups."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(results), 3, figsize=(11, 3 * len(results)), sharey=True, layout="constrained")
    for row, (name, found) in zip(np.atleast_2d(axes), results.items(), strict=True):
        for axis, (wish, both) in zip(row, found["wishes"].items(), strict=True):  # type: ignore[attr-defined]
            table: Table = both["pool as the world"]
            for place, (unit, color, label) in enumerate(
                (("groups", "#0072B2", "by group"), ("rows", "#D55E00", "ignoring groups"))
            ):
                at = np.arange(len(table)) + 0.4 * place - 0.2
                values = [100 * table[method][unit]["broken"] for method in table]
                axis.bar(at, values, width=0.38, color=color, label=label)
                never = [x for x, method in zip(at, table, strict=True) if not table[method][unit]["feasible"]]
                axis.plot(never, np.full(len(never), 2.5), "x", color=color, markersize=5)
            axis.axhline(100 * DELTA, color="black", linewidth=0.8, linestyle="--")
            axis.set_xticks(np.arange(len(table)))
            axis.set_xticklabels([method.replace(", no empty set", ",\nno empty") for method in table], rotation=60)
            axis.tick_params(labelsize=7)
            axis.set_title(f"{name}: {wish}", fontsize=9)
        row[0].set_ylabel("draws that deploy and\nbreak a promise, %", fontsize=8)
    np.atleast_2d(axes)[0, 0].legend(fontsize=7)
    figure.suptitle(
        "Groups of the pool drawn with replacement, truth = the pool; x: infeasible in every draw", fontsize=9
    )
    figure.savefig(path, dpi=70)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with roadwork_signs and roadwork_scenes")
    parser.add_argument("--backbone", type=Path, help="dinov2-small, where scenes are to be trained")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--signs", type=Path, help="a trained run on roadwork_signs")
    parser.add_argument("--scenes", type=Path, help="a trained run on roadwork_scenes")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.scenes is None and options.backbone is None:
        parser.error("--backbone must be given where there is no --scenes run")
    runs = {"roadwork_signs": options.signs, "roadwork_scenes": options.scenes}
    results: dict[str, dict[str, object]] = {}
    for name, wishes in WISHES.items():
        run = runs[name] or train(name, options.data, options.backbone, options.out / name)
        pool = read_pool(run)
        tables = {
            f"coverage >= {xi:g}, risk <= {alpha:g}": {
                truth: resplit(pool, xi, alpha, draws=options.draws, seed=options.seed, world=world)
                for truth, world in (("other half", False), ("pool as the world", True))
            }
            for xi, alpha in wishes
        }
        results[name] = {"limits": limits(pool, wishes), "wishes": tables}
    write_text(options.out / "resplits.json", json.dumps(results, indent=1))
    text = render(results, options.draws)
    write_text(options.out / "resplits.md", text + "\n")
    plot(results, options.out / "resplits.png")
    print(text)


if __name__ == "__main__":
    main()
